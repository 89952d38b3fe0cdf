"""What a report is made of, as records, and what the JSON says of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bnfix.measuring.custom_metrics import Custom
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.pairing import Paired
from bnfix.measuring.robustness import Shifted


@dataclass(frozen=True)
class Evaluated:
    """A model and what it achieved.

    Args:
        name: as shown.
        file: where it was read from or written to.
        sha256: of that file.
        metrics: on the examples that all models of the report share.
        n_live: layers with an example weight above 0 in inference.
        custom: the user's own metrics.
        classified: whether the outputs are logits of classes; if not, ``metrics`` only counts.
    """

    name: str
    file: str | None
    sha256: str | None
    metrics: Metrics
    n_live: int = 0
    custom: tuple[Custom, ...] = ()
    classified: bool = True


@dataclass(frozen=True)
class DataUsed:
    """The data behind the numbers.

    Args:
        spec: as given.
        n_examples: in all of it.
        fingerprint: of the whole data.
        class_names: by index.
        splits: examples by split name.
        skipped: examples that could not be read, some of them, in words.
        n_skipped: how many in all.
        corruption: what every image went through, such as ``blur:2``.
    """

    spec: str
    n_examples: int
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    n_skipped: int = 0
    corruption: str | None = None


@dataclass(frozen=True)
class LayerRow:
    """A norm layer, as it stands at the end.

    Args:
        name: dotted name.
        kind: class name.
        channels: C.
        example_weight: a number, or one a channel.
        mean_shift: of the data's statistics against those before, in standard deviations.
        log_var_ratio: mean |log((new var + eps) / (old var + eps))|.
        residual: the same of the statistics stored against one verifying pass.
        mean_se: largest standard error of a mean, in standard deviations.
        var_se: largest relative standard error of a variance.
    """

    name: str
    kind: str
    channels: int
    example_weight: float | list[float] = 0.0
    mean_shift: float | None = None
    log_var_ratio: float | None = None
    residual: float | None = None
    mean_se: float | None = None
    var_se: float | None = None


def data_json(data: DataUsed) -> dict[str, Any]:
    """What the JSON says of the data."""
    values = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    return {key: value for key, value in values.items() if key != "class_names"}


def model_json(model: Evaluated) -> dict[str, Any]:
    """What the JSON says of a model."""
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
    """What the JSON says of a pair."""
    shown = ("top1", "nll", "nll_temperature_scaled", "verdict", "temperature_only")
    values = without(paired) or dict.fromkeys(shown)
    return {"name": name, "against": against, **{key: values[key] for key in shown}}


def shifted_json(row: Shifted, against: str) -> dict[str, Any]:
    """What the JSON says of a model on corrupted images."""
    found = without(row, "paired") or {}
    paired = None
    if row.paired is not None:
        paired = paired_json(row.model, against, row.paired)
    return {**found, "paired": paired}


def without(record: Any, *names: str) -> dict[str, Any] | None:
    """A record's fields by name, some left out."""
    if record is None:
        return None
    return {key: value for key, value in dataclasses.asdict(record).items() if key not in names}
