"""`refit_`: scale and shift of layers that changed what they normalize by, fitted to the original.

A layer that weighs the example's own statistics (Group Norm most of all) takes out of every
example what Batch Norm leaves in, so that the original's scale and shift no longer fit. Per channel
the best affine map from the new normalized values z to the original's outputs y has a closed form:

    gamma = cov(z, y) / var(z)        beta = mean(y) - gamma mean(z)

and what is left is var(y) - cov(z, y)^2 / var(z). The sums are moments of z, y and z + y, streamed
in float64 and pooled by the law of total variance; cov = (var(z + y) - var(z) - var(y)) / 2.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import guards, runtime
from bnfix.errors import DataError, NormError, NumericError, some
from bnfix.layers.norms import GeneralizedBatchNorm, generalized_norms
from bnfix.layers.sites import find_norms
from bnfix.moments import Moments, pool
from bnfix.statistics.collecting import up_to

#: Examples that are plenty for two numbers a channel; more cost a pass a layer each.
REFIT_SAMPLES = 256

#: var(z) at or below this holds nothing to fit a scale to: normalized values have a variance of 1.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class RefittedLayer:
    """How close one layer came.

    Args:
        name: dotted name.
        n_values: values a channel behind the fit.
        residual: mean squared difference to the original's outputs after the fit, by their
            variance, both summed over the channels; 0 is the same, 1 no better than a constant.
    """

    name: str
    n_values: int
    residual: float


@dataclass(frozen=True)
class Refitting:
    """What `refit_` did.

    Args:
        layers: one record a layer, in the order of their calls.
        n_examples: examples used.
        not_fitted: layers without scale and shift, or that the data never came to.
        seconds: wall-clock time.
        distance: of the net's outputs from the original's on the same examples, before and after:
            the mean divergence KL(original || converted) of the predictions, nats; for outputs that
            are no logits the squared difference by the original's variance.
        kept: whether the fit was taken; it is not where it brought the outputs no nearer, and
            scale and shift are then as they were.
    """

    layers: tuple[RefittedLayer, ...]
    n_examples: int
    not_fitted: tuple[str, ...]
    seconds: float
    distance: tuple[float, float] = (math.nan, math.nan)
    kept: bool = True

    def describe(self) -> str:
        """Say it in one sentence."""
        worst = max(self.layers, key=lambda layer: layer.residual)
        mean = sum(layer.residual for layer in self.layers) / len(self.layers)
        left = f"; not fitted: {some(self.not_fitted)}" if self.not_fitted else ""
        before, after = self.distance
        if not self.kept:
            return (
                f"scale and shift of {len(self.layers)} layers were re-fitted to the original's "
                f"outputs on {self.n_examples} examples, which took the whole net's outputs "
                f"further away from the original's (distance {before:.3g}, then {after:.3g}); so "
                "they are as they were."
            )
        return (
            f"scale and shift of {len(self.layers)} layers were re-fitted to the original's "
            f"outputs on {self.n_examples} examples; of their variance {mean:.1%} is left on "
            f"average, {worst.residual:.1%} at most ({worst.name}){left}. The distance of the "
            f"whole net's outputs from the original's went from {before:.3g} to {after:.3g}."
        )


def refit_(
    model: nn.Module,
    original: nn.Module,
    batches: Iterable[Any],
    *,
    layers: Sequence[str] | None = None,
    samples: int | None = None,
    forward: runtime.Forward | None = None,
) -> Refitting:
    """Fit scale and shift of converted layers to what the original net gives at the same layers.

    Layer by layer in the order of their calls, each with all before it already re-fitted and in
    place, by least squares per channel. Needs no labels. One pass over the batches for each layer
    through both nets, up to that layer. A layer that is called more than once is fitted to all its
    calls together, as the later ones are with its old scale and shift.

    Changes:
        ``weight`` and ``bias`` of the layers, in place; nothing after an exception.
    Restores:
        Modes and hooks of both.
    """
    started = time.perf_counter()
    found = dict(generalized_norms(model))
    wanted = [n for n, layer in found.items() if layer.live] if layers is None else list(layers)
    before = {site.name: site.module for site in find_norms(original)}
    lacking = [name for name in wanted if name not in before or name not in found]
    if lacking or not wanted:
        raise NormError(
            f"re-fitting: {some(lacking) or 'no layer weighs the example, so none'} is a converted "
            "layer of both nets. Give the model from before the conversion, or name layers.",
            name=lacking[0] if lacking else None,
        )
    if iter(batches) is batches:
        batches = list(batches)
    fitted = [name for name in wanted if found[name].weight is not None]
    fit = _Fit(model, original, forward, samples)
    snapshot = guards.Snapshot(model)
    records = []
    try:
        first = fit.distance(batches)
        for name, n_calls in fit.order(batches, {name: found[name] for name in fitted}).items():
            pair = (found[name], before[name])
            records.append(_set_best(name, found[name], fit.moments(batches, name, *pair, n_calls)))
        last = fit.distance(batches)
    except BaseException:
        snapshot.restore_()
        raise
    # Each layer is nearest to its original by itself; the net as a whole need not be.
    kept = not last > first
    if not kept:
        snapshot.restore_()
    done = {record.name for record in records}
    return Refitting(
        layers=tuple(records),
        n_examples=fit.n_examples,
        not_fitted=tuple(name for name in wanted if name not in done),
        seconds=time.perf_counter() - started,
        distance=(first, last),
        kept=kept,
    )


class _StopHereError(BaseException):
    """Ends a forward pass at the layer measured; no `except Exception` may catch it."""


class _Fit:
    """Passes over the data that measure one layer of both nets."""

    def __init__(
        self,
        model: nn.Module,
        original: nn.Module,
        forward: runtime.Forward | None,
        samples: int | None,
    ) -> None:
        self.model, self.original, self.forward, self.samples = model, original, forward, samples
        self.n_examples = 0

    def distance(self, batches: Iterable[Any]) -> float:
        """How far the outputs are from the original's; infinite where they are not finite."""
        total, n = 0.0, 0
        for batch in up_to(batches, self.samples):
            device = runtime.device_of(self.model)
            with guards.inference(self.model), guards.inference(self.original):
                own = _tensor_of(runtime.run(self.model, batch, device, self.forward))
                wanted = _tensor_of(runtime.run(self.original, batch, device, self.forward))
            if own is None or wanted is None or own.shape != wanted.shape:
                return 0.0
            own, wanted = own.double(), wanted.double()
            if own.ndim == 2 and own.shape[1] > 1:
                away = F.kl_div(
                    own.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="none"
                ).sum(1)
            else:
                away = (own - wanted).square().flatten(1).mean(1) / wanted.var().clamp_min(1e-12)
            total, n = total + float(away.sum()), n + len(away)
        found = total / max(n, 1)
        return found if math.isfinite(found) else math.inf

    def order(
        self, batches: Iterable[Any], layers: dict[str, GeneralizedBatchNorm]
    ) -> dict[str, int]:
        """The layers in the order of their first calls, and their calls a forward pass."""
        calls: dict[str, int] = {}
        names = {id(layer): name for name, layer in layers.items()}

        def count(module: nn.Module, args: Any) -> None:
            name = names[id(module)]
            calls[name] = calls.get(name, 0) + 1

        batch = next(iter(batches), None)
        if batch is None:
            raise DataError("re-fitting: no examples. Give at least one batch.")
        with guards.inference(self.model), guards.hooks() as handles:
            for layer in layers.values():
                handles.append(layer.register_forward_pre_hook(count))
            runtime.run(self.model, batch, runtime.device_of(self.model), self.forward)
        return calls

    def moments(
        self,
        batches: Iterable[Any],
        name: str,
        layer: GeneralizedBatchNorm,
        own: nn.Module,
        n_calls: int,
    ) -> Moments:
        """Moments of z, y and z + y, three rows, over all examples."""
        parts: list[Moments] = []
        self.n_examples = 0
        for index, batch in enumerate(up_to(batches, self.samples)):
            met = self._inputs(self.model, layer, batch, n_calls)
            met_own = self._inputs(self.original, own, batch, n_calls)
            if len(met) != len(met_own) or any(
                x.shape != y.shape for x, y in zip(met, met_own, strict=False)
            ):
                raise DataError(
                    f"{name}: the two nets call it {len(met)} and {len(met_own)} times, or on "
                    "other shapes. Give the model that this one was converted from."
                )
            for x, x_own in zip(met, met_own, strict=True):
                part = _joint(_normalized(layer, x), _output(own, x_own))
                if not bool((part.mean + part.var).isfinite().all()):
                    raise NumericError(
                        f"{name}: its values are not finite in batch {index} (counted from 0). "
                        "Leave that batch out, or look at the model.",
                        name=name,
                    )
                parts.append(part)
            self.n_examples += int(met[0].shape[0]) if met else 0
            parts = [pool(parts)] if parts else []
        if not parts:
            raise DataError(
                f"re-fitting: a pass over the batches never came to {name}. Give batches that can "
                "be gone through again."
            )
        return parts[0]

    def _inputs(self, model: nn.Module, layer: nn.Module, batch: Any, n_calls: int) -> list[Tensor]:
        """What a layer meets in one forward pass, which ends there."""
        met: list[Tensor] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            # What comes after may work in place.
            met.append(x if len(met) + 1 == n_calls else x.clone())
            if len(met) == n_calls:
                raise _StopHereError

        with (
            guards.inference(model),
            guards.hooks() as handles,
            torch.compiler.set_stance("force_eager"),
        ):
            handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
            try:
                runtime.run(model, batch, runtime.device_of(model), self.forward)
            except _StopHereError:
                pass
        return [x for x in met if x.numel()]


def _tensor_of(output: Any) -> Tensor | None:
    """The first tensor of an output that has one row an example."""
    while not isinstance(output, Tensor):
        if isinstance(output, Mapping):
            output = next(iter(output.values()), None)
        elif isinstance(output, list | tuple):
            output = next(iter(output), None)
        else:
            output = getattr(output, "logits", None)
        if output is None:
            return None
    return output if output.ndim > 1 and output.is_floating_point() else None


@torch.no_grad()
def _normalized(layer: GeneralizedBatchNorm, x: Tensor) -> Tensor:
    """The layer's values before scale and shift."""
    tables = (layer._parameters, layer._buffers)
    own = [(t, key, t[key]) for t in tables for key in ("weight", "bias") if key in t]
    training = layer.training
    try:
        layer.training = False
        for table, key, _ in own:
            table[key] = None
        # Not the layer itself: it may go on to activate.
        return GeneralizedBatchNorm.forward(layer, x)
    finally:
        layer.training = training
        for table, key, value in own:
            table[key] = value  # type: ignore[assignment]


@torch.no_grad()
def _output(module: nn.Module, x: Tensor) -> Tensor:
    """A norm layer's output before any activation of its own."""
    if isinstance(module, GeneralizedBatchNorm):
        training = module.training
        try:
            module.training = False
            return GeneralizedBatchNorm.forward(module, x)
        finally:
            module.training = training
    norm: Any = module
    batch_statistics = norm.running_mean is None
    return F.batch_norm(
        x,
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        batch_statistics,
        0,
        norm.eps,
    )


def _joint(z: Tensor, y: Tensor) -> Moments:
    z, y = (t.double().transpose(0, 1).flatten(1) for t in (z, y))
    rows = torch.stack((z, y, z + y))
    var, mean = torch.var_mean(rows, -1, correction=0)
    return Moments(mean.new_tensor(float(z.shape[1])), mean, var)


@torch.no_grad()
def _set_best(name: str, layer: GeneralizedBatchNorm, joint: Moments) -> RefittedLayer:
    var_z, var_y, var_sum = joint.var
    mean_z, mean_y, _ = joint.mean
    covariance = (var_sum - var_z - var_y) / 2
    flat = var_z <= _CONSTANT
    gamma = torch.where(flat, 0.0, covariance / torch.where(flat, 1.0, var_z))
    left = (var_y - gamma * covariance).clamp_min(0).sum()
    layer.weight.copy_(gamma)
    layer.bias.copy_(mean_y - gamma * mean_z)
    total = var_y.sum()
    residual = float(left / total) if float(total) > 0 else 0.0
    return RefittedLayer(name, int(joint.count), residual)
