"""Losses of logits, as they are and after one fitted temperature."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnfix.metrics.intervals import Array

_CHUNK = 2**20  # logits worked on at a time in float64: 50,000 x 1,000 of them at once is 400 MB


def chunks(logits: Array) -> Iterator[slice]:
    """Rows to work on at a time."""
    size = max(1, _CHUNK // logits.shape[1])
    return (slice(start, start + size) for start in range(0, len(logits), size))


def log_softmax(logits: Array, inverse_temperature: float = 1.0) -> Array:
    """Log-probabilities."""
    scaled = logits.astype(np.float64) * inverse_temperature
    scaled -= scaled.max(1, keepdims=True)
    return np.asarray(scaled - np.log(np.exp(scaled).sum(1, keepdims=True)))


def nll_of(logits: Array, labels: Array, inverse_temperature: float = 1.0) -> Array:
    """Negative log-likelihood of each example, nats."""
    losses = np.empty(len(labels))
    for part in chunks(logits):
        log_p = log_softmax(logits[part], inverse_temperature)
        losses[part] = -np.take_along_axis(log_p, labels[part, None], 1)[:, 0]
    return losses


def scaled_losses(logits: Array, labels: Array, seed: int) -> tuple[Array, float]:
    """NLL of each example under the temperature fitted on the half that it is not in."""
    half = np.zeros(len(labels), dtype=bool)
    half[np.random.default_rng(seed).permutation(len(labels))[: len(labels) // 2]] = True
    losses = np.empty(len(labels))
    inverses = []
    for fitted, applied in ((half, ~half), (~half, half)):
        inverses.append(_inverse_temperature(logits[fitted], labels[fitted]))
        losses[applied] = nll_of(logits[applied], labels[applied], inverses[-1])
    return losses, float(np.exp(-np.mean(np.log(inverses))))


def _inverse_temperature(logits: Array, labels: Array) -> float:
    """The b > 0 with the least NLL of b * logits, which is convex in b, by guarded Newton steps."""
    # One more example than there are is spread over all labels (Platt's idea): without it the best
    # b of a half without a mistake is infinite, and a mistake in the other half costs as much.
    n = len(labels)
    target = scale = 0.0
    for part in chunks(logits):
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
    for part in chunks(logits):
        z = logits[part].astype(np.float64)
        z -= z.max(1, keepdims=True)
        p = np.exp(b * z)
        total = p.sum(1)
        first = np.einsum("nk,nk->n", p, z) / total
        mean += float(first.sum())
        var += float((np.einsum("nk,nk,nk->n", p, z, z) / total - first**2).sum())
    return mean, var
