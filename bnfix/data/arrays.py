"""Arrays in memory: ``.npz``, ``.pt`` and ``.safetensors`` files, and inputs that are no images.

Files may come from strangers: headers are checked before memory is taken, nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import tokenize
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfix.checkpoints.read import read_file
from bnfix.core.errors import CheckpointError, DataError, some
from bnfix.core.masks import MASK_KEYS, valid_of
from bnfix.core.torch_private import tree_leaves
from bnfix.data.archives import named_files
from bnfix.data.images import DIGEST_SIZE, ArrayImages, Images, Opened

_EXPECTED = (
    "floating-point or whole numbers (a tensor, an array, a number), or tuples and dicts of them. "
    "From Python, batches of any form work: bnfix.recalibrate_(model, batches, forward=...)"
)
#: Arrays of a file that say what is right.
_TARGETS = ("labels", "targets")
#: The one type of each sort: networks refuse float64 and int32 beside their own.
_TYPES = {"f": np.float32, "b": np.bool_}
_KINDS = {"mask": "b", "lengths": "iu"}
# Maps are large, so targets keep a small type until `TensorItems.take` converts them.
_SMALL = {"bool": np.uint8, "uint8": np.uint8, "int16": np.int16, "int32": np.int32}
#: Numbers looked at in one piece.
_AT_ONCE = 1 << 24
_GIB = 1 << 30
# What zipfile and numpy's header parser raise on archives that are broken on purpose.
_ARCHIVE_ERRORS = (
    OSError, ValueError, TypeError, EOFError, RuntimeError, MemoryError, SyntaxError, zlib.error,
    tokenize.TokenError, zipfile.BadZipFile,
)  # fmt: skip


class TensorItems(Images):
    """Inputs by position: one tensor with a row an item, or a list of tensors or nests of them.

    A batch of ``ragged`` items is a list of them. With a ``mask`` or ``lengths`` beside them a
    batch is a dict.
    """

    noun = "examples"

    def __init__(
        self, spec: str, items: Tensor | Sequence[Any], kind: str, *, ragged: bool = False
    ) -> None:
        super().__init__(spec, 0)
        self.items, self.kind, self.ragged = items, kind, ragged
        self.beside: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: np.ndarray) -> Any:
        """A batch of items, a new leading dimension on each tensor."""
        if isinstance(self.items, Tensor):
            rows = torch.from_numpy(index)
            taken = as_inputs(self.items[rows])
            beside = {name: values[rows] for name, values in self.beside.items()}
            return {"inputs": taken, **beside} if beside else taken
        if self.ragged:
            return [self.items[i] for i in index.tolist()]
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
        for leaf in tree_leaves([self.items[i], *(part[i] for part in self.beside.values())]):
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
        value = torch.from_numpy(array.astype(_TYPES.get(array.dtype.kind, np.int64)))
    if not isinstance(value, Tensor) or value.is_complex() or value.layout != torch.strided:
        found = f"tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise DataError(f"a {found}, expected {_EXPECTED}.")
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


# --- files of arrays ---


def open_arrays(spec: str, wanted: bool, channels: int) -> Opened:
    """Open ``.npz``, ``.pt`` or ``.safetensors`` files of named arrays, one or a range of them."""
    paths = named_files(spec)
    found = [_read(path, wanted) for path in paths]
    for path, (arrays, _) in zip(paths, found, strict=True):
        odd = [k for k in {**arrays, **found[0][0]} if _row(arrays, k) != _row(found[0][0], k)]
        if odd:
            raise DataError(
                f"{some(odd)} in {path.name} and {paths[0].name} differ: "
                f"{_row(arrays, odd[0])} and {_row(found[0][0], odd[0])}. Make them alike."
            )
    parts = [arrays for arrays, _ in found]
    arrays = parts[0]
    if len(parts) > 1:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in arrays}
    others = sorted({other for _, names in found for other in names})
    images = _images_of(spec, arrays, channels)
    images.unused = others
    images.kind = paths[0].suffix.removeprefix(".")
    if "targets" in arrays:
        targets = _tensor("targets", arrays["targets"], _SMALL)
        images.targets = TensorItems(spec, targets, "targets")
        # Whole numbers of the size of the pixels are masks.
        if isinstance(images, ArrayImages) and not targets.is_floating_point():
            images.moves = targets.shape == images.array.shape[:3]
    return images, arrays.get("labels")


def _row(arrays: dict[str, np.ndarray], name: str) -> str:
    """Type and shape of one row of an array, in words."""
    return f"{arrays[name].dtype} {arrays[name].shape[1:]}" if name in arrays else "none"


def _images_of(spec: str, arrays: dict[str, np.ndarray], channels: int) -> Images:
    array = arrays["images" if "images" in arrays else "inputs"]
    if "images" not in arrays and not _are_pixels(array.shape, array.dtype):
        inputs = _tensor("inputs", array, {"bool": np.bool_})
        items = TensorItems(spec, inputs, "npz")
        items.beside = {name: as_inputs(arrays[name]) for name in MASK_KEYS if name in arrays}
        if items.beside:
            total = inputs.shape[-1] if inputs.ndim > 1 else None
            valid_of(items.beside.get("mask"), items.beside.get("lengths"), total)
        return items
    images = ArrayImages(spec, array[..., None] if array.ndim == 3 else array, channels)
    n_channels = images.array.shape[3]
    if n_channels == 4:
        images.notes.append("the fourth channel (alpha) is dropped")
    if n_channels == 1 < channels:
        images.notes.append("grey images, repeated to 3 channels")
    if channels == 1 < n_channels:
        images.notes.append("colour images, turned to grey by ITU-R 601 luma")
    return images


def _tensor(name: str, array: np.ndarray, kept: Mapping[str, Any]) -> Tensor:
    """An array as float32, or as int64 unless its type is kept; not copied where it need not be."""
    kind = np.float32 if array.dtype.kind == "f" else kept.get(array.dtype.name, np.int64)
    with np.errstate(over="ignore"):  # what float32 cannot hold is found as an infinity
        values = torch.from_numpy(array.astype(kind, copy=False))
    refuse_not_finite(name, values)
    return values


def refuse_not_finite(name: str, values: Tensor, *, infinite: bool = True) -> None:
    """Refuse floats that are not numbers, or not finite either, with the place of the first."""
    if not values.is_floating_point() or not values.numel():
        return
    values = values if values.ndim else values[None]
    rows = max(1, _AT_ONCE * len(values) // values.numel())
    for start in range(0, len(values), rows):
        part = values[start : start + rows]
        bad = ~part.isfinite() if infinite else part.isnan()
        if bool(bad.any()):
            place = bad.nonzero()[0].tolist()
            value = float(part[tuple(place)])
            place[0] += start
            raise DataError(
                f"{name}{place} is {value}, expected finite numbers in float32. "
                "Remove or replace it."
            )


def _read(path: Path, wanted: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """The arrays of one file that are used, checked, and the names of others."""
    try:
        return (_read_npz if path.suffix.lower() == ".npz" else _read_tensors)(path, wanted)
    except _ARCHIVE_ERRORS as error:
        raise DataError(f"not a readable {path.suffix} file ({error}).") from error
    except CheckpointError as error:
        raise DataError(str(error).removeprefix(f"{path}: ")) from error


def _read_npz(path: Path, wanted: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """Headers first, then memory, then the arrays."""
    with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
        warnings.simplefilter("ignore")  # of headers that another numpy has written
        members = [member.removesuffix(".npy") for member in archive.namelist()]
        names = _names(members, members, wanted)
        _check({name: _npy_header(archive, name) for name in names})
        arrays = {name: _npy(archive, name) for name in names}
    return arrays, [member for member in members if member not in (*names, *_TARGETS)]


def _read_tensors(path: Path, wanted: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """Tensors by name, of torch's restricted loader; mapped from the disk where they can be."""
    content, *_ = read_file(path)
    if not isinstance(content, Mapping):
        raise DataError(f"holds a {type(content).__name__}, expected a dict with inputs, targets.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    names = _names(list(tensors), list(map(str, content)), wanted)
    arrays = {}
    for name in names:
        tensor = tensors[name].detach()
        plain_one = tensor.layout == torch.strided and not tensor.is_quantized
        # Repeated by a stride of 0, a few bytes can claim any size.
        if not plain_one or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            raise DataError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected plain numbers."
            )
        arrays[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    _check({name: (array.shape, array.dtype) for name, array in arrays.items()})
    return arrays, [str(name) for name in content if name not in (*names, *_TARGETS)]


def _names(arrays: Sequence[str], members: Sequence[str], wanted: bool) -> list[str]:
    """The arrays that are used: images or inputs, and labels or targets where they are wanted."""
    inputs = [name for name in ("images", "inputs") if name in arrays][:1]
    if not inputs:
        raise DataError(
            f"arrays {some(members) or 'none'}, expected one named images, or inputs for what is "
            "no image."
        )
    given = [name for name in _TARGETS if wanted and name in arrays]
    if len(given) > 1:
        raise DataError("labels and targets, expected one of them: classes, or what else is right.")
    # Images have none: they would have to move with the pixels.
    return inputs + given + [name for name in MASK_KEYS if name in arrays and inputs == ["inputs"]]


def _check(headers: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
    """Refuse arrays of other kinds or lengths than expected, by their headers."""
    (name, (shape, dtype)), *others = headers.items()
    if name == "images":
        n_channels = 1 if len(shape) == 3 else shape[-1] if len(shape) == 4 else 0
        if dtype != np.uint8 or n_channels not in (1, 3, 4):
            raise DataError(
                f"images are {dtype} {shape}, expected uint8 (N, H, W) or "
                "(N, H, W, C) with 1, 3 or 4 channels last."
            )
        if min(shape) == 0:
            raise DataError(f"no images; their shape is {shape}.")
    elif dtype.kind not in "fiub" or not shape or min(shape) == 0:
        raise DataError(f"inputs are {dtype} {shape}, expected numbers of shape (N, ...).")
    for other, (found, kind) in others:
        n = shape[0]
        fits = found == (n,) if other == "lengths" else found[:1] == (n,) and len(found) > 1
        if other in MASK_KEYS and not (fits and kind.kind in _KINDS[other]):
            raise DataError(
                f"{other} is {kind} {found}, expected the valid positions of inputs: lengths are "
                f"whole numbers ({n},), a mask is bool ({n}, positions). Masks to learn are "
                "targets."
            )
        if other == "labels" and (kind.kind not in "iu" or found != (n,)):
            raise DataError(
                f"labels are {kind} {found}, expected whole numbers ({n},), one an image."
            )
        if other == "targets" and (kind.kind not in "fiub" or found[:1] != (n,) or 0 in found):
            raise DataError(f"targets are {kind} {found}, expected numbers of shape ({n}, ...).")


def _are_pixels(shape: tuple[int, ...], dtype: np.dtype[Any]) -> bool:
    """Whether inputs are images: 8 bits, channels last. Other whole numbers are codes."""
    return dtype == np.uint8 and len(shape) == 4 and shape[3] in (1, 3, 4)


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
    if archive.namelist().count(f"{name}.npy") != 1:
        found = some([m.removesuffix(".npy") for m in archive.namelist()]) or "none"
        raise DataError(f"arrays {found}, expected one named {name}.")
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
