"""A small ResNet trained with batches of 2, and how much of the labelled gain `match` recovers.

    python benchmarks/small_batch.py --data FOLDER [--checkpoint FILE] [--seeds 3]

The network (a CIFAR ResNet with one block a stage) is trained on the 5,000 images of the
calibration file, unless the checkpoint is there already. Half of the test file is for statistics
and weights, the other half for the numbers. Gains are in NLL over population statistics with
weight 0; "labelled" is one weight chosen by labels, and one learned per channel.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import choose_example_weight_, evaluate, recalibrate_, set_example_weight_, swap_norms_
from bnfix.core.settings import WeightRecipe
from bnfix.weights.choose import weighable_layers
from bnfix.weights.label_free import fit_moments_, fit_predictions_
from tests.nets import CifarResNet
from tests.real import DATA

BATCH = 2
CHECKPOINT = Path(__file__).parent / "results" / "small_batch.safetensors"


def images(file: Path) -> tuple[Tensor, Tensor]:
    with np.load(file) as data:
        x, y = torch.tensor(data["images"]), torch.tensor(data["labels"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous(), y


def network() -> nn.Module:
    return CifarResNet(1, 10)


def train(x: Tensor, y: Tensor, epochs: int = 20, seed: int = 0) -> nn.Module:
    """SGD with batches of 2, mirrored at random; the rate falls by cosine."""
    torch.manual_seed(seed)
    net = network().train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)
    n_steps = epochs * (len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 0.01, n_steps, pct_start=0.1, cycle_momentum=False
    )
    started = time.perf_counter()
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(x)).split(BATCH):
            batch = x[chosen]
            if torch.rand(()) < 0.5:
                batch = batch.flip(-1)
            optimizer.zero_grad()
            loss = F.cross_entropy(net(batch), y[chosen])
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item()
        mean = total / (len(x) // BATCH)
        print(f"epoch {epoch + 1}: {mean:.3f}, {time.perf_counter() - started:.0f} s", flush=True)
    return net.eval()


def trained(data: Path, file: Path = CHECKPOINT) -> nn.Module:
    """The network of the file, trained now if it is not there."""
    net = network()
    if file.is_file():
        net.load_state_dict(load_file(file))
        return net.eval()
    net = train(*images(data / "cifar10/calibration.npz"))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(net.state_dict(), file)
    return net


def batches(x: Tensor, y: Tensor, chosen: Tensor, size: int = 64) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for i in chosen.split(size)]


def measure(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> dict[str, tuple[float, ...]]:
    """Top-1, NLL and scaled NLL of every way, and the mean weight."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    half = len(x) // 2
    fit, test = batches(x, y, order[:half]), batches(x, y, order[half:], 250)
    bare = [inputs for inputs, _ in fit]
    found = {}

    def add(name: str, model: nn.Module) -> None:
        m = evaluate(model, test)
        weights = [w for n, w in model.named_buffers() if n.endswith("example_weight")]
        mean = float(torch.stack([w.mean() for w in weights]).mean()) if weights else 0.0
        found[name] = (m.top1, m.nll, m.nll_temperature_scaled, mean)
        print(f"seed {seed} {name}: {found[name]}", flush=True)

    swapped = copy.deepcopy(net)
    swap_norms_(swapped, example_weight=0.0)
    add("as it was", swapped)
    layers = list(weighable_layers(swapped, fit)[0])
    bases = {}
    for target in ("population", "train-batch"):
        bases[target] = copy.deepcopy(swapped)
        size = BATCH if target == "train-batch" else None
        recalibrate_(bases[target], bare, target=target, train_batch_size=size, feed="sequential")
        add(f"{target} statistics, weight 0", bases[target])
    for granularity in ("global", "channel"):
        for target, base in bases.items():
            model = copy.deepcopy(base)
            choose_example_weight_(model, fit, recipe=WeightRecipe(granularity=granularity))
            add(f"{target}, labelled, {granularity}", model)
    for target, base in bases.items():
        model = copy.deepcopy(base)
        set_example_weight_(model, dict.fromkeys(layers, 1 / BATCH))
        add(f"{target}, match", model)
        for name, way in (("fit-moments", fit_moments_), ("fit-predictions", fit_predictions_)):
            for granularity in ("global", "layer"):
                model = copy.deepcopy(base)
                taking_part = weighable_layers(model, fit)[0]
                result = way(model, bare, BATCH, taking_part, granularity=granularity)
                print({k: round(v, 3) for k, v in result.weights.items()}, result.divergence)
                add(f"{target}, {name}, {granularity}", model)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--checkpoint", type=Path, default=CHECKPOINT)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    net = trained(arguments.data, arguments.checkpoint)
    x, y = images(arguments.data / "cifar10/test.npz")
    runs = [measure(net, x, y, seed) for seed in range(arguments.seeds)]
    print("\n| | top-1 | NLL | NLL scaled | mean weight |\n|---|--:|--:|--:|--:|")
    for name in runs[0]:
        columns = torch.tensor([run[name] for run in runs])
        mean = columns.mean(0)
        top1, nll, scaled, weight = mean.tolist()
        print(f"| {name} | {100 * top1:.1f}% | {nll:.3f} | {scaled:.3f} | {weight:.3f} |")


if __name__ == "__main__":
    main()
