"""`eval`: checkpoints side by side on the same examples."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.data import Batches
from bnfix.errors import ConfigError
from bnfix.evaluation import evaluate
from bnfix.layer_rows import drifts_between, layer_rows, n_live, statistics_of
from bnfix.opening import open_images
from bnfix.reading import require_file
from bnfix.recipe import DataRecipe, ModelRecipe, RunOptions, check_seed
from bnfix.report import DataUsed, Evaluated, Report
from bnfix.saving import versions
from bnfix.workbench import (
    Track,
    Tracked,
    data_record,
    describe_skipped,
    evaluation_batch_size,
    load_one,
    open_checked,
    resolve_preprocessing,
    seen_before,
    silent,
)


def evaluate_files(
    checkpoints: Sequence[str | Path],
    *,
    data: str,
    model: str | ModelRecipe | None = None,
    source: DataRecipe | None = None,
    run: RunOptions | None = None,
    seed: int = 0,
    track: Track = silent,
    command_line: str = "",
) -> Report:
    """Measure checkpoints on the same examples, each paired against the first.

    Args:
        checkpoints: one or more files.
        data: DATA.
        model: spec that serves every checkpoint; by default what each carries.
        source: labels and preprocessing.
        run: device and batch size.
        seed: of the intervals.
        track: how progress is shown.
        command_line: as typed, for the report.

    Returns:
        The report.

    Raises:
        ConfigError: if there is no checkpoint.
    """
    if not checkpoints:
        raise ConfigError("eval: no checkpoint given.")
    check_seed(seed)
    recipe = model if isinstance(model, ModelRecipe) else ModelRecipe(model)
    source, run = source or DataRecipe(), run or RunOptions()
    models: list[Evaluated] = []
    notes: list[str] = []
    states: list[dict[str, Any]] = []
    opened: dict[Any, Any] = {}
    history: list[dict[str, Any]] = []
    passes: list[Tracked] = []
    for path, name in zip(checkpoints, _names(checkpoints), strict=True):
        loaded = load_one(path, recipe, run)
        preprocessing, remarks = resolve_preprocessing(loaded, source)
        notes += [f"{name}: {remark}" for remark in (*loaded.checkpoint.notes, *remarks)]
        images, input_size = open_checked(data, loaded.model, source, preprocessing)
        # Opened anew for its classes; kept from the last time for the images already decoded.
        images = opened.setdefault((preprocessing.channels, images.class_names), images)
        everything = np.arange(len(images))
        batches = Tracked(
            Batches(
                images,
                everything,
                preprocessing,
                batch_size=evaluation_batch_size(run, loaded.model, input_size),
                workers=run.workers,
                max_bad=source.max_bad,
            ),
            f"evaluating {name}",
            track,
        )
        metrics = evaluate(loaded.model, batches, precision=run.precision, seed=seed)
        passes.append(batches)
        history += loaded.origin.history
        models.append(
            Evaluated(name, str(path), loaded.checkpoint.sha256, metrics, n_live(loaded.model))
        )
        states.append(statistics_of(loaded.model))
        last, last_images = loaded.model, images
    record = data_record(last_images)
    skipped = describe_skipped(passes)
    used = DataUsed(
        record["spec"],
        models[0].metrics.n_examples,
        record["fingerprint"],
        last_images.class_names,
        {},
        skipped,
        len(skipped),
    )
    return Report(
        command="eval",
        data=used,
        models=tuple(models),
        layers=layer_rows(last, drifts_between(states[0], states[-1]), {}),
        assumptions=tuple(dict.fromkeys([*notes, *(f"{n}." for n in last_images.notes)])),
        n_seen=seen_before(last_images, np.arange(len(last_images)), history),
        options={"preprocessing": dataclasses.asdict(preprocessing)},
        seed=seed,
        command_line=command_line,
        versions=versions(),
    )


def plan_evaluation(checkpoints: Sequence[str | Path], data: str) -> dict[str, Any]:
    """What `evaluate_files` would do, without reading a tensor or decoding an image.

    Args:
        checkpoints: the files; they must be there.
        data: DATA.

    Returns:
        JSON values.
    """
    for path in checkpoints:
        require_file(Path(path))
    return {
        "command": "eval",
        "plan": True,
        "checkpoints": [str(path) for path in checkpoints],
        "data": {"spec": data, "n_examples": len(open_images(data, labels="none"))},
        "passes": len(checkpoints),
    }


def _names(paths: Sequence[str | Path]) -> list[str]:
    """Short names, made unique by as much of the path as it takes."""
    names = [Path(path).name for path in paths]
    return [
        name if names.count(name) == 1 else f"{Path(path).parent.name}/{name} ({i + 1})"
        for i, (name, path) in enumerate(zip(names, paths, strict=True))
    ]
