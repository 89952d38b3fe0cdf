"""Trace a model with torch.fx or torch.export."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import operator
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.core.errors import ModelError, model_errors, root_line
from bnfix.core.torch_private import ConvBase

#: Errors that a third-party forward raises on symbols.
_TRACE_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NameError,
    ArithmeticError,
)  # fmt: skip


def graph_of(
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None = None
) -> fx.Graph:
    """Trace a model for all inputs at once; norm layers and torch's own layers stay calls.

    If that fails and there is an example, branches follow the example.
    """
    graph = graph_or_reason(model, norms)
    if isinstance(graph, str) and example is not None:
        with contextlib.suppress(*_TRACE_ERRORS), torch.no_grad():
            return _Followed(model, norms, example).trace(model, _defaults(model))
    if isinstance(graph, str):
        raise ModelError(f"model: cannot be traced by torch.fx ({graph}).")
    return graph


def export_program(
    model: nn.Module, example: Tensor, *, free_size: bool = False
) -> torch.export.ExportedProgram:
    """Export with a free batch size, and a free height and width if asked, from at least 2 inputs.

    A single input is not enough: torch.export treats a size of 1 as a constant.
    """
    free = {0: torch.export.Dim("batch", min=1, max=2**20)}
    if free_size:
        free |= dict.fromkeys(range(2, example.ndim), torch.export.Dim.DYNAMIC)
    size = " and a free height and width" if free_size else ""
    problem = f"cannot be traced by torch.export with a free batch size{size}"
    advice = "Its forward must not branch on values or fix the number of examples."
    shapes: Any = (free,)
    with model_errors("model", problem, advice), quiet(), torch.no_grad():
        return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep exporters from printing, warning and logging; real problems are checked or raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def hooked(module: nn.Module) -> bool:
    """Whether forward hooks could see or change the module's input or output."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def graph_or_reason(model: nn.Module, norms: Sequence[nn.Module]) -> fx.Graph | str:
    """The graph, or why there is none."""
    reasons = []
    for coarse in (False, True):
        try:
            return _Tracer(model, norms, coarse).trace(model, _defaults(model))
        except _TRACE_ERRORS as error:
            reasons.append(root_line(error))
    return reasons[0]


class _Tracer(fx.Tracer):
    """Norms and torch's own layers are leaves; if coarse, so is any module without a norm."""

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module], coarse: bool) -> None:
        super().__init__()
        self._coarse, self._norms = coarse, {id(norm) for norm in norms}
        self._with_norms = {
            id(m) for m in model.modules() if any(id(part) in self._norms for part in m.modules())
        }

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self._norms or isinstance(m, ConvBase | nn.Linear):
            return True
        if self._coarse and not isinstance(m, nn.Sequential):
            return id(m) not in self._with_norms
        return super().is_leaf_module(m, module_qualified_name)


class _Followed(_Tracer):
    """Computes an example's values during the trace; they decide where the model branches."""

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module], example: Tensor) -> None:
        super().__init__(model, norms, coarse=False)
        # The parameters of the model itself are symbols in a trace.
        self._example, self._copy = example, copy.deepcopy(model)

    def create_proxy(
        self, kind: str, target: Any, args: Any, kwargs: Any, *rest: Any, **named: Any
    ) -> Any:
        """Make a node, and compute its value."""
        proxy = super().create_proxy(kind, target, args, kwargs, *rest, **named)
        if kind == "output":
            return proxy
        args, kwargs = fx.map_arg((proxy.node.args, proxy.node.kwargs), lambda n: n.meta["value"])
        if kind == "call_function":
            value = target(*args, **kwargs)
        elif kind == "call_method":
            value = getattr(args[0], target)(*args[1:], **kwargs)
        elif kind == "call_module":
            value = self._copy.get_submodule(target).forward(*args, **kwargs)
        elif kind == "get_attr":
            value = operator.attrgetter(target)(self._copy)
        else:
            value = self._example
        proxy.node.meta["value"] = value
        return proxy

    def to_bool(self, obj: fx.Proxy) -> bool:
        """The branch that the model takes."""
        return bool(obj.node.meta["value"])


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Defaults of the further arguments; as symbols they would take the wrong branches."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}
