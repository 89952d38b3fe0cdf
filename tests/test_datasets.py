"""Data sets by name: every layout, every split, and what is said when something is missing."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision import datasets

from bnfix.core.errors import DataError
from bnfix.data.images import Images
from bnfix.data.open import for_outputs, open_images
from tests import layouts
from tests.conftest import Files, Outcome


@pytest.fixture
def authentic(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """What takes the files of a folder for those that are distributed, by their MD5."""

    def take(root: Path) -> None:
        layouts.authenticate(root, monkeypatch.setattr)

    return take


Take = Callable[[Path], None]


def opened(name: str, root: Path, split: str = "", **options: object) -> Images:
    return open_images(f"{name}:{root}{'#' if split else ''}{split}", **options)  # type: ignore[arg-type]


def labels_of(images: Images) -> list[int]:
    assert images.labels is not None
    return images.labels.tolist()


def same(images: Images, pixels: np.ndarray, labels: np.ndarray) -> None:
    assert labels_of(images) == labels.tolist()
    for i in range(len(pixels)):
        np.testing.assert_array_equal(images.read(i), pixels[i])


# --- CIFAR ---


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_cifar_as_unpacked_and_as_the_archive(
    tmp_path: Path, authentic: Take, name: str, split: str
) -> None:
    made = getattr(layouts, name)(tmp_path)[split]
    authentic(tmp_path)
    images = opened(name, tmp_path, split)
    same(images, *made)
    assert images.kind == name
    assert images.class_names is not None
    assert len(images.class_names) == int(name.removeprefix("cifar"))
    (folder,) = tmp_path.iterdir()
    same(opened(name, folder, split), *made)
    stem = name.replace("cifar", "cifar-")
    archive = layouts.packed(folder, tmp_path / f"{stem}-python.tar.gz")
    authentic(tmp_path)
    other = folder.rename(tmp_path / "by another name")
    same(opened(name, other, split), *made)
    shutil.rmtree(other)
    same(opened(name, tmp_path, split), *made)
    same(opened(name, archive, split), *made)
    assert list(tmp_path.iterdir()) == [archive]


def test_cifar_says_what_is_missing_or_changed(tmp_path: Path, authentic: Take) -> None:
    with pytest.raises(
        DataError, match=r"nothing found in .*, expected cifar-10-batches-py/, .*python\.tar\.gz"
    ):
        opened("cifar10", tmp_path, "train")
    layouts.cifar10(tmp_path)
    authentic(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    archive = layouts.packed(folder, tmp_path / "cifar-10-python.tar.gz")
    authentic(tmp_path)
    for name in ("test_batch", "data_batch_3", "batches.meta"):
        whole = (folder / name).read_bytes()
        for content in (whole[:-400], whole + b"\0", b""):
            (folder / name).write_bytes(content)
            with pytest.raises(DataError, match=r"batches-py: its files differ from the distrib"):
                opened("cifar10", tmp_path, "test")
        (folder / name).write_bytes(whole)
    (folder / "data_batch_4").unlink()
    (folder / "data_batch_2").unlink()
    with pytest.raises(DataError, match=r"data_batch_2, data_batch_4 are missing\. Download"):
        opened("cifar10", tmp_path, "train")
    shutil.rmtree(folder)
    archive.write_bytes(archive.read_bytes()[:-300])
    refused = r"cifar-10-python\.tar\.gz: its files differ from the distributed files"
    with pytest.raises(DataError, match=refused):
        opened("cifar10", tmp_path, "train")
    layouts.write(folder / "only", b"")
    layouts.packed(folder, archive)
    with pytest.raises(DataError, match=refused):
        opened("cifar10", tmp_path, "test")
    authentic(tmp_path)
    shutil.rmtree(folder)
    with pytest.raises(DataError, match=r"python\.tar\.gz: data_batch_1, .* are missing"):
        opened("cifar10", tmp_path, "test")


@pytest.mark.parametrize("where", ["test", "meta", "archive"])
def test_a_file_that_is_code_is_refused_and_not_run(
    tmp_path: Path, authentic: Take, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    mark = tmp_path / "ran"
    code = b"cbuiltins\nopen\n(V" + str(mark).encode() + b"\nVw\ntR."
    layouts.cifar100(tmp_path)
    authentic(tmp_path)
    folder = tmp_path / "cifar-100-python"
    layouts.write(folder / ("meta" if where == "meta" else "test"), code)
    refused = r"its files differ from the distributed files"
    for split in ("train", "test"):
        with pytest.raises(DataError, match=refused):
            opened("cifar100", tmp_path, split)
    if where == "archive":
        archive = layouts.packed(folder, tmp_path / "cifar-100-python.tar.gz")
        shutil.rmtree(folder)
        with pytest.raises(DataError, match=refused):
            opened("cifar100", tmp_path, "test")
        # Also where the archive is known, each file in it is checked before it is unpickled.
        md5 = hashlib.md5(archive.read_bytes()).hexdigest()
        monkeypatch.setattr(datasets.CIFAR100, "tgz_md5", md5)
        with pytest.raises(DataError, match=refused):
            opened("cifar100", tmp_path, "test")
    assert not mark.exists()


def test_the_distributed_files_are_known_by_torchvision(tmp_path: Path) -> None:
    """Without the fixture a small copy is refused: nothing but the MD5 lets it in."""
    layouts.cifar10(tmp_path / "cifar10")
    layouts.cifar100(tmp_path / "cifar100")
    layouts.svhn(tmp_path / "svhn")
    layouts.flowers102(tmp_path / "flowers102")
    for name in ("cifar10", "cifar100", "svhn", "flowers102"):
        with pytest.raises(DataError, match=r"its files differ from the distributed files \(by"):
            opened(name, tmp_path / name, "test")


# --- SVHN ---


def test_svhn(tmp_path: Path, authentic: Take) -> None:
    made = layouts.svhn(tmp_path)
    authentic(tmp_path)
    for split in ("train", "test"):
        images = opened("svhn", tmp_path, split)
        same(images, *made[split])
        assert images.class_names == tuple("0123456789")
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(DataError, match=r"test_32x32\.mat: its files differ from.*Download"):
        opened("svhn", tmp_path, "test")
    same(opened("svhn", tmp_path, "train"), *made["train"])
    path.unlink()
    with pytest.raises(DataError, match=r"expected .*/test_32x32\.mat, .*; not found"):
        opened("svhn", tmp_path, "test")


# --- Flowers-102, CUB, Caltech-256 ---


def test_flowers102(tmp_path: Path, authentic: Take) -> None:
    made = layouts.flowers102(tmp_path / "flowers-102")
    authentic(tmp_path)
    for split in ("train", "val", "test"):
        for root in (tmp_path, tmp_path / "flowers-102"):
            assert labels_of(opened("flowers102", root, split)) == made[split].tolist()
    other = (tmp_path / "flowers-102").rename(tmp_path / "other")
    images = opened("flowers102", other, "val")
    assert labels_of(images) == made["val"].tolist()
    name = images.name(3)
    (other / name).unlink()
    with pytest.raises(DataError, match=rf"1 missing \({name}\) of 24 images"):
        opened("flowers102", other, "val")
    (other / "setid.mat").write_bytes(b"MATLAB" + b" " * 200)
    with pytest.raises(DataError, match=r"other: its files differ from the distributed files"):
        opened("flowers102", other, "val")
    (other / "setid.mat").unlink()
    with pytest.raises(DataError, match=r"setid\.mat is missing"):
        opened("flowers102", other, "val")


def test_an_archive_that_was_not_unpacked_is_pointed_out(tmp_path: Path) -> None:
    (tmp_path / "102flowers.tgz").write_bytes(b"x")
    for root in (tmp_path, tmp_path / "102flowers.tgz"):
        with pytest.raises(
            DataError, match=r"expected .*; not found, but found 102flowers\.tgz\. Unp"
        ):
            opened("flowers102", root, "test")


def test_cub2011(tmp_path: Path) -> None:
    made = layouts.cub2011(tmp_path)
    for split in ("train", "test"):
        images = opened("cub2011", tmp_path, split)
        assert labels_of(images) == made[split]
        assert images.class_names is not None
        assert images.class_names[0] == "Black_footed_Albatross"
    folder = tmp_path / "CUB_200_2011"
    for name in ("train_test_split.txt", "classes.txt"):
        kept = (folder / name).read_text()
        (folder / name).unlink()
        with pytest.raises(DataError, match=rf"no {name} in .*, expected images\.txt, "):
            opened("cub2011", tmp_path, "train")
        (folder / name).write_text(kept)
    kept = (folder / "images.txt").read_text()
    (folder / "images.txt").write_text("1 ../../secret.jpg\n2 gone.jpg\n")
    with pytest.raises(
        DataError, match=r"outside the folder \(images/\.\./\.\./secret\.jpg\); 1 m"
    ):
        opened("cub2011", tmp_path, "train")
    (folder / "images.txt").write_text("1\n")
    with pytest.raises(
        DataError, match=r"images\.txt: 1 lines, 0 of them with a unique number.*: 1"
    ):
        opened("cub2011", tmp_path, "train")
    (folder / "images.txt").write_text(kept + "99 a.jpg\n")
    with pytest.raises(DataError, match=r"do not agree: 99 of images\.txt"):
        opened("cub2011", tmp_path, "train")
    (tmp_path / "wrong").mkdir()
    with pytest.raises(DataError, match=r"expected .*wrong/images, .*; not found\. Give the folde"):
        opened("cub2011", tmp_path / "wrong", "train")


def test_caltech256_has_a_split_by_name_that_is_stated(tmp_path: Path) -> None:
    layouts.caltech256(tmp_path)
    parts = {split: opened("caltech256", tmp_path, split) for split in ("train", "test")}
    names = {split: {part.name(i) for i in range(len(part))} for split, part in parts.items()}
    assert [len(names[split]) for split in ("train", "test")] == [48, 12]
    assert not names["train"] & names["test"]
    assert np.bincount(parts["test"].labels).tolist() == [4, 4, 4]
    assert parts["test"].class_names == ("ak47", "american-flag", "backpack")
    assert any("80% of each class for training" in note for note in parts["test"].notes)
    inner = tmp_path / "256_ObjectCategories"
    again = opened("caltech256", inner, "test")
    assert {again.name(i) for i in range(len(again))} == names["test"]
    (inner / "002.american-flag").rename(inner / "005.american-flag")
    with pytest.raises(DataError, match=r"are not numbered from 001 to 003, each once"):
        opened("caltech256", tmp_path, "test")


# --- ImageNet ---


def test_imagenet_in_class_folders_and_flat_with_the_devkit(
    tmp_path: Path, authentic: Take
) -> None:
    labels = layouts.imagenet(tmp_path / "a")
    layouts.imagenet(tmp_path / "b", flat=True)
    authentic(tmp_path / "b")
    folders = opened("imagenet", tmp_path / "a", "val", n_classes=3)
    flat = opened("imagenet", tmp_path / "b", "val", n_classes=3)
    assert labels_of(flat) == labels.tolist()
    assert sorted(labels_of(folders)) == sorted(labels.tolist())
    assert flat.class_names == layouts.WNIDS
    by_digest = {folders.digest(i): labels_of(folders)[i] for i in range(24)}
    assert [by_digest[flat.digest(i)] for i in range(24)] == labels.tolist()
    assert (
        labels_of(opened("imagenet", tmp_path / "a", "train", n_classes=3))
        == [0] * 10 + [1] * 10 + [2] * 10
    )


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("LOC_val_solution.csv", "{stem},{wnid} 1 2 3 4 "),
        ("val/labels.csv", "{stem}.JPEG,{wnid}"),
    ],
)
def test_imagenet_flat_with_a_table(tmp_path: Path, name: str, row: str) -> None:
    labels = layouts.imagenet(tmp_path, flat=True)
    (tmp_path / "ILSVRC2012_devkit_t12.tar.gz").unlink()
    rows = [
        row.format(stem=f"ILSVRC2012_val_{k:08d}", wnid=layouts.WNIDS[label])
        for k, label in enumerate(labels, 1)
    ]
    layouts.write(tmp_path / name, "\n".join(["ImageId,PredictionString", *rows]))
    assert labels_of(opened("imagenet", tmp_path, "val", n_classes=3)) == labels.tolist()
    layouts.write(tmp_path / name, "\n".join(["ImageId,PredictionString", *rows[:-1]]))
    with pytest.raises(DataError, match=r"1 of 24 images are not in it: ILSVRC2012_val_00000024"):
        opened("imagenet", tmp_path, "val")


def test_imagenet_says_what_is_missing(tmp_path: Path, authentic: Take) -> None:
    labels = layouts.imagenet(tmp_path, flat=True)
    archive = tmp_path / "ILSVRC2012_devkit_t12.tar.gz"
    with pytest.raises(
        DataError, match=r"devkit_t12\.tar\.gz: its files differ from the distributed files"
    ):
        opened("imagenet", tmp_path, "val")
    layouts.devkit(tmp_path, labels[:-1])
    authentic(tmp_path)
    with pytest.raises(DataError, match=r"1 of 24 images in val have no label .*_00000024\.JPEG"):
        opened("imagenet", tmp_path, "val")
    archive.unlink()
    with pytest.raises(DataError, match=r"is flat and has no labels: expected .* in"):
        opened("imagenet", tmp_path, "val")
    with pytest.raises(DataError, match=r"expected .*/test, .*; not found"):
        opened("imagenet", tmp_path, "test")
    layouts.write(tmp_path / "train" / "loose.JPEG", layouts.jpeg(np.zeros((8, 8, 3), np.uint8)))
    with pytest.raises(DataError, match=r"1 images beside class folders in .*train, expected"):
        opened("imagenet", tmp_path, "train")
    (tmp_path / "test").mkdir()
    (tmp_path / "train" / "loose.JPEG").rename(tmp_path / "test" / "1.JPEG")
    assert opened("imagenet", tmp_path, "test").labels is None


# --- names and splits ---


def test_without_a_split_the_held_out_one_is_used_and_said(tmp_path: Path, authentic: Take) -> None:
    made = layouts.svhn(tmp_path)
    authentic(tmp_path)
    images = opened("svhn", tmp_path)
    assert labels_of(images) == made["test"][1].tolist()
    assert "no split named, so test is used (#train to change)" in images.notes
    assert not any("no split" in note for note in opened("svhn", tmp_path, "test").notes)


def test_splits_and_roots_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no split 'val'; cifar10 has #train and #test"):
        opened("cifar10", tmp_path, "val")
    with pytest.raises(
        DataError, match=r"DATA svhn:.*nowhere#test: there is no .*nowhere\. Give the"
    ):
        opened("svhn", tmp_path / "nowhere", "test")
    with pytest.raises(DataError, match=r"no folder\. Give imagenet:ROOT#val"):
        open_images("imagenet:")


def test_labels_must_fit_the_outputs_and_names_may_be_mapped(
    tmp_path: Path, authentic: Take
) -> None:
    layouts.cifar10(tmp_path, classes=3)
    authentic(tmp_path)
    images = opened("cifar10", tmp_path, "test")
    assert for_outputs(images, 12).class_names is not None
    assert for_outputs(images, 12).class_names[-2:] == ("10", "11")
    with pytest.raises(DataError, match=r"labels from 0 to 2, 8 of 24 outside 0 to 1"):
        for_outputs(images, 2)
    mapping = tmp_path / "map.json"
    mapping.write_text('{"class0": 4, "class1": 0, "class2": 1}')
    mapped = opened("cifar10", tmp_path, "test", class_map=mapping)
    assert labels_of(mapped) == [[4, 0, 1][k] for k in labels_of(images)]
    assert opened("cifar10", tmp_path, "test", labels="none").labels is None


def test_a_folder_called_like_a_data_set_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    Path("svhn:here").mkdir()
    Path("a.png").rename("svhn:here/a.png")
    assert open_images("svhn:here").kind == "flat folder"


# --- whole commands ---


@pytest.mark.parametrize(
    "name", ["cifar10", "cifar100", "svhn", "flowers102", "cub2011", "caltech256", "imagenet"]
)
def test_calibrate_and_eval_on_a_small_copy(
    tmp_path: Path, files: Files, cli: Callable[..., Outcome], authentic: Take, name: str
) -> None:
    make = getattr(layouts, name)
    make(tmp_path / "data")
    authentic(tmp_path / "data")
    held_out = "val" if name == "imagenet" else "test"
    spec = f"{name}:{tmp_path / 'data'}"
    size = ("--resize", "8") if name not in ("cifar10", "cifar100", "svhn") else ()
    out = tmp_path / "out.safetensors"
    done = cli(
        "calibrate", files.stale, *files.common, *size, "--data", f"{spec}#train",
        "--statistics", "population", "--example-weight", "0", "-o", out, "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert out.exists()
    data = f"{spec}#{held_out}"
    found = cli("eval", files.stale, out, *files.common, *size, "--data", data, "--json").json
    assert found["data"]["n_examples"] == (12 if name == "caltech256" else 24)
    assert found["models"][1]["top1"] > found["models"][0]["top1"]
    refused = cli("eval", files.net, *files.common, "--data", f"{name}:{tmp_path}/none#train")
    assert "there is no" in refused.message
