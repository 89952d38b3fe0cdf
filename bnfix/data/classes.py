"""Class names and numbers to the model's outputs: by a map, by ImageNet id, by value, by name."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.core.errors import DataError, some
from bnfix.data.images import Images, open_regular

MAX_CLASSES = 1_000_000
MAX_CLASS_MAP_BYTES = 10_000_000
_IMAGENET_ID = re.compile(r"n[0-9]{8}")


def given_classes(images: Images, labels: Sequence[Any]) -> list[str] | np.ndarray | None:
    """Labels as numbers, or all as names; None where no image has any."""
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
    """Give each class name its index: by the map, by ImageNet id, by value, or by sorted order."""
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
    # With a class for each output, sorted ids are the outputs and need no list.
    elif all(_IMAGENET_ID.fullmatch(name) for name in names) and n != n_classes:
        indices, how = _imagenet_indices(names, where, ask), "classes by ImageNet id"
    # In sorted order 10 would come before 2.
    elif all(name.isascii() and name.isdecimal() and len(name) < 10 for name in names):
        indices, how = {name: int(name) for name in names}, "classes are numbers, taken by value"
        if len(set(indices.values())) < n:
            raise DataError(f"{where}: two classes of the same number among {some(names)}. {ask}")
    elif n_classes is not None and n != n_classes:
        raise DataError(
            f"{where}: {n} classes for a model with {n_classes} outputs, so their sorted names "
            f"cannot say which output is which. {ask}"
        )
    else:
        indices = {name: k for k, name in enumerate(names)}
        how = f"{n} classes numbered by sorted name"
    limit = MAX_CLASSES if n_classes is None else n_classes
    outside = [f"{name} = {k}" for name, k in indices.items() if k >= limit]
    if outside:
        raise DataError(
            f"{where}: {len(outside)} of {n} classes lie outside the outputs 0 to {limit - 1}: "
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
                f"{where}: {len(names)} folders or labels named by ImageNet ids, not all 1000, "
                f"and the full list comes with timm, which is not installed. {ask}"
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
    """Check that integer labels can be outputs of the model."""
    limit = MAX_CLASSES if n_classes is None else n_classes
    outside = int(((labels < 0) | (labels >= limit)).sum())
    if outside:
        of_model = "" if n_classes is None else f", the model's {n_classes} outputs"
        raise DataError(
            f"{where}: labels from {labels.min()} to {labels.max()}, {outside} of {len(labels)} "
            f"outside 0 to {limit - 1}{of_model}. Correct them, or give --class-map FILE.json."
        )
    return labels.astype(np.int64)


def read_class_map(path: Path) -> dict[str, int]:
    """Read a class map: a JSON object, class name to index."""
    where = f"class map {path}"

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice = [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]
            raise DataError(f"{where}: names listed twice: {some(twice)}. Keep one.", path=path)
        return found

    try:
        with open_regular(Path(path)) as file:
            text = file.read(MAX_CLASS_MAP_BYTES + 1)
        if len(text) > MAX_CLASS_MAP_BYTES:
            raise DataError(f"{where}: larger than {MAX_CLASS_MAP_BYTES // 10**6} MB.", path=path)
        content = json.loads(text, object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{where}: cannot be read as JSON ({error}).", path=path) from error
    if not isinstance(content, dict) or not content:
        raise DataError(f"{where}: expected an object of class name to index.", path=path)
    wrong = [
        f"{name}: {k!r}"[:60]
        for name, k in content.items()
        if not isinstance(k, int) or isinstance(k, bool) or not 0 <= k < MAX_CLASSES
    ]
    if wrong:
        raise DataError(
            f"{where}: {len(wrong)} values are not whole numbers from 0: {some(wrong)}.", path=path
        )
    return content
