"""Statistics between those stored and those measured, and of several sources.

Two sources, o stored and m measured, mix by the law of total variance with a weight w of the new:

    mean = (1 - w) mean_o + w mean_m
    var  = (1 - w) var_o + w var_m + w (1 - w) (mean_m - mean_o)^2

w is a number, or n / (n + N): the stored statistics count as N examples beside the n measured, or
is found layer by layer from the drift itself (`by_drift`):

    D = mean over channels of (mean_m - mean_o)^2 / var_o + log(var_m / var_o)^2 / 2
    S = the same of the standard errors; E = max(0, D - S)
    w = min(1, 1/2 + 1/L) E / (E + 4 S + 0.02), L the number of layers

Half of the way is enough in a deep network: what a layer leaves, those above it meet in their turn,
under the sequential feed; the noise of few examples they do not undo. The layer stays static, and
folds.

Source: Schneider et al., "Improving robustness against common corruptions by covariate shift
adaptation", 2020, has n / (n + N), and mixes the variances without the term of the means.

Several sources s with moments (mean_s, var_s), pooled over their own examples, and weights w_s,
their sum 1, mix by the same law:

    mean = sum_s w_s mean_s,  var = sum_s w_s (var_s + (mean_s - mean)^2)

So each of the n_s examples of s weighs w_s / n_s, however many there are. No batch holds examples
of two sources; at each layer all of them are measured in the same pass, and mixed before those
above it are normalized (sequential feed).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.several import domain_of, set_statistics_, statistics_in
from bnfix.core import runtime
from bnfix.core.errors import ConfigError, DataError
from bnfix.norm.moments import Moments, mix
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Accumulator, Sums
from bnfix.recalibrate.collector import Collector, Target, eps_of, stored_moments
from bnfix.recalibrate.passes import met_in_a_pass

#: Drift of layers of healthy networks on images of their own kind, chance taken off.
_USUAL = 0.02
#: How often chance counts: errors of all layers add up, as drift that is left does not.
_CHANCE = 4

#: What `by_drift` has done where it was measured; docs/LOG.md has the table.
MEASURED_SPREAD = (
    "in 86 trials (docs/LOG.md: 34 pairs of a network and a shift, 16 to 500 images, top-1 of 200 "
    "to 3,000 others) 11.2 points above the stored ones on average, and 4.5 below at the worst"
)

_Moments = tuple[Tensor, Tensor]
#: The weight of the new: of a layer with its stored moments, by those measured.
Weight = Callable[[NormSite, _Moments, Accumulator], float]


class Blend(Target):
    """Moments stored and measured, mixed with a weight that may differ by layer."""

    def __init__(self, sites: Sequence[NormSite], weight: Weight) -> None:
        super().__init__()
        self.name = "blend"
        self._weight = weight
        # Taken now: while batches run, layers hold what they are lent.
        self._stored = {site.name: stored_moments(site) for site in sites}

    def moments(self, site: NormSite, sums: Accumulator) -> _Moments:
        """Mean and variance ``(C,)``, float64, between the stored ones and the population's."""
        old, new = self._stored[site.name], super().moments(site, sums)
        old = old[0].to(new[0]), old[1].to(new[1])
        weight = self.weights[site.name] = self._weight(site, old, sums)
        return between(old, new, weight)


def between(old: _Moments, new: _Moments, weight: float) -> _Moments:
    """The mixture of two pairs of moments; at weight 0 and 1 one of them, bit for bit."""
    # Unlike a sum of two products, lerp gives its ends exactly.
    mean, var = (torch.lerp(o, n, weight) for o, n in zip(old, new, strict=True))
    return mean, var + weight * (1 - weight) * (new[0] - old[0]).square()


def fixed(weight: float) -> Weight:
    """Weigh every layer's new moments alike."""
    return lambda site, old, sums: weight


def by_examples(prior: float) -> Weight:
    """Weigh by n / (n + N): the stored statistics count as N examples."""
    return lambda site, old, sums: sums.n_examples / (sums.n_examples + prior)


def by_drift(n_layers: int) -> Weight:
    """Weigh by how far a layer has drifted, less what few examples do by chance."""
    most = min(1.0, 1 / 2 + 1 / n_layers)

    def weight(site: NormSite, old: _Moments, sums: Accumulator) -> float:
        drift, chance = drift_of(site, old, sums)
        drift = max(0.0, drift - chance)
        return most * drift / (drift + _CHANCE * chance + _USUAL)

    return weight


def drift_of(site: NormSite, old: _Moments, sums: Accumulator) -> tuple[float, float]:
    """How far a layer's moments are from the stored ones, and how far chance brings them.

    Means over channels of d^2 / var_o + log(var_m / var_o)^2 / 2, d of the means, eps in variances.
    """
    eps = eps_of(site)
    mean, var = sums.statistics(None)
    mean_se, var_se = sums.errors()
    spread, new_spread = old[1].clamp_min(0) + eps, var + eps
    found = (mean - old[0]).square() / spread + (new_spread / spread).log().square() / 2
    chance = mean_se.square() / spread + (var_se / new_spread).square() / 2
    return float(found.mean()), float(chance.mean())


def take_domain_(loaded: Loaded, name: str | None, batches: Iterable[Any]) -> list[str]:
    """Let a model have a domain's statistics, or those nearest to what batches give, if any."""
    if name is None or not loaded.domains:
        return [] if name is None else ["has no domains; its own statistics were used"]
    if name != "auto":
        set_statistics_(loaded.model, domain_of(loaded.domains, name, loaded.checkpoint.path))
        return [f"with the statistics of its domain {name}"]
    sets, kind = {"its own": statistics_in(loaded.model), **loaded.domains}, Collector
    met = met_in_a_pass(loaded.model, batches, kind)
    layer = met.sums.order()[0]
    site, sums = met.by_name[layer], met.sums.measured[layer]
    moments = {one: found[layer].to(sums.values.mean) for one, found in sets.items()}
    far = {one: drift_of(site, (m[0], m[1]), sums)[0] for one, m in moments.items()}
    nearest = min(far, key=lambda one: far[one])
    set_statistics_(loaded.model, sets[nearest])
    listed = ", ".join(f"{one} {distance:.3g}" for one, distance in far.items())
    return [f"statistics: {nearest}, nearest by what {layer} meets (distances: {listed})"]


class Sources:
    """The batches of several sources in turn, and which source the k-th batch of a pass is of."""

    def __init__(self, batches: Any, weights: Sequence[float]) -> None:
        parts = list(batches) if isinstance(batches, Sequence) else []
        if len(parts) != len(weights) or len(parts) < 2:
            raise ConfigError(
                f"mix: {len(weights)} weights, expected a list of as many sources of batches, at "
                f"least 2; found {len(parts) or type(batches).__name__}.",
                name="mix",
            )
        if not all(0 < w < 1e6 for w in weights):
            raise ConfigError(f"mix: {list(weights)}, expected numbers above 0.", name="mix")
        if any(isinstance(part, Iterator) for part in parts):
            raise ConfigError("mix: a stream is read once. Give lists or loaders.", name="mix")
        self._parts = parts
        self.weights = tuple(w / sum(weights) for w in weights)
        self.of: list[int] = []

    def attach_(self, sums: Sums) -> None:
        """Let a collector's sums be those of these sources."""
        single = sums.make
        sums.make = lambda shift: Mixed([single(shift) for _ in self.weights], self)
        sums.remade = partial(Mixed.of_parts, sources=self)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        self.of = []
        # In turn, so that the first batches are of all sources.
        left = dict(enumerate(iter(runtime.pass_of(part, 0)) for part in self._parts))
        while left:
            for source, batches in list(left.items()):
                try:
                    batch = next(batches)
                except StopIteration:
                    del left[source]
                    continue
                self.of.append(source)
                yield batch


class Mixed(Accumulator):
    """Sums of one layer's inputs, for each source apart."""

    def __init__(self, parts: Iterable[Accumulator], sources: Sources) -> None:
        self._parts, self._sources = list(parts), sources

    def part(self, batch: int) -> Accumulator:
        """The sums of the source that this batch is of."""
        return self._parts[self._sources.of[batch]]

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """These sums and those of others together, source by source."""
        rows = zip(self._parts, *(other._parts for other in others), strict=True)  # type: ignore[attr-defined]
        return Mixed([first.merged(rest) for first, *rest in rows], self._sources)

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """All that the sums hold."""
        return {"parts": [part.state(summed=summed) for part in self._parts]}

    @classmethod
    def of_parts(
        cls, state: Mapping[str, Any], device: torch.device, sources: Sources
    ) -> Accumulator:
        """Sums that go on from a state."""
        return cls([Accumulator.of_state(part, device) for part in state["parts"]], sources)

    @property
    def n_examples(self) -> int:
        """Examples of all sources, each counted once a call."""
        return sum(part.n_examples for part in self._parts)

    @property
    def values(self) -> Moments:
        """All values of a channel, those of a source by its weight."""
        counts = [part.values.count for part in self._parts]
        return Moments(torch.stack(counts).sum(), *self._moments())

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)`` of the mixture."""
        empty = [s for s, part in enumerate(self._parts, 1) if not part.n_examples]
        if empty:
            raise DataError(
                f"mix: source {empty[0]} of {len(self._parts)} gives no examples. Give it some, or "
                "leave it and its weight out."
            )
        return self._moments()

    def _moments(self) -> tuple[Tensor, Tensor]:
        moments = [(part.values.mean, part.values.var) for part in self._parts]
        mean, var = (torch.stack(kind) for kind in zip(*moments, strict=True))
        return mix(mean, var, self._weights(mean))

    def errors(self, about: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: those of the sources, by their weights."""
        about = self._moments()[0] if about is None else about
        found = [part.errors(about) for part in self._parts]
        mean, var = (torch.stack(kind) for kind in zip(*found, strict=True))
        weights = self._weights(mean)
        mean, var = ((weights * se).square().sum(0).sqrt() for se in (mean, var))
        return mean, var

    def _weights(self, like: Tensor) -> Tensor:
        return like.new_tensor(self._sources.weights).unsqueeze(-1)
