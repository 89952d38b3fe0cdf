"""`inspect` with a model and with data: planted faults are found, and nothing else is."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
import torch
import typer
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.cli import app
from bnfix.conversion import convert
from bnfix.diagnosing.diagnosis import Finding
from bnfix.diagnosing.examination import examine_behaviour, examine_call, examine_model
from bnfix.diagnosing.inspection import inspect_checkpoint
from bnfix.diagnosing.retelling import _RECIPES, retell
from bnfix.pipeline import calibrate
from bnfix.plan import Plan
from bnfix.recipe import DataRecipe, ModelRecipe, StatisticsRecipe, SwapRecipe, WeightRecipe
from tests.conftest import images_of, inputs_of
from tests.real import DATA, needs_data


class Net(nn.Module):
    """Two norms; the second may be called again, or not at all."""

    def __init__(self, first: nn.Module, calls: int = 1, pool: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1, self.bn2 = first, nn.BatchNorm2d(4)
        self.calls, self.pool = calls, pool
        torch.manual_seed(0)
        for part in (self.bn1, self.bn2):
            if getattr(part, "running_var", None) is not None:
                part.running_mean.normal_(0, 0.1)
                part.running_var.uniform_(0.5, 1.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.bn1(self.conv(x)).relu()
        if self.pool:
            x = x.mean((2, 3), keepdim=True)
        for _ in range(self.calls):
            x = self.bn2(x)
        return x.mean((2, 3))


def norm(**options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(4, **options)


def named(findings: list[Finding]) -> list[tuple[str, str, str]]:
    return [(finding.layer, finding.fault, finding.severity) for finding in findings]


# --- as built ---


@pytest.mark.parametrize(
    ("first", "fault", "severity"),
    [
        (norm(momentum=0.0), "momentum-zero", "warning"),
        (norm(momentum=0.9), "momentum-high", "warning"),
        (norm(momentum=1.1), "momentum-out-of-range", "error"),
        (norm(momentum=None), "momentum-none", "note"),
        (norm(track_running_stats=False), "no-statistics", "warning"),
        (FrozenBatchNorm2d(4), "frozen-kind", "note"),
        (norm(eps=10.0), "eps-dominates", "warning"),
    ],
)
def test_a_setting_that_is_wrong_is_found(first, fault, severity):
    (finding,) = examine_model(Net(first), [])
    assert (finding.layer, finding.fault, finding.severity) == ("bn1", fault, severity)
    assert "bnfix" in finding.advice


def test_an_eps_that_float16_does_not_have_is_found_beside_a_tiny_variance():
    net = Net(norm(eps=1e-12))
    assert named(examine_model(net, [])) == []
    net.bn1.running_var[1] = 1e-9
    assert named(examine_model(net, [])) == [("bn1", "eps-tiny", "warning")]


def test_a_momentum_that_the_count_of_batches_makes_too_low(tmp_path):
    net = Net(norm(momentum=0.001))
    net.bn1.num_batches_tracked.fill_(500)
    net.bn2.num_batches_tracked.fill_(500)
    torch.save(net.state_dict(), tmp_path / "net.pth")
    layers = inspect_checkpoint(tmp_path / "net.pth").layers
    assert named(examine_model(net, layers)) == [("bn1", "momentum-low", "warning")]


def test_a_layer_under_two_names():
    net = Net(norm())
    net.bn2 = net.bn1
    assert named(examine_model(net, [])) == [("bn1", "shared", "note")]


def test_a_healthy_model_has_no_finding():
    net = Net(norm())
    assert named(examine_model(net, [])) == []
    assert named(examine_call(net, torch.randn(2, 3, 8, 8))) == []


# --- as called ---


@pytest.mark.parametrize(
    ("net", "fault"),
    [
        (Net(norm(), calls=3), "reused"),
        (Net(norm(), calls=0), "unused"),
        (Net(norm(), pool=True), "single-position"),
    ],
)
def test_a_call_that_is_odd_is_found(net, fault):
    assert named(examine_call(net, torch.randn(2, 3, 8, 8))) == [("bn2", fault, "note")]


# --- on data ---


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    images, labels = images_of(120, seed=5)
    x, y = inputs_of(images), torch.from_numpy(labels)
    return [(x[i : i + 40], y[i : i + 40]) for i in range(0, 120, 40)]


def test_a_trained_model_behaves_in_both_modes(files):
    model = files.trained()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen, findings = examine_behaviour(model, batches())
    assert findings == []
    assert seen.n_examples == 120
    assert seen.top1 is not None
    assert seen.top1 > 0.6
    assert set(seen.drifts) == {"bn1", "bn2"}
    logits = torch.cat([model(x).detach() for x, _ in batches()])
    assert seen.output_range == pytest.approx((float(logits.min()), float(logits.max())), rel=1e-5)
    assert not model.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_stale_statistics_show_by_layer_and_in_accuracy(files):
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    seen, findings = examine_behaviour(model.eval(), batches())
    assert {("bn1", "stale"), ("bn2", "stale"), ("", "modes-differ")} <= {
        (finding.layer, finding.fault) for finding in findings
    }
    assert seen.top1 is not None
    assert seen.top1_training is not None
    assert seen.top1_training > seen.top1


def test_outputs_that_explode_or_are_not_finite(files):
    model = files.trained()
    model.bn2.running_var.fill_(1e-4)
    assert ("", "output-range", "warning") in named(examine_behaviour(model, batches())[1])
    model.bn2.running_var.fill_(torch.nan)
    assert ("", "output-not-finite", "error") in named(examine_behaviour(model, batches())[1])


# --- the command ---


def test_inspect_with_data_compares_and_says_what_to_run(cli, files):
    arguments = (files.stale, *files.common, "--data", files.data)
    found = cli("inspect", *arguments, "--json").json
    assert {"stale", "modes-differ"} <= {finding["fault"] for finding in found["findings"]}
    assert found["behaviour"]["top1_training"] > found["behaviour"]["top1"]
    assert found["data"]["n_examples"] == 180
    assert all(entry["mean_shift"] is not None for entry in found["layers"])
    (advice, *_) = [f["advice"] for f in found["findings"] if f["fault"] == "stale"]
    words = shlex.split(advice)
    assert words[:3] == ["bnfix", "calibrate", str(files.stale)]
    assert words[words.index("--model") + 1] == files.spec
    assert words[words.index("--data") + 1] == str(files.data)
    shown = cli("inspect", *arguments).out
    assert "top-1" in shown
    assert "deviations" in shown


def test_the_advice_of_a_finding_helps(cli, files, tmp_path):
    """The very command, run, takes the findings away."""
    found = cli("inspect", files.stale, *files.common, "--data", files.data, "--json").json
    (advice, *_) = [f["advice"] for f in found["findings"] if f["fault"] == "stale"]
    out = tmp_path / "out.safetensors"
    words = [str(out) if word == "OUT" else word for word in shlex.split(advice)]
    assert cli(*words[1:], *files.common[2:]).code == 0
    left = cli("inspect", out, *files.common, "--data", files.data, "--json").json["findings"]
    assert [f for f in left if f["fault"] in ("stale", "modes-differ")] == []


def test_inspect_refuses_what_cannot_be(cli, files):
    assert "--samples" in cli("inspect", files.net, "--samples", "1").message
    outcome = cli("inspect", files.net, "--data", files.data)
    assert "Give --model" in outcome.message


def test_a_history_is_told_as_commands(cli, files, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    convert(files.net, model=files.spec, swap=SwapRecipe(to="ghost", layers=("bn1",))).save(one)
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(labels="none", mean=(0.5,), std=(0.25,)),
        statistics=StatisticsRecipe("train-batch", train_batch_size=8),
        weight=WeightRecipe("keep"),
    )
    calibrate(one, data=str(files.data), plan=plan).save(two)
    found = cli("inspect", two, "--json").json["commands"]
    first, second = (shlex.split(entry["command"]) for entry in found)
    assert first[:3] == ["bnfix", "convert", "net.pth"]
    assert first[first.index("--to") + 1] == "ghost"
    assert first[first.index("--layers") + 1] == "bn1"
    assert "1 layers swapped" in found[0]["did"]
    assert second[:3] == ["bnfix", "calibrate", "one.safetensors"]
    for flag, value in (
        ("--statistics", "train-batch"), ("--train-batch-size", "8"), ("--labels", "none"),
        ("--mean", "0.5"), ("--example-weight", "keep"), ("--data", str(files.data)),
        ("-o", "two.safetensors"), ("--model", files.spec),
    ):  # fmt: skip
        assert second[second.index(flag) + 1] == value
    assert "history 2: bnfix calibrate one.safetensors" in cli("inspect", two).out


@pytest.mark.parametrize("command", ["convert", "calibrate", "fix", "finetune", "average"])
def test_every_flag_that_is_told_exists(command, files):
    """A recipe's field that no option sets must not be told as one."""
    odd: dict[str, Any] = {
        part: dict.fromkeys(recipe.__dataclass_fields__, "odd") for part, recipe in _RECIPES
    }
    odd["model"]["arguments"] = [["depth", 3]]
    (told,) = retell([{"command": command, "options": odd, "seed": 3}])
    known = {
        flag
        for option in typer.main.get_command(app).commands[command].params
        for flag in option.opts
    }
    flags = {word for word in shlex.split(told.command) if word.startswith("-")}
    assert flags <= known


@pytest.mark.parametrize(
    "entry", [{}, {"command": 3, "options": 4, "results": []}, {"options": {"model": [1]}}]
)
def test_a_history_of_odd_entries_is_told_without_failing(entry):
    (told,) = retell([entry])
    assert told.command.startswith("bnfix ")
    assert retell([3, None, "x"]) == []
    assert retell([{"command": "x; rm -rf /", "input": {"file": "$(touch x)"}}])[0].command == (
        "bnfix 'x; rm -rf /' '$(touch x)' -o OUT.safetensors"
    )


# --- public checkpoints ---


@needs_data
@pytest.mark.parametrize("name", ["resnet20.th", "resnet20_b.th", "resnet32.th"])
def test_nothing_is_found_where_nothing_is_wrong(name):
    assert inspect_checkpoint(DATA / "cifar10" / name).findings == []


@needs_data
def test_published_models_have_notes_at_most():
    for name, faults in (
        ("mobilenet_v2-b0353104.pth", {"dead-channels", "gamma-zero"}),
        ("efficientnet_lite0.safetensors", {"dead-channels", "counter-zero", "gamma-zero"}),
    ):
        findings = inspect_checkpoint(DATA / name).findings
        assert {finding.severity for finding in findings} <= {"note"}
        assert {finding.fault for finding in findings} <= faults
