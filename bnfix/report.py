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

from bnfix import figures
from bnfix.calibration import Calibration
from bnfix.checkpoint import write_text
from bnfix.errors import some
from bnfix.evaluation import Metrics, Paired, compare
from bnfix.example_weight import WeightChoice
from bnfix.finetuning import Finetuning
from bnfix.gate import Decision
from bnfix.pages import (
    clean,
    count,
    difference,
    direction,
    flat,
    number,
    percent,
    plain_json,
    render,
)
from bnfix.surgery import SwapPlan
from bnfix.version import __version__

#: Commands whose first model is the same network before the work.
_BEFORE = ("fix", "convert", "calibrate", "finetune", "demo")
_DRIFTS = ("mean_shift", "log_var_ratio", "residual")
_BADGES = {"better": "Better", "same": "Same", "worse": "Worse"}


@dataclass(frozen=True)
class Evaluated:
    """A model and what it achieved.

    Args:
        name: as shown.
        file: where it was read from or written to.
        sha256: of that file.
        metrics: on the examples that all models of the report share.
        n_live: layers with an example weight above 0 in inference.
    """

    name: str
    file: str | None
    sha256: str | None
    metrics: Metrics
    n_live: int = 0


@dataclass(frozen=True)
class DataUsed:
    """The data behind the numbers.

    Args:
        spec: as given.
        n_examples: in all of it.
        fingerprint: of the whole data.
        class_names: by index.
        splits: examples by split name.
        skipped: examples that could not be read, some of them, in words.
        n_skipped: how many in all.
    """

    spec: str
    n_examples: int
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    n_skipped: int = 0


@dataclass(frozen=True)
class LayerRow:
    """A norm layer, as it stands at the end.

    Args:
        name: dotted name.
        kind: class name.
        channels: C.
        example_weight: a number, or one a channel.
        mean_shift: of the data's statistics against those before, in standard deviations.
        log_var_ratio: mean |log((new var + eps) / (old var + eps))|.
        residual: the same of the statistics stored against one verifying pass.
        mean_se: largest standard error of a mean, in standard deviations.
        var_se: largest relative standard error of a variance.
    """

    name: str
    kind: str
    channels: int
    example_weight: float | list[float] = 0.0
    mean_shift: float | None = None
    log_var_ratio: float | None = None
    residual: float | None = None
    mean_se: float | None = None
    var_se: float | None = None


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

    @cached_property
    def paired(self) -> tuple[Paired | None, ...]:
        """Each further model against the first; ``None`` without labels."""
        metrics = [model.metrics for model in self.models]
        return tuple(
            compare(metrics[0], other, seed=self.seed)
            if metrics[0].examples is not None and other.examples is not None
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
        """Say in plain words what came out, how sure it is, and what it is worth.

        Returns:
            A few sentences; the first begins with the verdict.
        """
        sentences = " ".join([self._headline(), *self._remarks()])
        if self.verdict is None:
            return sentences[:1].upper() + sentences[1:]
        return f"{self.verdict}: {sentences}"

    def to_json(self) -> dict[str, Any]:
        """Put everything into plain containers; numbers that are not finite become ``None``.

        Returns:
            What ``report.json`` holds.
        """
        content = {
            "bnfix": __version__,
            "command": self.command,
            "verdict": self.verdict,
            "verdict_sentence": self.verdict_sentence(),
            "temperature_only": self.temperature_only,
            "n_seen": self.n_seen,
            "data": None if self.data is None else _data_json(self.data),
            "models": [_model_json(model) for model in self.models],
            "paired": [
                _paired_json(model.name, self.models[0].name, paired)
                for model, paired in zip(self.models[1:], self.paired, strict=True)
            ],
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "decisions": [dataclasses.asdict(d) for d in self._decisions()],
            "calibration": _without(self.calibration, "layers"),
            "choice": _without(self.choice, "curve", "decisions", "weights"),
            "curve": [dataclasses.asdict(point) for point in self.choice.curve]
            if self.choice
            else [],
            "training_curve": [dataclasses.asdict(run) for run in self.finetunings],
            "swap": _without(self.swap),
            "per_class": self._per_class,
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

    def to_markdown(self) -> str:
        """Write the tables and sentences as Markdown.

        Returns:
            The text; names cannot break out of their place.
        """
        return self._render("report.md.j2", ())

    def to_html(self) -> str:
        """Write one page, complete in itself, for light, dark, phone and print.

        Returns:
            The text; names cannot break out of their place.
        """
        return self._render("report.html.j2", self._pictures())

    def save(self, json_path: Path, md_path: Path, html_path: Path) -> None:
        """Write the three files, each whole or not at all.

        Args:
            json_path: for the numbers.
            md_path: for the Markdown.
            html_path: for the page.
        """
        for path, text in zip((json_path, md_path, html_path), self.texts(), strict=True):
            write_text(path, text)

    def texts(self) -> tuple[str, str, str]:
        """Write out all three forms.

        Returns:
            JSON, Markdown and the page.
        """
        as_json = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        return as_json, self.to_markdown(), self.to_html()

    def _headline(self) -> str:
        """The first sentence, without the verdict's word."""
        if not self.models:
            n = len(self.swap.changes) if self.swap else 0
            done = f"{count(n)} norm {'layer' if n == 1 else 'layers'} swapped; " if n else ""
            return f"{done}no model was evaluated, so nothing is claimed."
        last, images = self.models[-1].metrics, self._images()
        if last.top1 is None:
            return f"the {images} have no labels, so nothing can be proven."
        if len(self.models) == 1:
            low, high = (100 * end for end in last.interval["top1"])
            return f"{percent(last.top1)} of {images} right (95% interval {low:.1f} to {high:.1f})."
        first, paired = self.models[0].metrics, self.paired[-1]
        if paired is None or first.top1 is None:
            return f"{percent(last.top1)} of {images} right; the first model was not measured."
        if self._judged_by_nll():
            return (
                f"NLL {number(last.nll)} on {images}, {number(first.nll)} {self._reference()}; "
                f"the difference is {difference(paired.nll)}."
            )
        no = "no measurable difference: " if paired.verdict == "same" else ""
        return (
            f"{no}{percent(last.top1)} of {images} right, {percent(first.top1)} "
            f"{self._reference()}; the difference is {difference(paired.top1, points=True)}."
        )

    def _remarks(self) -> list[str]:
        """What else must be known to judge the headline."""
        remarks: list[str] = []
        paired = self.paired[-1] if self.paired else None
        if paired is not None:
            first, last = self.models[0].metrics, self.models[-1].metrics
            if self._judged_by_nll():
                one, other, of = percent(last.top1), percent(first.top1), paired.top1
                remarks.append(
                    f"Top-1 {direction(of)}: {one}, {other} {self._reference()} "
                    f"(difference {difference(of, points=True)})."
                )
            else:
                remarks.append(
                    f"NLL {direction(paired.nll)}: {number(last.nll)}, {number(first.nll)} "
                    f"{self._reference()} (difference {difference(paired.nll)})."
                )
        if self.temperature_only:
            remarks.append(
                "Temperature scaling alone would do: nothing of the gain is left after it."
            )
        if self.n_seen:
            remarks.append(
                f"{count(self.n_seen)} of these images were used for fitting or choosing, so this "
                "is no proof."
            )
        return remarks

    def _judged_by_nll(self) -> bool:
        """Whether NLL, not top-1, carries the verdict."""
        paired = self.paired[-1] if self.paired else None
        if paired is None or paired.verdict == "same":
            return False
        low, high = paired.top1.interval
        return not (low > 0 if paired.verdict == "better" else high < 0)

    def _reference(self) -> str:
        if self.command in _BEFORE and len(self.models) == 2:
            return "before"
        return f"with {clean(self.models[0].name)}"

    def _images(self) -> str:
        is_test = self.data is not None and self.data.splits.get("test") and not self.n_seen
        return f"{count(self.models[-1].metrics.n_examples)} {'test ' if is_test else ''}images"

    def _decisions(self) -> tuple[Decision, ...]:
        return self.decisions or (self.choice.decisions if self.choice else ())

    @cached_property
    def _per_class(self) -> list[dict[str, Any]]:
        """Top-1 of every class that has examples, one number a model."""
        examples = [model.metrics.examples for model in self.models]
        if not examples or examples[0] is None:
            return []
        n = np.bincount(examples[0].labels)
        right = [
            None if e is None else np.bincount(e.labels, e.right, minlength=len(n))
            for e in examples
        ]
        given = (self.data.class_names if self.data else None) or ()
        return [
            {
                "class": int(c),
                "name": given[c] if c < len(given) else f"class {c}",
                "n_examples": int(n[c]),
                "top1": [None if r is None else float(r[c] / n[c]) for r in right],
            }
            for c in np.flatnonzero(n)
        ]

    def _pictures(self) -> list[figures.Picture]:
        """Those for which there is something to show."""
        labelled = [(m.name, m.metrics) for m in self.models if m.metrics.reliability]
        decisions, rates = self._decisions(), [m.metrics.images_per_second for m in self.models]
        drifts = [[getattr(layer, name) for layer in self.layers] for name in _DRIFTS]
        points = [p for p in (self.choice.curve if self.choice else ()) if math.isfinite(p.nll)]
        runs = [run for run in self.finetunings if len(run.curve) > 1]
        made: list[figures.Picture | None] = [
            figures.gate(decisions) if decisions else None,
            figures.reliability([labelled[0], labelled[-1]][: len(labelled)]) if labelled else None,
            figures.weights_over_depth([layer.example_weight for layer in self.layers])
            if self._any_weight()
            else None,
            figures.weight_curve(points) if len(points) > 1 else None,
            figures.drift(*drifts)
            if any(v and math.isfinite(v) for values in drifts for v in values)
            else None,
            figures.training(runs) if runs else None,
            self._class_picture(),
            figures.speed([(m.name, rate) for m, rate in zip(self.models, rates, strict=True)])
            if any(rate > 0 for rate in rates)
            else None,
        ]
        return [picture for picture in made if picture is not None]

    def _any_weight(self) -> bool:
        return any(np.any(layer.example_weight) for layer in self.layers)

    def _class_picture(self) -> figures.Picture | None:
        if not self.paired or self.paired[-1] is None:
            return None
        rows = self._per_class
        first, last = self.models[0].metrics.examples, self.models[-1].metrics.examples
        if len(rows) < 2 or first is None or last is None:
            return None
        n = np.array([row["n_examples"] for row in rows])
        top1 = np.array([(row["top1"][0], row["top1"][-1]) for row in rows])
        changed = np.bincount(first.labels, first.right != last.right)[[r["class"] for r in rows]]
        variance = np.maximum(changed / n - (top1[:, 1] - top1[:, 0]) ** 2, 0)
        names = [row["name"] for row in rows]
        return figures.per_class(names, n, top1[:, 0], top1[:, 1], np.sqrt(variance / n))

    def _render(self, template: str, pictures: Sequence[figures.Picture]) -> str:
        headline = self._headline()
        badge = _BADGES.get(self.verdict or "", "Not proven")
        if self.verdict is not None and self.n_seen:
            badge += ", no proof"
        if self.verdict is None and self.models and self.models[-1].metrics.top1 is not None:
            badge = "Measured"
        elif not self.models:
            badge = "Done"
        return render(
            template,
            r=self,
            version=__version__,
            badge=badge,
            headline=headline[:1].upper() + headline[1:],
            remarks=self._remarks(),
            done=_done(self),
            left_out=_left_out(self),
            decisions=self._decisions(),
            pictures=pictures,
            per_class=self._per_class,
            options=dict(flat(self.options)),
            any_weight=self._any_weight(),
            changed=sorted(self._per_class, key=_change),
        )


def report_paths(out: Path) -> tuple[Path, Path, Path]:
    """The report's files beside an output file.

    Args:
        out: for example ``net.safetensors``.

    Returns:
        ``net.safetensors.report.json``, ``.md`` and ``.html``.
    """
    json_path, md_path, html_path = (
        out.with_name(f"{out.name}.report.{kind}") for kind in ("json", "md", "html")
    )
    return json_path, md_path, html_path


def _change(row: dict[str, Any]) -> float:
    """Sorts the largest change of a class first."""
    first, last = row["top1"][0], row["top1"][-1]
    return 0.0 if first is None or last is None else -abs(last - first)


def _data_json(data: DataUsed) -> dict[str, Any]:
    values = {f.name: getattr(data, f.name) for f in dataclasses.fields(data)}
    return {key: value for key, value in values.items() if key != "class_names"}


def _model_json(model: Evaluated) -> dict[str, Any]:
    m = model.metrics
    names = ("top1", "top5", "nll", "nll_temperature_scaled", "temperature", "brier", "ece")
    return {
        "name": model.name,
        "file": model.file,
        "sha256": model.sha256,
        "n_examples": m.n_examples,
        "n_live": model.n_live,
        **{name: getattr(m, name) for name in names},
        "interval": {"top1": None, "nll": None, **m.interval},
        "images_per_second": m.images_per_second or None,
    }


def _paired_json(name: str, against: str, paired: Paired | None) -> dict[str, Any]:
    shown = ("top1", "nll", "nll_temperature_scaled", "verdict", "temperature_only")
    values = _without(paired) or dict.fromkeys(shown)
    return {"name": name, "against": against, **{key: values[key] for key in shown}}


def _without(record: Any, *names: str) -> dict[str, Any] | None:
    if record is None:
        return None
    return {key: value for key, value in dataclasses.asdict(record).items() if key not in names}


def _done(report: Report) -> list[str]:
    """What was done, one sentence each."""
    told = []
    if report.swap and report.swap.changes:
        found = [c.difference for c in report.swap.changes if c.difference is not None]
        exact = f"; no output changes by more than {max(found):.1g} of its range" if found else ""
        told.append(f"{count(len(report.swap.changes))} norm layers were swapped{exact}.")
    if c := report.calibration:
        told.append(
            f"Population statistics ({c.target}, {c.feed} feed) were measured on "
            f"{count(c.n_examples)} images in {count(c.n_batches)} batches: "
            f"{len(c.layers)} layers, {_passes(c.passes)}, {c.seconds:.1f} s."
        )
    if w := report.choice:
        chosen = {"keep": "kept as it was", "global": "one for the model"}.get(w.chosen)
        told.append(
            f"Example weight: {chosen or 'one per ' + w.chosen}; {w.n_live} layers use it. "
            f"The search took {_passes(w.passes)}, {w.seconds:.1f} s."
        )
    for run in report.finetunings:
        kept = f"epoch {run.best_epoch} was kept" if run.best_epoch else "nothing was kept"
        told.append(
            f"Fine-tuning of {run.trained}: {count(run.n_parameters)} numbers, "
            f"{count(run.n_steps)} steps, {run.seconds:.1f} s; {kept}."
        )
    if decisions := report._decisions():
        n = sum(d.admitted for d in decisions)
        told.append(
            f"{n} of {len(decisions)} candidates passed the gate, on "
            f"{count(decisions[0].n_examples)} images of the select split."
        )
    return told


def _left_out(report: Report) -> list[str]:
    """What was assumed or skipped, one sentence each."""
    told = list(report.assumptions)
    if report.swap:
        told += [*report.swap.notes, *_grouped("Not swapped", report.swap.skipped)]
    if c := report.calibration:
        told += _grouped("Statistics left as they were, never reached", c.never_reached)
        told += _grouped("Statistics left as they were, frozen or excluded", c.left_alone)
        told += _grouped("Called more than once a pass, calls pooled", c.called_again)
    if report.choice:
        told += _grouped("Example weight left as it was", report.choice.excluded)
    told += [
        f"Fine-tuning of {run.trained}: {run.n_skipped_steps} steps left out, not finite."
        for run in report.finetunings
        if run.n_skipped_steps
    ]
    if report.data and report.data.n_skipped:
        n = report.data.n_skipped
        shown = f": {some(report.data.skipped, 8)}" if report.data.skipped else ""
        told.append(f"{count(n)} unreadable {'image' if n == 1 else 'images'} left out{shown}.")
    return list(dict.fromkeys(told))


def _passes(n: float) -> str:
    return f"{n:.3g} {'pass' if n == 1 else 'passes'}"


def _grouped(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {some(names, 8)}."] if names else []
