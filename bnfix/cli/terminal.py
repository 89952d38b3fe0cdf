"""Words and tables for the terminal: results to standard output, all else to standard error."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from bnfix.diagnosis import Finding, NormTensors
from bnfix.errors import BnfixError, ConfigError, some
from bnfix.pages import clean
from bnfix.report import Report
from bnfix.result import Result
from bnfix.workbench import Track, silent

#: Columns of a text that goes to a file or a pipe: no table is folded or cut there.
_UNBOUNDED = 1000


def _console(*, stderr: bool = False) -> Console:
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_UNBOUNDED)


@dataclasses.dataclass
class Terminal:
    """Where a command's words go: results to standard output, all else to standard error."""

    as_json: bool
    quiet: bool
    out: Console = dataclasses.field(default_factory=_console)
    err: Console = dataclasses.field(default_factory=lambda: _console(stderr=True))

    @contextlib.contextmanager
    def working(self) -> Iterator[Track]:
        """Show progress on a terminal; keep the user's own prints off standard output.

        Yields:
            What wraps the batches of a pass.
        """
        shown = self.err.is_terminal and not self.quiet
        if not shown:
            with _stdout_to_stderr():
                yield silent
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeRemainingColumn(),
        )
        bars = Progress(*columns, console=self.err, transient=True)
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
            for table in (_decision_table(report), _model_table(report)):
                if table is not None:
                    self.out.print(table)
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
        sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")
        sys.stdout.flush()


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


def shown_text(text: object) -> str:
    """A text of any origin on one line, without control characters and without markup.

    Args:
        text: for example a layer's name.

    Returns:
        What rich prints as it is.
    """
    return escape(clean(text, limit=10_000))


@contextlib.contextmanager
def stated() -> Iterator[None]:
    """Turn stated errors into one line and an exit code: 1, 2 for wrong usage, 130 interrupted.

    Yields:
        Nothing.
    """
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
    text = shown_text(f"bnfix: {error}")
    _console(stderr=True).print(text, soft_wrap=True, highlight=False)
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
        f"would write {described['output']} and its report; nothing was done",
        *(f"note: {note}" for note in described["assumptions"]),
    ]
    for line in lines:
        terminal.say(line)


def show_conversion(terminal: Terminal, result: Result, output: Path | None) -> None:
    """The layers of a conversion.

    Args:
        terminal: where to.
        result: of the command.
        output: what was written; ``None`` for a plan.
    """
    swap = result.report.swap
    if terminal.as_json:
        content = result.report.to_json()
        content |= {"plan": True} if output is None else {}
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
    terminal.say(f"{len(swap.changes)} layers; {wrote}")


def show_inspection(
    terminal: Terminal,
    layers: Sequence[NormTensors],
    kinds: dict[str, str],
    findings: Sequence[Finding],
    notes: Sequence[str],
) -> None:
    """Layers and findings.

    Args:
        terminal: where to.
        layers: of the file.
        kinds: class names by layer, where a model was given.
        findings: what is wrong.
        notes: how the file was read.
    """
    table = Table("layer", "kind", "channels", "batches", "mean", "variance", "dead", "weight")
    table.columns[0].overflow = "fold"
    for layer in layers:
        table.add_row(
            shown_text(layer.name),
            shown_text(kinds.get(layer.name, "?")),
            str(layer.channels),
            "-" if layer.batches_tracked is None else str(layer.batches_tracked),
            "{:.2g} to {:.2g}".format(*layer.mean_range),
            "{:.2g} to {:.2g}".format(*layer.var_range),
            str(layer.n_dead),
            _short_weight(layer.example_weight),
        )
    if layers and not terminal.quiet:
        terminal.out.print(table)
    for note in notes:
        terminal.say(f"note: {note}")
    for finding in findings:
        terminal.say(f"{finding.severity}: {finding.layer}: {finding.detail} -> {finding.advice}")
    summary = f"{len(layers)} norm layers, {len(findings)} findings"
    terminal.say(summary if layers else "no norm layer with running statistics in this file")


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


def _decision_table(report: Report) -> Table | None:
    if not report.decisions:
        return None
    table = _narrow("candidate", "NLL", "was", "top-1", "was", "admitted")
    for d in report.decisions:
        table.add_row(
            shown_text(d.candidate),
            f"{d.nll:.3f}",
            f"{d.incumbent_nll:.3f}",
            f"{100 * d.top1:.1f}%",
            f"{100 * d.incumbent_top1:.1f}%",
            "yes" if d.admitted else "no",
        )
    n = report.decisions[0].n_examples
    table.caption = f"judged on {n:,} images held out for it; the report says why"
    return table


def _model_table(report: Report) -> Table | None:
    if not report.models or report.models[0].metrics.top1 is None:
        return None
    table = _narrow("model", "top-1 (95%)", "NLL (95%)", "scaled", "live")
    for model in report.models:
        m = model.metrics
        low, high = m.interval["top1"]
        nll_low, nll_high = m.interval["nll"]
        table.add_row(
            shown_text(model.name),
            f"{100 * (m.top1 or 0):.1f}% ({100 * low:.1f} to {100 * high:.1f})",
            f"{m.nll:.3f} ({nll_low:.3f} to {nll_high:.3f})",
            f"{m.nll_temperature_scaled:.3f}",
            str(model.n_live),
        )
    table.caption = "scaled: NLL after temperature scaling; live: layers with an example weight"
    return table


def _narrow(name: str, *numbers: str) -> Table:
    """A table of names and numbers that fits a terminal of 80 columns; only names may wrap."""
    table = Table(
        name, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left"
    )
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def jsonable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value
