"""Two models on the same examples: paired differences, the verdict, and the gate."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bnfix.core.errors import ConfigError, DataError
from bnfix.metrics.metrics import (
    LEVEL,
    Interval,
    Metrics,
    PerExample,
    least,
    middle,
    n_counted,
    n_marked,
    resampled_means,
    units,
)
from bnfix.metrics.task import LABELS, Array, Reference, Words

#: Mean loss differences up to this (nats) are float32 rounding, not a gain.
ROUNDING = 1e-6
_MeanAndSe = tuple[float, float]
#: Examples look trained on if loss and score are better by these standard errors, and the loss is
#: at most this fraction of the other.
_EASIER, _MOST_OF_LOSS = (3.0, 1.0), 0.8


@dataclass(frozen=True, repr=False)
class Difference:
    """A paired difference, the mean of after less before, with a 95% bootstrap interval."""

    difference: float
    interval: Interval
    p: float  # two-sided: McNemar's exact test for right or wrong, `gain_t` for losses and groups

    def __repr__(self) -> str:
        low, high = self.interval
        return f"{self.difference:+.4g} ({low:+.4g} to {high:+.4g}, p={self.p:.2g})"


_NONE = Difference(math.nan, (math.nan, math.nan), math.nan)


@dataclass(frozen=True, repr=False, kw_only=True)
class Paired:
    """Two models on the same examples: better, worse or the same."""

    # Better: NLL or top-1 is significantly better and neither is significantly worse. Worse: either
    # is significantly worse. Significant: the interval excludes 0 (and rounding), and p < 0.05;
    # either alone is too lenient on few examples. With two chances to be better, p < 0.025 is
    # required if only one is (Hochberg). With fewer than 20 examples the verdict is the same;
    # losses count if at least 20 of them differ. For tasks other than classification, `nll` and
    # `top1` are the loss and the score; without a score the loss alone decides, at p < 0.05.
    top1: Difference = _NONE
    nll: Difference = _NONE
    nll_temperature_scaled: Difference = _NONE
    verdict: str
    temperature_only: bool = False  # better, but the gain vanishes after temperature scaling
    #: The task's metrics by name; they have intervals but no p, because they decide nothing.
    metrics: dict[str, Difference] = field(default_factory=dict)

    def change(self, key: str) -> Difference | None:
        """The difference of a number by the key of its column; ``None`` if there is none."""
        return self.metrics.get(key, getattr(self, key, None))

    def __repr__(self) -> str:
        only = ", temperature_only" if self.temperature_only else ""
        return f"Paired({self.verdict}, top1 {self.top1!r}, nll {self.nll!r}{only})"


def compare(before: Metrics, after: Metrics, *, seed: int = 0) -> Paired:
    """Compare two models by paired differences on the same examples.

    Args:
        before: metrics of the model to compare against.
        after: metrics of the model to judge.
        seed: seed of the bootstrap.

    Returns:
        The differences (after less before) with 95% intervals, and the verdict. A model that cannot
        be evaluated is worse than one that can; the differences are then NaN.

    Raises:
        DataError: if the examples differ or have no labels.
    """
    if before.problem or after.problem:
        sign = bool(before.problem) - bool(after.problem)
        return Paired(verdict={1: "better", 0: "same", -1: "worse"}[sign])
    old, new = paired_examples(before, after)
    was, groups = old.columns, new.groups
    columns = {key: now * 1.0 - was[key] for key, now in new.columns.items() if key in was}
    blind = new.blind_loss - old.blind_loss
    table = np.column_stack(list(columns.values()))
    samples, means = resampled_means(table, seed, groups).T, table.mean(0)
    found = {}
    for (key, column), resampled, mean in zip(columns.items(), samples, means, strict=True):
        p = _score_p(column, groups) if key == "top1" else _paired_p(column, blind, groups)
        found[key] = Difference(float(mean), middle(resampled, mean, groups), p)
    top1, nll = found.get("top1", _NONE), found["nll"]
    signs = _sign(top1), -_sign(nll)
    surer = "top1" not in columns or min(top1.p, nll.p) < (1 - LEVEL) / 2
    if new.shortfall:
        verdict = "same"
    elif -1 in signs:
        verdict = "worse"
    else:
        verdict = "better" if signs == (1, 1) or (1 in signs and surer) else "same"
    scaled = found.get("nll_temperature_scaled")
    # The same bootstrap samples of both models.
    drawn = {name: sample - before.resampled[name] for name, sample in after.resampled.items()}
    moved = {name: value - before.values[name] for name, value in after.values.items()}
    left = scaled is None or _sign(top1) == 1 or _sign(scaled) == -1
    return Paired(
        **found,
        verdict=verdict,
        temperature_only=verdict == "better" and not left,
        metrics={n: Difference(d, middle(drawn[n], d, groups), math.nan) for n, d in moved.items()},
    )


def paired_examples(before: Metrics, after: Metrics) -> tuple[PerExample, PerExample]:
    """The examples of two metrics, after a check that they are the same."""
    if before.examples is None or after.examples is None:
        raise DataError("comparison: the examples have no labels to compare by. Give labels.")
    if before.examples.words != after.examples.words:
        words = {"classification": "labels", "reference": "a reference"}
        old, new = (words.get(m.task.name, f"the {m.task.words.loss}") for m in (before, after))
        raise DataError(f"comparison: one model was judged by {old}, the other by {new}.")
    if not np.array_equal(before.examples.labels, after.examples.labels):
        raise DataError("comparison: the two models were not measured on the same examples.")
    if not np.array_equal(before.examples.groups, after.examples.groups):  # type: ignore[arg-type]
        raise DataError("comparison: the two models were not measured with the same groups.")
    return before.examples, after.examples


def _sign(difference: Difference) -> int:
    """1 or -1 if the difference is significantly above or below 0, else 0."""
    low, high = difference.interval
    if difference.p >= 1 - LEVEL:
        return 0
    return 1 if low > ROUNDING else -1 if high < -ROUNDING else 0


def _score_p(difference: Array, groups: Array | None) -> float:
    """The p of a score: McNemar's test for right or wrong, `gain_t` for fractions and groups."""
    if groups is not None or not np.isin(difference, (-1, 0, 1)).all():
        return _paired_p(-difference, 0.0, groups)
    from scipy.special import bdtr

    gained, lost = int((difference > 0).sum()), int((difference < 0).sum())
    return min(1.0, float(2 * bdtr(min(gained, lost), gained + lost, 0.5)))


def gain_t(difference: Array, blind: float, groups: Array | None = None) -> float:
    """Student's t, with n degrees of freedom for n differences, that losses are lower; 0 if not.

    With groups, each group counts as one difference.
    """
    # Rare losses can outweigh many small gains and be missing from the sample. So one more example
    # is counted: its difference is the worst one, or `blind`, the expected difference with a random
    # label. Skewness is corrected if that lowers t (Hall, 1992, On the removal of skewness by
    # transformation). benchmarks/false_verdicts.py shows the effect.
    single = units(difference, groups)
    values = np.append(single, max(float(single.max()), blind, 0.0))
    n, mean = len(values), float(values.mean())
    n_differing = n_marked(np.abs(difference) > ROUNDING, groups)
    if mean >= 0 or n_differing < least(groups):
        return 0.0
    sd = float(values.std(ddof=1))
    s, skewness = mean / sd, float(((values - mean) ** 3).mean()) / float(values.std()) ** 3
    hall = s + skewness * s**2 / 3 + skewness**2 * s**3 / 27 + skewness / (6 * n)
    return float(max(0.0, -max(s, hall) * n**0.5))


def _paired_p(difference: Array, blind: float, groups: Array | None) -> float:
    sign, n = 1 if difference.mean() < 0 else -1, n_counted(len(difference), groups)
    return 2 * _tail(n, gain_t(sign * difference, sign * blind, groups))


def _tail(freedom: float, t: float) -> float:
    """The upper tail of Student's t; of the normal, at infinite degrees of freedom."""
    from scipy.special import stdtr  # imported late, because scipy takes seconds to import

    return float(stdtr(freedom, -t))


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A candidate and the incumbent on the select split; ``None`` where one was not evaluable."""

    n_examples: int
    nll: float | None
    incumbent_nll: float | None
    top1: float | None
    incumbent_top1: float | None
    nll_difference: float | None  # paired mean, candidate less incumbent
    nll_se: float | None
    top1_difference: float | None
    top1_se: float | None


@dataclass(frozen=True, kw_only=True)
class Decision(Evidence):
    """Whether the candidate replaces the incumbent, and why."""

    stage: str  # statistics, example weight or fine-tuning
    candidate: str
    incumbent: str
    z: float  # required number of standard errors
    admitted: bool
    reason: str
    by_reference: bool = False  # nll and top1 are then divergence and agreement
    words: Words = LABELS.words  # the task's

    @property
    def measures(self) -> tuple[str, str]:
        """Headings of the loss and of the score; the score's is empty if there is none."""
        return self.words.loss_heading, self.words.score_heading


def judge(
    stage: str, candidate: tuple[str, Metrics], incumbent: tuple[str, Metrics], z: float = 2.0
) -> Decision:
    """Judge a candidate against the incumbent, on the same examples of the select split.

    It is admitted if its mean loss is lower by more than ``z`` standard errors of the paired
    difference (and by more than rounding), and its score (top-1, if any) is not lower by more than
    ``z`` of the score's standard errors. On few examples ``z`` is not enough: `gain_t` must be as
    improbable by Student's t as ``z`` is by the normal distribution. The incumbent wins ties and
    below 20 examples. A model that cannot be evaluated (`Metrics.problem`) loses to one that can.
    """
    if not z >= 0:
        raise ConfigError(f"z: {z}, expected at least 0 standard errors.", name="z")
    (name, new), (old_name, old) = candidate, incumbent
    loss: Any = (None, None)
    score: Any = (None, None)
    if new.problem:
        admitted, reason = False, f"it cannot be evaluated: {new.problem}"
    elif old.problem:
        admitted, reason = True, f"{old_name!r} cannot be evaluated: {old.problem}"
    else:
        before, after = paired_examples(old, new)
        loss = mean_and_se(after.losses - before.losses, after.groups)
        if before.scores is not None and after.scores is not None:
            score = mean_and_se(after.scores * 1.0 - before.scores, after.groups)
        admitted, reason = _admitted(before, after, loss, score, z=z)
    return Decision(
        stage=stage,
        candidate=name,
        incumbent=old_name,
        n_examples=new.n_examples,
        nll=new.nll,
        incumbent_nll=old.nll,
        top1=new.top1,
        incumbent_top1=old.top1,
        nll_difference=loss[0],
        nll_se=loss[1],
        top1_difference=score[0],
        top1_se=score[1],
        z=z,
        admitted=admitted,
        reason=reason,
        by_reference=isinstance(new.task, Reference),
        words=new.task.words,
    )


def _admitted(
    old: PerExample, new: PerExample, loss: _MeanAndSe, score: Any, *, z: float
) -> tuple[bool, str]:
    """Whether mean differences with these standard errors suffice, and why."""
    (difference, se), of_loss, words, groups = loss, new.words.loss, new.words, new.groups
    n, what = n_counted(len(new.losses), groups), "examples" if groups is None else "groups"
    if new.shortfall:
        return False, f"{n} {what} are too few to judge; it takes {least(groups)}"
    if not (difference < -z * se and difference < -ROUNDING):
        return False, f"its {of_loss} is not lower by more than {z:g} standard errors"
    t = gain_t(new.losses - old.losses, new.blind_loss - old.blind_loss, groups)
    # z = 0 requires no proof, only a lower mean.
    if z and not _tail(n, t) < _tail(math.inf, z):
        unproven = f"but {n} {what} with such differences do not prove it"
        return False, f"its {of_loss} is lower, {unproven}"
    if score[0] is not None and score[0] < -z * score[1]:
        return False, f"its {words.score} is lower by more than {z:g} standard errors"
    alike = se <= ROUNDING * abs(difference)
    by = "the same for every example" if alike else f"{-difference / se:.1f} standard errors"
    return True, f"its {of_loss} is lower by {-difference:.3g}{words.unit}, {by}"


def describe_easier(work: Metrics, test: Metrics) -> list[str]:
    """A sentence if work examples are so much easier that they look like training examples."""
    one, other = work.examples, test.examples
    if one is None or other is None or one.words != other.words:
        return []
    columns = [(one.losses, other.losses)]
    if one.scores is not None and other.scores is not None:
        columns.append((-1.0 * one.scores, -1.0 * other.scores))
    means = []
    for (mine, theirs), z in zip(columns, _EASIER, strict=False):
        (a, se), (b, se_b) = mean_and_se(mine, one.groups), mean_and_se(theirs, other.groups)
        if a - b >= -z * math.hypot(se, se_b):
            return []
        means.append((a, b))
    (a, b), *score = means
    if a > _MOST_OF_LOSS * b:
        return []
    words = one.words
    found = f"{words.loss} is {a:.3g} on images of the work data, {b:.3g} on the test data"
    found += "".join(f", {words.score} {-a:.3g} and {-b:.3g}" for a, b in score)
    return [
        f"{found}. This is typical of work images that the network was trained on. New images gain "
        "less, and another candidate may be best for them. Choose on images that the network has "
        "never seen: --select DATA."
    ]


def mean_and_se(difference: Array, groups: Array | None) -> _MeanAndSe:
    """The mean and its standard error, by groups if there are any."""
    single = units(difference, groups)
    n = len(single)
    se = float(single.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return float(difference.mean()), float(se)
