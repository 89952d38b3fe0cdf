"""The commands that make a plan and carry it out: fix, calibrate, finetune, average."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from bnfix.cli.options import (
    NORM,
    RUN,
    TRAIN,
    Checkpoint,
    ChoiceFlags,
    Data,
    Epochs,
    FeedFlags,
    InputFlags,
    KindFlags,
    LabelFlags,
    LayerFlags,
    LearningRate,
    ModelFlags,
    OutFlags,
    Output,
    PlaceFlags,
    RunFlags,
    Seed,
    State,
    TuneFlags,
    option,
)
from bnfix.cli.parsing import numbers
from bnfix.cli.showing import show_planned
from bnfix.cli.terminal import stated
from bnfix.cli.usage import command_line
from bnfix.errors import ConfigError, some
from bnfix.plan import TRIED, Plan
from bnfix.recipe import (
    TRAINED,
    AverageRecipe,
    DataRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    WeightRecipe,
)
from bnfix.replay import replayed_plan
from bnfix.reporting.result import check_outputs
from bnfix.run import describe, execute, open_plan

Test = Annotated[str | None, option(DataRecipe, "test", panel="Data and preprocessing")]

#: What `--recipe` leaves to the command line.
_BESIDE_A_RECIPE = {
    "checkpoint", "data", "output", "recipe", "model", "model_arg", "key", "prefix",
    "prefer_ema", "unfreeze", "forward", "logits_output", "test",
    "device", "workers", "force", "show_plan", "as_json", "quiet",
    "debug",
}  # fmt: skip


def _carry_out(
    make: Callable[[], Plan], checkpoint: Path, data: str, output: Path, out: OutFlags
) -> None:
    """Check the output, open, do, save, show; or say what would be done."""
    terminal = out.terminal()
    with stated(many=True):
        plan = make()
        if not out.show_plan:
            check_outputs(output, force=out.force)
        with terminal.working() as track:
            bench = open_plan(plan, checkpoint, data, None, track)
            described = describe(bench, str(output)) if out.show_plan else None
            result = None if out.show_plan else execute(bench)
            if result is not None:
                result.save_by_first(output, force=out.force)
        if described is not None:
            show_planned(terminal, described)
        elif result is not None:
            terminal.show(result.report, output)


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
        asked = dataclasses.replace(plan.model, forward=given.forward or plan.model.forward)
    unfreeze = given.unfreeze or plan.model.unfreeze
    plan = dataclasses.replace(plan, model=dataclasses.replace(asked, unfreeze=unfreeze))
    if test is not None:
        plan = dataclasses.replace(plan, source=dataclasses.replace(plan.source, test=test))
    return plan


def fix(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: ModelFlags,
    labels: LabelFlags,
    inputs: InputFlags,
    choice: ChoiceFlags,
    feed: FeedFlags,
    layers: LayerFlags,
    run: RunFlags,
    out: OutFlags,
    test: Test = None,
    train: Annotated[
        str,
        typer.Option(
            help=f"What fine-tuning may train: none, {', '.join(TRAINED)}.",
            rich_help_panel=TRAIN,
        ),
    ] = TRIED.train,
    epochs: Epochs = TRIED.epochs,
    lr: LearningRate = None,
    recipe: Annotated[
        Path | None,
        typer.Option(
            metavar="OUT.safetensors",
            help="Replay the options in that file's history.",
            rich_help_panel=RUN,
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """All of it in one go: statistics, example weights, brief fine-tuning, each before the gate.

    Example: bnfix fix net.pth --model net.py:build --data photos/ -o fixed.safetensors
    """

    def make() -> Plan:
        if recipe is not None:
            plan = replayed_plan(recipe, run=run.options(), command_line=command_line(), test=test)
            return _only_replayed(context, plan, model.recipe(), test)
        tune = None if train == "none" else dataclasses.replace(
            TRIED, train=train, epochs=epochs, lr=lr
        )  # fmt: skip
        return Plan(
            command="fix",
            command_line=command_line(),
            model=model.recipe(),
            source=inputs.recipe(test=test, class_map=labels.class_map, labels=labels.labels),
            swap=layers.recipe(),
            statistics=feed.recipe(choice.statistics, run.batch_size, choice.train_batch_size),
            weight=choice.recipe(),
            finetune=tune,
            gate=GateRecipe(choice.z, seed=seed),
            run=run.options(),
        )

    _carry_out(make, checkpoint, data, output, out)


def calibrate(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: ModelFlags,
    labels: LabelFlags,
    inputs: InputFlags,
    choice: ChoiceFlags,
    feed: FeedFlags,
    layers: LayerFlags,
    run: RunFlags,
    out: OutFlags,
    test: Test = None,
    state: State = None,
    seed: Seed = 0,
) -> None:
    """Population statistics and example weights, each kept only where held-out data proves it.

    Example: bnfix calibrate net.pth --model net.py:build --data photos/ -o calibrated.safetensors
    """

    def make() -> Plan:
        return Plan(
            command="calibrate",
            command_line=command_line(),
            model=model.recipe(),
            source=inputs.recipe(test=test, class_map=labels.class_map, labels=labels.labels),
            swap=layers.recipe(),
            statistics=feed.recipe(choice.statistics, run.batch_size, choice.train_batch_size),
            weight=choice.recipe(),
            finetune=None,
            gate=GateRecipe(choice.z, seed=seed),
            run=run.options(),
            state=None if state is None else str(state),
        )

    _carry_out(make, checkpoint, data, output, out)


def finetune(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: ModelFlags,
    inputs: InputFlags,
    tune: TuneFlags,
    kind: KindFlags,
    layers: LayerFlags,
    place: PlaceFlags,
    out: OutFlags,
    test: Test = None,
    class_map: Annotated[
        Path | None, option(DataRecipe, "class_map", panel="Data and preprocessing")
    ] = None,
    precision: Annotated[str, option(RunOptions, "precision", panel=RUN)] = "fp32",
    state: State = None,
    seed: Seed = 0,
) -> None:
    """A few epochs on top; the best epoch is kept, or the original where nothing got better.

    Example: bnfix finetune net.pth --model net.py:build --data photos/ -o tuned.safetensors
    """

    def make() -> Plan:
        return Plan(
            command="finetune",
            command_line=command_line(),
            model=model.recipe(),
            source=inputs.recipe(test=test, class_map=class_map, labels="auto"),
            swap=layers.recipe(
                to=kind.to, ghost_size=kind.ghost_size, channel_groups=kind.channel_groups
            ),
            statistics=StatisticsRecipe(statistics="keep"),
            weight=WeightRecipe(example_weight="keep"),
            finetune=tune.recipe(kind.ghost_size),
            gate=GateRecipe(seed=seed),
            run=RunOptions(place.device, precision, workers=place.workers),
            state=None if state is None else str(state),
        )

    _carry_out(make, checkpoint, data, output, out)


def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT CKPT...", help="Two or more checkpoints.")
    ],
    data: Data,
    output: Output,
    model: ModelFlags,
    labels: LabelFlags,
    inputs: InputFlags,
    feed: FeedFlags,
    layers: LayerFlags,
    run: RunFlags,
    out: OutFlags,
    weights: Annotated[str | None, option(AverageRecipe, "weights", panel=NORM)] = None,
    test: Test = None,
    state: State = None,
    seed: Seed = 0,
) -> None:
    """The mean of several checkpoints, with its own statistics; measured against the first one.

    That is on --test, or on a fifth of labelled data.

    Example: bnfix average net.pth net2.pth --model net.py:build --data photos/ -o mean.safetensors
    """

    def make() -> Plan:
        return Plan(
            command="average",
            command_line=command_line(),
            model=model.recipe(),
            source=inputs.recipe(test=test, class_map=labels.class_map, labels=labels.labels),
            swap=layers.recipe(),
            statistics=feed.recipe("population", run.batch_size),
            weight=WeightRecipe("keep"),
            finetune=None,
            gate=GateRecipe(seed=seed),
            run=run.options(),
            state=None if state is None else str(state),
            average=AverageRecipe(
                tuple(map(str, checkpoints[1:])), numbers(weights, "weights") or ()
            ),
        )

    _carry_out(make, checkpoints[0], data, output, out)
