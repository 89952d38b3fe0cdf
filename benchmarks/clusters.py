"""Groups of dependent examples: how often intervals hold the truth, and equal models differ.

Losses and hits of an example are that of its group and its own, by the intra-group correlation.
Run with ``python -m benchmarks.clusters [RUNS]``; prints percentages.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from bnfix.metrics.compare import compare, gain_t, judge
from bnfix.metrics.metrics import Metrics, PerExample, middle, n_counted, numbered, resampled_means

Array = NDArray[np.float64]
N_GROUPS = (10, 15, 20, 30, 60)
#: Values of mean 0.
LAWS: dict[str, Callable[[np.random.Generator, int], Array]] = {
    "normal": lambda rng, n: rng.normal(size=n),
    "exponential": lambda rng, n: rng.exponential(size=n) - 1,
    "lognormal": lambda rng, n: rng.lognormal(size=n) - np.exp(0.5),
}
SIZES: dict[str, Callable[[np.random.Generator, int], NDArray[np.int64]]] = {
    "of 5": lambda rng, n: np.full(n, 5),
    "of 1 to 30": lambda rng, n: rng.integers(1, 31, n),
    "one with a quarter": lambda rng, n: np.where(np.arange(n), 3, n),
}
CORRELATIONS = (0.1, 0.5, 1.0)


def drawn(
    rng: np.random.Generator, law: str, sizes: NDArray[np.int64], correlation: float
) -> tuple[Array, NDArray[np.int64]]:
    """Values of mean 0 and variance of the law, and the groups of the examples."""
    groups = np.repeat(np.arange(len(sizes)), sizes)
    shared, own = LAWS[law](rng, len(sizes))[groups], LAWS[law](rng, len(groups))
    return np.sqrt(correlation) * shared + np.sqrt(1 - correlation) * own, groups


def coverage(law: str, size: str, n_groups: int, correlation: float, runs: int) -> float:
    """How many of the 95% intervals hold the mean 0."""
    rng, held = np.random.default_rng(0), 0
    for seed in range(runs):
        values, groups = drawn(rng, law, SIZES[size](rng, n_groups), correlation)
        means = resampled_means(values[:, None], seed, groups)[:, 0]
        low, high = middle(means, float(values.mean()), groups)
        held += low <= 0 <= high
    return held / runs


def metrics(losses: Array, right: Array, groups: NDArray[np.int64]) -> Metrics:
    """What the verdict looks at."""
    rows = PerExample(
        labels=np.zeros(len(losses), np.int64),
        losses=losses,
        scaled_losses=losses,
        scores=right,
        blind_loss=0.0,
        groups=numbered(groups, len(losses)),
    )
    return Metrics(n_examples=len(losses), examples=rows)


def false_rates(
    law: str, size: str, n_groups: int, correlation: float, runs: int
) -> tuple[float, float]:
    """Fractions of runs in which equal models are called better, and in which the gate admits."""
    rng, better, admitted = np.random.default_rng(1), 0, 0
    for seed in range(runs):
        d, groups = drawn(rng, law, SIZES[size](rng, n_groups), correlation)
        flips = rng.choice([-1, 0, 0, 0, 0, 0, 0, 0, 0, 1], len(d))
        before = metrics(np.full(len(d), 5.0), flips < 0, groups)
        after = metrics(5 + d, flips > 0, groups)
        admitted += judge("", ("new", after), ("old", before)).admitted
        # Most pairs are far from any verdict, and the bootstrap takes time.
        t = [gain_t(x, 0.0, groups) for x in (d, -flips.astype(float))]
        better += max(t) > 1.5 and compare(before, after, seed=seed).verdict == "better"
    return better / runs, admitted / runs


def main(arguments: Sequence[str]) -> None:
    runs = int(arguments[0]) if arguments else 1000
    rng = np.random.default_rng(0)
    for size, draw in SIZES.items():
        counts = []
        for n in N_GROUPS:
            groups = np.repeat(np.arange(n), draw(rng, n))
            counts.append(f"{n} ({n_counted(len(groups), groups)})")
        print(f"\ngroups {size:40}", *(f"{count:>9}" for count in counts))
        for law in LAWS:
            for r in CORRELATIONS:
                held = [100 * coverage(law, size, n, r, runs) for n in N_GROUPS]
                print(f"{f'{law}, {r}: intervals that hold':47}", *(f"{x:9.1f}" for x in held))
                rates = [false_rates(law, size, n, r, runs) for n in N_GROUPS]
                cells = (f"{100 * a:4.1f}/{100 * b:4.1f}" for a, b in rates)
                print(f"{f'{law}, {r}: better / admitted':47}", *cells, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
