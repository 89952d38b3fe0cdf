"""The candidates of one command: each judged against the one that stands, and only it kept."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bnfix
from bnfix.core.settings import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    WeightRecipe,
)
from bnfix.jobs.session import Plan
from bnfix.metrics.compare import Decision
from bnfix.report.result import Result
from tests.conftest import images_of, inputs_of

TUNED = FinetuneRecipe(train="norms+head", example_weight="learn", epochs=1, lr=0.01)
POPULATION = StatisticsRecipe("population", batch_size=180)
KEPT = {"statistics": StatisticsRecipe("keep"), "gate": GateRecipe(z=0.0)}


def fixed(files, checkpoint, data=None, command="fix", **settings: Any) -> Result:
    plan = Plan(
        command=command,
        model=ModelRecipe(files.spec),
        source=DataRecipe(mean=(0.5,), std=(0.25,), test=str(files.test)),
        run=RunOptions("cpu", workers=0),
        **{"finetune": TUNED, **settings},
    )
    return getattr(bnfix, command)(checkpoint, data=str(data or files.data), plan=plan)


def flipped(path: Path) -> Path:
    """The data with every label moved on by one: what is learned there is wrong elsewhere."""
    images, labels = images_of(180, seed=2)
    np.savez(path, images=images, labels=(labels + 1) % 3)
    return path


# --- the table ---


@pytest.mark.parametrize("z", [0.0, 2.0, 1000.0])
def test_every_candidate_is_judged_against_the_last_one_admitted(files, z):
    statistics = StatisticsRecipe(train_batch_size=4)
    weight = WeightRecipe(granularity="layer")
    found = fixed(files, files.stale, statistics=statistics, weight=weight, gate=GateRecipe(z))
    table = found.report.decisions
    expected = ["statistics of the data (population)", "statistics of the data (train-batch 4)"]
    assert [d.candidate for d in table[:2]] == expected
    mixtures = ["one mixture of statistics", "mixture of statistics per layer"]
    assert [d.candidate for d in table[2:4]] == mixtures
    assert table[4].candidate == "match (statistics train-batch 4, example weight 0.25)"
    assert [d.stage for d in table[:6]] == ["statistics"] * 5 + ["fine-tuning"]
    assert {d.stage for d in table[6:]} == {"example weight", "fine-tuning"}
    standing: Decision | None = None
    for d in table:
        if standing is None:
            assert d.incumbent == "as it was"
            assert d.incumbent_nll == table[0].incumbent_nll
        else:
            assert (d.incumbent, d.incumbent_nll) == (standing.candidate, standing.nll)
            assert d.incumbent_top1 == standing.top1
        assert d.nll_difference == pytest.approx(d.nll - d.incumbent_nll, abs=1e-9)
        standing = d if d.admitted else standing
    assert bool(standing) == (z < 1000)
    name = "as it was" if standing is None else standing.candidate
    assert found.report.models[1].name == f"output: {name}"


def test_example_weights_are_chosen_on_the_network_before_fine_tuning(files):
    """So their losses are the same whether fine-tuning was tried before them or not."""
    tuned = fixed(files, files.stale, **KEPT).report.decisions
    alone = fixed(files, files.stale, finetune=None, **KEPT).report.decisions
    assert any(d.admitted for d in tuned if d.candidate == "fine-tuned norms+head")
    losses = [[d.nll for d in one if d.stage == "example weight"] for one in (tuned, alone)]
    assert losses[0] == losses[1]
    assert len(losses[0]) > 1


def test_example_weights_are_chosen_on_the_statistics_that_were_kept(files):
    """So their losses are the same whether these statistics were a candidate or stated."""
    weight = WeightRecipe(granularity="global")
    found = [
        fixed(files, files.stale, finetune=None, statistics=statistics, weight=weight)
        for statistics in (StatisticsRecipe(batch_size=180), POPULATION)
    ]
    tables = [one.report.decisions for one in found]
    assert tables[0][0].admitted
    assert tables[0][-1].nll == tables[1][-1].nll


def test_trained_statistics_are_what_example_weights_are_chosen_on(files):
    """Fine-tuning in training mode changes the statistics, so the choice starts from its result."""
    recipe = dataclasses.replace(TUNED, statistics="train", example_weight="keep")
    tuned = fixed(files, files.stale, finetune=recipe, **KEPT).report.decisions
    assert next(d for d in tuned if d.stage == "fine-tuning").admitted
    first = next(d for d in tuned if d.stage == "example weight")
    alone = fixed(files, files.stale, finetune=None, **KEPT).report.decisions
    assert first.nll != next(d for d in alone if d.stage == "example weight").nll


# --- what the report credits ---


def test_what_was_refused_is_said_and_credited_to_no_layer(files, tmp_path):
    found = fixed(files, files.stale, gate=GateRecipe(z=1000.0))
    report, original = found.report.to_json(), torch.load(files.stale, weights_only=True)
    state = found.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())
    assert report["calibration"] is None
    assert [one["target"] for one in report["calibrations_refused"]] == ["population"]
    assert all(layer["mean_se"] is layer["var_se"] is None for layer in report["layers"])
    assert {layer["mean_shift"] for layer in report["layers"]} == {0.0}
    assert [run["kept"] for run in report["training_curve"]] == [False, False]
    assert report["choice"]["kept"] is False
    for text in (found.report.to_markdown(), found.report.to_html()):
        for line in text.splitlines():
            if "Running statistics (" in line or ": epoch" in line:
                assert "does not contain this result" in line


def test_what_was_kept_is_credited(files):
    found = fixed(files, files.stale, command="calibrate", weight=WeightRecipe("keep"))
    report = found.report.to_json()
    assert report["calibration"]["target"] == "population"
    assert report["calibrations_refused"] == []
    assert all(layer["mean_se"] > 0 for layer in report["layers"])
    assert "does not hold" not in found.report.to_markdown()


@pytest.mark.parametrize("lr", [1e-3, 30.0])
def test_statistics_of_an_epoch_count_only_if_that_epoch_was_kept(files, lr):
    recipe = FinetuneRecipe(train="all", statistics="train", epochs=2, lr=lr)
    found = fixed(files, files.stale, command="finetune", finetune=recipe)
    (run,) = found.report.trials.finetunings
    kept = found.report.trials.calibration
    assert (kept is not None) == bool(run.best_epoch) == (lr < 1)
    if kept is not None:
        batches = [inputs_of(images_of(180, seed=2)[0])]
        residual = [layer.residual for layer in found.report.layers]
        assert max(residual) < 0.2, (residual, batches)


# --- worse on test ---


def half(files, path: Path) -> Path:
    state = torch.load(files.net, weights_only=True)
    save_file({n: t.half() if t.is_floating_point() else t for n, t in state.items()}, path)
    return path


@pytest.mark.parametrize("wrong", [False, True])
@pytest.mark.parametrize("statistics", ["auto", "population"])
def test_the_claim_on_a_half_precision_file_is_what_eval_measures(
    files, cli, tmp_path, statistics, wrong
):
    """Also where the output turned out worse on test, and what was stated took its place."""
    data = flipped(tmp_path / "flipped.npz") if wrong else files.data
    out, checkpoint = tmp_path / "out.safetensors", half(files, tmp_path / "half.safetensors")
    words = ["--statistics", statistics, "--train", "norms+head", "--epochs", 6, "--lr", 0.02]
    told = cli(
        "fix", checkpoint, "--data", data, "--test", files.test, *files.common, *words,
        "--json", "-o", out,
    ).json  # fmt: skip
    put_back = "significantly worse on the test split" in " ".join(told["assumptions"])
    assert put_back == wrong
    if wrong:
        expected = "as it was" if statistics == "auto" else "statistics of the data (population)"
        assert told["models"][1]["name"] == f"output: {expected}"
        assert all(run["kept"] is False for run in told["training_curve"])
    measured = cli("eval", checkpoint, out, "--data", files.test, *files.common, "--json").json
    for claimed, again in zip(told["models"], measured["models"], strict=True):
        assert again["nll"] == pytest.approx(claimed["nll"], rel=1e-7)


# --- one position a map ---


def test_layers_of_a_single_position_keep_weight_0_where_a_network_becomes_group_norm(
    files, cli, tmp_path
):
    (tmp_path / "gated.py").write_text(
        (files.folder / "nets.py").read_text() + "\nclass Gated(Net):\n"
        "    def __init__(self):\n"
        "        super().__init__(3)\n"
        "        self.squeezed = nn.BatchNorm2d(12)\n"
        "    def forward(self, x):\n"
        "        x = torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))\n"
        "        return self.fc(self.squeezed(x.mean((2, 3), keepdim=True)).flatten(1))\n"
    )
    state = torch.load(files.net, weights_only=True)
    state |= {f"squeezed.{k}": v for k, v in torch.nn.BatchNorm2d(12).state_dict().items()}
    torch.save(state, tmp_path / "gated.pth")
    out = tmp_path / "out.safetensors"
    words = ["--to", "group", "--epochs", 1, "--train", "norms"]
    found = cli(
        "finetune", tmp_path / "gated.pth", "--data", files.data, *files.common,
        "--model", f"{tmp_path / 'gated.py'}:Gated", *words, "--json", "-o", out,
    ).json  # fmt: skip
    with safe_open(out, framework="pt") as file:
        norms = json.loads(file.metadata()["bnfix"])["norms"]
    assert {name: norm["example_weight"] for name, norm in norms.items()} == {
        "bn1": 1.0, "bn2": 1.0, "squeezed": 0.0,
    }  # fmt: skip
    assert "example weight 0 for 1 layer with a single position per map." in found["assumptions"]


# --- how far outputs moved ---


def test_a_change_without_labels_says_how_far_it_moved_the_outputs(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--statistics", "population", "--example-weight", "keep", "--labels", "none"]
    given = ["--data", files.data, *files.common, *words]
    told = cli("calibrate", files.stale, *given, "-o", out, "--json").json
    moved = told["outputs_moved"]
    model = files.model().eval()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    x = inputs_of(images_of(180, seed=2)[0])
    with torch.no_grad():
        before, after = model(x), bnfix.load(out, model=files.model())(x)
    assert moved["n"] == 180
    expected = (after - before).square().mean().sqrt() / before.square().mean().sqrt()
    assert moved["relative_rms"] == pytest.approx(float(expected), rel=1e-4)
    changed = (before.argmax(1) != after.argmax(1)).double().mean()
    assert moved["top1_changed"] == pytest.approx(float(changed))
    assert "Warning: this is a large change" in told["verdict_sentence"]
    page = Path(f"{out}.report.html").read_text()
    assert "Warning: this is a large change" in page
    shown = cli("calibrate", files.stale, *given, "-o", out, "--force")
    assert "Warning: this is a large change" in shown.out


def test_no_change_is_no_movement(files):
    keep = {"statistics": StatisticsRecipe("keep"), "weight": WeightRecipe("keep")}
    found = fixed(files, files.net, command="calibrate", **keep)
    assert found.report.moved is not None
    assert dataclasses.astuple(found.report.moved) == (0.0, 0.0, 180)
    assert "The outputs did not change on 180 images." in found.report.verdict_sentence()


def test_a_large_change_that_is_proven_better_is_no_warning(files):
    found = fixed(files, files.stale, command="calibrate", statistics=POPULATION)
    assert found.report.verdict == "better"
    assert found.report.moved is not None
    assert found.report.moved.is_large
    assert "Warning" not in found.report.verdict_sentence()


# --- an original that cannot be evaluated ---


def broken(files, path: Path) -> Path:
    state = torch.load(files.net, weights_only=True)
    state["bn1.running_var"][0] = float("nan")
    torch.save(state, path)
    return path


@pytest.mark.parametrize("command", ["fix", "calibrate"])
def test_an_original_without_finite_outputs_loses_to_what_is_finite(files, tmp_path, command):
    found = fixed(files, broken(files, tmp_path / "broken.pth"), command=command)
    report = found.report.to_json()
    assert report["verdict"] == "better"
    assert report["decisions"][0]["admitted"]
    assert "cannot be evaluated" in report["decisions"][0]["reason"]
    assert "cannot be evaluated: its logits are not finite" in report["verdict_sentence"]
    assert report["models"][0]["top1"] is None
    assert report["models"][1]["top1"] > 0.5
    assert report["outputs_moved"]["relative_rms"] is None


def test_where_nothing_helps_a_broken_network_stays_and_the_report_says_so(files, cli, tmp_path):
    state = torch.load(files.net, weights_only=True)
    state["fc.bias"][0] = float("nan")
    torch.save(state, tmp_path / "broken.pth")
    found = fixed(files, tmp_path / "broken.pth")
    assert found.report.verdict == "same"
    assert not any(d.admitted for d in found.report.decisions)
    assert "cannot be evaluated" in found.report.verdict_sentence()


def test_the_mean_of_a_broken_checkpoint_and_another_has_statistics_of_its_own(
    files, cli, tmp_path
):
    out = tmp_path / "out.safetensors"
    found = cli(
        "average", broken(files, tmp_path / "broken.pth"), files.net, "--data", files.data,
        *files.common, "--json", "-o", out,
    ).json  # fmt: skip
    assert found["verdict"] == "better"
    assert all(bool(t.isfinite().all()) for t in load_file(out).values())


# --- the state of another run ---


@pytest.mark.parametrize(
    "other", [["--corrupt", "noise:3"], ["--resize", "9"], ["--seed", "1"]], ids=str
)
def test_a_state_is_not_taken_over_by_a_run_on_other_inputs(files, cli, tmp_path, other):
    words = ["--statistics", "population", "--example-weight", "keep", "--json", *files.common]
    given = ["calibrate", files.net, "--data", files.data, *words]
    outs = [tmp_path / f"{k}.safetensors" for k in range(3)]
    state = ["--state", tmp_path / "state"]
    cli(*given, *state, "-o", outs[0])
    mine = cli(*given, *state, *other, "-o", outs[1]).json
    cli(*given, *other, "-o", outs[2])
    assert mine["calibration"]["n_resumed"] == 0
    a, b = load_file(outs[1]), load_file(outs[2])
    assert all(torch.equal(tensor, b[name]) for name, tensor in a.items())
    again = cli(*given, *state, "-o", outs[0], "--force").json
    assert again["calibration"]["n_resumed"] == 180


def test_fine_tuning_refuses_the_state_of_a_run_on_other_inputs(files, cli, tmp_path):
    given = ["finetune", files.net, "--data", files.data, *files.common, "--epochs", "1"]
    state = ["--state", tmp_path / "state", "-o", tmp_path / "o.safetensors"]
    assert cli(*given, *state).code == 0
    outcome = cli(*given, "--corrupt", "noise:3", *state, "--force")
    assert outcome.code == 1
    assert "is the state of another run" in outcome.message


# --- the training that won, once more on all images ---


@pytest.mark.parametrize("own", [False, True])
def test_the_training_that_won_is_done_again_on_all_images(files, tmp_path, own):
    """Steps are counted: 64 images each. Of 180, 108 are learned first; all afterwards."""
    other = tmp_path / "select.npz"
    images, labels = images_of(60, seed=5)
    np.savez(other, images=images, labels=labels)
    gate = GateRecipe(z=0.0, select=str(other) if own else 0.2)
    settings = {"statistics": StatisticsRecipe("keep"), "weight": WeightRecipe("keep")}
    once = fixed(files, files.stale, gate=gate, **settings)
    recipe = dataclasses.replace(TUNED, refit=True)
    again = fixed(files, files.stale, gate=gate, finetune=recipe, **settings)
    assert [vars(d) for d in again.report.decisions] == [vars(d) for d in once.report.decisions]
    won = once.report.decisions[-1].candidate
    assert once.report.decisions[-1].admitted
    assert again.report.models[1].name == f"output: {won}, again on all images"
    runs = again.report.trials.finetunings
    assert [run.n_steps for run in runs] == [3 if own else 2, 3]
    (note,) = [note for note in again.report.assumptions if note.startswith("--refit:")]
    assert "on all 180 images" in note
    assert again.report.to_json()["options"]["finetune"]["refit"]
    first, second = (one.model.state_dict() for one in (once, again))
    assert not all(torch.equal(first[name], second[name]) for name in first)


def test_where_no_training_wins_none_is_done_again(files):
    recipe = dataclasses.replace(TUNED, refit=True)
    found = fixed(files, files.stale, finetune=recipe, gate=GateRecipe(z=1000.0))
    assert len(found.report.trials.finetunings) == 2
    assert not any(note.startswith("--refit") for note in found.report.assumptions)
    original = torch.load(files.stale, weights_only=True)
    state = found.model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in original.items())


def test_a_training_that_got_worse_is_not_done_again(files):
    """The rate that made its last epoch worse would do the same to more images."""
    recipe = dataclasses.replace(TUNED, refit=True, epochs=6, lr=0.1, example_weight="keep")
    found = fixed(files, files.stale, finetune=recipe, weight=WeightRecipe("keep"), **KEPT)
    (run, *_) = found.report.trials.finetunings
    assert 0 < run.best_epoch < len(run.curve) - 1
    assert len(found.report.trials.finetunings) == 1
    assert any("best before its last epoch" in note for note in found.report.assumptions)


def test_the_plan_says_that_training_may_be_done_again(files, tmp_path, cli):
    words = ("--model", files.spec, "--data", files.data, "-o", tmp_path / "o.safetensors")
    for more in ((), ("--refit",), ("--no-refit",)):
        done = cli("fix", files.stale, *words, *more, "--plan", "--json")
        assert done.code == 0, done.err
        stages = json.loads(done.out)["stages"]
        assert any("again on fit and select" in stage for stage in stages) == (
            "--no-refit" not in more
        )
