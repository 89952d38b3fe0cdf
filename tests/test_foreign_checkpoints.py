"""Checkpoints as other programs write them: found by themselves, kept as they are."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.checkpoints.load import load, load_ready
from bnfix.checkpoints.save import save, write_tensors
from bnfix.core.errors import CheckpointError, ModelError
from bnfix.core.settings import ModelRecipe
from bnfix.models.build import build_model, build_skeleton
from bnfix.models.published import default_preprocessing, published_arguments, published_weights

NETS = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, tied=False, field=False):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 2, bias=False)
        if tied:
            self.again = nn.Linear(4, 2, bias=False)
            self.again.weight = self.fc.weight
        self.register_buffer("table", torch.arange(4, dtype=torch.int8))
        self.register_buffer("scratch", torch.ones(1), persistent=False)
        if field:
            self.field = torch.ones(2)

    def forward(self, x):
        return self.fc(self.bn(self.conv(x)).mean((2, 3)))


def build():
    net = Net()
    del net.scratch
    return net


def tied():
    net = Net(tied=True)
    del net.scratch
    return net


def buffered():
    return Net()


def fielded():
    net = Net(field=True)
    del net.scratch
    return net


def pooled(model, batch):
    return model(batch[0]) * 2


value = 3
"""


@pytest.fixture
def spec(tmp_path: Path) -> str:
    (tmp_path / "foreign_nets.py").write_text(NETS)
    return f"{tmp_path / 'foreign_nets.py'}:build"


def state(spec: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return build_model(spec).state_dict()


def prefixed(prefix: str, tensors: dict[str, Any]) -> dict[str, Any]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def parameters_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {n: t for n, t in tensors.items() if "running" not in n and "batches" not in n}


def layouts(w: dict[str, torch.Tensor]) -> dict[str, Any]:
    ema = {name: tensor * 2 for name, tensor in w.items()}
    inner = {n.replace("bn.", "_checkpoint_wrapped_module.bn._orig_mod."): t for n, t in w.items()}
    return {
        "ddp": prefixed("module.", w),
        "compiled ddp": prefixed("_orig_mod.module.", w),
        "fsdp, full": prefixed("_fsdp_wrapped_module.", w),
        "fsdp and compile inside": prefixed("_fsdp_wrapped_module.", inner),
        "lightning": {"state_dict": prefixed("model.", w), "pytorch-lightning_version": "2.4.0"},
        "lightning, own name": {"state_dict": prefixed("backbone_net.", w), "epoch": 3},
        "timm": {"arch": "x", "state_dict": w, "state_dict_ema": ema, "args": argparse.Namespace()},
        "torchvision": {"model": w, "optimizer": {"state": {}}, "args": argparse.Namespace(lr=1)},
        "mmcv": {"meta": {"epoch": 2, "CLASSES": ("a", "b")}, "state_dict": prefixed("module.", w)},
        "fairseq": {
            "args": argparse.Namespace(arch="x"), "model": w, "extra_state": {"epoch": 1},
            "optimizer_history": [{"num_updates": 3}], "last_optimizer_state": None,
        },
        "model_state": {"model_state": w, "optimizer_state": {"state": {}}},
        "one name of its own": {"best_weights": w, "epoch": 3},
        "swa beside": {"swa_model": prefixed("module.", ema), "model": w, "n": torch.tensor(2)},
        "averaged beside": {"averaged": ema, "model_state": prefixed("module.", w)},
        "swa inside": {"state_dict": prefixed("model.", w) | prefixed("swa_model.", ema)},
        "teacher inside": {"state_dict": prefixed("model.", w) | prefixed("teacher.", ema)},
        "parameters beside": {"params_ema": parameters_of(ema), "params": w},
        "parameters inside": {
            "state_dict": prefixed("model.", w) | prefixed("model_ema.", parameters_of(ema))
        },
        "average inside": {"state_dict": prefixed("model.", w) | prefixed("model_ema.", ema)},
    }  # fmt: skip


@pytest.mark.parametrize("layout", layouts({}).keys())
def test_a_layout_is_found_by_itself(layout, spec, tmp_path):
    wanted = state(spec)
    torch.save(layouts(wanted)[layout], tmp_path / "net.pth")
    found = load_ready(tmp_path / "net.pth", ModelRecipe(model=spec)).model.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.parametrize(
    "layout",
    ["timm", "average inside", "swa beside", "averaged beside", "swa inside", "parameters beside",
     "parameters inside"],
)  # fmt: skip
def test_the_running_mean_is_taken_where_it_is_preferred(layout, spec, tmp_path):
    wanted = state(spec)
    torch.save(layouts(wanted)[layout], tmp_path / "net.pth")
    found = load_ready(tmp_path / "net.pth", ModelRecipe(model=spec, prefer_ema=True))
    assert torch.equal(found.model.conv.weight, 2 * wanted["conv.weight"])
    assert any(re.search("ema|swa|averaged", note) for note in found.checkpoint.notes)
    assert found.checkpoint.borrowed == layout.startswith("parameters")
    assert torch.equal(
        found.model.bn.running_var,
        wanted["bn.running_var"] * (1 if found.checkpoint.borrowed else 2),
    )
    plain = load_ready(tmp_path / "net.pth", ModelRecipe(model=spec))
    assert any(
        re.search(r"\(--prefer-ema takes them\)|not used: \w+ \(--key chooses\)", note)
        for note in plain.checkpoint.notes
    )


def test_a_second_set_inside_is_named(spec, tmp_path):
    wanted = state(spec)
    torch.save(layouts(wanted)["teacher inside"], tmp_path / "net.pth")
    notes = load_ready(tmp_path / "net.pth", ModelRecipe(model=spec)).checkpoint.notes
    assert "a second set of the weights under 'teacher.' left out (--prefix)" in notes
    other = load_ready(tmp_path / "net.pth", ModelRecipe(model=spec, prefix="teacher"))
    assert torch.equal(other.model.conv.weight, 2 * wanted["conv.weight"])


def test_a_network_that_holds_two_of_a_kind_keeps_both(tmp_path):
    twins = torch.nn.ModuleDict({n: torch.nn.BatchNorm2d(3) for n in ("model", "swa_model")})
    torch.save(twins.state_dict(), tmp_path / "net.pth")
    assert load_ready(tmp_path / "net.pth", model=twins).checkpoint.prefix == ""


def test_a_prefix_that_is_the_networks_own_is_not_called_stripped(tmp_path):
    own = torch.nn.ModuleDict({"model": torch.nn.BatchNorm2d(3)})
    torch.save(own.state_dict(), tmp_path / "net.pth")
    assert load_ready(tmp_path / "net.pth", model=own).checkpoint.notes == ()


def test_parameters_alone_are_refused_in_words(spec, tmp_path):
    torch.save({"ema": parameters_of(state(spec))}, tmp_path / "net.pth")
    match = r"net\.pth: has the parameters of the model, but none of its 3 buffers \(bn\.running"
    with pytest.raises(CheckpointError, match=match):
        load_ready(tmp_path / "net.pth", ModelRecipe(model=spec))
    broken = {n: t for n, t in state(spec).items() if n != "bn.running_var"}
    torch.save(broken, tmp_path / "broken.pth")
    with pytest.raises(CheckpointError, match=r"1 problem: bn\.running_var: missing from"):
        load_ready(tmp_path / "broken.pth", ModelRecipe(model=spec))


def test_python_gets_no_statistics_of_other_weights_without_a_word(spec, tmp_path):
    torch.save({"model": parameters_of(state(spec)), "ema": state(spec)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"bn\.running_mean: missing from the file"):
        load(tmp_path / "net.pth", build_model(spec))


@pytest.mark.parametrize("more", [[], ["--labels", "none"]])
def test_statistics_of_another_set_are_measured(files, cli, tmp_path, more):
    weights = torch.load(files.net, weights_only=True)
    beside = {"ema": parameters_of(weights), "model": torch.load(files.stale, weights_only=True)}
    torch.save(beside, tmp_path / "net.pth")
    done = cli(
        "calibrate", tmp_path / "net.pth", *files.common, "--data", files.data, "--prefer-ema",
        "--example-weight", "keep", "-o", tmp_path / "out.safetensors", "--json", *more,
    )  # fmt: skip
    assert not any("`auto` changes nothing" in note for note in done.json["assumptions"])
    assert any("ema has parameters and no statistics" in note for note in done.json["assumptions"])
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(
        found["bn1.running_mean"], weights["bn1.running_mean"], atol=0.1, rtol=0.1
    )


def test_a_running_mean_that_is_not_there_is_not_made_up(spec, tmp_path):
    torch.save(state(spec), tmp_path / "net.pth")
    with pytest.raises(
        CheckpointError, match=r"net\.pth: --prefer-ema: it has no averaged weights"
    ):
        read_checkpoint(tmp_path / "net.pth", prefer_ema=True)


def test_flattened_parameters_are_refused(tmp_path):
    torch.save({"layer._flat_param": torch.ones(9)}, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match=r"_flat_param: flattened FSDP parameters"):
        read_checkpoint(tmp_path / "net.pth")


def test_shards_of_torch_files_are_read(spec, tmp_path):
    wanted = state(spec)
    half = len(wanted) // 2
    places = {}
    for number, names in enumerate((list(wanted)[:half], list(wanted)[half:])):
        shard = f"pytorch_model-{number}.bin"
        torch.save({name: wanted[name] for name in names}, tmp_path / shard)
        places |= dict.fromkeys(names, shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    assert set(read_checkpoint(index).tensors) == set(wanted)
    assert read_checkpoint(tmp_path).path == index
    (tmp_path / "pytorch_model-0.bin").unlink()
    with pytest.raises(CheckpointError, match=r"index\.json: its shard pytorch_model-0\.bin: no"):
        read_checkpoint(tmp_path)


def test_types_and_layouts_of_tensors_are_kept(spec, tmp_path):
    tensors = state(spec) | {"table": torch.arange(4, dtype=torch.int8)}
    tensors = {n: t.half() if t.is_floating_point() else t for n, t in tensors.items()}
    tensors["conv.weight"] = tensors["conv.weight"].transpose(0, 1).contiguous().transpose(0, 1)
    del tensors["bn.num_batches_tracked"]
    torch.save(tensors, tmp_path / "net.pth")
    save(
        load_ready(tmp_path / "net.pth", ModelRecipe(model=spec)).model,
        tmp_path / "out.safetensors",
    )
    found = load_file(tmp_path / "out.safetensors")
    assert found.pop("bn.num_batches_tracked").dtype == torch.int64
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in tensors.items()}
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_the_version_of_a_modules_state_is_kept(tmp_path):
    """MNASNet refuses a state dict that does not say which version of its layout it has."""
    model = torchvision.models.mnasnet0_5(num_classes=3)
    torch.save(model.state_dict(), tmp_path / "net.pth")
    found = read_checkpoint(tmp_path / "net.pth")
    assert found.versions[""] == 2
    loaded = load_ready(tmp_path / "net.pth", ModelRecipe(model="torchvision:mnasnet0_5")).model
    assert torch.equal(
        loaded.state_dict()["layers.0.weight"], model.state_dict()["layers.0.weight"]
    )


# --- memory ---


@pytest.mark.parametrize(
    ("name", "whole"), [("build", True), ("tied", False), ("buffered", False), ("fielded", False)]
)
def test_a_model_takes_the_files_own_tensors_where_it_then_is_whole(name, whole, spec, tmp_path):
    spec = spec.replace(":build", f":{name}")
    tensors = {key: tensor.clone() for key, tensor in state(spec).items()}
    assert (build_skeleton(spec, {}, tensors) is not None) == whole
    save_file(tensors, tmp_path / "net.safetensors")
    loaded = load_ready(tmp_path / "net.safetensors", ModelRecipe(model=spec), mapped=True)
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], tensor) for key, tensor in tensors.items())
    shared = loaded.model.conv.weight.data_ptr()
    assert (shared == loaded.checkpoint.tensors["conv.weight"].data_ptr()) == whole
    assert isinstance(loaded.model.conv.weight, nn.Parameter)
    assert loaded.model.conv.weight.requires_grad


def test_what_is_written_is_to_the_byte_what_the_library_writes(tmp_path):
    kinds = ("float32", "float16", "bfloat16", "int8", "uint8", "bool", "int64", "float64",
             "complex64", "float8_e4m3fn", "uint16")  # fmt: skip
    tensors = {f"é{i % 3}.{kind}": torch.ones(2, 3).to(getattr(torch, kind))
               for i, kind in enumerate(kinds)}  # fmt: skip
    tensors |= {"empty": torch.zeros(0, 2), "scalar": torch.tensor(2.0), '"\\\n': torch.ones(1)}
    metadata = {"bnfix": '{"a": "é"}'}
    write_tensors(tmp_path / "ours", tensors, metadata)
    save_file(tensors, tmp_path / "theirs", metadata=metadata)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    shared = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path / "ours", {"a": shared, "b": shared.t(), "c": shared[1]}, {})
    with safe_open(tmp_path / "ours", framework="pt") as file:
        assert torch.equal(file.get_tensor("b"), shared.t())
        assert torch.equal(file.get_tensor("c"), shared[1])
    with pytest.raises(TypeError, match=r"not a type of the format: q \(torch\.complex128\)"):
        write_tensors(tmp_path / "ours", {"q": torch.ones(1, dtype=torch.complex128)}, {})


# --- published files, and how a model is called ---


def test_torchvisions_own_files_are_known_by_their_digest():
    spec, digest = "torchvision:inception_v3", "0cc3c7bd" + "0" * 56
    assert published_weights(spec, digest).name == "IMAGENET1K_V1"
    assert published_arguments(spec, digest) == {"transform_input": True}
    assert published_arguments(spec, "f" * 64) == {}
    assert published_arguments("torchvision:resnet18", "f37072fd" + "0" * 56) is None
    second = default_preprocessing("torchvision:resnet50", "11ad3fa6" + "0" * 56)
    assert second is not None
    assert "IMAGENET1K_V2" in second[1]


def test_inception_says_what_published_weights_would_need(tmp_path):
    spec = "torchvision:googlenet"
    torch.save(
        build_model(spec, {"num_classes": 3, "aux_logits": False}).state_dict(), tmp_path / "g.pth"
    )
    found = load_ready(tmp_path / "g.pth", ModelRecipe(model=spec))
    assert any("--model-arg transform_input=true" in note for note in found.checkpoint.notes)
    given = load_ready(
        tmp_path / "g.pth", ModelRecipe(model=spec, arguments=(("transform_input", True),))
    )
    assert not any("transform_input" in note for note in given.checkpoint.notes)
    assert given.model.transform_input


def test_output_beside_forward_is_refused(cli, files):
    said = cli(
        "eval", files.net, "--data", files.test, *files.common, "--forward", "calls.py:half",
        "--output", "1",
    ).message  # fmt: skip
    assert "--output: 1, but --forward returns the logits itself. Leave one of them out." in said


def test_forward_says_how_a_model_is_called(cli, files, tmp_path):
    code = "def half(model, batch):\n    return {'logits': model(batch.x)}\nvalue = 3\n"
    (tmp_path / "calls.py").write_text(code)
    common = (files.net, *files.common, "--data", files.data, "--json")
    plain = cli("eval", *common).json["models"][0]
    called = cli("eval", *common, "--forward", f"{tmp_path / 'calls.py'}:half").json["models"][0]
    assert called["nll"] == pytest.approx(plain["nll"])
    for forward, match in (
        ("calls", "expected package.module:callable"),
        (f"{tmp_path / 'calls.py'}:value", "is of type int, expected a function"),
        (f"{tmp_path / 'calls.py'}:none", "there is no none in it"),
    ):
        assert match in cli("eval", *common, "--forward", forward).message


def test_a_file_does_not_say_which_code_is_called(cli, files, tmp_path):
    """A history that names a forward of somebody's is replayed without it."""
    out = tmp_path / "out.safetensors"
    (tmp_path / "calls.py").write_text("def run(model, batch):\n    return model(batch.x)\n")
    outcome = cli(
        "calibrate", files.net, *files.common, "--data", files.data, "--labels", "none",
        "--statistics", "population", "--example-weight", "keep",
        "--forward", f"{tmp_path / 'calls.py'}:run", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0
    (tmp_path / "calls.py").write_text("raise SystemExit('was run')\n")
    again = cli(
        "fix", files.net, "--recipe", out, "--model", files.spec, "--data", files.data,
        "-o", tmp_path / "again.safetensors",
    )  # fmt: skip
    assert again.code == 0, again.err
    # Older files may name an output beside the forward.
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    both = {
        k: v.replace('"logits_output": null', '"logits_output": "x"') for k, v in metadata.items()
    }
    assert both != metadata
    save_file(tensors, tmp_path / "both.safetensors", both)
    (tmp_path / "calls.py").write_text("def run(model, batch):\n    return model(batch.x)\n")
    words = ["--recipe", tmp_path / "both.safetensors", "--model", files.spec]
    for more in ([], ["--forward", f"{tmp_path / 'calls.py'}:run"]):
        again = cli(
            "fix", files.net, *words, *more, "--data", files.data, "--force",
            "-o", tmp_path / "again.safetensors",
        )  # fmt: skip
        assert again.code == 0, again.err


def test_a_model_error_is_stated_for_what_is_no_folder():
    with pytest.raises(ModelError, match=r"transformers:nowhere: there is no config\.json"):
        build_model("transformers:nowhere")
