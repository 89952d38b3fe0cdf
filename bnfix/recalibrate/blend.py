"""Statistics between those stored and those measured.

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
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bnfix.norm.sites import NormSite
from bnfix.recalibrate.accumulator import Accumulator
from bnfix.recalibrate.collector import Target, eps_of, stored_moments

#: Drift of layers of healthy networks on images of their own kind, chance taken off.
_USUAL = 0.02
#: How often chance counts: errors of all layers add up, as drift that is left does not.
_CHANCE = 4

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
