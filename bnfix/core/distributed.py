"""Several processes that work as one: the only module that uses torch.distributed.

All other code is written for one process. A function measures its own batches, then gathers the
results of all ranks here, in rank order. Every rank continues with the same numbers and makes the
same decisions. Nothing is gathered before `joined` is entered: a program that uses
torch.distributed for its own purposes, and calls bnfix on one rank, is left alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bnfix.core import guards
from bnfix.core.errors import BnfixError, ConfigError, ProcessError, plain
from bnfix.core.torch_private import default_store

T = TypeVar("T")

#: Ranks wait for each other at most this long; a dead rank is noticed at once.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Place:
    """The rank of this process, and the number of processes that work together."""

    rank: int = 0
    size: int = 1
    on_machine: int = 0  # rank within the machine
    per_machine: int = 1  # processes that share this machine and its memory

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and prints to the terminal."""
        return self.rank == 0

    @property
    def shared(self) -> bool:
        """Whether there are other processes."""
        return self.size > 1


_ALONE = Place()
_here = _ALONE
#: The store that this launch shares (it outlives each process group), and the joins so far.
_store: Any = None
_n_joined = 0


def here() -> Place:
    """The place of this process among the processes that work together."""
    return _here


def launched() -> Place:
    """The place that the launcher (torchrun) gives this process, before it joins the others."""
    names = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
    try:
        place = Place(*(int(os.environ.get(name, default)) for name, default in names.items()))
    except ValueError as error:
        raise ConfigError(f"environment: {', '.join(names)}: {error}.") from error
    if not 0 <= place.rank < place.size:
        raise ConfigError(
            f"environment: RANK {place.rank} of WORLD_SIZE {place.size}. Start with torchrun."
        )
    return place


def speaks() -> bool:
    """Whether this process is the one in its launch that prints to the terminal."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Place]:
    """Work together with the other processes of this launch, or alone if there are none.

    Inside, `recalibrate_`, `evaluate`, `choose_example_weight_` and `finetune_` use the batches of
    all ranks: each rank gives its own batches, and all ranks get the same result.
    """
    global _here, _n_joined, _store
    place = launched()
    if not place.shared or _here.shared:
        yield _here
        return
    owns = not dist.is_initialized()
    if owns:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(place.on_machine % torch.cuda.device_count())
        try:
            if _store is None:
                found = dist.rendezvous("env://", timeout=_PATIENCE)  # type: ignore[attr-defined]
                _store = next(iter(found))[0]
                _store.set_timeout(_PATIENCE)
            # Under the same keys, a second group would find values that the first left behind.
            # And gloo prints to standard output, where a command may write its JSON result.
            with guards.stdout_to_stderr():
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if on_gpu else "gloo",
                    store=dist.PrefixStore(f"bnfix/{_n_joined}", _store),  # type: ignore[attr-defined]
                    rank=place.rank,
                    world_size=place.size,
                    timeout=_PATIENCE,
                )
            _n_joined += 1
        except (RuntimeError, ValueError) as error:
            raise ProcessError(
                f"processes: rank {place.rank} cannot reach the others ({plain(error, 120)}). "
                "Start with torchrun."
            ) from error
    _here = place
    try:
        yield place
        # Only on success: other ranks may still wait for a failed one, so this call would hang.
        if owns:
            dist.destroy_process_group()
    finally:
        _here = _ALONE


def gather(value: T) -> list[T]:
    """The values of all ranks, on every rank."""
    if not _here.shared:
        return [value]
    found: list[Any] = [None] * _here.size
    _with_others(lambda: dist.all_gather_object(found, value))
    return found


def together(work: Callable[[], T]) -> list[T]:
    """Call a function on every rank; an error on one rank is raised on all."""
    if not _here.shared:
        return [work()]
    error: BnfixError | None = None
    value: Any = None
    try:
        value = work()
    except BnfixError as own:
        error = own
    found = gather((value, error))
    for rank, (_, theirs) in enumerate(found):
        if theirs is not None:
            raise theirs from (error if rank == _here.rank else None)
    return [value for value, _ in found]


def in_step(batches: Iterable[T]) -> Iterator[T | None]:
    """This rank's batches, then ``None`` until every rank has run out of batches."""
    if not _here.shared:
        yield from batches
        return
    iterator = iter(batches)
    while True:
        batch = next(iterator, None)
        more = torch.tensor([float(batch is not None)])
        sum_([more])
        if not float(more):
            return
        yield batch


@torch.no_grad()
def sum_(tensors: Sequence[Tensor]) -> None:
    """Sum tensors over the ranks, in place."""
    if not _here.shared or not tensors:
        return
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    _with_others(lambda: dist.all_reduce(flat))
    for tensor, part in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))


def backward_(
    losses: Sequence[Callable[[], Tensor]], counts: Sequence[int], tensors: Iterable[Tensor]
) -> float:
    """Set ``grad`` to the gradient of the mean loss over the examples of all ranks."""
    wanted = list(tensors)
    for tensor in wanted:
        tensor.grad = None

    def own() -> float:
        value = 0.0
        for loss, n in zip(losses, counts, strict=True):
            if n:
                summed = loss() * n
                summed.backward()  # type: ignore[no-untyped-call]
                value += float(summed.detach())
        return value

    parts = together(lambda: (own(), sum(counts)))
    n_examples = max(1, sum(n for _, n in parts))
    gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in wanted]
    kinds: dict[Any, list[Tensor]] = {}
    for gradient in gradients:
        kinds.setdefault((gradient.dtype, gradient.device), []).append(gradient)
    for kind in kinds.values():
        sum_(kind)
    for tensor, gradient in zip(wanted, gradients, strict=True):
        tensor.grad = gradient.div_(n_examples)
    return sum(value for value, _ in parts) / n_examples


def interleaved(parts: Sequence[Sequence[T]]) -> list[T]:
    """Rebuild a sequence whose items were dealt to the parts one by one."""
    longest = max(map(len, parts), default=0)
    return [part[k] for k in range(longest) for part in parts if k < len(part)]


def first_to_fail() -> bool:
    """Whether this process is the first to fail, and so the one that reports the error."""
    if not _here.shared:
        return True
    try:
        store = default_store()
        if store is None:
            return _here.is_first
        mine = str(_here.rank)
        return str(store.compare_set("bnfix/failed", "", mine), "ascii") == mine
    except (RuntimeError, ValueError):
        return _here.is_first


def _with_others(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        raise ProcessError(
            f"processes: rank {_here.rank} lost the others ({plain(error, 120)}). One of them has "
            "ended; nothing was written."
        ) from error
