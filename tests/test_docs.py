"""What the documents say: commands run, examples run, names and numbers are those of the code."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
import typer
from PIL import Image
from torch import nn

import bnfix
from bnfix.cli import app
from tests.conftest import NETS, ROOT, Files, Outcome, images_of
from tests.real import DATA, needs_data

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = ROOT / "docs"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])
NUMBERS = (DOCS / "numbers.md").read_text(encoding="utf-8")
#: Pages whose commands build on each other, in the order in which they are run.
GUIDES = "\n".join((DOCS / name).read_text("utf-8") for name in ("recipes.md", "output.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))
#: What users and engineers read, but for the log, which is as it was written.
PROSE = sorted(
    {*ROOT.glob("*.md"), *(ROOT / "bnfix").rglob("*.py"), *(ROOT / "bnfix").rglob("*.j2")}
    | {*DOCS.rglob("*.md"), *EXAMPLES} - {DOCS / "LOG.md"}
)
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
PAGE = "bnfix-demo/digits_net.fixed.safetensors.report.html"
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

Cli = Callable[..., Outcome]

#: The networks of the recipes of other tasks, which take what `other_data` writes.
OTHER = {
    "streets": "nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 1)",
    "sound": "nn.Conv1d(1, 4, 5), nn.BatchNorm1d(4), nn.ReLU(), nn.AdaptiveAvgPool1d(1), "
    "nn.Flatten(), nn.Linear(4, 1)",
    "table": "nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)",
}


def other_data() -> None:
    """Checkpoints and data of the recipes of other tasks, and the functions that one shows."""
    own = next(code for kind, code in blocks(GUIDES) if kind == "python" and "def loss" in code)
    rng = np.random.default_rng(0)
    for name, layers in OTHER.items():
        code = f"from torch import nn\n\n\ndef build():\n    return nn.Sequential({layers})\n"
        Path(f"{name}.py").write_text(code + (own if name == "sound" else ""))
        torch.save(eval(f"nn.Sequential({layers})", {"nn": nn}).state_dict(), f"{name}.pth")
    np.savez("sound.npz", inputs=rng.normal(size=(110, 1, 16)), targets=rng.normal(size=110))
    for i, video in enumerate("abcdefghijkl" * 4):
        for folder, pixels in (("images", (8, 8, 3)), ("masks", (8, 8))):
            inside = Path("streets") / folder
            inside.mkdir(parents=True, exist_ok=True)
            high = 3 if folder == "masks" else 256
            image = Image.fromarray(rng.integers(0, high, pixels, np.uint8))
            image.save(inside / f"{video}_{i:03}.png")


def blocks(text: str) -> Iterator[tuple[str, str]]:
    for found in BLOCK.finditer(text):
        yield found[1], found[2].replace("\\\n", " ")


def shell_lines(block: str) -> Iterator[list[str]]:
    for line in block.splitlines():
        if words := shlex.split(line, comments=True):
            yield words


def flags_of(name: str) -> set[str]:
    given = COMMANDS[name].params
    return {"--help"} | {flag for one in given for flag in (*one.opts, *one.secondary_opts)}


@pytest.fixture
def workplace(files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stand-ins under the names that the README uses: tiny networks, tiny images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("net.py").write_text(NETS)
    state = torch.load(files.net, weights_only=True)
    torch.save(state, "net.pth")
    torch.save({key: 1.1 * t if key == "fc.bias" else t for key, t in state.items()}, "net2.pth")
    torch.save({key: t * (t.abs() > 0.02) for key, t in state.items()}, "pruned.pth")
    torch.save(torchvision.models.mobilenet_v2(num_classes=3).state_dict(), "mobilenet.pth")
    folders = (("photos", 120, 5), ("test", 60, 6), ("unlabelled", 40, 7), ("training", 90, 8))
    for folder, n, seed in (*folders, ("new", 40, 9), ("newer", 40, 10)):
        for i, (pixels, label) in enumerate(zip(*images_of(n, seed), strict=True)):
            inside = Path(folder) / ("" if folder == "unlabelled" else f"class {label}")
            inside.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).resize((24, 24)).save(inside / f"{i}.png")
    Path("balance.json").write_text('{"class 0": 7, "1": 2, "2": 1}')
    other_data()
    yield tmp_path
    sys.modules.pop("net", None)


def test_the_commands_of_readme_and_guides_run_in_their_order(workplace: Path, cli: Cli) -> None:
    made = []
    for kind, block in blocks(GUIDES + README):
        if kind == "python":
            exec(compile(block, "README.md", "exec"), {})
            continue
        for words in shell_lines(block):
            if words[0] != "bnfix":
                check_foreign(words)
                continue
            # A published network at its own resolution is too large for a test to fine-tune.
            large = any(word.startswith("torchvision:") for word in words)
            outcome = cli(*words[1:], *(["--plan", "--batch-size", "4"] if large else []))
            assert outcome.code == 0, (shlex.join(words), outcome.err)
            if "-o" in words and "--plan" not in words:
                out = words[words.index("-o") + 1]
                if large:
                    converted = [*words[1:3], *words[3:5], "--quiet", "-o", out]
                    assert cli("convert", *converted[1:]).code == 0
                assert Path(out).is_file(), shlex.join(words)
                assert Path(f"{out}.report.html").is_file()
                made.append(out)
    assert len(made) >= 18
    assert Path("comparison/report.html").is_file()
    assert Path("mine.safetensors").is_file()


def test_the_example_of_every_command_runs(workplace: Path, cli: Cli) -> None:
    """As `--help` and the commands' pages show them; later ones use what earlier ones wrote."""
    for name in ("fix", *(name for name in COMMANDS if name != "fix")):
        example = shlex.split((COMMANDS[name].help or "").partition("Example: ")[2])
        assert example[:2] == ["bnfix", name]
        pairs = zip(("photos/", "test/"), example[2:4], strict=True) if name == "pool" else ()
        for data, file in pairs:
            words = ("--model", "net.py:build", "--data", data, "--save-moments", file)
            assert cli("calibrate", "net.pth", *words).code == 0
        outcome = cli(*example[1:])
        assert outcome.code == 0, (shlex.join(example), outcome.err)
        if "-o" in example:
            assert Path(example[example.index("-o") + 1]).is_file()


def test_the_commands_of_readmes_table_run(workplace: Path, cli: Cli) -> None:
    rows = re.findall(r"^\|[^|`]+\| `(bnfix [^`]+)` \|$", README, flags=re.MULTILINE)
    assert len(rows) >= 9
    for row in rows:
        outcome = cli(*shlex.split(row)[1:])
        assert outcome.code == 0, (row, outcome.err)


def test_blocks_of_the_other_documents_run(workplace: Path, cli: Cli) -> None:
    ran = 0
    for path in sorted(DOCS.glob("*.md")):
        if path.name in ("recipes.md", "output.md", "numbers.md"):
            continue
        for kind, block in blocks(path.read_text(encoding="utf-8")):
            ran += 1
            if kind == "python":
                exec(compile(block, path.name, "exec"), {})
                continue
            for words in shell_lines(block):
                check_foreign(words)
    assert ran >= 2


def check_foreign(words: list[str]) -> None:
    """A line that no test runs still has to name what there is."""
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:.*##", MAKEFILE, re.MULTILINE), words
    elif words[0] == "torchrun":
        command = words[words.index("bnfix") + 1 :]
        used = {word for word in command if re.match(r"--?[a-z]", word)}
        assert used <= flags_of(command[0]), words
    else:
        assert words[:2] == ["pip", "install"], words
        assert words[2] == "." or words[2].startswith(".["), words


@needs_data
def test_commands_behind_the_numbers_can_be_run(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ran = 0
    for _, block in blocks(NUMBERS.replace("$BNFIX_DATA", str(DATA))):
        for words in shell_lines(block):
            if words[0] == "bnfix":
                out = words.index("-o" if "-o" in words else "--report") + 1
                words[out] = str(tmp_path / words[out])
                outcome = cli(*words[1:], "--plan")
                assert outcome.code in (0, 1), outcome.err
                # What an earlier command of the block writes is not there in a plan.
                assert outcome.code == 0 or "no such file" in outcome.err, outcome.err
                ran += 1
    assert ran >= 6


def test_the_demonstration_has_the_numbers_of_the_readme(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    report = cli("demo", "--json").json
    assert Path(PAGE).is_file()
    told = re.search(r"top-1 ([\d.]+)% -> ([\d.]+)%,\s+difference\s+([\d.]+)\s+points", NUMBERS)
    assert told is not None
    before, after, difference = (float(number) for number in told.groups())
    paired = report["paired"][-1]["top1"]["difference"]
    # Another build of torch rounds otherwise, and an image is 0.2 points.
    assert 100 * report["models"][0]["top1"] == pytest.approx(before, abs=0.41)
    assert 100 * report["models"][-1]["top1"] == pytest.approx(after, abs=1.01)
    assert 100 * paired == pytest.approx(difference, abs=1.01)


def test_the_picture_is_there_and_the_command_that_makes_it() -> None:
    assert ["make", "screenshots"] in [w for _, b in blocks(NUMBERS) for w in shell_lines(b)]
    shown = re.search(r"!\[.+\]\((.+\.png)\)", README)
    assert shown is not None
    with Image.open(ROOT / shown[1]) as picture:
        assert picture.width == 1280
    assert (ROOT / shown[1]).stat().st_size < 500_000


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_is_in_the_readme_and_has_an_example(name: str, cli: Cli) -> None:
    assert re.search(rf"\b(bnfix|make) {name}\b", README)
    shown = COMMANDS[name].help or ""
    assert f"Example: bnfix {name}" in shown
    example = shlex.split(shown.partition("Example: ")[2])
    assert {word for word in example if word.startswith("-")} <= flags_of(name)
    assert cli(name, "--help").code == 0


def test_every_option_that_a_document_shows_exists() -> None:
    every = {"--install-completion"}.union(*(flags_of(name) for name in COMMANDS))
    for path in DOCUMENTS:
        text = re.sub(r"^chromium .*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        # Scripts and launchers have options of their own.
        text = re.sub(r"`python benchmarks/[^`]*`", "", text)
        text = re.sub(r"torchrun --nproc-per-node \d+", "", text)
        text = re.sub(r"^python benchmarks/(.*\\\n)*.*$", "", text, flags=re.MULTILINE)
        for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text):
            assert flag in every, f"{path.name}: {flag}"
    for _, block in blocks(README + GUIDES):
        for words in shell_lines(block):
            if words[0] == "bnfix":
                used = {word for word in words if re.match(r"--?[a-z]", word)}
                assert used <= flags_of(words[1]), shlex.join(words)


def test_every_public_name_that_the_changelog_lists_exists() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    names = re.findall(r"`([A-Za-z_]+)`", text.partition("From Python")[2].partition("\n\n")[0])
    assert len(names) > 10
    assert set(names) <= set(bnfix.__all__)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_run_and_are_short(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 40
    names = runpy.run_path(str(path))
    assert len(capsys.readouterr().out.splitlines()) >= 3
    if path.stem == "recalibrate_own_model":
        assert names["after"].top1 > names["before"].top1 + 0.5
    elif path.stem == "choose_weights":
        assert len(names["choice"].decisions) == 3
        assert names["after"].nll < names["before"].nll
    elif path.stem == "finetune_own_loop":
        assert bnfix.evaluate(names["model"], [(names["test"], names["answers"])]).top1 > 0.95
    elif path.stem == "fix_from_python":
        assert names["result"].report.verdict == "better"
    else:
        assert path.stem == "compare_checkpoints"
        assert names["paired"].verdict == "better"


def test_the_pages_of_the_commands_are_those_of_the_code() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "generate.py"))
    for name, text in made["pages"]().items():
        written = (made["FOLDER"] / name).read_text(encoding="utf-8")
        assert written == text, f"{name}: run python docs/generate.py"
    assert {path.stem for path in made["FOLDER"].glob("*.md")} == {"README", *COMMANDS}


def test_there_are_five_examples() -> None:
    assert len(EXAMPLES) == 5


def test_the_changelog_ends_with_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[([^\]]+)\]", text, flags=re.MULTILINE)
    assert versions[0] == bnfix.__version__


def test_the_log_is_dated_newest_first() -> None:
    text = (DOCS / "LOG.md").read_text(encoding="utf-8")
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d): .", text, flags=re.MULTILINE)
    assert dates
    assert dates == sorted(dates, reverse=True)
    assert len(dates) == len(re.findall(r"^## ", text, flags=re.MULTILINE))


def test_the_readme_is_short_and_names_the_two_commands() -> None:
    assert len(README.splitlines()) <= 150
    for target in ("demo", "test"):
        assert f"make {target}" in README
        assert re.search(rf"^{target}:.*##", MAKEFILE, re.MULTILINE)


def test_contributing_names_what_there_is() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 60
    for target in re.findall(r"(?:`|^ {4})make ([a-z]+)", text, flags=re.MULTILINE):
        assert re.search(rf"^{target}:.*##", MAKEFILE, re.MULTILINE), target
    for path in re.findall(r"`((?:bnfix|tests|\.ci)/?[\w./]*)`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8")):
        if not link.startswith("https://"):
            assert (path.parent / link).exists(), link


@pytest.mark.parametrize(
    "path", [*DOCUMENTS, *EXAMPLES], ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_no_words_that_do_not_belong(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    machine = r"/(home|root|tmp|work|mnt|Users)/\w+"
    tracker = r"#\d+\b|\bissue \d+"
    hype = (
        r"(?i)\b(state[- ]of[- ]the[- ]art|sota|blazing\w*|seamless\w*|effortless\w*|magical\w*|"
        r"revolution\w*|cutting[- ]edge|game[- ]chang\w*|powerful|simply|amazing\w*)\b"
    )
    unfinished = r"\b(TODO|FIXME|TBD|XXX|[A-Z]+_ROWS|[A-Z]+_LINE)\b"
    for pattern in (machine, tracker, hype, unfinished):
        found = re.search(pattern, text)
        assert found is None, found


@pytest.mark.parametrize("path", PROSE, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_prose_is_plain(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    stiff = r"(?i)\b(anew|likewise|hence|thus|gone through|stands(?! for)|(is|was) told)\b"
    # A question may begin with it, and the form of messages ends with it; a statement may not.
    what = r"(?:^|\"\"\"|# |#: |[.:;] |\*\* |\| )What (?!to do\.|[^.|]*\?)[^\n]*"
    for pattern in (stiff, what):
        found = re.search(pattern, text, re.MULTILINE)
        assert found is None, found
