"""The mean of the weights of several checkpoints; its statistics have to be measured afterwards."""

from __future__ import annotations

import copy
import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import (
    BUFFERS,
    STATISTICS,
    Checkpoint,
    misfits_of,
    read_checkpoint,
)
from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import file_in_folder, parse_header, read_file, require_file
from bnfix.core.errors import CheckpointError, NumericError, file_error, some
from bnfix.core.guards import Snapshot
from bnfix.core.settings import AverageRecipe, ModelRecipe


def mean_of(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] = ()
) -> dict[str, Tensor]:
    """The weighted mean of state dicts, summed in float64 and stored in the first's types.

    A tensor's mean is over the states that have it; one that is not floating is the first's.

    Example:
        >>> mean_of([{"w": torch.zeros(1)}, {"w": torch.ones(1)}], (1, 3))["w"].item()
        0.75
    """
    parts = list(weights) or [1.0] * len(states)
    mean = {name: tensor for state in reversed(states) for name, tensor in state.items()}
    for name, first in mean.items():
        if not first.is_floating_point():
            continue
        having = [(w, s[name]) for w, s in zip(parts, states, strict=True) if name in s]
        whole = sum(weight for weight, _ in having)
        total = torch.zeros_like(first, dtype=torch.float64)
        for weight, tensor in having:
            total += weight / whole * tensor.double()
        mean[name] = total.to(first.dtype)
        # Statistics are measured on the mean afterwards, so broken ones do no harm here.
        if not name.endswith(STATISTICS) and not bool(mean[name].isfinite().all()):
            raise NumericError(
                f"{name}: the mean of the checkpoints is not finite. Leave out the one that is "
                "broken.",
                name=name,
            )
    return mean


class Ingredients:
    """The checkpoints of a mean, and those of them that are in it now."""

    def __init__(self, loaded: Loaded, recipe: AverageRecipe, model: ModelRecipe) -> None:
        self._model = loaded.model
        self._borrows = loaded.checkpoint.borrowed
        self.found = [loaded.checkpoint, *read_alike(loaded.checkpoint, recipe.files, model)]
        self.weights = recipe.weights or (1.0,) * len(self.found)
        #: Positions of those that the mean is of; the order counts for what is not averaged.
        self.which: tuple[int, ...] = tuple(range(len(self.found)))
        self.notes = _notes(self.found)

    @property
    def names(self) -> list[str]:
        """A name of each: the file's, with its folder where others have the same."""
        short = [c.path.name for c in self.found]
        return [
            name if short.count(name) == 1 else str(c.path)
            for name, c in zip(short, self.found, strict=True)
        ]

    @torch.no_grad()
    def put_(self, which: Sequence[int]) -> None:
        """Put the mean of these into the model.

        Its population moments are then the mean of the files' moments, not those of the mean.
        """
        self.which, first = tuple(which), self.found[0].tensors
        mean = mean_of([self.found[i].tensors for i in which], [self.weights[i] for i in which])
        state = self._model.state_dict()
        for name, tensor in {**first, **mean}.items():
            if name in state:  # the norm layers may have been swapped since
                state[name].copy_(tensor)

    def records(self) -> list[dict[str, Any]]:
        """What the history holds of those in the mean."""
        return [
            {"file": c.path.name, "sha256": c.sha256, "weight": self.weights[i]}
            for i, c in ((i, self.found[i]) for i in self.which)
        ]

    def networks(self) -> dict[nn.Module, float]:
        """A network of each that is in the mean, with its weight.

        Raises:
            CheckpointError: if one has no statistics of its own.
        """
        names = [name for name in self.found[0].tensors if name.endswith(STATISTICS)]
        for i in self.which:
            if (i == 0 and self._borrows) or not self.found[i].tensors.keys() >= set(names):
                raise file_error(
                    self.found[i].path,
                    "has no statistics of its own to interpolate. Give --statistics population.",
                )
        which, found = self.which, {}
        now = Snapshot(self._model)
        try:
            for i in which:
                self.put_([i])
                found[copy.deepcopy(self._model)] = self.weights[i]
        finally:
            self.which = which
            now.restore_()
        return found


#: Numbers by which programs say how good a checkpoint is: its own first, then the best of its run.
_HIGHER = (
    "val_acc val_acc1 val_accuracy val_top1 test_acc acc acc1 accuracy top1 prec1 metric "
    "best_acc best_acc1 best_accuracy best_top1 best_prec1 best_val_acc best_metric best_fitness"
).split()
_LOWER = "val_loss test_loss nll best_loss best_val_loss".split()


def best_of(files: Sequence[str], n: int) -> tuple[list[str], str]:
    """The n best files by a number that all of them hold, the best one first; and which it was."""
    numbers = [_numbers(Path(file)) for file in files]
    name = next((m for m in (*_HIGHER, *_LOWER) if all(m in own for own in numbers)), None)
    if name is None:
        held = "; ".join(
            f"{Path(file).name}: {', '.join(own) or 'none'}"
            for file, own in zip(files, numbers, strict=True)
        )
        raise file_error(
            Path(files[0]),
            f"--best: no number that all the files hold says how good they are ({held}); known "
            f"are {', '.join((*_HIGHER, *_LOWER))}. Name the files yourself.",
        )
    sign = -1 if name in _HIGHER else 1
    order = sorted(range(len(files)), key=lambda i: sign * numbers[i][name])[:n]
    listed = some([f"{Path(files[i]).name} {numbers[i][name]:g}" for i in order])
    return [files[i] for i in order], f"the {n} best of {len(files)} files by {name}: {listed}."


def _numbers(file: Path) -> dict[str, float]:
    """Numbers of known names at the top of a file, or in the last results of a bnfix file."""
    file = file_in_folder(file)
    require_file(file)
    content, header, _ = read_file(file)
    if header is not None:
        history = parse_header(header, file).get("history")
        last = history[-1] if isinstance(history, list) and history else None
        content = last.get("results") if isinstance(last, dict) else None
    found = {}
    for name in (*_HIGHER, *_LOWER):
        # A dict from a file may have overwritten its own methods.
        value = dict.get(content, name) if isinstance(content, dict) else None
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def matching(files: Sequence[str]) -> list[str]:
    """Files as given, and those that match a pattern, sorted, in its place."""
    found: list[str] = []
    for file in files:
        # Path.glob takes no absolute pattern.
        matched = [file] if Path(file).exists() else sorted(glob.glob(file, recursive=True))  # noqa: PTH207
        if not matched and glob.has_magic(file):
            raise file_error(Path(file), "no file matches it. Give another pattern.")
        found += matched or [file]
    return found


def read_alike(first: Checkpoint, files: Sequence[str], model: ModelRecipe) -> list[Checkpoint]:
    """Read further checkpoints of a first one's network; all problems of all files at once."""
    shapes = {name: tensor.shape for name, tensor in first.tensors.items()}
    found, problems = [], []
    for file in files:
        try:
            other = read_checkpoint(
                file,
                key=model.key,
                prefix=model.prefix,
                expected=frozenset(shapes),
                prefer_ema=model.prefer_ema,
            )
        except CheckpointError as error:
            problems.append(str(error).rstrip("."))
            continue
        found.append(other)
        # Statistics are measured on the mean afterwards; counters are of no effect.
        theirs = other.tensors
        present = {n: s for n, s in shapes.items() if n in theirs or not n.endswith(BUFFERS)}
        known = {n: t for n, t in theirs.items() if n in shapes or not n.endswith(BUFFERS[-1])}
        misfits = misfits_of(present, known)
        if misfits:
            problems.append(f"{other.path.name}: {len(misfits)} misfits ({misfits})")
    if problems:
        raise file_error(
            first.path,
            f"{len(problems)} of the other files cannot be averaged with it: "
            f"{'; '.join(problems)}. Give checkpoints of one network.",
        )
    return found


def _notes(found: Sequence[Checkpoint]) -> list[str]:
    notes = []
    settings = [(c.metadata or {}).get("norms") for c in found]
    if any(other != settings[0] for other in settings):
        notes.append(
            f"the settings of the norm layers are those of {found[0].path.name}; not all of the "
            "files have the same."
        )
    names = {c.sha256: c.path.name for c in found}
    if len(names) < len(found):
        notes.append(
            f"{len(found)} files were averaged, but only {len(names)} of them differ: "
            f"{some(list(names.values()))}."
        )
    return notes
