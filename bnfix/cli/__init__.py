"""The command line: parse, one call of the public API, tables and progress, exit code."""

from __future__ import annotations

import io
import logging
import sys
from typing import Annotated

import typer

from bnfix.cli.commands import (
    average,
    calibrate,
    convert,
    evaluate,
    export,
    finetune,
    fix,
    inspect,
)
from bnfix.cli.first_steps import demo, show_help
from bnfix.cli.flags import OneLineGroup, flattened
from bnfix.cli.pooling import pool
from bnfix.core import __version__, imports_done
from bnfix.core.memory import keep_freed_memory
from bnfix.core.runtime import exact_float32

app = typer.Typer(
    name="bnfix",
    cls=OneLineGroup,
    help="Repair trained networks at their Batch Normalization layers: convert, recalibrate, "
    "choose, prove.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

for command in (fix, calibrate, finetune, average, pool, convert, export, evaluate, inspect, demo):
    called = "eval" if command is evaluate else command.__name__
    many = command in (fix, calibrate, finetune, average, evaluate)
    app.command(called)(flattened(command, called, many=many))
app.command("help")(show_help)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"bnfix {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    logging.getLogger("bnfix").addHandler(logging.NullHandler())


def main() -> None:
    """Run the command line."""
    imports_done()
    keep_freed_memory()
    exact_float32()
    for stream in (sys.stdout, sys.stderr):
        # A name that the terminal's encoding has no sign for is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="bnfix")  # also as python -m bnfix, whose completion nobody could use
