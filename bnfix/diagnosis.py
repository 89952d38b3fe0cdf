"""What is wrong with a checkpoint's norm layers, told from its tensors alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_MOMENTS = ("running_mean", "running_var")
_TINY_VAR = 1e-5


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
    """

    name: str
    channels: int
    batches_tracked: int | None
    mean_range: tuple[float, float]
    var_range: tuple[float, float]
    gamma_range: tuple[float, float] | None
    n_dead: int
    example_weight: float | list[float]


def read_norms(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
) -> list[NormTensors]:
    """Find the norm layers of a state dict by their running moments.

    Args:
        tensors: by name.
        header: the ``norms`` of a bnfix header, if there is one.

    Returns:
        One record a layer, in the file's order.
    """
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
                name,
                mean.numel(),
                _count(tensors.get(f"{prefix}num_batches_tracked")),
                _range(mean),
                _range(var),
                _range(gamma.double().abs()) if gamma is not None and has_gamma else None,
                int((var.double() < _TINY_VAR).sum()),
                _weight(settings.get("example_weight")) if isinstance(settings, dict) else 0.0,
            )
        )
    return layers


def diagnose(tensors: Mapping[str, Tensor], layers: list[NormTensors]) -> list[Finding]:
    """List what can be wrong with norm layers, as far as tensors tell.

    Args:
        tensors: by name.
        layers: from `read_norms`.

    Returns:
        Findings in the order of the layers.
    """
    findings: list[Finding] = []
    for layer in layers:
        prefix = f"{layer.name}." if layer.name else ""
        mean, var = (tensors[prefix + key].double() for key in _MOMENTS)
        findings += [
            Finding(layer.name, *fault) for fault in _faults(layer, mean, var, prefix, tensors)
        ]
    return findings


_Fault = tuple[str, str, str, str]


def _faults(
    layer: NormTensors, mean: Tensor, var: Tensor, prefix: str, tensors: Mapping[str, Tensor]
) -> list[_Fault]:
    found: list[_Fault] = []
    recalibrate = (
        "bnfix calibrate CKPT --data DATA --statistics population --example-weight keep -o OUT"
    )
    n_bad = int((~(mean.isfinite() & var.isfinite())).sum())
    if n_bad:
        detail = f"{n_bad} of {layer.channels} channels have statistics that are not finite"
        found.append(("not-finite", detail, "error", recalibrate))
    n_negative = int((var < 0).sum())
    if n_negative:
        detail = f"{n_negative} of {layer.channels} channels have a negative variance"
        found.append(("negative-variance", detail, "error", recalibrate))
    if not mean.any() and bool((var == 1).all()):
        detail = "the statistics are those of a new layer (mean 0, variance 1)"
        found.append(("never-updated", detail, "warning", recalibrate))
    elif layer.batches_tracked == 0:
        detail = "num_batches_tracked is 0 although the statistics are not those of a new layer"
        found.append(("counter-zero", detail, "note", "nothing, unless momentum is None"))
    if bool((var == 0).all()):
        found.append(("zero-variance", "every variance is 0", "warning", recalibrate))
    elif layer.n_dead and not n_negative:
        detail = (
            f"{layer.n_dead} of {layer.channels} channels have a variance below {_TINY_VAR:g} "
            f"(least {layer.var_range[0]:.2g}): constant channels, normalized by eps"
        )
        found.append(("dead-channels", detail, "note", "nothing; they carry no signal"))
    gamma = tensors.get(prefix + "weight")
    if gamma is not None and _is_real(gamma):
        n_zero = int((gamma.double().abs() < 1e-8).sum())
        if not bool(gamma.isfinite().all()):
            detail = "scale (gamma) is not finite"
            found.append(("gamma-not-finite", detail, "error", "find another checkpoint"))
        elif n_zero:
            detail = f"{n_zero} of {layer.channels} channels have a scale of 0"
            found.append(("gamma-zero", detail, "note", "nothing; they could be pruned"))
    if tensors[prefix + "running_var"].dtype in (torch.float16, torch.bfloat16):
        detail = "statistics are stored in half precision"
        found.append(("half-statistics", detail, "note", recalibrate))
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
