"""The look at the first images: silent on what fits, plain about what cannot."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from bnfix.checkpoints.load import load_ready
from bnfix.core.settings import DataRecipe, ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batch, Batches
from bnfix.data.open import open_images
from bnfix.jobs.inputs import look_at_inputs, look_at_size
from bnfix.jobs.session import Plan, open_workbench
from tests.conftest import Files
from tests.real import DATA, needs_data


def batch_of(x: torch.Tensor) -> Batch:
    return Batch(x, None, np.arange(len(x)))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, momentum=None))
    for _ in range(4):
        model(torch.randn(64, 3, 8, 8))
    return model.eval()


def test_only_what_cannot_fit_is_reported(net: nn.Module) -> None:
    x = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for same in (x, 1.5 * x, 0.6 * x, x + 0.1):
        assert look_at_inputs(net, batch_of(same)) is None
    for other in (x / 4, 255 * x, x + 5):
        found = look_at_inputs(net, batch_of(other))
        assert found is not None
        assert "do not fit the statistics stored in 1:" in found
        assert "--preset" in found
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not net.training
    assert not net[1]._forward_pre_hooks


def test_little_or_nothing_to_go_by(net: nn.Module) -> None:
    x = 255 * torch.randn(7, 3, 8, 8)
    assert look_at_inputs(net, batch_of(x)) is None
    fresh = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    assert look_at_inputs(fresh, batch_of(x.repeat(4, 1, 1, 1))) is None
    assert look_at_inputs(nn.Sequential(nn.Conv2d(3, 8, 3)), batch_of(x.repeat(4, 1, 1, 1))) is None


def test_a_first_layer_that_is_never_reached_says_nothing(net: nn.Module) -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = net[1], net[0]

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x)

    assert look_at_inputs(Unused().eval(), batch_of(255 * torch.randn(28, 3, 8, 8))) is None


def test_sizes() -> None:
    assert look_at_size((8, 3, 224, 224), None) is None
    assert look_at_size((8, 3, 288, 288), (224, 224)) is None
    found = look_at_size((8, 3, 32, 32), (224, 224))
    assert found is not None
    assert found.startswith("inputs are 32x32, the model's published weights are for 224x224")


def assumptions(checkpoint: object, model: str, data: object, **source: object) -> str:
    plan = Plan(
        model=ModelRecipe(model),
        source=DataRecipe(**source),  # type: ignore[arg-type]
        run=RunOptions("cpu", workers=0),
    )
    bench = open_workbench(str(checkpoint), str(data), plan, (0.6, 0.2, 0.2))
    return " / ".join(bench.assumptions)


def test_it_is_among_the_assumptions(files: Files) -> None:
    right = {"mean": (0.5,), "std": (0.25,)}
    assert "do not fit the statistics" not in assumptions(
        files.net, files.spec, files.data, **right
    )
    wrong = {"mean": (0.0,), "std": (1.0,), "scale": 1.0}
    assert "conv" not in (found := assumptions(files.net, files.spec, files.data, **wrong))
    assert "do not fit the statistics stored in bn1:" in found


def test_padding_is_among_the_assumptions(files: Files) -> None:
    for data in (files.data, files.folders):
        wide = assumptions(files.net, files.spec, data, crop=(12, 8))
        assert f"{data}: images of 8x8 are padded with black to 12x8 (--crop)." in wide
        whole = assumptions(files.net, files.spec, data, resize=(12,), crop=(12, 8))
        assert "padded" not in whole


@needs_data
@pytest.mark.data
def test_real_images() -> None:
    model = load_ready(
        DATA / "mobilenet_v2-b0353104.pth", ModelRecipe(model="torchvision:mobilenet_v2")
    ).model
    images = open_images(str(DATA / "imagenet-val"))
    right = Preprocessing(crop=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    for preprocessing, fires in ((right, False), (Preprocessing(crop=(224, 224)), True)):
        chosen = np.arange(0, 650, 50)
        batch = next(iter(Batches(images, chosen, preprocessing, batch_size=13, workers=0)))
        assert (look_at_inputs(model.eval(), batch) is not None) == fires


@pytest.mark.parametrize("kind", ["data", "folders", "table"])
def test_a_forward_pass_that_changes_the_network_is_noted(cli, files, tmp_path, kind):
    spec = tmp_path / "counting.py"
    spec.write_text(
        (files.folder / "nets.py").read_text()
        + "\nclass Counting(Net):\n    seen = 0\n"
        + "    def forward(self, x):\n        self.seen += 1\n        return super().forward(x)\n"
        + "\ndef counting():\n    return Counting(3)\n"
    )
    words = ["--model", f"{spec}:counting", *files.common[2:], "--data", getattr(files, kind)]
    notes = cli("eval", files.net, *words, "--json").json["assumptions"]
    (note,) = [note for note in notes if "the forward pass itself changes" in note]
    assert "seen" in note
