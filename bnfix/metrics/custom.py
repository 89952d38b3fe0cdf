"""The user's own metrics: callables over all outputs and labels at once, with intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnfix.core.errors import ConfigError, one_line, plain
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import Interval, middle, resample
from bnfix.metrics.task import Array, as_array, import_function

#: Each resample calls the user's code once more.
N_RESAMPLES = 200
#: Each resample copies the outputs; larger ones than this have no interval.
MOST_BYTES = 2 << 30

#: Called with outputs ``(N, ...)`` float32 and labels ``(N, ...)``, both numpy arrays.
MetricFunction = Callable[[Array, Array | None], Any]


@dataclass(frozen=True)
class Custom:
    """One number of the user's, for one model, with 95% bootstrap intervals.

    There is no interval where a resample has no value, or the outputs are too large to be copied.
    """

    name: str  # of the callable; with a dot and the key where it returns several
    value: float
    interval: Interval | None = None
    difference: float | None = None  # of this model less the first; None for the first
    difference_interval: Interval | None = None  # from the same resamples of both
    resampled: tuple[float, ...] = field(default=(), repr=False)


def import_metric(spec: str) -> tuple[str, MetricFunction]:
    """Import a metric that the user names; this runs the user's code."""
    return import_function(spec, "--metric", "(outputs, labels)")


def custom_metrics(
    functions: Sequence[tuple[str, MetricFunction]], found: Sequence[Outputs], *, seed: int = 0
) -> list[tuple[Custom, ...]]:
    """Compute the user's metrics of several models on the same examples."""
    every: list[tuple[Custom, ...]] = []
    first: dict[str, Custom] = {}
    for one in found:
        rows = [row for name, f in functions for row in _of_model(name, f, one, seed)]
        twice = [row.name for row in rows if [r.name for r in rows].count(row.name) > 1]
        if twice:
            raise ConfigError(
                f"--metric: two metrics of the name {plain(twice[0])}. Rename one.", name="metric"
            )
        if every:
            rows = [
                _against(first[row.name], row, one.groups) if row.name in first else row
                for row in rows
            ]
        else:
            first = {row.name: row for row in rows}
        every.append(tuple(rows))
    return every


def _of_model(name: str, function: MetricFunction, found: Outputs, seed: int) -> list[Custom]:
    values = _called(name, function, found.outputs, found.labels)
    n, every = len(found.outputs), np.arange(len(found.outputs))
    rng = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {key: [] for key in values}
    for _ in range(N_RESAMPLES if found.outputs.nbytes <= MOST_BYTES else 0):
        grouped = found.groups is not None
        rows = (
            np.repeat(every, resample(rng, n, found.groups)) if grouped else rng.integers(0, n, n)
        )
        labels = None if found.labels is None else found.labels[rows]
        try:
            again = _called(name, function, found.outputs[rows], labels)
        except ConfigError:
            # A resample may lack a class or be constant, and so be without a value.
            again = {}
        for key in drawn:
            drawn[key].append(again.get(key, float("nan")))
    made = []
    for key, value in values.items():
        ok = len(drawn[key]) > 0 and bool(np.isfinite([value, *drawn[key]]).all())
        interval = middle(np.array(drawn[key]), value, found.groups) if ok else None
        made.append(Custom(key, value, interval, resampled=tuple(drawn[key]) if ok else ()))
    return made


def _called(name: str, function: MetricFunction, x: Array, y: Array | None) -> dict[str, float]:
    """The numbers that a callable gives, by name."""
    try:
        result = function(x, y)
    except Exception as error:
        raise ConfigError(
            f"--metric {name}: failed ({one_line(error)}). It is called with "
            f"outputs of shape {x.shape} and labels of shape {None if y is None else y.shape}, "
            "numpy arrays.",
            name="metric",
        ) from error
    found = result if isinstance(result, Mapping) else {"": result}
    numbers = {}
    for key, value in found.items():
        number = _number(value)
        if number is None:
            raise ConfigError(
                f"--metric {name}: returned {type(value).__name__}"
                f"{f' for {plain(key)}' if key else ''}, expected a number or a dict of numbers.",
                name="metric",
            )
        numbers[f"{name}.{key}" if key else name] = number
    return numbers


def _number(value: Any) -> float | None:
    array = as_array(value)
    return float(array.reshape(())) if array.size == 1 and array.dtype.kind in "fiub" else None


def _against(first: Custom, last: Custom, groups: Array | None) -> Custom:
    difference = last.value - first.value
    interval = None
    if first.resampled and last.resampled:
        interval = middle(np.subtract(last.resampled, first.resampled), difference, groups)
    return replace(last, difference=difference, difference_interval=interval)
