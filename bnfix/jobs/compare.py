"""`eval`: compare checkpoints on the same examples, which are read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import nn

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import require_file
from bnfix.checkpoints.save import versions
from bnfix.core import distributed, runtime
from bnfix.core.errors import DataError, ModelError, count
from bnfix.core.memory import BatchSize, first_of, footprint
from bnfix.core.options import CORRUPTIONS, SEVERITIES, check_seed, require
from bnfix.core.settings import DataRecipe, EvaluationRecipe, ModelRecipe, RunOptions
from bnfix.data.corruptions import Corruption, corruption_of, every_corruption
from bnfix.data.images import Images
from bnfix.data.splits import describe_groups, describe_unlisted, seen_before
from bnfix.deploy.exported import is_exported
from bnfix.deploy.fuse import fused
from bnfix.jobs.inputs import (
    Inputs,
    Track,
    Tracked,
    data_used,
    describe_corruption,
    evaluation_batch_size,
    open_inputs,
    silent,
)
from bnfix.jobs.plan import estimated_evaluation
from bnfix.jobs.session import load_one
from bnfix.metrics import robustness
from bnfix.metrics.beside import check_logits, custom_metrics, import_metric, uncertain
from bnfix.metrics.evaluate import Outputs, collect, describe_left_out, measured
from bnfix.metrics.task import ByRows
from bnfix.recalibrate.targets import take_domain_
from bnfix.report.records import (
    Evaluated,
    describe_neighbours,
    drifts_between,
    layer_rows,
    n_live,
    statistics_of,
)
from bnfix.report.report import Report, check_predictions, table_of, write_predictions

#: Images that batch invariance is checked on.
N_COMPARED = 256
#: Images that are cut into tiles.
N_TILED = 16
#: Images that a faster copy is checked on.
N_CHECKED = 8
#: Part of the labelled examples that can also be measured ones: many collections hold copies.
_SHARED = 0.05
_STATED = ("corrupt", "groups", "domain")
_T = TypeVar("_T")


def evaluate_files(
    checkpoints: Sequence[str | Path],
    *,
    data: str,
    model: str | ModelRecipe | None = None,
    source: DataRecipe | None = None,
    run: RunOptions | None = None,
    also: EvaluationRecipe | None = None,
    predictions: Path | None = None,
    force: bool = False,
    seed: int = 0,
    track: Track = silent,
    command_line: str = "",
) -> Report:
    """Measure checkpoints on the same examples, each paired against the first.

    Checkpoints with the same preprocessing share one pass over the data. Every image is read and
    decoded once.

    Args:
        checkpoints: one or more files.
        data: DATA.
        model: spec for every checkpoint; by default the one that each file stores.
        source: labels and preprocessing.
        run: device and batch size.
        also: further measurements.
        predictions: file for each model's prediction per example, ``.csv`` or ``.parquet``.
        force: replace that file if it exists.
        seed: for the intervals, the noise, and the images compared in other batches.
        track: how progress is shown.
        command_line: as typed, for the report.

    Returns:
        The report.

    Raises:
        ConfigError: if there is no checkpoint, or options exclude each other.
    """
    check_seed(seed)
    recipe = model if isinstance(model, ModelRecipe) else ModelRecipe(model)
    source, run, also = source or DataRecipe(), run or RunOptions(), also or EvaluationRecipe()
    require(bool(checkpoints), "eval: no checkpoint given.", "checkpoints")
    words = "--corruptions: cannot be combined with --corrupt. Leave one of them out."
    require(not also.corruptions or source.corrupt is None, words, "corruptions")
    streams = () if also.streams is None else robustness.streams_of(also.streams)
    functions = [import_metric(spec) for spec in also.metric]
    if predictions is not None:
        check_predictions(predictions, force=force)
    notes: list[str] = []
    entrants = enter(checkpoints, data, recipe, source, run, bool(functions), notes)
    inputs = entrants[0].inputs
    notes += describe_groups(inputs.images, splits=False)
    for name, wanted in (("corruptions", also.corruptions), ("streams", streams)):
        words = f"--{name}: the examples have no labels. Give labels."
        require(not wanted or inputs.images.labelled, words, name)
    words = "--streams: orders by class need classification. Leave it out."
    require(not streams or not isinstance(inputs.task, ByRows), words, "streams")
    words = f"--corruptions: {data} holds no images. Leave it out."
    require(not also.corruptions or inputs.preprocessing is not None, words, "corruptions")
    entrants = hasten(entrants, run.precision, seed, notes) if also.fast else entrants
    arena = Arena(entrants, run, seed, track)
    labelled = arena.labelled(also.estimate_from, source)
    corruption = corruption_of(source.corrupt, seed)
    found = arena.outputs("evaluating", corruption, bool(functions))
    found[0].refuse_own_loss()
    own = custom_metrics(functions, found, seed=seed) if functions else [()] * len(found)
    if predictions is not None:
        _write_predictions(predictions, entrants, found)
    notes += [*describe_corruption(source), *describe_left_out(found)]
    models = tuple(
        Evaluated(
            name=one.name,
            file=one.path,
            sha256=one.loaded.checkpoint.sha256,
            metrics=measured(outputs, seed),
            n_live=n_live(one.loaded.model),
            custom=custom,
            preprocessing=one.inputs.preprocessing,
            classified=outputs.classified or isinstance(outputs.task, ByRows),
        )
        for one, custom, outputs in zip(entrants, own, found, strict=True)
    )
    options = {
        "preprocessing": (last := models[-1].preprocessing) and dataclasses.asdict(last),
        **{k: v for one in (source, recipe) for k in _STATED if (v := getattr(one, k, None))},
        **{name: value for name, value in dataclasses.asdict(also).items() if value},
    }
    return dataclasses.replace(
        _report(arena, models, notes, source.corrupt),
        options=options,
        seed=seed,
        command_line=command_line,
        corruptions=tuple(arena.shifted()) if also.corruptions else (),
        invariance=tuple(arena.invariance()) if also.compare_batch_sizes else (),
        streams=tuple(arena.streamed(streams, corruption)),
        tiles=() if also.tiles is None else tuple(arena.tiled(also.tiles, corruption)),
        uncertainty=uncertain(found, labelled, also, seed),
    )


def _report(
    arena: Arena, models: tuple[Evaluated, ...], notes: Sequence[str], corruption: str | None
) -> Report:
    """The report on models with the same examples; the layers are the last model's."""
    images = arena.entrants[-1].inputs.images
    history = [entry for one in arena.entrants for entry in one.loaded.origin.history]
    first, last = (arena.entrants[k].loaded.model for k in (0, -1))
    of_data = [f"{note}." for note in images.notes]
    said = [*notes, *describe_unlisted(history), *arena.notes, *of_data]
    return Report(
        command="eval",
        data=data_used(
            images,
            passes=arena.passes,
            n_examples=models[0].metrics.n_examples,
            class_names=images.class_names,
            corruption=corruption,
        ),
        models=models,
        layers=layer_rows(last, drifts_between(statistics_of(first), statistics_of(last)), {}),
        assumptions=tuple(dict.fromkeys(said)),
        n_seen=seen_before(images, np.arange(len(images)), history),
        versions=versions(),
    )


def plan_evaluation(
    checkpoints: Sequence[str | Path],
    data: str,
    also: EvaluationRecipe | None = None,
    *,
    model: ModelRecipe | None = None,
    source: DataRecipe | None = None,
    run: RunOptions | None = None,
) -> dict[str, Any]:
    """The plan of `evaluate_files`, with its cost estimated from a few batches per model."""
    for path in checkpoints:
        require_file(Path(path))
    source, run, also = source or DataRecipe(), run or RunOptions(), also or EvaluationRecipe()
    n_variants = 1 + also.corruptions * len(CORRUPTIONS) * len(SEVERITIES)
    entrants = enter(checkpoints, data, model or ModelRecipe(), source, run, bool(also.metric), [])
    n_examples, few = len(entrants[0].inputs.images), []
    for one in entrants:
        size = evaluation_batch_size(run, one.loaded.model, one.inputs.size)
        index = np.arange(min(n_examples, 2 * size))
        few.append((one.loaded.model, one.inputs.lenient(len(index)).batches(index, run, size)))
    return {
        "command": "eval",
        "plan": True,
        "checkpoints": [str(path) for path in checkpoints],
        "data": {"spec": data, "n_examples": n_examples},
        **also.of_certainty,
        **estimated_evaluation(few, n_examples, n_variants, run.precision),
    }


def _write_predictions(path: Path, entrants: Sequence[Entrant], found: Sequence[Outputs]) -> None:
    check_logits("--predictions", found, groups=True)
    images, positions = entrants[0].inputs.images, found[0].positions
    examples = [] if positions is None else [images.name(int(i)) for i in positions]
    if distributed.here().is_first:
        write_predictions(path, table_of([one.name for one in entrants], examples, found))


@dataclass(frozen=True)
class Entrant:
    """A loaded checkpoint, and the data as its model sees it."""

    name: str  # short and unique
    path: str
    loaded: Loaded  # its model on the device
    inputs: Inputs  # with labels that fit its outputs
    net: nn.Module  # runs on the data: the model, or a faster copy


def enter(
    checkpoints: Sequence[str | Path],
    data: str,
    recipe: ModelRecipe,
    source: DataRecipe,
    run: RunOptions,
    own_metrics: bool,
    notes: list[str],
) -> list[Entrant]:
    """Load every checkpoint, and open the data once for each number of input channels."""
    entrants, opened = list[Entrant](), dict[int, Images]()
    for path, name in zip(checkpoints, _names(checkpoints), strict=True):
        loaded = load_one(path, dataclasses.replace(recipe, domain=None), run, exported=True)
        any_task = own_metrics and runtime.has_forward(loaded.model)
        inputs = open_inputs(loaded, data, source, opened=opened, any_task=any_task)
        said = [*loaded.checkpoint.notes, *inputs.notes, *describe_neighbours(loaded.model)]
        few = inputs.sample(N_COMPARED, loaded.model, run, 0)[1]
        notes += [f"{name}: {one}" for one in (*said, *take_domain_(loaded, recipe.domain, few))]
        entrants.append(Entrant(name, str(path), loaded, inputs, net=loaded.model))
    first, *others = (one.inputs.task for one in entrants)
    for other in others:
        words = (
            f"--task: {entrants[0].name} is judged by {first.name}, {first.words.loss}, another "
            f"file by {other.name}, {other.words.loss}. State one task for all."
        )
        require(other == first, words, "task")
    return entrants


def hasten(
    entrants: Sequence[Entrant], precision: str, seed: int, notes: list[str]
) -> list[Entrant]:
    """Replace models by faster copies for the pass over the data, where possible."""
    found = list(entrants)
    # Under autocast, the operators for prepacked weights would still run in float32.
    prepack = None if precision == "fp32" else False
    for k, one in enumerate(entrants):
        few = None if is_exported(one.path) else one.inputs.first_batch(seed)
        if few is None:
            continue
        few = first_of(few, N_CHECKED)
        try:
            net, done = fused(one.loaded.model, few, prepack=prepack)
        except ModelError as error:
            notes.append(f"{one.name}: evaluated without --fast: {error}")
        else:
            notes.append(f"{one.name}: {done.text}, on {count(len(few.index), 'images')}.")
            found[k] = dataclasses.replace(one, net=net)
    return found


class Arena:
    """Evaluates entrants on the same examples; one preprocessing means one shared pass."""

    def __init__(
        self, entrants: Sequence[Entrant], run: RunOptions, seed: int, track: Track
    ) -> None:
        self.entrants, self._run, self._seed, self._track = entrants, run, seed, track
        self._groups: dict[Any, list[int]] = {}
        for i, one in enumerate(entrants):
            labels = one.inputs.images.labels
            alike = one.inputs.preprocessing, None if labels is None else labels.tobytes()
            self._groups.setdefault(alike, []).append(i)
        self._good = np.arange(len(entrants[0].inputs.images))
        self.passes: list[Tracked] = []
        #: One sentence for each batch size that was reduced.
        self.notes: list[str] = []
        self._sizes = [self._fitting([entrants[i] for i in g]) for g in self._groups.values()]

    def _fitting(self, members: list[Entrant]) -> BatchSize:
        """The batch size of a group's passes, limited by memory."""
        run, first = self._run, members[0]
        size = evaluation_batch_size(run, first.loaded.model, first.inputs.size)
        what = "--batch-size" if len(self._groups) == 1 else f"{first.name}: --batch-size"
        found = BatchSize(size, what, self.notes, gives_way=run.batch_size is None)
        if run.batch_size is None:
            few = first.inputs.first_batch(self._seed)
            for one in members:
                found.foresee(None if few is None else footprint(one.net, few, run.precision))
        return found

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self.entrants]

    def outputs(
        self, stage: str, corruption: Corruption | None = None, any_task: bool = False
    ) -> list[Outputs]:
        """Every entrant's outputs for all examples."""

        def run(members: list[Entrant], size: int) -> list[Outputs]:
            what = members[0].name if len(members) == 1 else f"{len(members)} models"
            batches = self._batches(members[0], self._good, size, f"{stage} {what}", corruption)
            self.passes.append(batches)
            models = [one.net for one in members]
            task = members[0].inputs.task
            loose = isinstance(task, ByRows) or all(runtime.has_forward(one) for one in models)
            loose, precision = loose and any_task, self._run.precision
            return collect(models, batches, task, precision=precision, any_task=loose)

        found = self._by_group(run)
        seen = [one.positions for one in found if one.positions is not None]
        if any(not np.array_equal(positions, seen[0]) for positions in seen):
            raise DataError(
                f"{self.entrants[0].inputs.images.spec}: some images are unreadable for one model "
                "and not for another. Remove them, or give all models the same --resize and --crop."
            )
        if seen:
            self._good = np.sort(seen[0])
        return found

    def shifted(self) -> Iterator[robustness.Shifted]:
        """Measure every entrant under every corruption."""
        for corruption in every_corruption(self._seed):
            found = self.outputs(f"under {corruption.text},", corruption)
            kind, severity = corruption.kind, corruption.severity
            yield from robustness.shifted(self._names, found, kind, severity, seed=self._seed)

    def streamed(
        self, names: Sequence[str], corruption: Corruption | None
    ) -> Iterator[robustness.Shifted]:
        """Measure every entrant on batches of the same images in other orders."""
        used: list[int] = []

        def run(name: str, members: list[Entrant], size: int) -> list[Outputs]:
            labels = np.asarray(members[0].inputs.images.labels)[self._good]
            index = self._good[robustness.in_stream(name, labels, size, self._seed)]
            used.append(1 if name == "single" else size)
            batches = self._batches(members[0], index, used[-1], f"stream: {name}", corruption)
            models = [one.net for one in members]
            return collect(models, batches, precision=self._run.precision)

        for name in names:
            found = self._by_group(partial(run, name))
            yield from robustness.shifted(self._names, found, name, used[-1], seed=self._seed)

    def invariance(self) -> list[robustness.BatchInvariance]:
        """Compare some examples across several batches."""
        index = np.random.default_rng(self._seed).permutation(self._good)[:N_COMPARED]

        def run(members: list[Entrant], size: int) -> list[robustness.BatchInvariance]:
            def batches_of(positions: np.ndarray, size: int) -> Tracked:
                return self._batches(members[0], positions, size, f"batches of {size}")

            names, nets = [one.name for one in members], [one.net for one in members]
            how: Any = {"precision": self._run.precision, "seed": self._seed}
            least = min(size, max(1, len(index) // 2))
            return robustness.batch_invariance(names, nets, batches_of, index, least, **how)

        return self._by_group(run)

    def tiled(self, size: tuple[int, ...], corruption: Corruption | None) -> list[robustness.Tiled]:
        """Compare tiles with whole images, on a few images."""
        index = np.random.default_rng(self._seed).permutation(self._good)[:N_TILED]

        def run(members: list[Entrant], n: int) -> list[list[robustness.Tiled]]:
            named = "tiles against whole images"
            batches = self._batches(members[0], index, min(n, N_TILED), named, corruption).whole()
            how = batches, (size[0], size[-1]), self._run.precision
            return [robustness.tiled(one.name, one.loaded.model, *how) for one in members]

        return [row for rows in self._by_group(run) for row in rows]

    def labelled(self, data: str | None, source: DataRecipe) -> list[Outputs]:
        """Every entrant's outputs for the labelled data that an estimate starts from.

        Empty if there is none.
        """
        if data is None:
            return []
        others, opened = list[Entrant](), dict[int, Images]()
        source = dataclasses.replace(source, labels="auto", corrupt=None, groups=None)
        for one in self.entrants:
            try:
                inputs = open_inputs(one.loaded, data, source, opened=opened)
            except DataError as error:
                raise DataError(f"--estimate-from: {error}", path=error.path) from error
            known = set(inputs.images.digests())
            shared = sum(digest in known for digest in one.inputs.images.digests())
            where = f"--estimate-from {data}"
            words = f"{where}: has no labels. Give labelled examples."
            require(inputs.images.labelled, words, "estimate_from")
            words = f"{where}: {shared:,} of its examples are also in --data. Give others."
            require(shared <= _SHARED * len(known), words, "estimate_from")
            others.append(dataclasses.replace(one, inputs=inputs))
        return Arena(others, self._run, self._seed, self._track).outputs("estimating by")

    def _by_group(self, run: Callable[[list[Entrant], int], list[_T]]) -> list[_T]:
        """Run once per group; the results are in the order of the entrants."""
        found: dict[int, _T] = {}
        for group, size in zip(self._groups.values(), self._sizes, strict=True):
            members = [self.entrants[i] for i in group]
            found.update(zip(group, size.run(partial(run, members)), strict=True))
        return [found[i] for i in range(len(self.entrants))]

    def _batches(
        self, one: Entrant, index: np.ndarray, size: int, stage: str, by: Corruption | None = None
    ) -> Tracked:
        batches = one.inputs.batches(index, self._run, size, by)
        place = distributed.here()
        return Tracked(batches.dealt(place.rank, place.size), stage, self._track)


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Short names, made unique by folder and position where necessary."""
    names = [Path(path).name for path in paths]
    return [
        name if names.count(name) == 1 else f"{Path(path).parent.name}/{name} ({i + 1})"
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
