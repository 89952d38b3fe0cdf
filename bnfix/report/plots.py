"""The pictures of a report, each with a caption that explains it."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import numpy as np

from bnfix.metrics.compare import Decision
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import Shifted
from bnfix.metrics.task import Array
from bnfix.report.pages import clean, percent
from bnfix.report.records import ClassRow
from bnfix.training.finetune import Finetuning
from bnfix.weights.choose import CurvePoint

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
    **dict.fromkeys(["font.size", "axes.titlesize", "axes.labelsize"], 10),
    **dict.fromkeys(["xtick.labelsize", "ytick.labelsize", "legend.fontsize"], 9),
    **dict.fromkeys(["text.color", "axes.labelcolor", "axes.titlecolor"], INK),
    **dict.fromkeys(["xtick.labelcolor", "ytick.labelcolor"], INK),
    **dict.fromkeys(["axes.edgecolor", "xtick.color", "ytick.color"], MUTED),
    **dict.fromkeys(["legend.frameon", "axes.spines.top", "axes.spines.right"], False),
    **dict.fromkeys(["axes.grid", "axes.axisbelow"], True),
    "grid.color": _GRID,
    **dict.fromkeys(["figure.facecolor", "axes.facecolor"], "none"),
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
    """Draw with Matplotlib's own defaults, not the user's settings; height in inches."""
    import matplotlib.style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context(["default", _STYLE]):
        warnings.simplefilter("ignore")
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        draw(figure)
        text = io.StringIO()
        # Not by savefig, which would draw everything twice.
        canvas: Any = FigureCanvasSVG(figure)
        canvas.print_svg(text, metadata={"Date": None})
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
        given["href"] = given.pop(_LINK)
    if "id" in given:
        given["id"] = f"{key}-{given['id']}"
    for name in given.keys() & {"href", "clip-path"}:
        given[name] = given[name].replace("#", f"#{key}-", 1)
    if "style" in given:
        parts = [part.strip() for part in given["style"].split(";")]
        style = ";".join(part for part in parts if not part.startswith("font-family"))
        given["style"] = re.sub("#[0-9a-f]{6}", lambda m: _VARIABLES.get(m[0], m[0]), style)
    for name in given.keys() & {"d", "x", "y", "transform", "width", "height"}:
        shorter = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}", given[name])
        given[name] = " ".join(shorter.split())


# --- pictures ---

#: The darkest cell of a heat map: text must stay legible on it, in light and dark mode.
SHADE = 0.45
_MOST_CLASSES, _SHOWN_CLASSES = 40, 20


def gate(decisions: Sequence[Decision]) -> Picture:
    """Each candidate's paired difference in loss, with the interval that the gate demands."""
    loss, right = decisions[-1].measures

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        axis.axvline(0, color=INK, linewidth=1, linestyle="--")
        for row, d in enumerate(decisions):
            if d.nll_difference is None or d.nll_se is None:
                continue  # one of the two models cannot be evaluated
            color = LAST if d.admitted else MUTED
            ends = [d.nll_difference - d.z * d.nll_se, d.nll_difference + d.z * d.nll_se]
            axis.plot(ends, [row, row], color=color, linewidth=2)
            face = color if d.admitted else "none"
            axis.plot([d.nll_difference], [row], "o", mec=color, mfc=face, markersize=7)
        _rows(axis, [d.candidate for d in decisions], 26)
        axis.set_xlabel(f"{loss} difference; left is better")

    return picture(
        "gate",
        "Candidates before the gate",
        f"Paired difference in {loss} on the select split, with the standard errors that the gate "
        "demands. A candidate is admitted (filled) if its bar lies left of 0, by a clear margin "
        f"on few images{f', and its {right} does not fall' if right else ''}.",
        draw,
        1.0 + 0.36 * len(decisions),
    )


def weights_over_depth(weights: Sequence[float | Sequence[float]]) -> Picture:
    """The example weight of every layer: median, quartiles and range over its channels."""
    rows = [np.nan_to_num(np.atleast_1d(np.asarray(w, dtype=np.float64))) for w in weights]
    low, q1, median, q3, high = np.array([np.quantile(r, [0, 0.25, 0.5, 0.75, 1]) for r in rows]).T
    spread = bool((high > low).any())

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = np.arange(1, len(rows) + 1)
        thick = float(np.clip(120 / len(rows), 1.2, 8))
        if spread:
            axis.vlines(x, low, high, colors=LAST, alpha=0.35, linewidth=thick / 3)
            axis.vlines(x, q1, q3, colors=LAST, alpha=0.6, linewidth=thick)
        axis.plot(x, median, "o", color=LAST, markersize=min(thick, 5))
        axis.set_ylim(-0.02 * max(high.max(), 1e-3), 1.06 * max(high.max(), 1e-3))
        _depth(axis, len(rows))
        axis.set_ylabel("example weight")

    bars = ", thick bars its quartiles, thin bars its range over the channels" if spread else ""
    return picture(
        "weights",
        "Example weight over depth",
        f"Weight of the image's own statistics, per layer. Dots are the layer's median{bars}. "
        f"{int((high > 0).sum())} of {len(rows)} layers have a weight above 0; the largest is "
        f"{high.max():.3g}.",
        draw,
    )


def weight_curve(points: Sequence[CurvePoint], loss: str) -> Picture:
    """The loss over one example weight for the whole model, from at least two points."""
    best = min(points, key=lambda point: point.nll)

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = [point.example_weight for point in points]
        axis.plot(x, [point.nll for point in points], "o-", color=LAST, markersize=4)
        axis.plot([best.example_weight], [best.nll], "o", markersize=10, mfc="none", mec=INK)
        axis.set_xscale("function", functions=(lambda v: np.sqrt(np.maximum(v, 0)), np.square))
        ticks = [t for t in (0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1) if t <= max(x) * 1.1]
        axis.set_xticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_xlabel("example weight of every layer (root scale)")
        axis.set_ylabel(f"{loss}, fit images")

    stock = next((p.nll for p in points if p.example_weight == 0), None)
    against = "" if stock is None else f", {stock:.3f} at 0"
    return picture(
        "curve",
        f"{loss[:1].upper()}{loss[1:]} over the example weight",
        "One weight for the whole model, on the images used for fitting; lower is better. "
        f"Minimum at {best.example_weight:.3g} (circled): {best.nll:.3f}{against}.",
        draw,
    )


def drift(
    mean_shift: Sequence[float | None],
    log_var_ratio: Sequence[float | None],
    residual: Sequence[float | None],
) -> Picture:
    """How far each layer's statistics moved, and the error that a verifying pass finds."""
    series = [
        ("mean shift", _finite(mean_shift), FIRST, "o", "Means are in standard deviations."),
        ("|log variance ratio|", _finite(log_var_ratio), LAST, "s",
         "Variances are compared as |log ratio| (0.1 is about 10%)."),
        ("residual", _finite(residual), LOSS, "^",
         "The residual is the error that one more inference pass finds."),
    ]  # fmt: skip
    moved = [column for column in series if np.nan_to_num(column[1]).any()]
    columns = moved or [column for column in series if np.isfinite(column[1]).any()]
    seen = np.concatenate([values[np.isfinite(values)] for _, values, *_ in columns])

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        x = np.arange(1, len(mean_shift) + 1)
        size = float(np.clip(100 / len(x), 1.5, 4))
        for _, values, color, marker, _ in columns:
            axis.plot(x, values, marker=marker, color=color, markersize=size, linewidth=1.2)
        if seen.min() > 0 and seen.max() > 50 * seen.min():
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        else:
            axis.set_ylim(0, max(1.06 * seen.max(), 1e-6))
        _depth(axis, len(x))
        axis.set_ylabel("drift")
        _legend(figure, axis.lines, [label for label, *_ in columns])

    label, values = columns[0][:2]
    worst = int(np.nanargmax(values))
    return picture(
        "drift",
        "Population statistics: drift by layer",
        "New against old stored statistics, mean over a layer's channels. "
        + " ".join(column[-1] for column in columns)
        + f" The largest {label} is {values[worst]:.3g}, at layer {worst + 1}.",
        draw,
    )


def training(runs: Sequence[Finetuning], loss: str) -> Picture:
    """The validation loss over the epochs of each run, with the kept epoch circled."""
    colors = [LAST, FIRST, LOSS, MUTED]

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for i, run in enumerate(runs):
            epochs, nll = [p.epoch for p in run.curve], [p.nll for p in run.curve]
            axis.plot(epochs, nll, marker="osv^D"[i % 5], color=colors[i % 4], markersize=4)
        for run in runs:
            kept = [point for point in run.curve if point.epoch == run.best_epoch]
            x, y = [p.epoch for p in kept], [p.nll for p in kept]
            axis.plot(x, y, "o", ms=10, mfc="none", mec=INK)
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epoch (0: before any step)")
        axis.set_ylabel(f"{loss}, validation split")
        _legend(figure, axis.lines[: len(runs)], [clean(run.trained, 40) for run in runs])

    return picture(
        "training",
        "Fine-tuning",
        "Loss on the validation split after each epoch; lower is better. The circled epoch was "
        "kept.",
        draw,
    )


def reliability(models: Sequence[tuple[str, Metrics]]) -> Picture:
    """Reliability diagrams of one or two models, with the share of examples per bin below."""

    def draw(figure: Any) -> None:
        axes = figure.subplots(
            2, len(models), sharex=True, sharey="row", squeeze=False, height_ratios=[4, 1]
        )
        for column, (name, metrics) in enumerate(models):
            upper, lower = axes[0, column], axes[1, column]
            bins = [b for b in metrics.reliability if b.n_examples]
            left, width = [b.low for b in bins], [b.high - b.low for b in bins]
            color = LAST if column == len(models) - 1 else FIRST
            accuracy = [b.accuracy for b in bins]
            upper.bar(left, accuracy, width, align="edge", color=color, alpha=0.75)
            upper.plot([0, 1], [0, 1], color=INK, linestyle="--", linewidth=1)
            share = [b.n_examples / metrics.n_examples for b in bins]
            lower.bar(left, share, width, align="edge", color=MUTED)
            upper.set_title(clean(name, 24 if len(models) > 1 else 48), parse_math=False)
            upper.set_ylim(0, 1)
            lower.set_xlim(0, 1)
            lower.set_xlabel("confidence")
        axes[0, 0].set_ylabel("fraction right")
        axes[1, 0].set_ylabel("share")

    gaps = " and ".join(f"{100 * (m.ece or 0):.1f}%" for _, m in models)
    return picture(
        "reliability",
        "Confidence calibration: reliability",
        "Fraction right among the images of each confidence. Bars below the dashed line are "
        f"overconfident, bars above it underconfident. Expected calibration error: {gaps}.",
        draw,
        3.0,
    )


def per_class(rows: Sequence[ClassRow], change_se: Array) -> Picture:
    """Each class's top-1 in two models; with many classes only the largest changes."""
    change = np.array([row.change for row in rows])
    order = np.arange(len(rows))
    if len(rows) > _MOST_CLASSES:
        order = np.argsort(-np.abs(change), kind="stable")[:_SHOWN_CLASSES]
    order = order[np.argsort(-change[order], kind="stable")]
    clear = np.abs(change) > 2 * change_se

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        for place, c in enumerate(order.tolist()):
            gained, first, last = change[c] >= 0, rows[c].top1[0], rows[c].top1[-1]
            color = LAST if gained else LOSS
            axis.plot([first, last], [place, place], color=color, linewidth=2, alpha=0.6)
            axis.plot([first], [place], "o", color=FIRST, markersize=4)
            face = color if clear[c] else "none"
            axis.plot([last], [place], "><"[not gained], mec=color, mfc=face, markersize=6)
        _rows(axis, [rows[c].name for c in order.tolist()], 22)
        axis.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f}%")
        axis.set_xlabel("top-1 of the class")

    some = "" if len(order) == len(rows) else f"The {len(order)} largest of {len(rows)}. "
    n_up, n_down = int((change > 0).sum()), int((change < 0).sum())
    return picture(
        "classes",
        "Per-class change",
        f"{some}Dots are the first model, arrows the last; filled arrows are changes beyond two "
        f"standard errors (about 1 class in 20 by chance). {n_up} classes gain, {n_down} lose; "
        f"about {int(np.median([row.n_examples for row in rows])):,} images per class.",
        draw,
        0.9 + 0.23 * len(order),
    )


def speed(models: Sequence[tuple[str, float]]) -> Picture:
    """Images per second of each model."""

    def draw(figure: Any) -> None:
        axis = figure.subplots()
        rates = [rate for _, rate in models]
        colors = [FIRST] * (len(models) - 1) + [LAST]
        bars = axis.barh(range(len(models)), rates, height=0.6, color=colors)
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=4)
        _rows(axis, [name for name, _ in models], 22)
        axis.set_xlim(0, 1.18 * max(rates))
        axis.grid(visible=False, axis="y")
        axis.set_xlabel("images per second")

    return picture(
        "speed",
        "Speed",
        "Images per second through the model, without reading the data and without the first "
        "batch (warm-up).",
        draw,
        0.8 + 0.36 * len(models),
    )


def corruptions(rows: Sequence[Shifted], score: str) -> Picture:
    """The first model's score under every corruption, and the last model's difference to it."""
    names = list(dict.fromkeys(row.model for row in rows))
    kinds = list(dict.fromkeys(row.kind for row in rows))
    severities = sorted({row.severity for row in rows})
    first = [row for row in rows if row.model == names[0]]
    last = [row for row in rows if row.model == names[-1]] if len(names) > 1 else []
    known = [row.top1 for row in first if row.top1 is not None]
    changes = [
        (row, row.paired.top1)
        for row in last
        if row.paired is not None and math.isfinite(row.paired.top1.difference)
    ]

    def cell(axis: Any, at: Shifted, color: str, alpha: float, text: str) -> None:
        x, y = severities.index(at.severity), kinds.index(at.kind)
        axis.barh(y, 0.94, height=0.9, left=x - 0.47, color=color, alpha=alpha, linewidth=0)
        axis.text(x, y, text, ha="center", va="center", color=INK, fontsize=9)

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, 2 if last else 1, squeeze=False, sharey=True)[0]
        for row in first:
            if row.top1 is not None:
                cell(axes[0], row, MUTED, SHADE * (1 - row.top1), f"{100 * row.top1:.0f}%")
        largest = max([abs(d.difference) for _, d in changes], default=0) or 1.0
        for row, d in changes:
            text = f"{100 * d.difference:+.1f}{'*' * (d.interval[0] > 0 or d.interval[1] < 0)}"
            color = LAST if d.difference > 0 else LOSS
            cell(axes[1], row, color, SHADE * abs(d.difference) / largest, text)
        titles = (f"{clean(names[0], 22)}\n{score}", f"{clean(names[-1], 22)}\npoints more")
        for axis, title in zip(axes, titles, strict=False):
            axis.set_title(title, parse_math=False)
            axis.set_xlim(-0.5, len(severities) - 0.5)
            axis.set_xticks(range(len(severities)), [str(s) for s in severities])
            axis.set_xlabel("severity")
            _rows(axis, kinds, 22)
            axis.grid(visible=False)
            axis.tick_params(length=0)

    mean = f"arker is worse; {percent(float(np.mean(known)) if known else None)} over all of them."
    said = f"D{mean}"
    if last:
        n_up, n_down = (
            sum(sign * d.interval[end] > 0 for _, d in changes) for sign, end in ((1, 0), (-1, 1))
        )
        said = (
            f"Left: the first model, d{mean} Right: the last model's difference in points on the "
            "same images, with a star where the 95% interval excludes 0: "
            f"{n_up} of {len(last)} are gains, {n_down} are losses."
        )
    return picture(
        "corruptions",
        "Under corruptions",
        f"{score.capitalize()} on the same images under common corruptions, severity 1 (mild) to "
        f"3 (strong). {said}",
        draw,
        1.2 + 0.3 * len(kinds),
    )


def _depth(axis: Any, n: int) -> None:
    axis.set_xlim(0.3, n + 0.7)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_xlabel("norm layer, from input to output")


def _rows(axis: Any, labels: Sequence[str], limit: int) -> None:
    """Label the rows with texts of unknown origin, the first row on top."""
    shown = [clean(label, limit) for label in labels]
    axis.set_yticks(range(len(labels)), shown, parse_math=False)
    axis.set_ylim(len(labels) - 0.5, -0.5)


def _legend(figure: Any, lines: Any, labels: Sequence[str]) -> None:
    # Texts are set afterwards, because Matplotlib hides labels that begin with `_`.
    legend = figure.legend(
        list(lines), ["label"] * len(labels), loc="outside upper left", ncols=min(3, len(labels))
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def _finite(values: Sequence[float | None]) -> Array:
    array = np.array(values, dtype=np.float64)  # None is NaN
    return np.where(np.isfinite(array), array, np.nan)
