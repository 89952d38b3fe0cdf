"""`choose_example_weight_`: candidates in rising freedom, each before the gate.

keep; one weight for the model by bracketed search; one a layer; one a channel, by gradient. Every
level starts from what stands, is fitted on the fit batches (a part of them watches for the right
moment to stop), and takes over only if the gate lets it on the select batches.
"""

from __future__ import annotations

import itertools
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
from bnfix.errors import DataError, ModelError, NormError
from bnfix.evaluation import Metrics, Score, evaluate, labels_of, score
from bnfix.gate import Decision, judge
from bnfix.norms import (
    GeneralizedBatchNorm,
    generalized_norms,
    set_example_weight_,
    trainable_weights,
)
from bnfix.recipe import WeightRecipe

LEVELS = ("global", "layer", "channel")
#: Batches on which the search over one number stands at least.
_LEAST_BATCHES = 8
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
        passes: what fitting cost, in passes over the examples that it learns from; a pass with
            gradients counts as 3, and watching for the right moment to stop counts too.
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
        batches: labelled ``(x, y)`` to fit on, or a callable that gives those of the k-th pass.
            If ``select`` or ``monitor`` is not given they are read into a list, and every fourth
            batch is held out for the gate.
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
        DataError: if there are too few batches to hold some out, or no labels.

    Changes:
        ``example_weight`` of the layers, if a candidate won; nothing after an exception.
    Restores:
        Modes, ``requires_grad``, gradients.
    """
    recipe = recipe or WeightRecipe()
    started = time.perf_counter()
    if not list(generalized_norms(model)):
        raise NormError("model: no GeneralizedBatchNorm in it. Call swap_norms_(model) first.")
    learn, watched, chosen_on = _divide(batches, select, monitor)
    layers, excluded = weighable_layers(model, watched, forward, pointwise=recipe.pointwise)
    name, metrics = incumbent or ("as it was", None)
    if metrics is None:
        metrics = evaluate(model, chosen_on, forward=forward, precision=precision)
    if metrics.examples is None:
        raise DataError("example weight: the select batches have no labels to choose by.")
    search = _Search(model, layers, watched, learn, forward, precision)
    decisions: list[Decision] = []
    curve: tuple[CurvePoint, ...] = ()
    chosen = "keep"
    at_first = standing = guards.Snapshot(nn.ModuleList(layers.values()))
    try:
        for level in LEVELS[: LEVELS.index(recipe.granularity) + 1] if layers else ():
            if level == "global":
                curve = search.one_weight()
            else:
                search.learned(level, recipe)
                search.thin(recipe.thin)
            label = f"example weight per {level}" if level != "global" else "one example weight"
            candidate = evaluate(model, chosen_on, forward=forward, precision=precision)
            decision = judge("example weight", (label, candidate), (name, metrics), z)
            decisions.append(decision)
            if decision.admitted:
                chosen, name, metrics = level, label, candidate
                standing = guards.Snapshot(nn.ModuleList(layers.values()))
            else:
                standing.restore_()
    except BaseException:
        at_first.restore_()
        raise
    return WeightChoice(
        tuple(decisions),
        chosen,
        curve,
        weights_of(model),
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
    non-linearity, |x_hat| <= sqrt((1-a)/a); such layers take part only with ``pointwise``. A layer
    that is called more than once counts by its smallest map, one that is not reached never.

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

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = output[0, 0].numel() if len(output) else 0
        name = names[id(module)]
        positions[name] = min(seen, positions.get(name, seen))

    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("example weight: no examples. Give at least one batch.")
    with guards.inference(model), guards.hooks() as handles:
        for layer in everything.values():
            handles.append(layer.register_forward_hook(look))
        runtime.run(model, batch, runtime.device_of(model), forward)
    taking_part = {
        name: layer
        for name, layer in everything.items()
        if layer.running_mean is not None and positions.get(name, 0) > (0 if pointwise else 1)
    }
    return taking_part, [name for name in everything if name not in taking_part]


def _divide(
    batches: runtime.Batches, select: Iterable[Any] | None, monitor: Iterable[Any] | None
) -> tuple[runtime.Batches, Iterable[Any], Iterable[Any]]:
    """Batches to learn from, to stop by, and for the gate; each can be gone through repeatedly."""
    if select is None or monitor is None:
        batches = list(runtime.pass_of(batches, 0))
        least = 1 + (select is None) + (monitor is None)
        if len(batches) < least:
            raise DataError(
                f"batches: {len(batches)}, expected at least {least} so that some can be held out "
                "for the gate and to stop by. Give smaller batches, or give the held-out ones "
                "yourself."
            )
    batches, select = runtime.hold_out(batches, select, every=4)
    learn, monitor = runtime.hold_out(batches, monitor, every=5)
    return learn, monitor, select


class _Search:
    """The two ways to find weights on the fit examples; counts what they cost."""

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
        self.n_batches = self.n_examples = 0
        self._squared_gradients: dict[str, Tensor] = {}
        self._n_run = 0

    @property
    def passes(self) -> float:
        """Examples run, in passes over those learned from; with gradients three times."""
        return self._n_run / max(self.n_examples, 1)

    def one_weight(self) -> tuple[CurvePoint, ...]:
        """One weight for all layers by bracketed search; leaves the best one set."""
        points: dict[float, CurvePoint] = {}

        self._count()

        def loss(a: float) -> float:
            if a not in points:
                set_example_weight_(self.model, dict.fromkeys(self.layers, a))
                # One number needs few examples: a part of the batches is as good, and cheaper.
                part = max(1, self.n_batches // 3, min(self.n_batches, _LEAST_BATCHES))
                found = self._score(itertools.islice(runtime.pass_of(self.learn, 0), part))
                points[a] = CurvePoint(a, found.nll, found.top1)
            return points[a].nll

        for a in (0.0, *_COARSE):
            loss(a)
        tried = sorted(points)
        best = min(tried, key=lambda a: points[a].nll)
        low = max([a for a in tried if a < best], default=0.0)
        high = min([a for a in tried if a > best], default=1.0)
        minimize_scalar(
            lambda root: loss(
                float(root) ** 2
            ),  # the curve is flatter, resolution finer, in sqrt(a)
            bounds=(low**0.5, high**0.5),
            method="bounded",
            options={"maxiter": 5, "xatol": 0.01},
        )
        best = min(points, key=lambda a: points[a].nll)
        set_example_weight_(self.model, dict.fromkeys(self.layers, best))
        return tuple(points[a] for a in sorted(points))

    def thin(self, part: float) -> None:
        """Set layers back to 0 that hardly matter: a layer with weight 0 costs nothing.

        In the order of their Wald statistics, sum over channels of a^2 E[(dL/da)^2], as many as
        together give up less than ``part`` of what the weights have gained on the monitor
        examples. (Channels cannot be told apart so: nearly every single one is insignificant, and
        all of them together are the gain.)
        """
        weights = {name: layer.example_weight for name, layer in self.layers.items()}
        squares = self._squared_gradients
        wald = {n: float((w.square() * squares.get(n, 0.0)).sum()) for n, w in weights.items()}
        order = sorted(wald, key=lambda name: wald[name])
        order = [name for name in order if bool((weights[name] > 0).any())]

        def without(n: int) -> float:
            zeros = {name: torch.zeros(()) for name in order[:n]}
            set_example_weight_(self.model, {**weights, **zeros})
            return self._score(self.monitor).nll

        if not part or not order:
            return
        full, none = without(0), without(len(order))
        limit = full + part * max(none - full, 0.0)
        low, high = 0, len(order)  # low layers are known to be dispensable, high are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if without(middle) <= limit else (low, middle)
        zeros = {name: torch.zeros(()) for name in order[:low]}
        set_example_weight_(self.model, {**weights, **zeros})

    def learned(self, granularity: str, recipe: WeightRecipe) -> None:
        """Weights per layer or channel by projected Adam; leaves the best epoch's set."""
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
            epochs = recipe.epochs if granularity == "channel" else min(1, recipe.epochs)
            n_steps = max(1, self.n_batches * epochs)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
            for epoch in range(epochs):
                self._squared_gradients = {n: torch.zeros_like(v) for n, v in leaves.items()}
                for batch in runtime.pass_of(self.learn, epoch):
                    optimizer.zero_grad()
                    self._loss(batch, device).backward()  # type: ignore[no-untyped-call]
                    for name, leaf in leaves.items():
                        if leaf.grad is not None:
                            self._squared_gradients[name] += leaf.grad.square()
                    optimizer.step()
                    schedule.step()
                    with torch.no_grad():
                        for leaf in leaves.values():
                            leaf.clamp_(0, 1)
                now = self._score(self.monitor).nll
                if now < best_loss:
                    best_loss = now
                    best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        if best:
            set_example_weight_(self.model, best)

    def _loss(self, batch: Any, device: torch.device) -> Tensor:
        logits = runtime.logits_of(runtime.run(self.model, batch, device, self.forward))
        labels = labels_of(batch, *logits.shape)
        if labels is None:
            raise DataError("example weight: a batch has no labels to learn from. Give (x, y).")
        if not logits.requires_grad:
            raise ModelError(
                "example weight: the model's output has no gradient in the weights. Look for "
                "no_grad or detach in the model, or use --granularity global."
            )
        self._n_run += 3 * len(labels)
        return F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device))

    def _score(self, batches: Iterable[Any]) -> Score:
        found = score(self.model, batches, forward=self.forward, precision=self.precision)
        self._n_run += found.n_examples
        return found

    def _count(self) -> None:
        """Batches and examples of a pass, counted once."""
        if not self.n_batches:
            for batch in runtime.pass_of(self.learn, 0):
                inputs = runtime.unpack(batch)[0] if self.forward is None else batch
                self.n_batches += 1
                self.n_examples += len(inputs) if hasattr(inputs, "__len__") else 1
