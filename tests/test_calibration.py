import copy
import itertools
import math
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d
from torch import nn
from torch.utils.data import DataLoader, IterableDataset
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.core.errors import ConfigError, DataError, ModelError, NormError, NumericError
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate import collector, lockstep, passes
from bnfix.recalibrate.accumulator import precise_moments
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import describe_missing, recalibrate_
from tests import nets, reference

FEEDS = ["batch", "sequential"]


@pytest.fixture(autouse=True, scope="module", params=["walk", "passes"])
def way(request):
    """Everything is tested in both ways of the sequential feed: with memory for it, and without."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "passes":
            patch.setattr(lockstep, "default_memory", lambda device: 0)
        yield request.param


def images(n=10, size=6, channels=3, seed=0, dtype=torch.float64):
    """Examples that differ in mean and spread, as real ones do, sorted by their means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, channels, size, size, generator=generator, dtype=torch.float64)
    shift = torch.randn(n, channels, 1, 1, generator=generator, dtype=torch.float64)
    spread = 0.5 + torch.rand(n, 1, 1, 1, generator=generator, dtype=torch.float64)
    x = x * spread + shift
    return x[x.mean((1, 2, 3)).argsort()].to(dtype)


def split(x, sizes):
    assert sum(sizes) == len(x)
    return list(x.split(list(sizes)))


def norm_inputs(net, batches, training):
    """What each norm layer is given, in float64: by batch statistics, or in inference."""
    net = copy.deepcopy(net).double().eval()
    found = {}
    for site in find_norms(net):
        site.module.train(training)

        def keep(_, args, name=site.name):
            found.setdefault(name, []).append(args[0].detach().clone())

        site.module.register_forward_pre_hook(keep)
    with torch.no_grad():
        for x in batches:
            net(x.double())
    return {name: torch.cat(parts) for name, parts in found.items()}


def oracle(net, batches, train_batch_size=None, training=True):
    """Population moments of each layer's input; with a size, less the variance of means over it."""
    moments = {}
    for name, x in norm_inputs(net, batches, training).items():
        x = x.numpy()
        mean, var = reference.channel_moments(x)
        if train_batch_size is not None:
            between = x.reshape(*x.shape[:2], -1).mean(2).var(0)
            var = var - between / train_batch_size
        moments[name] = mean, var
    return moments


def assert_statistics(net, expected, tolerance, only=None):
    for site in find_norms(net):
        if only is not None and site.name not in only:
            continue
        mean, var = expected[site.name]
        scale = var + site.module.eps
        own_mean, own_var = (
            t.double().numpy() for t in (site.module.running_mean, site.module.running_var)
        )
        assert np.abs((own_mean - mean) / np.sqrt(scale)).max() <= tolerance, site.name
        assert np.abs((own_var - var) / scale).max() <= tolerance, site.name


def state_of(net):
    """All that must be as it was: modules, modes, tensors, values, momenta, hooks."""
    modules = [
        (
            name,
            id(m),
            m.training,
            getattr(m, "momentum", None),
            len(m._forward_hooks),
            len(m._forward_pre_hooks),
            len(m._forward_hooks_always_called),
            len(m._forward_pre_hooks_with_kwargs),
        )
        for name, m in net.named_modules()
    ]
    tensors = {name: (id(t), t.clone()) for name, t in net.state_dict(keep_vars=True).items()}
    return modules, tensors


def assert_as_it_was(net, before):
    modules, tensors = state_of(net)
    assert modules == before[0]
    assert list(tensors) == list(before[1])
    for name, (identity, value) in before[1].items():
        assert tensors[name][0] == identity, name
        assert torch.equal(tensors[name][1], value), name


def some_net(make, dtype=torch.float64, seed=0, **options):
    torch.manual_seed(seed)
    return nets.lived_in(make(**options)).to(dtype)


IMAGE_NETS = {
    "plain": nets.plain,
    "residual": nets.residual,
    "resnet20": nets.resnet20,
    "dropout": nets.with_dropout,
}


# ---- against one float64 oracle ----------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6),
    backwards=st.booleans(),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_any_split_gives_the_moments_of_the_whole(sizes, backwards, seed):
    assume(sizes == [1] or max(sizes) > 1)  # batches of one example have a test of their own
    x = images(sum(sizes), seed=seed)  # sorted: the worst case for means of batches
    net = some_net(nets.residual, seed=seed)
    whole = oracle(net, [x])
    batches = split(x.flip(0) if backwards else x, sizes)
    by_batch = copy.deepcopy(net)
    done = recalibrate_(by_batch, batches)
    assert_statistics(by_batch, whole, 1e-10, only=["bn1"])
    assert_statistics(by_batch, oracle(net, batches), 1e-10)
    assert (done.n_examples, done.n_batches, done.passes) == (len(x), len(sizes), 1.0)
    recalibrate_(net, batches, feed="sequential")
    assert_statistics(net, whole, 1e-10)


@pytest.mark.parametrize("name", IMAGE_NETS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-6)])
def test_sequential_is_one_training_pass_over_the_whole_set(name, dtype, tolerance):
    net = some_net(IMAGE_NETS[name], dtype).train()
    x = images(9, 8, dtype=dtype)
    done = recalibrate_(net, split(x, (4, 1, 3, 1)), feed="sequential")
    assert_statistics(net, oracle(net, [x]), tolerance)
    assert [r.name for r in done.layers] == [s.name for s in find_norms(net)]
    assert all(m.training for m in net.modules())


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize(("make", "shape"), [(nets.bn1d, (7, 5)), (nets.bn3d, (7, 2, 3, 4, 4))])
def test_other_ranks(make, shape, feed):
    net = some_net(make)
    x = torch.randn(shape, dtype=torch.float64) * 3 + 1
    recalibrate_(net, split(x, (3, 1, 3)), feed=feed)
    assert_statistics(net, oracle(net, [x]), 1e-10)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("size", [1, 4])
def test_train_batch_target(feed, size):
    net = some_net(nets.plain)
    x = images(9)
    batches = split(x, (4, 4, 1))
    done = recalibrate_(net, batches, target="train-batch", train_batch_size=size, feed=feed)
    assert done.target == f"train-batch {size}"
    inputs = [x] if feed == "sequential" else batches
    if feed == "batch":
        assert_statistics(net, oracle(net, inputs, size), 1e-10)
    else:  # what bn2 sees is bn1's output by its new moments, which are not the whole set's
        assert_statistics(net, oracle(net, inputs, size), 1e-10, only=["bn1"])
        assert_statistics(net, oracle(net, inputs, size, training=False), 1e-10)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("size", [2, 3])
def test_train_batch_is_the_expected_variance_over_all_batches(groups, size):
    """All N^B draws with replacement have mean variance var - Vm/B, exactly; all subsets without
    replacement have var - Vm/B (N-B)/(N-1), since means of subsets vary less by that factor. With
    channel groups, values and means are those of a group.
    """
    n = 4
    x = images(n, 3, channels=4)
    layer = GeneralizedBatchNorm(4, channel_groups=groups, dtype=torch.float64)
    net = nn.Sequential(layer)
    recalibrate_(net, [x[:3], x[3:]])
    whole = layer.running_var.clone()
    recalibrate_(net, [x[:3], x[3:]], target="train-batch", train_batch_size=size)

    def mean_variance(draws):
        blocks = [x[list(draw)].transpose(0, 1).reshape(groups, -1) for draw in draws]
        variances = torch.stack([block.var(1, correction=0) for block in blocks])
        return variances.mean(0).repeat_interleave(4 // groups)

    drawn = mean_variance(itertools.product(range(n), repeat=size))
    torch.testing.assert_close(layer.running_var, drawn, rtol=1e-12, atol=1e-12)
    subsets = mean_variance(itertools.combinations(range(n), size))
    finite = whole - (whole - layer.running_var) * (n - size) / (n - 1)
    torch.testing.assert_close(finite, subsets, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("feed", FEEDS)
def test_grouped_layers_store_their_pooled_moments_repeated(feed):
    net = some_net(nets.plain)
    swap_norms_(net, channel_groups=2, example_weight=0.0)
    x = images(8)
    recalibrate_(net, split(x, (3, 5)), feed=feed)
    inputs = norm_inputs(net, [x] if feed == "sequential" else split(x, (3, 5)), training=True)
    for name, layer in (("bn1", net.bn1), ("bn2", net.bn2)):
        groups = inputs[name].transpose(0, 1).reshape(2, -1)
        for stored, pooled in (
            (layer.running_mean, groups.mean(1)),
            (layer.running_var, groups.var(1, correction=0)),
        ):
            expected = pooled.repeat_interleave(2)
            torch.testing.assert_close(stored, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("feed", FEEDS)
def test_a_stock_model_gets_the_same_numbers_as_a_swapped_one(feed):
    stock = some_net(nets.residual, torch.float32)
    swapped = copy.deepcopy(stock)
    swap_norms_(swapped)
    batches = split(images(7, dtype=torch.float32), (4, 3))
    records = [recalibrate_(net, batches, feed=feed).layers for net in (stock, swapped)]
    for name, value in stock.state_dict().items():
        assert torch.equal(value, swapped.state_dict()[name]), name
    for one, other in zip(*records, strict=True):
        assert (one.mean_shift, one.log_var_ratio) == (other.mean_shift, other.log_var_ratio)
        assert (one.kind, other.kind) == ("BatchNorm2d", "GeneralizedBatchNorm")


def test_records_measure_the_way_from_the_old_statistics():
    net = nn.Sequential(nn.BatchNorm2d(3, eps=0.1)).double()
    net[0].running_var.fill_(2)
    x = images(6)
    (record,) = recalibrate_(net, [x]).layers
    mean, var = reference.channel_moments(x.numpy())
    assert (record.name, record.kind, record.channels) == ("0", "BatchNorm2d", 3)
    assert (record.n_values, record.n_calls) == (6 * 36, 1)
    assert record.mean_shift == pytest.approx(np.mean(np.abs(mean) / np.sqrt(var + 0.1)), rel=1e-9)
    ratio = np.mean(np.abs(np.log((var + 0.1) / 2.1)))
    assert record.log_var_ratio == pytest.approx(ratio, rel=1e-9)


# ---- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", [1, 64, 3136])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_precise_moments_at_an_offset(positions, offset):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, positions, generator=generator) + offset
    mean, var = precise_moments(x)
    assert mean.dtype == var.dtype == torch.float64
    wide = x.double()
    assert float((mean - wide.mean(-1)).abs().max()) <= 1e-6
    torch.testing.assert_close(var, wide.var(-1, correction=0), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_moves_statistics_by_its_rounding_alone(feed, precision):
    whole = nets.lived_in(nets.residual()).eval()
    half = copy.deepcopy(whole)
    batches = split(images(24, 16, dtype=torch.float32), (9, 9, 6))
    recalibrate_(whole, batches, feed=feed)
    recalibrate_(half, batches, feed=feed, precision=precision)
    moved = 0.0
    for mine, theirs in zip(find_norms(half), find_norms(whole), strict=True):
        new, old = mine.module, theirs.module
        assert new.running_mean.dtype == torch.float32
        spread = old.running_var + old.eps
        shift = float(((new.running_mean - old.running_mean) / spread.sqrt()).abs().mean())
        ratio = float(((new.running_var + new.eps) / spread).log().abs().mean())
        assert max(shift, ratio) < 0.02
        moved = max(moved, shift)
    assert moved > 1e-6
    assert not torch.is_autocast_enabled("cpu")


def test_an_unknown_precision_is_refused_before_anything_changes():
    net = nets.lived_in(nets.residual()).eval()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ConfigError, match=r"--precision: 'int8' is not known. Use one of: fp32"):
        recalibrate_(net, [torch.randn(4, 3, 8, 8)], precision="int8")
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("feed", FEEDS)
def test_an_offset_of_ten_thousand_deviations(feed):
    """The same float32 inputs in float64 are the truth: their deviations are kept to 1e-4, and the
    buffer holds the mean as well as float32 can, to one unit in its last place.
    """
    x = images(12, 16, dtype=torch.float32) + 1e4
    net = nn.Sequential(nn.BatchNorm2d(3))
    recalibrate_(net, split(x, (5, 5, 2)), feed=feed)
    mean, var = reference.channel_moments(x.numpy())
    own_var = net[0].running_var.double().numpy()
    assert np.abs(np.sqrt(own_var / var) - 1).max() <= 1e-4
    one_unit = np.spacing(mean.astype(np.float32))
    assert np.abs(net[0].running_mean.double().numpy() - mean).max() <= one_unit.max()


@pytest.mark.parametrize("feed", FEEDS)
def test_half_precision_models(feed):
    """bfloat16 keeps 8 bits: the moments of bfloat16 inputs are the oracle's, rounded once."""
    net = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).bfloat16()
    x = images(8).bfloat16()
    recalibrate_(net, split(x, (5, 3)), feed=feed)
    assert net[0].running_mean.dtype == torch.bfloat16
    mean, var = reference.channel_moments(x.double().numpy())
    np.testing.assert_allclose(net[0].running_mean.double(), mean, rtol=2**-8)
    np.testing.assert_allclose(net[0].running_var.double(), var, rtol=2**-8)
    assert bool(net[2].running_var.isfinite().all())


def test_moments_beyond_their_type_are_refused():
    net = nn.Sequential(nn.BatchNorm2d(3)).half()
    x = images(4).half() * 1000
    before = state_of(net)
    with pytest.raises(NumericError, match=r"^0: its moments do not fit float16\. Recalibrate in"):
        recalibrate_(net, [x])
    assert_as_it_was(net, before)


def test_autocast_around_it():
    net = some_net(nets.plain, torch.float32)
    x = images(6, dtype=torch.float32)
    exact = copy.deepcopy(net)
    recalibrate_(exact, [x])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recalibrate_(net, [x])
    assert net.bn1.running_var.dtype == torch.float32
    torch.testing.assert_close(net.bn1.running_var, exact.bn1.running_var, rtol=0.05, atol=0)


# ---- standard errors -------------------------------------------------------------------------


def errors_of(x, sizes):
    net = nn.Sequential(nn.BatchNorm1d(x.shape[1])).double()
    (record,) = recalibrate_(net, split(x, sizes)).layers
    return record.mean_se, record.var_se


@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=6), seed=st.integers(0, 2**20))
@settings(max_examples=20, deadline=None)
def test_errors_are_those_of_the_examples_whatever_the_split(sizes, seed):
    x = images(sum(sizes), seed=seed).flatten(2) + 100
    n, eps = len(x), 1e-5
    values = x.numpy()
    mean, var = reference.channel_moments(values)
    means = values.mean(2)
    q = values.var(2) + (means - mean) ** 2
    spread = var + eps
    mean_se, var_se = errors_of(x, sizes)
    expected = (means.std(0, ddof=1) / np.sqrt(n * spread)).max()
    assert mean_se == pytest.approx(expected, rel=1e-8)
    assert var_se == pytest.approx((q.std(0, ddof=1) / np.sqrt(n) / spread).max(), rel=1e-8)


def test_errors_of_independent_normal_examples():
    """With means m_i ~ N(0, t^2) and L values around each ~ N(0, 1): s^2 = t^2 + 1/L is the
    variance of an example's mean, 2(L-1)/L^2 + 2 s^4 that of q_i. An estimated deviation itself has
    relative deviation sqrt((kurtosis - 1) / 4n), kurtosis 3 for the means and at most 15 (a squared
    normal's) for q: four of those are 4 sqrt(0.5/n) and 4 sqrt(3.5/n).
    """
    n, positions, t = 4000, 5, 0.7
    rng = np.random.default_rng(0)
    x = rng.normal(0, t, (n, 1, 1)) + rng.normal(size=(n, 1, positions))
    s2 = t**2 + 1 / positions
    var = 1 + t**2 + 1e-5
    mean_se, var_se = errors_of(torch.tensor(x), [1000] * 4)
    assert mean_se == pytest.approx(math.sqrt(s2 / n / var), rel=4 * math.sqrt(0.5 / n))
    var_q = 2 * (positions - 1) / positions**2 + 2 * s2**2
    assert var_se == pytest.approx(math.sqrt(var_q / n) / var, rel=4 * math.sqrt(3.5 / n))


def test_one_example_proves_nothing():
    assert errors_of(images(1).flatten(2), [1]) == (math.inf, math.inf)


# ---- an interruption leaves everything as it was ----------------------------------------------


class InTheMiddleError(Exception):
    pass


def from_the_iterable(net, batches, error):
    def broken():
        yield from batches[:2]
        raise error("third batch")

    return net, lambda k: broken()


def from_a_norm_layer(net, batches, error):
    count = itertools.count()

    def fail(*_):
        if next(count) == 2:
            raise error("third batch")

    net.layer1.bn1.register_forward_hook(fail)
    return net, batches


def from_between(net, batches, error):
    count = itertools.count()

    def fail(*_):
        if next(count) == 2:
            raise error("third batch")

    net.layer1.conv2.register_forward_pre_hook(fail)
    return net, batches


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("error", [InTheMiddleError, KeyboardInterrupt])
@pytest.mark.parametrize("where", [from_the_iterable, from_a_norm_layer, from_between])
@pytest.mark.parametrize("swapped", [False, True])
def test_an_interruption_leaves_the_model_as_it_was(feed, error, where, swapped):
    net = some_net(nets.residual).train()
    net.layer1.eval()
    net.layer2.bn1.eval()
    net.bn1.momentum = None
    if swapped:
        swap_norms_(net, channel_groups=2, example_weight=0.1)
    net, batches = where(net, split(images(8), (2, 2, 2, 2)), error)
    before = state_of(net)
    with pytest.raises((error, ModelError), match="third batch"):
        recalibrate_(net, batches, feed=feed)
    assert_as_it_was(net, before)


@pytest.mark.parametrize("feed", FEEDS)
def test_success_changes_statistics_and_nothing_else(feed):
    net = some_net(nets.residual).train()
    net.layer1.eval()
    net.bn1.momentum, net.layer1.bn1.momentum = None, 0.0
    modules, tensors = state_of(net)
    state = torch.random.get_rng_state()
    recalibrate_(net, split(images(6), (3, 3)), feed=feed)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert state_of(net)[0] == modules
    for name, (identity, value) in tensors.items():
        now = net.state_dict(keep_vars=True)[name]
        assert id(now) == identity
        moved = name.endswith(("running_mean", "running_var"))
        assert torch.equal(now, value) != moved, name


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_changes_nothing(bad, feed):
    net = some_net(nets.plain)
    x = images(9)
    x[7, 1, 2, 3] = bad
    before = state_of(net)
    with pytest.raises(NumericError, match=r"^bn1: .* not finite in batch 2, example 1 ") as caught:
        recalibrate_(net, split(x, (4, 2, 3)), feed=feed)
    assert caught.value.name == "bn1"
    assert_as_it_was(net, before)
    with pytest.raises(NumericError, match=r"^bn1: .* not finite in batch 0, example 7 "):
        residuals(net, [x])
    assert_as_it_was(net, before)


@pytest.mark.parametrize("place", [(0, 1), (5, 2), (8, 0)])
@pytest.mark.parametrize("waiting", [300, 1 << 20])
def test_a_device_that_is_not_waited_for_names_the_same(place, waiting, monkeypatch):
    # As on CUDA, where some batches are looked at together, and all of them at the end.
    monkeypatch.setitem(collector.UNCHECKED, "cpu", waiting)
    net, batches = some_net(nets.plain), list(images(27).split(3))
    batches[place[0]][place[1], 1, 2, 3] = math.nan
    before = state_of(net)
    where = rf"^bn1: .* not finite in batch {place[0]}, example {place[1]} "
    with pytest.raises(NumericError, match=where):
        recalibrate_(net, batches)
    assert_as_it_was(net, before)


def test_the_first_layer_that_meets_it_is_named():
    net = some_net(nets.plain)
    with torch.no_grad():
        net.conv2.weight[2] = math.inf
    with pytest.raises(NumericError, match=r"^bn2: .* batch 0, example 0 "):
        recalibrate_(net, [images(3)])


@pytest.mark.parametrize("feed", FEEDS)
def test_statistics_that_are_not_finite_are_mended(feed):
    net = some_net(nets.plain)
    healthy = copy.deepcopy(net)
    net.bn1.running_var.fill_(math.nan)
    net.bn2.running_mean.fill_(-math.inf)
    for model in (net, healthy):
        recalibrate_(model, split(images(6), (4, 2)), feed=feed)
    for name, value in healthy.state_dict().items():
        assert torch.equal(net.state_dict()[name], value), name


# ---- what is left alone, reached never, or more than once ------------------------------------


class Odd(nn.Module):
    """Layers that are frozen, never reached, without statistics, or mean something else."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.frozen = FrozenBatchNorm2d(3)
        self.plain = nn.BatchNorm2d(3, track_running_stats=False)
        self.unused = nn.BatchNorm2d(3)
        self.drop = nn.Dropout(0.5)
        self.stranger = nn.Module()
        self.stranger.register_buffer("running_mean", torch.ones(1, 3, 1, 1))
        self.stranger.register_buffer("running_var", torch.ones(1, 3, 1, 1))
        self.last = nn.BatchNorm2d(3)

    def forward(self, x):
        return self.last(self.drop(self.plain(self.frozen(self.bn(x)))))


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("swapped", [False, True])
def test_layers_that_are_passed_over_are_listed(feed, swapped):
    net = Odd().double().train()
    net.last.running_mean.fill_(0.5)
    if swapped:
        swap_norms_(net, skip=["stranger"])
    before = {name: t.clone() for name, t in net.state_dict().items()}
    done = recalibrate_(net, [images(4), images(3, seed=1)], feed=feed)
    assert [record.name for record in done.layers] == ["bn", "last"]
    assert done.exceptions.never_reached == ("unused",)
    assert done.exceptions.left_alone == ("frozen", "plain", "stranger")
    assert done.exceptions.called_again == ()
    for name, value in net.state_dict().items():
        changed = name.split(".")[0] in ("bn", "last") and name.endswith(("mean", "var", "tracked"))
        assert torch.equal(value, before[name]) != changed, name
    assert describe_missing(done) == [
        "unused: never reached by the data; their statistics are unchanged.",
        "frozen, plain, stranger: frozen, excluded, without statistics or not known; left alone.",
    ]
    assert set(residuals(net, [images(4)])) == {"bn", "frozen", "last"}


def test_patterns_choose_layers():
    net = some_net(nets.residual)
    before = copy.deepcopy(net.state_dict())
    done = recalibrate_(net, [images(4)], layers=["layer*"], skip=["*.bn2"])
    assert [r.name for r in done.layers] == ["layer1.bn1", "layer2.bn1"]
    assert done.exceptions.left_alone == ("bn1", "layer1.bn2", "layer2.bn2")
    for name, value in net.state_dict().items():
        changed = name.startswith(("layer1.bn1.running", "layer2.bn1.running"))
        assert torch.equal(value, before[name]) != changed, name


def test_dropout_is_off():
    net = some_net(nets.with_dropout).train()
    x = images(5)
    recalibrate_(net, [x[:2], x[2:]])
    assert_statistics(net, oracle(net, [x]), 1e-10)


@pytest.mark.parametrize("feed", FEEDS)
def test_batches_tracked_are_counted_only_from_zero(feed):
    net = some_net(nets.plain)
    net.bn2.num_batches_tracked.zero_()
    recalibrate_(net, split(images(6), (2, 2, 2)), feed=feed)
    assert net.bn1.num_batches_tracked.item() == 7
    assert net.bn2.num_batches_tracked.item() == 3
    net.bn1.num_batches_tracked = None
    recalibrate_(net, [images(2)], feed=feed)
    assert net.bn1.num_batches_tracked is None


def test_calls_of_one_layer_are_pooled_and_listed():
    net = some_net(nets.shared_norm)
    batches = split(images(7), (4, 3))
    expected = oracle(net, batches)
    done = recalibrate_(net, batches)
    assert_statistics(net, expected, 1e-10)
    assert done.exceptions.called_again == ("first.bn",)
    assert [(r.name, r.n_calls, r.n_values) for r in done.layers] == [("first.bn", 2, 2 * 7 * 36)]
    assert describe_missing(done) == [
        "first.bn: called more than once per forward pass; their calls are pooled."
    ]


def test_a_layer_called_again_settles_whatever_the_batches_and_the_start():
    found = []
    for sizes, start in (((4, 3), 1.0), ((1, 6), 100.0), ((7,), math.nan)):
        net = some_net(nets.shared_norm)
        net.first.bn.running_var.fill_(start)
        batches = split(images(7), sizes)
        done = recalibrate_(net, batches, feed="sequential")
        assert max(residuals(net, batches)["first.bn"]) < 1e-6
        assert 1 < done.passes <= 13
        found.append(net.first.bn.running_var)
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(found[0], found[2], rtol=1e-6, atol=0)


class Routed(nn.Module):
    """Some batches come by `extra`, or in another order; the first one does not."""

    def __init__(self, crossing=False):
        super().__init__()
        self.first, self.extra, self.last = (nn.BatchNorm2d(3) for _ in range(3))
        self.crossing = crossing

    def forward(self, x):
        other = x[0, 0, 0, 0] > 0
        x = self.first(x)
        if other and self.crossing:
            return self.extra(torch.relu(self.last(x)))
        if other or self.crossing:
            x = torch.relu(self.extra(x))
        return self.last(x)


def routed_batches():
    x = images(6)
    x[:3, 0, 0, 0], x[3:, 0, 0, 0] = -1, 1
    return split(x, (3, 3))


def test_sequential_follows_every_route():
    net = nets.lived_in(Routed()).double()
    batches = routed_batches()
    done = recalibrate_(net, batches, feed="sequential")
    assert [r.name for r in done.layers] == ["first", "extra", "last"]
    assert done.exceptions.never_reached == ()
    for name, residual in residuals(net, batches).items():
        assert max(residual) < 1e-10, name


def test_routes_without_an_order_still_end():
    net = nets.lived_in(Routed(crossing=True)).double()
    done = recalibrate_(net, routed_batches(), feed="sequential")
    assert done.how == "passes"
    assert {r.name for r in done.layers} == {"first", "extra", "last"}
    assert max(residuals(net, routed_batches())["first"]) < 1e-10


def test_passes_are_counted():
    net = some_net(nets.residual)
    calls = []

    def batches(k):
        calls.append(k)
        return split(images(4), (2, 2))

    # one for all, then one up to each further layer: (2 + 3 + 4 + 5) / 5
    assert recalibrate_(net, batches, feed="sequential", memory_bytes=0).passes == pytest.approx(
        1 + 14 / 5
    )
    assert calls == [0] * 5


# ---- walking together ------------------------------------------------------------------------


def test_a_walk_is_one_pass_and_equals_the_passes(way):
    found = []
    for memory in (None, 0):
        net = some_net(nets.resnet20, torch.float32)
        for site in find_norms(net):
            site.module.reset_running_stats()
        batches = split(images(14, 8, dtype=torch.float32), (5, 1, 6, 2))
        done = recalibrate_(net, batches, feed="sequential", memory_bytes=memory)
        found.append((done, net.state_dict()))
    (one, state), (other, expected) = found
    if way == "walk":
        assert (one.how, one.passes) == ("walk", 1.0)
    assert (other.how, other.passes) == ("passes", pytest.approx(1 + 189 / 19))
    assert [r.name for r in one.layers] == [r.name for r in other.layers]
    assert (one.n_examples, one.n_batches) == (other.n_examples, other.n_batches) == (14, 4)
    for name, value in state.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-6)


def test_a_walk_goes_through_the_batches_and_the_model_once():
    net = some_net(nets.residual)
    calls, given = [], []
    net.conv1.register_forward_hook(lambda *_: calls.append("conv1"))
    net.fc.register_forward_hook(lambda *_: calls.append("fc"))

    def batches(k):
        given.append(k)
        return split(images(6), (2, 2, 2))

    before = threading.active_count()
    recalibrate_(net, batches, feed="sequential", memory_bytes=1 << 30)
    # Together, then the first two by themselves.
    assert calls == ["conv1"] * 3 + ["fc"] * 3 + ["conv1", "fc"] * 2
    assert given == [0]
    assert threading.active_count() == before


def test_what_does_not_fit_the_memory_takes_passes():
    """Four channels of 6x6 in float64 are 1152 bytes an example: less memory than that for all of
    the norm layers' inputs cannot do, several times as much can.
    """
    x = images(64)
    hows = []
    for memory in (64 * 1152, 8 * 64 * 1152):
        net = some_net(nets.residual)
        done = recalibrate_(net, list(x.split(4)), feed="sequential", memory_bytes=memory)
        assert_statistics(net, oracle(net, [x]), 1e-10)
        hows.append(done.how)
    assert hows == ["passes", "walk"]


def test_what_is_held_across_the_model_counts():
    """Skip connections over many layers are held too, not only a norm layer's input."""

    class Skips(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(12))

        def forward(self, x):
            kept = []
            for norm in self.norms:
                kept.append(x)
                x = norm(x) * 2
            return x + sum(kept)

    x = images(16)
    for memory, how in ((4 * 16 * 3 * 36 * 8, "passes"), (20 * 16 * 3 * 36 * 8, "walk")):
        net = Skips().double()
        done = recalibrate_(net, list(x.split(2)), feed="sequential", memory_bytes=memory)
        assert done.how == how
        # given up on the way: what was walked until then counts
        assert done.passes > (1 + 77 / 12 if how == "passes" else 0)


def test_more_batches_than_may_walk_take_passes():
    net = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3)).double()
    x = images(300, 2)
    done = recalibrate_(net, list(x.split(1)), feed="sequential", memory_bytes=1 << 30)
    assert (done.how, done.n_examples) == ("passes", 300)
    assert_statistics(net, oracle(net, [x]), 1e-10)


def test_batches_that_never_reach_a_layer_do_not_hold_up_the_others():
    class Exits(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)

        def forward(self, x):
            early = x[0, 0, 0, 0] > 0
            x = torch.relu(self.first(x))
            return x if early else self.second(x)

    net = Exits().double()
    done = recalibrate_(net, routed_batches(), feed="sequential", memory_bytes=1 << 30)
    assert (done.how, done.passes) == ("walk", 1.0)
    assert [r.n_values for r in done.layers] == [6 * 36, 3 * 36]
    assert max(max(pair) for pair in residuals(net, routed_batches()).values()) < 1e-10


def test_ctrl_c_in_the_middle_of_a_walk():
    net = some_net(nets.residual).train()
    count = itertools.count()

    def interrupt(*_):
        if next(count) == 2:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.05)  # the batch goes on while the main thread wakes

    net.layer1.conv2.register_forward_hook(interrupt)
    before, threads = state_of(net), threading.active_count()
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        recalibrate_(net, split(images(8), (2, 2, 2, 2)), feed="sequential")
    assert_as_it_was(net, before)
    assert threading.active_count() == threads


def test_a_walk_keeps_autocast_and_takes_no_gradients():
    seen = []
    net = some_net(nets.plain, torch.float32)
    net.conv2.register_forward_hook(
        lambda m, a, out: seen.append((out.dtype, out.requires_grad, torch.is_grad_enabled()))
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recalibrate_(net, split(images(4, dtype=torch.float32), (2, 2)), feed="sequential")
    assert set(seen) == {(torch.bfloat16, False, False)}


def test_a_default_device_of_this_thread_is_respected():
    net = some_net(nets.plain, torch.float32)
    made = []
    net.conv2.register_forward_pre_hook(lambda *_: made.append(torch.empty(0).device.type))
    with torch.device("meta"):
        batches = [torch.randn(2, 3, 6, 6, device="cpu") for _ in range(2)]
        done = recalibrate_(net, batches, feed="sequential")
    assert done.how == "passes"
    assert set(made) == {"meta"}


# ---- as many examples as it takes ------------------------------------------------------------


@pytest.mark.parametrize("feed", FEEDS)
def test_auto_stops_where_every_layer_is_known_well_enough(feed):
    x = images(4000, 2)
    x = x[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    net = some_net(nets.plain)
    done = recalibrate_(net, list(x.split(20)), feed=feed, samples="auto", tolerance=0.1)
    assert done.trust.is_enough
    assert 40 < done.n_examples < 2000
    assert done.trust.slowest in ("bn1", "bn2")
    assert describe_missing(done)[0] == (
        f"population statistics: {done.n_examples} examples were enough; the last layer to be "
        f"precise enough was {done.trust.slowest}."
    )
    same = some_net(nets.plain)
    recalibrate_(same, list(x[: done.n_examples].split(20)), feed=feed)
    torch.testing.assert_close(same.bn2.running_var, net.bn2.running_var, rtol=1e-12, atol=0)
    # half the error takes about four times as many
    strict = recalibrate_(net, list(x.split(20)), samples="auto", tolerance=0.05)
    assert 2.5 < strict.n_examples / done.n_examples < 6


def test_auto_with_too_few_examples_says_so():
    net = some_net(nets.plain)
    done = recalibrate_(net, [images(9)], samples="auto", tolerance=1e-3)
    assert (done.n_examples, done.trust.is_enough) == (9, False)
    assert done.trust.slowest
    assert "9 examples are all there are, which is not enough" in describe_missing(done)[0]


def test_dead_channels_are_known_at_once():
    """A channel without spread has no error by sqrt(eps); those that are alive still count."""
    net = nn.Sequential(nn.BatchNorm2d(3)).double()
    x = images(400, 3)
    x[:, 0] = 0
    done = recalibrate_(net, list(x.split(10)), samples="auto", tolerance=0.2)
    assert done.trust.is_enough
    assert 10 <= done.n_examples < 400


def test_auto_does_not_take_a_stream():
    with pytest.raises(ConfigError, match=r"samples auto: the batches are a stream, .* a number"):
        recalibrate_(some_net(nets.plain), iter([images(4)]), samples="auto")


# ---- residuals -------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("groups", [None, 4])
def test_residuals_vanish_after_sequential_and_not_after_small_batches(weight, groups):
    net = some_net(nets.resnet20)
    swap_norms_(net, example_weight=weight, channel_groups=groups)
    batches = split(images(12, 8), (2,) * 6)
    recalibrate_(net, batches, feed="sequential")
    assert max(max(pair) for pair in residuals(net, batches).values()) < 1e-6
    recalibrate_(net, batches)
    found = residuals(net, batches)
    assert max(found["bn1"]) < 1e-10
    if weight < 1:
        assert found["layer3.2.bn2"][0] > 5e-3
    else:  # then no output depends on the population's moments
        assert max(found["layer3.2.bn2"]) < 1e-6


def test_residuals_are_what_they_say_and_change_nothing():
    net = nn.Sequential(nn.BatchNorm2d(3, eps=0.1)).double().train()
    net[0].running_var.fill_(2)
    x = images(6)
    before = state_of(net)
    log_var_ratio, mean_shift = residuals(net, [x[:1], x[1:]])["0"]
    assert_as_it_was(net, before)
    mean, var = reference.channel_moments(x.numpy())
    assert mean_shift == pytest.approx(np.mean(np.abs(mean) / np.sqrt(var + 0.1)), rel=1e-9)
    assert log_var_ratio == pytest.approx(np.mean(np.abs(np.log(2.1 / (var + 0.1)))), rel=1e-9)


# ---- forms of batches, of models, and amounts ------------------------------------------------


def test_forms_of_batches():
    net = some_net(nets.plain)
    x, y = images(4), torch.arange(4)
    found = []
    for batch in (x, (x,), (x, y), [x, y, "names"], {"image": x, "label": y}):
        model = copy.deepcopy(net)
        assert recalibrate_(model, [batch]).n_examples == 4
        found.append(model.bn1.running_mean)
    assert all(torch.equal(found[0], other) for other in found)


@pytest.mark.parametrize("feed", FEEDS)
def test_masked_positions_do_not_count(feed):
    net = some_net(nets.bn1d)
    tokens = torch.randn(6, 4, 5, dtype=torch.float64)
    mask = torch.rand(6, 4) < 0.6
    mask[:, 0] = True
    tokens[~mask] = 1e6
    batches = [{"tokens": tokens[i : i + 2], "mask": mask[i : i + 2]} for i in (0, 2, 4)]
    done = recalibrate_(net, batches, feed=feed, forward=lambda m, b: m(b["tokens"][b["mask"]]))
    assert done.n_examples == 6
    assert done.layers[0].n_values == int(mask.sum())
    assert_statistics(net, oracle(net, [tokens[mask]]), 1e-10)


def test_examples_of_unusual_batches_are_counted_by_their_first_tensor():
    net = some_net(nets.plain)
    x = images(5)

    def forward(m, b):
        return m(x)

    for batch, n in (
        ({"views": [x, x], "id": 3}, 5),
        (([x, x], None), 5),
        ({"name": "a"}, 1),
        ((x.numpy(), 0), 5),
        ({"views": []}, 1),
    ):
        assert recalibrate_(net, [batch], forward=forward).n_examples == n


@pytest.mark.parametrize("feed", FEEDS)
def test_generators_and_empty_batches(feed):
    net = some_net(nets.plain)
    x = images(6)
    parts = [x[:0], x[:2], x[2:2], x[2:]]
    done = recalibrate_(net, (part for part in parts), feed=feed)
    assert (done.n_examples, done.n_batches) == (6, 2)
    assert [r.n_calls for r in done.layers] == [1, 1]
    only = ["bn1"] if feed == "batch" else None
    assert_statistics(net, oracle(net, [x]), 1e-10, only)


@pytest.mark.parametrize("feed", FEEDS)
def test_endless_generators_end_with_enough_samples(feed):
    net = some_net(nets.plain)
    x = images(20)
    taken = []

    def endless():
        for i in itertools.count():
            taken.append(i)
            yield x[2 * (i % 10) : 2 * (i % 10) + 2]

    done = recalibrate_(net, endless(), feed=feed, samples=5)
    assert (done.n_examples, done.n_batches) == (6, 3)
    assert taken == [0, 1, 2]
    assert_statistics(net, oracle(net, [x[:6]]), 1e-10, ["bn1"])


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("batches", [[], iter([]), [torch.zeros(0, 3, 6, 6).double()]])
def test_no_examples_are_refused(feed, batches):
    net = some_net(nets.plain)
    before = state_of(net)
    with pytest.raises(DataError, match="calibration: no examples"):
        recalibrate_(net, batches, feed=feed)
    with pytest.raises(DataError, match="residuals: no examples"):
        residuals(net, batches)
    assert_as_it_was(net, before)


def test_batches_that_can_be_had_only_once_are_refused_where_they_are_needed_again():
    class Once:
        def __init__(self):
            self.left = iter([images(4)])

        def __iter__(self):
            return self.left

    net = some_net(nets.plain)
    recalibrate_(net, Once())
    before = state_of(net)
    with pytest.raises(DataError, match="bn2: a further pass over the batches did not reach it"):
        recalibrate_(net, Once(), feed="sequential", memory_bytes=0)
    assert_as_it_was(net, before)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        (
            {"target": "train"},
            "target 'train', feed 'sequential': expected population, train-batch, reference or",
        ),
        ({"feed": "all"}, "target 'population', feed 'all': expected"),
        ({"target": "train-batch"}, "train-batch: give train_batch_size, at least 1"),
        ({"target": "train-batch", "train_batch_size": 0}, "give train_batch_size, at least 1"),
        ({"samples": 0}, "samples: 0, expected at least 1"),
        ({"samples": "all"}, "samples: all, expected at least 1, or auto"),
        ({"tolerance": 0.0}, r"tolerance: 0\.0, expected above 0"),
    ],
)
def test_options_out_of_range_are_refused(options, found):
    with pytest.raises(ConfigError, match=found):
        recalibrate_(some_net(nets.plain), [images(2)], **options)


def test_nothing_to_recalibrate_is_refused():
    x = [images(2)]
    with pytest.raises(NormError, match="model: no norm layer with statistics"):
        recalibrate_(nn.Conv2d(3, 3, 3).double(), x)
    with pytest.raises(NormError, match="model: no norm layer with statistics"):
        recalibrate_(nn.Sequential(FrozenBatchNorm2d(3)).double(), x)
    with pytest.raises(ConfigError, match=r"--layers: nowhere matches .* --skip: no matches no"):
        recalibrate_(some_net(nets.plain), x, layers=["nowhere"], skip=["no"])
    with pytest.raises(NormError, match=r"^bn1, bn2: never reached by the data"):
        recalibrate_(some_net(nets.plain), x, forward=lambda m, b: None)


def test_a_layer_with_channels_elsewhere_is_refused_by_name():
    class Last(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x.movedim(-1, 1)).movedim(1, -1)

    net = nn.Sequential(Last(4)).double()
    x = torch.randn(2, 6, 6, 4, dtype=torch.float64)
    before = state_of(net)
    with pytest.raises(NormError, match=r"0: tests\.test_calibration\..*Last has its own forward"):
        recalibrate_(net, [x])
    assert_as_it_was(net, before)


# ---- unusual models --------------------------------------------------------------------------


@pytest.mark.parametrize("feed", FEEDS)
def test_a_norm_layer_by_itself_and_arguments_by_name(feed):
    class ByName(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(input=x)

    x = images(5)
    for net, name in ((nn.BatchNorm2d(3).double(), ""), (ByName().double(), "bn")):
        done = recalibrate_(net, [x[:2], x[2:]], feed=feed)
        assert [r.name for r in done.layers] == [name]
        mean = (net.bn if name else net).running_mean
        torch.testing.assert_close(mean, x.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)


def test_a_model_that_catches_exceptions_does_not_catch_the_shortcut():
    class Brave(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = some_net(nets.plain)

        def forward(self, x):
            try:
                return self.net(x)
            except Exception:
                pytest.fail("saw an exception that is none of its own")

    net = Brave()
    x = images(5)
    recalibrate_(net, [x[:2], x[2:]], feed="sequential")
    assert_statistics(net.net, oracle(net.net, [x]), 1e-10)


@pytest.mark.parametrize("feed", FEEDS)
@pytest.mark.parametrize("options", [{}, {"drop_layer": nn.Dropout}])
def test_timm_layers(feed, options):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNormAct2d(4, **options), nn.Conv2d(4, 4, 3),
                        BatchNormAct2d(4)).double().train()  # fmt: skip
    x = images(6)
    batches = split(x, (4, 2))

    def inputs(of):
        quiet = copy.deepcopy(net)
        quiet[1].drop = nn.Identity()
        return oracle(quiet, of)

    expected = inputs([x] if feed == "sequential" else batches)
    recalibrate_(net, batches, feed=feed)
    assert_statistics(net, expected, 1e-10)


@pytest.mark.parametrize("feed", FEEDS)
def test_compiled_models(feed):
    torch._dynamo.reset()
    net = some_net(nets.plain, torch.float32)
    twin = copy.deepcopy(net)
    compiled = torch.compile(net.eval(), backend="eager")
    x = images(6, dtype=torch.float32)
    compiled(x)
    done = recalibrate_(compiled, [x[:2], x[2:]], feed=feed)
    assert [r.name for r in done.layers] == ["_orig_mod.bn1", "_orig_mod.bn2"]
    recalibrate_(twin, [x[:2], x[2:]], feed=feed)
    for one, other in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(compiled(x), twin.eval()(x))


def test_hooks_of_the_user_run_and_are_kept():
    net = some_net(nets.plain)
    seen = []
    handle = net.bn1.register_forward_pre_hook(lambda m, a: (seen.append(1), (a[0] * 2,))[1])
    x = images(4)
    recalibrate_(net, [x])
    doubled = net.conv1(x).detach() * 2
    torch.testing.assert_close(net.bn1.running_mean, doubled.mean((0, 2, 3)))
    assert seen == [1]
    assert list(net.bn1._forward_pre_hooks) == [handle.id]


# ---- networks that write to themselves ---------------------------------------------------------


class KeepsSkip(nn.Module):
    """A small U-Net that keeps its skip connection on itself, in an attribute or in a hook."""

    def __init__(self, hooked=False):
        super().__init__()
        self.down, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.middle, self.bn2 = nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.up, self.bn3 = nn.Conv2d(8, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.hooked, stored = hooked, []
        self.bn1.register_forward_hook(lambda *call: stored.append(call[2]))
        self.skip = None if not hooked else (lambda: stored[-1])

    def forward(self, x):
        x = self.bn1(self.down(x))
        if not self.hooked:
            self.skip = x
        x = self.bn2(self.middle(x.relu()))
        skip = self.skip() if self.hooked else self.skip
        return self.bn3(self.up(torch.cat([x.relu(), skip], 1)))


class CarriesOver(nn.Module):
    """Each batch meets what the batch before it has left: a running mean of the inputs."""

    def __init__(self):
        super().__init__()
        self.register_buffer("input_mean", torch.full((3,), 0.5, dtype=torch.float64))
        self.conv, self.bn1, self.bn2 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        x = x - self.input_mean[:, None, None]
        x = self.bn1(self.conv(x))
        self.input_mean = 0.5 * self.input_mean + 0.1 * x.mean((0, 2, 3))[:3]
        return self.bn2(x.relu())


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (4, 4, 4, 3)])
@pytest.mark.parametrize("make", [KeepsSkip, lambda: KeepsSkip(hooked=True), CarriesOver])
def test_what_a_network_keeps_on_itself_is_not_another_batchs(make, sizes, way):
    torch.manual_seed(0)
    net = nets.lived_in(make()).double()
    batches = split(images(sum(sizes)), sizes)
    before = copy.deepcopy(net.__dict__.get("skip")), copy.deepcopy(dict(net.named_buffers()))
    done = recalibrate_(net, batches, feed="sequential")
    assert done.how == "passes"
    assert done.trust.disturbed == (way == "walk")
    assert (
        any("stores activations" in note for note in describe_missing(done)) == done.trust.disturbed
    )
    if not isinstance(net, CarriesOver):
        assert max(max(pair) for pair in residuals(net, batches).values()) < 1e-9
        assert_statistics(net, oracle(net, [torch.cat(batches)]), 1e-9)
        assert net.skip is before[0] or net.hooked
        assert done.trust.changed_by_forward == (() if net.hooked else ("skip",))
    else:
        assert torch.equal(net.input_mean, before[1]["input_mean"])
        assert done.trust.changed_by_forward == ("input_mean",)


def test_a_network_that_writes_to_itself_and_is_right_still_walks(way):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.n = some_net(nets.plain), 0

        def forward(self, x):
            self.n += 1
            return self.inner(x)

    net = Counts()
    done = recalibrate_(net, split(images(8), (4, 4)), feed="sequential")
    assert done.how == ("walk" if way == "walk" else "passes")
    assert (done.trust.disturbed, done.trust.changed_by_forward, net.n) == (False, ("n",), 0)


def test_a_batch_that_fails_by_itself_says_so(way):
    batches = [*split(images(8), (4, 4)), torch.zeros(2, 5, 6, 6, dtype=torch.float64)]
    with pytest.raises(ModelError, match="cannot be run on an input of shape 2x5x6x6"):
        recalibrate_(some_net(nets.plain), batches, feed="sequential")


# ---- one layer, many calls ---------------------------------------------------------------------


class OneNorm(nn.Module):
    """One norm for all time steps; further norms in the loop, before and after it."""

    def __init__(self, steps, gain=1.0, between=False):
        super().__init__()
        self.steps, self.gain = steps, gain
        self.first, self.bn0 = nn.Linear(3, 6), nn.BatchNorm1d(6)
        self.step, self.bn = nn.Linear(6, 6, bias=False), nn.BatchNorm1d(6, affine=False)
        self.between = nn.BatchNorm1d(6, affine=False) if between else None
        self.last, self.bn9 = nn.Linear(6, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        x = self.bn0(self.first(x.mean((2, 3))))
        for _ in range(self.steps):
            x = self.bn(self.gain * self.step(x) + 0.1 * x.square())
            if self.between is not None:
                x = self.between(x.relu())
        return self.bn9(self.last(x))


@pytest.mark.parametrize(("steps", "gain", "between"), [(2, 1, False), (6, 3, False), (3, 1, True)])
def test_a_layer_of_many_calls_settles(steps, gain, between):
    torch.manual_seed(3)
    net = nets.lived_in(OneNorm(steps, gain, between)).double()
    batches = split(images(64), (16,) * 4)
    done = recalibrate_(net, batches, feed="sequential")
    left = max(max(pair) for pair in residuals(net, batches).values())
    assert left < 1e-5, (left, done.passes)
    assert done.trust.residual < 1e-5


def test_a_layer_that_does_not_settle_is_no_worse_than_the_batch_feed(monkeypatch):
    torch.manual_seed(3)
    net = nets.lived_in(OneNorm(6, 3.0)).double()
    batches = split(images(64), (16,) * 4)
    other = copy.deepcopy(net)
    recalibrate_(other, batches)
    monkeypatch.setattr(collector, "_ROUNDS", 1)
    done = recalibrate_(net, batches, feed="sequential")
    worst = [max(residuals(n, batches)["bn"]) for n in (net, other)]
    assert worst[0] <= worst[1]
    assert done.trust.residual == pytest.approx(worst[0], rel=1e-6)
    assert any("did not settle" in note for note in describe_missing(done))


# ---- batches that cannot give statistics -------------------------------------------------------


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.reduce, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.bn1(self.conv(x)).relu()
        return self.bn2(self.reduce(x.mean((2, 3), keepdim=True)))


def test_one_value_a_channel_is_refused_under_the_batch_feed():
    net = some_net(Pooled)
    batches, before = split(images(9), (4, 4, 1)), state_of(net)
    with pytest.raises(
        NormError, match=r"^bn2: gets one value per channel in batch 2 .*sequential"
    ):
        recalibrate_(net, batches)
    assert_as_it_was(net, before)
    recalibrate_(net, batches, feed="sequential")
    assert_statistics(net, oracle(net, [torch.cat(batches)]), 1e-10)


def test_batches_of_one_example_are_refused_under_the_batch_feed():
    ones = split(images(6), (1,) * 6)
    with pytest.raises(DataError, match=r"6, each with one example\. .* \(--feed sequential\)"):
        recalibrate_(some_net(nets.plain), ones)
    net = some_net(nets.plain)
    recalibrate_(net, ones, feed="sequential")
    assert_statistics(net, oracle(net, [torch.cat(ones)]), 1e-10)
    # In training with such batches the network did see that.
    recalibrate_(net, ones, target="train-batch", train_batch_size=1)
    # A single norm layer has none above it that could meet other maps than in inference.
    single = some_net(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    assert recalibrate_(single, ones).n_batches == 6


@pytest.mark.parametrize("feed", FEEDS)
def test_a_source_without_an_end_asks_for_samples(feed, monkeypatch):
    monkeypatch.setattr(collector, "MOST_UNCOUNTED", 40)
    monkeypatch.setattr(passes, "MOST_UNCOUNTED", 40)

    class Endless(IterableDataset):
        def __iter__(self):
            return itertools.cycle(images(4))

    loader = DataLoader(Endless(), batch_size=4)
    for endless in (loader, iter(loader), itertools.repeat(images(4))):
        with pytest.raises(DataError, match=r"^batches: 40 examples .* no end yet\. Give samples="):
            recalibrate_(some_net(nets.plain), endless, feed=feed)
    assert recalibrate_(some_net(nets.plain), loader, feed=feed, samples=60).n_examples == 60
    assert recalibrate_(some_net(nets.plain), [images(50)] * 2, feed=feed).n_examples == 100
    assert recalibrate_(some_net(nets.plain), iter([images(50)]), feed=feed).n_examples == 50


def test_a_stream_that_does_not_fit_the_memory_is_not_kept(monkeypatch):
    monkeypatch.setattr(passes, "default_memory", lambda device: 5000)
    with pytest.raises(DataError, match=r"a stream of more than 0 MiB.* samples="):
        recalibrate_(some_net(nets.plain), iter([images(4)] * 5), feed="sequential")


# ---- frozen layers -----------------------------------------------------------------------------


def frozen(net, names):
    for name in names:
        net.get_submodule(name).eval().requires_grad_(False)
    return net


@pytest.mark.parametrize("feed", FEEDS)
def test_frozen_layers_are_left_alone_and_listed(feed):
    net = frozen(some_net(nets.residual).train(), ["bn1", "layer1.bn2"])
    net.layer1.bn1.eval()  # its mode alone, or its gradients alone, may mean something else
    net.layer2.bn1.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    done = recalibrate_(net, split(images(8), (4, 4)), feed=feed)
    assert done.exceptions.frozen == ("bn1", "layer1.bn2")
    assert set(done.exceptions.frozen) <= set(done.exceptions.left_alone)
    (note,) = [note for note in describe_missing(done) if "frozen" in note]
    assert note.startswith("bn1, layer1.bn2: frozen (evaluation mode, no gradients); left alone.")
    assert "--include-frozen" in note
    for name, value in net.state_dict().items():
        if name.endswith("running_mean"):
            left = name.removesuffix(".running_mean") in done.exceptions.frozen
            assert torch.equal(value, before[name]) == left
    done = recalibrate_(net, split(images(8), (4, 4)), feed=feed, include_frozen=True)
    assert done.exceptions.frozen == done.exceptions.left_alone == ()
    assert not torch.equal(net.bn1.running_mean, before["bn1.running_mean"])


def test_a_model_for_inference_is_not_frozen():
    net = some_net(nets.plain).eval().requires_grad_(False)
    assert recalibrate_(net, [images(8)]).exceptions.frozen == ()


def test_nothing_but_frozen_layers_is_refused():
    net = frozen(some_net(nets.plain).train(), ["bn1", "bn2"])
    with pytest.raises(
        NormError, match=r"no norm layer .* \(bn1, bn2: frozen; include them by --include-frozen"
    ):
        recalibrate_(net, [images(8)])
