"""The gain of training all together, by a plain script and by `fix`, on images never seen before.

    python benchmarks/joint.py --data FOLDER [--nets resnet20 usps] [--seeds 5]
    python benchmarks/joint.py --only-table       # from the rows that are there

All labelled images of a set that the network was not trained on are cut in halves by the seed: one
to work with, one to test on. The script learns example weights (a channel each), gamma, beta and
head by Adam, rate 0.003 (weights 0.02), batches of 64, two epochs, and holds nothing out. It shares
no code with the package. Differences from the script are means over the seeds with Student's 95%
interval; beside them, in how many seeds the paired interval of the test images holds 0.
Rows stay in benchmarks/results/joint.jsonl; a run goes on with those that are missing. ResNet-20: a
minute of processor time a script, three to four a `fix`.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.stats import t as student
from torch import Tensor, nn
from torch.nn import functional as F

import bnfix
from benchmarks.quality_cases import Case, arrays, cases
from bnfix.core.memory import keep_freed_memory
from bnfix.core.settings import DataRecipe, GateRecipe, RunOptions
from bnfix.jobs.session import TRIED, Plan
from tests.real import DATA

RESULTS = Path(__file__).parent / "results" / "joint.jsonl"
SCRIPT, REFERENCE = "script, 60% of the images", "script"
NOT_AGAIN = "fix --no-refit"
Halves = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


class Weighed(nn.Module):
    """Batch Norm with stored statistics and a learned example weight for each channel."""

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        self.norm = norm
        self.weight = nn.Parameter(torch.full_like(norm.running_mean, 0.05))

    def forward(self, x: Tensor) -> Tensor:
        a, mean, var, gamma, beta = (
            values.view(1, -1, 1, 1)
            for values in (
                self.weight, self.norm.running_mean, self.norm.running_var,
                self.norm.weight, self.norm.bias,
            )
        )  # fmt: skip
        own_var, own_mean = torch.var_mean(x, (2, 3), correction=0, keepdim=True)
        var = (1 - a) * var + a * own_var + a * (1 - a) * (own_mean - mean) ** 2
        mean = (1 - a) * mean + a * own_mean
        return (x - mean) * gamma / (var + self.norm.eps).sqrt() + beta


def by_script(net: nn.Module, x: Tensor, y: Tensor, seed: int) -> nn.Module:
    """Example weights, gamma, beta and head, learned together from all examples."""
    torch.manual_seed(seed)
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.BatchNorm2d):
            net.set_submodule(name, Weighed(module))
    net.eval().requires_grad_(False)
    layers = [module for module in net.modules() if isinstance(module, Weighed)]
    weights = [layer.weight for layer in layers]
    head = [module for module in net.modules() if isinstance(module, nn.Linear)][-1]
    learned = [*head.parameters(), *(p for layer in layers for p in layer.norm.parameters())]
    for parameter in [*weights, *learned]:
        parameter.requires_grad_()
    groups = [{"params": learned, "lr": 0.003}, {"params": weights, "lr": 0.02}]
    optimizer = torch.optim.Adam(groups)
    for _ in range(2):
        for chosen in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
            with torch.no_grad():
                for weight in weights:
                    weight.clamp_(0, 1)
    return net


def by_fix(case: Case, parts: Halves, seed: int, *, refit: bool) -> tuple[nn.Module, str]:
    """`fix` from files as a user has them, its training repeated or not; what it kept."""
    with tempfile.TemporaryDirectory() as folder:
        work, test, net = (
            Path(folder) / name for name in ("work.npz", "test.npz", "n.safetensors")
        )
        images = [part[..., 0] if part.shape[-1] == 1 else part for part in parts[::2]]
        np.savez(work, images=images[0], labels=parts[1])
        np.savez(test, images=images[1], labels=parts[3])
        save_file({k: v.contiguous() for k, v in case.net.state_dict().items()}, net)
        size, (mean, std) = parts[0].shape[1:3], case.norm
        source = DataRecipe(mean=mean, std=std, resize=size, crop=size, test=str(test))
        plan = Plan(
            source=source,
            gate=GateRecipe(seed=seed),
            finetune=replace(TRIED, refit=refit),
            run=RunOptions(device="cpu", workers=0),
        )
        made = bnfix.fix(net, data=str(work), model=case.spec, plan=plan)
        return made.model, str(made.entry["results"]["output"])


def halves(case: Case, data: Path, seed: int) -> Halves:
    """Work images and labels, test images and labels; the networks of CIFAR know the other file."""
    if case.name.startswith("resnet"):
        images, labels = arrays(data / "cifar10/test.npz")
    else:
        x, y, xt, yt = case.images(0)
        images, labels = np.concatenate([x, xt]), np.concatenate([y, yt]).astype(np.int64)
    work, test = np.split(np.random.default_rng(seed).permutation(len(labels)), 2)
    return images[work], labels[work], images[test], labels[test]


def run(case: Case, method: str, data: Path, seed: int) -> dict[str, Any]:
    """One method with one seed: losses of the test half, packed, and what became of it."""
    parts = halves(case, data, seed)
    started = time.process_time()
    if method.startswith(REFERENCE):
        n = len(parts[1]) if method == REFERENCE else 3 * len(parts[1]) // 5
        x, y = case.inputs(parts[0][:n]), torch.from_numpy(parts[1][:n])
        net, kept = by_script(copy.deepcopy(case.net), x, y, seed), ""
    else:
        net, kept = by_fix(case, parts, seed, refit=method != NOT_AGAIN)
    seconds = time.process_time() - started
    labels = torch.from_numpy(parts[3])
    with torch.no_grad():
        outputs = torch.cat([net.eval()(x) for x in case.inputs(parts[2]).split(100)])
    losses = F.cross_entropy(outputs, labels, reduction="none")
    return {
        "seconds": round(seconds, 1), "kept": kept,
        "right": (outputs.argmax(1) == labels).int().tolist(),
        "losses": [round(loss, 5) for loss in losses.tolist()],
    }  # fmt: skip


def differences(rows: list[dict[str, Any]]) -> Iterator[str]:
    """A table: every method's metrics, and the paired differences from the script's."""
    yield "| network, n | method | seeds | top-1 | less the script's | NLL | less the script's |"
    yield "|---|---|--:|--:|--:|--:|--:|"
    by_key = {(r["net"], r["method"], r["seed"]): r for r in rows}
    for net, method in dict.fromkeys((r["net"], r["method"]) for r in rows):
        own = {r["seed"]: r for r in rows if (r["net"], r["method"]) == (net, method)}
        cells = [f"{net}, {len(next(iter(own.values()))['losses'])}", method, str(len(own))]
        for name, factor, digits in (("right", 100, 2), ("losses", 1, 4)):
            values = [factor * np.array(r[name], dtype=float) for r in own.values()]
            cells += [f"{np.mean(values):.{digits}f}", ""]
            against = [by_key.get((net, REFERENCE, seed)) for seed in own]
            if method != REFERENCE and all(against):
                paired = [
                    v - factor * np.array(r[name]) for v, r in zip(values, against, strict=True)
                ]
                cells[-1] = _interval(paired, digits)
        yield f"| {' | '.join(cells)} |"


def _interval(paired: list[np.ndarray], digits: int) -> str:
    means = np.array([d.mean() for d in paired])
    half = [1.96 * d.std(ddof=1) / len(d) ** 0.5 for d in paired]
    alike = sum(abs(m) <= h for m, h in zip(means, half, strict=True))
    k = len(means)
    over = student.ppf(0.975, k - 1) * means.std(ddof=1) / k**0.5 if k > 1 else np.nan
    return f"{means.mean():+.{digits}f} ± {over:.{digits}f}; 0 within in {alike} of {k}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--nets", nargs="+", default=["resnet20", "usps"])
    parser.add_argument("--methods", nargs="+", default=[REFERENCE, SCRIPT, NOT_AGAIN, "fix"])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only-table", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    rows = [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []
    done = {(r["net"], r["method"], r["seed"]) for r in rows}
    known: dict[str, Case] = {}
    keys = [(n, m, s) for s in range(asked.seeds) for n in asked.nets for m in asked.methods]
    for net, method, seed in [] if asked.only_table else keys:
        if (net, method, seed) in done:
            continue
        case = known.setdefault(net, known.get(net) or cases(asked.data)[net]())
        rows.append(
            {"net": net, "method": method, "seed": seed, **run(case, method, asked.data, seed)}
        )
        with RESULTS.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
        print(net, method, seed, rows[-1]["seconds"], rows[-1]["kept"], flush=True)
    print("\n".join(differences(rows)))


if __name__ == "__main__":
    main()
