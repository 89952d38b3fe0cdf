"""`eval`: checkpoints side by side on the same examples, which are read once."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.read import require_file
from bnfix.checkpoints.save import versions
from bnfix.core import distributed
from bnfix.core.errors import ConfigError
from bnfix.core.settings import (
    CORRUPTIONS,
    SEVERITIES,
    DataRecipe,
    EvaluationRecipe,
    ModelRecipe,
    RunOptions,
    check_seed,
)
from bnfix.data.corruptions import corruption_of
from bnfix.data.fingerprints import data_record, describe_unlisted, seen_before
from bnfix.jobs.entrants import Arena, Entrant, enter, hasten
from bnfix.jobs.estimate import estimated_evaluation
from bnfix.jobs.progress import Track, describe_skipped, silent
from bnfix.jobs.session import evaluation_batch_size, input_batches
from bnfix.metrics.custom import custom_metrics, import_metric
from bnfix.metrics.evaluate import Outputs, measured
from bnfix.metrics.metrics import refuse_not_finite
from bnfix.report.predictions import check_predictions, table_of, write_predictions
from bnfix.report.records import (
    DataUsed,
    Evaluated,
    drifts_between,
    layer_rows,
    n_live,
    statistics_of,
)
from bnfix.report.report import Report


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

    Checkpoints of one preprocessing go through the data together, so that every image is read and
    decoded once.

    Args:
        checkpoints: one or more files.
        data: DATA.
        model: spec that serves every checkpoint; by default what each carries.
        source: labels and preprocessing.
        run: device and batch size.
        also: what else is measured.
        predictions: file for what each model says of each example, ``.csv`` or ``.parquet``.
        force: replace that file if it is there.
        seed: of the intervals, of noise, and of which images are compared in other batches.
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
    if not checkpoints:
        raise ConfigError("eval: no checkpoint given.")
    if also.corruptions and source.corrupt is not None:
        raise ConfigError("--corruptions: not together with --corrupt. Leave one of them out.")
    functions = [import_metric(spec) for spec in also.metric]
    if predictions is not None:
        check_predictions(predictions, force=force)
    notes: list[str] = []
    entrants = enter(checkpoints, data, recipe, source, run, bool(functions), notes)
    if also.corruptions and entrants[0].images.labels is None:
        raise ConfigError("--corruptions: the examples have no labels. Give labels.")
    if also.corruptions and entrants[0].preprocessing is None:
        raise ConfigError(f"--corruptions: {data} holds no images. Leave it out.")
    if also.fast:
        entrants = hasten(entrants, run.precision, seed, notes)
    arena = Arena(entrants, source, run, seed, track)
    found = arena.outputs("evaluating", corruption_of(source.corrupt, seed), bool(functions))
    own = custom_metrics(functions, found, seed=seed) if functions else [()] * len(found)
    if predictions is not None:
        _write_predictions(predictions, entrants, found)
    if source.corrupt is not None:
        notes.append(f"every image was corrupted: {source.corrupt}, after resize and crop.")
    models = tuple(
        Evaluated(
            name=one.name,
            file=one.path,
            sha256=one.loaded.checkpoint.sha256,
            metrics=measured(outputs, seed),
            n_live=n_live(one.loaded.model),
            custom=custom,
            classified=outputs.classified,
        )
        for one, custom, outputs in zip(entrants, own, found, strict=True)
    )
    last = entrants[-1].preprocessing
    options = {
        "preprocessing": last and dataclasses.asdict(last),
        **({"corrupt": source.corrupt} if source.corrupt else {}),
        **{name: value for name, value in dataclasses.asdict(also).items() if value},
    }
    report = _report(entrants, arena, models, notes, source.corrupt)
    return dataclasses.replace(
        report,
        options=options,
        seed=seed,
        command_line=command_line,
        corruptions=tuple(arena.shifted()) if also.corruptions else (),
        invariance=tuple(arena.invariance()) if also.compare_batch_sizes else (),
    )


def _report(
    entrants: Sequence[Entrant],
    arena: Arena,
    models: tuple[Evaluated, ...],
    notes: Sequence[str],
    corruption: str | None,
) -> Report:
    """The report on models that went through the same examples; layers are those of the last."""
    images, record = entrants[-1].images, data_record(entrants[-1].images)
    skipped = describe_skipped(arena.passes)
    history = [entry for one in entrants for entry in one.loaded.origin.history]
    first, last = (one.loaded.model for one in (entrants[0], entrants[-1]))
    return Report(
        command="eval",
        data=DataUsed(
            spec=record["spec"],
            n_examples=models[0].metrics.n_examples,
            fingerprint=record["fingerprint"],
            class_names=images.class_names,
            skipped=skipped,
            n_skipped=len(skipped),
            corruption=corruption,
        ),
        models=models,
        layers=layer_rows(last, drifts_between(statistics_of(first), statistics_of(last)), {}),
        assumptions=tuple(
            dict.fromkeys([
                *notes, *describe_unlisted(history), *arena.notes, *(f"{n}." for n in images.notes)
            ])
        ),
        n_seen=seen_before(images, np.arange(len(images)), history),
        versions=versions(),
    )  # fmt: skip


def plan_evaluation(
    checkpoints: Sequence[str | Path],
    data: str,
    also: EvaluationRecipe | None = None,
    *,
    model: ModelRecipe | None = None,
    source: DataRecipe | None = None,
    run: RunOptions | None = None,
) -> dict[str, Any]:
    """What `evaluate_files` would do, and what it would cost by a few batches of every model."""
    for path in checkpoints:
        require_file(Path(path))
    n_variants = 1
    if also is not None and also.corruptions:
        n_variants += len(CORRUPTIONS) * len(SEVERITIES)
    source, run = source or DataRecipe(), run or RunOptions()
    own = also is not None and bool(also.metric)
    entrants = enter(checkpoints, data, model or ModelRecipe(), source, run, own, [])
    n_examples = len(entrants[0].images)
    few = []
    for one in entrants:
        size = evaluation_batch_size(run, one.loaded.model, one.input_size)
        index = np.arange(min(n_examples, 2 * size))
        lenient = dataclasses.replace(source, max_bad=float(len(index)), corrupt=None)
        batches = input_batches(one.images, index, one.preprocessing, lenient, run, size=size)
        few.append((one.loaded.model, batches))
    cost = estimated_evaluation(few, n_examples, n_variants, run.precision)
    return {
        "command": "eval",
        "plan": True,
        "checkpoints": [str(path) for path in checkpoints],
        "data": {"spec": data, "n_examples": n_examples},
        **cost.to_json(),
    }


def _write_predictions(path: Path, entrants: Sequence[Entrant], found: Sequence[Outputs]) -> None:
    if not all(one.classified for one in found):
        raise ConfigError(
            "--predictions: the outputs are no logits of classes. Leave it out.", name="predictions"
        )
    for one in found:
        refuse_not_finite(one.outputs)
    images, positions = entrants[0].images, found[0].positions
    examples = [] if positions is None else [images.name(int(i)) for i in positions]
    if distributed.here().is_first:
        write_predictions(path, table_of([one.name for one in entrants], examples, found))
