"""The statistics that are asked for: which target, its rule, and which examples count."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.save import identity_of
from bnfix.core import distributed
from bnfix.core.errors import ConfigError, DataError, NormError
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Sums
from bnfix.recalibrate.blend import Blend, Weight, by_drift, by_examples, fixed
from bnfix.recalibrate.collector import Collector, Source, Target, eps_of, stored_moments
from bnfix.recalibrate.reference import Originals, Reference

_Rows = tuple[Tensor, Tensor, Tensor | None]
#: Principal components, and examples that each of them takes at least.
_COMPONENTS, _EXAMPLES_EACH = 4, 16
#: The distance of two kinds, and what few examples n add to it, by 1/n.
_APART, _CHANCE = 4.0, 50.0
#: A part of all that may be the larger half; rounds of a mixture.
_HALF, _ROUNDS = 0.495, 100
#: Difference of two passes' means of an example, by the root of its mean square, that is rounding.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Wanted:
    """A target, and the options that are its own."""

    target: str
    train_batch_size: int | None = None
    reference: Originals | None = None
    prior: float | str | None = None
    new_weight: float | None = None
    robust: bool = False
    mix: tuple[float, ...] = ()

    def check(self, feed: str) -> None:
        """Refuse what is unknown, missing, out of range or another target's."""
        target, b = self.target, self.train_batch_size
        takes = {"reference": nn.Module, "interpolated": Mapping}.get(target)
        known = takes is not None or target in ("population", "train-batch", "blend")
        if not known or feed not in ("batch", "sequential"):
            raise ConfigError(
                f"target {target!r}, feed {feed!r}: expected population, train-batch, "
                "reference or blend (or interpolated), batch or sequential."
            )
        if target == "train-batch" and (b is None or b < 1):
            raise ConfigError("target train-batch: give train_batch_size, at least 1.")
        if not isinstance(self.reference, takes or type(None)):
            raise ConfigError(
                "target reference: give the original as reference=; interpolated: the networks, "
                "each with its weight, as reference={network: weight}; no other target takes one.",
                name="reference",
            )
        if takes is not None and feed == "batch":
            raise ConfigError(
                f"target {target}: needs the sequential feed. Under the batch feed a layer sees "
                "what batches normalized by themselves, which the original's stored statistics "
                "never gave.",
                name="feed",
            )
        if self.robust and (feed == "batch" or target not in ("population", "blend")):
            raise ConfigError(
                "robust: only for targets population and blend, by the sequential feed. Under the "
                "batch feed garbage normalizes its whole batch.",
                name="robust",
            )
        if self.mix and (self.robust or target not in ("population", "blend")):
            raise ConfigError(
                "mix: only for targets population and blend, and not with robust.", name="mix"
            )
        self._check_blend()

    def _check_blend(self) -> None:
        prior, weight = self.prior, self.new_weight
        if self.target != "blend" and (prior is not None or weight is not None):
            raise ConfigError("prior, new_weight: only target blend takes them.", name="prior")
        if prior is not None and weight is not None:
            raise ConfigError("prior, new_weight: both say how much. Give one.", name="prior")
        if not (prior in (None, "auto") or (not isinstance(prior, str) and 0 <= prior < 1e15)):
            raise ConfigError(f"prior: {prior}, expected auto or a number from 0.", name="prior")
        if weight is not None and not 0 <= weight <= 1:
            raise ConfigError(f"new_weight: {weight}, expected 0 to 1.", name="new_weight")

    def rule(self, model: nn.Module, sites: Sequence[NormSite]) -> Target:
        """The rule of these statistics for a model."""
        if self.reference is not None:
            return Reference(self.reference, model, sites)
        rule = Target(self.train_batch_size if self.target == "train-batch" else None)
        if self.target == "blend":
            rule = Blend(sites, self._weight(len(sites)))
        if self.robust:
            rule.screen, rule.name = Screen(), f"robust {rule.name}"
        return rule

    def _weight(self, n_layers: int) -> Weight:
        if self.new_weight is not None:
            return fixed(self.new_weight)
        if self.prior is None or isinstance(self.prior, str):
            return by_drift(n_layers)
        return by_examples(self.prior)

    def to_json(self) -> dict[str, Any]:
        """What tells runs of different targets apart."""
        own: dict[str, Any] = (
            {} if self.target != "blend" else {"prior": self.prior, "weight": self.new_weight}
        )
        if self.robust:
            own["robust"] = True
        if self.mix:
            own["mix"] = self.mix
        if isinstance(self.reference, nn.Module):
            own["reference"] = identity_of(self.reference, {})
        elif self.reference is not None:
            own["reference"] = [(identity_of(n, {}), w) for n, w in self.reference.items()]
        return {"target": self.target, **own}


class Screen:
    """Lets through examples of the kind that most are of; see docs/mathematics.md.

    Source: mixtures by expectation and maximization (Dempster et al., 1977). Medians a channel stay
    at the edge of what is clean, if all garbage lies on one side.
    """

    def __init__(self) -> None:
        #: Examples' means and variances, by layer and batch; in the end of the layer that meets
        #: the same in every pass.
        self._met: dict[str, dict[int, Tensor]] = {}
        self._keep: dict[int, Tensor] = {}
        self.n_left_out: int | None = None

    def find_(
        self, source: Source, sites: Sequence[NormSite], run: Callable[[Source, Collector], Any]
    ) -> None:
        """Run the batches once, and decide which of their examples count."""
        sums = partial(Sums, screen=self)
        census = Collector(sites, source.cost, by_batch=False, sums=sums)
        run(source, census)
        found: dict[str, dict[int, Tensor]] = {name: {} for name in census.sums.order()}
        for name, part in (
            (name, part) for met in distributed.gather(self._met) for name, part in met.items()
        ):
            found[name] |= part
        first, *_ = [*found, ""]
        sizes = {batch: len(part) for batch, part in sorted(found.get(first, {}).items())}
        n = sum(sizes.values())
        if n < _EXAMPLES_EACH:
            raise DataError(
                f"robust: {n} examples, expected at least {_EXAMPLES_EACH}, of which most must be "
                "of one kind. Give more of them, or leave robust (--robust) out."
            )
        blocks = [
            _features(torch.cat([part[batch] for batch in sizes]), census.by_name[name])
            for name, part in found.items()
            if sizes == {batch: len(rows) for batch, rows in part.items()}
        ]
        keep = _larger_kind(torch.cat(blocks, 1), blocks[-1])
        self._keep = dict(zip(sizes, torch.split(keep, list(sizes.values())), strict=True))
        self.n_left_out = n - int(keep.sum())
        once = census.sums.n_calls[first] == 1 and census.sums.is_first(first)
        self._met = {first: found[first]} if once else {}

    def rows(self, name: str, index: int, moments: _Rows) -> _Rows:
        """Those of a call's means ``(N, C)``, variances and counts that are of examples kept."""
        batch = index * distributed.here().size + distributed.here().rank
        mean, var, count = moments
        if self.n_left_out is None:
            self._met.setdefault(name, {}).setdefault(batch, torch.stack((mean, var), 1).cpu())
            return moments
        keep = self._keep.get(batch)
        if keep is None or (name in self._met and not _same(mean, self._met[name][batch])):
            raise DataError(
                f"robust: batch {batch} (counted from 0) is another than in the first pass. Give "
                "the same batches in every pass, not shuffled, without random changes."
            )
        if len(keep) != len(mean):
            found = f"{name}: gets {len(mean)} rows for {len(keep)} examples, and robust cannot say"
            raise NormError(f"{found} whose they are. Leave it with skip (--skip).", name=name)
        keep = keep.to(mean.device)
        return mean[keep], var[keep], None if count is None else count[keep]


def _same(mean: Tensor, met: Tensor) -> bool:
    before, var = met.to(mean).unbind(1)
    size = (before.square() + var).sqrt()
    return mean.shape == size.shape and bool(((mean - before).abs() <= _ROUNDING * size).all())


def _features(rows: Tensor, site: NormSite) -> Tensor:
    """Means and variances ``(N, 2, C)`` in units of the stored ones, a layer as one."""
    (mean, var), eps = rows.double().unbind(1), eps_of(site)
    old_mean, old_var = (moment.to(mean) for moment in stored_moments(site))
    spread = old_var.clamp_min(0) + eps
    # Nothing wild outweighs the rest.
    shift, ratio = ((mean - old_mean) / spread.sqrt()).asinh(), ((var + eps) / spread).log().asinh()
    return torch.cat((shift, ratio / 2**0.5), 1).div(mean.shape[1] ** 0.5)


def _larger_kind(features: Tensor, last: Tensor) -> Tensor:
    """Which examples ``(N,)`` are of the kind that most are of; of halves the less drifted one."""
    keep = torch.ones(len(features), dtype=torch.bool)
    while True:
        inside = keep.nonzero().squeeze(1)
        part = _split(features[inside])
        halves = [inside[side] for side in (part, ~part) if int(side.sum()) >= _HALF * len(keep)]
        if not halves or bool(part.all()):
            return keep
        chosen = min(halves, key=lambda half: float(last[half].mean(0).square().sum()))
        keep = torch.zeros_like(keep).index_fill(0, chosen, True)


def _split(features: Tensor) -> Tensor:
    """The examples of one of two parts that lie far apart; all, if there are none."""
    n, k = len(features), min(3 * _COMPONENTS, *features.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(features - features.mean(0), q=k, niter=8)
    points = (u * s)[:, : max(1, min(_COMPONENTS, n // _EXAMPLES_EACH))]
    count, found = torch.arange(1, n), []
    for column in points.unbind(1):
        ordered = column.sort().values
        # The least squares within, since the mean is 0.
        middle = (ordered.cumsum(0)[:-1].square() / (count * count.flip(0))).argmax()
        found.append(_two_kinds(points, column <= ordered[middle]))
    apart, part = max(found, key=lambda pair: pair[0])
    return part if apart >= _APART + _CHANCE / n else torch.ones_like(part)


def _two_kinds(points: Tensor, part: Tensor) -> tuple[float, Tensor]:
    """A mixture of two normal densities, from a split: how far apart, and who is of the first."""
    n, q = points.shape
    # Keeps covariances positive.
    ridge = torch.eye(q).to(points) * (1e-3 * points.var(0).mean() + 1e-12)
    shares = torch.stack((part, ~part), 1).to(points)
    for _ in range(_ROUNDS):
        weights = shares.sum(0)
        if float(weights.min()) <= q + 1:
            break
        logs = []
        for weight, share in zip(weights, shares.unbind(1), strict=True):
            d = points - share @ points / weight
            covariance = (share * d.mT) @ d / weight + ridge
            distance = (d * torch.linalg.solve(covariance, d.mT).mT).sum(1)
            logs.append((weight / n).log() - (covariance.logdet() + distance) / 2)
        before, shares = shares, torch.stack(logs, 1).softmax(1)
        if float((shares - before).abs().max()) < 1e-4:
            break
    part = shares[:, 0] > 0.5
    return _apart(points[part], points[~part], ridge), part


def _apart(ours: Tensor, others: Tensor, ridge: Tensor) -> float:
    """Bhattacharyya's distance of two parts, as normal densities; 0 if one is too small for it."""
    if min(len(ours), len(others)) <= len(ridge) + 1:
        return 0.0
    one, other = (side.mT.cov().reshape(ridge.shape) + ridge for side in (ours, others))
    both, gap = (one + other) / 2, ours.mean(0) - others.mean(0)
    spread = both.logdet() - (one.logdet() + other.logdet()) / 2
    return float(gap @ torch.linalg.solve(both, gap) / 8 + spread / 2)
