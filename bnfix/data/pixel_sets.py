"""CIFAR-10, CIFAR-100 and SVHN: whole splits as arrays, from folders or untouched archives."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from bnfix.data.images import ArrayImages, open_regular
from bnfix.data.mat import read_mat
from bnfix.data.plain_pickle import read_plain_pickle
from bnfix.errors import DataError, some

MAX_FILE_BYTES: Final = 400_000_000
_PIXELS: Final = 3072
_TAR_ERRORS: Final = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, RecursionError)


@dataclass(frozen=True)
class _Cifar:
    """What one of the two is called where."""

    stem: str
    n_classes: int
    batches: Mapping[str, tuple[str, ...]]
    full: Mapping[str, int]
    labels: str
    meta: str
    names: str
    names_text: str
    head: int  # label bytes before the pixels in the binary version


_CIFAR10: Final = _Cifar(
    "cifar-10", 10,
    {"train": tuple(f"data_batch_{k}" for k in range(1, 6)), "test": ("test_batch",)},
    {"train": 50_000, "test": 10_000},
    "labels", "batches.meta", "label_names", "batches.meta.txt", 1,
)  # fmt: skip
_CIFAR100: Final = _Cifar(
    "cifar-100", 100, {"train": ("train",), "test": ("test",)},
    {"train": 50_000, "test": 10_000},
    "fine_labels", "meta", "fine_label_names", "fine_label_names.txt", 2,
)  # fmt: skip


def open_cifar10(root: Path, split: str, channels: int, where: str) -> tuple[ArrayImages, Any]:
    """Open CIFAR-10: the Python or the binary version, unpacked or as the archive.

    Args:
        root: the folder that holds it, its own folder, or the archive.
        split: train or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their labels 0 to 9.
    """
    return _open_cifar(_CIFAR10, root, split, channels, where)


def open_cifar100(root: Path, split: str, channels: int, where: str) -> tuple[ArrayImages, Any]:
    """Open CIFAR-100 with its fine labels: either version, unpacked or as the archive.

    Args:
        root: the folder that holds it, its own folder, or the archive.
        split: train or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their labels 0 to 99.
    """
    return _open_cifar(_CIFAR100, root, split, channels, where)


def _open_cifar(
    kind: _Cifar, root: Path, split: str, channels: int, where: str
) -> tuple[ArrayImages, Any]:
    parts = kind.batches[split]
    binary, place, read = _cifar_source(kind, root, parts, where)
    wanted = [f"{part}.bin" for part in parts] if binary else list(parts)
    extra = kind.names_text if binary else kind.meta
    found = read([*wanted, extra])
    missing = [name for name in wanted if name not in found]
    if missing:
        raise DataError(
            f"{where}: looked for {some(wanted, 6)} in {place}; {some(missing)} is not there. "
            "Fetch the data set again.",
            path=place,
        )
    pixels, labels = [], []
    for name in wanted:
        try:
            one = _binary_batch(found[name], kind) if binary else _batch(found[name], kind)
        except (ValueError, MemoryError) as error:
            raise DataError(
                f"{where}: {place}/{name}: not a batch of {kind.stem.upper()} ({error}). "
                "Fetch the data set again.",
                path=place,
            ) from error
        pixels.append(one[0])
        labels.append(one[1])
    stacked = np.concatenate(pixels).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = ArrayImages(str(place), np.ascontiguousarray(stacked), channels)
    images.class_names = _cifar_names(found.get(extra), kind, binary)
    if len(images) != kind.full[split]:
        images.notes.append(f"{len(images):,} images, the full split has {kind.full[split]:,}")
    return images, np.concatenate(labels)


# Whether the version is the binary one, where it lies, and what reads its files.
def _cifar_source(
    kind: _Cifar, root: Path, parts: Sequence[str], where: str
) -> tuple[bool, Path, Callable[[Sequence[str]], dict[str, bytes]]]:
    folders = {
        False: (root / f"{kind.stem}-batches-py", root / f"{kind.stem}-python", root),
        True: (root / f"{kind.stem}-batches-bin", root / f"{kind.stem}-binary", root),
    }
    for binary, places in folders.items():
        for place in places:
            if any((place / (part + ".bin" * binary)).is_file() for part in parts):
                return binary, place, lambda names, place=place: _from_folder(place, names)
    for binary, version in ((False, "python"), (True, "binary")):
        archive = root / f"{kind.stem}-{version}.tar.gz"
        if root.is_file() and version in root.name:
            archive = root
        if archive.is_file():
            return binary, archive, lambda names, at=archive: _from_archive(at, names, where)
    raise DataError(
        f"{where}: looked in {root} for {kind.stem}-batches-py/, {kind.stem}-python/, "
        f"{kind.stem}-batches-bin/, {kind.stem}-binary/ or {parts[0]}, and for the archives "
        f"{kind.stem}-python.tar.gz and {kind.stem}-binary.tar.gz; none is there. "
        "Give the folder that holds one of them.",
        path=root,
    )


def _from_folder(folder: Path, names: Sequence[str]) -> dict[str, bytes]:
    found = {}
    for name in names:
        if (folder / name).is_file():
            with open_regular(folder / name) as file:
                found[name] = file.read(MAX_FILE_BYTES)
    return found


# Read in one pass over the archive; nothing is unpacked to disk.
def _from_archive(path: Path, names: Sequence[str], where: str) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                total += max(0, member.size)
                if member.size < 0 or total > MAX_FILE_BYTES:
                    raise ValueError(f"more than {MAX_FILE_BYTES:,} bytes in it")
                name = PurePosixPath(member.name).name
                if name in names and name not in found and member.isreg():
                    content = archive.extractfile(member)
                    found[name] = b"" if content is None else content.read()
    except _TAR_ERRORS as error:
        raise DataError(
            f"{where}: {path}: truncated or damaged archive ({error}). Fetch it again.", path=path
        ) from error
    return found


def _batch(content: bytes, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    held = read_plain_pickle(content)
    if not isinstance(held, dict) or not {"data", kind.labels} <= set(held):
        keys = [str(key) for key in held] if isinstance(held, dict) else [type(held).__name__]
        raise ValueError(f"it holds {some(keys)}, expected data and {kind.labels}")
    data = held["data"]
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (_PIXELS,):
        what = f"{data.dtype} {data.shape}" if isinstance(data, np.ndarray) else "no array"
        raise ValueError(f"its data are {what}, expected uint8 (n, {_PIXELS})")
    return data, _labels(held[kind.labels], len(data), kind)


def _binary_batch(content: bytes, kind: _Cifar) -> tuple[np.ndarray, np.ndarray]:
    size = kind.head + _PIXELS
    if not content or len(content) % size:
        raise ValueError(f"{len(content):,} bytes, expected a multiple of {size:,}")
    rows = np.frombuffer(content, dtype=np.uint8).reshape(-1, size)
    labels = _labels(rows[:, kind.head - 1].tolist(), len(rows), kind)
    return rows[:, kind.head :], labels


def _labels(values: Any, n: int, kind: _Cifar) -> np.ndarray:
    if isinstance(values, np.ndarray):
        values = values.reshape(-1).tolist()
    whole = isinstance(values, list) and all(type(label) is int for label in values)
    if not whole or len(values) != n or n == 0:
        raise ValueError(f"its labels are not {n} whole numbers, one an image")
    if min(values) < 0 or max(values) >= kind.n_classes:
        raise ValueError(f"labels from {min(values)} to {max(values)} of {kind.n_classes} classes")
    return np.asarray(values, dtype=np.int64)


# Names help people only, so damaged ones are no reason to refuse the images.
def _cifar_names(content: bytes | None, kind: _Cifar, binary: bool) -> tuple[str, ...] | None:
    if content is None:
        return None
    names: Any = content.decode("latin-1").split()
    if not binary:
        try:
            held = read_plain_pickle(content)
        except ValueError:
            return None
        names = held.get(kind.names) if isinstance(held, dict) else None
    if not isinstance(names, list) or len(names) != kind.n_classes:
        return None
    return tuple(n.decode("latin-1") if isinstance(n, bytes) else str(n) for n in names)


def open_svhn(root: Path, split: str, channels: int, where: str) -> tuple[ArrayImages, Any]:
    """Open SVHN's cropped digits, ``train_32x32.mat`` and ``test_32x32.mat``.

    Args:
        root: the folder that holds the files.
        split: train or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their digits.

    Raises:
        DataError: if the file is missing, damaged or holds something else.
    """
    name = f"{split}_32x32.mat"
    path = next((p for p in (root / name, root / "svhn" / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"{where}: looked for {name} in {root}; it is not there. Give the folder that holds "
            "the cropped digits (train_32x32.mat and test_32x32.mat).",
            path=root,
        )
    try:
        held = read_mat(path, ("X", "y"), MAX_FILE_BYTES)
        pixels, digits = _digits(held)
    except (OSError, ValueError, MemoryError) as error:
        raise DataError(
            f"{where}: {path}: not SVHN's cropped digits ({error}). Fetch it again.", path=path
        ) from error
    images = ArrayImages(str(path), np.ascontiguousarray(pixels.transpose(3, 0, 1, 2)), channels)
    images.class_names = tuple(str(k) for k in range(10))
    full = {"train": 73_257, "test": 26_032}[split]
    if len(images) != full:
        images.notes.append(f"{len(images):,} images, the full split has {full:,}")
    return images, digits


def _digits(held: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = held.get("X"), held.get("y")
    if not isinstance(pixels, np.ndarray) or not isinstance(labels, np.ndarray):
        raise ValueError("it does not hold X and y")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[:3] != (32, 32, 3):
        raise ValueError(f"X is {pixels.dtype} {pixels.shape}, expected uint8 (32, 32, 3, n)")
    n = pixels.shape[3]
    flat = labels.reshape(-1)
    if n == 0 or len(flat) != n or not np.isin(flat, np.arange(11)).all():
        raise ValueError(f"y is not {n} numbers from 1 to 10")
    # The files call the digit 0 by 10.
    return pixels, flat.astype(np.int64) % 10
