"""Records to pictures: SVG for the report's page, legible in light, in dark and in print.

Matplotlib draws in stand-in colours; afterwards they become CSS variables of the page, so that one
picture follows the reader's theme. Nothing else of its output but shapes and text is kept.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bnfix import pages
from bnfix.evaluation import Array, Metrics
from bnfix.example_weight import CurvePoint
from bnfix.finetuning import Finetuning
from bnfix.gate import Decision

_WIDTH = 4.4  # inches: still readable when a phone shrinks it to 350 pixels
_INK, _MUTED, _GRID, _FIRST, _LAST, _LOSS = (f"#0{i}0{i}0{i}" for i in range(1, 7))
_VARIABLES = {
    "#000000": "currentColor",
    _INK: "currentColor",
    _MUTED: "var(--muted)",
    _GRID: "var(--line)",
    _FIRST: "var(--first)",
    _LAST: "var(--last)",
    _LOSS: "var(--loss)",
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
    "text.color": _INK,
    "axes.edgecolor": _MUTED,
    "axes.labelcolor": _INK,
    "axes.titlecolor": _INK,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRID,
    "figure.constrained_layout.use": True,
}
_MOST_CLASSES = 40
_SHOWN_CLASSES = 20


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
            color = _colors(len(models))[column]
            accuracy = [b.accuracy for b in bins]
            upper.bar(left, accuracy, width, align="edge", color=color, alpha=0.75)
            upper.plot([0, 1], [0, 1], color=_INK, linestyle="--", linewidth=1)
            share = [b.n_examples / metrics.n_examples for b in bins]
            lower.bar(left, share, width, align="edge", color=_MUTED)
            upper.set_title(pages.clean(name, 24 if len(models) > 1 else 48), parse_math=False)
            upper.set_ylim(0, 1)
            lower.set_xlim(0, 1)
            lower.set_xlabel("confidence")
        axes[0, 0].set_ylabel("fraction right")
        axes[1, 0].set_ylabel("share")

    gaps = " and ".join(f"{100 * (m.ece or 0):.1f}%" for _, m in models)
    return _picture(
        "reliability",
        "Confidence calibration: reliability",
        "Of the images given a confidence, the fraction that is right. Bars below the dashed line "
        f"are overconfident, above it underconfident. Expected calibration error: {gaps}.",
        draw,
        3.0,
    )


def weights_over_depth(weights: Sequence[float | Sequence[float]]) -> Picture:
    """Draw the example weight of every layer: median, quartiles and range over its channels.

    Args:
        weights: a number or one a channel for each layer, from input to output.

    Returns:
        The picture.
    """
    rows = [np.nan_to_num(np.atleast_1d(np.asarray(w, dtype=np.float64))) for w in weights]
    low, q1, median, q3, high = np.array([np.quantile(r, [0, 0.25, 0.5, 0.75, 1]) for r in rows]).T
    spread = bool((high > low).any())

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = np.arange(1, len(rows) + 1)
        thick = float(np.clip(120 / len(rows), 1.2, 8))
        if spread:
            axis.vlines(x, low, high, colors=_LAST, alpha=0.35, linewidth=thick / 3)
            axis.vlines(x, q1, q3, colors=_LAST, alpha=0.6, linewidth=thick)
        axis.plot(x, median, "o", color=_LAST, markersize=min(thick, 5))
        axis.set_ylim(-0.02 * max(high.max(), 1e-3), 1.06 * max(high.max(), 1e-3))
        _depth_axis(axis, len(rows))
        axis.set_ylabel("example weight")

    bands = "thick bars its quartiles and thin ones its range over the channels. " if spread else ""
    live = int((high > 0).sum())
    return _picture(
        "weights",
        "Example weight over depth",
        f"How much one image counts in its own statistics, layer by layer. Dots are the layer's "
        f"median{', ' + bands if bands else '. '}{live} of {len(rows)} layers use the image at "
        f"all; the largest weight is {high.max():.3g}.",
        draw,
    )


def drift(
    mean_shift: Sequence[float | None],
    log_var_ratio: Sequence[float | None],
    residual: Sequence[float | None],
) -> Picture:
    """Draw how far each layer's statistics moved, and what is left to a verifying pass.

    Args:
        mean_shift: per layer, in standard deviations; ``None`` where it was not measured.
        log_var_ratio: per layer.
        residual: per layer.

    Returns:
        The picture.
    """
    series = [
        ("mean shift", mean_shift, _FIRST, "o"),
        ("|log variance ratio|", log_var_ratio, _LAST, "s"),
        ("residual", residual, _LOSS, "^"),
    ]
    columns = [(label, _finite(values), c, m) for label, values, c, m in series]
    moved = [column for column in columns if np.nan_to_num(column[1]).any()]
    columns = moved or [column for column in columns if np.isfinite(column[1]).any()]
    seen = np.concatenate([values[np.isfinite(values)] for _, values, _, _ in columns])

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = np.arange(1, len(mean_shift) + 1)
        size = float(np.clip(100 / len(x), 1.5, 4))
        for _, values, color, marker in columns:
            axis.plot(x, values, marker=marker, color=color, markersize=size, linewidth=1.2)
        if seen.min() > 0 and seen.max() > 50 * seen.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set_ylim(0, max(1.06 * seen.max(), 1e-6))
        _depth_axis(axis, len(x))
        axis.set_ylabel("drift")
        _legend(figure, axis.lines, [label for label, *_ in columns])

    label, values = columns[0][:2]
    worst = int(np.nanargmax(values))
    shown = [column[0] for column in columns]
    told = {
        "mean shift": "Means are in standard deviations.",
        "|log variance ratio|": "Variances are compared as |log ratio| (0.1 is about 10%).",
        "residual": "The residual is what one verifying pass in inference still finds.",
    }
    return _picture(
        "drift",
        "Population statistics: drift by layer",
        "Stored statistics against those before, mean over a layer's channels. "
        + " ".join(told[name] for name in shown)
        + f" The largest {label} is {values[worst]:.3g}, at layer {worst + 1}.",
        draw,
    )


def weight_curve(points: Sequence[CurvePoint]) -> Picture:
    """Draw NLL over one example weight for the whole model.

    Args:
        points: at least two.

    Returns:
        The picture.
    """
    best = min(points, key=lambda point: point.nll)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = [point.example_weight for point in points]
        axis.plot(x, [point.nll for point in points], "o-", color=_LAST, markersize=4)
        axis.plot([best.example_weight], [best.nll], "o", markersize=10, mfc="none", mec=_INK)
        axis.set_xscale("function", functions=(_root, np.square))
        wanted = [t for t in (0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1) if t <= max(x) * 1.1]
        axis.set_xticks(wanted, [f"{t:g}" for t in wanted])
        axis.set_xlabel("example weight of every layer (root scale)")
        axis.set_ylabel("NLL, fit images")

    stock = next((p.nll for p in points if p.example_weight == 0), None)
    against = "" if stock is None else f", {stock:.3f} at 0"
    return _picture(
        "curve",
        "NLL over the example weight",
        "One weight for the whole model, on the images used for fitting; lower is better. "
        f"Least at {best.example_weight:.3g} (circled): {best.nll:.3f}{against}.",
        draw,
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
            color = _LAST if gained else _LOSS
            axis.plot([first[c], last[c]], [row, row], color=color, linewidth=2, alpha=0.6)
            axis.plot([first[c]], [row], "o", color=_FIRST, markersize=4)
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
    return _picture(
        "classes",
        "Per-class change",
        f"{some}Dots are the first model, arrows the last; filled arrows are changes beyond two "
        f"standard errors (about 1 class in 20 is by chance). {n_up} classes gain, {n_down} lose; "
        f"about {int(np.median(n_examples)):,} images a class.",
        draw,
        0.9 + 0.23 * len(order),
    )


def training(runs: Sequence[Finetuning]) -> Picture:
    """Draw the monitor's NLL over the epochs of fine-tuning runs, the kept epoch circled.

    Args:
        runs: at least one.

    Returns:
        The picture.
    """
    colors = [_LAST, _FIRST, _LOSS, _MUTED]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for i, run in enumerate(runs):
            color, marker = colors[i % 4], "osv^D"[i % 5]
            epochs = [point.epoch for point in run.curve]
            nll = [point.nll for point in run.curve]
            axis.plot(epochs, nll, marker=marker, color=color, markersize=4)
        for run in runs:
            kept = [point for point in run.curve if point.epoch == run.best_epoch]
            axis.plot(
                [p.epoch for p in kept], [p.nll for p in kept], "o", ms=10, mfc="none", mec=_INK
            )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epoch (0: before any step)")
        axis.set_ylabel("NLL, monitor images")
        _legend(figure, axis.lines[: len(runs)], [pages.clean(run.trained, 40) for run in runs])

    return _picture(
        "training",
        "Fine-tuning",
        "Loss on images that are watched but not trained on, after each epoch; lower is better. "
        "The circled epoch was kept.",
        draw,
    )


def gate(decisions: Sequence[Decision]) -> Picture:
    """Draw each candidate's paired NLL difference with the interval that the gate demands.

    Args:
        decisions: at least one.

    Returns:
        The picture.
    """

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.axvline(0, color=_INK, linewidth=1, linestyle="--")
        for row, d in enumerate(decisions):
            color = _LAST if d.admitted else _MUTED
            reach = d.z * d.nll_se
            ends = [d.nll_difference - reach, d.nll_difference + reach]
            axis.plot(ends, [row, row], color=color, linewidth=2)
            face = color if d.admitted else "none"
            axis.plot([d.nll_difference], [row], "o", mec=color, mfc=face, markersize=7)
        labels = [pages.clean(d.candidate, 26) for d in decisions]
        axis.set_yticks(range(len(decisions)), labels, parse_math=False)
        axis.set_ylim(len(decisions) - 0.5, -0.5)
        axis.set_xlabel("NLL difference; left is better")

    return _picture(
        "gate",
        "Candidates before the gate",
        "Paired difference in NLL on the select split, with the standard errors that the gate "
        "demands. A candidate is admitted (filled) if its bar lies left of 0 and its top-1 does "
        "not fall.",
        draw,
        1.0 + 0.36 * len(decisions),
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
        axis.barh(range(len(models)), rates, height=0.6, color=_colors(len(models)))
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

    return _picture(
        "speed",
        "Speed",
        "Images a second over the whole pass, reading the data included; a model evaluated first "
        "also pays for warming up.",
        draw,
        0.8 + 0.36 * len(models),
    )


def _finite(values: Sequence[float | None]) -> Array:
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _root(values: Array) -> Array:
    return np.sqrt(np.maximum(values, 0))


def _colors(n: int) -> list[str]:
    return [_LAST] if n == 1 else [_FIRST] * (n - 1) + [_LAST]


def _depth_axis(axis: Any, n: int) -> None:
    axis.set_xlim(0.3, n + 0.7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("norm layer, from input to output")


def _legend(figure: Any, lines: Any, labels: Sequence[str]) -> None:
    """A legend above the axes; texts are set afterwards, since Matplotlib hides leading `_`."""
    legend = figure.legend(
        list(lines), ["label"] * len(labels), loc="outside upper left", ncols=min(3, len(labels))
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _picture(
    key: str, title: str, caption: str, draw: Callable[[Any], None], height: float = 2.7
) -> Picture:
    """Draw with Matplotlib's own defaults, whatever the user's settings are."""
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
