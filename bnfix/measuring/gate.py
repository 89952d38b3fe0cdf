"""May this candidate replace that one? Paired losses on examples that neither was fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr, stdtr  # as scipy.stats computes them

from bnfix.errors import ConfigError
from bnfix.measuring.intervals import Array
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.pairing import LEAST_EXAMPLES, ROUNDING, gain_t, paired_examples


@dataclass(frozen=True)
class Decision:
    """A judgement of the gate, with the numbers behind it.

    Args:
        stage: what was being decided: ``statistics``, ``example weight``, ``fine-tuning``.
        candidate: in words.
        incumbent: what it would replace, in words.
        n_examples: of the select split.
        nll: the candidate's mean loss there; ``None``, as all that follows from it, if it cannot be
            evaluated.
        incumbent_nll: the incumbent's.
        top1: the candidate's fraction right there.
        incumbent_top1: the incumbent's.
        nll_difference: paired mean, candidate less incumbent.
        nll_se: its standard error.
        top1_difference: paired mean, candidate less incumbent.
        top1_se: its standard error.
        z: standard errors demanded.
        admitted: whether the candidate takes over.
        reason: in words.
    """

    stage: str
    candidate: str
    incumbent: str
    n_examples: int
    nll: float | None
    incumbent_nll: float | None
    top1: float | None
    incumbent_top1: float | None
    nll_difference: float | None
    nll_se: float | None
    top1_difference: float | None
    top1_se: float | None
    z: float
    admitted: bool
    reason: str


def judge(
    stage: str,
    candidate: tuple[str, Metrics],
    incumbent: tuple[str, Metrics],
    z: float = 2.0,
) -> Decision:
    """Judge a candidate against what stands, on the same select examples.

    It is admitted if its mean loss is lower by more than ``z`` standard errors of the paired
    difference (and by more than rounding), and its top-1 is not lower by more than ``z`` of its
    own. On few examples more is demanded than ``z``: `gain_t` must be as improbable by Student's t
    as ``z`` is by the normal distribution. Ties go to the incumbent, and so do fewer than 20
    examples. What cannot be evaluated (`Metrics.problem`) loses to all that can.
    """
    if not z >= 0:
        raise ConfigError(f"z: {z}, expected at least 0 standard errors.", name="z")
    (name, new), (old_name, old) = candidate, incumbent
    nll_difference = nll_se = top1_difference = top1_se = None
    if new.problem:
        admitted, reason = False, f"it cannot be evaluated: {new.problem}"
    elif old.problem:
        admitted, reason = True, f"{old_name!r} cannot be evaluated: {old.problem}"
    else:
        before, after = paired_examples(old, new)
        loss = nll_difference, nll_se = _mean_and_se(after.losses - before.losses)
        top1 = top1_difference, top1_se = _mean_and_se(after.right * 1.0 - before.right)
        n = len(after.losses)
        t = gain_t(after.losses - before.losses, after.blind_loss - before.blind_loss)
        # z = 0 demands no proof, only a lower mean.
        sure = z == 0 or stdtr(n, -t) < ndtr(-z)
        admitted, reason = _admitted(n, loss, top1, z, sure=sure)
    return Decision(
        stage=stage,
        candidate=name,
        incumbent=old_name,
        n_examples=new.n_examples,
        nll=new.nll,
        incumbent_nll=old.nll,
        top1=new.top1,
        incumbent_top1=old.top1,
        nll_difference=nll_difference,
        nll_se=nll_se,
        top1_difference=top1_difference,
        top1_se=top1_se,
        z=z,
        admitted=admitted,
        reason=reason,
    )


def _admitted(
    n: int, loss: tuple[float, float], top1: tuple[float, float], z: float, *, sure: bool
) -> tuple[bool, str]:
    """Whether mean differences with these standard errors are enough, and why."""
    difference, se = loss
    if n < LEAST_EXAMPLES:
        return False, f"{n} examples cannot judge, it takes {LEAST_EXAMPLES}"
    if not (difference < -z * se and difference < -ROUNDING):
        return False, f"its loss is not lower by more than {z:g} standard errors"
    if not sure:
        return False, f"its loss is lower, but {n} examples with such differences do not prove it"
    if top1[0] < -z * top1[1]:
        return False, f"its top-1 is lower by more than {z:g} standard errors"
    alike = se <= ROUNDING * abs(difference)
    by = "the same for every example" if alike else f"{-difference / se:.1f} standard errors"
    return True, f"its loss is lower by {-difference:.3g} nats, {by}"


def _mean_and_se(difference: Array) -> tuple[float, float]:
    n = len(difference)
    se = float(difference.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return float(difference.mean()), float(se)
