"""`choose_example_weight_`: candidates in rising freedom, each before the gate.

keep; one weight for the model by bracketed search; one a layer; one a channel, by gradient. Every
level starts from what stands, is fitted on the fit batches (a part of them watches for the right
moment to stop), and takes over only if the gate lets it on the select batches.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import guards, runtime
from bnfix.errors import DataError, NormError
from bnfix.evaluation import Metrics, evaluate
from bnfix.gate import Decision, judge
from bnfix.norms import (
    GeneralizedBatchNorm,
    generalized_norms,
    set_example_weight_,
    trainable_weights,
)
from bnfix.recipe import WeightRecipe

LEVELS = ("global", "layer", "channel")
_COARSE = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class CurvePoint:
    """The loss at one global weight, on the fit examples.

    Args:
        example_weight: a.
        nll: mean NLL.
        top1: fraction right.
    """

    example_weight: float
    nll: float
    top1: float


@dataclass(frozen=True)
class WeightChoice:
    """What was tried, what won, by how much.

    Args:
        decisions: one a level tried.
        chosen: the level that won: ``keep``, ``global``, ``layer`` or ``channel``.
        curve: the search over one weight for the model, sorted by weight.
        weights: the weight of every layer after the choice, a number or one a channel.
        excluded: layers that keep their weight: a single position a map, or no statistics.
        n_live: layers with a weight above 0.
        passes: what the choice cost, in passes over the fit examples; a pass with gradients
            counts as 3.
        seconds: wall-clock time.
    """

    decisions: tuple[Decision, ...]
    chosen: str
    curve: tuple[CurvePoint, ...]
    weights: dict[str, float | list[float]]
    excluded: tuple[str, ...]
    n_live: int
    passes: float
    seconds: float


def choose_example_weight_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    select: Iterable[Any] | None = None,
    monitor: Iterable[Any] | None = None,
    recipe: WeightRecipe | None = None,
    z: float = 2.0,
    incumbent: tuple[str, Metrics] | None = None,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> WeightChoice:
    """Choose how much the example counts in its own statistics, or leave it as it is.

    Args:
        model: with generalized layers, on the device to run on.
        batches: labelled ``(x, y)`` to fit on. If ``select`` is not given they are read into a
            list, and every fourth batch is held out for the gate.
        select: labelled batches for the gate; not used for fitting.
        monitor: labelled batches on which learning decides when to stop; by default every fifth
            of ``batches``, held out from the fit.
        recipe: granularity, rates, whether layers with one position take part.
        z: standard errors that the gate demands.
        incumbent: name and select metrics of what stands, if they are known already.
        forward: called as ``forward(model, batch)`` for unusual batches.
        precision: ``fp32``, ``bf16`` or ``fp16`` for evaluation; learning is in fp32.

    Returns:
        The decisions with all numbers, and the weights now set.

    Raises:
        NormError: if the model has no generalized layer.
        DataError: if there are too few batches to hold some out.

    Changes:
        ``example_weight`` of the layers, if a candidate won.
    Restores:
        Modes, ``requires_grad``, gradients.
    """
    recipe = recipe or WeightRecipe()
    started = time.perf_counter()
    if not list(generalized_norms(model)):
        raise NormError("model: no GeneralizedBatchNorm in it. Call swap_norms_(model) first.")
    batches, select = runtime.hold_out(batches, select, every=4)
    learn, monitor = runtime.hold_out(batches, monitor, every=5)
    layers, excluded = weighable_layers(model, monitor, forward, pointwise=recipe.pointwise)
    name, metrics = incumbent or ("as it was", None)
    if metrics is None:
        metrics = evaluate(model, select, forward=forward, precision=precision)
    search = _Search(model, layers, monitor, learn, forward, precision)
    decisions: list[Decision] = []
    curve: tuple[CurvePoint, ...] = ()
    chosen = "keep"
    for level in LEVELS[: LEVELS.index(recipe.granularity) + 1] if layers else ():
        before = {key: layer.example_weight for key, layer in layers.items()}
        if level == "global":
            curve = search.one_weight()
        else:
            search.learned(level, recipe)
        label = f"example weight per {level}" if level != "global" else "one example weight"
        candidate = evaluate(model, select, forward=forward, precision=precision)
        decision = judge("example weight", (label, candidate), (name, metrics), z)
        decisions.append(decision)
        if decision.admitted:
            chosen, name, metrics = level, label, candidate
        else:
            set_example_weight_(model, before)
    weights = weights_of(model)
    return WeightChoice(
        tuple(decisions),
        chosen,
        curve,
        weights,
        tuple(excluded),
        sum(layer.live for _, layer in generalized_norms(model)),
        search.passes,
        time.perf_counter() - started,
    )


def weights_of(model: nn.Module) -> dict[str, float | list[float]]:
    """The example weight of every generalized layer.

    Args:
        model: any module.

    Returns:
        By dotted name, a number or one a channel.
    """
    return {name: layer.example_weight.tolist() for name, layer in generalized_norms(model)}


def weighable_layers(
    model: nn.Module,
    batches: Iterable[Any],
    forward: runtime.Forward | None = None,
    *,
    pointwise: bool = False,
) -> tuple[dict[str, GeneralizedBatchNorm], list[str]]:
    """The layers whose example weight may be chosen, seen on one batch.

    With a single position the example's variance is 0 and the formula turns into a squashing
    non-linearity, |x_hat| <= sqrt((1-a)/a); such layers take part only with ``pointwise``.

    Args:
        model: with generalized layers.
        batches: the first one is run.
        forward: called as ``forward(model, batch)`` for unusual batches.
        pointwise: also layers with a single position.

    Returns:
        The layers by name, and the names of those that keep their weight.

    Raises:
        DataError: if there is no batch.
    """
    positions: dict[str, int] = {}
    everything = dict(generalized_norms(model))
    names = {id(layer): name for name, layer in everything.items()}

    def look(module: nn.Module, args: tuple[Any, ...]) -> None:
        positions[names[id(module)]] = args[0][0, 0].numel() if len(args[0]) else 0

    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("example weight: no examples. Give at least one batch.")
    with guards.inference(model), guards.hooks() as handles:
        for layer in everything.values():
            handles.append(layer.register_forward_pre_hook(look))
        runtime.run(model, batch, runtime.device_of(model), forward)
    taking_part = {
        name: layer
        for name, layer in everything.items()
        if layer.running_mean is not None and positions.get(name, 0) > (0 if pointwise else 1)
    }
    return taking_part, [name for name in everything if name not in taking_part]


class _Search:
    """The two ways to find weights on the fit examples; counts the passes that they cost."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, GeneralizedBatchNorm],
        monitor: Iterable[Any],
        learn: runtime.Batches,
        forward: runtime.Forward | None,
        precision: str,
    ) -> None:
        self.model, self.layers, self.forward, self.precision = model, layers, forward, precision
        self.monitor, self.learn = monitor, learn
        self.passes = 0.0

    def one_weight(self) -> tuple[CurvePoint, ...]:
        """One weight for all layers by bracketed search; leaves the best one set."""
        points: dict[float, CurvePoint] = {}

        def loss(root: float) -> float:
            a = float(root) ** 2  # the curve is flatter, and the resolution finer, in the root
            if a not in points:
                set_example_weight_(self.model, dict.fromkeys(self.layers, a))
                metrics = self._evaluate(self.learn)
                points[a] = CurvePoint(a, metrics.nll or 0.0, metrics.top1 or 0.0)
            return points[a].nll

        for a in (0.0, *_COARSE):
            loss(a**0.5)
        tried = sorted(points)
        best = min(tried, key=lambda a: points[a].nll)
        low = max([a for a in tried if a < best], default=0.0)
        high = min([a for a in tried if a > best], default=1.0)
        bounds = (low**0.5, high**0.5)
        minimize_scalar(loss, bounds=bounds, method="bounded", options={"maxiter": 5})
        best = min(points, key=lambda a: points[a].nll)
        set_example_weight_(self.model, dict.fromkeys(self.layers, best))
        return tuple(points[a] for a in sorted(points))

    def learned(self, granularity: str, recipe: WeightRecipe) -> None:
        """Weights per layer or channel by projected Adam; leaves the best epoch's set."""
        n_batches = sum(1 for _ in runtime.pass_of(self.learn, 0))
        total = max(1, n_batches * recipe.epochs)
        device = runtime.device_of(self.model)
        best_loss = np.inf
        best: dict[str, Tensor] = {}
        with (
            guards.modes_kept(self.model),
            trainable_weights(self.layers, granularity, recipe.start) as leaves,
            guards.only_these_require_grad(self.model, list(leaves.values())),
        ):
            self.model.eval()
            optimizer = torch.optim.Adam(leaves.values(), lr=recipe.lr)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total)
            for epoch in range(recipe.epochs):
                for batch in runtime.pass_of(self.learn, epoch):
                    optimizer.zero_grad()
                    self._loss(batch, device).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        for leaf in leaves.values():
                            leaf.clamp_(0, 1)
                self.passes += 3
                now = self._evaluate(self.monitor).nll or 0.0
                if now < best_loss:
                    best_loss = now
                    best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        if best:
            set_example_weight_(self.model, best)

    def _loss(self, batch: Any, device: torch.device) -> Tensor:
        logits = runtime.logits_of(runtime.run(self.model, batch, device, self.forward))
        labels = runtime.unpack(batch)[1]
        if labels is None:
            raise DataError("example weight: the batches have no labels to learn from.")
        return F.cross_entropy(logits.float(), torch.as_tensor(labels).to(device))

    def _evaluate(self, batches: runtime.Batches) -> Metrics:
        self.passes += 1
        metrics = evaluate(
            self.model, runtime.pass_of(batches, 0), forward=self.forward, precision=self.precision
        )
        if metrics.nll is None:
            raise DataError("example weight: the batches have no labels to choose by.")
        return metrics
