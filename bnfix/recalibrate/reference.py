"""Statistics of a damaged network, matched to the original network that it came from.

On the same images a layer's inputs have moments mu_M, v_M (model) and mu_O, v_O (original). With

    r    = v_M / v_O
    var  = (var_O + eps_O) r - eps_M
    mean = mu_M - sqrt((var + eps_M) / (var_O + eps_O)) (mu_O - mean_O)

and the original's stored mean_O, var_O, both normalized outputs have the same moments. So the
original's statistics stay the anchor. Images that are few, or not from the training set, move mu_M
with mu_O and v_M with v_O, and the error cancels (a control variate).

For a mean of several networks, all of them are originals. With weights w_k that sum to 1, the
normalized output gets the mean and the standard deviation

    m = sum_k w_k (mu_k - mean_k) / sqrt(var_k + eps_k)
    s = sum_k w_k sqrt(v_k / (var_k + eps_k))

For one original, this is the rule above.

Source: Jordan et al., "REPAIR", 2023, corrects merged networks by the same two moments. Deviations
are matched, not regressed: a slope cov / v_M shrinks every layer by the lost correlation.

Without examples, both networks' moments are predicted, layer by layer, from statistics and weights.
By its stored statistics, a norm layer's output has mean beta and variance gamma^2 var / (var +
eps), and is assumed normal. Activations take the moments of a normal variable, by quadrature; sums
add means and variances; a convolution or linear layer gives

    mean = sum_j W_j E[x_j] + b        var ~ sum_j (sum_k W_jk^2 + (sum_k W_jk)^2) Var[x_j]

with k the positions of a kernel. The mean is exact except at the border. The variance ignores the
correlation of inputs, so only the ratio of two such variances of one layer is meaningful.

For weights W' made from W with the same scales and shifts, and stored (mean, var) of W:

    mean' = mean + predicted' - predicted        var' + eps = (var + eps) min(1, ratio)

Rounding moves means. The noise that it adds to a variance is not predicted well, and ratios above 1
did worse than no correction. Pruning removes variance.

Source: Nagel et al., "Data-free quantization through weight equalization and bias correction", ICCV
2019, for the means. Labatie et al., "Proxy-normalizing activations", NeurIPS 2021, for activations.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from bnfix.core.errors import ConfigError, ModelError
from bnfix.core.torch_private import ConvBase
from bnfix.models.graph import graph_of
from bnfix.norm.sites import NormSite, find_norms
from bnfix.recalibrate.accumulator import Accumulator
from bnfix.recalibrate.collector import Collector, Source, Target

#: The network to match, or several with their weights.
Originals = nn.Module | Mapping[nn.Module, float]

#: Range of v_M / v_O, outside which two channels have little in common: deviations of 100 to 1.
_LEAST, _MOST = 1e-4, 1e4
#: A channel is dead if its variance is at most this fraction of eps, or of its squared mean.
_DEAD_BY_EPS, _DEAD_BY_MEAN = 1e-6, 1e-10


@dataclass
class _Original:
    """A network to match, and the measured inputs of its layers."""

    network: nn.Module
    weight: float
    sites: dict[str, NormSite]
    measured: Mapping[str, Accumulator]


class Reference(Target):
    """The rule that matches a healthy network, or several weighted ones; they are only read."""

    def __init__(self, originals: Originals, model: nn.Module, sites: Sequence[NormSite]) -> None:
        super().__init__()
        self.name = "reference" if isinstance(originals, nn.Module) else "interpolated"
        weights = {originals: 1.0} if isinstance(originals, nn.Module) else originals
        if not weights or min(weights.values()) <= 0:
            raise ConfigError(
                f"reference: weights {list(weights.values())}, expected numbers above 0.",
                name="reference",
            )
        whole = sum(weights.values())
        self._originals = [
            _Original(network, weight / whole, _counterparts(network, model, sites), {})
            for network, weight in weights.items()
        ]

    def measure_(self, source: Source, run: Callable[[Source, Collector], Any]) -> float:
        """Run the batches through each original once, as in inference."""
        for one in self._originals:
            # State that its forward changes is restored, and not reported for the model.
            theirs = replace(source, model=one.network, changed={}, target=Target())
            collector = Collector(list(one.sites.values()), theirs)
            run(theirs, collector)
            one.measured = collector.sums.measured
        return float(len(self._originals))

    def moments(self, site: NormSite, sums: Accumulator) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``, float64, that give the layer's output the original's moments.

        If the model's channel is dead, or var would be below 0, only the mean is matched. If only
        the original's channel is dead, or r is out of range, the result is the population moments.
        """
        mean_m, var_m = super().moments(site, sums)
        if not all(site.name in one.measured for one in self._originals):
            self.unmatched[site.name] = mean_m.numel()
            return mean_m, var_m
        mean_o, var_o, stored_mean, spread = self._as_one(site, mean_m)
        eps_m, eps_o = site.eps, self._originals[0].sites[site.name].eps
        dead_m, dead_o = _dead(mean_m, var_m, eps_m), _dead(mean_o, var_o, eps_o)
        ratio = torch.where(dead_m, 1.0, var_m / var_o)
        var = spread * ratio - eps_m
        negative = var < 0
        var = var.clamp_min(0)
        scale = ((var + eps_m) / spread).sqrt()
        mean = mean_m - scale * (mean_o - stored_mean)
        # NaN, from two variances of 0, counts as out of range too.
        foreign = ~dead_m & (dead_o | ~((ratio >= _LEAST) & (ratio <= _MOST)))
        # A channel dead in both networks is a constant, and already has the original's moments.
        self.unmatched[site.name] = int((dead_m & ~dead_o | negative | foreign).sum())
        return torch.where(foreign, mean_m, mean), torch.where(foreign, var_m, var)

    def _as_one(self, site: NormSite, like: Tensor) -> tuple[Tensor, ...]:
        """Measured moments, stored mean and stored var + eps of one original equivalent to all."""
        found: Any = 0.0
        for one in self._originals:
            theirs = one.sites[site.name]
            # The original's channel groups can be finer than the model's.
            mean, var, stored_mean, stored_var = (
                moment.to(like)
                for pair in (one.measured[site.name].statistics(None), theirs.moments)
                for moment in site.over_groups(*pair)
            )
            deviation = (stored_var + theirs.eps).sqrt()
            shift, scale = (mean - stored_mean) / deviation, var.sqrt() / deviation
            found += one.weight * torch.stack([shift, scale, stored_mean, deviation])
        shift, scale, stored_mean, deviation = found
        return (
            stored_mean + shift * deviation,
            (scale * deviation).square(),
            stored_mean,
            deviation.square(),
        )


def _dead(mean: Tensor, var: Tensor, eps: float) -> Tensor:
    return var <= torch.maximum(_DEAD_BY_MEAN * mean.square(), torch.tensor(_DEAD_BY_EPS * eps))


def _counterparts(
    original: nn.Module, model: nn.Module, sites: Sequence[NormSite]
) -> dict[str, NormSite]:
    """The original's layer for each of the model's; all disagreements are refused at once."""
    theirs = {site.name: site for site in find_norms(original)}
    names = [site.name for site in find_norms(model)]
    problems = [f"{name}: not in the original" for name in names if name not in theirs]
    problems += [f"{name}: only in the original" for name in theirs if name not in names]
    for site in sites:
        other = theirs.get(site.name)
        if other is None:
            continue
        channels = site.moments[0].numel()
        if other.unmeasured or not other.has_statistics:
            why = other.unmeasured or "keeps no statistics"
            problems.append(f"{site.name}: the original's {why}")
        elif (found := other.moments[0].numel()) != channels:
            problems.append(f"{site.name}: {channels} channels, {found} in the original")
    if problems:
        raise ConfigError(
            f"reference: this model cannot come from that network. {'; '.join(problems)}. Give "
            "the original, with the same norm layers.",
            name="reference",
        )
    return {site.name: theirs[site.name] for site in sites}


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
#: Points of the quadrature, in standard deviations.
_POINTS = torch.linspace(-8, 8, 1601, dtype=torch.float64)


class Predicted(NamedTuple):
    """Moments ``(C,)``, float64, of a channel's values."""

    mean: Tensor
    var: Tensor


def predicted_moments(model: nn.Module, example: Tensor | None = None) -> dict[str, Predicted]:
    """The predicted input moments of each norm layer, by name; unpredictable layers are left out.

    Branches that depend on the input are taken as for the ``example``.

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
            # A gated layer's statistics describe the input after its gates, not the input itself.
            if module in sites and given[0] is not None and getattr(module, "gates", None) is None:
                found[sites[module].name] = given[0]
            known[node] = _after(node, module, sites.get(module) if module else None, given)
    return found


def predicted_gaps(model: nn.Module) -> dict[str, float]:
    """Mean over channels of |predicted mean - stored mean| / sd, by layer; empty without a graph.

    Most layers of a trained network have 0.1 or less. Statistics that belong to other weights, or
    to none, give larger gaps.
    """
    try:
        predicted = predicted_moments(model)
    except ModelError:
        return {}
    gaps = {}
    for site in find_norms(model):
        if site.name in predicted and site.has_statistics:
            mean, var = site.moments
            sd = (var.clamp_min(0) + site.eps).sqrt()
            off = (predicted[site.name].mean - mean).abs() / sd
            gaps[site.name] = float(off.mean())
    return gaps


@torch.no_grad()
def match_predicted_(
    model: nn.Module, original: nn.Module, example: Tensor | None = None
) -> list[str]:
    """Set the statistics of all but frozen layers by the formula above; return the layers' names.

    The original has other weights, right statistics and the same norm layers. The ``example`` is an
    input for both, if they branch. Raises a ModelError if either network has no graph.
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
            continue  # channel groups share their moments
        mean, var = stored[name].moments
        shift = own[name].mean - theirs[name].mean
        ratio = (own[name].var / theirs[name].var.clamp_min(1e-30)).clamp(0.01, 1)
        eps = site.eps
        module.running_mean.copy_(mean + shift)
        module.running_var.copy_((var + eps) * ratio - eps)
        done.append(name)
    return done


def _after(
    node: fx.Node, module: nn.Module | None, site: NormSite | None, given: list[Predicted | None]
) -> Predicted | None:
    """The moments after a node, if the moments before it determine them."""
    if site is not None and site.has_statistics:
        return _of_norm(site)
    every = [one for one in given if one is not None]
    if not every or len(every) < len(given):
        return None
    first = every[0]
    if node.target in _ADDS and len(every) == 2:
        return Predicted(*(a + b for a, b in zip(*every, strict=True)))
    if node.target is operator.getitem or isinstance(module, _SAME):
        return first  # a subset of the positions has the same moments
    if node.target is F.pad and len(node.args) > 1 and isinstance(node.args[1], tuple):
        widths: Any = node.args[1][4:6]
        return Predicted(*(F.pad(t, widths) for t in first)) if len(widths) == 2 else first
    if isinstance(module, ConvBase | nn.Linear):
        return _of_weights(module, first)
    act = module if isinstance(module, _POINTWISE) else _FUNCTIONS.get(node.target)
    return None if act is None else _of_activation(act, first)


def _of_norm(site: NormSite) -> Predicted:
    layer: Any = site.module
    _, var = site.moments
    gamma = torch.ones_like(var) if layer.weight is None else layer.weight.double()
    beta = torch.zeros_like(var) if layer.bias is None else layer.bias.double()
    out = Predicted(beta, gamma.square() * var / (var + site.eps))
    act = getattr(layer, "act", None)  # timm's layers have one
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
