"""Passes that measure statistics, their saved state after a crash, and the two feeds."""

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

#: Differences of a batch's moments up to this size are rounding; units as in `_is_rounding`.
_ROUNDING = 1e-4
#: Seconds before the first write; the wait then doubles after each write, up to the maximum.
_SOON, _MOST = 1.0, 30.0
#: `samples="auto"`: examples between two checks of the errors, as a fraction of those seen.
_LOOK_AGAIN = 0.1

_Kind = TypeVar("_Kind", bound=Collector)


class Kept:
    """The finished passes of a calibration and the sums of the current pass, kept for a restart.

    Passes come in the same order in every run, so their number identifies them.
    """

    def __init__(self, folder: str | Path, identity: str) -> None:
        place = distributed.here()
        name = f"calibration-{identity[:12]}-{place.rank}of{place.size}.pt"
        self._folder, self._wait = StateFolder(folder, identity, name), _SOON
        self._finished: list[Mapping[str, Any]] = []
        self._partial: Mapping[str, Any] | None = None
        self._pass = -1
        self._written = time.monotonic()
        self.n_resumed = 0  # examples on this rank that were not run again
        found = self._folder.read()
        if found is not None:
            try:
                self._finished, self._partial = list(found["finished"]), found["partial"]
            except (KeyError, TypeError) as error:
                raise self._folder.damaged(error) from error

    def finished(self, sums: Sums) -> Seen | None:
        """Begin a pass; if any rank has already finished it, take over its result."""
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
        """Resume the current pass: its examples and batches so far, and the batches to skip."""
        partial, self._partial = self._partial, None
        if partial is None or partial.get("pass") != self._pass:
            return 0, 0, 0
        self._take_over(sums, partial)
        return int(partial["n_examples"]), int(partial["n_batches"]), int(partial["n_gone"])

    def after_batch(self, sums: Sums, n_examples: int, n_batches: int, n_gone: int) -> None:
        """Write the state if the last write was long enough ago."""
        if time.monotonic() - self._written < self._wait:
            return
        self._wait = min(_MOST, 2 * self._wait)
        self._write({
            "pass": self._pass, "n_examples": n_examples, "n_batches": n_batches,
            "n_gone": n_gone, "collector": sums.state(),
        })  # fmt: skip

    def finish(self, sums: Sums, seen: Seen) -> None:
        """Write the measurements of a finished pass."""
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
    """Run the batches until they end or are enough.

    Each process runs its own batches; at the end all processes have the merged sums.
    """
    sums, place = collector.sums, distributed.here()
    # Measurements of earlier passes are already merged.
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
    # Sums that are saved or that decide when to stop must be finite.
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
    """Batches without the first ``n``, which are not read if the source can start later."""
    if not n:
        return batches
    if hasattr(batches, "starting_at"):
        rest: Iterable[Any] = batches.starting_at(n)
        return rest
    return islice(batches, n, None)


def has_length(batches: Any) -> bool:
    """Whether the number of batches is known and therefore finite."""
    try:
        len(batches)
    except (TypeError, NotImplementedError):
        return False
    return True


class Enough:
    """A periodic check whether every layer's errors are small enough."""

    def __init__(self, tolerance: float) -> None:
        # The largest `layer_error` that is small enough.
        self._tolerance, self._next_look = tolerance, 2
        self.slowest, self.is_enough = "", False

    def __call__(self, collector: Collector, n_examples: int) -> bool:
        """Check, unless the last check was recent; remember the layer with the largest error."""
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
    """The larger of the two errors, of mean and variance, each as RMS over the channels."""
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
    """Measure every layer's input under a feed, by the cheapest exact method."""
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
        # Each rank stops where the errors of all ranks together were small enough.
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
    # A walk that was given up counts as the fraction of layers that it reached.
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
            f"batches: {seen.n_batches}, each with one example. The batch feed would normalize "
            "it by its own statistics at every layer, unlike inference. Give larger batches "
            "(--batch-size), or the sequential feed (--feed sequential)."
        )


def _kept(batches: Iterator[Any], samples: int | None) -> list[Any]:
    """A stream held in memory, because it is read more than once."""
    room = 2 * default_memory(torch.device("cpu"))
    kept: list[Any] = []
    n_bytes = 0
    for batch in up_to(batches, samples, None if samples is not None else MOST_UNCOUNTED):
        kept.append(batch)
        n_bytes += sum(t.numel() * t.itemsize for t in runtime.tensors_in(batch))
        if n_bytes > room > 0:
            raise DataError(
                f"batches: a stream of more than {n_bytes >> 20} MiB, which the sequential feed "
                "reads again. Give a list or a loader, or samples=, the number of examples to use."
            )
    return kept


def _as_alone(source: Source, first: list[Any], walking: Collector) -> bool:
    """Whether the first batches give the same moments in a plain pass as in the walk."""
    # A network that stores activations on itself reads another batch's during a walk.
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
    """The largest distance, over layers, between the moments found and one more pass's moments."""
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
    """Measure layer after layer in call order, with all earlier layers already final."""
    order, target, collector = scout.sums.order(), source.target, found.collector
    # Layers that are not final yet use the batch feed's moments, the closest available.
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
                "or a loader, so the batches can be read again.",
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
    """Measure all layers' inputs in one pass, in inference or with each batch's statistics."""
    # Frozen layers are included, to show whether their constants fit the data.
    sites = [site for site in find_norms(model) if site.has_statistics and site.is_measurable]
    sources = batches if isinstance(batches, Sources) else None
    source = Source(model, batches, forward, target=Target(sources=sources))
    collector = kind(sites, source, **how)
    if one_pass(source, collector).n_examples == 0:
        raise DataError("residuals: no examples. Give at least one batch.")
    return collector


def stored_drift(met: Collector, name: str) -> tuple[float, float]:
    """The distance of a layer's stored moments from the measured moments; see `drift`."""
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
    """Compare stored statistics with the statistics measured in one inference pass over the data.

    Args:
        model: the model as it will be used; it is only read.
        batches: any iterable of batches.
        forward: called as ``forward(model, batch)``, for batches in an unusual form.
        mix: weights of several sources; ``batches`` is then a list of the sources.

    Returns:
        For each layer reached, two means over its channels: of |log((var_stored + eps) /
        (var_fresh + eps))|, and of |mean_stored - mean_fresh| / sqrt(var_fresh + eps).

    Raises:
        DataError: if there are no examples.
    """
    batches = Sources(batches, mix) if mix else batches
    met = met_in_a_pass(model, batches, Collector, forward=forward)
    drifts = {name: stored_drift(met, name) for name in met.by_name if name in met.sums.measured}
    return {name: (log_var_ratio, shift) for name, (shift, log_var_ratio) in drifts.items()}
