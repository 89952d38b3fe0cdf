"""The task: each example's target, and the loss of an output against it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import guards, runtime
from bnfix.core.errors import ConfigError, DataError, ModelError, plain
from bnfix.core.settings import TaskRecipe
from bnfix.models.build import import_callable

Array = NDArray[Any]


class Words(NamedTuple):
    """The names of a task's loss and score, in sentences and as headings, and the loss's unit."""

    loss: str
    score: str  # empty without a score, like its heading
    loss_heading: str
    score_heading: str
    unit: str = ""  # with a space before it


class Column(NamedTuple):
    """A number of a model in tables: its name in `Metrics`, and its heading."""

    key: str
    heading: str
    fraction: bool = False
    tested: bool = False  # the verdict has a p for this number


class ByRows(ABC):
    """A task whose metrics come from a few numbers per example, so outputs are not kept."""

    #: Its name for ``--task``.
    name: ClassVar[str]
    #: Its name for ``--loss``, if the loss can be chosen.
    loss: str | None = None
    #: Headings of the metrics, by name, the most important first.
    headings: ClassVar[Mapping[str, str]] = {}
    #: Headings of the numbers by class and of their counts, if there are any.
    of_class: ClassVar[tuple[str, str]] = "", ""

    @property
    @abstractmethod
    def words(self) -> Words:
        """Names of the loss, and of the score."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The numbers of a model, the loss first."""
        words, headings = self.words, self.headings.items()
        score = Column("top1", words.score_heading.capitalize(), fraction=True, tested=True)
        return (
            Column("nll", words.loss_heading.capitalize(), tested=True),
            *([score] if words.score else []),
            *(Column(name, heading) for name, heading in headings),
        )

    def output(self, output: Any) -> Any:
        """The only tensor of a model's output, in float32."""
        return runtime.output_of(output).float()

    @abstractmethod
    def targets(self, batch: Any, outputs: Any, model: nn.Module | None) -> Any:
        """One checked target per row of the outputs; ``None`` if the batch has no targets.

        ``model``, if it takes the batch's parts directly, tells labels from further inputs.
        """

    @abstractmethod
    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The loss of each example ``(N,)``, with its autograd graph, in the outputs' precision."""

    def facts(self, outputs: Any, targets: Any) -> dict[str, Tensor]:
        """The task's other numbers for each example, as far as it has them.

        ``scores``: its score ``(N,)`` from 0 to 1; ``rows``: the terms of the metrics ``(N, R)``;
        ``blind``: its expected loss for a random target ``(N,)``; ``counted``: whether it has a
        valid target ``(N,)``.
        """
        # `gain_t` counts one `blind` example. Unbounded targets have no such loss, and dense
        # targets are already averages: for them only the worst difference seen is counted.
        return {}

    def metrics(self, rows: Array, weights: Array) -> dict[str, Array]:
        """Metrics ``(S,)`` by name, of S weightings ``(S, N)`` of the rows; NaN without a value."""
        return {}

    def by_class(self, rows: Array) -> Array:
        """Each class's number, NaN if it has none, and its positions in the targets: ``(K, 2)``."""
        return np.empty((0, 2))


@dataclass(frozen=True)
class Labels:
    """Class labels in the batches; the loss is cross-entropy."""

    smoothing: float = 0.0
    #: Judge each model at the temperature fitted for it on these examples.
    tempered: bool = False
    name: ClassVar[str] = "classification"
    words: ClassVar[Words] = Words("loss", "top-1", "NLL", "top-1", unit=" nats")
    columns: ClassVar[tuple[Column, ...]] = (
        Column("top1", "Top-1", fraction=True, tested=True),
        Column("top5", "Top-5", fraction=True),
        Column("nll", "NLL", tested=True),
        Column("nll_temperature_scaled", "NLL after temperature scaling", tested=True),
        Column("brier", "Brier"),
        Column("ece", "ECE", fraction=True),
    )

    def output(self, output: Any) -> Tensor:
        """The logits."""
        return runtime.logits_of(output)

    def targets(self, batch: Any, outputs: Tensor, model: nn.Module | None) -> Tensor | None:
        """The labels ``(N,)``, int64."""
        labels = labels_of(batch, *outputs.shape, model=model)
        return None if labels is None else torch.from_numpy(labels)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood, -log softmax(z)_y."""
        return F.cross_entropy(outputs, targets, reduction="none", label_smoothing=self.smoothing)

    def checked(self, targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """The labels as int64, twice."""
        labels = checked_labels(targets, *shape)
        return labels, labels


LABELS = Labels()


@dataclass(frozen=True)
class Reference:
    """Another network's predictions as targets; the loss is the divergence KL(p_O || p)."""

    model: nn.Module  # O; it runs in evaluation mode and stays unchanged
    forward: runtime.Forward | None = None
    name: ClassVar[str] = "reference"
    words: ClassVar[Words] = Words(
        "divergence from the reference", "agreement with the reference", "KL", "agreement",
        unit=" nats",
    )  # fmt: skip

    def output(self, output: Any) -> Tensor:
        """The logits."""
        return runtime.logits_of(output)

    def targets(self, batch: Any, outputs: Tensor, model: nn.Module | None) -> Tensor:
        """O's logits ``(N, K)``, float32: log-probabilities except for a constant per row."""
        with guards.inference(self.model):
            output = runtime.run(self.model, batch, runtime.device_of(self.model), self.forward)
        found = runtime.logits_of(output).float()
        self._check_shape(found.shape, outputs.shape)
        return found

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Sum over k of p_O (log p_O - log p): exactly 0 if the logits are equal."""
        log_p = targets.to(outputs.dtype).log_softmax(1)
        return (log_p.exp() * (log_p - outputs.log_softmax(1))).sum(1)

    def checked(self, targets: Array, shape: tuple[int, ...]) -> tuple[Array, Array]:
        """O's logits and predicted classes."""
        self._check_shape(targets.shape, shape)
        finite = np.isfinite(targets).all(1)
        if not finite.all():
            raise ModelError(
                f"reference: its logits for example {int(finite.argmin())} (from 0) are not "
                "finite. Give a network that works."
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
                f"reference: {theirs[0]} examples, the model has {own[0]}. Give the same examples."
            )


#: The tasks. The first two keep all logits, because their metrics need them.
Task = Labels | Reference | ByRows
#: Forms in which functions accept a task: its name, a recipe, a loss function, or the task.
Judged = str | TaskRecipe | Callable[[Any, Any], Any] | Task


def learned(task: Task, smoothing: float) -> Task:
    """The task for training: with label smoothing, if its targets are classes."""
    if not smoothing or isinstance(task, Reference):
        return task
    if not hasattr(task, "smoothing"):
        message = f"--label-smoothing: not for the task {task.name}. Leave it out."
        raise ConfigError(message, name="label_smoothing")
    smoothed: Any = task
    return replace(smoothed, smoothing=smoothing)  # type: ignore[no-any-return]


def mean_loss(
    task: Task,
    model: nn.Module,
    batch: Any,
    forward: runtime.Forward | None,
    *,
    what: str,
    precision: str = "fp32",
) -> Tensor:
    """A batch's mean loss with its autograd graph; ``what`` names the caller in messages."""
    device = runtime.device_of(model)
    with runtime.autocast(device, precision):
        output = runtime.run(model, batch, device, forward)
    if (own := runtime.own_loss(model, output)) is not None:
        return own
    outputs = task.output(output)
    targets = task.targets(batch, outputs, caller(model, forward))
    if targets is None:
        raise DataError(f"{what}: a batch has no labels to learn from. Give (x, y).")
    if isinstance(outputs, Tensor):
        outputs = outputs.float()
    return task.losses(outputs, runtime.move(targets, device)).mean()


def import_function(spec: str, option: str, takes: str) -> tuple[str, Callable[..., Any]]:
    """Import a function that an option names; return its name and the function."""
    where, _, name = spec.rpartition(":")
    problem = "expected package.module:callable or path/to/file.py:callable."
    if where and name:
        try:
            found, _ = import_callable(spec)
        except ModelError as error:
            raise ConfigError(f"{option} {error}", name=option[2:]) from error
        if callable(found):
            return name, found
        problem = f"is of type {type(found).__name__}, expected a function of {takes}."
    raise ConfigError(f"{option} {plain(spec)}: {problem}", name=option[2:])


def caller(model: nn.Module, forward: runtime.Forward | None) -> nn.Module | None:
    """The model if it is called with the parts of a batch; ``None`` with a user's forward."""
    return None if forward or runtime.has_forward(model) else model


def labels_of(
    batch: Any, n_examples: int, n_classes: int, *, model: nn.Module | None = None
) -> Array | None:
    """A batch's labels as int64, checked against logits ``(N, K)``; ``model`` as for `unpack`."""
    labels = raw_labels(batch, model)
    return None if labels is None else checked_labels(labels, n_examples, n_classes)


def raw_labels(batch: Any, model: nn.Module | None = None) -> Any:
    """A batch's unconverted labels, for any task."""
    if isinstance(batch, Mapping):
        batch = {"x": None, **batch}  # with forward=, inputs can have any names
    return runtime.unpack(batch, model)[1]


def name_in(batch: Any, row: int) -> str:
    """The name of a batch's example for messages: its name in the data, or else its row."""
    name: Any = getattr(batch, "name", None)
    return name(int(batch.index[row])) if callable(name) else f"example {row} (from 0) of a batch"


def as_array(labels: Any) -> Array:
    """Labels of any kind, including tensors on a device, as an unconverted array."""
    return np.asarray(labels.detach().cpu() if isinstance(labels, Tensor) else labels)


def checked_labels(labels: Any, n: int, k: int) -> Array:
    """Labels of any kind as plain class indices."""
    try:
        array = as_array(labels)
    except (TypeError, ValueError) as error:
        raise DataError(f"labels: {error}. Give one integer per example.") from error
    if k == 2 and array.shape in ((n,), (n, 1)) and np.isin(array, (0, 1)).all():
        array = array.reshape(n).astype(np.int64)  # the form of binary cross-entropy
    if array.dtype.kind not in "iub" or array.shape != (n,):
        raise DataError(
            f"labels: {array.dtype} of shape {array.shape} for {n} examples, expected one integer "
            "per example. Give forward= and integer labels for unusual batches."
        )
    if n and not 0 <= array.min() <= array.max() < k:
        raise DataError(
            f"labels: from {array.min()} to {array.max()}, expected 0 to {k - 1}, because the "
            f"model has {k} outputs. Check the class map."
        )
    return array.astype(np.int64)
