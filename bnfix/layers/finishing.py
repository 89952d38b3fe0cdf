"""What follows a norm layer, done in place by its kernel: a residual's addition, an activation."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Activation = Callable[[Tensor], object]

relu6_: Activation = partial(F.relu6, inplace=True)
silu_: Activation = partial(F.silu, inplace=True)
hardswish_: Activation = partial(F.hardswish, inplace=True)
#: Activations that are compiled together with the layer.
ACTIVATIONS: tuple[Activation, ...] = (torch.relu_, relu6_, silu_, hardswish_)
_MODULES: dict[type[nn.Module], Activation] = {
    nn.ReLU: torch.relu_, nn.ReLU6: relu6_, nn.SiLU: silu_, nn.Hardswish: hardswish_,
}  # fmt: skip


class Finish(NamedTuple):
    """What follows the layer, done while its output is still in the cache.

    Args:
        residual: added to the output, of its shape; ``None`` for nothing.
        activation: changes a tensor in place, value by value; ``None`` for none.
    """

    residual: Tensor | None = None
    activation: Activation | None = None

    def done_to(self, output: Tensor) -> Tensor:
        """Do it, in place; by name, since torch 2.8 does not compile calls of a record."""
        if self.residual is not None:
            output += self.residual
        if self.activation is not None:
            self.activation(output)
        return output

    def __call__(self, output: Tensor) -> Tensor:
        """Do it, in place."""
        return self.done_to(output)

    def of(self, part: slice) -> Finish:
        """The same for some examples."""
        return self if self.residual is None else self._replace(residual=self.residual[part])


NOTHING = Finish()


def activation_of(module: nn.Module) -> Activation | None:
    """How an activation is done in place."""
    if type(module) is nn.LeakyReLU:
        return partial(F.leaky_relu, negative_slope=module.negative_slope, inplace=True)
    return _MODULES.get(type(module))
