"""File to state dict and back: nesting, prefixes, the header's metadata, atomic writing."""

from __future__ import annotations

import hashlib
import json
import math
import os
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from bnfix.errors import CheckpointError, some
from bnfix.reading import (
    INDEX_SUFFIX,
    TEXT_LIMIT,
    plain,
    read_file,
    read_weight_map,
    require_file,
)

#: The newest header this program reads, and the one it writes.
FORMAT: Final = 1
#: Where training programs put the state dict, the trained weights before their running means.
NESTS: Final = (
    "state_dict",
    "model",
    "model_state_dict",
    "net",
    "ema",
    "state_dict_ema",
    "model_ema",
    "module",
)
#: What wrappers put before every name: DataParallel, torch.compile, Lightning and the like.
PREFIXES: Final = ("module.", "_orig_mod.", "model.")
_DEPTH: Final = 3
_HEADER_DEPTH: Final = 64
#: A tensor may repeat its storage (strides of 0), but not so much that copying it fills the memory.
_REPEATED_LIMIT: Final = 64 * 2**20


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
    """

    path: Path
    tensors: dict[str, torch.Tensor]
    metadata: dict[str, Any] | None
    key: str
    prefix: str
    sha256: str
    notes: tuple[str, ...]


def read_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    expected: Collection[str] | None = None,
) -> Checkpoint:
    """Read the state dict in a file, without running anything the file says.

    Args:
        path: ``.safetensors`` (or the ``.safetensors.index.json`` of a sharded one), or a file of
            torch.save.
        key: the dotted nesting of the state dict; None looks under the usual names.
        prefix: what to strip from the names (names without it are left out), empty for nothing;
            None strips the usual wrappers' prefixes.
        expected: the model's own names; given, the stripping that matches most of them is chosen.

    Returns:
        The tensors on the CPU, with notes on how they were found.

    Raises:
        CheckpointError: if the file is missing, damaged, hostile or newer than this program, or
            ``key`` or ``prefix`` are not in it.
    """
    path = Path(path)
    require_file(path)
    content, header, notes = read_file(path)
    metadata = None if header is None else _parse_header(header, path)
    found, key, remarks = _find_state_dict(content, key, path)
    notes += remarks
    tensors, remarks = _only_tensors(found, path)
    notes += remarks
    if prefix is not None:
        tensors, prefix, remarks = _strip_given(tensors, prefix, path)
    elif metadata is not None and expected is None:
        prefix, remarks = "", []  # a bnfix file has the model's own names, whatever they begin with
    else:
        tensors, prefix, remarks = _strip_found(tensors, expected)
    notes += remarks
    return Checkpoint(path, tensors, metadata, key, prefix, sha256_of(path), tuple(notes))


def key_problems(
    shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]
) -> list[str]:
    """List every way in which tensors do not fit a model.

    A missing ``num_batches_tracked`` is no problem: old files have none, and nothing depends on it.

    Args:
        shapes: shape of each tensor of the model, by name.
        tensors: the checkpoint's tensors, by name.

    Returns:
        One sentence a problem: missing, misshapen (in the model's order), then unexpected.
    """
    problems = []
    for name, shape in shapes.items():
        if name not in tensors:
            if name.rpartition(".")[2] != "num_batches_tracked":
                problems.append(f"{plain(name)}: missing from the file")
        elif tensors[name].shape != shape:
            found = tuple(tensors[name].shape)
            problems.append(f"{plain(name)}: {found} in the file, {tuple(shape)} in the model")
    problems += [f"{plain(name)}: not in the model" for name in tensors if name not in shapes]
    return problems


def check_output(path: str | Path, *, force: bool) -> None:
    """Check, before any work, that a checkpoint may be written.

    Args:
        path: the file to write.
        force: whether an existing file may be replaced.

    Raises:
        CheckpointError: if the file exists and ``force`` is off, if its name does not end in
            ``.safetensors``, or if its folder is missing or cannot be written to.
    """
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
    """Check that the folder of a file to write is there and open to writing.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is not.
    """
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
    """Make a folder to write into, and those above it; one that is there is left.

    Args:
        folder: the folder.

    Raises:
        CheckpointError: if it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{plain(folder)}: cannot be made ({reason}).", path=folder) from error


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    force: bool,
) -> None:
    """Write tensors and the ``bnfix`` header to one file: whole, or not at all.

    Args:
        path: the file, ending in ``.safetensors``.
        tensors: by name; those that share memory are written under each name.
        metadata: the header, with an integer ``format``; numbers that are not finite become null.
        force: whether an existing file may be replaced.

    Raises:
        CheckpointError: if the file may not be written, or something in it cannot be stored.
    """
    path = Path(path)
    shown = plain(path)
    check_output(path, force=force)
    try:
        text = json.dumps(_finite(metadata), allow_nan=False, ensure_ascii=True)
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{shown}: not written, its metadata is not JSON ({plain(error)}).", path=path
        ) from error
    _parse_header(text, path)
    bad = [
        plain(name)
        for name, tensor in tensors.items()
        # The format keeps that name for itself, but its writer does not mind.
        if name == "__metadata__" or not _storable(name, tensor)
    ]
    if bad:
        raise CheckpointError(
            f"{shown}: not written, {some(bad)} cannot be stored. Expected dense tensors by name.",
            path=path,
        )
    separate = _separate(tensors)

    def save(temporary: Path) -> None:
        # One key only: the order of several differs from run to run, and so would the bytes.
        save_file(separate, temporary, metadata={"bnfix": text})
        if not force:
            check_output(path, force=False)

    try:
        replace_whole(path, save)
    except (OSError, SafetensorError, RuntimeError, TypeError, LookupError, ValueError) as error:
        raise CheckpointError(f"{shown}: not written ({plain(error)}).", path=path) from error


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, whole or not at all; an existing file is replaced.

    Args:
        path: the file.
        text: what to write.

    Raises:
        CheckpointError: if the folder is missing or closed, or the disk is full.
    """
    path = Path(path)
    check_folder(path)
    content = text.encode("utf-8", errors="backslashreplace")
    try:
        replace_whole(path, lambda temporary: temporary.write_bytes(content))
    except OSError as error:
        raise CheckpointError(f"{plain(path)}: not written ({plain(error)}).", path=path) from error


def sha256_of(path: str | Path) -> str:
    """Compute the SHA-256 of a file (of a sharded one: of the index, then its shards by name).

    Args:
        path: the file.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    path = Path(path)
    digest = hashlib.sha256()
    parts = [path]
    try:
        if path.name.endswith(INDEX_SUFFIX):
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


# --- the header ---


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _parse_header(text: str, path: Path) -> dict[str, Any]:
    shown = plain(path)
    if len(text) > TEXT_LIMIT:
        raise CheckpointError(
            f"{shown}: its bnfix header has {len(text)} characters, more than {TEXT_LIMIT}.",
            path=path,
        )
    try:
        header = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{shown}: its bnfix header is not JSON ({plain(error)}).", path=path
        ) from error
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or type(version) is not int or version < 1:
        raise CheckpointError(
            f"{shown}: its bnfix header is not an object with an integer `format`.", path=path
        )
    if version > FORMAT:
        raise CheckpointError(
            f"{shown}: has header format {version}, this program reads up to {FORMAT}: it was "
            "written by a newer bnfix. Upgrade bnfix.",
            path=path,
        )
    if _is_deeper(header, _HEADER_DEPTH):
        raise CheckpointError(
            f"{shown}: its bnfix header is nested more than {_HEADER_DEPTH} deep.", path=path
        )
    return header


# Level by level: whoever walks a header by recursion may then do so.
def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [
            item
            for found in level
            if isinstance(found, dict | list)
            for item in (found.values() if isinstance(found, dict) else found)
        ]
    return any(isinstance(found, dict | list) for found in level)


# A copy in which numbers that JSON cannot express are null.
def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


# --- nesting ---


# Entries of a dict from a file, whose own methods the file may have overwritten.
def _items(mapping: Any) -> list[tuple[Any, Any]]:
    return list(dict.items(mapping)) if isinstance(mapping, dict) else []


def _has_tensors(value: Any) -> bool:
    return any(type(k) is str and isinstance(v, torch.Tensor) for k, v in _items(value))


# The path to a state dict under the usual names; None if there is none.
def _search(content: Any, depth: int = _DEPTH) -> list[str] | None:
    entries = dict(_items(content))
    for nest in NESTS if depth else ():
        below = _search(entries.get(nest), depth - 1)
        if below is not None:
            return [nest, *below]
    return [] if _has_tensors(content) else None


# Every dotted key under which there are tensors, for a message.
def _nests(content: Any, depth: int = _DEPTH, at: str = "") -> list[str]:
    found = []
    for name, value in _items(content):
        if type(name) is str and isinstance(value, dict):
            found += [at + name] if _has_tensors(value) else []
            found += _nests(value, depth - 1, f"{at}{name}.") if depth > 1 else []
    return found


# The value at a dotted key, where a part may have dots of its own; None if not there.
def _follow(content: Any, key: str) -> Any:
    if not key:
        return content
    for name, value in _items(content):
        if name == key:
            return value
    for name, value in _items(content):
        if type(name) is str and key.startswith(name + "."):
            below = _follow(value, key[len(name) + 1 :])
            if below is not None:
                return below
    return None


def _find_state_dict(content: Any, key: str | None, path: Path) -> tuple[Any, str, list[str]]:
    nests = [plain(name) for name in _nests(content)]
    listed = f"found under {some(nests)}" if nests else "found none"
    base = _follow(content, key or "")
    if base is None and key:
        raise CheckpointError(
            f"{plain(path)}: has no {plain(key)!r}; state dicts {listed}. Give one as --key.",
            path=path,
        )
    steps = [] if key is not None and _has_tensors(base) else _search(base)
    if steps is None:
        what = f" under {plain(key)!r}" if key else ""
        hint = " Give it as --key." if nests else " Save model.state_dict() with torch.save."
        raise CheckpointError(
            f"{plain(path)}: holds no state dict (names to tensors){what}; {listed}.{hint}",
            path=path,
        )
    found = ".".join([*([key] if key else []), *steps])
    for step in steps:
        base = dict.__getitem__(base, step)
    notes = [f"state dict found under {plain(found)!r}"] if found and key is None else []
    others = [name for name in nests if name != found and name.rpartition(".")[2] in NESTS]
    if others and key is None:
        notes.append(f"not used: {some(others)} (--key chooses)")
    return base, found, notes


def _only_tensors(found: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    ignored: list[str] = []
    bad: list[str] = []
    for name, value in _items(found):
        if type(name) is not str or not isinstance(value, torch.Tensor):
            ignored.append(plain(name))
        elif _storable(name, value) and value.device.type == "cpu":
            tensor = value.detach()
            size = tensor.numel() * tensor.element_size()
            repeats = size > max(_REPEATED_LIMIT, 16 * tensor.untyped_storage().nbytes())
            (bad.append(plain(name)) if repeats else tensors.__setitem__(name, tensor))
        else:
            bad.append(plain(name))
    if bad:
        raise CheckpointError(
            f"{plain(path)}: {some(bad)}: expected dense tensors that fill their memory, found "
            "sparse, quantized, wrapped, unallocated or endlessly repeated ones. Save plain ones.",
            path=path,
        )
    notes = [f"{len(ignored)} entries that are not tensors ignored: {some(ignored)}"]
    return tensors, notes if ignored else []


def _storable(name: object, tensor: object) -> bool:
    return (
        type(name) is str
        and isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
    )


# --- prefixes ---


def _strip_given(
    tensors: dict[str, torch.Tensor], prefix: str, path: Path
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    if prefix and not prefix.endswith("."):
        prefix += "."
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not kept:
        heads = list(dict.fromkeys(plain(name.partition(".")[0]) for name in tensors))
        raise CheckpointError(
            f"{plain(path)}: no name begins with {plain(prefix)!r}; they begin with {some(heads)}. "
            "Change --prefix, or leave it out.",
            path=path,
        )
    lost = [plain(name) for name in tensors if not name.startswith(prefix)]
    notes = [f"prefix {plain(prefix)!r} stripped"] if prefix else []
    notes += [f"{len(lost)} names without that prefix left out: {some(lost)}"] if lost else []
    return kept, prefix, notes


# Strip the wrappers' prefixes: those that all names share, or what fits ``expected`` best.
def _strip_found(
    tensors: dict[str, torch.Tensor], expected: Collection[str] | None
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    notes = []
    counter = tensors.get("n_averaged")
    if counter is not None and counter.numel() == 1 and "n_averaged" not in (expected or ()):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        notes.append("n_averaged (torch's count of averaged models) left out")
    chosen = _shared_prefix(tensors)
    if expected:
        wanted = frozenset(expected)
        candidates = [chosen, *_possible_prefixes(tensors)]
        matches = {c: sum(n.removeprefix(c) in wanted for n in tensors) for c in candidates}
        # At a tie the shared prefix, which comes first, stands.
        chosen = max(matches, key=lambda candidate: matches[candidate])
    stripped = {name.removeprefix(chosen): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):  # two names became one: rather none than one lost
        return tensors, "", notes
    if chosen:
        notes.append(f"prefix {chosen!r} stripped")
    return stripped, chosen, notes


def _shared_prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    shared = ""
    while True:
        longer = [p for p in PREFIXES if all(name.startswith(shared + p) for name in tensors)]
        if not longer or not tensors:
            return shared
        shared += longer[0]


# All runs of the usual prefixes that some name begins with, the empty one first.
def _possible_prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    found = {"": None}
    for name in tensors:
        run = ""
        while head := next((p for p in PREFIXES if name.startswith(p, len(run))), ""):
            run += head
            found[run] = None
    return list(found)


# --- writing ---


# Contiguous CPU tensors, none of which shares memory with another.
def _separate(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    ready = {
        name: tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        for name, tensor in tensors.items()
    }
    end = 0
    for name, tensor in sorted(ready.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < end:
            ready[name] = tensor.clone()
        end = max(end, start + tensor.numel() * tensor.element_size())
    return ready


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write under a temporary name beside ``path``, sync, and rename; leave nothing on failure.

    Args:
        path: what comes to be whole, or stays as it was.
        write: called with the temporary name.
    """
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
