"""The commands: each calls the library once, and shows the result."""

from __future__ import annotations

import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

from bnfix import demo as demo_files
from bnfix.checkpoints.read import finite
from bnfix.checkpoints.save import check_folder, check_free, check_output, make_folder
from bnfix.cli.flags import (
    ALSO,
    DATA,
    INPUT,
    MODEL,
    NORM,
    OUT,
    RUN,
    TRAIN,
    Checkpoint,
    Data,
    Feed,
    Gate,
    Inputs,
    Labelled,
    Layers,
    Model,
    Out,
    Output,
    Run,
    Seed,
    State,
    Statistics,
    Tested,
    Weight,
    Writes,
    about,
    command_line,
    numbers,
    option_of,
    sizes,
)
from bnfix.cli.terminal import (
    Terminal,
    changes_table,
    estimate_line,
    inspection_lines,
    layers_table,
    plan_lines,
)
from bnfix.core import distributed
from bnfix.core.errors import CheckpointError, ConfigError, some
from bnfix.core.settings import (
    TRAINED,
    AverageRecipe,
    DataRecipe,
    EvaluationRecipe,
    FinetuneRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.jobs.compare import evaluate_files, plan_evaluation
from bnfix.jobs.convert import convert as convert_file
from bnfix.jobs.export import ExportRecipe, plan_export
from bnfix.jobs.export import export as export_file
from bnfix.jobs.inspect import SAMPLES, inspect_checkpoint
from bnfix.jobs.plan import describe, estimated_again, replayed_plan
from bnfix.jobs.run import execute
from bnfix.jobs.session import TRIED, Plan
from bnfix.jobs.steps import open_plan
from bnfix.recalibrate.refit import REFIT_SAMPLES
from bnfix.report.export import Export, check_exports
from bnfix.report.predictions import check_predictions
from bnfix.report.report import Result, check_outputs

#: Options that `--recipe` leaves to the command line.
_BESIDE_A_RECIPE = {
    "checkpoint", "data", "output", "recipe", "test", "device", "workers", "force", "show_plan",
    "as_json", "quiet", "debug", "model", "arguments", "key", "prefix", "prefer_ema", "unfreeze",
    "forward", "logits_output",
}  # fmt: skip

_SHARED = {"model": Model, "source": Tested, "swap": Layers, "run": Run}
_CHOICES = {**_SHARED, "statistics": Statistics, "weight": Weight, "gate": Gate}
_KEEP = WeightRecipe("keep")
# What the options of a command do not say; they replace the rest.
_CALIBRATE = Plan(command="calibrate", finetune=None)
_FINETUNE = Plan(
    command="finetune",
    statistics=StatisticsRecipe(statistics="keep"),
    weight=_KEEP,
    finetune=FinetuneRecipe(),
)
_AVERAGE = Plan(
    command="average",
    statistics=StatisticsRecipe(statistics="population"),
    weight=_KEEP,
    finetune=None,
)


def fix(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    out: Writes,
    plan: Annotated[Plan, _CHOICES] = Plan(),
    train: Annotated[
        str, about(f"What fine-tuning may train: none, {', '.join(TRAINED)}.", TRAIN)
    ] = TRIED.train,
    tune: Annotated[FinetuneRecipe, {TRAIN: "epochs lr"}] = TRIED,
    recipe: Annotated[
        Path | None, about("Replay the options in that file's history.", RUN, "OUT.safetensors")
    ] = None,
) -> None:
    """All of it in one go: statistics, example weights, brief fine-tuning, each before the gate.

    Example: bnfix fix net.pth --model net.py:build --data photos/ -o fixed.safetensors
    """
    if recipe is not None:
        test = plan.source.test
        replayed = replayed_plan(recipe, run=plan.run, command_line=command_line(), test=test)
        plan = _only_replayed(context, replayed, plan.model, test)
    else:
        plan = replace(plan, finetune=None if train == "none" else replace(tune, train=train))
    _carry_out(plan, checkpoint, data, output, out)


def calibrate(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    out: Writes,
    plan: Annotated[Plan, _CHOICES] = _CALIBRATE,
    state: State = None,
) -> None:
    """Population statistics and example weights, each kept only where held-out data proves it.

    Example: bnfix calibrate net.pth --model net.py:build --data photos/ -o calibrated.safetensors
    """
    _carry_out(replace(plan, state=state), checkpoint, data, output, out)


def finetune(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    out: Writes,
    plan: Annotated[
        Plan,
        {
            "model": Model,
            "source": Annotated[DataRecipe, {DATA: f"class_map {INPUT} test"}],
            "finetune": Annotated[
                FinetuneRecipe,
                {
                    TRAIN: "train statistics example_weight epochs steps optimizer lr weight_decay "
                    "norm_decay norm_decay_target label_smoothing clip accumulate ema augment "
                    "batch_size"
                },
            ],
            "swap": Annotated[SwapRecipe, {NORM: "to ghost_size channel_groups layers skip"}],
            "statistics": Annotated[StatisticsRecipe, {NORM: "include_frozen"}],
            "run": Annotated[RunOptions, {RUN: "device workers precision"}],
            "gate": Seed,
        },
    ] = _FINETUNE,
    state: State = None,
) -> None:
    """A few epochs on top; the best epoch is kept, or the original where nothing got better.

    Example: bnfix finetune net.pth --model net.py:build --data photos/ -o tuned.safetensors
    """
    tune = replace(plan.finetune or TRIED, ghost_size=plan.swap.ghost_size)
    _carry_out(replace(plan, finetune=tune, state=state), checkpoint, data, output, out)


def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT CKPT...", help="Two or more checkpoints.")
    ],
    data: Data,
    output: Output,
    out: Writes,
    plan: Annotated[Plan, {**_SHARED, "statistics": Feed, "gate": Seed}] = _AVERAGE,
    weights: Annotated[str | None, option_of(AverageRecipe, "weights", NORM)] = None,
    state: State = None,
) -> None:
    """The mean of several checkpoints, with its own statistics; measured against the first one.

    That is on --test, or on a fifth of labelled data.

    Example: bnfix average net.pth net2.pth --model net.py:build --data photos/ -o mean.safetensors
    """
    parts = () if weights is None else numbers(weights, "--weights")
    mean = AverageRecipe(files=tuple(map(str, checkpoints[1:])), weights=parts)
    _carry_out(replace(plan, average=mean, state=state), checkpoints[0], data, output, out)


def _carry_out(plan: Plan, checkpoint: Path, data: str, output: Path, out: Out) -> None:
    """Check the output, open, do, save, show; or show the plan."""
    terminal = out.terminal()
    if not plan.command_line:  # the demo and a replayed plan have theirs
        # In the batch feed the batches decide what layers above see, so the recipe states them.
        size = plan.run.batch_size or plan.statistics.batch_size
        statistics = replace(plan.statistics, batch_size=size)
        plan = replace(plan, statistics=statistics, command_line=command_line())
    if not out.show_plan:
        check_outputs(output, force=out.force)
    with terminal.working() as track:
        bench = open_plan(plan, checkpoint, data, None, track)
        described = describe(bench, str(output)) if out.show_plan else None
        result = None if out.show_plan else execute(bench)
        if result is not None:
            result.save_by_first(output, force=out.force)
    if result is not None:
        terminal.show(result.report, output)
    elif described is not None and out.as_json:
        terminal.print_json(described)
    elif described is not None:
        for line in plan_lines(described):
            terminal.say(line)


def _only_replayed(
    context: typer.Context, plan: Plan, given: ModelRecipe, test: str | None
) -> Plan:
    """A replayed plan with the model and the test data of this command line, and no more of it."""
    typed = {
        option.opts[0]
        for option in context.command.params
        if option.name not in _BESIDE_A_RECIPE
        and (source := context.get_parameter_source(option.name or "")) is not None
        and source.name == "COMMANDLINE"
    }
    if typed:
        raise ConfigError(
            f"--recipe: replays all options of that file; {some(sorted(typed))} cannot be given "
            "besides. Leave one of them out."
        )
    asked = given
    if given.model is None:
        # A model is called in one way: the stated one replaces that of the file.
        called = given if given.forward or given.logits_output else plan.model
        asked = replace(plan.model, forward=called.forward, logits_output=called.logits_output)
    unfreeze = given.unfreeze or plan.model.unfreeze
    plan = replace(plan, model=replace(asked, unfreeze=unfreeze))
    return plan if test is None else replace(plan, source=replace(plan.source, test=test))


def demo(
    out: Writes,
    run: Annotated[RunOptions, {RUN: "device"}],
    gate: Seed,
    output: Annotated[Path, about("Folder to write.", OUT, "DIR", "-o", "--out")] = Path(
        "bnfix-demo"
    ),
) -> None:
    """The whole way on embedded data, offline: convert, calibrate, fine-tune, evaluate.

    Example: bnfix demo
    """
    terminal = out.terminal()
    if out.show_plan:
        if out.as_json:
            terminal.print_json({"command": "demo", "plan": True, "output": str(output)})
        else:
            terminal.say(f"demo: would fix the demo files and write {output}; nothing was done")
        return
    fixed = output / "digits_net.fixed.safetensors"
    # The files of an earlier demo are replaced: they are the same every time.
    earlier = (output / "digits_net.safetensors").is_file()
    if output.is_dir() and not (out.force or earlier) and any(output.iterdir()):
        raise CheckpointError(
            f"{output}: already exists and is not from an earlier demo. Give another -o DIR, "
            "or --force.",
            path=output,
        )
    make_folder(output)
    check_output(fixed, force=True)
    files, prep = demo_files.write_files(output), demo_files.PREPROCESSING
    plan = Plan(
        command_line=shlex.join([
            "bnfix", "fix", str(files.checkpoint), "--model", demo_files.SPEC,
            "--data", str(files.calibration), "--test", str(files.test),
            "--mean", str(prep.mean[0]), "--std", str(prep.std[0]), "--device", run.device,
            "--seed", str(gate.seed), "-o", str(fixed), "--force",
        ]),
        model=ModelRecipe(demo_files.SPEC),
        source=DataRecipe(test=str(files.test), mean=prep.mean, std=prep.std),
        gate=gate,
        run=run,
    )  # fmt: skip
    if not (out.quiet or out.as_json):
        text = (
            "A small residual network, trained with a batch of 4 on 150 handwritten digits; "
            "500 other digits to repair it with, 500 more to test it. The same by hand:\n"
            f"  {plan.command_line}\n"
        )
        terminal.out.print(escape(text), soft_wrap=True, highlight=False)
    _carry_out(plan, files.checkpoint, str(files.calibration), fixed, replace(out, force=True))


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
