"""The order of the stages; no other room knows it.

Two rules stand above all else. Statistics are never left stale: weights trained in training mode
are followed by recalibration; weights tuned with frozen statistics have those as part of the
answer. No example is in two splits: what is fitted on *fit* is judged on *select* and claimed on
*test*.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from bnfix import processes
from bnfix.claims import result_of
from bnfix.plan import Plan
from bnfix.recipe import FinetuneRecipe
from bnfix.reporting.result import Result
from bnfix.stages import Stages
from bnfix.tracking import Track, silent
from bnfix.workbench import Workbench


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
    bench = plan.open(checkpoint, data, track)
    return plan.measuring(bench), bench


def execute(plan: Plan, bench: Workbench) -> Result:
    """Go through the stages of a plan.

    Args:
        plan: all settings.
        bench: opened by the plan.

    Returns:
        Model, report, history entry.
    """
    stages = Stages(bench, plan)
    if (n := processes.here().size) > 1:
        bench.assumptions.append(f"{n} processes shared the work; the first one wrote.")
    if plan.average is not None:
        stages.average(plan.average)
    if plan.command == "finetune":
        stages.tune_ungated()
    else:
        stages.statistics()
        stages.tune()
    return result_of(stages)
