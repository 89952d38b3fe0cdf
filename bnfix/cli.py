"""The command line: parse, one call of the public API, tables and progress, exit code."""

from __future__ import annotations

import dataclasses
import io
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bnfix import demo as demo_files
from bnfix.checkpoint import check_folder, check_output, read_checkpoint
from bnfix.comparison import evaluate_files, plan_evaluation
from bnfix.conversion import convert as convert_file
from bnfix.diagnosis import diagnose, read_norms
from bnfix.errors import CheckpointError, ConfigError, some
from bnfix.options import (
    MODEL,
    OUT,
    TRAIN,
    Accumulate,
    Augment,
    AverageWeights,
    BatchSize,
    ChannelGroups,
    Checkpoint,
    ClassMap,
    Clip,
    Crop,
    Data,
    Device,
    Ema,
    Epochs,
    Feed,
    Force,
    GhostSize,
    Granularity,
    Interpolation,
    Json,
    Key,
    Labels,
    LabelSmoothing,
    Layers,
    LearningRate,
    LearnWeight,
    MaxBad,
    Mean,
    Model,
    ModelArg,
    NormDecay,
    NormDecayTarget,
    Optimizer,
    Output,
    Pointwise,
    Precision,
    Prefix,
    Preset,
    Quiet,
    Recipe,
    RefitData,
    RefitSamples,
    Resize,
    Samples,
    Scale,
    Seed,
    ShowPlan,
    Skip,
    State,
    Statistics,
    Std,
    Steps,
    SwapWeight,
    Test,
    Thin,
    To,
    Tolerance,
    Train,
    TrainBatchSize,
    TuneBatchSize,
    TuneStatistics,
    Weight,
    WeightDecay,
    Workers,
    Z,
    average_recipe,
    data_recipe,
    default_of,
    model_recipe,
    samples_of,
    sizes,
    weight_of,
)
from bnfix.pipeline import TRIED, Plan, execute, open_plan
from bnfix.recipe import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
    check_seed,
)
from bnfix.replay import replayed_plan
from bnfix.result import check_outputs, check_reports
from bnfix.runtime import exact_float32, keep_freed_memory
from bnfix.sites import find_norms
from bnfix.terminal import (
    Terminal,
    jsonable,
    show_conversion,
    show_inspection,
    show_planned,
    stated,
)
from bnfix.version import __version__
from bnfix.workbench import load_one

app = typer.Typer(
    name="bnfix",
    help="Repair trained networks at their Batch Normalization layers: convert, recalibrate, "
    "choose, prove.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _command_line() -> str:
    return shlex.join(["bnfix", *sys.argv[1:]])


def _run_plan(
    terminal: Terminal,
    make: Callable[[], Plan],
    checkpoint: Path,
    data: str,
    output: Path,
    *,
    force: bool,
    show_plan: bool,
) -> None:
    """Check the output, open, do, save, show; or say what would be done."""
    with stated():
        plan = make()
        if not show_plan:
            check_outputs(output, force=force)
        with terminal.working() as track:
            plan, bench = open_plan(plan, checkpoint, data, None, track)
            described = plan.describe(bench, str(output))
            result = None if show_plan else execute(plan, bench)
            if result is not None:
                result.save(output, force=force)
        if result is None:
            show_planned(terminal, described)
        else:
            terminal.show(result.report, output)


#: What `--recipe` leaves to the command line.
_BESIDE_A_RECIPE = {
    "checkpoint", "data", "output", "recipe", "model", "model_arg", "key", "prefix", "test",
    "device", "workers", "force", "show_plan", "as_json", "quiet",
}  # fmt: skip


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
    if given.model is not None:
        plan = dataclasses.replace(plan, model=given)
    if test is not None:
        plan = dataclasses.replace(plan, source=dataclasses.replace(plan.source, test=test))
    return plan


@app.command()
def fix(
    context: typer.Context,
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    test: Test = None,
    class_map: ClassMap = None,
    labels: Labels = "auto",
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    statistics: Statistics = default_of(StatisticsRecipe, "statistics"),
    train_batch_size: TrainBatchSize = None,
    feed: Feed = default_of(StatisticsRecipe, "feed"),
    samples: Samples = None,
    tolerance: Tolerance = default_of(StatisticsRecipe, "tolerance"),
    example_weight: Weight = default_of(WeightRecipe, "example_weight"),
    granularity: Granularity = default_of(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
    thin: Thin = default_of(WeightRecipe, "thin"),
    layers: Layers = None,
    skip: Skip = None,
    z: Z = default_of(GateRecipe, "z"),
    train: Annotated[
        str,
        typer.Option(
            help="What fine-tuning may train: none, norms, head, norms+head or all.",
            rich_help_panel=TRAIN,
        ),
    ] = TRIED.train,
    epochs: Epochs = TRIED.epochs,
    lr: LearningRate = TRIED.lr,
    recipe: Recipe = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """All of it in one go: statistics, example weights, brief fine-tuning, each before the gate.

    Example: bnfix fix net.pth --model torchvision:resnet50 --data photos/ -o fixed.safetensors
    """

    def make() -> Plan:
        run = RunOptions(device, precision, batch_size, workers)
        if recipe is not None:
            plan = replayed_plan(recipe, run=run, command_line=_command_line())
            given = model_recipe(model, model_arg, key, prefix)
            return _only_replayed(context, plan, given, test)
        tune = None if train == "none" else dataclasses.replace(
            TRIED, train=train, epochs=epochs, lr=lr
        )  # fmt: skip
        return Plan(
            "fix",
            _command_line(),
            model_recipe(model, model_arg, key, prefix),
            data_recipe(
                test, class_map, labels, preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(layers=tuple(layers or ()), skip=tuple(skip or ())),
            StatisticsRecipe(
                statistics, train_batch_size, feed, samples_of(samples),
                batch_size or default_of(StatisticsRecipe, "batch_size"), tolerance,
            ),
            WeightRecipe(weight_of(example_weight), granularity, pointwise, thin=thin),
            tune,
            GateRecipe(z, seed=seed),
            run,
        )  # fmt: skip

    _run_plan(
        Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
    )


@app.command()
def calibrate(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    test: Test = None,
    class_map: ClassMap = None,
    labels: Labels = "auto",
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    statistics: Statistics = default_of(StatisticsRecipe, "statistics"),
    train_batch_size: TrainBatchSize = None,
    feed: Feed = default_of(StatisticsRecipe, "feed"),
    samples: Samples = None,
    tolerance: Tolerance = default_of(StatisticsRecipe, "tolerance"),
    example_weight: Weight = default_of(WeightRecipe, "example_weight"),
    granularity: Granularity = default_of(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
    thin: Thin = default_of(WeightRecipe, "thin"),
    layers: Layers = None,
    skip: Skip = None,
    z: Z = default_of(GateRecipe, "z"),
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Population statistics and example weights, each kept only where held-out data proves it.

    Example: bnfix calibrate net.pth --model net.py:build --data photos/ -o calibrated.safetensors
    """

    def make() -> Plan:
        return Plan(
            "calibrate",
            _command_line(),
            model_recipe(model, model_arg, key, prefix),
            data_recipe(
                test, class_map, labels, preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(layers=tuple(layers or ()), skip=tuple(skip or ())),
            StatisticsRecipe(
                statistics, train_batch_size, feed, samples_of(samples),
                batch_size or default_of(StatisticsRecipe, "batch_size"), tolerance,
            ),
            WeightRecipe(weight_of(example_weight), granularity, pointwise, thin=thin),
            None,
            GateRecipe(z, seed=seed),
            RunOptions(device, precision, batch_size, workers),
        )  # fmt: skip

    _run_plan(
        Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
    )


@app.command()
def finetune(
    checkpoint: Checkpoint,
    data: Data,
    output: Output,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    test: Test = None,
    class_map: ClassMap = None,
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    train: Train = default_of(FinetuneRecipe, "train"),
    statistics: TuneStatistics = default_of(FinetuneRecipe, "statistics"),
    example_weight: LearnWeight = default_of(FinetuneRecipe, "example_weight"),
    epochs: Epochs = default_of(FinetuneRecipe, "epochs"),
    steps: Steps = None,
    optimizer: Optimizer = default_of(FinetuneRecipe, "optimizer"),
    lr: LearningRate = default_of(FinetuneRecipe, "lr"),
    weight_decay: WeightDecay = 0.0,
    norm_decay: NormDecay = 0.0,
    norm_decay_target: NormDecayTarget = default_of(FinetuneRecipe, "norm_decay_target"),
    label_smoothing: LabelSmoothing = 0.0,
    clip: Clip = None,
    accumulate: Accumulate = default_of(FinetuneRecipe, "accumulate"),
    ema: Ema = None,
    augment: Augment = default_of(FinetuneRecipe, "augment"),
    state: State = None,
    to: To = default_of(SwapRecipe, "to"),
    ghost_size: GhostSize = None,
    channel_groups: ChannelGroups = None,
    layers: Layers = None,
    skip: Skip = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: TuneBatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """A few epochs on top; the best epoch is kept, or the original where nothing got better.

    Example: bnfix finetune net.pth --model net.py:build --data photos/ -o tuned.safetensors
    """

    def make() -> Plan:
        recipe = FinetuneRecipe(
            train=train,
            statistics=statistics,
            example_weight=example_weight,
            epochs=epochs,
            steps=steps,
            optimizer=optimizer,
            lr=lr,
            batch_size=batch_size,
            ghost_size=ghost_size,
            weight_decay=weight_decay,
            norm_decay=norm_decay,
            norm_decay_target=norm_decay_target,
            label_smoothing=label_smoothing,
            clip=clip,
            accumulate=accumulate,
            ema=ema,
            augment=augment,
        )
        return Plan(
            "finetune",
            _command_line(),
            model_recipe(model, model_arg, key, prefix),
            data_recipe(
                test, class_map, "auto", preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(
                to, None, ghost_size, channel_groups, tuple(layers or ()), tuple(skip or ())
            ),
            StatisticsRecipe(statistics="keep"),
            WeightRecipe(example_weight="keep"),
            recipe,
            GateRecipe(seed=seed),
            RunOptions(device, precision, workers=workers),
            None if state is None else str(state),
        )  # fmt: skip

    _run_plan(
        Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
    )


@app.command()
def average(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT CKPT...", help="Two or more checkpoints.")
    ],
    data: Data,
    output: Output,
    weights: AverageWeights = None,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    test: Test = None,
    class_map: ClassMap = None,
    labels: Labels = "auto",
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    feed: Feed = default_of(StatisticsRecipe, "feed"),
    samples: Samples = None,
    tolerance: Tolerance = default_of(StatisticsRecipe, "tolerance"),
    layers: Layers = None,
    skip: Skip = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The mean of several checkpoints, with its own statistics; measured against the first one.

    That is on --test, or on a fifth of labelled data.

    Example: bnfix average a.pth b.pth --model net.py:build --data photos/ -o mean.safetensors
    """

    def make() -> Plan:
        return Plan(
            "average",
            _command_line(),
            model_recipe(model, model_arg, key, prefix),
            data_recipe(
                test, class_map, labels, preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(layers=tuple(layers or ()), skip=tuple(skip or ())),
            StatisticsRecipe(
                "population", None, feed, samples_of(samples),
                batch_size or default_of(StatisticsRecipe, "batch_size"), tolerance,
            ),
            WeightRecipe("keep"),
            None,
            GateRecipe(seed=seed),
            RunOptions(device, precision, batch_size, workers),
            average=average_recipe(checkpoints, weights),
        )  # fmt: skip

    _run_plan(
        Terminal(as_json, quiet), make, checkpoints[0], data, output, force=force,
        show_plan=show_plan,
    )  # fmt: skip


@app.command()
def convert(
    checkpoint: Checkpoint,
    output: Output,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    to: To = default_of(SwapRecipe, "to"),
    example_weight: SwapWeight = None,
    ghost_size: GhostSize = None,
    channel_groups: ChannelGroups = None,
    layers: Layers = None,
    skip: Skip = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Input of the check of the whole model (default: usual sizes are tried).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: RefitData = None,
    samples: RefitSamples = None,
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    device: Device = "auto",
    batch_size: BatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Swap the norm layers; with example weight 0 the outputs stay the same, and that is checked.

    Example: bnfix convert net.pth --model torchvision:resnet50 --to batch-group -o out.safetensors
    """
    terminal = Terminal(as_json, quiet)
    with stated():
        recipe = SwapRecipe(
            to, example_weight, ghost_size, channel_groups, tuple(layers or ()), tuple(skip or ())
        )
        shape = sizes(input_shape, "input-shape")
        source = data_recipe(
            None, None, "none", preset, max_bad, (resize, crop, interpolation, mean, std, scale)
        )
        if samples is not None and samples < 2:
            raise ConfigError(f"--samples: {samples}, expected at least 2.", name="samples")
        check_seed(seed)
        if not show_plan:
            check_outputs(output, force=force)
        with terminal.working() as track:
            result = convert_file(
                checkpoint,
                model=model_recipe(model, model_arg, key, prefix),
                swap=recipe,
                input_shape=shape,
                run=RunOptions(device, batch_size=batch_size, workers=workers),
                command_line=_command_line(),
                data=data,
                source=source,
                seed=seed,
                samples=samples,
                track=track,
            )
            if not show_plan:
                result.save(output, force=force)
        show_conversion(terminal, result, None if show_plan else output)


@app.command("eval")
def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="One or more checkpoints.")
    ],
    data: Data,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report.", rich_help_panel=OUT),
    ] = None,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    class_map: ClassMap = None,
    labels: Labels = "auto",
    preset: Preset = None,
    resize: Resize = None,
    crop: Crop = None,
    interpolation: Interpolation = None,
    mean: Mean = None,
    std: Std = None,
    scale: Scale = None,
    max_bad: MaxBad = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = None,
    workers: Workers = -1,
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Metrics of one or more checkpoints on the same examples, each paired against the first.

    Example: bnfix eval net.pth fixed.safetensors --model net.py:build --data test/ --report out/
    """
    terminal = Terminal(as_json, quiet)
    with stated():
        source = data_recipe(
            None, class_map, labels, preset, max_bad,
            (resize, crop, interpolation, mean, std, scale),
        )  # fmt: skip
        recipe = model_recipe(model, model_arg, key, prefix)
        run = RunOptions(device, precision, batch_size, workers)
        paths = None if report is None else _report_files(report, force=force)
        if show_plan:
            plan = plan_evaluation(checkpoints, data)
            if as_json:
                terminal.print_json({**plan, "report": None if report is None else str(report)})
            else:
                what = f"{plan['passes']} passes over the {plan['data']['n_examples']:,} images"
                terminal.say(f"eval: {what} of {data}; nothing was done")
            return
        with terminal.working() as track:
            found = evaluate_files(
                checkpoints,
                data=data,
                model=recipe,
                source=source,
                run=run,
                seed=seed,
                track=track,
                command_line=_command_line(),
            )
            if paths is not None and report is not None:
                _make_folder(report)
                found.save(*paths)
        terminal.show(found)


def _report_files(folder: Path, *, force: bool) -> tuple[Path, Path, Path]:
    paths = (folder / "report.json", folder / "report.md", folder / "report.html")
    check_reports(paths, force=force)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder. Give another --report.", path=folder)
    check_folder(next(path for path in (folder, *folder.parents) if path.exists()) / "report.json")
    return paths


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be made ({reason}).", path=folder) from error


@app.command()
def inspect(
    checkpoint: Checkpoint,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """What norm layers are there, and what is wrong with them; changes nothing.

    Example: bnfix inspect net.pth
    """
    terminal = Terminal(as_json, quiet)
    with stated(), terminal.working():
        recipe = model_recipe(model, model_arg, key, prefix)
        found = read_checkpoint(checkpoint, key=key, prefix=prefix)
        header = found.metadata or {}
        norms = header.get("norms")
        layers = read_norms(found.tensors, norms if isinstance(norms, dict) else None)
        findings = diagnose(found.tensors, layers)
        kinds: dict[str, str] = {}
        problems: list[str] = []
        if model is not None:
            sites = find_norms(load_one(checkpoint, recipe, RunOptions("cpu")).model)
            kinds = {site.name: site.kind for site in sites}
            problems = [f"{site.name}: {site.problem}" for site in sites if site.problem]
    history = header.get("history")
    content = {
        "bnfix": __version__,
        "command": "inspect",
        "file": str(checkpoint),
        "sha256": found.sha256,
        "key": found.key,
        "prefix": found.prefix,
        "notes": list(found.notes),
        "n_tensors": len(found.tensors),
        "layers": [
            {**dataclasses.asdict(layer), "kind": kinds.get(layer.name)} for layer in layers
        ],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "problems": problems,
        "history": history if isinstance(history, list) else [],
    }
    if as_json:
        terminal.print_json(jsonable(content))
    else:
        show_inspection(terminal, layers, kinds, findings, [*found.notes, *problems])


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option("-o", "--output", metavar="DIR", help="Folder to write.", rich_help_panel=OUT),
    ] = Path("bnfix-demo"),
    device: Device = "auto",
    seed: Seed = 0,
    force: Force = False,
    show_plan: ShowPlan = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on embedded data, offline: convert, calibrate, fine-tune, evaluate.

    Example: bnfix demo
    """
    terminal = Terminal(as_json, quiet)
    with stated():
        fixed = output / "digits_net.fixed.safetensors"
        if show_plan:
            terminal.show_demo_plan(str(output))
            return
        # What an earlier demo has left there is made anew: it is the same every time.
        earlier = (output / "digits_net.safetensors").is_file()
        if output.is_dir() and not (force or earlier) and any(output.iterdir()):
            raise CheckpointError(
                f"{output}: already exists and is not from an earlier demo. Give another -o DIR, "
                "or --force.",
                path=output,
            )
        _make_folder(output)
        check_output(fixed, force=True)
        files = demo_files.write_files(output)
        prep = demo_files.PREPROCESSING
        plan = Plan(
            command_line=shlex.join([
                "bnfix", "fix", str(files.checkpoint), "--model", demo_files.SPEC,
                "--data", str(files.calibration), "--test", str(files.test),
                "--mean", str(prep.mean[0]), "--std", str(prep.std[0]), "-o", str(fixed),
            ]),
            model=ModelRecipe(demo_files.SPEC),
            source=DataRecipe(test=str(files.test), mean=prep.mean, std=prep.std),
            gate=GateRecipe(seed=seed),
            run=RunOptions(device),
        )  # fmt: skip
        if not (quiet or as_json):
            text = (
                "A small residual network, trained with a batch of 4 on 150 handwritten digits; "
                "500 others to repair it with, 500 more for the proof. By hand this is:\n"
                f"  {plan.command_line}\n"
            )
            terminal.out.print(escape(text), soft_wrap=True, highlight=False)
        with terminal.working() as track:
            plan, bench = open_plan(plan, files.checkpoint, str(files.calibration), None, track)
            result = execute(plan, bench)
            result.save(fixed, force=True)
        terminal.show(result.report, fixed)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bnfix {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    logging.getLogger("bnfix").addHandler(logging.NullHandler())


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    exact_float32()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding has no sign for is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app()


if __name__ == "__main__":
    main()
