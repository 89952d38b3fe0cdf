"""Compare an exported model with its original: outputs, top-1, time, and the first odd layer."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core import guards
from bnfix.core.errors import ModelError

#: Inputs to outputs, in the order of `outputs_of`.
Runner = Callable[[Tensor], list[Tensor]]

#: Batch sizes that are run: one, and an odd one.
BATCH_SIZES = (1, 7)
#: Differences of one layer below this, relative to its output, are rounding in float32.
_ROUNDING = 1e-5
_ROUNDS = 5
_LONGEST = 3.0  # seconds of timing, for one batch size


@dataclass(frozen=True)
class Agreement:
    """How two models agree on the same inputs.

    Differences are |output - output of the first model|. The relative one is divided by that
    output's largest value where that is above 1; it is infinite if only one of both is not finite.
    """

    n_examples: int
    batch_sizes: tuple[int, ...]  # all inputs were run at each
    relative_difference: float  # largest of any output
    max_difference: float  # the same, not divided
    worst_output: str
    worst_example: int  # its position among the inputs
    largest_output: float  # largest finite value of the worst output in the first model
    top1_agreement: float | None  # None unless exactly one output is (N, C)
    seconds: Mapping[int, tuple[float, float]]  # median of a batch, by its size: first, second


def outputs_of(output: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of a model's output in order: ``output``, or dotted keys and positions."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, list | tuple):
        items = list(enumerate(output))
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= outputs_of(value, f"{name}.{key}" if name else str(key))
    return found


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    """Names of a model's outputs, in order."""
    with guards.inference(model):
        found = outputs_of(model(x))
    if not found:
        raise ModelError("export: the model's output holds no tensor by name or position.")
    return list(found)


def torch_runner(model: nn.Module) -> Runner:
    """Run a model in evaluation mode."""

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(outputs_of(model(x)).values())

    return run


def agreement(
    reference: Runner,
    other: Runner,
    inputs: Tensor,
    names: Sequence[str],
    *,
    timed: bool = True,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
) -> Agreement:
    """Run two models on all inputs at several batch sizes and compare all their outputs."""
    n = len(inputs)
    sizes = tuple(sorted({min(size, n) for size in batch_sizes}))
    worst, largest = dict.fromkeys(names, (0.0, 0)), dict.fromkeys(names, 0.0)
    n_same, n_logits = 0, 0
    for size in sizes:
        for start in range(0, n, size):
            x = inputs[start : start + size].contiguous()
            wanted, found = reference(x), other(x)
            _check_shapes(wanted, found, names)
            for name, a, b in zip(names, wanted, found, strict=True):
                if not a.numel():
                    continue
                gaps = _gaps(a, b)
                largest[name] = max(largest[name], _largest(a))
                if float(gaps.max()) > worst[name][0]:
                    worst[name] = float(gaps.max()), start + int(gaps.argmax())
            logits = [i for i, a in enumerate(wanted) if a.ndim == 2 and a.shape[1] > 1]
            # Two outputs of that shape could be an auxiliary head's, or two tasks'.
            if len(logits) == 1:
                n_same += int((wanted[logits[0]].argmax(1) == found[logits[0]].argmax(1)).sum())
                n_logits += len(wanted[logits[0]])
    relative = {name: worst[name][0] / max(1.0, largest[name]) for name in names}
    place = max(names, key=lambda name: relative[name])
    return Agreement(
        n_examples=n,
        batch_sizes=sizes,
        relative_difference=relative[place],
        max_difference=worst[place][0],
        worst_output=place,
        worst_example=worst[place][1],
        largest_output=largest[place],
        top1_agreement=n_same / n_logits if n_logits else None,
        seconds={s: _times(reference, other, inputs[:s]) for s in sizes} if timed else {},
    )


def suspect_layer(
    model: nn.Module, export: Callable[[nn.Module], Runner], x: Tensor, atol: float
) -> str:
    """The first layer whose output an exported form gets wrong, in words; "" if all agree.

    The model is exported once more with the outputs of all its layers, so one run tells.
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
        scale = max(1.0, _largest(a)) if a.numel() else 1.0
        gap = float(_gaps(a, b).max()) if a.shape == b.shape and a.numel() else math.inf
        if gap > max(atol, _ROUNDING) * scale:
            kind = type(model.get_submodule(name)).__name__
            return f"{name} ({kind}), the first whose output differs (by {gap:.2g})"
    return ""


class _Probed(nn.Module):
    """A model whose outputs are those of all its layers, in the order of calls."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names: list[str] = []
        # In a namespace: torch.export looks into containers that a model holds, and compares them.
        self._found = SimpleNamespace(outputs=[])

    def hook_of(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and output.is_floating_point():
                self.names.append(name)
                self._found.outputs.append(output.clone())

        return hook

    def forward(self, x: Tensor) -> list[Tensor]:
        self.names.clear()
        self._found.outputs.clear()
        self.model(x)
        return list(self._found.outputs)


def _check_shapes(wanted: list[Tensor], found: list[Tensor], names: Sequence[str]) -> None:
    shapes = [[tuple(t.shape) for t in run] for run in (wanted, found)]
    if shapes[0] != shapes[1] or len(wanted) != len(names):
        raise ModelError(
            f"export: the exported model gives outputs of {shapes[1]}, the model gives {shapes[0]}."
        )


def _largest(a: Tensor) -> float:
    return float(a.double().abs().nan_to_num(0.0, 0.0, 0.0).max())


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
