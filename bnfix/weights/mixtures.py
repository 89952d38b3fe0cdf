"""`choose_mixture_`: mixtures of old and new statistics, by labelled examples and the gate.

Old and new statistics are mixed as in `bnfix.recalibrate.targets`, with weight w for the new:

    mean = (1 - w) mean_o + w mean_n
    var  = (1 - w) var_o + w var_n + w (1 - w) (mean_n - mean_o)^2

The first candidate is one w for the model, by the bracketed search of example weights; the next is
one per layer, by gradient. The layers stay static, so a mixture costs nothing at inference.

`learn_batch_weight_`: batch weights in addition to stored statistics, one per channel, by gradient,
on batches in random order. Source: the second phase of TTN (Lim et al., "TTN: A Domain-Shift Aware
Batch Normalization in Test-Time Adaptation", ICLR 2023). Differs: the labelled images come from the
target domain, the start is one weight for all channels, and no penalty ties the weights to it; a
gate judges them, in random order and sorted by class.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ModelError
from bnfix.core.settings import WeightRecipe
from bnfix.core.torch_private import eager
from bnfix.metrics.compare import Decision
from bnfix.metrics.evaluate import evaluate
from bnfix.metrics.metrics import Metrics
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.norm.mixture import trainable_weights
from bnfix.norm.moments import over_channel_groups
from bnfix.recalibrate.targets import between
from bnfix.weights.choose import Levels, WeightSearch

_Moments = tuple[Tensor, Tensor]

#: A learning rate at which a few steps can move a weight from 0 to 1.
_RATE = 0.1


@dataclass(frozen=True)
class MixtureChoice:
    """The candidates, the winner, and the weights of the new statistics."""

    decisions: tuple[Decision, ...]  # one per level tried
    chosen: str  # keep, global or layer
    weights: dict[str, float]  # the winner's, by layer; empty with keep
    notes: tuple[str, ...]  # the result in words, and why a finer level was given up


@dataclass
class MixtureSearch(WeightSearch):
    """Finds the weights of new statistics; between passes, layers hold the mixture."""

    stage: ClassVar[str] = "statistics"
    names: ClassVar[Mapping[str, str]] = {
        "global": "one mixture of statistics",
        "layer": "mixture of statistics per layer",
    }
    coarse: ClassVar[tuple[float, ...]] = (0.1, 0.3, 0.6, 1.0)

    #: Each layer's old and new mean and variance ``(C,)``, float64.
    pairs: Mapping[str, tuple[_Moments, _Moments]] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)

    @torch.no_grad()
    def set_(self, weights: Mapping[str, Any]) -> None:
        """Write the mixture with these weights into the layers."""
        self.weights = {name: float(weight) for name, weight in weights.items()}
        for name, weight in self.weights.items():
            buffers = self.layers[name]._buffers
            for key, moment in zip(_KEYS, between(*self.pairs[name], weight), strict=True):
                buffers[key].copy_(moment)

    @contextmanager
    def leaves(self, granularity: str, start: float) -> Iterator[dict[str, Tensor]]:
        """Let the weights, one per layer, take gradients; restore everything at exit."""
        leaves: dict[str, Tensor] = {}
        # Compiled code would not see the hooks.
        with guards.tensors_kept(self.modules), guards.hooks() as handles, eager():
            for name, layer in self.layers.items():
                old = self.pairs[name][0][0]
                leaves[name] = old.new_tensor(self.weights[name]).requires_grad_()
                affine = layer._parameters.get("weight"), layer._parameters.get("bias")
                lend = partial(_lend, self.pairs[name], leaves[name], affine)
                handles.append(layer.register_forward_pre_hook(lend))
            yield leaves


_KEYS = ("running_mean", "running_var")


def _lend(
    pair: tuple[_Moments, _Moments],
    leaf: Any,
    affine: tuple[Tensor | None, Tensor | None],
    layer: Any,
    _: object,
) -> None:
    """Let a layer normalize by the mixture, with its autograd graph; a forward pre-hook."""
    buffers = layer._buffers
    mean, var = (moment.to(buffers["running_mean"]) for moment in between(*pair, leaf))
    if getattr(layer, "live", False):
        buffers.update(zip(_KEYS, (mean, var), strict=True))
        return
    # torch's kernel has no gradient for statistics, so it goes through scale and shift. With the
    # mixture's moments m, s as constants, this is the same function with the same values:
    # y = gamma s/sd (x - m)/s + beta + gamma (m - mean)/sd.
    buffers.update(zip(_KEYS, (mean.detach(), var.detach()), strict=True))
    if isinstance(layer, GeneralizedBatchNorm):
        mean, var = over_channel_groups(mean, var, layer.channel_groups)
    sd = (var + layer.eps).sqrt()
    gamma, beta = affine
    scale = sd.detach() / sd
    shift = (mean.detach() - mean) / sd
    if gamma is not None:
        scale, shift = gamma * scale, gamma * shift
    layer._parameters.update(weight=scale, bias=shift if beta is None else beta + shift)


def choose_mixture_(
    model: nn.Module,
    pairs: Mapping[str, tuple[_Moments, _Moments]],
    learn: runtime.Batches,
    *,
    monitor: Iterable[Any],
    select: Iterable[Any],
    incumbent: tuple[str, Metrics],
    recipe: WeightRecipe | None = None,
    z: float = 2.0,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> MixtureChoice:
    """Choose the weight of new statistics against a model's old ones, by labelled batches.

    ``pairs`` holds old and new moments by layer, each mean and biased variance ``(C,)``, float64. A
    layer with a non-finite moment keeps its statistics. Granularity ``channel`` means ``layer``
    here. A mixture must beat the ``incumbent``, whose task also judges the choice. Running means
    and variances change only if a candidate wins.
    """
    recipe = recipe or WeightRecipe()
    task = incumbent[1].task
    finest = "global" if recipe.granularity == "global" else "layer"
    modules = dict(model.named_modules())
    device = runtime.device_of(model)
    usable = {
        name: ((old[0].to(device), old[1].to(device)), (new[0].to(device), new[1].to(device)))
        for name, (old, new) in pairs.items()
        if all(bool(moment.isfinite().all()) for moment in (*old, *new))
    }
    search = MixtureSearch(
        model=model,
        layers={name: modules[name] for name in usable},
        monitor=monitor,
        learn=learn,
        forward=forward,
        precision=precision,
        task=task,
        pairs=usable,
    )
    measured = partial(evaluate, model, select, task=task, forward=forward, precision=precision)
    by_layer = replace(recipe, granularity=finest, thin=0.0, lr=_RATE)
    levels = Levels(search, measured, by_layer, z, incumbent)
    weights, notes = dict[str, float](), list[str]()
    with guards.undone_on_error(search.modules):
        for level in search.names if search.pairs else ():
            try:
                levels.try_(level)
            except (ModelError, RuntimeError) as error:
                # One weight needs no gradients; some models or memory sizes do not allow them.
                if level == "global":
                    raise
                levels.put_back_()
                notes.append(f"{search.names[level]}: was given up: {error}")
            if levels.chosen == level:
                weights = search.weights
            if level == finest:
                break
    if weights:
        low, high, mean = min(weights.values()), max(weights.values()), fmean(weights.values())
        words = f"from {low:.2f} to {high:.2f}, {mean:.2f} on average" * (high > low)
        name = search.names[levels.chosen]
        notes.append(f"{name}: the new statistics weigh {words or f'{mean:.2f}'}.")
    return MixtureChoice(
        tuple(levels.decisions.values()), levels.chosen, weights, notes=tuple(notes)
    )


@dataclass
class BatchWeightSearch(WeightSearch):
    """Finds batch weights by gradient, as for example weights."""

    stage: ClassVar[str] = "batch weight"

    def set_(self, weights: Mapping[str, Any]) -> None:
        """Set the weights, limited so that the sum with the example's is at most 1."""
        room = {name: 1 - self.layers[name].example_weight for name in weights}
        fitting = {name: weight.minimum(room[name]) for name, weight in weights.items()}
        set_example_weight_(self.model, batch_weight=fitting)

    def leaves(self, granularity: str, start: float) -> AbstractContextManager[dict[str, Tensor]]:
        """Let the weights take gradients; restore everything at exit."""
        return trainable_weights(self.layers, granularity, start, "batch")


def learn_batch_weight_(
    model: nn.Module,
    layers: Mapping[str, GeneralizedBatchNorm],
    learn: runtime.Batches,
    *,
    monitor: Iterable[Any],
    recipe: WeightRecipe,
    precision: str = "fp32",
) -> dict[str, Tensor]:
    """Learn one batch weight per channel, starting from the present ones; return them ``(C,)``."""
    search = BatchWeightSearch(
        model=model,
        layers=dict(layers),
        monitor=monitor,
        learn=learn,
        forward=None,
        precision=precision,
    )
    with guards.undone_on_error(search.modules):
        search.learned("channel", replace(recipe, start=0.0))
    found = {name: layer.batch_weight for name, layer in layers.items()}
    return {name: weight for name, weight in found.items() if weight is not None}
