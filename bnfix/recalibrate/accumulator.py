"""Moments of layers' inputs, streamed: of all values, and of the examples for the errors."""

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

#: Numbers, examples times channels, that wait to be added to a layer's sums in one go.
_WAITING = 1 << 18
#: Numbers that are centred at once on the CPU, so that they stay in its caches.
_CHUNK = 1 << 19


class Accumulator:
    """Streams the moments of one layer's inputs, pooled, and of its examples, for the errors."""

    def __init__(self, shift: Tensor) -> None:
        # Per-example means are taken from the first batch's, so that none of them is large.
        self._shift = shift
        none, rows = shift.new_zeros(()), shift.new_zeros(3, shift.numel())
        self._values = Moments(none, torch.zeros_like(shift), torch.zeros_like(shift))
        self._examples = Moments(none, rows, rows)
        self._waiting: list[tuple[Tensor, ...]] = []
        self._positions = self._n_waiting = 0
        #: Of padded batches the number of examples, which weigh by their valid positions.
        self._n_masked: int | None = None

    def add(self, mean: Tensor, var: Tensor, positions: int, count: Tensor | None = None) -> None:
        """Add one call's per-example moments ``(N, C)``, float64, each of so many positions.

        ``count`` ``(N,)``: how many of them are valid, where a batch is padded.
        """
        if (count is None) != (self._n_masked is None):
            if self._n_waiting or float(self._values.count):
                raise _mixed_up()
            self._n_masked = 0
        if count is not None:
            positions = 0  # examples of all lengths may wait together
        # Many small sums cost more than one large one, so examples wait for each other.
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
            # The error of a mean of means that weigh w is made of their squares by w^2.
            n_values, n = count.double().sum(), count.double().square().sum()
            share, square = shares(count), shares(count.double().square()).unsqueeze(-1)
        self._values = pool([self._values, Moments(n_values, *mix(mean, var, share))])
        d = mean - self._shift
        r = var + d.square()
        # Variances of d, r and d + r give their covariance, by the one mixing rule.
        rows = torch.stack((d, r, d + r), 1)
        none = torch.zeros_like(rows)
        self._examples = pool([self._examples, Moments(n, *mix(rows, none, square))])

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """These sums and those of others together, as if one had seen all."""
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
        """The moments of the examples as if their means had been taken from another shift."""
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
        """All that the sums hold."""
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
        """Sums that go on from a state."""
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
        """Of all values of a channel together."""
        self._flush()
        return self._values

    @property
    def n_examples(self) -> int:
        """Examples, each counted once a call."""
        self._flush()
        return int(self._examples.count) if self._n_masked is None else self._n_masked

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``; less Vm/B, Vm the variance of the examples' means, for B."""
        mean, var = self.values.mean, self.values.var
        if train_batch_size is None:
            return mean, var
        of_means = self._spread()[0] if self._n_masked else self._examples.var[0]
        return mean, (var - of_means / train_batch_size).clamp_min(0)

    def _spread(self) -> tuple[Tensor, Tensor]:
        """Of padded examples: ``mean_i (w_i (m_i - m))^2``, w the valid positions by their mean.

        The same of ``q_i = var_i + (m_i - m)^2`` about its mean, the variance.
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

        The variance is that about the mean, or about the point given.
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
        "batches: some have a mask or lengths and some have none, expected one kind. Give all of "
        "them lengths; that of an example without padding is the length of the last axis."
    )


class Sources:
    """The batches of several sources in turn, and which source the k-th batch of a pass is of.

    Sources s with moments (mean_s, var_s), pooled over their own examples, and weights w_s, their
    sum 1, mix by the law of total variance:

        mean = sum_s w_s mean_s,  var = sum_s w_s (var_s + (mean_s - mean)^2)

    So each of the n_s examples of s weighs w_s / n_s, however many there are. No batch holds
    examples of two sources; at each layer all of them are measured in the same pass, and mixed
    before those above it are normalized (sequential feed).
    """

    def __init__(self, batches: Any, weights: Sequence[float]) -> None:
        parts = list(batches) if isinstance(batches, Sequence) else []
        found = len(parts) or type(batches).__name__
        require(
            len(parts) == len(weights) >= 2,
            f"mix: {len(weights)} weights, expected a list of as many sources of batches, at least "
            f"2; found {found}.",
            "mix",
        )
        right = all(0 < w < 1e6 for w in weights)
        require(right, f"mix: {list(weights)}, expected numbers above 0.", "mix")
        once = any(isinstance(part, Iterator) for part in parts)
        require(not once, "mix: a stream is read once. Give lists or loaders.", "mix")
        self._parts = parts
        self.weights = tuple(w / sum(weights) for w in weights)
        self.of: list[int] = []

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def __iter__(self) -> Iterator[Any]:
        self.of = []
        # In turn, so that the first batches are of all sources.
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
    """Sums of one layer's inputs for each source apart, and their mixture by the weights."""

    def __init__(self, parts: Iterable[Accumulator], weights: Sequence[float]) -> None:
        self.parts, self._weights = list(parts), weights

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """These sums and those of others together, source by source."""
        rows = zip(self.parts, *(other.parts for other in others), strict=True)  # type: ignore[attr-defined]
        return Mixed([first.merged(rest) for first, *rest in rows], self._weights)

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """All that the sums hold."""
        return {"parts": [part.state(summed=summed) for part in self.parts]}

    @property
    def n_examples(self) -> int:
        """Examples of all sources, each counted once a call."""
        return sum(part.n_examples for part in self.parts)

    @property
    def values(self) -> Moments:
        """All values of a channel, those of a source by its weight."""
        found = [part.values for part in self.parts]
        mean, var = torch.stack([m.mean for m in found]), torch.stack([m.var for m in found])
        mixed = mix(mean, var, mean.new_tensor(self._weights).unsqueeze(-1))
        return Moments(torch.stack([m.count for m in found]).sum(), *mixed)

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)`` of the mixture."""
        empty = [s for s, part in enumerate(self.parts, 1) if not part.n_examples]
        if empty:
            raise DataError(
                f"mix: source {empty[0]} of {len(self.parts)} gives no examples. Give it some, or "
                "leave it and its weight out."
            )
        whole = self.values
        return whole.mean, whole.var

    def errors(self, about: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: those of the sources, by their weights."""
        about = self.values.mean if about is None else about
        found = [part.errors(about) for part in self.parts]
        weights = found[0][0].new_tensor(self._weights).unsqueeze(-1)
        rows = (torch.stack(kind) for kind in zip(*found, strict=True))
        mean, var = ((weights * se).square().sum(0).sqrt() for se in rows)
        return mean, var


class Sums:
    """The sums of all layers, and how often and in which order batches have called them."""

    def __init__(
        self,
        devices: Mapping[str, torch.device],
        sources: Sources | None = None,
        screen: Any = None,
    ) -> None:
        self._devices, self._sources, self._screen = devices, sources, screen
        self.measured: dict[str, Accumulator] = {}
        self.n_calls: dict[str, int] = {}  # by one batch, at most
        #: Layers from the first call to the last of one that is called again.
        self.looped: set[str] = set()
        self.most_examples = 0
        self._before: dict[str, set[str]] = {}
        self._calls: Counter[str] = Counter()

    def add(
        self, name: str, index: int, moments: tuple[Tensor, Tensor, Tensor | None], positions: int
    ) -> None:
        """Add a call's means, variances and counts of valid positions, of examples that count."""
        if self._screen is not None:
            moments = self._screen.rows(name, index, moments)
        mean, var, count = moments
        if len(mean):
            sums: Any = self.measured[name]
            sums = sums if self._sources is None else sums.parts[self._sources.of[index]]
            sums.add(mean, var, positions, count)

    def begun(self, shift: Tensor) -> Accumulator:
        """A layer's sums, by its first mean."""
        if self._sources is None:
            return Accumulator(shift)
        weights = self._sources.weights
        return Mixed([Accumulator(shift) for _ in weights], weights)

    def of_state(self, name: str, state: Mapping[str, Any]) -> Accumulator:
        """A layer's sums that go on from a state."""
        parts = [Accumulator.of_state(p, self._devices[name]) for p in state.get("parts", [state])]
        return parts[0] if self._sources is None else Mixed(parts, self._sources.weights)

    def new_batch(self) -> None:
        """Calls from now on belong to another batch."""
        self._calls.clear()

    def count(self, name: str) -> None:
        """Note a call of a layer, and which one came before it."""
        if not self._calls[name]:
            last = [key for key, n in self._calls.items() if n][-1:]
            self._before.setdefault(name, set()).update(last)
        else:
            so_far = list(self._calls)
            self.looped.update(so_far[so_far.index(name) :])
        self._calls[name] += 1
        self.n_calls[name] = max(self.n_calls.get(name, 0), self._calls[name])

    def order(self) -> list[str]:
        """The layers measured, each after all that came before it in any batch."""
        try:
            return list(TopologicalSorter(self._before).static_order())
        except CycleError:
            return list(self.measured)

    def is_first(self, name: str) -> bool:
        """Whether no other layer measured ever came before this one."""
        return not self._before[name]

    def state(self, *, summed: bool = False) -> dict[str, Any]:
        """What was measured, to be sent to other ranks or written."""
        return {
            "measured": {name: found.state(summed=summed) for name, found in self.measured.items()},
            "n_calls": dict(self.n_calls),
            "looped": sorted(self.looped),
            "most_examples": self.most_examples,
            "before": {name: sorted(names) for name, names in self._before.items()},
        }

    def set_states_(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replace what was measured by what others have, taken together."""
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
        # One part stays as it is, with what still waits: so a run goes on bit for bit.
        self.measured = {
            name: first if not rest else first.merged(rest)
            for name, (first, *rest) in parts.items()
        }

    def everyones(self) -> dict[str, Accumulator]:
        """What all ranks together have measured so far; a collective call."""
        if not distributed.here().shared:
            return self.measured
        together = Sums(self._devices, self._sources)
        together.set_states_(distributed.gather(self.state(summed=True)))
        return together.measured


@torch.no_grad()
def precise_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance ``(N, C)``, float64, of ``(N, C, L)``, right to about 1e-5."""
    # On the CPU dense layouts go by means of squares, the reductions that torch is fast at there,
    # up to a mean of four deviations; all else by `_refined`.
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
    # NaN is not at most anything, so what is not finite is done over too, and stays what it is.
    lost = ~(square <= var * LOST)
    n_lost = int(lost.sum())
    if n_lost > lost.numel() // 2:
        return _refined(values)
    if n_lost:
        mean[lost], var[lost] = (t.view(-1) for t in _refined(values[lost].unsqueeze(1)))
    return mean, var


def _refined(values: Tensor) -> tuple[Tensor, Tensor]:
    """By deviations from the mean, which is refined by the mean of what it leaves."""
    # At mean/std = 1e4 in float32 it so keeps about seven digits of the deviation, not three.
    n, channels, positions = values.shape
    pieces = [values]
    if values.device.type == "cpu":
        # What does not fit the caches, and new memory for it, would cost more than the arithmetic.
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
