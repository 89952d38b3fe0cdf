"""Data from the user's own code: a callable that returns (input, label) pairs or a Dataset.

Only a name on the command line is imported, never one that comes out of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bnfix.core.errors import DataError, ModelError, one_line
from bnfix.data.images import Images, digest_of, pixels_of
from bnfix.data.tensors import TensorItems, as_inputs, nesting_of
from bnfix.models.build import import_callable, importable

#: Under which name an item that is a dict may have its label.
_LABELS = ("label", "labels", "target", "targets", "y")


class ItemImages(Images):
    """Images that the user's code has given, kept in memory."""

    kind = "callable"

    def __init__(self, spec: str, items: list[np.ndarray], channels: int) -> None:
        super().__init__(spec, channels)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> np.ndarray:
        """The pixels as they were given, in the channels asked for."""
        return pixels_of(Image.fromarray(self.items[i]), self.channels)

    def _hash(self, i: int) -> bytes:
        return digest_of(self.items[i])


def is_callable(spec: str) -> bool:
    """Say whether a spec can be the name of a callable; nothing is imported."""
    where, _, name = spec.rpartition(":")
    if not where or not all(part.isidentifier() for part in name.split(".")):
        return False
    return where.endswith(".py") or all(part.isidentifier() for part in where.split("."))


def open_callable(spec: str, channels: int) -> tuple[Images, list[Any]]:
    """Import a callable, call it without arguments, and keep the inputs and labels it gives."""
    pairs: list[tuple[Any, Any]] = []
    try:
        call, folder = import_callable(spec)
        # A generator runs, and may import, only when its items are asked for.
        with importable(folder):
            for item in _items(call() if callable(call) else call):
                pairs.append(_pair(item, f"item {len(pairs)}"))
    except ModelError as error:
        raise DataError(str(error).removeprefix(f"{spec}: ")) from error
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"its code failed at item {len(pairs)} ({one_line(error)}). It gives items "
            "one by one, each (input, label) or an input."
        ) from error
    if not pairs:
        raise DataError("gave no images, expected pairs of image and label.")
    images = _opened(spec, [inputs for inputs, _ in pairs], channels)
    return images, [label for _, label in pairs]


def _opened(spec: str, items: list[Any], channels: int) -> Images:
    """Items that are all images, arrays of pixels, or all inputs of one nesting of tensors."""
    kinds = [None if isinstance(item, np.ndarray) else nesting_of(item) for item in items]
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        words = ("an image" if kinds[i] is None else f"no image ({kinds[i]})" for i in (0, odd))
        raise DataError(f"item 0 is {next(words)}, item {odd} is {next(words)}. Give one kind.")
    if kinds[0] is None:
        return ItemImages(spec, items, channels)
    return TensorItems(spec, items, "callable")


def _items(source: Any) -> Iterator[Any]:
    # Iteration waits for an IndexError, which many a Dataset with a length never raises.
    if hasattr(source, "__getitem__") and hasattr(source, "__len__"):
        for i in range(len(source)):
            yield source[i]
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise DataError(
            f"gave a {type(source).__name__}, expected an iterable or a Dataset of (image, label)."
        )


def _pair(item: Any, place: str) -> tuple[Any, Any]:
    """Pixels of an image, or tensors of any other input; and the label."""
    inputs, label = item, None
    if isinstance(item, dict):
        name = next((name for name in _LABELS if name in item), None)
        label = None if name is None else item[name]
        inputs = item.get("image", {key: item[key] for key in item if key != name})
    elif isinstance(item, tuple | list):
        if len(item) not in (1, 2):
            raise DataError(
                f"{place} is a {type(item).__name__} of {len(item)}, expected (input, label). "
                "Give several inputs as one tuple: ((a, b), label), or ((a, b), None)."
            )
        inputs, label = (*item, None)[:2]
    if isinstance(label, torch.Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if isinstance(label, bool) or not isinstance(label, int | str | None):
        raise DataError(
            f"{place}: its label is a {type(label).__name__}, expected a whole number, a class "
            "name, or None. Give several inputs as one tuple: ((a, b), label)."
        )
    pixels = _pixels(inputs)
    if pixels is not None:
        return pixels, label
    try:
        return as_inputs(inputs), label
    except DataError as error:
        raise DataError(f"{place} is {error}") from error


def _pixels(image: Any) -> np.ndarray | None:
    """Pixels of a Pillow image, or of 8 bits: (H, W[, C]) as an array, (C, H, W) as a tensor."""
    if isinstance(image, Image.Image):
        return pixels_of(image, 1 if image.mode in ("1", "L") else 3)
    if isinstance(image, torch.Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        image = image.permute(1, 2, 0).numpy(force=True)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        return None
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    return np.ascontiguousarray(image) if is_image else None
