"""`WeightSearch`: the ways to find example weights on labelled examples, and what they cost.

One weight for all layers by bracketed search over a part of the batches; one a layer or a channel
by gradient, projected to [0, 1]; and which layers may go back to 0.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError, ModelError
from bnfix.core.settings import WeightRecipe
from bnfix.metrics.evaluate import Score, labels_of, score
from bnfix.metrics.intervals import Array
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_, trainable_weights

#: Batches that a fit of few numbers uses at least.
_LEAST_BATCHES = 8
_COARSE = (0.01, 0.03, 0.1, 0.3)


@dataclass(frozen=True)
class CurvePoint:
    """The loss at one weight for the model, on the fit examples."""

    example_weight: float
    nll: float
    top1: float


class WeightSearch:
    """Finds weights of some layers on labelled examples, and counts what that costs."""

    def __init__(
        self,
        model: nn.Module,
        layers: dict[str, GeneralizedBatchNorm],
        monitor: Iterable[Any],
        learn: runtime.Batches,
        forward: runtime.Forward | None,
        precision: str,  # of evaluation; learning is in fp32
    ) -> None:
        self.model, self.layers, self.forward, self.precision = model, layers, forward, precision
        self.monitor, self.learn = monitor, learn
        self.n_batches = self.n_examples = self.n_watched = 0
        self.n_run = 0  # examples; with gradients three times
        self.seconds_an_example = 0.0

    def one_weight(self) -> tuple[CurvePoint, ...]:
        """One weight for all layers by bracketed search; leaves the best one set."""
        points: dict[float, CurvePoint] = {}
        self._count()

        def loss(a: float) -> float:
            if a not in points:
                set_example_weight_(self.model, dict.fromkeys(self.layers, a))
                # One number needs few examples: a part of the batches is as good, and cheaper.
                part = itertools.islice(runtime.pass_of(self.learn, 0), self._part(3))
                found = self._score(part)
                points[a] = CurvePoint(a, found.nll, found.top1)
            return points[a].nll

        started = time.perf_counter()
        loss(0.0)
        self.seconds_an_example = (time.perf_counter() - started) / max(self.n_run, 1)
        for a in _COARSE:
            loss(a)
        best_root(loss, {a**0.5: point.nll for a, point in points.items()}, n_steps=5)
        best = min(points, key=lambda a: points[a].nll)
        set_example_weight_(self.model, dict.fromkeys(self.layers, best))
        return tuple(points[a] for a in sorted(points))

    def thin(self, part: float, squares: dict[str, Tensor]) -> None:
        """Set layers back to 0 that hardly matter: a layer with weight 0 costs nothing.

        In the order of their Wald statistics, sum over channels of a^2 E[(dL/da)^2], as many as
        together, with a standard error, give up less than ``part`` of what the weights have gained
        on the monitor examples. (Channels cannot be told apart so: nearly every single one is
        insignificant, and all of them together are the gain.)
        """
        weights = {name: layer.example_weight for name, layer in self.layers.items()}
        wald = {n: float((w.square() * squares.get(n, 0.0)).sum()) for n, w in weights.items()}
        order = sorted(wald, key=lambda name: wald[name])
        order = [name for name in order if bool((weights[name] > 0).any())]

        def without(n: int) -> Array:
            zeros = {name: torch.zeros(()) for name in order[:n]}
            set_example_weight_(self.model, {**weights, **zeros})
            return self._score(self.monitor).losses

        def lost(n: int) -> float:
            difference = without(n) - full
            # That it seems to have helped is chance; a loss that hides in the noise is not ruled
            # out, and the less so the fewer the examples.
            error = float(difference.std() / np.sqrt(len(difference)))
            return max(float(difference.mean()), 0.0) + error

        if not part or not order:
            return
        full = without(0)
        limit = part * max(float((without(len(order)) - full).mean()), 0.0)
        low, high = 0, len(order)  # low layers are known to be dispensable, high are not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if lost(middle) <= limit else (low, middle)
        zeros = {name: torch.zeros(()) for name in order[:low]}
        set_example_weight_(self.model, {**weights, **zeros})

    def learned(self, granularity: str, recipe: WeightRecipe) -> dict[str, Tensor]:
        """Weights per layer or channel by projected Adam; leaves the best epoch's set."""
        device = runtime.device_of(self.model)
        best_loss = np.inf
        best: dict[str, Tensor] = {}
        squares: dict[str, Tensor] = {}
        # One number a layer needs fewer examples than one a channel.
        part = self.n_batches if granularity == "channel" else self._part(2)
        epochs = recipe.epochs if granularity == "channel" else min(1, recipe.epochs)
        with (
            guards.random_kept(self.model),
            descent(
                self.model, self.layers, granularity, recipe.start, recipe.lr, part * epochs
            ) as (leaves, step),
        ):
            for epoch in range(epochs):
                squares = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
                batches = itertools.islice(runtime.pass_of(self.learn, epoch), part)
                for batch in distributed.in_step(batches):
                    n = 0 if batch is None else runtime.n_examples_of(batch)
                    loss = partial(self._loss, batch, device)
                    if distributed.here().shared:
                        distributed.backward_([loss], [n], leaves.values())
                    else:
                        loss().backward()  # type: ignore[no-untyped-call]
                    for name, leaf in leaves.items():
                        if leaf.grad is not None:
                            squares[name] += leaf.grad.square()
                    step()
                now = self._score(self.monitor).nll
                if now < best_loss:
                    best_loss = now
                    best = {name: leaf.detach().clone() for name, leaf in leaves.items()}
        if best:
            set_example_weight_(self.model, best)
        return squares

    def _part(self, n: int) -> int:
        """Batches in an n-th of a pass, but not too few of them."""
        return max(1, self.n_batches // n, min(self.n_batches, _LEAST_BATCHES))

    def _loss(self, batch: Any, device: torch.device) -> Tensor:
        logits = runtime.logits_of(runtime.run(self.model, batch, device, self.forward))
        labels = labels_of(batch, *logits.shape, model=None if self.forward else self.model)
        if labels is None:
            raise DataError("example weight: a batch has no labels to learn from. Give (x, y).")
        if not logits.requires_grad:
            raise ModelError(
                "example weight: the model's output has no gradient in the weights. Look for "
                "no_grad or detach in the model, or use --granularity global."
            )
        self.n_run += 3 * len(labels) * distributed.here().size
        return F.cross_entropy(logits.float(), torch.from_numpy(labels).to(device))

    def _score(self, batches: Iterable[Any]) -> Score:
        found = score(self.model, batches, forward=self.forward, precision=self.precision)
        self.n_run += found.n_examples
        return found

    def _count(self) -> None:
        """Batches and examples of a pass, counted once."""
        if not self.n_batches:
            for batch in runtime.pass_of(self.learn, 0):
                self.n_batches += 1
                self.n_examples += runtime.n_examples_of(batch)
            self.n_watched = sum(runtime.n_examples_of(batch) for batch in self.monitor)
            # Ranks go through their batches side by side.
            counts = distributed.gather((self.n_batches, self.n_examples, self.n_watched))
            self.n_batches = max(n for n, *_ in counts)
            self.n_examples = sum(n for _, n, _ in counts)
            self.n_watched = sum(n for *_, n in counts)


def best_root(
    loss: Callable[[float], float], losses: Mapping[float, float], n_steps: int
) -> tuple[float, float]:
    """The root of the best weight, and its loss, by steps between the neighbours of the best root.

    Over the root of the weight the curve is flatter, and the resolution near 0 finer.
    """
    best = min(losses, key=lambda root: losses[root])
    low = max((root for root in losses if root < best), default=0.0)
    high = min((root for root in losses if root > best), default=1.0)
    found = minimize_scalar(
        lambda root: loss(float(root) ** 2),
        bounds=(low, high),
        method="bounded",
        options={"maxiter": n_steps, "xatol": 0.01},
    )
    return min((losses[best], best), (float(found.fun), float(found.x)))[::-1]


@contextmanager
def descent(
    model: nn.Module,
    layers: Mapping[str, GeneralizedBatchNorm],
    granularity: str,
    start: float,
    lr: float,
    n_steps: int,
) -> Iterator[tuple[dict[str, Tensor], Callable[[], None]]]:
    """Example weights as leaves, in evaluation, and a step of Adam on them, projected to [0, 1]."""
    with (
        guards.modes_kept(model),
        guards.state_kept(model, but=list(layers.values())),
        trainable_weights(dict(layers), granularity, start) as leaves,
        guards.only_these_require_grad(model, list(leaves.values())),
    ):
        model.eval()
        optimizer = torch.optim.Adam(leaves.values(), lr=lr)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, n_steps))

        @torch.no_grad()
        def step() -> None:
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            for leaf in leaves.values():
                leaf.clamp_(0, 1)

        yield leaves, step
