"""All that bnfix uses of torch without torch documenting it, each with a fall-back.

Where a name is missing, a fall-back costs speed or a refinement, never a right number.
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
    """The named object, or ``None`` where this torch has no such name."""
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
        """In the place of a dispatch mode: sees no operator."""

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

    TorchDispatchMode = _find("torch.utils._python_dispatch", "TorchDispatchMode") or _NoMode


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """For modes that are entered inside `eager`: torch imports no compiler to keep it out."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def tree_map(fn: Callable[[Any], Any], nest: Any) -> Any:
    """A nest of mappings, lists and tuples with fn of every leaf; torch's is private."""
    # A packed sequence is a named tuple too, but its lengths must stay on the CPU.
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
    """Whether the tracer or a transform such as vmap is active; True where torch does not say."""
    tracing = torch.jit.is_tracing()  # type: ignore[no-untyped-call, attr-defined]
    return tracing or _transformed is None or bool(_transformed())


def is_forward_differentiated() -> bool:
    """Whether a level of forward-mode autograd is open; True where torch does not say."""
    level = _find("torch.autograd.forward_ad", "_current_level")
    return level is None or level >= 0


def eager() -> AbstractContextManager[Any]:
    """Let no torch.compile start; where its compiler was never imported, none can."""
    # set_stance itself would import it, which takes seconds.
    is_there = "torch._dynamo" in sys.modules
    return torch.compiler.set_stance("force_eager") if is_there else nullcontext()


def has_modes() -> bool:
    """Whether this thread has a mode, such as a default device; True where torch does not say."""
    if _function_modes is None or _dispatch_modes is None:
        return True
    return bool(_function_modes() or _dispatch_modes())


def default_store() -> Any:
    """The store that the processes of the default group share, or ``None``."""
    get = _find("torch.distributed.distributed_c10d", "_get_default_store")
    return None if get is None else get()


def packed_weight(weight: Tensor, *how: Any) -> Tensor:
    """A convolution's weight in the layout of the CPU's library; AttributeError without it."""
    packed: Tensor = torch.ops.mkldnn._reorder_convolution_weight(weight, *how)
    return packed


def packed_convolution(input: Tensor, weight: Tensor, bias: Tensor | None, *how: Any) -> Tensor:
    """A convolution by a `packed_weight`."""
    made: Tensor = torch.ops.mkldnn._convolution_pointwise(
        input, weight, bias, *how, "none", [], ""
    )
    return made
