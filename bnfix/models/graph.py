"""Trace a model with torch.fx or torch.export, and find the layer before each norm layer."""

from __future__ import annotations

import contextlib
import copy
import inspect
import io
import logging
import operator
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.core.errors import ModelError, model_errors, root_line
from bnfix.core.torch_private import ConvBase

#: Errors that a stranger's forward is known to raise on symbols.
_TRACE_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NameError,
    ArithmeticError,
)  # fmt: skip
#: Modules that return their input unchanged in evaluation mode.
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Source:
    """The module whose output a norm layer alone reads, or the reason why there is none."""

    layer: str | None
    problem: str = ""


def sources_of(
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None
) -> tuple[dict[str, Source], str]:
    """The source of each norm layer by dotted name, and the tool that found it.

    torch.fx traces for all inputs at once. If it fails (on a branch that depends on a size, for
    example) and there is an example, torch.export follows the path of inputs of its size.
    """
    graph = _graph(model, norms)
    if isinstance(graph, fx.Graph):
        calls, tool = _traced_calls(graph, model), "torch.fx"
    elif example is None:
        raise ModelError(
            f"folding: the model cannot be traced by torch.fx ({graph}), and torch.export takes no "
            "inputs of this form. Leave its norm layers as they are."
        )
    else:
        try:
            calls, tool = _exported_calls(export_program(model, example), model), "torch.export"
        except ModelError as error:
            raise ModelError(
                f"folding: the model can be traced neither by torch.fx ({graph}) nor by "
                f"torch.export ({error})."
            ) from error
    known = set(norms)
    names = {name for name, module in model.named_modules() if module in known}
    sources = {n: _source(call, calls, model) for call, n in calls.layer.items() if n in names}
    return sources, tool


def graph_of(
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None = None
) -> fx.Graph:
    """Trace a model for all inputs at once; norm layers and torch's own layers stay calls.

    Where that fails and there is an example, branches go as they go for it.
    """
    graph = _graph(model, norms)
    if isinstance(graph, str) and example is not None:
        with contextlib.suppress(*_TRACE_ERRORS), torch.no_grad():
            return _Followed(model, norms, example).trace(model, _defaults(model))
    if isinstance(graph, str):
        raise ModelError(f"model: cannot be traced by torch.fx ({graph}).")
    return graph


def export_program(
    model: nn.Module, example: Tensor, *, free_size: bool = False
) -> torch.export.ExportedProgram:
    """Export with a free batch size, and if asked a free height and width, from at least 2 inputs.

    A single input would not do: torch.export takes a size of 1 for a constant.
    """
    free = {0: torch.export.Dim("batch", min=1, max=2**20)}
    if free_size:
        free |= dict.fromkeys(range(2, example.ndim), torch.export.Dim.DYNAMIC)
    size = " and a free height and width" if free_size else ""
    problem = f"cannot be traced by torch.export with a free batch size{size}"
    advice = "Its forward must not branch on values, nor fix the number of examples."
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


def _graph(model: nn.Module, norms: Sequence[nn.Module]) -> fx.Graph | str:
    """The graph, or why there is none."""
    reasons = []
    for coarse in (False, True):
        try:
            return _Tracer(model, norms, coarse).trace(model, _defaults(model))
        except _TRACE_ERRORS as error:
            reasons.append(root_line(error))
    return reasons[0]


class _Tracer(fx.Tracer):
    """Norms and torch's own layers are leaves; coarse: any module without a norm is one too."""

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
    """Values of an example go along, and decide where the model branches."""

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
        """Which way the model goes."""
        return bool(obj.node.meta["value"])


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Defaults of the further arguments; as symbols they would take the wrong branches."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


@dataclass(frozen=True)
class _Calls:
    """The calls of a model's modules in a graph, each by a name of its own."""

    nodes: dict[str, set[fx.Node]]  # one node in torch.fx, in an exported program several
    layer: dict[str, str]  # first dotted name of the module that is called
    tensors: set[fx.Node]  # that are parameters and buffers, not values
    read: set[str]  # modules whose weights are also read outside of the call


def _traced_calls(graph: fx.Graph, model: nn.Module) -> _Calls:
    first = _first_names(model)
    called = {n.name: n for n in graph.nodes if n.op == "call_module"}
    return _Calls(
        nodes={call: {node} for call, node in called.items()},
        layer={call: first[str(node.target)] for call, node in called.items()},
        tensors=set(),
        read={str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"},
    )


def _exported_calls(program: torch.export.ExportedProgram, model: nn.Module) -> _Calls:
    """The calls in an exported program, whose nodes name the module that they came from."""
    first, signature = _first_names(model), program.graph_signature
    stored = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    found = _Calls({}, {}, {n for n in program.graph.nodes if n.name in stored}, set())
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            # A second call of the same module has its number after an @ in its key.
            key, (name, _) = list(stack.items())[-1]
            call = f"{name}@{key.rpartition('@')[2]}" if "@" in key else str(name)
            found.nodes.setdefault(call, set()).add(node)
            found.layer[call] = first.get(str(name), str(name))
    for call, nodes in found.nodes.items():
        weights = found.tensors & {given for node in nodes for given in node.all_input_nodes}
        if any(not set(weight.users) <= nodes for weight in weights):
            found.read.add(found.layer[call])
    return found


def _first_names(model: nn.Module) -> dict[str, str]:
    """Of each dotted name of a module, the first one that the same module has."""
    first = {module: name for name, module in model.named_modules()}
    return {name: first[m] for name, m in model.named_modules(remove_duplicate=False)}


def _source(call: str, calls: _Calls, model: nn.Module) -> Source:
    """The source of the norm layer in a call, seen through modules that do nothing."""
    n_calls = Counter(calls.layer.values())
    if (n := n_calls[calls.layer[call]]) > 1:
        return Source(None, f"is called {n} times a pass")
    while True:
        users = calls.nodes[call]
        given = {node for user in users for node in user.all_input_nodes} - users - calls.tensors
        if len(given) != 1:
            return Source(None, "has no single input")
        (node,) = given
        call = next((name for name, nodes in calls.nodes.items() if node in nodes), "")
        name = calls.layer.get(call, "")
        # A module with children computes more than its own formula.
        if not call or any(True for _ in model.get_submodule(name).children()):
            return Source(None, f"follows {node.name}, not a convolution or linear layer")
        module = model.get_submodule(name)
        if not set(node.users) <= users:
            return Source(None, f"the output of {name} is used elsewhere too")
        if isinstance(module, _SILENT) and not module.training:
            continue
        if (n := n_calls[name]) > 1:
            return Source(None, f"{name} is shared: it is called {n} times a pass")
        if name in calls.read:
            return Source(None, f"the weights of {name} are used elsewhere too")
        return Source(name)
