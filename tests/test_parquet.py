"""Parquet files and Hugging Face folders: columns, classes, splits, and tables that lie."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bnfix.core.errors import DataError
from bnfix.core.settings import Preprocessing
from bnfix.data.batches import Batches
from bnfix.data.images import Images
from bnfix.data.open import open_images
from tests import layouts

arrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

CLASSES = ["red", "green", "blue"]


def table(n: int = 24, seed: int = 0, *, said: bool = True, **columns: Any) -> Any:
    """As the `datasets` library writes it, with its own description in the schema."""
    pixels, labels = layouts.colours(n, seed, 3, 16)
    kind = arrow.struct([("bytes", arrow.binary()), ("path", arrow.string())])
    rows = [{"bytes": layouts.jpeg(image), "path": f"{k}.jpg"} for k, image in enumerate(pixels)]
    made = arrow.table({"image": arrow.array(rows, kind), "label": labels, **columns})
    features = {
        "image": {"_type": "Image"},
        "label": {"_type": "ClassLabel", "names": CLASSES},
    }
    held = {"huggingface": json.dumps({"info": {"features": features}})}
    return made.replace_schema_metadata(held) if said else made


def same(images: Images, n: int = 24, seed: int = 0) -> None:
    pixels, labels = layouts.colours(n, seed, 3, 16)
    assert images.labels is not None
    assert images.labels.tolist() == labels.tolist()
    for i in np.random.default_rng(0).permutation(n):
        whole = np.array(Image.open(io.BytesIO(layouts.jpeg(pixels[i]))))
        np.testing.assert_array_equal(images.read(int(i)), whole)


def hub(root: Path) -> Path:
    (root / "data").mkdir(parents=True)
    parquet.write_table(table(12), root / "data" / "train-00000-of-00002.parquet")
    parquet.write_table(table(6, 1), root / "data" / "train-00001-of-00002-0123abcd.parquet")
    parquet.write_table(table(9, 2), root / "data" / "validation-00000-of-00001.parquet")
    return root


def test_one_file_by_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path, row_group_size=5)
    images = open_images(str(path), n_classes=4)
    assert (images.kind, images.class_names) == ("parquet", (*CLASSES, "3"))
    assert images.name(7) == "a.parquet[7]"
    same(images)


def test_many_processes_and_grey(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    parquet.write_table(table(), path, row_group_size=5)
    found = []
    for workers in (0, 2):
        images = open_images(str(path), channels=1)
        one = Preprocessing(channels=1)
        batches = Batches(images, np.arange(24), one, batch_size=8, workers=workers)
        found.append(np.concatenate([batch.x.numpy() for batch in batches]))
    np.testing.assert_array_equal(*found)


def test_a_hub_folder_and_its_splits(tmp_path: Path) -> None:
    root = hub(tmp_path / "set")
    assert len(open_images(f"{root}#train")) == 18
    same(open_images(f"{root}#val"), 9, 2)
    assert len(open_images(f"{root}#validation")) == 9
    held_out = open_images(str(root))
    assert len(held_out) == 9
    assert "no split named, so val is used (of train, val)" in held_out.notes
    same(open_images(f"{root}/data/validation-{{00000..00000}}-of-00001.parquet"), 9, 2)
    with pytest.raises(DataError, match=r"no split 'test' among train, val"):
        open_images(f"{root}#test")
    (root / "other").mkdir()
    parquet.write_table(table(3), root / "other" / "train-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"train in several folders \(data, other\), expected one"):
        open_images(f"{root}#train")


def test_a_folder_that_was_saved_to_disk(tmp_path: Path) -> None:
    for split, n in (("train", 12), ("test", 24)):
        folder = tmp_path / split
        folder.mkdir()
        (folder / "state.json").write_text("{}")
        made = table(n)
        with arrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink:
            with arrow.ipc.new_stream(sink, made.schema) as writer:
                writer.write_table(made, max_chunksize=7)
    images = open_images(str(tmp_path))
    assert images.kind == "arrow"
    same(images)
    assert len(open_images(f"{tmp_path}#train")) == 12
    assert len(open_images(f"{tmp_path}/train")) == 12


def test_splits_of_an_image_folder(tmp_path: Path) -> None:
    for split, n in (("train", 2), ("test", 1)):
        for name in ("a", "b"):
            for k in range(n):
                pixels = np.zeros((8, 8, 3), np.uint8)
                layouts.write(tmp_path / split / name / f"{k}.jpg", layouts.jpeg(pixels))
    assert len(open_images(f"{tmp_path}#train")) == 4
    assert open_images(f"{tmp_path}#test").class_names == ("a", "b")
    with pytest.raises(DataError, match=r"no split val in .*, expected a folder of that name or p"):
        open_images(f"{tmp_path}#val")


def test_other_columns_and_labels_as_names(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plain = table(said=False)
    jpegs = arrow.array([row["bytes"] for row in plain.column("image").to_pylist()])
    names = [CLASSES[k] for k in plain.column("label").to_pylist()]
    parquet.write_table(arrow.table({"png": jpegs, "target": names, "id": range(24)}), path)
    images = open_images(str(path))
    assert images.class_names == ("blue", "green", "red")
    assert images.labels is not None
    assert [images.class_names[k] for k in images.labels] == names
    assert open_images(str(path), labels="none").labels is None
    parquet.write_table(arrow.table({"img": jpegs}), path)
    assert open_images(str(path)).labels is None


def test_tables_that_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    empty = arrow.array([{"bytes": None, "path": "/etc/passwd"}] * 24, table().schema.field(0).type)
    cases = {
        "no image column among id": arrow.table({"id": [1, 2]}),
        r"no images: .*a\.parquet has no rows": table().slice(0, 0),
        r"1 of 24 images have no label \(a\.parquet\[3\]\)": table().set_column(
            1, "label", arrow.array([None if k == 3 else 0 for k in range(24)], arrow.int64())
        ),
        r"labels from -1 to -1, 24 of 24 below 0": table().set_column(1, "label", [[-1] * 24]),
    }
    for said, made in cases.items():
        parquet.write_table(made, path)
        with pytest.raises(DataError, match=rf"a\.parquet.*: .*{said}"):
            open_images(str(path))
    parquet.write_table(table().set_column(0, "image", empty), path)
    with pytest.raises(DataError, match=r"a\.parquet\[0\]: bad image, no bytes in the table"):
        open_images(str(path)).read(0)
    whole = path.read_bytes()
    for content in (whole[:-20], whole[: len(whole) // 2], b"PAR1", b"", b"x" * 500):
        path.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.parquet: cannot be read \("):
            open_images(str(path))
    parquet.write_table(table(), tmp_path / "b-0.parquet")
    parquet.write_table(table().select(["image"]), tmp_path / "b-1.parquet")
    with pytest.raises(DataError, match=r"b-1\.parquet: cannot be read \(its columns or classes"):
        open_images(f"{tmp_path}/b-{{0..1}}.parquet")


def test_a_value_repeated_without_end_takes_its_memory_once(tmp_path: Path) -> None:
    path = tmp_path / "bomb.parquet"
    content = layouts.jpeg(np.random.default_rng(0).integers(0, 256, (700, 700, 3), np.uint8))
    rows = arrow.DictionaryArray.from_arrays(arrow.array([0] * 4000, arrow.int32()), [content])
    made = arrow.table({"image": rows, "label": [0] * 4000})
    parquet.write_table(made, path, store_schema=False)
    assert path.stat().st_size < 3 * len(content)
    images = open_images(str(path))
    before = arrow.total_allocated_bytes()
    assert images.read(3999).shape == (700, 700, 3)
    assert arrow.total_allocated_bytes() - before < 20 * len(content)


def test_without_pyarrow_the_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parquet.write_table(table(), tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"needs pyarrow, .*pip install 'bnfix\[parquet\]'"):
        open_images(f"{tmp_path}/a.parquet")
