"""What came of the stages: the claim on the test split, the report, the entry in the history."""

from __future__ import annotations

import dataclasses
from contextlib import suppress
from typing import Any

from torch import nn

from bnfix import guards
from bnfix.checkpoints.saving import history_entry, round_as_stored_, versions
from bnfix.data.fingerprints import (
    data_record,
    describe_unlisted,
    history_digests,
    seen_before,
)
from bnfix.errors import NumericError
from bnfix.measuring.movement import MOST_IMAGES, Moved, Recorded, moved, record
from bnfix.measuring.pairing import compare
from bnfix.reporting.layer_rows import drifts_between, layer_rows, n_live, statistics_of
from bnfix.reporting.records import DataUsed, Evaluated
from bnfix.reporting.report import Report
from bnfix.reporting.result import Result
from bnfix.stages import ORIGINAL, Stages
from bnfix.statistics.calibration import Calibration, residuals
from bnfix.tracking import describe_skipped


def result_of(stages: Stages) -> Result:
    """Measure original and output on test, never keep what is known to be worse, report."""
    bench, plan = stages.bench, stages.plan
    if stages.gated and stages.name == ORIGINAL:
        bench.assumptions.append("nothing was better beyond doubt, so the output is the input.")
    models: list[Evaluated] = []
    checkpoint = bench.loaded.checkpoint
    round_as_stored_(stages.model)
    labelled_test = bench.test_images.labels is not None and bench.split.test.size > 0
    if labelled_test:
        models = _measure_test(stages)
        bench.assumptions += describe_unlisted(bench.loaded.origin.history)
    movement = _movement(stages)
    fresh: dict[str, tuple[float, float]] = {}
    if any(isinstance(one, Calibration) for one in stages.tried) and bench.split.fit.size:
        # A network whose numbers are not finite has none.
        with suppress(NumericError):
            fresh = bench.evaluation.run(
                lambda _: residuals(
                    stages.model, bench.batches(bench.split.fit, "residual of the statistics")
                )
            )
    drifts = drifts_between(stages.original_statistics, statistics_of(stages.model))
    rows = layer_rows(stages.model, drifts, fresh, stages.calibration)
    data = {
        **data_record(bench.images),
        "fit": history_digests(bench.images, bench.split.fit),
        "select": history_digests(bench.images, bench.split.select),
    }
    options = _options(stages)
    entry = history_entry(
        plan.command,
        options=options,
        seed=bench.gate.seed,
        checkpoint=checkpoint,
        data=data,
        command_line=plan.command_line,
        results={
            "output": stages.name,
            "top1": models[-1].metrics.top1 if models else None,
            "nll": models[-1].metrics.nll if models else None,
        },
    )
    skipped = describe_skipped(stages.passes)
    split = bench.split
    report = Report(
        command=plan.command,
        data=DataUsed(
            data["spec"],
            data["n_examples"],
            data["fingerprint"],
            bench.images.class_names,
            {"fit": len(split.fit), "select": len(split.select), "test": len(split.test)},
            skipped,
            len(skipped),
            stages.plan.source.corrupt,
        ),
        models=tuple(models),
        layers=rows,
        decisions=tuple(stages.decisions),
        calibration=stages.calibration,
        choice=stages.choice,
        finetunings=tuple(stages.finetunings),
        refused=stages.refused,
        moved=movement,
        assumptions=tuple(dict.fromkeys(bench.assumptions)),
        n_seen=seen_before(bench.test_images, split.test, bench.loaded.origin.history),
        options=options,
        seed=bench.gate.seed,
        command_line=plan.command_line,
        versions=versions(),
    )
    return Result(stages.model, report, entry, bench.preprocessing)


def _measure_test(stages: Stages) -> list[Evaluated]:
    bench = stages.bench
    final = stages.state()
    stages.original.values.restore_()
    file, sha256 = str(bench.loaded.checkpoint.path), bench.loaded.checkpoint.sha256
    own = stages.model if bench.original is None else bench.original
    before = stages.evaluate_on(lambda: bench.test_batches(f"test: {ORIGINAL}"), own)
    first = Evaluated(ORIGINAL, file, sha256, before, n_live(own))
    stages.put_back(final)
    after = stages.evaluate_on(lambda: bench.test_batches(f"test: {stages.name}"))
    # Another kind of normalization was asked for, whatever it costs.
    converted = bench.original is not None
    stated = not stages.gated and (converted or stages.plan.command != "finetune")
    if compare(before, after, seed=bench.gate.seed).verdict == "worse" and not stated:
        # What was asked for outright stays, whatever it costs; what was chosen goes.
        kept = stages.stated or stages.original
        if kept.name != stages.name:
            bench.assumptions.append(
                f"{stages.name!r} turned out significantly worse on the test split, so the "
                f"output is {'the input' if kept.name == ORIGINAL else repr(kept.name)}."
            )
            stages.put_back(kept)
            round_as_stored_(stages.model)
            after = before
            if stages.stated:
                after = stages.evaluate_on(lambda: bench.test_batches(f"test: {kept.name}"))
    return [first, Evaluated(f"output: {stages.name}", None, None, after, n_live(stages.model))]


def _movement(stages: Stages) -> Moved:
    """How far the outputs moved, on some of the images at hand."""
    bench = stages.bench
    index = bench.everything[:MOST_IMAGES]
    final = guards.Snapshot(stages.model)

    def recorded(model: nn.Module) -> Recorded:
        batches = bench.batches(index, "how far the outputs moved").whole()
        return bench.evaluation.run(lambda _: record(model, batches, bench.run.precision))

    try:
        stages.original.values.restore_()
        before = recorded(bench.original or stages.model)
    finally:
        final.restore_()
    return moved(before, recorded(stages.model))


def _options(stages: Stages) -> dict[str, Any]:
    plan = stages.plan
    finetune = plan.finetune
    return {
        "model": dataclasses.asdict(plan.model),
        "data": dataclasses.asdict(plan.source),
        "swap": dataclasses.asdict(plan.swap),
        "statistics": dataclasses.asdict(plan.statistics),
        "example_weight": dataclasses.asdict(plan.weight),
        "finetune": None if finetune is None else dataclasses.asdict(finetune),
        "gate": dataclasses.asdict(plan.gate),
        "precision": plan.run.precision,
        **({"average": stages.averaged} if stages.averaged else {}),
    }
