"""Each ingredient of `finetune`, alone and together, against the same training without it.

    python benchmarks/ingredients.py --data FOLDER [--nets resnet20] [--batches 128] [--seeds 5]
        [--images 1250]    # of those to work with, drawn by the seed; all of them by default
    python benchmarks/ingredients.py --only-table     # from the rows that are there

Two ways to train: ``norms`` (gamma, beta and head, statistics frozen) and ``all`` (everything,
statistics of batches, measured again after each epoch). Two epochs on the images to work with, of
which every fifth says which epoch is kept; other images test. A seed sets which images those are,
the order of the batches and every random draw, so an ingredient is compared with the plain run of
its seed: the mean difference over seeds, with Student's 95% interval. The strengths were set before
the first run. Rows stay in benchmarks/results/ingredients.jsonl; a run goes on with those that are
missing. One to three seconds of processor time a run for the demonstration's network.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from scipy.stats import t as student

import bnfix
from benchmarks.quality_cases import Batches, Case, cases
from benchmarks.quality_methods import Run
from bnfix.core.memory import keep_freed_memory
from bnfix.core.settings import FinetuneRecipe
from tests.real import DATA

RESULTS = Path(__file__).parent / "results" / "ingredients.jsonl"
PLAIN = "plain"
DECAY: dict[str, Any] = {
    "norm_decay": "last=1,shortcut=0,other=0.2", "norm_decay_target": "identity",
}  # fmt: skip
NOISE: dict[str, Any] = {"ghost_noise": 16}
WEIGHTS: dict[str, Any] = {"example_weight": "learn"}
GHOSTS: dict[str, Any] = {"ghost_size": 16}
OTHERS: dict[str, Any] = {"batch_statistics": "exclusive"}
CONSISTENT: dict[str, Any] = {"consistency": (0.1, 0.01)}
SHARP: dict[str, Any] = {"sharpness": 0.1}
GATES: dict[str, Any] = {"to": "gated"}
#: What is trained, and what each ingredient adds to it.
WAYS: dict[str, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {
    "norms": (
        {"train": "norms+head"},
        {
            PLAIN: {},
            "example weights": WEIGHTS,
            "ghost noise": NOISE,
            "consistency": CONSISTENT,
            "sharpness": SHARP,
            "decay by role": DECAY,
            "gates": GATES,
            "all of these": {**WEIGHTS, **NOISE, **CONSISTENT, **SHARP, **DECAY},
        },
    ),
    "all": (
        {"train": "all", "statistics": "train"},
        {
            PLAIN: {},
            "ghosts of 16": GHOSTS,
            "exclusive": OTHERS,
            "exclusive, ghosts of 16": {**OTHERS, **GHOSTS},
            "consistency": CONSISTENT,
            "sharpness": SHARP,
            "decay by role": DECAY,
            "gates": GATES,
            "all of these": {**OTHERS, **GHOSTS, **CONSISTENT, **SHARP, **DECAY},
        },
    ),
}
#: Network, way, batch, images to work with (0: all), ingredient.
Setting = tuple[str, str, int, int, str]
NAMES = ("net", "way", "batch", "images", "ingredient", "seed")
#: Metrics of a row, each with its unit's factor and decimals.
MEASURED = {"top1": (100, 2), "nll": (1, 4), "nll_temperature_scaled": (1, 4)}


def trained(case: Case, key: Setting, seed: int) -> dict[str, Any]:
    """One run, and its metrics on the test images."""
    _, way, batch, n_images, ingredient = key
    common, added = WAYS[way][0], dict(WAYS[way][1][ingredient])
    images, labels, test_images, test_labels = case.images(seed)
    if n_images:
        drawn = np.random.default_rng((seed, 1)).permutation(len(labels))[:n_images]
        images, labels = images[drawn], labels[drawn]
    net = Run(case, images, labels, seed).net
    bnfix.swap_norms_(net, to=added.pop("to", "example-aware"))
    watched, learned = np.split(
        np.random.default_rng(seed).permutation(len(labels)), [len(labels) // 5]
    )
    # Gradients of fewer examples are noisier: smaller steps, as in small_batch.py.
    base = 0.006 if way == "norms" else 0.0005
    recipe = FinetuneRecipe(lr=base * min(1.0, (batch / 64) ** 0.5), **common, **added)

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng((seed, epoch)).permutation(learned)
        return Batches(case, images[order], labels[order], batch)

    def measure_again(_: Any) -> None:
        bare = Batches(case, images[learned], labels[learned], 2 * case.size)
        bnfix.recalibrate_(net, (x for x, _ in bare), target="population")

    started = time.process_time()
    done = bnfix.finetune_(
        net,
        batches,
        monitor=Batches(case, images[watched], labels[watched], 2 * case.size),
        recipe=recipe,
        seed=seed,
        after_epoch=measure_again if way == "all" else None,
    )
    seconds = time.process_time() - started
    found = bnfix.evaluate(net, Batches(case, test_images, test_labels, 2 * case.size))
    return {
        "n": found.n_examples, "epoch": done.best_epoch, "seconds": round(seconds, 1),
        **{name: getattr(found, name) for name in MEASURED},
    }  # fmt: skip


def differences(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    """Of every setting: metrics and their differences from the plain runs of the same seeds."""
    settings = dict.fromkeys(tuple(r[name] for name in NAMES[:-1]) for r in rows)
    by_key = {tuple(r[name] for name in NAMES): r for r in rows}
    for setting in settings:
        own = {r["seed"]: r for r in rows if by_key.get((*setting, r["seed"])) is r}
        pairs = [(one, by_key.get((*setting[:4], PLAIN, seed))) for seed, one in own.items()]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if not pairs:
            continue
        what = f"{setting[0]}, {setting[3] or 'all'}, {setting[2]}"
        cells = [what, setting[1], setting[4], str(len(pairs))]
        for name, (factor, digits) in MEASURED.items():
            new, old = (factor * np.array([p[k][name] for p in pairs]) for k in (0, 1))
            cells.append(f"{new.mean():.{digits}f}")
            if setting[4] != PLAIN:
                cells[-1] += f" ({_interval(new - old, digits)})"
        yield cells


def _interval(d: np.ndarray, digits: int) -> str:
    half = student.ppf(0.975, len(d) - 1) * d.std(ddof=1) / len(d) ** 0.5 if len(d) > 1 else np.nan
    return f"{d.mean():+.{digits}f} ± {half:.{digits}f}"


def table(rows: list[dict[str, Any]]) -> Iterator[str]:
    yield "| network, images, batch | trained | ingredient | seeds | top-1 | NLL | NLL scaled |"
    yield "|---|---|---|--:|--:|--:|--:|"
    for cells in differences(rows):
        yield f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--nets", nargs="+", default=["resnet20"])
    parser.add_argument("--batches", nargs="+", type=int, default=[128])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--ingredients", nargs="+", help="beginnings of names")
    parser.add_argument("--images", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only-table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []
    rows = [{"images": 0, **row} for row in rows]
    done = {tuple(row[name] for name in NAMES) for row in rows}
    starts = tuple(asked.ingredients or ("",))
    wanted = [
        (net, way, batch, asked.images, ingredient, seed)
        for seed in range(asked.seeds)
        for net in asked.nets
        for batch in asked.batches
        for way in asked.ways
        for ingredient in WAYS[way][1]
        if ingredient.startswith((PLAIN, *starts))
    ]
    known: dict[str, Case] = {}
    for key in [] if asked.only_table else wanted:
        if key in done:
            continue
        case = known.setdefault(key[0], known.get(key[0]) or cases(asked.data)[key[0]]())
        row = {**dict(zip(NAMES, key, strict=True)), **trained(case, key[:-1], key[-1])}
        rows.append(row)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
