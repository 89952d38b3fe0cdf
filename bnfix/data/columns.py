"""Which column of a table holds the images, which the labels, and what the classes are called."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from bnfix.errors import some

_IMAGE_COLUMNS: Final = ("image", "img", "png", "jpg", "jpeg", "webp", "picture")
_LABEL_COLUMNS: Final = ("label", "fine_label", "labels", "cls", "target", "class", "class_id")


class Columns(NamedTuple):
    """Which column holds what; ``field`` is that of the bytes inside a structure."""

    image: str
    field: str | None
    label: str | None
    names: tuple[str, ...] | None


def find_columns(schema: Any) -> Columns:
    """Find a table's columns: by Hugging Face's own description, else by type and name."""
    features = _features(schema.metadata)
    types = {field.name: field.type for field in schema}
    said = [n for n in types if features.get(n, {}).get("_type") == "Image"]
    images = [n for n in types if _holds_bytes(types[n])]
    image = next((n for n in (*said, *_IMAGE_COLUMNS) if n in images), None)
    if image is None and len(images) == 1:
        image = images[0]
    if image is None:
        raise ValueError(
            f"no image column among {some(list(types))}: expected bytes, or a structure of bytes "
            f"and path, named {', '.join(_IMAGE_COLUMNS[:2])}"
        )
    classed = [n for n in types if features.get(n, {}).get("_type") == "ClassLabel"]
    label = next((n for n in _LABEL_COLUMNS if n in types and _is_label(types[n])), None)
    if label is None and len(classed) == 1:
        label = classed[0]
    if label is None and classed:
        raise ValueError(f"several label columns: {some(classed)}; name the one meant label")
    names = None if label is None else features.get(label, {}).get("names")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        names = None
    inner = "bytes" if str(types[image]).startswith("struct") else None
    return Columns(image, inner, label, None if not names else tuple(names))


def _features(metadata: Mapping[bytes, bytes] | None) -> dict[str, dict[str, Any]]:
    try:
        held = json.loads((metadata or {}).get(b"huggingface", b"{}"))
        features = held["info"]["features"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return {}
    if not isinstance(features, dict):
        return {}
    return {name: value for name, value in features.items() if isinstance(value, dict)}


def _holds_bytes(kind: Any) -> bool:
    if str(kind).startswith("struct"):
        fields = [kind.field(j) for j in range(kind.num_fields)]
        return any(f.name == "bytes" and str(f.type) in ("binary", "large_binary") for f in fields)
    return str(kind) in ("binary", "large_binary")


def _is_label(kind: Any) -> bool:
    text = str(kind)
    return text.startswith(("int", "uint", "string", "large_string", "dictionary<values=string"))
