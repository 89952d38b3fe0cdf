"""Pictures that compare models: reliability, classes, corruptions, speed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnfix.measuring.intervals import Array
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.robustness import Shifted
from bnfix.reporting import pages
from bnfix.reporting.drawing import FIRST, INK, LAST, LOSS, MUTED, Picture, colors_of, picture

_MOST_CLASSES = 40
_SHOWN_CLASSES = 20
#: The darkest cell of a heat map: text must stay legible on it, in light and in dark.
SHADE = 0.45


def reliability(models: Sequence[tuple[str, Metrics]]) -> Picture:
    """Draw reliability diagrams side by side, with the share of examples a bin below.

    Args:
        models: one or two, by name, with labels.

    Returns:
        The picture.
    """

    def draw(figure: Any) -> None:
        axes = figure.subplots(
            2, len(models), sharex=True, sharey="row", squeeze=False, height_ratios=[4, 1]
        )
        for column, (name, metrics) in enumerate(models):
            upper, lower = axes[0, column], axes[1, column]
            bins = [b for b in metrics.reliability if b.n_examples]
            left, width = [b.low for b in bins], [b.high - b.low for b in bins]
            color = colors_of(len(models))[column]
            accuracy = [b.accuracy for b in bins]
            upper.bar(left, accuracy, width, align="edge", color=color, alpha=0.75)
            upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
            share = [b.n_examples / metrics.n_examples for b in bins]
            lower.bar(left, share, width, align="edge", color=MUTED)
            upper.set_title(pages.clean(name, 24 if len(models) > 1 else 48), parse_math=False)
            upper.set_ylim(0, 1)
            lower.set_xlim(0, 1)
            lower.set_xlabel("confidence")
        axes[0, 0].set_ylabel("fraction right")
        axes[1, 0].set_ylabel("share")

    gaps = " and ".join(f"{100 * (m.ece or 0):.1f}%" for _, m in models)
    return picture(
        "reliability",
        "Confidence calibration: reliability",
        "Of the images given a confidence, the fraction that is right. Bars below the dashed line "
        f"are overconfident, above it underconfident. Expected calibration error: {gaps}.",
        draw,
        3.0,
    )


def per_class(
    names: Sequence[str], n_examples: Array, first: Array, last: Array, change_se: Array
) -> Picture:
    """Draw each class's top-1 in two models; only the largest changes where classes are many.

    Args:
        names: of the classes.
        n_examples: of each class.
        first: fraction right of each class.
        last: likewise.
        change_se: standard error of each change.

    Returns:
        The picture.
    """
    change = last - first
    order = np.arange(len(names))
    if len(names) > _MOST_CLASSES:
        order = np.argsort(-np.abs(change), kind="stable")[:_SHOWN_CLASSES]
    order = order[np.argsort(-change[order], kind="stable")]
    clear = np.abs(change) > 2 * change_se

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for row, c in enumerate(order):
            gained = change[c] >= 0
            color = LAST if gained else LOSS
            axis.plot([first[c], last[c]], [row, row], color=color, linewidth=2, alpha=0.6)
            axis.plot([first[c]], [row], "o", color=FIRST, markersize=4)
            face = color if clear[c] else "none"
            mark = ">" if gained else "<"
            axis.plot([last[c]], [row], mark, mec=color, mfc=face, markersize=6)
        axis.set_yticks(
            range(len(order)), [pages.clean(names[int(c)], 22) for c in order], parse_math=False
        )
        axis.set_ylim(len(order) - 0.5, -0.5)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axis.set_xlabel("top-1 of the class")

    some = "" if len(order) == len(names) else f"The {len(order)} largest of {len(names)}. "
    n_up, n_down = int((change > 0).sum()), int((change < 0).sum())
    return picture(
        "classes",
        "Per-class change",
        f"{some}Dots are the first model, arrows the last; filled arrows are changes beyond two "
        f"standard errors (about 1 class in 20 is by chance). {n_up} classes gain, {n_down} lose; "
        f"about {int(np.median(n_examples)):,} images a class.",
        draw,
        0.9 + 0.23 * len(order),
    )


def speed(models: Sequence[tuple[str, float]]) -> Picture:
    """Draw images a second.

    Args:
        models: name and rate.

    Returns:
        The picture.
    """

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        rates = [rate for _, rate in models]
        axis.barh(range(len(models)), rates, height=0.6, color=colors_of(len(models)))
        for row, rate in enumerate(rates):
            axis.annotate(
                f"{rate:,.0f}", (rate, row), (4, 0), textcoords="offset points", va="center"
            )
        labels = [pages.clean(name, 22) for name, _ in models]
        axis.set_yticks(range(len(models)), labels, parse_math=False)
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.set_xlim(0, 1.18 * max(rates))
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("images a second")

    return picture(
        "speed",
        "Speed",
        "Images a second through the model, without reading the data; of several batches the "
        "first, which warms up, is left out.",
        draw,
        0.8 + 0.36 * len(models),
    )


def corruptions(rows: Sequence[Shifted]) -> Picture:
    """Draw top-1 under every corruption: of the first model, and how far the last is from it.

    Args:
        rows: of one model or several.

    Returns:
        The picture.
    """
    names = list(dict.fromkeys(row.model for row in rows))
    kinds = list(dict.fromkeys(row.kind for row in rows))
    severities = sorted({row.severity for row in rows})
    first = [row for row in rows if row.model == names[0]]
    last = [row for row in rows if row.model == names[-1]] if len(names) > 1 else []

    def place(row: Shifted) -> tuple[int, int]:
        return severities.index(row.severity), kinds.index(row.kind)

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2 if last else 1, squeeze=False, sharey=True)[0]
        for row in first:
            _cell(axes[0], place(row), MUTED, SHADE * (1 - row.top1), f"{100 * row.top1:.0f}%")
        changes = [row.paired.top1 for row in last if row.paired is not None]
        largest = max([abs(d.difference) for d in changes], default=0) or 1.0
        for row in last:
            d = row.paired.top1 if row.paired else None
            if d is not None:
                sure = d.interval[0] > 0 or d.interval[1] < 0
                text = f"{100 * d.difference:+.1f}{'*' if sure else ''}"
                color = LAST if d.difference > 0 else LOSS
                _cell(axes[1], place(row), color, SHADE * abs(d.difference) / largest, text)
        titles = [names[0], names[-1]][: len(axes)]
        for axis, name, what in zip(axes, titles, ("top-1", "points more"), strict=False):
            axis.set_title(f"{pages.clean(name, 22)}\n{what}", parse_math=False)
            axis.set_xlim(-0.5, len(severities) - 0.5)
            axis.set_ylim(len(kinds) - 0.5, -0.5)
            axis.set_xticks(range(len(severities)), [str(s) for s in severities])
            axis.set_xlabel("severity")
            axis.set_yticks(range(len(kinds)), kinds)
            axis.grid(visible=False)
            axis.tick_params(length=0)

    mean = np.mean([row.top1 for row in first])
    told = f"Darker is worse; {100 * mean:.1f}% over all of them. "
    if last:
        n_up = sum(row.paired.top1.interval[0] > 0 for row in last if row.paired)
        n_down = sum(row.paired.top1.interval[1] < 0 for row in last if row.paired)
        told = (
            f"Left: the first model, darker is worse; {100 * mean:.1f}% over all of them. Right: "
            "how many points more the last model has on the same images, with a star where the "
            f"95% interval leaves out 0: {n_up} of {len(last)} are gains, {n_down} are losses. "
        )
    return picture(
        "corruptions",
        "Under corruptions",
        "Top-1 on the same images under common corruptions, severity 1 (mild) to 3 (strong). "
        + told.strip(),
        draw,
        1.2 + 0.3 * len(kinds),
    )


def _cell(axis: Any, place: tuple[int, int], color: str, alpha: float, text: str) -> None:
    x, y = place
    axis.fill(
        [x - 0.47, x + 0.47, x + 0.47, x - 0.47], [y - 0.45, y - 0.45, y + 0.45, y + 0.45],
        color=color, alpha=alpha, linewidth=0,
    )  # fmt: skip
    axis.text(x, y, text, ha="center", va="center", color=INK, fontsize=9)
