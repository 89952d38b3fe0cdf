"""The report of a command as JSON, Markdown and one HTML page, its files, and `--predictions`."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.save import check_folder, check_free, write_bytes, write_text
from bnfix.core import __version__
from bnfix.core.errors import ConfigError, plain
from bnfix.metrics.beside import Custom, Uncertain
from bnfix.metrics.compare import Decision, Paired
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import Metrics, chunks, log_softmax, losses_of
from bnfix.metrics.robustness import BatchInvariance, Shifted, Tiled
from bnfix.metrics.task import LABELS, Array, ByRows
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.report import plots
from bnfix.report.pages import fields_of, flat, plain_json, render
from bnfix.report.records import (
    ClassRow,
    DataUsed,
    Evaluated,
    LayerRow,
    Rank,
    Trials,
    class_change_errors,
    class_rows,
    done,
    left_out,
    ranking,
)
from bnfix.report.verdict import Findings

#: Metrics against a reference, and their names in the JSON of a model.
_AGREEMENT = {"top1": "agreement", "nll": "divergence"}


def model_json(model: Evaluated) -> dict[str, Any]:
    """The JSON of a model; ``custom`` only if the user has own metrics."""
    m, agreement = model.metrics, agreement_json(model.agreement)
    columns = m.task.columns if isinstance(m.task, ByRows) else LABELS.columns
    named = {column.key: m.number(column.key) for column in columns}
    if not isinstance(m.task, ByRows):
        named["temperature"] = m.temperature
    ends = {} if model.agreement is None else model.agreement.interval
    intervals = {name: ends[key] for key, name in _AGREEMENT.items() if key in ends}
    return {
        **{name: getattr(model, name) for name in ("name", "file", "sha256", "n_live")},
        "n_examples": m.n_examples,
        **({"n_groups": n} if (n := m.examples and m.examples.n_groups) else {}),
        **({"preprocessing": asdict(p)} if (p := model.preprocessing) else {}),
        **named,
        **agreement,
        "interval": {"top1": None, "nll": None, **m.interval, **intervals},
        "images_per_second": m.images_per_second or None,
        **({"custom": {c.name: _custom_json(c) for c in model.custom}} if model.custom else {}),
    }


def agreement_json(agreement: Metrics | None) -> dict[str, float | None]:
    """Agreement with a reference and divergence from it; nothing without one."""
    if agreement is None:
        return {}
    return {name: getattr(agreement, key) for key, name in _AGREEMENT.items()}


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
    """JSON values under the names of a task: loss, and score if it has one."""
    if isinstance(content, list):
        return [renamed(item, task) for item in content]
    if not isinstance(content, dict):
        return content
    found, none = {}, ("nll_temperature_scaled", "by_reference")
    for key, value in content.items():
        name = key.replace("nll", "loss").replace("top1", "score")
        if key in none or ("top1" in key and not task.words.score):
            continue
        # The user's own names stay unchanged.
        own = key in ("custom", "options")
        found[key if own else name] = value if own else renamed(value, task)
    return found


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
                "class and half random (mixed), and one by one (single). All orders give the same "
                "numbers, unless a model's predictions depend on the other images in the batch",
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
        """The whole report in plain containers; numbers that are not finite become ``None``."""
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
            "paired": self._paired_json(),
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
            "corruptions": self._shifted_json(self.corruptions),
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

    def _paired_json(self) -> list[dict[str, Any]]:
        rows = []
        for model, pair, agreed in zip(self.models[1:], self.paired, self.agreed, strict=True):
            rows.append(paired_json(model.name, self.models[0].name, pair))
            if agreed is not None:
                rows[-1] |= {"agreement": agreed.top1, "divergence": agreed.nll}
                rows[-1]["agreement_verdict"] = agreed.verdict
        return rows

    def _class_json(self, row: ClassRow) -> dict[str, Any]:
        value, n = ("top1", "examples") if self.by_rows is None else self.by_rows.of_class
        found = {f"n_{n.lower()}": row.n_examples, value.lower(): row.top1}
        return {"class": row.index, "name": row.name, **found}

    def _data_json(self, data: DataUsed) -> dict[str, Any]:
        # The number of groups is present only if there are groups.
        return fields_of(data, "class_names", "noun", *(() if data.n_groups else ("n_groups",)))

    def _shifted_json(self, rows: Sequence[Shifted]) -> list[dict[str, Any]]:
        first = self.models[0].name if self.models else ""
        return [
            {**fields_of(row), "paired": row.paired and paired_json(row.model, first, row.paired)}
            for row in rows
        ]

    def _streams_json(self) -> list[dict[str, Any]]:
        rows = self._shifted_json(self.streams)
        for row in rows:
            row["stream"], row["batch_size"] = row.pop("kind"), row.pop("severity")
        return rows

    def _uncertainty_json(self) -> list[dict[str, Any]]:
        pairs = zip(self.models, self.uncertainty, strict=True)
        return [{"model": model.name, **fields_of(row)} for model, row in pairs]

    def _tried_json(self, result: Any, *left_out: str) -> dict[str, Any] | None:
        """A search or a run, and whether its result is in the output."""
        # By identity: of two runs with equal numbers only one is in the output.
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

    def _pictures(self) -> list[plots.Picture]:
        """The plots that have data."""
        labelled = [(m.name, m.metrics) for m in self.models if m.metrics.reliability]
        rates = [(m.name, m.metrics.images_per_second) for m in self.models]
        drifts = [[getattr(layer, name) for layer in self.layers] for name in _DRIFTS]
        drifted = any(v and math.isfinite(v) for values in drifts for v in values)
        choice = self.trials.choice
        # The curve leaves out weights at which the network overflows.
        points = [p for p in (choice.curve if choice else ()) if math.isfinite(p.nll)]
        runs = [run for run in self.trials.finetunings if len(run.curve) > 1]
        weights = [layer.example_weight for layer in self.layers]
        ends = [labelled[0], labelled[-1]][: len(labelled)] if labelled else []
        words = self.task.words
        shifted = self.corruptions and words.score
        made: list[plots.Picture | None] = [
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
        """The number of layers that weigh the batch, and the largest weight; empty for none."""
        highest = [b for row in self.layers if (b := float(np.max(row.batch_weight, initial=0)))]
        if not highest:
            return ""
        return (
            f"{len(highest)} of {len(self.layers)} norm layers weigh the batch, by up to "
            f"{max(highest):.3g}: predictions depend on the other images in the batch."
        )

    def _class_picture(self) -> plots.Picture | None:
        rows = self._classes
        if self.by_rows is not None or self._last_pair is None or len(rows) < 2:
            return None
        errors = class_change_errors(self.models, rows)
        return None if errors is None else plots.per_class(rows, errors)

    def _render(self, template: str, pictures: Sequence[plots.Picture]) -> str:
        headline = self.headline()
        return render(
            template,
            r=self,
            version=__version__,
            what=f"bnfix {self.command}",
            of_model=f" of {self.models[-1].name}" if self.models else "",
            verdict=self.verdict or "none",
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
            compared=[c for c in self.columns if c.tested or self.by_rows],
            custom_names=list(dict.fromkeys(c.name for m in self.models for c in m.custom)),
            options=dict(flat(self.options)),
            any_weight=self._any_weight(),
            batch_weights=self._batch_weights(),
        )


def report_paths(out: Path) -> tuple[Path, ...]:
    """The report's files next to an output: ``net.safetensors.report.json``, ``.md``, ``.html``."""
    return tuple(out.with_name(f"{out.name}.report.{kind}") for kind in ("json", "md", "html"))


def json_text(content: dict[str, Any]) -> str:
    """A report's JSON as the text of a file."""
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def write_texts(paths: Iterable[Path], texts: Iterable[str]) -> None:
    """Write the files of a report, each completely or not at all."""
    for path, text in zip(paths, texts, strict=True):
        write_text(path, text)


def check_report_folder(folder: Path, *, force: bool) -> tuple[Path, ...]:
    """Check before any work that a folder can get a report; return the report's files."""
    paths = tuple(folder / f"report.{kind}" for kind in ("json", "md", "html"))
    check_folder(paths[0], makes=True)
    if folder.exists():
        check_free(*paths, force=force)
    return paths


# --- the table of predictions ---

TABLES = (".csv", ".parquet")


def check_predictions(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a file that cannot be written."""
    if path.suffix.lower() not in TABLES:
        raise ConfigError(
            f"--predictions: {plain(path)}, expected a name ending in {' or '.join(TABLES)}.",
            name="predictions",
        )
    check_free(path, force=force)
    if path.suffix.lower() == ".parquet":
        _pyarrow()


def table_of(
    names: Sequence[str], examples: Sequence[str], found: Sequence[Outputs]
) -> dict[str, list[Any] | Array]:
    """Columns of the table: file, label, and for each model prediction, confidence, NLL."""
    labels = found[0].labels
    columns: dict[str, list[Any] | Array] = {"file": list(examples)}
    if labels is not None:
        columns["label"] = labels.astype(np.int64)
    for name, one in zip(names, found, strict=True):
        confidence = np.empty(len(one.outputs))
        for part in chunks(one.outputs):
            confidence[part] = np.exp(log_softmax(one.outputs[part]).max(1))
        columns[f"{name}.prediction"] = one.outputs.argmax(1)
        columns[f"{name}.confidence"] = confidence
        if one.labels is not None:
            columns[f"{name}.nll"] = losses_of(one.outputs, one.labels.astype(np.int64))
    return columns


def write_predictions(path: Path, columns: dict[str, list[Any] | Array]) -> None:
    """Write the table, whole or not at all; an existing file is replaced."""
    if path.suffix.lower() == ".csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*(_shown(column) for column in columns.values()), strict=True))
        write_text(path, text.getvalue())
        return
    arrow, parquet = _pyarrow()
    names = [_utf8(name) for name in columns]
    values = [list(map(_utf8, c)) if isinstance(c, list) else c for c in columns.values()]
    table = arrow.table(values, names=names)
    content = io.BytesIO()
    parquet.write_table(table, content)
    write_bytes(path, content.getvalue())


def _utf8(text: object) -> str:
    """A text without the half characters that a file name can contain."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def _shown(column: list[Any] | Array) -> list[Any]:
    if isinstance(column, list):
        return column
    if column.dtype.kind == "f":
        return [f"{value:.9g}" for value in column]
    return list(column.tolist())


def _pyarrow() -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            "--predictions: a .parquet file needs pyarrow, which is not installed. Give a .csv "
            'file, or: pip install "bnfix[parquet]".',
            name="predictions",
        ) from error
