"""The command line's options, in groups: types with their help, and texts to recipes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from bnfix.cli.parsing import numbers, samples_of, sizes, weight_of
from bnfix.cli.terminal import Terminal, with_traceback
from bnfix.errors import ConfigError
from bnfix.preprocessing import Preprocessing
from bnfix.recipe import (
    DataRecipe,
    EvaluationRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)

MODEL, DATA, RUN = "Model and file", "Data and preprocessing", "How to run"
NORM, TRAIN, ALSO, OUT = "Normalization", "Training", "What else is measured", "Output"


def default_of(recipe: type, name: str) -> Any:
    """The default of a recipe's field."""
    return recipe.__dataclass_fields__[name].default  # type: ignore[attr-defined]


def option(recipe: type, name: str, *flags: str, panel: str, metavar: str | None = None) -> Any:
    """An option whose help text is that of a recipe's field: it stands there, and only there."""
    text = recipe.__dataclass_fields__[name].metadata["help"]  # type: ignore[attr-defined]
    flags = flags or ("--" + name.replace("_", "-"),)
    return typer.Option(*flags, help=str(text), rich_help_panel=panel, metavar=metavar)


def _model(name: str) -> Any:
    return option(ModelRecipe, name, panel=MODEL)


def _shape(name: str) -> Any:
    return option(Preprocessing, name, panel=DATA)


def _data(name: str) -> Any:
    return option(DataRecipe, name, panel=DATA)


def _layers(name: str) -> Any:
    return option(SwapRecipe, name, "--" + name.replace("_", "-"), panel=NORM)


def _tune(name: str) -> Any:
    return option(FinetuneRecipe, name, panel=TRAIN)


def _show_traceback(wanted: bool) -> bool:
    with_traceback.set(wanted)
    return wanted


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint.")]
Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Class folders, a folder with labels.csv, a flat folder, an .npz file, .tar shards, "
        "parquet or a Hugging Face folder, cifar10:ROOT#test and the like, or file.py:callable.",
        rich_help_panel=DATA,
    ),
]
Output = Annotated[
    Path,
    typer.Option(
        "-o", "--out", metavar="OUT", help="The .safetensors to write.", rich_help_panel=OUT
    ),
]
Seed = Annotated[int, option(GateRecipe, "seed", panel=RUN)]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the state of the run; interrupted, the same command goes on from it.",
        rich_help_panel=RUN,
    ),
]
Train = Annotated[str, _tune("train")]
Epochs = Annotated[int, _tune("epochs")]
LearningRate = Annotated[float | None, _tune("lr")]


@dataclass(frozen=True)
class ModelFlags:
    """Which model the checkpoint is."""

    model: Annotated[str | None, _model("model")] = None
    model_arg: Annotated[
        list[str] | None,
        typer.Option(
            "--model-arg",
            metavar="KEY=VALUE",
            help="Argument of the builder, a JSON value; repeatable.",
            rich_help_panel=MODEL,
        ),
    ] = None
    key: Annotated[str | None, _model("key")] = None
    prefix: Annotated[str | None, _model("prefix")] = None
    prefer_ema: Annotated[bool, _model("prefer_ema")] = False
    unfreeze: Annotated[bool, option(ModelRecipe, "unfreeze", "--unfreeze", panel=MODEL)] = False
    forward: Annotated[str | None, _model("forward")] = None
    logits_output: Annotated[
        str | None,
        option(
            ModelRecipe,
            "logits_output",
            "--output",
            "--logits-output",
            panel=MODEL,
            metavar="NAME|INDEX",
        ),
    ] = None

    def recipe(self) -> ModelRecipe:
        """The options as a recipe."""
        arguments = []
        for pair in self.model_arg or ():
            name, equals, value = pair.partition("=")
            if not equals or not name:
                raise ConfigError(f"--model-arg: {pair!r}, expected KEY=VALUE.", name="model_arg")
            try:
                arguments.append((name, json.loads(value)))
            except ValueError:
                arguments.append((name, value))  # a bare word is a string
        return ModelRecipe(
            model=self.model,
            arguments=tuple(arguments),
            key=self.key,
            prefix=self.prefix,
            prefer_ema=self.prefer_ema,
            unfreeze=self.unfreeze,
            forward=self.forward,
            logits_output=self.logits_output,
        )


@dataclass(frozen=True)
class InputFlags:
    """How images become inputs."""

    preset: Annotated[str | None, _data("preset")] = None
    resize: Annotated[str | None, _shape("resize")] = None
    crop: Annotated[str | None, _shape("crop")] = None
    interpolation: Annotated[str | None, _shape("interpolation")] = None
    mean: Annotated[str | None, _shape("mean")] = None
    std: Annotated[str | None, _shape("std")] = None
    scale: Annotated[str | None, _shape("scale")] = None
    bgr: Annotated[bool, option(Preprocessing, "bgr", "--bgr", panel=DATA)] = False
    max_bad: Annotated[float | None, _data("max_bad")] = None
    corrupt: Annotated[
        str | None, option(DataRecipe, "corrupt", panel=DATA, metavar="KIND:SEVERITY")
    ] = None

    def recipe(
        self,
        *,
        test: str | None = None,
        class_map: Path | None = None,
        labels: str = "none",
    ) -> DataRecipe:
        """The options as a recipe."""
        scales = numbers(self.scale, "scale")
        if scales is not None and len(scales) != 1:
            raise ConfigError(f"--scale: {self.scale!r}, expected one number.", name="scale")
        return DataRecipe(
            test=test,
            class_map=None if class_map is None else str(class_map),
            labels=labels,
            preset=self.preset,
            resize=sizes(self.resize, "resize"),
            crop=sizes(self.crop, "crop"),
            interpolation=self.interpolation,
            mean=numbers(self.mean, "mean"),
            std=numbers(self.std, "std"),
            scale=None if scales is None else scales[0],
            bgr=self.bgr,
            max_bad=self.max_bad,
            corrupt=self.corrupt,
        )


@dataclass(frozen=True)
class AlsoFlags:
    """What else is measured."""

    corruptions: Annotated[
        bool, option(EvaluationRecipe, "corruptions", "--corruptions", panel=ALSO)
    ] = False
    compare_batch_sizes: Annotated[
        bool, option(EvaluationRecipe, "compare_batch_sizes", "--compare-batch-sizes", panel=ALSO)
    ] = False
    fast: Annotated[bool, option(EvaluationRecipe, "fast", "--fast", panel=RUN)] = False
    metric: Annotated[
        list[str] | None, option(EvaluationRecipe, "metric", panel=ALSO, metavar="SPEC")
    ] = None
    predictions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for what each model says of each image: .csv or .parquet.",
            rich_help_panel=OUT,
        ),
    ] = None

    def recipe(self) -> EvaluationRecipe:
        """The options as a recipe."""
        return EvaluationRecipe(
            self.corruptions, self.compare_batch_sizes, self.fast, tuple(self.metric or ())
        )


@dataclass(frozen=True)
class LabelFlags:
    """Which labels the examples have."""

    class_map: Annotated[Path | None, _data("class_map")] = None
    labels: Annotated[str, _data("labels")] = "auto"


@dataclass(frozen=True)
class LayerFlags:
    """Which layers."""

    layers: Annotated[list[str] | None, _layers("layers")] = None
    skip: Annotated[list[str] | None, _layers("skip")] = None

    def recipe(self, **kind: Any) -> SwapRecipe:
        """The options as a recipe."""
        return SwapRecipe(layers=tuple(self.layers or ()), skip=tuple(self.skip or ()), **kind)


@dataclass(frozen=True)
class KindFlags:
    """Which kind of normalization."""

    to: Annotated[str, _layers("to")] = default_of(SwapRecipe, "to")
    ghost_size: Annotated[int | None, _layers("ghost_size")] = None
    channel_groups: Annotated[int | None, _layers("channel_groups")] = None


@dataclass(frozen=True)
class FeedFlags:
    """How statistics are measured."""

    feed: Annotated[str, option(StatisticsRecipe, "feed", panel=NORM)] = default_of(
        StatisticsRecipe, "feed"
    )
    samples: Annotated[
        str | None, option(StatisticsRecipe, "samples", panel=NORM, metavar="N|auto")
    ] = None
    tolerance: Annotated[float, option(StatisticsRecipe, "tolerance", panel=NORM)] = default_of(
        StatisticsRecipe, "tolerance"
    )
    include_frozen: Annotated[
        bool, option(StatisticsRecipe, "include_frozen", "--include-frozen", panel=NORM)
    ] = False

    def recipe(
        self, statistics: str, batch_size: int | None, train_batch_size: int | None = None
    ) -> StatisticsRecipe:
        """The options as a recipe."""
        return StatisticsRecipe(
            statistics=statistics,
            train_batch_size=train_batch_size,
            feed=self.feed,
            samples=samples_of(self.samples),
            batch_size=batch_size or default_of(StatisticsRecipe, "batch_size"),
            tolerance=self.tolerance,
            include_frozen=self.include_frozen,
        )


@dataclass(frozen=True)
class ChoiceFlags:
    """What is chosen, and how strictly."""

    statistics: Annotated[str, option(StatisticsRecipe, "statistics", panel=NORM)] = default_of(
        StatisticsRecipe, "statistics"
    )
    train_batch_size: Annotated[
        int | None, option(StatisticsRecipe, "train_batch_size", panel=NORM)
    ] = None
    example_weight: Annotated[str, option(WeightRecipe, "example_weight", panel=NORM)] = default_of(
        WeightRecipe, "example_weight"
    )
    granularity: Annotated[str, option(WeightRecipe, "granularity", panel=NORM)] = default_of(
        WeightRecipe, "granularity"
    )
    pointwise: Annotated[bool, option(WeightRecipe, "pointwise", "--pointwise", panel=NORM)] = False
    thin: Annotated[float, option(WeightRecipe, "thin", panel=NORM)] = default_of(
        WeightRecipe, "thin"
    )
    z: Annotated[float, option(GateRecipe, "z", panel=NORM)] = default_of(GateRecipe, "z")

    def recipe(self) -> WeightRecipe:
        """The choice of example weights as a recipe."""
        return WeightRecipe(
            weight_of(self.example_weight), self.granularity, self.pointwise, thin=self.thin
        )


@dataclass(frozen=True)
class TuneFlags:
    """A short training run."""

    train: Train = default_of(FinetuneRecipe, "train")
    statistics: Annotated[str, _tune("statistics")] = default_of(FinetuneRecipe, "statistics")
    example_weight: Annotated[str, _tune("example_weight")] = default_of(
        FinetuneRecipe, "example_weight"
    )
    epochs: Epochs = default_of(FinetuneRecipe, "epochs")
    steps: Annotated[int | None, _tune("steps")] = None
    optimizer: Annotated[str, _tune("optimizer")] = default_of(FinetuneRecipe, "optimizer")
    lr: LearningRate = None
    weight_decay: Annotated[float, _tune("weight_decay")] = 0.0
    norm_decay: Annotated[float, _tune("norm_decay")] = 0.0
    norm_decay_target: Annotated[str, _tune("norm_decay_target")] = default_of(
        FinetuneRecipe, "norm_decay_target"
    )
    label_smoothing: Annotated[float, _tune("label_smoothing")] = 0.0
    clip: Annotated[float | None, _tune("clip")] = None
    accumulate: Annotated[int, _tune("accumulate")] = default_of(FinetuneRecipe, "accumulate")
    ema: Annotated[float | None, _tune("ema")] = None
    augment: Annotated[str, _tune("augment")] = default_of(FinetuneRecipe, "augment")
    batch_size: Annotated[int | None, _tune("batch_size")] = None

    def recipe(self, ghost_size: int | None) -> FinetuneRecipe:
        """The options as a recipe."""
        own = {name: getattr(self, name) for name in TuneFlags.__dataclass_fields__}
        return FinetuneRecipe(ghost_size=ghost_size, **own)


@dataclass(frozen=True)
class PlaceFlags:
    """Where to run, and with how many processes that decode images."""

    device: Annotated[str, option(RunOptions, "device", panel=RUN)] = "auto"
    workers: Annotated[int, option(RunOptions, "workers", panel=RUN)] = -1


@dataclass(frozen=True)
class RunFlags(PlaceFlags):
    """How to run."""

    precision: Annotated[str, option(RunOptions, "precision", panel=RUN)] = "fp32"
    batch_size: Annotated[int | None, option(RunOptions, "batch_size", panel=RUN)] = None

    def options(self) -> RunOptions:
        """The options as the library takes them."""
        return RunOptions(self.device, self.precision, self.batch_size, self.workers)


@dataclass(frozen=True)
class TalkFlags:
    """What is said."""

    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="The result as one JSON object on standard output.", rich_help_panel=OUT
        ),
    ] = False
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Only the verdict.", rich_help_panel=OUT)
    ] = False
    debug: Annotated[
        bool,
        typer.Option(
            "--debug",
            help="Show the traceback of an error.",
            rich_help_panel=OUT,
            callback=_show_traceback,
        ),
    ] = False

    def terminal(self) -> Terminal:
        """Where the command's words go."""
        return Terminal(self.as_json, self.quiet)


@dataclass(frozen=True)
class OutFlags(TalkFlags):
    """What is written and said."""

    force: Annotated[
        bool, typer.Option("--force", help="Replace existing outputs.", rich_help_panel=OUT)
    ] = False
    show_plan: Annotated[
        bool,
        typer.Option("--plan", help="Say what would be done, do nothing.", rich_help_panel=OUT),
    ] = False
