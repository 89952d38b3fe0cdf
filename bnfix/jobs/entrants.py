"""Checkpoints loaded side by side, and the passes over the data that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from bnfix.checkpoints.load import Loaded
from bnfix.core import distributed, runtime
from bnfix.core.errors import DataError, ModelError
from bnfix.core.memory import BatchSize, first_of, footprint
from bnfix.core.settings import DataRecipe, ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batches
from bnfix.data.corruptions import Corruption, every_corruption
from bnfix.data.images import Images
from bnfix.deploy.fuse import fused
from bnfix.jobs.input_check import first_batch
from bnfix.jobs.progress import Track, Tracked
from bnfix.jobs.session import (
    applied,
    evaluation_batch_size,
    load_one,
    open_checked,
    resolve_preprocessing,
)
from bnfix.metrics.evaluate import Outputs, collect
from bnfix.metrics.robustness import BatchInvariance, Shifted, batch_invariance, shifted

#: Images that batch invariance is looked for on.
N_COMPARED = 256
#: Images that a faster copy is checked on.
N_CHECKED = 8
_T = TypeVar("_T")


@dataclass(frozen=True)
class Entrant:
    """A checkpoint, loaded, and the data as it sees them.

    Args:
        name: short, and no other's.
        path: of the file.
        loaded: its model, on the device.
        preprocessing: from image to input.
        images: with labels that fit its outputs.
        input_size: numbers in one input.
        fast: what goes through the data in place of the model, if it is not the model itself.
    """

    name: str
    path: str
    loaded: Loaded
    preprocessing: Preprocessing | None
    images: Images
    input_size: int
    fast: nn.Module | None = None

    @property
    def net(self) -> nn.Module:
        """What goes through the data."""
        return self.loaded.model if self.fast is None else self.fast


def enter(
    checkpoints: Sequence[str | Path],
    data: str,
    recipe: ModelRecipe,
    source: DataRecipe,
    run: RunOptions,
    own_metrics: bool,
    notes: list[str],
) -> list[Entrant]:
    """Load every checkpoint, and open the data once, as each needs them."""
    entrants: list[Entrant] = []
    opened: dict[int, Images] = {}
    for path, name in zip(checkpoints, _names(checkpoints), strict=True):
        loaded = load_one(path, recipe, run)
        wanted, remarks = resolve_preprocessing(loaded, source)
        images, input_size = open_checked(
            data,
            loaded.model,
            source,
            wanted,
            known=opened.get(wanted.channels),
            any_task=own_metrics and runtime.has_forward(loaded.model),
        )
        opened.setdefault(wanted.channels, images)
        preprocessing, remarks = applied(images, wanted, remarks)
        notes += [f"{name}: {remark}" for remark in (*loaded.checkpoint.notes, *remarks)]
        entrants.append(
            Entrant(
                name=name,
                path=str(path),
                loaded=loaded,
                preprocessing=preprocessing,
                images=images,
                input_size=input_size,
            )
        )
    return entrants


def hasten(
    entrants: Sequence[Entrant], precision: str, seed: int, notes: list[str]
) -> list[Entrant]:
    """Let copies of the models that evaluate faster go through the data."""
    found = []
    for one in entrants:
        few = first_batch(one.images, one.preprocessing, seed)
        if few is None:
            found.append(one)
            continue
        few = first_of(few, N_CHECKED)
        try:
            # Under autocast the operators for prepacked weights would go on in float32.
            net, done = fused(one.loaded.model, few, prepack=None if precision == "fp32" else False)
        except ModelError as error:
            notes.append(f"{one.name}: evaluated as it is, for all --fast: {error}")
            found.append(one)
            continue
        notes.append(f"{one.name}: {done.text}, on {len(few.index)} images.")
        found.append(dataclasses.replace(one, fast=net))
    return found


class Arena:
    """Where entrants meet the same examples; those of one preprocessing go through together.

    Args:
        entrants: at least one.
        source: how many bad images a pass may meet.
        run: batch size, workers, precision.
        seed: of intervals, noise, and of which images are compared in other batches.
        track: how progress is shown.
        memory_bytes: what is free for forward passes; by default as the system says.
    """

    def __init__(
        self,
        entrants: Sequence[Entrant],
        source: DataRecipe,
        run: RunOptions,
        seed: int,
        track: Track,
        memory_bytes: int | None = None,
    ) -> None:
        self._entrants, self._source, self._run, self._seed = entrants, source, run, seed
        self._track = track
        self._groups: dict[Any, list[int]] = {}
        for i, one in enumerate(entrants):
            labels = one.images.labels
            alike = one.preprocessing, None if labels is None else labels.tobytes()
            self._groups.setdefault(alike, []).append(i)
        self._good = np.arange(len(entrants[0].images))
        self.passes: list[Tracked] = []
        #: Batch sizes that had to be made smaller, one sentence each.
        self.notes: list[str] = []
        self._sizes = [
            self._fitting([entrants[i] for i in group], memory_bytes)
            for group in self._groups.values()
        ]

    def _fitting(self, members: list[Entrant], memory_bytes: int | None) -> BatchSize:
        """The batch size of a group's passes, as far as the memory allows."""
        run, first = self._run, members[0]
        size = evaluation_batch_size(run, first.loaded.model, first.input_size)
        what = "--batch-size" if len(self._groups) == 1 else f"{first.name}: --batch-size"
        found = BatchSize(size, what, self.notes, gives_way=run.batch_size is None)
        if run.batch_size is None:
            few = first_batch(first.images, first.preprocessing, self._seed)
            for one in members:
                held = None
                if few is not None:
                    held = footprint(one.net, few, run.precision, memory_bytes)
                found.foresee(held)
        return found

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self._entrants]

    def outputs(
        self, stage: str, corruption: Corruption | None = None, any_task: bool = False
    ) -> list[Outputs]:
        """What every entrant gives for all examples."""

        def run(members: list[Entrant], size: int) -> list[Outputs]:
            what = members[0].name if len(members) == 1 else f"{len(members)} models"
            batches = self._batches(members[0], self._good, size, f"{stage} {what}", corruption)
            self.passes.append(batches)
            models = [one.net for one in members]
            loose = any_task and all(runtime.has_forward(model) for model in models)
            return collect(models, batches, precision=self._run.precision, any_task=loose)

        found = self._by_group(run)
        seen = [one.positions for one in found if one.positions is not None]
        if any(not np.array_equal(positions, seen[0]) for positions in seen):
            raise DataError(
                f"{self._entrants[0].images.spec}: some images are unreadable for one model and "
                "not for another. Remove them, or give all models one --resize and --crop."
            )
        if seen:
            self._good = np.sort(seen[0])
        return found

    def shifted(self) -> Iterator[Shifted]:
        """Measure every entrant under every corruption."""
        for corruption in every_corruption(self._seed):
            found = self.outputs(f"under {corruption.text},", corruption)
            yield from shifted(self._names, found, corruption, seed=self._seed)

    def invariance(self) -> list[BatchInvariance]:
        """Look at some examples in several batches."""
        rng = np.random.default_rng(self._seed)
        index = rng.permutation(self._good)[:N_COMPARED]

        def run(members: list[Entrant], size: int) -> list[BatchInvariance]:
            def batches_of(positions: np.ndarray, size: int) -> Tracked:
                return self._batches(members[0], positions, size, f"batches of {size}", None)

            return batch_invariance(
                [one.name for one in members],
                [one.net for one in members],
                batches_of,
                index,
                min(size, max(1, len(index) // 2)),
                precision=self._run.precision,
                seed=self._seed,
            )

        return self._by_group(run)

    def _by_group(self, run: Callable[[list[Entrant], int], list[_T]]) -> list[_T]:
        """What each entrant gets, in the order in which they were given."""
        found: dict[int, _T] = {}
        for group, size in zip(self._groups.values(), self._sizes, strict=True):
            members = [self._entrants[i] for i in group]
            found.update(zip(group, size.run(partial(run, members)), strict=True))
        return [found[i] for i in range(len(self._entrants))]

    def _batches(
        self,
        one: Entrant,
        index: np.ndarray,
        size: int,
        stage: str,
        corruption: Corruption | None,
    ) -> Tracked:
        batches = Batches(
            one.images,
            index,
            one.preprocessing,
            batch_size=size,
            workers=self._run.workers,
            max_bad=self._source.max_bad,
            corruption=corruption,
        )
        place = distributed.here()
        return Tracked(batches.dealt(place.rank, place.size), stage, self._track)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Short names, made unique by as much of the path as it takes."""
    names = [Path(path).name for path in paths]
    return [
        name if names.count(name) == 1 else f"{Path(path).parent.name}/{name} ({i + 1})"
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
