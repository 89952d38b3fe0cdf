"""Data from the user's own code: what it may give, and what is said when it does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bnfix.data.callables import is_callable
from bnfix.data.opening import open_images
from bnfix.errors import CheckpointError, DataError
from bnfix.recipe import RunOptions
from bnfix.replay import replayed_plan
from tests.conftest import Files, Outcome

CODE = """
import numpy as np
import torch
from PIL import Image

PIXELS = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)


class Pairs:
    def __len__(self):
        return 2

    def __getitem__(self, i):  # never an IndexError, as many datasets
        return PIXELS[i % 2], i % 2


def dataset():
    return Pairs()


def pillow():
    for k, image in enumerate(PIXELS):
        yield Image.fromarray(image), np.int64(k)


def tensors():
    return [(torch.from_numpy(image).permute(2, 0, 1), torch.tensor(k))
            for k, image in enumerate(PIXELS)]


def dicts():
    return [{"image": image, "label": name} for image, name in zip(PIXELS, ("b", "a"))]


def bare():
    return list(PIXELS)


def grey():
    return [(PIXELS[0, :, :, 0], 0), (PIXELS[1, :, :, :1], 1)]


def none():
    return []


def some():
    return [(PIXELS[0], 0), (PIXELS[1], None)]


def scaled():
    return [(torch.zeros(3, 4, 4), 0)]


def labelled():
    return [(PIXELS[0], 0.5)]


def broken():
    yield PIXELS[0], 0
    raise RuntimeError("no more")


def number():
    return 7


listed = [(PIXELS[0], 1)]
"""


@pytest.fixture
def code(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(CODE)
    return str(tmp_path / "mine.py")


@pytest.mark.parametrize("name", ["dataset", "pillow", "tensors", "dicts", "bare"])
def test_what_a_callable_may_give(code: str, name: str) -> None:
    images = open_images(f"{code}:{name}", n_classes=2)
    assert (images.kind, len(images)) == ("callable", 2)
    expected = np.arange(2 * 4 * 6 * 3, dtype=np.uint8).reshape(2, 4, 6, 3)
    for i in range(2):
        np.testing.assert_array_equal(images.read(i), expected[i])
        assert images.size_of(i) == (4, 6)
    assert images.digest(0) != images.digest(1)
    if name == "bare":
        assert images.labels is None
        return
    assert images.labels is not None
    assert images.labels.tolist() == ([1, 0] if name == "dicts" else [0, 1])
    assert open_images(f"{code}:{name}", labels="none").labels is None


def test_grey_images_and_a_list_by_name(code: str) -> None:
    assert open_images(f"{code}:grey", channels=1).read(1).shape == (4, 6, 1)
    assert open_images(f"{code}:grey").read(1).shape == (4, 6, 3)
    assert len(open_images(f"{code}:listed")) == 1


def test_a_module_of_the_current_folder(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine_of_this_test.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    assert len(open_images("mine_of_this_test:pillow")) == 2


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("none", "gave no images"),
        ("some", "item 1 has no label, others have"),
        ("scaled", r"item 0 is an array of float32 \(4, 4, 3\), expected a PIL image"),
        ("labelled", "item 0: its label is a float"),
        ("broken", r"its code failed at item 1 \(RuntimeError: no more, at .*mine.py:61\)"),
        ("number", "gave a int, expected an iterable"),
        ("absent", "there is no absent in it"),
    ],
)
def test_what_it_may_not_give(code: str, name: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"DATA .*mine\.py:{name}: {said}"):
        open_images(f"{code}:{name}")


def test_names_of_callables() -> None:
    for spec in ("a.b:c", "a:c.d", "x/y z.py:c", "./y.py:c"):
        assert is_callable(spec), spec
    for spec in ("a.npz", "a:", ":b", "C:\\data", "/data:x/y", "http://a.b/c", "a-b:c"):
        assert not is_callable(spec), spec
    with pytest.raises(DataError, match=r"DATA gone\.py:f: no such file\."):
        open_images("gone.py:f")
    with pytest.raises(DataError, match=r"DATA nobody_has_this:f: there is no module"):
        open_images("nobody_has_this:f")


def test_a_callable_that_a_file_names_is_not_imported(
    tmp_path: Path, files: Files, cli: Callable[..., Outcome]
) -> None:
    out = tmp_path / "out.safetensors"
    done = cli(
        "calibrate", files.net, *files.common, "--data", files.data, "--statistics", "keep",
        "--example-weight", "0.1", "-o", out,
    )  # fmt: skip
    assert done.code == 0, done.err
    with safe_open(out, "pt") as file:
        held = json.loads(file.metadata()["bnfix"])
    (tmp_path / "bad.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    held["history"][-1]["options"]["data"]["test"] = f"{tmp_path}/bad.py:data"
    save_file(load_file(out), out, {"bnfix": json.dumps(held)})
    with pytest.raises(
        CheckpointError, match=r"its test data are code, .*bad\.py:data, which is n"
    ):
        replayed_plan(out, run=RunOptions("cpu"))
    refused = cli("fix", files.net, "--data", files.data, "--recipe", out, "-o", tmp_path / "new")
    assert "Name it by --test" in refused.message
    assert not (tmp_path / "ran").exists()
    plan = replayed_plan(out, run=RunOptions("cpu"), test=str(files.test))
    assert plan.source.test == str(files.test)
