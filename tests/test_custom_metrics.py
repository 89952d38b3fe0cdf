"""The user's own metrics: numbers by hand, intervals, other tasks, and every way they go wrong."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnfix.core.errors import ConfigError
from bnfix.metrics.beside import N_CUSTOM, custom_metrics, import_metric
from bnfix.metrics.evaluate import Outputs
from tests.conftest import images_of, inputs_of

METRICS = """
import numpy as np
import torch

NUMBER = 3


def wrong(outputs, labels):
    return (outputs.argmax(1) != labels).mean()


def several(outputs, labels):
    return {"largest": outputs.max(), "mean": torch.tensor(outputs).mean(), "n": len(labels)}


def of_class_2(outputs, labels):
    return outputs[labels == 2].sum() / (labels == 2).sum() if (labels == 2).any() else 1 / 0


def broken(outputs, labels):
    raise KeyError("no such thing")


def text(outputs, labels):
    return "good"


def vector(outputs, labels):
    return outputs.mean(0)


def pixels(outputs, labels):
    assert outputs.shape[1:] == (2, 8, 8), outputs.shape
    return float(np.abs(outputs).mean())


class Space:
    @staticmethod
    def wrong(outputs, labels):
        return 0.0


def forward(model, batch):
    x = torch.relu(model.bn1(model.conv1(batch[0])))
    return x[:, :2]
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "own.py"
    path.write_text(METRICS)
    return path


def outputs_of(n=80, seed=0, k=3):
    rng = np.random.default_rng(seed)
    return Outputs(rng.normal(size=(n, k)).astype(np.float32), rng.integers(0, k, n), 1.0)


def test_a_metric_of_the_users_stands_beside_the_others(cli, files, own):
    words = ["--data", files.test, *files.common, "--json", "--metric"]
    words += [f"{own}:wrong", "--metric", f"{own}:several"]
    found = cli("eval", files.stale, files.net, *words).json
    first, last = (model["custom"] for model in found["models"])
    assert list(last) == ["wrong", "several.largest", "several.mean", "several.n"]
    assert last["wrong"]["value"] == pytest.approx(1 - found["models"][1]["top1"])
    images, _ = images_of(120, seed=3)
    with torch.no_grad():
        logits = files.trained()(inputs_of(images))
    assert last["several.largest"]["value"] == pytest.approx(float(logits.max()), rel=1e-5)
    assert last["several.n"] == {
        "value": 120, "interval": [120, 120],
        "difference": {"difference": 0, "interval": [0, 0]},
    }  # fmt: skip
    assert first["wrong"]["difference"] is None
    change = last["wrong"]["difference"]
    assert change["difference"] == pytest.approx(last["wrong"]["value"] - first["wrong"]["value"])
    low, high = change["interval"]
    assert low < change["difference"] < high < 0  # the stale one is clearly worse
    # Without the option, nothing of it is there.
    plain = cli("eval", files.net, "--data", files.test, *files.common, "--json").json
    assert "custom" not in plain["models"][0]
    assert plain["models"][0]["nll"] == found["models"][1]["nll"]


def test_the_interval_is_the_bootstraps(own):
    """A fraction of n has the standard error sqrt(p (1 - p) / n); 200 resamples give 15% of it."""
    outputs = outputs_of(400)
    ((found,),) = custom_metrics([import_metric(f"{own}:wrong")], [outputs], seed=1)
    p = float((outputs.outputs.argmax(1) != outputs.labels).mean())
    assert found.value == pytest.approx(p)
    low, high = found.interval
    assert high - low == pytest.approx(2 * 1.96 * (p * (1 - p) / 400) ** 0.5, rel=0.3)
    again = custom_metrics([import_metric(f"{own}:wrong")], [outputs], seed=1)
    assert again == [(found,)]
    other = custom_metrics([import_metric(f"{own}:wrong")], [outputs], seed=2)[0][0]
    assert other.value == found.value
    assert other.interval != found.interval


def test_the_same_outputs_differ_by_nothing(own):
    outputs = outputs_of()
    _, (row,) = custom_metrics([import_metric(f"{own}:wrong")], [outputs, outputs])
    assert (row.difference, row.difference_interval) == (0, (0, 0))


def test_a_metric_that_some_resamples_have_not_has_a_value_and_no_interval(own):
    labels = np.zeros(30, np.int64)
    labels[4] = 2
    outputs = Outputs(np.arange(90, dtype=np.float32).reshape(30, 3), labels, 1.0)
    (row,), (other,) = custom_metrics([import_metric(f"{own}:of_class_2")], [outputs] * 2)
    assert row.value == 12 + 13 + 14
    assert row.interval is None
    assert (other.difference, other.difference_interval) == (0, None)


def test_outputs_too_many_to_be_copied_that_often_have_no_interval(own, monkeypatch):
    metric = import_metric(f"{own}:wrong")
    ((bounded,),) = custom_metrics([metric], [outputs_of()])
    monkeypatch.setattr("bnfix.metrics.beside.MOST_BYTES", outputs_of().outputs.nbytes - 1)
    ((row,),) = custom_metrics([metric], [outputs_of()])
    assert (row.value, row.interval) == (bounded.value, None)
    assert bounded.interval is not None


def test_a_method_and_an_installed_function_can_be_named(own):
    name, function = import_metric(f"{own}:Space.wrong")
    assert (name, function(None, None)) == ("Space.wrong", 0.0)
    name, function = import_metric("math:hypot")
    assert (name, function(3, 4)) == ("hypot", 5)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("{}:NUMBER", "is of type int, expected a function of \\(outputs, labels\\)"),
        ("{}:wrongg", "there is no wrongg in it. Did you mean wrong"),
        ("{}.no.py:wrong", "no such file"),
        ("nomodule_at_all:f", "there is no module nomodule_at_all"),
        ("wrong", "expected package.module:callable or path/to/file.py:callable"),
        ("{}:", "expected package.module:callable"),
    ],
)
def test_what_is_no_metric_is_refused(own, spec, match):
    with pytest.raises(ConfigError, match=match):
        import_metric(spec.format(own))


@pytest.mark.parametrize(
    ("name", "match"),
    [
        (
            "broken",
            r"broken: failed \(KeyError: 'no such thing', at .*:21\). It is called with outputs of",
        ),
        ("text", "text: returned str, expected a number or a dict of numbers"),
        ("vector", "vector: returned ndarray, expected a number"),
    ],
)
def test_a_metric_that_fails_or_returns_something_else_is_a_stated_error(own, name, match):
    with pytest.raises(ConfigError, match=match):
        custom_metrics([import_metric(f"{own}:{name}")], [outputs_of()])


def test_two_of_one_name_are_refused(own):
    twice = [import_metric(f"{own}:wrong")] * 2
    with pytest.raises(ConfigError, match="two metrics named wrong"):
        custom_metrics(twice, [outputs_of()])


def test_the_command_says_so_before_the_data_are_read(cli, files, own):
    said = cli("eval", files.net, "--data", "nowhere", *files.common, "--metric", f"{own}:no")
    assert said.code == 2
    assert "there is no no in it" in said.message


def test_the_users_code_is_called_as_often_as_stated(own):
    calls = []

    def metric(outputs, labels):
        calls.append((outputs.shape, labels.shape))
        return 1.0

    custom_metrics([("metric", metric)], [outputs_of(7)])
    assert calls == [((7, 3), (7,))] * (1 + N_CUSTOM)


# --- other tasks than classification ---


def test_with_forward_outputs_need_not_be_logits(cli, files, own, tmp_path):
    words = ["--data", files.test, *files.common, "--forward", f"{own}:forward"]
    words += ["--metric", f"{own}:pixels"]
    found = cli("eval", files.stale, files.net, *words, "--json", "--report", tmp_path).json
    images, _ = images_of(120, seed=3)
    model = files.trained()
    with torch.no_grad():
        maps = torch.relu(model.bn1(model.conv1(inputs_of(images))))[:, :2]
    value = found["models"][1]["custom"]["pixels"]["value"]
    assert value == pytest.approx(float(maps.abs().mean()), rel=1e-5)
    assert found["models"][1]["top1"] is None
    assert found["models"][1]["n_examples"] == 120
    assert found["verdict"] is None
    assert found["paired"][0]["verdict"] is None
    sentence = found["verdict_sentence"]
    assert sentence.startswith(f"On 120 images: pixels {value:.3f} (")
    assert sentence.endswith(" with stale.pth); the outputs are not class logits.")
    page = (tmp_path / "report.html").read_text()
    assert "Your own metrics" in page
    assert ">pixels<" in page
    said = cli("eval", files.net, *words, "--predictions", tmp_path / "p.csv").message
    assert "the outputs are not class logits" in said
    assert not (tmp_path / "p.csv").exists()


def test_without_a_metric_such_outputs_are_refused_as_before(cli, files, own):
    words = ["--data", files.test, *files.common, "--forward", f"{own}:forward"]
    assert "expected logits (N, classes)" in cli("eval", files.net, *words).message
