"""Images in archives: tar shards, parquet files and Hugging Face dataset folders.

A shard (``key.jpg key.cls``) is scanned once for the offset of each image. Nothing is unpacked to
disk, and no member's name is used as a path: names only group the members. Tables are read by row
group on demand, as dictionaries: a value repeated a million times is in memory once.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import tarfile
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, product
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np

from bnfix.core.errors import DataError, some
from bnfix.data.images import (
    MAX_IMAGE_BYTES,
    SUFFIXES,
    EncodedImages,
    Opened,
    open_regular,
    parsing,
)

MAX_SHARDS: Final = 100_000
_MAX_MEMBERS: Final = 20_000_000
_MAX_LABEL_BYTES: Final = 1_000_000
_RANGE: Final = re.compile(r"\{([0-9]{1,9})\.\.([0-9]{1,9})\}")
_WHOLE: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NO_END: Final = "ends without an end marker: it may be truncated"
_IMAGE_KINDS: Final = {suffix.removeprefix(".") for suffix in SUFFIXES}
_JSON_KEYS: Final = ("label", "cls", "class", "class_id", "target", "class_name")
_IMAGE_COLUMNS: Final = ("image", "img", "png", "jpg", "jpeg", "webp", "picture")
_LABEL_COLUMNS: Final = ("label", "fine_label", "labels", "cls", "target", "class", "class_id")
_LABEL_TYPES: Final = ("int", "uint", "string", "large_string", "dictionary<values=string")
_MAX_ROWS: Final = 20_000_000
_MAX_GROUP_BYTES: Final = 512 << 20
_KEPT_BYTES: Final = 128 << 20
#: Aliases of split names, and the order of preference if the user names no split.
_ALIASES: Final = {"validation": "val", "valid": "val", "dev": "val", "training": "train",
                   "testing": "test"}  # fmt: skip
_HELD_OUT: Final = ("test", "val", "train")
_SHARD: Final = re.compile(r"[-._]?[0-9]{1,9}(-of-[0-9]{1,9})?(-[0-9a-f]{6,40})?$")


# --- tar shards ---


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


def named_files(spec: str) -> list[Path]:
    """The files of a name or of a range; all must exist."""
    paths = [Path(spec)] if Path(spec).exists() else [Path(p) for p in expand_braces(spec)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} files are missing: {some(missing)}. "
            "Download them, or give a range of files that exist."
        )
    return paths


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
        """The image's shard and member."""
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
    """The members with one key in one shard."""

    shard: int
    name: str
    offset: int = 0
    size: int = -1  # no image yet
    label: str | None = None


def open_shards(spec: str, wanted: bool, channels: int) -> Opened:
    """Index tar shards; a label is a number or a name in ``key.cls`` or ``key.json``."""
    passed: defaultdict[str, list[str]] = defaultdict(list)
    paths = named_files(spec)
    samples = [one for k in range(len(paths)) for one in _samples(k, paths[k], wanted, passed)]
    uncut = passed.pop(_NO_END, [])
    if not samples:
        raise DataError(
            f"no images in {len(paths)} shards, expected members named by a key and one of "
            f"{', '.join(sorted(_IMAGE_KINDS))}."
        )
    places = np.asarray([(one.shard, one.offset, one.size) for one in samples], dtype=np.int64)
    images = ShardImages(paths, places, [one.name for one in samples], channels)
    images.notes += [f"{name} {_NO_END}" for name in uncut]
    images.notes += [f"{len(v)} {kind} skipped: {some(v)}" for kind, v in passed.items()]
    labels = [one.label for one in samples]
    whole = all(label is None or _WHOLE.fullmatch(label) for label in labels)
    return images, [int(label) if whole and label else label for label in labels]


def _samples(
    k: int, path: Path, wanted: bool, passed: defaultdict[str, list[str]]
) -> Iterator[_Sample]:
    """The samples of one shard, in order; each groups adjacent members with one key."""
    # A separate handle: labels are read between two steps of the scan.
    with open_regular(path) as file:
        for (folder, stem), members in groupby(_members(path, passed), _key):
            sample = _Sample(k, str(folder / stem))
            for member in members:
                kind = PurePosixPath(member.name).name.partition(".")[2].lower()
                if kind in _IMAGE_KINDS and sample.size < 0:
                    sample.name = _shown(member)
                    sample.offset, sample.size = member.offset_data, member.size
                elif kind in _IMAGE_KINDS:
                    passed["second images of a key"].append(_shown(member))
                elif wanted and kind in ("cls", "json") and sample.label is None:
                    sample.label = _label(path, file, member, kind)
            if sample.size >= 0:
                yield sample
            else:
                passed["keys without an image"].append(sample.name)


def _key(member: tarfile.TarInfo) -> tuple[PurePosixPath, str]:
    path = PurePosixPath(member.name)
    return path.parent, path.name.partition(".")[0]


def _shown(member: tarfile.TarInfo) -> str:
    return " ".join(member.name.split())[:200]


def _members(path: Path, passed: defaultdict[str, list[str]]) -> Iterator[tarfile.TarInfo]:
    """The regular files in order, each entirely inside the shard and after the previous one."""
    size, last, n = path.stat().st_size, -1, 0
    broken = parsing(f"{path}: not a complete tar archive", " Download it again.")
    with broken, open_regular(path) as file:
        if file.read(2) == b"\x1f\x8b":
            raise DataError(
                f"{path}: compressed, so its images cannot be read in random order. "
                "Uncompress it (gunzip)."
            )
        file.seek(0)
        archive = tarfile.open(fileobj=file, mode="r:", errorlevel=2)
        while (member := archive.next()) is not None:
            n += 1
            # Otherwise every header would stay in memory.
            archive.members.clear()  # type: ignore[attr-defined]
            end = member.offset_data + max(0, member.size)
            if member.size < 0 or member.offset <= last or end > size or n > _MAX_MEMBERS:
                raise tarfile.ReadError(f"member {n} does not lie inside the file")
            last, name = member.offset, PurePosixPath(member.name)
            if not member.isreg() or member.issparse():
                if not member.isdir():
                    passed["members that are links or special files"].append(_shown(member))
            elif name.is_absolute() or ".." in name.parts or not member.name.isprintable():
                passed["members with unsafe paths"].append(_shown(member))
            elif not name.name.startswith("."):
                yield member
        # Blocks of zeros end an archive; any other bytes there are a truncated member.
        file.seek(min(archive.offset, size))
        rest = file.read(512)
        if rest.strip(b"\0"):
            raise tarfile.ReadError("it ends in the middle of a member")
        if not rest:
            passed[_NO_END].append(path.name)


def _label(path: Path, file: io.BufferedReader, member: tarfile.TarInfo, kind: str) -> str | None:
    place = f"{path}/{member.name[:200]}"
    if member.size > _MAX_LABEL_BYTES:
        raise DataError(f"{place}: {member.size:,} bytes for a label.")
    with parsing(f"{place}: cannot be read"):
        file.seek(member.offset_data)
        text = file.read(member.size).decode("utf-8").strip()
        value: Any = json.loads(text) if kind == "json" else text
    if isinstance(value, dict):
        value = next((value[key] for key in _JSON_KEYS if key in value), None)
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        return None
    return str(value)[:1000]


# --- tables ---


def find_tables(folder: Path) -> list[Path]:
    """A folder's parquet files, or the .arrow files of ``save_to_disk``, up to two levels down."""
    for suffix in (".parquet", ".arrow"):
        found = [p for depth in ("*", "*/*", "*/*/*") for p in folder.glob(depth + suffix)]
        # Other .arrow files, such as caches, have no state.json next to them.
        tables = [
            path
            for path in found
            if path.is_file()
            and not any(part.startswith(".") for part in path.relative_to(folder).parts)
            and (suffix == ".parquet" or (path.parent / "state.json").is_file())
        ]
        if tables:
            return sorted(tables)
    return []


def choose_split(folder: Path, tables: Sequence[Path], split: str) -> tuple[list[Path], list[str]]:
    """The files of one split, by name (``train-00000-of-00002``, ``test/0000``), and notes."""
    by_split: dict[str, list[Path]] = {}
    for path in tables:
        stem = _SHARD.sub("", path.stem)
        is_plain = stem in ("", "data", "part", "shard")
        name = (path.parent.name if path.parent != folder else "") if is_plain else stem
        by_split.setdefault(_ALIASES.get(name.lower(), name.lower()), []).append(path)
    names = sorted(by_split)
    wanted = _ALIASES.get(split.lower(), split.lower())
    if wanted and wanted not in by_split:
        raise DataError(f"no split {split!r} among {some(names)} in {folder}. Give one of these.")
    chosen = wanted or next((name for name in _HELD_OUT if name in by_split), names[0])
    if not wanted and len(names) > 1 and chosen not in _HELD_OUT:
        raise DataError(f"several splits in {folder}: {some(names)}. Name one, {folder}#{chosen}.")
    folders = sorted({str(path.parent.relative_to(folder)) for path in by_split[chosen]})
    if len(folders) > 1:
        raise DataError(
            f"{chosen or 'files'} in several folders ({some(folders)}), expected one "
            f"configuration. Give one of them, for example {folder / folders[0]}."
        )
    notes = [f"no split named, so {chosen} is used (of {some(names)})"]
    return by_split[chosen], [] if wanted or len(names) == 1 else notes


def _arrow() -> Any:
    """The pyarrow package: an optional dependency, slow to import."""
    importlib.import_module("pyarrow.parquet")
    return importlib.import_module("pyarrow")


def open_tables(spec: str | list[Path], wanted: bool, channels: int) -> Opened:
    """Open parquet or .arrow files with the same columns, given as a list, a name or a range."""
    paths = named_files(spec) if isinstance(spec, str) else spec
    try:
        _arrow()
    except ImportError as error:
        raise DataError(
            f"needs pyarrow, which is not installed ({error}). pip install 'bnfix[parquet]'."
        ) from error
    labels, images = [], TableImages(paths, channels)
    advice = " Download it again, or save it with an image column (bytes, path) and a label column."
    for path in paths:
        with parsing(f"{path}: cannot be read", advice):
            labels += images.add(path, wanted)
    if not len(images):
        raise DataError(f"no images: {paths[-1]} has no rows.")
    images.class_names = images.columns.names if images.columns else None
    return images, labels or None


class TableImages(EncodedImages):
    """Images in a column of tables, in parts: one row group, or a whole .arrow file."""

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        super().__init__(str(paths[0]), channels)
        self.kind = paths[0].suffix.removeprefix(".")
        self.columns: Columns | None = None  # the first file's; all others have the same
        self._image = ""
        self._parts: list[tuple[Path, int, int]] = []  # file, row group, its first row in the file
        self._starts: list[int] = []  # position of each part's first image
        self._n = 0
        self._kept: OrderedDict[int, tuple[int, Any]] = OrderedDict()  # part: bytes, column
        self._mapped: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": OrderedDict(), "_mapped": {}}

    def __len__(self) -> int:
        return self._n

    def add(self, path: Path, wanted: bool) -> list[Any]:
        """Append the rows of one file; return its labels if they are wanted."""
        schema, sizes = self._describe(path)
        columns = find_columns(schema)
        if self.columns not in (None, columns):
            raise ValueError("its columns or classes differ from those of the other files")
        if self._n + sum(sizes) > _MAX_ROWS:
            raise ValueError(f"more than {_MAX_ROWS:,} rows")
        inner = ".bytes" if columns.nested and path.suffix == ".parquet" else ""
        self.columns, self._image, first = columns, columns.image + inner, self._n
        for group, size in enumerate(sizes):
            self._parts.append((path, group, self._n - first))
            self._starts.append(self._n)
            self._n += size
        if not wanted or columns.label is None or self._n == first:
            return []
        labels: list[Any] = self._column(path, columns.label).to_pylist()
        if len(labels) != self._n - first:
            raise ValueError(f"{len(labels):,} labels for {self._n - first:,} rows")
        return labels

    def name(self, i: int) -> str:
        """The image's file and row."""
        k, row = self._place(i)
        return f"{self._path(i).name}[{self._parts[k][2] + row}]"

    def _path(self, i: int) -> Path:
        return self._parts[self._place(i)[0]][0]

    def _place(self, i: int) -> tuple[int, int]:
        """The part that holds an image, and the row in that part."""
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return k, int(i) - self._starts[k]

    def _stream(self, i: int) -> io.BytesIO:
        k, row = self._place(i)
        content = self._images(k)[row].as_py()
        content = content.get("bytes") if isinstance(content, dict) else content
        if not isinstance(content, bytes) or not content:
            raise OSError("no bytes in the table")
        return io.BytesIO(content)

    def _images(self, k: int) -> Any:
        """The image column of one part; recently used parts are cached."""
        if k not in self._kept:
            path, group, _ = self._parts[k]
            column = self._column(path, self._image, group)
            # A memory-mapped file needs no memory of its own.
            self._kept[k] = 0 if path in self._mapped else column.nbytes, column
        self._kept.move_to_end(k)
        while len(self._kept) > 1 and sum(size for size, _ in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[k][1]

    def _column(self, path: Path, name: str, group: int | None = None) -> Any:
        """One column of a file or of a row group."""
        if path.suffix == ".arrow":
            return self._table(path).column(name)
        groups = None if group is None else [group]
        with _arrow().parquet.ParquetFile(path, read_dictionary=[name]) as file:
            batches = file.iter_batches(4096, row_groups=groups, columns=[name], use_threads=False)
            return _arrow().chunked_array([batch.column(0) for batch in batches])

    def _table(self, path: Path) -> Any:
        if path not in self._mapped:
            with _arrow().memory_map(str(path)) as source:
                table = _arrow().ipc.open_stream(source).read_all()
            # The offsets come from the file, and arrow does not check them.
            table.validate(full=True)
            self._mapped[path] = table
        return self._mapped[path]

    def _describe(self, path: Path) -> tuple[Any, list[int]]:
        """The schema and the number of rows per part, after a check of the declared sizes."""
        if path.suffix == ".arrow":
            return self._table(path).schema, [self._table(path).num_rows]
        limits = {"thrift_string_size_limit": 64 << 20, "thrift_container_size_limit": _MAX_ROWS}
        with _arrow().parquet.ParquetFile(path, **limits) as file:
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            if min(sizes, default=0) < 0 or sum(sizes) != file.metadata.num_rows:
                raise ValueError("its row groups do not add up to its rows")
            for group in groups:
                for j in range(group.num_columns):
                    _check_size(group.column(j), path.stat().st_size)
            return file.schema_arrow, sizes


class Columns(NamedTuple):
    """The columns with images and labels, and the class names."""

    image: str
    nested: bool  # a struct with a field `bytes`
    label: str | None
    names: tuple[str, ...] | None


def find_columns(schema: Any) -> Columns:
    """Find a table's columns by Hugging Face's metadata, or else by type and name."""
    features = _features(schema.metadata)
    types = {field.name: field.type for field in schema}
    kinds = {name: features.get(name, {}).get("_type") for name in types}
    described = [name for name in types if kinds[name] == "Image"]
    held = [name for name in types if _holds_bytes(types[name])]
    only = held if len(held) == 1 else []
    image = next((n for n in (*described, *_IMAGE_COLUMNS, *only) if n in held), None)
    if image is None:
        raise ValueError(
            f"no image column among {some(list(types))}: expected bytes, or a struct of bytes "
            f"and path, named {', '.join(_IMAGE_COLUMNS[:2])}"
        )
    classed = [name for name in types if kinds[name] == "ClassLabel"]
    usable = [name for name in types if str(types[name]).startswith(_LABEL_TYPES)]
    labels = [name for name in _LABEL_COLUMNS if name in usable][:1] or classed
    if len(labels) > 1:
        raise ValueError(f"several label columns: {some(labels)}; rename one of them to label")
    label = labels[0] if labels else None
    names = features.get(label or "", {}).get("names")
    is_listed = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return Columns(
        image,
        nested=str(types[image]).startswith("struct"),
        label=label,
        names=tuple(names) if is_listed and names else None,
    )


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    try:
        features = json.loads((metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: value for name, value in features.items() if isinstance(value, dict)}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return {}  # a hostile file can hold JSON of any form


def _holds_bytes(kind: Any) -> bool:
    if str(kind).startswith("struct"):
        fields = [kind.field(j) for j in range(kind.num_fields)]
        return any(f.name == "bytes" and str(f.type) in ("binary", "large_binary") for f in fields)
    return str(kind) in ("binary", "large_binary")


def _check_size(chunk: Any, held: int) -> None:
    packed, size = chunk.total_compressed_size, chunk.total_uncompressed_size
    name = str(chunk.path_in_schema)[:80]
    if not 0 <= packed <= held or not 0 <= size <= max(16 << 20, 100 * packed):
        raise ValueError(f"column {name} claims {packed:,} bytes, {size:,} unpacked, in {held:,}")
    if size > _MAX_GROUP_BYTES:
        raise ValueError(
            f"a row group has {size:,} bytes of {name}, expected at most {_MAX_GROUP_BYTES:,}; "
            "write it with smaller row groups"
        )
