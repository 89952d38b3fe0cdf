"""Memory: the batch size that fits (estimated from one or two examples, then halved).

It also keeps freed memory for later use.
"""

from __future__ import annotations

import ctypes
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import ModelError
from bnfix.core.torch_private import DispatchMode, eager, tree_leaves, tree_map

_T = TypeVar("_T")
_GIB = 1 << 30
#: From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
#: The share of free memory that a batch may use by the estimate. Temporary memory inside
#: operations is not in the estimate; measured processes grew by 1.0 to 1.6 times the estimate.
_PART = 0.5
#: Files with a container's memory limit, use and details, and the entry for droppable file cache.
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        "total_inactive_file",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of a forward pass without the weights, and free bytes."""

    fixed: int  # independent of the batch size
    an_example: int  # added by each example
    free: int

    def of(self, n: int) -> int:
        """The estimated peak bytes for a batch of n examples."""
        return self.fixed + n * self.an_example


class BatchSize:
    """A batch size that shrinks when memory is short, and adds a note about it."""

    def __init__(
        self, size: int, what: str, notes: list[str], *, gives_way: bool = True, remark: str = ""
    ) -> None:
        self.size, self._wanted, self._what, self._notes = size, size, what, notes
        self._gives_way, self._remark = gives_way, remark
        self._said = ""

    def foresee(self, footprint: Footprint | None) -> None:
        """Halve the size until the estimate fits; all ranks must call it."""
        size = self.size
        if footprint is not None and self._gives_way:
            while size > 1 and footprint.of(size) > _PART * footprint.free:
                size = -(-size // 2)
        smallest = min(distributed.gather(size))
        if smallest == self.size:
            return
        why = "another process has too little memory for more"
        if footprint is not None and size < self.size:
            held, free = (n / _GIB for n in (footprint.of(self.size), footprint.free))
            why = (
                f"a forward pass of {self.size} would need about {held:.3g} GiB besides the "
                f"weights, more than half of the {free:.3g} GiB of free memory"
            )
        self._shrink(smallest, why)

    def run(self, work: Callable[[int], _T]) -> _T:
        """Call `work` with this size, and halve the size while memory does not suffice."""
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError:
                if self.size == 1 or not self._gives_way or distributed.here().shared:
                    raise
            # Outside the except block: the error, which kept the failed pass alive, is freed.
            torch.cuda.empty_cache()
            self._shrink(-(-self.size // 2), f"{self.size} at once did not fit in memory")

    def _shrink(self, size: int, why: str) -> None:
        if self._said in self._notes:
            self._notes.remove(self._said)
        self._said = (
            f"{self._what}: batches of {size} instead of {self._wanted}, since {why}{self._remark}."
        )
        self._notes.append(self._said)
        self.size = size


def footprint(
    model: nn.Module, batch: Any, precision: str = "fp32", memory_bytes: int | None = None
) -> Footprint | None:
    """Estimate a model's forward memory from one or two examples; ``None`` if it is unknown."""
    free = free_memory(runtime.device_of(model)) if memory_bytes is None else memory_bytes
    if free is None:
        return None
    try:
        one, _ = _peak(model, first_of(batch, 1), precision)
        two, n = _peak(model, first_of(batch, 2), precision)
    except ModelError:
        return None
    # Two examples show the growth with the batch; with one, all of it counts as growth.
    growth = max(1, two - one) if n == 2 else one
    return Footprint(max(0, one - growth), growth, free)


def first_of(batch: Any, n: int) -> Any:
    """The first examples of a batch of any form."""

    def cut(leaf: Any) -> Any:
        return leaf[:n] if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim else leaf

    return tree_map(cut, batch)


def _peak(model: nn.Module, batch: Any, precision: str) -> tuple[int, int]:
    """The peak bytes of a forward pass, and its number of examples."""
    device, n = runtime.device_of(model), runtime.n_examples_of(batch)
    already = sum(t.numel() * t.itemsize for t in runtime.tensors_in(batch))
    with (
        guards.seeded(0),
        guards.inference(model),
        eager(),
        runtime.autocast(device, precision),
        LiveBytes(already) as live,
    ):
        runtime.run(model, batch, device)
    return live.peak, n


def free_memory(device: torch.device, system: Path = Path("/")) -> int | None:
    """The bytes that this process can still allocate, or ``None`` if that is unknown."""
    if device.type == "cuda":
        # Memory that torch has reserved and does not use is available too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    # MemAvailable, not MemFree: the system drops cached files when memory is short.
    kib = _numbers(system / "proc/meminfo").get("MemAvailable:")
    containers = (_of_container(system / "sys/fs/cgroup", *names) for names in _CONTAINERS)
    answers = [n for n in (kib and 1024 * kib, *containers) if n is not None]
    return max(0, min(answers)) // distributed.here().per_machine if answers else None


def _of_container(folder: Path, limit: str, used: str, details: str, droppable: str) -> int | None:
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
    except (OSError, ValueError):  # no container, or one without a limit
        return None
    return most - now + _numbers(folder / details).get(droppable, 0)


def _numbers(path: Path) -> dict[str, int]:
    """The numbers in a system file of names and numbers, by name."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


class LiveBytes(DispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of live tensors that were created inside, and their peak."""

    def __init__(self, already: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = already
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A tensor from before the pass does not count, even if the pass holds a view of it.
        for storage in _storages((args, kwargs)):
            self._hold(storage, 0)
        made = func(*args, **(kwargs or {}))
        for storage in _storages(made):
            self._hold(storage, storage.nbytes())
        return made

    def _hold(self, storage: Any, n: int) -> None:
        key = id(storage)  # torch keeps one object for as long as the storage lives
        if key in self._known and self._known[key]() is not None:
            return
        self.bytes += n
        self.peak = max(self.peak, self.bytes)

        def drop(_: Any) -> None:
            self.bytes -= n
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, drop)


def _storages(nest: Any) -> list[Any]:
    leaves = [leaf for leaf in tree_leaves(nest) if isinstance(leaf, Tensor)]
    return [leaf.untyped_storage() for leaf in leaves if leaf.layout == torch.strided]


def keep_freed_memory() -> None:
    """Let glibc keep freed memory for reuse; programs call it at start, libraries should not.

    A CPU run frees and allocates activations layer by layer. By default glibc maps and unmaps each
    large one, and the first touch of fresh pages can cost more than the arithmetic. All threads
    share one arena: an arena per thread holds up to 64 MiB and maps larger pieces regardless of
    the threshold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
