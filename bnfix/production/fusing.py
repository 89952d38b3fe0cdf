"""A network made fast for evaluation: what follows a live norm layer is done in the cache.

Layers of weight 0 go into the convolutions before them (`folding`). A live layer cannot, but what
follows it, the addition of a residual and the activation, can be done by its own kernel, which wins
back the reading that its look at the example costs; and where nobody else reads what a convolution
gave it, it writes over that, while it is in the cache. The result is for inference: it shares its
other tensors with the model that it was made of, and takes no part in training or surgery.
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnfix import guards, runtime
from bnfix._torch_private import tree_map
from bnfix.errors import ModelError
from bnfix.layers.kernels import (
    Activation,
    Finish,
    activation_of,
    evaluate,
    hardswish_,
    relu6_,
    silu_,
)
from bnfix.layers.norms import GeneralizedBatchNorm, GeneralizedBatchNormAct, generalized_norms
from bnfix.production.artifacts import outputs_of
from bnfix.production.dataflow import graph_of
from bnfix.production.folding import Folding, optimize_
from bnfix.production.prepacked import PrepackedConv, prepacked

#: Functions and methods of torch that change each value by itself, without further arguments.
_FUNCTIONS: dict[Any, Activation] = {
    F.relu: torch.relu_, torch.relu: torch.relu_, torch.relu_: torch.relu_, F.relu6: relu6_,
    F.silu: silu_, F.hardswish: hardswish_, "relu": torch.relu_, "relu_": torch.relu_,
}  # fmt: skip
_ADDITIONS = (operator.add, torch.add, "add")
#: Those that change their first operand, which others may look at too unless it is the norm's.
_IN_PLACE = (operator.iadd, "add_")
_CONVOLUTIONS = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d,
    nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
#: Largest difference of outputs, by the largest output where that is above 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Fusion:
    """What was made faster, and how.

    Args:
        folding: layers of weight 0 in the convolutions before them; ``None`` where the dataflow
            could not be followed.
        fused: dotted names of the live layers that do what follows them.
        overwriting: number of live layers that write over their input.
        live: number of live layers.
        prepacked: convolutions whose weights wait in the layout that the CPU computes with.
        channels_last: whether the network runs on channels last.
        difference: largest |output after - output before| on the example, relative to the largest
            output where that is above 1.
        notes: why something was not done.
    """

    folding: Folding | None
    fused: tuple[str, ...]
    overwriting: int
    live: int
    prepacked: int
    channels_last: bool
    difference: float
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """What was done, as a clause for reports."""
        n_folded = 0 if self.folding is None else len(self.folding.folded)
        parts = [
            f"{n_folded} norm layers folded into the layers before them",
            f"{len(self.fused)} of {self.live} live ones fused with what follows them, "
            f"{self.overwriting} written over their input",
            f"{self.prepacked} convolutions prepacked",
        ]
        layout = "channels last" if self.channels_last else "memory format as it was"
        notes = "".join(f"; {note.rstrip('.')}" for note in self.notes)
        return (
            f"evaluated on a faster copy ({', '.join(parts)}, {layout}{notes}), whose outputs "
            f"differ by at most {self.difference:.1e}"
        )


class FusedNorm(nn.Module):
    """A live norm layer in evaluation, the addition of a residual, and an activation.

    Args:
        norm: the layer; its tensors stay its own.
        activation: changes a tensor in place; ``None`` for none.
        overwrite: whether the output may take the input's memory.
    """

    def __init__(
        self, norm: GeneralizedBatchNorm, activation: Activation | None, *, overwrite: bool = False
    ) -> None:
        super().__init__()
        self.norm, self._activation, self.overwrite = norm, activation, overwrite

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalize, add, activate."""
        if self.norm.training or (torch.is_grad_enabled() and input.requires_grad):
            raise ModelError("fused network: it is for inference. Train the model it was made of.")
        terms = self.norm._terms()
        if residual is None or (residual.shape, residual.dtype) == (input.shape, input.dtype):
            finish = Finish(residual, self._activation)
            return evaluate(input, terms, finish, overwrite=self.overwrite)
        output = evaluate(input, terms, overwrite=self.overwrite) + residual
        if self._activation is not None:
            self._activation(output)
        return output


def fused(
    model: nn.Module,
    example: Any,
    *,
    channels_last: bool | None = None,
    prepack: bool | None = None,
) -> tuple[nn.Module, Fusion]:
    """Make a copy of a model that evaluates faster, and check that it gives the same outputs."""
    if any(m.training for m in model.modules()):
        raise ModelError("fused network: the model is in training mode. Call model.eval() first.")
    before = _outputs(model, example)
    net, notes = copy.deepcopy(model), []
    device = runtime.device_of(model)
    # Where the user states how the model is called, only that knows what the inputs are.
    x = None if runtime.has_forward(model) else runtime.unpack(example)[0]
    folding = None
    try:
        folding = optimize_(net, _own(x).to(device) if isinstance(x, Tensor) else None)
    except ModelError as error:
        notes.append(str(error))
    live = [layer for _, layer in generalized_norms(net) if layer.live]
    names: tuple[str, ...] = ()
    overwriting = 0
    if live:
        try:
            net, names = _fused(net)
            overwriting = sum(isinstance(m, FusedNorm) and m.overwrite for m in net.modules())
        except ModelError as error:
            notes.append(f"what follows the live layers is not done by them: {error}")
    if channels_last is None:
        channels_last = isinstance(x, Tensor) and x.ndim == 4 and device.type == "cpu"
    n_prepacked = 0
    if channels_last if prepack is None else prepack:
        n_prepacked = _prepack_(net, example)
    if channels_last:
        net = _ChannelsLast(net.to(memory_format=torch.channels_last)).eval()
    difference = 0.0
    for old, new in zip(before, _outputs(net, example), strict=True):
        difference = max(difference, float((new - old).abs().max() / old.abs().max().clamp_min(1)))
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if not difference <= _TOLERANCE.get(dtype, 1e-3):
        raise ModelError(
            f"fused network: its outputs differ by {difference:.2g} from the model's. Evaluate "
            "without --fast; look at the statistics with `bnfix inspect`."
        )
    return net, Fusion(
        folding=folding,
        fused=names,
        overwriting=overwriting,
        live=len(live),
        prepacked=n_prepacked,
        channels_last=channels_last,
        difference=difference,
        notes=tuple(notes),
    )


class _ChannelsLast(nn.Module):
    """A network whose inputs come with their channels last in memory."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        if runtime.has_forward(net):
            runtime.set_forward_(self, net.__dict__[runtime.FORWARD])

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x, *args, **kwargs)


def _prepack_(net: nn.Module, example: Any) -> int:
    """Prepack the convolutions that the example reaches; how many there were."""
    found: dict[int, tuple[nn.Module, PrepackedConv]] = {}

    def hook(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        made = prepacked(conv, inputs[0].detach()) if len(inputs) == 1 else None
        if made is not None:
            found[id(conv)] = conv, made

    convs = [module for module in net.modules() if type(module) is nn.Conv2d]
    plain = [c for c in convs if not (c._forward_hooks or c._forward_pre_hooks)]
    with guards.hooks() as handles:
        handles += [conv.register_forward_pre_hook(hook) for conv in plain]
        _outputs(net, example)
    for conv, made in found.values():
        guards.exchange_(conv, made)
    return len(found)


def _outputs(model: nn.Module, example: Any) -> list[Tensor]:
    with guards.inference(model):
        output = runtime.run(model, _own(example), runtime.device_of(model))
    return [t.double() for t in outputs_of(output).values() if t.is_floating_point() and t.numel()]


def _own(example: Any) -> Any:
    """A copy of an example, since some models write into their inputs."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, example)


def _fused(net: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network as a graph in which live layers do what follows them."""
    layers = dict(generalized_norms(net))
    graph = graph_of(net, list(layers.values()))
    modules = dict(net.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(n.target)]) for n in graph.nodes if n.op == "call_module")
    first = {id(layer): name for name, layer in layers.items()}
    done: list[str] = []
    fusions: dict[str, FusedNorm] = {}
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, GeneralizedBatchNorm) or not layer.live or calls[id(layer)] > 1:
            continue
        if len(node.args) != 1 or node.kwargs or _hooked(layer):
            continue
        residual, activation, last = _what_follows(node, layer, modules)
        overwrite = _gives_what_nobody_else_reads(node.args[0], modules)
        if last is None:
            # An activation of its own that is not known stays the layer's.
            if not overwrite or isinstance(layer, GeneralizedBatchNormAct):
                continue
            last = node
        else:
            done.append(first[id(layer)])
        name = f"fused_{len(fusions)}"
        fusions[name] = modules[name] = FusedNorm(layer, activation, overwrite=overwrite).eval()
        with graph.inserting_after(last):
            given = (node.args[0],) if residual is None else (node.args[0], residual)
            new = graph.call_module(name, given)
        last.replace_all_uses_with(new)
        # These alone: what else seems unused may change a tensor in place.
        while last is not node:
            gone, last = last, next(n for n in last.all_input_nodes if n is not residual)
            graph.erase_node(gone)
        graph.erase_node(node)
    for name, fusion in fusions.items():
        net.add_module(name, fusion)
    graph.lint()
    made = fx.GraphModule(net, graph).eval()
    made.delete_all_unused_submodules()
    for key, value in net.__dict__.items():
        if key == runtime.FORWARD:
            runtime.set_forward_(made, value)
    return made, tuple(done)


def _what_follows(
    node: fx.Node, layer: GeneralizedBatchNorm, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, Activation | None, fx.Node | None]:
    """The residual, the activation and the last node of what one layer can do."""
    last, residual = node, None
    if isinstance(layer, GeneralizedBatchNormAct):
        own = activation_of(layer.act)
        silent = isinstance(layer.drop, nn.Identity)
        return (None, own, node) if own is not None and silent else (None, None, None)
    added = _only_user(node)
    if added is not None and _adds(added, node):
        others = [given for given in added.args if given is not node]
        if len(others) == 1 and isinstance(others[0], fx.Node):
            residual, last = others[0], added
    activated = _only_user(last)
    activation = None if activated is None else _activation(activated, modules)
    if activation is not None:
        last = cast(fx.Node, activated)
    return (residual, activation, last) if last is not node else (None, None, None)


def _gives_what_nobody_else_reads(node: object, modules: dict[str, nn.Module]) -> bool:
    """Whether it is a convolution, which answers in memory of its own, with one reader."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    module = modules[str(node.target)]
    return type(module) in _CONVOLUTIONS and not _hooked(module)


def _adds(node: fx.Node, norm: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    return node.target in _ADDITIONS or (node.target in _IN_PLACE and node.args[0] is norm)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if _hooked(module) else activation_of(module)
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None
    return None


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)
