"""Inputs that are no images: tensors of any shape, which go to the network as they are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfix.core.errors import DataError
from bnfix.core.torch_private import tree_leaves
from bnfix.data.images import DIGEST_SIZE, Images

_EXPECTED = (
    "floating-point or whole numbers (a tensor, an array, a number), or tuples and dicts of them. "
    "From Python, batches of any form work: bnfix.recalibrate_(model, batches, forward=...)"
)


class TensorItems(Images):
    """Inputs by position: one tensor with a row an item, or a list of tensors or nests of them."""

    def __init__(self, spec: str, items: Tensor | Sequence[Any], kind: str) -> None:
        super().__init__(spec, 0)
        self.items, self.kind = items, kind

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: np.ndarray) -> Any:
        """A batch of items, a new leading dimension on each tensor."""
        if isinstance(self.items, Tensor):
            return self.items[torch.from_numpy(index)]
        try:
            return _stacked([self.items[i] for i in index.tolist()])
        except RuntimeError as error:
            # torch does not say which items differ.
            shapes = [[tuple(leaf.shape) for leaf in tree_leaves(self.items[i])] for i in index]
            odd = next(k for k, shape in enumerate(shapes) if shape != shapes[0])
            raise DataError(
                f"{self.spec}: items of different shapes in one batch, item {index[0]} is "
                f"{shapes[0]}, item {index[odd]} is {shapes[odd]}. Make them alike, or give "
                "--batch-size 1."
            ) from error

    def _hash(self, i: int) -> bytes:
        digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
        for leaf in tree_leaves(self.items[i]):
            # The same bytes can be other numbers, or the same in another shape.
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().numpy().tobytes())
        return digest.digest()


def as_inputs(value: Any) -> Any:
    """Numbers of any kind as float32, int64 or bool tensors on the CPU; nests stay nests."""
    if isinstance(value, Mapping):
        return {str(key): as_inputs(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and value:
        return tuple(as_inputs(item) for item in value)
    if isinstance(value, np.ndarray | np.generic | float | int):
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise DataError(f"an array of {array.dtype}, expected {_EXPECTED}.")
        value = torch.from_numpy(
            array.astype({"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64))
        )
    if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
        found = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"a {found}, expected {_EXPECTED}.")
    # One type of each sort: networks refuse float64 and int32 beside their own.
    value = value.detach().cpu()
    if value.is_floating_point():
        return value.float()
    return value if value.dtype == torch.bool else value.long()


def nesting_of(value: Any) -> Any:
    """How tensors are nested in an item; equal for items that go into one batch."""
    if isinstance(value, dict):
        return {key: nesting_of(item) for key, item in value.items()}
    return tuple(map(nesting_of, value)) if isinstance(value, tuple) else "tensor"


def _stacked(items: list[Any]) -> Any:
    first = items[0]
    if isinstance(first, dict):
        return {key: _stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*items, strict=True))
    return torch.stack(items)
