"""File to state dict and back: how it was found, what fits, atomic writing."""

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

from bnfix.checkpoints.header import finite, parse_header
from bnfix.checkpoints.nesting import (
    find_state_dict,
    is_average,
    only_tensors,
    split_averages,
    storable,
    strip_found,
    strip_given,
    versions_in,
)
from bnfix.checkpoints.packing import write_tensors
from bnfix.checkpoints.reading import (
    file_in_folder,
    is_index,
    read_file,
    read_weight_map,
    require_file,
)
from bnfix.errors import CheckpointError, Note, plain, some


@dataclass(frozen=True)
class Checkpoint:
    """A state dict as found in a file, and how it was found.

    Attributes:
        path: the file.
        tensors: CPU tensors by name, prefixes stripped.
        metadata: the parsed ``bnfix`` header of a bnfix file, else None.
        key: the nesting followed, for example ``state_dict``; empty at top level.
        prefix: the prefix stripped, for example ``module.``; empty for none.
        sha256: of the file's bytes (of a sharded file: of the index and then its shards by name).
        notes: what was found and done, in words, for the report.
        versions: of modules' state by dotted name, where the file states them.
        others: nestings of other sets in the file that have all of its parameters.
        borrowed: whether its statistics come from another set, as its own has none.
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] | None
    key: str
    prefix: str
    sha256: str
    notes: tuple[str, ...]
    versions: dict[str, int] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    borrowed: bool = False


def read_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    expected: Collection[str] | None = None,
    prefer_ema: bool = False,
) -> Checkpoint:
    """Read the state dict in a file, without running anything the file says.

    Tensors of ``.safetensors`` and of torch's archives are mapped, not read: they take memory as
    they are used.
    """
    path = file_in_folder(Path(path))
    require_file(path)
    content, header, notes = read_file(path)
    metadata = None if header is None else parse_header(header, path)
    found, key, others, remarks = find_state_dict(content, key, path, prefer_ema=prefer_ema)
    notes += remarks
    tensors, remarks = only_tensors(found, path)
    notes += remarks
    averaged = is_average(key)
    if prefix is not None:
        tensors, prefix, remarks = strip_given(tensors, prefix, path)
    elif metadata is not None and expected is None:
        prefix, remarks = "", []  # a bnfix file has the model's own names, whatever they begin with
    else:
        tensors, parted, remarks = split_averages(tensors, expected, prefer_ema=prefer_ema)
        averaged, notes = averaged or parted, notes + remarks
        tensors, prefix, remarks = strip_found(tensors, expected)
    if prefer_ema and not averaged:
        raise CheckpointError(
            f"{plain(path)}: --prefer-ema: no running mean of the weights was found in it, neither "
            "under a usual name nor as a part of the model. Leave the option out, or give --key.",
            path=path,
        )
    versions = {
        f"{name}.".removeprefix(prefix).rstrip("."): version
        for name, version in versions_in(found).items()
    }
    notes += remarks
    digest = sha256_of(path)
    return Checkpoint(
        path=path,
        tensors=tensors,
        metadata=metadata,
        key=key,
        prefix=prefix,
        sha256=digest,
        notes=tuple(notes),
        versions=versions,
        others=tuple(others),
    )


def key_problems(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]
) -> list[Note]:
    """List every way in which tensors do not fit a model.

    A missing ``num_batches_tracked`` is no problem: old files have none, and nothing depends on it.
    """
    problems = []
    for name, shape in shapes.items():
        if name not in tensors:
            if name.rpartition(".")[2] != "num_batches_tracked":
                problems.append(Note(f"{plain(name)}: missing from the file", "missing"))
        elif tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            both = f"{found} in the file, {tuple(shape)} in the model"
            problems.append(Note(f"{plain(name)}: {both}", "shape"))
    others = [name for name in tensors if name not in shapes]
    return [*problems, *(Note(f"{plain(name)}: not in the model", "unexpected") for name in others)]


def check_output(path: str | Path, *, force: bool) -> None:
    """Check, before any work, that a checkpoint may be written."""
    path = Path(path)
    shown = plain(path)
    if path.suffix != ".safetensors":
        better = plain(path.with_suffix(".safetensors").name) if path.name else "out.safetensors"
        raise CheckpointError(
            f"{shown}: expected a name that ends in .safetensors, the one kind that is written. "
            f"Use {better}.",
            path=path,
        )
    check_folder(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{shown}: is a folder, expected a file to write.", path=path)
        # A link that leads nowhere does not "exist", but would be replaced all the same.
        if not force and (path.exists() or path.is_symlink()):
            raise CheckpointError(
                f"{shown}: already exists. Give another name, or --force to replace it.", path=path
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown}: cannot be written ({plain(error)}).", path=path) from error


def check_folder(path: Path) -> None:
    """Check that the folder of a file to write is there and open to writing."""
    folder = path.parent
    shown = plain(path)
    try:
        if not folder.exists():
            raise CheckpointError(
                f"{shown}: its folder {plain(folder)} does not exist. Create it first.", path=path
            )
        if not folder.is_dir():
            raise CheckpointError(f"{shown}: {plain(folder)} is not a folder.", path=path)
        # The superuser passes os.access everywhere; a folder closed to all is still meant closed.
        if folder.stat().st_mode & 0o222 == 0 or not os.access(folder, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"{shown}: its folder {plain(folder)} is read-only. Choose another.", path=path
            )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown}: cannot be written ({plain(error)}).", path=path) from error


def make_folder(folder: Path) -> None:
    """Make a folder to write into, and those above it; one that is there is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(
            f"{plain(folder)}: cannot be made ({reason}).", path=folder
        ) from error


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    """Write tensors and the ``bnfix`` header to one file: whole, or not at all."""
    path = Path(path)
    shown = plain(path)
    check_output(path, force=force)
    try:
        text = json.dumps(finite(metadata), allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{shown}: not written, its metadata is not JSON ({plain(error)}).", path=path
        ) from error
    parse_header(text, path)
    bad = [
        plain(name)
        for name, tensor in tensors.items()
        # The format keeps that name for itself, but its writer does not mind.
        if name == "__metadata__" or not storable(name, tensor)
    ]
    if bad:
        raise CheckpointError(
            f"{shown}: not written, {some(bad)} cannot be stored. Expected dense tensors by name.",
            path=path,
        )
    ready = {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def save(temporary: Path) -> None:
        # One key only: the order of several differs from run to run, and so would the bytes.
        write_tensors(temporary, ready, {"bnfix": text})
        if not force:
            check_output(path, force=False)

    try:
        replace_whole(path, save)
    except (OSError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{shown}: not written ({plain(error)}).", path=path) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; an existing file is replaced."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file's content, whole or not at all; an existing file is replaced."""
    path = Path(path)
    check_folder(path)
    try:
        replace_whole(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise CheckpointError(f"{plain(path)}: not written ({plain(error)}).", path=path) from error


def sha256_of(path: str | Path) -> str:
    """Compute the SHA-256 of a file (of a sharded one: of the index, then its shards by name)."""
    path = Path(path)
    digest = hashlib.sha256()
    parts = [path]
    try:
        if is_index(path):
            parts += [path.parent / shard for shard in sorted(set(read_weight_map(path).values()))]
        for part in parts:
            with part.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    except OSError as error:
        raise CheckpointError(
            f"{plain(path)}: cannot be read ({plain(error)}).", path=path
        ) from error
    return digest.hexdigest()


# --- writing ---


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
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
