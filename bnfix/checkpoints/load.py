"""Load a ready model from a file: its architecture, tensors and norm layer settings."""

from __future__ import annotations

import copy
import shlex
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from glob import escape
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import (
    STATISTICS,
    Checkpoint,
    Misfits,
    misfits_of,
    read_checkpoint,
)
from bnfix.checkpoints.several import Sets, open_domains_
from bnfix.core.errors import (
    BnfixError,
    CheckpointError,
    count,
    file_error,
    file_errors,
    model_error,
    plain,
    some,
)
from bnfix.core.settings import ModelRecipe, Preprocessing, SwapRecipe, TaskRecipe
from bnfix.models.build import build_model, build_skeleton, from_file_allowed
from bnfix.models.published import (
    described_in,
    folder_labels,
    names_in_file,
    published_arguments,
    published_weights,
    renamed,
)
from bnfix.norm.layer import set_example_weight_
from bnfix.norm.mixture import set_gates_
from bnfix.norm.sites import find_norms, is_frozen_kind
from bnfix.norm.swap import plan_swap, swap_planned_, unfreeze_


@dataclass
class Origin:
    """The source of a model; it is an attribute of the model, for use by `save`."""

    spec: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # for the builder
    preprocessing: Preprocessing | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry per command
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the file's tensors
    task: TaskRecipe | None = None  # the task for evaluation, if not classification
    labels: tuple[str, ...] = ()  # of the outputs, if known
    place: Checkpoint | None = None  # the file, without its tensors
    folder: Path | None = None  # the hub folder that contains the file
    domains: Sets = field(default_factory=dict)  # statistics of domains to save with its own


def origin_of(model: nn.Module) -> Origin:
    """The source of a model; an empty origin if bnfix did not load it."""
    found = model.__dict__.get("_bnfix_origin")
    return found if isinstance(found, Origin) else Origin()


def stated_origin(checkpoint: Checkpoint) -> Origin:
    """The origin in a header, with checked types: a file may be hostile."""
    metadata = checkpoint.metadata or {}
    model: Any = metadata.get("model") or {}
    is_object = isinstance(model, dict)
    spec: Any = model.get("spec") if is_object else None
    arguments: Any = (model.get("arguments") or {}) if is_object else {}
    preprocessing, history = metadata.get("preprocessing"), metadata.get("history") or []
    task, labels = metadata.get("task"), (model.get("labels") or []) if is_object else []
    fits = {
        "model": is_object
        and isinstance(spec, str | None)
        and isinstance(arguments, dict)
        and isinstance(labels, list)
        and all(isinstance(label, str) for label in labels),
        "preprocessing": isinstance(preprocessing, dict | None),
        "norms": isinstance(metadata.get("norms"), dict | None),
        "history": isinstance(history, list) and all(isinstance(e, dict) for e in history),
        "task": isinstance(task, dict | None),
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise file_error(
            checkpoint.path,
            f"its bnfix header holds values of the wrong type under {some(wrong)}, so bnfix did "
            "not write it. Download the file again.",
        )
    known = None if preprocessing is None else _preprocessing(preprocessing, checkpoint)
    with file_errors(checkpoint.path, "the task in its header cannot be used", kinds=_UNUSABLE):
        read = task and TaskRecipe(**task)
        return Origin(spec, arguments, known, history, task=read, labels=tuple(labels))


#: Errors that recipes raise for invalid values.
_UNUSABLE = (TypeError, ValueError, OverflowError)


def _preprocessing(found: dict[str, Any], checkpoint: Checkpoint) -> Preprocessing:
    known = {name: found[name] for name in Preprocessing.__dataclass_fields__ if name in found}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    problem = "the preprocessing in its header cannot be used"
    with file_errors(checkpoint.path, problem, kinds=_UNUSABLE):
        return Preprocessing(**values)


def require_buildable(checkpoint: Checkpoint, origin: Origin) -> None:
    """Refuse a file that names no model, or a model that needs code named in the file."""
    name = checkpoint.path.name
    if origin.spec is None:
        raise model_error(
            name,
            "does not name its model. Give --model, for example torchvision:resnet50, "
            "package.module:callable or path/to/file.py:callable.",
        )
    if not from_file_allowed(origin.spec):
        raise model_error(
            name,
            f"names the model {plain(origin.spec)!r}, and bnfix does not run code that a file "
            f"names. If you trust it, give --model {shlex.quote(plain(origin.spec))}",
        )


@dataclass(frozen=True)
class Loaded:
    """A model ready to run, in evaluation mode on the CPU, and its source."""

    model: nn.Module
    checkpoint: Checkpoint
    origin: Origin
    domains: Sets = field(default_factory=dict)  # statistics of domains in the file


def load(
    path: str | Path, model: nn.Module | None = None, *, domain: str | None = None
) -> nn.Module:
    """Load a checkpoint into a ready model in evaluation mode.

    Args:
        path: a bnfix output, a hub folder, or any checkpoint if ``model`` is given.
        model: the stock model to fill; by default the torchvision or timm model that the file
            names, or the model that the folder describes.
        domain: the domain whose statistics to use; by default the statistics in the tensors.

    Returns:
        The model with swapped norm layers and the settings from the file.

    Raises:
        CheckpointError: if the file cannot be read or does not fit.
        ModelError: if the file names no model, or a model that only foreign code can build.
    """
    return load_ready(path, ModelRecipe(domain=domain), model=model, borrows=False).model


def load_ready(
    path: str | Path,
    recipe: ModelRecipe = ModelRecipe(),
    *,
    model: nn.Module | None = None,
    mapped: bool = False,
    lenders: Sequence[str] = (),
    borrows: bool = True,
) -> Loaded:
    """Read a checkpoint, build its model, load it strictly, and set its norm layers.

    A ``mapped`` model uses the file's memory if possible. With ``borrows``, parameters without
    statistics take them from another set in the file or from the files in ``lenders``.
    """
    key, prefer_ema = recipe.key, recipe.prefer_ema
    checkpoint = read_checkpoint(path, key=key, prefix=recipe.prefix, prefer_ema=prefer_ema)
    origin = stated_origin(checkpoint)
    notes: list[str] = []
    folder = hub_folder(path, recipe.model)
    if recipe.model is not None:
        origin = replace(origin, spec=recipe.model, arguments=dict(recipe.arguments))
    elif model is None and folder is not None:
        origin.spec, arguments, stated = described_in(folder)
        origin.arguments = {**arguments, **dict(recipe.arguments)}
        origin.preprocessing = origin.preprocessing or stated
    elif model is None:
        require_buildable(checkpoint, origin)
    if folder is not None:
        origin.labels = folder_labels(folder) or origin.labels
    if model is None:
        model = _built(origin, checkpoint, notes, mapped=mapped)
    thawed = unfreeze_(model) if recipe.unfreeze else []
    found = f"{len(thawed)} frozen layers are now BatchNorm2d" if thawed else "no frozen layer"
    notes += [f"--unfreeze: {found}"] if recipe.unfreeze else []
    shapes = stock_shapes(model)
    misfits = misfits_of(shapes, checkpoint.tensors)
    if misfits and recipe.prefix is None:
        # With the names of the model, another prefix may fit better.
        checkpoint = read_checkpoint(path, key=key, expected=set(shapes), prefer_ema=prefer_ema)
        misfits = misfits_of(shapes, checkpoint.tensors)
    if (origin.spec or "").startswith("transformers:"):
        notes.append(f"built {type(model).__name__} of transformers, as the folder describes")
        if misfits and not misfits.misshapen:
            checkpoint = _as_transformers_loads(checkpoint, model, notes)
            misfits = misfits_of(shapes, checkpoint.tensors)
    origin.place = replace(checkpoint, tensors={}, metadata=None, beside={})
    origin.folder = hub_folder(path) if checkpoint.names else None
    if borrows and _lacks_statistics(model, checkpoint, misfits):
        checkpoint = _with_statistics(checkpoint, shapes, misfits, lenders, notes)
    elif misfits:
        where = origin.spec or type(model).__name__
        raise file_error(
            path,
            f"does not fit {where}, {count(len(misfits), 'problems')}: {misfits}. "
            "Give the --model of the training run.",
        )
    _fill_(model, checkpoint)
    published = published_weights(origin.spec or "", checkpoint.sha256)
    if published is not None and published.name == "COCO_V1":
        for module in model.modules():
            if is_frozen_kind(module) or module in thawed:
                module.__dict__["eps"] = 0.0  # torchvision's value for these weights
    origin.dtypes = {name: tensor.dtype for name, tensor in checkpoint.tensors.items()}
    _apply_norms(model, checkpoint)
    model.eval()
    model.__dict__["_bnfix_origin"] = origin
    sets, more = open_domains_(model, checkpoint, recipe.domain)
    checkpoint = replace(checkpoint, notes=(*checkpoint.notes, *notes, *more))
    return Loaded(model, checkpoint, origin, sets)


def hub_folder(checkpoint: str | Path, spec: str | None = None) -> Path | None:
    """The folder that describes a checkpoint's model: the checkpoint's own, or a given one."""
    kind, _, name = (spec or "").partition(":")
    folder = Path(name) if kind == "transformers" else Path(checkpoint)
    usable = spec is None or kind == "transformers"
    try:
        return folder if usable and (folder / "config.json").is_file() else None
    except (OSError, ValueError):  # the name is not possible for a file
        return None


def _built(origin: Origin, checkpoint: Checkpoint, notes: list[str], *, mapped: bool) -> nn.Module:
    """The model that a spec names, with the library's arguments for its published weights."""
    spec = origin.spec or ""
    found = published_arguments(spec, checkpoint.sha256)
    if found is not None and "transform_input" not in origin.arguments:
        origin.arguments = {**found, **origin.arguments}
        if checkpoint.metadata is None:
            notes.append(
                "transform_input=true, as torchvision builds the model with these weights"
                if found
                else "built without transform_input; weights derived from torchvision's need "
                "--model-arg transform_input=true"
            )
    tensors = checkpoint.tensors
    skeleton = build_skeleton(spec, origin.arguments, tensors) if mapped else None
    return build_model(spec, origin.arguments, tensors) if skeleton is None else skeleton


def stock_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """The shapes of the tensors in a file for the model, by name."""
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    # A file of unfrozen layers has counters; frozen layers load and drop them.
    for site in find_norms(model):
        if site.frozen:
            shapes.setdefault(f"{site.name}.num_batches_tracked", torch.Size())
    own = weight_buffers(model)
    return {name: shape for name, shape in shapes.items() if name not in own}


def weight_buffers(model: nn.Module) -> set[str]:
    """The keys of the weights that bnfix's layers have and stock layers lack."""
    return {
        f"{name}.{weight}".removeprefix(".")  # the model itself may be a layer
        for site in find_norms(model)
        for name in (site.name, *site.aliases)
        for weight in ("example_weight", "batch_weight", "gates")
        if hasattr(site.module, "channel_groups")
    }


def _as_transformers_loads(
    checkpoint: Checkpoint, model: nn.Module, notes: list[str]
) -> Checkpoint:
    """A checkpoint with the names of transformers' files, renamed to the model's names."""
    tensors = renamed(model, checkpoint.tensors)
    if not tensors:
        return checkpoint
    n = sum(name not in tensors for name in checkpoint.tensors)
    notes.append(f"{n} names were changed as by transformers' from_pretrained")
    places = names_in_file(model, checkpoint.tensors)
    names = {name: checkpoint.names[place] for name, place in places.items()}
    return replace(checkpoint, tensors=tensors, names=names)


def _lacks_statistics(model: nn.Module, checkpoint: Checkpoint, misfits: Misfits) -> bool:
    """Whether a set has all parameters and no statistics, which is usual for averaged weights."""
    buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    has_some = any(name in checkpoint.tensors for name in buffers if name.endswith(STATISTICS))
    missing = set(misfits.missing)
    return bool(missing) and missing <= buffers and len(misfits) == len(missing) and not has_some


def _with_statistics(
    checkpoint: Checkpoint,
    shapes: Mapping[str, torch.Size],
    misfits: Misfits,
    lenders: Sequence[str],
    notes: list[str],
) -> Checkpoint:
    """Complete parameters with the statistics of another set, or refuse the checkpoint."""
    missing = [name for name in shapes if name not in checkpoint.tensors]
    places = [(checkpoint.path, key) for key in (None, *checkpoint.others)]
    for path, key in [*places, *((Path(file), None) for file in lenders)]:
        try:
            other = read_checkpoint(path, key=key, expected=frozenset(shapes))
        except CheckpointError:
            continue
        if not set(misfits.missing) <= set(other.tensors):
            continue
        tensors = {name: other.tensors[name] for name in missing if name in other.tensors}
        lender = f"{other.path.name}, {other.key or other.prefix or 'top level'}"
        notes.append(
            f"{checkpoint.key or checkpoint.path.name} has parameters and no statistics; it uses "
            f"the statistics of {plain(lender)}, which belong to other weights; commands with data "
            "measure them (--statistics population)"
        )
        return replace(checkpoint, tensors={**checkpoint.tensors, **tensors}, borrowed=True)
    raise file_error(
        checkpoint.path,
        f"has the parameters of the model, but none of its {len(missing)} buffers "
        f"({some(missing)}), nor does another set in the file. Give a file with these buffers.",
    )


def _fill_(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Load a fitting state dict; a model on the meta device takes the file's own tensors."""
    own = model.state_dict()
    empty = any(tensor.is_meta for tensor in own.values())
    state: OrderedDict[str, Tensor] = OrderedDict()
    for name, tensor in own.items():
        if name in checkpoint.tensors:
            found = checkpoint.tensors[name]
            state[name] = found.to(tensor.dtype) if empty else found
        else:  # old files lack num_batches_tracked
            state[name] = torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor
    # Some modules refuse a state dict without their version number.
    versions: Any = copy.copy(getattr(own, "_metadata", {}))
    for name, version in checkpoint.versions.items():
        if name in versions:
            versions[name] = {**versions[name], "version": version}
    state._metadata = versions  # type: ignore[attr-defined]
    problem = f"cannot be loaded into {type(model).__name__}"
    with file_errors(checkpoint.path, problem, kinds=(RuntimeError, ValueError)):
        model.load_state_dict(state, strict=True, assign=empty)


def _settings(stated: Any) -> dict[str, Any]:
    """The settings of a layer in a header, with checked types: a file may be hostile."""
    if not isinstance(stated, dict):
        raise TypeError("an entry is not an object")
    names = ("channel_groups", "ghost_size", "example_weight", "eps")
    values: list[Any] = [stated.get(name) for name in names]
    groups, size, weight, eps = values
    batch = stated.get("batch_weight", 0)
    if not all(type(n) is int and n >= 1 for n in (groups, 1 if size is None else size)):
        raise ValueError("channel_groups and ghost_size must be integers of at least 1")
    for name, stated_weight in (("example_weight", weight), ("batch_weight", batch)):
        for found in stated_weight if isinstance(stated_weight, list) else [stated_weight]:
            if type(found) not in (int, float) or not 0 <= found <= 1:
                raise ValueError(f"{name} must be a number from 0 to 1, or a list of such numbers")
    if type(eps) not in (int, float) or not 0 <= eps < 1e6:
        raise ValueError("eps must be a number of at least 0")
    gates = stated.get("gates")
    rows = [] if gates is None else gates if isinstance(gates, list) else [gates]
    if not all(isinstance(row, list) and set(map(type, row)) <= {int, float} for row in rows):
        raise ValueError("gates must be three lists of numbers")
    return stated


def _apply_norms(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Swap the layers that the header lists, and apply its settings to them."""
    norms: dict[str, Any] = (checkpoint.metadata or {}).get("norms") or {}
    if not norms:
        return
    sites = {n: site.name for site in find_norms(model) for n in (site.name, *site.aliases)}
    unknown = [plain(name) for name in norms if name not in sites]
    if unknown:
        found = f"its header sets norm layers that the model lacks: {some(unknown)}"
        raise file_error(checkpoint.path, f"{found}.")
    problem = "the norm settings in its header cannot be used"
    wrong = (BnfixError, TypeError, ValueError, OverflowError, RuntimeError)
    with file_errors(checkpoint.path, problem, kinds=wrong):
        settings = {sites[name]: _settings(value) for name, value in norms.items()}
        plan = plan_swap(model, SwapRecipe(layers=tuple(escape(name) for name in settings)))
        changes = [
            replace(
                change,
                channel_groups=settings[change.name]["channel_groups"],
                ghost_size=settings[change.name].get("ghost_size"),
                example_weight=0.0,  # set after the swap, since it changes outputs on purpose
                gated=settings[change.name].get("gates") is not None,
            )
            for change in plan.changes
        ]
        swap_planned_(model, replace(plan, changes=tuple(changes)))
        for name, stated in settings.items():
            layer = model.get_submodule(name)
            layer.__dict__["eps"] = float(stated["eps"])
            if stated.get("gates") is not None:
                set_gates_(layer, stated["gates"])
            set_example_weight_(
                layer,
                stated["example_weight"],
                batch_weight=stated.get("batch_weight", 0.0),
                batch_estimator=stated.get("batch_estimator", "mean"),
            )
