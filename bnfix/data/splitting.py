"""Images cut into fit, select and test, seeded and stratified, copies kept together."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import floor

import numpy as np

from bnfix.data.images import (
    Images,
)
from bnfix.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """Disjoint positions, each sorted; exact duplicates of earlier images are in none of them."""

    fit: np.ndarray
    select: np.ndarray
    test: np.ndarray
    duplicates: int


def fingerprint(images: Images, index: np.ndarray | None = None) -> str:
    """Hash a set of images and their labels; order, names and places do not matter."""
    rows = _bytes(images.digests(index))
    if images.labels is not None:
        labels = images.labels if index is None else images.labels[index]
        label_bytes = labels.astype("<i8").reshape(-1, 1).view(np.uint8)
        rows = np.concatenate([rows, label_bytes], axis=1)
    rows = rows[np.lexsort(rows.T[::-1])] if rows.size else rows
    return hashlib.sha256(rows.tobytes()).hexdigest()


def cut(images: Images, fractions: tuple[float, float, float], seed: int) -> Split:
    """Cut the data in three by a seed, each class by itself, exact duplicates apart.

    Every part gets its fraction of every class to within 1; a class of 3 or more is in every part
    that has a fraction, wherever that bound allows it; over all classes the parts are balanced.
    Who goes where depends on the seed and on the images' own bytes, not on the machine.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions: {fractions}, expected 0 or more, together 1.")
    digests = images.digests()
    _, first = np.unique(_numbers(digests), return_index=True)
    n = len(first)
    labels = np.zeros(len(images), dtype=np.int64) if images.labels is None else images.labels
    draws = _numbers([_draw(seed, digests[i]) for i in first])
    order = first[np.lexsort((first, draws, labels[first]))]
    classes, starts = np.unique(labels[order], return_index=True)
    bounds = zip(classes.tolist(), starts, [*starts[1:], n], strict=False)
    members_of = {label: order[start:end] for label, start, end in bounds}
    parts: list[list[int]] = [[], [], []]
    owed = [0.0, 0.0, 0.0]
    for label in sorted(members_of, key=lambda k: _draw(seed, b"class %d" % k)):
        members = members_of[label].tolist()
        sizes = _share(len(members), fractions, owed)
        ends = np.cumsum(sizes)
        for k in range(3):
            owed[k] += len(members) * fractions[k] / sum(fractions) - sizes[k]
            parts[k] += members[ends[k] - sizes[k] : ends[k]]
    fit, select, test = (np.asarray(sorted(part), dtype=np.int64) for part in parts)
    return Split(fit, select, test, duplicates=len(images) - n)


# Byte strings of one length as rows of bytes.
def _bytes(strings: Sequence[bytes]) -> np.ndarray:
    size = len(strings[0]) if strings else 0
    return np.frombuffer(b"".join(strings), dtype=np.uint8).reshape(len(strings), size)


# Byte strings of one length, at most 8, as numbers of the same order.
def _numbers(strings: Sequence[bytes]) -> np.ndarray:
    rows = _bytes(strings)
    whole = np.zeros((len(rows), 8), dtype=np.uint8)
    whole[:, 8 - rows.shape[1] :] = rows
    return whole.view(">u8")[:, 0].astype(np.uint64)


def _draw(seed: int, what: bytes) -> bytes:
    return hashlib.blake2b(b"%d:" % seed + what, digest_size=8).digest()


# Whole sizes of the parts of one class; what is left over goes where most is owed.
def _share(n: int, fractions: Sequence[float], owed: Sequence[float]) -> list[int]:
    quotas = [n * f / sum(fractions) for f in fractions]
    sizes = [floor(q + 1e-9) for q in quotas]
    # Each quota is rounded down or up, never further; so a part can take one of the rest at most.
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
