"""Trained parameters: their groups, the head, and each norm layer's decay by its role."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ConfigError, ModelError, one_line
from bnfix.core.options import one_of, require
from bnfix.core.settings import TRAINED, FinetuneRecipe
from bnfix.core.torch_private import ConvBase
from bnfix.metrics.evaluate import first_look
from bnfix.models.graph import graph_of
from bnfix.norm.sites import find_norms

#: Layers that can be the head of a network with an output at every position.
CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
#: Largest error of logits after the head was changed, relative to the largest logit.
_ROUNDING = 1e-4
_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_PRODUCTS = {operator.mul, operator.imul, torch.mul, "mul", "mul_"}


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    norm_decay: float = 0.0,
    train: str = "all",
    head: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters to train into groups for any torch optimizer.

    The group ``norms`` holds gamma and beta of the norm layers, with ``weight_decay`` 0. Torch can
    only decay toward 0, so their decay is a separate step, `decay_norms_`; the group carries its
    ``norm_decay``. The group ``others`` holds all other parameters. No group contains frozen norm
    layers, tied parameters occur once, and an empty group is left out.

    Args:
        model: any module; ``requires_grad`` is neither read nor set.
        lr: learning rate of both groups.
        weight_decay: weight decay of ``others``.
        norm_decay: decay to record in ``norms`` as ``norm_decay``; optimizers ignore it.
        train: ``norms``, ``head``, ``norms+head``, ``last-norm+head`` (only the last norm layer
            defined, and the head) or ``all``.
        head: the head; by default the last linear layer or 1x1 convolution defined.

    Returns:
        One or two groups, ``norms`` first.

    Raises:
        ConfigError: if ``train`` is unknown.
        ModelError: if there is nothing to train, or no head.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(net, lr=0.01, weight_decay=0.1, norm_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> optimizer.step()
        >>> decay_norms_(net, optimizer.param_groups[0]["lr"], 0.1, "identity")
    """
    one_of(train, TRAINED, "--train")
    sites = find_norms(model)
    own = {id(p): (p, s) for s in sites for p in s.module.parameters(recurse=False)}
    free = [(p, site) for p, site in own.values() if not site.frozen and train != "head"]
    if train == "last-norm+head":
        free = [(p, site) for p, site in free if site is free[-1][1]]
    norms = [p for p, _ in free]
    if train == "all":
        others = [p for p in model.parameters() if id(p) not in own]
    elif train == "norms":
        others = []
    else:
        others = list((head or head_of(list(model.modules()), None)).parameters())
    if not norms and not others:
        raise ModelError(f"--train {train}: the model has no such parameters. Use --train all.")
    of_norms = {"weight_decay": 0.0, "norm_decay": norm_decay}
    groups: list[dict[str, Any]] = [
        {"name": "norms", "params": norms, "lr": lr, **of_norms},
        {"name": "others", "params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def decay_norms_(
    model: nn.Module | Iterable[nn.Module], rate: float, norm_decay: float, target: str = "identity"
) -> None:
    """Decay gamma and beta of norm layers by one decoupled step; call it after the optimizer step.

    gamma <- t + (gamma - t)(1 - rate w), t = 1 for ``identity`` and 0 for ``zero``, w the decay;
    beta <- beta (1 - rate w), and so for centring and scaling gates.
    Over steps s: gamma_T - t = (gamma_0 - t) prod_s (1 - rate_s w).

    Args:
        model: a model, whose norm layers decay except frozen ones; or an iterable of the layers.
        rate: the learning rate of the step.
        norm_decay: the decay w.
        target: ``identity``, ``zero``, or ``none``, which changes nothing.

    Raises:
        ConfigError: if the target is unknown, or if the step would overshoot it.

    Changes:
        ``weight`` and ``bias`` of the layers, first two rows of ``gates``; tied parameters once.

    Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization",
    ICLR 2020, section 3.4. Differs: decoupled from the gradient, as in AdamW.
    """
    one_of(target, ("none", "zero", "identity"), "--norm-decay-target")
    beyond = f"--norm-decay: {norm_decay:g} at a rate of {rate:g} overshoots its target."
    ok = 0 <= rate * norm_decay <= 1
    require(ok, f"{beyond} Expected a product from 0 to 1.", "norm_decay")
    if target == "none" or rate * norm_decay == 0:
        return
    done: set[int] = set()
    for layer in norm_layers(model) if isinstance(model, nn.Module) else model:
        for p, goal in ((layer.weight, float(target == "identity")), (layer.bias, 0.0)):
            if isinstance(p, nn.Parameter) and id(p) not in done:
                done.add(id(p))
                p.sub_(goal).mul_(1 - rate * norm_decay).add_(goal)
        gates: Any = getattr(layer, "gates", None)
        if gates is not None and id(gates) not in done:
            done.add(id(gates))
            gates[:2].mul_(1 - rate * norm_decay)


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """List the norm layers that are not frozen."""
    return [site.module for site in find_norms(model) if not site.frozen]


# --- the head: the layer that gives the logits ---


def head_of(
    modules: Sequence[nn.Module],
    n_classes: int | None,
    what: str = "fine-tuning",
    *,
    dense: bool = False,
) -> nn.Module:
    """Find the last linear layer or convolution (1x1, unless dense) with ``n_classes`` outputs."""
    for module in reversed(modules):
        pointwise = isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}
        n_outputs = None
        if isinstance(module, nn.Linear):
            n_outputs = module.out_features
        elif isinstance(module, CONVOLUTIONS) and (dense or pointwise):
            n_outputs = module.out_channels
        if n_outputs is not None and n_classes in (None, n_outputs):
            return module
    fitting = "" if n_classes is None else f" with {n_classes} outputs, as many as the logits"
    tuned = what == "fine-tuning"
    where, todo = ("--train head", " Use --train norms or all.") if tuned else (what, "")
    raise ModelError(f"{where}: no linear layer or 1x1 convolution{fitting}.{todo}")


def find_head(
    what: str, model: nn.Module, batches: Iterable[Any], forward: runtime.Forward | None = None
) -> nn.Module:
    """Run one batch to find the head; ``what`` names the purpose in messages."""
    modules = {
        name: module for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, *CONVOLUTIONS))
    }  # fmt: skip
    # The first rank with a batch decides for all ranks.
    (calls, (n_outputs, dense)), *_ = first_look(what, model, modules, batches, forward, _form)
    return head_of([modules[name] for name, _ in calls], n_outputs, what, dense=dense)


def _form(output: Any) -> tuple[int | None, bool]:
    """The number of outputs per position, if it is clear, and whether there are positions."""
    for read in (runtime.output_of, runtime.logits_of):
        with suppress(ModelError):
            found = read(output)
            return (found.shape[1] if found.ndim > 1 else 1), found.ndim > 2
    return None, True


@torch.no_grad()
def move_logits_(
    model: nn.Module, head: Any, batch: Any, scale: float, shift: Tensor | None = None
) -> None:
    """Turn the logits z into scale z + shift by the head's weights and bias, or change nothing.

    With weights W and bias b the head gets scale W and scale b + shift. The new logits are checked
    on the batch.

    Raises:
        ModelError: if there is no bias to shift, or if the logits do not follow: a later operation
            loses scale or shift, or the head's weights are also used elsewhere.
    """
    if shift is not None and head.bias is None:
        raise ModelError("the head has no bias for the shift.")
    before, wanted = guards.Snapshot(head), scale * _logits(model, batch)
    if shift is not None:
        wanted += shift.to(wanted)
    for tensor in (head.weight, head.bias):
        if tensor is not None:
            tensor.mul_(scale)
    if shift is not None:
        head.bias.add_(shift.to(head.bias))
    error = (_logits(model, batch) - wanted).abs().max()
    if not error <= _ROUNDING * wanted.abs().max():
        before.restore_()
        raise ModelError(
            "the logits do not follow their last layer: another operation comes after it, or its "
            "weights are also used elsewhere."
        )


def _logits(model: nn.Module, batch: Any) -> Tensor:
    with guards.inference(model):
        return runtime.logits_of(runtime.run(model, batch, runtime.device_of(model))).double()


# --- roles of norm layers in residual branches, found in the graph ---


def decays_of(
    model: nn.Module, layers: Sequence[nn.Module], recipe: FinetuneRecipe
) -> list[tuple[float, list[nn.Module]]]:
    """The decay of each role, and its layers."""
    decays = recipe.norm_decays
    if decays.keys() <= {"other"}:
        return [(decays.get("other", 0.0), list(layers))]
    # Layers whose role has no decay of its own count as others.
    found = {m: role for m, role in norm_roles(model).items() if role in decays}
    return [
        (decay, [m for m in layers if found.get(m, "other") == role])
        for role, decay in decays.items()
    ]


def norm_roles(model: nn.Module) -> dict[nn.Module, str]:
    """Each norm layer that is the ``last`` of a residual branch, its ``shortcut`` or the ``stem``.

    A residual branch ends in an addition. The shortcut is the side with fewer convolutions and
    linear layers since the split, at most one. On each side the role belongs to the norm layer
    whose output is added, directly or through modules with one input and products with a gate. A
    stem has no norm layer before it.
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
        #: All nodes that a node depends on, including itself.
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
        """Assign roles to the two sides of an addition."""
        first, second = sides
        counts = [
            sum(
                isinstance(self._module.get(n), ConvBase | nn.Linear)
                for n in self._before[side] - self._before[other]
            )
            for side, other in ((first, second), (second, first))
        ]
        if min(counts) > 1 or counts[0] == counts[1]:
            return  # two branches without a shortcut
        for side, count in zip(sides, counts, strict=True):
            layer = self._last_norm(side)
            if layer is not None:
                self.found.setdefault(layer, "shortcut" if count == min(counts) else "last")

    def _last_norm(self, node: fx.Node) -> nn.Module | None:
        """The norm layer whose output alone reaches a node, if there is one."""
        if len(node.users) > 1:
            return None  # an identity shortcut from the start of the branch
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
