"""bnfix against other ways to mend norm layers: cases x methods, on test images never used.

    python benchmarks/quality.py --data FOLDER [--cases a,b] [--methods c,d] [--seeds 5]
    python benchmarks/quality.py --only-table        # from the results that are there

Every (case, method, seed) is one line of the results file; what is there already is not run again,
so a run can be stopped and gone on with. A seed sets how the calibration images are cut and drawn,
and, where there is one set of images only, which of them are the test. `auto` is `bnfix calibrate`
as a user has it: new statistics, one weight, a weight a layer, a weight a channel, each only if the
gate lets it. The other methods do what they do, whatever it costs. Needs the real checkpoints and
images; hours on 2 cores for everything, minutes for one small case.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

# The root, where `benchmarks` and `tests` lie.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

import bnfix
from benchmarks.quality_cases import ROOT, Batches, Case, cases
from benchmarks.quality_methods import METHODS, Run
from benchmarks.quality_tables import picture, seeds_table, table
from bnfix.core.memory import keep_freed_memory
from tests.real import DATA

RESULTS = ROOT / "benchmarks/results/quality.jsonl"
PICTURE = ROOT / "docs/quality.svg"


def measure(case: Case, seed: int, methods: list[str], done: set[Any], out: Path, key: str) -> None:
    def matters(method: str) -> bool:
        return not seed or not case.fixed or METHODS[method][1]

    wanted = [m for m in methods if (key, m, seed) not in done and matters(m)]
    if not wanted:
        return
    images, labels, test_images, test_labels = case.images(seed)
    test = Batches(case, test_images, test_labels, 2 * case.size)
    run = Run(case, images, labels, seed)
    stock = bnfix.evaluate(case.net, test)
    for name in wanted:
        started = time.perf_counter()
        torch.manual_seed(seed)
        net = METHODS[name][0](run)
        seconds = time.perf_counter() - started
        m = stock if name == "stock" else bnfix.evaluate(net, test)
        paired = bnfix.compare(stock, m)
        live = [n for n, b in net.named_buffers() if "example_weight" in n and bool((b > 0).any())]
        row = {
            "case": key, "title": case.name, "method": name, "seed": seed,
            "n_calibration": len(labels), "n_test": m.n_examples, "seconds": round(seconds, 1),
            "n_live": len(live),
            "top1": m.top1, "nll": m.nll, "nll_temperature_scaled": m.nll_temperature_scaled,
            "interval": {k: m.interval[k] for k in ("top1", "nll", "nll_temperature_scaled")},
            "paired": {
                k: {"difference": d.difference, "interval": d.interval, "p": d.p}
                for k, d in (("top1", paired.top1), ("nll", paired.nll),
                             ("nll_temperature_scaled", paired.nll_temperature_scaled))
            },
        }  # fmt: skip
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{key} {seed} {name}: {m.top1:.4f} {m.nll:.4f} {m.nll_temperature_scaled:.4f} "
              f"{seconds:.0f} s", flush=True)  # fmt: skip


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--cases", default="demo,usps,resnet20,resnet20_b,resnet32,batch2",
                        help="comma-separated, or all")  # fmt: skip
    parser.add_argument("--methods", default="all", help="beginnings of names, comma-separated")
    parser.add_argument("--seeds", default="5", help="how many, from 0, or a list such as 0,3,")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--only-table", action="store_true")
    given = parser.parse_args()
    known = cases(given.data)
    keys = list(known) if given.cases == "all" else given.cases.split(",")
    starts = tuple(given.methods.split(","))
    methods = [m for m in METHODS if given.methods == "all" or m.startswith(starts)]
    seeds = ([int(s) for s in given.seeds.split(",") if s] if "," in given.seeds
             else list(range(int(given.seeds))))  # fmt: skip
    if not given.only_table:
        torch.set_num_threads(given.threads)
        keep_freed_memory()
        given.results.parent.mkdir(parents=True, exist_ok=True)
        done = {(r["case"], r["method"], r["seed"]) for r in read(given.results)}
        for key in keys:
            case = known[key]()
            for seed in seeds:
                measure(case, seed, methods, done, given.results, key)
    rows = read(given.results)
    print(table(rows, list(known), list(METHODS)) + "\n\n" + seeds_table(rows))
    picture(rows, list(known), given.picture)


if __name__ == "__main__":
    main()
