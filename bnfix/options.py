"""The command line's options: types with their help, and texts to recipes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from bnfix.errors import ConfigError
from bnfix.recipe import (
    AverageRecipe,
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
from bnfix.refitting import REFIT_SAMPLES


def help_of(recipe: type, name: str) -> str:
    """The help text of a recipe's field: it stands there, and only there."""
    return str(recipe.__dataclass_fields__[name].metadata["help"])  # type: ignore[attr-defined]


def default_of(recipe: type, name: str) -> Any:
    """The default of a recipe's field.

    Args:
        recipe: a recipe class.
        name: of the field.

    Returns:
        The value.
    """
    return recipe.__dataclass_fields__[name].default  # type: ignore[attr-defined]


def _option(recipe: type, name: str, *flags: str, panel: str | None = None) -> Any:
    flags = flags or ("--" + name.replace("_", "-"),)
    return typer.Option(*flags, help=help_of(recipe, name), rich_help_panel=panel)


MODEL, DATA, RUN = "Model and file", "Data and preprocessing", "How to run"


NORM, TRAIN, OUT = "Normalization", "Training", "Output"


Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint.")]


Model = Annotated[str | None, _option(ModelRecipe, "model", panel=MODEL)]


ModelArg = Annotated[
    list[str] | None,
    typer.Option(
        "--model-arg",
        metavar="KEY=VALUE",
        help="Argument of the builder, a JSON value; repeatable.",
        rich_help_panel=MODEL,
    ),
]


Key = Annotated[str | None, _option(ModelRecipe, "key", panel=MODEL)]


Prefix = Annotated[str | None, _option(ModelRecipe, "prefix", panel=MODEL)]


Data = Annotated[
    str,
    typer.Option(
        metavar="DATA",
        help="Class folders, a folder with labels.csv, a flat folder, or an .npz file.",
        rich_help_panel=DATA,
    ),
]


Test = Annotated[str | None, _option(DataRecipe, "test", panel=DATA)]


ClassMap = Annotated[Path | None, _option(DataRecipe, "class_map", panel=DATA)]


Labels = Annotated[str, _option(DataRecipe, "labels", panel=DATA)]


Preset = Annotated[str | None, _option(DataRecipe, "preset", panel=DATA)]


MaxBad = Annotated[float | None, _option(DataRecipe, "max_bad", panel=DATA)]


Resize = Annotated[str | None, _option(Preprocessing, "resize", panel=DATA)]


Crop = Annotated[str | None, _option(Preprocessing, "crop", panel=DATA)]


Interpolation = Annotated[str | None, _option(Preprocessing, "interpolation", panel=DATA)]


Mean = Annotated[str | None, _option(Preprocessing, "mean", panel=DATA)]


Std = Annotated[str | None, _option(Preprocessing, "std", panel=DATA)]


Scale = Annotated[str | None, _option(Preprocessing, "scale", panel=DATA)]


To = Annotated[str, _option(SwapRecipe, "to", panel=NORM)]


ChannelGroups = Annotated[int | None, _option(SwapRecipe, "channel_groups", panel=NORM)]


GhostSize = Annotated[int | None, _option(SwapRecipe, "ghost_size", panel=NORM)]


SwapWeight = Annotated[float | None, _option(SwapRecipe, "example_weight", panel=NORM)]


Layers = Annotated[list[str] | None, _option(SwapRecipe, "layers", "--layers", panel=NORM)]


Skip = Annotated[list[str] | None, _option(SwapRecipe, "skip", "--skip", panel=NORM)]


Tolerance = Annotated[float, _option(StatisticsRecipe, "tolerance", panel=NORM)]


AverageWeights = Annotated[str | None, _option(AverageRecipe, "weights", panel=NORM)]


Statistics = Annotated[str, _option(StatisticsRecipe, "statistics", panel=NORM)]


TrainBatchSize = Annotated[int | None, _option(StatisticsRecipe, "train_batch_size", panel=NORM)]


Feed = Annotated[str, _option(StatisticsRecipe, "feed", panel=NORM)]


Samples = Annotated[
    str | None,
    typer.Option(metavar="N|auto", help=help_of(StatisticsRecipe, "samples"), rich_help_panel=NORM),
]


Weight = Annotated[str, _option(WeightRecipe, "example_weight", panel=NORM)]


Granularity = Annotated[str, _option(WeightRecipe, "granularity", panel=NORM)]


Pointwise = Annotated[bool, _option(WeightRecipe, "pointwise", "--pointwise", panel=NORM)]


Thin = Annotated[float, _option(WeightRecipe, "thin", panel=NORM)]
Z = Annotated[float, _option(GateRecipe, "z", panel=NORM)]


Train = Annotated[str, _option(FinetuneRecipe, "train", panel=TRAIN)]


TuneStatistics = Annotated[str, _option(FinetuneRecipe, "statistics", panel=TRAIN)]


LearnWeight = Annotated[str, _option(FinetuneRecipe, "example_weight", panel=TRAIN)]


Epochs = Annotated[int, _option(FinetuneRecipe, "epochs", panel=TRAIN)]


Steps = Annotated[int | None, _option(FinetuneRecipe, "steps", panel=TRAIN)]


Optimizer = Annotated[str, _option(FinetuneRecipe, "optimizer", panel=TRAIN)]


LearningRate = Annotated[float, _option(FinetuneRecipe, "lr", panel=TRAIN)]


WeightDecay = Annotated[float, _option(FinetuneRecipe, "weight_decay", panel=TRAIN)]


NormDecay = Annotated[float, _option(FinetuneRecipe, "norm_decay", panel=TRAIN)]


NormDecayTarget = Annotated[str, _option(FinetuneRecipe, "norm_decay_target", panel=TRAIN)]


LabelSmoothing = Annotated[float, _option(FinetuneRecipe, "label_smoothing", panel=TRAIN)]


Clip = Annotated[float | None, _option(FinetuneRecipe, "clip", panel=TRAIN)]


Accumulate = Annotated[int, _option(FinetuneRecipe, "accumulate", panel=TRAIN)]


Ema = Annotated[float | None, _option(FinetuneRecipe, "ema", panel=TRAIN)]


Augment = Annotated[str, _option(FinetuneRecipe, "augment", panel=TRAIN)]


State = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="Folder for the state of the run; interrupted, the same command goes on from it.",
        rich_help_panel=TRAIN,
    ),
]


RefitData = Annotated[
    str | None,
    typer.Option(
        "--data",
        metavar="DATA",
        help="Examples on which scale and shift are re-fitted to the original's outputs, where "
        "example weights above 0 change those (--to group); labels are not used.",
        rich_help_panel=DATA,
    ),
]


RefitSamples = Annotated[
    int | None,
    typer.Option(
        "--samples",
        help=f"Examples to re-fit on, drawn in seeded random order (default {REFIT_SAMPLES}).",
        rich_help_panel=DATA,
    ),
]


Device = Annotated[str, _option(RunOptions, "device", panel=RUN)]


Precision = Annotated[str, _option(RunOptions, "precision", panel=RUN)]


BatchSize = Annotated[int | None, _option(RunOptions, "batch_size", panel=RUN)]


TuneBatchSize = Annotated[int | None, _option(FinetuneRecipe, "batch_size", panel=TRAIN)]


Workers = Annotated[int, _option(RunOptions, "workers", panel=RUN)]


Seed = Annotated[int, _option(GateRecipe, "seed", panel=RUN)]


Recipe = Annotated[
    Path | None,
    typer.Option(
        metavar="OUT.safetensors",
        help="Replay the options in that file's history.",
        rich_help_panel=RUN,
    ),
]


Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", metavar="OUT", help="The .safetensors to write.", rich_help_panel=OUT
    ),
]


Force = Annotated[
    bool, typer.Option("--force", help="Replace existing outputs.", rich_help_panel=OUT)
]


ShowPlan = Annotated[
    bool,
    typer.Option("--plan", help="Say what would be done, do nothing.", rich_help_panel=OUT),
]


Json = Annotated[
    bool,
    typer.Option(
        "--json", help="The result as one JSON object on standard output.", rich_help_panel=OUT
    ),
]


Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Only the verdict.", rich_help_panel=OUT)
]


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


def sizes(text: str | None, name: str) -> tuple[int, ...] | None:
    """Sizes from a text such as 224 or 224x320.

    Args:
        text: as typed.
        name: of the option.

    Returns:
        One or more integers; ``None`` where nothing was typed.

    Raises:
        ConfigError: if it is anything else.
    """
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError as error:
        raise ConfigError(
            f"--{name}: {text!r}, expected one size or HEIGHTxWIDTH, such as 224 or 224x320.",
            name=name,
        ) from error


def model_recipe(
    model: str | None, pairs: Sequence[str] | None, key: str | None, prefix: str | None
) -> ModelRecipe:
    """The model options as a recipe.

    Args:
        model: the spec.
        pairs: KEY=VALUE texts.
        key: nesting in the file.
        prefix: of the names in the file.

    Returns:
        The recipe.

    Raises:
        ConfigError: if a pair has no equals sign.
    """
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


def data_recipe(
    test: str | None,
    class_map: Path | None,
    labels: str,
    preset: str | None,
    max_bad: float | None,
    shape: tuple[str | None, ...],
) -> DataRecipe:
    """The data options as a recipe.

    Args:
        test: DATA of the claim.
        class_map: JSON file.
        labels: auto or none.
        preset: preprocessing to start from.
        max_bad: bad images allowed.
        shape: resize, crop, interpolation, mean, std and scale, as typed.

    Returns:
        The recipe.

    Raises:
        ConfigError: if a number cannot be read.
    """
    resize, crop, interpolation, mean, std, scale = shape
    scales = _numbers(scale, "scale")
    if scales is not None and len(scales) != 1:
        raise ConfigError(f"--scale: {scale!r}, expected one number.", name="scale")
    return DataRecipe(
        test,
        None if class_map is None else str(class_map),
        labels,
        preset,
        sizes(resize, "resize"),
        sizes(crop, "crop"),
        interpolation,
        _numbers(mean, "mean"),
        _numbers(std, "std"),
        None if scales is None else scales[0],
        max_bad,
    )


def average_recipe(files: Sequence[Path], weights: str | None) -> AverageRecipe:
    """The checkpoints after the first, and the weights of all, as a recipe.

    Args:
        files: all checkpoints.
        weights: comma-separated, as typed.

    Returns:
        The recipe.

    Raises:
        ConfigError: if a number cannot be read, or the weights do not fit the files.
    """
    return AverageRecipe(tuple(map(str, files[1:])), _numbers(weights, "weights") or ())


def samples_of(text: str | None) -> int | str | None:
    """A number of examples, or a word that the recipe knows.

    Args:
        text: as typed.

    Returns:
        The number, or the text.
    """
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def weight_of(text: str) -> str | float:
    """An example weight: a number, or a word that the recipe knows.

    Args:
        text: as typed.

    Returns:
        The number, or the text.
    """
    try:
        return float(text)
    except ValueError:
        return text
