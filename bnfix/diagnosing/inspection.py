"""`inspect`: a checkpoint's norm layers and all that is found about them; changes nothing."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.checkpoint import Checkpoint, read_checkpoint
from bnfix.conversion import example_input
from bnfix.data.batches import Batch, Batches
from bnfix.data.corruptions import corruption_of
from bnfix.diagnosing.diagnosis import Finding, NormTensors, diagnose, read_norms
from bnfix.diagnosing.examination import Behaviour, examine_behaviour, examine_call, examine_model
from bnfix.diagnosing.retelling import Told, retell
from bnfix.layers.sites import find_norms
from bnfix.recipe import DataRecipe, ModelRecipe, RunOptions
from bnfix.recognition import data_record
from bnfix.runtime import autocast, device_of
from bnfix.tracking import Track, Tracked, silent
from bnfix.version import __version__
from bnfix.workbench import evaluation_batch_size, load_one, open_checked, resolve_preprocessing

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
        told: the file's history as commands.
        notes: how the file was read, and what was assumed.
    """

    checkpoint: Checkpoint
    layers: list[NormTensors]
    kinds: dict[str, str]
    problems: list[str]
    findings: list[Finding]
    behaviour: Behaviour | None
    data: dict[str, Any] | None
    told: list[Told]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        """The inspection as one object of JSON values; numbers may be other than finite.

        Returns:
            What ``inspect --json`` prints.
        """
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

    Args:
        path: the file.
        model: which model it is; needed with data where the file does not say it.
        data: DATA to run.
        source: labels and preprocessing of the data.
        run: device and batch size.
        samples: examples of the data that are run, drawn in seeded random order.
        seed: of that order.
        track: how progress is shown.

    Returns:
        All that was found.
    """
    recipe, run = model or ModelRecipe(), run or RunOptions("cpu")
    found = read_checkpoint(
        path, key=recipe.key, prefix=recipe.prefix, prefer_ema=recipe.prefer_ema
    )
    notes, header = list(found.notes), found.metadata or {}
    kinds: dict[str, str] = {}
    problems: list[str] = []
    findings: list[Finding] = []
    behaviour, used = None, None
    if recipe.model is not None or data is not None:
        loaded = load_one(path, recipe, run)
        found = loaded.checkpoint
        notes = list(found.notes)
        sites = find_norms(loaded.model)
        kinds = {site.name: site.kind for site in sites}
        problems = [f"{site.name}: {site.problem}" for site in sites if site.problem]
    norms = header.get("norms")
    layers = read_norms(found.tensors, norms if isinstance(norms, dict) else None)
    findings += diagnose(found.tensors, layers)
    if recipe.model is not None or data is not None:
        findings += examine_model(loaded.model, layers)
        if data is None:
            example = example_input(loaded.model, None)
            if example is None:
                notes.append("the model could not be run on a made-up input; --data runs it")
            else:
                batch = Batch(example, None, np.arange(len(example)))
                findings += examine_call(loaded.model, batch)
        else:
            source = source or DataRecipe()
            preprocessing, remarks = resolve_preprocessing(loaded, source)
            images, size = open_checked(data, loaded.model, source, preprocessing)
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
            notes += remarks
            tracked = Tracked(batches, "a look at the statistics", track)
            with autocast(device_of(loaded.model), run.precision):
                findings += examine_call(loaded.model, next(iter(batches)))
                behaviour, seen = examine_behaviour(loaded.model, tracked)
            findings += seen
            used = data_record(images, index)
    history = header.get("history")
    stated = header.get("model")
    spec = recipe.model or (stated.get("spec") if isinstance(stated, dict) else None)
    known = {
        "CKPT": shlex.quote(str(path)),
        "--model SPEC": _model_words(recipe, spec),
        "DATA": data and shlex.quote(data),
    }
    findings = [_filled(finding, known) for finding in findings]
    findings.sort(key=lambda finding: _ORDER[finding.severity])
    told = retell(history if isinstance(history, list) else [], Path(path).name)
    return Inspection(found, layers, kinds, problems, findings, behaviour, used, told, notes)


def _model_words(recipe: ModelRecipe, spec: Any) -> str | None:
    """The options that say which model it is, as they were typed."""
    if not isinstance(spec, str):
        return None
    words = ["--model", spec]
    for name, value in recipe.arguments:
        words += ["--model-arg", f"{name}={json.dumps(value)}"]
    for flag, text in (
        ("--key", recipe.key), ("--prefix", recipe.prefix), ("--forward", recipe.forward),
    ):  # fmt: skip
        words += [] if text is None else [flag, text]
    return shlex.join([*words, *(["--prefer-ema"] if recipe.prefer_ema else [])])


def _filled(finding: Finding, known: Mapping[str, str | None]) -> Finding:
    """A finding whose advice has the words of this call in their places."""
    advice = finding.advice
    for words, text in known.items():
        if text is not None:
            advice = advice.replace(words, text)
    return dataclasses.replace(finding, advice=advice)
