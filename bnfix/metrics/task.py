"""The task: what each example of a batch should give, and what an output loses by it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import guards, runtime
from bnfix.core.errors import DataError, ModelError

Array = NDArray[Any]


class Task(Protocol):
    """Where targets come from, and the loss by which networks learn and are judged."""

    @property
    def words(self) -> tuple[str, str]:
        """Names of the loss, and of the fraction whose largest output is the target's."""

    def targets(self, batch: Any, logits: Tensor, model: nn.Module | None) -> Tensor | None:
        """One row for each of the logits' rows, ``None`` if the batch has none.

        ``model`` is what takes the batch as it is, which tells labels from further inputs.
        """

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The loss of each example, ``(N,)`` nats, with its graph, as precise as the logits."""

    def checked(self, targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """Targets that fit logits of a shape, and the right class of each example."""


@dataclass(frozen=True)
class Labels:
    """The right classes, in the batches: the loss is cross-entropy."""

    smoothing: float = 0.0
    words: tuple[str, str] = "loss", "top-1"

    def targets(self, batch: Any, logits: Tensor, model: nn.Module | None) -> Tensor | None:
        """The labels ``(N,)``, int64."""
        labels = labels_of(batch, *logits.shape, model=model)
        return None if labels is None else torch.from_numpy(labels)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, -log softmax(z)_y."""
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=self.smoothing)

    def checked(self, targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """The labels as int64, twice."""
        labels = checked_labels(targets, *shape)
        return labels, labels


LABELS = Labels()


@dataclass(frozen=True)
class Reference:
    """The predictions of another network: the loss is the divergence KL(p_O || p) from them."""

    model: nn.Module  # O, which is run in evaluation and left as found
    forward: runtime.Forward | None = None
    words: tuple[str, str] = "divergence from the reference", "agreement with the reference"

    def targets(self, batch: Any, logits: Tensor, model: nn.Module | None) -> Tensor:
        """O's logits ``(N, K)``, float32, which are log-probabilities but for a constant a row."""
        with guards.inference(self.model):
            output = runtime.run(self.model, batch, runtime.device_of(self.model), self.forward)
        found = runtime.logits_of(output).float()
        self._check_shape(found.shape, logits.shape)
        return found

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Sum over k of p_O (log p_O - log p): exactly 0 where the logits are equal."""
        log_p = targets.to(logits.dtype).log_softmax(1)
        return (log_p.exp() * (log_p - logits.log_softmax(1))).sum(1)

    def checked(self, targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """O's logits, and its predictions."""
        self._check_shape(targets.shape, shape)
        finite = np.isfinite(targets).all(1)
        if not finite.all():
            raise ModelError(
                f"reference: its logits of example {int(finite.argmin())} (from 0) are not finite. "
                "Give a network that works."
            )
        return targets, targets.argmax(1)

    def _check_shape(self, theirs: tuple[int, ...], own: tuple[int, ...]) -> None:
        if theirs[1:] != own[1:]:
            raise ModelError(
                f"reference: it has {theirs[1]} classes and the model {own[1]}. Give the network "
                "that the model was made from."
            )
        if theirs != own:
            raise DataError(
                f"reference: {theirs[0]} examples, the model has {own[0]}. Give the same ones."
            )


def mean_loss(
    task: Task,
    model: nn.Module,
    batch: Any,
    forward: runtime.Forward | None,
    *,
    what: str,
    precision: str = "fp32",
) -> Tensor:
    """The mean loss of a batch, with its graph; ``what`` is to learn from it."""
    device = runtime.device_of(model)
    with runtime.autocast(device, precision):
        output = runtime.run(model, batch, device, forward)
    if (own := runtime.own_loss(model, output)) is not None:
        return own
    logits = runtime.logits_of(output)
    targets = task.targets(batch, logits, caller(model, forward))
    if targets is None:
        raise DataError(f"{what}: a batch has no labels to learn from. Give (x, y).")
    return task.losses(logits.float(), targets.to(device)).mean()


def caller(model: nn.Module, forward: runtime.Forward | None) -> nn.Module | None:
    """The model, if it is called with the parts of a batch and not by a function of the user's."""
    return None if forward or runtime.has_forward(model) else model


def labels_of(
    batch: Any, n_examples: int, n_classes: int, *, model: nn.Module | None = None
) -> Array | None:
    """Labels of a batch as int64, checked against logits `(N, K)`; `model` as for `unpack`."""
    labels = raw_labels(batch, model)
    return None if labels is None else checked_labels(labels, n_examples, n_classes)


def raw_labels(batch: Any, model: nn.Module | None = None) -> Any:
    """Labels of a batch as they are in it, of any task."""
    if isinstance(batch, Mapping):
        batch = {"x": None, **batch}  # inputs may have any names where forward= is given
    return runtime.unpack(batch, model)[1]


def as_array(labels: Any) -> Array:
    """Labels of any kind, a tensor of a device among them, as they are."""
    return np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)


def checked_labels(labels: Any, n: int, k: int) -> Array:
    """Labels of any kind as plain class indices."""
    try:
        array = as_array(labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"labels: {error}. Give one integer an example.") from error
    if k == 2 and array.shape in ((n,), (n, 1)) and np.isin(array, (0, 1)).all():
        array = array.reshape(n).astype(np.int64)  # as binary cross-entropy takes them
    if array.dtype.kind not in "iub" or array.shape != (n,):
        raise DataError(
            f"labels: {array.dtype} of shape {array.shape} for {n} examples, expected one integer "
            "an example. Give forward= and integer labels for unusual batches."
        )
    if n and not 0 <= array.min() <= array.max() < k:
        raise DataError(
            f"labels: from {array.min()} to {array.max()}, expected 0 to {k - 1}, as the model has "
            f"{k} outputs. Check the class map."
        )
    return array.astype(np.int64)
