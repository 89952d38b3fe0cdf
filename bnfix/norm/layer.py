"""`GeneralizedBatchNorm`: one layer for Batch, Ghost, Group, Batch/Group and example-aware Norm.

Training: examples are split, in order, into ceil(N / ghost_size) runs whose sizes differ by at most
one. Each (run, channel group) is normalized by its own biased moments. The running moments follow
the whole batch, per channel, exactly as in torch's layer.

Evaluation, per example i and channel group, a = example_weight:

    mu  = (1-a) mean_p + a mean_i
    var = (1-a) var_p  + a var_i + a (1-a) (mean_i - mean_p)^2
    y   = gamma (x - mu) / sqrt(var + eps) + beta

With b = batch_weight the batch's moments are a third part; the weights are 1-a-b, b and a:

    mu  = (1-a-b) mean_p + b mean_b + a mean_i
    var = (1-a-b) (var_p + (mean_p - mu)^2) + b (var_b + (mean_b - mu)^2)
          + a (var_i + (mean_i - mu)^2)

Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization", ICLR
2020. Differs: the running update is torch's (Bessel's factor, within-batch variances), and the
mixture is of central moments.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import guards, masks
from bnfix.core.errors import ConfigError, NormError, NumericError
from bnfix.core.options import one_of
from bnfix.core.torch_private import BatchNormBase
from bnfix.norm import kernels
from bnfix.norm.mixture import Terms, Weight, are_open, closed, normalized, weight_errors
from bnfix.norm.moments import (
    differentiable_moments,
    differentiable_scale,
    keep_their_digits,
    mix,
    over_channel_groups,
    over_runs,
)


class GeneralizedBatchNorm(BatchNormBase):
    """Batch Normalization with channel groups, ghost batches and an example weight.

    With the default settings it equals torch's BatchNorm bit for bit in training and evaluation. It
    has the same parameters and buffers, plus the buffer ``example_weight``. A state dict without
    that buffer loads with ``strict=True`` and leaves the weight unchanged.

    Args:
        num_features: channels C of the input ``(N, C)`` or ``(N, C, *spatial)``.
        eps: added to the variance.
        momentum: weight of the batch in the running moments; ``None`` averages all batches.
        affine: learn scale (gamma, ``weight``) and shift (beta, ``bias``).
        track_running_stats: keep population moments; without them evaluation uses the batch's own.
        channel_groups: number G of channel groups that share moments; default one per channel.
        ghost_size: examples per ghost batch in training; default the whole batch.
        example_weight: weight a of the example in its own statistics at evaluation: one number or
            one per channel, from 0 to 1.
        batch_weight: weight b of the batch at evaluation: one number or one per channel, a + b at
            most 1. Outputs then depend on the batch. A batch of one counts as the example itself.
        batch_estimator: how the examples' moments are pooled into the batch's: ``mean`` (exact), or
            ``median``, which tolerates garbage in fewer than half of the examples.
        device: device of the parameters and buffers.
        dtype: data type of the parameters and running statistics.

    Raises:
        ConfigError: if a size or weight is out of range.
        NormError: if the groups do not divide the channels, or if a weight between 0 and 1 has no
            running statistics to mix with.
        NumericError: if, in training, a ghost batch holds a single value per channel group.

    Example:
        >>> layer = GeneralizedBatchNorm(6, channel_groups=3, example_weight=0.1).eval()
        >>> layer(torch.zeros(2, 6, 4, 4)).shape
        torch.Size([2, 6, 4, 4])
    """

    channel_groups: int
    ghost_size: int | None
    example_weight: Tensor
    frozen: bool = False
    exclusive: bool = False  # in training, normalize an example by the others of its ghost batch
    batch_weight: Tensor | None  # None means 0, and the state dict then has no such entry
    gates: nn.Parameter | None  # (3, C), see `bnfix.norm.mixture`; None without gates
    weighs: bool = False  # some channel has an example or batch weight above 0
    uses_batch: bool = False  # some batch weight is above 0: outputs depend on the whole batch
    _shiftable: bool = False
    _median: bool = False

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        channel_groups: int | None = None,
        ghost_size: int | None = None,
        example_weight: Weight = 0.0,
        batch_weight: Weight = 0.0,
        batch_estimator: str = "mean",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        self._configure(channel_groups, ghost_size, device)
        self._assign(example_weight, batch_weight, batch_estimator)

    def _configure(
        self,
        channel_groups: int | None,
        ghost_size: int | None,
        device: torch.device | str | None = None,
    ) -> None:
        """Check and set the two sizes, with weights of 0; also called to convert a stock layer."""
        groups = self.num_features if channel_groups is None else channel_groups
        if groups < 1 or self.num_features % groups:
            raise NormError(
                f"channel_groups: {self.num_features} channels do not divide into {groups} groups. "
                f"Use a divisor of {self.num_features}.",
                name="channel_groups",
            )
        if ghost_size is not None and ghost_size < 1:
            raise ConfigError(
                f"ghost_size: {ghost_size}, expected at least 1 example.", name="ghost_size"
            )
        self.channel_groups, self.ghost_size = groups, ghost_size
        self.register_buffer("example_weight", torch.zeros((), device=device))
        self.register_buffer("batch_weight", None)
        self._parameters.setdefault("gates", None)
        self._refresh_flags()

    def _assign(
        self,
        weight: Weight | None = None,
        batch: Weight | None = None,
        estimator: str | None = None,
    ) -> None:
        """Check and store the given settings; refresh the flags that ``forward`` branches on."""
        like = self.example_weight
        a, b = (
            None if w is None else torch.as_tensor(w, dtype=torch.float32, device=like.device)
            for w in (weight, batch)
        )
        if estimator is not None:
            one_of(estimator, ("mean", "median"), "batch_estimator")
        for error in weight_errors(self, a, b):
            raise error
        if a is not None:
            self.example_weight = a.detach().clone()
        if b is not None:
            self.batch_weight = b.detach().clone()
        if estimator is not None:
            self._median = estimator == "median"
        self._refresh_flags()

    def _refresh_flags(self) -> None:
        a, b = self.example_weight, self.batch_weight
        known = a.device.type != "meta"
        if known and b is not None and not bool((b != 0).any()):
            b = self.batch_weight = None
        self.uses_batch = known and b is not None
        self.weighs = known and (self.uses_batch or bool((a != 0).any()))
        self._shiftable = known and bool((a if b is None else a + b).le(kernels.SHIFTABLE).all())

    @property
    def live(self) -> bool:
        """Whether evaluation depends on the input's moments: a weight above 0, or an open gate."""
        return self.weighs or are_open(self)

    @property
    def batch_estimator(self) -> str:
        """How the examples' moments are pooled into the batch's."""
        return "median" if self._median else "mean"

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected 2D or higher input (got {input.dim()}D input)")

    def train(self, mode: bool = True) -> GeneralizedBatchNorm:
        """Set training mode; a frozen layer stays in evaluation mode."""
        super().train(mode and not self.frozen)
        return self

    def forward(self, input: Tensor) -> Tensor:
        """Normalize ``(N, C)`` or ``(N, C, *spatial)``; keeps shape, dtype and memory format."""
        self._check_input_dim(input)
        if input.numel() == 0:
            return super().forward(input)
        by_batch = self.training or (self.running_mean is None and not self.weighs)
        gated = self.gates is not None
        valid = None
        if masks.mask_is_set and (gated or by_batch or self.weighs):
            valid = masks.current_mask()
        if gated or valid is not None:
            fitted = None if valid is None else valid.fitted(input)
            return normalized(self, input, fitted, by_batch=by_batch)
        if by_batch:
            whole = self.ghost_size is None or self.ghost_size >= input.shape[0]
            compiled_average = self.momentum is None and torch.compiler.is_compiling()
            whole = whole and not self.exclusive
            if whole and self.channel_groups == self.num_features and not compiled_average:
                return super().forward(input)
            return self._by_runs(input)
        if self.weighs:
            return kernels.evaluate(input, self._terms())
        if self.channel_groups == self.num_features:
            return super().forward(input)
        mean, var = self._population()
        return F.batch_norm(input, mean, var, self.weight, self.bias, False, 0.0, self.eps)

    def _population(self) -> tuple[Tensor, Tensor]:
        """Population moments ``(C,)``, pooled over each channel group."""
        mean, var = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        return over_channel_groups(mean, var, self.channel_groups)

    def _terms(self) -> Terms:
        mean, var = (None, None) if self.running_mean is None else self._population()
        return Terms(
            mean,
            var,
            self.example_weight,
            self.weight,
            beta=self.bias,
            eps=self.eps,
            channel_groups=self.channel_groups,
            shiftable=self._shiftable,
            batch_weight=self.batch_weight if self.uses_batch else None,
            median=self._median,
        )

    def _by_runs(self, input: Tensor) -> Tensor:
        """Normalize each (ghost batch, channel group) separately; update the running moments."""
        one_type = all(t is None or t.dtype == input.dtype for t in (self.weight, self.bias))
        if one_type and kernels.has_rows(input):
            n_runs, n_values = self._runs_of(input)
            mean, var = differentiable_moments(input)
            run_mean, run_var = over_runs(
                mean, var, n_runs, self.channel_groups, exclusive=self.exclusive
            )
            run_var = run_var + self.eps
            if keep_their_digits(mean, run_var):
                self._update_running(mean, var, n_values)
                return differentiable_scale(input, run_mean, run_var, self.weight, self.bias)
        return normalized(self, input, None, by_batch=True)

    def _runs_of(self, input: Tensor, valid: Tensor | None = None) -> tuple[int, int]:
        """The numbers of ghost batches and of values per channel; refuse too small a batch."""
        n = input.shape[0]
        n_values = input.numel() // input.shape[1]
        n_runs = 1 if self.ghost_size is None else -(-n // self.ghost_size)
        if valid is not None:
            least = min(int(run.sum()) for run in valid.tensor_split(n_runs))
            if least * (self.num_features // self.channel_groups) < 2 or self.exclusive:
                found = "exclusive statistics" if self.exclusive else f"{least} valid positions"
                raise NumericError(
                    "expected more than 1 valid value per ghost batch and channel group when "
                    f"training with a mask, without exclusive statistics; got {found}, input size "
                    f"{tuple(input.shape)} with ghost_size {self.ghost_size}"
                )
            return n_runs, int(valid.sum())
        if self.exclusive and n // n_runs < 2:
            raise NumericError(
                f"expected more than 1 example per ghost batch with exclusive statistics, got {n} "
                f"with ghost_size {self.ghost_size}"
            )
        if n // n_runs * (n_values // n) * (self.num_features // self.channel_groups) < 2:
            raise NumericError(
                "expected more than 1 value per ghost batch and channel group when training, got "
                f"input size {tuple(input.shape)} with ghost_size {self.ghost_size}"
            )
        return n_runs, n_values

    @torch.no_grad()
    def _update_running(
        self, mean: Tensor, var: Tensor, n_values: int, share: Tensor | None = None
    ) -> None:
        """Move the running moments toward the whole batch's, exactly as torch's layer does."""
        if not (self.training and self.track_running_stats):
            return
        running_mean, running_var = self.running_mean, self.running_var
        if running_mean is None or running_var is None:
            return
        counter = self.num_batches_tracked
        if counter is not None:
            counter.add_(1)
        momentum: float | Tensor = self.momentum or 0.0
        if self.momentum is None and counter is not None:
            momentum = counter.to(running_mean.dtype).reciprocal()
        batch_mean, batch_var = mix(mean, var, share, dim=0)
        batch_var = batch_var * (n_values / max(n_values - 1, 1))
        running_mean.copy_(running_mean + momentum * (batch_mean - running_mean))
        running_var.copy_(running_var + momentum * (batch_var - running_var))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, metadata: Any, strict: bool, *rest: Any
    ) -> None:
        """Accept a stock layer's state; weights that it lacks keep their values."""
        own = {name: getattr(self, name) for name in ("example_weight", "batch_weight", "gates")}
        given = {name: state_dict.get(prefix + name) for name in own}
        found = {name: w if isinstance(w, Tensor) else None for name, w in given.items()}
        errors = weight_errors(self, found["example_weight"], found["batch_weight"])
        if found["gates"] is not None and self.gates is None:
            self.gates = own["gates"] = closed(self)
        rest[-1].extend(f"{prefix}{error}" for error in errors)
        state_dict = dict(state_dict)  # the caller's dict must not change
        for name, weight in found.items():
            mine = own[name]
            if errors or given[name] is None:
                # The present value loads into itself, so strict loading misses no key.
                state_dict.pop(prefix + name, None)
                if mine is not None:
                    state_dict[prefix + name] = mine
            elif name == "gates" or weight is None:
                continue  # torch itself checks the shape of a parameter
            elif mine is None or mine.shape != weight.shape:
                setattr(self, name, self.example_weight.new_empty(weight.shape))
        if self.frozen:
            state_dict.pop(prefix + "num_batches_tracked", None)
            nn.Module._load_from_state_dict(self, state_dict, prefix, metadata, strict, *rest)
        else:
            super()._load_from_state_dict(state_dict, prefix, metadata, strict, *rest)
        self._refresh_flags()

    def extra_repr(self) -> str:
        """List torch's settings, then the settings that differ from a stock layer's."""
        parts = [cast(str, super().extra_repr())]  # type: ignore[no-untyped-call]
        if self.channel_groups != self.num_features:
            parts.append(f"channel_groups={self.channel_groups}")
        if self.ghost_size is not None:
            parts.append(f"ghost_size={self.ghost_size}")
        for name in ("example_weight", "batch_weight"):
            weight = getattr(self, name)
            if weight is None or weight.device.type == "meta":
                continue
            low, high = weight.min().item(), weight.max().item()
            parts.append(f"{name}={f'{low:.4g}' if weight.ndim == 0 else f'{low:.3g}..{high:.3g}'}")
        if self.uses_batch and self._median:
            parts.append("batch_estimator=median")
        if self.gates is not None:
            parts.append("gates=True")
        if self.frozen:
            parts.append("frozen=True")
        return ", ".join(parts)


class GeneralizedBatchNormAct(GeneralizedBatchNorm):
    """The layer followed by the drop and activation modules of timm's BatchNormAct2d.

    Only `swap_norms_` makes it; the modules keep their names, so the state dict keeps its keys.
    """

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """Normalize, drop, activate."""
        activated: Tensor = self.act(self.drop(super().forward(input)))
        return activated


def require_eager(model: nn.Module) -> None:
    """Refuse TorchScript, whose compiled layers can be neither inspected nor changed."""
    if isinstance(model, torch.jit.ScriptModule):
        raise NormError(
            f"model: a {type(model).__name__}, which is TorchScript; its layers cannot be changed. "
            "Give the original nn.Module."
        )


def generalized_norms(model: nn.Module) -> Iterator[tuple[str, GeneralizedBatchNorm]]:
    """Every GeneralizedBatchNorm of a model with its first dotted name, in module order."""
    for name, module in model.named_modules():
        if isinstance(module, GeneralizedBatchNorm):
            yield name, module


def require_generalized(model: nn.Module) -> dict[str, GeneralizedBatchNorm]:
    """The generalized layers of a model; refuse a model without any."""
    require_eager(model)
    layers = dict(generalized_norms(model))
    if not layers:
        scripted = [n for n, m in model.named_modules() if isinstance(m, torch.jit.ScriptModule)]
        raise NormError(
            f"{scripted[0]}: is TorchScript; its layers cannot be changed. Give the original "
            "nn.Module."
            if scripted
            else "model: it has no GeneralizedBatchNorm. Call swap_norms_(model) first."
        )
    return layers


def set_example_weight_(
    model: nn.Module,
    weight: Weight | Mapping[str, Weight] | None = None,
    *,
    batch_weight: Weight | Mapping[str, Weight] | None = None,
    batch_estimator: str | None = None,
) -> None:
    """Set the example weight and the batch weight of one layer or of a whole model.

    Both weights of a channel belong to one mixture, so their sum is checked after both are set.

    Args:
        model: a ``GeneralizedBatchNorm``, or a model that contains some.
        weight: the example weight: one number in [0, 1], one per channel, or a mapping from dotted
            layer names to either; layers that it does not name, or all if ``None``, are unchanged.
        batch_weight: the batch weight, in the same forms; at 0 outputs do not depend on the batch.
        batch_estimator: ``mean`` or ``median``, for every layer; ``None`` keeps the present one.

    Raises:
        NormError: if there is no such layer, or if a layer has no running statistics to mix with.
        ConfigError: if a weight is out of range or has a wrong shape, or if the sum exceeds 1.

    Changes:
        The buffers ``example_weight`` and ``batch_weight`` of the layers, and the flags that
        ``forward`` branches on.
    """
    layers = require_generalized(model)
    given = [
        w if isinstance(w, Mapping) else {} if w is None else dict.fromkeys(layers, w)
        for w in (weight, batch_weight)
    ]
    every = [] if batch_estimator is None else list(layers)
    wanted = dict.fromkeys([*given[0], *given[1], *every])
    unknown = [name for name in wanted if name not in layers]
    if unknown:
        raise NormError(f"{unknown[0]}: not a GeneralizedBatchNorm of this model.", name=unknown[0])
    with guards.undone_on_error(nn.ModuleList(layers[name] for name in wanted)):
        for name in wanted:
            try:
                layers[name]._assign(given[0].get(name), given[1].get(name), batch_estimator)
            except (NormError, ConfigError) as error:
                raise type(error)(f"{name}: {error}", name=name) from error
