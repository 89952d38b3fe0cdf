"""Metrics against slow float64 references, intervals against derived bounds, verdicts by hand."""

import math
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.stats import ttest_1samp
from torch import nn

from bnfix.core.errors import BnfixError, DataError, ModelError, NumericError
from bnfix.metrics.compare import ROUNDING, compare, paired_examples
from bnfix.metrics.evaluate import Outputs, collect, evaluate, score
from bnfix.metrics.metrics import measure
from bnfix.metrics.task import labels_of
from tests import nets

METRICS = ("top1", "top5", "nll", "nll_temperature_scaled", "brier", "ece")


def draw(n, k, seed=0, gain=2.0, noise=1.0):
    """Logits in which the label's is larger by ``gain``, and labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k)) * noise
    logits[np.arange(n), labels] += gain
    return logits.astype(np.float32), labels


# Slow references: one example at a time, plain Python, float64.


def softmax(row):
    exps = [math.exp(float(z) - float(max(row))) for z in row]
    return [e / math.fsum(exps) for e in exps]


def slow_metrics(logits, labels):
    n = len(labels)
    top1 = top5 = 0
    losses, briers, confidences, hits = [], [], [], []
    for row, y in zip(logits, labels, strict=True):
        p = softmax(row)
        order = sorted(range(len(row)), key=lambda j: (-row[j], j))
        top1 += order[0] == y
        top5 += y in order[:5]
        losses.append(-math.log(p[y]))
        briers.append(sum((p[j] - (j == y)) ** 2 for j in range(len(row))))
        confidences.append(p[order[0]])
        hits.append(order[0] == y)
    bins = []
    for b in range(15):
        low, high = b / 15, (b + 1) / 15
        inside = [
            i for i in range(n) if low < confidences[i] <= high or (b == 14 and confidences[i] >= 1)
        ]
        bins.append(inside)
    ece = sum(
        abs(sum(confidences[i] for i in inside) - sum(hits[i] for i in inside)) / n
        for inside in bins
    )
    return {
        "top1": top1 / n,
        "top5": top5 / n,
        "nll": math.fsum(losses) / n,
        "brier": math.fsum(briers) / n,
        "ece": ece,
        "counts": [len(inside) for inside in bins],
    }


@pytest.mark.parametrize(
    ("n", "k"), [(1, 2), (1, 7), (7, 3), (101, 2), (100, 5), (33, 6), (501, 10), (40, 1)]
)
def test_metrics_equal_the_slow_reference(n, k):
    logits, labels = draw(n, k, seed=n)
    metrics = measure(logits, labels)
    slow = slow_metrics(logits, labels)
    for name in ("top1", "top5", "nll", "brier", "ece"):
        assert getattr(metrics, name) == pytest.approx(slow[name], rel=1e-9, abs=1e-12), name
    assert [b.n_examples for b in metrics.reliability] == slow["counts"]


def test_more_logits_than_are_worked_on_at_a_time():
    logits, labels = draw(1100, 1000)
    metrics = measure(logits, labels)
    wide, y = torch.tensor(logits, dtype=torch.float64), torch.tensor(labels)
    losses = nn.functional.cross_entropy(wide, y, reduction="none")
    np.testing.assert_allclose(metrics.examples.losses, losses.numpy(), rtol=1e-9)
    hits = wide.topk(5).indices == y[:, None]
    assert metrics.top5 == hits.any(1).double().mean().item()
    brier = (wide.softmax(1) - nn.functional.one_hot(y, 1000)).square().sum(1).mean()
    assert metrics.brier == pytest.approx(brier.item(), rel=1e-9)
    half, other = measure(logits[:550], labels[:550]), measure(logits[550:], labels[550:])
    assert metrics.temperature == pytest.approx(half.temperature, rel=0.1)
    assert metrics.temperature == pytest.approx(other.temperature, rel=0.1)


def test_metrics_equal_those_of_scikit_learn():
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = draw(400, 8, seed=3)
    p = torch.softmax(torch.tensor(logits, dtype=torch.float64), 1).numpy()
    metrics = measure(logits, labels)
    classes = list(range(8))
    for k in (1, 5):
        theirs = sklearn_metrics.top_k_accuracy_score(labels, p, k=k, labels=classes)
        assert getattr(metrics, f"top{k}") == pytest.approx(theirs, abs=1e-12)
    assert metrics.nll == pytest.approx(
        sklearn_metrics.log_loss(labels, p, labels=classes), rel=1e-9
    )


def test_equal_logits_are_ranked_by_index_and_not_all_right():
    labels = np.arange(20)
    metrics = measure(np.zeros((20, 20), np.float32), labels)
    assert metrics.top1 == 1 / 20
    assert metrics.top5 == 5 / 20
    assert metrics.temperature == 1.0


def test_large_logits_neither_overflow_nor_make_a_negative_brier_score():
    logits = np.array([[1e4, 0, 0], [3e38, -3e38, 0]], np.float32)
    metrics = measure(logits, np.array([0, 0]))
    assert metrics.nll == metrics.brier == metrics.ece == 0.0
    wrong = measure(logits, np.array([1, 2]))
    assert wrong.brier == 2.0
    assert wrong.nll == pytest.approx((1e4 + 3e38) / 2, rel=1e-6)


def with_confidence(p, k=2):
    """A row of logits whose largest softmax is p, at index 0."""
    return [math.log(p), *[math.log((1 - p) / (k - 1))] * (k - 1)] if p < 1 else [200.0, 0.0]


def test_ece_by_hand_is_the_sum_over_the_bins():
    # Confidences 0.6 (bin 8: 0.533..0.6), 0.9 (bin 13) and 1 (bin 14, the last).
    logits = np.array([with_confidence(p) for p in (0.6, 0.59, 0.9, 0.9, 1.0)])
    metrics = measure(logits, np.array([0, 1, 0, 0, 1]))
    filled = {i: b for i, b in enumerate(metrics.reliability) if b.n_examples}
    assert {i: b.n_examples for i, b in filled.items()} == {8: 2, 13: 2, 14: 1}
    expected = abs(0.6 + 0.59 - 1) / 5 + abs(1.8 - 2) / 5 + 1 / 5
    assert metrics.ece == pytest.approx(expected, rel=1e-9)
    by_bins = sum(abs(b.confidence - b.accuracy) * b.n_examples for b in filled.values()) / 5
    assert metrics.ece == pytest.approx(by_bins, rel=1e-12)
    assert filled[14].confidence == 1.0
    empty = metrics.reliability[0]
    assert (empty.n_examples, empty.confidence, empty.accuracy) == (0, 0.0, 0.0)
    assert (metrics.reliability[0].low, metrics.reliability[14].high) == (0.0, 1.0)


@pytest.mark.parametrize(("k", "bin_of"), [(3, 4), (5, 2), (15, 0)])
def test_bins_are_closed_on_the_right(k, bin_of):
    """Equal logits have confidence 1/k, for these k an edge of the bins: it goes below the edge."""
    logits = np.zeros((4, k), np.float64)
    filled = [
        i for i, b in enumerate(measure(logits, np.zeros(4, int)).reliability) if b.n_examples
    ]
    low, high = bin_of / 15, (bin_of + 1) / 15
    assert low < 1 / k <= high + 1e-15
    assert filled == [bin_of]


# Intervals


def test_intervals_are_the_same_for_one_seed_and_move_with_another():
    logits, labels = draw(200, 4)
    one, again, other = (measure(logits, labels, seed=s) for s in (0, 0, 1))
    assert one.interval == again.interval
    assert one.nll_temperature_scaled == again.nll_temperature_scaled
    assert other.interval != one.interval
    assert (other.nll, other.top1) == (one.nll, one.top1)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 333])
@pytest.mark.parametrize("seed", range(4))
def test_every_interval_contains_its_estimate(n, seed):
    logits, labels = draw(n, 6, seed=seed)
    metrics = measure(logits, labels, seed=seed)
    assert set(metrics.interval) == set(METRICS)
    for name in METRICS:
        low, high = metrics.interval[name]
        assert low <= getattr(metrics, name) <= high, name
        assert (high - low > 1e-12) == (n > 1) or name in ("top1", "top5"), name


def test_the_interval_of_a_calibrated_models_ece_contains_its_estimate():
    """Labels drawn from the model's own probabilities: every gap is noise, and resampling adds."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(600, 3))
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    labels = (rng.random((600, 1)) > p.cumsum(1)).sum(1)
    metrics = measure(logits, labels)
    low, high = metrics.interval["ece"]
    assert 0 <= low < metrics.ece < high
    assert abs((low + high) / 2 - metrics.ece) < 0.2 * (high - low)


def test_the_interval_of_top1_has_the_binomial_width():
    """Half-width 1.96 sqrt(p (1-p) / n); a quantile of 1000 resamples at 2.5% has a standard error

    of sqrt(0.025 0.975 / 1000) / phi(1.96) = 0.084 deviations, the width of two 0.12; and 4 of
    these, with the grid of 1/n, are the bound.
    """
    n = 2000
    right = np.arange(n) % 5 != 0
    logits = np.zeros((n, 2), np.float32)
    logits[:, 0] = np.where(right, 1, -1)
    metrics = measure(logits, np.zeros(n, int))
    low, high = metrics.interval["top1"]
    deviation = math.sqrt(0.8 * 0.2 / n)
    assert metrics.top1 == 0.8
    assert abs((high - low) / deviation - 2 * 1.96) < 4 * 0.12 + 2 / (n * deviation)


# Temperature


def test_an_over_confident_model_gets_the_temperature_back():
    """Labels from softmax(z), logits 3 z. Fisher information of log T a label is Var_p(z), about

    0.9 here at the least 0.5: standard error 1 / sqrt(0.5 * 4000) = 0.023, and 4 of it, in log T.
    """
    rng = np.random.default_rng(0)
    z = rng.normal(size=(4000, 5)) * 1.5
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    labels = (rng.random((4000, 1)) > p.cumsum(1)).sum(1)
    metrics = measure((3 * z).astype(np.float32), labels)
    assert abs(math.log(metrics.temperature / 3)) < 4 * 0.023
    assert metrics.nll_temperature_scaled < metrics.nll - 0.1
    honest = measure(z, labels)
    assert abs(math.log(honest.temperature)) < 4 * 0.023


def test_the_temperature_is_fitted_on_one_half_and_applied_to_the_other():
    logits, labels = draw(300, 4, gain=1.0)
    metrics = measure(logits, labels, seed=5)
    half = np.zeros(300, bool)
    half[np.random.default_rng(5).permutation(300)[:150]] = True
    wide = torch.tensor(logits, dtype=torch.float64)
    y = torch.tensor(labels)
    # One more example, a k-th of it for each label, at the logits of each example with weight 1/n.
    target = torch.nn.functional.one_hot(y, 4).double() * (1 - 1 / 151) + 1 / (4 * 151)

    def fit(rows):
        def nll(log_t):
            log_p = torch.log_softmax(wide[rows] / math.exp(log_t), 1)
            return float(-(target[rows] * log_p).sum(1).mean())

        return math.exp(minimize_scalar(nll, options={"xtol": 1e-10}).x)

    expected = np.empty(300)
    temperatures = fit(half), fit(~half)
    for rows, temperature in ((~half, temperatures[0]), (half, temperatures[1])):
        log_p = torch.log_softmax(wide[rows] / temperature, 1)
        expected[rows] = -log_p[range(150), y[rows]].numpy()
    np.testing.assert_allclose(metrics.examples.scaled_losses, expected, rtol=1e-6)
    assert metrics.temperature == pytest.approx(math.sqrt(math.prod(temperatures)), rel=1e-6)
    assert metrics.nll_temperature_scaled == pytest.approx(expected.mean(), rel=1e-6)


@pytest.mark.parametrize("factor", [1e-3, 0.1, 4.0, 100.0])
@pytest.mark.parametrize("n", [4, 61])
def test_a_constant_factor_leaves_the_scaled_loss_as_it_is(factor, n):
    logits, labels = draw(n, 3, gain=1.0)
    logits = logits.astype(np.float64)
    one, other = measure(logits, labels), measure(factor * logits, labels)
    assert other.nll != pytest.approx(one.nll, rel=1e-3)
    assert other.nll_temperature_scaled == pytest.approx(one.nll_temperature_scaled, rel=1e-6)
    assert other.temperature == pytest.approx(factor * one.temperature, rel=1e-6)


def test_a_half_without_a_mistake_does_not_have_the_other_half_pay_without_bound():
    logits, labels = draw(200, 4, gain=20.0)
    logits[0, (labels[0] + 1) % 4] = logits[0].max() + 5  # the only mistake
    metrics = measure(logits, labels)
    assert metrics.top1 == 199 / 200
    assert metrics.nll_temperature_scaled < 3 * metrics.nll


def test_a_model_worse_than_chance_still_has_a_temperature():
    logits, labels = draw(100, 4, gain=-5.0)
    metrics = measure(logits, labels)
    assert metrics.temperature > 10
    assert metrics.nll_temperature_scaled == pytest.approx(math.log(4), abs=0.05)


# Comparison


def two(before, after, labels, **options):
    return compare(measure(before, labels), measure(after, labels), **options)


def test_differences_are_after_less_before():
    labels = np.zeros(40, int)
    before = np.tile([[0.0, 1.0]], (40, 1))
    after = before.copy()
    after[:30] = [1.0, 0.0]
    paired = two(before, after, labels)
    assert paired.top1.difference == 30 / 40
    assert paired.nll.difference == pytest.approx(-30 / 40, rel=1e-9)
    assert paired.nll.interval[0] < paired.nll.difference < paired.nll.interval[1] < 0
    assert paired.verdict == "better"
    back = two(after, before, labels)
    assert back.top1.difference == -30 / 40
    assert back.nll.difference == pytest.approx(30 / 40, rel=1e-9)
    assert back.verdict == "worse"
    assert not back.temperature_only


def test_the_same_model_is_the_same():
    logits, labels = draw(100, 5)
    paired = two(logits, logits.copy(), labels)
    for name in ("top1", "nll", "nll_temperature_scaled"):
        difference = getattr(paired, name)
        assert difference.difference == 0.0
        assert difference.interval == (0.0, 0.0)
        assert difference.p == 1.0
    assert paired.verdict == "same"
    assert not paired.temperature_only


def test_rounding_is_no_gain_however_systematic():
    logits, labels = draw(500, 5)
    logits = logits.astype(np.float64)
    after = logits.copy()
    after[np.arange(500), labels] += ROUNDING / 2
    assert two(logits, after, labels).verdict == "same"
    after[np.arange(500), labels] += 1e-3
    assert two(logits, after, labels).verdict == "better"


def test_better_loss_and_significantly_worse_top1_is_worse():
    """The wrong answers become cheaper by far, but 30 of 100 right ones are lost by a hair."""
    labels = np.zeros(100, int)
    before, after = np.zeros((100, 2)), np.zeros((100, 2))
    before[:50], before[50:] = [0.01, 0], [0, 9]
    after[:50], after[50:] = [0.01, 0], [0, 1]
    after[:30] = [0, 0.01]
    paired = two(before, after, labels)
    assert paired.nll.interval[1] < 0
    assert paired.top1.interval[1] < 0
    assert paired.verdict == "worse"


def test_better_top1_and_significantly_worse_loss_is_worse():
    labels = np.zeros(100, int)
    before, after = np.tile([[0.0, 0.01]], (100, 1)), np.zeros((100, 2))
    after[:70], after[70:] = [0.01, 0], [0, 9]
    paired = two(before, after, labels)
    assert paired.top1.interval[0] > 0
    assert paired.nll.interval[0] > 0
    assert paired.verdict == "worse"


def test_better_top1_alone_is_better():
    rng = np.random.default_rng(0)
    labels = np.zeros(200, int)
    before = np.column_stack([rng.normal(size=200), np.zeros(200)])
    after = before.copy()
    flip = np.flatnonzero(before[:, 0] < 0)[:40]
    after[flip, 0] = 1e-9  # from wrong to right; what is gained there is lost elsewhere
    gain = np.log1p(np.exp(-before[flip, 0])) - math.log(2)
    sure = np.flatnonzero(before[:, 0] > 0.5)
    for i, g in zip(sure, np.resize(gain, len(sure)), strict=True):
        loss = math.log1p(math.exp(-before[i, 0])) + g * len(flip) / len(sure)
        after[i, 0] = max(-math.log(math.expm1(loss)), 1e-6)
    paired = two(before, after, labels)
    assert abs(paired.nll.difference) < 0.05
    assert paired.nll.interval[0] < 0 < paired.nll.interval[1]
    assert paired.verdict == "better"
    assert not paired.temperature_only


def test_a_gain_of_temperature_alone_is_called_so():
    logits, labels = draw(600, 5, gain=1.5)
    logits = logits.astype(np.float64)
    paired = two(6 * logits, 1.5 * logits, labels)
    assert paired.verdict == "better"
    assert paired.nll_temperature_scaled.difference == pytest.approx(0, abs=1e-8)
    assert paired.temperature_only
    better = logits.copy()
    better[np.arange(600), labels] += 1
    paired = two(6 * logits, 1.5 * better, labels)
    assert paired.verdict == "better"
    assert not paired.temperature_only


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_few_examples_prove_nothing(n):
    before, after = np.tile([[0.0, 5.0]], (n, 1)), np.tile([[5.0, 0.0]], (n, 1))
    before[:, 1] /= np.arange(1, n + 1) ** 3
    paired = two(before, after, np.zeros(n, int))
    assert paired.top1.difference == 1.0
    assert paired.top1.p == 2 * 0.5**n
    if n < 3:
        assert paired.nll.p > 0.05
        assert paired.verdict == "same"


def exact_mcnemar(gained, lost):
    """Two-sided sign test from binomial coefficients."""
    m = gained + lost
    tail = sum(math.comb(m, i) for i in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**m)


@pytest.mark.parametrize(
    ("gained", "lost"), [(0, 0), (1, 0), (3, 3), (0, 9), (12, 4), (5, 21), (40, 41)]
)
def test_the_p_of_top1_is_mcnemars_exact_one(gained, lost):
    labels = np.zeros(gained + lost + 5, int)
    before, after = (np.tile([[1.0, 0.0]], (len(labels), 1)) for _ in range(2))
    before[:gained] = [0, 1]
    after[gained : gained + lost] = [0, 1]
    p = two(before, after, labels).top1.p
    assert p == pytest.approx(exact_mcnemar(gained, lost), rel=1e-9)


@pytest.mark.parametrize(("n", "factor"), [(30, math.inf), (3000, 1.5)])
def test_the_p_of_the_loss_is_a_t_test_with_one_more_example_against_the_gain(n, factor):
    logits, labels = draw(n, 4)
    other = logits.astype(float)
    other[np.arange(n), labels] += np.random.default_rng(1).normal(1.8 / n**0.5, 0.5, n)
    before, after = measure(logits, labels), measure(other, labels)
    d = after.examples.losses - before.examples.losses
    found = compare(before, after).nll.p
    plain = ttest_1samp(d, 0).pvalue
    assert plain < ttest_1samp([*d, d.max() if d.mean() < 0 else d.min()], 0).pvalue <= found
    assert found <= min(1, factor * plain)


def test_comparing_is_deterministic_by_seed():
    logits, labels = draw(100, 4)
    other, _ = draw(100, 4, seed=1)
    before, after = measure(logits, labels), measure(other, labels)
    assert compare(before, after) == compare(before, after, seed=0)
    assert compare(before, after) != compare(before, after, seed=1)


def test_other_examples_cannot_be_compared():
    logits, labels = draw(20, 4)
    one = measure(logits, labels)
    with pytest.raises(DataError, match=r"comparison: .* same examples"):
        compare(one, measure(logits, (labels + 1) % 4))
    with pytest.raises(DataError, match=r"comparison: .* same examples"):
        compare(one, measure(logits[:-1], labels[:-1]))
    with pytest.raises(DataError, match=r"comparison: .* no labels"):
        paired_examples(one, measure(logits, None))
    with pytest.raises(DataError, match=r"comparison: .* no labels"):
        compare(measure(logits, None), one)


# Labels and logits that cannot be


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 1, 4], r"labels: from 0 to 4, expected 0 to 3"),
        ([-1, 1, 3], r"labels: from -1 to 3, expected 0 to 3"),
        ([0, 1], r"labels: int64 of shape \(2,\) for 3 examples"),
        ([[0], [1], [2]], r"labels: int64 of shape \(3, 1\) for 3 examples"),
        ([0.0, 1.0, 2.0], r"labels: float64 of shape \(3,\) for 3 examples"),
        (["a", "b", "c"], r"labels: <U1 of shape \(3,\) for 3 examples"),
        ([[0], [1, 2], [3]], r"labels: .*inhomogeneous"),
        (torch.zeros(3, dtype=torch.bfloat16), r"labels: .*BFloat16"),
        (torch.tensor(1), r"labels: int64 of shape \(\) for 3 examples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, message):
    with pytest.raises(DataError, match=message):
        measure(np.zeros((3, 4), np.float32), labels)
    with pytest.raises(DataError, match=message):
        labels_of((torch.zeros(3, 4), labels), 3, 4)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint64, np.int64])
def test_labels_of_every_integer_type_are_taken(dtype):
    logits, labels = draw(20, 4)
    assert measure(logits, labels.astype(dtype)).nll == measure(logits, labels).nll
    assert measure(logits, labels).examples.labels.dtype == np.int64


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (4,), (2, 3, 4)])
def test_logits_of_no_use_are_refused(shape):
    with pytest.raises(DataError, match="logits: shape"):
        measure(np.zeros(shape, np.float32), np.zeros(shape[0], int))


def test_logits_that_are_not_finite_are_refused_by_the_number_of_the_example():
    logits, labels = draw(7, 3)
    logits[5, 1] = np.nan
    with pytest.raises(NumericError, match=r"logits of example 5 \(from 0\) are not finite"):
        measure(logits, labels)
    first = (torch.tensor(logits[:4]), torch.tensor(labels[:4]))
    for bad in (math.nan, math.inf, -math.inf):
        logits[5, 1] = bad
        second = (torch.tensor(logits[4:]), torch.tensor(labels[4:]))
        with pytest.raises(NumericError, match="example 5"):
            evaluate(nn.Identity(), [first, second])


# One pass over a model

Pair = namedtuple("Pair", ["images", "labels"])


def batches_of(logits, labels, size=4):
    x, y = torch.tensor(logits), torch.tensor(labels)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def test_evaluating_is_measuring_the_logits():
    logits, labels = draw(21, 6)
    expected = measure(logits, labels)
    for size in (1, 4, 21):
        metrics = evaluate(nn.Identity(), batches_of(logits, labels, size))
        assert metrics.n_examples == 21
        assert metrics.images_per_second > 0
        np.testing.assert_array_equal(metrics.logits, logits)
        assert metrics.logits.dtype == np.float32
        for name in METRICS:
            assert getattr(metrics, name) == getattr(expected, name)
        assert metrics.interval == expected.interval
        found = score(nn.Identity(), batches_of(logits, labels, size))
        assert (found.n_examples, found.top1) == (21, expected.top1)
        assert found.nll == pytest.approx(expected.nll, rel=1e-12)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: (x, y),
        lambda x, y: [x, y],
        lambda x, y: (x, y, "extra"),
        lambda x, y: Pair(x, y),
        lambda x, y: {"pixel_values": x, "labels": y},
        lambda x, y: {"image": x, "label": y},
        lambda x, y: (x, y.tolist()),
        lambda x, y: (x, y.numpy()),
        lambda x, y: (x, y.to(torch.uint8)),
    ],
)
def test_batches_of_every_form(form):
    logits, labels = draw(8, 3)
    batches = [form(x, y) for x, y in batches_of(logits, labels)]
    assert evaluate(nn.Identity(), iter(batches)).nll == measure(logits, labels).nll


@pytest.mark.parametrize(
    "form",
    [
        lambda z: (z, torch.zeros(1)),
        lambda z: [z],
        lambda z: {"logits": z, "loss": torch.zeros(1)},
        lambda z: {"out": z},
        lambda z: SimpleNamespace(logits=z),
        lambda z: namedtuple("Output", ["logits", "aux_logits"])(z, None),
        lambda z: z.double(),
        lambda z: z.requires_grad_(),
    ],
)
def test_outputs_of_every_form(form):
    class Wrapped(nn.Module):
        def forward(self, x):
            return form(x)

    logits, labels = draw(8, 3)
    assert evaluate(Wrapped(), batches_of(logits, labels)).nll == measure(logits, labels).nll


def test_forward_takes_batches_whose_inputs_have_other_names():
    logits, labels = draw(8, 3)
    batches = [{"tokens": x, "labels": y} for x, y in batches_of(logits, labels)]
    metrics = evaluate(nn.Identity(), batches, forward=lambda model, batch: model(batch["tokens"]))
    assert metrics.nll == measure(logits, labels).nll
    with pytest.raises(DataError, match=r"batch: keys .*tokens"):
        evaluate(nn.Identity(), batches)


@pytest.mark.parametrize("form", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"x": x}])
def test_without_labels_there_are_only_logits_and_speed(form):
    logits, labels = draw(8, 3)
    metrics = evaluate(nn.Identity(), [form(x) for x, _ in batches_of(logits, labels)])
    assert metrics.n_examples == 8
    assert all(getattr(metrics, name) is None for name in (*METRICS, "temperature", "examples"))
    assert metrics.interval == {}
    assert metrics.reliability == ()
    np.testing.assert_array_equal(metrics.logits, logits)
    assert repr(metrics) == "Metrics(n_examples=8, )"
    with pytest.raises(DataError, match="batches: no labels"):
        score(nn.Identity(), [form(torch.tensor(logits))])


def test_labels_in_some_batches_only_are_refused():
    (x, y), (x2, _) = batches_of(*draw(8, 3))
    with pytest.raises(DataError, match="labels: 1 of 2 batches have none"):
        evaluate(nn.Identity(), [(x, y), (x2,)])


def test_labels_are_held_against_each_batch():
    (x, y), (x2, y2) = batches_of(*draw(8, 3))
    with pytest.raises(DataError, match=r"labels: int64 of shape \(3,\) for 4 examples"):
        evaluate(nn.Identity(), [(x, y[:3]), (x2, torch.cat([y[3:], y2]))])


def test_an_empty_batch_in_between_does_no_harm_and_nothing_but_is_refused():
    logits, labels = draw(8, 3)
    empty = (torch.zeros(0, 3), torch.zeros(0, dtype=torch.long))
    one, other = batches_of(logits, labels)
    assert evaluate(nn.Identity(), [one, empty, other]).nll == measure(logits, labels).nll
    for nothing in ([], [empty], iter(())):
        with pytest.raises(DataError, match="evaluation: no examples"):
            evaluate(nn.Identity(), nothing)


def test_outputs_that_are_no_logits_are_refused():
    with pytest.raises(ModelError, match="expected logits"):
        evaluate(nn.Identity(), [(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.long))])
    y = torch.zeros(2, dtype=torch.long)
    with pytest.raises(ModelError, match="4 logits in batch 1, but 3 before it"):
        evaluate(nn.Identity(), [(torch.zeros(2, 3), y), (torch.zeros(2, 4), y)])


def test_the_model_is_run_in_evaluation_and_its_modes_are_left_as_found():
    model = nets.with_dropout().train()
    model[2].eval()
    modes = [m.training for m in model.modules()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, 5, 5, generator=generator)
    y = torch.arange(6) % 3
    metrics = evaluate(model, [(x, y)])
    assert [m.training for m in model.modules()] == modes
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    alone = evaluate(model, [(x[i : i + 1], y[i : i + 1]) for i in range(6)])
    np.testing.assert_allclose(alone.logits, metrics.logits, rtol=1e-5, atol=1e-6)

    def failing():
        yield x, y
        assert not any(m.training for m in model.modules())
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        evaluate(model, failing())
    assert [m.training for m in model.modules()] == modes
    assert torch.is_grad_enabled()
    with pytest.raises(BnfixError, match="labels: from 3 to 3"):
        evaluate(model, [(x, torch.full((6,), 3))])
    assert [m.training for m in model.modules()] == modes


def test_half_precision_moves_the_numbers_a_little_and_is_not_left_on():
    model = nets.plain()
    x, y = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 3
    full, half = evaluate(model, [(x, y)]), evaluate(model, [(x, y)], precision="bf16")
    assert half.logits.dtype == np.float32
    assert not np.array_equal(full.logits, half.logits)
    np.testing.assert_allclose(full.logits, half.logits, atol=0.05)  # bf16 has 8 bits
    assert not torch.is_autocast_enabled("cpu")


def test_the_representation_is_short():
    assert repr(measure(np.zeros((2, 2)), np.zeros(2, int))) == (
        "Metrics(n_examples=2, top1=1, nll=0.6931, nll_temperature_scaled=0.6931, ece=0.5)"
    )


# --- several models, other tasks ---


def test_models_that_share_a_pass_get_what_each_gets_alone():
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, k)).train() for k in (3, 5)]
    batches = [(torch.randn(n, 3, 2, 2), torch.arange(n) % 3) for n in (4, 1, 7)]
    passes = []

    def once():
        passes.append(1)
        yield from batches

    together = collect(models, once())
    assert passes == [1]
    for model, found in zip(models, together, strict=True):
        (alone,) = collect([model], batches)
        np.testing.assert_array_equal(found.outputs, alone.outputs)
        np.testing.assert_array_equal(found.labels, alone.labels)
        assert found.images_per_second > 0
        assert model.training
    assert [found.outputs.shape for found in together] == [(12, 3), (12, 5)]
    # The same model twice is put into evaluation, and back, once.
    again = collect([models[0], models[0]], batches)
    np.testing.assert_array_equal(again[0].outputs, again[1].outputs)
    assert models[0].training


@pytest.mark.parametrize(("n", "least"), [(1, 0.025), (3, 0.025 ** (1 / 3))])
def test_all_right_or_all_wrong_has_an_exact_interval(n, least):
    logits, labels = np.eye(4, dtype=np.float32)[:n], np.arange(n)
    assert measure(logits, labels).interval["top1"] == pytest.approx((least, 1))
    assert measure(logits, labels + 1).interval["top1"] == pytest.approx((0, 1 - least))


def test_outputs_of_any_shape_are_taken_where_that_is_asked_for():
    model = nn.Conv2d(3, 2, 1)
    batches = [(torch.randn(n, 3, 4, 4), torch.rand(n, 4, 4)) for n in (3, 2)]
    (found,) = collect([model], batches, any_task=True)
    assert found.outputs.shape == (5, 2, 4, 4)
    assert found.labels.shape == (5, 4, 4)
    assert found.labels.dtype == np.float32
    assert not found.classified
    with pytest.raises(ModelError, match=r"expected logits \(N, classes\)"):
        collect([model], batches)
    uneven = [(torch.randn(2, 3, 4, 4),), (torch.randn(2, 3, 5, 5),)]
    with pytest.raises(ModelError, match=r"shape \(2, 5, 5\) per example in batch 1, but"):
        collect([model], uneven, any_task=True)


@pytest.mark.parametrize(
    ("outputs", "labels", "classified"),
    [
        (np.zeros((4, 3)), np.array([0, 1, 2, 2]), True),
        (np.zeros((4, 3)), None, True),
        (np.zeros((4, 3)), np.array([0, 1, 2, 3]), False),
        (np.zeros((4, 3)), np.array([0.0, 1, 2, 2]), False),
        (np.zeros((4, 3)), np.array([-1, 1, 2, 2]), False),
        (np.zeros((4, 3)), np.zeros((4, 3), int), False),
        (np.zeros((4, 3, 1)), np.array([0, 1, 2, 2]), False),
        (np.zeros(4), np.array([0, 1, 2, 2]), False),
    ],
)
def test_what_is_a_classification(outputs, labels, classified):
    assert Outputs(outputs, labels, 1.0).classified is classified


def test_no_model_is_no_evaluation():
    with pytest.raises(DataError, match="no examples"):
        collect([], [(torch.zeros(1, 2),)])
