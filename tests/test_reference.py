"""Statistics matched to an original, against a slow version by hand and by what they must leave."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from bnfix.checkpoints.several import mean_of
from bnfix.core.errors import ConfigError, NumericError
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate.recalibrate import describe_missing, recalibrate_
from tests import nets
from tests.real import DATA, needs_data
from tests.reference import channel_moments

EPS = 1e-5


def some(make, seed=0):
    torch.manual_seed(seed)
    return nets.lived_in(make()).eval()


def pruned(original, part=0.5):
    """The smallest weights of every convolution set to 0."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                size = layer.weight.abs()
                layer.weight[size < size.flatten().quantile(part)] = 0
    return model


def drawn(n=24, seed=1, size=8):
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def matched_(model, original, batches, **options):
    return recalibrate_(model, batches, target="reference", reference=original, **options)


def statistics(model):
    return {
        site.name: (site.module.running_mean.double(), site.module.running_var.double())
        for site in find_norms(model)
    }


def farthest(one, other):
    """The largest difference of means by deviations, and of variances, relative."""
    found = 0.0
    for (mean, var), (other_mean, other_var) in zip(one.values(), other.values(), strict=True):
        spread = other_var + EPS
        shift = ((mean - other_mean).abs() / spread.sqrt()).max()
        found = max(found, float(shift), float(((var - other_var).abs() / spread).max()))
    return found


KINDS = {"batch": {}, "groups": {"channel_groups": 2}, "example": {"example_weight": 0.3}}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("memory_bytes", [None, 0])
@pytest.mark.parametrize("kind_of_images", ["normal", "noise", "dark", "one"])
def test_an_original_that_is_its_own_reference_stays(kind, memory_bytes, kind_of_images):
    original = some(nets.residual)
    if KINDS[kind]:
        swap_norms_(original, **KINDS[kind])
    x = {
        "normal": drawn(), "noise": 40 * drawn() + 100, "dark": torch.zeros(24, 3, 8, 8),
        "one": drawn(1),
    }[kind_of_images]  # fmt: skip
    before = statistics(copy.deepcopy(original))
    matched_(original, original, x.split(7), memory_bytes=memory_bytes)
    assert farthest(statistics(original), before) < 1e-6


def by_hand(model, original, x):
    """The statistics of a `Plain` network, layer by layer, in float64."""
    model, original = copy.deepcopy(model).double(), copy.deepcopy(original).double()
    y_m = y_o = x.double()
    found = {}
    with torch.no_grad():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            z_m, z_o = getattr(model, conv)(y_m), getattr(original, conv)(y_o)
            norm, own = getattr(model, bn), getattr(original, bn)
            (mu_m, v_m), (mu_o, v_o) = channel_moments(z_m), channel_moments(z_o)
            r = v_m / v_o
            var = (own.running_var.numpy() + own.eps) * r - norm.eps
            mean = mu_m - np.sqrt(r) * (mu_o - own.running_mean.numpy())
            norm.running_mean.copy_(torch.from_numpy(mean))
            norm.running_var.copy_(torch.from_numpy(var))
            found[bn] = (norm.running_mean.clone(), norm.running_var.clone())
            y_m, y_o = norm(z_m).relu(), own(z_o).relu()
    return found


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_statistics_are_those_found_by_hand(memory_bytes):
    original = some(nets.plain)
    model = pruned(original)
    model.bn1.eps, original.bn2.eps = 1e-3, 1e-2
    nets.lived_in(model, seed=5)  # scales, shifts and statistics of its own
    expected = by_hand(model, original, drawn())
    done = matched_(model, original, drawn().split(5), memory_bytes=memory_bytes)
    assert farthest(statistics(model), expected) < 1e-5
    assert (done.target, done.feed, done.n_examples) == ("reference", "sequential", 24)
    # One pass of the original, and the walk; or one, a scout's and that to the second layer.
    assert done.passes == pytest.approx(2.0 if memory_bytes is None else 3.0)
    assert all(layer.n_unmatched == 0 for layer in done.layers)


def test_normalized_outputs_get_the_moments_of_the_original():
    original = some(nets.residual)
    model = pruned(original)
    x = drawn()
    matched_(model, original, [x])
    outputs = {}
    for net in (model, original):
        net.layer2.bn2.register_forward_hook(lambda m, a, y: outputs.update({m: y}))
        net(x)
    ours, theirs = (channel_moments(outputs[net.layer2.bn2].detach()) for net in (model, original))
    np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-4, atol=1e-5)


def test_scaled_and_shifted_convolutions_give_the_outputs_of_the_original():
    original = some(nets.residual)
    model = copy.deepcopy(original)
    rng = torch.Generator().manual_seed(3)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            scale = 10 ** (2 * torch.rand(layer.out_channels, generator=rng) - 1)
            layer.weight.data.mul_(scale.view(-1, 1, 1, 1))
            layer.bias = nn.Parameter(torch.randn(layer.out_channels, generator=rng))
    matched_(model, original, drawn().split(6))
    fresh = drawn(seed=9)
    torch.testing.assert_close(model(fresh), original(fresh), rtol=1e-4, atol=1e-4)


def test_batches_of_any_size_and_order_give_the_same():
    original = some(nets.residual)
    found = []
    x = drawn()
    for batches in ([x], x.split(1), x.split(7), x.flip(0).split(5), iter(x.split(9))):
        model = pruned(original)
        matched_(model, original, batches)
        found.append(statistics(model))
    assert all(farthest(other, found[0]) < 1e-6 for other in found[1:])


def test_groups_and_example_weights_are_matched_to_a_stock_original():
    """In a group of channels, all of the group's values count, here and there."""
    original = some(nets.residual)
    plain, grouped = pruned(original), pruned(original)
    swap_norms_(plain, example_weight=0.0)
    matched_(plain, original, [drawn()])
    stock = pruned(original)
    matched_(stock, original, [drawn()])
    assert farthest(statistics(plain), statistics(stock)) < 1e-6
    swap_norms_(grouped, channel_groups=2)
    done = matched_(grouped, original, [drawn()])
    mean, var = statistics(grouped)["bn1"]
    assert torch.equal(mean[:2], mean[:1].expand(2))
    assert torch.equal(var[:2], var[:1].expand(2))
    assert sum(layer.n_unmatched for layer in done.layers) == 0


def test_dead_channels_are_counted_and_stay_finite():
    original = some(nets.plain)
    model = pruned(original)
    with torch.no_grad():
        model.conv1.weight[0] = 0  # dead here
        original.conv1.weight[1] = 0  # dead there
        model.conv1.weight[2] *= 1e3  # a million times the variance
        original.conv1.weight[3] = model.conv1.weight[3] = 0  # dead in both
    done = matched_(model, original, drawn().split(6))
    assert {layer.name: layer.n_unmatched for layer in done.layers} == {"bn1": 3, "bn2": 0}
    mean, var = (t.double() for t in statistics(model)["bn1"])
    own_mean, own_var = statistics(original)["bn1"]
    z_mean, z_var = (torch.from_numpy(t) for t in channel_moments(model.conv1(drawn()).detach()))
    theirs = channel_moments(original.conv1(drawn()).detach())[0]
    # The original's scale, and its mean output.
    torch.testing.assert_close(var[[0, 3]], own_var[[0, 3]])
    torch.testing.assert_close(mean[0], own_mean[0] - theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean[3], own_mean[3])
    # Population moments.
    torch.testing.assert_close(mean[1:3], z_mean[1:3], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var[1:3], z_var[1:3], rtol=1e-5, atol=1e-5)
    assert any("3 channels (of bn1) are dead" in line for line in describe_missing(done))


def test_a_layer_that_the_original_never_reaches_gets_population_moments():
    original = some(nets.plain)
    original.forward = lambda x: original.bn1(original.conv1(x))
    model = some(nets.plain)
    done = matched_(model, original, [drawn()])
    assert [layer.n_unmatched for layer in done.layers] == [0, 4]
    below = model.bn1(model.conv1(drawn())).relu()
    mean, var = (torch.from_numpy(t) for t in channel_moments(model.conv2(below).detach()))
    found = statistics(model)["bn2"]
    torch.testing.assert_close(found, (mean.double(), var.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"reference": None}, "target reference: give the original as reference="),
        ({"feed": "batch"}, "target reference: needs the sequential feed"),
        ({"target": "population"}, "target reference: give the original as reference="),
        ({"target": "interpolated"}, r"as reference=\{network: weight\}"),
        ({"target": "interpolated", "reference": {}}, r"reference: weights \[\], expected"),
        (
            {"target": "interpolated", "reference": {nets.plain(): 0.0}},
            r"weights \[0\.0\], expected",
        ),
        (
            {"target": "reference", "reference": {nets.plain(): 1.0}},
            "give the original as reference=",
        ),
    ],
)
def test_options_that_contradict_are_refused(options, found):
    net = some(nets.plain)
    with pytest.raises(ConfigError, match=found):
        recalibrate_(net, [drawn()], **{"target": "reference", "reference": net} | options)


def test_an_original_of_other_layers_is_refused_with_all_of_them():
    model, before = some(nets.plain), some(nets.plain).state_dict()
    other = nets.lived_in(nets.plain(6))
    other.extra = nn.BatchNorm2d(3)
    other.bn2 = nn.BatchNorm2d(4, track_running_stats=False)
    with pytest.raises(ConfigError) as caught:
        matched_(model, other, [drawn()])
    for part in (
        "extra: only in the original", "bn1: 4 channels, 6 in the original",
        "bn2: the original's keeps no statistics",
    ):  # fmt: skip
        assert part in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("where", ["model", "original"])
def test_an_exception_leaves_both_as_they_were(where):
    original = some(nets.residual)
    model = pruned(original)
    broken = model if where == "model" else original
    handle = broken.layer2.bn2.register_forward_pre_hook(lambda m, args: (args[0] * float("inf"),))
    before = [copy.deepcopy(net.state_dict()) for net in (model, original)]
    original.layer1.train()
    with pytest.raises(NumericError, match=r"layer2\.bn2"):
        matched_(model, original, drawn().split(6))
    handle.remove()
    for net, values in zip((model, original), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in net.state_dict().items())
        assert not net.training
    assert original.layer1.training
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in original.modules())


def test_the_original_is_only_read():
    original = some(nets.residual)
    before = copy.deepcopy(original.state_dict())
    original.layer1.train()
    original.conv1.weight.grad = torch.ones_like(original.conv1.weight)
    matched_(pruned(original), original, drawn().split(6))
    assert all(torch.equal(value, before[name]) for name, value in original.state_dict().items())
    assert original.layer1.training
    assert bool((original.conv1.weight.grad == 1).all())


class Breaking:
    """Batches that end with an exception after some number of them, over all passes."""

    def __init__(self, n):
        self.left = n

    def __len__(self):
        return 4

    def __iter__(self):
        for batch in drawn().split(6):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield batch


@pytest.mark.parametrize("n", [5, 13])
def test_an_interrupted_run_goes_on_to_the_same_numbers(n, tmp_path):
    original = some(nets.residual)
    whole = pruned(original)
    matched_(whole, original, Breaking(-1), memory_bytes=0)
    model = pruned(original)
    with pytest.raises(KeyboardInterrupt):
        matched_(model, original, Breaking(n), memory_bytes=0, state=tmp_path)
    done = matched_(model, original, Breaking(-1), memory_bytes=0, state=tmp_path)
    assert done.effort.n_resumed >= 24  # the original's pass at least
    for name, value in whole.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_the_state_of_another_original_is_not_taken(tmp_path):
    original = some(nets.residual)
    matched_(pruned(original), original, drawn().split(6), memory_bytes=0, state=tmp_path)
    other = some(nets.residual, seed=4)
    model, expected = pruned(original), pruned(original)
    done = matched_(model, other, drawn().split(6), memory_bytes=0, state=tmp_path)
    assert done.effort.n_resumed == 0
    matched_(expected, other, drawn().split(6), memory_bytes=0)
    assert farthest(statistics(model), statistics(expected)) == 0


def test_few_or_shifted_examples_move_the_statistics_less_than_the_populations():
    """Noise of the draw cancels between the two networks (a control variate)."""
    original = some(nets.residual)
    exact = pruned(original)
    matched_(exact, original, drawn(2000, seed=2).split(250))
    errors = {}
    for target in ("reference", "population"):
        best = pruned(original, 0.1)
        # With 10% of the weights gone, the two networks meet nearly the same.
        full, few = copy.deepcopy(best), copy.deepcopy(best)
        options = {"target": target, "reference": original if target == "reference" else None}
        recalibrate_(full, drawn(2000, seed=2).split(250), feed="sequential", **options)
        recalibrate_(few, [drawn(8)], feed="sequential", **options)
        errors[target] = farthest(statistics(few), statistics(full))
    assert errors["reference"] < errors["population"] / 3


def test_auto_decides_on_the_examples_of_both():
    original = some(nets.residual)
    model = pruned(original)
    done = matched_(model, original, drawn(200).split(10), samples="auto", tolerance=0.2)
    assert done.n_examples < 200
    expected = pruned(original)
    matched_(expected, original, drawn(200)[: done.n_examples].split(10))
    assert farthest(statistics(model), statistics(expected)) < 1e-6


def test_an_eps_that_no_variance_can_match_leaves_the_mean_right():
    """(var_O + eps_O) r - eps_M is below 0: the least variance there is, and the mean for it."""
    original = some(nets.plain)
    model = copy.deepcopy(original)
    model.bn1.eps = 10.0
    done = matched_(model, original, [drawn()])
    assert done.layers[0].n_unmatched == 4
    assert bool((model.bn1.running_var == 0).all())
    ours, theirs = (net.bn1(net.conv1(drawn())).mean((0, 2, 3)) for net in (model, original))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def public(name):
    """A public ResNet-20."""
    content = torch.load(DATA / "cifar10" / name, map_location="cpu", weights_only=True)
    found = nets.resnet20().eval()
    keys = {key.removeprefix("module."): value for key, value in content["state_dict"].items()}
    found.load_state_dict(keys, strict=False)
    return found


def opened(path, n):
    shift, scale = (torch.tensor(t).view(3, 1, 1) for t in ([0.485, 0.456, 0.406], [0.226] * 3))
    with np.load(DATA / path) as found:
        images = torch.from_numpy(found["images"][:n]).float() / 255
        labels = torch.from_numpy(found["labels"][:n])
    if images.ndim == 3:
        images = nn.functional.pad(images, (2, 2, 2, 2)).unsqueeze(-1).expand(-1, -1, -1, 3)
    return (images.permute(0, 3, 1, 2) - shift) / scale, labels


def top1(model, x, y):
    with torch.no_grad():
        return float(model(x).argmax(1).eq(y).float().mean())


@needs_data
def test_a_pruned_network_comes_back_from_few_images_of_any_kind():
    """A public ResNet-20 without 70% of its weights, on 1,000 images that it has not met."""
    original = public("resnet20.th")
    damaged = pruned(original, 0.7)
    x, y = opened("cifar10/test.npz", 1000)
    found = {}
    for name, path in (("own", "cifar10/calibration.npz"), ("digits", "mnist/calibration.npz")):
        batches = opened(path, 64)[0].split(32)
        for target in ("reference", "population"):
            model = copy.deepcopy(damaged)
            options = {"reference": original} if target == "reference" else {}
            recalibrate_(model, batches, target=target, feed="sequential", **options)
            found[name, target] = top1(model, x, y)
    assert found["own", "reference"] > found["own", "population"] + 0.03
    assert found["digits", "reference"] > found["digits", "population"] + 0.2


@needs_data
def test_a_mean_of_public_networks_is_better_with_statistics_between_theirs():
    """Two public ResNet-20 of one author each, 9 to 1, on 1,000 images that they have not met."""
    originals = {public("resnet20.th"): 9.0, public("resnet20_b.th"): 1.0}
    x, y = opened("cifar10/test.npz", 1000)
    batches = opened("cifar10/calibration.npz", 128)[0].split(32)
    found = {}
    for target in ("interpolated", "population"):
        model = public("resnet20.th")
        model.load_state_dict(mean_of([n.state_dict() for n in originals], (9.0, 1.0)))
        options = {"reference": originals} if target == "interpolated" else {}
        recalibrate_(model, batches, target=target, feed="sequential", **options)
        found[target] = top1(model, x, y)

    assert found["interpolated"] > found["population"] + 0.01


# --- several originals: the mean of their normalized moments ---


def mean_by_hand(model, originals, x):
    """The statistics of a `Plain` network between others, layer by layer, in float64."""
    model = copy.deepcopy(model).double()
    nets_of = [(copy.deepcopy(net).double(), weight) for net, weight in originals.items()]
    whole = sum(weight for _, weight in nets_of)
    y, theirs = x.double(), [x.double()] * len(nets_of)
    found = {}
    with torch.no_grad():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            shift = scale = 0.0
            for k, (net, weight) in enumerate(nets_of):
                norm = getattr(net, bn)
                below = getattr(net, conv)(theirs[k])
                plain = nn.functional.batch_norm(
                    below, norm.running_mean, norm.running_var, eps=norm.eps
                )
                mean, var = channel_moments(plain)
                shift, scale = shift + weight / whole * mean, scale + weight / whole * var**0.5
                theirs[k] = norm(below).relu()
            z, norm = getattr(model, conv)(y), getattr(model, bn)
            mean, var = channel_moments(z)
            # (mean - m) / sqrt(v + eps) = shift and sqrt(var / (v + eps)) = scale.
            norm.running_var.copy_(torch.from_numpy(var / scale**2 - norm.eps))
            norm.running_mean.copy_(torch.from_numpy(mean - shift * var**0.5 / scale))
            found[bn] = (norm.running_mean.clone(), norm.running_var.clone())
            y = norm(z).relu()
    return found


def several(n=3):
    return {some(nets.plain, seed=seed): 1.0 + seed for seed in range(n)}


@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_statistics_between_several_are_those_found_by_hand(memory_bytes):
    originals = several()
    model = some(nets.plain, seed=7)
    model.bn1.eps, next(iter(originals)).bn2.eps = 1e-3, 1e-2
    expected = mean_by_hand(model, originals, drawn())
    before = [{k: v.clone() for k, v in net.state_dict().items()} for net in originals]
    batches = drawn().split(5)
    done = recalibrate_(
        model, batches, target="interpolated", reference=originals, memory_bytes=memory_bytes
    )
    assert farthest(statistics(model), expected) < 1e-5
    assert (done.target, done.feed) == ("interpolated", "sequential")
    # One pass of each original, and what the feed takes by itself.
    assert done.passes == pytest.approx(4.0 if memory_bytes is None else 5.0)
    for net, values in zip(originals, before, strict=True):
        assert all(torch.equal(v, values[k]) for k, v in net.state_dict().items())


def test_one_original_or_copies_of_it_are_a_reference():
    original = some(nets.residual)
    expected = pruned(original)
    matched_(expected, original, [drawn()])
    for originals in ({original: 5.0}, {original: 1.0, copy.deepcopy(original): 2.0}):
        model = pruned(original)
        recalibrate_(model, [drawn()], target="interpolated", reference=originals)
        assert farthest(statistics(model), statistics(expected)) < 1e-6


def test_only_the_ratio_of_the_weights_matters():
    found = []
    for factor in (1, 10):
        model = some(nets.plain, seed=7)
        originals = {net: factor * weight for net, weight in several().items()}
        recalibrate_(model, [drawn()], target="interpolated", reference=originals)
        found.append(statistics(model))
    assert farthest(*found) < 1e-6
