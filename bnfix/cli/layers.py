"""The tables and lines of conversions and inspections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import numpy as np
from rich.table import Table

from bnfix.cli.terminal import shown_text
from bnfix.core.errors import some
from bnfix.diagnosis.faults import Finding
from bnfix.diagnosis.model import Behaviour, Shifts
from bnfix.jobs.inspect import Inspection
from bnfix.norm.swap import Change
from bnfix.report.pages import percent

#: Findings of one kind that are spelled out.
_SHOWN = 5


def changes_table(changes: Iterable[Change]) -> Table:
    """The layers that a conversion swaps."""
    table = Table("layer", "was", "channels", "groups", "ghost", "example weight", "difference")
    table.columns[0].overflow = "fold"
    for change in changes:
        table.add_row(
            shown_text(change.name),
            shown_text(change.kind),
            str(change.channels),
            str(change.channel_groups),
            "all" if change.ghost_size is None else str(change.ghost_size),
            f"{change.example_weight or 0:g}",
            "-" if change.difference is None else f"{change.difference:.1e}",
        )
    return table


def layers_table(found: Inspection) -> Table:
    """The norm layers of a checkpoint."""
    table = Table("layer", "kind", "channels", "batches", "mean", "variance", "dead", "weight")
    table.columns[0].overflow = "fold"
    shifts = Shifts() if found.behaviour is None else found.behaviour.shifts
    if shifts.sequential or shifts.batch:
        for heading in ("shift", "factor", "gaps, sequential", "gaps, batch"):
            table.add_column(heading)
        table.caption = (
            "shift: stored against measured means, in standard deviations; factor: ratio of the "
            f"variances; gaps: of mean and deviation from single batches of {shifts.batch_size}, "
            "where the layers before use stored statistics (sequential feed) or the batch's"
        )
    for layer in found.layers:
        row = [
            shown_text(layer.name),
            shown_text(found.kinds.get(layer.name, "?")),
            str(layer.channels),
            "-" if layer.batches_tracked is None else str(layer.batches_tracked),
            "{:.2g} to {:.2g}".format(*layer.mean_range),
            "{:.2g} to {:.2g}".format(*layer.var_range),
            str(layer.n_dead),
            _short_weight(layer.example_weight)
            + _of_batch(layer.batch_weight)
            + ", gates" * layer.gated,
        ]
        table.add_row(*row, *(_shift_cells(shifts, layer.name) if table.caption else ()))
    return table


def _shift_cells(shifts: Shifts, name: str) -> Iterator[str]:
    own = shifts.sequential.get(name)
    yield "nan" if own is None else f"{own.mean_shift:.2g}"
    yield "nan" if own is None else f"{math.exp(min(own.log_var_ratio, 700)):.3g}"
    for feed in (shifts.sequential, shifts.batch):
        found = feed.get(name)
        gaps = [None] if found is None else [found.mean_gap, found.sd_gap]
        yield ", ".join("-" if gap is None else f"{gap:.2g}" for gap in gaps)


def _of_batch(weight: float | list[float]) -> str:
    return f", batch {_short_weight(weight)}" if np.any(weight) else ""


def _short_weight(weight: float | list[float]) -> str:
    if not isinstance(weight, list):
        return f"{weight:.3g}"
    return f"{min(weight):.2g} to {max(weight):.2g}" if weight else "?"


def inspection_lines(found: Inspection) -> Iterator[str]:
    """Notes, findings with their advice, and the commands of the file's history."""
    for note in [*found.notes, *found.problems]:
        yield f"note: {note}"
    if found.behaviour is not None:
        yield _behaviour_line(found.behaviour)
        if reading := found.behaviour.shifts.reading:
            yield reading
    yield from _finding_lines(found.findings)
    for place, entry in enumerate(found.commands, 1):
        lines = entry.options if entry.command is None else (entry.command,)
        yield f"history {place}: {lines[0]}"
        yield from (f"  {line}" for line in (*lines[1:], entry.did))
    summary = f"{len(found.layers)} norm layers, {len(found.findings)} findings"
    yield summary if found.layers else "no norm layer with running statistics in this file"


def _finding_lines(findings: list[Finding]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.severity, one.fault, one.advice), []).append(one)
    idle = []
    for (severity, fault, advice), same in groups.items():
        layers = [one.layer for one in same]
        if advice == "nothing":
            idle.append(f"{len(same)} {fault.replace('-', ' ')} ({some(layers, 3)})")
            continue
        for one in same[:_SHOWN]:
            yield f"{severity}: {one.layer or 'model'}: {one.detail}"
        also = f"(also {some(layers[_SHOWN:])}) " if len(same) > _SHOWN else ""
        yield f"  {also}-> {advice}"
    if idle:
        yield f"note: nothing to do about {'; '.join(idle)}; --json has the details"


def _behaviour_line(seen: Behaviour) -> str:
    stored = "outputs {:.3g} to {:.3g}".format(*seen.output_range)
    batch = "{:.3g} to {:.3g}".format(*seen.output_range_training)
    if seen.top1 is not None and seen.top1_training is not None:
        stored += f", top-1 {percent(seen.top1)}"
        batch += f", {percent(seen.top1_training)}"
    known = all(map(math.isfinite, seen.output_range_training))
    own = f" (with batch statistics {batch})" if known else ""
    return f"on {seen.n_examples} examples: {stored}{own}"
