"""The report of a command as JSON, Markdown and one HTML page, and its files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.save import check_folder, check_free, write_text
from bnfix.core import __version__
from bnfix.core.errors import file_error, some
from bnfix.metrics.compare import Decision, Paired
from bnfix.metrics.custom import Custom
from bnfix.metrics.robustness import BatchInvariance, Shifted, Tiled
from bnfix.metrics.task import ByRows
from bnfix.metrics.uncertainty import Uncertain
from bnfix.norm.swap import SwapPlan
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.report import plots
from bnfix.report.agreement import agreed_json, agreement_intervals, agreement_json
from bnfix.report.pages import Picture, count, fields_of, flat, plain_json, render
from bnfix.report.plots import ClassRow, class_change_errors, class_rows
from bnfix.report.records import DataUsed, Evaluated, Findings, LayerRow, Trials, done


@dataclass(frozen=True)
class Rank:
    """A model's rank by NLL, then by top-1."""

    rank: int  # from 1; equal models share it
    name: str
    nll: float
    top1: float  # 0 for a task without a score
    paired: Paired | None  # against the first model given


def ranking(models: Sequence[Evaluated], paired: Sequence[Paired | None]) -> list[Rank]:
    """Rank models on the same labelled examples, best first; empty for fewer than two."""
    keys = sorted(
        (m.metrics.nll, -(m.metrics.top1 or 0.0), i)
        for i, m in enumerate(models)
        if m.metrics.nll is not None
    )
    # Without the position: models with equal numbers share a rank.
    values = [key[:2] for key in keys]
    return [
        Rank(
            rank=values.index((nll, top1)) + 1,
            name=models[i].name,
            nll=nll,
            top1=-top1,
            paired=paired[i - 1] if i else None,
        )
        for nll, top1, i in keys
        if len(keys) > 1
    ]


def model_json(model: Evaluated) -> dict[str, Any]:
    """The JSON of a model; ``custom`` only where there are metrics of the user's."""
    m = model.metrics
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "temperature", "brier", "ece")
    named = {name: getattr(m, name) for name in names}
    if isinstance(m.task, ByRows):
        named = {"nll": m.nll, "top1": m.top1, **m.values}
    return {
        "name": model.name,
        "file": model.file,
        "sha256": model.sha256,
        "n_examples": m.n_examples,
        **({"n_groups": n} if (n := m.examples and m.examples.n_groups) else {}),
        "n_live": model.n_live,
        **({"preprocessing": asdict(p)} if (p := model.preprocessing) else {}),
        **named,
        **agreement_json(model.agreement),
        "interval": {
            "top1": None,
            "nll": None,
            **m.interval,
            **agreement_intervals(model.agreement),
        },
        "images_per_second": m.images_per_second or None,
        **({"custom": {c.name: _custom_json(c) for c in model.custom}} if model.custom else {}),
    }


def _custom_json(custom: Custom) -> dict[str, Any]:
    difference = None
    if custom.difference is not None:
        difference = {"difference": custom.difference, "interval": custom.difference_interval}
    return {"value": custom.value, "interval": custom.interval, "difference": difference}


def paired_json(name: str, against: str, paired: Paired | None) -> dict[str, Any]:
    """The JSON of a pair; all values are ``None`` without labels."""
    shown = ("top1", "nll", "nll_temperature_scaled", "verdict", "temperature_only")
    found = {key: getattr(paired, key, None) for key in shown}
    return {"name": name, "against": against, **found, **(paired.metrics if paired else {})}


def renamed(content: Any, task: ByRows) -> Any:
    """JSON values under the names of a task: loss, and score where it has one."""
    if isinstance(content, list):
        return [renamed(item, task) for item in content]
    if not isinstance(content, dict):
        return content
    found, none = {}, ("nll_temperature_scaled", "by_reference")
    for key, value in content.items():
        name = key.replace("nll", "loss").replace("top1", "score")
        if key in none or ("top1" in key and not task.words.score):
            continue
        # Names of the user's stay as they are.
        own = key in ("custom", "options")
        found[key if own else name] = value if own else renamed(value, task)
    return found


def shifted_json(row: Shifted, against: str) -> dict[str, Any]:
    """The JSON of a model on corrupted images."""
    paired = None if row.paired is None else paired_json(row.model, against, row.paired)
    return {**fields_of(row), "paired": paired}


_DRIFTS = ("mean_shift", "log_var_ratio", "residual")


@dataclass(frozen=True)
class Report(Findings):
    """The results of a command; pages leave out sections without content."""

    layers: tuple[LayerRow, ...] = ()
    trials: Trials = field(default_factory=Trials)
    assumptions: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    command_line: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    corruptions: tuple[Shifted, ...] = ()
    invariance: tuple[BatchInvariance, ...] = ()
    streams: tuple[Shifted, ...] = ()
    tiles: tuple[Tiled, ...] = ()
    uncertainty: tuple[Uncertain, ...] = ()

    @property
    def shifts(self) -> list[tuple[str, str, tuple[str, str], tuple[Shifted, ...]]]:
        """Tables of the same images under other conditions: title, sentence, headings, rows."""
        tables = [
            (
                "Under common corruptions",
                "The same images, corrupted after resize and crop and before normalization",
                ("Corruption", "Severity"),
                self.corruptions,
            ),
            (
                "In other orders (streams)",
                "The same images in random order (iid), by class (sorted), half of every batch by "
                "class and half random (mixed), and one by one (single). A model gives the same in "
                "all of them unless its predictions depend on the other images in the batch",
                ("Order", "Batch size"),
                self.streams,
            ),
        ]
        return [table for table in tables if table[-1]]

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The gate's decisions, or those of the weight search alone."""
        choice = self.trials.choice
        return self.trials.decisions or (choice.decisions if choice else ())

    @cached_property
    def ranking(self) -> list[Rank]:
        """The models of `eval`, best first; empty for fewer than two with labels."""
        return ranking(self.models, self.paired) if self.command == "eval" else []

    def to_json(self) -> dict[str, Any]:
        """Everything in plain containers; numbers that are not finite become ``None``."""
        trials = self.trials
        content = {
            "bnfix": __version__,
            "command": self.command,
            "verdict": self.verdict,
            "verdict_sentence": self.verdict_sentence(),
            "temperature_only": self.temperature_only,
            **({"agreement_verdict": agreed} if (agreed := self.agreement_verdict) else {}),
            "n_seen": self.n_seen,
            "data": self.data and self._data_json(self.data),
            "models": [model_json(model) for model in self.models],
            "paired": [
                {**paired_json(model.name, self.models[0].name, paired), **agreed_json(agreed)}
                for model, paired, agreed in zip(
                    self.models[1:], self.paired, self.agreed, strict=True
                )
            ],
            "layers": self.layers,
            "decisions": [fields_of(decision, "words") for decision in self.decisions],
            "calibration": trials.calibration and trials.calibration.to_json(),
            "calibrations_refused": [
                one.to_json() for one in trials.refused if isinstance(one, Calibration)
            ],
            "choice": self._tried_json(trials.choice, "curve", "decisions", "weights"),
            "curve": trials.choice.curve if trials.choice else [],
            "training_curve": [self._tried_json(run) for run in trials.finetunings],
            "outputs_moved": self.moved,
            "swap": self.swap,
            "per_class": [self._class_json(row) for row in self._classes],
            "ranking": [
                {**fields_of(row), "paired": row.paired and fields_of(row.paired, "metrics")}
                for row in self.ranking
            ],
            "corruptions": [shifted_json(row, self.models[0].name) for row in self.corruptions],
            "batch_invariance": self.invariance,
            **({"streams": self._streams_json()} if self.streams else {}),
            **({"tiles": self.tiles} if self.tiles else {}),
            **({"uncertainty": self._uncertainty_json()} if self.uncertainty else {}),
            "reliability": [
                {"name": model.name, "bins": model.metrics.reliability} for model in self.models
            ],
            "assumptions": self.assumptions,
            "options": self.options,
            "seed": self.seed,
            "command_line": self.command_line,
            "versions": self.versions,
        }
        plain: dict[str, Any] = plain_json(content)
        if self.by_rows is None:
            return plain
        plain["task"] = {"name": self.by_rows.name, "loss": self.by_rows.words.loss}
        found: dict[str, Any] = renamed(plain, self.by_rows)
        return found

    def _class_json(self, row: ClassRow) -> dict[str, Any]:
        value, n = ("top1", "examples") if self.by_rows is None else self.by_rows.of_class
        found = {f"n_{n.lower()}": row.n_examples, value.lower(): row.top1}
        return {"class": row.index, "name": row.name, **found}

    def _data_json(self, data: DataUsed) -> dict[str, Any]:
        # The number of groups only where there are groups.
        return fields_of(data, "class_names", "noun", *(() if data.n_groups else ("n_groups",)))

    def _streams_json(self) -> list[dict[str, Any]]:
        rows = [shifted_json(row, self.models[0].name) for row in self.streams]
        for row in rows:
            row["stream"], row["batch_size"] = row.pop("kind"), row.pop("severity")
        return rows

    def _uncertainty_json(self) -> list[dict[str, Any]]:
        pairs = zip(self.models, self.uncertainty, strict=True)
        return [{"model": model.name, **fields_of(row)} for model, row in pairs]

    def _tried_json(self, result: Any, *left_out: str) -> dict[str, Any] | None:
        """A search or a run, and whether the output holds its result."""
        # By identity: two runs of equal numbers are two runs, and only one is in the output.
        kept = not any(result is one for one in self.trials.refused)
        return result and {**fields_of(result, *left_out), "kept": kept}

    def to_markdown(self) -> str:
        """The tables and sentences as Markdown; names cannot break out of their place."""
        return self._render("report.md.j2", ())

    def to_html(self) -> str:
        """One self-contained page for light, dark, phone and print; names cannot break out."""
        return self._render("report.html.j2", self._pictures())

    def texts(self) -> tuple[str, str, str]:
        """JSON, Markdown and HTML."""
        return json_text(self.to_json()), self.to_markdown(), self.to_html()

    def save(self, json_path: Path, md_path: Path, html_path: Path) -> None:
        """Write the three files, each completely or not at all."""
        write_texts((json_path, md_path, html_path), self.texts())

    @cached_property
    def _classes(self) -> list[ClassRow]:
        return class_rows(self.models, (self.data.class_names if self.data else None) or ())

    def _pictures(self) -> list[Picture]:
        """The plots that have data."""
        labelled = [(m.name, m.metrics) for m in self.models if m.metrics.reliability]
        rates = [(m.name, m.metrics.images_per_second) for m in self.models]
        drifts = [[getattr(layer, name) for layer in self.layers] for name in _DRIFTS]
        drifted = any(v and math.isfinite(v) for values in drifts for v in values)
        choice = self.trials.choice
        # A weight at which the network overflows has no place on the curve.
        points = [p for p in (choice.curve if choice else ()) if math.isfinite(p.nll)]
        runs = [run for run in self.trials.finetunings if len(run.curve) > 1]
        weights = [layer.example_weight for layer in self.layers]
        ends = [labelled[0], labelled[-1]][: len(labelled)] if labelled else []
        words = self.task.words
        shifted = self.corruptions and words.score
        made: list[Picture | None] = [
            plots.gate(self.decisions) if self.decisions else None,
            plots.reliability(ends) if ends else None,
            plots.weights_over_depth(weights) if self._any_weight() else None,
            plots.weight_curve(points, words.loss_heading) if len(points) > 1 else None,
            plots.drift(*drifts) if drifted else None,
            plots.training(runs, words.loss_heading) if runs else None,
            plots.corruptions(self.corruptions, words.score_heading) if shifted else None,
            self._class_picture(),
            plots.speed(rates) if any(rate > 0 for _, rate in rates) else None,
        ]
        return [picture for picture in made if picture is not None]

    def _any_weight(self) -> bool:
        return any(np.any(layer.example_weight) for layer in self.layers)

    def _batch_weights(self) -> str:
        """How many layers weigh the batch, and by how much; empty for none."""
        highest = [b for row in self.layers if (b := float(np.max(row.batch_weight, initial=0)))]
        if not highest:
            return ""
        return (
            f"{len(highest)} of {len(self.layers)} norm layers weigh the batch, by up to "
            f"{max(highest):.3g}: predictions depend on the other images in the batch."
        )

    def _class_picture(self) -> Picture | None:
        rows, none = self._classes, self.by_rows is not None
        if none or not self.paired or self.paired[-1] is None or len(rows) < 2:
            return None
        errors = class_change_errors(self.models, rows)
        n = np.array([row.n_examples for row in rows])
        first, last = (np.array([row.top1[k] for row in rows]) for k in (0, -1))
        names = [row.name for row in rows]
        return None if errors is None else plots.per_class(names, n, first, last, errors)

    def _render(self, template: str, pictures: Sequence[Picture]) -> str:
        headline = self.headline()
        return render(
            template,
            r=self,
            version=__version__,
            badge=self.badge(),
            headline=headline[:1].upper() + headline[1:],
            remarks=self.remarks(),
            done=done(self.swap, self.trials, self.decisions),
            left_out=left_out(self.assumptions, self.data, self.swap, self.trials),
            decisions=self.decisions,
            pictures=pictures,
            classes=sorted(self._classes, key=lambda row: -abs(row.change)),
            class_words=self.by_rows.of_class
            if self.by_rows
            else ("Top-1", self.noun.capitalize()),
            by_rows=self.by_rows,
            custom_names=list(dict.fromkeys(c.name for m in self.models for c in m.custom)),
            options=dict(flat(self.options)),
            any_weight=self._any_weight(),
            batch_weights=self._batch_weights(),
        )


def left_out(
    assumptions: Sequence[str], data: DataUsed | None, swap: SwapPlan | None, trials: Trials
) -> list[str]:
    """Assumptions and exclusions, one sentence each, each once."""
    notes = list(assumptions)
    if swap:
        notes += [*swap.notes, *_grouped("Not swapped", swap.skipped)]
    if trials.calibration:
        c = trials.calibration.exceptions
        notes += _grouped("Statistics unchanged, never reached", c.never_reached)
        notes += _grouped("Statistics unchanged, frozen or excluded", c.left_alone)
        notes += _grouped("Called more than once per pass, calls pooled", c.called_again)
    if trials.choice:
        notes += _grouped("Example weight unchanged", trials.choice.excluded)
    for run in trials.finetunings:
        notes += _grouped("Statistics unchanged, frozen or excluded", run.frozen)
        if n := run.n_skipped_steps:
            notes.append(f"Fine-tuning of {run.trained}: {n} steps were skipped, not finite.")
    if data and (n := data.n_skipped):
        shown = f": {some(data.skipped, 20)}" if data.skipped else ""
        notes.append(f"{count(n)} unreadable {'image' if n == 1 else 'images'} skipped{shown}.")
    return list(dict.fromkeys(notes))


def _grouped(title: str, names: Sequence[str]) -> list[str]:
    return [f"{title}: {some(names, 8)}."] if names else []


def report_paths(out: Path) -> tuple[Path, ...]:
    """The report's files beside an output: ``net.safetensors.report.json``, ``.md``, ``.html``."""
    return tuple(out.with_name(f"{out.name}.report.{kind}") for kind in ("json", "md", "html"))


def json_text(content: dict[str, Any]) -> str:
    """A report's JSON as the text of a file."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_texts(paths: Iterable[Path], texts: Iterable[str]) -> None:
    """Write the files of a report, each completely or not at all."""
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)


def check_report_folder(folder: Path, *, force: bool) -> tuple[Path, ...]:
    """Check before any work that a folder may get a report; the files it gets."""
    paths = tuple(folder / f"report.{kind}" for kind in ("json", "md", "html"))
    check_free(*paths, force=force)
    if folder.exists() and not folder.is_dir():
        raise file_error(folder, "is not a folder. Give another --report.")
    check_folder(next(path for path in (folder, *folder.parents) if path.exists()) / "report.json")
    return paths
