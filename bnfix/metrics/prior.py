"""The class balance where a network will be used, and the shift of its logits for that."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bnfix.metrics.metrics import chunks, log_softmax
from bnfix.metrics.task import Array

#: A class of a smaller share counts as this one, so that its logit stays finite.
LEAST_SHARE = 1e-6
_TOLERANCE, _MOST_STEPS = 1e-8, 2000


@dataclass(frozen=True, eq=False)
class Prior:
    """Shares of the classes: those that a network learned, and those that it will meet."""

    old: Array  # (K,), above 0
    new: Array | None  # (K,); none: still to be estimated
    names: tuple[str, ...]
    old_is: str  # where it is from, in words
    new_is: str

    @property
    def shift(self) -> Array:
        """What is added to the logits, log(new / old); only while new is not known, a mere ramp."""
        if self.new is None:
            return np.linspace(-1.0, 1.0, len(self.old))
        return np.asarray(np.log(np.maximum(self.new, LEAST_SHARE) / self.old))

    def has_new(self, labels: Array) -> bool:
        """Whether labels have the new balance rather than the old, by their likelihood ratio."""
        return float(self.shift[labels].sum()) > 0

    def to_json(self) -> dict[str, list[float]]:
        """The shares."""
        new = {} if self.new is None else {"to": self.new.tolist()}
        return {"from": self.old.tolist(), **new}


def estimate_shares(logits: Array, old: Array) -> Array:
    """The classes' shares among examples without labels, of which a network says p(k | x).

    EM from old on (Saerens, Latinne and Decaestecker, 2002): new_k becomes the mean over examples
    of p_k new_k / old_k, divided by its sum over the classes. The likelihood is concave in new.
    """
    p = np.empty(logits.shape)
    for part in chunks(logits):
        p[part] = np.exp(log_softmax(logits[part]))
    new = old
    for _ in range(_MOST_STEPS):
        ratio = new / old
        before, new = new, ratio * ((1 / (p @ ratio)) @ p) / len(p)
        if np.abs(new - before).max() < _TOLERANCE:
            break
    return np.asarray(new)
