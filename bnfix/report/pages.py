"""Names and numbers for a page: escaping, rounding, templates.

Every text that a template prints passes through this file. So a name from a file cannot break out
of its place, in HTML or in Markdown.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from bnfix.core.errors import count
from bnfix.metrics.compare import Difference

_NONE = "-"


class _Code(str):
    """Text for an indented Markdown code block: one line, no escapes needed."""


def render(template: str, **values: Any) -> str:
    """Fill a template; every printed text is cleaned and escaped for the template's language."""
    return _environment(".html" in template).get_template(template).render(**values)


@functools.cache
def _environment(html: bool) -> Environment:
    def finalize(value: Any) -> Any:
        if isinstance(value, (Markup, _Code)):
            return value
        return clean(value) if html else _markdown(value)

    environment = Environment(
        loader=PackageLoader("bnfix.report", "templates"),
        autoescape=html,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(_FILTERS)
    return environment


def clean(text: object, limit: int = 500) -> str:
    """Put a text of unknown origin on one line, without control characters."""
    # Line breaks and tabs become one space each; spaces stay, since a path can hold two in a row.
    line = re.sub(r"\s*[^\S ]\s*", " ", str(text)).strip()
    line = "".join(sign if sign.isprintable() else "?" for sign in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def percent(value: float | None, digits: int = 1) -> str:
    """Write a fraction in percent."""
    return _NONE if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%"


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with fixed digits."""
    return _NONE if value is None or not math.isfinite(value) else f"{value:.{digits}f}"


def ends(d: Difference, points: bool) -> tuple[str, str, str]:
    """Write a difference and its interval, with enough digits to keep the ends off 0."""
    if not math.isfinite(d.difference):
        return _NONE, _NONE, _NONE
    scale, digits = (100, 1) if points else (1, 3)
    nonzero = [abs(scale * end) for end in d.interval if end]
    while nonzero and digits < 6 and min(nonzero) < 0.5 * 10**-digits:
        digits += 1
    value, low, high = (f"{scale * x:.{digits}f}" for x in (d.difference, *d.interval))
    zero = f"{0:.{digits}f}"
    return (zero, low, high) if value == f"-{zero}" else (value, low, high)


def difference(d: Difference, *, points: bool = False) -> str:
    """Write a difference in words."""
    value, low, high = ends(d, points)
    return f"{value}{' points' if points else ''}, 95% interval {low} to {high}"


def direction(d: Difference) -> str:
    """Say which way a paired difference goes, if it is significant."""
    low, high = d.interval
    return "is higher" if low > 0 else "is lower" if high < 0 else "does not differ measurably"


def fields_of(record: Any, *left_out: str) -> dict[str, Any]:
    """A record's fields by name, without some of them."""
    names = (field.name for field in dataclasses.fields(record))
    return {name: getattr(record, name) for name in names if name not in left_out}


def plain_json(value: Any) -> Any:
    """Turn a value into one that strict JSON can hold."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    # Nine digits identify a float32; more would differ between machines.
    if isinstance(value, (float, np.floating)):
        return float(f"{float(value):.9g}") if math.isfinite(value) else None
    if isinstance(value, np.generic):
        return plain_json(value.item())
    if dataclasses.is_dataclass(value):
        value = fields_of(value)
    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain_json(item) for item in value]
    return str(value)


def flat(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Name nested options by dotted names, without unset ones."""
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)):
            if value:
                yield f"{prefix}{name}", ",".join(str(item) for item in value)
        elif value is not None:
            yield f"{prefix}{name}", str(value)


def _markdown(text: object) -> str:
    line = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$!])", r"\\\1", line)


def _brief(value: float | None) -> str:
    return _NONE if value is None or not math.isfinite(value) else f"{value:.3g}"


def _p(value: float) -> str:
    return "below 0.001" if value < 0.001 else number(value)


def _weight(value: float | list[float]) -> tuple[str, str]:
    """A layer's example weight: the number, or the median and the range over channels."""
    if not isinstance(value, list):
        return _brief(value), ""
    low, middle, high = np.quantile(value, [0, 0.5, 1]) if value else (0.0, 0.0, 0.0)
    return _brief(middle), f"{low:.3g} to {high:.3g}" if high > low else ""


def _shown(value: float | None, fraction: bool) -> str:
    return percent(value) if fraction else number(value)


_FILTERS: Mapping[str, Callable[..., Any]] = {
    "count": count,
    "percent": percent,
    "number": number,
    "shown": _shown,
    "ends": ends,
    "brief": _brief,
    "tiny": lambda value: f"{value:.1e}",
    "p": _p,
    "weight": _weight,
    "code": lambda text: _Code(clean(text, 4000)),
    "drawing": lambda picture: Markup(picture.svg),
}
