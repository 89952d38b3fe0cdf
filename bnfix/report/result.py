"""A finished command and its files: a checkpoint, a hub folder with its card, or an export."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from markupsafe import Markup
from torch import nn

from bnfix.checkpoints.alike import (
    REPORTS,
    Folder,
    check_folder_output,
    check_like_input,
    folder_of,
    save_folder,
    save_like_input,
)
from bnfix.checkpoints.load import hub_folder, origin_of
from bnfix.checkpoints.save import check_free, check_output, metadata_of, save, write_bytes
from bnfix.core import __version__, distributed
from bnfix.core.errors import Note, count, name_error, some
from bnfix.core.settings import ModelRecipe, Preprocessing
from bnfix.deploy import forms
from bnfix.deploy.fold import Folding
from bnfix.deploy.forms import Agreement
from bnfix.metrics.task import ByRows
from bnfix.report.pages import clean, fields_of, percent, plain_json, render
from bnfix.report.records import DataUsed, Evaluated, n_live
from bnfix.report.report import Report, json_text, report_paths, write_texts


@dataclass(frozen=True, repr=False)
class Result:
    """A finished command: the model, the report, and the entry for the output's history.

    Args:
        model: the model, in evaluation mode, on its device.
        report: all measurements and steps.
        entry: this command's entry in the history.
        preprocessing: the preprocessing stored in the output.
    """

    model: nn.Module
    report: Report
    entry: Mapping[str, Any]
    preprocessing: Preprocessing | None = None

    def __repr__(self) -> str:
        report = self.report
        n_live = report.models[-1].n_live if report.models else 0
        verdict = report.verdict or "no verdict"
        return (
            f"Result({report.command}: {verdict}, {len(report.models)} models measured, "
            f"{count(len(report.layers), 'norm layers')}, {n_live} of them live)"
        )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the checkpoint with its three reports, or a hub folder with all of them.

        Args:
            path: a name that ends in ``.safetensors``, with which the reports' names start; or a
                folder, if the model came from a hub folder; or, with ``like_input``, a name with
                the input's suffix.
            force: replace existing files, or a folder that bnfix wrote.

        Raises:
            CheckpointError: if a file exists or cannot be written.
        """
        path, origin = Path(path), origin_of(self.model)
        options = self.report.options.get("model") or {}
        recipe = ModelRecipe(like_input=options.get("like_input", False))
        place = origin.place
        source = None if place is None else origin.folder or place.path
        form = check_outputs(path, source, recipe, force=force)
        texts = self.report.texts()  # first: without a report nothing is written
        known: dict[str, Any] = {"entry": self.entry, "preprocessing": self.preprocessing}
        if place is not None and form == "folder":
            folder = folder_of(place.path.parent, self.preprocessing)
            line = self.report.command_line
            card = card_of(self.report, self.model, folder, path=path, command_line=line)
            files = dict(zip(REPORTS, texts, strict=True)) | {"README.md": card}
            save_folder(self.model, path, metadata_of(self.model, **known), files, place)
            return
        if place is not None and form == "like input":
            save_like_input(self.model, path, place, force=force)
        else:
            save(self.model, path, force=force, **known)
        write_texts(report_paths(path), texts)

    def save_by_first(self, path: str | Path, *, force: bool = False) -> None:
        """Call `save` in the first of several processes."""

        def write() -> None:
            if distributed.here().is_first:
                self.save(path, force=force)

        distributed.together(write)


def check_outputs(
    path: str | Path, source: str | Path | None, recipe: ModelRecipe = ModelRecipe(), *, force: bool
) -> str:
    """Check before any work that an output and its reports can be written; return its form.

    Returns:
        ``file``, ``folder`` or ``like input``.
    """
    path, form = Path(path), "file"
    folder = None if source is None else hub_folder(source)
    if recipe.like_input and source is not None:
        form = "like input"
        check_like_input(path, Path(source), force=force)
    elif folder is not None and path.suffix != ".safetensors":
        check_folder_output(path, folder, force=force)
        return "folder"
    else:
        check_output(path, force=force)
    check_free(*report_paths(path), force=force)
    return form


# --- the card of a hub folder ---

#: The hub's names of bnfix's tasks.
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
    report: Report, model: nn.Module, folder: Folder, *, path: Path, command_line: str
) -> str:
    """The text of a README.md: YAML front matter (JSON values are valid YAML) and Markdown."""
    name = clean(path.name)
    measured = results_of(report.models[-1]) if report.models else []
    pipeline = _PIPELINES.get(report.task.name, "other")
    kept, kind = dict(folder.kept), type(model).__name__
    front: dict[str, Any] = {"library_name": folder.library}
    known = measured or folder.library == "timm" or kind.endswith("ForImageClassification")
    for key, usual in (("license", ""), ("pipeline_tag", pipeline if known else "")):
        front |= {key: one} if (one := next(iter(kept[key]), usual)) not in ("", "other") else {}
    front |= {"datasets": kept["datasets"]} if kept["datasets"] else {}
    if measured and report.data is not None:
        result = {"task": {"type": pipeline}, "dataset": _measured_on(report.data)}
        front["model-index"] = [{"name": name, "results": [result | {"metrics": measured}]}]
    front["tags"] = [*(tag for tag in kept["tags"] if tag != "bnfix"), "bnfix"]
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
        kind=kind,
        live=n_live(model),
        metrics=measured,
        version=__version__,
    )
    return text.rstrip() + "\n"


def _measured_on(data: DataUsed) -> dict[str, str]:
    """The data of a model index, by the names of its file and of the corruption."""
    spec = data.spec if data.test is None else data.test["spec"]
    name = clean(re.split(r"[/\\]", spec)[-1]) or "data"
    under = f" under {data.corruption}" if data.corruption else ""
    return {"name": name + under, "type": re.sub(r"[^\w.-]+", "-", name), "split": "test"}


def results_of(model: Evaluated) -> list[dict[str, Any]]:
    """A model's metrics with their intervals, in the form of a model index."""
    m, names = model.metrics, _METRICS
    if isinstance(m.task, ByRows):
        words = m.task.words
        names = {"top1": (words.score_heading,) * 2, "nll": (words.loss_heading,) * 2}
        names |= {key: (key, heading) for key, heading in m.task.headings.items()}
    found = []
    for key, (kind, name) in names.items():
        if (value := m.number(key)) is None:
            continue
        counted: dict[str, Any] = {"n": m.n_examples}
        if (interval := m.interval.get(key)) is not None:
            counted["interval"] = [round(end, 4) for end in interval]
        found.append({"type": kind, "name": name, "value": round(value, 4), "args": counted})
    return found


# --- exports ---

#: The choices of `--to`, with the suffix of each file.
SUFFIXES: Final = {
    "onnx": ".onnx", "pt2": ".pt2", "folded": ".safetensors", "plain": ".py", "onnx-int8": ".onnx",
}  # fmt: skip
#: End of the second file's name; it must not replace a checkpoint or code of the user.
_COMPANIONS: Final = {"folded": "_loader.py", "plain": "_weights.safetensors"}
_TITLES: Final = {
    "onnx": "The ONNX file",
    "pt2": "The torch.export file",
    "folded": "The folded model",
    "plain": "The plain file",
    "onnx-int8": "Before quantization, the ONNX file",
}


@dataclass(frozen=True)
class Verified:
    """The verification of an export."""

    agreement: Agreement
    atol: float  # largest accepted difference, relative as in `Agreement`
    inputs: str  # images or noise
    input_shape: tuple[int, ...]
    other_shape: tuple[int, ...] | None = None  # also checked if height and width are free


@dataclass(frozen=True)
class Int8:
    """An 8-bit ONNX file compared with its float version."""

    n_calibrated: int  # images on which the ranges of activations were measured
    top1_agreement: float | None  # on the test images; None if outputs are not classes
    max_drop: float | None = None  # points of top-1
    bound: float | None = None  # the largest drop that is not ruled out, as a fraction

    def remarks(self) -> list[str]:
        """Facts for the report, one sentence each."""
        same = self.top1_agreement
        top1 = "" if same is None else f"; top-1 agrees with float on {percent(same)}"
        sentences = [f"Calibrated on {count(self.n_calibrated, 'other images')}{top1}."]
        if self.bound is not None and self.max_drop is not None:
            sentences.append(
                f"Within --max-drop {self.max_drop:g}: a top-1 drop of {100 * self.bound:.2f} "
                "points or more is ruled out at 95%."
            )
        return sentences


@dataclass(frozen=True)
class Export:
    """A checkpoint in another form, verified."""

    to: str
    content: bytes
    companion: bytes | None  # the loader of folded weights, or the weights of a plain file
    report: Report  # has models if the cost of zeroed weights was measured
    verified: Verified
    opset: int | None = None  # ONNX only
    operators: Mapping[str, int] = field(default_factory=dict)  # ONNX only: number of each kind
    folding: Folding | None = None
    live: tuple[str, ...] = ()  # layers that weigh the example in this form
    zeroed: tuple[str, ...] = ()  # layers whose weights were set to 0 on request
    cost: Agreement | None = None  # outputs with weights 0 against the outputs before
    int8: Int8 | None = None

    @staticmethod
    def files(to: str, path: Path) -> tuple[Path, ...]:
        """The requested file, and the second one if the form has two."""
        other = _COMPANIONS.get(to)
        return (path,) if other is None else (path, path.with_name(path.stem + other))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the form's files and three reports, each completely or not at all."""
        path = Path(path)
        check_exports(self.to, path, force=force)
        texts = self.texts()
        files = self.files(self.to, path)
        contents = [self.content] if self.companion is None else [self.content, self.companion]
        if len(files) == 2:
            python, weights = files if self.to == "plain" else files[::-1]
            i = files.index(python)
            contents[i] = forms.named(contents[i], weights)
        # The requested file comes last: once it exists, the export is complete.
        for place, content in zip(files[::-1], contents[::-1], strict=True):
            write_bytes(place, content)
        write_texts(report_paths(path), texts)

    def texts(self) -> tuple[str, str, str]:
        """The report as JSON, Markdown and HTML."""
        values = {
            "e": self,
            "r": self.report,
            "what": f"bnfix export --to {self.to}",
            "of_model": "",
            "version": __version__,
            "verdict": "none",
            "badge": "Exported",
            "fates": self._fates(),
            "headline": self.sentence(),
            "remarks": [Note(remark) for remark in self.remarks()],
            "left_out": self.report.assumptions,
            "options": {},
        }
        markdown, page = render("export.md.j2", **values), render("export.html.j2", **values)
        return json_text(self.to_json()), markdown, page

    def to_json(self) -> dict[str, Any]:
        """The keys of every report, plus ``export``."""
        folding, named = self.folding, ("to", "opset", "operators", "live", "zeroed")
        export = {
            **{name: getattr(self, name) for name in named},
            **fields_of(self.verified, "agreement"),
            "verification": self.verified.agreement,
            "folded": [] if folding is None else folding.folded,
            "folds_checked_on": None if folding is None else folding.checked_on,
            "traced_by": None if folding is None else folding.traced_by,
            "left": self._left(),
            "cost_of_zero": self.cost,
            **({} if self.int8 is None else {"int8": self.int8}),
        }
        content = {**self.report.to_json(), "verdict_sentence": self.sentence(), "export": export}
        plain: dict[str, Any] = plain_json(content)
        return plain

    def sentence(self) -> str:
        """The result in one sentence; for 8 bits, the verdict against float with its remarks."""
        if self.int8 is not None:
            return f"The int8 ONNX file against float: {self.report.verdict_sentence()}"
        return self._agreement()

    def _agreement(self) -> str:
        a = self.verified.agreement
        inputs = "images" if self.verified.inputs == "images" else "inputs of seeded noise"
        sizes = " and ".join(map(str, a.batch_sizes))
        top1 = "" if a.top1_agreement is None else f", top-1 agrees on {percent(a.top1_agreement)}"
        of = f" of {a.largest_output:.3g}" if a.largest_output > 1 else ""
        return (
            f"{_TITLES[self.to]} agrees with PyTorch to {a.max_difference:.1e}{of} on "
            f"{count(a.n_examples)} {inputs} at batch sizes {sizes}{top1}."
        )

    def remarks(self) -> list[str]:
        """Further facts, one sentence each."""
        verified = self.verified
        sentences = [] if self.int8 is None else [*self.int8.remarks(), self._agreement()]
        if self.to in ("onnx", "pt2", "onnx-int8"):
            shapes = [verified.input_shape, verified.other_shape]
            size, *more = ("x".join(map(str, shape)) for shape in shapes if shape)
            free = f"any height and width (checked on {size} and {more[0]})" if more else size
            sentences.append(f"It takes any number of inputs of {free}.")
        if self.folding is not None:
            n, left = len(self.folding.folded), self._left()
            others = {name: reason for name, reason in left.items() if name not in self.live}
            sentences.append(
                f"{count(n, 'norm layers')} folded, {len(self.live)} live, {len(others)} unchanged."
            )
            sentences += [f"Not folded: {name}: {why}." for name, why in list(others.items())[:8]]
        elif self.live:
            sentences.append(f"{len(self.live)} norm layers are live: {some(self.live)}.")
        if self.zeroed and self.cost is not None:
            top1 = self.cost.top1_agreement
            same = "" if top1 is None else f"; top-1 is the same as before on {percent(top1)}"
            sentences.append(
                f"All weights and gates of {len(self.zeroed)} layers were set to 0. This changes "
                f"outputs by up to {self.cost.max_difference:.2g}{same}."
            )
            if self.report.models and self.int8 is None:
                sentences.append(f"On labelled images: {self.report.verdict_sentence()}")
        # For 8 bits the table has the speed; these times belong to the float file.
        times = {} if self.int8 else verified.agreement.seconds
        for batch, (ours, theirs) in times.items():
            sentences.append(
                f"A batch of {batch} takes {1000 * theirs:.2f} ms, {1000 * ours:.2f} ms in PyTorch."
            )
        return sentences

    def _fates(self) -> dict[str, str]:
        """The fate of every norm layer, in words."""
        fates = dict.fromkeys((row.name for row in self.report.layers), "unchanged")
        fates |= {name: f"unchanged: {reason}" for name, reason in self._left().items()}
        fates |= dict.fromkeys(self.live, "live, in standard operators")
        if self.folding is not None:
            fates |= {f.norm: f"folded into {f.layer}" for f in self.folding.folded}
        return fates

    def _left(self) -> dict[str, str]:
        return {} if self.folding is None else dict(self.folding.left)


def check_exports(
    to: str, path: str | Path, *, force: bool, checkpoint: str | Path | None = None
) -> None:
    """Check before any work that an export's files can be written.

    The checkpoint that is exported is never replaced, even with ``force``.
    """
    path = Path(path)
    if path.suffix != SUFFIXES[to]:
        better = path.with_suffix(SUFFIXES[to]).name if path.name else f"out{SUFFIXES[to]}"
        ends = f"expected a name that ends in {SUFFIXES[to]} for --to {to}"
        raise name_error(path, f"{ends}. Use {better}.")
    files: Sequence[Path] = (*Export.files(to, path), *report_paths(path))
    check_free(*files, force=force, source=None if checkpoint is None else Path(checkpoint))
