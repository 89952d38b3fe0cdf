"""Images recognized: what a file was fitted on, and copies between two sets of data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from bnfix.data.images import Images
from bnfix.data.splitting import fingerprint
from bnfix.errors import DataError, some


def history_digests(images: Images, index: np.ndarray) -> str:
    """Digests of images, to be recognized later.

    Args:
        images: the data.
        index: positions.

    Returns:
        12 hexadecimal digits an image, sorted, joined.
    """
    return "".join(sorted(_digest(images, int(i)) for i in index))


def seen_before(images: Images, index: np.ndarray, history: Iterable[dict[str, Any]]) -> int:
    """How many images a checkpoint's history has used for fitting or choosing.

    Args:
        images: the data.
        index: positions.
        history: entries of a header; parts of the wrong type are passed over.

    Returns:
        The count.
    """
    used: set[str] = set()
    for entry in history:
        data = entry.get("data")
        for part in ("fit", "select"):
            text = data.get(part) if isinstance(data, dict) else None
            if isinstance(text, str):
                used.update(text[i : i + 12] for i in range(0, len(text), 12))
    return sum(_digest(images, int(i)) in used for i in index) if used else 0


def data_record(images: Images, index: np.ndarray | None = None) -> dict[str, Any]:
    """Spec, size and fingerprint, as the history stores them.

    Args:
        images: the data.
        index: positions; by default all.

    Returns:
        JSON values.
    """
    n = len(images) if index is None else len(index)
    return {"spec": images.spec, "n_examples": n, "fingerprint": fingerprint(images, index)}


def unseen(test: Images, images: Images) -> tuple[np.ndarray, int]:
    """Positions of test images that are not in the data, and how many are."""
    known = {_digest(images, i) for i in range(len(images))}
    kept = [i for i in range(len(test)) if _digest(test, i) not in known]
    if not kept:
        raise DataError(
            f"{test.spec}: every test image is in {some([images.spec])} too, so nothing can be "
            "claimed on it. Give other images."
        )
    return np.asarray(kept, dtype=np.int64), len(test) - len(kept)


def _digest(images: Images, i: int) -> str:
    return images.digest(i).hex()
