"""Moments and their mixture: the algebra that every statistic in bnfix is made of.

A part k has moments (mean_k, var_k), `var` biased (divided by n). Parts with weights w_k >= 0,
sum w_k = 1, mix by the law of total variance:

    mean = sum_k w_k mean_k
    var  = sum_k w_k var_k + sum_k w_k (mean_k - mean)^2

This form never goes negative and never subtracts two large numbers. The raw form E[x^2] - E[x]^2
does: in float32 at mean 3000 and variance 1 it gives 0.0 where 1.04 is right. Fast paths (rows,
columns, accumulating) use it only with a check of the digits left, and fall back to this form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


def mix(
    mean: Tensor, var: Tensor, weight: Tensor | None = None, dim: int | tuple[int, ...] = 0
) -> tuple[Tensor, Tensor]:
    """Mix the moments of parts that lie along ``dim`` into the moments of the whole.

    ``mean = sum w_k mean_k``, ``var = sum w_k (var_k + (mean_k - mean)^2)``. The mean is summed as
    differences from the first part, so parts far from 0 and close to each other lose nothing.

    Example:
        >>> m, v = mix(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        >>> m.item(), v.item()
        (1.0, 2.0)

    Source:
        The law of total variance; in pairs it is Chan, Golub, LeVeque (1979).
    """
    dims = (dim,) if isinstance(dim, int) else dim
    first = mean
    for axis in dims:
        first = first.narrow(axis, 0, 1)
    shift = mean - first
    if weight is None:
        mixed_shift = shift.mean(dims, keepdim=True)
        mixed_var = (var + (shift - mixed_shift).square()).mean(dims)
    else:
        mixed_shift = (weight * shift).sum(dims, keepdim=True)
        mixed_var = (weight * (var + (shift - mixed_shift).square())).sum(dims)
    mixed_mean = first + mixed_shift
    for axis in sorted((axis % mean.ndim for axis in dims), reverse=True):
        mixed_mean = mixed_mean.squeeze(axis)
    return mixed_mean, mixed_var


def example_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Moments of every (example, channel), and the values centred by them."""
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    return mean, (centred * centred).mean(-1), centred


def over_channel_groups(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mix moments ``(..., C)`` within each channel group; every channel gets its group's."""
    size = mean.shape[-1] // groups
    if size == 1:
        return mean, var
    shape = (*mean.shape[:-1], groups, size)
    mean, var = mix(mean.view(shape), var.view(shape), dim=-1)
    return mean.repeat_interleave(size, -1), var.repeat_interleave(size, -1)


@dataclass(frozen=True)
class Moments:
    """Count, mean and biased variance of some values, per channel.

    Args:
        count: number of values behind each mean, a scalar or shaped like ``mean``.
        mean: any shape.
        var: biased, shaped like ``mean``.
    """

    count: Tensor
    mean: Tensor
    var: Tensor


def pool(parts: Sequence[Moments]) -> Moments:
    """Pool parts by their counts, in float64: batches, calls or ranks into a population.

    Source:
        Chan, Golub, LeVeque (1979), for any number of parts at once.
    """
    count = torch.stack([part.count.double() for part in parts])
    mean = torch.stack([part.mean.double() for part in parts])
    var = torch.stack([part.var.double() for part in parts])
    aligned = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    # An empty part's moments may be anything, NaN too, and must not spread through 0 * NaN.
    mean, var = torch.where(aligned > 0, mean, 0.0), torch.where(aligned > 0, var, 0.0)
    total = count.sum(0)
    weight = aligned / aligned.sum(0).clamp_min(1.0)
    return Moments(total, *mix(mean, var, weight, dim=0))
