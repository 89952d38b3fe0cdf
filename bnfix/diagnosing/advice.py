"""Advice with this call's own words: its command, run as printed, meets the same inputs."""

from __future__ import annotations

import dataclasses
import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bnfix.recipe import DataRecipe, ModelRecipe, RunOptions

#: A command in an advice runs from this word to the advice's end.
_START: Final = "bnfix "
#: Options that a command lacks.
_LACKS: Final = {"finetune": {"--labels"}}


@dataclass(frozen=True)
class Call:
    """An inspection as it was asked for, with what is known of the model and the labels."""

    path: Path
    model: ModelRecipe
    data: str | None
    source: DataRecipe
    run: RunOptions
    seed: int
    samples: tuple[str, ...]
    knows_model: bool
    labelled: bool

    def fill(self, advice: str) -> str:
        """Put file, model, data and all options that were given into an advice's command."""
        words, _, rest = advice.partition(_START)
        given = rest.split()
        if "CKPT" not in given:
            return advice
        # Fine-tuning needs labels, so data without them are not what it is to run on.
        name, data = given[0], self.data
        if name == "finetune" and not self.labelled:
            words, data = f"{words}with labelled data: ", None
        own = {word for word in given if word.startswith("--")} | _LACKS.get(name, set())
        samples = self.samples if name == "inspect" else ()
        seed = ("--seed", str(self.seed)) if self.seed else ()
        path = f"./{self.path}" if str(self.path).startswith("-") else str(self.path)
        filled: list[str] = []
        for word in given:
            if word == "SPEC":
                asked = self.model.model is None and not self.knows_model
                filled += ["--model", "SPEC"] if asked else []
                filled += options_of(self.model)
            elif word == "DATA":
                filled += ["--data", data or "DATA"]
                filled += options_of(self.source, own) + options_of(self.run, own)
                filled += [*samples, *seed]
            elif word not in ("--model", "--data"):
                filled.append(
                    {"CKPT": path, "OUT": f"{self.path.stem}.{name}d.safetensors"}.get(word, word)
                )
        return f"{words}{_START}{shlex.join(filled)}"


def options_of(recipe: Any, without: set[str] = frozenset()) -> list[str]:  # type: ignore[assignment]
    """The fields of a recipe that are not at their defaults, as words of a command line."""
    words: list[str] = []
    for field in dataclasses.fields(recipe):
        value, flag = getattr(recipe, field.name), "--" + field.name.replace("_", "-")
        if field.name == "arguments":
            for name, argument in value:
                words += ["--model-arg", f"{name}={json.dumps(argument)}"]
        elif value == field.default or value is None or value is False or flag in without:
            continue
        elif value is True:
            words.append(flag)
        elif isinstance(value, tuple) and all(isinstance(item, str) for item in value):
            words += [word for item in value for word in (flag, item)]
        else:
            items = value if isinstance(value, tuple) else (value,)
            words += [flag, ",".join(map(str, items))]
    return words
