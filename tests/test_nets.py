"""The tests' own networks are what they claim: real checkpoints fit, and give known counts."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from tests import nets
from tests.real import DATA, needs_data


def stock_state(name: str) -> dict[str, Tensor]:
    file = torch.load(DATA / name, map_location="cpu", weights_only=True)
    return {
        key.removeprefix("module."): value for key, value in file.get("state_dict", file).items()
    }


def load(net: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    missing, unexpected = net.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing), missing
    return net.eval()


def n_right(net: nn.Module, inputs: Tensor, labels: np.ndarray) -> int:
    with torch.inference_mode():
        guesses = torch.cat([net(part).argmax(1) for part in inputs.split(250)])
    return int((guesses == torch.from_numpy(labels)).sum())


@needs_data
@pytest.mark.parametrize(("name", "expected"), [("resnet20", 4070), ("resnet32", 4146)])
def test_cifar_checkpoints_fit_and_give_the_known_counts(name: str, expected: int) -> None:
    net = load(getattr(nets, name)(), stock_state(f"cifar10/{name}.th"))
    with np.load(DATA / "cifar10" / "test.npz", allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    inputs = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std
    # One image may flip with another build of torch.
    assert abs(n_right(net, inputs, labels) - expected) <= 1


@needs_data
def test_usps_checkpoint_fits_and_gives_the_known_count() -> None:
    net = nets.usps_net().eval()
    net.load_state_dict(stock_state("odd/usps.pth"), strict=True)
    with np.load(DATA / "mnist" / "test.npz", allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    bilinear = Image.Resampling.BILINEAR
    small = np.stack([np.asarray(Image.fromarray(i).resize((16, 16), bilinear)) for i in images])
    inputs = (torch.from_numpy(small).unsqueeze(1) / 255 - 0.2471) / 0.2994
    assert abs(n_right(net, inputs, labels) - 2040) <= 1


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (nets.plain, (2, 3, 8, 8)),
        (nets.residual, (2, 3, 8, 8)),
        (nets.shared_norm, (2, 3, 8, 8)),
        (nets.with_dropout, (2, 3, 8, 8)),
        (nets.bn1d, (2, 5)),
        (nets.bn3d, (2, 2, 4, 4, 4)),
        (nets.resnet20, (2, 3, 32, 32)),
        (nets.usps_net, (2, 1, 16, 16)),
    ],
)
def test_networks_take_their_input(build: Callable[..., nn.Module], shape: tuple[int, ...]) -> None:
    net = nets.lived_in(build(num_classes=5)).eval()
    inputs = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    first = net(inputs)
    assert first.shape == (shape[0], 5)
    assert first.isfinite().all()
    assert torch.equal(net(inputs), first)


def test_shared_norm_is_one_module_under_two_names() -> None:
    net = nets.shared_norm()
    assert net.first.bn is net.second.bn
    calls = []
    net.first.bn.register_forward_hook(lambda *_: calls.append(1))
    net.eval()(torch.zeros(1, 3, 4, 4))
    assert len(calls) == 2


def test_lived_in_leaves_no_norm_at_its_defaults() -> None:
    for build in (nets.plain, nets.bn1d, nets.bn3d):
        net = nets.lived_in(build())
        norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert norms
        for norm in norms:
            assert (norm.weight != 1).all()
            assert (norm.running_mean != 0).all()
            assert (norm.running_var != 1).all()
