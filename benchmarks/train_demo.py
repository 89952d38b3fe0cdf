"""Make the embedded files anew: the digits, and the network trained on a few of them.

The network is trained as one does with little memory and few labels: the first 15 images a class
of the training part (150 in all), a batch of 4, stochastic gradient descent at a constant rate of
0.01 with momentum 0.9, 20 epochs, random shifts by at most one pixel, Batch Normalization at its
defaults, seed 0, float32 on one processor core. Nothing else is done to it.

Why this setting: a demonstration of repair needs something to repair. On all 797 images the same
recipe reaches 99% and recalibration gains nothing; on 150 the running statistics are visibly off.
It was picked from 15 settings (100 to 797 images, SGD and Adam, rates, epochs), each run with two
or three seeds and seen on the calibration part, for an accuracy near 90% and a gain from
recalibration that 500 images can show. So the gain is no estimate of what to expect elsewhere. The
seed was not searched, and the test part was first looked at when the setting stood.

    python -m benchmarks.train_demo digits_net.safetensors
    python -m benchmarks.train_demo --digits digits.npz      (needs scikit-learn)
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.demo import PREPROCESSING, digits
from bnfix.demo.network import digits_net

IMAGES_PER_CLASS = 15
BATCH_SIZE = 4
EPOCHS = 20
LR = 0.01
MOMENTUM = 0.9
HELD_OUT_PER_CLASS = 50

log = logging.getLogger(__name__)


def derive_digits(path: Path, seed: int = 0) -> None:
    """Write scikit-learn's digits, cut into training, calibration and test part.

    Of each class, 50 seeded draws are the test part, 50 more the calibration part, the rest is the
    training part.

    Args:
        path: the ``.npz`` to write.
        seed: seed of the cut.
    """
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.rint(source.images * (255 / 16)).astype(np.uint8)
    labels = source.target.astype(np.int64)
    split = np.zeros(len(labels), np.uint8)
    rng = np.random.default_rng(seed)
    for label in range(10):
        order = rng.permutation(np.flatnonzero(labels == label))
        split[order[:HELD_OUT_PER_CLASS]] = 2
        split[order[HELD_OUT_PER_CLASS : 2 * HELD_OUT_PER_CLASS]] = 1
    np.savez_compressed(path, images=images, labels=labels, split=split)


def _few_per_class(labels: Tensor, n: int) -> Tensor:
    return torch.cat([torch.nonzero(labels == label).flatten()[:n] for label in range(10)])


def _shifted(padded: Tensor, rng: torch.Generator) -> Tensor:
    """Return each image of a padded batch (N, 1, H + 2, W + 2), cut out at a random place."""
    size = padded.shape[-1] - 2
    corners = torch.randint(0, 3, (len(padded), 2), generator=rng).tolist()
    return torch.stack(
        [
            image[:, top : top + size, left : left + size]
            for image, (top, left) in zip(padded, corners, strict=True)
        ]
    )


def train(epochs: int = EPOCHS, *, steps: int | None = None, seed: int = 0) -> nn.Module:
    """Train the demonstration's network by the recipe at the head of this file.

    The random state of torch is left as found.

    Args:
        epochs: passes over the 150 images.
        steps: stop after so many steps, if that comes first.
        seed: seed of the initial weights, of the order and of the shifts.

    Returns:
        The trained network, in evaluation mode.
    """
    pixels, labels = (torch.from_numpy(part) for part in digits("train"))
    chosen = _few_per_class(labels, IMAGES_PER_CLASS)
    labels = labels[chosen]
    # Padded before normalizing: a shifted digit has the background's own grey at the border.
    padded = F.pad(pixels[chosen].unsqueeze(1).float(), (1, 1, 1, 1)) * PREPROCESSING.scale
    padded = (padded - PREPROCESSING.mean[0]) / PREPROCESSING.std[0]

    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = digits_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=LR, momentum=MOMENTUM)
    n_batches = len(labels) // BATCH_SIZE
    done = 0
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=rng)
        total = 0.0
        # What does not fill a batch waits for the next epoch's order.
        for batch in order[: n_batches * BATCH_SIZE].view(n_batches, BATCH_SIZE):
            if done == steps:
                return net.eval()
            loss = F.cross_entropy(net(_shifted(padded[batch], rng)), labels[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total += loss.item()
            done += 1
        log.info("epoch %d: mean loss %.4f", epoch + 1, total / n_batches)
    return net.eval()


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line, and write what it asks for.

    Args:
        arguments: instead of the process's own.
    """
    parser = argparse.ArgumentParser(
        "python -m benchmarks.train_demo",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out",
        nargs="?",
        type=Path,
        metavar="OUT.safetensors",
        help="train, and write the network here",
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="passes (default %(default)s)")
    parser.add_argument("--steps", type=int, help="stop after so many steps")
    parser.add_argument("--seed", type=int, default=0, help="seed (default %(default)s)")
    parser.add_argument(
        "--digits", type=Path, metavar="OUT.npz", help="write the digits anew; needs scikit-learn"
    )
    options = parser.parse_args(arguments)
    if options.out is None and options.digits is None:
        parser.error("nothing to write: give OUT.safetensors, or --digits OUT.npz")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if options.digits is not None:
        derive_digits(options.digits)
    if options.out is not None:
        # Sums are taken in another order on several cores, and the recipe says one.
        torch.set_num_threads(1)
        start = time.perf_counter()
        net = train(options.epochs, steps=options.steps, seed=options.seed)
        tensors = {name: tensor.contiguous() for name, tensor in net.state_dict().items()}
        save_file(tensors, options.out)
        log.info("%s: written after %.0f s", options.out, time.perf_counter() - start)


if __name__ == "__main__":
    main()
