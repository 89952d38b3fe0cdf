"""Example weights without labels, held against a slow search and against what is derived."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn

import bnfix
from bnfix.core.errors import ConfigError, DataError, NormError
from bnfix.core.settings import DataRecipe, RunOptions, StatisticsRecipe, WeightRecipe
from bnfix.demo import SPEC, write_files
from bnfix.jobs.session import Plan
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.weights.choose import weighable_layers
from bnfix.weights.label_free import MOST_EXAMPLES, fit_moments_, fit_predictions_
from tests import nets


def images(n, seed=0, channels=3):
    """Examples that differ in brightness and contrast, as images do."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, 6, 6, generator=rng)
    contrast = torch.exp(0.4 * torch.randn(n, 1, 1, 1, generator=rng))
    return x * contrast + 0.7 * torch.randn(n, 1, 1, 1, generator=rng)


def single():
    """One norm layer that sees the images themselves."""
    return nn.Sequential(
        GeneralizedBatchNorm(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
    ).eval()


def deep():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nets.lived_in(nets.plain(channels=6))
    bnfix.swap_norms_(net)
    return net.eval()


def layers_of(net, x):
    return weighable_layers(net, [x])[0]


def calibrated(net, x, size):
    bnfix.recalibrate_(net, [x], target="train-batch", train_batch_size=size)
    return net


@pytest.mark.parametrize("size", [2, 4, 10])
def test_the_moments_of_one_layer_lead_to_what_is_derived_for_it(size):
    """E[batch moments | one member] is the mixture at a = 1/B, with train-batch statistics."""
    x = images(20 * MOST_EXAMPLES // 20)
    net = calibrated(single(), x, size)
    found = fit_moments_(net, list(x.split(60)), size, layers_of(net, x))
    assert found.weights["0"] == pytest.approx(1 / size, rel=0.15)
    assert float(net[0].example_weight) == pytest.approx(found.weights["0"], rel=1e-6)
    assert found.divergence is None


@pytest.mark.parametrize("size", [2, 3])
def test_the_weight_is_the_least_of_what_is_said_to_be_minimized(size):
    """Searched for on a grid in float64, batch by batch and example by example."""
    x = images(24, seed=1)
    net = calibrated(single(), x, size)
    layer, batches = net[0], list(x.split(12))
    rng = torch.Generator().manual_seed(5)
    runs = [b[torch.randperm(12, generator=rng)].double().numpy().reshape(-1, size, 3, 36)
            for b in batches]  # fmt: skip
    runs = np.concatenate(runs)
    mean_p, var_p = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
    s = var_p + layer.eps

    def loss(a):
        total = 0.0
        for run in runs:
            mean_b, var_b = run.mean((0, 2)), run.var((0, 2))
            for example in run:
                mean_i, var_i = example.mean(1), example.var(1)
                mean = (1 - a) * mean_p + a * mean_i
                var = (1 - a) * var_p + a * var_i + a * (1 - a) * (mean_i - mean_p) ** 2
                total += ((mean_b - mean) ** 2 / s + (var_b - var) ** 2 / (2 * s**2)).mean()
        return total

    grid = np.linspace(0, 1, 401)
    expected = grid[np.argmin([loss(a) for a in grid])]
    found = fit_moments_(net, batches, size, {"0": layer}, seed=5)
    assert found.weights["0"] == pytest.approx(expected, abs=1 / 400)
    assert found.n_examples == 24


def test_one_weight_for_all_lies_between_those_of_the_layers():
    x = images(256)
    net = calibrated(deep(), x, 2)
    layers = layers_of(net, x)
    each = fit_moments_(net, [x], 2, layers).weights
    one = fit_moments_(net, [x], 2, layers, granularity="global").weights
    assert len(each) > 1
    assert len(set(one.values())) == 1
    assert min(each.values()) <= one[next(iter(one))] <= max(each.values())
    assert all(0 <= a <= 1 for a in each.values())


@pytest.mark.parametrize("granularity", ["global", "layer"])
def test_predictions_come_closer_to_those_of_training_mode(granularity):
    x = images(256)
    net = calibrated(deep(), x, 2)
    batches = list(x.split(32))
    found = fit_predictions_(net, batches, 2, layers_of(net, x), granularity=granularity)
    zero, least = found.divergence
    assert 0 <= least < 0.8 * zero
    assert any(found.weights.values())
    assert (len(set(found.weights.values())) == 1) == (granularity == "global")
    # Measured anew, on the batches that were held out and with other companions.
    ghosts = copy.deepcopy(net)
    for _, layer in layers_of(ghosts, x).items():
        layer.ghost_size = 2
    held = torch.cat(batches[::4])
    rng = torch.Generator().manual_seed(9)
    with torch.no_grad():
        total = torch.zeros(len(held), 3)
        for _ in range(8):
            order = torch.randperm(len(held), generator=rng)
            total[order] += copy.deepcopy(ghosts).train()(held[order]).softmax(1)
        target = total / 8
        log_p = net(held).log_softmax(1)
    again = (target * (target.log() - log_p)).sum(1).mean()
    assert float(again) == pytest.approx(least, rel=0.5)


def test_where_the_layers_do_not_matter_the_weight_is_0():
    net = deep()
    x = images(64)
    last = [m for m in net.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    found = fit_predictions_(net, list(x.split(16)), 2, layers_of(net, x))
    assert set(found.weights.values()) == {0.0}


WAYS = [fit_moments_, fit_predictions_]


@pytest.mark.parametrize("way", WAYS)
def test_all_but_the_weights_is_left_as_it_was(way):
    net = deep().train()
    first = next(m for m in net.modules() if isinstance(m, GeneralizedBatchNorm))
    first.ghost_size = 7
    first.eval()
    x = images(64)
    before = copy.deepcopy(net)
    way(net, list(x.split(16)), 2, layers_of(net, x))
    for (name, old), new in zip(
        before.state_dict().items(), net.state_dict().values(), strict=True
    ):
        assert torch.equal(old, new) or name.endswith("example_weight"), name
    for old, new in zip(before.modules(), net.modules(), strict=True):
        assert old.training == new.training
        assert not new._forward_pre_hooks
        for setting in ("ghost_size", "track_running_stats", "channel_groups"):
            assert getattr(old, setting, None) == getattr(new, setting, None)
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_a_failure_leaves_everything_as_it_was(way):
    net, x = deep(), images(64)
    layers = layers_of(net, x)
    bnfix.set_example_weight_(net, dict.fromkeys(layers, 0.125))
    for call in (0, 3, 30) if way is fit_predictions_ else (0, 2):
        counter = itertools.count()

        def fail(*_, counter=counter, call=call):
            if next(counter) == call:
                raise KeyboardInterrupt("now")

        handle = next(iter(layers.values())).register_forward_hook(fail)
        with pytest.raises(KeyboardInterrupt, match="now"):
            way(net, list(x.split(16)), 2, layers)
        handle.remove()
        for layer in layers.values():
            assert float(layer.example_weight) == 0.125
            assert layer.track_running_stats
            assert layer.ghost_size is None
            assert not layer.training


@pytest.mark.parametrize("way", WAYS)
def test_labels_are_not_looked_at_and_a_seed_gives_one_answer(way):
    x = images(48)
    found = []
    for batches in (
        list(x.split(16)),
        [(part,) for part in x.split(16)],
        [(part, torch.full((16,), 99)) for part in x.split(16)],
    ):
        net = deep()
        found.append(way(net, batches, 4, layers_of(net, x)))
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize("way", WAYS)
def test_what_fills_no_batch_is_left_out(way):
    net, x = deep(), images(35)
    found = way(net, list(x.split(18)), 5, layers_of(net, x))
    assert found.n_examples == 15 + 15
    assert f"{way.__name__[:-1].replace('_', '-')}: example weights from 30 examples" in (
        found.describe()
    )


@pytest.mark.parametrize("way", WAYS)
def test_what_cannot_be_fitted_is_refused(way):
    net, x = deep(), images(16)
    layers = layers_of(net, x)
    with pytest.raises(ConfigError, match="--train-batch-size: 1, expected at least 2"):
        way(net, [x], 1, layers)
    with pytest.raises(DataError, match="too few examples to fit and to check with batches of 17"):
        way(net, [x], 17, layers)
    with pytest.raises(NormError, match="no layer that can weigh"):
        way(net, [x], 2, {})
    assert not any(layer.live for layer in layers.values())


# Through the pipeline


@pytest.mark.parametrize("how", ["fit-moments", "fit-predictions"])
def test_calibrate_takes_them_without_labels(how, tmp_path):
    files = write_files(tmp_path)
    plan = Plan(
        source=DataRecipe(labels="none", mean=(0.3061,), std=(0.376,)),
        statistics=StatisticsRecipe(train_batch_size=4),
        weight=WeightRecipe(example_weight=how),
        run=RunOptions(device="cpu", workers=0),
    )
    result = bnfix.calibrate(files.checkpoint, data=str(files.calibration), model=SPEC, plan=plan)
    weights = {row.example_weight for row in result.report.layers if row.example_weight}
    assert len(weights) > 1
    assert all(0 < a < 1 for a in weights)
    assert any(
        text.startswith(f"{how}: example weights from") for text in result.report.assumptions
    )
    assert result.report.trials.calibration.target == "train-batch 4"


@pytest.mark.parametrize("how", ["match", "fit-moments", "fit-predictions"])
def test_the_batch_size_of_training_is_needed(how):
    with pytest.raises(ConfigError, match=f"--example-weight {how}: .* --train-batch-size B"):
        Plan(weight=WeightRecipe(example_weight=how))
