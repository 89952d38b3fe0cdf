"""Images recognized: what a file was fitted on, and copies between two sets of data."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable, Iterator
from typing import Any, Final

import numpy as np

from bnfix.data.images import DIGEST_SIZE, Images
from bnfix.data.splitting import fingerprint
from bnfix.errors import DataError, some

#: Images that a history lists one by one, at most; 8 characters each.
MAX_LISTED: Final = 100_000


def history_digests(images: Images, index: np.ndarray) -> dict[str, Any]:
    """How many images there are, and up to 100,000 their sorted digests as base64."""
    digests = None
    if len(index) <= MAX_LISTED:
        digests = base64.b64encode(b"".join(sorted(images.digests(index)))).decode()
    return {"n_examples": len(index), "digests": digests}


def seen_before(images: Images, index: np.ndarray, history: Iterable[dict[str, Any]]) -> int:
    """How many images a checkpoint's history lists as used for fitting or choosing."""
    used: set[bytes] = set()
    for part in _parts(history):
        used.update(_listed(part))
    return sum(digest in used for digest in images.digests(index)) if used else 0


def describe_unlisted(history: Iterable[dict[str, Any]]) -> list[str]:
    """A sentence where a history has used images that it does not list, else nothing."""
    counts = [
        part["n_examples"]
        for part in _parts(history)
        if isinstance(part, dict) and part.get("digests") is None and _is_count(part)
    ]
    return [
        f"a checkpoint was fitted or chosen on {n:,} images that its history does not list one by "
        "one; whether the images measured here are among them is not known."
        for n in counts
    ]


def data_record(images: Images, index: np.ndarray | None = None) -> dict[str, Any]:
    """Spec, size and fingerprint of all or some images, as the history stores them."""
    n = len(images) if index is None else len(index)
    return {"spec": images.spec, "n_examples": n, "fingerprint": fingerprint(images, index)}


def unseen(test: Images, images: Images) -> tuple[np.ndarray, int]:
    """Positions of test images that are not in the data, and how many are."""
    known = set(images.digests())
    kept = [i for i, digest in enumerate(test.digests()) if digest not in known]
    if not kept:
        raise DataError(
            f"{test.spec}: every test image is in {some([images.spec])} too, so nothing can be "
            "claimed on it. Give other images."
        )
    return np.asarray(kept, dtype=np.int64), len(test) - len(kept)


# What a history holds of the images that were fitted or chosen on; of any type, if hostile.
def _parts(history: Iterable[dict[str, Any]]) -> Iterator[Any]:
    for entry in history:
        data = entry.get("data")
        if isinstance(data, dict):
            yield from (data[name] for name in ("fit", "select") if name in data)


def _is_count(part: dict[str, Any]) -> bool:
    return type(part.get("n_examples")) is int and part["n_examples"] > 0


# Digests of one part; the first files had 12 hexadecimal digits each. Other forms are passed over.
def _listed(part: Any) -> Iterator[bytes]:
    text = part.get("digests") if isinstance(part, dict) else part
    if not isinstance(text, str):
        return
    try:
        whole = base64.b64decode(text) if isinstance(part, dict) else bytes.fromhex(text)
    except (ValueError, binascii.Error):
        return
    for start in range(0, len(whole), DIGEST_SIZE):
        yield whole[start : start + DIGEST_SIZE]
