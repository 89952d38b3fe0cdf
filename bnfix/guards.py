"""Context managers that leave a model, and the world, as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module's training flag back on leaving, each as it was.

    Args:
        model: flags of this module and all inside it.

    Restores:
        ``training`` of each module, also after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            # Not module.train(): that recurses, and modules differ in what they do there.
            module.training = training


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; modes are put back on leaving.

    Args:
        model: what is run inside.

    Restores:
        ``training`` of each module.
    """
    with modes_kept(model), torch.no_grad():
        model.eval()
        yield


@contextmanager
def only_these_require_grad(model: nn.Module, wanted: list[Tensor]) -> Iterator[None]:
    """Gradients for some of a model's tensors only.

    Args:
        model: whose parameters lose ``requires_grad`` for a while.
        wanted: tensors that get it.

    Restores:
        ``requires_grad`` of every parameter; gradients gathered inside are dropped.
    """
    parameters = list(model.parameters())
    before = [(p, p.requires_grad, p.grad) for p in parameters]
    try:
        for p in parameters:
            p.requires_grad_(False)
        for tensor in wanted:
            tensor.requires_grad_(True)
        yield
    finally:
        for p, flag, grad in before:
            p.requires_grad_(flag)
            p.grad = grad


@contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """A list of hook handles, all removed on leaving.

    Yields:
        The list to append handles to.
    """
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seeded torch randomness inside, the state from before outside.

    Args:
        seed: for the CPU and all CUDA generators.

    Restores:
        The state of torch's CPU and CUDA generators.
    """
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


class Snapshot:
    """A model's parameters, buffers and plain settings, to go back to.

    Args:
        model: copied now, tied tensors once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._parameters = [(p, p.detach().clone()) for p in model.parameters()]
        self._buffers = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]
        self._settings = [(module, _settings(module)) for module in model.modules()]

    @torch.no_grad()
    def restore_(self) -> None:
        """Put every value back into the very tensors that held it.

        Changes:
            Parameters, buffers and plain settings (numbers, flags) of the model; not its modes.
        """
        for parameter, saved in self._parameters:
            parameter.copy_(saved)
        for module, name, buffer, value in self._buffers:
            if buffer is not None and value is not None:
                buffer.copy_(value)
            module._buffers[name] = buffer
        for module, settings in self._settings:
            module.__dict__.update(settings)


def _settings(module: nn.Module) -> dict[str, bool | int | float | None]:
    return {
        name: value
        for name, value in vars(module).items()
        if name != "training" and (value is None or isinstance(value, bool | int | float))
    }
