"""Planted changes of weights are named, alone and against the original, and nothing else is."""

from __future__ import annotations

import shlex

import pytest
import torch
from torch import Tensor

from bnfix import CheckpointError
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.diagnosis.damage import compare_weights, diagnose_weights
from tests import nets
from tests.real import DATA, needs_data

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def original() -> State:
    torch.manual_seed(0)
    return nets.lived_in(nets.resnet20()).state_dict()


def on_weights(state: State, change) -> State:
    return {n: change(t) if t.ndim > 1 else t.clone() for n, t in state.items()}


def pruned(weight: Tensor, part: float = 0.7) -> Tensor:
    least = weight.abs().flatten().kthvalue(int(part * weight.numel())).values
    return weight * (weight.abs() > least)


def rounded(weight: Tensor, bits: int = 4, by_channel: bool = False) -> Tensor:
    rows = weight.flatten(1) if by_channel else weight.reshape(1, -1)
    step = rows.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return ((rows / step).round() * step).view_as(weight)


def affine(weight: Tensor) -> Tensor:
    """Rounded to 4 bits between the least and the largest value."""
    step = (weight.max() - weight.min()) / 15
    return ((weight - weight.min()) / step).round() * step + weight.min()


def clustered(weight: Tensor) -> Tensor:
    centres = weight.flatten().quantile(torch.linspace(0, 1, 16) ** 1.3)
    return centres[(weight[..., None] - centres).abs().argmin(-1)]


def clustered_filters(weight: Tensor) -> Tensor:
    centres = weight[: len(weight) // 2].flatten(1)
    return centres[torch.cdist(weight.flatten(1), centres).argmin(1)].view_as(weight)


def noisy(weight: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return weight + 0.3 * weight.std() * torch.randn(weight.shape, generator=generator)


def moved(state: State) -> State:
    return {n: t + 0.1 if "running_" in n else t for n, t in state.items()}


DAMAGE = {
    "pruned": (pruned, "pruned"),
    "rounded": (rounded, "rounded"),
    "rounded to 8 bits": (lambda w: rounded(w, 8), "rounded"),
    "rounded by channel": (lambda w: rounded(w, 4, by_channel=True), "rounded"),
    "rounded to 8 bits by channel": (lambda w: rounded(w, 8, by_channel=True), "rounded"),
    "rounded from the least": (affine, "rounded"),
    "clustered": (clustered, "clustered"),
    "clustered filters": (clustered_filters, "clustered"),
    "noisy": (noisy, "noisy"),
    "half": (lambda w: w.half().float(), "half"),
    "bfloat16": (lambda w: w.bfloat16().float(), "half"),
    "unrelated": (lambda w: w.flip(0, 1), "unrelated"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_what_was_done_is_named_for_each_weight(original, name):
    change, cause = DAMAGE[name]
    found = compare_weights(on_weights(original, change), original)
    assert {one.cause for one in found.changed} == {cause}
    assert [one.is_convolution for one in found.changed] == [True] * 19 + [False]
    assert (found.n_weights, found.n_norms, found.moved, found.unmatched) == (20, 19, (), ())
    assert "19 convolutions and 1 linear layer" in found.sentence


@pytest.mark.parametrize("name", [*DAMAGE, "nothing"])
def test_a_file_alone_shows_pruning_clustering_and_rounding_and_no_more(original, name):
    change, cause = DAMAGE.get(name, (lambda w: w, ""))
    found = [one.fault for one in diagnose_weights(on_weights(original, change))]
    assert found == ([cause] if cause in ("pruned", "clustered", "rounded") else [])


def test_the_size_of_a_change_and_its_traces_are_measured(original):
    found = compare_weights(on_weights(original, pruned), original).changed[3]
    before = original[found.name].double()
    after = pruned(original[found.name]).double()
    assert found.relative_norm == pytest.approx(float((after - before).norm() / before.norm()))
    assert found.traces.sparsity == pytest.approx(0.7, abs=1e-3)
    assert (found.traces_before.sparsity, found.traces_before.n_distinct) == (0, None)
    few = compare_weights(on_weights(original, clustered), original).changed[3]
    assert few.traces.n_distinct is not None
    assert few.traces.n_distinct <= 16


def test_statistics_that_did_not_follow_are_stale(original):
    (finding,) = compare_weights(on_weights(original, pruned), original).findings()
    assert (finding.fault, finding.severity) == ("stale-weights", "warning")
    assert "bnfix calibrate CKPT" in finding.advice
    assert "(70% zeros); no statistics differ: they are stale" in finding.detail


def test_statistics_that_moved_along_are_not(original):
    found = compare_weights(moved(on_weights(original, pruned)), original)
    assert (len(found.moved), found.stale) == (19, ())
    assert "the statistics of 19 of 19 norm layers moved with them" in found.sentence
    assert [one.severity for one in found.findings()] == ["note"]


def test_statistics_of_some_layers_only_moved(original):
    state = on_weights(original, noisy)
    state["layer1.0.bn1.running_mean"] += 1
    state["layer3.2.bn2.running_var"] *= 2
    found = compare_weights(state, original)
    assert found.moved == ("layer1.0.bn1", "layer3.2.bn2")
    assert len(found.stale) == 17
    assert "17 of 19 norm layers do not (bn1, layer1.0.bn2, " in found.sentence


def test_only_layers_after_a_change_are_stale(original):
    state = {name: tensor.clone() for name, tensor in original.items()}
    state["layer3.2.conv2.weight"] = noisy(state["layer3.2.conv2.weight"])
    assert compare_weights(state, original).stale == ("layer3.2.bn2",)
    state = {name: tensor.clone() for name, tensor in original.items()}
    state["linear.weight"] = noisy(state["linear.weight"])
    assert compare_weights(state, original).stale == ()


def test_in_files_sorted_by_name_convolutions_come_before_norms_and_linear_layers_after(original):
    first = dict(sorted(original.items()))
    for weight, n_stale in (("layer3.2.conv2.weight", 19), ("linear.weight", 0)):
        state = {name: noisy(t) if name == weight else t for name, t in first.items()}
        assert len(compare_weights(state, first).stale) == n_stale
        assert len(compare_weights(state, original).stale) == min(n_stale, 1)


def test_a_change_too_slight_for_the_statistics_leaves_them_right(original):
    found = compare_weights(on_weights(original, lambda w: w.half().float()), original)
    assert found.stale == ()
    assert found.sentence.endswith("so slight or so late a change leaves them valid")


def test_a_network_that_was_trained_on_changes_everywhere(original):
    state = moved(on_weights(original, noisy))
    state["bn1.weight"] = state["bn1.weight"] + 0.1
    found = compare_weights(state, original)
    assert {one.cause for one in found.changed} == {"trained"}
    assert "fine-tuned or merged" in found.sentence


def test_the_same_network_and_one_with_new_statistics(original):
    same = compare_weights(original, original)
    assert (same.changed, same.moved, same.stale) == ((), (), ())
    assert same.sentence == "neither a weight nor a statistic differs"
    new = compare_weights(moved(original), original)
    assert (new.changed, len(new.moved), new.stale) == ((), 19, ())
    assert new.sentence == "no weight differs; the statistics of 19 of 19 norm layers do"


def test_tensors_of_one_file_only_are_listed_and_other_networks_refused(original):
    state = on_weights(original, noisy)
    del state["linear.bias"]
    state["linear.weight"] = torch.randn(7, 64)
    assert compare_weights(state, original).unmatched == ("linear.bias", "linear.weight")
    with pytest.raises(CheckpointError, match=r"--against: no weight has the same name and shape"):
        compare_weights(nets.bn1d().state_dict(), original)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_compared_without_a_word(original, value):
    state = {name: tensor.clone() for name, tensor in original.items()}
    state["conv1.weight"].fill_(1)[0, 0, 0, 0] = value
    assert [one.name for one in compare_weights(state, original).changed] == ["conv1.weight"]
    assert diagnose_weights(state) == []


@needs_data
def test_published_models_show_nothing():
    for name in ("cifar10/resnet20.th", "cifar10/resnet32.th", "mobilenet_v2-b0353104.pth"):
        assert diagnose_weights(read_checkpoint(DATA / name).tensors) == []


@needs_data
def test_two_trainings_are_told_apart_from_one():
    a, b = (read_checkpoint(DATA / f"cifar10/resnet20{x}.th").tensors for x in ("", "_b"))
    found = compare_weights(a, b)
    assert {one.cause for one in found.changed} == {"unrelated"}
    assert len(found.moved) == 19


# --- the command ---


@pytest.fixture
def damaged(files, tmp_path):
    """The trained network of the files with most of its weights pruned."""
    state = on_weights(torch.load(files.net, weights_only=True), pruned)
    torch.save(state, tmp_path / "pruned.pth")
    return tmp_path / "pruned.pth"


def test_inspect_names_pruning_and_asks_for_the_original(cli, damaged):
    (found,) = cli("inspect", damaged, "--json").json["findings"]
    assert (found["fault"], found["severity"]) == ("pruned", "note")
    assert found["advice"].endswith(f"bnfix inspect {damaged} --against ORIGINAL")


def test_inspect_against_the_original_says_what_is_stale_and_what_to_run(cli, files, damaged):
    found = cli("inspect", damaged, "--against", files.net, "--json").json
    against = found["against"]
    assert against["file"] == str(files.net)
    assert against["stale"] == ["bn1", "bn2"]
    assert {change["cause"] for change in against["changed"]} == {"pruned"}
    assert all(change["traces"]["sparsity"] > 0.69 for change in against["changed"])
    (finding,) = found["findings"]
    assert (finding["fault"], finding["severity"]) == ("stale-weights", "warning")
    assert f"bnfix calibrate {damaged}" in finding["advice"]
    assert f"--reference '{files.net}'" in finding["advice"]
    shown = cli("inspect", damaged, "--against", files.net).out
    assert "no statistics differ: they are stale" in shown


def test_the_repair_that_is_advised_runs_as_printed(cli, files, damaged, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ("--model", files.spec, "--data", files.data, "--against", files.net, "--json")
    advice = [one["advice"] for one in cli("inspect", damaged, *words).json["findings"]]
    (repair,) = [one for one in advice if "--reference" in one]
    outcome = cli(*shlex.split(repair.partition(": bnfix ")[2]), "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json["options"]["statistics"]["reference"] == str(files.net)


def test_inspect_against_itself_shows_that_nothing_differs(cli, files):
    outcome = cli("inspect", files.net, "--against", files.net)
    assert "neither a weight nor a statistic differs" in outcome.out
    assert outcome.code == 0


def test_inspect_against_another_network_is_refused(cli, files, tmp_path):
    torch.save(nets.bn1d().state_dict(), tmp_path / "other.pth")
    outcome = cli("inspect", files.net, "--against", tmp_path / "other.pth")
    assert outcome.code == 1
    assert "no weight has the same name and shape in both files" in outcome.err
