"""Statistics predicted from the original without an image: top-1 before and after, and gaps.

python benchmarks/data_free.py [--n N]
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import nn

from bnfix.recalibrate.reference import match_predicted_, predicted_gaps
from tests import nets, real

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def network(name: str) -> nn.Module:
    """A public CIFAR network with its weights."""
    net: nn.Module = (nets.resnet32 if "32" in name else nets.resnet20)()
    path = real.DATA / "cifar10" / f"{name}.th"
    state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
    net.load_state_dict({k.removeprefix("module."): v for k, v in state.items()}, strict=False)
    return net.eval()


def pruned(weight: torch.Tensor, part: float) -> None:
    """Set the smallest values of a weight to 0."""
    weight[weight.abs() <= weight.abs().flatten().kthvalue(int(part * weight.numel())).values] = 0


def rounded(weight: torch.Tensor, bits: int) -> None:
    """Round a weight to a grid over its largest value."""
    step = weight.abs().max() / (2 ** (bits - 1) - 1)
    weight.copy_((weight / step).round() * step)


DAMAGE: dict[str, Callable[[torch.Tensor], None]] = {
    "50% pruned": partial(pruned, part=0.5),
    "70% pruned": partial(pruned, part=0.7),
    "4 bits": partial(rounded, bits=4),
    "3 bits": partial(rounded, bits=3),
}


@torch.no_grad()
def main() -> None:
    """Print a row a network and damage."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=1000)
    n = parser.parse_args().n
    found = np.load(real.DATA / "cifar10" / "test.npz")
    x = torch.from_numpy(found["images"][:n]).permute(0, 3, 1, 2).float() / 255
    x = (x - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    y = torch.from_numpy(found["labels"][:n])

    def top1(net: nn.Module) -> float:
        return 100 * float((net(x).argmax(1) == y).double().mean())

    def gap(net: nn.Module) -> float:
        return median(predicted_gaps(net).values())

    for name in ("resnet20", "resnet20_b", "resnet32"):
        original = network(name)
        print(f"{name}: {top1(original):.1f}, gap {gap(original):.3f}", flush=True)
        for kind, damage in DAMAGE.items():
            net = copy.deepcopy(original)
            for module in net.modules():
                if isinstance(module, nn.Conv2d):
                    damage(module.weight.data)
            before, wide = top1(net), gap(net)
            match_predicted_(net, original)
            print(f"  {kind}: {before:.1f} to {top1(net):.1f}, gap {wide:.3f}", flush=True)


if __name__ == "__main__":
    main()
