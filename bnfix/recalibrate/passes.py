"""Passes that measure statistics, kept for a run after a crash, and the two feeds made of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfix.checkpoints.save import StateFolder
from bnfix.core import distributed, runtime
from bnfix.core.errors import DataError, NormError, some
from bnfix.norm.sites import NormSite, find_norms
from bnfix.recalibrate.accumulator import Accumulator, Sources, Sums
from bnfix.recalibrate.collector import (
    MOST_UNCOUNTED,
    UNCHECKED,
    Collector,
    Found,
    Seen,
    Source,
    StopHereError,
    Target,
    drift,
    settle,
    up_to,
)
from bnfix.recalibrate.lockstep import Walk, default_memory

#: Difference of a batch's moments, in units of sqrt(var + eps) and relative, that is rounding.
_ROUNDING = 1e-4
#: Seconds to the first writing; then twice as many to each next one, up to the most.
_SOON, _MOST = 1.0, 30.0
#: `samples="auto"`: examples between two looks at the errors, as a part of those seen.
_LOOK_AGAIN = 0.1

_Kind = TypeVar("_Kind", bound=Collector)


class Kept:
    """The passes of one calibration, and the sums of the one under way, for a run after a crash.

    Passes come in the same order in every run, so that their number tells them apart.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        place = distributed.here()
        name = f"calibration-{identity[:12]}-{place.rank}of{place.size}.pt"
        self._folder, self._wait = StateFolder(folder, identity, name), _SOON
        self._finished: list[Mapping[str, Any]] = []
        self._partial: Mapping[str, Any] | None = None
        self._pass = -1
        self._written = time.monotonic()
        self.n_resumed = 0  # examples of this rank that were not run again
        found = self._folder.read()
        if found is not None:
            try:
                self._finished, self._partial = list(found["finished"]), found["partial"]
            except (KeyError, TypeError) as error:
                raise self._folder.damaged(error) from error

    def finished(self, sums: Sums) -> Seen | None:
        """Begin a pass; where any rank has finished it before, take over its result."""
        self._pass += 1
        mine = self._finished[self._pass] if self._pass < len(self._finished) else None
        known = next((found for found in distributed.gather(mine) if found is not None), None)
        if known is None:
            return None
        if mine is None:
            self._finished.append(known)
        self._take_over(sums, known)
        return Seen(*(int(known[name]) for name in Seen._fields))

    def resume_(self, sums: Sums) -> tuple[int, int, int]:
        """What the pass just begun has come to before: examples, batches, batches to leave out."""
        partial, self._partial = self._partial, None
        if partial is None or partial.get("pass") != self._pass:
            return 0, 0, 0
        self._take_over(sums, partial)
        return int(partial["n_examples"]), int(partial["n_batches"]), int(partial["n_gone"])

    def after_batch(self, sums: Sums, n_examples: int, n_batches: int, n_gone: int) -> None:
        """Write, if the last time was long ago."""
        if time.monotonic() - self._written < self._wait:
            return
        self._wait = min(_MOST, 2 * self._wait)
        self._write({
            "pass": self._pass, "n_examples": n_examples, "n_batches": n_batches,
            "n_gone": n_gone, "collector": sums.state(),
        })  # fmt: skip

    def finish(self, sums: Sums, seen: Seen) -> None:
        """Write what a whole pass has measured."""
        self._finished.append({**seen._asdict(), "collector": sums.state()})
        self._write(None)

    def _write(self, partial: Mapping[str, Any] | None) -> None:
        self._folder.write({"finished": self._finished, "partial": partial})
        self._written = time.monotonic()

    def _take_over(self, sums: Sums, found: Mapping[str, Any]) -> None:
        try:
            sums.set_states_([found["collector"]])
            self.n_resumed += int(found["n_examples"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise self._folder.damaged(error) from error


def one_pass(
    source: Source,
    collector: Collector,
    keeper: Kept | None = None,
    enough: Callable[[int], bool] | None = None,
) -> Seen:
    """Run the batches until they end, or are enough.

    Of several processes each runs its own batches; all end with what all have measured.
    """
    sums, place = collector.sums, distributed.here()
    # What earlier passes have measured is everyone's already.
    earlier, sums.measured = sums.measured, {}
    seen = None if keeper is None else keeper.finished(sums)
    if seen is None:
        own = distributed.together(lambda: _own_part(source, collector, keeper, enough))
        if place.shared:
            sums.set_states_(distributed.gather(sums.state(summed=True)))
        n_examples, n_batches = (sum(counts) for counts in zip(*own, strict=True))
        seen = Seen(n_examples, n_batches, own[place.rank][0])
        if keeper is not None:
            keeper.finish(sums, seen)
    sums.measured = {**earlier, **sums.measured}
    return seen


def _own_part(
    source: Source, collector: Collector, keeper: Kept | None, enough: Callable[[int], bool] | None
) -> tuple[int, int]:
    """This rank's part of a pass: its examples and batches."""
    model, place = source.model, distributed.here()
    device = runtime.device_of(model)
    n_examples, n_batches, n_gone = (0, 0, 0) if keeper is None else keeper.resume_(collector.sums)
    batches = runtime.pass_of(source.batches, 0)
    left = None if source.samples is None else source.samples - n_examples
    counted = left is not None or enough is not None or has_length(batches)
    rest = source.cost.reading(after(batches, n_gone))
    rest = up_to(rest, left, None if counted else MOST_UNCOUNTED)
    looks = enough is not None and place.shared
    # What is kept or decided by must be finite.
    at_once = enough is not None or keeper is not None

    def measure(batch: Any, index: int) -> int:
        if batch is None:
            return 0
        collector.new_batch(index)
        with source.cost.of("forward"):
            try:
                runtime.run(model, batch, device, source.forward)
            except StopHereError:
                pass
            finally:
                for site in collector.sites.values():
                    collector.after(site.module, None, None)
            collector.check_finite(0 if at_once else UNCHECKED.get(device.type, 0))
        return runtime.n_examples_of(batch)

    with collector.attached(model) as changed:
        for index, batch in enumerate(distributed.in_step(rest) if looks else rest, n_gone):
            work = partial(measure, batch, index)
            n = distributed.together(work)[place.rank] if looks else work()
            n_examples, n_batches = n_examples + n, n_batches + (n > 0)
            if keeper is not None:
                keeper.after_batch(collector.sums, n_examples, n_batches, index + 1)
            if enough is not None:
                n_seen = sum(distributed.gather(n_examples)) if looks else n_examples
                if enough(n_seen):
                    break
    source.changed.update(dict.fromkeys(changed))
    collector.check_finite()
    return n_examples, n_batches


def after(batches: Iterable[Any], n: int) -> Iterable[Any]:
    """Batches without the first ones, which are not read where that can be helped."""
    if not n:
        return batches
    if hasattr(batches, "starting_at"):
        rest: Iterable[Any] = batches.starting_at(n)
        return rest
    return islice(batches, n, None)


def has_length(batches: Any) -> bool:
    """Whether the number of batches is known, so that they have an end."""
    try:
        len(batches)
    except (TypeError, NotImplementedError):
        return False
    return True


class Enough:
    """Whether every layer's errors are small enough; looked at now and then."""

    def __init__(self, tolerance: float) -> None:
        # The largest `layer_error` of a layer that is known well enough.
        self._tolerance, self._next_look = tolerance, 2
        self.slowest, self.is_enough = "", False

    def __call__(self, collector: Collector, n_examples: int) -> bool:
        """Look, unless the last look was not long ago; remember the layer that is furthest off."""
        if n_examples < self._next_look:
            return False
        self._next_look = math.ceil(n_examples * (1 + _LOOK_AGAIN))
        errors = {
            name: layer_error(sums, collector.by_name[name].eps)
            for name, sums in collector.sums.everyones().items()
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


def collect(
    source: Source,
    sites: list[NormSite],
    feed: str,
    auto: Enough | None,
    memory_bytes: int | None,
    keeper: Kept | None,
) -> Found:
    """Measure every layer's input by the feed asked for, in the cheapest way that is exact."""
    if feed == "sequential" and isinstance(source.batches, Iterator):
        source = replace(source, batches=_kept(source.batches, source.samples))
    screen = source.target.screen
    if screen is not None:
        screen.find_(source, sites)
    scout = Collector(sites, source, by_batch=True, is_strict=feed == "batch")
    if feed == "batch":
        seen = _scout(source, scout, auto, keeper)
        _refuse_single_examples(source, scout, seen)
        return Found(scout, scout.sums.n_calls, seen, passes=1.0)
    scouted = None if auto is None else _scout(source, scout, auto, keeper)
    if scouted is not None:
        # Each rank ends where the errors of all were small enough.
        source = replace(source, samples=scouted.n_own)
    before = source.target.measure_(source, partial(one_pass, keeper=keeper))
    before += screen is not None
    walking = Collector(sites, source)
    walk = Walk(source, walking, memory_bytes)
    if walk.go():
        walked = Seen(walk.n_examples, walk.n_batches, 0)
        _check_reached(walking, walked)
        disturbed = walked.n_batches > 1 and not _as_alone(source, walk.first, walking)
        if not disturbed:
            passes = 1.0 + before + (scouted is not None)
            return Found(walking, walking.sums.n_calls, walked, passes, how="walk")
    else:
        disturbed = any(distributed.gather(walk.disturbed))
    seen = scouted or _scout(source, scout, None, keeper)
    # A walk given up has run as much of the network as the layers that it came to.
    passes = 1.0 + before + walk.n_steps / len(scout.sums.measured)
    collector = Collector(sites, source)
    found = Found(collector, scout.sums.n_calls, seen, passes, disturbed=disturbed)
    _sequential(source, scout, found, keeper)
    if disturbed:
        found.passes, found.error = found.passes + 1.0, _left(source, collector)
    return found


def _refuse_single_examples(source: Source, scout: Collector, seen: Seen) -> None:
    most = max(distributed.gather(scout.sums.most_examples))
    is_right = source.target.batch_size == 1 or len(scout.sums.measured) == 1
    if most == 1 < seen.n_batches and not is_right:
        raise DataError(
            f"batches: {seen.n_batches}, and each holds one example, which under the batch feed is "
            "normalized by itself at every layer, as it never is in inference. Give larger "
            "batches (--batch-size), or the sequential feed (--feed sequential)."
        )


def _kept(batches: Iterator[Any], samples: int | None) -> list[Any]:
    """A stream in memory, since it is read more than once."""
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


def _as_alone(source: Source, first: list[Any], walking: Collector) -> bool:
    """Whether the first batches meet in a plain pass, by themselves, the moments of the walk."""
    # A network that keeps activations on itself gets another batch's when batches walk together.
    source = replace(source, batches=first, samples=None, target=Target())
    alone = Collector(list(walking.sites.values()), source)
    alone.use = walking.use
    one_pass(source, alone)
    pairs = [
        pair
        for index in range(len(first))
        for pair in zip_longest(walking.traces.get(index, ()), alone.traces.get(index, ()))
    ]
    same = all(
        a is not None and b is not None and a[0] == b[0]
        and _is_rounding(a[1:], b[1:], walking.by_name[a[0]].eps)
        for a, b in pairs
    )  # fmt: skip
    return all(distributed.gather(same))


def _is_rounding(a: Sequence[Tensor], b: Sequence[Tensor], eps: float) -> bool:
    scale = b[1] + eps
    shift, ratio = (a[0] - b[0]).abs() / scale.sqrt(), (a[1] - b[1]).abs() / scale
    return bool((torch.maximum(shift, ratio) <= _ROUNDING).all())


def _left(source: Source, collector: Collector) -> float:
    """How far one more pass is from the moments found, at the layer where it is furthest."""
    sites = collector.by_name
    last = Collector(list(sites.values()), source)
    last.use = collector.use
    one_pass(source, last)
    return max(
        max(drift(last.use[name], source.target.moments(sites[name], sums), sites[name].eps))
        for name, sums in last.sums.measured.items()
        if name in last.use
    )


def _scout(source: Source, scout: Collector, auto: Enough | None, keeper: Kept | None) -> Seen:
    """The one pass of the batch feed."""
    seen = one_pass(source, scout, keeper, None if auto is None else partial(auto, scout))
    _check_reached(scout, seen)
    return seen


def _check_reached(collector: Collector, seen: Seen) -> None:
    if seen.n_examples == 0:
        raise DataError("calibration: no examples. Give at least one batch.")
    if not collector.sums.measured:
        raise NormError(f"{some(list(collector.by_name))}: never reached by the data.")


def _sequential(source: Source, scout: Collector, found: Found, keeper: Kept | None) -> None:
    """Layer after layer in call order, each measured while all before it are final."""
    order, target, collector = scout.sums.order(), source.target, found.collector
    # Where a layer that is not final yet must be passed, the batch feed's moments are the nearest.
    collector.use = use = {
        name: site.as_stored(*target.moments(site, scout.sums.measured[name]))
        for name, site in scout.by_name.items()
        if name in scout.sums.measured
    }

    def measure(names: Sequence[str]) -> dict[str, tuple[Tensor, Tensor]]:
        for name in names:
            collector.sums.measured.pop(name, None)
        collector.wanted = frozenset(names)
        one_pass(source, collector, keeper)
        measured = collector.sums.measured
        missing = [name for name in names if name not in measured]
        if missing:
            raise DataError(
                f"{some(missing)}: a further pass over the batches did not reach it. Give a list "
                "or a loader, which can be read again.",
                name=missing[0],
            )
        return {name: target.moments(collector.by_name[name], measured[name]) for name in names}

    again = [depth for depth, name in enumerate(order) if name in scout.sums.looped]
    loop = order[again[0] : again[-1] + 1] if again else []
    for depth, name in enumerate(order, 1):
        if name in loop:
            if name == loop[0]:
                settle(found, loop, measure)
        elif scout.sums.is_first(name):
            collector.sums.measured[name] = scout.sums.measured[name]
        else:
            collector.stops = True
            new = measure([name])
            use[name] = collector.by_name[name].as_stored(*new[name])
            found.passes += depth / len(order)


def met_in_a_pass(
    model: nn.Module,
    batches: Iterable[Any],
    kind: type[_Kind],
    *,
    forward: runtime.Forward | None = None,
    **how: Any,
) -> _Kind:
    """Measure in one pass what all layers meet, in inference or by each batch's statistics."""
    # Frozen layers too: whether their constants fit the data is worth knowing.
    sites = [site for site in find_norms(model) if site.has_statistics and site.is_measurable]
    sources = batches if isinstance(batches, Sources) else None
    source = Source(model, batches, forward, target=Target(sources=sources))
    collector = kind(sites, source, **how)
    if one_pass(source, collector).n_examples == 0:
        raise DataError("residuals: no examples. Give at least one batch.")
    return collector


def stored_drift(met: Collector, name: str) -> tuple[float, float]:
    """How far a layer's stored moments are from those measured; see `drift`."""
    site = met.by_name[name]
    fresh = met.sums.measured[name].statistics(None)
    return drift(site.moments, fresh, site.eps)


def residuals(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
    mix: Sequence[float] = (),
) -> dict[str, tuple[float, float]]:
    """Compare stored statistics with those that one inference pass over the data meets.

    Args:
        model: as it will be used; only read.
        batches: any iterable of batches.
        forward: called as ``forward(model, batch)`` for unusual batches.
        mix: weights of several sources, with a list of them as ``batches``.

    Returns:
        For each layer reached: mean over channels of |log((var_stored + eps)/(var_fresh + eps))|,
        and of |mean_stored - mean_fresh| / sqrt(var_fresh + eps).

    Raises:
        DataError: if there are no examples.
    """
    batches = Sources(batches, mix) if mix else batches
    met = met_in_a_pass(model, batches, Collector, forward=forward)
    drifts = {name: stored_drift(met, name) for name in met.by_name if name in met.sums.measured}
    return {name: (log_var_ratio, shift) for name, (shift, log_var_ratio) in drifts.items()}
