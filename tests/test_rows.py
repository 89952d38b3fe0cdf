"""Evaluation with gradients, against the plain form's own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad, graph

from bnfix.norm import kernels, moments
from bnfix.norm.layer import GeneralizedBatchNorm
from tests.test_kernels import laid_out, terms_for

NAMES = ("mean", "var", "example_weight", "gamma", "beta")


def wide(terms, *, wanted=()):
    """Terms in float64, of which some want gradients."""
    terms = terms.cast(torch.float64)
    given = {
        name: value.detach().clone().requires_grad_(name in wanted)
        for name, value in zip(NAMES, terms[:5], strict=True)
        if value is not None
    }
    return terms._replace(**given)


@st.composite
def cases(draw):
    c = draw(st.sampled_from([1, 2, 6]))
    spatial = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 4)), c, *spatial, generator=generator).double()
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    weight = draw(st.sampled_from([0.03, 0.5, 1.0, "each"]))
    if weight == "each":
        weight = torch.linspace(0, 1, c) if c > 1 else torch.tensor([0.3])
    flags = {name: draw(st.booleans()) for name in ("bare", "alone")}
    wanted = draw(st.sets(st.sampled_from(NAMES)))
    terms = wide(terms_for(c, weight=weight, groups=groups, **flags), wanted=wanted)
    return x.requires_grad_(draw(st.booleans()) or not wanted), terms


def gradients(way, x, terms, direction):
    y = way(x, terms)
    if not y.requires_grad:  # weights that nothing is mixed by
        return y, ()
    given = [t for t in (x, *terms[:5]) if t is not None and t.requires_grad]
    return y, torch.autograd.grad(y, given, direction, allow_unused=True)


@given(case=cases())
@settings(max_examples=200, deadline=None)
def test_outputs_and_all_gradients_are_the_plain_forms(case):
    x, terms = case
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    mine, my_gradients = gradients(kernels.evaluate, x, terms, direction)
    theirs, their_gradients = gradients(kernels.plain, x, terms, direction)
    torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    for one, other in zip(my_gradients, their_gradients, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("spatial", [(7,), (3, 4), (2, 2, 2)])
@pytest.mark.parametrize("bare", [False, True])
def test_derivatives_are_those_of_differences_the_second_too(spatial, bare):
    x = torch.randn(2, 3, *spatial, dtype=torch.float64, requires_grad=True)
    terms = wide(terms_for(3, weight=torch.tensor([0.2, 0.5, 0.9]), bare=bare), wanted=NAMES)
    given = [t for t in terms[:5] if t is not None]
    names = [name for name, t in zip(NAMES, terms[:5], strict=True) if t is not None]

    def run(x, *given):
        y = kernels.evaluate(x, terms._replace(**dict(zip(names, given, strict=True))))
        assert "Scaled" in y.grad_fn.name()
        return y

    assert torch.autograd.gradcheck(run, (x, *given))
    assert torch.autograd.gradgradcheck(run, (x, *given))


@given(seed=st.integers(0, 99), offset=st.sampled_from([0.0, 3.0, 30.0, 300.0, 3e4]))
@settings(max_examples=40, deadline=None)
def test_single_precision_far_from_zero(seed, offset):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(3, 4, 9, 9, generator=generator) + offset).requires_grad_()
    terms = terms_for(4, weight=0.3, offset=offset, seed=seed)
    direction = torch.randn(x.shape, generator=generator)
    mine, (gradient,) = gradients(kernels.evaluate, x, terms, direction)
    exact = x.detach().double().requires_grad_()
    theirs, (expected,) = gradients(kernels.plain, exact, wide(terms), direction.double())
    allowed = 1e-4 + 1e-6 * offset
    torch.testing.assert_close(mine.double(), theirs, rtol=1e-4, atol=allowed)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=allowed)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_goes_where_it_went(value):
    x = torch.randn(3, 2, 5, 5)
    x[1, 0, 2, 2] = value
    x.requires_grad_()
    terms = terms_for(2, weight=0.3)
    direction = torch.ones_like(x)
    mine, (gradient,) = gradients(kernels.evaluate, x, terms, direction)
    theirs, (expected,) = gradients(kernels.plain, x, terms, direction)
    torch.testing.assert_close(mine, theirs, equal_nan=True)
    torch.testing.assert_close(gradient, expected, equal_nan=True)
    assert mine[0].isfinite().all()
    assert not mine[1, 0].isfinite().any()


@pytest.mark.parametrize("layout", ["channels last", "strided"])
def test_other_layouts_keep_theirs(layout):
    x = laid_out(torch.randn(3, 4, 5, 5), layout).requires_grad_()
    y = kernels.evaluate(x, terms_for(4, weight=0.3))
    assert "Scaled" not in y.grad_fn.name()
    assert (y.stride() == x.stride()) == (layout == "channels last")


def layer_of(channels=3):
    torch.manual_seed(0)
    layer = GeneralizedBatchNorm(channels, example_weight=0.3).eval()
    layer.running_mean.uniform_(-0.5, 0.5)
    layer.running_var.uniform_(0.5, 2)
    return layer


@pytest.mark.parametrize(("ghost_size", "groups"), [(None, 2), (2, 2), (3, 2), (2, 6), (3, 6)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("offset", [0.0, 500.0])
def test_runs_and_groups_are_those_of_the_plain_form(ghost_size, groups, training, offset):
    torch.manual_seed(0)
    layer = GeneralizedBatchNorm(
        6, ghost_size=ghost_size, channel_groups=groups, track_running_stats=training
    ).train(training)  # fmt: skip
    torch.nn.init.uniform_(layer.weight, 0.5, 2)
    x = torch.randn(7, 6, 5, 4) + offset
    direction = torch.randn(7, 6, 5, 4)
    found = []
    # Channels last is not taken by rows; so the same layer does both.
    for layout, by_rows in (("contiguous", not offset), ("channels last", False)):
        one = copy.deepcopy(layer)
        given = laid_out(x.clone(), layout).detach().requires_grad_()
        y = one(given)
        assert ("Scaled" in y.grad_fn.name()) == by_rows
        y.backward(direction)
        state = [t for t in one.state_dict().values() if t.is_floating_point()]
        found.append([y, given.grad, one.weight.grad, one.bias.grad, *state])
    tolerance = 1e-3 if offset else 2e-5
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def test_it_may_be_changed_in_place_like_the_stock_layers():
    layer, stock = layer_of(), torch.nn.BatchNorm2d(3).eval()
    for one in (layer, stock):
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        y = one(x * 1.0).relu_()
        y.sum().backward()
        assert x.grad.isfinite().all()
        # And the input may not be, before the backward pass has used it.
        z = x * 1.0
        y = one(z)
        z.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()


def test_no_more_is_kept_than_the_input():
    layer, x = layer_of(), torch.randn(4, 3, 32, 32, requires_grad=True)
    kept: dict[int, int] = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    assert x.nbytes <= sum(kept.values()) < 1.1 * x.nbytes


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of torch, about itself
def test_transforms_and_forward_mode_take_the_plain_form():
    layer, x, tangent = layer_of(), *torch.randn(2, 2, 3, 4, 4)
    with forward_ad.dual_level():
        y = layer(forward_ad.make_dual(x, tangent))
        forward = forward_ad.unpack_dual(y).tangent
    _, expected = torch.func.jvp(lambda x: kernels.plain(x, layer._terms()), (x,), (tangent,))
    torch.testing.assert_close(forward, expected)
    by_transform = torch.func.grad(lambda x: layer(x).square().sum())(x)
    leaf = x.clone().requires_grad_()
    layer(leaf).square().sum().backward()
    torch.testing.assert_close(by_transform, leaf.grad, rtol=1e-4, atol=1e-5)


def test_scaling_into_the_values_themselves():
    values = torch.randn(3, 4, 25)
    mean, var = moments.row_moments(values)
    expected = (values - mean.unsqueeze(-1)) / var.sqrt().unsqueeze(-1)
    moments.scale_rows(values, mean, var, None, None, values)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
