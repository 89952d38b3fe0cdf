"""Data sets named on the command line, ``NAME:ROOT#SPLIT``, by their usual layouts on disk."""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bnfix.data.image_sets import open_caltech256, open_cub2011, open_flowers102
from bnfix.data.imagenet import open_imagenet
from bnfix.data.images import Images
from bnfix.data.pixel_sets import open_cifar10, open_cifar100, open_svhn
from bnfix.errors import DataError

#: Images, and the class of each by name or number; None where there are none.
Opened = tuple[Images, list[str] | np.ndarray | None]


class _Layout(NamedTuple):
    """How a data set is opened, and the splits that it comes with, the held-out one last."""

    open: Callable[[Path, str, int, str], Opened]
    splits: tuple[str, ...]


DATASETS = {
    "cifar10": _Layout(open_cifar10, ("train", "test")),
    "cifar100": _Layout(open_cifar100, ("train", "test")),
    "svhn": _Layout(open_svhn, ("train", "test")),
    "caltech256": _Layout(open_caltech256, ("train", "test")),
    "flowers102": _Layout(open_flowers102, ("train", "val", "test")),
    "cub2011": _Layout(open_cub2011, ("train", "test")),
    "imagenet": _Layout(open_imagenet, ("train", "test", "val")),
}


def is_dataset(spec: str) -> bool:
    """Say whether a spec names a data set.

    Args:
        spec: DATA.

    Returns:
        Whether it begins with a known name and a colon.
    """
    return spec.partition(":")[0] in DATASETS and ":" in spec


def near_dataset(spec: str) -> str:
    """What a spec may have meant whose kind is spelled nearly like a data set's name.

    Args:
        spec: DATA.

    Returns:
        A question; empty where nothing is near, or a module has that name.
    """
    kind, colon, root = spec.partition(":")
    close = get_close_matches(kind, DATASETS, n=1, cutoff=0.7)
    if not colon or not kind.isidentifier() or not close or find_spec(kind) is not None:
        return ""
    return f"Did you mean {close[0]}:{root}?"


def open_dataset(spec: str, channels: int) -> Opened:
    """Open a split of a data set by its name.

    Args:
        spec: ``NAME:ROOT``, with ``#train``, ``#val`` or ``#test``; without, the held-out split.
        channels: what images are converted to.

    Returns:
        The images, and the class of each.

    Raises:
        DataError: if there is no such split or folder, or it is not laid out as the data set is.
    """
    name, _, place = spec.partition(":")
    layout = DATASETS[name]
    place, mark, split = place.rpartition("#") if "#" in place else (place, "", "")
    if mark and split not in layout.splits:
        raise DataError(
            f"DATA {spec}: no split {split!r}; {name} comes with "
            f"{' and '.join(f'#{one}' for one in layout.splits)}. Give one of these.",
            name=spec,
        )
    if not place:
        raise DataError(f"DATA {spec}: no folder. Give {name}:ROOT#{layout.splits[-1]}.", name=spec)
    root = Path(place).expanduser()
    if not root.exists():
        raise DataError(
            f"DATA {spec}: there is no {root}. Give the folder that holds the data set.", path=root
        )
    images, classes = layout.open(root, split or layout.splits[-1], channels, f"DATA {spec}")
    images.kind = name
    if not mark:
        others = " or ".join(f"#{one}" for one in layout.splits[:-1])
        images.notes.append(f"no split named, so {layout.splits[-1]} is used ({others} to change)")
    return images, classes
