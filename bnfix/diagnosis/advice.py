"""Findings, the advice against each, and commands to copy: advised ones and a history's."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bnfix.core.errors import plain
from bnfix.core.settings import DataRecipe, ModelRecipe, RunOptions

# Advice ends with a command; CKPT, SPEC, DATA and OUT are filled in where they are known.
RECALIBRATE = (
    "bnfix calibrate CKPT --model SPEC --data DATA --statistics population --example-weight keep "
    "-o OUT"
)
BLEND = (
    "without labels the middle way (where weights were changed: --statistics population): bnfix "
    "calibrate CKPT --model SPEC --data DATA --statistics blend --example-weight keep -o OUT"
)
GATED = "let labelled data decide: bnfix calibrate CKPT --model SPEC --data DATA -o OUT"
_INSPECT = "bnfix inspect CKPT --model SPEC --data DATA"
_COMPARE = "to see whether they are: bnfix inspect CKPT --against ORIGINAL"
_REPAIR = (
    "repair it against the original: bnfix calibrate CKPT --model SPEC --reference ORIGINAL "
    "--data DATA -o OUT"
)
_REPLACE = "take another checkpoint"
_CHOOSE = "let new images choose: bnfix fix CKPT --model SPEC --data DATA --select OTHER -o OUT"
_MEASURE = (
    "measure it: if it is as accurate as it should be, the statistics belong to the weights, so "
    f"keep them; else {GATED}"
)
_ALONE = "to see how much: bnfix eval CKPT --model SPEC --data DATA --compare-batch-sizes"
_TUNE = "bnfix finetune CKPT --model SPEC --data DATA --train norms -o OUT"
_TRACK = (
    "in Python: build it with track_running_stats=True, load_state_dict(..., strict=False), "
    "bnfix.recalibrate_, bnfix.save"
)

#: Severity, advice and the faults that have them; with an error the outputs cannot be right.
#: Every other fault is a warning with the advice to recalibrate.
_GROUPS: Final = (
    ("error", RECALIBRATE, "not-finite negative-variance momentum-out-of-range output-not-finite"),
    ("error", _REPLACE, "gamma-not-finite beta-not-finite moment-missing odd-statistics"),
    ("error", f"fetch the file again, or {_REPLACE}", "length-mismatch"),
    ("warning", _MEASURE, "evaluation-mode"),
    ("warning", _CHOOSE, "trained-on"),
    # New statistics of a pruned network can be worse than stale ones, so the command compares them.
    ("warning", _REPAIR, "stale-weights"),
    ("warning", _TUNE, "gamma-all-zero"),
    ("warning", _TRACK, "no-statistics"),
    ("note", RECALIBRATE, "counter-behind half-statistics momentum-none"),
    ("note", f"nothing, if it is intended; {RECALIBRATE}", "frozen frozen-kind"),
    ("note", f"nothing, if it is intended; {_INSPECT}", "shared"),
    ("note", f"to be sure: {_INSPECT}", "counted-again predicted-gap"),
    ("note", "bnfix eval CKPT --model SPEC --data DATA --precision bf16", "beyond-half"),
    ("note", "for statistics of each call: give every call a layer of its own", "reused"),
    ("note", "left alone", "instance-norm"),
    ("note", _ALONE, "batch-weight"),
    ("note", _COMPARE, "pruned clustered rounded"),
    ("note", "no new statistics are needed", "compared"),
    ("note", "nothing", "dead-channels counter-zero gamma-zero unused single-position"),
)
_FAULTS: Final = {
    fault: (severity, advice) for severity, advice, faults in _GROUPS for fault in faults.split()
}


@dataclass(frozen=True)
class Finding:
    """A fault of a layer, or of the model (``layer`` is empty), and the advice against it."""

    layer: str
    fault: str  # a short code, the same for the same fault everywhere
    detail: str
    severity: str  # error, warning or note
    advice: str


#: A fault and its detail.
Fault = tuple[str, str]


def finding(layer: str, fault: str, detail: str) -> Finding:
    """A finding with its fault's severity and advice."""
    severity, advice = _FAULTS.get(fault, ("warning", RECALIBRATE))
    return Finding(layer=layer, fault=fault, detail=detail, severity=severity, advice=advice)


def gated(found: Finding) -> Finding:
    """Advise new statistics only where labelled data show that they are better."""
    words, asked, _ = found.advice.partition(RECALIBRATE)
    # With an error the stored statistics are wrong for any weights, so nothing need be compared.
    if not asked or found.severity == "error":
        return found
    return dataclasses.replace(found, advice=words + GATED)


def blended(found: Sequence[Finding]) -> list[Finding]:
    """Advise what lies between stored and new statistics, where no labels tell which are better."""
    # Layers with other faults hold nothing that is worth keeping a part of.
    faulty = {one.layer for one in found if one.severity != "note" and one.fault != "stale"} - {""}
    asked = [f.advice == RECALIBRATE and f.fault in ("stale", "output-range") for f in found]
    return [
        dataclasses.replace(one, advice=BLEND) if is_asked and one.layer not in faulty else one
        for one, is_asked in zip(found, asked, strict=True)
    ]


#: Advice holds at most one command, which runs from this word to its end.
_START: Final = "bnfix "
#: Options that a command does not have.
_LACKS: Final = {"finetune": {"--labels"}, "eval": {"--test"}}


@dataclass(frozen=True)
class Call:
    """The options of an inspection, with what is known of the model and the labels."""

    path: Path
    model: ModelRecipe
    data: str | None
    source: DataRecipe
    run: RunOptions
    seed: int
    samples: tuple[str, ...]
    asks_model: bool  # neither the options nor the file name a model
    labelled: bool
    frozen: dict[str, str]  # by layer, the option with which commands change it
    original: Path | None = None

    def fill(self, found: Finding) -> str:
        """Put file, model, data and all options that were given into an advice's command."""
        words, _, rest = found.advice.partition(_START)
        given = rest.split()
        if "CKPT" not in given:
            return found.advice
        name, data = given[0], self.data
        if name == "finetune" and not self.labelled:  # it needs other data than the inspection's
            words, data = f"{words}with labelled data: ", None
        own = {word for word in given if word.startswith("--")} | _LACKS.get(name, set())
        flag = self.frozen.get(found.layer, "")
        acts = "OUT" in given and (flag == "--unfreeze" or name == "calibrate")
        replaced = {
            "CKPT": [f"./{self.path}" if str(self.path).startswith("-") else str(self.path)],
            "ORIGINAL": ["ORIGINAL" if self.original is None else str(self.original)],
            "OUT": [f"{self.path.stem}.{name.removesuffix('e')}ed.safetensors"],
            "--model": [],
            "SPEC": ["--model", "SPEC"] * self.asks_model + _options(self.model),
            "--data": [],
            "DATA": [
                *("--data", data or "DATA"),
                *((flag,) if flag and acts else ()),
                *_options(self.source, own),
                *_options(self.run, own),
                *(self.samples if name == "inspect" else ()),
                *(("--seed", str(self.seed)) if self.seed else ()),
            ],
        }
        filled = [part for word in given for part in replaced.get(word, [word])]
        return f"{words}{_START}{shlex.join(filled)}"


def _options(recipe: Any, without: Collection[str] = ()) -> list[str]:
    """The fields of a recipe that are not at their defaults, as words of a command line."""
    words: list[str] = []
    for field in dataclasses.fields(recipe):
        value, flag = getattr(recipe, field.name), "--" + field.name.replace("_", "-")
        if value == field.default or value is None or value is False or flag in without:
            continue
        if field.name == "arguments":
            flag, value = "--model-arg", tuple(f"{k}={json.dumps(v)}" for k, v in value)
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            # The option is given once for each.
            words += [word for item in value for word in (flag, item)]
        else:
            words += [flag, ",".join(map(str, value if isinstance(value, tuple) else (value,)))]
    return words


@dataclass(frozen=True)
class Entry:
    """One entry of a history: its command (``None`` where it holds none), options and results."""

    command: str | None
    options: tuple[str, ...]
    did: str


def read_history(history: Any) -> list[Entry]:
    """Read a header's history; a stranger may have written it, so nothing in it is trusted."""
    entries = history if isinstance(history, list) else []
    return [_entry(found) for found in entries if isinstance(found, dict)]


def _entry(found: Mapping[str, Any]) -> Entry:
    command = _quoted(found.get("command_line"))
    if command is not None:
        return Entry(command, (), _did(found))
    # Files of earlier versions, and those written from Python, hold the options alone.
    file = mapping(found.get("input")).get("file")
    lines = [f"{plain(found.get('command') or '?')} {plain(file or '')}".rstrip()]
    for name, values in mapping(found.get("options")).items():
        given = values
        if isinstance(values, dict):
            given = {k: v for k, v in values.items() if v not in (None, False, [], "")}
        if given:
            lines.append(f"{plain(name)}: {json.dumps(given, ensure_ascii=False)}")
    return Entry(None, tuple(lines), _did(found))


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object of a header, else an empty one."""
    return value if isinstance(value, dict) else {}


def _quoted(typed: Any) -> str | None:
    """A stored command, quoted again, so that a copy of it runs bnfix and nothing else."""
    try:
        words = shlex.split(typed) if isinstance(typed, str) else []
    except ValueError:
        return None
    return shlex.join(words) if words[:1] == ["bnfix"] else None


def _did(entry: Mapping[str, Any]) -> str:
    results, data = mapping(entry.get("results")), mapping(entry.get("data"))
    said = [
        words.format(plain(value) if kind is str else value)
        for value, kind, words in (
            (results.get("output"), str, "output: {}"),
            (results.get("n_layers"), int, "{} layers swapped"),
            (results.get("difference"), float, "largest output difference {:.2g}"),
            (results.get("top1"), float, "top-1 {:.4f} on its test split"),
            (results.get("nll"), float, "NLL {:.4f}"),
            (results.get("loss"), float, "loss {:.4f} on its test split"),
            (data.get("n_examples"), int, "{} examples"),
        )
        if type(value) is kind
    ]
    return ", ".join(said) or "no results recorded"
