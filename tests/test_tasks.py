"""Tasks beside classification: their numbers against slow references, the gate, whole commands."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

import bnfix
from bnfix.core.errors import CheckpointError, ConfigError, DataError, NumericError
from bnfix.core.settings import FinetuneRecipe, TaskRecipe
from bnfix.metrics.compare import judge
from bnfix.metrics.task import learned
from bnfix.metrics.tasks import Regression, Segmentation, read_off


def batched(x, y, size=5):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def measured(outputs, targets, task="auto", size=5):
    """Metrics of outputs, as a network that gives its input back."""
    outputs, targets = torch.as_tensor(outputs), torch.as_tensor(targets)
    return bnfix.evaluate(nn.Identity(), batched(outputs, targets, size), task=task)


# --- numbers ---


def slow_segmentation(z, y, ignored):
    """Losses an example, and IoU by class, in float64, one pixel at a time."""
    losses, k = [], z.shape[1]
    hits, union, right, n = np.zeros(k), np.zeros(k), 0, 0
    for logits, mask in zip(z.astype(np.float64), y, strict=True):
        own = []
        for where in np.ndindex(mask.shape):
            c, v = mask[where], logits[(slice(None), *where)]
            if c == ignored:
                continue
            own.append(np.log(np.exp(v - v.max()).sum()) + v.max() - v[c])
            guess = int(v.argmax())
            n, right = n + 1, right + (guess == c)
            hits[c] += guess == c
            union[c] += 1
            union[guess] += guess != c
        losses.append(np.mean(own))
    iou = np.full(k, np.nan)
    iou[union > 0] = hits[union > 0] / union[union > 0]
    return np.array(losses), iou, right / n


@pytest.mark.parametrize(
    ("n", "k", "space"), [(1, 2, (1, 1)), (7, 3, (5, 4)), (3, 5, (6,)), (2, 2, (2, 3, 2))]
)
def test_segmentation_against_a_slow_reference(n, k, space):
    rng = np.random.default_rng(n)
    z = rng.normal(size=(n, k, *space)).astype(np.float32)
    y = rng.integers(0, k, (n, *space))
    y[rng.random(y.shape) < 0.2] = 255
    y.reshape(n, -1)[:, 0] = 0
    found = measured(z, y)
    losses, iou, right = slow_segmentation(z, y, 255)
    np.testing.assert_allclose(found.examples.losses, losses, rtol=1e-9)
    assert found.loss == pytest.approx(losses.mean(), rel=1e-9)
    np.testing.assert_allclose([v for v, _ in found.by_class], iou, rtol=1e-12)
    assert [n for _, n in found.by_class] == [(y == c).sum() for c in range(k)]
    assert found.values["miou"] == pytest.approx(np.nanmean(iou))
    assert found.values["pixel_accuracy"] == pytest.approx(right)


def test_outputs_are_resized_to_the_masks():
    rng = torch.Generator().manual_seed(1)
    x, y = torch.randn(4, 3, 11, 9, generator=rng), torch.randint(3, (4, 11, 9), generator=rng)
    net = nn.AdaptiveAvgPool2d((5, 4))
    small = bnfix.evaluate(net, batched(x, y))
    large = measured(F.interpolate(net(x), (11, 9), mode="bilinear", align_corners=False), y)
    assert small.values == large.values
    # In float64 the one, in float32 the other.
    np.testing.assert_allclose(small.examples.losses, large.examples.losses, rtol=1e-6)


def test_an_example_without_a_valid_pixel_is_left_out():
    rng = np.random.default_rng(2)
    z, y = rng.normal(size=(6, 2, 3, 3)), rng.integers(0, 2, (6, 3, 3))
    y[2] = 9
    found = measured(z, y, TaskRecipe("segmentation", ignore_index=9))
    rest = np.delete(np.arange(6), 2)
    alone = measured(z[rest], y[rest])
    assert found.n_examples == 5
    assert found.loss == alone.loss
    assert found.values == alone.values
    with pytest.raises(DataError, match="no example has a valid target"):
        measured(z[2:3], y[2:3], TaskRecipe("segmentation", ignore_index=9))


def slow_average_precision(z, y):
    """Sum over thresholds, from above, of the rise in recall times the precision there."""
    total, before = 0.0, 0.0
    for threshold in sorted(set(z.tolist()), reverse=True):
        taken = z >= threshold
        recall = (taken & (y == 1)).sum() / y.sum()
        total += (recall - before) * (taken & (y == 1)).sum() / taken.sum()
        before = recall
    return total


def slow_f1(guess, y):
    right = (guess & (y == 1)).sum()
    return 2 * right / (guess.sum() + y.sum())


@pytest.mark.parametrize(("n", "k"), [(20, 2), (33, 5)])
def test_multilabel_against_slow_references(n, k):
    rng = np.random.default_rng(k)
    z = rng.normal(size=(n, k)).astype(np.float32)
    z[rng.random(z.shape) < 0.3] = 0.5  # ties
    y = rng.integers(0, 2, (n, k))
    found = measured(z, y)
    p = 1 / (1 + np.exp(-z.astype(np.float64)))
    loss = -np.where(y == 1, np.log(p), np.log(1 - p)).mean(1)
    np.testing.assert_allclose(found.examples.losses, loss, rtol=1e-9)
    flipped = -np.where(y == 0, np.log(p), np.log(1 - p)).mean(1)
    assert found.examples.blind_loss == pytest.approx((loss + flipped).mean() / 2)
    guess, each = z > 0, [slow_average_precision(z[:, c], y[:, c]) for c in range(k)]
    expected = {
        "map": np.mean(each),
        "f1_micro": slow_f1(guess, y),
        "f1_macro": np.mean([slow_f1(guess[:, c], y[:, c]) for c in range(k)]),
    }
    assert found.values == pytest.approx(expected)
    assert found.top1 == pytest.approx((guess == y).mean())
    # A label that is never there has no average precision.
    y[:, 0] = 0
    assert measured(z, y, "multilabel").values["map"] == pytest.approx(np.mean(each[1:]))


@pytest.mark.parametrize("shape", [(30,), (30, 1), (31, 3), (9, 2, 4, 3)])
@pytest.mark.parametrize("loss", ["mse", "l1", "huber"])
def test_regression_against_slow_references(shape, loss):
    rng = np.random.default_rng(len(shape))
    t = rng.normal(3, 2, size=shape).astype(np.float32)
    o = (t + rng.normal(size=shape)).astype(np.float32)
    found = measured(o, t, TaskRecipe(loss=loss))
    k = shape[1] if len(shape) > 1 else 1
    o, t = (np.moveaxis(v.astype(np.float64).reshape(len(o), k, -1), 1, 2) for v in (o, t))
    e = o - t
    own = {"mse": e**2, "l1": abs(e), "huber": np.where(abs(e) < 1, e**2 / 2, abs(e) - 0.5)}[loss]
    np.testing.assert_allclose(found.examples.losses, own.mean((1, 2)), rtol=1e-9)
    o, t = o.reshape(-1, k), t.reshape(-1, k)
    expected = {
        "mae": abs(o - t).mean(),
        "rmse": ((o - t) ** 2).mean() ** 0.5,
        "r2": (1 - ((o - t) ** 2).mean(0) / t.var(0)).mean(),
        "pearson": np.mean([np.corrcoef(t[:, c], o[:, c])[0, 1] for c in range(k)]),
    }
    assert found.values == pytest.approx(expected)
    assert found.top1 is None


def test_metrics_agree_with_scikit_learn():
    theirs = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(7)
    z, y = rng.normal(size=(40, 6)).astype(np.float32).round(1), rng.integers(0, 2, (40, 6))
    assert measured(z, y).values == pytest.approx({
        "map": theirs.average_precision_score(y, z, average="macro"),
        "f1_micro": theirs.f1_score(y, z > 0, average="micro"),
        "f1_macro": theirs.f1_score(y, z > 0, average="macro"),
    })  # fmt: skip
    found = measured(z, z + y / 3, "regression").values
    t = (z + y / 3).astype(np.float32)
    assert found["mae"] == pytest.approx(theirs.mean_absolute_error(t, z))
    assert found["r2"] == pytest.approx(theirs.r2_score(t, z))


def test_a_constant_has_no_correlation():
    found = measured(np.arange(5.0), np.full(5, 1e3), "regression")
    assert math.isnan(found.values["r2"])
    assert math.isnan(found.values["pearson"])
    assert found.values["mae"] == 998


def test_intervals_are_those_of_the_examples():
    rng = np.random.default_rng(5)
    t = rng.normal(size=400)
    found = measured(t + rng.normal(size=400), t)
    for name, values in (("mae", np.sqrt(found.examples.losses)), ("nll", found.examples.losses)):
        low, high = found.interval[name]
        assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.12)


# --- which task ---


@pytest.mark.parametrize(
    ("z", "y", "task"),
    [
        ((4, 3), torch.tensor([0, 2, 1, 0]), "classification"),
        ((4,), torch.tensor([0, 1, 1, 0]), "classification"),
        ((4, 1), torch.tensor([0, 1, 1, 0]), "classification"),
        ((4, 3, 2, 2), torch.zeros(4, 2, 2, dtype=torch.long), "segmentation"),
        ((4, 3, 2, 2), torch.zeros(4, 8, 8, dtype=torch.long), "segmentation"),
        ((4, 3, 7), torch.zeros(4, 7, dtype=torch.long), "segmentation"),
        ((4, 3), torch.ones(4, 3, dtype=torch.long), "multilabel"),
        ((4, 3), torch.ones(4, 3), "multilabel"),
        ((4, 3), torch.full((4, 3), 0.5), "regression"),
        ((4, 1), torch.full((4,), 0.5), "regression"),
        ((4,), torch.full((4, 1), 0.5), "regression"),
        ((4, 1, 5, 5), torch.full((4, 1, 5, 5), 0.5), "regression"),
        ((4, 3), torch.full((4, 2), 0.5), "classification"),  # which refuses them
        ((4, 3), None, "classification"),
    ],
)
def test_a_task_is_read_off_where_it_is_plain(z, y, task):
    assert read_off(torch.zeros(z), y) == task


@pytest.mark.parametrize(
    ("z", "y", "task", "words"),
    [
        ((4, 3, 6, 5), (3, (4, 5, 5)), "segmentation", "masks: 5x5, expected 6x5 as the inputs"),
        (
            (4, 3, 6, 5),
            (4, (4, 6, 5)),
            "segmentation",
            "class 3, expected 0 to 2, because the model has 3 outputs",
        ),
        ((4, 3, 6, 5), (3, (4, 6)), "segmentation", "int64 4x6 for outputs float32 4x3x6x5"),
        ((4, 3), (3, (4,)), "multilabel", "int64 4 for outputs float32 4x3"),
        ((4, 3), (3, (4, 3)), "multilabel", "other than 0 and 1"),
        ((4, 3), (3, (4, 2)), "regression", "regression needs one number for each output"),
    ],
)
def test_targets_that_do_not_fit_are_refused(z, y, task, words):
    top, shape = y
    targets = torch.arange(math.prod(shape)).reshape(shape) % top
    with pytest.raises(DataError, match=words):
        measured(torch.zeros(z), targets, task)


def test_targets_that_are_no_numbers_are_refused():
    t = torch.ones(6, 2)
    t[4, 1] = math.nan
    with pytest.raises(DataError, match=r"targets: not finite for example 4"):
        measured(torch.zeros(6, 2), t, "regression", size=6)
    t[4, 1] = 0.5
    with pytest.raises(
        DataError, match=r"example 4 \(from 0\) of a batch has 0.5 among its labels"
    ):
        measured(torch.zeros(6, 2), t, "multilabel", size=6)
    with pytest.raises(DataError, match="masks: float32"):
        measured(torch.zeros(6, 2, 1, 1), torch.zeros(6, 1, 1), "segmentation")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "detection"}, "--task: 'detection' is not known"),
        ({"loss": "mean"}, "--loss: 'mean', expected mse"),
        ({"loss": "l1", "task": "multilabel"}, "--loss l1: not with --task multilabel"),
        ({"loss": "a.py:f", "task": "regression"}, "not with --task regression"),
    ],
)
def test_options_that_exclude_each_other(options, words):
    with pytest.raises(ConfigError, match=words):
        TaskRecipe(**options)


# --- a loss of one's own ---


def half_square(outputs, targets):
    return (outputs - targets).square().mean(1) / 2


def test_a_loss_of_ones_own():
    rng = np.random.default_rng(6)
    o, t = rng.normal(size=(2, 25, 3)).astype(np.float32)
    found = measured(o, t, half_square)
    np.testing.assert_allclose(found.examples.losses, ((o - t) ** 2).mean(1) / 2, rtol=1e-6)
    assert (found.values, found.top1) == ({}, None)
    better = measured(0.5 * (o + t), t, half_square)
    assert bnfix.compare(found, better).verdict == "better"
    with pytest.raises(DataError, match=r"the loss \(half_square\), the other by the mean squared"):
        bnfix.compare(found, measured(o, t))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda o, t: (o - t).mean(), r"returned Tensor of shape \(\), expected .* shape \(5,\)"),
        (lambda o, t: o - t, r"shape \(5, 3\), expected a tensor of shape \(5,\)"),
        (lambda o, t: 0.5, r"returned float of shape \(\), expected"),
        (lambda o, t: o @ t, r"failed \(RuntimeError.*outputs float32 5x3 and targets float32 5x3"),
    ],
)
def test_a_loss_that_is_none_is_refused(loss, words):
    with pytest.raises(ConfigError, match=words):
        measured(torch.zeros(5, 3), torch.ones(5, 3), loss)


def test_a_loss_that_is_not_finite_is_named_by_its_example():
    t = torch.ones(7, 3)
    t[5] = math.inf
    with pytest.raises(NumericError, match=r"loss \(half_square\) of example 5 \(from 0\)"):
        measured(torch.zeros(7, 3), t, half_square)
    z = torch.zeros(7, 3)
    z[2, 1] = math.nan
    with pytest.raises(NumericError, match="mean squared error of example 2"):
        measured(z, torch.full((7, 3), 0.5))


# --- the verdict and the gate ---


def errors(n=80, size=1.0, seed=0):
    """Outputs and targets of a regression whose errors have a size."""
    rng = np.random.default_rng(seed)
    t = rng.normal(size=n)
    return measured(t + size * rng.normal(size=n), t)


def test_without_a_score_the_loss_alone_decides():
    was, now = errors(), errors(size=0.5)
    paired = bnfix.compare(was, now)
    assert paired.verdict == "better"
    assert math.isnan(paired.top1.difference)
    assert math.isnan(paired.nll_temperature_scaled.difference)
    assert not paired.temperature_only
    assert paired.metrics["rmse"].difference == now.values["rmse"] - was.values["rmse"]
    low, high = paired.metrics["rmse"].interval
    assert low < paired.metrics["rmse"].difference < high < 0
    assert bnfix.compare(now, was).verdict == "worse"
    assert bnfix.compare(was, was).verdict == "same"
    decision = judge("statistics", ("new", now), ("old", was))
    assert decision.admitted
    assert decision.measures == ("loss (mse)", "")
    assert decision.reason.startswith("its mean squared error is lower by ")
    assert "nats" not in decision.reason
    assert (decision.top1, decision.top1_difference) == (None, None)
    assert not judge("statistics", ("new", was), ("old", now)).admitted
    few = [errors(n=19, size=size) for size in (1.0, 0.1)]
    assert "19 examples are too few to judge" in judge("s", ("a", few[1]), ("b", few[0])).reason


def test_a_lower_loss_with_fewer_right_pixels_is_not_admitted():
    """Sure and wrong on one pixel of four at first; then never sure, and wrong on two."""
    n = 60
    y = np.zeros((n, 2, 2), int)
    sure, unsure = np.zeros((2, n, 2, 2, 2))
    sure[:, 0], sure[:, 0, 0, 0], sure[:, 1, 0, 0] = 9, 0, 30
    unsure[:, 1, 0] = 0.1
    old, new = measured(sure, y), measured(unsure, y)
    assert (old.top1, new.top1) == (0.75, 0.5)
    decision = judge("statistics", ("new", new), ("old", old))
    assert not decision.admitted
    assert "fraction of right pixels is lower" in decision.reason
    assert bnfix.compare(old, new).verdict == "worse"


# --- what learns ---


def net_of(task):
    torch.manual_seed(0)
    if task == "segmentation":
        return nn.Sequential(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
        ).eval()  # fmt: skip
    return nn.Sequential(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2)).eval()


def data_of(task, n=160, seed=0):
    rng = torch.Generator().manual_seed(seed)
    if task == "segmentation":
        x = torch.randn(n, 2, 6, 5, generator=rng)
        return x, (x[:, 0] > 0).long() + ((x[:, 0] > 0) & (x[:, 1] > 0)).long()
    x = torch.randn(n, 3, generator=rng)
    t = torch.stack([x[:, 0] - x[:, 1], x[:, 2].abs()], 1)
    return x, (t > 0.2).long() if task == "multilabel" else t


@pytest.mark.parametrize("task", ["segmentation", "multilabel", "regression"])
def test_fine_tuning_learns_any_task(task):
    net, (x, y) = net_of(task), data_of(task)
    batches, held = batched(x[:128], y[:128], 16), batched(x[128:], y[128:], 16)
    before = bnfix.evaluate(net, held)
    recipe = FinetuneRecipe(train="norms+head", epochs=4, lr=0.05)
    tuned = bnfix.finetune_(net, batches, monitor=held, recipe=recipe)
    after = bnfix.evaluate(net, held)
    assert after.task.name == task
    assert tuned.curve[0].nll == pytest.approx(before.loss, rel=1e-6)
    assert tuned.curve[tuned.best_epoch].nll == pytest.approx(after.loss, rel=1e-6)
    assert after.loss < 0.9 * before.loss
    score = tuned.curve[-1].top1
    assert math.isnan(score) if task == "regression" else 0 <= score <= 1


def test_label_smoothing_is_for_classes():
    net, (x, y) = net_of("regression"), data_of("regression", 32)
    with pytest.raises(ConfigError, match="--label-smoothing: not for the task regression"):
        bnfix.finetune_(net, batched(x, y), recipe=FinetuneRecipe(label_smoothing=0.1))
    z, y = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    smooth = learned(Segmentation(), 0.3).losses(z, y)
    expected = F.cross_entropy(z, y, label_smoothing=0.3, reduction="none").mean((1, 2))
    torch.testing.assert_close(smooth, expected)


def test_example_weights_are_chosen_by_any_loss():
    """Each image has its own brightness, which its own statistics take away."""
    net, (x, y) = net_of("segmentation"), data_of("segmentation", 240)
    batches = batched(x, y, 20)
    bnfix.finetune_(net, batches, recipe=FinetuneRecipe(train="all", epochs=8, lr=0.02))
    bnfix.swap_norms_(net)
    rng = torch.Generator().manual_seed(3)
    scales = torch.exp(0.8 * torch.randn(240, 1, 1, 1, generator=rng))
    choice = bnfix.choose_example_weight_(net, batched(x * scales, y, 20))
    assert choice.decisions[0].words.loss == "cross-entropy per pixel"
    assert choice.decisions[0].nll == pytest.approx(choice.decisions[0].nll)
    assert len(choice.curve) > 4


def test_regression_knows_its_loss():
    assert Regression("l1") != Regression()
    assert Regression("huber").words.loss == "Huber loss"


# --- whole commands ---

NETS = """
from math import nan

import torch
from torch import nn


class Seg(nn.Sequential):
    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1)
        )


class Flat(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(3, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Linear(12, 2))


def mae(outputs, targets):
    return (outputs - targets).abs().mean(1)


def mean(outputs, targets):
    return mae(outputs, targets).mean()


def worst(outputs, targets):
    return abs(outputs - targets).max()


def holed(outputs, targets):
    return mae(outputs, targets).where(targets[:, 0] != 7, nan)


def square(outputs, targets):
    return (outputs - targets).square().mean(1)


def cut(outputs, targets):
    return mae(outputs.detach(), targets)
"""
BUILDERS = {"segmentation": "Seg", "multilabel": "Flat", "regression": "Flat"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Networks with statistics of other data, and data for them, by task."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "nets.py").write_text(NETS)
    for task in BUILDERS:
        n = 200 if task == "segmentation" else 500
        net, (x, y) = net_of(task), data_of(task, 2 * n)
        recipe = FinetuneRecipe(train="all", epochs=6, lr=0.02, statistics="train")
        bnfix.finetune_(net, batched(x[:n], y[:n], n // 10), recipe=recipe)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                module.running_mean += 1.5
                module.running_var *= 4
        torch.save(net.state_dict(), path / f"{task}.pth")
        np.savez(path / f"{task}.npz", inputs=x[n:].numpy(), targets=y[n:].numpy())
    return path


def words_of(folder, task, data=None):
    model = f"{folder / 'nets.py'}:{BUILDERS[task]}"
    return [folder / f"{task}.pth", "--model", model, "--data", data or folder / f"{task}.npz"]


METRICS = {
    "segmentation": ("miou", "pixel_accuracy"),
    "multilabel": ("map", "f1_micro", "f1_macro"),
    "regression": ("mae", "rmse", "r2", "pearson"),
}


@pytest.mark.parametrize("task", list(BUILDERS))
def test_fix_goes_the_whole_way(cli, folder, task, tmp_path):
    out = tmp_path / "out.safetensors"
    found = cli("fix", *words_of(folder, task), "-o", out, "--json").json
    if task != "segmentation":
        words = (*words_of(folder, task)[1:], "--to", "pt2", "-o", tmp_path / "out.pt2")
        made = cli("export", out, *words, "--json").json
        assert made["export"]["verification"]["top1_agreement"] is None
    assert found["verdict"] == "better"
    assert found["task"]["name"] == task
    was, now = found["models"]
    (paired,) = found["paired"]
    assert found["decisions"][0]["admitted"]
    assert {"nll", "top1", "ece"}.isdisjoint({*was, *was["interval"], *paired})
    assert {"nll", "incumbent_nll", "top1"}.isdisjoint(found["decisions"][0])
    for name in ("loss", *METRICS[task]):
        low, high = paired[name]["interval"]
        assert low <= paired[name]["difference"] <= high
        assert paired[name]["difference"] == pytest.approx(now[name] - was[name], abs=1e-7)
        low, high = now["interval"][name]
        assert low <= now[name] <= high
    assert paired["loss"]["interval"][1] < 0
    assert ("score" in now) == (task != "regression")
    assert len(found["per_class"]) == (3 if task == "segmentation" else 0)
    page = out.with_name("out.safetensors.report.html").read_text()
    table = out.with_name("out.safetensors.report.md").read_text()
    for text in (page, table):
        assert "op-1" not in text
        assert "NLL" not in text
        assert ("nats" in text) == (task != "regression")
    assert any(f"task: {task}, by outputs and targets" in note for note in found["assumptions"])
    # The file knows what it was judged by.
    again = cli("eval", out, *words_of(folder, task)[1:], "--json").json
    assert any(f"task: {task}, as stored" in note for note in again["assumptions"])
    assert again["models"][0]["loss"] > 0


def test_a_loss_and_a_metric_of_ones_own_from_the_command_line(cli, folder, tmp_path):
    out, nets = tmp_path / "own.safetensors", folder / "nets.py"
    words = words_of(folder, "regression")
    found = cli("fix", *words, "--loss", f"{nets}:mae", "-o", out, "--json").json
    assert found["verdict"] == "better"
    assert found["task"] == {"name": "of your own", "loss": "loss (mae)"}
    by_name = cli("eval", *words, "--loss", "l1", "--metric", f"{nets}:worst", "--json").json
    assert by_name["models"][0]["custom"]["worst"]["value"] > by_name["models"][0]["mae"]
    own = cli("eval", *words, "--loss", f"{nets}:mae", "--json").json
    assert own["models"][0]["loss"] == pytest.approx(by_name["models"][0]["loss"], rel=1e-6)
    refused = cli("eval", out, *words[1:])
    assert refused.code == 2
    assert "code that a file names is not run" in refused.message
    scalar = cli("eval", *words, "--loss", f"{nets}:mean").message
    assert "returned Tensor of shape (), expected a tensor of shape (" in scalar
    assert (
        "expected mse, l1, huber or FILE.py:callable" in cli("eval", *words, "--loss", "x").message
    )


@pytest.mark.parametrize("command", ["fix", "eval"])
def test_a_loss_that_fails_on_an_example_is_refused_by_its_name(cli, folder, tmp_path, command):
    x, y = data_of("regression", 200)
    out = tmp_path / "out.safetensors"
    more = ["-o", out] if command == "fix" else []
    for row in (3, 150):
        targets = y.clone()
        targets[row:, 0] = 7
        np.savez(tmp_path / "holed.npz", inputs=x.numpy(), targets=targets.numpy())
        words = words_of(folder, "regression", tmp_path / "holed.npz")
        found = cli(command, *words, *more, "--loss", f"{folder / 'nets.py'}:holed")
        assert found.code == 2
        named = re.search(r"nets.py:holed: not finite for example (\d+) \(from 0\)", found.message)
        assert int(named[1]) == row if command == "eval" else int(named[1]) >= row
        assert not out.exists()


def test_a_broken_network_is_not_the_fault_of_the_loss(cli, folder, tmp_path):
    state = torch.load(folder / "regression.pth")
    state["3.weight"] = state["3.weight"] * 1e25
    torch.save(state, tmp_path / "broken.pth")
    words = words_of(folder, "regression")[1:]
    loss = ["--loss", f"{folder / 'nets.py'}:square"]
    found = cli("eval", tmp_path / "broken.pth", *words, *loss)
    assert found.code == 0, found.err
    assert "cannot be evaluated" in found.out


def test_a_loss_cut_from_its_graph_is_named(cli, folder, tmp_path):
    words = [*words_of(folder, "regression"), "--loss", f"{folder / 'nets.py'}:cut"]
    said = cli("finetune", *words, "-o", tmp_path / "out.safetensors").message
    assert "nets.py:cut: returned losses without a gradient" in said


def test_names_are_no_emoji(cli, folder, tmp_path):
    words = words_of(folder, "regression")
    assert "o.py:star: no such file" in cli("eval", *words, "--loss", "bad/o.py:star").message
    path = tmp_path / "a:boom:.pth"
    path.write_bytes(words[0].read_bytes())
    found = cli("eval", path, *words[1:])
    assert "a:boom:" in found.out
    assert "\U0001f4a5" not in found.out + found.err


def test_masks_that_do_not_fit_are_refused_in_one_line(cli, folder, tmp_path):
    x, y = data_of("segmentation", 8)
    masked = y.clone()
    masked[5, 0, 0] = 7
    for name, masks, said in (
        ("size", y[:, :5], "masks: 5x5, expected 6x5 as the inputs or 6x5 as the outputs"),
        ("classes", masked, "masks: item 5 has class 7, expected 0 to 2, because the model has 3"),
        ("float", y + 0.5, "fit no known task. Give --task"),
    ):
        np.savez(tmp_path / f"{name}.npz", inputs=x.numpy(), targets=masks.numpy())
        words = words_of(folder, "segmentation", tmp_path / f"{name}.npz")
        assert said in cli("eval", *words).message


@pytest.mark.parametrize(
    "task", [{"task": "poetry"}, {"task": 5}, {"loss": 5}, {"ignore_index": "a"}, {"x": 1}, [1]]
)
def test_a_strange_task_in_a_header_is_refused(task, tmp_path):
    path, again = tmp_path / "net.safetensors", tmp_path / "again.safetensors"
    bnfix.save(net_of("regression"), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()["bnfix"])
    save_file(load_file(path), again, metadata={"bnfix": json.dumps({**header, "task": task})})
    with pytest.raises(CheckpointError, match=r"its bnfix header|the task in its header"):
        bnfix.load(again, model=net_of("regression"))


def test_files_of_two_tasks_are_not_compared(cli, folder):
    multilabel, regression = (words_of(folder, task) for task in ("multilabel", "regression"))
    found = cli("eval", regression[0], *multilabel, "--task", "regression", "--json").json
    assert set(METRICS["regression"]) < set(found["models"][0])
    done = cli("eval", *regression, "--report", folder / "said").out
    said = [done, *((folder / "said" / f"report.{k}").read_text() for k in ("md", "html"))]
    for text in said:
        assert "500 examples" in text
        assert "500 images" not in text
    for text in said[1:]:
        assert "Examples/s" in text
        assert "a mean over examples" in text
    assert len(found["ranking"]) == 2
    assert set(found["ranking"][0]) >= {"rank", "name", "loss"}
    assert "number for each output" not in cli("eval", *multilabel).err
    forced = cli("eval", *regression, "--task", "classification").message
    assert "fit no classification, expected logits (N, K) and integer labels (N,)" in forced


@pytest.mark.parametrize("command", ["calibrate", "finetune", "inspect", "convert"])
def test_other_commands_take_any_task(cli, folder, command, tmp_path):
    out = ["-o", tmp_path / "out.safetensors"] if command != "inspect" else []
    outcome = cli(command, *words_of(folder, "segmentation"), *out, "--json")
    assert outcome.code == 0, outcome.err
    if command in ("calibrate", "finetune"):
        assert outcome.json["verdict"] == "better"
        assert outcome.json["models"][1]["miou"] > outcome.json["models"][0]["miou"]
