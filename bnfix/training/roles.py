"""The role of each norm layer in the residual branches of a network, found from its graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx, nn

from bnfix.core.errors import ConfigError, ModelError, one_line
from bnfix.core.settings import FinetuneRecipe
from bnfix.core.torch_private import ConvBase
from bnfix.models.graph import graph_of
from bnfix.norm.sites import find_norms

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


def decays_of(
    model: nn.Module, layers: Sequence[nn.Module], recipe: FinetuneRecipe
) -> list[tuple[float, list[nn.Module]]]:
    """The decay of each role and its layers."""
    decays = recipe.norm_decays
    if decays.keys() <= {"other"}:
        return [(decays.get("other", 0.0), list(layers))]
    found = norm_roles(model)
    return [
        (decay, [m for m in layers if found.get(m, "other") in (role, *_unnamed(role, decays))])
        for role, decay in decays.items()
    ]


def _unnamed(role: str, decays: dict[str, float]) -> set[str]:
    """The roles that count as others, since they have no decay of their own."""
    return {"last", "shortcut", "stem"} - decays.keys() if role == "other" else set()


def norm_roles(model: nn.Module) -> dict[nn.Module, str]:
    """Each norm layer that is the ``last`` of a residual branch, its ``shortcut`` or the ``stem``.

    A residual branch ends in an addition. The side with fewer convolutions and linear layers since
    the two parted is the shortcut, which has one at most. On each side the layer meant is the one
    whose output is added, seen through modules with one input, and through the product with a gate.
    A stem has no norm layer before it.
    """
    norms = {site.module for site in find_norms(model)}
    try:
        graph = graph_of(model, list(norms))
    except ModelError as error:
        raise ConfigError(
            f"--norm-decay: roles need the network's graph. {one_line(error)} Give one number.",
            name="norm_decay",
        ) from error
    return _Roles(graph, model, norms).found


class _Roles:
    def __init__(self, graph: fx.Graph, model: nn.Module, norms: set[nn.Module]) -> None:
        self._module = {
            n: model.get_submodule(str(n.target)) for n in graph.nodes if n.op == "call_module"
        }
        self._norms = norms
        #: All nodes that a node depends on, itself included.
        self._before: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            given = [self._before[n] for n in node.all_input_nodes]
            self._before[node] = {node}.union(*given)
        self.found: dict[nn.Module, str] = {}
        for node in graph.nodes:
            if node.target in _ADDS and len(node.all_input_nodes) == 2:
                self._name(*node.all_input_nodes)
        for node, module in self._module.items():
            before = self._before[node] - {node}
            if module in norms and not any(self._module.get(n) in norms for n in before):
                self.found.setdefault(module, "stem")

    def _name(self, *sides: fx.Node) -> None:
        """Give the two sides of an addition their roles."""
        first, second = sides
        counts = [
            sum(
                isinstance(self._module.get(n), ConvBase | nn.Linear)
                for n in self._before[side] - self._before[other]
            )
            for side, other in ((first, second), (second, first))
        ]
        if min(counts) > 1 or counts[0] == counts[1]:
            return  # two branches, none of which is a shortcut
        for side, count in zip(sides, counts, strict=True):
            layer = self._last_norm(side)
            if layer is not None:
                self.found.setdefault(layer, "shortcut" if count == min(counts) else "last")

    def _last_norm(self, node: fx.Node) -> nn.Module | None:
        """The norm layer whose output alone a node has, if there is one."""
        if len(node.users) > 1:
            return None  # an identity shortcut from where the branch begins
        while (module := self._module.get(node)) not in self._norms:
            given = node.all_input_nodes
            if node.target in _PRODUCTS and len(given) == 2:
                one, two = given
                trunk = one if one in self._before[two] else two
                if trunk is one or two in self._before[one]:
                    node = trunk
                    continue
            alone = len(given) == 1 and len(given[0].users) == 1
            if not alone or isinstance(module, ConvBase | nn.Linear):
                return None
            (node,) = given
        return module
