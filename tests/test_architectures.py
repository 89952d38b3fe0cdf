"""Networks as the libraries build them, through convert, save and load: the same outputs.

Random weights and random statistics, the smallest variant of each family, small inputs. A line of
the table is a spec, the side of its input, and what it is built with.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

import bnfix
from bnfix.core.errors import NormError
from bnfix.core.runtime import tensors_in
from bnfix.core.settings import ModelRecipe, SwapRecipe
from bnfix.jobs.convert import convert
from bnfix.models.build import build_model

Case = tuple[str, int, dict[str, Any]]

SMALL = {"num_classes": 3}
CASES: list[Case] = [
    ("torchvision:resnet18", 32, SMALL),
    ("torchvision:resnext50_32x4d", 32, SMALL),
    ("torchvision:regnet_y_400mf", 32, SMALL),
    ("torchvision:regnet_x_400mf", 32, SMALL),
    ("torchvision:efficientnet_b0", 32, SMALL),
    ("torchvision:mobilenet_v2", 32, SMALL),
    ("torchvision:mobilenet_v3_small", 32, SMALL),
    ("torchvision:densenet121", 32, SMALL),
    ("torchvision:googlenet", 64, {**SMALL, "aux_logits": False}),
    ("torchvision:inception_v3", 75, {**SMALL, "aux_logits": False}),
    ("torchvision:shufflenet_v2_x0_5", 32, SMALL),
    ("torchvision:mnasnet0_5", 32, SMALL),
    ("torchvision:lraspp_mobilenet_v3_large", 64, SMALL),
    ("torchvision:deeplabv3_mobilenet_v3_large", 64, SMALL),
    ("torchvision:ssdlite320_mobilenet_v3_large", 64, SMALL),
    (
        "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn",
        64,
        {**SMALL, "min_size": 64, "max_size": 64},
    ),
    ("timm:resnet10t", 32, SMALL),
    ("timm:resnetv2_18d", 32, SMALL),
    ("timm:regnetx_002", 32, SMALL),
    ("timm:regnety_002", 32, SMALL),
    ("timm:efficientnet_lite0", 32, SMALL),
    ("timm:tf_efficientnet_lite0", 32, SMALL),
    ("timm:mobilenetv3_small_050", 32, SMALL),
    ("timm:mobilenetv4_conv_small_035", 32, SMALL),
    ("timm:ghostnet_050", 32, SMALL),
    ("timm:ghostnetv2_100", 64, SMALL),
    ("timm:dla46_c", 32, SMALL),
    ("timm:hrnet_w18_small", 64, SMALL),
    ("timm:repvgg_a0", 32, SMALL),
    ("timm:hardcorenas_a", 32, SMALL),
    ("timm:cspresnet50", 32, SMALL),
    ("timm:lcnet_035", 32, SMALL),
    ("timm:tinynet_e", 32, SMALL),
    ("timm:mixnet_s", 32, SMALL),
    ("timm:semnasnet_050", 32, SMALL),
    ("timm:levit_128s", 224, SMALL),
    ("timm:selecsls42", 64, SMALL),
    ("timm:test_resnet", 32, SMALL),
    ("timm:test_byobnet", 32, SMALL),
]
#: What takes seconds each: with BNFIX_ALL_ARCHITECTURES=1.
WIDE: list[Case] = [
    ("torchvision:vgg11_bn", 32, SMALL),
    ("torchvision:wide_resnet50_2", 32, SMALL),
    ("torchvision:resnet152", 32, SMALL),
    ("torchvision:efficientnet_v2_s", 32, SMALL),
    ("torchvision:fcn_resnet50", 32, SMALL),
    ("torchvision:deeplabv3_resnet50", 32, SMALL),
    ("torchvision:fasterrcnn_resnet50_fpn", 64, {**SMALL, "min_size": 64, "max_size": 64}),
    ("torchvision:retinanet_resnet50_fpn", 64, {**SMALL, "min_size": 64, "max_size": 64}),
    ("torchvision:maskrcnn_resnet50_fpn", 64, {**SMALL, "min_size": 64, "max_size": 64}),
    ("timm:dla34", 32, SMALL),
    ("timm:densenet121", 32, SMALL),
    ("timm:inception_v3", 75, SMALL),
    ("timm:xception41", 64, SMALL),
    ("timm:seresnet50", 32, SMALL),
    ("timm:resnest14d", 32, SMALL),
    ("timm:res2net50_26w_4s", 32, SMALL),
    ("timm:skresnet18", 32, SMALL),
    ("timm:vovnet39a", 32, SMALL),
    ("timm:dpn48b", 32, SMALL),
    ("timm:hgnet_tiny", 32, SMALL),
    ("timm:repvit_m1", 64, SMALL),
    ("timm:fastvit_t8", 64, SMALL),
    ("timm:tresnet_m", 64, SMALL),
]
#: Without any Batch Norm: refused in words.
WITHOUT: list[Case] = [
    ("torchvision:convnext_tiny", 32, SMALL),
    ("torchvision:squeezenet1_1", 64, SMALL),
    ("timm:convnext_atto", 32, SMALL),
    ("timm:nf_regnet_b0", 32, SMALL),
]
CHOSEN = CASES + (WIDE if os.environ.get("BNFIX_ALL_ARCHITECTURES") else [])


def randomized(spec: str, arguments: dict[str, Any]) -> nn.Module:
    """A network whose every norm layer has statistics, scale and shift of its own."""
    torch.manual_seed(0)
    model = build_model(spec, arguments)
    for module in model.modules():
        if hasattr(module, "running_var"):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            if module.weight is not None:
                with torch.no_grad():
                    module.weight.uniform_(0.8, 1.2)
                    module.bias.normal_(0, 0.1)
    return model


def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a model gives, flat; of a detector, what its backbone gives."""
    detects = hasattr(model, "roi_heads") or hasattr(model, "anchor_generator")
    backbone = model.backbone if detects else model
    with torch.no_grad():
        return torch.cat([t.flatten() for t in tensors_in(backbone.eval()(x))])


def ids(cases: list[Case]) -> list[str]:
    return [spec for spec, _, _ in cases]


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning")
@pytest.mark.parametrize(("spec", "side", "arguments"), CHOSEN, ids=ids(CHOSEN))
def test_an_architecture_goes_through(spec, side, arguments, tmp_path):
    model = randomized(spec, arguments)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    recipe = ModelRecipe(spec, tuple(arguments.items()))
    out = tmp_path / "out.safetensors"
    result = convert(
        tmp_path / "net.pth",
        model=recipe,
        swap=SwapRecipe(to="batch-group"),
        input_shape=(3, side, side),
    )
    result.save(out)
    torch.manual_seed(1)
    x = torch.randn(2, 3, side, side)
    expected = outputs(model, x)
    scale = expected.abs().max().clamp_min(1)
    loaded = bnfix.load(out)
    n_norms = sum(hasattr(module, "running_var") for module in model.modules())
    assert len(result.report.swap.changes) == n_norms
    torch.testing.assert_close(outputs(loaded, x) / scale, expected / scale, atol=1e-4, rtol=0)
    stock = build_model(spec, arguments)
    state: Any = load_file(out)
    if "mnasnet" in spec:  # wants to be told the version of its own layout, which no such file says
        stock_state = stock.state_dict()
        stock_state.update(state)
        assert set(stock_state) == set(state)
        state = stock_state
    stock.load_state_dict(state, strict=True)
    torch.testing.assert_close(outputs(stock, x) / scale, expected / scale, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("spec", "side", "arguments"), WITHOUT, ids=ids(WITHOUT))
def test_an_architecture_without_batch_norm_is_refused(spec, side, arguments, tmp_path):
    torch.save(build_model(spec, arguments).state_dict(), tmp_path / "net.pth")
    recipe = ModelRecipe(spec, tuple(arguments.items()))
    with pytest.raises(NormError, match="it has no Batch Norm layer; there is nothing to swap"):
        convert(tmp_path / "net.pth", model=recipe, input_shape=(3, side, side))


def test_there_are_at_least_thirty_of_both_libraries():
    families = {spec.partition(":")[0] for spec in ids(CASES)}
    assert len(set(ids(CASES))) == len(CASES) >= 30
    assert families == {"torchvision", "timm"}


def test_a_detector_whose_file_has_no_counters_gets_constant_norms(tmp_path: Path):
    spec, arguments = "torchvision:fasterrcnn_mobilenet_v3_large_320_fpn", {"num_classes": 3}
    state = randomized(spec, arguments).state_dict()
    kept = {n: t for n, t in state.items() if not n.endswith("num_batches_tracked")}
    kinds = {type(m) for m in build_model(spec, arguments, kept).modules()}
    assert FrozenBatchNorm2d in kinds
    assert nn.BatchNorm2d not in kinds
    kinds = {type(m) for m in build_model(spec, arguments, state).modules()}
    assert FrozenBatchNorm2d not in kinds
