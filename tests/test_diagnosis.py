"""`inspect`: the layers of a file, what is wrong with them, and names that somebody made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from bnfix.core.settings import SwapRecipe
from bnfix.diagnosis.faults import diagnose, read_norms
from bnfix.jobs.convert import convert
from tests.nets import lived_in, plain
from tests.real import DATA, needs_data


def layer(name: str = "bn", channels: int = 4, **changed: Any) -> dict[str, Tensor]:
    """A healthy layer's tensors, some of them changed or (None) left out."""
    tensors: dict[str, Any] = {
        "weight": torch.linspace(0.5, 1.5, channels),
        "bias": torch.linspace(-1, 1, channels),
        "running_mean": torch.linspace(-1, 1, channels),
        "running_var": torch.linspace(0.5, 2, channels),
        "num_batches_tracked": torch.tensor(100),
    } | changed
    return {f"{name}.{key}": value for key, value in tensors.items() if value is not None}


def faults(tensors: dict[str, Tensor]) -> dict[str, str]:
    return {f.fault: f.severity for f in diagnose(tensors, read_norms(tensors))}


# --- findings ---


def test_a_healthy_layer_has_no_finding():
    assert faults(layer()) == {}
    assert faults({n: t.double() for n, t in layer().items()}) == {}


@pytest.mark.parametrize(
    ("changed", "fault", "severity"),
    [
        ({"running_mean": torch.tensor([0, 1, torch.nan, 1])}, "not-finite", "error"),
        ({"running_var": torch.tensor([1, torch.inf, 1, 1])}, "not-finite", "error"),
        ({"running_var": torch.tensor([1, -0.5, 1, 1])}, "negative-variance", "error"),
        (
            {"running_mean": torch.zeros(4), "running_var": torch.ones(4)},
            "never-updated",
            "warning",
        ),
        ({"num_batches_tracked": torch.tensor(0)}, "counter-zero", "note"),
        ({"running_var": torch.zeros(4)}, "zero-variance", "warning"),
        ({"running_var": torch.tensor([1, 1e-7, 1, 1])}, "dead-channels", "note"),
        ({"weight": torch.tensor([1, torch.nan, 1, 1])}, "gamma-not-finite", "error"),
        ({"weight": torch.tensor([1.0, 0, 1, 1])}, "gamma-zero", "note"),
        ({"running_var": (torch.ones(4) * 2).half()}, "half-statistics", "note"),
        ({"running_mean": torch.tensor([0, 1, 0, 1e5])}, "beyond-half", "note"),
        ({"bias": torch.tensor([1, torch.inf, 1, 1])}, "beta-not-finite", "error"),
        ({"weight": torch.zeros(4)}, "gamma-all-zero", "warning"),
        ({"weight": torch.ones(3)}, "length-mismatch", "error"),
        ({"bias": torch.ones(5)}, "length-mismatch", "error"),
        ({"running_var": torch.ones(3)}, "length-mismatch", "error"),
        ({"running_var": None}, "moment-missing", "error"),
        ({"running_mean": None}, "moment-missing", "error"),
        ({"running_mean": torch.ones(4, dtype=torch.int8)}, "odd-statistics", "error"),
        ({"num_batches_tracked": torch.tensor(20)}, "few-batches", "warning"),
        ({"num_batches_tracked": torch.tensor(-1)}, "counter-negative", "warning"),
        (
            {"running_mean": torch.full((4,), 0.5), "running_var": torch.full((4,), 2.0)},
            "uniform-statistics",
            "warning",
        ),
    ],
)
def test_what_is_wrong_is_found_by_itself(changed, fault, severity):
    assert faults(layer(**changed)) == {fault: severity}


@pytest.mark.parametrize(
    ("count", "fault"),
    [(300, "counted-again"), (40, "few-batches"), (49, "counter-behind"), (None, "frozen")],
)
def test_a_count_is_compared_with_those_of_the_other_layers(count, fault):
    odd = None if count is None else torch.tensor(count)
    tensors = layer("a") | layer("b") | layer("c", num_batches_tracked=odd)
    (finding,) = diagnose(tensors, read_norms(tensors))
    assert (finding.layer, finding.fault) == ("c", fault)
    same = layer("a", num_batches_tracked=odd) | layer("b", num_batches_tracked=odd)
    assert fault == "few-batches" or diagnose(same, read_norms(same)) == []


def test_a_layer_that_was_never_updated_is_not_called_0_times():
    new = {"running_mean": torch.zeros(4), "running_var": torch.ones(4)}
    plain = {"weight": torch.ones(4), "bias": torch.zeros(4)}
    tensors = layer("a") | layer("b", **new, **plain, num_batches_tracked=torch.tensor(0))
    assert faults(tensors) == {"never-updated": "warning"}


@pytest.mark.parametrize("trained", [{"weight": torch.full((4,), 0.9)}, {"bias": torch.ones(4)}])
@pytest.mark.parametrize("count", [torch.tensor(0), None])
def test_new_statistics_under_a_trained_scale_or_shift_may_belong_to_the_weights(trained, count):
    new = {
        "running_mean": torch.zeros(4), "running_var": torch.ones(4), "weight": torch.ones(4),
        "bias": torch.zeros(4), "num_batches_tracked": count,
    }  # fmt: skip
    tensors = layer("a", **new) | layer("b", **(new | trained))
    found = {f.layer: f for f in diagnose(tensors, read_norms(tensors))}
    assert (found["a"].fault, found["b"].fault) == ("never-updated", "evaluation-mode")
    assert "possibly trained in evaluation mode" in found["b"].detail
    assert "measure it" in found["b"].advice
    assert "labelled data decide" in found["b"].advice


def test_nothing_is_advised_unmeasured_where_a_network_was_trained_in_evaluation_mode(
    cli, files, tmp_path
):
    state = torch.load(files.net, weights_only=True)
    for name, tensor in state.items():
        if "bn" in name and "running" in name:
            tensor.fill_(float(name.endswith("var")))
        if name.endswith("tracked"):
            tensor.zero_()
    torch.save(state, tmp_path / "net.pth")
    found = cli("inspect", tmp_path / "net.pth", *files.common, "--data", files.data, "--json").json
    assert {"evaluation-mode", "stale"} <= {f["fault"] for f in found["findings"]}
    assert not any("population" in f["advice"] for f in found["findings"])


def test_an_instance_norm_is_left_alone_and_said_to_be(cli, files, tmp_path):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    return nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True), nn.Flatten(),"
        " nn.Linear(192, 3))\n"
    )
    state = {
        "0.running_mean": torch.zeros(3), "0.running_var": torch.zeros(3),
        "0.num_batches_tracked": torch.tensor(0), "2.weight": torch.zeros(3, 192),
        "2.bias": torch.zeros(3),
    }  # fmt: skip
    torch.save(state, tmp_path / "net.pth")
    spec = f"{tmp_path / 'nets.py'}:build"
    for data in ((), ("--data", files.data)):
        outcome = cli("inspect", tmp_path / "net.pth", "--model", spec, *data, "--json")
        (finding,) = outcome.json["findings"]
        assert (finding["fault"], finding["advice"]) == ("instance-norm", "left alone")
        assert outcome.json["layers"][0]["kind"] == "InstanceNorm2d"
    outcome = cli(
        "calibrate", tmp_path / "net.pth", "--model", spec, "--data", files.data,
        "-o", tmp_path / "o.safetensors",
    )  # fmt: skip
    assert "0: InstanceNorm2d" in outcome.message


def test_what_our_own_header_explains_is_no_finding():
    tensors = layer(
        running_mean=torch.zeros(4), running_var=torch.full((4,), 2.0),
        num_batches_tracked=torch.tensor(3),
    )  # fmt: skip
    found = {finding.fault for finding in diagnose(tensors, read_norms(tensors))}
    assert found == {"few-batches", "uniform-statistics"}
    header = {"bn": {"channel_groups": 1, "example_weight": 0.0}}
    assert diagnose(tensors, read_norms(tensors, header)) == []


def test_a_finding_names_layer_and_count_and_says_what_to_do():
    tensors = layer("layer1.0.bn2", running_var=torch.tensor([1, -0.5, -1, 1]))
    (finding,) = diagnose(tensors, read_norms(tensors))
    assert finding.layer == "layer1.0.bn2"
    assert "2 of 4 channels" in finding.detail
    assert "bnfix calibrate" in finding.advice


def test_a_layer_is_described_by_its_ranges():
    (found,) = read_norms(layer(weight=torch.tensor([-2, 1, 0.5, 1])))
    assert (found.name, found.channels, found.batches_tracked) == ("bn", 4, 100)
    assert found.mean_range == (-1, 1)
    assert found.var_range == (0.5, 2)
    assert found.gamma_range == (0.5, 2)
    (bare,) = read_norms(layer(weight=None, bias=None, num_batches_tracked=None))
    assert (bare.gamma_range, bare.batches_tracked, bare.example_weight) == (None, None, 0)


def test_a_norm_at_the_top_of_the_file_has_an_empty_name():
    (found,) = read_norms({"running_mean": torch.ones(2), "running_var": torch.ones(2)})
    assert found.name == ""


@pytest.mark.parametrize(
    "changed",
    [
        {"running_var": torch.ones(3)},
        {"running_var": torch.ones(0), "running_mean": torch.ones(0)},
        {"running_mean": torch.ones(4, dtype=torch.int8)},
        {"running_mean": torch.ones(4, dtype=torch.complex64)},
        {"running_var": None},
    ],
)
def test_tensors_that_are_no_moments_are_no_layer(changed):
    assert read_norms(layer(**changed)) == []


@pytest.mark.parametrize("kind", ["bool", "complex64", "uint16", "int8", "float8_e8m0fnu"])
def test_a_scale_of_an_odd_type_is_passed_over_or_read(kind):
    tensors = layer(weight=torch.ones(4).to(getattr(torch, kind)))
    assert len(read_norms(tensors)) == 1
    diagnose(tensors, read_norms(tensors))


@pytest.mark.parametrize("value", [torch.tensor(torch.nan), torch.tensor(1j), torch.ones(3)])
def test_a_counter_that_counts_nothing(value):
    (found,) = read_norms(layer(num_batches_tracked=value))
    assert found.batches_tracked is None


# --- the command ---


def test_inspect_lists_layers_and_findings(cli, files):
    outcome = cli("inspect", files.net)
    assert outcome.code == 0
    for word in ("bn1", "bn2", "2 norm layers", "0 findings"):
        assert word in outcome.out
    assert "kind" not in outcome.out  # which takes a model
    found = cli("inspect", files.net, "--json").json
    assert found["command"] == "inspect"
    assert [entry["name"] for entry in found["layers"]] == ["bn1", "bn2"]
    assert [entry["kind"] for entry in found["layers"]] == [None, None]
    assert found["findings"] == []
    assert found["n_tensors"] == len(torch.load(files.net))


def test_inspect_with_a_model_names_the_kinds(cli, files, tmp_path):
    found = cli("inspect", files.net, "--model", files.spec, "--json").json
    assert [entry["kind"] for entry in found["layers"]] == ["BatchNorm2d"] * 2
    shown = cli("inspect", files.net, "--model", files.spec).out
    assert all(word in shown for word in ("kind", "BatchNorm2d"))
    outcome = cli("inspect", files.net, "--model", files.spec.replace(":build", ":wide"))
    assert outcome.code == 1
    assert "does not fit" in outcome.message


def test_inspect_shows_what_a_bnfix_file_carries(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    convert(files.net, model=files.spec, swap=SwapRecipe(example_weight=0.25)).save(out)
    found = cli("inspect", out, "--json").json
    assert [entry["example_weight"] for entry in found["layers"]] == [0.25, 0.25]
    assert [entry["command"] for entry in found["history"]] == ["convert"]
    assert "0.25" in cli("inspect", out).out


def test_inspect_says_how_the_file_was_read(cli, tmp_path):
    state = {f"module.{n}": t for n, t in lived_in(plain()).state_dict().items()}
    torch.save({"epoch": 1, "model": state, "ema": state}, tmp_path / "net.pth")
    found = cli("inspect", tmp_path / "net.pth", "--json").json
    assert (found["key"], found["prefix"]) == ("model", "module.")
    assert any("under 'model'" in note for note in found["notes"])
    found = cli("inspect", tmp_path / "net.pth", "--key", "ema", "--prefix", "", "--json").json
    assert (found["key"], found["layers"][0]["name"]) == ("ema", "module.bn1")
    outcome = cli("inspect", tmp_path / "net.pth", "--key", "weights")
    assert outcome.code == 1
    assert "--key" in outcome.message


def test_inspect_changes_nothing(cli, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = files.net.read_bytes(), files.net.stat().st_mtime_ns
    assert cli("inspect", files.net, "--model", files.spec).code == 0
    assert (files.net.read_bytes(), files.net.stat().st_mtime_ns) == before
    assert list(tmp_path.iterdir()) == []


def test_a_file_without_norms_is_no_error(cli, tmp_path):
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "fc.safetensors")
    outcome = cli("inspect", tmp_path / "fc.safetensors")
    assert outcome.code == 0
    assert "no norm layer" in outcome.out
    assert cli("inspect", tmp_path / "fc.safetensors", "--json").json["layers"] == []


def test_numbers_that_json_lacks_become_null(cli, tmp_path):
    tensors = layer(running_mean=torch.full((4,), torch.nan))
    save_file(tensors, tmp_path / "nan.safetensors")
    found = cli("inspect", tmp_path / "nan.safetensors", "--json").json
    assert found["layers"][0]["mean_range"] == [None, None]
    assert found["findings"][0]["fault"] == "not-finite"
    assert "not finite" in cli("inspect", tmp_path / "nan.safetensors").out


def test_names_are_shown_as_text(cli, tmp_path):
    """Markup, escapes that colour or clear a terminal, line breaks, halves of a character."""
    names = ["[red]bold[/red]", "a\x1b[2Jb", "two\nlines", "\ud800half", "\u202eright", "[/]"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        tensors |= layer(name, running_var=-torch.ones(4))
    torch.save(tensors, tmp_path / "names.pth")
    outcome = cli("inspect", tmp_path / "names.pth")
    assert outcome.code == 0
    for shown in ("[red]bold[/red]", "a?[2Jb", "two lines", "?half", "?right", "[/]"):
        assert shown in outcome.out
    assert "\x1b" not in outcome.out
    found = cli("inspect", tmp_path / "names.pth", "--json").json
    assert [entry["name"] for entry in found["layers"]] == names


def test_a_name_in_an_error_is_shown_as_text(cli, files, tmp_path):
    torch.save({"[bold]\x1b[31m": torch.zeros(1)}, tmp_path / "odd.pth")
    outcome = cli(
        "convert", tmp_path / "odd.pth", "--model", files.spec.replace(":build", ":fixed"),
        "-o", tmp_path / "o.safetensors",
    )  # fmt: skip
    assert "[bold]?[31m" in outcome.message
    path = tmp_path / "[green]x[/green]\x1b[1m.pth"
    assert "[green]x[/green]?[1m.pth" in cli("inspect", path).message


@needs_data
@pytest.mark.parametrize("path", sorted((DATA / "odd").glob("*")), ids=lambda p: p.name)
def test_real_files_as_they_lie_about(cli, path):
    found = cli("inspect", path, "--json").json
    state = torch.load(path, map_location="cpu", weights_only=True)
    state = state.get("model", state.get("state_dict", state))
    names = {n.removeprefix("module.") for n in state if n.endswith("running_mean")}
    assert {f"{entry['name']}.running_mean" for entry in found["layers"]} == names
    outcome = cli("inspect", path)
    assert outcome.code == 0
    assert f"{len(names)} norm layers" in outcome.out
    if path.name == "crepe_tiny.pth":
        assert {f["fault"] for f in found["findings"]} >= {"counter-zero"}
    json.dumps(found)


@needs_data
def test_a_published_model_by_name(cli):
    path = DATA / "mobilenet_v2-b0353104.pth"
    found = cli("inspect", path, "--model", "torchvision:mobilenet_v2", "--json").json
    assert len(found["layers"]) == 52
    assert {entry["kind"] for entry in found["layers"]} == {"BatchNorm2d"}
    dead = sum(entry["n_dead"] for entry in found["layers"])
    assert dead == 754  # of 17,056 channels
    assert Path(found["file"]) == path
