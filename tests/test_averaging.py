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
from bnfix.checkpoints.average import average_into_, mean_of
from bnfix.checkpoints.load import load_ready
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


# --- into a model ---


def written(net, path):
    save_file(net.state_dict(), path)
    return path


def loaded(path):
    return load_ready(path, model=nets.plain())


def test_the_model_gets_the_mean_and_the_files_are_recorded(tmp_path):
    own = [nets.lived_in(nets.plain(), seed=i) for i in range(2)]
    paths = [written(net, tmp_path / f"{i}.safetensors") for i, net in enumerate(own)]
    first = loaded(paths[0])
    records, notes = average_into_(first, AverageRecipe((str(paths[1]),), (1, 3)), ModelRecipe())
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
    _, notes = average_into_(loaded(path), AverageRecipe((str(path),)), ModelRecipe())
    assert notes == ["2 files were averaged, but only 1 of them differ: a.safetensors."]


def test_other_prefixes_are_found(tmp_path):
    first, other = nets.plain(), nets.lived_in(nets.plain())
    paths = [written(first, tmp_path / "a.safetensors"), tmp_path / "b.pth"]
    torch.save({"state_dict": {f"module.{k}": v for k, v in other.state_dict().items()}}, paths[1])
    into = loaded(paths[0])
    average_into_(into, AverageRecipe((str(paths[1]),)), ModelRecipe())
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
    average_into_(into, AverageRecipe((paths[1],)), ModelRecipe())
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
        average_into_(into, recipe, ModelRecipe())
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
    words = ["average", *paths, "--data", files.data, *files.common]
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
