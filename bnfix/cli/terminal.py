"""The terminal: results to standard output, progress, notes and errors to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from bnfix.cli.tables import fitted, shown_text, tables_of
from bnfix.core import distributed
from bnfix.core.errors import BnfixError, ConfigError, one_line, some
from bnfix.jobs.inputs import Track, silent
from bnfix.report.report import Report

#: Columns of a text that goes to a file or a pipe: no table is folded or cut there.
_UNBOUNDED = 1000
#: Columns below which a progress line leaves out all but the stage and the time left.
_NARROW = 50


def _console(*, stderr: bool = False) -> Console:
    if not distributed.speaks():  # of several processes the first prints for all
        return Console(file=io.StringIO())
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_UNBOUNDED)


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
                task = progress.add_task(shown_text(stage), total=n)
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
            self.notes(_noteworthy(report))
            if written is not None:
                self.say(f"wrote {written} and {written.name}.report.html, .md, .json")

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


class _RateColumn(ProgressColumn):
    """Batches a second, or seconds a batch."""

    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        slow = task.speed < 1
        return Text(f"{1 / task.speed:.1f} s each" if slow else f"{task.speed:.1f}/s")


def _columns(width: int) -> tuple[ProgressColumn, ...]:
    """The columns that fit: stage and time left always, then count and rate, then the bar."""
    # The other columns have fixed widths: a long stage is cut, not the time.
    bar = BarColumn(max(10, width // 4)) if width >= 2 * _NARROW else None
    room = width - 14 if width < _NARROW else width - 40 - (bar.bar_width or 0 if bar else 0)
    words = TextColumn(
        "{task.description}",
        table_column=Column(no_wrap=True, overflow="ellipsis", max_width=max(12, room)),
    )
    left = TimeRemainingColumn(compact=True, table_column=Column(no_wrap=True, min_width=5))
    if width < _NARROW:
        part = TextColumn("{task.percentage:>3.0f}%", table_column=Column(min_width=4))
        return words, part, left
    rest = MofNCompleteColumn(), TextColumn("batches"), _RateColumn(), left
    return (words, *rest) if bar is None else (words, bar, *rest)


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
def stated(*, many: bool = False, debug: bool = False) -> Iterator[None]:
    """Print a stated error as one line, and exit with 1, 2 for wrong usage, 130 interrupted."""
    with _translated(debug), contextlib.ExitStack() as stack:
        if many:
            stack.enter_context(distributed.joined())
        elif distributed.launched().shared:
            raise ConfigError("this command works in one process. Start it without torchrun.")
        # Inside, since the processes still have to agree on which of them prints the error.
        stack.enter_context(_translated(debug))
        yield


@contextlib.contextmanager
def _translated(debug: bool) -> Iterator[None]:
    try:
        yield
    except (typer.Exit, typer.Abort):
        raise
    except KeyboardInterrupt as interrupt:
        _fail(interrupt, 130, str(interrupt) or "interrupted.", debug)
    except BnfixError as error:
        _fail(error, 2 if isinstance(error, ConfigError) else 1, str(error), debug)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        hint = "Lower --batch-size, or use --device cpu."
        _fail(error, 1, f"out of memory: {message} {hint}", debug)
    except Exception as error:  # noqa: BLE001 - a library's traceback says nothing to most users
        hint = "Its traceback: --debug. If it is not of your own code, report it with that."
        _fail(error, 1, f"unexpected {one_line(error)}. {hint}", debug)


def _fail(error: BaseException, code: int, message: str, debug: bool) -> None:
    if distributed.first_to_fail():
        if debug:
            traceback.print_exception(error)
        text = shown_text(f"bnfix: {message}")
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def _noteworthy(report: Report) -> list[str]:
    """The assumptions of a report, and the images that were left out."""
    if report.data is None or not report.data.n_skipped:
        return list(report.assumptions)
    left_out = f"unreadable images left out, {report.data.n_skipped}"
    return [*report.assumptions, f"{left_out}: {some(report.data.skipped, 3)}"]
