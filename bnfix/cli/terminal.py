"""Words and tables for the terminal: results to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import os
import sys
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
from rich.table import Column, Table
from rich.text import Text

from bnfix import processes
from bnfix.cli.tables import fitted, shown_text, tables_of
from bnfix.diagnosing.diagnosis import Finding
from bnfix.diagnosing.examination import Behaviour
from bnfix.diagnosing.inspection import Inspection
from bnfix.errors import BnfixError, ConfigError, some
from bnfix.reporting.report import Report
from bnfix.reporting.result import Result
from bnfix.workbench import Track, silent

#: Columns of a text that goes to a file or a pipe: no table is folded or cut there.
_UNBOUNDED = 1000
#: Columns below which a progress line leaves out all but the stage and the time left.
_NARROW = 50


def _console(*, stderr: bool = False) -> Console:
    if not processes.speaks():
        return Console(file=io.StringIO())
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_UNBOUNDED)


#: Findings of one kind that are spelled out.
_SHOWN = 5


@dataclasses.dataclass
class Terminal:
    """Where a command's words go: results to standard output, all else to standard error."""

    as_json: bool
    quiet: bool
    out: Console = dataclasses.field(default_factory=_console)
    err: Console = dataclasses.field(default_factory=lambda: _console(stderr=True))
    stages: frozenset[str] = frozenset()

    @contextlib.contextmanager
    def working(self) -> Iterator[Track]:
        """Show progress on a terminal; keep the user's own prints off standard output.

        Yields:
            What wraps the batches of a pass.
        """
        shown = self.err.is_terminal and not self.err.is_dumb_terminal and not self.quiet
        if not shown:
            with _stdout_to_stderr():
                yield silent
            return
        bars = Progress(*_columns(self.err.width), console=self.err, transient=True)
        seen: list[str] = []
        with _stdout_to_stderr(), bars as progress:

            def track(stage: str, batches: Iterable[Any], n: int) -> Iterable[Any]:
                task = progress.add_task(self._numbered(stage, seen), total=n)
                try:
                    for batch in batches:
                        yield batch
                        progress.advance(task)
                finally:
                    progress.remove_task(task)

            yield track

    def _numbered(self, stage: str, seen: list[str]) -> str:
        """A stage with its number among those of the plan, where it is one of them."""
        head = stage_head(stage)
        if head not in self.stages:
            return shown_text(stage)
        if head not in seen:
            seen.append(head)
        return f"{seen.index(head) + 1}/{len(self.stages)} {shown_text(stage)}"

    def show(self, report: Report, written: Path | None = None) -> None:
        """The result, in the form that was asked for.

        Args:
            report: of the command.
            written: the checkpoint that was written.
        """
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

    def show_demo_plan(self, output: str) -> None:
        """What the demonstration would do.

        Args:
            output: folder that it would write.
        """
        if self.as_json:
            self.print_json({"command": "demo", "plan": True, "output": output})
        else:
            self.say(f"demo: would fix the embedded digits and write {output}; nothing was done")

    def say(self, text: str) -> None:
        """One line on standard output, as it is.

        Args:
            text: of any origin.
        """
        self.out.print(shown_text(text), soft_wrap=True, highlight=False)

    def notes(self, notes: Iterable[str]) -> None:
        """What a user should know besides, on standard error.

        Args:
            notes: one sentence each, of any origin.
        """
        for note in notes:
            self.err.print(shown_text(f"note: {note}"), soft_wrap=True, highlight=False)

    def print_json(self, content: Any) -> None:
        """One JSON object on standard output.

        Args:
            content: JSON values.
        """
        if processes.speaks():
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
    """What fits: stage and time left always, then count and rate, then the bar."""
    # What stands beside the words has a width of its own; a long stage gives way, not the time.
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


def stage_head(stage: str) -> str:
    """What a stage of work is called, without what differs between its passes.

    Args:
        stage: for example ``select: what stands``.

    Returns:
        For example ``select``.
    """
    return stage.replace(":", " ").split(" ", 1)[0]


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
def stated(*, many: bool = False) -> Iterator[None]:
    """Turn stated errors into one line and an exit code: 1, 2 for wrong usage, 130 interrupted.

    Args:
        many: whether the command can work in several processes, started by torchrun.

    Yields:
        Nothing.

    Raises:
        ConfigError: never; it is stated.
    """
    with _translated(), contextlib.ExitStack() as stack:
        if many:
            stack.enter_context(processes.joined())
        elif processes.launched().shared:
            raise ConfigError("this command works in one process. Start it without torchrun.")
        # Inside: which of several processes speaks is still to be settled with the others.
        stack.enter_context(_translated())
        yield


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except ConfigError as error:
        _fail(error, 2)
    except BnfixError as error:
        _fail(error, 1)
    except torch.OutOfMemoryError as error:
        message = str(error).splitlines()[0]
        _fail(f"out of memory: {message} Lower --batch-size, or use --device cpu.", 1)
    except KeyboardInterrupt as interrupt:
        _fail(str(interrupt) or "interrupted.", 130)


def _fail(error: Exception | str, code: int) -> None:
    if processes.first_to_fail():
        text = shown_text(f"bnfix: {error}")
        Console(stderr=True).print(text, soft_wrap=True, highlight=False)
    raise typer.Exit(code)


def show_planned(terminal: Terminal, described: dict[str, Any]) -> None:
    """What a command would do.

    Args:
        terminal: where to.
        described: from `Plan.describe`.
    """
    if terminal.as_json:
        terminal.print_json(described)
        return
    split = described["data"]["splits"]
    lines = [
        f"{described['command']}: {described['n_layers']} norm layers of {described['model']}",
        f"data: {described['data']['spec']} ({described['data']['kind']}), "
        + ", ".join(f"{name} {n:,}" for name, n in split.items()),
        *(f"{i}. {stage}" for i, stage in enumerate(described["stages"], 1)),
        estimate_line(described),
        f"would write {described['output']} and its report; nothing was done",
        *(f"note: {note}" for note in described["assumptions"]),
    ]
    for line in lines:
        terminal.say(line)


def estimate_line(described: dict[str, Any]) -> str:
    """What a plan costs, in one line.

    Args:
        described: with the keys of `Estimate.to_json`.

    Returns:
        Passes, time and memory, as far as they are known.
    """
    passes = f"{described['passes']:.3g} passes in all"
    seconds, memory = described["seconds_estimated"], described["memory_estimated_bytes"]
    if seconds is None:
        return f"{passes}; the time is not known, since no batch could be run"
    room = "" if memory is None else f", up to {memory / 1e9:.2g} GB of memory"
    return f"{passes}: about {duration_words(*seconds)} on this machine{room}"


def duration_words(low: float, high: float) -> str:
    """A range of time, in the unit that suits its end.

    Args:
        low: least seconds.
        high: most.

    Returns:
        For example ``2 to 4 minutes``.
    """
    if high < 1:
        return "a second or less"
    name, unit = next(
        (name, unit)
        for name, unit in (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))
        if high >= 2 * unit or unit == 1
    )
    digits = 1 if high < 5 * unit else 0
    ends = [f"{value / unit:.{digits}f}".removesuffix(".0") for value in (low, high)]
    return f"{ends[1]} {name}" if ends[0] == ends[1] else f"{ends[0]} to {ends[1]} {name}"


def show_conversion(
    terminal: Terminal, result: Result, output: Path | None, cost: dict[str, Any]
) -> None:
    """The layers of a conversion.

    Args:
        terminal: where to.
        result: of the command.
        output: what was written; ``None`` for a plan.
        cost: what a plan says of time and memory.
    """
    swap = result.report.swap
    if terminal.as_json:
        content = result.report.to_json()
        content |= {"plan": True, **cost} if output is None else {}
        terminal.print_json({**content, "output": None if output is None else str(output)})
        return
    if swap is None:
        terminal.show(result.report, output)
        return
    table = Table("layer", "was", "channels", "groups", "ghost", "example weight", "difference")
    table.columns[0].overflow = "fold"
    for change in swap.changes:
        table.add_row(
            shown_text(change.name),
            shown_text(change.kind),
            str(change.channels),
            str(change.channel_groups),
            "all" if change.ghost_size is None else str(change.ghost_size),
            f"{change.example_weight or 0:g}",
            "-" if change.difference is None else f"{change.difference:.1e}",
        )
    if not terminal.quiet:
        terminal.out.print(table)
        terminal.notes([*result.report.assumptions, *swap.skipped])
    wrote = "nothing was written" if output is None else f"wrote {output} and its report"
    if output is None:
        terminal.say(estimate_line(cost))
    terminal.say(f"{len(swap.changes)} layers; {wrote}")


def show_inspection(terminal: Terminal, found: Inspection) -> None:
    """Layers, findings with what to do, and the commands of the file's history.

    Args:
        terminal: where to.
        found: by the inspection.
    """
    drifts = {} if found.behaviour is None else found.behaviour.drifts
    more = ("shift", "factor") if drifts else ()
    table = Table(
        "layer", "kind", "channels", "batches", "mean", "variance", "dead", "weight", *more
    )
    table.columns[0].overflow = "fold"
    for layer in found.layers:
        shift, ratio = drifts.get(layer.name, (math.nan, math.nan))
        table.add_row(
            shown_text(layer.name),
            shown_text(found.kinds.get(layer.name, "?")),
            str(layer.channels),
            "-" if layer.batches_tracked is None else str(layer.batches_tracked),
            "{:.2g} to {:.2g}".format(*layer.mean_range),
            "{:.2g} to {:.2g}".format(*layer.var_range),
            str(layer.n_dead),
            _short_weight(layer.example_weight),
            *((f"{shift:.2g}", f"{math.exp(min(ratio, 700)):.3g}") if drifts else ()),
        )
    if drifts:
        table.caption = (
            "shift: how far stored means are from those of the data, in deviations; factor: the "
            "same of variances"
        )
    if found.layers and not terminal.quiet:
        terminal.out.print(table)
    for note in [*found.notes, *found.problems]:
        terminal.say(f"note: {note}")
    if found.behaviour is not None:
        terminal.say(_behaviour_line(found.behaviour))
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in found.findings:
        key = finding.severity, finding.fault, finding.advice
        groups.setdefault(key, []).append(finding)
    for (severity, _, advice), findings in groups.items():
        for finding in findings[:_SHOWN]:
            terminal.say(f"{severity}: {finding.layer or 'model'}: {finding.detail}")
        rest = [finding.layer for finding in findings[_SHOWN:]]
        also = f"(the same of {some(rest)}) " if rest else ""
        terminal.say(f"  {also}-> {advice}")
    for number, told in enumerate(found.told, 1):
        terminal.say(f"history {number}: {told.command}")
        terminal.say(f"  {told.did}")
    summary = f"{len(found.layers)} norm layers, {len(found.findings)} findings"
    terminal.say(summary if found.layers else "no norm layer with running statistics in this file")


def _behaviour_line(seen: Behaviour) -> str:
    """What the model does with its stored statistics, and with those of each batch."""
    ranges = [
        "{:.3g} to {:.3g}".format(*r) for r in (seen.output_range, seen.output_range_training)
    ]
    parts = [f"outputs {ranges[0]} (with the statistics of each batch {ranges[1]})"]
    if seen.top1 is not None and seen.top1_training is not None:
        parts.append(f"top-1 {100 * seen.top1:.1f}% (so {100 * seen.top1_training:.1f}%)")
    return f"on {seen.n_examples} examples: {'; '.join(parts)}"


def _short_weight(weight: Any) -> str:
    numbers = [w for w in weight if isinstance(w, int | float)] if isinstance(weight, list) else []
    if numbers:
        return f"{min(numbers):.2g} to {max(numbers):.2g}"
    return f"{weight:.3g}" if isinstance(weight, int | float) else "?"


def _noteworthy(report: Report) -> list[str]:
    """What was assumed, and which images were left out."""
    skipped = report.data.skipped if report.data else ()
    n = report.data.n_skipped if report.data else 0
    left_out = f"unreadable images left out, {n}: {some(skipped, 3)}"
    return [*report.assumptions, *([left_out] if n else [])]


def jsonable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
