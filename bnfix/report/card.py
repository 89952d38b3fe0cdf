"""The model card of a hub folder: only what was measured, the verdict, and how to load it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup
from torch import nn

from bnfix.checkpoints.alike import Folder
from bnfix.core import __version__
from bnfix.metrics.task import ByRows
from bnfix.report.pages import clean, render
from bnfix.report.records import Evaluated, Findings, n_live

#: The hub's names of tasks, by those of bnfix.
_PIPELINES: Final = {
    "classification": "image-classification",
    "multilabel": "image-classification",
    "segmentation": "image-segmentation",
}
#: Type and name of a classifier's metrics.
_METRICS: Final = {
    "top1": ("accuracy", "Top-1"),
    "top5": ("accuracy", "Top-5"),
    "nll": ("nll", "NLL"),
    "ece": ("ece", "ECE"),
}


def card_of(
    report: Findings, model: nn.Module, folder: Folder, *, path: Path, command_line: str
) -> str:
    """The text of a README.md: YAML front matter, which JSON values are, and Markdown."""
    name = clean(path.name)
    measured = results_of(report.models[-1]) if report.models else []
    pipeline = _PIPELINES.get(report.task.name, "other")
    front: dict[str, Any] = {"library_name": folder.library}
    front |= {"license": folder.license} if folder.license else {}
    if measured:
        front |= {"pipeline_tag": pipeline} if pipeline != "other" else {}
        data = clean(re.split(r"[/\\]", report.data.spec if report.data else "")[-1]) or "data"
        dataset = {"name": data, "type": re.sub(r"[^\w.-]+", "-", data), "split": "test"}
        result = {"task": {"type": pipeline}, "dataset": dataset, "metrics": measured}
        front["model-index"] = [{"name": name, "results": [result]}]
    front["tags"] = ["bnfix"]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in front.items()]
    text = render(
        "card.md.j2",
        front=Markup("\n".join(lines)),
        headline=report.headline(),
        remarks=report.remarks(),
        badge=report.badge(),
        command_line=command_line,
        name=name,
        folder=folder,
        kind=type(model).__name__,
        live=n_live(model),
        metrics=measured,
        version=__version__,
    )
    return text.rstrip() + "\n"


def results_of(model: Evaluated) -> list[dict[str, Any]]:
    """A model's metrics with their intervals, as a model index lists them."""
    m, names = model.metrics, _METRICS
    if isinstance(m.task, ByRows):
        words = m.task.words
        names = {"top1": (words.score_heading,) * 2, "nll": (words.loss_heading,) * 2}
        names |= {key: (key, heading) for key, heading in m.task.headings.items()}
    found = []
    for key, (kind, name) in names.items():
        value = m.values.get(key, getattr(m, key, None))
        if value is None:
            continue
        counted: dict[str, Any] = {"n": m.n_examples}
        if (interval := m.interval.get(key)) is not None:
            counted["interval"] = [round(end, 4) for end in interval]
        found.append({"type": kind, "name": name, "value": round(value, 4), "args": counted})
    return found
