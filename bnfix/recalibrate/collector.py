"""Hooks that measure what norm layers meet, and hand them the moments to normalize by."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfix.core import distributed, runtime
from bnfix.core.errors import DataError, NormError, NumericError
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.norm.moments import mix, over_channel_groups
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Accumulator, Sums, precise_moments

_T = TypeVar("_T")

#: Numbers that may wait, by device, to be looked at for what is not finite: a look makes the host
#: wait for the device, which on a CPU costs nothing.
UNCHECKED = {"cpu": 0, "cuda": 1 << 22}
#: Batches, from the first, whose moments a walk keeps, to compare them with those batches alone.
TRACED = 2
#: Examples after which a source without a length may be one without an end.
MOST_UNCOUNTED = 100_000


@dataclass
class Cost:
    """Seconds of one process, summed over passes; what is left to the whole is none of these.

    By the host's clock, without waiting for the device: CUDA's time is counted where the host waits
    for it, mostly under ``forward``.
    """

    data: float = 0.0  # waiting for batches: reading, decoding, scaling
    forward: float = 0.0  # the network, its layers' normalizing included
    statistics: float = 0.0  # measuring what the norm layers meet, and adding it up

    def reading(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Go through batches, and count the time that each is waited for."""
        started = time.perf_counter()
        iterator = iter(batches)
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            finally:
                self.data += time.perf_counter() - started
            yield batch
            del batch  # not held while the next one is read
            started = time.perf_counter()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is done inside as forward passes, less the statistics measured meanwhile."""
        started, before = time.perf_counter(), self.statistics
        try:
            yield
        finally:
            self.forward += time.perf_counter() - started - (self.statistics - before)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count what is done inside as statistics."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.statistics += time.perf_counter() - started


@dataclass(frozen=True)
class Source:
    """The model and the batches that passes run over, and what the passes leave behind."""

    model: nn.Module
    batches: runtime.Batches
    forward: runtime.Forward | None = None
    samples: int | None = None  # of this rank
    train_batch_size: int | None = None  # of the train-batch target
    cost: Cost = field(default_factory=Cost)
    #: Buffers and attributes that forward passes changed by themselves.
    changed: dict[str, None] = field(default_factory=dict)


class StopHereError(BaseException):
    """Ends a shortened forward pass at the layer measured; no `except Exception` may catch it."""


class Collector:
    """Hooks on the sites: measure inputs; decide what each layer normalizes by."""

    def __init__(
        self, sites: Sequence[NormSite], cost: Cost, *, by_batch: bool, is_strict: bool = False
    ) -> None:
        self.sites = {id(site.module): site for site in sites}
        self.by_name = {site.name: site for site in sites}
        self.sums = Sums({site.name: device_of_site(site) for site in sites})
        self.by_batch = by_batch
        self.use: dict[str, tuple[Tensor, Tensor]] = {}
        #: Layers to measure, all by default, and whether a pass ends at the first of them.
        self.wanted: frozenset[str] | None = None
        self.stops = False
        #: Moments of the first batches, call by call.
        self.traces: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        self._cost = cost
        self._checks = _Checks(is_strict)
        self._batch_index = 0
        self._own: dict[int, tuple[Any, Any]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a layer's input and hand it the moments to use; a forward pre-hook."""
        site = self.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        use = self.use.get(site.name)
        if (self.wanted is None or site.name in self.wanted) and x.numel():
            mean, var = self.measure(site, x)
            if self.stops:
                raise StopHereError
            if self.by_batch:
                use = as_stored(site, mean, var)
        if use is not None:
            self.lend(module, use)

    def lend(self, module: nn.Module, moments: tuple[Tensor, Tensor]) -> None:
        """Let a layer normalize by these moments until its forward pass is over."""
        buffers = module._buffers
        self._own[id(module)] = buffers["running_mean"], buffers["running_var"]
        buffers["running_mean"], buffers["running_var"] = moments

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give a layer its own buffers back; a forward hook."""
        own = self._own.pop(id(module), None)
        if own is not None:
            module._buffers["running_mean"], module._buffers["running_var"] = own

    def new_batch(self, index: int) -> None:
        """Calls from now on belong to this batch."""
        self._batch_index = index
        self.sums.new_batch()

    def measure(self, site: NormSite, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count a call and add its input to the layer's sums; return the input's own moments."""
        with self._cost.measuring():
            return self._measured(site, x)

    def _measured(self, site: NormSite, x: Tensor) -> tuple[Tensor, Tensor]:
        sums, index = self.sums, self._batch_index
        sums.count(site.name)
        values = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        own = site.module._buffers["running_mean"]
        if own is None or own.shape != values.shape[1:2]:
            raise NormError(
                f"{site.name}: its input has shape {tuple(x.shape)}, but it keeps statistics of "
                f"shape {None if own is None else tuple(own.shape)}. Leave it with skip.",
                name=site.name,
            )
        # Pooled example by example: the spread of a group's means is not the mean of the spreads.
        mean, var = over_groups(site, *precise_moments(values))
        mixed = mix(mean, var, dim=0)
        sums.most_examples = max(sums.most_examples, len(values))
        if index < TRACED and not self.by_batch:
            self.traces.setdefault(index, []).append((site.name, *mixed))
        self._checks.add(index, site.name, mean, var, mixed[1])
        if site.name not in sums.measured:
            sums.measured[site.name] = Accumulator(mixed[0])
        sums.measured[site.name].add(mean, var, values.shape[2])
        is_single = len(values) * values.shape[2] == 1
        self._checks.refuse_single(site.name, index, is_single, len(sums.measured))
        return mixed

    def check_finite(self, at_most: int = 0) -> None:
        """Raise if an input was not finite; numbers that wait for it may be left for later."""
        self._checks.check_finite(at_most)


class _Checks:
    """What is refused of inputs: values that are not finite, one value a channel by itself."""

    def __init__(self, is_strict: bool) -> None:
        self._is_strict = is_strict
        self._calls: list[tuple[int, str, Tensor, Tensor, Tensor]] = []
        self._n_waiting = 0
        self._single: tuple[str, int] | None = None

    def add(self, index: int, name: str, mean: Tensor, var: Tensor, mixed_var: Tensor) -> None:
        """Remember a call, to be looked at later: a look makes the host wait for the device."""
        self._calls.append((index, name, mean, var, mixed_var))
        self._n_waiting += 2 * mean.numel()

    def refuse_single(self, name: str, index: int, is_single: bool, n_layers: int) -> None:
        """Refuse batches that give a layer one value a channel, if another layer is above it."""
        if is_single and self._single is None:
            self._single = name, index
        if self._is_strict and self._single is not None and n_layers > 1:
            name, index = self._single
            raise NormError(
                f"{name}: gets one value a channel in batch {_of_all(index)} (counted from 0), "
                "which under the batch feed is normalized to 0. Give larger batches, also at the "
                "end, or the sequential feed (--feed sequential).",
                name=name,
            )

    def check_finite(self, at_most: int) -> None:
        """One synchronization for all calls since the last check."""
        if self._n_waiting <= at_most:
            return
        calls, self._calls, self._n_waiting = self._calls, [], 0
        # What is not finite in any example is not finite in the mixture either.
        if bool(torch.cat([mixed for *_, mixed in calls]).isfinite().all()):
            return
        index, name, mean, var, _ = next(c for c in calls if not bool(c[-1].isfinite().all()))
        bad = ~(mean + var).isfinite().all(1)
        raise NumericError(
            f"{name}: its input, or the square of it, is not finite in batch {_of_all(index)}, "
            f"example {int(bad.int().argmax())} (both counted from 0). Leave that example out, or "
            "use fp32.",
            name=name,
        )


def over_groups(site: NormSite, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped layers pool their moments, and repeat them over the group's channels."""
    if isinstance(site.module, GeneralizedBatchNorm):
        return over_channel_groups(mean, var, site.module.channel_groups)
    return mean, var


def as_stored(site: NormSite, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments as the layer's buffers hold them."""
    own: Any = site.module._buffers["running_mean"]
    return mean.to(own), var.to(own)


def device_of_site(site: NormSite) -> torch.device:
    """Where a layer's statistics are."""
    own: Any = site.module._buffers["running_mean"]
    return torch.device("cpu") if own is None else own.device


def up_to(batches: Iterable[Any], samples: int | None, most: int | None = None) -> Iterator[Any]:
    """Batches until this number of examples is reached; more than ``most`` are refused."""
    n_examples = 0
    if samples is not None and samples <= 0:
        return
    for batch in batches:
        if most is not None and n_examples >= most:
            raise DataError(
                f"batches: {n_examples:,} examples from a source without a length, and no end. "
                "Give samples=, the number of examples to use; if it has an end, any larger number."
            )
        yield batch
        n_examples += runtime.n_examples_of(batch)
        if samples is not None and n_examples >= samples:
            return


def _of_all(index: int) -> int:
    """The place of a batch among those of all ranks, dealt one by one."""
    place = distributed.here()
    return index * place.size + place.rank
