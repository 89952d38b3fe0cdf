"""Groups of examples, splits without duplicates, and the images that a file was fitted on."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b, sha256
from math import floor
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from bnfix.core.errors import ConfigError, DataError, count, plain, some
from bnfix.core.options import require
from bnfix.data.arrays import named_array
from bnfix.data.images import DIGEST_SIZE, EncodedImages, FileImages, Images, SeveralImages

#: Most images that a history lists one by one, with 8 characters each.
MAX_LISTED: Final = 100_000
#: The sequence in a file name of a sequence and a running number: in a path, or in a bare name.
_OF_PATH: Final = r"(.*?)\d+\.[^./]+$"
_OF_NAME: Final = r"([^/]*?)\d+\.[^./]+$"
#: With fewer examples, sequences are not searched; with more sequences, they do not count.
_FEWEST, _MOST = 20, 50
_FILES: Final = (".npy", ".npz")
_require = partial(require, name="groups")


# --- groups of dependent examples, such as the frames of one video ---


def group_(images: Images, spec: str) -> None:
    """Give each example its group from ``--groups``."""
    where = f"--groups {plain(spec)}"
    values = _values(images, spec, where)
    array = spec.removeprefix(images.spec).lstrip("#") or "groups"  # used, so not in `unused`
    images.unused = [name for name in images.unused if name != array]
    found = f"{where}: {len(values):,} groups for the {len(images):,} examples of {images.spec}"
    _require(len(values) == len(images), f"{found}, expected one for each.")
    empty = [images.name(i) for i, value in enumerate(values) if value == ""]
    _require(
        not empty,
        f"{where}: {count(len(empty), 'examples')} without a group ({some(empty)}). Add them.",
    )
    names, ids = np.unique(values, return_inverse=True)
    _require(
        len(names) > 1,
        f"{where}: all {len(values):,} examples are in the group {plain(str(names[0]))!r}, "
        "expected at least 2 groups. Give another column, expression or file.",
    )
    if len(names) == len(values):
        images.notes.append(f"{where} is not used: every example is in a separate group")
        return
    images.groups, images.group_names = ids.reshape(-1).astype(np.int64), tuple(map(str, names))


def _values(images: Images, spec: str, where: str) -> Sequence[str] | np.ndarray:
    """The group of each example, from a column, an array or the file names."""
    file, _, array = spec.partition("#")
    path = Path(file)
    if path.suffix.lower() in _FILES and path.is_file():
        return _numbered(path, array or "groups", where)
    if spec in images.fields:
        return images.fields[spec]
    if spec.isidentifier() and images.kind == "npz":
        return _numbered(Path(images.spec), spec, where)
    columns = f"{where}: no such column in {images.spec}/labels.csv, which has "
    no_column = spec.isidentifier() and images.kind == "labels.csv"
    _require(not no_column, f"{columns}{some(list(images.fields))}. Name one of them.")
    _require(
        isinstance(images, EncodedImages),
        f"{where}: no such file, and the examples of {images.spec} have no file names for an "
        "expression to match. Give an .npy file with one group per example.",
    )
    try:
        expression = re.compile(spec)
    except re.error as error:
        message = f"{where}: not a column, a file or a regular expression ({error})."
        raise ConfigError(message, name="groups") from error
    names = [images.name(i) for i in range(len(images))]
    found = [expression.search(name) for name in names]
    missed = [name for name, match in zip(names, found, strict=True) if match is None]
    _require(
        not missed,
        f"{where}: no column or file has this name, so it was used as a regular expression; "
        f"{len(missed):,} of {len(names):,} file names do not match ({some(missed)}). Give an "
        "expression that matches all, or an .npy file with one group per example.",
    )
    # If the first group did not match, as in (a)|b, the whole match counts.
    return [(m.groups() or (None,))[0] or m.group() for m in found if m is not None]


def _numbered(path: Path, array: str, where: str) -> np.ndarray:
    """One group per example, as integers or words, from a file."""
    try:
        if path.suffix.lower() == ".npz":
            values = named_array(path, array)
        else:
            values = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError, DataError) as error:
        fault = str(error).rstrip(".")
        message = f"{where}: {path} cannot be read ({fault}). Name another array or file."
        raise ConfigError(message, name="groups") from error
    found = f"{where}: {values.dtype} {values.shape}"
    ok = values.ndim == 1 and values.dtype.kind in "iuU"
    _require(ok, f"{found}, expected one integer or word per example, (N,).")
    return values


def groups_of_test(spec: str | None) -> str | None:
    """``--groups`` for the examples of ``--test``: the same, or another array in the file."""
    path = Path(spec or "")
    kind = path.suffix.lower() if path.is_file() else ""
    _require(
        kind != ".npy",
        f"--groups {plain(path)}: no groups for the examples of --test. Give an .npz file with "
        "the arrays groups and test_groups.",
    )
    return f"{spec}#test_groups" if kind == ".npz" else spec


def describe_groups(images: Images, *, splits: bool = True) -> list[str]:
    """A note on the groups, or on file names that look like frames of a few sequences."""
    n = len(images)
    if images.groups is not None:
        sizes = np.bincount(images.groups)
        kept = "No group is in two splits; intervals, tests and the gate count groups."
        return [
            f"{images.spec}: {n:,} examples in {count(len(sizes), 'groups')} of {sizes.min():,} to "
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
            return []  # cat_0001 and dog_0001 are named after their class
    return [
        f"{images.spec}: file names look like frames of {len(prefixes)} sequences "
        f"({some(sorted(prefixes))}). Frames of a sequence depend on each other; --groups "
        f"'{expression}' keeps each sequence in one split, and counts sequences in intervals."
    ]


def deal(
    sizes: np.ndarray, classes: np.ndarray, fractions: Sequence[float], least: Sequence[int]
) -> np.ndarray:
    """Deal whole groups, in this order, each to the part that lacks most examples.

    It deals class by class, and every part gets its fraction of each class as far as whole groups
    allow. Every part gets at least its number of groups in ``least``.
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


# --- splits without duplicates ---


@dataclass(frozen=True)
class Split:
    """Disjoint sorted positions; exact duplicates of earlier images are in no split."""

    fit: np.ndarray
    select: np.ndarray
    test: np.ndarray
    duplicates: int

    def sizes(self) -> dict[str, int]:
        """The number of examples by split."""
        return {name: len(getattr(self, name)) for name in ("fit", "select", "test")}


def fingerprint(images: Images, index: np.ndarray | None = None) -> str:
    """SHA-256 of a set of images and labels; order, names and paths do not matter."""
    digests = b"".join(images.digests(index))
    rows = np.frombuffer(digests, dtype=np.uint8).reshape(-1, DIGEST_SIZE)
    if images.labels is not None:
        labels = images.labels if index is None else images.labels[index]
        label_bytes = labels.astype("<i8").reshape(-1, 1).view(np.uint8)
        rows = np.concatenate([rows, label_bytes], axis=1)
    elif images.labelled:
        chosen = range(len(images)) if index is None else index
        joined = b"".join(images.target_digest(int(i)) for i in chosen)
        targets = np.frombuffer(joined, dtype=np.uint8).reshape(-1, DIGEST_SIZE)
        rows = np.concatenate([rows, targets], axis=1)
    rows = rows[np.lexsort(rows.T[::-1])] if rows.size else rows
    return sha256(rows.tobytes()).hexdigest()


def cut(images: Images, fractions: tuple[float, float, float], seed: int) -> Split:
    """Split the data in three by a seed, stratified by class, without exact duplicates.

    Every part gets its fraction of every class to within 1, and all classes together are balanced.
    A class of 3 or more is in every part with a nonzero fraction if that bound allows it. An
    image's part depends on the seed and on its bytes, not on the machine. Groups stay whole, so the
    fractions hold as far as group sizes allow.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions: {fractions}, expected 0 or more, with sum 1.")
    digests = images.digests()
    _, first = np.unique(_numbers(digests), return_index=True)
    n = len(first)
    if images.groups is not None:
        fit, select, test = _cut_groups(images, first, fractions, seed)
        return Split(fit, select, test, duplicates=len(images) - n)
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    labels = of_each_source(images, labels, np.arange(len(images)))
    draws = _numbers([_draw(seed, digests[i]) for i in first])
    order = first[np.lexsort((first, draws, labels[first]))]
    classes, starts = np.unique(labels[order], return_index=True)
    members_of = dict(zip(classes.tolist(), np.split(order, starts[1:]), strict=False))
    parts: list[list[int]] = [[], [], []]
    owed = [0.0, 0.0, 0.0]
    for label in sorted(members_of, key=lambda k: _draw(seed, b"class %d" % k)):
        members = members_of[label].tolist()
        sizes = _share(len(members), fractions, owed)
        ends = np.cumsum(sizes)
        for k in range(3):
            # Carried from class to class: otherwise every tiny class would round the same way.
            owed[k] += len(members) * fractions[k] / sum(fractions) - sizes[k]
            parts[k] += members[ends[k] - sizes[k] : ends[k]]
    fit, select, test = (np.asarray(sorted(part), dtype=np.int64) for part in parts)
    return Split(fit, select, test, duplicates=len(images) - n)


def choosing(split: Split, images: SeveralImages) -> Split:
    """The split with the last source as `select`, without groups shared with other sources."""
    own, others = images.parts[-1], images.parts[:-1]
    start = len(images) - len(own)
    everything = np.sort(np.concatenate([split.fit, split.select, split.test]))
    select = everything[everything >= start]
    if own.groups is not None:
        known = {name for part in others for name in part.group_names}
        shared = np.asarray([name in known for name in own.group_names])
        select = select[~shared[own.groups[select - start]]]
    fit, test = (part[part < start] for part in (split.fit, split.test))
    return replace(split, fit=fit, select=select, test=test)


def of_each_source(images: Images, classes: np.ndarray, index: Any) -> np.ndarray:
    """A separate class per source, so that parts get a share of each class of each source."""
    if images.sources is None:
        return classes
    kinds = images.sources[index] * (classes.max() + 1) + classes
    return np.asarray(kinds, dtype=np.int64)


def _cut_groups(
    images: Images, index: np.ndarray, fractions: tuple[float, float, float], seed: int
) -> list[np.ndarray]:
    """The three parts, of at least two whole groups: one group gives no standard error."""
    least = [2 * (fraction > 0) for fraction in fractions]
    index, groups = np.sort(index), np.asarray(images.groups)
    ids, inverse, sizes = np.unique(groups[index], return_inverse=True, return_counts=True)
    if len(ids) < sum(least):
        raise DataError(
            f"{images.spec}: {len(ids)} groups, expected at least {sum(least)}, 2 for each split. "
            "Give more data, or --groups with smaller groups."
        )
    members = np.split(index[np.argsort(inverse, kind="stable")], np.cumsum(sizes)[:-1])
    classes = np.zeros(len(ids), dtype=np.int64)
    if images.labels is not None and images.labels.ndim == 1:
        classes = np.asarray([np.bincount(images.labels[group]).argmax() for group in members])
    classes = of_each_source(images, classes, [group[0] for group in members])
    # As for single images, neither names nor paths matter.
    draws = _numbers([_draw(seed, min(images.digests(group))) for group in members])
    order = np.lexsort((draws, classes))
    part = np.empty(len(ids), dtype=np.int64)
    part[order] = deal(sizes[order], classes[order], fractions, least)
    return [index[part[inverse] == k] for k in range(3)]


def watched(groups: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask of the examples for early stopping: whole groups, about a fifth of the examples."""
    ids, inverse, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    if len(ids) < 2:
        raise DataError(
            "--groups: one group to fit on, expected at least 2, one for training and one for "
            "early stopping. Give more data, or smaller groups."
        )
    order = rng.permutation(len(ids))
    part = np.empty(len(ids), dtype=np.int64)
    part[order] = deal(sizes[order], np.zeros_like(order), (0.8, 0.2), (1, 1))
    return np.asarray(part[inverse] == 1)


def history_digests(images: Images, index: np.ndarray) -> dict[str, Any]:
    """The number of images and, for up to 100,000, their sorted digests as base64."""
    listed = sorted(images.digests(index)) if len(index) <= MAX_LISTED else None
    digests = None if listed is None else base64.b64encode(b"".join(listed)).decode()
    return {"n_examples": len(index), "digests": digests}


def seen_before(images: Images, index: np.ndarray, history: Iterable[dict[str, Any]]) -> int:
    """The number of images that a checkpoint's history lists as used for fitting or choosing."""
    used = {digest for part in _parts(history) for digest in _listed(part)}
    return sum(digest in used for digest in images.digests(index)) if used else 0


def describe_unlisted(history: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence for each use of images that a history does not list."""
    unlisted = [part for part in _parts(history) if isinstance(part, dict)]
    counts = [part.get("n_examples") for part in unlisted if part.get("digests") is None]
    return [
        f"a checkpoint was fitted or chosen on {n:,} images that its history does not list one by "
        "one; the images measured here may be among them."
        for n in counts
        if type(n) is int and n > 0
    ]


def data_record(images: Images, index: np.ndarray | None = None) -> dict[str, Any]:
    """The spec, size and fingerprint of all or some images, for the history."""
    n = len(images) if index is None else len(index)
    return {"spec": images.spec, "n_examples": n, "fingerprint": fingerprint(images, index)}


def unseen(test: Images, images: Images) -> tuple[np.ndarray, int]:
    """The positions of test images outside the data and its groups, and the number inside."""
    known, names = set(images.digests()), set(images.group_names)
    # Groups with the same name are the same group.
    shared = np.asarray([name in names for name in test.group_names], dtype=bool)
    inside = np.zeros(len(test), dtype=bool) if test.groups is None else shared[test.groups]
    kept = [i for i, d in enumerate(test.digests()) if d not in known and not inside[i]]
    if not kept:
        raise DataError(
            f"{test.spec}: every test image is also in {images.spec}"
            f"{', or in one of its groups' if names else ''}, so the test proves nothing. "
            "Give other images."
        )
    if test.groups is not None and len(set(test.groups[kept])) < 2:
        raise DataError(
            f"{test.spec}: one group of test images that is not in {images.spec}, expected at "
            "least 2. Give more images."
        )
    return np.asarray(kept, dtype=np.int64), len(test) - len(kept)


def _parts(history: Iterable[dict[str, Any]]) -> Iterator[Any]:
    """The records of images for fitting or choosing; a hostile file can hold any type here."""
    for entry in history:
        data = entry.get("data")
        if isinstance(data, dict):
            yield from (data[name] for name in ("fit", "select") if name in data)


def _listed(part: Any) -> Iterator[bytes]:
    """The digests of one record; in the first files the record is a text of hexadecimal digits."""
    text = part.get("digests") if isinstance(part, dict) else part
    if not isinstance(text, str):
        return
    try:
        whole = base64.b64decode(text) if isinstance(part, dict) else bytes.fromhex(text)
    except (ValueError, binascii.Error):
        return  # another form is no reason to refuse the file
    for start in range(0, len(whole), DIGEST_SIZE):
        yield whole[start : start + DIGEST_SIZE]


def _numbers(strings: Sequence[bytes]) -> np.ndarray:
    return np.asarray([int.from_bytes(string, "big") for string in strings], dtype=np.uint64)


def _draw(seed: int, content: bytes) -> bytes:
    return blake2b(b"%d:" % seed + content, digest_size=8).digest()


def _share(n: int, fractions: Sequence[float], owed: Sequence[float]) -> list[int]:
    """The integer sizes of the parts of one class; the remainder goes to parts that lack most."""
    quotas = [n * f / sum(fractions) for f in fractions]
    sizes = [floor(q + 1e-9) for q in quotas]
    # A quota is rounded only to the next integer, so a part takes at most one of the remainder.
    takers = [k for k in range(3) if quotas[k] - sizes[k] > 1e-9]
    takers.sort(key=lambda k: owed[k] + quotas[k] - sizes[k])
    for k in takers[len(takers) - (n - sum(sizes)) :]:
        sizes[k] += 1
    for k in range(3):
        donors = [j for j in range(3) if sizes[j] >= 2 and sizes[j] - quotas[j] > -1e-9]
        if sizes[k] == 0 and quotas[k] > 0 and n >= 3 and donors:
            sizes[max(donors, key=lambda j: sizes[j] - quotas[j])] -= 1
            sizes[k] = 1
    return sizes
