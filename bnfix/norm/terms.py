"""What a layer mixes its moments by, and applies."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnfix.norm import moments


class Terms(NamedTuple):
    """The tensors and settings that the layer mixes the example's moments with, and applies."""

    mean: Tensor | None  # the population's, (C,), pooled over channel groups; None with none kept
    var: Tensor | None  # biased
    example_weight: Tensor  # a, () or (C,)
    gamma: Tensor | None
    beta: Tensor | None
    eps: float
    channel_groups: int
    shiftable: bool = False  # no weight is above `SHIFTABLE`
    batch_weight: Tensor | None = None  # b, () or (C,); needs a population
    median: bool = False  # the batch's moments are medians over its examples

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Its tensors; by a method: torch 2.8 compiles neither slices nor properties of records."""
        return self.mean, self.var, self.example_weight, self.gamma, self.beta, self.batch_weight

    def cast(self, dtype: torch.dtype) -> Terms:
        """Convert every tensor."""
        if all(t is None or t.dtype == dtype for t in self.tensors()):
            return self
        return self._with([None if t is None else t.to(dtype) for t in self.tensors()])

    def channels(self, index: Tensor, of: int) -> Terms:
        """Select channels, whole groups of them."""
        kept = self._with([t if t is None or t.ndim == 0 else t[index] for t in self.tensors()])
        return kept._replace(channel_groups=self.channel_groups * len(index) // of)

    def weight(self) -> Tensor:
        """How much of the moments is measured: the example's and the batch's weight."""
        a, b = self.example_weight, self.batch_weight
        return a if b is None else a + b

    def alone(self) -> Terms:
        """The same for a single example, which is its batch."""
        return self._with([self.mean, self.var, self.weight(), self.gamma, self.beta, None])

    def among(self, mean: Tensor, var: Tensor) -> Terms:
        """Mix the batch into the population, by the moments ``(N, C)`` of the batch's examples."""
        if self.batch_weight is None or self.mean is None or self.var is None:
            return self
        return self.beside(*(moments.median_mix if self.median else moments.mix)(mean, var))

    def beside(self, mean: Tensor, var: Tensor) -> Terms:
        """Mix the batch into the population, by the batch's moments ``(C,)``."""
        if self.batch_weight is None or self.mean is None or self.var is None:
            return self
        # The least divisor lets the weight be 0 where the example's is 1.
        share = (self.batch_weight / (1 - self.example_weight).clamp_min(1e-6)).clamp_max(1.0)
        gap = mean - self.mean
        mixed = torch.lerp(self.mean, mean, share)  # exact at both ends
        spread = torch.addcmul(torch.lerp(self.var, var, share), gap * gap, share * (1 - share))
        return self._with([mixed, spread, self.example_weight, self.gamma, self.beta, None])

    def _with(self, tensors: list[Any]) -> Terms:
        mean, var, weight, gamma, beta, batch = tensors
        # Not by _replace, which torch 2.8 does not compile.
        return Terms(
            mean=mean,
            var=var,
            example_weight=weight,
            gamma=gamma,
            beta=beta,
            eps=self.eps,
            channel_groups=self.channel_groups,
            shiftable=self.shiftable,
            batch_weight=batch,
            median=self.median,
        )
