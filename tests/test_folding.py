"""Folding against the model before it, and what must be left alone."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import ModelError, set_example_weight_, swap_norms_
from bnfix.core.runtime import set_forward_
from bnfix.deploy.fold import optimize_
from tests import nets

IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def outputs(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model(x)


def norms_in(model: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())


def small(layer: nn.Module, norm: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nets.lived_in(nn.Sequential(layer, norm, nn.ReLU())).eval()


LAYERS = {
    "conv1d": (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), (2, 3, 9)),
    "conv2d with bias": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), (2, 3, 7, 7)),
    "conv2d without": (nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 3, 7, 7)),
    "reflecting": (
        nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 3, 7, 7),
    ),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6), (2, 4, 7, 7)),
    "depthwise": (nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6), (2, 6, 7, 7)),
    "conv3d": (nn.Conv3d(2, 4, 3, bias=False), nn.BatchNorm3d(4), (2, 2, 5, 5, 5)),
    "transposed 1d": (nn.ConvTranspose1d(3, 6, 3, stride=2), nn.BatchNorm1d(6), (2, 3, 5)),
    "transposed 2d": (nn.ConvTranspose2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 3, 5, 5)),
    "transposed grouped": (
        nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 5, 5),
    ),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 2), nn.BatchNorm3d(4), (2, 2, 3, 3, 3)),
    "linear": (nn.Linear(5, 6), nn.BatchNorm1d(6), (4, 5)),
    "without scale": (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 3, 7, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_norm_goes_into_the_layer_before_it(name):
    layer, norm, shape = LAYERS[name]
    model = small(copy.deepcopy(layer), copy.deepcopy(norm))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    before = outputs(model, x)
    found = optimize_(model, x)
    assert [(f.norm, f.layer, f.kind) for f in found.folded] == [("1", "0", type(layer).__name__)]
    assert found.left == {}
    assert found.checked_on == "example"
    assert norms_in(model) == 0
    assert before.abs().max() > 0.5  # or the comparison would say little
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_arithmetic_is_done_in_float64_and_rounded_once(dtype):
    model = small(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)).to(dtype)
    conv, norm = copy.deepcopy(model[0]).double(), copy.deepcopy(model[1]).double()
    optimize_(model, IMAGES.to(dtype))
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (conv.weight * scale[:, None, None, None]).to(dtype)
    bias = ((conv.bias - norm.running_mean) * scale + norm.bias).to(dtype)
    tolerance = 1e-12 if dtype == torch.float64 else 0
    torch.testing.assert_close(model[0].weight.data, weight.data, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(model[0].bias.data, bias.data, rtol=0, atol=1e-12)


def test_weights_that_do_not_fit_a_half_type_are_left_alone():
    model = small(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-12))
    model[1].running_var.fill_(1e-11)
    found = optimize_(model.half(), IMAGES.half())
    assert found.folded == ()
    assert "do not fit into torch.float16" in found.left["1"]


def test_whole_networks_lose_all_their_norms():
    for build, size in ((nets.resnet20, 32), (torchvision.models.mobilenet_v2, 32)):
        model = nets.lived_in(build()).eval()
        x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
        before = outputs(model, x)
        found = optimize_(model, x)
        assert found.left == {}
        assert norms_in(model) == 0
        assert max(fold.difference for fold in found.folded) < 1e-5
        torch.testing.assert_close(outputs(model, x), before, rtol=1e-4, atol=1e-5)


def test_an_example_has_any_form_that_the_model_takes():
    for build in (nets.plain, nets.bn1d):
        model = nets.lived_in(build()).eval()
        x = IMAGES if build is nets.plain else torch.randn(4, 5)
        before = outputs(model, x)
        set_forward_(model, lambda net, batch: net(batch["first"]))
        found = optimize_(model, {"first": x, "second": "a name"})
        assert (found.left, found.checked_on, found.traced_by) == ({}, "example", "torch.fx")
        torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=1e-6)


def test_live_layers_and_groups():
    model = nets.lived_in(nets.plain()).eval()
    swap_norms_(model, to="batch-group", channel_groups=2)
    set_example_weight_(model, {"bn2": 0.3})
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    before = outputs(model, x)
    found = optimize_(model, x)
    assert [fold.norm for fold in found.folded] == ["bn1"]
    assert found.left == {"bn2": "weighs the example (example weight above 0)"}
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=1e-6)


class Odd(nn.Module):
    """What must not be folded, each for its own reason."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.bn_twice = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.seen, self.bn_seen = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.read, self.bn_read = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.tied, self.bn_tied = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.other = nn.Conv2d(3, 3, 1)
        self.other.weight = self.tied.weight
        self.bn_relu, self.bn_input = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.bn_shared, self.unused = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.hooked, self.bn_hooked = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
        self.hooked.register_forward_hook(lambda module, inputs, output: output + 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn_input(x)
        x = self.bn_twice(self.twice(self.twice(x)))
        y = self.seen(x)
        x = self.bn_seen(y) + y
        x = self.bn_read(self.read(x)) + F.conv2d(x, self.read.weight)
        x = self.bn_tied(self.tied(x)) + self.other(x)
        x = self.bn_relu(F.relu(x))
        x = self.bn_shared(self.bn_shared(x))
        return self.bn_hooked(self.hooked(x))


REASONS = {
    "bn_input": "follows x, not a convolution",
    "bn_twice": "twice is shared: it is called 2 times",
    "bn_seen": "the output of seen is also used elsewhere",
    "bn_read": "the weights of read are also used elsewhere",
    "bn_tied": "tied shares its weights with another layer",
    "bn_relu": "follows relu, not a convolution",
    "bn_shared": "is called 2 times per pass",
    "unused": "is not called",
    "bn_hooked": "hooked has hooks",
}


class Branching(nn.Module):
    """Traced by torch.export only."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] > 300:
            raise ValueError("too large")
        return self.inner(x)


@pytest.mark.parametrize("tool", ["torch.fx", "torch.export"])
def test_what_must_not_be_folded_is_left_and_listed(tool):
    torch.manual_seed(0)
    inner = nets.lived_in(Odd()).eval()
    model, prefix = (inner, "") if tool == "torch.fx" else (Branching(inner).eval(), "inner.")
    x = torch.randn(2, 3, 5, 5)
    before = outputs(model, x)
    found = optimize_(model, x)
    assert found.traced_by == tool
    assert found.folded == ()
    for name, reason in REASONS.items():
        told = found.left[f"{prefix}{name}"].replace("inner.", "")
        if tool == "torch.export" and name == "bn_tied":
            reason = "the weights of tied are also used elsewhere"
        assert reason in told, (name, told)
    assert torch.equal(outputs(model, x), before)


def test_where_torch_fx_cannot_trace_torch_export_does():
    model = Branching(nets.lived_in(nets.residual())).eval()
    x = torch.randn(2, 3, 8, 8)
    before = outputs(model, x)
    found = optimize_(model, x)
    assert (len(found.folded), found.traced_by) == (5, "torch.export")
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-5, atol=1e-6)


def test_what_cannot_be_traced_is_refused_and_left_as_it_was():
    class Untraceable(nets.Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum().item() > 0 else -x)

    model = Untraceable(4, 3).eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"neither torch.fx .* nor torch.export .* can trace"):
        optimize_(model, torch.randn(2, 3, 8, 8))
    set_forward_(model, lambda net, batch: net(batch["pixels"]))
    with pytest.raises(ModelError, match=r"folding: torch.fx cannot trace the model"):
        optimize_(model, {"pixels": IMAGES})
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())


def test_a_model_whose_outputs_would_change_is_put_back():
    class Loud(nets.Plain):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x).double() * 1e9).frac()

    model = nets.lived_in(Loud(4, 3)).eval()
    kept = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match=r"each layer keeps its outputs, but the whole model's"):
        optimize_(model, torch.randn(2, 3, 8, 8))
    assert dict(model.named_modules()) == kept
    assert all(torch.equal(t, state[name]) for name, t in model.state_dict().items())
    assert model.state_dict().keys() == state.keys()


def test_layers_that_are_also_held_in_a_plain_list_follow():
    model = nets.lived_in(nets.held_outside()).eval()
    x = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    before = outputs(model, x)
    assert len(optimize_(model, x).folded) == 2
    torch.testing.assert_close(outputs(model, x), before)
    assert norms_in(model) == 0


def test_training_mode_is_refused():
    with pytest.raises(ModelError, match=r"folding: the model is in training mode"):
        optimize_(nets.plain(), IMAGES)


def test_statistics_that_are_not_finite_or_not_there_are_left():
    model = nets.lived_in(nets.plain()).eval()
    model.bn1.running_var[0] = float("nan")
    model.bn2 = nn.BatchNorm2d(4, track_running_stats=False).eval()
    left = optimize_(model, IMAGES).left
    assert left["bn1"] == "its statistics are not finite"
    assert left["bn2"] == "keeps no population statistics"


def test_dropout_between_is_looked_through_only_where_it_is_silent():
    model = nets.lived_in(nets.with_dropout()).eval()
    noisy = copy.deepcopy(model)
    noisy[1].train()
    assert len(optimize_(model, IMAGES).folded) == 1
    assert optimize_(noisy, IMAGES).left["2"].startswith("follows 1 (Dropout2d)")


def test_a_linear_layer_whose_last_axis_is_not_the_norms_is_left():
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.bn = nn.Linear(6, 6), nn.BatchNorm1d(6)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.fc(x))

    model = nets.lived_in(Sequence()).eval()
    x = torch.randn(2, 6, 6)
    before = outputs(model, x)
    assert "3 axes" in optimize_(model, x).left["bn"]
    assert torch.equal(outputs(model, x), before)


def test_timm_keeps_its_activation():
    timm = pytest.importorskip("timm")
    model = nets.lived_in(timm.create_model("tf_efficientnet_lite0", num_classes=3)).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    before = outputs(model, x)
    found = optimize_(model, x)
    assert found.left == {}
    assert len(found.folded) == 49
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-4, atol=1e-4)
