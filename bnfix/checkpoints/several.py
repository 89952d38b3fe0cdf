"""Several networks in one: the mean of checkpoints, and the statistics of several domains.

The statistics of a mean must be measured afterwards. The statistics of domains are named sets in a
file's header. The file's tensors are the stock model's, with their own statistics. A second file
could get lost, and further tensors would be keys that no stock model has. So each named set holds,
for every norm layer, all means, then all variances as base64 of little-endian float32 (or float64).
"""

from __future__ import annotations

import base64
import copy
import glob
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import (
    BUFFERS,
    STATISTICS,
    Checkpoint,
    misfits_of,
    read_checkpoint,
)
from bnfix.checkpoints.read import file_in_folder, parse_header, read_file
from bnfix.core.errors import CheckpointError, ConfigError, NumericError, file_error, plain, some
from bnfix.core.guards import Snapshot
from bnfix.core.settings import AverageRecipe, ModelRecipe
from bnfix.norm.sites import NormSite, find_norms

#: Mean and variance ``(2, C)`` of each norm layer, by domain.
Sets = dict[str, dict[str, Tensor]]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


# --- the mean of checkpoints ---


def mean_of(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] = ()
) -> dict[str, Tensor]:
    """The weighted mean of state dicts, summed in float64 and stored in the first one's types.

    A tensor's mean is over the states that have it. Integer tensors come from the first state.

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
                f"{name}: the mean of the checkpoints is not finite. Leave out the broken "
                "checkpoint.",
                name=name,
            )
    return mean


class Ingredients:
    """The checkpoints for a mean, and the current selection."""

    def __init__(
        self, model: nn.Module, first: Checkpoint, recipe: AverageRecipe, stated: ModelRecipe
    ) -> None:
        self._model, self._borrows = model, first.borrowed
        self.found = [first, *read_alike(first, recipe.files, stated)]
        self.weights = recipe.weights or (1.0,) * len(self.found)
        #: Positions of the averaged checkpoints; the order matters for integer tensors.
        self.which: tuple[int, ...] = tuple(range(len(self.found)))
        self.notes = _notes(self.found)

    @property
    def names(self) -> list[str]:
        """The file name of each, or its path if several files have the same name."""
        short = [c.path.name for c in self.found]
        return [
            name if short.count(name) == 1 else str(c.path)
            for name, c in zip(short, self.found, strict=True)
        ]

    @torch.no_grad()
    def put_(self, which: Sequence[int]) -> None:
        """Put the mean of these checkpoints into the model.

        Its running statistics are then the mean of the files' statistics, not the mean network's.
        """
        self.which, first = tuple(which), self.found[0].tensors
        mean = mean_of([self.found[i].tensors for i in which], [self.weights[i] for i in which])
        state = self._model.state_dict()
        for name, tensor in {**first, **mean}.items():
            if name in state:  # norm layers may have been swapped in the meantime
                state[name].copy_(tensor)

    def records(self) -> list[dict[str, Any]]:
        """The history's records of the averaged checkpoints."""
        return [
            {"file": c.path.name, "sha256": c.sha256, "weight": self.weights[i]}
            for i, c in ((i, self.found[i]) for i in self.which)
        ]

    def networks(self) -> dict[nn.Module, float]:
        """A network per averaged checkpoint, with its weight.

        Raises:
            CheckpointError: if a checkpoint has no statistics of its own.
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


#: Names of scores in training checkpoints: first the checkpoint's own, then the best of its run.
_HIGHER = (
    "val_acc val_acc1 val_accuracy val_top1 test_acc acc acc1 accuracy top1 prec1 metric "
    "best_acc best_acc1 best_accuracy best_top1 best_prec1 best_val_acc best_metric best_fitness"
).split()
_LOWER = "val_loss test_loss nll best_loss best_val_loss".split()


def best_of(files: Sequence[str], n: int) -> tuple[list[str], str]:
    """The n best files by a score that all of them hold, best first, and a sentence about it."""
    numbers = [_numbers(Path(file)) for file in files]
    name = next((m for m in (*_HIGHER, *_LOWER) if all(m in own for own in numbers)), None)
    if name is None:
        held = "; ".join(
            f"{Path(file).name}: {', '.join(own) or 'none'}"
            for file, own in zip(files, numbers, strict=True)
        )
        raise file_error(
            Path(files[0]),
            f"--best: the files share no score ({held}), expected one of "
            f"{', '.join((*_HIGHER, *_LOWER))}. Name the files yourself.",
        )
    sign = -1 if name in _HIGHER else 1
    order = sorted(range(len(files)), key=lambda i: sign * numbers[i][name])[:n]
    listed = some([f"{Path(files[i]).name} {numbers[i][name]:g}" for i in order])
    return [files[i] for i in order], f"the {n} best of {len(files)} files by {name}: {listed}."


def _numbers(file: Path) -> dict[str, float]:
    """The scores with known names at the top of a file, or in a bnfix file's last results."""
    file = file_in_folder(file)
    content, header, _ = read_file(file)
    if header is not None:
        history = parse_header(header, file).get("history")
        last = history[-1] if isinstance(history, list) and history else None
        content = last.get("results") if isinstance(last, dict) else None
    found = {}
    for name in (*_HIGHER, *_LOWER):
        # The file may have overwritten the dict's own methods.
        value = dict.get(content, name) if isinstance(content, dict) else None
        value = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        if isinstance(value, int | float) and math.isfinite(value):
            found[name] = float(value)
    return found


def matching(files: Sequence[str]) -> list[str]:
    """The given files, with each pattern replaced by its sorted matches."""
    found: list[str] = []
    for file in files:
        # Path.glob does not accept absolute patterns.
        matched = [file] if Path(file).exists() else sorted(glob.glob(file, recursive=True))  # noqa: PTH207
        if not matched and glob.has_magic(file):
            raise file_error(Path(file), "no file matches it. Give another pattern.")
        found += matched or [file]
    return found


def read_alike(first: Checkpoint, files: Sequence[str], model: ModelRecipe) -> list[Checkpoint]:
    """Read further checkpoints of the first one's network; report the problems of all files."""
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
        # Statistics are measured on the mean afterwards; counters have no effect.
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
            f"the settings of the norm layers come from {found[0].path.name}; not all of the "
            "files have the same settings."
        )
    names = {c.sha256: c.path.name for c in found}
    if len(names) < len(found):
        without = f"Without copies: {some(list(names.values()))}"
        notes.append(f"{len(found)} files were averaged, but some are copies. {without}.")
    return notes


# --- statistics of several domains ---


def statistics_in(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every layer's mean and variance as one set."""
    return {site.name: torch.stack(_moments(site)).detach().cpu() for site in _sites(model)}


def set_statistics_(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give every layer of a set its mean and variance."""
    for site in _sites(model):
        for kind, own, moment in zip(STATISTICS, _moments(site), found[site.name], strict=True):
            # Not in place: a model may hold the memory of its file.
            site.module._buffers[kind] = moment.to(own, copy=True)


def as_header(sets: Sets) -> dict[str, Any]:
    """The sets as JSON values."""

    def text(pair: Tensor) -> str:
        kind = "<f8" if pair.dtype == torch.float64 else "<f4"
        return base64.b64encode(pair.numpy().astype(kind).tobytes()).decode()

    return {n: {k: text(pair) for k, pair in layers.items()} for n, layers in sets.items()}


def open_domains_(
    model: nn.Module, checkpoint: Checkpoint, name: str | None
) -> tuple[Sets, list[str]]:
    """The sets in a file, and notes on them; the model gets the named one."""
    sets = read_domains(checkpoint, {s.name: _moments(s)[0].numel() for s in _sites(model)})
    if name is not None:
        set_statistics_(model, domain_of(sets, name, checkpoint.path))
    return sets, describe_domains(sets, name)


def read_domains(checkpoint: Checkpoint, sizes: Mapping[str, int]) -> Sets:
    """The checked sets in a file's header; all problems are reported at once."""
    stored: Any = (checkpoint.metadata or {}).get("domains") or {}
    problems, sets = list[str](), Sets()
    if not isinstance(stored, dict):
        stored, problems = {}, ["they are not an object"]
    for name, layers in stored.items():
        if not _NAME.fullmatch(name) or not isinstance(layers, dict):
            problems.append(f"{plain(name)}: not a domain name, or not an object")
            continue
        extra = layers.keys() - sizes.keys()
        problems += [f"{name}: {plain(layer)}: the model has no such layer" for layer in extra]
        found = {layer: _pair(layers.get(layer), n) for layer, n in sizes.items()}
        bad = [layer for layer, pair in found.items() if pair is None]
        problems += [f"{name}: {layer}: expected finite means and variances >= 0" for layer in bad]
        sets[name] = {layer: pair for layer, pair in found.items() if pair is not None}
    if problems:
        words = f"its domain statistics cannot be used: {some(problems)}. Download it again."
        raise file_error(checkpoint.path, words)
    return sets


def begin_domain_(model: nn.Module, sets: Sets, name: str) -> list[str]:
    """Start from a domain's statistics, if the file has them, before new ones are measured."""
    if not _NAME.fullmatch(name) or name == "auto":
        expected = "up to 64 letters, digits and _.-, not auto. Give another"
        raise ConfigError(f"--domain: {plain(name)!r}, expected {expected}.", name="domain")
    if name in sets:
        set_statistics_(model, sets[name])
    known = "its statistics in the file" if name in sets else "the statistics in the file's tensors"
    other = "Other statistics in it stay unchanged."
    return [f"domain {name}: starts from {known}. The output stores the result under it. {other}"]


def end_domain_(model: nn.Module, sets: Sets, name: str, tensors: Mapping[str, Tensor]) -> Sets:
    """The sets plus the model's statistics under a name; the model gets the file tensors' own."""
    own = statistics_in(model)
    for site in _sites(model):
        for kind in BUFFERS:
            now, key = site.module._buffers.get(kind), f"{site.name}.{kind}".removeprefix(".")
            if now is not None:  # an old file has no count of batches
                site.module._buffers[kind] = tensors.get(key, 0 * now).to(now, copy=True)
    return {**sets, name: own}


def describe_domains(sets: Sets, name: str | None) -> list[str]:
    """A note on the domain whose statistics are used, or on those that a file has, if any."""
    if name is not None:
        return [f"with the statistics of its domain {name}"]
    only = "(--domain); only calibrate --domain keeps them in its output"
    return [f"it also has statistics for the domains {some(sorted(sets))} {only}"] * bool(sets)


def domain_of(sets: Sets, name: str, path: Path) -> dict[str, Tensor]:
    """The set with a name; an unknown name is refused."""
    if name not in sets:
        known = f"expected one of: {some(sorted(sets))}" if sets else "and holds none at all"
        raise file_error(path, f"has no domain {plain(name)!r}, {known}. Change --domain.")
    return sets[name]


def _sites(model: nn.Module) -> list[NormSite]:
    return [site for site in find_norms(model) if site.has_statistics]


def _moments(site: NormSite) -> list[Tensor]:
    return [site.module.get_buffer(kind) for kind in STATISTICS]


def _pair(text: Any, n: int) -> Tensor | None:
    """The n finite means and n variances >= 0, or None; other text lengths are not decoded."""
    kinds = {4 * -(-size // 3): kind for kind, size in (("<f8", 16 * n), ("<f4", 8 * n))}
    if not isinstance(text, str) or len(text) not in kinds:
        return None
    kind = kinds[len(text)]
    try:  # with a byte more or less, the numbers are incomplete
        content = np.frombuffer(base64.b64decode(text, validate=True), kind)
    except ValueError:
        return None
    found = torch.from_numpy(content.astype(kind[1:])).view(2, n)
    return found if bool(found.isfinite().all() and (found[1] >= 0).all()) else None
