"""Several processes that work as one: the only door to torch.distributed.

Everything else is written for one process. What a function measures on its own batches it gathers
from all ranks here, in the order of the ranks, so that every rank goes on with the same numbers and
comes to the same decisions. Nothing is gathered before `joined` is entered: a program that uses
torch.distributed for itself, and calls bnfix on one rank, is left alone.
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

#: Ranks wait for each other at most this long; one that died is noticed at once.
_PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Place:
    """This process among those that work together."""

    rank: int = 0
    size: int = 1
    on_machine: int = 0  # its rank among those of its machine
    per_machine: int = 1  # how many share this machine and its memory

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and speaks to the terminal."""
        return self.rank == 0

    @property
    def shared(self) -> bool:
        """Whether there are others."""
        return self.size > 1


_ALONE = Place()
_here = _ALONE
#: Where the processes of this launch meet, and how often they have; it outlives each group.
_store: Any = None
_n_joined = 0


def here() -> Place:
    """This process among those that work together."""
    return _here


def launched() -> Place:
    """This process as the launcher (torchrun) describes it, before it has joined the others."""
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
    """Whether this process is the one of its launch that speaks to the terminal."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined() -> Iterator[Place]:
    """Work together with the other processes of this launch; alone where there are none.

    Inside, `recalibrate_`, `evaluate`, `choose_example_weight_` and `finetune_` take the batches of
    all ranks together: each rank gives its own, and all get the same answer.
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
            # A group made a second time would meet what the first has left under the same keys.
            # And gloo prints, where a result as JSON may be on standard output.
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
        # Only now: others may wait for one that has failed, and would never be left.
        if owns:
            dist.destroy_process_group()
    finally:
        _here = _ALONE


def gather(value: T) -> list[T]:
    """One value of each rank, on all of them."""
    if not _here.shared:
        return [value]
    found: list[Any] = [None] * _here.size
    _with_others(lambda: dist.all_gather_object(found, value))
    return found


def together(work: Callable[[], T]) -> list[T]:
    """Do something on every rank; an error of one is an error of all."""
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
    """This rank's batches; it ends, on all ranks at once, when every rank's have ended."""
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
    """Set ``grad`` of the tensors to that of the mean loss over the examples of all ranks."""
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
    """Put together again, in order, a sequence that was dealt one by one."""
    longest = max(map(len, parts), default=0)
    return [part[k] for k in range(longest) for part in parts if k < len(part)]


def first_to_fail() -> bool:
    """Whether this process is the first to end with an error, so that it should say so."""
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
