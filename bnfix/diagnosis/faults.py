"""Faults of norm layers in a file's tensors, with advice and commands to copy."""

from __future__ import annotations

import json
import math
import shlex
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from bnfix.core.errors import plain
from bnfix.core.settings import DataRecipe, ModelRecipe, RunOptions

# Advice ends with a command; CKPT, SPEC, DATA and OUT are filled in if they are known.
RECALIBRATE = (
    "bnfix calibrate CKPT --model SPEC --data DATA --statistics population --example-weight keep "
    "-o OUT"
)
BLEND = (
    "without labels, take the middle way (if weights were changed: --statistics population): bnfix "
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

#: Severity, advice and the faults that have them; an error means that the outputs cannot be right.
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
    ("note", "for separate statistics per call: give every call its own layer", "reused"),
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
    """A fault of a layer, or of the model (``layer`` is empty), and the advice for it."""

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
    """Advise new statistics only if labelled data shows that they are better."""
    words, asked, _ = found.advice.partition(RECALIBRATE)
    # An error means that the stored statistics are wrong for any weights: nothing to compare.
    if not asked or found.severity == "error":
        return found
    return replace(found, advice=words + GATED)


def blended(found: Sequence[Finding]) -> list[Finding]:
    """Advise a blend of stored and new statistics, if no labels show which are better."""
    # The statistics of layers with other faults are not worth keeping in part.
    faulty = {one.layer for one in found if one.severity != "note" and one.fault != "stale"} - {""}
    mixed = {("stale", RECALIBRATE), ("output-range", RECALIBRATE)}
    return [
        replace(one, advice=BLEND)
        if (one.fault, one.advice) in mixed and one.layer not in faulty
        else one
        for one in found
    ]


#: Advice holds at most one command, from this word to the end.
_START: Final = "bnfix "
#: Options that a command does not have.
_LACKS: Final = {"finetune": {"--labels"}, "eval": {"--test"}}


@dataclass(frozen=True)
class Call:
    """The options of an inspection, and whether a model and labels are known."""

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
        """Fill file, model, data and all given options into an advice's command."""
        words, _, rest = found.advice.partition(_START)
        given = rest.split()
        if "CKPT" not in given:
            return found.advice
        name, data = given[0], self.data
        if name == "finetune" and not self.labelled:  # it needs other data, with labels
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
    for field in fields(recipe):
        value, flag = getattr(recipe, field.name), "--" + field.name.replace("_", "-")
        if value == field.default or value is None or value is False or flag in without:
            continue
        if field.name == "arguments":
            flag, value = "--model-arg", tuple(f"{k}={json.dumps(v)}" for k, v in value)
        if value is True:
            words.append(flag)
        elif isinstance(value, tuple) and value and isinstance(value[0], str):
            # The option is given once for each value.
            words += [word for item in value for word in (flag, item)]
        else:
            words += [flag, ",".join(map(str, value if isinstance(value, tuple) else (value,)))]
    return words


@dataclass(frozen=True)
class Entry:
    """One entry of a history: its command (``None`` if it holds none), options and results."""

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
    # Files of earlier versions, or written from Python, hold the options only.
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
    """A stored command, quoted again: a copy of it runs bnfix and nothing else."""
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


# --- the tensors of a file ---

_MOMENTS = ("running_mean", "running_var")
_TINY_VAR = 1e-5
#: Below this count, more than 1% of a new layer's statistics is left at momentum 0.1.
_FEW_BATCHES = 44
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class NormTensors:
    """A norm layer as a state dict shows it, with a bnfix header if there is one."""

    name: str
    channels: int
    batches_tracked: int | None
    mean_range: tuple[float, float]
    var_range: tuple[float, float]
    gamma_range: tuple[float, float] | None  # of |gamma|
    n_dead: int  # channels with a running variance below 1e-5
    example_weight: float | list[float]
    grouped: bool = False  # channels share statistics, by the header
    ours: bool = False  # the header names the layer
    batch_weight: float | list[float] = 0.0
    gated: bool = False


def read_norms(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any] | None = None
) -> list[NormTensors]:
    """Find the norm layers of a state dict by their running moments, in the file's order."""
    layers = []
    for key, mean in tensors.items():
        name, _, last = key.rpartition(".")
        var = tensors.get(under(name, "running_var"))
        if last != "running_mean" or var is None:
            continue
        if mean.shape != var.shape or mean.numel() == 0 or not (_is_real(mean) and _is_real(var)):
            continue
        gamma = tensors.get(under(name, "weight"))
        if gamma is not None and (gamma.numel() == 0 or not _is_real(gamma)):
            gamma = None
        settings, ours = mapping(found := (header or {}).get(name)), isinstance(found, dict)
        layers.append(
            NormTensors(
                name=name,
                channels=mean.numel(),
                batches_tracked=_count(tensors.get(under(name, "num_batches_tracked"))),
                mean_range=_range(mean),
                var_range=_range(var),
                gamma_range=None if gamma is None else _range(gamma.double().abs()),
                n_dead=int((var.double() < _TINY_VAR).sum()),
                example_weight=_weight(settings.get("example_weight")) if ours else 0.0,
                grouped=ours and settings.get("channel_groups") != mean.numel(),
                ours=ours,
                batch_weight=_weight(settings.get("batch_weight", 0.0)),
                gated=settings.get("gates") is not None,
            )
        )
    return layers


def diagnose(tensors: Mapping[str, Tensor], layers: list[NormTensors]) -> list[Finding]:
    """List the faults of norm layers, in the layers' order; then moments that form no layer."""
    findings: list[Finding] = []
    counts = [layer.batches_tracked for layer in layers if (layer.batches_tracked or 0) > 0]
    usual = Counter(counts).most_common(1)[0][0] if counts else None
    for layer in layers:
        mean, var = (tensors[under(layer.name, key)] for key in _MOMENTS)
        faults = [
            *_statistics_faults(layer, mean, var, trained=_is_trained(layer, tensors)),
            *_counter_faults(layer, _is_new(mean.double(), var.double()), usual),
            *_affine_faults(layer, tensors),
            *_half_faults(mean, var),
        ]
        findings += [finding(layer.name, *fault) for fault in faults]
    return findings + _broken_layers(tensors, {layer.name for layer in layers})


def under(layer: str, key: str) -> str:
    """The full name of a layer's tensor."""
    return f"{layer}.{key}" if layer else key


def _is_new(mean: Tensor, var: Tensor) -> bool:
    return not mean.any() and bool((var == 1).all())


def _is_trained(layer: NormTensors, tensors: Mapping[str, Tensor]) -> bool:
    """Whether scale or shift differ from a new layer's: 1 (or 0) and 0."""
    gamma, beta = (tensors.get(under(layer.name, key)) for key in ("weight", "bias"))
    if beta is not None and bool((beta != 0).any()):
        return True
    return gamma is not None and bool((gamma != 1).any()) and bool((gamma != 0).any())


def _statistics_faults(
    layer: NormTensors, mean: Tensor, var: Tensor, *, trained: bool
) -> Iterator[Fault]:
    mean, var = mean.double(), var.double()
    of = f"of {layer.channels} channels have"
    n_bad = int((~(mean.isfinite() & var.isfinite())).sum())
    n_negative = int((var < 0).sum())
    if n_bad:
        yield "not-finite", f"{n_bad} {of} statistics that are not finite"
    if n_negative:
        yield "negative-variance", f"{n_negative} {of} a negative variance"
    if _is_new(mean, var):
        detail = "the statistics are a new layer's (mean 0, variance 1)"
        # A network that was trained in evaluation mode has weights that fit these statistics.
        if trained and not layer.batches_tracked:
            detail += ", scale and shift are not: possibly trained in evaluation mode"
            yield "evaluation-mode", detail
        else:
            yield "never-updated", detail
    elif bool((var == 0).all()):
        yield "zero-variance", "every variance is 0"
    elif layer.n_dead and not n_negative:
        least = f"(least {layer.var_range[0]:.2g}): constant, without a signal"
        yield "dead-channels", f"{layer.n_dead} {of} a variance below {_TINY_VAR:g} {least}"
    elif not layer.grouped and layer.channels > 1 and not n_bad:
        if bool((mean == mean[0]).all() & (var == var[0]).all()):
            yield "uniform-statistics", "every channel has the same mean and the same variance"


def _counter_faults(layer: NormTensors, is_new: bool, usual: int | None) -> Iterator[Fault]:
    n = layer.batches_tracked
    if n is None:
        if usual:
            yield "frozen", "has no batch count, other layers have one: frozen, or added by hand"
    elif n < 0:
        yield "counter-negative", f"num_batches_tracked is {n}, expected 0 or more"
    elif n == 0:
        if not is_new:  # with momentum None, torch's next update has weight 1 / (0 + 1)
            yield (
                "counter-zero",
                "num_batches_tracked is 0 although the statistics are not a new layer's: "
                "with momentum None the next training batch replaces them",
            )
    elif n < _FEW_BATCHES and not layer.ours:  # bnfix's own statistics are plain means
        left = f"at torch's momentum of 0.1, a fraction of {0.9**n:.2g} of the statistics"
        yield "few-batches", f"num_batches_tracked is {n}: {left} is still a new layer's"
    elif usual and n > usual and n % usual == 0:
        k, pool = n // usual, "and its statistics pool those calls"
        calls = f"the model calls it {k} times per forward pass, {pool}"
        yield "counted-again", f"counted {k} times as many batches as most layers: {calls}"
    elif usual and n < usual / 2:
        why = "newer than the others, or frozen for part of the training"
        yield "counter-behind", f"counted {n} batches, but most layers counted {usual}: {why}"


def _affine_faults(layer: NormTensors, tensors: Mapping[str, Tensor]) -> Iterator[Fault]:
    gamma, beta = (tensors.get(under(layer.name, key)) for key in ("weight", "bias"))
    for kind, word, tensor in (("gamma", "scale", gamma), ("beta", "shift", beta)):
        if tensor is not None and _is_real(tensor) and not bool(tensor.isfinite().all()):
            yield f"{kind}-not-finite", f"{word} ({kind}) is not finite"
        if tensor is not None and tensor.shape != (layer.channels,):
            detail = f"has shape {tuple(tensor.shape)}, the statistics have {layer.channels}"
            yield "length-mismatch", f"{word} ({kind}) {detail} channels"
    if gamma is not None and _is_real(gamma) and bool(gamma.isfinite().all()) and gamma.numel():
        n_zero = int((gamma.double().abs() < 1e-8).sum())
        if n_zero == gamma.numel():
            yield "gamma-all-zero", "every scale (gamma) is 0: the layer outputs only its shift"
        elif n_zero:
            of = f"{n_zero} of {layer.channels} channels"
            yield "gamma-zero", f"{of} have a scale of 0: they could be pruned"


def _half_faults(mean: Tensor, var: Tensor) -> Iterator[Fault]:
    if {mean.dtype, var.dtype} & {torch.float16, torch.bfloat16}:
        yield "half-statistics", "statistics are stored in half precision"
        return
    values = torch.cat([mean.double().abs(), var.double()])
    largest = max(values[values.isfinite()].tolist(), default=0.0)
    if largest > _LARGEST_HALF:
        limit = "is beyond float16 (65504): the layer must stay in float32"
        yield "beyond-half", f"a statistic of {largest:.3g} {limit}"


def _broken_layers(tensors: Mapping[str, Tensor], known: set[str]) -> list[Finding]:
    found = []
    for key, tensor in tensors.items():
        name, _, last = key.rpartition(".")
        if last not in _MOMENTS or name in known:
            continue
        shape = tuple(tensor.shape)
        other = tensors.get(under(name, _MOMENTS[1 - _MOMENTS.index(last)]))
        if other is None:
            found.append(finding(name, "moment-missing", f"has a {last} but not the other moment"))
        elif last == _MOMENTS[1]:
            continue  # the pair is reported once, at its mean
        elif tensor.shape != other.shape:
            detail = f"mean of shape {shape}, variance of {tuple(other.shape)}"
            found.append(finding(name, "length-mismatch", detail))
        else:
            kind = str(tensor.dtype).removeprefix("torch.")
            detail = f"its statistics are {kind} of shape {shape}, not real numbers"
            found.append(finding(name, "odd-statistics", detail))
    return found


def _is_real(tensor: Tensor) -> bool:
    # A file can hold any type under any name; some types have no arithmetic.
    return tensor.is_floating_point() and tensor.dtype.itemsize in (1, 2, 4, 8)


def _count(tensor: Tensor | None) -> int | None:
    if tensor is None or tensor.numel() != 1 or tensor.dtype.is_complex:
        return None
    value = tensor.double().item()
    return int(value) if math.isfinite(value) else None


def _weight(found: Any) -> float | list[float]:
    """The example weight in a header; NaN if it is not a number from 0 to 1."""
    if isinstance(found, list) and found:
        return [w for w in map(_weight, found) if isinstance(w, float)]
    return float(found) if type(found) in (int, float) and 0 <= found <= 1 else math.nan


def _range(tensor: Tensor) -> tuple[float, float]:
    return float(tensor.double().min()), float(tensor.double().max())
