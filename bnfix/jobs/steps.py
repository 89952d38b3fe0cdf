"""The steps of a command, resolved once from its plan: what is done, in order, and at what cost.

No other file knows the order. Statistics are never left stale: weights trained in training mode are
followed by new statistics; weights tuned with frozen statistics have those as part of the result.
The cheaper candidate at inference comes first, so it wins ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bnfix.core.errors import DataError
from bnfix.core.settings import (
    LABEL_FREE,
    AverageRecipe,
    FinetuneRecipe,
    StatisticsRecipe,
    WeightRecipe,
)
from bnfix.jobs.average import MEAN, check_unlabelled, greedy, interpolated, narrowed, uniform
from bnfix.jobs.convert import swap_
from bnfix.jobs.fits import BATCH_WEIGHT_EXAMPLES, BATCH_WEIGHTS, Fits, Fitted, State
from bnfix.jobs.head import TEMPERATURE, temperature
from bnfix.jobs.inputs import Track
from bnfix.jobs.session import (
    Plan,
    Workbench,
    blends_by_default,
    describe_unjudged,
    open_workbench,
    without_live_layers,
)
from bnfix.metrics.robustness import MOST_IMAGES
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.refit import REFIT_SAMPLES

STATISTICS, WEIGHT, TUNING = "statistics", "example weight", "fine-tuning"
BATCH = "batch weight"
#: The search of one global weight tries so many, each on a third of the examples.
_TRIED_WEIGHTS = 10
#: Steps of a reference's candidate, at least.
_LEAST_STEPS = 100
#: Fits without labels: one pass in training mode, then some tried weights.
_LABEL_FREE_PASSES = 12


@dataclass(frozen=True)
class Work:
    """Passes of one stage."""

    stage: str  # in words
    examples: int  # in one pass
    passes: float  # parts of a pass count as such
    cost: str = "forward"  # as stored; `live`: with weighed examples; `training`: with gradients


@dataclass(frozen=True)
class Step:
    """One step: a fit, and who judges it.

    ``gate`` is ``select`` (the select split), ``monitor`` (the fit's own early stopping), ``none``
    for what is done by default where nothing can be judged, or empty for what was stated, which
    stays whatever it costs. A step starts from the state ``kept`` so
    far, from the ``base``, which is the one after the statistics, from the ``input``, or from a
    state that an earlier step ``leaves`` under a name, kept or not.
    """

    name: str
    stage: str
    fit: Callable[[Fits, State], Fitted]
    work: tuple[Work, ...] = ()
    gate: str = "select"
    start: str = "kept"
    leaves: str = ""


@dataclass(frozen=True)
class _Sizes:
    """Numbers that the cost of steps depends on; of no session, all 0 or 1."""

    fit: int = 0
    select: int = 0
    learn: int = 0
    monitor: int = 0
    layers: int = 1
    of_images: bool = False  # which can be varied
    feed_passes: float = 1.0
    by_depth: float = 1.0  # passes of the sequential feed where memory is short
    training_batch: Callable[[int | None], int] = lambda stated: stated or 64


def resolve(plan: Plan, bench: Workbench | None = None) -> list[Step]:
    """The steps of a plan; without a session as if there were labels, and without costs."""
    n = _Sizes() if bench is None else _sizes(plan, bench)
    if plan.command == "finetune":
        return _alone(plan, n, bench)
    judged = bench is None or bench.judged
    labelled = bench is None or bench.labelled
    steps = []
    if plan.average is not None:
        steps += _mean(plan.average, plan.statistics, n, labelled=labelled)
    else:
        steps += _statistics(plan, n, judged=judged, labelled=labelled)
    weight, b = plan.weight.example_weight, plan.statistics.train_batch_size
    if weight == "match" and b is not None:
        weight = 1 / b
    if not isinstance(weight, str):
        fit = partial(Fits.weight, value=float(weight))
        steps.append(Step(f"example weight {weight:.3g}", WEIGHT, fit, gate=""))
    elif weight in LABEL_FREE and b is not None:
        fit = partial(Fits.label_free, how=weight, train_batch_size=b)
        work = (Work(f"example weight: {weight}", n.fit, _LABEL_FREE_PASSES, "live"),)
        steps.append(Step(f"example weight: {weight}", WEIGHT, fit, work, gate=""))
    batch = plan.weight.batch_weight
    if not isinstance(batch, str):
        fit = partial(Fits.batch_weight, value=float(batch))
        steps.append(Step(f"batch weight {batch:.3g}", WEIGHT, fit, gate=""))
    if plan.gate.temperature == "auto" and labelled:
        # Before all that is judged, which then has to win by more than a temperature does.
        place = next((k for k, step in enumerate(steps) if step.gate == "select"), len(steps))
        cost = Work(TEMPERATURE, n.fit, 1), Work(f"select: {TEMPERATURE}", n.select, 1)
        steps.insert(place, Step("temperature of the logits", TEMPERATURE, temperature, cost))
    # Without labels it takes a reference to learn from; weights act where labels show a gain.
    steps += _distilling(plan, n) if judged else []
    if not labelled:
        return steps
    steps += _tuning(plan, n)
    if batch == "auto":
        # The last one, since it makes predictions depend on each other.
        used = min(n.fit, BATCH_WEIGHT_EXAMPLES)
        passes: tuple[Work, ...] = (
            Work("batch weight: fit", used, len(BATCH_WEIGHTS), "live"),
            Work("select: batch weight", n.select, 4, "live"),
        )
        if plan.weight.granularity == "channel":
            epochs = plan.weight.epochs
            passes += (
                Work("batch weight: per channel", n.learn, epochs, "training"),
                Work("batch weight: watching", n.monitor, epochs, "live"),
                Work("select: batch weight per channel", n.select, 4, "live"),
            )
        steps.append(Step("batch weight, on fit", BATCH, Fits.chosen_batch_weight, passes))
    return steps


def is_gated(steps: list[Step]) -> bool:
    """Whether anything is judged on the select split."""
    return any(step.gate == "select" for step in steps)


def work_of(plan: Plan, bench: Workbench) -> list[Work]:
    """All passes of a command where every candidate is tried."""
    steps, n_test = resolve(plan, bench), len(bench.split.test)
    work = [work for step in steps for work in step.work]
    n_networks = 1 if bench.reference is None else 2
    if is_gated(steps):
        passes = 1 if bench.labelled else n_networks
        work.append(Work("select: the input", len(bench.split.select), passes))
    if any(step.stage == STATISTICS for step in steps):
        work.append(Work("residual of the statistics", len(bench.split.fit), 1, "live"))
    if n_test and (bench.test.images.labelled or bench.reference):
        work += [
            Work("test: the input", n_test, n_networks),
            Work("test: the output", n_test, 1, "live"),
        ]
    n_moved = min(MOST_IMAGES, len(bench.everything))
    return [*work, Work("how far the outputs moved", n_moved, 2, "live")]


def fractions(plan: Plan) -> tuple[float, float, float]:
    """Fit, select and test parts of the data."""
    given, gate = plan.source.test is not None, plan.gate
    if plan.command == "finetune":
        return (1.0, 0.0, 0.0) if given else (0.8, 0.0, 0.2)
    gated, labelled = is_gated(resolve(plan)), plan.source.labels != "none"
    if plan.average is not None and labelled and not given and not gated:
        return 0.8, 0.0, 0.2
    if not gated or not (labelled or plan.statistics.reference):
        return 1.0, 0.0, 0.0
    both = gate.fit + gate.select_part
    if isinstance(gate.select, str):
        return (1.0, 0.0, 0.0) if given else (both, 0.0, 1 - both)
    if given:
        return 1 - gate.select / both, gate.select / both, 0.0
    return gate.fit, gate.select, 1 - both


def open_plan(
    plan: Plan, checkpoint: str | Path, data: str | Sequence[str], model: str | None, track: Track
) -> Workbench:
    """Open the checkpoint and the data of a plan, cut the data, swap the norm layers."""
    if model is not None:
        plan = replace(plan, model=replace(plan.model, model=model))
    # One of them is as a text; and messages name them all.
    data = data[0] if not isinstance(data, str) and len(data) == 1 else data
    plan, checkpoint, chosen = narrowed(without_live_layers(plan), checkpoint)
    bench = open_workbench(checkpoint, data, plan, fractions(plan), track)
    bench.assumptions += chosen
    if bench.loaded.checkpoint.borrowed and plan.statistics.statistics == "auto":
        # Its statistics belong to other weights.
        measured = replace(plan.statistics, statistics="population")
        plan = bench.plan = replace(plan, statistics=measured)
    notes, tune = bench.assumptions, plan.finetune
    if tune is not None and not bench.judged:
        if plan.command != "fix":
            raise DataError(
                f"{data}: has no labels, and fine-tuning needs them. Give labelled data, or "
                "the undamaged network to learn from (--reference)."
            )
        notes.append("fine-tuning was not tried: the data has no labels.")
    if plan.average is not None and not bench.labelled:
        notes += check_unlabelled(plan.average, bench.inputs.images.spec)
        if plan.source.test is None:
            bench.fit_on_all_()
    elif is_gated(resolve(plan)) and plan.command != "finetune" and not bench.judged:
        notes += describe_unjudged(plan)
        bench.fit_on_all_()
    if plan.weight.batch_weight == "auto" and not bench.labelled:
        notes.append("--batch-weight auto did nothing: it takes labels. --batch-weight N acts.")
    if plan.gate.temperature == "auto" and not bench.labelled:
        notes.append("--temperature auto did nothing: it takes labels.")
    if bench.reference is not None and plan.command == "finetune" and bench.labelled:
        notes.append("the labels were learned, not the reference (--labels none to learn from it).")
    if bench.reference is not None and not bench.labelled and tune and tune.label_smoothing:
        notes.append("--label-smoothing had no effect: there are no labels to smooth.")
    if plan.command == "finetune" and tune and tune.ghost_size and tune.statistics == "frozen":
        notes.append(
            "--ghost-size was stored but had no effect here: with --statistics frozen nothing is "
            "normalized by batches; --statistics train does that."
        )
    swap_(bench, plan.swap)
    return bench


def _sizes(plan: Plan, bench: Workbench) -> _Sizes:
    sites = find_norms(bench.model)
    n_fit = len(bench.split.fit)
    n_monitor = max(1, n_fit // 5) if n_fit else 0
    # All batches walk together, or each layer takes a pass that is shorter than the next.
    n_norms = sum(site.has_statistics and not site.frozen for site in sites)
    by_depth = (n_norms + 3) / 2
    return _Sizes(
        fit=n_fit,
        select=len(bench.split.select),
        learn=n_fit - n_monitor,
        monitor=n_monitor,
        layers=max(1, len(sites)),
        of_images=bench.inputs.preprocessing is not None,
        feed_passes=1.0 if plan.statistics.feed == "batch" else by_depth,
        by_depth=by_depth,
        training_batch=bench.training_batch_size,
    )


def _mean(
    recipe: AverageRecipe, statistics: StatisticsRecipe, n: _Sizes, *, labelled: bool
) -> list[Step]:
    """The mean of checkpoints; of its statistics the population's, those between, or the better."""
    n_files, kind, steps = len(recipe.files) + 1, recipe.statistics, list[Step]()
    new = _statistics_step(statistics, n, "population", gate="")
    if recipe.method == "greedy":
        name = f"greedy mean of up to {n_files} checkpoints, each time with new statistics"
        # Of k checkpoints, as of all, each runs once for statistics between them.
        between = 0 if kind == "population" else n_files * (n.by_depth + n_files / 2)
        work = [replace(one, passes=n_files * one.passes + between) for one in new.work]
        work.append(Work("select: checkpoints and means", n.select, 3 * n_files - 2))
        steps.append(Step(name, MEAN, partial(greedy, recipe=recipe), tuple(work)))
    else:
        fit = partial(uniform, recipe=recipe)
        steps.append(Step(f"mean of {n_files} checkpoints", MEAN, fit, gate=""))
        steps += [] if kind == "interpolated" else [new]
    gate = "select" if kind == "auto" else ""
    if recipe.method == "uniform" and (kind == "interpolated" or (gate and labelled)):
        name = f"statistics between those of {n_files} checkpoints (interpolated)"
        fit = partial(interpolated, gated=bool(gate))
        work = [replace(one, passes=n_files + n.by_depth) for one in new.work]
        work += [Work("select: interpolated statistics", n.select, 1)] if gate else []
        steps.append(Step(name, STATISTICS, fit, tuple(work), gate=gate))
    return steps


def _statistics(plan: Plan, n: _Sizes, *, judged: bool, labelled: bool) -> list[Step]:
    """New statistics: stated, or each kind as a candidate."""
    recipe, weight = plan.statistics, plan.weight.example_weight
    kind, b = recipe.statistics, recipe.train_batch_size
    if weight in LABEL_FREE and kind == "auto":
        kind = "train-batch"
    if kind == "auto" and not judged:
        return [_statistics_step(recipe, n, "blend", gate="none")] * blends_by_default(plan)
    if kind == "keep":
        return []
    if kind == "population" and recipe.weight_noise:
        kind = "noise"
    if kind != "auto":
        return [_statistics_step(recipe, n, kind, gate="")]
    steps = [_statistics_step(recipe, n, "population")]
    if recipe.weight_noise:
        return [*steps, _statistics_step(recipe, n, "noise")]
    if not labelled:
        steps.append(_statistics_step(recipe, n, "blend"))
    if recipe.reference is not None:
        steps.append(_statistics_step(recipe, n, "reference"))
    if b is not None:
        steps.append(_statistics_step(recipe, n, "train-batch"))
    if labelled:
        steps.append(_mixture_step(plan.weight, n))
    if b is not None and weight == "auto":
        steps.append(_statistics_step(recipe, n, "train-batch", example_weight=1 / b))
    return steps


def _mixture_step(recipe: WeightRecipe, n: _Sizes) -> Step:
    """Mixtures of the statistics before and the population's, which are as free at inference."""
    by_layer = recipe.granularity != "global"
    work = [Work("mixture: one for all layers", n.learn, _TRIED_WEIGHTS / 3)]
    if by_layer:
        work.append(Work("mixture: per layer", n.learn, min(1, recipe.epochs) / 2, "training"))
        work.append(Work("mixture: watching", n.monitor, min(1, recipe.epochs)))
    work.append(Work("select: mixture", n.select, 1 + by_layer))
    name = f"mixture of old and new statistics (up to per {'layer' if by_layer else 'model'})"
    return Step(f"{name}, on fit", STATISTICS, Fits.mixed, tuple(work), start="population")


def _statistics_step(
    recipe: StatisticsRecipe,
    n: _Sizes,
    target: str,
    *,
    gate: str = "select",
    example_weight: float | None = None,
) -> Step:
    feed, passes, plain, how = recipe.feed, n.feed_passes, 1, target
    if target == "noise":
        plain, how = recipe.draws, f"population of {recipe.draws} copies with weight noise"
        passes *= plain
    if target in ("reference", "blend") or recipe.robust:
        # One pass more goes through the reference, or looks for images of another kind.
        plain = 2 if target == "reference" or recipe.robust else 1
        feed, passes = "sequential", n.by_depth + plain - 1
    more = "" if passes == plain else f", or {passes:g} where memory is short"
    over = f"{plain} pass{'es' if plain > 1 else ''} over fit{more}"
    with_weight = "" if example_weight is None else f" with example weight {example_weight:.3g}"
    used = min(n.fit, recipe.samples) if isinstance(recipe.samples, int) else n.fit
    work = [Work(STATISTICS, used, passes, "live")]
    if gate == "select":
        work.append(Work(f"select: {STATISTICS}", n.select, 1))
    return Step(
        name=f"population statistics ({how}, {feed} feed){with_weight}: {over}",
        stage=STATISTICS,
        fit=partial(Fits.statistics, target=target, example_weight=example_weight),
        work=tuple(work),
        gate=gate,
        leaves=target if target in ("population", "reference") else "",
    )


def _distilling(plan: Plan, n: _Sizes) -> list[Step]:
    """Fine-tuning to a reference's predictions: of the input, and after matched statistics."""
    if plan.finetune is None or plan.statistics.reference is None:
        return []
    recipe = replace(plan.finetune, example_weight="keep")
    a_pass = max(1, math.ceil(n.learn / n.training_batch(recipe.batch_size)))
    # Predictions say more of an image than a label does, so that more passes can be taken.
    epochs = max(recipe.epochs, math.ceil(_LEAST_STEPS / a_pass))
    recipe = recipe if recipe.steps is not None else replace(recipe, epochs=epochs)
    if n.of_images and recipe.augment == "none":
        # The reference sees the same variant, so that no variation can make its answer wrong.
        recipe = replace(recipe, augment="light")
    starts = ["input", "reference"]
    # What was stated for statistics or weights is part of whatever follows.
    if plan.statistics.statistics != "auto" or plan.weight.is_stated:
        starts = ["base"]
    return [_tuning_step(recipe, n, distils=True, start=start) for start in starts]


def _tuning(plan: Plan, n: _Sizes) -> list[Step]:
    """Fine-tuning alone, example weights alone, both together."""
    recipe, steps = plan.finetune, []
    # Trained statistics belong to the weights trained with them; frozen ones to all.
    frozen = recipe is None or recipe.statistics == "frozen"
    start = "base" if frozen else "kept"
    if recipe is not None:
        steps.append(_tuning_step(replace(recipe, example_weight="keep"), n))
    if not plan.chooses_weights:
        return steps
    name = f"example weight (up to per {plan.weight.granularity}), on fit"
    work = _choice_work(plan.weight, n)
    steps.append(Step(name, WEIGHT, Fits.chosen_weights, work, start=start))
    if recipe is not None and recipe.example_weight == "learn" and frozen:
        steps.append(_tuning_step(recipe, n, start=start))
    return steps


def _alone(plan: Plan, n: _Sizes, bench: Workbench | None) -> list[Step]:
    """Fine-tuning as stated; its own monitor keeps the best epoch or the original."""
    converted = bench is not None and bench.original is not None
    steps = []
    if plan.finetune is not None and converted:
        work = (Work("re-fitting scale and shift", min(n.fit, REFIT_SAMPLES), 2, "live"),)
        steps.append(Step("re-fitting scale and shift", "re-fitting", Fits.refitted, work, gate=""))
    if plan.finetune is not None:
        distils = bench is not None and not bench.labelled
        steps.append(_tuning_step(plan.finetune, n, gate="monitor", distils=distils))
    return steps


def _tuning_step(
    recipe: FinetuneRecipe,
    n: _Sizes,
    *,
    gate: str = "select",
    distils: bool = False,
    start: str = "kept",
) -> Step:
    size = n.training_batch(recipe.batch_size) * recipe.accumulate
    epochs = float(recipe.epochs)
    if recipe.steps is not None:
        epochs = recipe.steps / max(1, math.ceil(n.learn / size))
    watched = math.ceil(epochs)
    work = [
        Work(f"fine-tuning {recipe.train}", n.learn, epochs, "training"),
        Work("fine-tuning: watching", n.monitor, watched + 1, "live"),
    ]
    if distils:
        work.append(Work("distilling: the reference", n.learn, epochs))
    if recipe.statistics == "train":
        work.append(Work("statistics after each epoch", n.fit, watched, "live"))
    if gate == "select":
        work.append(Work("select: fine-tuned", n.select, 1, "live"))
    weights = " with example weights" if recipe.example_weight == "learn" else ""
    verb, alone = "distilling" if distils else "fine-tuning", start == "input"
    judged = gate == "select"
    fit = partial(Fits.tuned, recipe=recipe, gated=judged, distils=distils, alone=alone)
    name = f"{verb} ({recipe.train}){' alone' * alone}{weights}: {epochs:g} epochs"
    return Step(name, TUNING, fit, tuple(work), gate=gate, start=start)


def _choice_work(recipe: WeightRecipe, n: _Sizes) -> tuple[Work, ...]:
    levels = ("global", "layer", "channel").index(recipe.granularity)
    work = [Work("example weight: one for all layers", n.learn, _TRIED_WEIGHTS / 3, "live")]
    if levels >= 1:
        passes = min(1, recipe.epochs) / 2
        work.append(Work("example weight: per layer", n.learn, passes, "training"))
    if levels == 2:
        work.append(Work("example weight: per channel", n.learn, recipe.epochs, "training"))
    if levels:
        watched = 1 + (recipe.epochs if levels == 2 else 0)
        thinning = 2 + math.ceil(math.log2(n.layers)) if recipe.thin else 0
        work.append(Work("example weight: watching", n.monitor, watched + thinning, "live"))
    return (*work, Work("select: example weight", n.select, levels + 1, "live"))
