"""The command line: the program itself, its help, and its demo.

Each command parses its options, calls the public API once, and prints tables and progress.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, ClassVar

import typer
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.table import Table

from bnfix import demo as demo_files
from bnfix.checkpoints.save import check_folder, make_folder
from bnfix.cli.commands import (
    average,
    calibrate,
    convert,
    evaluate,
    export,
    finetune,
    fix,
    inspect,
    pool,
)
from bnfix.cli.flags import RUN, OneLineGroup, Seed, Writes, flattened, written
from bnfix.cli.terminal import Terminal, stated
from bnfix.core import __version__, imports_done
from bnfix.core.errors import ConfigError, did_you_mean, output_error
from bnfix.core.memory import keep_freed_memory
from bnfix.core.runtime import exact_float32
from bnfix.core.settings import RunOptions

_LINK = re.compile(r"\[([^\]]+)\]\((?:commands/)?(\w+)\.md\)")


class _Folded(TableElement):
    """A table on a page that folds long words; rich itself would cut them."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            for column in table.columns if isinstance(table, Table) else ():
                column.overflow = "fold"
            yield table


class _Page(Markdown):
    elements: ClassVar = {**Markdown.elements, "table_open": _Folded}


def pages() -> dict[str, Path]:
    """The page of each topic: inside the installed package, or next to it in a checkout."""
    package = Path(__file__).parents[1]
    # Next to an installed package, a folder named `docs` belongs to somebody else.
    inside, beside = package / "docs", package.parent / "docs"
    folder = inside if inside.is_dir() else beside
    return {path.stem: path for path in sorted(folder.glob("*.md")) if path.stem != "LOG"}


def _topics(context: typer.Context, incomplete: str) -> list[str]:
    """The words that a shell completes."""
    return [name for name in (*pages(), *_commands(context)) if name.startswith(incomplete)]


def show_help(
    context: typer.Context,
    topic: Annotated[
        str, typer.Argument(metavar="[TOPIC]", help="A page or a command.", autocompletion=_topics)
    ] = "",
) -> None:
    """Show a page of the documentation, or list them all.

    Example: bnfix help data
    """
    with stated("help"):
        found, commands, out = pages(), _commands(context), Terminal(False, False).out
        if topic in commands:
            context.find_root().command.main([topic, "--help"], prog_name="bnfix")
        elif topic in found:
            text = found[topic].read_text(encoding="utf-8")
            if not out.is_terminal:
                sys.stdout.write(text)
                return
            # As in git: the pager keeps colours, and a page that fits the screen stays on it.
            os.environ.setdefault("LESS", "FRX")
            with out.pager(styles=not out.no_color):
                out.print(_Page(_linked(text, found), hyperlinks=False))
        elif topic:
            meant = did_you_mean(topic, [*found, *commands])
            raise ConfigError(f"help: no page {topic!r}. `bnfix help` lists all.{meant}")
        else:
            table = Table("page", "", box=None, pad_edge=False)
            for name, path in found.items():
                table.add_row(name, path.read_text(encoding="utf-8").partition("\n")[0][2:])
            table.add_section()
            table.add_row("command", "", style=table.header_style)
            for row in commands.items():
                table.add_row(*row)
            out.print(table)


def _commands(context: typer.Context) -> dict[str, str]:
    """Each command, with the first sentence of its help."""
    every = getattr(context.find_root().command, "commands", {})
    return {name: str(command.help).splitlines()[0] for name, command in every.items()}


def _linked(text: str, names: Mapping[str, Path]) -> str:
    """The page, with links to other pages as commands that open them here."""

    def shown(link: re.Match[str]) -> str:
        return f"{link[1]} (`bnfix help {link[2]}`)" if link[2] in names else link[0]

    return _LINK.sub(shown, text)


_DEMO = (
    "A small residual network, trained with batches of 4 on 150 handwritten digits. bnfix repairs "
    "it with 500 other digits and tests it on 500 more. This command does the same:"
)


def demo(
    context: typer.Context,
    out: Writes,
    run: Annotated[RunOptions, {RUN: "device"}],
    gate: Seed,
    output: Annotated[Path, written("Folder to write.", "DIR")] = Path("bnfix-demo"),
) -> None:
    """Repair a small network on embedded data, offline, with all steps of fix.

    Example: bnfix demo
    """
    terminal, fixed = out.terminal(), output / "digits_net.fixed.safetensors"
    check_folder(fixed, makes=True)
    # Files of an earlier demo can be replaced, because every demo writes the same ones.
    may_write = out.force or (output / "digits_net.safetensors").is_file()
    if output.is_dir() and not may_write and any(output.iterdir()):
        raise output_error(output, "already exists. Give another -o, or --force to write into it.")
    if out.show_plan:
        does = f"demo: would fix the demo files and write {output}; nothing was done"
        terminal.plan({"command": "demo", "plan": True, "output": str(output)}, does)
        return
    make_folder(output)
    files, prep = demo_files.write_files(output), demo_files.PREPROCESSING
    shown = {"--json": out.as_json, "--quiet": out.quiet, "--debug": out.debug}
    words = [
        "fix", *(flag for flag, on in shown.items() if on), str(files.checkpoint),
        "--model", demo_files.SPEC, "--data", str(files.calibration), "--test", str(files.test),
        "--mean", str(prep.mean[0]), "--std", str(prep.std[0]), "--device", run.device,
        "--seed", str(gate.seed), "-o", str(fixed), "--force",
    ]  # fmt: skip
    if not (out.quiet or out.as_json):
        terminal.say(_DEMO)
        terminal.say(shlex.join(["bnfix", *words]))
    raise typer.Exit(context.find_root().command.main(words, standalone_mode=False) or 0)


# --- the program ---

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
        # A name that the terminal cannot encode is no reason to fail.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="bnfix")  # also for python -m bnfix: completion needs this name
