"""Ways of doing the same, timed in alternation: what one took by what another took, in each round.

A figure is the median over rounds of the ratio to a base in the same round, and in brackets the
quartiles of those ratios, since on a shared machine all ways of a round meet the same neighbours.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]
Ways = dict[str, Callable[[], object]]

#: What measures seconds: on the wall, or of this process alone.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(
    ways: Ways, rounds: int, *, warm: bool = False, clock: str = "wall"
) -> dict[str, list[float]]:
    """Seconds of each way in each round; one round goes first, uncounted.

    Each round begins with another way, since one finds the caches as the one before left them.
    """
    now = CLOCKS[clock]
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    turns = list(ways.items())
    for turn in range(rounds + 1):
        turns = turns[1:] + turns[:1]
        for name, way in turns:
            if warm:
                way()  # so that each finds the caches as it leaves them, not as its neighbour did
            start = now()
            way()
            if turn:
                seconds[name].append(now() - start)
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, Row]:
    """Median milliseconds, and ratios to a base."""
    found = {}
    for name, took in seconds.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(took, seconds[base], strict=True))
        found[name] = {
            "ms": 1e3 * statistics.median(took),
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[-1 - len(ratios) // 4],
        }
    return found


def line(row: Row, base: str) -> str:
    """A row in words."""
    parts = [f"{row['name']:34s} {row.get('layout', ''):13s}"]
    for name, took in row["ways"].items():
        if name == base:
            parts.append(f"{name} {took['ms']:.3g} ms")
        else:
            parts.append(f"{name} {took['ratio']:.2f} [{took['low']:.2f}, {took['high']:.2f}]")
    return "  ".join(parts)
