"""The head moved exactly, and a temperature as a candidate that others must beat."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import bnfix
from bnfix.core.errors import ModelError
from bnfix.metrics.evaluate import tempered
from bnfix.training.parameters import find_head, move_logits_
from tests.conftest import images_of, inputs_of


def linear(classes, bias=True):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, classes, bias))


def pooled(classes, bias=True):
    """As SqueezeNet ends: ReLU and a mean after the convolution, which keep a scale above 0."""
    head = nn.Conv2d(3, classes, 1, bias=bias)
    return nn.Sequential(head, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def some(make, classes=4, seed=0, bias=True):
    torch.manual_seed(seed)
    net = make(classes, bias).double().eval()
    return net, torch.randn(7, 3, 2, 2, dtype=torch.float64)


@pytest.mark.parametrize("make", [linear, pooled])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("classes", "t"), [(1, 0.3), (2, 1.0), (7, 4.5)])
def test_logits_are_divided_exactly(make, bias, classes, t):
    net, x = some(make, classes, bias=bias)
    before = net(x)
    move_logits_(net, find_head("a test", net, [(x,)]), (x,), 1 / t)
    torch.testing.assert_close(net(x), before / t, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("classes", [2, 5])
def test_logits_are_shifted_exactly(classes):
    net, x = some(linear, classes)
    before, shift = net(x), torch.linspace(-2, 1, classes, dtype=torch.float64)
    move_logits_(net, net[-1], (x,), 1.0, shift)
    torch.testing.assert_close(net(x), before + shift, rtol=1e-12, atol=1e-14)


class LogSoftmax(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 4)

    def forward(self, x):
        return self.fc(x.flatten(1)).log_softmax(1)


class Tied(nn.Module):
    """Its last layer is also its first."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 12)

    def forward(self, x):
        return self.fc(F.relu(self.fc(x.flatten(1))))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(12, 4), nn.Linear(12, 4)

    def forward(self, x):
        return (self.one(x.flatten(1)) + self.two(x.flatten(1))) / 2


def renormalized():
    return nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(12, 4)))


@pytest.mark.parametrize("make", [LogSoftmax, Tied, TwoHeads, renormalized])
def test_a_head_that_the_logits_do_not_follow_is_refused_and_left_as_it_was(make):
    torch.manual_seed(1)
    net, x = make().double().eval(), torch.randn(7, 3, 2, 2, dtype=torch.float64)
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ModelError, match="do not follow their last layer"):
        move_logits_(net, find_head("a test", net, [(x,)]), (x,), 0.5)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_a_shift_that_has_no_place_is_refused():
    net, x = some(linear, bias=False)
    before = net(x)
    with pytest.raises(ModelError, match="has no bias"):
        move_logits_(net, net[-1], (x,), 1.0, torch.ones(4))
    assert torch.equal(net(x), before)
    net, x = some(pooled)
    before = net(x)
    with pytest.raises(ModelError, match="do not follow"):  # a ReLU comes after it
        move_logits_(net, net[0], (x,), 1.0, torch.full((4,), -3.0))
    assert torch.equal(net(x), before)


def test_what_a_classifier_is_judged_by_at_its_temperature():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 200)
    z = torch.from_numpy(4 * rng.normal(size=(200, 3)) + 3 * np.eye(3)[y])
    found = bnfix.evaluate(nn.Identity(), [(z, torch.from_numpy(y))])
    at_it = tempered(found)
    assert found.temperature > 1.5
    assert at_it.nll == found.nll_temperature_scaled < found.nll
    assert at_it.examples.losses.mean() == pytest.approx(at_it.nll)
    blind = -(z.float().double() / found.temperature).log_softmax(1).mean()
    assert at_it.examples.blind_loss == pytest.approx(float(blind), rel=1e-9)
    assert np.array_equal(at_it.examples.scores, found.examples.scores)


# --- the candidate ---


@pytest.fixture
def loud(files, tmp_path):
    """The tiny network with logits that are five times too large."""
    state = torch.load(files.net, weights_only=True)
    state |= {name: 5 * state[name] for name in ("fc.weight", "fc.bias")}
    torch.save(state, tmp_path / "loud.pth")
    images, labels = images_of(400, seed=4)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    return tmp_path / "loud.pth"


def logits(files, state):
    net = files.model().eval()
    net.load_state_dict(state)
    with torch.no_grad():
        return net(inputs_of(images_of(40, seed=9)[0]))


ALONE = ("--statistics", "keep", "--example-weight", "keep")


def test_a_temperature_alone_is_written_into_the_head(files, cli, loud, tmp_path):
    out = tmp_path / "out.safetensors"
    data = loud.with_name("data.npz")
    words = ["--data", data, "--test", files.test, *files.common, *ALONE]
    told = cli("calibrate", loud, *words, "--temperature", "auto", "--json", "-o", out).json
    (decision,) = told["decisions"]
    assert (decision["stage"], decision["admitted"]) == ("temperature", True)
    assert decision["incumbent"] == "as it was"
    t = float(decision["candidate"].removeprefix("temperature "))
    assert t > 2
    assert told["models"][1]["name"] == f"output: temperature {t:.3g}"
    assert told["models"][1]["top1"] == told["models"][0]["top1"]
    assert (told["verdict"], told["temperature_only"]) == ("better", True)
    assert "divided by" in " ".join(told["assumptions"])
    assert told["options"]["gate"]["temperature"] == "auto"
    with safe_open(out, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}
        history = json.loads(file.metadata()["bnfix"])["history"]
    was = logits(files, torch.load(loud, weights_only=True))
    torch.testing.assert_close(
        logits(files, state), was / t, rtol=1e-2, atol=1e-4
    )  # t has 3 digits
    assert history[-1]["results"]["output"] == decision["candidate"]
    again = cli("eval", out, "--data", files.test, *files.common, "--json").json["models"][0]
    assert again["nll"] == pytest.approx(told["models"][1]["nll"], rel=1e-6)


def test_others_must_win_by_more_than_a_temperature(files, cli, loud, tmp_path):
    """Each is judged at its own; the output has that of what was kept."""
    data, gate = loud.with_name("data.npz"), ("--granularity", "global", "--json")
    words = ["--data", data, "--test", files.test, *files.common, *gate]
    found = [
        cli("calibrate", loud, *words, "--temperature", how, "-o", tmp_path / f"{how}.safetensors")
        for how in ("auto", "keep")
    ]
    first, *others = found[0].json["decisions"]
    standing = first
    for d in others:
        assert d["incumbent"] == standing["candidate"]
        # The first one's was fitted on fit; at its own, by halves of select, it is near that.
        near = 0.1 if standing is first else 1e-6
        assert d["incumbent_nll"] == pytest.approx(standing["nll"], rel=near)
        standing = d if d["admitted"] else standing
    raw = {d["candidate"]: d["nll"] for d in found[1].json["decisions"]}
    assert first["candidate"] not in raw
    shared = [d for d in others if d["candidate"] in raw]
    assert shared
    assert all(d["nll"] < raw[d["candidate"]] for d in shared)
    tempered, plain = (one.json["models"][1] for one in found)
    assert tempered["name"].startswith(f"output: {standing['candidate']}")
    assert "temperature " in tempered["name"]
    assert tempered["nll"] < plain["nll"]


def test_a_temperature_stays_beside_a_prior_that_no_test_judges(files, cli, loud, tmp_path):
    """The prior weighs more once the network is less sure, and all is worse on the old balance."""
    out, prior = tmp_path / "out.safetensors", tmp_path / "prior.json"
    equal, one = {"0": 1, "1": 1, "2": 1}, {"0": 9998, "1": 1, "2": 1}
    prior.write_text(json.dumps({"from": equal, "to": one}))
    data = ["--data", loud.with_name("data.npz"), "--test", files.test]
    words = [*data, *files.common, *ALONE, "--temperature", "auto", "--class-prior", prior]
    told = cli("calibrate", loud, *words, "--json", "-o", out).json
    name = told["models"][1]["name"]
    assert name.startswith("output: temperature ")
    assert name.endswith(", class prior")
    assert told["verdict"] == "worse"
    assert "was significantly worse" not in " ".join(told["assumptions"])


def test_a_calibrated_network_keeps_its_head(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--data", files.data, *files.common, *ALONE, "--temperature", "auto", "--z", "1000"]
    told = cli("calibrate", files.net, *words, "--json", "-o", out).json
    assert [d["admitted"] for d in told["decisions"]] == [False]
    with safe_open(out, framework="pt") as file:
        for name, tensor in torch.load(files.net, weights_only=True).items():
            assert torch.equal(file.get_tensor(name), tensor)


def test_where_no_temperature_can_be_tried_it_is_said(files, cli, tmp_path):
    (tmp_path / "nets.py").write_text(
        (files.folder / "nets.py").read_text() + "\nclass Log(Net):\n"
        "    def forward(self, x):\n        return super().forward(x).log_softmax(1)\n"
        "def log():\n    return Log(3)\n"
    )
    words = ["--data", files.data, *files.common, *ALONE, "--temperature", "auto", "--json"]
    model = ["--model", f"{tmp_path / 'nets.py'}:log"]
    told = cli("calibrate", files.net, *words, *model, "-o", tmp_path / "a.safetensors").json
    assert "a temperature was not tried: the logits do not follow" in " ".join(told["assumptions"])
    assert told["decisions"] == []
    told = cli(
        "calibrate", files.net, *words, "--labels", "none", "-o", tmp_path / "b.safetensors"
    ).json
    assert "--temperature auto did nothing: it needs labels." in told["assumptions"]
    wrong = cli(
        "fix", files.net, "--data", files.data, "--temperature", "2", "-o", tmp_path / "c.x"
    )
    assert "--temperature: '2' is not known" in wrong.message


def test_the_plan_names_the_temperature(files, cli, tmp_path):
    words = ["--data", files.data, *files.common, "--temperature", "auto", "--plan", "--json"]
    told = cli("calibrate", files.net, *words, "-o", tmp_path / "out.safetensors").json
    assert told["stages"][0] == "temperature of the logits"
