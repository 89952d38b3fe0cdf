"""Bytes on disk to plain objects, with nothing executed because a file says so."""

from __future__ import annotations

import json
import tarfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from bnfix.checkpoints.torch_files import read_legacy, read_zip
from bnfix.core.errors import CheckpointError, file_error, file_errors, plain, some

TORCH_SUFFIXES: Final = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
#: Usual names of the checkpoint in a folder, the safer form first.
_USUAL_NAMES: Final = tuple(
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
#: Longest text (header or index) that is parsed as JSON.
TEXT_LIMIT: Final = 64 * 2**20
#: The newest header this program reads, and the one it writes.
FORMAT: Final = 1
_HEADER_DEPTH: Final = 64
#: Characters that one more entry of the history and the settings of the layers may take.
_ROOM: Final = 8 * 2**20

_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICKLE_MAGIC: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))


def is_index(path: Path) -> bool:
    """Whether a file lists the shards of a checkpoint, by its name."""
    return path.name.endswith(".index.json")


def file_in_folder(path: Path) -> Path:
    """The checkpoint in a folder under a usual name; any other path as it is."""
    try:
        return next((path / name for name in _USUAL_NAMES if (path / name).is_file()), path)
    except (OSError, ValueError):  # a name that no file can have: the error comes at opening
        return path


def require_file(path: Path) -> None:
    """Refuse a path that is not an ordinary file with something in it."""
    with file_errors(path, "cannot be opened"):
        if path.is_dir():
            raise file_error(path, "is a folder, expected a checkpoint file.")
        if not path.exists():
            raise file_error(path, "no such file.")
        if not path.is_file():
            raise file_error(path, "is not an ordinary file.")
        if path.stat().st_size == 0:
            raise file_error(path, "is empty (0 bytes), expected a checkpoint.")


def read_file(path: Path) -> tuple[Any, str | None, list[str]]:
    """A file's content, the text of its ``bnfix`` header if it has one, and notes."""
    try:
        if is_index(path):
            return _read_index(path)
        kind = _kind_of(path)
        if kind == "safetensors" or path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return tensors, (file.metadata() or {}).get("bnfix"), []
        if kind:
            # Odd escapes in a pickle and torch's remarks on typed storages tell a user nothing.
            with warnings.catch_warnings(action="ignore"):
                return (read_zip if kind == "zip" else read_legacy)(path), None, []
        if path.suffix == ".tar" and tarfile.is_tarfile(path):
            raise file_error(
                path,
                "is a real tar archive, which the restricted loader cannot read. "
                "Unpack it, or load it with the program that wrote it and save its state_dict.",
            )
    except CheckpointError:
        raise
    except Exception as error:  # a damaged or hostile file makes readers raise almost anything
        reason = plain(error) or type(error).__name__
        raise file_error(
            path,
            f"cannot be read, it is damaged or not a checkpoint ({reason}). "
            "Fetch it again or save it again.",
        ) from error
    expected = "torch" if path.suffix in TORCH_SUFFIXES else "torch or safetensors"
    raise file_error(
        path,
        f"is not a {expected} file by its first bytes. "
        f"Give .safetensors or one of {', '.join(TORCH_SUFFIXES)} written by torch.save.",
    )


# By the first bytes, since suffixes are given freely; empty if unknown.
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


# --- shards ---


def _read_index(path: Path) -> tuple[dict[str, torch.Tensor], None, list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    places = read_weight_map(path)
    shards = sorted(set(places.values()))
    for shard in shards:
        where = f"its shard {plain(shard)}"
        if not (path.parent / shard).exists():
            raise file_error(path, f"{where}: no such file. Fetch all shards again.")
        require_file(path.parent / shard)
        found = read_file(path.parent / shard)[0]
        if not isinstance(found, dict):
            raise file_error(path, f"{where} holds no state dict.")
        tensors |= {name: tensor for name, tensor in dict.items(found) if places.get(name) == shard}
    lacking = [plain(name) for name in places if name not in tensors]
    if lacking:
        raise file_error(path, f"its shards lack {some(lacking)}. Fetch all shards again.")
    return tensors, None, [f"{len(shards)} shards"]


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor; every shard lies beside the index."""
    if path.stat().st_size > TEXT_LIMIT:
        raise file_error(path, f"is larger than {TEXT_LIMIT} bytes, no index is.")
    with file_errors(path, "is not an index", kinds=(Exception,)):
        places = json.loads(path.read_bytes())["weight_map"]
        ok = all(isinstance(shard, str) for shard in places.values())
    if not ok or not places:
        raise file_error(path, "is not an index, its weight_map names no files.")
    kinds = (".safetensors",) if ".safetensors" in path.name else (".safetensors", ".bin")
    # Names with a folder in them could read any file of the machine.
    foreign = [s for s in places.values() if Path(s).name != s or not s.endswith(kinds)]
    if foreign:
        raise file_error(
            path,
            f"names {plain(foreign[0])!r}, expected a {' or '.join(kinds)} file beside the index.",
        )
    return dict(places)


# --- the header: the text under `bnfix` in the metadata ---


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a header's text, of a format that this program knows."""
    if len(text) > TEXT_LIMIT:
        raise file_error(
            path, f"its bnfix header has {len(text)} characters, more than {TEXT_LIMIT}."
        )
    with file_errors(path, "its bnfix header is not JSON", kinds=(ValueError, RecursionError)):
        header = json.loads(text, parse_constant=_no_constant)
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or type(version) is not int or version < 1:
        raise file_error(path, "its bnfix header is not an object with an integer `format`.")
    if version > FORMAT:
        raise file_error(
            path,
            f"has header format {version}, this program reads up to {FORMAT}: it was written by a "
            "newer bnfix. Upgrade bnfix.",
        )
    level: list[Any] = [header]
    for _ in range(_HEADER_DEPTH):  # level by level: whatever walks it later may then recurse
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    if level:
        raise file_error(path, f"its bnfix header is nested more than {_HEADER_DEPTH} deep.")
    return header


def check_room(header: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse, before any work, a file whose history leaves no room for one more entry."""
    length = len(json.dumps((header or {}).get("history")))
    if length > TEXT_LIMIT - _ROOM:
        raise file_error(
            path,
            f"its history has {length:,} characters, expected at most {TEXT_LIMIT - _ROOM:,} so "
            "that one more entry has room. Write its tensors alone (safetensors.torch.load_file "
            "and save_file), and give --model.",
        )


def finite(value: Any) -> Any:
    """Plain JSON values, with null for the numbers that JSON cannot express."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
