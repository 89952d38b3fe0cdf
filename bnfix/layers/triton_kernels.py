# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The layer's evaluation on CUDA devices, in Triton. Tested in Triton's interpreter, never timed.

A tile of (channels, positions) of one example is what a program holds on the chip. Where all
positions fit, one launch reads the input once and writes the output once; where they do not, a
first launch pools the moments of tiles, by counts, and leaves mu and the scale of each (example,
channel), and a second one applies them. Statistics are float32 whatever the input is, about the
population's mean where there is one.

The sizes below are reasoned, not measured: this project has had no CUDA device to time them on.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

#: Most values of a tile: 256 threads with 64 registers each.
_TILE = 1 << 14
#: Values below which a tile takes more channels, so that small planes do not starve the threads.
_LEAST_TILE = 1 << 10
#: Channels side by side where they lie next to each other in memory: 64 bytes of float32.
_LANES = 16


@triton.jit
def _centre(population_mean, channel, inside, has_population: tl.constexpr):
    """What values are taken from before anything is summed, so that an offset costs no digits."""
    if has_population:
        return tl.load(population_mean + channel, mask=inside, other=0.0).to(tl.float32)
    return tl.zeros_like(channel).to(tl.float32)


@triton.jit
def _mix(
    mean,
    var,
    channel,
    inside,
    population_var,
    weight,
    weight_stride,
    gamma,
    eps,
    has_population: tl.constexpr,
    has_gamma: tl.constexpr,
):
    """Mu, less the centre, and scale of channels; the mean is less the centre too."""
    mu = mean
    if has_population:
        v = tl.load(population_var + channel, mask=inside, other=1.0).to(tl.float32)
        a = tl.load(weight + channel * weight_stride, mask=inside, other=0.0).to(tl.float32)
        mu = a * mean
        var = (1 - a) * v + a * (var + (1 - a) * mean * mean)
    scale = 1 / tl.sqrt(var + eps)
    if has_gamma:
        scale = scale * tl.load(gamma + channel, mask=inside, other=1.0).to(tl.float32)
    return mu, scale


@triton.jit
def _finish(output, residual, at, there, has_residual: tl.constexpr, activation: tl.constexpr):
    """What follows the layer; comparisons leave NaN what it is, where maxima would not."""
    if has_residual:
        output += tl.load(residual + at, mask=there, other=0.0).to(tl.float32)
    if activation == 1:
        output = tl.where(output < 0, 0.0, output)
    elif activation == 2:
        output = tl.where(output < 0, 0.0, tl.where(output > 6, 6.0, output))
    elif activation == 3:
        output = output / (1 + tl.exp(-output))
    elif activation == 4:
        gate = output + 3
        output = output * tl.where(gate < 0, 0.0, tl.where(gate > 6, 6.0, gate)) / 6
    return output


@triton.jit
def _whole(
    x,
    y,
    residual,
    population_mean,
    population_var,
    weight,
    weight_stride,
    gamma,
    beta,
    eps,
    channels,
    positions,
    step_channel,
    step_position,
    has_population: tl.constexpr,
    has_gamma: tl.constexpr,
    has_beta: tl.constexpr,
    has_residual: tl.constexpr,
    activation: tl.constexpr,
    block_c: tl.constexpr,
    block_l: tl.constexpr,
):
    """One launch: all positions of some channels of an example lie in the tile."""
    blocks = tl.cdiv(channels, block_c)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * block_c + tl.arange(0, block_c)
    position = tl.arange(0, block_l)
    inside = channel < channels
    there = inside[:, None] & (position < positions)[None, :]
    at = example * channels * positions
    at = at + channel[:, None] * step_channel + position[None, :] * step_position
    centre = _centre(population_mean, channel, inside, has_population)
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    values = tl.where(there, values - centre[:, None], 0.0)
    mean = tl.sum(values, 1) / positions
    centred = tl.where(there, values - mean[:, None], 0.0)
    var = tl.sum(centred * centred, 1) / positions
    mu, scale = _mix(
        mean, var, channel, inside, population_var, weight, weight_stride, gamma, eps,
        has_population, has_gamma,
    )  # fmt: skip
    output = (centred + (mean - mu)[:, None]) * scale[:, None]
    if has_beta:
        output += tl.load(beta + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
    output = _finish(output, residual, at, there, has_residual, activation)
    tl.store(y + at, output.to(y.dtype.element_ty), mask=there)


@triton.jit
def _moments(
    x,
    mus,
    scales,
    population_mean,
    population_var,
    weight,
    weight_stride,
    gamma,
    eps,
    channels,
    positions,
    step_channel,
    step_position,
    has_population: tl.constexpr,
    has_gamma: tl.constexpr,
    block_c: tl.constexpr,
    block_l: tl.constexpr,
):
    """First of two launches: mu and scale of each (example, channel)."""
    blocks = tl.cdiv(channels, block_c)
    example = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * block_c + tl.arange(0, block_c)
    inside = channel < channels
    at = example * channels * positions + channel[:, None] * step_channel
    centre = _centre(population_mean, channel, inside, has_population)
    mean = tl.zeros((block_c,), tl.float32)
    squares = tl.zeros((block_c,), tl.float32)
    for start in range(0, positions, block_l):
        position = start + tl.arange(0, block_l)
        there = inside[:, None] & (position < positions)[None, :]
        values = tl.load(x + at + position[None, :] * step_position, mask=there, other=0.0)
        values = tl.where(there, values.to(tl.float32) - centre[:, None], 0.0)
        count = tl.minimum(positions - start, block_l)
        tile_mean = tl.sum(values, 1) / count
        centred = tl.where(there, values - tile_mean[:, None], 0.0)
        part = count / (start + count)
        away = tile_mean - mean
        mean += away * part
        squares += tl.sum(centred * centred, 1) + away * away * (start * part)
    mu, scale = _mix(
        mean, squares / positions, channel, inside, population_var, weight, weight_stride, gamma,
        eps, has_population, has_gamma,
    )  # fmt: skip
    tl.store(mus + example * channels + channel, mu, mask=inside)
    tl.store(scales + example * channels + channel, scale, mask=inside)


@triton.jit
def _apply(
    x,
    y,
    residual,
    mus,
    scales,
    population_mean,
    beta,
    channels,
    positions,
    step_channel,
    step_position,
    has_population: tl.constexpr,
    has_beta: tl.constexpr,
    has_residual: tl.constexpr,
    activation: tl.constexpr,
    block_c: tl.constexpr,
    block_l: tl.constexpr,
):
    """Second of two launches."""
    blocks = tl.cdiv(channels, block_c)
    tiles = tl.cdiv(positions, block_l)
    row = tl.program_id(0) // tiles
    example = (row // blocks).to(tl.int64)
    channel = (row % blocks) * block_c + tl.arange(0, block_c)
    position = (tl.program_id(0) % tiles) * block_l + tl.arange(0, block_l)
    inside = channel < channels
    there = inside[:, None] & (position < positions)[None, :]
    at = example * channels * positions
    at = at + channel[:, None] * step_channel + position[None, :] * step_position
    mu = tl.load(mus + example * channels + channel, mask=inside, other=0.0)
    scale = tl.load(scales + example * channels + channel, mask=inside, other=0.0)
    values = tl.load(x + at, mask=there, other=0.0).to(tl.float32)
    centre = _centre(population_mean, channel, inside, has_population)
    output = (values - centre[:, None] - mu[:, None]) * scale[:, None]
    if has_beta:
        output += tl.load(beta + channel, mask=inside, other=0.0).to(tl.float32)[:, None]
    output = _finish(output, residual, at, there, has_residual, activation)
    tl.store(y + at, output.to(y.dtype.element_ty), mask=there)


def normalize(
    input: Tensor,
    population: tuple[Tensor, Tensor] | None,
    weight: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    activation: int = 0,
) -> Tensor:
    """Evaluate the layer, one channel a group, and what follows it.

    Args:
        input: ``(N, C, *spatial)``, contiguous or channels last, not empty, float32 or half.
        population: mean and biased variance ``(C,)``, or ``None`` for the example's own alone.
        weight: of the example, ``()`` or ``(C,)``.
        gamma: scale ``(C,)`` or ``None``.
        beta: shift ``(C,)`` or ``None``.
        eps: added to the variance.
        residual: added to the output, laid out as the input; ``None`` for nothing.
        activation: number in `finishing.CODES`; 0 for none.

    Returns:
        The same shape, dtype and memory format.
    """
    output = torch.empty_like(input)
    n, channels = input.shape[:2]
    positions = input[0, 0].numel()
    rows = input.is_contiguous()
    steps = (positions, 1) if rows else (1, channels)
    mean, var = (weight, weight) if population is None else population
    example = (weight, int(weight.ndim > 0))
    scale, shift = (weight if term is None else term for term in (gamma, beta))
    given = {"has_population": population is not None, "has_gamma": gamma is not None}
    after = {"has_residual": residual is not None, "activation": activation}
    added = input if residual is None else residual
    block_c, block_l = _blocks(channels, positions, rows=rows)
    groups = n * triton.cdiv(channels, block_c)
    with torch.cuda.device_of(input):  # Triton launches on the current device
        if block_l >= positions:
            _whole[(groups,)](
                input, output, added, mean, var, *example, scale, shift, eps, channels, positions,
                *steps, **given, **after, has_beta=beta is not None, block_c=block_c,
                block_l=block_l, num_warps=_warps(block_c * block_l),
            )  # fmt: skip
            return output
        mus, scales = input.new_empty((2, n, channels), dtype=torch.float32)
        _moments[(groups,)](
            input, mus, scales, mean, var, *example, scale, eps, channels, positions, *steps,
            **given, block_c=block_c, block_l=block_l, num_warps=8,
        )  # fmt: skip
        block_l //= 4
        _apply[(groups * triton.cdiv(positions, block_l),)](
            input, output, added, mus, scales, mean, shift, channels, positions, *steps, **after,
            has_population=population is not None, has_beta=beta is not None,
            block_c=block_c, block_l=block_l, num_warps=4,
        )  # fmt: skip
        return output


def _blocks(channels: int, positions: int, *, rows: bool) -> tuple[int, int]:
    """Channels and positions of a tile, powers of 2."""
    whole = triton.next_power_of_2(positions)
    most = triton.next_power_of_2(channels)
    block_c = max(1, _LEAST_TILE // whole) if rows else _LANES
    block_c = min(block_c, most)
    return block_c, min(whole, _TILE // block_c)


def _warps(values: int) -> int:
    return 8 if values > 1 << 12 else 4
