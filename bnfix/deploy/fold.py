"""Fold norm layers of weight 0 into the convolutions before them.

A norm layer that ignores the example is a constant scale and shift per channel. The convolution or
linear layer before it can absorb both. With s = gamma / sqrt(var + eps):

    s (W * x + b - mean) + beta  =  (s W) * x + (s (b - mean) + beta)

The new weights are computed in float64 and rounded once. A layer is folded only if the dataflow
proves that nothing else reads the convolution's output, and if its outputs agree before and after.
"""

from __future__ import annotations

import copy
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from bnfix.core import guards, runtime
from bnfix.core.errors import ModelError
from bnfix.core.torch_private import ConvBase, ConvTransposeBase, tree_map
from bnfix.models.graph import export_program, graph_or_reason, hooked
from bnfix.norm.layer import GeneralizedBatchNorm, generalized_norms
from bnfix.norm.moments import over_channel_groups
from bnfix.norm.sites import NormSite, find_norms, is_timm_act

CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
#: timm's convolution with TensorFlow padding, recognized by name, because timm is optional.
_TIMM_SAME = "Conv2dSame"
#: Modules that return their input unchanged in evaluation mode.
_SILENT = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
#: Largest allowed difference of a fold, relative to the largest output if that is above 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
#: The result of `_source` for a norm layer without calls.
_UNREACHED = "", "is not called on the way from input to output"


@dataclass(frozen=True)
class Fold:
    """A norm layer that is folded into the layer before it."""

    norm: str
    layer: str
    kind: str  # class name of the layer
    difference: float  # largest |after - before|, see `relative_change`


@dataclass(frozen=True)
class Folding:
    """The folded norm layers, and the reasons for the others."""

    folded: tuple[Fold, ...]
    left: Mapping[str, str]  # dotted name to reason
    traced_by: str  # "torch.fx" or "torch.export", or "nothing" without norm layers

    @property
    def checked_on(self) -> str:
        """The kind of inputs used to check each fold."""
        return "nothing" if self.traced_by == "nothing" else "example"


@dataclass(frozen=True)
class _Candidate:
    """A fold to try."""

    norm: NormSite
    name: str
    layer: nn.Module
    new: nn.Module
    after: nn.Module  # takes the norm's place

    @property
    def tolerance(self) -> float:
        return _TOLERANCE.get(_weight(self.layer).dtype, 1e-4)

    def difference(self, x: Tensor) -> float:
        """The change of the outputs for one input of the layer."""
        # The class's methods, not module calls: hooks must not fire again.
        before = self.norm.module(type(self.layer).forward(self.layer, x))
        return relative_change(before, self.after(type(self.new).forward(self.new, x)))


def optimize_(model: nn.Module, example: Any) -> Folding:
    """Fold every norm layer that ignores the example into the layer before it.

    It folds a layer of weight 0 (or a stock layer) if its input is the output of a convolution (1,
    2 or 3 axes, transposed, grouped, depthwise) or a linear layer, called once and read by nothing
    else. All other layers stay and are listed with a reason. Each fold is checked on its own
    activations for the example, a batch in any form that the model takes. If the whole model's
    outputs change, everything is undone and a ModelError is raised.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
        >>> optimize_(net, torch.ones(2, 3, 8, 8)).folded[0].layer
        '0'
    """
    sites = find_norms(model)
    if any(site.module.training for site in sites):
        raise ModelError(
            "folding: the model is in training mode, where norm layers are not constant. Call "
            "model.eval() first."
        )
    if not sites:
        return Folding((), {}, traced_by="nothing")
    for _, norm in generalized_norms(model):
        norm.gates = norm.gates if norm.live else None  # inactive gates would hide the dataflow
    # With a user's forward function, only that function knows the inputs.
    x = None if runtime.has_forward(model) else runtime.unpack(example)[0]
    x = x.to(runtime.device_of(model)) if isinstance(x, Tensor) else None
    sources, traced_by = _sources(model, [site.module for site in sites], x)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    tried = {
        site.name: _candidate(site, sources.get(site.name, _UNREACHED), model, owners)
        for site in sites
    }
    candidates = [one for one in tried.values() if isinstance(one, _Candidate)]
    differences = _differences(model, candidates, example)
    accepted, left, folded = [], dict[str, str](), []
    for name, one in tried.items():
        found = differences.get(name, "is not reached by the example")
        if isinstance(one, str) or isinstance(found, str):
            left[name] = one if isinstance(one, str) else str(found)
        elif not found <= one.tolerance:
            change = f"would change by {found:.2g}" if found < torch.inf else "are not finite"
            left[name] = f"its outputs {change}"
        else:
            accepted.append(one)
            folded.append(Fold(name, one.name, type(one.layer).__name__, found))
    _apply_(model, accepted, example)
    return Folding(tuple(folded), left, traced_by=traced_by)


def _sources(
    model: nn.Module, norms: Sequence[nn.Module], example: Tensor | None
) -> tuple[dict[str, tuple[str, str]], str]:
    """The `_source` of each norm layer by dotted name, and the tool that traced the model.

    torch.fx traces for all inputs at once. If it fails (for example, on a branch that depends on a
    size) and there is an example, torch.export follows the path for inputs of that size.
    """
    graph = graph_or_reason(model, norms)
    if isinstance(graph, fx.Graph):
        calls, tool = _traced_calls(graph, model), "torch.fx"
    elif example is None:
        raise ModelError(
            f"folding: torch.fx cannot trace the model ({graph}), and torch.export does not take "
            "inputs of this form. Leave its norm layers as they are."
        )
    else:
        try:
            calls, tool = _exported_calls(export_program(model, example), model), "torch.export"
        except ModelError as error:
            raise ModelError(
                f"folding: neither torch.fx ({graph}) nor torch.export ({error}) can trace the "
                "model."
            ) from error
    known = set(norms)
    names = {name for name, module in model.named_modules() if module in known}
    sources = {n: _source(call, calls, model) for call, n in calls.layer.items() if n in names}
    return sources, tool


@dataclass(frozen=True)
class _Calls:
    """The calls of a model's modules in a graph, each with a unique name."""

    nodes: dict[str, set[fx.Node]]  # one node per call in torch.fx, several in an exported program
    layer: dict[str, str]  # first dotted name of the called module
    tensors: set[fx.Node]  # nodes for parameters and buffers
    read: set[str]  # modules whose weights are also read outside the call


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
    """The calls in an exported program; each node names its module."""
    first, signature = _first_names(model), program.graph_signature
    stored = {*signature.inputs_to_parameters, *signature.inputs_to_buffers}
    found = _Calls({}, {}, {n for n in program.graph.nodes if n.name in stored}, set())
    for node in program.graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if node.op == "call_function" and stack:
            # The key of a second call of the same module has the call's number after an @.
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
    """The first name of each module, by every dotted name of the module."""
    first = {module: name for name, module in model.named_modules()}
    return {name: first[m] for name, m in model.named_modules(remove_duplicate=False)}


def _source(call: str, calls: _Calls, model: nn.Module) -> tuple[str, str]:
    """The module whose output is the only input of the norm layer in a call, or the problem.

    Modules that do nothing in evaluation mode are skipped.
    """
    n_calls = Counter(calls.layer.values())
    if (n := n_calls[calls.layer[call]]) > 1:
        return "", f"is called {n} times per pass"
    while True:
        users = calls.nodes[call]
        given = {node for user in users for node in user.all_input_nodes} - users - calls.tensors
        if len(given) != 1:
            return "", "has no single input"
        (node,) = given
        call = next((name for name, nodes in calls.nodes.items() if node in nodes), "")
        name = calls.layer.get(call, "")
        # A module with children can compute more than its own formula.
        if not call or any(True for _ in model.get_submodule(name).children()):
            return "", f"follows {node.name}, not a convolution or linear layer"
        module = model.get_submodule(name)
        if not set(node.users) <= users:
            return "", f"the output of {name} is also used elsewhere"
        if isinstance(module, _SILENT) and not module.training:
            continue
        if (n := n_calls[name]) > 1:
            return "", f"{name} is shared: it is called {n} times per pass"
        if name in calls.read:
            return "", f"the weights of {name} are also used elsewhere"
        return name, ""


def relative_change(before: Tensor, after: Tensor) -> float:
    """Largest |after - before|, relative to the largest |before| if that is above 1."""
    return float((after - before).abs().max() / before.abs().max().clamp_min(1.0))


def outputs_on(model: nn.Module, example: Any) -> list[Tensor]:
    """The floating-point tensors of a model's output, in float64."""
    # A copy of the example, because some models write to their inputs.
    own = tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)
    with guards.inference(model):
        found = runtime.tensors_in(runtime.run(model, own, runtime.device_of(model)))
    return [t.double() for t in found if t.is_floating_point() and t.numel()]


def _weight(layer: nn.Module) -> Tensor:
    return cast(Tensor, layer.weight)


def _candidate(
    site: NormSite, source: tuple[str, str], model: nn.Module, owners: Counter[int]
) -> _Candidate | str:
    """A fold to try, or the reason against it."""
    norm = site.module
    if isinstance(norm, GeneralizedBatchNorm) and norm.live:
        if not norm.weighs:
            return "has gates that depend on the example"
        looked_at = "batch" if norm.uses_batch else "example"
        return f"weighs the {looked_at} ({looked_at} weight above 0)"
    if site.problem or not site.has_statistics:
        return site.problem or "keeps no population statistics"
    if hooked(norm):
        return "has hooks"
    name, problem = source
    layer = model.get_submodule(name)
    if problem := problem or _layer_problem(layer, name, owners):
        return problem
    mean, var = (cast(Tensor, getattr(norm, f"running_{m}")).double() for m in ("mean", "var"))
    if isinstance(norm, GeneralizedBatchNorm):
        mean, var = over_channel_groups(mean, var, norm.channel_groups)
    if not bool(mean.isfinite().all() and (var + cast(float, norm.eps)).rsqrt().isfinite().all()):
        return "its statistics are not finite"
    n_outputs = getattr(layer, "out_channels", None) or layer.out_features
    if len(mean) != n_outputs:
        return f"has {len(mean)} channels, {name} gives {n_outputs}"
    new = _folded(layer, norm, mean, var)
    if not all(bool(p.isfinite().all()) for p in new.parameters(recurse=False)):
        return f"the folded weights do not fit into {_weight(layer).dtype}"
    after: nn.Module = nn.Identity()
    if is_timm_act(norm) or hasattr(norm, "act") or hasattr(norm, "drop"):
        # The part of timm's BatchNormAct2d after normalization; the children keep their names.
        rest = {name: getattr(norm, name, None) or nn.Identity() for name in ("drop", "act")}
        after = nn.Sequential(OrderedDict(rest))
    return _Candidate(norm=site, name=name, layer=layer, new=new, after=after.eval())


def _layer_problem(layer: nn.Module, name: str, owners: Counter[int]) -> str:
    """The reason why a norm cannot be folded into a layer; empty if it can."""
    kind = type(layer)
    is_same = kind.__name__ == _TIMM_SAME and kind.__module__.startswith("timm.")
    if kind not in (*CONVOLUTIONS, nn.Linear) and not is_same:
        # A subclass may override forward, so only the known classes guarantee the arithmetic.
        if isinstance(layer, ConvBase | nn.Linear):
            return f"{name} is a {kind.__name__}, which may do more than {kind.__mro__[1].__name__}"
        return f"follows {name} ({kind.__name__}), not a convolution or linear layer"
    if hooked(layer) or "forward" in vars(layer):
        return f"{name} has hooks or its own forward"
    if any(owners[id(p)] > 1 for p in layer._parameters.values() if p is not None):
        return f"{name} shares its weights with another layer"
    return ""


@torch.no_grad()
def _folded(layer: nn.Module, norm: nn.Module, mean: Tensor, var: Tensor) -> nn.Module:
    """A copy of a layer with the following norm folded in."""
    weight = _weight(layer)
    wide = weight.double()
    n = layer.groups if isinstance(layer, ConvTransposeBase) else 0
    if n:
        # (in, out / groups, ...): a group's outputs are along axis 1 of its block of inputs.
        wide = wide.reshape(n, -1, *wide.shape[1:]).transpose(1, 2).flatten(0, 1)
    bias, gamma, beta = (
        None if t is None else cast(Tensor, t).detach().double()
        for t in (layer.bias, getattr(norm, "weight", None), getattr(norm, "bias", None))
    )
    wide, offset = fuse_conv_bn_weights(wide, bias, mean, var, cast(float, norm.eps), gamma, beta)
    if n:
        wide = wide.reshape(n, -1, *wide.shape[1:]).transpose(1, 2).flatten(0, 1)
    new = copy.copy(layer)
    new.__dict__["_parameters"] = {
        name: nn.Parameter(value.to(weight.dtype), requires_grad=weight.requires_grad)
        for name, value in (("weight", wide), ("bias", offset))
    }
    return new


def _differences(
    model: nn.Module, candidates: Sequence[_Candidate], example: Any
) -> dict[str, float | str]:
    """The output change of each fold on its own activations, or a problem, by norm layer."""
    found: dict[str, float | str] = {}

    def look(one: _Candidate, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0] if inputs else torch.empty(0)
        if not x.numel():
            return
        if x.dim() == (2 if isinstance(layer, nn.Linear) else _weight(layer).dim()):
            found[one.norm.name] = one.difference(x)
        else:
            found[one.norm.name] = f"{one.name} gives {x.dim()} axes, the last are not channels"

    with guards.hooks() as handles:
        for one in candidates:
            handles.append(one.layer.register_forward_pre_hook(partial(look, one)))
        outputs_on(model, example)
    return found


def _apply_(model: nn.Module, accepted: list[_Candidate], example: Any) -> None:
    """Fold, compare the whole model's outputs on the example, and undo if they differ."""
    if not accepted:
        return
    before = outputs_on(model, example)
    own = [dict(one.layer._parameters) for one in accepted]
    for one in accepted:
        one.layer._parameters.update(one.new._parameters)
        guards.exchange_(one.norm.module, one.after)
    pairs = zip(before, outputs_on(model, example), strict=True)
    # Each fold is within its tolerance; in the whole model, several differences can add up.
    limit = 10 * max(one.tolerance for one in accepted)
    if all(relative_change(old, new) <= limit for old, new in pairs):
        return
    for one, parameters in zip(accepted, own, strict=True):
        one.layer._parameters.update(parameters)
        guards.exchange_(one.norm.module, one.after)
    raise ModelError(
        "folding: each layer keeps its outputs, but the whole model's outputs change or are not "
        "finite. Nothing was folded. Check the statistics with `bnfix inspect`."
    )
