"""`inspect`: a checkpoint's norm layers and all that is found about them; changes nothing."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.building.models import from_file_allowed
from bnfix.checkpoints.checkpoint import Checkpoint, read_checkpoint
from bnfix.checkpoints.loading import Loaded
from bnfix.conversion import example_input, known_shape
from bnfix.data.batches import Batch, Batches
from bnfix.data.corruptions import corruption_of
from bnfix.diagnosing.advice import Call
from bnfix.diagnosing.diagnosis import Finding, NormTensors, diagnose, gated, read_norms
from bnfix.diagnosing.examination import Behaviour, examine_behaviour, examine_call, examine_model
from bnfix.diagnosing.history import Entry, read_history
from bnfix.layers.sites import find_norms, instance_norms
from bnfix.recipe import DataRecipe, ModelRecipe, RunOptions
from bnfix.recognition import data_record
from bnfix.runtime import autocast, device_of
from bnfix.tracking import Track, Tracked, silent
from bnfix.version import __version__
from bnfix.workbench import (
    applied,
    evaluation_batch_size,
    load_one,
    open_checked,
    resolve_preprocessing,
)

#: Examples that are run, where nothing else is asked for.
SAMPLES = 512
_ORDER = {"error": 0, "warning": 1, "note": 2}


@dataclass(frozen=True)
class Inspection:
    """All that was found about a checkpoint.

    Args:
        checkpoint: the file.
        layers: its norm layers.
        kinds: class name of each layer, where a model was given.
        problems: reasons against a swap, where a model was given.
        findings: what is or may be wrong, errors first.
        behaviour: what the model does on data, where data were given.
        data: spec, size and fingerprint of those.
        told: the file's history.
        notes: how the file was read, and what was assumed.
    """

    checkpoint: Checkpoint
    layers: list[NormTensors]
    kinds: dict[str, str]
    problems: list[str]
    findings: list[Finding]
    behaviour: Behaviour | None
    data: dict[str, Any] | None
    told: list[Entry]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The inspection as one object of JSON values; numbers may be other than finite."""
        header = self.checkpoint.metadata or {}
        history = header.get("history")
        drifts = {} if self.behaviour is None else self.behaviour.drifts
        return {
            "bnfix": __version__,
            "command": "inspect",
            "file": str(self.checkpoint.path),
            "sha256": self.checkpoint.sha256,
            "key": self.checkpoint.key,
            "prefix": self.checkpoint.prefix,
            "notes": self.notes,
            "n_tensors": len(self.checkpoint.tensors),
            "layers": [
                {
                    **dataclasses.asdict(layer),
                    "kind": self.kinds.get(layer.name),
                    "mean_shift": drifts.get(layer.name, (None, None))[0],
                    "log_var_ratio": drifts.get(layer.name, (None, None))[1],
                }
                for layer in self.layers
            ],
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
            "problems": self.problems,
            "behaviour": None
            if self.behaviour is None
            else {k: v for k, v in dataclasses.asdict(self.behaviour).items() if k != "drifts"},
            "data": self.data,
            "history": history if isinstance(history, list) else [],
            "commands": [dataclasses.asdict(told) for told in self.told],
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
    track: Track = silent,
) -> Inspection:
    """Find what is wrong with a checkpoint's norm layers, as far as what is given tells.

    The file alone shows its statistics; the model its settings and, on a made-up input, how its
    layers are called; data show what statistics should be, and what the model makes of them.
    """
    recipe, run, source = model or ModelRecipe(), run or RunOptions("cpu"), source or DataRecipe()
    found = read_checkpoint(
        path, key=recipe.key, prefix=recipe.prefix, prefer_ema=recipe.prefer_ema
    )
    notes, header = list(found.notes), found.metadata or {}
    kinds: dict[str, str] = {}
    frozen: dict[str, str] = {}
    problems: list[str] = []
    seen = _Seen()
    loaded = load_one(path, recipe, run) if recipe.model is not None or data is not None else None
    if loaded is not None:
        found = loaded.checkpoint
        notes = list(found.notes)
        sites = find_norms(loaded.model)
        kinds = {site.name: site.kind for site in sites} | instance_norms(loaded.model)
        frozen = {
            site.name: "--unfreeze" if site.frozen else "--include-frozen"
            for site in sites
            if not site.problem and (site.frozen or site.is_put_to_rest(loaded.model))
        }
        problems = [f"{site.name}: {site.problem}" for site in sites if site.problem]
    norms = header.get("norms")
    layers = read_norms(found.tensors, norms if isinstance(norms, dict) else None)
    findings = diagnose(found.tensors, layers)
    if loaded is not None:
        findings = [f for f in findings if "InstanceNorm" not in kinds.get(f.layer, "")]
        findings += examine_model(loaded.model, layers)
        if data is None:
            preprocessing, _ = resolve_preprocessing(loaded, source)
            example = example_input(loaded.model, None, known_shape(loaded.model, preprocessing))
            if example is None:
                notes.append("the model could not be run on a made-up input; --data runs it")
            else:
                batch = Batch(example, None, np.arange(len(example)))
                findings += examine_call(loaded.model, batch)
        else:
            seen = _look(loaded, data, source, run, samples, seed, track)
            findings += seen.findings
            notes += seen.remarks
    if seen.fits or any(finding.fault == "evaluation-mode" for finding in findings):
        findings = [gated(finding) for finding in findings]
    call = Call(
        path=Path(path),
        model=_stated_model(recipe, header),
        data=data,
        source=source,
        run=run,
        seed=seed,
        samples=() if samples == SAMPLES else ("--samples", str(samples)),
        knows_model=recipe.model is not None or _builds_itself(header),
        labelled=data is None or seen.labelled,
    )
    advice = [_taking_in(f.advice, frozen.get(f.layer, "")) for f in findings]
    findings = [
        dataclasses.replace(finding, advice=call.fill(text))
        for finding, text in zip(findings, advice, strict=True)
    ]
    findings.sort(key=lambda finding: _ORDER[finding.severity])
    history = header.get("history")
    told = read_history(history if isinstance(history, list) else [])
    return Inspection(
        checkpoint=found,
        layers=layers,
        kinds=kinds,
        problems=problems,
        findings=findings,
        behaviour=seen.behaviour,
        data=seen.record,
        told=told,
        notes=notes,
    )


def _taking_in(advice: str, flag: str) -> str:
    """The advice for a frozen layer, which commands act on with this option only."""
    acts = advice.endswith("-o OUT") and (flag == "--unfreeze" or "bnfix calibrate" in advice)
    return advice.replace("--data DATA", f"--data DATA {flag}") if acts and flag else advice


@dataclass(frozen=True)
class _Seen:
    """What data showed: findings and remarks, the record of the data, whether it has labels."""

    findings: tuple[Finding, ...] = ()
    remarks: tuple[str, ...] = ()
    behaviour: Behaviour | None = None
    record: dict[str, Any] | None = None
    labelled: bool = False

    @property
    def fits(self) -> bool:
        """Whether the stored statistics are right more often than those of each batch."""
        seen = self.behaviour
        broken = any(finding.fault == "output-not-finite" for finding in self.findings)
        if broken or seen is None or seen.top1 is None or seen.top1_training is None:
            return False
        return seen.top1 > seen.top1_training


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
    stated, remarks = resolve_preprocessing(loaded, source)
    images, size = open_checked(data, loaded.model, source, stated)
    preprocessing, remarks = applied(images, stated, remarks)
    index = np.random.default_rng(seed).permutation(len(images))[:samples]
    batches = Batches(
        images,
        index,
        preprocessing,
        batch_size=evaluation_batch_size(run, loaded.model, size),
        workers=run.workers,
        max_bad=source.max_bad,
        corruption=corruption_of(source.corrupt, seed),
    )
    tracked = Tracked(batches, "a look at the statistics", track)
    with autocast(device_of(loaded.model), run.precision):
        findings = examine_call(loaded.model, next(iter(batches)))
        behaviour, more = examine_behaviour(loaded.model, tracked)
    return _Seen(
        findings=(*findings, *more),
        remarks=tuple(remarks),
        behaviour=behaviour,
        record=data_record(images, index),
        labelled=images.labels is not None,
    )


def _stated(header: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """The model that a header states, with its arguments."""
    model: Any = header.get("model")
    spec, arguments = (model.get("spec"), model.get("arguments")) if isinstance(model, dict) else (
        None, None
    )  # fmt: skip
    return (
        spec if isinstance(spec, str) else None,
        arguments if isinstance(arguments, dict) else {},
    )


def _builds_itself(header: Mapping[str, Any]) -> bool:
    """Whether commands need no --model, since the file states one that is built from its word."""
    spec, _ = _stated(header)
    return spec is not None and from_file_allowed(spec)


def _stated_model(recipe: ModelRecipe, header: Mapping[str, Any]) -> ModelRecipe:
    """The model as typed; where none was, one that the file states and commands must be given."""
    spec, arguments = _stated(header)
    if recipe.model is not None or spec is None or _builds_itself(header):
        return recipe
    return dataclasses.replace(recipe, model=spec, arguments=tuple(arguments.items()))
