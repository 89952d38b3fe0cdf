"""`--robust` where some images are of another kind: top-1 against the same command on clean ones.

    python benchmarks/robust.py --data FOLDER     # the folder that BNFIX_DATA names

n images for the statistics, under a shift; a part of them is replaced by digits (photographs for
the network of digits), black and white noise, or images of one colour. Statistics that come out the
same are tested once. Rows go to benchmarks/results/robust.jsonl and stay there. Half an hour on a
core.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.blend import Pair
from benchmarks.quality_cases import arrays, cases, resized
from bnfix import recalibrate_
from tests.real import DATA

RESULTS = Path(__file__).parent / "results" / "robust.jsonl"
KINDS = ("other", "noise", "colour")
PARTS = (0.25, 0.49)
SHIFTS = {"resnet20": ("blur:3", "none", "noise:2"), "usps": ("none", "noise:2")}


def garbage(pair: Pair, kind: str, n: int, seed: int) -> Tensor:
    """Images of another kind, of the size that the network takes."""
    draw = np.random.default_rng(seed)
    side, channels = pair.tensors[0].shape[2], pair.tensors[0].shape[1]
    if kind == "other":
        file = "cifar10/calibration.npz" if channels == 1 else "mnist/calibration.npz"
        images = resized(arrays(pair.data / file)[0][draw.permutation(3000)[:n]], side)
        images = images.mean(3).astype(np.uint8) if channels == 1 else images
        images = np.repeat(images[..., None], channels, 3)
    elif kind == "noise":
        images = (255 * draw.integers(0, 2, (n, side, side, channels))).astype(np.uint8)
    else:
        colours = draw.integers(0, 256, (n, 1, 1, channels)).astype(np.uint8)
        images = np.broadcast_to(colours, (n, side, side, channels)).copy()
    return pair.case.inputs(images)


class Cell:
    """A network under a shift, and which test images it gets right with which statistics."""

    def __init__(self, pair: Pair) -> None:
        self.pair, self.known = pair, dict[bytes, np.ndarray]()

    def right(self, images: Tensor | None, **options: Any) -> tuple[np.ndarray, int]:
        """Right or wrong by test image, and how many images were left out of the statistics."""
        net: nn.Module = copy.deepcopy(self.pair.case.net)
        left_out = 0
        if images is not None:
            done = recalibrate_(net, images.split(50), feed="sequential", **options)
            left_out = done.trust.n_left_out or 0
        state = b"".join(v.numpy().tobytes() for k, v in net.state_dict().items() if "running" in k)
        if state not in self.known:
            _, x, y = self.pair.tensors
            with torch.inference_mode():
                found = torch.cat([net(part).argmax(1) for part in x.split(50)]) == y
            self.known[state] = found.double().numpy()
        return self.known[state], left_out


def rows(cell: Cell, n: int, seed: int) -> list[dict[str, Any]]:
    pair = cell.pair
    pool = pair.tensors[0]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(pool))[:n])
    found = []
    for target in ("population", "blend"):
        clean, lost = cell.right(pool[order], target=target, robust=True)
        plain, _ = cell.right(pool[order], target=target)
        base = {"net": pair.name, "shift": pair.shift, "n": n, "seed": seed, "target": target}
        base |= {"keep": 100 * cell.right(None)[0].mean(), "clean": 100 * plain.mean()}
        found.append({**base, "kind": "none", "part": 0, "robust": 100 * clean.mean(), "out": lost})
        # A quarter only for one target: half of the time, and what is kept is the same.
        for part in PARTS if target == "population" else PARTS[1:]:
            for kind in KINDS:
                bad = int(part * n)
                mixed = torch.cat([garbage(pair, kind, bad, seed), pool[order[bad:]]])
                mixed = mixed[torch.from_numpy(np.random.default_rng(seed + 1).permutation(n))]
                right, out = cell.right(mixed, target=target, robust=True)
                taken = cell.right(mixed, target=target)[0] if part == PARTS[1] else right * np.nan
                d = 100 * (right - clean)
                found.append({
                    **base, "kind": kind, "part": part, "robust": 100 * right.mean(), "out": out,
                    "plain": 100 * taken.mean(), "difference": d.mean(),
                    "se": d.std() / len(d) ** 0.5,
                })  # fmt: skip
    return found


def table(found: list[dict[str, Any]]) -> str:
    head = ["network, shift, n", "target", "clean", "clean, robust"]
    head += [f"{kind} {round(100 * part)}%" for part in PARTS for kind in KINDS]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "--:|" * (len(head) - 2)]
    cells: dict[Any, dict[Any, list[dict[str, Any]]]] = {}
    for row in found:
        key = f"{row['net']} {row['shift']} {row['n']}", row["target"]
        cells.setdefault(key, {}).setdefault((row["part"], row["kind"]), []).append(row)
    for key, by_kind in cells.items():

        def mean(where: Any, what: str, by_kind: Any = by_kind) -> str:
            return f"{np.mean([row[what] for row in by_kind[where]]):.1f}"

        none = (0, "none")
        words = [*key, mean(none, "clean"), mean(none, "robust")]
        for where in ((part, kind) for part in PARTS for kind in KINDS):
            plain = f" ({mean(where, 'plain')})" if where[0] == PARTS[1] else ""
            words.append(mean(where, "robust") + plain if where in by_kind else "")
        lines.append("| " + " | ".join(words) + " |")
    spoiled = [row["difference"] for row in found if row["part"]]
    below = sum(difference < -1 for difference in spoiled)
    lines.append(f"\n{len(spoiled)} rows, {below} more than 1 point below, mean "
                 f"{np.mean(spoiled):.2f}, least {min(spoiled):.2f}")  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--nets", nargs="+", default=list(SHIFTS))
    parser.add_argument("--images", nargs="+", type=int, default=[200, 500])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--n-test", type=int, default=1000)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    known = [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []
    done = {(row["net"], row["shift"], row["n"], row["seed"]) for row in known}
    for name in asked.nets:
        case = cases(asked.data)[name]()
        for shift in SHIFTS[name]:
            cell = Cell(Pair(name, case, shift, asked.data, asked.n_test))
            for n in asked.images:
                for seed in range(asked.seeds):
                    if (name, shift, n, seed) in done:
                        continue
                    found = rows(cell, n, seed)
                    with RESULTS.open("a") as file:
                        file.writelines(
                            json.dumps({k: v if isinstance(v, str | int) else round(float(v), 3)
                                        for k, v in row.items()}) + "\n" for row in found
                        )  # fmt: skip
                    known += found
                    sys.stdout.write(table(found) + "\n")
                    sys.stdout.flush()
    sys.stdout.write(table(known) + "\n")


if __name__ == "__main__":
    main()
