"""A ready model to a file: stock tensors, and in the header its settings and its history."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import Checkpoint, write_checkpoint
from bnfix.checkpoints.load import weight_buffers
from bnfix.checkpoints.provenance import origin_of
from bnfix.checkpoints.read import FORMAT
from bnfix.checkpoints.state_dict import STATISTICS
from bnfix.core import __version__
from bnfix.core.settings import Preprocessing
from bnfix.norm.layer import generalized_norms

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HALF_LOSS = 1e-3


def save(
    model: nn.Module,
    path: str | Path,
    *,
    force: bool = False,
    entry: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write a model as one ``.safetensors`` whose tensors are exactly the stock state dict.

    Plain PyTorch loads it with ``strict=True`` and gets the same model with example weight 0; what
    bnfix knows besides (settings of the norm layers, history) is in the header.

    Args:
        model: with or without generalized layers.
        path: ends in ``.safetensors``.
        force: replace an existing file.
        entry: added to the history.
        preprocessing: stored for later commands; by default what the model came with.

    Raises:
        CheckpointError: if the file may not be written; nothing is then left behind.
    """
    metadata = metadata_of(model, entry=entry, preprocessing=preprocessing)
    write_checkpoint(path, stock_tensors(model), metadata, force=force)


def metadata_of(
    model: nn.Module,
    *,
    entry: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> dict[str, Any]:
    """The header of a model's file: settings of the norm layers, and where the model came from."""
    origin = origin_of(model)
    known = preprocessing or origin.preprocessing
    norms = {}
    for name, layer in generalized_norms(model):
        weight = layer.example_weight
        equal = weight.ndim == 0 or bool((weight == weight[0]).all())
        norms[name] = {
            "channel_groups": layer.channel_groups,
            "ghost_size": layer.ghost_size,
            "example_weight": float(weight.flatten()[0]) if equal else weight.tolist(),
            "eps": layer.eps,
        }
    return {
        "format": FORMAT,
        "bnfix": __version__,
        "model": {"spec": origin.spec, "arguments": origin.arguments},
        "preprocessing": None if known is None else asdict(known),
        "norms": norms,
        "history": [*origin.history, *([] if entry is None else [dict(entry)])],
    }


def stock_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without bnfix's own buffers, in the types of the file it came from.

    Statistics that would lose more than 1e-3 in the file's half type (of their deviation, or of
    themselves) are float32.
    """
    dtypes, own = origin_of(model).dtypes, weight_buffers(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    tensors = {}
    for name, tensor in state.items():
        dtype = dtypes.get(name, tensor.dtype)
        if dtype in _HALF and name.endswith(STATISTICS):
            spread = state.get(name.removesuffix("mean").removesuffix("var") + "var", tensor)
            if _loss(tensor, dtype, spread, is_mean=name.endswith("mean")) > _LARGEST_HALF_LOSS:
                dtype = torch.float32
        same_kind = tensor.is_floating_point() == dtype.is_floating_point
        tensors[name] = tensor.detach().cpu().to(dtype if same_kind else tensor.dtype)
    return tensors


@torch.no_grad()
def round_as_stored_(model: nn.Module) -> None:
    """Round every tensor as `save` would, so that the model is measured as the file holds it."""
    own = model.state_dict(keep_vars=True)
    for name, stored in stock_tensors(model).items():
        if stored.dtype != own[name].dtype:
            own[name].copy_(stored)


def history_entry(
    command: str,
    *,
    options: Mapping[str, Any],
    seed: int,
    checkpoint: Checkpoint | None,
    data: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    command_line: str = "",
) -> dict[str, Any]:
    """One entry of an output's history, JSON values; the command line is as typed, or empty."""
    origin = checkpoint and {"file": checkpoint.path.name, "sha256": checkpoint.sha256}
    return {
        "command": command,
        "command_line": command_line,
        "options": dict(options),
        "seed": seed,
        "input": origin,
        "data": None if data is None else dict(data),
        "versions": versions(),
        "results": dict(results or {}),
    }


def versions() -> dict[str, str]:
    """The versions that numbers depend on."""
    python = platform.python_version()
    return {"bnfix": __version__, "python": python, "torch": torch.__version__}


# The largest error of rounding statistics, in deviations for a mean, relative for a variance.
def _loss(tensor: Tensor, dtype: torch.dtype, var: Tensor, *, is_mean: bool) -> float:
    stored = tensor.to(dtype).double()
    error = torch.where(stored.isnan() & tensor.isnan(), 0.0, (stored - tensor.double()).abs())
    scale = (var.double().clamp_min(0) + 1e-5).sqrt() if is_mean else var.double() + 1e-5
    return float((error / scale).nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0
