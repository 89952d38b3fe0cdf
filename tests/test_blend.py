"""Mixtures of stored and measured statistics: their two ends, and a slow version by hand."""

import copy
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bnfix.core.errors import ConfigError
from bnfix.data.open import open_images
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate.recalibrate import recalibrate_
from tests import nets
from tests.reference import channel_moments

EPS = 1e-5
FEEDS = ("batch", "sequential")
MAKE = {"plain": nets.plain, "residual": nets.residual, "shared": nets.shared_norm}


def some(make=nets.residual, seed=0):
    torch.manual_seed(seed)
    return nets.lived_in(make()).eval()


def drawn(n=24, seed=1, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def blended_(model, batches, **options):
    return recalibrate_(model, batches, target="blend", **options)


def statistics(model):
    return {
        site.name: (site.module.running_mean.double(), site.module.running_var.double())
        for site in find_norms(model)
    }


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return all(
        torch.equal(value, other[name]) for name, value in one.items() if "tracked" not in name
    )


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups", [None, 2])
def test_both_ends_are_what_was_stored_and_what_was_measured(feed, make, dtype, groups):
    net = some(MAKE[make]).to(dtype)
    if groups is not None:
        swap_norms_(net, channel_groups=groups)
        recalibrate_(net, [drawn(seed=5).to(dtype)])  # a group's channels hold the same
    batches = drawn().to(dtype).split(7)
    kept, population = copy.deepcopy(net), copy.deepcopy(net)
    recalibrate_(population, batches, feed=feed)
    for options in ({"new_weight": 0.0}, {"prior": 1e14}, {"new_weight": 1.0}, {"prior": 0}):
        model = copy.deepcopy(net)
        blended_(model, batches, feed=feed, **options)
        if options == {"prior": 1e14}:
            for name, (mean, var) in statistics(model).items():
                torch.testing.assert_close(mean, statistics(kept)[name][0])
                torch.testing.assert_close(var, statistics(kept)[name][1])
            continue
        assert equal(model, kept if options == {"new_weight": 0.0} else population), options


def by_hand(net, x, weight):
    """The statistics of a `Plain` network, layer by layer, in float64."""
    model = copy.deepcopy(net).double()
    y, found = x.double(), {}
    with torch.no_grad():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            z, norm = getattr(model, conv)(y), getattr(model, bn)
            mean, var = channel_moments(z)
            old_mean, old_var = norm.running_mean.numpy(), norm.running_var.numpy()
            mixed = (1 - weight) * old_mean + weight * mean
            raw = (1 - weight) * (old_var + old_mean**2) + weight * (var + mean**2)
            norm.running_mean.copy_(torch.from_numpy(mixed))
            norm.running_var.copy_(torch.from_numpy(raw - mixed**2))
            found[bn] = norm.running_mean.clone(), norm.running_var.clone()
            y = norm(z).relu()
    return found


@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("options", [{"new_weight": 0.3}, {"prior": 8}, {"prior": 24.0}])
def test_statistics_are_those_found_by_hand(memory_bytes, options):
    net = some(nets.plain)
    expected = by_hand(net, drawn(), options.get("new_weight", 24 / (24 + options.get("prior", 0))))
    done = blended_(net, drawn().split(5), memory_bytes=memory_bytes, **options)
    assert done.target == "blend"
    for name, moments in statistics(net).items():
        torch.testing.assert_close(moments, expected[name], rtol=1e-5, atol=1e-5)


def test_layers_above_see_the_batch_normalized_by_itself_under_the_batch_feed():
    net = some(nets.plain)
    population, old = copy.deepcopy(net), statistics(net)
    recalibrate_(population, drawn().split(6), feed="batch")
    blended_(net, drawn().split(6), feed="batch", new_weight=0.25)
    for name, (mean, var) in statistics(population).items():
        old_mean, old_var = old[name]
        expected = 0.75 * old_mean + 0.25 * mean
        raw = 0.75 * (old_var + old_mean**2) + 0.25 * (var + mean**2)
        found = statistics(net)[name]
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], raw - expected**2, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"new_weight": 0.4}, {"prior": 10}, {}])
def test_batches_of_any_size_and_order_give_the_same(options):
    net, x = some(), drawn()
    found = []
    for batches in ([x], x.split(1), x.split(7), x.flip(0).split(5), iter(x.split(9))):
        model = copy.deepcopy(net)
        done = blended_(model, batches, **options)
        found.append((statistics(model), [layer.new_weight for layer in done.layers]))
    for moments, weights in found[1:]:
        assert weights == pytest.approx(found[0][1], rel=1e-5)
        for name in moments:
            torch.testing.assert_close(moments[name], found[0][0][name], rtol=1e-5, atol=1e-6)


def test_the_more_examples_the_nearer_to_the_population():
    net = some()
    weights = []
    for n in (1, 2, 8, 24):
        done = blended_(copy.deepcopy(net), [drawn(n)], prior=8)
        assert [layer.new_weight for layer in done.layers] == pytest.approx([n / (n + 8)] * 5)
        weights.append(done.layers[0].new_weight)
    assert weights == sorted(weights)


def drift_weight(old, rows):
    """The weight of the rule, from each example's mean and variance ``(n, C)``, two layers."""
    (old_mean, old_var), (means, variances) = old, rows
    n = len(means)
    mean, var = means.mean(0), (variances + (means - means.mean(0)) ** 2).mean(0)
    squares = variances + (means - mean) ** 2
    drift = (mean - old_mean) ** 2 / (old_var + EPS)
    drift += np.log((var + EPS) / (old_var + EPS)) ** 2 / 2
    chance = means.var(0, ddof=1) / n / (old_var + EPS)
    chance += squares.var(0, ddof=1) / n / (var + EPS) ** 2 / 2
    known = max(0, drift.mean() - chance.mean())
    return known / (known + 4 * chance.mean() + 0.02), mean, var  # two layers: all of it


def test_auto_weighs_by_the_drift_less_what_chance_explains():
    net = some(nets.plain)
    model, y, expected = copy.deepcopy(net).double(), drawn().double(), []
    for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
        z, norm = getattr(model, conv)(y).detach(), getattr(model, bn)
        values = z.flatten(2).numpy()
        old = norm.running_mean.numpy(), norm.running_var.numpy()
        weight, mean, var = drift_weight(old, (values.mean(2), values.var(2)))
        mixed = (1 - weight) * old[0] + weight * mean
        raw = (1 - weight) * (old[1] + old[0] ** 2) + weight * (var + mean**2)
        norm.running_mean.copy_(torch.from_numpy(mixed))
        norm.running_var.copy_(torch.from_numpy(raw - mixed**2))
        y = norm(z).relu().detach()
        expected.append(weight)
    for options in ({}, {"prior": "auto"}):
        found = copy.deepcopy(net)
        done = blended_(found, drawn().split(5), **options)
        assert done.feed == "sequential"
        assert [layer.new_weight for layer in done.layers] == pytest.approx(expected, rel=1e-4)
        for name, moments in statistics(found).items():
            torch.testing.assert_close(moments, statistics(model)[name], rtol=1e-4, atol=1e-5)


def test_auto_moves_nothing_by_one_example_or_without_drift():
    net = some()
    one = copy.deepcopy(net)
    blended_(one, [drawn(1)])  # how much of it is chance is not known
    assert equal(one, net)
    recalibrate_(net, [drawn(200)], feed="sequential")
    few = blended_(copy.deepcopy(net), [drawn(4, seed=3)])
    many = blended_(copy.deepcopy(net), [drawn(100, seed=3) + 2.0])
    assert max(layer.new_weight for layer in few.layers) < 0.25
    assert many.layers[0].new_weight > 0.5


def test_an_interrupted_run_of_another_prior_is_not_taken(tmp_path):
    net = some()
    blended_(copy.deepcopy(net), drawn().split(6), memory_bytes=0, state=tmp_path, prior=8)
    model, expected = copy.deepcopy(net), copy.deepcopy(net)
    done = blended_(model, drawn().split(6), memory_bytes=0, state=tmp_path, prior=2)
    assert done.effort.n_resumed == 0
    blended_(expected, drawn().split(6), memory_bytes=0, prior=2)
    assert equal(model, expected)


@pytest.mark.parametrize("robust", [False, True])
@pytest.mark.parametrize("prior", [None, "auto", 20])
def test_the_command_mixes_as_python_does(files, cli, tmp_path, prior, robust):
    words = () if prior is None else ("--prior", prior)
    words += ("--robust",) * robust
    words = ("--data", files.flat, *files.common, "--statistics", "blend", *words)
    out = tmp_path / "out.safetensors"
    done = cli("calibrate", files.stale, *words, "--example-weight", "keep", "-o", out, "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["calibration"]["target"] == "robust " * robust + "blend"
    assert found["calibration"]["feed"] == "sequential"
    assert any(
        "mixed with the stored statistics; the weight of the new" in line
        for line in found["assumptions"]
    )
    images = open_images(str(files.flat))
    x = torch.stack([torch.from_numpy(np.asarray(images.read(i))) for i in range(len(images))])
    x = (x.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    blended_(model, [x], prior=prior, robust=robust)
    for name, value in load_file(out).items():
        if name.endswith(("_mean", "_var")):
            torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--prior", "8"],
            "--prior: --statistics is auto, expected blend. Add --statistics blend.",
        ),
        (
            ["--robust"],
            "--robust: --statistics is auto, expected population or blend. Add --statistics blend.",
        ),
        (["--statistics", "blend", "--prior", "-1"], "--prior: -1.0, expected auto or a number"),
        (["--statistics", "blend", "--prior", "some"], "--prior: some, expected auto or a number"),
    ],
)
def test_a_prior_that_says_nothing_is_refused(files, cli, tmp_path, words, message):
    given = ("--data", files.flat, *files.common, *words)
    done = cli("calibrate", files.net, *given, "-o", tmp_path / "out.safetensors")
    assert done.code == 2
    assert message in done.err


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"target": "population", "prior": 3}, "only target blend"),
        ({"target": "train-batch", "train_batch_size": 2, "new_weight": 0.5}, "only target blend"),
        ({"prior": "auto", "new_weight": 0.5}, "both set the same weight"),
        ({"prior": -1}, "prior: -1"),
        ({"prior": "most"}, "prior: most"),
        ({"prior": math.nan}, "prior: nan"),
        ({"new_weight": 1.5}, "new_weight: 1.5"),
        ({"robust": True, "feed": "batch"}, "with the sequential feed"),
        ({"robust": True, "target": "train-batch", "train_batch_size": 4}, "only for targets"),
        ({"target": "half"}, "expected population, train-batch, reference or blend"),
    ],
)
def test_options_that_contradict_are_refused(options, found):
    net = some()
    before = copy.deepcopy(net)
    with pytest.raises(ConfigError, match=found):
        recalibrate_(net, [drawn()], **{"target": "blend"} | options)
    assert equal(net, before)
