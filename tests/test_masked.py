"""Padded batches: statistics and example moments over valid positions only."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bnfix
from bnfix.core import masks
from bnfix.core.errors import DataError, NormError
from bnfix.deploy.fuse import fused
from bnfix.norm.layer import GeneralizedBatchNorm, generalized_norms
from bnfix.recalibrate.refit import refit_
from bnfix.weights.label_free import fit_moments_
from tests import reference
from tests.nets import lived_in
from tests.test_norms import arrays, layer_with


def mask_of(lengths, total: int) -> Tensor:
    return torch.arange(total) < torch.as_tensor(lengths)[:, None]


def drawn(seed: int, n: int, total: int, channels: int = 4):
    """Values with large garbage in the padding; lengths with 1 and the total among them."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, total + 1, (n,), generator=rng)
    lengths[0] = 1
    lengths[-1] = total if n > 1 else lengths[-1]
    scale = 0.5 + torch.rand(n, 1, 1, generator=rng)
    x = 1 + scale * torch.randn(n, channels, total, generator=rng).double()
    return torch.where(mask_of(lengths, total)[:, None], x, 50.0), lengths


# ---- the mask of a layer -------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40))
def test_a_length_is_reduced_as_the_map_is(total, own, length):
    length = min(length, total)
    valid = masks.valid_of(None, [length, total], total)
    expected = mask_of([-(-length * own // total), own], own)
    assert torch.equal(valid.fitted(torch.zeros(2, 3, own)), expected)
    wide = valid.fitted(torch.zeros(2, 3, 2, own)).view(2, 2, own)
    # A map of one position, made by pooling, has seen what is valid.
    assert all(torch.equal(wide[:, row], expected) for row in (0, 1))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 99), st.integers(1, 9), st.integers(1, 9))
def test_a_position_is_valid_if_any_that_it_covers_is(seed, height, width):
    mask = torch.rand(2, 6, 7, generator=torch.Generator().manual_seed(seed)) < 0.1
    mask[:, 2, 3] = True
    made = masks.valid_of(mask, None, None).fitted(torch.zeros(2, 1, height, width))
    for i in range(height):
        for j in range(width):
            rows = slice(i * 6 // height, -(-(i + 1) * 6 // height))
            columns = slice(j * 7 // width, -(-(j + 1) * 7 // width))
            expected = mask[:, rows, columns].flatten(1).any(1)
            assert torch.equal(made.view(2, height, width)[:, i, j], expected)


# ---- the layer -----------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 999),
    st.integers(1, 5),
    st.integers(1, 9),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([(0.25, 0.0), (1.0, 0.0), (0.25, 0.5), (0.0, 1.0)]),
    st.booleans(),
)
def test_inference_is_the_reference_over_valid_positions(seed, n, total, groups, weights, median):
    x, lengths = drawn(seed, n, total)
    layer = layer_with(4, seed=seed, channel_groups=groups, example_weight=weights[0]).eval()
    bnfix.set_example_weight_(
        layer, batch_weight=weights[1], batch_estimator="median" if median else "mean"
    )
    with bnfix.valid_positions(lengths=lengths, total=total):
        y = layer(x)
    expected = reference.evaluate(
        x.numpy(), *arrays(layer), groups=groups, eps=layer.eps, example_weight=weights[0],
        batch_weight=weights[1], median=median, valid=mask_of(lengths, total).numpy(),
    )  # fmt: skip
    np.testing.assert_allclose(y.detach().numpy(), expected, rtol=1e-9, atol=1e-9)
    with bnfix.valid_positions(mask_of(lengths, total)):
        assert torch.equal(layer(x), y)


@pytest.mark.parametrize(("groups", "ghost"), [(4, None), (2, 2), (1, 3)])
def test_training_is_the_reference_over_valid_positions(groups, ghost):
    x, lengths = drawn(3, 5, 7)
    layer = layer_with(4, channel_groups=groups, ghost_size=ghost).train()
    gamma, beta, (mean, var) = arrays(layer)
    valid = mask_of(lengths, 7).numpy()
    with bnfix.valid_positions(lengths=lengths, total=7):
        y = layer(x).detach().numpy()
    runs = np.array_split(np.arange(5), 1 if ghost is None else -(-5 // ghost))
    values = x.numpy()
    for run in runs:
        for group in np.split(np.arange(4), groups):
            block = np.concatenate([values[i][group][:, valid[i]].ravel() for i in run])
            for i in run:
                z = (values[i][group] - block.mean()) / np.sqrt(block.var() + layer.eps)
                expected = gamma[group, None] * z + beta[group, None]
                np.testing.assert_allclose(y[i][group], expected, rtol=1e-9, atol=1e-9)
    kept = np.concatenate([values[i][:, valid[i]] for i in range(5)], 1)
    n = kept.shape[1]
    new_var = 0.9 * var + 0.1 * kept.var(1) * n / (n - 1)
    np.testing.assert_allclose(layer.running_mean, 0.9 * mean + 0.1 * kept.mean(1), rtol=1e-9)
    np.testing.assert_allclose(layer.running_var, new_var, rtol=1e-9)


def test_a_mask_that_leaves_nothing_out_changes_nothing_but_rounding():
    x = torch.randn(3, 4, 6, 5)
    for layer in (
        layer_with(4, dtype=torch.float32, example_weight=0.3).eval(),
        layer_with(4, dtype=torch.float32).train(),
    ):
        plain = layer(x)
        with bnfix.valid_positions(torch.ones(3, 6, 5, dtype=torch.bool)):
            torch.testing.assert_close(layer(x), plain, rtol=1e-5, atol=1e-5)
    assert torch.equal(layer(x), layer(x))


@pytest.mark.parametrize("training", [False, True])
def test_gradients_over_valid_positions(training):
    x, lengths = drawn(1, 3, 4)
    layer = layer_with(4, channel_groups=2, ghost_size=2, example_weight=0.4).train(training)
    layer.momentum = 0.0
    names = ["weight", "bias"]
    given = [getattr(layer, name).detach().clone().requires_grad_() for name in names]

    def run(x, gamma, beta):
        with bnfix.valid_positions(lengths=lengths, total=4):
            return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, x)

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *given))
    kept = run(x, *given).transpose(1, 2)[mask_of(lengths, 4)]
    (gradient,) = torch.autograd.grad(kept.square().sum(), x)
    assert not gradient.transpose(1, 2)[~mask_of(lengths, 4)].any()


def test_garbage_in_the_padding_reaches_no_moment():
    x, lengths = drawn(2, 4, 6)
    layer = layer_with(4, example_weight=0.5, batch_weight=0.2).eval()
    keep = mask_of(lengths, 6)
    found = []
    for garbage in (0.0, 1e30, float("nan")):
        spoilt = torch.where(keep[:, None], x, garbage)
        with bnfix.valid_positions(keep):
            found.append(layer(spoilt).transpose(1, 2)[keep])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


# ---- statistics ----------------------------------------------------------------------------


class Pointwise(nn.Module):
    """Two norms after convolutions that look at one position each; takes no mask."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(4, 6, 1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 3, 1), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))


class Masking(nn.Module):
    """Convolutions over time, one with a stride, that see zeros in the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(4, 6, 3, padding=1), nn.BatchNorm1d(6)
        self.conv2, self.bn2 = nn.Conv1d(6, 5, 3, 2, padding=1), nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, inputs: Tensor, lengths: Tensor) -> Tensor:
        keep = (torch.arange(inputs.shape[-1]) < lengths[:, None])[:, None]
        x = self.bn1(self.conv1(inputs.masked_fill(~keep, 0))).relu()
        x = self.bn2(self.conv2(x * keep)).relu()
        half = keep[..., ::2]
        return self.head((x * half).sum(-1) / half.sum(-1))


def built(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return lived_in(kind().double()).eval()


def batches_of(seed: int = 0, key: str = "lengths") -> list[dict[str, Tensor]]:
    found = []
    for k, (n, total) in enumerate([(5, 8), (3, 2), (4, 14)]):
        x, lengths = drawn(seed + k, n, total)
        extra = lengths if key == "lengths" else mask_of(lengths, total)
        found.append({"inputs": x, key: extra, "labels": torch.arange(n) % 3})
    return found


def valid_columns(batch: dict[str, Tensor]) -> list[np.ndarray]:
    return [x[:, :n].numpy() for x, n in zip(batch["inputs"], batch["lengths"], strict=True)]


def slow(net: nn.Module, batches: list[dict[str, Tensor]], feed: str):
    """Each layer's mean, variance and their errors, from the valid columns of every example."""
    state = {name: value.numpy() for name, value in net.state_dict().items()}
    groups = [valid_columns(batch) for batch in batches]
    found = {}
    for k in (1, 2):
        weight = state[f"conv{k}.weight"][:, :, 0]
        groups = [[weight @ x + state[f"conv{k}.bias"][:, None] for x in group] for group in groups]
        every = [x for group in groups for x in group]
        whole = np.concatenate(every, 1)
        mean, var, n = whole.mean(1), whole.var(1), len(every)
        size = np.array([x.shape[1] for x in every])[:, None] / (whole.shape[1] / n)
        means = np.stack([x.mean(1) for x in every])
        squares = np.stack([((x - mean[:, None]) ** 2).mean(1) for x in every])
        of_means = ((size * (means - mean)) ** 2).mean(0)
        errors = (
            np.sqrt(of_means / (n - 1)),
            np.sqrt(((size * (squares - var)) ** 2).mean(0) / (n - 1)),
        )
        found[f"bn{k}"] = (mean, var, *errors, of_means)
        for group in groups:
            used = np.concatenate(group, 1) if feed == "batch" else whole
            scale = state[f"bn{k}.weight"] / np.sqrt(used.var(1) + 1e-5)
            for i, x in enumerate(group):
                z = (x - used.mean(1)[:, None]) * scale[:, None] + state[f"bn{k}.bias"][:, None]
                group[i] = np.maximum(z, 0)
    return found


@pytest.mark.parametrize("key", ["lengths", "mask"])
@pytest.mark.parametrize(
    ("feed", "memory"), [("batch", None), ("sequential", None), ("sequential", 0)]
)
def test_statistics_are_those_of_the_valid_positions(feed, memory, key):
    net, batches = built(Pointwise), batches_of()
    expected = slow(net, batches, feed)
    made = bnfix.recalibrate_(net, batches_of(key=key), feed=feed, memory_bytes=memory)
    assert made.how == ("walk" if feed == "sequential" and memory is None else "passes")
    n_values = sum(int(batch["lengths"].sum()) for batch in batches)
    for record in made.layers:
        mean, var, mean_se, var_se, _ = expected[record.name]
        layer = net.get_submodule(record.name)
        np.testing.assert_allclose(layer.running_mean, mean, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layer.running_var, var, rtol=1e-9)
        assert record.n_values == n_values
        spread = var + 1e-5
        assert record.mean_se == pytest.approx((mean_se / np.sqrt(spread)).max(), rel=1e-6)
        assert record.var_se == pytest.approx((var_se / spread).max(), rel=1e-6)
    trained = built(Pointwise)
    bnfix.recalibrate_(trained, batches, target="train-batch", train_batch_size=4, feed=feed)
    mean, var, *_, of_means = expected["bn1"]
    np.testing.assert_allclose(trained.bn1.running_var, var - of_means / 4, rtol=1e-9)


def test_examples_of_another_kind_are_known_by_their_valid_positions():
    net, found = built(Pointwise), []
    for k in range(4):
        x, lengths = drawn(k, 20, 9)
        lengths = lengths.clamp_min(4)  # by one position an example is of a kind of its own
        x = torch.where(x == 50, torch.randn(20, 4, 9), x)
        x[:4] += 40 * mask_of(lengths, 9)[:4, None]
        found.append({"inputs": x, "lengths": lengths})
    made = bnfix.recalibrate_(net, found, robust=True)
    clean = [x for batch in found for x in valid_columns(batch)[4:]]
    assert made.layers[0].n_values == sum(x.shape[1] for x in clean)
    weight, bias = net.conv1.weight[:, :, 0].detach().numpy(), net.conv1.bias.detach().numpy()
    met = np.concatenate([weight @ x + bias[:, None] for x in clean], 1)
    np.testing.assert_allclose(net.bn1.running_mean, met.mean(1), rtol=1e-9)
    np.testing.assert_allclose(net.bn1.running_var, met.var(1), rtol=1e-9)


def test_a_kept_state_knows_the_mask(tmp_path):
    batches = batches_of()
    every = [x for batch in batches for x in valid_columns(batch)]
    found = []
    for n_resumed in (0, len(every)):
        net = built(Pointwise)
        made = bnfix.recalibrate_(net, batches, feed="batch", state=tmp_path)
        assert made.effort.n_resumed == n_resumed
        found.append([(layer.n_values, layer.mean_se, layer.var_se) for layer in made.layers])
        found[-1].append(net.bn2.running_var.tolist())
    assert found[0] == found[1]


def test_statistics_of_maps_by_a_mask_of_the_same_axes():
    rng = torch.Generator().manual_seed(0)
    x, mask = torch.randn(4, 3, 6, 5, generator=rng), torch.rand(4, 6, 5, generator=rng) < 0.4
    mask[:, 0, 0] = True
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval()
    bnfix.recalibrate_(net, [{"image": x[i], "mask": mask[i]} for i in (slice(3), slice(3, 4))])
    met = net[0](x).detach().double().movedim(1, -1)[mask]
    torch.testing.assert_close(net[1].running_mean.double(), met.mean(0), rtol=1e-6, atol=1e-6)
    variance = met.var(0, correction=0)
    torch.testing.assert_close(net[1].running_var.double(), variance, rtol=1e-6, atol=1e-6)


def alone(batches: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Every example by itself, without padding."""
    return [
        {"inputs": x[None, :, :n], "lengths": n[None], "labels": y[None]}
        for batch in batches
        for x, n, y in zip(*batch.values(), strict=True)
    ]


def test_padded_and_unpadded_runs_agree():
    # A network that masks, and lengths that its stride divides.
    batches = batches_of()
    for batch in batches:
        batch["lengths"] = (batch["lengths"] + 1) // 2 * 2
    padded, single = built(Masking), built(Masking)
    bnfix.recalibrate_(padded, batches, feed="sequential")
    bnfix.recalibrate_(single, alone(batches), feed="sequential")
    for name, value in padded.state_dict().items():
        torch.testing.assert_close(single.state_dict()[name], value, rtol=1e-6, atol=1e-6)
    bnfix.swap_norms_(padded, example_weight=0.4)
    together, each = (bnfix.evaluate(padded, b) for b in (batches, alone(batches)))
    np.testing.assert_allclose(together.logits, each.logits, rtol=1e-5, atol=1e-5)
    without = bnfix.evaluate(padded, [{"x": b} for b in batches], forward=lambda m, b: m(
        b["x"]["inputs"], b["x"]["lengths"]
    ))  # fmt: skip
    assert np.abs(without.logits - each.logits).max() > 1e-3  # the mask is what makes them agree


def test_a_fused_copy_and_a_refit_see_the_mask():
    batches = batches_of()
    net = built(Masking)
    bnfix.swap_norms_(net, example_weight=0.4)
    fast, made = fused(net, batches[0])
    assert made.live == 2
    expected, found = (bnfix.evaluate(model, batches).logits for model in (net, fast))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    # Fitted to itself, a layer keeps its scale and shift, whatever is in the padding.
    for batch in batches:
        keep = mask_of(batch["lengths"], batch["inputs"].shape[-1])[:, None]
        batch["inputs"] = torch.where(keep, batch["inputs"], 1e3)
    copy_ = copy.deepcopy(net)
    with torch.no_grad():
        copy_.bn1.weight.mul_(2)
    refit_(copy_, net, batches)
    torch.testing.assert_close(copy_.bn1.weight, net.bn1.weight, rtol=1e-6, atol=1e-6)


def test_fine_tuning_and_choosing_see_the_mask():
    batches = batches_of()
    spoilt = [
        {**b, "inputs": torch.where(mask_of(b["lengths"], b["inputs"].shape[-1])[:, None],
                                    b["inputs"], -9e3)} for b in batches
    ]  # fmt: skip
    found = []
    for data in (batches, spoilt):
        net = built(Masking)
        bnfix.swap_norms_(net, example_weight=0.2, ghost_size=3)
        recipe = bnfix.settings.FinetuneRecipe(train="norms", statistics="train", epochs=1)
        bnfix.finetune_(net, data, monitor=data, recipe=recipe)
        chosen = bnfix.choose_example_weight_(net, data, select=data, monitor=data)
        found.append((net.state_dict(), chosen.chosen))
    assert found[0][1] == found[1][1]
    for name, value in found[0][0].items():
        torch.testing.assert_close(found[1][0][name], value, rtol=1e-9, atol=1e-9)


# ---- what is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        ({"lengths": torch.tensor([3, 0, 4])}, r"example 1 \(from 0\) has no valid position"),
        ({"mask": torch.tensor([[1, 1], [1, 0], [0, 0]]).bool()}, r"mask: example 2 \(from 0\)"),
        ({"lengths": torch.tensor([3, 1, 9])}, "lengths: from 1 to 9, expected 0 to 5"),
        ({"lengths": torch.tensor([3.0, 1, 2])}, "lengths: torch.float32"),
        ({"mask": torch.ones(3, 5)}, r"mask: .*float32.*expected a bool tensor"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "expected a bool tensor"),
        ({"mask": torch.ones(3, 5, 5, dtype=torch.bool)}, r"bn1: its maps have shape \(5,\)"),
        ({"mask": torch.ones(2, 5, dtype=torch.bool)}, r"bn1: .*the mask is for 2 examples"),
        ({"mask": torch.ones(3, 3, dtype=torch.bool)}, r"mask: \(3, 3\) for inputs \(3, 4, 5\)"),
        ({"mask": torch.ones(3, 6, dtype=torch.bool)}, r"mask: \(3, 6\) for inputs \(3, 4, 5\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(extra, found):
    net = built(Pointwise)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    for feed in ("batch", "sequential"):
        with pytest.raises(DataError, match=found):
            bnfix.recalibrate_(net, [{"x": torch.ones(3, 4, 5).double(), **extra}], feed=feed)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_batches_with_and_without_a_mask_do_not_mix():
    first, second, _ = batches_of()
    bare = {"inputs": second["inputs"]}
    for batches in ([first, bare], [bare, first]):
        with pytest.raises(DataError, match="some have a mask or lengths and some have none"):
            bnfix.recalibrate_(built(Pointwise), batches)


def test_stock_layers_do_not_train_on_padding():
    batches = batches_of()
    recipe = bnfix.settings.FinetuneRecipe(train="norms", statistics="train", epochs=1)
    with pytest.raises(NormError, match="bn1, bn2: stock layers include padding in their moments"):
        bnfix.finetune_(built(Masking), batches, monitor=batches, recipe=recipe)


def test_weights_without_labels_are_not_fitted_to_padding():
    net = built(Masking)
    bnfix.swap_norms_(net)
    with pytest.raises(DataError, match="expected unpadded batches"):
        fit_moments_(net, batches_of(), 2, dict(generalized_norms(net)))


def test_a_ghost_batch_of_one_valid_value_is_refused():
    layer = GeneralizedBatchNorm(2, ghost_size=1)
    with pytest.raises(bnfix.NumericError, match="more than 1 valid value per ghost batch"):
        with bnfix.valid_positions(lengths=[3, 1], total=4):
            layer(torch.randn(2, 2, 4))


def test_another_thread_sees_no_mask():
    x, lengths = drawn(0, 3, 5)
    layer = layer_with(4, example_weight=0.5).eval()
    plain, found = layer(x), []
    with bnfix.valid_positions(lengths=lengths, total=5):
        thread = threading.Thread(target=lambda: found.append(layer(x)))
        thread.start()
        thread.join()
        assert not torch.equal(layer(x), plain)
    assert torch.equal(found[0], plain)
    assert not masks.mask_is_set


def test_compiled_and_exported_layers_keep_the_plain_form():
    x, lengths = drawn(0, 3, 5)
    net = nn.Sequential(layer_with(4, example_weight=0.5)).eval()
    fast, whole = (torch.compile(net, backend="eager", fullgraph=full) for full in (False, True))
    with torch.no_grad():
        plain = whole(x)
        torch.testing.assert_close(plain, net(x))
        with bnfix.valid_positions(lengths=lengths, total=5):
            with pytest.raises(Exception, match=r"masks\.current_mask"):
                whole(x)
            for call in (fast, lambda x: torch.export.export(net, (x,), strict=False)):
                with pytest.raises(NormError, match="uses all positions, padding included"):
                    call(x)
        torch.testing.assert_close(whole(x), plain)
