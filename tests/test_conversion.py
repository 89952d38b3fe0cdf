"""`convert`: every kind, overrides, globs, refusals; outputs stay, and the stock model agrees."""

from __future__ import annotations

import json
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import bnfix
from bnfix.core.errors import CheckpointError, ConfigError, ModelError, NormError
from bnfix.core.options import KINDS
from bnfix.core.settings import DataRecipe, SwapRecipe
from bnfix.jobs.convert import convert, example_input
from bnfix.jobs.export import export
from bnfix.norm.layer import generalized_norms
from tests.conftest import images_of, inputs_of
from tests.nets import bn1d, lived_in


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return inputs_of(images_of(10, seed=9)[0])


def norms_of(path: Path) -> dict[str, Any]:
    return of_header(path, "norms")


def of_header(path: Path, name: str) -> Any:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["bnfix"])[name]


@torch.no_grad()
def outputs(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model.eval()(x)


# --- kinds ---


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_its_preset(cli, files, tmp_path, kind):
    out = tmp_path / "out.safetensors"
    words = ["convert", files.net, "--model", files.spec, "--to", kind, "-o", out]
    assert cli(*words).code == 0
    for channels, layer in zip((6, 12), norms_of(out).values(), strict=True):
        grouped = kind in ("batch-group", "group")
        assert layer["channel_groups"] == (gcd(channels, 32) if grouped else channels)
        assert layer["ghost_size"] == {"ghost": 16, "batch-group": 2, "group": 1}.get(kind)
        assert layer["example_weight"] == (1.0 if kind == "group" else 0.0)


def test_the_default_kind_is_example_aware(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    assert cli("convert", files.net, "--model", files.spec, "-o", out).code == 0
    assert [layer["channel_groups"] for layer in norms_of(out).values()] == [6, 12]
    for name, tensor in load_file(out).items():
        assert torch.equal(tensor, torch.load(files.net)[name])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("groups", [None, 1, 3, 6])
def test_at_weight_0_the_outputs_stay_and_the_stock_model_computes_them_too(
    files, tmp_path, x, kind, groups
):
    swap = SwapRecipe(to=kind, example_weight=0.0, channel_groups=groups)
    result = convert(files.net, model=files.spec, swap=swap)
    expected = outputs(files.trained(), x)
    torch.testing.assert_close(outputs(result.model, x), expected, rtol=0, atol=1e-4)
    bnfix.save(result.model, tmp_path / "out.safetensors")
    found = load_file(tmp_path / "out.safetensors")
    stock = files.model()
    stock.load_state_dict(found, strict=True)
    torch.testing.assert_close(outputs(stock, x), expected, rtol=0, atol=1e-4)
    for layer, channels in (("bn1", 6), ("bn2", 12)):
        g = norms_of(tmp_path / "out.safetensors")[layer]["channel_groups"]
        for moment in ("running_mean", "running_var"):
            blocks = found[f"{layer}.{moment}"].view(g, channels // g)
            assert torch.equal(blocks, blocks[:, :1].expand_as(blocks))


def test_the_group_kind_is_group_norm(files, x):
    """On inputs for which the pooled scale and shift are the layer's own."""
    result = convert(files.net, model=files.spec, swap=SwapRecipe(to="group"))
    layer = result.model.bn2
    reference = nn.GroupNorm(4, 12, eps=layer.eps)
    with torch.no_grad():
        reference.weight.copy_(layer.weight)
        reference.bias.copy_(layer.bias)
        y = torch.randn(3, 12, 5, 5)
        torch.testing.assert_close(layer(y), reference(y), rtol=1e-5, atol=1e-5)


def test_preprocessing_that_is_given_is_stored(cli, files, tmp_path):
    for name, given in (("a", ()), ("b", ("--mean", "0.1,0.2,0.3", "--resize", "9"))):
        out = tmp_path / f"{name}.safetensors"
        assert cli("convert", files.net, "--model", files.spec, *given, "-o", out).code == 0
    found = [of_header(tmp_path / f"{name}.safetensors", "preprocessing") for name in "ab"]
    assert found[0] is None
    assert (found[1]["mean"], found[1]["resize"]) == ([0.1, 0.2, 0.3], [9])


def test_overrides_go_before_the_preset(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    outcome = cli(
        "convert", files.net, "--model", files.spec, "--to", "batch-group", "--ghost-size", "5",
        "--channel-groups", "3", "--example-weight", "0.25", "-o", out,
    )  # fmt: skip
    assert outcome.code == 0
    for layer in norms_of(out).values():
        assert (layer["channel_groups"], layer["ghost_size"], layer["example_weight"]) == (
            3,
            5,
            0.25,
        )


def test_back_to_stock_from_a_live_grouped_file(cli, files, tmp_path, x):
    live, back = tmp_path / "live.safetensors", tmp_path / "back.safetensors"
    model = ["--model", files.spec]
    words = ["--to", "group", "--example-weight", "0.5", "-o", live]
    assert cli("convert", files.net, *model, *words).code == 0
    assert cli("convert", live, *model, "--to", "batch", "-o", back).code == 0
    for channels, layer in zip((6, 12), norms_of(back).values(), strict=True):
        assert (layer["channel_groups"], layer["ghost_size"]) == (channels, None)
        assert layer["example_weight"] == 0
    stock = files.model()
    stock.load_state_dict(load_file(back), strict=True)
    torch.testing.assert_close(outputs(stock, x), outputs(files.trained(), x), rtol=0, atol=1e-4)


# --- which layers ---


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["--layers", "bn1"], ["bn1"]),
        (["--skip", "bn1"], ["bn2"]),
        (["--layers", "bn*", "--skip", "*2"], ["bn1"]),
        (["--layers", "bn1", "--layers", "bn2"], ["bn1", "bn2"]),
        (["--layers", "bn?"], ["bn1", "bn2"]),
    ],
)
def test_globs_choose_layers_and_the_others_stay_stock(cli, files, tmp_path, words, chosen):
    out = tmp_path / "out.safetensors"
    model = ["--model", files.spec]
    found = cli("convert", files.net, *model, *words, "-o", out, "--json").json
    assert list(norms_of(out)) == chosen
    assert [c["name"] for c in found["swap"]["changes"]] == chosen
    loaded = bnfix.load(out, model=files.model())
    assert [name for name, _ in generalized_norms(loaded)] == chosen


def test_a_glob_that_matches_nothing_is_an_error(cli, files, tmp_path):
    words = ["convert", files.net, "--model", files.spec, "-o", tmp_path / "o.safetensors"]
    for option in ("--layers", "--skip"):
        outcome = cli(*words, option, "layer9.*")
        assert outcome.code == 2
        assert f"{option}: layer9.* matches no norm layer" in outcome.message


def test_groups_that_do_not_divide_are_refused_with_the_layers(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["convert", files.net, "--model", files.spec, "-o", out]
    message = cli(*words, "--channel-groups", "5").message
    assert "bn1: 6 channels do not divide into 5 groups" in message
    assert "bn2: 12 channels do not divide into 5 groups" in message
    message = cli(*words, "--channel-groups", "4").message
    assert "bn1" in message
    assert "bn2" not in message
    assert not out.exists()
    assert cli(*words, "--channel-groups", "4", "--skip", "bn1").code == 0


def test_numbers_out_of_range_are_wrong_usage(cli, files, tmp_path):
    words = ["convert", files.net, "--model", files.spec, "-o", tmp_path / "o.safetensors"]
    for option, value in (
        ("--example-weight", "-0.1"), ("--example-weight", "nan"), ("--ghost-size", "0"),
        ("--channel-groups", "0"), ("--to", "layer"), ("--input-shape", "3,x"),
    ):  # fmt: skip
        outcome = cli(*words, option, value)
        assert outcome.code == 2
        assert option in outcome.message


# --- the check ---


def test_the_report_says_how_far_the_outputs_moved(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["convert", files.net, "--model", files.spec, "--to", "batch-group", "-o", out]
    found = cli(*words, "--json").json
    assert found["verdict"] is None
    assert found["models"] == []
    assert found["data"] is None
    assert [row["name"] for row in found["layers"]] == ["bn1", "bn2"]
    assert all(change["difference"] <= 1e-4 for change in found["swap"]["changes"])
    assert any("largest output difference" in note for note in found["assumptions"])
    with safe_open(out, framework="pt") as file:
        entry = json.loads(file.metadata()["bnfix"])["history"][0]
    assert entry["command"] == "convert"
    assert entry["results"]["difference"] <= 1e-4
    assert entry["options"]["swap"]["to"] == "batch-group"


class Touchy(nn.Module):
    """Does something else when its norm is not torch's own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn(self.conv(x)).mean((2, 3))
        return x if type(self.bn) is nn.BatchNorm2d else x + 0.01


def test_outputs_that_changed_are_an_error(cli, tmp_path):
    (tmp_path / "touchy.py").write_text("from tests.test_conversion import Touchy as build\n")
    torch.save(lived_in(Touchy()).state_dict(), tmp_path / "net.pth")
    out = tmp_path / "out.safetensors"
    outcome = cli(
        "convert", tmp_path / "net.pth", "--model", f"{tmp_path}/touchy.py:build", "-o", out
    )
    assert outcome.code == 1
    assert "outputs changed by 0.0" in outcome.message
    assert not out.exists()


def test_a_network_of_vectors_is_compared_layer_by_layer(tmp_path):
    (tmp_path / "vectors.py").write_text("from tests.nets import bn1d as build\n")
    torch.save(lived_in(bn1d()).state_dict(), tmp_path / "net.pth")
    spec = f"{tmp_path}/vectors.py:build"
    result = convert(tmp_path / "net.pth", model=spec, swap=SwapRecipe(channel_groups=2))
    assert result.entry["results"]["difference"] is None
    assert any("--input-shape" in note for note in result.report.assumptions)
    assert result.report.swap is not None
    assert all((c.difference or 0) <= 1e-4 for c in result.report.swap.changes)
    result = convert(tmp_path / "net.pth", model=spec, input_shape=(5,))
    assert result.entry["results"]["difference"] <= 1e-4
    with pytest.raises(ModelError, match=r"cannot be run on an input of \(7,\)"):
        convert(tmp_path / "net.pth", model=spec, input_shape=(7,))


def test_layers_of_a_single_position_keep_weight_0(tmp_path):
    (tmp_path / "vectors.py").write_text("from tests.nets import bn1d as build\n")
    torch.save(lived_in(bn1d()).state_dict(), tmp_path / "net.pth")
    result = convert(
        tmp_path / "net.pth",
        model=f"{tmp_path}/vectors.py:build",
        swap=SwapRecipe(example_weight=0.5),
        input_shape=(5,),
    )
    assert result.report.layers[0].example_weight == 0
    assert any("single position" in note for note in result.report.assumptions)


def test_a_broken_network_can_be_converted_to_be_recalibrated(files, tmp_path):
    state = torch.load(files.net)
    state["bn1.running_mean"][0] = torch.nan
    torch.save(state, tmp_path / "nan.pth")
    result = convert(tmp_path / "nan.pth", model=files.spec)
    assert result.entry["results"]["difference"] is None
    (note,) = [note for note in result.report.assumptions if "not finite" in note]
    assert "nothing was compared. Run bnfix inspect." in note
    with pytest.raises(ModelError, match="its outputs are not finite"):
        export(tmp_path / "nan.pth", to="folded", model=files.spec)


def test_a_small_input_is_made_up_where_no_size_is_known(files):
    made = example_input(files.model(), None)
    assert made is not None
    assert made.shape == (2, 3, 32, 32)
    assert torch.equal(made, example_input(files.model(), (3, 32, 32)))
    assert example_input(files.model(), None, (3, 20, 30)).shape == (2, 3, 20, 30)
    # More than 300 pixels are refused by the network.
    assert example_input(files.model(), None, (3, 400, 400)).shape == (2, 3, 32, 32)


def test_a_made_up_input_grows_until_no_layer_has_one_position_by_its_size():
    deep = nn.Sequential(
        *(nn.Sequential(nn.Conv2d(3, 3, 3, 2, 1), nn.BatchNorm2d(3)) for _ in range(6))
    ).eval()
    assert example_input(deep, None).shape == (2, 3, 128, 128)
    pooled = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3)).eval()
    assert example_input(pooled, None).shape == (2, 3, 32, 32)


def test_the_size_of_the_check_is_that_of_the_preprocessing(files):
    result = convert(files.net, model=files.spec, source=DataRecipe(resize=(20, 30)))
    assert any("input of 2x3x20x30" in note for note in result.report.assumptions)


def test_in_process(files, tmp_path):
    result = convert(files.net, model=files.spec, swap=SwapRecipe(example_weight=0.1))
    assert not any(module.training for module in result.model.modules())
    result.save(tmp_path / "out.safetensors")
    with pytest.raises(CheckpointError, match="already exists"):
        result.save(tmp_path / "out.safetensors")
    result.save(tmp_path / "out.safetensors", force=True)
    with pytest.raises(ModelError, match="does not name its model"):
        convert(files.net)
    with pytest.raises(NormError, match="bn1: 6 channels"):
        convert(files.net, model=files.spec, swap=SwapRecipe(channel_groups=5))
    with pytest.raises(ConfigError, match="--to"):
        convert(files.net, model=files.spec, swap=SwapRecipe(to="layer"))
