"""Data of any task: masks, targets of any shape, boxes; refusals; that targets stay in step."""

import json
import os
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file

from bnfix.core.errors import ConfigError, DataError
from bnfix.core.settings import Preprocessing
from bnfix.data.arrays import refuse_not_finite
from bnfix.data.batches import Batch, Batches, augmented
from bnfix.data.open import open_images
from bnfix.data.splits import cut, fingerprint
from bnfix.metrics.tasks import Segmentation
from tests.real import DATA, needs_data

RAW = Preprocessing(scale=1.0)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def put(root: Path, name: str, pixels: np.ndarray, mask: np.ndarray | Image.Image) -> None:
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(root / "images" / f"{name}.png")
    image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
    image.save(root / "masks" / f"{name}.png")


def folder(root: Path, n: int = 4, height: int = 6, width: int = 5) -> Path:
    for k in range(n):
        pixels = rng(k).integers(0, 256, (height, width, 3), dtype=np.uint8)
        put(root, f"{k}", pixels, rng(100 + k).integers(0, 9, (height, width), dtype=np.uint8))
    return root


def png(
    width: int, height: int, bits: int, colour: int, rows: bytes, palette: bytes = b""
) -> bytes:
    """A PNG by the book, of any claim about its size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checked = struct.pack(">I", zlib.crc32(name + content))
        return struct.pack(">I", len(content)) + name + content + checked

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = chunk(b"IHDR", header) + (chunk(b"PLTE", palette) if palette else b"")
    data = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts + data


def packed(mask: np.ndarray, bits: int) -> bytes:
    """Rows of a PNG, no filter, so many bits a pixel."""
    rows = []
    for row in mask.tolist():
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        rows.append(bytes([0]) + int(text, 2).to_bytes(len(text) // 8, "big"))
    return b"".join(rows)


def only(images, preprocessing: Preprocessing = RAW, n: int | None = None) -> Batch:
    n = len(images) if n is None else n
    (batch,) = Batches(images, np.arange(n), preprocessing, batch_size=n, workers=0)
    return batch


# --- segmentation folders ---


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 13), st.integers(1, 13), st.sampled_from([1, 2, 4, 8, 16]), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_masks_are_the_numbers_in_the_file(
    tmp_path_factory, height, width, bits, is_palette, seed
) -> None:
    root = tmp_path_factory.mktemp("masks")
    is_palette = is_palette and bits < 16
    mask = rng(seed).integers(0, 1 << bits, (height, width))
    pixels = rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    put(root, "a", pixels, np.zeros((1, 1), np.uint8))
    palette = rng(seed).bytes(3 << bits) if is_palette else b""
    colour = 3 if is_palette else 0
    (root / "masks" / "a.png").write_bytes(
        png(width, height, bits, colour, packed(mask, bits), palette)
    )
    batch = only(open_images(str(root)))
    assert (batch.x.dtype, batch.y.dtype) == (torch.float32, torch.int64)
    assert batch.y[0].tolist() == mask.tolist()
    assert batch.x[0].permute(1, 2, 0).int().tolist() == pixels.tolist()


@pytest.mark.parametrize("kind", ["none", "light"])
@pytest.mark.parametrize("size", [(1, 1), (7, 13), (24, 17)])
def test_a_mask_that_is_a_channel_stays_one(tmp_path, kind, size) -> None:
    for k in range(9):
        pixels = rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)
        put(tmp_path, f"{k}", pixels, pixels[..., 1])
    images = open_images(str(tmp_path))
    crop = (max(1, size[0] // 2), max(1, size[1] - 3))
    enlarged = (size[0] + 6, size[1] * 2)
    for resize, cropped in ((None, None), (None, crop), (enlarged, None), ((9,), (5, 5))):
        p = Preprocessing(resize=resize, crop=cropped, scale=1.0, interpolation="nearest")
        batches = Batches(images, np.arange(9), p, batch_size=4, workers=0)
        varied = list(augmented(batches, kind, 3, 0))
        assert sum(len(batch.y) for batch in varied) == 9
        for batch in varied:
            assert type(batch.y) is torch.Tensor
            assert torch.equal(batch.x[:, 1].long(), batch.y)
        if kind == "light" and cropped is None and min(size) > 1:
            plain = torch.cat([batch.y for batch in batches])
            assert not torch.equal(plain, torch.cat([batch.y for batch in varied]))


def test_a_random_part_of_an_image_and_of_its_mask_is_the_same_part() -> None:
    edges = torch.arange(4, 60, 4)
    columns = (torch.arange(64) >= edges[:, None]).float()  # black to the left of an edge
    x = columns[:, None, None, :].expand(-1, 3, 64, 64)
    batch = Batch(x, x[:, 0].long(), np.arange(len(edges)))
    (found,) = augmented([batch], "standard", 0, 0)
    wrong = (found.x[:, 0] > 0.5) != (found.y == 1)
    # Interpolation moves an edge by a pixel at most.
    assert wrong.flatten(1).sum(1).max() <= 2 * 64
    assert not torch.equal(found.y, batch.y)


@pytest.mark.parametrize("small", [8, 9, 16])
def test_a_shrunk_mask_lies_where_its_shrunk_image_does(tmp_path, small) -> None:
    edges = [edge for edge in range(2, 62) if (2 * edge * small) % 128 not in range(56, 73)]
    for edge in edges:
        mask = np.repeat((np.arange(64) >= edge)[None], 64, 0).astype(np.uint8)
        put(tmp_path, f"{edge:02d}", np.repeat(mask[..., None] * 255, 3, 2), mask)
    batch = only(open_images(str(tmp_path)), Preprocessing(resize=(small,)))
    assert torch.equal(batch.x[:, 0] > 0.5, batch.y == 1)


def test_batches_are_the_same_from_workers_and_from_memory(tmp_path) -> None:
    images = open_images(str(folder(tmp_path, 5)))
    p = Preprocessing(resize=(8, 7), crop=(6, 5))
    here = Batches(images, np.arange(5), p, batch_size=2, workers=0)
    again = list(here)
    shared = Batches(open_images(str(tmp_path)), np.arange(5), p, batch_size=2, workers=1)
    for one, *others in zip(here, again, shared, strict=True):
        for other in others:
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)


def test_names_that_do_not_pair(tmp_path) -> None:
    root = folder(tmp_path, 8)
    for k in range(7):
        (root / "masks" / f"{k}.png").rename(root / "masks" / f"{k}_mask.png")
    said = (
        r"7 images have no mask with their name \(0.png, 1.png, .* and 2 more\); 7 masks have no i"
    )
    with pytest.raises(DataError, match=rf"{said}mage \(0_mask.*Give masks/NAME\.png"):
        open_images(str(root))
    # Without labels masks are not looked at.
    images = open_images(str(root), labels="none")
    assert (len(images), images.labelled, only(images).y) == (8, False, None)


def test_a_class_outside_the_range_is_named_by_its_file(tmp_path) -> None:
    root = folder(tmp_path)
    put(root, "2", np.zeros((6, 5, 3), np.uint8), np.full((6, 5), 40, np.uint8))
    batch = only(open_images(str(root)))
    with pytest.raises(
        DataError, match=r"masks: images/2\.png has class 40, expected 0 to 8, because"
    ):
        Segmentation().targets(batch, torch.zeros(4, 9, 6, 5), None)


def test_a_mask_too_many_is_said_and_a_split_is_named(tmp_path) -> None:
    root = folder(tmp_path / "val")
    Image.new("L", (3, 3)).save(root / "masks" / "more.png")
    images = open_images(f"{tmp_path}#val")
    assert images.notes == ["1 masks without an image skipped: more.png"]
    with pytest.raises(DataError, match=r"its folders hold images/ and masks/\. Give one.*/val"):
        open_images(str(tmp_path))


def test_masks_that_lose_their_classes_are_refused(tmp_path) -> None:
    root = folder(tmp_path, 2)
    (root / "masks" / "1.png").unlink()
    Image.new("L", (5, 6)).save(root / "masks" / "1.jpg")
    with pytest.raises(DataError, match=r"1 masks are not PNG, .* keep class indices \(1\.jpg\)"):
        open_images(str(root))
    (root / "masks" / "1.jpg").rename(root / "masks" / "1.png")  # a JPEG by another name
    batches = Batches(open_images(str(root)), np.arange(2), RAW, batch_size=2, workers=0)
    assert len(next(iter(batches)).y) == 1
    assert [one.reason for one in batches.skipped] == [
        "masks/1.png: bad image, not an image in PNG."
    ]
    Image.new("RGB", (5, 6)).save(root / "masks" / "1.png")
    with pytest.raises(
        DataError, match=r"masks/1\.png: a mask in colours \(RGB\), expected one cl"
    ):
        only(open_images(str(root)))
    Image.new("L", (5, 6)).save(root / "images" / "1.bmp")
    with pytest.raises(DataError, match=r"1 names belong to several files \(1\)"):
        open_images(str(root))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_mask_of_another_size_is_refused_wherever_it_is(tmp_path, workers) -> None:
    root = folder(tmp_path, 9)
    Image.new("L", (6, 5)).save(root / "masks" / "7.png")
    batches = Batches(open_images(str(root)), np.arange(9), RAW, batch_size=2, workers=workers)
    said = r"masks/7\.png: the mask is 5x6, its image is 6x5 \(height x width\), expected one size"
    with pytest.raises(DataError, match=f"^{root}: {said}"):
        list(batches)


def test_sizes_are_compared_before_anything_is_decoded(tmp_path) -> None:
    root = folder(tmp_path, 1)
    (root / "images" / "0.png").write_bytes(png(5, 6, 8, 2, b""))  # no pixels behind the header
    Image.new("L", (6, 6)).save(root / "masks" / "0.png")
    with pytest.raises(DataError, match=r"the mask is 6x6, its image is 6x5"):
        only(open_images(str(root)))


def test_masks_are_not_padded_and_sizes_need_resize(tmp_path) -> None:
    root = folder(tmp_path, 2)
    with pytest.raises(
        DataError, match=r"its target is 6x5, too small for --crop 6x6, .* --resize"
    ):
        only(open_images(str(root)), Preprocessing(crop=(6, 6)))
    put(root, "1", np.zeros((7, 5, 3), np.uint8), np.zeros((7, 5), np.uint8))
    images = open_images(str(root))
    with pytest.raises(DataError, match=r"0\.png is 6x5, images/1\.png is 7x5 .* Give --resize"):
        only(images)
    assert only(images, Preprocessing(resize=(6, 5))).y.shape == (2, 6, 5)


@pytest.mark.parametrize("part", ["images", "masks"])
def test_a_png_that_claims_to_be_enormous_is_not_decoded(tmp_path, part) -> None:
    root = folder(tmp_path, 3)
    (root / part / "1.png").write_bytes(png(60_000, 60_000, 8, 0, b"\0" * 100))
    batches = Batches(open_images(str(root)), np.arange(3), RAW, batch_size=3, workers=0)
    (batch,) = batches
    assert batch.index.tolist() == [0, 2]
    assert batch.y.shape == (2, 6, 5)
    (skipped,) = batches.skipped
    assert skipped.reason == f"{part}/1.png: bad image, more than 50,000,000 pixels."


def test_fingerprints_know_masks_and_splits_do_not(tmp_path) -> None:
    root = folder(tmp_path, 20)
    images = open_images(str(root))
    split = cut(images, (0.6, 0.2, 0.2), 0)
    assert split.sizes() == {"fit": 12, "select": 4, "test": 4}
    before = fingerprint(images)
    Image.new("L", (5, 6)).save(root / "masks" / "3.png")
    images = open_images(str(root))
    assert fingerprint(images) != before
    assert fingerprint(images, np.array([1, 2])) == fingerprint(images, np.array([2, 1]))
    assert cut(images, (0.6, 0.2, 0.2), 0).test.tolist() == split.test.tolist()


def test_the_order_mean_deviation_then_255_is_a_mean_and_a_deviation(tmp_path) -> None:
    pixels = rng().integers(0, 256, (5, 4, 3), dtype=np.uint8)
    put(tmp_path, "a", pixels, pixels[..., 0])
    mean, std = np.array([72.4, 82.9, 73.2]), np.array([45.3, 46.2, 44.9])
    expected = (pixels[..., ::-1].astype(np.float64) - mean) / std / 255
    for scale in (1.0, 1 / 255):
        p = Preprocessing(
            bgr=True, scale=scale, mean=tuple(mean * scale), std=tuple(std * 255 * scale)
        )
        found = only(open_images(str(tmp_path)), p).x[0].permute(1, 2, 0)
        np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-6)


@needs_data
def test_real_frames_and_their_masks() -> None:
    images = open_images(str(DATA / "camvid" / "test"))
    batch = only(images, n=3)
    assert (len(images), batch.x.shape, batch.y.shape) == (31, (3, 3, 360, 480), (3, 360, 480))
    with Image.open(DATA / "camvid" / "test" / images.masks[2]) as mask:
        assert batch.y[2].tolist() == np.asarray(mask).tolist()
    assert 0 <= int(batch.y.min()) <= int(batch.y.max()) <= 11


# --- arrays ---


def save(path: Path, arrays: dict[str, np.ndarray]) -> str:
    tensors = {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".pt":
        torch.save(tensors, path)
    else:
        save_file(tensors, path)
    return str(path)


@pytest.mark.parametrize("suffix", [".npz", ".pt", ".safetensors"])
@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
    st.sampled_from([np.float16, np.float32, np.float64, np.int16]),
    st.sampled_from([np.float16, np.float64, np.uint8, np.int16, np.int64, np.bool_]),
)
def test_arrays_of_any_shape_and_type(tmp_path_factory, suffix, shape, rest, kind, other) -> None:
    x = (rng().normal(size=shape) * 9).astype(kind)
    y = (rng(1).normal(size=(shape[0], *rest)) > 0).astype(other)
    path = tmp_path_factory.mktemp("arrays") / f"a{suffix}"
    images = open_images(save(path, {"inputs": x, "targets": y, "more": y}))
    assert images.labelled
    assert images.labels is None
    assert "arrays skipped: more" in images.notes[0]
    batch = only(images, None)
    assert batch.x.dtype == (torch.float32 if x.dtype.kind == "f" else torch.int64)
    assert batch.y.dtype == (torch.float32 if y.dtype.kind == "f" else torch.int64)
    np.testing.assert_array_equal(batch.x.numpy(), x.astype(np.float32))
    np.testing.assert_array_equal(batch.y.numpy(), y.astype(np.float32))
    hidden = open_images(str(path), labels="none")
    assert (hidden.labelled, only(hidden, None).y) == (False, None)


def test_shards_are_one_array(tmp_path) -> None:
    x, y = rng().normal(size=(7, 2)), rng(1).normal(size=(7, 3))
    for k, part in enumerate((slice(0, 3), slice(3, 4), slice(4, 7))):
        save(tmp_path / f"p-{k}.npz", {"inputs": x[part], "targets": y[part]})
    images = open_images(f"{tmp_path}/p-{{0..2}}.npz")
    batch = only(images, None)
    np.testing.assert_array_equal(batch.x.numpy(), x.astype(np.float32))
    np.testing.assert_array_equal(batch.y.numpy(), y.astype(np.float32))
    save(tmp_path / "p-3.npz", {"inputs": x[:, :1], "targets": y})
    with pytest.raises(DataError, match=r"inputs in p-3\.npz and p-0\.npz differ: float64 \(1,\)"):
        open_images(f"{tmp_path}/p-{{0..3}}.npz")
    with pytest.raises(DataError, match=r"1 of 5 files are missing: .*p-4\.npz"):
        open_images(f"{tmp_path}/p-{{0..4}}.npz")


def test_images_in_an_archive_move_with_masks_of_their_size(tmp_path) -> None:
    pixels = rng().integers(0, 256, (4, 6, 9, 3), dtype=np.uint8)
    masks = pixels[..., 2].astype(np.int32)
    for name in ("images", "inputs"):  # 8 bits, channels last
        images = open_images(save(tmp_path / "a.npz", {name: pixels, "targets": masks}))
        assert only(images).y.tolist() == masks.tolist()
        batch = only(images, Preprocessing(crop=(4, 5), scale=1.0))
        assert torch.equal(batch.x[:, 2].long(), batch.y)
        assert batch.y.tolist() == masks[:, 1:5, 2:7].tolist()
    depth = save(tmp_path / "b.npz", {"images": pixels, "targets": masks / 2})
    said = r"targets of shape \(6, 9\) per example, expected masks .* --crop would not move other"
    with pytest.raises(ConfigError, match=said):
        only(open_images(depth), Preprocessing(crop=(4, 5)))
    assert only(open_images(depth)).y.dtype == torch.float32


def spoilt(value: float, *place: int, dtype: type = np.float64) -> np.ndarray:
    array = np.zeros((3, 2, 4), dtype)
    array[place] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"inputs": spoilt(np.nan, 2, 0, 3)}, r"inputs\[2, 0, 3\] is nan, expected finite numbers"),
        ({"inputs": spoilt(-np.inf, 0, 1, 0, dtype=np.float16)}, r"inputs\[0, 1, 0\] is -inf"),
        ({"inputs": spoilt(1e39, 1, 1, 1)}, r"inputs\[1, 1, 1\] is inf, .* in float32"),
        ({"inputs": np.zeros(3), "targets": spoilt(np.nan, 1, 0, 0)}, r"targets\[1, 0, 0\] is nan"),
        ({"inputs": np.zeros(3), "targets": np.zeros(2)}, r"targets are float64 \(2,\), expected"),
        ({"inputs": np.zeros(3), "targets": np.array(1)}, r"targets are int64 \(\), expected"),
        (
            {"inputs": np.zeros(3), "targets": np.zeros(3), "labels": np.zeros(3, int)},
            "labels and targets, expected one of them",
        ),
        ({"inputs": np.zeros(2), "targets": np.array([1j, 0])}, r"targets are complex128 \(2,\)"),
        ({"targets": np.zeros(3)}, "arrays targets.*, expected one named images, or inputs"),
    ],
)
@pytest.mark.parametrize("suffix", [".npz", ".pt"])
def test_arrays_that_are_refused(tmp_path, arrays, said, suffix) -> None:
    with pytest.raises(DataError, match=rf"^DATA .*a{suffix}: {said}") as caught:
        open_images(save(tmp_path / f"a{suffix}", arrays))
    assert "\n" not in str(caught.value)


def test_the_place_of_a_number_far_behind() -> None:
    values = torch.zeros((1 << 23) + 5, 4)
    values[(1 << 23) + 3, 2] = torch.inf
    with pytest.raises(DataError, match=r"^inputs\[8388611, 2\] is inf"):
        refuse_not_finite("inputs", values)


class Code:
    def __reduce__(self) -> tuple:
        return (print, ("run",))


def test_files_that_would_run_code_or_claim_too_much(tmp_path, capsys) -> None:
    objects = np.array([Code(), None], dtype=object)
    np.savez(tmp_path / "a.npz", inputs=objects)
    with pytest.raises(DataError, match="array inputs holds Python objects"):
        open_images(str(tmp_path / "a.npz"))
    torch.save({"inputs": Code()}, tmp_path / "a.pt")
    with pytest.raises(DataError, match=r"^DATA \S+a\.pt: not loaded, it holds pickled objects"):
        open_images(str(tmp_path / "a.pt"))
    torch.save({"inputs": torch.zeros(1).expand(10**12)}, tmp_path / "b.pt")
    with pytest.raises(
        DataError, match=r"inputs is torch\.float32 \(1000000000000,\), expected pl"
    ):
        open_images(str(tmp_path / "b.pt"))
    torch.save([torch.zeros(3)], tmp_path / "c.pt")
    with pytest.raises(DataError, match=r"holds a list, expected a dict"):
        open_images(str(tmp_path / "c.pt"))
    assert capsys.readouterr().out == ""


def test_tensors_of_torch_only(tmp_path) -> None:
    x = torch.randn(3, 4).bfloat16()
    torch.save({"inputs": x, "targets": x, "about": "mine"}, tmp_path / "a.pt")
    images = open_images(str(tmp_path / "a.pt"))
    batch = only(images, None)
    assert torch.equal(batch.x, x.float())
    assert torch.equal(batch.y, x.float())
    assert images.notes == ["arrays skipped: about"]


def test_statistics_of_a_file_of_tensors_and_of_masked_images(tmp_path, cli) -> None:
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def rows(): return nn.Sequential(nn.BatchNorm1d(5))\n"
        "def maps(): return nn.Sequential(nn.BatchNorm2d(3))\n"
    )
    x = rng().normal(3, 2, (40, 5))
    save(tmp_path / "x.pt", {"inputs": x, "targets": x[:, :2]})
    folder(tmp_path / "frames", 8)
    net = {"rows": torch.nn.BatchNorm1d(5), "maps": torch.nn.BatchNorm2d(3)}
    for name, data in (("rows", "x.pt"), ("maps", "frames")):
        torch.save(torch.nn.Sequential(net[name]).state_dict(), tmp_path / f"{name}.pth")
        out = tmp_path / f"{name}.safetensors"
        words = ["--labels", "none", "--statistics", "population", "--model"]
        words += [f"{tmp_path}/net.py:{name}", "--data", tmp_path / data, "-o", out]
        words += ["--mean", "0", "--std", "1"] if name == "maps" else []
        done = cli("calibrate", tmp_path / f"{name}.pth", *words)
        assert done.code == 0, done.err
    frames = [np.asarray(Image.open(p)) for p in (tmp_path / "frames" / "images").iterdir()]
    pixels = np.stack(frames).reshape(-1, 3).astype(np.float64) / 255
    for name, values in (("rows", x.astype(np.float32).astype(np.float64)), ("maps", pixels)):
        found = load_file(tmp_path / f"{name}.safetensors")
        np.testing.assert_allclose(found["0.running_mean"], values.mean(0), rtol=1e-5)
        np.testing.assert_allclose(found["0.running_var"], values.var(0), rtol=1e-5)


# --- callables ---

CODE = """
import numpy as np
import torch

PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 6, 3), dtype=np.uint8)


def maps():
    return [(torch.full((2, 3), float(k)), torch.full((5, 2), k / 2)) for k in range(3)]


def nests():
    return [({"a": np.ones(k + 1)}, {"boxes": np.zeros((k, 4)), "n": k}) for k in range(3)]


def alike():
    return [((np.ones(2), 1), (np.full(3, k), True)) for k in range(3)]


def numbers():
    return [(np.ones(2), 0.5), (np.ones(2), 2)]


def masks():
    buffer = np.zeros((4, 6), np.int16)
    for image in PIXELS:
        buffer[:] = image[..., 0]
        yield image, buffer


def points():
    return [(image, np.zeros(2)) for image in PIXELS] + [(PIXELS[0], np.full(2, 0.3))]


def boxes():
    return [(image, {"boxes": np.zeros((k, 4))}) for k, image in enumerate(PIXELS)]


def depths():
    return [(image, image[..., 0] / 255) for image in PIXELS]


def marks():
    return [(image, np.array([1.0, 0.0])) for image in PIXELS]
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path / "mine.py")


def test_targets_of_any_form_from_a_callable(code) -> None:
    batch = only(open_images(f"{code}:maps"), None)
    assert batch.y.shape == (3, 5, 2)
    assert batch.y[:, 0, 0].tolist() == [0, 0.5, 1]
    images = open_images(f"{code}:nests")
    # Boxes of several numbers an image: one dict an example, also where a batch has one.
    (batch,) = Batches(images, np.array([2]), None, batch_size=1)
    assert [(y["boxes"].shape, int(y["n"])) for y in batch.y] == [((2, 4), 2)]
    batch = only(open_images(f"{code}:alike"), None)
    assert batch.x[0].shape == (3, 2)
    assert batch.y[0].tolist() == [[0] * 3, [1] * 3, [2] * 3]
    assert only(open_images(f"{code}:numbers"), None).y.tolist() == [0.5, 2.0]
    assert len(set(map(images.target_digest, range(3)))) == 3


def test_masks_of_a_callable_move_and_other_targets_may_not(code) -> None:
    images = open_images(f"{code}:masks")
    batches = Batches(images, np.arange(3), Preprocessing(crop=(3, 4), scale=1.0), batch_size=3)
    for kind in ("none", "light"):
        (batch,) = augmented(batches, kind, 1, 0)
        assert torch.equal(batch.x[:, 0].long(), batch.y)
    (batch,) = augmented([only(open_images(f"{code}:marks"))], "light", 0, 0)
    assert batch.y.tolist() == [[1, 0]] * 3
    said = r"--augment light: targets \(float32 of shape \(4, 2\)\) are neither classes nor masks"
    with pytest.raises(ConfigError, match=said):
        list(augmented([only(open_images(f"{code}:points"))], "light", 0, 0))
    assert only(open_images(f"{code}:points"), Preprocessing(crop=(3, 4))).y.shape == (4, 2)
    for name, found in (("boxes", "that are nests"), ("depths", r"of shape \(4, 6\)")):
        images = open_images(f"{code}:{name}")
        assert len(only(images).y) == 3
        with pytest.raises(
            ConfigError, match=rf"targets {found} per example, expected masks .* --crop"
        ):
            only(images, Preprocessing(crop=(3, 4)))


# --- boxes ---


def coco(root: Path, **changes: object) -> Path:
    """Two images of 20 x 40 and 30 x 30 pixels, with a box, a crowd and a line."""
    (root / "images").mkdir(parents=True)
    (root / "annotations").mkdir()
    for k, (height, width) in enumerate([(20, 40), (30, 30)]):
        Image.new("RGB", (width, height), (k, 0, 0)).save(root / "images" / f"{k}.png")
    images = [
        {"id": 7, "file_name": "0.png", "height": 20, "width": 40},
        {"id": 3, "file_name": "1.png", "height": 30, "width": 30},
    ]
    marks = [
        {"id": 1, "image_id": 7, "bbox": [4, 2, 10, 5], "category_id": 17, "iscrowd": 0},
        {"id": 2, "image_id": 7, "bbox": [36, 0, 4, 20], "category_id": 90, "iscrowd": 1},
        {"id": 3, "image_id": 7, "bbox": [1, 1, 0, 5], "category_id": 1, "iscrowd": 0},
    ]
    found = {"images": images, "annotations": marks, "categories": [], **changes}
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(found))
    return root


def test_boxes_move_with_their_images(tmp_path, capsys) -> None:
    pytest.importorskip("pycocotools")
    images = open_images(f"coco:{coco(tmp_path)}")
    assert capsys.readouterr().out == ""
    assert (images.kind, images.labels, images.labelled) == ("coco", None, True)
    assert images.notes == [
        "1 boxes without area left out", "box labels are COCO's category ids"
    ]  # fmt: skip
    p = Preprocessing(resize=(40, 40), crop=(40, 30), scale=1.0)
    batch = only(images, p)
    none, two = batch.y
    assert (none["boxes"].shape, int(none["image_id"])) == ((0, 4), 3)
    # Twice as high, as wide as before; then 5 columns less on each side, so the crowd is gone.
    assert two["boxes"].tolist() == [[0, 4, 9, 14]]
    assert (two["labels"].tolist(), two["iscrowd"].tolist()) == ([17], [0])
    assert type(two["boxes"]) is torch.Tensor
    batch = only(images, Preprocessing(resize=(40, 40)))
    assert batch.y[1]["boxes"].tolist() == [[4, 4, 14, 14], [36, 0, 40, 40]]
    with pytest.raises(ConfigError, match=r"--augment light: targets \(list\) are neither"):
        list(augmented([batch], "light", 0, 0))
    assert open_images(f"coco:{tmp_path}#val", labels="none").labelled is False


ONE = {"id": 1, "file_name": "x.png", "height": 1, "width": 1}
MARK = {"id": 1, "image_id": 7, "category_id": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"images": [ONE | {"file_name": "../x.png"}]}, "1 outside the folder"),
        ({"images": [ONE]}, "1 missing .*, in "),
        ({"images": [{"id": 1}]}, "not instance annotations .KeyError"),
        ({"images": [ONE | {"id": 2**70}]}, "not instance annotations .OverflowError"),
        ({"images": []}, "no images"),
        ({"annotations": [MARK | {"bbox": [0, 0, 1e999, 1]}]},
         "not instance annotations .a box or category of image 7 is not"),
        ({"annotations": [MARK | {"bbox": 4}]}, "not instance annotations .TypeError"),
    ],
)  # fmt: skip
def test_annotations_that_cannot_be_used(tmp_path, changes, said) -> None:
    pytest.importorskip("pycocotools")
    with pytest.raises(DataError, match=rf"^DATA coco:\S+: instances_val2017\.json: {said}"):
        open_images(f"coco:{coco(tmp_path, **changes)}")


def test_images_that_the_boxes_were_not_drawn_on(tmp_path) -> None:
    pytest.importorskip("pycocotools")
    Image.new("RGB", (39, 20)).save(coco(tmp_path) / "images" / "0.png")
    with pytest.raises(
        DataError, match=r"0\.png: is \(20, 39\), the annotations expect \(20, 40\)"
    ):
        only(open_images(f"coco:{tmp_path}"), Preprocessing(resize=(8, 8)))


def test_folders_that_are_no_coco(tmp_path, monkeypatch) -> None:
    with pytest.raises(
        DataError, match=r"^DATA coco:nowhere: no annotations/instances_\*\.json in"
    ):
        open_images("coco:nowhere")
    file = coco(tmp_path) / "annotations" / "instances_val2017.json"
    (file.parent / "instances_train2017.json").write_text("{}")
    with pytest.raises(DataError, match=r"annotations of train2017, val2017\. Name one of them"):
        open_images(f"coco:{tmp_path}#dev")
    monkeypatch.setitem(sys.modules, "pycocotools", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "pycocotools.coco", raising=False)
    with pytest.raises(DataError, match=r"needs pycocotools.*pip install 'bnfix\[coco\]'\."):
        open_images(f"coco:{tmp_path}")
    os.truncate(file, 1_100_000_000)  # no blocks are written
    with pytest.raises(DataError, match=r"instances_val2017\.json: larger than 1000 MB"):
        open_images(f"coco:{tmp_path}")
