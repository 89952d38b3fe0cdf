"""The steps of a command, resolved once from its plan, with their order and their cost.

No other file knows the order. Statistics never stay stale: new statistics follow every training in
training mode; after tuning with frozen statistics, those are part of the result. Candidates that
are cheaper at inference come first and win ties.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from bnfix.checkpoints.save import StateFolder
from bnfix.core.errors import DataError, count
from bnfix.core.settings import LABEL_FREE, AverageRecipe, FinetuneRecipe
from bnfix.jobs.average import MEAN, check_unlabelled, greedy, interpolated, narrowed, uniform
from bnfix.jobs.convert import swap_
from bnfix.jobs.fits import BATCH, BATCH_WEIGHT_EXAMPLES, BATCH_WEIGHTS, Fits, Fitted, State
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
#: Weights that the search of one global weight tries, each on a third of the examples.
_TRIED_WEIGHTS = 10
#: Fewest training steps of a candidate that learns from a reference.
_LEAST_STEPS = 100
#: Fits without labels: one pass in training mode, then some tried weights.
_LABEL_FREE_PASSES = 12


@dataclass(frozen=True)
class Work:
    """Passes of one stage."""

    stage: str  # in words
    examples: int  # in one pass
    passes: float  # can be a fraction
    cost: str = "forward"  # as stored; `live`: with weighed examples; `training`: with gradients


@dataclass(frozen=True)
class Step:
    """One step: a fit, and its judge.

    ``gate`` is ``select`` (the select split), ``monitor`` (the fit's own early stopping), ``none``
    (a default where nothing can be judged), or empty (stated by the user, so it stays at any cost).
    A step starts from the state ``kept`` so far, from the ``base`` (the state after the
    statistics), from the ``input``, or from a state that an earlier step ``leaves`` under a name,
    kept or not.
    """

    name: str
    stage: str
    fit: Callable[[Fits, State], Fitted]
    work: tuple[Work, ...] = ()
    gate: str = "select"
    start: str = "kept"
    leaves: str = ""


class _Resolver:
    """The steps of a plan; without a session labels are assumed, and there are no costs."""

    def __init__(self, plan: Plan, bench: Workbench | None) -> None:
        self.plan, self.bench = plan, bench
        self.judged = bench is None or bench.judged
        self.labelled = bench is None or bench.labelled
        sites = [] if bench is None else find_norms(bench.model)
        sizes = {} if bench is None else bench.split.sizes()
        # Numbers that the cost of steps depends on.
        self.fit, self.select = sizes.get("fit", 0), sizes.get("select", 0)
        self.monitor = max(1, self.fit // 5) if self.fit else 0
        self.learn, self.layers = self.fit - self.monitor, max(1, len(sites))
        # All batches advance together, or each layer takes a pass, shorter than the next layer's.
        n_norms = sum(site.has_statistics and not site.frozen for site in sites)
        # Passes of the sequential feed if memory is short.
        self.by_depth = 1.0 if bench is None else (n_norms + 3) / 2

    def steps(self) -> list[Step]:
        """All steps, in order."""
        plan, labelled = self.plan, self.labelled
        if plan.command == "finetune":
            return self._alone()
        steps = self._statistics() if plan.average is None else self._mean(plan.average)
        weight, b = plan.weight.example_weight, plan.statistics.train_batch_size
        if weight == "match" and b is not None:
            weight = 1 / b
        if not isinstance(weight, str):
            fit = partial(Fits.weight, value=float(weight))
            steps.append(Step(f"example weight {weight:.3g}", WEIGHT, fit, gate=""))
        elif weight in LABEL_FREE and b is not None:
            fit = partial(Fits.label_free, how=weight, train_batch_size=b)
            work = (Work(f"example weight: {weight}", self.fit, _LABEL_FREE_PASSES, "live"),)
            steps.append(Step(f"example weight: {weight}", WEIGHT, fit, work, gate=""))
        batch = plan.weight.batch_weight
        if not isinstance(batch, str):
            fit = partial(Fits.weight, value=float(batch), source="batch")
            steps.append(Step(f"batch weight {batch:.3g}", WEIGHT, fit, gate=""))
        if plan.gate.temperature == "auto" and labelled:
            # It comes before all judged steps: those must then gain more than a temperature does.
            gated = (place for place, step in enumerate(steps) if step.gate == "select")
            place = next(gated, len(steps))
            cost = Work(TEMPERATURE, self.fit, 1), Work(f"select: {TEMPERATURE}", self.select, 1)
            steps.insert(place, Step("temperature of the logits", TEMPERATURE, temperature, cost))
        # Without labels, training needs a reference; weights need labels that show a gain.
        steps += self._distilling() if self.judged else []
        steps += self._tuning() if labelled else []
        # It comes last, since it makes predictions depend on each other.
        return [*steps, self._batch_weight()] if labelled and batch == "auto" else steps

    def _mean(self, recipe: AverageRecipe) -> list[Step]:
        """The mean of checkpoints, with population statistics or statistics between theirs."""
        n_files, kind, steps = len(recipe.files) + 1, recipe.statistics, list[Step]()
        new = self._measured("population", gate="")
        if recipe.method == "greedy":
            name = f"greedy mean of up to {n_files} checkpoints, each time with new statistics"
            # For statistics between k checkpoints, each of them runs once.
            between = 0 if kind == "population" else n_files * (self.by_depth + n_files / 2)
            work = [replace(one, passes=n_files * one.passes + between) for one in new.work]
            work.append(Work("select: checkpoints and means", self.select, 3 * n_files - 2))
            steps.append(Step(name, MEAN, partial(greedy, recipe=recipe), tuple(work)))
        else:
            fit = partial(uniform, recipe=recipe)
            steps.append(Step(f"mean of {n_files} checkpoints", MEAN, fit, gate=""))
            steps += [] if kind == "interpolated" else [new]
        gate = "select" if kind == "auto" else ""
        if recipe.method == "uniform" and (kind == "interpolated" or (gate and self.labelled)):
            name = f"statistics between those of {n_files} checkpoints (interpolated)"
            fit = partial(interpolated, gated=bool(gate))
            work = [replace(one, passes=n_files + self.by_depth) for one in new.work]
            work += [Work("select: interpolated statistics", self.select, 1)] if gate else []
            steps.append(Step(name, STATISTICS, fit, tuple(work), gate=gate))
        return steps

    def _statistics(self) -> list[Step]:
        """New statistics: stated, or each kind as a candidate."""
        recipe, weight = self.plan.statistics, self.plan.weight.example_weight
        kind, b = recipe.statistics, recipe.train_batch_size
        if weight in LABEL_FREE and kind == "auto":
            kind = "train-batch"
        if kind == "auto" and not self.judged:
            return [self._measured("blend", gate="none")] * blends_by_default(self.plan)
        if kind == "population" and recipe.weight_noise:
            kind = "noise"
        if kind != "auto":
            return [] if kind == "keep" else [self._measured(kind, gate="")]
        steps = [self._measured("population")]
        if recipe.weight_noise:
            return [*steps, self._measured("noise")]
        tried = {
            "blend": not self.labelled,
            "reference": recipe.reference is not None,
            "train-batch": b is not None,
        }
        steps += [self._measured(target) for target, is_tried in tried.items() if is_tried]
        steps += [self._mixture()] if self.labelled else []
        if b is not None and weight == "auto":
            steps.append(self._measured("train-batch", example_weight=1 / b))
        return steps

    def _mixture(self) -> Step:
        """Mixtures of old and population statistics, which cost nothing at inference."""
        recipe = self.plan.weight
        by_layer, epochs = recipe.granularity != "global", min(1, recipe.epochs)
        work = [Work("mixture: one for all layers", self.learn, _TRIED_WEIGHTS / 3)]
        if by_layer:
            work.append(Work("mixture: per layer", self.learn, epochs / 2, "training"))
            work.append(Work("mixture: watching", self.monitor, epochs))
        work.append(Work("select: mixture", self.select, 1 + by_layer))
        name = f"mixture of old and new statistics (up to per {'layer' if by_layer else 'model'})"
        return Step(f"{name}, on fit", STATISTICS, Fits.mixed, tuple(work), start="population")

    def _measured(
        self, target: str, *, gate: str = "select", example_weight: float | None = None
    ) -> Step:
        """One kind of statistics of the data."""
        recipe, plain, how = self.plan.statistics, 1, target
        feed, passes = recipe.feed, 1.0 if recipe.feed == "batch" else self.by_depth
        if target == "noise":
            plain, how = recipe.draws, f"population of {recipe.draws} copies with weight noise"
            passes *= plain
        if target in ("reference", "blend") or recipe.robust:
            # One more pass runs the reference, or looks for images of another kind.
            plain = 2 if target == "reference" or recipe.robust else 1
            feed, passes = "sequential", self.by_depth + plain - 1
        more = "" if passes == plain else f", or {passes:g} if memory is short"
        over = f"{plain} pass{'es' if plain > 1 else ''} over fit{more}"
        with_weight = "" if example_weight is None else f" with example weight {example_weight:.3g}"
        used = min(self.fit, recipe.samples) if isinstance(recipe.samples, int) else self.fit
        work = [Work(STATISTICS, used, passes, "live")]
        work += [Work(f"select: {STATISTICS}", self.select, 1)] if gate == "select" else []
        return Step(
            name=f"population statistics ({how}, {feed} feed){with_weight}: {over}",
            stage=STATISTICS,
            fit=partial(Fits.statistics, target=target, example_weight=example_weight),
            work=tuple(work),
            gate=gate,
            leaves=target if target in ("population", "reference") else "",
        )

    def _distilling(self) -> list[Step]:
        """Fine-tuning to a reference's predictions: from the input and after matched statistics."""
        plan = self.plan
        if plan.finetune is None or plan.statistics.reference is None:
            return []
        recipe = replace(plan.finetune, example_weight="keep")
        # Predictions tell more about an image than a label, which allows more passes.
        epochs = math.ceil(_LEAST_STEPS / self._n_steps(recipe, 1))
        if recipe.steps is None:
            recipe = replace(recipe, epochs=max(recipe.epochs, epochs))
        of_images = self.bench is not None and self.bench.inputs.preprocessing is not None
        if of_images and recipe.augment == "none":
            # The reference sees the same variant, and no variation can make its answer wrong.
            recipe = replace(recipe, augment="light")
        # Stated statistics or weights are part of every later step.
        is_stated = plan.statistics.statistics != "auto" or plan.weight.is_stated
        starts = ["base"] if is_stated else ["input", "reference"]
        return [self._tuned(recipe, distils=True, start=start) for start in starts]

    def _tuning(self) -> list[Step]:
        """Fine-tuning alone, example weights alone, both together."""
        recipe, steps = self.plan.finetune, list[Step]()
        # Trained statistics belong to the weights trained with them; frozen ones fit all.
        frozen = recipe is None or recipe.statistics == "frozen"
        start = "base" if frozen else "kept"
        if recipe is not None:
            steps.append(self._tuned(replace(recipe, example_weight="keep")))
        if not self.plan.chooses_weights:
            return steps
        name = f"example weight (up to per {self.plan.weight.granularity}), on fit"
        steps.append(Step(name, WEIGHT, Fits.chosen_weights, self._choice(), start=start))
        if recipe is not None and recipe.example_weight == "learn" and frozen:
            steps.append(self._tuned(recipe, start=start))
        return steps

    def _alone(self) -> list[Step]:
        """Fine-tuning as stated; its own monitor keeps the best epoch or the original."""
        recipe, bench, steps = self.plan.finetune, self.bench, list[Step]()
        if recipe is None:
            return steps
        if bench is not None and bench.original is not None:
            name = "re-fitting scale and shift"
            work = (Work(name, min(self.fit, REFIT_SAMPLES), 2, "live"),)
            steps.append(Step(name, "re-fitting", Fits.refitted, work, gate=""))
        return [*steps, self._tuned(recipe, gate="monitor", distils=not self.labelled)]

    def _n_steps(self, recipe: FinetuneRecipe, accumulate: int) -> int:
        """Steps of one pass over the images to learn on."""
        stated = recipe.batch_size
        size = (stated or 64) if self.bench is None else self.bench.training_batch_size(stated)
        return max(1, math.ceil(self.learn / (size * accumulate)))

    def _tuned(
        self,
        recipe: FinetuneRecipe,
        *,
        gate: str = "select",
        distils: bool = False,
        start: str = "kept",
    ) -> Step:
        epochs = float(recipe.epochs)
        if recipe.steps is not None:
            epochs = recipe.steps / self._n_steps(recipe, recipe.accumulate)
        watched = math.ceil(epochs)
        work = [
            Work(f"fine-tuning {recipe.train}", self.learn, epochs, "training"),
            Work("fine-tuning: watching", self.monitor, watched + 1, "live"),
        ]
        work += [Work("distilling: the reference", self.learn, epochs)] * distils
        if recipe.statistics == "train":
            work.append(Work("statistics after each epoch", self.fit, watched, "live"))
        judged, alone = gate == "select", start == "input"
        work += [Work("select: fine-tuned", self.select, 1, "live")] * judged
        weights = " with example weights" if recipe.example_weight == "learn" else ""
        verb = "distilling" if distils else "fine-tuning"
        fit = partial(Fits.tuned, recipe=recipe, gated=judged, distils=distils, alone=alone)
        more = [n for n in ("ghost_noise", "consistency", "sharpness") if getattr(recipe, n)]
        more += ["exclusive statistics"] * (recipe.batch_statistics == "exclusive")
        named = f", {', '.join(more).replace('_', ' ')}" if more else ""
        name = f"{verb} ({recipe.train}){' alone' * alone}{weights}: {epochs:g} epochs{named}"
        return Step(name, TUNING, fit, tuple(work), gate=gate, start=start)

    def _choice(self) -> tuple[Work, ...]:
        """The cost of choosing example weights."""
        recipe = self.plan.weight
        levels = ("global", "layer", "channel").index(recipe.granularity)
        work = [Work("example weight: one for all layers", self.learn, _TRIED_WEIGHTS / 3, "live")]
        if levels >= 1:
            passes = min(1, recipe.epochs) / 2
            work.append(Work("example weight: per layer", self.learn, passes, "training"))
        if levels == 2:
            work.append(Work("example weight: per channel", self.learn, recipe.epochs, "training"))
        if levels:
            watched = 1 + (recipe.epochs if levels == 2 else 0)
            watched += 2 + math.ceil(math.log2(self.layers)) if recipe.thin else 0
            work.append(Work("example weight: watching", self.monitor, watched, "live"))
        return (*work, Work("select: example weight", self.select, levels + 1, "live"))

    def _batch_weight(self) -> Step:
        recipe, used = self.plan.weight, min(self.fit, BATCH_WEIGHT_EXAMPLES)
        work = [
            Work("batch weight: fit", used, len(BATCH_WEIGHTS), "live"),
            Work("select: batch weight", self.select, 4, "live"),
        ]
        if recipe.granularity == "channel":
            work += [
                Work("batch weight: per channel", self.learn, recipe.epochs, "training"),
                Work("batch weight: watching", self.monitor, recipe.epochs, "live"),
                Work("select: batch weight per channel", self.select, 4, "live"),
            ]
        return Step("batch weight, on fit", BATCH, Fits.chosen_batch_weight, tuple(work))


def resolve(plan: Plan, bench: Workbench | None = None) -> list[Step]:
    """The steps of a plan; without a session labels are assumed, and there are no costs."""
    return _Resolver(plan, bench).steps()


def is_gated(steps: list[Step]) -> bool:
    """Whether anything is judged on the select split."""
    return any(step.gate == "select" for step in steps)


def work_of(plan: Plan, bench: Workbench) -> list[Work]:
    """All passes of a command, if every candidate is tried."""
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
    """The parts of the data for fit, select and test."""
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
    """Open the checkpoint and the data of a plan, split the data, swap the norm layers."""
    if model is not None:
        plan = replace(plan, model=replace(plan.model, model=model))
    if plan.state is not None:
        StateFolder(plan.state, "")
    # A single one is passed as text; messages name them all.
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
        notes.append("--batch-weight auto did nothing: it needs labels. --batch-weight N acts.")
    if plan.gate.temperature == "auto" and not bench.labelled:
        notes.append("--temperature auto did nothing: it needs labels.")
    if bench.reference is not None and plan.command == "finetune" and bench.labelled:
        notes.append("fine-tuning used the labels, not the reference (--labels none changes that).")
    if bench.reference is not None and not bench.labelled and tune and tune.label_smoothing:
        notes.append("--label-smoothing had no effect: there are no labels to smooth.")
    if tune and tune.norm_decay_target == "none" and any(tune.norm_decays.values()):
        notes.append("--norm-decay: without --norm-decay-target zero or identity nothing decays.")
    if plan.command == "finetune" and tune and tune.ghost_size and tune.statistics == "frozen":
        notes.append("--ghost-size was stored without effect: it acts with --statistics train.")
    n, n_fit = plan.statistics.samples, len(bench.split.fit)
    if isinstance(n, int) and n > n_fit:
        notes.append(f"--samples {n}: only {count(n_fit, 'images')} available.")
    if plan.command == "finetune" and (plan.swap.layers or plan.swap.skip):
        notes.append("--layers and --skip select the layers to swap, not those to train (--train).")
    swap_(bench, plan.swap)
    return bench
