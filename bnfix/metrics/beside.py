"""Metrics besides the task's: the user's own, prediction sets, estimates without labels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from bnfix.core.errors import ConfigError, DataError, one_line, plain
from bnfix.core.options import require
from bnfix.core.settings import EvaluationRecipe
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import (
    N_RESAMPLES,
    Interval,
    chunks,
    exact_interval,
    inverse_temperature,
    log_softmax,
    losses_of,
    middle,
    refuse_not_finite,
    resample,
)
from bnfix.metrics.task import Array, as_array, import_function

#: Number of bootstrap samples; each calls the user's code once more.
N_CUSTOM = 200
#: Outputs above this size get no interval, because each bootstrap sample copies them.
MOST_BYTES = 2 << 30

#: Called with outputs ``(N, ...)`` float32 and labels ``(N, ...)``, both numpy arrays.
MetricFunction = Callable[[Array, Array | None], Any]


@dataclass(frozen=True)
class Custom:
    """One of the user's metrics for one model, with 95% bootstrap intervals.

    There is no interval if a bootstrap sample has no value, or if the outputs are too large.
    """

    name: str  # the callable's name; plus a dot and the key if it returns several numbers
    value: float
    interval: Interval | None = None
    difference: float | None = None  # this model less the first; None for the first
    difference_interval: Interval | None = None  # from the same bootstrap samples of both models
    resampled: tuple[float, ...] = field(default=(), repr=False)


def import_metric(spec: str) -> tuple[str, MetricFunction]:
    """Import the user's metric; this runs the user's code."""
    return import_function(spec, "--metric", "(outputs, labels)")


def custom_metrics(
    functions: Sequence[tuple[str, MetricFunction]], found: Sequence[Outputs], *, seed: int = 0
) -> list[tuple[Custom, ...]]:
    """Compute the user's metrics of several models on the same examples."""
    every: list[tuple[Custom, ...]] = []
    for one in found:
        rows = [row for name, f in functions for row in _of_model(name, f, one, seed)]
        if twice := [name for name, n in Counter(row.name for row in rows).items() if n > 1]:
            raise _error(f": two metrics named {plain(twice[0])}. Rename one.")
        first = {row.name: row for row in every[0]} if every else {}
        every.append(tuple(_against(first.get(row.name), row, one.groups) for row in rows))
    return every


def _of_model(name: str, function: MetricFunction, found: Outputs, seed: int) -> Iterator[Custom]:
    x, y, groups = found.outputs, found.labels, found.groups
    values, rng, drawn = _called(name, function, x, y), np.random.default_rng(seed), []
    for _ in range(N_CUSTOM if x.nbytes <= MOST_BYTES else 0):
        rows = np.repeat(np.arange(len(x)), resample(rng, len(x), groups)[0])
        try:
            again = _called(name, function, x[rows], None if y is None else y[rows])
        except ConfigError:
            # A bootstrap sample can lack a class or be constant, and then has no value.
            again = {}
        drawn.append([again.get(key, math.nan) for key in values])
    for k, (key, value) in enumerate(values.items()):
        column = tuple(row[k] for row in drawn)
        if column and np.isfinite([value, *column]).all():
            yield Custom(key, value, middle(np.array(column), value, groups), resampled=column)
        else:
            yield Custom(key, value)


def _called(name: str, function: MetricFunction, x: Array, y: Array | None) -> dict[str, float]:
    """The numbers that a callable returns, by name."""
    try:
        result = function(x, y)
    except Exception as error:
        raise _error(
            f" {name}: failed ({one_line(error)}). It is called with outputs of shape {x.shape} "
            f"and labels of shape {None if y is None else y.shape}, numpy arrays."
        ) from error
    numbers = {}
    for key, value in (result if isinstance(result, Mapping) else {"": result}).items():
        array = as_array(value)
        if array.size != 1 or array.dtype.kind not in "fiub":
            of = f" for {plain(key)}" if key else ""
            expected = "expected a number or a dict of numbers."
            raise _error(f" {name}: returned {type(value).__name__}{of}, {expected}")
        numbers[f"{name}.{key}" if key else name] = float(array.reshape(()))
    return numbers


def _error(problem: str) -> ConfigError:
    return ConfigError(f"--metric{problem}", name="metric")


def _against(first: Custom | None, last: Custom, groups: Array | None) -> Custom:
    if first is None:
        return last
    difference, interval = last.value - first.value, None
    if first.resampled and last.resampled:
        interval = middle(np.subtract(last.resampled, first.resampled), difference, groups)
    return replace(last, difference=difference, difference_interval=interval)


# --- prediction sets and estimated accuracy ---

#: Confidence level of the estimate's interval.
ESTIMATE_LEVEL = 0.9


@dataclass(frozen=True)
class Estimate:
    """Accuracy on unlabelled examples, estimated from labelled examples of another kind."""

    top1: float
    interval: Interval  # 90%; covers only the sampling of both kinds of examples
    threshold: float  # on the negative entropy of a prediction
    labelled_top1: float
    n_labelled: int
    n_examples: int
    truth: float | None = None  # the true accuracy, if labels exist after all


@dataclass(frozen=True)
class Uncertain:
    """A model's prediction sets and estimated accuracy."""

    sets: Sets | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Sets:
    """Prediction sets of classes: the threshold from one half, all other numbers from the other."""

    wanted: float
    probability: float  # least probability of a class in a set; 0 if sets contain all classes
    n_threshold: int
    n_examples: int
    coverage: float  # fraction of the examples whose set contains the label
    interval: Interval  # 95%, Clopper and Pearson's
    size: float  # mean number of classes in a set
    empty: float  # fraction of empty sets


def conformal_sets(logits: Array, labels: Array, wanted: float, seed: int) -> Sets:
    """Split conformal prediction with score 1 - p of the label (LAC, Sadinle et al., 2019).

    The threshold is the ceil((n + 1) wanted)-th smallest of n scores on a seeded half; a set has
    all classes with no larger score. For exchangeable examples, a set contains the label with
    probability at least ``wanted``.
    """
    if len(logits) < 2:
        raise DataError(f"--coverage: {len(logits)} example, expected at least 2.")
    order = np.random.default_rng(seed).permutation(len(logits))
    first, second = np.split(order, [len(order) // 2])
    # Scores are -log p: the same order, and precise where p is near 0.
    scores = losses_of(logits[first], labels[first])
    place = math.ceil((len(first) + 1) * wanted)
    limit = math.inf if place > len(first) else float(np.sort(scores)[place - 1])
    held, size = np.empty(len(second), bool), np.empty(len(second), int)
    for part in chunks(logits[second]):
        # The threshold is itself a score, so equal scores must be inside, in spite of rounding.
        inside = -log_softmax(logits[second[part]]) <= limit * (1 + 1e-12)
        size[part] = inside.sum(1)
        held[part] = np.take_along_axis(inside, labels[second[part], None], 1)[:, 0]
    return Sets(
        wanted=wanted,
        probability=math.exp(-limit),
        n_threshold=len(first),
        n_examples=len(second),
        coverage=float(held.mean()),
        interval=exact_interval(int(held.sum()), len(held)),
        size=float(size.mean()),
        empty=float((size == 0).mean()),
    )


def estimate_accuracy(
    labelled: tuple[Array, Array], logits: Array, seed: int, *, labels: Array | None = None
) -> Estimate:
    """Average thresholded confidence (Garg et al., 2022) by negative entropy, sum of p log p.

    p is at the temperature fitted on the labelled examples. As many of these lie below the
    threshold as the model gets wrong; the estimate is the fraction of new examples that reach it.
    It assumes that confidence means the same on both kinds of examples; the interval, a bootstrap
    over both, does not cover errors of this assumption.
    """
    z, y = labelled
    b = inverse_temperature(z, y)
    # Sorted, so that thresholds and fractions are found by counting.
    order = np.argsort(old := _sureness(z, b), kind="stable")
    old, wrong, new = old[order], (z.argmax(1) != y)[order], np.sort(_sureness(logits, b))
    rng = np.random.default_rng(seed)

    def estimated(of_old: Array, of_new: Array) -> tuple[float, float]:
        below = np.concatenate([[0], np.cumsum(of_old)])[:-1]
        place = int(np.searchsorted(below, (of_old * wrong).sum()))
        limit = float(old[place]) if place < len(old) else math.inf
        return float(of_new[np.searchsorted(new, limit) :].sum() / of_new.sum()), limit

    top1, limit = estimated(np.ones(len(old)), np.ones(len(new)))
    drawn = [
        estimated(resample(rng, len(old), None)[0], resample(rng, len(new), None)[0])[0]
        for _ in range(N_RESAMPLES)
    ]
    low, high = np.quantile(drawn, [(1 - ESTIMATE_LEVEL) / 2, (1 + ESTIMATE_LEVEL) / 2])
    return Estimate(
        top1=top1,
        interval=(min(float(low), top1), max(float(high), top1)),
        threshold=limit,
        labelled_top1=float((~wrong).mean()),
        n_labelled=len(old),
        n_examples=len(new),
        truth=None if labels is None else float((logits.argmax(1) == labels).mean()),
    )


def _sureness(logits: Array, b: float) -> Array:
    """Negative entropy of each prediction at the temperature 1/b."""
    found = np.empty(len(logits))
    for part in chunks(logits):
        log_p = log_softmax(logits[part], b)
        found[part] = (np.exp(log_p) * log_p).sum(1)
    return found


# --- the balance of the classes ---

#: Smallest share of a class; smaller shares are raised to it, so that logits stay finite.
LEAST_SHARE = 1e-6
_TOLERANCE, _MOST_STEPS = 1e-8, 2000


@dataclass(frozen=True, eq=False)
class Prior:
    """Class shares: the shares that a network learned, and the shares in use."""

    old: Array  # (K,), above 0
    new: Array | None  # (K,); None while not yet estimated
    names: tuple[str, ...]
    old_is: str  # where the shares come from, in words
    new_is: str

    @property
    def shift(self) -> Array:
        """The shift of the logits, log(new / old); a placeholder ramp until ``new`` is known."""
        if self.new is None:
            return np.linspace(-1.0, 1.0, len(self.old))
        return np.asarray(np.log(np.maximum(self.new, LEAST_SHARE) / self.old))

    def has_new(self, labels: Array) -> bool:
        """Whether labels fit the new shares better than the old, by their likelihood ratio."""
        return float(self.shift[labels].sum()) > 0

    def to_json(self) -> dict[str, list[float]]:
        """The shares, in a form for JSON."""
        new = {} if self.new is None else {"to": self.new.tolist()}
        return {"from": self.old.tolist(), **new}


def estimate_shares(logits: Array, old: Array) -> Array:
    """The class shares among unlabelled examples, from a network's predictions p(k | x).

    EM, starting from old (Saerens, Latinne and Decaestecker, 2002): new_k becomes the mean over
    examples of p_k new_k / old_k, divided by its sum over classes. The likelihood is concave.
    """
    p = np.empty(logits.shape)
    for part in chunks(logits):
        p[part] = np.exp(log_softmax(logits[part]))
    new = old
    for _ in range(_MOST_STEPS):
        ratio = new / old
        before, new = new, ratio * ((1 / (p @ ratio)) @ p) / len(p)
        if np.abs(new - before).max() < _TOLERANCE:
            break
    return np.asarray(new)


def uncertain(
    found: Sequence[Outputs], labelled: Sequence[Outputs], also: EvaluationRecipe, seed: int
) -> tuple[Uncertain, ...]:
    """The prediction sets and the estimated accuracy of every model, as requested."""
    if also.coverage is not None:
        check_logits("--coverage", found, needs_labels=True)
    if labelled:
        check_logits("--estimate-from", [*found, *labelled])
    rows = []
    for k, own in enumerate(found):
        sets = estimate = None
        if also.coverage is not None and own.labels is not None:
            sets = conformal_sets(own.outputs, own.labels, also.coverage, seed)
        if labelled and (y := labelled[k].labels) is not None:
            pair = labelled[k].outputs, y
            estimate = estimate_accuracy(pair, own.outputs, seed, labels=own.labels)
        rows.append(Uncertain(sets, estimate))
    return tuple(rows) if also.of_certainty else ()


def check_logits(
    option: str, outputs: Sequence[Outputs], *, groups: bool = False, needs_labels: bool = False
) -> None:
    """Refuse outputs that an option cannot use."""
    name = option[2:].replace("-", "_")
    for one in outputs:
        words = f"{option}: the outputs are not class logits. Leave it out."
        require(one.classified, words, name)
        words = f"{option}: its interval counts single examples. Leave --groups out."
        require(groups or one.groups is None, words, name)
        words = f"{option}: the examples have no labels. Give labels."
        require(not needs_labels or one.labels is not None, words, name)
        refuse_not_finite(one.outputs)
