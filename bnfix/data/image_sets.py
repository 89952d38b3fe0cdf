"""Caltech-256, CUB-200-2011 and ImageNet: folders of image files and the lists beside them.

torchvision's classes of these check no MD5, and that of ImageNet unpacks archives into the folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
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
_INSIDE: Final = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC2012", "imagenet")
_DEVKIT: Final = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
_TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
_TABLES: Final = ("LOC_val_solution.csv", "val.csv", "val/labels.csv")


def find_root(root: Path, folders: Sequence[str], needed: str, where: str) -> Path:
    """Find where a data set lies: in the folder given, or in its usual place inside."""
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
    """Read a text of rows: one image or class a line, its values apart by spaces."""
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
    """Check that listed files are in the folder, all problems at once."""
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
    """Say whether a path stays inside the folder that it is relative to."""
    path = PurePosixPath(name)
    plain = bool(name) and name.isprintable()
    return plain and not (
        path.is_absolute() or ".." in path.parts or PureWindowsPath(name).drive or "\\" in name
    )


def open_caltech256(root: Path, split: str, channels: int, where: str) -> tuple[FileImages, Any]:
    """Open Caltech-256, ``256_ObjectCategories/001.ak47/...``."""
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
    images = FileImages(folder, "caltech256", files, channels)
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


def open_cub2011(root: Path, split: str, channels: int, where: str) -> tuple[FileImages, Any]:
    """Open CUB-200-2011: ``images/`` and the lists beside it."""
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
    images = FileImages(folder, "cub2011", files, channels)
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


def open_imagenet(
    root: Path, split: str, channels: int, where: str
) -> tuple[FileImages, list[str] | None]:
    """Open ImageNet: ``train/`` in class folders, ``val/`` so or flat, ``test/`` without labels."""
    top = find_root(root, _INSIDE, split, where)
    folder = top / split
    loose, folders, _ = list_images(folder)
    files = [f"{name}/{file}" for name in folders for file in list_images(folder / name)[0]]
    if files and not loose:
        images = FileImages(folder, "imagenet", files, channels)
        images.classes = tuple(folders)
        return images, None if split == "test" else [file.partition("/")[0] for file in files]
    if files or not loose:
        what = f"{len(loose)} images beside class folders" if files else "no images"
        raise DataError(
            f"{where}: {what} in {folder}, expected folders named by WordNet ids"
            f"{'' if split == 'train' else ', or images alone'}. Unpack the archives again.",
            path=folder,
        )
    images = FileImages(folder, "imagenet", loose, channels)
    if split == "test":
        return images, None
    if split == "train":
        raise DataError(
            f"{where}: {len(loose)} images loose in {folder}, expected folders named by WordNet "
            "ids. Unpack each class's archive into a folder of its own.",
            path=folder,
        )
    ids, known = _answers(root, top, loose, where)
    images.classes = known
    return images, ids


# The id of each image of the flat validation folder, and all ids there are.
def _answers(
    root: Path, top: Path, files: list[str], where: str
) -> tuple[list[str], tuple[str, ...]]:
    tables = [place / name for place in dict.fromkeys((top, root)) for name in _TABLES]
    for path in tables:
        if path.is_file():
            return _by_table(path, files, where)
    kits = [place / name for place in dict.fromkeys((top, root)) for name in _DEVKIT]
    for kit in kits:
        if (kit / _TRUTH).is_file():
            return _by_devkit(kit, files, where)
    raise DataError(
        f"{where}: {top / 'val'} is flat, and its answers were not found: looked in {root} for "
        f"{_DEVKIT[0]}/{_TRUTH} (with meta.mat), {some(_TABLES)}. Add one, or sort the images "
        "into folders named by WordNet ids.",
        path=top,
    )


def _by_table(path: Path, files: list[str], where: str) -> tuple[list[str], tuple[str, ...]]:
    try:
        with open_regular(path) as file:
            text = file.read(_MAX_LIST_BYTES).decode("utf-8-sig")
        rows = [row for row in csv.reader(io.StringIO(text, newline="")) if len(row) >= 2]
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"{where}: {path}: cannot be read ({error}).", path=path) from error
    # Kaggle's second column goes on with boxes; its first has no suffix.
    found = {Path(row[0].strip()).stem: row[1].split()[0] for row in rows[1:] if row[1].strip()}
    missing = [name for name in files if Path(name).stem not in found]
    if missing:
        raise DataError(
            f"{where}: {path}: {len(missing):,} of {len(files):,} images are not in it: "
            f"{some(missing)}. Give the whole table.",
            path=path,
        )
    return [found[Path(name).stem] for name in files], tuple(sorted(set(found.values())))


def _by_devkit(kit: Path, files: list[str], where: str) -> tuple[list[str], tuple[str, ...]]:
    numbers = [row[0] for row in read_list(kit / _TRUTH, where)]
    ids = _synsets(kit / "meta.mat", where)
    places = {name: Path(name).stem.rpartition("_")[2] for name in files}
    wrong = [
        name
        for name, digits in places.items()
        if not (digits.isdecimal() and 1 <= int(digits[:9]) <= len(numbers))
        or numbers[int(digits) - 1] not in ids
    ]
    if wrong:
        raise DataError(
            f"{where}: {len(wrong):,} of {len(files):,} images in val have no answer among the "
            f"{len(numbers):,} of {kit / _TRUTH}: {some(wrong)}. Give the files that belong "
            "together.",
            path=kit,
        )
    return [ids[numbers[int(digits) - 1]] for digits in places.values()], tuple(
        sorted(ids.values())
    )


# WordNet id by the devkit's own number, of the 1000 classes themselves.
def _synsets(path: Path, where: str) -> dict[str, str]:
    try:
        held: Any = read_mat(path, ("synsets",), _MAX_LIST_BYTES).get("synsets")
        leaves = [row for row in held if int(row["num_children"].reshape(-1)[0]) == 0]
        found = {str(int(row["ILSVRC2012_ID"].reshape(-1)[0])): str(row["WNID"]) for row in leaves}
    except FileNotFoundError as error:
        raise DataError(
            f"{where}: looked for {path}, which tells the devkit's numbers from the classes; not "
            "there. Unpack the whole devkit.",
            path=path,
        ) from error
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{where}: {path}: not the devkit's meta.mat ({error}). Unpack it again.", path=path
        ) from error
    return found
