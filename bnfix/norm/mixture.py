"""The layer's formulas in their plain form: the mixture of moments, with masks and gates.

On padded batches the moments cover valid positions only, and normalize all positions.

Gates of Representative Batch Norm: an example's own mean centres it and scales its output. For
example i and each channel, m_i is the mean of x over positions and (c, s, b) are the channel's
gates; mean and var are the moments of x', the batch's in training and the stored in evaluation:

    x' = x + c m_i
    z  = (x' - mean) / sqrt(var + eps)
    y  = gamma g_i z + beta,  g_i = sigmoid(s t_i + b) / sigmoid(b),  t_i the mean of z

Source: Gao et al., "Representative batch normalization with feature calibration", CVPR 2021.
Differs: gamma here is their gamma times sigmoid(b). So c = s = 0 changes nothing at any b, and
weight decay of gamma means the same with and without gates.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core.errors import BnfixError, ConfigError, NormError
from bnfix.norm.moments import (
    example_moments,
    masked_moments,
    median_mix,
    mix,
    over_channel_groups,
    over_runs,
    shares,
)

Weight = float | Sequence[float] | Tensor


class Terms(NamedTuple):
    """The layer's evaluation inputs: population moments, weights, scale, shift and settings."""

    mean: Tensor | None  # population mean (C,), pooled over channel groups; None if not tracked
    var: Tensor | None  # biased
    example_weight: Tensor  # a, () or (C,)
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    channel_groups: int
    shiftable: bool = False  # no weight is above `SHIFTABLE`
    batch_weight: Tensor | None = None  # b, () or (C,); needs a population
    median: bool = False  # the batch's moments are medians over its examples

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors; a method, as torch 2.8 compiles neither slices nor properties of tuples."""
        return self.mean, self.var, self.example_weight, self.gamma, self.beta, self.batch_weight

    def cast(self, dtype: torch.dtype) -> Terms:
        """Convert every tensor."""
        if all(t is None or t.dtype == dtype for t in self.tensors()):
            return self
        return self._with([None if t is None else t.to(dtype) for t in self.tensors()])

    def channels(self, index: Tensor, of: int) -> Terms:
        """Select channels, in whole groups."""
        kept = self._with([t if t is None or t.ndim == 0 else t[index] for t in self.tensors()])
        return kept._replace(channel_groups=self.channel_groups * len(index) // of)

    def weight(self) -> Tensor:
        """The total weight of measured moments: the example's plus the batch's."""
        a, b = self.example_weight, self.batch_weight
        return a if b is None else a + b

    def alone(self) -> Terms:
        """The terms for a batch of one, where the example is the batch."""
        return self._with([self.mean, self.var, self.weight(), self.gamma, self.beta, None])

    def beside(self, mean: Tensor, var: Tensor) -> Terms:
        """Mix the batch's moments ``(C,)`` into the population's."""
        if self.batch_weight is None or self.mean is None or self.var is None:
            return self
        # Clamped for an example weight of 1, where the batch weight is 0: then 0 / 1e-6 = 0.
        share = (self.batch_weight / (1 - self.example_weight).clamp_min(1e-6)).clamp_max(1.0)
        gap = mean - self.mean
        mixed = torch.lerp(self.mean, mean, share)  # exact at both ends
        spread = torch.addcmul(torch.lerp(self.var, var, share), gap * gap, share * (1 - share))
        return self._with([mixed, spread, self.example_weight, self.gamma, self.beta, None])

    def _with(self, tensors: list[Any]) -> Terms:
        mean, var, weight, gamma, beta, batch = tensors
        # Not _replace, because torch 2.8 does not compile it.
        return Terms(
            mean=mean,
            var=var,
            example_weight=weight,
            gamma=gamma,
            beta=beta,
            eps=self.eps,
            channel_groups=self.channel_groups,
            shiftable=self.shiftable,
            batch_weight=batch,
            median=self.median,
        )


def values_of(input: Tensor) -> Tensor:
    """An input as ``(N, C, L)`` for its statistics; half precision becomes float32."""
    values = input.unsqueeze(-1) if input.dim() == 2 else input.flatten(2)
    return values.to(wide_type(input.dtype))


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """The type to compute in."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def affine(
    centred: Tensor,
    offset: Tensor,
    var: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
) -> Tensor:
    """Scale and shift centred values."""
    scale = torch.rsqrt(var + eps)
    if gamma is not None:
        scale = scale * gamma.to(scale.dtype)
    shift = offset * scale
    if beta is not None:
        shift = shift + beta.to(shift.dtype)
    return torch.addcmul(shift.unsqueeze(-1), centred, scale.unsqueeze(-1))


def mixed_moments(
    mean: Tensor, var: Tensor, terms: Terms, a: Tensor | float, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Moments ``(N, C)`` to normalize by; in the batch, examples are weighted by ``count``."""
    mean, var = over_channel_groups(mean, var, terms.channel_groups)
    if terms.batch_weight is not None:
        share = None if count is None else shares(count).to(mean.dtype)
        terms = terms.beside(*(median_mix(mean, var) if terms.median else mix(mean, var, share)))
    if terms.mean is None or terms.var is None:
        return mean, var
    distance = mean - terms.mean
    rest = 1 - a
    var = torch.addcmul(var, distance, distance * rest)
    return terms.mean + a * distance, rest * terms.var + a * var


def plain(input: Tensor, terms: Terms) -> Tensor:
    """Evaluate the formula directly, centring each (example, channel) by its own mean."""
    values = values_of(input)
    mean, var, centred = example_moments(values)
    cast = terms.cast(values.dtype)
    mu, var = mixed_moments(mean, var, cast, cast.example_weight)
    output = affine(centred, mean - mu, var, terms.gamma, terms.beta, terms.eps)
    return output.view(input.shape).to(input.dtype)


def normalized(layer: Any, input: Tensor, valid: Tensor | None, *, by_batch: bool) -> Tensor:
    """Normalize by a layer's ghost batches or mixture, with its gates and a mask ``(N, L)``."""
    values, count, own = values_of(input), None, layer.gates
    if valid is None:
        mean, var, around = example_moments(values)
    else:
        mean, var, count = masked_moments(values, valid)
        around = values - mean.unsqueeze(-1)
    if own is not None:
        centring, scaling, bias = own.to(values.dtype)
        mean = mean + centring * mean
    if by_batch:
        n_runs, n_values = layer._runs_of(input, valid)
        share = None if count is None else shares(count).to(mean.dtype)
        layer._update_running(mean, var, n_values, share)
        groups = layer.channel_groups
        mu, var = over_runs(mean, var, n_runs, groups, exclusive=layer.exclusive, count=count)
    else:
        terms = layer._terms()
        if terms.batch_weight is not None and len(input) == 1:
            terms = terms.alone()
        terms = terms.cast(values.dtype)
        mu, var = mixed_moments(mean, var, terms, terms.example_weight, count)
    gamma = layer.weight
    if own is not None:
        z = (mean - mu) * torch.rsqrt(var + layer.eps)
        # The quotient is formed from logarithms, because sigmoid(b) can round to 0.
        gate = (F.softplus(-bias) - F.softplus(-(scaling * z + bias))).exp()
        gamma = gate if gamma is None else gate * gamma
    output = affine(around, mean - mu, var, gamma, layer.bias, layer.eps)
    return output.view(input.shape).to(input.dtype)


def weight_errors(layer: Any, weight: Tensor | None, batch: Tensor | None) -> list[BnfixError]:
    """All problems of a layer's new weights; None keeps the present weight."""
    given = {"example_weight": weight, "batch_weight": batch}
    found = [_error(layer, name, w) for name, w in given.items() if w is not None]
    errors = [error for error in found if error is not None]
    a, b = (getattr(layer, name) if w is None else w for name, w in given.items())
    if errors or b is None or a.device.type == "meta" or b.device.type == "meta":
        return errors
    # Two rounded weights can add up to slightly more than 1.
    room = 2 * max(torch.finfo(w.dtype).eps for w in (a, b))
    if bool((a + b.to(a.device) > 1 + room).any()):
        words = "more than 1 together with example_weight. Give weights whose sum is at most 1"
        errors.append(ConfigError(f"batch_weight: {words} in every channel.", name="batch_weight"))
    return errors


def _error(layer: Any, name: str, value: Tensor) -> BnfixError | None:
    """The problem of a single weight, if any."""
    n = layer.num_features
    if value.shape not in ((), (n,)):
        words = f"expected one number or {n} (one per channel)."
        return ConfigError(f"{name}: shape {tuple(value.shape)}, {words}", name=name)
    if value.device.type == "meta":
        return None
    if not bool(((value >= 0) & (value <= 1)).all()):
        return ConfigError(f"{name}: a value outside 0 to 1. Give weights from 0 to 1.", name=name)
    # Without running statistics, weight 1 uses the example's moments, and weight 0 the batch's.
    alone = value == (0 if name == "batch_weight" else value.flatten()[0].round())
    if layer.running_mean is not None or bool(alone.all()):
        return None
    source, use = name.removesuffix("_weight"), "0" if name == "batch_weight" else "0 or 1"
    return NormError(
        f"{name}: the layer keeps no running statistics to mix the {source}'s with. Use {use}, or "
        "track_running_stats=True.",
        name=name,
    )


def closed(layer: Any, bias: float = 1.0) -> nn.Parameter:
    """Gates ``(3, C)`` that change nothing: centring 0, scaling 0, a bias."""
    like = layer.example_weight
    rows = torch.tensor([[0.0], [0.0], [bias]], device=like.device)
    return nn.Parameter(rows.repeat(1, layer.num_features))


def set_gates_(layer: Any, rows: Sequence[Sequence[float]]) -> None:
    """Set the values of a layer's gates."""
    given = torch.tensor(rows)
    if given.shape != layer.gates.shape or not bool(given.isfinite().all()):
        raise NormError(
            f"gates: shape {tuple(given.shape)}, expected finite numbers of shape "
            f"{tuple(layer.gates.shape)}."
        )
    with torch.no_grad():
        layer.gates.copy_(given)


def are_open(layer: Any) -> bool:
    """Whether a layer's gates depend on the example."""
    own = layer.gates
    return own is not None and own.device.type != "meta" and bool((own[:2] != 0).any())


def centred(layer: Any, mean: Tensor) -> Tensor:
    """The examples' means ``(N, C)`` after a layer's gates have centred them."""
    own = getattr(layer, "gates", None)
    return mean if own is None else mean + own[0].detach().to(mean) * mean


@contextmanager
def trainable_weights(
    layers: Mapping[str, Any], granularity: str, start: float, of: str = "example"
) -> Iterator[dict[str, Tensor]]:
    """Let a weight of some layers take gradients, by default the example's; restore it at exit."""
    source = f"{of}_weight"
    before = [(layer, layer._buffers[source]) for layer in layers.values()]
    leaves: dict[str, Tensor] = {}
    try:
        for (name, layer), (_, own) in zip(layers.items(), before, strict=True):
            weight = layer.example_weight.new_zeros(()) if own is None else own.detach()
            value = weight.expand(layer.num_features) if granularity == "channel" else weight.mean()
            layer._buffers[source] = leaves[name] = value.clamp_min(start).requires_grad_()
            layer.weighs, layer.uses_batch = True, layer.batch_weight is not None
            layer._shiftable = False  # training can move the weight close to 1
        yield leaves
    finally:
        for layer, own in before:
            layer._buffers[source] = own
            layer._refresh_flags()
