"""Arrays in memory: ``.npz`` files, and what a callable of the user's own gives.

Only a callable named on the command line is imported, never one that comes out of a file.
"""

from __future__ import annotations

import hashlib
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bnfix.core.errors import DataError, ModelError, one_line, some
from bnfix.core.torch_private import tree_leaves, tree_map
from bnfix.data.images import DIGEST_SIZE, ArrayImages, Images, Opened, digest_of, pixels_of
from bnfix.models.build import import_callable, importable

_EXPECTED = (
    "floating-point or whole numbers (a tensor, an array, a number), or tuples and dicts of them. "
    "From Python, batches of any form work: bnfix.recalibrate_(model, batches, forward=...)"
)
#: Under which name an item that is a dict may have its label.
_LABELS = ("label", "labels", "target", "targets", "y")
_GIB = 1 << 30
# What zipfile and numpy's header parser raise on archives that are broken on purpose.
_ARCHIVE_ERRORS = (
    OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError, zlib.error,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


class TensorItems(Images):
    """Inputs by position: one tensor with a row an item, or a list of tensors or nests of them."""

    def __init__(self, spec: str, items: Tensor | Sequence[Any], kind: str) -> None:
        super().__init__(spec, 0)
        self.items, self.kind = items, kind

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: np.ndarray) -> Any:
        """A batch of items, a new leading dimension on each tensor."""
        if isinstance(self.items, Tensor):
            return self.items[torch.from_numpy(index)]
        try:
            return _stacked([self.items[i] for i in index.tolist()])
        except RuntimeError as error:
            # torch does not say which items differ.
            shapes = [[tuple(leaf.shape) for leaf in tree_leaves(self.items[i])] for i in index]
            odd = next(k for k, shape in enumerate(shapes) if shape != shapes[0])
            raise DataError(
                f"{self.spec}: items of different shapes in one batch, item {index[0]} is "
                f"{shapes[0]}, item {index[odd]} is {shapes[odd]}. Make them alike, or give "
                "--batch-size 1."
            ) from error

    def _hash(self, i: int) -> bytes:
        digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
        for leaf in tree_leaves(self.items[i]):
            # The same bytes can be other numbers, or the same in another shape.
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().numpy().tobytes())
        return digest.digest()


def as_inputs(value: Any) -> Any:
    """Numbers of any kind as float32, int64 or bool tensors on the CPU; nests stay nests."""
    if isinstance(value, Mapping):
        return {str(key): as_inputs(item) for key, item in value.items()}
    if isinstance(value, list | tuple) and value:
        return tuple(as_inputs(item) for item in value)
    if isinstance(value, np.ndarray | np.generic | float | int):
        array = np.asarray(value)
        if array.dtype.kind not in "fiub":
            raise DataError(f"an array of {array.dtype}, expected {_EXPECTED}.")
        value = torch.from_numpy(
            array.astype({"f": np.float32, "b": np.bool_}.get(array.dtype.kind, np.int64))
        )
    if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
        found = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"a {found}, expected {_EXPECTED}.")
    # One type of each sort: networks refuse float64 and int32 beside their own.
    value = value.detach().cpu()
    if value.is_floating_point():
        return value.float()
    return value if value.dtype == torch.bool else value.long()


def _stacked(items: list[Any]) -> Any:
    first = items[0]
    if isinstance(first, dict):
        return {key: _stacked([item[key] for item in items]) for key in first}
    if isinstance(first, tuple):
        return tuple(_stacked(list(parts)) for parts in zip(*items, strict=True))
    return torch.stack(items)


# --- .npz files ---


def open_npz(spec: str, wanted: bool, channels: int) -> Opened:
    """Open an ``.npz`` file: headers first, then memory, then the arrays."""
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(spec) as archive:
            warnings.simplefilter("ignore")  # of headers that another numpy has written
            members = archive.namelist()
            is_image = "images.npy" in members or "inputs.npy" not in members
            name = "images" if is_image else "inputs"
            shape, dtype = _npy_header(archive, name)
            (_check_images if is_image else _check_inputs)(shape, dtype)
            labels = _npz_labels(archive, shape[0]) if wanted else None
            array = _npy(archive, name)
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"not a readable .npz file ({error}).") from error
    notes = []
    others = [member for member in members if member not in (f"{name}.npy", "labels.npy")]
    if others:
        notes.append(f"arrays passed over: {some(others)}")
    if not is_image:
        inputs = TensorItems(spec, as_inputs(array), "npz")
        inputs.notes += notes
        return inputs, labels
    images = ArrayImages(spec, array[..., None] if array.ndim == 3 else array, channels)
    n_channels = images.array.shape[3]
    if n_channels == 4:
        notes.append("the fourth channel (alpha) is dropped")
    if n_channels == 1 < channels:
        notes.append("grey images, repeated to 3 channels")
    if channels == 1 < n_channels:
        notes.append("colour images, turned to grey by ITU-R 601 luma")
    images.notes += notes
    return images, labels


def _check_images(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    n_channels = 1 if len(shape) == 3 else shape[-1] if len(shape) == 4 else 0
    if dtype != np.uint8 or n_channels not in (1, 3, 4):
        raise DataError(
            f"images are {dtype} {shape}, expected uint8 (N, H, W) or "
            "(N, H, W, C) with 1, 3 or 4 channels last."
        )
    if min(shape) == 0:
        raise DataError(f"no images; their shape is {shape}.")


def _check_inputs(shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "fiub" or not shape or min(shape) == 0:
        raise DataError(f"inputs are {dtype} {shape}, expected numbers of shape (N, ...).")


def _npz_labels(archive: zipfile.ZipFile, n: int) -> np.ndarray | None:
    """Class indices, one an item, where the archive has them."""
    if "labels.npy" not in archive.namelist():
        return None
    shape, dtype = _npy_header(archive, "labels")
    if dtype.kind not in "iu" or shape != (n,):
        raise DataError(f"labels are {dtype} {shape}, expected whole numbers ({n},), one an image.")
    return _npy(archive, "labels")


def named_array(path: Path, name: str) -> np.ndarray:
    """One array of an ``.npz`` file; its header is read first."""
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
            warnings.simplefilter("ignore")
            _npy_header(archive, name)
            return _npy(archive, name)
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"not a readable .npz file ({error})") from error


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[Any, np.dtype[Any]]:
    """Shape and dtype of an array in the archive, once its declared size is believed."""
    members = archive.namelist()
    if members.count(f"{name}.npy") != 1:
        raise DataError(
            f"arrays {some(members) or 'none'}, expected one named {name}"
            f"{', or inputs for what is no image' if name == 'images' else ''}."
        )
    info = archive.getinfo(f"{name}.npy")
    # Images of one colour compress 1000 times; below 1 GiB that does no harm.
    if info.file_size > max(_GIB, 100 * info.compress_size):
        raise DataError(
            f"{name} would unpack from {info.compress_size:,} to {info.file_size:,} bytes, "
            "more than 100 times and 1 GiB. Save it again with numpy.savez."
        )
    with archive.open(info) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f"{name} has .npy version {version}")
        read = np.lib.format.read_array_header_1_0
        if version == (2, 0):
            read = np.lib.format.read_array_header_2_0
        shape, _, dtype = read(file)
        n_bytes = file.tell() + prod(shape) * dtype.itemsize
    # Memory is taken for the claimed shape, so it must be that of the bytes there are.
    if min(shape, default=0) < 0 or dtype.hasobject or n_bytes != info.file_size:
        raise DataError(
            f"{name} says {dtype} {shape}, {n_bytes:,} bytes of plain numbers, but "
            f"{info.file_size:,} are stored."
        )
    return shape, dtype


def _npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


# --- callables ---


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
    return images, [label for _, label in pairs] if wanted else None


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
