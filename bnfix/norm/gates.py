"""Gates of Representative Batch Norm: an example's own mean centres it and scales its output.

For example i, per channel, with m_i the mean of x over its positions and (c, s, b) the channel's
gates, mean and var the moments of x', of the batch in training and as stored in evaluation:

    x' = x + c m_i
    z  = (x' - mean) / sqrt(var + eps)
    y  = gamma g_i z + beta,  g_i = sigmoid(s t_i + b) / sigmoid(b),  t_i the mean of z

Source: Gao et al., "Representative batch normalization with feature calibration", CVPR 2021.
Differs: their gamma times sigmoid(b) is gamma here. So c = s = 0 changes nothing at any b, and the
decay of gamma means the same with gates and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import masks
from bnfix.core.errors import NormError
from bnfix.norm import kernels
from bnfix.norm.mixture import masked_runs, mixed
from bnfix.norm.moments import example_moments, masked_moments, over_runs, shares


def closed(layer: Any, bias: float = 1.0) -> nn.Parameter:
    """Gates ``(3, C)`` that change nothing: centring 0, scaling 0, a bias."""
    like = layer.example_weight
    rows = torch.tensor([[0.0], [0.0], [bias]], device=like.device)
    return nn.Parameter(rows.repeat(1, layer.num_features))


def set_gates_(layer: Any, rows: Sequence[Sequence[float]]) -> None:
    """Give a layer that has gates other ones."""
    given = torch.tensor(rows)
    if given.shape != layer.gates.shape or not bool(given.isfinite().all()):
        raise NormError(
            f"gates: shape {tuple(given.shape)}, expected finite numbers of shape "
            f"{tuple(layer.gates.shape)}."
        )
    with torch.no_grad():
        layer.gates.copy_(given)


def are_open(layer: Any) -> bool:
    """Whether a layer has gates that look at the example."""
    own = layer.gates
    return own is not None and own.device.type != "meta" and bool((own[:2] != 0).any())


def centred(layer: Any, mean: Tensor) -> Tensor:
    """Means ``(N, C)`` of the examples as a layer's statistics meet them."""
    own = getattr(layer, "gates", None)
    return mean if own is None else mean + own[0].detach().to(mean) * mean


def gated(layer: Any, input: Tensor, *, by_batch: bool) -> Tensor:
    """Normalize by the formula above; channel groups, ghosts, weights and a mask as without."""
    values, terms = kernels.values_of(input), layer._terms()
    valid, count = masks.current_mask() if masks.mask_is_set else None, None
    if valid is None:
        mean, var, around = example_moments(values)
    else:
        fitted = valid.fitted(input)
        mean, var, count = masked_moments(values, fitted)
        around = values - mean.unsqueeze(-1)
    centring, scaling, bias = layer.gates.to(values.dtype)
    moved = mean + centring * mean
    if by_batch:
        n_runs, n_values = (
            layer._runs_of(input)
            if count is None
            else (masked_runs(layer, input, fitted), int(count.sum()))
        )
        share = None if count is None else shares(count).to(mean.dtype)
        layer._update_running(moved, var, n_values, share)
        mu, var = over_runs(
            moved, var, n_runs, layer.channel_groups, exclusive=layer.exclusive, count=count
        )
    else:
        terms = terms.alone() if layer.uses_batch and len(input) == 1 else terms
        mu, var = mixed(moved, var, terms.cast(values.dtype), count)
    z = (moved - mu) * torch.rsqrt(var + layer.eps)
    # Of the logarithms, since sigmoid(b) may be 0 to rounding.
    gate = (F.softplus(-bias) - F.softplus(-(scaling * z + bias))).exp()
    gamma = gate if layer.weight is None else gate * layer.weight
    output = kernels.affine(around, moved - mu, var, gamma, layer.bias, layer.eps)
    return output.view(input.shape).to(input.dtype)
