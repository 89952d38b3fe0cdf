"""DATA to batches: every kind, every refusal, splits, preprocessing, bad images, memory."""

import io
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms import v2

from bnfix.core.errors import ConfigError, DataError
from bnfix.core.settings import Preprocessing
from bnfix.data.batches import Batches, Skipped
from bnfix.data.images import ArrayImages, Images
from bnfix.data.open import map_classes, open_images
from bnfix.data.splits import cut, fingerprint
from tests.real import DATA, needs_data

RAW = Preprocessing(scale=1.0)
SMALL = Preprocessing(resize=(8,), crop=(8, 8))


def picture(seed: int, height: int = 12, width: int = 16, channels: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, channels), dtype=np.uint8)
    return pixels[..., 0] if channels == 1 else pixels


def write(path: Path, seed: int = 0, *, height: int = 12, width: int = 16, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture(seed, height, width)).save(path, **options)
    return path


def class_folders(root: Path, names: list[str], n_each: int = 2) -> Path:
    for c, name in enumerate(names):
        for k in range(n_each):
            write(root / name / f"{k}.png", seed=100 * c + k)
    return root


def npz(path: Path, **arrays: np.ndarray) -> str:
    np.savez(path, **arrays)
    return str(path)


def grid(n: int, height: int = 4, width: int = 4, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, channels), dtype=np.uint8)


def everything(images: Images, preprocessing: Preprocessing = RAW, **options) -> Batches:
    return Batches(images, np.arange(len(images)), preprocessing, **{"batch_size": 4, **options})


# ---- kinds


def test_class_folders_are_numbered_by_sorted_name(tmp_path: Path) -> None:
    images = open_images(str(class_folders(tmp_path, ["dog", "Cat", "bird"])))
    assert images.kind == "class folders"
    assert images.class_names == ("Cat", "bird", "dog")
    assert [images.name(i) for i in (0, 2, 5)] == ["Cat/0.png", "bird/0.png", "dog/1.png"]
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [0, 0, 1, 1, 2, 2]
    np.testing.assert_array_equal(images.read(2), picture(200))
    assert images.read(2).shape[:2] == (12, 16)
    assert "3 classes numbered by sorted name" in images.notes


def test_one_nested_level_counts_and_hidden_or_other_files_do_not(tmp_path: Path) -> None:
    class_folders(tmp_path, ["a", "b"], n_each=1)
    write(tmp_path / "a" / "deep" / "x.png", seed=7)
    write(tmp_path / "a" / "deep" / "deeper" / "y.png", seed=8)
    write(tmp_path / ".hidden" / "z.png", seed=9)
    write(tmp_path / "b" / ".z.png", seed=9)
    (tmp_path / "b" / "readme.txt").write_text("hello")
    (tmp_path / "c").mkdir()
    images = open_images(str(tmp_path))
    assert [images.name(i) for i in range(len(images))] == ["a/0.png", "a/deep/x.png", "b/0.png"]
    assert images.class_names == ("a", "b", "c")
    assert "1 file without an image suffix skipped" in images.notes
    assert "1 folders hold no images: c" in images.notes


def test_integer_folders_are_mapped_by_value(tmp_path: Path) -> None:
    root = class_folders(tmp_path, ["0", "10", "2"], n_each=1)
    images = open_images(str(root), n_classes=11)
    assert images.labels is not None
    assert dict(zip(map(images.name, range(3)), images.labels.tolist(), strict=True)) == {
        "0/0.png": 0,
        "10/0.png": 10,
        "2/0.png": 2,
    }
    assert images.class_names is not None
    assert len(images.class_names) == 11
    assert "classes are numbers, taken by value" in images.notes
    with pytest.raises(DataError, match=r"1 of 3 classes .* outputs 0 to 9: 10 = 10\. Give --cl"):
        open_images(str(root), n_classes=10)
    class_folders(tmp_path, ["02"], n_each=1)
    with pytest.raises(DataError, match="two classes have the same number among 0, 02, 10, 2"):
        open_images(str(root))


def test_all_imagenet_ids_in_sorted_order_are_the_index(tmp_path: Path) -> None:
    names = [f"n{9_000_000 + 7 * k:08d}" for k in range(1000)]
    indices, how = map_classes(names[::-1], None, 1000, "here")
    assert [indices[name] for name in names] == list(range(1000))
    assert how == "1,000 classes numbered by sorted name"
    assert map_classes(names, None, None, "here")[0] == indices
    with pytest.raises(DataError, match=r"here: 999 of 999 ids are not among ImageNet's 1000"):
        map_classes(names[:-1], None, 1000, "here")


def test_some_imagenet_ids_are_looked_up(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    root = class_folders(tmp_path, ["n01440764", "n15075141", "n01443537"], n_each=1)
    images = open_images(str(root), n_classes=1000)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 999]
    assert "classes by ImageNet id" in images.notes
    small = open_images(str(root), n_classes=3)
    assert small.labels is not None
    assert small.labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match=r"1 of 3 classes .* outputs 0 to 9: n15075141 = 999"):
        open_images(str(root), n_classes=10)


def test_some_imagenet_ids_without_the_list_ask_for_a_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm.data.imagenet_info", None)
    root = class_folders(tmp_path, ["n01440764", "n15075141"], n_each=1)
    with pytest.raises(DataError, match=r"2 folders or labels named by ImageNet ids.*--class-map"):
        open_images(str(root), n_classes=1000)


def test_class_map(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "data", ["cat", "lion", "dog"], n_each=1)
    mapping = tmp_path / "map.json"
    mapping.write_text(json.dumps({"dog": 4, "cat": 1, "lion": 1, "unused": 2}))
    images = open_images(str(root), class_map=mapping, n_classes=5)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 4, 1]
    assert images.class_names == ("0", "cat + lion", "2", "3", "dog")
    with pytest.raises(DataError, match=r"1 of 3 classes .* outputs 0 to 3: dog = 4"):
        open_images(str(root), class_map=mapping, n_classes=4)
    class_folders(root, ["emu"], n_each=1)
    with pytest.raises(DataError, match=r"1 of 4 classes are not in the class map: emu\. Add"):
        open_images(str(root), class_map=mapping)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        (b"\xff\xfe\xfa", "cannot be read as JSON"),
        ("[1]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"a": 0, "b": 1, "a": 2}', "duplicate names: a"),
        ('{"a": -1, "b": true, "c": "1", "d": 1.0, "e": 1000000}', "5 values are not integers"),
        (b'{"a": 1}' + b" " * 10_000_000, "larger than 10 MB"),
    ],
)
def test_bad_class_maps(tmp_path: Path, text: str | bytes, message: str) -> None:
    mapping = tmp_path / "map.json"
    mapping.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(DataError, match=f"class map .*map.json: {message}"):
        open_images(str(tmp_path), class_map=mapping)


def test_missing_class_map(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        open_images(str(tmp_path), class_map=tmp_path / "none.json")


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    for k, suffix in enumerate((".png", ".JPG", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".ppm")):
        write(tmp_path / f"{k}{suffix}", seed=k)
    mapping = tmp_path / "map.json"
    mapping.write_text('{"a": 0}')
    images = open_images(str(tmp_path), class_map=mapping)
    assert (images.kind, len(images)) == ("flat folder", 8)
    assert images.labels is None
    assert images.class_names is None
    assert "no labels" in images.notes
    assert "the class map is not used, since there are no labels" in images.notes
    batches = list(everything(images))
    assert [len(batch.x) for batch in batches] == [4, 4]
    assert all(batch.y is None for batch in batches)


def test_labels_none_hides_labels(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "a", ["x", "y"])
    spec = npz(tmp_path / "b.npz", images=grid(3), labels=np.array([5, -1, 7]))
    (tmp_path / "c").mkdir()
    write(tmp_path / "c" / "1.png")
    (tmp_path / "c" / "labels.csv").write_text("file\n1.png\n")
    for data, kind in (
        (str(root), "class folders"),
        (spec, "npz"),
        (f"{tmp_path}/c", "labels.csv"),
    ):
        images = open_images(data, labels="none", n_classes=99)
        assert images.kind == kind
        assert images.labels is None
        assert "labels are not used (--labels none)" in images.notes


# ---- labels.csv


def csv_folder(root: Path, text: str | bytes, n: int = 3) -> str:
    for k in range(n):
        write(root / f"{k}.png", seed=k)
    (root / "labels.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    return str(root)


def test_csv_with_integers(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "s.png", seed=50)
    text = "\ufefffile,label,more\n1.png,4,x\n\n./0.png, 0\nsub/s.png,+2,\n"
    images = open_images(csv_folder(tmp_path, text), n_classes=5)
    assert images.kind == "labels.csv"
    assert [images.name(i) for i in range(3)] == ["1.png", "0.png", "sub/s.png"]
    assert images.labels is not None
    assert images.labels.tolist() == [4, 0, 2]
    assert images.class_names is None
    assert "1 image not in labels.csv skipped" in images.notes
    np.testing.assert_array_equal(images.read(2), picture(50))


def test_csv_with_names(tmp_path: Path) -> None:
    spec = csv_folder(tmp_path, 'label,file\n"dog, big",0.png\ncat,1.png\ncat,2.png\n')
    images = open_images(spec, n_classes=2)
    assert images.labels is not None
    assert images.labels.tolist() == [1, 0, 0]
    assert images.class_names == ("cat", "dog, big")
    with pytest.raises(
        DataError, match=r"labels\.csv: 2 classes for a model with 3 outputs.*--cla"
    ):
        open_images(spec, n_classes=3)
    mapping = tmp_path / "map.json"
    mapping.write_text('{"cat": 2, "dog, big": 0}')
    mapped = open_images(spec, n_classes=3, class_map=mapping)
    assert mapped.labels is not None
    assert mapped.labels.tolist() == [0, 2, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "its first line is '', expected file,label"),
        ("name,class\n0.png,1\n", "its first line is 'name,class', expected file,label"),
        ("file,label\n", "no images, expected lines after the header"),
        ("file,label\n0.png,1\n0.png,2\n./0.png,3\n", r"1 listed more than once \(0.png\)"),
        ("file,label\n0.png,\n1.png\n", "2 without a file or label"),
        ("file,label\n../0.png,1\n", r"1 outside the folder \(\.\./0.png\)"),
        ("file,label\n/etc/passwd,1\n", "1 outside the folder"),
        ("file,label\na/../../0.png,1\n", "1 outside the folder"),
        ("file,label\nC:\\0.png,1\n", "1 outside the folder"),
        ("file,label\n" + "".join(f"x{k},1\n" for k in range(7)), r"7 missing .*x4 and 2 more\)"),
        ("file,label\n" + "x" * 5000 + ",1\n", "1 missing"),
        ("file,label\nx\0y,1\n", "1 missing"),
        ("file,label\n" + "x" * 200_000 + ",1\n", "not a readable CSV file"),
        (b"file,label\n\xff.png,1\n", "not a readable CSV file"),
        ("file,label\n0.png,1\n1.png,cat\n", "some labels are numbers, but not .*: cat"),
        ("file,label\n0.png,1.0\n1.png,2.0\n", "some labels are numbers, but not .*: 1.0, 2.0"),
        (
            "file,label\n0.png,-1\n",
            "labels from -1 to -1, 1 of 1 below 0, expected at least 0, first in row 0",
        ),
        ("file,label\n0.png,99999999999999999999\n", "some labels are numbers"),
    ],
)
def test_bad_csv(tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(DataError, match=f"labels.csv: .*{message}"):
        open_images(csv_folder(tmp_path, text))


def test_csv_problems_come_all_at_once(tmp_path: Path) -> None:
    spec = csv_folder(tmp_path, "file,label\n0.png,1\n0.png,1\n../a,1\nb.png,1\n1.png,\n")
    with pytest.raises(
        DataError, match=r"without.*more than once.*outside the folder.*1 missing"
    ) as caught:
        open_images(spec)
    assert "\n" not in str(caught.value)


def test_csv_that_is_no_file(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    os.mkfifo(tmp_path / "labels.csv")
    with pytest.raises(DataError, match=r"cannot be read \(not a regular file\)"):
        open_images(str(tmp_path))


def test_csv_that_is_too_large(tmp_path: Path) -> None:
    spec = csv_folder(tmp_path, "file,label\n0.png,1\n")
    os.truncate(tmp_path / "labels.csv", 500_000_001)  # a hole: it takes no room on the disk
    with pytest.raises(DataError, match=r"labels\.csv: larger than 500 MB"):
        open_images(spec)


# ---- npz


def test_npz_colour(tmp_path: Path) -> None:
    pixels, labels = grid(5), np.array([3, 1, 4, 1, 5], dtype=">i2")
    images = open_images(npz(tmp_path / "a.npz", images=pixels, labels=labels, more=labels))
    assert (images.kind, len(images), images.name(2)) == ("npz", 5, "images[2]")
    assert images.labels is not None
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [3, 1, 4, 1, 5]
    assert images.read(0).shape[:2] == (4, 4)
    np.testing.assert_array_equal(images.read(3), pixels[3])
    assert "arrays skipped: more" in images.notes


def test_npz_channels(tmp_path: Path) -> None:
    grey = npz(tmp_path / "grey.npz", images=grid(3)[..., 0])
    images = open_images(grey)
    np.testing.assert_array_equal(images.read(1), np.repeat(grid(3)[1, :, :, :1], 3, axis=2))
    assert {"grey images, repeated to 3 channels", "no labels"} <= set(images.notes)
    assert open_images(grey, channels=1).read(1).shape == (4, 4, 1)

    colour = open_images(npz(tmp_path / "rgb.npz", images=grid(3)), channels=1)
    expected = np.array(Image.fromarray(grid(3)[2]).convert("L"))
    np.testing.assert_array_equal(colour.read(2)[..., 0], expected)
    assert "colour images, converted to grey by ITU-R 601 luma" in colour.notes

    note = "colour images, converted to grey by ITU-R 601 luma"
    class_folders(tmp_path / "files", ["cat", "dog"])
    assert note in open_images(str(tmp_path / "files"), channels=1).notes
    assert note not in open_images(str(tmp_path / "files"), channels=3).notes

    alpha = npz(tmp_path / "rgba.npz", images=grid(3, channels=4))
    np.testing.assert_array_equal(open_images(alpha).read(0), grid(3, channels=4)[0, :, :, :3])
    assert "the fourth channel (alpha) is dropped" in open_images(alpha, channels=1).notes


def test_npz_fortran_order_and_compression(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.asfortranarray(grid(5)))
    images = open_images(str(tmp_path / "a.npz"))
    np.testing.assert_array_equal(images.read(4), grid(5)[4])
    assert len({images.digest(i) for i in range(5)}) == 5


def test_threads_hash_files_as_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(40):
        Image.fromarray(np.full((2, 2, 3), i, np.uint8)).save(tmp_path / f"{i:02}.png")
    (tmp_path / "99.png").touch()
    one_by_one = open_images(str(tmp_path))
    expected = [one_by_one.digest(i) for i in range(41)]
    monkeypatch.setattr("bnfix.data.images._HASHED_AT_ONCE", 3)
    assert open_images(str(tmp_path)).digests() == expected
    assert len(set(expected)) == 41


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": grid(2)}, "arrays x, expected one named images"),
        ({}, "arrays none, expected one named images"),
        ({"images": grid(2).astype(np.float32)}, r"images are float32 .* \(255 \* images\)"),
        ({"images": grid(2, channels=2)}, r"images are uint8 \(2, 4, 4, 2\)"),
        ({"images": grid(2, 5, 5).transpose(0, 3, 1, 2)}, r"images are uint8 \(2, 3, 5, 5\)"),
        ({"images": grid(2)[0, 0]}, r"images are uint8 \(4, 3\)"),
        ({"images": grid(0)}, r"no images; their shape is \(0, 4, 4, 3\)"),
        ({"images": grid(2, height=0)}, "no images"),
        ({"images": grid(2), "labels": np.zeros(3, int)}, r"labels are int64 \(3,\), .*\(2,\)"),
        ({"images": grid(2), "labels": np.zeros((2, 1), int)}, r"labels are int64 \(2, 1\)"),
        ({"images": grid(2), "labels": np.zeros(2)}, r"labels are float64 \(2,\)"),
        ({"images": grid(2), "labels": np.array(["a", "b"])}, "labels are <U1"),
        (
            {"images": grid(2), "labels": np.array([0, -3])},
            "labels from -3 to 0, 1 of 2 below 0, .* row 1 ",
        ),
        (
            {"images": grid(2), "labels": np.array([0, 2**64 - 1], "u8")},
            r"labels .*, 1 of 2 outside 0 to 999999, first in row 1 ",
        ),
        (
            {"images": np.array([None, {}], dtype=object)},
            "array images holds Python objects, expected numbers",
        ),
        (
            {"images": grid(2), "labels": np.array([0, 1], dtype=object)},
            r"array labels holds Python objects, .* save labels\.astype\(int\)",
        ),
    ],
)
def test_bad_npz(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.npz: {message}"):
        open_images(npz(tmp_path / "a.npz", **arrays))


def test_npz_labels_must_fit_the_outputs(tmp_path: Path) -> None:
    spec = npz(tmp_path / "a.npz", images=grid(4), labels=np.array([0, 10, 12, 3]))
    with pytest.raises(DataError, match=r"from 0 to 12, 2 of 4 outside 0 to 9, the model's 10 out"):
        open_images(spec, n_classes=10)
    assert open_images(spec, n_classes=100).labels is not None
    mapping = tmp_path / "map.json"
    mapping.write_text('{"0": 0, "10": 1, "12": 2, "3": 3}')
    mapped = open_images(spec, class_map=mapping, n_classes=4)
    assert mapped.labels is not None
    assert mapped.labels.tolist() == [0, 1, 2, 3]


def npy_bytes(shape: object, descr: str = "|u1", content: bytes = b"", version: int = 1) -> bytes:
    header = repr({"descr": descr, "fortran_order": False, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(header)) + header + content


def archive(path: Path, content: bytes, name: str = "images.npy", repeat: int = 0) -> str:
    with (
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file,
        file.open(name, "w", force_zip64=True) as member,
    ):
        member.write(content)
        for _ in range(repeat):
            member.write(bytes(1 << 20))
    return str(path)


def test_npz_with_a_long_header(tmp_path: Path) -> None:
    raw = io.BytesIO()
    np.lib.format.write_array(raw, grid(2), version=(2, 0))
    images = open_images(archive(tmp_path / "a.npz", raw.getvalue()))
    np.testing.assert_array_equal(images.read(1), grid(2)[1])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            npy_bytes((10**6, 10**4, 10**4, 3), content=bytes(48)),
            "array images is declared as uint8 .* are stored",
        ),
        (npy_bytes((-1, -1, 4, 3), content=bytes(12)), "array images is declared as uint8"),
        (npy_bytes((1, 4, 4, 3), content=bytes(47)), "array images is declared as uint8"),
        (npy_bytes((1, 4, 4, 3), content=bytes(49)), "array images is declared as uint8"),
        (npy_bytes("boo", content=bytes(48)), "is damaged, or no .npz file"),
        (npy_bytes((1, 4, 4, 3), content=bytes(48), version=9), "is damaged, or no .npz file"),
        (npy_bytes((1, 4, 4, 3), descr="(((", content=bytes(48)), "is damaged, or no .npz file"),
        (b"\x93NUMPY\x01\x00\x05\x00(((((", "is damaged, or no .npz file"),
        (b"not numpy", "is damaged, or no .npz file"),
        (b"", "is damaged, or no .npz file"),
    ],
)
def test_npz_headers_that_lie(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"a\.npz: {message}"):
        open_images(archive(tmp_path / "a.npz", content))


def test_npz_bomb_is_refused_unread(tmp_path: Path) -> None:
    n_bytes = 1025 << 20
    spec = archive(tmp_path / "a.npz", npy_bytes((1025, 1024, 1024)), repeat=1025)
    assert Path(spec).stat().st_size < n_bytes / 100
    with pytest.raises(
        DataError, match=r"images would unpack from .* 1,074,.* more than 100 times"
    ):
        open_images(spec)


def test_damaged_npz(tmp_path: Path) -> None:
    path = Path(npz(tmp_path / "a.npz", images=grid(50)))
    whole = path.read_bytes()
    damaged = {
        "no archive": b"PK\x03\x04 but no more",
        "cut": whole[: len(whole) // 2],
        "flipped": whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
    }
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"a\.npz: is empty \(0 bytes\)\. Download it again"):
        open_images(str(path))
    for content in damaged.values():
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"a\.npz: is damaged, or no \.npz file .* Download it again"
        ):
            open_images(str(path))


def test_nothing_in_an_npz_is_unpickled(tmp_path: Path) -> None:
    touched = tmp_path / "touched"

    class Touch:
        def __reduce__(self) -> tuple[object, tuple[object, ...]]:
            return os.mkdir, (str(touched),)

    raw = npy_bytes((1,), descr="|O", content=pickle.dumps(np.array([Touch()], dtype=object)))
    with pytest.raises(DataError, match="array images holds Python objects"):
        open_images(archive(tmp_path / "a.npz", raw))
    assert not touched.exists()


# ---- what is no DATA


def test_specs_that_are_not_known(tmp_path: Path) -> None:
    other = tmp_path / "images.rar"
    other.write_bytes(b"x")
    with pytest.raises(DataError, match=r"no such kind. Did you mean cifar10:/data\?"):
        open_images("cifar:/data")
    for spec in (str(other), "http://a.b/c.npz"):
        with pytest.raises(DataError, match=r"not of a known kind. Give a folder of class"):
            open_images(spec)
    for spec in (str(tmp_path / "none"), str(tmp_path / "none.npz"), "a\0b"):
        with pytest.raises(DataError, match=r"no such file or folder. Give a folder of class fold"):
            open_images(spec)
    with pytest.raises(
        ConfigError, match=r"--labels: 'some' is not known\. Use one of: auto, none"
    ):
        open_images(str(tmp_path), labels="some")
    with pytest.raises(ConfigError, match="channels: 2, expected 1 or 3"):
        open_images(str(tmp_path), channels=2)


def test_folders_that_cannot_be_right(tmp_path: Path) -> None:
    (tmp_path / "empty" / "sub").mkdir(parents=True)
    with pytest.raises(DataError, match=r"empty: no images, expected \.jpg \.jpeg \.png"):
        open_images(str(tmp_path / "empty"))
    splits = class_folders(tmp_path / "splits", ["train", "val"])
    with pytest.raises(DataError, match=r"are splits, not classes .* for example .*splits/train"):
        open_images(str(splits))
    mixed = class_folders(tmp_path / "mixed", ["cat"])
    write(mixed / "loose.png")
    with pytest.raises(DataError, match=r"1 image next to folders with images \(cat\)"):
        open_images(str(mixed))
    few = class_folders(tmp_path / "few", ["a", "b", "c"])
    for n_classes in (2, 4):
        with pytest.raises(
            DataError, match=f"3 classes for a model with {n_classes} outputs.*--cl"
        ):
            open_images(str(few), n_classes=n_classes)


# ---- decoding


def saved(tmp_path: Path, image: Image.Image, name: str = "a.png", **options) -> Path:
    (tmp_path / "one").mkdir(exist_ok=True)
    image.save(tmp_path / "one" / name, **options)
    return tmp_path / "one"


def one(folder: Path, channels: int = 3) -> np.ndarray:
    images = open_images(str(folder), channels=channels)
    pixels = images.read(0)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == channels
    return pixels


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
@pytest.mark.parametrize("channels", [1, 3])
def test_modes(tmp_path: Path, mode: str, channels: int) -> None:
    image = Image.fromarray(picture(3)).convert("RGBA" if mode == "PA" else "RGB").convert(mode)
    name = "a.tif" if mode in ("CMYK", "YCbCr", "PA") else "a.png"
    if mode == "PA":
        image = image.convert("P")
    folder = saved(tmp_path, image, name)
    with Image.open(folder / name) as reopened:
        expected = np.array(reopened.convert("RGB" if channels == 3 else "L"))
    np.testing.assert_array_equal(one(folder, channels).squeeze(), expected)


def test_palette_with_transparency_gives_no_warning(tmp_path: Path) -> None:
    image = Image.fromarray(picture(3)).convert("P")
    assert one(saved(tmp_path, image, transparency=bytes(range(256)))).shape == (12, 16, 3)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, name: str) -> None:
    deep = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    pixels = one(saved(tmp_path, Image.fromarray(deep), name), channels=1)
    np.testing.assert_array_equal(pixels[..., 0], np.arange(256).reshape(16, 16))


def test_sixteen_bits_are_rounded(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (16, 16), dtype=np.uint16)
    pixels = one(saved(tmp_path, Image.fromarray(deep)), channels=1)
    np.testing.assert_array_equal(pixels[..., 0], np.rint(deep / 257))


@pytest.mark.parametrize(
    "exif",
    [b"nonsense", b"II*\0\x08\0\0\0\xff", b"MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\1Z\0\0\0"],
    ids=["no block", "cut", "orientation Z"],
)
def test_a_broken_tag_block_leaves_the_image_upright(tmp_path: Path, exif: bytes) -> None:
    image = Image.fromarray(picture(0, 5, 7))
    folder = saved(tmp_path, image, "a.jpg", exif=b"Exif\0\0" + exif)
    assert one(folder).shape == (5, 7, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_rotation_tag_is_applied(tmp_path: Path, orientation: int, name: str) -> None:
    pixels = picture(1, 5, 7)
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).transpose(1, 0, 2),
        8: np.rot90(pixels),
    }[orientation]
    folder = saved(tmp_path, Image.fromarray(pixels), name, exif=exif)
    np.testing.assert_array_equal(one(folder), upright)


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.fromarray(picture(k, 6, 6, 1)) for k in range(3)]
    folder = saved(tmp_path, frames[0], "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(one(folder, channels=1)[..., 0], picture(0, 6, 6, 1))


def bad_files(root: Path) -> dict[str, str]:
    """Files that look like images, and what must be said of each."""
    root.mkdir(exist_ok=True)
    whole = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(whole, "PNG")
    jpeg = io.BytesIO()
    Image.fromarray(picture(0, 64, 64)).save(jpeg, "JPEG")
    (root / "empty.jpg").write_bytes(b"")
    (root / "text.jpg").write_text("no image")
    (root / "cut.png").write_bytes(whole.getvalue()[:500])
    (root / "cut.jpg").write_bytes(jpeg.getvalue()[:700])
    (root / "script.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    ihdr = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    giant = bytearray(whole.getvalue())
    giant[16:29] = ihdr
    giant[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    (root / "giant.png").write_bytes(bytes(giant))
    giant[16:24] = struct.pack(">II", 10_001, 10_000)
    ihdr = bytes(giant[16:29])
    giant[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    (root / "large.png").write_bytes(bytes(giant))
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(root / "float.tif")
    Image.fromarray(np.full((4, 4), 70_000, dtype=np.int32)).save(root / "deep.tif")
    (root / "gone.jpg").symlink_to(root / "nowhere.jpg")
    os.mkfifo(root / "pipe.jpg")
    return {
        "cut.jpg": "truncated",
        "cut.png": "truncated",
        "deep.tif": "more than 16 bits per pixel",
        "empty.jpg": "not an image in a known format",
        "float.tif": "floating-point pixels",
        "giant.png": "more than 50,000,000 pixels",
        "gone.jpg": "no such file",
        "large.png": "more than 50,000,000 pixels",
        "pipe.jpg": "not a regular file",
        "script.png": "not an image in a known format",
        "text.jpg": "not an image in a known format",
    }


def test_bad_images_are_stated(tmp_path: Path) -> None:
    reasons = bad_files(tmp_path / "bad")
    images = open_images(str(tmp_path / "bad"))
    assert [images.name(i) for i in range(len(images))] == list(reasons)
    for i, (name, reason) in enumerate(reasons.items()):
        with pytest.raises(DataError, match=f"^{name}: bad image, .*{reason}") as caught:
            images.read(i)
        assert caught.value.path == tmp_path / "bad" / name
        assert len(images.digest(i)) == 6


def test_names_stay_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\nb\u202e.png").write_bytes(b"")
    images = open_images(str(tmp_path))
    assert images.name(0) == r"a\nb\u202e.png"
    with pytest.raises(DataError, match=r"^a\\nb\\u202e\.png: bad image, not an image"):
        images.read(0)


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name in ("a.png", "a.jpg", "a.gif", "a.webp", "a.tif", "a.bmp"):
        folder = saved(tmp_path, Image.fromarray(picture(0, 24, 24)), name)
        images = open_images(str(folder))
        whole = np.frombuffer((folder / name).read_bytes(), dtype=np.uint8)
        n_bad = 0
        for _ in range(60):
            damaged = whole.copy()
            damaged[rng.integers(0, min(len(whole), 400), 8)] = rng.integers(0, 256, 8)
            (folder / name).write_bytes(damaged.tobytes())
            said = ""
            try:
                images.read(0)
            except DataError as error:
                said = str(error)
                n_bad += 1
            assert not said or said.startswith(f"{name}: bad image")
        assert n_bad > 0
        (folder / name).unlink()


# ---- digests and fingerprints


def test_digests_depend_on_content_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.png", seed=1)
    write(tmp_path / "b.png", seed=1)
    write(tmp_path / "c.png", seed=2)
    a, b, c = map(open_images(str(tmp_path)).digest, range(3))
    assert a == b != c
    assert len(a) == 6
    flat = npz(tmp_path / "x.npz", images=np.zeros((2, 4, 9), np.uint8))
    square = npz(tmp_path / "y.npz", images=np.zeros((2, 6, 6), np.uint8))
    assert open_images(flat).digest(0) != open_images(square).digest(0)
    assert open_images(flat).digest(0) == open_images(flat, channels=1).digest(1)


def test_fingerprint(tmp_path: Path) -> None:
    def of(pixels: np.ndarray, labels: np.ndarray | None, index: list[int] | None = None) -> str:
        arrays = {"images": pixels} | ({} if labels is None else {"labels": labels})
        images = open_images(npz(tmp_path / "a.npz", **arrays))
        return fingerprint(images, None if index is None else np.asarray(index))

    pixels, labels = grid(4), np.array([0, 1, 2, 3])
    base = of(pixels, labels)
    assert len(base) == 64
    assert base == of(pixels[::-1], labels[::-1]) == of(pixels, labels, [3, 1, 0, 2])
    changed = pixels.copy()
    changed[0, 0, 0, 0] ^= 1
    others = [of(changed, labels), of(pixels, labels[::-1]), of(pixels, None)]
    others += [of(pixels, labels, [0, 1, 2])]
    assert len({base, *others}) == 5
    # The value itself, so that another machine or version is held to it.
    zeros = open_images(npz(tmp_path / "z.npz", images=np.zeros((1, 2, 2), np.uint8)))
    assert fingerprint(zeros)[:16] == "906e49a89240b5d9"


# ---- splits


class Numbered(Images):
    """Images of which only the digests and labels are ever asked for."""

    kind = "npz"

    def __init__(self, labels: list[int] | None, digests: list[int]) -> None:
        super().__init__("numbered", 3)
        self.labels = None if labels is None else np.asarray(labels, dtype=np.int64)
        self.codes = digests

    def __len__(self) -> int:
        return len(self.codes)

    def name(self, i: int) -> str:
        return str(i)

    def read(self, i: int) -> np.ndarray:
        pytest.fail("pixels were asked for")

    def size_of(self, i: int) -> tuple[int, int]:
        pytest.fail("a size was asked for")

    def _hash(self, i: int) -> bytes:
        return self.codes[i].to_bytes(6, "little")


FRACTIONS = [(0.6, 0.2, 0.2), (0.75, 0.25, 0.0), (1.0, 0.0, 0.0), (0.5, 0.1, 0.4), (0.3, 0.7, 0.0)]


@settings(deadline=None, max_examples=150)
@given(
    counts=st.lists(st.integers(0, 13), min_size=1, max_size=40),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 2**40),
    labelled=st.booleans(),
    data=st.data(),
)
def test_cut(counts, fractions, seed, labelled, data) -> None:
    labels = [c for c, n in enumerate(counts) for _ in range(n)]
    labels = data.draw(st.permutations(labels)) if len(labels) < 60 else labels
    images = Numbered(labels if labelled else None, list(range(len(labels))))
    split = cut(images, fractions, seed)
    parts = (split.fit, split.select, split.test)
    assert split.duplicates == 0
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(labels)))
    for part, fraction in zip(parts, fractions, strict=True):
        assert part.dtype == np.int64
        assert (np.diff(part) > 0).all()
        assert abs(len(part) - fraction * len(labels)) <= 2 + len(counts) * 0.3
    groups = np.asarray(labels) if labelled else np.zeros(len(labels), int)
    for c in set(groups.tolist()):
        n = int((groups == c).sum())
        for part, fraction in zip(parts, fractions, strict=True):
            size = int((groups[part] == c).sum())
            assert abs(size - n * fraction) <= 1 + 1e-6
            assert size > 0 or n < 3 or n * fraction <= 0.3
            assert size == 0 or fraction > 0
    again = cut(images, fractions, seed)
    for one_part, same in zip(parts, (again.fit, again.select, again.test), strict=True):
        assert one_part.tolist() == same.tolist()


def test_cut_balances_many_tiny_classes() -> None:
    for n_each in (1, 2):
        labels = [c for c in range(500) for _ in range(n_each)]
        split = cut(Numbered(labels, list(range(len(labels)))), (0.6, 0.2, 0.2), 0)
        sizes = [len(split.fit), len(split.select), len(split.test)]
        expected = [len(labels) * f for f in (0.6, 0.2, 0.2)]
        assert max(abs(a - b) for a, b in zip(sizes, expected, strict=True)) <= 2


@pytest.mark.parametrize(
    ("n", "fractions", "sizes"),
    [
        (3, (0.6, 0.2, 0.2), [1, 1, 1]),
        (4, (0.6, 0.2, 0.2), [2, 1, 1]),
        (3, (0.75, 0.25, 0.0), [2, 1, 0]),
        (10, (0.9, 0.05, 0.05), [8, 1, 1]),
    ],
)
def test_small_classes_reach_every_part(
    n: int, fractions: tuple[float, float, float], sizes: list[int]
) -> None:
    labels = [c for c in range(30) for _ in range(n)]
    split = cut(Numbered(labels, list(range(len(labels)))), fractions, 0)
    for part, size in zip((split.fit, split.select, split.test), sizes, strict=True):
        assert np.bincount(np.asarray(labels)[part], minlength=30).tolist() == [size] * 30


@settings(deadline=None, max_examples=60)
@given(codes=st.lists(st.integers(0, 30), min_size=1, max_size=60), seed=st.integers(0, 99))
def test_duplicates_never_land_in_two_parts(codes: list[int], seed: int) -> None:
    split = cut(Numbered([code % 3 for code in codes], codes), (0.6, 0.2, 0.2), seed)
    used = np.concatenate([split.fit, split.select, split.test]).tolist()
    assert sorted(used) == [i for i, code in enumerate(codes) if code not in codes[:i]]
    assert split.duplicates == len(codes) - len(set(codes))


def test_cut_follows_the_images_not_their_places() -> None:
    forward = cut(Numbered(None, list(range(40))), (0.6, 0.2, 0.2), 5)
    backward = cut(Numbered(None, list(range(40))[::-1]), (0.6, 0.2, 0.2), 5)
    assert sorted(39 - backward.test) == forward.test.tolist()
    other = cut(Numbered(None, list(range(40))), (0.6, 0.2, 0.2), 6)
    assert other.test.tolist() != forward.test.tolist()
    assert forward.test.tolist() == [2, 12, 26, 29, 30, 33, 34, 36]


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.3), (1.2, -0.2, 0.0), (0.0, 0.0, 0.0)])
def test_cut_refuses_fractions(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ConfigError, match="expected 0 or more, with sum 1"):
        cut(Numbered(None, [1, 2]), fractions, 0)


def test_cut_of_real_files_drops_the_copy(tmp_path: Path) -> None:
    class_folders(tmp_path, ["a", "b"], n_each=5)
    write(tmp_path / "b" / "z.png", seed=0)
    split = cut(open_images(str(tmp_path)), (0.6, 0.2, 0.2), 0)
    assert split.duplicates == 1
    assert 10 not in np.concatenate([split.fit, split.select, split.test])


# ---- preprocessing


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box"])
@pytest.mark.parametrize(
    ("resize", "crop"),
    [
        ((9,), (7, 7)),
        ((9, 20), None),
        (None, (6, 5)),
        (None, (30, 13)),
        ((7,), (11,)),
        (None, None),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_equal_to_torchvision(tmp_path: Path, resize, crop, interpolation, channels) -> None:
    mean, std = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if channels == 3 else ((0.3,), (2,))
    steps: list[torch.nn.Module] = [v2.PILToTensor()]
    if crop:
        steps.insert(0, v2.CenterCrop(crop))
    if resize:
        mode = v2.InterpolationMode(interpolation)
        steps.insert(0, v2.Resize(list(resize), interpolation=mode, antialias=True))
    steps += [v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(mean), list(std))]
    preprocessing = Preprocessing(
        resize=resize, crop=crop, interpolation=interpolation, mean=mean, std=std, channels=channels
    )
    stack = np.stack([picture(k, 12, 17) for k in range(3)])
    for k in range(3):
        write(tmp_path / "files" / f"{k}.png", seed=k, width=17)
    wanted = torch.stack(
        [
            v2.Compose(steps)(Image.fromarray(pixels).convert("RGB" if channels == 3 else "L"))
            for pixels in stack
        ]
    )
    for spec in (str(tmp_path / "files"), npz(tmp_path / "a.npz", images=stack)):
        (batch,) = everything(open_images(spec, channels=channels), preprocessing)
        assert batch.x.is_contiguous()
        torch.testing.assert_close(batch.x, wanted, rtol=1e-5, atol=1e-6)


def test_scale_mean_std(tmp_path: Path) -> None:
    images = open_images(npz(tmp_path / "a.npz", images=grid(2)))
    p = Preprocessing(scale=0.5, mean=(1.0, 2.0, 3.0), std=(4.0,))
    (batch,) = everything(images, p)
    expected = (grid(2).transpose(0, 3, 1, 2) * 0.5 - np.array([1, 2, 3]).reshape(3, 1, 1)) / 4
    torch.testing.assert_close(batch.x, torch.from_numpy(expected).float())


def test_images_of_different_sizes_in_a_batch(tmp_path: Path) -> None:
    write(tmp_path / "a.png", height=9, width=8)
    write(tmp_path / "b.png", height=7, width=8)
    images = open_images(str(tmp_path))
    with pytest.raises(DataError, match=r"a\.png is 9x8, b\.png is 7x8 .*Give --resize and --crop"):
        list(everything(images))
    assert [tuple(b.x.shape) for b in everything(images, batch_size=1)] == [
        (1, 3, 9, 8),
        (1, 3, 7, 8),
    ]
    (batch,) = everything(images, SMALL)
    assert batch.x.shape == (2, 3, 8, 8)


# ---- batches


def labelled_npz(tmp_path: Path, n: int = 11) -> Images:
    return open_images(npz(tmp_path / "a.npz", images=grid(n), labels=np.arange(n)))


def test_batches_in_order(tmp_path: Path) -> None:
    images = labelled_npz(tmp_path)
    batches = Batches(images, np.array([7, 0, 3, 3, 10]), RAW, batch_size=2)
    assert len(batches) == 3
    for _ in range(2):
        found = list(batches)
        assert [batch.index.tolist() for batch in found] == [[7, 0], [3, 3], [10]]
        for batch in found:
            assert batch.y is not None
            assert batch.y.dtype == torch.int64
            assert batch.y.tolist() == batch.index.tolist()
            assert batch.index.dtype == np.int64
            assert batch.x.dtype == torch.float32
            expected = grid(11)[batch.index].transpose(0, 3, 1, 2)
            np.testing.assert_array_equal(batch.x.numpy(), expected)


def test_a_position_given_twice_comes_twice(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=2, n_bad=0)
    batches = Batches(images, np.array([1, 0, 1]), SMALL, batch_size=3)
    for _ in range(2):
        (batch,) = batches
        assert batch.index.tolist() == [1, 0, 1]
        assert torch.equal(batch.x[0], batch.x[2])
    alone = Batches(images, np.array([1, 1]), Preprocessing(crop=(2, 2)), batch_size=1)
    assert [batch.index.tolist() for batch in alone] == [[1], [1]]


def test_what_a_batch_holds_may_be_changed(tmp_path: Path) -> None:
    images = labelled_npz(tmp_path)
    batches = everything(images)
    for batch in batches:
        batch.x.zero_()
        assert batch.y is not None
        batch.y.zero_()
    assert torch.cat([batch.y for batch in batches if batch.y is not None]).tolist() == list(
        range(11)
    )
    assert all(batch.x.any() for batch in batches)


def test_shuffling_is_a_seeded_permutation(tmp_path: Path) -> None:
    images = labelled_npz(tmp_path)

    def order(batches: Batches) -> list[int]:
        return np.concatenate([batch.index for batch in batches]).tolist()

    as_given = everything(images)
    batches = as_given.with_seed(3)
    first = order(batches)
    assert first == order(batches) == order(everything(images).with_seed(3))
    assert first == np.random.Generator(np.random.PCG64(3)).permutation(11).tolist()
    assert sorted(first) == list(range(11)) != first
    assert order(batches.with_seed(4)) == order(as_given.with_seed(4)) != first
    assert order(as_given) == list(range(11))
    assert order(batches) == first
    with pytest.raises(ConfigError, match="--seed: -1, expected at least 0"):
        batches.with_seed(-1)


def test_options_out_of_range(tmp_path: Path) -> None:
    images = labelled_npz(tmp_path)
    with pytest.raises(ConfigError, match="--batch-size: 0, expected at least 1"):
        everything(images, batch_size=0)
    with pytest.raises(ConfigError, match="--workers: -2, expected at least -1"):
        everything(images, workers=-2)
    with pytest.raises(ConfigError, match="channels: 1 in the preprocessing, 3 in the images"):
        everything(images, Preprocessing(channels=1))
    for index in ([11], [-1]):
        with pytest.raises(ConfigError, match="index: positions outside 0 to 10"):
            Batches(images, np.array(index), RAW, batch_size=1)
    nothing = Batches(images, np.array([], dtype=np.int64), RAW, batch_size=1)
    assert len(nothing) == 0
    with pytest.raises(DataError, match=r"a\.npz: no usable image among 0\."):
        list(nothing)


def good_and_bad(root: Path, n_good: int, n_bad: int) -> Images:
    for k in range(n_good):
        write(root / f"good{k:03d}.png", seed=k)
    for k in range(n_bad):
        (root / f"bad{k:03d}.png").write_bytes(b"nothing")
    return open_images(str(root))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_images_are_skipped_and_noted_once(tmp_path: Path, workers: int) -> None:
    images = good_and_bad(tmp_path, n_good=4, n_bad=5)
    batches = everything(images, SMALL, batch_size=3, workers=workers)
    expected = Skipped("bad000.png", "bad000.png: bad image, not an image in a known format.")
    for _ in range(2):
        assert [batch.index.tolist() for batch in batches] == [[5], [6, 7, 8]]
        assert batches.skipped[0] == expected
        assert [skip.name for skip in batches.skipped] == [f"bad{k:03d}.png" for k in range(5)]
    assert sum(len(batch.x) for batch in batches.with_seed(1)) == 4
    assert len(batches.skipped) == 5


def test_too_many_bad_images_end_the_pass(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=10, n_bad=6)
    message = r"at least 6 bad images among 16, 5 allowed: bad000.png, .* and 1 more.*--max-bad"
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            list(everything(images, SMALL))
    assert sum(len(batch.x) for batch in everything(images, SMALL, max_bad=6)) == 10
    with pytest.raises(DataError, match="at least 1 bad image among 16, 0 allowed"):
        list(everything(images, SMALL, max_bad=0))


def test_no_good_image_at_all(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=0, n_bad=2)
    with pytest.raises(DataError, match=r"no usable image among 2: bad000.png: bad image, not an"):
        list(everything(images))


def test_a_thread_of_an_image_is_not_blown_up(tmp_path: Path) -> None:
    write(tmp_path / "a.png")
    write(tmp_path / "thread.png", height=1, width=5000)
    batches = everything(open_images(str(tmp_path)), Preprocessing(resize=(224,), crop=(8, 8)))
    assert [batch.index.tolist() for batch in batches] == [[0]]
    assert "thread.png: bad image, (5000, 1) after resize exceeds" in batches.skipped[0].reason


# ---- memory and workers


def test_a_second_pass_reads_nothing(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=6, n_bad=1)
    batches = everything(images, SMALL)
    first = list(batches)
    for path in tmp_path.iterdir():
        path.unlink()
    for again in (batches, everything(images, SMALL)):
        for a, b in zip(first, again, strict=True):
            assert torch.equal(a.x, b.x)
            assert a.index.tolist() == b.index.tolist()
    other_scale = Preprocessing(resize=(8,), crop=(8, 8), mean=(0.5,))
    assert torch.equal(next(iter(everything(images, other_scale))).x, first[0].x - 0.5)
    with pytest.raises(DataError, match=r"no such file"):
        list(everything(images, Preprocessing(resize=(9,), crop=(8, 8)), max_bad=3))


def test_memory_is_bounded(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=6, n_bad=0)
    batches = everything(images, SMALL, cache_bytes=2 * 8 * 8 * 3 + 5)
    list(batches)
    assert len(list(batches)) == 2
    for path in tmp_path.iterdir():
        path.unlink()
    assert sum(len(batch.x) for batch in batches) == 2
    assert len(batches.skipped) == 4


def test_workers_change_nothing(tmp_path: Path) -> None:
    for k in range(7):
        write(tmp_path / f"{k}.png", seed=k)
    plain = list(everything(open_images(str(tmp_path)), SMALL, workers=0))
    state = torch.random.get_rng_state()
    batches = everything(open_images(str(tmp_path)), SMALL, workers=2)
    for _ in range(2):
        for a, b in zip(plain, batches, strict=True):
            assert torch.equal(a.x, b.x)
    assert torch.equal(state, torch.random.get_rng_state())
    next(iter(everything(open_images(str(tmp_path)), SMALL, workers=2)))  # left in the middle


def test_many_files_use_workers_by_themselves(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=300, n_bad=0)
    batches = everything(images, Preprocessing(crop=(2, 2)), batch_size=100)
    for _ in range(2):
        found = torch.cat([batch.x for batch in batches])
        assert [len(batch.index) for batch in batches] == [100, 100, 100]
        expected = picture(299)[5:7, 7:9].transpose(2, 0, 1) / 255
        torch.testing.assert_close(found[299], torch.from_numpy(expected).float())


def test_workers_are_not_sent_what_is_in_memory(tmp_path: Path) -> None:
    images = good_and_bad(tmp_path, n_good=2, n_bad=0)
    list(everything(images, SMALL))
    copy = pickle.loads(pickle.dumps(images))
    assert images.shaped
    assert copy.shaped == {}
    np.testing.assert_array_equal(copy.read(1), images.read(1))


# ---- real data


@needs_data
def test_real_folder_with_labels() -> None:
    images = open_images(str(DATA / "imagenet-val"), n_classes=1000)
    assert (images.kind, len(images)) == ("labels.csv", 650)
    batches = Batches(images, np.arange(16), Preprocessing(crop=(224, 224)), batch_size=16)
    (batch,) = batches
    assert batch.x.shape == (16, 3, 224, 224)
    assert batches.skipped == []
    split = cut(images, (0.6, 0.2, 0.2), 0)
    assert abs(len(split.test) - 130) <= 20
    with pytest.raises(DataError, match=r"outside 0 to 9, the model's 10 outputs"):
        open_images(str(DATA / "imagenet-val"), n_classes=10)


@needs_data
def test_real_arrays() -> None:
    images = open_images(str(DATA / "cifar10" / "test.npz"), n_classes=10)
    split = cut(images, (0.6, 0.2, 0.2), 0)
    assert images.labels is not None
    assert len(split.fit) + len(split.select) + len(split.test) + split.duplicates == 5000
    counts = np.bincount(images.labels[split.select], minlength=10)
    assert abs(counts - 100).max() <= 1 + split.duplicates
    digits = open_images(str(DATA / "mnist" / "test.npz"), channels=1)
    p = Preprocessing(resize=(16, 16), channels=1)
    batch = next(iter(Batches(digits, np.arange(8), p, batch_size=8)))
    assert batch.x.shape == (8, 1, 16, 16)


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [
        (33, 8, [9, 8, 8, 8]),
        (34, 8, [8, 8, 8, 8, 2]),
        (32, 8, [8, 8, 8, 8]),
        (3, 2, [3]),
        (1, 8, [1]),
        (136, 64, [68, 68]),
        (150, 64, [64, 64, 22]),
    ],
)
def test_a_far_smaller_last_batch_is_dealt_to_the_others(n: int, size: int, expected: list[int]):
    batches = Batches(ArrayImages("x", grid(n), 3), np.arange(n), RAW, batch_size=size)
    evened = batches.evened()
    assert [len(batch.index) for batch in evened] == expected
    assert np.array_equal(np.concatenate([batch.index for batch in evened]), np.arange(n))
    assert len(evened) == len(expected)
    assert len(batches) == -(-n // size)
    assert len(evened.dealt(1, 2)) == len(expected) // 2
