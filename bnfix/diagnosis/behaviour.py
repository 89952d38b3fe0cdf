"""Faults of a model's norm layers: in its settings, in one call, and on data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ModelError, NumericError
from bnfix.core.torch_private import BatchNormBase
from bnfix.diagnosis.faults import Fault, Finding, NormTensors, finding
from bnfix.metrics.evaluate import labels_of
from bnfix.norm.sites import NormSite, find_norms, instance_norms
from bnfix.recalibrate.recalibrate import residuals

#: Means off by half a deviation, variances by a factor of 2, on average over a layer's channels.
_STALE_SHIFT, _STALE_LOG_RATIO = 0.5, math.log(2)
#: The smallest number of float16: an eps below it is 0 there.
_LEAST_HALF: Final = 2.0**-24
_FEW_LEFT: Final = 0.01
#: Outputs differ between two passes over the data, but not by this factor.
_RANGE_FACTOR: Final = 10


@dataclass(frozen=True)
class Behaviour:
    """A model on data, in evaluation and (``..._training``) with each batch's own statistics."""

    n_examples: int
    # Mean shift in deviations and log variance ratio, stored against data: means over channels.
    drifts: dict[str, tuple[float, float]]
    top1: float | None  # None without labels or logits
    top1_training: float | None
    output_range: tuple[float, float]
    output_range_training: tuple[float, float]


def examine_model(model: nn.Module, layers: Sequence[NormTensors]) -> list[Finding]:
    """List the faults in the settings of norm layers."""
    stored = {layer.name: layer for layer in layers}
    found = [
        finding(site.name, *fault)
        for site in find_norms(model)
        for fault in _setting_faults(
            site, stored.get(site.name), at_rest=site.is_put_to_rest(model)
        )
    ]
    why = "its running statistics are means of each example's own, so no command changes them"
    instances = instance_norms(model).items()
    return found + [finding(name, "instance-norm", f"{kind}: {why}") for name, kind in instances]


def _setting_faults(
    site: NormSite, stored: NormTensors | None, *, at_rest: bool
) -> Iterator[Fault]:
    if site.aliases:
        same = ", ".join(site.aliases[:3])
        yield "shared", f"the same module as {same}: all use one set of statistics"
    if site.frozen:
        why = "its numbers are constants, which no command changes without --unfreeze"
        yield "frozen-kind", f"{site.kind}: {why}"
    elif at_rest:
        yield "frozen", "the model's code froze it (evaluation mode, no gradients): left alone"
    if not site.has_statistics:
        yield (
            "no-statistics",
            "keeps no running statistics: in evaluation, too, outputs depend on the batch",
        )
        return
    if not site.frozen:
        n = stored.batches_tracked if stored is not None and not stored.ours else None
        yield from _momentum_faults(getattr(site.module, "momentum", 0.1), n)
    yield from _eps_faults(site.module)


def _momentum_faults(momentum: Any, n_batches: int | None) -> Iterator[Fault]:
    if momentum is None:
        detail = "momentum None: statistics are the mean over all of training, early batches too"
        yield "momentum-none", detail
    elif not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        detail = f"momentum {momentum}, expected 0 to 1: statistics diverge in training"
        yield "momentum-out-of-range", detail
    elif momentum == 0:
        yield "momentum-zero", "momentum 0: statistics never move in training"
    elif momentum >= 0.5:
        detail = f"momentum {momentum:g}: statistics are those of the last few batches"
        yield "momentum-high", detail
    # The tensors alone show this at torch's usual momentum: fault few-batches.
    elif momentum < 0.1 and n_batches and n_batches > 0:
        left = (1 - momentum) ** n_batches
        if left > _FEW_LEFT:
            rest = f"leaves a part of {left:.2g} of a new layer's statistics"
            yield "momentum-low", f"momentum {momentum:g} over {n_batches} batches {rest}"


def _eps_faults(module: nn.Module) -> Iterator[Fault]:
    eps, var = float(getattr(module, "eps", 1e-5)), getattr(module, "running_var", None)
    if not isinstance(var, Tensor) or not var.numel() or not bool(var.isfinite().all()):
        return
    wide = var.double().clamp_min(0)
    least = float(wide.min())
    if eps < _LEAST_HALF and least + eps < 1e-6:
        gain = math.inf if least + eps == 0 else (least + eps) ** -0.5
        times = f"a channel is multiplied by {gain:.3g}, in float16 by infinity"
        yield "eps-tiny", f"eps {eps:g} beside a variance of {least:.2g}: {times}"
    n_small = int((wide < eps).sum())
    if n_small > wide.numel() / 2 and bool(wide.any()):
        small = f"{n_small} of {wide.numel()} channels have a variance below eps ({eps:g})"
        yield "eps-dominates", f"{small}: they are hardly normalized"


def examine_call(model: nn.Module, batch: Any) -> list[Finding]:
    """List the layers that one forward pass calls again, not at all, or on single positions."""
    sites = find_norms(model)
    calls: dict[str, list[int]] = {site.name: [] for site in sites}
    with guards.inference(model), guards.hooks() as handles:
        for site in sites:

            def look(_: nn.Module, args: Any, out: Any, name: str = site.name) -> None:
                shape = out.shape if isinstance(out, Tensor) else ()
                calls[name].append(math.prod(shape[2:]))

            handles.append(site.module.register_forward_hook(look))
        runtime.run(model, batch, runtime.device_of(model))
    found = []
    for name, positions in calls.items():
        if not positions:
            detail = "the forward pass does not reach it: its statistics are never used"
            found.append(finding(name, "unused", detail))
            continue
        if len(positions) > 1:
            detail = f"is called {len(positions)} times a forward pass; its statistics pool them"
            found.append(finding(name, "reused", detail))
        if min(positions) == 1:
            no = "cannot be trained on a batch of one, and example weights have no effect"
            found.append(finding(name, "single-position", f"has 1x1 feature maps: {no}"))
    return found


def examine_behaviour(model: nn.Module, batches: Iterable[Any]) -> tuple[Behaviour, list[Finding]]:
    """Run data through a model in both modes, and compare."""
    try:
        measured = residuals(model, batches)
    except NumericError:  # of a layer further down; outputs that are not finite are found below
        measured = {}
    drifts = {name: (shift, ratio) for name, (ratio, shift) in measured.items()}
    evaluation = _pass(model, batches, training=False)
    training = _pass(model, batches, training=True)
    seen = Behaviour(
        n_examples=evaluation.n,
        drifts=drifts,
        top1=evaluation.top1,
        top1_training=training.top1,
        output_range=(evaluation.low, evaluation.high),
        output_range_training=(training.low, training.high),
    )
    faults = _mode_faults(evaluation, training)
    return seen, [*_stale_layers(drifts), *(finding("", *fault) for fault in faults)]


@dataclass
class _Pass:
    """One pass over the data: its outputs, and which examples were classified correctly."""

    n: int = 0
    low: float = math.inf
    high: float = -math.inf
    n_bad: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, batch: Any, n: int, output: Any) -> None:
        """Take in the outputs of a batch of ``n`` examples."""
        self.n += n
        for tensor in runtime.tensors_in(output):
            if tensor.is_floating_point():
                finite = tensor[tensor.isfinite()].double()
                self.n_bad += tensor.numel() - finite.numel()
                if finite.numel():
                    self.low = min(self.low, float(finite.min()))
                    self.high = max(self.high, float(finite.max()))
        try:
            logits = runtime.logits_of(output)
        except ModelError:
            return
        labels = labels_of(batch, n, logits.shape[1]) if len(logits) == n else None
        if labels is not None:
            self.parts.append(logits.argmax(1).cpu() == torch.as_tensor(labels))

    @property
    def right(self) -> Tensor | None:
        """For each example whether it was classified correctly; ``None`` if not known of all."""
        return torch.cat(self.parts) if self.parts and sum(map(len, self.parts)) == self.n else None

    @property
    def top1(self) -> float | None:
        return None if self.right is None else len(self.right.nonzero()) / self.n


def _pass(model: nn.Module, batches: Iterable[Any], *, training: bool) -> _Pass:
    """One pass; in training only the norm layers are in training mode, and all is restored."""
    found = _Pass()
    snapshot = guards.Snapshot(model)
    try:
        with guards.inference(model):
            for site in find_norms(model) if training else ():
                if isinstance(site.module, BatchNormBase) and not site.frozen:
                    site.module.train()
            for batch in batches:
                x = runtime.unpack(batch)[0]
                n = len(x) if isinstance(x, Tensor) else 1
                if training and n < 2:
                    continue  # one example has no batch statistics on 1x1 feature maps
                found.add(batch, n, runtime.run(model, batch, runtime.device_of(model)))
    finally:
        snapshot.restore_()
    return found


def _stale_layers(drifts: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    for name, (shift, ratio) in drifts.items():
        if not (shift <= _STALE_SHIFT and ratio <= _STALE_LOG_RATIO):  # NaN is stale too
            off = f"stored means are {shift:.2g} deviations off those of the data, variances by a"
            factor = math.exp(min(ratio, 700))  # exp overflows above 709
            yield finding(
                name, "stale", f"{off} factor of {factor:.3g}, on average over the channels"
            )


def _mode_faults(evaluation: _Pass, training: _Pass) -> Iterator[Fault]:
    for mode, passed in (("evaluation", evaluation), ("training", training)):
        if passed.n_bad:
            yield "output-not-finite", f"{passed.n_bad} outputs in {mode} mode are not finite"
    own = "the statistics of each batch"
    before, after = evaluation.right, training.right
    if before is not None and after is not None and training.n == evaluation.n:
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        # Paired: without a difference the counts agree to within the root of their sum.
        if gained - lost > 3 * math.sqrt(gained + lost):
            stored = f"top-1 is {evaluation.top1:.3f} with the stored statistics"
            fit = "the stored ones do not fit"
            yield "modes-differ", f"{stored} and {training.top1:.3f} with {own}: {fit}"
    widths = [max(abs(passed.low), abs(passed.high)) for passed in (evaluation, training)]
    if all(map(math.isfinite, widths)) and widths[0] > _RANGE_FACTOR * widths[1] > 0:
        reach = f"outputs reach {widths[0]:.3g} in evaluation and {widths[1]:.3g} with {own}"
        yield "output-range", reach
