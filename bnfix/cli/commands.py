"""The commands without a plan: each calls the library once, and shows the result."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from bnfix.checkpoints.read import finite
from bnfix.checkpoints.save import check_folder, check_free, make_folder
from bnfix.cli.flags import (
    ALSO,
    DATA,
    MODEL,
    NORM,
    OUT,
    RUN,
    Checkpoint,
    Data,
    Inputs,
    Labelled,
    Model,
    Out,
    Output,
    Run,
    Seed,
    Writes,
    about,
    option_of,
    sizes,
)
from bnfix.cli.tables import changes_table, estimate_line, inspection_lines, layers_table
from bnfix.cli.terminal import Terminal
from bnfix.cli.usage import command_line
from bnfix.core import distributed
from bnfix.core.errors import CheckpointError, ConfigError
from bnfix.core.settings import EvaluationRecipe, RunOptions, SwapRecipe
from bnfix.jobs.compare import evaluate_files, plan_evaluation
from bnfix.jobs.convert import convert as convert_file
from bnfix.jobs.export import ExportRecipe, plan_export
from bnfix.jobs.export import export as export_file
from bnfix.jobs.inspect import SAMPLES, inspect_checkpoint
from bnfix.jobs.plan import estimated_again
from bnfix.recalibrate.refit import REFIT_SAMPLES
from bnfix.report.export import Export, check_exports
from bnfix.report.predictions import check_predictions
from bnfix.report.result import Result, check_outputs


def convert(
    checkpoint: Checkpoint,
    output: Output,
    model: Model,
    swap: Annotated[SwapRecipe, {NORM: "to ghost_size channel_groups layers skip example_weight"}],
    source: Inputs,
    run: Annotated[RunOptions, {RUN: "device workers batch_size"}],
    gate: Seed,
    out: Writes,
    input_shape: Annotated[
        str | None,
        about(
            "Input of the check of the whole model (default: the size that the preprocessing "
            "leaves, else usual sizes, the small first).",
            MODEL,
            metavar="C,H,W",
        ),
    ] = None,
    data: Annotated[
        str | None,
        about(
            "Examples on which scale and shift are re-fitted to the original's outputs, where "
            "example weights above 0 change those (--to group); labels are not used.",
            DATA,
            metavar="DATA",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        about(
            f"Examples to re-fit on, drawn in seeded random order (default {REFIT_SAMPLES}).", DATA
        ),
    ] = None,
) -> None:
    """Swap the norm layers; with example weight 0 the outputs stay the same, and that is checked.

    Example: bnfix convert net.pth --model net.py:build --to batch-group -o out.safetensors
    """
    terminal, started = out.terminal(), time.perf_counter()
    shape = None if input_shape is None else sizes(input_shape, "--input-shape")
    if samples is not None:
        _check_samples(samples)
    if not out.show_plan:
        check_outputs(output, force=out.force)
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
    # A re-fit takes a pass for each layer.
    changes = result.report.swap.changes if result.report.swap is not None else []
    passes = 0 if data is None else len(changes)
    cost = estimated_again(result.model, time.perf_counter() - started, passes)
    _show_conversion(terminal, result, None if out.show_plan else output, cost.to_json())


def _show_conversion(
    terminal: Terminal, result: Result, output: Path | None, cost: dict[str, object]
) -> None:
    swap = result.report.swap
    if terminal.as_json:
        content = result.report.to_json() | ({"plan": True, **cost} if output is None else {})
        terminal.print_json({**content, "output": None if output is None else str(output)})
    elif swap is None:
        terminal.show(result.report, output)
    else:
        if not terminal.quiet:
            terminal.out.print(changes_table(swap.changes))
            terminal.notes([*result.report.assumptions, *swap.skipped])
        if output is None:
            terminal.say(estimate_line(cost))
        wrote = "nothing was written" if output is None else f"wrote {output} and its report"
        terminal.say(f"{len(swap.changes)} layers; {wrote}")


def _check_samples(samples: int) -> None:
    if samples < 2:
        raise ConfigError(f"--samples: {samples}, expected at least 2.", name="samples")


def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        about(
            "The .onnx, .pt2, .safetensors (folded) or .py (plain) to write.",
            OUT,
            "OUT",
            "-o",
            "--out",
        ),
    ],
    to: Annotated[str, option_of(ExportRecipe, "to", OUT)],
    model: Model,
    source: Labelled,
    run: Annotated[RunOptions, {RUN: "device workers"}],
    recipe: Annotated[
        ExportRecipe, {DATA: "samples", OUT: "atol opset force_zero", MODEL: "input_shape"}
    ],
    gate: Seed,
    out: Writes,
    data: Annotated[
        str | None, about("Images to verify on (default: seeded noise).", DATA, "DATA")
    ] = None,
) -> None:
    """ONNX, torch.export, folded weights or one plain Python file, verified against the model.

    Example: bnfix export fixed.safetensors --model net.py:build --to onnx -o net.onnx
    """
    terminal, recipe = out.terminal(), replace(recipe, to=to)
    if run.device not in ("auto", "cpu"):
        raise ConfigError(
            f"--device: {run.device!r}, but export works on the CPU; its output runs anywhere. "
            "Leave the option out.",
            name="device",
        )
    if out.show_plan:
        with terminal.working():
            plan = plan_export(checkpoint, output, model=model, recipe=recipe, data=data)
        does = f"export: would write {', '.join(plan['files'])} with {plan['n_norms']} norm layers"
        _show_plan(terminal, plan, f"{does}, {plan['n_live']} of them live; nothing was done")
        return
    check_exports(to, output, force=out.force, checkpoint=checkpoint)
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


def _show_plan(terminal: Terminal, plan: dict[str, Any], *lines: str) -> None:
    if terminal.as_json:
        terminal.print_json(plan)
    for line in () if terminal.as_json else lines:
        terminal.say(line)


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="One or more checkpoints.")
    ],
    data: Data,
    model: Model,
    source: Labelled,
    also: Annotated[
        EvaluationRecipe, {ALSO: "corruptions compare_batch_sizes metric", RUN: "fast"}
    ],
    run: Run,
    gate: Seed,
    out: Writes,
    predictions: Annotated[
        Path | None,
        about("File for each model's predictions for each image: .csv or .parquet.", OUT, "FILE"),
    ] = None,
    report: Annotated[Path | None, about("Folder for the report.", OUT, "DIR")] = None,
) -> None:
    """Metrics of one or more checkpoints on the same examples, each paired against the first.

    Example: bnfix eval net.pth fixed.safetensors --model net.py:build --data test/ --report out/
    """
    terminal = out.terminal()
    paths = () if report is None else _report_files(report, force=out.force)
    if predictions is not None:
        check_predictions(predictions, force=out.force)
    if out.show_plan:
        with terminal.working():
            plan = plan_evaluation(checkpoints, data, also, model=model, source=source, run=run)
        size = f"eval: {plan['data']['n_examples']:,} images of {data}"
        plan |= {"report": None if report is None else str(report)}
        _show_plan(terminal, plan, size, f"{estimate_line(plan)}; nothing was done")
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


def _report_files(folder: Path, *, force: bool) -> tuple[Path, ...]:
    paths = tuple(folder / f"report.{end}" for end in ("json", "md", "html"))
    check_free(*paths, force=force)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder. Give another --report.", path=folder)
    check_folder(next(path for path in (folder, *folder.parents) if path.exists()) / "report.json")
    return paths


def inspect(
    checkpoint: Checkpoint,
    model: Model,
    source: Labelled,
    run: Run,
    gate: Seed,
    out: Annotated[Out, {OUT: "as_json quiet debug"}],
    data: Annotated[
        str | None,
        about(
            "Examples on which stored statistics, both modes and the outputs are compared.",
            DATA,
            metavar="DATA",
        ),
    ] = None,
    samples: Annotated[
        int, about("Examples to run, drawn in seeded random order.", DATA)
    ] = SAMPLES,
) -> None:
    """What norm layers are there, and what is wrong with them; changes nothing.

    Example: bnfix inspect net.pth
    """
    terminal = out.terminal()
    _check_samples(samples)
    with terminal.working() as track:
        found = inspect_checkpoint(
            checkpoint,
            model=model,
            data=data,
            source=source,
            run=run,
            samples=samples,
            seed=gate.seed,
            track=track,
        )
    if out.as_json:
        terminal.print_json(finite(found.to_json()))
        return
    if found.layers and not out.quiet:
        terminal.out.print(layers_table(found))
    for line in inspection_lines(found):
        terminal.say(line)
