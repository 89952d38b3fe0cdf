"""The mean of weights: the numbers, the refusals, and the command as a user runs it."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bnfix
from bnfix.checkpoints.load import load_ready
from bnfix.checkpoints.several import Ingredients, best_of, matching, mean_of
from bnfix.core.errors import CheckpointError, ConfigError, NumericError
from bnfix.core.settings import AverageRecipe, ModelRecipe
from tests import nets
from tests.conftest import images_of, inputs_of


def perturbed(net, seed, spread=0.05):
    """A copy with noise on its weights, as of another run from the same start."""
    net = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(spread * torch.randn(p.shape, generator=generator))
    return net


def some_states(n=3):
    return [nets.lived_in(nets.plain(), seed=i).state_dict() for i in range(n)]


def expected_mean(states, weights):
    """In numpy, float64."""
    weights = np.asarray(weights, np.float64) / np.sum(weights)
    return {
        name: sum(
            w * s[name].double().numpy() for w, s in zip(weights, states, strict=True)
        )
        for name in states[0]
    }  # fmt: skip


# --- the numbers ---


@pytest.mark.parametrize("weights", [(), (1, 1, 2), (0.1, 5, 3)])
def test_the_mean_is_numpys(weights):
    states = some_states()
    expected = expected_mean(states, weights or (1, 1, 1))
    for name, tensor in mean_of(states, weights).items():
        if tensor.is_floating_point():
            np.testing.assert_allclose(tensor.double(), expected[name], rtol=1e-6, atol=1e-8)


def test_types_and_integers_are_those_of_the_first():
    first = {"w": torch.tensor([1.0]).half(), "n": torch.tensor(3), "b": torch.tensor([True])}
    other = {"w": torch.tensor([2.0]).double(), "n": torch.tensor(9), "b": torch.tensor([False])}
    mean = mean_of([first, other])
    assert mean["w"].dtype == torch.float16
    assert (mean["w"].item(), mean["n"].item(), mean["b"].item()) == (1.5, 3, True)


def test_sums_are_taken_in_float64():
    """In float16 the sum of the two would overflow, in float32 2**-25 would be lost before it."""
    states = [{"w": torch.tensor([v]).half()} for v in (60000.0, 60000.0)]
    assert mean_of(states)["w"].item() == 60000
    near = [{"w": torch.tensor([v])} for v in (1.0, 1.0 + 2**-23, 1.0 + 2**-23)]
    assert mean_of(near)["w"].item() == 1.0 + 2**-23


def test_a_mean_that_is_not_finite_is_refused():
    states = some_states(2)
    states[1]["conv2.weight"][0, 0, 0, 0] = float("nan")
    with pytest.raises(NumericError, match=r"^conv2\.weight: the mean of the checkpoints is not"):
        mean_of(states)


@pytest.mark.parametrize(
    ("files", "weights", "found"),
    [
        ((), (), "average: 1 checkpoint, expected at least 2"),
        (("b",), (1.0,), "--weights: 1 numbers for 2 checkpoints"),
        (("b",), (1.0, 0.0), r"--weights: 1\.0, 0\.0, expected numbers above 0"),
        (("b",), (1.0, float("nan")), r"--weights: 1\.0, nan, expected numbers above 0"),
    ],
)
def test_recipes_out_of_range_are_refused(files, weights, found):
    with pytest.raises(ConfigError, match=found):
        AverageRecipe(files, weights)


@pytest.mark.parametrize(
    ("how", "found"),
    [
        ({"method": "best"}, "--method: 'best' is not known. Use one of: uniform, greedy"),
        ({"statistics": "keep"}, "--statistics: 'keep' is not known. Use one of: auto, population"),
        ({"best": 1}, "--best: 1, expected 2 to 3, of 3 files"),
        ({"best": 4}, "--best: 4, expected 2 to 3, of 3 files"),
        (
            {"best": 2, "weights": (1.0, 1.0, 2.0)},
            "--weights: --best decides the order of the files",
        ),
    ],
)
def test_ways_that_there_are_not_are_refused(how, found):
    with pytest.raises(ConfigError, match=found):
        AverageRecipe(("b", "c"), **how)


# --- into a model ---


def written(net, path):
    save_file(net.state_dict(), path)
    return path


def loaded(path):
    return load_ready(path, model=nets.plain())


def average_into_(into, recipe):
    """Put the mean of all into a loaded model; the record of each, and notes."""
    found = Ingredients(into.model, into.checkpoint, recipe, ModelRecipe())
    found.put_(found.which)
    return found.records(), found.notes


def test_the_model_gets_the_mean_and_the_files_are_recorded(tmp_path):
    own = [nets.lived_in(nets.plain(), seed=i) for i in range(2)]
    paths = [written(net, tmp_path / f"{i}.safetensors") for i, net in enumerate(own)]
    first = loaded(paths[0])
    records, notes = average_into_(first, AverageRecipe((str(paths[1]),), (1, 3)))
    expected = expected_mean([net.state_dict() for net in own], (1, 3))
    for name, tensor in first.model.state_dict().items():
        wanted = expected[name] if tensor.is_floating_point() else own[0].state_dict()[name]
        np.testing.assert_allclose(tensor, wanted, rtol=1e-6, atol=1e-8)
    assert [(r["file"], r["weight"]) for r in records] == [
        ("0.safetensors", 1),
        ("1.safetensors", 3),
    ]
    assert len({r["sha256"] for r in records}) == 2
    assert notes == []


def test_one_file_twice_is_said(tmp_path):
    path = written(nets.plain(), tmp_path / "a.safetensors")
    _, notes = average_into_(loaded(path), AverageRecipe((str(path),)))
    assert notes == ["2 files were averaged, but some are copies. Without copies: a.safetensors."]


def test_other_prefixes_are_found(tmp_path):
    first, other = nets.plain(), nets.lived_in(nets.plain())
    paths = [written(first, tmp_path / "a.safetensors"), tmp_path / "b.pth"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, paths[1])
    into = loaded(paths[0])
    average_into_(into, AverageRecipe((str(paths[1]),)))
    expected = (first.bn1.running_mean + other.bn1.running_mean) / 2
    torch.testing.assert_close(into.model.bn1.running_mean, expected)


@pytest.mark.parametrize("lacking", ["num_batches_tracked", "running"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_order_does_not_matter_where_one_lacks_counters_or_statistics(tmp_path, lacking, order):
    own = [nets.lived_in(nets.plain(), seed=i).state_dict() for i in range(2)]
    own[1] = {n: t for n, t in own[1].items() if lacking not in n and "batches" not in n}
    paths = [str(tmp_path / f"{i}.pth") for i in order]
    for i, path in zip(order, paths, strict=True):
        torch.save(own[i], path)
    into = load_ready(paths[0], model=nets.plain(), lenders=paths[1:])
    average_into_(into, AverageRecipe((paths[1],)))
    found = into.model.state_dict()
    torch.testing.assert_close(
        found["conv1.weight"], (own[0]["conv1.weight"] + own[1]["conv1.weight"]) / 2
    )
    if lacking == "running":
        torch.testing.assert_close(found["bn1.running_var"], own[0]["bn1.running_var"])
    assert found["bn1.num_batches_tracked"] == own[0]["bn1.num_batches_tracked"]


def test_all_misfits_of_all_files_are_told_at_once_and_nothing_changes(tmp_path):
    a = written(nets.plain(), tmp_path / "a.safetensors")
    b = written(nets.plain(channels=6), tmp_path / "b.safetensors")
    c = written(nets.residual(), tmp_path / "c.safetensors")
    into = loaded(a)
    before = {name: t.clone() for name, t in into.model.state_dict().items()}
    recipe = AverageRecipe((str(b), str(c), str(tmp_path / "missing.pth")))
    with pytest.raises(CheckpointError, match=rf"^{a}: 3 of the other files") as caught:
        average_into_(into, recipe)
    for part in ("b.safetensors: ", "bn1.bias: (6,) in the file", "c.safetensors: ", "missing.pth"):
        assert part in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in into.model.state_dict().items())


# --- the command ---

MEAN = "mean of 2 checkpoints, statistics of the data (population)"


@pytest.fixture
def two(files, tmp_path):
    """Two copies of a trained network, each perturbed differently."""
    nets_of = [perturbed(files.trained(), seed) for seed in (1, 2)]
    return nets_of, [written(n, tmp_path / f"{i}.safetensors") for i, n in enumerate(nets_of)]


def test_mean_then_statistics(cli, files, two, tmp_path):
    own, paths = two
    out = tmp_path / "out.safetensors"
    words = [*paths, "--weights", "1,3", "--labels", "none", "--data", files.data, *files.common]
    outcome = cli("average", *words, "--batch-size", "180", "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    expected = copy.deepcopy(own[0])
    mean = expected_mean([n.state_dict() for n in own], (1, 3))
    expected.load_state_dict(
        {k: torch.tensor(v).to(expected.state_dict()[k]) for k, v in mean.items()}
    )
    bnfix.recalibrate_(expected, [inputs_of(images_of(180, seed=2)[0])])
    state = expected.state_dict()
    for name, tensor in load_file(out).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(tensor, own[0].state_dict()[name])
    with safe_open(out, framework="pt") as file:
        entry = json.loads(file.metadata()["bnfix"])["history"][-1]
    assert entry["command"] == "average"
    assert [a["weight"] for a in entry["options"]["average"]] == [1, 3]
    assert entry["results"]["output"] == MEAN
    assert outcome.json["data"]["splits"] == {"fit": 180, "select": 0, "test": 0}


def test_labelled_data_keeps_a_fifth_to_measure_on(cli, files, two, tmp_path):
    _, paths = two
    words = ["average", *paths, "--data", files.data, *files.common, "--statistics", "population"]
    outcome = cli(*words, "-o", tmp_path / "out.safetensors", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    splits = found["data"]["splits"]
    assert (splits["fit"] + splits["test"], splits["select"]) == (180, 0)
    assert splits["test"] == pytest.approx(36, abs=2)
    assert [m["name"] for m in found["models"]] == ["as it was", f"output: {MEAN}"]
    assert found["calibration"]["n_examples"] == splits["fit"]
    assert found["models"][0]["sha256"] is not None
    assert found["verdict"] in ("better", "same", "worse")


def test_the_plan_names_the_mean_and_writes_nothing(cli, files, two, tmp_path):
    _, paths = two
    out = tmp_path / "out.safetensors"
    words = ["average", *paths, "--data", files.data, *files.common, "-o", out, "--plan", "--json"]
    stages = cli(*words).json["stages"]
    assert stages[0] == "mean of 2 checkpoints"
    assert stages[1].startswith("population statistics")
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "found"),
    [
        (["--weights", "1"], "--weights: 1 numbers for 2 checkpoints"),
        (["--weights", "1,x"], "--weights: '1,x', expected a number"),
    ],
)
def test_wrong_weights_are_stated(cli, files, two, tmp_path, more, found):
    _, paths = two
    out = tmp_path / "out.safetensors"
    outcome = cli("average", *paths, *more, "--data", files.data, *files.common, "-o", out)
    assert outcome.code == 2
    assert found in " ".join(outcome.err.split())
    assert not out.exists()


# --- statistics between those of the checkpoints ---


def test_labels_choose_between_the_statistics_on_a_part_of_their_own(cli, files, two, tmp_path):
    _, paths = two
    words = ["average", *paths, "--data", files.data, *files.common]
    outcome = cli(*words, "-o", tmp_path / "out.safetensors", "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json
    splits = found["data"]["splits"]
    assert sum(splits.values()) == 180
    assert splits["select"] == splits["test"] == pytest.approx(36, abs=2)
    (decision,) = found["decisions"]
    between = "mean of 2 checkpoints, statistics of the data (interpolated)"
    assert (decision["candidate"], decision["incumbent"]) == (between, MEAN)
    won = between if decision["admitted"] else MEAN
    assert [m["name"] for m in found["models"]] == ["as it was", f"output: {won}"]
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        entry = json.loads(file.metadata()["bnfix"])["history"][-1]
    assert entry["results"]["output"] == won
    assert entry["options"]["averaging"] == {
        "method": "uniform", "best": None, "statistics": "auto",
    }  # fmt: skip


def test_stated_statistics_between_need_no_labels(cli, files, two, tmp_path):
    own, paths = two
    out = tmp_path / "out.safetensors"
    words = [*paths, "--weights", "1,3", "--statistics", "interpolated", "--labels", "none"]
    outcome = cli("average", *words, "--data", files.data, *files.common, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    expected = copy.deepcopy(own[0])
    mean = expected_mean([n.state_dict() for n in own], (1, 3))
    expected.load_state_dict(
        {k: torch.tensor(v).to(expected.state_dict()[k]) for k, v in mean.items()}
    )
    bnfix.recalibrate_(
        expected,
        [inputs_of(images_of(180, seed=2)[0])],
        target="interpolated",
        reference={own[0]: 1.0, own[1]: 3.0},
    )
    state = expected.state_dict()
    for name, tensor in load_file(out).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, state[name], rtol=1e-4, atol=1e-5)
    assert outcome.json["calibration"]["target"] == "interpolated"
    assert outcome.json["data"]["splits"] == {"fit": 180, "select": 0, "test": 0}


def test_without_labels_the_statistics_are_the_populations_and_it_is_said(
    cli, files, two, tmp_path
):
    _, paths = two
    words = [*paths, "--labels", "none", "--data", files.data, *files.common]
    outcome = cli("average", *words, "-o", tmp_path / "out.safetensors", "--json")
    assert outcome.json["calibration"]["target"] == "population"
    assert any("--statistics interpolated" in a for a in outcome.json["assumptions"])


def without_statistics(path):
    """A file of parameters alone."""
    state = {n: t for n, t in load_file(path).items() if "running" not in n and "batches" not in n}
    save_file(state, path)


@pytest.mark.parametrize("stated", [False, True])
def test_a_file_without_statistics_has_none_to_interpolate(cli, files, two, tmp_path, stated):
    _, paths = two
    without_statistics(paths[1])
    out = tmp_path / "out.safetensors"
    more = ["--statistics", "interpolated"] if stated else ["--json"]
    outcome = cli("average", *paths, *more, "--data", files.data, *files.common, "-o", out)
    found = "1.safetensors: has no statistics of its own to interpolate"
    if stated:
        assert outcome.code == 1
        assert found in " ".join(outcome.err.split())
        assert not out.exists()
        return
    assert outcome.code == 0
    assert any(found in sentence for sentence in outcome.json["assumptions"])
    assert outcome.json["calibration"]["target"] == "population"


# --- greedy ---


def perturbed_files(files, folder, spreads):
    """Copies of the trained network by name, with noise of these sizes."""
    found = []
    for seed, (name, spread) in enumerate(spreads.items(), 11):
        found.append(written(perturbed(files.trained(), seed, spread), folder / f"{name}.pt"))
    return found


def greedily(cli, files, paths, out, *more):
    words = ["average", *paths, "--method", "greedy", "--data", files.data, *files.common]
    return cli(*words, "--test", files.test, *more, "-o", out, "--json")


def test_who_is_judged_against_whom(cli, files, tmp_path):
    paths = perturbed_files(files, tmp_path, {"a": 0.6, "b": 0.5, "c": 0.6, "d": 2.0})
    outcome = greedily(cli, files, paths, tmp_path / "out.safetensors")
    assert outcome.code == 0, outcome.err
    new, between = (f"statistics of the data ({n})" for n in ("population", "interpolated"))
    assert [(d["candidate"], d["incumbent"], d["admitted"]) for d in outcome.json["decisions"]] == [
        (f"c.pt, {new}", "c.pt alone", True),
        (f"mean of c.pt, b.pt, {new}", f"c.pt, {new}", True),
        (f"mean of c.pt, b.pt, {new}", "c.pt alone", True),
        (f"mean of c.pt, b.pt, {between}", f"mean of c.pt, b.pt, {new}", False),
        (f"mean of c.pt, b.pt, a.pt, {new}", f"mean of c.pt, b.pt, {new}", False),
        (f"mean of c.pt, b.pt, a.pt, {between}", f"mean of c.pt, b.pt, {new}", False),
        (f"mean of c.pt, b.pt, d.pt, {new}", f"mean of c.pt, b.pt, {new}", False),
        (f"mean of c.pt, b.pt, d.pt, {between}", f"mean of c.pt, b.pt, {new}", False),
    ]
    assert outcome.json["models"][-1]["name"] == f"output: mean of c.pt, b.pt, {new}"
    means = mean_of([load_file(paths[i]) for i in (2, 1)])
    found = load_file(tmp_path / "out.safetensors")
    torch.testing.assert_close(found["conv2.weight"], means["conv2.weight"])
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        entry = json.loads(file.metadata()["bnfix"])["history"][-1]
    assert [one["file"] for one in entry["options"]["average"]] == ["c.pt", "b.pt"]


def test_the_best_checkpoint_is_the_output_where_no_mean_is_better(cli, files, tmp_path):
    paths = perturbed_files(files, tmp_path, {"a": 0.2, "b": 0.02, "c": 1.5})
    outcome = greedily(cli, files, paths, tmp_path / "out.safetensors")
    assert outcome.json["models"][-1]["name"] == "output: b.pt alone"
    assert {d["incumbent"] for d in outcome.json["decisions"]} == {"b.pt alone"}
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], t) for name, t in load_file(paths[1]).items())


def test_greedy_needs_labels(cli, files, two, tmp_path):
    _, paths = two
    outcome = greedily(cli, files, paths, tmp_path / "out.safetensors", "--labels", "none")
    assert outcome.code == 1
    assert "has no labels, and --method greedy needs them" in " ".join(outcome.err.split())


# --- which files ---


def test_the_best_files_are_those_of_the_highest_or_lowest_number(tmp_path):
    numbers = {"a": (0.7, 0.2), "b": (0.9, 0.9), "c": (0.8, 0.1)}
    for name, (accuracy, loss) in numbers.items():
        state = {"val_loss": loss, "epoch": 3, "state_dict": nets.plain().state_dict()}
        state |= {"best_acc1": torch.tensor(100 * accuracy)} if name != "a" else {}
        torch.save(state, tmp_path / f"{name}.pth")
    files = [str(tmp_path / f"{name}.pth") for name in numbers]
    kept, note = best_of(files, 2)
    assert kept == [files[2], files[0]]
    assert note == "the 2 best of 3 files by val_loss: c.pth 0.1, a.pth 0.2."
    kept, note = best_of(files[1:], 2)
    assert kept == files[1:]
    assert note == "the 2 best of 2 files by best_acc1: b.pth 90, c.pth 80."


def test_files_without_a_number_in_common_are_refused(tmp_path):
    paths = [str(tmp_path / f"{name}.pth") for name in "ab"]
    torch.save({"acc": 1.0, "state_dict": nets.plain().state_dict()}, paths[0])
    torch.save({"acc": float("nan"), "state_dict": nets.plain().state_dict()}, paths[1])
    found = r"--best: the files share no score .*a\.pth: acc; b\.pth: none"
    with pytest.raises(CheckpointError, match=found):
        best_of(paths, 2)


def test_patterns_stand_for_their_files_sorted(tmp_path):
    for name in ("b1.pth", "b0.pth", "a.pth", "x[1].pth"):
        (tmp_path / name).touch()
    found = matching([f"{tmp_path}/a.pth", f"{tmp_path}/b*.pth", f"{tmp_path}/x[1].pth", "no.pth"])
    assert [name.rpartition("/")[2] for name in found] == [
        "a.pth", "b0.pth", "b1.pth", "x[1].pth", "no.pth",
    ]  # fmt: skip
    with pytest.raises(CheckpointError, match=r"c\*\.pth: no file matches it"):
        matching([f"{tmp_path}/c*.pth"])


def test_a_pattern_and_the_best_by_the_numbers_in_histories(cli, files, two, tmp_path):
    _, paths = two
    outs = [tmp_path / f"done{i}.safetensors" for i in range(3)]
    common = ["--data", files.data, *files.common]
    for path, out in zip((*paths, files.net), outs, strict=True):
        words = ["calibrate", path, "--statistics", "population", "--example-weight", "keep"]
        outcome = cli(*words, *common, "--test", files.test, "-o", out)
        assert outcome.code == 0, outcome.err
    out = tmp_path / "out.safetensors"
    words = ["average", tmp_path / "done*.safetensors", "--best", "2", *common, "--json", "-o", out]
    outcome = cli(*words)
    assert outcome.code == 0, outcome.err
    (said,) = [a for a in outcome.json["assumptions"] if a.startswith("the 2 best of 3")]
    assert said.startswith("the 2 best of 3 files by top1: done")
    with safe_open(out, framework="pt") as file:
        entry = json.loads(file.metadata()["bnfix"])["history"][-1]
    assert len(entry["options"]["average"]) == entry["options"]["averaging"]["best"] == 2
