"""How far a change of a network moved its outputs, on some of the images at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ModelError

#: Outputs are compared on so many images at most, and on fewer where they are large.
MOST_IMAGES = 256
_MOST_BYTES = 64 << 20
#: From here on a change is called large.
_LARGE_RMS, _LARGE_TOP1 = 0.5, 0.2


@dataclass(frozen=True)
class Moved:
    """How far the outputs of `n` images moved."""

    # Root mean square of the change over that of the outputs before; None if not finite.
    relative_rms: float | None
    top1_changed: float | None  # fraction of images; None without classes
    n: int

    @property
    def is_large(self) -> bool:
        """Whether a user should look twice."""
        return (self.relative_rms or 0.0) > _LARGE_RMS or (self.top1_changed or 0.0) > _LARGE_TOP1


def all_outputs(model: nn.Module, call: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """All tensors of the output, of a detector those of its backbone, and the output itself."""
    features: list[Any] = []
    backbone = getattr(model, "backbone", None)
    with guards.seeded(0), guards.inference(model), guards.hooks() as handles:
        if isinstance(backbone, nn.Module):
            handles.append(backbone.register_forward_hook(lambda *call: features.append(call[-1])))
        output = call()
    # Which boxes a detector keeps, and in which order, can turn on a rounding.
    of = features if features and _is_detections(output) else output
    return runtime.tensors_in(of), output


def _is_detections(output: Any) -> bool:
    return isinstance(output, list) and all(isinstance(o, Mapping) and "boxes" in o for o in output)


@dataclass
class Recorded:
    """Outputs on some images, kept to be compared with others on the same ones."""

    tensors: list[list[Tensor]]
    classes: list[Tensor]
    n: int


def record(model: nn.Module, batches: Iterable[Any], precision: str) -> Recorded:
    """Run a model on as many of the batches as outputs are kept of."""
    found, n_bytes = Recorded([], [], 0), 0
    for batch in batches:
        with runtime.autocast(runtime.device_of(model), precision):
            call = partial(runtime.run, model, batch, runtime.device_of(model))
            tensors, output = all_outputs(model, call)
        found.tensors.append([t.float().cpu() for t in tensors if t.is_floating_point()])
        found.n += runtime.n_examples_of(batch)
        try:
            logits = runtime.logits_of(output)
        except ModelError:  # no classes
            pass
        else:
            top1 = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
            found.classes.append(top1.cpu())
        n_bytes += sum(t.numel() * t.element_size() for t in found.tensors[-1])
        if n_bytes > _MOST_BYTES:
            break
    return found


def moved(before: Recorded, after: Recorded) -> Moved:
    """Compare the outputs of two models on the same images."""
    pairs = [
        (a, b)
        for old, new in zip(before.tensors, after.tensors, strict=False)
        for a, b in zip(old, new, strict=False)
    ]
    rms = None
    same = [list(map(len, one.tensors)) for one in (before, after)]
    if pairs and same[0] == same[1] and all(a.shape == b.shape for a, b in pairs):
        change = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
        size = sum(float(a.double().square().sum()) for a, _ in pairs)
        ratio = (change / size) ** 0.5 if size else float("inf") if change else 0.0
        rms = ratio if torch.tensor(ratio).isfinite() else None
    top1 = None
    if before.classes and after.classes:
        old, new = torch.cat(before.classes), torch.cat(after.classes)
        top1 = float((old[: len(new)] != new[: len(old)]).double().mean())
    return Moved(rms, top1, min(before.n, after.n))
