"""Hub folders, as transformers and timm save them: read as they are, written in the same form."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import bnfix
from bnfix.checkpoints.load import load_ready
from bnfix.checkpoints.save import write_tensors
from bnfix.core.errors import BnfixError
from bnfix.core.settings import Preprocessing
from tests import nets

transformers = pytest.importorskip("transformers")
timm = pytest.importorskip("timm")
hub = pytest.importorskip("timm.models._hub")
cards = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.filterwarnings("ignore")

LABELS = ("zebra", "ant", "cow")
PREPARED = {
    "do_resize": False, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
    "image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4],
}  # fmt: skip
TIMM = ("test_resnet", "mobilenetv2_035", "regnetx_002", "test_efficientnet")


def of_transformers(name: str) -> nn.Module:
    t = transformers
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: k for k, n in enumerate(LABELS)}}
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], **names}
    if name == "resnet":
        return t.ResNetForImageClassification(t.ResNetConfig(layer_type="basic", **sizes))
    if name == "regnet":
        return t.RegNetForImageClassification(t.RegNetConfig(groups_width=8, **sizes))
    if name == "mobilenet_v2":
        config = t.MobileNetV2Config(depth_multiplier=0.35, image_size=32, **names)
        return t.MobileNetV2ForImageClassification(config)
    config = t.EfficientNetConfig(
        width_coefficient=0.25, depth_coefficient=0.25, image_size=32, hidden_dim=320, **names
    )
    return t.EfficientNetForImageClassification(config)


def written(target: Path, name: str) -> Path:
    """A folder with a network of drawn weights, as its library saves it."""
    torch.manual_seed(0)
    if name in TIMM:
        model = nets.lived_in(timm.create_model(name, num_classes=3))
        names = {"label_names": list(LABELS)}
        hub.save_for_hf(model, target, model_config=names, safe_serialization=True)
        return target
    nets.lived_in(of_transformers(name)).save_pretrained(target)
    (target / "preprocessor_config.json").write_text(json.dumps(PREPARED))
    return target


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("hub") / "net", "resnet")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "some *images* | `here`: [x].npz"
    images = np.random.default_rng(0).integers(0, 255, (60, 32, 32, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(60) % 3)
    np.savez(path.with_name("few.npz"), images=images[:12])
    return path


def stock_logits(folder: Path, x: Tensor) -> Tensor:
    """The logits of the library that a folder is for, by that library's own code."""
    with torch.no_grad():
        if "model_type" not in json.loads((folder / "config.json").read_text()):
            return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(x)
        kind = transformers.AutoModelForImageClassification
        return kind.from_pretrained(folder).eval()(x).logits


def logits(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        found = model(x)
    return getattr(found, "logits", found)


def copied(folder: Path, target: Path, **entries: object) -> Path:
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | entries))
    return target


@pytest.mark.parametrize("name", ["resnet", "mobilenet_v2", "regnet", "efficientnet", *TIMM])
def test_a_folder_comes_back_as_its_library_loads_it(name, cli, data, tmp_path):
    source, out = written(tmp_path / "in", name), tmp_path / "out"
    done = cli(
        "calibrate", source, "--data", data.with_name("few.npz"), "--statistics", "population",
        "--workers", "0", "--resize", "32", "--crop", "32", "-o", f"{out}/",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    x = torch.randn(2, 3, 32, 32)
    expected = logits(bnfix.load(out), x)
    assert not torch.allclose(expected, stock_logits(source, x), atol=1e-2)
    torch.testing.assert_close(stock_logits(out, x), expected, atol=1e-5, rtol=1e-5)
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert before.keys() == after.keys()
    assert (source / "config.json").read_bytes() == (out / "config.json").read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}
    card = cards.ModelCard.load(out / "README.md")
    assert card.data.library_name == ("timm" if name in TIMM else "transformers")
    assert card.data.eval_results is None
    assert card.data.pipeline_tag == "image-classification"
    report = json.loads((out / "report.json").read_text())
    assert report["command_line"].startswith("bnfix calibrate")
    assert json.loads(done.out)["output"] == str(out)


def test_the_card_has_what_was_measured(cli, folder, data, tmp_path):
    source = copied(folder, tmp_path / "in")
    front, body = "tags:\n- x\n- 'dataset:y'\nlicense: cc-by-4.0\n", "tags:\n- z\n# Mine\n"
    front += "datasets: [a/b, c]\npipeline_tag: image-feature-extraction\n"
    labels = np.arange(30) % 3
    images = np.random.default_rng(5).integers(0, 255, (30, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "new.npz", images=images, labels=labels)
    (source / "README.md").write_text(f"---\n{front}---\n{body}")
    out = tmp_path / "re: [paired] | # {net}"
    done = cli(
        "calibrate", source, "--data", data, "--select", "0.34", "--example-weight", "0.3",
        "--samples", "16", "--workers", "0", "-o", out, "--json", "--test", tmp_path / "new.npz",
        "--corrupt", "contrast:1",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["data"]["test"]["spec"] == str(tmp_path / "new.npz")
    assert done.json["data"]["test"]["n_examples"] == 30
    for name in ("report.md", "report.html"):
        assert "tested on" in (out / name).read_text()
    card = cards.ModelCard.load(out / "README.md")
    measured = {result.metric_name: result for result in card.data.eval_results}
    model = done.json["models"][-1]
    assert measured["Top-1"].metric_value == pytest.approx(model["top1"], abs=1e-4)
    assert measured["NLL"].metric_value == pytest.approx(model["nll"], abs=1e-4)
    assert measured["NLL"].metric_args["n"] == model["n_examples"]
    assert measured["NLL"].metric_args["interval"] == pytest.approx(
        model["interval"]["nll"], abs=1e-4
    )
    names = {result.dataset_name for result in measured.values()}
    assert names == {"new.npz under contrast:1"}
    assert (card.data.datasets, card.data.pipeline_tag) == (
        ["a/b", "c"],
        "image-feature-extraction",
    )
    assert card.data.license == "cc-by-4.0"
    assert card.data.tags == ["x", "dataset:y", "bnfix"]
    assert card.data.model_name == out.name
    assert (out / "README.original.md").read_text().endswith("# Mine\n")
    # Live layers: stock code gives the model without the weights, and the card says so.
    n_live = sum(row["example_weight"] > 0 for row in done.json["layers"])
    assert f"{n_live} norm layers are live" in card.text
    assert "bnfix.load" in card.text
    x, again = torch.randn(2, 3, 32, 32), bnfix.load(out)
    assert not torch.allclose(logits(again, x), stock_logits(out, x), atol=1e-3)
    bnfix.set_example_weight_(again, 0.0)
    torch.testing.assert_close(logits(again, x), stock_logits(out, x), atol=1e-5, rtol=1e-5)
    # From the output a further command starts, with the preprocessing and the history in it.
    found = load_ready(out)
    assert found.origin.preprocessing == Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    assert len(found.origin.history) == 1
    assert found.origin.labels == LABELS


def test_classes_are_those_of_the_folder(cli, folder, tmp_path):
    """Sorted by name they would be ant, cow, zebra; the network's outputs are in another order."""
    rng, images = np.random.default_rng(1), []
    for k in (2, 0, 1, 1, 0, 2, 2, 0):
        place = tmp_path / "images" / LABELS[k]
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{len(images)}.png")
        images.append((pixels, k))
    done = cli("eval", folder, "--data", tmp_path / "images", "--workers", "0", "--json")
    assert done.code == 0, done.err
    x = torch.from_numpy(np.stack([pixels for pixels, _ in images])).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(PREPARED[f"image_{n}"])[:, None, None] for n in ("mean", "std"))
    right = stock_logits(folder, (x - mean) / std).argmax(1) == torch.tensor([k for _, k in images])
    assert done.json["models"][0]["top1"] == pytest.approx(right.float().mean().item())
    notes = " ".join(done.json["assumptions"])
    assert "the model's own labels are the class map" in notes
    # A file that was made from it still knows them.
    out = tmp_path / "out.safetensors"
    assert cli("convert", folder, "--input-shape", "3,32,32", "-o", out).code == 0
    again = cli(
        "eval", out, "--model", f"transformers:{folder}", "--data", tmp_path / "images",
        "--workers", "0", "--json",
    )  # fmt: skip
    assert again.json["models"][0]["top1"] == done.json["models"][0]["top1"]


def test_tensors_keep_the_names_that_the_library_changes(cli, tmp_path):
    config = transformers.SegformerConfig(
        hidden_sizes=[8] * 4, depths=[1] * 4, num_attention_heads=[1] * 4, decoder_hidden_size=8,
        num_labels=3,
    )  # fmt: skip
    source, out = tmp_path / "in", tmp_path / "out"
    torch.manual_seed(0)
    stock = nets.lived_in(transformers.SegformerForSemanticSegmentation(config)).eval()
    stock.save_pretrained(source)
    assert cli("convert", source, "--input-shape", "3,32,32", "-o", out).code == 0
    before, after = (load_file(path / "model.safetensors") for path in (source, out))
    assert not before.keys() <= stock.state_dict().keys()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    again = transformers.SegformerForSemanticSegmentation.from_pretrained(out).eval()
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(logits(again, x), logits(stock, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_and_torch_files_are_read(kind, folder, tmp_path):
    source = copied(folder, tmp_path / "in")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    stem = "model" if kind == "safetensors" else "pytorch_model"
    places = {name: f"{stem}-{k % 2}.{kind}" for k, name in enumerate(tensors)}
    for shard in set(places.values()):
        part = {name: tensors[name] for name, place in places.items() if place == shard}
        (save_file if kind == "safetensors" else torch.save)(part, source / shard)
    index = source / f"{stem}.{kind}.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(logits(bnfix.load(source), x), logits(bnfix.load(folder), x))
    first = next(iter(places))
    for wrong, match in [
        ("../other.safetensors", "expected a .* file next to the index"),
        (f"{stem}-9.{kind}", r"its shard .*-9.* no such file"),
    ]:
        index.write_text(json.dumps({"weight_map": places | {first: wrong}}))
        with pytest.raises(BnfixError, match=match):
            bnfix.load(source)


def test_files_that_lie_are_refused(folder, tmp_path):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("running_var"))
    source = copied(folder, tmp_path / "misshapen")
    save_file(tensors | {name: torch.ones(1)}, source / "model.safetensors")
    with pytest.raises(BnfixError, match=rf"{name}: \(1,\) in the file, \(8,\) in the model"):
        bnfix.load(source)
    source = copied(folder, tmp_path / "pickle")
    (source / "model.safetensors").unlink()
    torch.save({"weights": tensors, "evil": Evil()}, source / "pytorch_model.bin")
    with pytest.raises(BnfixError, match=r"pickled objects .* that would run code"):
        bnfix.load(source)


class Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("name", "entries", "match"),
    [
        ("resnet", {"auto_map": {"AutoModel": "evil.Net"}}, r"asks for its own code \(auto_map"),
        ("resnet", {"model_type": None}, "names no model: expected model_type"),
        ("resnet", {"architectures": ["Evil"]}, "which transformers .* does not have"),
        ("test_resnet", {"architecture": "hf-hub:a/b"}, "timm has no model of that name"),
        ("test_resnet", {"architecture": "../../x"}, "timm has no model of that name"),
        (
            "test_resnet",
            {"model_args": {"checkpoint_path": "/etc/passwd"}},
            "is not accepted: weights",
        ),
        ("test_resnet", {"model_args": 3}, r"its config\.json cannot be used"),
        ("test_resnet", {"pretrained_cfg": {"input_size": 3}}, r"its config\.json cannot be used"),
        ("test_resnet", {"num_classes": 10**9, "model_args": {}}, "values, the checkpoint only"),
    ],
)
def test_a_description_that_cannot_be_followed_is_refused(
    name, entries, match, folder, tmp_path, cli
):
    source = folder if name == "resnet" else written(tmp_path / "timm", name)
    done = cli("inspect", copied(source, tmp_path / "x", **entries), "--data", tmp_path)
    assert done.code == 1
    assert re.search(match, done.message)


def test_an_older_form_of_timms_description_is_read(tmp_path):
    source = written(tmp_path / "in", "test_resnet")
    config = json.loads((source / "config.json").read_text())
    flat = config["pretrained_cfg"] | {"architecture": "test_resnet", "labels": ["a", "b", "c"]}
    flat |= {"input_size": [3, 40, 48], "crop_pct": 0.5, "mean": [0.1] * 3}
    (source / "config.json").write_text(json.dumps(flat))
    found = load_ready(source).origin
    assert found.labels == ("a", "b", "c")
    assert found.preprocessing is not None
    assert (found.preprocessing.resize, found.preprocessing.crop) == ((80, 96), (40, 48))
    assert found.preprocessing.mean == (0.1, 0.1, 0.1)


def refused(cli: Any, source: Path, out: Path, *more: str) -> str:
    done = cli("convert", source, "--input-shape", "3,32,32", "-o", out, *more)
    assert done.code == (2 if "expected a name" in done.message else 1), done.out
    return done.message


def test_a_folder_is_written_whole_and_replaces_only_its_like(cli, folder, tmp_path):
    source = copied(folder, tmp_path / "in")
    out = tmp_path / "out"
    assert cli("convert", source, "--input-shape", "3,32,32", "-o", out).code == 0
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "already holds files" in refused(cli, source, out)
    assert cli("convert", source, "--input-shape", "3,32,32", "-o", out, "--force").code == 0
    weights = "model.safetensors"
    assert {path.name for path in out.iterdir()} == first.keys()
    (out / "thesis.tex").write_text("years of work")
    message = refused(cli, source, out, "--force")
    assert "it holds thesis.tex" in message
    assert load_file(out / weights).keys() == load_file(source / weights).keys()
    assert "expected a folder that bnfix wrote" in refused(cli, source, source, "--force")
    (out / "thesis.tex").unlink()
    assert "expected a folder that bnfix wrote, other than the input" in refused(
        cli, out, out, "--force"
    )
    (tmp_path / "empty").mkdir()
    assert cli("convert", source, "--input-shape", "3,32,32", "-o", tmp_path / "empty").code == 0
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        assert "is not a folder" in refused(cli, source, tmp_path / name, "--force")
    assert "does not exist" in refused(cli, source, tmp_path / "no" / "out")
    assert "ends in .safetensors" in refused(cli, source, tmp_path / "out.pth")
    code = copied(folder, tmp_path / "code", auto_map={"AutoModel": "theirs.Net"})
    assert "asks for its own code" in refused(cli, code, tmp_path / "new")
    # A file is no hub folder, so its output is a file.
    assert "ends in .safetensors" in refused(cli, source / weights, tmp_path / "new")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_files_from_elsewhere_are_not_copied(cli, folder, tmp_path):
    source = copied(folder, tmp_path / "in")
    (tmp_path / "secret").write_text("mine")
    (source / "LICENSE").symlink_to(tmp_path / "secret")
    assert "LICENSE: is a link to a file elsewhere" in refused(cli, source, tmp_path / "out")
    # In a snapshot of the hub everything is a link to a file beside it.
    blobs, snapshot = tmp_path / "models" / "blobs", tmp_path / "models" / "snapshots" / "1a2b"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in folder.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    out = tmp_path / "of snapshot"
    assert cli("convert", snapshot, "--input-shape", "3,32,32", "-o", out).code == 0
    assert not (out / "config.json").is_symlink()


def test_two_runs_write_the_same_bytes(tmp_path):
    found = set()
    for k in range(8):
        metadata = {"bnfix": '{"a": "é, \\"x\\": {}"}', "format": "pt"}
        write_tensors(tmp_path / f"{k}", {"é": torch.ones(2)}, metadata)
        found.add((tmp_path / f"{k}").read_bytes())
    assert len(found) == 1
    from safetensors import safe_open

    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("é"), torch.ones(2))
