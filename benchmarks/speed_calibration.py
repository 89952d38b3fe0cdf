"""What new statistics and the choice of example weights cost; parts of `speed.py`."""

import argparse
import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import nn

from benchmarks.timing import Row, Ways, alternate, line, summary
from bnfix import choose_example_weight_, recalibrate_, swap_norms_
from bnfix.core import distributed
from bnfix.core.settings import Preprocessing
from bnfix.data.batches import Batches
from bnfix.data.open import open_images
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.collector import Collector, Source
from bnfix.recalibrate.passes import one_pass

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn.precise_bn import update_bn_stats
except ImportError:
    update_bn_stats = None

#: Network, batch and input size.
CASES = [
    ("resnet18", 16, 112), ("resnet50", 8, 160),
    ("mobilenet_v2", 16, 160), ("mobilenet_v2", 32, 224),
]  # fmt: skip


@torch.no_grad()
def bare(model: nn.Module, batches, *, training: bool) -> None:
    model.train(training)
    for batch in batches:
        model(batch[0] if isinstance(batch, tuple) else batch)


def from_memory(rounds: int, quick: bool) -> list[Row]:
    """Tensors in memory: by a bare forward pass in training mode, where peers collect."""
    rows = []
    for name, n, size in CASES[: 1 if quick else None]:
        net = getattr(torchvision.models, name)().eval()
        for layout in ("contiguous", "channels_last"):
            last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            batches = [
                torch.randn(n, 3, size, size).contiguous(memory_format=last) for _ in range(4)
            ]
            nets = [copy.deepcopy(net).to(memory_format=last) for _ in range(6)]
            ways: Ways = {
                "bare, training": lambda m=nets[0], b=batches: bare(m, b, training=True),
                "bare, inference": lambda m=nets[1], b=batches: bare(m, b, training=False),
                "torch update_bn": lambda m=nets[2], b=batches: torch.optim.swa_utils.update_bn(
                    b, m.train()
                ),
                "batch feed": lambda m=nets[3], b=batches: recalibrate_(m.eval(), b),
                "sequential": lambda m=nets[4], b=batches: recalibrate_(
                    m.eval(), b, feed="sequential"
                ),
            }
            if update_bn_stats is not None:
                ways["fvcore"] = lambda m=nets[5], b=batches: update_bn_stats(
                    m.train(), b, num_iters=len(b)
                )
            took = alternate(ways, rounds)
            row = {
                "part": "calibration", "name": f"{name} {n}x{size}", "layout": layout,
                "ways": summary(took, "bare, training"),
            }  # fmt: skip
            row["ways"]["sequential / bare, inference"] = summary(
                {k: took[k] for k in ("bare, inference", "sequential")}, "bare, inference"
            )["sequential"]
            rows.append(row)
            print(line(row, "bare, training"), flush=True)
    return rows


def photographs(folder: Path, n: int) -> None:
    """JPEG files of the size of photographs, with as much detail: smooth shapes and some noise."""
    rng = np.random.default_rng(0)
    for i in range(n):
        small = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        image = np.asarray(Image.fromarray(small).resize((500, 375), Image.Resampling.BICUBIC))
        noisy = np.clip(image + rng.normal(0, 6, image.shape), 0, 255).astype(np.uint8)
        (folder / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(noisy).save(folder / str(i % 2) / f"{i}.jpg", quality=90)


def from_files(rounds: int, quick: bool) -> list[Row]:
    """JPEG files: images a second of the loader alone, of a bare pass over it, and of ours."""
    n = 96 if quick else 192
    rows = []
    shape = Preprocessing((256,), (224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    with tempfile.TemporaryDirectory() as folder:
        photographs(Path(folder), n)
        images = open_images(folder)
        for name in ("resnet18", "shufflenet_v2_x0_5"):
            net = getattr(torchvision.models, name)().eval()
            for workers in (0, 2):
                batches = Batches(
                    images, np.arange(n), shape, batch_size=32, workers=workers, cache_bytes=0
                )
                ways: Ways = {
                    "loader alone": lambda b=batches: [None for _ in b],
                    "bare, training": lambda m=net, b=batches: bare(m, b, training=True),
                    "bare, inference": lambda m=net, b=batches: bare(m, b, training=False),
                    "batch feed": lambda m=net, b=batches: recalibrate_(m.eval(), b),
                }
                took = alternate(ways, max(2, rounds // 2))
                row = {
                    "part": "files", "name": f"{name}, {n} JPEG, {workers} workers",
                    "ways": summary(took, "bare, training"),
                }  # fmt: skip
                for found in row["ways"].values():
                    found["images_per_second"] = 1e3 * n / found["ms"]
                rows.append(row)
                rates = ", ".join(
                    f"{k} {v['images_per_second']:.0f} images/s" for k, v in row["ways"].items()
                )
                print(f"{line(row, 'bare, training')}  ({rates})", flush=True)
    return rows


def choices(quick: bool) -> list[Row]:
    """The choice of example weights, in evaluation passes over the same images."""
    rows = []
    n = 64 if quick else 128
    for name in ("resnet18",) if quick else ("resnet18", "mobilenet_v2"):
        net = getattr(torchvision.models, name)(num_classes=10).eval()
        batches = [(torch.randn(32, 3, 160, 160), torch.randint(10, (32,))) for _ in range(n // 32)]
        recalibrate_(net, batches)
        swap_norms_(net)
        found = choose_example_weight_(net, batches)
        row = {
            "part": "choice", "name": f"{name}, {n} images of 160x160", "passes": found.passes,
            "clock_passes": found.clock_passes,
        }  # fmt: skip
        rows.append(row)
        print(f"{row['name']}: {found.passes:.1f} passes counted, {found.clock_passes:.1f} by the "
              "clock", flush=True)  # fmt: skip
    return rows


def scaling(quick: bool) -> list[Row]:
    """The same images by 1 and by 2 processes of one thread; and what they send each other."""
    rows, first = [], None
    for n in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "seconds.json"
            words = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc-per-node={n}", "-m", "benchmarks.speed_calibration", str(out),
                str(3 if quick else 5),
            ]  # fmt: skip
            # As a module, so that the root is where imports begin.
            root = Path(__file__).resolve().parents[1]
            subprocess.run(words, check=True, cwd=root, env={**os.environ, "OMP_NUM_THREADS": "1"})
            found = json.loads(out.read_text())
        first = first or found["seconds"]
        row = {
            "part": "scaling", "name": f"resnet18, 16 batches of 8x112, {n} processes", **found,
            "speedup": first / found["seconds"],
        }  # fmt: skip
        rows.append(row)
        print(f"{row['name']}: {1e3 * found['seconds']:.0f} ms, {row['speedup']:.2f} times as fast "
              f"as 1; {found['bytes'] / 1e6:.2f} MB sent by each", flush=True)  # fmt: skip
    return rows


def one_of_several(out: Path, rounds: int) -> None:
    """What each process of `scaling` runs."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net = torchvision.models.resnet18().eval()
    every = [torch.randn(8, 3, 112, 112) for _ in range(16)]
    with distributed.joined() as place:
        mine = every[place.rank :: place.size]
        seconds = []
        for _ in range(rounds + 1):
            distributed.gather(None)  # all begin together
            start = time.perf_counter()
            recalibrate_(net, mine)
            seconds.append(max(distributed.gather(time.perf_counter() - start)))
    if place.is_first:
        source = Source(net, mine)
        collector = Collector(list(find_norms(net)), source, by_batch=True)
        one_pass(source, collector)
        sent = len(pickle.dumps(collector.sums.state(summed=True)))
        out.write_text(json.dumps({"seconds": float(np.median(seconds[1:])), "bytes": sent}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("rounds", type=int)
    asked = parser.parse_args()
    one_of_several(asked.out, asked.rounds)
