"""Statistics of the kind of examples that most are of, where others lie among them."""

import copy

import pytest
import torch
from torch import nn

from bnfix.core.errors import DataError, NormError
from bnfix.recalibrate.recalibrate import describe_missing, recalibrate_
from tests import nets
from tests.test_blend import drawn, equal, some, statistics


def striped(n, seed=2):
    """Images of another kind: stripes of random strength, as bright as the others."""
    strength = torch.rand(n, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) + 1.5
    stripes = torch.tensor([1.0, 1.0, -1.0, -1.0] * 2).view(8, 1)
    return (strength * stripes + 1).expand(n, 3, 8, 8).contiguous()


KINDS = {
    "stripes": striped,
    "saturated": lambda n: 8.0 * drawn(n, seed=4).sign(),
    "wild": lambda n: 1e4 * drawn(n, seed=5),
    "black": lambda n: torch.zeros(n, 3, 8, 8),
}


def mixed(clean, garbage, seed=0):
    """Both in one random order, and which are clean."""
    order = torch.randperm(len(clean) + len(garbage), generator=torch.Generator().manual_seed(seed))
    return torch.cat((clean, garbage))[order], order < len(clean)


def close(one, other, rtol=1e-5):
    for name, moments in statistics(one).items():
        torch.testing.assert_close(moments, statistics(other)[name], rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("options", [{}, {"target": "blend"}])
def test_statistics_are_those_of_the_larger_kind_alone(kind, memory_bytes, options):
    """As if the others had never been there, in any order and batches."""
    net, n = some(nets.plain), 41
    clean, garbage = drawn(n), KINDS[kind](n - 1)
    expected, plain = copy.deepcopy(net), copy.deepcopy(net)
    recalibrate_(expected, [clean], feed="sequential", **options)
    x, _ = mixed(clean, garbage)
    for size, images in ((7, x), (16, torch.cat((garbage, clean)))):
        model = copy.deepcopy(net)
        done = recalibrate_(
            model, images.split(size), robust=True, memory_bytes=memory_bytes, **options
        )
        close(model, expected)
        assert done.target == f"robust {options.get('target', 'population')}"
        assert done.trust.n_left_out == n - 1
        assert done.layers[0].n_values == n * 64
    recalibrate_(plain, x.split(7), feed="sequential", **options)
    with pytest.raises(AssertionError):
        close(plain, expected, rtol=0.05)


@pytest.mark.parametrize("n", [16, 33, 100])
@pytest.mark.parametrize("make", [nets.plain, nets.residual])
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_images_of_one_kind_are_all_kept(n, make, memory_bytes):
    net = some(make)
    one, other = copy.deepcopy(net), copy.deepcopy(net)
    done = recalibrate_(one, drawn(n).split(6), robust=True, memory_bytes=memory_bytes)
    recalibrate_(other, drawn(n).split(6), feed="sequential", memory_bytes=memory_bytes)
    assert done.trust.n_left_out == 0
    assert equal(one, other)
    assert any(f"0 of {n} examples left out" in line for line in describe_missing(done))


@pytest.mark.parametrize("swapped", [False, True])
def test_the_majority_decides_and_of_equal_halves_the_stored_statistics(swapped):
    net = some(nets.plain)
    recalibrate_(net, [drawn(300, seed=7)], feed="sequential")
    kinds = [drawn(40), striped(40)]
    expected = [copy.deepcopy(net) for _ in kinds]
    for model, kind in zip(expected, kinds, strict=True):
        recalibrate_(model, [kind[:38]], feed="sequential")
    first, second = kinds[::-1] if swapped else kinds
    model = copy.deepcopy(net)
    recalibrate_(model, [torch.cat((first[:38], second[:30]))], robust=True)
    close(model, expected[swapped])
    model = copy.deepcopy(net)
    recalibrate_(model, [torch.cat((first[:38], second[:38]))], robust=True)
    close(model, expected[0])


def test_several_other_kinds_go_one_after_the_other():
    net, clean = some(nets.residual), drawn(100)
    garbage = torch.cat([KINDS[kind](30) for kind in ("stripes", "saturated", "black")])
    expected = copy.deepcopy(net)
    recalibrate_(expected, [clean], feed="sequential")
    done = recalibrate_(net, mixed(clean, garbage)[0].split(32), robust=True)
    assert done.trust.n_left_out == 90
    close(net, expected)


def test_an_interrupted_run_goes_on_to_the_same_numbers(tmp_path):
    net = some()
    x, _ = mixed(drawn(40), striped(30))
    expected, model = copy.deepcopy(net), copy.deepcopy(net)
    options = {"robust": True, "memory_bytes": 0, "identity": "these images"}
    recalibrate_(expected, x.split(9), **options)

    class Torn(list):
        passes = 0

        def __iter__(self):
            Torn.passes += 1
            if Torn.passes == 4:
                raise KeyboardInterrupt
            return super().__iter__()

    with pytest.raises(KeyboardInterrupt):
        recalibrate_(model, Torn(x.split(9)), state=tmp_path, **options)
    done = recalibrate_(model, x.split(9), state=tmp_path, **options)
    assert done.effort.n_resumed >= 70  # of the other passes; the first is run again
    assert done.trust.n_left_out == 30
    assert equal(model, expected)


def test_a_part_of_the_images_is_enough_for_the_errors():
    net = some()
    x, _ = mixed(drawn(300), striped(200))
    done = recalibrate_(net, x.split(25), robust=True, samples="auto", tolerance=0.1)
    assert 16 <= done.n_examples < 500
    assert done.trust.n_left_out == 200


@pytest.mark.parametrize("n", [1, 15])
def test_too_few_to_tell_are_refused(n):
    net = some()
    before = copy.deepcopy(net)
    with pytest.raises(DataError, match=f"robust: {n} examples, expected at least 16"):
        recalibrate_(net, drawn(n).split(4), robust=True)
    assert equal(net, before)


@pytest.mark.parametrize("longer", [False, True])
def test_other_batches_in_a_later_pass_are_refused(longer):
    class Another:
        passes = 0

        def __iter__(self):
            self.passes += 1
            return iter(drawn(24 + 6 * longer * self.passes, seed=1 + self.passes).split(6))

    net = some()
    before = copy.deepcopy(net)
    with pytest.raises(DataError, match="differs from the first pass"):
        recalibrate_(net, Another(), robust=True)
    assert equal(net, before)


def test_a_layer_of_other_rows_than_examples_is_refused_until_it_is_left_out():
    class Cut(nn.Module):
        """The second layer gets each image in four parts."""

        def __init__(self):
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn2(self.bn1(x).view(-1, 3, 4, 4))

    net, x = Cut().eval(), drawn(24)
    with pytest.raises(NormError, match="bn2: gets 24 rows for 6 examples"):
        recalibrate_(net, x.split(6), robust=True)
    assert recalibrate_(net, x.split(6), robust=True, skip=["bn2"]).trust.n_left_out == 0


def test_padded_images_count_by_their_valid_columns():
    clean, garbage = drawn(41), striped(30)
    x, is_clean = mixed(clean, garbage)
    lengths = torch.arange(len(x)) % 4 + 3
    inside = (torch.arange(8) < lengths[:, None])[:, None, None]
    batch = {"x": torch.where(inside, x, 7.0), "lengths": lengths}
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).eval()
    expected = copy.deepcopy(net)
    options = {"forward": lambda model, batch: model(batch["x"]), "feed": "sequential"}
    recalibrate_(expected, [{key: part[is_clean] for key, part in batch.items()}], **options)
    parts = [{key: part[i] for key, part in batch.items()} for i in torch.arange(len(x)).split(9)]
    assert recalibrate_(net, parts, robust=True, **options).trust.n_left_out == 30
    close(net, expected)
