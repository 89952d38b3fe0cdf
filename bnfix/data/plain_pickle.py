"""A pickle of plain containers and numpy arrays, read by its opcodes: no name in it is looked up.

Python's own unpickler is not used at all. Names are kept as texts, and the few calls that an array
of numbers needs are recognized and turned into one; whatever else a file asks for is refused.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from math import prod
from typing import Any, Final

import numpy as np

_MARK: Final = object()
_RECONSTRUCT: Final = {f"{core}.multiarray._reconstruct" for core in ("numpy.core", "numpy._core")}
_KNOWN: Final = {*_RECONSTRUCT, "numpy.ndarray", "numpy.dtype", "_codecs.encode"}
_CODES: Final = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f4", "f8", "b1"}
_CONSTANTS: Final = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES: Final = {
    "INT", "LONG", "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
}  # fmt: skip
_FRESH: Final[dict[str, Callable[[], Any]]] = {
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple,
}  # fmt: skip


class _Name(str):
    """A global's dotted name: only ever compared with the known ones."""

    __slots__ = ()


class _Array:
    """An array or its type on the way to being complete."""

    __slots__ = ("code", "order", "value")

    def __init__(self, code: str = "") -> None:
        self.code, self.order = code, "<"
        self.value: np.ndarray | None = None


def read_plain_pickle(data: bytes) -> Any:
    """Read a pickle that holds dicts, lists, tuples, texts, bytes, numbers and arrays of numbers.

    Keys of dicts, and texts that Python 2 wrote, come as str, whatever they were.

    Args:
        data: the whole pickle.

    Returns:
        What it holds.

    Raises:
        ValueError: if it is damaged, or needs anything else.
    """
    try:
        return _finished(_Reader(len(data)).run(data), 0)
    except (LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a whole pickle of plain values ({error})") from error


class _Reader:
    def __init__(self, budget: int) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.budget = budget

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(io.BytesIO(data)):
            if opcode.name == "STOP":
                result = self.stack.pop()
                if result is _MARK:
                    break
                return result
            self._step(opcode.name, argument)
        raise ValueError("it ends without a value")

    def _step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _FRESH:
            stack.append(_FRESH[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "MEMOIZE":
            self.memo[len(self.memo)] = stack[-1]
        elif name.endswith("PUT"):
            self.memo[int(argument)] = stack[-1]
        elif name.endswith("GET"):
            stack.append(self.memo[int(argument)])
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            self._name(argument)
        elif name == "REDUCE":
            arguments, call = stack.pop(), stack.pop()
            stack.append(self._call(call, arguments))
        elif name == "BUILD":
            self._build(stack[-2], stack.pop())
        elif name not in ("PROTO", "FRAME"):
            self._collect(name)

    def _name(self, argument: Any) -> None:
        if argument is None:
            last, first = self.stack.pop(), self.stack.pop()
            dotted = f"{first}.{last}"
        else:
            dotted = str(argument).replace(" ", ".")
        if dotted not in _KNOWN:
            raise ValueError(f"it needs {dotted[:80]!r}, which is no plain value")
        self.stack.append(_Name(dotted))

    # Opcodes that take several values off the stack.
    def _collect(self, name: str) -> None:
        stack = self.stack
        if name == "APPEND":
            items = [stack.pop()]
            stack[-1].append(*items)
        elif name == "APPENDS":
            items = self._marked()
            stack[-1].extend(items)
        elif name == "LIST":
            stack.append(self._marked())
        elif name == "TUPLE":
            stack.append(tuple(self._marked()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            items = [stack.pop() for _ in range(n)][::-1]
            stack.append(tuple(items))
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _set_items(stack[-1], [key, value])
        elif name == "SETITEMS":
            items = self._marked()
            _set_items(stack[-1], items)
        elif name == "DICT":
            items = self._marked()
            stack.append({})
            _set_items(stack[-1], items)
        else:
            raise ValueError(f"it needs the opcode {name}, which no plain value does")

    def _marked(self) -> list[Any]:
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def _call(self, call: Any, arguments: Any) -> Any:
        if not isinstance(call, _Name) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no name")
        if call == "_codecs.encode" and arguments and isinstance(arguments[0], str):
            return self._encoded(arguments[0])
        if call == "numpy.dtype" and arguments and isinstance(arguments[0], str | bytes):
            text = arguments[0]
            return _Array(
                (text.decode("latin-1") if isinstance(text, bytes) else text).lstrip("<|=")
            )
        if call in _RECONSTRUCT:
            return _Array()
        raise ValueError(f"it calls {call!s} with other values than an array's")

    # The state of an array or of its type, as numpy writes it.
    def _build(self, target: Any, state: Any) -> None:
        if not isinstance(target, _Array) or not isinstance(state, tuple):
            raise ValueError("it sets the state of what is no array")
        if target.code:
            target.order = _text(state[1])
            return
        _, shape, kind, by_column, raw = state[:5]
        if not isinstance(kind, _Array) or kind.code not in _CODES:
            raise ValueError("an array of something else than numbers")
        if not isinstance(shape, tuple) or any(type(n) is not int or n < 0 for n in shape):
            raise ValueError("an array's shape is not made of whole numbers")
        content = self._encoded(raw) if isinstance(raw, str) else raw
        dtype = np.dtype((">" if kind.order == ">" else "<") + kind.code)
        if not isinstance(content, bytes) or prod(shape) * dtype.itemsize != len(content):
            raise ValueError(f"an array of {shape} {dtype} does not have as many bytes")
        flat = np.frombuffer(content, dtype=dtype)
        target.value = flat.reshape(shape, order="F" if by_column else "C")

    # The same text may be turned into bytes again and again, which takes a few opcodes a time.
    def _encoded(self, text: str) -> bytes:
        self.budget -= len(text)
        if self.budget < 0:
            raise ValueError("it would grow larger than the file")
        return text.encode("latin-1")


def _set_items(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict) or len(items) % 2:
        raise ValueError("a dict is not filled by pairs")
    for key, value in zip(items[::2], items[1::2], strict=True):
        name = key.decode("latin-1") if isinstance(key, bytes) else key
        if not isinstance(name, str | int):
            raise ValueError("a dict's key is neither a text nor a number")
        target[name] = value


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)


# Arrays in their places; only as deep as data sets nest their values.
def _finished(value: Any, depth: int) -> Any:
    if isinstance(value, _Array):
        if value.value is None:
            raise ValueError("an array without its numbers")
        return value.value
    if isinstance(value, dict) and depth < 2:
        return {key: _finished(item, depth + 1) for key, item in value.items()}
    return value
