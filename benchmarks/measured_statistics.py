"""Population statistics by bnfix and by others: their error and their cost.

    python benchmarks/measured_statistics.py --data FOLDER        # the folder that BNFIX_DATA names

First table: the worst layer's distance from the statistics that the same weights give in float64
with all images as one training batch; mean over the layer's channels of |mean shift| / sqrt(var +
eps) and of |log variance ratio|. Second table: processor time. What new statistics do to the
accuracy is in statistics_accuracy.py.
Needs the real checkpoints and images; fvcore is compared where it is installed. Minutes on 2 cores.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import recalibrate_
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core.memory import keep_freed_memory
from bnfix.norm.sites import find_norms
from tests import nets
from tests.real import DATA

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn.precise_bn import update_bn_stats
except ImportError:
    update_bn_stats = None

Way = Callable[[nn.Module, list[Tensor]], object]


def by_fvcore(model: nn.Module, batches: list[Tensor]) -> None:
    model.train()
    update_bn_stats(model, batches, num_iters=len(batches))


def ways() -> dict[str, Way]:
    found: dict[str, Way] = {
        "torch update_bn": lambda m, b: torch.optim.swa_utils.update_bn(b, m.train()),
    }
    if update_bn_stats is None:
        print("fvcore is not installed, so it is left out (pip install fvcore).\n")
    else:
        found["fvcore update_bn_stats"] = by_fvcore
    found["bnfix, batch"] = recalibrate_
    found["bnfix, sequential"] = lambda m, b: recalibrate_(m, b, feed="sequential")
    return found


def checkpoint(net: nn.Module, file: Path) -> nn.Module:
    net.load_state_dict(read_checkpoint(file).tensors, strict=False)  # old: no batch counters
    return net.eval()


def cifar(file: Path, n: int, size: int = 32) -> tuple[Tensor, Tensor]:
    with np.load(file) as data:
        chosen = np.random.default_rng(0).permutation(len(data["labels"]))[:n]
        images, labels = data["images"][chosen], torch.tensor(data["labels"][chosen])
    x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
    if size != 32:
        x = F.interpolate(x, size, mode="bilinear", antialias=True)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean.view(3, 1, 1)) / std.view(3, 1, 1), labels


# --- the error of the estimate ---


@torch.no_grad()
def truth(net: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """What every layer meets in float64 with all images as one training batch."""
    net = copy.deepcopy(net).double().train()
    found = {}
    for site in find_norms(net):

        def keep(_, args, name=site.name):
            found[name] = (args[0].mean((0, 2, 3)), args[0].var((0, 2, 3), correction=0))

        site.module.register_forward_pre_hook(keep)
    net(x.double())
    return found


def worst(net: nn.Module, expected: dict[str, tuple[Tensor, Tensor]]) -> tuple[float, float]:
    shifts, ratios = [], []
    for site in find_norms(net):
        mean, var = expected[site.name]
        own = site.module
        spread = var + own.eps
        shifts.append(((own.running_mean.double() - mean).abs() / spread.sqrt()).mean().item())
        ratios.append(((own.running_var.double() + own.eps) / spread).log().abs().mean().item())
    return max(shifts), max(ratios)


def errors(data: Path) -> None:
    net20 = checkpoint(nets.resnet20(), data / "cifar10/resnet20.th")
    net32 = checkpoint(nets.resnet32(), data / "cifar10/resnet32.th")
    x, labels = cifar(data / "cifar10/calibration.npz", 512)
    classes = labels.argsort(stable=True)
    before = nn.Sequential(nn.BatchNorm2d(3), net20)
    cases = [
        ("batch 2", net20, x, 2),
        ("batch 4", net20, x, 4),
        ("batch 32", net20, x, 32),
        ("batch 32, last batch 1", net20, x[:481], 32),
        ("batch 32, sorted by class", net20, x[classes], 32),
        ("batch 32, input mean 3,000 sd", before, x + 3000, 32),
        ("ResNet-32, batch 4", net32, x, 4),
    ]
    found = ways()
    print(f"ResNet-20, {len(x)} images; worst layer: mean shift / log variance ratio\n")
    print("| | " + " | ".join(found) + " |\n|---|" + "--:|" * len(found))
    for name, net, images, size in cases:
        expected, cells = truth(net, images), []
        for way in found.values():
            model = copy.deepcopy(net)
            way(model, list(images.split(size)))
            cells.append("{:.2g} / {:.2g}".format(*worst(model, expected)))
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


# --- what it costs ---


def speed(data: Path, repeats: int = 3) -> None:
    """Alternating runs; processor time, which other programs disturb less than wall time."""
    net = checkpoint(nets.resnet20(), data / "cifar10/resnet20.th")
    batches = list(cifar(data / "cifar10/calibration.npz", 2000)[0].split(128))

    @torch.no_grad()
    def bare(model: nn.Module, batches: list[Tensor]) -> None:
        model.eval()
        for batch in batches:
            model(batch)

    every: dict[str, Way] = {"bare forward": bare, **ways()}
    seconds: dict[str, list[float]] = {name: [] for name in every}
    for _ in range(repeats + 1):
        for name, way in every.items():
            started = time.process_time()
            way(net, batches)
            seconds[name].append(time.process_time() - started)
    print("\nProcessor time by that of a bare forward pass, 2,000 images, batches of 128, median\n")
    print("| | ratio |\n|---|--:|")
    for name, own in seconds.items():
        ratios = [a / b for a, b in zip(own, seconds["bare forward"], strict=True)][1:]
        print(f"| {name} | {np.median(ratios):.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not (arguments.data / "cifar10/resnet20.th").is_file():
        sys.exit(f"{arguments.data}: the real checkpoints and images are not there (--data).")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    errors(arguments.data)
    speed(arguments.data)


if __name__ == "__main__":
    main()
