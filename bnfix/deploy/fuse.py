"""A copy of a network that evaluates faster, for `eval --fast`.

Layers of weight 0 are folded into the convolutions before them (`fold`). A live layer cannot be
folded, because it must read its input for the example's statistics. Its kernel instead performs the
following residual addition and activation, and saves their reads. If nothing else reads a
convolution's output, the kernel overwrites that output while it is still in the cache. On CPUs,
convolutions use channels-last inputs and prepacked weights. The copy is for inference only: it
shares tensors with its original and cannot be trained.
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

from bnfix.core import guards, masks, runtime
from bnfix.core.errors import ModelError
from bnfix.core.torch_private import packed_convolution, packed_weight
from bnfix.deploy.fold import CONVOLUTIONS, Folding, optimize_, outputs_on, relative_change
from bnfix.models.graph import graph_of, hooked
from bnfix.norm.kernels import (
    Activation,
    Finish,
    activation_of,
    evaluate,
    hardswish_,
    relu6_,
    silu_,
)
from bnfix.norm.layer import GeneralizedBatchNorm, GeneralizedBatchNormAct, generalized_norms
from bnfix.norm.mixture import normalized

#: Elementwise functions and methods of torch without further arguments.
_FUNCTIONS: dict[Any, Activation] = {
    F.relu: torch.relu_, torch.relu: torch.relu_, torch.relu_: torch.relu_, F.relu6: relu6_,
    F.silu: silu_, F.hardswish: hardswish_, "relu": torch.relu_, "relu_": torch.relu_,
}  # fmt: skip
_ADDITIONS = (operator.add, torch.add, "add")
#: These change their first operand; it is safe only if that is the norm's output.
_IN_PLACE = (operator.iadd, "add_")
#: Largest allowed difference of outputs, relative to the largest output if that is above 1.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}
#: Errors for an operator that this torch lacks, or that does not support a convolution.
_FAILURES = (RuntimeError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True)
class Fusion:
    """The optimizations of a network."""

    folding: Folding | None  # None if the dataflow could not be traced
    fused: tuple[str, ...]  # live layers that also perform the operations after them
    overwriting: int  # live layers that overwrite their input
    live: int
    prepacked: int  # convolutions
    channels_last: bool
    difference: float  # largest |after - before| on the example, see `relative_change`
    notes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The clause for reports."""
        n_folded = 0 if self.folding is None else len(self.folding.folded)
        layout = "channels last" if self.channels_last else "memory format unchanged"
        notes = "".join(f"; {note.rstrip('.')}" for note in self.notes)
        return (
            f"evaluated on an optimized copy ({n_folded} norm layers folded, {len(self.fused)} of "
            f"{self.live} live layers fused with the add and activation after them, "
            f"{self.overwriting} of them in place, {self.prepacked} convolutions prepacked, "
            f"{layout}{notes}); its outputs differ by at most {self.difference:.1e}"
        )


class FusedNorm(nn.Module):
    """A live norm layer in evaluation mode, fused with a residual addition and an activation.

    The activation works in place. With ``overwrite`` the output can use the input's memory.
    """

    def __init__(
        self, norm: GeneralizedBatchNorm, activation: Activation | None, *, overwrite: bool = False
    ) -> None:
        super().__init__()
        self.norm, self._activation, self.overwrite = norm, activation, overwrite

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(norm(input) + residual)``, input ``(N, C, *spatial)``."""
        if self.norm.training or (torch.is_grad_enabled() and input.requires_grad):
            raise ModelError("fused network: it is for inference. Train the original model.")
        valid = masks.current_mask() if masks.mask_is_set else None
        if valid is not None:
            output = normalized(self.norm, input, valid.fitted(input), by_batch=False)
            return Finish(residual, self._activation).apply(output)
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
    """Make a copy of a model that evaluates faster, and check its outputs on a batch.

    By default ``channels_last`` is on for inputs with two spatial axes on CPUs, because it makes
    convolutions faster. ``prepack`` follows it, and must be False under autocast. The example is a
    batch of the usual size, in any form. A ModelError is raised in training mode, or if the outputs
    would change.
    """
    if any(m.training for m in model.modules()):
        raise ModelError("fused network: the model is in training mode. Call model.eval() first.")
    before = outputs_on(model, example)
    net, notes = copy.deepcopy(model), []
    folding = None
    try:
        folding = optimize_(net, example)
    except ModelError as error:
        notes.append(str(error))
    n_live = sum(layer.live for _, layer in generalized_norms(net))
    names: tuple[str, ...] = ()
    if n_live:
        try:
            net, names = _fused(net)
        except ModelError as error:
            notes.append(f"the live layers are not fused: {error}")
    if channels_last is None:
        # With a user's forward function, only that function knows the inputs.
        x = None if runtime.has_forward(model) else runtime.unpack(example)[0]
        on_cpu = runtime.device_of(model).type == "cpu"
        channels_last = isinstance(x, Tensor) and x.ndim == 4 and on_cpu
    n_prepacked = 0
    if channels_last if prepack is None else prepack:
        n_prepacked = _prepack_(net, example)
    if channels_last:
        net = _ChannelsLast(net.to(memory_format=torch.channels_last)).eval()
    pairs = zip(before, outputs_on(net, example), strict=True)
    # A value that is NaN before and after counts as equal.
    changes = [relative_change(old.nan_to_num(), new.nan_to_num()) for old, new in pairs]
    difference = max(changes, default=0.0)
    dtype = next((p.dtype for p in model.parameters()), torch.float32)
    if not difference <= _TOLERANCE.get(dtype, 1e-3):
        raise ModelError(
            f"fused network: its outputs differ by {difference:.2g} from the model's. Evaluate "
            "without --fast; check the statistics with `bnfix inspect`."
        )
    return net, Fusion(
        folding=folding,
        fused=names,
        overwriting=sum(isinstance(m, FusedNorm) and m.overwrite for m in net.modules()),
        live=n_live,
        prepacked=n_prepacked,
        channels_last=channels_last,
        difference=difference,
        notes=tuple(notes),
    )


class _ChannelsLast(nn.Module):
    """A network that converts its inputs to channels last."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        _call_alike_(self, net)

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(x, Tensor) and x.ndim == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        return self.net(x, *args, **kwargs)


class PrepackedConv(nn.Module):
    """A convolution with weights in the CPU library's layout, for inference.

    Eager PyTorch converts the weights at each call. For a single image this can take a quarter of
    the time. `size` is the usual input size; other sizes also work. Outputs are channels last.
    """

    def __init__(self, conv: nn.Conv2d, size: tuple[int, ...]) -> None:
        super().__init__()
        self._how = [list(cast("tuple[int, ...]", conv.padding)), list(conv.stride),
                     list(conv.dilation), conv.groups]  # fmt: skip
        self.bias = None if conv.bias is None else conv.bias.detach()
        # Not a buffer: the packed tensor has no strides, and cannot be copied or saved.
        self._weight = packed_weight(conv.weight.detach(), *self._how, list(size))

    def forward(self, input: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, K, H', W')``."""
        return packed_convolution(input, self._weight, self.bias, *self._how)


def prepacked(conv: nn.Module, example: Tensor) -> PrepackedConv | None:
    """The prepacked form of a plain float32 convolution on the CPU, if it gives the same outputs.

    It uses undocumented operators of torch's compiler, so each convolution is tested first.
    """
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
        return None
    tensors = [t for t in (example, conv.weight, conv.bias) if t is not None]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return None
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or example.ndim != 4 or not example.numel() or type(example) is not Tensor:
        return None
    try:
        made = PrepackedConv(conv, tuple(example.shape)).eval()
        with torch.no_grad():
            # The class's method, not a module call: hooks must not fire again.
            mine, expected = made(example), nn.Conv2d.forward(conv, example)
    except _FAILURES:
        return None
    return made if relative_change(expected, mine) <= 1e-5 else None


def _prepack_(net: nn.Module, example: Any) -> int:
    """Prepack the convolutions that the example reaches; return their number."""
    found: dict[int, tuple[nn.Module, PrepackedConv]] = {}

    def hook(conv: nn.Module, inputs: tuple[Any, ...]) -> None:
        made = prepacked(conv, inputs[0].detach()) if len(inputs) == 1 else None
        if made is not None:
            found[id(conv)] = conv, made

    convs = [m for m in net.modules() if type(m) is nn.Conv2d and not hooked(m)]
    with guards.hooks() as handles:
        handles += [conv.register_forward_pre_hook(hook) for conv in convs]
        outputs_on(net, example)
    for conv, made in found.values():
        guards.exchange_(conv, made)
    return len(found)


def _call_alike_(net: nn.Module, original: nn.Module) -> None:
    """Copy the user's forward function to the replacement of a network."""
    if runtime.has_forward(original):
        runtime.set_forward_(net, original.__dict__[runtime.FORWARD])


def _fused(net: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """The network as a graph with fused live layers, and the names of the fused layers."""
    layers = dict(generalized_norms(net))
    graph = graph_of(net, list(layers.values()))
    modules = dict(net.named_modules(remove_duplicate=False))
    calls = Counter(id(modules[str(n.target)]) for n in graph.nodes if n.op == "call_module")
    first = {id(layer): name for name, layer in layers.items()}
    done: list[str] = []
    for node in list(graph.nodes):
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        if not isinstance(layer, GeneralizedBatchNorm) or not layer.live or calls[id(layer)] > 1:
            continue
        if layer.gates is not None:
            continue
        if len(node.args) != 1 or node.kwargs or hooked(layer):
            continue
        residual, activation, last = _what_follows(node, layer, modules)
        overwrite = _may_be_overwritten(node.args[0], modules)
        if last is None:
            # There is nothing to fuse; a timm layer with an unknown activation stays unchanged.
            if not overwrite or isinstance(layer, GeneralizedBatchNormAct):
                continue
            last = node
        else:
            done.append(first[id(layer)])
        name = f"fused_{len(net._modules)}"
        modules[name] = FusedNorm(layer, activation, overwrite=overwrite).eval()
        net.add_module(name, modules[name])
        with graph.inserting_after(last):
            given = (node.args[0],) if residual is None else (node.args[0], residual)
            new = graph.call_module(name, given)
        last.replace_all_uses_with(new)
        # Not eliminate_dead_code: other unused nodes can change a tensor in place.
        while last is not node:
            gone, last = last, next(n for n in last.all_input_nodes if n is not residual)
            graph.erase_node(gone)
        graph.erase_node(node)
    graph.lint()
    made = fx.GraphModule(net, graph).eval()
    made.delete_all_unused_submodules()
    _call_alike_(made, net)
    return made, tuple(done)


def _what_follows(
    node: fx.Node, layer: GeneralizedBatchNorm, modules: dict[str, nn.Module]
) -> tuple[fx.Node | None, Activation | None, fx.Node | None]:
    """The residual, the activation and the last node that can be fused into one layer."""
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


def _may_be_overwritten(node: object, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a convolution's output (newly allocated memory) with a single reader."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.users) != 1:
        return False
    module = modules[str(node.target)]
    return type(module) in CONVOLUTIONS and not hooked(module)


def _adds(node: fx.Node, norm: fx.Node) -> bool:
    if len(node.args) != 2 or node.kwargs:
        return False
    return node.target in _ADDITIONS or (node.target in _IN_PLACE and node.args[0] is norm)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _activation(node: fx.Node, modules: dict[str, nn.Module]) -> Activation | None:
    if node.op == "call_module":
        module = modules[str(node.target)]
        return None if hooked(module) else activation_of(module)
    if node.op in ("call_function", "call_method") and len(node.args) == 1:
        return _FUNCTIONS.get(node.target) if set(node.kwargs) <= {"inplace"} else None
    return None
