"""A file's history: the commands as they were typed, and what each of them did."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.errors import plain


@dataclass(frozen=True)
class Entry:
    """One entry of a history: its command (``None`` where it holds none), options and results."""

    command: str | None
    options: tuple[str, ...]
    did: str


def read_history(history: Sequence[Any]) -> list[Entry]:
    """Read a header's history; it comes from a file, so nothing in it is trusted."""
    return [_entry(found) for found in history if isinstance(found, dict)]


def _entry(found: Mapping[str, Any]) -> Entry:
    command = _quoted(found.get("command_line"))
    if command is not None:
        return Entry(command, (), _did(found))
    # Files of earlier versions, and those written from Python, hold the options alone.
    source, options = found.get("input"), found.get("options")
    file = source.get("file") if isinstance(source, dict) else None
    lines = [f"{plain(found.get('command') or '?')} {plain(file or '')}".rstrip()]
    for name, values in (options if isinstance(options, dict) else {}).items():
        given = values
        if isinstance(values, dict):
            given = {k: v for k, v in values.items() if v not in (None, False, [], "")}
        if given:
            lines.append(f"{plain(name)}: {json.dumps(given, ensure_ascii=False)}")
    return Entry(None, tuple(lines), _did(found))


def _quoted(typed: Any) -> str | None:
    """A stored command, quoted again: whatever a file says, it is one call of bnfix to copy."""
    try:
        words = shlex.split(typed) if isinstance(typed, str) else []
    except ValueError:
        return None
    return shlex.join(words) if words[:1] == ["bnfix"] else None


def _did(entry: Mapping[str, Any]) -> str:
    """Say in words what an entry's results hold."""
    results: Any = entry.get("results")
    results = results if isinstance(results, dict) else {}
    said = []
    if isinstance(results.get("output"), str):
        said.append(f"output: {plain(results['output'])}")
    if type(results.get("n_layers")) is int:
        said.append(f"{results['n_layers']} layers swapped")
    for name, words in (
        ("difference", "largest output difference {:.2g}"),
        ("top1", "top-1 {:.4f} on its test split"),
        ("nll", "NLL {:.4f}"),
    ):
        if type(results.get(name)) is float:
            said.append(words.format(results[name]))
    data: Any = entry.get("data")
    if isinstance(data, dict) and type(data.get("n_examples")) is int:
        said.append(f"{data['n_examples']} examples")
    return ", ".join(said) or "nothing is stated"
