"""Images by position: decoding files, slicing arrays, and the index of each class.

Files may come from strangers: only plain image formats are decoded, their size is checked before
memory is taken, and what a damaged one makes Pillow raise becomes one kind of error.
"""

from __future__ import annotations

import hashlib
import json
import re
import stat
import struct
import warnings
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from bnfix.errors import DataError, some

MAX_PIXELS = 100_000_000
MAX_CLASSES = 1_000_000
MAX_CLASS_MAP_BYTES = 10_000_000
# Not every plugin: some of Pillow's formats start other programs (EPS) or are rarely tested.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# What Pillow's decoders raise on files that are broken on purpose; it has no common base class.
_DECODE_ERRORS = (
    OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError,
    AttributeError, RuntimeError, MemoryError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_IMAGENET_ID = re.compile(r"n[0-9]{8}")


class Images(ABC):
    """One opened DATA: its images by position, and their labels where there are any.

    ``labels`` is int64 (n,) or None; ``class_names[k]`` names class k; ``notes`` say in words what
    was assumed or passed over; ``shaped`` keeps resized images for those who batch them.
    """

    kind: str

    def __init__(self, spec: str, channels: int) -> None:
        self.spec = spec
        self.channels = channels
        self.labels: np.ndarray | None = None
        self.class_names: tuple[str, ...] | None = None
        self.notes: list[str] = []
        self.shaped: dict[Any, Any] = {}
        self._digests: dict[int, bytes] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Worker processes decode; sending them what is already decoded would copy it to each.
        return self.__dict__ | {"shaped": {}, "_digests": {}}

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def _name(self, i: int) -> str: ...

    @abstractmethod
    def _read(self, i: int) -> np.ndarray: ...

    @abstractmethod
    def _size_of(self, i: int) -> tuple[int, int]: ...

    @abstractmethod
    def _hash(self, i: int) -> bytes: ...

    def name(self, i: int) -> str:
        """Name image ``i`` for messages and reports.

        Args:
            i: position.

        Returns:
            The file's path inside the folder, or ``images[i]``.
        """
        return self._name(i)

    def read(self, i: int) -> np.ndarray:
        """Read and decode one image: first frame, upright, 8 bit, no alpha.

        A bad image (missing, damaged, no image, too large) is a DataError.

        Args:
            i: position.

        Returns:
            uint8 (H, W, C), C the channels asked for when the data were opened.
        """
        return self._read(i)

    def size_of(self, i: int) -> tuple[int, int]:
        """Size of one image, upright, without decoding its pixels; bad images as in ``read``.

        Args:
            i: position.

        Returns:
            Height and width in pixels.
        """
        return self._size_of(i)

    def digest(self, i: int) -> bytes:
        """Hash one image: its file's bytes, or its shape and raw pixels.

        A file that cannot be read counts by its name.

        Args:
            i: position.

        Returns:
            6 bytes (blake2b).
        """
        i = int(i)
        if i not in self._digests:
            self._digests[i] = self._hash(i)
        return self._digests[i]


class FileImages(Images):
    """Images in a folder, one file each; ``classes`` are its class folders, if it has any."""

    def __init__(
        self,
        spec: str,
        kind: str,
        files: Sequence[str],
        channels: int,
        *,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(spec, channels)
        self.kind = kind
        self.files = list(files)
        self.classes = tuple(classes)

    def __len__(self) -> int:
        return len(self.files)

    def _name(self, i: int) -> str:
        return self.files[i].encode("utf-8", "backslashreplace").decode()

    def _read(self, i: int) -> np.ndarray:
        with self._open(i) as image:
            return _decode(image, self.channels)

    def _size_of(self, i: int) -> tuple[int, int]:
        with self._open(i) as image:
            # Pillow itself has turned a TIFF's size already.
            turned = image.format != "TIFF" and _orientation(image) >= 5
            return image.size if turned else (image.height, image.width)

    def _hash(self, i: int) -> bytes:
        try:
            with open_regular(Path(self.spec) / self.files[i]) as file:
                return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=6)).digest()
        except (OSError, ValueError):
            return hashlib.blake2b(self.name(i).encode(), digest_size=6, key=b"name").digest()

    @contextmanager
    def _open(self, i: int) -> Iterator[Image.Image]:
        path = Path(self.spec) / self.files[i]
        try:
            # Pillow warns of large or odd files; what matters of that becomes an error below.
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with open_regular(path) as file, Image.open(file, formats=_FORMATS) as image:
                    if image.width * image.height > MAX_PIXELS:
                        raise Image.DecompressionBombError
                    yield image
        except _DECODE_ERRORS as error:
            if isinstance(error, Image.DecompressionBombError):
                reason = f"more than {MAX_PIXELS:,} pixels"
            elif isinstance(error, UnidentifiedImageError):
                reason = "not an image in a known format"
            elif isinstance(error, FileNotFoundError):
                reason = "no such file"
            else:
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            name = self.name(i)
            raise DataError(f"{name}: bad image, {reason}.", name=name, path=path) from error


class ArrayImages(Images):
    """Images in one array, (N, H, W, C) uint8 with 1, 3 or 4 channels (the fourth is alpha)."""

    kind = "npz"

    def __init__(self, spec: str, array: np.ndarray, channels: int) -> None:
        super().__init__(spec, channels)
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def take(self, index: np.ndarray) -> np.ndarray:
        """Several images at once, in the channels asked for.

        Args:
            index: positions (n,).

        Returns:
            A new uint8 array (n, H, W, C).
        """
        pixels: np.ndarray = self.array[index]
        if pixels.shape[3] == 4:
            pixels = pixels[..., :3]
        if pixels.shape[3] == self.channels:
            return pixels
        if self.channels == 3:
            return np.repeat(pixels, 3, axis=3)
        # ITU-R 601 luma in the same fixed point as Pillow, so that files and arrays agree.
        r, g, b = (pixels[..., k].astype(np.uint32) for k in range(3))
        luma = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16
        return np.expand_dims(luma.astype(np.uint8), 3)

    def _name(self, i: int) -> str:
        return f"images[{i}]"

    def _read(self, i: int) -> np.ndarray:
        image: np.ndarray = self.take(np.asarray([i]))[0]
        return image

    def _size_of(self, i: int) -> tuple[int, int]:
        return int(self.array.shape[1]), int(self.array.shape[2])

    def _hash(self, i: int) -> bytes:
        pixels = np.ascontiguousarray(self.array[i])
        digest = hashlib.blake2b(repr(pixels.shape).encode(), digest_size=6)
        digest.update(pixels.data)
        return digest.digest()


def open_regular(path: Path) -> BufferedReader:
    """Open a file to read, and refuse pipes and devices, which could block for ever.

    Args:
        path: the file.

    Returns:
        The open binary file.

    Raises:
        OSError: if it cannot be opened or is no regular file.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("not a regular file")
    return path.open("rb")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except _DECODE_ERRORS:
        return 1  # a broken tag block does not make the pixels worse


# Pixels of an opened image, uint8 (H, W, channels).
def _decode(image: Image.Image, channels: int) -> np.ndarray:
    image.load()
    orientation = _orientation(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode.startswith("I"):
        deep = np.asarray(image).astype(np.int64)
        if deep.min() < 0 or deep.max() > 65535:
            raise ValueError("more than 16 bits a pixel")
        image = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    image = image.convert("RGB" if channels == 3 else "L")
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    pixels = np.array(image)
    return pixels if channels == 3 else pixels[..., None]


def map_classes(
    names: Sequence[str], class_map: dict[str, int] | None, n_classes: int | None, where: str
) -> tuple[dict[str, int], str]:
    """Give each class name its index: by the map, by ImageNet id, by value, or by sorted order.

    Args:
        names: distinct class names.
        class_map: name to index, where the user gave one.
        n_classes: outputs of the model, where known.
        where: the data, for messages.

    Returns:
        Name to index, and in words how it was found.

    Raises:
        DataError: if a name has no index, or the indices cannot be the model's outputs.
    """
    names, n = sorted(names), len(names)
    ask = "Give --class-map FILE.json (class name to index)."
    if class_map is not None:
        missing = [name for name in names if name not in class_map]
        if missing:
            raise DataError(
                f"{where}: {len(missing)} of {n} classes are not in the class map: "
                f"{some(missing)}. Add them."
            )
        indices, how = {name: class_map[name] for name in names}, "classes by the class map"
    elif all(_IMAGENET_ID.fullmatch(name) for name in names) and n != n_classes:
        indices, how = _imagenet_indices(names, where, ask), "classes by ImageNet id"
    elif all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        indices, how = {name: int(name) for name in names}, "classes are numbers, taken by value"
        if len(set(indices.values())) < n:
            raise DataError(f"{where}: two classes of the same number among {some(names)}. {ask}")
    elif n_classes is not None and n != n_classes:
        raise DataError(
            f"{where}: {n} classes for a model with {n_classes} outputs, so their sorted names "
            f"cannot say which output is which. {ask}"
        )
    else:
        indices = {name: k for k, name in enumerate(names)}
        how = f"{n} classes numbered by sorted name"
    limit = MAX_CLASSES if n_classes is None else n_classes
    outside = [f"{name} = {k}" for name, k in indices.items() if k >= limit]
    if outside:
        raise DataError(
            f"{where}: {len(outside)} of {n} classes lie outside the outputs 0 to {limit - 1}: "
            f"{some(outside)}. {ask}"
        )
    return indices, how


def _imagenet_indices(names: Sequence[str], where: str, ask: str) -> dict[str, int]:
    known: Sequence[str] = names
    if len(names) != 1000:
        try:
            from timm.data.imagenet_info import ImageNetInfo  # optional: it carries the list
        except ImportError as error:
            raise DataError(
                f"{where}: {len(names)} folders or labels named by ImageNet ids, not all 1000, "
                f"and the full list comes with timm, which is not installed. {ask}"
            ) from error
        known = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    indices = {name: k for k, name in enumerate(known)}
    unknown = [name for name in names if name not in indices]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of {len(names)} ids are not among ImageNet's 1000: "
            f"{some(unknown)}. {ask}"
        )
    return {name: indices[name] for name in names}


def check_range(labels: np.ndarray, n_classes: int | None, where: str) -> np.ndarray:
    """Check that integer labels can be outputs of the model.

    Args:
        labels: any integer type (n,).
        n_classes: outputs of the model, where known.
        where: the data, for messages.

    Returns:
        The labels as int64.

    Raises:
        DataError: if a label is negative or above the last output.
    """
    limit = MAX_CLASSES if n_classes is None else n_classes
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= limit:
        n_bad = int(((labels < 0) | (labels >= limit)).sum())
        what = "" if n_classes is None else f", the model's {n_classes} outputs"
        raise DataError(
            f"{where}: labels from {low} to {high}, {n_bad} of {len(labels)} outside "
            f"0 to {limit - 1}{what}. Correct the labels, or give --class-map FILE.json."
        )
    return labels.astype(np.int64)


def read_class_map(path: Path) -> dict[str, int]:
    """Read a class map: a JSON object, class name to index.

    Args:
        path: the JSON file, at most 10 MB.

    Returns:
        Name to index.

    Raises:
        DataError: if it cannot be read, is too large, or is not such an object.
    """
    where = f"class map {path}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise DataError(f"{where}: names listed twice: {some(twice)}. Keep one.", path=path)
        return found

    try:
        with open_regular(Path(path)) as file:
            text = file.read(MAX_CLASS_MAP_BYTES + 1)
        if len(text) > MAX_CLASS_MAP_BYTES:
            raise DataError(f"{where}: larger than {MAX_CLASS_MAP_BYTES // 10**6} MB.", path=path)
        content = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}).", path=path) from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{where}: expected an object of class name to index.", path=path)
    wrong = [
        f"{name}: {k!r}"[:60]
        for name, k in content.items()
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < MAX_CLASSES
    ]
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} values are not whole numbers from 0: {some(wrong)}.", path=path
        )
    return content
