"""Columns: every (example, channel) of an input with channels last; as `rows` for the others."""

from __future__ import annotations

import math

import torch
from torch import Tensor

#: Values of an example from which one call an example beats whole-batch sums.
_LARGE_EXAMPLE = 1 << 17
#: Positions whose sum torch forms in one running float32.
_RUN = 1 << 11
#: Channels up to which positions are folded into them.
_WIDE = 1 << 10


def moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Moments of columns from sums and sums of squares, without gradients."""
    n, positions, channels = values.shape
    if positions * channels < _LARGE_EXAMPLE:
        mean = values.mean(1)
        return mean, (values * values).mean(1).addcmul_(mean, mean, value=-1)
    # A running float32 sum would lose about sqrt(positions) roundings of its own size, so some
    # positions are taken as channels of their own, and what is left goes by runs.
    folds = math.gcd(positions, 1 << (max(1, _WIDE // channels).bit_length() - 1))
    folded = values.view(n, positions // folds, folds * channels)
    at, by = values.new_zeros(folds * channels), values.new_ones(folds * channels)
    # Stock evaluation's backward sums g and g (x - at) / by in one reading, and g may be x.
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            run, run, None, at, by, None, None, False, 0.0, [False, True, True]
        )[1:]
        for example in folded
        for run in torch.split(example, _RUN)
    ]
    squares, totals = (torch.stack(kind).view(n, -1, channels) for kind in zip(*sums, strict=True))
    mean = totals.sum(1).mul_(1 / positions)
    return mean, squares.sum(1).mul_(1 / positions).addcmul_(mean, mean, value=-1)


def scale(
    values: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, into: Tensor
) -> None:
    """Scale and shift columns, without gradients.

    Changes:
        ``into``.
    """
    slope = torch.rsqrt(var)
    if gamma is not None:
        slope *= gamma
    offset = torch.mul(mu, slope)
    offset = offset.neg_() if beta is None else torch.sub(beta, offset)
    slope, offset = slope.unsqueeze(1), offset.unsqueeze(1)
    if into.dtype == values.dtype:
        torch.addcmul(offset, values, slope, out=into)
    else:
        into.copy_(torch.addcmul(offset, values, slope))
