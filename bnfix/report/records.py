"""The parts of a report as records, how they are made, and their JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from bnfix.metrics.compare import Decision, Paired
from bnfix.metrics.custom import Custom
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import Shifted
from bnfix.norm.layer import generalized_norms
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.training.finetune import Finetuning
from bnfix.weights.choose import WeightChoice, weights_of


@dataclass(frozen=True)
class Evaluated:
    """A model and its metrics on the examples that all models of the report share."""

    name: str
    file: str | None  # read from or written to
    sha256: str | None
    metrics: Metrics
    n_live: int = 0  # layers with an example weight above 0
    custom: tuple[Custom, ...] = ()
    classified: bool = True  # False if outputs are no logits: then metrics only count examples


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


@dataclass(frozen=True)
class LayerRow:
    """A norm layer of the final model."""

    name: str
    kind: str
    channels: int
    example_weight: float | list[float] = 0.0  # one per layer or per channel
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


@dataclass(frozen=True)
class Rank:
    """A model's rank by NLL, then by top-1."""

    rank: int  # from 1; equal models share it
    name: str
    nll: float
    top1: float
    paired: Paired | None  # against the first model given


@dataclass(frozen=True)
class ClassRow:
    """Top-1 of one class."""

    index: int
    name: str
    n_examples: int
    top1: tuple[float | None, ...]  # one per model

    @property
    def change(self) -> float:
        """Of the last model against the first; 0 where one has none."""
        first, last = self.top1[0], self.top1[-1]
        return 0.0 if first is None or last is None else last - first


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
    """Mean shift and log variance ratio of every layer that both have.

    Mean over channels of |mean' - mean| / sqrt(var' + eps), and |log((var' + eps) / (var + eps))|.
    """
    drifts = {}
    for name, (mean, var, eps) in after.items():
        if name in before and before[name][0].shape == mean.shape:
            old_mean, old_var, _ = before[name]
            shift = ((mean - old_mean).abs() / (var.clamp_min(0) + eps).sqrt()).mean()
            ratio = ((var.clamp_min(0) + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
            drifts[name] = (float(shift), float(ratio))
    return drifts


def layer_rows(
    model: nn.Module,
    drifts: Mapping[str, tuple[float, float]],
    fresh: Mapping[str, tuple[float, float]],
    calibration: Calibration | None = None,
) -> tuple[LayerRow, ...]:
    """One row per norm layer in order, with the drift, residual and errors that are known."""
    weights = weights_of(model)
    errors = {} if calibration is None else {r.name: r for r in calibration.layers}
    rows = []
    for site in find_norms(model):
        shift, ratio = drifts.get(site.name, (None, None))
        record = errors.get(site.name)
        rows.append(
            LayerRow(
                name=site.name,
                kind=site.kind,
                channels=int(getattr(site.module, "num_features", 0)),
                example_weight=weights.get(site.name, 0.0),
                mean_shift=shift,
                log_var_ratio=ratio,
                residual=fresh[site.name][0] if site.name in fresh else None,
                mean_se=None if record is None else record.mean_se,
                var_se=None if record is None else record.var_se,
            )
        )
    return tuple(rows)


def n_live(model: nn.Module) -> int:
    """How many layers have an example weight above 0."""
    return sum(layer.live for _, layer in generalized_norms(model))


def ranking(models: Sequence[Evaluated], paired: Sequence[Paired | None]) -> list[Rank]:
    """Rank models on the same labelled examples, best first; empty for fewer than two."""
    keys = sorted(
        (m.metrics.nll, -m.metrics.top1, i)
        for i, m in enumerate(models)
        if m.metrics.nll is not None and m.metrics.top1 is not None
    )
    # Without the position: models with equal numbers share a rank.
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


def class_rows(models: Sequence[Evaluated], names: Sequence[str]) -> list[ClassRow]:
    """Top-1 of every class that has examples, by index; empty without labels."""
    examples = [model.metrics.examples for model in models]
    if not examples or examples[0] is None:
        return []
    n = np.bincount(examples[0].labels)
    right = [
        None if e is None else np.bincount(e.labels, e.right, minlength=len(n)) for e in examples
    ]
    return [
        ClassRow(
            index=c,
            name=names[c] if c < len(names) else f"class {c}",
            n_examples=int(n[c]),
            top1=tuple(None if r is None else float(r[c] / n[c]) for r in right),
        )
        for c in np.flatnonzero(n).tolist()
    ]


def class_change_errors(models: Sequence[Evaluated], rows: Sequence[ClassRow]) -> np.ndarray | None:
    """Standard error of each class's change from the first model to the last, if labelled."""
    first, last = models[0].metrics.examples, models[-1].metrics.examples
    if first is None or last is None:
        return None
    # The variance of a difference of paired outcomes: only images that changed contribute.
    changed = np.bincount(first.labels, first.right != last.right)[[row.index for row in rows]]
    n = np.array([row.n_examples for row in rows])
    change = np.array([row.change for row in rows])
    return np.asarray(np.sqrt(np.maximum(changed / n - change**2, 0) / n))


def without(record: Any, *names: str) -> dict[str, Any] | None:
    """A record's fields by name, some left out."""
    if record is None:
        return None
    return {key: value for key, value in dataclasses.asdict(record).items() if key not in names}


def model_json(model: Evaluated) -> dict[str, Any]:
    """The JSON of a model; ``custom`` only where there are metrics of the user's."""
    m = model.metrics
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "temperature", "brier", "ece")
    return {
        "name": model.name,
        "file": model.file,
        "sha256": model.sha256,
        "n_examples": m.n_examples,
        "n_live": model.n_live,
        **{name: getattr(m, name) for name in names},
        "interval": {"top1": None, "nll": None, **m.interval},
        "images_per_second": m.images_per_second or None,
        **({"custom": {c.name: _custom_json(c) for c in model.custom}} if model.custom else {}),
    }


def _custom_json(custom: Custom) -> dict[str, Any]:
    difference = None
    if custom.difference is not None:
        difference = {"difference": custom.difference, "interval": custom.difference_interval}
    return {"value": custom.value, "interval": custom.interval, "difference": difference}


def paired_json(name: str, against: str, paired: Paired | None) -> dict[str, Any]:
    """The JSON of a pair; all values are ``None`` without labels."""
    shown = ("top1", "nll", "nll_temperature_scaled", "verdict", "temperature_only")
    values = without(paired) or dict.fromkeys(shown)
    return {"name": name, "against": against, **{key: values[key] for key in shown}}


def shifted_json(row: Shifted, against: str) -> dict[str, Any]:
    """The JSON of a model on corrupted images."""
    paired = None if row.paired is None else paired_json(row.model, against, row.paired)
    return {**(without(row) or {}), "paired": paired}
