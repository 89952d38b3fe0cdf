"""Data from the user's own code: what it may give, and what is said when it does not."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bnfix.core.errors import CheckpointError, DataError
from bnfix.core.settings import RunOptions
from bnfix.data.arrays import TensorItems, is_callable
from bnfix.data.batches import Batches
from bnfix.data.open import open_images
from bnfix.jobs.plan import replayed_plan
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


def broken():
    yield PIXELS[0], 0
    raise RuntimeError("no more")


def number():
    return 7


listed = [(PIXELS[0], 1)]


def points():
    return [(torch.full((3, 5), k / 4), k % 3) for k in range(12)]


def nested():
    return [({"a": np.float64(k), "b": (np.arange(k, k + 2), True)}, None) for k in range(3)]


def keys():
    return [{"volume": np.zeros((1, 2, 2, 2)), "y": np.int64(k)} for k in range(3)]


def ragged():
    return [torch.zeros(3, 4 + k) for k in range(3)]


def triple():
    return [(torch.zeros(3), torch.zeros(3), 1)]


def not_a_target():
    return [(torch.zeros(3), torch.zeros(3, dtype=torch.complex64))]


def not_a_number():
    return [(torch.zeros(3), np.zeros((1, 2))), (torch.zeros(3), np.array([[1, np.nan]]))]


def unlabelled():
    return [(torch.zeros(3), 0.5), (torch.zeros(3), None)]


def words():
    return [(["some", "words"], 0)]


def complexes():
    return [torch.zeros(3, dtype=torch.complex64)]


def mixed():
    return [PIXELS[0], torch.zeros(3)]
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
        assert images.read(i).shape[:2] == (4, 6)
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
        ("some", r"1 of 2 images have no label \(item 1\)\. Add them"),
        ("triple", r"item 0 is a tuple of 3, expected \(input, label\)\. Give several inputs as o"),
        ("not_a_target", r"item 0: its target is a tensor of torch.complex64, expected floating"),
        ("not_a_number", r"item 1: its target\[0, 1\] is nan, expected finite numbers"),
        ("unlabelled", r"item 1: its target is a NoneType, expected floating-point"),
        ("words", "item 0 is a str, expected floating-point numbers or integers .*recalibrate_"),
        ("complexes", "item 0 is a tensor of torch.complex64, expected floating-point"),
        ("mixed", r"item 0 is an image, item 1 is not an image"),
        ("broken", r"its code failed at item 1 \(RuntimeError: no more, at .*mine.py:57\)"),
        ("number", "gave a int, expected an iterable"),
        ("absent", "there is no absent in it"),
    ],
)
def test_what_it_may_not_give(code: str, name: str, said: str) -> None:
    with pytest.raises(DataError, match=rf"DATA .*mine\.py:{name}: {said}"):
        open_images(f"{code}:{name}")


def test_inputs_that_are_no_images_are_tensors(code: str) -> None:
    images = open_images(f"{code}:points")
    assert isinstance(images, TensorItems)
    assert images.labels is not None
    assert images.labels.tolist() == [k % 3 for k in range(12)]
    assert len(set(images.digests())) == 12
    batch = next(iter(Batches(images, np.array([4, 1]), None, batch_size=2)))
    torch.testing.assert_close(batch.x, torch.tensor([1.0, 0.25]).view(2, 1, 1).expand(2, 3, 5))
    assert batch.y.tolist() == [1, 1]
    assert isinstance(open_images(f"{code}:scaled"), TensorItems)
    images = open_images(f"{code}:keys")
    (batch,) = Batches(images, np.arange(3), None, batch_size=3)
    assert batch.x["volume"].shape == (3, 1, 2, 2, 2)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2]


def test_nests_of_numbers_keep_their_nesting(code: str) -> None:
    images = open_images(f"{code}:nested")
    (batch,) = Batches(images, np.array([2, 0]), None, batch_size=2)
    number, (pair, flag) = batch.x["a"], batch.x["b"]
    assert (number.dtype, pair.dtype, flag.dtype) == (torch.float32, torch.int64, torch.bool)
    assert (number.tolist(), pair.tolist()) == ([2.0, 0.0], [[2, 3], [0, 1]])
    assert images.labels is None
    ragged = open_images(f"{code}:ragged")
    with pytest.raises(DataError, match=r"item 0 is \[\(3, 4\)\], item 2 is \[\(3, 6\)\].*size 1"):
        list(Batches(ragged, np.array([0, 2]), None, batch_size=2))
    assert len(list(Batches(ragged, np.arange(3), None, batch_size=1))) == 3


TABLES = """
import numpy as np
from torch import nn


def net(num_classes=3):
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, num_classes))


def rows():
    rng = np.random.default_rng(0)
    return [(row, k % 3) for k, row in enumerate(rng.normal(3, 2, (90, 4)))]
"""


@pytest.fixture
def table(tmp_path: Path) -> tuple[str, str, Path, torch.nn.Module]:
    (tmp_path / "table.py").write_text(TABLES)
    names: dict[str, Any] = {}
    exec(TABLES, names)
    torch.manual_seed(0)
    net = names["net"]()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    inputs, labels = zip(*names["rows"](), strict=True)
    np.savez(tmp_path / "rows.npz", inputs=np.stack(inputs), labels=np.array(labels))
    return f"{tmp_path}/table.py:net", f"{tmp_path}/table.py:rows", tmp_path / "rows.npz", net


def test_a_table_is_worked_on_from_the_command_line(table, cli, tmp_path) -> None:
    spec, rows, npz, net = table
    x = torch.from_numpy(np.load(npz)["inputs"]).float()
    hidden = net[0](x).detach()
    for name, data in (("a", rows), ("b", npz)):
        out = tmp_path / f"{name}.safetensors"
        words = ["--model", spec, "--data", data, "--labels", "none", "--statistics", "population"]
        done = cli("calibrate", tmp_path / "net.pth", *words, "-o", out)
        assert done.code == 0, done.err
        assert "inputs are used without any preprocessing" in done.err
        assert "pixels" not in done.err
        tensors = load_file(out)
        torch.testing.assert_close(tensors["1.running_mean"], hidden.mean(0))
        torch.testing.assert_close(tensors["1.running_var"], hidden.var(0, correction=0))
        with safe_open(out, "pt") as file:
            assert json.loads(file.metadata()["bnfix"])["preprocessing"] is None
    words = ["--model", spec, "--data", npz, "--json"]
    found = cli("eval", tmp_path / "net.pth", out, *words).json
    assert [one["n_examples"] for one in found["models"]] == [90, 90]
    expected = float((net.eval()(x).argmax(1) == torch.arange(90) % 3).float().mean())
    assert found["models"][0]["top1"] == pytest.approx(expected)
    found = cli("inspect", tmp_path / "net.pth", *words).json
    assert found["behaviour"]["n_examples"] == 90


def test_a_table_is_converted_and_exported(table, cli, tmp_path) -> None:
    spec, rows, _, _ = table
    words = ["--model", spec, "--data", rows]
    done = cli("convert", tmp_path / "net.pth", *words, "-o", tmp_path / "c.safetensors")
    assert done.code == 0, done.err
    assert "on examples of the data of 2x4 the largest output difference is 0" in done.err
    done = cli("export", tmp_path / "net.pth", *words, "--to", "plain", "-o", tmp_path / "net.py")
    assert done.code == 0, done.err
    assert "inputs are used without any preprocessing" in done.err
    assert "ImageNet" not in done.err
    words += ["--mean", "0.5", "--to", "plain", "-o", tmp_path / "x.py"]
    assert "so --mean cannot be applied" in cli("export", tmp_path / "net.pth", *words).message


@pytest.mark.parametrize(
    ("command", "words", "said"),
    [
        ("calibrate", ("--mean", "0.5", "--crop", "8"), "so --crop, --mean cannot be applied"),
        ("eval", ("--corrupt", "noise:1"), "holds no images, .* so --corrupt cannot be applied"),
        ("eval", ("--corruptions",), "--corruptions: .* holds no images"),
        ("finetune", ("--augment", "light"), "--augment light: .* holds no images"),
    ],
)
def test_options_for_images_are_refused_where_there_are_none(
    table, cli, tmp_path, command, words, said
) -> None:
    spec, rows, _, _ = table
    out = () if command == "eval" else ("-o", tmp_path / "out.safetensors")
    outcome = cli(command, tmp_path / "net.pth", "--model", spec, "--data", rows, *words, *out)
    assert outcome.code == 2
    assert re.search(said, outcome.message)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"inputs": np.array(["a", "b"])}, r"inputs are <U1 \(2,\), expected numbers of shape"),
        ({"inputs": np.zeros((0, 3))}, r"inputs are float64 \(0, 3\), expected numbers"),
        ({"inputs": np.zeros((3, 2)), "labels": np.zeros(3)}, "labels are float64"),
        ({"x": np.zeros((3, 2))}, "expected one named images, or inputs for other data"),
    ],
)
def test_archives_of_inputs_that_cannot_be_used(tmp_path, arrays, said) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError, match=said):
        open_images(str(tmp_path / "a.npz"))


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
        CheckpointError, match=r"its test data are code, .*bad\.py:data, .* not run"
    ):
        replayed_plan(out, run=RunOptions("cpu"))
    refused = cli("fix", files.net, "--data", files.data, "--recipe", out, "-o", tmp_path / "new")
    assert "Name the data with --test" in refused.message
    assert not (tmp_path / "ran").exists()
    plan = replayed_plan(out, run=RunOptions("cpu"), test=str(files.test))
    assert plan.source.test == str(files.test)
