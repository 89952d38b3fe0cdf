"""What new population statistics do to the accuracy of real checkpoints, by bnfix and by others.

    python benchmarks/statistics_accuracy.py --data FOLDER      # the folder that BNFIX_DATA names

First table: weights that were changed, another resolution, small and sorted batches, other digits;
top-1 on images that were not calibrated on, and bnfix's paired difference to the better of the
other tools, with its 95% interval. Second table: cases in which new statistics hurt, and what
`bnfix calibrate --statistics auto` does there. Needs the real checkpoints and images; fvcore is
compared where it is installed. About ten minutes on 2 cores.
"""

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path[0] = str(Path(__file__).resolve().parents[1])

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfix
from benchmarks.measured_statistics import checkpoint, cifar, ways
from bnfix.core.memory import keep_freed_memory
from bnfix.core.settings import DataRecipe, GateRecipe, StatisticsRecipe, WeightRecipe
from bnfix.jobs.session import Plan
from bnfix.metrics.compare import compare
from tests import nets
from tests.real import DATA

NETS = f"{Path(nets.__file__)}"
CIFAR = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def digits(file: Path) -> tuple[Tensor, Tensor]:
    with np.load(file) as data:
        x, labels = torch.tensor(data["images"]).unsqueeze(1).float(), torch.tensor(data["labels"])
    x = F.interpolate(x, 16, mode="bilinear", antialias=True) / 255
    return (x - 0.2471) / 0.2994, labels


def weights(net: nn.Module) -> list[Tensor]:
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]


@torch.no_grad()
def pruned(net: nn.Module, part: float) -> nn.Module:
    """The smallest weights of the whole network are 0."""
    net = copy.deepcopy(net)
    every = torch.cat([w.abs().flatten() for w in weights(net)])
    least = every.kthvalue(int(part * len(every))).values
    for w in weights(net):
        w[w.abs() <= least] = 0
    return net


@torch.no_grad()
def rounded(net: nn.Module, bits: int) -> nn.Module:
    """Weights on 2^bits - 1 levels, symmetric, one scale for each tensor."""
    net, most = copy.deepcopy(net), 2 ** (bits - 1) - 1
    for w in weights(net):
        step = w.abs().max() / most
        w.copy_((w / step).round() * step)
    return net


@torch.no_grad()
def noisy(net: nn.Module, part: float) -> nn.Module:
    """Gaussian noise of this part of each tensor's own deviation."""
    net, generator = copy.deepcopy(net), torch.Generator().manual_seed(0)
    for w in weights(net):
        w.add_(part * w.std() * torch.randn(w.shape, generator=generator))
    return net


def averaged(net: nn.Module, x: Tensor, labels: Tensor) -> nn.Module:
    """The mean of all numbers at the ends of two training runs from one start, statistics too."""
    ends = []
    for seed in (0, 1):
        end = copy.deepcopy(net).train()
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        optimizer = torch.optim.SGD(end.parameters(), lr=0.02, momentum=0.9, nesterov=True)
        for batch, target in zip(x[order].split(64), labels[order].split(64), strict=True):
            optimizer.zero_grad()
            F.cross_entropy(end(batch), target).backward()
            optimizer.step()
        ends.append(end.state_dict())
    mean = {
        name: sum(end[name] for end in ends) / 2 if value.is_floating_point() else value
        for name, value in ends[0].items()
    }
    net = copy.deepcopy(net)
    net.load_state_dict(mean)
    return net.eval()


def photos(data: Path, size: int) -> tuple[Tensor, Tensor]:
    """ImageNet images as torchvision's networks take them, the central part of each."""
    from bnfix.core.settings import Preprocessing
    from bnfix.data.batches import Batches
    from bnfix.data.open import open_images

    images = open_images(str(data / "imagenet-val"))
    shape = Preprocessing(resize=(round(size * 227 / 224),), crop=(size, size), **CIFAR)
    batches = list(Batches(images, np.arange(len(images)), shape, batch_size=50))
    return torch.cat([b.x for b in batches]), torch.cat([b.y for b in batches])


class Case(NamedTuple):
    name: str
    net: Callable[[], nn.Module]
    x: Tensor
    test: Tensor
    labels: Tensor
    size: int = 128


def cases(data: Path) -> Iterator[Case]:
    net = checkpoint(nets.resnet20(), data / "cifar10/resnet20.th")
    net32 = checkpoint(nets.resnet32(), data / "cifar10/resnet32.th")
    fit, labels_of_fit = cifar(data / "cifar10/calibration.npz", 1000)
    test = cifar(data / "cifar10/test.npz", 3000)
    yield Case("ResNet-20 as it is", partial(copy.deepcopy, net), fit, *test)
    yield Case("the same, batches of 4", partial(copy.deepcopy, net), fit, *test, 4)
    yield Case("the same, batches of 2", partial(copy.deepcopy, net), fit, *test, 2)
    yield Case(
        "the same, sorted by class",
        partial(copy.deepcopy, net),
        fit[labels_of_fit.argsort()],
        *test,
    )
    for name, own in (("ResNet-20", net), ("ResNet-32", net32)):
        yield Case(f"{name}, 50% pruned", partial(pruned, own, 0.5), fit, *test)
        yield Case(f"{name}, 70% pruned", partial(pruned, own, 0.7), fit, *test)
        yield Case(f"{name}, 4-bit weights", partial(rounded, own, 4), fit, *test)
        yield Case(f"{name}, weight noise 0.3", partial(noisy, own, 0.3), fit, *test)
    sick = pruned(net, 0.7)
    yield Case("ResNet-20, 70% pruned, batches of 4", partial(copy.deepcopy, sick), fit, *test, 4)
    yield Case("ResNet-20, 70% pruned, batches of 2", partial(copy.deepcopy, sick), fit, *test, 2)
    yield Case(
        "ResNet-20, 70% pruned, sorted",
        partial(copy.deepcopy, sick),
        fit[labels_of_fit.argsort()],
        *test,
        32,
    )
    train, labels = cifar(data / "cifar10/calibration.npz", 4000)
    yield Case("ResNet-20, mean of two runs", partial(averaged, net, train, labels), fit, *test)
    small = cifar(data / "cifar10/calibration.npz", 1000, 24)[0]
    yield Case(
        "ResNet-20, 0.75 of the resolution",
        partial(copy.deepcopy, net),
        small,
        *cifar(data / "cifar10/test.npz", 3000, 24),
    )
    usps = checkpoint(nets.usps_net(), data / "odd/usps.pth")
    mnist = digits(data / "mnist/calibration.npz")[0], *digits(data / "mnist/test.npz")
    yield Case("USPS network on MNIST", partial(copy.deepcopy, usps), *mnist)
    from torchvision.models import mobilenet_v2

    mobile = checkpoint(mobilenet_v2(), data / "mobilenet_v2-b0353104.pth")
    x, labels = photos(data, 224)
    for name, own in (
        ("MobileNetV2, 4-bit weights", partial(rounded, mobile, 4)),
        ("MobileNetV2, 50% pruned", partial(pruned, mobile, 0.5)),
    ):
        yield Case(name, own, x[:325], x[325:], labels[325:], 65)
    x, labels = photos(data, 168)
    yield Case(
        "MobileNetV2, 0.75 of the resolution",
        partial(copy.deepcopy, mobile),
        x[:325],
        x[325:],
        labels[325:],
        65,
    )


def measured(net: nn.Module, case: Case) -> bnfix.Metrics:
    batches = zip(case.test.split(65), case.labels.split(65), strict=True)
    return bnfix.evaluate(net.eval(), batches)


def recovered(data: Path, only: str) -> None:
    found = ways()
    peers = [name for name in found if not name.startswith("bnfix")]
    print("Top-1 in %; last columns: bnfix less the best of the others, points (95% interval)\n")
    head = ["", "n", "stale", *found, "batch - best", "sequential - best"]
    print("| " + " | ".join(head) + " |\n|---|" + "--:|" * (len(head) - 1))
    for case in cases(data):
        if only not in case.name:
            continue
        results, net = {}, case.net()
        for name, way in found.items():
            mended = copy.deepcopy(net)
            way(mended, list(case.x.split(case.size)))
            try:
                results[name] = measured(mended, case)
            except bnfix.NumericError:
                continue  # statistics that are not finite
        best = max((results[name] for name in peers if name in results), key=lambda m: m.top1)
        cells = [case.name, str(len(case.labels)), f"{100 * measured(net, case).top1:.1f}"]
        cells += [f"{100 * results[n].top1:.1f}" if n in results else "NaN" for n in found]
        for name in ("bnfix, batch", "bnfix, sequential"):
            pair = compare(best, results[name]).top1
            low, high = (100 * v for v in pair.interval)
            cells.append(f"{100 * pair.difference:+.1f} ({low:+.1f} to {high:+.1f})")
        print("| " + " | ".join(cells) + " |", flush=True)


def hurting(data: Path) -> None:
    """New statistics as stated, without a gate, and as a candidate before it."""
    resnet = {"model": f"{NETS}:resnet20", "data": "cifar10/calibration.npz", **CIFAR}
    photos_of = {"data": "imagenet-val", **CIFAR}
    rows = [
        ("ResNet-20, recompressed images", "cifar10/resnet20.th", resnet),
        ("ResNet-20 by others, the same", "cifar10/resnet20_b.th", resnet),
        ("ResNet-32, the same", "cifar10/resnet32.th", {**resnet, "model": f"{NETS}:resnet32"}),
        ("ResNet-20, 24x24 pixels", "cifar10/resnet20.th", {**resnet, "resize": (24,)}),
        ("ResNet-20, other mean and deviation", "cifar10/resnet20.th",
         {**resnet, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}),
        ("MobileNetV2, 128x128 pixels", "mobilenet_v2-b0353104.pth",
         {**photos_of, "model": "torchvision:mobilenet_v2", "resize": (128,), "crop": (128,)}),
        ("EfficientNet-Lite0, 160x160 pixels", "efficientnet_lite0.safetensors",
         {"data": "imagenet-val", "model": "timm:tf_efficientnet_lite0", "resize": (160,),
          "crop": (160,), "mean": (127 / 255,), "std": (128 / 255,)}),
    ]  # fmt: skip
    print("\n| | n | before | new statistics, stated | difference, points | under `auto` |")
    print("|---|--:|--:|--:|--:|---|")
    for name, file, options in rows:
        options = dict(options)
        model, spec = options.pop("model"), str(data / options.pop("data"))
        cells = []
        for statistics in ("population", "auto"):
            with tempfile.TemporaryDirectory() as folder:
                test = options.get("test")
                plan = Plan(
                    command="calibrate",
                    source=DataRecipe(test=test, **options),
                    statistics=StatisticsRecipe(statistics),
                    weight=WeightRecipe("keep"),
                    finetune=None,
                    gate=GateRecipe(seed=0),
                )
                if statistics == "population":
                    plan = with_test(plan, spec, Path(folder))
                    spec_now = str(Path(folder) / "fit.npz")
                else:
                    spec_now = spec
                result = bnfix.calibrate(data / file, data=spec_now, model=model, plan=plan)
                report = result.report
                if statistics == "population":
                    before, after = (one.metrics for one in report.models)
                    pair = compare(before, after).top1
                    low, high = (100 * v for v in pair.interval)
                    cells += [
                        str(before.n_examples), f"{100 * before.top1:.1f}",
                        f"{100 * after.top1:.1f}",
                        f"{100 * pair.difference:+.1f} ({low:+.1f} to {high:+.1f})",
                    ]  # fmt: skip
                else:
                    kept = not any(decision.admitted for decision in report.decisions)
                    cells.append("kept" if kept else "new statistics taken")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def with_test(plan: Plan, spec: str, folder: Path) -> Plan:
    """Half of the images to measure on, the other half to calibrate on, as two files."""
    import dataclasses

    from bnfix.data.open import open_images

    images = open_images(spec)
    order = np.random.default_rng(0).permutation(len(images))
    for name, part in (("fit", order[::2]), ("test", order[1::2])):
        pixels = np.stack([np.asarray(images.read(int(i))) for i in part])
        np.savez(folder / f"{name}.npz", images=pixels, labels=images.labels[part])
    source = dataclasses.replace(plan.source, test=str(folder / "test.npz"))
    return dataclasses.replace(plan, source=source)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--only", default="", help="a part of the name of the cases wanted")
    parser.add_argument("--part", choices=("both", "recovered", "hurting"), default="both")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    if not (arguments.data / "cifar10/resnet20.th").is_file():
        sys.exit(f"{arguments.data}: the real checkpoints and images are not there (--data).")
    torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    if arguments.part != "hurting":
        recovered(arguments.data, arguments.only)
    if arguments.part != "recovered":
        hurting(arguments.data)


if __name__ == "__main__":
    main()
