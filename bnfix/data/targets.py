"""Targets that move with the pixels: masks of a segmentation folder, boxes of a COCO folder.

Both may come from strangers: sizes are compared by the headers before anything is decoded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from bnfix.core.errors import DataError, some
from bnfix.data.images import (
    FileImages,
    Opened,
    digest_of_file,
    list_images,
    open_regular,
    opened,
)

MAX_COCO_BYTES: Final = 1_000_000_000
_INT32: Final = np.iinfo(np.int32)
#: Pillow spreads grey values of 2 and 4 bits over 0 to 255.
_SPREAD: Final = {2: 85, 4: 17}


class MisfitError(DataError):
    """A target does not fit its image; unlike a damaged file, it is not passed over."""


# --- geometry ---


def resized(target: Any, before: tuple[int, int], after: tuple[int, int]) -> Any:
    """A mask, or boxes, as the image was resized; a mask takes the nearest pixel.

    By Pillow, as images: it takes the pixel at the centre. torchvision's mode for masks takes the
    first one, which moves a mask against its image by half a pixel, or more where it shrinks.
    """
    if isinstance(target, np.ndarray):
        image = Image.fromarray(_for_pillow(target))
        return np.array(image.resize(after[::-1], Image.Resampling.NEAREST))
    return _moved(target, before, lambda boxes, v2: v2.resize(boxes, list(after)))


def cropped(target: Any, size: tuple[int, int], crop: tuple[int, int]) -> Any:
    """A mask, or boxes, as the image was cropped about its centre; boxes left out are dropped."""
    if isinstance(target, np.ndarray):
        if size[0] < crop[0] or size[1] < crop[1]:
            # Images are padded with black, but no class is known to be there.
            raise MisfitError(
                f"is {size[0]}x{size[1]}, too small for --crop {crop[0]}x{crop[1]}, and a mask "
                "cannot be padded. Give a smaller --crop, or --resize."
            )
        import torchvision.transforms.v2.functional as v2  # takes seconds to import

        return v2.center_crop(torch.from_numpy(target)[None], list(crop))[0].numpy()
    return _moved(target, size, lambda boxes, v2: v2.center_crop(boxes, list(crop)))


def together(targets: Sequence[Any]) -> Any:
    """Targets of a batch: masks as one tensor (N, H, W) int64, boxes as a list."""
    if isinstance(targets[0], np.ndarray):
        return torch.from_numpy(np.stack(targets).astype(np.int64))
    return list(targets)


def as_pair(image: torch.Tensor, mask: torch.Tensor) -> tuple[Any, Any]:
    """An image and its mask, for transforms of torchvision that vary both alike."""
    from torchvision import tv_tensors

    return tv_tensors.Image(image), tv_tensors.Mask(mask)


def _for_pillow(mask: np.ndarray) -> np.ndarray:
    if mask.dtype == np.uint8:
        return mask
    if mask.min() < _INT32.min or mask.max() > _INT32.max:
        raise MisfitError("has class indices of more than 32 bits.")
    return mask.astype(np.int32)


def _moved(target: dict[str, Any], size: tuple[int, int], move: Any) -> dict[str, Any]:
    import torchvision.transforms.v2.functional as v2
    from torchvision.tv_tensors import BoundingBoxes

    boxes = BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
    boxes = move(boxes, v2).as_subclass(torch.Tensor)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    rest = {name: value[kept] if name != "image_id" else value for name, value in target.items()}
    return rest | {"boxes": boxes[kept]}


# --- segmentation folders ---


class MaskedImages(FileImages):
    """Images with masks: a PNG of class indices each, which are the file's own numbers."""

    moves = True

    def __init__(self, root: Path, files: list[str], masks: list[str], channels: int) -> None:
        super().__init__(root, "segmentation folder", files, channels)
        self.masks = masks

    def read(self, i: int) -> np.ndarray:
        """Decode the first frame, once the mask has the size that it has."""
        with self._open(i) as image, self._mask(i) as mask:
            if mask.size not in (image.size, image.size[::-1]):  # a photograph may lie on its side
                self._refuse(i, image.size[::-1], mask.size[::-1])
        pixels = super().read(i)
        if pixels.shape[:2] != mask.size[::-1]:
            self._refuse(i, pixels.shape[:2], mask.size[::-1])
        return pixels

    def target(self, i: int) -> np.ndarray:
        """Class indices (H, W): indices into the palette, or grey values as they are stored."""
        with open_regular(self.root / self.masks[i]) as file:
            n_bits, colour = file.read(26)[24:26]
        with self._mask(i) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise MisfitError(
                    f"{self.masks[i]}: a mask in colours ({image.mode}), expected one class index "
                    "a pixel (grey values or a palette). Convert it."
                )
            indices = np.array(image)
        if indices.dtype.itemsize > 1:
            return indices.astype(np.int32)
        return indices.astype(np.uint8) // np.uint8(1 if colour else _SPREAD.get(n_bits, 1))

    def target_digest(self, i: int) -> bytes:
        """A hash of the mask's file."""
        return digest_of_file(lambda: open_regular(self.root / self.masks[i]), self.masks[i])

    def _mask(self, i: int) -> Any:
        path = self.root / self.masks[i]
        return opened(lambda: open_regular(path), self.masks[i], path, ("PNG",))

    def _refuse(self, i: int, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
        raise MisfitError(
            f"{self.masks[i]}: the mask is {mask[0]}x{mask[1]}, its image is {image[0]}x{image[1]} "
            "(height x width), expected one size. Make the mask again from the image."
        )


def is_segmentation(folder: Path) -> bool:
    """Whether a folder has images/ and masks/ in it."""
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def open_masked(root: Path, wanted: bool, channels: int) -> Opened:
    """A folder with ``images/`` and ``masks/``: for each image the mask with its name."""
    files, _, n_others = list_images(root / "images")
    if not files:
        raise DataError("no images in its folder images/.")
    images = FileImages(root, "flat folder", [f"images/{name}" for name in files], channels)
    notes = [f"{n_others} files in images/ without an image's suffix passed over"]
    if wanted:
        names, _, _ = list_images(root / "masks")
        masks = {PurePosixPath(name).stem: name for name in names}
        stems = [PurePosixPath(name).stem for name in files]
        odd = [name for name in names if not name.lower().endswith(".png")]
        # All faults at once, as each one found alone costs the user another run.
        problems = {
            "masks are no PNG, and other formats do not keep class indices": odd,
            "images have no mask of their name": [
                name for name, stem in zip(files, stems, strict=True) if stem not in masks
            ],
            "names are given to several files": [
                stem for listed in (stems, [PurePosixPath(n).stem for n in names])
                for stem, n in Counter(listed).items() if n > 1
            ],
        }  # fmt: skip
        extra = [name for stem, name in masks.items() if stem not in set(stems)]
        found = "; ".join(f"{len(v)} {what} ({some(v)})" for what, v in problems.items() if v)
        if found:
            more = f"; {len(extra)} masks have no image ({some(extra)})" if extra else ""
            raise DataError(f"{found}{more}. Give masks/NAME.png for each image.")
        images = MaskedImages(
            root, images.files, [f"masks/{masks[stem]}" for stem in stems], channels
        )
        if extra:
            images.notes.append(f"{len(extra)} masks without an image passed over: {some(extra)}")
    images.notes += notes if n_others else []
    return images, None
