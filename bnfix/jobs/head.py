"""What is done to the head of a classifier: a temperature, at which candidates are then judged."""

from __future__ import annotations

from functools import partial

import numpy as np

from bnfix.core import guards
from bnfix.core.errors import ModelError, NumericError
from bnfix.jobs.fits import Fits, Fitted, State
from bnfix.metrics.compare import judge
from bnfix.metrics.evaluate import tempered
from bnfix.metrics.metrics import inverse_temperature, refuse_not_finite
from bnfix.metrics.task import LABELS, Labels
from bnfix.training.head import find_head, move_logits_

TEMPERATURE = "temperature"


def named(temperature: float) -> str:
    """The candidate in words."""
    return f"temperature {temperature:.3g}"


def temperature(fits: Fits, now: State) -> Fitted:
    """The head divided by a temperature, fitted on fit and judged on select.

    If it is admitted, every other model is judged at a temperature of its own, fitted on one half
    of select and judged on the other, both ways: on what weights were learned from it would be too
    low.
    """
    if now.metrics is None or fits.task != LABELS:
        return _untried(fits, f"it is for classification, and the task is {fits.task.name}.")
    if now.metrics.temperature is None:
        return _untried(fits, f"{now.metrics.problem or 'the outputs are no logits'}.")
    before = guards.Snapshot(fits.model)
    try:
        t = _fitted(fits)
        cool_(fits, t)
    except (ModelError, NumericError) as error:
        return _untried(fits, str(error))
    finally:
        before.restore_()
    pair = (named(t), tempered(now.metrics, t)), (now.name, now.metrics)
    decision = judge(TEMPERATURE, *pair, fits.plan.gate.z)
    if decision.admitted:
        fits.task, fits.alone = Labels(tempered=True), (named(t), t)
    return Fitted(named(t) if decision.admitted else None, decisions=(decision,))


def _fitted(fits: Fits) -> float:
    """The temperature of the model as it is, on the fit split."""
    bench = fits.bench
    found = fits.outputs(
        fits.model, partial(bench.batches, bench.split.fit, "temperature: fitting")
    )
    refuse_not_finite(found.outputs)
    return 1 / inverse_temperature(found.outputs, np.asarray(found.labels))


def _untried(fits: Fits, why: str) -> Fitted:
    fits.bench.assumptions.append(f"a temperature was not tried: {why}")
    return Fitted(None, decisions=())


def cool_(fits: Fits, temperature: float) -> None:
    """Divide the logits by a temperature, in the head, which some examples show."""
    batches = fits.bench.batches(fits.bench.split.select[:8], "a look at the head").whole()
    head = find_head("temperature", fits.model, batches)
    move_logits_(fits.model, head, next(iter(batches)), 1 / temperature)
