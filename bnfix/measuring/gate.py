"""May this candidate replace that one? Paired losses on examples that neither was fitted on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfix.errors import ConfigError
from bnfix.measuring.intervals import Array
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.pairing import ROUNDING, paired_examples


@dataclass(frozen=True)
class Decision:
    """A judgement of the gate, with the numbers behind it.

    Args:
        stage: what was being decided: ``statistics``, ``example weight``, ``fine-tuning``.
        candidate: in words.
        incumbent: what it would replace, in words.
        n_examples: of the select split.
        nll: the candidate's mean loss there.
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
    nll: float
    incumbent_nll: float
    top1: float
    incumbent_top1: float
    nll_difference: float
    nll_se: float
    top1_difference: float
    top1_se: float
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
    own. Ties go to the incumbent, and so does a single example, which has no standard error.

    Args:
        stage: what is being decided.
        candidate: name and metrics.
        incumbent: name and metrics.
        z: standard errors demanded, at least 0.

    Returns:
        The decision.

    Raises:
        ConfigError: if z is below 0.
        DataError: if the two were not measured on the same labelled examples.
    """
    if not z >= 0:
        raise ConfigError(f"z: {z}, expected at least 0 standard errors.", name="z")
    (name, new_metrics), (old_name, old_metrics) = candidate, incumbent
    old, new = paired_examples(old_metrics, new_metrics)
    n = len(new.losses)
    loss, loss_se = _mean_and_se(new.losses - old.losses)
    top1, top1_se = _mean_and_se(new.right.astype(np.float64) - old.right)
    admitted = False
    if n < 2:
        reason = "a single example cannot judge"
    elif not (loss < -z * loss_se and loss < -ROUNDING):
        reason = f"its loss is not lower by more than {z:g} standard errors"
    elif top1 < -z * top1_se:
        reason = f"its top-1 is lower by more than {z:g} standard errors"
    else:
        admitted = True
        by = f"{-loss / loss_se:.1f} standard errors" if loss_se else "the same for every example"
        reason = f"its loss is lower by {-loss:.3g} nats, {by}"
    return Decision(
        stage, name, old_name, n, float(new.losses.mean()), float(old.losses.mean()),
        float(new.right.mean()), float(old.right.mean()), loss, loss_se, top1, top1_se, z,
        admitted, reason,
    )  # fmt: skip


def _mean_and_se(difference: Array) -> tuple[float, float]:
    n = len(difference)
    se = float(difference.std(ddof=1)) / np.sqrt(n) if n > 1 else 0.0
    return float(difference.mean()), float(se)
