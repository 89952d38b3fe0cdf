"""Layers with weight 0 into the convolutions before them.

Without a look at the example a norm layer is a constant scale and shift per channel, which the
convolution or linear layer before it can carry itself. With s = gamma / sqrt(var + eps):

    s (W * x + b - mean) + beta  =  (s W) * x + (s (b - mean) + beta)

computed in float64 and rounded once. A layer is folded only where the dataflow proves that nothing
else sees the convolution's output, and where its outputs were compared before and after.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from bnfix import guards, runtime
from bnfix._torch_private import ConvBase, ConvTransposeBase
from bnfix.errors import ModelError
from bnfix.layers.norms import GeneralizedBatchNorm
from bnfix.layers.sites import NormSite, find_norms, is_timm_act
from bnfix.moments import over_channel_groups
from bnfix.production.artifacts import outputs_of
from bnfix.production.dataflow import Source, sources_of

_EXACT = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.Linear,
)  # fmt: skip
#: timm's convolution that pads as TensorFlow does, known by where it comes from.
_TIMM_SAME = "Conv2dSame"
#: Largest difference of a fold, by the largest output where that is above 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Fold:
    """A norm layer that went into the layer before it.

    Args:
        norm: its dotted name.
        layer: dotted name of the convolution or linear layer.
        kind: class name of that.
        difference: largest |output after - output before|, relative to the largest output where
            that is above 1; on the example's activations, or on seeded normal values without one.
    """

    norm: str
    layer: str
    kind: str
    difference: float


@dataclass(frozen=True)
class Folding:
    """What was folded, and what was not.

    Args:
        folded: in order.
        left: dotted name of every other norm layer, with the reason.
        live: those of them whose example weight is above 0.
        checked_on: ``example`` or ``noise``.
        traced_by: what the dataflow was found with, ``torch.fx`` or ``torch.export``.
    """

    folded: tuple[Fold, ...]
    left: Mapping[str, str]
    live: tuple[str, ...]
    checked_on: str
    traced_by: str


@dataclass(frozen=True)
class _Candidate:
    site: NormSite
    name: str
    layer: nn.Module
    new: nn.Module
    after: nn.Module


class _Rest(nn.Module):
    """What timm's BatchNormAct2d does after it has normalized; the parts keep their names."""

    drop: nn.Module
    act: nn.Module

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        for name in ("drop", "act"):
            self.add_module(name, getattr(norm, name, None) or nn.Identity())

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.act(self.drop(x)))


def optimize_(model: nn.Module, example: Tensor | None = None) -> Folding:
    """Fold every norm layer that does not look at the example into the layer before it.

    Folded are layers of weight 0 (and stock ones) that alone follow a convolution (1, 2 or 3 axes,
    transposed, grouped, depthwise) or a linear layer, called once. All others are left as they are
    and listed: live ones, those after something else, and those whose convolution is shared, used
    elsewhere, hooked or of an unknown kind.

    Changes:
        Weights and biases of the layers (new parameters); the norms become ``nn.Identity``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> optimize_(net).folded[0].layer
        '0'
    """
    sites = find_norms(model)
    if any(site.module.training for site in sites):
        raise ModelError(
            "folding: the model is in training mode, where norm layers are no constants. Call "
            "model.eval() first."
        )
    live = tuple(site.name for site in sites if _is_live(site.module))
    if not sites:
        return Folding(folded=(), left={}, live=(), checked_on="nothing", traced_by="nothing")
    sources, traced_by = sources_of(model, [site.module for site in sites], example)
    left: dict[str, str] = {}
    candidates: list[_Candidate] = []
    owners = _owners(model)
    for site in sites:
        found = _candidate(site, sources.get(site.name), model, owners, example is not None)
        if isinstance(found, str):
            left[site.name] = found
        else:
            candidates.append(found)
    differences = _on_noise(candidates) if example is None else _on(model, candidates, example)
    folded: list[Fold] = []
    accepted: list[_Candidate] = []
    for one in candidates:
        difference = differences.get(one.site.name, "not reached by the example given")
        if isinstance(difference, str):
            left[one.site.name] = difference
            continue
        tolerance = _TOLERANCE.get(_weight(one.layer).dtype, 1e-4)
        if not difference <= tolerance:
            left[one.site.name] = f"its outputs would change by {difference:.2g}"
            continue
        accepted.append(one)
        kind = type(one.layer).__name__
        folded.append(Fold(one.site.name, one.name, kind, difference))
    _apply_(model, accepted, example)
    order = {site.name: left[site.name] for site in sites if site.name in left}
    return Folding(
        folded=tuple(folded),
        left=order,
        live=live,
        checked_on="noise" if example is None else "example",
        traced_by=traced_by,
    )


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _is_live(module: nn.Module) -> bool:
    return isinstance(module, GeneralizedBatchNorm) and module.live


def _owners(model: nn.Module) -> Counter[int]:
    """By how many modules each parameter is held."""
    modules = model.modules()
    return Counter(id(p) for module in modules for p in module._parameters.values())


def _candidate(
    site: NormSite, source: Source | None, model: nn.Module, owners: Counter[int], shaped: bool
) -> _Candidate | str:
    """A fold that may be tried, or why not."""
    norm = site.module
    reason = _norm_problem(site)
    if reason is None and source is None:
        reason = "is not called on the way from input to output"
    if reason is None and source is not None and source.problem:
        reason = source.problem
    if reason is not None or source is None or source.layer is None:
        return reason or "does not follow a convolution or linear layer"
    layer = model.get_submodule(source.layer)
    reason = _layer_problem(layer, source.layer, owners, shaped)
    if reason is not None:
        return reason
    scale, shift = _scale_and_shift(norm)
    if not bool(scale.isfinite().all() and shift.isfinite().all()):
        return "its statistics are not finite"
    if len(scale) != _n_outputs(layer):
        return f"has {len(scale)} channels, {source.layer} gives {_n_outputs(layer)}"
    new = _folded(layer, scale, shift)
    if not all(bool(p.isfinite().all()) for p in new.parameters(recurse=False)):
        return f"the folded weights do not fit into {_weight(layer).dtype}"
    activated = is_timm_act(norm) or hasattr(norm, "act") or hasattr(norm, "drop")
    after = _Rest(norm) if activated else nn.Identity()
    after.eval()
    return _Candidate(site=site, name=source.layer, layer=layer, new=new, after=after)


def _norm_problem(site: NormSite) -> str | None:
    norm = site.module
    if _is_live(norm):
        return "weighs the example (example weight above 0)"
    if site.problem:
        return site.problem
    if not site.has_statistics:
        return "keeps no population statistics"
    return "has hooks" if _hooked(norm) else None


def _layer_problem(layer: nn.Module, name: str, owners: Counter[int], shaped: bool) -> str | None:
    kind = type(layer)
    is_same = kind.__name__ == _TIMM_SAME and kind.__module__.startswith("timm.")
    if kind not in _EXACT and not is_same:
        if isinstance(layer, ConvBase | nn.Linear):
            return f"{name} is a {kind.__name__}, which may do more than {kind.__mro__[1].__name__}"
        return f"follows {name} ({kind.__name__}), not a convolution or linear layer"
    if _hooked(layer) or "forward" in vars(layer):
        return f"{name} has hooks or a forward of its own"
    if any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
        return f"{name} shares its weights with another layer"
    if kind is nn.Linear and not shaped:
        return f"{name} is linear, and without an example the axes of its output are not known"
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _n_outputs(layer: nn.Module) -> int:
    return int(cast(int, getattr(layer, "out_channels", None) or layer.out_features))


def _scale_and_shift(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """The constants that a norm layer of weight 0 amounts to, ``(C,)``, float64."""
    mean, var = (cast(Tensor, getattr(norm, f"running_{m}")).double() for m in ("mean", "var"))
    if isinstance(norm, GeneralizedBatchNorm):
        mean, var = over_channel_groups(mean, var, norm.channel_groups)
    scale = (var + cast(float, norm.eps)).rsqrt()
    if getattr(norm, "weight", None) is not None:
        scale = scale * cast(Tensor, norm.weight).detach().double()
    shift = -mean * scale
    if getattr(norm, "bias", None) is not None:
        shift = shift + cast(Tensor, norm.bias).detach().double()
    return scale, shift


@torch.no_grad()
def _folded(layer: nn.Module, scale: Tensor, shift: Tensor) -> nn.Module:
    """A copy of a layer that also does what the norm after it did."""
    weight = _weight(layer)
    wide = weight.double()
    if isinstance(layer, ConvTransposeBase):
        # (in, out / groups, ...): the outputs of a group lie along axis 1 of its block of inputs.
        n = layer.groups
        blocks = wide.reshape(n, -1, *wide.shape[1:])
        view = (n, 1, -1, *(1 for _ in weight.shape[2:]))
        wide = (blocks * scale.view(view)).flatten(0, 1)
    else:
        wide = wide * scale.view(-1, *(1 for _ in weight.shape[1:]))
    bias = cast("Tensor | None", layer.bias)
    offset = shift if bias is None else bias.double() * scale + shift
    new = copy.copy(layer)
    new.__dict__["_parameters"] = {
        "weight": nn.Parameter(wide.to(weight.dtype), requires_grad=weight.requires_grad),
        "bias": nn.Parameter(offset.to(weight.dtype), requires_grad=weight.requires_grad),
    }
    return new


def _difference(one: _Candidate, x: Tensor) -> float:
    """By how much a fold changes outputs, relative where they are above 1; NaN where not finite."""
    # The classes' methods, not calls: hooks must not be met again.
    before = one.site.module(type(one.layer).forward(one.layer, x))
    after = one.after(type(one.new).forward(one.new, x))
    scale = before.abs().max().clamp_min(1.0)
    return float((after - before).abs().max() / scale)


def _on(model: nn.Module, candidates: list[_Candidate], example: Tensor) -> dict[str, float | str]:
    """The differences of folds on their own activations, in one run of the model."""
    found: dict[str, float | str] = {}

    def hook_of(one: _Candidate) -> Any:
        def hook(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
            x = inputs[0] if inputs else torch.empty(0)
            if not x.numel():
                return
            if x.dim() != (2 if isinstance(layer, nn.Linear) else _weight(layer).dim()):
                found[one.site.name] = f"{one.name} gives {x.dim()} axes, the last are not channels"
            else:
                found[one.site.name] = _difference(one, x)

        return hook

    with guards.inference(model), guards.hooks() as handles:
        handles += [one.layer.register_forward_pre_hook(hook_of(one)) for one in candidates]
        runtime.run(model, example, runtime.device_of(model))
    return found


@torch.no_grad()
def _on_noise(candidates: list[_Candidate]) -> dict[str, float | str]:
    """The differences of folds on seeded normal values, each layer by itself."""
    generator = torch.Generator().manual_seed(0)
    found: dict[str, float | str] = {}
    for one in candidates:
        layer = cast(ConvBase, one.layer)
        sizes = [d * (k - 1) + 3 for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        x = torch.randn((2, layer.in_channels, *sizes), generator=generator)
        found[one.site.name] = _difference(one, x.to(_weight(layer)))
    return found


def _apply_(model: nn.Module, accepted: list[_Candidate], example: Tensor | None) -> None:
    """Fold, compare the whole model's outputs on the example, and undo where they differ."""
    before = None if example is None else _outputs(model, example)
    own = [dict(one.layer._parameters) for one in accepted]
    for one in accepted:
        one.layer._parameters.update(one.new._parameters)
        guards.exchange_(one.site.module, one.after)
    if example is None or before is None:
        return
    pairs = zip(before, _outputs(model, example), strict=True)
    # Each fold is within its tolerance; a whole model may add some of them up.
    limit = 10 * max((_TOLERANCE.get(_weight(o.layer).dtype, 1e-4) for o in accepted), default=0)
    if all(float((b - a).abs().max() / a.abs().max().clamp_min(1.0)) <= limit for a, b in pairs):
        return
    for one, parameters in zip(accepted, own, strict=True):
        one.layer._parameters.update(parameters)
        guards.exchange_(one.site.module, one.after)
    raise ModelError(
        "folding: each layer keeps its outputs, but the whole model's change, or are not finite. "
        "Nothing was folded; look at the statistics with `bnfix inspect`."
    )


def _outputs(model: nn.Module, example: Tensor) -> list[Tensor]:
    with guards.inference(model):
        output = runtime.run(model, example, runtime.device_of(model))
    return [t.double() for t in outputs_of(output).values() if t.is_floating_point() and t.numel()]
