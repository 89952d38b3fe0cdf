"""Logits and labels to `Metrics`: fractions right, losses, confidence, bootstrap intervals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch

from bnfix.core.errors import DataError, NumericError
from bnfix.metrics.task import LABELS, Array, Task

Interval = tuple[float, float]
N_RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**20  # counts or logits worked on at a time: in float64, 50,000 x 1,000 take 400 MB


def resampled_means(values: Array, seed: int) -> Array:
    """Means over bootstrap samples of the rows."""
    n = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((N_RESAMPLES, values.shape[1]))
    size = min(100, max(1, 5 * _CHUNK // n))
    for start in range(0, N_RESAMPLES, size):
        part = means[start : start + size]
        drawn = [np.bincount(rng.integers(0, n, n), minlength=n) for _ in part]
        part[:] = np.stack(drawn) @ values / n
    return means


def middle(resampled: Array, point: float) -> Interval:
    """The middle 95%; always with the estimate in it, which rounding could leave out."""
    low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return min(float(low), float(point)), max(float(high), float(point))


def chunks(logits: Array) -> Iterator[slice]:
    """Rows to work on at a time."""
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
    """The task's loss of each example, nats, in float64."""
    losses = np.empty(len(logits))
    for part in chunks(logits):
        z = torch.from_numpy(logits[part].astype(np.float64) * inverse_temperature)
        losses[part] = task.losses(z, torch.from_numpy(targets[part].copy())).numpy()
    return losses


def expected(values: Array, targets: Array) -> Array:
    """Mean of values ``(N, K)`` over the classes as each target weighs them.

    A label has all the weight; a reference's logits weigh by their softmax.
    """
    if targets.ndim == 1:
        return np.take_along_axis(values, targets[:, None], 1)[:, 0]
    return np.asarray((np.exp(log_softmax(targets)) * values).sum(1))


def scaled_losses(logits: Array, targets: Array, task: Task, seed: int) -> tuple[Array, float]:
    """Loss of each example under the temperature fitted on the half that it is not in."""
    half = np.zeros(len(targets), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(targets))[: len(targets) // 2]] = True
    losses = np.empty(len(targets))
    inverses = []
    for fitted, applied in ((half, ~half), (~half, half)):
        inverses.append(_inverse_temperature(logits[fitted], targets[fitted]))
        losses[applied] = losses_of(logits[applied], targets[applied], task, inverses[-1])
    return losses, float(np.exp(-np.mean(np.log(inverses))))


def _inverse_temperature(logits: Array, targets: Array) -> float:
    """The b > 0 with the least loss of b * logits, convex in b, by guarded Newton steps."""
    # One more example than there are is spread over all labels (Platt's idea): without it the best
    # b of a half without a mistake is infinite, and a mistake in the other half costs as much.
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
    """The examples of confidence (low, high] in the reliability diagram."""

    low: float
    high: float
    n_examples: int
    confidence: float  # mean; 0 without examples, as the accuracy is
    accuracy: float


@dataclass(frozen=True, repr=False, eq=False)
class PerExample:
    """Labels, losses in nats and hits of each example, as paired comparisons need them."""

    labels: Array  # (N,) int64
    losses: Array
    scaled_losses: Array  # at the temperature fitted on the half that the example is not in
    right: Array
    blind_loss: float  # mean, nats, if each target were drawn with its classes permuted
    words: tuple[str, str] = LABELS.words  # of the task


@dataclass(frozen=True, repr=False, kw_only=True)
class Scores:
    """The numbers of labelled examples, described at `Metrics`; without labels all are `None`."""

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
        problem: why the model cannot be evaluated, and all above is ``None``; empty where it can.
    """

    n_examples: int
    images_per_second: float = 0.0
    reliability: tuple[Bin, ...] = ()
    logits: Array = field(default_factory=lambda: np.empty((0, 0), np.float32), compare=False)
    examples: PerExample | None = field(default=None, compare=False)
    problem: str = ""

    def __repr__(self) -> str:
        shown = ("top1", "nll", "nll_temperature_scaled", "ece")
        values = (getattr(self, name) for name in shown)
        text = ", ".join(
            f"{k}={v:.4g}" for k, v in zip(shown, values, strict=True) if v is not None
        )
        return f"Metrics(n_examples={self.n_examples}, {self.problem or text})"


def measure(
    logits: Array,
    targets: Array | None,
    *,
    task: Task = LABELS,
    images_per_second: float = 0.0,
    seed: int = 0,
) -> Metrics:
    """Metrics of given logits against labels ``(N,)``, or logits ``(N, K)`` of a reference."""
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
    columns = np.column_stack([right, rank < 5, losses, scaled, brier]).astype(np.float64)
    means = [float(mean) for mean in columns.mean(0)]
    ece = float(np.abs(gaps.mean(0)).sum())
    resampled = resampled_means(np.column_stack([columns, gaps]), seed)
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "brier")
    interval = {name: middle(resampled[:, i], means[i]) for i, name in enumerate(names)}
    resampled_ece = np.abs(resampled[:, len(names) :]).sum(1)
    shifted = resampled_ece - resampled_ece.mean() + ece
    interval["ece"] = middle(shifted.clip(0, 1), ece)
    return Metrics(
        n_examples=n,
        top1=means[0],
        top5=means[1],
        nll=means[2],
        nll_temperature_scaled=means[3],
        temperature=temperature,
        brier=means[4],
        ece=ece,
        interval=interval,
        images_per_second=images_per_second,
        reliability=bins,
        logits=logits,
        examples=PerExample(
            labels=labels,
            losses=losses,
            scaled_losses=scaled,
            right=right,
            blind_loss=float(blind.mean()),
            words=task.words,
        ),
    )


def refuse_not_finite(logits: Array) -> None:
    """Raise a `NumericError` for the first example whose logits are not finite."""
    finite = np.isfinite(logits).all(1)
    if not finite.all():
        raise NumericError(
            f"evaluation: the logits of example {int(finite.argmin())} (from 0) are not "
            "finite. Look at the statistics with `bnfix inspect`, or use --precision fp32."
        )


def _per_example(logits: Array, targets: Array, labels: Array) -> tuple[Array, ...]:
    """Rank of the label from 0, loss if blind, Brier, confidence, each ``(N,)``."""
    n = len(labels)
    rank, (blind, brier, confidence) = np.empty(n, int), np.empty((3, n))
    for part in chunks(logits):
        own = np.take_along_axis(logits[part], labels[part, None], 1)
        # A tie is won by the smaller index, as argmax has it: equal logits must not all be right.
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
            # Any permutation of the target's classes has its entropy.
            blind[part] += expected(log_t, targets[part])
            p -= np.exp(log_t)
        brier[part] = (p**2).sum(1)
    return rank, blind, brier, confidence


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
