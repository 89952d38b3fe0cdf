"""How often equal models are called better, by the verdict and by the gate, for every n.

Each case draws paired differences of models whose expected loss and top-1 are equal: dense, sparse,
heavy-tailed and skewed ones, and networks that differ in how sharp their logits are. Run with
``python -m benchmarks.false_verdicts [RUNS]``; prints percentages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq

from bnfix.metrics.compare import compare, judge
from bnfix.metrics.metrics import Metrics, PerExample

Array = NDArray[np.float64]
#: (runs, n) -> losses before and after, right before and after, and the mean blind losses of each.
Draw = Callable[[np.random.Generator, tuple[int, int]], tuple[Array, ...]]
SIZES = (1, 2, 3, 5, 10, 19, 20, 25, 30, 50, 100, 200, 500, 1000, 2000)


def differing(part: float, values: Callable[..., Array], flipped: float = 0.1) -> Draw:
    """Losses differ on a part of the examples; of those some turn right and as many wrong."""

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, ...]:
        differs = rng.random(shape) < part
        flips = np.where(differs & (rng.random(shape) < flipped), rng.choice([-1, 1], shape), 0)
        after = 5 + np.where(differs, values(rng, size=shape) - 0.5 * flips, 0)
        right = rng.random(shape) < 0.7
        zero = np.zeros(shape[0])
        right_before, right_after = (np.where(flips == 0, right, flips == s) for s in (-1, 1))
        return np.full(shape, 5.0), after, right_before, right_after, zero, zero

    return draw


def sharper(margin: float, sharpness: float) -> Draw:
    """Two classes; the same network twice, once too sharp and once too flat, of equal loss."""
    z = np.random.default_rng(0).normal(margin, 2, 40_000)

    def loss(by: float, z: Array = z) -> Array:
        return np.logaddexp(0, -by * z)

    best = min(np.geomspace(0.2, 5, 60), key=lambda by: float(loss(by).mean()))
    wanted = float(loss(best * sharpness).mean())
    flat = brentq(lambda by: float(loss(by).mean()) - wanted, 1e-6, best)

    def draw(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Array, ...]:
        z = rng.normal(margin, 2, shape)
        before, after = loss(flat, z), loss(best * sharpness, z)
        blind = [(loss(by, z) + by * z / 2).mean(1) for by in (flat, best * sharpness)]
        return before, after, z > 0, z > 0, *blind

    return draw


def centred(name: str, mean: float, *args: float) -> Callable[..., Array]:
    return lambda rng, size: getattr(rng, name)(*args, size=size) - mean


CASES: dict[str, Draw] = {
    "all differ, normal": differing(1.0, centred("normal", 0)),
    "5% differ, normal": differing(0.05, centred("normal", 0)),
    "5% differ and flip": differing(0.05, centred("normal", 0), flipped=1.0),
    "1% differ, t of 2": differing(0.01, centred("standard_t", 0, 2)),
    "20% differ, t of 2": differing(0.2, centred("standard_t", 0, 2)),
    "all differ, Cauchy": differing(1.0, centred("standard_cauchy", 0)),
    "all differ, exponential": differing(1.0, centred("exponential", 1)),
    "10% differ, exponential": differing(0.1, centred("exponential", 1)),
    "too sharp, 93% right": sharper(3.0, 2.0),
    "too sharp, 98% right": sharper(4.0, 2.0),
    # Beyond what any test of a mean can hold: skewness 6.
    "all differ, lognormal": differing(1.0, centred("lognormal", np.exp(0.5), 0, 1)),
}


def metrics(losses: Array, right: Array, blind: float) -> Metrics:
    """What the verdict looks at."""
    rows = PerExample(
        labels=np.zeros(len(losses), np.int64),
        losses=losses,
        scaled_losses=losses,
        scores=right.astype(bool),
        blind_loss=blind,
    )
    return Metrics(n_examples=len(losses), examples=rows)


def false_rates(draw: Draw, n: int, runs: int, seed: int = 0) -> tuple[float, float]:
    """Fractions of runs in which the verdict is better, and in which the gate admits at z = 2."""
    rng = np.random.default_rng(seed)
    better = admitted = done = 0
    while done < runs:
        size = min(runs - done, max(1, 1_000_000 // n))
        done += size
        for old, new, was, now, blind_old, blind_new in zip(*draw(rng, (size, n)), strict=True):
            d, flips = new - old, now.astype(int) - was
            # Most pairs are far from any verdict, and the bootstrap takes time.
            if n > 1 and not any(_near(x) for x in (-d, flips)):
                continue
            before, after = metrics(old, was, float(blind_old)), metrics(new, now, float(blind_new))
            better += compare(before, after).verdict == "better"
            admitted += judge("", ("new", after), ("old", before)).admitted
    return better / runs, admitted / runs


def _near(gains: Array) -> bool:
    return bool(gains.sum() > 1.7 * gains.std(ddof=1) * len(gains) ** 0.5)


def main(arguments: Sequence[str]) -> None:
    runs = int(arguments[0]) if arguments else 2000
    print(f"{'better / admitted, %':24}", *(f"{n:>9}" for n in SIZES))
    for name, draw in CASES.items():
        rates = map(partial(false_rates, draw, runs=runs), SIZES)
        print(f"{name:24}", *(f"{100 * a:4.1f}/{100 * b:4.1f}" for a, b in rates), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
