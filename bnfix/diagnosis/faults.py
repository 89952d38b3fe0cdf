"""Faults of norm layers: in a checkpoint's tensors, in a model's settings, in one call, on data."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix.core import guards, masks, runtime
from bnfix.core.errors import ModelError, some
from bnfix.core.torch_private import BatchNormBase
from bnfix.diagnosis.advice import Fault, Finding, finding, mapping
from bnfix.diagnosis.shift import Shifts, measure_shifts
from bnfix.metrics.task import labels_of, raw_labels
from bnfix.metrics.tasks import read_off
from bnfix.norm.sites import NormSite, find_norms, instance_norms

_MOMENTS = ("running_mean", "running_var")
_TINY_VAR = 1e-5
#: Below so many batches more than 1% of a new layer's statistics is left at momentum 0.1.
_FEW_BATCHES = 44
_LARGEST_HALF = 65504.0
#: Means off by half a deviation, variances by a factor of 2, on average over a layer's channels.
_STALE_SHIFT, _STALE_LOG_RATIO = 0.5, math.log(2)
#: The smallest number of float16: an eps below it is 0 there.
_LEAST_HALF: Final = 2.0**-24
_FEW_LEFT: Final = 0.01
#: Outputs differ between two passes over the data, but not by this factor.
_RANGE_FACTOR: Final = 10


@dataclass(frozen=True)
class NormTensors:
    """A norm layer as a state dict shows it, with a bnfix header if there is one."""

    name: str
    channels: int
    batches_tracked: int | None
    mean_range: tuple[float, float]
    var_range: tuple[float, float]
    gamma_range: tuple[float, float] | None  # of |gamma|
    n_dead: int  # channels with a running variance below 1e-5
    example_weight: float | list[float]
    grouped: bool = False  # channels share statistics, says the header
    ours: bool = False  # the header names the layer
    batch_weight: float | list[float] = 0.0
    gated: bool = False


def read_norms(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
) -> list[NormTensors]:
    """Find the norm layers of a state dict by their running moments, in the file's order."""
    layers = []
    for key, mean in tensors.items():
        name, _, last = key.rpartition(".")
        var = tensors.get(_under(name, "running_var"))
        if last != "running_mean" or var is None:
            continue
        if mean.shape != var.shape or mean.numel() == 0 or not (_is_real(mean) and _is_real(var)):
            continue
        gamma = tensors.get(_under(name, "weight"))
        if gamma is not None and (gamma.numel() == 0 or not _is_real(gamma)):
            gamma = None
        settings, ours = mapping(found := (header or {}).get(name)), isinstance(found, dict)
        layers.append(
            NormTensors(
                name=name,
                channels=mean.numel(),
                batches_tracked=_count(tensors.get(_under(name, "num_batches_tracked"))),
                mean_range=_range(mean),
                var_range=_range(var),
                gamma_range=None if gamma is None else _range(gamma.double().abs()),
                n_dead=int((var.double() < _TINY_VAR).sum()),
                example_weight=_weight(settings.get("example_weight")) if ours else 0.0,
                grouped=ours and settings.get("channel_groups") != mean.numel(),
                ours=ours,
                batch_weight=_weight(settings.get("batch_weight", 0.0)),
                gated=settings.get("gates") is not None,
            )
        )
    return layers


def diagnose(tensors: Mapping[str, Tensor], layers: list[NormTensors]) -> list[Finding]:
    """List the faults of norm layers, in the layers' order; then moments that form no layer."""
    findings: list[Finding] = []
    counts = [layer.batches_tracked for layer in layers if (layer.batches_tracked or 0) > 0]
    usual = Counter(counts).most_common(1)[0][0] if counts else None
    for layer in layers:
        mean, var = (tensors[_under(layer.name, key)] for key in _MOMENTS)
        faults = [
            *_statistics_faults(layer, mean, var, trained=_is_trained(layer, tensors)),
            *_counter_faults(layer, _is_new(mean.double(), var.double()), usual),
            *_affine_faults(layer, tensors),
            *_half_faults(mean, var),
        ]
        findings += [finding(layer.name, *fault) for fault in faults]
    return findings + _broken_layers(tensors, {layer.name for layer in layers})


def _under(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _is_new(mean: Tensor, var: Tensor) -> bool:
    return not mean.any() and bool((var == 1).all())


def _is_trained(layer: NormTensors, tensors: Mapping[str, Tensor]) -> bool:
    """Whether scale or shift differ from a new layer's: 1 (or 0) and 0."""
    gamma, beta = (tensors.get(_under(layer.name, key)) for key in ("weight", "bias"))
    if beta is not None and bool((beta != 0).any()):
        return True
    return gamma is not None and bool((gamma != 1).any()) and bool((gamma != 0).any())


def _statistics_faults(
    layer: NormTensors, mean: Tensor, var: Tensor, *, trained: bool
) -> Iterator[Fault]:
    mean, var = mean.double(), var.double()
    of = f"of {layer.channels} channels have"
    n_bad = int((~(mean.isfinite() & var.isfinite())).sum())
    n_negative = int((var < 0).sum())
    if n_bad:
        yield "not-finite", f"{n_bad} {of} statistics that are not finite"
    if n_negative:
        yield "negative-variance", f"{n_negative} {of} a negative variance"
    if _is_new(mean, var):
        detail = "the statistics are those of a new layer (mean 0, variance 1)"
        # A network that was trained in evaluation mode has weights that fit these statistics.
        if trained and not layer.batches_tracked:
            detail += ", scale and shift are not: possibly trained in evaluation mode"
            yield "evaluation-mode", detail
        else:
            yield "never-updated", detail
    elif bool((var == 0).all()):
        yield "zero-variance", "every variance is 0"
    elif layer.n_dead and not n_negative:
        least = f"(least {layer.var_range[0]:.2g}): constant, without a signal"
        yield "dead-channels", f"{layer.n_dead} {of} a variance below {_TINY_VAR:g} {least}"
    elif not layer.grouped and layer.channels > 1 and not n_bad:
        if bool((mean == mean[0]).all() & (var == var[0]).all()):
            yield "uniform-statistics", "every channel has the same mean and the same variance"


def _counter_faults(layer: NormTensors, is_new: bool, usual: int | None) -> Iterator[Fault]:
    n = layer.batches_tracked
    if n is None:
        if usual:
            yield "frozen", "has no batch count, other layers have one: frozen, or added by hand"
    elif n < 0:
        yield "counter-negative", f"num_batches_tracked is {n}, expected 0 or more"
    elif n == 0:
        if not is_new:  # with momentum None, torch's next update has weight 1 / (0 + 1)
            yield (
                "counter-zero",
                "num_batches_tracked is 0 although the statistics are not those of a new layer: "
                "with momentum None the next training batch replaces them",
            )
    elif n < _FEW_BATCHES and not layer.ours:  # bnfix's own statistics are plain means
        left = f"at torch's momentum of 0.1 a part of {0.9**n:.2g} of the statistics"
        yield "few-batches", f"{n} batches were counted: {left} is still that of a new layer"
    elif usual and n > usual and n % usual == 0:
        k = n // usual
        yield (
            "counted-again",
            f"counted {k} times as many batches as most layers: the model calls it {k} times a "
            "forward pass, and its statistics pool those calls",
        )
    elif usual and n < usual / 2:
        why = "newer than the others, or frozen for a part of training"
        yield "counter-behind", f"counted {n} batches where most layers counted {usual}: {why}"


def _affine_faults(layer: NormTensors, tensors: Mapping[str, Tensor]) -> Iterator[Fault]:
    gamma, beta = (tensors.get(_under(layer.name, key)) for key in ("weight", "bias"))
    for fault, name, tensor in (
        ("gamma-not-finite", "scale (gamma)", gamma),
        ("beta-not-finite", "shift (beta)", beta),
    ):
        if tensor is not None and _is_real(tensor) and not bool(tensor.isfinite().all()):
            yield fault, f"{name} is not finite"
        if tensor is not None and tensor.shape != (layer.channels,):
            detail = f"has shape {tuple(tensor.shape)}, the statistics have {layer.channels}"
            yield "length-mismatch", f"{name} {detail} channels"
    if gamma is not None and _is_real(gamma) and bool(gamma.isfinite().all()) and gamma.numel():
        n_zero = int((gamma.double().abs() < 1e-8).sum())
        if n_zero == gamma.numel():
            yield "gamma-all-zero", "every scale (gamma) is 0: the layer outputs only its shift"
        elif n_zero:
            of = f"{n_zero} of {layer.channels} channels"
            yield "gamma-zero", f"{of} have a scale of 0: they could be pruned"


def _half_faults(mean: Tensor, var: Tensor) -> Iterator[Fault]:
    if {mean.dtype, var.dtype} & {torch.float16, torch.bfloat16}:
        yield "half-statistics", "statistics are stored in half precision"
        return
    values = torch.cat([mean.double().abs(), var.double()])
    largest = max(values[values.isfinite()].tolist(), default=0.0)
    if largest > _LARGEST_HALF:
        limit = "is beyond float16 (65504): the layer must stay in float32"
        yield "beyond-half", f"a statistic of {largest:.3g} {limit}"


def _broken_layers(tensors: Mapping[str, Tensor], known: set[str]) -> list[Finding]:
    found = []
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        if last not in _MOMENTS or name in known:
            continue
        shape = tuple(tensor.shape)
        other = tensors.get(_under(name, _MOMENTS[1 - _MOMENTS.index(last)]))
        if other is None:
            found.append(finding(name, "moment-missing", f"has a {last} and not the other moment"))
        elif last == _MOMENTS[1]:
            continue  # the pair is reported once, at its mean
        elif tensor.shape != other.shape:
            detail = f"mean of shape {shape}, variance of {tuple(other.shape)}"
            found.append(finding(name, "length-mismatch", detail))
        else:
            kind = str(tensor.dtype).removeprefix("torch.")
            detail = f"its statistics are {kind} of shape {shape}, not real numbers"
            found.append(finding(name, "odd-statistics", detail))
    return found


def _is_real(tensor: Tensor) -> bool:
    # A file may hold any type under any name; some have no arithmetic.
    return tensor.is_floating_point() and tensor.dtype.itemsize in (1, 2, 4, 8)


def _count(tensor: Tensor | None) -> int | None:
    if tensor is None or tensor.numel() != 1 or tensor.dtype.is_complex:
        return None
    value = tensor.double().item()
    return int(value) if math.isfinite(value) else None


def _weight(found: Any) -> float | list[float]:
    """The example weight in a header; NaN where it is no number from 0 to 1."""
    if isinstance(found, list) and found:
        return [w for w in map(_weight, found) if isinstance(w, float)]
    return float(found) if type(found) in (int, float) and 0 <= found <= 1 else math.nan


def _range(tensor: Tensor) -> tuple[float, float]:
    return float(tensor.double().min()), float(tensor.double().max())


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
        """All but the layers."""
        shifts, own = self.shifts, {k: v for k, v in vars(self).items() if k != "shifts"}
        return {**own, "batch_size": shifts.batch_size, "reading": shifts.reading}


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
    why = "its running statistics are means of each example's own, so no command changes them"
    instances = instance_norms(model).items()
    return found + [finding(name, "instance-norm", f"{kind}: {why}") for name, kind in instances]


def _setting_faults(
    site: NormSite, stored: NormTensors | None, *, at_rest: bool
) -> Iterator[Fault]:
    if site.aliases:
        yield "shared", f"the same module as {some(site.aliases, 3)}: all use one set of statistics"
    if site.frozen:
        why = "its numbers are constants, which no command changes without --unfreeze"
        yield "frozen-kind", f"{site.kind}: {why}"
    elif at_rest:
        yield "frozen", "the model's code froze it (evaluation mode, no gradients): left alone"
    if not site.has_statistics:
        yield (
            "no-statistics",
            "keeps no running statistics: in evaluation, too, outputs depend on the batch",
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
        detail = f"momentum {momentum:g}: statistics are those of the last few batches"
        yield "momentum-high", detail
    # The tensors alone show this at torch's usual momentum: fault few-batches.
    elif momentum < 0.1 and n_batches and n_batches > 0:
        left = (1 - momentum) ** n_batches
        if left > _FEW_LEFT:
            rest = f"leaves a part of {left:.2g} of a new layer's statistics"
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
        yield "eps-tiny", f"eps {eps:g} beside a variance of {least:.2g}: {times}"
    n_small = int((wide < eps).sum())
    if n_small > wide.numel() / 2 and bool(wide.any()):
        small = f"{n_small} of {wide.numel()} channels have a variance below eps ({eps:g})"
        yield "eps-dominates", f"{small}: they are hardly normalized"


def examine_call(model: nn.Module, batch: Any) -> list[Finding]:
    """List the layers that one forward pass calls again, not at all, or on single positions."""
    sites = find_norms(model)
    calls: dict[str, list[int]] = {site.name: [] for site in sites}
    with guards.inference(model), guards.hooks() as handles:
        for site in sites:

            def look(_: nn.Module, args: Any, out: Any, name: str = site.name) -> None:
                shape = out.shape if isinstance(out, Tensor) else ()
                calls[name].append(math.prod(shape[2:]))

            handles.append(site.module.register_forward_hook(look))
        runtime.run(model, batch, runtime.device_of(model))
    found = []
    for name, positions in calls.items():
        if not positions:
            detail = "the forward pass does not reach it: its statistics are never used"
            found.append(finding(name, "unused", detail))
            continue
        if len(positions) > 1:
            detail = f"is called {len(positions)} times a forward pass; its statistics pool them"
            found.append(finding(name, "reused", detail))
        if min(positions) == 1:
            no = "cannot be trained on a batch of one, and example weights have no effect"
            found.append(finding(name, "single-position", f"has 1x1 feature maps: {no}"))
    return found


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
    """One pass over the data: its outputs, and which examples were classified correctly."""

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
        """For each example whether it was classified correctly; ``None`` if not known of all."""
        return torch.cat(self.parts) if self.parts and sum(map(len, self.parts)) == self.n else None

    @property
    def top1(self) -> float | None:
        return None if self.right is None else len(self.right.nonzero()) / self.n


def _pass(model: nn.Module, batches: Iterable[Any], *, training: bool) -> _Pass:
    """One pass; in training only the norm layers are in training mode, and all is restored."""
    found = _Pass()
    with guards.inference(model):
        for site in find_norms(model) if training else ():
            if isinstance(site.module, BatchNormBase) and not site.frozen:
                site.module.train()
        for batch in batches:
            x = runtime.unpack(batch)[0]
            n = len(x) if isinstance(x, Tensor) else 1
            # One example has no batch statistics on 1x1 feature maps; stock layers know no mask.
            if training and (n < 2 or masks.mask_in(batch)):
                continue
            found.add(batch, n, runtime.run(model, batch, runtime.device_of(model)))
    return found


def _stale_layers(drifts: dict[str, tuple[float, float]]) -> Iterator[Finding]:
    for name, (shift, ratio) in drifts.items():
        if not (shift <= _STALE_SHIFT and ratio <= _STALE_LOG_RATIO):  # NaN is stale too
            off = f"stored means are {shift:.2g} deviations off those of the data, variances by a"
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
