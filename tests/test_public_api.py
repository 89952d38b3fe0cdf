"""The public names, and that the command line says nothing that the recipes do not say."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

import bnfix
from bnfix.cli import app
from bnfix.core.settings import (
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
from bnfix.jobs.export import ExportRecipe
from bnfix.jobs.session import TRIED

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

#: For each command, the recipes that its options are the fields of; the first that has one counts.
RECIPES: dict[str, list[Any]] = {
    "fix": [
        StatisticsRecipe(), WeightRecipe(), GateRecipe(), TRIED, SwapRecipe(), DataRecipe(),
        ModelRecipe(),
    ],
    "calibrate": [
        StatisticsRecipe(), WeightRecipe(), GateRecipe(), SwapRecipe(), DataRecipe(), ModelRecipe(),
    ],
    "finetune": [
        FinetuneRecipe(), GateRecipe(), SwapRecipe(), DataRecipe(), ModelRecipe(),
    ],
    "convert": [SwapRecipe(), GateRecipe(), DataRecipe(), ModelRecipe()],
    "eval": [EvaluationRecipe(), GateRecipe(), DataRecipe(), ModelRecipe()],
    "export": [ExportRecipe(), GateRecipe(), DataRecipe(), ModelRecipe()],
    "inspect": [GateRecipe(), DataRecipe(), ModelRecipe()],
    "demo": [GateRecipe()],
}  # fmt: skip
#: Where another recipe than the first counts.
OTHERS: dict[tuple[str, str], Any] = {
    ("fix", "epochs"): TRIED, ("fix", "lr"): TRIED, ("finetune", "ghost_size"): SwapRecipe(),
    ("finetune", "include_frozen"): StatisticsRecipe(),
    ("finetune", "reference"): StatisticsRecipe(),
    ("finetune", "reference_model"): StatisticsRecipe(),
}  # fmt: skip
RUN = ("device", "precision", "batch_size", "workers")
#: Options whose text is put together from several fields, or which are no field of a recipe.
OWN_WORDS = {"samples", "train", "model_arg", "input_shape", "data", "report", "checkpoints"}


def options() -> list[tuple[str, Any]]:
    return [
        (command, parameter) for command, found in COMMANDS.items() for parameter in found.params
    ]


def ids(value: Any) -> str:
    return value if isinstance(value, str) else value.name


def test_all_is_the_public_names_sorted():
    assert bnfix.__all__ == sorted(bnfix.__all__)
    assert len(bnfix.__all__) == len(set(bnfix.__all__)) <= 32
    public = {
        name
        for name, value in vars(bnfix).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    # A function that is named like a room hides it; what counts is that the name is there.
    assert public == set(bnfix.__all__) - {"__version__"}
    for name in bnfix.__all__:
        assert getattr(bnfix, name).__doc__ or name == "__version__"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_an_example_imports_only_public_names(path: Path) -> None:
    text = path.read_text()
    imported = re.findall(r"^(?:from|import) (bnfix[\w.]*)", text, re.MULTILINE)
    assert set(imported) <= {"bnfix", "bnfix.demo.network"}
    for names in re.findall(r"^from bnfix import (.*)", text, re.MULTILINE):
        assert set(names.split(", ")) <= {"demo", "settings", *bnfix.__all__}


def test_every_recipe_of_a_plan_is_a_public_setting() -> None:
    for field in dataclasses.fields(bnfix.Plan):
        recipe = getattr(bnfix.Plan(), field.name)
        if dataclasses.is_dataclass(recipe):
            assert getattr(bnfix.settings, type(recipe).__name__) is type(recipe)


def test_what_the_contract_names_is_there():
    for name in (
        "GeneralizedBatchNorm", "set_example_weight_", "swap_norms_", "recalibrate_",
        "choose_example_weight_", "finetune_", "evaluate", "compare", "save", "load", "fix",
        "Metrics",
    ):  # fmt: skip
        assert name in bnfix.__all__
    layer = inspect.signature(bnfix.GeneralizedBatchNorm).parameters
    assert [(n, layer[n].default) for n in list(layer)[:5]] == [
        ("num_features", inspect.Parameter.empty),
        ("eps", 1e-5),
        ("momentum", 0.1),
        ("affine", True),
        ("track_running_stats", True),
    ]
    for name, default in (("channel_groups", None), ("ghost_size", None), ("example_weight", 0.0)):
        assert layer[name].kind is inspect.Parameter.KEYWORD_ONLY
        assert layer[name].default == default


def test_every_command_of_this_version_is_there():
    assert set(COMMANDS) >= {"demo", "inspect", "convert", "calibrate", "finetune", "eval", "fix"}


@pytest.mark.parametrize(("command", "option"), options(), ids=ids)
def test_an_option_has_help_and_the_default_of_its_recipe(command, option):
    if option.name == "help" or command not in RECIPES:
        return
    assert getattr(option, "help", None) or option.param_type_name == "argument"
    default = None if option.default in ((), []) or callable(option.default) else option.default
    recipes = [RunOptions()] if option.name in RUN and command != "finetune" else []
    if (command, option.name) in OTHERS:
        recipes = [OTHERS[command, option.name]]
    for recipe in [*recipes, *RECIPES[command], RunOptions()]:
        field = type(recipe).__dataclass_fields__.get(option.name)
        if field is None:
            continue
        expected = getattr(recipe, option.name)
        if not option.required:
            assert default == (None if expected == () else expected)
        if option.name not in OWN_WORDS and "help" in field.metadata:
            assert option.help.split(" [")[0] == field.metadata["help"]
        elif "help" not in field.metadata:
            assert option.help == Preprocessing.__dataclass_fields__[option.name].metadata["help"]
        return
    assert option.name in {
        "checkpoint", "checkpoints", "data", "output", "report", "force", "show_plan", "as_json",
        "debug", "quiet", "model_arg", "input_shape", "recipe", "against", "save_moments",
            *OWN_WORDS, *EXTRA,
    }  # fmt: skip


#: Options that are no field of a recipe and belong to one command.
EXTRA = {"predictions", "state"}


@pytest.mark.parametrize("command", ["fix", "calibrate", "finetune", "convert", "eval"])
def test_options_that_apply_are_everywhere(command):
    flags = {flag for parameter in COMMANDS[command].params for flag in parameter.opts}
    wanted = {"--model", "--model-arg", "--key", "--prefix", "--device", "--json", "--quiet"}
    wanted |= {"--force", "--plan"}
    if command != "convert":
        wanted |= {"--data", "--precision", "--batch-size", "--workers", "--seed", "--class-map"}
        wanted |= {"--preset", "--resize", "--crop", "--interpolation", "--mean", "--std"}
        wanted |= {"--scale"}
    assert wanted <= flags


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_ends_with_an_example_that_names_it(command):
    text = COMMANDS[command].help
    assert f"Example: bnfix {command}" in text


def test_recipes_are_frozen():
    for recipe in (
        DataRecipe(), FinetuneRecipe(), GateRecipe(), ModelRecipe(), Preprocessing(), RunOptions(),
        StatisticsRecipe(), SwapRecipe(), WeightRecipe(),
    ):  # fmt: skip
        name = dataclasses.fields(recipe)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError, match=name):
            setattr(recipe, name, None)


@pytest.mark.parametrize("name", [n for n in bnfix.__all__ if not n.startswith("_")])
def test_public_docstrings_name_every_argument_result_and_error(name: str) -> None:
    thing = getattr(bnfix, name)
    text = inspect.getdoc(thing) or ""
    for argument in inspect.signature(thing).parameters if not _is_error(thing) else ():
        assert re.search(rf"^ +\*{{0,2}}{argument}: \S", text, re.MULTILINE), argument
    if inspect.isfunction(thing):
        gives = inspect.signature(thing).return_annotation not in (None, "None")
        assert ("Returns:" in text) == gives
        raised = re.findall(r"^\s+raise ([A-Z]\w+)\(", inspect.getsource(thing), re.MULTILINE)
        assert all(f"{error}:" in text for error in raised)


def _is_error(thing: object) -> bool:
    return isinstance(thing, type) and issubclass(thing, Exception)
