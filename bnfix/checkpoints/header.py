"""The text that a file of ours carries in its metadata."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from bnfix.checkpoints.reading import TEXT_LIMIT
from bnfix.errors import CheckpointError, plain

#: The newest header this program reads, and the one it writes.
FORMAT: Final = 1
_HEADER_DEPTH: Final = 64
#: Characters that one more entry of the history and the settings of the layers may take.
_ROOM: Final = 8 * 2**20


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """Parse the text under ``bnfix`` in a file's metadata."""
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


def check_room(header: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse, before any work, a file whose history leaves no room for one more entry."""
    history = (header or {}).get("history")
    length = len(json.dumps(history)) if history else 0
    if length > TEXT_LIMIT - _ROOM:
        raise CheckpointError(
            f"{plain(path)}: its history has {length:,} characters, expected at most "
            f"{TEXT_LIMIT - _ROOM:,} so that one more entry has room. Write its tensors alone "
            "(safetensors.torch.load_file and save_file), and give --model.",
            path=path,
        )


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


def finite(value: Any) -> Any:
    """Copy JSON values with numbers that JSON cannot express as null."""
    if isinstance(value, Mapping):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
