"""Data from the user's own code: a callable that returns (image, label) pairs or a Dataset.

The name comes from the command line, so importing it is what the user asks for; a name that comes
out of a file never gets here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bnfix.building.importing import import_callable, importable
from bnfix.data.images import Images, digest_of, pixels_of
from bnfix.errors import DataError, ModelError, one_line

_EXPECTED = "a PIL image, or whole numbers 0 to 255 as an array (H, W[, C]) or a tensor (C, H, W)"


class ItemImages(Images):
    """Images that the user's code has given, kept in memory."""

    kind = "callable"

    def __init__(self, spec: str, items: list[np.ndarray], channels: int) -> None:
        super().__init__(spec, channels)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def _name(self, i: int) -> str:
        return f"item {i}"

    def _read(self, i: int) -> np.ndarray:
        return pixels_of(Image.fromarray(self.items[i]), self.channels)

    def _size_of(self, i: int) -> tuple[int, int]:
        height, width = self.items[i].shape[:2]
        return height, width

    def _hash(self, i: int) -> bytes:
        return digest_of(self.items[i])


def is_callable(spec: str) -> bool:
    """Say whether a spec can be the name of a callable; nothing is imported.

    Args:
        spec: DATA.

    Returns:
        Whether it reads ``package.module:callable`` or ``path/file.py:callable``.
    """
    where, _, name = spec.rpartition(":")
    if not where or not all(part.isidentifier() for part in name.split(".")):
        return False
    return where.endswith(".py") or all(part.isidentifier() for part in where.split("."))


def open_callable(
    spec: str, wanted: bool, channels: int
) -> tuple[Images, list[str] | np.ndarray | None]:
    """Import a callable, call it without arguments, and keep the images that it gives.

    Args:
        spec: ``package.module:callable`` or ``path/file.py:callable``.
        wanted: whether labels are to be used.
        channels: what images are converted to.

    Returns:
        The images, and their labels as numbers or names; None where there are none.

    Raises:
        DataError: if the code fails, or gives something else than images and labels.
    """
    where = f"DATA {spec}"
    items: list[np.ndarray] = []
    labels: list[Any] = []
    try:
        call, folder = import_callable(spec)
        with importable(folder):
            source = call() if callable(call) else call
            for item in _items(source, where):
                image, label = _pair(item, len(items), where)
                items.append(image)
                labels.append(label)
    except ModelError as error:
        raise DataError(f"DATA {error}", name=spec) from error
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"{where}: its code failed at item {len(items)} ({one_line(error)}).", name=spec
        ) from error
    if not items:
        raise DataError(f"{where}: gave no images, expected pairs of image and label.", name=spec)
    images = ItemImages(spec, items, channels)
    bare = [label is None for label in labels]
    if not wanted or all(bare):
        return images, None
    if any(bare):
        raise DataError(
            f"{where}: item {bare.index(True)} has no label, others have. Give each one.", name=spec
        )
    if all(isinstance(label, int) for label in labels):
        return images, np.asarray(labels, dtype=np.int64)
    return images, [str(label) for label in labels]


# A Dataset is indexed up to its length: many never raise IndexError, which iteration waits for.
def _items(source: Any, where: str) -> Iterator[Any]:
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        for i in range(len(source)):
            yield source[i]
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise DataError(
            f"{where}: gave a {type(source).__name__}, expected an iterable or a Dataset of "
            "(image, label)."
        )


def _pair(item: Any, n: int, where: str) -> tuple[np.ndarray, Any]:
    if isinstance(item, dict):
        item = (item.get("image"), item.get("label"))
    image, label = item if isinstance(item, tuple | list) and len(item) == 2 else (item, None)
    if isinstance(label, torch.Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise DataError(
            f"{where}: item {n}: its label is a {type(label).__name__}, expected a whole number, "
            "a class name, or None."
        )
    found = f"a {type(image).__name__}"
    if isinstance(image, Image.Image):
        return pixels_of(image, 1 if image.mode in ("1", "L") else 3), label
    if isinstance(image, torch.Tensor):
        found = f"a tensor of {image.dtype} {tuple(image.shape)}"
        image = image.permute(1, 2, 0).numpy(force=True) if image.ndim == 3 else None
    if isinstance(image, np.ndarray):
        found = f"an array of {image.dtype} {image.shape}"
        if image.ndim == 3 and image.shape[2] == 1:
            image = image[..., 0]
        is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
        if image.dtype == np.uint8 and is_image and image.size:
            return np.ascontiguousarray(image), label
    raise DataError(
        f"{where}: item {n} is {found}, expected {_EXPECTED}, before any preprocessing."
    )
