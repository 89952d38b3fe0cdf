"""The cases of quality.py: a checkpoint, images to calibrate on, images to test on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from benchmarks import small_batch
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.data.corruptions import Corruption
from bnfix.demo import PREPROCESSING as DIGITS
from bnfix.demo import SPEC as DIGITS_SPEC
from bnfix.demo import checkpoint_path, digits
from bnfix.demo.network import digits_net
from tests import nets

ROOT = Path(__file__).resolve().parents[1]
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class Case:
    """A checkpoint and two sets of images, uint8 (N, H, W, C), of the size that it takes."""

    name: str
    net: nn.Module
    spec: str
    norm: tuple[tuple[float, ...], tuple[float, ...]]
    images: Callable[[int], tuple[Any, Any, Any, Any]] = field(repr=False)
    train_batch_size: int
    fixed: bool = True
    size: int = 64

    @cached_property
    def _constants(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in self.norm)
        return mean, std

    def inputs(self, images: np.ndarray) -> Tensor:
        mean, std = self._constants
        return (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - mean) / std


class Batches:
    """Batches made from 8-bit images when they are asked for, the same in every pass."""

    def __init__(self, case: Case, images: np.ndarray, labels: np.ndarray, size: int) -> None:
        self.case, self.images, self.labels, self.size = case, images, labels, size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(0, len(self.labels), self.size):
            part = slice(i, i + self.size)
            yield self.case.inputs(self.images[part]), torch.from_numpy(self.labels[part])


def stored(net: nn.Module, file: Path) -> nn.Module:
    net.load_state_dict(read_checkpoint(file).tensors, strict=False)  # old: no batch counters
    return net.eval()


def arrays(file: Path) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as data:
        return data["images"], data["labels"].astype(np.int64)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    way = Image.Resampling.BILINEAR
    made = [np.asarray(Image.fromarray(image).resize((size, size), way)) for image in images]
    return np.stack(made)


def halves(images: np.ndarray, labels: np.ndarray, part: float, seed: int) -> tuple[Any, ...]:
    order = np.random.default_rng(seed).permutation(len(labels))
    cal, test = np.split(order, [round(part * len(order))])
    return images[cal], labels[cal], images[test], labels[test]


def cifar(name: str, build: Callable[[], nn.Module], data: Path) -> Case:
    fit, test = (arrays(data / f"cifar10/{part}.npz") for part in ("calibration", "test"))
    spec = f"{ROOT}/tests/nets.py:{build.__name__}"
    net = stored(build(), data / f"cifar10/{name}.th")
    return Case(name, net, spec, IMAGENET, lambda _: (*fit, *test), 128)


def usps(data: Path) -> Case:
    def images(_: int) -> tuple[Any, ...]:
        found: list[Any] = []
        for part in ("calibration", "test"):
            pixels, labels = arrays(data / f"mnist/{part}.npz")
            found += [resized(pixels, 16)[..., None], labels]
        return tuple(found)

    net = stored(nets.usps_net(), data / "odd/usps.pth")
    spec = f"{ROOT}/tests/nets.py:usps_net"
    return Case("usps on mnist", net, spec, ((0.2471,), (0.2994,)), images, 64)


def demo(data: Path) -> Case:
    def images(_: int) -> tuple[Any, ...]:
        (x, y), (xt, yt) = digits("calibration"), digits("test")
        return x[..., None], y, xt[..., None], yt

    with checkpoint_path() as path:
        net = stored(digits_net(), path)
    return Case("demo digits", net, DIGITS_SPEC, (DIGITS.mean, DIGITS.std), images, 4)


def batch2(data: Path) -> Case:
    net = small_batch.trained(data)
    x, y = arrays(data / "cifar10/test.npz")  # the other file was trained on
    spec = f"{ROOT}/benchmarks/small_batch.py:network"
    return Case("batch of 2", net, spec, IMAGENET, lambda s: halves(x, y, 0.5, s), 2, fixed=False)


def imagenet(
    name: str, data: Path, *, corruption: str | None = None, scale: float = 1.0
) -> Callable[[], Case]:
    side = round(224 * scale)

    def images(seed: int) -> tuple[Any, ...]:
        folder = data / "imagenet-val"
        rows = (folder / "labels.csv").read_text().split()[1:]
        pixels, labels = [], []
        spoil = None if corruption is None else Corruption(corruption, 2)
        for position, row in enumerate(rows):
            file, label = row.rsplit(",", 1)
            with Image.open(folder / file) as opened:
                image = opened.convert("RGB")
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            image = image.crop((left, top, left + 224, top + 224))
            if side != 224:
                image = image.resize((side, side), Image.Resampling.BILINEAR)
            array = np.asarray(image)
            pixels.append(array if spoil is None else spoil.apply(array, position))
            labels.append(int(label))
        return halves(np.stack(pixels), np.array(labels), 0.6, seed)

    def build() -> Case:
        full = f"{name}, {corruption or ('0.75 of the size' if scale != 1 else 'clean')}"
        if name == "mobilenet_v2":
            import torchvision

            net = stored(torchvision.models.mobilenet_v2(), data / "mobilenet_v2-b0353104.pth")
            spec, norm, size = "torchvision:mobilenet_v2", IMAGENET, 32
        else:
            import timm

            net = timm.create_model("tf_efficientnet_lite0")
            net = stored(net, data / "efficientnet_lite0.safetensors")
            spec = "timm:tf_efficientnet_lite0"
            norm, size = ((127 / 255,) * 3, (128 / 255,) * 3), 128
        return Case(full, net, spec, norm, images, size, fixed=False, size=16)

    return build


def cases(data: Path) -> dict[str, Callable[[], Case]]:
    found: dict[str, Callable[[], Case]] = {
        "demo": lambda: demo(data),
        "usps": lambda: usps(data),
        "resnet20": lambda: cifar("resnet20", nets.resnet20, data),
        "resnet20_b": lambda: cifar("resnet20_b", nets.resnet20, data),
        "resnet32": lambda: cifar("resnet32", nets.resnet32, data),
        "batch2": lambda: batch2(data),
    }
    for short, name in (("mobilenet", "mobilenet_v2"), ("lite0", "efficientnet_lite0")):
        found[short] = imagenet(name, data)
        found[f"{short}-small"] = imagenet(name, data, scale=0.75)
        for kind in ("noise", "blur", "jpeg"):
            found[f"{short}-{kind}"] = imagenet(name, data, corruption=kind)
    return found
