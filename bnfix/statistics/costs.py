"""What a calibration spends its time on."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True)
class Cost:
    """Seconds of one process, summed over passes; what is left to the whole is none of these.

    By the host's clock, which nothing is made to wait for: on CUDA the device works on meanwhile,
    and its time is counted where the host waits for it, mostly under ``forward``.

    Args:
        data: waiting for batches: reading, decoding, scaling.
        forward: the network, its layers normalizing included.
        statistics: measuring what the norm layers meet, and adding it up.
    """

    data: float = 0.0
    forward: float = 0.0
    statistics: float = 0.0


class Clock:
    """Adds up where the time of a calibration goes; reads a clock and does nothing else."""

    def __init__(self) -> None:
        self.data = self.forward = self.statistics = 0.0

    def cost(self) -> Cost:
        """What it has come to."""
        return Cost(self.data, self.forward, self.statistics)

    def reading(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Go through batches, and count the time that each is waited for."""
        started = time.perf_counter()
        iterator = iter(batches)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.data += time.perf_counter() - started
            yield batch
            del batch  # not held while the next one is read
            started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside as forward passes, less the statistics measured meanwhile."""
        started, before = time.perf_counter(), self.statistics
        try:
            yield
        finally:
            self.forward += time.perf_counter() - started - (self.statistics - before)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what is done inside as statistics."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.statistics += time.perf_counter() - started
