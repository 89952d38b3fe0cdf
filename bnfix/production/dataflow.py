"""Where the input of a norm layer comes from, and who else sees it: torch.fx, or torch.export."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix._torch_private import ConvBase
from bnfix.errors import ModelError
from bnfix.production.artifacts import quiet, root_line

#: What running a stranger's forward on symbols is known to raise.
_TRACE_ERRORS = (
    RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError, NameError,
    ArithmeticError,
)  # fmt: skip
#: Modules that hand their input on, in evaluation.
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


@dataclass(frozen=True)
class Source:
    """What comes before a norm layer.

    Args:
        layer: dotted name of the module whose output is the layer's input, if it is a module's and
            nothing else sees it.
        problem: otherwise what it is, or who else sees it; "" if there is none.
    """

    layer: str | None
    problem: str = ""


def sources_of(
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None = None
) -> tuple[dict[str, Source], str]:
    """Find what comes before each norm layer.

    torch.fx traces for all inputs at once. Where that fails (branches on sizes, for example) and
    there is an example, torch.export follows the way that inputs of its size take.
    """
    graph = _graph(model, norms)
    if isinstance(graph, fx.Graph):
        return _sources(graph, model, norms), "torch.fx"
    if example is None:
        raise ModelError(
            f"folding: the model cannot be traced by torch.fx ({graph}). Give an example of its "
            "inputs, or leave its norm layers as they are."
        )
    try:
        program = export_program(model, example)
    except ModelError as error:
        raise ModelError(
            f"folding: the model can be traced neither by torch.fx ({graph}) nor by torch.export "
            f"({error})."
        ) from error
    return _exported_sources(program, model, norms), "torch.export"


def graph_of(model: nn.Module, norms: Sequence[nn.Module]) -> fx.Graph:
    """Trace a model for all inputs at once, its norm layers and torch's own layers as they are."""
    graph = _graph(model, norms)
    if isinstance(graph, str):
        raise ModelError(f"model: cannot be traced by torch.fx ({graph}).")
    return graph


def _graph(model: nn.Module, norms: Sequence[nn.Module]) -> fx.Graph | str:
    """The graph, or why there is none."""
    reasons = []
    for coarse in (False, True):
        try:
            return _Tracer(model, norms, coarse).trace(model, _defaults(model))
        except _TRACE_ERRORS as error:
            reasons.append(root_line(error))
    return reasons[0]


def export_program(
    model: nn.Module, example: Tensor, *, free_size: bool = False
) -> torch.export.ExportedProgram:
    """Export a model with a free batch size, and a free height and width if asked for."""
    free = {0: torch.export.Dim("batch", min=1, max=2**20)}
    if free_size:
        free |= dict.fromkeys(range(2, example.ndim), torch.export.Dim.DYNAMIC)
    try:
        with quiet(), torch.no_grad():
            shapes: Any = (free,)
            return torch.export.export(model, (example,), dynamic_shapes=shapes, strict=False)
    except Exception as error:
        size = " and a free height and width" if free_size else ""
        raise ModelError(
            f"model: cannot be traced by torch.export with a free batch size{size} "
            f"({root_line(error)}). Its forward must not branch on values, nor fix the number of "
            "examples."
        ) from error


class _Tracer(fx.Tracer):
    """Norms and torch's own layers are leaves; coarse: whatever holds no norm is one too."""

    def __init__(self, model: nn.Module, norms: Sequence[nn.Module], coarse: bool) -> None:
        super().__init__()
        known = {id(norm) for norm in norms}
        self._norms = known
        self._with_norms = {
            id(m) for m in model.modules() if any(id(part) in known for part in m.modules())
        }
        self._coarse = coarse

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if id(m) in self._norms or isinstance(m, ConvBase | nn.Linear):
            return True
        if self._coarse and not isinstance(m, nn.Sequential):
            return id(m) not in self._with_norms
        return super().is_leaf_module(m, module_qualified_name)


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Arguments that a call with one input leaves at their defaults; symbols would mislead."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


def _sources(graph: fx.Graph, model: nn.Module, norms: Sequence[nn.Module]) -> dict[str, Source]:
    names = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    known = {id(norm) for norm in norms}
    calls = Counter(id(names[str(node.target)]) for node in graph.nodes if node.op == "call_module")
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}
    found: dict[str, Source] = {}
    for node in graph.nodes:
        if node.op != "call_module" or id(names[str(node.target)]) not in known:
            continue
        norm = names[str(node.target)]
        if calls[id(norm)] > 1:
            found[first[id(norm)]] = Source(None, f"is called {calls[id(norm)]} times a pass")
            continue
        given = node.args[0] if node.args else next(iter(node.kwargs.values()), None)
        found[first[id(norm)]] = _source(given, node, names, first, calls, read)
    return found


def _source(
    given: Any,
    user: fx.Node,
    names: dict[str, nn.Module],
    first: dict[int, str],
    calls: Counter[int],
    read: set[str],
) -> Source:
    while (
        isinstance(given, fx.Node)
        and given.op == "call_module"
        and _is_silent(names[str(given.target)])
        and set(given.users) == {user}
        and given.args
    ):
        user, given = given, given.args[0]
    if not isinstance(given, fx.Node) or given.op != "call_module":
        what = getattr(given, "name", "a constant")
        return Source(None, f"follows {what}, not a convolution or linear layer")
    module = names[str(given.target)]
    name = first[id(module)]
    if set(given.users) != {user}:
        return Source(None, f"the output of {name} is used elsewhere too")
    if calls[id(module)] > 1:
        return Source(None, f"{name} is shared: it is called {calls[id(module)]} times a pass")
    if name in read:
        return Source(None, f"the weights of {name} are used elsewhere too")
    return Source(name)


def _is_silent(module: nn.Module) -> bool:
    return isinstance(module, _SILENT) and not module.training


def _module_of(node: fx.Node) -> str | None:
    """Dotted name of the module call that a node of an exported program belongs to."""
    stack = node.meta.get("nn_module_stack")
    # A second call of the same module has its number after an @.
    return list(stack.values())[-1][0] + _suffix(list(stack)[-1]) if stack else None


def _suffix(key: str) -> str:
    return "@" + key.rpartition("@")[2] if "@" in key else ""


def _exported_sources(
    program: torch.export.ExportedProgram, model: nn.Module, norms: Sequence[nn.Module]
) -> dict[str, Source]:
    first = {id(module): name for name, module in model.named_modules()}
    owner = {n: first[id(m)] for n, m in model.named_modules(remove_duplicate=False)}
    tensors = {str(n) for n in program.graph_signature.inputs_to_parameters} | {
        str(n) for n in program.graph_signature.inputs_to_buffers
    }
    inside: dict[str, list[fx.Node]] = {}
    calls: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        where = _module_of(node) if node.op == "call_function" else None
        if where is not None:
            plain = owner.get(where.partition("@")[0], where.partition("@")[0])
            inside.setdefault(plain, []).append(node)
            calls.setdefault(plain, set()).add(where)
    return {
        first[id(norm)]: _exported_source(first[id(norm)], inside, calls, tensors, model)
        for norm in norms
        if first[id(norm)] in inside
    }


def _exported_source(
    name: str,
    inside: dict[str, list[fx.Node]],
    calls: dict[str, set[str]],
    tensors: set[str],
    model: nn.Module,
) -> Source:
    own = set(inside[name])
    if len(calls[name]) > 1:
        return Source(None, f"is called {len(calls[name])} times a pass")

    def inputs(nodes: set[fx.Node]) -> set[fx.Node]:
        outside = {given for node in nodes for given in node.all_input_nodes} - nodes
        return {given for given in outside if given.name not in tensors}

    users, sources = own, inputs(own)
    while len(sources) == 1:
        (given,) = sources
        where = next((plain for plain, nodes in inside.items() if given in nodes), None)
        if where is None or any(True for _ in model.get_submodule(where).children()):
            return Source(None, f"follows {given.name}, not a convolution or linear layer")
        if not set(given.users) <= users:
            return Source(None, f"the output of {where} is used elsewhere too")
        if len(calls[where]) > 1:
            return Source(None, f"{where} is shared: it is called {len(calls[where])} times a pass")
        nodes = set(inside[where])
        weights = {w for n in nodes for w in n.all_input_nodes if w.name in tensors}
        if any(not set(weight.users) <= nodes for weight in weights):
            return Source(None, f"the weights of {where} are used elsewhere too")
        if not _is_silent(model.get_submodule(where)):
            return Source(where)
        users, sources = nodes, inputs(nodes)
    return Source(None, "has no single input")
