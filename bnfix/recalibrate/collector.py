"""Hooks that measure what norm layers meet, and hand them the moments to normalize by.

Where a layer's output comes back to its input, those moments are a fixed point, found by passes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from bnfix.core import distributed, guards, masks, runtime
from bnfix.core.errors import DataError, NormError, NumericError
from bnfix.core.torch_private import eager
from bnfix.norm.mixture import centred
from bnfix.norm.moments import masked_moments, mix, shares
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Accumulator, Sources, Sums, precise_moments

_T = TypeVar("_T")
_Moments = dict[str, tuple[Tensor, Tensor]]

#: Passes at most, and one more for each layer of the loop.
_ROUNDS = 40
#: Change of the moments, in units of sqrt(var + eps) and relative, below which they have settled;
#: in mixed steps, which end among the rounding errors of float32.
_SETTLED, _SETTLED_MIXED = 1e-7, 1e-6
#: A round that leaves more than this part of the change is no progress.
_PROGRESS = 0.5
#: Rounds that a mixed step is made of; the least part of the change that it takes.
_MEMORY, _LEAST_PART = 8, 1 / 32
#: Most that a mixed step changes the logarithm of a variance.
_MOST_LOG = 2.0

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

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count what is done inside as one part, less the statistics measured meanwhile."""
        started, before = time.perf_counter(), self.statistics
        try:
            yield
        finally:
            seconds = time.perf_counter() - started - (self.statistics - before)
            setattr(self, part, getattr(self, part) + seconds)

    def reading(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Go through batches, and count the time that each is waited for."""
        end: Any = object()
        with self.of("data"):
            iterator = iter(batches)
        while True:
            with self.of("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch
            del batch  # not held while the next one is read


class Target:
    """Which moments a layer gets by what it meets: those of all values, or of training batches."""

    screen: Any = None  # `Screen` of examples, of which not all count

    def __init__(self, batch_size: int | None = None, sources: Sources | None = None) -> None:
        self.batch_size = batch_size  # of training; None for all values
        self.sources = sources  # of examples that are weighed apart
        self.name = "population" if batch_size is None else f"train-batch {batch_size}"
        #: Channels, by layer, that a rule does not fit, so that they get other moments.
        self.unmatched: dict[str, int] = {}
        #: Of a mixture, by layer: the weight of what was measured, a mean over the channels.
        self.weights: dict[str, float] = {}

    def measure_(self, source: Source, run: Callable[[Source, Collector], Any]) -> float:
        """Measure what the rule needs beside the model, by passes; return how many it took."""
        return 0.0

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """The layer's new mean and variance ``(C,)``, float64."""
        return sums.statistics(self.batch_size)


@dataclass(frozen=True)
class Source:
    """The model and the batches that passes run over, and what the passes leave behind."""

    model: nn.Module
    batches: runtime.Batches
    forward: runtime.Forward | None = None
    samples: int | None = None  # of this rank
    target: Target = field(default_factory=Target)
    cost: Cost = field(default_factory=Cost)
    #: Buffers and attributes that forward passes changed by themselves.
    changed: dict[str, None] = field(default_factory=dict)


class StopHereError(BaseException):
    """Ends a shortened forward pass at the layer measured; no `except Exception` may catch it."""


class Collector:
    """Hooks on the sites: measure inputs; decide what each layer normalizes by."""

    def __init__(
        self,
        sites: Sequence[NormSite],
        source: Source,
        *,
        by_batch: bool = False,
        is_strict: bool = False,
    ) -> None:
        self.sites = {id(site.module): site for site in sites}
        self.by_name = {site.name: site for site in sites}
        own: Any = {site.name: site.module._buffers["running_mean"] for site in sites}
        devices = {name: mean.device for name, mean in own.items()}
        self.sums = Sums(devices, source.target.sources, source.target.screen)
        self.by_batch = by_batch
        self.use: dict[str, tuple[Tensor, Tensor]] = {}
        #: Layers to measure, all by default, and whether a pass ends at the first of them.
        self.wanted: frozenset[str] | None = None
        self.stops = False
        #: Moments of the first batches, call by call.
        self.traces: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        self._cost, self._is_strict = source.cost, is_strict
        self._batch_index = 0
        self._own: dict[int, tuple[Any, Any]] = {}
        #: Calls to be looked at later: a look makes the host wait for the device.
        self._unchecked: list[tuple[int, str, Tensor, Tensor, Tensor]] = []
        self._n_unchecked = 0
        #: The first layer, and batch, to get one value a channel.
        self._single: tuple[str, int] | None = None

    @contextmanager
    def attached(
        self, model: nn.Module, before: Callable[..., None] | None = None
    ) -> Iterator[list[str]]:
        """Put hooks on the sites, in evaluation; what forward has changed is listed at the end."""
        with (
            guards.inference(model) as changed,
            guards.hooks() as handles,
            # Hooks that raise and swap buffers are nothing to compile; the model may be compiled.
            eager(),
        ):
            for module in [site.module for site in self.sites.values()]:
                hook = before or self.before
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(module.register_forward_hook(self.after, always_call=True))
            yield changed

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a layer's input and hand it the moments to use; a forward pre-hook."""
        site = self.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        use = self.use.get(site.name)
        if (self.wanted is None or site.name in self.wanted) and x.numel():
            with self._cost.of("statistics"):
                moments = self.measure(site, x, masks.current_mask())
            if self.stops:
                raise StopHereError
            use = site.as_stored(*moments) if self.by_batch else use
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

    def measure(
        self, site: NormSite, x: Tensor, valid: masks.Valid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Count a call and add its input to the layer's sums; return the input's own moments."""
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
        count: Tensor | None = None
        n_values = len(values) * values.shape[2]
        if valid is None:
            mean, var = precise_moments(values)
        else:
            mean, var, count = masked_moments(values.double(), valid.fitted(x, site.name))
            n_values = int(count.sum())
        # Pooled example by example: the spread of a group's means is not the mean of the spreads.
        mean, var = site.over_groups(centred(site.module, mean), var)
        mixed = mix(mean, var, None if count is None else shares(count), dim=0)
        sums.most_examples = max(sums.most_examples, len(values))
        if index < TRACED and not self.by_batch:
            self.traces.setdefault(index, []).append((site.name, *mixed))
        self._unchecked.append((index, site.name, mean, var, mixed[1]))
        self._n_unchecked += 2 * mean.numel()
        if site.name not in sums.measured:
            sums.measured[site.name] = sums.begun(mixed[0])
        sums.add(site.name, index, (mean, var, count), values.shape[2])
        if n_values == 1 and self._single is None:
            self._single = site.name, index
        if self._is_strict and self._single is not None and len(sums.measured) > 1:
            name, index = self._single
            raise NormError(
                f"{name}: gets one value a channel in batch {_of_all(index)} (counted from 0), "
                "which under the batch feed is normalized to 0. Give larger batches, also at the "
                "end, or the sequential feed (--feed sequential).",
                name=name,
            )
        return mixed

    def check_finite(self, at_most: int = 0) -> None:
        """Raise if an input was not finite; numbers that wait for it may be left for later."""
        if self._n_unchecked <= at_most:
            return
        calls, self._unchecked, self._n_unchecked = self._unchecked, [], 0
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


class Seen(NamedTuple):
    """What a pass has seen."""

    n_examples: int
    n_batches: int
    n_own: int  # examples of this rank


@dataclass
class Found:
    """What a feed has measured, and what it took."""

    collector: Collector  # that has measured, by the last passes or the walk
    calls: Mapping[str, int]  # of each layer by a batch, at most
    seen: Seen
    passes: float
    how: str = "passes"
    disturbed: bool = False
    error: float = 0.0  # how far the moments are from those that a pass with them meets
    #: Moments of layers that did not settle: those that came nearest.
    nearest: _Moments = field(default_factory=dict)


@dataclass
class _Round:
    """Moments used, those met with them, and how far apart they are."""

    error: float
    used: _Moments
    met: _Moments
    measured: Mapping[str, Accumulator]
    n_settled: int


def settle(
    found: Found, names: Sequence[str], measure: Callable[[Sequence[str]], _Moments]
) -> None:
    """Repeat passes until the moments that layers use are those that they meet.

    Plain rounds while they come nearer, then Anderson's: the step is taken from the combination of
    earlier rounds that leaves the least change. What is kept is the best round, the first of which
    uses the moments of the batch feed.

    Source: Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965.
    """
    collector, use = found.collector, found.collector.use
    collector.stops = False
    sites = [collector.by_name[name] for name in names]
    space = _Space(sites, use)

    def one_round() -> _Round:
        used = {name: use[name] for name in names}
        found.passes += 1.0
        met = measure(names)
        errors = [max(drift(used[s.name], met[s.name], s.eps)) for s in sites]
        n_settled = next((i for i, error in enumerate(errors) if not error < _SETTLED), len(errors))
        measured = {name: collector.sums.measured[name] for name in names}
        return _Round(max(errors), used, met, measured=measured, n_settled=n_settled)

    best = last = one_round()
    history, part, enough = [last], 1.0, _SETTLED
    step = last.met
    for _ in range(_ROUNDS + len(names)):
        if last.error < enough:
            use.update({site.name: site.as_stored(*last.met[site.name]) for site in sites})
            return
        use.update({site.name: site.as_stored(*step[site.name]) for site in sites})
        try:
            now = one_round()
        except NumericError:
            now = replace(last, error=math.inf, n_settled=0)  # a step into what overflows
        if now.error < best.error:
            best = now
        history = [*history, now][-_MEMORY:]
        if now.n_settled > last.n_settled or now.error <= _PROGRESS * last.error:
            step, last = now.met, now
            continue
        enough = _SETTLED_MIXED
        if now.error > 2 * best.error:
            # Back to the best, and on from there by a smaller part of the way.
            now, history, part = best, [best], max(part / 2, _LEAST_PART)
        elif now is best:
            part = min(1.0, 1.5 * part)
        step, last = space.mixed(history, part), now
    found.error = max(found.error, best.error)
    use.update(best.used)
    collector.sums.measured.update(best.measured)
    found.nearest.update(best.used)


class _Space:
    """Moments as one vector: means in units of a scale, logarithms of variances with eps."""

    def __init__(self, sites: Sequence[NormSite], use: _Moments) -> None:
        self._sites, self._sizes = sites, [use[site.name][1].numel() for site in sites]
        eps = torch.tensor([site.eps for site in sites], dtype=torch.float64)
        self._eps = eps.repeat_interleave(torch.tensor(self._sizes))
        self._scale = (self._all(use, 1) + self._eps).sqrt()

    def _all(self, moments: _Moments, kind: int) -> Tensor:
        return torch.cat([moments[site.name][kind].double().cpu() for site in self._sites])

    def mixed(self, history: Sequence[_Round], part: float) -> _Moments:
        """The combination of rounds with the least change, and a part of that change."""
        xs, gs = (
            torch.stack([self._vector(moments) for moments in rows])
            for rows in zip(*((r.used, r.met) for r in history), strict=True)
        )
        changes = gs - xs
        rows, steps = changes.diff(dim=0).T, xs.diff(dim=0).T
        weights = torch.linalg.pinv(rows, rtol=1e-9) @ changes[-1]
        left: Tensor = changes[-1] - rows @ weights
        return self._moments(xs[-1] - steps @ weights + part * left, xs[-1], part)

    def _vector(self, moments: _Moments) -> Tensor:
        mean, var = self._all(moments, 0), self._all(moments, 1)
        return torch.cat((mean / self._scale, (var.clamp_min(0) + self._eps).log()))

    def _moments(self, point: Tensor, before: Tensor, part: float) -> _Moments:
        """The moments of a vector; variances change by a bounded factor."""
        most, old = _MOST_LOG * part, before.chunk(2)[1]
        mean, log = point.chunk(2)
        var = ((old + (log - old).clamp(-most, most)).exp() - self._eps).clamp_min(0)
        rows = (torch.split(moment, self._sizes) for moment in (mean * self._scale, var))
        return {site.name: (m, v) for site, m, v in zip(self._sites, *rows, strict=True)}


def drift(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> tuple[float, float]:
    """How far old moments are from new, as plain means over the channels."""
    old_mean, old_var = (moment.double() for moment in old)
    mean, var = new
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).mean()
    ratio = ((var + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
    return float(shift), float(ratio)
