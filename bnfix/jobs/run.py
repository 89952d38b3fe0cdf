"""`fix`, `calibrate`, `finetune` and `average`: open a session, take its steps, test, report.

No example is in two splits: candidates are fitted on *fit* and judged on *select*; the verdict
comes from *test*.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from bnfix.checkpoints.save import round_as_stored_
from bnfix.checkpoints.several import end_domain_
from bnfix.core import distributed, guards
from bnfix.core.errors import ModelError, NumericError
from bnfix.core.settings import FinetuneRecipe
from bnfix.data.splits import data_record, describe_unlisted, history_digests, seen_before
from bnfix.jobs.fits import ORIGINAL, Fits, Fitted, State
from bnfix.jobs.head import cool_, describe_prior, named, open_prior, with_prior
from bnfix.jobs.inputs import Track, data_used, silent
from bnfix.jobs.plan import options_of
from bnfix.jobs.session import Plan, Workbench, finished
from bnfix.jobs.steps import STATISTICS, TUNING, Step, is_gated, open_plan, resolve
from bnfix.metrics.compare import Decision, compare, describe_easier, judge
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import MOST_IMAGES, Moved, Recorded, moved, record
from bnfix.metrics.task import ByRows
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.recalibrate.targets import describe_noise
from bnfix.report.records import (
    Evaluated,
    Trials,
    describe_neighbours,
    drifts_between,
    layer_rows,
    statistics_of,
)
from bnfix.report.report import Report, agreement_json
from bnfix.report.result import Result
from bnfix.training.finetune import Finetuning
from bnfix.weights.choose import WeightChoice

_T = TypeVar("_T")


def fix(
    checkpoint: str | Path,
    *,
    data: str | Sequence[str],
    model: str | None = None,
    plan: Plan | None = None,
    track: Track = silent,
) -> Result:
    """Repair a checkpoint at its norm layers, as far as held-out data proves it better.

    Candidates: new population statistics, alone and mixed with the old; brief fine-tuning of norms
    and head; example weights; both together. Each is fitted on the fit split and judged on the
    select split. Candidates that are cheaper at inference come first and win ties. The verdict
    comes from the test split. If nothing is better, the output is the input. With neither labels
    nor reference, and nothing stated, a rule mixes stored and new statistics, without proof.

    Args:
        checkpoint: the file.
        data: DATA, or a list of them to combine; labelled, unless the plan states everything.
        model: spec of the model, if the file does not carry one.
        plan: all settings; `bnfix.settings` has its recipes.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    return execute(open_plan(plan or Plan(), checkpoint, data, model, track))


def calibrate(
    checkpoint: str | Path,
    *,
    data: str | Sequence[str],
    model: str | None = None,
    plan: Plan | None = None,
    track: Track = silent,
) -> Result:
    """Population statistics and example weights, gated; `fix` without fine-tuning.

    Args:
        checkpoint: the file.
        data: DATA, or a list of them to combine; labelled, unless the plan states everything.
        model: spec of the model, if the file does not carry one.
        plan: all settings; `bnfix.settings` has its recipes.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    plan = replace(plan or Plan(), command="calibrate", finetune=None)
    return execute(open_plan(plan, checkpoint, data, model, track))


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
        data: labelled DATA; a fifth is held out for the test, unless the plan names a test.
        model: spec of the model, if the file does not carry one.
        plan: all settings; its ``finetune``, from `bnfix.settings`, selects the trained parts.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.
    """
    plan = replace(plan or Plan(finetune=FinetuneRecipe()), command="finetune")
    return execute(open_plan(plan, checkpoint, data, model, track))


def execute(bench: Workbench) -> Result:
    """Take the steps of a session's plan, test the result, and report."""
    if (n := distributed.here().size) > 1:
        bench.assumptions.append(f"{n} processes shared the work; the first one wrote the output.")
    bench.assumptions += describe_noise(bench.plan.statistics, bench.plan.gate.seed)
    run = Run(bench)
    run.take_steps()
    run.cool_()
    run.set_prior_()
    result = run.result()
    loaded, name = bench.loaded, bench.plan.new_domain
    if name is not None:
        tensors = loaded.checkpoint.tensors
        loaded.origin.domains = end_domain_(loaded.model, loaded.domains, name, tensors)
    return result


class Run:
    """A session's network on its way through the steps; `kept` is its state so far."""

    def __init__(self, bench: Workbench) -> None:
        self.bench, self.plan, self.model = bench, bench.plan, bench.model
        self.fits, self.steps = Fits(bench), resolve(bench.plan, bench)
        self.statistics_before = statistics_of(self.model)
        # `stated` holds the changes that the user asked for; they stay at any cost.
        self.original = self.kept = self.stated = State(ORIGINAL, guards.Snapshot(self.model))
        self.trained: tuple[Step, State] | None = None  # the kept state's training, and its start
        self.prior = open_prior(bench)  # class balance that the output is for
        self.unshifted: State | None = None  # the kept state before a prior that no test judges
        self.cooled: str | None = None  # note on the output's temperature
        self.tried: list[Any] = []
        self.decisions: list[Decision] = []

    def take_steps(self) -> None:
        """Step by step: fit, judge, then keep the result or restore the state before."""
        starts, track = {"input": self.kept, "base": self.kept}, self.bench.track
        for k, step in enumerate(self.steps, 1):
            self.bench.track = _numbered(track, f"{k}/{len(self.steps)} ")
            if step.gate == "select":
                self._metrics_of_kept()
            start = self.kept
            if step.start != "kept":
                start = starts.get(step.start, starts["base"])
                start.values.restore_()
            fitted = self._fitted(step)
            results = (*start.results, *fitted.results)
            if step.leaves and fitted.name is not None:
                left = State(fitted.name, guards.Snapshot(self.model), results=results)
                starts[step.leaves] = left
            name, metrics = self._judged(step, fitted)
            if name is None:
                self.kept.values.restore_()
            else:
                self.kept = State(name, guards.Snapshot(self.model), metrics, results)
                is_tuned = step.stage == TUNING and step.gate == "select"
                self.trained = (step, start) if is_tuned else None
            if step.stage == STATISTICS or not step.gate:
                starts["base"] = self.kept
            if not step.gate:
                self.stated = self.kept
        if self.trained and self.plan.finetune and self.plan.finetune.refit:
            self.bench.assumptions.append(f"--refit: {self._train_again(*self.trained)}")
        self.bench.track = track

    def _train_again(self, step: Step, start: State) -> str:
        """Repeat the winning training from its start, also on the images that chose it."""
        won = self.kept
        run = _last(won.results, Finetuning)
        if won.metrics is None or run is None or run.best_epoch + 1 < len(run.curve):
            return f"{won.name} was best before its last epoch, so it is kept."
        start.values.restore_()
        self.bench.again = True
        fitted = self._fitted(step)
        name = f"{won.name}, again on all images"
        # It has learned these images: a loss that is not lower means that something went wrong.
        losses = [m.nll for m in (self.fits.on_select(name), won.metrics) if m.nll is not None]
        if fitted.name is None or len(losses) < 2 or losses[0] >= losses[1]:
            won.values.restore_()
            return f"{won.name} did not gain from more images, so it is kept."
        results = (*start.results, *fitted.results)
        self.kept = State(name, guards.Snapshot(self.model), results=results)
        return (
            f"{won.name} was trained again on all {len(self.bench.work)} images, including "
            "those that chose it; its curve is measured on images that it learned from."
        )

    def _metrics_of_kept(self) -> Metrics:
        """The kept state's metrics on select, measured once, while the model is in that state."""
        metrics = self.kept.metrics or self.fits.on_select(self.kept.name)
        self.kept = replace(self.kept, metrics=metrics)
        if self.kept.values is self.original.values:
            self.original = self.kept
        return metrics

    def _fitted(self, step: Step) -> Fitted:
        """The step's fit; a candidate whose numbers are not finite is given up and noted."""
        try:
            fitted = step.fit(self.fits, self.kept)
        except NumericError as error:
            if not step.gate:
                raise
            self.bench.assumptions.append(f"{step.name} was given up: {error}")
            return Fitted(None)
        self.tried += fitted.results
        return fitted

    def _judged(self, step: Step, fitted: Fitted) -> tuple[str | None, Metrics | None]:
        """The network's new name, or none to restore the kept state; its metrics, if measured."""
        if fitted.decisions is not None or fitted.name is None or step.gate == "none":
            self.decisions += fitted.decisions or ()
            return fitted.name, None
        if not step.gate:
            # Stated changes add to the name; a candidate has its own name.
            first = self.kept.name == ORIGINAL
            return fitted.name if first else f"{self.kept.name}, {fitted.name}", None
        metrics, kept = self.fits.on_select(fitted.name), self._metrics_of_kept()
        pair = (fitted.name, metrics), (self.kept.name, kept)
        decision = judge(step.stage, *pair, self.plan.gate.z)
        self.decisions.append(decision)
        return fitted.name if decision.admitted else None, metrics

    def result(self) -> Result:
        """Test the original and the output, drop an output known to be worse, and report."""
        bench = self.bench
        if is_gated(self.steps) and self.kept.name == ORIGINAL:
            bench.assumptions.append(
                "no candidate was significantly better; the output is unchanged."
            )
        round_as_stored_(self.model)
        models: tuple[Evaluated, ...] = ()
        known = bench.test.images.labelled or bench.reference is not None
        if known and bench.split.test.size:
            models = self._tested()
            bench.assumptions += self._doubts(models[0].metrics)
        movement, results, images = self._movement(), self.kept.results, bench.inputs.images
        held, calibration = set(map(id, results)), _last(results, Calibration)
        report = Report(
            command=self.plan.command,
            data=data_used(
                images,
                passes=self.fits.passes,
                class_names=images.class_names,
                splits=bench.split.sizes(),
                corruption=self.plan.source.corrupt,
                test=self.plan.source.test and data_record(bench.test.images, bench.split.test),
            ),
            models=models,
            layers=layer_rows(
                self.model,
                drifts_between(self.statistics_before, statistics_of(self.model)),
                self._residuals(),
                calibration,
            ),
            trials=Trials(
                decisions=tuple(self.decisions),
                calibration=calibration,
                choice=_last(self.tried, WeightChoice),
                finetunings=tuple(one for one in self.tried if isinstance(one, Finetuning)),
                refused=tuple(one for one in self.tried if id(one) not in held),
            ),
            moved=movement,
            assumptions=tuple(
                dict.fromkeys([*bench.assumptions, *describe_neighbours(self.model)])
            ),
            n_seen=seen_before(bench.test.images, bench.split.test, bench.loaded.origin.history),
            options=options_of(bench, self.fits.ingredients, self.prior),
            seed=self.plan.gate.seed,
            command_line=self.plan.command_line,
        )
        last = models[-1] if models else None
        measured = {"top1": None, "nll": None} if last is None else last.metrics.results
        agreement = agreement_json(None if last is None else last.agreement)
        return finished(
            bench.loaded,
            report,
            results={"output": self.kept.name, **measured, **agreement},
            data={
                **data_record(images),
                "fit": history_digests(images, bench.split.fit),
                "select": history_digests(images, bench.split.select),
            },
            preprocessing=bench.inputs.preprocessing,
        )

    def cool_(self) -> None:
        """Divide the head by the temperature at which the output was judged."""
        if self.fits.alone is None:
            return
        name, t = self.fits.alone
        if self.kept.name != name:
            t = self._metrics_of_kept().temperature or 1.0
        try:
            cool_(self.bench, t)
        except ModelError as error:
            name, self.kept = self.kept.name, self.stated
            self.kept.values.restore_()
            self.bench.assumptions.append(f"{name!r} was given up at temperature {t:.3g}: {error}")
            return
        by = f"divided by {t:.4g}, the output's temperature."
        self.cooled = f"the head's weights and bias were {by}"
        self.bench.assumptions.append(self.cooled)
        name = self.kept.name
        name = name if name == named(t) else f"{name}, {named(t)}"
        self.kept = replace(self.kept, name=name, values=guards.Snapshot(self.model))

    def set_prior_(self) -> None:
        """Apply the class prior as stated; a labelled test with the new balance judges it."""
        bench = self.bench
        if self.prior is None:
            return
        stated, is_stated = self.stated, self.kept.values is self.stated.values
        kept, prior = with_prior(self.fits, self.prior, self.kept)
        labels = bench.test.images.labels
        has_own = labels is not None and self.plan.source.test is not None
        judged = has_own and prior.has_new(np.asarray(labels)[bench.split.test])
        if not judged:
            self.unshifted = self.kept
            stated = kept if is_stated else with_prior(self.fits, prior, self.stated)[0]
        kept.values.restore_()
        self.kept, self.stated, self.prior = kept, stated, prior
        bench.assumptions.append(describe_prior(prior, judged=judged))

    def _tested(self) -> tuple[Evaluated, ...]:
        """Test the original and the output; an output that is worse there is dropped."""
        bench, checkpoint = self.bench, self.bench.loaded.checkpoint
        was = self._at(self.original, partial(self.fits.on_test, ORIGINAL))
        was = replace(was, file=str(checkpoint.path), sha256=checkpoint.sha256)
        now = self.fits.on_test(self.kept.name, self.model)
        labelled = bench.test.images.labelled

        def is_worse(output: Evaluated) -> bool:
            before, after = (one.metrics if labelled else one.agreement for one in (was, output))
            if before is None or after is None:
                return False
            return compare(before, after, seed=self.plan.gate.seed).verdict == "worse"

        # The user asked for another kind of normalization, at any cost.
        may_go = bench.original is None and self.kept.values is not self.stated.values
        judged, rest = now, self.unshifted or self.kept
        if may_go and rest is not self.kept:
            # A prior makes images of the old balance worse, so the rest is judged without it.
            judged = self._at(rest, partial(self.fits.on_test, rest.name))
        if may_go and is_worse(judged):
            name = self.stated.name
            bench.assumptions.append(
                f"{self.kept.name!r} was significantly worse on the test split, so the "
                f"output is {'the input' if name == ORIGINAL else repr(name)}."
            )
            if self.cooled in bench.assumptions:
                bench.assumptions.remove(self.cooled)
            self.kept = self.stated
            self.kept.values.restore_()
            round_as_stored_(self.model)
            is_input = self.stated.values is self.original.values
            now = was if is_input else self.fits.on_test(name, self.model)
        return was, replace(now, name=f"output: {self.kept.name}", file=None, sha256=None)

    def _doubts(self, tested: Metrics) -> list[str]:
        """Notes on whether the test images, or the others, may have been seen before."""
        found, chosen = describe_unlisted(self.bench.loaded.origin.history), self.original.metrics
        own = isinstance(self.plan.gate.select, str) or self.plan.source.test is None
        return found if own or chosen is None else [*found, *describe_easier(chosen, tested)]

    def _at(self, state: State, work: Callable[[nn.Module], _T]) -> _T:
        """Run work on the network in a given state, then restore the model."""
        now = guards.Snapshot(self.model)
        state.values.restore_()
        try:
            before = self.bench.original if state is self.original else None
            return work(before or self.model)
        finally:
            now.restore_()

    def _movement(self) -> Moved:
        """How far the outputs moved, on some of the images."""
        bench = self.bench
        index = bench.everything[:MOST_IMAGES]

        def recorded(model: nn.Module) -> Recorded:
            batches = bench.batches(index, "how far the outputs moved").whole()
            return bench.evaluation.run(lambda _: record(model, batches, self.fits.precision))

        found = moved(self._at(self.original, recorded), recorded(self.model))
        # Outputs (N, K) are not always class scores.
        return replace(found, top1_changed=None) if isinstance(bench.inputs.task, ByRows) else found

    def _residuals(self) -> dict[str, tuple[float, float]]:
        """Compare the stored statistics with one more pass, if any were measured."""
        bench = self.bench
        if not bench.split.fit.size or _last(self.tried, Calibration) is None:
            return {}

        def attempt(_: int) -> dict[str, tuple[float, float]]:
            parts, mix = bench.by_source(bench.split.fit), self.plan.statistics.mix
            tracked = [bench.batches(part, "residual of the statistics") for part in parts]
            return residuals(self.model, tracked if mix else tracked[0], mix=mix)

        with suppress(NumericError):
            return bench.evaluation.run(attempt)
        return {}  # the network's numbers are not finite


def _numbered(track: Track, number: str) -> Track:
    return lambda stage, batches, n: track(f"{number}{stage}", batches, n)


def _last(results: Iterable[Any], kind: type[_T]) -> _T | None:
    found = [result for result in results if isinstance(result, kind)]
    return found[-1] if found else None
