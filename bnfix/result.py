"""A finished command: the model, the report, and how both are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnfix.checkpoint import check_output
from bnfix.errors import CheckpointError
from bnfix.recipe import Preprocessing
from bnfix.report import Report, report_paths
from bnfix.saving import save


@dataclass(frozen=True)
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

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the checkpoint and its three reports beside it.

        Args:
            path: ends in ``.safetensors``; the reports' names start with it.
            force: replace existing files.

        Raises:
            CheckpointError: if a file exists or cannot be written.
        """
        check_outputs(path, force=force)
        save(self.model, path, force=force, entry=self.entry, preprocessing=self.preprocessing)
        self.report.save(*report_paths(Path(path)))


def check_outputs(path: str | Path, *, force: bool) -> None:
    """Check before any work that the checkpoint and its reports may be written.

    Args:
        path: of the checkpoint.
        force: whether existing files may be replaced.

    Raises:
        CheckpointError: if one of them exists, or the folder cannot be written to.
    """
    check_output(path, force=force)
    existing = [p for p in report_paths(Path(path)) if p.exists() and not force]
    if existing:
        raise CheckpointError(
            f"{existing[0].name}: already exists. Give another name, or --force to replace it.",
            path=existing[0],
        )
