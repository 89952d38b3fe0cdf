"""`inspect`: the norm layers of a checkpoint and their faults; it changes nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bnfix.checkpoints.checkpoint import STATISTICS, Checkpoint, read_checkpoint
from bnfix.checkpoints.load import Loaded, hub_folder
from bnfix.checkpoints.several import describe_domains, domain_of, read_domains
from bnfix.core import __version__
from bnfix.core.errors import some
from bnfix.core.options import require
from bnfix.core.runtime import autocast, device_of
from bnfix.core.settings import DataRecipe, ModelRecipe, RunOptions
from bnfix.data.splits import data_record
from bnfix.diagnosis import faults
from bnfix.diagnosis.damage import Comparison, compare_weights, diagnose_weights
from bnfix.diagnosis.model import (
    Behaviour,
    Shifts,
    examine_behaviour,
    examine_call,
    examine_model,
    read_predictions,
)
from bnfix.jobs.convert import batch_of, example_input, known_shape
from bnfix.jobs.inputs import Track, Tracked, open_inputs, resolve_preprocessing, silent
from bnfix.jobs.session import load_one
from bnfix.metrics.compare import describe_easier
from bnfix.metrics.evaluate import evaluate
from bnfix.models.build import from_file_allowed
from bnfix.norm.sites import NormSite, find_norms, instance_norms
from bnfix.recalibrate.reference import predicted_gaps

#: Examples to run by default.
SAMPLES = 512
#: Most values stored next to the weights that a note shows; the JSON has all.
_SHOWN = 24
_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Inspection:
    """The norm layers of a checkpoint, their faults, and the file's history."""

    checkpoint: Checkpoint
    layers: list[faults.NormTensors]
    kinds: dict[str, str]  # class name of each layer, if there is a model
    problems: list[str]  # reasons against a swap, if there is a model
    findings: list[faults.Finding]  # errors first
    behaviour: Behaviour | None  # if there is data
    data: dict[str, Any] | None  # its spec, size and fingerprint
    commands: list[faults.Entry]  # of the file's history
    notes: list[str]  # how the file was read, and what was assumed
    gaps: Mapping[str, float]  # of predicted means, by layer
    against: tuple[Checkpoint, Comparison] | None  # the file that it was made from

    def to_json(self) -> dict[str, Any]:
        """The object that ``inspect --json`` prints; its numbers may be NaN or infinite."""
        file, seen, against = self.checkpoint, self.behaviour, None
        history = (file.metadata or {}).get("history")
        shifts = Shifts() if seen is None else seen.shifts
        if self.against is not None:
            other, comparison = self.against
            against = {"file": str(other.path), "sha256": other.sha256, **asdict(comparison)}
            against["sentence"] = comparison.sentence
        return {
            "bnfix": __version__,
            "command": "inspect",
            "file": str(file.path),
            "sha256": file.sha256,
            "key": file.key,
            "prefix": file.prefix,
            "notes": self.notes,
            "n_tensors": len(file.tensors),
            "beside": file.beside,
            "layers": [
                {
                    **asdict(layer),
                    "kind": self.kinds.get(layer.name),
                    "predicted_gap": self.gaps.get(layer.name),
                    **shifts.to_json(layer.name),
                }
                for layer in self.layers
            ],
            "findings": [asdict(finding) for finding in self.findings],
            "problems": self.problems,
            "behaviour": None if seen is None else seen.to_json(),
            "data": self.data,
            "history": history if isinstance(history, list) else [],
            "against": against,
            "commands": [asdict(entry) for entry in self.commands],
        }


def inspect_checkpoint(
    path: str | Path,
    *,
    model: ModelRecipe | None = None,
    data: str | None = None,
    source: DataRecipe | None = None,
    run: RunOptions | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    against: str | Path | None = None,
    track: Track = silent,
) -> Inspection:
    """Find faults in the file, in the model's settings, in one call, and on data if given.

    ``against`` is the checkpoint that this one was made from.
    """
    recipe, run, source = model or ModelRecipe(), run or RunOptions("cpu"), source or DataRecipe()
    words = "--test: it is compared with --data, which is missing. Give both."
    require(source.test is None or data is not None, words, "test")
    loaded = None if recipe.model is None and data is None else load_one(path, recipe, run)
    place, ema = {"key": recipe.key, "prefix": recipe.prefix}, recipe.prefer_ema
    found = loaded.checkpoint if loaded else read_checkpoint(path, **place, prefer_ema=ema)
    header, compared = found.metadata or {}, None
    if against is not None:
        original = read_checkpoint(against, prefer_ema=ema)
        compared = original, compare_weights(found.tensors, original.tensors)
    tensors, more = _looked_at(found, loaded, recipe.domain)
    layers = faults.read_norms(tensors, faults.mapping(header.get("norms")))
    weights = diagnose_weights(found.tensors) if compared is None else compared[1].findings()
    findings = [*faults.diagnose(tensors, layers), *weights, *_neighbours(layers)]
    seen, sites, kinds, frozen = _Seen(), list[NormSite](), dict[str, str](), dict[str, str]()
    gaps = {} if loaded is None else predicted_gaps(loaded.model)
    if loaded is not None:
        sites = find_norms(loaded.model)
        kinds = {site.name: site.kind for site in sites} | instance_norms(loaded.model)
        frozen = _frozen(sites, loaded)
        # An InstanceNorm's running statistics follow other rules, so its tensors show no fault.
        findings = [f for f in findings if "InstanceNorm" not in kinds.get(f.layer, "")]
        findings += [*examine_model(loaded.model, layers), *read_predictions(gaps)]
        how = source, run, samples, seed, track
        seen = _call(loaded, source) if data is None else _look(loaded, data, *how)
        findings += seen.findings
    if seen.fits or any(finding.fault == "evaluation-mode" for finding in findings):
        findings = [faults.gated(finding) for finding in findings]
    elif not seen.labelled:
        findings = faults.blended(findings)
    stated = faults.mapping(header.get("model"))
    is_named = recipe.model is not None or isinstance(stated.get("spec"), str)
    call = faults.Call(
        path=Path(path),
        model=_for_commands(recipe, stated),
        data=data,
        source=source,
        run=run,
        seed=seed,
        samples=() if samples == SAMPLES else ("--samples", str(samples)),
        asks_model=not is_named and hub_folder(path) is None,
        labelled=seen.labelled,
        frozen=frozen,
        original=None if compared is None else compared[0].path,
    )
    findings = [replace(one, advice=call.fill(one)) for one in findings]
    return Inspection(
        checkpoint=found,
        layers=layers,
        kinds=kinds,
        problems=[f"{site.name}: {site.problem}" for site in sites if site.problem],
        findings=sorted(findings, key=lambda finding: _ORDER[finding.severity]),
        behaviour=seen.behaviour,
        data=seen.record,
        commands=faults.read_history(header.get("history")),
        notes=[*found.notes, *more, *seen.remarks],
        gaps=gaps,
        against=compared,
    )


def _looked_at(
    file: Checkpoint, loaded: Loaded | None, name: str | None
) -> tuple[dict[str, Tensor], list[str]]:
    """A file's tensors with the statistics of a domain, if one is named, and notes on the file."""
    if loaded is None:
        stored = faults.mapping((file.metadata or {}).get("domains")).values()
        named = {layer for found in stored for layer in faults.mapping(found)}
        layers = faults.read_norms(file.tensors)
        sets = read_domains(file, {x.name: x.channels for x in layers if x.name in named})
    else:
        sets = loaded.domains
    used = {} if name is None else domain_of(sets, name, file.path)
    kinds = enumerate(STATISTICS)
    new = {faults.under(n, kind): pair[i] for i, kind in kinds for n, pair in used.items()}
    notes = describe_domains(sets, name) if loaded is None else []
    notes += ["the table shows its own statistics"] if sets and name is None else []
    values = [f"{key} = {value}" for key, value in file.beside.items()]
    notes += [f"next to the weights: {some(values, _SHOWN)}"] if values else []
    return file.tensors | new, notes


def _neighbours(layers: Sequence[faults.NormTensors]) -> Iterator[faults.Finding]:
    """A note on every layer with a batch weight."""
    for layer in layers:
        highest = float(np.max(layer.batch_weight, initial=0))
        if highest > 0:
            words = "predictions depend on the other images in the batch: the batch has a weight"
            yield faults.finding(layer.name, "batch-weight", f"{words} of up to {highest:.3g}")


def _frozen(sites: Sequence[NormSite], loaded: Loaded) -> dict[str, str]:
    """The option that lets a command change a frozen layer, by layer."""
    return {
        site.name: "--unfreeze" if site.frozen else "--include-frozen"
        for site in sites
        if not site.problem and (site.frozen or site.is_put_to_rest(loaded.model))
    }


def _for_commands(recipe: ModelRecipe, stated: Mapping[str, Any]) -> ModelRecipe:
    """The model's options for commands to copy; those run no code that only a file names."""
    spec = stated.get("spec")
    if recipe.model is not None or not isinstance(spec, str) or from_file_allowed(spec):
        return recipe
    arguments = tuple(faults.mapping(stated.get("arguments")).items())
    return replace(recipe, model=spec, arguments=arguments)


@dataclass(frozen=True)
class _Seen:
    """The faults that a run of the model shows, and the data that it ran on."""

    findings: tuple[faults.Finding, ...] = ()
    remarks: tuple[str, ...] = ()
    behaviour: Behaviour | None = None
    record: dict[str, Any] | None = None
    labelled: bool = True

    @property
    def fits(self) -> bool:
        """Whether the stored statistics are more accurate than those of each batch."""
        seen = self.behaviour
        broken = any(finding.fault == "output-not-finite" for finding in self.findings)
        if broken or seen is None or seen.top1 is None or seen.top1_training is None:
            return False
        return seen.top1 > seen.top1_training


def _call(loaded: Loaded, source: DataRecipe) -> _Seen:
    """Run the model once on a made-up input."""
    preprocessing, _ = resolve_preprocessing(loaded, source)
    example = example_input(loaded.model, None, known_shape(loaded.model, preprocessing))
    if example is None:
        return _Seen(remarks=("the model could not run on a made-up input; give --data",))
    return _Seen(findings=tuple(examine_call(loaded.model, batch_of(example))))


def _look(
    loaded: Loaded,
    data: str,
    source: DataRecipe,
    run: RunOptions,
    samples: int,
    seed: int,
    track: Track,
) -> _Seen:
    """Run some of the data through the model in both modes."""
    inputs = open_inputs(loaded, data, source)
    index, batches = inputs.sample(samples, loaded.model, run, seed)
    tracked = Tracked(batches, "a look at the statistics", track)
    with autocast(device_of(loaded.model), run.precision):
        findings = examine_call(loaded.model, next(iter(batches)))
        behaviour, more = examine_behaviour(loaded.model, tracked)
        broken = any(one.fault == "output-not-finite" for one in (*findings, *more))
        if source.test is not None and not broken:
            test = open_inputs(loaded, source.test, source)
            others = test.sample(samples, loaded.model, run, seed)[1]
            both = (evaluate(loaded.model, one, task=inputs.task) for one in (batches, others))
            more += [faults.finding("", "trained-on", text) for text in describe_easier(*both)]
    return _Seen(
        findings=(*findings, *more),
        remarks=tuple(inputs.notes),
        behaviour=behaviour,
        record=data_record(inputs.images, index),
        labelled=inputs.images.labelled,
    )
