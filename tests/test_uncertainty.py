"""Sets of classes with a stated coverage, and accuracy estimated without labels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from bnfix.metrics.beside import conformal_sets, estimate_accuracy, exact_interval
from tests.conftest import images_of


def drawn(n, seed, classes=4, strength=2.0):
    """Logits z and labels drawn from softmax(z): they are calibrated."""
    rng = np.random.default_rng(seed)
    z = rng.normal(0, strength, (n, classes))
    y = (z + rng.gumbel(size=z.shape)).argmax(1)
    return z.astype(np.float32), y


def softmax(z):
    e = np.exp(z.astype(np.float64) - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


@pytest.mark.parametrize(("n", "wanted"), [(2, 0.5), (3, 0.9), (41, 0.8), (400, 0.95)])
def test_sets_as_counted_by_hand(n, wanted):
    z, y = drawn(n, n)
    found = conformal_sets(z, y, wanted, seed=7)
    order = np.random.default_rng(7).permutation(n)
    first, second = order[: n // 2], order[n // 2 :]
    p = softmax(z)
    scores = np.sort(1 - p[first, y[first]])
    place = math.ceil((len(first) + 1) * wanted)
    least = 0.0 if place > len(first) else 1 - scores[place - 1]
    inside = p[second] >= least - 1e-12
    assert (found.n_threshold, found.n_examples) == (len(first), len(second))
    assert found.probability == pytest.approx(least, abs=1e-9)
    assert found.coverage == inside[np.arange(len(second)), y[second]].mean()
    assert found.size == inside.sum(1).mean()
    assert found.empty == (inside.sum(1) == 0).mean()
    assert found.interval == exact_interval(round(found.coverage * len(second)), len(second))


def test_coverage_follows_its_distribution_over_seeded_splits():
    """Of N examples drawn alike, k held ones are beta-binomial: n2 trials, beta(m, n1 + 1 - m)."""
    z, y = drawn(1000, 1)
    m = math.ceil(501 * 0.9)
    low, high = stats.betabinom.ppf([0.025, 0.975], 500, m, 501 - m) / 500
    found = [conformal_sets(z, y, 0.9, seed) for seed in range(20)]
    inside = sum(low <= one.coverage <= high for one in found)
    assert inside >= 16  # 19 expected; the splits share their examples
    assert np.mean([one.coverage for one in found]) == pytest.approx(0.9, abs=0.02)


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 20), (3, 17), (90, 100), (100, 100)])
def test_the_interval_is_clopper_and_pearsons(k, n):
    expected = stats.binomtest(k, n).proportion_ci(0.95, method="exact")
    assert exact_interval(k, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_an_estimate_on_examples_of_the_same_kind_covers_the_truth():
    covered = 0
    for seed in range(20):
        z, y = drawn(1200, 100 + seed)
        found = estimate_accuracy((z[:600], y[:600]), z[600:], seed)
        truth = (z[600:].argmax(1) == y[600:]).mean()
        covered += found.interval[0] <= truth <= found.interval[1]
        assert found.labelled_top1 == (z[:600].argmax(1) == y[:600]).mean()
    # A binomial of 0.9 is below 14 in 0.2% of cases; the truth's own noise is not in the interval.
    assert covered >= 14


def test_an_estimate_as_counted_by_hand():
    z, y = drawn(300, 3)
    new, _ = drawn(200, 4, strength=1.0)
    found = estimate_accuracy((z, y), new, 0)
    n_wrong = int((z.argmax(1) != y).sum())
    from bnfix.metrics.metrics import inverse_temperature

    b = inverse_temperature(z, y)
    sure, sure_of_new = ((p * np.log(p)).sum(1) for p in (softmax(b * z), softmax(b * new)))
    limit = np.sort(sure)[n_wrong]
    assert found.threshold == pytest.approx(limit, abs=1e-5)
    assert found.top1 == pytest.approx((sure_of_new >= limit).mean(), abs=1 / 200)
    assert found.interval[0] <= found.top1 <= found.interval[1]
    assert found.top1 < found.labelled_top1


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_always_or_never_right(right):
    z = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]] * 3
    y = z.argmax(1) if right else (z.argmax(1) + 1) % 3
    found = estimate_accuracy((z, y), z[:2], 0)
    assert found.top1 == found.labelled_top1 == float(right)


# --- eval ---


def test_eval_shows_sets_and_an_estimate_beside_the_truth(files, cli, tmp_path):
    images, labels = images_of(60, seed=6)
    np.savez(tmp_path / "labelled.npz", images=images, labels=labels)
    words = ["--data", files.test, *files.common, "--coverage", 0.8]
    words += ["--estimate-from", tmp_path / "labelled.npz"]
    out = tmp_path / "out"
    told = cli("eval", files.net, files.stale, *words, "--json", "--report", out).json
    assert [row["model"] for row in told["uncertainty"]] == ["net.pth", "stale.pth"]
    for model, row in zip(told["models"], told["uncertainty"], strict=True):
        sets, estimate = row["sets"], row["estimate"]
        assert (sets["wanted"], sets["n_threshold"], sets["n_examples"]) == (0.8, 60, 60)
        assert sets["interval"][0] <= sets["coverage"] <= sets["interval"][1]
        assert (estimate["n_labelled"], estimate["n_examples"]) == (60, 120)
        assert estimate["truth"] == pytest.approx(model["top1"])
    assert told["options"]["coverage"] == 0.8
    for name in ("report.md", "report.html"):
        page = (out / name).read_text()
        assert "Sets of classes that should contain the right one" in page
        assert "An estimate of top-1, not a measurement" in page
        assert "Too few" not in page
    few = cli("eval", files.net, *words[:-4], "--coverage", 0.999)
    assert "too few for that coverage, so sets have all classes" in " ".join(few.out.split())
    missing = cli("eval", files.net, *words[:-1], tmp_path / "none.npz").message
    assert "--estimate-from: DATA" in missing
    shown = cli("eval", files.net, *words).out
    assert "sets of classes" in shown
    assert "estimated top-1" in shown
    hidden = cli("eval", files.net, *words[:-4], *words[-2:], "--labels", "none", "--json").json
    (row,) = hidden["uncertainty"]
    assert row["sets"] is None
    assert row["estimate"]["truth"] is None
    first = told["uncertainty"][0]["estimate"]
    assert row["estimate"]["interval"] == first["interval"]
    plan = cli("eval", files.net, *words, "--plan", "--json").json
    assert plan["coverage"] == 0.8


def test_without_the_options_the_report_has_no_such_key(files, cli):
    told = cli("eval", files.net, "--data", files.test, *files.common, "--json").json
    assert "uncertainty" not in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--coverage", 1], "--coverage: 1.0, expected above 0 and below 1."),
        (["--coverage", 0.9, "--labels", "none"], "--coverage: the examples have no labels."),
        (["--estimate-from", "FLAT"], "has no labels. Give labelled examples."),
        (["--estimate-from", "TEST"], "120 of its examples are also in --data. Give others."),
    ],
)
def test_what_cannot_be_measured_is_refused(files, cli, words, said):
    words = [{"FLAT": files.flat, "TEST": files.test}.get(word, word) for word in words]
    outcome = cli("eval", files.net, "--data", files.test, *files.common, *words)
    assert said in outcome.message
    assert outcome.code == 2
