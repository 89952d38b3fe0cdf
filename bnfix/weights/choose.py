"""`choose_example_weight_`: candidates in rising freedom, each before the gate.

keep; one weight for the model by bracketed search; one a layer; one a channel, by gradient. Every
level starts from the last that was admitted, is fitted on the fit batches (a part of them decides
when to stop), and takes over only if the gate admits it on the select batches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError
from bnfix.core.settings import WeightRecipe
from bnfix.metrics.compare import Decision, judge
from bnfix.metrics.evaluate import evaluate
from bnfix.metrics.metrics import Metrics
from bnfix.norm.layer import (
    GeneralizedBatchNorm,
    generalized_norms,
    require_generalized,
)
from bnfix.weights.search import CurvePoint, WeightSearch

#: In rising freedom.
_LABELS = {
    "global": "one example weight",
    "layer": "example weight per layer",
    "channel": "example weight per channel",
}


@dataclass(frozen=True, repr=False)
class WeightChoice:
    """The candidates, the one that won, and by how much."""

    decisions: tuple[Decision, ...]  # one a level tried
    chosen: str  # the level that won: keep, global, layer or channel
    curve: tuple[CurvePoint, ...]  # the search over one weight for the model, by weight
    weights: dict[str, float | list[float]]  # of every layer afterwards, a number or one a channel
    excluded: tuple[str, ...]  # layers that keep theirs: a single position a map, or no statistics
    n_live: int  # layers with a weight above 0
    #: In evaluation passes over all examples given: those learned from, those that say when to
    #: stop, and the gate's. One with gradients counts as 3.
    passes: float
    seconds: float
    #: The same time in passes as long as they took here with weight 0; None if nothing was tried.
    clock_passes: float | None = None

    def __repr__(self) -> str:
        tried = ", ".join(
            f"{d.candidate}: {'admitted' if d.admitted else 'not admitted'}" for d in self.decisions
        )
        return (
            f"WeightChoice({self.chosen}: {self.n_live} of {len(self.weights)} layers live; "
            f"tried {tried or 'nothing'}; {self.passes:.3g} passes, {self.seconds:.3g} s)"
        )


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
        incumbent: name and select metrics of the current model, if known.
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
        Modes, ``requires_grad``, gradients, random state, and what forward changes by itself.
    """
    recipe = recipe or WeightRecipe()
    started = time.perf_counter()
    require_generalized(model)
    learn, watched, chosen_on = _divide(batches, select, monitor)
    layers, excluded = weighable_layers(model, watched, forward, pointwise=recipe.pointwise)
    name, metrics = incumbent or ("as it was", None)
    if metrics is None:
        metrics = evaluate(model, chosen_on, forward=forward, precision=precision)
    if metrics.examples is None and not metrics.problem:
        raise DataError("example weight: the select batches have no labels to choose by.")
    search = WeightSearch(model, layers, watched, learn, forward, precision)
    levels = _Levels(search, partial(evaluate, model, chosen_on), recipe, z, (name, metrics))
    before = guards.Snapshot(nn.ModuleList(layers.values()))
    try:
        for level in _LABELS if layers else ():
            levels.try_(level)
            if level == recipe.granularity:
                break
        levels.thin_later()
    except BaseException:
        before.restore_()
        raise
    seconds = time.perf_counter() - started
    n_given = search.n_examples + search.n_watched + levels.incumbent[1].n_examples
    pass_seconds = search.seconds_an_example * n_given
    return WeightChoice(
        decisions=tuple(levels.decisions.values()),
        chosen=levels.chosen,
        curve=levels.curve,
        weights=weights_of(model),
        excluded=tuple(excluded),
        n_live=sum(layer.live for _, layer in generalized_norms(model)),
        passes=search.n_run / n_given,
        seconds=seconds,
        clock_passes=seconds / pass_seconds if pass_seconds else None,
    )


class _Levels:
    """Candidates in rising freedom: each starts from the last that was admitted."""

    def __init__(
        self,
        search: WeightSearch,
        evaluated: Callable[..., Metrics],
        recipe: WeightRecipe,
        z: float,
        incumbent: tuple[str, Metrics],
    ) -> None:
        self._search, self._recipe, self._z = search, recipe, z
        self._evaluated = partial(evaluated, forward=search.forward, precision=search.precision)
        self.incumbent = self._below = incumbent
        self.decisions: dict[str, Decision] = {}
        self.chosen, self.curve = "keep", tuple[CurvePoint, ...]()
        self._squares: dict[str, dict[str, Tensor]] = {}
        self._admitted = self._snapshot()

    def _snapshot(self) -> guards.Snapshot:
        return guards.Snapshot(nn.ModuleList(self._search.layers.values()))

    def _judge(self, level: str, incumbent: tuple[str, Metrics]) -> tuple[Decision, Metrics]:
        found = self._evaluated()
        self._search.n_run += found.n_examples
        return judge("example weight", (_LABELS[level], found), incumbent, self._z), found

    def try_(self, level: str) -> None:
        """Fit a level, and keep it if the gate admits it."""
        if level == "global":
            self.curve = self._search.one_weight()
        else:
            self._squares[level] = self._search.learned(level, self._recipe)
        if level == self._recipe.granularity != "global":
            self._search.thin(self._recipe.thin, self._squares[level])
        decision, metrics = self._judge(level, self.incumbent)
        self.decisions[level] = decision
        if decision.admitted:
            self._below, self.incumbent = self.incumbent, (_LABELS[level], metrics)
            self.chosen, self._admitted = level, self._snapshot()
        else:
            self._admitted.restore_()

    def thin_later(self) -> None:
        """Thin the layers' weights, if that was left for a finer level that was not admitted."""
        if self.chosen != "layer" or self._recipe.granularity == "layer":
            return
        self._search.thin(self._recipe.thin, self._squares["layer"])
        # Against what the layers' weights were admitted against, of which thinning gives up a part.
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
) -> tuple[dict[str, GeneralizedBatchNorm], list[str]]:
    """The layers whose example weight may be chosen, seen on one batch.

    With a single position the example's variance is 0 and the formula turns into a squashing
    non-linearity, |x_hat| <= sqrt((1-a)/a); such layers take part only with ``pointwise``. A layer
    that is called more than once counts by its smallest map, one that is not reached never.
    """
    everything = dict(generalized_norms(model))

    def look_at_one() -> dict[str, int] | None:
        positions: dict[str, int] = {}

        def look(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            seen = output[0, 0].numel() if len(output) else 0
            positions[name] = min(seen, positions.get(name, seen))

        batch = next(iter(batches), None)
        if batch is None:
            return None
        with guards.inference(model), guards.hooks() as handles:
            for name, layer in everything.items():
                handles.append(layer.register_forward_hook(partial(look, name)))
            runtime.run(model, batch, runtime.device_of(model), forward)
        return positions

    ranks = [seen for seen in distributed.together(look_at_one) if seen is not None]
    if not ranks:
        raise DataError("example weight: no examples. Give at least one batch.")
    positions = {
        name: min((seen[name] for seen in ranks if name in seen), default=0) for name in everything
    }
    taking_part = {
        name: layer
        for name, layer in everything.items()
        if layer.running_mean is not None and positions[name] > (0 if pointwise else 1)
    }
    return taking_part, [name for name in everything if name not in taking_part]


def _divide(
    batches: runtime.Batches, select: Iterable[Any] | None, monitor: Iterable[Any] | None
) -> tuple[runtime.Batches, Iterable[Any], Iterable[Any]]:
    """Batches to learn from, to stop by, and for the gate; each can be read repeatedly."""
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
