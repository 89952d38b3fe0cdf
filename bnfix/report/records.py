"""The parts of a report as records, and the sentences on steps done and parts left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from bnfix.core.errors import count, some
from bnfix.core.settings import Preprocessing
from bnfix.metrics.beside import Custom
from bnfix.metrics.compare import Decision, Paired, mean_and_se
from bnfix.metrics.metrics import Metrics, numbered
from bnfix.metrics.task import ByRows
from bnfix.norm.layer import generalized_norms
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import SwapPlan
from bnfix.recalibrate.collector import drift
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.training.finetune import Finetuning
from bnfix.weights.choose import WeightChoice, weights_of


@dataclass(frozen=True)
class Evaluated:
    """A model and its metrics on the examples that all models of the report share."""

    name: str
    file: str | None  # its source or its output
    sha256: str | None
    metrics: Metrics
    n_live: int = 0  # layers with an example or batch weight above 0
    custom: tuple[Custom, ...] = ()
    classified: bool = True  # False if outputs are not logits: metrics then only count examples
    agreement: Metrics | None = None  # measured against a reference instead of labels
    preprocessing: Preprocessing | None = None  # only for `eval`, where files can differ in it


@dataclass(frozen=True)
class DataUsed:
    """The data behind the numbers."""

    spec: str
    n_examples: int
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # some unreadable examples, in words
    n_skipped: int = 0
    corruption: str | None = None  # of every image, such as blur:2
    n_groups: int | None = None  # groups of examples that depend on each other
    noun: str = "images"  # "examples" for other data
    test: Mapping[str, Any] | None = None  # spec, size and fingerprint of a separate test


@dataclass(frozen=True)
class LayerRow:
    """A norm layer of the final model."""

    name: str
    kind: str
    channels: int
    example_weight: float | list[float] = 0.0  # one per layer or per channel
    batch_weight: float | list[float] = 0.0
    mean_shift: float | None = None  # new statistics against old, see `drifts_between`
    log_var_ratio: float | None = None
    residual: float | None = None  # stored statistics against one verifying pass
    mean_se: float | None = None  # largest standard error of a mean, in standard deviations
    var_se: float | None = None  # largest relative standard error of a variance


@dataclass(frozen=True)
class Trials:
    """All candidates that were fitted, and the gate's decisions."""

    decisions: tuple[Decision, ...] = ()
    calibration: Calibration | None = None
    choice: WeightChoice | None = None
    finetunings: tuple[Finetuning, ...] = ()
    refused: tuple[Calibration | WeightChoice | Finetuning, ...] = ()  # not in the output


def statistics_of(model: nn.Module) -> dict[str, Any]:
    """Copies of every layer's mean and variance, with its eps, by layer name."""
    return {
        site.name: (
            site.module.running_mean.double().cpu().clone(),  # type: ignore[operator]
            site.module.running_var.double().cpu().clone(),  # type: ignore[operator]
            float(getattr(site.module, "eps", 1e-5)),
        )
        for site in find_norms(model)
        if site.has_statistics
    }


def drifts_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean shift and log variance ratio of every layer in both.

    Mean over channels of |mean' - mean| / sqrt(var' + eps), and |log((var' + eps) / (var + eps))|.
    """
    return {
        name: drift(before[name][:2], (mean, var.clamp_min(0)), eps)
        for name, (mean, var, eps) in after.items()
        if name in before and before[name][0].shape == mean.shape
    }


def layer_rows(
    model: nn.Module,
    drifts: Mapping[str, tuple[float, float]],
    fresh: Mapping[str, tuple[float, float]],
    calibration: Calibration | None = None,
) -> tuple[LayerRow, ...]:
    """One row per norm layer in order, with the drift, residual and errors that are known."""
    weights, layers = weights_of(model), dict(generalized_norms(model))
    batch = {n: x.batch_weight.tolist() for n, x in layers.items() if x.batch_weight is not None}
    errors = {} if calibration is None else {r.name: r for r in calibration.layers}
    unknown = (None, None)
    return tuple(
        LayerRow(
            name=site.name,
            kind=site.kind,
            channels=int(getattr(site.module, "num_features", 0)),
            example_weight=weights.get(site.name, 0.0),
            batch_weight=batch.get(site.name, 0.0),
            mean_shift=drifts.get(site.name, unknown)[0],
            log_var_ratio=drifts.get(site.name, unknown)[1],
            residual=fresh.get(site.name, unknown)[0],
            mean_se=getattr(errors.get(site.name), "mean_se", None),
            var_se=getattr(errors.get(site.name), "var_se", None),
        )
        for site in find_norms(model)
    )


def n_live(model: nn.Module) -> int:
    """The number of layers that use their input's moments: a weight above 0, or open gates."""
    return sum(layer.live for _, layer in generalized_norms(model))


def describe_neighbours(model: nn.Module) -> list[str]:
    """A sentence for a network whose outputs depend on the batch; none for any other."""
    found = [x.batch_weight for _, x in generalized_norms(model) if x.batch_weight is not None]
    if not found:
        return []
    highest = max(float(weight.max()) for weight in found)
    return [
        f"predictions depend on the other images in the batch: the batch has a weight of up to "
        f"{highest:.3g} in the statistics of {count(len(found), 'norm layers')}; "
        "eval --compare-batch-sizes shows the effect."
    ]


@dataclass(frozen=True)
class ClassRow:
    """Top-1 of one class."""

    index: int
    name: str
    n_examples: int
    top1: tuple[float | None, ...]  # one per model

    @property
    def change(self) -> float:
        """The change from the first model to the last; 0 if one of them has no value."""
        first, last = self.top1[0], self.top1[-1]
        return 0.0 if first is None or last is None else last - first


def class_rows(models: Sequence[Evaluated], names: Sequence[str]) -> list[ClassRow]:
    """Top-1 of every class that has examples, by index; empty without labels."""
    found = [model.metrics.by_class for model in models]
    dense = bool(models) and isinstance(models[0].metrics.task, ByRows)
    return [
        ClassRow(
            index=c,
            name=names[c] if c < len(names) else f"class {c}",
            n_examples=int(n),
            top1=tuple(one[c][0] if c < len(one) else None for one in found),
        )
        for c, (_, n) in enumerate(found[0] if found else ())
        if n or dense
    ]


def class_change_errors(models: Sequence[Evaluated], rows: Sequence[ClassRow]) -> np.ndarray | None:
    """Standard error of each class's change from the first model to the last, if labelled."""
    first, last = models[0].metrics.examples, models[-1].metrics.examples
    if first is None or last is None or first.scores is None or last.scores is None:
        return None
    d, ids = np.subtract(last.scores, first.scores, dtype=np.float64), first.groups
    if ids is not None:
        inside = [np.flatnonzero(first.labels == row.index) for row in rows]
        return np.array([mean_and_se(d[i], numbered(ids[i], len(i)))[1] for i in inside])
    # The variance of paired differences: only images whose outcome changed contribute.
    changed = np.bincount(first.labels, d != 0)[[row.index for row in rows]]
    n = np.array([row.n_examples for row in rows])
    change = np.array([row.change for row in rows])
    return np.asarray(np.sqrt(np.maximum(changed / n - change**2, 0) / n))


@dataclass(frozen=True)
class Rank:
    """A model's rank by NLL, then by top-1."""

    rank: int  # from 1; equal models share it
    name: str
    nll: float
    top1: float  # 0 for a task without a score
    paired: Paired | None  # against the first model given


def ranking(models: Sequence[Evaluated], paired: Sequence[Paired | None]) -> list[Rank]:
    """Rank models on the same labelled examples, best first; empty for fewer than two."""
    keys = sorted(
        (m.metrics.nll, -(m.metrics.top1 or 0.0), i)
        for i, m in enumerate(models)
        if m.metrics.nll is not None
    )
    # The position is left out here: models with equal numbers share a rank.
    values = [key[:2] for key in keys]
    return [
        Rank(
            rank=values.index((nll, top1)) + 1,
            name=models[i].name,
            nll=nll,
            top1=-top1,
            paired=paired[i - 1] if i else None,
        )
        for nll, top1, i in keys
        if len(keys) > 1
    ]


# --- sentences ---


def done(swap: SwapPlan | None, trials: Trials, decisions: Sequence[Decision] = ()) -> list[str]:
    """The steps done, one sentence each."""
    sentences = []

    def lost(result: Any) -> str:
        is_kept = not any(result is one for one in trials.refused)
        return "" if is_kept else " The output does not contain this result."

    if swap and swap.changes:
        found = [c.difference for c in swap.changes if c.difference is not None]
        exact = f"; no output changes by more than {max(found):.1g} of its range" if found else ""
        sentences.append(f"{count(len(swap.changes))} norm layers were swapped{exact}.")
    # Refused statistics are reported too: they were measured but are not in the file.
    for c in (trials.calibration, *trials.refused):
        if isinstance(c, Calibration):
            sentences.append(
                f"Running statistics ({c.target}, {c.feed} feed) were measured on "
                f"{count(c.n_examples, 'images')} in {count(c.n_batches, 'batches')}: "
                f"{count(len(c.layers), 'layers')}, {count(c.passes, 'passes')}, "
                f"{c.effort.seconds:.1f} s.{_spent(c)}{lost(c)}"
            )
    if w := trials.choice:
        chosen = {"keep": "unchanged", "global": "one for the model"}.get(w.chosen)
        clock = "" if w.clock_passes is None else f" ({w.clock_passes:.3g} by wall-clock time)"
        sentences.append(
            f"Example weight: {chosen or 'one per ' + w.chosen}; "
            f"{count(w.n_live, 'live layers')}. "
            f"The search took {count(w.passes, 'passes')}{clock}, {w.seconds:.1f} s."
            f"{lost(w) if w.chosen != 'keep' else ''}"
        )
    for run in trials.finetunings:
        kept = f"epoch {run.best_epoch} was kept" if run.best_epoch else "no epoch was kept"
        sentences.append(
            f"Fine-tuning of {run.trained}: {count(run.n_parameters, 'parameters')}, "
            f"{count(run.n_steps, 'steps')}, {run.seconds:.1f} s; {kept}."
            f"{lost(run) if run.best_epoch else ''}"
        )
    if decisions:
        n = sum(d.admitted for d in decisions)
        sentences.append(
            f"{n} of {len(decisions)} candidates passed the gate, on "
            f"{count(decisions[0].n_examples)} images of the select split."
        )
    return sentences


def _spent(calibration: Calibration) -> str:
    """Where the time went, if it was measured."""
    effort = calibration.effort
    cost, rate = effort.cost, effort.examples_per_second
    if not cost.data + cost.forward + cost.statistics > 0:
        return ""
    whose = " of the first process's time" if effort.n_processes > 1 else ""
    speed = "" if rate is None else f"; {rate:,.{0 if rate >= 100 else 2}f} images per second"
    return (
        f" Reading data took {cost.data:.2f} s{whose}, forward passes {cost.forward:.2f} s, "
        f"statistics {cost.statistics:.2f} s{speed}."
    )


def left_out(
    assumptions: Sequence[str], data: DataUsed | None, swap: SwapPlan | None, trials: Trials
) -> list[str]:
    """Assumptions and exclusions, one sentence each, each once."""
    notes = list(assumptions)
    if swap:
        notes += [*swap.notes, *_grouped("Not swapped", swap.skipped)]
    if trials.calibration:
        c = trials.calibration.exceptions
        notes += _grouped("Statistics unchanged, never reached", c.never_reached)
        notes += _grouped("Statistics unchanged, frozen or excluded", c.left_alone)
        notes += _grouped("Called more than once per pass, calls pooled", c.called_again)
    if trials.choice:
        notes += _grouped("Example weight unchanged", trials.choice.excluded)
    for run in trials.finetunings:
        notes += _grouped("Statistics unchanged, frozen or excluded", run.frozen)
        if n := run.n_skipped_steps:
            notes.append(f"Fine-tuning of {run.trained}: {n} steps were skipped (not finite).")
    if data and (n := data.n_skipped):
        shown = f": {some(data.skipped, 20)}" if data.skipped else ""
        notes.append(f"{count(n, 'unreadable images')} skipped{shown}.")
    return list(dict.fromkeys(notes))


def _grouped(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title}: {some(names, 8)}."] if names else []
