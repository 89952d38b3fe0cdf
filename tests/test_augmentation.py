"""Varied training images: what may change, and the same again for one seed, epoch and image."""

import numpy as np
import pytest
import torch

from bnfix.core.errors import ConfigError
from bnfix.data.batches import Batch, augmented


def batch(positions, size=(16, 24)):
    x = torch.stack([
        torch.randn(3, *size, generator=torch.Generator().manual_seed(int(i))) for i in positions
    ])  # fmt: skip
    return Batch(x, torch.tensor([int(i) % 5 for i in positions]), np.asarray(positions))


def one(positions, kind, seed=0, epoch=0):
    (found,) = augmented([batch(positions)], kind, seed, epoch)
    return found


def test_none_is_the_very_batch():
    given = batch([3, 1])
    assert next(augmented([given], "none", 0, 0)) is given


@pytest.mark.parametrize("kind", ["light", "standard"])
def test_a_variant_depends_on_seed_epoch_and_image_only(kind):
    before = torch.get_rng_state()
    found = one([5, 2, 9], kind)
    assert torch.equal(torch.get_rng_state(), before)
    again = one([9, 5], kind)
    assert torch.equal(found.x[0], again.x[1])
    assert torch.equal(found.x[2], again.x[0])
    assert torch.equal(found.y, batch([5, 2, 9]).y)
    assert found.index.tolist() == [5, 2, 9]
    assert found.x.shape == (3, 3, 16, 24)
    many = list(range(20))
    for other in (one(many, kind, seed=1), one(many, kind, epoch=1)):
        assert not torch.equal(other.x, one(many, kind).x)


def test_light_mirrors_and_shifts_by_up_to_an_eighth():
    positions = list(range(60))
    original, varied = batch(positions).x, one(positions, "light").x
    shifts = set()
    for x, v in zip(original, varied, strict=True):
        padded = torch.nn.functional.pad(x[None], (3, 3, 2, 2), mode="reflect")[0]
        mirrored = torch.nn.functional.pad(x.flip(-1)[None], (3, 3, 2, 2), mode="reflect")[0]
        fitting = [
            (flip, dy, dx)
            for flip, source in enumerate((padded, mirrored))
            for dy in range(5)
            for dx in range(7)
            if torch.equal(source[:, dy : dy + 16, dx : dx + 24], v)
        ]
        assert len(fitting) == 1
        shifts.add(fitting[0])
    assert {flip for flip, _, _ in shifts} == {0, 1}
    assert {dy for _, dy, _ in shifts} == set(range(5))
    assert {dx for _, _, dx in shifts} == set(range(7))


def test_standard_stays_within_the_values_of_the_image():
    positions = list(range(20))
    original, varied = batch(positions).x, one(positions, "standard").x
    assert (varied.amax((1, 2, 3)) <= original.amax((1, 2, 3)) + 1e-5).all()
    assert (varied.amin((1, 2, 3)) >= original.amin((1, 2, 3)) - 1e-5).all()
    assert not torch.equal(varied, original)


@pytest.mark.parametrize("kind", ["light", "standard"])
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (7, 33)])
def test_any_size_will_do(kind, size):
    (found,) = augmented([batch([1, 2], size)], kind, 0, 0)
    assert found.x.shape == (2, 3, *size)


def test_other_kinds_are_refused():
    with pytest.raises(ConfigError, match="--augment: 'wild' is not known"):
        list(augmented([batch([1])], "wild", 0, 0))
