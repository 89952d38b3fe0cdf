"""The mask of a batch: the valid positions of a padded batch, for every norm layer.

For a layer with maps of another length T', the mask is resized: position t covers the input
positions floor(t T / T') to ceil((t+1) T / T') - 1, and is valid if any of them is valid. An
example of length L then has ceil(L T' / T) valid positions.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from bnfix.core.errors import DataError, NormError

#: The keys under which a batch holds its mask or its lengths.
MASK_KEYS = ("mask", "lengths")
_POOLS: tuple[Any, ...] = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)

_set: ContextVar[Valid | None] = ContextVar("bnfix_valid_positions", default=None)
_lock, _n_set = threading.Lock(), 0
#: Whether any thread has a mask: a plain flag, because a compiler can guard on it.
mask_is_set = False


class Valid:
    """The valid positions of a batch: ``(N, *positions)``, or ``(N, T)`` for the last axis only."""

    def __init__(self, mask: Tensor, *, of_last: bool = False) -> None:
        empty = ~mask.flatten(1).any(1)
        if bool(empty.any()):
            raise DataError(
                f"mask: example {int(empty.int().argmax())} (from 0) has no valid position, "
                "expected at least one. Leave that example out."
            )
        self.mask, self._of_last = mask, of_last
        self._fitted: dict[tuple[int, ...], Tensor] = {}

    def fitted(self, input: Tensor, name: str = "norm layer") -> Tensor:
        """The mask ``(N, L)`` for a layer's input ``(N, C, *spatial)`` with L positions."""
        shape = tuple(input.shape[2:])
        if len(input) != len(self.mask):
            rows = len(input), prod(shape)
            if prod(rows) == int(self.mask.sum()):  # packed: only valid positions
                return torch.ones(rows, dtype=torch.bool, device=input.device)
            raise DataError(
                f"{name}: its input has shape {tuple(input.shape)}, but the mask is for "
                f"{len(self.mask)} examples, expected the same number. Leave that layer out "
                "(--skip), or give batches without a mask."
            )
        if shape not in self._fitted:
            self._fitted[shape] = self._fit(shape, name).to(input.device)
        return self._fitted[shape]

    def kept(self, x: Tensor) -> Tensor:
        """The values ``(M, C)`` of ``(N, C, *spatial)`` at valid positions."""
        return x.movedim(1, -1)[self.fitted(x).view(len(x), *x.shape[2:])]

    def _fit(self, shape: tuple[int, ...], name: str) -> Tensor:
        mask, n = self.mask, len(self.mask)
        if prod(shape) == 1:  # pooled over all positions, at least one of them valid
            return mask.new_ones(n, 1)
        own = shape[-1:] if self._of_last else shape
        if len(own) != mask.ndim - 1 or len(own) > len(_POOLS):
            raise DataError(
                f"{name}: its maps have shape {shape}, but the mask has {mask.ndim - 1} axes of "
                "positions, expected the same number. Give a mask with the input's axes, or "
                "lengths for the last axis."
            )
        if mask.shape[1:] != own:
            mask = _POOLS[len(own) - 1](mask[:, None].float(), own)[:, 0] > 0
        return mask.view(n, *(1 for _ in shape[len(own) :]), *own).expand(n, *shape).flatten(1)

    def refuse_misfit(self, beside: Iterable[Tensor]) -> None:
        """Raise if the mask has the size of no other tensor in the batch and of no layer's map."""
        size, shapes = tuple(self.mask.shape[1:]), [tuple(t.shape) for t in beside if t.ndim > 1]
        # Any mask fits a map of one position. An input's positions can come before its channels.
        maps = [shape for shape in self._fitted if prod(shape) > 1]
        parts = (s[k : k + len(size)] for s in shapes for k in range(1, len(s)))
        if maps and shapes and size not in (*maps, *parts):
            raise DataError(
                f"mask: {tuple(self.mask.shape)} for inputs {shapes[0]} and maps of {maps[0]}, "
                "expected (N, *positions) of either. Give a mask of the inputs' positions."
            )


def valid_positions(
    mask: Tensor | None = None,
    *,
    lengths: Tensor | Sequence[int] | None = None,
    total: int | None = None,
) -> AbstractContextManager[None]:
    """Compute moments in norm layers over valid positions only, in this thread.

    Use it for padded batches. `GeneralizedBatchNorm` then leaves padding out of its moments, with
    an example weight and in training; it still normalizes all positions. `recalibrate_`, `evaluate`
    and the others already do this for batches that are dicts with ``mask`` or ``lengths``.

    Args:
        mask: ``(N, *positions)``, true where the input is valid. In layers with maps of another
            size, a position is valid if any input position that it covers is valid.
        lengths: instead of a mask: ``(N,)``, the number of valid positions on the last axis.
        total: with lengths: the length T that examples are padded to.

    Returns:
        A context manager.

    Raises:
        DataError: if an example has no valid position, or a length exceeds ``total``.

    Example:
        >>> from bnfix import GeneralizedBatchNorm
        >>> layer = GeneralizedBatchNorm(2, example_weight=1.0).eval()
        >>> with valid_positions(lengths=[3, 1], total=5):
        ...     layer(torch.ones(2, 2, 5)).abs().max().item()
        0.0
    """
    return mask_used(valid_of(mask, lengths, total))


@contextmanager
def mask_used(valid: Valid | None, beside: Sequence[Tensor] = ()) -> Iterator[None]:
    """Let norm layers use these positions, or all; then check them against the batch's tensors."""
    global _n_set, mask_is_set
    token = _set.set(valid)
    with _lock:
        _n_set, mask_is_set = _n_set + 1, True
    try:
        yield
    finally:
        with _lock:
            _n_set, mask_is_set = _n_set - 1, _n_set > 1
        _set.reset(token)
    if valid is not None:
        valid.refuse_misfit(beside)


def valid_of(mask: Any, lengths: Any, total: int | None) -> Valid:
    """The valid positions from a mask or from lengths, after checks."""
    if mask is not None:
        kind = (getattr(mask, "dtype", type(mask)), *getattr(mask, "shape", ()))
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.ndim < 2:
            raise DataError(
                f"mask: {kind}, expected a bool tensor (N, positions), true where valid. Convert "
                "it with .bool(), or rename it if it means something else."
            )
        return Valid(mask)
    n_valid = torch.as_tensor(lengths)
    if total is None or n_valid.ndim != 1 or n_valid.dtype not in (torch.int64, torch.int32):
        raise DataError(
            f"lengths: {n_valid.dtype} {tuple(n_valid.shape)} for inputs of length {total}, "
            "expected integers (N,) and inputs with a last axis. Give one length per example."
        )
    low, high = (int(n_valid.min()), int(n_valid.max())) if len(n_valid) else (0, 0)
    if low < 0 or high > total:
        raise DataError(
            f"lengths: from {low} to {high}, expected 0 to {total}, the length of the input's "
            "last axis. Give a mask (N, positions) if another axis is padded."
        )
    return Valid(torch.arange(total, device=n_valid.device) < n_valid[:, None], of_last=True)


def current_mask() -> Valid | None:
    """The valid positions of the current batch; compiled and exported layers refuse a mask."""
    if torch.compiler.is_compiling():
        _refuse_compiled()
    return _set.get()


def _refuse_compiled() -> NoReturn:
    # A separate function: torch 2.8 cannot compile a `raise` of this class next to a condition.
    raise NormError(
        "mask: a compiled or exported network uses all positions, padding included. Run the model "
        "uncompiled on batches with a mask, or leave the mask out."
    )


def mask_in(batch: Any) -> dict[str, Any]:
    """The mask or lengths that a batch, or the dict of its inputs, carries."""
    first = batch[0] if isinstance(batch, list | tuple) and batch else None
    if isinstance(batch, list) and batch and isinstance(batch[-1], Mapping):
        first = None  # one dict per example: only the user's function can read it
    for part in (batch, first):
        fields = part if isinstance(part, Mapping) else {}
        if found := {key: fields[key] for key in MASK_KEYS if fields.get(key) is not None}:
            return found
    return {}
