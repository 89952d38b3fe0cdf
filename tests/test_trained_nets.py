"""Whole repairs of networks that are no image classifiers, each trained here within seconds.

Every network learns on one population and meets another, so that its statistics are stale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import bnfix
from tests import nets_dense
from tests.conftest import Files, Outcome

Cli = Callable[..., Outcome]
Loss = Callable[[Tensor, Tensor], Tensor]
SPEC = f"{Path(nets_dense.__file__)}:"


def learn(net: nn.Module, x: Tensor, y: Tensor, loss: Loss, steps: int = 200) -> nn.Module:
    """Adam on batches of 50, the rate falling to nothing."""
    rng = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(net.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for _ in range(steps):
        some = torch.randint(len(x), (50,), generator=rng)
        optimizer.zero_grad()
        loss(net(x[some]), y[some]).backward()
        optimizer.step()
        schedule.step()
    return net.eval()


def write(folder: Path, net: nn.Module, **sets: tuple[Tensor, ...]) -> None:
    """The checkpoint, and data of inputs, targets, and lengths if there are any."""
    torch.save(net.state_dict(), folder / "net.pth")
    for name, tensors in sets.items():
        arrays = zip(("inputs", "targets", "lengths"), tensors, strict=False)
        np.savez(folder / f"{name}.npz", **{key: tensor.numpy() for key, tensor in arrays})


def fixed(cli: Cli, folder: Path, spec: str, *words: object) -> dict[str, Any]:
    out = folder / "fixed.safetensors"
    outcome = cli(
        "fix", folder / "net.pth", "--model", SPEC + spec, "--data", folder / "data.npz",
        "--test", folder / "test.npz", *words, "--workers", "0", "--json", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert Path(f"{out}.report.html").is_file()
    return outcome.json


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def shifted(x: np.ndarray) -> np.ndarray:
    """The same quantities, measured in another unit and from another origin."""
    rng = np.random.default_rng(9)
    return x * rng.uniform(0.5, 1.6, x.shape[1]) + rng.uniform(-0.4, 0.4, x.shape[1])


def parts(x: np.ndarray, y: np.ndarray, kind: type) -> tuple[tuple[Tensor, Tensor], ...]:
    """A thousand to learn from; then, shifted, 500 to work with and 500 to test."""
    inputs = torch.from_numpy(np.concatenate([x[:1000], shifted(x[1000:])])).float()
    targets = torch.from_numpy(y.astype(kind))
    cut = slice(1000), slice(1000, 1500), slice(1500, 2000)
    return tuple((inputs[c], targets[c]) for c in cut)


def test_a_tabular_regression_is_repaired(cli: Cli, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.make_friedman1(2000, random_state=0, noise=0.5)
    train, data, test = parts(x, ((y - y.mean()) / y.std())[:, None], np.float32)
    net = learn(nets_dense.tabular(), *train, F.mse_loss)
    write(tmp_path, net, data=data, test=test)
    found = fixed(cli, tmp_path, "tabular", "--task", "regression")
    first, last = found["models"]
    with torch.no_grad():
        mse = F.mse_loss(net(test[0]), test[1]).item()
    assert first["loss"] == pytest.approx(mse, rel=1e-5)
    assert found["verdict"] == "better"
    assert last["loss"] < first["loss"] / 2
    low, high = found["paired"][-1]["loss"]["interval"]
    assert low < last["loss"] - first["loss"] < high < 0


def test_a_multilabel_table_is_repaired(cli: Cli, tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    x, y = datasets.make_multilabel_classification(
        2000, n_features=10, n_classes=4, n_labels=2, length=30, random_state=0
    )
    train, data, test = parts((x - x.mean(0)) / x.std(0), y, np.float32)
    net = learn(nets_dense.tabular(outputs=4), *train, F.binary_cross_entropy_with_logits)
    write(tmp_path, net, data=data, test=test)
    words = "--task", "multilabel", "--model-arg", "outputs=4", "--select", "0.4"
    found = fixed(cli, tmp_path, "tabular", *words)
    first, last = found["models"]
    with torch.no_grad():
        bce = F.binary_cross_entropy_with_logits(net(test[0]), test[1]).item()
    assert first["loss"] == pytest.approx(bce, rel=1e-5)
    assert {decision["n_examples"] for decision in found["decisions"]} == {200}
    assert found["verdict"] == "better"
    assert last["loss"] < first["loss"]


def test_a_part_that_chooses_leaves_some_to_fit(cli: Cli, files: Files, tmp_path: Path) -> None:
    words = "fix", files.net, *files.common, "--data", files.data, "-o", tmp_path / "o.safetensors"
    for part, said in (("0.5", "at most 0.4, with 0.6"), ("0", "above 0")):
        message = cli(*words, "--select", part).message
        assert "--select" in message
        assert said in message


def clouds(n: int, seed: int, wide: float) -> tuple[Tensor, Tensor]:
    """Points on a ball, in a box or on a ring, `(n, 3, 24)`, and which of them."""
    rng = np.random.default_rng(seed)
    kind = rng.integers(0, 3, n)
    points = rng.standard_normal((n, 3, 24))
    ball = points / np.linalg.norm(points, axis=1, keepdims=True)
    box = rng.uniform(-1, 1, points.shape)
    ring = ball.copy()
    ring[:, 2] *= 0.1
    x = np.choose(kind[:, None, None], [ball, box, ring]) + 0.05 * rng.standard_normal(points.shape)
    return torch.from_numpy(wide * x).float(), torch.from_numpy(kind)


def test_a_net_of_points_with_norms_in_a_list_is_repaired(cli: Cli, tmp_path: Path) -> None:
    net = learn(nets_dense.point_net(), *clouds(600, 0, 1.0), F.cross_entropy)
    data, test = clouds(400, 1, 1.4), clouds(400, 2, 1.4)
    write(tmp_path, net, data=data, test=test)
    found = fixed(cli, tmp_path, "point_net")
    with torch.no_grad():
        right = (net(test[0]).argmax(1) == test[1]).float().mean().item()
    assert found["models"][0]["top1"] == pytest.approx(right)
    assert found["verdict"] == "better"
    assert found["models"][-1]["top1"] > right + 0.03


def volumes(n: int, seed: int, noise: float) -> tuple[Tensor, Tensor]:
    """A bright box in a noisy volume `(n, 1, 4, 6, 8)`, and where it is."""
    rng = np.random.default_rng(seed)
    mask = np.zeros((n, 4, 6, 8), int)
    for one in mask:
        low = rng.integers(0, (2, 3, 4))
        one[tuple(slice(a, a + 3) for a in low)] = 1
    x = mask[:, None] + noise * rng.standard_normal((n, 1, 4, 6, 8))
    return torch.from_numpy(x).float(), torch.from_numpy(mask)


def test_a_volume_is_segmented_again(cli: Cli, tmp_path: Path) -> None:
    net = learn(nets_dense.volume(), *volumes(200, 0, 0.5), F.cross_entropy, 100)
    data, test = volumes(150, 1, 1.2), volumes(100, 2, 1.2)
    write(tmp_path, net, data=data, test=test)
    found = fixed(cli, tmp_path, "volume", "--task", "segmentation")
    with torch.no_grad():
        loss = F.cross_entropy(net(test[0]), test[1]).item()
    assert found["models"][0]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["verdict"] == "better"


def sequences(n: int, seed: int, loud: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noise of 4 to 16 frames, zeros behind; the target is the mean loudness of channel 0."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 3, 16)) * rng.uniform(0.5, 1.5, (n, 1, 1))
    lengths = rng.integers(4, 17, n)
    valid = np.arange(16) < lengths[:, None]
    y = (np.abs(x[:, 0]) * valid).sum(1, keepdims=True) / lengths[:, None]
    x = loud * x * valid[:, None]
    return torch.from_numpy(x).float(), torch.from_numpy(y).float(), torch.from_numpy(lengths)


def test_a_recurrent_net_is_repaired_by_its_valid_frames(cli: Cli, tmp_path: Path) -> None:
    x, y, lengths = sequences(600, 0, 1.0)
    net = nets_dense.recurrent()
    packed = torch.cat([x.flatten(1), lengths[:, None]], 1)

    class Unpacked(nn.Module):
        def forward(self, row: Tensor) -> Tensor:
            return net(row[:, :-1].view(-1, 3, 16), row[:, -1].long())

    learner = Unpacked()
    learner.net = net
    learn(learner, packed, y, F.mse_loss)
    data, test = sequences(300, 1, 2.5), sequences(300, 2, 2.5)
    write(tmp_path, net, data=data, test=test)
    found = fixed(cli, tmp_path, "recurrent", "--task", "regression", "--train", "none")
    with torch.no_grad():
        mse = F.mse_loss(net(test[0], test[2]), test[1]).item()
    assert found["models"][0]["loss"] == pytest.approx(mse, rel=1e-5)
    assert found["verdict"] == "better"
    out = tmp_path / "measured.safetensors"
    outcome = cli(
        "calibrate", tmp_path / "net.pth", "--model", SPEC + "recurrent", "--data",
        tmp_path / "data.npz", "--labels", "none", "--statistics", "population",
        "--example-weight", "keep", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    valid = torch.arange(16) < data[2][:, None]
    with torch.no_grad():
        frames = net.double().conv(data[0].double()).transpose(1, 2)[valid]
    stored = load_file(out)
    torch.testing.assert_close(
        stored["bn.running_mean"].double(), frames.mean(0), rtol=1e-5, atol=1e-6
    )
    variance = frames.var(0, correction=0)
    torch.testing.assert_close(stored["bn.running_var"].double(), variance, rtol=1e-5, atol=1e-6)


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


def test_an_ignored_output_is_wrong_but_has_no_iou() -> None:
    rng = np.random.default_rng(0)
    outputs = torch.from_numpy(rng.normal(size=(5, 4, 7, 6))).float()
    targets = torch.from_numpy(rng.integers(0, 4, (5, 7, 6)))
    found = bnfix.evaluate(
        nn.Identity(), [(outputs, targets)],
        task=bnfix.settings.TaskRecipe("segmentation", ignore_index=2),
    )  # fmt: skip
    guess, valid = outputs.argmax(1), targets != 2
    each = []
    for k in (0, 1, 3):
        both = ((guess == k) & (targets == k)).sum()
        each.append(float(both / (((guess == k) & valid) | (targets == k)).sum()))
    assert found.values["miou"] == pytest.approx(np.mean(each))
