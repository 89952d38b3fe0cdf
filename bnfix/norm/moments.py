"""Moments: the rule that mixes them, used for every statistic in bnfix, and fast kernels for them.

Part k has moments (mean_k, var_k); `var` is biased (divided by n). Parts with weights w_k >= 0,
sum w_k = 1, mix by the law of total variance:

    mean = sum_k w_k mean_k
    var  = sum_k w_k var_k + sum_k w_k (mean_k - mean)^2

This form is never negative and never subtracts two large numbers. The raw form E[x^2] - E[x]^2
does: in float32 at mean 3000 and variance 1 it gives 0.0, where 1.04 is correct. Fast paths (rows,
columns, accumulators) use it only with a check of the remaining digits, and fall back to this form.

Rows are the (example, channel) pairs of a contiguous input; the operations on them are fast on the
CPU. Scaling treats every row as a channel of one example, so torch's evaluation kernel can do it.
With gradients, moments and scaling are one autograd node each. Both save the input, as the stock
layer does. With g the gradient of the output y:

    mean, var:  dx = (g_mean + 2 g_var (x - mean)) / L
    y = gamma (x - mu) r + beta, r = 1 / sqrt(var):  with G = sum g and H = r sum g (x - mu)
                dx = gamma r g,  dmu = -gamma r G,  dvar = -gamma r^2 H / 2,  dgamma = H,  dbeta = G

Columns: the same operations for channels-last inputs, without gradients.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

#: Where mean^2 exceeds this multiple of the divisor, moments lose about 4 bits.
LOST = 16.0
#: Most squares that torch can add in one running float32 sum; a large map would lose digits.
_RUN = 1 << 14
#: Values per example above which one call per example is faster than sums over the whole batch.
_LARGE_EXAMPLE = 1 << 17
#: Most positions of a column that torch can add in one running float32 sum.
_COLUMN_RUN = 1 << 11
#: Positions are folded into the channels up to this number of channels.
_WIDE = 1 << 10


def mix(
    mean: Tensor, var: Tensor, weight: Tensor | None = None, dim: int | tuple[int, ...] = 0
) -> tuple[Tensor, Tensor]:
    """Mix the moments of the parts along ``dim`` into the moments of the whole.

    ``mean = sum w_k mean_k``, ``var = sum w_k (var_k + (mean_k - mean)^2)``. The sum is of
    differences from the first part. Parts far from 0 but close together therefore lose no digits.

    Example:
        >>> m, v = mix(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 1.0]))
        >>> m.item(), v.item()
        (1.0, 2.0)

    Source:
        The law of total variance; for two parts it is Chan, Golub, LeVeque (1979).
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


def median_mix(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled moments of examples ``(N, C)``; fewer than half of the examples may be garbage.

    ``mean = median mean_i``, ``var = median var_i + (1.4826 median |mean_i - mean|)^2``: medians
    replace both parts of the law of total variance. NaN counts as large. With the factor 1.4826
    the median distance of normal means estimates their standard deviation.

    Source:
        Differs from MedBN (Park et al., CVPR 2024), which uses the median of all values and the
        mean square about it: a single wild example can make that variance arbitrarily large.
    """
    centre = _median(mean)
    return centre, _median(var) + (1.4826 * _median((mean - centre).abs())).square()


def median_mix_of_few(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """`median_mix` on the CPU, without gradients: numpy is many times faster for short rows."""
    n, channels = mean.shape
    if n < 3:  # a median of two is their mean, and both are equally far from it
        middle = mean.mean(0)
        distance = mean[0] - middle
        return middle, torch.addcmul(var.mean(0), distance, distance, value=1.4826**2)
    low, high = (n - 1) // 2, n // 2
    with np.errstate(all="ignore"):  # torch does not warn of non-finite values either
        rows = np.sort(np.concatenate((mean.numpy(), var.numpy()), 1).T.copy(), axis=1)
        centre = (rows[:, low] + rows[:, high]) / 2
        away = np.sort(np.abs(rows[:channels] - centre[:channels, None]), axis=1)
        spread = (away[:, low] + away[:, high]) * (1.4826 / 2)
        centre[channels:] += spread * spread
    return torch.from_numpy(centre[:channels]), torch.from_numpy(centre[channels:])


def _median(values: Tensor) -> Tensor:
    """The median along the first axis; unlike torch's, it averages the middle two values."""
    ordered, n = values.sort(0).values, values.shape[0]
    return (ordered[(n - 1) // 2] + ordered[n // 2]) / 2


def gaps(stored: tuple[Tensor, Tensor], met: tuple[Tensor, Tensor], eps: float) -> Tensor:
    """Mean gap and sd gap ``(2,)`` between stored moments ``(C,)`` and a batch's moments.

    ``mean_c |mean_stored - mean_b| / sd_b`` and ``mean_c |sd_stored / sd_b - 1|``, where
    ``sd = sqrt(var + eps)``.
    """
    sd = (met[1] + eps).sqrt()
    mean_gap = (stored[0] - met[0]).abs() / sd
    sd_gap = ((stored[1].clamp_min(0) + eps).sqrt() / sd - 1).abs()
    return torch.stack((mean_gap.mean(), sd_gap.mean()))


def others(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """For each example ``(..., N, C)``, the moments of the N - 1 others: exclusive statistics.

    With d_i = mean_i minus the mean of all: ``mean_-i = mean - d_i / (N-1)`` and ``var_-i =
    (sum_j (var_j + d_j^2) - var_i - d_i^2) / (N-1) - (d_i / (N-1))^2``. Their gradient with
    respect to the values of example i is 0.

    Source:
        Kosson et al., "Ghost noise for regularizing deep neural networks", AAAI 2024. Differs: it
        uses central moments.
    """
    n = mean.shape[-2]
    centre = mean.mean(-2, keepdim=True)
    own = mean - centre
    squares = var + own.square()
    shift = own / (n - 1)
    left = (squares.sum(-2, keepdim=True) - squares) / (n - 1)
    return centre - shift, (left - shift.square()).clamp_min(0)


def example_moments(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance of every (example, channel), and the values minus that mean."""
    mean = values.mean(-1)
    centred = values - mean.unsqueeze(-1)
    return mean, (centred * centred).mean(-1), centred


def masked_moments(values: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance ``(N, C)`` of ``(N, C, L)`` where ``(N, L)`` is true, and counts ``(N,)``.

    ``mean_i = sum_t v_it x_it / L_i``, ``var_i = sum_t v_it (x_it - mean_i)^2 / L_i``,
    ``L_i = sum_t v_it``. Padding can hold anything, including NaN, and gets no gradient.
    """
    where, count = valid.unsqueeze(1), valid.sum(-1)
    size = count.to(values.dtype).unsqueeze(-1)
    mean = torch.where(where, values, 0).sum(-1) / size
    # Masked before the square: the gradient of NaN squared is NaN, even multiplied by 0.
    centred = torch.where(where, values - mean.unsqueeze(-1), 0)
    return mean, centred.square().sum(-1) / size, count


def shares(count: Tensor) -> Tensor:
    """Weights ``(N, 1)`` of parts in proportion to their counts ``(N,)``, in float64."""
    weight = count.double().unsqueeze(-1)
    return weight / weight.sum()


def over_runs(
    mean: Tensor,
    var: Tensor,
    n_runs: int,
    groups: int,
    *,
    exclusive: bool = False,
    count: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mix moments ``(N, C)`` within runs of examples and channel groups, for every example.

    ``count`` weights the examples. With ``exclusive`` an example gets the moments of the others.
    """
    n, channels = mean.shape
    base, longer = divmod(n, n_runs)
    middle = longer * (base + 1)
    parts = []
    # Run lengths differ by at most 1 and longer runs come first: one tensor per length.
    for part, length in ((slice(middle), base + 1), (slice(middle, n), base)):
        if len(mean[part]):
            shape, share = (-1, length, channels), None
            if count is not None:
                share = count[part].view(-1, length, 1).to(mean.dtype)
                share = share / share.sum(1, keepdim=True)
            run = mean[part].view(shape), var[part].view(shape)
            mixed = others(*run) if exclusive else mix(*run, share, dim=1)
            pooled = over_channel_groups(*mixed, groups)
            rows = (t.reshape(-1, channels) for t in pooled)
            parts.append([t.repeat_interleave(1 if exclusive else length, 0) for t in rows])
    run_mean, run_var = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return run_mean, run_var


def over_channel_groups(mean: Tensor, var: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Mix moments ``(..., C)`` within each channel group and repeat them over its channels."""
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
        count: number of values in each mean, a scalar or shaped like ``mean``.
        mean: any shape.
        var: biased, shaped like ``mean``.
    """

    count: Tensor
    mean: Tensor
    var: Tensor


def pool(parts: Sequence[Moments]) -> Moments:
    """Pool parts (batches, calls or ranks) in proportion to their counts, in float64.

    Source:
        Chan, Golub, LeVeque (1979), extended to any number of parts.
    """
    count = torch.stack([part.count.double() for part in parts])
    mean = torch.stack([part.mean.double() for part in parts])
    var = torch.stack([part.var.double() for part in parts])
    aligned = count.reshape(count.shape + (1,) * (mean.ndim - count.ndim))
    # An empty part's moments can be NaN, and must not spread through 0 * NaN.
    mean, var = torch.where(aligned > 0, mean, 0.0), torch.where(aligned > 0, var, 0.0)
    total = count.sum(0)
    weight = aligned / aligned.sum(0).clamp_min(1.0)
    return Moments(total, *mix(mean, var, weight, dim=0))


def row_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)`` of rows ``(N, C, L)``; see `keep_their_digits`."""
    mean = values.mean(-1)
    return mean, mean_squares(values, values.dtype).addcmul_(mean, mean, value=-1)


def mean_squares(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Means of squares ``(N, C)`` of contiguous rows ``(N, C, L)``, without gradients."""
    n = values.shape[-1]
    if n <= _RUN:
        norm: Tensor = torch.linalg.vector_norm(values, dim=-1)
        return norm.to(dtype).mul_(n**-0.5).square_()
    whole = n - n % _RUN
    runs = values[..., :whole].view(*values.shape[:2], -1, _RUN), values[..., None, whole:]
    norms = torch.cat([torch.linalg.vector_norm(run, dim=-1) for run in runs], -1)
    return norms.to(dtype).mul_(n**-0.5).square_().sum(-1)


def keep_their_digits(mean: Tensor, var: Tensor) -> bool:
    """Whether moments from sums of squares keep enough digits."""
    mean, var = mean.detach(), var.detach()
    return bool((mean.square() <= LOST * var).all())


def scale_rows(
    values: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, into: Tensor
) -> None:
    """Scale and shift rows into a tensor, without gradients; ``mu`` is ``(N, C)`` or ``(1, C)``."""
    n, channels = mu.shape
    one = (1, n * channels, -1) if n > 1 else values.shape
    terms = (_each(gamma, n), _each(beta, n), mu.view(-1), var.view(-1), False, 0.0, 0.0)
    if into.dtype == values.dtype:
        unused = values.new_empty(0), values.new_empty(0)
        torch.native_batch_norm(values.view(one), *terms, out=(into.view(one), *unused))
    else:
        into.copy_(torch.native_batch_norm(values.view(one), *terms)[0].view(values.shape))


def column_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)`` of columns ``(N, L, C)``, without gradients."""
    n, positions, channels = values.shape
    if positions * channels < _LARGE_EXAMPLE:
        mean = values.mean(1)
        return mean, (values * values).mean(1).addcmul_(mean, mean, value=-1)
    # A running float32 sum would lose about sqrt(positions) roundings of its own size. So some
    # positions count as channels, and the rest is summed in runs.
    folds = math.gcd(positions, 1 << (max(1, _WIDE // channels).bit_length() - 1))
    folded = values.view(n, positions // folds, folds * channels)
    at, by = values.new_zeros(folds * channels), values.new_ones(folds * channels)
    # The backward of torch's evaluation sums g and g (x - at) / by in one read; here g is x.
    sums = [
        torch.ops.aten.native_batch_norm_backward(
            run, run, None, at, by, None, None, False, 0.0, [False, True, True]
        )[1:]
        for example in folded
        for run in torch.split(example, _COLUMN_RUN)
    ]
    squares, totals = (torch.stack(kind).view(n, -1, channels) for kind in zip(*sums, strict=True))
    mean = totals.sum(1).mul_(1 / positions)
    return mean, squares.sum(1).mul_(1 / positions).addcmul_(mean, mean, value=-1)


def scale_columns(
    values: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None, into: Tensor
) -> None:
    """Scale and shift columns ``(N, L, C)``, without gradients, into another tensor."""
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


def differentiable_moments(input: Tensor) -> tuple[Tensor, Tensor]:
    """`row_moments`, with gradients."""
    mean, var = _Moments.apply(input)
    return mean, var


def differentiable_scale(
    input: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None
) -> Tensor:
    """`scale_rows`, with gradients."""
    n = input.shape[0]
    gamma, beta = (None if t is None else t.expand(n, -1) for t in (gamma, beta))
    output: Tensor = _Scaled.apply(input, mu, var, gamma, beta)
    return output


def _each(term: Tensor | None, n: int) -> Tensor | None:
    """A per-channel term ``(C,)`` as one number per row."""
    return None if term is None else term.expand(n, -1).reshape(-1)


class _Moments(Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor) -> tuple[Tensor, Tensor]:
        mean, var = row_moments(input.flatten(2))
        ctx.save_for_backward(input, mean)
        return mean, var

    @staticmethod
    def backward(ctx: Any, g_mean: Tensor, g_var: Tensor) -> Tensor:
        input, mean = ctx.saved_tensors
        values = input.flatten(2)
        slope = g_var * (2 / values.shape[-1])
        offset = g_mean / values.shape[-1]
        if torch.is_grad_enabled():  # for a second derivative
            centred = values - mean.unsqueeze(-1)
            again: Tensor = slope.unsqueeze(-1) * centred + offset.unsqueeze(-1)
            return again.view(input.shape)
        gradient = torch.empty_like(input)
        scale_rows(values, mean, torch.ones_like(mean), slope, offset, gradient.view(values.shape))
        return gradient


class _Scaled(Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, beta: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(input, mu, var, gamma)
        ctx.shifted = beta is not None
        output = torch.empty_like(input)
        scale_rows(input.flatten(2), mu, var, gamma, beta, output.flatten(2))
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        input, mu, var, gamma = ctx.saved_tensors
        values, given = input.flatten(2), gradient.contiguous().flatten(2)
        root = torch.rsqrt(var)
        slope = root if gamma is None else gamma * root
        if torch.is_grad_enabled():  # for a second derivative
            total = given.sum(-1)
            product = (given * (values - mu.unsqueeze(-1))).sum(-1) * root
            dx: Tensor | None = (given * slope.unsqueeze(-1)).view(input.shape)
        else:
            dx, product, total = _reduced(given, values, mu, var, gamma, ctx.needs_input_grad[0])
            dx = None if dx is None else dx.view(input.shape)
        dgamma = None if gamma is None else product
        dbeta = total if ctx.shifted else None
        return dx, -slope * total, -0.5 * slope * root * product, dgamma, dbeta


def _reduced(
    given: Tensor, values: Tensor, mu: Tensor, var: Tensor, gamma: Tensor | None, wanted: bool
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradient of the input, H and G, by the backward of torch's evaluation on rows."""
    n, channels, _ = values.shape
    one = (1, n * channels, -1)
    dx, product, total = torch.ops.aten.native_batch_norm_backward(
        given.view(one), values.view(one), _each(gamma, n), mu.view(-1), var.view(-1),
        None, None, False, 0.0, [wanted, True, True],
    )  # fmt: skip
    return (dx if wanted else None), product.view(n, channels), total.view(n, channels)
