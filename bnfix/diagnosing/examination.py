"""What is wrong with a model's norm layers: as it is built, as it is called, and on data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix import guards, runtime
from bnfix._torch_private import BatchNormBase
from bnfix.diagnosing.diagnosis import INSPECT, RECALIBRATE, Finding, NormTensors
from bnfix.errors import ModelError, NumericError
from bnfix.layers.sites import NormSite, find_norms, instance_norms
from bnfix.measuring.evaluation import labels_of
from bnfix.statistics.calibration import residuals

#: Means off by half a deviation, variances by a factor of 2, on average over a layer's channels.
_STALE_SHIFT, _STALE_LOG_RATIO = 0.5, math.log(2)
#: The smallest number of float16: an eps below it is 0 there.
_LEAST_HALF: Final = 2.0**-24
_FEW_LEFT: Final = 0.01
#: A range in evaluation this many times that in training is no chance.
_RANGE_FACTOR: Final = 10


@dataclass(frozen=True)
class Behaviour:
    """What a model does on data, in both modes.

    Args:
        n_examples: how many were run.
        drifts: for each layer reached the mean shift, in deviations, and the log variance ratio
            between what is stored and what the data give; means over the channels.
        top1: fraction right in evaluation; ``None`` without labels or logits.
        top1_training: the same, normalized by the statistics of each batch.
        output_range: least and largest output in evaluation.
        output_range_training: the same, normalized by the statistics of each batch.
    """

    n_examples: int
    drifts: dict[str, tuple[float, float]]
    top1: float | None
    top1_training: float | None
    output_range: tuple[float, float]
    output_range_training: tuple[float, float]


def examine_model(model: nn.Module, layers: Sequence[NormTensors]) -> list[Finding]:
    """List what can be wrong with norm layers, as far as their settings tell."""
    stored = {layer.name: layer for layer in layers}
    findings = []
    for site in find_norms(model):
        at_rest = site.is_put_to_rest(model)
        faults = _setting_faults(site, stored.get(site.name), at_rest=at_rest)
        findings += [Finding(site.name, *fault) for fault in faults]
    for name, kind in instance_norms(model).items():
        detail = (
            f"{kind}: its running statistics are means of the examples' own, not of a population, "
            "so no command changes them"
        )
        findings.append(
            Finding(
                layer=name,
                fault="instance-norm",
                detail=detail,
                severity="note",
                advice="left alone",
            )
        )
    return findings


_Fault = tuple[str, str, str, str]


def _setting_faults(site: NormSite, stored: NormTensors | None, *, at_rest: bool) -> list[_Fault]:
    found: list[_Fault] = []
    if site.aliases:
        detail = f"the same module as {', '.join(site.aliases[:3])}: one set of statistics for all"
        found.append(("shared", detail, "note", "nothing, if it is meant so; " + INSPECT))
    if site.frozen:
        detail = (
            f"{site.kind}: its numbers are constants, which no command changes without --unfreeze"
        )
        advice = "nothing, if it is meant so; " + RECALIBRATE
        found.append(("frozen-kind", detail, "note", advice))
    elif at_rest:
        detail = "the model's code froze it (evaluation mode, no gradients): left alone"
        found.append(("frozen", detail, "note", "nothing, if it is meant so; " + RECALIBRATE))
    if not site.has_statistics:
        detail = "keeps no running statistics: in evaluation, too, outputs depend on the batch"
        advice = (
            "in Python: build it with track_running_stats=True, load_state_dict(..., "
            "strict=False), bnfix.recalibrate_, bnfix.save"
        )
        return [*found, ("no-statistics", detail, "warning", advice)]
    if not site.frozen:
        found += _momentum_faults(getattr(site.module, "momentum", 0.1), stored)
    return found + _eps_faults(site.module)


def _momentum_faults(momentum: Any, stored: NormTensors | None) -> list[_Fault]:
    if momentum is None:
        detail = "momentum None: statistics are the mean over all of training, early batches too"
        return [("momentum-none", detail, "note", RECALIBRATE)]
    if not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        detail = f"momentum {momentum} is no part of 1: statistics diverge in training"
        return [("momentum-out-of-range", detail, "error", RECALIBRATE)]
    if momentum == 0:
        detail = "momentum 0: statistics never move in training"
        return [("momentum-zero", detail, "warning", RECALIBRATE)]
    if momentum >= 0.5:
        detail = f"momentum {momentum:g}: statistics are those of the last few batches"
        return [("momentum-high", detail, "warning", RECALIBRATE)]
    n = stored.batches_tracked if stored is not None and not stored.ours else None
    left = 0.0 if not n or n < 0 else (1 - momentum) ** n
    # At torch's usual momentum the file alone has told it already.
    if left > _FEW_LEFT and momentum < 0.1:
        detail = (
            f"momentum {momentum:g} over {n} batches leaves a part of {left:.2g} of a new layer's "
            "statistics"
        )
        return [("momentum-low", detail, "warning", RECALIBRATE)]
    return []


def _eps_faults(module: nn.Module) -> list[_Fault]:
    eps, var = float(getattr(module, "eps", 1e-5)), getattr(module, "running_var", None)
    found: list[_Fault] = []
    if not isinstance(var, Tensor) or not var.numel() or not bool(var.isfinite().all()):
        return found
    wide = var.double().clamp_min(0)
    least = float(wide.min()) + eps
    if eps < _LEAST_HALF and least < 1e-6:
        gain = math.inf if least == 0 else least**-0.5
        detail = (
            f"eps {eps:g} beside a variance of {float(wide.min()):.2g}: a channel is multiplied by "
            f"{gain:.3g}, in float16 by infinity"
        )
        found.append(("eps-tiny", detail, "warning", RECALIBRATE))
    n_small = int((wide < eps).sum())
    if n_small > wide.numel() / 2 and bool(wide.any()):
        detail = (
            f"{n_small} of {wide.numel()} channels have a variance below eps ({eps:g}): they are "
            "hardly normalized"
        )
        found.append(("eps-dominates", detail, "warning", RECALIBRATE))
    return found


def examine_call(model: nn.Module, batch: Any) -> list[Finding]:
    """List what one forward pass tells: layers called again, not at all, or on single positions."""
    sites = find_norms(model)
    calls: dict[str, list[int]] = {site.name: [] for site in sites}
    with guards.inference(model), guards.hooks() as handles:
        for site in sites:

            def look(_: nn.Module, args: Any, out: Any, name: str = site.name) -> None:
                shape = out.shape if isinstance(out, Tensor) else ()
                calls[name].append(math.prod(shape[2:]))

            handles.append(site.module.register_forward_hook(look))
        runtime.run(model, batch, runtime.device_of(model))
    findings = []
    for name, positions in calls.items():
        if not positions:
            detail = "is not reached in a forward pass: its statistics are never used"
            findings.append(
                Finding(
                    layer=name, fault="unused", detail=detail, severity="note", advice="nothing"
                )
            )
        elif len(positions) > 1:
            detail = f"is called {len(positions)} times a forward pass; its statistics pool them"
            advice = "with statistics of a call each: give every call a layer of its own"
            findings.append(
                Finding(layer=name, fault="reused", detail=detail, severity="note", advice=advice)
            )
        if positions and min(positions) == 1:
            detail = (
                "normalizes maps of a single position: with a batch of one it cannot be trained, "
                "and example weights do not act there"
            )
            findings.append(
                Finding(
                    layer=name,
                    fault="single-position",
                    detail=detail,
                    severity="note",
                    advice="nothing",
                )
            )
    return findings


def examine_behaviour(model: nn.Module, batches: Iterable[Any]) -> tuple[Behaviour, list[Finding]]:
    """Run data through a model in both modes, and compare."""
    try:
        measured = residuals(model, batches)
    except NumericError:  # from a layer below; that outputs are not finite is found on its own
        measured = {}
    drifts = {name: (shift, ratio) for name, (ratio, shift) in measured.items()}
    evaluation = _pass(model, batches, training=False)
    training = _pass(model, batches, training=True)
    seen = Behaviour(
        n_examples=evaluation.n,
        drifts=drifts,
        top1=None if evaluation.right is None else len(evaluation.right.nonzero()) / evaluation.n,
        top1_training=None
        if training.right is None
        else len(training.right.nonzero()) / training.n,
        output_range=(evaluation.low, evaluation.high),
        output_range_training=(training.low, training.high),
    )
    return seen, [*_drift_findings(drifts), *_mode_findings(seen, evaluation, training)]


@dataclass(frozen=True)
class _Seen:
    n: int = 0
    low: float = math.inf
    high: float = -math.inf
    n_bad: int = 0
    right: Tensor | None = None


def _pass(model: nn.Module, batches: Iterable[Any], *, training: bool) -> _Seen:
    """One pass; in training the norms alone normalize by the batch, and nothing is kept of it."""
    found, right = _Seen(), list[Tensor]()
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
                    continue  # one example has no batch statistics where its maps are points
                output = runtime.run(model, batch, runtime.device_of(model))
                found = _with_output(found, n, output)
                right += _right(output, batch, n)
    finally:
        snapshot.restore_()
    complete = bool(right) and sum(map(len, right)) == found.n
    return replace(found, right=torch.cat(right) if complete else None)


def _with_output(seen: _Seen, n: int, output: Any) -> _Seen:
    parts = [t.double().flatten() for t in runtime.tensors_in(output) if t.is_floating_point()]
    values = torch.cat(parts) if parts else torch.zeros(0)
    finite = values[values.isfinite()]
    low = min(seen.low, float(finite.min())) if finite.numel() else seen.low
    high = max(seen.high, float(finite.max())) if finite.numel() else seen.high
    return _Seen(seen.n + n, low, high, seen.n_bad + values.numel() - finite.numel())


def _right(output: Any, batch: Any, n: int) -> list[Tensor]:
    """Which examples of a batch are classified rightly; nothing where that cannot be told."""
    try:
        logits = runtime.logits_of(output)
    except ModelError:
        return []
    if len(logits) != n:
        return []
    labels = labels_of(batch, n, logits.shape[1])
    return [] if labels is None else [logits.argmax(1).cpu() == torch.as_tensor(labels)]


def _drift_findings(drifts: dict[str, tuple[float, float]]) -> list[Finding]:
    found = []
    for name, (shift, ratio) in drifts.items():
        if not (shift <= _STALE_SHIFT and ratio <= _STALE_LOG_RATIO):
            detail = (
                f"stored means are {shift:.2g} deviations off those of the data, variances by a "
                f"factor of {math.exp(min(ratio, 700)):.3g}, on average over the channels"
            )
            found.append(
                Finding(
                    layer=name, fault="stale", detail=detail, severity="warning", advice=RECALIBRATE
                )
            )
    return found


def _mode_findings(seen: Behaviour, evaluation: _Seen, training: _Seen) -> list[Finding]:
    found = []
    for mode, passed in (("evaluation", evaluation), ("training", training)):
        if passed.n_bad:
            detail = f"{passed.n_bad} outputs in {mode} mode are not finite"
            found.append(
                Finding(
                    layer="",
                    fault="output-not-finite",
                    detail=detail,
                    severity="error",
                    advice=RECALIBRATE,
                )
            )
    if evaluation.right is not None and training.right is not None and training.n == evaluation.n:
        gained = int((training.right & ~evaluation.right).sum())
        lost = int((evaluation.right & ~training.right).sum())
        # Paired: under no difference the two counts are alike, to the root of their sum.
        if gained - lost > 3 * math.sqrt(gained + lost):
            detail = (
                f"top-1 is {seen.top1:.3f} with the stored statistics and "
                f"{seen.top1_training:.3f} with those of each batch: the stored ones do not fit"
            )
            found.append(
                Finding(
                    layer="",
                    fault="modes-differ",
                    detail=detail,
                    severity="warning",
                    advice=RECALIBRATE,
                )
            )
    widths = [max(abs(passed.low), abs(passed.high)) for passed in (evaluation, training)]
    if all(map(math.isfinite, widths)) and widths[0] > _RANGE_FACTOR * widths[1] > 0:
        detail = (
            f"outputs reach {widths[0]:.3g} in evaluation and {widths[1]:.3g} with the statistics "
            "of each batch"
        )
        found.append(
            Finding(
                layer="",
                fault="output-range",
                detail=detail,
                severity="warning",
                advice=RECALIBRATE,
            )
        )
    return found
