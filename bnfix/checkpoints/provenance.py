"""The origin of a model: its record, which travels with it, and the one in a file's header."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnfix.checkpoints.checkpoint import Checkpoint
from bnfix.core.errors import file_error, file_errors, model_error, plain, some
from bnfix.core.settings import Preprocessing
from bnfix.models.build import from_file_allowed


@dataclass
class Origin:
    """Where a model came from; travels with it as an attribute, so that saving knows."""

    spec: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)  # of the builder
    preprocessing: Preprocessing | None = None
    history: list[dict[str, Any]] = field(default_factory=list)  # one entry a command
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of the file's tensors


def origin_of(model: nn.Module) -> Origin:
    """Where a model came from; an empty origin for one that bnfix did not load."""
    found = model.__dict__.get("_bnfix_origin")
    return found if isinstance(found, Origin) else Origin()


def stated_origin(checkpoint: Checkpoint) -> Origin:
    """The origin in a header, its types checked: files are hostile until proven otherwise."""
    metadata = checkpoint.metadata or {}
    model: Any = metadata.get("model") or {}
    is_object = isinstance(model, dict)
    spec: Any = model.get("spec") if is_object else None
    arguments: Any = (model.get("arguments") or {}) if is_object else {}
    preprocessing, history = metadata.get("preprocessing"), metadata.get("history") or []
    fits = {
        "model": is_object and isinstance(spec, str | None) and isinstance(arguments, dict),
        "preprocessing": isinstance(preprocessing, dict | None),
        "norms": isinstance(metadata.get("norms"), dict | None),
        "history": isinstance(history, list) and all(isinstance(e, dict) for e in history),
    }
    wrong = [name for name, fit in fits.items() if not fit]
    if wrong:
        raise file_error(
            checkpoint.path,
            f"its bnfix header holds values of the wrong type under {some(wrong)}. It was not "
            "written by bnfix; fetch the file again.",
        )
    known = None if preprocessing is None else _preprocessing(preprocessing, checkpoint)
    return Origin(spec, arguments, known, history)


def _preprocessing(found: dict[str, Any], checkpoint: Checkpoint) -> Preprocessing:
    known = {name: found[name] for name in Preprocessing.__dataclass_fields__ if name in found}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    problem = "the preprocessing in its header cannot be used"
    with file_errors(checkpoint.path, problem, kinds=(TypeError, ValueError, OverflowError)):
        return Preprocessing(**values)


def require_buildable(checkpoint: Checkpoint, origin: Origin) -> None:
    """Refuse a file that names no model, or one that only somebody's code could build."""
    name = checkpoint.path.name
    if origin.spec is None:
        raise model_error(
            name,
            "does not say what model it is. Give --model, for example torchvision:resnet50, "
            "package.module:callable or path/to/file.py:callable.",
        )
    if not from_file_allowed(origin.spec):
        raise model_error(
            name,
            f"names the model {plain(origin.spec)!r}, and code that a file names is not run. If "
            f"you trust it, give --model {shlex.quote(plain(origin.spec))}",
        )
