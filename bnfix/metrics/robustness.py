"""Models on corrupted images, and the same examples in other company: what stays the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfix.core import runtime
from bnfix.core.errors import DataError
from bnfix.data.corruptions import Corruption
from bnfix.metrics.compare import Paired, compare
from bnfix.metrics.evaluate import Outputs, collect, measured
from bnfix.metrics.intervals import Interval

#: Differences of logits up to this part of their largest size are rounding, by precision.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Shifted:
    """One model on images of one corruption; numbers as in `Metrics`, `None` if not evaluable."""

    model: str
    kind: str
    severity: int  # 1, 2 or 3
    n_examples: int
    top1: float | None
    nll: float | None
    nll_temperature_scaled: float | None
    interval: dict[str, Interval]
    paired: Paired | None  # against the first model on the same images; None for the first


def shifted(
    names: Sequence[str], found: Sequence[Outputs], corruption: Corruption, *, seed: int = 0
) -> list[Shifted]:
    """Judge several models by their logits for the same corrupted images."""
    every = [measured(one, seed) for one in found]
    rows = []
    for i, (name, m) in enumerate(zip(names, every, strict=True)):
        if m.examples is None and not m.problem:
            raise DataError("--corruptions: the examples have no labels. Give labels.")
        shown = ("top1", "nll", "nll_temperature_scaled")
        kept = {key: m.interval[key] for key in shown if key in m.interval}
        paired = compare(every[0], m, seed=seed) if i else None
        rows.append(
            Shifted(
                model=name,
                kind=corruption.kind,
                severity=corruption.severity,
                n_examples=m.n_examples,
                top1=m.top1,
                nll=m.nll,
                nll_temperature_scaled=m.nll_temperature_scaled,
                interval=kept,
                paired=paired,
            )
        )
    return rows


@dataclass(frozen=True)
class Company:
    """Logits of examples beside some examples, against the same beside others."""

    largest_difference: float  # of any logit
    top1_agreement: float  # fraction of the examples


@dataclass(frozen=True)
class BatchInvariance:
    """Whether an example's logits depend on which examples are computed beside it."""

    model: str
    n_examples: int
    batch_size: int
    alone: Company  # each example alone, against in its batch
    permuted: Company  # in a batch of other examples, against in its batch
    largest_logit: float  # absolute value, to compare the differences with
    invariant: bool  # both differences are rounding


def batch_invariance(
    names: Sequence[str],
    models: Sequence[nn.Module],
    batches_of: Callable[[np.ndarray, int], Iterable[Any]],
    index: np.ndarray,
    batch_size: int,
    *,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    seed: int = 0,
) -> list[BatchInvariance]:
    """Compare each example's logits in its batch, alone, and in a permuted batch."""
    order = np.random.default_rng(seed).permutation(len(index))

    def run(positions: np.ndarray, size: int) -> list[torch.Tensor]:
        batches = batches_of(positions, size)
        found = collect(models, batches, forward=forward, precision=precision, any_task=True)
        return [torch.from_numpy(one.outputs).flatten(1) for one in found]

    together, alone = run(index, batch_size), run(index, 1)
    mixed = run(index[order], batch_size)
    back = torch.from_numpy(np.argsort(order))
    rows = []
    for name, a, b, c in zip(names, together, alone, mixed, strict=True):
        if not len(a) == len(b) == len(c) == len(index):
            raise DataError(
                f"--compare-batch-sizes: {len(a)}, {len(b)} and {len(c)} outputs for {len(index)} "
                "examples. Expected one row an example in every batch."
            )
        by_itself, permuted = _company(a, b), _company(a, c[back])
        largest = float(a.abs().max())
        worst = max(by_itself.largest_difference, permuted.largest_difference)
        rows.append(
            BatchInvariance(
                model=name,
                n_examples=len(index),
                batch_size=batch_size,
                alone=by_itself,
                permuted=permuted,
                largest_logit=largest,
                invariant=worst <= TOLERANCES[precision] * max(largest, 1e-6),
            )
        )
    return rows


def _company(a: torch.Tensor, b: torch.Tensor) -> Company:
    same = (a.argmax(1) == b.argmax(1)).double().mean()
    return Company(float((a - b).abs().max()), float(same))
