"""Fast kernels for the example-aware layer; each falls back to, and is checked by, the plain form.

A stock layer makes one read and one write; the example's moments need exactly one extra read.
Per example and channel, with population moments p and v, example moments m and s, and weight a:

    mu  = p + a (m - p)
    var = (1-a) v + a (s + (1-a) (m - p)^2)
    y   = gamma (x - mu) / sqrt(var + eps) + beta

Three kernels, in addition to the plain form:

    CPU, eager     s from the sum of squares, then one pass. Squares lose digits where |m| is large
                   relative to the mixture's spread; such channels take the plain form.
    compiled       E[x-p] and E[(x-p)^2] in one read: q = s + (m-p)^2. q - a (m-p)^2 cannot cancel
                   unless a is near 1, where the plain form is used. No graph breaks.
    CUDA, eager    the compiled form through Inductor, unless its first use fails or differs.

With gradients, contiguous CPU inputs use the autograd nodes of `moments`; others use the plain
form. An epilogue (`Finish`) runs in place while the output is still in the cache.

A batch weight b adds a third part. The law of total variance holds in any order, so the batch's
moments, pooled from its examples, are first mixed into the population's with weight b / (1-a).
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core.torch_private import is_forward_differentiated, is_transformed
from bnfix.norm import moments
from bnfix.norm.mixture import Terms, mixed_moments, plain, wide_type
from bnfix.norm.moments import over_channel_groups

_log = logging.getLogger("bnfix")

#: Above this weight the compiled form could lose more than a digit, so the plain form is used.
SHIFTABLE = 0.9
#: Channels are recomputed where a m^2 exceeds `moments.LOST` times the divisor. This is the least a
#: in that test, because the rounding error of the output, m / sqrt(var), grows at any a.
_LEAST = 1 / 16
#: Values per slab: small enough that the second read still finds them in the last-level cache.
_SLAB = 1 << 21


Activation = Callable[[Tensor], object]

relu6_: Activation = functools.partial(F.relu6, inplace=True)
silu_: Activation = functools.partial(F.silu, inplace=True)
hardswish_: Activation = functools.partial(F.hardswish, inplace=True)
#: Activations that are compiled together with the layer.
ACTIVATIONS: tuple[Activation, ...] = (torch.relu_, relu6_, silu_, hardswish_)
_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: torch.relu_, nn.ReLU6: relu6_, nn.SiLU: silu_, nn.Hardswish: hardswish_,
}  # fmt: skip


def activation_of(module: nn.Module) -> Activation | None:
    """The in-place function of an activation module, if it has one."""
    if type(module) is nn.LeakyReLU:
        slope = module.negative_slope
        return functools.partial(F.leaky_relu, negative_slope=slope, inplace=True)
    return _MODULES.get(type(module))


class Finish(NamedTuple):
    """The layer's epilogue: add a residual of the output's shape, then apply an activation."""

    residual: Tensor | None = None
    activation: Activation | None = None

    def apply(self, output: Tensor) -> Tensor:
        """Run it in place; not `__call__`, because torch 2.8 does not compile calls of a tuple."""
        if self.residual is not None:
            output += self.residual
        if self.activation is not None:
            self.activation(output)
        return output

    def of(self, part: slice) -> Finish:
        """The epilogue for a slice of the examples."""
        return self if self.residual is None else self._replace(residual=self.residual[part])


NOTHING = Finish()


# --- the mixture of the moments: step by step, in few operations, and for compilers ---


def _mixed_with_room(
    mean: Tensor,
    var: Tensor,
    terms: Terms,
    a: Tensor | float,
    measured: Tensor | float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`mixed_moments` with eps in the variance, and the margin before a channel loses digits."""
    single = terms.channel_groups == mean.shape[1]
    if isinstance(a, Tensor) or not single or terms.mean is None or terms.var is None:
        mu, mixed = mixed_moments(mean, var, terms, a)
        mixed = mixed + terms.eps
        weight = terms.weight() if measured is None else measured
        least = weight.clamp_min(_LEAST) if isinstance(weight, Tensor) else max(weight, _LEAST)
        return mu, mixed, torch.sub(mixed, mean * mean * (least / moments.LOST))
    # The usual case in few operations: in small layers, each call costs as much as its arithmetic.
    distance = mean - terms.mean
    rest = (terms.var * (1 - a)).add_(terms.eps)
    mixed = torch.addcmul(rest, distance, distance, value=a * (1 - a)).add_(var, alpha=a)
    least = max(float(a if measured is None else measured), _LEAST)
    room = torch.addcmul(mixed, mean, mean, value=-least / moments.LOST)
    return torch.add(terms.mean, distance, alpha=a), mixed, room


def _batch_with_room(mean: Tensor, var: Tensor, terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """`_mixed_with_room` with a batch weight; moments are ``(1, C)`` if all examples share them."""
    a, b, n = terms.example_weight, terms.batch_weight, len(mean)
    mean, var = over_channel_groups(mean, var, terms.channel_groups)
    if terms.median:
        centre, spread = moments.median_mix_of_few(mean, var)
    else:
        centre = mean.sum(0).mul_(1 / n)
        gap = mean - centre
        spread = torch.addcmul(var, gap, gap).sum(0).mul_(1 / n)
    if b is None or a.ndim or b.ndim or terms.mean is None or terms.var is None:
        return _mixed_with_room(mean, var, terms.beside(centre, spread), a, terms.weight())
    # The usual case in few operations, for the same reason as above.
    own, weight = a.item(), terms.weight().item()
    share = min(1.0, b.item() / max(1 - own, 1e-6))
    gap = centre - terms.mean
    spread = torch.lerp(terms.var, spread, share).addcmul_(gap, gap, value=share * (1 - share))
    centre = torch.lerp(terms.mean, centre, share)
    if own:
        terms = terms._replace(mean=centre, var=spread, channel_groups=len(centre))
        return _mixed_with_room(mean, var, terms, own, weight)
    mixed = spread.add_(terms.eps).unsqueeze(0)
    room = torch.addcmul(mixed, mean, mean, value=-max(weight, _LEAST) / moments.LOST)
    return centre.unsqueeze(0), mixed, room


def _shifted(input: Tensor, terms: Terms) -> Tensor:
    """Evaluate by moments about the population's mean: one read, in a form that compilers fuse."""
    wide = wide_type(input.dtype)
    terms = terms.cast(wide)
    if terms.mean is None or terms.var is None:  # only for the type: `_fits_shift` excludes it
        return plain(input, terms)
    axes = tuple(range(2, input.dim()))
    shape = (-1, *(1 for _ in axes))
    centred = input.to(wide) - terms.mean.view(shape)
    distance, square = centred.mean(axes), (centred * centred).mean(axes)
    size = distance.shape[1] // terms.channel_groups
    if size > 1:
        grouped = (len(distance), terms.channel_groups, size)
        distance, square = (
            t.view(grouped).mean(-1).repeat_interleave(size, -1) for t in (distance, square)
        )
    a, b = terms.example_weight, terms.batch_weight
    if b is None:
        moved = a * distance
        var = (1 - a) * terms.var + a * (square - a * distance * distance)
    else:
        moved = a * distance + b * distance.mean(0)
        var = (1 - a - b) * terms.var + a * square + b * square.mean(0) - moved * moved
    scale = torch.rsqrt(var + terms.eps)
    if terms.gamma is not None:
        scale = scale * terms.gamma
    shift = -moved * scale
    if terms.beta is not None:
        shift = shift + terms.beta
    shape = (*scale.shape, *(1 for _ in axes))
    return (centred * scale.view(shape) + shift.view(shape)).to(input.dtype)


# --- the kernels, and the choice between them ---


def evaluate(
    input: Tensor, terms: Terms, finish: Finish = NOTHING, *, overwrite: bool = False
) -> Tensor:
    """`plain`, then ``finish``, up to rounding, by the fastest kernel that is valid for this input.

    An epilogue and ``overwrite`` (write the output into the input's memory, which nobody else
    reads) are only for callers without gradients.
    """
    if terms.batch_weight is not None and input.shape[0] == 1:
        terms = terms.alone()
    if torch.compiler.is_compiling():
        fits = _fits_shift(input, terms)
        return finish.apply(_shifted(input, terms) if fits else plain(input, terms))
    if not _is_ordinary(input):
        return finish.apply(plain(input, terms))
    if _wants_gradients(input, terms):
        return finish.apply(_with_gradients(input, terms))
    if input.device.type == "cuda":
        return _on_cuda(input, terms, finish)
    by_rows = input.is_contiguous()
    if not by_rows and not input.movedim(1, -1).is_contiguous():
        return finish.apply(plain(input, terms))
    output = input if overwrite else torch.empty_like(input)
    return _in_slabs(input, output, terms, finish, by_rows)


def _fits_shift(input: Tensor, terms: Terms) -> bool:
    return terms.shiftable and not terms.median and terms.mean is not None and input.dim() > 2


def has_rows(input: Tensor) -> bool:
    """Whether an input can use the row kernels, including their gradients."""
    if torch.compiler.is_compiling() or not _is_ordinary(input):
        return False
    if input.device.type != "cpu" or not input.is_contiguous():
        return False
    return input.dtype in (torch.float32, torch.float64) and not is_forward_differentiated()


def _is_ordinary(input: Tensor) -> bool:
    """Whether eager kernels can take it: more than one position, plain tensors, no transforms."""
    if input.device.type not in ("cpu", "cuda") or input.dim() < 3:
        return False
    if type(input) not in (Tensor, nn.Parameter) or is_transformed():
        return False
    return input.numel() > input.shape[0] * input.shape[1] > 0


def _wants_gradients(input: Tensor, terms: Terms) -> bool:
    if not torch.is_grad_enabled():
        return False
    return any(t is not None and t.requires_grad for t in (input, *terms.tensors()))


def _with_gradients(input: Tensor, terms: Terms) -> Tensor:
    """Use the row kernels if the input is contiguous and keeps its digits; else the plain form."""
    if not has_rows(input):
        return plain(input, terms)
    wide = terms.cast(input.dtype)
    mean, var = moments.differentiable_moments(input)
    mu, var, room = _mixed_with_room(mean, var, wide, wide.example_weight)
    if not room.min().item() > 0:
        return plain(input, terms)
    return moments.differentiable_scale(input, mu, var, wide.gamma, wide.beta)


def _on_cuda(input: Tensor, terms: Terms, finish: Finish) -> Tensor:
    """Use Inductor's kernel for the compiled form if its check passed; else the plain form."""
    residual = finish.residual
    if residual is not None and not _alike(residual, input):
        return finish.apply(_on_cuda(input, terms, NOTHING))
    if finish.activation not in (None, *ACTIVATIONS):
        return Finish(None, finish.activation).apply(_on_cuda(input, terms, Finish(residual)))
    if not _fits_shift(input, terms):
        return finish.apply(plain(input, terms))
    # Everything that the compiled form depends on, except sizes.
    right = _proved(
        (input.device, input.dtype),
        by_rows=input.is_contiguous(),
        dims=input.dim(),
        weight_dims=terms.example_weight.ndim,
        batch_dims=None if terms.batch_weight is None else terms.batch_weight.ndim,
        has_residual=residual is not None,
        activation=finish.activation,
    )
    return _compiler()(input, terms, finish) if right else finish.apply(plain(input, terms))


def _alike(residual: Tensor, input: Tensor) -> bool:
    alike = (residual.dtype, residual.stride()) == (input.dtype, input.stride())
    return alike and residual.shape == input.shape and residual.device == input.device


def _finished(input: Tensor, terms: Terms, finish: Finish) -> Tensor:
    return finish.apply(_shifted(input, terms))


@functools.cache
def _compiler() -> Callable[[Tensor, Terms, Finish], Tensor]:
    # Dynamic shapes: a network's layers have dozens of sizes, and each would compile separately.
    return torch.compile(_finished, dynamic=True)


@functools.cache
def _proved(
    where: tuple[torch.device, torch.dtype],
    *,
    by_rows: bool,
    dims: int,
    weight_dims: int,
    batch_dims: int | None,
    has_residual: bool,
    activation: Activation | None,
) -> bool:
    """Whether such a call compiles and agrees with the plain form; not every device does both."""
    device, dtype = where
    # All sizes differ and no tensors share memory: the compiler would specialize on either.
    shape = (2, 3, *range(4, dims + 2))
    x = torch.linspace(1, 3, math.prod(shape), device=device).view(shape).to(dtype)
    x = x if by_rows else x.movedim(1, -1).contiguous().movedim(-1, 1)
    mean, var, weight, gamma, beta = (torch.full((3,), 0.5, device=device) for _ in range(5))
    weight = weight if weight_dims else weight[0].clone()
    terms = Terms(mean, var, weight, gamma, beta=beta, eps=1e-5, channel_groups=3, shiftable=True)
    if batch_dims is not None:
        terms = terms._replace(batch_weight=torch.full((3,) * batch_dims, 0.25, device=device))
    finish = Finish(x.clone() if has_residual else None, activation)
    try:
        made, expected = _compiler()(x.clone(), terms, finish), finish.apply(plain(x, terms))
        torch.testing.assert_close(made, expected, rtol=0, atol=1e-4 if x.itemsize > 2 else 0.1)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # noqa: BLE001 - compilers, drivers, their processes raise anything
        text = str(error).strip().partition("\n")[0]
        _log.warning("The compiled layer is not used on %s (%s): %s", device, dtype, text)
        return False
    return True


def _in_slabs(input: Tensor, output: Tensor, terms: Terms, finish: Finish, by_rows: bool) -> Tensor:
    """Evaluate slab by slab, each small enough to stay in the cache until its second read."""
    wide = terms.cast(wide_type(input.dtype))
    step = max(1, _SLAB * len(input) // input.numel())
    if step >= len(input) and wide.batch_weight is None:
        _slab(input, output, wide, by_rows)
        return finish.apply(output)
    parts = [slice(start, start + step) for start in range(0, len(input), step)]
    if wide.batch_weight is not None:
        return _in_batch(input, output, wide, finish, parts, by_rows=by_rows)
    for part in parts:
        _slab(input[part], output[part], wide, by_rows)
        finish.of(part).apply(output[part])
    return output


def _in_batch(
    input: Tensor,
    output: Tensor,
    terms: Terms,
    finish: Finish,
    parts: list[slice],
    *,
    by_rows: bool,
) -> Tensor:
    """Evaluate slab by slab after measuring all of them: the batch's moments need every example."""
    measure = moments.row_moments if by_rows else moments.column_moments
    wide = terms.example_weight.dtype
    found = [measure(_flat(input[part], by_rows).to(wide)) for part in parts]
    mean, var = found[0]
    if len(parts) > 1:
        mean, var = (torch.cat(kind) for kind in zip(*found, strict=True))
    mu, var, room = _batch_with_room(mean, var, terms)
    redone = None if room.min().item() > 0 else _redone(input, ~(room > 0).all(0), terms)
    scale = moments.scale_rows if by_rows else moments.scale_columns
    for part in parts:
        values, into = (_flat(t[part], by_rows) for t in (input, output))
        own = (mu, var) if len(mu) == 1 else (mu[part], var[part])
        scale(values.to(wide), *own, terms.gamma, terms.beta, into)
        if redone is not None:
            output[part].index_copy_(1, redone[0], redone[1][part])
        finish.of(part).apply(output[part])
    return output


def _flat(input: Tensor, by_rows: bool) -> Tensor:
    """Contiguous values as ``(N, C, L)``, or ``(N, L, C)`` where channels are last."""
    if by_rows:
        return input.view(*input.shape[:2], -1)
    return input.movedim(1, -1).view(input.shape[0], -1, input.shape[1])


def _slab(input: Tensor, output: Tensor, terms: Terms, by_rows: bool) -> None:
    weight = terms.example_weight
    a = weight if weight.ndim else weight.item()  # arithmetic with a number is cheaper
    values, into = _flat(input, by_rows).to(weight.dtype), _flat(output, by_rows)
    mean, var = (moments.row_moments if by_rows else moments.column_moments)(values)
    mu, var, room = _mixed_with_room(mean, var, terms, a)
    # A NaN anywhere makes the minimum NaN, and NaN > 0 is false.
    lost = None if room.min().item() > 0 else ~(room > 0).all(0)
    # Computed before the output is written, because the two may share memory.
    redone = None if lost is None else _redone(input, lost, terms)
    scale = moments.scale_rows if by_rows else moments.scale_columns
    scale(values, mu, var, terms.gamma, terms.beta, into)
    if redone is not None:
        output.index_copy_(1, *redone)


def _redone(input: Tensor, lost: Tensor, terms: Terms) -> tuple[Tensor, Tensor]:
    """The channels of groups that lost digits, and their outputs by the plain form."""
    groups = lost.view(terms.channel_groups, -1)
    index = groups.any(1, keepdim=True).expand_as(groups).reshape(-1).nonzero().view(-1)
    if len(index) == len(lost):
        return index, plain(input, terms)
    return index, plain(input[:, index], terms.channels(index, len(lost)))
