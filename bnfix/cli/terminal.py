"""The terminal: results to standard output; progress, notes and errors to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table

from bnfix.core import distributed
from bnfix.core.errors import BnfixError, ConfigError, one_line, some
from bnfix.jobs.inputs import Track, silent
from bnfix.report.pages import clean, ends, number, percent
from bnfix.report.report import Report

#: Columns of a text that goes to a file or a pipe: no table is folded or cut there.
_UNBOUNDED = 1000
#: Columns below which a progress line shows only the stage, the percentage and the time left.
_NARROW = 50


def _console(*, stderr: bool = False) -> Console:
    if not distributed.speaks():  # of several processes the first prints for all
        return Console(file=io.StringIO())
    console = Console(stderr=stderr, emoji=False)  # a name such as o.py:star is none
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


@dataclasses.dataclass
class Terminal:
    """Where a command prints: results to standard output, all else to standard error."""

    as_json: bool
    quiet: bool
    out: Console = dataclasses.field(default_factory=_console)
    err: Console = dataclasses.field(default_factory=lambda: _console(stderr=True))

    @contextlib.contextmanager
    def working(self) -> Iterator[Track]:
        """Show progress on a terminal; keep the user's own prints off standard output."""
        shown = self.err.is_terminal and not self.err.is_dumb_terminal and not self.quiet
        if not shown:
            with _stdout_to_stderr():
                yield silent
            return
        bars = Progress(*_columns(self.err.width), console=self.err, transient=True)
        with _stdout_to_stderr(), bars as progress:

            def track(stage: str, batches: Iterable[Any], n: int) -> Iterable[Any]:
                task = progress.add_task(clean(stage), total=n)
                try:
                    for batch in batches:
                        yield batch
                        progress.advance(task)
                finally:
                    progress.remove_task(task)

            yield track

    def show(self, report: Report, written: Path | None = None) -> None:
        """Print a report: tables and verdict, or JSON."""
        if self.as_json:
            content = report.to_json()
            content["output"] = None if written is None else str(written)
            self.print_json(content)
            return
        if not self.quiet:
            for table in tables_of(report):
                self.out.print(fitted(table, self.out.width))
        self.say(report.verdict_sentence())
        if not self.quiet:
            self.notes(report.assumptions)
            if report.data is not None and (n := report.data.n_skipped):
                self.notes([f"{n} unreadable images skipped: {some(report.data.skipped, 3)}"])
            if written is not None:
                inside = "/" if written.is_dir() else f" and {written.name}."
                self.say(f"wrote {written}{inside}report.html, .md, .json")

    def plan(self, content: dict[str, Any], *lines: str) -> None:
        """Print a plan: lines, or JSON."""
        if self.as_json:
            self.print_json(content)
        for line in () if self.as_json else lines:
            self.say(line)

    def say(self, text: str) -> None:
        """Print one line of any origin."""
        self.out.print(shown_text(text), soft_wrap=True, highlight=False)

    def notes(self, notes: Iterable[str]) -> None:
        """Print notes of any origin on standard error."""
        for note in notes:
            self.err.print(shown_text(f"note: {note}"), soft_wrap=True, highlight=False)

    def print_json(self, content: Any) -> None:
        """Print one JSON object."""
        if distributed.speaks():
            sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
            sys.stdout.flush()


def _columns(width: int) -> Iterator[ProgressColumn]:
    """The columns that fit: stage and time left always, then the count, then the bar."""
    bar = width // 4 if width >= 2 * _NARROW else 0
    room = width - (14 if width < _NARROW else 30 + bar)
    # The other columns have fixed widths: a long stage is cut, not the time.
    stage = Column(no_wrap=True, overflow="ellipsis", max_width=max(12, room))
    yield TextColumn("{task.description}", markup=False, table_column=stage)
    if bar:
        yield BarColumn(bar)
    if width < _NARROW:
        yield TextColumn("{task.percentage:>3.0f}%", table_column=Column(min_width=4))
    else:
        yield MofNCompleteColumn()
        yield TextColumn("batches")
    yield TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5))


@contextlib.contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, also what compiled code or a child process prints."""
    sys.stdout.flush()
    kept: int | None = None
    # In memory, where a test or another program reads them, they are no files.
    with contextlib.suppress(OSError, ValueError):
        own, error = sys.stdout.fileno(), sys.stderr.fileno()
        kept = os.dup(own)
        os.dup2(error, own)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if kept is not None:
            os.dup2(kept, own)
            os.close(kept)


@contextlib.contextmanager
def stated(command: str, *, many: bool = False, debug: bool = False) -> Iterator[None]:
    """Print a stated error as one line, and exit with 1, 2 for wrong usage, 130 interrupted."""
    with _translated(command, debug), contextlib.ExitStack() as stack:
        if many:
            stack.enter_context(distributed.joined())
        elif distributed.launched().shared:
            raise ConfigError("this command works in one process only. Start it without torchrun.")
        # Inside, since the processes still have to agree on which of them prints the error.
        stack.enter_context(_translated(command, debug))
        yield


@contextlib.contextmanager
def _translated(command: str, debug: bool) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as interrupt:
        _fail(interrupt, 130, str(interrupt) or "interrupted.", debug)
    except BnfixError as error:
        text = str(error)
        end = "" if text.endswith((".", "?", "!")) else "."
        page = f"help {error.page}" if error.page else f"{command} --help"
        code = 2 if isinstance(error, ConfigError) else 1
        _fail(error, code, f"{text}{end} See bnfix {page}.", debug)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        hint = "Lower --batch-size, or use --device cpu."
        _fail(error, 1, f"out of memory: {message} {hint}", debug)
    except Exception as error:  # noqa: BLE001 - a library's traceback says nothing to most users
        hint = "Add --debug for the traceback; report it, unless the error is in your own code."
        _fail(error, 1, f"unexpected {one_line(error)}. {hint}", debug)


def _fail(error: BaseException, code: int, message: str, debug: bool) -> None:
    if distributed.first_to_fail():
        if debug:
            traceback.print_exception(error)
        text = shown_text(f"bnfix: {message}")
        Console(stderr=True, emoji=False).print(text, soft_wrap=True, highlight=False)
    raise typer.Exit(code)


#: Columns of a terminal below which tables change their form.
_LEAST_WIDTH = 60


def shown_text(text: object) -> str:
    """A text of any origin on one line, without control characters and without markup."""
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
    """The table, changed for a narrow terminal: numbers wrap, and columns "was" are left out."""
    if width < _LEAST_WIDTH:
        table.columns = [column for column in table.columns if column.header != "was"]
        for place, column in enumerate(table.columns):
            column.no_wrap, column.overflow = False, "fold"
            column.min_width = 5 if place else 10
    return table


def _decisions(report: Report) -> Table:
    loss, right = report.decisions[-1].measures
    table = _narrow("candidate", loss, "was", *((right, "was") if right else ()), "admitted")
    for d in report.decisions:
        nll, top1 = (number(d.nll), number(d.incumbent_nll)), (d.top1, d.incumbent_top1)
        admitted = "yes" if d.admitted else "no"
        scores = map(percent, top1 if right else ())
        table.add_row(shown_text(d.candidate), *nll, *scores, admitted)
    n = report.decisions[0].n_examples
    table.caption = f"judged on {n:,} held-out {report.noun}; the report says why"
    return table


def _models(report: Report) -> Table:
    table = _narrow("model", "top-1 (95%)", "NLL (95%)", "scaled", "live")
    for model in report.models:
        m = model.metrics
        if m.problem:
            table.add_row(shown_text(model.name), "-", m.problem, "-", str(model.n_live))
            continue
        low, high = m.interval["top1"]
        nll_low, nll_high = m.interval["nll"]
        table.add_row(
            shown_text(model.name),
            f"{percent(m.top1)} ({100 * low:.1f} to {100 * high:.1f})",
            f"{number(m.nll)} ({nll_low:.3f} to {nll_high:.3f})",
            number(m.nll_temperature_scaled),
            str(model.n_live),
        )
    live = "live: layers with an example weight"
    table.caption = f"{_by_groups(report)}scaled: NLL after temperature scaling; {live}"
    return table


def _by_rows(report: Report, task: Any) -> Table:
    """The models of a task that is no classification."""
    table = _narrow("model", f"{task.words.loss_heading} (95%)", *task.headings.values(), "live")
    for model in report.models:
        m, name = model.metrics, shown_text(model.name)
        loss = m.problem
        if not m.problem:
            loss = "{} ({} to {})".format(*map(number, (m.nll, *m.interval["nll"])))
        values = (number(m.values.get(key)) for key in task.headings)
        table.add_row(name, loss, *values, str(model.n_live))
    loss = f"{_by_groups(report)}loss: {task.words.loss}"
    table.caption = f"{loss}; live: layers with an example weight"
    return table


def _by_groups(report: Report) -> str:
    return "" if report.n_groups is None else f"95%: by {report.n_groups:,} groups; "


def _ranks(report: Report) -> Table:
    words = report.task.words
    scores = (words.score_heading, "points (95%)") if words.score else ()
    table = _narrow("rank, model", words.loss_heading, "difference (95%)", *scores)
    for row in report.ranking:
        nll = points = "-"
        if row.paired is not None:
            nll = "{} ({} to {})".format(*ends(row.paired.nll, points=False))
            points = "{} ({} to {})".format(*ends(row.paired.top1, points=True))
        name = f"{row.rank}. {shown_text(row.name)}"
        score = (f"{100 * row.top1:.1f}%", points) if scores else ()
        table.add_row(name, f"{row.nll:.3f}", nll, *score)
    order = f"{words.loss_heading}, then {scores[0]}" if scores else words.loss_heading
    table.caption = f"by {order}; differences to {shown_text(report.models[0].name)}"
    return table


def _own_metrics(report: Report) -> Table:
    table = _narrow("metric, model", "value", "95%", "difference", "95%")
    found = [(c, model.name) for model in report.models for c in model.custom]
    for metric in dict.fromkeys(c.name for c, _ in found):
        for c, model in found:
            if c.name == metric:
                difference = "-" if c.difference is None else f"{c.difference:.4g}"
                name = f"{shown_text(metric)}, {shown_text(model)}"
                ranges = _range(c.interval), _range(c.difference_interval)
                table.add_row(name, f"{c.value:.4g}", ranges[0], difference, ranges[1])
    return table


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def _shifted(report: Report, heading: str, every: Sequence[Any]) -> Table:
    names = [model.name for model in report.models]
    shown = names if len(names) <= 2 else [names[0], names[-1]]
    by_score = bool(report.task.words.score)
    names_of = (f"{n}. model" for n in range(1, len(shown) + 1))
    table = _narrow(heading, *names_of, "points" if by_score else "difference")
    rows = {(row.kind, row.severity, row.model): row for row in every}
    for kind, severity in dict.fromkeys((row.kind, row.severity) for row in every):
        found = [rows[kind, severity, name] for name in shown]
        last, points = found[-1].paired, "-"
        change = None if last is None else last.top1 if by_score else last.nll
        if change is not None and math.isfinite(change.difference):
            points = "{} ({} to {})".format(*ends(change, points=by_score))
        values = (percent(row.top1) if by_score else number(row.nll) for row in found)
        table.add_row(f"{kind} {severity}", *values, points)
    models = ", ".join(f"{n}. {shown_text(name)}" for n, name in enumerate(shown, 1))
    what = "points" if by_score else "difference"
    table.caption = f"{models}; {what}: last minus first, 95%"
    return table


def _invariance(report: Report) -> Table:
    table = _narrow("logits differ by", "alone", "same class", "other batch", "same class")
    for row in report.invariance:
        cells = [
            cell
            for d in (row.alone, row.permuted)
            for cell in (f"{d.largest_difference:.2g}", f"{100 * d.top1_agreement:.1f}%")
        ]
        table.add_row(shown_text(row.model), *cells)
    first = report.invariance[0]
    table.caption = f"{first.n_examples:,} images, against batches of {first.batch_size}"
    return table


def _tiles(report: Report) -> Table:
    table = _narrow("pixels from a cut", "layers", "difference", "other class")
    for row in report.tiles:
        for band in row.bands:
            name = f"{shown_text(row.model)}, {band.words}"
            table.add_row(name, row.layers, percent(band.difference), percent(band.changed))
    first = report.tiles[0]
    size = "x".join(map(str, first.size))
    table.caption = f"{first.n_examples} images whole and in tiles of {size}; difference: by spread"
    return table


def _sets(report: Report) -> Table:
    table = _narrow("sets of classes", "wanted", "coverage (95%)", "mean size", "least p")
    for model, row in zip(report.models, report.uncertainty, strict=True):
        if s := row.sets:
            held = f"{percent(s.coverage)} ({percent(s.interval[0])} to {percent(s.interval[1])})"
            cells = percent(s.wanted), held, number(s.size, 2), number(s.probability)
            table.add_row(shown_text(model.name), *cells)
            few = "" if s.probability else "; too few for that coverage, so sets have all classes"
            table.caption = (
                f"p from {s.n_threshold:,} examples, the rest on {s.n_examples:,} more{few}"
            )
    return table


def _estimates(report: Report) -> Table:
    table = _narrow("estimated top-1", "estimate (90%)", "truth", "labelled")
    for model, row in zip(report.models, report.uncertainty, strict=True):
        if e := row.estimate:
            low, high = (percent(end) for end in e.interval)
            shown = f"{percent(e.top1)} ({low} to {high})"
            truth = percent(e.truth)
            table.add_row(shown_text(model.name), shown, truth, percent(e.labelled_top1))
    table.caption = "an estimate, no measurement: under strong shifts it is too high"
    return table


def _narrow(name: str, *numbers: str) -> Table:
    """A table of names and numbers that fits a terminal of 80 columns; only names may wrap."""
    table = Table(
        name, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left"
    )
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


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
    passes = f"{described['passes']:.3g} passes in all"
    seconds, memory = described["seconds_estimated"], described["memory_estimated_bytes"]
    if seconds is None:
        return f"{passes}; time unknown, because no batch could be run"
    room = "" if memory is None else f", up to {memory / 1e9:.2g} GB of memory"
    return f"{passes}: about {duration_words(*seconds)} on this machine{room}"


def duration_words(low: float, high: float) -> str:
    """A range of time, in the unit that suits its end."""
    if high < 1:
        return "a second or less"
    units = {"hours": 3600.0, "minutes": 60.0, "seconds": 1.0}
    name = next((name for name in units if high >= 2 * units[name]), "seconds")
    unit = units[name]
    digits = 1 if high < 5 * unit else 0
    first, last = (f"{value / unit:.{digits}f}".removesuffix(".0") for value in (low, high))
    return f"{last} {name}" if first == last else f"{first} to {last} {name}"
