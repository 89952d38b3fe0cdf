"""What a recipe adds to a training step: ghosts, their noise, consistency, sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core.errors import ConfigError, NormError, some
from bnfix.core.settings import FinetuneRecipe
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.norm.moments import gaps
from bnfix.norm.sites import find_norms


class Added:
    """The hooks of a recipe's ingredients on a network's norm layers, and their part of the loss.

    ``ghost_noise`` N: each example i of a layer with frozen moments (mu, sd) is normalized as if
    these were a ghost batch's, whose mean and deviation vary by chance:

        z = (x - mu - sd d) / (sd s),  d ~ N(0, 1/N),  s^2 ~ chi^2(N-1) / (N-1)

    per example and channel, without a gradient of its own. Source: Kosson et al., "Ghost noise for
    regularizing deep neural networks", AAAI 2024.

    ``consistency`` (l_mean, l_sd): the loss grows by l_mean times the mean gap plus l_sd times the
    sd gap (`gaps`), summed over layers. The gradient goes through the batch's moments. Source:
    Wang, Wu & Huang, "Understanding the failure of batch normalization for transformers in NLP",
    2022. Differs: deviations, not variances, relative to the batch's, as `inspect` shows them.
    """

    def __init__(self, model: nn.Module, recipe: FinetuneRecipe) -> None:
        self._model, self._recipe = model, recipe
        self._terms: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """The layers with hooks, for a while; they act in training only."""
        recipe = self._recipe
        steps: list[Callable[[Any, Tensor], Tensor]] = []
        steps += [self._consistent] if recipe.consistency else []
        steps += [self._noisy] if recipe.ghost_noise else []
        layers = [s.module for s in find_norms(self._model) if s.has_statistics and not s.frozen]
        handles = []
        if steps and any(getattr(layer, "gates", None) is not None for layer in layers):
            raise NormError(
                "--ghost-noise, --consistency: the statistics of layers with gates are not of "
                "their inputs, so neither acts on them. Leave both out."
            )

        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = inputs
            for step in steps if self._model.training and x.numel() else ():
                x = step(layer, x)
            return (x, *rest)

        try:
            for layer in layers if steps else ():
                handles.append(layer.register_forward_pre_hook(before))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def penalty(self) -> Tensor | None:
        """What the batch just run adds to the loss."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() if terms else None

    def _consistent(self, layer: Any, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:  # a single value has no deviation
            dims = [axis for axis in range(x.ndim) if axis != 1]
            var, mean = torch.var_mean(x.float(), dims, correction=0)
            stored = layer.running_mean.clone(), layer.running_var.clone()  # they move in training
            factors = torch.tensor(self._recipe.consistency, device=x.device)
            self._terms.append((factors * gaps(stored, (mean, var), layer.eps)).sum())
        return x

    @torch.no_grad()
    def _draw(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = self._recipe.ghost_noise or 2
        shape = (n, len(like))
        shift = torch.randn(shape, device=like.device) / math.sqrt(size)
        freedom = torch.full(shape, size - 1.0, device=like.device)
        return shift, (torch.distributions.Chi2(freedom).sample() / freedom).sqrt()

    def _noisy(self, layer: Any, x: Tensor) -> Tensor:
        mean, var = layer.running_mean, layer.running_var
        shift, scale = self._draw(len(x), mean)
        after = [1] * (x.ndim - 2)
        sd = (var + layer.eps).sqrt()
        shift, scale = (t.view(*t.shape, *after) for t in (sd * shift, scale))
        centre = mean.view(-1, *after)
        noisy: Tensor = centre + (x - centre - shift) / scale
        return noisy.to(x.dtype)


@contextmanager
def uphill(parameters: Sequence[Tensor], length: float) -> Iterator[bool]:
    """Parameters moved by e = length g / |g| for a while, g their gradients together.

    It gives False, and moves nothing, where there is no such direction. Source: Mueller et al.,
    "Normalization layers are all that sharpness-aware minimization needs", NeurIPS 2023.
    """
    moved = [(p, p.detach().clone(), p.grad) for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(g.square().sum()) for _, _, g in moved))
    if not (norm > 0 and math.isfinite(norm)):
        yield False
        return
    with torch.no_grad():
        for p, _, g in moved:
            p.add_(g, alpha=length / norm)
    try:
        yield True
    finally:
        with torch.no_grad():
            for p, value, _ in moved:
                p.copy_(value)


def require_norms(recipe: FinetuneRecipe, norms: Iterable[Tensor]) -> None:
    """Refuse sharpness-aware steps where no norm layer is trained."""
    if recipe.sharpness and not list(norms):
        raise ConfigError(
            f"--sharpness: --train {recipe.train} trains no gamma and beta. Use --train norms or "
            "leave it out.",
            name="sharpness",
        )


@contextmanager
def training_norms(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[None]:
    """The recipe's ghosts and momentum for gathered batches, where statistics are trained."""
    trains = recipe.statistics == "train"
    sites = [site for site in find_norms(model) if trains and not site.frozen]
    stock = [site.name for site in sites if not isinstance(site.module, GeneralizedBatchNorm)]
    own: dict[str, Any] = {} if recipe.ghost_size is None else {"ghost_size": recipe.ghost_size}
    own |= {"exclusive": True} if recipe.batch_statistics == "exclusive" else {}
    if stock and own:
        flag = "--ghost-size" if "ghost_size" in own else "--batch-statistics"
        raise NormError(
            f"{flag}: {some(stock)}: no GeneralizedBatchNorm. Call swap_norms_(model) first.",
            name=stock[0],
        )
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for layer in (site.module for site in sites):
            settings = own.copy()
            momentum: Any = getattr(layer, "momentum", None)
            if recipe.accumulate > 1 and momentum is not None:
                # K batches move the running moments as far as one does otherwise.
                settings["momentum"] = 1 - (1 - momentum) ** (1 / recipe.accumulate)
            for name, value in settings.items():
                before.append((layer, name, getattr(layer, name)))
                setattr(layer, name, value)
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)
