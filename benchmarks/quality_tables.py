"""Tables and the picture of quality.py, from its results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.quality_methods import AUTO

Rows = list[dict[str, Any]]


def holm(p: list[float], level: float = 0.05) -> list[bool]:
    """Which of several hypotheses are rejected, at a level for all of them together."""
    order = np.argsort(p)
    rejected = [False] * len(p)
    for rank, i in enumerate(order):
        if p[i] > level / (len(p) - rank):
            break
        rejected[i] = True
    return rejected


def family(rows: Rows, metrics: tuple[str, ...]) -> dict[str, list[Any]]:
    """Per case, significantly better and worse (seed, metric) under Holm over all of `auto`."""
    tests = [(r, m) for r in rows if r["method"] == AUTO for m in metrics]
    rejected = holm([r["paired"][m]["p"] for r, m in tests])
    found: dict[str, list[Any]] = {"better": [], "worse": []}
    for (row, metric), significant in zip(tests, rejected, strict=True):
        gain = row["paired"][metric]["difference"] * (1 if metric == "top1" else -1)
        if significant:
            found["better" if gain > 0 else "worse"].append((row["case"], row["seed"], metric))
    return found


def table(rows: Rows, order: Sequence[str], every: Sequence[str]) -> str:
    by_case: dict[str, dict[str, Rows]] = {}
    for row in rows:
        by_case.setdefault(row["case"], {}).setdefault(row["method"], []).append(row)
    lines = []
    for key in (key for key in order if key in by_case):
        methods = by_case[key]
        title = next(iter(methods.values()))[0]
        lines += [f"\n**{title['title']}**, {title['n_calibration']} calibration images, "
                  f"{title['n_test']} test images\n",
                  "| | seeds | top-1 (%) | NLL | NLL scaled | live |",
                  "|---|--:|--:|--:|--:|--:|"]  # fmt: skip
        for name in every:
            if name not in methods:
                continue
            found = methods[name]
            cells = [cell(found, metric) for metric in ("top1", "nll", "nll_temperature_scaled")]
            live = sorted({r["n_live"] for r in found})
            span = f"{live[0]}" if len(live) == 1 else f"{live[0]} to {live[-1]}"
            lines.append(f"| {name} | {len(found)} | " + " | ".join(cells) + f" | {span} |")
    families = {"top-1 and NLL": ("top1", "nll"),
                "NLL after temperature scaling": ("nll_temperature_scaled",)}  # fmt: skip
    for what, metrics in families.items():
        found = family(rows, metrics)
        n = sum(r["method"] == AUTO for r in rows) * len(metrics)
        better = sorted({case for case, *_ in found["better"]})
        lines.append(f"\n`auto` per channel against stock, {what}: {n} tests, Holm at 95%: better "
                     f"{len(found['better'])} ({', '.join(better)}), worse {len(found['worse'])} "
                     f"{sorted(found['worse']) or ''}")  # fmt: skip
    return "\n".join(lines)


def cell(rows: Rows, metric: str) -> str:
    """One seed: value and interval; several: mean, and from least to most."""
    scale, digits_ = (100, 1) if metric == "top1" else (1, 3)
    values = [scale * r[metric] for r in rows]
    low, high = (scale * v for v in rows[0]["interval"][metric])
    if len(rows) > 1:
        low, high = min(values), max(values)
    return f"{np.mean(values):.{digits_}f} ({low:.{digits_}f} to {high:.{digits_}f})"


def seeds_table(rows: Rows) -> str:
    lines = ["| case | seed | top-1 | difference (95%) | NLL | difference (95%) | NLL scaled | "
             "difference (95%) | live |",
             "|---|--:|--:|--:|--:|--:|--:|--:|--:|"]  # fmt: skip
    chosen = [row for row in rows if row["method"] == AUTO]
    for row in sorted(chosen, key=lambda row: (row["case"], row["seed"])):
        cells = []
        for metric in ("top1", "nll", "nll_temperature_scaled"):
            scale, d = (100, 1) if metric == "top1" else (1, 3)
            paired = row["paired"][metric]
            low, high = (scale * v for v in paired["interval"])
            difference = scale * paired["difference"]
            cells += [f"{scale * row[metric]:.{d}f}",
                      f"{difference:+.{d}f} ({low:+.{d}f} to {high:+.{d}f})"]  # fmt: skip
        lines.append(
            f"| {row['title']} | {row['seed']} | " + " | ".join(cells) + f" | {row['n_live']} |"
        )
    return "\n".join(lines)


SHOWN = ("torch update_bn", "linear mixing (alpha-BN)", "IABN (k = 4)", "one weight", AUTO,
         "gamma and beta", "both together")  # fmt: skip
PANELS = (
    ("top1", 100, "top-1, points", (-6, 11)),
    ("nll_temperature_scaled", 1, "NLL after temperature scaling", (-0.35, 0.25)),
)


def picture(rows: Rows, order: Sequence[str], file: Path) -> None:
    """Differences from stock, a panel a metric, a row a case, a dot a seed; arrows: beyond."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "bnfix"
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D

    keys = [key for key in order if any(row["case"] == key for row in rows)]
    titles = {row["case"]: row["title"] for row in rows}
    shown = [name for name in SHOWN if any(row["method"] == name for row in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(10, 1.6 + 0.5 * len(keys)), sharey=True)
    for axis, (metric, scale, label, (low, high)) in zip(axes, PANELS, strict=True):
        for row in rows:
            if row["method"] not in shown:
                continue
            j = shown.index(row["method"])
            value = scale * row["paired"][metric]["difference"]
            mark = "<" if value < low else ">" if value > high else "o"
            y = keys.index(row["case"]) + 0.11 * (j - (len(shown) - 1) / 2)
            size, front = (5, 3) if row["method"] == AUTO else (3.5, 2)
            axis.plot(
                [min(max(value, low), high)], [y], mark, color=f"C{j}", markersize=size,
                zorder=front,
            )  # fmt: skip
        for i in range(1, len(keys)):
            axis.axhline(i - 0.5, color="black", linewidth=0.3, alpha=0.3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlim(low - 0.05 * (high - low), high + 0.05 * (high - low))
        axis.set_xlabel(f"{label}, difference from stock")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(keys)), [titles[key] for key in keys])
    axes[0].invert_yaxis()
    marks = [Line2D([], [], marker="o", linestyle="", color=f"C{j}") for j in range(len(shown))]
    figure.legend(marks, shown, loc="upper center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0, 1, 1 - 0.6 / figure.get_figheight()))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, metadata={"Date": None})
