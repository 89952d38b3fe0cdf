"""What each model predicts for each example, as a table in a CSV or Parquet file."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from bnfix.checkpoints.save import check_folder, check_free, replace_whole, write_text
from bnfix.core.errors import ConfigError, file_errors, plain
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import chunks, log_softmax, losses_of
from bnfix.metrics.task import Array

SUFFIXES = (".csv", ".parquet")


def check_predictions(path: Path, *, force: bool) -> None:
    """Refuse, before any work, a file that could not be written."""
    if path.suffix.lower() not in SUFFIXES:
        raise ConfigError(
            f"--predictions: {plain(path)}, expected a name ending in {' or '.join(SUFFIXES)}.",
            name="predictions",
        )
    check_folder(path)
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
    check_folder(path)
    with file_errors(path, "not written", kinds=(OSError,)):
        replace_whole(path, lambda temporary: parquet.write_table(table, temporary))


def _utf8(text: object) -> str:
    """A text without the half characters that a file name may hold."""
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
