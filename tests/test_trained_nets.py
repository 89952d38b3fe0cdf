"""Whole repairs of networks that are no image classifiers, each trained here within seconds.

Every network learns on one population and meets another, so that its statistics are stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests import nets_dense
from tests.conftest import Files, Outcome

Cli = Callable[..., Outcome]
SPEC = f"{Path(nets_dense.__file__)}:"


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def test_a_part_that_chooses_leaves_some_to_fit_and_to_test(
    cli: Cli, files: Files, tmp_path: Path
) -> None:
    words = "fix", files.net, *files.common, "--data", files.data, "-o", tmp_path / "o.safetensors"
    for part, said in (
        ("0.5", "at most 0.4, beside 0.6"),
        ("0", "above 0"),
        ("0.4", "Give --test"),
    ):
        message = cli(*words, "--select", part).message
        assert "--select" in message
        assert said in message


def test_a_generator_gets_statistics_and_makes_no_claim(cli: Cli, tmp_path: Path) -> None:
    net = nets_dense.generator().eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    noise = torch.randn(40, 8, 1, 1)
    np.savez(tmp_path / "noise.npz", inputs=noise.numpy())
    out = tmp_path / "out.safetensors"
    outcome = cli(
        "calibrate", tmp_path / "net.pth", "--model", SPEC + "generator", "--data",
        tmp_path / "noise.npz", "--labels", "none", "--statistics", "population",
        "--example-weight", "keep", "--json", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert outcome.json["verdict"] is None
    found = load_file(out)
    wide = net.double().requires_grad_(False)[0](noise.double())
    for x, norm in ((wide, "1"), (None, "4")):
        if x is None:  # the second layer meets what the repaired first one gives
            mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), correction=0)
            y = F.batch_norm(wide, mean, var, net[1].weight, net[1].bias, eps=net[1].eps)
            x = net[3](torch.relu(y))
        expected = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        for name, value in zip(("running_mean", "running_var"), expected, strict=True):
            torch.testing.assert_close(
                found[f"{norm}.{name}"].double(), value, rtol=1e-4, atol=1e-5
            )
