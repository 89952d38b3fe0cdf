"""The undocumented parts of torch that bnfix uses, each with a fallback.

If a name is missing, the fallback costs speed or a refinement, never a correct number.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

__all__ = [
    "BatchNormBase", "ConvBase", "ConvTransposeBase", "DispatchMode", "InstanceNormBase",
    "LazyNormBase", "TorchDispatchMode", "default_store", "eager", "has_modes",
    "is_forward_differentiated", "is_transformed", "packed_convolution", "packed_weight",
    "tree_leaves", "tree_map",
]  # fmt: skip


def _find(module: str, name: str) -> Any:
    """The named object, or ``None`` if this torch does not have it."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


if TYPE_CHECKING:
    from torch.nn.modules.batchnorm import _BatchNorm as BatchNormBase
    from torch.nn.modules.batchnorm import _LazyNormBase as LazyNormBase
    from torch.nn.modules.conv import _ConvNd as ConvBase
    from torch.nn.modules.conv import _ConvTransposeNd as ConvTransposeBase
    from torch.nn.modules.instancenorm import _InstanceNorm as InstanceNormBase
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    # Each public class has the private one as its first base.
    BatchNormBase = nn.BatchNorm2d.__base__
    LazyNormBase = nn.LazyBatchNorm2d.__bases__[0]
    InstanceNormBase = nn.InstanceNorm2d.__base__
    ConvBase = nn.Conv2d.__base__
    ConvTransposeBase = nn.ConvTranspose2d.__base__

    class _NoMode:
        """A stand-in for a dispatch mode; it sees no operators."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    TorchDispatchMode = _find("torch.utils._python_dispatch", "TorchDispatchMode") or _NoMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A mode for use inside `eager`: torch does not import its compiler to disable it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def tree_map(fn: Callable[[Any], Any], nest: Any) -> Any:
    """Apply fn to every leaf of a nest of mappings, lists and tuples; torch's own is private."""
    # A packed sequence is also a named tuple, but its lengths must stay on the CPU.
    if isinstance(nest, PackedSequence):
        return fn(nest)
    if isinstance(nest, Mapping):
        return {key: tree_map(fn, value) for key, value in nest.items()}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return type(nest)(*(tree_map(fn, value) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(tree_map(fn, value) for value in nest)
    return fn(nest)


def tree_leaves(nest: Any) -> list[Any]:
    """The leaves of a nest, in order."""
    leaves: list[Any] = []
    tree_map(leaves.append, nest)
    return leaves


_transformed = _find("torch._C", "_are_functorch_transforms_active")
_function_modes = _find("torch._C", "_len_torch_function_stack")
_dispatch_modes = _find("torch._C", "_len_torch_dispatch_stack")


def is_transformed() -> bool:
    """Whether the tracer or a transform such as vmap is active; True if unknown."""
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    return tracing or _transformed is None or bool(_transformed())


def is_forward_differentiated() -> bool:
    """Whether a level of forward-mode autograd is open; True if unknown."""
    level = _find("torch.autograd.forward_ad", "_current_level")
    return level is None or level >= 0


def eager() -> AbstractContextManager[Any]:
    """Turn torch.compile off; without an imported compiler there is nothing to turn off."""
    # set_stance would import the compiler, which takes seconds.
    is_there = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_there else nullcontext()


def has_modes() -> bool:
    """Whether this thread has a mode, such as a default device; True if unknown."""
    if _function_modes is None or _dispatch_modes is None:
        return True
    return bool(_function_modes() or _dispatch_modes())


def default_store() -> Any:
    """The store that the processes of the default group share, or ``None``."""
    get = _find("torch.distributed.distributed_c10d", "_get_default_store")
    return None if get is None else get()


def packed_weight(weight: Tensor, *how: Any) -> Tensor:
    """A convolution's weight in the CPU library's layout; AttributeError without that library."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *how)
    return packed


def packed_convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """A convolution with a `packed_weight`."""
    made: Tensor = torch.ops.mkldnn._convolution_pointwise(
        input, weight, bias, *how, "none", [], ""
    )
    return made
