"""`calibrate --data none`: statistics for changed weights from the original, without an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bnfix.checkpoints.alike import check_copyable
from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import check_room
from bnfix.checkpoints.save import history_entry, round_as_stored_, versions
from bnfix.core.errors import ConfigError, ModelError, some
from bnfix.core.settings import StatisticsRecipe
from bnfix.jobs.convert import example_input, known_shape, outputs_of
from bnfix.jobs.inputs import resolve_preprocessing
from bnfix.jobs.session import Plan, load_one, open_reference
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.predicted import match_predicted_
from bnfix.report.records import layer_rows
from bnfix.report.report import Report
from bnfix.report.result import Result


def calibrate_without_data(checkpoint: str | Path, plan: Plan) -> Result:
    """Set the statistics that weights and the original's statistics predict; nothing is judged.

    Raises:
        ConfigError: if no reference is given.
        ModelError: if one of both networks has no graph.
    """
    _refuse_what_takes_data(plan)
    loaded = load_one(checkpoint, plan.model, plan.run)
    original = open_reference(loaded, plan)
    if original is None:
        raise ConfigError(
            "--data none: without examples, statistics can only be predicted from the original's. "
            "Give --reference CKPT, or data.",
            name="reference",
        )
    check_room(loaded.checkpoint.metadata, loaded.checkpoint.path)
    if plan.model.like_input:
        check_copyable(loaded.checkpoint)
    stated, _ = resolve_preprocessing(loaded, plan.source)
    example = example_input(loaded.model, None, known_shape(loaded.model, stated))
    before = None if example is None else outputs_of(loaded.model, example)
    try:
        reached = match_predicted_(loaded.model, original.model, example)
    except ModelError as error:
        raise ModelError(f"--data none: {error} Give data.") from error
    round_as_stored_(loaded.model)
    left = [s.name for s in find_norms(loaded.model) if s.name not in reached]
    notes = [
        *loaded.checkpoint.notes,
        f"no example was used: the means of {len(reached)} layers were moved, and their variances "
        "lowered, as the weights predict from the original's statistics. Nothing proves that the "
        "output is better: compare it with the input on images (bnfix eval).",
    ]
    if left:
        notes.append(f"{some(left)}: out of reach of the prediction, left as they were.")
    if before is not None and example is not None:
        moved = outputs_of(loaded.model, example) - before
        size = float(moved.square().mean().sqrt() / before.square().mean().sqrt().clamp_min(1e-12))
        notes.append(f"on normal random input the outputs moved by {size:.2g} of their size (RMS).")
    recipes: dict[str, Any] = {"model": plan.model, "statistics": plan.statistics}
    options = {name: dataclasses.asdict(one) for name, one in recipes.items()}
    found: dict[str, Any] = {"results": {"predicted": reached}, "drifts": {}}
    return unjudged(plan, loaded, notes, options, **found)


def unjudged(
    plan: Plan, loaded: Loaded, notes: Sequence[str], options: dict[str, Any], **found: Any
) -> Result:
    """The model and what was done, of a command that nothing judges; found: results, drifts."""
    typed, results = plan.command_line, found["results"]
    how: Any = {"options": options, "command_line": typed}
    file, seed = loaded.checkpoint, plan.gate.seed
    entry = history_entry(plan.command, seed=seed, checkpoint=file, results=results, **how)
    report = Report(
        command=plan.command,
        data=None,
        models=(),
        layers=layer_rows(loaded.model, found["drifts"], {}),
        assumptions=tuple(notes),
        versions=versions(),
        **how,
    )
    return Result(loaded.model, report, entry, loaded.origin.preprocessing)


def _refuse_what_takes_data(plan: Plan) -> None:
    """Refuse commands and options that would have no effect without an example."""
    if plan.command != "calibrate":
        raise ConfigError(
            f"--data none: {plan.command} needs examples; only calibrate takes none. Give data.",
            name="data",
        )
    stated = stated_flags(plan, replace(plan.statistics, reference=None, reference_model=None))
    if stated:
        raise ConfigError(
            f"--data none: without examples {some(stated)} cannot act. Leave it out, or give data.",
            name="data",
        )


def stated_flags(plan: Plan, statistics: StatisticsRecipe) -> list[str]:
    """Options that are not as by default, of those that say how statistics or weights are found."""
    usual = Plan()
    statistics = replace(statistics, batch_size=usual.statistics.batch_size)
    pairs: list[tuple[Any, Any]] = [
        (statistics, usual.statistics), (plan.weight, usual.weight), (plan.swap, usual.swap),
        (replace(usual.gate, class_prior=plan.gate.class_prior), usual.gate),
    ]  # fmt: skip
    stated = [
        "--" + field.name.replace("_", "-")
        for given, default in pairs
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(default, field.name)
    ]
    stated += ["--select"] * isinstance(plan.gate.select, str)
    return stated + ["--test"] * (plan.source.test is not None)
