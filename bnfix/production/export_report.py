"""What an export made and how it was verified: its files, and its report in three forms."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from bnfix.checkpoints.checkpoint import check_folder, write_bytes
from bnfix.errors import CheckpointError, some
from bnfix.production import plain_files
from bnfix.production.folding import Folding
from bnfix.production.verification import Agreement
from bnfix.reporting.pages import count, percent, plain_json, render
from bnfix.reporting.report import Report, report_paths
from bnfix.reporting.result import check_reports
from bnfix.version import __version__

#: What `--to` offers, and how the file's name ends.
SUFFIXES: Final = {"onnx": ".onnx", "pt2": ".pt2", "folded": ".safetensors", "plain": ".py"}
#: How the file beside it is called, where there is one: unlike checkpoints and the user's own code.
_COMPANIONS: Final = {"folded": "_loader.py", "plain": "_weights.safetensors"}
_TITLES: Final = {
    "onnx": "The ONNX file",
    "pt2": "The torch.export file",
    "folded": "The folded model",
    "plain": "The plain file",
}


@dataclass(frozen=True)
class Export:
    """A checkpoint in another form, verified.

    Args:
        to: the form.
        content: of its file.
        companion: of the file beside it: the loader of folded weights, the weights of a plain file.
        report: layers, data, options; models where the cost of zeroed weights was measured.
        agreement: with the model it came from.
        atol: largest difference that was accepted.
        inputs: ``images`` or ``noise``.
        input_shape: of one input.
        other_shape: another that was checked too, where height and width are free.
        opset: of ONNX's operators.
        operators: how many of each kind, of ONNX.
        folding: which layers went into others, and why not the rest.
        live: layers that weigh the example in this form.
        zeroed: layers whose weights were set to 0 on demand.
        cost: outputs with weights 0 against those before.
    """

    to: str
    content: bytes
    companion: bytes | None
    report: Report
    agreement: Agreement
    atol: float
    inputs: str
    input_shape: tuple[int, ...]
    other_shape: tuple[int, ...] | None = None
    opset: int | None = None
    operators: Mapping[str, int] = field(default_factory=dict)
    folding: Folding | None = None
    live: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    cost: Agreement | None = None

    @staticmethod
    def files(to: str, path: Path) -> tuple[Path, ...]:
        """The files of an export, without its reports."""
        other = _COMPANIONS.get(to)
        return (path,) if other is None else (path, path.with_name(path.stem + other))

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the file, the one beside it, and three reports; each whole or not at all."""
        path = Path(path)
        check_exports(self.to, path, force=force)
        texts = self.texts()
        files = self.files(self.to, path)
        contents = [self.content] if self.companion is None else [self.content, self.companion]
        if len(files) == 2:
            python, weights = files if self.to == "plain" else files[::-1]
            i = files.index(python)
            contents[i] = plain_files.named(contents[i], weights)
        # The file beside it first: the one asked for is there only when all of it is.
        for place, content in zip(files[::-1], contents[::-1], strict=True):
            write_bytes(place, content)
        for place, text in zip(report_paths(path), texts, strict=True):
            write_bytes(place, text.encode("utf-8", errors="backslashreplace"))

    def texts(self) -> tuple[str, str, str]:
        """Write out the report in all three forms."""
        as_json = json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n"
        values = {
            "e": self,
            "r": self.report,
            "version": __version__,
            "fates": self._fates(),
            "sentence": self.sentence(),
            "remarks": self.remarks(),
        }
        return as_json, render("export.md.j2", **values), render("export.html.j2", **values)

    def to_json(self) -> dict[str, Any]:
        """Put everything into plain containers."""
        content = self.report.to_json()
        folding = self.folding
        content["verdict_sentence"] = self.sentence()
        content["export"] = {
            "to": self.to,
            "atol": self.atol,
            "inputs": self.inputs,
            "input_shape": self.input_shape,
            "other_shape": self.other_shape,
            "opset": self.opset,
            "operators": self.operators,
            "verification": dataclasses.asdict(self.agreement),
            "folded": [] if folding is None else [dataclasses.asdict(f) for f in folding.folded],
            "folds_checked_on": None if folding is None else folding.checked_on,
            "traced_by": None if folding is None else folding.traced_by,
            "left": self._left(),
            "live": self.live,
            "zeroed": self.zeroed,
            "cost_of_zero": None if self.cost is None else dataclasses.asdict(self.cost),
        }
        return {key: plain_json(value) for key, value in content.items()}

    def sentence(self) -> str:
        """Say what came out."""
        a = self.agreement
        what = "images" if self.inputs == "images" else "inputs of seeded noise"
        sizes = " and ".join(map(str, a.batch_sizes))
        top1 = "" if a.top1_agreement is None else f", top-1 agrees on {percent(a.top1_agreement)}"
        of = f" of {a.largest_output:.3g}" if a.largest_output > 1 else ""
        return (
            f"{_TITLES[self.to]} agrees with PyTorch to {a.max_difference:.1e}{of} on "
            f"{count(a.n_examples)} {what} at batch sizes {sizes}{top1}."
        )

    def remarks(self) -> list[str]:
        """What else a user should know, one sentence each."""
        told = []
        if self.to in ("onnx", "pt2"):
            size, *more = ("x".join(map(str, s)) for s in (self.input_shape, self.other_shape) if s)
            free = f"any height and width (checked on {size} and {more[0]})" if more else size
            told.append(f"It takes any number of inputs of {free}.")
        if self.folding is not None:
            n, left = len(self.folding.folded), self._left()
            told.append(
                f"{n} norm layers folded, {len(self.live)} live, {len(left) - len(self.live)} left."
            )
            told += [
                f"Not folded: {name}: {reason}."
                for name, reason in list(left.items())[:8]
                if name not in self.live
            ]
        elif self.live:
            told.append(f"{len(self.live)} norm layers weigh the example: {some(self.live)}.")
        if self.zeroed and self.cost is not None:
            top1 = self.cost.top1_agreement
            same = "" if top1 is None else f", and top-1 agrees with before on {percent(top1)}"
            told.append(
                f"{len(self.zeroed)} layers had their example weight set to 0, which changes "
                f"outputs by up to {self.cost.max_difference:.2g}{same}."
            )
            if self.report.models:
                told.append(f"On labelled images that is: {self.report.verdict_sentence()}")
        for batch, (ours, theirs) in self.agreement.seconds.items():
            told.append(
                f"A batch of {batch} takes {1000 * theirs:.2f} ms, {1000 * ours:.2f} ms in PyTorch."
            )
        return told

    def _fates(self) -> dict[str, str]:
        """What became of every norm layer, in words."""
        kept = "as it was" if self.folding is None else "left"
        fates = {row.name: kept for row in self.report.layers}
        fates |= {name: f"left: {reason}" for name, reason in self._left().items()}
        fates |= dict.fromkeys(self.live, "live, in standard operators")
        if self.folding is not None:
            fates |= {f.norm: f"folded into {f.layer}" for f in self.folding.folded}
        return fates

    def _left(self) -> dict[str, str]:
        return {} if self.folding is None else dict(self.folding.left)


def check_exports(
    to: str, path: str | Path, *, force: bool, checkpoint: str | Path | None = None
) -> None:
    """Check before any work that an export's files may be written."""
    path = Path(path)
    if path.suffix != SUFFIXES[to]:
        raise CheckpointError(
            f"{path}: expected a name that ends in {SUFFIXES[to]} for --to {to}. Use "
            f"{path.with_suffix(SUFFIXES[to]).name if path.name else f'out{SUFFIXES[to]}'}.",
            path=path,
        )
    files: Sequence[Path] = (*Export.files(to, path), *report_paths(path))
    check_folder(path)
    check_reports(files, force=force)
    if checkpoint is not None and any(_same(file, Path(checkpoint)) for file in files):
        raise CheckpointError(
            f"{path}: would replace the checkpoint itself, which no export can stand for. Give "
            "another name.",
            path=path,
        )


def _same(one: Path, other: Path) -> bool:
    return one.exists() and other.exists() and one.samefile(other)
