"""Wrong usage in one line, with what was probably meant."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
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

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line."""
        _TYPED.set(tuple(sys.argv[1:] if args is None else args))
        run = partial(
            super().main,
            args,
            prog_name,
            complete_var,
            windows_expand_args=windows_expand_args,
            **extra,
        )
        if not standalone_mode:
            return run(standalone_mode=False)
        try:
            code = run(standalone_mode=False)
        except typer.Abort:
            typer.echo("bnfix: interrupted.", err=True)
            sys.exit(130)
        except typer.TyperException as error:
            typer.echo(f"bnfix: {_words(error)}", err=True)
            sys.exit(getattr(error, "exit_code", 2))
        sys.exit(code if isinstance(code, int) else 0)


def _words(error: typer.TyperException) -> str:
    """The parser's message as one sentence, what was probably meant, and where to read more."""
    context = getattr(error, "ctx", None)
    possible = list(getattr(error, "possibilities", None) or ())
    # Some of its messages end with a full stop and some do not.
    text = str(getattr(error, "message", "") if possible else _formatted(error))
    text = " ".join(text.split()).removesuffix(".")
    meant = f"Did you mean {' or '.join(possible)}?" if possible else ""
    path = "bnfix" if context is None else context.command_path
    end = "" if text.endswith("?") else "."
    return " ".join(part for part in (f"{text}{end}", meant, f"See {path} --help.") if part)


def _formatted(error: typer.TyperException) -> str:
    message = getattr(error, "format_message", None)
    return str(error if message is None else message())
