"""Faults of norm layers that the tensors of a checkpoint show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor

_MOMENTS = ("running_mean", "running_var")
_TINY_VAR = 1e-5
#: Below so many batches more than 1% of a new layer's statistics is left at momentum 0.1.
_FEW_BATCHES = 44
_LARGEST_HALF = 65504.0

# Advice ends with a command; CKPT, SPEC, DATA and OUT are filled in where they are known.
RECALIBRATE = (
    "bnfix calibrate CKPT --model SPEC --data DATA --statistics population --example-weight keep "
    "-o OUT"
)
GATED = "let labelled data decide: bnfix calibrate CKPT --model SPEC --data DATA -o OUT"
_INSPECT = "bnfix inspect CKPT --model SPEC --data DATA"
_REPLACE = "take another checkpoint"
_MEASURE = (
    "measure it: if it is as accurate as it should be, the statistics belong to the weights, so "
    f"keep them; else {GATED}"
)
_TUNE = "bnfix finetune CKPT --model SPEC --data DATA --train norms -o OUT"
_TRACK = (
    "in Python: build it with track_running_stats=True, load_state_dict(..., strict=False), "
    "bnfix.recalibrate_, bnfix.save"
)

#: Severity, advice and the faults that have them; with an error the outputs cannot be right.
#: Every other fault is a warning with the advice to recalibrate.
_GROUPS: Final = (
    ("error", RECALIBRATE, "not-finite negative-variance momentum-out-of-range output-not-finite"),
    ("error", _REPLACE, "gamma-not-finite beta-not-finite moment-missing odd-statistics"),
    ("error", f"fetch the file again, or {_REPLACE}", "length-mismatch"),
    ("warning", _MEASURE, "evaluation-mode"),
    ("warning", _TUNE, "gamma-all-zero"),
    ("warning", _TRACK, "no-statistics"),
    ("note", RECALIBRATE, "counter-behind half-statistics momentum-none"),
    ("note", f"nothing, if it is intended; {RECALIBRATE}", "frozen frozen-kind"),
    ("note", f"nothing, if it is intended; {_INSPECT}", "shared"),
    ("note", f"to be sure: {_INSPECT}", "counted-again"),
    ("note", "bnfix eval CKPT --model SPEC --data DATA --precision bf16", "beyond-half"),
    ("note", "for statistics of each call: give every call a layer of its own", "reused"),
    ("note", "left alone", "instance-norm"),
    ("note", "nothing", "dead-channels counter-zero gamma-zero unused single-position"),
)
_FAULTS: Final = {
    fault: (severity, advice) for severity, advice, faults in _GROUPS for fault in faults.split()
}


@dataclass(frozen=True)
class Finding:
    """A fault of a layer, or of the model (``layer`` is empty), and the advice against it."""

    layer: str
    fault: str  # a short code, the same for the same fault everywhere
    detail: str
    severity: str  # error, warning or note
    advice: str


#: A fault and its detail.
Fault = tuple[str, str]


def finding(layer: str, fault: str, detail: str) -> Finding:
    """A finding with its fault's severity and advice."""
    severity, advice = _FAULTS.get(fault, ("warning", RECALIBRATE))
    return Finding(layer=layer, fault=fault, detail=detail, severity=severity, advice=advice)


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
        found = (header or {}).get(name)
        ours = isinstance(found, dict)
        settings = found if isinstance(found, dict) else {}
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


def gated(found: Finding) -> Finding:
    """Advise new statistics only where labelled data show that they are better."""
    words, asked, _ = found.advice.partition(RECALIBRATE)
    # With an error the stored statistics are wrong for any weights, so nothing need be compared.
    return found if not asked or found.severity == "error" else replace(found, advice=words + GATED)


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
    wide = tensor.double()
    return float(wide.min()), float(wide.max())
