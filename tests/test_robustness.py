"""Batch invariance: networks that look at their neighbours are found, others are not accused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import bnfix
from bnfix.core.errors import ConfigError, DataError
from bnfix.metrics.robustness import (
    STREAMS,
    Moved,
    Recorded,
    batch_invariance,
    in_stream,
    moved,
    streams_of,
)

X = torch.from_numpy(np.random.default_rng(0).normal(size=(40, 3, 6, 6))).float()


def batches_of(positions, size):
    return [(X[positions[i : i + size]],) for i in range(0, len(positions), size)]


def net(**norm):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **norm), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


def test_a_network_in_evaluation_is_invariant_and_one_of_batch_statistics_is_not():
    plain, batch = net(), net(track_running_stats=False)
    index = np.arange(40)
    first, second = batch_invariance(["a", "b"], [plain, batch], batches_of, index, 8)
    assert first.invariant
    assert first.alone.top1_agreement == first.permuted.top1_agreement == 1
    assert first.alone.largest_difference < 1e-5 * first.largest_logit
    assert not second.invariant
    assert second.permuted.largest_difference > 0.01 * second.largest_logit
    assert (second.model, second.n_examples, second.batch_size) == ("b", 40, 8)


def test_the_differences_are_those_by_hand():
    model = net(track_running_stats=False).eval()
    with torch.no_grad():
        together = torch.cat([model(X[i : i + 8]) for i in range(0, 40, 8)])
        alone = torch.cat([model(X[i : i + 1]) for i in range(40)])
    (row,) = batch_invariance(["a"], [model], batches_of, np.arange(40), 8)
    assert row.alone.largest_difference == pytest.approx(
        float((together - alone).abs().max()), rel=1e-4
    )
    same = (together.argmax(1) == alone.argmax(1)).double().mean()
    assert row.alone.top1_agreement == float(same)
    assert row.largest_logit == pytest.approx(float(together.abs().max()), rel=1e-5)


def test_modes_are_left_as_found():
    model = net().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    batch_invariance(["a"], [model], batches_of, np.arange(8), 4)
    assert model.training
    assert model[1].training
    for name, tensor in model.state_dict().items():
        assert (tensor == before[name]).all()


def test_batches_that_lose_examples_are_refused():
    def short(positions, size):
        return [(X[positions[:-1]],)]

    with pytest.raises(DataError, match="39, 39 and 39 outputs for 40 examples"):
        batch_invariance(["a"], [net()], short, np.arange(40), 8)


def test_the_command_has_a_row_a_model(cli, files, tmp_path):
    words = ["--data", files.test, *files.common, "--compare-batch-sizes", "--json"]
    found = cli("eval", files.stale, files.net, *words, "--report", tmp_path).json
    rows = found["batch_invariance"]
    assert [row["model"] for row in rows] == ["stale.pth", "net.pth"]
    for row in rows:
        assert row["invariant"] is True
        assert row["n_examples"] == 120
        assert row["batch_size"] == 60
        for key in ("alone", "permuted"):
            assert row[key]["top1_agreement"] == 1
            assert 0 <= row[key]["largest_difference"] < 1e-4
    for name in ("report.md", "report.html"):
        text = (tmp_path / name).read_text()
        assert "Batch invariance" in text
        assert "120 images in batches of 60" in text


def test_the_command_finds_a_network_that_looks_at_its_neighbours(cli, files, tmp_path):
    (tmp_path / "near.py").write_text(
        "from torch import nn\n"
        "def build():\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, "
        "track_running_stats=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), "
        "nn.Linear(6, 3))\n"
    )
    names = {}
    exec((tmp_path / "near.py").read_text(), names)
    torch.manual_seed(0)
    torch.save(names["build"]().state_dict(), tmp_path / "near.pth")
    words = ["--model", f"{tmp_path / 'near.py'}:build", "--data", files.test, "--workers", "0"]
    found = cli("eval", tmp_path / "near.pth", *words, "--compare-batch-sizes", "--json").json
    assert found["batch_invariance"][0]["invariant"] is False


# ---- the same images in other orders ------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 2, 7, 20])
@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_has_every_image_once_in_its_order(name, size):
    labels = np.random.default_rng(0).integers(0, 4, 101)
    order = in_stream(name, labels, size, seed=3)
    assert sorted(order) == list(range(101))
    assert np.array_equal(order, in_stream(name, labels, size, seed=3))
    drawn = labels[order]
    if name == "sorted":
        assert np.array_equal(drawn, np.sort(labels))
        assert not np.array_equal(order, np.argsort(labels, kind="stable"))
    if name == "mixed" and size == 20:
        # The first half of a batch goes on by class, and the other half holds several classes.
        assert np.array_equal(drawn[:10], np.zeros(10))
        assert len(set(drawn[10:20])) > 1


def test_streams_are_read_from_a_list():
    assert streams_of("sorted,iid") == ("sorted", "iid")
    with pytest.raises(ConfigError, match="--streams: sorted is given 2 times, expected once"):
        streams_of("sorted,iid,sorted")
    with pytest.raises(ConfigError, match=r"--streams: 'random' is not known. Use one of: iid"):
        streams_of("iid,random")


def test_the_command_has_a_row_a_stream_and_model(cli, files, tmp_path):
    near = tmp_path / "near.safetensors"
    model = bnfix.load(files.net, files.model())
    bnfix.swap_norms_(model, batch_weight=1.0)
    bnfix.save(model, near)
    words = ("eval", files.net, near, "--data", files.test, *files.common, "--workers", "0",
             "--batch-size", "20")  # fmt: skip
    done = cli(*words, "--streams", "iid,sorted,mixed,single", "--json", "--report", tmp_path)
    rows = done.json["streams"]
    assert [(row["stream"], row["batch_size"]) for row in rows[::2]] == [
        ("iid", 20), ("sorted", 20), ("mixed", 20), ("single", 1),
    ]  # fmt: skip
    stock, batched = rows[::2], rows[1::2]
    top1 = done.json["models"][0]["top1"]
    assert {row["top1"] for row in stock} == {top1}
    assert all(abs(row["nll"] - stock[0]["nll"]) < 1e-5 for row in stock)
    found = {row["stream"]: row["nll"] for row in batched}
    assert found["sorted"] > found["iid"]
    assert batched[1]["paired"]["nll"]["difference"] == pytest.approx(
        batched[1]["nll"] - stock[1]["nll"]
    )
    for kind in ("md", "html"):
        text = (tmp_path / f"report.{kind}").read_text()
        assert "In other orders (streams)" in text
        assert "Under common corruptions" not in text
    assert "sorted 20" in cli(*words, "--streams", "sorted").out
    assert "streams" not in cli(*words, "--json").json


def test_streams_need_labels(cli, files):
    outcome = cli("eval", files.net, "--data", files.flat, *files.common, "--streams", "iid")
    assert outcome.code == 2
    assert "--streams: the examples have no labels" in outcome.message


def test_different_preprocessing_is_said_beside_the_verdict(cli, files, tmp_path):
    stored = tmp_path / "stored.safetensors"
    model = bnfix.load(files.net, files.model())
    own = bnfix.settings.Preprocessing(mean=(0.5,), std=(0.25,))
    bnfix.save(model, stored, preprocessing=own)
    words = ("eval", files.net, stored, "--data", files.test, "--model", files.spec, "--workers",
             "0", "--json")  # fmt: skip
    done = cli(*words).json
    assert (
        "The two had different preprocessing (net.pth: mean 0.485,0.456,0.406, std "
        "0.229,0.224,0.225; stored.safetensors: mean 0.5, std 0.25), which can decide the result. "
        "State --mean, --std to give both the same."
    ) in done["verdict_sentence"]
    assert [m["preprocessing"]["std"] for m in done["models"]] == [[0.229, 0.224, 0.225], [0.25]]
    same = cli(*words, "--mean", "0.5,0.5,0.5", "--std", "0.25").json
    assert same["verdict"] == "same"
    assert "different preprocessing" not in same["verdict_sentence"]


def test_classes_of_outputs_that_are_not_finite_are_not_counted():
    outputs = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
    after = Recorded([outputs], [outputs.argmax(1)], 2)
    for broken in (torch.nan, torch.inf):
        before = Recorded([outputs * broken], [torch.zeros(2)], 2)
        assert moved(before, after) == Moved(None, None, 2)
        assert moved(after, before) == Moved(None, None, 2)
