"""Top-1 of copies with noisy weights: stored, population and noise-aware statistics.

    python benchmarks/weight_noise.py --data FOLDER     # the folder that BNFIX_DATA names

ResNet-20 of CIFAR-10; 1,000 images for the statistics, 8 copies for the noise-aware ones; tested on
2,000 images and 4 other copies. The spread is that of the copies. Ten minutes on a core.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.quality_cases import cases
from bnfix import find_norms, recalibrate_
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.recalibrate.targets import average_over_noise_, noisy_weights
from tests.real import DATA

SIZES, COPIES, OTHERS = (0.05, 0.1, 0.2), 8, 4


def with_spread_(net: nn.Module, batches: Sequence[Tensor], size: float) -> nn.Module:
    """Set the noise-aware statistics; in a copy the variance of the copies' means is added."""
    means: dict[str, list[Tensor]] = {site.name: [] for site in find_norms(net)}

    def measure() -> Calibration:
        found = recalibrate_(net, batches)
        for site in find_norms(net):
            means[site.name].append(site.module.running_mean.clone())
        return found

    average_over_noise_(net, measure, size, range(COPIES))
    other = copy.deepcopy(net)
    for site in find_norms(other):
        site.module.running_var += torch.stack(means[site.name]).var(0, correction=0)
    return other


def measured(net: nn.Module, x: Tensor, y: Tensor, size: float) -> tuple[np.ndarray, np.ndarray]:
    """Top-1 and NLL ``(copies, images)``."""
    right, losses = [], []
    for seed in range(2000, 2000 + OTHERS):
        with noisy_weights(net, size, seed), torch.inference_mode():
            z = torch.cat([net(part) for part in x.split(250)])
        right.append((z.argmax(1) == y).double().numpy())
        losses.append(nn.functional.cross_entropy(z, y, reduction="none").numpy())
    return np.stack(right), np.stack(losses)


def main() -> None:
    """Print a row for each size of the noise and each kind of statistics."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--case", default="resnet20")
    options = parser.parse_args()
    case = cases(options.data)[options.case]()
    pool, _, images, labels = case.images(0)
    pool = pool[np.random.default_rng(0).permutation(len(pool))[:1000]]
    test = np.random.default_rng(1).permutation(len(images))[:2000]
    x, y = case.inputs(images[test]), torch.from_numpy(np.asarray(labels)[test]).long()
    batches = case.inputs(pool).split(125)
    for size in SIZES:
        nets = {name: copy.deepcopy(case.net) for name in ("stored", "population", "noise")}
        recalibrate_(nets["population"], batches)
        nets["spread"] = with_spread_(nets["noise"], batches, size)
        found = {name: measured(net, x, y, size) for name, net in nets.items()}
        for name, (right, losses) in found.items():
            row = f"{size:g} {name}: {right.mean():.1%} (copies {right.mean(1).std(ddof=1):.1%})"
            both = zip((right, losses), found["population"], strict=True)
            pairs = [mine.mean(0) - theirs.mean(0) for mine, theirs in both]
            gains = [f"{d.mean():+.4f}+-{1.96 * d.std() / len(d) ** 0.5:.4f}" for d in pairs]
            print(row, f"NLL {losses.mean():.3f}; less population's {', '.join(gains)}", flush=True)


if __name__ == "__main__":
    main()
