"""One pass over the data to logits; logits to `Metrics`; two of them to a paired difference."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax
from scipy.stats import binomtest, norm
from torch import nn

from bnfix import guards, runtime
from bnfix.errors import DataError, NumericError

Array = NDArray[Any]
Interval = tuple[float, float]
N_BINS = 15
N_RESAMPLES = 1000
LEVEL = 0.95


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


@dataclass(frozen=True, repr=False)
class PerExample:
    """What paired comparisons need, one row an example.

    Args:
        labels: ``(N,)`` int64.
        losses: NLL, nats.
        scaled_losses: NLL after the temperature fitted on the half that the example is not in.
        right: whether the largest logit is the label's.
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
        top5: fraction with the label among the five largest logits.
        nll: mean negative log-likelihood, nats.
        nll_temperature_scaled: the same after one temperature, fitted on one seeded half of the
            examples and applied to the other, both ways.
        temperature: geometric mean of the two.
        brier: mean over examples of the squared distance from the one-hot label.
        ece: expected calibration error, 15 equal-width right-closed bins, confidence 1 in the last.
        interval: 95% bootstrap interval of each of these.
        images_per_second: of the pass, data loading included.
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
        p: two-sided; McNemar's exact test for top-1, a paired normal test for losses.
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
            ``worse``: either significantly worse; otherwise ``same``.
        temperature_only: better, but nothing of it is left after temperature scaling.
    """

    top1: Difference
    nll: Difference
    nll_temperature_scaled: Difference
    verdict: str
    temperature_only: bool


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
        DataError: if there are no examples.
        NumericError: if a logit is not finite.
    """
    device = runtime.device_of(model)
    logits: list[Array] = []
    labels: list[Array] = []
    started = time.perf_counter()
    n_seen = 0
    with guards.inference(model), runtime.autocast(device, precision):
        for batch in batches:
            output = runtime.logits_of(runtime.run(model, batch, device, forward)).float()
            if not bool(torch.isfinite(output).all()):
                bad = int((~torch.isfinite(output)).any(1).nonzero()[0].item())
                raise NumericError(
                    f"evaluation: the logits of example {n_seen + bad} are not finite. Look at the "
                    "statistics with `bnfix inspect`, or use --precision fp32."
                )
            logits.append(output.cpu().numpy())
            n_seen += len(output)
            target = runtime.unpack(batch)[1]
            if target is not None:
                labels.append(torch.as_tensor(target).cpu().numpy())
    if n_seen == 0:
        raise DataError("evaluation: no examples. Give at least one batch.")
    rate = n_seen / max(time.perf_counter() - started, 1e-9)
    together = np.concatenate(labels).astype(np.int64) if labels else None
    return measure(np.concatenate(logits), together, images_per_second=rate, seed=seed)


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
        DataError: if labels do not fit the logits.
    """
    if labels is None:
        none = (None,) * 7
        return Metrics(len(logits), *none, {}, images_per_second, (), logits, None)
    n, k = logits.shape
    if len(labels) != n or n == 0 or labels.min() < 0 or labels.max() >= k:
        raise DataError(
            f"labels: {len(labels)} for {n} examples, from {labels.min(initial=0)} to "
            f"{labels.max(initial=0)}, expected one an example from 0 to {k - 1}."
        )
    rows = np.arange(n)
    log_p = log_softmax(logits.astype(np.float64), axis=1)
    losses = -log_p[rows, labels]
    order = logits.argmax(1)
    right = order == labels
    in_top5 = (logits > logits[rows, labels][:, None]).sum(1) < min(5, k)
    p = np.exp(log_p)
    brier = (p**2).sum(1) - 2 * p[rows, labels] + 1
    confidence = p[rows, order]
    scaled, temperature = _scaled_losses(logits, labels, seed)
    bins, gaps = _reliability(confidence, right)
    columns = np.column_stack([right, in_top5, losses, scaled, brier]).astype(np.float64)
    resampled = _resample(np.column_stack([columns, gaps]), seed)
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "brier")
    interval = {name: _interval(resampled[:, i]) for i, name in enumerate(names)}
    interval["ece"] = _interval(np.abs(resampled[:, len(names) :]).sum(1))
    means = columns.mean(0)
    return Metrics(
        n, float(means[0]), float(means[1]), float(means[2]), float(means[3]), temperature,
        float(means[4]), float(np.abs(gaps.mean(0)).sum()), interval, images_per_second, bins,
        logits, PerExample(labels, losses, scaled, right),
    )  # fmt: skip


def compare(before: Metrics, after: Metrics, *, seed: int = 0) -> Paired:
    """Compare two models on the same examples, pairwise.

    Args:
        before: what is compared against.
        after: what is judged.
        seed: of the bootstrap.

    Returns:
        Differences (after less before) with 95% intervals and the verdict.
    """
    old, new = paired_examples(before, after)
    columns = np.column_stack(
        [
            new.right.astype(np.float64) - old.right,
            new.losses - old.losses,
            new.scaled_losses - old.scaled_losses,
        ]
    )
    intervals = [_interval(column) for column in _resample(columns, seed).T]
    p_values = (_mcnemar(columns[:, 0]), _paired_p(columns[:, 1]), _paired_p(columns[:, 2]))
    top1, nll, scaled = (
        Difference(float(column.mean()), interval, p)
        for column, interval, p in zip(columns.T, intervals, p_values, strict=True)
    )
    gains = top1.interval[0] > 0 or nll.interval[1] < 0
    losses = top1.interval[1] < 0 or nll.interval[0] > 0
    verdict = "worse" if losses else "better" if gains else "same"
    left = top1.interval[0] > 0 or scaled.interval[1] < 0
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


def _scaled_losses(logits: Array, labels: Array, seed: int) -> tuple[Array, float]:
    """NLL of each example under the temperature fitted on the half that it is not in."""
    wide = logits.astype(np.float64)
    rows = np.arange(len(labels))
    half = np.zeros(len(labels), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]] = True
    losses = np.empty(len(labels))
    temperatures = []
    for fitted, applied in ((half, ~half), (~half, half)):
        temperature = _temperature(wide[fitted], labels[fitted]) if fitted.any() else 1.0
        temperatures.append(temperature)
        scaled = log_softmax(wide[applied] / temperature, axis=1)
        losses[applied] = -scaled[rows[: len(scaled)], labels[applied]]
    return losses, float(np.exp(np.mean(np.log(temperatures))))


def _temperature(logits: Array, labels: Array) -> float:
    """The temperature in [1/20, 20] with the least NLL."""
    rows = np.arange(len(labels))

    def nll(log_t: float) -> float:
        return float(-log_softmax(logits / np.exp(log_t), axis=1)[rows, labels].mean())

    bound = np.log(20.0)
    found = minimize_scalar(nll, bounds=(-bound, bound), method="bounded", options={"xatol": 1e-4})
    return float(np.exp(found.x))


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
    for start in range(0, N_RESAMPLES, 100):
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in range(100)]
        means[start : start + 100] = np.stack(drawn) @ values / n
    return means


def _interval(resampled: Array) -> Interval:
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _mcnemar(difference: Array) -> float:
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return float(binomtest(gained, gained + lost).pvalue) if gained + lost else 1.0


def _paired_p(difference: Array) -> float:
    deviation = float(difference.std(ddof=1)) if len(difference) > 1 else 0.0
    if deviation == 0:
        return 1.0 if not difference.any() else 0.0
    z = float(difference.mean()) / (deviation / np.sqrt(len(difference)))
    return float(2 * norm.sf(abs(z)))
