"""A finished command: the model, the report, and how both are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnfix.checkpoints.save import check_free, check_output, save, write_text
from bnfix.core import distributed
from bnfix.core.settings import Preprocessing
from bnfix.report.report import Report, report_paths


@dataclass(frozen=True, repr=False)
class Result:
    """A finished command: the model, the report, and what the output's history will say.

    Args:
        model: in evaluation mode, on the device it ran on.
        report: everything that was measured and done.
        entry: this command's entry in the history.
        preprocessing: stored in the output.
    """

    model: nn.Module
    report: Report
    entry: Mapping[str, Any]
    preprocessing: Preprocessing | None = None

    def __repr__(self) -> str:
        report = self.report
        n_live = report.models[-1].n_live if report.models else 0
        verdict = "no verdict" if report.verdict is None else report.verdict
        return (
            f"Result({report.command}: {verdict}, {len(report.models)} models measured, "
            f"{len(report.layers)} norm layers, {n_live} of them live)"
        )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the checkpoint and its three reports beside it.

        Args:
            path: ends in ``.safetensors``; the reports' names start with it.
            force: replace existing files.

        Raises:
            CheckpointError: if a file exists or cannot be written.
        """
        check_outputs(path, force=force)
        texts = self.report.texts()  # first: what cannot be reported is not written either
        save(self.model, path, force=force, entry=self.entry, preprocessing=self.preprocessing)
        for place, text in zip(report_paths(Path(path)), texts, strict=True):
            write_text(place, text)

    def save_by_first(self, path: str | Path, *, force: bool = False) -> None:
        """Write as `save` does, by the first of several processes.

        Args:
            path: ends in ``.safetensors``.
            force: replace existing files.
        """

        def write() -> None:
            if distributed.here().is_first:
                self.save(path, force=force)

        distributed.together(write)


def check_outputs(path: str | Path, *, force: bool) -> None:
    """Check before any work that the checkpoint and its reports may be written."""
    check_output(path, force=force)
    check_free(*report_paths(Path(path)), force=force)
