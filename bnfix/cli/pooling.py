"""`pool`, and `calibrate --save-moments`: statistics of clients who share no images."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from bnfix.checkpoints.save import check_output
from bnfix.cli.flags import OUT, RUN, Model, Out, Output, Writes, about, command_line, written
from bnfix.core.errors import ConfigError
from bnfix.core.settings import RunOptions
from bnfix.jobs.session import Plan
from bnfix.jobs.unjudged import pool_files, save_moments
from bnfix.report.result import check_outputs

_MOMENTS = "In place of -o: write only the moments of what every norm layer meets, for pool."
Moments = Annotated[Path | None, about(_MOMENTS, OUT, "FILE")]
Either = Annotated[Path | None, written("The .safetensors, or a hub folder as CKPT is, to write.")]
_FILES = "The checkpoint, and the files that calibrate --save-moments wrote for it, in any order."


def pool(
    files: Annotated[list[Path], typer.Argument(metavar="FILE... CKPT", help=_FILES)],
    output: Output,
    model: Model,
    run: Annotated[RunOptions, {RUN: "device"}],
    out: Writes,
) -> None:
    """Give a checkpoint the pooled statistics of clients who share no images.

    Example: bnfix pool a.safetensors b.safetensors net.pth --model net.py:build -o both.safetensors
    """
    terminal = out.terminal()
    if not out.show_plan:
        check_outputs(output, None, force=out.force)
    with terminal.working():
        result = pool_files(files, model=model, run=run, command_line=command_line())
        if not out.show_plan:
            result.save(output, force=out.force)
    if out.show_plan:
        notes = list(result.report.assumptions)
        terminal.plan({"command": "pool", "plan": True, "steps": notes}, *notes, "not written")
    else:
        terminal.show(result.report, output)


def write_moments(
    plan: Plan, checkpoint: Path, data: Sequence[str], given: Sequence[Path | None], out: Out
) -> None:
    """Measure a client's moments and write them, or say what would be done; not with -o."""
    path, output = given
    if path is None or output is not None:
        raise ConfigError("calibrate: give either -o OUT or --save-moments FILE.", name="output")
    terminal = out.terminal()
    check_output(path, force=out.force or out.show_plan)
    with terminal.working() as track:
        file = None if out.show_plan else path
        found = save_moments(checkpoint, data, plan, file, force=out.force, track=track)
    done = "nothing was written" if out.show_plan else f"wrote {path}"
    if not terminal.as_json:
        terminal.notes(found["assumptions"])
    terminal.plan(found, f"moments of {found['n_examples']:,} examples; {done}")
