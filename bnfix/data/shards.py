"""Tar shards (WebDataset's layout): images and their labels beside each other, ``key.jpg key.cls``.

A shard is walked once, for where each image begins; images are then read from there in any order.
Nothing is unpacked to disk and no member's name is used as a path: names only group the members.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from bnfix.core.errors import DataError, plain, some
from bnfix.data.images import MAX_IMAGE_BYTES, SUFFIXES, EncodedImages, open_regular

MAX_SHARDS: Final = 100_000
_MAX_MEMBERS: Final = 20_000_000
_MAX_LABEL_BYTES: Final = 1_000_000
_RANGE: Final = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_IMAGE_KINDS: Final = {suffix.removeprefix(".") for suffix in SUFFIXES}
#: Where to look for a label in a sample's JSON, the first that is there.
_JSON_KEYS: Final = ("label", "cls", "class", "class_id", "target", "class_name")
_TAR_ERRORS: Final = (
    tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip


def expand_braces(spec: str) -> list[str]:
    """Expand ranges in a name: ``shard-{000..123}.tar`` names 124 files."""
    parts = _RANGE.split(spec)
    choices: list[Sequence[str]] = [[parts[0]]]
    for first, last, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        n = prod(map(len, choices)) * max(0, int(last) - int(first) + 1)
        if not 0 < n <= MAX_SHARDS:
            raise DataError(f"{{{first}..{last}}} makes {n:,} files, expected 1 to {MAX_SHARDS:,}.")
        numbers = range(int(first), int(last) + 1)
        choices.append([f"{k:0{len(first)}d}{text}" for k in numbers])
    return ["".join(chosen) for chosen in product(*choices)]


class ShardImages(EncodedImages):
    """Images in tar shards, by shard, offset and size."""

    kind = "tar shards"
    _hash_threads = 16

    def __init__(self, paths: Sequence[Path], places: np.ndarray, names: list[str], channels: int):
        super().__init__(str(paths[0]), channels)
        self._paths, self._names = list(paths), names
        self._places = places  # (n, 3) int64: shard, offset, size

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        """Its shard and member."""
        return f"{self._path(i).name}/{self._names[i]}"

    def _path(self, i: int) -> Path:
        return self._paths[int(self._places[i, 0])]

    def _stream(self, i: int) -> io.BytesIO:
        _, offset, size = (int(n) for n in self._places[i])
        if size > MAX_IMAGE_BYTES:
            raise OSError(f"more than {MAX_IMAGE_BYTES >> 20} MiB")
        with open_regular(self._path(i)) as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


@dataclass(slots=True)
class _Sample:
    """The members of one key, in one shard."""

    shard: int
    name: str
    offset: int = 0
    size: int = -1  # no image so far
    label: str | None = None


@dataclass
class _Seen:
    """What a walk over the shards has met besides samples."""

    passed: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, kind: str, name: str) -> None:
        self.passed.setdefault(kind, []).append(name)


def open_shards(
    paths: Sequence[Path], wanted: bool, channels: int
) -> tuple[ShardImages, list[Any]]:
    """Index tar shards; a label is a number or a name in ``key.cls`` or ``key.json``."""
    seen = _Seen()
    found = [sample for k in range(len(paths)) for sample in _samples(k, paths[k], wanted, seen)]
    samples = [sample for sample in found if sample.size >= 0]
    if len(samples) < len(found):
        seen.passed["keys without an image"] = [one.name for one in found if one.size < 0]
    if not samples:
        raise DataError(
            f"no images; looked for members named {', '.join(sorted(_IMAGE_KINDS))} "
            f"after their key, in {len(paths)} shards."
        )
    places = np.asarray([(one.shard, one.offset, one.size) for one in samples], dtype=np.int64)
    images = ShardImages(paths, places, [one.name for one in samples], channels)
    images.notes += seen.notes
    images.notes += [f"{len(v)} {kind} passed over: {some(v)}" for kind, v in seen.passed.items()]
    labels = [one.label for one in samples]
    whole = all(label is None or _WHOLE.fullmatch(label) for label in labels)
    return images, [int(label) if whole and label else label for label in labels]


def _samples(k: int, path: Path, wanted: bool, seen: _Seen) -> Iterator[_Sample]:
    """Samples of one shard, in order: neighbours of one key."""
    current: _Sample | None = None
    key = None
    # A handle of its own: labels are read between two steps of the walk.
    with open_regular(path) as file:
        for member in _members(path, seen):
            name = " ".join(member.name.split())[:200]
            folder = PurePosixPath(member.name)
            if folder.is_absolute() or ".." in folder.parts or not member.name.isprintable():
                seen.add("members with paths that lead out", name)
                continue
            stem, _, kind = folder.name.partition(".")
            if folder.name.startswith("."):
                continue
            if current is None or key != (folder.parent, stem):
                if current is not None:
                    yield current
                key, current = (folder.parent, stem), _Sample(k, str(folder.with_name(stem)))
            if kind.lower() in _IMAGE_KINDS:
                if current.size >= 0:
                    seen.add("second images of a key", name)
                else:
                    current.name = name
                    current.offset, current.size = member.offset_data, member.size
            elif wanted and kind.lower() in ("cls", "json"):
                label = _label(path, file, member, kind.lower())
                current.label = label if current.label is None else current.label
    if current is not None:
        yield current


def _members(path: Path, seen: _Seen) -> Iterator[tarfile.TarInfo]:
    """Ordinary files one after another, each wholly inside the shard and behind the one before."""
    size, last, n = path.stat().st_size, -1, 0
    try:
        with open_regular(path) as file:
            if file.read(2) == b"\x1f\x8b":
                raise DataError(
                    f"{path}: compressed, so its images cannot be read in any order. "
                    "Uncompress it (gunzip)."
                )
            file.seek(0)
            archive = tarfile.open(fileobj=file, mode="r:", errorlevel=2)
            while (member := archive.next()) is not None:
                n += 1
                # Or every header would stay in memory.
                archive.members.clear()  # type: ignore[attr-defined]
                end = member.offset_data + max(0, member.size)
                if member.size < 0 or member.offset <= last or end > size or n > _MAX_MEMBERS:
                    raise tarfile.ReadError(f"member {n} does not lie inside the file")
                last = member.offset
                if member.isreg() and not member.issparse():
                    yield member
                elif not member.isdir():
                    name = " ".join(member.name.split())[:200]
                    seen.add("members that are links or no ordinary files", name)
            if not _has_end(file, archive.offset, size):
                seen.notes.append(f"{path.name} ends without an end mark: it may have been cut")
    except _TAR_ERRORS as error:
        reason = plain(str(error)) or type(error).__name__
        raise DataError(f"{path}: not a whole tar archive ({reason}). Fetch it again.") from error


def _has_end(file: io.BufferedReader, offset: int, size: int) -> bool:
    """Whether blocks of zeros end the archive; other bytes there are a member that was cut."""
    file.seek(min(offset, size))
    rest = file.read(512)
    if rest.strip(b"\0"):
        raise tarfile.ReadError("it ends in the middle of a member")
    return bool(rest)


def _label(path: Path, file: io.BufferedReader, member: tarfile.TarInfo, kind: str) -> str | None:
    place = f"{path}/{member.name[:200]}"
    if member.size > _MAX_LABEL_BYTES:
        raise DataError(f"{place}: {member.size:,} bytes for a label.")
    file.seek(member.offset_data)
    try:
        text = file.read(member.size).decode("utf-8").strip()
        value: Any = json.loads(text) if kind == "json" else text
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: cannot be read ({str(error)[:200]}).") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)[:1000]
