"""How models are called, and which of their outputs counts."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bnfix
from bnfix.core import runtime
from bnfix.core.errors import DataError, ModelError
from bnfix.data.batches import Batch, Batches
from bnfix.data.open import open_images
from tests.conftest import Outcome

CPU = torch.device("cpu")
X, Y = torch.ones(3, 2), torch.tensor([0, 1, 1])


@dataclass
class Plain:
    logits: Tensor
    parts: Any = None


@dataclass(slots=True)
class Slim:
    scores: Tensor
    aux: Any = None


Pair = namedtuple("Pair", ["first", "second"])


@pytest.mark.parametrize(
    ("output", "name"),
    [
        (Plain(X, {"a": [X * 2]}), "parts.a.0"),
        (Slim(X, (X, Slim(X * 2))), "aux.1.scores"),
        (Pair(X, {"b": X * 2}), "second.b"),
        ([X, (X, [X * 2])], "1.1.0"),
        ({"a": {"b": X * 2}, 3: X}, "a.b"),
        ({3: X * 2, "n": 7}, "3"),
    ],
)
def test_an_output_is_named_through_any_nest(output, name):
    class Nested(nn.Module):
        def forward(self, x):
            return output

    net = Nested()
    runtime.set_output_(net, name)
    assert torch.equal(runtime.run(net, X, CPU), X * 2)
    runtime.set_output_(net, "none")
    with pytest.raises(ModelError, match=r"--output none: .* but .*\(3, 2\)"):
        runtime.run(net, X, CPU)


class Sum(nn.Module):
    def forward(self, a, b, scale=1):
        return (a + 10 * b) * scale


class Whole(nn.Module):
    """Takes all its inputs as one."""

    def forward(self, batch):
        parts = batch.values() if isinstance(batch, dict) else batch
        return sum(parts)


@pytest.mark.parametrize(
    "batch",
    [
        (X, X, Y),
        ((X, X), Y),
        Batch((X, X), Y, np.arange(3)),
        Batch({"b": X, "a": X}, Y, np.arange(3)),
        {"b": X, "a": X, "label": Y},
        ({"a": X, "b": X}, Y),
    ],
)
def test_several_inputs_go_to_a_model_that_takes_several(batch):
    assert torch.equal(runtime.run(Sum(), batch, CPU), 11 * X)
    assert runtime.n_examples_of(batch) == 3


@pytest.mark.parametrize("x", [{"a": X, "b": X}, (X, X), [X, X]])
def test_a_model_that_takes_one_nest_gets_it_whole(x):
    assert torch.equal(runtime.run(Whole(), Batch(x, Y, np.arange(3)), CPU), 2 * X)


class Masked(nn.Module):
    def forward(self, x, mask=None, lengths=None):
        self.seen = [name for name, v in (("mask", mask), ("lengths", lengths)) if v is not None]
        return x


def test_a_model_gets_the_mask_if_its_signature_takes_it():
    net, mask, lengths = Masked(), torch.ones(3, 2, dtype=torch.bool), torch.tensor([1, 2, 2])
    for extra in ({"mask": mask}, {"lengths": lengths}, {"mask": mask, "lengths": lengths}):
        for batch in ({"x": X, "y": Y, **extra}, Batch({"inputs": X, **extra}, Y, np.arange(3))):
            assert torch.equal(runtime.run(net, batch, CPU), X)
            assert net.seen == list(extra)
            assert torch.equal(runtime.run(nn.Identity(), batch, CPU), X)
    with pytest.raises(DataError, match="it holds other, which the model does not take"):
        runtime.run(net, {"x": X, "other": X, "lengths": lengths}, CPU)


CODE = """
import torch

def items():
    for k in range(12):
        n = 1 + k % 5
        x = torch.full((2, 5), 9.0)
        x[:, :n] = k / 4 + torch.arange(n)
        yield {"inputs": x, "lengths": n, "label": k % 2}
"""


def test_items_with_lengths_come_from_a_callable(tmp_path: Path):
    (tmp_path / "mine.py").write_text(CODE)
    images = open_images(f"{tmp_path / 'mine.py'}:items", n_classes=2)
    batches = Batches(images, np.arange(12), None, batch_size=5)
    net = nn.Sequential(nn.BatchNorm1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
    bnfix.recalibrate_(net, batches)
    values = np.concatenate([k / 4 + np.arange(1 + k % 5) for k in range(12)])
    np.testing.assert_allclose(net[0].running_mean, values.mean(), rtol=1e-6)
    np.testing.assert_allclose(net[0].running_var, values.var(), rtol=1e-6)


def arrays_of(n: int = 13, total: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, total + 1, n).astype(np.int16)
    x = np.where(np.arange(total) < lengths[:, None, None], rng.normal(size=(n, 2, total)), 50.0)
    return {"inputs": x, "lengths": lengths, "labels": np.arange(n) % 2}


def test_lengths_and_masks_come_from_files(tmp_path: Path):
    arrays, found = arrays_of(), []
    mask = np.arange(6) < arrays["lengths"][:, None]
    np.savez(tmp_path / "lengths.npz", **arrays)
    masked = {"inputs": arrays["inputs"], "mask": mask}
    torch.save({name: torch.from_numpy(a) for name, a in masked.items()}, tmp_path / "mask.pt")
    for name in ("lengths.npz", "mask.pt"):
        images = open_images(str(tmp_path / name))
        net = nn.Sequential(nn.BatchNorm1d(2), nn.AdaptiveAvgPool1d(1), nn.Flatten()).eval()
        bnfix.recalibrate_(net, Batches(images, np.arange(13), None, batch_size=4))
        found.append((net[0].running_mean, images.digest(3)))
    expected = arrays["inputs"].transpose(0, 2, 1)[mask].mean(0)
    np.testing.assert_allclose(found[0][0], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] != found[1][1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"lengths": np.full(13, 7)}, "lengths: from 7 to 7, expected 0 to 6"),
        ({"lengths": np.arange(13) % 6}, r"mask: example 0 \(from 0\) has no valid position"),
        ({"lengths": np.ones((13, 1), int)}, r"lengths is int64 \(13, 1\), expected the valid"),
        ({"lengths": np.ones(12, int)}, r"lengths is int64 \(12,\)"),
        ({"mask": np.ones((13, 6), np.uint8)}, "mask is uint8 .*Masks to learn are targets"),
        ({"mask": np.ones(13, bool)}, r"mask is bool \(13,\)"),
    ],
)
def test_lengths_and_masks_of_a_file_that_do_not_fit_are_refused(tmp_path, change, said):
    np.savez(tmp_path / "a.npz", **{**arrays_of(), **change})
    with pytest.raises(DataError, match=said):
        open_images(str(tmp_path / "a.npz"))


NET = """
from torch import nn

def build():
    head = nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(4, 2)
    return nn.Sequential(nn.Conv1d(2, 4, 1), nn.BatchNorm1d(4), *head)
"""


def test_commands_leave_padding_out(tmp_path: Path, cli: Callable[..., Outcome]):
    (tmp_path / "net.py").write_text(NET)
    names: dict[str, Any] = {}
    exec(NET, names)
    net, arrays = names["build"]().eval(), arrays_of(60)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    np.savez(tmp_path / "data.npz", **arrays)
    common = ("--model", f"{tmp_path / 'net.py'}:build", "--data", tmp_path / "data.npz")
    words = ("--statistics", "population", "--example-weight", "keep", "--labels", "none")
    done = cli("calibrate", tmp_path / "net.pth", *common, *words, "-o", tmp_path / "o.safetensors")
    assert done.code == 0, done.err
    stored = load_file(tmp_path / "o.safetensors")
    met = net[0](torch.from_numpy(arrays["inputs"]).float()).detach().transpose(1, 2)
    met = met[torch.arange(6) < torch.from_numpy(arrays["lengths"])[:, None]]
    torch.testing.assert_close(stored["1.running_mean"], met.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stored["1.running_var"], met.var(0, correction=0))
    # Fitted to what it measures without the padding, it has no shift; stock layers in training
    # would count the padding, so outputs by batch statistics are not known.
    seen = cli("inspect", tmp_path / "o.safetensors", *common)
    assert seen.code == 0, seen.err
    assert "on 60 examples: outputs" in seen.out
    assert "with batch statistics" not in seen.out
    assert "stored means are" not in seen.out


# ---- models that want targets in training mode ---------------------------------------------


class Detector(nn.Module):
    """As torchvision's: a list of images and, in training, of targets; then it gives losses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.box = nn.Linear(4, 4)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        if self.training:
            assert targets is not None, "targets should not be none when in training mode"
        maps = [self.bn(self.conv(image[None])).mean((2, 3)) for image in images]
        boxes = self.box(torch.cat(maps))
        if not self.training:
            return [{"boxes": box[None]} for box in boxes]
        wanted = torch.stack([target["boxes"][0] for target in targets or ()])
        return {"box": (boxes - wanted).square().mean(), "size": boxes.square().mean() / 10}


def scenes() -> list[Any]:
    rng = torch.Generator().manual_seed(0)
    found = []
    for k in range(3):
        images = [torch.rand(3, 6 + k, 5 + i, generator=rng) for i in range(4)]
        found.append((images, [{"boxes": torch.rand(1, 4, generator=rng)} for _ in images]))
    return found


def test_a_detector_gets_its_targets_in_training_and_gives_its_losses():
    net = Detector()
    images, targets = scenes()[0]
    assert [set(found) for found in runtime.run(net.eval(), (images, targets), CPU)] == [
        {"boxes"}
    ] * 4
    output = runtime.run(net.train(), (images, targets), CPU)
    loss = runtime.own_loss(net, output)
    assert loss is not None
    torch.testing.assert_close(loss, output["box"] + output["size"])
    loss.backward()
    assert net.box.weight.grad is not None
    for other in (X, {"box": X}, {"box": output["box"], "boxes": X}, {}):
        assert runtime.own_loss(net, other) is None
    assert runtime.own_loss(net.eval(), output) is None
    with pytest.raises(ModelError, match="targets should not be none"):
        runtime.run(Detector().train(), (images,), CPU)


def test_fine_tuning_by_a_detectors_own_losses_is_judged_by_a_loss_an_image():
    def far(outputs: list[dict[str, Tensor]], targets: list[dict[str, Tensor]]) -> Tensor:
        pairs = zip(outputs, targets, strict=True)
        return torch.stack([(a["boxes"] - b["boxes"]).square().mean() for a, b in pairs])

    torch.manual_seed(0)
    net = Detector()
    before = bnfix.evaluate(net, scenes(), task=far)
    recipe = bnfix.settings.FinetuneRecipe(train="all", epochs=4)
    tuned = bnfix.finetune_(net, scenes(), monitor=scenes(), task=far, recipe=recipe)
    assert tuned.trained == "all, by the model's own losses"
    assert tuned.best_epoch > 0
    after = bnfix.evaluate(net, scenes(), task=far)
    assert after.nll == pytest.approx(tuned.curve[tuned.best_epoch].nll)
    assert after.nll < before.nll


def test_statistics_of_a_detector_are_those_of_its_images():
    net = Detector().eval()
    images = [image for batch, _ in scenes() for image in batch]
    found = bnfix.recalibrate_(net, scenes(), feed="sequential")
    values = torch.cat([net.conv(image[None]).flatten(2)[0] for image in images], 1)
    assert found.exceptions.called_again == ("bn",)
    torch.testing.assert_close(net.bn.running_mean, values.mean(1), rtol=1e-5, atol=1e-5)


# ---- calls that fail -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("net", "batch", "found"),
    [
        (nn.Conv2d(3, 1, 3), torch.zeros(2, 1, 5, 5),
         r"shape 2x1x5x5 \(float32\) \(RuntimeError: .*3 channels.*Check --resize"),
        (nn.Conv1d(3, 1, 3), torch.zeros(2, 1, 5), r"float32 2x1x5 \(.*or give --forward"),
        (Sum(), torch.zeros(2, 1, 5, 5), r"2x1x5x5 \(float32\) \(TypeError: .*'b'.*--forward"),
        (nn.Embedding(3, 2), (torch.tensor([[7]]), None), r"int64 1x1 \(IndexError: .*range"),
        (nn.Linear(2, 1), ([X, X], Y), r"\(float32 3x2, float32 3x2\) \(TypeError.*--forward"),
    ],
)  # fmt: skip
def test_a_call_that_fails_is_said_in_one_line(net, batch, found):
    with pytest.raises(ModelError, match="model: cannot be run on an input of .*" + found) as said:
        runtime.run(net, batch, CPU)
    assert "\n" not in str(said.value)
