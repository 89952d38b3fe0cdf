"""Re-fitted scale and shift: against least squares by numpy, in order, and on a real network."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.checkpoints.load import load
from bnfix.core.errors import DataError, NormError, NumericError
from bnfix.metrics.evaluate import evaluate
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate.refit import refit_
from tests import conftest, nets
from tests.real import DATA, needs_data


def images(n, seed=0, size=6):
    return 1 + 2 * torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed))


def pair(make=nets.plain, **options):
    """A net as it was, and converted to Group Norm with two groups."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        original = nets.lived_in(make(), 1).eval()
    model = copy.deepcopy(original)
    swap_norms_(model, to="group", channel_groups=2, **options)
    return model, original


def inputs_of(model, layer, x):
    met = []
    handle = layer.register_forward_pre_hook(lambda module, args: met.append(args[0].clone()))
    with torch.no_grad():
        model(x)
    handle.remove()
    return met


def fitted_by_numpy(layer, own, x, x_own):
    """Least squares of the original's outputs on the plainly normalized values, and a constant."""
    with torch.no_grad():
        z = F.group_norm(x.double(), layer.channel_groups, eps=layer.eps)
        y = own.double()(x_own.double())
        own.float()
    found, left, total = [], 0.0, 0.0
    for c in range(z.shape[1]):
        design = torch.stack((z[:, c].flatten(), torch.ones(z[:, c].numel()).double()), 1)
        target = y[:, c].flatten().numpy()
        solution, squares, *_ = np.linalg.lstsq(design.numpy(), target, rcond=None)
        found.append(solution)
        left, total = left + float(squares[0]), total + target.var() * len(target)
    return np.array(found), left / total


@pytest.mark.parametrize("sizes", [[32], [8, 24], [1, 3, 12, 16]])
def test_each_layer_is_the_least_squares_fit_with_all_before_it_in_place(sizes):
    model, original = pair()
    x = images(32)
    found = refit_(model, original, list(torch.split(x, sizes)))
    assert [layer.name for layer in found.layers] == ["bn1", "bn2"]
    assert (found.n_examples, found.not_fitted) == (32, ())
    for record in found.layers:
        layer, own = model.get_submodule(record.name), original.get_submodule(record.name)
        # The net as it is now: what comes before the layer is final.
        (met,), (met_own,) = inputs_of(model, layer, x), inputs_of(original, own, x)
        expected, residual = fitted_by_numpy(layer, own, met, met_own)
        np.testing.assert_allclose(layer.weight.detach(), expected[:, 0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(layer.bias.detach(), expected[:, 1], rtol=1e-4, atol=1e-5)
        assert record.residual == pytest.approx(residual, rel=1e-4)
        assert record.n_values == 32 * 36
        assert 0.01 < record.residual < 1


def test_outputs_come_closer_to_the_originals():
    for make in (nets.plain, nets.residual):
        model, original = pair(make)
        x, held_out = images(64), images(64, seed=1)
        with torch.no_grad():
            target, before = original(held_out), model(held_out)
            refit_(model, original, [x])
            after = model(held_out)
        assert (after - target).square().mean() < 0.7 * (before - target).square().mean()


def test_a_layer_that_normalizes_as_before_comes_out_as_it_was():
    _, original = pair()
    model = swapped(original)
    state = copy.deepcopy(model.state_dict())
    found = refit_(model, original, [images(16)], layers=["bn1", "bn2"])
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)
    assert max(layer.residual for layer in found.layers) < 1e-9


def test_values_far_from_zero_are_fitted_as_well():
    model, original = pair()
    for net in (model, original):
        with torch.no_grad():
            net.bn1.bias.add_(3000)
    x = images(32)
    found = refit_(model, original, [x])
    expected, _ = fitted_by_numpy(
        model.bn1, original.bn1, *(inputs_of(n, n.bn1, x)[0] for n in (model, original))
    )
    np.testing.assert_allclose(model.bn1.weight.detach(), expected[:, 0], rtol=1e-3)
    assert found.layers[0].residual < 1


def test_constant_channels_get_the_constant():
    model, original = pair()
    with torch.no_grad():
        for net in (model, original):
            net.conv1.weight.zero_()
    refit_(model, original, [images(8)])
    with torch.no_grad():
        x = images(4)
        torch.testing.assert_close(model(x), original(x), rtol=1e-4, atol=1e-4)
    assert model.bn1.weight.detach().eq(0).all()


def test_modes_hooks_and_the_original_are_left_alone():
    model, original = pair(nets.with_dropout)
    model.train()
    original.train()
    state = copy.deepcopy(original.state_dict())
    modes = [m.training for m in (*model.modules(), *original.modules())]
    rng = torch.get_rng_state()
    refit_(model, original, [images(8)], samples=8)
    assert torch.equal(torch.get_rng_state(), rng)
    assert modes == [m.training for m in (*model.modules(), *original.modules())]
    assert all(not m._forward_pre_hooks for m in (*model.modules(), *original.modules()))
    for name, tensor in original.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_samples_are_a_limit_and_generators_are_as_good_as_lists():
    model, original = pair()
    other = copy.deepcopy(model)
    batches = list(images(32).split(8))
    assert refit_(model, original, batches, samples=12).n_examples == 16
    refit_(other, original, iter(batches[:2]))
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_layer_called_twice_is_fitted_to_both_calls():
    model, original = pair(nets.shared_norm)
    with torch.no_grad():
        x, target = images(32), original(images(32))
        before = model(x)
        found = refit_(model, original, [x])
        after = model(x)
    assert [(layer.name, layer.n_values) for layer in found.layers] == [("first.bn", 2 * 32 * 36)]
    assert (after - target).square().mean() < (before - target).square().mean()


def test_layers_without_scale_are_named():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3))
    model.append(nn.BatchNorm2d(4)).eval()
    original = copy.deepcopy(model)
    swap_norms_(model, example_weight=0.5)
    found = refit_(model, original, [images(4)])
    assert (found.layers[0].name, found.not_fitted) == ("3", ("1",))
    assert "of 1 layer were re-fitted" in found.describe()
    assert "not fitted: 1." in found.describe()


def test_what_cannot_be_fitted_is_refused_and_changes_nothing():
    model, original = pair()
    state = copy.deepcopy(model.state_dict())
    bad = images(8)
    bad[3] = torch.nan
    with pytest.raises(NumericError, match="bn1: its values are not finite in batch 1"):
        refit_(model, original, [images(8), bad])
    with pytest.raises(DataError, match="no examples"):
        refit_(model, original, [])
    with pytest.raises(NormError, match="bn7 is a converted layer of both networks"):
        refit_(model, original, [images(4)], layers=["bn7"])
    with pytest.raises(NormError, match="no layer weighs the example"):
        refit_(swapped(original), original, [images(4)])
    with pytest.raises(NormError, match=r"bn1, bn2 is a converted layer"):
        refit_(model, nn.Sequential(nn.Conv2d(3, 4, 3)), [images(4)])

    def other_size(net, x):
        return net(x[..., ::2] if net is model else x)

    with pytest.raises(
        DataError, match="bn1: the two networks call it 1 and 1 times, or on different"
    ):
        refit_(model, original, [images(4)], forward=other_size)
    calls = iter(range(100))

    def failing(net, x):
        if next(calls) == 4:
            raise KeyboardInterrupt("enough")
        return net(x)

    with pytest.raises(KeyboardInterrupt, match="enough"):
        refit_(model, original, [images(4)], forward=failing)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def swapped(original):
    model = copy.deepcopy(original)
    swap_norms_(model)
    assert isinstance(model.bn1, GeneralizedBatchNorm)
    return model


@needs_data
def test_group_norm_of_a_real_network_before_any_step():
    original = nets.resnet20()
    tensors = dict(read_checkpoint(DATA / "cifar10" / "resnet20.th").tensors)
    original.load_state_dict({**original.state_dict(), **tensors})
    original.eval()

    def images_in(name, n):
        found = np.load(DATA / "cifar10" / name)
        x = torch.from_numpy(found["images"][:n]).permute(0, 3, 1, 2) / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), torch.from_numpy(found["labels"][:n])

    x, y = images_in("test.npz", 400)
    model = copy.deepcopy(original)
    swap_norms_(model, to="group", channel_groups=8)
    found = refit_(model, original, [images_in("calibration.npz", 64)[0]])
    assert len(found.layers) == 19
    assert max(layer.residual for layer in found.layers) < 0.5
    metrics = evaluate(model, [(x, y)])
    assert metrics.top1 is not None
    assert metrics.top1 > 0.6


# The commands


def test_convert_refits_where_data_is_given(cli, files, tmp_path):
    outputs = tmp_path / "plain.safetensors", tmp_path / "fitted.safetensors"
    words = ["convert", files.net, "--model", files.spec, "--to", "group", "--channel-groups", 2]
    found = [
        cli(*words, "-o", outputs[0], "--json").json,
        cli(*words, *files.common[2:], "--data", files.data, "-o", outputs[1], "--json").json,
    ]
    notes = [" ".join(report["assumptions"]) for report in found]
    assert "give --data to re-fit them" in notes[0]
    assert "2 layers were re-fitted to the original's outputs on 180 examples" in notes[1]
    x, original = conftest.inputs_of(np.load(files.test)["images"]), files.trained()
    with torch.no_grad():
        gaps = [
            (load(path, model=files.model())(x) - original(x)).square().mean() for path in outputs
        ]
    assert gaps[1] < gaps[0]


def test_convert_needs_no_labels_and_as_many_examples_as_asked_for(cli, files, tmp_path):
    words = ["convert", files.net, *files.common, "--to", "group", "--data", files.flat]
    out = tmp_path / "out.safetensors"
    found = cli(*words, "--channel-groups", 3, "--samples", 40, "-o", out, "--json").json
    assert "on 40 examples" in " ".join(found["assumptions"])
    refused = cli(*words, "--samples", 1, "-o", tmp_path / "other.safetensors")
    assert refused.code == 2
    assert "--samples: 1, expected at least 2" in refused.message


def test_data_is_not_used_where_outputs_stay_the_same(cli, files, tmp_path):
    words = ["--to", "batch-group", "--data", files.data, "-o", tmp_path / "o.safetensors"]
    found = cli("convert", files.net, *files.common, *words, "--json").json
    assert "--data was not used" in " ".join(found["assumptions"])


def test_finetune_refits_before_it_tunes_and_compares_with_the_original(cli, files, tmp_path):
    words = ["finetune", files.net, *files.common, "--data", files.data, "--test", files.test]
    group = ["--to", "group", "--channel-groups", 2, "--json", "-o"]
    found = cli(*words, *group, tmp_path / "0.safetensors", "--epochs", 0).json
    assert "2 layers were re-fitted" in " ".join(found["assumptions"])
    own = cli("eval", files.net, *files.common, "--data", files.test, "--json").json
    assert found["models"][0]["nll"] == pytest.approx(own["models"][0]["nll"], rel=1e-5)
    tuned = cli(*words, *group, tmp_path / "9.safetensors", "--epochs", 9, "--lr", 0.02).json
    # What was asked for is what comes out, whatever it costs against the original.
    assert all(layer["example_weight"] == 1 for layer in tuned["layers"])
    assert tuned["models"][-1]["nll"] < found["models"][-1]["nll"]


class Rectified(nn.Module):
    """Batch Norm, ReLU, the mean over the map, one number."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(1)

    def forward(self, x):
        return F.relu(self.bn(x)).mean((2, 3))


def test_a_fit_that_takes_the_net_as_a_whole_further_away_is_dropped():
    """Its own statistics tell an example's values nothing of its mean, which is all there is here.

    The nearest map is a constant, whose ReLU is 0 everywhere; noise of the old scale is nearer.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 1, 1, generator=generator).expand(64, 1, 6, 6)
    x = x + 0.1 * torch.randn(64, 1, 6, 6, generator=generator)
    original = Rectified().eval()
    model = copy.deepcopy(original)
    swap_norms_(model, example_weight=1.0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = refit_(model, original, [x])
    assert not found.kept
    assert found.distance[1] > found.distance[0] > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert "so the re-fit was undone" in found.describe()


def test_a_fit_that_brings_the_net_nearer_is_kept_and_says_by_how_much():
    model, original = pair()
    before = model.bn1.weight.clone()
    found = refit_(model, original, [images(32)])
    assert found.kept
    assert 0 <= found.distance[1] < found.distance[0]
    assert not torch.equal(model.bn1.weight, before)
    assert "went from" in found.describe()
