"""A report's records as tables for the terminal, at most 80 columns wide."""

from __future__ import annotations

from collections.abc import Iterator

from rich import box
from rich.markup import escape
from rich.table import Table

from bnfix.reporting.pages import clean, ends, number, percent
from bnfix.reporting.report import Report

#: Columns of a terminal on which tables have their usual form.
_LEAST_WIDTH = 60


def shown_text(text: object) -> str:
    """A text of any origin on one line, without control characters and without markup."""
    return escape(clean(text, limit=10_000))


def tables_of(report: Report) -> Iterator[Table]:
    """The tables for which there is something to show."""
    if report.decisions:
        yield _decisions(report)
    if any(model.metrics.top1 is not None for model in report.models):
        yield _models(report)
    if report.ranking:
        yield _ranks(report)
    if any(model.custom for model in report.models):
        yield _own_metrics(report)
    if report.corruptions:
        yield _corruptions(report)
    if report.invariance:
        yield _invariance(report)


def _decisions(report: Report) -> Table:
    table = _narrow("candidate", "NLL", "was", "top-1", "was", "admitted")
    for d in report.decisions:
        table.add_row(
            shown_text(d.candidate),
            number(d.nll),
            number(d.incumbent_nll),
            percent(d.top1),
            percent(d.incumbent_top1),
            "yes" if d.admitted else "no",
        )
    n = report.decisions[0].n_examples
    table.caption = f"judged on {n:,} images held out for it; the report says why"
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
    table.caption = "scaled: NLL after temperature scaling; live: layers with an example weight"
    return table


def _ranks(report: Report) -> Table:
    table = _narrow("rank, model", "NLL", "difference (95%)", "top-1", "points (95%)")
    for row in report.ranking:
        nll = points = "-"
        if row.paired is not None:
            nll = "{} ({} to {})".format(*ends(row.paired.nll, points=False))
            points = "{} ({} to {})".format(*ends(row.paired.top1, points=True))
        name = f"{row.rank}. {shown_text(row.name)}"
        table.add_row(name, f"{row.nll:.3f}", nll, f"{100 * row.top1:.1f}%", points)
    table.caption = f"by NLL, then top-1; differences to {shown_text(report.models[0].name)}"
    return table


def _own_metrics(report: Report) -> Table:
    table = _narrow("metric, model", "value", "95%", "difference", "95%")
    for name in dict.fromkeys(c.name for model in report.models for c in model.custom):
        for model in report.models:
            for c in model.custom:
                if c.name == name:
                    table.add_row(
                        f"{shown_text(name)}, {shown_text(model.name)}",
                        f"{c.value:.4g}",
                        _range(c.interval),
                        "-" if c.difference is None else f"{c.difference:.4g}",
                        _range(c.difference_interval),
                    )
    return table


def _corruptions(report: Report) -> Table:
    names = [model.name for model in report.models]
    shown = names if len(names) <= 2 else [names[0], names[-1]]
    table = _narrow("top-1 under", *(f"{n}. model" for n in range(1, len(shown) + 1)), "points")
    rows = {(row.kind, row.severity, row.model): row for row in report.corruptions}
    for kind, severity in dict.fromkeys((row.kind, row.severity) for row in report.corruptions):
        found = [rows[kind, severity, name] for name in shown]
        last = found[-1].paired
        points = "-" if last is None else "{} ({} to {})".format(*ends(last.top1, points=True))
        table.add_row(f"{kind} {severity}", *(f"{100 * row.top1:.1f}%" for row in found), points)
    told = ", ".join(f"{n}. {shown_text(name)}" for n, name in enumerate(shown, 1))
    table.caption = f"{told}; points: last less first, 95%"
    return table


def _invariance(report: Report) -> Table:
    table = _narrow("logits differ by", "alone", "same class", "other batch", "same class")
    for row in report.invariance:
        table.add_row(
            shown_text(row.model),
            f"{row.alone.largest_difference:.2g}",
            f"{100 * row.alone.top1_agreement:.1f}%",
            f"{row.permuted.largest_difference:.2g}",
            f"{100 * row.permuted.top1_agreement:.1f}%",
        )
    first = report.invariance[0]
    table.caption = f"{first.n_examples:,} images, against batches of {first.batch_size}"
    return table


def _range(interval: tuple[float, float] | None) -> str:
    return "-" if interval is None else f"{interval[0]:.4g} to {interval[1]:.4g}"


def fitted(table: Table, width: int) -> Table:
    """The same table for a narrow terminal: numbers may wrap, and what was before is left out."""
    if width < _LEAST_WIDTH:
        table.columns = [column for column in table.columns if column.header != "was"]
        for number, column in enumerate(table.columns):
            column.no_wrap, column.overflow = False, "fold"
            column.min_width = 5 if number else 10
    return table


def _narrow(name: str, *numbers: str) -> Table:
    """A table of names and numbers that fits a terminal of 80 columns; only names may wrap."""
    table = Table(
        name, box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption_justify="left"
    )
    for heading in numbers:
        table.add_column(heading, justify="right", no_wrap=True)
    return table
