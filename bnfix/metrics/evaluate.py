"""One pass over the data to the outputs of one model or several, and those to metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError, ModelError, NumericError
from bnfix.metrics.metrics import Metrics, losses_of, measure, refuse_not_finite
from bnfix.metrics.task import (
    LABELS,
    Array,
    Reference,
    Task,
    as_array,
    caller,
    raw_labels,
)


@dataclass(frozen=True, repr=False, eq=False)
class Outputs:
    """The outputs of one model for all examples, one row an example."""

    outputs: Array  # (N, K) logits, or (N, ...) of another task; float32
    labels: Array | None  # or what else the task gives as targets
    images_per_second: float  # through the model, without loading
    positions: Array | None = None  # of the examples in their data, where the batches say them
    task: Task = LABELS

    @property
    def classified(self) -> bool:
        """Whether these are logits, with classes for labels if there are any."""
        if self.outputs.ndim != 2 or not self.outputs.size:
            return False
        y = self.labels
        if y is None or self.task != LABELS:
            return True
        ok = y.dtype.kind in "iub" and y.shape == self.outputs.shape[:1]
        return bool(ok and 0 <= y.min() <= y.max() < self.outputs.shape[1])


@dataclass(frozen=True)
class Score:
    """Loss and accuracy without intervals, for searches."""

    n_examples: int
    nll: float
    top1: float
    losses: Array = field(compare=False, repr=False)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    reference: nn.Module | None = None,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Metrics:
    """Measure a classifier in evaluation mode, by labels or by another network's predictions.

    Args:
        model: on the device to run on; modes are left as found.
        batches: any iterable of ``(x, y)``; without labels only logits and speed are had.
        reference: the network O whose predictions are the targets in place of labels, which are
            then not read. ``nll`` is the mean of KL(p_O || p) = sum_k p_O (log p_O - log p),
            0 for equal logits, and ``top1`` the fraction with the same largest logit.
        forward: called as ``forward(model, batch)`` and returns logits, for unusual batches.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seed: of the bootstrap and of the halves for the temperature.

    Returns:
        The metrics with 95% intervals.

    Raises:
        DataError: if there are no examples, or labels do not fit.
        ModelError: if the output is no logits, or not always for the same number of classes, which
            must be the reference's too.
        NumericError: if a logit is not finite.
    """
    task = LABELS if reference is None else Reference(reference, forward)
    (found,) = collect([model], batches, task, forward=forward, precision=precision)
    return _measure(found, seed)


def _measure(found: Outputs, seed: int) -> Metrics:
    return measure(
        found.outputs,
        found.labels,
        task=found.task,
        images_per_second=found.images_per_second,
        seed=seed,
    )


def measured(found: Outputs, seed: int) -> Metrics:
    """Metrics of logits, or why there are none; of other outputs only their number."""
    problem = ""
    if found.classified:
        try:
            return _measure(found, seed)
        except NumericError:
            problem = "its logits are not finite"
    rate = found.images_per_second
    return Metrics(n_examples=len(found.outputs), images_per_second=rate, problem=problem)


def against(found: Outputs, reference: Outputs, task: Reference) -> Outputs:
    """The same outputs, with those of the task's network on the same examples as their targets."""
    ours, theirs = found.positions, reference.positions
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        raise DataError("reference: it was run on other examples. Run it on the same ones.")
    return replace(found, labels=reference.outputs, task=task)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    task: Task = LABELS,
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> Score:
    """Measure loss and accuracy only, without the cost of intervals."""
    (found,) = collect([model], batches, task, forward=forward, precision=precision)
    logits, targets = found.outputs, found.labels
    if targets is None:
        raise DataError("batches: no labels in them. Give (x, y) with integer classes y.")
    refuse_not_finite(logits)
    targets, labels = task.checked(targets, logits.shape)
    losses = losses_of(logits, targets, task)
    right = logits.argmax(1) == labels
    return Score(len(labels), float(losses.mean()), float(right.mean()), losses)


def collect(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    task: Task = LABELS,
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    any_task: bool = False,
) -> list[Outputs]:
    """Run several models over the same batches, which are read once."""
    gathered = [_Gathered(model, task, any_task) for model in models]

    def own_share() -> list[tuple[list[_Row], float]]:
        with ExitStack() as modes:
            for model in dict.fromkeys(models):
                modes.enter_context(guards.inference(model))
            for batch in batches:
                for one in gathered:
                    one.take(batch, forward, precision)
        return [(one.rows, one.rate) for one in gathered]

    shares = distributed.together(own_share)
    if not any(len(found) for share in shares for rows, _ in share for found, *_ in rows):
        raise DataError("evaluation: no examples. Give at least one batch.")
    return [_put_together(parts, task) for parts in zip(*shares, strict=True)]


#: Outputs, labels and positions of one batch.
_Row = tuple[Array, Array | None, Array | None]


class _Gathered:
    """One model's outputs, batch by batch, and the time they took."""

    def __init__(self, model: nn.Module, task: Task, any_task: bool) -> None:
        self.model, self.task, self.any_task = model, task, any_task
        self.device = runtime.device_of(model)
        self.rows: list[_Row] = []
        self._n_timed, self._seconds = 0, 0.0

    @property
    def rate(self) -> float:
        """Examples a second."""
        return self._n_timed / max(self._seconds, 1e-9)

    def take(self, batch: Any, forward: runtime.Forward | None, precision: str) -> None:
        if len(self.rows) == 1:
            self._n_timed, self._seconds = 0, 0.0  # the first batch also warms up
        started = time.perf_counter()
        with runtime.autocast(self.device, precision):
            output = runtime.run(self.model, batch, self.device, forward)
            rows = self.any_task and isinstance(output, Tensor) and output.ndim > 0
            tensor: Tensor = output if rows else runtime.logits_of(output)
        found = tensor.float().cpu().numpy()
        self._n_timed += len(found)
        self._seconds += time.perf_counter() - started
        if self.rows:
            _check_shape(found.shape[1:], self.rows[0][0].shape[1:], len(self.rows))
        if self.any_task:
            raw = raw_labels(batch)
            labels = None if raw is None else as_array(raw)
        else:
            targets = self.task.targets(batch, tensor, caller(self.model, forward))
            labels = None if targets is None else targets.cpu().numpy()
        index = getattr(batch, "index", None)  # of plain tuples a method
        self.rows.append((found, labels, index if isinstance(index, np.ndarray) else None))


def _check_shape(new: tuple[int, ...], old: tuple[int, ...], n_batches: int) -> None:
    if new == old:
        return
    if len(new) == len(old) == 1:
        raise ModelError(
            f"evaluation: {new[0]} logits in batch {n_batches}, but {old[0]} before it. Expected "
            "one number of classes."
        )
    raise ModelError(
        f"evaluation: outputs of shape {new} an example in batch {n_batches}, but {old} before "
        "it. Expected one shape."
    )


def _put_together(parts: Sequence[tuple[list[_Row], float]], task: Task) -> Outputs:
    """One model's rows of all ranks, in the order in which batches were dealt."""
    rows = distributed.interleaved([rows for rows, _ in parts])
    labels = [labels for _, labels, _ in rows if labels is not None]
    positions = [index for *_, index in rows if index is not None]
    if labels and len(labels) < len(rows):
        raise DataError(
            f"labels: {len(rows) - len(labels)} of {len(rows)} batches have none. Give labels "
            "in all batches, or in none."
        )
    return Outputs(
        outputs=np.concatenate([found for found, *_ in rows]),
        labels=np.concatenate(labels) if labels else None,
        images_per_second=sum(rate for _, rate in parts),
        positions=np.concatenate(positions) if len(positions) == len(rows) else None,
        task=task,
    )


def first_look(
    what: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: runtime.Forward | None = None,
    of_output: Callable[[Any], Any] | None = None,
) -> list[tuple[list[tuple[str, int]], Any]]:
    """Run one batch on every rank: names and positions a map of the modules called, in order.

    ``of_output`` says something small about the output, for all ranks to know.
    """

    def look() -> tuple[list[tuple[str, int]], Any] | None:
        calls: list[tuple[str, int]] = []

        def note(name: str, module: nn.Module, args: Any, output: Tensor) -> None:
            calls.append((name, math.prod(output.shape[2:]) if len(output) else 0))

        for batch in batches:
            with guards.inference(model), guards.hooks() as handles:
                for name, module in modules.items():
                    handles.append(module.register_forward_hook(partial(note, name)))
                output = runtime.run(model, batch, runtime.device_of(model), forward)
            return calls, None if of_output is None else of_output(output)
        return None

    # A rank may have no batch.
    found = [seen for seen in distributed.together(look) if seen is not None]
    if not found:
        raise DataError(f"{what}: no examples. Give at least one batch.")
    return found
