"""What makes the tool feel finished: suggestions, interrupts, short reprs, whole files."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import bnfix
from bnfix.recalibrate.recalibrate import recalibrate_
from tests.conftest import ROOT, environment
from tests.forks import Copy
from tests.test_report import full_report

# --- did you mean ---


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["calibrate", "a", "--granularty", "x"], "--granularity?"),
        (["fix", "a", "--exmaple-weight", "1"], "--example-weight"),
        (["calibrat", "a"], "'calibrate'?"),
        (["fx"], "'fix'?"),
    ],
)
def test_a_slip_of_the_pen_is_one_line_with_what_was_meant(cli, words, meant):
    outcome = cli(*words)
    assert outcome.code == 2
    assert meant in outcome.message
    assert outcome.err.endswith(" --help.\n")


def test_usage_without_a_near_word_is_one_line_too(cli):
    assert "Did you mean" not in cli("zzzzzz").message
    assert "CKPT" in cli("fix").message


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--layers", "b1"], "there are bn1, bn2. Did you mean bn1?"),
        (["--skip", "bn_2*"], "Did you mean bn2"),
        (["--model", "torchvision:resnt50"], "resnet50"),
        (["--model", "timm:resnett50"], "resnet50"),
        (["--model", "torchvison:resnet50"], "Did you mean torchvision:resnet50?"),
    ],
)
def test_names_that_are_nearly_right(cli, files, tmp_path, words, meant):
    if words[1].startswith("timm"):
        pytest.importorskip("timm")
    out = tmp_path / "out.safetensors"
    model = [] if "--model" in words else ["--model", files.spec]
    assert meant in cli("convert", files.net, *model, *words, "-o", out).message
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_is_like_none_has_no_suggestion(cli, files, tmp_path):
    words = ["convert", files.net, "--model", files.spec, "--layers", "zzzzzzz", "-o"]
    message = cli(*words, tmp_path / "out.safetensors").message
    assert "--layers: zzzzzzz matches no norm layer" in message
    assert "Did you mean" not in message


@pytest.mark.parametrize(
    ("spec", "meant"), [("cifar1:root", "cifar10:root"), ("svnh:/x", "svhn:/x")]
)
def test_data_sets_that_are_nearly_right(cli, files, spec, meant):
    message = cli("eval", files.net, "--data", spec, *files.common).message
    assert f"Did you mean {meant}?" in message


# --- interrupts ---


@pytest.mark.parametrize("start", [["-m", "bnfix"], ["bnfix"]])
def test_an_interrupt_while_torch_is_imported_is_one_line(tmp_path, start):
    (tmp_path / "torch").mkdir()
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nimport time\ntime.sleep(5)\n"
    (tmp_path / "torch" / "__init__.py").write_text(code)
    words = start
    if start == ["bnfix"]:
        (tmp_path / "bnfix").write_text("from bnfix.cli import main\nmain()\n")
        words = [str(tmp_path / "bnfix")]
    paths = os.pathsep.join([str(tmp_path / "."), str(ROOT)])
    found = subprocess.run(
        [sys.executable, *words, "--help"],
        env={**environment(), "PYTHONPATH": paths}, cwd=ROOT,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stdout) == (130, "")
    assert found.stderr == "bnfix: interrupted.\n"


def test_a_program_that_imports_bnfix_keeps_its_own_hook(tmp_path):
    (tmp_path / "own.py").write_text("import bnfix\n")
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import sys\nsys.exit(7 if sys.excepthook is sys.__excepthook__ else 8)\n"
    )
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    found = subprocess.run(
        [sys.executable, str(tmp_path / "own.py")],
        env={**environment(), "PYTHONPATH": paths},
        capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert found.returncode == 7


# --- killed at any moment ---

SAVING = """
from pathlib import Path
from bnfix.checkpoints.save import write_text
text = "whole " * 200_000 + "end"
Path({ready!r}).touch()
for k in range(10_000):
    write_text(Path({page!r}), f"{{k}} {{text}}")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="there are no signals like this")
def test_a_run_killed_at_any_moment_leaves_no_page_or_a_whole_one(tmp_path):
    moments = random.Random(0)
    page = tmp_path / "page.html"
    for _ in range(4):
        ready = tmp_path / "ready"
        process = Copy(["-c", SAVING.format(page=str(page), ready=str(ready))], environment())
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.005)
        ready.unlink()
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        if page.exists():
            text = page.read_text(encoding="utf-8")
            assert len(text.split(" ", 1)[1]) == 6 * 200_000 + 3
            assert text.endswith("whole end")


# --- in a notebook ---


def test_records_say_in_a_line_what_counts():
    report = full_report()
    shown = [
        report.models[1].metrics,
        report.paired[0],
        report.trials.calibration,
        report.trials.choice,
    ]
    starts = ("Metrics(n_examples=", "Paired(", "Calibration(", "WeightChoice(channel: 4 of 0")
    for record, start in zip(shown, starts, strict=True):
        text = repr(record)
        assert text.startswith(start)
        assert len(text) < 250
        assert "\n" not in text
    result = bnfix.Result(nn.Identity(), report, {})
    assert repr(result) == ("Result(fix: better, 2 models measured, 4 norm layers, 4 of them live)")


def test_a_fresh_calibration_names_its_examples():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    found = recalibrate_(net, [torch.randn(8, 3, 6, 6)])
    assert repr(found).startswith("Calibration(population, batch feed: 1 layer from 8 examples")
