"""The command line: parse, one call of the public API, tables and progress, exit code."""

from __future__ import annotations

import dataclasses
import logging
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bnfix import demo as demo_files
from bnfix.checkpoint import check_output, read_checkpoint
from bnfix.comparison import evaluate_files
from bnfix.conversion import convert as convert_file
from bnfix.diagnosis import diagnose, read_norms
from bnfix.errors import CheckpointError
from bnfix.options import (
    MODEL,
    OUT,
    TRAIN,
    BatchSize,
    ChannelGroups,
    Checkpoint,
    ClassMap,
    Crop,
    Data,
    Device,
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
    Resize,
    Samples,
    Scale,
    Seed,
    ShowPlan,
    Skip,
    Statistics,
    Std,
    Steps,
    SwapWeight,
    Test,
    To,
    Train,
    TrainBatchSize,
    TuneStatistics,
    Weight,
    WeightDecay,
    Workers,
    Z,
    data_recipe,
    default_of,
    model_recipe,
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
)
from bnfix.result import check_outputs
from bnfix.runtime import keep_freed_memory
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
        if result is None:
            show_planned(terminal, described)
            return
        result.save(output, force=force)
        terminal.show(result.report, output)


@app.command()
def fix(
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
    example_weight: Weight = default_of(WeightRecipe, "example_weight"),
    granularity: Granularity = default_of(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
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
                statistics, train_batch_size, feed, samples,
                batch_size or default_of(StatisticsRecipe, "batch_size"),
            ),
            WeightRecipe(weight_of(example_weight), granularity, pointwise),
            tune,
            GateRecipe(z, seed=seed),
            RunOptions(device, precision, batch_size, workers),
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
    example_weight: Weight = default_of(WeightRecipe, "example_weight"),
    granularity: Granularity = default_of(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
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
                statistics, train_batch_size, feed, samples,
                batch_size or default_of(StatisticsRecipe, "batch_size"),
            ),
            WeightRecipe(weight_of(example_weight), granularity, pointwise),
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
    to: To = default_of(SwapRecipe, "to"),
    ghost_size: GhostSize = None,
    channel_groups: ChannelGroups = None,
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
        )  # fmt: skip

    _run_plan(
        Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
    )


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
    device: Device = "auto",
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
        if not show_plan:
            check_outputs(output, force=force)
        with terminal.working():
            result = convert_file(
                checkpoint,
                model=model_recipe(model, model_arg, key, prefix),
                swap=recipe,
                input_shape=shape,
                run=RunOptions(device),
                command_line=_command_line(),
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
            plan = {
                "command": "eval",
                "plan": True,
                "checkpoints": [str(path) for path in checkpoints],
                "data": data,
                "passes": len(checkpoints),
                "report": None if report is None else str(report),
            }
            if as_json:
                terminal.print_json(plan)
            else:
                text = f"eval: {len(checkpoints)} passes over {data}; nothing was done"
                terminal.out.print(escape(text), soft_wrap=True)
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
            report.mkdir(parents=True, exist_ok=True)
            found.save(*paths)
        terminal.show(found)


def _report_files(folder: Path, *, force: bool) -> tuple[Path, Path, Path]:
    paths = (folder / "report.json", folder / "report.md", folder / "report.html")
    existing = [path for path in paths if path.exists()]
    if existing and not force:
        raise CheckpointError(
            f"{existing[0]}: already exists. Give another --report, or --force to replace it.",
            path=existing[0],
        )
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder. Give another --report.", path=folder)
    return paths


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
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on embedded data, offline: look, convert, calibrate, fine-tune, evaluate.

    Example: bnfix demo
    """
    terminal = Terminal(as_json, quiet)
    with stated():
        fixed = output / "digits_net.fixed.safetensors"
        if output.exists() and not force and not (output / "digits_net.safetensors").is_file():
            raise CheckpointError(
                f"{output}: already exists and is not from an earlier demo. Give another -o DIR, "
                "or --force.",
                path=output,
            )
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"{output}: cannot be made ({error}).", path=output) from error
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
    app()


if __name__ == "__main__":
    main()
