"""What an example-aware layer costs: alone, and in whole networks, beside the stock layer.

    python benchmarks/speed.py                  # both parts: some 20 minutes on 2 cores
    python benchmarks/speed.py --quick          # a few sizes and ResNet-18: about 2 minutes
    python benchmarks/speed.py --parts layer --threads 2

Part `layer`: one layer at sizes of ResNet-50, EfficientNet-B0 and a 3D ResNet, contiguous and
channels last: a copy of the same bytes (the limit), the stock layer, the plain form, and the layer
as it is. Part `nets`: whole networks with random weights and every norm layer live (a = 0.1):
stock and ours, eager and compiled. Ways alternate within a round; a figure is the median over
rounds of the ratio to stock in the same round, and in brackets the quartiles of those ratios.
"""

# This file's own folder holds names of the standard library, which must not be found there.
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from bnfix import set_example_weight_, swap_norms_
from bnfix.layers import kernels
from bnfix.layers.norms import GeneralizedBatchNorm
from bnfix.runtime import keep_freed_memory

FORMATS = ("contiguous", "channels_last")
#: Network, and the (channels, size...) at which its layers stand.
SIZES = {
    "ResNet-50": [(64, 112, 112), (256, 56, 56), (512, 28, 28), (1024, 14, 14), (2048, 7, 7)],
    "EfficientNet-B0": [(32, 112, 112), (144, 56, 56), (240, 28, 28), (672, 14, 14), (1152, 7, 7)],
    "3D ResNet-18": [(64, 8, 56, 56), (128, 4, 28, 28), (512, 1, 7, 7)],
}
NETS = {
    "ResNet-18": torchvision.models.resnet18,
    "ResNet-50": torchvision.models.resnet50,
    "MobileNetV2": torchvision.models.mobilenet_v2,
    "EfficientNet-B0": torchvision.models.efficientnet_b0,
    "RegNetY-400MF": torchvision.models.regnet_y_400mf,
}

Row = dict[str, Any]


#: Seconds on the wall; with --cpu-time those of this process alone.
clock = time.perf_counter


def alternate(
    ways: dict[str, Callable[[], object]], rounds: int, *, warm: bool = False
) -> dict[str, list[float]]:
    """Seconds of each way in each round; one round goes first, uncounted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            if warm:
                way()  # so that each finds the caches as it leaves them, not as its neighbour did
            start = clock()
            way()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def summary(seconds: dict[str, list[float]], base: str) -> dict[str, Row]:
    found = {}
    for name, took in seconds.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(took, seconds[base], strict=True))
        found[name] = {
            "ms": 1e3 * statistics.median(took),
            "ratio": statistics.median(ratios),
            "low": ratios[len(ratios) // 4],
            "high": ratios[-1 - len(ratios) // 4],
        }
    return found


def laid_out(x: Tensor, layout: str) -> Tensor:
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last) if layout == "channels_last" else x


@contextmanager
def plain_form() -> Iterator[None]:
    """Let every layer evaluate by the plain form."""
    fast = kernels.evaluate
    kernels.evaluate = kernels.plain
    try:
        yield
    finally:
        kernels.evaluate = fast


def plainly(model: nn.Module, x: Tensor) -> Tensor:
    with plain_form():
        y: Tensor = model(x)
        return y


def a_layer(channels: int, weight: float) -> GeneralizedBatchNorm:
    layer = GeneralizedBatchNorm(channels, example_weight=weight).eval()
    randomize(layer)
    return layer


def randomize(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.running_mean, -0.3, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)


def agree(mine: Tensor, oracle: Tensor) -> None:
    scale = oracle.abs().max().item()
    torch.testing.assert_close(mine, oracle, rtol=1e-4, atol=1e-4 * max(scale, 1e-3))


def layers(batches: list[int], quick: bool, rounds: int) -> list[Row]:
    rows: list[Row] = []
    for net, sizes in SIZES.items():
        for size in sizes[1:4:2] if quick else sizes:
            for n in batches:
                for layout in FORMATS:
                    x = laid_out(torch.randn(n, *size), layout)
                    live, stock = a_layer(size[0], 0.1), a_layer(size[0], 0.0)
                    into = torch.empty_like(x)
                    agree(live(x), plainly(live, x))
                    ways = {
                        "copy": lambda into=into, x=x: into.copy_(x),
                        "stock": lambda stock=stock, x=x: stock(x),
                        "plain": lambda live=live, x=x: plainly(live, x),
                        "ours": lambda live=live, x=x: live(x),
                    }
                    took = summary(alternate(ways, rounds, warm=True), "stock")
                    where = f"{net} {n}x{'x'.join(map(str, size))}"
                    rows.append({"part": "layer", "name": where, "layout": layout, "ways": took})
                    show(rows[-1])
    return rows


def nets(batches: list[int], names: list[str], rounds: int, compiled: bool) -> list[Row]:
    rows: list[Row] = []
    for name in names:
        stock = NETS[name]().eval()
        randomize(stock)
        live = copy.deepcopy(stock)
        swap_norms_(live)
        set_example_weight_(live, 0.1)
        for layout in FORMATS:
            last = torch.channels_last if layout == "channels_last" else torch.contiguous_format
            for model in (stock, live):
                model.to(memory_format=last)
            for n in batches:
                x = laid_out(torch.randn(n, 3, 224, 224), layout)
                ways = of_a_net(stock, live, x, compiled=compiled)
                seconds = alternate(ways, rounds)
                took = summary(seconds, "stock")
                if compiled:
                    kept = {k: v for k, v in seconds.items() if k.endswith("compiled")}
                    took["ours compiled / stock compiled"] = summary(kept, "stock compiled")[
                        "ours compiled"
                    ]
                where = f"{name}, batch {n}"
                rows.append({"part": "nets", "name": where, "layout": layout, "ways": took})
                show(rows[-1])
    return rows


def of_a_net(
    stock: nn.Module, live: nn.Module, x: Tensor, *, compiled: bool
) -> dict[str, Callable[[], object]]:
    agree(live(x), plainly(live, x))
    ways: dict[str, Callable[[], object]] = {
        "stock": lambda: stock(x),
        "plain": lambda: plainly(live, x),
        "ours": lambda: live(x),
    }
    if compiled:
        torch._dynamo.reset()
        for way, model in (("stock", stock), ("ours", live)):
            fast = torch.compile(model, fullgraph=True, dynamic=False)
            agree(fast(x), model(x))
            ways[f"{way} compiled"] = lambda fast=fast: fast(x)
    return ways


def show(row: Row) -> None:
    parts = [f"{row['name']:34s} {row['layout']:13s}"]
    for name, took in row["ways"].items():
        if name == "stock":
            parts.append(f"stock {took['ms']:.2f} ms")
        else:
            spread = f"[{took['low']:.2f}, {took['high']:.2f}]"
            parts.append(f"{name} {took['ratio']:.2f} {spread}")
    print("  ".join(parts), flush=True)


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes, one network, batch 8")
    parser.add_argument("--parts", nargs="+", choices=("layer", "nets"), default=("layer", "nets"))
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled networks out")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: a busy machine")
    parser.add_argument("--json", type=Path, help="write every row there too")
    asked = parser.parse_args()
    if asked.quick:
        asked.batches, asked.nets, asked.rounds = [8], ["ResNet-18"], min(asked.rounds, 5)
    if asked.cpu_time:
        if asked.threads > 1:
            parser.error("--cpu-time adds up what threads do side by side: give --threads 1")
        clock = time.process_time
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    keep_freed_memory()
    print(f"{platform.processor() or platform.machine()}, {asked.threads} threads, "
          f"torch {torch.__version__}, float32; ratios to stock eager [quartiles]\n")  # fmt: skip
    rows: list[Row] = []
    if "layer" in asked.parts:
        rows += layers(asked.batches, asked.quick, asked.rounds)
    if "nets" in asked.parts:
        rows += nets(asked.batches, asked.nets, asked.rounds, not asked.no_compile)
    if asked.json:
        asked.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
