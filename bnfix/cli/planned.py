"""The commands that carry out a plan: fix, calibrate, finetune, average and the demo."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bnfix import demo as demo_files
from bnfix.checkpoints.save import check_output, make_folder
from bnfix.cli.flags import (
    DATA,
    INPUT,
    NORM,
    OUT,
    RUN,
    TRAIN,
    Checkpoint,
    Data,
    Feed,
    Gate,
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
    numbers,
    option_of,
)
from bnfix.cli.tables import plan_lines
from bnfix.cli.usage import command_line
from bnfix.core.errors import CheckpointError, ConfigError, some
from bnfix.core.settings import (
    TRAINED,
    AverageRecipe,
    DataRecipe,
    FinetuneRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.jobs.plan import describe, replayed_plan
from bnfix.jobs.run import execute
from bnfix.jobs.session import TRIED, Plan
from bnfix.jobs.steps import open_plan
from bnfix.report.result import check_outputs

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
