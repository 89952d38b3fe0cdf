"""Find a model's normalization layers, their kinds, and the reasons against swapping them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core.errors import NormError, did_you_mean, some
from bnfix.core.options import require
from bnfix.core.torch_private import BatchNormBase, InstanceNormBase, LazyNormBase
from bnfix.norm.layer import GeneralizedBatchNorm, GeneralizedBatchNormAct, require_eager
from bnfix.norm.moments import over_channel_groups

_STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
#: Marks layers that the model's own code froze; loading loses the modes that show it.
_AT_REST = "_bnfix_frozen"
_OURS = (GeneralizedBatchNorm, GeneralizedBatchNormAct)
#: The forwards that are known to normalize exactly their input.
_FORWARDS = tuple(kind.forward for kind in (BatchNormBase, nn.SyncBatchNorm, *_OURS))
_SCRIPTED = "is TorchScript, which can be neither inspected nor changed; leave it with --skip"
_QAT = ("torch.ao.nn.qat", "torch.ao.nn.intrinsic.qat")
_OBSERVERS = ("FakeQuantizeBase", "ObserverBase")
#: timm's layers are recognized by class and module names, so timm need not be installed.
_TIMM_ACT = ("BatchNormAct2d", "SyncBatchNormAct", "FrozenBatchNormAct2d")


@dataclass(frozen=True)
class NormSite:
    """A normalization layer of a model that has, or could have, population moments."""

    name: str
    aliases: tuple[str, ...]  # further names of the same module
    module: nn.Module
    kind: str  # class name
    problem: str  # why it cannot be swapped; "" if it can
    unmeasured: str = ""  # why its statistics cannot be measured from its inputs; "" if they can

    @property
    def frozen(self) -> bool:
        """Whether its statistics are constants by construction."""
        return "Frozen" in self.kind or bool(getattr(self.module, "frozen", False))

    def is_put_to_rest(self, model: nn.Module) -> bool:
        """Whether the user froze it: in evaluation mode, without gradients, in a training model."""
        own = list(self.module.parameters(recurse=False))
        at_rest = own and not any(p.requires_grad for p in own) and not self.module.training
        return (model.training and bool(at_rest)) or _AT_REST in vars(self.module)

    @property
    def has_statistics(self) -> bool:
        """Whether it keeps population moments."""
        return isinstance(getattr(self.module, "running_mean", None), Tensor)

    @property
    def is_measurable(self) -> bool:
        """Whether its statistics can be measured from its inputs, as far as is known."""
        # In another class, running_mean and running_var may have a different meaning.
        known = not self.problem or isinstance(self.module, BatchNormBase)
        return known and not self.unmeasured

    @property
    def eps(self) -> float:
        """The constant that the layer adds to the variance."""
        return float(getattr(self.module, "eps", 1e-5))

    @property
    def moments(self) -> tuple[Tensor, Tensor]:
        """The running statistics as the layer applies them, in float64."""
        buffers: Any = self.module._buffers
        return self.over_groups(buffers["running_mean"].double(), buffers["running_var"].double())

    def over_groups(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Pool moments over the layer's channel groups, repeated over each group's channels."""
        if isinstance(self.module, GeneralizedBatchNorm):
            return over_channel_groups(mean, var, self.module.channel_groups)
        return mean, var

    def as_stored(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Moments in the type and on the device of the layer's buffers."""
        own: Any = self.module._buffers["running_mean"]
        return mean.to(own), var.to(own)

    def set_moments_(self, mean: Tensor, var: Tensor, n_batches: int) -> None:
        """Write its running statistics; set its batch counter to ``n_batches`` if that is 0."""
        buffers: Any = self.module._buffers
        buffers["running_mean"].copy_(mean)
        buffers["running_var"].copy_(var)
        tracked = buffers.get("num_batches_tracked")
        if tracked is not None and int(tracked) == 0:
            tracked.fill_(n_batches)


def find_norms(model: nn.Module) -> list[NormSite]:
    """Find every Batch Norm layer of a model, and every layer that holds its running statistics.

    These are torch's Batch Norms, SyncBatchNorm, torchvision's FrozenBatchNorm2d, timm's
    BatchNormAct2d, and any other module that derives from Batch Norm or has the buffers
    ``running_mean`` and ``running_var``. Instance Norm is not included.

    Args:
        model: any module.

    Returns:
        One site per module, in module order, with all of the module's names.

    Raises:
        NormError: if the model is TorchScript.
    """
    require_eager(model)
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        # Not module._buffers: a scripted module's cannot be iterated over.
        buffers = {key for key, _ in module.named_buffers(recurse=False)}
        holds_moments = {"running_mean", "running_var"} <= buffers
        holds_moments = holds_moments and not isinstance(module, InstanceNormBase)
        if holds_moments or isinstance(module, BatchNormBase):
            names.setdefault(module, []).append(name)
    quantizing = _quantizing(model) if names else ""
    return [
        NormSite(
            name=first,
            aliases=tuple(others),
            module=module,
            kind=type(module).__name__ + _gates_of(module),
            problem=quantizing or _problem(module, is_root=first == ""),
            unmeasured=quantizing or _unmeasured(module),
        )
        for module, (first, *others) in names.items()
    ]


def _gates_of(module: nn.Module) -> str:
    return " with gates" if getattr(module, "gates", None) is not None else ""


def _quantizing(model: nn.Module) -> str:
    """Why a network with quantization observers must not be changed; "" without observers."""
    for name, module in model.named_modules():
        for base in type(module).__mro__:
            where = base.__module__
            observes = base.__name__ in _OBSERVERS and "quantization" in where
            if observes or where.startswith(_QAT):
                kind = type(module).__name__
                return f"{name} ({kind}) prepares for quantization; repair first, then prepare"
    return ""


def instance_norms(model: nn.Module) -> dict[str, str]:
    """Class names of Instance Norms with running statistics, by layer name."""
    return {
        name: type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, InstanceNormBase) and isinstance(module.running_mean, Tensor)
    }


def selected(site: NormSite, layers: Sequence[str], skip: Sequence[str]) -> bool:
    """Whether ``--layers`` includes a site and ``--skip`` does not exclude it."""
    names = (site.name, *site.aliases)
    wanted, unwanted = (
        any(fnmatchcase(name, pattern) for name in names for pattern in patterns)
        for patterns in (layers, skip)
    )
    return (wanted or not layers) and not unwanted


def check_patterns(sites: Sequence[NormSite], **patterns: Sequence[str]) -> None:
    """Refuse patterns of an option that match no norm layer and are probably misspelled."""
    names = [name for site in sites for name in (site.name, *site.aliases)]
    known, problems = some(names) or "none", list[str]()
    for option, pattern in ((option, one) for option, given in patterns.items() for one in given):
        if not any(fnmatchcase(name, pattern) for name in names):
            meant = did_you_mean(pattern.replace("*", ""), names, 3)
            found = f"--{option}: {pattern} matches no norm layer; there are {known}.{meant}"
            problems.append(found)
    require(not problems, " ".join(problems), "layers")


def is_frozen_kind(module: nn.Module) -> bool:
    """Whether a module is torchvision's FrozenBatchNorm2d."""
    # Importing torchvision takes seconds; if nobody imported it, no such layer can exist.
    found = sys.modules.get("torchvision.ops.misc")
    return found is not None and type(module) is found.FrozenBatchNorm2d


def is_timm_act(module: nn.Module) -> bool:
    """Whether a module is one of timm's Batch Norms with an activation."""
    kind = type(module)
    return kind.__module__.startswith("timm.") and kind.__name__ in _TIMM_ACT


def _problem(module: nn.Module, *, is_root: bool) -> str:
    kind = type(module)
    if is_root:
        return "the model is itself a norm layer; put it inside a module, such as nn.Sequential"
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    if isinstance(module, LazyNormBase):
        return f"{kind.__name__} has no size yet; run the model once first"
    known = kind in (*_STOCK, *_OURS, nn.SyncBatchNorm)
    if not (known or is_frozen_kind(module) or is_timm_act(module)):
        return (
            f"{kind.__module__}.{kind.__qualname__} is not a layer that bnfix knows, and may do "
            "more than normalize; leave it with --skip"
        )
    if "forward" in vars(module):
        return "its forward is overridden on the instance; undo that, or leave it with --skip"
    return ""


def remember_frozen_(model: nn.Module) -> None:
    """Mark the layers that their modes show to be frozen, before the modes change."""
    for site in find_norms(model):
        if site.is_put_to_rest(model):
            site.module.__dict__[_AT_REST] = True


def _unmeasured(module: nn.Module) -> str:
    kind = type(module)
    if isinstance(module, torch.jit.ScriptModule):
        return _SCRIPTED
    if not isinstance(module, BatchNormBase) or is_timm_act(module):
        return ""
    if kind.forward in _FORWARDS and "forward" not in vars(module):
        return ""
    return (
        f"{kind.__module__}.{kind.__qualname__} has its own forward, which may not normalize its "
        "whole input per channel (masked values, other axes); leave it with --skip"
    )


def check_measurable(sites: Sequence[NormSite], layers: Sequence[str], skip: Sequence[str]) -> None:
    """Refuse unknown patterns, and selected sites whose statistics would be measured wrongly."""
    check_patterns(sites, layers=layers, skip=skip)
    problems = [
        f"{site.name}: {site.unmeasured}"
        for site in sites
        if site.unmeasured and site.has_statistics and not site.frozen
        and selected(site, layers, skip)
    ]  # fmt: skip
    if problems:
        raise NormError(f"norm layers: {'; '.join(problems)}.")


def sites_with_statistics(
    model: nn.Module, layers: Sequence[str] = (), skip: Sequence[str] = ()
) -> Iterator[NormSite]:
    """The sites whose running statistics can be recalibrated."""
    for site in find_norms(model):
        wanted = not site.frozen and selected(site, layers, skip)
        if site.has_statistics and site.is_measurable and wanted:
            yield site
