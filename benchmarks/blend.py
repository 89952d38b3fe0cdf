"""Stored, measured or mixed statistics, without labels: checkpoints, shifts, numbers of images.

    python benchmarks/blend.py --data FOLDER      # the folder that BNFIX_DATA names

Every network meets its test images under a shift, with its stored statistics, with those of n other
images under the same shift, and with mixtures of the two. Rows go to benchmarks/results/blend.jsonl
and stay there; a run goes on with those that are missing. About an hour on one core. `--summary`
only prints; `--draws` asks for the worst of several draws of very few images (one network).
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality_cases import Case, arrays, cases, resized
from bnfix import recalibrate_
from bnfix.data.corruptions import Corruption
from tests.real import DATA

RESULTS = Path(__file__).parent / "results" / "blend.jsonl"
METHODS: dict[str, dict[str, Any]] = {
    "population": {"target": "population"},
    "half": {"target": "blend", "new_weight": 0.5},
    "auto": {"target": "blend", "prior": "auto"},
}
#: Networks, and the shifts of their images; `clean` are training images as they were.
SMALL = (
    "none", "noise:1", "noise:3", "blur:2", "blur:3", "contrast:3", "jpeg:2", "pixelate:3",
)  # fmt: skip
LARGE = ("none", "noise:3", "contrast:3", "blur:2", "jpeg:2", "size:0.75")
PAIRS = {
    "usps": SMALL, "resnet20": ("clean", *SMALL), "resnet20_b": ("clean", *SMALL),
    "mobilenet": LARGE, "resnet32": SMALL, "lite0": LARGE, "demo": ("none", "noise:3"),
}  # fmt: skip


def spoiled(images: np.ndarray, shift: str) -> np.ndarray:
    kind, _, strength = shift.partition(":")
    if kind == "size":
        return resized(images, round(images.shape[1] * float(strength)))
    if not strength:
        return images
    spoil = Corruption(kind, int(strength))
    return np.stack([spoil.apply(image, i) for i, image in enumerate(images)])


class Pair:
    """A network and images under a shift: some for statistics, others for the test."""

    def __init__(self, name: str, case: Case, shift: str, data: Path, n_test: int) -> None:
        self.name, self.case, self.shift, self.n_test = name, case, shift, n_test
        self.data = data

    @cached_property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        if self.shift == "clean":
            x, y = arrays(self.data / "cifar10/clean_train.npz")
            x, xt, yt = x[:1000], x[1000:], y[1000:]
        else:
            x, _, xt, yt = self.case.images(0)
        pool = np.random.default_rng(0).permutation(len(x))[:600]
        test = np.random.default_rng(1).permutation(len(xt))[: self.n_test]
        labels = torch.from_numpy(np.asarray(yt)[test]).long()
        inputs = self.case.inputs
        return inputs(spoiled(x[pool], self.shift)), inputs(spoiled(xt[test], self.shift)), labels

    def losses(self, method: str | None, n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Whether each test image is right, and its loss."""
        pool, x, y = self.tensors
        net: nn.Module = copy.deepcopy(self.case.net)
        if method is not None:
            order = np.random.default_rng(seed).permutation(len(pool))[:n]
            few = pool[torch.from_numpy(order)].split(50)
            recalibrate_(net, few, feed="sequential", **METHODS[method])
        with torch.inference_mode():
            logits = torch.cat([net(part) for part in x.split(50)])
        right, loss = logits.argmax(1) == y, F.cross_entropy(logits, y, reduction="none")
        return right.double().numpy(), loss.double().numpy()


def rows(pair: Pair, sizes: list[int], seeds: range, done: set[Any]) -> Iterator[dict[str, Any]]:
    names = [m for m in METHODS if m != "half" or pair.name in ("usps", "resnet20")]
    if all((pair.name, pair.shift, n, seed) in done for n in sizes for seed in seeds):
        return
    kept = pair.losses(None, 0, 0)
    for n in sizes:
        for seed in seeds:
            if (pair.name, pair.shift, n, seed) in done:
                continue
            found = {"keep": kept} | {name: pair.losses(name, n, seed) for name in names}
            auto = found["auto"][0]
            row: dict[str, Any] = {"net": pair.name, "shift": pair.shift, "n": n, "seed": seed}
            for name, (right, loss) in found.items():
                d = auto - right
                row[name] = [100 * right.mean(), loss.mean()]
                row[f"se {name}"] = 100 * d.std() / len(d) ** 0.5
            yield {key: np.round(v, 4).tolist() if key != "net" and key != "shift" else v
                   for key, v in row.items()}  # fmt: skip


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    yield "| network | shift | n | keep | population | half and half | auto |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    for row in found:
        cells = [
            f"{row[m][0]:.1f} / {row[m][1]:.2f}" if m in row else "" for m in ("keep", *METHODS)
        ]
        yield f"| {row['net']} | {row['shift']} | {row['n']} | {' | '.join(cells)} |"


def summary(found: list[dict[str, Any]]) -> Iterator[str]:
    """How often, and how far, the mixture misses what is asked of it."""
    yield f"{len({(r['net'], r['shift']) for r in found})} pairs, {len(found)} rows"
    for method in ("auto", "half"):
        some = [row for row in found if method in row]
        if not some:
            continue
        keep, new, mixed = (
            np.array([r[m][0] for r in some]) for m in ("keep", "population", method)
        )
        wins = new > keep
        short = mixed[wins] - keep[wins] < 0.9 * (new - keep)[wins]
        loss = (keep - mixed)[~wins]
        d = mixed - new
        yield (
            f"{method}: where keep is at least as good as population ({(~wins).sum()}): at most "
            f"{max(loss, default=0):.1f} below keep, {(loss > 1).sum()} of them beyond 1 point; "
            f"where population is better ({wins.sum()}): {short.sum()} get less than 90% of the "
            f"gain; mean gain over keep {np.mean(mixed - keep):.2f}, over population "
            f"{d.mean():.2f} +- {1.96 * d.std(ddof=1) / len(d) ** 0.5:.2f}"
        )
        for row in np.array(some)[wins][short]:
            yield f"  short: {row['net']} {row['shift']} n={row['n']}"
        for row in np.array(some)[~wins][loss > 1]:
            yield f"  below keep: {row['net']} {row['shift']} n={row['n']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--nets", nargs="+", default=list(PAIRS))
    parser.add_argument("--images", nargs="+", type=int, default=[16, 64, 500])
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--summary", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []
    done = {(row["net"], row["shift"], row["n"], row["seed"]) for row in known}
    for name in [] if asked.summary else asked.nets:
        case = cases(asked.data)[name]()
        n_test = {"mobilenet": 200, "lite0": 200, "usps": 3000}.get(name, 1000)
        # 390 of ImageNet's 650 images are for statistics.
        sizes = [min(n, 390) if n_test == 200 else n for n in asked.images]
        for shift in PAIRS[name]:
            pair = Pair(name, case, shift, asked.data, n_test)
            for row in rows(pair, sizes, range(asked.draws), done):
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                known.append(row)
                sys.stdout.write("\n".join(list(table([row]))[2:]) + "\n")
                sys.stdout.flush()
    sys.stdout.write("\n".join([*table(known), "", *summary(known)]) + "\n")


if __name__ == "__main__":
    main()
