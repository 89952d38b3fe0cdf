"""Where a model came from: what travels with it, and what a file says of it."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bnfix.building.models import from_file_allowed
from bnfix.checkpoints.checkpoint import Checkpoint
from bnfix.errors import BnfixError, CheckpointError, ModelError, plain, some
from bnfix.preprocessing import Preprocessing


@dataclass
class Origin:
    """Where a model came from; travels with it as an attribute, so that saving knows.

    Args:
        spec: the model specification, if it was built from one.
        arguments: of the builder.
        preprocessing: what its inputs go through, if known.
        history: one entry a command.
        dtypes: the file's type of each tensor.
    """

    spec: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    preprocessing: Preprocessing | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)


def origin_of(model: nn.Module) -> Origin:
    """Where a model came from."""
    found = model.__dict__.get("_bnfix_origin")
    return found if isinstance(found, Origin) else Origin()


def stated_origin(checkpoint: Checkpoint) -> Origin:
    """Read what a header says, its types checked: files are hostile until proven otherwise."""
    metadata = checkpoint.metadata
    if metadata is None:
        return Origin()
    model: Any = metadata.get("model") or {}
    spec: Any = model.get("spec") if isinstance(model, dict) else model
    arguments: Any = (model.get("arguments") or {}) if isinstance(model, dict) else model
    preprocessing, history = metadata.get("preprocessing"), metadata.get("history") or []
    wrong = [
        name
        for name, fits in (
            ("model", all(isinstance(v, t) for v, t in ((spec, str | None), (arguments, dict)))),
            ("preprocessing", isinstance(preprocessing, dict | None)),
            ("norms", isinstance(metadata.get("norms"), dict | None)),
            ("history", isinstance(history, list) and all(isinstance(e, dict) for e in history)),
        )
        if not fits
    ]
    if wrong:
        raise CheckpointError(
            f"{checkpoint.path.name}: its bnfix header holds values of the wrong type under "
            f"{some(wrong)}. It was not written by bnfix; fetch the file again.",
            path=checkpoint.path,
        )
    return Origin(
        spec,
        arguments,
        None if preprocessing is None else _preprocessing(preprocessing, checkpoint),
        history,
    )


def _preprocessing(found: dict[str, Any], checkpoint: Checkpoint) -> Preprocessing:
    known = {name: found[name] for name in Preprocessing.__dataclass_fields__ if name in found}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in known.items()}
    try:
        return Preprocessing(**values)
    except (BnfixError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(
            f"{checkpoint.path.name}: the preprocessing in its header cannot be used: "
            f"{plain(error)}",
            path=checkpoint.path,
        ) from error


def require_buildable(checkpoint: Checkpoint, origin: Origin) -> None:
    """Check that a file names a model that may be built from what a file says."""
    name = checkpoint.path.name
    if origin.spec is None:
        raise ModelError(
            f"{name}: does not say what model it is. Give --model, for example "
            "torchvision:resnet50, package.module:callable or path/to/file.py:callable.",
            path=checkpoint.path,
        )
    if not from_file_allowed(origin.spec):
        raise ModelError(
            f"{name}: names the model {plain(origin.spec)!r}, and code that a file names is "
            f"not run. If you trust it, give --model {shlex.quote(plain(origin.spec))}",
            path=checkpoint.path,
        )
