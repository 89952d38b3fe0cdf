"""Moments of layers whose output comes back to their input: a fixed point, found by passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bnfix.core.errors import NumericError
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Accumulator
from bnfix.recalibrate.collector import Collector, as_stored

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


class Settled:
    """What the passes of the sequential feed have measured, and how well it agrees with itself."""

    def __init__(self, collector: Collector) -> None:
        self.collector, self.passes, self.error = collector, 0.0, 0.0
        #: Moments of layers that did not settle: those that came nearest.
        self.nearest: _Moments = {}


@dataclass
class _Round:
    """Moments used, those met with them, and how far apart they are."""

    error: float
    used: _Moments
    met: _Moments
    measured: Mapping[str, Accumulator]
    n_settled: int


def settle(
    found: Settled, names: Sequence[str], measure: Callable[[Sequence[str]], _Moments]
) -> None:
    """Repeat passes until the moments that layers use are those that they meet.

    Plain rounds while they come nearer, then Anderson's: the step is taken from the combination of
    earlier rounds that leaves the least change. What is kept is the best round, the first of which
    uses the moments of the batch feed.

    Source: Anderson, "Iterative Procedures for Nonlinear Integral Equations", 1965.
    """
    found.collector.stops = False
    use, sites = found.collector.use, [found.collector.by_name[name] for name in names]
    space = _Space(sites, use)
    best = last = _one_round(found, names, measure)
    history, part, enough = [last], 1.0, _SETTLED
    step = last.met
    for _ in range(_ROUNDS + len(names)):
        if last.error < enough:
            use.update(space.stored(last.met))
            return
        use.update(space.stored(step))
        try:
            now = _one_round(found, names, measure)
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
    found.collector.sums.measured.update(best.measured)
    found.nearest.update(best.used)


def _one_round(
    found: Settled, names: Sequence[str], measure: Callable[[Sequence[str]], _Moments]
) -> _Round:
    collector = found.collector
    used = {name: collector.use[name] for name in names}
    found.passes += 1.0
    met = measure(names)
    eps = {name: eps_of(collector.by_name[name]) for name in names}
    errors = [max(drift(used[name], met[name], eps[name])) for name in names]
    n_settled = next((i for i, error in enumerate(errors) if not error < _SETTLED), len(errors))
    measured = {name: collector.sums.measured[name] for name in names}
    return _Round(error=max(errors), used=used, met=met, measured=measured, n_settled=n_settled)


class _Space:
    """Moments as one vector: means in units of a scale, logarithms of variances with eps."""

    def __init__(self, sites: Sequence[NormSite], use: _Moments) -> None:
        self._sites = sites
        variances = [use[site.name][1].double() for site in sites]
        self._scales = [(v + eps_of(s)).sqrt() for v, s in zip(variances, sites, strict=True)]

    def stored(self, moments: _Moments) -> _Moments:
        """As the layers' buffers hold them."""
        return {site.name: as_stored(site, *moments[site.name]) for site in self._sites}

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
        parts: list[Tensor] = []
        for site, scale in zip(self._sites, self._scales, strict=True):
            mean, var = (moment.double() for moment in moments[site.name])
            parts += [mean / scale, (var.clamp_min(0) + eps_of(site)).log()]
        return torch.cat([part.cpu() for part in parts])

    def _moments(self, point: Tensor, before: Tensor, part: float) -> _Moments:
        """The moments of a vector; variances change by a bounded factor."""
        most = _MOST_LOG * part
        found: _Moments = {}
        start = 0
        for site, scale in zip(self._sites, self._scales, strict=True):
            middle, end = start + scale.numel(), start + 2 * scale.numel()
            log = before[middle:end] + (point - before)[middle:end].clamp(-most, most)
            var = (log.exp() - eps_of(site)).clamp_min(0)
            found[site.name] = point[start:middle].to(scale) * scale, var.to(scale)
            start = end
        return found


def eps_of(site: NormSite) -> float:
    """The eps of a layer."""
    return float(getattr(site.module, "eps", 1e-5))


def drift(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], eps: float
) -> tuple[float, float]:
    """How far old moments are from new, as plain means over the channels."""
    old_mean, old_var = (moment.double() for moment in old)
    mean, var = new
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).mean()
    ratio = ((var + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
    return float(shift), float(ratio)
