"""Coverage of conformal sets over splits, and accuracy estimated without labels under corruptions.

    python benchmarks/uncertainty.py --data FOLDER [--net resnet20] [--cache FILE.npz]

5,000 test images of CIFAR-10: all of them for the coverage; for the estimate the first half is the
labelled one, the second half is corrupted in each of the 18 ways of bnfix, and clean.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

# The root, where `benchmarks` and `tests` lie.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy import stats

from benchmarks.quality_cases import arrays, cifar
from bnfix.data.corruptions import every_corruption
from bnfix.metrics.beside import conformal_sets, estimate_accuracy
from tests import nets
from tests.real import DATA


def logits_of(data: Path, name: str) -> dict[str, np.ndarray]:
    """Logits of all images, and of the second half under each corruption."""
    case = cifar(name, getattr(nets, name.removesuffix("_b")), data)
    x, y = arrays(data / "cifar10/test.npz")
    half = len(x) // 2

    @torch.no_grad()
    def run(images: np.ndarray) -> np.ndarray:
        parts = [images[i : i + 250] for i in range(0, len(images), 250)]
        return torch.cat([case.net(case.inputs(part)) for part in parts]).numpy()

    found = {"y": y, "clean": run(x)}
    for c in every_corruption(0):
        found[c.text] = run(np.stack([c.apply(x[i], i) for i in range(half, len(x))]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--net", default="resnet20")
    parser.add_argument("--cache", type=Path, help="logits are kept here, or taken from here")
    given = parser.parse_args()
    if given.cache is not None and given.cache.is_file():
        with np.load(given.cache) as file:
            found = dict(file)
    else:
        found = logits_of(given.data, given.net)
        if given.cache is not None:
            np.savez(given.cache, **found)
    y, clean, half = found.pop("y"), found.pop("clean"), len(found["noise:1"])
    for wanted in (0.8, 0.9, 0.95):
        sets = [conformal_sets(clean, y, wanted, seed) for seed in range(20)]
        n1, n2 = sets[0].n_threshold, sets[0].n_examples
        m = math.ceil((n1 + 1) * wanted)
        low, high = stats.betabinom.ppf([0.025, 0.975], n2, m, n1 + 1 - m) / n2
        covers = sum(s.interval[0] <= wanted <= s.interval[1] for s in sets)
        inside = sum(low <= s.coverage <= high for s in sets)
        print(
            f"coverage {wanted}: mean {np.mean([s.coverage for s in sets]):.4f}, size "
            f"{np.mean([s.size for s in sets]):.2f}; {inside} of 20 in {low:.3f} to {high:.3f} "
            f"(beta-binomial), {covers} of 20 exact intervals have {wanted}"
        )
    covered, labelled = 0, (clean[:-half], y[:-half])
    for name, z in {"clean": clean[-half:], **found}.items():
        truth = float((z.argmax(1) == y[-half:]).mean())
        e = estimate_accuracy(labelled, z, 0)
        ok = e.interval[0] <= truth <= e.interval[1]
        covered += ok
        low, high = e.interval
        print(f"{name}: {truth:.3f}, estimated {e.top1:.3f} ({low:.3f} to {high:.3f}) {ok}")
    print(f"{covered} of {len(found) + 1} intervals have the truth")


if __name__ == "__main__":
    main()
