"""Parquet files and Hugging Face dataset folders: a column of images, a column of labels.

Row groups are read as they are needed. Images are read as dictionaries, so that a value that is
repeated a million times takes its place in memory once.
"""

from __future__ import annotations

import importlib
import io
import os
import re
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import numpy as np

from bnfix.data.columns import Columns, find_columns
from bnfix.data.images import EncodedImages
from bnfix.errors import DataError, some

SUFFIXES: Final = (".parquet", ".arrow")
_MAX_ROWS: Final = 20_000_000
_MAX_GROUP_BYTES: Final = 512 << 20
_KEPT_BYTES: Final = 128 << 20
_MAX_SCHEMA_BYTES: Final = 64 << 20
#: The same split by another name, and the order in which one is taken where none is named.
_ALIASES: Final = {"validation": "val", "valid": "val", "dev": "val", "training": "train",
                   "testing": "test"}  # fmt: skip
_HELD_OUT: Final = ("test", "val", "train")
_SHARD: Final = re.compile(r"[-._]?[0-9]{1,9}(-of-[0-9]{1,9})?(-[0-9a-f]{6,40})?$")


def find_tables(folder: Path) -> list[Path]:
    """Find a folder's parquet files, or the .arrow files that ``save_to_disk`` writes."""
    for suffix in SUFFIXES:
        found = [p for depth in ("*", "*/*", "*/*/*") for p in folder.glob(depth + suffix)]
        found = [
            path
            for path in found
            if path.is_file() and not any(p.startswith(".") for p in path.relative_to(folder).parts)
        ]
        if suffix == ".arrow":
            found = [p for p in found if (p.parent / "state.json").is_file()]
        if found:
            return sorted(found)
    return []


def choose_split(
    folder: Path, tables: Sequence[Path], split: str, where: str
) -> tuple[list[Path], str | None]:
    """Choose the files of one split by their names: ``train-00000-of-00002``, ``test/0000``."""
    by_split: dict[str, list[Path]] = {}
    for path in tables:
        stem = _SHARD.sub("", path.stem)
        is_plain = stem in ("", "data", "part", "shard")
        name = (path.parent.name if path.parent != folder else "") if is_plain else stem
        name = _ALIASES.get(name.lower(), name.lower())
        by_split.setdefault(name, []).append(path)
    names = sorted(by_split)
    wanted = _ALIASES.get(split.lower(), split.lower())
    if wanted and wanted not in by_split:
        raise DataError(
            f"{where}: no split {split!r} among {some(names)} in {folder}. Give one of these.",
            path=folder,
        )
    known = [name for name in _HELD_OUT if name in by_split]
    if not wanted and len(names) > 1 and not known:
        raise DataError(
            f"{where}: several splits in {folder}: {some(names)}. Name one, {folder}#{names[0]}.",
            path=folder,
        )
    chosen = wanted or (names[0] if len(names) == 1 else known[0])
    paths = by_split[chosen]
    folders = sorted({str(path.parent.relative_to(folder)) for path in paths})
    if len(folders) > 1:
        raise DataError(
            f"{where}: {chosen or 'files'} in several folders ({some(folders)}), so several "
            f"configurations. Give one of them, for example {folder / folders[0]}.",
            path=folder,
        )
    note = None
    if not wanted and len(names) > 1:
        note = f"no split named, so {chosen} is used (of {some(names)})"
    return paths, note


def open_tables(
    paths: Sequence[Path], wanted: bool, channels: int, where: str
) -> tuple[EncodedImages, list[str] | np.ndarray | None]:
    """Open parquet or .arrow files of one layout, one after the other."""
    arrow = _pyarrow(where)
    errors = (arrow.ArrowException, OSError, ValueError, LookupError, TypeError, MemoryError,
              OverflowError, AttributeError, RecursionError)  # fmt: skip
    path = paths[0]
    labels: list[Any] = []
    try:
        kind = ParquetImages if path.suffix == ".parquet" else ArrowImages
        images = kind(paths, channels)
        for path in paths:
            labels += images.add(path, wanted)
    except errors as error:
        what = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{where}: {path}: cannot be read ({what}). Fetch it again, or write it with an image "
            "column (bytes, path) and a label column.",
            path=path,
        ) from error
    if not len(images):
        raise DataError(f"{where}: no images, there are no rows in {some([str(path)])}.", path=path)
    if not wanted or images.columns is None or images.columns.label is None:
        return images, None
    bare = [images.name(i) for i, label in enumerate(labels) if label is None or label == ""]
    if bare:
        raise DataError(
            f"{where}: {len(bare)} of {len(labels)} rows have no label: {some(bare)}. "
            "Remove them, or give --labels none.",
            path=path,
        )
    images.class_names = images.columns.names
    if all(type(label) is int for label in labels):
        return images, np.asarray(labels, dtype=np.int64)
    return images, [str(label) for label in labels]


def _pyarrow(where: str) -> ModuleType:
    try:
        return importlib.import_module("pyarrow")
    except ImportError as error:
        raise DataError(
            f"{where}: needs pyarrow, which is not installed ({error}). "
            "pip install 'bnfix[parquet]'."
        ) from error


class TableImages(EncodedImages):
    """Images in a column of tables; ``columns`` says which."""

    kind = "parquet"

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        super().__init__(str(paths[0]), channels)
        self.columns: Columns | None = None
        self._files: list[Path] = []
        self._starts: list[int] = []
        self._n = 0

    def __len__(self) -> int:
        return self._n

    def add(self, path: Path, wanted: bool) -> list[Any]:
        """Append the rows of one file."""
        schema, n = self._describe(path)
        columns = find_columns(schema)
        if self.columns is not None and columns != self.columns:
            raise ValueError("its columns or classes are not those of the files before")
        if self._n + n > _MAX_ROWS:
            raise ValueError(f"more than {_MAX_ROWS:,} rows")
        self.columns = columns
        self._files.append(path)
        self._starts.append(self._n)
        self._n += n
        if not wanted or columns.label is None:
            return []
        labels = self._column(path, columns.label)
        if len(labels) != n:
            raise ValueError(f"{len(labels):,} labels for {n:,} rows")
        return labels

    def _place(self, i: int) -> tuple[int, int]:
        k = int(np.searchsorted(self._starts, i, side="right")) - 1
        return k, i - self._starts[k]

    def name(self, i: int) -> str:
        """Its file and row."""
        k, row = self._place(int(i))
        return f"{self._files[k].name}[{row}]"

    def _path(self, i: int) -> Path:
        return self._files[self._place(int(i))[0]]

    def _stream(self, i: int) -> io.BytesIO:
        arrow = importlib.import_module("pyarrow")
        try:
            content = self._bytes(*self._place(int(i)))
        except (arrow.ArrowException, LookupError, TypeError) as error:
            raise OSError(str(error)) from error
        if not isinstance(content, bytes) or not content:
            raise OSError("no bytes in the table")
        return io.BytesIO(content)

    @abstractmethod
    def _describe(self, path: Path) -> tuple[Any, int]: ...

    @abstractmethod
    def _column(self, path: Path, name: str) -> list[Any]: ...

    @abstractmethod
    def _bytes(self, k: int, row: int) -> Any: ...


class ParquetImages(TableImages):
    """Images in parquet files: the row groups read last are kept."""

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        super().__init__(paths, channels)
        self._ends: list[np.ndarray] = []  # of each file's row groups
        self._kept: OrderedDict[tuple[int, int, int], Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_kept": OrderedDict()}

    def _describe(self, path: Path) -> tuple[Any, int]:
        parquet = importlib.import_module("pyarrow.parquet")
        limits = {"thrift_string_size_limit": _MAX_SCHEMA_BYTES,
                  "thrift_container_size_limit": _MAX_ROWS}  # fmt: skip
        with parquet.ParquetFile(path, **limits) as file:
            meta = file.metadata
            groups = [meta.row_group(g) for g in range(meta.num_row_groups)]
            sizes = [group.num_rows for group in groups]
            if min(sizes, default=0) < 0 or sum(sizes) != meta.num_rows:
                raise ValueError("its row groups do not add up to its rows")
            for group in groups:
                for j in range(group.num_columns):
                    _check_size(group.column(j), path.stat().st_size)
            self._ends.append(np.cumsum(sizes, dtype=np.int64))
            return file.schema_arrow, sum(sizes)

    def _column(self, path: Path, name: str) -> list[Any]:
        parquet = importlib.import_module("pyarrow.parquet")
        labels: list[Any] = []
        with parquet.ParquetFile(path, read_dictionary=[name]) as file:
            for batch in file.iter_batches(65_536, columns=[name], use_threads=False):
                labels += _values(batch.column(0))
        return labels

    def _bytes(self, k: int, row: int) -> Any:
        ends = self._ends[k]
        g = int(np.searchsorted(ends, row, side="right"))
        chunks = self._group(k, g)
        row -= int(ends[g - 1]) if g else 0
        for chunk in chunks:
            if row < len(chunk):
                return chunk[row].as_py()
            row -= len(chunk)
        raise LookupError("the row group has fewer rows than it says")

    def _group(self, k: int, g: int) -> Any:
        # A forked worker must not use what its parent has opened.
        key = os.getpid(), k, g
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self.columns is None:
            raise LookupError("not opened")
        parquet = importlib.import_module("pyarrow.parquet")
        name = ".".join(filter(None, (self.columns.image, self.columns.field)))
        chunks = []
        with parquet.ParquetFile(self._files[k], read_dictionary=[name]) as file:
            for batch in file.iter_batches(4096, row_groups=[g], columns=[name], use_threads=False):
                column = batch.column(0)
                chunks.append(column if self.columns.field is None else column.flatten()[0])
        self._kept[key] = chunks
        sizes = {key: sum(c.nbytes for c in chunks) for key, chunks in self._kept.items()}
        while len(self._kept) > 1 and sum(sizes.values()) > _KEPT_BYTES:
            del sizes[self._kept.popitem(last=False)[0]]
        return chunks


class ArrowImages(TableImages):
    """Images in .arrow files as Hugging Face's ``save_to_disk`` writes them, mapped into memory."""

    kind = "arrow"

    def __init__(self, paths: Sequence[Path], channels: int) -> None:
        super().__init__(paths, channels)
        self._tables: dict[Path, Any] = {}

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_tables": {}}

    def _table(self, path: Path) -> Any:
        if path not in self._tables:
            arrow = importlib.import_module("pyarrow")
            with arrow.memory_map(str(path)) as source:
                table = arrow.ipc.open_stream(source).read_all()
            # Offsets come from the file, and are followed without a look.
            table.validate(full=True)
            self._tables[path] = table
        return self._tables[path]

    def _describe(self, path: Path) -> tuple[Any, int]:
        table = self._table(path)
        return table.schema, table.num_rows

    def _column(self, path: Path, name: str) -> list[Any]:
        return [v for chunk in self._table(path).column(name).chunks for v in _values(chunk)]

    def _bytes(self, k: int, row: int) -> Any:
        if self.columns is None:
            raise LookupError("not opened")
        value = self._table(self._files[k]).column(self.columns.image)[row].as_py()
        if isinstance(value, dict) and self.columns.field is not None:
            return value.get(self.columns.field)
        return value


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


def _values(column: Any) -> list[Any]:
    values: list[Any] = column.to_pylist()
    return values
