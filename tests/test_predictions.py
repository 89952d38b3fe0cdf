"""`--predictions`: every number against plain PyTorch, in both kinds of file."""

from __future__ import annotations

import csv
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from bnfix.core.errors import CheckpointError, ConfigError
from bnfix.metrics.evaluate import Outputs
from bnfix.report.report import check_predictions, table_of, write_predictions
from tests.conftest import images_of, inputs_of

HOSTILE = ['a,"b".png', "new\nline", "=1+1", "漢字", "\udcff.png"]


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def written(cli, files, tmp_path_factory):
    path = tmp_path_factory.mktemp("out") / "p.csv"
    words = ["--data", files.test, *files.common, "--json", "--predictions", path]
    found = cli("eval", files.stale, files.net, *words).json
    return found, path


def test_a_csv_has_a_row_an_image_and_the_numbers_of_plain_pytorch(written, files):
    found, path = written
    images, labels = images_of(120, seed=3)
    with torch.no_grad():
        logits = files.trained()(inputs_of(images)).double()
    y = torch.from_numpy(labels)
    losses, confidence = F.cross_entropy(logits, y, reduction="none"), logits.softmax(1).amax(1)
    rows = rows_of(path)
    assert list(rows[0]) == [
        "file", "label",
        "stale.pth.prediction", "stale.pth.confidence", "stale.pth.nll",
        "net.pth.prediction", "net.pth.confidence", "net.pth.nll",
    ]  # fmt: skip
    assert [row["file"] for row in rows] == [f"images[{i}]" for i in range(120)]
    assert [int(row["label"]) for row in rows] == labels.tolist()
    assert [int(row["net.pth.prediction"]) for row in rows] == logits.argmax(1).tolist()
    for name, expected in (("confidence", confidence), ("nll", losses)):
        values = [float(row[f"net.pth.{name}"]) for row in rows]
        np.testing.assert_allclose(values, expected, rtol=1e-4, atol=1e-6)
    mean = np.mean([float(row["stale.pth.nll"]) for row in rows])
    assert mean == pytest.approx(found["models"][0]["nll"], rel=1e-6)


def test_parquet_holds_the_same_table(cli, files, written, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "p.parquet"
    words = ["--data", files.test, *files.common, "--json", "--predictions", path]
    assert cli("eval", files.stale, files.net, *words).code == 0
    table = parquet.read_table(path)
    rows = rows_of(written[1])
    assert table.column_names == list(rows[0])
    assert str(table.schema.field("label").type) == "int64"
    assert str(table.schema.field("net.pth.nll").type) == "double"
    for name in table.column_names:
        column = table[name].to_pylist()
        if name == "file":
            assert column == [row[name] for row in rows]
        else:
            np.testing.assert_allclose(column, [float(row[name]) for row in rows], rtol=1e-8)


def test_without_labels_there_is_no_label_and_no_loss(cli, files, tmp_path):
    path = tmp_path / "p.csv"
    words = ["--data", files.flat, *files.common, "--quiet", "--predictions", path]
    assert cli("eval", files.net, *words).code == 0
    rows = rows_of(path)
    assert list(rows[0]) == ["file", "net.pth.prediction", "net.pth.confidence"]
    assert [row["file"] for row in rows] == [f"{i:03}.png" for i in range(60)]


def test_an_unreadable_image_has_no_row(cli, files, tmp_path):
    folder = tmp_path / "flat"
    folder.mkdir()
    for path in sorted(files.flat.iterdir())[:20]:
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "004.png").write_bytes(b"no image")
    path = tmp_path / "p.csv"
    words = ["--data", folder, *files.common, "--quiet", "--predictions", path]
    assert cli("eval", files.net, *words).code == 0
    names = [row["file"] for row in rows_of(path)]
    assert len(names) == 19
    assert "004.png" not in names


def test_names_of_any_kind_come_back_as_they_were(tmp_path):
    n = len(HOSTILE)
    outputs = Outputs(np.eye(n, 3, dtype=np.float32), np.zeros(n, np.int64), 1.0)
    write_predictions(tmp_path / "p.csv", table_of(["a|b"], HOSTILE, [outputs]))
    rows = rows_of(tmp_path / "p.csv")
    assert [row["file"] for row in rows] == [*HOSTILE[:-1], "\\udcff.png"]
    parquet = pytest.importorskip("pyarrow.parquet")
    write_predictions(tmp_path / "p.parquet", table_of(["a|b"], HOSTILE, [outputs]))
    assert parquet.read_table(tmp_path / "p.parquet")["file"].to_pylist() == [
        row["file"] for row in rows
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.csv", "p.parquet"]


def test_an_existing_file_is_refused_before_any_work_and_replaced_by_force(cli, files, tmp_path):
    path = tmp_path / "p.csv"
    path.write_text("mine")
    words = ["--data", files.test, *files.common, "--predictions", path, "--quiet"]
    # The checkpoint is not even looked at.
    assert "already exists" in cli("eval", tmp_path / "no.pth", *words).message
    assert "already exists" in cli("eval", files.net, *words, "--plan").message
    assert path.read_text() == "mine"
    assert cli("eval", files.net, *words, "--force").code == 0
    assert len(rows_of(path)) == 120


@pytest.mark.parametrize(
    ("name", "error", "match"),
    [
        ("p.txt", ConfigError, r"expected a name ending in \.csv or \.parquet"),
        ("p", ConfigError, r"expected a name ending in \.csv or \.parquet"),
        ("nowhere/p.csv", CheckpointError, "nowhere"),
    ],
)
def test_a_place_that_cannot_be_is_refused(tmp_path, name, error, match):
    with pytest.raises(error, match=match):
        check_predictions(tmp_path / name, force=False)


def test_a_folder_of_that_name_is_refused(tmp_path):
    (tmp_path / "p.csv").mkdir()
    with pytest.raises(CheckpointError, match="is a folder"):
        check_predictions(tmp_path / "p.csv", force=True)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ConfigError, match=r'pip install "bnfix\[parquet\]"'):
        check_predictions(tmp_path / "p.parquet", force=False)
    check_predictions(tmp_path / "p.csv", force=False)
