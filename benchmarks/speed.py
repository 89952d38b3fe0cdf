"""What example-aware layers, statistics and their choice cost, beside the stock layer and others.

    python benchmarks/speed.py                  # all parts: about 40 minutes on 2 cores
    python benchmarks/speed.py --quick          # a few sizes and ResNet-18: about 3 minutes
    python benchmarks/speed.py --parts layer --threads 2
    python benchmarks/speed.py --draw           # the table and the picture, of what was measured

Part `layer`: one layer at sizes of ResNet-50, EfficientNet-B0 and a 3D ResNet, contiguous and
channels last: a copy of the same bytes (the limit), the stock layer, the plain form, and the layer
as it is. Part `nets`: whole networks with random weights and every norm layer live (a = 0.1):
stock and ours, eager, fused (`eval --fast`) and compiled. Part `gradients`: a forward and backward
pass for example weights (stock: for its scales), and of training with ghost batches of 8. Part
`calibration`: new statistics from tensors in memory, beside a bare forward pass, torch and fvcore;
and from JPEG files, beside the loader alone. Part `choice`: the choice of weights, in evaluation
passes. Part `scaling`: one and two processes. Ways alternate within a round; a figure is the median
over rounds of the ratio to a base in the same round, and in brackets the quartiles of those ratios.
Rows go to results/speed-DEVICE.json, which keeps the parts that were not measured again.
"""

# The root, where `benchmarks` and `tests` lie.
import os
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parents[1])
# As the command line does: threads that wait spin for microseconds.
if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
    os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT="2000")

import argparse
import copy
import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torchvision
from torch import Tensor, nn

from benchmarks import speed_calibration
from benchmarks.timing import Row, Ways, alternate, line, summary
from bnfix import set_example_weight_, swap_norms_
from bnfix.core.memory import keep_freed_memory
from bnfix.core.runtime import exact_float32
from bnfix.deploy.fuse import fused
from bnfix.norm import kernels
from bnfix.norm.layer import GeneralizedBatchNorm

PARTS = ("layer", "nets", "gradients", "calibration", "choice", "scaling")
RESULTS = Path(__file__).resolve().parent / "results"
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

#: Which of `timing.CLOCKS` is read.
clock = "wall"


def laid_out(x: Tensor, layout: str) -> Tensor:
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    return x.contiguous(memory_format=last) if layout == "channels_last" else x


@contextmanager
def plain_form() -> Iterator[None]:
    """Let every layer evaluate by the plain form."""
    fast, by_rows = kernels.evaluate, kernels.has_rows
    kernels.evaluate, kernels.has_rows = kernels.plain, lambda input: False
    try:
        yield
    finally:
        kernels.evaluate, kernels.has_rows = fast, by_rows


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


def layers(batches: list[int], rounds: int, device: str, *, quick: bool) -> list[Row]:
    rows: list[Row] = []
    for net, sizes in SIZES.items():
        for size in sizes[1:4:2] if quick else sizes:
            for n in batches:
                for layout in FORMATS:
                    x = laid_out(torch.randn(n, *size, device=device), layout)
                    live, stock = (a_layer(size[0], a).to(device) for a in (0.1, 0.0))
                    into = torch.empty_like(x)
                    agree(live(x), plainly(live, x))
                    ways: Ways = {
                        "copy": lambda into=into, x=x: into.copy_(x),
                        "stock": lambda stock=stock, x=x: stock(x),
                        "plain": lambda live=live, x=x: plainly(live, x),
                        "ours": lambda live=live, x=x: live(x),
                    }
                    took = summary(timed(ways, rounds, device, warm=True), "stock")
                    where = f"{net} {n}x{'x'.join(map(str, size))}"
                    rows.append({"part": "layer", "name": where, "layout": layout, "ways": took})
                    print(line(rows[-1], "stock"), flush=True)
    return rows


def timed(ways: Ways, rounds: int, device: str, *, warm: bool = False) -> dict[str, list[float]]:
    """Alternating runs; each waits for the device, which works on while the host goes on."""
    if device == "cuda":
        ways = {
            name: lambda way=way: (way(), torch.cuda.synchronize()) for name, way in ways.items()
        }
    return alternate(ways, rounds, warm=warm, clock=clock)


def nets(
    batches: list[int], names: list[str], rounds: int, device: str, *, compiled: bool
) -> list[Row]:
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
                model.to(device, memory_format=last)
            for n in batches:
                x = laid_out(torch.randn(n, 3, 224, 224, device=device), layout)
                ways = of_a_net(stock, live, x, compiled=compiled)
                seconds = timed(ways, rounds, device)
                took = summary(seconds, "stock")
                if compiled:
                    kept = {k: v for k, v in seconds.items() if k.endswith("compiled")}
                    took["ours compiled / stock compiled"] = summary(kept, "stock compiled")[
                        "ours compiled"
                    ]
                where = f"{name}, batch {n}"
                rows.append({"part": "nets", "name": where, "layout": layout, "ways": took})
                print(line(rows[-1], "stock"), flush=True)
    return rows


def of_a_net(stock: nn.Module, live: nn.Module, x: Tensor, *, compiled: bool) -> Ways:
    expected = plainly(live, x)
    agree(live(x), expected)
    quick, _ = fused(live, x[:2])
    agree(quick(x), expected)
    ways: Ways = {
        "stock": lambda: stock(x),
        "plain": lambda: plainly(live, x),
        "ours": lambda: live(x),
        "ours fused": lambda: quick(x),
    }
    if compiled:
        torch._dynamo.reset()
        for way, model in (("stock", stock), ("ours", live)):
            start = time.perf_counter()
            fast = torch.compile(model, fullgraph=True, dynamic=False)
            agree(fast(x), model(x))
            print(f"  {way} compiled in {time.perf_counter() - start:.0f} s", flush=True)
            ways[f"{way} compiled"] = lambda fast=fast: fast(x)
    return ways


def gradients(rounds: int, device: str, *, quick: bool) -> list[Row]:
    rows: list[Row] = []
    for name, n, size in [("MobileNetV2", 32, 160), ("ResNet-50", 16, 160)][: 1 if quick else None]:
        stock = NETS[name]().to(device).requires_grad_(False)
        live = copy.deepcopy(stock)
        randomize(live)
        swap_norms_(live)
        ghosts = copy.deepcopy(live).requires_grad_(True).train()
        trained = copy.deepcopy(stock).requires_grad_(True).train()
        set_example_weight_(live, 0.1)
        for model in (stock, live):
            model.eval()
            for layer in model.modules():
                if isinstance(layer, GeneralizedBatchNorm):
                    layer.example_weight = layer.example_weight.clone().requires_grad_()
                elif isinstance(layer, nn.BatchNorm2d):
                    layer.weight.requires_grad_()
        for layer in ghosts.modules():
            if isinstance(layer, GeneralizedBatchNorm):
                layer.ghost_size = 8
        x = torch.randn(n, 3, size, size, device=device)
        for what, base, mine in (
            ("example weights", stock, live), ("ghost batches of 8", trained, ghosts),
        ):  # fmt: skip
            ways: Ways = {
                "stock": lambda model=base, x=x: there_and_back(model, x),
                "plain": lambda model=mine, x=x: plainly_there_and_back(model, x),
                "ours": lambda model=mine, x=x: there_and_back(model, x),
            }
            took = summary(timed(ways, rounds, device), "stock")
            where = f"{name} {n}x{size}, {what}"
            rows.append({"part": "gradients", "name": where, "layout": "contiguous", "ways": took})
            print(line(rows[-1], "stock"), flush=True)
    return rows


def there_and_back(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()


def plainly_there_and_back(model: nn.Module, x: Tensor) -> None:
    with plain_form():
        there_and_back(model, x)


# --- what comes of it ---


def keep(rows: list[Row], device: str, machine: str) -> list[Row]:
    """Write rows; those of names that were not measured again stay."""
    path = RESULTS / f"speed-{device}.json"
    before = json.loads(path.read_text()) if path.is_file() else []
    new = {(row["part"], row["name"], row.get("layout")) for row in rows}
    old = [row for row in before if (row["part"], row["name"], row.get("layout")) not in new]
    every = sorted(
        [*old, *({**row, "machine": machine} for row in rows)], key=lambda r: PARTS.index(r["part"])
        if r["part"] in PARTS else PARTS.index("calibration"),
    )  # fmt: skip
    path.write_text(json.dumps(every, indent=1) + "\n")
    return every


def table(rows: list[Row]) -> str:
    """Rows with ways as Markdown, a table a part."""
    found = []
    for part in dict.fromkeys(row["part"] for row in rows if "ways" in row):
        mine = [row for row in rows if row["part"] == part]
        ways = list(dict.fromkeys(way for row in mine for way in row["ways"]))
        found += [
            f"\n{part}\n",
            f"| | layout | {' | '.join(ways)} |",
            "|---|---" + "|--:" * len(ways) + "|",
        ]
        for row in mine:
            cells = []
            for way in ways:
                took = row["ways"].get(way)
                if took is None:
                    cells.append("")
                elif took["ratio"] == took["low"] == took["high"] == 1.0:
                    cells.append(f"{took['ms']:.3g} ms")
                else:
                    cells.append(f"{took['ratio']:.2f} [{took['low']:.2f}, {took['high']:.2f}]")
            layout = row.get("layout", "").replace("_", " ")
            found.append(f"| {row['name']} | {layout} | {' | '.join(cells)} |")
    return "\n".join(found)


def draw(rows: list[Row], device: str) -> None:
    """Whole networks, by stock eager of the same layout, and calibration by a bare pass."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    panels = [
        ("nets", ("plain", "ours", "ours fused"), "networks, all layers live; stock eager = 1"),
        ("calibration", ("torch update_bn", "fvcore", "batch feed"),
         "new statistics, in memory; bare pass in training mode = 1"),
    ]  # fmt: skip
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 6))
    colours = ("#c46a3d", "#3f6fb0", "#3d8f5f")
    for axis, (part, ways, title) in zip(axes, panels, strict=True):
        mine = [row for row in rows if row["part"] == part]
        for i, row in enumerate(reversed(mine)):
            for j, (way, colour) in enumerate(zip(ways, colours, strict=True)):
                took = row["ways"].get(way)
                if took is not None:
                    y = i + 0.22 * (1 - j)
                    axis.plot((took["low"], took["high"]), (y, y), color=colour, lw=2)
                    axis.plot(took["ratio"], y, "o", color=colour, ms=4,
                              label=way if i == 0 else None)  # fmt: skip
        names = [f"{row['name']}, {row.get('layout', '').replace('_', ' ')}" for row in mine]
        axis.set_yticks(range(len(mine)), names[::-1], fontsize=7)
        axis.axvline(1, color="#999999", lw=1)
        axis.set_title(title, fontsize=9)
        if mine:
            axis.legend(fontsize=8)
    figure.tight_layout()
    picture = RESULTS.parents[1] / "docs" / f"speed-{device}.svg"
    figure.savefig(picture, metadata={"Date": None})


def processor() -> str:
    """What the CPU calls itself."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [text.partition(":")[2].strip() for text in lines if text.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def main() -> None:
    global clock
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few sizes, one network, batch 8")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    parser.add_argument("--batches", nargs="+", type=int)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--bf16", action="store_true", help="networks under autocast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled networks out")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: a busy machine")
    parser.add_argument("--keep", action="store_true", help="write results/speed-DEVICE.json")
    parser.add_argument("--draw", action="store_true", help="table and picture of what is there")
    asked = parser.parse_args()
    if asked.draw:
        rows = json.loads((RESULTS / f"speed-{asked.device}.json").read_text())
        draw(rows, asked.device)
        print(table(rows))
        return
    if asked.quick:
        asked.batches, asked.nets, asked.rounds = [8], ["ResNet-18"], min(asked.rounds, 5)
    if asked.batches is None:
        asked.batches = [1, 8, 32] if asked.device == "cpu" else [1, 64, 256]
    if asked.cpu_time:
        if asked.threads > 1:
            parser.error("--cpu-time adds up what threads do side by side: give --threads 1")
        clock = "cpu"
    torch.manual_seed(0)
    torch.set_num_threads(asked.threads)
    torch.set_grad_enabled(False)
    keep_freed_memory()
    exact_float32()
    machine = processor()
    if asked.device == "cuda":
        machine = torch.cuda.get_device_name()
    machine = f"{machine}, {asked.threads} threads, torch {torch.__version__}"
    print(f"{machine}, {'bf16' if asked.bf16 else 'float32'}; ratios to a base [quartiles]\n")
    rows: list[Row] = []
    with torch.autocast(asked.device, torch.bfloat16, enabled=asked.bf16):
        if "layer" in asked.parts:
            rows += layers(asked.batches, asked.rounds, asked.device, quick=asked.quick)
        if "nets" in asked.parts:
            rows += nets(
                asked.batches, asked.nets, asked.rounds, asked.device,
                compiled=not asked.no_compile,
            )  # fmt: skip
    with torch.enable_grad():
        if "gradients" in asked.parts:
            rows += gradients(asked.rounds, asked.device, quick=asked.quick)
        if "calibration" in asked.parts:
            rows += speed_calibration.from_memory(asked.rounds, asked.quick)
            rows += speed_calibration.from_files(asked.rounds, asked.quick)
        if "choice" in asked.parts:
            rows += speed_calibration.choices(asked.quick)
        if "scaling" in asked.parts:
            rows += speed_calibration.scaling(asked.quick)
    if asked.keep:
        draw(keep(rows, asked.device, machine), asked.device)


if __name__ == "__main__":
    main()
