"""The benchmark's own parts: other tools' formulas as published, and Holm's procedure."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.quality_methods import iabn, linear, with_formula
from benchmarks.quality_tables import AUTO, family, holm
from tests import nets


def layer():
    bn = nn.BatchNorm2d(2).eval()
    with torch.no_grad():
        bn.running_mean.copy_(torch.tensor([0.5, -1.0]))
        bn.running_var.copy_(torch.tensor([2.0, 0.5]))
        bn.weight.copy_(torch.tensor([1.5, 0.7]))
        bn.bias.copy_(torch.tensor([0.1, -0.2]))
    return bn


def normalized(bn, x, mean, var):
    y = (x - mean[:, :, None, None]) / np.sqrt(var + bn.eps)[:, :, None, None]
    gamma, beta = (t.detach().numpy()[None, :, None, None] for t in (bn.weight, bn.bias))
    return gamma * y + beta


@pytest.fixture
def x():
    rng = torch.Generator().manual_seed(0)
    return 3 * torch.randn(5, 2, 4, 4, generator=rng) + 4 * torch.randn(5, 2, 1, 1, generator=rng)


def test_linear_mixing_has_no_cross_term(x):
    bn, values = layer(), x.numpy()
    mean = 0.9 * bn.running_mean.numpy() + 0.1 * values.mean((2, 3))
    var = 0.9 * bn.running_var.numpy() + 0.1 * values.var((2, 3))
    found = with_formula(nn.Sequential(layer()), linear)(x).detach().numpy()
    np.testing.assert_allclose(found, normalized(bn, values, mean, var), rtol=1e-4, atol=1e-5)


def test_iabn_takes_what_is_beyond_4_standard_errors(x):
    bn, values, n = layer(), x.numpy(), 16
    mean_p, spread = bn.running_mean.numpy(), bn.running_var.numpy() + bn.eps
    mean_i, var_i = values.mean((2, 3)), values.var((2, 3), ddof=1)

    def soft(z, t):
        return np.where(np.abs(z) > t, z - np.sign(z) * t, 0.0)

    mean = mean_p + soft(mean_i - mean_p, 4 * np.sqrt(spread / n))
    shift = soft(var_i - bn.running_var.numpy(), 4 * spread * np.sqrt(2 / (n - 1)))
    var = np.maximum(bn.running_var.numpy() + shift, 0)
    assert np.any(mean != mean_p)
    assert np.any(shift != 0)
    found = with_formula(nn.Sequential(layer()), iabn)(x).detach().numpy()
    np.testing.assert_allclose(found, normalized(bn, values, mean, var), rtol=1e-4, atol=1e-5)


def test_the_population_s_own_moments_are_stock_inference(x):
    def population(bn, mean, var, n):
        return bn.running_mean.expand_as(mean), bn.running_var.expand_as(var)

    net = nets.lived_in(nets.resnet20()).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = with_formula(copy.deepcopy(net), population)(images)
        torch.testing.assert_close(found, net(images), rtol=1e-4, atol=1e-4)


def test_holm_by_hand():
    # 0.01 <= 0.05/4, 0.013 <= 0.05/3, 0.03 > 0.05/2: it and all larger ones stand.
    assert holm([0.03, 0.01, 0.04, 0.013]) == [False, True, False, True]
    assert holm([]) == []
    assert holm([0.05]) == [True]


def test_the_family_says_which_case_and_which_way():
    def row(case, top1, nll, p, method=AUTO):
        paired = {"top1": {"difference": top1, "p": p}, "nll": {"difference": nll, "p": p}}
        return {"case": case, "seed": 0, "method": method, "paired": paired}

    rows = [row("a", 0.1, -0.1, 1e-4), row("b", -0.1, 0.1, 1e-4), row("c", -0.1, 0.1, 0.5)]
    found = family([*rows, row("d", -1, 1, 0, "stock")], ("top1", "nll"))
    assert found["better"] == [("a", 0, "top1"), ("a", 0, "nll")]
    assert found["worse"] == [("b", 0, "top1"), ("b", 0, "nll")]
