"""ImageNet (ILSVRC 2012): class folders, or a flat validation folder with its answers beside it."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any, Final

from bnfix.data.image_sets import find_root, read_list
from bnfix.data.images import FileImages, list_images, open_regular
from bnfix.data.mat import read_mat
from bnfix.errors import DataError, some

_MAX_BYTES: Final = 100_000_000
_INSIDE: Final = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC2012", "imagenet")
_DEVKIT: Final = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
_TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
_TABLES: Final = ("LOC_val_solution.csv", "val.csv", "val/labels.csv")


def open_imagenet(
    root: Path, split: str, channels: int, where: str
) -> tuple[FileImages, list[str] | None]:
    """Open ImageNet: ``train/`` in class folders, ``val/`` so or flat, ``test/`` without labels.

    A flat ``val/`` needs the devkit (ground truth and ``meta.mat``) or a CSV of its answers.

    Args:
        root: the folder that holds the splits' folders.
        split: train, val or test.
        channels: what images are converted to.
        where: the data, for messages.

    Returns:
        The images, and the WordNet id of each; None for test.

    Raises:
        DataError: if the folder or the answers are not there, or do not agree.
    """
    top = find_root(root, _INSIDE, split, where)
    folder = top / split
    loose, folders, _ = list_images(folder)
    files = [f"{name}/{file}" for name in folders for file in list_images(folder / name)[0]]
    if files and not loose:
        images = FileImages(str(folder), "imagenet", files, channels, classes=folders)
        return images, None if split == "test" else [file.partition("/")[0] for file in files]
    if files or not loose:
        what = f"{len(loose)} images beside class folders" if files else "no images"
        raise DataError(
            f"{where}: {what} in {folder}, expected folders named by WordNet ids"
            f"{'' if split == 'train' else ', or images alone'}. Unpack the archives again.",
            path=folder,
        )
    images = FileImages(str(folder), "imagenet", loose, channels)
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
            text = file.read(_MAX_BYTES).decode("utf-8-sig")
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
        held: Any = read_mat(path, ("synsets",), _MAX_BYTES).get("synsets")
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
