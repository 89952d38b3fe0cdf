"""What a callable of the user's own gives: images or other inputs, and labels or targets.

Only a callable named on the command line is imported, never one that comes out of a file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from bnfix.core.errors import DataError, ModelError, one_line
from bnfix.core.torch_private import tree_leaves, tree_map
from bnfix.data.arrays import TensorItems, as_inputs, refuse_not_finite
from bnfix.data.images import Images, Opened, digest_of, pixels_of
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


def open_callable(spec: str, wanted: bool, channels: int) -> Opened:
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
    labels = [label for _, label in pairs]
    if not wanted or all(isinstance(label, int | str | None) for label in labels):
        return images, labels if wanted else None
    images.targets = _targets(spec, labels)
    if isinstance(images, ItemImages):
        images.moves = all(map(_is_mask, images.targets.items, images.items))
    return images, None


def _targets(spec: str, labels: list[Any]) -> TensorItems:
    """Targets of any form, one an item; where shapes differ, a batch has a list of them."""
    # Beside numbers with a fraction, whole ones are no classes either.
    targets = [_inputs(float(y) if isinstance(y, int) else y, f"item {i}: its target")
               for i, y in enumerate(labels)]  # fmt: skip
    shapes = [tree_map(lambda leaf: tuple(leaf.shape), target) for target in targets]
    ragged = any(shape != shapes[0] for shape in shapes)
    return TensorItems(spec, targets, "targets", ragged=ragged)


def _is_mask(target: Any, pixels: np.ndarray) -> bool:
    """Whether a target is whole numbers, one a pixel."""
    whole = isinstance(target, torch.Tensor) and not target.is_floating_point()
    return whole and target.shape == pixels.shape[:2]


def _inputs(value: Any, place: str) -> Any:
    try:
        nest = as_inputs(value)
    except DataError as error:
        raise DataError(f"{place} is {error}") from error
    for leaf in tree_leaves(nest):
        # Infinities may be meant, as in a mask of attention.
        refuse_not_finite(place, leaf, infinite=False)
    return nest


def _opened(spec: str, items: list[Any], channels: int) -> Images:
    """Items that are all images, arrays of pixels, or all inputs of one nesting of tensors."""
    # Equal for items that go into one batch: images, or inputs of one nesting.
    kinds = [
        None if isinstance(item, np.ndarray) else tree_map(lambda _: "tensor", item)
        for item in items
    ]
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
    if not isinstance(label, int | str | None):
        label = _inputs(label, f"{place}: its target")
    pixels = _pixels(inputs)
    if pixels is not None:
        return pixels, label
    return _inputs(inputs, place), label


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
