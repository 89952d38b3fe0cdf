"""The order of the stages; no other room knows it.

Two rules stand above all else. Statistics are never left stale: weights trained in training mode
are followed by recalibration; weights tuned with frozen statistics have those as part of the
answer. No example is in two splits: what is fitted on *fit* is judged on *select* and claimed on
*test*.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfix import guards, processes
from bnfix.checkpoints.averaging import average_into_
from bnfix.checkpoints.saving import history_entry, round_as_stored_, versions
from bnfix.data.batches import fingerprint
from bnfix.errors import ConfigError, DataError, NumericError
from bnfix.estimating import Work, estimated
from bnfix.layers.norms import generalized_norms, set_example_weight_
from bnfix.layers.refitting import REFIT_SAMPLES, refit_
from bnfix.layers.sites import find_norms
from bnfix.layers.surgery import Change, plan_swap, swap_planned_
from bnfix.measuring.evaluation import evaluate
from bnfix.measuring.gate import Decision, judge
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.pairing import compare
from bnfix.recipe import (
    LABEL_FREE,
    AverageRecipe,
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.reporting.layer_rows import drifts_between, layer_rows, n_live, statistics_of
from bnfix.reporting.records import DataUsed, Evaluated
from bnfix.reporting.report import Report
from bnfix.reporting.result import Result
from bnfix.statistics.calibration import Calibration, describe_missing, recalibrate_, residuals
from bnfix.tuning.finetuning import Finetuning, finetune_
from bnfix.weighing.example_weight import WeightChoice, choose_example_weight_, weighable_layers
from bnfix.weighing.label_free import fit_moments_, fit_predictions_
from bnfix.workbench import (
    Track,
    Tracked,
    Workbench,
    data_record,
    describe_skipped,
    history_digests,
    open_workbench,
    seen_before,
    silent,
)
from bnfix.workload import workload

ORIGINAL = "as it was"
#: What `fix` tries where there are labels.
TRIED = FinetuneRecipe(train="norms+head", example_weight="learn")


@dataclass(frozen=True)
class Plan:
    """All recipes of one command.

    Args:
        command: ``fix``, ``calibrate``, ``finetune`` or ``average``.
        command_line: as typed.
        model: which model.
        source: which examples.
        swap: which layers and kind.
        statistics: auto, or what to do.
        weight: auto, or what to do.
        finetune: what to try; ``None`` for nothing.
        gate: splits, seed, z.
        run: device and batch size.
        state: folder for the state of a long run, to go on from.
        average: checkpoints to average the model with, before anything else.
    """

    command: str = "fix"
    command_line: str = ""
    model: ModelRecipe = ModelRecipe()
    source: DataRecipe = DataRecipe()
    swap: SwapRecipe = SwapRecipe()
    statistics: StatisticsRecipe = StatisticsRecipe()
    weight: WeightRecipe = WeightRecipe()
    finetune: FinetuneRecipe | None = TRIED
    gate: GateRecipe = GateRecipe()
    run: RunOptions = RunOptions()
    state: str | None = None
    average: AverageRecipe | None = None

    def __post_init__(self) -> None:
        """Check what only the recipes together can tell.

        Raises:
            ConfigError: if a fit of the weight without labels has no batch size.
        """
        weight = self.weight.example_weight
        if weight in LABEL_FREE and self.statistics.train_batch_size is None:
            raise ConfigError(
                f"--example-weight {weight}: the batch size is missing. Give --train-batch-size B.",
                name="train_batch_size",
            )

    @property
    def chooses(self) -> bool:
        """Whether anything is left to the gate."""
        without_labels = self.weight.example_weight in LABEL_FREE
        auto = self.statistics.statistics == "auto" and not without_labels
        auto = auto or self.weight.example_weight == "auto"
        return auto or (self.command == "fix" and self.finetune is not None)

    def fractions(self) -> tuple[float, float, float]:
        """Fit, select and test parts of the data."""
        given = self.source.test is not None
        if self.command == "finetune":
            return (1.0, 0.0, 0.0) if given else (0.8, 0.0, 0.2)
        if self.average is not None and not given and self.source.labels != "none":
            return 0.8, 0.0, 0.2
        if not self.chooses or self.source.labels == "none":
            return 1.0, 0.0, 0.0
        if given:
            return 0.75, 0.25, 0.0
        return self.gate.fit, self.gate.select, 1 - self.gate.fit - self.gate.select

    def open(self, checkpoint: str | Path, data: str, track: Track) -> Workbench:
        """Open the checkpoint and the data, cut it, and swap the norm layers.

        Args:
            checkpoint: the file.
            data: DATA.
            track: how progress is shown.

        Returns:
            The workbench.

        Raises:
            DataError: if labels are needed and there are none.
        """
        bench = open_workbench(
            checkpoint,
            data,
            model=self.model,
            source=self.source,
            gate=self.gate,
            run=self.run,
            fractions=self.fractions(),
            track=track,
        )
        if self.finetune is not None and not bench.labelled:
            if self.command != "fix":
                raise DataError(
                    f"{data}: has no labels, and fine-tuning needs them. Give labelled data."
                )
            bench.assumptions.append("fine-tuning was not tried: the data has no labels.")
        if self.average is not None and not bench.labelled:
            split = bench.split
            bench.split = dataclasses.replace(
                split, fit=_joined(split.fit, split.test), test=split.test[:0]
            ) if self.source.test is None else split  # fmt: skip
        if self.chooses and not bench.labelled:
            bench.assumptions.append(
                "without labels nothing can be proven, so `auto` keeps what is there. These act: "
                "--statistics population, --statistics train-batch --train-batch-size B, "
                "--example-weight match, fit-moments, fit-predictions or a number."
            )
            if bench.split.select.size:
                bench.split = dataclasses.replace(
                    bench.split,
                    fit=_joined(bench.split.fit, bench.split.select, bench.split.test),
                    select=bench.split.select[:0],
                    test=bench.split.test[:0],
                )
        self._swap_(bench)
        return bench

    def _swap_(self, bench: Workbench) -> None:
        """Swap stock layers; those that a bnfix file has set already keep what is not asked for."""
        swapped = plan_swap(bench.model, self.swap)
        if list(generalized_norms(bench.model)):
            if dataclasses.replace(self.swap, layers=(), skip=()) == SwapRecipe():
                return
            changes = tuple(self._keeping(change, bench.model) for change in swapped.changes)
            swapped = dataclasses.replace(swapped, changes=changes)
        live = any(layer.live for _, layer in generalized_norms(bench.model))
        if not live and any(change.example_weight for change in swapped.changes):
            bench.original = copy.deepcopy(bench.model)
        swapped = swap_planned_(bench.model, swapped)
        bench.assumptions += [*swapped.notes, *swapped.skipped]

    def _keeping(self, change: Change, model: nn.Module) -> Change:
        """A change of a layer that is set already, less what nobody asked for."""
        layer, swap = dict(generalized_norms(model)).get(change.name), self.swap
        if layer is None or swap.to != SwapRecipe().to:
            return change
        return dataclasses.replace(
            change,
            channel_groups=swap.channel_groups or layer.channel_groups,
            ghost_size=swap.ghost_size or layer.ghost_size,
            example_weight=swap.example_weight,
        )

    def describe(self, bench: Workbench, output: str | None) -> dict[str, Any]:
        """What the command would do, as JSON values.

        Args:
            bench: the opened workbench.
            output: where it would be written.

        Returns:
            Layers, data, splits, stages, passes, and what they would cost on this machine: a few
            batches are run for that, and nothing is changed.
        """
        split = bench.split
        return {
            "command": self.command,
            "plan": True,
            "model": bench.loaded.origin.spec,
            "n_layers": len(find_norms(bench.model)),
            "data": {
                **data_record(bench.images),
                "kind": bench.images.kind,
                "labels": bench.labelled,
                "splits": {
                    "fit": len(split.fit),
                    "select": len(split.select),
                    "test": len(split.test),
                },
            },
            "preprocessing": dataclasses.asdict(bench.preprocessing),
            "stages": self._stages(bench),
            "device": str(next(iter(bench.model.parameters())).device),
            **estimated(bench, self.workload(bench)).to_json(),
            "output": output,
            "assumptions": list(bench.assumptions),
        }

    def workload(self, bench: Workbench) -> list[Work]:
        """The passes that the command takes where every candidate is tried.

        Args:
            bench: the opened workbench.

        Returns:
            One entry a stage, in order.
        """
        return workload(
            bench,
            gated=bench.labelled and self.chooses,
            statistics=self.statistics,
            weight=self.weight,
            finetune=self.finetune if bench.labelled else None,
            only_finetune=self.command == "finetune",
        )

    def _stages(self, bench: Workbench) -> list[str]:
        gated = bench.labelled and self.chooses
        stages = []
        n_norms = sum(site.has_statistics and not site.frozen for site in find_norms(bench.model))
        passes = 1.0 if self.statistics.feed == "batch" else (n_norms + 3) / 2
        if self.average is not None:
            stages.append(f"mean of {len(self.average.files) + 1} checkpoints")
        if self.statistics.statistics != "keep" and (gated or self._stated_statistics()):
            # All batches walk together, or each layer takes a pass that is shorter than the next.
            more = "" if passes == 1 else f", or {passes:g} where that does not fit the memory"
            stages.append(
                f"population statistics ({self.statistics.statistics}, {self.statistics.feed} "
                f"feed): 1 pass over fit{more}"
            )
        if gated and self.finetune is not None:
            stages.append(f"fine-tuning ({self.finetune.train}): {self.finetune.epochs} epochs")
        if gated and self.weight.example_weight == "auto":
            stages.append(f"example weight (up to per {self.weight.granularity}), on fit")
        if gated:
            stages.append("every candidate judged on select; the winner measured on test")
        return stages

    def _stated_statistics(self) -> bool:
        without_labels = self.weight.example_weight in LABEL_FREE
        auto = self.statistics.statistics == "auto" and without_labels
        return auto or self.statistics.statistics in ("population", "train-batch")


def fix(
    checkpoint: str | Path,
    *,
    data: str,
    model: str | None = None,
    plan: Plan | None = None,
    track: Track = silent,
) -> Result:
    """Repair a checkpoint at its norm layers, as far as held-out data proves it better.

    Candidates: new population statistics; brief fine-tuning of norms and head; example weights;
    both together. Each is fitted on the fit split and judged on the select split, the cheaper at
    inference first, so that it wins ties; the claim is made on the test split. Where nothing is
    better the output is the input.

    Args:
        checkpoint: the file.
        data: DATA; labelled, unless everything is stated in the plan.
        model: spec of the model, if the file does not carry one.
        plan: all settings.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    return execute(*open_plan(plan or Plan(), checkpoint, data, model, track))


def calibrate(
    checkpoint: str | Path,
    *,
    data: str,
    model: str | None = None,
    plan: Plan | None = None,
    track: Track = silent,
) -> Result:
    """Population statistics and example weights, gated; `fix` without fine-tuning.

    Args:
        checkpoint: the file.
        data: DATA; labelled, unless everything is stated in the plan.
        model: spec of the model, if the file does not carry one.
        plan: all settings.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    plan = dataclasses.replace(plan or Plan(), command="calibrate", finetune=None)
    return execute(*open_plan(plan, checkpoint, data, model, track))


def finetune(
    checkpoint: str | Path,
    *,
    data: str,
    model: str | None = None,
    plan: Plan | None = None,
    track: Track = silent,
) -> Result:
    """Fine-tune a checkpoint briefly; keep the best epoch, or the original.

    Args:
        checkpoint: the file.
        data: labelled DATA; a fifth is kept for the test, unless the plan names a test.
        model: spec of the model, if the file does not carry one.
        plan: all settings; its ``finetune`` says what is trained.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    plan = plan or Plan(finetune=FinetuneRecipe())
    plan = dataclasses.replace(plan, command="finetune")
    return execute(*open_plan(plan, checkpoint, data, model, track))


def open_plan(
    plan: Plan, checkpoint: str | Path, data: str, model: str | None, track: Track
) -> tuple[Plan, Workbench]:
    """Open what a plan works on.

    Args:
        plan: all settings.
        checkpoint: the file.
        data: DATA.
        model: spec that overrides the plan's.
        track: how progress is shown.

    Returns:
        The plan and its workbench.
    """
    if model is not None:
        plan = dataclasses.replace(plan, model=dataclasses.replace(plan.model, model=model))
    return plan, plan.open(checkpoint, data, track)


def execute(plan: Plan, bench: Workbench) -> Result:
    """Go through the stages of a plan.

    Args:
        plan: all settings.
        bench: opened by the plan.

    Returns:
        Model, report, history entry.
    """
    stages = _Stages(bench, plan)
    if (n := processes.here().size) > 1:
        bench.assumptions.append(f"{n} processes shared the work; the first one wrote.")
    if plan.average is not None:
        stages.average(plan.average)
    if plan.command == "finetune":
        stages.tune_ungated()
    else:
        stages.statistics()
        stages.tune()
    return stages.result()


class _Stages:
    """The stages of `fix` over one workbench; keeps what stands and what it took to get there."""

    def __init__(self, bench: Workbench, plan: Plan) -> None:
        self.bench, self.plan, self.model = bench, plan, bench.model
        self.original = guards.Snapshot(self.model)
        self.original_statistics = statistics_of(self.model)
        self.decisions: list[Decision] = []
        self.calibration: Calibration | None = None
        self.choice: WeightChoice | None = None
        self.finetunings: list[Finetuning] = []
        self.averaged: list[dict[str, Any]] = []
        self.passes: list[Tracked] = []
        self.gated = bench.labelled and plan.chooses
        self.name = ORIGINAL
        self.stated: tuple[str, guards.Snapshot] | None = None
        self._standing: Metrics | None = None

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
        return self._evaluate(self.bench.batches(self.bench.split.select, f"select: {what}"))

    def _evaluate(self, batches: Tracked, model: nn.Module | None = None) -> Metrics:
        self.passes.append(batches)
        gate, run = self.bench.gate, self.bench.run
        return evaluate(model or self.model, batches, precision=run.precision, seed=gate.seed)

    def _offer(self, stage: str, name: str, fallback: guards.Snapshot) -> bool:
        """Judge the model as it is now; put what stood back if it is not admitted."""
        try:
            metrics = self._on_select(name)
        except NumericError as error:
            self._leave_out(name, error)
            fallback.restore_()
            return False
        decision = judge(stage, (name, metrics), (self.name, self.standing()), self.bench.gate.z)
        self.decisions.append(decision)
        if decision.admitted:
            self.name, self._standing = name, metrics
        else:
            fallback.restore_()
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
            self.calibration = self._recalibrate(recipe.statistics)
            found = f"statistics of the data ({self.calibration.target})"
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
            self.stated = self.name, guards.Snapshot(self.model)

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
        before = guards.Snapshot(self.model)
        try:
            calibration = self._recalibrate(target)
        except NumericError as error:
            self._leave_out(f"statistics of the data ({target})", error)
            return
        name = f"statistics of the data ({calibration.target})"
        if example_weight is not None:
            self._set_weight(example_weight)
            name = f"match (statistics {calibration.target}, example weight {example_weight:.3g})"
        if self._offer("statistics", name, before) or self.calibration is None:
            self.calibration = calibration

    def _recalibrate(self, target: str) -> Calibration:
        recipe, gate = self.plan.statistics, self.bench.gate
        order = np.random.default_rng(gate.seed).permutation(self.bench.split.fit)
        if isinstance(recipe.samples, int):
            order = order[: recipe.samples]
        batches = self.bench.batches(order, f"statistics ({target})", recipe.batch_size)
        self.passes.append(batches)
        calibration = recalibrate_(
            self.model,
            batches,
            target=target,
            train_batch_size=recipe.train_batch_size,
            feed=recipe.feed,
            samples="auto" if recipe.samples == "auto" else None,
            tolerance=recipe.tolerance,
            layers=self.plan.swap.layers,
            skip=self.plan.swap.skip,
            state=None if self.plan.command == "finetune" else self.plan.state,
            identity=self._identity_of(order, batches),
        )
        self.bench.assumptions += describe_missing(calibration)
        return calibration

    def _identity_of(self, order: Any, batches: Tracked) -> str:
        """What statistics depend on besides model and options."""
        if self.plan.state is None:
            return ""
        found = fingerprint(self.bench.images, order)
        return str([found, batches.batches.batch_size, self.bench.preprocessing])

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
        if not self.gated:
            return
        recipe, weight = self.plan.finetune, self.plan.weight.example_weight
        base = guards.Snapshot(self.model)
        if recipe is not None:
            self.standing()
            alone = dataclasses.replace(recipe, example_weight="keep")
            if self._finetune_if_stable(alone):
                self._offer("fine-tuning", f"fine-tuned {recipe.train}", base)
        if weight != "auto":
            return
        learns = recipe is not None and recipe.example_weight == "learn"
        stands = guards.Snapshot(self.model)
        if recipe is None or recipe.statistics == "frozen":
            base.restore_()
        if not self._choose():
            stands.restore_()
        stands = guards.Snapshot(self.model)
        if recipe is not None and learns and recipe.statistics == "frozen":
            base.restore_()
            name = f"fine-tuned {recipe.train} with example weights"
            if not self._finetune_if_stable(recipe):
                stands.restore_()
            else:
                self._offer("fine-tuning", name, stands)

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
        self.choice = choice
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

        def refresh(model: nn.Module) -> None:
            self.calibration = self._recalibrate("population")

        layers = self._weighable()[0] if recipe.example_weight == "learn" else None
        self.finetunings.append(
            finetune_(
                self.model,
                training.shuffled(bench.gate.seed, recipe.augment),
                monitor=watching,
                recipe=recipe,
                weighable=layers,
                seed=bench.gate.seed,
                after_epoch=refresh if recipe.statistics == "train" else None,
                state=state,
                identity="" if state is None else self._identity(learn, monitor, training),
            )
        )

    def _identity(self, learn: Any, monitor: Any, training: Tracked) -> str:
        """What numbers of a run depend on besides model, recipe and seed."""
        images = self.bench.images
        return str([
            fingerprint(images, learn),
            fingerprint(images, monitor),
            training.batches.batch_size,
            self.bench.preprocessing,
            self.plan.statistics,
        ])  # fmt: skip

    def result(self) -> Result:
        """Measure original and output on test, never keep what is known to be worse, report."""
        bench, plan = self.bench, self.plan
        if self.gated and self.name == ORIGINAL:
            bench.assumptions.append("nothing was better beyond doubt, so the output is the input.")
        models: list[Evaluated] = []
        checkpoint = bench.loaded.checkpoint
        round_as_stored_(self.model)
        labelled_test = bench.test_images.labels is not None and bench.split.test.size > 0
        if labelled_test:
            models = self._measure_test()
        fresh: dict[str, tuple[float, float]] = {}
        if self.calibration is not None and bench.split.fit.size:
            check = bench.batches(bench.split.fit, "residual of the statistics")
            fresh = residuals(self.model, check)
        drifts = drifts_between(self.original_statistics, statistics_of(self.model))
        rows = layer_rows(self.model, drifts, fresh, self.calibration)
        data = {
            **data_record(bench.images),
            "fit": history_digests(bench.images, bench.split.fit),
            "select": history_digests(bench.images, bench.split.select),
        }
        options = self._options()
        entry = history_entry(
            plan.command,
            options=options,
            seed=bench.gate.seed,
            checkpoint=checkpoint,
            data=data,
            results={
                "output": self.name,
                "top1": models[-1].metrics.top1 if models else None,
                "nll": models[-1].metrics.nll if models else None,
            },
        )
        skipped = describe_skipped(self.passes)
        split = bench.split
        report = Report(
            command=plan.command,
            data=DataUsed(
                data["spec"],
                data["n_examples"],
                data["fingerprint"],
                bench.images.class_names,
                {"fit": len(split.fit), "select": len(split.select), "test": len(split.test)},
                skipped,
                len(skipped),
                self.plan.source.corrupt,
            ),
            models=tuple(models),
            layers=rows,
            decisions=tuple(self.decisions),
            calibration=self.calibration,
            choice=self.choice,
            finetunings=tuple(self.finetunings),
            assumptions=tuple(dict.fromkeys(bench.assumptions)),
            n_seen=seen_before(bench.test_images, split.test, bench.loaded.origin.history),
            options=options,
            seed=bench.gate.seed,
            command_line=plan.command_line,
            versions=versions(),
        )
        return Result(self.model, report, entry, bench.preprocessing)

    def _measure_test(self) -> list[Evaluated]:
        bench = self.bench
        final = guards.Snapshot(self.model)
        self.original.restore_()
        file, sha256 = str(bench.loaded.checkpoint.path), bench.loaded.checkpoint.sha256
        own = self.model if bench.original is None else bench.original
        before = self._evaluate(bench.test_batches(f"test: {ORIGINAL}"), own)
        first = Evaluated(ORIGINAL, file, sha256, before, n_live(own))
        final.restore_()
        after = self._evaluate(bench.test_batches(f"test: {self.name}"))
        # Another kind of normalization was asked for, whatever it costs.
        converted = bench.original is not None
        stated = not self.gated and (converted or self.plan.command != "finetune")
        if compare(before, after, seed=bench.gate.seed).verdict == "worse" and not stated:
            # What was asked for outright stays, whatever it costs; what was chosen goes.
            name, kept = self.stated or (ORIGINAL, self.original)
            if name != self.name:
                bench.assumptions.append(
                    f"{self.name!r} turned out significantly worse on the test split, so the "
                    f"output is {'the input' if name == ORIGINAL else repr(name)}."
                )
                kept.restore_()
                self.name, after = name, before
                if self.stated:
                    after = self._evaluate(bench.test_batches(f"test: {name}"))
        return [first, Evaluated(f"output: {self.name}", None, None, after, n_live(self.model))]

    def _options(self) -> dict[str, Any]:
        plan = self.plan
        finetune = plan.finetune
        return {
            "model": dataclasses.asdict(plan.model),
            "data": dataclasses.asdict(plan.source),
            "swap": dataclasses.asdict(plan.swap),
            "statistics": dataclasses.asdict(plan.statistics),
            "example_weight": dataclasses.asdict(plan.weight),
            "finetune": None if finetune is None else dataclasses.asdict(finetune),
            "gate": dataclasses.asdict(plan.gate),
            "precision": plan.run.precision,
            **({"average": self.averaged} if self.averaged else {}),
        }


def _joined(*parts: Any) -> Any:
    return torch.cat([torch.as_tensor(part) for part in parts]).sort().values.numpy()
