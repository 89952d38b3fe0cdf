"""What is wrong with a checkpoint's norm layers, told from its tensors alone."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("running_mean", "running_var")
_TINY_VAR = 1e-5
#: Below so many batches more than 1% of a new layer's statistics is left at momentum 0.1.
_FEW_BATCHES = 44
_LARGEST_HALF = 65504.0

#: What to do, with the command; CKPT, SPEC, DATA and OUT are filled in where they are known.
RECALIBRATE = (
    "bnfix calibrate CKPT --model SPEC --data DATA --statistics population --example-weight keep "
    "-o OUT"
)
TUNE = "bnfix finetune CKPT --model SPEC --data DATA --train norms -o OUT"
REPLACE = "take another checkpoint"
#: Labelled data decide: what is not better is not written.
GATED = "let labelled data decide: bnfix calibrate CKPT --model SPEC --data DATA -o OUT"
_IN_BF16 = "bnfix eval CKPT --model SPEC --data DATA --precision bf16"
INSPECT = "bnfix inspect CKPT --model SPEC --data DATA"
_EVALUATION_MODE = (
    "measure it: if it is as accurate as it should be, the statistics belong to the weights, so "
    "keep them; else " + GATED
)


@dataclass(frozen=True)
class Finding:
    """One thing that is, or may be, wrong with a layer.

    Args:
        layer: dotted name.
        fault: a short code, the same for the same fault everywhere.
        detail: what was found, in words.
        severity: ``error`` (outputs cannot be right), ``warning`` or ``note``.
        advice: what to do, with the command.
    """

    layer: str
    fault: str
    detail: str
    severity: str
    advice: str


@dataclass(frozen=True)
class NormTensors:
    """A norm layer as a state dict shows it.

    Args:
        name: dotted name.
        channels: C.
        batches_tracked: training batches counted, where the file says.
        mean_range: smallest and largest running mean.
        var_range: smallest and largest running variance.
        gamma_range: smallest and largest |gamma|, where there is one.
        n_dead: channels with a running variance below 1e-5.
        example_weight: as the header says; 0 for a stock file.
        grouped: whether the header says that channels share statistics.
        ours: whether the header knows the layer.
    """

    name: str
    channels: int
    batches_tracked: int | None
    mean_range: tuple[float, float]
    var_range: tuple[float, float]
    gamma_range: tuple[float, float] | None
    n_dead: int
    example_weight: float | list[float]
    grouped: bool = False
    ours: bool = False


def read_norms(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
) -> list[NormTensors]:
    """Find the norm layers of a state dict by their running moments."""
    layers = []
    for key, mean in tensors.items():
        name, _, last = key.rpartition(".")
        prefix = f"{name}." if name else ""
        var = tensors.get(f"{prefix}running_var")
        if last != "running_mean" or var is None:
            continue
        if mean.shape != var.shape or mean.numel() == 0 or not (_is_real(mean) and _is_real(var)):
            continue
        gamma = tensors.get(f"{prefix}weight")
        has_gamma = gamma is not None and gamma.numel() > 0 and _is_real(gamma)
        settings = (header or {}).get(name)
        layers.append(
            NormTensors(
                name=name,
                channels=mean.numel(),
                batches_tracked=_count(tensors.get(f"{prefix}num_batches_tracked")),
                mean_range=_range(mean),
                var_range=_range(var),
                gamma_range=_range(gamma.double().abs())
                if gamma is not None and has_gamma
                else None,
                n_dead=int((var.double() < _TINY_VAR).sum()),
                example_weight=_weight(settings.get("example_weight"))
                if isinstance(settings, dict)
                else 0.0,
                grouped=isinstance(settings, dict)
                and settings.get("channel_groups") != mean.numel(),
                ours=isinstance(settings, dict),
            )
        )
    return layers


def diagnose(tensors: Mapping[str, Tensor], layers: list[NormTensors]) -> list[Finding]:
    """List what can be wrong with norm layers, as far as tensors tell."""
    findings: list[Finding] = []
    counts = [layer.batches_tracked for layer in layers if layer.batches_tracked]
    usual = Counter(counts).most_common(1)[0][0] if counts else 0
    for layer in layers:
        mean, var = (tensors[_under(layer.name, key)] for key in _MOMENTS)
        faults = [
            *_statistics_faults(layer, mean, var, trained=_is_trained(layer, tensors)),
            *_counter_faults(layer, mean, var, usual, any_counted=bool(counts)),
            *_affine_faults(layer, tensors),
            *_half_faults(layer, mean, var),
        ]
        findings += [Finding(layer.name, *fault) for fault in faults]
    known = {layer.name for layer in layers}
    return findings + _broken_layers(tensors, known)


def gated(finding: Finding) -> Finding:
    """Advise new statistics only where labelled data show that they are better."""
    words, found, _ = finding.advice.partition(RECALIBRATE)
    if not found or finding.severity == "error":  # these cannot be right for any weights
        return finding
    return replace(finding, advice=words + GATED)


_Fault = tuple[str, str, str, str]


def _under(layer: str, key: str) -> str:
    return f"{layer}.{key}" if layer else key


def _is_trained(layer: NormTensors, tensors: Mapping[str, Tensor]) -> bool:
    """Whether scale or shift have left where a new layer has them: 1 (or 0) and 0."""
    gamma, beta = (tensors.get(_under(layer.name, key)) for key in ("weight", "bias"))
    if beta is not None and bool((beta != 0).any()):
        return True
    return gamma is not None and bool((gamma != 1).any()) and bool((gamma != 0).any())


def _statistics_faults(
    layer: NormTensors, mean: Tensor, var: Tensor, *, trained: bool
) -> list[_Fault]:
    mean, var = mean.double(), var.double()
    found: list[_Fault] = []
    n_bad = int((~(mean.isfinite() & var.isfinite())).sum())
    if n_bad:
        detail = f"{n_bad} of {layer.channels} channels have statistics that are not finite"
        found.append(("not-finite", detail, "error", RECALIBRATE))
    n_negative = int((var < 0).sum())
    if n_negative:
        detail = f"{n_negative} of {layer.channels} channels have a negative variance"
        found.append(("negative-variance", detail, "error", RECALIBRATE))
    if not mean.any() and bool((var == 1).all()):
        detail = "the statistics are those of a new layer (mean 0, variance 1)"
        if trained and not layer.batches_tracked:
            detail += ", scale and shift are not: possibly trained in evaluation mode"
            found.append(("evaluation-mode", detail, "warning", _EVALUATION_MODE))
        else:
            found.append(("never-updated", detail, "warning", RECALIBRATE))
    elif bool((var == 0).all()):
        found.append(("zero-variance", "every variance is 0", "warning", RECALIBRATE))
    elif layer.n_dead and not n_negative:
        detail = (
            f"{layer.n_dead} of {layer.channels} channels have a variance below {_TINY_VAR:g} "
            f"(least {layer.var_range[0]:.2g}): constant, normalized by eps, without a signal"
        )
        found.append(("dead-channels", detail, "note", "nothing"))
    elif not layer.grouped and layer.channels > 1 and not n_bad and _all_same(mean, var):
        detail = "every channel has the same mean and the same variance"
        found.append(("uniform-statistics", detail, "warning", RECALIBRATE))
    return found


def _all_same(mean: Tensor, var: Tensor) -> bool:
    return bool((mean == mean[0]).all()) and bool((var == var[0]).all())


def _counter_faults(
    layer: NormTensors, mean: Tensor, var: Tensor, usual: int, *, any_counted: bool
) -> list[_Fault]:
    n = layer.batches_tracked
    if n is None:
        detail = "has no count of batches, and other layers have one: frozen, or put in by hand"
        return [
            ("frozen", detail, "note", "nothing, if it is meant so; " + RECALIBRATE)
        ] * any_counted
    if n == 0 and (bool(mean.any()) or not bool((var == 1).all())):
        detail = (
            "num_batches_tracked is 0 although the statistics are not those of a new layer; with "
            "momentum None further training forgets them"
        )
        return [("counter-zero", detail, "note", "nothing")]
    if n < 0:
        detail = f"num_batches_tracked is {n}, which counts nothing"
        return [("counter-negative", detail, "warning", RECALIBRATE)]
    if 0 < n < _FEW_BATCHES and not layer.ours:
        detail = (
            f"{n} batches were counted: at torch's momentum of 0.1 a part of {0.9**n:.2g} of the "
            "statistics is still that of a new layer"
        )
        return [("few-batches", detail, "warning", RECALIBRATE)]
    if usual and n > usual and n % usual == 0:
        detail = (
            f"counted {n // usual} times as many batches as most layers: it is called "
            f"{n // usual} times a forward pass, and its statistics pool those calls"
        )
        return [("counted-again", detail, "note", "to be sure: " + INSPECT)]
    if usual and n and n < usual / 2:
        detail = (
            f"counted {n} batches where most layers counted {usual}: it is newer than they are, or "
            "was frozen in between"
        )
        return [("counter-behind", detail, "note", RECALIBRATE)]
    return []


def _affine_faults(layer: NormTensors, tensors: Mapping[str, Tensor]) -> list[_Fault]:
    found: list[_Fault] = []
    gamma, beta = (tensors.get(_under(layer.name, key)) for key in ("weight", "bias"))
    for name, tensor in (("scale (gamma)", gamma), ("shift (beta)", beta)):
        if tensor is not None and _is_real(tensor) and not bool(tensor.isfinite().all()):
            code = "gamma-not-finite" if tensor is gamma else "beta-not-finite"
            found.append((code, f"{name} is not finite", "error", REPLACE))
        if tensor is not None and tensor.shape != (layer.channels,):
            shape = tuple(tensor.shape)
            detail = f"{name} has shape {shape}, the statistics have {layer.channels} channels"
            found.append(
                ("length-mismatch", detail, "error", "fetch the file again, or " + REPLACE)
            )
    if gamma is not None and _is_real(gamma) and bool(gamma.isfinite().all()) and gamma.numel():
        n_zero = int((gamma.double().abs() < 1e-8).sum())
        if n_zero == gamma.numel():
            detail = "every scale (gamma) is 0: the layer puts out its shift and nothing else"
            found.append(("gamma-all-zero", detail, "warning", TUNE))
        elif n_zero:
            detail = (
                f"{n_zero} of {layer.channels} channels have a scale of 0: they could be pruned"
            )
            found.append(("gamma-zero", detail, "note", "nothing"))
    return found


def _half_faults(layer: NormTensors, mean: Tensor, var: Tensor) -> list[_Fault]:
    if {mean.dtype, var.dtype} & {torch.float16, torch.bfloat16}:
        return [("half-statistics", "statistics are stored in half precision", "note", RECALIBRATE)]
    finite = torch.cat([mean.double().abs(), var.double()])
    finite = finite[finite.isfinite()]
    if finite.numel() and float(finite.max()) > _LARGEST_HALF:
        detail = (
            f"a statistic of {float(finite.max()):.3g} is beyond float16 (65504): the layer must "
            "stay in float32"
        )
        return [("beyond-half", detail, "note", _IN_BF16)]
    return []


def _broken_layers(tensors: Mapping[str, Tensor], known: set[str]) -> list[Finding]:
    """What has moments by name but is no layer to compute with."""
    found = []
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        if last not in _MOMENTS or name in known:
            continue
        other = tensors.get(_under(name, _MOMENTS[1 - _MOMENTS.index(last)]))
        if other is None:
            detail = f"has a {last} and not the other moment"
            found.append(
                Finding(
                    layer=name,
                    fault="moment-missing",
                    detail=detail,
                    severity="error",
                    advice=REPLACE,
                )
            )
        elif last == _MOMENTS[0] and tensor.shape != other.shape:
            detail = f"mean of shape {tuple(tensor.shape)}, variance of {tuple(other.shape)}"
            found.append(
                Finding(
                    layer=name,
                    fault="length-mismatch",
                    detail=detail,
                    severity="error",
                    advice=REPLACE,
                )
            )
        elif last == _MOMENTS[0]:
            kind = str(tensor.dtype).removeprefix("torch.")
            detail = f"its statistics are {kind} of shape {tuple(tensor.shape)}, not real numbers"
            found.append(
                Finding(
                    layer=name,
                    fault="odd-statistics",
                    detail=detail,
                    severity="error",
                    advice=REPLACE,
                )
            )
    return found


def _is_real(tensor: Tensor) -> bool:
    """Whether these are numbers to compute with; a file may hold any type under any name."""
    return tensor.is_floating_point() and tensor.dtype.itemsize in (1, 2, 4, 8)


def _count(tensor: Tensor | None) -> int | None:
    if tensor is None or tensor.numel() != 1 or tensor.dtype.is_complex:
        return None
    value = tensor.double().item()
    return int(value) if math.isfinite(value) else None


def _weight(found: Any) -> float | list[float]:
    """The example weight that a header states; NaN where it states none that is a number."""
    if isinstance(found, list) and found:
        weights = [_weight(w) for w in found]
        return [w for w in weights if isinstance(w, float)]
    return float(found) if type(found) in (int, float) and 0 <= found <= 1 else math.nan


def _range(tensor: Tensor) -> tuple[float, float]:
    wide = tensor.double()
    return float(wide.min()), float(wide.max())
