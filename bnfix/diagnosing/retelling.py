"""A file's history as the commands that made it, and what each of them did."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bnfix.errors import plain
from bnfix.recipe import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)

#: Where in an entry's options a recipe's fields stand.
_RECIPES: Final[tuple[tuple[str, type], ...]] = (
    ("model", ModelRecipe),
    ("data", DataRecipe),
    ("swap", SwapRecipe),
    ("statistics", StatisticsRecipe),
    ("example_weight", WeightRecipe),
    ("finetune", FinetuneRecipe),
    ("gate", GateRecipe),
)
_PARTS: Final = {
    "convert": {"model", "swap", "data"},
    "calibrate": {"model", "data", "swap", "statistics", "example_weight", "gate"},
    "fix": {"model", "data", "swap", "statistics", "example_weight", "finetune", "gate"},
    "finetune": {"model", "data", "swap", "finetune"},
    "average": {"model", "data", "swap", "statistics"},
}
#: What a command sets by itself, whatever was typed.
_IMPLIED: Final = {
    "fix": {"train": "norms+head"},
    "average": {"statistics": "population"},
}
_KIND: Final = {"to", "channel_groups", "ghost_size", "example_weight"}
#: Fields that no option of the command line sets, or that are told in another way: of a part of an
#: entry's options, or of one command.
_UNTOLD: Final = {
    "any model": {"arguments"},
    "any statistics": {"batch_size"},
    "any example_weight": {"epochs", "batch_size", "lr", "start"},
    "any finetune": {"weight_lr", "warmup", "ghost_size"},
    "any gate": {"fit", "select", "seed"},
    "convert": {"labels", "test", "class_map"},
    "calibrate swap": _KIND,
    "fix swap": _KIND,
    "average swap": _KIND,
    "finetune swap": {"example_weight"},
    "finetune data": {"labels"},
    "average": {"statistics", "train_batch_size"},
}
_TUNED_BY_FIX: Final = {"train", "epochs", "lr"}


@dataclass(frozen=True)
class Told:
    """One entry of a history, told again.

    Args:
        command: as it could be typed, quoted for a shell.
        did: what it did, in words.
    """

    command: str
    did: str


def retell(history: Sequence[Any], name: str = "OUT.safetensors") -> list[Told]:
    """Tell a history as commands; it comes from a file, so that nothing in it is trusted.

    Args:
        history: of a header.
        name: of the file that has it, for the last command's output.

    Returns:
        One item an entry, in order; parts of the wrong type are passed over.
    """
    told = []
    for number, entry in enumerate(history, 1):
        if isinstance(entry, dict):
            output = name if number == len(history) else f"step{number}.safetensors"
            told.append(Told(_command(entry, output), _did(entry)))
    return told


def _command(entry: Mapping[str, Any], output: str) -> str:
    command = plain(entry.get("command") or "?")
    source: Any = entry.get("input")
    file = source.get("file") if isinstance(source, dict) else None
    words = ["bnfix", command, plain(file) if isinstance(file, str) else "CKPT"]
    options: Any = entry.get("options")
    options = options if isinstance(options, dict) else {}
    average: Any = options.get("average")
    if isinstance(average, list):
        items = [item for item in average if isinstance(item, dict)]
        words += [plain(item.get("file")) for item in items[1:]]
        words += ["--weights", ",".join(_text(item.get("weight")) for item in items)]
    words += _flags(command, options)
    data: Any = entry.get("data")
    if isinstance(data, dict) and isinstance(data.get("spec"), str):
        words += ["--data", plain(data["spec"])]
    if options.get("finetune", 0) is None and command == "fix":
        words += ["--train", "none"]
    if options.get("precision") not in (None, "fp32"):
        words += ["--precision", plain(options["precision"])]
    if type(options.get("samples")) is int:
        words += ["--samples", str(options["samples"])]
    if entry.get("seed"):
        words += ["--seed", plain(entry["seed"])]
    return shlex.join([*words, "-o", output])


def _flags(command: str, options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    implied = _IMPLIED.get(command, {})
    for part, recipe in _RECIPES:
        values = options.get(part)
        if part not in _PARTS.get(command, set()) or not isinstance(values, dict):
            continue
        arguments = values.get("arguments") if part == "model" else ()
        for pair in arguments if isinstance(arguments, list | tuple) else ():
            if isinstance(pair, list | tuple) and len(pair) == 2:
                words += ["--model-arg", f"{plain(pair[0])}={_text(pair[1])}"]
        keys = (f"any {part}", command, f"{command} {part}")
        untold = {name for key in keys for name in _UNTOLD.get(key, ())}
        for name, known in recipe.__dataclass_fields__.items():  # type: ignore[attr-defined]
            value = values.get(name, known.default)
            usual = _same(value, known.default) or value == implied.get(name, object())
            fixed = command == "fix" and part == "finetune" and name not in _TUNED_BY_FIX
            if name not in untold and not fixed and not usual and value is not None:
                words += _flag(name, value)
    return words


def _flag(name: str, value: Any) -> list[str]:
    flag = "--" + name.replace("_", "-")
    if value is True:
        return [flag]
    if value is False:
        return []
    if name in ("layers", "skip") and isinstance(value, list | tuple):
        return [word for item in value for word in (flag, plain(item))]
    if name in ("resize", "crop") and isinstance(value, list | tuple):
        return [flag, "x".join(map(plain, value))]
    if isinstance(value, list | tuple):
        return [flag, ",".join(map(_text, value))]
    return [flag, _text(value)]


def _same(value: Any, default: Any) -> bool:
    listed = tuple(value) if isinstance(value, list) else value
    return bool(listed == default)


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else plain(value)


def _did(entry: Mapping[str, Any]) -> str:
    """What an entry's results say, in words."""
    results: Any = entry.get("results")
    results = results if isinstance(results, dict) else {}
    said = []
    if isinstance(results.get("output"), str):
        said.append(f"output: {plain(results['output'])}")
    if type(results.get("n_layers")) is int:
        said.append(f"{results['n_layers']} layers swapped")
    for name, words in (
        ("difference", "largest output difference {:.2g}"),
        ("top1", "top-1 {:.4f} on its test split"),
        ("nll", "NLL {:.4f}"),
    ):
        if type(results.get(name)) is float:
            said.append(words.format(results[name]))
    data: Any = entry.get("data")
    if isinstance(data, dict) and type(data.get("n_examples")) is int:
        said.append(f"{data['n_examples']} examples")
    return ", ".join(said) or "nothing is stated"
