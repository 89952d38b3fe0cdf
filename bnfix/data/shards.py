"""Tar shards (WebDataset's layout): images and their labels beside each other, ``key.jpg key.cls``.

A shard is walked once, for where each image begins; images are then read from there in any order.
Nothing is unpacked to disk and no member's name is ever used as a path: names only tell which
members belong together, and what is no ordinary file with an ordinary name is passed over.
"""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from bnfix.data.images import MAX_IMAGE_BYTES, SUFFIXES, EncodedImages, open_regular
from bnfix.errors import DataError, some

MAX_SHARDS: Final = 100_000
_MAX_MEMBERS: Final = 20_000_000
_MAX_LABEL_BYTES: Final = 1_000_000
_RANGE: Final = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_IMAGE_KINDS: Final = {suffix.removeprefix(".") for suffix in SUFFIXES}
#: Where a label stands in a sample's JSON, the first that is there.
_JSON_KEYS: Final = ("label", "cls", "class", "class_id", "target", "class_name")
_TAR_ERRORS: Final = (
    tarfile.TarError, EOFError, OSError, ValueError, OverflowError, RecursionError, MemoryError,
)  # fmt: skip


def expand_braces(spec: str) -> list[str]:
    """Expand ranges in a name: ``shard-{000..123}.tar`` stands for 124 files."""
    parts = _RANGE.split(spec)
    ranges = []
    n = 1
    for first, last in zip(parts[1::3], parts[2::3], strict=True):
        n *= max(0, int(last) - int(first) + 1)
        if not 0 < n <= MAX_SHARDS:
            raise DataError(
                f"DATA {spec}: {{{first}..{last}}} makes {n:,} files, expected 1 to {MAX_SHARDS:,}."
            )
        ranges.append([f"{k:0{len(first)}d}" for k in range(int(first), int(last) + 1)])
    texts = parts[::3]
    return [
        texts[0] + "".join(number + text for number, text in zip(chosen, texts[1:], strict=True))
        for chosen in product(*ranges)
    ]


class ShardImages(EncodedImages):
    """Images in tar shards, by shard, offset and size."""

    kind = "tar shards"
    _hash_threads = 16

    def __init__(self, paths: Sequence[Path], places: np.ndarray, names: list[str], channels: int):
        super().__init__(str(paths[0]), channels)
        self._paths = list(paths)
        self._places = places  # (n, 3) int64: shard, offset, size
        self._names = names

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


@dataclass
class _Sample:
    """The members of one key."""

    name: str
    offset: int = 0
    size: int = -1
    label: str | None = None


@dataclass
class _Seen:
    """What a walk over the shards has met besides samples."""

    passed: dict[str, list[str]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def add(self, what: str, name: str) -> None:
        self.passed.setdefault(what, []).append(name)


def open_shards(
    paths: Sequence[Path], wanted: bool, channels: int, where: str
) -> tuple[ShardImages, list[str] | np.ndarray | None]:
    """Index tar shards.

    A label is a number or a name in ``key.cls``, or stands in ``key.json``.
    """
    seen = _Seen()
    rows: list[tuple[int, int, int]] = []
    names: list[str] = []
    labels: list[str | None] = []
    for k, path in enumerate(paths):
        for sample in _samples(path, wanted, seen, where):
            if sample.size < 0:
                seen.add("keys without an image", sample.name)
                continue
            rows.append((k, sample.offset, sample.size))
            names.append(sample.name)
            labels.append(sample.label)
    if not rows:
        raise DataError(
            f"{where}: no images; looked for members named {', '.join(sorted(_IMAGE_KINDS))} "
            f"after their key, in {len(paths)} shards.",
            path=paths[0],
        )
    images = ShardImages(paths, np.asarray(rows, dtype=np.int64), names, channels)
    images.notes += seen.notes
    images.notes += [f"{len(v)} {what} passed over: {some(v)}" for what, v in seen.passed.items()]
    held = [label for label in labels if label is not None]
    if not wanted or not held:
        return images, None
    bare = [images.name(i) for i, label in enumerate(labels) if label is None]
    if bare:
        raise DataError(
            f"{where}: {len(bare)} of {len(labels)} images have no label ({some(bare)}), expected "
            f"key.cls, or key.json with one of {', '.join(_JSON_KEYS)}. Add them, or give "
            "--labels none.",
            path=paths[0],
        )
    if all(_WHOLE.fullmatch(label) for label in held):
        return images, np.asarray([int(label) for label in held], dtype=np.int64)
    return images, held


# Samples of one shard, in order; members of a key stand beside each other.
def _samples(path: Path, wanted: bool, seen: _Seen, where: str) -> Iterator[_Sample]:
    current: _Sample | None = None
    key = None
    with open_regular(path) as file:
        for member in _members(path, file, seen, where):
            name = " ".join(member.name.split())[:200]
            folder = PurePosixPath(member.name)
            if not member.isreg() or member.issparse():
                if not member.isdir():
                    seen.add("members that are links or no ordinary files", name)
                continue
            if folder.is_absolute() or ".." in folder.parts or not member.name.isprintable():
                seen.add("members with paths that lead out", name)
                continue
            stem, _, kind = folder.name.partition(".")
            if folder.name.startswith("."):
                continue
            if current is None or key != (folder.parent, stem):
                if current is not None:
                    yield current
                key, current = (folder.parent, stem), _Sample(str(folder.with_name(stem)))
            if kind.lower() in _IMAGE_KINDS:
                if current.size >= 0:
                    seen.add("second images of a key", name)
                    continue
                current.name, current.offset, current.size = name, member.offset_data, member.size
            elif wanted and kind.lower() in ("cls", "json"):
                found = _label(path, file, member, kind.lower(), where)
                current.label = found if current.label is None else current.label
    if current is not None:
        yield current


# Members one after another, each wholly inside the file and behind the one before.
def _members(
    path: Path, file: io.BufferedReader, seen: _Seen, where: str
) -> Iterator[tarfile.TarInfo]:
    size = path.stat().st_size
    if file.read(2) == b"\x1f\x8b":
        raise DataError(
            f"{where}: {path}: compressed, so its images cannot be read in any order. "
            "Uncompress it (gunzip).",
            path=path,
        )
    file.seek(0)
    last, n = -1, 0
    try:
        # A second handle: labels are read between two steps of the walk.
        with (
            open_regular(path) as walked,
            tarfile.open(fileobj=walked, mode="r:", errorlevel=2) as archive,
        ):
            while (member := archive.next()) is not None:
                n += 1
                # Or every header would stay in memory.
                archive.members.clear()  # type: ignore[attr-defined]
                end = member.offset_data + max(0, member.size)
                if member.size < 0 or member.offset <= last or end > size or n > _MAX_MEMBERS:
                    raise tarfile.ReadError(f"member {n} does not lie inside the file")
                last = member.offset
                yield member
            if not _has_end(walked, archive.offset, size):
                seen.notes.append(f"{path.name} ends without an end mark: it may have been cut")
    except _TAR_ERRORS as error:
        what = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"{where}: {path}: not a whole tar archive ({what}). Fetch it again.", path=path
        ) from error


# An archive ends with blocks of zeros; other bytes there are a member's that was cut.
def _has_end(file: io.BufferedReader, offset: int, size: int) -> bool:
    file.seek(min(offset, size))
    rest = file.read(512)
    if rest.strip(b"\0"):
        raise tarfile.ReadError("it ends in the middle of a member")
    return bool(rest)


def _label(
    path: Path, file: io.BufferedReader, member: tarfile.TarInfo, kind: str, where: str
) -> str | None:
    if member.size > _MAX_LABEL_BYTES:
        raise DataError(
            f"{where}: {path}/{member.name[:200]}: {member.size:,} bytes for a label.", path=path
        )
    file.seek(member.offset_data)
    content = file.read(member.size)
    try:
        text = content.decode("utf-8").strip()
        value: Any = json.loads(text) if kind == "json" else text
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: {path}/{member.name[:200]}: cannot be read ({str(error)[:200]}).", path=path
        ) from error
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)[:1000]
