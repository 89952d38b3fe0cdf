"""Statistics of several domains in one file: named sets in its header, beside those of its tensors.

The tensors are the stock model's, with statistics of their own. A second file could be lost, and
further tensors would be keys that no stock model has. So each set has, under its name, for every
norm layer all means, then all variances as base64 of little-endian float32 (or float64).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import STATISTICS, Checkpoint
from bnfix.core.errors import ConfigError, file_error, plain, some
from bnfix.norm.sites import NormSite, find_norms

#: Mean and variance ``(2, C)`` of each norm layer, by domain.
Sets = dict[str, dict[str, Tensor]]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")


def statistics_in(model: nn.Module) -> dict[str, Tensor]:
    """Copies of every layer's mean and variance, as one set."""
    return {site.name: torch.stack(_moments(site)).detach().cpu() for site in _sites(model)}


def set_statistics_(model: nn.Module, found: Mapping[str, Tensor]) -> None:
    """Give every layer of a set its mean and variance."""
    for site in _sites(model):
        for kind, own, moment in zip(STATISTICS, _moments(site), found[site.name], strict=True):
            # Not in place: a model may hold the memory of its file.
            site.module._buffers[kind] = moment.to(own, copy=True)


def as_header(sets: Sets) -> dict[str, Any]:
    """The sets as JSON values."""
    return {n: {k: _text(pair) for k, pair in layers.items()} for n, layers in sets.items()}


def read_domains(model: nn.Module, checkpoint: Checkpoint) -> Sets:
    """The sets in a file's header, all of them checked; all problems at once."""
    stored: Any = (checkpoint.metadata or {}).get("domains") or {}
    sites, problems, sets = _sites(model), list[str](), Sets()
    if not isinstance(stored, dict):
        stored, problems = {}, ["they are no object"]
    for name, layers in stored.items():
        if not _NAME.fullmatch(name) or not isinstance(layers, dict):
            problems.append(f"{plain(name)}: no name of a domain, or no object")
            continue
        extra = layers.keys() - {site.name for site in sites}
        problems += [f"{name}: {plain(layer)}: the model has no such layer" for layer in extra]
        sizes = {site.name: _moments(site)[0].numel() for site in sites}
        found = {layer: _pair(layers.get(layer), n) for layer, n in sizes.items()}
        bad = [layer for layer, pair in found.items() if pair is None]
        problems += [f"{name}: {layer}: no finite means, and variances from 0" for layer in bad]
        sets[name] = {layer: pair for layer, pair in found.items() if pair is not None}
    if problems:
        words = f"the statistics of its domains cannot be used: {some(problems)}. Fetch it again."
        raise file_error(checkpoint.path, words)
    return sets


def begin_domain_(model: nn.Module, sets: Sets, name: str) -> list[str]:
    """Start from a domain's statistics, if the file has them, before new ones are found."""
    if not _NAME.fullmatch(name) or name == "auto":
        expected = "up to 64 letters, digits and _.-, not auto. Give another"
        raise ConfigError(f"--domain: {plain(name)!r}, expected {expected}.", name="domain")
    if name in sets:
        set_statistics_(model, sets[name])
    known = "its statistics in the file were" if name in sets else "the file's own were"
    other = "the statistics of its tensors, and of other domains, are as they were."
    return [f"domain {name}: {known} the start. The output has the result under this name; {other}"]


def end_domain_(model: nn.Module, sets: Sets, name: str, tensors: Mapping[str, Tensor]) -> Sets:
    """The sets with the model's statistics under a name; it gets those of its file's tensors."""
    own = statistics_in(model)
    keys = {layer: [f"{layer}.{kind}".removeprefix(".") for kind in STATISTICS] for layer in own}
    set_statistics_(model, {n: torch.stack([tensors[k] for k in ks]) for n, ks in keys.items()})
    return {**sets, name: own}


def domain_of(sets: Sets, name: str, path: Path) -> dict[str, Tensor]:
    """One set by name; others are refused."""
    if name not in sets:
        known = some(sorted(sets)) or "none"
        raise file_error(path, f"has no domain {plain(name)!r}, expected one of: {known}.")
    return sets[name]


def _sites(model: nn.Module) -> list[NormSite]:
    return [site for site in find_norms(model) if site.has_statistics]


def _moments(site: NormSite) -> list[Tensor]:
    return [site.module.get_buffer(kind) for kind in STATISTICS]


def _text(pair: Tensor) -> str:
    kind = "<f8" if pair.dtype == torch.float64 else "<f4"
    return base64.b64encode(pair.numpy().astype(kind).tobytes()).decode()


def _pair(text: Any, n: int) -> Tensor | None:
    """So many finite means, and variances from 0, or none; other lengths are not decoded."""
    kinds = {4 * -(-size // 3): kind for kind, size in (("<f8", 16 * n), ("<f4", 8 * n))}
    if not isinstance(text, str) or len(text) not in kinds:
        return None
    kind = kinds[len(text)]
    try:  # a byte more or less is no whole number
        content = np.frombuffer(base64.b64decode(text, validate=True), kind)
    except ValueError:
        return None
    found = torch.from_numpy(content.astype(kind[1:])).view(2, n)
    return found if bool(found.isfinite().all() and (found[1] >= 0).all()) else None
