"""The gate's decisions, each held against a computation by hand."""

import math
import statistics

import numpy as np
import pytest

from benchmarks.false_verdicts import CASES, false_rates
from bnfix.core.errors import ConfigError, DataError
from bnfix.metrics.compare import ROUNDING, compare, judge
from bnfix.metrics.metrics import Metrics, measure


def metrics_of(losses):
    """Two classes, label 0, with these losses; right where the loss is below log 2."""
    losses = np.asarray(losses, np.float64)
    margin = -np.log(np.expm1(losses))  # log(1 + exp(-margin)) = loss
    found = measure(np.column_stack([margin, np.zeros(len(losses))]), np.zeros(len(losses), int))
    np.testing.assert_allclose(found.examples.losses, losses, rtol=1e-9)
    return found


def decide(candidate, incumbent, z=2.0):
    return judge("a stage", ("new", metrics_of(candidate)), ("old", metrics_of(incumbent)), z)


def test_the_record_holds_the_numbers_computed_by_hand():
    old, new = [0.5, 0.4, 1.0, 0.9, 0.3], [0.4, 0.2, 0.8, 0.6, 1.0]
    decision = decide(new, old, z=1.5)
    differences = [a - b for a, b in zip(new, old, strict=True)]
    hits = [0, 0, 0, 1, -1]  # right is below log 2 = 0.693
    assert (decision.stage, decision.candidate, decision.incumbent) == ("a stage", "new", "old")
    assert (decision.n_examples, decision.z) == (5, 1.5)
    for name, values in (("nll", new), ("incumbent_nll", old), ("nll_difference", differences)):
        assert getattr(decision, name) == pytest.approx(statistics.mean(values), rel=1e-9), name
    assert (decision.top1, decision.incumbent_top1, decision.top1_difference) == (0.6, 0.6, 0.0)
    root = math.sqrt(5)
    assert decision.nll_se == pytest.approx(statistics.stdev(differences) / root, rel=1e-9)
    assert decision.top1_se == pytest.approx(statistics.stdev(hits) / root, rel=1e-9)
    assert not decision.admitted


@pytest.mark.parametrize("z", [0.0, 1.0, 2.0, 3.5])
@pytest.mark.parametrize("step", [-0.15, 0.15])
def test_admitted_only_beyond_z_standard_errors(z, step):
    n = 5000
    noise = np.random.default_rng(0).normal(size=n)
    noise = (noise - noise.mean()) / noise.std(ddof=1)  # standard error 1 / sqrt(n)
    old = np.full(n, 0.3)
    new = old + 0.01 * (noise - (z + step) / math.sqrt(n))
    decision = decide(new, old, z)
    assert decision.nll_difference / decision.nll_se == pytest.approx(-(z + step), abs=1e-6)
    assert decision.top1_difference == 0
    assert decision.admitted == (step > 0)
    assert ("is lower by" if step > 0 else "is not lower by more than") in decision.reason


def hits_and_losses(lost, n=400):
    """The loss falls clearly on all; ``lost`` examples turn wrong by a hair."""
    rng = np.random.default_rng(0)
    old = np.full(n, 0.69)
    new = 0.2 + 0.01 * rng.random(n)
    new[:lost] = 0.70
    return new, old


@pytest.mark.parametrize(("lost", "admitted"), [(0, True), (3, True), (4, False), (40, False)])
def test_top1_may_not_fall_by_more_than_z_of_its_own(lost, admitted):
    """k of n lost: mean k/n, error sqrt(k/n (1 - k/n) / (n - 1)), about sqrt(k)/n: 2 at k = 4."""
    new, old = hits_and_losses(lost)
    decision = decide(new, old)
    assert decision.nll_difference < -10 * decision.nll_se
    assert decision.top1_difference == -lost / 400
    fall = lost / 400
    assert decision.top1_se == pytest.approx(math.sqrt(fall * (1 - fall) / 399), rel=1e-9)
    assert (fall > 2 * decision.top1_se) == (not admitted)
    assert decision.admitted == admitted
    assert ("top-1 is lower by more than 2" in decision.reason) == (not admitted)


def test_with_z_0_any_fall_of_top1_refuses():
    assert decide(*hits_and_losses(0), z=0).admitted
    assert not decide(*hits_and_losses(1), z=0).admitted


@pytest.mark.parametrize("z", [0.0, 2.0, 1e9])
def test_identical_candidates_leave_the_incumbent(z):
    losses = np.linspace(0.1, 2, 30)
    decision = decide(losses, losses, z)
    assert not decision.admitted
    assert (decision.nll_difference, decision.nll_se) == (0.0, 0.0)
    assert "is not lower" in decision.reason


def test_a_difference_within_rounding_is_a_tie():
    losses = np.linspace(0.1, 2, 30)
    assert not decide(losses - ROUNDING / 2, losses).admitted
    assert not decide(losses - ROUNDING / 2, losses, z=0).admitted
    assert decide(losses - 2 * ROUNDING, losses).admitted


def test_a_gain_that_is_the_same_for_every_example_is_admitted():
    logits, labels = np.zeros((20, 2)), np.zeros(20, int)
    before, after = measure(logits, labels), measure(logits + np.array([1.0, 0.0]), labels)
    decision = judge("s", ("new", after), ("old", before))
    assert decision.nll_se == pytest.approx(0, abs=1e-12)
    assert decision.admitted
    assert decision.reason.endswith("the same for every example")


def test_a_worse_candidate_is_refused():
    losses = np.linspace(0.1, 0.6, 30)
    decision = decide(losses + 0.01, losses, z=0)
    assert decision.nll_difference == pytest.approx(0.01)
    assert not decision.admitted


def test_one_example_cannot_judge():
    decision = decide([0.1], [2.0], z=0)
    assert not decision.admitted
    assert decision.n_examples == 1
    assert (decision.nll_se, decision.top1_se) == (0.0, 0.0)
    assert decision.reason == "1 examples are too few to judge; it takes 20"


def test_no_gain_is_enough_for_a_z_without_a_finite_quantile():
    losses = np.linspace(1, 2, 200)
    assert decide(0.5 * losses, losses, z=5).admitted
    assert not decide(0.5 * losses, losses, z=1e9).admitted


@pytest.mark.parametrize("z", [-0.1, math.nan])
def test_z_below_0_is_refused(z):
    with pytest.raises(ConfigError, match=r"z: .* expected at least 0") as caught:
        decide([0.1, 0.2], [0.3, 0.2], z)
    assert caught.value.name == "z"


def test_other_examples_are_refused():
    two, three = metrics_of([0.1, 0.2]), metrics_of([0.1, 0.2, 0.3])
    with pytest.raises(DataError, match=r"comparison: .* same examples"):
        judge("s", ("a", two), ("b", three))
    with pytest.raises(DataError, match=r"comparison: .* no labels"):
        judge("s", ("a", two), ("b", measure(two.logits, None)))


def test_what_cannot_be_evaluated_loses_to_all_that_can():
    """Whatever z is: no standard error is needed against a network that gives no numbers."""
    fine, broken = (
        metrics_of([0.5] * 30),
        Metrics(n_examples=30, problem="its logits are not finite"),
    )
    won = judge("s", ("new", fine), ("as it was", broken), z=1e9)
    assert won.admitted
    assert won.reason == "'as it was' cannot be evaluated: its logits are not finite"
    assert (won.n_examples, won.nll, won.top1) == (30, pytest.approx(0.5), 1.0)
    assert (won.incumbent_nll, won.nll_difference, won.nll_se, won.top1_se) == (None,) * 4
    for incumbent in (fine, broken):
        lost = judge("s", ("new", broken), ("old", incumbent), z=0)
        assert not lost.admitted
        assert lost.reason == "it cannot be evaluated: its logits are not finite"
    assert compare(broken, fine).verdict == "better"
    assert compare(fine, broken).verdict == "worse"
    assert compare(broken, broken).verdict == "same"


@pytest.mark.parametrize(("n", "enough"), [(2, False), (19, False), (20, True), (200, True)])
def test_it_takes_20_examples_to_prove_a_gain(n, enough):
    rng = np.random.default_rng(n)
    old = rng.uniform(1.2, 1.4, n)
    new = old - rng.uniform(0.7, 0.9, n)
    decision = decide(new, old)
    assert decision.admitted == enough
    assert enough or decision.reason == f"{n} examples are too few to judge; it takes 20"
    assert compare(metrics_of(old), metrics_of(new)).verdict == ("better" if enough else "same")
    assert compare(metrics_of(new), metrics_of(old)).verdict == ("worse" if enough else "same")


@pytest.mark.parametrize("n", [20, 60, 300])
@pytest.mark.parametrize(
    "case", ["5% differ and flip", "all differ, exponential", "too sharp, 98% right"]
)
def test_equal_models_are_hardly_ever_called_better(case, n):
    better, admitted = false_rates(CASES[case], n, runs=150)
    assert better <= 0.03
    assert admitted <= 0.03


def test_many_small_gains_do_not_hide_the_rare_loss_that_pays_for_them():
    """Sharper logits gain on 60 right answers of 60; at one label in 20 wrong they would lose."""
    logits = np.column_stack([np.random.default_rng(0).uniform(2, 4, 60), np.zeros(60)])
    before, after = (measure(by * logits, np.zeros(60, int)) for by in (1, 4))
    assert after.nll < before.nll
    assert not judge("s", ("new", after), ("old", before)).admitted
    assert compare(before, after).verdict == "same"
