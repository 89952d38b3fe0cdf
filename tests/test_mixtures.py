"""Mixtures of old and new statistics, chosen by labels: planted weights are found."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfix.core.settings import WeightRecipe
from bnfix.metrics.evaluate import evaluate
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.weights.mixtures import MixtureSearch, choose_mixture_

PLANTED = {"0": 0.15, "3": 0.8}


class Net(nn.Sequential):
    def __init__(self, norm=nn.BatchNorm1d, **options):
        super().__init__(
            norm(6, **options), nn.Linear(6, 10), nn.ReLU(), norm(10, **options), nn.Linear(10, 5)
        )


def moments(net, seed):
    """A pair of moments a layer, far enough apart that the weight matters."""
    rng = torch.Generator().manual_seed(seed)
    found = {}
    for name in PLANTED:
        c = net.get_submodule(name).num_features
        old = torch.randn(c, generator=rng).double(), 0.2 + torch.rand(c, generator=rng).double()
        away = 4.0 if name == "0" else 1.5
        new = old[0] + away * torch.randn(c, generator=rng), 4 * old[1]
        found[name] = old, new
    return found


def by_hand(pair, w):
    """The law of total variance over two sources, by raw second moments."""
    (m0, v0), (m1, v1) = pair
    mean = (1 - w) * m0 + w * m1
    return mean, (1 - w) * (v0 + m0**2) + w * (v1 + m1**2) - mean**2


def written_(net, pairs, weights):
    for name, pair in pairs.items():
        layer = net.get_submodule(name)
        for buffer, value in zip(
            (layer.running_mean, layer.running_var), by_hand(pair, weights[name]), strict=True
        ):
            buffer.copy_(value)
    return net


def planted(weights, n=3072, **options):
    """A network, its pairs, and batches with labels drawn from the network with such weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net(**options).eval()
        with torch.no_grad():
            net[4].weight.mul_(8)
            for name in PLANTED:
                if net.get_submodule(name).affine:
                    nn.init.uniform_(net.get_submodule(name).weight, 0.6, 1.4)
                    nn.init.normal_(net.get_submodule(name).bias, std=0.3)
        pairs = moments(net, 1)
        teacher = written_(copy.deepcopy(net), pairs, weights)
        x = torch.randn(n, 6) * 1.5
        with torch.no_grad():
            y = torch.distributions.Categorical(logits=teacher(x)).sample()
    cut = [(x[i : i + 16], y[i : i + 16]) for i in range(0, n, 16)]
    third = len(cut) // 3
    return net, teacher, pairs, (cut[:third], cut[third : 2 * third], cut[2 * third :])


def chosen(net, pairs, parts, start=1.0, granularity="layer", z=2.0):
    written_(net, pairs, dict.fromkeys(pairs, start))
    learn, monitor, select = parts
    return choose_mixture_(
        net, pairs, learn, monitor=monitor, select=select,
        incumbent=("as it was", evaluate(net, select)),
        recipe=WeightRecipe(granularity=granularity), z=z,
    )  # fmt: skip


KINDS = [
    {},
    {"affine": False},
    {"norm": GeneralizedBatchNorm, "channel_groups": 2},
    {"norm": GeneralizedBatchNorm, "channel_groups": 1, "example_weight": 0.2},
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_gradients_are_those_of_the_loss_of_the_mixture(options):
    """Against differences of the loss of a network whose statistics were written by hand."""
    net, _, pairs, (learn, *_) = planted(PLANTED, **options)
    net, x, y = net.double(), *(torch.cat(parts) for parts in zip(*learn, strict=True))
    at = {"0": 0.4, "3": 0.7}
    layers = {name: net.get_submodule(name) for name in pairs}
    search = MixtureSearch(net, layers, [], learn, None, "fp32", pairs=pairs)
    search.set_(at)

    def loss():
        return F.cross_entropy(net(x.double()), y)

    def beside(name, step):
        written_(net, pairs, at | {name: at[name] + step})
        return float(loss().detach())

    with search.leaves("layer", 0.0) as leaves:
        inside = loss()
        inside.backward()
    written_(net, pairs, at)
    assert float(inside.detach()) == pytest.approx(float(loss().detach()), rel=1e-12)
    for name, leaf in leaves.items():
        difference = (beside(name, 1e-5) - beside(name, -1e-5)) / 2e-5
        assert float(leaf.grad) == pytest.approx(difference, rel=1e-6)


@pytest.mark.parametrize("options", KINDS[:3], ids=str)
def test_planted_weights_of_layers_are_found(options):
    net, teacher, pairs, parts = planted(PLANTED, **options)
    before = {name: p.clone() for name, p in net.named_parameters()}
    found = chosen(net, pairs, parts)
    assert found.chosen == "layer"
    assert [d.admitted for d in found.decisions] == [True, True]
    for name, weight in PLANTED.items():
        assert found.weights[name] == pytest.approx(weight, abs=0.2)
        mean, var = by_hand(pairs[name], found.weights[name])
        layer = net.get_submodule(name)
        torch.testing.assert_close(layer.running_mean, mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var, var.float(), rtol=1e-5, atol=1e-6)
    gained, best = (evaluate(one, parts[2]).nll for one in (net, teacher))
    assert gained < best + 0.03
    assert found.decisions[0].nll > best + 0.03
    # Scale and shift, by which the gradient goes, are the parameters from before.
    assert {name: p.requires_grad for name, p in net.named_parameters()} == dict.fromkeys(before, 1)
    for name, p in net.named_parameters():
        assert isinstance(p, nn.Parameter)
        assert torch.equal(p, before[name])
        assert p.grad is None


@pytest.mark.parametrize("weight", [0.05, 0.4, 0.75])
def test_one_planted_weight_is_found(weight):
    net, _, pairs, parts = planted(dict.fromkeys(PLANTED, weight))
    found = chosen(net, pairs, parts, granularity="global")
    assert found.chosen == "global"
    assert len(set(found.weights.values())) == 1
    assert found.weights["0"] == pytest.approx(weight, abs=0.1)
    assert len(found.decisions) == 1
    assert found.notes == (
        f"one mixture of statistics: the new statistics weigh {found.weights['0']:.2f}.",
    )


@pytest.mark.parametrize("end", [0.0, 1.0])
def test_where_an_end_is_best_it_stays_bit_for_bit(end):
    net, _, pairs, parts = planted(dict.fromkeys(PLANTED, end))
    written_(net, pairs, dict.fromkeys(pairs, end))
    before = {name: t.clone() for name, t in net.state_dict().items()}
    found = chosen(net, pairs, parts, start=end)
    assert (found.chosen, found.weights, found.notes) == ("keep", {}, ())
    assert [d.admitted for d in found.decisions] == [False, False]
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_model_without_gradients_gets_one_weight_and_the_reason():
    net, _, pairs, parts = planted(dict.fromkeys(PLANTED, 0.4))

    class Cut(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        @torch.no_grad()
        def forward(self, x):
            return self.net(x)

    model = Cut().eval()
    found = chosen(model, {f"net.{name}": pair for name, pair in pairs.items()}, parts)
    assert found.chosen == "global"
    assert (
        "per layer: was given up: statistics: the model's output has no gradient"
        in (found.notes[0])
    )
    layer = net.get_submodule("3")
    mean, _ = by_hand(pairs["3"], found.weights["net.3"])
    torch.testing.assert_close(layer.running_mean, mean.float())


def test_a_layer_without_finite_moments_keeps_what_it_holds():
    net, _, pairs, parts = planted(dict.fromkeys(PLANTED, 0.4))
    own = copy.deepcopy(net[0].state_dict())
    (mean, var), new = pairs["0"]
    broken = pairs | {"0": ((mean.clone().fill_(math.nan), var), new)}
    learn, monitor, select = parts
    before = evaluate(net, select)
    found = choose_mixture_(
        net, broken, learn, monitor=monitor, select=select, incumbent=("as it was", before)
    )
    assert set(found.weights) <= {"3"}
    assert all(torch.equal(t, own[name]) for name, t in net[0].state_dict().items())
