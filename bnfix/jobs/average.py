"""`average`: the mean of all checkpoints, or of the ones that the gate admits one by one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnfix.checkpoints.several import Ingredients, best_of
from bnfix.core import guards
from bnfix.core.errors import CheckpointError, DataError, NumericError, some
from bnfix.core.settings import AverageRecipe
from bnfix.jobs.fits import Fits, Fitted, State
from bnfix.jobs.session import Plan
from bnfix.metrics.compare import Decision, judge
from bnfix.metrics.metrics import Metrics

MEAN = "mean"


def narrowed(plan: Plan, checkpoint: str | Path) -> tuple[Plan, str | Path, list[str]]:
    """Restrict a plan and its first checkpoint to the best files, if the plan asks for it."""
    recipe = plan.average
    if recipe is None or recipe.best is None:
        return plan, checkpoint, []
    (first, *rest), note = best_of([str(checkpoint), *recipe.files], recipe.best)
    left = dataclasses.replace(recipe, files=tuple(rest))
    return dataclasses.replace(plan, average=left), first, [note]


def check_unlabelled(recipe: AverageRecipe, data: str) -> list[str]:
    """Refuse a method that needs labels; return notes on any other."""
    if recipe.method == "greedy":
        raise DataError(f"{data}: has no labels, and --method greedy needs them.")
    if recipe.statistics != "auto":
        return []
    return [
        "population statistics are used: without labels nothing shows that others are better. "
        "--statistics interpolated uses statistics between the checkpoints'."
    ]


def uniform(fits: Fits, _: State, *, recipe: AverageRecipe) -> Fitted:
    """The mean of all checkpoints; the first one remains the original."""
    found = _open(fits, recipe)
    found.put_(found.which)
    return Fitted(f"mean of {len(found.which)} checkpoints")


def interpolated(fits: Fits, now: State, *, gated: bool) -> Fitted:
    """Interpolate the statistics of the averaged checkpoints, instead of measuring new ones."""
    found = fits.ingredients
    if found is None or len(found.which) < 2:
        return Fitted(None)
    try:
        networks = found.networks()
    except CheckpointError as error:
        if not gated:
            raise
        fits.bench.assumptions.append(f"interpolated statistics were not tried: {error}")
        return Fitted(None)
    fitted = fits.statistics(now, target="interpolated", originals=networks)
    named = f"mean of {len(found.which)} checkpoints, {fitted.name}"
    return dataclasses.replace(fitted, name=named if gated else fitted.name)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Mean(State):
    """A candidate mean, with the positions of its checkpoints."""

    metrics: Metrics  # on the select split
    which: tuple[int, ...]

    @property
    def loss(self) -> float:
        """The loss that orders checkpoints; infinite if it cannot be measured."""
        nll = self.metrics.nll
        return math.inf if nll is None or math.isnan(nll) else nll


def greedy(fits: Fits, now: State, *, recipe: AverageRecipe) -> Fitted:
    """The mean of the checkpoints that improve it, tried in the order of their loss.

    It starts from the best checkpoint as stored, then tries that one with new statistics. Each mean
    is tried with every kind of statistics, since one kind can fit where the other does not. It must
    beat both the mean kept so far and the best checkpoint. Otherwise many small steps could add up
    to a loss or a top-1 that is worse than the best checkpoint's.

    Source: Wortsman et al., "Model soups", 2022, recipe 1. Differs: an equal score is not enough,
    the mean must be better by z standard errors.
    """
    found, z, decisions = _open(fits, recipe), fits.plan.gate.z, list[Decision]()

    def admitted(tried: _Mean, rival: _Mean) -> bool:
        pair = (tried.name, tried.metrics), (rival.name, rival.metrics)
        decisions.append(judge(MEAN, *pair, z))
        return decisions[-1].admitted

    alone = [_alone(fits, found, i, now) for i in range(len(found.names))]
    best, *others = sorted(alone, key=lambda one: one.loss)
    if best.which != (0,):
        found.put_(best.which)
        best = dataclasses.replace(best, values=guards.Snapshot(fits.model))
    kept = best
    for more in [(), *(other.which for other in others)]:
        which = (*kept.which, *more)
        wanted = recipe.statistics if len(which) > 1 else "population"  # one has no other to mix
        for target in ("population", "interpolated") if wanted == "auto" else (wanted,):
            tried = _tried(fits, found, which, target, now)
            if tried and admitted(tried, kept) and (kept is best or admitted(tried, best)):
                kept = tried
    kept.values.restore_()
    found.which = kept.which
    unchanged = kept is best and best.which == (0,)
    return Fitted(None if unchanged else kept.name, kept.results, tuple(decisions))


def _open(fits: Fits, recipe: AverageRecipe) -> Ingredients:
    loaded, stated = fits.bench.loaded, fits.plan.model
    fits.ingredients = found = Ingredients(loaded.model, loaded.checkpoint, recipe, stated)
    fits.bench.assumptions += found.notes
    return found


def _alone(fits: Fits, found: Ingredients, i: int, now: State) -> _Mean:
    """One checkpoint as stored; its values are not kept."""
    name, metrics = f"{found.names[i]} alone", now.metrics if i == 0 else None
    if metrics is None:
        found.put_([i])
        metrics = fits.on_select(name)
    return _Mean(name, now.values, metrics=metrics, which=(i,))


def _tried(
    fits: Fits, found: Ingredients, which: Sequence[int], target: str, now: State
) -> _Mean | None:
    """A mean of checkpoints with new statistics; none if its numbers are not finite or missing."""
    members = some([found.names[i] for i in which])
    of = f"mean of {members}" if len(which) > 1 else members
    try:
        found.put_(which)
        if target == "interpolated":
            fitted = interpolated(fits, now, gated=True)
        else:
            fitted = fits.statistics(now, target=target)
    except NumericError as error:
        fits.bench.assumptions.append(f"{of} ({target}) was given up: {error}")
        return None
    if not fitted.results:
        return None
    name = f"{of}, statistics of the data ({target})"
    metrics, values = fits.on_select(name), guards.Snapshot(fits.model)
    return _Mean(name, values, metrics=metrics, results=fitted.results, which=tuple(which))
