"""Statistics matched to the network that a damaged one came from.

On the same images a layer meets moments mu_M, v_M in the model and mu_O, v_O in the original. With

    r    = v_M / v_O
    var  = (var_O + eps_O) r - eps_M
    mean = mu_M - sqrt((var + eps_M) / (var_O + eps_O)) (mu_O - mean_O)

its normalized output has the moments that the original's has, for which mean_O, var_O are stored.
So the original's statistics stay the anchor: that the images are few, or others than those of
training, moves mu_M with mu_O and v_M with v_O, and cancels (a control variate).

Source: Jordan et al., "REPAIR", 2023, corrects merged networks by the same two moments. Deviations
are matched, not regressed: a slope cov / v_M shrinks every layer by the correlation lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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

#: v_M / v_O beyond which the two networks' channels have little in common: 100 deviations to 1.
_LEAST, _MOST = 1e-4, 1e4
#: A channel is dead if its variance is at most this part of eps, or of its squared mean.
_DEAD_BY_EPS, _DEAD_BY_MEAN = 1e-6, 1e-10


class Reference(Target):
    """The rule of a network that is healthy, and that is only read."""

    def __init__(self, original: nn.Module, model: nn.Module, sites: Sequence[NormSite]) -> None:
        super().__init__()
        self.name = "reference"
        self._original = original
        self._sites = _counterparts(original, model, sites)
        self._measured: Mapping[str, Accumulator] = {}

    def measure_(self, source: Source, run: Callable[[Source, Collector], Any]) -> float:
        """Run the batches through the original, once, as in inference."""
        # What its forward changes is put back, and no word to the model's owner.
        source = replace(source, model=self._original, changed={})
        collector = Collector(list(self._sites.values()), source.cost, by_batch=False)
        run(source, collector)
        self._measured = collector.sums.measured
        return 1.0

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``, float64, that give the layer's output the original's moments.

        Where the model's channel is dead, or var would be below 0, only the mean is matched. Where
        only the original's is, or r is out of range, the population moments are all there is.
        """
        mean_m, var_m = super().moments(site, sums)
        if site.name not in self._measured:
            self.unmatched[site.name] = mean_m.numel()
            return mean_m, var_m
        # Their layer's channel groups may be finer than this one's.
        theirs = self._sites[site.name]
        mean_o, var_o, stored_mean, stored_var = (
            moment.to(mean_m)
            for pair in (self._measured[site.name].statistics(None), stored_moments(theirs))
            for moment in over_groups(site, *pair)
        )
        eps_m, eps_o = eps_of(site), eps_of(theirs)
        dead_m, dead_o = _dead(mean_m, var_m, eps_m), _dead(mean_o, var_o, eps_o)
        ratio = torch.where(dead_m, 1.0, var_m / var_o)
        var = (stored_var + eps_o) * ratio - eps_m
        negative = var < 0
        var = var.clamp_min(0)
        scale = ((var + eps_m) / (stored_var + eps_o)).sqrt()
        mean = mean_m - scale * (mean_o - stored_mean)
        # NaN, of two variances that are 0, is not in the range either.
        foreign = ~dead_m & (dead_o | ~((ratio >= _LEAST) & (ratio <= _MOST)))
        # Dead in both, a channel has the original's moments: a constant.
        self.unmatched[site.name] = int((dead_m & ~dead_o | negative | foreign).sum())
        return torch.where(foreign, mean_m, mean), torch.where(foreign, var_m, var)


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
