"""The two feeds: what each layer meets while statistics are measured, in the cheapest exact way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bnfix import runtime
from bnfix.errors import DataError, NormError, some
from bnfix.layers.sites import NormSite
from bnfix.statistics.accumulating import Accumulator
from bnfix.statistics.collecting import Collector, Keeper, as_stored, up_to
from bnfix.statistics.costs import Clock
from bnfix.statistics.walking import Walk

#: Passes at most for a layer that is called more than once, whose output comes back to its input.
_ROUNDS = 12
#: Change of the moments, in units of sqrt(var + eps) and relative, below which it has settled.
_SETTLED = 1e-7
#: `samples="auto"`: examples between two looks at the errors, as a part of those seen.
_LOOK_AGAIN = 0.1


class Enough:
    """Whether every layer's errors are small enough; looked at now and then.

    Args:
        tolerance: the largest `layer_error` of a layer that is known well enough.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance, self._next_look = tolerance, 2
        self.slowest, self.is_enough = "", False

    def __call__(self, collector: Collector, n_examples: int) -> bool:
        """Look, unless the last look was not long ago; remember the layer that is furthest off."""
        if n_examples < self._next_look:
            return False
        self._next_look = math.ceil(n_examples * (1 + _LOOK_AGAIN))
        measured = collector.everyones()
        errors = {
            site.name: layer_error(measured[site.name], eps_of(site))
            for site in collector.sites.values()
            if site.name in measured
        }
        late = [name for name, error in errors.items() if not error <= self._tolerance]
        if late:
            self.slowest = max(late, key=lambda name: errors[name])
        self.is_enough = not late
        return self.is_enough


def layer_error(accumulator: Accumulator, eps: float) -> float:
    """The larger of the errors of mean and variance, root mean square over the channels.

    Args:
        accumulator: what was measured at the layer.
        eps: of the layer.

    Returns:
        Mean in units of sqrt(var + eps), variance in units of var + eps; infinite from one example.
    """
    mean_se, var_se = accumulator.errors()
    spread = accumulator.values.var + eps
    squares = torch.stack((mean_se.square() / spread, (var_se / spread).square()))
    return float(squares.mean(1).max().sqrt())


@dataclass(frozen=True)
class Found:
    """What a feed has measured, and what it took."""

    measured: Mapping[str, Accumulator]
    collector: Collector
    n_examples: int
    n_batches: int
    passes: float
    how: str


def collect(
    model: nn.Module,
    sites: list[NormSite],
    batches: runtime.Batches,
    forward: runtime.Forward | None,
    samples: int | str | None,
    auto: Enough | None,
    feed: str,
    size: int | None,
    memory_bytes: int | None,
    keeper: Keeper | None = None,
) -> Found:
    """Measure every layer's input by the feed asked for, in the cheapest way that is exact.

    Args:
        model: its buffers are lent others, and have their own back afterwards.
        sites: the layers.
        batches: as for `recalibrate_`.
        forward: likewise.
        samples: likewise.
        auto: what decides with ``auto``.
        feed: ``batch`` or ``sequential``.
        size: of the train-batch target.
        memory_bytes: what a walk may hold.
        keeper: keeps what passes have measured; a walk starts over.

    Returns:
        What was measured, and what it took.
    """
    wanted = samples if isinstance(samples, int) else None
    if feed == "sequential" and isinstance(batches, Iterator):
        batches = list(up_to(batches, wanted))
    clock = Clock()
    scout = Collector(sites, by_batch=True, clock=clock)
    passes = n_examples = n_batches = 0
    wasted = 0.0
    if feed == "batch" or auto is not None:
        n_examples, n_batches = _scout(model, scout, batches, forward, wanted, auto, keeper)
        passes, wanted = 1, scout.n_own
    if feed == "batch":
        return Found(scout.measured, scout, n_examples, n_batches, 1.0, "passes")
    walking = Collector(sites, by_batch=False, clock=clock)
    walk = Walk(model, walking, forward, size, memory_bytes)
    if walk.go(batches, wanted):
        _check_reached(sites, walk.n_examples, walking)
        return Found(
            walking.measured, walking, walk.n_examples, walk.n_batches, passes + 1.0, "walk"
        )
    if not passes:
        n_examples, n_batches = _scout(model, scout, batches, forward, wanted, None, keeper)
        passes = 1
    wasted = walk.n_steps / len(scout.measured)
    measured, more = _sequential(model, scout, batches, forward, wanted, size, keeper)
    return Found(measured, scout, n_examples, n_batches, passes + more + wasted, "passes")


def _scout(
    model: nn.Module,
    scout: Collector,
    batches: runtime.Batches,
    forward: runtime.Forward | None,
    samples: int | None,
    auto: Enough | None,
    keeper: Keeper | None,
) -> tuple[int, int]:
    """The one pass of the batch feed."""
    enough = None if auto is None else lambda n: auto(scout, n)
    n_examples, n_batches = scout.one_pass(
        model, runtime.pass_of(batches, 0), forward, samples, enough, keeper
    )
    _check_reached(list(scout.sites.values()), n_examples, scout)
    return n_examples, n_batches


def _check_reached(sites: Sequence[NormSite], n_examples: int, collector: Collector) -> None:
    if n_examples == 0:
        raise DataError("calibration: no examples. Give at least one batch.")
    if not collector.measured:
        raise NormError(f"{some([s.name for s in sites])}: never reached by the data.")


def _sequential(
    model: nn.Module,
    scout: Collector,
    batches: runtime.Batches,
    forward: runtime.Forward | None,
    samples: int | None,
    size: int | None,
    keeper: Keeper | None,
) -> tuple[dict[str, Accumulator], float]:
    """Layer after layer in call order, each measured while all before it are final."""
    order = scout.order()
    sites = {site.name: site for site in scout.sites.values()}
    collector = Collector(list(sites.values()), by_batch=False, clock=scout.clock)
    # Where a layer that is not final yet must be passed, the batch feed's moments are the nearest.
    for name in order:
        collector.use[name] = as_stored(sites[name], *scout.measured[name].statistics(size))
    passes = 0.0
    for depth, name in enumerate(order, 1):
        once = scout.n_calls[name] == 1
        if once and scout.is_first(name):
            collector.measured[name] = scout.measured[name]
            continue
        collector.wanted, collector.stops = name, once
        for _ in range(1 if once else _ROUNDS):
            collector.measured.pop(name, None)
            collector.one_pass(model, runtime.pass_of(batches, 0), forward, samples, keeper=keeper)
            passes += depth / len(order) if once else 1.0
            if name not in collector.measured:
                raise DataError(
                    f"{name}: a further pass over the batches did not reach it. Give a list or a "
                    "loader, which can be gone through again.",
                    name=name,
                )
            before = collector.use[name]
            new = collector.measured[name].statistics(size)
            collector.use[name] = as_stored(sites[name], *new)
            if max(drift(before, new, eps_of(sites[name]))) < _SETTLED:
                break
    return collector.measured, passes


def eps_of(site: NormSite) -> float:
    """The eps of a layer.

    Args:
        site: the layer's place.

    Returns:
        Its own, or torch's default.
    """
    return float(getattr(site.module, "eps", 1e-5))


def drift(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> tuple[float, float]:
    """How far old moments are from new, as plain means over the channels.

    Args:
        old: mean and variance.
        new: likewise, float64.
        eps: of the layer.

    Returns:
        |mean shift| / sqrt(new var + eps), and |log variance ratio|, both with eps.
    """
    old_mean, old_var = (moment.double() for moment in old)
    mean, var = new
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).mean()
    ratio = ((var + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
    return float(shift), float(ratio)
