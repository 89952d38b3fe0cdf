"""Gates: exact when inserted, the paper's formula when open, and followed by every command."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import bnfix
from bnfix import GeneralizedBatchNorm, NormError, swap_norms_
from bnfix.core import masks
from bnfix.core.errors import CheckpointError, NumericError
from bnfix.core.settings import FinetuneRecipe
from bnfix.deploy.fold import optimize_
from bnfix.deploy.fuse import fused
from bnfix.norm.mixture import set_gates_
from bnfix.training.parameters import decay_norms_, parameter_groups
from bnfix.weights.label_free import fit_moments_
from tests import nets, reference
from tests.test_saving import forge, header_of

STOCK = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
SHAPES = st.sampled_from([(), (1,), (7,), (3, 2), (1, 1), (2, 1, 3)])


def drawn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gated(channels=4, seed=0, **options):
    """A layer in float64 whose gates are open, with statistics as if trained."""
    stock = nn.BatchNorm2d(channels, dtype=torch.float64)
    net = nets.lived_in(nn.Sequential(stock), seed)
    swap_norms_(net, to="gated", **options)
    layer = net[0].double()
    set_gates_(layer, (drawn(seed, 3, channels) / 2).tolist())
    return layer


def by_hand(layer, x, normalize, valid=None):
    numbers = (t.detach().numpy() for t in (layer.weight, layer.bias, layer.gates))
    return reference.gated(x, *numbers, normalize=normalize, valid=valid)


# The layer


@given(st.floats(-4, 4), SHAPES, st.integers(0, 99), st.booleans())
@settings(max_examples=15, deadline=None)
def test_gates_are_inserted_without_a_change(bias, size, seed, affine):
    stock = STOCK[max(1, len(size) + 1)](5, affine=affine)
    net = nets.lived_in(nn.Sequential(stock), seed)
    x = 2 + drawn(seed, 6, 5, *size).float()
    before = net.eval()(x)
    change = swap_norms_(net, to="gated").changes[0]
    assert change.gated
    assert change.difference <= 1e-6
    with torch.no_grad():
        net[0].gates[2] = bias
    assert not net[0].live
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    stock.train()
    torch.testing.assert_close(net.train()(x), stock(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(net[0].running_mean, stock.running_mean)


@given(
    st.integers(1, 4), SHAPES, st.sampled_from([1, 2, 4]), st.integers(0, 99),
    st.sampled_from([(0.0, 0.0), (0.25, 0.0), (0.25, 0.5), (1.0, 0.0)]),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_evaluation_is_the_papers_formula(n, size, groups, seed, weights):
    layer = gated(seed=seed, channel_groups=groups).eval()
    bnfix.set_example_weight_(layer, weights[0], batch_weight=weights[1])
    x = 1 + drawn(seed + 1, n, 4, *size)
    running = layer.running_mean.numpy(), layer.running_var.numpy()

    def normalize(moved):
        return reference.evaluate(
            moved, np.ones(4), np.zeros(4), running, groups=groups, eps=layer.eps,
            example_weight=weights[0], batch_weight=weights[1],
        )  # fmt: skip

    found = layer(x).detach().numpy()
    # 1e-8: the reference takes its variances from raw moments.
    np.testing.assert_allclose(found, by_hand(layer, x, normalize), rtol=1e-8, atol=1e-8)


@given(
    st.integers(2, 6), SHAPES, st.sampled_from([1, 2, 4]),
    st.sampled_from([None, 2, 3]), st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=15, deadline=None)
def test_training_is_the_papers_formula(n, size, groups, ghost, seed):
    layer = gated(seed=seed, channel_groups=groups, ghost_size=ghost).train()
    x = 1 + drawn(seed + 1, n, 4, *size)
    if (n // -(-n // (ghost or n))) * np.prod(size, dtype=int) * (4 // groups) < 2:
        with pytest.raises(NumericError, match="more than 1 value per ghost batch"):
            layer(x)
        return
    before = layer.running_mean.clone(), layer.running_var.clone()

    def normalize(moved):
        mean, var = reference.channel_moments(moved)
        count = moved.size / 4
        var *= count / (count - 1)
        for own, old, new in zip(("mean", "var"), before, (mean, var), strict=True):
            expected.update({own: 0.9 * old.numpy() + 0.1 * new})
        return reference.train(
            moved, np.ones(4), np.zeros(4), groups=groups, ghost_size=ghost, eps=layer.eps
        )

    expected = {}
    found = layer(x).detach().numpy()
    np.testing.assert_allclose(found, by_hand(layer, x, normalize), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(layer.running_mean, expected["mean"], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(layer.running_var, expected["var"], rtol=1e-9)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", [(), (3,), (2, 2)])
def test_gradients_are_those_of_differences(training, size):
    layer = gated(3, channel_groups=3, ghost_size=2).train(training)
    bnfix.set_example_weight_(layer, 0.2)
    x = drawn(3, 4, 3, *size).requires_grad_()
    names = ("weight", "bias", "gates")
    values = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def call(x, *given):
        return torch.func.functional_call(layer, dict(zip(names, given, strict=True)), (x,))

    layer.track_running_stats = False  # they move between the calls
    assert torch.autograd.gradcheck(call, (x, *values))
    with torch.no_grad():
        values[2][:2] = 0  # where training begins
    assert torch.autograd.gradcheck(call, (x, *values))


def test_no_position_of_the_padding_counts():
    lengths, total = torch.tensor([1, 4, 6]), 6
    valid = (torch.arange(total) < lengths[:, None]).numpy()
    x = torch.where(torch.from_numpy(valid)[:, None], drawn(5, 3, 4, total), 50.0)
    for layer in (gated(), gated(channel_groups=2)):
        groups = layer.channel_groups
        running = layer.running_mean.numpy(), layer.running_var.numpy()
        bnfix.set_example_weight_(layer, 0.25, batch_weight=0.125)

        def normalize(moved, groups=groups, running=running):
            return reference.evaluate(
                moved, np.ones(4), np.zeros(4), running, groups=groups, eps=1e-5,
                example_weight=0.25, batch_weight=0.125, valid=valid,
            )  # fmt: skip

        expected = by_hand(layer, x, normalize, valid=valid)
        with masks.mask_used(masks.valid_of(None, lengths, total)):
            found = layer.eval()(x).detach().numpy()
            trained = layer.train()(x)
        everywhere = np.repeat(valid[:, None], 4, 1)
        np.testing.assert_allclose(found[everywhere], expected[everywhere], rtol=1e-8)
        mean = torch.stack([trained[i, :, :n].mean(-1) for i, n in enumerate(lengths.tolist())])
        assert bool(trained.isfinite().all())
        assert mean.abs().max() < 5  # in units of the valid values, not of the padding


@given(st.floats(0, 1), st.integers(0, 99))
@settings(max_examples=10, deadline=None)
def test_centring_by_less_than_0_is_the_mean_of_the_example_weight(a, seed):
    layer = gated(seed=seed).eval()
    x = drawn(seed, 3, 4, 5)
    mean = (1 - a) * layer.running_mean.view(-1, 1) + a * x.mean(-1, keepdim=True)
    expected = (x - mean) / (layer.running_var + layer.eps).sqrt().view(-1, 1)
    set_gates_(layer, [[-a] * 4, [0.0] * 4, [1.0] * 4])
    with torch.no_grad():
        layer.running_mean *= 1 - a
        layer.weight.fill_(1)
        layer.bias.zero_()
    torch.testing.assert_close(layer(x), expected)
    # The example weight's output is the same but for one factor an example and channel.
    other = GeneralizedBatchNorm(4, example_weight=a, dtype=torch.float64).eval()
    other.running_mean, other.running_var = (
        layer.running_mean / max(1 - a, 1e-12),
        layer.running_var,
    )
    if a < 0.99:
        one, two = layer(x), other(x)
        factor = two.norm(dim=-1, keepdim=True) / one.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(one * factor, two)


def test_wild_gates_stay_finite():
    layer = gated().eval()
    set_gates_(layer, [[0.0] * 4, [50.0] * 4, [-300.0, -90.0, 90.0, 300.0]])
    x = drawn(1, 3, 4, 5).float()
    assert bool(layer.float()(x).isfinite().all())
    with pytest.raises(NormError, match=r"gates: shape \(3, 2\), expected finite numbers of shape"):
        set_gates_(layer, [[0.0] * 2] * 3)


def test_a_state_dict_carries_the_gates():
    one, other = gated(), GeneralizedBatchNorm(4, dtype=torch.float64)
    other.load_state_dict(one.state_dict())
    assert torch.equal(other.gates, one.gates)
    x = drawn(2, 2, 4, 3)
    assert torch.equal(other.eval()(x), one.eval()(x))
    own = one.gates.detach().clone()
    one.load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert torch.equal(one.gates, own)
    wrong = {**one.state_dict(), "gates": torch.zeros(3, 5)}
    with pytest.raises(RuntimeError, match="size mismatch for gates"):
        other.load_state_dict(wrong)


# Surgery


def test_other_kinds_keep_gates_and_batch_drops_them():
    net = swapped()
    before = net.bn1.gates.clone()
    swap_norms_(net, to="ghost", example_weight=0.1)
    assert torch.equal(net.bn1.gates, before)
    assert (net.bn1.ghost_size, net.bn1.live) == (16, True)
    swap_norms_(net, to="batch")
    assert net.bn1.gates is None
    assert not net.bn1.live
    assert "gates" not in " ".join(net.state_dict())


def test_layers_without_room_for_gates_are_refused():
    net = nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False))
    with pytest.raises(NormError, match=r"0: keeps no running statistics, so it cannot have gates"):
        swap_norms_(net, to="gated")
    torchvision = pytest.importorskip("torchvision")
    net = nn.Sequential(torchvision.ops.FrozenBatchNorm2d(3))
    with pytest.raises(NormError, match=r"0: is frozen \(--unfreeze\), so it cannot have gates"):
        swap_norms_(net, to="gated")


def test_a_norm_that_also_activates_keeps_its_activation():
    timm = pytest.importorskip("timm")
    net = nets.lived_in(nn.Sequential(timm.layers.BatchNormAct2d(4))).eval()
    x = drawn(0, 2, 4, 5, 5).float()
    before = net(x)
    swap_norms_(net, to="gated")
    torch.testing.assert_close(net(x), before, rtol=1e-6, atol=1e-6)
    assert (before == 0).any()


def swapped(open_=True):
    """A tiny network with gates in both layers."""
    net = nets.lived_in(nets.plain()).eval()
    swap_norms_(net, to="gated")
    for k, layer in enumerate((net.bn1, net.bn2) if open_ else ()):
        set_gates_(layer, (drawn(k, 3, 4) / 2).tolist())
    return net


# Statistics, decay, groups


@pytest.mark.parametrize("feed", ["batch", "sequential"])
def test_statistics_are_those_of_what_is_normalized(feed):
    net = swapped()
    batches = [drawn(k, n, 3, 6, 5).float() for k, n in enumerate((4, 4, 3))]
    bnfix.recalibrate_(net, batches, feed=feed)
    met = []
    net.bn1.register_forward_pre_hook(lambda _, args: met.append(args[0].double()))
    for x in batches:
        net(x)
    x = torch.cat(met)
    moved = x + net.bn1.gates[0].detach().view(-1, 1, 1) * x.mean((2, 3), keepdim=True)
    mean, var = reference.channel_moments(moved.detach())
    np.testing.assert_allclose(net.bn1.running_mean, mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(net.bn1.running_var, var, rtol=1e-5)


def test_fitted_example_weights_count_the_centring():
    """A centring of -1 leaves no example's mean, so all differences are those of variances."""
    layer = gated().float()
    layer.gates = None
    net = nn.Sequential(layer).eval()
    x = drawn(1, 64, 4, 6).float() + 3 * drawn(2, 64, 4, 1).float()
    found = {}
    for centring in (0.0, -1.0):
        swap_norms_(net, to="gated", example_weight=0.0)
        set_gates_(net[0], [[centring] * 4, [0.0] * 4, [1.0] * 4])
        bnfix.recalibrate_(net, [x])
        found[centring] = fit_moments_(net, [x], 4, {"0": net[0]}).weights["0"]
    centred = nn.Sequential(nn.BatchNorm1d(4)).eval()
    swap_norms_(centred)
    bnfix.recalibrate_(centred, [x - x.mean(-1, keepdim=True)])
    own = fit_moments_(centred, [x - x.mean(-1, keepdim=True)], 4, {"0": centred[0]}).weights["0"]
    assert found[-1.0] == pytest.approx(own, abs=1e-4)
    assert abs(found[0.0] - own) > 1e-3


def test_gates_are_trained_and_decay_with_the_norms():
    net = swapped()
    (group,) = parameter_groups(net, lr=0.1, train="norms")
    assert sum(p is net.bn1.gates or p is net.bn2.gates for p in group["params"]) == 2
    before = net.bn1.gates.detach().clone()
    decay_norms_(net, 0.5, 0.2, "identity")
    torch.testing.assert_close(net.bn1.gates[:2], 0.9 * before[:2])
    assert torch.equal(net.bn1.gates[2], before[2])


# Forms


def test_closed_gates_fold_and_open_ones_stay():
    x = drawn(4, 2, 3, 6, 6).float()
    net = swapped(open_=False)
    before = net(x)
    assert [fold.norm for fold in optimize_(net, x).folded] == ["bn1", "bn2"]
    torch.testing.assert_close(net(x), before, rtol=1e-5, atol=1e-5)
    found = optimize_(swapped(), x)
    assert found.left == dict.fromkeys(("bn1", "bn2"), "has gates that depend on the example")


def test_a_fast_copy_agrees():
    net, x = swapped(), drawn(4, 2, 3, 6, 6).float()
    copied, _ = fused(net, x)
    with torch.no_grad():
        torch.testing.assert_close(copied(x), net(x), rtol=1e-5, atol=1e-5)


def test_noise_and_consistency_are_refused():
    recipe = FinetuneRecipe(ghost_noise=8, steps=1)
    batches = [(drawn(k, 4, 3, 6, 6).float(), torch.arange(4) % 3) for k in range(2)]
    with pytest.raises(NormError, match=r"--ghost-noise, --consistency: .* layers with gates"):
        bnfix.finetune_(swapped(), batches, monitor=batches, recipe=recipe)


# Files and commands


@pytest.fixture(scope="module")
def trained(files, cli, tmp_path_factory):
    """A converted checkpoint, and the same with its norms and gates fine-tuned."""
    folder = tmp_path_factory.mktemp("gates")
    one, two = folder / "gated.safetensors", folder / "trained.safetensors"
    made = cli("convert", files.net, "--model", files.spec, "--to", "gated", "-o", one)
    assert made.code == 0, made.err
    words = [*files.common, "--data", files.data, "--epochs", "1", "--lr", "0.05"]
    done = cli("finetune", one, *words, "--train", "norms", "-o", two)
    assert done.code == 0, done.err
    return one, two


def test_the_file_is_a_stock_state_dict_with_gates_in_its_header(files, trained):
    one, _ = trained
    assert set(load_file(one)) == set(files.trained().state_dict())
    rows = header_of(one)["norms"]["bn1"]["gates"]
    assert rows == [[0.0] * 6, [0.0] * 6, [1.0] * 6]
    stock = files.model()
    stock.load_state_dict(load_file(one), strict=True)
    x = drawn(0, 2, 3, 8, 8).float()
    model = bnfix.load(one, files.model())
    torch.testing.assert_close(model(x), stock.eval()(x), rtol=1e-5, atol=1e-5)


def test_finetuning_opens_the_gates_and_a_file_keeps_them(files, trained, tmp_path):
    model = bnfix.load(trained[1], files.model())
    assert all(bool((layer.gates[:2] != 0).any(1).all()) for layer in (model.bn1, model.bn2))
    bnfix.save(model, tmp_path / "again.safetensors")
    again = bnfix.load(tmp_path / "again.safetensors", files.model())
    x = drawn(0, 2, 3, 8, 8).float()
    assert torch.equal(again.bn2.gates, model.bn2.gates)
    assert torch.equal(again(x), model(x))


def test_commands_know_gates(files, cli, trained, tmp_path):
    one, two = trained
    seen = cli("inspect", two)
    assert seen.out.count(", gates") == 2
    words = [*files.common, "--data", files.data]
    kinds = {layer["kind"] for layer in cli("inspect", two, *words, "--json").json["layers"]}
    assert kinds == {"GeneralizedBatchNorm with gates"}
    both = cli("eval", one, two, *files.common, "--data", files.test, "--fast", "--json").json
    assert [model["n_live"] for model in both["models"]] == [0, 2]
    out = tmp_path / "new.safetensors"
    done = cli("calibrate", two, *words, "--statistics", "population", "--example-weight", "0.1",
               "-o", out)  # fmt: skip
    assert done.code == 0, done.err
    norms = header_of(out)["norms"]
    assert norms["bn1"]["gates"] == header_of(two)["norms"]["bn1"]["gates"]
    assert norms["bn1"]["example_weight"] == pytest.approx(0.1)


@pytest.mark.parametrize("to", ["pt2", "onnx", "plain"])
def test_exports_are_verified(files, cli, trained, tmp_path, to):
    out = tmp_path / f"net.{'py' if to == 'plain' else to}"
    words = [*files.common, "--data", files.test, "--samples", "8"]
    found = cli("export", trained[1], *words, "--to", to, "-o", out, "--json").json
    assert found["export"]["live"] == ["bn1", "bn2"]
    assert found["export"]["verification"]["max_difference"] < 1e-4


def test_open_gates_are_not_folded_unless_they_are_closed(files, cli, trained, tmp_path):
    out = tmp_path / "folded.safetensors"
    words = ["export", trained[1], *files.common, "--data", files.test, "--samples", "16",
             "--to", "folded", "-o", out]  # fmt: skip
    assert "--to folded: 2 layers have gates and cannot be folded: bn1, bn2." in cli(*words).message
    found = cli(*words, "--force-zero", "--json").json
    assert found["export"]["zeroed"] == ["bn1", "bn2"]
    assert found["export"]["cost_of_zero"]["max_difference"] > 1e-4
    words[1] = trained[0]
    closed = cli(*words, "--force", "--json")
    assert closed.code == 0, closed.err
    assert len(closed.json["export"]["folded"]) == 2


@pytest.mark.parametrize(
    "gates",
    [
        "open", 1, True, {"a": 1}, [], [[0.0] * 6] * 2, [[0.0] * 5] * 3, [[0.0] * 6, [0.0], [1.0]],
        [["0"] * 6] * 3, [[None] * 6] * 3, [[True] * 6] * 3, [[[0.0]] * 6] * 3, [[10**400] * 6] * 3,
    ],
)  # fmt: skip
def test_forged_gates_are_refused(files, trained, tmp_path, gates):
    header = copy.deepcopy(header_of(trained[0]))
    header["norms"]["bn1"]["gates"] = gates
    path = forge(tmp_path / "forged.safetensors", load_file(trained[0]), header)
    with pytest.raises(CheckpointError, match="the norm settings in its header cannot be used"):
        bnfix.load(path, files.model())


def test_gates_that_are_no_numbers_are_not_written(files, trained, tmp_path):
    text = json.dumps(header_of(trained[0])).replace("[0.0, 0.0", "[1e999, 0.0", 1)
    path = forge(tmp_path / "forged.safetensors", load_file(trained[0]), text)
    with pytest.raises(CheckpointError, match=r"gates: shape .* expected finite numbers"):
        bnfix.load(path, files.model())
