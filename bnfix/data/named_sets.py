"""Data sets named on the command line, ``NAME:ROOT#SPLIT``, in their usual layouts on disk.

torchvision checks every file of CIFAR, SVHN, Flowers-102 and ImageNet's devkit against the MD5 of
the authors' file before it unpickles or loads it. Only for that reason does this module read
pickles and .mat files: modified files are refused. torchvision's classes for the other sets check
no MD5, and its ImageNet class unpacks archives into the folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, NamedTuple

import numpy as np

from bnfix.core.errors import DataError, did_you_mean, some
from bnfix.data.images import (
    ArrayImages,
    FileImages,
    Opened,
    faults_of,
    list_images,
    misplaced,
    parsing,
    read_bytes,
    read_rows,
)

_MAX_LIST_BYTES: Final = 100_000_000
#: Caltech-256 has no official split: this share of each class, chosen by file name, is training.
_TRAIN_FRAC: Final = 0.8
_CATEGORY: Final = re.compile(r"([0-9]{3})\.(.+)")
_CLUTTER: Final = 257
#: Subfolders in which ImageNet can be, and label tables for its flat validation folder.
_INSIDE: Final = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC2012", "imagenet")
_TABLES: Final = ("LOC_val_solution.csv", "val.csv", "val/labels.csv")


class _Layout(NamedTuple):
    """The reader of a data set, and its splits, the held-out split last."""

    open: Callable[[Path, str, int], Opened]
    splits: tuple[str, ...]


def is_dataset(spec: str, path: Path) -> bool:
    """Whether a spec begins with a known name and a colon, and is not an existing path."""
    return spec.partition(":")[0] in DATASETS and ":" in spec and not path.exists()


def near_dataset(spec: str) -> str:
    """A suggestion for a misspelled data set name, or an empty text."""
    kind, colon, root = spec.partition(":")
    hint = did_you_mean(kind, list(DATASETS))
    # If a module has the name, the user means a callable.
    if not colon or not kind.isidentifier() or not hint or find_spec(kind) is not None:
        return ""
    return f"{hint.removesuffix('?')}:{root}?"


def open_dataset(spec: str, wanted: bool, channels: int) -> Opened:
    """Open a split of a data set, ``NAME:ROOT#SPLIT``; by default the held-out split."""
    name, _, place = spec.partition(":")
    layout = DATASETS[name]
    place, mark, split = place.rpartition("#") if "#" in place else (place, "", "")
    held_out, root = layout.splits[-1], Path(place).expanduser()
    if mark and split not in layout.splits:
        known = " and ".join(f"#{one}" for one in layout.splits)
        raise DataError(f"no split {split!r}; {name} has {known}. Give one of these.")
    if not place:
        raise DataError(f"no folder. Give {name}:ROOT#{held_out}.")
    if not root.exists():
        raise DataError(f"there is no {root}. Give the folder that holds the data set.")
    images, classes = layout.open(root, split or held_out, channels)
    images.kind = name
    if not mark:
        others = " or ".join(f"#{one}" for one in layout.splits[:-1])
        images.notes.append(f"no split named, so {held_out} is used ({others} to change)")
    return images, classes if wanted else None


def _broken(found: str, todo: str = "Download the data set again.") -> DataError:
    return DataError(f"{found}. {todo}")


# --- CIFAR, SVHN and Flowers-102: torchvision's classes ---


def _torchvision() -> Any:
    import torchvision.datasets  # takes seconds

    return torchvision.datasets


@contextmanager
def _root_with(folder: Path, name: str) -> Iterator[Path]:
    """A root in which the folder has the fixed name that torchvision expects."""
    if folder.resolve().name == name:
        yield folder.resolve().parent
        return
    with TemporaryDirectory() as temporary:
        (Path(temporary) / name).symlink_to(folder.resolve(), target_is_directory=True)
        yield Path(temporary)


def _checked(load: Callable[[], Any], place: Path, needed: Iterable[Path]) -> Any:
    """Load with a torchvision class; it loads only files with the right MD5."""
    try:
        return load()
    except (RuntimeError, OSError) as error:
        missing = [path.name for path in needed if not path.is_file()]
        found = f"{some(missing, 6)} {'is' if len(missing) == 1 else 'are'} missing"
        if not missing:
            found = "its files differ from the distributed files (by their MD5)"
        todo = "Download the data set again; give modified images as class folders or .npz."
        raise _broken(f"{place}: {found}", todo) from error


def _open_cifar(name: str, root: Path, split: str, channels: int) -> Opened:
    """Open the Python version, unpacked or in its archive."""
    kind = getattr(_torchvision(), name)
    names = _cifar_files(kind)
    places = (root / kind.base_folder, root / kind.filename.removesuffix(".tar.gz"), root)
    found = [place for place in places if any((place / name).is_file() for name in names)]
    if found:
        return _cifar_in(kind, found[0], found[0], split, channels)
    archive = root if root.is_file() else root / kind.filename
    if not archive.is_file():
        raise DataError(
            f"nothing found in {root}, expected {kind.base_folder}/, {names[0]} or the archive "
            f"{kind.filename}. Give the folder that holds one of them."
        )
    with TemporaryDirectory() as top:
        # The MD5 first: another archive could have any size and unsafe paths.
        _checked(lambda: _unpack(archive, kind.tgz_md5, top), archive, ())
        return _cifar_in(kind, Path(top) / kind.base_folder, archive, split, channels)


def _cifar_files(kind: Any) -> list[str]:
    return [name for name, _ in (*kind.train_list, *kind.test_list)] + [kind.meta["filename"]]


def _unpack(archive: Path, md5: str, folder: str) -> None:
    if not _torchvision().utils.check_integrity(archive, md5):
        raise OSError("another MD5")
    shutil.unpack_archive(archive, folder, "gztar", filter="data")


def _cifar_in(kind: Any, folder: Path, place: Path, split: str, channels: int) -> Opened:
    needed = [folder / name for name in _cifar_files(kind)]
    with _root_with(folder, kind.base_folder) as top:
        held = _checked(lambda: kind(top, train=split == "train"), place, needed)
    images = ArrayImages(str(place), np.ascontiguousarray(held.data), channels)
    images.class_names = tuple(held.classes)
    return images, np.asarray(held.targets, dtype=np.int64)


def _open_svhn(root: Path, split: str, channels: int) -> Opened:
    name = f"{split}_32x32.mat"
    path = _find_root(root, ("svhn",), name) / name
    held = _checked(lambda: _torchvision().SVHN(path.parent, split), path, [path])
    pixels = np.ascontiguousarray(held.data.transpose(0, 2, 3, 1))
    images = ArrayImages(str(path), pixels, channels)
    images.class_names = tuple(str(k) for k in range(10))
    return images, np.asarray(held.labels, dtype=np.int64)


def _open_flowers102(root: Path, split: str, channels: int) -> Opened:
    folder = _find_root(root, ("flowers-102", "flowers102"), "jpg")
    needed = [folder / "setid.mat", folder / "imagelabels.mat"]
    with _root_with(folder, "flowers-102") as top:
        held = _checked(lambda: _torchvision().Flowers102(top, split, loader=Path), folder, needed)
    listed = [held[i] for i in range(len(held))]
    images = _files(folder, [f"jpg/{path.name}" for path, _ in listed], channels)
    return images, np.asarray([label for _, label in listed], dtype=np.int64)


# --- Folders of image files and their lists ---


def _find_root(root: Path, folders: Sequence[str], needed: str) -> Path:
    """The root of a data set: the given folder, or its usual subfolder."""
    places = [root, *(root / folder for folder in folders)]
    for place in places:
        if (place / needed).exists():
            return place
    beside = [root.name] if root.is_file() else sorted(path.name for path in root.iterdir())
    archives = [name for name in beside if name.endswith((".tar", ".tgz", ".tar.gz", ".zip"))]
    found = f"expected {some([str(place / needed) for place in places])}; not found"
    todo = "Give the folder that holds the data set."
    if archives:
        found += f", but found {some(archives)}"
        todo = "Unpack it (tar xf) and give the folder."
    raise _broken(found, todo)


def _files(root: Path, files: Sequence[str], channels: int) -> FileImages:
    """The listed files of a folder; all must exist inside it."""
    if not files:
        raise _broken(f"no images in this split, in {root}")
    if found := faults_of(misplaced(root, files)):
        raise _broken(f"{found} of {len(files):,} images in {root}")
    return FileImages(root, "", files, channels)


def _open_caltech256(root: Path, split: str, channels: int) -> Opened:
    """Open folders ``256_ObjectCategories/001.ak47/...``."""
    inside = ("256_ObjectCategories", "caltech256/256_ObjectCategories")
    folder = _find_root(root, inside, "001.ak47")
    matches = [_CATEGORY.fullmatch(name) for name in list_images(folder)[1]]
    categories = {int(match[1]): match for match in reversed(matches) if match}
    n = sum(match is not None for match in matches)
    if sorted(categories) != list(range(1, n + 1)):
        found = f"the class folders in {folder} are not numbered from 001 to {n:03d}, each once"
        raise _broken(found, "Unpack the data set again.")
    files: list[str] = []
    labels: list[int] = []
    for number, match in sorted(categories.items()):
        order = sorted(
            (f"{match[0]}/{file}" for file in list_images(folder / match[0])[0]), key=_draw
        )
        n_train = round(_TRAIN_FRAC * len(order))
        chosen = order[:n_train] if split == "train" else order[n_train:]
        files += sorted(chosen)
        labels += [number - 1] * len(chosen)
    images = _files(folder, files, channels)
    images.class_names = tuple(match[2] for _, match in sorted(categories.items()))
    images.notes.append(
        f"split drawn by file name, {_TRAIN_FRAC:.0%} of each class for training, since "
        "Caltech-256 has no official split"
    )
    # Published results use 256 or 257 classes.
    if n == _CLUTTER:
        images.notes.append("clutter is the last of 257 classes; remove its folder for 256")
    return images, np.asarray(labels, dtype=np.int64)


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _open_cub2011(root: Path, split: str, channels: int) -> Opened:
    """Open a folder with ``images/`` and its lists."""
    folder = _find_root(root, ("CUB_200_2011",), "images")
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise _broken(f"no {some(absent)} in {folder}, expected {some(names)}")
    paths, parts, labels, classes = (_by_id(folder / name) for name in names)
    n = len(classes)
    wrong = [
        *(f"{key} of images.txt" for key in paths if key not in parts or key not in labels),
        *(f"{key} in the split" for key, part in parts.items() if part not in ("0", "1")),
        *(f"{key} of class {k[:20]}" for key, k in labels.items() if k not in classes),
        *(f"class {k[:20]}" for k in classes if not (k.isdecimal() and 1 <= int(k[:9]) <= n)),
    ]
    if wrong:
        raise _broken(f"the lists in {folder} do not agree: {some(wrong)}")
    chosen = [key for key in paths if parts[key] == ("1" if split == "train" else "0")]
    images = _files(folder, [f"images/{paths[key]}" for key in chosen], channels)
    images.class_names = tuple(
        classes[k].partition(".")[2] or classes[k] for k in sorted(classes, key=int)
    )
    return images, np.asarray([int(labels[key]) - 1 for key in chosen], dtype=np.int64)


def _by_id(path: Path) -> dict[str, str]:
    """The rows of a file, each with a number and a value."""
    with parsing(f"{path}: cannot be read", " Download the data set again."):
        text = read_bytes(path, _MAX_LIST_BYTES).decode("utf-8-sig")
    lines = [line for line in text.splitlines() if line.strip()]
    rows = [line.split(maxsplit=1) for line in lines]
    short = [" ".join(row)[:40] for row in rows if len(row) < 2]
    values = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    if short or len(values) < len(rows) or not values:
        found = f"{path}: {len(rows)} lines, {len(values)} of them with a unique number and a value"
        found += f", not: {some(short)}" if short else ""
        raise _broken(found, "Download it again.")
    return values


# --- ImageNet ---


def _open_imagenet(root: Path, split: str, channels: int) -> Opened:
    """Open ``train/`` (class folders), ``val/`` (class folders or flat) or unlabelled ``test/``."""
    top = _find_root(root, _INSIDE, split)
    folder = top / split
    loose, folders, _ = list_images(folder)
    files = [f"{name}/{file}" for name in folders for file in list_images(folder / name)[0]]
    if bool(files) == bool(loose) or (loose and split == "train"):
        found = f"{len(loose)} images {'beside' if files else 'and no'} class folders in {folder}"
        raise _broken(
            f"{found}, expected folders named by WordNet ids"
            + ("" if split == "train" else ", or images alone"),
            "Unpack each archive into a separate folder.",
        )
    images = FileImages(folder, "imagenet", files or loose, channels)
    if split == "test":
        return images, None
    if files:
        images.classes = tuple(folders)
        return images, [file.partition("/")[0] for file in files]
    ids, images.classes = _answers(root, top, loose)
    return images, ids


def _answers(root: Path, top: Path, files: list[str]) -> tuple[list[str], tuple[str, ...]]:
    """The id of each image in the flat validation folder, and all ids."""
    for path in (place / name for place in (top, root) for name in _TABLES):
        if path.is_file():
            return _by_table(path, files)
    # The devkit numbers the classes in its own order, in a MATLAB table.
    devkit = _torchvision().imagenet
    name, _ = devkit.ARCHIVE_META["devkit"]
    archive = next((place / name for place in (top, root) if (place / name).is_file()), None)
    if archive is None:
        raise DataError(
            f"{top / 'val'} is flat and has no labels: expected {name} in {root}, or one of "
            f"{some(_TABLES)}. Add one, or sort the images into folders named by WordNet ids."
        )
    with TemporaryDirectory() as folder:
        (Path(folder) / name).symlink_to(archive.resolve())
        _checked(lambda: devkit.parse_devkit_archive(folder), archive, ())
        known, ids = devkit.load_meta_file(folder)
    digits = [Path(name).stem.rpartition("_")[2] for name in files]
    numbers = [int(text[:9]) if text.isdecimal() else 0 for text in digits]
    wrong = [name for name, k in zip(files, numbers, strict=True) if not 0 < k <= len(ids)]
    if wrong:
        found = f"{len(wrong):,} of {len(files):,} images in val have no label among the "
        todo = "Give files that belong together."
        raise _broken(f"{found}{len(ids):,} of {archive}: {some(wrong)}", todo)
    return [ids[k - 1] for k in numbers], tuple(sorted(known))


def _by_table(path: Path, files: list[str]) -> tuple[list[str], tuple[str, ...]]:
    # In Kaggle's table, boxes follow the id in the second column; the first has no suffix.
    ids = {
        Path(row[0]).stem: row[1].split()[0]
        for row in read_rows(path, _MAX_LIST_BYTES)[1:]
        if row[1:] and row[1]
    }
    missing = [name for name in files if Path(name).stem not in ids]
    if missing:
        found = f"{path}: {len(missing):,} of {len(files):,} images are not in it: {some(missing)}"
        raise _broken(found, "Give the complete table.")
    return [ids[Path(name).stem] for name in files], tuple(sorted(set(ids.values())))


DATASETS: Final = {
    "cifar10": _Layout(partial(_open_cifar, "CIFAR10"), ("train", "test")),
    "cifar100": _Layout(partial(_open_cifar, "CIFAR100"), ("train", "test")),
    "svhn": _Layout(_open_svhn, ("train", "test")),
    "caltech256": _Layout(_open_caltech256, ("train", "test")),
    "flowers102": _Layout(_open_flowers102, ("train", "val", "test")),
    "cub2011": _Layout(_open_cub2011, ("train", "test")),
    "imagenet": _Layout(_open_imagenet, ("train", "test", "val")),
}
