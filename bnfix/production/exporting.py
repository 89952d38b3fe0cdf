"""`export`: a checkpoint as ONNX, `torch.export`, folded or plain weights, each verified."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from bnfix import guards, runtime
from bnfix.checkpoints.loading import Loaded
from bnfix.checkpoints.saving import versions
from bnfix.conversion import CALL_ERRORS, example_input, known_shape
from bnfix.data.batches import Batches
from bnfix.data.corruptions import corruption_of
from bnfix.data.fingerprints import data_record
from bnfix.data.images import Images
from bnfix.data.opening import open_images
from bnfix.errors import ConfigError, ModelError, one_line, some
from bnfix.estimating import Estimate, peak_memory
from bnfix.layers.norms import generalized_norms, set_example_weight_
from bnfix.measuring.evaluation import evaluate
from bnfix.preprocessing import Preprocessing
from bnfix.production import artifacts
from bnfix.production.export_report import SUFFIXES, Export
from bnfix.production.making import Making
from bnfix.production.verification import Agreement, agreement, names_of
from bnfix.recipe import DataRecipe, ModelRecipe, RunOptions, check_seed, option
from bnfix.reporting.layer_rows import layer_rows, n_live
from bnfix.reporting.records import DataUsed, Evaluated
from bnfix.reporting.report import Report
from bnfix.tracking import Track, Tracked, describe_skipped, silent
from bnfix.workbench import applied, load_one, refuse_image_options, resolve_preprocessing

#: Labelled examples that the cost of `--force-zero` is measured on, at most.
_COST_EXAMPLES: Final = 1000
#: A difference below this, relative to the output, can be rounding.
_ROUNDING: Final = 1e-3
#: Numbers in all inputs together, at most.
_MOST_VALUES: Final = 1 << 30


@dataclass(frozen=True)
class ExportRecipe:
    """What a checkpoint is turned into, and how strictly that is checked."""

    to: str = option("onnx", "Form to write: " + ", ".join(SUFFIXES) + ".")
    samples: int = option(64, "Inputs to verify on, drawn in seeded random order.")
    atol: float = option(
        1e-4,
        "Largest difference of an output that is accepted, relative to the output's largest value "
        "where that is above 1.",
    )
    opset: int = option(
        artifacts.OPSETS[0],
        f"Version of ONNX's operators, {artifacts.OPSETS[0]} to {artifacts.OPSETS[-1]}.",
    )
    force_zero: bool = option(
        False, "Set all example weights to 0 first, and report what that costs."
    )
    input_shape: tuple[int, ...] | None = option(
        None,
        "Shape of one input; by default that of the data or the preprocessing, else height and "
        "width are left free.",
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.to not in SUFFIXES:
            listed = ", ".join(SUFFIXES)
            raise ConfigError(f"--to: {self.to!r} is not known. Use one of: {listed}.", name="to")
        if self.samples < 2:
            raise ConfigError(f"--samples: {self.samples}, expected at least 2.", name="samples")
        if not 0 < self.atol < float("inf"):
            raise ConfigError(f"--atol: {self.atol}, expected a number above 0.", name="atol")
        if self.opset not in artifacts.OPSETS:
            raise ConfigError(
                f"--opset: {self.opset}, expected {artifacts.OPSETS[0]} to {artifacts.OPSETS[-1]}.",
                name="opset",
            )
        if self.input_shape is not None and not all(0 < s <= 16384 for s in self.input_shape):
            raise ConfigError(
                f"--input-shape: {self.input_shape}, expected sizes from 1 to 16384.",
                name="input_shape",
            )


@dataclass(frozen=True)
class _Inputs:
    """What the forms are compared on."""

    x: Tensor
    images: Images | None
    index: np.ndarray
    preprocessing: Preprocessing | None
    notes: list[str]
    #: Some of another height and width, where both are free, and the shape that is sure to run.
    other: Tensor | None = None
    usual: tuple[int, ...] = ()


def export(
    checkpoint: str | Path,
    *,
    to: str = "onnx",
    model: str | ModelRecipe | None = None,
    data: str | None = None,
    recipe: ExportRecipe | None = None,
    source: DataRecipe | None = None,
    workers: int = -1,
    seed: int = 0,
    command_line: str = "",
    track: Track = silent,
) -> Export:
    """Turn a checkpoint into a form that runs without bnfix, and verify it against the model.

    ``onnx``: standard operators, free batch size. ``pt2``: `torch.export`, free batch size. Both
    with layers of weight 0 folded into the convolutions before them. ``folded``: a state dict with
    all norms folded, and the file that loads it. ``plain``: one Python file with the layer and a
    loader, and the stock state dict beside it. All of it happens on the CPU, in float32.

    Args:
        checkpoint: the file.
        to: the form; of no effect where a recipe is given.
        model: spec; by default what the checkpoint carries.
        data: DATA whose images are verified on; without it seeded noise is used.
        recipe: all options of the form.
        source: labels and preprocessing.
        workers: processes that decode images.
        seed: of the draw.
        command_line: as typed, for the report.
        track: how progress is shown.

    Returns:
        What was made, with its verification; ``save`` writes it.

    Raises:
        ModelError: if the model cannot be exported so, or the form differs by more than ``atol``.
    """
    recipe = recipe or ExportRecipe(to)
    source = source or DataRecipe(labels="none")
    check_seed(seed)
    if recipe.to == "onnx":
        artifacts.require_onnx()
    wanted = model if isinstance(model, ModelRecipe) else ModelRecipe(model)
    loaded = load_one(checkpoint, wanted, RunOptions("cpu"))
    net = loaded.model.eval()
    live = [name for name, layer in generalized_norms(net) if layer.live]
    if recipe.to == "folded" and live and not recipe.force_zero:
        raise ModelError(
            f"--to folded: {len(live)} layers weigh the example and cannot be folded: "
            f"{some(live)}. Use --to onnx, pt2 or plain, or --force-zero."
        )
    inputs = _inputs(loaded, data, recipe, source, workers, seed, track)
    names = names_of(net, inputs.x[:2])
    cost: Agreement | None = None
    models: tuple[Evaluated, ...] = ()
    if recipe.force_zero and live:
        cost, models = _zero_(loaded, inputs, names, source, workers, seed, track)
    free = inputs.other is not None
    made = Making(loaded, recipe.to, recipe.opset, inputs.x[:2], names, free_size=free)
    with _free_size(inputs):
        content, companion, runner = made.run()
    reference = artifacts.torch_runner(net)
    found = agreement(reference, runner, inputs.x, names)
    _check(found, recipe, made, inputs, inputs.x)
    if inputs.other is not None:
        with _free_size(inputs):
            elsewhere = agreement(reference, runner, inputs.other, names, timed=False)
            _check(elsewhere, recipe, made, inputs, inputs.other)
    notes = [*loaded.checkpoint.notes, *inputs.notes, *made.notes]
    report = Report(
        command="export",
        data=_data_used(inputs),
        models=models,
        layers=layer_rows(net, {}, {}),
        assumptions=tuple(dict.fromkeys(notes)),
        options={
            **dataclasses.asdict(recipe),
            "preprocessing": inputs.preprocessing and dataclasses.asdict(inputs.preprocessing),
        },
        seed=seed,
        command_line=command_line,
        versions={**versions(), **artifacts.versions(recipe.to)},
    )  # fmt: skip
    return Export(
        to=recipe.to,
        content=content,
        companion=companion,
        report=report,
        agreement=found,
        atol=recipe.atol,
        inputs="noise" if inputs.images is None else "images",
        input_shape=tuple(inputs.x.shape[1:]),
        other_shape=None if inputs.other is None else tuple(inputs.other.shape[1:]),
        opset=recipe.opset if recipe.to == "onnx" else None,
        operators=made.operators,
        folding=made.folding,
        live=() if recipe.force_zero else tuple(live),
        zeroed=tuple(live) if recipe.force_zero else (),
        cost=cost,
    )


def plan_export(
    checkpoint: str | Path,
    output: Path,
    *,
    model: ModelRecipe,
    recipe: ExportRecipe,
    data: str | None = None,
) -> dict[str, Any]:
    """What `export` would do, without doing it."""
    net = load_one(checkpoint, model, RunOptions("cpu")).model
    n_examples = None if data is None else len(open_images(data, labels="none"))
    return {
        "command": "export",
        "plan": True,
        "to": recipe.to,
        "output": str(output),
        "files": [str(path) for path in Export.files(recipe.to, output)],
        "n_norms": len(layer_rows(net, {}, {})),
        "n_live": 0 if recipe.force_zero else n_live(net),
        "data": None if data is None else {"spec": data, "n_examples": n_examples},
        "options": dataclasses.asdict(recipe),
        # Of the model and of the form; tracing takes what it takes, which no batch tells.
        **Estimate(None, peak_memory(net), 2).to_json(),
    }


def _inputs(
    loaded: Loaded,
    data: str | None,
    recipe: ExportRecipe,
    source: DataRecipe,
    workers: int,
    seed: int,
    track: Track,
) -> _Inputs:
    """Images of the data, or seeded noise."""
    stated, notes = resolve_preprocessing(loaded, source)
    if data is None:
        made = _noise(loaded.model, recipe, stated, seed)
        by_size = known_shape(loaded.model, stated) == tuple(made.x.shape[1:])
        made.notes.extend(notes if by_size and recipe.input_shape is None else ())
        return made
    images = open_images(
        data,
        class_map=None if source.class_map is None else Path(source.class_map),
        labels=source.labels if recipe.force_zero else "none",
        channels=stated.channels,
    )
    refuse_image_options(images, source)
    preprocessing, notes = applied(images, stated, notes)
    rng = np.random.default_rng(seed)
    index = rng.permutation(len(images))[: recipe.samples]
    batches = _tracked(images, index, preprocessing, source, workers, "reading images", track)
    read = []
    for batch in batches:
        if not isinstance(batch.x, Tensor):
            raise ModelError(
                f"export: {data} gives {runtime.described(batch.x)}, expected one tensor as input."
            )
        _check_size(recipe, tuple(batch.x.shape[1:]))
        read.append(batch)
    x = torch.cat([batch.x for batch in read])
    index = np.concatenate([batch.index for batch in read])
    # Where labels have no use, none are read.
    unused = set() if recipe.force_zero else {"unused labels"}
    used = (note for note in images.notes if getattr(note, "kind", "") not in unused)
    notes += [f"{data}: {note}." for note in used]
    notes += describe_skipped([batches])
    if len(x) < 2:
        raise ModelError(f"{data}: {len(x)} usable images, expected at least 2 to verify on.")
    with guards.inference(loaded.model):
        runtime.run(loaded.model, x[:2], torch.device("cpu"))
    return _Inputs(x=x, images=images, index=index, preprocessing=preprocessing, notes=notes)


def _noise(
    model: nn.Module, recipe: ExportRecipe, preprocessing: Preprocessing, seed: int
) -> _Inputs:
    """Seeded noise, of two sizes where the size is not known and the form could fix one."""
    if recipe.input_shape is not None:
        _check_size(recipe, recipe.input_shape)
    known = known_shape(model, preprocessing)
    probe = example_input(model, recipe.input_shape, known)
    if probe is None:
        raise ModelError(
            "export: no usual input size fits the model. Give --data, or --input-shape C,H,W."
        )
    shape = tuple(probe.shape[1:])
    free = recipe.to in ("onnx", "pt2") and shape not in (recipe.input_shape, known)
    # Sides that differ, of maps above 1: what is traced on a 1 takes it for a constant.
    shapes = [shape] if not free else [(shape[0], n * shape[1], (n + 1) * shape[2]) for n in (2, 3)]
    for made in shapes:
        _check_size(recipe, made)
    generator = torch.Generator().manual_seed(seed)
    counts = (recipe.samples, min(recipe.samples, 7))
    x, *more = (
        torch.randn(n, *made, generator=generator) for n, made in zip(counts, shapes, strict=False)
    )
    words = " and ".join("x".join(map(str, made)) for made in shapes)
    notes = [f"verified on seeded noise of {words}, since no --data was given."]
    inputs = _Inputs(
        x=x,
        images=None,
        index=np.arange(0),
        preprocessing=preprocessing,
        notes=notes,
        other=more[0] if free else None,
        usual=shape,
    )
    with _free_size(inputs):
        for some_inputs in (x, *more):
            names_of(model, some_inputs[:2])
    return inputs


@contextmanager
def _free_size(inputs: _Inputs) -> Iterator[None]:
    """Ask for the size where a form cannot have a free height and width."""
    try:
        yield
    except CALL_ERRORS as error:
        if inputs.other is None:
            raise
        shape = ",".join(map(str, inputs.usual))
        reason = str(error) if isinstance(error, ModelError) else one_line(error)
        raise ModelError(
            "export: the size of the network's input is not known, and it cannot have a free "
            f"height and width ({reason.rstrip('.')}). Give --input-shape C,H,W, for example "
            f"{shape}, on which the network runs; or --data."
        ) from error


def _check_size(recipe: ExportRecipe, shape: tuple[int, ...]) -> None:
    """Refuse inputs that would fill the memory, before they do."""
    if recipe.samples * prod(shape) > _MOST_VALUES:
        raise ConfigError(
            f"--samples: {recipe.samples} inputs of {'x'.join(map(str, shape))} take more than "
            f"{4 * _MOST_VALUES >> 30} GiB. Give fewer, or smaller ones.",
            name="samples",
        )


def _tracked(
    images: Images,
    index: np.ndarray,
    preprocessing: Preprocessing | None,
    source: DataRecipe,
    workers: int,
    stage: str,
    track: Track,
) -> Tracked:
    batches = Batches(
        images,
        index,
        preprocessing,
        batch_size=16,
        workers=workers,
        max_bad=source.max_bad,
        corruption=corruption_of(source.corrupt),
    )
    return Tracked(batches, stage, track)


def _zero_(
    loaded: Loaded,
    inputs: _Inputs,
    names: list[str],
    source: DataRecipe,
    workers: int,
    seed: int,
    track: Track,
) -> tuple[Agreement, tuple[Evaluated, ...]]:
    """Set all example weights to 0, and measure what that changes."""
    before = copy.deepcopy(loaded.model)
    set_example_weight_(loaded.model, 0.0)
    runners = artifacts.torch_runner(before), artifacts.torch_runner(loaded.model)
    with guards.state_kept(before), guards.state_kept(loaded.model):
        cost = agreement(*runners, inputs.x, names, timed=False, batch_sizes=(16,))
    if inputs.images is None or inputs.images.labels is None:
        return cost, ()
    index = np.random.default_rng(seed).permutation(len(inputs.images))[:_COST_EXAMPLES]
    models = []
    for name, net in (("as it was", before), ("all weights 0", loaded.model)):
        stage = f"evaluating {name}"
        batches = _tracked(
            inputs.images, index, inputs.preprocessing, source, workers, stage, track
        )
        metrics = evaluate(net, batches, seed=seed)
        models.append(
            Evaluated(name=name, file=None, sha256=None, metrics=metrics, n_live=n_live(net))
        )
    return cost, tuple(models)


def _data_used(inputs: _Inputs) -> DataUsed | None:
    if inputs.images is None:
        return None
    record = data_record(inputs.images, inputs.index)
    return DataUsed(record["spec"], len(inputs.x), record["fingerprint"])


def _check(
    found: Agreement, recipe: ExportRecipe, made: Making, inputs: _Inputs, x: Tensor
) -> None:
    """Refuse a form that is not the model's equal."""
    if found.relative_difference <= recipe.atol:
        return
    i = found.worst_example
    where = made.suspect(x[[i, (i + 1) % len(x)]], recipe.atol)
    name = "noise" if inputs.images is None else inputs.images.name(int(inputs.index[i]))
    suspect = f"suspect layer: {where}."
    if not where and found.relative_difference < _ROUNDING:
        enough = float(f"{1.1 * found.relative_difference:.1e}")
        suspect = (
            "every layer agrees by itself, so it is rounding that adds up. "
            f"Give --atol {enough:g} to accept it."
        )
    elif not where:
        suspect = "every layer agrees by itself, so suspect what is computed between them."
    raise ModelError(
        f"--to {recipe.to}: output {found.worst_output!r} of example {i} ({name}) differs by "
        f"{found.max_difference:.2g}, more than --atol {recipe.atol:g} accepts "
        f"({recipe.atol * max(1.0, found.largest_output):.2g}, as that output is up to "
        f"{found.largest_output:.3g}); {suspect} Nothing was written."
    )
