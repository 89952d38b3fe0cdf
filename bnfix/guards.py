"""Context managers that leave a model, and the world, as they found it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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
        ``requires_grad`` and gradient of every parameter, and of those wanted that are none; what
        is gathered inside is dropped.
    """
    tensors = list({id(t): t for t in (*model.parameters(), *wanted)}.values())
    before = [(t, t.requires_grad, t.grad) for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(False)
            # Left in place it would be added to in place.
            t.grad = None
        for tensor in wanted:
            tensor.requires_grad_(True)
        yield
    finally:
        for t, flag, grad in before:
            t.requires_grad_(flag)
            t.grad = grad


def exchange_(module: nn.Module, other: nn.Module) -> None:
    """Let two module objects trade class and contents, so that every holder of one follows."""
    # Some networks also hold layers in plain lists, where putting a new object in the tree misses.
    pair = (type(other), other.__dict__), (type(module), module.__dict__)
    for one, (kind, fields) in zip((module, other), pair, strict=True):
        object.__setattr__(one, "__class__", kind)
        object.__setattr__(one, "__dict__", fields)


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
        modules = list(model.modules())
        tables: list[Any] = [table for m in modules for table in (m._parameters, m._buffers)]
        self._tables = [(table, dict(table)) for table in tables]
        tensors = {id(t): t for _, own in self._tables for t in own.values() if t is not None}
        self._values = [(t, t.detach().clone()) for t in tensors.values()]
        self._settings = [(module, _settings(module)) for module in modules]

    @torch.no_grad()
    def restore_(self) -> None:
        """Put every value back into the very tensors that held it, and those into their places.

        Changes:
            Parameters, buffers and plain settings (numbers, flags) of the model; not its modes.
        """
        for tensor, value in self._values:
            tensor.copy_(value)
        for table, own in self._tables:
            table.update(own)
        for module, settings in self._settings:
            module.__dict__.update(settings)


#: Fields that belong to the machinery of torch, the mode and the kind of hooks among them.
_TORCH_FIELDS = frozenset(vars(nn.Module()))


def _settings(module: nn.Module) -> dict[str, bool | int | float | None]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _TORCH_FIELDS and (value is None or isinstance(value, bool | int | float))
    }
