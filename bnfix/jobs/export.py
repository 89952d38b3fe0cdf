"""`export`: write a checkpoint as ONNX, `torch.export`, folded or plain weights, and verify it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.save import versions
from bnfix.core import guards, runtime
from bnfix.core.errors import ConfigError, ModelError, one_line
from bnfix.core.options import check_seed, one_of, option, require
from bnfix.core.settings import DataRecipe, GateRecipe, ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batch
from bnfix.data.corruptions import corruption_of
from bnfix.data.open import open_images
from bnfix.deploy import forms
from bnfix.deploy.exported import with_header
from bnfix.deploy.forms import Agreement, agreement, names_of, torch_runner
from bnfix.jobs.convert import CALL_ERRORS, example_input, known_shape
from bnfix.jobs.fits import ORIGINAL
from bnfix.jobs.inputs import (
    Inputs,
    Track,
    Tracked,
    as_inputs,
    data_used,
    describe_skipped,
    open_stated,
    resolve_preprocessing,
    silent,
)
from bnfix.jobs.plan import cost_json
from bnfix.jobs.quantize import open_bench, quantize, refuse_live
from bnfix.jobs.session import Plan, load_one
from bnfix.metrics.evaluate import evaluate
from bnfix.norm.layer import generalized_norms, set_example_weight_
from bnfix.report.records import Evaluated, describe_neighbours, layer_rows, n_live
from bnfix.report.report import Report
from bnfix.report.result import SUFFIXES, Export, Verified

#: Most labelled examples for measuring the cost of `--force-zero`.
_COST_EXAMPLES: Final = 1000
#: A difference below this, relative to the output, can be rounding.
_ROUNDING: Final = 1e-3
#: Most numbers in all inputs together.
_MOST_VALUES: Final = 1 << 30


@dataclass(frozen=True)
class ExportRecipe:
    """The form of an export, and how strictly it is verified."""

    to: str = option("onnx", "Form to write: " + ", ".join(SUFFIXES) + ".")
    samples: int = option(64, "Inputs to verify on, drawn in seeded random order.")
    atol: float = option(
        1e-4,
        "Largest accepted difference of an output, relative to the output's largest value if that "
        "is above 1.",
    )
    opset: int = option(
        forms.OPSETS[0], f"ONNX operator set, {forms.OPSETS[0]} to {forms.OPSETS[-1]}."
    )
    max_drop: float | None = option(
        None, "With onnx-int8: write only if top-1 provably drops by less than this, in points."
    )
    force_zero: bool = option(False, "First set weights and gates to 0, and report the cost.")
    input_shape: tuple[int, ...] | None = option(
        None,
        "Shape of one input; by default from the data or the preprocessing, else with free height "
        "and width.",
    )

    def __post_init__(self) -> None:
        """Check ranges."""
        one_of(self.to, tuple(SUFFIXES), "--to")
        opsets, shape, drop = forms.OPSETS, self.input_shape, self.max_drop
        expected = {
            "samples": (self.samples >= 2, "at least 2"),
            "atol": (0 < self.atol < float("inf"), "a number above 0"),
            "opset": (self.opset in opsets, f"{opsets[0]} to {opsets[-1]}"),
            "max_drop": (drop is None or 0 < drop <= 100, "above 0, at most 100"),
            "input_shape": (
                not shape or 0 < min(shape) <= max(shape) <= 16384,
                "sizes from 1 to 16384",
            ),
        }
        for name, (good, words) in expected.items():
            flag = f"--{name.replace('_', '-')}"
            require(good, f"{flag}: {getattr(self, name)}, expected {words}.", name)


@dataclass(frozen=True)
class _Inputs:
    """The inputs on which the form is compared with the model."""

    x: Tensor
    preprocessing: Preprocessing | None
    notes: list[str]
    data: Inputs | None = None  # none: noise
    index: np.ndarray | None = None  # of the images that `x` holds
    #: Inputs of another height and width, if both are free, and a shape that surely runs.
    other: Tensor | None = None
    usual: tuple[int, ...] = ()

    @contextmanager
    def free_size(self) -> Iterator[None]:
        """Ask for the size if a form cannot have a free height and width."""
        try:
            yield
        except CALL_ERRORS as error:
            if self.other is None or self.data is not None:
                raise
            shape = ",".join(map(str, self.usual))
            raise ModelError(
                "export: the network's input size is not known, and its height and width cannot be "
                f"free ({_reason(error).rstrip('.')}). Give --data, or --input-shape C,H,W: the "
                f"network runs on {shape}, for example."
            ) from error


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
    fold layers with weight 0 into the preceding convolutions. ``folded``: a state dict with all
    norms folded, and the file that loads it. ``plain``: one Python file with the layer and a
    loader, plus the stock state dict. ``onnx-int8``: ``onnx`` quantized to 8 bits, calibrated on
    one part of the data and judged on another. Everything runs on the CPU.

    Args:
        checkpoint: the file.
        to: the form; ignored if a recipe is given.
        model: spec; by default the one stored in the checkpoint.
        data: DATA to verify on; without it, seeded noise. ``onnx-int8`` needs it.
        recipe: all options of the form.
        source: labels and preprocessing.
        workers: processes that decode images.
        seed: for the draw of inputs.
        command_line: as typed, for the report.
        track: how progress is shown.

    Returns:
        The form with its verification; ``save`` writes it.

    Raises:
        ConfigError: if ``test`` is given and nothing is judged on it.
        ModelError: if the model has no such form, or the form differs by more than ``atol``.
    """
    recipe = recipe or ExportRecipe(to)
    is_int8, max_drop, bench = recipe.to == "onnx-int8", recipe.max_drop, None
    source = source or DataRecipe(labels="auto" if is_int8 else "none")
    check_seed(seed)
    if recipe.to in ("onnx", "onnx-int8"):
        forms.require_onnx(f"--to {recipe.to}")
    for name, value in {"--test": source.test, "--max-drop": max_drop}.items():
        if value is not None and not is_int8:
            raise ConfigError(f"{name}: works only with --to onnx-int8. Leave it out.")
    wanted = model if isinstance(model, ModelRecipe) else ModelRecipe(model)
    loaded = load_one(checkpoint, wanted, RunOptions("cpu"))
    if not recipe.force_zero:
        refuse_live(loaded.model.eval(), recipe.to)
    if is_int8:
        plan = Plan("export", command_line, wanted, source, gate=GateRecipe(seed=seed))
        bench = open_bench(checkpoint, data, plan, workers, max_drop=max_drop, track=track)
        recipe = replace(recipe, to="onnx", max_drop=None)
    job = _Job(loaded, recipe, source, workers=workers, seed=seed, track=track)
    made = job.made(data, command_line)
    return made if bench is None else quantize(made, bench, max_drop)


def plan_export(
    checkpoint: str | Path,
    output: Path,
    *,
    model: ModelRecipe,
    recipe: ExportRecipe,
    data: str | None = None,
) -> dict[str, Any]:
    """The plan of an `export` as JSON values, without doing it."""
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
        "options": asdict(recipe),
        # Twice the weights, for model and form; the time for tracing cannot be predicted.
        **cost_json(None, net, 2),
    }


@dataclass(frozen=True)
class _Job:
    """One export: the model, and how its inputs are read."""

    loaded: Loaded
    recipe: ExportRecipe
    source: DataRecipe
    workers: int
    seed: int
    track: Track

    @property
    def classes(self) -> bool:
        """Whether outputs (N, K) are class scores: yes, unless the header names another task."""
        task = self.loaded.origin.task
        return task is None or task.task == "classification"

    def made(self, data: str | None, command_line: str) -> Export:
        """The form, verified."""
        recipe, net = self.recipe, self.loaded.model
        live = tuple(name for name, layer in generalized_norms(net) if layer.live)
        inputs = self.noise() if data is None else self.images(data)
        names = names_of(net, inputs.x[:2])
        cost, models = self.zero_(inputs, names) if recipe.force_zero and live else (None, ())
        try:
            made, content, companion, found = self.form(inputs, names)
        except CALL_ERRORS as error:
            if inputs.other is None or inputs.data is None:
                raise
            # Map outputs should allow any size, but the images' own size is enough.
            size = "x".join(map(str, inputs.x.shape[2:]))
            inputs = replace(inputs, other=None)
            made, content, companion, found = self.form(inputs, names)
            reason = f"takes inputs of {size} only, since another size failed: {_reason(error)}"
            made.notes.append(reason)
        if recipe.to == "onnx":
            content = with_header(content, self.loaded.origin, inputs.preprocessing)
        notes = [*self.loaded.checkpoint.notes, *inputs.notes, *made.notes]
        shaped, data_of = inputs.preprocessing and asdict(inputs.preprocessing), inputs.data
        report = Report(
            command="export",
            data=None if data_of is None else data_used(data_of.images, inputs.index),
            models=models,
            layers=layer_rows(net, {}, {}),
            assumptions=tuple(dict.fromkeys([*notes, *describe_neighbours(net)])),
            options={**asdict(recipe), "preprocessing": shaped},
            seed=self.seed,
            command_line=command_line,
            versions={**versions(), **forms.versions(recipe.to)},
        )
        return Export(
            to=recipe.to,
            content=content,
            companion=companion,
            report=report,
            verified=Verified(
                agreement=found,
                atol=recipe.atol,
                inputs="noise" if inputs.data is None else "images",
                input_shape=tuple(inputs.x.shape[1:]),
                other_shape=None if inputs.other is None else tuple(inputs.other.shape[1:]),
            ),
            opset=recipe.opset if recipe.to == "onnx" else None,
            operators=made.operators,
            folding=made.folding,
            live=() if recipe.force_zero else live,
            zeroed=live if recipe.force_zero else (),
            cost=cost,
        )

    def form(
        self, inputs: _Inputs, names: list[str]
    ) -> tuple[forms.Making, bytes, bytes | None, Agreement]:
        """Make the form, and compare it with the model on all inputs."""
        recipe, net, free = self.recipe, self.loaded.model, inputs.other is not None
        # The tracer treats equal sides as one size, and images can have equal sides.
        example = inputs.x if inputs.other is None or inputs.data is None else inputs.other
        made = forms.Making(
            self.loaded, recipe.to, recipe.opset, example[:2], names=names, free_size=free
        )
        with inputs.free_size():
            content, companion, runner = made.run()
        compare = partial(agreement, torch_runner(net), runner, names=names, classes=self.classes)
        found = compare(inputs=inputs.x)
        self.check(found, made, inputs, inputs.x)
        if inputs.other is not None:
            with inputs.free_size():
                elsewhere = compare(inputs=inputs.other, timed=False)
                self.check(elsewhere, made, inputs, inputs.other)
        return made, content, companion, found

    def elsewhere(self, x: Tensor, output: Any) -> Tensor | None:
        """The images at a second size, if the form can take both and the outputs are maps."""
        maps = [t.ndim == 4 and min(t.shape[2:]) > 1 for t in runtime.tensors_in(output)]
        image = x.ndim == 4 and x.is_floating_point()
        if self.recipe.to not in ("onnx", "pt2") or not image or not (maps and all(maps)):
            return None
        height, width = x.shape[2:]
        # Multiples of the size, in case the network needs them, with sides that differ.
        larger = (2 * height, width) if 2 * height != width else (3 * height, width)
        return functional.interpolate(x[:7], size=larger)

    def images(self, data: str) -> _Inputs:
        """Some of the data's images, in seeded random order."""
        recipe = self.recipe
        labels = self.source.labels if recipe.force_zero else "none"
        source = replace(self.source, labels=labels)
        stated, notes = resolve_preprocessing(self.loaded, source)
        images = open_stated(data, source, stated.channels)
        inputs = as_inputs(images, stated, notes, source)
        index = np.random.default_rng(self.seed).permutation(len(images))[: recipe.samples]
        batches, read = self._batches(inputs, index, "reading images"), list[Batch]()
        for batch in batches:
            if not isinstance(batch.x, Tensor):
                kind = runtime.described(batch.x)
                raise ModelError(
                    f"export: {data} gives {kind}, expected one tensor as input. Leave out "
                    "--data and give --input-shape, such as 8,50 for sequences (8, 50)."
                )
            self._check_size(tuple(batch.x.shape[1:]))
            read.append(batch)
        x = torch.cat([batch.x for batch in read])
        # Without --force-zero no labels are read, so notes on unused labels would mislead.
        unused = set() if recipe.force_zero else {"unused labels"}
        used = (note for note in images.notes if getattr(note, "kind", "") not in unused)
        notes = [*inputs.notes, *(f"{data}: {note}." for note in used)]
        if len(x) < 2:
            raise ModelError(f"{data}: {len(x)} usable images, expected at least 2 to verify on.")
        with guards.inference(self.loaded.model):
            output = runtime.run(self.loaded.model, x[:2], torch.device("cpu"))
        return _Inputs(
            x=x,
            preprocessing=inputs.preprocessing,
            notes=[*notes, *describe_skipped([batches])],
            data=inputs,
            index=np.concatenate([batch.index for batch in read]),
            other=self.elsewhere(x, output),
        )

    def noise(self) -> _Inputs:
        """Seeded noise, in two sizes if the size is unknown and the form could fix one."""
        recipe, model = self.recipe, self.loaded.model
        preprocessing, by_preprocessing = resolve_preprocessing(self.loaded, self.source)
        if recipe.input_shape is not None:
            self._check_size(recipe.input_shape)
        known = known_shape(model, preprocessing)
        probe = example_input(model, recipe.input_shape, known)
        if probe is None:
            raise ModelError(
                "export: no usual input size fits the model. Give --data, or --input-shape C,H,W."
            )
        usual = tuple(probe.shape[1:])
        free = recipe.to in ("onnx", "pt2") and usual not in (recipe.input_shape, known)
        # Sides differ, and maps stay above 1: the tracer treats a 1 as a constant.
        scales = [(1, 2, 3), (1, 3, 4)] if free else [(1,) * len(usual)]
        shapes = [tuple(np.multiply(usual, scale).tolist()) for scale in scales]
        generator = torch.Generator().manual_seed(self.seed)
        made = []
        for shape, n in zip(shapes, (recipe.samples, min(recipe.samples, 7)), strict=False):
            self._check_size(shape)
            made.append(torch.randn(n, *shape, generator=generator))
        words = " and ".join("x".join(map(str, shape)) for shape in shapes)
        notes = [f"verified on seeded noise of {words}, since no --data was given."]
        notes += by_preprocessing if known == usual and recipe.input_shape is None else ()
        inputs = _Inputs(
            x=made[0],
            preprocessing=preprocessing,
            notes=notes,
            other=made[1] if free else None,
            usual=usual,
        )
        with inputs.free_size():
            for x in made:
                names_of(model, x[:2])
        return inputs

    def _check_size(self, shape: tuple[int, ...]) -> None:
        """Refuse inputs that would fill the memory."""
        if (n := self.recipe.samples) * prod(shape) > _MOST_VALUES:
            raise ConfigError(
                f"--samples: {n} inputs of {'x'.join(map(str, shape))} take more than "
                f"{4 * _MOST_VALUES >> 30} GiB. Give fewer, or smaller ones.",
                name="samples",
            )

    def _batches(self, inputs: Inputs, index: np.ndarray, stage: str) -> Tracked:
        run = RunOptions("cpu", workers=self.workers)
        batches = inputs.batches(index, run, 16, corruption_of(self.source.corrupt))
        return Tracked(batches, stage, self.track)

    def zero_(self, inputs: _Inputs, names: list[str]) -> tuple[Agreement, tuple[Evaluated, ...]]:
        """Set all example weights to 0, and measure the change."""
        after = self.loaded.model
        before = copy.deepcopy(after)
        set_example_weight_(after, 0.0, batch_weight=0.0)
        for _, layer in generalized_norms(after):
            layer.gates = None
        runners = torch_runner(before), torch_runner(after)
        with guards.state_kept(before), guards.state_kept(after):
            how: Any = {"timed": False, "batch_sizes": (16,), "classes": self.classes}
            cost = agreement(*runners, inputs.x, names, **how)
        data = inputs.data
        if data is None or not data.images.labelled:
            return cost, ()
        index = np.random.default_rng(self.seed).permutation(len(data.images))[:_COST_EXAMPLES]
        models = []
        for name, net in ((ORIGINAL, before), ("all weights 0", after)):
            batches = self._batches(data, index, f"evaluating {name}")
            metrics = evaluate(net, batches, seed=self.seed)
            models.append(Evaluated(name, None, None, metrics, n_live=n_live(net)))
        return cost, tuple(models)

    def check(self, found: Agreement, made: forms.Making, inputs: _Inputs, x: Tensor) -> None:
        """Refuse a form whose outputs differ from the model's."""
        atol = self.recipe.atol
        if found.relative_difference <= atol:
            return
        i = found.worst_example
        where = made.suspect(x[[i, (i + 1) % len(x)]], atol)
        data, index = inputs.data, inputs.index
        name = "noise" if data is None or index is None else data.images.name(int(index[i]))
        suspect = f"suspect layer: {where}."
        if not where:
            enough = float(f"{1.1 * found.relative_difference:.1e}")
            so = "suspect the operations between the layers"
            if found.relative_difference < _ROUNDING:
                so = f"rounding errors add up. Give --atol {enough:g} to accept it"
            suspect = f"every single layer agrees, so {so}."
        raise ModelError(
            f"--to {self.recipe.to}: output {found.worst_output!r} of example {i} ({name}) differs "
            f"by {found.max_difference:.2g}, more than --atol {atol:g} accepts "
            f"({atol * max(1.0, found.largest_output):.2g}, since that output reaches "
            f"{found.largest_output:.3g}); {suspect} Nothing was written."
        )


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, ModelError) else one_line(error)
