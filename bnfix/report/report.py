"""A report as JSON, Markdown and one HTML page."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.save import write_text
from bnfix.core import __version__
from bnfix.metrics.compare import Decision
from bnfix.metrics.robustness import BatchInvariance, Shifted
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.report import plots, wording
from bnfix.report.pages import flat, plain_json, render
from bnfix.report.records import (
    ClassRow,
    LayerRow,
    Rank,
    Trials,
    class_change_errors,
    class_rows,
    model_json,
    paired_json,
    ranking,
    shifted_json,
    without,
)
from bnfix.report.svg import Picture

_DRIFTS = ("mean_shift", "log_var_ratio", "residual")


@dataclass(frozen=True)
class Report(wording.Findings):
    """The results of a command; pages leave out sections without content."""

    layers: tuple[LayerRow, ...] = ()
    trials: Trials = field(default_factory=Trials)
    assumptions: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    command_line: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    corruptions: tuple[Shifted, ...] = ()
    invariance: tuple[BatchInvariance, ...] = ()

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
            "n_seen": self.n_seen,
            "data": without(self.data, "class_names"),
            "models": [model_json(model) for model in self.models],
            "paired": [
                paired_json(model.name, self.models[0].name, paired)
                for model, paired in zip(self.models[1:], self.paired, strict=True)
            ],
            "layers": [without(layer) for layer in self.layers],
            "decisions": [without(decision) for decision in self.decisions],
            "calibration": trials.calibration and trials.calibration.to_json(),
            "calibrations_refused": [
                one.to_json() for one in trials.refused if isinstance(one, Calibration)
            ],
            "choice": self._tried_json(trials.choice, "curve", "decisions", "weights"),
            "curve": [without(point) for point in trials.choice.curve] if trials.choice else [],
            "training_curve": [self._tried_json(run) for run in trials.finetunings],
            "outputs_moved": without(self.moved),
            "swap": without(self.swap),
            "per_class": [
                {"class": c.index, "name": c.name, "n_examples": c.n_examples, "top1": c.top1}
                for c in self._classes
            ],
            "ranking": [without(row) for row in self.ranking],
            "corruptions": [shifted_json(row, self.models[0].name) for row in self.corruptions],
            "batch_invariance": [without(row) for row in self.invariance],
            "reliability": [
                {"name": m.name, "bins": [dataclasses.asdict(b) for b in m.metrics.reliability]}
                for m in self.models
            ],
            "assumptions": list(self.assumptions),
            "options": self.options,
            "seed": self.seed,
            "command_line": self.command_line,
            "versions": self.versions,
        }
        return {key: plain_json(value) for key, value in content.items()}

    def _tried_json(self, result: Any, *left_out: str) -> dict[str, Any] | None:
        """A search or a run, and whether the output holds its result."""
        # By identity: two runs of equal numbers are two runs, and only one is in the output.
        kept = not any(result is one for one in self.trials.refused)
        return result and {**(without(result, *left_out) or {}), "kept": kept}

    def to_markdown(self) -> str:
        """The tables and sentences as Markdown; names cannot break out of their place."""
        return self._render("report.md.j2", ())

    def to_html(self) -> str:
        """One self-contained page for light, dark, phone and print; names cannot break out."""
        return self._render("report.html.j2", self._pictures())

    def texts(self) -> tuple[str, str, str]:
        """JSON, Markdown and HTML."""
        as_json = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        return as_json, self.to_markdown(), self.to_html()

    def save(self, json_path: Path, md_path: Path, html_path: Path) -> None:
        """Write the three files, each completely or not at all."""
        for path, text in zip((json_path, md_path, html_path), self.texts(), strict=True):
            write_text(path, text)

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
        made: list[Picture | None] = [
            plots.gate(self.decisions) if self.decisions else None,
            plots.reliability(ends) if ends else None,
            plots.weights_over_depth(weights) if self._any_weight() else None,
            plots.weight_curve(points) if len(points) > 1 else None,
            plots.drift(*drifts) if drifted else None,
            plots.training(runs) if runs else None,
            plots.corruptions(self.corruptions) if self.corruptions else None,
            self._class_picture(),
            plots.speed(rates) if any(rate > 0 for _, rate in rates) else None,
        ]
        return [picture for picture in made if picture is not None]

    def _any_weight(self) -> bool:
        return any(np.any(layer.example_weight) for layer in self.layers)

    def _class_picture(self) -> Picture | None:
        rows = self._classes
        if not self.paired or self.paired[-1] is None or len(rows) < 2:
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
            done=wording.done(self.swap, self.trials, self.decisions),
            left_out=wording.left_out(self.assumptions, self.data, self.swap, self.trials),
            decisions=self.decisions,
            pictures=pictures,
            classes=sorted(self._classes, key=lambda row: -abs(row.change)),
            custom_names=list(dict.fromkeys(c.name for m in self.models for c in m.custom)),
            options=dict(flat(self.options)),
            any_weight=self._any_weight(),
        )


def report_paths(out: Path) -> tuple[Path, Path, Path]:
    """The report's files beside an output: ``net.safetensors.report.json``, ``.md``, ``.html``."""
    json_path, md_path, html_path = (
        out.with_name(f"{out.name}.report.{kind}") for kind in ("json", "md", "html")
    )
    return json_path, md_path, html_path
