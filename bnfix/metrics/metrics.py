"""`Metrics` from logits and labels: accuracy, losses, confidence and bootstrap intervals."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from bnfix.core.errors import DataError, NumericError
from bnfix.metrics.task import LABELS, Array, ByRows, Labels, Reference, Task, Words

Interval = tuple[float, float]
N_RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**20  # counts or logits per chunk: in float64, 50,000 x 1,000 would take 400 MB


# --- groups of dependent examples: with groups, everything below counts groups ---

#: Fewer examples, or fewer differing losses, prove nothing.
LEAST_EXAMPLES = 20
#: The same for groups (benchmarks/false_verdicts.py): sums over groups are less skewed.
LEAST_GROUPS = 15


def numbered(groups: Any, n: int) -> Array | None:
    """Groups as numbers from 0; ``None`` if each of the n examples has its own group."""
    if groups is None:
        return None
    given = np.asarray(groups)
    if given.shape != (n,):
        raise DataError(f"groups: shape {given.shape} for {n} examples, expected ({n},).")
    names, ids = np.unique(given, return_inverse=True)
    return None if len(names) == n else ids.reshape(-1)


def units(values: Array, groups: Array | None) -> Array:
    """One number per group, with the mean and the standard error of the mean over examples.

    For G groups, n examples in all and their mean m, it is m + (G / n) sum of (v - m) over the
    group. The standard error is cluster-robust with the factor G / (G - 1) (CR1; Cameron and
    Miller, 2015, A practitioner's guide to cluster-robust inference).
    """
    if groups is None:
        return values
    mean, n_groups = values.mean(), int(groups.max()) + 1
    return np.asarray(mean + np.bincount(groups, values - mean) * n_groups / len(values))


def n_counted(n: int, groups: Array | None) -> int:
    """The number of independent units; with groups, the equivalent number of equally large ones.

    n^2 / (sum of squared group sizes): one dominant group makes the number small.
    """
    if groups is None:
        return n
    return n * n // int((np.bincount(groups) ** 2).sum())


def least(groups: Array | None) -> int:
    """The least number of units that can prove anything."""
    return LEAST_EXAMPLES if groups is None else LEAST_GROUPS


def shortfall(n: int, groups: Array | None) -> str:
    """The shortfall of units for any proof, in words; empty if there are enough."""
    found, what = n_counted(n, groups), "examples" if groups is None else "groups"
    return "" if found >= least(groups) else f"{found} {what} where it takes {least(groups)}"


def n_marked(marked: Array, groups: Array | None) -> int:
    """The number of units with a marked example."""
    return int(marked.sum()) if groups is None else len(np.unique(groups[marked]))


def resample(rng: np.random.Generator, n: int, groups: Array | None, k: int = 1) -> Array:
    """How often each of n examples occurs in k bootstrap samples of whole groups, ``(k, n)``."""
    m = n if groups is None else int(groups.max()) + 1
    drawn = rng.integers(0, m, (k, m)) + m * np.arange(k)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=k * m).reshape(k, m)
    return counts if groups is None else counts[:, groups]


def widened(tail: float, n: int | None) -> float:
    """The tail probability for a bootstrap of n groups, corrected for their small number."""
    # Percentiles of few units are too narrow, by sqrt((n - 1) / n) and by the normal instead of
    # Student's t (Hesterberg, 2015, What teachers should know about the bootstrap).
    if n is None:
        return tail
    from scipy.special import ndtr, stdtrit

    return float(ndtr(stdtrit(max(n - 1, 1), tail) * (n / max(n - 1, 1)) ** 0.5))


def resamples(n: int, seed: int, groups: Array | None = None) -> Iterator[Array]:
    """How often each of n examples occurs in each bootstrap sample, in parts ``(S, n)``."""
    rng = np.random.default_rng(seed)
    size = min(100, max(1, 5 * _CHUNK // n))
    for start in range(0, N_RESAMPLES, size):
        yield resample(rng, n, groups, min(size, N_RESAMPLES - start))


def resampled_means(values: Array, seed: int, groups: Array | None = None) -> Array:
    """Means over bootstrap samples of rows, or of whole groups of rows."""
    every = resamples(len(values), seed, groups)
    return np.concatenate([counts @ values / counts.sum(1, keepdims=True) for counts in every])


def middle(resampled: Array, point: float, groups: Array | None = None) -> Interval:
    """The middle 95%, extended if necessary to contain the estimate, which rounding can exclude.

    Bootstrap samples without a value (NaN) do not count. A single group has no interval.
    """
    n = None if groups is None else n_counted(len(groups), groups)
    if np.isnan(resampled).all() or n == 1:
        return math.nan, math.nan
    tail = widened((1 - LEVEL) / 2, n)
    low, high = np.nanquantile(resampled, [tail, 1 - tail])
    return min(float(low), float(point)), max(float(high), float(point))


def exact_interval(k: int, n: int, level: float = LEVEL) -> Interval:
    """Clopper and Pearson's interval for a fraction, from k successes in n trials."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    return low, float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


def chunks(logits: Array) -> Iterator[slice]:
    """Slices of rows to work on at a time."""
    size = max(1, _CHUNK // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def log_softmax(logits: Array, inverse_temperature: float = 1.0) -> Array:
    """Log-probabilities."""
    scaled = logits.astype(np.float64) * inverse_temperature
    scaled -= scaled.max(1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))


def losses_of(
    logits: Array, targets: Array, task: Task = LABELS, inverse_temperature: float = 1.0
) -> Array:
    """The task's loss of each example, in nats and float64."""
    losses = np.empty(len(logits))
    for part in chunks(logits):
        z = torch.from_numpy(logits[part].astype(np.float64) * inverse_temperature)
        losses[part] = task.losses(z, torch.from_numpy(targets[part].copy())).numpy()
    return losses


def expected(values: Array, targets: Array) -> Array:
    """Mean of values ``(N, K)`` over classes, weighted by each target.

    A label has all the weight; a reference's logits give their softmax as weights.
    """
    if targets.ndim == 1:
        return np.take_along_axis(values, targets[:, None], 1)[:, 0]
    return np.asarray((np.exp(log_softmax(targets)) * values).sum(1))


def scaled_losses(logits: Array, targets: Array, task: Task, seed: int) -> tuple[Array, float]:
    """Each example's loss at the temperature fitted on the other half, and the mean temperature."""
    half = np.zeros(len(targets), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(targets))[: len(targets) // 2]] = True
    losses = np.empty(len(targets))
    inverses = []
    for fitted, applied in ((half, ~half), (~half, half)):
        inverses.append(inverse_temperature(logits[fitted], targets[fitted]))
        losses[applied] = losses_of(logits[applied], targets[applied], task, inverses[-1])
    return losses, float(np.exp(-np.mean(np.log(inverses))))


def inverse_temperature(logits: Array, targets: Array) -> float:
    """The b > 0 that minimizes the loss of b * logits, convex in b, by guarded Newton steps."""
    # One extra example is spread over all labels (Platt's idea). Without it the best b of a half
    # without mistakes is infinite, and so is the loss of a mistake in the other half.
    n = len(targets)
    target = scale = 0.0
    for part in chunks(logits):
        z = logits[part].astype(np.float64)
        own = expected(z, targets[part])
        target += float((n * own + z.mean(1) - (n + 1) * z.max(1)).sum()) / (n + 1)
        scale += float(z.std(1).sum())
    if scale == 0:
        return 1.0
    low, high = 0.01 * n / scale, 100 * n / scale
    b = min(max(1.0, low), high)
    for _ in range(100):
        slope, curvature = _slopes(logits, b)
        slope -= target
        low, high = (low, b) if slope > 0 else (b, high)
        new = b - slope / curvature if curvature > 0 else low
        if not low < new < high:
            new = (low * high) ** 0.5
        done = abs(new - b) <= 1e-9 * b
        b = new
        if done:
            break
    return b


def _slopes(logits: Array, b: float) -> tuple[float, float]:
    """Sums over examples of mean and variance of (z - max z) under softmax(b z)."""
    mean = var = 0.0
    for part in chunks(logits):
        z = logits[part].astype(np.float64)
        z -= z.max(1, keepdims=True)
        p = np.exp(b * z)
        total = p.sum(1)
        first = np.einsum("nk,nk->n", p, z) / total
        mean += float(first.sum())
        var += float((np.einsum("nk,nk,nk->n", p, z, z) / total - first**2).sum())
    return mean, var


N_BINS = 15


@dataclass(frozen=True)
class Bin:
    """The examples with confidence in (low, high] in the reliability diagram."""

    low: float
    high: float
    n_examples: int
    confidence: float  # mean; 0 without examples, like the accuracy
    accuracy: float


@dataclass(frozen=True, repr=False, eq=False)
class PerExample:
    """Labels, losses and scores of each example, for paired comparisons."""

    labels: Array  # (N,) int64; a checksum of each target, if the task keeps no targets
    losses: Array
    #: At the temperature fitted on the half without the example; `None` without logits.
    scaled_losses: Array | None = None
    scores: Array | None = None  # 0 to 1, such as right or wrong; `None` if there is only a loss
    blind_loss: float = 0.0  # mean loss if each target's classes were permuted at random; or 0
    words: Words = LABELS.words  # the task's
    rows: Array | None = None  # (N, R), the terms of the task's metrics
    groups: Array | None = None  # (N,) from 0, if examples depend on each other

    @property
    def columns(self) -> dict[str, Array]:
        """The numbers of each example, by the keys that `Metrics` has for their means."""
        scaled = {"nll_temperature_scaled": self.scaled_losses}
        every = {"top1": self.scores, "nll": self.losses, **scaled}
        return {key: values for key, values in every.items() if values is not None}

    @property
    def n_groups(self) -> int | None:
        """The number of groups, if there are any."""
        return None if self.groups is None else int(self.groups.max()) + 1

    @property
    def shortfall(self) -> str:
        """The shortfall of units for any proof, in words; empty if there are enough."""
        return shortfall(len(self.losses), self.groups)


@dataclass(frozen=True, repr=False, kw_only=True)
class Scores:
    """The numbers from labelled examples, described at `Metrics`; all ``None`` without labels."""

    # The names are classification's; for other tasks `nll` is the loss and `top1` the score.

    top1: float | None = None
    top5: float | None = None
    nll: float | None = None
    nll_temperature_scaled: float | None = None
    temperature: float | None = None
    brier: float | None = None
    ece: float | None = None
    interval: dict[str, Interval] = field(default_factory=dict)


@dataclass(frozen=True, repr=False, kw_only=True)
class Metrics(Scores):
    """The metrics of a model on some examples. Fractions are from 0 to 1.

    Args:
        n_examples: number of examples.
        top1: fraction of right predictions; for another task its mean score, if any (segmentation:
            fraction of right pixels). This and all numbers below are ``None`` without labels.
        top5: fraction with the label among the five largest logits; of equal logits, the first
            counts as larger, as in ``top1``.
        nll: mean negative log-likelihood, nats; for another task its mean loss.
        nll_temperature_scaled: ``nll`` after temperature scaling, with the temperature fitted on
            one seeded half of the examples and applied to the other, both ways. The fit counts one
            extra example, spread over all labels, so a half without mistakes has a temperature.
        temperature: geometric mean of the two temperatures.
        brier: mean over examples of the squared distance from the one-hot label.
        ece: expected calibration error, 15 equal-width right-closed bins, confidence 1 in the last.
        interval: 95% bootstrap intervals of all these except the temperature; the interval of
            ``ece`` is shifted by the bootstrap's bias (resampling increases absolute gaps), and
            that of a ``top1`` of 0 or 1 is the exact binomial one.
        images_per_second: through the model, without loading; with several batches, the first is
            left out.
        reliability: the 15 bins.
        logits: ``(N, K)`` float32, for classification.
        examples: losses and scores of each example.
        task: the task that the model is judged by; ``bnfix.evaluate`` lists the tasks.
        values: other metrics of the task by name, such as ``miou``; empty for classification.
        resampled: ``values`` in each bootstrap sample.
        by_class: for each class, its ``top1`` or IoU, and its number of examples or positions.
        problem: why the model cannot be evaluated, so that its numbers are ``None``; else empty.
    """

    n_examples: int
    images_per_second: float = 0.0
    reliability: tuple[Bin, ...] = ()
    logits: Array = field(default_factory=lambda: np.empty((0, 0), np.float32), compare=False)
    examples: PerExample | None = field(default=None, compare=False)
    problem: str = ""
    task: Task = LABELS
    values: dict[str, float] = field(default_factory=dict)
    resampled: dict[str, Array] = field(default_factory=dict, compare=False)
    by_class: tuple[tuple[float, float], ...] = field(default=(), compare=False)

    @property
    def loss(self) -> float | None:
        """The mean loss of the task."""
        return self.nll

    def number(self, key: str) -> float | None:
        """A number by the key of its column; ``None`` if there is none."""
        return self.values.get(key, getattr(self, key, None))

    @property
    def results(self) -> dict[str, float | None]:
        """The main numbers, to be recorded."""
        if isinstance(self.task, ByRows):
            return {"loss": self.nll, **self.values}
        return {"top1": self.top1, "nll": self.nll}

    def __repr__(self) -> str:
        found = self.results
        if not isinstance(self.task, ByRows):
            found |= {"nll_temperature_scaled": self.nll_temperature_scaled, "ece": self.ece}
        text = ", ".join(f"{k}={v:.4g}" for k, v in found.items() if v is not None)
        return f"Metrics(n_examples={self.n_examples}, {self.problem or text})"


def measure(
    logits: Array,
    targets: Array | None,
    *,
    task: Labels | Reference = LABELS,
    images_per_second: float = 0.0,
    seed: int = 0,
    groups: Array | None = None,
) -> Metrics:
    """Metrics of logits against labels ``(N,)``, or against a reference's logits ``(N, K)``."""
    if logits.ndim != 2 or not logits.size:
        raise DataError(
            f"logits: shape {logits.shape}, expected (examples, classes), both above 0."
        )
    refuse_not_finite(logits)
    if targets is None:
        return Metrics(n_examples=len(logits), logits=logits, images_per_second=images_per_second)
    n = len(logits)
    targets, labels = task.checked(targets, logits.shape)
    losses = losses_of(logits, targets, task)
    rank, blind, brier, confidence = _per_example(logits, targets, labels)
    right = rank == 0
    scaled, temperature = scaled_losses(logits, targets, task, seed)
    bins, gaps = _reliability(confidence, right)
    examples = PerExample(
        labels, losses, scaled, right, blind_loss=float(blind.mean()), words=task.words,
        groups=groups,
    )  # fmt: skip
    columns = examples.columns | {"top5": rank < 5, "brier": brier}
    means, interval, drawn = _means(columns, gaps, seed, groups)
    ece, drawn_ece = float(np.abs(gaps.mean(0)).sum()), np.abs(drawn).sum(1)
    interval["ece"] = middle((drawn_ece - drawn_ece.mean() + ece).clip(0, 1), ece, groups)
    of_class = np.bincount(labels)
    right_of_class = np.bincount(labels, right) / np.maximum(of_class, 1)
    return Metrics(
        n_examples=n, **means, ece=ece, temperature=temperature, interval=interval,
        images_per_second=images_per_second, reliability=bins, logits=logits, task=task,
        by_class=tuple(zip(right_of_class.tolist(), of_class.tolist(), strict=True)),
        examples=examples,
    )  # fmt: skip


def _means(
    columns: dict[str, Array], others: Array, seed: int, groups: Array | None
) -> tuple[dict[str, Any], dict[str, Interval], Array]:
    """Means of columns by name, their intervals, and other columns in the same resamples."""
    table = np.column_stack([*columns.values(), others]).astype(np.float64)
    means = dict(zip(columns, table.mean(0).tolist(), strict=False))
    drawn = resampled_means(table, seed, groups)
    interval = {name: middle(drawn[:, i], means[name], groups) for i, name in enumerate(columns)}
    n = n_counted(len(table), groups)
    if means.get("top1") in (0.0, 1.0) and (groups is None or n > 1):
        # A bootstrap of equal scores has no width, as if no other example could differ.
        interval["top1"] = exact_interval(n if means["top1"] else 0, n)
    return means, interval, drawn[:, len(columns) :]


def measure_rows(
    examples: PerExample, task: ByRows, *, images_per_second: float = 0.0, seed: int = 0
) -> Metrics:
    """A task's metrics from the losses, scores and rows of its examples."""
    refuse_not_finite(examples.losses[:, None], f"{task.words.loss} of", "is")
    n, groups = len(examples.losses), examples.groups
    rows = np.empty((n, 0)) if examples.rows is None else examples.rows
    means, interval, _ = _means(examples.columns, np.empty((n, 0)), seed, groups)
    values = {name: float(v[0]) for name, v in task.metrics(rows, np.ones((1, n))).items()}
    parts = [task.metrics(rows, counts) for counts in resamples(n, seed, groups)] if values else []
    resampled = {name: np.concatenate([part[name] for part in parts]) for name in values}
    interval |= {name: middle(resampled[name], value, groups) for name, value in values.items()}
    return Metrics(
        n_examples=n, **means, interval=interval,
        images_per_second=images_per_second, examples=examples, task=task,
        values=values, resampled=resampled,
        by_class=tuple((float(v), float(n)) for v, n in task.by_class(rows)),
    )  # fmt: skip


def refuse_not_finite(values: Array, what: str = "logits of", verb: str = "are") -> None:
    """Raise a `NumericError` for the first example (row) whose values are not finite."""
    finite = np.isfinite(values).all(1)
    if not finite.all():
        raise NumericError(
            f"evaluation: the {what} example {int(finite.argmin())} (from 0) {verb} not finite. "
            "Look at the statistics with `bnfix inspect`, or use --precision fp32."
        )


def _per_example(logits: Array, targets: Array, labels: Array) -> tuple[Array, ...]:
    """Rank of the label from 0, blind loss, Brier score and confidence, each ``(N,)``."""
    n = len(labels)
    rank, (blind, brier, confidence) = np.empty(n, int), np.empty((3, n))
    for part in chunks(logits):
        own = np.take_along_axis(logits[part], labels[part, None], 1)
        # The smaller index wins a tie, as in argmax: equal logits must not all count as right.
        earlier = np.arange(logits.shape[1]) < labels[part, None]
        rank[part] = ((logits[part] > own) | ((logits[part] == own) & earlier)).sum(1)
        log_p = log_softmax(logits[part])
        blind[part] = -log_p.mean(1)
        p = np.exp(log_p)
        confidence[part] = p.max(1)
        if targets.ndim == 1:
            at_label = np.take_along_axis(log_p, labels[part, None], 1)
            np.put_along_axis(p, labels[part, None], -np.expm1(at_label), 1)
        else:
            log_t = log_softmax(targets[part])
            # Every permutation of the target's classes has the same entropy.
            blind[part] += expected(log_t, targets[part])
            p -= np.exp(log_t)
        brier[part] = (p**2).sum(1)
    return rank, blind, brier, confidence


def _reliability(confidence: Array, right: Array) -> tuple[tuple[Bin, ...], Array]:
    """The bins, and signed gaps ``(N, bins)``; the ECE sums the absolute values of their means."""
    edges = np.linspace(0, 1, N_BINS + 1)
    place = np.clip(np.searchsorted(edges, confidence, side="left") - 1, 0, N_BINS - 1)
    gaps = np.zeros((len(right), N_BINS))
    gaps[np.arange(len(right)), place] = confidence - right
    bins = []
    for b in range(N_BINS):
        inside = place == b
        n = int(inside.sum())
        mean = (float(confidence[inside].mean()), float(right[inside].mean())) if n else (0.0, 0.0)
        bins.append(Bin(float(edges[b]), float(edges[b + 1]), n, *mean))
    return tuple(bins), gaps
