"""Trace a model with torch.fx or torch.export, and find the layer before each norm layer."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.core.errors import ModelError, one_line
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
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None = None
) -> tuple[dict[str, Source], str]:
    """The source of each norm layer by dotted name, and the tool that found it.

    torch.fx traces for all inputs at once. If it fails (on a branch that depends on a size, for
    example) and there is an example, torch.export follows the path of inputs of its size.
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
    """Trace a model for all inputs at once; norm layers and torch's own layers stay calls."""
    graph = _graph(model, norms)
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


def root_line(error: BaseException) -> str:
    """The innermost reason of a library's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).rstrip(".")


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


def _defaults(model: nn.Module) -> dict[str, Any]:
    """Defaults of the further arguments; as symbols they would take the wrong branches."""
    parameters = list(inspect.signature(model.forward).parameters.values())
    return {p.name: p.default for p in parameters[1:] if p.default is not p.empty}


def _first_names(model: nn.Module) -> dict[int, str]:
    return {id(module): name for name, module in model.named_modules()}


def _sources(graph: fx.Graph, model: nn.Module, norms: Sequence[nn.Module]) -> dict[str, Source]:
    """Each norm's source in a graph of torch.fx."""
    modules, first = dict(model.named_modules(remove_duplicate=False)), _first_names(model)
    known = {id(norm) for norm in norms}
    called = {n: modules[str(n.target)] for n in graph.nodes if n.op == "call_module"}
    calls = Counter(id(module) for module in called.values())
    read = {str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"}

    def source(user: fx.Node) -> Source:
        n_calls = calls[id(called[user])]
        if n_calls > 1:
            return Source(None, f"is called {n_calls} times a pass")
        given = user.args[0] if user.args else next(iter(user.kwargs.values()), None)
        while (
            isinstance(given, fx.Node)
            and given in called
            and _is_silent(called[given])
            and set(given.users) == {user}
            and given.args
        ):
            user, given = given, given.args[0]
        if not isinstance(given, fx.Node) or given not in called:
            return _follows(getattr(given, "name", "a constant"))
        name, n_calls = first[id(called[given])], calls[id(called[given])]
        return _alone(name, n_calls, seen=set(given.users) != {user}, read=name in read)

    return {first[id(module)]: source(n) for n, module in called.items() if id(module) in known}


def _follows(name: str) -> Source:
    return Source(None, f"follows {name}, not a convolution or linear layer")


def _alone(name: str, n_calls: int, *, seen: bool, read: bool) -> Source:
    """The layer as a source, unless its output or its weights serve something else too."""
    if seen:
        return Source(None, f"the output of {name} is used elsewhere too")
    if n_calls > 1:
        return Source(None, f"{name} is shared: it is called {n_calls} times a pass")
    return Source(None, f"the weights of {name} are used elsewhere too") if read else Source(name)


def _is_silent(module: nn.Module) -> bool:
    return isinstance(module, _SILENT) and not module.training


def _module_of(node: fx.Node) -> str | None:
    """Dotted name of the module call that a node of an exported program belongs to."""
    stack = node.meta.get("nn_module_stack")
    if node.op != "call_function" or not stack:
        return None
    # A second call of the same module has its number after an @.
    key, (name, _) = list(stack.items())[-1]
    return str(name) + ("@" + key.rpartition("@")[2] if "@" in key else "")


def _exported_sources(
    program: torch.export.ExportedProgram, model: nn.Module, norms: Sequence[nn.Module]
) -> dict[str, Source]:
    """Each norm's source in an exported program, whose nodes name the module they came from."""
    first = _first_names(model)
    owner = {n: first[id(m)] for n, m in model.named_modules(remove_duplicate=False)}
    signature = program.graph_signature
    tensors = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    inside: dict[str, set[fx.Node]] = {}
    calls: dict[str, set[str]] = {}
    for node in program.graph.nodes:
        if (where := _module_of(node)) is not None:
            plain = owner.get(where.partition("@")[0], where.partition("@")[0])
            inside.setdefault(plain, set()).add(node)
            calls.setdefault(plain, set()).add(where)

    def inputs(nodes: set[fx.Node]) -> set[fx.Node]:
        outside = {given for node in nodes for given in node.all_input_nodes} - nodes
        return {given for given in outside if given.name not in tensors}

    def source(norm: str) -> Source:
        if len(calls[norm]) > 1:
            return Source(None, f"is called {len(calls[norm])} times a pass")
        users = inside[norm]
        while len(given := inputs(users)) == 1:
            (node,) = given
            where = next((name for name, nodes in inside.items() if node in nodes), None)
            # A module with children computes more than its own formula.
            if where is None or any(True for _ in model.get_submodule(where).children()):
                return _follows(node.name)
            nodes = inside[where]
            weights = {w for n in nodes for w in n.all_input_nodes if w.name in tensors}
            found = _alone(
                where,
                len(calls[where]),
                seen=not set(node.users) <= users,
                read=any(not set(weight.users) <= nodes for weight in weights),
            )
            if found.layer is None or not _is_silent(model.get_submodule(where)):
                return found
            users = nodes
        return Source(None, "has no single input")

    return {first[id(norm)]: source(first[id(norm)]) for norm in norms if first[id(norm)] in inside}
