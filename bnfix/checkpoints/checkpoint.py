"""File to state dict and back: nesting and prefixes found, misfits named, atomic writing."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from bnfix.checkpoints.read import (
    file_in_folder,
    finite,
    is_index,
    parse_header,
    read_file,
    read_weight_map,
    require_file,
)
from bnfix.checkpoints.state_dict import (
    find_state_dict,
    is_average,
    only_tensors,
    split_averages,
    storable,
    strip_found,
    strip_given,
    versions_in,
)
from bnfix.checkpoints.writer import write_tensors
from bnfix.core.errors import file_error, file_errors, plain, some


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as found in a file, and how it was found."""

    path: Path
    tensors: dict[str, torch.Tensor]  # on the CPU, prefixes stripped
    metadata: dict[str, Any] | None  # the parsed header of a file that bnfix wrote
    key: str  # the nesting followed, for example "state_dict"; empty at top level
    prefix: str  # stripped, for example "module."; empty for none
    sha256: str  # of the bytes; of a sharded file: of the index, then its shards by name
    notes: tuple[str, ...]  # in words, for the report
    versions: dict[str, int] = field(default_factory=dict)  # of modules' state, where stated
    others: tuple[str, ...] = ()  # nestings of other sets that have all of its parameters
    borrowed: bool = False  # its statistics are those of another set, as its own has none


def read_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    expected: Collection[str] | None = None,
    prefer_ema: bool = False,
) -> Checkpoint:
    """Read the state dict in a file, without running anything the file says.

    Tensors are mapped, not read: they take memory as they are used. ``expected`` are the model's
    own names; given, the prefix that matches most of them is stripped.
    """
    path = file_in_folder(Path(path))
    require_file(path)
    content, header, notes = read_file(path)
    metadata = None if header is None else parse_header(header, path)
    found, key, others = find_state_dict(content, key, path, notes, prefer_ema=prefer_ema)
    tensors = only_tensors(found, path, notes)
    averaged = is_average(key)
    if prefix is not None:
        tensors, prefix = strip_given(tensors, prefix, path, notes)
    elif metadata is not None and expected is None:
        prefix = ""  # a bnfix file has the model's own names, whatever they begin with
    else:
        tensors, parted = split_averages(tensors, expected, notes, prefer_ema=prefer_ema)
        averaged = averaged or parted
        tensors, prefix = strip_found(tensors, expected, notes)
    if prefer_ema and not averaged:
        raise file_error(
            path,
            "--prefer-ema: no running mean of the weights was found in it, neither under a usual "
            "name nor as a part of the model. Leave the option out, or give --key.",
        )
    versions = {
        f"{name}.".removeprefix(prefix).rstrip("."): version
        for name, version in versions_in(found).items()
    }
    return Checkpoint(
        path=path,
        tensors=tensors,
        metadata=metadata,
        key=key,
        prefix=prefix,
        sha256=sha256_of(path),
        notes=tuple(notes),
        versions=versions,
        others=tuple(others),
    )


@dataclass(frozen=True)
class Misfits:
    """Tensors that do not fit a model; false where there are none."""

    missing: list[str]  # names of the model that the file lacks
    misshapen: list[str]  # a text each
    unexpected: list[str]  # names in the file that the model lacks

    def __len__(self) -> int:
        return len(self.missing) + len(self.misshapen) + len(self.unexpected)

    def __str__(self) -> str:
        kinds = (
            [f"{plain(name)}: missing from the file" for name in self.missing],
            self.misshapen,
            [f"{plain(name)}: not in the model" for name in self.unexpected],
        )
        # Some of every kind: many of one must not hide another.
        return "; ".join(some(kind, 8) for kind in kinds if kind)


def misfits_of(shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> Misfits:
    """Every way in which a file's tensors do not fit a model's shapes."""
    # A missing num_batches_tracked is none: old files have none, and nothing depends on it.
    missing = [n for n in shapes if n not in tensors and not n.endswith("num_batches_tracked")]
    misshapen = [
        f"{plain(name)}: {tuple(tensors[name].shape)} in the file, {tuple(shape)} in the model"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return Misfits(missing, misshapen, [name for name in tensors if name not in shapes])


def check_output(path: str | Path, *, force: bool) -> None:
    """Refuse, before any work, a path where no checkpoint may be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        better = plain(path.with_suffix(".safetensors").name) if path.name else "out.safetensors"
        raise file_error(
            path,
            "expected a name that ends in .safetensors, the one kind that is written. "
            f"Use {better}.",
        )
    check_folder(path)
    with file_errors(path, "cannot be written"):
        if path.is_dir():
            raise file_error(path, "is a folder, expected a file to write.")
        # A link that leads nowhere does not "exist", but would be replaced all the same.
        if not force and (path.exists() or path.is_symlink()):
            raise file_error(path, "already exists. Give another name, or --force to replace it.")


def check_folder(path: Path) -> None:
    """Refuse a file to write whose folder is missing or closed to writing."""
    folder = path.parent
    with file_errors(path, "cannot be written"):
        if not folder.exists():
            raise file_error(path, f"its folder {plain(folder)} does not exist. Create it first.")
        if not folder.is_dir():
            raise file_error(path, f"{plain(folder)} is not a folder.")
        # The superuser passes os.access everywhere; a folder closed to all is still meant closed.
        if folder.stat().st_mode & 0o222 == 0 or not os.access(folder, os.W_OK | os.X_OK):
            raise file_error(path, f"its folder {plain(folder)} is read-only. Choose another.")


def make_folder(folder: Path) -> None:
    """Make a folder to write into, and those above it; one that is there is left."""
    with file_errors(folder, "cannot be made"):
        folder.mkdir(parents=True, exist_ok=True)


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    """Write tensors and the ``bnfix`` header to one file: whole, or not at all."""
    path = Path(path)
    check_output(path, force=force)
    wrong = (TypeError, ValueError, RecursionError)
    with file_errors(path, "not written, its metadata is not JSON", kinds=wrong):
        text = json.dumps(finite(metadata))
    parse_header(text, path)
    # The format keeps the name __metadata__ for itself, but its writer does not mind.
    bad = [plain(n) for n, t in tensors.items() if n == "__metadata__" or not storable(n, t)]
    if bad:
        raise file_error(
            path, f"not written, {some(bad)} cannot be stored. Expected dense tensors by name."
        )
    ready = {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        # One key only: the order of several differs from run to run, and so would the bytes.
        write_tensors(temporary, ready, {"bnfix": text})
        if not force:  # another program may have written it meanwhile
            check_output(path, force=False)

    with file_errors(path, "not written", kinds=(OSError, RuntimeError, TypeError, ValueError)):
        replace_whole(path, save)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; an existing file is replaced."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file's content, whole or not at all; an existing file is replaced."""
    path = Path(path)
    check_folder(path)
    with file_errors(path, "not written"):
        replace_whole(path, lambda temporary: temporary.write_bytes(content))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file (of a sharded one: of the index, then its shards by name)."""
    digest = hashlib.sha256()
    with file_errors(path, "cannot be read"):
        shards = sorted(set(read_weight_map(path).values())) if is_index(path) else []
        for part in (path, *(path.parent / shard for shard in shards)):
            with part.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name beside ``path``, sync, and rename; leave nothing on failure."""
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # Some writers make a private file of their own; others are to read it as the umask says.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # else a power cut may forget the new name


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
