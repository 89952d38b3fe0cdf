"""Arrays in memory, from ``.npz``, ``.pt`` and ``.safetensors`` files and the user's callables.

Files may come from strangers: headers are checked before memory is allocated, and nothing is
unpickled. Only a callable named on the command line is imported, never one named in a file.
"""

from __future__ import annotations

import hashlib
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bnfix.checkpoints.read import read_file
from bnfix.core.errors import BnfixError, DataError, one_line, some
from bnfix.core.masks import MASK_KEYS, valid_of
from bnfix.core.torch_private import tree_leaves, tree_map
from bnfix.data.archives import named_files
from bnfix.data.images import (
    DIGEST_SIZE,
    ArrayImages,
    Images,
    Opened,
    digest_of,
    parsing_file,
    pixels_of,
)
from bnfix.models.build import import_callable, importable

_EXPECTED = (
    "floating-point numbers or integers (a tensor, an array, a number), or tuples and dicts of "
    "them. From Python, batches of any form work: bnfix.recalibrate_(model, batches, forward=...)"
)
#: The arrays of a file that hold the truth.
_TARGETS = ("labels", "targets")
#: The keys under which a dict item can hold its label.
_LABELS = ("label", "labels", "target", "targets", "y")
#: The single type per kind of number: networks refuse float64 and int32 next to their own types.
_TYPES = {"f": np.float32, "b": np.bool_}
_VALID = (
    "the valid positions of inputs: lengths are integers ({n},), a mask is bool ({n}, positions). "
    "Masks to learn are targets"
)
#: Arrays next to the inputs: their kinds of numbers, numbers of axes, and both in words.
_BESIDE = {
    "labels": ("iu", range(1, 2), "integers ({n},), one per image"),
    "targets": ("fiub", range(1, 65), "numbers of shape ({n}, ...)"),
    "lengths": ("iu", range(1, 2), _VALID),
    "mask": ("b", range(2, 65), _VALID),
}
# Masks are large, so targets keep a small type until `TensorItems.take` converts them.
_SMALL = {"bool": np.uint8, "uint8": np.uint8, "int16": np.int16, "int32": np.int32}
#: Numbers checked at once.
_AT_ONCE = 1 << 24


class TensorItems(Images):
    """Inputs by position: one tensor with a row per item, or a list of tensors or nests of them.

    A batch of ``ragged`` items is a list. With a ``mask`` or ``lengths``, a batch is a dict.
    """

    noun = "examples"
    ragged = False

    def __init__(self, spec: str, items: Tensor | Sequence[Any], kind: str) -> None:
        super().__init__(spec, 0)
        self.items, self.kind = items, kind
        self.beside: dict[str, Tensor] = {}

    def __len__(self) -> int:
        return len(self.items)

    def take(self, index: np.ndarray) -> Any:
        """A batch of items, with a new leading dimension on each tensor."""
        if isinstance(self.items, Tensor):
            rows = torch.from_numpy(index)
            taken = as_inputs(self.items[rows])
            beside = {name: values[rows] for name, values in self.beside.items()}
            return {"inputs": taken, **beside} if beside else taken
        items = [self.items[i] for i in index.tolist()]
        if self.ragged:
            return items
        leaves = [tree_leaves(item) for item in items]
        try:
            stacks = iter([torch.stack(column) for column in zip(*leaves, strict=True)])
        except RuntimeError as error:
            # torch does not say which items differ.
            shapes = [[tuple(leaf.shape) for leaf in own] for own in leaves]
            odd = next(k for k, shape in enumerate(shapes) if shape != shapes[0])
            raise DataError(
                f"{self.spec}: items of different shapes in one batch, item {index[0]} is "
                f"{shapes[0]}, item {index[odd]} is {shapes[odd]}. Give them the same shape, or "
                "use --batch-size 1."
            ) from error
        return tree_map(lambda _: next(stacks), items[0])

    def _hash(self, i: int) -> bytes:
        digest = hashlib.blake2b(digest_size=DIGEST_SIZE)
        for leaf in tree_leaves([self.items[i], *(part[i] for part in self.beside.values())]):
            # The same bytes can be different numbers, or the same numbers in another shape.
            digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            digest.update(leaf.contiguous().numpy().tobytes())
        return digest.digest()


def as_inputs(value: Any) -> Any:
    """Convert numbers of any kind to float32, int64 or bool CPU tensors; nests stay nests."""
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


# --- files of arrays ---


def open_arrays(spec: str, wanted: bool, channels: int) -> Opened:
    """Open one or a range of ``.npz``, ``.pt`` or ``.safetensors`` files with named arrays."""
    parts: list[dict[str, np.ndarray]] = []
    others: set[str] = set()
    paths = named_files(spec)
    for path in paths:
        read = _read_npz if path.suffix.lower() == ".npz" else _read_tensors
        with parsing_file(path):
            part, unused = read(path, wanted)
        parts.append(part)
        others.update(unused)
        rows, first = ({name: f"{array.dtype} {array.shape[1:]}" for name, array in one.items()}
                       for one in (part, parts[0]))  # fmt: skip
        odd = [name for name in {**rows, **first} if rows.get(name) != first.get(name)]
        if odd:
            raise DataError(
                f"{some(odd)} in {path.name} and {paths[0].name} differ: "
                f"{rows.get(odd[0])} and {first.get(odd[0])}. Give them one type and shape."
            )
    arrays = parts[0]
    if len(parts) > 1:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in arrays}
    images = _images_of(spec, arrays, channels)
    images.unused, images.kind = sorted(others), paths[0].suffix.removeprefix(".")
    if "targets" in arrays:
        targets = _tensor("targets", arrays["targets"], _SMALL)
        images.targets = TensorItems(spec, targets, "targets")
        # Integers with the size of the pixels are masks.
        if isinstance(images, ArrayImages) and not targets.is_floating_point():
            images.moves = targets.shape == images.array.shape[:3]
    return images, arrays.get("labels")


def _images_of(spec: str, arrays: dict[str, np.ndarray], channels: int) -> Images:
    array = arrays["images" if "images" in arrays else "inputs"]
    # 8-bit inputs with channels last are images too; other integers are codes.
    is_pixels = array.dtype == np.uint8 and array.ndim == 4 and array.shape[3] in (1, 3, 4)
    if "images" not in arrays and not is_pixels:
        inputs = _tensor("inputs", array, {"bool": np.bool_})
        items = TensorItems(spec, inputs, "npz")
        items.beside = {name: as_inputs(arrays[name]) for name in MASK_KEYS if name in arrays}
        if items.beside:
            total = inputs.shape[-1] if inputs.ndim > 1 else None
            valid_of(items.beside.get("mask"), items.beside.get("lengths"), total)
        return items
    images = ArrayImages(spec, array[..., None] if array.ndim == 3 else array, channels)
    if images.array.shape[3] == 4:
        images.notes.append("the fourth channel (alpha) is dropped")
    if images.array.shape[3] == 1 < channels:
        images.notes.append("grey images, repeated to 3 channels")
    return images


def _tensor(name: str, array: np.ndarray, kept: Mapping[str, Any]) -> Tensor:
    """An array as a float32 or int64 tensor, or in a kept type; copied only if necessary."""
    kind = np.float32 if array.dtype.kind == "f" else kept.get(array.dtype.name, np.int64)
    with np.errstate(over="ignore"):  # an overflow is refused below as an infinity
        values = torch.from_numpy(array.astype(kind, copy=False))
    refuse_not_finite(name, values)
    return values


def refuse_not_finite(name: str, values: Tensor, *, infinite: bool = True) -> None:
    """Refuse NaN, and by default infinities, with the place of the first."""
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


@contextmanager
def _npz(path: Path) -> Iterator[zipfile.ZipFile]:
    with warnings.catch_warnings(), zipfile.ZipFile(path) as archive:
        warnings.simplefilter("ignore")  # about headers that another numpy version wrote
        yield archive


def _read_npz(path: Path, wanted: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """The used arrays, whose headers are checked before memory is allocated, and other names."""
    with _npz(path) as archive:
        members = [member.removesuffix(".npy") for member in archive.namelist()]
        names = _names(members, members, wanted)
        _check({name: _npy_header(archive, name) for name in names})
        arrays = {name: _npy(archive, name) for name in names}
    return arrays, [member for member in members if member not in (*names, *_TARGETS)]


def _read_tensors(path: Path, wanted: bool) -> tuple[dict[str, np.ndarray], list[str]]:
    """The tensors by name, from torch's restricted loader; memory-mapped if possible."""
    content, *_ = read_file(path)
    if not isinstance(content, Mapping):
        raise DataError(f"holds a {type(content).__name__}, expected a dict with inputs, targets.")
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)}
    names = _names(list(tensors), list(map(str, content)), wanted)
    arrays = {}
    for name in names:
        tensor = tensors[name].detach()
        plain_one = tensor.layout == torch.strided and not tensor.is_quantized
        # With a stride of 0, a few bytes can claim any size.
        if not plain_one or tensor.numel() * tensor.itemsize > tensor.untyped_storage().nbytes():
            found = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise DataError(f"{name} is {found}, expected plain numbers.")
        arrays[name] = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    _check({name: (array.shape, array.dtype) for name, array in arrays.items()})
    return arrays, [str(name) for name in content if name not in (*names, *_TARGETS)]


def _names(arrays: Sequence[str], members: Sequence[str], wanted: bool) -> list[str]:
    """The used arrays: images or inputs, and labels or targets if they are wanted."""
    inputs = [name for name in ("images", "inputs") if name in arrays][:1]
    if not inputs:
        raise DataError(
            f"arrays {some(members) or 'none'}, expected one named images, or inputs for other "
            "data."
        )
    given = [name for name in _TARGETS if wanted and name in arrays]
    if len(given) > 1:
        raise DataError("labels and targets, expected one of them: labels (classes) or targets.")
    # Images have no mask or lengths: those would have to move with the pixels.
    return inputs + given + [name for name in MASK_KEYS if name in arrays and inputs == ["inputs"]]


def _check(headers: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]]) -> None:
    """Refuse arrays of an unexpected kind or length, by their headers."""
    (name, (shape, dtype)), *others = headers.items()
    if name == "images":
        n_channels = 1 if len(shape) == 3 else shape[-1] if len(shape) == 4 else 0
        if dtype != np.uint8 or n_channels not in (1, 3, 4):
            do = " Save (255 * images).astype(uint8), or store ready network inputs as `inputs`."
            raise DataError(
                f"images are {dtype} {shape}, expected uint8 (N, H, W) or "
                f"(N, H, W, C) with 1, 3 or 4 channels last.{do * (dtype.kind == 'f')}"
            )
        if min(shape) == 0:
            raise DataError(f"no images; their shape is {shape}.")
    elif dtype.kind not in "fiub" or not shape or min(shape) == 0:
        raise DataError(f"inputs are {dtype} {shape}, expected numbers of shape (N, ...).")
    for other, (found, kind) in others:
        kinds, ranks, words = _BESIDE[other]
        fits = found[:1] == shape[:1] and len(found) in ranks and 0 not in found
        if not (fits and kind.kind in kinds):
            verb = "is" if other in MASK_KEYS else "are"
            expected = words.format(n=shape[0])
            raise DataError(f"{other} {verb} {kind} {found}, expected {expected}.")


def named_array(path: Path, name: str) -> np.ndarray:
    """One array of an ``.npz`` file; its header is read first."""
    with parsing_file(path), _npz(path) as archive:
        _npy_header(archive, name)
        return _npy(archive, name)


def _npy_header(archive: zipfile.ZipFile, name: str) -> tuple[Any, np.dtype[Any]]:
    """The shape and dtype of an array in the archive, after a check of its declared size."""
    if archive.namelist().count(f"{name}.npy") != 1:
        found = some([m.removesuffix(".npy") for m in archive.namelist()]) or "none"
        raise DataError(f"arrays {found}, expected one named {name}.")
    info = archive.getinfo(f"{name}.npy")
    # Images of a single colour compress 1000 times; below 1 GiB that does no harm.
    if info.file_size > max(1 << 30, 100 * info.compress_size):
        raise DataError(
            f"{name} would unpack from {info.compress_size:,} to {info.file_size:,} bytes, "
            "more than 100 times and 1 GiB. Save it again with numpy.savez."
        )
    with archive.open(info) as file:
        readers = {(1, 0): np.lib.format.read_array_header_1_0,
                   (2, 0): np.lib.format.read_array_header_2_0}  # fmt: skip
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"{name} has .npy version {version}")
        shape, _, dtype = readers[version](file)
        n_bytes = file.tell() + prod(shape) * dtype.itemsize
    if dtype.hasobject:
        what = f"array {name} holds Python objects, expected numbers"
        raise DataError(f"{what}. For whole numbers, save {name}.astype(int).")
    # numpy allocates memory for the declared shape, so it must match the stored bytes.
    if min(shape, default=0) < 0 or n_bytes != info.file_size:
        raise DataError(
            f"array {name} is declared as {dtype} {shape}, {n_bytes:,} bytes, but "
            f"{info.file_size:,} are stored. Download it again."
        )
    return shape, dtype


def _npy(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


# --- the items of a callable ---


class ItemImages(Images):
    """Images from the user's code, kept in memory."""

    kind = "callable"

    def __init__(self, spec: str, items: list[np.ndarray], channels: int) -> None:
        super().__init__(spec, channels)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def read(self, i: int) -> np.ndarray:
        """The given pixels, in the requested channels."""
        return pixels_of(Image.fromarray(self.items[i]), self.channels)

    def _hash(self, i: int) -> bytes:
        return digest_of(self.items[i])


def is_callable(spec: str) -> bool:
    """Whether a spec can be the name of a callable; nothing is imported."""
    where, _, name = spec.rpartition(":")
    parts = [*name.split("."), *([] if where.endswith(".py") else where.split("."))]
    return all(part.isidentifier() for part in parts)


def open_callable(spec: str, wanted: bool, channels: int) -> Opened:
    """Import a callable, call it without arguments, and keep its inputs and labels."""
    pairs: list[tuple[Any, Any]] = []
    try:
        call, folder = import_callable(spec)
        # A generator runs, and may import, only during iteration.
        with importable(folder):
            for item in _items(call() if callable(call) else call):
                pairs.append(_pair(item, f"item {len(pairs)}"))
    except BnfixError as error:
        raise DataError(str(error).removeprefix(f"{spec}: ")) from error
    except Exception as error:
        raise DataError(
            f"its code failed at item {len(pairs)} ({one_line(error)}), expected items, each "
            "(input, label) or an input."
        ) from error
    if not pairs:
        raise DataError("gave no images, expected pairs (image, label).")
    images = _opened(spec, [inputs for inputs, _ in pairs], channels)
    labels = [label for _, label in pairs]
    if not wanted or all(isinstance(label, int | str | None) for label in labels):
        return images, labels if wanted else None
    # In a list with other targets, integers are not classes.
    targets = [_inputs(float(y) if isinstance(y, int) else y, f"item {i}: its target")
               for i, y in enumerate(labels)]  # fmt: skip
    shapes = [tree_map(lambda leaf: tuple(leaf.shape), target) for target in targets]
    images.targets = TensorItems(spec, targets, "targets")
    images.targets.ragged = any(shape != shapes[0] for shape in shapes)
    if isinstance(images, ItemImages):
        images.moves = all(
            isinstance(y, Tensor) and not y.is_floating_point() and y.shape == pixels.shape[:2]
            for y, pixels in zip(targets, images.items, strict=True)
        )
    return images, None


def _inputs(value: Any, place: str) -> Any:
    try:
        nest = as_inputs(value)
    except DataError as error:
        raise DataError(f"{place} is {error}") from error
    for leaf in tree_leaves(nest):
        # Infinities can be intended, as in an attention mask.
        refuse_not_finite(place, leaf, infinite=False)
    return nest


def _opened(spec: str, items: list[Any], channels: int) -> Images:
    """Items that are all images (arrays of pixels), or all inputs with the same nesting."""
    kinds = [None if isinstance(item, np.ndarray) else tree_map(lambda _: "tensor", item)
             for item in items]  # fmt: skip
    odd = next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)
    if odd is not None:
        words = ("an image" if kinds[i] is None else f"not an image ({kinds[i]})" for i in (0, odd))
        raise DataError(f"item 0 is {next(words)}, item {odd} is {next(words)}. Give one kind.")
    images = kinds[0] is None
    return ItemImages(spec, items, channels) if images else TensorItems(spec, items, "callable")


def _items(source: Any) -> Iterator[Any]:
    # Iteration ends at an IndexError, and many a Dataset with a length never raises one.
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
    """An image's pixels, or another input's tensors, and the label."""
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
    if isinstance(label, Tensor | np.ndarray | np.generic) and label.ndim == 0:
        label = label.item()
    if not isinstance(label, int | str | None):
        label = _inputs(label, f"{place}: its target")
    pixels = _pixels(inputs)
    return (_inputs(inputs, place) if pixels is None else pixels), label


def _pixels(image: Any) -> np.ndarray | None:
    """Pixels of a Pillow image, a uint8 array (H, W[, C]) or a uint8 tensor (C, H, W), or None."""
    if isinstance(image, Image.Image):
        return pixels_of(image, 1 if image.mode in ("1", "L") else 3)
    if isinstance(image, Tensor) and image.dtype == torch.uint8 and image.ndim == 3:
        image = image.permute(1, 2, 0).numpy(force=True)
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or not image.size:
        return None
    if image.ndim == 3 and image.shape[2] == 1:
        image = image[..., 0]
    is_image = image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (3, 4))
    return np.ascontiguousarray(image) if is_image else None
