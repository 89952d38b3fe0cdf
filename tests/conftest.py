"""Tiny files for whole commands: a network, its checkpoints, and data of every kind."""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer.main
import typer.testing
from PIL import Image
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from bnfix.cli import app

# A shell that runs tests in the background has them, and what they start, ignore interrupts.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The runner makes all commands for each one that it runs, which takes a tenth of a second.
typer.testing._get_command = functools.cache(typer.main.get_command)

# Many threads on tiny tensors cost more than they give, above all where others work beside.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]

#: Files whose tests take longest; they begin, so that no process is left alone with one.
LONGEST = (
    "test_docs", "test_pipeline", "test_processes", "test_exporting", "test_architectures",
    "test_cli", "test_calibration",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: (*LONGEST, item.path.stem).index(item.path.stem))


NETS = """
import torch
from torch import nn

print("the user's file says hello")


class Net(nn.Module):
    def __init__(self, num_classes, channels=6):
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, 12, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.fc = nn.Linear(12, num_classes)

    def forward(self, x):
        print("the user's forward says hello")
        if x.shape[-1] > 300:
            raise ValueError("images of more than 300 pixels are not for this network")
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).mean((2, 3)))


def build(num_classes=3):
    return Net(num_classes)


def wide(num_classes=3):
    return Net(num_classes, channels=7)


def fixed():
    return Net(3)
"""


@dataclass(frozen=True)
class Files:
    """Where the tiny files are.

    Args:
        folder: all of them.
        spec: of the network.
        net: a trained state dict, as torch.save writes it.
        stale: the same with wrong statistics.
        data: 180 labelled images in an ``.npz``, three classes.
        test: 120 others.
        folders: the first 60 of the data as class folders of PNG files.
        table: the same with ``labels.csv``.
        flat: the same without labels.
    """

    folder: Path
    spec: str
    net: Path
    stale: Path
    data: Path
    test: Path
    folders: Path
    table: Path
    flat: Path

    @property
    def common(self) -> tuple[str, ...]:
        """Model and preprocessing, as every command with data takes them."""
        return ("--model", self.spec, "--mean", "0.5", "--std", "0.25", "--workers", "0")

    def model(self) -> nn.Module:
        """The network, untrained."""
        names: dict[str, Any] = {}
        code = NETS.replace("print(", "(lambda *_: None)(")
        exec(compile(code, "nets.py", "exec"), names)
        return names["build"]()

    def trained(self) -> nn.Module:
        """The network with the weights of ``net``."""
        model = self.model()
        model.load_state_dict(torch.load(self.net, weights_only=True))
        return model.eval()


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one JSON object and nothing else."""
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def message(self) -> str:
        """The one line of a stated error, without the page that it ends with."""
        assert self.code in (1, 2, 130), (self.code, self.out, self.err)
        assert self.out == ""
        lines = [line for line in self.err.splitlines() if "the user's" not in line]
        assert len(lines) == 1, lines
        assert lines[0].startswith("bnfix: ")
        assert "Traceback" not in self.err
        text, see, page = lines[0].partition(" See bnfix ")
        # An interrupt needs no explanation, nor does an error of help or of somebody else's code.
        none = ("bnfix: unexpected ", "bnfix: out of mem", "bnfix: help: ")
        own = self.code != 130 and not text.startswith(none)
        assert bool(see) == own, lines[0]
        assert not see or re.fullmatch(r"(help [a-z]+|([a-z]+ )?--help)\.", page), page
        return text


def images_of(n: int, seed: int, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one colour lifted, which tells the class; 8x8."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(n) % classes)
    pixels = rng.normal(110, 40, (n, 8, 8, 3)) + rng.normal(0, 12, (n, 1, 1, 3))
    for k in range(3):
        pixels[labels == k, :, :, k] += 18
    return pixels.clip(0, 255).astype(np.uint8), labels.astype(np.int64)


def inputs_of(images: np.ndarray) -> torch.Tensor:
    """As ``--mean 0.5 --std 0.25`` prepares them."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (x - 0.5) / 0.25


def _train(model: nn.Module) -> None:
    images, labels = images_of(120, seed=1)
    x, y = inputs_of(images), torch.from_numpy(labels)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(8):
        for start in range(0, 120, 20):
            loss = F.cross_entropy(model(x[start : start + 20]), y[start : start + 20])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("tiny files")  # with a space in it, as people have them
    (folder / "nets.py").write_text(NETS)
    found = Files(
        folder, f"{folder / 'nets.py'}:build", folder / "net.pth", folder / "stale.pth",
        folder / "data.npz", folder / "test.npz", folder / "folders", folder / "table",
        folder / "flat",
    )  # fmt: skip
    torch.manual_seed(0)
    model = found.model()
    _train(model)
    torch.save(model.state_dict(), found.net)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.add_(module.running_var.sqrt())
            module.running_var.mul_(torch.tensor([0.05, 20.0]).repeat(module.num_features // 2))
    torch.save(model.state_dict(), found.stale)
    for path, n, seed in ((found.data, 180, 2), (found.test, 120, 3)):
        images, labels = images_of(n, seed)
        np.savez(path, images=images, labels=labels)
    images, labels = images_of(60, seed=2)
    rows = ["file,label"]
    for k in range(3):
        (found.folders / f"class {k}").mkdir(parents=True)
    found.table.mkdir()
    found.flat.mkdir()
    for i, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        image = Image.fromarray(pixels)
        image.save(found.folders / f"class {label}" / f"{i:03}.png")
        image.save(found.table / f"{i:03}.png")
        image.save(found.flat / f"{i:03}.png")
        rows.append(f"{i:03}.png,{label}")
    (found.table / "labels.csv").write_text("\n".join(rows) + "\n")
    return found


@pytest.fixture(scope="session")
def cli() -> Callable[..., Outcome]:
    """Runs a command in this process; an exception that is not stated is an error of the test."""
    runner = CliRunner()

    def run(*arguments: object) -> Outcome:
        result = runner.invoke(app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.stdout, result.stderr)

    return run


@pytest.fixture(scope="session")
def shell() -> Callable[..., Outcome]:
    """Runs a command in a process of its own, as a user does."""

    def run(*arguments: object, cwd: Path | None = None) -> Outcome:
        done = subprocess.run(
            command_of(*arguments), cwd=cwd, env=environment(), capture_output=True, text=True,
            check=False, timeout=300,
        )  # fmt: skip
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run


def command_of(*arguments: object) -> list[str]:
    """The command line of a process."""
    return [sys.executable, "-m", "bnfix", *map(str, arguments)]


def environment() -> dict[str, str]:
    """That of a process of its own."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
