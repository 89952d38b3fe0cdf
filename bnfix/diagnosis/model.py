"""Faults of norm layers in a model: in its settings, in one call, and on data.

On data, the stored statistics are compared with each batch's statistics, under both feeds. In
training a layer normalizes by a batch's mean and deviation, in inference by the stored ones:

    mean gap = mean_c |mean_stored - mean_b| / sd_b,  sd gap = mean_c |sd_stored / sd_b - 1|

with sd = sqrt(var + eps). Source: Wang, Wu & Huang, "Understanding the failure of batch
normalization for transformers in NLP", 2022. Differs: eps; batches are weighted by their size.

A gap has two parts: chance, which is larger in a smaller batch, and the shift between the stored
statistics and those of all data, by `drift`. If the layers before a layer use stored statistics
(the sequential feed), their shifts add to its own; if they use each batch's statistics (the batch
feed), they do not. Source: Huang et al., "Delving into the estimation shift of batch
normalization in a network", 2022.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix.core import guards, masks, runtime
from bnfix.core.errors import ModelError, NumericError, some
from bnfix.core.torch_private import BatchNormBase
from bnfix.diagnosis.faults import Fault, Finding, NormTensors, finding
from bnfix.metrics.evaluate import first_look
from bnfix.metrics.task import labels_of, raw_labels
from bnfix.metrics.tasks import read_off
from bnfix.norm.moments import gaps
from bnfix.norm.sites import NormSite, find_norms, instance_norms
from bnfix.recalibrate.collector import Collector, Source
from bnfix.recalibrate.passes import met_in_a_pass, stored_drift

#: Means off by half a deviation, variances by a factor of 2, on average over a layer's channels.
_STALE_SHIFT, _STALE_LOG_RATIO = 0.5, math.log(2)
#: The smallest number of float16: an eps below it is 0 there.
_LEAST_HALF: Final = 2.0**-24
_FEW_LEFT: Final = 0.01
#: Outputs differ between two passes over the data, but not by this factor.
_RANGE_FACTOR: Final = 10


def examine_model(model: nn.Module, layers: Sequence[NormTensors]) -> list[Finding]:
    """List the faults in the settings of norm layers."""
    stored = {layer.name: layer for layer in layers}
    found = [
        finding(site.name, *fault)
        for site in find_norms(model)
        for fault in _setting_faults(
            site, stored.get(site.name), at_rest=site.is_put_to_rest(model)
        )
    ]
    why = "its running statistics average each example's own, so no command changes them"
    instances = instance_norms(model).items()
    return found + [finding(name, "instance-norm", f"{kind}: {why}") for name, kind in instances]


def _setting_faults(
    site: NormSite, stored: NormTensors | None, *, at_rest: bool
) -> Iterator[Fault]:
    if site.aliases:
        yield "shared", f"the same module as {some(site.aliases, 3)}: all use one set of statistics"
    if site.frozen:
        why = "its values are constants, and no command changes them without --unfreeze"
        yield "frozen-kind", f"{site.kind}: {why}"
    elif at_rest:
        yield "frozen", "the model's code froze it (evaluation mode, no gradients): left alone"
    if not site.has_statistics:
        yield (
            "no-statistics",
            "keeps no running statistics: even in evaluation, outputs depend on the batch",
        )
        return
    if not site.frozen:
        n = stored.batches_tracked if stored is not None and not stored.ours else None
        yield from _momentum_faults(getattr(site.module, "momentum", 0.1), n)
    yield from _eps_faults(site.module)


def _momentum_faults(momentum: Any, n_batches: int | None) -> Iterator[Fault]:
    if momentum is None:
        detail = "momentum None: statistics are the mean over all of training, early batches too"
        yield "momentum-none", detail
    elif not isinstance(momentum, int | float) or not 0 <= momentum <= 1:
        detail = f"momentum {momentum}, expected 0 to 1: statistics diverge in training"
        yield "momentum-out-of-range", detail
    elif momentum == 0:
        yield "momentum-zero", "momentum 0: statistics never move in training"
    elif momentum >= 0.5:
        detail = f"momentum {momentum:g}: statistics cover only the last few batches"
        yield "momentum-high", detail
    # The tensors alone show this at torch's usual momentum: fault few-batches.
    elif momentum < 0.1 and n_batches and n_batches > 0:
        left = (1 - momentum) ** n_batches
        if left > _FEW_LEFT:
            rest = f"leaves a fraction of {left:.2g} of a new layer's statistics"
            yield "momentum-low", f"momentum {momentum:g} over {n_batches} batches {rest}"


def _eps_faults(module: nn.Module) -> Iterator[Fault]:
    eps, var = float(getattr(module, "eps", 1e-5)), getattr(module, "running_var", None)
    if not isinstance(var, Tensor) or not var.numel() or not bool(var.isfinite().all()):
        return
    wide = var.double().clamp_min(0)
    least = float(wide.min())
    if eps < _LEAST_HALF and least + eps < 1e-6:
        gain = math.inf if least + eps == 0 else (least + eps) ** -0.5
        times = f"a channel is multiplied by {gain:.3g}, in float16 by infinity"
        yield "eps-tiny", f"eps {eps:g} with a variance of {least:.2g}: {times}"
    n_small = int((wide < eps).sum())
    if n_small > wide.numel() / 2 and bool(wide.any()):
        small = f"{n_small} of {wide.numel()} channels have a variance below eps ({eps:g})"
        yield "eps-dominates", f"{small}: they are hardly normalized"


def examine_call(model: nn.Module, batch: Any) -> list[Finding]:
    """List the layers that one forward pass calls again, not at all, or on 1x1 maps."""
    sites = {site.name: site.module for site in find_norms(model)}
    ((calls, _),) = first_look("inspect", model, sites, [batch])
    found = []
    for name in sites:
        positions = [n for called, n in calls if called == name]
        if not positions:
            detail = "the forward pass does not reach it: its statistics are never used"
            found.append(finding(name, "unused", detail))
            continue
        if len(positions) > 1:
            detail = f"is called {len(positions)} times per pass; its statistics pool the calls"
            found.append(finding(name, "reused", detail))
        if min(positions) == 1:
            no = "it cannot be trained on a batch of one, and example weights have no effect"
            found.append(finding(name, "single-position", f"has 1x1 feature maps: {no}"))
    return found


# --- the shifts of stored statistics ---

#: A shift of fewer deviations counts as none, from any source.
_NONE = 0.01


@dataclass(frozen=True)
class Shift:
    """A layer's stored statistics against its inputs' statistics: means over the channels."""

    mean_gap: float | None  # means over batches; None if a batch has one value per channel
    sd_gap: float | None
    mean_shift: float  # from all data, as in a calibration
    log_var_ratio: float


@dataclass(frozen=True)
class Shifts:
    """Every layer's shift, by name, in the order of the calls."""

    batch_size: int = 0  # of the largest batch
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
        # In the batch feed no layer before adds a shift, so the layer's own part remains.
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
        """A layer's part; its numbers are None if the layer received no input."""
        feeds = {"sequential": self.sequential.get(name), "batch": self.batch.get(name)}
        own, order = feeds["sequential"], list(self.sequential or self.batch)
        return {
            "mean_shift": None if own is None else own.mean_shift,
            "log_var_ratio": None if own is None else own.log_var_ratio,
            "depth": order.index(name) + 1 if name in order else None,
            "feeds": {k: None if found is None else asdict(found) for k, found in feeds.items()},
        }


def measure_shifts(model: nn.Module, batches: Iterable[Any]) -> Shifts:
    """Measure the shifts in one pass per feed, without labels; the model is only read."""
    size, sequential = _feed(model, batches, by_batch=False)
    return Shifts(size, sequential, _feed(model, batches, by_batch=True)[1])


def _feed(
    model: nn.Module, batches: Iterable[Any], *, by_batch: bool
) -> tuple[int, dict[str, Shift]]:
    try:
        met = met_in_a_pass(model, batches, _Gaps, by_batch=by_batch)
    except NumericError:  # an input was not finite; another check looks at the outputs
        return 0, {}
    return met.sums.most_examples, {name: met.shift(name) for name in met.sums.order()}


class _Gaps(Collector):
    """Also compares every call's moments with the stored ones."""

    def __init__(self, sites: Sequence[NormSite], source: Source, *, by_batch: bool) -> None:
        super().__init__(sites, source, by_batch=by_batch)
        self._stored = {site.name: site.moments for site in sites}
        self._gaps: dict[str, Tensor] = {}
        self._n: Counter[str] = Counter()

    def measure(
        self, site: NormSite, x: Tensor, valid: masks.Valid | None = None
    ) -> tuple[Tensor, Tensor]:
        """Measure a call, and add its gaps, weighted by its number of examples."""
        mean, var = super().measure(site, x, valid)
        if x.numel() > x.shape[1]:  # a single value has no deviation
            found = len(x) * gaps(self._stored[site.name], (mean, var), site.eps)
            self._gaps[site.name] = found + self._gaps.get(site.name, 0)
            self._n[site.name] += len(x)
        return mean, var

    def lend(self, module: nn.Module, moments: tuple[Tensor, Tensor]) -> None:
        """Let a layer normalize by these moments; a frozen layer keeps its own, as in training."""
        if not self.sites[id(module)].frozen:
            super().lend(module, moments)

    def shift(self, name: str) -> Shift:
        """The shift found at a layer."""
        mean_gap = sd_gap = None
        if n := self._n[name]:
            mean_gap, sd_gap = (self._gaps[name] / n).tolist()
        mean_shift, log_var_ratio = stored_drift(self, name)
        return Shift(mean_gap, sd_gap, mean_shift=mean_shift, log_var_ratio=log_var_ratio)


#: Usual gaps of predicted means, in deviations: for a network, and for a single layer.
_USUAL_GAP, _USUAL_LAYER = 0.15, 0.6
#: Fewest layers for a median.
_FEWEST_LAYERS = 4


def read_predictions(gaps: dict[str, float]) -> list[Finding]:
    """Faults that predictions without an image show, for the network and for single layers."""
    if len(gaps) < _FEWEST_LAYERS:
        return []
    middle = median(gaps.values())
    if not middle <= _USUAL_GAP:  # NaN is not usual either
        of = f"the median over {len(gaps)} layers"
        words = f"weights and stored statistics predict other means than the stored ones: {of} is"
        usual = "0.1 or less is usual, so the statistics may belong to other weights"
        return [finding("", "predicted-gap", f"{words} {middle:.2g} deviations off; {usual}")]
    return [
        finding(
            name,
            "predicted-gap",
            f"its means are {gap:.2g} deviations off the prediction from the layers before: stale, "
            "or its inputs are far from normal",
        )
        for name, gap in gaps.items()
        if gap > _USUAL_LAYER
    ]


# --- both modes on data ---


@dataclass(frozen=True)
class Behaviour:
    """A model on data, in evaluation and (``..._training``) with each batch's own statistics."""

    n_examples: int
    shifts: Shifts
    top1: float | None  # None without labels or logits
    top1_training: float | None
    output_range: tuple[float, float]
    output_range_training: tuple[float, float]

    @property
    def drifts(self) -> dict[str, tuple[float, float]]:
        """Mean shift in deviations and log variance ratio in inference, stored against data."""
        found = self.shifts.sequential
        return {name: (shift.mean_shift, shift.log_var_ratio) for name, shift in found.items()}

    def to_json(self) -> dict[str, Any]:
        """Everything except the layers."""
        shifts, own = self.shifts, {k: v for k, v in vars(self).items() if k != "shifts"}
        return {**own, "batch_size": shifts.batch_size, "reading": shifts.reading}


def examine_behaviour(model: nn.Module, batches: Iterable[Any]) -> tuple[Behaviour, list[Finding]]:
    """Run data through a model in both modes, and compare."""
    shifts = measure_shifts(model, batches)
    evaluation = _pass(model, batches, training=False)
    training = _pass(model, batches, training=True)
    seen = Behaviour(
        n_examples=evaluation.n,
        shifts=shifts,
        top1=evaluation.top1,
        top1_training=training.top1,
        output_range=(evaluation.low, evaluation.high),
        output_range_training=(training.low, training.high),
    )
    faults = _mode_faults(evaluation, training)
    return seen, [*_stale_layers(seen.drifts), *(finding("", *fault) for fault in faults)]


@dataclass
class _Pass:
    """One pass over the data: its outputs, and the correctly classified examples."""

    n: int = 0
    low: float = math.inf
    high: float = -math.inf
    n_bad: int = 0
    parts: list[Tensor] = field(default_factory=list)

    def add(self, batch: Any, n: int, output: Any) -> None:
        """Take in the outputs of a batch of ``n`` examples."""
        self.n += n
        for tensor in runtime.tensors_in(output):
            if tensor.is_floating_point():
                finite = tensor[tensor.isfinite()].double()
                self.n_bad += tensor.numel() - finite.numel()
                if finite.numel():
                    self.low = min(self.low, float(finite.min()))
                    self.high = max(self.high, float(finite.max()))
        try:
            logits = runtime.logits_of(output)
        except ModelError:
            return
        known = len(logits) == n and read_off(output, raw_labels(batch)) == "classification"
        labels = labels_of(batch, n, logits.shape[1]) if known else None
        if labels is not None:
            self.parts.append(logits.argmax(1).cpu() == torch.as_tensor(labels))

    @property
    def right(self) -> Tensor | None:
        """Whether each example was classified correctly; ``None`` unless known for all."""
        return torch.cat(self.parts) if self.parts and sum(map(len, self.parts)) == self.n else None

    @property
    def top1(self) -> float | None:
        return None if self.right is None else len(self.right.nonzero()) / self.n


def _pass(model: nn.Module, batches: Iterable[Any], *, training: bool) -> _Pass:
    """One pass; if `training`, only the norm layers are in training mode. All is restored."""
    found = _Pass()
    with guards.inference(model):
        for site in find_norms(model) if training else ():
            if isinstance(site.module, BatchNormBase) and not site.frozen:
                site.module.train()
        for batch in batches:
            x = runtime.unpack(batch)[0]
            n = len(x) if isinstance(x, Tensor) else 1
            # One example has no batch statistics on 1x1 feature maps; stock layers ignore masks.
            if training and (n < 2 or masks.mask_in(batch)):
                continue
            found.add(batch, n, runtime.run(model, batch, runtime.device_of(model)))
    return found


def _stale_layers(drifts: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    for name, (shift, ratio) in drifts.items():
        if not (shift <= _STALE_SHIFT and ratio <= _STALE_LOG_RATIO):  # NaN counts as stale
            off = f"stored means are {shift:.2g} deviations off the data's, variances by a"
            factor = math.exp(min(ratio, 700))  # exp overflows above 709
            yield finding(
                name, "stale", f"{off} factor of {factor:.3g}, on average over the channels"
            )


def _mode_faults(evaluation: _Pass, training: _Pass) -> Iterator[Fault]:
    for mode, passed in (("evaluation", evaluation), ("training", training)):
        if passed.n_bad:
            yield "output-not-finite", f"{passed.n_bad} outputs in {mode} mode are not finite"
    own = "the statistics of each batch"
    before, after = evaluation.right, training.right
    if before is not None and after is not None and training.n == evaluation.n:
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        # Paired: without a difference the counts agree to within the root of their sum.
        if gained - lost > 3 * math.sqrt(gained + lost):
            stored = f"top-1 is {evaluation.top1:.3f} with the stored statistics"
            fit = "the stored ones do not fit"
            yield "modes-differ", f"{stored} and {training.top1:.3f} with {own}: {fit}"
    widths = [max(abs(passed.low), abs(passed.high)) for passed in (evaluation, training)]
    if all(map(math.isfinite, widths)) and widths[0] > _RANGE_FACTOR * widths[1] > 0:
        reach = f"outputs reach {widths[0]:.3g} in evaluation and {widths[1]:.3g} with {own}"
        yield "output-range", reach
