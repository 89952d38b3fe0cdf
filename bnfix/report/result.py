"""A finished command, and the files it writes: one file, a hub folder, or a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bnfix.checkpoints.alike import (
    REPORTS,
    check_folder_output,
    check_like_input,
    folder_of,
    save_folder,
    save_like_input,
)
from bnfix.checkpoints.load import hub_folder, origin_of
from bnfix.checkpoints.save import check_free, check_output, metadata_of, save
from bnfix.core import distributed
from bnfix.core.settings import ModelRecipe, Preprocessing
from bnfix.report.card import card_of
from bnfix.report.report import Report, report_paths, write_texts


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
        verdict = report.verdict or "no verdict"
        return (
            f"Result({report.command}: {verdict}, {len(report.models)} models measured, "
            f"{len(report.layers)} norm layers, {n_live} of them live)"
        )

    def save(self, path: str | Path, *, force: bool = False) -> None:
        """Write the checkpoint and its three reports beside it, or a hub folder with all of them.

        Args:
            path: ends in ``.safetensors``, and the reports' names start with it; or a folder, where
                the model came from a hub folder; or, with ``like_input``, a name like the input's.
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
        texts = self.report.texts()  # first: what cannot be reported is not written either
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
        """Write as `save` does, by the first of several processes."""

        def write() -> None:
            if distributed.here().is_first:
                self.save(path, force=force)

        distributed.together(write)


def check_outputs(
    path: str | Path,
    source: str | Path | None,
    recipe: ModelRecipe = ModelRecipe(),
    *,
    force: bool,
) -> str:
    """Check before any work that the output of an input and its reports may be written; its form.

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
