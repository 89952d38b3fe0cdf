"""`fix --recipe`: the options in an output's history, read back as the plan they came from."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core.errors import CheckpointError, ConfigError, plain
from bnfix.core.settings import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.data.callables import is_callable
from bnfix.jobs.plan import Plan
from bnfix.models.build import from_file_allowed

_Recipe = TypeVar("_Recipe")


def replayed_plan(
    path: str | Path, *, run: RunOptions, command_line: str = "", test: str | None = None
) -> Plan:
    """Read the plan of the last `fix` or `calibrate` in a file's history."""
    where = Path(path)
    header = read_checkpoint(where).metadata or {}
    history = header.get("history")
    entries = [
        entry
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and entry.get("command") in ("fix", "calibrate")
    ]
    if not entries:
        raise CheckpointError(
            f"{plain(where)}: has no fix or calibrate in its history to replay. Give a file that "
            "bnfix has written.",
            path=where,
        )
    try:
        found = entries[-1].get("options")
        options: dict[str, Any] = found if isinstance(found, dict) else {}
        # Code that a file names is never run.
        asked = options.get("model")
        asked = {**asked, "forward": None} if isinstance(asked, dict) else asked
        model = _recipe(ModelRecipe, {"model": asked}, "model")
        # A model that the file names is built only where a file's word is enough for that.
        if model.model is not None and not from_file_allowed(model.model):
            model = dataclasses.replace(model, model=None, arguments=())
        none = options.get("finetune") is None
        return Plan(
            command_line=command_line,
            model=model,
            source=_source(options, test),
            swap=_recipe(SwapRecipe, options, "swap"),
            statistics=_recipe(StatisticsRecipe, options, "statistics"),
            weight=_recipe(WeightRecipe, options, "example_weight"),
            finetune=None if none else _recipe(FinetuneRecipe, options, "finetune"),
            gate=_recipe(GateRecipe, options, "gate"),
            run=dataclasses.replace(run, precision=options.get("precision", run.precision)),
        )
    except ConfigError as error:
        raise CheckpointError(
            f"{plain(where)}: the options in its history cannot be used: {plain(error)}", path=where
        ) from error


def _source(options: Mapping[str, Any], test: str | None) -> DataRecipe:
    """Where the images come from; a callable that the file names for them is not imported."""
    source = _recipe(DataRecipe, options, "data")
    if test is None and source.test is not None and is_callable(source.test):
        raise ConfigError(
            f"its test data are code, {plain(source.test)}, which is not run because a file says "
            "so. Name it by --test."
        )
    return source if test is None else dataclasses.replace(source, test=test)


def _recipe(kind: type[_Recipe], options: Mapping[str, Any], name: str) -> _Recipe:
    """One recipe from JSON values, each of its declared type."""
    values = options.get(name)
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict) or not set(values) <= set(hints):
        raise ConfigError(f"{name}: not an object of the options that this version knows.")
    found = {key: _hashable(value) for key, value in values.items()}
    wrong = [key for key, value in found.items() if not _fits(value, hints[key])]
    if wrong:
        raise ConfigError(f"{name}: {', '.join(wrong)}: of the wrong type.")
    return kind(**found)


def _hashable(value: Any) -> Any:
    """Lists, which JSON has, as the tuples that recipes hold."""
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint
