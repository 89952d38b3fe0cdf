"""Groups of examples that depend on each other, such as the frames of one video."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Final

import numpy as np

from bnfix.core.errors import ConfigError, DataError, plain, some
from bnfix.data.arrays import named_array
from bnfix.data.images import EncodedImages, FileImages, Images

#: The sequence of a file that is named by it and a running number: a path, or a name alone.
_OF_PATH: Final = r"(.*?)\d+\.[^./]+$"
_OF_NAME: Final = r"([^/]*?)\d+\.[^./]+$"
#: Fewer examples are not looked at; more sequences are no sequences.
_FEWEST, _MOST = 20, 50
_FILES: Final = (".npy", ".npz")
_refused = partial(ConfigError, name="groups")


def group_(images: Images, spec: str) -> None:
    """Give each example its group, by ``--groups``."""
    where = f"--groups {plain(spec)}"
    values = _values(images, spec, where)
    array = spec.removeprefix(images.spec).lstrip("#") or "groups"  # read, so not passed over
    images.unused = [name for name in images.unused if name != array]
    if len(values) != len(images):
        raise _refused(
            f"{where}: {len(values):,} groups for the {len(images):,} examples of {images.spec}, "
            "expected one for each."
        )
    empty = [images.name(i) for i, value in enumerate(values) if value == ""]
    if empty:
        raise _refused(f"{where}: {len(empty)} examples without a group ({some(empty)}). Add them.")
    names, ids = np.unique(values, return_inverse=True)
    n = len(names)
    if n == 1:
        raise _refused(
            f"{where}: all {len(values):,} examples are in the group {plain(str(names[0]))!r}, "
            "expected at least 2 groups. Give another column, expression or file."
        )
    if n == len(values):
        images.notes.append(f"{where} is not used: every example has a group of its own")
        return
    images.groups, images.group_names = ids.reshape(-1).astype(np.int64), tuple(map(str, names))


def _values(images: Images, spec: str, where: str) -> Sequence[str] | np.ndarray:
    """The group of each example: of a column, an array, or a file name."""
    file, _, array = spec.partition("#")
    path = Path(file)
    if path.suffix.lower() in _FILES and path.is_file():
        return _numbered(path, array or "groups", where)
    if spec in images.fields:
        return images.fields[spec]
    if spec.isidentifier() and images.kind in ("npz", "labels.csv"):
        if images.kind == "npz":
            return _numbered(Path(images.spec), spec, where)
        raise _refused(
            f"{where}: no such column in {images.spec}/labels.csv, which has "
            f"{some(list(images.fields))}. Name one of them."
        )
    if not isinstance(images, EncodedImages):
        raise _refused(
            f"{where}: no such file, and the examples of {images.spec} have no file names that an "
            "expression could match. Give an .npy file with one group an example."
        )
    try:
        expression = re.compile(spec)
    except re.error as error:
        raise _refused(f"{where}: no column, file or regular expression ({error}).") from error
    names = [images.name(i) for i in range(len(images))]
    found = [expression.search(name) for name in names]
    missed = [name for name, match in zip(names, found, strict=True) if match is None]
    if missed:
        raise _refused(
            f"{where}: no column or file has this name, so it was taken as a regular expression; "
            f"{len(missed):,} of {len(names):,} file names do not match ({some(missed)}). Give an "
            "expression that matches all, or an .npy file with one group an example."
        )
    # A first group that took no part, as in (a)|b, is as good as none.
    return [(m.groups() or (None,))[0] or m.group() for m in found if m is not None]


def _numbered(path: Path, array: str, where: str) -> np.ndarray:
    """One group an example, as whole numbers or words, from a file."""
    try:
        values = (
            np.load(path, mmap_mode="r", allow_pickle=False)
            if path.suffix.lower() == ".npy"
            else named_array(path, array)
        )
    except (OSError, ValueError, EOFError, DataError) as error:
        fault = str(error).rstrip(".")
        message = f"{where}: {path} cannot be read ({fault}). Name another array or file."
        raise _refused(message) from error
    if values.ndim != 1 or values.dtype.kind not in "iuU":
        raise _refused(
            f"{where}: {values.dtype} {values.shape}, expected one whole number or word an "
            "example, (N,)."
        )
    return values


def groups_of_test(spec: str | None) -> str | None:
    """``--groups`` for the examples of ``--test``: the same, or another array of the file."""
    path = Path(spec or "")
    if path.suffix.lower() == ".npy" and path.is_file():
        raise _refused(
            f"--groups {plain(path)}: has no groups for the examples of --test. Give an .npz file "
            "with the arrays groups and test_groups."
        )
    is_file = path.suffix.lower() == ".npz" and path.is_file()
    return f"{spec}#test_groups" if is_file else spec


def describe_groups(images: Images, *, splits: bool = True) -> list[str]:
    """A note on the groups; without them, where file names look like frames of few sequences."""
    n = len(images)
    if images.groups is not None:
        sizes = np.bincount(images.groups)
        kept = "No group is in two splits; intervals, tests and the gate count groups."
        return [
            f"{images.spec}: {n:,} examples in {len(sizes):,} groups of {sizes.min():,} to "
            f"{sizes.max():,} (median {np.median(sizes):g}). "
            f"{kept if splits else 'Intervals and tests count groups.'}"
        ]
    if n < _FEWEST or not isinstance(images, EncodedImages):
        return []
    in_classes = isinstance(images, FileImages) and bool(images.classes)
    expression = _OF_NAME if in_classes else _OF_PATH
    names = [images.name(i) for i in range(n)]
    found = [re.search(expression, name) for name in names]
    of_each = [match.group(1) for match in found if match is not None]
    prefixes = set(of_each)
    if len(of_each) < n or not 1 < len(prefixes) <= min(_MOST, n / 5):
        return []
    labels = images.labels if images.labels is not None and images.labels.ndim == 1 else None
    classes = [PurePosixPath(name).parts[0] for name in names] if in_classes else labels
    if classes is not None:
        pairs = len(set(zip(of_each, classes, strict=True)))
        if pairs == len(prefixes) == len(set(classes)):
            return []  # cat_0001 and dog_0001 are named by their class
    return [
        f"{images.spec}: file names look like frames of {len(prefixes)} sequences "
        f"({some(sorted(prefixes))}). Frames of a sequence depend on each other; --groups "
        f"'{expression}' keeps each sequence in one split, and counts sequences in intervals."
    ]


def deal(
    sizes: np.ndarray, classes: np.ndarray, fractions: Sequence[float], least: Sequence[int]
) -> np.ndarray:
    """Deal whole groups to parts: each, in this order, to the part that is owed most examples.

    Class by class, so that every part gets its fraction of each as far as whole groups allow; and
    every part gets at least so many groups.
    """
    owed, given = np.zeros(len(fractions)), np.asarray(fractions)
    part = np.zeros(len(sizes), dtype=np.int64)
    for c in dict.fromkeys(classes.tolist()):
        members = np.flatnonzero(classes == c)
        owed += given * sizes[members].sum()
        for g in members:
            part[g] = np.where(given > 0, owed, -np.inf).argmax()
            owed[part[g]] -= sizes[g]
    while True:
        spare = np.bincount(part, minlength=len(fractions)) - least
        if spare.min() >= 0:
            return part
        donors = np.flatnonzero(part == spare.argmax())
        part[donors[sizes[donors].argmin()]] = spare.argmin()
