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
    """Hash a set of images and their labels; order, names and places do not matter.

    Args:
        images: the opened data.
        index: positions, default all.

    Returns:
        SHA-256 as 64 hexadecimal digits.
    """
    rows = []
    for i in range(len(images)) if index is None else index:
        label = b"" if images.labels is None else int(images.labels[i]).to_bytes(8, "little")
        rows.append(images.digest(i) + label)
    return hashlib.sha256(b"".join(sorted(rows))).hexdigest()


def cut(images: Images, fractions: tuple[float, float, float], seed: int) -> Split:
    """Cut the data in three by a seed, each class by itself, exact duplicates apart.

    Every part gets its fraction of every class to within 1; a class of 3 or more is in every part
    that has a fraction, wherever that bound allows it; over all classes the parts are balanced.
    Who goes where depends on the seed and on the images' own bytes, not on the machine.

    Args:
        images: the opened data.
        fractions: of fit, select and test; from 0, together 1.
        seed: any whole number.

    Returns:
        The positions of each part, and how many later duplicates were left out.

    Raises:
        ConfigError: if the fractions are negative or do not add up to 1.
    """
    if min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise ConfigError(f"fractions: {fractions}, expected 0 or more, together 1.")
    seen: set[bytes] = set()
    classes: dict[int, list[tuple[bytes, int]]] = {}
    for i in range(len(images)):
        digest = images.digest(i)
        if digest in seen:
            continue
        seen.add(digest)
        label = 0 if images.labels is None else int(images.labels[i])
        classes.setdefault(label, []).append((_draw(seed, digest), i))
    parts: list[list[int]] = [[], [], []]
    owed = [0.0, 0.0, 0.0]
    for label in sorted(classes, key=lambda k: _draw(seed, b"class %d" % k)):
        members = [i for _, i in sorted(classes[label])]
        sizes = _share(len(members), fractions, owed)
        ends = np.cumsum(sizes)
        for k in range(3):
            owed[k] += len(members) * fractions[k] / sum(fractions) - sizes[k]
            parts[k] += members[ends[k] - sizes[k] : ends[k]]
    fit, select, test = (np.asarray(sorted(part), dtype=np.int64) for part in parts)
    return Split(fit, select, test, duplicates=len(images) - len(seen))


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
