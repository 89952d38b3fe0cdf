"""Exported files beside checkpoints in `eval`: the same numbers, and refusals of hostile ones."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.nn import functional as F

import bnfix
from bnfix import CheckpointError, ModelError
from bnfix.deploy.exported import load_exported
from tests.conftest import Files, inputs_of


@pytest.fixture(scope="module")
def exported(files: Files, cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "net.onnx"
    done = cli("export", files.net, *files.common, "--to", "onnx", "-o", out, "--data", files.data,
               "--samples", "8")  # fmt: skip
    assert done.code == 0, done.err
    return out


def linear(path: Path, *, shape: tuple[int | str, ...] = ("n", 4), domain: str = "") -> Path:
    """An ONNX file by onnx's own helpers: y = flatten(x) W, with a second output 2 y."""
    weight = np.arange(12, dtype=np.float32).reshape(4, 3) / 10
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], domain=domain),
        helper.make_node("Add", ["y", "y"], ["z"]),
    ]
    kinds = [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)]
    outputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (shape[0], 3)) for n in "yz"]
    graph = helper.make_graph(nodes, "g", kinds, outputs, [numpy_helper.from_array(weight, "w")])
    opsets = [helper.make_opsetid("", 18), *([helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), path)
    return path


def test_an_onnx_file_is_judged_as_its_checkpoint(files: Files, exported: Path, cli, tmp_path):
    """By default with the preprocessing that the file holds, in one table with the checkpoint."""
    found = cli("eval", files.net, exported, *files.common, "--data", files.test, "--json").json
    with torch.no_grad():
        data = np.load(files.test)
        y = torch.from_numpy(data["labels"])
        logits = files.trained()(inputs_of(data["images"]))
    for model in found["models"]:
        assert model["top1"] == pytest.approx(float((logits.argmax(1) == y).double().mean()))
        assert model["nll"] == pytest.approx(float(F.cross_entropy(logits, y)), abs=1e-5)
    assert found["models"][1]["name"] == "net.onnx"
    assert found["paired"][0]["verdict"] == "same"
    assert found["paired"][0]["top1"]["interval"] == [0, 0]
    alone = cli("eval", exported, "--data", files.test, "--workers", "0", "--json").json
    assert alone["models"][0]["nll"] == pytest.approx(found["models"][1]["nll"], abs=1e-6)
    assert alone["layers"] == []
    notes = " ".join(alone["assumptions"])
    assert "preprocessing: as stored" in notes
    assert "run by ONNX Runtime" in notes
    plan = cli("eval", exported, "--data", files.test, "--plan", "--json").json
    assert plan["checkpoints"] == [str(exported)]


def test_the_header_says_what_was_fitted_on_and_no_paths(files: Files, cli, tmp_path):
    model, out = tmp_path / "c.safetensors", tmp_path / "c.onnx"
    done = cli("calibrate", files.net, *files.common, "--data", files.data, "-o", model,
               "--statistics", "population", "--example-weight", "0")  # fmt: skip
    assert done.code == 0, done.err
    command = ("export", model, "--model", files.spec, "--to", "onnx", "-o", out, "--samples", "4")
    assert cli(*command).code == 0
    text = {p.key: p.value for p in onnx.load(out).metadata_props}["bnfix"]
    header = json.loads(text)
    assert header["preprocessing"]["mean"] == [0.5]
    assert [list(entry) for entry in header["history"]] == [["command", "data"]]
    assert str(files.folder) not in text
    seen = cli("eval", out, "--data", files.data, "--workers", "0", "--json").json["n_seen"]
    assert seen == header["history"][0]["data"]["fit"]["n_examples"] > 0
    assert cli("eval", out, "--data", files.test, "--workers", "0", "--json").json["n_seen"] == 0


@pytest.mark.parametrize("n", [1, 3, 4, 9])
@pytest.mark.parametrize("size", ["n", 1, 4, 7])
def test_a_fixed_batch_is_filled_up_and_cut(tmp_path, n, size):
    net = load_exported(linear(tmp_path / "a.onnx", shape=(size, 4))).model
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(n))
    found = net(x)
    wanted = x.double() @ (torch.arange(12).double().reshape(4, 3) / 10)
    torch.testing.assert_close(found["y"].double(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["z"], 2 * found["y"])
    assert net.batch_size == (None if size == "n" else size)


def test_a_fixed_batch_through_the_command_line(files: Files, exported: Path, cli, tmp_path):
    """120 images in batches of 7, the last of 1."""
    proto = onnx.load(exported)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 7
    onnx.save(proto, tmp_path / "seven.onnx")
    found = cli("eval", exported, tmp_path / "seven.onnx", "--data", files.test, "--workers", "0",
                "--json").json  # fmt: skip
    assert found["models"][0]["nll"] == pytest.approx(found["models"][1]["nll"], abs=1e-6)
    assert any("only batches of 7" in note for note in found["assumptions"])


def test_an_output_is_chosen_by_name_and_the_size_is_named(files, cli, tmp_path):
    path = linear(tmp_path / "two.onnx")
    np.savez(tmp_path / "rows.npz", inputs=np.eye(4, dtype=np.float32)[[0, 1, 2, 3] * 6],
             targets=np.full((24, 3), 0.5, np.float32))  # fmt: skip
    command = ("eval", path, "--data", tmp_path / "rows.npz", "--task", "regression", "--json")
    y, z = (cli(*command, "--output", name).json["models"][0]["mae"] for name in "yz")
    weight = np.arange(12).reshape(4, 3) / 10
    assert y == pytest.approx(abs(weight - 0.5).mean(), rel=1e-5)
    assert z == pytest.approx(abs(2 * weight - 0.5).mean(), rel=1e-5)
    assert "no such output, but y (1, 3), z (1, 3)" in cli(*command, "--output", "q").message
    with pytest.raises(ModelError, match=r"two\.onnx: inputs of 5, expected 4\. Give --re"):
        load_exported(path).model(torch.zeros(2, 5))


def test_numbers_in_other_files_stay_in_the_folder(tmp_path):
    (tmp_path / "in").mkdir()
    path = linear(tmp_path / "in" / "a.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (tmp_path / "in" / "w.bin").stat().st_size == 48
    x = torch.eye(4)
    torch.testing.assert_close(load_exported(path).model(x)["y"][1], torch.tensor([0.3, 0.4, 0.5]))
    (tmp_path / "secret").write_bytes(b"\0" * 48)
    (tmp_path / "in" / "link").symlink_to(tmp_path / "secret")
    proto = onnx.load(path, load_external_data=False)
    entries = {entry.key: entry for entry in proto.graph.initializer[0].external_data}
    for place in ("../secret", "link", str(tmp_path / "secret"), "", "*/_ORT_MEM_ADDR_/*", "no"):
        entries["location"].value = place
        onnx.save(proto, path)
        with pytest.raises(CheckpointError, match=r"numbers of w are in .* expected a file in the"):
            load_exported(path)
    entries["location"].value = "w.bin"
    for key, value in (("offset", "4"), ("offset", "-8"), ("length", "49"), ("length", "x")):
        old, entries[key].value = entries[key].value, value
        onnx.save(proto, path)
        with pytest.raises(CheckpointError, match=r"the numbers of w cannot be read"):
            load_exported(path)
        entries[key].value = old


def test_operators_of_others_are_not_run(tmp_path):
    """Neither as such, nor inside of a branch, nor as functions that the file defines."""
    path = linear(tmp_path / "a.onnx", domain="com.evil")
    with pytest.raises(CheckpointError, match=r"than ONNX's own \(com\.evil\), and bnfix does not"):
        load_exported(path)
    inner = helper.make_node("Do", [], ["o"], domain="com.evil")
    out = helper.make_tensor_value_info("o", TensorProto.FLOAT, (1,))
    branch = helper.make_graph([inner], "b", [], [out])
    proto = onnx.load(linear(path))
    proto.graph.node.add().CopyFrom(
        helper.make_node("If", ["c"], ["p"], then_branch=branch, else_branch=branch)
    )
    onnx.save(proto, path)
    with pytest.raises(CheckpointError, match=r"com\.evil"):
        load_exported(path)
    proto = onnx.load(linear(path))
    proto.functions.add().name = "f"
    onnx.save(proto, path)
    with pytest.raises(CheckpointError, match=r"local functions"):
        load_exported(path)


def test_other_files_are_refused_in_one_line(files: Files, exported: Path, cli, tmp_path):
    bad = tmp_path / "bad.onnx"
    data = ("--data", files.test)
    for content in (b"", b"\xff" * 99, exported.read_bytes()[:500]):
        bad.write_bytes(content)
        assert "bad.onnx: " in cli("eval", bad, *data).message
    (tmp_path / "net.pt2").write_bytes(b"PK\x03\x04")
    assert "the file can run code" in cli("eval", tmp_path / "net.pt2", *data).message
    damaged = cli("eval", tmp_path / "net.pt2", *data, "--trust-code").message
    assert "net.pt2: is damaged or not a .pt2 file" in damaged
    assert "no such file" in cli("eval", tmp_path / "none.onnx", *data).message
    for command in ("inspect", "calibrate", "fix"):
        more = () if command == "inspect" else ("-o", tmp_path / "o.safetensors")
        words = cli(command, exported, *files.common, *data, *more).message
        assert "net.onnx: is an exported network" in words
        assert "Give its original checkpoint" in words
    proto = onnx.load(linear(bad))
    proto.graph.input.add().CopyFrom(helper.make_tensor_value_info("m", TensorProto.FLOAT, (1,)))
    onnx.save(proto, bad)
    assert "it takes 2 inputs (x, m), expected one tensor" in cli("eval", bad, *data).message
    linear(bad, shape=("n", 8, 8, 3))
    assert "it takes 8x8x3, channels last" in cli("eval", bad, *data).message
    for size in (-1, 10**9):
        linear(bad, shape=(size, 4))
        assert f"it takes batches of {size}, expected 1 to" in cli("eval", bad, *data).message
    proto = onnx.load(exported)
    (entry,) = proto.metadata_props
    entry.value = '{"format": 1, "history": 3}'
    onnx.save(proto, bad)
    assert "holds values of the wrong type under history" in cli("eval", bad, *data).message
    missized = cli("eval", exported, *data, "--resize", "9", "--workers", "0")
    assert "net.onnx: inputs of 3x9x9, expected 3x8x8. Give --resize" in missized.message


def test_a_public_function_takes_it_too(exported: Path, files: Files):
    data = np.load(files.test)
    batches = [(inputs_of(data["images"]), torch.from_numpy(data["labels"]))]
    ours = bnfix.evaluate(load_exported(exported).model, batches)
    assert ours.nll == pytest.approx(bnfix.evaluate(files.trained(), batches).nll, abs=1e-5)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_trusted_pt2_file_is_judged_as_its_checkpoint(files: Files, cli, tmp_path, fixed):
    """Fixed batches are filled up and cut: of 4 examples here, which no batch of 5 is."""
    path, x = (
        tmp_path / "net.pt2",
        torch.zeros(4, *inputs_of(np.load(files.test)["images"]).shape[1:]),
    )
    sizes = None if fixed else ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(files.trained(), (x,), dynamic_shapes=sizes), path)
    common = (*files.common, "--data", files.test, "--batch-size", "5", "--workers", "0", "--json")
    found = cli("eval", files.net, path, *common, "--trust-code").json
    checkpoint, exported = found["models"]
    assert exported["nll"] == pytest.approx(checkpoint["nll"], abs=1e-6)
    assert found["paired"][0]["top1"]["interval"] == [0, 0]
    assert any("run by torch.export" in note for note in found["assumptions"])
    assert any("only batches of 4" in note for note in found["assumptions"]) == fixed


def test_a_pt2_file_of_several_inputs_or_outputs(tmp_path: Path):
    class Two(torch.nn.Module):
        def forward(self, x, y=None):
            return {"a": x, "b": 2 * x} if y is None else x + y

    x = torch.zeros(3, 2)
    for name, inputs in (("one", (x,)), ("two", (x, x))):
        torch.export.save(torch.export.export(Two(), inputs), tmp_path / f"{name}.pt2")
    given = torch.arange(10.0).view(5, 2)
    found = load_exported(tmp_path / "one.pt2", trust_code=True).model(given)
    torch.testing.assert_close(found, {"a": given, "b": 2 * given})
    with pytest.raises(CheckpointError, match="takes 2 inputs, expected one tensor"):
        load_exported(tmp_path / "two.pt2", trust_code=True)
