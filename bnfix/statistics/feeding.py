"""The two feeds: what each layer meets while statistics are measured, in the cheapest exact way."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from bnfix import processes, runtime
from bnfix.errors import DataError, NormError, some
from bnfix.layers.sites import NormSite
from bnfix.statistics.accumulating import Accumulator
from bnfix.statistics.collecting import MOST_UNCOUNTED, Collector, Keeper, as_stored, up_to
from bnfix.statistics.costs import Clock
from bnfix.statistics.settling import Settled, drift, eps_of, settle
from bnfix.statistics.walking import Walk, default_memory

#: Difference of a batch's moments, in units of sqrt(var + eps) and relative, that is rounding.
_ROUNDING = 1e-4
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
    """The larger of the errors of mean and variance, root mean square over the channels."""
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
    disturbed: bool = False
    error: float = 0.0
    nearest: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)


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
    """Measure every layer's input by the feed asked for, in the cheapest way that is exact."""
    wanted = samples if isinstance(samples, int) else None
    if feed == "sequential" and isinstance(batches, Iterator):
        batches = _kept(batches, wanted)
    clock = Clock()
    scout = Collector(sites, by_batch=True, clock=clock)
    scout.is_strict = feed == "batch"
    passes = n_examples = n_batches = 0
    wasted = 0.0
    if feed == "batch" or auto is not None:
        n_examples, n_batches = _scout(model, scout, batches, forward, wanted, auto, keeper)
        passes, wanted = 1, scout.n_own
    if feed == "batch":
        most = max(processes.gather(scout.most_examples))
        if most == 1 < n_batches and size != 1 and len(scout.measured) > 1:
            raise DataError(
                f"batches: {n_batches}, and each holds one example, which under the batch feed is "
                "normalized by itself at every layer, as it never is in inference. Give larger "
                "batches (--batch-size), or the sequential feed (--feed sequential)."
            )
        return Found(
            measured=scout.measured,
            collector=scout,
            n_examples=n_examples,
            n_batches=n_batches,
            passes=1.0,
            how="passes",
        )
    walking = Collector(sites, by_batch=False, clock=clock)
    walk = Walk(model, walking, forward, size, memory_bytes)
    if walk.go(batches, wanted):
        _check_reached(sites, walk.n_examples, walking)
        disturbed = walk.n_batches > 1 and not _as_alone(model, walk, walking, forward)
        if not disturbed:
            return Found(
                measured=walking.measured,
                collector=walking,
                n_examples=walk.n_examples,
                n_batches=walk.n_batches,
                passes=passes + 1.0,
                how="walk",
            )
    else:
        disturbed = any(processes.gather(walk.disturbed))
    if not passes:
        n_examples, n_batches = _scout(model, scout, batches, forward, wanted, None, keeper)
        passes = 1
    wasted = walk.n_steps / len(scout.measured)
    settled = _sequential(model, scout, batches, forward, wanted, size, keeper)
    more, last = settled.passes, settled.collector
    if disturbed:
        more, settled.error = more + 1.0, _left(model, settled, batches, forward, wanted, size)
    scout.changed.update(last.changed)
    return Found(
        measured=last.measured,
        collector=scout,
        n_examples=n_examples,
        n_batches=n_batches,
        passes=passes + more + wasted,
        how="passes",
        disturbed=disturbed,
        error=settled.error,
        nearest=settled.nearest,
    )


def _kept(batches: Iterator[Any], samples: int | None) -> list[Any]:
    """A stream in memory, for it has to be gone through again."""
    room = 2 * default_memory(torch.device("cpu"))
    kept: list[Any] = []
    n_bytes = 0
    for batch in up_to(batches, samples, None if samples is not None else MOST_UNCOUNTED):
        kept.append(batch)
        n_bytes += sum(t.numel() * t.itemsize for t in runtime.tensors_in(batch))
        if n_bytes > room > 0:
            raise DataError(
                f"batches: a stream of more than {n_bytes >> 20} MiB, and feed sequential needs it "
                "again. Give a list or a loader, or samples=, the number of examples to use."
            )
    return kept


def _as_alone(
    model: nn.Module, walk: Walk, walking: Collector, forward: runtime.Forward | None
) -> bool:
    """Whether the first batches meet in a plain pass, by themselves, the moments of the walk."""
    # A network that keeps activations on itself gets another batch's when batches walk together.
    alone = Collector(list(walking.sites.values()), by_batch=False, clock=walking.clock)
    alone.use = walking.use
    alone.one_pass(model, walk.first, forward, None)
    sites = {site.name: site for site in walking.sites.values()}
    pairs = [
        pair
        for index in range(len(walk.first))
        for pair in zip_longest(walking.traces.get(index, ()), alone.traces.get(index, ()))
    ]
    same = all(
        a is not None and b is not None and a[0] == b[0]
        and _is_rounding(a[1:], b[1:], eps_of(sites[a[0]]))
        for a, b in pairs
    )  # fmt: skip
    return all(processes.gather(same))


def _is_rounding(a: Sequence[Tensor], b: Sequence[Tensor], eps: float) -> bool:
    scale = b[1] + eps
    shift, ratio = (a[0] - b[0]).abs() / scale.sqrt(), (a[1] - b[1]).abs() / scale
    return bool((torch.maximum(shift, ratio) <= _ROUNDING).all())


def _left(
    model: nn.Module,
    settled: Settled,
    batches: runtime.Batches,
    forward: runtime.Forward | None,
    samples: int | None,
    size: int | None,
) -> float:
    """How far one more pass is from the moments found, at the layer where it is furthest."""
    last = Collector(list(settled.collector.sites.values()), by_batch=False)
    last.use = settled.collector.use
    last.one_pass(model, runtime.pass_of(batches, 0), forward, samples)
    return max(
        max(drift(last.use[name], sums.statistics(size), eps_of(settled.site(name))))
        for name, sums in last.measured.items()
        if name in last.use
    )


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
) -> Settled:
    """Layer after layer in call order, each measured while all before it are final."""
    order = scout.order()
    collector = Collector(list(scout.sites.values()), by_batch=False, clock=scout.clock)
    use = {
        site.name: as_stored(site, *scout.measured[site.name].statistics(size))
        for site in scout.sites.values()
        if site.name in scout.measured
    }
    # Where a layer that is not final yet must be passed, the batch feed's moments are the nearest.
    collector.use = use
    found = Settled(collector)

    def measure(names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        for name in names:
            collector.measured.pop(name, None)
        collector.wanted = frozenset(names)
        collector.one_pass(model, runtime.pass_of(batches, 0), forward, samples, keeper=keeper)
        missing = [name for name in names if name not in collector.measured]
        if missing:
            raise DataError(
                f"{some(missing)}: a further pass over the batches did not reach it. Give a list "
                "or a loader, which can be gone through again.",
                name=missing[0],
            )
        return {name: collector.measured[name].statistics(size) for name in names}

    again = [depth for depth, name in enumerate(order) if name in scout.looped]
    loop = order[again[0] : again[-1] + 1] if again else []
    for depth, name in enumerate(order, 1):
        if name in loop:
            if name == loop[0]:
                settle(found, loop, measure)
        elif scout.is_first(name):
            collector.measured[name] = scout.measured[name]
        else:
            collector.stops = True
            new = measure([name])
            use[name] = as_stored(found.site(name), *new[name])
            found.passes += depth / len(order)
    return found
