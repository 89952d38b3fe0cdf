"""Streamed moments of layer inputs: over all values, and over examples for standard errors."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import torch
from torch import Tensor

from bnfix.core import distributed, runtime
from bnfix.core.errors import DataError
from bnfix.core.options import require
from bnfix.norm.moments import LOST, Moments, column_moments, mean_squares, mix, pool, shares

#: Numbers (examples times channels) that are buffered before they are added to a layer's sums.
_WAITING = 1 << 18
#: Numbers that are centred at once on the CPU, few enough to stay in its caches.
_CHUNK = 1 << 19


class Accumulator:
    """Streams one layer's pooled input moments, and its per-example moments for standard errors."""

    def __init__(self, shift: Tensor) -> None:
        # Per-example means are taken relative to the first batch's mean, so none of them is large.
        self._shift = shift
        none, rows = shift.new_zeros(()), shift.new_zeros(3, shift.numel())
        self._values = Moments(none, torch.zeros_like(shift), torch.zeros_like(shift))
        self._examples = Moments(none, rows, rows)
        self._waiting: list[tuple[Tensor, ...]] = []
        self._positions = self._n_waiting = 0
        #: With padded batches: the number of examples. Each is weighted by its valid positions.
        self._n_masked: int | None = None

    def add(self, mean: Tensor, var: Tensor, positions: int, count: Tensor | None = None) -> None:
        """Add one call's per-example moments ``(N, C)``, float64, each over ``positions`` values.

        ``count`` ``(N,)``: the number of valid positions, if the batch is padded.
        """
        if (count is None) != (self._n_masked is None):
            if self._n_waiting or float(self._values.count):
                raise _mixed_up()
            self._n_masked = 0
        if count is not None:
            positions = 0  # examples of all lengths share one buffer
        # Many small sums cost more than one large sum, so examples are buffered.
        if positions != self._positions or self._n_waiting * mean.shape[1] >= _WAITING:
            self._flush()
        self._positions = positions
        self._waiting.append((mean, var) if count is None else (mean, var, count))
        self._n_waiting += mean.shape[0]

    def _flush(self) -> None:
        if not self._waiting:
            return
        mean, var, *counts = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        n = mean.new_full((), float(mean.shape[0]))
        n_values, share, square = n * self._positions, None, None
        for count in counts:
            self._n_masked = (self._n_masked or 0) + len(count)
            # The error of a mean of means with weights w sums their squares times w^2.
            n_values, n = count.double().sum(), count.double().square().sum()
            share, square = shares(count), shares(count.double().square()).unsqueeze(-1)
        self._values = pool([self._values, Moments(n_values, *mix(mean, var, share))])
        d = mean - self._shift
        r = var + d.square()
        # The variances of d, r and d + r give the covariance, so one mixing rule is enough.
        rows = torch.stack((d, r, d + r), 1)
        none = torch.zeros_like(rows)
        self._examples = pool([self._examples, Moments(n, *mix(rows, none, square))])

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """Merge these sums with others, as if one accumulator had seen everything."""
        whole = Accumulator(self._shift)
        everyone = [self, *others]
        for accumulator in everyone:
            accumulator._flush()
        numbers = [accumulator._n_masked for accumulator in everyone]
        masked = [n for n in numbers if n is not None]
        if masked and len(masked) < len(numbers):
            raise _mixed_up()
        whole._n_masked = sum(masked) if masked else None
        whole._values = pool([accumulator._values for accumulator in everyone])
        whole._examples = pool([a._examples_from(self._shift) for a in everyone])
        return whole

    def _examples_from(self, shift: Tensor) -> Moments:
        """The examples' moments as if their means had been taken relative to another shift."""
        # With d' = d - s: r' = var_i + d'^2 = r - 2 s d + s^2.
        s = shift - self._shift
        mean_d, mean_r, _ = self._examples.mean
        var_d, var_r, var_sum = self._examples.var
        covariance = (var_sum - var_d - var_r) / 2
        mean_d, mean_r = mean_d - s, mean_r - 2 * s * mean_d + s.square()
        moved_var_r = (var_r + 4 * s.square() * var_d - 4 * s * covariance).clamp_min(0)
        moved_covariance = covariance - 2 * s * var_d
        moved_sum = (var_d + moved_var_r + 2 * moved_covariance).clamp_min(0)
        return Moments(
            self._examples.count,
            torch.stack((mean_d, mean_r, mean_d + mean_r)),
            torch.stack((var_d, moved_var_r, moved_sum)),
        )

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """The complete content of the sums."""
        if summed:
            self._flush()
        sums = [self._shift]
        for moments in (self._values, self._examples):
            sums += [moments.count, moments.mean, moments.var]
        return {
            "sums": [tensor.cpu() for tensor in sums],
            "waiting": [[tensor.cpu() for tensor in row] for row in self._waiting],
            "positions": self._positions,
            "n_masked": self._n_masked,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> Accumulator:
        """Sums that continue from a saved state."""
        shift, *rest = (tensor.to(device) for tensor in state["sums"])
        self = cls(shift)
        self._values, self._examples = Moments(*rest[:3]), Moments(*rest[3:])
        self._waiting = [tuple(tensor.to(device) for tensor in row) for row in state["waiting"]]
        self._n_waiting = sum(row[0].shape[0] for row in self._waiting)
        self._n_masked = state.get("n_masked")
        self._positions = int(state["positions"])
        return self

    @property
    def values(self) -> Moments:
        """Moments over all values of a channel."""
        self._flush()
        return self._values

    @property
    def n_examples(self) -> int:
        """The number of examples, each counted once per call."""
        self._flush()
        return int(self._examples.count) if self._n_masked is None else self._n_masked

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``; with B, less Vm/B, Vm the variance of per-example means."""
        mean, var = self.values.mean, self.values.var
        if train_batch_size is None:
            return mean, var
        of_means = self._spread()[0] if self._n_masked else self._examples.var[0]
        return mean, (var - of_means / train_batch_size).clamp_min(0)

    def _spread(self) -> tuple[Tensor, Tensor]:
        """For padded examples, ``mean_i (w_i (m_i - m))^2``, w = valid positions / their mean.

        The same for ``q_i = var_i + (m_i - m)^2`` about its mean, which is the variance.
        """
        m = self._values.mean - self._shift
        (mean_d, mean_r, _), (var_d, var_r, var_sum) = self._examples.mean, self._examples.var
        var_q = var_r + 4 * m.square() * var_d - 2 * m * (var_sum - var_d - var_r)
        off_q = mean_r - 2 * m * mean_d + m.square() - self._values.var
        part = self.n_examples * self._examples.count / self._values.count.square()
        return (
            part * (var_d + (mean_d - m).square()),
            part * (var_q.clamp_min(0) + off_q.square()),
        )

    def errors(self, about: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: sd(mean_i)/sqrt(n), sd(q_i)/sqrt(n).

        The variance is taken about the mean, or about ``about`` if given.
        """
        m = (self.values.mean if about is None else about) - self._shift
        var_d, var_r, var_sum = self._examples.var
        n = float(self.n_examples)
        if n < 2:
            unknown = torch.full_like(var_d, math.inf)
            return unknown, unknown
        if self._n_masked is not None:
            of_means, of_squares = self._spread()
            return (of_means / (n - 1)).sqrt(), (of_squares / (n - 1)).sqrt()
        covariance = (var_sum - var_d - var_r) / 2
        # q_i = var_i + (mean_i - mean)^2 = r_i - 2 m d_i + m^2
        var_q = (var_r + 4 * m.square() * var_d - 4 * m * covariance).clamp_min(0)
        return (var_d / (n - 1)).sqrt(), (var_q / (n - 1)).sqrt()


def _mixed_up() -> DataError:
    return DataError(
        "batches: some have a mask or lengths and some have none, expected one kind. Give lengths "
        "in every batch; an example without padding has the length of the last axis."
    )


class Sources:
    """The batches of several sources in turn, and the source of the k-th batch of a pass.

    Sources s have moments (mean_s, var_s), pooled over their own examples, and weights w_s that sum
    to 1. They mix by the law of total variance:

        mean = sum_s w_s mean_s,  var = sum_s w_s (var_s + (mean_s - mean)^2)

    So each of the n_s examples of s weighs w_s / n_s, however many there are. No batch mixes
    sources. At each layer all sources are measured in the same pass, and mixed before the layers
    above it are normalized (sequential feed).
    """

    def __init__(self, batches: Any, weights: Sequence[float]) -> None:
        parts = list(batches) if isinstance(batches, Sequence) else []
        found = len(parts) or type(batches).__name__
        require(
            len(parts) == len(weights) >= 2,
            f"mix: {len(weights)} weights, expected a list of equally many sources of batches, at "
            f"least 2; found {found}.",
            "mix",
        )
        right = all(0 < w < 1e6 for w in weights)
        require(right, f"mix: {list(weights)}, expected numbers above 0.", "mix")
        once = any(isinstance(part, Iterator) for part in parts)
        require(not once, "mix: a stream is read only once. Give lists or loaders.", "mix")
        self._parts = parts
        self.weights = tuple(w / sum(weights) for w in weights)
        self.of: list[int] = []

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        self.of = []
        # Taken in turn, so the first batches cover all sources.
        left = dict(enumerate(iter(runtime.pass_of(part, 0)) for part in self._parts))
        while left:
            for source, batches in list(left.items()):
                try:
                    batch = next(batches)
                except StopIteration:
                    del left[source]
                    continue
                self.of.append(source)
                yield batch


class Mixed(Accumulator):
    """Separate sums of one layer's inputs for each source, and their weighted mixture."""

    def __init__(self, parts: Iterable[Accumulator], weights: Sequence[float]) -> None:
        self.parts, self._weights = list(parts), weights

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """Merge these sums with others, source by source."""
        rows = zip(self.parts, *(other.parts for other in others), strict=True)  # type: ignore[attr-defined]
        return Mixed([first.merged(rest) for first, *rest in rows], self._weights)

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """The complete content of the sums."""
        return {"parts": [part.state(summed=summed) for part in self.parts]}

    @property
    def n_examples(self) -> int:
        """The number of examples of all sources, each counted once per call."""
        return sum(part.n_examples for part in self.parts)

    @property
    def values(self) -> Moments:
        """Moments over all values of a channel, each source with its weight."""
        found = [part.values for part in self.parts]
        mean, var = torch.stack([m.mean for m in found]), torch.stack([m.var for m in found])
        mixed = mix(mean, var, mean.new_tensor(self._weights).unsqueeze(-1))
        return Moments(torch.stack([m.count for m in found]).sum(), *mixed)

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)`` of the mixture."""
        empty = [s for s, part in enumerate(self.parts, 1) if not part.n_examples]
        if empty:
            raise DataError(
                f"mix: source {empty[0]} of {len(self.parts)} gives no examples. Add examples, or "
                "remove it and its weight."
            )
        whole = self.values
        return whole.mean, whole.var

    def errors(self, about: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: the sources' errors, by weight."""
        about = self.values.mean if about is None else about
        found = [part.errors(about) for part in self.parts]
        weights = found[0][0].new_tensor(self._weights).unsqueeze(-1)
        rows = (torch.stack(kind) for kind in zip(*found, strict=True))
        mean, var = ((weights * se).square().sum(0).sqrt() for se in rows)
        return mean, var


class Sums:
    """The sums of all layers, and how often and in which order the batches called them."""

    def __init__(
        self,
        devices: Mapping[str, torch.device],
        sources: Sources | None = None,
        screen: Any = None,
    ) -> None:
        self._devices, self._sources, self._screen = devices, sources, screen
        self.measured: dict[str, Accumulator] = {}
        self.n_calls: dict[str, int] = {}  # most calls by one batch
        #: Layers between the first and the last call of a layer that is called again.
        self.looped: set[str] = set()
        self.most_examples = 0
        self._before: dict[str, set[str]] = {}
        self._calls: Counter[str] = Counter()

    def add(
        self, name: str, index: int, moments: tuple[Tensor, Tensor, Tensor | None], positions: int
    ) -> None:
        """Add a call's means, variances and valid-position counts, for examples that count."""
        if self._screen is not None:
            moments = self._screen.rows(name, index, moments)
        mean, var, count = moments
        if len(mean):
            sums: Any = self.measured[name]
            sums = sums if self._sources is None else sums.parts[self._sources.of[index]]
            sums.add(mean, var, positions, count)

    def begun(self, shift: Tensor) -> Accumulator:
        """New sums for a layer, shifted by its first mean."""
        if self._sources is None:
            return Accumulator(shift)
        weights = self._sources.weights
        return Mixed([Accumulator(shift) for _ in weights], weights)

    def of_state(self, name: str, state: Mapping[str, Any]) -> Accumulator:
        """A layer's sums, continued from a saved state."""
        parts = [Accumulator.of_state(p, self._devices[name]) for p in state.get("parts", [state])]
        return parts[0] if self._sources is None else Mixed(parts, self._sources.weights)

    def new_batch(self) -> None:
        """Start a new batch: calls from now on belong to it."""
        self._calls.clear()

    def count(self, name: str) -> None:
        """Record a call of a layer, and the layer called before it."""
        if not self._calls[name]:
            last = [key for key, n in self._calls.items() if n][-1:]
            self._before.setdefault(name, set()).update(last)
        else:
            so_far = list(self._calls)
            self.looped.update(so_far[so_far.index(name) :])
        self._calls[name] += 1
        self.n_calls[name] = max(self.n_calls.get(name, 0), self._calls[name])

    def order(self) -> list[str]:
        """The measured layers, each after all layers that came before it in any batch."""
        try:
            return list(TopologicalSorter(self._before).static_order())
        except CycleError:
            return list(self.measured)

    def is_first(self, name: str) -> bool:
        """Whether no other measured layer ever came before this one."""
        return not self._before[name]

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """The measured sums, in a form to send to other ranks or write to disk."""
        return {
            "measured": {name: found.state(summed=summed) for name, found in self.measured.items()},
            "n_calls": dict(self.n_calls),
            "looped": sorted(self.looped),
            "most_examples": self.most_examples,
            "before": {name: sorted(names) for name, names in self._before.items()},
        }

    def set_states_(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replace these sums by the merged sums of several states."""
        parts: dict[str, list[Accumulator]] = {}
        self.n_calls, self._before = {}, {}
        for state in states:
            self.looped.update(state["looped"])
            self.most_examples = max(self.most_examples, int(state["most_examples"]))
            for name, n in state["n_calls"].items():
                self.n_calls[name] = max(int(n), self.n_calls.get(name, 0))
            for name, names in state["before"].items():
                self._before.setdefault(name, set()).update(names)
            for name, sums in state["measured"].items():
                parts.setdefault(name, []).append(self.of_state(name, sums))
        # A single part keeps its buffer, so a resumed run continues bit for bit.
        self.measured = {
            name: first if not rest else first.merged(rest)
            for name, (first, *rest) in parts.items()
        }

    def everyones(self) -> dict[str, Accumulator]:
        """The sums of all ranks together so far; a collective call."""
        if not distributed.here().shared:
            return self.measured
        together = Sums(self._devices, self._sources)
        together.set_states_(distributed.gather(self.state(summed=True)))
        return together.measured


@torch.no_grad()
def precise_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)``, float64, of ``(N, C, L)``, accurate to about 1e-5."""
    # On the CPU, dense layouts use means of squares, for which torch has fast reductions, up to a
    # mean of four deviations; everything else uses `_refined`.
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    if values.device.type != "cpu":
        return _refined(values)
    if values.is_contiguous():
        mean = values.mean(-1).double()
        var = mean_squares(values, torch.float64) - mean.square()
    elif values.transpose(1, 2).is_contiguous():
        mean, var = (moment.double() for moment in column_moments(values.transpose(1, 2)))
    else:
        return _refined(values)
    square = mean.square()
    # Comparisons with NaN are false, so non-finite channels are recomputed too, with equal results.
    lost = ~(square <= var * LOST)
    n_lost = int(lost.sum())
    if n_lost > lost.numel() // 2:
        return _refined(values)
    if n_lost:
        mean[lost], var[lost] = (t.view(-1) for t in _refined(values[lost].unsqueeze(1)))
    return mean, var


def _refined(values: Tensor) -> tuple[Tensor, Tensor]:
    """Moments from deviations; the mean of the deviations refines the first, rough mean."""
    # At mean/std = 1e4 in float32 this keeps about seven digits of the deviation instead of three.
    n, channels, positions = values.shape
    pieces = [values]
    if values.device.type == "cpu":
        # Cache misses and new memory would cost more than the arithmetic.
        pieces = list(torch.split(values, max(1, _CHUNK // max(1, channels * positions))))
    memory = torch.empty_like(pieces[0])
    rough, left, squares = values.new_empty(3, n, channels)
    start = 0
    for piece in pieces:
        rows = slice(start, start := start + len(piece))
        centred = memory[: len(piece)]
        torch.mean(piece, -1, out=rough[rows])
        torch.sub(piece, rough[rows].unsqueeze(-1), out=centred)
        torch.sum(centred, -1, out=left[rows])
        torch.sum(centred.mul_(centred), -1, out=squares[rows])
    refined = left.double() / positions
    var = squares.double() / positions - refined.square()
    return rough.double() + refined, var.clamp_min_(0)
