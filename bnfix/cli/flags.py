"""Command-line options made from recipe fields, and parsers of their values."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Collection, Hashable, Iterator
from contextlib import suppress
from contextvars import ContextVar
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, get_type_hints

import typer
from typer.core import TyperGroup

from bnfix.checkpoints.several import matching
from bnfix.cli.terminal import Terminal, stated
from bnfix.core.errors import ConfigError, some
from bnfix.core.options import option
from bnfix.core.settings import (
    TRAINED,
    AverageRecipe,
    DataRecipe,
    EvaluationRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    Preprocessing,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)

_TYPED: Final[ContextVar[tuple[str, ...]]] = ContextVar("typed", default=())


def command_line() -> str:
    """The command line as typed, quoted for a shell."""
    return shlex.join(["bnfix", *_TYPED.get()])


class OneLineGroup(TyperGroup):
    """The commands; wrong usage gives one line and exit code 2."""

    def main(self, *positional: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command line, by default this process's."""
        typed = positional[0] if positional else options.get("args")
        _TYPED.set(tuple(sys.argv[1:] if typed is None else typed))
        if "_BNFIX_COMPLETE" in os.environ:
            # At 80 columns a help text folds into several lines, and fish takes them for words.
            os.environ["COLUMNS"] = "1000"
        main: Any = super().main
        run = partial(main, *positional, standalone_mode=False, **options)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.Abort:
            typer.echo("bnfix: interrupted.", err=True)
            sys.exit(130)
        except typer.TyperException as error:
            # A bare `bnfix` has already shown its help, and has no message.
            if words := _words(error):
                typer.echo(f"bnfix: {words}", err=True)
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _words(error: typer.TyperException) -> str:
    """The parser's message as one sentence, a likely correction, and a pointer to the help."""
    context = getattr(error, "ctx", None)
    possible = list(getattr(error, "possibilities", None) or ())
    # Some of the parser's messages end with a full stop, some do not.
    formatted = getattr(error, "format_message", lambda: error)
    text = str(getattr(error, "message", "") if possible else formatted())
    text = " ".join(text.split()).removesuffix(".")
    if not text and not possible:
        return ""
    found: list[Any] = getattr(error.__cause__, "errors", list)()
    if found:  # pydantic's message hides the value
        kind = "whole number" if found[0]["type"].startswith("int") else "number"
        text = f"{text.partition(': ')[0]}: {found[0]['input']!r}, expected a {kind}"
    meant = f"Did you mean {' or '.join(possible)}?" if possible else ""
    typed = [word for word in _TYPED.get()[:1] if not word.startswith("-")]
    path = " ".join(["bnfix", *typed]) if context is None else context.command_path
    end = "" if text.endswith("?") else "."
    return " ".join(part for part in (f"{text}{end}", meant, f"See {path} --help.") if part)


MODEL, DATA, RUN = "Model and file", "Data and preprocessing", "How to run"
NORM, TRAIN, ALSO, OUT = "Normalization", "Training", "Further measurements", "Output"
TO_TRAIN = ("none", *TRAINED)

_FLAGS = {
    "arguments": ("--model-arg",),
    "as_json": ("--json",),
    "logits_output": ("--output", "--logits-output"),
    "quiet": ("--quiet", "-q"),
    "refit": ("--refit/--no-refit",),
    "show_plan": ("--plan",),
}
_METAVARS = {
    "arguments": "KEY=VALUE", "class_map": "FILE", "class_prior": "FILE|em",
    "corrupt": "KIND:SEVERITY", "metric": "SPEC", "estimate_from": "DATA",
    "groups": "SPEC", "input_shape": "C,H,W", "logits_output": "NAME|INDEX", "loss": "NAME|SPEC",
    "domain": "NAME", "reference": "CKPT", "reference_model": "SPEC", "select": "PART|DATA",
    "tiles": "N|HxW",
}  # fmt: skip


#: Parameters that can be given together with `--recipe`.
_BESIDE_A_RECIPE = {
    "checkpoint", "data", "output", "recipe", "test", "device", "workers", "force", "show_plan",
    "as_json", "quiet", "debug", "model", "arguments", "key", "prefix", "prefer_ema", "unfreeze",
    "forward", "logits_output", "domain", "reference", "reference_model", "like_input",
}  # fmt: skip


@dataclass(frozen=True)
class Out:
    """The options for a command's output."""

    as_json: bool = option(False, "The result as one JSON object on standard output.")
    quiet: bool = option(False, "Only the verdict.")
    debug: bool = option(False, "Show the traceback of an error.")
    force: bool = option(False, "Replace existing outputs.")
    show_plan: bool = option(False, "Print the plan and do nothing.")

    def terminal(self) -> Terminal:
        """Where the command prints."""
        return Terminal(self.as_json, self.quiet)


# --- texts to values ---


def numbers(text: str, flag: str, *, single: bool = False) -> tuple[float, ...]:
    """Comma-separated numbers; a fraction such as 1/255 is one."""
    with suppress(ValueError, ZeroDivisionError):
        found = tuple(_fraction(part) for part in text.replace(" ", ",").split(",") if part)
        if len(found) == 1 or (found and not single):
            return found
    expected = "one number" if single else "a number, or several with commas between"
    raise ConfigError(f"{flag}: {text!r}, expected {expected}.", name=flag[2:])


def _fraction(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def sizes(text: str, flag: str) -> tuple[int, ...]:
    """One or more sizes, such as 224 or 224x320."""
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError as error:
        raise ConfigError(
            f"{flag}: {text!r}, expected one size or HEIGHTxWIDTH, such as 224 or 224x320.",
            name=flag[2:],
        ) from error


def _or_word(kind: type[int] | type[float], text: str, _: str) -> int | float | str:
    try:
        return kind(text)
    except ValueError:
        return text  # the recipe checks the words


def _arguments(pairs: list[str], flag: str) -> tuple[tuple[str, Any], ...]:
    found = []
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name:
            raise ConfigError(f"{flag}: {pair!r}, expected KEY=VALUE.", name="model_arg")
        try:
            found.append((name, json.loads(value)))
        except ValueError:
            found.append((name, value))  # a bare word is a string
    return tuple(found)


#: Annotation and parser of fields without a Typer type, by type or name.
_READ: dict[Any, tuple[Any, Callable[[Any, str], Any]]] = {
    tuple[int, ...] | None: (str | None, sizes),
    tuple[float, ...] | None: (str | None, numbers),
    tuple[float, ...]: (str | None, numbers),
    tuple[str, ...]: (list[str] | None, lambda texts, _: tuple(texts)),
    tuple[tuple[str, Any], ...]: (list[str] | None, _arguments),
    int | str | None: (str | None, functools.partial(_or_word, int)),
    str | float: (str, functools.partial(_or_word, float)),
    float | str | None: (str | None, functools.partial(_or_word, float)),
    "scale": (str | None, lambda text, flag: numbers(text, flag, single=True)[0]),
}


# --- fields to options ---


def averaged(files: list[Path], weights: str | None, **how: Any) -> tuple[Path, AverageRecipe]:
    """The first checkpoint, and the recipe of the average; patterns are expanded to files."""
    first, *others = matching(list(map(str, files)))
    parts = () if weights is None else numbers(weights, "--weights")
    return Path(first), AverageRecipe(files=tuple(others), weights=parts, **how)


def option_of(recipe: type, name: str, panel: str) -> Any:
    """The option of a recipe's field, for ``Annotated``; its help comes from the recipe."""
    fields: Any = recipe.__dataclass_fields__  # type: ignore[attr-defined]
    owner = recipe if fields[name].metadata else Preprocessing
    own = owner.__dataclass_fields__[name].metadata  # type: ignore[attr-defined]
    metavar = _METAVARS.get(name)
    if str(fields[name].type) in ("int | str | None", "float | str | None"):
        metavar = "N|auto"
    return about(own["help"], panel, metavar, *_flags(name), words=partial(_words_of, owner, name))


def _words_of(recipe: type, name: str) -> Collection[str]:
    """The words that a field accepts, read from its refusal of a wrong one; none for free text."""
    try:
        recipe(**{name: "?"})
    except (TypeError, ValueError) as error:  # the check of a number raises TypeError
        return getattr(error, "choices", ())
    return ()


def about(
    help: str,
    panel: str,
    metavar: str | None = None,
    *flags: str,
    words: Callable[[], Collection[str]] = tuple,
) -> Any:
    """An option that is not a recipe's field, for ``Annotated``; a shell completes its words."""

    def complete(incomplete: str) -> list[str]:
        return [word for word in words() if word.startswith(incomplete)]

    return typer.Option(
        *flags, help=help, rich_help_panel=panel, metavar=metavar, autocompletion=complete
    )


def written(help: str, metavar: str = "OUT") -> Any:
    """The option for the file or folder that a command writes."""
    return about(help, OUT, metavar, "-o", "--out")


def _flags(name: str) -> tuple[str, ...]:
    return _FLAGS.get(name, ("--" + name.replace("_", "-"),))


@dataclass(frozen=True)
class _Group:
    """A command's parameter that is a recipe, made from one option per field."""

    base: Any  # the recipe of the defaults
    parts: dict[str, Any]  # panel: names of fields; in a plan, name of a recipe: its type

    def options(self) -> Iterator[inspect.Parameter]:
        """The options of the fields."""
        for part, own in self.parts.items():
            if not isinstance(own, str):
                yield from self._inner(part).options()
                continue
            for name in own.split():
                annotation, reader = self._typed(name)
                default = getattr(self.base, name)
                yield inspect.Parameter(
                    name,
                    inspect.Parameter.KEYWORD_ONLY,
                    default=default if reader is None or isinstance(default, str | float) else None,
                    annotation=Annotated[annotation, option_of(type(self.base), name, part)],
                )

    def take(self, values: dict[str, Any]) -> Any:
        """Remove its options from the command's and make the recipe; ``None`` means the default."""
        taken = {}
        for part, own in self.parts.items():
            if not isinstance(own, str):
                taken[part] = self._inner(part).take(values)
                continue
            for name in own.split():
                value, reader = values.pop(name), self._typed(name)[1]
                if value is not None:  # None: not typed, and the help shows no default
                    taken[name] = value if reader is None else reader(value, _flags(name)[0])
        return dataclasses.replace(self.base, **taken)

    def _inner(self, part: str) -> _Group:
        return _Group(getattr(self.base, part), self.parts[part].__metadata__[0])

    def _typed(self, name: str) -> tuple[Any, Callable[[Any, str], Any] | None]:
        hint = _hints(self.base.__class__)[name]
        return _READ.get(name) or _READ.get(hint) or (hint, None)


@functools.cache  # each call evaluates all annotations of a class
def _hints(kind: Hashable) -> dict[str, Any]:
    return get_type_hints(kind)


def flattened(
    command: Callable[..., None], called: str, *, many: bool = False
) -> Callable[..., None]:
    """A command for Typer: one option per field of its recipes, and errors as one line.

    A parameter ``name: Annotated[Recipe, {panel: "field field"}] = Recipe(...)`` is such a recipe.
    With ``many`` the command can run in several processes, started by torchrun.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, _Group] = {}
    flat: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command).parameters.items():
        hint = hints[name]
        parts = getattr(hint, "__metadata__", (None,))[0]
        if not isinstance(parts, dict):
            flat.append(parameter.replace(kind=parameter.KEYWORD_ONLY, annotation=hint))
            continue
        bare = parameter.default is parameter.empty
        groups[name] = _Group(hint.__origin__() if bare else parameter.default, parts)
        flat += groups[name].options()

    @functools.wraps(command)
    def run(**values: Any) -> None:
        with stated(called, many=many, debug=values["debug"]):
            _refuse_empty()
            for name, group in groups.items():
                values[name] = group.take(values)
            command(**values)

    wrapped: Any = run
    wrapped.__signature__ = inspect.Signature(flat)
    wrapped.__annotations__ = {parameter.name: parameter.annotation for parameter in flat}
    return run


def _refuse_empty() -> None:
    """Refuse an empty value: as a path, it would name the current folder."""
    for before, word in pairwise(_TYPED.get()):
        flag, equals, value = word.partition("=")
        where = flag or (before if before.startswith("-") else "CKPT")
        # An empty prefix says that no prefix is stripped.
        if where != "--prefix" and not value and (not word or (equals and flag[:1] == "-")):
            raise ConfigError(f"{where}: the value is empty. Give one, or leave it out.")


def check_beside_recipe(context: typer.Context) -> None:
    """Refuse typed options that a recipe replays."""
    typed = [
        option.opts[0]
        for option in context.command.params
        if option.name not in _BESIDE_A_RECIPE
        and getattr(context.get_parameter_source(option.name or ""), "name", "") == "COMMANDLINE"
    ]
    if typed:
        raise ConfigError(
            f"--recipe: replays all options of that file, so {some(sorted(typed))} cannot be "
            "given. Leave one of them out."
        )


# --- options of several commands ---

_REFERENCE = "reference reference_model"
_INPUT = "preset resize crop interpolation mean std scale bgr max_bad corrupt"

Checkpoint = Annotated[Path, typer.Argument(metavar="CKPT", help="The checkpoint.")]
_COMPARED = "One or more checkpoints or ONNX files."
Compared = Annotated[list[Path], typer.Argument(metavar="CKPT...", help=_COMPARED)]
Averaged = Annotated[
    list[Path], typer.Argument(metavar="CKPT CKPT...", help="Two or more checkpoints, or patterns.")
]
_DATA_IS = (
    "Class folders, a folder with labels.csv, one with images/ and masks/, a flat folder, an .npz, "
    ".pt or .safetensors file, coco:ROOT#val2017, .tar shards, parquet or a Hugging Face folder, "
    "cifar10:ROOT#test and similar names, or file.py:callable."
)
_REPEATED = (
    "Repeatable: all are combined. calibrate with --reference also takes none: bnfix then predicts "
    "new statistics from the weights and the original's statistics, and judges nothing."
)
Data = Annotated[str, about(_DATA_IS, DATA, "DATA")]
Several = Annotated[list[str], about(f"{_DATA_IS} {_REPEATED}", DATA, "DATA")]
Output = Annotated[Path, written("The .safetensors file to write, or a hub folder if CKPT is one.")]
State = Annotated[
    str | None,
    about("Folder for the run's state; the same command resumes an interrupted run.", RUN, "DIR"),
]
_FOUND = "model arguments key prefix prefer_ema unfreeze forward logits_output domain"
Model = Annotated[ModelRecipe, {MODEL: _FOUND}]
Opened = Annotated[ModelRecipe, {MODEL: f"{_FOUND} trust_code"}]
Continued = Annotated[ModelRecipe, {MODEL: _FOUND, OUT: "like_input"}]
Inputs = Annotated[DataRecipe, {DATA: _INPUT}]
_TASK = "task loss ignore_index"
Grouped = Annotated[DataRecipe, {DATA: f"class_map labels {_INPUT} groups", TRAIN: _TASK}]
Tested = Annotated[DataRecipe, {DATA: f"class_map labels {_INPUT} groups test", TRAIN: _TASK}]
Swapped = Annotated[
    SwapRecipe,
    {NORM: "to ghost_size channel_groups layers skip example_weight batch_weight batch_estimator"},
]
Layers = Annotated[SwapRecipe, {NORM: "layers skip"}]
Statistics = Annotated[
    StatisticsRecipe,
    {
        NORM: "statistics prior robust mix train_batch_size feed samples tolerance include_frozen "
        "weight_noise draws",
        MODEL: _REFERENCE,
    },
]
Referred = Annotated[StatisticsRecipe, {NORM: "include_frozen", MODEL: _REFERENCE}]
Feed = Annotated[StatisticsRecipe, {NORM: "feed samples tolerance include_frozen"}]
Weight = Annotated[
    WeightRecipe,
    {NORM: "example_weight batch_weight batch_estimator assume_iid granularity pointwise thin"},
]
Tuned = Annotated[
    FinetuneRecipe,
    {
        TRAIN: "train statistics example_weight epochs steps optimizer lr weight_decay norm_decay "
        "norm_decay_target label_smoothing clip accumulate ema augment batch_size "
        "batch_statistics ghost_noise consistency sharpness"
    },
]
Gate = Annotated[GateRecipe, {NORM: "z select", RUN: "seed"}]
Chosen = Annotated[GateRecipe, {NORM: "temperature class_prior z select", RUN: "seed"}]
Seed = Annotated[GateRecipe, {RUN: "seed"}]
Run = Annotated[RunOptions, {RUN: "device workers precision batch_size"}]
Measured = Annotated[
    EvaluationRecipe,
    {
        ALSO: "corruptions compare_batch_sizes streams tiles metric coverage estimate_from",
        RUN: "fast",
    },
]
Writes = Annotated[Out, {OUT: "as_json quiet debug force show_plan"}]
