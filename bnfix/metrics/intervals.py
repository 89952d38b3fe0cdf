"""Bootstrap: resampled means, and the middle 95% of them."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Interval = tuple[float, float]
N_RESAMPLES = 1000
LEVEL = 0.95
_CHUNK = 2**20  # counts worked on at a time


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
