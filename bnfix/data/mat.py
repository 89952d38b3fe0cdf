"""MATLAB's version 5 files (.mat): arrays of numbers, texts, structures and cells, sizes checked.

A compressed variable is inflated up to a stated size only, and every claimed size is held against
the bytes that there are, before an array is made of them.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np

from bnfix.data.images import open_regular

_STORED: Final = {
    1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8",
    16: "u1", 17: "u2",
}  # fmt: skip
_CLASSES: Final = {
    6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8",
}  # fmt: skip
_CELL, _STRUCT, _CHAR = 1, 2, 4
_MATRIX, _COMPRESSED = 14, 15
_MAX_DEPTH = 8
_MAX_ITEMS = 100_000


def read_mat(path: Path, names: tuple[str, ...], limit: int) -> dict[str, Any]:
    """Read some variables of a .mat file."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    if content[:8] == b"\x89HDF\r\n\x1a\n" or content[124:126] == b"\0\2":
        raise ValueError("MATLAB version 7.3, which is HDF5; save it with -v7")
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("no MATLAB version 5 file by its first bytes")
    found: dict[str, Any] = {}
    view = memoryview(content)
    for kind, data in _elements(view[128:], order, packed=True):
        whole = data
        if kind == _COMPRESSED:
            whole = _inflated(data, limit)
            inner = list(_elements(whole, order, packed=True))
            if len(inner) != 1:
                raise ValueError("a compressed variable is not one")
            kind, whole = inner[0]
        if kind == _MATRIX:
            name, value = _matrix(whole, order, 0, names)
            if name in names:
                found[name] = value
    return found


def _inflated(data: memoryview, limit: int) -> memoryview:
    inflater = zlib.decompressobj()
    try:
        whole = inflater.decompress(data, limit)
    except zlib.error as error:
        raise ValueError(f"a compressed variable is damaged ({error})") from error
    if inflater.unconsumed_tail:
        raise ValueError(f"a variable would unpack to more than {limit:,} bytes")
    if not inflater.eof:
        raise ValueError("a compressed variable ends too early")
    return memoryview(whole)


# Type and content of each data element in a row; top-level ones are not padded when compressed.
def _elements(
    data: memoryview, order: str, *, packed: bool = False
) -> Iterator[tuple[int, memoryview]]:
    at = 0
    while at + 8 <= len(data):
        head, size = (int(n) for n in np.frombuffer(data[at : at + 8], dtype=f"{order}u4"))
        if head >> 16:
            kind, size, start, step = head & 0xFFFF, head >> 16, at + 4, 8
            if size > 4:
                raise ValueError("a small element claims more than 4 bytes")
        else:
            kind, start = head, at + 8
            step = 8 + (size if packed and kind == _COMPRESSED else size + -size % 8)
        if start + size > len(data):
            raise ValueError(f"an element claims {size:,} bytes, {len(data) - start:,} are left")
        yield kind, data[start : start + size]
        at += step


# Name and value of one array; the value only where the name is wanted.
def _matrix(
    data: memoryview, order: str, depth: int, names: tuple[str, ...] = ()
) -> tuple[str, Any]:
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if not data:
        return "", np.empty((0, 0))
    parts = _elements(data, order)
    flags = _numbers(_next(parts), order)
    shape = tuple(int(n) for n in _numbers(_next(parts), order))
    name = bytes(_next(parts)[1]).decode("latin-1")
    if len(flags) < 1 or not 1 <= len(shape) <= 8 or min(shape) < 0:
        raise ValueError("an array's head is damaged")
    what = int(flags[0]) & 0xFF
    if names and name not in names:
        return name, None
    if what in _CLASSES:
        return name, _array(_next(parts), order, shape, _CLASSES[what])
    if what == _CHAR:
        codes = _numbers(_next(parts), order)
        return name, "".join(chr(int(code)) for code in codes[:_MAX_ITEMS])
    if what not in (_CELL, _STRUCT):
        return name, None
    if prod(shape) > _MAX_ITEMS:
        raise ValueError(f"{prod(shape):,} cells")
    if what == _CELL:
        return name, [_matrix(_inner(parts), order, depth + 1)[1] for _ in range(prod(shape))]
    width = int(_numbers(_next(parts), order)[0])
    text = bytes(_next(parts)[1]).decode("latin-1")
    if not 1 <= width <= 1024:
        raise ValueError("a structure's field names are damaged")
    fields = [text[k : k + width].rstrip("\0") for k in range(0, len(text), width)]
    return name, [
        {key: _matrix(_inner(parts), order, depth + 1)[1] for key in fields}
        for _ in range(prod(shape))
    ]


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    for part in parts:
        return part
    raise ValueError("an array ends too early")


def _inner(parts: Iterator[tuple[int, memoryview]]) -> memoryview:
    kind, data = _next(parts)
    if kind != _MATRIX:
        raise ValueError("a cell or field holds no array")
    return data


def _numbers(element: tuple[int, memoryview], order: str) -> np.ndarray:
    kind, data = element
    if kind not in _STORED:
        raise ValueError(f"numbers of type {kind}")
    return np.frombuffer(data, dtype=order + _STORED[kind])


def _array(
    element: tuple[int, memoryview], order: str, shape: tuple[int, ...], kind: str
) -> np.ndarray:
    values = _numbers(element, order)
    if len(values) != prod(shape):
        raise ValueError(f"an array of {shape} has {len(values):,} values")
    return values.astype(order + kind, copy=False).reshape(shape, order="F")
