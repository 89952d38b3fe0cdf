"""The mixture of a layer's moments: which weights there can be, and its plain form for a mask.

On padded batches moments are over valid positions, and all positions are normalized by them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from bnfix.core.errors import BnfixError, ConfigError, NormError, NumericError
from bnfix.norm import kernels
from bnfix.norm.moments import (
    masked_moments,
    median_mix,
    mix,
    over_channel_groups,
    over_runs,
    shares,
)
from bnfix.norm.terms import Terms

Weight = float | Sequence[float] | Tensor


def weight_errors(
    given: Mapping[str, Tensor | None],
    both: tuple[Tensor, Tensor | None],
    channels: int,
    *,
    tracks: bool,
) -> list[BnfixError]:
    """All that speaks against weights, by name, and against the two that a layer then has."""
    found = [_error(name, w, channels, tracks) for name, w in given.items() if w is not None]
    errors = [error for error in found if error is not None]
    a, b = both
    if errors or b is None or a.device.type == "meta" or b.device.type == "meta":
        return errors
    # Two weights, each rounded, may add up to a little more than 1.
    room = 2 * max(torch.finfo(w.dtype).eps for w in (a, b))
    if bool((a + b.to(a.device) > 1 + room).any()):
        words = "more than 1 together with example_weight. Give weights whose sum is at most 1"
        errors.append(ConfigError(f"batch_weight: {words} in every channel.", name="batch_weight"))
    return errors


def _error(name: str, value: Tensor, channels: int, tracks: bool) -> BnfixError | None:
    """What speaks against one weight by itself."""
    if value.shape not in ((), (channels,)):
        return ConfigError(
            f"{name}: shape {tuple(value.shape)}, expected one number or {channels} (one a "
            "channel).",
            name=name,
        )
    if value.device.type == "meta":
        return None
    if not bool(((value >= 0) & (value <= 1)).all()):
        return ConfigError(f"{name}: a value outside 0 to 1. Give weights from 0 to 1.", name=name)
    # The example's moments alone need no others; the batch's are used without a weight.
    alone = value == (0 if name == "batch_weight" else value.flatten()[0].round())
    if tracks or bool(alone.all()):
        return None
    source, use = name.removesuffix("_weight"), "0" if name == "batch_weight" else "0 or 1"
    return NormError(
        f"{name}: the layer keeps no running statistics to mix the {source}'s with. Use {use}, or "
        "track_running_stats=True.",
        name=name,
    )


def evaluate_masked(
    input: Tensor, terms: Terms, valid: Tensor, finish: kernels.Finish = kernels.NOTHING
) -> Tensor:
    """`kernels.evaluate`, with the moments of positions that are true in ``valid`` ``(N, L)``."""
    values = kernels.values_of(input)
    if terms.batch_weight is not None and len(input) == 1:
        terms = terms.alone()
    mean, var, count = masked_moments(values, valid)
    mean, var = mixed(mean, var, terms.cast(values.dtype), count)
    return finish.apply(_scaled(input, mean, var, terms))


def mixed(
    mean: Tensor, var: Tensor, terms: Terms, count: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Moments to normalize by ``(N, C)``, from those of the examples, which count by ``count``."""
    mean, var = over_channel_groups(mean, var, terms.channel_groups)
    if terms.batch_weight is not None:
        share = None if count is None else shares(count).to(mean.dtype)
        terms = terms.beside(*(median_mix(mean, var) if terms.median else mix(mean, var, share)))
    if terms.mean is not None and terms.var is not None:
        a, gap = terms.example_weight, mean - terms.mean
        mean, var = terms.mean + a * gap, (1 - a) * terms.var + a * (var + (1 - a) * gap * gap)
    return mean, var


def train_masked(layer: Any, input: Tensor, valid: Tensor) -> Tensor:
    """A layer in training: each (ghost batch, channel group) by its own valid positions."""
    values, groups = kernels.values_of(input), layer.channel_groups
    n_runs = masked_runs(layer, input, valid)
    mean, var, count = masked_moments(values, valid)
    layer._update_running(mean, var, int(count.sum()), shares(count).to(mean.dtype))
    mean, var = over_runs(mean, var, n_runs, groups, count=count)
    return _scaled(input, mean, var, layer._terms())


def masked_runs(layer: Any, input: Tensor, valid: Tensor) -> int:
    """The number of ghost batches, each of which must have enough valid positions."""
    n_runs = 1 if layer.ghost_size is None else -(-len(input) // layer.ghost_size)
    least = min(int(run.sum()) for run in valid.tensor_split(n_runs))
    if least * (layer.num_features // layer.channel_groups) < 2 or layer.exclusive:
        found = "exclusive statistics" if layer.exclusive else f"{least} valid positions"
        raise NumericError(
            "expected more than 1 valid value per ghost batch and channel group when training "
            f"with a mask, and no exclusive statistics; got {found}, input size "
            f"{tuple(input.shape)} with ghost_size {layer.ghost_size}"
        )
    return n_runs


def _scaled(input: Tensor, mean: Tensor, var: Tensor, terms: Terms) -> Tensor:
    """All positions, normalized by moments ``(N, C)``."""
    values = kernels.values_of(input)
    centred, none = values - mean.unsqueeze(-1), torch.zeros_like(mean)
    output = kernels.affine(centred, none, var, terms.gamma, terms.beta, terms.eps)
    return output.view(input.shape).to(input.dtype)


@contextmanager
def trainable_weights(
    layers: Mapping[str, Any], granularity: str, start: float, of: str = "example"
) -> Iterator[dict[str, Tensor]]:
    """Let a weight of some layers take gradients, by default the example's; all is put back."""
    source = f"{of}_weight"
    before = [(layer, layer._buffers[source]) for layer in layers.values()]
    leaves: dict[str, Tensor] = {}
    try:
        for (name, layer), (_, own) in zip(layers.items(), before, strict=True):
            weight = layer.example_weight.new_zeros(()) if own is None else own.detach()
            value = weight.expand(layer.num_features) if granularity == "channel" else weight.mean()
            layer._buffers[source] = leaves[name] = value.clamp_min(start).requires_grad_()
            layer._live, layer._uses_batch = True, layer.batch_weight is not None
            layer._shiftable = False  # a leaf may come near 1
        yield leaves
    finally:
        for layer, own in before:
            layer._buffers[source] = own
            layer._refresh_flags()
