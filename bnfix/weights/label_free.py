"""Example weights without labels: fitted to the network's training statistics or predictions.

In training, an example was normalized together with B - 1 random others. Inference should imitate
that, with only the population and the example itself. Two fits of the example's weight, both of
which let the layers normalize random batches of B as in training:

``fit_moments_``: per layer, by least squares, the moments of a batch from the moments of the
population and of one example. With s = var_p + eps, over examples i, their batches b and channels,

    J(a) = mean[(mean_b - mean(a))^2 / s + (var_b - var(a))^2 / (2 s^2)],

``mean(a)`` and ``var(a)`` are the layer's own mixture; the two terms have the same weights as in
the divergence between normal distributions. J is a quartic in a, so its minimum is found exactly.

``fit_predictions_``: by the divergence KL(p || q(a)) of the inference predictions q from p, the
mean prediction in training mode over several random batches. It fits one weight for the model, then
one per layer, and keeps a fit only if it is better on held-out examples.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import guards, masks, runtime
from bnfix.core.errors import ConfigError, DataError, NormError
from bnfix.norm.layer import GeneralizedBatchNorm, generalized_norms, set_example_weight_
from bnfix.norm.mixture import centred, trainable_weights
from bnfix.norm.moments import example_moments, mix, over_channel_groups
from bnfix.weights.choose import best_root, descent

#: Most examples for a fit: one or two numbers per layer need no more.
MOST_EXAMPLES = 1024
#: Number of random batches over which an example's training-mode prediction is averaged.
N_DRAWS = 8
_LR, _START, _EPOCHS = 0.02, 0.05, 3

#: Inputs of a batch, and the mean training-mode prediction for each.
_Pairs = list[tuple[Any, Tensor]]


@dataclass(frozen=True)
class LabelFree:
    """The record of a fit without labels, whose weights are set."""

    how: str  # fit-moments or fit-predictions
    train_batch_size: int
    n_examples: int
    weights: dict[str, float]  # by layer
    #: KL from the mean training-mode prediction, in nats, on held-out examples: with weight 0, and
    #: with the fitted weights; None for fit-moments.
    divergence: tuple[float, float] | None = None

    def describe(self) -> str:
        """The fit in one sentence."""
        values = sorted(self.weights.values())
        text = (
            f"{self.how}: example weights from {self.n_examples} examples in random batches of "
            f"{self.train_batch_size}, {values[0]:.3g} to {values[-1]:.3g}"
        )
        if self.divergence is None:
            return f"{text}."
        return (
            f"{text}; divergence from training-mode predictions {self.divergence[0]:.3g} with "
            f"weight 0, {self.divergence[1]:.3g} with these weights."
        )


def fit_moments_(
    model: nn.Module,
    batches: runtime.Batches,
    train_batch_size: int,
    layers: Mapping[str, GeneralizedBatchNorm],
    *,
    granularity: str = "channel",
    seed: int = 0,
) -> LabelFree:
    """Set each layer's example weight to the value that best predicts training batches' moments."""
    _check(train_batch_size, layers)
    polynomials = {name: np.zeros(5) for name in layers}
    n_examples = 0

    def look(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        values = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        mean, var, _ = example_moments(values.float())
        mean, var = over_channel_groups(centred(layer, mean), var, layer.channel_groups)
        population = layer.running_mean.float(), layer.running_var.float()
        base = over_channel_groups(*population, layer.channel_groups)
        polynomials[name] += _quartic(mean, var, base, layer.eps, train_batch_size)

    rng, device = torch.Generator().manual_seed(seed), runtime.device_of(model)
    with guards.hooks() as handles, _as_in_training(model, train_batch_size):
        for name, layer in layers.items():
            handles.append(layer.register_forward_pre_hook(partial(look, name), with_kwargs=True))
        for x in _whole(runtime.pass_of(batches, 0), train_batch_size):
            runtime.run(model, (x[torch.randperm(len(x), generator=rng)],), device)
            n_examples += len(x)
    _require_some(n_examples, train_batch_size)
    if granularity == "global":
        total = np.sum(list(polynomials.values()), axis=0)
        found = dict.fromkeys(layers, _least(total))
    else:
        found = {name: _least(polynomial) for name, polynomial in polynomials.items()}
    set_example_weight_(model, found)
    return LabelFree("fit-moments", train_batch_size, n_examples, found)


def fit_predictions_(
    model: nn.Module,
    batches: Iterable[Any],
    train_batch_size: int,
    layers: Mapping[str, GeneralizedBatchNorm],
    *,
    granularity: str = "channel",
    seed: int = 0,
) -> LabelFree:
    """Fit example weights so that inference predicts the average prediction in training mode."""
    _check(train_batch_size, layers)
    pairs = _targets(model, batches, train_batch_size, seed)
    n_examples = sum(len(target) for _, target in pairs)
    _require_some(n_examples if len(pairs) > 1 else 0, train_batch_size)
    held, learned = pairs[::4], [pair for i, pair in enumerate(pairs) if i % 4]

    def loss(weights: Mapping[str, Any], on: _Pairs) -> float:
        set_example_weight_(model, weights)
        with guards.inference(model):
            parts = [_divergence(model, x, target) for x, target in on]
        return float(torch.cat(parts).double().mean())

    def loss_of_one(a: float) -> float:
        return loss(dict.fromkeys(layers, a), learned)

    with guards.undone_on_error(nn.ModuleList(layers.values())):
        best: dict[str, Any] = dict.fromkeys(layers, 0.0)
        zero = least = loss(best, held)
        roots = {root: loss_of_one(root**2) for root in (0.0, 0.15, 0.3, 0.5, 0.7, 0.9)}
        one = dict.fromkeys(layers, best_root(loss_of_one, roots, n_steps=6) ** 2)
        if (now := loss(one, held)) < least:
            best, least = one, now
        if granularity != "global":
            set_example_weight_(model, best)
            for weights in _descent(model, layers, learned):
                now = loss(weights, held)
                if now < least:
                    best, least = weights, now
        set_example_weight_(model, best)
    found = {name: float(weight) for name, weight in best.items()}
    return LabelFree(
        how="fit-predictions",
        train_batch_size=train_batch_size,
        n_examples=n_examples,
        weights=found,
        divergence=(zero, least),
    )


def _check(train_batch_size: int, layers: Mapping[str, GeneralizedBatchNorm]) -> None:
    if train_batch_size < 2:
        raise ConfigError(
            f"--train-batch-size: {train_batch_size}, expected at least 2 to fit example weights. "
            "Batches of 1 normalize an example by its own statistics: give --example-weight 1.",
            name="train_batch_size",
        )
    if not layers:
        raise NormError("example weight: the model has no layer that can weigh the example.")


def _require_some(n_examples: int, train_batch_size: int) -> None:
    if n_examples == 0:
        raise DataError(
            f"example weight: too few examples to fit and to check with batches of "
            f"{train_batch_size}. Give more data, or a larger --batch-size."
        )


@contextmanager
def _as_in_training(model: nn.Module, size: int) -> Iterator[None]:
    """Let norm layers normalize runs of ``size`` examples; all other layers run as in inference."""
    layers = [layer for _, layer in generalized_norms(model) if not layer.frozen]
    before = [(layer.ghost_size, layer.track_running_stats) for layer in layers]
    with guards.inference(model):
        try:
            for layer in layers:
                # Without tracking, the running moments are neither used nor changed.
                layer.training, layer.ghost_size, layer.track_running_stats = True, size, False
            yield
        finally:
            for layer, settings in zip(layers, before, strict=True):
                layer.ghost_size, layer.track_running_stats = settings


def _whole(batches: Iterable[Any], size: int) -> Iterator[Any]:
    """Inputs of the first batches, each cut to a multiple of ``size``."""
    n_examples = 0
    for batch in batches:
        if masks.mask_in(batch):
            raise DataError(
                "example weight: the batches have a mask or lengths, expected unpadded batches to "
                "fit without labels. Use --example-weight auto, match or a number."
            )
        x = runtime.unpack(batch)[0]
        x = x[: len(x) - len(x) % size]
        if len(x):
            yield x
        n_examples += len(x)
        if n_examples >= MOST_EXAMPLES:
            return


def _quartic(
    mean: Tensor, var: Tensor, base: tuple[Tensor, Tensor], eps: float, size: int
) -> np.ndarray:
    """Coefficients of J(a) from a^0, summed over examples; moments ``(N, C)`` in runs."""
    n, channels = mean.shape
    runs = (n // size, size, channels)
    batch_mean, batch_var = mix(mean.view(runs), var.view(runs), dim=1)
    scale = base[1] + eps
    # Relative to the population: d, e of the example's and batch's means, v, w of the variances.
    d = ((mean - base[0]) / scale.sqrt()).double()
    v = ((var - base[1]) / scale).double()
    e = ((batch_mean - base[0]) / scale.sqrt()).double().repeat_interleave(size, 0)
    w = ((batch_var - base[1]) / scale).double().repeat_interleave(size, 0)
    # mean(a) = a d, var(a) = a q - a^2 d^2 with q = v + d^2.
    q, dd = v + d.square(), d.square()
    terms = (
        e.square() + w.square() / 2,
        -2 * e * d - w * q,
        dd + q.square() / 2 + w * dd,
        -q * dd,
        dd.square() / 2,
    )
    # A mean over channels, so that wide and narrow layers count equally in a common weight.
    return np.array([float(term.mean(1).sum()) for term in terms])


def _least(coefficients: np.ndarray) -> float:
    """The minimizer in [0, 1] of a polynomial, given by its coefficients from the constant."""
    polynomial = np.polynomial.Polynomial(coefficients)
    roots = np.asarray(polynomial.deriv().roots(), dtype=np.complex128)
    inside = [float(r.real) for r in roots if abs(r.imag) < 1e-9 and 0 < r.real < 1]
    return min([0.0, 1.0, *inside], key=lambda a: float(polynomial(a)))


def _targets(model: nn.Module, batches: Iterable[Any], size: int, seed: int) -> _Pairs:
    """Inputs, and their mean softmax over random training-mode batches."""
    rng = torch.Generator().manual_seed(seed)
    device = runtime.device_of(model)
    pairs: _Pairs = []
    for x in _whole(batches, size):
        total: Any = 0.0
        with _as_in_training(model, size):
            for _ in range(N_DRAWS):
                order = torch.randperm(len(x), generator=rng)
                output = runtime.logits_of(runtime.run(model, (x[order],), device))
                total = total + output.double().softmax(1)[order.argsort().to(output.device)]
        pairs.append((x, total / N_DRAWS))
    return pairs


def _divergence(model: nn.Module, x: Any, target: Tensor) -> Tensor:
    """KL divergence ``(N,)`` of the model's predictions from the target."""
    output = runtime.logits_of(runtime.run(model, (x,), runtime.device_of(model)))
    return F.kl_div(output.log_softmax(1), target.to(output.dtype), reduction="none").sum(1)


def _descent(
    model: nn.Module, layers: Mapping[str, GeneralizedBatchNorm], pairs: _Pairs
) -> list[dict[str, Tensor]]:
    """Learn one weight per layer by projected Adam; return the weights after every epoch."""
    ends: list[dict[str, Tensor]] = []
    n_steps = _EPOCHS * len(pairs)
    trainable = trainable_weights(layers, "layer", _START)
    with descent(model, layers, trainable, _LR, n_steps) as (leaves, step):
        for _ in range(_EPOCHS):
            for x, target in pairs:
                _divergence(model, x, target).mean().backward()  # type: ignore[no-untyped-call]
                step()
            ends.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
    return ends
