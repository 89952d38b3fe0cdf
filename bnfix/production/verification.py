"""An exported model against the one it came from: outputs, top-1, time, and where they part."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfix import guards
from bnfix.errors import ModelError
from bnfix.production.artifacts import Runner, outputs_of

#: Batch sizes that are run: one, and an odd one.
BATCH_SIZES = (1, 7)
_ROUNDS = 5
_LONGEST = 3.0


@dataclass(frozen=True)
class Agreement:
    """How two models agree on the same inputs.

    Args:
        n_examples: inputs.
        batch_sizes: at which all of them were run.
        max_difference: largest |output - output of the first model|; infinite where only one of
            both is not finite.
        worst_output: name of the output where that is.
        worst_example: its position among the inputs.
        largest_output: largest |output| of the first model.
        top1_agreement: fraction of examples (and positions) with the same largest channel of the
            first output; ``None`` where it has no channels.
        seconds: median time of a batch by batch size: the first model's, the second's.
    """

    n_examples: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    worst_output: str
    worst_example: int
    largest_output: float
    top1_agreement: float | None
    seconds: Mapping[int, tuple[float, float]]


def agreement(
    reference: Runner,
    other: Runner,
    inputs: Tensor,
    names: Sequence[str],
    *,
    timed: bool = True,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
) -> Agreement:
    """Run two models on all inputs at several batch sizes and compare all outputs.

    Args:
        reference: what the other is compared against.
        other: what is judged.
        inputs: ``(N, ...)``.
        names: of the outputs.
        timed: measure the time too, in alternating runs.
        batch_sizes: those run.

    Returns:
        The comparison.

    Raises:
        ModelError: if the number or the shapes of outputs differ.
    """
    n = len(inputs)
    sizes = tuple(sorted({min(size, n) for size in batch_sizes}))
    worst, place, example = -1.0, names[0], 0
    largest, n_same, n_places = 0.0, 0, 0
    for size in sizes:
        for start in range(0, n, size):
            x = inputs[start : start + size].contiguous()
            wanted, found = reference(x), other(x)
            _check_shapes(wanted, found, names)
            for name, a, b in zip(names, wanted, found, strict=True):
                gaps = _gaps(a, b)
                largest = max(largest, float(a.double().abs().nan_to_num().max()))
                if float(gaps.max()) > worst:
                    worst, place, example = float(gaps.max()), name, start + int(gaps.argmax())
            if wanted[0].ndim >= 2 and wanted[0].shape[1] > 1:
                same = wanted[0].argmax(1) == found[0].argmax(1)
                n_same, n_places = n_same + int(same.sum()), n_places + same.numel()
    seconds = {size: _times(reference, other, inputs[:size]) for size in sizes} if timed else {}
    top1 = n_same / n_places if n_places else None
    return Agreement(n, sizes, worst, place, example, largest, top1, seconds)


def suspect_layer(
    model: nn.Module, export: Callable[[nn.Module], Runner], x: Tensor, atol: float
) -> str:
    """Find the first layer whose output an exported form of the model gets wrong.

    The model is exported once more with the outputs of all its layers, so one run shows where the
    two part.

    Args:
        model: in evaluation mode.
        export: from a model to how its exported form runs.
        x: the inputs that differ, at least 2.
        atol: differences above this, relative where outputs are above 1, count.

    Returns:
        The layer in words, for a message.
    """
    probed = _Probed(model)
    with guards.hooks() as handles:
        handles += [
            module.register_forward_hook(probed.hook_of(name))
            for name, module in model.named_modules()
            if name and not any(True for _ in module.children())
        ]
        with torch.no_grad():
            wanted = probed(x)
        try:
            found = export(probed)(x)
        except ModelError:
            return "not found: the model cannot be exported with its layers' outputs"
    if len(wanted) != len(found):
        return "not found: the exported model calls other layers"
    for name, a, b in zip(probed.names, wanted, found, strict=True):
        scale = float(a.double().abs().nan_to_num().max().clamp_min(1.0)) if a.numel() else 1.0
        gap = float(_gaps(a, b).max()) if a.shape == b.shape and a.numel() else math.inf
        if gap > atol * scale:
            kind = type(model.get_submodule(name)).__name__
            return f"{name} ({kind}), the first whose output differs (by {gap:.2g})"
    return "none by itself: with every layer's output looked at, none differs"


class _Probed(nn.Module):
    """A model whose outputs are those of all its layers, in the order of calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names: list[str] = []
        # In a tuple, so that torch.export does not take it for a part of the model.
        self._found: tuple[list[Tensor]] = ([],)

    def hook_of(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                self.names.append(name)
                self._found[0].append(output.clone())

        return hook

    def forward(self, x: Tensor) -> list[Tensor]:
        self.names.clear()
        self._found[0].clear()
        self.model(x)
        return list(self._found[0])


def _check_shapes(wanted: list[Tensor], found: list[Tensor], names: Sequence[str]) -> None:
    shapes = [[tuple(t.shape) for t in run] for run in (wanted, found)]
    if shapes[0] != shapes[1] or len(wanted) != len(names):
        raise ModelError(
            f"export: the exported model gives outputs of {shapes[1]}, the model gives {shapes[0]}."
        )


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """Largest difference of each example; infinite where only one is not finite."""
    a, b = a.double(), b.double()
    gaps = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)
    return gaps.flatten(1).max(1).values if gaps.ndim > 1 else gaps.reshape(-1)


def _times(reference: Runner, other: Runner, x: Tensor) -> tuple[float, float]:
    """Median seconds of both on one batch, in alternating runs."""
    x = x.contiguous()
    taken: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for runner, times in zip((reference, other), taken, strict=True):
            started = time.perf_counter()
            runner(x)
            times.append(time.perf_counter() - started)
        if time.perf_counter() - begun > _LONGEST:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    """Names of a model's outputs.

    Args:
        model: in evaluation mode.
        x: inputs.

    Returns:
        In order.

    Raises:
        ModelError: if its output holds no tensor.
    """
    with torch.no_grad():
        found = outputs_of(model(x))
    if not found:
        raise ModelError("export: the model's output holds no tensor by name or position.")
    return list(found)
