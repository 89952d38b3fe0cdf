"""Open DATA: find its kind, list its images, and give each image its class.

`_KINDS` is the table of all forms. Data may come from strangers: sizes are checked before memory is
allocated, and no path leads out of its folder. The only unpickled files are the distributed files
of named sets, checked by MD5. Only a callable named in the spec itself is imported.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final, NamedTuple

import numpy as np

from bnfix.core.errors import BnfixError, CheckpointError, DataError, Note, count, some
from bnfix.core.options import one_of, require
from bnfix.data.archives import choose_split, find_tables, open_shards, open_tables
from bnfix.data.arrays import TensorItems, is_callable, open_arrays, open_callable
from bnfix.data.images import (
    SUFFIXES,
    FileImages,
    Images,
    Opened,
    SeveralImages,
    faults_of,
    list_images,
    misplaced,
    read_object,
    read_rows,
)
from bnfix.data.named_sets import is_dataset, near_dataset, open_dataset
from bnfix.data.splits import group_
from bnfix.data.targets import is_coco, is_segmentation, open_coco, open_masked

MAX_CSV_BYTES: Final = 500_000_000
MAX_CLASSES: Final = 1_000_000
MAX_CLASS_MAP_BYTES: Final = 10_000_000
_ARRAYS: Final = (".npz", ".pt", ".safetensors")
_SPLIT_NAMES: Final = {"train", "training", "val", "valid", "validation", "test", "testing"}
_IMAGENET_ID: Final = re.compile(r"n[0-9]{8}")
_INTEGER: Final = re.compile(r"[+-]?[0-9]{1,18}")
_NUMBER: Final = re.compile(r"[+-]?[0-9.]+([eE][+-]?[0-9]+)?")


def open_images(
    spec: str,
    *,
    class_map: Path | None = None,
    labels: str = "auto",
    n_classes: int | None = None,
    channels: int = 3,
    groups: str | None = None,
) -> Images:
    """Open DATA: find its kind, list its images, and give each image its class and group."""
    one_of(labels, ("auto", "none"), "--labels")
    require(channels in (1, 3), f"channels: {channels}, expected 1 or 3.", "channels")
    mapping = None if class_map is None else read_class_map(Path(class_map))
    wanted = labels == "auto"
    try:
        images, classes = _kind_of(spec).open(spec, wanted, channels)
        if isinstance(classes, list) and wanted:
            classes = given_classes(images, classes)
    except (DataError, CheckpointError, OSError, ValueError) as error:
        # The readers state only the fault; the place is added here.
        stated = isinstance(error, BnfixError)
        fault = str(error).removeprefix(f"{spec}: ") if stated else f"cannot be read ({error})."
        raise DataError(f"DATA {spec}: {fault}", name=spec, path=spec) from error
    images.spec = spec
    images.notes += images.colours()
    if groups is not None:
        group_(images, groups)
    if images.unused:
        images.notes.insert(0, f"arrays skipped: {some(images.unused)}")
    if classes is not None and wanted:
        images.classes_given = classes, mapping, tuple(images.notes)
        _set_labels(images, classes, mapping, n_classes)
    else:
        if not wanted:
            images.notes.append(Note("labels are not used (--labels none)", "unused labels"))
        elif not images.labelled:
            images.notes.append("no labels")
        if mapping is not None:
            images.notes.append("the class map is not used, since there are no labels")
    return images


def open_several(specs: Sequence[str], **how: Any) -> Images:
    """Open several DATA as one; labels are used if all of them have classes."""
    parts = [open_images(spec, **how) for spec in specs]
    odd = [p.spec for p in parts if isinstance(p, TensorItems) or (p.labelled and p.labels is None)]
    if odd:
        raise DataError(
            f"DATA {some(odd)}: cannot be combined, expected images with classes or without labels "
            "for several --data, or for --data with --select DATA. Give one --data."
        )
    whole = SeveralImages(parts)
    is_used = all(part.labels is not None for part in parts)
    # Notes on the numbering of classes in a single part do not apply to the whole.
    notes = [part.classes_given[2] if is_used else part.notes for part in parts]
    whole.notes = [f"{p.spec}: {note}" for p, own in zip(parts, notes, strict=True) for note in own]
    if any(part.groups is not None for part in parts):
        _group_(whole)
    if not is_used:
        bare = [part.spec for part in parts if part.labels is None]
        if len(bare) < len(parts):
            whole.notes.append(f"labels are not used, since {some(bare)} has no labels")
        return whole
    given = [part.classes_given[0] for part in parts]
    names = {part.class_names for part in parts if isinstance(part.classes_given[0], np.ndarray)}
    known = names - {None}
    if len({type(classes) for classes in given}) > 1 or len(known) > 1:
        raise DataError(
            f"DATA {whole.spec}: their classes are named or numbered in different ways, expected "
            "the same classes in all. Give them the same names, or --labels none."
        )
    whole.class_names = known.pop() if known else None
    classes = np.concatenate(given) if names else [name for part in given for name in part]
    whole.classes_given = classes, parts[0].classes_given[1], tuple(whole.notes)
    return for_outputs(whole, None)


def _group_(whole: SeveralImages) -> None:
    """Set the groups of all sources; an example without a group becomes its own group."""
    found, names = [], list[str]()
    for part in whole.parts:
        groups = np.arange(len(part)) if part.groups is None else part.groups
        own = part.group_names or tuple(map(part.name, range(len(part))))
        found.append(groups + len(names))
        names += [f"{part.spec}: {name}" for name in own]
    whole.groups, whole.group_names = np.concatenate(found), tuple(names)


# --- kinds ---


class _Kind(NamedTuple):
    """One form of DATA: its description, a test for specs and paths, and its reader."""

    words: str
    fits: Callable[[str, Path], bool]
    open: Callable[[str, bool, int], Opened]  # arguments: spec, whether labels are wanted, channels


def _kind_of(spec: str) -> _Kind:
    path = Path(spec)
    for kind in _KINDS:
        if kind.fits(spec, path):
            return kind
    if not path.exists() and (hint := near_dataset(spec)):
        raise DataError(f"no such kind.{hint}")
    is_other = path.exists() or ":" in spec
    reason = "not of a known kind" if is_other else "no such file or folder"
    raise DataError(f"{reason}. Give {', '.join(kind.words for kind in _KINDS)}.")


def _fits_folder(spec: str, path: Path) -> bool:
    named = is_dataset(spec, path) or is_coco(spec, path)
    return path.is_dir() or (not path.exists() and "#" in spec and not named)


def _open_place(spec: str, wanted: bool, channels: int) -> Opened:
    """Open a folder of any kind, or one split of it, ``FOLDER#SPLIT``."""
    path, split = Path(spec), ""
    if not path.is_dir():
        folder, _, split = spec.rpartition("#")
        path = Path(folder)
    if is_segmentation(path / split):
        return open_masked(path / split, wanted, channels)
    if (path / "labels.csv").exists() and not split:
        return _open_csv(path, wanted, channels)
    tables = find_tables(path) if path.is_dir() else []
    if tables:
        chosen, notes = choose_split(path, tables, split)
        images, classes = open_tables(chosen, wanted, channels)
        images.notes += notes
        return images, classes
    inside = path / split
    if split and not inside.is_dir():
        raise DataError(
            f"no split {split} in {path}, expected a folder of that name or parquet files of "
            "that split."
        )
    by_file = (inside / "labels.csv").exists()
    return (_open_csv if by_file else _open_folder)(inside, wanted, channels)


def _open_folder(path: Path, wanted: bool, channels: int) -> Opened:
    """Open a folder of class folders, or a flat folder."""
    loose, folders, n_others = list_images(path)
    parts = [str(path / name) for name in folders if is_segmentation(path / name)]
    if parts:
        raise DataError(f"its folders hold images/ and masks/. Give one of them: {some(parts)}.")
    by_class: dict[str, list[str]] = {}
    for folder in folders:
        inside, deeper, n = list_images(path / folder)
        # One level deeper, as in Tiny ImageNet: n01443537/images/x.JPEG.
        nested = {sub: list_images(path / folder / sub) for sub in deeper}
        n_others += n + sum(n for _, _, n in nested.values())
        inside += [f"{sub}/{name}" for sub, (names, _, _) in nested.items() for name in names]
        by_class[folder] = [f"{folder}/{name}" for name in inside]
    files = [name for names in by_class.values() for name in names]
    empty = [folder for folder, names in by_class.items() if not names]
    if not loose and not files:
        raise DataError(f"no images, expected {' '.join(SUFFIXES)} in it or its folders.")
    if loose and files:
        raise DataError(
            f"{count(len(loose), 'images')} next to folders with images ({some(folders)}), "
            "expected only images or only class folders. Move one of them away."
        )
    if files and wanted and {name.lower() for name in folders} <= _SPLIT_NAMES:
        raise DataError(
            f"its folders are splits, not classes ({some(folders)}). "
            f"Give one of them, for example {path / folders[0]}."
        )
    images = FileImages(path, "class folders" if files else "flat folder", files or loose, channels)
    images.classes = tuple(folders) if files else ()
    if n_others:
        images.notes.append(f"{count(n_others, 'files')} without an image suffix skipped")
    if empty:
        images.notes.append(f"{len(empty)} folders hold no images: {some(empty)}")
    classes = [folder for folder, names in by_class.items() for _ in names]
    return images, classes if files else None


def _open_csv(path: Path, wanted: bool, channels: int) -> Opened:
    """Open a folder with ``labels.csv``; its labels are text."""
    header, *rows = read_rows(path / "labels.csv", MAX_CSV_BYTES) or [[]]
    if "file" not in header or (wanted and "label" not in header):
        raise DataError(
            f"labels.csv: its first line is {','.join(header)[:100]!r}, expected file,label."
        )
    if not rows:
        raise DataError("labels.csv: no images, expected lines after the header.")
    column = header.index("file"), header.index("label") if "label" in header else 0
    files = [str(PurePosixPath(row[column[0]])) for row in rows if len(row) > column[0]]
    problems = {
        "without a file or label": [
            f"line of {row[0]!r}" for row in rows if len(row) <= max(column) or not row[column[1]]
        ],
        "listed more than once": [name for name, n in Counter(files).items() if n > 1],
    }
    if found := faults_of(problems | misplaced(path, files)):
        raise DataError(f"labels.csv: {found}. Correct the file.")
    images = FileImages(path, "labels.csv", files, channels)
    images.fields = {
        name: [row[k] if k < len(row) else "" for row in rows] for k, name in enumerate(header)
    }
    unlisted = set(list_images(path)[0]).difference(files)
    if unlisted:
        images.notes.append(f"{count(len(unlisted), 'images')} not in labels.csv skipped")
    return images, [row[column[1]] for row in rows]


#: The first fitting entry opens DATA; a new form of DATA is one entry here.
_KINDS: Final = (
    _Kind(
        "a folder of class folders, a folder of images with labels.csv, a flat folder of images, "
        "a folder with images/ and masks/, a Hugging Face folder",
        _fits_folder,
        _open_place,
    ),
    _Kind(
        "an .npz, .pt or .safetensors file with images (or inputs of any shape) and labels (or "
        "targets of any shape)",
        lambda spec, path: path.suffix.lower() in _ARRAYS and (path.is_file() or "{" in spec),
        open_arrays,
    ),
    _Kind("a data set as cifar10:ROOT#test", is_dataset, open_dataset),
    _Kind("boxes as coco:ROOT#val2017", is_coco, open_coco),
    _Kind(".tar shards", lambda _, path: path.suffix.lower() == ".tar", open_shards),
    _Kind(".parquet files", lambda _, path: path.suffix.lower() == ".parquet", open_tables),
    _Kind(
        "or package.module:callable",
        lambda spec, path: not path.exists() and not near_dataset(spec) and is_callable(spec),
        open_callable,
    ),
)


# --- classes ---


def for_outputs(images: Images, n_classes: int | None, labels: Sequence[str] = ()) -> Images:
    """The same images with classes numbered for the model's outputs, by its labels if they fit."""
    again = object.__new__(type(images))
    again.__dict__.update(images.__dict__)  # copy.copy drops the fields not sent to other processes
    if images.classes_given is not None:
        classes, mapping, notes = images.classes_given
        again.notes = list(notes)
        if mapping is None and isinstance(classes, list):
            # A name that two outputs share is ambiguous.
            once = Counter(labels)
            numbers = {name: k for k, name in enumerate(labels) if once[name] == 1}
            if {*classes, *images.classes} <= numbers.keys():
                mapping = numbers
                again.notes.append("the model's own labels are the class map")
        _set_labels(again, classes, mapping, n_classes)
    return again


def _set_labels(
    images: Images, classes: list[str] | np.ndarray, mapping: dict[str, int] | None, n: int | None
) -> None:
    """Turn each image's class, a name or a number, into its index."""
    where, known = images.spec, images.class_names
    if images.kind == "labels.csv":
        where += "/labels.csv"
        odd = [name for name in dict.fromkeys(classes) if not _INTEGER.fullmatch(name)]
        if mapping is None and not odd:
            classes = np.asarray([int(name) for name in classes], dtype=np.int64)
        elif mapping is None and any(_NUMBER.fullmatch(name) for name in classes):
            raise DataError(
                f"{where}: some labels are numbers, but not all are integers: {some(odd)}. "
                "Give only integers, only class names, or --class-map FILE.json."
            )
    if isinstance(classes, np.ndarray):
        if mapping is None:
            images.labels = check_range(classes, n, where)
            if known is not None and n is not None:
                images.class_names = (*known[:n], *map(str, range(len(known), n)))
            return
        if known is not None:  # a class map goes by name if the numbers have names
            classes = [known[k] if 0 <= k < len(known) else str(k) for k in classes.tolist()]
    names = [str(name) for name in classes]
    indices, how = map_classes(sorted({*names, *images.classes}), mapping, n, where)
    images.notes.append(how)
    images.labels = np.asarray([indices[name] for name in names], dtype=np.int64)
    held: dict[int, list[str]] = {}
    for name, k in indices.items():
        held.setdefault(k, []).append(name)
    count = max(held) + 1 if n is None else n
    images.class_names = tuple(" + ".join(held.get(k, [str(k)])) for k in range(count))


def given_classes(images: Images, labels: Sequence[Any]) -> list[str] | np.ndarray | None:
    """All labels as numbers or all as names; None if no image has a label."""
    bare = [images.name(i) for i, label in enumerate(labels) if label in (None, "")]
    if len(bare) == len(labels):
        return None
    if bare:
        raise DataError(
            f"{len(bare)} of {len(labels)} images have no label ({some(bare)}). Add them, or give "
            "--labels none."
        )
    if all(isinstance(label, int) for label in labels):
        return np.asarray(labels, dtype=np.int64)
    return [str(label) for label in labels]


def map_classes(
    names: Sequence[str], class_map: dict[str, int] | None, n_classes: int | None, where: str
) -> tuple[dict[str, int], str]:
    """Give each class name its index, by the map, ImageNet id, value or sorted order."""
    names, n = sorted(names), len(names)
    ask = "Give --class-map FILE.json (class name to index)."
    if class_map is not None:
        missing = [name for name in names if name not in class_map]
        if missing:
            raise DataError(
                f"{where}: {len(missing)} of {n} classes are not in the class map: "
                f"{some(missing)}. Add them."
            )
        indices, how = {name: class_map[name] for name in names}, "classes by the class map"
    # With one class per output, the sorted ids are the outputs, and no list is needed.
    elif all(_IMAGENET_ID.fullmatch(name) for name in names) and n != n_classes:
        indices, how = _imagenet_indices(names, where, ask), "classes by ImageNet id"
    # In text order, 10 would come before 2.
    elif all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        indices, how = {name: int(name) for name in names}, "classes are numbers, taken by value"
        if len(set(indices.values())) < n:
            raise DataError(f"{where}: two classes have the same number among {some(names)}. {ask}")
    elif n_classes is not None and n != n_classes:
        raise DataError(
            f"{where}: {count(n, 'classes')} for a model with {count(n_classes, 'outputs')}, "
            f"expected a class per output to number them by sorted name. {ask}"
        )
    else:
        indices = {name: k for k, name in enumerate(names)}
        how = f"{count(n, 'classes')} numbered by sorted name"
    limit = MAX_CLASSES if n_classes is None else n_classes
    outside = [f"{name} = {k}" for name, k in indices.items() if k >= limit]
    if outside:
        raise DataError(
            f"{where}: {len(outside)} of {n} classes are outside the outputs 0 to {limit - 1}: "
            f"{some(outside)}. {ask}"
        )
    return indices, how


def _imagenet_indices(names: Sequence[str], where: str, ask: str) -> dict[str, int]:
    known: Sequence[str] = names
    if len(names) != 1000:
        try:
            from timm.data.imagenet_info import ImageNetInfo  # optional: it carries the list
        except ImportError as error:
            raise DataError(
                f"{where}: {len(names)} folders or labels named by ImageNet ids, not all 1000; "
                f"timm has the full list and is not installed. {ask}"
            ) from error
        known = ImageNetInfo("imagenet-1k").label_names()  # type: ignore[no-untyped-call]
    indices = {name: k for k, name in enumerate(known)}
    unknown = [name for name in names if name not in indices]
    if unknown:
        raise DataError(
            f"{where}: {len(unknown)} of {len(names)} ids are not among ImageNet's 1000: "
            f"{some(unknown)}. {ask}"
        )
    return {name: indices[name] for name in names}


def check_range(labels: np.ndarray, n_classes: int | None, where: str) -> np.ndarray:
    """Check that integer labels are possible outputs of the model."""
    limit = MAX_CLASSES if n_classes is None else n_classes
    rows = np.flatnonzero((labels < 0) | (labels >= limit))
    if len(rows):
        outside = f"outside 0 to {limit - 1}"
        if n_classes is None and labels.max() < limit:  # the limit is only a guard here
            outside = "below 0, expected at least 0"
        of_model = "" if n_classes is None else f", the model's {n_classes} outputs"
        raise DataError(
            f"{where}: labels from {labels.min()} to {labels.max()}, {len(rows)} of {len(labels)} "
            f"{outside}{of_model}, first in row {rows[0]} (from 0). Correct them, or give "
            "--class-map FILE.json."
        )
    return labels.astype(np.int64)


def read_class_map(path: Path) -> dict[str, int]:
    """Read a class map: a JSON object, class name to index."""
    where = f"class map {path}"
    content = read_object(path, where, MAX_CLASS_MAP_BYTES)
    wrong = [
        f"{name}: {k!r}"[:60]
        for name, k in content.items()
        if type(k) is not int or not 0 <= k < MAX_CLASSES
    ]
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} values are not integers from 0: {some(wrong)}.", path=path
        )
    return content
