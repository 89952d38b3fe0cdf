"""Caltech-256, Flowers-102 and CUB-200-2011: folders of image files and the lists beside them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Final

import numpy as np

from bnfix.data.images import FileImages, list_images, open_regular
from bnfix.data.mat import read_mat
from bnfix.errors import DataError, some

_MAX_LIST_BYTES: Final = 100_000_000
#: Caltech-256 has no split of its own: of each class this part is for training, drawn by name.
_TRAIN_FRAC: Final = 0.8
_CATEGORY: Final = re.compile(r"([0-9]{3})\.(.+)")
_CLUTTER: Final = 257


def find_root(root: Path, folders: Sequence[str], needed: str, where: str) -> Path:
    """Find where a data set lies: in the folder given, or in its usual place inside.

    Args:
        root: the folder given.
        folders: what the data set's own folder is called.
        needed: a file or folder that must be in it.
        where: the data, for messages.

    Returns:
        The folder that holds what is needed.

    Raises:
        DataError: if none does; an archive that was not unpacked is pointed out.
    """
    places = [root, *(root / folder for folder in folders)]
    for place in places:
        if (place / needed).exists():
            return place
    looked = some([str(place / needed) for place in places])
    archives = [] if root.is_file() else sorted(p.name for p in root.iterdir() if _packed(p))
    if root.is_file() or archives:
        what = root.name if root.is_file() else some(archives)
        raise DataError(
            f"{where}: looked for {looked}; not there, but {what} is. Unpack it (tar xf) and give "
            "the folder.",
            path=root,
        )
    raise DataError(
        f"{where}: looked for {looked}; not there. Give the folder that holds the data set.",
        path=root,
    )


def _packed(path: Path) -> bool:
    return path.name.endswith((".tar", ".tgz", ".tar.gz", ".zip")) and path.is_file()


def read_list(path: Path, where: str) -> list[list[str]]:
    """Read a text of rows: one image or class a line, its values apart by spaces.

    Args:
        path: the file.
        where: the data, for messages.

    Returns:
        The values of each line, at most two: what stands after the first space is one.

    Raises:
        DataError: if the file is missing, too large, or no text.
    """
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_LIST_BYTES + 1)
        if len(content) > _MAX_LIST_BYTES:
            raise DataError(f"{where}: {path}: larger than {_MAX_LIST_BYTES:,} bytes.", path=path)
        lines = content.decode("utf-8-sig").splitlines()
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: looked for {path}; not there. Fetch the data set again.", path=path
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path}: cannot be read ({error}).", path=path) from error
    return [line.split(maxsplit=1) for line in lines if line.strip()]


def require_files(root: Path, files: Sequence[str], where: str) -> None:
    """Check that listed files are in the folder, all problems at once.

    Args:
        root: the folder.
        files: paths inside it, as a list from outside has them.
        where: the data, for messages.

    Raises:
        DataError: if some lead out of the folder, or are not there, or there are none.
    """
    outside = [name for name in files if not is_inside(name)]
    missing = [name for name in files if is_inside(name) and not (root / name).is_file()]
    found = [
        f"{len(names):,} of {len(files):,} images {what} ({some(names)})"
        for what, names in (("lead out of the folder", outside), ("are missing", missing))
        if names
    ]
    if found or not files:
        raise DataError(
            f"{where}: {'; '.join(found) or 'no images in this split'}, in {root}. "
            "Fetch or unpack the data set again.",
            path=root,
        )


def is_inside(name: str) -> bool:
    """Say whether a path stays inside the folder that it is relative to.

    Args:
        name: a path from a file.

    Returns:
        Whether it is relative, without ``..`` or control characters.
    """
    path = PurePosixPath(name)
    plain = bool(name) and name.isprintable()
    return plain and not (
        path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\\" in name
    )


def open_caltech256(root: Path, split: str, channels: int, where: str) -> tuple[FileImages, Any]:
    """Open Caltech-256, ``256_ObjectCategories/001.ak47/...``.

    It has no split of its own: of each class, 80 % by a hash of the file's name are for training.

    Args:
        root: the folder that holds ``256_ObjectCategories``, or itself.
        split: train or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their labels from 0.

    Raises:
        DataError: if the class folders are not there, or hold no images.
    """
    folder = find_root(root, ("256_ObjectCategories", "caltech256/256_ObjectCategories"),
                       "001.ak47", where)  # fmt: skip
    found = {name: _CATEGORY.fullmatch(name) for name in list_images(folder)[1]}
    categories = {name: int(match[1]) for name, match in found.items() if match}
    numbers = sorted(categories.values())
    if numbers != list(range(1, len(numbers) + 1)):
        raise DataError(
            f"{where}: the class folders in {folder} are not numbered 001 to {len(numbers):03d}, "
            "each once. Unpack the data set again.",
            path=folder,
        )
    files: list[str] = []
    labels: list[int] = []
    for name, number in categories.items():
        inside = list_images(folder / name)[0]
        order = sorted((_draw(f"{name}/{file}"), file) for file in inside)
        n_train = round(_TRAIN_FRAC * len(order))
        part = order[:n_train] if split == "train" else order[n_train:]
        chosen = sorted(file for _, file in part)
        files += [f"{name}/{file}" for file in chosen]
        labels += [number - 1] * len(chosen)
    require_files(folder, files, where)
    images = FileImages(str(folder), "caltech256", files, channels)
    images.class_names = tuple(
        name.partition(".")[2] for name in sorted(categories, key=categories.__getitem__)
    )
    images.notes.append(
        f"split drawn by file name, {_TRAIN_FRAC:.0%} of each class for training, since "
        "Caltech-256 comes with none"
    )
    if len(numbers) == _CLUTTER:
        images.notes.append("the class clutter is the last of 257; remove its folder for 256")
    return images, np.asarray(labels, dtype=np.int64)


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def open_flowers102(root: Path, split: str, channels: int, where: str) -> tuple[FileImages, Any]:
    """Open Flowers-102: ``jpg/``, ``imagelabels.mat`` and ``setid.mat``.

    Args:
        root: the folder that holds them, or ``flowers-102`` inside it.
        split: train, val or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their labels 0 to 101.

    Raises:
        DataError: if a file is missing or does not agree with the others.
    """
    folder = find_root(root, ("flowers-102", "flowers102"), "jpg", where)
    key = {"train": "trnid", "val": "valid", "test": "tstid"}[split]
    chosen = _whole(folder / "setid.mat", key, where)
    every = _whole(folder / "imagelabels.mat", "labels", where)
    if chosen.min() < 1 or chosen.max() > len(every) or every.min() < 1 or every.max() > 102:
        raise DataError(
            f"{where}: images {chosen.min()} to {chosen.max()} in setid.mat, {len(every)} labels "
            f"from {every.min()} to {every.max()} in imagelabels.mat; expected labels from 1 to "
            "102, one for every image. Fetch both files again.",
            path=folder,
        )
    files = [f"jpg/image_{number:05d}.jpg" for number in chosen]
    require_files(folder, files, where)
    images = FileImages(str(folder), "flowers102", files, channels)
    return images, every[chosen - 1] - 1


# One variable of a .mat file, as whole numbers in a row.
def _whole(path: Path, name: str, where: str) -> np.ndarray:
    try:
        value = read_mat(path, (name,), _MAX_LIST_BYTES).get(name)
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: looked for {path}; not there. Fetch it from the data set's page.", path=path
        ) from error
    except (OSError, ValueError) as error:
        raise DataError(f"{where}: {path}: cannot be read ({error}).", path=path) from error
    if not isinstance(value, np.ndarray) or not value.size or (value % 1 != 0).any():
        raise DataError(
            f"{where}: {path}: does not hold {name} in whole numbers. Fetch it again.", path=path
        )
    numbers: np.ndarray = value.reshape(-1).astype(np.int64)
    return numbers


def open_cub2011(root: Path, split: str, channels: int, where: str) -> tuple[FileImages, Any]:
    """Open CUB-200-2011: ``images/`` and the lists beside it.

    Args:
        root: the folder that holds them, or ``CUB_200_2011`` inside it.
        split: train or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and their labels from 0.

    Raises:
        DataError: if a list is missing or does not agree with the others.
    """
    folder = find_root(root, ("CUB_200_2011",), "images", where)
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise DataError(
            f"{where}: looked for {some(names)} in {folder}; {some(absent)} is not there. "
            "Fetch the data set again.",
            path=folder,
        )
    paths, parts, labels, classes = (_by_id(folder / name, where) for name in names)
    n = len(classes)
    wrong = [
        *(f"{key} of images.txt" for key in paths if key not in parts or key not in labels),
        *(f"{key} in the split" for key, part in parts.items() if part not in ("0", "1")),
        *(f"{key} of class {k[:20]}" for key, k in labels.items() if k not in classes),
        *(f"class {k[:20]}" for k in classes if not (k.isdecimal() and 1 <= int(k[:9]) <= n)),
    ]
    if wrong:
        raise DataError(
            f"{where}: the lists in {folder} do not agree: {some(wrong)}. "
            "Fetch the data set again.",
            path=folder,
        )
    chosen = [key for key in paths if parts[key] == ("1" if split == "train" else "0")]
    files = [f"images/{paths[key]}" for key in chosen]
    require_files(folder, files, where)
    images = FileImages(str(folder), "cub2011", files, channels)
    images.class_names = tuple(
        classes[k].partition(".")[2] or classes[k] for k in sorted(classes, key=int)
    )
    return images, np.asarray([int(labels[key]) - 1 for key in chosen], dtype=np.int64)


def _by_id(path: Path, where: str) -> dict[str, str]:
    rows = read_list(path, where)
    short = [" ".join(row)[:40] for row in rows if len(row) < 2]
    found = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    if short or len(found) < len(rows) or not found:
        raise DataError(
            f"{where}: {path}: {len(rows)} lines, {len(found)} of them a number of its own and a "
            f"value{f', not: {some(short)}' if short else ''}. Fetch it again.",
            path=path,
        )
    return found
