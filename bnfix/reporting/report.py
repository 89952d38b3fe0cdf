"""The records of all stages to JSON, Markdown and one HTML page."""

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

from bnfix.checkpoints.checkpoint import write_text
from bnfix.layers.surgery import SwapPlan
from bnfix.measuring.movement import Moved
from bnfix.measuring.pairing import Decision, Paired, compare
from bnfix.measuring.robustness import BatchInvariance, Shifted
from bnfix.reporting import plots, wording
from bnfix.reporting.pages import flat, plain_json, render
from bnfix.reporting.records import (
    DataUsed,
    Evaluated,
    LayerRow,
    data_json,
    model_json,
    paired_json,
    shifted_json,
    without,
)
from bnfix.reporting.standings import ClassRow, Rank, class_change_errors, class_rows, ranking
from bnfix.reporting.svg import Picture
from bnfix.statistics.calibration import Calibration
from bnfix.tuning.finetuning import Finetuning
from bnfix.version import __version__
from bnfix.weighing.example_weight import WeightChoice

_DRIFTS = ("mean_shift", "log_var_ratio", "residual")


@dataclass(frozen=True)
class Report:
    """Everything that a command found and did; what is not there is left out of the pages.

    Args:
        command: ``fix``, ``eval``, ...
        data: what was evaluated on.
        models: the first is what the others are compared against.
        layers: norm layers from input to output.
        decisions: of the gate, those of ``choice`` included.
        calibration: of the population statistics.
        choice: of the example weight.
        finetunings: every run tried.
        swap: what was done to the layers.
        assumptions: what was assumed for the user or skipped, one sentence each.
        n_seen: evaluated examples that stand in a checkpoint's history as fit or select.
        options: of the command.
        seed: of everything random.
        command_line: to type again.
        versions: by package.
        corruptions: each model on corrupted images.
        invariance: each model's logits in other batches.
        refused: calibrations, choices and runs that the output does not hold.
        moved: how far the outputs moved.
    """

    command: str
    data: DataUsed | None
    models: tuple[Evaluated, ...]
    layers: tuple[LayerRow, ...] = ()
    decisions: tuple[Decision, ...] = ()
    calibration: Calibration | None = None
    choice: WeightChoice | None = None
    finetunings: tuple[Finetuning, ...] = ()
    swap: SwapPlan | None = None
    assumptions: tuple[str, ...] = ()
    n_seen: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    command_line: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    corruptions: tuple[Shifted, ...] = ()
    invariance: tuple[BatchInvariance, ...] = ()
    refused: tuple[Calibration | WeightChoice | Finetuning, ...] = ()
    moved: Moved | None = None

    @cached_property
    def paired(self) -> tuple[Paired | None, ...]:
        """Each further model against the first; ``None`` without labels."""
        metrics = [model.metrics for model in self.models]
        return tuple(
            compare(metrics[0], other, seed=self.seed)
            if all(m.examples is not None or m.problem for m in (metrics[0], other))
            else None
            for other in metrics[1:]
        )

    @property
    def verdict(self) -> str | None:
        """``better``, ``same`` or ``worse``: the last model against the first."""
        last = self.paired[-1] if self.paired else None
        return None if last is None else last.verdict

    @property
    def temperature_only(self) -> bool:
        """Whether nothing of the gain is left after temperature scaling."""
        last = self.paired[-1] if self.paired else None
        return last is not None and last.temperature_only

    def verdict_sentence(self) -> str:
        """Say in plain words what came out, how sure it is, and what it is worth."""
        findings = self._findings()
        sentences = " ".join([findings.headline(), *findings.remarks()])
        if self.verdict is None:
            return sentences[:1].upper() + sentences[1:]
        return f"{self.verdict}: {sentences}"

    def to_json(self) -> dict[str, Any]:
        """Put everything into plain containers; numbers that are not finite become ``None``."""
        content = {
            "bnfix": __version__,
            "command": self.command,
            "verdict": self.verdict,
            "verdict_sentence": self.verdict_sentence(),
            "temperature_only": self.temperature_only,
            "n_seen": self.n_seen,
            "data": None if self.data is None else data_json(self.data),
            "models": [model_json(model) for model in self.models],
            "paired": [
                paired_json(model.name, self.models[0].name, paired)
                for model, paired in zip(self.models[1:], self.paired, strict=True)
            ],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "decisions": [dataclasses.asdict(d) for d in self._decisions()],
            "calibration": self.calibration and self.calibration.to_json(),
            "calibrations_refused": [
                one.to_json() for one in self.refused if isinstance(one, Calibration)
            ],
            "choice": self._tried_json(self.choice, "curve", "decisions", "weights"),
            "curve": [dataclasses.asdict(point) for point in self.choice.curve]
            if self.choice
            else [],
            "training_curve": [self._tried_json(run) for run in self.finetunings],
            "outputs_moved": without(self.moved),
            "swap": without(self.swap),
            "per_class": [
                {"class": c.index, "name": c.name, "n_examples": c.n_examples, "top1": c.top1}
                for c in self._classes
            ],
            "ranking": [
                {**(without(row, "paired") or {}), "paired": without(row.paired)}
                for row in self.ranking
            ],
            "corruptions": [shifted_json(row, self.models[0].name) for row in self.corruptions],
            "batch_invariance": [dataclasses.asdict(row) for row in self.invariance],
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
        """A search or a run, and whether the output holds what it found."""
        kept = not any(result is one for one in self.refused)
        return result and {**(without(result, *left_out) or {}), "kept": kept}

    def to_markdown(self) -> str:
        """Write the tables and sentences as Markdown."""
        return self._render("report.md.j2", ())

    def to_html(self) -> str:
        """Write one page, complete in itself, for light, dark, phone and print."""
        return self._render("report.html.j2", self._pictures())

    def save(self, json_path: Path, md_path: Path, html_path: Path) -> None:
        """Write the three files, each whole or not at all."""
        for path, text in zip((json_path, md_path, html_path), self.texts(), strict=True):
            write_text(path, text)

    def texts(self) -> tuple[str, str, str]:
        """Write out all three forms."""
        as_json = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        return as_json, self.to_markdown(), self.to_html()

    def _decisions(self) -> tuple[Decision, ...]:
        return self.decisions or (self.choice.decisions if self.choice else ())

    @cached_property
    def ranking(self) -> list[Rank]:
        """The models of `eval`, best first; empty for fewer than two with labels."""
        return ranking(self.models, self.paired) if self.command == "eval" else []

    @cached_property
    def _classes(self) -> list[ClassRow]:
        return class_rows(self.models, (self.data.class_names if self.data else None) or ())

    def _findings(self) -> wording.Findings:
        n_swapped = len(self.swap.changes) if self.swap else 0
        return wording.Findings(
            command=self.command,
            data=self.data,
            models=self.models,
            paired=self.paired,
            n_seen=self.n_seen,
            n_swapped=n_swapped,
            moved=self.moved,
        )

    def _pictures(self) -> list[Picture]:
        """Those for which there is something to show."""
        labelled = [(m.name, m.metrics) for m in self.models if m.metrics.reliability]
        decisions, rates = self._decisions(), [m.metrics.images_per_second for m in self.models]
        drifts = [[getattr(layer, name) for layer in self.layers] for name in _DRIFTS]
        points = [p for p in (self.choice.curve if self.choice else ()) if math.isfinite(p.nll)]
        runs = [run for run in self.finetunings if len(run.curve) > 1]
        made: list[Picture | None] = [
            plots.gate(decisions) if decisions else None,
            plots.reliability([labelled[0], labelled[-1]][: len(labelled)]) if labelled else None,
            plots.weights_over_depth([layer.example_weight for layer in self.layers])
            if self._any_weight()
            else None,
            plots.weight_curve(points) if len(points) > 1 else None,
            plots.drift(*drifts)
            if any(v and math.isfinite(v) for values in drifts for v in values)
            else None,
            plots.training(runs) if runs else None,
            plots.corruptions(self.corruptions) if self.corruptions else None,
            self._class_picture(),
            plots.speed([(m.name, rate) for m, rate in zip(self.models, rates, strict=True)])
            if any(rate > 0 for rate in rates)
            else None,
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
        findings = self._findings()
        headline = findings.headline()
        stages = self.swap, self.calibration, self.choice, self.finetunings
        return render(
            template,
            r=self,
            version=__version__,
            badge=findings.badge(),
            headline=headline[:1].upper() + headline[1:],
            remarks=findings.remarks(),
            done=wording.done(*stages, self._decisions(), self.refused),
            left_out=wording.left_out(self.assumptions, self.data, *stages),
            decisions=self._decisions(),
            pictures=pictures,
            classes=sorted(self._classes, key=lambda row: -abs(row.change)),
            custom_names=list(dict.fromkeys(c.name for m in self.models for c in m.custom)),
            options=dict(flat(self.options)),
            any_weight=self._any_weight(),
        )


def report_paths(out: Path) -> tuple[Path, Path, Path]:
    """The report's files beside an output file."""
    json_path, md_path, html_path = (
        out.with_name(f"{out.name}.report.{kind}") for kind in ("json", "md", "html")
    )
    return json_path, md_path, html_path
