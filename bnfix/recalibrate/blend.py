"""Statistics between those stored and those measured.

Two sources, o stored and m measured, mix by the law of total variance with a weight w of the new:

    mean = (1 - w) mean_o + w mean_m
    var  = (1 - w) var_o + w var_m + w (1 - w) (mean_m - mean_o)^2

w is a number, or n / (n + N): the stored statistics count as N examples beside the n measured, or
is found layer by layer from the drift itself (`by_drift`). The layer stays static, and folds.

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

#: The weight, one or one a channel: by layer, its stored moments, and what it met.
Weight = Callable[[NormSite, tuple[Tensor, Tensor], Accumulator], "float | Tensor"]

#: Drift that healthy networks show on images of their own kind.
_USUAL = 0.05


class Blend(Target):
    """Moments stored and measured, mixed with a weight that may differ by layer."""

    def __init__(self, sites: Sequence[NormSite], weight: Weight) -> None:
        super().__init__()
        self.name = "blend"
        self._weight = weight
        # Taken now: while batches run, layers hold what they are lent.
        self._stored = {site.name: stored_moments(site) for site in sites}

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``, float64, between the stored ones and the population's."""
        old, new = self._stored[site.name], super().moments(site, sums)
        weight = torch.as_tensor(self._weight(site, old, sums), dtype=torch.float64)
        weight = weight.to(new[0]).expand_as(new[0])
        self.weights[site.name] = float(weight.mean())
        return between(old, new, weight)


def between(
    old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], weight: Tensor
) -> tuple[Tensor, Tensor]:
    """The mixture of two pairs of moments; at weight 0 and 1 one of them, bit for bit."""
    between_means = weight * (1 - weight) * (new[0] - old[0]).square()
    # Unlike a sum of two products, lerp gives its ends exactly.
    mean, var = (torch.lerp(o, n, weight) for o, n in zip(old, new, strict=True))
    return mean, var.clamp_min(0) + between_means


def fixed(weight: float) -> Weight:
    """The same weight everywhere."""
    return lambda site, old, sums: weight


def by_examples(prior: float) -> Weight:
    """Weigh by n / (n + N): the stored statistics count as N examples."""
    return lambda site, old, sums: sums.n_examples / (sums.n_examples + prior)


def by_drift(site: NormSite, old: tuple[Tensor, Tensor], sums: Accumulator) -> float:
    """The weight by how far a layer has drifted, less what few examples do by chance."""
    drift, error = drift_of(site, old, sums)
    drift = max(0.0, drift - error)
    return drift / (drift + error + _USUAL)


def drift_of(site: NormSite, old: tuple[Tensor, Tensor], sums: Accumulator) -> tuple[float, float]:
    """How far a layer's moments are from the stored ones, and what of it chance explains.

    Means over the channels of shift^2 / var_o + log(var_m / var_o)^2 / 2, with eps in variances.
    """
    eps = eps_of(site)
    mean, var = sums.statistics(None)
    mean_se, var_se = sums.errors()
    spread, new_spread = old[1].clamp_min(0) + eps, var + eps
    found = (mean - old[0]).square() / spread + (new_spread / spread).log().square() / 2
    chance = mean_se.square() / spread + (var_se / new_spread).square() / 2
    return float(found.mean()), float(chance.mean())
