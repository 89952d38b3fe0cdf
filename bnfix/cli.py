"""The command line: parse, one call of the public API, tables and progress, exit code."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnfix import demo as demo_files
from bnfix.checkpoint import check_output, read_checkpoint
from bnfix.comparison import evaluate_files
from bnfix.conversion import convert as convert_file
from bnfix.diagnosis import Finding, NormTensors, diagnose, read_norms
from bnfix.errors import BnfixError, CheckpointError, ConfigError
from bnfix.pipeline import TRIED, Plan, execute, open_plan
from bnfix.recipe import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    Preprocessing,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.report import Report
from bnfix.result import Result, check_outputs
from bnfix.surgery import find_norms
from bnfix.version import __version__
from bnfix.workbench import Track, load_one, silent

app = typer.Typer(
    name="bnfix",
    help="Repair trained networks at their Batch Normalization layers: convert, recalibrate, "
    "choose, prove.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _help(recipe: type, name: str) -> str:
    """The help text of a recipe's field: it stands there, and only there."""
    return str(recipe.__dataclass_fields__[name].metadata["help"])  # type: ignore[attr-defined]


def _default(recipe: type, name: str) -> Any:
    return recipe.__dataclass_fields__[name].default  # type: ignore[attr-defined]


def _option(recipe: type, name: str, *flags: str, panel: str | None = None) -> Any:
    flags = flags or ("--" + name.replace("_", "-"),)
    return typer.Option(*flags, help=_help(recipe, name), rich_help_panel=panel)


_MODEL, _DATA, _RUN = "Model and file", "Data and preprocessing", "How to run"
_NORM, _TRAIN, _OUT = "Normalization", "Training", "Output"

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint.")]
Model = Annotated[str | None, _option(ModelRecipe, "model", panel=_MODEL)]
ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="Argument of the builder, a JSON value; repeatable.",
        rich_help_panel=_MODEL,
    ),
]
Key = Annotated[str | None, _option(ModelRecipe, "key", panel=_MODEL)]
Prefix = Annotated[str | None, _option(ModelRecipe, "prefix", panel=_MODEL)]

Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Class folders, a folder with labels.csv, a flat folder, or an .npz file.",
        rich_help_panel=_DATA,
    ),
]
Test = Annotated[str | None, _option(DataRecipe, "test", panel=_DATA)]
ClassMap = Annotated[Path | None, _option(DataRecipe, "class_map", panel=_DATA)]
Labels = Annotated[str, _option(DataRecipe, "labels", panel=_DATA)]
Preset = Annotated[str | None, _option(DataRecipe, "preset", panel=_DATA)]
MaxBad = Annotated[float | None, _option(DataRecipe, "max_bad", panel=_DATA)]
Resize = Annotated[str | None, _option(Preprocessing, "resize", panel=_DATA)]
Crop = Annotated[str | None, _option(Preprocessing, "crop", panel=_DATA)]
Interpolation = Annotated[str | None, _option(Preprocessing, "interpolation", panel=_DATA)]
Mean = Annotated[str | None, _option(Preprocessing, "mean", panel=_DATA)]
Std = Annotated[str | None, _option(Preprocessing, "std", panel=_DATA)]
Scale = Annotated[str | None, _option(Preprocessing, "scale", panel=_DATA)]

To = Annotated[str, _option(SwapRecipe, "to", panel=_NORM)]
ChannelGroups = Annotated[int | None, _option(SwapRecipe, "channel_groups", panel=_NORM)]
GhostSize = Annotated[int | None, _option(SwapRecipe, "ghost_size", panel=_NORM)]
SwapWeight = Annotated[float | None, _option(SwapRecipe, "example_weight", panel=_NORM)]
Layers = Annotated[list[str] | None, _option(SwapRecipe, "layers", "--layers", panel=_NORM)]
Skip = Annotated[list[str] | None, _option(SwapRecipe, "skip", "--skip", panel=_NORM)]
Statistics = Annotated[str, _option(StatisticsRecipe, "statistics", panel=_NORM)]
TrainBatchSize = Annotated[int | None, _option(StatisticsRecipe, "train_batch_size", panel=_NORM)]
Feed = Annotated[str, _option(StatisticsRecipe, "feed", panel=_NORM)]
Samples = Annotated[int | None, _option(StatisticsRecipe, "samples", panel=_NORM)]
Weight = Annotated[str, _option(WeightRecipe, "example_weight", panel=_NORM)]
Granularity = Annotated[str, _option(WeightRecipe, "granularity", panel=_NORM)]
Pointwise = Annotated[bool, _option(WeightRecipe, "pointwise", "--pointwise", panel=_NORM)]
Z = Annotated[float, _option(GateRecipe, "z", panel=_NORM)]

Train = Annotated[str, _option(FinetuneRecipe, "train", panel=_TRAIN)]
TuneStatistics = Annotated[str, _option(FinetuneRecipe, "statistics", panel=_TRAIN)]
LearnWeight = Annotated[str, _option(FinetuneRecipe, "example_weight", panel=_TRAIN)]
Epochs = Annotated[int, _option(FinetuneRecipe, "epochs", panel=_TRAIN)]
Steps = Annotated[int | None, _option(FinetuneRecipe, "steps", panel=_TRAIN)]
Optimizer = Annotated[str, _option(FinetuneRecipe, "optimizer", panel=_TRAIN)]
LearningRate = Annotated[float, _option(FinetuneRecipe, "lr", panel=_TRAIN)]
WeightDecay = Annotated[float, _option(FinetuneRecipe, "weight_decay", panel=_TRAIN)]
NormDecay = Annotated[float, _option(FinetuneRecipe, "norm_decay", panel=_TRAIN)]
NormDecayTarget = Annotated[str, _option(FinetuneRecipe, "norm_decay_target", panel=_TRAIN)]
LabelSmoothing = Annotated[float, _option(FinetuneRecipe, "label_smoothing", panel=_TRAIN)]

Device = Annotated[str, _option(RunOptions, "device", panel=_RUN)]
Precision = Annotated[str, _option(RunOptions, "precision", panel=_RUN)]
BatchSize = Annotated[int, _option(RunOptions, "batch_size", panel=_RUN)]
Workers = Annotated[int, _option(RunOptions, "workers", panel=_RUN)]
Seed = Annotated[int, _option(GateRecipe, "seed", panel=_RUN)]

Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="The .safetensors to write.", rich_help_panel=_OUT
    ),
]
Force = Annotated[
    bool, typer.Option("--force", help="Replace existing outputs.", rich_help_panel=_OUT)
]
ShowPlan = Annotated[
    bool,
    typer.Option("--plan", help="Say what would be done, do nothing.", rich_help_panel=_OUT),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json", help="The result as one JSON object on standard output.", rich_help_panel=_OUT
    ),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the verdict.", rich_help_panel=_OUT)
]


@dataclasses.dataclass
class _Terminal:
    """Where a command's words go: results to standard output, all else to standard error."""

    as_json: bool
    quiet: bool
    out: Console = dataclasses.field(default_factory=Console)
    err: Console = dataclasses.field(default_factory=lambda: Console(stderr=True))

    @contextlib.contextmanager
    def working(self) -> Iterator[Track]:
        """Show progress on a terminal; keep the user's own prints off standard output."""
        shown = self.err.is_terminal and not self.quiet
        redirect = contextlib.redirect_stdout(sys.stderr)
        if not shown:
            with redirect:
                yield silent
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        with redirect, Progress(*columns, console=self.err, transient=True) as progress:

            def track(stage: str, batches: Iterable[Any], n: int) -> Iterable[Any]:
                task = progress.add_task(escape(stage), total=n)
                try:
                    for batch in batches:
                        yield batch
                        progress.advance(task)
                finally:
                    progress.remove_task(task)

            yield track

    def show(self, report: Report, written: Path | None = None) -> None:
        """The result, in the form that was asked for."""
        if self.as_json:
            content = report.to_json()
            content["output"] = None if written is None else str(written)
            self.print_json(content)
            return
        if not self.quiet:
            for table in (_decision_table(report), _model_table(report)):
                if table is not None:
                    self.out.print(table)
        self.out.print(escape(report.verdict_sentence()), soft_wrap=True)
        if written is not None and not self.quiet:
            self.out.print(
                escape(f"wrote {written} and {written.name}.report.html, .md, .json"),
                soft_wrap=True,
            )

    def print_json(self, content: Any) -> None:
        sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        sys.stdout.flush()


@contextlib.contextmanager
def _stated() -> Iterator[None]:
    """Turn stated errors into one line and an exit code."""
    try:
        yield
    except ConfigError as error:
        _fail(error, 2)
    except BnfixError as error:
        _fail(error, 1)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        _fail(f"out of memory: {message} Lower --batch-size, or use --device cpu.", 1)
    except KeyboardInterrupt:
        _fail("interrupted; nothing was written.", 130)


def _fail(error: Exception | str, code: int) -> None:
    message = " ".join(str(error).split())
    Console(stderr=True).print(f"bnfix: {escape(message)}", soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def _command_line() -> str:
    return shlex.join(["bnfix", *sys.argv[1:]])


def _numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """Comma-separated numbers; a fraction such as 1/255 is one."""
    if text is None:
        return None
    try:
        return tuple(_fraction(part) for part in text.replace(" ", ",").split(",") if part)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--{name}: {text!r}, expected a number, or several with commas between.", name=name
        ) from error


def _fraction(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def _sizes(text: str | None, name: str) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError as error:
        raise ConfigError(
            f"--{name}: {text!r}, expected one size or HEIGHTxWIDTH, such as 224 or 224x320.",
            name=name,
        ) from error


def _model_recipe(
    model: str | None, pairs: Sequence[str] | None, key: str | None, prefix: str | None
) -> ModelRecipe:
    arguments = []
    for pair in pairs or ():
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"--model-arg: {pair!r}, expected KEY=VALUE.", name="model_arg")
        try:
            arguments.append((name, json.loads(value)))
        except ValueError:
            arguments.append((name, value))  # a bare word is a string
    return ModelRecipe(model, tuple(arguments), key, prefix)


def _data_recipe(
    test: str | None,
    class_map: Path | None,
    labels: str,
    preset: str | None,
    max_bad: float | None,
    shape: tuple[str | None, ...],
) -> DataRecipe:
    resize, crop, interpolation, mean, std, scale = shape
    scales = _numbers(scale, "scale")
    if scales is not None and len(scales) != 1:
        raise ConfigError(f"--scale: {scale!r}, expected one number.", name="scale")
    return DataRecipe(
        test,
        None if class_map is None else str(class_map),
        labels,
        preset,
        _sizes(resize, "resize"),
        _sizes(crop, "crop"),
        interpolation,
        _numbers(mean, "mean"),
        _numbers(std, "std"),
        None if scales is None else scales[0],
        max_bad,
    )


def _weight(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text


def _run_plan(
    terminal: _Terminal,
    make: Callable[[], Plan],
    checkpoint: Path,
    data: str,
    output: Path,
    *,
    force: bool,
    show_plan: bool,
) -> None:
    """Check the output, open, do, save, show; or say what would be done."""
    with _stated():
        plan = make()
        if not show_plan:
            check_outputs(output, force=force)
        with terminal.working() as track:
            plan, bench = open_plan(plan, checkpoint, data, None, track)
            described = plan.describe(bench, str(output))
            result = None if show_plan else execute(plan, bench)
        if result is None:
            _show_plan(terminal, described)
            return
        result.save(output, force=force)
        terminal.show(result.report, output)


def _show_plan(terminal: _Terminal, described: dict[str, Any]) -> None:
    if terminal.as_json:
        terminal.print_json(described)
        return
    split = described["data"]["splits"]
    lines = [
        f"{described['command']}: {described['n_layers']} norm layers of {described['model']}",
        f"data: {described['data']['spec']} ({described['data']['kind']}), "
        + ", ".join(f"{name} {n:,}" for name, n in split.items()),
        *(f"{i}. {stage}" for i, stage in enumerate(described["stages"], 1)),
        f"would write {described['output']} and its report; nothing was done",
        *(f"note: {note}" for note in described["assumptions"]),
    ]
    for line in lines:
        terminal.out.print(escape(line), soft_wrap=True)


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
    statistics: Statistics = _default(StatisticsRecipe, "statistics"),
    train_batch_size: TrainBatchSize = None,
    feed: Feed = _default(StatisticsRecipe, "feed"),
    samples: Samples = None,
    example_weight: Weight = _default(WeightRecipe, "example_weight"),
    granularity: Granularity = _default(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
    layers: Layers = None,
    skip: Skip = None,
    z: Z = _default(GateRecipe, "z"),
    train: Annotated[
        str,
        typer.Option(
            help="What fine-tuning may train: none, norms, head, norms+head or all.",
            rich_help_panel=_TRAIN,
        ),
    ] = TRIED.train,
    epochs: Epochs = TRIED.epochs,
    lr: LearningRate = TRIED.lr,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = _default(RunOptions, "batch_size"),
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
            _model_recipe(model, model_arg, key, prefix),
            _data_recipe(
                test, class_map, labels, preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(layers=tuple(layers or ()), skip=tuple(skip or ())),
            StatisticsRecipe(statistics, train_batch_size, feed, samples, batch_size),
            WeightRecipe(_weight(example_weight), granularity, pointwise),
            tune,
            GateRecipe(z, seed=seed),
            RunOptions(device, precision, batch_size, workers),
        )  # fmt: skip

    _run_plan(
        _Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
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
    statistics: Statistics = _default(StatisticsRecipe, "statistics"),
    train_batch_size: TrainBatchSize = None,
    feed: Feed = _default(StatisticsRecipe, "feed"),
    samples: Samples = None,
    example_weight: Weight = _default(WeightRecipe, "example_weight"),
    granularity: Granularity = _default(WeightRecipe, "granularity"),
    pointwise: Pointwise = False,
    layers: Layers = None,
    skip: Skip = None,
    z: Z = _default(GateRecipe, "z"),
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = _default(RunOptions, "batch_size"),
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
            _model_recipe(model, model_arg, key, prefix),
            _data_recipe(
                test, class_map, labels, preset, max_bad,
                (resize, crop, interpolation, mean, std, scale),
            ),
            SwapRecipe(layers=tuple(layers or ()), skip=tuple(skip or ())),
            StatisticsRecipe(statistics, train_batch_size, feed, samples, batch_size),
            WeightRecipe(_weight(example_weight), granularity, pointwise),
            None,
            GateRecipe(z, seed=seed),
            RunOptions(device, precision, batch_size, workers),
        )  # fmt: skip

    _run_plan(
        _Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
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
    train: Train = _default(FinetuneRecipe, "train"),
    statistics: TuneStatistics = _default(FinetuneRecipe, "statistics"),
    example_weight: LearnWeight = _default(FinetuneRecipe, "example_weight"),
    epochs: Epochs = _default(FinetuneRecipe, "epochs"),
    steps: Steps = None,
    optimizer: Optimizer = _default(FinetuneRecipe, "optimizer"),
    lr: LearningRate = _default(FinetuneRecipe, "lr"),
    weight_decay: WeightDecay = 0.0,
    norm_decay: NormDecay = 0.0,
    norm_decay_target: NormDecayTarget = _default(FinetuneRecipe, "norm_decay_target"),
    label_smoothing: LabelSmoothing = 0.0,
    to: To = _default(SwapRecipe, "to"),
    ghost_size: GhostSize = None,
    channel_groups: ChannelGroups = None,
    layers: Layers = None,
    skip: Skip = None,
    device: Device = "auto",
    precision: Precision = "fp32",
    batch_size: BatchSize = _default(FinetuneRecipe, "batch_size"),
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
            _model_recipe(model, model_arg, key, prefix),
            _data_recipe(
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
        _Terminal(as_json, quiet), make, checkpoint, data, output, force=force, show_plan=show_plan
    )


@app.command()
def convert(
    checkpoint: Checkpoint,
    output: Output,
    model: Model = None,
    model_arg: ModelArg = None,
    key: Key = None,
    prefix: Prefix = None,
    to: To = _default(SwapRecipe, "to"),
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
            rich_help_panel=_MODEL,
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
    terminal = _Terminal(as_json, quiet)
    with _stated():
        recipe = SwapRecipe(
            to, example_weight, ghost_size, channel_groups, tuple(layers or ()), tuple(skip or ())
        )
        shape = _sizes(input_shape, "input-shape")
        if not show_plan:
            check_outputs(output, force=force)
        with terminal.working():
            result = convert_file(
                checkpoint,
                model=_model_recipe(model, model_arg, key, prefix),
                swap=recipe,
                input_shape=shape,
                run=RunOptions(device),
                command_line=_command_line(),
            )
        if not show_plan:
            result.save(output, force=force)
        _show_conversion(terminal, result, None if show_plan else output)


def _show_conversion(terminal: _Terminal, result: Result, output: Path | None) -> None:
    swap = result.report.swap
    if terminal.as_json or swap is None:
        terminal.show(result.report, output)
        return
    table = Table("layer", "was", "channels", "groups", "ghost", "example weight", "difference")
    for change in swap.changes:
        table.add_row(
            escape(change.name),
            change.kind,
            str(change.channels),
            str(change.channel_groups),
            "all" if change.ghost_size is None else str(change.ghost_size),
            f"{change.example_weight or 0:g}",
            "-" if change.difference is None else f"{change.difference:.1e}",
        )
    if not terminal.quiet:
        terminal.out.print(table)
    for note in result.report.assumptions:
        terminal.out.print(escape(note), soft_wrap=True)
    wrote = "nothing was written" if output is None else f"wrote {output} and its report"
    terminal.out.print(escape(f"{len(swap.changes)} layers; {wrote}"), soft_wrap=True)


@app.command("eval")
def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="One or more checkpoints.")
    ],
    data: Data,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report.", rich_help_panel=_OUT),
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
    batch_size: BatchSize = _default(RunOptions, "batch_size"),
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
    terminal = _Terminal(as_json, quiet)
    with _stated():
        source = _data_recipe(
            None, class_map, labels, preset, max_bad,
            (resize, crop, interpolation, mean, std, scale),
        )  # fmt: skip
        recipe = _model_recipe(model, model_arg, key, prefix)
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
    terminal = _Terminal(as_json, quiet)
    with _stated(), terminal.working():
        recipe = _model_recipe(model, model_arg, key, prefix)
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
        terminal.print_json(_jsonable(content))
    else:
        _show_inspection(terminal, layers, kinds, findings, [*found.notes, *problems])


def _show_inspection(
    terminal: _Terminal,
    layers: Sequence[NormTensors],
    kinds: dict[str, str],
    findings: Sequence[Finding],
    notes: Sequence[str],
) -> None:
    table = Table("layer", "kind", "channels", "batches", "mean", "variance", "dead", "weight")
    for layer in layers:
        table.add_row(
            escape(layer.name),
            kinds.get(layer.name, "?"),
            str(layer.channels),
            "-" if layer.batches_tracked is None else str(layer.batches_tracked),
            "{:.2g} to {:.2g}".format(*layer.mean_range),
            "{:.2g} to {:.2g}".format(*layer.var_range),
            str(layer.n_dead),
            _short_weight(layer.example_weight),
        )
    if layers and not terminal.quiet:
        terminal.out.print(table)
    for note in notes:
        terminal.out.print(escape(f"note: {note}"), soft_wrap=True)
    for finding in findings:
        text = f"{finding.severity}: {finding.layer}: {finding.detail} -> {finding.advice}"
        terminal.out.print(escape(text), soft_wrap=True)
    summary = f"{len(layers)} norm layers, {len(findings)} findings"
    terminal.out.print(summary if layers else "no norm layer with running statistics in this file")


def _short_weight(weight: Any) -> str:
    numbers = [w for w in weight if isinstance(w, int | float)] if isinstance(weight, list) else []
    if numbers:
        return f"{min(numbers):.2g} to {max(numbers):.2g}"
    return f"{weight:.3g}" if isinstance(weight, int | float) else "?"


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Folder to write.", rich_help_panel=_OUT
        ),
    ] = Path("bnfix-demo"),
    force: Force = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """The whole way on embedded data, offline: look, convert, calibrate, fine-tune, evaluate.

    Example: bnfix demo
    """
    terminal = _Terminal(as_json, quiet)
    with _stated():
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


def _decision_table(report: Report) -> Table | None:
    if not report.decisions:
        return None
    table = Table("stage", "candidate", "NLL", "against", "top-1", "against", "admitted", "why")
    for d in report.decisions:
        table.add_row(
            d.stage,
            escape(d.candidate),
            f"{d.nll:.4f}",
            f"{d.incumbent_nll:.4f}",
            f"{100 * d.top1:.1f}%",
            f"{100 * d.incumbent_top1:.1f}%",
            "yes" if d.admitted else "no",
            escape(d.reason),
        )
    return table


def _model_table(report: Report) -> Table | None:
    if not report.models or report.models[0].metrics.top1 is None:
        return None
    table = Table("model", "top-1 (95%)", "NLL (95%)", "NLL scaled", "ECE", "live", "images/s")
    for model in report.models:
        m = model.metrics
        low, high = m.interval["top1"]
        nll_low, nll_high = m.interval["nll"]
        table.add_row(
            escape(model.name),
            f"{100 * (m.top1 or 0):.1f}% ({100 * low:.1f} to {100 * high:.1f})",
            f"{m.nll:.3f} ({nll_low:.3f} to {nll_high:.3f})",
            f"{m.nll_temperature_scaled:.3f}",
            f"{m.ece:.3f}",
            str(model.n_live),
            f"{m.images_per_second:.0f}",
        )
    return table


def _jsonable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_jsonable(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


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
    app()


if __name__ == "__main__":
    main()
