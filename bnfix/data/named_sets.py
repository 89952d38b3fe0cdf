"""Data sets named on the command line, ``NAME:ROOT#SPLIT``, by their usual layouts on disk.

torchvision's classes of CIFAR, SVHN and Flowers-102 compare the MD5 of every file with that of the
file that its authors distribute, before they unpickle or load it. That is why pickles and .mat
files are read here at all: changed ones are refused.
"""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np

from bnfix.data.image_sets import (
    find_root,
    open_caltech256,
    open_cub2011,
    open_imagenet,
    require_files,
)
from bnfix.data.images import ArrayImages, FileImages, Images
from bnfix.errors import DataError, some

#: Images, and the class of each by name or number; None where there are none.
Opened = tuple[Images, list[str] | np.ndarray | None]

_MAX_ARCHIVE_BYTES: Final = 400_000_000
_PIXELS: Final = 3072
_TAR_ERRORS: Final = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, RecursionError)


class _Layout(NamedTuple):
    """How a data set is opened, and the splits that it comes with, the held-out one last."""

    open: Callable[[Path, str, int, str], Opened]
    splits: tuple[str, ...]


def is_dataset(spec: str) -> bool:
    """Say whether a spec begins with a known name and a colon."""
    return spec.partition(":")[0] in DATASETS and ":" in spec


def near_dataset(spec: str) -> str:
    """Ask whether a spec meant a data set of nearly that name; empty where none is near."""
    kind, colon, root = spec.partition(":")
    close = get_close_matches(kind, DATASETS, n=1, cutoff=0.7)
    if not colon or not kind.isidentifier() or not close or find_spec(kind) is not None:
        return ""
    return f"Did you mean {close[0]}:{root}?"


def open_dataset(spec: str, channels: int) -> Opened:
    """Open a split of a data set, ``NAME:ROOT#SPLIT``; without a split, the held-out one."""
    name, _, place = spec.partition(":")
    layout = DATASETS[name]
    place, mark, split = place.rpartition("#") if "#" in place else (place, "", "")
    if mark and split not in layout.splits:
        raise DataError(
            f"DATA {spec}: no split {split!r}; {name} comes with "
            f"{' and '.join(f'#{one}' for one in layout.splits)}. Give one of these.",
            name=spec,
        )
    if not place:
        raise DataError(f"DATA {spec}: no folder. Give {name}:ROOT#{layout.splits[-1]}.", name=spec)
    root = Path(place).expanduser()
    if not root.exists():
        raise DataError(
            f"DATA {spec}: there is no {root}. Give the folder that holds the data set.", path=root
        )
    images, classes = layout.open(root, split or layout.splits[-1], channels, f"DATA {spec}")
    images.kind = name
    if not mark:
        others = " or ".join(f"#{one}" for one in layout.splits[:-1])
        images.notes.append(f"no split named, so {layout.splits[-1]} is used ({others} to change)")
    return images, classes


# A root in which torchvision finds a folder under the only name that it looks for.
@contextmanager
def _root_with(folder: Path, name: str) -> Iterator[Path]:
    if folder.resolve().name == name:
        yield folder.resolve().parent
        return
    with TemporaryDirectory() as temporary:
        (Path(temporary) / name).symlink_to(folder.resolve(), target_is_directory=True)
        yield Path(temporary)


# By one of torchvision's classes, which loads nothing but files of the right MD5.
def _checked(load: Callable[[], Any], place: Path, needed: Iterable[Path], where: str) -> Any:
    try:
        return load()
    except (RuntimeError, OSError) as error:
        missing = [path.name for path in needed if not path.is_file()]
        found = (
            f"{some(missing, 6)} {'is' if len(missing) == 1 else 'are'} not there"
            if missing
            else "its files are not those that are distributed (by their MD5)"
        )
        raise DataError(
            f"{where}: {place}: {found}. Fetch the data set again; changed images can be given as "
            "class folders or .npz.",
            path=place,
        ) from error


def _open_cifar10(root: Path, split: str, channels: int, where: str) -> Opened:
    from torchvision.datasets import CIFAR10

    return _open_cifar(CIFAR10, root, split, channels, where)


def _open_cifar100(root: Path, split: str, channels: int, where: str) -> Opened:
    from torchvision.datasets import CIFAR100

    return _open_cifar(CIFAR100, root, split, channels, where)


# The Python version or the binary one, unpacked or as the archive.
def _open_cifar(kind: Any, root: Path, split: str, channels: int, where: str) -> Opened:
    stem = kind.filename.partition("-python")[0]
    every = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    parts = [name for name, _ in (kind.train_list if split == "train" else kind.test_list)]
    folders = {
        "python": [root / f"{stem}-batches-py", root / f"{stem}-python", root],
        "binary": [root / f"{stem}-batches-bin", root / f"{stem}-binary", root],
    }
    for version, places in folders.items():
        for place in places:
            there = [p for p in parts if (place / (p + ".bin" * (version == "binary"))).is_file()]
            if there and version == "python":
                with _root_with(place, kind.base_folder) as top:
                    return _python(kind, top, place, split, channels, where)
            if there:
                return _binary(kind, place, parts, place, channels, where)
    for version in folders:
        archive = root / f"{stem}-{version}.tar.gz"
        if root.is_file() and version in root.name:
            archive = root
        if not archive.is_file():
            continue
        with TemporaryDirectory() as top:
            folder = Path(top) / kind.base_folder
            if version == "python":
                _unpack(archive, every, folder, where)
                return _python(kind, Path(top), archive, split, channels, where)
            _unpack(archive, [*(f"{p}.bin" for p in parts), _TEXTS[stem]], folder, where)
            return _binary(kind, folder, parts, archive, channels, where)
    raise DataError(
        f"{where}: looked in {root} for {stem}-batches-py/, {stem}-python/, "
        f"{stem}-batches-bin/, {stem}-binary/ or {parts[0]}, and for the archives "
        f"{stem}-python.tar.gz and {stem}-binary.tar.gz; none is there. "
        "Give the folder that holds one of them.",
        path=root,
    )


#: The names of the classes in the binary versions.
_TEXTS: Final = {"cifar-10": "batches.meta.txt", "cifar-100": "fine_label_names.txt"}


def _python(kind: Any, top: Path, place: Path, split: str, channels: int, where: str) -> Opened:
    files = [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]
    needed = [top / kind.base_folder / name for name in files]
    held = _checked(lambda: kind(top, train=split == "train"), place, needed, where)
    images = ArrayImages(str(place), np.ascontiguousarray(held.data), channels)
    images.class_names = tuple(held.classes)
    return images, np.asarray(held.targets, dtype=np.int64)


def _binary(
    kind: Any, folder: Path, parts: Sequence[str], place: Path, channels: int, where: str
) -> Opened:
    stem = kind.filename.partition("-python")[0]
    n_classes = int(stem.rpartition("-")[2])
    head = 1 if n_classes == 10 else 2  # CIFAR-100 has the coarse label first
    rows = []
    for part in parts:
        path = folder / f"{part}.bin"
        try:
            content = path.read_bytes() if path.stat().st_size <= _MAX_ARCHIVE_BYTES else b""
        except OSError as error:
            raise DataError(
                f"{where}: looked for {path.name} in {place}; {path.name} is not there. "
                "Fetch the data set again.",
                path=place,
            ) from error
        if not content or len(content) % (head + _PIXELS):
            raise DataError(
                f"{where}: {place}/{path.name}: not a batch of {stem.upper()} ({len(content):,} "
                f"bytes, expected a multiple of {head + _PIXELS:,}). Fetch the data set again.",
                path=place,
            )
        rows.append(np.frombuffer(content, dtype=np.uint8).reshape(-1, head + _PIXELS))
    whole = np.concatenate(rows)
    labels = whole[:, head - 1].astype(np.int64)
    if labels.max() >= n_classes:
        raise DataError(
            f"{where}: {place}: not {stem.upper()} (labels from {labels.min()} to {labels.max()} "
            f"of {n_classes} classes). Fetch the data set again.",
            path=place,
        )
    pixels = whole[:, head:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    images = ArrayImages(str(place), np.ascontiguousarray(pixels), channels)
    text = folder / _TEXTS[stem]
    names = text.read_text("latin-1").split() if text.is_file() else []
    images.class_names = tuple(names) if len(names) == n_classes else None
    return images, labels


# The named files of an archive, wherever they lie in it, in one pass.
def _unpack(archive: Path, names: Sequence[str], folder: Path, where: str) -> None:
    folder.mkdir()
    total = 0
    try:
        with tarfile.open(archive, "r|gz") as members:
            for member in members:
                total += max(0, member.size)
                if member.size < 0 or total > _MAX_ARCHIVE_BYTES:
                    raise ValueError(f"more than {_MAX_ARCHIVE_BYTES:,} bytes in it")
                name = PurePosixPath(member.name).name
                content = members.extractfile(member) if member.isreg() and name in names else None
                if content is not None:
                    (folder / name).write_bytes(content.read())
    except _TAR_ERRORS as error:
        raise DataError(
            f"{where}: {archive}: truncated or damaged archive ({error}). Fetch it again.",
            path=archive,
        ) from error


def _open_svhn(root: Path, split: str, channels: int, where: str) -> Opened:
    from torchvision.datasets import SVHN

    name = f"{split}_32x32.mat"
    path = next((p for p in (root / name, root / "svhn" / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"{where}: looked for {name} in {root}; it is not there. Give the folder that holds "
            "the cropped digits (train_32x32.mat and test_32x32.mat).",
            path=root,
        )
    held = _checked(lambda: SVHN(path.parent, split), path, [path], where)
    pixels = np.ascontiguousarray(held.data.transpose(0, 2, 3, 1))
    images = ArrayImages(str(path), pixels, channels)
    images.class_names = tuple(str(k) for k in range(10))
    return images, np.asarray(held.labels, dtype=np.int64)


def _open_flowers102(root: Path, split: str, channels: int, where: str) -> Opened:
    from torchvision.datasets import Flowers102

    folder = find_root(root, ("flowers-102", "flowers102"), "jpg", where)
    needed = [folder / "setid.mat", folder / "imagelabels.mat"]
    with _root_with(folder, "flowers-102") as top:
        held = _checked(lambda: Flowers102(top, split, loader=Path), folder, needed, where)
    listed = [held[i] for i in range(len(held))]
    files = [f"jpg/{path.name}" for path, _ in listed]
    require_files(folder, files, where)
    images = FileImages(folder, "flowers102", files, channels)
    return images, np.asarray([label for _, label in listed], dtype=np.int64)


DATASETS: Final = {
    "cifar10": _Layout(_open_cifar10, ("train", "test")),
    "cifar100": _Layout(_open_cifar100, ("train", "test")),
    "svhn": _Layout(_open_svhn, ("train", "test")),
    "caltech256": _Layout(open_caltech256, ("train", "test")),
    "flowers102": _Layout(_open_flowers102, ("train", "val", "test")),
    "cub2011": _Layout(open_cub2011, ("train", "test")),
    "imagenet": _Layout(open_imagenet, ("train", "test", "val")),
}
