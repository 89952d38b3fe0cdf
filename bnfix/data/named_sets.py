"""Data sets named on the command line, ``NAME:ROOT#SPLIT``, by their usual layouts on disk.

torchvision's classes of CIFAR, SVHN and Flowers-102 compare the MD5 of every file with that of the
file that its authors distribute, before they unpickle or load it. That is why pickles and .mat
files are read here at all: changed ones are refused. Its classes of the other sets check no MD5,
and that of ImageNet unpacks archives into the folder.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import zlib
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
#: ImageNet's table of classes has a few hundred kB.
_MAX_TABLE_BYTES: Final = 16_000_000
#: Caltech-256 has no split of its own: of each class this part is for training, drawn by name.
_TRAIN_FRAC: Final = 0.8
_CATEGORY: Final = re.compile(r"([0-9]{3})\.(.+)")
_WNID: Final = re.compile(r"n[0-9]{8}")
_CLUTTER: Final = 257
#: Where ImageNet lies inside the folder given, and the answers of its flat validation folder.
_INSIDE: Final = ("ILSVRC/Data/CLS-LOC", "Data/CLS-LOC", "ILSVRC2012", "imagenet")
_DEVKIT: Final = ("ILSVRC2012_devkit_t12/data", "devkit/data", "data", ".")
_TRUTH: Final = "ILSVRC2012_validation_ground_truth.txt"
_TABLES: Final = ("LOC_val_solution.csv", "val.csv", "val/labels.csv")
#: MATLAB's types of stored numbers and texts, and of what else a file holds.
_STORED: Final = {
    1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8", 12: "<i8",
    13: "<u8", 16: "u1", 17: "<u2",
}  # fmt: skip
_MATRIX, _COMPRESSED = 14, 15


class _Layout(NamedTuple):
    """How a data set is opened, and the splits that it comes with, the held-out one last."""

    open: Callable[[Path, str, int], Opened]
    splits: tuple[str, ...]


def is_dataset(spec: str) -> bool:
    """Whether a spec begins with a known name and a colon."""
    return spec.partition(":")[0] in DATASETS and ":" in spec


def near_dataset(spec: str) -> str:
    """A question for a spec that misspells a known name; empty for others."""
    kind, colon, root = spec.partition(":")
    hint = did_you_mean(kind, list(DATASETS))
    # Not where a module has the name: then a callable is meant.
    if not colon or not kind.isidentifier() or not hint or find_spec(kind) is not None:
        return ""
    return f"{hint.removesuffix('?')}:{root}?"


def open_dataset(spec: str, wanted: bool, channels: int) -> Opened:
    """Open a split of a data set, ``NAME:ROOT#SPLIT``; without a split, the held-out one."""
    name, _, place = spec.partition(":")
    layout = DATASETS[name]
    place, mark, split = place.rpartition("#") if "#" in place else (place, "", "")
    held_out, root = layout.splits[-1], Path(place).expanduser()
    if mark and split not in layout.splits:
        known = " and ".join(f"#{one}" for one in layout.splits)
        raise DataError(f"no split {split!r}; {name} comes with {known}. Give one of these.")
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


def _broken(found: str, todo: str = "Fetch the data set again.") -> DataError:
    return DataError(f"{found}. {todo}")


# --- CIFAR, SVHN and Flowers-102: by torchvision's classes ---


def _torchvision() -> Any:
    import torchvision.datasets  # takes seconds

    return torchvision.datasets


@contextmanager
def _root_with(folder: Path, name: str) -> Iterator[Path]:
    """A root in which torchvision finds the folder under the only name that it looks for."""
    if folder.resolve().name == name:
        yield folder.resolve().parent
        return
    with TemporaryDirectory() as temporary:
        (Path(temporary) / name).symlink_to(folder.resolve(), target_is_directory=True)
        yield Path(temporary)


def _checked(load: Callable[[], Any], place: Path, needed: Iterable[Path]) -> Any:
    """Load by one of torchvision's classes, which load nothing but files of the right MD5."""
    try:
        return load()
    except (RuntimeError, OSError) as error:
        missing = [path.name for path in needed if not path.is_file()]
        found = f"{some(missing, 6)} {'is' if len(missing) == 1 else 'are'} not there"
        if not missing:
            found = "its files are not those that are distributed (by their MD5)"
        todo = "Fetch the data set again; changed images can be given as class folders or .npz."
        raise _broken(f"{place}: {found}", todo) from error


def _open_cifar(name: str, root: Path, split: str, channels: int) -> Opened:
    """The Python version, unpacked or as its archive."""
    kind = getattr(_torchvision(), name)
    names = _cifar_files(kind)
    places = (root / kind.base_folder, root / kind.filename.removesuffix(".tar.gz"), root)
    found = [place for place in places if any((place / name).is_file() for name in names)]
    if found:
        return _cifar_in(kind, found[0], found[0], split, channels)
    archive = root if root.is_file() else root / kind.filename
    if not archive.is_file():
        raise DataError(
            f"looked in {root} for {kind.base_folder}/, {names[0]} and the archive "
            f"{kind.filename}; none is there. Give the folder that holds one of them."
        )
    with TemporaryDirectory() as top:
        # The MD5 first: an archive of other origin could be of any size, and lead anywhere.
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
    path = next((p for p in (root / name, root / "svhn" / name) if p.is_file()), None)
    if path is None:
        raise DataError(
            f"looked for {name} in {root}; it is not there. Give the folder that holds "
            "the cropped digits (train_32x32.mat and test_32x32.mat)."
        )
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


# --- Folders of image files and the lists beside them ---


def _find_root(root: Path, folders: Sequence[str], needed: str) -> Path:
    """Where a data set lies: in the folder given, or in its usual place inside."""
    places = [root, *(root / folder for folder in folders)]
    for place in places:
        if (place / needed).exists():
            return place
    beside = [root.name] if root.is_file() else sorted(path.name for path in root.iterdir())
    archives = [name for name in beside if name.endswith((".tar", ".tgz", ".tar.gz", ".zip"))]
    found = f"looked for {some([str(place / needed) for place in places])}; not there"
    todo = "Give the folder that holds the data set."
    if archives:
        found += f", but {some(archives)} is"
        todo = "Unpack it (tar xf) and give the folder."
    raise _broken(found, todo)


def _files(root: Path, files: Sequence[str], channels: int) -> FileImages:
    """Listed files of a folder, once all are known to be in it."""
    if not files:
        raise _broken(f"no images in this split, in {root}")
    if found := faults_of(misplaced(root, files)):
        raise _broken(f"{found} of {len(files):,} images in {root}")
    return FileImages(root, "", files, channels)


def _read_text(path: Path) -> str:
    with parsing(f"{path}: cannot be read", " Fetch the data set again."):
        return read_bytes(path, _MAX_LIST_BYTES).decode("utf-8-sig")


def _open_caltech256(root: Path, split: str, channels: int) -> Opened:
    """Folders ``256_ObjectCategories/001.ak47/...``."""
    inside = ("256_ObjectCategories", "caltech256/256_ObjectCategories")
    folder = _find_root(root, inside, "001.ak47")
    matches = [_CATEGORY.fullmatch(name) for name in list_images(folder)[1]]
    categories = {int(match[1]): match for match in reversed(matches) if match}
    n = sum(match is not None for match in matches)
    if sorted(categories) != list(range(1, n + 1)):
        found = f"the class folders in {folder} are not numbered 001 to {n:03d}, each once"
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
        "Caltech-256 comes with none"
    )
    # Published numbers are for 256 classes or for 257.
    if n == _CLUTTER:
        images.notes.append("the class clutter is the last of 257; remove its folder for 256")
    return images, np.asarray(labels, dtype=np.int64)


def _draw(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _open_cub2011(root: Path, split: str, channels: int) -> Opened:
    """A folder ``images/`` and the lists beside it."""
    folder = _find_root(root, ("CUB_200_2011",), "images")
    names = ("images.txt", "train_test_split.txt", "image_class_labels.txt", "classes.txt")
    absent = [name for name in names if not (folder / name).is_file()]
    if absent:
        raise _broken(f"looked for {some(names)} in {folder}; {some(absent)} is not there")
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
    """Rows of a number and a value."""
    lines = [line for line in _read_text(path).splitlines() if line.strip()]
    rows = [line.split(maxsplit=1) for line in lines]
    short = [" ".join(row)[:40] for row in rows if len(row) < 2]
    values = {row[0]: row[1].strip() for row in rows if len(row) == 2}
    if short or len(values) < len(rows) or not values:
        found = f"{path}: {len(rows)} lines, {len(values)} of them a number of its own and a value"
        found += f", not: {some(short)}" if short else ""
        raise _broken(found, "Fetch it again.")
    return values


# --- ImageNet ---


def _open_imagenet(root: Path, split: str, channels: int) -> Opened:
    """``train/`` in class folders, ``val/`` so or flat, ``test/`` without labels."""
    top = _find_root(root, _INSIDE, split)
    folder = top / split
    loose, folders, _ = list_images(folder)
    files = [f"{name}/{file}" for name in folders for file in list_images(folder / name)[0]]
    if bool(files) == bool(loose) or (loose and split == "train"):
        found = f"{len(loose)} images {'beside' if files else 'and no'} class folders in {folder}"
        raise _broken(
            f"{found}, expected folders named by WordNet ids"
            + ("" if split == "train" else ", or images alone"),
            "Unpack each archive into a folder of its own.",
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
    """The id of each image of the flat validation folder, and all ids there are."""
    for path in (place / name for place in (top, root) for name in _TABLES):
        if path.is_file():
            return _by_table(path, files)
    for kit in (place / name for place in (top, root) for name in _DEVKIT):
        if (kit / _TRUTH).is_file():
            return _by_devkit(kit, files)
    raise DataError(
        f"{top / 'val'} is flat, and its answers were not found: looked in {root} for "
        f"{_DEVKIT[0]}/{_TRUTH} (with meta.mat), {some(_TABLES)}. Add one, or sort the images "
        "into folders named by WordNet ids."
    )


def _by_table(path: Path, files: list[str]) -> tuple[list[str], tuple[str, ...]]:
    # Kaggle's second column goes on with boxes; its first has no suffix.
    ids = {
        Path(row[0]).stem: row[1].split()[0]
        for row in read_rows(path, _MAX_LIST_BYTES)[1:]
        if row[1:] and row[1]
    }
    missing = [name for name in files if Path(name).stem not in ids]
    if missing:
        found = f"{path}: {len(missing):,} of {len(files):,} images are not in it: {some(missing)}"
        raise _broken(found, "Give the whole table.")
    return [ids[Path(name).stem] for name in files], tuple(sorted(set(ids.values())))


def _by_devkit(kit: Path, files: list[str]) -> tuple[list[str], tuple[str, ...]]:
    answers = dict(enumerate(_read_text(kit / _TRUTH).split(), 1))
    ids = _synsets(kit / "meta.mat")
    digits = {name: Path(name).stem.rpartition("_")[2] for name in files}
    numbers = {name: int(text[:9]) for name, text in digits.items() if text.isdecimal()}
    wrong = [name for name in files if answers.get(numbers.get(name, 0)) not in ids]
    if wrong:
        found = (
            f"{len(wrong):,} of {len(files):,} images in val have no answer among the "
            f"{len(answers):,} of {kit / _TRUTH}: {some(wrong)}"
        )
        raise _broken(found, "Give the files that belong together.")
    return [ids[answers[numbers[name]]] for name in files], tuple(sorted(ids.values()))


def _synsets(path: Path) -> dict[str, str]:
    """WordNet id by the devkit's own number, of the 1000 classes themselves."""
    if not path.exists():
        found = f"looked for {path}, which gives the devkit's numbers of the classes; not there"
        raise _broken(found, "Unpack the whole devkit.")
    with parsing(f"{path}: not the devkit's meta.mat", " Unpack it again."):
        rows = list(_rows_of_mat(read_bytes(path, _MAX_TABLE_BYTES), b"synsets"))
        leaves = [row for row in rows if int(row["num_children"][0]) == 0]
        numbers = [str(int(row["ILSVRC2012_ID"][0])) for row in leaves]
        ids = ["".join(map(chr, row["WNID"])) for row in leaves]
        if not ids or not all(map(_WNID.fullmatch, ids)):
            raise ValueError("no table of WordNet ids")
        return dict(zip(numbers, ids, strict=True))


def _rows_of_mat(content: bytes, wanted: bytes) -> Iterator[dict[str, np.ndarray]]:
    """Rows of one structure of numbers and texts in a MATLAB file, version 5.

    SciPy's reader recurses as deep as a file asks it to, up to the end of the stack, and takes the
    memory that a file claims. One level is all that the devkit needs.
    """
    if content[124:128] != b"\0\1IM":
        raise ValueError("no MATLAB version 5 file by its first bytes")
    for kind, data in _elements(content[128:]):
        if kind == _COMPRESSED:
            inflater = zlib.decompressobj()
            data = inflater.decompress(data, _MAX_TABLE_BYTES)
            if not inflater.eof:
                raise ValueError(f"a variable is cut, or above {_MAX_TABLE_BYTES:,} bytes")
            ((kind, data),) = _elements(data)
        parts = [part for _, part in _elements(data)] if kind == _MATRIX else []
        if len(parts) < 5 or parts[2] != wanted:
            continue
        width = struct.unpack("<I", parts[3])[0]
        names = [parts[4][k : k + width] for k in range(0, len(parts[4]), width)]
        fields = [name.rstrip(b"\0").decode("latin-1") for name in names]
        for k in range(5, len(parts), len(fields)):
            cells = [list(_elements(cell)) for cell in parts[k : k + len(fields)]]
            # Of each cell the fourth part is its values, after flags, shape and name.
            values = [np.frombuffer(cell[3][1], _STORED.get(cell[3][0], "V0")) for cell in cells]
            yield dict(zip(fields, values, strict=True))


def _elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and content of each data element; compressed ones are not padded."""
    at = 0
    while at + 8 <= len(data):
        kind, size = struct.unpack_from("<II", data, at)
        start, end = at + 8, at + 8 + size + (0 if kind == _COMPRESSED else -size % 8)
        # Up to 4 bytes are packed beside their size, which then fills the upper half of the word.
        if kind >> 16:
            kind, size, start, end = kind & 0xFFFF, kind >> 16, at + 4, at + 8
        if start + size > min(end, len(data)):
            raise ValueError(f"an element claims {size:,} bytes, {len(data) - start:,} are left")
        yield kind, data[start : start + size]
        at = end


DATASETS: Final = {
    "cifar10": _Layout(partial(_open_cifar, "CIFAR10"), ("train", "test")),
    "cifar100": _Layout(partial(_open_cifar, "CIFAR100"), ("train", "test")),
    "svhn": _Layout(_open_svhn, ("train", "test")),
    "caltech256": _Layout(_open_caltech256, ("train", "test")),
    "flowers102": _Layout(_open_flowers102, ("train", "val", "test")),
    "cub2011": _Layout(_open_cub2011, ("train", "test")),
    "imagenet": _Layout(_open_imagenet, ("train", "test", "val")),
}
