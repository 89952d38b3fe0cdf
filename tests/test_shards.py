"""Tar shards: keys and labels, ranges, any order, and archives that lie."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bnfix.core.errors import DataError
from bnfix.core.settings import Preprocessing
from bnfix.data.archives import expand_braces
from bnfix.data.batches import Batches
from bnfix.data.open import open_images
from tests import layouts

GREY = layouts.jpeg(np.full((8, 8, 3), 128, np.uint8))


def test_a_range_of_shards_in_any_order(tmp_path: Path) -> None:
    labels = layouts.shards(tmp_path)
    images = open_images(f"{tmp_path}/shard-{{000..001}}.tar", n_classes=3)
    assert images.kind == "tar shards"
    assert images.labels is not None
    assert images.labels.tolist() == labels.tolist()
    assert images.name(15) == "shard-001.tar/00001.jpg"
    pixels, _ = layouts.colours(30, 0, 3, 16)
    for i in (29, 0, 16, 14):
        k = 2 * (i % 15) + i // 15
        whole = np.array(Image.open(io.BytesIO(layouts.jpeg(pixels[k]))))
        np.testing.assert_array_equal(images.read(i), whole)
        assert images.read(i).shape[:2] == (16, 16)
    assert len(open_images(f"{tmp_path}/shard-001.tar")) == 15


def test_many_processes_read_the_same_shards(tmp_path: Path) -> None:
    layouts.shards(tmp_path)
    found = []
    for workers in (0, 2):
        images = open_images(f"{tmp_path}/shard-{{000..001}}.tar")
        batches = Batches(images, np.arange(30), Preprocessing(), batch_size=8, workers=workers)
        found.append(np.concatenate([batch.x.numpy() for batch in batches]))
    np.testing.assert_array_equal(*found)


def test_keys_labels_and_what_is_passed_over(tmp_path: Path) -> None:
    path = layouts.shard(
        tmp_path / "a.tar",
        {
            "b/x.JSON": b'{"class": "dog", "x": [1]}',
            "b/x.jpg": GREY,
            "b/x.seg.png": b"not an image of its own",
            "b/x.png": GREY,
            "c/x.png": GREY,
            "c/x.cls": b" cat\n",
            "../out.jpg": GREY,
            "lonely.cls": b"1",
            "/root.jpg": GREY,
        },
    )
    with tarfile.open(path, "a") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo(f"link{kind.decode()}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    images = open_images(str(path))
    assert [images.name(i) for i in range(len(images))] == ["a.tar/b/x.jpg", "a.tar/c/x.png"]
    assert images.class_names == ("cat", "dog")
    notes = " / ".join(images.notes)
    assert "2 members with unsafe paths skipped: ../out.jpg, /root.jpg" in notes
    assert "3 members that are links or special files skipped" in notes
    assert "1 keys without an image skipped: lonely" in notes
    assert "1 second images of a key skipped: b/x.png" in notes


def test_labels_some_none_or_unwanted(tmp_path: Path) -> None:
    bare = layouts.shard(tmp_path / "bare.tar", {"a.jpg": GREY, "b.jpg": GREY})
    assert open_images(str(bare)).labels is None
    some = layouts.shard(tmp_path / "some.tar", {"a.jpg": GREY, "a.cls": b"0", "b.jpg": GREY})
    with pytest.raises(DataError, match=r"1 of 2 images have no label \(some\.tar/b\.jpg\)"):
        open_images(str(some))
    assert open_images(str(some), labels="none").labels is None
    for content, said in ((b"{", "cannot be read"), (b"[" * 100_000, "cannot be read")):
        odd = layouts.shard(tmp_path / "odd.tar", {"a.jpg": GREY, "a.json": content})
        with pytest.raises(DataError, match=rf"odd\.tar/a\.json: {said}"):
            open_images(str(odd))
    large = layouts.shard(tmp_path / "large.tar", {"a.jpg": GREY, "a.cls": b"1" * 1_000_001})
    with pytest.raises(DataError, match=r"a\.cls: 1,000,001 bytes for a label"):
        open_images(str(large))


def test_truncated_compressed_empty_and_missing(tmp_path: Path) -> None:
    layouts.shards(tmp_path)
    whole = (tmp_path / "shard-000.tar").read_bytes()
    cut = tmp_path / "cut.tar"
    for n in (100, 700, 1300, 2000, 5000):
        cut.write_bytes(whole[:n])
        with pytest.raises(DataError, match=r"cut\.tar: not a complete tar archive"):
            open_images(str(cut))
    cut.write_bytes(whole.rstrip(b"\0") + b"\0" * (-len(whole.rstrip(b"\0")) % 512))
    assert any("ends without an end marker" in note for note in open_images(str(cut)).notes)
    with pytest.raises(DataError, match=r"1 of 3 files are missing: .*shard-002\.tar"):
        open_images(f"{tmp_path}/shard-{{000..002}}.tar")
    with tarfile.open(tmp_path / "packed.tar", "w:gz") as tar:
        tar.add(tmp_path / "shard-000.tar")
    with pytest.raises(DataError, match=r"packed\.tar: compressed, so its images cannot"):
        open_images(f"{tmp_path}/packed.tar")
    layouts.shard(tmp_path / "empty.tar", {"a.txt": b"x"})
    with pytest.raises(
        DataError, match=r"no images in 1 shards, expected members .* one of bmp, gif"
    ):
        open_images(f"{tmp_path}/empty.tar")


def test_a_member_that_claims_more_than_the_file_or_less_than_nothing(tmp_path: Path) -> None:
    path = layouts.shard(tmp_path / "a.tar", {"a.jpg": GREY, "b.jpg": GREY})
    whole = bytearray(path.read_bytes())
    for size in (b"77777777777\0", b"\xff" * 12, b"\x80" + b"\x7f" * 11):
        head = bytearray(whole[:512])
        head[124:136] = size
        head[148:156] = b" " * 8
        head[148:156] = b"%06o\0 " % sum(head)
        path.write_bytes(bytes(head) + bytes(whole[512:]))
        with pytest.raises(DataError, match=r"a\.tar: not a complete tar archive"):
            open_images(str(path))


def test_bad_images_in_shards_are_stated(tmp_path: Path) -> None:
    path = layouts.shard(tmp_path / "a.tar", {"a.jpg": GREY[:200], "b.jpg": b"", "c.jpg": GREY})
    images = open_images(str(path))
    for i, reason in enumerate(("[Tt]runcated", "not an image")):
        with pytest.raises(DataError, match=rf"^a\.tar/{'ab'[i]}\.jpg: bad image, .*({reason})"):
            images.read(i)
    assert images.digest(2) == open_images(str(path)).digest(2)


def test_ranges() -> None:
    assert expand_braces("a.tar") == ["a.tar"]
    assert expand_braces("a{08..11}") == ["a08", "a09", "a10", "a11"]
    assert expand_braces("a{0..1}-{00..01}.t") == ["a0-00.t", "a0-01.t", "a1-00.t", "a1-01.t"]
    for spec in ("a{3..1}", "a{0..999999999}", "{0..999}{0..999}"):
        with pytest.raises(DataError, match=r"files, expected 1 to 100,000"):
            expand_braces(spec)
