"""Run one or several models over the data in one pass, and turn their outputs into metrics."""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import ConfigError, DataError, ModelError, NumericError, count, plain
from bnfix.core.settings import TaskRecipe
from bnfix.metrics.metrics import (
    Metrics,
    PerExample,
    chunks,
    log_softmax,
    losses_of,
    measure,
    measure_rows,
    numbered,
    refuse_not_finite,
    units,
)  # fmt: skip
from bnfix.metrics.task import (
    LABELS,
    Array,
    ByRows,
    Judged,
    Labels,
    Reference,
    Task,
    as_array,
    caller,
    raw_labels,
)  # fmt: skip
from bnfix.metrics.tasks import Own, judged_by, resolve_task


@dataclass(frozen=True, repr=False, eq=False)
class Outputs:
    """The stored outputs of one model, one row per example."""

    outputs: Array  # (N, K) logits, float32, or (N, ...) for the user's metrics; else (N, 0)
    labels: Array | None  # or the task's other targets
    images_per_second: float  # through the model, without loading
    positions: Array | None = None  # the examples' positions in the data, if batches give them
    task: Task = LABELS
    examples: PerExample | None = None  # for a task that keeps no outputs, if there are targets
    left_out: int = 0  # examples without any valid target
    groups: Array | None = None  # the examples' groups, numbered from 0
    at_fault: Array | None = None  # positions where only the user's loss is not finite

    def refuse_own_loss(self) -> None:
        """Raise if the user's loss of the input network is not finite although its outputs are."""
        if self.at_fault is not None and len(self.at_fault):
            raise ConfigError(
                f"--loss {plain(str(getattr(self.task, 'loss', '')))}: not finite for example "
                f"{self.at_fault.min()} (from 0), though its outputs are. Correct the function, or "
                "that example's targets.",
                name="loss",
            )

    @property
    def classified(self) -> bool:
        """Whether these are logits, and any labels are classes."""
        if isinstance(self.task, ByRows) or self.outputs.ndim != 2 or not self.outputs.size:
            return False
        y = self.labels
        if y is None or self.task != LABELS:
            return True
        ok = y.dtype.kind in "iub" and y.shape == self.outputs.shape[:1]
        return bool(ok and 0 <= y.min() <= y.max() < self.outputs.shape[1])


@dataclass(frozen=True)
class Score:
    """Loss and score without intervals, for searches."""

    n_examples: int
    nll: float  # the mean loss
    top1: float  # the mean score; NaN for a task without a score
    losses: Array = field(compare=False, repr=False)
    task: Task = field(default=LABELS, compare=False, repr=False)
    groups: Array | None = field(default=None, compare=False, repr=False)

    @property
    def counted(self) -> Array:
        """One loss per example, or per group."""
        return units(self.losses, self.groups)


def evaluate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    task: Judged = "auto",
    reference: nn.Module | None = None,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    groups: Any = None,
    seed: int = 0,
) -> Metrics:
    """Measure a model in evaluation mode, against targets or another network's predictions.

    Args:
        model: the model, on the device to run on; its modes are restored.
        batches: any iterable of ``(x, y)``; without labels the result has only logits and speed.
        task: ``classification``, ``segmentation``, ``multilabel``, ``regression``, or ``auto``, the
            task that fits the first batch; a `bnfix.settings.TaskRecipe`; or a function of outputs
            and targets that returns one loss per example, a tensor ``(N,)``.
        reference: a network O whose predictions replace the labels, which are then not read.
            ``nll`` is the mean of KL(p_O || p) = sum_k p_O (log p_O - log p) in nats, 0 for equal
            logits; ``top1`` is the fraction of examples with the same largest logit.
        forward: called as ``forward(model, batch)``, returns logits; for unusual batches.
        precision: precision of the forward passes: ``fp32``, ``bf16`` or ``fp16``.
        groups: ``(N,)``, one number or word per example, equal for examples that depend on each
            other, such as frames of one video. Intervals and comparisons then count groups.
        seed: seed of the bootstrap, and of the halves on which the temperature is fitted.

    Returns:
        The metrics with 95% intervals.

    Raises:
        ConfigError: if the user's loss fails, or does not return one number per example.
        DataError: if there are no examples, or if targets do not fit.
        ModelError: if the outputs are not logits, or if the number of classes changes or differs
            from the reference's.
        NumericError: if an output or a loss is not finite.
    """
    wanted = judged_by(task) if reference is None else Reference(reference, forward)
    (found,) = collect(
        [model], batches, wanted, forward=forward, precision=precision, groups=groups
    )
    return _measure(found, seed)


def _measure(found: Outputs, seed: int) -> Metrics:
    how: Any = {"images_per_second": found.images_per_second, "seed": seed}
    if not isinstance(found.task, ByRows):
        how["groups"] = found.groups
        m = measure(found.outputs, found.labels, task=found.task, **how)
        return tempered(m) if isinstance(found.task, Labels) and found.task.tempered else m
    if found.examples is not None:
        return measure_rows(found.examples, found.task, **how)
    return _unmeasured(found)


def tempered(found: Metrics, temperature: float | None = None) -> Metrics:
    """A classifier's metrics with its loss and losses at a temperature.

    The default is its own temperature, fitted for each example on the half without that example.
    """
    t, z, examples = temperature or found.temperature, found.logits, found.examples
    if t is None or examples is None or examples.scaled_losses is None:
        return found
    losses, b = examples.scaled_losses, 1 / t
    if temperature is not None:
        losses = losses_of(z, examples.labels, LABELS, b)
    blind = -sum(float(log_softmax(z[part], b).mean(1).sum()) for part in chunks(z)) / len(z)
    examples = replace(examples, losses=losses, blind_loss=blind)
    return replace(found, nll=float(losses.mean()), examples=examples)


def _unmeasured(found: Outputs, problem: str = "") -> Metrics:
    rate, n = found.images_per_second, len(found.outputs)
    return Metrics(n_examples=n, images_per_second=rate, problem=problem, task=found.task)


def measured(found: Outputs, seed: int) -> Metrics:
    """The task's metrics, or the reason why there are none; for other outputs only their number."""
    by_rows = isinstance(found.task, ByRows)
    if not (found.classified or by_rows):
        return _unmeasured(found)
    try:
        return _measure(found, seed)
    except NumericError:
        return _unmeasured(found, f"its {'losses' if by_rows else 'logits'} are not finite")


def stacked(copies: Sequence[Outputs]) -> Outputs:
    """Joined outputs of several copies of a network on the same examples; one group per example."""
    first = copies[0]
    if len(copies) == 1:
        return first

    def joined(parts: Sequence[Any], *names: str) -> dict[str, Any]:
        held = [name for name in names if getattr(parts[0], name) is not None]
        return {name: np.concatenate([getattr(part, name) for part in parts]) for name in held}

    ids = np.arange(len(first.outputs)) if first.groups is None else first.groups
    groups, examples = np.tile(ids, len(copies)), first.examples
    if examples is not None:
        rows = joined([one.examples for one in copies], "labels", "losses", "scores", "rows")
        examples = replace(examples, groups=groups, **rows)
    found = joined(copies, "outputs", "labels", "positions", "at_fault")
    return replace(first, examples=examples, groups=groups, **found)


def describe_left_out(found: Iterable[Outputs]) -> list[str]:
    """A sentence if examples had no valid target."""
    every = {one.left_out for one in found} - {0}
    return [f"left out: {count(n, 'examples')} without a valid position." for n in every]


def against(found: Outputs, reference: Outputs, task: Reference) -> Outputs:
    """The same outputs, with the reference network's outputs as targets."""
    ours, theirs = found.positions, reference.positions
    if ours is not None and theirs is not None and not np.array_equal(ours, theirs):
        raise DataError("reference: it was run on other examples. Run it on the same examples.")
    return replace(found, labels=reference.outputs, task=task)


def score(
    model: nn.Module,
    batches: Iterable[Any],
    task: Task | None = LABELS,
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
) -> Score:
    """Measure only loss and score, without the cost of intervals."""
    (found,) = collect([model], batches, task, forward=forward, precision=precision)
    logits, targets, task = found.outputs, found.labels, found.task
    scores: Array | None
    if (rows := found.examples) is not None:
        losses, scores = rows.losses, rows.scores
        if not np.isfinite(losses).all():
            raise NumericError(f"evaluation: the {rows.words.loss} is not finite.")
    elif targets is None or isinstance(task, ByRows):
        raise DataError("batches: no labels in them. Give (x, y) with integer classes y.")
    else:
        refuse_not_finite(logits)
        targets, labels = task.checked(targets, logits.shape)
        losses, scores = losses_of(logits, targets, task), logits.argmax(1) == labels
    top1 = math.nan if scores is None else float(scores.mean())
    how: Any = {"losses": losses, "task": task, "groups": found.groups}
    return Score(len(losses), float(losses.mean()), top1, **how)


def collect(
    models: Sequence[nn.Module],
    batches: Iterable[Any],
    task: Task | None = LABELS,
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    any_task: bool = False,
    groups: Any = None,
) -> list[Outputs]:
    """Run several models over the same batches, which are read once.

    Without a task, the first batch decides it. With ``any_task``, outputs of any form are kept.
    ``batches.groups``, if present, holds groups by the examples' positions.
    """
    groups = getattr(batches, "groups", None) if groups is None else groups
    gathered = [_Gathered(model, task, any_task) for model in models]

    def own_share() -> list[_Share]:
        with ExitStack() as modes:
            for model in dict.fromkeys(models):
                modes.enter_context(guards.inference(model))
            for batch in batches:
                for one in gathered:
                    one.take(batch, forward, precision)
        # All ranks know a given task, and it can contain objects that cannot be sent.
        return [(one.rows, one.rate, one.task if task is None else None) for one in gathered]

    shares = distributed.together(own_share)
    if not any(len(row["outputs"]) for share in shares for rows, *_ in share for row in rows):
        raise DataError("evaluation: no examples. Give at least one batch.")
    return [_put_together(parts, task, groups) for parts in zip(*shares, strict=True)]


#: One batch's outputs, its labels or the task's numbers per example, and positions.
_Row = dict[str, Array]
#: One model on one rank: rows, examples per second, and the task if the batches decided it.
_Share = tuple[list[_Row], float, Task | None]


class _Gathered:
    """One model's outputs, batch by batch, and their time."""

    def __init__(self, model: nn.Module, task: Task | None, any_task: bool) -> None:
        self.model, self.task, self.any_task = model, task, any_task
        self.device = runtime.device_of(model)
        self.rows: list[_Row] = []
        self._n_timed, self._seconds = 0, 0.0

    @property
    def rate(self) -> float:
        """Examples per second."""
        return self._n_timed / max(self._seconds, 1e-9)

    def take(self, batch: Any, forward: runtime.Forward | None, precision: str) -> None:
        if len(self.rows) == 1:
            self._n_timed, self._seconds = 0, 0.0  # leave out the first batch, which also warms up
        model = caller(self.model, forward)
        started = time.perf_counter()
        with runtime.autocast(self.device, precision):
            output = runtime.run(self.model, batch, self.device, forward)
        if self.task is None:
            self.task = resolve_task(TaskRecipe(), output, raw_labels(batch, model))
        by_rows = isinstance(self.task, ByRows)
        as_is = self.any_task and not by_rows and isinstance(output, Tensor) and output.ndim > 0
        outputs = output if as_is else self.task.output(output)
        n = runtime.n_examples_of(batch) if by_rows else len(outputs)
        if by_rows and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        kept = self.any_task or not by_rows
        found = runtime.output_of(outputs).float().cpu().numpy() if kept else np.empty((n, 0))
        self._n_timed += n
        self._seconds += time.perf_counter() - started
        row: _Row = {"outputs": found}
        if self.rows:
            self._check_shape(found.shape[1:])
        targets = None
        if by_rows or not self.any_task:
            targets = self.task.targets(batch, outputs, model)
        if isinstance(self.task, ByRows) and targets is not None:
            row |= _judged(self.task, outputs, runtime.move(targets, self.device))
        if self.any_task:
            targets = raw_labels(batch)
        if targets is not None and kept:
            row["labels"] = as_array(targets)
        index = getattr(batch, "index", None)  # on a plain tuple this is a method
        self.rows.append(row | ({"index": index} if isinstance(index, np.ndarray) else {}))

    def _check_shape(self, new: tuple[int, ...]) -> None:
        old = self.rows[0]["outputs"].shape[1:]
        if new != old:
            logits = len(new) == len(old) == 1
            what = f"{new[0]} logits" if logits else f"outputs of shape {new} per example"
            one = "number of classes" if logits else "shape"
            raise ModelError(
                f"evaluation: {what} in batch {len(self.rows)}, but {old[0] if logits else old} "
                f"before it. Expected one {one}."
            )


#: Output numbers that are judged at a time, in float64.
_AT_ONCE = 2**22


@torch.no_grad()
def _judged(task: ByRows, outputs: Any, targets: Any) -> dict[str, Array]:
    """The task's numbers for each example of a batch."""
    if isinstance(task, Own):  # the user's function can depend on the whole batch
        losses, found = task.losses(outputs, targets), runtime.tensors_in(outputs)
        # Squares of larger outputs can overflow; then the function is not to blame.
        usual = all(bool((t.abs() < 1e15).all()) for t in found if t.is_floating_point())
        at_fault = usual & ~losses.isfinite()
        return {"losses": losses.double().cpu().numpy(), "at_fault": at_fault.cpu().numpy()}
    parts: list[dict[str, Array]] = []
    size = max(1, _AT_ONCE * len(outputs) // max(1, outputs.numel()))
    for z, y in zip(outputs.split(size), targets.split(size), strict=True):
        # Losses are in float64 like all others; facts come from the outputs without conversion.
        said = {"losses": task.losses(z.double(), y), **task.facts(z, y)}
        parts.append({k: v.double().cpu().numpy() for k, v in said.items()})
        parts[-1]["sums"] = np.array([zlib.crc32(t.cpu().numpy().tobytes()) for t in y], np.int64)
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _put_together(parts: Sequence[_Share], task: Task | None, groups: Any) -> Outputs:
    """One model's rows of all ranks, in the order in which the batches were dealt."""
    rows = distributed.interleaved([rows for rows, *_ in parts])
    task = task or next(found for *_, found in parts if found is not None)
    known = sum(not {"labels", "losses"}.isdisjoint(row) for row in rows)
    if 0 < known < len(rows):
        raise DataError(
            f"labels: {len(rows) - known} of {len(rows)} batches have none. Give labels "
            "in all batches or in none."
        )
    names = set.intersection(*map(set, rows))
    found = {name: np.concatenate([row[name] for row in rows]) for name in names}
    if groups is not None:
        found["groups"] = np.asarray(groups)
        if "index" in found:
            found["groups"] = found["groups"][found["index"]]
        numbered(found["groups"], len(found["outputs"]))  # refuses a wrong number of groups
    counted = found.pop("counted", np.ones(len(found["outputs"]))) > 0
    if not counted.any():
        raise DataError("evaluation: no example has a valid target. Check --ignore-index.")
    found = {name: values[counted] for name, values in found.items()}
    ids = numbered(found.get("groups"), len(found["outputs"]))
    examples = None
    if "losses" in found:
        examples = PerExample(
            labels=found.get("sums", np.zeros(int(counted.sum()), np.int64)),
            losses=found["losses"], scaled_losses=None, scores=found.get("scores"),
            blind_loss=float(found["blind"].mean()) if "blind" in found else 0.0,
            words=task.words, rows=found.get("rows"), groups=ids,
        )  # fmt: skip
    at_fault = np.flatnonzero(found.get("at_fault", ()))
    return Outputs(
        at_fault=found["index"][at_fault] if "index" in found else at_fault,
        outputs=found["outputs"], labels=found.get("labels"), positions=found.get("index"),
        images_per_second=sum(rate for _, rate, _ in parts),
        task=task, examples=examples, groups=ids, left_out=int((~counted).sum()),
    )  # fmt: skip


def first_look(
    what: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Any],
    forward: runtime.Forward | None = None,
    of_output: Callable[[Any], Any] | None = None,
) -> list[tuple[list[tuple[str, int]], Any]]:
    """Run one batch on every rank; list the called modules and their positions per feature map.

    ``of_output`` extracts something small from the output, which all ranks receive.
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

    # A rank can have no batch.
    found = [seen for seen in distributed.together(look) if seen is not None]
    if not found:
        raise DataError(f"{what}: no examples. Give at least one batch.")
    return found
