"""Networks made fast for evaluation, against the networks that they were made of."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import ModelError, find_norms, set_example_weight_, swap_norms_
from bnfix.core.runtime import set_forward_
from bnfix.deploy.fuse import FusedNorm, PrepackedConv, fused, prepacked
from bnfix.norm import kernels
from bnfix.norm.kernels import Finish
from tests import nets
from tests.test_kernels import LAYOUTS, laid_out, oracle, terms_for

ACTIVATIONS = {
    "relu": (torch.relu_, torch.relu),
    "relu6": (lambda t: F.relu6(t, inplace=True), F.relu6),
    "silu": (lambda t: F.silu(t, inplace=True), F.silu),
    "none": (None, lambda t: t),
}


class Block(nn.Module):
    """Bottlenecks of every way to add and to activate."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.act = {"silu": nn.SiLU(), "leaky": nn.LeakyReLU(0.2)}.get(way, nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.way == "into the residual":
            kept = x.clone()
            x.add_(y)
            return self.act(x) + kept + x
        if self.way == "used twice":
            return self.act(y + x) + y
        if self.way == "broadcast":
            return self.act(y + x.mean((0, 2, 3), keepdim=True))
        if self.way == "scaled":
            return self.act(torch.add(y, x, alpha=2))
        if self.way == "functions":
            return F.relu(torch.add(y, x), inplace=True)
        if self.way == "methods":
            return y.add_(x).relu_()
        if self.way == "number":
            return self.act(y + 1.0)
        y += x
        return self.act(y)


WAYS = {
    "modules": 1, "silu": 1, "leaky": 1, "functions": 1, "methods": 1, "broadcast": 1,
    "into the residual": 0, "used twice": 0, "scaled": 0, "number": 0,
}  # fmt: skip


def live(model: nn.Module, weight: float = 0.2, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    model = nets.lived_in(model).eval()
    swap_norms_(model)
    set_example_weight_(model, weight)
    return model


@torch.no_grad()
def run(model: nn.Module, x: Tensor) -> Tensor:
    return model(x)


def images(n: int, size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(n))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_what_follows_is_fused_where_nobody_else_sees_it(way, channels_last):
    model = live(nn.Sequential(Block(way), nn.Conv2d(6, 4, 1)))
    x = images(3, 8, 6)
    net, found = fused(model, x, channels_last=channels_last)
    assert (len(found.fused), found.live) == (WAYS[way], 1)
    assert sum(isinstance(m, FusedNorm) for m in net.modules()) == found.overwriting == 1
    for n in (1, 2, 5):
        # A clone each: the way "into the residual" changes its input.
        y = images(n, 9, 6)
        torch.testing.assert_close(run(net, y.clone()), run(model, y.clone()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "regnet_y_400mf", "densenet121"])
def test_whole_networks_give_the_same_outputs(name):
    model = live(getattr(torchvision.models, name)(num_classes=7), 0.1)
    sites = [site.name for site in find_norms(model)]
    set_example_weight_(model, {sites[0]: 0.0, sites[3]: 0.0})
    net, found = fused(model, images(2, 48))
    assert found.live == len(sites) - 2
    assert found.folding is not None
    assert len(found.folding.folded) + len(found.folding.left) == len(sites)
    assert found.fused
    assert found.channels_last
    assert found.prepacked == sum(type(m) is nn.Conv2d for m in model.modules())
    for x in (
        images(1, 48),
        images(5, 64),
        images(2, 48).contiguous(memory_format=torch.channels_last),
    ):
        expected = run(model, x)
        scale = expected.abs().max()
        torch.testing.assert_close(run(net, x) / scale, expected / scale, rtol=1e-4, atol=1e-5)


def test_layers_that_are_also_held_in_a_plain_list_follow():
    model = live(nets.held_outside(), 0.2)
    set_example_weight_(model, {"bn1": 0.0})
    x = images(2, 8)
    net, found = fused(model, x)
    assert (found.live, found.prepacked, len(found.folding.folded)) == (1, 2, 1)
    torch.testing.assert_close(run(net, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_the_model_itself_stays_as_it_is():
    model = live(torchvision.models.resnet18(num_classes=3))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    fused(model, images(2))
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    assert next(model.parameters()).is_contiguous()


def test_nan_and_infinity_come_out_where_they_did():
    model = live(nn.Sequential(Block("modules"), Block("silu"), nn.Conv2d(6, 4, 1)))
    x = images(4, 8, 6)
    net, _ = fused(model, x)
    for value in (float("nan"), float("inf"), -float("inf")):
        bad = x.clone()
        bad[1, 2, 3, 3] = value
        mine, theirs = run(net, bad.clone()), run(model, bad.clone())
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        assert not mine[1].isfinite().all()
        assert mine[0].isfinite().all()


def test_a_norm_that_is_hooked_or_called_twice_is_left_alone():
    hooked = live(Block("modules"))
    calls = []
    hooked.norm.register_forward_hook(lambda *_: calls.append(1))
    net, found = fused(hooked, images(2, 8, 6))
    calls.clear()
    run(net, images(2, 8, 6))
    assert (found.fused, len(calls)) == ((), 1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(6)

        def forward(self, x):
            return F.relu(self.norm(F.relu(self.norm(x))))

    model = live(Twice())
    net, found = fused(model, images(2, 8, 6))
    assert found.fused == ()
    torch.testing.assert_close(run(net, images(3, 8, 6)), run(model, images(3, 8, 6)))


def test_timm_layers_do_their_own_activation():
    timm = pytest.importorskip("timm")
    model = live(timm.create_model("efficientnet_lite0", num_classes=5))
    net, found = fused(model, images(2, 64))
    n_active = sum(type(getattr(m, "act", None)) is nn.ReLU6 for m in model.modules())
    assert len(found.fused) >= n_active > 20
    x = images(3, 64)
    torch.testing.assert_close(run(net, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_timm_layer_of_an_unknown_activation_keeps_it():
    timm = pytest.importorskip("timm")

    class Own(nn.ReLU):
        """May do anything."""

        def forward(self, x: Tensor) -> Tensor:
            return x.abs() + 1

    model = live(timm.create_model("efficientnet_lite0", num_classes=5))
    own = next(m for m in model.modules() if type(getattr(m, "act", None)) is nn.ReLU6)
    own.act = Own().eval()
    net, _ = fused(model, images(2, 64))
    assert sum(isinstance(m, Own) for m in net.modules()) == 1
    x = images(3, 64)
    torch.testing.assert_close(run(net, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_a_model_that_cannot_be_traced_still_runs_and_says_so():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.head = Block("modules"), nn.Linear(6, 2)

        def forward(self, x):
            y = self.block(x).mean((2, 3))
            return self.head(y if float(y.sum()) > 0 else -y)

    model = live(Branching())
    net, found = fused(model, images(2, 8, 6))
    assert (found.fused, found.folding) == ((), None)
    assert any("cannot be traced by torch.fx" in note for note in found.notes)
    assert "cannot be traced" in found.text
    x = images(4, 8, 6)
    torch.testing.assert_close(run(net, x), run(model, x), rtol=1e-4, atol=1e-5)


def test_how_the_user_calls_the_model_is_kept():
    model = live(nn.Sequential(Block("modules"), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    set_forward_(model, lambda net, batch: net(batch["pixels"]))
    batch = {"pixels": images(2, 8, 6)}
    net, found = fused(model, batch, channels_last=True)
    assert len(found.fused) == 1
    torch.testing.assert_close(
        run(net, batch["pixels"]), run(model, batch["pixels"]), rtol=1e-4, atol=1e-5
    )


def test_refusals():
    model = live(nn.Sequential(Block("modules"), nn.Conv2d(6, 2, 1)))
    x = images(2, 8, 6)
    with pytest.raises(ModelError, match=r"training mode. Call model.eval"):
        fused(copy.deepcopy(model).train(), x)
    net, _ = fused(model, x)
    with pytest.raises(ModelError, match=r"it is for inference. Train the original"):
        net(x.clone().requires_grad_())

    class Random(nn.Module):
        def forward(self, x):
            return x + torch.rand(())

    torch.manual_seed(0)
    with pytest.raises(ModelError, match=r"outputs differ by .* Evaluate without --fast"):
        fused(nn.Sequential(model, Random()).eval(), x)


def test_outputs_that_become_nan_are_a_difference():
    class Picky(nn.Module):
        def forward(self, x):
            return x + 1 if x.is_contiguous() else x + float("nan")

    x = images(2, 8, 6).abs()
    model = live(nn.Sequential(Block("modules"), Picky()))
    fused(model, x, channels_last=False)
    with pytest.raises(ModelError, match=r"outputs differ by .* Evaluate without --fast"):
        fused(model, x, channels_last=True)


# --- the parts ---


@st.composite
def finishes(draw):
    c = draw(st.sampled_from([1, 3, 8]))
    spatial = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    n = draw(st.integers(1, 5))
    x, residual = torch.randn(2, n, c, *spatial)
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    x = laid_out(x.to(dtype), draw(st.sampled_from(LAYOUTS)))
    residual = laid_out(residual.to(dtype), draw(st.sampled_from(LAYOUTS)))
    weight = draw(st.sampled_from([0.05, 1.0]))
    return x, residual, terms_for(c, weight=weight), draw(st.sampled_from(list(ACTIVATIONS)))


@given(case=finishes(), add=st.booleans(), far=st.booleans())
@settings(max_examples=120, deadline=None)
def test_what_follows_the_kernel_equals_what_followed_the_plain_form(case, add, far):
    x, residual, terms, name = case
    if far:
        x = x + 100  # channels that are done over must be finished once, too
    in_place, outside = ACTIVATIONS[name]
    before = residual.clone()
    finish = Finish(residual if add else None, in_place)
    y = kernels.evaluate(x, terms, finish)
    expected = oracle(x, terms)
    expected = outside(expected + residual.double() if add else expected)
    tolerance = 5e-2 if x.dtype == torch.bfloat16 else 5e-3 if far else 1e-3
    torch.testing.assert_close(y.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(residual, before)
    assert y.dtype == x.dtype


@given(case=finishes(), add=st.booleans(), bad=st.sampled_from(["none", "far", "nan", "inf"]))
@settings(max_examples=120, deadline=None)
def test_written_over_the_input_it_is_the_same_to_the_bit(case, add, bad):
    x, residual, terms, name = case
    if bad == "far":
        x[:, -1] += 3e4  # some channels, done over from an input that must still be there
    elif bad != "none":
        x[(-1,) * x.ndim] = float(bad)
    finish = Finish(residual if add else None, ACTIVATIONS[name][0])
    expected = kernels.evaluate(x, terms, finish)
    where = x.data_ptr()
    y = kernels.evaluate(x, terms, finish, overwrite=True)
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
    dense = x.is_contiguous() or x.movedim(1, -1).is_contiguous()
    if dense and x.numel() > x.shape[0] * x.shape[1]:
        assert y.data_ptr() == where


def test_only_what_nobody_else_reads_is_written_over():
    class Net(nn.Module):
        """Norms after convolutions that are read twice, that are hooked, and after none."""

        def __init__(self):
            super().__init__()
            self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(4))
            self.norms = nn.ModuleList(nn.BatchNorm2d(6) for _ in range(5))

        def forward(self, x):
            y = self.norms[0](x)
            z = self.convs[0](y)
            y = self.norms[1](z) + z.flatten(1)[:, :1, None, None]
            y = self.norms[2](self.convs[1](y))  # alone: nothing follows that it could do
            z = F.relu(self.norms[3](self.convs[2](y)))
            return F.relu(self.norms[4](self.convs[3](z)) + y)

    model = live(Net())
    seen = []
    model.convs[2].register_forward_hook(lambda module, args, output: seen.append(output))
    x = images(3, 8, 6)
    net, found = fused(model, x)
    assert found.overwriting == 2
    assert sorted(found.fused) == ["norms.1", "norms.3", "norms.4"]
    before = x.clone()
    torch.testing.assert_close(run(net, x), run(model, x), rtol=1e-4, atol=1e-5)
    assert torch.equal(x, before)
    torch.testing.assert_close(seen[-2], seen[-1], rtol=1e-4, atol=1e-5)
    assert "2 of them in place" in found.text


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_every_slab_gets_its_own_part_of_the_residual(layout):
    x, residual = (laid_out(torch.randn(9, 4, 260, 260), layout) for _ in range(2))
    terms = terms_for(4, weight=0.1)
    y = kernels.evaluate(x, terms, Finish(residual, torch.relu_))
    expected = torch.relu(oracle(x, terms) + residual.double())
    torch.testing.assert_close(y.double(), expected, rtol=1e-4, atol=1e-4)


CONVOLUTIONS = {
    "plain": nn.Conv2d(6, 8, 3, padding=1),
    "without bias": nn.Conv2d(6, 8, 3, bias=False),
    "grouped, strided": nn.Conv2d(6, 8, 3, stride=2, groups=2),
    "depthwise, dilated": nn.Conv2d(6, 6, 3, padding=(2, 1), dilation=(2, 1), groups=6),
    "pointwise": nn.Conv2d(6, 8, 1),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_a_prepacked_convolution_takes_any_size_and_layout(name):
    conv = CONVOLUTIONS[name]
    made = prepacked(conv, images(2, 8, 6))
    assert isinstance(made, PrepackedConv)
    for n, size in ((1, 5), (2, 8), (7, 11)):
        for layout in LAYOUTS:
            x = laid_out(images(n, size, 6), layout)
            torch.testing.assert_close(run(made, x), run(conv, x), rtol=1e-5, atol=1e-5)


def test_what_is_no_plain_convolution_is_not_prepacked():
    x = images(2, 8, 6)

    class Own(nn.Conv2d):
        """May do anything."""

    for conv in (
        Own(6, 8, 3), nn.Conv2d(6, 8, 3, padding="same"), nn.Conv1d(6, 8, 3), nn.Linear(8, 2),
        nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(6, 8, 3).double(),
    ):  # fmt: skip
        assert prepacked(conv, x) is None
    assert prepacked(nn.Conv2d(6, 8, 3).double(), x.double()) is None
    assert prepacked(nn.Conv2d(6, 8, 3), x[0]) is None
