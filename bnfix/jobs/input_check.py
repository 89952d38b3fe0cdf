"""A cheap look at the first images: are they what the model's first norm layer expects?"""

from __future__ import annotations

from contextlib import suppress
from math import exp, log
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import DataError
from bnfix.core.settings import Preprocessing
from bnfix.data.batches import Batch, Batches
from bnfix.data.images import Images
from bnfix.norm.sites import sites_with_statistics

#: Images looked at, and how few say nothing.
N_EXAMPLES = 32
_FEWEST = 8
# Sound data has been seen to be up to 0.3 deviations and a factor of 2 in the variance away, other
# preprocessing (no mean and deviation, pixels not divided by 255) a factor of 4 and far more.
_MAX_SHIFT = 1.0
_MAX_LOG_VAR = log(4.0)
_MAX_SIZE = 1.5
_DEAD = 1e-3  # of the median variance: such channels say nothing


class _Seen(BaseException):
    """Ends a pass once the layer is reached; no Exception, which the model might catch."""


def first_batch(images: Images, preprocessing: Preprocessing | None, seed: int) -> Batch | None:
    """A few images, drawn at random."""
    drawn = np.sort(np.random.default_rng(seed).permutation(len(images))[:N_EXAMPLES])
    batches = Batches(
        images, drawn, preprocessing, batch_size=N_EXAMPLES, workers=0, max_bad=len(drawn)
    )
    try:
        return next(iter(batches))
    except DataError:
        return None


def look_at_inputs(model: nn.Module, batch: Any, *, as_given: bool = False) -> str | None:
    """A sentence where the first images do not fit the running statistics of the first norm layer.

    Per channel: z = (batch_mean - mean) / sqrt(var + eps), r = (batch_var + eps) / (var + eps), all
    biased, over N, H and W, in float64. A mismatch is rms(z) > 1 or median(|log r|) > log 4.
    """
    site = next(sites_with_statistics(model), None)
    if site is None or runtime.n_examples_of(batch) < _FEWEST:
        return None
    mean, var = (getattr(site.module, name) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    if not bool(mean.any()) and bool((var == 1).all()):
        return None  # never updated
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            inputs.append(arguments[0].detach())
        raise _Seen

    with guards.inference(model), guards.hooks() as hooks, suppress(_Seen):
        hooks.append(site.module.register_forward_pre_hook(keep))
        runtime.run(model, batch, runtime.device_of(model))
    if not inputs or inputs[0].ndim < 2 or inputs[0].shape[1] != len(mean):
        return None
    eps = float(getattr(site.module, "eps", 1e-5))
    shift, log_var = _distance(inputs[0], mean, var, eps)
    if shift <= _MAX_SHIFT and abs(log_var) <= _MAX_LOG_VAR:
        return None
    values = [tensor.float() for tensor in runtime.tensors_in(batch.x)]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    words = ("examples", "", "inputs are not prepared as in the training") if as_given else (
        "images", " after preprocessing",
        "preprocessing is not the one of the training (--preset, or --mean, --std, --scale)",
    )  # fmt: skip
    return (
        f"{runtime.n_examples_of(batch)} {words[0]}, {low:.3g} to {high:.3g}{words[1]}, do not "
        f"look like what {site.name} has stored: means {shift:.2g} deviations away, deviations "
        f"{exp(log_var / 2):.2g} times as large. Either the {words[2]}, or the data or the stored "
        "statistics are of another kind."
    )


def look_at_size(shape: tuple[int, ...], expected: tuple[int, int] | None) -> str | None:
    """A sentence where the inputs are of another size than the published weights are for."""
    if expected is None or len(shape) < 4 or min(*shape[-2:], *expected) < 1:
        return None
    ratio = max(shape[-2] / expected[0], expected[0] / shape[-2])
    if ratio <= _MAX_SIZE:
        return None
    return (
        f"inputs are {shape[-2]}x{shape[-1]}, the model's published weights are for "
        f"{expected[0]}x{expected[1]} (--resize and --crop, or --preset, to change)."
    )


def _distance(inputs: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[float, float]:
    """Root mean square of z and median of log r over the channels that are alive."""
    values = inputs.double().cpu().transpose(0, 1).flatten(1)
    mean, var = mean.detach().double().cpu(), var.detach().double().cpu()
    alive = var > _DEAD * var.median()
    z = (values.mean(1) - mean) / (var + eps).sqrt()
    log_r = ((values.var(1, correction=0) + eps) / (var + eps)).log()
    if not bool(alive.any()):
        return 0.0, 0.0
    return float(z[alive].square().mean().sqrt()), float(log_r[alive].median())
