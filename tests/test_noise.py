"""Statistics for noisy weights: a closed form, a slow version by hand, and nothing left behind."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F

from bnfix import evaluate
from bnfix.core.errors import ConfigError, ModelError
from bnfix.core.settings import StatisticsRecipe, WeightRecipe
from bnfix.jobs.session import Plan
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.recalibrate import recalibrate_
from bnfix.recalibrate.targets import average_over_noise_, noisy_weights
from tests import nets
from tests.conftest import images_of, inputs_of

MAKE = {"plain": nets.plain, "residual": nets.residual, "shared": nets.shared_norm}


def some(make=nets.residual, seed=0):
    torch.manual_seed(seed)
    return nets.lived_in(make()).eval()


def drawn(n=20, seed=1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, 8, 8, generator=generator) * 2 + 1).to(dtype)


def averaged_(model, batches, size, seeds, **options):
    return average_over_noise_(model, lambda: recalibrate_(model, batches, **options), size, seeds)


def moments(model):
    return {
        site.name: (site.module.running_mean.double(), site.module.running_var.double())
        for site in find_norms(model)
    }


def noisy_copy(model, size, seed):
    """A copy with noise on the weights, which are named and drawn here once more."""
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(seed)
    done = set()
    with torch.no_grad():
        for module in model.modules():
            is_layer = isinstance(module, nn.Conv2d | nn.Linear)
            if is_layer and id(module.weight) not in done:
                done.add(id(module.weight))
                w = module.weight
                spread = ((w - w.mean()) ** 2).mean().sqrt()
                w += size * spread * torch.randn(w.shape, generator=generator).to(w)
    return model


def test_one_linear_layer_has_the_closed_form():
    """E v = v + r^2 s^2 sum_j Var x_j, E mu = mu; within 4 standard errors of the copies' mean."""
    size, n_copies, n_in, n_out = 1.0, 200, 7, 5
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out)).double().eval()
    x = torch.randn(50, n_in, dtype=torch.float64) @ torch.randn(n_in, n_in, dtype=torch.float64)
    x += 0.3
    w, bias = net[0].weight.detach().clone(), net[0].bias.detach()
    averaged_(net, [x], size, range(n_copies))
    covariance = (x - x.mean(0)).T @ (x - x.mean(0)) / len(x)
    s = size * w.std(correction=0)
    mean, var = w @ x.mean(0) + bias, torch.einsum("ij,jk,ik->i", w, covariance, w)
    expected = var + s**2 * covariance.diagonal().sum()
    # The variance of (w + e)' S (w + e) over normal e of deviation s.
    square = covariance @ covariance
    of_var = 2 * s**4 * square.trace() + 4 * s**2 * torch.einsum("ij,jk,ik->i", w, square, w)
    assert ((net[1].running_var - expected).abs() < 4 * (of_var / n_copies).sqrt()).all()
    of_mean = s**2 * x.mean(0).square().sum() / n_copies
    assert ((net[1].running_mean - mean).abs() < 4 * of_mean.sqrt()).all()
    # The noise has an effect that is far above this bound.
    assert (expected - var > 8 * (of_var / n_copies).sqrt()).all()


@pytest.mark.parametrize("feed", ["batch", "sequential"])
@pytest.mark.parametrize("make", MAKE)
def test_the_mean_of_slow_copies(feed, make):
    net, x, seeds = some(MAKE[make]).double(), drawn(dtype=torch.float64), (5, 1, 40)
    batches = x.split(7)
    copies = [noisy_copy(net, 0.2, seed) for seed in seeds]
    for one in copies:
        recalibrate_(one, batches, feed=feed)
    before = {n: v.clone() for n, v in net.state_dict().items()}
    found = averaged_(net, batches, 0.2, seeds, feed=feed)
    for name, (mean, var) in moments(net).items():
        theirs = [moments(one)[name] for one in copies]
        torch.testing.assert_close(mean, sum(m for m, _ in theirs) / 3, rtol=1e-11, atol=1e-12)
        torch.testing.assert_close(var, sum(v for _, v in theirs) / 3, rtol=1e-11, atol=1e-12)
    for name, value in net.state_dict().items():
        assert "running" in name or torch.equal(value, before[name]), name
    assert found.target == "population, mean of 3 copies with weight noise 0.2"
    if feed == "batch":
        assert found.passes == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n_copies", [1, 3, 7])
def test_without_noise_it_is_the_population_bit_for_bit(dtype, n_copies):
    net, batches = some().to(dtype), drawn(dtype=dtype).split(6)
    plain = copy.deepcopy(net)
    recalibrate_(plain, batches)
    averaged_(net, batches, 0.0, range(n_copies))
    assert all(torch.equal(v, plain.state_dict()[n]) for n, v in net.state_dict().items())


def test_the_order_of_the_copies_does_not_matter():
    batches, found = drawn(dtype=torch.float64).split(6), []
    for seeds in ((1, 2, 3, 4), (4, 2, 1, 3)):
        net = some().double()
        averaged_(net, batches, 0.3, seeds)
        found.append(net.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-12, atol=1e-13)


def test_weights_come_back_bit_for_bit_after_an_error():
    net = some()
    before = {n: v.clone() for n, v in net.state_dict().items()}
    passes = iter([drawn().split(5), drawn().split(5), [drawn() * float("nan")]])
    with pytest.raises(Exception, match="not finite"):
        average_over_noise_(net, lambda: recalibrate_(net, next(passes)), 0.5, range(3))
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())
    with noisy_weights(net, 0.5, 0):
        assert not torch.equal(net.conv1.weight, before["conv1.weight"])
    assert all(torch.equal(v, before[n]) for n, v in net.state_dict().items())


def test_noise_is_on_weights_only_and_once_where_they_are_shared():
    net = some()
    net.layer2.shortcut = nn.Sequential(net.layer1.conv1)
    net.norm = nn.LayerNorm((4, 8, 8))
    before = {n: v.clone() for n, v in net.state_dict().items()}
    expected = noisy_copy(net, 0.4, 9).state_dict()
    with noisy_weights(net, 0.4, 9):
        for name, value in net.state_dict().items():
            torch.testing.assert_close(value, expected[name])
            is_weight = value.ndim > 1 and not name.startswith("norm")
            assert torch.equal(value, before[name]) != is_weight, name
    with (
        pytest.raises(ModelError, match="no convolution or linear layer"),
        noisy_weights(nn.BatchNorm2d(3), 0.1, 0),
    ):
        pass


def by_hand(files, path, size, seeds):
    """Top-1 and NLL on the test images, of each copy."""
    model = files.model()
    model.load_state_dict(load_file(path) if path.suffix == ".safetensors" else torch.load(path))
    with np.load(files.test) as arrays:
        x, y = inputs_of(arrays["images"]), torch.from_numpy(arrays["labels"])
    outputs = []
    with torch.no_grad():
        for seed in seeds:
            outputs.append(noisy_copy(model.eval(), size, seed)(x))
    top1 = [float((z.argmax(1) == y).double().mean()) for z in outputs]
    return top1, [float(F.cross_entropy(z.double(), y)) for z in outputs]


def test_candidates_are_judged_on_copies_that_nothing_was_measured_on(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ("calibrate", files.stale, "--data", files.data, "--test", files.test, *files.common)
    words += (
        "--weight-noise",
        0.1,
        "--draws",
        3,
        "--seed",
        4,
        "--select",
        0.4,
        "-o",
        out,
        "--json",
    )
    planned = cli(*words, "--plan")
    assert planned.code == 0, planned.err
    stages = planned.json["stages"]
    assert any(
        "population of 3 copies with weight noise, batch feed): 3 passes" in s for s in stages
    )
    assert not any("mixture" in s or "example weight" in s for s in stages)
    done = cli(*words)
    assert done.code == 0, done.err
    found = done.json
    (note,) = [line for line in found["assumptions"] if line.startswith("weight noise 0.1")]
    assert "3 copies (seeds from 4); select" in note
    assert "other copies (seeds from 1004 and 2004)" in note
    names = [decision["candidate"] for decision in found["decisions"]]
    assert [name.partition("(")[2] for name in names] == [
        "population)", "population, mean of 3 copies with weight noise 0.1)",
    ]  # fmt: skip
    assert found["verdict"] == "better"
    for model, path in zip(found["models"], (files.stale, out), strict=True):
        top1, nll = by_hand(files, path, 0.1, range(2004, 2007))
        assert model["top1"] == pytest.approx(np.mean(top1))
        assert model["nll"] == pytest.approx(np.mean(nll), rel=1e-5)
        assert model["n_groups"] == 120
    before, after = torch.load(files.stale), load_file(out)
    assert all(torch.equal(v, after[n]) for n, v in before.items() if "running" not in n)
    with safe_open(out, "pt") as file:
        options = json.loads(file.metadata()["bnfix"])["history"][-1]["options"]
    assert options["statistics"]["weight_noise"] == 0.1
    assert options["statistics"]["draws"] == 3


def test_without_labels_it_acts_where_it_is_stated(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ("calibrate", files.stale, "--data", files.flat, *files.common, "-o", out, "--quiet")
    words += ("--statistics", "population", "--feed", "sequential", "--example-weight", "keep")
    done = cli(*words, "--weight-noise", 0.25, "--draws", 2)
    assert done.code == 0, done.err
    x = inputs_of(images_of(60, seed=2)[0])
    model = files.model()
    model.load_state_dict(torch.load(files.stale))
    averaged_(model, [x], 0.25, (0, 1), feed="sequential")
    for name, value in load_file(out).items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-4, atol=1e-5)


def test_a_task_of_rows_is_judged_on_copies_too(files):
    """Losses of the user's: the stacked copies have the mean of their losses, in groups."""
    from bnfix.metrics.evaluate import collect, measured, stacked
    from bnfix.metrics.tasks import Regression

    net = some()
    batches = [(x, torch.randn(len(x), 3)) for x in drawn(n=23).split(9)]
    copies = []
    for seed in range(3):
        with noisy_weights(net, 0.3, seed):
            copies += collect([net], batches, Regression())
    found = measured(stacked(copies), 0)
    assert found.nll == pytest.approx(np.mean([measured(one, 0).nll for one in copies]))
    assert found.n_examples == 69
    assert found.examples.n_groups == 23
    assert stacked(copies[:1]) is copies[0]
    assert measured(copies[0], 0).nll == evaluate_mse(noisy_copy(net, 0.3, 0), batches)


def evaluate_mse(net, batches):
    return pytest.approx(evaluate(net, batches, task="regression").nll, rel=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--weight-noise", "-0.1"), "--weight-noise: -0.1, expected 0 to 10"),
        (("--weight-noise", "nan"), "--weight-noise: nan, expected 0 to 10"),
        (("--weight-noise", 0.1, "--draws", 0), "--draws: 0, expected 1 to 1000"),
        (("--draws", 3), "--draws: only with --weight-noise"),
        (("--weight-noise", 0.1, "--draws", 1001), "--draws: 1001, expected 1 to 1000"),
        (
            ("--weight-noise", 0.1, "--statistics", "blend"),
            "only with --statistics auto or population",
        ),
        (("--weight-noise", 0.1, "--statistics", "population", "--robust"), "without --robust"),
        (("--weight-noise", 0.1, "--train-batch-size", 4), "--train-batch-size"),
        (("--weight-noise", 0.1, "--batch-weight", "auto"), "without --batch-weight auto"),
    ],
)
def test_noise_that_nothing_takes_is_refused(files, cli, tmp_path, words, message):
    given = ("--data", files.data, *files.common, *words)
    done = cli("calibrate", files.net, *given, "-o", tmp_path / "out.safetensors")
    assert done.code == 2
    assert message in done.err
    assert not list(tmp_path.iterdir())


def test_other_commands_have_no_noise():
    noise = StatisticsRecipe(weight_noise=0.1)
    for command in ("finetune", "average"):
        with pytest.raises(ConfigError, match="only fix and calibrate"):
            Plan(command=command, statistics=noise)
    assert Plan(statistics=noise, weight=WeightRecipe("keep")).statistics.draws == 8
