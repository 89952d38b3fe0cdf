"""What plans, conversions and inspections say on the terminal."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from bnfix.cli.tables import shown_text
from bnfix.cli.terminal import Terminal
from bnfix.diagnosing.diagnosis import Finding
from bnfix.diagnosing.examination import Behaviour
from bnfix.diagnosing.inspection import Inspection
from bnfix.errors import some
from bnfix.reporting.result import Result

#: Findings of one kind that are spelled out.
_SHOWN = 5


def show_planned(terminal: Terminal, described: dict[str, Any]) -> None:
    """What a command would do."""
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
    """What a plan costs, in one line."""
    passes = f"{described['passes']:.3g} passes in all"
    seconds, memory = described["seconds_estimated"], described["memory_estimated_bytes"]
    if seconds is None:
        return f"{passes}; the time is not known, since no batch could be run"
    room = "" if memory is None else f", up to {memory / 1e9:.2g} GB of memory"
    return f"{passes}: about {duration_words(*seconds)} on this machine{room}"


def duration_words(low: float, high: float) -> str:
    """A range of time, in the unit that suits its end."""
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
    """The layers of a conversion."""
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
    """Layers, findings with what to do, and the commands of the file's history."""
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
    idle = [found for (_, _, advice), found in groups.items() if advice == "nothing"]
    for (severity, _, advice), findings in groups.items():
        if advice == "nothing":
            continue
        for finding in findings[:_SHOWN]:
            terminal.say(f"{severity}: {finding.layer or 'model'}: {finding.detail}")
        rest = [finding.layer for finding in findings[_SHOWN:]]
        also = f"(the same of {some(rest)}) " if rest else ""
        terminal.say(f"  {also}-> {advice}")
    if idle:
        kinds = [
            f"{len(f)} {f[0].fault.replace('-', ' ')} ({some([one.layer for one in f], 3)})"
            for f in idle
        ]
        terminal.say(f"note: nothing to do about {'; '.join(kinds)}; --json has the details")
    for number, entry in enumerate(found.commands, 1):
        lines = entry.options if entry.command is None else (entry.command,)
        terminal.say(f"history {number}: {lines[0]}")
        for line in (*lines[1:], entry.did):
            terminal.say(f"  {line}")
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


def jsonable(value: Any) -> Any:
    """The same without NaN and infinity, which JSON has not."""
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [jsonable(v) for v in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def _short_weight(weight: Any) -> str:
    numbers = [w for w in weight if isinstance(w, int | float)] if isinstance(weight, list) else []
    if numbers:
        return f"{min(numbers):.2g} to {max(numbers):.2g}"
    return f"{weight:.3g}" if isinstance(weight, int | float) else "?"
