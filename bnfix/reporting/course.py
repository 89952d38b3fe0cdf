"""Pictures of how a model was made: weights, statistics, candidates, training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bnfix.measuring.gate import Decision
from bnfix.measuring.intervals import Array
from bnfix.reporting import pages
from bnfix.reporting.drawing import (
    FIRST,
    INK,
    LAST,
    LOSS,
    MUTED,
    Picture,
    depth_axis,
    legend,
    picture,
)
from bnfix.tuning.finetuning import Finetuning
from bnfix.weighing.weight_search import CurvePoint


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
            axis.vlines(x, low, high, colors=LAST, alpha=0.35, linewidth=thick / 3)
            axis.vlines(x, q1, q3, colors=LAST, alpha=0.6, linewidth=thick)
        axis.plot(x, median, "o", color=LAST, markersize=min(thick, 5))
        axis.set_ylim(-0.02 * max(high.max(), 1e-3), 1.06 * max(high.max(), 1e-3))
        depth_axis(axis, len(rows))
        axis.set_ylabel("example weight")

    bands = "thick bars its quartiles and thin ones its range over the channels. " if spread else ""
    live = int((high > 0).sum())
    return picture(
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
        ("mean shift", mean_shift, FIRST, "o"),
        ("|log variance ratio|", log_var_ratio, LAST, "s"),
        ("residual", residual, LOSS, "^"),
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
        depth_axis(axis, len(x))
        axis.set_ylabel("drift")
        legend(figure, axis.lines, [label for label, *_ in columns])

    label, values = columns[0][:2]
    worst = int(np.nanargmax(values))
    shown = [column[0] for column in columns]
    told = {
        "mean shift": "Means are in standard deviations.",
        "|log variance ratio|": "Variances are compared as |log ratio| (0.1 is about 10%).",
        "residual": "The residual is what one verifying pass in inference still finds.",
    }
    return picture(
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
        axis.plot(x, [point.nll for point in points], "o-", color=LAST, markersize=4)
        axis.plot([best.example_weight], [best.nll], "o", markersize=10, mfc="none", mec=INK)
        axis.set_xscale("function", functions=(_root, np.square))
        wanted = [t for t in (0, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 0.75, 1) if t <= max(x) * 1.1]
        axis.set_xticks(wanted, [f"{t:g}" for t in wanted])
        axis.set_xlabel("example weight of every layer (root scale)")
        axis.set_ylabel("NLL, fit images")

    stock = next((p.nll for p in points if p.example_weight == 0), None)
    against = "" if stock is None else f", {stock:.3f} at 0"
    return picture(
        "curve",
        "NLL over the example weight",
        "One weight for the whole model, on the images used for fitting; lower is better. "
        f"Least at {best.example_weight:.3g} (circled): {best.nll:.3f}{against}.",
        draw,
    )


def training(runs: Sequence[Finetuning]) -> Picture:
    """Draw the monitor's NLL over the epochs of fine-tuning runs, the kept epoch circled.

    Args:
        runs: at least one.

    Returns:
        The picture.
    """
    colors = [LAST, FIRST, LOSS, MUTED]

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
                [p.epoch for p in kept], [p.nll for p in kept], "o", ms=10, mfc="none", mec=INK
            )
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.set_xlabel("epoch (0: before any step)")
        axis.set_ylabel("NLL, monitor images")
        legend(figure, axis.lines[: len(runs)], [pages.clean(run.trained, 40) for run in runs])

    return picture(
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
        axis.axvline(0, color=INK, linewidth=1, linestyle="--")
        for row, d in enumerate(decisions):
            if d.nll_difference is None or d.nll_se is None:
                continue  # one of the two cannot be evaluated
            color = LAST if d.admitted else MUTED
            reach = d.z * d.nll_se
            ends = [d.nll_difference - reach, d.nll_difference + reach]
            axis.plot(ends, [row, row], color=color, linewidth=2)
            face = color if d.admitted else "none"
            axis.plot([d.nll_difference], [row], "o", mec=color, mfc=face, markersize=7)
        labels = [pages.clean(d.candidate, 26) for d in decisions]
        axis.set_yticks(range(len(decisions)), labels, parse_math=False)
        axis.set_ylim(len(decisions) - 0.5, -0.5)
        axis.set_xlabel("NLL difference; left is better")

    return picture(
        "gate",
        "Candidates before the gate",
        "Paired difference in NLL on the select split, with the standard errors that the gate "
        "demands. A candidate is admitted (filled) if its bar lies left of 0 and its top-1 does "
        "not fall.",
        draw,
        1.0 + 0.36 * len(decisions),
    )


def _finite(values: Sequence[float | None]) -> Array:
    array = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
    return np.where(np.isfinite(array), array, np.nan)


def _root(values: Array) -> Array:
    return np.sqrt(np.maximum(values, 0))
