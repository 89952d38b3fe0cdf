"""Wrong usage in one line, with a likely correction."""

from __future__ import annotations

import shlex
import sys
from contextvars import ContextVar
from functools import partial
from typing import Any, Final

import typer
from typer.core import TyperGroup

_TYPED: Final[ContextVar[tuple[str, ...]]] = ContextVar("typed", default=())


def command_line() -> str:
    """This command as it was typed, quoted for a shell."""
    return shlex.join(["bnfix", *_TYPED.get()])


class OneLineGroup(TyperGroup):
    """The commands, whose wrong usage is one line and exit code 2."""

    def main(self, *positional: Any, standalone_mode: bool = True, **options: Any) -> Any:
        """Run a command line, by default that of this process."""
        typed = positional[0] if positional else options.get("args")
        _TYPED.set(tuple(sys.argv[1:] if typed is None else typed))
        main: Any = super().main
        run = partial(main, *positional, standalone_mode=False, **options)
        if not standalone_mode:
            return run()
        try:
            code = run()
        except typer.Abort:
            typer.echo("bnfix: interrupted.", err=True)
            sys.exit(130)
        except typer.TyperException as error:
            # A bare `bnfix` has shown its help by now, and has nothing to say.
            if words := _words(error):
                typer.echo(f"bnfix: {words}", err=True)
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _words(error: typer.TyperException) -> str:
    """The parser's message as one sentence, a likely correction, and where to read more."""
    context = getattr(error, "ctx", None)
    possible = list(getattr(error, "possibilities", None) or ())
    # Some of its messages end with a full stop and some do not.
    formatted = getattr(error, "format_message", lambda: error)
    text = str(getattr(error, "message", "") if possible else formatted())
    text = " ".join(text.split()).removesuffix(".")
    if not text and not possible:
        return ""
    meant = f"Did you mean {' or '.join(possible)}?" if possible else ""
    path = "bnfix" if context is None else context.command_path
    end = "" if text.endswith("?") else "."
    return " ".join(part for part in (f"{text}{end}", meant, f"See {path} --help.") if part)
