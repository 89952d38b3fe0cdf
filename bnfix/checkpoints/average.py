"""The mean of the weights of several checkpoints; its statistics have to be measured afterwards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bnfix.checkpoints.checkpoint import (
    BUFFERS,
    STATISTICS,
    Checkpoint,
    misfits_of,
    read_checkpoint,
)
from bnfix.checkpoints.load import Loaded
from bnfix.core.errors import CheckpointError, NumericError, file_error, some
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


@torch.no_grad()
def average_into_(
    loaded: Loaded, recipe: AverageRecipe, model: ModelRecipe
) -> tuple[list[dict[str, Any]], list[str]]:
    """Put the mean of a loaded checkpoint and others into its model; a record of each, and notes.

    Its population moments are then the mean of the files' moments, not those of the mean.
    """
    found = [loaded.checkpoint, *read_alike(loaded.checkpoint, recipe.files, model)]
    state = loaded.model.state_dict()
    for name, tensor in mean_of([c.tensors for c in found], recipe.weights).items():
        if name in state:  # the norm layers may have been swapped since
            state[name].copy_(tensor)
    weights = recipe.weights or (1.0,) * len(found)
    records = [
        {"file": c.path.name, "sha256": c.sha256, "weight": w}
        for c, w in zip(found, weights, strict=True)
    ]
    return records, _notes(found)


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
        present = {n: s for n, s in shapes.items() if n in other.tensors or _last(n) not in BUFFERS}
        known = {n: t for n, t in other.tensors.items() if n in shapes or _last(n) != BUFFERS[-1]}
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


def _last(name: str) -> str:
    return name.rpartition(".")[2]


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
