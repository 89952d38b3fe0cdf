"""The tables and lines of reports, plans, conversions and inspections."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
from rich import box
from rich.markup import escape
from rich.table import Table

from bnfix.core.errors import count, some
from bnfix.diagnosis.faults import Finding
from bnfix.diagnosis.model import Behaviour, Shifts
from bnfix.jobs.inspect import Inspection
from bnfix.norm.swap import Change
from bnfix.report.pages import clean, ends, number, percent
from bnfix.report.report import Report

#: Terminal width in columns below which tables become narrower.
_LEAST_WIDTH = 60
#: Findings of one kind that are printed in full.
_SHOWN = 5
_LIVE = "live: layers with an example weight"
_Layers = partial(Table, box=box.SIMPLE_HEAD)


def shown_text(text: object) -> str:
    """A text of any origin on one line, without control characters or markup."""
    return escape(clean(text, limit=10_000))


# --- reports ---


def tables_of(report: Report) -> Iterator[Table]:
    """The tables of a report that have rows; they fit 80 columns."""
    if report.decisions:
        yield _decisions(report)
    if any(model.metrics.nll is not None for model in report.models):
        yield _models(report) if report.by_rows is None else _by_rows(report, report.by_rows)
    if report.ranking:
        yield _ranks(report)
    if any(model.custom for model in report.models):
        yield _own_metrics(report)
    for title, *_, rows in report.shifts:
        what = report.task.words.score_heading or report.task.words.loss_heading
        yield _shifted(report, f"{what} under" if title.startswith("Under") else what, rows)
    if report.invariance:
        yield _invariance(report)
    if report.tiles:
        yield _tiles(report)
    if any(row.sets for row in report.uncertainty):
        yield _sets(report)
    if any(row.estimate for row in report.uncertainty):
        yield _estimates(report)


def fitted(table: Table, width: int) -> Table:
    """The table; on a narrow terminal numbers wrap, and "was" columns are left out."""
    if width < _LEAST_WIDTH:
        table.columns = [column for column in table.columns if column.header != "was"]
        for place, column in enumerate(table.columns):
            column.no_wrap, column.overflow = False, "fold"
            column.min_width = 5 if place else 10
    return table


def _table(headings: Sequence[str], rows: Iterable[Sequence[Any]], caption: str = "") -> Table:
    """A table of names and numbers; only names wrap."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="right" if place else "left", no_wrap=place > 0)
    for name, *cells in rows:
        table.add_row(shown_text(name), *cells)
    table.caption = caption or None
    return table


def _decisions(report: Report) -> Table:
    loss, right = report.decisions[-1].measures
    rows = []
    for d in report.decisions:
        scores = (percent(d.top1), percent(d.incumbent_top1)) if right else ()
        admitted = "yes" if d.admitted else "no"
        rows.append((d.candidate, number(d.nll), number(d.incumbent_nll), *scores, admitted))
    headings = ("candidate", loss, "was", *((right, "was") if right else ()), "admitted")
    n = report.decisions[0].n_examples
    return _table(headings, rows, f"judged on {n:,} held-out {report.noun}; the report says why")


def _models(report: Report) -> Table:
    rows = []
    for model in report.models:
        m = model.metrics
        top1, nll = "-", m.problem
        if not m.problem:
            (low, high), of_nll = m.interval["top1"], m.interval["nll"]
            top1 = f"{percent(m.top1)} ({100 * low:.1f} to {100 * high:.1f})"
            nll = "{} ({} to {})".format(*map(number, (m.nll, *of_nll)))
        scaled = "-" if m.problem else number(m.nll_temperature_scaled)
        rows.append((model.name, top1, nll, scaled, str(model.n_live)))
    caption = f"{_by_groups(report)}scaled: NLL after temperature scaling; {_LIVE}"
    return _table(("model", "top-1 (95%)", "NLL (95%)", "scaled", "live"), rows, caption)


def _by_rows(report: Report, task: Any) -> Table:
    """The models of a task other than classification."""
    rows = []
    for model in report.models:
        m = model.metrics
        loss = m.problem
        if not m.problem:
            loss = "{} ({} to {})".format(*map(number, (m.nll, *m.interval["nll"])))
        values = (number(m.values.get(key)) for key in task.headings)
        rows.append((model.name, loss, *values, str(model.n_live)))
    headings = ("model", f"{task.words.loss_heading} (95%)", *task.headings.values(), "live")
    return _table(headings, rows, f"{_by_groups(report)}loss: {task.words.loss}; {_LIVE}")


def _by_groups(report: Report) -> str:
    return "" if report.n_groups is None else f"95%: by {report.n_groups:,} groups; "


def _ranks(report: Report) -> Table:
    words, rows = report.task.words, []
    scores = (words.score_heading, "points (95%)") if words.score else ()
    for row in report.ranking:
        nll = points = "-"
        if row.paired is not None:
            nll, points = _difference(row.paired.nll), _difference(row.paired.top1, points=True)
        score = (f"{100 * row.top1:.1f}%", points) if scores else ()
        rows.append((f"{row.rank}. {row.name}", f"{row.nll:.3f}", nll, *score))
    order = f"{words.loss_heading}, then {scores[0]}" if scores else words.loss_heading
    caption = f"by {order}; differences from {shown_text(report.models[0].name)}"
    return _table(("rank, model", words.loss_heading, "difference (95%)", *scores), rows, caption)


def _difference(found: Any, *, points: bool = False) -> str:
    return "{} ({} to {})".format(*ends(found, points=points))


def _own_metrics(report: Report) -> Table:
    found = [(c, model.name) for model in report.models for c in model.custom]
    rows = [
        (
            f"{metric}, {model}",
            f"{c.value:.4g}",
            _range(c.interval),
            "-" if c.difference is None else f"{c.difference:.4g}",
            _range(c.difference_interval),
        )
        for metric in dict.fromkeys(c.name for c, _ in found)
        for c, model in found
        if c.name == metric
    ]
    return _table(("metric, model", "value", "95%", "difference", "95%"), rows)


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _shifted(report: Report, heading: str, every: Sequence[Any]) -> Table:
    names = [model.name for model in report.models]
    shown = names if len(names) <= 2 else [names[0], names[-1]]
    by_score = bool(report.task.words.score)
    by_place = {(row.kind, row.severity, row.model): row for row in every}
    rows = []
    for kind, severity in dict.fromkeys((row.kind, row.severity) for row in every):
        found = [by_place[kind, severity, name] for name in shown]
        last, change = found[-1].paired, "-"
        paired = last and (last.top1 if by_score else last.nll)
        if paired is not None and math.isfinite(paired.difference):
            change = _difference(paired, points=by_score)
        values = (percent(row.top1) if by_score else number(row.nll) for row in found)
        rows.append((f"{kind} {severity}", *values, change))
    what = "points" if by_score else "difference"
    models = ", ".join(f"{n}. {shown_text(name)}" for n, name in enumerate(shown, 1))
    headings = (heading, *(f"{n}. model" for n in range(1, len(shown) + 1)), what)
    return _table(headings, rows, f"{models}; {what}: last minus first, 95%")


def _invariance(report: Report) -> Table:
    headings = "logits differ by", "alone", "same class", "other batch", "same class"
    rows = []
    for row in report.invariance:
        both = ((d.largest_difference, d.top1_agreement) for d in (row.alone, row.permuted))
        rows.append(
            (row.model, *(cell for gap, same in both for cell in (f"{gap:.2g}", percent(same))))
        )
    first = report.invariance[0]
    caption = f"{count(first.n_examples, 'images')}, against batches of {first.batch_size}"
    return _table(headings, rows, caption)


def _tiles(report: Report) -> Table:
    rows = [
        (f"{row.model}, {b.words}", row.layers, percent(b.difference), percent(b.changed))
        for row in report.tiles
        for b in row.bands
    ]
    first = report.tiles[0]
    size, n = "x".join(map(str, first.size)), count(first.n_examples, "images")
    caption = f"{n} whole and in tiles of {size}; difference: in spreads"
    return _table(("pixels from a cut", "layers", "difference", "other class"), rows, caption)


def _sets(report: Report) -> Table:
    rows, caption = [], ""
    for model, row in zip(report.models, report.uncertainty, strict=True):
        if s := row.sets:
            held = f"{percent(s.coverage)} ({percent(s.interval[0])} to {percent(s.interval[1])})"
            cells = percent(s.wanted), held, number(s.size, 2), number(s.probability)
            rows.append((model.name, *cells))
            few = "" if s.probability else "; too few for that coverage, so sets have all classes"
            caption = f"p from {s.n_threshold:,} examples, the rest from {s.n_examples:,} more{few}"
    headings = "sets of classes", "wanted", "coverage (95%)", "mean size", "least p"
    return _table(headings, rows, caption)


def _estimates(report: Report) -> Table:
    rows = []
    for model, row in zip(report.models, report.uncertainty, strict=True):
        if e := row.estimate:
            shown = f"{percent(e.top1)} ({percent(e.interval[0])} to {percent(e.interval[1])})"
            rows.append((model.name, shown, percent(e.truth), percent(e.labelled_top1)))
    caption = "an estimate, not a measurement: under strong shifts it is too high"
    return _table(("estimated top-1", "estimate (90%)", "truth", "labelled"), rows, caption)


# --- plans ---


def plan_lines(described: dict[str, Any]) -> list[str]:
    """The plan of a command in lines."""
    data = described["data"]
    split = ", ".join(f"{name} {n:,}" for name, n in data["splits"].items())
    return [
        f"{described['command']}: {described['n_layers']} norm layers of {described['model']}",
        f"data: {data['spec']} ({data['kind']}), {split}",
        *(f"{i}. {stage}" for i, stage in enumerate(described["stages"], 1)),
        estimate_line(described),
        f"would write {described['output']} and its report; nothing was done",
        *(f"note: {note}" for note in described["assumptions"]),
    ]


def estimate_line(described: dict[str, Any]) -> str:
    """The cost of a plan in one line."""
    passes = f"{count(described['passes'], 'passes')} in total"
    seconds, memory = described["seconds_estimated"], described["memory_estimated_bytes"]
    if seconds is None:
        return f"{passes}; time unknown, no batch could be run: {described['problem']}"
    room = "" if memory is None else f", up to {memory / 1e9:.2g} GB of memory"
    return f"{passes}: about {duration_words(*seconds)} on this machine{room}"


def duration_words(low: float, high: float) -> str:
    """A range of time, in a unit that suits its upper end."""
    if high < 1:
        return "a second or less"
    units = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    name = next((name for name in units if high >= 2 * units[name]), "seconds")
    unit = units[name]
    digits = 1 if high < 5 * unit else 0
    first, last = (f"{value / unit:.{digits}f}".removesuffix(".0") for value in (low, high))
    return f"{last} {name}" if first == last else f"{first} to {last} {name}"


# --- conversions and inspections ---


def changes_table(changes: Iterable[Change]) -> Table:
    """The layers that a conversion swaps."""
    table = _Layers("layer", "was", "channels", "groups", "ghost", "example weight", "difference")
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
    kind = ["kind"] * bool(found.kinds)  # known only with a model
    table = _Layers("layer", *kind, "channels", "batches", "mean", "variance", "dead", "weight")
    table.columns[0].overflow = "fold"
    shifts = Shifts() if found.behaviour is None else found.behaviour.shifts
    if shifts.sequential or shifts.batch:
        for heading in ("shift", "factor", "gaps, sequential", "gaps, batch"):
            table.add_column(heading)
        table.caption = (
            "shift: stored against measured means, in standard deviations; factor: ratio of the "
            f"variances; gaps: mean and deviation against single batches of {shifts.batch_size}; "
            "the layers before use stored statistics (sequential feed) or the batch's"
        )
    for layer in found.layers:
        row = [
            shown_text(layer.name),
            *(shown_text(found.kinds.get(layer.name, "?")) for _ in kind),
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
    n = sum(one.advice != "nothing" for one in found.findings)
    summary = f"{count(len(found.layers), 'norm layers')}, {count(n, 'findings')}"
    yield summary if found.layers else "no norm layer with running statistics in this file"


def _finding_lines(findings: list[Finding]) -> Iterator[str]:
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in findings:
        groups.setdefault((one.severity, one.fault, one.advice), []).append(one)
    idle = []
    for (severity, fault, advice), same in groups.items():
        layers = [one.layer for one in same]
        if advice == "nothing":
            idle.append(f"{fault} in {some(layers, 3)}")
            continue
        for one in same[:_SHOWN]:
            yield f"{severity}: {one.layer or 'model'}: {one.detail}"
        also = f"(also {some(layers[_SHOWN:])}) " if len(same) > _SHOWN else ""
        yield f"  {also}-> {advice}"
    if idle:
        yield f"note: no action needed: {'; '.join(idle)}; --json has the details"


def _behaviour_line(seen: Behaviour) -> str:
    stored = "outputs {:.3g} to {:.3g}".format(*seen.output_range)
    batch = "{:.3g} to {:.3g}".format(*seen.output_range_training)
    if seen.top1 is not None and seen.top1_training is not None:
        stored += f", top-1 {percent(seen.top1)}"
        batch += f", {percent(seen.top1_training)}"
    known = all(map(math.isfinite, seen.output_range_training))
    own = f" (with batch statistics {batch})" if known else ""
    return f"on {count(seen.n_examples, 'examples')}: {stored}{own}"
