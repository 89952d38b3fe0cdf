"""`--reference ORIGINAL`: matched statistics, a gate and fine-tuning without labels, the report."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import bnfix
from bnfix.core.errors import CheckpointError, ConfigError
from bnfix.core.settings import DataRecipe, GateRecipe, RunOptions, StatisticsRecipe
from bnfix.jobs.plan import replayed_plan
from bnfix.jobs.session import Plan
from bnfix.jobs.steps import fractions
from tests.conftest import images_of, inputs_of

CPU = RunOptions("cpu", workers=0)


@pytest.fixture
def run(cli, files, tmp_path):
    """Runs a command on the data against the network as it was; its JSON and its output."""
    counter = iter(range(100))

    def go(command, checkpoint, *words, data=None, reference=None):
        out = tmp_path / f"out{next(counter)}.safetensors"
        given = ["--data", data or files.data, *files.common, *words, "-o", out, "--json"]
        outcome = cli(command, checkpoint, "--reference", reference or files.net, *given)
        assert outcome.code == 0, outcome.err
        return outcome.json, out

    return go


def history_of(path: Path) -> dict:
    with safe_open(path, framework="pt") as file:
        return json.loads(file.metadata()["bnfix"])["history"][-1]


@pytest.fixture
def pruned(files, tmp_path):
    """Half of the weights of each convolution are 0; the statistics are those of all."""
    state = torch.load(files.net, weights_only=True)
    for weight in state.values():
        if weight.ndim == 4:
            weight[weight.abs() < weight.abs().flatten().quantile(0.5)] = 0
    torch.save(state, tmp_path / "pruned.pth")
    return tmp_path / "pruned.pth"


# --- statistics ---


@pytest.mark.parametrize("labels", ["auto", "none"])
def test_stated_statistics_are_matched_on_all_of_the_data(run, files, pruned, labels):
    words = ["--statistics", "reference", "--example-weight", "keep", "--labels", labels]
    report, out = run("calibrate", pruned, *words)
    expected, original = files.model(), files.trained()
    expected.load_state_dict(torch.load(pruned, weights_only=True))
    batches = [inputs_of(images_of(180, seed=2)[0])]
    bnfix.recalibrate_(expected, batches, target="reference", reference=original)
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, expected.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert (report["calibration"]["target"], report["calibration"]["feed"]) == (
        "reference", "sequential",
    )  # fmt: skip
    assert report["data"]["splits"] == {"fit": 180, "select": 0, "test": 0}


def test_stale_statistics_are_those_of_the_original_again(run, files):
    """Where only the statistics are wrong, any images give the right ones."""
    words = ["--statistics", "reference", "--example-weight", "keep", "--samples", "32"]
    _, out = run("calibrate", files.stale, *words)
    original = files.trained().state_dict()
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, original[name], rtol=1e-4, atol=1e-4)


def test_the_history_says_which_original(run, files, pruned):
    _, out = run("calibrate", pruned, "--statistics", "reference", "--example-weight", "keep")
    options = history_of(out)["options"]
    assert options["statistics"]["reference"] == str(files.net)
    assert options["reference"]["file"] == "net.pth"
    assert len(options["reference"]["sha256"]) == 64


def test_a_long_run_goes_on_with_the_same_original_only(run, cli, files, pruned, tmp_path):
    words = ["--statistics", "reference", "--example-weight", "keep", "--state", tmp_path / "state"]
    _, first = run("calibrate", pruned, *words)
    _, again = run("calibrate", pruned, *words)
    assert all(torch.equal(t, load_file(again)[n]) for n, t in load_file(first).items())


# --- the gate without labels ---


def test_without_labels_the_reference_judges_and_proves(run, files):
    report, out = run("fix", files.stale, "--labels", "none", "--z", "1")
    assert report["data"]["splits"] == {"fit": 108, "select": 36, "test": 36}
    assert [d["candidate"] for d in report["decisions"]] == [
        "statistics of the data (population)", "statistics between stored and measured",
        "statistics matched to the reference", "distilled norms+head alone", "distilled norms+head",
    ]  # fmt: skip
    assert all(d["by_reference"] for d in report["decisions"])
    assert any(d["admitted"] for d in report["decisions"])
    assert report["verdict"] is None
    assert report["agreement_verdict"] == "better"
    before, after = report["models"]
    assert after["top1"] is None
    assert after["agreement"] > before["agreement"]
    assert after["divergence"] < before["divergence"]
    low, high = after["interval"]["agreement"]
    assert low <= after["agreement"] <= high
    (pair,) = report["paired"]
    assert pair["verdict"] is None
    change = pair["agreement"]["difference"]
    assert change == pytest.approx(after["agreement"] - before["agreement"])
    sentence = report["verdict_sentence"]
    assert sentence.startswith("Closer to the reference: ")
    assert "Without labels, the fraction of right answers is unknown." in sentence
    assert history_of(out)["results"]["agreement"] == after["agreement"]
    for kind in ("md", "html"):
        page = out.with_name(f"{out.name}.report.{kind}").read_text()
        assert "Agreement with the reference" in page
        assert "KL" in page


def test_divergence_and_agreement_are_those_by_hand(run, files):
    report, _ = run("fix", files.stale, "--labels", "none", "--test", files.test)
    x = inputs_of(images_of(120, seed=3)[0])
    own = files.model()
    own.load_state_dict(torch.load(files.stale, weights_only=True))
    with torch.no_grad():
        p, q = (m.eval()(x).double().log_softmax(1) for m in (files.trained(), own))
    before = report["models"][0]
    assert before["divergence"] == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert before["agreement"] == pytest.approx(float((p.argmax(1) == q.argmax(1)).float().mean()))


def test_the_original_itself_is_left_as_it_is(run, files):
    report, out = run("fix", files.net, "--labels", "none")
    assert not any(d["admitted"] for d in report["decisions"])
    original = files.trained().state_dict()
    assert all(torch.equal(t, original[n]) for n, t in load_file(out).items())
    assert report["models"][-1]["agreement"] == 1.0
    assert report["models"][-1]["divergence"] == 0.0
    assert "No measurable difference in closeness" in report["verdict_sentence"]


def test_with_labels_the_gate_is_theirs_and_agreement_stands_beside(run, files):
    report, _ = run("calibrate", files.stale, "--example-weight", "keep", "--z", "1")
    names = [d["candidate"] for d in report["decisions"]]
    assert names == [
        "statistics of the data (population)",
        "statistics matched to the reference",
        "one mixture of statistics",
        "mixture of statistics per layer",
    ]
    assert not any(d["by_reference"] for d in report["decisions"])
    assert report["verdict"] is not None
    assert report["models"][-1]["top1"] is not None
    assert report["models"][-1]["agreement"] is not None
    assert "The same class as the reference on " in report["verdict_sentence"]


def test_a_labelled_test_proves_what_was_chosen_without_labels(run, files):
    words = ["--test", files.test, "--example-weight", "keep", "--z", "1"]
    report, _ = run("calibrate", files.stale, *words, data=files.flat)
    assert all(d["by_reference"] for d in report["decisions"])
    assert report["verdict"] in ("better", "same")


def test_without_a_reference_nothing_is_chosen_without_labels(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--data", files.data, *files.common, "--labels", "none", "-o", out, "--json"]
    outcome = cli("fix", files.stale, *words)
    assert outcome.json["decisions"] == []
    assert "agreement" not in outcome.json["models"]
    assert any("--reference CKPT" in note for note in outcome.json["assumptions"])


@pytest.mark.parametrize(
    ("reference", "expected"),
    [(None, (1.0, 0.0, 0.0)), ("net.pth", (0.6, 0.2, 0.2))],
)
def test_the_data_are_cut_as_labelled_ones_are(reference, expected):
    plan = Plan(
        source=DataRecipe(labels="none"), statistics=StatisticsRecipe(reference=reference),
        gate=GateRecipe(),
    )  # fmt: skip
    assert fractions(plan) == pytest.approx(expected)


# --- distillation ---


@pytest.mark.parametrize("train", ["norms", "norms+head", "all"])
def test_finetune_learns_from_the_reference(run, files, pruned, train):
    words = ["--labels", "none", "--train", train, "--epochs", "3", "--lr", "0.003"]
    report, out = run("finetune", pruned, *words)
    (curve,) = report["training_curve"]
    assert curve["best_epoch"] > 0
    nll = [point["nll"] for point in curve["curve"]]
    assert min(nll) < nll[0]
    assert report["models"][-1]["divergence"] < report["models"][0]["divergence"]
    weights = load_file(out)["conv2.weight"]
    same = torch.equal(weights, torch.load(pruned, weights_only=True)["conv2.weight"])
    assert same == (train != "all")


def test_example_weights_are_learned_along_the_way(run, files, pruned):
    words = ["--labels", "none", "--example-weight", "learn", "--epochs", "2"]
    report, _ = run("finetune", pruned, *words, "--label-smoothing", "0.1")
    assert any("no labels to smooth" in note for note in report["assumptions"])
    assert report["training_curve"][0]["trained"] == "norms and example weights"


def test_labels_are_learned_where_there_are_some_and_a_note_says_so(run, pruned):
    report, _ = run("finetune", pruned, "--epochs", "1")
    assert any(
        "fine-tuning used the labels, not the reference" in note for note in report["assumptions"]
    )
    assert report["models"][-1]["agreement"] is not None


# --- refusals, plans, recipes ---


def test_another_network_is_refused_with_its_keys(cli, files, pruned, tmp_path):
    wide = tmp_path / "wide.pth"
    state = torch.load(files.net, weights_only=True)
    state["conv1.weight"] = torch.zeros(7, 3, 3, 3)
    state["more.weight"] = torch.zeros(1)
    del state["fc.bias"]
    torch.save(state, wide)
    out = tmp_path / "out.safetensors"
    words = ["--data", files.data, *files.common, "-o", out, "--labels", "none"]
    outcome = cli("fix", pruned, *words, "--reference", wide)
    assert outcome.code == 1
    for key in ("conv1.weight: (7, 3, 3, 3)", "more.weight: not in the model", "fc.bias: missing"):
        assert key in outcome.message
    assert "give the network that pruned.pth was made from" in outcome.message
    assert not out.exists()


def test_a_model_of_its_own_is_built_and_compared(cli, files, pruned, tmp_path):
    own = files.spec.replace(":build", ":wide")
    names: dict = {}
    exec(compile(files.folder.joinpath("nets.py").read_text(), "nets.py", "exec"), names)
    torch.save(names["wide"]().state_dict(), tmp_path / "wide.pth")
    words = ["--data", files.data, *files.common, "-o", tmp_path / "out.safetensors"]
    words += ["--reference", tmp_path / "wide.pth", "--reference-model", own]
    outcome = cli("calibrate", pruned, *words)
    assert outcome.code == 1
    assert "is another network than the checkpoint" in outcome.message
    for name in ("conv1.weight", "bn1.running_mean", "conv2.weight"):
        assert name in outcome.message


def test_what_is_missing_is_named(files, tmp_path):
    for options in ({"statistics": "reference"}, {"reference_model": "a:b"}):
        with pytest.raises(ConfigError, match="Give --reference CKPT"):
            StatisticsRecipe(**options)
    statistics = StatisticsRecipe(reference=str(tmp_path / "none.pth"))
    plan = Plan(statistics=statistics, run=CPU)
    with pytest.raises(CheckpointError, match=r"none\.pth"):
        bnfix.fix(files.net, data=str(files.data), model=files.spec, plan=plan)


def test_the_plan_names_the_reference_and_its_candidates(cli, files, pruned, tmp_path):
    words = [
        "--data",
        files.data,
        *files.common,
        "-o",
        tmp_path / "o.safetensors",
        "--labels",
        "none",
    ]
    outcome = cli("fix", pruned, *words, "--reference", files.net, "--plan", "--json")
    plan = outcome.json
    assert plan["reference"] == str(files.net)
    kinds = ("(population", "(reference, sequential", "distilling (norms+head) alone")
    for kind in kinds:
        assert any(kind in stage for stage in plan["stages"])
    assert not (tmp_path / "o.safetensors").exists()


def test_a_recipe_is_replayed_with_its_reference_or_another(run, cli, files, pruned, tmp_path):
    words = ["--statistics", "reference", "--example-weight", "keep", "--labels", "none"]
    _, out = run("calibrate", pruned, *words)
    again = tmp_path / "again.safetensors"
    given = ["--model", files.spec, "--data", files.data, "--recipe", out, "-o", again, "--json"]
    assert cli("fix", pruned, *given).code == 0
    assert all(torch.equal(t, load_file(out)[n]) for n, t in load_file(again).items())
    other = tmp_path / "other.pth"
    state = torch.load(files.net, weights_only=True)
    state["bn1.running_var"] *= 2
    torch.save(state, other)
    assert cli("fix", pruned, *given, "--reference", other, "--force").code == 0
    assert history_of(again)["options"]["reference"]["file"] == "other.pth"


def test_code_that_a_recipe_names_for_the_reference_is_not_run(run, files, pruned):
    words = ["--statistics", "reference", "--example-weight", "keep"]
    _, out = run("calibrate", pruned, *words, "--reference-model", files.spec)
    assert history_of(out)["options"]["statistics"]["reference_model"] == files.spec
    assert replayed_plan(out, run=CPU).statistics.reference_model is None
