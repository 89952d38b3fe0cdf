"""How far stored statistics are from those that batches meet, layer by layer, under both feeds.

In training a layer normalizes by a batch's mean and deviation, in inference by the stored ones:

    mean gap = mean_c |mean_stored - mean_b| / sd_b,  sd gap = mean_c |sd_stored / sd_b - 1|

with sd = sqrt(var + eps). Source: Wang, Wu & Huang, "Understanding the failure of batch
normalization for transformers in NLP", 2022. Differs: eps; batches count by their examples.

A gap has two parts: chance, which is larger in a smaller batch, and the shift of the stored
statistics from those of all data, by `drift`. Where the layers before a layer use their stored
statistics (the sequential feed), their shifts add to its own; where they use each batch's (the
batch feed), they do not. Source: Huang et al., "Delving into the estimation shift of batch
normalization in a network", 2022.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from torch import Tensor, nn

from bnfix.core import masks
from bnfix.core.errors import NumericError
from bnfix.diagnosis.advice import Finding, finding
from bnfix.norm.moments import gaps
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.collector import Collector, Cost, eps_of, stored_moments
from bnfix.recalibrate.passes import met_in_a_pass, stored_drift

#: Deviations below which a shift is hardly one, wherever it comes from.
_NONE = 0.01


@dataclass(frozen=True)
class Shift:
    """A layer's stored statistics against those that it meets: means over the channels."""

    mean_gap: float | None  # means over batches; None where a batch has one value a channel
    sd_gap: float | None
    mean_shift: float  # from all data, as in a calibration
    log_var_ratio: float


@dataclass(frozen=True)
class Shifts:
    """Every layer's shift, by name, in the order of their calls."""

    batch_size: int = 0  # the largest that was run
    #: All layers in inference; empty if an input was not finite.
    sequential: dict[str, Shift] = field(default_factory=dict)
    batch: dict[str, Shift] = field(default_factory=dict)  # each by its batch's statistics

    @property
    def reading(self) -> str:
        """How the shift of the means builds up over depth, in a sentence; empty for one layer."""
        both = [name for name in self.sequential if name in self.batch]
        rows = [(name, self.sequential[name], self.batch[name]) for name in both]
        if len(rows) < 2:
            return ""
        (first, start, _), *later = rows
        last, end, own_end = later[-1]
        total = sum(shift.mean_shift for _, shift, _ in later) / len(later)
        own = sum(shift.mean_shift for _, _, shift in later) / len(later)
        worst, most, _ = max(rows, key=lambda row: row[1].mean_shift)
        went = "grows" if end.mean_shift > start.mean_shift else "falls"
        # What remains where no layer before adds its own is the layer's own part.
        is_built = total > max(own, _NONE)
        built = f": {1 - own / total:.0%} of it comes from the layers before" if is_built else ""
        return (
            f"the shift of the stored means {went} from {start.mean_shift:.2g} deviations at "
            f"{first} to {end.mean_shift:.2g} at {last} in the sequential feed "
            f"({own_end.mean_shift:.2g} in the batch feed), and is largest at {worst} "
            f"({most.mean_shift:.2g}); from the second layer on it is {total:.2g} ({own:.2g}) on "
            f"average{built}"
        )

    def to_json(self, name: str) -> dict[str, Any]:
        """A layer's part; its numbers are None where it was not met."""
        feeds = {"sequential": self.sequential.get(name), "batch": self.batch.get(name)}
        own, order = feeds["sequential"], list(self.sequential or self.batch)
        return {
            "mean_shift": None if own is None else own.mean_shift,
            "log_var_ratio": None if own is None else own.log_var_ratio,
            "depth": order.index(name) + 1 if name in order else None,
            "feeds": {k: None if found is None else asdict(found) for k, found in feeds.items()},
        }


def measure_shifts(model: nn.Module, batches: Iterable[Any]) -> Shifts:
    """Measure the shifts by one pass for each feed, without labels; the model is only read."""
    size, sequential = _feed(model, batches, by_batch=False)
    return Shifts(size, sequential, _feed(model, batches, by_batch=True)[1])


def _feed(
    model: nn.Module, batches: Iterable[Any], *, by_batch: bool
) -> tuple[int, dict[str, Shift]]:
    try:
        met = met_in_a_pass(model, batches, _Gaps, by_batch=by_batch)
    except NumericError:  # of an input that is not finite; the outputs are looked at elsewhere
        return 0, {}
    return met.sums.most_examples, {name: met.shift(name) for name in met.sums.order()}


class _Gaps(Collector):
    """Also compares every call's moments with the stored ones."""

    def __init__(self, sites: Sequence[NormSite], cost: Cost, *, by_batch: bool) -> None:
        super().__init__(sites, cost, by_batch=by_batch)
        self._stored = {site.name: stored_moments(site) for site in sites}
        self._gaps: dict[str, Tensor] = {}
        self._n: Counter[str] = Counter()

    def measure(
        self, site: NormSite, x: Tensor, valid: masks.Valid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure a call, and add its gaps, which count as often as it has examples."""
        mean, var = super().measure(site, x, valid)
        if x.numel() > x.shape[1]:  # a single value has no deviation
            found = len(x) * gaps(self._stored[site.name], (mean, var), eps_of(site))
            self._gaps[site.name] = found + self._gaps.get(site.name, 0)
            self._n[site.name] += len(x)
        return mean, var

    def lend(self, module: nn.Module, moments: tuple[Tensor, Tensor]) -> None:
        """Let a layer normalize by these, unless its own are constants, in training too."""
        if not self.sites[id(module)].frozen:
            super().lend(module, moments)

    def shift(self, name: str) -> Shift:
        """What was found at a layer."""
        mean_gap = sd_gap = None
        if n := self._n[name]:
            mean_gap, sd_gap = (self._gaps[name] / n).tolist()
        mean_shift, log_var_ratio = stored_drift(self, name)
        return Shift(mean_gap, sd_gap, mean_shift=mean_shift, log_var_ratio=log_var_ratio)


#: Gaps of predicted means, in deviations: usual ones of a network, and of a single layer.
_USUAL_GAP, _USUAL_LAYER = 0.15, 0.6
#: Layers that a median needs.
_FEWEST_LAYERS = 4


def read_predictions(gaps: dict[str, float]) -> list[Finding]:
    """The faults that predictions without an image show, of the network and of single layers."""
    if len(gaps) < _FEWEST_LAYERS:
        return []
    middle = median(gaps.values())
    if not middle <= _USUAL_GAP:  # NaN is none
        of = f"the median over {len(gaps)} layers"
        words = f"weights and stored statistics predict other means than the stored ones: {of} is"
        usual = "0.1 or less is usual, so the statistics may belong to other weights"
        return [finding("", "predicted-gap", f"{words} {middle:.2g} deviations off; {usual}")]
    return [
        finding(
            name,
            "predicted-gap",
            f"its means are {gap:.2g} deviations off those that the layers before predict: stale, "
            "or its inputs are far from normal",
        )
        for name, gap in gaps.items()
        if gap > _USUAL_LAYER
    ]
