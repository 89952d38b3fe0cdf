"""What a long calibration has measured so far, in a folder, one file a rank, to go on from."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bnfix import processes
from bnfix.checkpoints.resuming import StateFolder
from bnfix.statistics.collecting import Collector

#: Seconds to the first writing; then twice as many to each next one, up to the most.
_SOON, _MOST = 1.0, 30.0


class Kept:
    """The passes of one calibration, and the sums of the one under way.

    Passes come in the same order in every run, so that their number tells them apart.

    Args:
        folder: made when something is first written.
        identity: tells this calibration, of this model on these data, from every other.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        place = processes.here()
        name = f"calibration-{identity[:12]}-{place.rank}of{place.size}.pt"
        self._folder, self._wait = StateFolder(folder, identity, name), _SOON
        self._finished: list[Mapping[str, Any]] = []
        self._partial: Mapping[str, Any] | None = None
        self._pass = -1
        self._written = time.monotonic()
        #: Examples of this rank that were not run again.
        self.n_resumed = 0
        found = self._folder.read()
        if found is not None:
            try:
                self._finished, self._partial = list(found["finished"]), found["partial"]
            except (KeyError, TypeError) as error:
                raise self._folder.damaged(error) from error

    def finished(self, collector: Collector) -> tuple[int, int] | None:
        """Begin a pass; where any rank has finished it before, take over its result."""
        self._pass += 1
        mine = self._finished[self._pass] if self._pass < len(self._finished) else None
        known = next((found for found in processes.gather(mine) if found is not None), None)
        if known is None:
            return None
        if mine is None:
            self._finished.append(known)
        self._take_over(collector, known)
        collector.n_own = int(known["n_own"])
        self.n_resumed += int(known["n_examples"])
        return int(known["n_examples"]), int(known["n_batches"])

    def resume_(self, collector: Collector) -> tuple[int, int, int]:
        """Take over what the pass that was just begun has come to before."""
        partial, self._partial = self._partial, None
        if partial is None or partial.get("pass") != self._pass:
            return 0, 0, 0
        self._take_over(collector, partial)
        self.n_resumed += int(partial["n_examples"])
        return int(partial["n_examples"]), int(partial["n_batches"]), int(partial["n_gone"])

    def after_batch(
        self, collector: Collector, n_examples: int, n_batches: int, n_gone: int
    ) -> None:
        """Write, if the last time was long ago."""
        if time.monotonic() - self._written < self._wait:
            return
        self._wait = min(_MOST, 2 * self._wait)
        self._write({
            "pass": self._pass, "n_examples": n_examples, "n_batches": n_batches,
            "n_gone": n_gone, "collector": collector.state(),
        })  # fmt: skip

    def finish(self, collector: Collector, n_examples: int, n_batches: int) -> None:
        """Write what a whole pass has measured."""
        self._finished.append(
            {
                "n_examples": n_examples,
                "n_batches": n_batches,
                "n_own": collector.n_own,
                "collector": collector.state(),
            }
        )
        self._write(None)

    def _write(self, partial: Mapping[str, Any] | None) -> None:
        self._folder.write({"finished": self._finished, "partial": partial})
        self._written = time.monotonic()

    def _take_over(self, collector: Collector, found: Mapping[str, Any]) -> None:
        try:
            collector.set_states_([found["collector"]])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise self._folder.damaged(error) from error
