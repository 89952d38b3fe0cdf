"""Another class balance: its shares estimated by EM, and its shift folded into the head."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bnfix.metrics.beside import LEAST_SHARE, estimate_shares
from tests.conftest import images_of, inputs_of

ALONE = ("--statistics", "keep", "--example-weight", "keep", "--json")


def slow_em(logits, old, steps):
    """The same by loops over examples and classes, in Python's own numbers."""
    k = len(old)
    posteriors = []
    for row in logits.tolist():
        powers = [math.exp(z - max(row)) for z in row]
        posteriors.append([p / sum(powers) for p in powers])
    new = list(old)
    for _ in range(steps):
        total = [0.0] * k
        for p in posteriors:
            weighed = [p[j] * new[j] / old[j] for j in range(k)]
            total = [t + w / sum(weighed) for t, w in zip(total, weighed, strict=True)]
        new = [t / len(posteriors) for t in total]
    return new


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 3), (37, 2), (50, 5)])
def test_em_is_that_of_a_slow_reference(n, k):
    rng = np.random.default_rng(n)
    old = rng.dirichlet(np.full(k, 5.0))
    logits = rng.normal(size=(n, k)).astype(np.float32)
    found, slow = estimate_shares(logits, old), np.array(slow_em(logits.astype(float), old, 3000))
    assert found.sum() == pytest.approx(1, rel=1e-12)
    # Both near the maximum: where a share goes to 0 the steps shrink like 1/t².
    np.testing.assert_allclose(found, slow, atol=1e-4)


@pytest.mark.parametrize("true", [[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.0, 0.9, 0.1]])
def test_em_finds_the_balance_of_a_mixture(true):
    """Gaussian classes under their exact posteriors, trained with other shares; 4,000 examples.

    The bound is 4 standard errors: labels alone have sqrt(s (1-s) / n), and the classes overlap, so
    that the information is that of a larger variance; its Fisher matrix is computed here.
    """
    n, old = 4000, np.array([0.2, 0.3, 0.5])
    centres = np.array([[0.0, 0], [2, 0], [0, 2]])
    rng = np.random.default_rng(1)
    y = rng.choice(3, n, p=true)
    x = centres[y] + rng.normal(size=(n, 2))
    log_density = -((x[:, None] - centres) ** 2).sum(2) / 2
    found = estimate_shares((log_density + np.log(old)).astype(np.float32), old)
    density = np.exp(log_density)
    free = (density - density[:, -1:])[:, :-1] / (density @ np.asarray(true))[:, None]
    errors = np.sqrt(np.diag(np.linalg.inv(free.T @ free)))
    assert (np.abs(found - true)[:-1] < 4 * errors).all()
    assert errors.max() < 0.03
    assert found.min() >= 0


# --- the option ---


def weights(path):
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def logits(files, path):
    net = files.model().double().eval()
    net.load_state_dict({k: v for k, v in weights(path).items() if k in net.state_dict()})
    with torch.no_grad():
        return net(inputs_of(images_of(40, seed=9)[0]).double())


def written(folder, content):
    path = folder / "prior.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def balanced(path, counts, seed):
    """Images with so many of each class; more are drawn than are taken."""
    images, labels = images_of(3 * max(counts), seed)
    index = np.concatenate([np.flatnonzero(labels == k)[:n] for k, n in enumerate(counts)])
    np.savez(path, images=images[index], labels=labels[index])
    return path


@pytest.mark.parametrize("start", ["net", "stale"])
def test_the_shift_is_exact_and_stays_unjudged(files, cli, tmp_path, start):
    """On images of the old balance the output is worse, and is what was asked for all the same."""
    out, shares = tmp_path / "out.safetensors", [970, 20.0, 10]
    prior = written(
        tmp_path, {"to": dict(zip("012", shares, strict=True)), "from": {"0": 1, "1": 1, "2": 2}}
    )
    words = ["--data", files.data, "--test", files.test, *files.common, "--class-prior", prior]
    more = (
        ALONE if start == "net" else ("--statistics", "auto", "--json", "--granularity", "global")
    )
    done = cli("calibrate", getattr(files, start), *words, *more, "-o", out).json
    name = done["models"][1]["name"]
    assert name.endswith("class prior")
    notes = " ".join(done["assumptions"])
    assert "not judged by these images" in notes
    assert "0 from 0.25 to 0.97" in notes
    assert done["options"]["gate"]["class_prior"] == str(prior)
    assert done["options"]["class_prior"] == {"from": [0.25, 0.25, 0.5], "to": [0.97, 0.02, 0.01]}
    shift = torch.tensor([0.97, 0.02, 0.01]).double().div(torch.tensor([0.25, 0.25, 0.5])).log()
    before = weights(getattr(files, start))
    torch.testing.assert_close(
        weights(out)["fc.bias"].double(), before["fc.bias"] + shift, rtol=0, atol=1e-6
    )
    if start == "net":
        assert done["verdict"] == "worse"
        was = logits(files, files.net)
        torch.testing.assert_close(logits(files, out), was + shift, rtol=0, atol=1e-6)
    else:
        # New statistics help with the prior, too, so that the test does not take them back.
        assert name.startswith("output: statistics")
        assert not torch.equal(weights(out)["bn1.running_mean"], before["bn1.running_mean"])


def test_the_same_balance_changes_no_bit(files, cli, tmp_path):
    """With the old shares from the file, and counted in the labels."""
    out, prior = tmp_path / "out.safetensors", tmp_path / "prior.json"
    words = ["--data", balanced(tmp_path / "d.npz", (60, 60, 60), 2), "--test", files.test]
    words += [*files.common, *ALONE, "--class-prior", prior]
    both = {"from": {"0": 3, "1": 1, "2": 1}, "to": {"0": 30, "1": 10, "2": 10}}
    for content in (both, {"0": 7, "1": 7, "2": 7}):
        written(tmp_path, content)
        done = cli("calibrate", files.net, *words, "--force", "-o", out).json
        assert "the same, so the head is unchanged" in " ".join(done["assumptions"])
        for key, tensor in weights(files.net).items():
            assert torch.equal(weights(out)[key], tensor), key


def test_a_class_that_never_comes_keeps_a_finite_logit(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    prior = written(tmp_path, {"class 0": 0, "1": 5, "class 2": 5})  # by name or by index
    words = ["--data", files.folders, *files.common, *ALONE, "--class-prior", prior]
    done = cli("calibrate", files.net, *words, "-o", out).json
    assert done["options"]["class_prior"]["to"] == [0, 0.5, 0.5]
    old = torch.tensor(done["options"]["class_prior"]["from"]).double()
    moved = logits(files, out) - logits(files, files.net)
    expected = torch.tensor([LEAST_SHARE, 0.5, 0.5]).double().div(old).log()
    torch.testing.assert_close(moved, expected.expand_as(moved), rtol=1e-5, atol=1e-6)
    assert (logits(files, out).argmax(1) != 0).all()


def test_a_test_of_the_new_balance_judges(files, cli, tmp_path):
    """Once it helps; a second time it is too much, and is put back."""
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    test = balanced(tmp_path / "test.npz", (540, 30, 30), 7)
    prior = written(tmp_path, {"from": {"0": 1, "1": 1, "2": 1}, "to": {"0": 18, "1": 1, "2": 1}})
    words = ["--data", files.data, "--test", test, *files.common, *ALONE, "--class-prior", prior]
    done = cli("calibrate", files.net, *words, "-o", once).json
    assert done["verdict"] == "better"
    assert "have the new balance and judged it" in " ".join(done["assumptions"])
    words[3] = balanced(tmp_path / "less.npz", (450, 75, 75), 7)
    done = cli("calibrate", once, *words, "-o", twice).json
    assert "so the output is the input" in " ".join(done["assumptions"])
    assert torch.equal(weights(twice)["fc.bias"], weights(once)["fc.bias"])


@pytest.mark.parametrize("stated", [False, True])
def test_em_estimates_on_images_without_labels(files, cli, tmp_path, stated):
    data = balanced(tmp_path / "new.npz", (300, 50, 50), 8)
    old = np.array([0.5, 0.25, 0.25]) if stated else np.ones(3) / 3
    content = {"from": {"0": 2, "1": 1, "2": 1}, "to": "em"}
    prior = written(tmp_path, content) if stated else "em"
    words = ["--data", data, "--labels", "none", *files.common, *ALONE, "--class-prior", prior]
    out = tmp_path / "out.safetensors"
    done = cli("calibrate", files.net, *words, "-o", out).json
    with torch.no_grad():
        z = files.trained()(inputs_of(np.load(data)["images"])).double()
    expected = np.array(slow_em(z, old, 300))
    shares = done["options"]["class_prior"]
    np.testing.assert_allclose(shares["from"], old)
    np.testing.assert_allclose(shares["to"], expected, atol=1e-4)
    assert expected[0] > old[0] + 0.05
    notes = " ".join(done["assumptions"])
    assert ("given in" if stated else "old shares assumed to be equal") in notes
    assert "estimated by EM" in notes
    moved = (weights(out)["fc.bias"] - weights(files.net)["fc.bias"]).double().numpy()
    np.testing.assert_allclose(moved, np.log(expected / old), atol=2e-3)


def test_the_plan_names_it(files, cli, tmp_path):
    words = ["--data", files.data, "--labels", "none", *files.common, *ALONE, "--plan"]
    found = cli(
        "calibrate", files.net, *words, "--class-prior", "em", "-o", tmp_path / "a.safetensors"
    ).json
    assert found["stages"] == ["class prior estimated by EM, into the head's bias"]


# --- refusals ---


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[1, 1, 1]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"0": 1, "0": 2, "1": 1, "2": 1}', "duplicate names: 0"),
        ('{"0": NaN, "1": -1, "2": Infinity}', "to: 0: nan.*to: 1: -1.*to: 2: inf"),
        ({"0": True, "1": "x", "2": 1}, "to: 0: True.*to: 1: x"),
        ({"0": True, "1": 1, "2": None}, "to: 0: True.*to: 2: None"),
        ({"0": 1, "cat": 1}, "to: 'cat' is not a class, to: no number for the classes 1, 2"),
        ({"0": 0, "1": 0, "2": 0}, "all numbers are 0"),
        ({"0": 1, "1": 10**400, "2": 1}, "to: 1: 1000"),
        (
            {"from": {"0": 0, "1": 1, "2": 1}, "to": {"0": 1}},
            "from: 0: 0, expected a number above 0",
        ),
        ({"from": "em", "to": "em"}, "from is not an object"),
        ({"to": {"0": 1, "1": 1, "2": 1}, "old": {}}, "'old' is neither from nor to"),
        ({"0\x1b[31m": 1, "1": 1, "2": 1}, r"to: '0\?\[31m' is not a class"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(files, cli, tmp_path, content, problem):
    out, prior = tmp_path / "out.safetensors", written(tmp_path, content)
    words = ["--data", files.data, *files.common, *ALONE, "--class-prior", prior]
    message = cli("calibrate", files.net, *words, "-o", out).message
    assert message.startswith("bnfix: --class-prior ")
    assert re.search(problem, message), message
    assert not out.exists()


def test_what_cannot_hold_a_prior_is_refused(files, cli, tmp_path):
    (tmp_path / "nets.py").write_text(
        (files.folder / "nets.py").read_text() + "\nclass Log(Net):\n"
        "    def forward(self, x):\n        return super().forward(x).log_softmax(1)\n"
        "def log():\n    return Log(3)\n"
        "def bare():\n    net = Net(3)\n    net.fc = nn.Linear(12, 3, bias=False)\n    return net\n"
    )
    torch.save(
        {k: v for k, v in weights(files.net).items() if k != "fc.bias"}, tmp_path / "bare.pth"
    )
    prior, out = written(tmp_path, {"0": 1, "1": 2, "2": 3}), tmp_path / "out.safetensors"

    def refusal(checkpoint, *more, model=None, data=files.data):
        words = [*files.common, *(["--model", f"{tmp_path / 'nets.py'}:{model}"] if model else [])]
        return cli(
            "calibrate", checkpoint, "--data", data, *words, *ALONE, *more, "-o", out
        ).message

    found = refusal(files.net, "--class-prior", prior, model="log")
    assert "--class-prior: cannot be folded in: the logits do not follow" in found
    assert "has no bias" in refusal(tmp_path / "bare.pth", "--class-prior", prior, model="bare")
    assert "em needs data without labels" in refusal(files.net, "--class-prior", "em")
    assert "none.json: no such file" in refusal(files.net, "--class-prior", tmp_path / "none.json")
    two = balanced(tmp_path / "two.npz", (30, 30, 0), 2)
    assert "1 of 3 classes have no labelled image" in refusal(
        files.net, "--class-prior", prior, data=two
    )
    found = refusal(files.stale, "--class-prior", prior, "--reference", files.net, data="none")
    assert "without examples --" in found
    assert "--class-prior" in found
    assert not out.exists()
