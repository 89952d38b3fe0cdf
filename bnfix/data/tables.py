"""Parquet files and Hugging Face dataset folders: a column of images, a column of labels.

Row groups are read as they are needed. Images are read as dictionaries, so that a value that is
repeated a million times takes its place in memory once.
"""

from __future__ import annotations

import importlib
import io
import json
import re
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from bnfix.core.errors import DataError, plain, some
from bnfix.data.images import EncodedImages

_IMAGE_COLUMNS: Final = ("image", "img", "png", "jpg", "jpeg", "webp", "picture")
_LABEL_COLUMNS: Final = ("label", "fine_label", "labels", "cls", "target", "class", "class_id")
_LABEL_TYPES: Final = ("int", "uint", "string", "large_string", "dictionary<values=string")
_MAX_ROWS: Final = 20_000_000
_MAX_GROUP_BYTES: Final = 512 << 20
_KEPT_BYTES: Final = 128 << 20
_MAX_SCHEMA_BYTES: Final = 64 << 20
#: Other names of a split, and the order in which one is taken where none is named.
_ALIASES: Final = {"validation": "val", "valid": "val", "dev": "val", "training": "train",
                   "testing": "test"}  # fmt: skip
_HELD_OUT: Final = ("test", "val", "train")
_SHARD: Final = re.compile(r"[-._]?[0-9]{1,9}(-of-[0-9]{1,9})?(-[0-9a-f]{6,40})?$")


def find_tables(folder: Path) -> list[Path]:
    """A folder's parquet files, or the .arrow files of ``save_to_disk``, up to two levels down."""
    for suffix in (".parquet", ".arrow"):
        found = [p for depth in ("*", "*/*", "*/*/*") for p in folder.glob(depth + suffix)]
        # Beside others' .arrow files, as caches are, there is no state.json.
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
    """Files of one split by their names, ``train-00000-of-00002`` or ``test/0000``, and notes."""
    by_split: dict[str, list[Path]] = {}
    for path in tables:
        stem = _SHARD.sub("", path.stem)
        is_plain = stem in ("", "data", "part", "shard")
        name = (path.parent.name if path.parent != folder else "") if is_plain else stem
        by_split.setdefault(_ALIASES.get(name.lower(), name.lower()), []).append(path)
    names = sorted(by_split)
    wanted = _ALIASES.get(split.lower(), split.lower())
    known = [name for name in _HELD_OUT if name in by_split]
    if wanted and wanted not in by_split:
        raise DataError(f"no split {split!r} among {some(names)} in {folder}. Give one of these.")
    if not wanted and len(names) > 1 and not known:
        raise DataError(
            f"several splits in {folder}: {some(names)}. Name one, {folder}#{names[0]}."
        )
    chosen = wanted or (names[0] if len(names) == 1 else known[0])
    folders = sorted({str(path.parent.relative_to(folder)) for path in by_split[chosen]})
    if len(folders) > 1:
        raise DataError(
            f"{chosen or 'files'} in several folders ({some(folders)}), so several "
            f"configurations. Give one of them, for example {folder / folders[0]}."
        )
    is_named = wanted or len(names) == 1
    note = f"no split named, so {chosen} is used (of {some(names)})"
    return by_split[chosen], [] if is_named else [note]


def open_tables(
    paths: Sequence[Path], wanted: bool, channels: int
) -> tuple[EncodedImages, list[Any] | None]:
    """Open parquet or .arrow files of one layout; with the labels, if they are wanted."""
    try:
        arrow: Any = importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            f"needs pyarrow, which is not installed ({error}). pip install 'bnfix[parquet]'."
        ) from error
    errors = (arrow.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError,
              OverflowError, AttributeError, RecursionError)  # fmt: skip
    path, labels = paths[0], []
    images = TableImages(paths, channels)
    try:
        for path in paths:
            labels += images.add(path, wanted)
    except errors as error:
        raise DataError(
            f"{path}: cannot be read ({plain(str(error), 300) or type(error).__name__}). "
            "Fetch it again, or write it with an image column (bytes, path) and a label column."
        ) from error
    if not len(images):
        raise DataError(f"no images, there are no rows in {path}.")
    images.class_names = images.columns[0].names
    return images, labels or None


class TableImages(EncodedImages):
    """Images in a column of tables, part by part: a row group each, or a whole .arrow file."""

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        super().__init__(str(paths[0]), channels)
        self.kind = paths[0].suffix.removeprefix(".")
        self.columns: list[Columns] = []  # of the first file; all others have the same
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
        """Append the rows of one file; give its labels where they are wanted."""
        schema, sizes = self._describe(path)
        columns = find_columns(schema)
        if self.columns and self.columns != [columns]:
            raise ValueError("its columns or classes are not those of the files before")
        if self._n + sum(sizes) > _MAX_ROWS:
            raise ValueError(f"more than {_MAX_ROWS:,} rows")
        self.columns, first = [columns], self._n
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
        """Its file and row."""
        path, _, first = self._parts[self._part(i)]
        return f"{path.name}[{first + i - self._starts[self._part(i)]}]"

    def _path(self, i: int) -> Path:
        return self._parts[self._part(i)][0]

    def _part(self, i: int) -> int:
        return int(np.searchsorted(self._starts, i, side="right")) - 1

    def _stream(self, i: int) -> io.BytesIO:
        arrow: Any = importlib.import_module("pyarrow")
        k = self._part(i)
        try:
            content = self._images(k)[int(i) - self._starts[k]].as_py()
        except (arrow.ArrowException, LookupError, TypeError) as error:
            raise OSError(str(error)) from error
        if isinstance(content, dict):
            content = content.get("bytes")
        if not isinstance(content, bytes) or not content:
            raise OSError("no bytes in the table")
        return io.BytesIO(content)

    def _images(self, k: int) -> Any:
        """The image column of one part; the parts read last are kept."""
        if k not in self._kept:
            path, group, _ = self._parts[k]
            (columns,) = self.columns
            inner = ".bytes" if columns.nested and path.suffix == ".parquet" else ""
            column = self._column(path, columns.image + inner, group)
            # A file mapped into memory takes none of its own.
            self._kept[k] = 0 if path in self._mapped else column.nbytes, column
        self._kept.move_to_end(k)
        while len(self._kept) > 1 and sum(size for size, _ in self._kept.values()) > _KEPT_BYTES:
            self._kept.popitem(last=False)
        return self._kept[k][1]

    def _column(self, path: Path, name: str, group: int | None = None) -> Any:
        """One column of a file, or of one of its row groups."""
        if path.suffix == ".arrow":
            return self._table(path).column(name)
        arrow: Any = importlib.import_module("pyarrow")
        groups = None if group is None else [group]
        with importlib.import_module("pyarrow.parquet").ParquetFile(
            path, read_dictionary=[name]
        ) as file:
            batches = file.iter_batches(4096, row_groups=groups, columns=[name], use_threads=False)
            return arrow.chunked_array([batch.column(0) for batch in batches])

    def _table(self, path: Path) -> Any:
        if path not in self._mapped:
            arrow: Any = importlib.import_module("pyarrow")
            with arrow.memory_map(str(path)) as source:
                table = arrow.ipc.open_stream(source).read_all()
            # Offsets come from the file, and arrow follows them unchecked.
            table.validate(full=True)
            self._mapped[path] = table
        return self._mapped[path]

    def _describe(self, path: Path) -> tuple[Any, list[int]]:
        """Schema and rows of each part, once the sizes that the file claims are believed."""
        if path.suffix == ".arrow":
            return self._table(path).schema, [self._table(path).num_rows]
        limits = {"thrift_string_size_limit": _MAX_SCHEMA_BYTES,
                  "thrift_container_size_limit": _MAX_ROWS}  # fmt: skip
        with importlib.import_module("pyarrow.parquet").ParquetFile(path, **limits) as file:
            groups = [file.metadata.row_group(g) for g in range(file.metadata.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            if min(sizes, default=0) < 0 or sum(sizes) != file.metadata.num_rows:
                raise ValueError("its row groups do not add up to its rows")
            for group in groups:
                for j in range(group.num_columns):
                    _check_size(group.column(j), path.stat().st_size)
            return file.schema_arrow, sizes


class Columns(NamedTuple):
    """The columns of images and labels, and the classes' names."""

    image: str
    nested: bool  # a structure with a field `bytes`
    label: str | None
    names: tuple[str, ...] | None


def find_columns(schema: Any) -> Columns:
    """Find a table's columns: by Hugging Face's own description, else by type and name."""
    features = _features(schema.metadata)
    types = {field.name: field.type for field in schema}
    described = [n for n in types if features.get(n, {}).get("_type") == "Image"]
    images = [n for n in types if _holds_bytes(types[n])]
    image = next((n for n in (*described, *_IMAGE_COLUMNS) if n in images), None)
    if image is None and len(images) == 1:
        image = images[0]
    if image is None:
        raise ValueError(
            f"no image column among {some(list(types))}: expected bytes, or a structure of bytes "
            f"and path, named {', '.join(_IMAGE_COLUMNS[:2])}"
        )
    classed = [n for n in types if features.get(n, {}).get("_type") == "ClassLabel"]
    usable = [n for n in types if str(types[n]).startswith(_LABEL_TYPES)]
    label = next((n for n in _LABEL_COLUMNS if n in usable), None)
    if label is None and len(classed) > 1:
        raise ValueError(f"several label columns: {some(classed)}; name the one meant label")
    if label is None and classed:
        label = classed[0]
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
        return {}  # of any form, if the file is hostile


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
            f"a row group has {size:,} bytes of {name}, at most {_MAX_GROUP_BYTES:,} are read at "
            "once; write it with smaller row groups"
        )
