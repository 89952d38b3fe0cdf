"""The embedded demonstration: 1,797 handwritten digits and a network trained on 150 of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from bnfix.core.options import one_of
from bnfix.core.settings import Preprocessing

#: The network's model spec, as ``--model`` takes it.
SPEC = "bnfix.demo.network:digits_net"

#: Mean and deviation of the training part's pixels.
PREPROCESSING = Preprocessing(mean=(0.3061,), std=(0.3760,), channels=1)

PARTS = {"train": 0, "calibration": 1, "test": 2}

_FOLDER = files("bnfix.demo")
_CHECKPOINT = "digits_net.safetensors"


@dataclass(frozen=True)
class DemoFiles:
    """The paths of the demonstration's inputs, as `write_files` wrote them."""

    checkpoint: Path
    calibration: Path
    test: Path


def digits(part: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read one part of the embedded digits."""
    one_of(part, PARTS, "digits")
    packed = io.BytesIO(_FOLDER.joinpath("digits.npz").read_bytes())
    with np.load(packed, allow_pickle=False) as arrays:
        chosen = arrays["split"] == PARTS[part]
        return arrays["images"][chosen], arrays["labels"][chosen]


@contextmanager
def checkpoint_path() -> Iterator[Path]:
    """The path of the embedded checkpoint, valid inside the context."""
    with as_file(_FOLDER.joinpath(_CHECKPOINT)) as path:
        yield path


def write_files(folder: Path) -> DemoFiles:
    """Write the demonstration's inputs into a folder, to repeat its commands by hand.

    Files with the same names are replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = DemoFiles(
        checkpoint=folder / _CHECKPOINT,
        calibration=folder / "digits-calibration.npz",
        test=folder / "digits-test.npz",
    )
    written.checkpoint.write_bytes(_FOLDER.joinpath(_CHECKPOINT).read_bytes())
    for part, path in (("calibration", written.calibration), ("test", written.test)):
        images, labels = digits(part)
        np.savez_compressed(path, images=images, labels=labels)
    return written
