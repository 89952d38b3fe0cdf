"""Models from a transformers folder: built offline, prepared as it says, and never trusted."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import bnfix
from bnfix.core import guards
from bnfix.core.errors import ModelError
from bnfix.models.build import build_model
from bnfix.models.published import default_preprocessing, renamed
from tests import nets

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny residual network as save_pretrained writes it."""
    found = tmp_path_factory.mktemp("pretrained")
    config = transformers.ResNetConfig(
        embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3, layer_type="basic"
    )
    torch.manual_seed(0)
    model = transformers.ResNetForImageClassification(config)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    model.save_pretrained(found)
    (found / "preprocessor_config.json").write_text(json.dumps({
        "do_resize": True, "size": {"shortest_edge": 40}, "resample": 3, "do_center_crop": True,
        "crop_size": {"height": 32, "width": 32}, "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
    }))  # fmt: skip
    return found


def changed(folder: Path, target: Path, name: str, **entries: object) -> Path:
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    found = json.loads((folder / name).read_text())
    (target / name).write_text(json.dumps(found | entries))
    return target


def test_a_folder_goes_through_convert_and_back(cli, folder, tmp_path):
    out, spec = tmp_path / "out.safetensors", f"transformers:{folder}"
    assert cli("convert", folder, "--model", spec, "--input-shape", "3,32,32", "-o", out).code == 0
    x = torch.randn(2, 3, 32, 32)
    stock = transformers.ResNetForImageClassification.from_pretrained(folder).eval()
    expected = stock(x).logits.detach()
    stock.load_state_dict(load_file(out), strict=True)
    torch.testing.assert_close(stock(x).logits, expected)
    with pytest.raises(ModelError, match="bnfix does not run code that a file names"):
        bnfix.load(out)
    loaded = bnfix.load(out, model=build_model(spec))
    torch.testing.assert_close(loaded(x).logits, expected, atol=1e-5, rtol=1e-4)


def segformer(target: Path) -> nn.Module:
    config = transformers.SegformerConfig(
        hidden_sizes=[8, 8, 8, 8], depths=[1] * 4, num_attention_heads=[1] * 4,
        decoder_hidden_size=8, num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.SegformerForSemanticSegmentation(config).eval()
    nets.lived_in(model).save_pretrained(target)
    return model


def test_the_class_is_that_of_the_configuration_and_names_are_changed_as_it_loads(cli, tmp_path):
    stock, spec = segformer(tmp_path), f"transformers:{tmp_path}"
    assert not set(load_file(tmp_path / "model.safetensors")) <= set(stock.state_dict())
    out = tmp_path / "out.safetensors"
    done = cli("convert", tmp_path, "--model", spec, "-o", out, "--json")
    assert done.code == 0, done.err
    assert "Loading weights" not in done.err
    assert "transformers]" not in done.err
    notes = done.json["assumptions"]
    assert (
        "built SegformerForSemanticSegmentation of transformers, as the folder describes" in notes
    )
    assert any(note.endswith("names were changed as by transformers' from_pretrained")
               for note in notes)  # fmt: skip
    assert load_file(out).keys() == stock.state_dict().keys()
    x = torch.randn(1, 3, 32, 32)
    again = bnfix.load(out, model=build_model(spec))
    torch.testing.assert_close(again(x).logits, stock(x).logits, atol=1e-5, rtol=1e-4)


def test_a_second_pass_gives_the_same(tmp_path):
    """The first pass installs hooks that collect features, and a flag that they are there."""
    segformer(tmp_path)
    model = build_model(f"transformers:{tmp_path}")
    x, found = torch.randn(1, 3, 32, 32), []
    for _ in range(2):
        with guards.inference(model) as changed:
            found.append(model(x).logits)
        assert changed == []
    assert torch.equal(*found)


def test_half_precision_stays_under_other_names(tmp_path):
    stock = segformer(tmp_path)
    half = {n: t.half() for n, t in load_file(tmp_path / "model.safetensors").items()}
    found = renamed(stock, half)
    assert {t.dtype for t in found.values() if t.is_floating_point()} == {torch.float16}
    assert renamed(stock, {n: t for n, t in half.items() if "classifier" not in n}) == {}


def test_its_outputs_are_logits_for_eval(cli, folder, tmp_path):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 255, (12, 40, 40, 3), dtype=np.uint8)
    np.savez(tmp_path / "data.npz", images=images, labels=np.arange(12) % 3)
    outcome = cli(
        "eval", folder / "model.safetensors", "--model", f"transformers:{folder}",
        "--data", tmp_path / "data.npz", "--workers", "0", "--json",
    )  # fmt: skip
    assert outcome.json["models"][0]["top1"] is not None


def test_preprocessing_is_that_of_the_folder(folder):
    found, note = default_preprocessing(f"transformers:{folder}")
    assert (found.resize, found.crop, found.interpolation) == ((40,), (32, 32), "bicubic")
    assert (found.mean, found.std) == ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert str(folder) in note


@pytest.mark.parametrize(
    ("entries", "resize", "crop"),
    [
        ({"size": 48, "do_center_crop": False}, (48, 48), None),
        ({"size": {"height": 30, "width": 50}}, (30, 50), (32, 32)),
        ({"size": {"shortest_edge": 28}, "crop_pct": 0.875}, (32,), (28, 28)),
        ({"do_resize": False, "crop_size": [20, 24]}, None, (20, 24)),
    ],
)
def test_sizes_are_written_in_several_ways(folder, tmp_path, entries, resize, crop):
    if "crop_pct" in entries:
        entries = entries | {"do_center_crop": False}
    changed(folder, tmp_path, "preprocessor_config.json", **entries)
    found, _ = default_preprocessing(f"transformers:{tmp_path}")
    assert (found.resize, found.crop) == (resize, crop)


def test_the_number_of_classes_is_read_off_the_checkpoint(folder, tmp_path):
    changed(folder, tmp_path, "config.json", id2label={"0": "a", "1": "b"})
    tensors = load_file(folder / "model.safetensors")
    model = build_model(f"transformers:{tmp_path}", {}, tensors)
    assert model.config.num_labels == 3


@pytest.mark.parametrize(
    ("entries", "match"),
    [
        ({"auto_map": {"AutoModel": "evil.Model"}}, r"asks for its own code \(auto_map\)"),
        ({"model_type": "no_such_model"}, "transformers builds no ResNetForImageClassification"),
        (
            {"model_type": "no_such_model", "architectures": None},
            "transformers builds no image classifier",
        ),
        ({"model_type": 3}, "names no model_type"),
        ({"model_type": "bert"}, "transformers builds no ResNetForImageClassification"),
        ({"architecture": "hf-hub:a/b"}, "names files elsewhere"),
        ({"backbone": "someone/net"}, r"names files elsewhere \(backbone\)"),
        ({"architectures": ["EvilNet"]}, "architecture 'EvilNet', which transformers .* not have"),
        ({"architectures": ["AutoConfig"]}, "architecture 'AutoConfig', which transformers"),
        ({"architectures": [3]}, "architecture '3', which transformers"),
        ({"hidden_sizes": "many"}, "hidden_sizes"),
    ],
)
def test_a_folder_that_cannot_be_built_is_refused(folder, tmp_path, entries, match):
    changed(folder, tmp_path, "config.json", **entries)
    with pytest.raises(ModelError, match=match):
        build_model(f"transformers:{tmp_path}")


def test_broken_files_are_refused(folder, tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot be read as JSON"):
        build_model(f"transformers:{tmp_path}")
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="is not a JSON object"):
        build_model(f"transformers:{tmp_path}")
    changed(folder, tmp_path, "preprocessor_config.json", image_std=[0, "x", None])
    with pytest.raises(ModelError, match=r"preprocessor_config\.json cannot be used"):
        default_preprocessing(f"transformers:{tmp_path}")
    (tmp_path / "preprocessor_config.json").unlink()
    assert default_preprocessing(f"transformers:{tmp_path}") is None
