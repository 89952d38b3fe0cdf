"""Damaged networks, repaired against the ones they came from, without labels.

    python benchmarks/reference.py --data FOLDER --n 2000   # the folder that BNFIX_DATA names

Six damages of two public networks. Top-1 on test images whose labels nothing else sees, and the
divergence from the original's predictions there: as the network is, with population statistics,
with statistics matched to the original, of 500 and of 32 images; and what the gate chooses without
labels, on 200 more images. Last: whether an admitted candidate is worse by the hidden labels than
what it replaced, and how often the divergence ranks two networks as the labels do. About fifteen
minutes on a core.
"""

import argparse
import copy
import itertools
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor, nn

import bnfix
from benchmarks.measured_statistics import checkpoint, cifar
from benchmarks.statistics_accuracy import noisy, pruned, rounded
from bnfix.metrics.compare import compare, judge
from bnfix.metrics.evaluate import Outputs, against, collect, measured
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.task import Reference
from tests import nets
from tests.real import DATA

STATISTICS, SELECT = 500, 200
FEW = 32
Pair = tuple[Metrics, Metrics]  # by the hidden labels, and by the original


@torch.no_grad()
def clustered(net: nn.Module, part: float) -> nn.Module:
    """Every convolution's filters are those of k-means, this part as many as there were."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(0)
    for layer in (m for m in net.modules() if isinstance(m, nn.Conv2d)):
        rows = layer.weight.flatten(1)
        k = max(1, round(part * len(rows)))
        centres = rows[torch.randperm(len(rows), generator=generator)[:k]]
        for _ in range(50):
            nearest = torch.cdist(rows, centres).argmin(1)
            centres = torch.stack([
                rows[nearest == c].mean(0) if (nearest == c).any() else centres[c]
                for c in range(k)
            ])  # fmt: skip
        layer.weight.copy_(centres[torch.cdist(rows, centres).argmin(1)].view_as(layer.weight))
    return net


DAMAGES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "50% pruned": partial(pruned, part=0.5),
    "70% pruned": partial(pruned, part=0.7),
    "80% pruned": partial(pruned, part=0.8),
    "4 bits a tensor": partial(rounded, bits=4),
    "noise of 0.3": partial(noisy, part=0.3),
    "filters by k-means": partial(clustered, part=0.75),
}


def batches(x: Tensor, labels: Tensor | None = None) -> list[tuple[Tensor, ...]]:
    parts = x.split(100)
    return list(zip(parts, labels.split(100), strict=True)) if labels is not None else [
        (part,) for part in parts
    ]  # fmt: skip


class Judge:
    """Measures networks on the same images by hidden labels and by the original."""

    def __init__(self, original: nn.Module, given: list[tuple[Tensor, ...]]) -> None:
        self.task, self.batches = Reference(original), given
        self.theirs: Outputs = self.run(original)

    def run(self, net: nn.Module) -> Outputs:
        return collect([net], self.batches)[0]

    def __call__(self, net: nn.Module) -> Pair:
        found = self.run(net)
        return measured(found, 0), measured(against(found, self.theirs, self.task), 0)


def with_statistics(net: nn.Module, x: Tensor, original: nn.Module | None = None) -> nn.Module:
    net = copy.deepcopy(net)
    target = "population" if original is None else "reference"
    bnfix.recalibrate_(net, batches(x), target=target, reference=original)
    return net


def gate(networks: dict[str, nn.Module], on_select: Judge) -> tuple[str, list[tuple[str, str]]]:
    """The name of what the gate keeps of candidates in order, and each admission."""
    (kept, *others), admitted = networks, []
    metrics = on_select(networks[kept])[1]
    for name in others:
        own = on_select(networks[name])[1]
        if judge("statistics", (name, own), (kept, metrics)).admitted:
            admitted.append((name, kept))
            kept, metrics = name, own
    return kept, admitted


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--n", type=int, default=2000, help="test images")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    folder = options.data / "cifar10"
    x, _ = cifar(folder / "calibration.npz", STATISTICS + SELECT)
    own, select = x[:STATISTICS], x[STATISTICS:]
    test = batches(*cifar(folder / "test.npz", options.n))
    alike = total = 0
    names = ("as is", "population", "reference", f"reference, {FEW}", f"population, {FEW}")
    say(["network", *names, "gate"])
    say(["---", *["--:"] * len(names), "---"])
    for title, build in (("ResNet-20", nets.resnet20), ("ResNet-32", nets.resnet32)):
        original = checkpoint(build(), folder / f"{title.lower().replace('-', '')}.th")
        on_test, on_select = Judge(original, test), Judge(original, batches(select))
        print(f"| {title} | {on_test(original)[0].top1:.1%} |", flush=True)
        for damage, harm in DAMAGES.items():
            net = harm(original)
            networks = {
                "as is": net,
                "population": with_statistics(net, own),
                "reference": with_statistics(net, own, original),
            }
            kept, admitted = gate(networks, on_select)
            networks[names[3]] = with_statistics(net, own[:FEW], original)
            networks[names[4]] = with_statistics(net, own[:FEW])
            found = {name: on_test(one) for name, one in networks.items()}
            cells = [f"{a.top1:.1%} ({b.nll:.3f})" for a, b in found.values()]
            say([f"{title}, {damage}", *cells, kept])
            for new, old in admitted:
                paired = compare(found[old][0], found[new][0])
                print(f"    admitted {new} for {old}: {paired}", flush=True)
            paired = compare(found["population"][0], found["reference"][0])
            print(f"    reference against population: {paired}", flush=True)
            for (a, b), (c, d) in itertools.combinations(found.values(), 2):
                alike += (a.nll < c.nll) == (b.nll < d.nll)
                total += 1
    print(f"\n{alike} of {total} pairs are in the same order by divergence and by hidden NLL")


def say(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
