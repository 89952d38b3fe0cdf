"""Training checkpoints, copied with new weights in their places and all else as it was."""

from __future__ import annotations

import argparse
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core.errors import CheckpointError
from bnfix.core.settings import ModelRecipe, SwapRecipe
from bnfix.jobs.convert import convert


def trained(files: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    """The network with an optimizer that has momentum."""
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.eval()(torch.ones(2, 3, 8, 8)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def contents(files: Any) -> dict[str, Any]:
    model, optimizer = trained(files)
    w, o = model.state_dict(), optimizer.state_dict()
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict()
    arguments = argparse.Namespace(lr=0.25, model="net", output_dir=None, mixup=[0.1])
    ema = {name: tensor * 2 for name, tensor in w.items()}
    return {
        "lightning": {
            "epoch": 3, "global_step": 120, "pytorch-lightning_version": "2.4.0",
            "state_dict": {f"model.{name}": tensor for name, tensor in w.items()},
            "optimizer_states": [o], "lr_schedulers": [schedule], "loops": {"fit_loop": {}},
            "hyper_parameters": {"lr": 0.25, "width": 64}, "callbacks": {},
        },
        "torchvision": {
            "model": w, "optimizer": o, "lr_scheduler": schedule, "epoch": 3, "args": arguments,
        },
        "timm": {
            "epoch": 3, "arch": "net", "state_dict": {f"module.{n}": t for n, t in w.items()},
            "optimizer": o, "version": 2, "args": arguments, "state_dict_ema": ema, "metric": 71.5,
        },
        "mmengine": {
            "meta": {"epoch": 3, "iter": 120, "cfg": "lr = 0.25\n", "seed": 7}, "state_dict": w,
            "optimizer": o, "param_schedulers": [{"last_step": 3}], "message_hub": {},
        },
        "detectron2": {"model": w, "optimizer": o, "scheduler": schedule, "iteration": 119},
        "plain": w,
    }  # fmt: skip


LAYOUTS = ("lightning", "torchvision", "timm", "mmengine", "detectron2", "plain")


def weights_in(content: dict[str, Any]) -> dict[str, Tensor]:
    found = content.get("state_dict", content.get("model", content))
    return {name.removeprefix("model.").removeprefix("module."): t for name, t in found.items()}


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return type(one) is type(other) and one == other


def calibrated(cli: Any, files: Any, net: Path, out: Path, *more: str) -> Any:
    return cli(
        "calibrate", net, *files.common, "--data", files.data, "--labels", "none",
        "--statistics", "population", "-o", out, *more,
    )  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_training_goes_on_from_the_copy(layout, cli, files, tmp_path):
    net, out = tmp_path / "last.ckpt", tmp_path / "new.ckpt"
    torch.save(contents(files)[layout], net)
    done = calibrated(cli, files, net, out, "--like-input", "--json")
    assert done.code == 0, done.err
    assert done.json["options"]["model"]["like_input"] is True
    assert any("copy of last.ckpt" in note for note in done.json["assumptions"])
    before, after = (torch.load(path, weights_only=False) for path in (net, out))
    usual = tmp_path / "out.safetensors"
    assert calibrated(cli, files, net, usual).code == 0
    new, old = load_file(usual), weights_in(before)
    assert same(weights_in(after), new)
    assert not torch.equal(new["bn1.running_mean"], old["bn1.running_mean"])
    # But for the weights it is the same, to the byte where anything is described.
    for content in (before, after):
        found = content.get("state_dict", content.get("model", content))
        found.clear()
    assert same(dict(before), dict(after))
    with zipfile.ZipFile(net) as one, zipfile.ZipFile(out) as other:
        assert other.testzip() is None
        assert one.namelist() == other.namelist()
        changed = [n for n in one.namelist() if one.read(n) != other.read(n)]
        assert all("/data/" in name for name in changed)
        assert len(changed) == sum(not torch.equal(old[name], new[name]) for name in new)
    if layout != "plain":
        model, optimizer = trained(files)
        content = torch.load(out, weights_only=False)
        model.load_state_dict(weights_in(content))
        optimizer.load_state_dict(content.get("optimizer") or content["optimizer_states"][0])
        optimizer.step()


def test_hyper_parameters_are_shown(cli, files, tmp_path):
    found = {}
    for layout in LAYOUTS:
        torch.save(contents(files)[layout], tmp_path / "net.ckpt")
        found[layout] = read_checkpoint(tmp_path / "net.ckpt").beside
    assert found["lightning"]["hyper_parameters.lr"] == 0.25
    assert found["torchvision"]["args.lr"] == 0.25
    assert found["timm"] | {"args.model": "net", "metric": 71.5, "arch": "net"} == found["timm"]
    assert found["mmengine"]["meta.cfg"] == "lr = 0.25"
    assert found["detectron2"]["iteration"] == 119
    assert found["plain"] == {}
    torch.save(contents(files)["torchvision"], tmp_path / "net.ckpt")
    shown = cli("inspect", tmp_path / "net.ckpt")
    assert "next to the weights: epoch = 3" in shown.out
    assert "args.lr = 0.25" in shown.out
    assert cli("inspect", tmp_path / "net.ckpt", "--json").json["beside"]["args.lr"] == 0.25


def test_a_fix_tries_no_weights_that_the_copy_could_not_hold(cli, files, tmp_path):
    net, out = tmp_path / "net.pth", tmp_path / "out.pth"
    torch.save({"model": torch.load(files.stale, weights_only=True), "epoch": 3}, net)
    done = cli(
        "fix", net, *files.common, "--data", files.data, "--like-input", "--epochs", "1", "-o", out,
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert not any(row["example_weight"] for row in done.json["layers"])
    assert done.json["options"]["finetune"]["example_weight"] == "keep"
    assert torch.load(out, weights_only=True)["epoch"] == 3
    model = files.model()
    model.load_state_dict(torch.load(out, weights_only=True)["model"])
    words = ["fix", net, *files.common, "--data", files.data, "--like-input", "-o", out, "--force"]
    plan = cli(*words, "--plan")
    assert plan.code == 0
    assert "--like-input" in plan.out + plan.err


@pytest.mark.parametrize(
    ("more", "match"),
    [
        (["--example-weight", "0.2"], "cannot hold example weights, batch weights or gates"),
        (["--batch-weight", "auto"], "cannot hold example weights, batch weights or gates"),
    ],
)
def test_weights_beside_it_are_refused(more, match, cli, files, tmp_path):
    done = calibrated(cli, files, files.stale, tmp_path / "out.pth", "--like-input", *more)
    assert match in done.message


def test_live_layers_are_never_lost(files, tmp_path):
    recipe = ModelRecipe(files.spec, like_input=True)
    result = convert(files.net, model=recipe, swap=SwapRecipe(example_weight=0.3))
    with pytest.raises(CheckpointError, match=r"out\.pth: has no place for example and batch"):
        result.save(tmp_path / "out.pth")
    assert list(tmp_path.iterdir()) == []


def test_inputs_that_cannot_be_copied_are_refused(cli, files, tmp_path):
    w = torch.load(files.stale, weights_only=True)
    half = {n: t.half() if t.is_floating_point() else t for n, t in w.items()}
    torch.save(half, tmp_path / "half.pth")
    torch.save({"model": w, "best": w}, tmp_path / "twice.pth")
    torch.save({"model": w, "best": dict(w)}, tmp_path / "shared.pth")
    torch.save(w, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    torch.save(w, tmp_path / "whole.pth")
    with (
        zipfile.ZipFile(tmp_path / "whole.pth") as one,
        zipfile.ZipFile(tmp_path / "squeezed.pth", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in one.namelist():
            other.writestr(name, one.read(name))
    shares = "share memory with its weights"
    for name, match in {
        "half": "statistics are in half precision (bn1.running_mean",
        "shared": shares,
        "twice": shares,
        "legacy": "no torch file of version 1.6 or later",
        "squeezed": "is compressed",
    }.items():
        net, out = tmp_path / f"{name}.pth", tmp_path / "out.pth"
        key = ("--key", "model") if match == shares else ()
        assert match in calibrated(cli, files, net, out, "--like-input", *key).message
        assert not out.exists()


def test_outputs_of_another_kind_are_refused(cli, files, tmp_path):
    (tmp_path / "there.pth").write_bytes(b"mine")
    for out, match in [
        ("out.ckpt", "expected the same suffix as the input (stale.pth)"),
        ("out.safetensors", "expected the same suffix as the input"),
        ("there.pth", "already exists"),
        ("no/out.pth", "does not exist"),
    ]:
        done = calibrated(cli, files, files.stale, tmp_path / out, "--like-input")
        assert match in done.message
    assert (tmp_path / "there.pth").read_bytes() == b"mine"
    # The state of the optimizer is in the input only, so not even --force replaces it.
    net = shutil.copy(files.stale, tmp_path / "net.pth")
    done = calibrated(cli, files, net, net, "--like-input", "--force")
    assert "net.pth: would replace the checkpoint itself" in done.message
    plan = ("--data", files.data, *files.common, "--like-input", "--plan", "-o", "x.pth")
    stock = shutil.copy(files.stale, tmp_path / "net.safetensors")
    assert "--like-input: expected a torch file" in cli("finetune", stock, *plan).message
    assert "No such option" in cli("convert", files.net, "--like-input", "-o", "x.pth").message
