"""The output file to the letter, what `load` makes of it, and headers that somebody forged."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bnfix
from bnfix.checkpoints.load import load_ready, origin_of
from bnfix.checkpoints.save import stock_tensors
from bnfix.core import __version__
from bnfix.core.errors import CheckpointError, ModelError
from bnfix.core.settings import ModelRecipe, Preprocessing, SwapRecipe
from bnfix.jobs.convert import convert
from bnfix.norm.layer import generalized_norms
from tests.conftest import Files, images_of, inputs_of
from tests.nets import lived_in, plain, shared_norm


def header_of(path: Path) -> dict[str, Any]:
    """The parsed header; its metadata must have one key."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert list(metadata) == ["bnfix"]
    return json.loads(metadata["bnfix"])


def forge(path: Path, tensors: dict[str, torch.Tensor], header: Any) -> Path:
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors, path, metadata={"bnfix": text})
    return path


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return inputs_of(images_of(10, seed=9)[0])


@pytest.fixture(scope="module")
def calibrated(cli, files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Calibrated, then fine-tuned: a history of two entries."""
    folder = tmp_path_factory.mktemp("calibrated")
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    words = ["--data", files.data, *files.common]
    assert cli("calibrate", files.stale, *words, "-o", first).code == 0
    finetune = ["finetune", first, *words, "--epochs", "1", "--example-weight", "learn"]
    assert cli(*finetune, "--seed", "3", "--lr", "0.01", "-o", second).code == 0
    return second


# --- tensors ---


@pytest.mark.parametrize("kind", ["example-aware", "ghost", "batch-group", "group", "batch"])
def test_the_tensors_are_exactly_the_stock_state_dict(files, tmp_path, kind):
    out = tmp_path / "out.safetensors"
    convert(files.net, model=files.spec, swap=SwapRecipe(to=kind)).save(out)
    stock, found = files.trained(), load_file(out)
    expected = stock.state_dict()
    assert set(found) == set(expected)
    assert {n: (t.shape, t.dtype) for n, t in found.items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    assert stock.load_state_dict(found, strict=True)


def test_num_batches_tracked_is_added_where_the_input_lacks_it(files, tmp_path):
    state = {n: t for n, t in torch.load(files.net).items() if "num_batches" not in n}
    save_file(state, tmp_path / "old.safetensors")
    convert(tmp_path / "old.safetensors", model=files.spec).save(tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert set(found) == set(files.model().state_dict())
    assert found["bn1.num_batches_tracked"].dtype == torch.int64
    assert found["bn1.num_batches_tracked"].shape == ()


def test_wrappers_around_the_state_dict_are_not_written(files, tmp_path):
    state = {f"module.{n}": t for n, t in torch.load(files.net).items()}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "wrapped.pth")
    convert(tmp_path / "wrapped.pth", model=files.spec).save(tmp_path / "out.safetensors")
    for name, tensor in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(tensor, torch.load(files.net)[name])


def test_shared_layers_are_written_under_each_name(tmp_path, x):
    model = lived_in(shared_norm()).eval()
    expected = model(x)
    bnfix.swap_norms_(model, example_weight=0.25)
    live = model(x)
    bnfix.save(model, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    assert {"first.bn.weight", "second.bn.weight"} <= set(found)
    stock = shared_norm().eval()
    stock.load_state_dict(found, strict=True)
    assert torch.equal(stock(x), expected)
    loaded = bnfix.load(tmp_path / "out.safetensors", model=shared_norm())
    assert torch.equal(loaded(x), live)
    assert loaded.first.bn is loaded.second.bn
    assert len(header_of(tmp_path / "out.safetensors")["norms"]) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_kept_but_for_new_statistics_that_would_lose(files, tmp_path, cli, dtype):
    half = {
        n: t.to(dtype) if t.is_floating_point() else t for n, t in torch.load(files.net).items()
    }
    save_file(half, tmp_path / "half.safetensors")
    convert(tmp_path / "half.safetensors", model=files.spec).save(tmp_path / "same.safetensors")
    same = load_file(tmp_path / "same.safetensors")
    assert all(torch.equal(same[n], t) and same[n].dtype == t.dtype for n, t in half.items())
    out = tmp_path / "out.safetensors"
    words = ["--statistics", "population", "--example-weight", "0.125", "--batch-size", "180"]
    assert cli("calibrate", tmp_path / "half.safetensors", "--data", files.data, *files.common,
               *words, "-o", out).code == 0  # fmt: skip
    found = load_file(out)
    fresh = files.model()
    fresh.load_state_dict({n: t.float() for n, t in half.items()})
    exact = [(inputs_of(images_of(180, seed=2)[0]))]
    bnfix.swap_norms_(fresh)
    bnfix.recalibrate_(fresh, exact)
    for name, tensor in fresh.state_dict().items():
        if "running" in name:
            spread = fresh.state_dict()[name[: name.rindex("_")] + "_var"] + 1e-5
            scale = spread.sqrt() if name.endswith("mean") else spread
            loss = ((tensor.to(dtype).float() - tensor).abs() / scale).max()
            assert found[name].dtype == (torch.float32 if loss > 1e-3 else dtype), name
            assert ((found[name].float() - tensor).abs() / scale).max() <= 1.001e-3
        elif name in found:
            assert found[name].dtype == half[name].dtype
    files.model().load_state_dict(found, strict=True)


def test_what_a_half_file_does_is_what_was_measured(files, tmp_path, cli, x):
    """Scale and shift are rounded to the file's type before the claim is made, not after."""
    half = {n: t.half() if t.is_floating_point() else t for n, t in torch.load(files.net).items()}
    save_file(half, tmp_path / "half.safetensors")
    result = convert(
        tmp_path / "half.safetensors", model=files.spec, swap=SwapRecipe(to="batch-group")
    )
    result.save(tmp_path / "out.safetensors")
    loaded = load_ready(tmp_path / "out.safetensors", ModelRecipe(model=files.spec)).model
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))


# --- the header ---


def test_the_header_holds_what_is_promised(calibrated, files):
    header = header_of(calibrated)
    assert set(header) == {"format", "bnfix", "model", "preprocessing", "norms", "history"}
    assert header["format"] == 1
    assert header["bnfix"] == __version__
    assert header["model"] == {"spec": files.spec, "arguments": {}}
    preprocessing = header["preprocessing"]
    assert preprocessing["mean"] == [0.5]
    assert preprocessing["std"] == [0.25]
    assert preprocessing["scale"] == pytest.approx(1 / 255)
    assert list(header["norms"]) == ["bn1", "bn2"]
    for channels, layer in zip((6, 12), header["norms"].values(), strict=True):
        assert set(layer) == {"channel_groups", "ghost_size", "example_weight", "eps"}
        assert layer["channel_groups"] == channels
        assert layer["ghost_size"] is None
        assert layer["eps"] == 1e-5
        weight = layer["example_weight"]
        assert isinstance(weight, float) or len(weight) == channels
    first, second = header["history"]
    assert (first["command"], second["command"]) == ("calibrate", "finetune")
    assert (first["seed"], second["seed"]) == (0, 3)
    assert second["options"]["finetune"]["lr"] == 0.01
    assert second["versions"]["bnfix"] == __version__
    assert second["versions"]["torch"] == torch.__version__
    assert len(first["input"]["sha256"]) == 64
    assert first["input"]["sha256"] != second["input"]["sha256"]
    assert first["data"]["fingerprint"] == second["data"]["fingerprint"]
    assert first["data"]["n_examples"] == 180
    assert first["data"]["fit"]["n_examples"] == 108
    assert {"top1", "nll"} <= set(second["results"])


def test_the_input_is_named_by_the_hash_of_its_bytes(files, tmp_path):
    import hashlib

    result = convert(files.net, model=files.spec)
    assert result.entry["input"] == {
        "file": "net.pth",
        "sha256": hashlib.sha256(files.net.read_bytes()).hexdigest(),
    }


def test_a_model_of_ones_own_can_be_saved_and_keeps_its_history(tmp_path, x):
    model = lived_in(plain()).eval()
    bnfix.swap_norms_(model)
    weights = torch.linspace(0, 1, 4)
    bnfix.set_example_weight_(model, {"bn1": weights, "bn2": 1 / 3})
    expected = model(x)
    bnfix.save(model, tmp_path / "one.safetensors")
    header = header_of(tmp_path / "one.safetensors")
    assert header["model"] == {"spec": None, "arguments": {}}
    assert header["history"] == []
    assert header["preprocessing"] is None
    assert header["norms"]["bn1"]["example_weight"] == weights.tolist()
    loaded = bnfix.load(tmp_path / "one.safetensors", model=plain())
    assert torch.equal(loaded(x), expected)
    assert not any(module.training for module in loaded.modules())
    # Once more through the file: nothing is lost on the way.
    bnfix.save(loaded, tmp_path / "two.safetensors")
    assert (tmp_path / "one.safetensors").read_bytes() == (
        tmp_path / "two.safetensors"
    ).read_bytes()


def test_saving_refuses_to_replace_unless_told(tmp_path):
    model = plain()
    path = tmp_path / "out.safetensors"
    bnfix.save(model, path)
    with pytest.raises(CheckpointError, match=r"out\.safetensors: already exists"):
        bnfix.save(model, path)
    bnfix.save(model, path, force=True)


# --- loading ---


def test_loading_gives_the_logits_of_the_model_in_memory_bit_for_bit(calibrated, files, x):
    loaded = load_ready(calibrated, ModelRecipe(model=files.spec)).model
    again = bnfix.load(calibrated, model=files.model())
    assert type(dict(generalized_norms(again))["bn1"]) is bnfix.GeneralizedBatchNorm
    with torch.no_grad():
        assert torch.equal(loaded(x), again(x))


@pytest.mark.parametrize(
    "swap",
    [
        SwapRecipe(to="group"),
        SwapRecipe(to="batch-group", example_weight=0.3),
        SwapRecipe(to="ghost", example_weight=1.0, ghost_size=3),
        SwapRecipe(channel_groups=3, example_weight=0.5, layers=("bn2",)),
        SwapRecipe(channel_groups=1),
    ],
)
def test_every_kind_survives_the_file_bit_for_bit(files, tmp_path, x, swap):
    result = convert(files.net, model=files.spec, swap=swap)
    result.save(tmp_path / "out.safetensors")
    loaded = bnfix.load(tmp_path / "out.safetensors", model=files.model())
    with torch.no_grad():
        assert torch.equal(loaded(x), result.model(x))
    for name, layer in generalized_norms(result.model):
        other = dict(generalized_norms(loaded))[name]
        assert (layer.channel_groups, layer.ghost_size) == (other.channel_groups, other.ghost_size)


def test_a_callable_in_a_header_is_not_imported_unless_it_is_named(cli, files, tmp_path):
    trace = tmp_path / "trace"
    (tmp_path / "evil.py").write_text(
        f"open({str(trace)!r}, 'w').close()\n" + (files.folder / "nets.py").read_text()
    )
    spec = f"{tmp_path}/evil.py:build"
    forged = forge(
        tmp_path / "forged.safetensors", torch.load(files.net),
        {"format": 1, "bnfix": "0.1.0", "model": {"spec": spec, "arguments": {}}, "norms": {}},
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"bnfix does not run code that a file names.*--model"):
        bnfix.load(forged)
    for words in (["eval", forged, "--data", files.data], ["inspect", forged]):
        cli(*words)
    out = ["-o", tmp_path / "o.safetensors"]
    assert cli("convert", forged, *out).code == 1
    assert cli("fix", forged, "--data", files.data, *out).code == 1
    assert not trace.exists()
    assert cli("convert", forged, "--model", spec, *out).code == 0
    assert trace.exists()


def test_a_published_model_is_built_from_what_the_file_says(tmp_path, files):
    import torchvision

    torch.manual_seed(1)
    model = lived_in(torchvision.models.shufflenet_v2_x0_5(num_classes=5)).eval()
    torch.save(model.state_dict(), tmp_path / "net.pth")
    spec = "torchvision:shufflenet_v2_x0_5"
    convert(tmp_path / "net.pth", model=spec, input_shape=(3, 32, 32)).save(
        tmp_path / "out.safetensors"
    )
    loaded = bnfix.load(tmp_path / "out.safetensors")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-5, atol=1e-5)
    assert origin_of(loaded).spec == spec


# --- forged headers ---

BN1 = {"channel_groups": 6, "ghost_size": None, "example_weight": 0.5, "eps": 1e-5}

FORGED: dict[str, Any] = {
    "format 2": {"format": 2},
    "format 1.0": {"format": 1.0},
    "format true": {"format": True},
    "no format": {"norms": {}},
    "a list": [1],
    "no json": "{",
    "nan": '{"format": 1, "norms": {"bn1": {"example_weight": NaN}}}',
    "deep": '{"format": 1, "history": ' + "[" * 500 + "]" * 500 + "}",
    "very deep": '{"format": 1, "history": ' + "[" * 50_000 + "]" * 50_000 + "}",
    "model a number": {"format": 1, "model": 5},
    "spec a list": {"format": 1, "model": {"spec": ["torchvision:resnet18"]}},
    "arguments a list": {"format": 1, "model": {"spec": "a:b", "arguments": [1]}},
    "preprocessing a text": {"format": 1, "preprocessing": "resize"},
    "mean a text": {"format": 1, "preprocessing": {"mean": "abc"}},
    "mean of texts": {"format": 1, "preprocessing": {"mean": ["a"]}},
    "mean infinite": '{"format": 1, "preprocessing": {"mean": [1e999]}}',
    "std zero": {"format": 1, "preprocessing": {"std": [0]}},
    "resize a number": {"format": 1, "preprocessing": {"resize": 5}},
    "resize half": {"format": 1, "preprocessing": {"resize": [5.5]}},
    "crop huge": {"format": 1, "preprocessing": {"crop": [10**9, 10**9]}},
    "scale a list": {"format": 1, "preprocessing": {"scale": [1]}},
    "scale huge": {"format": 1, "preprocessing": {"scale": 10**400}},
    "channels": {"format": 1, "preprocessing": {"channels": 7}},
    "norms a list": {"format": 1, "norms": [1]},
    "norm unknown": {"format": 1, "norms": {"bn1": BN1, "bn9": BN1}},
    "norm a conv": {"format": 1, "norms": {"conv1": BN1}},
    "norm a number": {"format": 1, "norms": {"bn1": 3}},
    "groups do not divide": {"format": 1, "norms": {"bn1": BN1 | {"channel_groups": 4}}},
    "groups 0": {"format": 1, "norms": {"bn1": BN1 | {"channel_groups": 0}}},
    "groups a text": {"format": 1, "norms": {"bn1": BN1 | {"channel_groups": "6"}}},
    "ghost negative": {"format": 1, "norms": {"bn1": BN1 | {"ghost_size": -1}}},
    "weight above 1": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": 1.5}}},
    "weight a text": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": "0.5"}}},
    "weight nothing": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": None}}},
    "weight an object": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": {"": 0.5}}}},
    "weight true": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": True}}},
    "weight huge": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": 10**400}}},
    "weights too few": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": [0.5] * 5}}},
    "weights too many": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": [0.5] * 10**5}}},
    "weights mixed": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": [0.5] * 5 + ["x"]}}},
    "weights nested": {"format": 1, "norms": {"bn1": BN1 | {"example_weight": [[0.5] * 6]}}},
    "eps negative": {"format": 1, "norms": {"bn1": BN1 | {"eps": -1}}},
    "eps a text": {"format": 1, "norms": {"bn1": BN1 | {"eps": "1e-5"}}},
    "eps true": {"format": 1, "norms": {"bn1": BN1 | {"eps": True}}},
    "batch above 1": {"format": 1, "norms": {"bn1": BN1 | {"batch_weight": 1.5}}},
    "both above 1": {"format": 1, "norms": {"bn1": BN1 | {"batch_weight": 0.6}}},
    "batch a text": {"format": 1, "norms": {"bn1": BN1 | {"batch_weight": "0.5"}}},
    "batch true": {"format": 1, "norms": {"bn1": BN1 | {"batch_weight": [True] * 6}}},
    "batch too few": {"format": 1, "norms": {"bn1": BN1 | {"batch_weight": [0.5] * 5}}},
    "estimator": {"format": 1, "norms": {"bn1": BN1 | {"batch_estimator": ["mode"]}}},
    "history a text": {"format": 1, "history": "long"},
    "history of numbers": {"format": 1, "history": [1, 2]},
}


@pytest.mark.parametrize("name", FORGED)
def test_a_forged_header_is_refused_in_one_line(cli, files, tmp_path, name):
    forged = forge(tmp_path / "forged.safetensors", torch.load(files.net), FORGED[name])
    with pytest.raises(CheckpointError, match=r"forged\.safetensors: "):
        bnfix.load(forged, model=files.model())
    out = tmp_path / "out.safetensors"
    outcome = cli("calibrate", forged, "--data", files.data, *files.common, "-o", out)
    assert outcome.code == 1
    assert "forged.safetensors" in outcome.message
    assert not out.exists()
    assert cli("inspect", forged).code in (0, 1)
    assert cli("inspect", forged, "--json").code in (0, 1)


def test_layers_that_a_header_does_not_name_stay_stock(files, tmp_path, x):
    header = {"format": 1, "norms": {"bn1": BN1}, "something": {"else": 1}}
    loaded = bnfix.load(
        forge(tmp_path / "part.safetensors", torch.load(files.net), header), model=files.model()
    )
    assert isinstance(loaded.bn1, bnfix.GeneralizedBatchNorm)
    assert type(loaded.bn2) is nn.BatchNorm2d


def test_odd_entries_of_a_history_are_kept_and_harmless(cli, files, tmp_path):
    entries: list[Any] = [{"data": 5}, {"data": {"fit": 5, "select": "abc"}}, {"command": ["x"]}]
    forged = forge(
        tmp_path / "f.safetensors", torch.load(files.net), {"format": 1, "history": entries}
    )
    found = cli("eval", forged, "--data", files.data, *files.common, "--json").json
    assert found["n_seen"] == 0
    out = tmp_path / "out.safetensors"
    assert cli("convert", forged, "--model", files.spec, "-o", out).code == 0
    assert header_of(out)["history"][:3] == entries


def test_a_header_cut_off_is_refused(files, tmp_path):
    bnfix.save(files.trained(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    size = struct.unpack("<Q", whole[:8])[0]
    for end in (4, 8, 8 + size // 2, 8 + size, len(whole) - 1):
        (tmp_path / "cut.safetensors").write_bytes(whole[:end])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors"):
            bnfix.load(tmp_path / "cut.safetensors", model=files.model())


def test_preprocessing_travels(files, tmp_path):
    prep = Preprocessing(resize=(9,), crop=(8, 8), mean=(0.1, 0.2, 0.3), std=(0.5,))
    bnfix.save(files.trained(), tmp_path / "a.safetensors")
    model = bnfix.load(tmp_path / "a.safetensors", model=files.model())
    origin_of(model).preprocessing = prep
    bnfix.save(model, tmp_path / "b.safetensors")
    again = bnfix.load(tmp_path / "b.safetensors", model=files.model())
    assert origin_of(again).preprocessing == prep


def test_stock_tensors_leave_out_only_what_bnfix_added():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(2)
            self.register_buffer("example_weight", torch.ones(3))  # the user's own

    model = Named()
    bnfix.swap_norms_(model)
    names = set(stock_tensors(model))
    assert "example_weight" in names
    assert "bn.example_weight" not in names
