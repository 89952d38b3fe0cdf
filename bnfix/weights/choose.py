"""`choose_example_weight_`: candidates with increasing freedom, each judged by the gate.

The levels are: keep; one weight for the model, by bracketed search; one per layer and one per
channel, by gradient. Each level starts from the last admitted one and is fitted on the fit batches
(a part of them decides when to stop). It takes over only if the gate admits it on the select split.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError, ModelError, count
from bnfix.core.settings import WeightRecipe
from bnfix.metrics.compare import Decision, judge
from bnfix.metrics.evaluate import Score, evaluate, first_look, score
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.task import LABELS, Array, Judged, Task, mean_loss
from bnfix.norm.layer import (
    GeneralizedBatchNorm,
    generalized_norms,
    require_generalized,
    set_example_weight_,
)
from bnfix.norm.mixture import trainable_weights

#: Least number of batches for a fit of a few numbers.
_LEAST_BATCHES = 8


@dataclass(frozen=True)
class CurvePoint:
    """The loss with one weight for the whole model, on the fit examples."""

    example_weight: float
    nll: float
    top1: float


@dataclass
class WeightSearch:
    """Finds weights of some layers on labelled examples, and counts the cost."""

    #: The gate's name for these weights, and for the candidates in order of freedom.
    stage: ClassVar[str] = "example weight"
    names: ClassVar[Mapping[str, str]] = {
        "global": "one example weight",
        "layer": "example weight per layer",
        "channel": "example weight per channel",
    }
    #: The weights tried first, in addition to 0.
    coarse: ClassVar[tuple[float, ...]] = (0.01, 0.03, 0.1, 0.3)

    model: nn.Module
    layers: dict[str, Any]  # generalized layers; for mixtures, any Batch Norm
    monitor: Iterable[Any]
    learn: runtime.Batches
    forward: runtime.Forward | None
    precision: str  # of evaluation; learning is in fp32
    task: Task = LABELS
    n_batches: int = 0  # per pass, like the next two
    n_examples: int = 0
    n_watched: int = 0
    n_run: int = 0  # examples run so far; an example with gradients counts three times
    seconds_an_example: float = 0.0

    @property
    def modules(self) -> nn.ModuleList:
        """The layers as one module, for snapshots."""
        return nn.ModuleList(self.layers.values())

    def set_(self, weights: Mapping[str, Any]) -> None:
        """Set the weights of some layers, one number or one per channel."""
        set_example_weight_(self.model, weights)

    def leaves(self, granularity: str, start: float) -> AbstractContextManager[dict[str, Tensor]]:
        """Let the weights take gradients; restore everything at exit."""
        return trainable_weights(self.layers, granularity, start)

    def one_weight(self) -> tuple[CurvePoint, ...]:
        """Find one weight for all layers by bracketed search; leave the best one set."""
        points: dict[float, CurvePoint] = {}
        self._count()

        def loss(a: float) -> float:
            if a not in points:
                self.set_(dict.fromkeys(self.layers, a))
                # A single number needs few examples: a part of the batches is cheaper.
                found = self._score(itertools.islice(runtime.pass_of(self.learn, 0), self._part(3)))
                points[a] = CurvePoint(a, found.nll, found.top1)
            return points[a].nll

        started = time.perf_counter()
        loss(0.0)
        self.seconds_an_example = (time.perf_counter() - started) / max(self.n_run, 1)
        for a in self.coarse:
            loss(a)
        best_root(loss, {a**0.5: point.nll for a, point in points.items()}, n_steps=5)
        best = min(points, key=lambda a: points[a].nll)
        self.set_(dict.fromkeys(self.layers, best))
        return tuple(points[a] for a in sorted(points))

    def thin(self, part: float, squares: dict[str, Tensor]) -> None:
        """Reset layers that hardly matter to 0: a layer with weight 0 costs nothing."""
        # Layers are reset in the order of their Wald statistics, sum over channels of
        # a^2 E[(dL/da)^2], as long as they lose, including one standard error, less than `part` of
        # the gain on the monitor examples. (This does not work for channels: nearly every one alone
        # is insignificant, but together they are the gain.)
        weights = {name: layer.example_weight for name, layer in self.layers.items()}
        live = {name: weight for name, weight in weights.items() if bool((weight > 0).any())}
        wald = {n: float((w.square() * squares.get(n, 0.0)).sum()) for n, w in live.items()}
        order = sorted(wald, key=lambda name: wald[name])

        def set_without(n: int) -> None:
            set_example_weight_(self.model, weights | dict.fromkeys(order[:n], torch.zeros(())))

        def without(n: int) -> Array:
            set_without(n)
            return self._score(self.monitor).counted

        def lost(n: int) -> float:
            difference = without(n) - full
            # An apparent gain is chance. A loss hidden in the noise cannot be excluded, least of
            # all with few examples.
            error = float(difference.std() / np.sqrt(len(difference)))
            return max(float(difference.mean()), 0.0) + error

        if not part or not order:
            return
        full = without(0)
        limit = part * max(float((without(len(order)) - full).mean()), 0.0)
        low, high = 0, len(order)  # `low` layers are known to be dispensable, `high` are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if lost(middle) <= limit else (low, middle)
        set_without(low)

    def learned(self, granularity: str, recipe: WeightRecipe) -> dict[str, Tensor]:
        """Learn weights per layer or channel by projected Adam; leave the best epoch's set."""
        best_loss, best, squares = np.inf, dict[str, Tensor](), dict[str, Tensor]()
        if not self.n_batches:
            self._count()
        part, epochs = self.n_batches, recipe.epochs
        if granularity == "layer":  # one number per layer needs fewer examples
            part, epochs = self._part(2), min(1, epochs)
        trainable = self.leaves(granularity, recipe.start)
        with (
            guards.random_kept(self.model),
            descent(self.model, self.layers, trainable, recipe.lr, part * epochs) as (leaves, step),
        ):
            for epoch in range(epochs):
                squares = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
                batches = itertools.islice(runtime.pass_of(self.learn, epoch), part)
                for batch in distributed.in_step(batches):
                    n = 0 if batch is None else runtime.n_examples_of(batch)
                    loss = partial(self._loss, batch)
                    if distributed.here().shared:
                        distributed.backward_([loss], [n], leaves.values())
                    else:
                        loss().backward()  # type: ignore[no-untyped-call]
                    for name, leaf in leaves.items():
                        if leaf.grad is not None:
                            squares[name] += leaf.grad.square()
                    step()
                now = self._score(self.monitor).nll
                if now < best_loss:
                    best_loss = now
                    best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        if best:
            self.set_(best)
        return squares

    def _part(self, n: int) -> int:
        """The number of batches in an n-th of a pass, but not too few."""
        return max(1, self.n_batches // n, min(self.n_batches, _LEAST_BATCHES))

    def _loss(self, batch: Any) -> Tensor:
        loss = mean_loss(self.task, self.model, batch, self.forward, what=self.stage)
        if not loss.requires_grad:
            raise ModelError(
                f"{self.stage}: the model's output has no gradient in the weights. Look for "
                "no_grad or detach in the model, or use --granularity global."
            )
        self.n_run += 3 * runtime.n_examples_of(batch) * distributed.here().size
        return loss

    def _score(self, batches: Iterable[Any]) -> Score:
        found = score(
            self.model, batches, self.task, forward=self.forward, precision=self.precision
        )
        self.n_run += found.n_examples
        return found

    def _count(self) -> None:
        """Count the batches and examples of a pass."""
        sizes = [runtime.n_examples_of(batch) for batch in runtime.pass_of(self.learn, 0)]
        watched = sum(runtime.n_examples_of(batch) for batch in self.monitor)
        # All ranks run their batches in parallel.
        counts = distributed.gather((len(sizes), sum(sizes), watched))
        self.n_batches = max(n for n, *_ in counts)
        self.n_examples = sum(n for _, n, _ in counts)
        self.n_watched = sum(n for *_, n in counts)


def best_root(loss: Callable[[float], float], losses: Mapping[float, float], n_steps: int) -> float:
    """The square root of the best weight, searched between the neighbours of the best so far."""
    # As a function of the root, the curve is flatter and the resolution near 0 is finer.
    best = min(losses, key=lambda root: losses[root])
    low = max((root for root in losses if root < best), default=0.0)
    high = min((root for root in losses if root > best), default=1.0)
    from scipy.optimize import minimize_scalar  # takes a second to import

    found = minimize_scalar(
        lambda root: loss(float(root) ** 2),
        bounds=(low, high),
        method="bounded",
        options={"maxiter": n_steps, "xatol": 0.01},
    )
    return min((losses[best], best), (float(found.fun), float(found.x)))[1]


@contextmanager
def descent(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    trainable: AbstractContextManager[dict[str, Tensor]],
    lr: float,
    n_steps: int,
) -> Iterator[tuple[dict[str, Tensor], Callable[[], None]]]:
    """The weights as leaves, in evaluation mode, and an Adam step on them, projected to [0, 1]."""
    with (
        guards.modes_kept(model),
        guards.state_kept(model, but=list(layers.values())),
        trainable as leaves,
        guards.only_these_require_grad(model, list(leaves.values())),
    ):
        model.eval()
        optimizer = torch.optim.Adam(leaves.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, n_steps))

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for leaf in leaves.values():
                leaf.clamp_(0, 1)

        yield leaves, step


@dataclass(frozen=True, repr=False)
class WeightChoice:
    """The candidates, the winner, and the resulting weights."""

    decisions: tuple[Decision, ...]  # one per level tried
    chosen: str  # the level that won: keep, global, layer or channel
    curve: tuple[CurvePoint, ...]  # the search over one weight for the model, by weight
    weights: dict[str, float | list[float]]  # every layer's afterwards, one number or per channel
    excluded: tuple[str, ...]  # layers that keep theirs: single-position maps or no statistics
    n_live: int  # layers with a weight above 0
    #: The cost, in evaluation passes over all given examples: those to learn from, those to stop
    #: by, and the gate's. A pass with gradients counts as 3.
    passes: float
    seconds: float
    #: The time, in evaluation passes at weight 0 on this machine; None if nothing was tried.
    clock_passes: float | None = None

    def __repr__(self) -> str:
        tried = ", ".join(
            f"{d.candidate}: {'admitted' if d.admitted else 'not admitted'}" for d in self.decisions
        )
        return (
            f"WeightChoice({self.chosen}: {self.n_live} of {len(self.weights)} layers live; "
            f"tried {tried or 'nothing'}; {count(self.passes, 'passes')}, {self.seconds:.3g} s)"
        )


def choose_example_weight_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    select: Iterable[Any] | None = None,
    monitor: Iterable[Any] | None = None,
    task: Judged = "auto",
    reference: nn.Module | None = None,
    recipe: WeightRecipe | None = None,
    z: float = 2.0,
    incumbent: tuple[str, Metrics] | None = None,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> WeightChoice:
    """Choose the weight of the example in its own statistics, or keep the present weights.

    Args:
        model: a model with generalized layers, on the device to run on.
        batches: labelled ``(x, y)`` to fit on, or a callable that returns the k-th pass's batches.
        select: labelled batches for the gate; by default every fourth of ``batches``.
        monitor: labelled batches that decide when to stop; by default every fifth of the rest.
        task: the task that the weights are judged by, as in `evaluate`.
        reference: a network whose predictions replace the labels, as in `evaluate`.
        recipe: granularity, learning rate, and whether layers with a single position take part.
        z: number of standard errors that the gate requires.
        incumbent: name and select metrics of the current model, if known.
        forward: called as ``forward(model, batch)``, for batches in an unusual form.
        precision: ``fp32``, ``bf16`` or ``fp16`` for evaluation; learning is in fp32.

    Returns:
        The decisions with all their numbers, and the weights that are now set.

    Raises:
        NormError: if the model has no generalized layer.
        DataError: if there are too few batches to hold some out, or no labels.

    Changes:
        ``example_weight`` of the layers, if a candidate won; nothing after an exception.
    Restores:
        Modes, ``requires_grad``, gradients, random state, and all state that forward changes.
    """
    recipe = recipe or WeightRecipe()
    started = time.perf_counter()
    require_generalized(model)
    learn, watched, chosen_on = _divide(batches, select, monitor)
    layers, excluded = weighable_layers(model, watched, forward, pointwise=recipe.pointwise)
    how: Any = {"task": task, "reference": reference, "forward": forward, "precision": precision}
    measured = partial(evaluate, model, chosen_on, **how)
    name, metrics = incumbent or ("as it was", measured())
    if metrics.examples is None and not metrics.problem:
        raise DataError("example weight: the select batches have no labels to choose by.")
    search = WeightSearch(
        model=model,
        task=metrics.task,
        layers=layers,
        monitor=watched,
        learn=learn,
        forward=forward,
        precision=precision,
    )
    levels = Levels(search, measured, recipe, z, (name, metrics))
    with guards.undone_on_error(search.modules):
        for level in search.names if layers else ():
            levels.try_(level)
            if level == recipe.granularity:
                break
        levels.thin_later()
    seconds = time.perf_counter() - started
    n_given = search.n_examples + search.n_watched + levels.incumbent[1].n_examples
    pass_seconds = search.seconds_an_example * n_given
    return WeightChoice(
        decisions=tuple(levels.decisions.values()),
        chosen=levels.chosen,
        curve=levels.curve,
        weights=weights_of(model),
        excluded=tuple(excluded),
        n_live=sum(layer.weighs for _, layer in generalized_norms(model)),
        passes=search.n_run / n_given,
        seconds=seconds,
        clock_passes=seconds / pass_seconds if pass_seconds else None,
    )


class Levels:
    """Candidates with increasing freedom; each starts from the last admitted one."""

    def __init__(
        self,
        search: WeightSearch,
        measured: Callable[[], Metrics],
        recipe: WeightRecipe,
        z: float,
        incumbent: tuple[str, Metrics],
    ) -> None:
        self._search, self._measured, self._recipe, self._z = search, measured, recipe, z
        self.incumbent = self._below = incumbent
        self.decisions: dict[str, Decision] = {}
        self.chosen, self.curve = "keep", tuple[CurvePoint, ...]()
        self._squares: dict[str, dict[str, Tensor]] = {}  # gradients, by level and layer
        self._admitted = guards.Snapshot(search.modules)

    def _judge(self, level: str, incumbent: tuple[str, Metrics]) -> tuple[Decision, Metrics]:
        found = self._measured()
        self._search.n_run += found.n_examples
        named = self._search.names[level], found
        return judge(self._search.stage, named, incumbent, self._z), found

    def try_(self, level: str) -> None:
        """Fit a level and keep it if the gate admits it."""
        if level == "global":
            self.curve = self._search.one_weight()
        else:
            self._squares[level] = self._search.learned(level, self._recipe)
        if level == self._recipe.granularity != "global" and self._recipe.thin:
            self._search.thin(self._recipe.thin, self._squares[level])
        decision, metrics = self._judge(level, self.incumbent)
        self.decisions[level] = decision
        if decision.admitted:
            self._below, self.incumbent = self.incumbent, (decision.candidate, metrics)
            self.chosen, self._admitted = level, guards.Snapshot(self._search.modules)
        else:
            self.put_back_()

    def put_back_(self) -> None:
        """Restore the last admitted level."""
        self._admitted.restore_()

    def thin_later(self) -> None:
        """Thin the per-layer weights if this was left to a finer level that was not admitted."""
        if self.chosen != "layer" or self._recipe.granularity == "layer":
            return
        self._search.thin(self._recipe.thin, self._squares["layer"])
        # Judged against the same incumbent as before thinning, which loses some of the gain.
        decision, _ = self._judge("layer", self._below)
        if decision.admitted:
            self.decisions["layer"] = decision
        else:
            self._admitted.restore_()


def weights_of(model: nn.Module) -> dict[str, float | list[float]]:
    """The example weight of every generalized layer."""
    return {name: layer.example_weight.tolist() for name, layer in generalized_norms(model)}


def weighable_layers(
    model: nn.Module,
    batches: Iterable[Any],
    forward: runtime.Forward | None = None,
    *,
    pointwise: bool = False,
    beside_batch: bool = False,
) -> tuple[dict[str, GeneralizedBatchNorm], list[str]]:
    """The layers whose example weight can be chosen, found on one batch; names of the others.

    ``beside_batch`` includes layers with a batch weight, which limits the example's.
    """
    # With a single position the example's variance is 0 and the formula turns into a squashing
    # nonlinearity, |x_hat| <= sqrt((1-a)/a). Such layers take part only with `pointwise`. For a
    # layer called more than once, its smallest feature map counts; unreached layers are excluded.
    everything = dict(generalized_norms(model))
    fewest: dict[str, int] = {}
    for calls, _ in first_look("example weight", model, everything, batches, forward):
        for name, positions in calls:
            fewest[name] = min(positions, fewest.get(name, positions))
    taking_part = {
        name: layer
        for name, layer in everything.items()
        if layer.running_mean is not None
        and fewest.get(name, 0) > (0 if pointwise else 1)
        and (beside_batch or not layer.uses_batch)
    }
    return taking_part, [name for name in everything if name not in taking_part]


def _divide(
    batches: runtime.Batches, select: Iterable[Any] | None, monitor: Iterable[Any] | None
) -> tuple[runtime.Batches, Iterable[Any], Iterable[Any]]:
    """The batches to learn from, to stop by, and for the gate; all can be read repeatedly."""
    if select is None or monitor is None:
        batches = list(runtime.pass_of(batches, 0))
        least = 1 + (select is None) + (monitor is None)
        if len(batches) < least:
            raise DataError(
                f"batches: {len(batches)}, expected at least {least}: some are held out for the "
                "gate and for early stopping. Give smaller batches, or the held-out ones yourself."
            )
    batches, select = runtime.hold_out(batches, select, every=4)
    learn, monitor = runtime.hold_out(batches, monitor, every=5)
    return learn, monitor, select
