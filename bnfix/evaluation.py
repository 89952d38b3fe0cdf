"""One pass over the data to logits; logits to `Metrics`; two of them to a paired difference."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binomtest
from scipy.stats import t as student_t
from torch import Tensor, nn

from bnfix import guards, runtime
from bnfix.errors import DataError, ModelError, NumericError

Array = NDArray[Any]
Interval = tuple[float, float]
N_BINS = 15
N_RESAMPLES = 1000
LEVEL = 0.95
#: Mean differences of the loss up to this (nats) are rounding of float32, and nobody's gain.
ROUNDING = 1e-6
_CHUNK = 2**20  # logits worked on at a time in float64: 50,000 x 1,000 of them at once is 400 MB


@dataclass(frozen=True)
class Bin:
    """One bin of the reliability diagram, right-closed: (low, high].

    Args:
        low: lower edge of the confidence.
        high: upper edge.
        n_examples: how many fell into it.
        confidence: their mean confidence; 0 for none.
        accuracy: the fraction of them that is right; 0 for none.
    """

    low: float
    high: float
    n_examples: int
    confidence: float
    accuracy: float


@dataclass(frozen=True, repr=False, eq=False)
class PerExample:
    """What paired comparisons need, one row an example.

    Args:
        labels: ``(N,)`` int64.
        losses: NLL, nats.
        scaled_losses: NLL after the temperature fitted on the half that the example is not in.
        right: whether the largest logit is the label's; of equal logits the first counts as larger.
    """

    labels: Array
    losses: Array
    scaled_losses: Array
    right: Array


@dataclass(frozen=True, repr=False)
class Metrics:
    """What a model achieves on some examples. Fractions are fractions.

    Args:
        n_examples: examples seen.
        top1: fraction right; ``None``, as all below, where there are no labels.
        top5: fraction with the label among the five largest logits; of equal logits the first
            count as larger, as in ``top1``.
        nll: mean negative log-likelihood, nats.
        nll_temperature_scaled: the same after one temperature, fitted on one seeded half of the
            examples and applied to the other, both ways. The fit counts one more example than there
            are, spread over all labels, so that a half without a mistake has a temperature too.
        temperature: geometric mean of the two.
        brier: mean over examples of the squared distance from the one-hot label.
        ece: expected calibration error, 15 equal-width right-closed bins, confidence 1 in the last.
        interval: 95% bootstrap interval of each but the temperature; that of ``ece`` is shifted by
            the bias of the bootstrap (absolute gaps grow by resampling).
        images_per_second: through the model, without loading; the first of several batches is left
            out.
        reliability: the 15 bins.
        logits: ``(N, K)`` float32.
        examples: losses and hits one by one.
    """

    n_examples: int
    top1: float | None
    top5: float | None
    nll: float | None
    nll_temperature_scaled: float | None
    temperature: float | None
    brier: float | None
    ece: float | None
    interval: dict[str, Interval]
    images_per_second: float
    reliability: tuple[Bin, ...]
    logits: Array = field(compare=False)
    examples: PerExample | None = field(compare=False)

    def __repr__(self) -> str:
        shown = ("top1", "nll", "nll_temperature_scaled", "ece")
        values = (getattr(self, name) for name in shown)
        text = ", ".join(
            f"{k}={v:.4g}" for k, v in zip(shown, values, strict=True) if v is not None
        )
        return f"Metrics(n_examples={self.n_examples}, {text})"


@dataclass(frozen=True)
class Difference:
    """A paired difference, after less before.

    Args:
        difference: mean over the examples.
        interval: 95%, by bootstrap over the examples.
        p: two-sided; McNemar's exact test for top-1, the paired t-test for losses.
    """

    difference: float
    interval: Interval
    p: float


@dataclass(frozen=True)
class Paired:
    """Two models on the same examples.

    Args:
        top1: difference in the fraction right; above 0 is better.
        nll: difference in NLL; below 0 is better.
        nll_temperature_scaled: the same after temperature scaling of both.
        verdict: ``better``: NLL or top-1 significantly better and neither significantly worse;
            ``worse``: either significantly worse; otherwise ``same``. Significant: the interval
            leaves out 0 (and rounding), and p < 0.05; either alone is too bold on few examples.
        temperature_only: better, but nothing of it is left after temperature scaling.
    """

    top1: Difference
    nll: Difference
    nll_temperature_scaled: Difference
    verdict: str
    temperature_only: bool


@dataclass(frozen=True)
class Score:
    """The least that says how good a model is; see `score`.

    Args:
        n_examples: examples seen.
        nll: mean negative log-likelihood, nats.
        top1: fraction right.
    """

    n_examples: int
    nll: float
    top1: float


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Metrics:
    """Measure a classifier in evaluation mode on labelled batches.

    Args:
        model: on the device to run on; modes are left as found.
        batches: any iterable of ``(x, y)``; without labels only logits and speed are had.
        forward: called as ``forward(model, batch)`` and returns logits, for unusual batches.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seed: of the bootstrap and of the halves for the temperature.

    Returns:
        The metrics with 95% intervals.

    Raises:
        DataError: if there are no examples, or labels do not fit.
        ModelError: if the output is no logits, or not always for the same number of classes.
        NumericError: if a logit is not finite.
    """
    logits, labels, rate = _collect(model, batches, forward, precision)
    return measure(logits, labels, images_per_second=rate, seed=seed)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> Score:
    """Measure loss and accuracy only, without the cost of intervals; for searches.

    Args:
        model: on the device to run on; modes are left as found.
        batches: any iterable of ``(x, y)``.
        forward: called as ``forward(model, batch)`` and returns logits, for unusual batches.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        The same NLL and top-1 as `evaluate`.

    Raises:
        DataError: if there are no examples, or no labels, or labels do not fit.
    """
    logits, labels, _ = _collect(model, batches, forward, precision)
    if labels is None:
        raise DataError("batches: no labels in them. Give (x, y) with integer classes y.")
    right = logits.argmax(1) == labels
    return Score(len(labels), float(_losses(logits, labels).mean()), float(right.mean()))


def labels_of(batch: Any, n_examples: int, n_classes: int) -> Array | None:
    """The labels of a batch, checked against the logits that the model gave for it.

    Args:
        batch: any form that ``runtime.unpack`` takes, and mappings that only ``forward`` knows.
        n_examples: N of the logits.
        n_classes: K of the logits.

    Returns:
        ``(N,)`` int64 on the CPU, or ``None`` where the batch has none.
    """
    if isinstance(batch, Mapping):
        batch = {"x": None, **batch}  # inputs may have any names where forward= is given
    labels = runtime.unpack(batch)[1]
    return None if labels is None else _checked(labels, n_examples, n_classes)


def measure(
    logits: Array, labels: Array | None, *, images_per_second: float = 0.0, seed: int = 0
) -> Metrics:
    """Metrics of given logits.

    Args:
        logits: ``(N, K)``.
        labels: ``(N,)``, integers in [0, K); ``None`` leaves only the counts.
        images_per_second: passed through.
        seed: of the bootstrap and of the halves for the temperature.

    Returns:
        The metrics with 95% intervals.

    Raises:
        DataError: if there are no examples, or labels do not fit the logits.
    """
    if logits.ndim != 2 or not logits.size:
        raise DataError(
            f"logits: shape {logits.shape}, expected (examples, classes), both above 0."
        )
    _refuse_not_finite(logits, 0)
    if labels is None:
        none = (None,) * 7
        return Metrics(len(logits), *none, {}, images_per_second, (), logits, None)
    n = len(logits)
    labels = _checked(labels, n, logits.shape[1])
    rank, losses, brier, confidence = _per_example(logits, labels)
    right = rank == 0
    scaled, temperature = _scaled_losses(logits, labels, seed)
    bins, gaps = _reliability(confidence, right)
    columns = np.column_stack([right, rank < 5, losses, scaled, brier]).astype(np.float64)
    means = [float(mean) for mean in columns.mean(0)]
    ece = float(np.abs(gaps.mean(0)).sum())
    resampled = _resample(np.column_stack([columns, gaps]), seed)
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "brier")
    interval = {name: _interval(resampled[:, i], means[i]) for i, name in enumerate(names)}
    resampled_ece = np.abs(resampled[:, len(names) :]).sum(1)
    shifted = resampled_ece - resampled_ece.mean() + ece
    interval["ece"] = _interval(shifted.clip(0, 1), ece)
    return Metrics(
        n, means[0], means[1], means[2], means[3], temperature, means[4], ece, interval,
        images_per_second, bins, logits, PerExample(labels, losses, scaled, right),
    )  # fmt: skip


def compare(before: Metrics, after: Metrics, *, seed: int = 0) -> Paired:
    """Compare two models on the same examples, pairwise.

    Args:
        before: what is compared against.
        after: what is judged.
        seed: of the bootstrap.

    Returns:
        Differences (after less before) with 95% intervals and the verdict.

    Raises:
        DataError: if the examples differ or have no labels.
    """
    old, new = paired_examples(before, after)
    columns = np.column_stack(
        [
            new.right.astype(np.float64) - old.right,
            new.losses - old.losses,
            new.scaled_losses - old.scaled_losses,
        ]
    )
    means = columns.mean(0)
    intervals = map(_interval, _resample(columns, seed).T, means)
    p_values = (_mcnemar(columns[:, 0]), _paired_p(columns[:, 1]), _paired_p(columns[:, 2]))
    top1, nll, scaled = (
        Difference(float(mean), interval, p)
        for mean, interval, p in zip(means, intervals, p_values, strict=True)
    )
    signs = {_sign(top1), -_sign(nll)}
    verdict = "worse" if -1 in signs else "better" if 1 in signs else "same"
    left = _sign(top1) == 1 or _sign(scaled) == -1
    return Paired(top1, nll, scaled, verdict, verdict == "better" and not left)


def paired_examples(before: Metrics, after: Metrics) -> tuple[PerExample, PerExample]:
    """The examples of two metrics, checked to be the same ones.

    Args:
        before: one model's metrics.
        after: another's.

    Returns:
        Both, row by row of the same examples.

    Raises:
        DataError: if the examples differ or have no labels.
    """
    if before.examples is None or after.examples is None:
        raise DataError("comparison: the examples have no labels, so nothing can be compared.")
    if not np.array_equal(before.examples.labels, after.examples.labels):
        raise DataError("comparison: the two were not measured on the same examples.")
    return before.examples, after.examples


def _collect(
    model: nn.Module, batches: Iterable[Any], forward: runtime.Forward | None, precision: str
) -> tuple[Array, Array | None, float]:
    """Logits, labels (if any), and examples a second, of one pass in evaluation."""
    device = runtime.device_of(model)
    logits: list[Array] = []
    labels: list[Array | None] = []
    n_seen = n_timed = 0
    seconds = 0.0
    with guards.inference(model):
        for batch in batches:
            started = time.perf_counter()
            with runtime.autocast(device, precision):
                output = runtime.logits_of(runtime.run(model, batch, device, forward))
            found = output.float().cpu().numpy()
            if n_seen == n_timed and n_timed:
                n_timed, seconds = 0, 0.0  # the first batch also warms up
            n_timed, seconds = n_timed + len(found), seconds + time.perf_counter() - started
            if logits and found.shape[1] != logits[0].shape[1]:
                raise ModelError(
                    f"evaluation: {found.shape[1]} logits in batch {len(logits)}, but "
                    f"{logits[0].shape[1]} before it. Expected one number of classes."
                )
            _refuse_not_finite(found, n_seen)
            logits.append(found)
            labels.append(labels_of(batch, *found.shape))
            n_seen += len(found)
    if n_seen == 0:
        raise DataError("evaluation: no examples. Give at least one batch.")
    rate = n_timed / max(seconds, 1e-9)
    given = [y for y in labels if y is not None]
    if given and len(given) < len(labels):
        raise DataError(
            f"labels: {len(labels) - len(given)} of {len(labels)} batches have none. Give labels "
            "in all batches, or in none."
        )
    return np.concatenate(logits), np.concatenate(given) if given else None, rate


def _refuse_not_finite(logits: Array, n_before: int) -> None:
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        raise NumericError(
            f"evaluation: the logits of example {n_before + int(finite.argmin())} (from 0) are not "
            "finite. Look at the statistics with `bnfix inspect`, or use --precision fp32."
        )


def _checked(labels: Any, n: int, k: int) -> Array:
    """Labels of any kind as ``(n,)`` int64 in [0, k), or a refusal."""
    try:
        array = np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"labels: {error}. Give one integer an example.") from error
    if array.dtype.kind not in "iub" or array.shape != (n,):
        raise DataError(
            f"labels: {array.dtype} of shape {array.shape} for {n} examples, expected one integer "
            "an example. Give forward= and integer labels for unusual batches."
        )
    if n and not 0 <= array.min() <= array.max() < k:
        raise DataError(
            f"labels: from {array.min()} to {array.max()}, expected 0 to {k - 1}, as the model has "
            f"{k} outputs. Check the class map."
        )
    return array.astype(np.int64)


def _chunks(logits: Array) -> Iterator[slice]:
    size = max(1, _CHUNK // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def _log_softmax(logits: Array, inverse_temperature: float = 1.0) -> Array:
    scaled = logits.astype(np.float64) * inverse_temperature
    scaled -= scaled.max(1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))


def _losses(logits: Array, labels: Array, inverse_temperature: float = 1.0) -> Array:
    """NLL of each example, float64."""
    losses = np.empty(len(labels))
    for part in _chunks(logits):
        log_p = _log_softmax(logits[part], inverse_temperature)
        losses[part] = -np.take_along_axis(log_p, labels[part, None], 1)[:, 0]
    return losses


def _per_example(logits: Array, labels: Array) -> tuple[Array, Array, Array, Array]:
    """Rank of the label's logit from 0, NLL, Brier score and confidence, each ``(N,)``."""
    rank, (losses, brier, confidence) = np.empty(len(labels), int), np.empty((3, len(labels)))
    for part in _chunks(logits):
        own = np.take_along_axis(logits[part], labels[part, None], 1)
        # A tie is won by the smaller index, as argmax has it: equal logits must not all be right.
        earlier = np.arange(logits.shape[1]) < labels[part, None]
        rank[part] = ((logits[part] > own) | ((logits[part] == own) & earlier)).sum(1)
        log_p = _log_softmax(logits[part])
        losses[part] = -np.take_along_axis(log_p, labels[part, None], 1)[:, 0]
        p = np.exp(log_p)
        confidence[part] = p.max(1)
        np.put_along_axis(p, labels[part, None], -np.expm1(-losses[part, None]), 1)
        brier[part] = (p**2).sum(1)
    return rank, losses, brier, confidence


def _scaled_losses(logits: Array, labels: Array, seed: int) -> tuple[Array, float]:
    """NLL of each example under the temperature fitted on the half that it is not in."""
    half = np.zeros(len(labels), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]] = True
    losses = np.empty(len(labels))
    inverses = []
    for fitted, applied in ((half, ~half), (~half, half)):
        inverses.append(_inverse_temperature(logits[fitted], labels[fitted]))
        losses[applied] = _losses(logits[applied], labels[applied], inverses[-1])
    return losses, float(np.exp(-np.mean(np.log(inverses))))


def _inverse_temperature(logits: Array, labels: Array) -> float:
    """The b > 0 with the least NLL of b * logits, which is convex in b, by guarded Newton steps."""
    # One more example than there are is spread over all labels (Platt's idea): without it the best
    # b of a half without a mistake is infinite, and a mistake in the other half costs as much.
    n = len(labels)
    target = scale = 0.0
    for part in _chunks(logits):
        z = logits[part].astype(np.float64)
        own = np.take_along_axis(z, labels[part, None], 1)[:, 0]
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
    for part in _chunks(logits):
        z = logits[part].astype(np.float64)
        z -= z.max(1, keepdims=True)
        p = np.exp(b * z)
        total = p.sum(1)
        first = np.einsum("nk,nk->n", p, z) / total
        mean += float(first.sum())
        var += float((np.einsum("nk,nk,nk->n", p, z, z) / total - first**2).sum())
    return mean, var


def _reliability(confidence: Array, right: Array) -> tuple[tuple[Bin, ...], Array]:
    """The bins, and ``(N, bins)`` signed gaps whose column means' absolute values sum to ECE."""
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


def _resample(values: Array, seed: int) -> Array:
    """Means of ``(N, M)`` over bootstrap samples of the rows, ``(N_RESAMPLES, M)``."""
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((N_RESAMPLES, values.shape[1]))
    size = min(100, max(1, 5 * _CHUNK // n))
    for start in range(0, N_RESAMPLES, size):
        part = means[start : start + size]
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in part]
        part[:] = np.stack(drawn) @ values / n
    return means


def _interval(resampled: Array, point: float) -> Interval:
    """The middle 95%; always with the estimate in it, which rounding could leave out."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return min(float(low), float(point)), max(float(high), float(point))


def _sign(difference: Difference) -> int:
    """1 or -1 where the difference is significantly above or below 0, else 0."""
    low, high = difference.interval
    if difference.p >= 1 - LEVEL:
        return 0
    return 1 if low > ROUNDING else -1 if high < -ROUNDING else 0


def _mcnemar(difference: Array) -> float:
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _paired_p(difference: Array) -> float:
    n = len(difference)
    if n < 2 or not difference.any():
        return 1.0
    se = float(difference.std(ddof=1)) / n**0.5
    return float(2 * student_t.sf(abs(float(difference.mean())) / se, n - 1)) if se > 0 else 0.0
