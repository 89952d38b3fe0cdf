"""The head of a network, the layer that gives its logits: found on a batch, and moved exactly."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ModelError
from bnfix.metrics.evaluate import first_look

#: What can be the head of a network with an output at every position.
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
#: How far logits may be from what the moved head should give, by the largest of them.
_ROUNDING = 1e-4


def head_of(
    modules: Sequence[nn.Module],
    n_classes: int | None,
    what: str = "fine-tuning",
    *,
    dense: bool = False,
) -> nn.Module:
    """Find the last linear layer, or convolution (1x1, unless dense), with so many outputs."""
    for module in reversed(modules):
        if isinstance(module, nn.Linear):
            n_outputs = module.out_features
        elif isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
            n_outputs = module.out_channels
        elif dense and isinstance(module, CONVOLUTIONS):
            n_outputs = module.out_channels
        else:
            continue
        if n_classes in (None, n_outputs):
            return module
    fitting = "" if n_classes is None else f" with {n_classes} outputs, as many as the logits"
    where, todo = ("--train head", " Use --train norms or all.")
    if what != "fine-tuning":
        where, todo = what, ""
    raise ModelError(f"{where}: no linear layer or 1x1 convolution{fitting}.{todo}")


def find_head(
    what: str,
    model: nn.Module,
    batches: Iterable[Any],
    forward: runtime.Forward | None = None,
) -> nn.Module:
    """Run a batch to see which layer is the head; ``what`` is what that is for."""
    modules = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
    }  # fmt: skip
    # The first rank that has a batch says which layer all of them use.
    (calls, (n_outputs, dense)), *_ = first_look(what, model, modules, batches, forward, _form)
    return head_of([modules[name] for name, _ in calls], n_outputs, what, dense=dense)


def _form(output: Any) -> tuple[int | None, bool]:
    """How many outputs there are a position, if that is plain, and whether there are positions."""
    for read in (runtime.output_of, runtime.logits_of):
        with suppress(ModelError):
            found = read(output)
            return (found.shape[1] if found.ndim > 1 else 1), found.ndim > 2
    return None, True


@torch.no_grad()
def move_logits_(
    model: nn.Module, head: Any, batch: Any, scale: float, shift: Tensor | None = None
) -> None:
    """Make the logits z into scale z + shift by the head's weights and bias, or change nothing.

    With weights W and bias b the head gets scale W and scale b + shift; that the logits follow is
    checked on the batch.

    Raises:
        ModelError: if there is no bias to shift, or the logits do not follow, because something
            that does not keep scale or shift comes after the head, or its weights serve elsewhere.
    """
    if shift is not None and head.bias is None:
        raise ModelError("the head has no bias that could hold the shift.")
    before, wanted = guards.Snapshot(head), scale * _logits(model, batch)
    if shift is not None:
        wanted += shift.to(wanted)
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            tensor.mul_(scale)
    if shift is not None:
        head.bias.add_(shift.to(head.bias))
    error = (_logits(model, batch) - wanted).abs().max()
    if not error <= _ROUNDING * wanted.abs().max():
        before.restore_()
        raise ModelError(
            "the logits do not follow their last layer: something comes after it, or its weights "
            "are used elsewhere too."
        )


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with guards.inference(model):
        return runtime.logits_of(runtime.run(model, batch, runtime.device_of(model))).double()
