"""The claims of "Four Things Everyone Should Know to Improve Batch Normalization", small.

Summers & Dinneen, ICLR 2020, re-measured with small networks on the embedded handwritten digits:

(a) NLL and top-1 over the example weight, for networks trained at several batch sizes;
(b) top-1 over the ghost size at a batch of 128;
(c) decay of gamma and beta to nothing, 0 or the identity, on a residual and on a plain network;
(d) Batch, Group and Batch/Group Normalization at batches of 2 and 4;
(e) all together against plain Batch Normalization;
(f) the networks of (d) at a batch of 2, and Group Norm at 128, trained for 1 and 4 times the steps.

Networks are trained on some images a class, with noise added to them and to those of the test,
since clean digits of 8x8 are learned to 99% by anything. Tables give the mean over the seeds and
the standard deviation between them; with few seeds a difference below it says nothing.

    python benchmarks/paper.py [--seeds 3] [--steps 150] [--only abcdef] [--per-class 40]
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import decay_norms_, evaluate, parameter_groups, swap_norms_
from bnfix.demo import digits
from bnfix.demo.network import digits_net

NOISE = 0.25
WEIGHTS = (0.0, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
GHOSTS = (4, 8, 16, 32, 64, None)


class PlainNet(nn.Module):
    """The residual network's layers in a row, without the shortcuts."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = ((1, 16, 1), (16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1), (32, 48, 1))
        for before, after, stride in (*widths, (48, 48, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after)]
            layers.append(nn.ReLU())
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.features(x).mean(dim=(2, 3)))


def load(per_class: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Inputs and labels: few for training, the calibration part to choose on, the test part."""
    rng = torch.Generator().manual_seed(0)
    found = {}
    for part in ("train", "calibration", "test"):
        images, labels = (torch.from_numpy(array) for array in digits(part))
        if part == "train":
            kept = [torch.where(labels == k)[0][:per_class] for k in range(10)]
            images, labels = images[torch.cat(kept)], labels[torch.cat(kept)]
        x = images[:, None].float() / 255
        x = x + NOISE * torch.randn(x.shape, generator=rng)
        found[part] = ((x - 0.3061) / 0.45, labels)
    return found


DATA: dict[str, tuple[Tensor, Tensor]] = {}
KINDS: dict[str, dict[str, Any]] = {
    "Batch": {},
    "Group (8)": {"to": "group", "channel_groups": 8},
    "Batch/Group (8, pairs)": {"to": "batch-group", "channel_groups": 8, "ghost_size": 2},
}


def batches_of(part: str) -> list[tuple[Tensor, Tensor]]:
    x, y = DATA[part]
    return list(zip(x.split(125), y.split(125), strict=True))


def trained(
    build,
    batch_size: int,
    seed: int,
    steps: int,
    *,
    norm_decay: float = 0.0,
    target: str = "none",
    **swap,
) -> nn.Module:
    """SGD with momentum and cosine, at a rate in proportion to the root of the batch size.

    Small batches take more steps, by (128 / batch)^0.7, and still see fewer examples in all.
    """
    torch.manual_seed(seed)
    net = build()
    if swap:
        swap_norms_(net, **swap)
    steps = round(steps * (128 / batch_size) ** 0.7)
    peak = 0.1 * (batch_size / 128) ** 0.5
    groups = parameter_groups(net, lr=peak, weight_decay=5e-4, norm_decay=norm_decay)
    optimizer = torch.optim.SGD(groups, lr=peak, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    net.train()
    for x, y in endless(batch_size, steps):
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        decay_norms_(net, optimizer.param_groups[0]["lr"], norm_decay, target)
        schedule.step()
    return net.eval()


def endless(batch_size: int, steps: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches in random order, shifted by at most one pixel."""
    x, y = DATA["train"]
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        if len(order) < batch_size:
            order = torch.randperm(len(y))
        index, order = order[:batch_size], order[batch_size:]
        dy, dx = torch.randint(-1, 2, (2,)).tolist()
        yield torch.roll(x[index], (dy, dx), (2, 3)), y[index]


def measured(net: nn.Module, part: str = "test") -> tuple[float, float]:
    found = evaluate(net, batches_of(part))
    assert found.top1 is not None
    assert found.nll is not None
    return 100 * found.top1, found.nll


def at_weight(net: nn.Module, weight: float) -> nn.Module:
    net = copy.deepcopy(net)
    swap_norms_(net, to="example-aware", example_weight=weight)
    return net


def best_weight(net: nn.Module) -> float:
    """The weight with the least NLL on the calibration part."""
    return min(WEIGHTS, key=lambda a: measured(at_weight(net, a), "calibration")[1])


def cell(runs: Sequence[tuple[float, float]]) -> str:
    top1, nll = (list(values) for values in zip(*runs, strict=True))
    spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in (top1, nll)]
    return (
        f"{statistics.mean(top1):.1f} ± {spread[0]:.1f} / "
        f"{statistics.mean(nll):.3f} ± {spread[1]:.3f}"
    )


def table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]], note: str = "") -> None:
    print(f"\n### {title}\n")
    print("| " + " | ".join(head) + " |")
    print("|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    if note:
        print(f"\n{note}")
    print(flush=True)


def weights(seeds: range, steps: int) -> None:
    rows = []
    for size in (2, 8, 32, 128):
        nets = [trained(digits_net, size, seed, steps) for seed in seeds]
        cells = [cell([measured(at_weight(net, a)) for net in nets]) for a in WEIGHTS]
        chosen = [best_weight(net) for net in nets]
        picked = cell([measured(at_weight(n, a)) for n, a in zip(nets, chosen, strict=True)])
        rows.append([str(size), *cells, picked + f" (a = {', '.join(map(str, chosen))})"])
    head = ["batch", *(f"a = {a}" for a in WEIGHTS), "a chosen on other images"]
    table("(a) Example weight at inference: top-1 / NLL", head, rows)


def ghosts(seeds: range, steps: int) -> None:
    rows = []
    for size in GHOSTS:
        runs = [
            measured(trained(digits_net, 128, s, steps, to="ghost", ghost_size=size or 128))
            for s in seeds
        ]
        rows.append([str(size or "128 (all)"), cell(runs)])
    table("(b) Ghost size at a batch of 128: top-1 / NLL", ["ghost size", "test"], rows)


def decays(seeds: range, steps: int) -> None:
    rows = []
    for name, build in (("residual", digits_net), ("plain", PlainNet)):
        cells = [
            cell([
                measured(trained(build, 128, s, steps, norm_decay=0.05, target=t)) for s in seeds
            ])
            for t in ("none", "zero", "identity")
        ]  # fmt: skip
        rows.append([name, *cells])
    head = ["network", "none", "to 0", "to the identity"]
    table("(c) Decay of gamma and beta (0.05), batch 128: top-1 / NLL", head, rows)


def small(seeds: range, steps: int) -> None:
    rows = []
    for size in (2, 4):
        cells = [
            cell([measured(trained(digits_net, size, s, steps, **swap)) for s in seeds])
            for swap in KINDS.values()
        ]
        rows.append([str(size), *cells])
    table("(d) Small batches: top-1 / NLL", ["batch", *KINDS], rows)


def together(seeds: range, steps: int) -> None:
    rows = []
    for size in (8, 128):
        ghost = {"to": "ghost", "ghost_size": 16} if size == 128 else {}
        plain = [trained(digits_net, size, s, steps) for s in seeds]
        every = [
            trained(digits_net, size, s, steps, norm_decay=0.05, target="identity", **ghost)
            for s in seeds
        ]
        chosen = [best_weight(net) for net in every]
        all_of_it = [measured(at_weight(n, a)) for n, a in zip(every, chosen, strict=True)]
        rows.append([str(size), cell([measured(net) for net in plain]), cell(all_of_it)])
    head = ["batch", "plain Batch Norm", "ghosts of 16 (at 128), decay to identity, a chosen"]
    table("(e) All together: top-1 / NLL", head, rows)


def longer(seeds: range, steps: int) -> None:
    rows = []
    for name, size in (*((name, 2) for name in KINDS), ("Group (8)", 128)):
        cells = []
        for factor in (1, 4):
            nets = [trained(digits_net, size, s, factor * steps, **KINDS[name]) for s in seeds]
            seen = statistics.mean(100 * accuracy_in_training(net) for net in nets)
            cells += [f"{seen:.1f}", cell([measured(net) for net in nets])]
        rows.append([name, str(size), *cells])
    head = ["norm", "batch", "top-1 in training", "test", "in training, 4 times", "test, 4 times"]
    table("(f) Longer training: top-1 / NLL", head, rows)


@torch.no_grad()
def accuracy_in_training(net: nn.Module) -> float:
    x, y = DATA["train"]
    return float((net(x).argmax(1) == y).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Re-measure the paper's claims on digits.")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="steps at a batch of 128")
    parser.add_argument("--only", default="abcdef")
    parser.add_argument("--per-class", type=int, default=40, help="images to train on")
    options = parser.parse_args()
    torch.set_num_threads(1)
    DATA.update(load(options.per_class))
    started = time.perf_counter()
    parts = {"a": weights, "b": ghosts, "c": decays, "d": small, "e": together, "f": longer}
    for key, part in parts.items():
        if key in options.only:
            part(range(options.seeds), options.steps)
    print(
        f"{options.seeds} seeds, {len(DATA['train'][1])} training and "
        f"{len(DATA['test'][1])} test images, "
        f"noise {NOISE}, mean ± standard deviation over seeds; "
        f"{time.perf_counter() - started:.0f} s on one thread."
    )


if __name__ == "__main__":
    main()
