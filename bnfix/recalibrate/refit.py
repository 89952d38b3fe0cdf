"""`refit_`: fit scale and shift of layers with a new normalization to the original's outputs.

A layer that weighs the example's own statistics (most of all Group Norm) removes information from
every example that Batch Norm keeps, so the original's scale and shift no longer fit. Per channel,
the best affine map from the new normalized values z to the original's outputs y has a closed form:

    gamma = cov(z, y) / var(z)        beta = mean(y) - gamma mean(z)

The residual variance is var(y) - cov(z, y)^2 / var(z). The sums are moments of z, y and z + y in
float64, pooled by the law of total variance; cov = (var(z + y) - var(z) - var(y)) / 2.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import guards, masks, runtime
from bnfix.core.errors import DataError, NormError, NumericError, count, some
from bnfix.core.torch_private import eager
from bnfix.norm.layer import GeneralizedBatchNorm, generalized_norms
from bnfix.norm.moments import Moments, pool
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.collector import StopHereError, up_to

#: Enough examples for two numbers per channel; every layer needs a pass over all of them.
REFIT_SAMPLES = 256

#: Normalized values have variance 1; with var(z) at or below this there is no scale to fit.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class RefittedLayer:
    """The fit of one layer to the original's outputs."""

    name: str
    n_values: int  # per channel
    residual: float  # mean squared difference / variance; 1 is no better than a constant


@dataclass(frozen=True)
class Refitting:
    """The fits of all layers, in call order, and of the whole network."""

    layers: tuple[RefittedLayer, ...]
    n_examples: int
    not_fitted: tuple[str, ...]  # without scale and shift, or never reached by the data
    distance: tuple[float, float]  # of the network's outputs, before and after; `_Fit.distance`
    kept: bool  # false if the fit moved the outputs further away

    def describe(self) -> str:
        """The result in words, for the report."""
        before, after = self.distance
        done = (
            f"scale and shift of {count(len(self.layers), 'layers')} were re-fitted to the "
            f"original's outputs on {count(self.n_examples, 'examples')}"
        )
        if not self.kept:
            return (
                f"{done}. The network's outputs moved further away from the original's (distance "
                f"{before:.3g}, then {after:.3g}), so the re-fit was undone."
            )
        worst = max(self.layers, key=lambda layer: layer.residual)
        mean = sum(layer.residual for layer in self.layers) / len(self.layers)
        left = f"; not fitted: {some(self.not_fitted)}" if self.not_fitted else ""
        return (
            f"{done}; {mean:.1%} of their variance is unexplained on average, {worst.residual:.1%} "
            f"at most ({worst.name}){left}. The distance of the network's outputs from the "
            f"original's went from {before:.3g} to {after:.3g}."
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
    """Fit scale and shift of converted layers to the original network's outputs at those layers.

    The fit is by least squares per channel, without labels, layer by layer in call order, with all
    earlier layers already re-fitted. Each layer takes one pass through both networks, up to that
    layer. A layer that is called more than once is fitted to all its calls together; its later
    calls are measured with its old scale and shift. An exception leaves the model unchanged.
    """
    found = dict(generalized_norms(model))
    wanted = [n for n, layer in found.items() if layer.live] if layers is None else list(layers)
    before = {site.name: site.module for site in find_norms(original)}
    lacking = [name for name in wanted if name not in before or name not in found]
    if lacking or not wanted:
        raise NormError(
            f"re-fitting: {some(lacking) or 'no layer weighs the example, so none'} is a converted "
            "layer of both networks. Give the model from before the conversion, or name layers.",
            name=lacking[0] if lacking else None,
        )
    batches = list(batches) if isinstance(batches, Iterator) else batches
    scaled = {name: found[name] for name in wanted if found[name].weight is not None}
    fit = _Fit(model, original, forward, samples)
    records = []
    with guards.undone_on_error(model) as snapshot:
        first = fit.distance(batches)
        for name, n_calls in fit.order(batches, scaled).items():
            joint = fit.moments(batches, name, found[name], before[name], n_calls)
            records.append(_set_best(name, found[name], joint))
        last = fit.distance(batches)
    # Each layer alone is as close as possible to its original; the whole network need not be.
    kept = not last > first
    if not kept:
        snapshot.restore_()
    done = {record.name for record in records}
    return Refitting(
        layers=tuple(records),
        n_examples=fit.n_examples,
        not_fitted=tuple(name for name in wanted if name not in done),
        distance=(first, last),
        kept=kept,
    )


@dataclass
class _Fit:
    """Passes over the data that measure both networks."""

    model: nn.Module
    original: nn.Module
    forward: runtime.Forward | None
    samples: int | None
    n_examples: int = 0

    def _run(self, model: nn.Module, batch: Any) -> Any:
        return runtime.run(model, batch, runtime.device_of(model), self.forward)

    def distance(self, batches: Iterable[Any]) -> float:
        """Mean KL(original || converted) of the predictions, nats; infinite if not finite.

        For outputs other than logits: the squared difference divided by the original's variance.
        """
        total, n = 0.0, 0
        for batch in up_to(batches, self.samples):
            with guards.inference(self.model), guards.inference(self.original):
                own, wanted = (
                    _logits(self._run(net, batch)) for net in (self.model, self.original)
                )
            if own is None or wanted is None or own.shape != wanted.shape:
                return 0.0
            if own.ndim == 2 and own.shape[1] > 1:
                log_p, log_q = wanted.log_softmax(1), own.log_softmax(1)
                away = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(1)
            else:
                away = (own - wanted).square().flatten(1).mean(1) / wanted.var().clamp_min(1e-12)
            total, n = total + float(away.sum()), n + len(away)
        mean = total / max(n, 1)
        return mean if math.isfinite(mean) else math.inf

    def order(
        self, batches: Iterable[Any], layers: dict[str, GeneralizedBatchNorm]
    ) -> Counter[str]:
        """The layers in the order of their first calls, with their calls per forward pass."""
        calls: Counter[str] = Counter()
        names = {layer: name for name, layer in layers.items()}
        batch = next(iter(batches), None)
        if batch is None:
            raise DataError("re-fitting: no examples. Give at least one batch.")
        with guards.inference(self.model), guards.hooks() as handles:
            for layer in layers.values():
                handles.append(
                    layer.register_forward_pre_hook(lambda m, _: calls.update([names[m]]))
                )
            self._run(self.model, batch)
        return calls

    def moments(
        self, batches: Iterable[Any], name: str, layer: nn.Module, own: nn.Module, n_calls: int
    ) -> Moments:
        """Moments of z, y and z + y, as three rows, over all examples."""
        parts: list[Moments] = []
        self.n_examples = 0
        for index, batch in enumerate(up_to(batches, self.samples)):
            met = self._inputs(self.model, layer, batch, n_calls)
            met_own = self._inputs(self.original, own, batch, n_calls)
            if [x.shape for x, _ in met] != [x.shape for x, _ in met_own]:
                raise DataError(
                    f"{name}: the two networks call it {len(met)} and {len(met_own)} times, or on "
                    "different shapes. Give the model that this one was converted from."
                )
            for (x, valid), (x_own, _) in zip(met, met_own, strict=True):
                with masks.mask_used(valid):
                    part = _joint(_output(layer, x, affine=False), _output(own, x_own), valid)
                if not bool((part.mean + part.var).isfinite().all()):
                    raise NumericError(
                        f"{name}: its values are not finite in batch {index} (counted from 0). "
                        "Leave that batch out, or check the model.",
                        name=name,
                    )
                parts.append(part)
            self.n_examples += len(met[0][0]) if met else 0
        if not parts:
            raise DataError(
                f"re-fitting: a pass over the batches never reached {name}. Give batches that can "
                "be read more than once."
            )
        return pool(parts)

    def _inputs(
        self, model: nn.Module, layer: nn.Module, batch: Any, n_calls: int
    ) -> list[tuple[Tensor, masks.Valid | None]]:
        """A layer's inputs and their masks in one forward pass, which ends at its last call."""
        met: list[tuple[Tensor, masks.Valid | None]] = []

        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            last = len(met) + 1 == n_calls
            # Later layers can overwrite it in place.
            met.append((x if last else x.clone(), masks.current_mask()))
            if last:
                raise StopHereError

        # Compiled code would not see the hook.
        with guards.inference(model), guards.hooks() as handles, eager():
            handles.append(layer.register_forward_pre_hook(keep, with_kwargs=True))
            with suppress(StopHereError):
                self._run(model, batch)
        return [(x, valid) for x, valid in met if x.numel()]


def _logits(output: Any) -> Tensor | None:
    """The logits of an output, or else its first tensor, if it has one row per example."""
    found = next(iter(runtime.tensors_in(getattr(output, "logits", output))), None)
    if found is None or found.ndim < 2 or not found.is_floating_point():
        return None
    return found.double()


@torch.no_grad()
def _output(module: Any, x: Tensor, *, affine: bool = True) -> Tensor:
    """A layer's output in evaluation, before any activation; ``affine`` applies scale and shift."""
    if not isinstance(module, GeneralizedBatchNorm):
        mean, var = module.running_mean, module.running_var
        return F.batch_norm(x, mean, var, module.weight, module.bias, mean is None, 0, module.eps)
    with guards.tensors_kept(module) as tables:
        module.training = False
        for table in tables if not affine else ():
            table.update(dict.fromkeys({"weight", "bias"} & table.keys()))
        # Not the layer's own forward, which may include an activation.
        return GeneralizedBatchNorm.forward(module, x)


def _joint(z: Tensor, y: Tensor, valid: masks.Valid | None) -> Moments:
    if valid is not None:
        z, y = valid.kept(z), valid.kept(y)
    z, y = (t.double().transpose(0, 1).flatten(1) for t in (z, y))
    var, mean = torch.var_mean(torch.stack((z, y, z + y)), -1, correction=0)
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
    total = float(var_y.sum())
    residual = float(left) / total if total > 0 else 0.0
    return RefittedLayer(name, int(joint.count), residual)
