import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfix.moments import Moments, example_moments, mix, pool


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
