"""Statistics matched to the network that a damaged one came from.

On the same images a layer meets moments mu_M, v_M in the model and mu_O, v_O in the original. With

    r    = v_M / v_O
    var  = (var_O + eps_O) r - eps_M
    mean = mu_M - sqrt((var + eps_M) / (var_O + eps_O)) (mu_O - mean_O)

its normalized output has the moments that the original's has, for which mean_O, var_O are stored.
So the original's statistics stay the anchor: that the images are few, or others than those of
training, moves mu_M with mu_O and v_M with v_O, and cancels (a control variate).

A mean of several networks has all of them for originals. With their weights w_k, of sum 1, its
normalized output gets the mean and the standard deviation

    m = sum_k w_k (mu_k - mean_k) / sqrt(var_k + eps_k)
    s = sum_k w_k sqrt(v_k / (var_k + eps_k))

which for one original are those above.

Source: Jordan et al., "REPAIR", 2023, corrects merged networks by the same two moments. Deviations
are matched, not regressed: a slope cov / v_M shrinks every layer by the correlation lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core.errors import ConfigError
from bnfix.norm.sites import NormSite, find_norms
from bnfix.recalibrate.accumulator import Accumulator
from bnfix.recalibrate.collector import (
    Collector,
    Source,
    Target,
    eps_of,
    over_groups,
    stored_moments,
)

#: The network to match, or several with their weights.
Originals = nn.Module | Mapping[nn.Module, float]

#: v_M / v_O beyond which the two networks' channels have little in common: 100 deviations to 1.
_LEAST, _MOST = 1e-4, 1e4
#: A channel is dead if its variance is at most this part of eps, or of its squared mean.
_DEAD_BY_EPS, _DEAD_BY_MEAN = 1e-6, 1e-10


@dataclass
class _Original:
    """A network to match, and what its layers have met."""

    network: nn.Module
    weight: float
    sites: dict[str, NormSite]
    measured: Mapping[str, Accumulator]


class Reference(Target):
    """The rule of a network that is healthy, or of several with a weight each; only read."""

    def __init__(self, originals: Originals, model: nn.Module, sites: Sequence[NormSite]) -> None:
        super().__init__()
        self.name = "reference" if isinstance(originals, nn.Module) else "interpolated"
        weights = {originals: 1.0} if isinstance(originals, nn.Module) else originals
        if not weights or min(weights.values()) <= 0:
            raise ConfigError(
                f"reference: weights {list(weights.values())}, expected numbers above 0.",
                name="reference",
            )
        whole = sum(weights.values())
        self._originals = [
            _Original(network, weight / whole, _counterparts(network, model, sites), {})
            for network, weight in weights.items()
        ]

    def measure_(self, source: Source, run: Callable[[Source, Collector], Any]) -> float:
        """Run the batches through each original, once, as in inference."""
        for one in self._originals:
            # What its forward changes is put back, and no word to the model's owner.
            theirs = replace(source, model=one.network, changed={})
            collector = Collector(list(one.sites.values()), source.cost, by_batch=False)
            run(theirs, collector)
            one.measured = collector.sums.measured
        return float(len(self._originals))

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``, float64, that give the layer's output the original's moments.

        Where the model's channel is dead, or var would be below 0, only the mean is matched. Where
        only the original's is, or r is out of range, the population moments are all there is.
        """
        mean_m, var_m = super().moments(site, sums)
        if not all(site.name in one.measured for one in self._originals):
            self.unmatched[site.name] = mean_m.numel()
            return mean_m, var_m
        mean_o, var_o, stored_mean, spread = self._as_one(site, mean_m)
        eps_m, eps_o = eps_of(site), eps_of(self._originals[0].sites[site.name])
        dead_m, dead_o = _dead(mean_m, var_m, eps_m), _dead(mean_o, var_o, eps_o)
        ratio = torch.where(dead_m, 1.0, var_m / var_o)
        var = spread * ratio - eps_m
        negative = var < 0
        var = var.clamp_min(0)
        scale = ((var + eps_m) / spread).sqrt()
        mean = mean_m - scale * (mean_o - stored_mean)
        # NaN, of two variances that are 0, is not in the range either.
        foreign = ~dead_m & (dead_o | ~((ratio >= _LEAST) & (ratio <= _MOST)))
        # Dead in both, a channel has the original's moments: a constant.
        self.unmatched[site.name] = int((dead_m & ~dead_o | negative | foreign).sum())
        return torch.where(foreign, mean_m, mean), torch.where(foreign, var_m, var)

    def _as_one(self, site: NormSite, like: Tensor) -> tuple[Tensor, ...]:
        """Moments met, stored mean, and stored var + eps, of one original that stands for all."""
        found: Any = 0.0
        for one in self._originals:
            theirs = one.sites[site.name]
            # Their layer's channel groups may be finer than this one's.
            mean, var, stored_mean, stored_var = (
                moment.to(like)
                for pair in (one.measured[site.name].statistics(None), stored_moments(theirs))
                for moment in over_groups(site, *pair)
            )
            deviation = (stored_var + eps_of(theirs)).sqrt()
            shift, scale = (mean - stored_mean) / deviation, var.sqrt() / deviation
            found += one.weight * torch.stack([shift, scale, stored_mean, deviation])
        shift, scale, stored_mean, deviation = found
        return (
            stored_mean + shift * deviation,
            (scale * deviation).square(),
            stored_mean,
            deviation.square(),
        )


def _dead(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return var <= torch.maximum(_DEAD_BY_MEAN * mean.square(), torch.tensor(_DEAD_BY_EPS * eps))


def _counterparts(
    original: nn.Module, model: nn.Module, sites: Sequence[NormSite]
) -> dict[str, NormSite]:
    """The original's layer for each of the model's; all that does not agree is refused at once."""
    theirs = {site.name: site for site in find_norms(original)}
    names = [site.name for site in find_norms(model)]
    problems = [f"{name}: not in the original" for name in names if name not in theirs]
    problems += [f"{name}: only in the original" for name in theirs if name not in names]
    for site in sites:
        other = theirs.get(site.name)
        if other is None:
            continue
        channels = stored_moments(site)[0].numel()
        if other.unmeasured or not other.has_statistics:
            why = other.unmeasured or "keeps no statistics"
            problems.append(f"{site.name}: the original's {why}")
        elif (found := stored_moments(other)[0].numel()) != channels:
            problems.append(f"{site.name}: {channels} channels, {found} in the original")
    if problems:
        raise ConfigError(
            f"reference: not a network that this one can come from. {'; '.join(problems)}. Give "
            "the original, of the same norm layers.",
            name="reference",
        )
    return {site.name: theirs[site.name] for site in sites}
