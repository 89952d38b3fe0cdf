"""Writes docs/commands/: one page per command, from the code of the command line.

python docs/generate.py            # after a change of options or help texts
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import typer

from bnfix.cli import app

FOLDER = Path(__file__).resolve().parent / "commands"
GENERAL = "General"


def pages() -> dict[str, str]:
    """Every page by its file name."""
    command: Any = typer.main.get_command(app)
    own = {name: page(name, found) for name, found in command.commands.items()}
    return {"README.md": contents(command.commands), **{f"{n}.md": t for n, t in own.items()}}


def contents(commands: dict[str, Any]) -> str:
    lines = ["# The commands", ""]
    lines += ["Written by `python docs/generate.py` from the program itself.", ""]
    lines += ["| command | purpose |", "|---|---|"]
    for name, command in commands.items():
        first = sentences(command.help)[0]
        lines.append(f"| [`bnfix {name}`]({name}.md) | {first} |")
    return "\n".join(lines) + "\n"


def page(name: str, command: Any) -> str:
    *said, example = sentences(command.help)
    lines = [f"# bnfix {name}", "", *(part for text in said for part in (text, ""))]
    lines += ["```bash", example.removeprefix("Example: "), "```", ""]
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    for argument in arguments:
        lines += [f"`{argument.metavar}`: {text_of(argument)}", ""]
    panels: dict[str, list[Any]] = {}
    for option in command.params:
        if option.param_type_name == "option":
            panels.setdefault(option.rich_help_panel or GENERAL, []).append(option)
    for panel, options in panels.items():
        lines += [f"## {panel}", "", "| option | default | meaning |", "|---|---|---|"]
        lines += [row(option) for option in options]
        lines.append("")
    return "\n".join(lines)


def row(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    kind = "" if option.is_flag else f" {option.metavar or 'VALUE'}"
    shown = "" if option.default is None or option.is_flag else f"`{option.default}`"
    if option.required:
        shown = "required"
    text = text_of(option)
    if option.multiple and "repeatable" not in text.lower():
        text += " Repeatable."
    cells = (f"{flags}{kind}", shown, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def text_of(parameter: Any) -> str:
    return " ".join((parameter.help or "").split())


def sentences(text: str) -> list[str]:
    """The paragraphs of a help text, each on one line."""
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text.strip())]


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for file, text in pages().items():
        (FOLDER / file).write_text(text, encoding="utf-8")
        print(FOLDER.name + "/" + file)
