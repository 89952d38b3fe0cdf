"""The walk: all batches pass through a model together and wait for each other at each norm layer.

One forward pass gives every layer the statistics of the whole set, on the inputs it will see in
inference: when the last batch reaches a layer, its statistics are known, and all batches go on.
Each batch has its own thread, but only one thread runs at a time, always in the same order. The
threads serve as coroutines that can pause in the middle of any model's forward pass.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core import distributed, masks, runtime
from bnfix.core.errors import ModelError
from bnfix.core.memory import LiveBytes, free_memory
from bnfix.core.torch_private import has_modes, tree_leaves, tree_map
from bnfix.recalibrate.accumulator import Accumulator
from bnfix.recalibrate.collector import TRACED, Collector, Source, StopHereError, up_to

#: Errors that a network raises for an activation with an unexpected shape.
_OF_SHAPE = (RuntimeError, ValueError, TypeError, AssertionError, LookupError)
#: Most batches that walk together; each has a thread.
_MOST_BATCHES = 256


def default_memory(device: torch.device) -> int:
    """Most bytes of activations to hold: a quarter of the free memory."""
    free = free_memory(device)
    return 1 << 30 if free is None else free // 4


class Walk:
    """One walk of all batches of a source; afterwards its collector holds the measurements."""

    def __init__(self, source: Source, collector: Collector, memory_bytes: int | None) -> None:
        self._source, self._collector = source, collector
        self._device = runtime.device_of(source.model)
        # Limit of activation bytes; the total is estimated from the first batch's.
        self._limit = default_memory(self._device) if memory_bytes is None else memory_bytes
        self._walkers: list[_Walker] = []
        self._running: _Walker | None = None
        self._back = threading.Semaphore(0)
        self._ending = self._impossible = False
        self.disturbed = False  # a batch failed while it ran together with others
        self.first: list[Any] = []  # the first batches, before forward can change them
        self.n_examples = self.n_batches = self.n_steps = 0

    def go(self) -> bool:
        """Walk the batches; return whether all reached the end.

        It fails if the activations do not fit into memory, if batches reach layers in different
        orders, or if a layer's output feeds back into its input. Discard the collector then.
        """
        if self._limit <= 0 or has_modes():
            return False
        source = self._source
        enter = _thread_state(self._device)
        # If the walk is given up, lent buffers are restored with all other state.
        with (
            self._collector.attached(source.model, self._before) as changed,
            # The pool starts threads on demand, and no walker ends before all have begun.
            ThreadPoolExecutor(_MOST_BATCHES) as pool,
        ):
            try:
                distributed.together(lambda: self._start(pool, enter))
                self._step_by_step()
            finally:
                self._end()
        if not self._impossible:
            source.changed.update(dict.fromkeys(changed))
        return not self._impossible

    def _start(self, pool: ThreadPoolExecutor, enter: _State) -> None:
        """Bring every batch to its first norm layer."""
        source = self._source
        batches = source.cost.reading(runtime.pass_of(source.batches, 0))
        for index, batch in enumerate(up_to(batches, source.samples)):
            if index < TRACED:
                # Forward can write to its input.
                copied = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, batch)
                self.first.append(copied)
            walker = _Walker(index, batch)
            if index >= _MOST_BATCHES or not self._fits(walker.size):
                self._impossible = True
                return
            context = contextvars.copy_context()
            walker.done = pool.submit(context.run, self._walk, walker, enter)
            self._walkers.append(walker)
            self._resume(walker)
            if self._impossible:
                return
            n = runtime.n_examples_of(batch)
            self.n_examples, self.n_batches = self.n_examples + n, self.n_batches + (n > 0)

    def _step_by_step(self) -> None:
        """Finalize the layer where all batches wait, on every rank, and run to the next layer."""
        collector, sums = self._collector, self._collector.sums
        while True:
            found = distributed.together(self._look)
            places = {name for name, _, _ in found if name is not None}
            self._impossible = len(places) > 1 or any(impossible for *_, impossible in found)
            if self._impossible or not places:
                break
            name = places.pop()
            if distributed.here().shared:
                sums.measured[name] = self._everyones(name, [state for _, state, _ in found])
            site = collector.by_name[name]
            moments = self._source.target.moments(site, sums.measured[name])
            collector.use[name] = site.as_stored(*moments)
            self.n_steps += 1
            distributed.together(self._go_on)
        n_examples = distributed.gather((self.n_examples, self.n_batches))
        self.n_examples, self.n_batches = map(sum, zip(*n_examples, strict=True))
        if distributed.here().shared and not self._impossible:
            # All ranks already have the same sums; only order and calls must still be merged.
            measured = sums.measured
            sums.set_states_(distributed.gather({**sums.state(), "measured": {}}))
            sums.measured = measured

    def _look(self) -> tuple[str | None, Any, bool]:
        """The layer at which this rank's batches wait, its sums, and whether the walk fails."""
        collector = self._collector
        if self._impossible:
            return None, None, True
        collector.check_finite()
        places = {walker.at.name for walker in self._walkers if walker.at is not None}
        if len(places) != 1:
            return None, None, len(places) > 1
        name = places.pop()
        shared = distributed.here().shared
        return name, collector.sums.measured[name].state(summed=True) if shared else None, False

    def _everyones(self, name: str, sums: Sequence[Any]) -> Accumulator:
        """All ranks' sums at a layer."""
        whole = self._collector.sums
        first, *rest = (whole.of_state(name, part) for part in sums if part is not None)
        return first.merged(rest)

    def _go_on(self) -> None:
        for walker in [walker for walker in self._walkers if walker.at is not None]:
            self._resume(walker)
            if self._impossible:
                return

    def _fits(self, more: int = 0) -> bool:
        """Whether all batches' activations would fit, estimated from the first batch's."""
        if not self._walkers:
            return True
        first, sizes = self._walkers[0], more + sum(walker.size for walker in self._walkers)
        return first.live.bytes * (sizes / max(1, first.size)) <= self._limit

    def _resume(self, walker: _Walker) -> None:
        """Let one batch run until it waits again or ends."""
        self._collector.new_batch(walker.index)
        self._running, walker.at = walker, None
        with self._source.cost.of("forward"):
            walker.go.release()
            self._back.acquire()
        self._running = None
        if walker.at is not None:
            # Not in the batch's thread: many small sums need torch's worker threads awake.
            with self._source.cost.of("statistics"):
                self._collector.measure(walker.at, walker.x, walker.valid)
            walker.x = None
        if walker.is_over:
            error = walker.done.exception()
            # Alone the batch can succeed; if it does not, the later passes raise the error again.
            cause = error.__cause__ if isinstance(error, ModelError) else None
            if isinstance(cause, _OF_SHAPE) and len(self._walkers) > 1:
                self.disturbed = self._impossible = True
            elif error is not None:
                raise error
        if walker.index == 0 and not self._fits():
            self._impossible = True

    def _end(self) -> None:
        """End all threads one by one, first the thread that may still be running."""
        self._ending = True
        for walker in sorted(self._walkers, key=lambda walker: walker is not self._running):
            walker.go.release()
            wait([walker.done])

    def _walk(self, walker: _Walker, enter: _State) -> None:
        """Run a batch in its thread."""
        walker.go.acquire()
        try:
            if not self._ending:
                with enter(), walker.live if walker.index == 0 else nullcontext():
                    source = self._source
                    runtime.run(source.model, walker.batch, self._device, source.forward)
        except StopHereError:
            pass
        finally:
            walker.is_over, walker.batch = True, None
            self._back.release()

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Wait until every batch is measured, then lend the layer its final moments; a pre-hook."""
        collector, walker = self._collector, self._running
        site = collector.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        if walker is None or self._ending:
            raise StopHereError
        if x.numel():
            if site.name in collector.use:
                self._impossible = True
                raise StopHereError
            walker.at, walker.x, walker.valid = site, x, masks.current_mask()
            del x
            self._back.release()
            walker.go.acquire()
            if self._ending:
                raise StopHereError
        if site.name in collector.use:
            collector.lend(module, collector.use[site.name])


class _Walker:
    """A batch and the layer at which it waits."""

    def __init__(self, index: int, batch: Any) -> None:
        self.index, self.batch = index, batch
        plain = dict(batch) if isinstance(batch, Mapping) else batch
        tensors = [leaf for leaf in tree_leaves(plain) if isinstance(leaf, Tensor)]
        self.size = sum(tensor.numel() for tensor in tensors) or 1
        self.at: Any = None
        self.x: Any = None
        self.valid: masks.Valid | None = None  # read in the batch's own thread
        self.is_over = False
        self.go = threading.Semaphore(0)
        self.done: Future[None]
        self.live = LiveBytes(sum(tensor.numel() * tensor.itemsize for tensor in tensors))


_State = Callable[[], AbstractContextManager[None]]


def _thread_state(device: torch.device) -> _State:
    """Torch's per-thread state, to be entered in another thread."""
    kind = device.type
    enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    cached, inference = torch.is_autocast_cache_enabled(), torch.is_inference_mode_enabled()
    stream = torch.cuda.current_stream(device) if kind == "cuda" else None

    @contextmanager
    def enter() -> Iterator[None]:
        autocast = torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached)
        on_stream = nullcontext() if stream is None else torch.cuda.stream(stream)
        with torch.inference_mode(inference), torch.no_grad(), autocast, on_stream:
            yield

    return enter
