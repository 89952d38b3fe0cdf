"""The requested statistics: their target, its rule, and the examples that count.

A blend mixes stored moments o and measured moments m by the law of total variance, with weight w
for the measured ones:

    mean = (1 - w) mean_o + w mean_m
    var  = (1 - w) var_o + w var_m + w (1 - w) (mean_m - mean_o)^2

w is a number, or n / (n + N), where the stored statistics count as N examples and n were measured,
or it follows from each layer's drift:

    D = mean over channels of (mean_m - mean_o)^2 / var_o + log(var_m / var_o)^2 / 2
    S = the same of the standard errors; E = max(0, D - S)
    w = min(1, 1/2 + 1/L) E / (E + 4 S + 0.02), L the number of layers

In a deep network, half of the drift is enough. Under the sequential feed, later layers measure and
correct the remaining drift, but not the noise of few examples. The layer stays static and foldable.
Source: Schneider et al., "Improving robustness against common corruptions by covariate shift
adaptation", 2020, has n / (n + N), and mixes the variances without the term of the means.

Analogue or worn hardware stores each weight with an error. In copy k, every convolution and linear
layer has W_k = W + r s N(0, 1), s the standard deviation of all of W; norms and biases are exact.
Copy k measures its own moments (mu_k, v_k), behind layers with the same errors, and

    mean = E_k mu_k,  var = E_k v_k

are right on average. Source: Tsai et al., "Robust Processing-In-Memory Neural Networks via
Noise-Aware Normalization", 2020, for the idea; we found no published code.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.save import identity_of
from bnfix.checkpoints.several import describe_domains, domain_of, set_statistics_, statistics_in
from bnfix.core import distributed, guards
from bnfix.core.errors import DataError, ModelError, NormError
from bnfix.core.options import require
from bnfix.core.settings import NoiseRecipe
from bnfix.core.torch_private import ConvBase
from bnfix.norm.sites import NormSite, find_norms
from bnfix.recalibrate.accumulator import Accumulator, Sources
from bnfix.recalibrate.collector import Collector, Source, Target
from bnfix.recalibrate.passes import met_in_a_pass, one_pass
from bnfix.recalibrate.reference import Originals, Reference

_Moments = tuple[Tensor, Tensor]
_OWN = "its own"
#: A domain is taken below this part of the own distance, if that is above the second number:
#: nearer statistics of another kind of images can still cost accuracy (docs/LOG.md).
_NEARER, _FAR = 0.25, 0.12
#: The record of a calibration.
_Done = TypeVar("_Done")
_Rows = tuple[Tensor, Tensor, Tensor | None]

#: Drift of a healthy network's layers on its own kind of images, without chance.
_USUAL = 0.02
#: Multiplier of chance: the errors of all layers add up, while remaining drift does not.
_OFTEN = 4

#: The measured effect of weights by drift; docs/LOG.md has the table.
MEASURED_SPREAD = (
    "in 86 trials (docs/LOG.md: 34 pairs of a network and a shift, 16 to 500 images, top-1 of 200 "
    "to 3,000 others) 11.2 points above the stored ones on average, and 4.5 below at the worst"
)

#: Most principal components, and the least number of examples for each.
_COMPONENTS, _EXAMPLES_EACH = 4, 16
#: Distance that separates two kinds; n examples add the second number / n to it.
_APART, _CHANCE = 4.0, 50.0
#: Smallest fraction that can be the larger half; most rounds of a mixture fit.
_HALF, _ROUNDS = 0.495, 100
#: Difference of an example's mean in two passes, relative to its RMS, that counts as rounding.
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Wanted:
    """A target and its options."""

    target: str
    train_batch_size: int | None = None
    reference: Originals | None = None
    prior: float | str | None = None
    new_weight: float | None = None
    robust: bool = False
    mix: tuple[float, ...] = ()

    def check(self, feed: str) -> None:
        """Refuse options that are unknown, missing, out of range or for another target."""
        target, b, prior, weight = self.target, self.train_batch_size, self.prior, self.new_weight
        takes = {"reference": nn.Module, "interpolated": Mapping}.get(target)
        measured, by_batch = target in ("population", "blend"), feed == "batch"
        require(
            (takes is not None or measured or target == "train-batch")
            and feed in ("batch", "sequential"),
            f"target {target!r}, feed {feed!r}: expected population, train-batch, reference or "
            "blend (or interpolated), batch or sequential.",
            "target",
        )
        sized = target != "train-batch" or (b is not None and b >= 1)
        require(sized, "target train-batch: give train_batch_size, at least 1.", "train_batch_size")
        require(
            isinstance(self.reference, takes or type(None)),
            "target reference: give the original as reference=; interpolated: the networks with "
            "their weights, as reference={network: weight}; no other target takes one.",
            "reference",
        )
        require(
            takes is None or not by_batch,
            f"target {target}: needs the sequential feed. The batch feed normalizes each batch by "
            "its own statistics, which the original's stored statistics do not describe.",
            "feed",
        )
        require(
            not self.robust or (measured and not by_batch),
            "robust: only for targets population and blend, with the sequential feed. Under the "
            "batch feed, garbage affects its whole batch.",
            "robust",
        )
        mixes = not self.mix or (measured and not self.robust)
        words = "mix: only for targets population and blend, and not with robust."
        require(mixes, words, "mix")
        alone = target == "blend" or (prior is None and weight is None)
        require(alone, "prior, new_weight: only target blend takes them.", "prior")
        one = prior is None or weight is None
        require(one, "prior, new_weight: both set the same weight. Give one.", "prior")
        counted = prior in (None, "auto") or (not isinstance(prior, str) and 0 <= prior < 1e15)
        require(counted, f"prior: {prior}, expected auto or a number, at least 0.", "prior")
        part = weight is None or 0 <= weight <= 1
        require(part, f"new_weight: {weight}, expected 0 to 1.", "new_weight")

    def rule(self, model: nn.Module, sites: Sequence[NormSite], sources: Sources | None) -> Target:
        """The rule that computes these statistics for a model."""
        if self.reference is not None:
            return Reference(self.reference, model, sites)
        screen = Screen() if self.robust else None
        if self.target == "blend":
            rule: Target = Blend(sites, self.prior, self.new_weight)
        else:
            rule = Target(self.train_batch_size if self.target == "train-batch" else None)
        rule.sources, rule.screen = sources, screen
        rule.name = f"robust {rule.name}" if screen else rule.name
        return rule

    def to_json(self) -> dict[str, Any]:
        """The options that identify a run."""
        own: dict[str, Any] = (
            {} if self.target != "blend" else {"prior": self.prior, "weight": self.new_weight}
        )
        own |= {name: value for name in ("robust", "mix") if (value := getattr(self, name))}
        if isinstance(self.reference, nn.Module):
            own["reference"] = identity_of(self.reference, {})
        elif self.reference is not None:
            own["reference"] = [(identity_of(n, {}), w) for n, w in self.reference.items()]
        return {"target": self.target, **own}


class Blend(Target):
    """Stored and measured moments, mixed with a weight that can differ by layer."""

    def __init__(
        self, sites: Sequence[NormSite], prior: float | str | None, weight: float | None
    ) -> None:
        super().__init__()
        self.name = "blend"
        self._prior, self._weight = prior, weight
        # Read now, because layers hold lent moments while batches run.
        self._stored = {site.name: site.moments for site in sites}

    def moments(self, site: NormSite, sums: Accumulator) -> _Moments:
        """Mean and variance ``(C,)``, float64, between the stored and the population's moments."""
        old, new = self._stored[site.name], super().moments(site, sums)
        old = old[0].to(new[0]), old[1].to(new[1])
        weight = self.weights[site.name] = self._weight_of(site, old, sums)
        return between(old, new, weight)

    def _weight_of(self, site: NormSite, old: _Moments, sums: Accumulator) -> float:
        """The weight of a layer's measured moments."""
        if self._weight is not None:
            return self._weight
        if self._prior is not None and not isinstance(self._prior, str):
            return sums.n_examples / (sums.n_examples + self._prior)
        drift, chance = drift_of(site, old, sums)
        drift = max(0.0, drift - chance)
        most = min(1.0, 1 / 2 + 1 / len(self._stored))
        return most * drift / (drift + _OFTEN * chance + _USUAL)


def between(old: _Moments, new: _Moments, weight: float) -> _Moments:
    """The mixture of two pairs of moments; at weights 0 and 1 exactly one of them."""
    # Unlike a sum of two products, lerp is exact at both ends.
    mean, var = (torch.lerp(o, n, weight) for o, n in zip(old, new, strict=True))
    return mean, var + weight * (1 - weight) * (new[0] - old[0]).square()


def drift_of(site: NormSite, old: _Moments, sums: Accumulator) -> tuple[float, float]:
    """The drift of a layer's moments from the stored ones, and the drift expected by chance.

    Means over channels of (mean_m - mean_o)^2 / var_o + log(var_m / var_o)^2 / 2; var includes eps.
    """
    eps = site.eps
    mean, var = sums.statistics(None)
    mean_se, var_se = sums.errors()
    spread, new_spread = old[1].clamp_min(0) + eps, var + eps
    found = (mean - old[0]).square() / spread + (new_spread / spread).log().square() / 2
    chance = mean_se.square() / spread + (var_se / new_spread).square() / 2
    return float(found.mean()), float(chance.mean())


def take_domain_(loaded: Loaded, name: str | None, batches: Iterable[Any]) -> list[str]:
    """Set a model's statistics to a domain's or, by ``auto``, to much closer ones than its own."""
    if name is None or not loaded.domains:
        return [] if name is None else ["has no domains; its own statistics were used"]
    if name != "auto":
        set_statistics_(loaded.model, domain_of(loaded.domains, name, loaded.checkpoint.path))
        return describe_domains(loaded.domains, name)
    sets, far = {_OWN: statistics_in(loaded.model), **loaded.domains}, dict[str, float]()
    for one, found in sets.items():
        set_statistics_(loaded.model, found)
        met = met_in_a_pass(loaded.model, batches, Collector)
        pairs = [(met.by_name[layer], sums) for layer, sums in met.sums.measured.items()]
        far[one] = fmean(drift_of(site, site.moments, sums)[0] for site, sums in pairs)
    nearest = min(far, key=lambda one: far[one])
    is_clear = far[_OWN] > _FAR and far[nearest] < _NEARER * far[_OWN]
    chosen = nearest if is_clear else _OWN
    set_statistics_(loaded.model, sets[chosen])
    listed = ", ".join(f"{one} {distance:.3g}" for one, distance in far.items())
    rule = f"a domain must be below {_NEARER:g} of the own distance, and that above {_FAR:g}"
    return [f"statistics: {chosen} (distances: {listed}; {rule})"]


@contextmanager
def noisy_weights(model: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Add noise of ``size`` times each weight's deviation; restore the weights exactly at exit."""
    if not size:
        yield
        return
    # Always drawn on the CPU, so that a seed gives the same copy on every device.
    before, generator = guards.Snapshot(model), torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for weight in _weights(model):
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(drawn, alpha=size * float(weight.double().std(correction=0)))
        yield
    finally:
        before.restore_()


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers; shared weights once."""
    layers = (m for m in model.modules() if isinstance(m, ConvBase | nn.Linear))
    found = {id(w): w for m in layers if isinstance(w := m.weight, nn.Parameter)}
    if not found:
        raise ModelError("model: no convolution or linear layer, so no weight to add noise to.")
    return list(found.values())


def average_over_noise_(
    model: nn.Module, measure: Callable[[], _Done], size: float, seeds: Sequence[int]
) -> _Done:
    """Set the statistics to their mean over noisy copies, one per seed, each set by ``measure``.

    An exception leaves the model bit for bit unchanged.
    """
    found, new = list[Any](), dict[str, _Moments]()
    sites = {site.name: site for site in find_norms(model)}
    for k, seed in enumerate(seeds, 1):
        with noisy_weights(model, size, seed):
            found.append(measure())
            for name in (layer.name for layer in found[-1].layers):
                own = sites[name].moments
                mean, var = new.get(name, own)
                # Unlike a sum, lerp keeps the mean of equal values exact to the last bit.
                new[name] = torch.lerp(mean, own[0], 1 / k), torch.lerp(var, own[1], 1 / k)
    for name, (mean, var) in new.items():
        sites[name].set_moments_(mean, var, found[-1].n_batches)
    done: _Done = replace(
        found[-1],
        target=f"{found[-1].target}, mean of {len(found)} copies with weight noise {size:g}",
        passes=sum(one.passes for one in found),
    )
    return done


def describe_noise(recipe: NoiseRecipe, seed: int) -> list[str]:
    """The copies used to measure the statistics, and the copies used to judge them."""
    if not recipe.weight_noise:
        return []
    fit, select, test = (recipe.copies(part, seed) for part in ("fit", "select", "test"))
    return [
        f"weight noise {recipe.weight_noise:g} of each weight's deviation: statistics under noise "
        f"come from {recipe.draws} copies (seeds from {fit[0]}); select and test use other copies "
        f"(seeds from {select[0]} and {test[0]}), so each example is a group of {recipe.draws}."
    ]


class Screen:
    """Keeps only examples of the majority kind; see docs/mathematics.md.

    Source: mixtures by expectation and maximization (Dempster et al., 1977). Per-channel medians
    would end at the edge of the clean examples if all garbage lies on one side.
    """

    def __init__(self) -> None:
        #: Examples' means and variances, by layer and batch; after `find_` only for the layer with
        #: the same inputs in every pass.
        self._met: dict[str, dict[int, Tensor]] = {}
        self._keep: dict[int, Tensor] = {}
        self.n_left_out: int | None = None

    def find_(self, source: Source, sites: Sequence[NormSite]) -> None:
        """Run the batches once and decide which of their examples count."""
        census = Collector(sites, source)
        one_pass(source, census)
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
                f"robust: {n} examples, expected at least {_EXAMPLES_EACH}, most of them of one "
                "kind. Give more examples, or leave robust (--robust) out."
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
        """A call's means ``(N, C)``, variances and counts, for the kept examples only."""
        batch = index * distributed.here().size + distributed.here().rank
        mean, var, count = moments
        if self.n_left_out is None:
            self._met.setdefault(name, {}).setdefault(batch, torch.stack((mean, var), 1).cpu())
            return moments
        keep = self._keep.get(batch)
        if keep is None or (name in self._met and not _same(mean, self._met[name][batch])):
            raise DataError(
                f"robust: batch {batch} (counted from 0) differs from the first pass. Give the "
                "same batches in every pass, without shuffling or random augmentation."
            )
        if len(keep) != len(mean):
            found = f"{name}: gets {len(mean)} rows for {len(keep)} examples; robust cannot tell"
            raise NormError(f"{found} which are whose. Leave it with skip (--skip).", name=name)
        keep = keep.to(mean.device)
        return mean[keep], var[keep], None if count is None else count[keep]


def _same(mean: Tensor, met: Tensor) -> bool:
    before, var = met.to(mean).unbind(1)
    size = (before.square() + var).sqrt()
    return mean.shape == size.shape and bool(((mean - before).abs() <= _ROUNDING * size).all())


def _features(rows: Tensor, site: NormSite) -> Tensor:
    """Means and variances ``(N, 2, C)`` as features in stored units; each layer counts as one."""
    (mean, var), eps = rows.double().unbind(1), site.eps
    old_mean, old_var = (moment.to(mean) for moment in site.moments)
    spread = old_var.clamp_min(0) + eps
    # asinh, so that wild values do not outweigh the rest.
    shift, ratio = ((mean - old_mean) / spread.sqrt()).asinh(), ((var + eps) / spread).log().asinh()
    return torch.cat((shift, ratio / 2**0.5), 1).div(mean.shape[1] ** 0.5)


def _larger_kind(features: Tensor, last: Tensor) -> Tensor:
    """A mask ``(N,)`` of the majority kind; of two halves, the one that drifted less."""
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
    """A mask of one of two parts that lie far apart; all examples, if no split is clear."""
    n, k = len(features), min(3 * _COMPONENTS, *features.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, _ = torch.svd_lowrank(features - features.mean(0), q=k, niter=8)
    points = (u * s)[:, : max(1, min(_COMPONENTS, n // _EXAMPLES_EACH))]
    count, found = torch.arange(1, n), []
    for column in points.unbind(1):
        ordered = column.sort().values
        # The split with the least squares within its parts, since the mean is 0.
        middle = (ordered.cumsum(0)[:-1].square() / (count * count.flip(0))).argmax()
        found.append(_two_kinds(points, column <= ordered[middle]))
    apart, part = max(found, key=lambda pair: pair[0])
    return part if apart >= _APART + _CHANCE / n else torch.ones_like(part)


def _two_kinds(points: Tensor, part: Tensor) -> tuple[float, Tensor]:
    """A mixture of two normals, from a split: its distance, and a mask of the first part."""
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
    """Bhattacharyya's distance of two parts as normal densities; 0 if a part is too small."""
    if min(len(ours), len(others)) <= len(ridge) + 1:
        return 0.0
    one, other = (side.mT.cov().reshape(ridge.shape) + ridge for side in (ours, others))
    both, gap = (one + other) / 2, ours.mean(0) - others.mean(0)
    spread = both.logdet() - (one.logdet() + other.logdet()) / 2
    return float(gap @ torch.linalg.solve(both, gap) / 8 + spread / 2)
