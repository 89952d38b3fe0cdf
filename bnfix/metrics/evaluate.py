"""One pass over the data to the outputs of one model or several, and those to metrics."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError, ModelError, NumericError
from bnfix.metrics.metrics import (
    Array,
    Metrics,
    as_array,
    checked_labels,
    measure,
    nll_of,
    refuse_not_finite,
)


@dataclass(frozen=True, repr=False, eq=False)
class Outputs:
    """The outputs of one model for all examples, one row an example."""

    outputs: Array  # (N, K) logits, or (N, ...) of another task; float32
    labels: Array | None
    images_per_second: float  # through the model, without loading
    positions: Array | None = None  # of the examples in their data, where the batches say them

    @property
    def classified(self) -> bool:
        """Whether these are logits, with classes for labels if there are any."""
        if self.outputs.ndim != 2 or not self.outputs.size:
            return False
        y = self.labels
        if y is None:
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
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> Metrics:
    """Measure a classifier in evaluation mode on labelled batches.

    Args:
        model: on the device to run on; modes are left as found.
        batches: any iterable of ``(x, y)``; without labels only logits and speed are had.
        forward: called as ``forward(model, batch)`` and returns logits, for unusual batches.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        seed: of the bootstrap and of the halves for the temperature.

    Returns:
        The metrics with 95% intervals.

    Raises:
        DataError: if there are no examples, or labels do not fit.
        ModelError: if the output is no logits, or not always for the same number of classes.
        NumericError: if a logit is not finite.
    """
    (found,) = collect([model], batches, forward=forward, precision=precision)
    rate = found.images_per_second
    return measure(found.outputs, found.labels, images_per_second=rate, seed=seed)


def measured(found: Outputs, seed: int) -> Metrics:
    """Metrics of logits, or why there are none; of other outputs only their number."""
    n, rate, problem = len(found.outputs), found.images_per_second, ""
    if found.classified:
        try:
            return measure(found.outputs, found.labels, images_per_second=rate, seed=seed)
        except NumericError:
            problem = "its logits are not finite"
    return Metrics(n_examples=n, images_per_second=rate, problem=problem)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> Score:
    """Measure loss and accuracy only, without the cost of intervals."""
    (found,) = collect([model], batches, forward=forward, precision=precision)
    logits, labels = found.outputs, found.labels
    if labels is None:
        raise DataError("batches: no labels in them. Give (x, y) with integer classes y.")
    refuse_not_finite(logits)
    right = logits.argmax(1) == labels
    losses = nll_of(logits, labels)
    return Score(len(labels), float(losses.mean()), float(right.mean()), losses)


def labels_of(
    batch: Any, n_examples: int, n_classes: int, *, model: nn.Module | None = None
) -> Array | None:
    """Labels of a batch as int64, checked against logits `(N, K)`; `model` as for `unpack`."""
    labels = _raw_labels(batch, model)
    return None if labels is None else checked_labels(labels, n_examples, n_classes)


def _raw_labels(batch: Any, model: nn.Module | None = None) -> Any:
    if isinstance(batch, Mapping):
        batch = {"x": None, **batch}  # inputs may have any names where forward= is given
    return runtime.unpack(batch, model)[1]


def collect(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    any_task: bool = False,
) -> list[Outputs]:
    """Run several models over the same batches, which are read once."""
    gathered = [_Gathered(model, any_task) for model in models]

    def own_share() -> list[_Gathered]:
        with ExitStack() as modes:
            for model in dict.fromkeys(models):
                modes.enter_context(guards.inference(model))
            for batch in batches:
                for one in gathered:
                    one.take(batch, forward, precision)
        return gathered

    if distributed.here().shared:
        shares = distributed.together(lambda: [one.share() for one in own_share()])
        for one, parts in zip(gathered, zip(*shares, strict=True), strict=True):
            one.put_together(parts)
    else:
        own_share()
    labels = gathered[0].labels if gathered else []
    n_batches, n_labelled = len(labels), sum(y is not None for y in labels)
    if not gathered or gathered[0].n_seen == 0:
        raise DataError("evaluation: no examples. Give at least one batch.")
    if 0 < n_labelled < n_batches:
        raise DataError(
            f"labels: {n_batches - n_labelled} of {n_batches} batches have none. Give labels "
            "in all batches, or in none."
        )
    return [one.outputs() for one in gathered]


#: Outputs, labels and positions by batch, and examples a second, of one rank.
_Share = tuple[list[Array], list[Array | None], list[Array | None], float]


class _Gathered:
    """One model's outputs, batch by batch, and the time they took."""

    def __init__(self, model: nn.Module, any_task: bool) -> None:
        self.model, self.any_task, self.device = model, any_task, runtime.device_of(model)
        self.found: list[Array] = []
        self.labels: list[Array | None] = []
        self.positions: list[Array | None] = []
        self.n_seen = self._n_timed = 0
        self._seconds = 0.0
        self._others_rate = 0.0

    def share(self) -> _Share:
        """What this rank has, for the others."""
        rate = self._n_timed / max(self._seconds, 1e-9)
        return self.found, self.labels, self.positions, rate

    def put_together(self, parts: Sequence[_Share]) -> None:
        """What all ranks have, in the order in which batches were dealt."""
        self.found = distributed.interleaved([found for found, *_ in parts])
        self.labels = distributed.interleaved([labels for _, labels, *_ in parts])
        self.positions = distributed.interleaved([positions for *_, positions, _ in parts])
        self.n_seen = sum(map(len, self.found))
        own = self._n_timed / max(self._seconds, 1e-9)
        self._others_rate = sum(rate for *_, rate in parts) - own

    def take(self, batch: Any, forward: runtime.Forward | None, precision: str) -> None:
        started = time.perf_counter()
        with runtime.autocast(self.device, precision):
            output = runtime.run(self.model, batch, self.device, forward)
            rows = self.any_task and isinstance(output, Tensor) and output.ndim > 0
            tensor: Tensor = output if rows else runtime.logits_of(output)
        found = tensor.float().cpu().numpy()
        if self.n_seen == self._n_timed and self._n_timed:
            self._n_timed, self._seconds = 0, 0.0  # the first batch also warms up
        self._n_timed += len(found)
        self._seconds += time.perf_counter() - started
        self._check(found)
        self.found.append(found)
        caller = None if forward or runtime.has_forward(self.model) else self.model
        if self.any_task:
            labels = _raw_labels(batch)
            self.labels.append(None if labels is None else as_array(labels))
        else:
            self.labels.append(labels_of(batch, *found.shape, model=caller))
        index = getattr(batch, "index", None)  # of plain tuples a method
        self.positions.append(index if isinstance(index, np.ndarray) else None)
        self.n_seen += len(found)

    def _check(self, found: Array) -> None:
        if self.found and found.shape[1:] != self.found[0].shape[1:]:
            new, old = found.shape[1:], self.found[0].shape[1:]
            if len(new) == len(old) == 1:
                raise ModelError(
                    f"evaluation: {new[0]} logits in batch {len(self.found)}, but {old[0]} before "
                    "it. Expected one number of classes."
                )
            raise ModelError(
                f"evaluation: outputs of shape {new} an example in batch {len(self.found)}, but "
                f"{old} before it. Expected one shape."
            )

    def outputs(self) -> Outputs:
        given = [y for y in self.labels if y is not None]
        rate = self._n_timed / max(self._seconds, 1e-9) + self._others_rate
        labels = np.concatenate(given) if given else None
        known = [index for index in self.positions if index is not None]
        positions = np.concatenate(known) if len(known) == len(self.found) else None
        return Outputs(np.concatenate(self.found), labels, rate, positions)
