"""Models side by side: their ranks, and how each does class by class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bnfix.measuring.pairing import Paired
from bnfix.reporting.records import Evaluated


@dataclass(frozen=True)
class Rank:
    """A model's place, by NLL, then by top-1.

    Args:
        rank: from 1; models that are equal in both share it.
        name: of the model.
        nll: mean negative log-likelihood, nats.
        top1: fraction right.
        paired: against the first model given; ``None`` for that one.
    """

    rank: int
    name: str
    nll: float
    top1: float
    paired: Paired | None


@dataclass(frozen=True)
class ClassRow:
    """One class.

    Args:
        index: of the class.
        name: its name, or ``class 3``.
        n_examples: how many it has.
        top1: fraction right, one number a model.
    """

    index: int
    name: str
    n_examples: int
    top1: tuple[float | None, ...]

    @property
    def change(self) -> float:
        """Of the last model against the first; 0 where one has none."""
        first, last = self.top1[0], self.top1[-1]
        return 0.0 if first is None or last is None else last - first


def ranking(models: Sequence[Evaluated], paired: Sequence[Paired | None]) -> list[Rank]:
    """Rank models that were measured on the same labelled examples."""
    keys = [
        (m.metrics.nll, -m.metrics.top1, i)
        for i, m in enumerate(models)
        if m.metrics.nll is not None and m.metrics.top1 is not None
    ]
    if len(keys) < 2:
        return []
    values = [key[:2] for key in sorted(keys)]
    return [
        Rank(
            rank=values.index((nll, top1)) + 1,
            name=models[i].name,
            nll=nll,
            top1=-top1,
            paired=paired[i - 1] if i else None,
        )
        for nll, top1, i in sorted(keys)
    ]


def class_rows(models: Sequence[Evaluated], names: Sequence[str]) -> list[ClassRow]:
    """Top-1 of every class that has examples, one number a model."""
    examples = [model.metrics.examples for model in models]
    if not examples or examples[0] is None:
        return []
    n = np.bincount(examples[0].labels)
    right = [
        None if e is None else np.bincount(e.labels, e.right, minlength=len(n)) for e in examples
    ]
    return [
        ClassRow(
            c,
            names[c] if c < len(names) else f"class {c}",
            int(n[c]),
            tuple(None if r is None else float(r[c] / n[c]) for r in right),
        )
        for c in np.flatnonzero(n).tolist()
    ]


def class_change_errors(models: Sequence[Evaluated], rows: Sequence[ClassRow]) -> np.ndarray | None:
    """Standard error of each class's change from the first model to the last."""
    first, last = models[0].metrics.examples, models[-1].metrics.examples
    if first is None or last is None:
        return None
    changed = np.bincount(first.labels, first.right != last.right)[[row.index for row in rows]]
    n = np.array([row.n_examples for row in rows])
    change = np.array([row.change for row in rows])
    return np.asarray(np.sqrt(np.maximum(changed / n - change**2, 0) / n))
