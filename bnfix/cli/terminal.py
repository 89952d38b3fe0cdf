"""The terminal: results to standard output; progress, notes and errors to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
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
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column

from bnfix.cli.tables import fitted, shown_text, tables_of
from bnfix.core import distributed, guards
from bnfix.core.errors import BnfixError, ConfigError, count, one_line, some
from bnfix.jobs.inputs import Track, silent
from bnfix.report.pages import clean
from bnfix.report.report import Report

#: Width of text for a file or a pipe: no table is folded or cut there.
_UNBOUNDED = 1000
#: Width below which a progress line shows only the stage, the percentage and the time left.
_NARROW = 50


def _console(*, stderr: bool = False) -> Console:
    if not distributed.speaks():  # the first process prints for all
        return Console(file=io.StringIO())
    console = Console(stderr=stderr, emoji=False)  # a name such as o.py:star is not an emoji
    if not console.is_terminal:
        console.width = _UNBOUNDED
    return console


@dataclasses.dataclass
class Terminal:
    """The output of a command: results to standard output, everything else to standard error."""

    as_json: bool
    quiet: bool
    out: Console = dataclasses.field(default_factory=_console)
    err: Console = dataclasses.field(default_factory=lambda: _console(stderr=True))

    @contextlib.contextmanager
    def working(self) -> Iterator[Track]:
        """Show progress on a terminal; keep prints of the user's code off standard output."""
        shown = self.err.is_terminal and not self.err.is_dumb_terminal and not self.quiet
        if not shown:
            with guards.stdout_to_stderr():
                yield silent
            return
        bars = Progress(*_columns(self.err.width), console=self.err, transient=True)
        with guards.stdout_to_stderr(), bars as progress:

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
                names = some(report.data.skipped, 3)
                self.notes([f"{count(n, 'unreadable images')} skipped: {names}"])
            if written is not None:
                beside = "/: weights, card and " if written.is_dir() else f" and {written.name}."
                self.say(f"wrote {written}{beside}report.html, .md, .json")

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
    """The columns that fit: always stage and time left, then the count, then the bar."""
    bar = width // 4 if width >= 2 * _NARROW else 0
    room = width - (14 if width < _NARROW else 30 + bar)
    # The other columns have fixed widths, so a long stage is cut and the time stays visible.
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
def stated(command: str, *, many: bool = False, debug: bool = False) -> Iterator[None]:
    """Print a stated error as one line; exit with 1, 2 for wrong usage, 130 if interrupted."""
    with _translated(command, debug), contextlib.ExitStack() as stack:
        if many:
            stack.enter_context(distributed.joined())
        elif distributed.launched().shared:
            raise ConfigError("this command works in one process only. Start it without torchrun.")
        # Inside `joined`, since the processes must still agree on which of them prints the error.
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
        more = f" See bnfix {page}." if command != "help" else ""
        _fail(error, code, f"{text}{end}{more}", debug)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        hint = "Lower --batch-size, or use --device cpu."
        _fail(error, 1, f"out of memory: {message} {hint}", debug)
    except Exception as error:  # noqa: BLE001 - a library's traceback means nothing to most users
        hint = "Add --debug for the traceback; report it, unless the error is in your own code."
        _fail(error, 1, f"unexpected {one_line(error)}. {hint}", debug)


def _fail(error: BaseException, code: int, message: str, debug: bool) -> None:
    if distributed.first_to_fail():
        if debug:
            traceback.print_exception(error)
        text = shown_text(f"bnfix: {message}")
        Console(stderr=True, emoji=False).print(text, soft_wrap=True, highlight=False)
    raise typer.Exit(code)
