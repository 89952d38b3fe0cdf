"""The stages of `fix`: each tries something, and keeps it or puts back what stood.

Statistics are never left stale: weights trained in training mode are followed by recalibration;
weights tuned with frozen statistics have those as part of the answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from bnfix import guards
from bnfix.checkpoints.averaging import average_into_
from bnfix.errors import NumericError
from bnfix.layers.norms import generalized_norms, set_example_weight_
from bnfix.layers.refitting import REFIT_SAMPLES, refit_
from bnfix.measuring.evaluation import collect, measured
from bnfix.measuring.gate import Decision, judge
from bnfix.measuring.metrics import Metrics
from bnfix.memory import BatchSize
from bnfix.plan import Plan
from bnfix.recipe import LABEL_FREE, AverageRecipe, FinetuneRecipe
from bnfix.reporting.layer_rows import statistics_of
from bnfix.statistics.calibration import Calibration, describe_missing, recalibrate_
from bnfix.tracking import Tracked
from bnfix.tuning.finetuning import Finetuning, finetune_
from bnfix.weighing.example_weight import WeightChoice, choose_example_weight_, weighable_layers
from bnfix.weighing.label_free import fit_moments_, fit_predictions_
from bnfix.workbench import Workbench

ORIGINAL = "as it was"


@dataclass(frozen=True)
class State:
    """The model at one time, and the results that it holds."""

    name: str
    values: guards.Snapshot
    metrics: Metrics | None
    results: tuple[Any, ...]


class Stages:
    """The stages of `fix` over one workbench; keeps what stands and what it took to get there."""

    def __init__(self, bench: Workbench, plan: Plan) -> None:
        self.bench, self.plan, self.model = bench, plan, bench.model
        self.original_statistics = statistics_of(self.model)
        self.decisions: list[Decision] = []
        self.choice: WeightChoice | None = None
        self.finetunings: list[Finetuning] = []
        self.averaged: list[dict[str, Any]] = []
        self.passes: list[Tracked] = []
        #: All that stages found, and the part of it that the model holds as it is now.
        self.tried: list[Any] = []
        self.results: tuple[Any, ...] = ()
        self.gated = bench.labelled and plan.chooses
        # Stated or not, it is left unless it cannot fit.
        self._statistics_size = BatchSize(
            plan.statistics.batch_size,
            "population statistics",
            bench.assumptions,
            remark="; with the batch feed the statistics depend a little on this",
        )
        self.name = ORIGINAL
        self.stated: State | None = None
        self._standing: Metrics | None = None
        self.original = self.state()

    def state(self) -> State:
        """The model as it is now."""
        return State(self.name, guards.Snapshot(self.model), self._standing, self.results)

    def put_back(self, state: State) -> None:
        """Make the model what it was."""
        state.values.restore_()
        self.name, self._standing, self.results = state.name, state.metrics, state.results

    @property
    def calibration(self) -> Calibration | None:
        """The measurement of the statistics that the model holds, if they are new."""
        found = [result for result in self.results if isinstance(result, Calibration)]
        return found[-1] if found else None

    @property
    def refused(self) -> tuple[Any, ...]:
        """What was tried and is not in the model as it is now."""
        kept = set(map(id, self.results))
        return tuple(result for result in self.tried if id(result) not in kept)

    def _note(self, *results: Any) -> None:
        """Results that the model holds from now on."""
        self.tried += results
        self.results += results

    def average(self, recipe: AverageRecipe) -> None:
        """The mean of several checkpoints, as stated; the first one stays the original."""
        self.averaged, notes = average_into_(self.bench.loaded, recipe, self.plan.model)
        self.bench.assumptions += notes
        self.name = f"mean of {len(self.averaged)} checkpoints"

    def standing(self) -> Metrics:
        """Metrics on select of what stands."""
        if self._standing is None:
            self._standing = self._on_select("what stands")
        return self._standing

    def _on_select(self, what: str) -> Metrics:
        bench = self.bench
        return self.evaluate_on(lambda: bench.batches(bench.split.select, f"select: {what}"))

    def evaluate_on(
        self, batches_of: Callable[[], Tracked], model: nn.Module | None = None
    ) -> Metrics:
        """Metrics of a model, by default as it is now, in batches that fit the memory."""
        gate, run = self.bench.gate, self.bench.run

        def attempt(_: int) -> Metrics:
            batches = batches_of()
            self.passes.append(batches)
            (found,) = collect([model or self.model], batches, precision=run.precision)
            return measured(found, gate.seed)

        return self.bench.evaluation.run(attempt)

    def _offer(self, stage: str, name: str, fallback: State) -> bool:
        """Judge the model as it is now; put what stood back if it is not admitted."""
        metrics = self._on_select(name)
        decision = judge(stage, (name, metrics), (self.name, self.standing()), self.bench.gate.z)
        self.decisions.append(decision)
        if decision.admitted:
            self.name, self._standing = name, metrics
        else:
            self.put_back(fallback)
        return decision.admitted

    def _leave_out(self, candidate: str, error: NumericError) -> None:
        self.bench.assumptions.append(f"{candidate}: was given up: {error}")

    def statistics(self) -> None:
        """New population statistics: stated, or each kind as a candidate."""
        recipe, weight = self.plan.statistics, self.plan.weight.example_weight
        b = recipe.train_batch_size
        if weight in LABEL_FREE and recipe.statistics == "auto":
            recipe = dataclasses.replace(recipe, statistics="train-batch")
        if recipe.statistics in ("population", "train-batch"):
            calibration = self._recalibrate(recipe.statistics)
            self._note(calibration)
            found = f"statistics of the data ({calibration.target})"
            self.name = found if self.name == ORIGINAL else f"{self.name}, {found}"
        elif recipe.statistics == "auto" and self.gated:
            for target in ("population", *(("train-batch",) if b else ())):
                self._try_statistics(target, example_weight=None)
            if b and weight == "auto":
                self._try_statistics("train-batch", example_weight=1 / b)
        if weight == "match" and b is not None:
            weight = 1 / b
        elif weight in LABEL_FREE and b is not None:
            self._fit_label_free(str(weight), b)
        if not isinstance(weight, str):
            self._set_weight(float(weight))
            stated = f"example weight {weight:.3g}"
            self.name = stated if self.name == ORIGINAL else f"{self.name}, {stated}"
            self._standing = None
        stated_statistics = recipe.statistics in ("population", "train-batch")
        if stated_statistics or weight in LABEL_FREE or not isinstance(weight, str):
            self.stated = self.state()

    def _fit_label_free(self, how: str, train_batch_size: int) -> None:
        """Example weights fitted to the network's own behaviour in training mode."""
        bench, recipe = self.bench, self.plan.weight
        order = np.random.default_rng(bench.gate.seed).permutation(bench.split.fit)
        # Whole runs of B; not the batch size of evaluation, which must not change what is found.
        size = train_batch_size * -(-64 // train_batch_size)
        batches = bench.batches(order, f"example weight: {how}", size).whole()
        fit = fit_moments_ if how == "fit-moments" else fit_predictions_
        found = fit(
            self.model,
            batches,
            train_batch_size,
            self._weighable()[0],
            granularity=recipe.granularity,
            seed=bench.gate.seed,
        )
        bench.assumptions.append(found.describe())
        self.name = how if self.name == ORIGINAL else f"{self.name}, {how}"
        self._standing = None

    def _try_statistics(self, target: str, example_weight: float | None) -> None:
        self.standing()
        before = self.state()
        try:
            calibration = self._recalibrate(target)
        except NumericError as error:
            self._leave_out(f"statistics of the data ({target})", error)
            return
        name = f"statistics of the data ({calibration.target})"
        if example_weight is not None:
            self._set_weight(example_weight)
            name = f"match (statistics {calibration.target}, example weight {example_weight:.3g})"
        self._note(calibration)
        self._offer("statistics", name, before)

    def _recalibrate(self, target: str) -> Calibration:
        recipe, gate = self.plan.statistics, self.bench.gate
        order = np.random.default_rng(gate.seed).permutation(self.bench.split.fit)
        state = None if self.plan.command == "finetune" else self.plan.state
        if isinstance(recipe.samples, int):
            order = order[: recipe.samples]
        self._statistics_size.foresee(self.bench.footprint)

        def attempt(size: int) -> Calibration:
            batches = self.bench.batches(order, f"statistics ({target})", size).evened()
            self.passes.append(batches)
            return recalibrate_(
                self.model,
                batches,
                target=target,
                train_batch_size=recipe.train_batch_size,
                feed=recipe.feed,
                samples="auto" if recipe.samples == "auto" else None,
                tolerance=recipe.tolerance,
                precision=self.bench.run.precision,
                layers=self.plan.swap.layers,
                skip=self.plan.swap.skip,
                include_frozen=recipe.include_frozen,
                state=state,
                identity="" if state is None else self.bench.identity(order, batch_size=size),
            )

        calibration = self._statistics_size.run(attempt)
        self.bench.assumptions += describe_missing(calibration)
        return calibration

    def _set_weight(self, weight: float) -> None:
        layers, excluded = self._weighable()
        if layers:
            set_example_weight_(self.model, dict.fromkeys(layers, weight))
        if excluded and weight:
            self.bench.assumptions.append(
                f"{len(excluded)} layers keep their example weight: they have a single position a "
                "map, or no statistics (--pointwise takes the first in)."
            )

    def _weighable(self) -> tuple[dict[str, Any], list[str]]:
        batches = self.bench.batches(self.bench.split.fit[:8], "a look at the layers")
        return weighable_layers(self.model, batches, pointwise=self.plan.weight.pointwise)

    def tune(self) -> None:
        """Fine-tuning alone, example weights alone, both together: the cheaper one wins ties."""
        recipe, weight = self.plan.finetune, self.plan.weight.example_weight
        if not self.gated or (recipe is None and weight != "auto"):
            return
        self.standing()
        base = self.state()
        if recipe is not None:
            alone = dataclasses.replace(recipe, example_weight="keep")
            if self._finetune_if_stable(alone):
                self._offer("fine-tuning", f"fine-tuned {recipe.train}", base)
        if weight != "auto":
            return
        learns = recipe is not None and recipe.example_weight == "learn"
        stands = self.state()
        if recipe is None or recipe.statistics == "frozen":
            self._try_from(base)
        if not self._choose():
            self.put_back(stands)
        # Measured now: what is judged next begins at another state of the model.
        self.standing()
        stands = self.state()
        if recipe is not None and learns and recipe.statistics == "frozen":
            self._try_from(base)
            name = f"fine-tuned {recipe.train} with example weights"
            if not self._finetune_if_stable(recipe):
                self.put_back(stands)
            else:
                self._offer("fine-tuning", name, stands)

    def _try_from(self, base: State) -> None:
        """Begin a candidate at an earlier state; it is judged against the one of now."""
        base.values.restore_()
        self.results = base.results

    def tune_ungated(self) -> None:
        """Fine-tuning as stated; its own monitor keeps the best epoch or the original."""
        recipe = self.plan.finetune
        if recipe is None:
            return
        if self.bench.original is not None:
            self._refit(self.bench.original)
        if recipe.ghost_size is not None and recipe.statistics == "frozen":
            self.bench.assumptions.append(
                "--ghost-size was stored but had no effect here: with --statistics frozen nothing "
                "is normalized by batches; --statistics train does that."
            )
        if self._finetune_if_stable(recipe, self.plan.state) and self.finetunings[-1].best_epoch:
            self.name = f"fine-tuned {self.finetunings[-1].trained}"

    def _refit(self, original: nn.Module) -> None:
        """Fit scale and shift of layers that now weigh the example to the original's outputs."""
        bench = self.bench
        _, excluded = self._weighable()
        layers = dict(generalized_norms(self.model))
        pointwise = [
            name for name in excluded
            if layers[name].live and layers[name].running_mean is not None
        ]  # fmt: skip
        set_example_weight_(self.model, dict.fromkeys(pointwise, 0.0))
        if pointwise:
            bench.assumptions.append(
                f"{len(pointwise)} layers have a single position a map and keep example weight 0."
            )
        if any(layer.live for layer in layers.values()):
            index = np.random.default_rng(bench.gate.seed).permutation(bench.split.fit)
            batches = bench.batches(index[:REFIT_SAMPLES], "re-fitting scale and shift").whole()
            bench.assumptions.append(refit_(self.model, original, batches).describe())
        self.name = "converted and re-fitted"

    def _choose(self) -> bool:
        """Choose example weights from the present state; whether a level was admitted."""
        bench = self.bench
        standing = self.standing()
        learn, monitor = bench.learn_and_monitor()
        recipe = self.plan.weight
        learning = bench.batches(
            learn, "example weight: fitting", bench.training_batch_size(recipe.batch_size)
        )
        watching = bench.batches(monitor, "example weight: watching")
        selecting = bench.batches(bench.split.select, "select: example weight")
        try:
            choice = choose_example_weight_(
                self.model,
                learning.shuffled(bench.gate.seed),
                select=selecting,
                monitor=watching,
                recipe=recipe,
                z=bench.gate.z,
                incumbent=(self.name, standing),
                precision=bench.run.precision,
            )
        except NumericError as error:
            self._leave_out("example weights", error)
            return False
        self.choice = choice
        self._note(choice)
        self.decisions += choice.decisions
        if choice.chosen != "keep":
            self.name = next(d.candidate for d in reversed(choice.decisions) if d.admitted)
            self._standing = None
        return choice.chosen != "keep"

    def _finetune_if_stable(self, recipe: FinetuneRecipe, state: str | None = None) -> bool:
        """Fine-tune; a run whose numbers are not finite is noted and leaves the model as it was."""
        try:
            self._finetune(recipe, state)
        except NumericError as error:
            weights = " with example weights" if recipe.example_weight == "learn" else ""
            self._leave_out(f"fine-tuning of {recipe.train}{weights}", error)
            return False
        return True

    def _finetune(self, recipe: FinetuneRecipe, state: str | None = None) -> None:
        bench = self.bench
        learn, monitor = bench.learn_and_monitor()
        training = bench.batches(
            learn, f"fine-tuning {recipe.train}", bench.training_batch_size(recipe.batch_size)
        )
        watching = bench.batches(monitor, "fine-tuning: watching")

        calibrations: list[Calibration] = []

        def refresh(model: nn.Module) -> None:
            calibrations.append(self._recalibrate("population"))

        layers = self._weighable()[0] if recipe.example_weight == "learn" else None
        identity = ""
        if state is not None:
            size = training.batches.batch_size
            statistics = self.plan.statistics
            identity = f"{bench.identity(learn, monitor, batch_size=size)} {statistics}"
        tuned = finetune_(
            self.model,
            training.shuffled(bench.gate.seed, recipe.augment),
            monitor=watching,
            recipe=recipe,
            weighable=layers,
            seed=bench.gate.seed,
            after_epoch=refresh if recipe.statistics == "train" else None,
            state=state,
            identity=identity,
            precision=self._training_precision(),
        )
        self.finetunings.append(tuned)
        self._note_tuned(tuned, calibrations)

    def _note_tuned(self, tuned: Finetuning, calibrations: list[Calibration]) -> None:
        """The statistics are those of the epoch that was kept, if this run has seen it."""
        if not tuned.best_epoch:
            self.tried += [tuned, *calibrations[-1:]]
            return
        # A resumed run has measured the last epochs only.
        k = tuned.best_epoch - len(tuned.curve) + len(calibrations)
        self._note(tuned, *(calibrations[k : k + 1] if k >= 0 else ()))

    def _training_precision(self) -> str:
        """That of the run; candidates of `fix` are trained in fp32 where it evaluates in fp16."""
        precision = self.bench.run.precision
        return "fp32" if precision == "fp16" and self.plan.command == "fix" else precision
