"""Targets that move with the pixels: masks of a segmentation folder, boxes of a COCO folder.

Both may come from strangers: sizes in the headers are compared before anything is decoded.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np
import torch
from PIL import Image

from bnfix.core.errors import DataError, some
from bnfix.data.images import (
    FileImages,
    Opened,
    digest_of,
    digest_of_file,
    faults_of,
    list_images,
    misplaced,
    open_regular,
    opened,
    parsing,
)

MAX_COCO_BYTES: Final = 1_000_000_000
_INT32: Final = np.iinfo(np.int32)
#: Pillow scales grey values of 2 and 4 bits to 0 to 255, by these factors.
_SPREAD: Final = {2: 85, 4: 17}


class MisfitError(DataError):
    """A target does not fit its image; unlike a damaged file, it is not skipped."""


# --- geometry ---


def moved(
    target: Any, before: tuple[int, int], after: tuple[int, int], crop: Any, name: str
) -> Any:
    """Resize and center-crop a mask or boxes like their image.

    Pillow resizes a mask by its nearest pixel, sampled at the centre as for images. torchvision's
    mode for masks samples the first pixel, and would shift a mask against its image.
    """
    import torchvision.transforms.v2.functional as v2  # takes seconds to import

    if isinstance(target, np.ndarray):
        if before != after:
            if target.dtype != np.uint8:
                if target.min() < _INT32.min or target.max() > _INT32.max:
                    raise MisfitError(f"{name}: its target has class indices above 32 bits.")
                target = target.astype(np.int32)
            image = Image.fromarray(target)
            target = np.array(image.resize(after[::-1], Image.Resampling.NEAREST))
        if crop and (after[0] < crop[0] or after[1] < crop[1]):
            # Images are padded with black, but the padding has no known class.
            raise MisfitError(
                f"{name}: its target is {after[0]}x{after[1]}, too small for --crop "
                f"{crop[0]}x{crop[1]}, and a mask cannot be padded. Give a smaller --crop, or "
                "--resize."
            )
        return v2.center_crop(torch.from_numpy(target)[None], list(crop or after))[0].numpy()
    from torchvision import tv_tensors

    boxes: Any = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=before)
    boxes = v2.center_crop(v2.resize(boxes, list(after)), list(crop or after))
    boxes = boxes.as_subclass(torch.Tensor)
    kept = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    rest = {name: value[kept] if name != "image_id" else value for name, value in target.items()}
    return rest | {"boxes": boxes[kept]}


def together(targets: Sequence[Any]) -> Any:
    """The targets of a batch: masks as one tensor (N, H, W) int64, boxes as a list."""
    if isinstance(targets[0], np.ndarray):
        return torch.from_numpy(np.stack(targets).astype(np.int64))
    return list(targets)


# --- segmentation folders ---


class MaskedImages(FileImages):
    """Images with masks: each mask is a PNG of class indices."""

    moves = True

    def __init__(self, root: Path, files: list[str], masks: list[str], channels: int) -> None:
        super().__init__(root, "segmentation folder", files, channels)
        self.masks = masks

    def read(self, i: int) -> np.ndarray:
        """Decode the first frame, after a check that the mask has its size."""
        with self._open(i) as image, self._mask(i) as mask:
            if mask.size not in (image.size, image.size[::-1]):  # a photograph may be rotated
                self._refuse(i, image.size[::-1], mask.size[::-1])
        pixels = super().read(i)
        if pixels.shape[:2] != mask.size[::-1]:
            self._refuse(i, pixels.shape[:2], mask.size[::-1])
        return pixels

    def target(self, i: int) -> np.ndarray:
        """Class indices (H, W): palette indices, or the stored grey values."""
        with open_regular(self.root / self.masks[i]) as file:
            n_bits, colour = file.read(26)[24:26]
        with self._mask(i) as image:
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
                raise MisfitError(
                    f"{self.masks[i]}: a mask in colours ({image.mode}), expected one class index "
                    "per pixel (grey values or a palette). Convert it."
                )
            indices = np.array(image)
        if indices.dtype.itemsize > 1:
            return indices.astype(np.int32)
        return indices.astype(np.uint8) // np.uint8(1 if colour else _SPREAD.get(n_bits, 1))

    def target_digest(self, i: int) -> bytes:
        """A hash of the mask file."""
        return digest_of_file(lambda: open_regular(self.root / self.masks[i]), self.masks[i])

    def _mask(self, i: int) -> Any:
        path = self.root / self.masks[i]
        return opened(lambda: open_regular(path), self.masks[i], path, ("PNG",))

    def _refuse(self, i: int, image: tuple[int, ...], mask: tuple[int, ...]) -> None:
        raise MisfitError(
            f"{self.masks[i]}: the mask is {mask[0]}x{mask[1]}, its image is {image[0]}x{image[1]} "
            "(height x width), expected one size. Create the mask from this image."
        )


def is_segmentation(folder: Path) -> bool:
    """Whether a folder contains images/ and masks/."""
    return (folder / "images").is_dir() and (folder / "masks").is_dir()


def open_masked(root: Path, wanted: bool, channels: int) -> Opened:
    """Open a folder with ``images/`` and ``masks/``: each image has the mask of the same name."""
    files, _, n_others = list_images(root / "images")
    if not files:
        raise DataError("no images in its folder images/.")
    images = FileImages(root, "flat folder", [f"images/{name}" for name in files], channels)
    if wanted:
        names, _, _ = list_images(root / "masks")
        masks = {PurePosixPath(name).stem: name for name in names}
        stems = [PurePosixPath(name).stem for name in files]
        problems = {
            "masks are not PNG, and other formats do not keep class indices": [
                name for name in names if not name.lower().endswith(".png")
            ],
            "images have no mask with their name": [
                name for name, stem in zip(files, stems, strict=True) if stem not in masks
            ],
            "names belong to several files": [
                stem for listed in (stems, [PurePosixPath(n).stem for n in names])
                for stem, n in Counter(listed).items() if n > 1
            ],
        }  # fmt: skip
        extra = [name for stem, name in masks.items() if stem not in set(stems)]
        if found := faults_of(problems):
            more = f"; {len(extra)} masks have no image ({some(extra)})" if extra else ""
            raise DataError(f"{found}{more}. Give masks/NAME.png for each image.")
        of_each = [f"masks/{masks[stem]}" for stem in stems]
        images = MaskedImages(root, images.files, of_each, channels)
        if extra:
            images.notes.append(f"{len(extra)} masks without an image skipped: {some(extra)}")
    if n_others:
        images.notes.append(f"{n_others} files in images/ without an image suffix skipped")
    return images, None


# --- COCO folders ---


class BoxedImages(FileImages):
    """Images with boxes from COCO annotations."""

    moves = True

    def __init__(self, root: Path, files: list[str], channels: int) -> None:
        super().__init__(root, "coco", files, channels)
        self.boxes: list[dict[str, Any]] = []
        self.sizes: list[tuple[int, int]] = []

    def read(self, i: int) -> np.ndarray:
        """Decode the image; refuse one whose size differs from the annotated size."""
        pixels = super().read(i)
        if pixels.shape[:2] != self.sizes[i]:
            raise MisfitError(
                f"{self.name(i)}: is {pixels.shape[:2]}, the annotations expect {self.sizes[i]} "
                "(height, width). Give the annotated images."
            )
        return pixels

    def target(self, i: int) -> dict[str, Any]:
        """Boxes (n, 4) float32 (left, top, right, bottom), labels and iscrowd (n,), image_id."""
        return {name: torch.as_tensor(value) for name, value in self.boxes[i].items()}

    def target_digest(self, i: int) -> bytes:
        """A hash of the boxes and labels."""
        one = self.boxes[i]
        return digest_of(np.column_stack([one["boxes"], one["labels"], one["iscrowd"]]))


def is_coco(spec: str, path: Path) -> bool:
    """Whether a spec has the form ``coco:ROOT``."""
    return spec.startswith("coco:") and not path.exists()


def open_coco(spec: str, wanted: bool, channels: int) -> Opened:
    """Open ``coco:ROOT#SPLIT``: images and ``annotations/instances_SPLIT.json``."""
    place, _, split = spec.removeprefix("coco:").partition("#")
    root, notes = Path(place).expanduser(), []
    found = {
        p.stem.removeprefix("instances_"): p for p in root.glob("annotations/instances_*.json")
    }
    if not found:
        raise DataError(f"no annotations/instances_*.json in {root}.")
    fitting = [name for name in sorted(found) if name.startswith(split or ("val", "test"))]
    fitting = [split] if split in found else fitting if split or len(found) > 1 else [*found]
    if len(fitting) != 1:
        raise DataError(f"annotations of {some(sorted(found))}. Name one of them, coco:ROOT#NAME.")
    if not split and len(found) > 1:
        notes.append(f"no split named, so {fitting[0]} is used (of {some(sorted(found))})")
    file = found[fitting[0]]
    if file.stat().st_size > MAX_COCO_BYTES:
        raise DataError(f"{file.name}: larger than {MAX_COCO_BYTES // 10**6} MB.")
    places = (root / "images" / fitting[0], root / fitting[0], root / "images")
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        raise DataError(f"no folder images or {fitting[0]} in {root}.")
    if find_spec("pycocotools") is None:
        raise DataError("needs pycocotools, which is not installed. pip install 'bnfix[coco]'.")
    advice = (
        " Give images with id, file_name, height and width, and annotations with image_id, bbox "
        "and category_id."
    )
    with parsing(f"{file.name}: not instance annotations", advice):
        images, n_left_out = _read_coco(folder, file, channels)
    faults = faults_of(misplaced(folder, images.files))
    if faults or not images.files:
        raise DataError(f"{file.name}: {faults or 'no images'}, in {folder}.")
    if not wanted:
        return FileImages(folder, "coco", images.files, channels), None
    if n_left_out:
        notes.append(f"{n_left_out} boxes without area left out")
    images.notes += [*notes, "box labels are COCO's category ids"]
    return images, None


def _read_coco(folder: Path, file: Path, channels: int) -> tuple[BoxedImages, int]:
    """The images with their boxes, and the number of boxes without area."""
    from torchvision.datasets import CocoDetection

    with redirect_stdout(io.StringIO()):  # pycocotools prints
        found = CocoDetection(folder, str(file))
    images, n_left_out = BoxedImages(folder, [], channels), 0
    for image_id in found.ids:
        one, marks = found.coco.imgs[image_id], found.coco.imgToAnns.get(image_id, [])
        table = np.asarray(
            [(*mark["bbox"], mark["category_id"], mark.get("iscrowd", 0)) for mark in marks],
            dtype=np.float64,
        ).reshape(len(marks), 6)
        if not (np.abs(table) < _INT32.max).all():
            raise ValueError(f"a box or category of image {image_id} is not a valid number")
        kept = table[(table[:, 2] > 0) & (table[:, 3] > 0)]
        n_left_out += len(table) - len(kept)
        boxes = np.hstack([kept[:, :2], kept[:, :2] + kept[:, 2:4]]).astype(np.float32)
        labels, crowds = kept[:, 4:].T.astype(np.int64)
        images.boxes.append(
            {"boxes": boxes, "labels": labels, "iscrowd": crowds, "image_id": np.int64(image_id)}
        )
        images.files.append(str(PurePosixPath(one["file_name"])))
        images.sizes.append((int(one["height"]), int(one["width"])))
    return images, n_left_out
