"""The shift of stored statistics by layer and over depth, against plain float64 arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.core.errors import DataError
from bnfix.diagnosis.model import Shifts, examine_behaviour, measure_shifts
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import recalibrate_
from tests import nets
from tests.real import DATA, needs_data

EPS = 1e-3


def drawn_net(seed: int = 0) -> nn.Sequential:
    """Three norms, drawn, in float64."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=EPS), nn.ReLU(),
        nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=EPS), nn.ReLU(),
        nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5, eps=EPS),
    ).double()  # fmt: skip
    for part in net:
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_()
            part.running_var.uniform_(0.2, 3)
            nn.init.normal_(part.weight)
            nn.init.normal_(part.bias)
    return net.eval()


def uneven() -> list[torch.Tensor]:
    """Batches of 6, 6 and 2."""
    torch.manual_seed(7)
    return list((torch.randn(14, 3, 9, 9).double() * 2 + 1).split(6))


def by_hand(net: nn.Sequential, batches: list[torch.Tensor], *, by_batch: bool) -> Any:
    """Four numbers a norm, in numpy: gaps of every batch by its examples, then of all values."""
    found, met = {}, {}
    for x in batches:
        for name, part in net.named_children():
            if not isinstance(part, nn.BatchNorm2d):
                x = part(x)
                continue
            values = x.detach().numpy()
            mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3))
            own_mean, own_var = part.running_mean.numpy(), part.running_var.numpy()
            mean_gap = np.mean(np.abs(own_mean - mean) / np.sqrt(var + EPS))
            sd_gap = np.mean(np.abs(np.sqrt(own_var + EPS) / np.sqrt(var + EPS) - 1))
            found.setdefault(name, []).append((len(x), mean_gap, sd_gap))
            met.setdefault(name, []).append(values)
            used = (mean, var) if by_batch else (own_mean, own_var)
            mean, var = (torch.from_numpy(np.asarray(t))[:, None, None] for t in used)
            scale, shift = part.weight[:, None, None], part.bias[:, None, None]
            x = (x - mean) / (var + EPS).sqrt() * scale + shift
    numbers = {}
    for name, rows in found.items():
        n, mean_gap, sd_gap = np.array(rows).T
        values = np.concatenate(met[name])
        mean, var = values.mean((0, 2, 3)), values.var((0, 2, 3)) + EPS
        part = net.get_submodule(name)
        shift = np.mean(np.abs(mean - part.running_mean.numpy()) / np.sqrt(var))
        ratio = np.mean(np.abs(np.log(var / (part.running_var.numpy() + EPS))))
        numbers[name] = ((n * mean_gap).sum() / n.sum(), (n * sd_gap).sum() / n.sum(), shift, ratio)
    return numbers


def numbers(feed: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    return {name: tuple(vars(shift).values()) for name, shift in feed.items()}


@pytest.mark.parametrize("seed", range(3))
def test_both_feeds_are_those_of_float64_arithmetic_also_with_an_uneven_last_batch(seed):
    net, batches = drawn_net(seed), uneven()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    found = measure_shifts(net, batches)
    assert found.batch_size == 6
    for by_batch, feed in ((False, found.sequential), (True, found.batch)):
        wanted = by_hand(net, batches, by_batch=by_batch)
        assert list(feed) == ["1", "4", "7"]
        for name, row in numbers(feed).items():
            assert row == pytest.approx(wanted[name], rel=1e-9), (by_batch, name)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())


@pytest.mark.parametrize("feed", ["batch", "sequential"])
def test_it_is_0_where_the_batch_is_the_population(feed):
    net, (batch, *_) = drawn_net(), uneven()
    recalibrate_(net, [batch], feed=feed)
    found = measure_shifts(net, [batch])
    for row in (*numbers(found.sequential).values(), *numbers(found.batch).values()):
        assert max(row) < 1e-10
    assert "of it comes from" not in found.reading


def test_the_first_layer_does_not_depend_on_the_feed():
    found = measure_shifts(drawn_net(), uneven())
    assert found.sequential["1"] == found.batch["1"]
    assert found.sequential["4"] != found.batch["4"]


def test_a_wrong_first_layer_shows_further_up_in_the_sequential_feed_alone():
    net, batches = drawn_net(), uneven()
    recalibrate_(net, batches, feed="sequential")
    net[1].running_mean += 2
    found = measure_shifts(net, batches)
    assert found.sequential["1"].mean_shift > 0.3
    assert found.sequential["4"].mean_shift > 5 * found.batch["4"].mean_shift
    assert "of it comes from the layers before" in found.reading


def test_a_gap_has_more_chance_in_smaller_batches_and_the_shift_has_none():
    net, x = drawn_net(), torch.cat(uneven())
    recalibrate_(net, [x], feed="sequential")
    whole, halves, singles = (measure_shifts(net, list(x.split(n))).sequential for n in (14, 7, 1))
    for name in whole:
        gaps = [found[name].mean_gap for found in (whole, halves, singles)]
        assert gaps == sorted(gaps)
        assert gaps[1] > 0.01
        assert all(found[name].mean_shift < 1e-10 for found in (whole, halves, singles))


def test_the_shifts_of_the_sequential_feed_are_the_residuals():
    net, batches = drawn_net(), uneven()
    found = measure_shifts(net, batches).sequential
    assert {name: (s.log_var_ratio, s.mean_shift) for name, s in found.items()} == residuals(
        net, batches
    )


def test_labels_change_nothing():
    net, batches = drawn_net(), uneven()
    labelled = [(x, torch.zeros(len(x), dtype=torch.long)) for x in batches]
    assert measure_shifts(net, labelled) == measure_shifts(net, batches)


def test_layers_stand_in_the_order_of_their_calls():
    class Swapped(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self[0](self[1](x))

    found = measure_shifts(
        Swapped(nn.BatchNorm2d(3), nn.BatchNorm2d(3)).eval(), [uneven()[0].float()]
    )
    assert list(found.sequential) == ["1", "0"]
    assert [found.to_json(name)["depth"] for name in "01x"] == [2, 1, None]


def test_constants_are_used_in_the_batch_feed_too():
    net, batches = drawn_net(), uneven()
    frozen = FrozenBatchNorm2d(4, eps=EPS).double()
    frozen.load_state_dict({k: v for k, v in net[1].state_dict().items() if "num" not in k})
    net[1] = frozen
    found = measure_shifts(net, batches)
    assert found.sequential["4"] == found.batch["4"]
    assert found.sequential["7"] != found.batch["7"]


def test_grouped_layers_are_measured_by_groups():
    net, batches = drawn_net(), uneven()
    swap_norms_(net, channel_groups=2, layers=["4"])
    recalibrate_(net, batches[:1], feed="sequential")
    found = measure_shifts(net, batches[:1])
    assert max(numbers(found.sequential)["4"]) < 1e-10


def test_a_batch_of_single_values_has_no_deviation():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(6)).eval()
    x = torch.randn(5, 6)
    found = measure_shifts(net, [x[:4], x[4:]])
    assert found.sequential == measure_shifts(net, [x[:4], x[4:]]).batch
    of_four = measure_shifts(net, [x[:4]]).sequential["1"]
    assert found.sequential["1"].mean_gap == of_four.mean_gap
    alone = measure_shifts(net, [x[:1]]).to_json("1")
    assert alone["feeds"]["batch"]["mean_gap"] is None
    assert alone["mean_shift"] is not None


def test_what_is_not_finite_leaves_the_other_feed():
    net, batches = drawn_net(), uneven()
    net[1].running_mean.fill_(math.nan)
    found = measure_shifts(net, batches)
    assert found.sequential == {}
    assert set(found.batch) == {"1", "4", "7"}
    assert found.reading == ""
    assert found.to_json("4")["mean_shift"] is None
    assert examine_behaviour(net, batches)[0].drifts == {}
    with pytest.raises(DataError, match="no examples"):
        measure_shifts(net, [])


def test_the_reading_names_first_and_last_layer_and_both_feeds():
    found = measure_shifts(drawn_net(), uneven())
    first, last, own = found.sequential["1"], found.sequential["7"], found.batch["7"]
    assert f"from {first.mean_shift:.2g} deviations at 1 to {last.mean_shift:.2g} at 7" in (
        found.reading
    )
    assert f"({own.mean_shift:.2g} in the batch feed)" in found.reading
    worst = max(found.sequential, key=lambda name: found.sequential[name].mean_shift)
    assert f"largest at {worst} ({found.sequential[worst].mean_shift:.2g})" in found.reading
    assert Shifts().reading == ""


def test_inspect_shows_both_feeds(cli, files):
    arguments = (files.stale, *files.common, "--data", files.data, "--batch-size", "50")
    found = cli("inspect", *arguments, "--labels", "none", "--json").json
    labelled = cli("inspect", *arguments, "--json").json
    assert found["layers"] == labelled["layers"]
    assert found["behaviour"]["batch_size"] >= 50
    first, second = found["layers"]
    assert (first["depth"], second["depth"]) == (1, 2)
    assert first["feeds"]["batch"] == first["feeds"]["sequential"]
    for layer in (first, second):
        assert set(layer["feeds"]["batch"]) == {
            "mean_gap", "sd_gap", "mean_shift", "log_var_ratio",
        }  # fmt: skip
        assert layer["feeds"]["sequential"]["mean_shift"] == layer["mean_shift"]
    shown = cli("inspect", *arguments).out
    assert found["behaviour"]["reading"] in shown
    gaps = second["feeds"]["batch"]
    assert f"{gaps['mean_gap']:.2g}, {gaps['sd_gap']:.2g}" in shown
    without = cli("inspect", files.stale, *files.common, "--json").json
    assert without["layers"][0]["feeds"] == {"sequential": None, "batch": None}
    assert "sequential" not in cli("inspect", files.stale, *files.common).out


@needs_data
def test_noise_builds_up_over_the_depth_of_a_real_network():
    state = torch.load(DATA / "cifar10" / "resnet20.th", weights_only=True, map_location="cpu")
    net = nets.resnet20()
    own = {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
    net.load_state_dict(own, strict=False)
    images = np.load(DATA / "cifar10" / "test.npz")["images"][:256] / 255
    rng = np.random.default_rng(0)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    ends = []
    for noise in (0, 0.06):
        noisy = np.clip(images + rng.normal(0, noise, images.shape), 0, 1)
        x = torch.from_numpy(((noisy - mean) / std).transpose(0, 3, 1, 2)).float()
        found = measure_shifts(net.eval(), list(x.split(64)))
        assert found.sequential["bn1"] == found.batch["bn1"]
        ends.append((found.sequential["layer3.2.bn2"], found.batch["layer3.2.bn2"]))
    (clean, _), (noisy_end, noisy_own) = ends
    assert noisy_end.mean_shift > 2 * clean.mean_shift
    assert noisy_end.mean_shift > 5 * noisy_own.mean_shift
