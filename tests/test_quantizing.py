"""Exports in 8 bits: calibrated on some images, judged on others, refused if they cost too much."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import bnfix
from bnfix import ConfigError, ModelError
from bnfix.core.settings import DataRecipe, Preprocessing, WeightRecipe
from bnfix.deploy.forms import in_8_bits
from bnfix.jobs.export import ExportRecipe, export
from bnfix.report.result import Export
from tests.conftest import Files, inputs_of

SOURCE = DataRecipe(mean=(0.5,), std=(0.25,))


def made(files: Files, checkpoint: Path | None = None, **options) -> Export:
    source = options.pop("source", SOURCE)
    recipe = ExportRecipe("onnx-int8", samples=4, **options)
    path = files.net if checkpoint is None else checkpoint
    return export(path, model=files.spec, data=str(files.data), source=source, recipe=recipe)


@pytest.fixture(scope="module")
def int8(files: Files, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("int8") / "net.onnx"
    done = cli("export", files.net, *files.common, "--to", "onnx-int8", "-o", out, "--data",
               files.data, "--samples", "4", "--max-drop", "60", "--quiet")  # fmt: skip
    assert done.code == 0, done.err
    assert done.out.startswith("The int8 ONNX file against float: same: ")
    return out


def test_weights_and_activations_are_integers_in_standard_operators(files: Files, int8: Path):
    proto = onnx.load(int8)
    onnx.checker.check_model(proto, full_check=True)
    assert {node.domain for node in proto.graph.node} <= {"", "ai.onnx"}
    values = {t.name: onnx.numpy_helper.to_array(t) for t in proto.graph.initializer}
    sizes = {"conv1": (6, 3, 3, 3), "conv2": (12, 6, 3, 3)}
    found = {k: v for k, v in values.items() if v.dtype == np.int8 and v.ndim == 4}
    assert sorted(v.shape for v in found.values()) == sorted(sizes.values())
    bnfix_free = onnxruntime.InferenceSession(int8)
    x = inputs_of(np.load(files.test)["images"])
    logits = bnfix_free.run(None, {"input": x.numpy()})[0]
    with torch.no_grad():
        wanted = files.trained()(x).numpy()
    error = np.sqrt(((logits - wanted) ** 2).mean() / wanted.var())
    assert 1e-5 < error < 0.1  # it is rounded, and to 8 bits


def test_the_scale_of_a_weight_is_that_of_its_channel(tmp_path):
    """One channel 100 times as large does not coarsen the others; 64 steps to either side."""
    weight = np.random.default_rng(0).normal(size=(4, 1, 3, 3)).astype(np.float32)
    weight[2] *= 100
    conv = onnx.helper.make_node("Conv", ["input", "w"], ["y"])
    kinds = [onnx.helper.make_tensor_value_info("input", 1, ("n", 1, 5, 5))]
    outs = [onnx.helper.make_tensor_value_info("y", 1, ("n", 4, 3, 3))]
    constants = [onnx.numpy_helper.from_array(weight, "w")]
    graph = onnx.helper.make_graph([conv], "g", kinds, outs, constants)
    opsets = [onnx.helper.make_opsetid("", 18)]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    batches = [torch.randn(3, 1, 5, 5, generator=torch.Generator().manual_seed(i)) for i in (0, 1)]
    content, operators = in_8_bits(proto.SerializeToString(), batches)
    assert operators["QuantizeLinear"] >= 1
    found = {t.name: onnx.numpy_helper.to_array(t)
             for t in onnx.load_from_string(content).graph.initializer}  # fmt: skip
    whole = next(v for v in found.values() if v.dtype == np.int8 and v.ndim == 4)
    scale = next(v for v in found.values() if v.shape == (4,) and v.dtype == np.float32)
    step = abs(weight).reshape(4, -1).max(1) / 64
    np.testing.assert_allclose(scale, step, rtol=0.02)  # 63 or 64 steps, by version
    error = abs(whole * scale[:, None, None, None] - weight).reshape(4, -1).max(1)
    assert (error <= 0.51 * scale).all()


def test_it_is_judged_on_images_that_did_not_calibrate(files: Files, int8: Path, cli):
    report = json.loads((int8.parent / "net.onnx.report.json").read_text())
    assert report["options"]["to"] == report["export"]["to"] == "onnx-int8"
    assert report["options"]["max_drop"] == 60
    assert report["data"]["splits"] == {"fit": 108, "select": 0, "test": 36}  # of 180, as fix has
    assert [model["name"] for model in report["models"]] == ["float", "int8"]
    assert {model["n_examples"] for model in report["models"]} == {36}
    paired, int8_of = report["paired"][0], report["export"]["int8"]
    assert paired["top1"]["interval"][0] <= paired["top1"]["difference"]
    # Where none of n images is lost, 3.6 / n is still possible.
    floor = 1 - 0.025 ** (1 / 36)
    assert int8_of["bound"] == pytest.approx(max(floor, -paired["top1"]["interval"][0]))
    assert int8_of["n_calibrated"] == 108
    assert 0.8 < int8_of["top1_agreement"] <= 1
    assert report["export"]["verification"]["max_difference"] < 1e-4  # of the float file
    page = (int8.parent / "net.onnx.report.html").read_text()
    assert "In 8 bits" in page
    assert "before quantization" in page
    # The very numbers come back from eval, which counts the calibrating images.
    data = ("--data", files.data, "--workers", "0", "--json")
    assert cli("eval", int8, *data).json["n_seen"] == 108
    table = cli("eval", files.net, int8, *files.common, "--data", files.test, "--json").json
    assert table["n_seen"] == 0
    assert [model["name"] for model in table["models"]] == ["net.pth", "net.onnx"]
    assert table["paired"][0]["verdict"] == "same"


def test_the_test_images_are_those_of_the_repair(files: Files, tmp_path):
    fixed = tmp_path / "fixed.safetensors"
    plan = bnfix.Plan(source=SOURCE, finetune=None, weight=WeightRecipe("keep"))
    bnfix.calibrate(files.stale, model=files.spec, data=str(files.data), plan=plan).save(fixed)
    whole = made(files, fixed)
    assert whole.report.n_seen == 0  # the test images of fix are those of the export
    assert whole.report.data.splits["test"] == 36


def test_a_drop_that_is_not_ruled_out_writes_nothing(files: Files, cli, tmp_path):
    """One activation of 2,000 leaves 8 bits no step for the others."""
    model = files.trained()
    with torch.no_grad():
        # Channel 0 is scaled up, and down again by the weights that read it.
        model.bn1.weight[0] *= 2000
        model.bn1.bias[0] *= 2000
        model.conv2.weight[:, 0] /= 2000
    torch.save(model.state_dict(), tmp_path / "planted.pth")
    out = tmp_path / "planted.onnx"
    command = ("export", tmp_path / "planted.pth", *files.common, "--to", "onnx-int8", "-o", out,
               "--data", files.data, "--test", files.test, "--samples", "4")  # fmt: skip
    words = cli(*command, "--max-drop", "5").message
    assert "--max-drop 5: " in words
    assert "of 120 test images correctly, " in words
    x, y = inputs_of(np.load(files.test)["images"]), np.load(files.test)["labels"]
    with torch.no_grad():
        right = float((model(x).argmax(1).numpy() == y).mean())
    assert f"float {100 * right:.1f}%; the difference" in words
    assert words.endswith(
        "so it is worse by more. Give a better checkpoint, or a larger --max-drop. Nothing was "
        "written."
    )
    assert list(tmp_path.iterdir()) == [tmp_path / "planted.pth"]
    # Nor is a small drop of a sound network ruled out by 120 images.
    sound = ("export", files.net, *command[2:])
    few = cli(*sound, "--max-drop", "1").message
    assert "is not ruled out. Give more test images (--test), or a larger --max-drop." in few
    assert not out.exists()


def test_impossible_requests_are_one_line(files: Files, cli, tmp_path):
    out = tmp_path / "no.onnx"
    command = ("export", files.net, *files.common, "--to", "onnx-int8", "-o", out)
    assert "--to onnx-int8: no images to measure activation ranges" in cli(*command).message
    data = ("--data", files.data)
    unlabelled = cli(*command, *data, "--labels", "none", "--max-drop", "1").message
    assert "--max-drop: the test images have no labels" in unlabelled
    other = ("export", files.net, *files.common, "--to", "onnx", "-o", out)
    for more in (("--max-drop", "1"), ("--test", files.test)):
        words = f"{more[0]}: works only with --to onnx-int8"
        assert words in cli(*other, *more).message
    with pytest.raises(ConfigError, match=r"--max-drop: 0, expected above 0, at most 100"):
        ExportRecipe("onnx-int8", max_drop=0)
    model = bnfix.load(files.net, files.model())
    bnfix.swap_norms_(model, example_weight=0.5)
    live = tmp_path / "live.safetensors"
    bnfix.save(model, live, preprocessing=Preprocessing(mean=(0.5,), std=(0.25,)))
    words = r"2 layers weigh the example .*bn1, bn2\. First measure .* bnfix calibrate CKPT"
    with pytest.raises(ModelError, match=words):
        made(files, live)
    assert not out.exists()


def test_without_labels_only_agreement_is_known(files: Files, tmp_path):
    """And on test images of their own all data calibrate; weights are zeroed on request."""
    model = bnfix.load(files.net, files.model())
    bnfix.swap_norms_(model, example_weight=0.5)
    bnfix.save(model, live := tmp_path / "live.safetensors")
    source = DataRecipe(labels="none", mean=(0.5,), std=(0.25,), test=str(files.test))
    found = made(files, live, force_zero=True, source=source)
    assert found.zeroed == ("bn1", "bn2")
    assert found.report.data.splits == {"fit": 180, "select": 0, "test": 120}
    assert found.report.verdict is None
    assert 0.8 < found.int8.top1_agreement <= 1
    assert "accuracy cannot be measured" in found.sentence()
    assert "top-1 agrees with float on" in found.remarks()[0]
    found.save(tmp_path / "int8.onnx")
    assert "In 8 bits" in (tmp_path / "int8.onnx.report.md").read_text()
