"""Forward hooks that measure each norm layer's input and override its statistics during a pass.

If a layer's output feeds back into its input, its moments are a fixed point, found by iteration.
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

#: Most passes, plus one for each layer of the loop.
_ROUNDS = 40
#: Moments have settled when their change (means by sqrt(var + eps), variances relative) is below
#: this. Mixed steps have a larger bound, because they end at float32's rounding errors.
_SETTLED, _SETTLED_MIXED = 1e-7, 1e-6
#: A round that leaves more than this fraction of the change counts as no progress.
_PROGRESS = 0.5
#: Rounds that a mixed step combines; the smallest fraction of the change that it applies.
_MEMORY, _LEAST_PART = 8, 1 / 32
#: Largest change of a log variance in one mixed step.
_MOST_LOG = 2.0

#: Numbers that can be pending, by device, before a check that they are finite: the check makes the
#: host wait for the device, which costs nothing on a CPU.
UNCHECKED = {"cpu": 0, "cuda": 1 << 22}
#: Number of first batches whose moments a walk keeps, to compare them with separate runs.
TRACED = 2
#: Examples after which a source without a length is taken to be endless.
MOST_UNCOUNTED = 100_000


@dataclass
class Cost:
    """Wall-clock seconds of one process per phase, summed over passes; other work is not included.

    There is no CUDA synchronization: GPU time is counted where the host waits for it, mostly under
    ``forward``.
    """

    data: float = 0.0  # waiting for batches: reading, decoding, scaling
    forward: float = 0.0  # the network, including its norm layers
    statistics: float = 0.0  # measuring and summing the norm layers' inputs

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Count the time spent inside as one phase, less the statistics measured meanwhile."""
        started, before = time.perf_counter(), self.statistics
        try:
            yield
        finally:
            seconds = time.perf_counter() - started - (self.statistics - before)
            setattr(self, part, getattr(self, part) + seconds)

    def reading(self, batches: Iterable[_T]) -> Iterator[_T]:
        """Iterate over batches, and count the time spent waiting for each."""
        end: Any = object()
        with self.of("data"):
            iterator = iter(batches)
        while True:
            with self.of("data"):
                batch = next(iterator, end)
            if batch is end:
                return
            yield batch
            del batch  # free it before the next one is read


class Target:
    """The rule that turns measured inputs into a layer's moments: population or train-batch."""

    screen: Any = None  # a `Screen` that leaves some examples out

    def __init__(self, batch_size: int | None = None, sources: Sources | None = None) -> None:
        self.batch_size = batch_size  # training batch size; None for the population
        self.sources = sources  # sources of examples with a weight each
        self.name = "population" if batch_size is None else f"train-batch {batch_size}"
        #: Number of channels, by layer, that the rule does not fit and that get other moments.
        self.unmatched: dict[str, int] = {}
        #: For a mixture, by layer: the weight of the measured moments, averaged over channels.
        self.weights: dict[str, float] = {}

    def measure_(self, source: Source, run: Callable[[Source, Collector], Any]) -> float:
        """Measure everything else that the rule needs, and return the number of passes."""
        return 0.0

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """The layer's new mean and variance ``(C,)``, float64."""
        return sums.statistics(self.batch_size)


@dataclass(frozen=True)
class Source:
    """The model and the batches of the passes, and the records that passes leave behind."""

    model: nn.Module
    batches: runtime.Batches
    forward: runtime.Forward | None = None
    samples: int | None = None  # on this rank
    target: Target = field(default_factory=Target)
    cost: Cost = field(default_factory=Cost)
    #: Buffers and attributes that the forward passes themselves changed.
    changed: dict[str, None] = field(default_factory=dict)


class StopHereError(BaseException):
    """Ends a shortened forward pass at the measured layer; `except Exception` must not catch it."""


class Collector:
    """Hooks on the sites that measure inputs and choose the moments each layer normalizes by."""

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
        #: Layers to measure, by default all, and whether a pass ends at the first of them.
        self.wanted: frozenset[str] | None = None
        self.stops = False
        #: Moments of the first batches, call by call.
        self.traces: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        self._cost, self._is_strict = source.cost, is_strict
        self._batch_index = 0
        self._own: dict[int, tuple[Any, Any]] = {}
        #: Calls not yet checked for finite values: a check makes the host wait for the device.
        self._unchecked: list[tuple[int, str, Tensor, Tensor, Tensor]] = []
        self._n_unchecked = 0
        #: The first layer and batch with a single value per channel.
        self._single: tuple[str, int] | None = None

    @contextmanager
    def attached(
        self, model: nn.Module, before: Callable[..., None] | None = None
    ) -> Iterator[list[str]]:
        """Put hooks on the sites, in evaluation; the list names the state that forward changed."""
        with (
            guards.inference(model) as changed,
            guards.hooks() as handles,
            # The model may be compiled, but hooks that raise and swap buffers cannot be.
            eager(),
        ):
            for module in [site.module for site in self.sites.values()]:
                hook = before or self.before
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                handles.append(module.register_forward_hook(self.after, always_call=True))
            yield changed

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a layer's input and lend the layer the moments to use; a forward pre-hook."""
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
        """Let a layer normalize by these moments until its forward pass ends."""
        buffers = module._buffers
        self._own[id(module)] = buffers["running_mean"], buffers["running_var"]
        buffers["running_mean"], buffers["running_var"] = moments

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Restore a layer's own buffers; a forward hook."""
        own = self._own.pop(id(module), None)
        if own is not None:
            module._buffers["running_mean"], module._buffers["running_var"] = own

    def new_batch(self, index: int) -> None:
        """Start this batch: calls from now on belong to it."""
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
                f"{site.name}: its input has shape {tuple(x.shape)}, but its statistics have "
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
        # Pooled per example: the spread of a group's means is not the mean of their spreads.
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
                f"{name}: gets one value per channel in batch {_of_all(index)} (counted from 0); "
                "the batch feed normalizes it to 0. Give larger batches, including the last one, "
                "or the sequential feed (--feed sequential).",
                name=name,
            )
        return mixed

    def check_finite(self, at_most: int = 0) -> None:
        """Raise if an input was not finite; up to ``at_most`` numbers can stay unchecked."""
        if self._n_unchecked <= at_most:
            return
        calls, self._unchecked, self._n_unchecked = self._unchecked, [], 0
        # A non-finite value in any example makes the mixture non-finite.
        if bool(torch.cat([mixed for *_, mixed in calls]).isfinite().all()):
            return
        index, name, mean, var, _ = next(c for c in calls if not bool(c[-1].isfinite().all()))
        bad = ~(mean + var).isfinite().all(1)
        raise NumericError(
            f"{name}: its input, or its input squared, is not finite in batch {_of_all(index)}, "
            f"example {int(bad.int().argmax())} (both counted from 0). Leave that example out, or "
            "use fp32.",
            name=name,
        )


def up_to(batches: Iterable[Any], samples: int | None, most: int | None = None) -> Iterator[Any]:
    """Batches until ``samples`` examples are reached; more than ``most`` are refused."""
    n_examples = 0
    if samples is not None and samples <= 0:
        return
    for batch in batches:
        if most is not None and n_examples >= most:
            raise DataError(
                f"batches: {n_examples:,} examples from a source without a length, and no end yet. "
                "Give samples=, the number of examples to use; if it does end, any larger number."
            )
        yield batch
        n_examples += runtime.n_examples_of(batch)
        if samples is not None and n_examples >= samples:
            return


def _of_all(index: int) -> int:
    """The index of a batch among all ranks' batches, which are dealt one by one."""
    place = distributed.here()
    return index * place.size + place.rank


class Seen(NamedTuple):
    """The examples and batches of a pass."""

    n_examples: int
    n_batches: int
    n_own: int  # examples on this rank


@dataclass
class Found:
    """A feed's measurements and their cost."""

    collector: Collector  # with the measurements of the last passes or the walk
    calls: Mapping[str, int]  # most calls of each layer by one batch
    seen: Seen
    passes: float
    how: str = "passes"
    disturbed: bool = False
    error: float = 0.0  # distance of the moments from the moments that a pass with them measures
    #: For layers that did not settle: the moments that came closest.
    nearest: _Moments = field(default_factory=dict)


@dataclass
class _Round:
    """The moments used in a pass, the moments measured in it, and their distance."""

    error: float
    used: _Moments
    met: _Moments
    measured: Mapping[str, Accumulator]
    n_settled: int


def settle(
    found: Found, names: Sequence[str], measure: Callable[[Sequence[str]], _Moments]
) -> None:
    """Repeat passes until layers measure the same moments that they use.

    Rounds are plain while they get closer, then Anderson's: the step starts from the combination
    of earlier rounds with the smallest change. The best round is kept; the first round uses the
    moments of the batch feed.

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
            now = replace(last, error=math.inf, n_settled=0)  # the step overflowed
        if now.error < best.error:
            best = now
        history = [*history, now][-_MEMORY:]
        if now.n_settled > last.n_settled or now.error <= _PROGRESS * last.error:
            step, last = now.met, now
            continue
        enough = _SETTLED_MIXED
        if now.error > 2 * best.error:
            # Return to the best round, and continue from it with a smaller step.
            now, history, part = best, [best], max(part / 2, _LEAST_PART)
        elif now is best:
            part = min(1.0, 1.5 * part)
        step, last = space.mixed(history, part), now
    found.error = max(found.error, best.error)
    use.update(best.used)
    collector.sums.measured.update(best.measured)
    found.nearest.update(best.used)


class _Space:
    """Moments as one vector: means divided by a scale, and logarithms of var + eps."""

    def __init__(self, sites: Sequence[NormSite], use: _Moments) -> None:
        self._sites, self._sizes = sites, [use[site.name][1].numel() for site in sites]
        eps = torch.tensor([site.eps for site in sites], dtype=torch.float64)
        self._eps = eps.repeat_interleave(torch.tensor(self._sizes))
        self._scale = (self._all(use, 1) + self._eps).sqrt()

    def _all(self, moments: _Moments, kind: int) -> Tensor:
        return torch.cat([moments[site.name][kind].double().cpu() for site in self._sites])

    def mixed(self, history: Sequence[_Round], part: float) -> _Moments:
        """The combination of rounds with the smallest change, plus a part of that change."""
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
        """A vector back as moments; variances change by a bounded factor."""
        most, old = _MOST_LOG * part, before.chunk(2)[1]
        mean, log = point.chunk(2)
        var = ((old + (log - old).clamp(-most, most)).exp() - self._eps).clamp_min(0)
        rows = (torch.split(moment, self._sizes) for moment in (mean * self._scale, var))
        return {site.name: (m, v) for site, m, v in zip(self._sites, *rows, strict=True)}


def drift(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> tuple[float, float]:
    """Mean shift and log variance ratio of old and new moments, averaged over channels."""
    old_mean, old_var = (moment.double() for moment in old)
    mean, var = new
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).mean()
    ratio = ((var + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
    return float(shift), float(ratio)
