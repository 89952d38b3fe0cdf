"""The work behind a command's steps: each fits something on the session's fit split."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from bnfix.checkpoints.several import Ingredients
from bnfix.core import guards
from bnfix.core.errors import DataError, count
from bnfix.core.memory import BatchSize
from bnfix.core.settings import FinetuneRecipe
from bnfix.jobs.inputs import Tracked
from bnfix.jobs.session import Workbench
from bnfix.metrics.compare import Decision, compare, judge
from bnfix.metrics.evaluate import Outputs, against, collect, describe_left_out, measured, stacked
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import in_stream
from bnfix.metrics.task import ByRows, Reference, Task
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.norm.swap import zero_pointwise_
from bnfix.recalibrate.recalibrate import Calibration, describe_missing, recalibrate_
from bnfix.recalibrate.reference import Originals
from bnfix.recalibrate.refit import REFIT_SAMPLES, refit_
from bnfix.recalibrate.targets import average_over_noise_, noisy_weights
from bnfix.report.records import Evaluated, n_live, statistics_of
from bnfix.training.finetune import Finetuning, finetune_
from bnfix.weights.choose import choose_example_weight_, weighable_layers
from bnfix.weights.label_free import fit_moments_, fit_predictions_
from bnfix.weights.mixtures import choose_mixture_, learn_batch_weight_

#: Name of the network before all steps.
ORIGINAL = "as it was"
BATCH = "batch weight"
#: Weights that `--batch-weight auto` tries, and the most examples it tries them on.
BATCH_WEIGHTS, BATCH_WEIGHT_EXAMPLES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8), 2000
_Weights = Mapping[str, Any]
#: Smallest batch of the class-sorted stream that a batch weight must tolerate.
FEWEST_SORTED = 8


@dataclass(frozen=True)
class State:
    """A network at one point of the work, and the results that led to it."""

    name: str
    values: guards.Snapshot
    metrics: Metrics | None = None
    results: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Fitted:
    """A step's result: the network's new name, or ``None`` if nothing was better than before.

    A fit that judges its own candidates also gives the decisions.
    """

    name: str | None
    results: tuple[Any, ...] = ()
    decisions: tuple[Decision, ...] | None = None


class Fits:
    """The fits and measurements of one session."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.plan, self.model = bench, bench.plan, bench.model
        self.seed, self.precision = self.plan.gate.seed, self.plan.run.precision
        self.passes: list[Tracked] = []
        self.ingredients: Ingredients | None = None  # of `average`
        # Stated or not, this batch size is kept unless it does not fit.
        self._statistics_size = BatchSize(
            self.plan.statistics.batch_size,
            "population statistics",
            bench.assumptions,
            remark="; with the batch feed this changes the statistics slightly",
        )
        self._theirs: dict[str, Outputs] = {}  # the reference's, by split
        self.task: Task = bench.inputs.task  # the task that judges candidates
        self.alone: tuple[str, float] | None = None  # an admitted temperature, with its name
        #: The last population measured, and each layer's moments before and after it.
        self._population: tuple[Calibration, dict[str, Any]] | None = None

    @property
    def _reference(self) -> nn.Module | None:
        return None if self.bench.reference is None else self.bench.reference.model

    def outputs(
        self, model: nn.Module, batches_of: Callable[[], Tracked], part: str = "fit"
    ) -> Outputs:
        """Outputs of a model, or of its noisy copies, in batches that fit in memory."""

        def attempt(_: int) -> Outputs:
            batches = batches_of()
            self.passes.append(batches)
            return collect([model], batches, self.bench.inputs.task, precision=self.precision)[0]

        noise, copies = self.plan.statistics, list[Outputs]()
        for seed in noise.copies(part, self.seed):
            with noisy_weights(model, noise.weight_noise, seed):
                copies.append(self.bench.evaluation.run(attempt))
        self.bench.assumptions += describe_left_out(copies)
        return stacked(copies)

    def _measured(self, split: str, name: str, model: nn.Module) -> tuple[Metrics, Metrics | None]:
        """A model's metrics on select or test: by the labels, and by the reference if it counts."""

        def batches_of(name: str) -> Tracked:
            if split == "test":
                return self.bench.test_batches(f"test: {name}")
            return self.bench.batches(self.bench.split.select, f"select: {name}")

        found = self.outputs(model, partial(batches_of, name), split)
        found = replace(found, task=self.task) if split == "select" else found
        if name == ORIGINAL:
            found.refuse_own_loss()
        reference = self._reference
        by_rows = isinstance(found.task, ByRows)
        if reference is None or by_rows or (split == "select" and self.bench.labelled):
            return measured(found, self.seed), None
        if split not in self._theirs:
            self._theirs[split] = self.outputs(reference, partial(batches_of, "the reference"))
        compared = against(found, self._theirs[split], Reference(reference))
        return measured(found, self.seed), measured(compared, self.seed)

    def on_select(self, name: str) -> Metrics:
        """The metrics that judge the current model, on the select split."""
        by_labels, by_reference = self._measured("select", name, self.model)
        return by_reference or by_labels

    def on_test(self, name: str, model: nn.Module) -> Evaluated:
        """A model's test result: by the labels, and by the reference."""
        metrics, agreement = self._measured("test", name, model)
        return Evaluated(name, None, None, metrics, n_live=n_live(model), agreement=agreement)

    def statistics(
        self,
        now: State,
        *,
        target: str,
        example_weight: float | None = None,
        originals: Originals | None = None,
    ) -> Fitted:
        """New population statistics, and an example weight that goes with them."""
        before = statistics_of(self.model)
        calibration = self._recalibrate(target, originals)
        if target == "population":
            after, names = statistics_of(self.model), [layer.name for layer in calibration.layers]
            pairs = {layer: (before[layer][:2], after[layer][:2]) for layer in names}
            self._population = calibration, pairs
        words = {"blend": "between stored and measured", "reference": "matched to the reference"}
        name = f"statistics {words.get(target, f'of the data ({calibration.target})')}"
        if example_weight is not None:
            self.weight(now, value=example_weight)
            name = f"match (statistics {calibration.target}, example weight {example_weight:.3g})"
        return Fitted(name, (calibration,))

    def mixed(self, now: State) -> Fitted:
        """Judge mixtures of old and population statistics against the current state."""
        if self._population is None or now.metrics is None:
            return Fitted(None)  # the population could not be measured
        calibration, pairs = self._population
        learn, monitor = self._to_learn("mixture")
        choice = choose_mixture_(
            self.model,
            pairs,
            learn,
            monitor=monitor,
            select=self.bench.batches(self.bench.split.select, "select: mixture"),
            incumbent=(now.name, now.metrics),
            recipe=self.plan.weight,
            z=self.plan.gate.z,
            precision=self.precision,
        )
        self.bench.assumptions += choice.notes
        admitted = [d.candidate for d in choice.decisions if d.admitted]
        if not admitted:
            return Fitted(None, (), choice.decisions)
        layers = tuple(
            replace(layer, new_weight=choice.weights.get(layer.name, 1.0))
            for layer in calibration.layers
        )
        found = replace(calibration, target="blend", layers=layers)
        return Fitted(admitted[-1], (found,), choice.decisions)

    def _recalibrate(self, target: str, originals: Originals | None = None) -> Calibration:
        recipe, bench = self.plan.statistics, self.bench
        if target == "reference":
            originals = self._reference
        # In a mixture, a layer's inputs depend on the layers before it.
        by_batch = originals is None and target != "blend" and not (recipe.robust or recipe.mix)
        order = np.random.default_rng(self.seed).permutation(bench.split.fit)
        state = self.plan.state if self.plan.command != "finetune" and target != "noise" else None
        if isinstance(recipe.samples, int):
            order = order[: recipe.samples]
        parts = bench.by_source(order)
        if not all(map(len, parts)):
            raise DataError(
                f"{bench.inputs.images.spec}: --mix: one of {len(parts)} sources has no image "
                "for the statistics. Give more images of it, or more --samples."
            )
        self._statistics_size.foresee(bench.footprint)

        def attempt(size: int) -> Calibration:
            tracked = [bench.batches(part, f"statistics ({target})", size) for part in parts]
            tracked = [batches.evened() for batches in tracked]
            self.passes += tracked
            measure = partial(
                recalibrate_,
                self.model,
                tracked if recipe.mix else tracked[0],
                target="population" if target == "noise" else target,
                train_batch_size=recipe.train_batch_size,
                reference=originals,
                prior=recipe.prior if target == "blend" else None,
                robust=recipe.robust,
                mix=recipe.mix,
                feed=recipe.feed if by_batch else None,
                samples="auto" if recipe.samples == "auto" else None,
                tolerance=recipe.tolerance,
                precision=self.precision,
                layers=self.plan.swap.layers,
                skip=self.plan.swap.skip,
                include_frozen=recipe.include_frozen,
                state=state,
                identity="" if state is None else bench.identity(order, batch_size=size),
            )
            if target != "noise":
                return measure()
            seeds = recipe.copies("fit", self.seed)
            return average_over_noise_(self.model, measure, recipe.weight_noise, seeds)

        calibration = self._statistics_size.run(attempt)
        bench.assumptions += describe_missing(calibration)
        return calibration

    def _to_learn(self, stage: str) -> tuple[Callable[[int], Tracked], Tracked]:
        """Batches to learn weights on, reordered in each pass, and batches for early stopping."""
        bench, (learn, monitor) = self.bench, self.bench.learn_and_monitor()
        if stage == BATCH:
            # Shuffled: in the order of the files, a batch could hold a single class.
            monitor = np.random.default_rng(self.seed).permutation(monitor)
        size = bench.training_batch_size(self.plan.weight.batch_size)
        fitting = bench.batches(learn, f"{stage}: fitting", size).shuffled(self.seed)
        return fitting, bench.batches(monitor, f"{stage}: watching")

    def weight(self, _: State, *, value: float, source: str = "example") -> Fitted:
        """Set one stated example or batch weight on every layer that can have one."""
        layers, excluded = self._weighable(beside_batch=True)
        wanted = dict.fromkeys(layers, value)
        if layers and source == "batch":
            self._weigh_batch_(wanted)
        elif layers:
            set_example_weight_(self.model, wanted)
        if excluded and value:
            self.bench.assumptions.append(
                f"unchanged {source} weight: {count(len(excluded), 'layers')} with 1x1 feature "
                "maps (--pointwise includes these) or without statistics."
            )
        return Fitted(f"{source} weight {value:.3g}{self._by_medians * (source == 'batch')}")

    @property
    def _by_medians(self) -> str:
        return " by medians" * (self.plan.weight.batch_estimator == "median")

    def _weigh_batch_(self, weights: _Weights) -> None:
        how = self.plan.weight.batch_estimator
        set_example_weight_(self.model, batch_weight=weights, batch_estimator=how)

    def chosen_batch_weight(self, now: State) -> Fitted:
        """Choose a batch weight: the best on fit, lowered until a class-sorted stream tolerates it.

        If allowed, one weight per channel is then learned from there, and judged in the same way.
        """
        bench = self.bench
        if isinstance(bench.inputs.task, ByRows):
            bench.assumptions.append(
                "--batch-weight auto was not tried: it is judged on images sorted by class, and "
                f"the task is {bench.inputs.task.name}."
            )
            return Fitted(None, decisions=())
        found, _ = self._weighable(beside_batch=True)
        room = 1 - max((float(x.example_weight.max()) for x in found.values()), default=1.0)
        tried = [b for b in BATCH_WEIGHTS if b <= room]
        if not tried or any(layer.uses_batch for layer in found.values()):
            return Fitted(None, decisions=())
        drawn = np.random.default_rng(self.seed).permutation(bench.split.fit)
        drawn = drawn[:BATCH_WEIGHT_EXAMPLES]
        none: _Weights = dict.fromkeys(found, 0.0)
        chosen, decisions = none, list[Decision]()
        nlls = [self._with_batch_weight(dict.fromkeys(found, b), drawn, "fit").nll for b in tried]
        losses = [math.inf if nll is None else nll for nll in nlls]
        for b in reversed(tried[: losses.index(min(losses)) + 1]):
            own = f"batch weight {b:.3g}{self._by_medians}"
            name = own if now.name == ORIGINAL else f"{now.name}, {own}"
            chosen = dict.fromkeys(found, b)
            decision, is_sorted = self._judged_batch_weight((name, chosen), (now.name, none), none)
            decisions.append(decision)
            if decision.admitted or not is_sorted:
                break
        if not decisions[-1].admitted:
            return Fitted(None, decisions=tuple(decisions))
        set_example_weight_(self.model, batch_weight=chosen)
        if self.plan.weight.granularity == "channel":
            learn, monitor = self._to_learn(BATCH)
            how: Any = {"recipe": self.plan.weight, "precision": self.precision}
            each = learn_batch_weight_(self.model, found, learn, monitor=monitor, **how)
            finer = name.replace(own, f"batch weight per channel{self._by_medians}")
            decision, _ = self._judged_batch_weight((finer, each), (name, chosen), none)
            decisions.append(decision)
            name, chosen = (finer, each) if decision.admitted else (name, chosen)
            set_example_weight_(self.model, batch_weight=chosen)
        return Fitted(name, decisions=tuple(decisions))

    def _judged_batch_weight(
        self, candidate: tuple[str, _Weights], kept: tuple[str, _Weights], none: _Weights
    ) -> tuple[Decision, bool]:
        """The gate's decision, and whether only images sorted by class refute the candidate."""
        old, new = (self._in_order("iid", weights) for _, weights in (kept, candidate))
        decision = judge(BATCH, (candidate[0], new), (kept[0], old), self.plan.gate.z)
        if not decision.admitted or self.plan.weight.assume_iid:
            return decision, False
        # A batch with few classes is normalized by them, and loses their difference from others.
        old, new = (self._in_order("sorted", weights) for weights in (none, candidate[1]))
        if compare(old, new, seed=self.seed).verdict != "worse":
            return decision, False
        reason = (
            f"images sorted by class would suffer: top-1 {old.top1:.1%} becomes {new.top1:.1%}, "
            f"NLL {old.nll:.3f} becomes {new.nll:.3f} (--assume-iid accepts it)"
        )
        return replace(decision, admitted=False, reason=reason), True

    def _in_order(self, order: str, weights: _Weights) -> Metrics:
        """Metrics on select with batch weights, for one order of the images."""
        index, size = self.bench.split.select, self.bench.evaluation.size
        labels = np.asarray(self.bench.inputs.images.labels)[index]
        if order == "sorted":
            # Few images per class are available; in a long stream one class fills whole batches.
            size = min(size, max(FEWEST_SORTED, len(index) // len(np.unique(labels))))
        index = index[in_stream(order, labels, size, self.seed)]
        return self._with_batch_weight(weights, index, f"select, {order}", size)

    def _with_batch_weight(
        self, weights: _Weights, index: np.ndarray, what: str, size: int | None = None
    ) -> Metrics:
        self._weigh_batch_(weights)
        batches_of = partial(self.bench.batches, index, f"{what}: batch weight", size)
        found = replace(self.outputs(self.model, batches_of), task=self.task)
        return measured(found, self.seed)

    def _weighable(
        self, *, beside_batch: bool = False
    ) -> tuple[dict[str, GeneralizedBatchNorm], list[str]]:
        batches = self.bench.batches(self.bench.split.fit[:8], "a look at the layers")
        pointwise = self.plan.weight.pointwise
        return weighable_layers(self.model, batches, pointwise=pointwise, beside_batch=beside_batch)

    def label_free(self, _: State, *, how: str, train_batch_size: int) -> Fitted:
        """Fit example weights to the network's own behaviour in training mode."""
        order = np.random.default_rng(self.seed).permutation(self.bench.split.fit)
        # Whole runs of B: the batch size of evaluation must not change the result.
        size = train_batch_size * -(-64 // train_batch_size)
        batches = self.bench.batches(order, f"example weight: {how}", size).whole()
        fit = fit_moments_ if how == "fit-moments" else fit_predictions_
        layers, freedom = self._weighable()[0], self.plan.weight.granularity
        how_much: Any = {"granularity": freedom, "seed": self.seed}
        found = fit(self.model, batches, train_batch_size, layers, **how_much)
        self.bench.assumptions.append(found.describe())
        return Fitted(how)

    def chosen_weights(self, now: State) -> Fitted:
        """Choose example weights on the select split, level by level, against the current state."""
        bench = self.bench
        learn, monitor = self._to_learn("example weight")
        choice = choose_example_weight_(
            self.model,
            learn,
            select=bench.batches(bench.split.select, "select: example weight"),
            monitor=monitor,
            task=self.task,
            reference=None if bench.labelled else self._reference,
            recipe=self.plan.weight,
            z=self.plan.gate.z,
            incumbent=None if now.metrics is None else (now.name, now.metrics),
            precision=self.precision,
        )
        admitted = [d.candidate for d in choice.decisions if d.admitted]
        name = None if choice.chosen == "keep" else admitted[-1]
        return Fitted(name, (choice,), choice.decisions)

    def tuned(
        self, _: State, *, recipe: FinetuneRecipe, gated: bool, distils: bool, alone: bool = False
    ) -> Fitted:
        """Fine-tune, keep the best epoch, and let the select split or else the monitor judge it."""
        state, calibrations = None if gated else self.plan.state, list[Calibration]()
        tuned = self._finetune(recipe, state, calibrations, distils=distils)
        # A resumed run has measured the statistics of the last epochs only.
        k = tuned.best_epoch - len(tuned.curve) + len(calibrations)
        own = calibrations[k : k + 1] if tuned.best_epoch and k >= 0 else []
        results = (tuned, *(own if tuned.best_epoch else calibrations[-1:]))
        did = "distilled" if distils else "fine-tuned"
        if gated:
            learned = " with example weights" if recipe.example_weight == "learn" else ""
            return Fitted(f"{did} {recipe.train}{learned}{' alone' * alone}", results)
        if not tuned.best_epoch:
            self.bench.assumptions.append(
                "no epoch was better on the validation split than the start, so the network is "
                "unchanged. Another --lr may help."
            )
        return Fitted(f"{did} {tuned.trained}" if tuned.best_epoch else None, results, ())

    def _finetune(
        self,
        recipe: FinetuneRecipe,
        state: str | None,
        calibrations: list[Calibration],
        *,
        distils: bool,
    ) -> Finetuning:
        bench = self.bench
        learn, monitor = bench.learn_and_monitor()
        size = bench.training_batch_size(recipe.batch_size)
        training = bench.batches(learn, f"fine-tuning {recipe.train}", size)
        identity = ""
        if state is not None:
            of_data = bench.identity(learn, monitor, batch_size=size)
            # The reference counts by its tensors, not by the path of its file.
            statistics = replace(self.plan.statistics, reference=None, reference_model=None)
            identity = f"{of_data} {statistics}"
        # `fix` trains its candidates in fp32 when it evaluates in fp16.
        fp32 = self.precision == "fp16" and self.plan.command == "fix"

        def refresh(_: nn.Module) -> None:
            calibrations.append(self._recalibrate("population"))

        return finetune_(
            self.model,
            training.shuffled(self.seed, recipe.augment),
            monitor=bench.batches(monitor, "fine-tuning: watching"),
            task=bench.inputs.task,
            reference=self._reference if distils else None,
            recipe=recipe,
            weighable=self._weighable()[0] if recipe.example_weight == "learn" else None,
            seed=self.seed,
            after_epoch=refresh if recipe.statistics == "train" else None,
            state=state,
            identity=identity,
            precision="fp32" if fp32 else self.precision,
            include_frozen=self.plan.statistics.include_frozen,
        )

    def refitted(self, _: State) -> Fitted:
        """Fit scale and shift of layers with new example weights to the original's outputs."""
        bench = self.bench
        bench.assumptions += zero_pointwise_(self.model, self._weighable(beside_batch=True)[1])
        if bench.original is not None and n_live(self.model):
            index = np.random.default_rng(self.seed).permutation(bench.split.fit)
            batches = bench.batches(index[:REFIT_SAMPLES], "re-fitting scale and shift").whole()
            bench.assumptions.append(refit_(self.model, bench.original, batches).describe())
        return Fitted("converted and re-fitted")
