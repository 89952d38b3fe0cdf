"""Whether a batch fits the memory: measured on one example, and halved until it does.

And whether freed memory is kept for what comes next.
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
#: Of the free memory that a batch may be estimated to hold. What operations use inside themselves
#: is not in the estimate; processes were seen to grow by 1.0 to 1.6 times as much.
_PART = 0.5
#: Limit, use and details of a container's memory, and what in it is files that can be dropped.
_CONTAINERS = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat",
        "total_inactive_file",
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """Bytes that a forward pass holds at its peak besides the weights, and bytes that are free."""

    fixed: int  # whatever the batch
    an_example: int  # more with each example
    free: int

    def of(self, n: int) -> int:
        """The bytes that a batch is estimated to hold."""
        return self.fixed + n * self.an_example


class BatchSize:
    """A batch size that gives way where the memory does not suffice, and says so."""

    def __init__(
        self, size: int, what: str, notes: list[str], *, gives_way: bool = True, remark: str = ""
    ) -> None:
        self.size, self._wanted, self._what, self._notes = size, size, what, notes
        self._gives_way, self._remark = gives_way, remark
        self._said = ""

    def foresee(self, footprint: Footprint | None) -> None:
        """Halve the size until it is estimated to fit; a collective call."""
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
                f"a forward pass of {self.size} would hold about {held:.3g} GiB besides the "
                f"weights, more than half of the {free:.3g} GiB that are free"
            )
        self._shrink(smallest, why)

    def run(self, work: Callable[[int], _T]) -> _T:
        """Do something in batches of this size, or of the largest half of it that fits."""
        while True:
            try:
                return work(self.size)
            except torch.OutOfMemoryError:
                if self.size == 1 or not self._gives_way or distributed.here().shared:
                    raise
            # Out here the failed pass, which the error held on to, is gone.
            torch.cuda.empty_cache()
            self._shrink(-(-self.size // 2), f"{self.size} at once did not fit the memory")

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
    """Estimate what forward passes of a model hold, from one or two examples; ``None``: unknown."""
    free = free_memory(runtime.device_of(model)) if memory_bytes is None else memory_bytes
    if free is None:
        return None
    try:
        one, _ = _peak(model, first_of(batch, 1), precision)
        two, n = _peak(model, first_of(batch, 2), precision)
    except ModelError:
        return None
    # Two show what grows with the batch; where there is only one, all of it may.
    growth = max(1, two - one) if n == 2 else one
    return Footprint(max(0, one - growth), growth, free)


def first_of(batch: Any, n: int) -> Any:
    """The first examples of a batch of any form."""

    def cut(leaf: Any) -> Any:
        return leaf[:n] if isinstance(leaf, Tensor | np.ndarray) and leaf.ndim else leaf

    return tree_map(cut, batch)


def _peak(model: nn.Module, batch: Any, precision: str) -> tuple[int, int]:
    """Most bytes held in a forward pass, and its examples."""
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
    """Bytes that this process could still take, where the system says so."""
    if device.type == "cuda":
        # What torch has taken from the system and does not use is there for the taking too.
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + kept
    # Not only what nothing is in: files that are kept in memory make room.
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
    """The numbers of a file of names and numbers, as the system writes them."""
    try:
        rows = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdecimal()}


class LiveBytes(DispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors made inside it that are still held, and the most there were."""

    def __init__(self, already: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.peak = already
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # What was there before is not held by the pass, even if a view of it is.
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
    """Let glibc keep freed memory for reuse; for a program's start, a library should not decide it.

    Activations of a CPU run are freed and taken again layer by layer; by default glibc maps and
    unmaps each large one, and first touches of fresh pages can cost more than the arithmetic.
    Threads share one arena, since those of their own hold up to 64 MiB and map larger pieces
    whatever the threshold.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)
