"""The commands: each calls the library once and shows the result."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

import bnfix.cli.flags as flags
from bnfix.checkpoints.read import finite
from bnfix.checkpoints.save import check_output, make_folder
from bnfix.cli.flags import (
    DATA,
    MODEL,
    NORM,
    OUT,
    RUN,
    TRAIN,
    about,
    command_line,
    option_of,
    written,
)
from bnfix.cli.tables import (
    changes_table,
    estimate_line,
    inspection_lines,
    layers_table,
    plan_lines,
)
from bnfix.core import distributed
from bnfix.core.errors import ConfigError, count
from bnfix.core.options import require
from bnfix.core.settings import (
    AverageRecipe,
    FinetuneRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.jobs import unjudged
from bnfix.jobs.compare import evaluate_files, plan_evaluation
from bnfix.jobs.convert import convert as convert_file
from bnfix.jobs.export import ExportRecipe, plan_export
from bnfix.jobs.export import export as export_file
from bnfix.jobs.inspect import SAMPLES, inspect_checkpoint
from bnfix.jobs.plan import cost_json, describe, replayed_plan, with_own_models
from bnfix.jobs.run import execute
from bnfix.jobs.session import TRIED, Plan
from bnfix.jobs.steps import open_plan
from bnfix.recalibrate.refit import REFIT_SAMPLES
from bnfix.report.report import check_predictions, check_report_folder
from bnfix.report.result import Export, check_exports, check_outputs

_CHECKED_SHAPE = "Input shape of the final check (default: from preprocessing, else common sizes)."
_REFIT_ON = f"Examples to re-fit on, in seeded random order (default {REFIT_SAMPLES})."
_FORM = {DATA: "samples", OUT: "atol opset max_drop force_zero", MODEL: "input_shape"}
_AGAINST = "The original of CKPT: shows which weights differ, and if statistics were updated."
_LOOK_DATA = (
    "Examples for comparing stored statistics, both modes and the outputs; labels are optional."
)
_REFIT_DATA = "Examples for re-fitting scale and shift (--to group, weights above 0); no labels."

_MOMENTS = "Instead of -o: write only the moments of every norm layer's inputs, for pool."
_EITHER = "The .safetensors file to write, or a hub folder if CKPT is one."
_FILES = "The checkpoint, and the files that calibrate --save-moments wrote for it, in any order."

_SHARED = {"model": flags.Continued, "source": flags.Tested, "swap": flags.Layers, "run": flags.Run}
_CHOICES = {**_SHARED, "statistics": flags.Statistics, "weight": flags.Weight, "gate": flags.Chosen}
# Defaults of the commands; their options replace some of them.
_CALIBRATE = Plan(command="calibrate", finetune=None)
_STATED = replace(_CALIBRATE, weight=WeightRecipe("keep"))
_FINETUNE = replace(
    _STATED, command="finetune", statistics=StatisticsRecipe("keep"), finetune=FinetuneRecipe()
)
_AVERAGE = replace(_STATED, command="average", statistics=StatisticsRecipe("population"))


def fix(
    context: typer.Context,
    checkpoint: flags.Checkpoint,
    data: flags.Several,
    output: flags.Output,
    out: flags.Writes,
    plan: Annotated[Plan, _CHOICES] = Plan(),
    train: Annotated[
        str,
        about(f"Parts to train: {', '.join(flags.TO_TRAIN)}.", TRAIN, words=lambda: flags.TO_TRAIN),
    ] = TRIED.train,
    tune: Annotated[FinetuneRecipe, {TRAIN: "epochs lr refit"}] = TRIED,
    recipe: Annotated[
        Path | None, about("Replay the options in this file's history.", RUN, "OUT.safetensors")
    ] = None,
) -> None:
    """Try new statistics, example weights and brief fine-tuning; keep only proven improvements.

    Example: bnfix fix net.pth --model net.py:build --data photos/ -o fixed.safetensors
    """
    if recipe is not None:
        flags.check_beside_recipe(context)
        how: dict[str, Any] = {"command_line": command_line(), "test": plan.source.test}
        plan = with_own_models(replayed_plan(recipe, run=plan.run, **how), plan)
    else:
        words = "--train none: nothing is trained, so --epochs, --lr and --no-refit cannot act."
        require(train != "none" or tune == TRIED, f"{words} Leave them out.", "train")
        plan = replace(plan, finetune=None if train == "none" else replace(tune, train=train))
    _carry_out(plan, checkpoint, data, output, out)


def calibrate(
    checkpoint: flags.Checkpoint,
    data: flags.Several,
    out: flags.Writes,
    output: Annotated[Path | None, written(_EITHER)] = None,
    plan: Annotated[Plan, _CHOICES] = _CALIBRATE,
    state: flags.State = None,
    save_moments: Annotated[Path | None, about(_MOMENTS, OUT, "FILE")] = None,
) -> None:
    """Recompute statistics and choose example weights; keep each only if it is proven better.

    Example: bnfix calibrate net.pth --model net.py:build --data photos/ -o calibrated.safetensors
    """
    if save_moments is not None or output is None:
        _write_moments(plan, checkpoint, data, (save_moments, output), out)
    else:
        _carry_out(replace(plan, state=state), checkpoint, data, output, out)


def finetune(
    checkpoint: flags.Checkpoint,
    data: flags.Data,
    output: flags.Output,
    out: flags.Writes,
    plan: Annotated[
        Plan,
        {
            "model": flags.Continued,
            "source": flags.Tested,
            "finetune": flags.Tuned,
            "swap": Annotated[SwapRecipe, {NORM: "to ghost_size channel_groups layers skip"}],
            "statistics": flags.Referred,
            "run": Annotated[RunOptions, {RUN: "device workers precision"}],
            "gate": flags.Seed,
        },
    ] = _FINETUNE,
    state: flags.State = None,
) -> None:
    """Train for a few epochs; keep the best epoch, or the original if none is better.

    Example: bnfix finetune net.pth --model net.py:build --data photos/ -o tuned.safetensors
    """
    tune = replace(plan.finetune or TRIED, ghost_size=plan.swap.ghost_size)
    _carry_out(replace(plan, finetune=tune, state=state), checkpoint, data, output, out)


def average(
    checkpoints: flags.Averaged,
    data: flags.Data,
    output: flags.Output,
    out: flags.Writes,
    plan: Annotated[Plan, {**_SHARED, "statistics": flags.Feed, "gate": flags.Gate}] = _AVERAGE,
    weights: Annotated[str | None, option_of(AverageRecipe, "weights", NORM)] = None,
    method: Annotated[str, option_of(AverageRecipe, "method", NORM)] = "uniform",
    best: Annotated[int | None, option_of(AverageRecipe, "best", NORM)] = None,
    statistics: Annotated[str, option_of(AverageRecipe, "statistics", NORM)] = "auto",
    state: flags.State = None,
) -> None:
    """Average the weights of several checkpoints, recompute statistics, compare with the first.

    The comparison uses --test, or a fifth of the labelled data.

    Example: bnfix average net.pth net2.pth --model net.py:build --data photos/ -o mean.safetensors
    """
    first, mean = flags.averaged(
        checkpoints, weights, method=method, best=best, statistics=statistics
    )
    _carry_out(replace(plan, average=mean, state=state), first, data, output, out)


def _carry_out(
    plan: Plan, checkpoint: Path, data: str | Sequence[str], output: Path, out: flags.Out
) -> None:
    """Check the output, open, run, save and show; or show the plan."""
    terminal = out.terminal()
    if not plan.command_line:  # a replayed plan has its own
        # In the batch feed, results depend on the batch size, so the recipe must state it.
        size = plan.run.batch_size or plan.statistics.batch_size
        statistics = replace(plan.statistics, batch_size=size)
        plan = replace(plan, statistics=statistics, command_line=command_line())
    check_outputs(output, checkpoint, plan.model, force=out.force)
    with terminal.working() as track:
        if data in ("none", ["none"]):
            result = unjudged.calibrate_without_data(checkpoint, plan)
            notes = result.report.assumptions
            described, lines = {"command": plan.command, "steps": notes}, [*notes, "not written"]
        elif out.show_plan:
            described = describe(open_plan(plan, checkpoint, data, None, track), str(output))
            lines = plan_lines(described)
        else:
            result = execute(open_plan(plan, checkpoint, data, None, track))
        if not out.show_plan:
            result.save_by_first(output, force=out.force)
    if out.show_plan:
        terminal.plan(described, *lines)
    else:
        terminal.show(result.report, output)


def convert(
    checkpoint: flags.Checkpoint,
    output: flags.Output,
    model: flags.Model,
    swap: flags.Swapped,
    source: flags.Inputs,
    run: Annotated[RunOptions, {RUN: "device workers batch_size"}],
    gate: flags.Seed,
    out: flags.Writes,
    input_shape: Annotated[str | None, about(_CHECKED_SHAPE, MODEL, "C,H,W")] = None,
    data: Annotated[str | None, about(_REFIT_DATA, DATA, "DATA")] = None,
    samples: Annotated[int | None, about(_REFIT_ON, DATA)] = None,
) -> None:
    """Swap the norm layers. bnfix checks that outputs stay the same at example weight 0.

    Example: bnfix convert net.pth --model net.py:build --to batch-group -o out.safetensors
    """
    terminal, started = out.terminal(), time.perf_counter()
    shape = None if input_shape is None else flags.sizes(input_shape, "--input-shape")
    ok = samples is None or samples >= 2
    require(ok, f"--samples: {samples}, expected at least 2.", "samples")
    check_outputs(output, checkpoint, model, force=out.force)
    with terminal.working() as track:
        result = convert_file(
            checkpoint,
            model=model,
            swap=swap,
            input_shape=shape,
            run=run,
            command_line=command_line(),
            data=data,
            source=replace(source, labels="none"),
            seed=gate.seed,
            samples=samples,
            track=track,
        )
        if not out.show_plan:
            result.save(output, force=out.force)
    report = result.report
    changes, skipped = (report.swap.changes, report.swap.skipped) if report.swap else ((), ())
    # A re-fit takes one pass per layer.
    passes = 0 if data is None else len(changes)
    cost = cost_json(time.perf_counter() - started, result.model, passes)
    if out.as_json:
        more = {"plan": True, **cost, "output": None} if out.show_plan else {"output": str(output)}
        terminal.print_json({**report.to_json(), **more})
        return
    if not out.quiet:
        terminal.out.print(changes_table(changes))
        terminal.notes([*report.assumptions, *skipped])
    if out.show_plan:
        terminal.say(estimate_line(cost))
    wrote = "nothing was written" if out.show_plan else f"wrote {output} and its report"
    terminal.say(f"{count(len(changes), 'layers')}; {wrote}")


def export(
    checkpoint: flags.Checkpoint,
    output: Annotated[Path, written("The .onnx, .pt2, folded .safetensors or plain .py to write.")],
    to: Annotated[str, option_of(ExportRecipe, "to", OUT)],
    model: flags.Model,
    source: flags.Tested,
    run: Annotated[RunOptions, {RUN: "device workers"}],
    recipe: Annotated[ExportRecipe, _FORM],
    gate: flags.Seed,
    out: flags.Writes,
    data: Annotated[
        str | None, about("Images to verify on (default: seeded noise).", DATA, "DATA")
    ] = None,
) -> None:
    """Export as ONNX, torch.export, folded weights or one Python file; verify against the model.

    Example: bnfix export fixed.safetensors --model net.py:build --to onnx -o net.onnx
    """
    terminal, recipe = out.terminal(), replace(recipe, to=to)
    words = f"--device: {run.device!r}, but export works on the CPU; its output runs anywhere."
    require(run.device in ("auto", "cpu"), f"{words} Leave the option out.", "device")
    check_exports(to, output, force=out.force, checkpoint=checkpoint)
    if out.show_plan:
        with terminal.working():
            plan = plan_export(checkpoint, output, model=model, recipe=recipe, data=data)
        layers = f"{count(plan['n_norms'], 'norm layers')}, {plan['n_live']} of them live"
        does = f"export: would write {', '.join(plan['files'])} with {layers}"
        terminal.plan(plan, f"{does}; nothing was done")
        return
    with terminal.working() as track:
        result = export_file(
            checkpoint,
            model=model,
            data=data,
            recipe=recipe,
            source=source,
            workers=run.workers,
            seed=gate.seed,
            command_line=command_line(),
            track=track,
        )
        result.save(output, force=out.force)
    if terminal.as_json:
        terminal.print_json({**result.to_json(), "output": str(output)})
        return
    terminal.say(result.sentence())
    if not terminal.quiet:
        for remark in result.remarks():
            terminal.say(remark)
        terminal.notes(result.report.assumptions)
        files = ", ".join(str(path) for path in Export.files(result.to, output))
        terminal.say(f"wrote {files} and {output.name}.report.html, .md, .json")


def evaluate(
    checkpoints: flags.Compared,
    data: flags.Data,
    model: flags.Opened,
    source: flags.Grouped,
    also: flags.Measured,
    run: flags.Run,
    gate: flags.Seed,
    out: flags.Writes,
    predictions: Annotated[
        Path | None,
        about("File for each model's predictions on each image: .csv or .parquet.", OUT, "FILE"),
    ] = None,
    report: Annotated[Path | None, about("Folder for the report.", OUT, "DIR")] = None,
) -> None:
    """Measure one or more checkpoints on the same examples; compare each with the first.

    Example: bnfix eval net.pth fixed.safetensors --model net.py:build --data test/ --report out/
    """
    terminal = out.terminal()
    paths = () if report is None else check_report_folder(report, force=out.force)
    if predictions is not None:
        check_predictions(predictions, force=out.force)
    if out.show_plan:
        with terminal.working():
            plan = plan_evaluation(checkpoints, data, also, model=model, source=source, run=run)
        size = f"eval: {count(plan['data']['n_examples'], 'images')} of {data}"
        plan |= {"report": None if report is None else str(report)}
        terminal.plan(plan, size, f"{estimate_line(plan)}; nothing was done")
        return
    with terminal.working() as track:
        found = evaluate_files(
            checkpoints,
            data=data,
            model=model,
            source=source,
            run=run,
            also=also,
            predictions=predictions,
            force=out.force,
            seed=gate.seed,
            track=track,
            command_line=command_line(),
        )
        if report is not None and distributed.here().is_first:
            make_folder(report)
            found.save(*paths)
    terminal.show(found)


def inspect(
    checkpoint: flags.Checkpoint,
    model: flags.Model,
    source: flags.Tested,
    run: flags.Run,
    gate: flags.Seed,
    out: Annotated[flags.Out, {OUT: "as_json quiet debug"}],
    data: Annotated[str | None, about(_LOOK_DATA, DATA, "DATA")] = None,
    samples: Annotated[int, about("Examples to run, in seeded random order.", DATA)] = SAMPLES,
    against: Annotated[Path | None, about(_AGAINST, MODEL, "ORIGINAL")] = None,
) -> None:
    """List the norm layers and their faults; change nothing.

    Example: bnfix inspect net.pth
    """
    terminal = out.terminal()
    require(samples >= 2, f"--samples: {samples}, expected at least 2.", "samples")
    with terminal.working() as track:
        found = inspect_checkpoint(
            checkpoint,
            model=model,
            data=data,
            source=source,
            run=run,
            samples=samples,
            seed=gate.seed,
            against=against,
            track=track,
        )
    if out.as_json:
        terminal.print_json(finite(found.to_json()))
        return
    if found.layers and not out.quiet:
        terminal.out.print(layers_table(found))
    for line in inspection_lines(found):
        terminal.say(line)


def pool(
    files: Annotated[list[Path], typer.Argument(metavar="FILE... CKPT", help=_FILES)],
    output: flags.Output,
    model: flags.Model,
    run: Annotated[RunOptions, {RUN: "device"}],
    out: flags.Writes,
) -> None:
    """Give a checkpoint the pooled statistics of clients that share no images.

    Example: bnfix pool a.safetensors b.safetensors net.pth --model net.py:build -o both.safetensors
    """
    terminal = out.terminal()
    check_outputs(output, None, force=out.force)
    with terminal.working():
        result = unjudged.pool_files(files, model=model, run=run, command_line=command_line())
        if not out.show_plan:
            result.save(output, force=out.force)
    if out.show_plan:
        notes = list(result.report.assumptions)
        terminal.plan({"command": "pool", "plan": True, "steps": notes}, *notes, "not written")
    else:
        terminal.show(result.report, output)


def _write_moments(
    plan: Plan, checkpoint: Path, data: Sequence[str], given: Sequence[Path | None], out: flags.Out
) -> None:
    """Measure a client's moments and write them, or show the plan; not with -o."""
    path, output = given
    if path is None or output is not None:
        raise ConfigError("calibrate: give either -o OUT or --save-moments FILE.", name="output")
    terminal = out.terminal()
    check_output(path, force=out.force)
    with terminal.working() as track:
        file = None if out.show_plan else path
        found = unjudged.save_moments(checkpoint, data, plan, file, force=out.force, track=track)
    done = "nothing was written" if out.show_plan else f"wrote {path}"
    if not terminal.as_json:
        terminal.notes(found["assumptions"])
    terminal.plan(found, f"moments of {count(found['n_examples'], 'examples')}; {done}")
