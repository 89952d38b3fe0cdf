"""Two models on the same examples: paired differences and the verdict."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from scipy.special import bdtr, stdtr  # as scipy.stats computes them, which takes long to import

from bnfix.errors import DataError
from bnfix.measuring.intervals import LEVEL, Array, Interval, middle, resampled_means
from bnfix.measuring.metrics import Metrics, PerExample

#: Mean differences of the loss up to this (nats) are rounding of float32, and nobody's gain.
ROUNDING = 1e-6
#: Fewer examples than this, or of losses fewer that differ, prove nothing.
LEAST_EXAMPLES = 20


@dataclass(frozen=True, repr=False)
class Difference:
    """A paired difference, after less before.

    Args:
        difference: mean over the examples.
        interval: 95%, by bootstrap over the examples.
        p: two-sided; McNemar's exact test for top-1, `gain_t` for losses.
    """

    difference: float
    interval: Interval
    p: float

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.difference:+.4g} ({low:+.4g} to {high:+.4g}, p={self.p:.2g})"


@dataclass(frozen=True, repr=False)
class Paired:
    """Two models on the same examples.

    Args:
        top1: difference in the fraction right; above 0 is better.
        nll: difference in NLL; below 0 is better.
        nll_temperature_scaled: the same after temperature scaling of both.
        verdict: ``better``: NLL or top-1 significantly better and neither significantly worse;
            ``worse``: either significantly worse; otherwise ``same``. Significant: the interval
            leaves out 0 (and rounding), and p < 0.05; either alone is too bold on few examples. As
            there are two chances to be better, it takes p < 0.025 where only one is (Hochberg).
            On fewer than 20 examples it is ``same``, and losses count where 20 of them differ.
        temperature_only: better, but nothing of it is left after temperature scaling.
    """

    top1: Difference
    nll: Difference
    nll_temperature_scaled: Difference
    verdict: str
    temperature_only: bool

    def __repr__(self) -> str:
        only = ", temperature_only" if self.temperature_only else ""
        return f"Paired({self.verdict}, top1 {self.top1!r}, nll {self.nll!r}{only})"


def compare(before: Metrics, after: Metrics, *, seed: int = 0) -> Paired:
    """Compare two models on the same examples, pairwise.

    Args:
        before: what is compared against.
        after: what is judged.
        seed: of the bootstrap.

    Returns:
        Differences (after less before) with 95% intervals and the verdict. A model that cannot be
        evaluated is worse than one that can; the differences are then NaN.

    Raises:
        DataError: if the examples differ or have no labels.
    """
    if before.problem or after.problem:
        return _without_differences(before.problem, after.problem)
    old, new = paired_examples(before, after)
    columns = np.column_stack(
        [
            new.right.astype(np.float64) - old.right,
            new.losses - old.losses,
            new.scaled_losses - old.scaled_losses,
        ]
    )
    means = columns.mean(0)
    intervals = map(middle, resampled_means(columns, seed).T, means)
    blind = new.blind_loss - old.blind_loss
    p_values = (
        _mcnemar(columns[:, 0]),
        _paired_p(columns[:, 1], blind),
        _paired_p(columns[:, 2], blind),
    )
    top1, nll, scaled = (
        Difference(difference=float(mean), interval=interval, p=p)
        for mean, interval, p in zip(means, intervals, p_values, strict=True)
    )
    signs = _sign(top1), -_sign(nll)
    surer = min(top1.p, nll.p) < (1 - LEVEL) / 2
    if len(columns) < LEAST_EXAMPLES:
        verdict = "same"
    elif -1 in signs:
        verdict = "worse"
    else:
        verdict = "better" if signs == (1, 1) or (1 in signs and surer) else "same"
    left = _sign(top1) == 1 or _sign(scaled) == -1
    return Paired(
        top1=top1,
        nll=nll,
        nll_temperature_scaled=scaled,
        verdict=verdict,
        temperature_only=verdict == "better" and not left,
    )


def paired_examples(before: Metrics, after: Metrics) -> tuple[PerExample, PerExample]:
    """The examples of two metrics, checked to be the same ones."""
    if before.examples is None or after.examples is None:
        raise DataError("comparison: the examples have no labels, so nothing can be compared.")
    if not np.array_equal(before.examples.labels, after.examples.labels):
        raise DataError("comparison: the two were not measured on the same examples.")
    return before.examples, after.examples


def _without_differences(problem_before: str, problem_after: str) -> Paired:
    """The verdict where a model cannot be evaluated: the other one wins, if it can."""
    sign = bool(problem_before) - bool(problem_after)
    none = Difference(difference=math.nan, interval=(math.nan, math.nan), p=math.nan)
    return Paired(
        top1=none,
        nll=none,
        nll_temperature_scaled=none,
        verdict={1: "better", 0: "same", -1: "worse"}[sign],
        temperature_only=False,
    )


def _sign(difference: Difference) -> int:
    """1 or -1 where the difference is significantly above or below 0, else 0."""
    low, high = difference.interval
    if difference.p >= 1 - LEVEL:
        return 0
    return 1 if low > ROUNDING else -1 if high < -ROUNDING else 0


def _mcnemar(difference: Array) -> float:
    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return min(1.0, float(2 * bdtr(min(gained, lost), gained + lost, 0.5)))


def gain_t(difference: Array, blind: float) -> float:
    """Student's t, of n degrees of freedom for n differences, that losses are lower; 0 if not."""
    # Rare losses may outweigh many small gains without being in the sample. So one more example is
    # counted, that loses as much as the worst one, or as `blind`, which is expected of one whose
    # label is any class alike; and skewness is corrected where that lowers t (Hall, 1992, On the
    # removal of skewness by transformation). benchmarks/false_verdicts.py shows what it takes.
    values = np.append(difference, max(float(difference.max()), blind, 0.0))
    n, mean = len(values), float(values.mean())
    n_differing = int((np.abs(difference) > ROUNDING).sum())
    if mean >= 0 or n_differing < LEAST_EXAMPLES:
        return 0.0
    sd = float(values.std(ddof=1))
    s, skewness = mean / sd, float(((values - mean) ** 3).mean()) / float(values.std()) ** 3
    hall = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n)
    return float(max(0.0, -max(s, hall) * n**0.5))


def _paired_p(difference: Array, blind: float) -> float:
    sign = 1 if difference.mean() < 0 else -1
    t = gain_t(sign * difference, sign * blind)
    return float(2 * stdtr(len(difference), -t))
