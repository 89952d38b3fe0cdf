"""The weights of a layer's mixture of moments: which of them there can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from bnfix.core.errors import BnfixError, ConfigError, NormError

Weight = float | Sequence[float] | Tensor


def weight_errors(
    given: Mapping[str, Tensor | None],
    both: tuple[Tensor, Tensor | None],
    channels: int,
    *,
    tracks: bool,
) -> list[BnfixError]:
    """All that speaks against weights, by name, and against the two that a layer then has."""
    found = [_error(name, w, channels, tracks) for name, w in given.items() if w is not None]
    errors = [error for error in found if error is not None]
    a, b = both
    if errors or b is None or a.device.type == "meta" or b.device.type == "meta":
        return errors
    # Two weights, each rounded, may add up to a little more than 1.
    room = 2 * max(torch.finfo(w.dtype).eps for w in (a, b))
    if bool((a + b.to(a.device) > 1 + room).any()):
        words = "more than 1 together with example_weight. Give weights whose sum is at most 1"
        errors.append(ConfigError(f"batch_weight: {words} in every channel.", name="batch_weight"))
    return errors


def _error(name: str, value: Tensor, channels: int, tracks: bool) -> BnfixError | None:
    """What speaks against one weight by itself."""
    if value.shape not in ((), (channels,)):
        return ConfigError(
            f"{name}: shape {tuple(value.shape)}, expected one number or {channels} (one a "
            "channel).",
            name=name,
        )
    if value.device.type == "meta":
        return None
    if not bool(((value >= 0) & (value <= 1)).all()):
        return ConfigError(f"{name}: a value outside 0 to 1. Give weights from 0 to 1.", name=name)
    # The example's moments alone need no others; the batch's are used without a weight.
    alone = value == (0 if name == "batch_weight" else value.flatten()[0].round())
    if tracks or bool(alone.all()):
        return None
    source, use = name.removesuffix("_weight"), "0" if name == "batch_weight" else "0 or 1"
    return NormError(
        f"{name}: the layer keeps no running statistics to mix the {source}'s with. Use {use}, or "
        "track_running_stats=True.",
        name=name,
    )
