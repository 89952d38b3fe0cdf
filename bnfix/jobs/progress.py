"""Batches whose every pass shows its progress, and the bad images that passes have met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from bnfix.core import distributed
from bnfix.core.errors import ConfigError, DataError, some
from bnfix.data.augmentation import augmented
from bnfix.data.batches import Batch, Batches
from bnfix.data.tensors import TensorItems

#: Wraps the batches of a pass, to show its progress: stage, batches, their number.
Track = Callable[[str, Iterable[Any], int], Iterable[Any]]


def silent(stage: str, batches: Iterable[Any], n: int) -> Iterable[Any]:
    """Show no progress."""
    return batches


class Tracked:
    """Batches whose every pass shows its progress; of several processes each has its share."""

    def __init__(
        self,
        batches: Batches,
        stage: str,
        track: Track,
        vary: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None,
    ) -> None:
        self.batches, self.stage, self._track, self._vary = batches, stage, track, vary

    def __iter__(self) -> Iterator[Any]:
        source = self.batches if self._vary is None else self._vary(self.batches)
        return iter(self._track(self.stage, source, len(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)

    def starting_at(self, n: int) -> Tracked:
        """The same without the first batches."""
        return Tracked(self.batches.starting_at(n), self.stage, self._track, self._vary)

    def evened(self) -> Tracked:
        """The same images without a far smaller last batch."""
        return Tracked(self.batches.evened(), self.stage, self._track, self._vary)

    def whole(self) -> Tracked:
        """All batches, on every rank."""
        return Tracked(self.batches.dealt(0, 1), self.stage, self._track, self._vary)

    def shuffled(self, seed: int, augment: str = "none") -> Callable[[int], Tracked]:
        """Pass k has seed + k and own variants of the images; each rank has a part of all."""
        if augment != "none" and isinstance(self.batches.images, TensorItems):
            raise ConfigError(
                f"--augment {augment}: {self.batches.images.spec} holds no images, and only images "
                "can be varied.",
                name="augment",
            )
        place = distributed.here()

        def of_pass(k: int) -> Tracked:
            vary = partial(augmented, kind=augment, seed=seed, epoch=k)
            batches = self.batches.with_seed(seed + k).sliced(place.rank, place.size)
            return Tracked(batches, self.stage, self._track, None if augment == "none" else vary)

        return of_pass


def describe_skipped(benches: Iterable[Tracked]) -> tuple[str, ...]:
    """Bad images that passes have met, on any rank, each once, in words."""
    found: dict[str, str] = {}
    for bench in benches:
        shares = distributed.gather(bench.batches.skipped)
        names = {skipped.name for share in shares for skipped in share}
        if distributed.here().shared and len(names) > bench.batches.max_bad:
            raise DataError(
                f"{bench.batches.images.spec}: {len(names)} bad images, "
                f"{bench.batches.max_bad:g} allowed: {some(sorted(names))}. Remove them, or allow "
                "more with --max-bad."
            )
        for s in (skipped for share in shares for skipped in share):
            found.setdefault(s.name, f"{s.name}: {s.reason.removeprefix(f'{s.name}: ')}")
    return tuple(found.values())
