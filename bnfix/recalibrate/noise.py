"""Statistics that are right on average over copies of a network whose weights are noisy.

Analogue or worn hardware holds each weight with an error. In copy k every convolution and linear
layer has W_k = W + r s N(0, 1), s the standard deviation of all of W; norms and biases stay.
Each copy meets its own moments (mu_k, v_k), below layers that have the same errors, and

    mean = E_k mu_k,  var = E_k v_k

Source: Tsai et al., "Robust Processing-In-Memory Neural Networks via Noise-Aware Normalization",
2020, has the idea; no code of theirs was found.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from bnfix.core import guards
from bnfix.core.errors import ModelError
from bnfix.core.settings import NoiseRecipe
from bnfix.core.torch_private import ConvBase
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.collector import stored_moments
from bnfix.recalibrate.recalibrate import Calibration

_Moments = tuple[Tensor, Tensor]


@contextmanager
def noisy_weights(model: nn.Module, size: float, seed: int) -> Iterator[None]:
    """Noise of this part of each weight's deviation; all is put back bit for bit on leaving."""
    if not size:
        yield
        return
    # On the CPU whatever the device, so that a seed means one copy.
    before, generator = guards.Snapshot(model), torch.Generator().manual_seed(seed)
    try:
        with torch.no_grad():
            for weight in _weights(model):
                drawn = torch.randn(weight.shape, generator=generator).to(weight)
                weight.add_(drawn, alpha=size * float(weight.double().std(correction=0)))
        yield
    finally:
        before.restore_()


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights of convolutions and linear layers, shared ones once."""
    layers = (m for m in model.modules() if isinstance(m, ConvBase | nn.Linear))
    found = {id(w): w for m in layers if isinstance(w := m.weight, nn.Parameter)}
    if not found:
        raise ModelError("model: no convolution or linear layer, so no weight to put noise on.")
    return list(found.values())


def average_over_noise_(
    model: nn.Module, measure: Callable[[], Calibration], size: float, seeds: Sequence[int]
) -> Calibration:
    """Set the statistics to the mean of those that `measure` gives the copies of these seeds.

    An exception leaves the model bit for bit as it was.
    """
    found, new = list[Calibration](), dict[str, _Moments]()
    sites = {site.name: site for site in find_norms(model)}
    for k, seed in enumerate(seeds, 1):
        with noisy_weights(model, size, seed):
            found.append(measure())
            for name in (layer.name for layer in found[-1].layers):
                own = stored_moments(sites[name])
                mean, var = new.get(name, own)
                # Unlike a sum, lerp gives equal ones to the last bit.
                new[name] = torch.lerp(mean, own[0], 1 / k), torch.lerp(var, own[1], 1 / k)
    for name, (mean, var) in new.items():
        sites[name].set_moments_(mean, var, found[-1].n_batches)
    return replace(
        found[-1],
        target=f"{found[-1].target}, mean of {len(found)} copies with weight noise {size:g}",
        passes=sum(one.passes for one in found),
    )


def describe_noise(recipe: NoiseRecipe, seed: int) -> list[str]:
    """On which copies was measured, and on which was judged."""
    if not recipe.weight_noise:
        return []
    fit, select, test = (recipe.copies(part, seed) for part in ("fit", "select", "test"))
    return [
        f"weight noise {recipe.weight_noise:g} of each weight's deviation: statistics under noise "
        f"are of {recipe.draws} copies (seeds from {fit[0]}); select and test are measured on "
        f"others (from {select[0]} and {test[0]}), so each example is a group of {recipe.draws}."
    ]
