"""How pictures are drawn: SVG for the report's page, legible in light, in dark and in print.

Matplotlib draws in stand-in colours; afterwards they become CSS variables of the page, so that one
picture follows the reader's theme. Nothing else of its output but shapes and text is kept.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.reporting import pages

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


@dataclass(frozen=True)
class Picture:
    """A picture of the report.

    Args:
        key: short name, unique on the page.
        title: heading.
        caption: what to see in it, one or two sentences.
        svg: an ``<svg>`` element for use inside HTML.
    """

    key: str
    title: str
    caption: str
    svg: str


def colors_of(n: int) -> list[str]:
    """Colours of models side by side: the last stands out.

    Args:
        n: how many.

    Returns:
        One stand-in colour each.
    """
    return [LAST] if n == 1 else [FIRST] * (n - 1) + [LAST]


def depth_axis(axis: Any, n: int) -> None:
    """Make the x axis one of layers.

    Args:
        axis: of Matplotlib.
        n: how many layers.
    """
    axis.set_xlim(0.3, n + 0.7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("norm layer, from input to output")


def legend(figure: Any, lines: Any, labels: Sequence[str]) -> None:
    """Put a legend above the axes.

    Args:
        figure: of Matplotlib.
        lines: what is explained.
        labels: one a line; of unknown origin.
    """
    # Texts are set afterwards, since Matplotlib hides what begins with `_`.
    legend = figure.legend(
        list(lines), ["label"] * len(labels), loc="outside upper left", ncols=min(3, len(labels))
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def picture(
    key: str, title: str, caption: str, draw: Callable[[Any], None], height: float = 2.7
) -> Picture:
    """Draw with Matplotlib's own defaults, whatever the user's settings are.

    Args:
        key: short name, unique on the page.
        title: heading.
        caption: what to see in it.
        draw: called with the figure.
        height: in inches.

    Returns:
        The picture.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(_WIDTH, height))
        draw(figure)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    label = f"{title}. {caption}"
    return Picture(key, title, caption, pages.svg_for_page(text.getvalue(), key, label, _VARIABLES))
