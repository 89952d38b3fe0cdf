"""How sure a classifier may be: sets of classes, and accuracy estimated without labels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from bnfix.core.errors import DataError
from bnfix.metrics.metrics import (
    N_RESAMPLES,
    Interval,
    chunks,
    inverse_temperature,
    log_softmax,
    losses_of,
    resample,
)
from bnfix.metrics.task import Array

#: Of the estimate's interval.
ESTIMATE_LEVEL = 0.9


@dataclass(frozen=True)
class Estimate:
    """Accuracy on examples without labels, estimated by labelled examples of another kind."""

    top1: float
    interval: Interval  # 90%, of the sampling of both kinds of examples alone
    threshold: float  # of the negative entropy of a prediction
    labelled_top1: float
    n_labelled: int
    n_examples: int
    truth: float | None = None  # where there are labels after all


@dataclass(frozen=True)
class Uncertain:
    """What is known of a model beside its metrics."""

    sets: Sets | None = None
    estimate: Estimate | None = None


@dataclass(frozen=True)
class Sets:
    """Sets of classes that hold the right one: threshold from one half, the rest from the other."""

    wanted: float
    probability: float  # of the least class that a set has; 0: sets have all classes
    n_threshold: int
    n_examples: int
    coverage: float  # part of the examples whose set has their label
    interval: Interval  # 95%, Clopper and Pearson's
    size: float  # mean number of classes in a set
    empty: float  # part of the sets that are empty


def conformal_sets(logits: Array, labels: Array, wanted: float, seed: int) -> Sets:
    """Split conformal prediction with the score 1 - p of the label (LAC, Sadinle et al., 2019).

    Of n scores on a seeded half the threshold is the ceil((n + 1) wanted)-th smallest; a set has
    all classes of no larger score. Of examples drawn alike, a set holds the label with a
    probability of at least ``wanted``.
    """
    if len(logits) < 2:
        raise DataError(f"--coverage: {len(logits)} example, expected at least 2.")
    order = np.random.default_rng(seed).permutation(len(logits))
    first, second = np.split(order, [len(order) // 2])
    # By the logarithm, which orders alike and is precise where p is near 0.
    scores = losses_of(logits[first], labels[first])
    place = math.ceil((len(first) + 1) * wanted)
    limit = math.inf if place > len(first) else float(np.sort(scores)[place - 1])
    held, size = np.empty(len(second), bool), np.empty(len(second), int)
    for part in chunks(logits[second]):
        # A threshold is one of the scores themselves: equal ones are in, also after rounding.
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


def exact_interval(k: int, n: int, level: float = 0.95) -> Interval:
    """Clopper and Pearson's interval of a fraction of which k of n were seen."""
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(k, n - k + 1, tail)) if k else 0.0
    return low, float(betaincinv(k + 1, n - k, 1 - tail)) if k < n else 1.0


def estimate_accuracy(labelled: tuple[Array, Array], logits: Array, seed: int) -> Estimate:
    """Average thresholded confidence (Garg et al., 2022) by negative entropy, sum of p log p.

    p is at the temperature of the labelled examples. The threshold leaves as many of them below it
    as the model gets wrong; the estimate is the part of the new examples that reach it. It assumes
    that surer means right as often on both kinds; the interval, from resamples of both, knows
    nothing of that.
    """
    z, y = labelled
    b = inverse_temperature(z, y)
    # In order, since then a threshold and a part are found by counting.
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
        estimated(resample(rng, len(old), None), resample(rng, len(new), None))[0]
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
    )


def _sureness(logits: Array, b: float) -> Array:
    """Negative entropy of each prediction at the temperature 1/b."""
    found = np.empty(len(logits))
    for part in chunks(logits):
        log_p = log_softmax(logits[part], b)
        found[part] = (np.exp(log_p) * log_p).sum(1)
    return found
