"""A file to a ready model: the model it belongs to, its tensors, its norm layers as set."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.building.models import build_model, build_skeleton
from bnfix.building.presets import published_arguments, published_weights, wants_transformed_input
from bnfix.building.pretrained import renamed
from bnfix.checkpoints.checkpoint import Checkpoint, key_problems, read_checkpoint
from bnfix.checkpoints.nesting import STATISTICS
from bnfix.checkpoints.origin import Origin, require_buildable, stated_origin
from bnfix.errors import BnfixError, CheckpointError, Note, plain, some
from bnfix.layers.norms import set_example_weight_
from bnfix.layers.sites import find_norms
from bnfix.layers.surgery import Change, plan_swap, swap_planned_, unfreeze_
from bnfix.recipe import SwapRecipe


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, and the file it came from.

    Args:
        model: in evaluation mode, on the CPU.
        checkpoint: the file's tensors and how they were found.
        origin: spec, preprocessing, history.
    """

    model: nn.Module
    checkpoint: Checkpoint
    origin: Origin


def load(path: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Load a checkpoint into a ready model in evaluation mode.

    Args:
        path: a bnfix output, or any checkpoint if ``model`` is given.
        model: the stock model to put it into; by default the one that the file names, if that is
            torchvision's or timm's.

    Returns:
        The model with its norm layers swapped and their weights set as the file says.

    Raises:
        CheckpointError: if the file cannot be read or does not fit.
        ModelError: if the file names no model that may be built from what a file says.
    """
    return load_ready(path, model=model, borrows=False).model


def load_ready(
    path: str | Path,
    *,
    spec: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    model: nn.Module | None = None,
    key: str | None = None,
    prefix: str | None = None,
    prefer_ema: bool = False,
    unfreeze: bool = False,
    mapped: bool = False,
    lenders: Sequence[str] = (),
    borrows: bool = True,
) -> Loaded:
    """Read a checkpoint, build its model, load it strictly, and set its norm layers."""
    checkpoint = first = read_checkpoint(path, key=key, prefix=prefix, prefer_ema=prefer_ema)
    origin = stated_origin(checkpoint)
    if spec is not None:
        origin = replace(origin, spec=spec, arguments=dict(arguments or {}))
    elif model is None:
        require_buildable(checkpoint, origin)
    if model is None and origin.spec is not None:
        checkpoint = _with_published_arguments_(origin, checkpoint)
        model = (
            build_skeleton(origin.spec, origin.arguments, checkpoint.tensors) if mapped else None
        )
    if model is None:
        model = build_model(origin.spec or "", origin.arguments, checkpoint.tensors)
    thawed = unfreeze_(model) if unfreeze else []
    if unfreeze:
        found = f"{len(thawed)} frozen layers are now BatchNorm2d" if thawed else "no frozen layer"
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, f"--unfreeze: {found}"))
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # Once unfrozen, a file has counters, which layers that are constants load and drop.
    for site in find_norms(model):
        if site.frozen:
            shapes.setdefault(f"{site.name}.num_batches_tracked", torch.Size())
    stock = {name: s for name, s in shapes.items() if not is_weight_buffer(name, model)}
    problems = key_problems(stock, checkpoint.tensors)
    if problems and prefix is None:
        added = [note for note in checkpoint.notes if note not in first.notes]
        checkpoint = read_checkpoint(path, key=key, expected=set(stock), prefer_ema=prefer_ema)
        checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *added))
        problems = key_problems(stock, checkpoint.tensors)
    if (origin.spec or "").startswith("transformers:"):
        checkpoint, problems = _as_transformers_loads(checkpoint, model, stock, problems)
    if problems and borrows and _lacks_statistics(model, checkpoint, len(problems)):
        checkpoint = _with_statistics(checkpoint, stock, lenders)
        problems = []
    if problems:
        where = origin.spec or type(model).__name__
        raise CheckpointError(
            f"{Path(path).name}: does not fit {where}, {len(problems)} problems: "
            f"{_listed(problems)}. Give the --model that it was trained as.",
            path=path,
        )
    _fill_(model, checkpoint)
    published = published_weights(origin.spec or "", checkpoint.sha256)
    if published is not None and published.name == "COCO_V1":
        for module in model.modules():
            if isinstance(module, FrozenBatchNorm2d) or module in thawed:
                module.__dict__["eps"] = 0.0  # as torchvision sets it beside these weights
    origin.dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    if checkpoint.metadata is not None:
        _apply_norms(model, checkpoint)
    model.eval()
    model.__dict__["_bnfix_origin"] = origin
    return Loaded(model, checkpoint, origin)


def _as_transformers_loads(
    checkpoint: Checkpoint,
    model: nn.Module,
    shapes: Mapping[str, torch.Size],
    problems: list[Note],
) -> tuple[Checkpoint, list[Note]]:
    """A checkpoint whose names are those of transformers' files, under the model's names."""
    notes = [f"{type(model).__name__} of transformers was built, as the folder says"]
    tensors = renamed(model, checkpoint.tensors) if problems else {}
    if tensors:
        n = sum(name not in tensors for name in checkpoint.tensors)
        notes.append(f"{n} names were changed as transformers' from_pretrained changes them")
        checkpoint, problems = replace(checkpoint, tensors=tensors), key_problems(shapes, tensors)
    return replace(checkpoint, notes=(*checkpoint.notes, *notes)), problems


def _lacks_statistics(model: nn.Module, checkpoint: Checkpoint, n_problems: int) -> bool:
    """Whether a set has all parameters and no statistics, as running means of weights often do."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    missing = [name for name in buffers - set(checkpoint.tensors) if _is_needed(name)]
    has_some = any(name in checkpoint.tensors for name in buffers if name.endswith(STATISTICS))
    return len(missing) == n_problems and not has_some


def _is_needed(name: str) -> bool:
    return name.rpartition(".")[2] not in ("num_batches_tracked", "example_weight")


def _with_statistics(
    checkpoint: Checkpoint, shapes: Mapping[str, torch.Size], lenders: Sequence[str]
) -> Checkpoint:
    """Parameters without statistics, completed by those of another set, or refused."""
    missing = [name for name in shapes if name not in checkpoint.tensors]
    places = [(checkpoint.path, key) for key in (None, *checkpoint.others)]
    for path, key in [*places, *((Path(file), None) for file in lenders)]:
        try:
            other = read_checkpoint(path, key=key, expected=frozenset(shapes))
        except CheckpointError:
            continue
        if any(_is_needed(name) and name not in other.tensors for name in missing):
            continue
        tensors = {name: other.tensors[name] for name in missing if name in other.tensors}
        lender = f"{other.path.name}, {other.key or other.prefix or 'top level'}"
        note = (
            f"{checkpoint.key or checkpoint.path.name} has parameters and no statistics; those of "
            f"{plain(lender)} were taken, which belong to other weights; commands with data "
            "measure them (--statistics population)"
        )
        return replace(
            checkpoint,
            tensors={**checkpoint.tensors, **tensors},
            notes=(*checkpoint.notes, note),
            borrowed=True,
        )
    raise CheckpointError(
        f"{checkpoint.path.name}: has the parameters of the model, but none of its "
        f"{len(missing)} buffers ({some(missing)}), nor does another set in the file. Give the "
        "file that has them too.",
        path=checkpoint.path,
    )


def _with_published_arguments_(origin: Origin, checkpoint: Checkpoint) -> Checkpoint:
    """Complete a builder's arguments by what belongs to weights known by their digest."""
    spec = origin.spec or ""
    if not wants_transformed_input(spec) or "transform_input" in origin.arguments:
        return checkpoint
    found = published_arguments(spec, checkpoint.sha256)
    origin.arguments = {**found, **origin.arguments}
    if checkpoint.metadata is not None:
        return checkpoint
    note = (
        "transform_input=true, as torchvision builds it with these weights of its own"
        if found
        else "built without transform_input; weights that come from torchvision's need "
        "--model-arg transform_input=true"
    )
    return replace(checkpoint, notes=(*checkpoint.notes, note))


def _fill_(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a fitting state dict; a model without memory takes the file's own tensors."""
    own = model.state_dict()
    empty = {name for name, tensor in own.items() if tensor.is_meta}
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in own.items():
        if name in checkpoint.tensors:
            found = checkpoint.tensors[name]
            state[name] = found.to(tensor.dtype) if empty else found
        else:  # num_batches_tracked, which old files lack
            state[name] = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
    # Some modules refuse a state dict that does not say which version of theirs it is.
    versions: Any = copy.copy(getattr(own, "_metadata", {}))
    for name, version in checkpoint.versions.items():
        if name in versions:
            versions[name] = {**versions[name], "version": version}
    state._metadata = versions  # type: ignore[attr-defined]
    try:
        model.load_state_dict(state, strict=True, assign=bool(empty))
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name}: cannot be loaded into {type(model).__name__}: {plain(error)}",
            path=checkpoint.path,
        ) from error


def _listed(problems: Sequence[Note]) -> str:
    """Some of every kind of problem: many of one kind must not hide another."""
    kinds = dict.fromkeys(problem.kind for problem in problems)
    return "; ".join(some([p for p in problems if p.kind == kind], 8) for kind in kinds)


def is_weight_buffer(name: str, model: nn.Module) -> bool:
    """Whether a key is the example weight of one of bnfix's layers."""
    if name != "example_weight" and not name.endswith(".example_weight"):
        return False
    owner = name.rpartition(".")[0]
    return any(owner == layer for layer, _ in _all_names(model))


def _all_names(model: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, site.module)
        for site in find_norms(model)
        for name in (site.name, *site.aliases)
        if hasattr(site.module, "channel_groups")
    ]


def _apply_norms(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Swap the layers that the header lists and give them its settings."""
    norms = (checkpoint.metadata or {}).get("norms")
    if not isinstance(norms, dict) or not norms:
        return
    sites = {n: site.name for site in find_norms(model) for n in (site.name, *site.aliases)}
    unknown = [name for name in norms if name not in sites]
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path.name}: its header sets norm layers that the model lacks: "
            f"{some([plain(name) for name in unknown])}.",
            path=checkpoint.path,
        )
    try:
        settings = {sites[name]: _Settings(**_known(value)) for name, value in norms.items()}
        plan = plan_swap(model, SwapRecipe(layers=tuple(_literal(name) for name in settings)))
        changes = tuple(_with(change, settings[change.name]) for change in plan.changes)
        swap_planned_(model, replace(plan, changes=changes))
        for name, setting in settings.items():
            layer = model.get_submodule(name)
            layer.__dict__["eps"] = float(setting.eps)
            set_example_weight_(layer, setting.example_weight)
    except (BnfixError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name}: the norm settings in its header cannot be used: "
            f"{plain(error)}",
            path=checkpoint.path,
        ) from error


@dataclass(frozen=True)
class _Settings:
    channel_groups: int
    ghost_size: int | None
    example_weight: Any
    eps: float

    def __post_init__(self) -> None:
        integers = (self.channel_groups, 1 if self.ghost_size is None else self.ghost_size)
        if not all(type(n) is int and n >= 1 for n in integers):
            raise ValueError("channel_groups and ghost_size are counts of at least 1")
        weight = self.example_weight
        for found in weight if isinstance(weight, list) else [weight]:
            if type(found) not in (int, float) or not 0 <= found <= 1:
                raise ValueError("example_weight is a number from 0 to 1, or a list of such")
        if type(self.eps) not in (int, float) or not 0 <= self.eps < 1e6:
            raise ValueError("eps is a number of at least 0")


def _known(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError("an entry is not an object")
    return {name: value.get(name) for name in _Settings.__dataclass_fields__}


def _with(change: Change, setting: _Settings) -> Change:
    return replace(
        change,
        channel_groups=setting.channel_groups,
        ghost_size=setting.ghost_size,
        example_weight=0.0,
    )


def _literal(name: str) -> str:
    """A glob that matches this name only."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
