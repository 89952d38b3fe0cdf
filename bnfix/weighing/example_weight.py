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

from torch import Tensor, nn

from bnfix import guards, processes, runtime
from bnfix.errors import DataError
from bnfix.layers.norms import (
    GeneralizedBatchNorm,
    generalized_norms,
    require_generalized,
)
from bnfix.measuring.evaluation import evaluate
from bnfix.measuring.gate import Decision, judge
from bnfix.measuring.metrics import Metrics
from bnfix.recipe import WeightRecipe
from bnfix.weighing.weight_search import CurvePoint, WeightSearch

LEVELS = ("global", "layer", "channel")
_LABELS = {
    "global": "one example weight",
    "layer": "example weight per layer",
    "channel": "example weight per channel",
}


@dataclass(frozen=True, repr=False)
class WeightChoice:
    """What was tried, what won, by how much.

    Args:
        decisions: one a level tried.
        chosen: the level that won: ``keep``, ``global``, ``layer`` or ``channel``.
        curve: the search over one weight for the model, sorted by weight.
        weights: the weight of every layer after the choice, a number or one a channel.
        excluded: layers that keep their weight: a single position a map, or no statistics.
        n_live: layers with a weight above 0.
        passes: what it cost, in evaluation passes over all examples given: those learned from,
            those that say when to stop, and the gate's. One with gradients counts as 3.
        seconds: wall-clock time.
        clock_passes: the same time in such passes, as long as they took here with weight 0;
            ``None`` if nothing was tried.
    """

    decisions: tuple[Decision, ...]
    chosen: str
    curve: tuple[CurvePoint, ...]
    weights: dict[str, float | list[float]]
    excluded: tuple[str, ...]
    n_live: int
    passes: float
    seconds: float
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

    def judged(level: str, incumbent: tuple[str, Metrics]) -> tuple[Decision, Metrics]:
        found = evaluate(model, chosen_on, forward=forward, precision=precision)
        search.n_run += found.n_examples
        return judge("example weight", (_LABELS[level], found), incumbent, z), found

    below, squares = (name, metrics), dict[str, dict[str, Tensor]]()
    decisions: list[Decision] = []
    curve: tuple[CurvePoint, ...] = ()
    chosen = "keep"
    at_first = standing = guards.Snapshot(nn.ModuleList(layers.values()))
    try:
        for level in LEVELS[: LEVELS.index(recipe.granularity) + 1] if layers else ():
            if level == "global":
                curve = search.one_weight()
            else:
                squares[level] = search.learned(level, recipe)
            if level == recipe.granularity != "global":
                search.thin(recipe.thin, squares[level])
            decision, candidate = judged(level, (name, metrics))
            decisions.append(decision)
            if decision.admitted:
                below = name, metrics
                chosen, name, metrics = level, _LABELS[level], candidate
                standing = guards.Snapshot(nn.ModuleList(layers.values()))
            else:
                standing.restore_()
        if chosen == "layer" != recipe.granularity:
            # Thinning was left for the finer level, which was not admitted.
            search.thin(recipe.thin, squares["layer"])
            decision, _ = judged("layer", below)
            if decision.admitted:
                decisions[-2] = decision
            else:
                standing.restore_()
    except BaseException:
        at_first.restore_()
        raise
    seconds = time.perf_counter() - started
    n_given = search.n_examples + search.n_watched + metrics.n_examples
    pass_seconds = search.seconds_an_example * n_given
    return WeightChoice(
        decisions=tuple(decisions),
        chosen=chosen,
        curve=curve,
        weights=weights_of(model),
        excluded=tuple(excluded),
        n_live=sum(layer.live for _, layer in generalized_norms(model)),
        passes=search.n_run / n_given,
        seconds=seconds,
        clock_passes=seconds / pass_seconds if pass_seconds else None,
    )


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
    positions: dict[str, int] = {}
    everything = dict(generalized_norms(model))
    names = {id(layer): name for name, layer in everything.items()}

    def look(module: nn.Module, args: Any, output: Tensor) -> None:
        seen = output[0, 0].numel() if len(output) else 0
        name = names[id(module)]
        positions[name] = min(seen, positions.get(name, seen))

    def look_at_one() -> bool:
        batch = next(iter(batches), None)
        if batch is None:
            return False
        with guards.inference(model), guards.hooks() as handles:
            for layer in everything.values():
                handles.append(layer.register_forward_hook(look))
            runtime.run(model, batch, runtime.device_of(model), forward)
        return True

    if not any(processes.together(look_at_one)):
        raise DataError("example weight: no examples. Give at least one batch.")
    for seen in processes.gather(positions):
        for name, n in seen.items():
            positions[name] = min(n, positions.get(name, n))
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
