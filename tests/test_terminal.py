"""Tables and progress on terminals that are narrow, dumb, or without colour."""

from __future__ import annotations

import io
import re

import pytest
import torch
import typer
from rich.console import Console

from bnfix.cli.tables import fitted, tables_of
from bnfix.cli.terminal import Terminal, stated
from tests.test_report import full_report


def terminal(width: int, **environment: str) -> tuple[Terminal, io.StringIO]:
    screen = io.StringIO()
    settings = {"TERM": "xterm", **environment}
    console = Console(file=screen, force_terminal=True, width=width, _environ=settings)
    return Terminal(False, False, console, console), screen


@pytest.mark.parametrize("width", [40, 80, 120])
def test_tables_fit_and_keep_their_names(width):
    found, screen = terminal(width, NO_COLOR="1")
    report = full_report("net")
    for table in tables_of(report):
        found.out.print(fitted(table, width))
    lines = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue()).splitlines()
    assert max(map(len, lines)) <= width
    assert sum("net" in line for line in lines) >= 5
    assert not any("…" in line for line in lines)


@pytest.mark.parametrize("width", [40, 70, 120])
def test_progress_names_the_stage_and_leaves_nothing(width):
    found, screen = terminal(width)
    with found.working() as track:
        for stage in ("1/2 statistics (population)", "a look at the layers"):
            assert list(track(stage, range(3), 3)) == [0, 1, 2]
    assert "\x1b" in screen.getvalue()
    assert "1/2 statistics" in screen.getvalue()


def test_a_dumb_terminal_gets_no_bars():
    found, screen = terminal(80, TERM="dumb")
    with found.working() as track:
        assert list(track("statistics", range(3), 3)) == [0, 1, 2]
    assert screen.getvalue() == ""


def test_no_colour_where_none_is_wanted():
    found, screen = terminal(80, NO_COLOR="1")
    found.show(full_report("net"))
    text = screen.getvalue()
    assert "better" in text
    assert not any(f"\x1b[{code}m" in text for code in range(30, 38))


def test_completion_can_be_shown(cli):
    assert "--install-completion" in cli("--help").out


def test_an_error_that_nobody_states_is_one_line_too(capsys):
    with pytest.raises(typer.Exit) as caught, stated("fix"):
        torch.zeros(2) @ torch.zeros(3)
    assert caught.value.exit_code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("bnfix: unexpected RuntimeError: inconsistent tensor size")
    assert "test_terminal.py:" in line
