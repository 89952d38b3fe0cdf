"""Find norm layers, plan their swap with all problems at once, swap them in place."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core.errors import NormError, count, some
from bnfix.core.guards import exchange_, tensors_kept
from bnfix.core.options import KINDS
from bnfix.core.settings import SwapRecipe
from bnfix.core.torch_private import BatchNormBase
from bnfix.norm.layer import (
    GeneralizedBatchNorm,
    GeneralizedBatchNormAct,
    generalized_norms,
    set_example_weight_,
)
from bnfix.norm.mixture import closed
from bnfix.norm.moments import over_channel_groups
from bnfix.norm.sites import (
    NormSite,
    check_patterns,
    find_norms,
    instance_norms,
    is_timm_act,
    selected,
)


@dataclass(frozen=True)
class Change:
    """The change of one layer, planned or done."""

    name: str
    kind: str  # class name before
    channels: int
    channel_groups: int
    ghost_size: int | None
    example_weight: float | None  # None keeps the weight of a generalized layer
    batch_weight: float | None = 0.0  # the same
    batch_estimator: str | None = None  # the same
    gated: bool = False  # it gets gates, or keeps the gates it has
    # Largest |output after - output before| in evaluation, on normal inputs with the layer's own
    # moments, in float64 from the stored tensors, relative to the largest output if that is above
    # 1. None until done, for live layers (whose output differs by design), and if not measurable.
    difference: float | None = None


@dataclass(frozen=True)
class SwapPlan:
    """The planned changes of a swap, and the problems; a plan with a problem is refused."""

    changes: tuple[Change, ...]
    problems: tuple[str, ...]
    skipped: tuple[str, ...]
    notes: tuple[str, ...]


def plan_swap(model: nn.Module, recipe: SwapRecipe | None = None) -> SwapPlan:
    """Plan the swap of every norm layer; the model is unchanged."""
    recipe = recipe or SwapRecipe()
    sites = find_norms(model)
    changes: list[Change] = []
    skipped: list[str] = []
    check_patterns(sites, layers=recipe.layers, skip=recipe.skip)
    problems = list[str]()
    wanted = [site for site in sites if selected(site, recipe.layers, recipe.skip)]
    for site in sites:
        if site not in wanted:
            skipped.append(f"{site.name}: left alone as asked")
        elif site.problem:
            problems.append(f"{site.name}: {site.problem}")
        else:
            change, reasons = _plan_site(site, recipe)
            changes.append(change)
            problems.extend(f"{site.name}: {reason}" for reason in reasons)
    notes = []
    planned = [site for site in wanted if not site.problem]
    if synchronized := [site.name for site in planned if "Sync" in site.kind]:
        notes.append(
            f"{some(synchronized)}: was SyncBatchNorm; in training it now normalizes per process"
        )
    if frozen := [site.name for site in planned if site.frozen]:
        notes.append(
            f"{some(frozen)}: FrozenBatchNorm2d; its constants are kept. --unfreeze turns it into "
            "a BatchNorm2d with the same values"
        )
    others = instance_norms(model)
    if not sites:
        has = f" ({some([f'{n}: {kind}' for n, kind in others.items()])})" if others else ""
        problems.append(f"model: it has no Batch Norm layer{has}; there is nothing to swap")
    elif others:
        skipped.append(
            f"{some(list(others))}: left alone, because Instance Norm's running statistics are "
            "averages of per-example statistics"
        )
    return SwapPlan(tuple(changes), tuple(problems), tuple(skipped), tuple(notes))


def swap_norms_(
    model: nn.Module,
    *,
    to: str = "example-aware",
    example_weight: float | None = None,
    batch_weight: float | None = None,
    batch_estimator: str | None = None,
    ghost_size: int | None = None,
    channel_groups: int | None = None,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
) -> SwapPlan:
    """Turn every Batch Norm into a `GeneralizedBatchNorm` with the same weights and outputs.

    With example weight 0, evaluation gives the same outputs at any grouping. Where channels share
    moments, scale and shift are re-fitted; the pooled moments are constants, so scale and shift
    absorb the change exactly. Each layer is compared before anything is replaced. Parameters stay
    the same objects, except re-fitted ones, which are new: build optimizers afterwards.

    Args:
        model: any module; layers that are already generalized get the new settings.
        to: kind of normalization, a key of ``bnfix.core.options.KINDS``.
        example_weight: weight of the example, 0 to 1; overrides the kind's.
        batch_weight: weight of the batch, 0 to 1, 0 by default; above 0, an example's output
            depends on the other examples of its batch.
        batch_estimator: ``mean`` or ``median``: how examples' moments are pooled into the batch's.
        ghost_size: examples per ghost batch in training; overrides the kind's.
        channel_groups: number of channel groups that share moments; overrides the kind's.
        layers: only layers with a name that matches one of these globs; all if empty.
        skip: leave alone layers with a name that matches one of these globs.

    Returns:
        The plan with the measured difference of every layer.

    Raises:
        NormError: with all problems at once; the model is then untouched.

    Changes:
        The norm layers of ``model``. Each object changes its class in place, so every reference to
        it stays valid, inside the module tree or not. It keeps its hooks, fields and parameters.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> swap_norms_(net).changes[0].name
        '1'
    """
    recipe = SwapRecipe(
        to=to,
        example_weight=example_weight,
        batch_weight=batch_weight,
        batch_estimator=batch_estimator,
        ghost_size=ghost_size,
        channel_groups=channel_groups,
        layers=tuple(layers),
        skip=tuple(skip),
    )
    return swap_planned_(model, plan_swap(model, recipe))


def swap_planned_(model: nn.Module, plan: SwapPlan) -> SwapPlan:
    """Carry out a plan in place; see `swap_norms_`."""
    sites = {site.name: site.module for site in find_norms(model)}
    problems = list(plan.problems) + [
        f"{change.name}: not a norm layer of this model; make the plan for this model"
        for change in plan.changes
        if change.name not in sites
    ]
    _refuse(problems)
    new: list[tuple[nn.Module, GeneralizedBatchNorm]] = []
    done: list[Change] = []
    for change in plan.changes:
        old = sites[change.name]
        layer = _build(old, change)
        weighed = layer.live or (isinstance(old, GeneralizedBatchNorm) and old.live)
        difference = None if weighed else _difference(old, layer)
        if difference is not None and (reason := _too_different(layer, difference)):
            problems.append(f"{change.name}: {reason}")
        new.append((old, layer))
        done.append(replace(change, difference=difference))
    _refuse(problems)
    for old, layer in new:
        exchange_(old, layer)
    return replace(plan, changes=tuple(done))


def unfreeze_(model: nn.Module) -> list[nn.Module]:
    """Turn FrozenBatchNorm layers into trainable Batch Norms with the same values."""
    unfrozen = [
        site.module
        for site in find_norms(model)
        if site.frozen and not site.problem and not isinstance(site.module, BatchNormBase)
    ]
    for module in unfrozen:
        # No import of timm, which may not be installed: the layer's module has the class too.
        kind: Any = nn.BatchNorm2d
        if is_timm_act(module):
            kind = sys.modules[type(module).__module__].BatchNormAct2d
        own: Any = module._buffers
        affine, device = own["weight"] is not None, own["running_var"].device
        layer = kind(_n_channels(module), module.eps, affine=affine, device=device)
        for name, tensor in own.items():
            if name in layer._buffers:
                layer._buffers[name] = tensor
            elif tensor is not None:
                layer._parameters[name] = nn.Parameter(tensor)
        layer._modules.update(module._modules)
        exchange_(module, layer)
    return unfrozen


def _refuse(problems: Sequence[str], shown: int = 8) -> None:
    if problems:
        more = f"; and {len(problems) - shown} more" if len(problems) > shown else ""
        raise NormError(f"norm layers: {'; '.join(problems[:shown])}{more}.")


def _too_different(layer: GeneralizedBatchNorm, difference: float) -> str:
    """Why a layer with different outputs must not replace the old one; "" if it can."""
    is_half = layer.weight is not None and layer.weight.dtype.itemsize < 4
    if difference <= (1e-2 if is_half else 1e-4):
        return ""
    moments = (layer.running_mean, layer.running_var)
    if not all(bool(m.isfinite().all()) for m in moments if m is not None):
        why = "not all of its statistics are finite; recalibrate before channels share them"
    else:
        why = "its moments differ too much for its type; convert in float32 or use more groups"
    return f"its outputs would change by {difference:.2g}: {why}, or leave it with --skip"


def _n_channels(module: nn.Module) -> int:
    n = getattr(module, "num_features", None)
    return int(n) if n is not None else int(module.running_mean.numel())  # type: ignore[operator]


def _plan_site(site: NormSite, recipe: SwapRecipe) -> tuple[Change, list[str]]:
    """The planned change of one layer, and all problems with it."""
    channels = _n_channels(site.module)
    kind_groups, kind_ghost, kind_weight = KINDS[recipe.to]
    groups = recipe.channel_groups
    if groups is None:
        groups = gcd(channels, 32) if kind_groups == "gcd32" else channels
    weight = kind_weight if recipe.example_weight is None else recipe.example_weight
    ghost = recipe.ghost_size or kind_ghost
    affine = all(getattr(site.module, p, None) is not None for p in ("weight", "bias"))
    gated = recipe.to == "gated" or getattr(site.module, "gates", None) is not None
    divided, keeps, none = groups < channels, site.has_statistics, "keeps no running statistics"
    found = (
        (
            divided and not affine and keeps,
            "without scale and shift it cannot keep its outputs when channels share statistics",
        ),
        (not keeps and 0 < weight < 1, f"{none} to mix the example's with"),
        (
            not keeps and weight == 0 and (ghost is not None or divided),
            f"{none}, so groups or ghost batches would also change its outputs in evaluation",
        ),
        (gated and site.frozen, "is frozen (--unfreeze), so it cannot have gates"),
        (gated and not (keeps or site.frozen), f"{none}, so it cannot have gates"),
        (recipe.batch_weight and not keeps, f"{none} to mix the batch's with"),
    )
    problems = [f"{problem}; leave it with --skip" for applies, problem in found if applies]
    if channels % groups:
        problems.append(
            f"{channels} channels do not divide into {groups} groups; use a divisor of "
            f"{channels}, for example --channel-groups {gcd(channels, groups)}"
        )
    change = Change(
        site.name,
        site.kind,
        channels,
        channel_groups=groups,
        ghost_size=ghost,
        example_weight=weight,
        batch_weight=recipe.batch_weight or 0.0,
        batch_estimator=recipe.batch_estimator,
        gated=gated and recipe.to != "batch",
    )
    return change, problems


def _build(old: nn.Module, change: Change) -> GeneralizedBatchNorm:
    """A generalized layer with all fields, hooks and tensors of the old layer."""
    activated = is_timm_act(old) or isinstance(old, GeneralizedBatchNormAct)
    kind = GeneralizedBatchNormAct if activated else GeneralizedBatchNorm
    layer = kind.__new__(kind)
    # Hook dictionaries are shared on purpose: the user's hook handles keep working.
    layer.__dict__.update(old.__dict__)
    for table in ("_parameters", "_buffers", "_modules"):
        layer.__dict__[table] = dict(old.__dict__[table])
    # A compiled call would still call the old layer.
    layer.__dict__.pop("_compiled_call_impl", None)
    for name in ("example_weight", "batch_weight"):
        layer._buffers.pop(name, None)
    layer.__dict__["_non_persistent_buffers_set"] = set(old._non_persistent_buffers_set)
    if activated:
        # SyncBatchNormAct can lack either module, and then skips it.
        for name in ("drop", "act"):
            layer._modules.setdefault(name, nn.Identity())
    if not isinstance(old, BatchNormBase):
        _complete_frozen(layer, old)
    own = (*layer._parameters.values(), *layer._buffers.values())
    device = next((t.device for t in own if t is not None), None)
    layer._configure(change.channel_groups, change.ghost_size, device)
    weights: list[Any] = [change.example_weight, change.batch_weight]
    if isinstance(old, GeneralizedBatchNorm):
        before = (old.example_weight, old.batch_weight)
        weights = [b if w is None else w for w, b in zip(weights, before, strict=True)]
    example, batch = weights
    layer._assign(example, batch, change.batch_estimator)
    if not change.gated or layer.gates is None:
        layer.gates = closed(layer) if change.gated else None
    was_grouped = isinstance(old, GeneralizedBatchNorm) and old.channel_groups < change.channels
    if was_grouped or change.channel_groups < change.channels:
        _refit(layer, old)
    return layer


def _complete_frozen(layer: GeneralizedBatchNorm, old: nn.Module) -> None:
    """Add the fields that FrozenBatchNorm2d lacks; scale and shift remain buffers."""
    layer.num_features = _n_channels(old)
    layer.affine, layer.track_running_stats, layer.momentum = True, True, 0.0
    layer._buffers.setdefault("num_batches_tracked", None)
    layer.frozen = True
    layer.training = False


@torch.no_grad()
def _refit(layer: GeneralizedBatchNorm, old: nn.Module) -> None:
    """Pool the moments over channel groups; let scale and shift absorb the change.

    gamma' = gamma s_pool / s, beta' = beta + gamma (mean_pool - mean) / s, s^2 = var + eps.
    """
    mean, var = layer.running_mean, layer.running_var
    if mean is None or var is None or mean.device.type == "meta":
        return
    if isinstance(old, GeneralizedBatchNorm):
        mean, var = over_channel_groups(mean.double(), var.double(), old.channel_groups)
    mean, var = mean.double(), var.double()
    pooled_mean, pooled_var = over_channel_groups(mean, var, layer.channel_groups)
    fitted = {"running_mean": pooled_mean, "running_var": pooled_var}
    if layer.weight is not None and layer.bias is not None:
        sd, pooled_sd = (var + layer.eps).sqrt(), (pooled_var + layer.eps).sqrt()
        gamma = layer.weight.double()
        fitted["weight"] = gamma * pooled_sd / sd
        fitted["bias"] = layer.bias.double() + gamma * (pooled_mean - mean) / sd
    for name, value in fitted.items():
        source: Tensor = getattr(old, name)
        fresh: Any = value.to(source.dtype)
        if torch.equal(fresh, source):
            continue
        if name in layer._parameters:
            fresh = nn.Parameter(fresh, requires_grad=source.requires_grad)
            fresh.__dict__.update(source.__dict__)
            layer._parameters[name] = fresh
        else:
            layer._buffers[name] = fresh


@torch.no_grad()
def _difference(old: nn.Module, new: GeneralizedBatchNorm) -> float | None:
    """Largest relative difference in evaluation on normal inputs with the layer's own moments."""
    mean, var = getattr(old, "running_mean", None), getattr(old, "running_var", None)
    if mean is None or var is None or mean.device.type == "meta":
        return None
    generator = torch.Generator().manual_seed(0)
    spatial = {"BatchNorm1d": (5,), "BatchNorm3d": (2, 2, 2)}.get(type(old).__name__, (3, 3))
    view = (1, new.num_features, *(1 for _ in spatial))
    noise = torch.randn((4, new.num_features, *spatial), generator=generator).to(mean.device)
    x = mean.double().view(view) + var.double().clamp_min(0).sqrt().view(view) * noise
    before, after = _evaluated(old, x), _evaluated(new, x)
    # A layer with non-finite statistics outputs NaN before and after. That counts as equal: it can
    # be swapped, and then recalibrated.
    same = (before == after) | (before.isnan() & after.isnan())
    gap = torch.where(same, 0.0, (after - before).abs())
    scale = before.abs().nan_to_num(0.0, posinf=0.0).max().clamp_min(1.0)
    return float((gap.max() / scale).item())


def _evaluated(module: nn.Module, x: Tensor) -> Tensor:
    """A layer's output in evaluation, in float64 from its stored tensors."""
    with tensors_kept(module) as tables:
        for part in module.modules():
            part.training = False
        for table in tables:
            own = {k: t for k, t in table.items() if t is not None and t.is_floating_point()}
            table.update({k: t.double() for k, t in own.items()})
        # The class's method, not a call: the user's hooks must not run.
        output: Tensor = type(module).forward(module, x)
    return output


def zero_pointwise_(model: nn.Module, excluded: Iterable[str]) -> list[str]:
    """Set weight 0 on layers with a single position: there the formula is a different function."""
    layers = dict(generalized_norms(model))
    live = [
        name for name in excluded if layers[name].weighs and layers[name].running_mean is not None
    ]
    if not live:
        return []
    none = dict.fromkeys(live, 0.0)
    set_example_weight_(model, none, batch_weight=none)
    return [f"example weight 0 for {count(len(live), 'layers')} with a single position per map."]
