import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfix.norm.moments import Moments, example_moments, mix, pool
from bnfix.recalibrate.accumulator import precise_moments


def moments(x):
    return Moments(torch.tensor(float(x.numel())), x.mean(), x.var(correction=0))


@given(
    sizes=st.lists(st.integers(1, 17), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 1.0, 1e3, 1e6]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60, deadline=None)
def test_pooling_any_split_equals_the_whole(sizes, offset, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(s, generator=generator, dtype=torch.float64) + offset for s in sizes]
    whole = torch.cat(parts)
    pooled = pool([moments(part) for part in parts])
    assert pooled.count.item() == whole.numel()
    torch.testing.assert_close(pooled.mean, whole.mean(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled.var, whole.var(correction=0), rtol=1e-9, atol=1e-9)


@given(a=st.floats(0, 1), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_two_parts_are_the_blend_and_never_negative(a, seed):
    rng = np.random.default_rng(seed)
    mp, me = rng.normal(size=(2, 5)) * 10.0 ** rng.integers(-3, 4)
    vp, ve = rng.random((2, 5))
    weight = torch.tensor([1 - a, a], dtype=torch.float64).unsqueeze(1)
    mean, var = mix(torch.tensor(np.stack([mp, me])), torch.tensor(np.stack([vp, ve])), weight)
    np.testing.assert_allclose(mean, (1 - a) * mp + a * me, rtol=1e-9, atol=1e-9)
    expected = (1 - a) * vp + a * ve + a * (1 - a) * (me - mp) ** 2
    np.testing.assert_allclose(var, expected, rtol=1e-9, atol=1e-9)
    assert (var >= 0).all()


def test_mixing_in_float32_survives_a_mean_of_3000():
    x = torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)) + 3000
    _, var = mix(x.mean(1), x.var(1, correction=0))
    assert var.item() == pytest.approx(x.double().var(correction=0).item(), rel=1e-4)


def test_mixing_over_several_axes_at_once():
    mean, var = torch.randn(2, 3, 4, 5).double(), torch.rand(2, 3, 4, 5).double()
    nested = mix(*mix(mean, var, dim=3), dim=1)
    for one, other in zip(mix(mean, var, dim=(1, 3)), nested, strict=True):
        torch.testing.assert_close(one, other)
    for one, other in zip(mix(mean, var, dim=(-1, 1)), nested, strict=True):
        torch.testing.assert_close(one, other)


def test_pooling_nothing_is_zero_and_not_nan():
    empty = Moments(torch.tensor(0.0), torch.full((3,), 7.0), torch.ones(3))
    pooled = pool([empty, empty])
    assert pooled.count.item() == 0
    assert pooled.mean.tolist() == pooled.var.tolist() == [0.0] * 3


def test_parts_of_no_count_do_not_matter():
    part = Moments(torch.tensor(4.0), torch.tensor([2.0]), torch.tensor([3.0]))
    empty = Moments(torch.tensor(0.0), torch.tensor([1e30]), torch.tensor([float("nan")]))
    pooled = pool([empty, part])
    assert (pooled.mean.item(), pooled.var.item()) == (2.0, 3.0)


@pytest.mark.parametrize("positions", [1, 2, 33])
def test_example_moments_match_var_mean(positions):
    x = torch.randn(3, 4, positions, dtype=torch.float64) + 5
    mean, var, centred = example_moments(x)
    torch.testing.assert_close(mean, x.mean(2))
    torch.testing.assert_close(var, x.var(2, correction=0))
    torch.testing.assert_close(centred, x - x.mean(2, keepdim=True))


@st.composite
def measured_values(draw):
    n, c = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    length = draw(st.sampled_from([1, 2, 7, 49, 400]))
    x = torch.randn(n, c, length, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
    # Some channels far from 0, so that rows of both kinds stand side by side.
    far = torch.tensor([draw(st.sampled_from([0.0, 3.0, -5.0, 300.0, 1e4])) for _ in range(c)])
    x = x * draw(st.sampled_from([1e-3, 1.0, 50.0])) + far[:, None] * draw(st.sampled_from([0, 1]))
    layout = draw(st.sampled_from(["rows", "columns", "neither"]))
    if layout == "columns":
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "neither":
        x = torch.stack((x, x), -1)[..., 0]
    return x.to(draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16])))


@given(values=measured_values())
@settings(max_examples=200, deadline=None)
def test_moments_of_examples_keep_their_digits_whatever_the_offset_and_layout(values):
    mean, var = precise_moments(values)
    wide = values.double()
    expected = wide.var(-1, correction=0)
    size = wide.abs().amax(-1)
    assert mean.dtype == var.dtype == torch.float64
    # Absolute errors by what float32 can hold of the values, as in any summation of them.
    assert ((mean - wide.mean(-1)).abs() <= 3e-7 * size + 1e-30).all()
    assert ((var - expected).abs() <= 1e-5 * expected + (2e-7 * size) ** 2 * 10).all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("offset", [0.0, 3.9, 8.0])
@pytest.mark.parametrize("positions", [1 << 20, 1_031_000])
def test_moments_of_large_maps_keep_their_digits(positions, offset, transposed):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 2, positions, generator=generator) + offset
    if transposed:
        values = values.transpose(1, 2).contiguous().transpose(1, 2)
    mean, var = precise_moments(values)
    torch.testing.assert_close(mean, values.double().mean(-1), rtol=0, atol=1e-6)
    torch.testing.assert_close(var, values.double().var(-1, correction=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e30])
def test_what_is_not_finite_stays_in_its_own_row(value):
    for transposed in (False, True):
        x = torch.randn(3, 4, 20)
        x[1, 2, 5] = value
        if transposed:
            x = x.transpose(1, 2).contiguous().transpose(1, 2)
        mean, var = precise_moments(x)
        finite = (mean + var).isfinite()
        assert not finite[1, 2]
        assert int(finite.sum()) == 11
