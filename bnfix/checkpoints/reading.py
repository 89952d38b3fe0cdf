"""Bytes on disk to plain objects, with nothing executed because a file says so."""

from __future__ import annotations

import json
import tarfile
import warnings
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from bnfix.checkpoints.pickles import READ_ERRORS, read_legacy, read_zip
from bnfix.errors import CheckpointError, plain, some

TORCH_SUFFIXES: Final = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
INDEX_SUFFIX: Final = ".index.json"
#: What a folder calls its checkpoint, the safer form first.
_USUAL_NAMES: Final = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
#: Longest text (header or index) that is parsed as JSON.
TEXT_LIMIT: Final = 64 * 2**20

_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICKLE_MAGIC: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def is_index(path: Path) -> bool:
    """Say whether a file lists the shards of a checkpoint."""
    return path.name.endswith(INDEX_SUFFIX)


def file_in_folder(path: Path) -> Path:
    """Find the checkpoint in a folder that has one under a usual name."""
    try:
        found = [path / name for name in _USUAL_NAMES if (path / name).is_file()]
    except (OSError, ValueError):  # a name that no file can have: said where it is opened
        found = []
    return found[0] if found else path


def require_file(path: Path) -> None:
    """Check that a path is an ordinary file with something in it."""
    shown = plain(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{shown}: is a folder, expected a checkpoint file.", path=path)
        if not path.exists():
            raise CheckpointError(f"{shown}: no such file.", path=path)
        if not path.is_file():
            raise CheckpointError(f"{shown}: is not an ordinary file.", path=path)
        if path.stat().st_size == 0:
            raise CheckpointError(f"{shown}: is empty (0 bytes), expected a checkpoint.", path=path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown}: cannot be opened ({plain(error)}).", path=path) from error


def read_file(path: Path) -> tuple[Any, str | None, list[str]]:
    """Read a file by its suffix, or by its first bytes where the suffix says nothing."""
    shown = plain(path)
    try:
        if is_index(path):
            return _read_index(path)
        kind = _kind_of(path)
        if kind == "safetensors" or path.suffix == ".safetensors":
            tensors, header = _read_safetensors(path)
            return tensors, header, []
        with warnings.catch_warnings():
            # A damaged pickle's odd escapes are the file's business, not this program's.
            warnings.simplefilter("ignore")
            if kind in ("zip", "pickle"):
                read = read_zip if kind == "zip" else read_legacy
                return read(path), None, []
        if path.suffix == ".tar" and tarfile.is_tarfile(path):
            raise CheckpointError(
                f"{shown}: is a real tar archive, which the restricted loader cannot read. "
                "Unpack it, or load it with the program that wrote it and save its state_dict.",
                path=path,
            )
    except READ_ERRORS as error:
        reason = plain(error) or type(error).__name__
        raise CheckpointError(
            f"{shown}: cannot be read, it is damaged or not a checkpoint ({reason}). "
            "Fetch it again or save it anew.",
            path=path,
        ) from error
    expected = "torch" if path.suffix in TORCH_SUFFIXES else "torch or safetensors"
    raise CheckpointError(
        f"{shown}: is not a {expected} file by its first bytes. "
        f"Give .safetensors or one of {', '.join(TORCH_SUFFIXES)} written by torch.save.",
        path=path,
    )


def _kind_of(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_ZIP_MAGIC):
        return "zip"
    if start.startswith(_PICKLE_MAGIC):
        return "pickle"
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    return ""


# --- safetensors ---


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = (file.metadata() or {}).get("bnfix")
    return tensors, header


# Read all shards that an index names, from its own folder only.
def _read_index(path: Path) -> tuple[dict[str, torch.Tensor], None, list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    places = read_weight_map(path)
    shards = sorted(set(places.values()))
    for shard in shards:
        if not (path.parent / shard).exists():
            raise CheckpointError(
                f"{plain(path)}: its shard {plain(shard)}: no such file. Fetch all shards again.",
                path=path,
            )
        require_file(path.parent / shard)
        found, _, _ = read_file(path.parent / shard)
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{plain(path)}: its shard {plain(shard)} holds no state dict.", path=path
            )
        tensors |= {name: tensor for name, tensor in dict.items(found) if places.get(name) == shard}
    lacking = [plain(name) for name in places if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"{plain(path)}: its shards lack {some(lacking)}. Fetch all shards again.", path=path
        )
    return tensors, None, [f"{len(shards)} shards"]


def read_weight_map(path: Path) -> dict[str, str]:
    """Read which tensor is in which shard."""
    shown = plain(path)
    if path.stat().st_size > TEXT_LIMIT:
        raise CheckpointError(
            f"{shown}: is larger than {TEXT_LIMIT} bytes, no index is.", path=path
        )
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        ok = all(isinstance(shard, str) for shard in places.values())
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown}: is not an index ({plain(error)}).", path=path) from error
    if not ok or not places:
        raise CheckpointError(
            f"{shown}: is not an index, its weight_map names no files.", path=path
        )
    kinds = (".safetensors",) if ".safetensors" in path.name else (".safetensors", ".bin")
    foreign = [s for s in places.values() if Path(s).name != s or not s.endswith(kinds)]
    if foreign:
        raise CheckpointError(
            f"{shown}: names {plain(foreign[0])!r}, expected a {' or '.join(kinds)} file beside "
            "the index.",
            path=path,
        )
    return dict(places)
