"""What an installation gives: the wheel and its pages, `bnfix help`, Tab, and where errors lead."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main
import typer.testing
import yaml
from typer.testing import CliRunner

import bnfix
from bnfix.cli import app
from bnfix.core import errors
from tests.conftest import ROOT, Files, Outcome, environment

Cli = Callable[..., Outcome]

PAGES = {path.stem: path for path in (ROOT / "docs").glob("*.md") if path.stem != "LOG"}
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]
KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type)]
KINDS = [kind for kind in KINDS if issubclass(kind, errors.BnfixError)]
IGNORED = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "results")

# --- bnfix help ---


def test_help_lists_every_page_and_every_command(cli: Cli) -> None:
    outcome = cli("help")
    assert (outcome.code, outcome.err) == (0, "")
    listed = dict(line.split(None, 1) for line in outcome.out.splitlines() if line.strip()[7:])
    assert listed.keys() >= PAGES.keys() | COMMANDS.keys()
    assert "LOG" not in listed
    for name, page in PAGES.items():
        assert page.read_text("utf-8").startswith(f"# {listed[name].strip()}\n")


@pytest.mark.parametrize("name", sorted(PAGES))
def test_a_page_is_printed_as_it_is_where_nobody_sees_it(cli: Cli, name: str) -> None:
    outcome = cli("help", name)
    assert (outcome.code, outcome.err) == (0, "")
    assert outcome.out == PAGES[name].read_text("utf-8")


@pytest.mark.parametrize("name", ["fix", "eval", "help"])
def test_the_help_of_a_command_is_its_own(cli: Cli, name: str) -> None:
    assert cli("help", name).out == cli(name, "--help").out != ""


@pytest.mark.parametrize(
    "topic", ["nonsense", "LOG", "../README", "commands/fix", "data.md", "/etc/passwd", "DATA"]
)
def test_a_topic_that_there_is_not_is_refused(cli: Cli, topic: str) -> None:
    outcome = cli("help", topic)
    assert outcome.code == 2
    assert outcome.message.startswith(f"bnfix: help: no page '{topic}'. ")
    assert ("Did you mean data?" in outcome.message) == (topic == "data.md")
    assert "See bnfix" not in outcome.err


def test_on_a_terminal_a_page_is_set_and_says_how_to_open_others() -> None:
    # FORCE_COLOR has rich take the output for a terminal; the pager then prints all.
    screen = {"FORCE_COLOR": "1", "COLUMNS": "70", "TERM": "xterm", "NO_COLOR": None, "LESS": ""}
    text = CliRunner().invoke(app, ["help", "data"], env=screen).stdout
    assert "\x1b[" in text
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(map(len, lines)) <= 70
    plain = " ".join(" ".join(lines).split())
    assert "bnfix help tasks" in plain
    assert "…" not in plain
    assert "](" not in plain
    assert "**" not in plain
    calm = CliRunner().invoke(app, ["help", "data"], env={**screen, "NO_COLOR": "1"}).stdout
    assert "\x1b" not in calm


# --- where errors lead ---


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_the_page_of_an_error_exists(kind: type[errors.BnfixError]) -> None:
    assert kind.page in PAGES or (kind.page == "") == (kind is errors.ConfigError)


@pytest.mark.parametrize(
    ("words", "code", "end"),
    [
        (("inspect", "no.pth"), 1, "See bnfix help models."),
        (("eval", "{net}", "--data", "no", "--model", "{spec}"), 1, "See bnfix help data."),
        (("eval", "{net}", "--data", "x", "--device", "tpu"), 2, "See bnfix eval --help."),
        (("fix", "{net}", "--data", "x", "-o", "y", "--z", "-1"), 2, "See bnfix fix --help."),
        (("convert", "{net}", "-o", "o.safetensors"), 1, "See bnfix help models."),
        (("export", "{net}", "--to", "onnx", "-o", "x.txt"), 2, "See bnfix help output."),
        (("convert", "{net}", "--model", "{spec}", "-o", "x.txt"), 2, "See bnfix help output."),
        (("eval", "--nonsense"), 2, "See bnfix eval --help."),
        (("nonsense",), 2, "See bnfix --help."),
    ],
)
def test_an_error_is_one_line_that_ends_with_its_page(
    cli: Cli, files: Files, words: tuple[str, ...], code: int, end: str
) -> None:
    outcome = cli(*(word.format(net=files.net, spec=files.spec) for word in words))
    assert (outcome.code, outcome.out) == (code, "")
    (line,) = (line for line in outcome.err.splitlines() if "the user's" not in line)
    assert re.search(r"[.?!] See bnfix ", line)
    assert line.endswith(end)


def test_a_library_error_says_nothing_of_the_command_line(tmp_path: Path) -> None:
    with pytest.raises(bnfix.CheckpointError, match=r"no\.pth: no such file") as caught:
        bnfix.load(tmp_path / "no.pth")
    assert "See bnfix" not in str(caught.value)


# --- Tab ---


def completed(shell: str, line: str) -> list[str]:
    """What a shell offers at the end of a line."""
    variables = {
        "_BNFIX_COMPLETE": f"complete_{shell}", "COMP_WORDS": line, "_TYPER_COMPLETE_ARGS": line,
        "COMP_CWORD": str(line.count(" ")), "_TYPER_COMPLETE_FISH_ACTION": "get-args",
        "COLUMNS": "80",
    }  # fmt: skip
    result = CliRunner().invoke(app, [], env=variables, prog_name="bnfix")
    assert result.exit_code == 0, result.output
    if shell == "zsh":
        return re.findall(r'(?:^|\(\()"([^"]+)"', result.stdout, re.MULTILINE)
    return [row.split("\t")[0] for row in result.stdout.splitlines() if row]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("bnfix ca", ["calibrate"]),
        ("bnfix help fa", ["faq"]),
        ("bnfix help cali", ["calibrate"]),
        ("bnfix eval a.pth --precision ", ["bf16", "fp16", "fp32"]),
        ("bnfix convert a.pth --to batch", ["batch", "batch-group"]),
        ("bnfix average a.pth b.pth --method ", ["greedy", "uniform"]),
        ("bnfix finetune a.pth --augment ", ["light", "none", "standard"]),
        ("bnfix fix a.pth --train n", ["none", "norms", "norms+head"]),
        ("bnfix fix a.pth --interpolation bil", ["bilinear"]),
        ("bnfix export a.pth --to o", ["onnx", "onnx-int8"]),
        ("bnfix calibrate a.pth --samples ", []),
        ("bnfix calibrate a.pth --data ", []),
    ],
)
def test_tab_completes_commands_pages_and_the_words_of_options(
    line: str, wanted: list[str]
) -> None:
    assert sorted(completed("bash", line)) == wanted


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("bnfix calibrate --feed ", ["batch", "sequential"]),
        # Their help texts are long, and hold signs that a shell reads.
        ("bnfix calibrate a.pth --exa", ["--example-weight"]),
        ("bnfix calibrate a.pth --re", ["--reference", "--reference-model", "--resize"]),
    ],
)
def test_each_shell_gets_its_own_form(shell: str, line: str, wanted: list[str]) -> None:
    assert sorted(completed(shell, line)) == wanted


def test_each_word_that_is_offered_is_taken_and_every_flag_is_offered(cli: Cli) -> None:
    offered: dict[str, tuple[str, list[str]]] = {}
    for name, command in COMMANDS.items():
        context = typer.Context(command, info_name=name)
        flags = {item.value for item in command.shell_complete(context, "--")}
        assert {f for o in command.params for f in o.opts if f.startswith("--")} <= flags
        for option in command.params:
            words = [item.value for item in option.shell_complete(context, "")]
            assert not words or option.param_type_name == "argument" or not option.is_flag
            if words and option.param_type_name == "option":
                offered.setdefault(option.opts[-1], (name, words))
    assert len(offered) >= 15
    for flag, (name, words) in offered.items():
        needed = ["a.pth", "b.pth"] if name == "average" else ["a.pth"]
        outcome = cli(name, *needed, "--data", "no", "-o", "o.x", flag, words[-1])
        assert "is not known" not in outcome.err, flag


def test_bash_runs_the_script_that_is_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if shutil.which("bash") is None:
        pytest.skip("no bash here")
    # The shell is the one named, not that which these tests happen to run in.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    monkeypatch.setattr(typer.testing, "_get_command", typer.main.get_command)
    shown = CliRunner().invoke(app, ["--show-completion", "bash"], prog_name="bnfix")
    (tmp_path / "script").write_text(shown.stdout)
    (tmp_path / "bnfix").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m bnfix "$@"\n')
    (tmp_path / "bnfix").chmod(0o755)
    script = (
        f". '{tmp_path}/script'; COMP_WORDS=(bnfix calibrate --statistics po); COMP_CWORD=3; "
        "$(complete -p bnfix | sed 's/.*-F \\([^ ]*\\) .*/\\1/') bnfix; echo \"${COMPREPLY[@]}\""
    )
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script], env={**environment(), "PATH": path}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("population\n", "")


# --- the wheel, the citation, the workflow ---


def test_sdist_and_wheel_hold_what_they_should_and_the_wheel_has_the_pages(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=IGNORED)
    build = (
        "import sys; from setuptools import build_meta as b; print(getattr(b, sys.argv[1])('.'))"
    )

    def built(form: str, folder: Path) -> Path:
        done = subprocess.run(
            [sys.executable, "-c", build, form], cwd=folder, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return folder / done.stdout.splitlines()[-1]

    with tarfile.open(built("build_sdist", source)) as archive:
        archive.extractall(tmp_path, filter="data")
    inside = tmp_path / f"bnfix-{bnfix.__version__}"
    for path in ("tests/conftest.py", "docs/LOG.md", "docs/commands/fix.md", "examples", "LICENSE",
                 "CHANGELOG.md", "CITATION.cff", "Makefile", "setup.py"):  # fmt: skip
        assert (inside / path).exists(), path
    assert not [path for path in inside.rglob("*") if path.suffix in (".pyc", ".pth")]
    site = tmp_path / "site"
    with zipfile.ZipFile(built("build_wheel", inside)) as archive:
        archive.extractall(site)
    tops = {path.name for path in site.iterdir()}
    assert tops == {"bnfix", f"bnfix-{bnfix.__version__}.dist-info"}
    (site / "docs").mkdir()  # somebody else's
    (site / "docs" / "theirs.md").write_text("# Theirs\n")
    found = runpy.run_path(str(site / "bnfix" / "cli" / "__init__.py"))["pages"]()
    assert found.keys() == PAGES.keys()
    for name, page in found.items():
        assert page.is_relative_to(site)
        assert page.read_bytes() == PAGES[name].read_bytes()
    shutil.rmtree(inside / "docs")
    shutil.rmtree(inside / "build", ignore_errors=True)
    with pytest.raises(AssertionError, match="docs/: no pages; build from a whole checkout"):
        built("build_wheel", inside)


def test_the_citation_says_what_the_package_says() -> None:
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert found.keys() >= {"cff-version", "message", "title", "authors"}
    assert (found["cff-version"], found["type"]) == ("1.2.0", "software")
    assert str(found["version"]) == bnfix.__version__
    assert (found["title"], found["license"]) == (project["name"], project["license"])


def test_the_workflow_runs_the_one_check_with_the_least_rights() -> None:
    text = (ROOT / ".github" / "workflows" / "check.yml").read_text("utf-8")
    found = yaml.safe_load(text)
    assert found["permissions"] == {"contents": "read"}
    assert found["concurrency"]["cancel-in-progress"] is True
    (job,) = found["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    used = [step["uses"] for step in job["steps"] if "uses" in step]
    assert all(re.fullmatch(r"actions/[a-z-]+@v\d+", name) for name in used)
    (version,) = (s["with"]["python-version"] for s in job["steps"] if "python-version" in str(s))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    assert project["requires-python"] == f">={version}"
    assert "secrets" not in text
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
