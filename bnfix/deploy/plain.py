"""Example-aware normalization in plain PyTorch: the layer, and a loader for its weights.

It needs only torch. `load(model)` loads the weights file next to this file into a stock model and
returns the model ready for inference. Statistics are constants here, so it is not for training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

#: The weights file, in the same folder as this file.
WEIGHTS = ""
#: The library, the name and the builder arguments of the stock model, if known.
MODEL: tuple[str, str, dict[str, Any]] | None = None
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class ExampleNorm(nn.Module):
    """Batch Norm at inference with each example's moments mixed into the running statistics.

    mu = (1-a) mean + a mean_i; var' = (1-a) var + a var_i + a (1-a) (mean_i - mean)^2; then
    y = gamma (x - mu) / sqrt(var' + eps) + beta, per example i and channel group. A batch weight
    first mixes the batch's moments into (mean, var), so outputs depend on the batch. With gates
    (c, s, b) the layer uses x + c mean_i in place of x, and multiplies y - beta by
    sigmoid(s z_i + b) / sigmoid(b), where z_i is the mean of (x - mu) / sqrt(var' + eps).

    Args:
        norm: the layer to replace; its parameters, buffers and submodules are reused.
        example_weight: a, one number or one per channel.
        channel_groups: number of channel groups; the channels of a group share their moments.
        eps: added to the variance.
        batch_weight: b, one number or one per channel; a + b is at most 1.
        median: whether the batch's moments are medians over its examples.
        gates: c, s and b, one of each per channel.
    """

    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    example_weight: Tensor
    batch_share: Tensor  # of the weight that the example leaves: b / (1 - a)
    gates: Tensor | None

    def __init__(
        self,
        norm: nn.Module,
        example_weight: Any,
        channel_groups: int,
        eps: float,
        batch_weight: Any = 0.0,
        median: bool = False,
        gates: Any = None,
    ) -> None:
        super().__init__()
        for name, parameter in norm._parameters.items():
            if name != "gates":
                self.register_parameter(name, parameter)
        rows = None if gates is None else torch.as_tensor(gates, dtype=torch.float32).detach()
        self.register_buffer("gates", rows, persistent=False)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in norm._modules.items():
            self.add_module(name, child)
        self.groups, self.eps, self.median = channel_groups, eps, median
        a = torch.as_tensor(example_weight, dtype=torch.float32)
        b = torch.as_tensor(batch_weight, dtype=torch.float32)
        share = (b / (1 - a).clamp_min(1e-6)).clamp_max(1.0)
        for name, buffer in (("example_weight", a), ("batch_share", share)):
            # A replaced bnfix layer has buffers of the same names.
            self._buffers.pop(name, None)
            self.register_buffer(name, buffer, persistent=False)
        self._buffers.pop("batch_weight", None)
        self.uses_batch = bool((b != 0).any())

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        axes = tuple(range(2, x.dim()))
        one = (1, -1, *(1 for _ in axes))
        mean = values.mean(axes, keepdim=True) if axes else values
        centred = values - mean
        var = (centred * centred).mean(axes, keepdim=True) if axes else torch.zeros_like(mean)
        moved = mean
        if self.gates is not None:
            centring, scaling, bias = (row.view(one) for row in self.gates.to(values.dtype))
            moved = mean + centring * mean
        mu, var = self._pooled(moved, var)
        if self.running_mean is not None and self.running_var is not None:
            population_mean, population_var = self._pooled(
                self.running_mean.to(values.dtype).view(one),
                self.running_var.to(values.dtype).view(one),
            )
            if self.uses_batch:
                population_mean, population_var = self._with_batch(
                    mu, var, population_mean, population_var
                )
            a = self.example_weight.to(values.dtype).view(one)
            gap = mu - population_mean
            mu = population_mean + a * gap
            var = (1 - a) * population_var + a * var + a * (1 - a) * gap * gap
        scale = (var + self.eps).rsqrt()
        if self.gates is not None:
            z = scaling * (moved - mu) * scale
            scale = scale * (F.softplus(-bias) - F.softplus(-(z + bias))).exp()
        if self.weight is not None:
            scale = scale * self.weight.to(values.dtype).view(one)
        y = (centred + (moved - mu)) * scale
        if self.bias is not None:
            y = y + self.bias.to(values.dtype).view(one)
        y = y.to(x.dtype)
        for child in self.children():  # a replaced layer may include dropout and an activation
            y = child(y)
        return y

    def _with_batch(
        self, mean: Tensor, var: Tensor, population_mean: Tensor, population_var: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Mix the batch's moments, computed from its examples' moments, into the population's."""
        if self.median:
            centre = _median(mean)
            spread = 1.4826 * _median((mean - centre).abs())
            mean, var = centre, _median(var) + spread * spread
        else:
            centre = mean.mean(0, keepdim=True)
            gaps = mean - centre
            mean, var = centre, (var + gaps * gaps).mean(0, keepdim=True)
        share = self.batch_share.to(mean.dtype).view(1, -1, *(1 for _ in mean.shape[2:]))
        gap = mean - population_mean
        spread = share * (1 - share) * gap * gap
        var = (1 - share) * population_var + share * var + spread
        return population_mean + share * gap, var

    def _pooled(self, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
        """Mix the moments within each channel group; every channel gets its group's moments."""
        if self.groups == mean.shape[1]:
            return mean, var
        shape = (mean.shape[0], self.groups, -1, *mean.shape[2:])
        means, variances = mean.reshape(shape), var.reshape(shape)
        group = means.mean(2, keepdim=True)
        spread = (variances + (means - group) * (means - group)).mean(2, keepdim=True)
        return group.expand_as(means).flatten(1, 2), spread.expand_as(means).flatten(1, 2)


def _median(values: Tensor) -> Tensor:
    """The median over examples; for an even number, the mean of the middle two."""
    # By ranks: a tracer would fix an index to the example's batch size.
    rank = torch.arange(values.shape[0], device=values.device)
    middle = (2 * rank - (values.shape[0] - 1)).abs() <= 1
    ordered = values.sort(0).values
    chosen = torch.where(middle.view(-1, *(1 for _ in values.shape[1:])), ordered, 0.0)
    return chosen.sum(0, keepdim=True) / middle.sum()


def build() -> nn.Module:
    """Build the stock model if it is torchvision's or timm's."""
    if MODEL is None:
        raise ValueError("The model is your own code: build it, and call load(model).")
    library, name, arguments = MODEL
    if library == "torchvision":
        import torchvision

        return torchvision.models.get_model(name, **arguments)  # type: ignore[no-any-return]
    import timm

    return timm.create_model(name, **arguments)


def load(model: nn.Module | None = None, weights: str | Path | None = None) -> nn.Module:
    """Load the weights into a stock model, and replace norm layers as exported.

    Args:
        model: the stock model; by default the result of `build`.
        weights: the weights file; by default the one next to this file.

    Returns:
        The model, ready for inference.
    """
    path = Path(__file__).with_name(WEIGHTS) if weights is None else Path(weights)
    tensors, metadata = read(path)
    model = build() if model is None else model
    for name, norm in json.loads(metadata.get("bnfix", "{}")).get("norms", {}).items():
        old, a = model.get_submodule(name), norm["example_weight"]
        old.__dict__["eps"] = norm["eps"]
        b, median = norm.get("batch_weight", 0.0), norm.get("batch_estimator") == "median"
        gates = norm.get("gates")
        if gates or any(any(w if isinstance(w, list) else [w]) for w in (a, b)):
            new = ExampleNorm(old, a, norm["channel_groups"], norm["eps"], b, median, gates)
            _replace(old, new)
    folded = json.loads(metadata.get("bnfix_folded", "{}"))
    for name in folded.get("norms", []):
        old = model.get_submodule(name)
        rest = nn.Sequential()
        for part, child in old.named_children():
            rest.add_module(part, child)
        _replace(old, rest)
    for name in folded.get("layers", []):
        model.get_submodule(name).bias = nn.Parameter(tensors[f"{name}.bias"].clone())
    model.load_state_dict(tensors, strict=True)
    return model.eval()


def read(path: str | Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """Read a ``.safetensors`` file."""
    with Path(path).open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > 100_000_000:
            raise ValueError(f"{path}: not a .safetensors file, or its header is too large.")
        header = json.loads(file.read(n))
        data = bytearray(file.read())
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if not 0 <= start <= end <= len(data):
            raise ValueError(f"{path}: {name} lies outside the file.")
        kind, shape = _TYPES[entry["dtype"]], entry["shape"]
        flat = torch.frombuffer(data[start:end], dtype=kind) if end > start else torch.empty(0)
        tensors[name] = flat.to(kind).reshape(shape)
    return tensors, metadata


def _replace(old: nn.Module, new: nn.Module) -> None:
    """Turn a module into another one in place, so every reference sees the change."""
    object.__setattr__(old, "__class__", type(new))
    object.__setattr__(old, "__dict__", new.__dict__)
