"""How a picture is drawn: SVG that follows the page's theme, in light, in dark and in print.

Matplotlib draws in stand-in colours. They become CSS variables of the page afterwards, and only
shapes and text of Matplotlib's output are kept.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

_WIDTH = 4.4  # inches: still readable when a phone shrinks it to 350 pixels
INK, MUTED, _GRID, FIRST, LAST, LOSS = (f"#0{i}0{i}0{i}" for i in range(1, 7))
_VARIABLES = {
    "#000000": "currentColor",
    INK: "currentColor",
    MUTED: "var(--muted)",
    _GRID: "var(--line)",
    FIRST: "var(--first)",
    LAST: "var(--last)",
    LOSS: "var(--loss)",
}
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "bnfix",
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "legend.frameon": False,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "figure.constrained_layout.use": True,
}
_SVG = "{http://www.w3.org/2000/svg}"
_LINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Picture:
    """A picture: a key that is unique on the page, heading, caption, and an ``<svg>`` element."""

    key: str
    title: str
    caption: str
    svg: str


def picture(
    key: str, title: str, caption: str, draw: Callable[[Any], None], height: float = 2.7
) -> Picture:
    """Draw with Matplotlib's own defaults, whatever the user's settings are; height in inches."""
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return Picture(key, title, caption, _for_page(text.getvalue(), key, f"{title}. {caption}"))


def _for_page(text: str, key: str, label: str) -> str:
    """Matplotlib's SVG as an element of the page: unique ids, short numbers, a title."""
    root = ElementTree.fromstring(text[text.index("<svg") :])
    for parent in list(root.iter()):
        for child in list(parent):
            if not child.tag.startswith(_SVG) or child.tag in (f"{_SVG}style", f"{_SVG}metadata"):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.removeprefix(_SVG)
        _clean_attributes(element.attrib, element.tag, key)
        if element.tag not in ("text", "tspan"):
            element.text = None
        element.tail = None
    root.attrib = {
        "viewBox": root.attrib["viewBox"],
        "role": "img",
        "aria-labelledby": f"{key}-title",
        "fill": "currentColor",
    }
    title = ElementTree.Element("title", {"id": f"{key}-title"})
    title.text = label
    root.insert(0, title)
    return ElementTree.tostring(root, encoding="unicode", short_empty_elements=True)


def _clean_attributes(given: dict[str, str], tag: str, key: str) -> None:
    if tag in ("g", "text"):
        given.pop("id", None)
    if _LINK in given:
        given["href"] = given.pop(_LINK).replace("#", f"#{key}-", 1)
    if "id" in given:
        given["id"] = f"{key}-{given['id']}"
    if "clip-path" in given:
        given["clip-path"] = given["clip-path"].replace("#", f"#{key}-", 1)
    if "style" in given:
        parts = [part.strip() for part in given["style"].split(";")]
        style = ";".join(part for part in parts if not part.startswith("font-family"))
        given["style"] = re.sub("#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), style)
    for name in ("d", "x", "y", "transform", "width", "height"):
        if name in given:
            shorter = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", given[name])
            given[name] = " ".join(shorter.split())
