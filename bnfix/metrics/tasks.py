"""Tasks besides classification; each is judged by a row of a few numbers per example."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import runtime
from bnfix.core.errors import ConfigError, DataError, ModelError, one_line, plain
from bnfix.core.options import TASKS, TaskRecipe
from bnfix.core.runtime import described
from bnfix.core.torch_private import tree_map
from bnfix.metrics.task import (
    LABELS,
    Array,
    ByRows,
    Judged,
    Task,
    Words,
    as_array,
    import_function,
    name_in,
    raw_labels,
)  # fmt: skip

_RESIZE = {1: "linear", 2: "bilinear", 3: "trilinear"}
_LOSSES: dict[str, tuple[str, Callable[..., Tensor]]] = {
    "mse": ("mean squared error", F.mse_loss),
    "l1": ("mean absolute error", F.l1_loss),
    "huber": ("Huber loss", F.huber_loss),
}


@dataclass(frozen=True)
class Segmentation(ByRows):
    """A class at every position: logits ``(N, K, *space)``, integer targets ``(N, *space)``.

    Loss: cross-entropy, mean over the positions whose target is not ``ignore_index``. Outputs are
    first resized to the targets' size if it differs, (bi)linearly, without aligned corners.
    """

    ignore_index: int = 255
    smoothing: float = 0.0
    name: ClassVar[str] = "segmentation"
    headings: ClassVar[dict[str, str]] = {"miou": "mIoU", "pixel_accuracy": "Pixel accuracy"}
    of_class: ClassVar[tuple[str, str]] = "IoU", "Pixels"
    words: ClassVar[Words] = Words(
        "cross-entropy per pixel", "fraction of right pixels", "loss", "right pixels", unit=" nats"
    )

    def targets(self, batch: Any, outputs: Tensor, model: nn.Module | None) -> Tensor | None:
        """The masks, int64."""
        found = _tensor(raw_labels(batch, model))
        if found is None:
            return None
        fits = 3 <= outputs.ndim <= 5 and found.ndim == outputs.ndim - 1
        whole = not (found.is_floating_point() or found.is_complex())
        if not (fits and whole and len(found) == len(outputs) and outputs.shape[1] > 1):
            raise DataError(
                f"masks: {described(found)} for outputs {described(outputs)}, expected whole "
                "numbers (N, *space) for (N, classes, *space). Check the data, --task or --output."
            )
        x = None if model is None else runtime.unpack(batch, model)[0]
        if isinstance(x, Tensor) and x.ndim == outputs.ndim:
            size, *known = ("x".join(map(str, t.shape[-x.ndim + 2 :])) for t in (found, x, outputs))
            if size not in known:
                raise DataError(
                    f"masks: {size}, expected {known[0]} as the inputs or {known[1]} as the "
                    "outputs. Give masks with the size of their inputs."
                )
        found, k = found.long(), outputs.shape[1]
        odd = (found != self.ignore_index) & ((found < 0) | (found >= k))
        if bool(odd.any()):
            where, value = name_in(batch, int(odd.nonzero()[0, 0])), int(found[odd][0])
            raise DataError(
                f"masks: {where} has class {value}, expected 0 to {k - 1}, because the model has "
                f"{k} outputs, or {self.ignore_index}, which is ignored. Check the masks, or "
                "--ignore-index."
            )
        return found

    def _resized(self, outputs: Tensor, targets: Tensor) -> Tensor:
        size = tuple(targets.shape[1:])
        if tuple(outputs.shape[2:]) == size:
            return outputs
        resized: Tensor = F.interpolate(outputs, size, mode=_RESIZE[len(size)], align_corners=False)
        return resized

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over valid positions of -log softmax(z)_y; 0 if there is none."""
        each = F.cross_entropy(
            self._resized(outputs, targets), targets,
            ignore_index=self.ignore_index, reduction="none", label_smoothing=self.smoothing,
        )  # fmt: skip
        n_valid = (targets != self.ignore_index).flatten(1).sum(1)
        mean: Tensor = each.flatten(1).sum(1) / n_valid.clamp(min=1)
        return mean

    def resizing(self, outputs: Tensor, targets: Tensor) -> str:
        """How outputs are resized, in words; empty if they are not."""
        own, wanted = ("x".join(map(str, size)) for size in (outputs.shape[2:], targets.shape[1:]))
        how = f"outputs of {own} are resized ({_RESIZE[targets.ndim - 1]}) to the masks' {wanted}"
        return "" if own == wanted else how

    def facts(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The fraction of right positions; each class's right, true and predicted positions."""
        n, k = outputs.shape[:2]
        guess, target = self._resized(outputs, targets).argmax(1).flatten(1), targets.flatten(1)
        valid = target != self.ignore_index
        # Each example has its own class indices, so one call counts all examples.
        first = k * torch.arange(n, device=target.device)[:, None]
        right, wanted, guessed = (
            torch.bincount((first + classes)[held], minlength=n * k).view(n, k)
            for classes, held in (
                (target, valid & (guess == target)),
                (target, valid),
                (guess, valid),
            )
        )
        n_valid = wanted.sum(1)
        return {
            "scores": right.sum(1).double() / n_valid.clamp(min=1),
            "rows": torch.cat([right, wanted, guessed], 1),
            "counted": n_valid > 0,
        }

    def metrics(self, rows: Array, weights: Array) -> dict[str, Array]:
        """Mean IoU over classes in targets or predictions, and the fraction of right positions."""
        sums = weights @ rows
        right, wanted, _ = np.split(sums, 3, axis=1)
        iou = self._iou(sums)
        there = np.isfinite(iou)
        miou = _ratio(np.where(there, iou, 0).sum(1), there.sum(1))
        return {"miou": miou, "pixel_accuracy": _ratio(right.sum(1), wanted.sum(1))}

    def by_class(self, rows: Array) -> Array:
        """The IoU of each class: right / (target + predicted - right), over all positions."""
        sums = rows.sum(0, keepdims=True)
        return np.column_stack([self._iou(sums)[0], np.split(sums[0], 3)[1]])

    def _iou(self, sums: Array) -> Array:
        right, wanted, guessed = np.split(sums, 3, axis=1)
        iou = np.asarray(_ratio(right, wanted + guessed - right))
        # The ignored class has no target: predicting it is wrong, but it has no IoU.
        if 0 <= self.ignore_index < iou.shape[1]:
            iou[:, self.ignore_index] = np.nan
        return iou


@dataclass(frozen=True)
class Multilabel(ByRows):
    """Labels that are present or absent: logits and targets ``(N, K)``, targets 0 or 1."""

    name: ClassVar[str] = "multilabel"
    headings: ClassVar[dict[str, str]] = {
        "map": "mAP", "f1_micro": "F1 micro", "f1_macro": "F1 macro",
    }  # fmt: skip
    words: ClassVar[Words] = Words(
        "binary cross-entropy per label", "fraction of right labels", "loss", "right labels",
        unit=" nats",
    )  # fmt: skip

    def targets(self, batch: Any, outputs: Tensor, model: nn.Module | None) -> Tensor | None:
        """The labels as float32."""
        found = _fitting(batch, outputs, model, "multilabel")
        if found is not None and bool((odd := (found != 0) & (found != 1)).any()):
            where, value = name_in(batch, int(odd.nonzero()[0, 0])), float(found[odd][0])
            raise DataError(
                f"targets: {where} has {value:g} among its labels, values other than 0 and 1, "
                "expected 0 or 1 per label. Check the data, or --task."
            )
        return found

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over labels of log(1 + exp(z)) - y z."""
        wanted = targets.to(outputs.dtype)
        each = F.binary_cross_entropy_with_logits(outputs, wanted, reduction="none")
        return each.flatten(1).mean(1)

    def facts(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """The fraction of right labels at logit 0; logits and targets; the blind loss."""
        z = outputs.double()
        return {
            "scores": ((outputs > 0) == (targets > 0)).flatten(1).double().mean(1),
            "rows": torch.cat([outputs.flatten(1), targets.flatten(1)], 1),
            "blind": (self.losses(z, targets) + self.losses(z, 1 - targets)) / 2,
        }

    def metrics(self, rows: Array, weights: Array) -> dict[str, Array]:
        """Mean average precision over labels that occur at all, and F1 at logit 0."""
        z, y = np.split(rows, 2, axis=1)
        right, wanted, guessed = (weights @ part for part in ((z > 0) * y, y, 1.0 * (z > 0)))
        f1 = np.nan_to_num(_ratio(2 * right, wanted + guessed))
        micro = _ratio(2 * right.sum(1), wanted.sum(1) + guessed.sum(1))
        each = np.stack([_average_precision(z[:, k], y[:, k], weights) for k in range(z.shape[1])])
        there = np.isfinite(each)
        mean = _ratio(np.where(there, each, 0).sum(0), there.sum(0))
        return {"map": mean, "f1_micro": micro, "f1_macro": f1.mean(1)}


@dataclass(frozen=True)
class Regression(ByRows):
    """Numbers: targets in the output's shape."""

    loss: str = "mse"
    name: ClassVar[str] = "regression"
    headings: ClassVar[dict[str, str]] = {
        "mae": "MAE", "rmse": "RMSE", "r2": "R2", "pearson": "Pearson's r",
    }  # fmt: skip

    @property
    def words(self) -> Words:
        """The loss's name; there is no score."""
        return Words(_LOSSES[self.loss][0], "", f"loss ({self.loss})", "")

    def targets(self, batch: Any, outputs: Tensor, model: nn.Module | None) -> Tensor | None:
        """The targets, float32."""
        found = _fitting(batch, outputs, model, "regression")
        if found is not None and not bool(found.isfinite().all()):
            bad = int(_columns(found).isfinite().flatten(1).all(1).int().argmin())
            raise DataError(
                f"targets: not finite for {name_in(batch, bad)}. Leave such examples out."
            )
        return found

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Mean over an example's numbers of (o - t)^2, |o - t| or Huber's loss with delta 1."""
        each = _LOSSES[self.loss][1](outputs, targets.to(outputs.dtype), reduction="none")
        return _columns(each).mean((1, 2))

    def facts(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Sums of 1, |e|, e^2, t, t^2, o, o^2, ot over positions: ``(N, 8 K)``, K numbers."""
        o, t = (_columns(part.double()) for part in (outputs, targets))
        e = o - t
        parts = (torch.ones_like(o), e.abs(), e**2, t, t**2, o, o**2, o * t)
        return {"rows": torch.stack([part.sum(2) for part in parts], 1).flatten(1)}

    def metrics(self, rows: Array, weights: Array) -> dict[str, Array]:
        """MAE and RMSE over all numbers; R2 and Pearson's r for each of K numbers, averaged."""
        sums = (weights @ rows).reshape(len(weights), 8, -1)
        n, absolute, squares, t, tt, o, oo, ot = sums.transpose(1, 0, 2)
        var_t, var_o, both = tt - t**2 / n, oo - o**2 / n, ot - o * t / n
        # Sums of squares cancel: the variance left of a constant is rounding.
        var_t, var_o = (np.where(v > 1e-12 * s, v, 0) for v, s in ((var_t, tt), (var_o, oo)))
        return {
            "mae": _ratio(absolute.sum(1), n.sum(1)),
            "rmse": _ratio(squares.sum(1), n.sum(1)) ** 0.5,
            "r2": (1 - _ratio(squares, var_t)).mean(1),
            "pearson": _ratio(both, (var_t * var_o) ** 0.5).mean(1),
        }


@dataclass(frozen=True)
class Own(ByRows):
    """The user's own loss: any outputs and targets, one number per example."""

    function: Callable[[Any, Any], Any]
    loss: str
    name: ClassVar[str] = "of your own"

    @property
    def words(self) -> Words:
        """The function's name."""
        name = self.loss.rpartition(":")[2]
        called = "loss" if name == "loss" else f"loss ({name})"
        return Words(called, "", called, "")

    def output(self, output: Any) -> Any:
        """The whole output, with floating-point tensors in float32."""
        return tree_map(lambda t: t.float() if _is_float(t) else t, output)

    def targets(self, batch: Any, outputs: Any, model: nn.Module | None) -> Any:
        """The targets, with arrays and numbers as tensors."""
        return tree_map(_as_tensor, raw_labels(batch, model))

    def losses(self, outputs: Any, targets: Any) -> Tensor:
        """The losses that the user's function returns, checked."""
        where = f"--loss {plain(self.loss)}"
        of_outputs: Any = (*runtime.tensors_in(outputs), ())[0]
        n = len(targets if isinstance(targets, Tensor | list) else of_outputs)
        try:
            found = self.function(outputs, targets)
        except Exception as error:
            raise ConfigError(
                f"{where}: failed ({one_line(error)}). It is called with outputs "
                f"{described(outputs)} and targets {described(targets)}.",
                name="loss",
            ) from error
        odd = ""
        if not isinstance(found, Tensor) or found.shape != (n,):
            shape = tuple(getattr(found, "shape", ()))
            odd = (
                f"{type(found).__name__} of shape {shape}, expected a tensor of shape ({n},), one "
                "loss per example. Take means only over all other dimensions."
            )
        elif not found.requires_grad and any(t.requires_grad for t in runtime.tensors_in(outputs)):
            odd = "losses without a gradient in the outputs. Leave out detach, no_grad and numpy."
        if odd:
            raise ConfigError(f"{where}: returned {odd}", name="loss")
        return cast(Tensor, found)


def resolve_task(recipe: TaskRecipe, output: Any, targets: Any) -> Task:
    """The stated task, or else the task that an output and its targets clearly belong to."""
    if recipe.loss is not None and recipe.loss not in _LOSSES:
        _, function = import_function(recipe.loss, "--loss", "(outputs, targets)")
        return Own(function, recipe.loss)
    name = "regression" if recipe.loss is not None else recipe.task
    every = (
        LABELS,
        Segmentation(recipe.ignore_index),
        Multilabel(),
        Regression(recipe.loss or "mse"),
    )
    return every[TASKS.index(read_off(output, targets) if name == "auto" else name)]


def judged_by(task: Judged) -> Task | None:
    """The task from any form that functions accept; ``None`` if the first batch decides it."""
    if isinstance(task, Task):
        return task
    if callable(task):
        return Own(task, getattr(task, "__name__", "loss"))
    recipe = TaskRecipe(task) if isinstance(task, str) else task
    return None if recipe.task == "auto" and recipe.loss is None else resolve_task(recipe, 0, None)


def read_off(output: Any, targets: Any) -> str:
    """The task's name, by shapes and types; classification unless another task clearly fits."""
    try:
        found, z = _tensor(targets), runtime.output_of(output)
    except (DataError, ModelError):
        return TASKS[0]
    if found is None or found.is_complex() or len(found) != len(z):
        return TASKS[0]
    whole, flat = not found.is_floating_point(), z.ndim == 2 and z.shape[1] > 1
    if whole and z.ndim > 2 and z.shape[1] > 1 and found.ndim == z.ndim - 1:
        return "segmentation"
    binary = bool(((found == 0) | (found == 1)).all())
    if flat and found.shape == z.shape and binary:
        return "multilabel"
    # One logit per example is a binary classifier, whose labels are often floats.
    single = binary and z[:1].numel() == 1
    return TASKS[0] if whole or single or not _same_numbers(found, z) else "regression"


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _as_tensor(leaf: Any) -> Any:
    """Numbers of any kind as a tensor; anything else unchanged."""
    if isinstance(leaf, Tensor | str | None):
        return leaf
    array = np.asarray(leaf)
    return torch.from_numpy(array.copy()) if array.dtype.kind in "fiub" else leaf


def _tensor(raw: Any) -> Tensor | None:
    """Targets as one tensor."""
    if raw is None or isinstance(raw, Tensor):
        return raw
    try:
        return torch.as_tensor(as_array(raw))
    except (TypeError, ValueError) as error:
        raise DataError(f"targets: {one_line(error)}. Give one tensor per batch.") from error


def _same_numbers(found: Tensor, outputs: Tensor) -> bool:
    """Whether there is one target per output number; ``(N,)`` and ``(N, 1)`` are equivalent."""
    alike = found.shape[1:] in ((), (1,)) and outputs.shape[1:] in ((), (1,))
    return len(found) == len(outputs) and (alike or found.shape == outputs.shape)


def _fitting(batch: Any, outputs: Tensor, model: nn.Module | None, task: str) -> Tensor | None:
    """Targets in the outputs' shape, float32."""
    found = _tensor(raw_labels(batch, model))
    if found is None:
        return None
    if found.is_complex() or not _same_numbers(found, outputs):
        raise DataError(
            f"targets: {described(found)} for outputs {described(outputs)}, but {task} needs one "
            "number for each output. Check the data; for classes, leave --loss and --task out."
        )
    return found.float().reshape(outputs.shape)


def _columns(values: Tensor) -> Tensor:
    """``(N, K, *space)`` or ``(N,)`` as ``(N, K, positions)``."""
    return (values[:, None] if values.ndim == 1 else values)[..., None].flatten(2)


def _ratio(above: Array, below: Array) -> Array:
    """A ratio, NaN where the denominator is 0."""
    none = np.full(np.shape(above), np.nan)
    return np.asarray(np.divide(above, below, out=none, where=np.asarray(below) > 0))


def _average_precision(z: Array, y: Array, weights: Array) -> Array:
    """Area under the stepwise precision-recall curve, equal logits taken together; ``(S,)``."""
    order = np.argsort(-z, kind="stable")
    # A threshold includes all equal logits, so its precision is the precision at their end.
    last = np.searchsorted(-z[order], -z[order], side="right") - 1
    own = weights[:, order]
    hits = own * y[order]
    precision = _ratio(np.cumsum(hits, 1), np.cumsum(own, 1))[:, last]
    return _ratio(np.where(hits > 0, hits * precision, 0).sum(1), hits.sum(1))
