"""A model's norm layers as rows of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bnfix.layers.norms import generalized_norms
from bnfix.layers.sites import find_norms
from bnfix.reporting.records import LayerRow
from bnfix.statistics.calibration import Calibration
from bnfix.weighing.example_weight import weights_of


def statistics_of(model: nn.Module) -> dict[str, Any]:
    """Copies of every layer's stored moments, with its eps."""
    return {
        site.name: (
            site.module.running_mean.double().cpu().clone(),  # type: ignore[operator]
            site.module.running_var.double().cpu().clone(),  # type: ignore[operator]
            float(getattr(site.module, "eps", 1e-5)),
        )
        for site in find_norms(model)
        if site.has_statistics
    }


def drifts_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean shift and log variance ratio of every layer that both have."""
    drifts = {}
    for name, (mean, var, eps) in after.items():
        if name in before and before[name][0].shape == mean.shape:
            old_mean, old_var, _ = before[name]
            shift = ((mean - old_mean).abs() / (var.clamp_min(0) + eps).sqrt()).mean()
            ratio = ((var.clamp_min(0) + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
            drifts[name] = (float(shift), float(ratio))
    return drifts


def layer_rows(
    model: nn.Module,
    drifts: Mapping[str, tuple[float, float]],
    fresh: Mapping[str, tuple[float, float]],
    calibration: Calibration | None = None,
) -> tuple[LayerRow, ...]:
    """One row a norm layer, in order."""
    weights = weights_of(model)
    errors = {} if calibration is None else {r.name: r for r in calibration.layers}
    rows = []
    for site in find_norms(model):
        shift, ratio = drifts.get(site.name, (None, None))
        record = errors.get(site.name)
        rows.append(
            LayerRow(
                name=site.name,
                kind=site.kind,
                channels=int(getattr(site.module, "num_features", 0)),
                example_weight=weights.get(site.name, 0.0),
                mean_shift=shift,
                log_var_ratio=ratio,
                residual=fresh[site.name][0] if site.name in fresh else None,
                mean_se=None if record is None else record.mean_se,
                var_se=None if record is None else record.var_se,
            )
        )
    return tuple(rows)


def n_live(model: nn.Module) -> int:
    """How many layers look at the example."""
    return sum(layer.live for _, layer in generalized_norms(model))
