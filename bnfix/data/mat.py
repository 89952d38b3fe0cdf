"""ImageNet's devkit holds its classes in a MATLAB file, version 5: numbers, texts and structures.

SciPy's reader is not made for files from strangers. Here a compressed variable is inflated up to a
stated size, and every claimed size is held against the bytes there are before memory is taken.
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
_STRUCT, _CHAR = 2, 4
_MATRIX, _COMPRESSED = 14, 15
# A structure may hold structures: the file must not choose how deep the stack goes.
_MAX_DEPTH = 8
_MAX_ITEMS = 100_000


def read_mat(path: Path, names: tuple[str, ...], limit: int) -> dict[str, Any]:
    """Some variables of a .mat file: arrays, str, or lists of dicts for structures."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise ValueError(f"larger than {limit:,} bytes")
    if content[:8] == b"\x89HDF\r\n\x1a\n" or content[124:126] == b"\0\2":
        raise ValueError("MATLAB version 7.3, which is HDF5; save it with -v7")
    # The two letters were written as one number, so their order is the byte order.
    order = {b"IM": "<", b"MI": ">"}.get(content[126:128])
    if order is None:
        raise ValueError("no MATLAB version 5 file by its first bytes")
    variables: dict[str, Any] = {}
    for kind, data in _elements(memoryview(content)[128:], order, packed=True):
        if kind == _COMPRESSED:
            kind, data = _next(_elements(_inflated(data, limit), order, packed=True))
        if kind == _MATRIX:
            name, value = _matrix(data, order, 0, names)
            variables |= {name: value} if name in names else {}
    return variables


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


def _elements(
    data: memoryview, order: str, *, packed: bool = False
) -> Iterator[tuple[int, memoryview]]:
    """Type and content of each data element; top-level ones are not padded when compressed."""
    at = 0
    while at + 8 <= len(data):
        head, size = (int(n) for n in np.frombuffer(data[at : at + 8], dtype=f"{order}u4"))
        # Up to 4 bytes are packed beside their size, which then fills the upper half of the word.
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


def _matrix(
    data: memoryview, order: str, depth: int, names: tuple[str, ...] = ()
) -> tuple[str, Any]:
    """Name and value of one array; the value only where the name is wanted."""
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
    kind = int(flags[0]) & 0xFF
    # Others may be of kinds that are not read here.
    if names and name not in names:
        return name, None
    if kind in _CLASSES:
        values = _numbers(_next(parts), order)
        if len(values) != prod(shape):
            raise ValueError(f"an array of {shape} has {len(values):,} values")
        return name, values.astype(order + _CLASSES[kind]).reshape(shape, order="F")
    if kind == _CHAR:
        codes = _numbers(_next(parts), order)
        return name, "".join(chr(int(code)) for code in codes[:_MAX_ITEMS])
    if kind != _STRUCT:
        return name, None
    width = int(_numbers(_next(parts), order)[0])
    text = bytes(_next(parts)[1]).decode("latin-1")
    if not 1 <= width <= 1024 or prod(shape) > _MAX_ITEMS:
        raise ValueError(f"a structure of {prod(shape):,} rows is damaged")
    fields = [text[k : k + width].rstrip("\0") for k in range(0, len(text), width)]
    return name, [
        {field: _matrix(_inner(parts), order, depth + 1)[1] for field in fields}
        for _ in range(prod(shape))
    ]


def _next(parts: Iterator[tuple[int, memoryview]]) -> tuple[int, memoryview]:
    for part in parts:
        return part
    raise ValueError("an array ends too early")


def _inner(parts: Iterator[tuple[int, memoryview]]) -> memoryview:
    kind, data = _next(parts)
    if kind != _MATRIX:
        raise ValueError("a field holds no array")
    return data


def _numbers(element: tuple[int, memoryview], order: str) -> np.ndarray:
    kind, data = element
    if kind not in _STORED:
        raise ValueError(f"numbers of type {kind}")
    return np.frombuffer(data, dtype=order + _STORED[kind])
