"""Moments that stored statistics and weights predict, layer by layer, without an example.

A norm layer's output has by its stored statistics the mean beta and the variance
gamma^2 var / (var + eps), taken for normal. Activations keep the moments of a normal variable, by
quadrature; sums add means and variances; a convolution or linear layer gives

    mean = sum_j W_j E[x_j] + b        var ~ sum_j (sum_k W_jk^2 + (sum_k W_jk)^2) Var[x_j]

with k the positions of a kernel. The mean is exact but for the border; the variance leaves out what
inputs have in common, so only ratios of two such variances of one layer mean something.

For weights W' made from W without changing scales and shifts, with stored (mean, var) of W:

    mean' = mean + predicted' - predicted        var' + eps = (var + eps) min(1, ratio)

Rounding moves means; what it adds to a variance, noise, is not predicted well, and ratios above 1
were worse than none. Pruning takes variance away.

Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV
2019, for the means. Labatie et al., "Proxy-normalizing activations", NeurIPS 2021, for activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnfix.core.errors import ModelError
from bnfix.core.torch_private import ConvBase
from bnfix.models.graph import graph_of
from bnfix.norm.sites import NormSite, find_norms
from bnfix.recalibrate.collector import eps_of, stored_moments

_ADDS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_POINTWISE = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.GELU, nn.Hardswish, nn.Mish, nn.Softplus,
    nn.Sigmoid, nn.Tanh, nn.Hardsigmoid,
)  # fmt: skip
_FUNCTIONS: dict[Any, Callable[[Tensor], Tensor]] = {
    F.relu: F.relu, torch.relu: F.relu, "relu": F.relu, "relu_": F.relu, torch.relu_: F.relu,
    F.relu6: F.relu6, F.silu: F.silu, F.gelu: F.gelu, F.hardswish: F.hardswish, F.mish: F.mish,
}  # fmt: skip
_SAME = (nn.Identity, nn.Dropout, nn.Dropout2d, nn.AdaptiveAvgPool2d, nn.AvgPool2d)
#: Points of the quadrature, in deviations.
_POINTS = torch.linspace(-8, 8, 1601, dtype=torch.float64)


class Predicted(NamedTuple):
    """Moments ``(C,)`` of one value a channel, float64."""

    mean: Tensor
    var: Tensor


def predicted_moments(model: nn.Module, example: Tensor | None = None) -> dict[str, Predicted]:
    """What each norm layer is predicted to meet, by name; layers out of reach are left out.

    Branches that depend on the input go as they go for the ``example``.

    Raises:
        ModelError: if the model has no graph.
    """
    sites = {site.module: site for site in find_norms(model)}
    found: dict[str, Predicted] = {}
    known: dict[fx.Node, Predicted | None] = {}
    with torch.no_grad():
        for node in graph_of(model, list(sites), example).nodes:
            given = [known[n] for n in node.all_input_nodes]
            module = model.get_submodule(str(node.target)) if node.op == "call_module" else None
            # Of gated layers the statistics are of what the gates make of the input.
            if module in sites and given[0] is not None and getattr(module, "gates", None) is None:
                found[sites[module].name] = given[0]
            known[node] = _after(node, module, sites.get(module) if module else None, given)
    return found


def predicted_gaps(model: nn.Module) -> dict[str, float]:
    """Mean over channels of |predicted mean - stored mean| / sd, by layer; empty without a graph.

    0.1 or less is usual for most layers of a trained network; statistics of other weights, or of
    none, show larger ones.
    """
    try:
        predicted = predicted_moments(model)
    except ModelError:
        return {}
    gaps = {}
    for site in find_norms(model):
        if site.name in predicted and site.has_statistics:
            mean, var = stored_moments(site)
            sd = (var.clamp_min(0) + eps_of(site)).sqrt()
            off = (predicted[site.name].mean - mean).abs() / sd
            gaps[site.name] = float(off.mean())
    return gaps


@torch.no_grad()
def match_predicted_(
    model: nn.Module, original: nn.Module, example: Tensor | None = None
) -> list[str]:
    """Set the statistics by the formula above; the names of the layers that were reached.

    Args:
        model: with other weights than the original, and the same norm layers.
        original: the network that it was made from, whose statistics are right.
        example: an input for both, if they branch.

    Raises:
        ModelError: if one of both has no graph.

    Changes:
        ``running_mean`` and ``running_var`` of the layers reached, but of frozen ones.
    """
    own, theirs = predicted_moments(model, example), predicted_moments(original, example)
    stored = {site.name: site for site in find_norms(original)}
    done = []
    for site in find_norms(model):
        name = site.name
        if site.frozen or not site.has_statistics or name not in own.keys() & theirs.keys():
            continue
        module: Any = site.module
        if getattr(module, "channel_groups", len(own[name].mean)) != len(own[name].mean):
            continue  # groups of channels share their moments
        mean, var = stored_moments(stored[name])
        shift = own[name].mean - theirs[name].mean
        ratio = (own[name].var / theirs[name].var.clamp_min(1e-30)).clamp(0.01, 1)
        eps = eps_of(site)
        module.running_mean.copy_(mean + shift)
        module.running_var.copy_((var + eps) * ratio - eps)
        done.append(name)
    return done


def _after(
    node: fx.Node, module: nn.Module | None, site: NormSite | None, given: list[Predicted | None]
) -> Predicted | None:
    """The moments after a node, if those before it are enough to tell."""
    if site is not None and site.has_statistics:
        return _of_norm(site)
    every = [one for one in given if one is not None]
    if not every or len(every) < len(given):
        return None
    first = every[0]
    if node.target in _ADDS and len(every) == 2:
        return Predicted(*(a + b for a, b in zip(*every, strict=True)))
    if node.target is operator.getitem or isinstance(module, _SAME):
        return first  # a part of the positions
    if node.target is F.pad and len(node.args) > 1 and isinstance(node.args[1], tuple):
        widths: Any = node.args[1][4:6]
        return Predicted(*(F.pad(t, widths) for t in first)) if len(widths) == 2 else first
    if isinstance(module, ConvBase | nn.Linear):
        return _of_weights(module, first)
    act = module if isinstance(module, _POINTWISE) else _FUNCTIONS.get(node.target)
    return None if act is None else _of_activation(act, first)


def _of_norm(site: NormSite) -> Predicted:
    layer: Any = site.module
    _, var = stored_moments(site)
    gamma = torch.ones_like(var) if layer.weight is None else layer.weight.double()
    beta = torch.zeros_like(var) if layer.bias is None else layer.bias.double()
    out = Predicted(beta, gamma.square() * var / (var + eps_of(site)))
    act = getattr(layer, "act", None)  # of timm's layers
    if act is None or isinstance(act, nn.Identity):
        return out
    return _of_activation(act, out) if isinstance(act, _POINTWISE) else out


def _of_activation(act: Callable[[Tensor], Tensor], x: Predicted) -> Predicted:
    weight = torch.exp(-_POINTS.square() / 2)
    weight = weight / weight.sum()
    y = act((x.mean[:, None] + x.var.clamp_min(0).sqrt()[:, None] * _POINTS).clone())
    mean = y @ weight
    return Predicted(mean, (y - mean[:, None]).square() @ weight)


def _of_weights(module: Any, x: Predicted) -> Predicted | None:
    weight = module.weight.double().flatten(2) if module.weight.ndim > 2 else module.weight.double()
    weight = weight if weight.ndim == 3 else weight[..., None]
    groups = getattr(module, "groups", 1)
    if getattr(module, "transposed", False) or len(x.mean) != groups * weight.shape[1]:
        return None
    weight = weight.unflatten(0, (groups, -1))  # (groups, out, in, positions)
    sums, squares = weight.sum(-1), weight.square().sum(-1)
    mean, var = (
        torch.einsum("goi,gi->go", of, t.view(groups, -1)).flatten()
        for of, t in ((sums, x.mean), (squares + sums.square(), x.var))
    )
    return Predicted(mean if module.bias is None else mean + module.bias.double(), var)
