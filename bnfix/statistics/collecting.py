"""Hooks that measure what norm layers meet, and hand them the moments to normalize by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnfix import guards, processes, runtime
from bnfix.errors import NormError, NumericError
from bnfix.layers.norms import GeneralizedBatchNorm, over_channel_groups
from bnfix.layers.sites import NormSite
from bnfix.moments import Moments, mix, pool

#: Examples that wait to be added to a layer's sums in one go.
_WAITING = 1024
#: Numbers that are centred at once on the CPU, so that they stay in its caches.
_CHUNK = 1 << 18


class Accumulator:
    """Streams the moments of one layer's inputs, pooled, and of its examples, for the errors."""

    def __init__(self, shift: Tensor) -> None:
        # Per-example means are taken from the first batch's, so that none of them is large.
        self._shift = shift
        none, rows = shift.new_zeros(()), shift.new_zeros(3, shift.numel())
        self._values = Moments(none, torch.zeros_like(shift), torch.zeros_like(shift))
        self._examples = Moments(none, rows, rows)
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._positions = self._n_waiting = 0

    def add(self, mean: Tensor, var: Tensor, positions: int) -> None:
        """Add one call's per-example moments ``(N, C)``, float64, each of so many positions."""
        # Many small sums cost more than one large one, so examples wait for each other.
        if positions != self._positions or self._n_waiting >= _WAITING:
            self._flush()
        self._positions = positions
        self._waiting.append((mean, var))
        self._n_waiting += mean.shape[0]

    def _flush(self) -> None:
        if not self._waiting:
            return
        mean, var = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        n = mean.new_tensor(float(mean.shape[0]))
        self._values = pool([self._values, Moments(n * self._positions, *mix(mean, var))])
        d = mean - self._shift
        r = var + d.square()
        # Variances of d, r and d + r give their covariance, by the one mixing rule.
        rows = torch.stack((d, r, d + r), 1)
        self._examples = pool([self._examples, Moments(n, *mix(rows, torch.zeros_like(rows)))])

    def merged(self, others: Sequence[Accumulator]) -> Accumulator:
        """These sums and those of others together, as if one had seen all.

        Args:
            others: of the same layer, from other examples.

        Returns:
            A new accumulator; these stay as they are.
        """
        whole = Accumulator(self._shift)
        everyone = [self, *others]
        for accumulator in everyone:
            accumulator._flush()
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

    def state(self) -> dict[str, Any]:
        """All that the sums hold, to go on from bit for bit.

        Returns:
            Tensors on the CPU, and numbers.
        """
        sums = [self._shift]
        for moments in (self._values, self._examples):
            sums += [moments.count, moments.mean, moments.var]
        return {
            "sums": [tensor.cpu() for tensor in sums],
            "waiting": [[mean.cpu(), var.cpu()] for mean, var in self._waiting],
            "positions": self._positions,
        }

    @classmethod
    def of_state(cls, state: Mapping[str, Any], device: torch.device) -> Accumulator:
        """Sums that go on from a state.

        Args:
            state: from `state`.
            device: where the layer's inputs are.

        Returns:
            The accumulator.
        """
        shift, *rest = (tensor.to(device) for tensor in state["sums"])
        self = cls(shift)
        self._values, self._examples = Moments(*rest[:3]), Moments(*rest[3:])
        self._waiting = [(mean.to(device), var.to(device)) for mean, var in state["waiting"]]
        self._n_waiting = sum(mean.shape[0] for mean, _ in self._waiting)
        self._positions = int(state["positions"])
        return self

    @property
    def values(self) -> Moments:
        """Of all values of a channel together."""
        self._flush()
        return self._values

    def statistics(self, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
        """Mean and variance ``(C,)``; less Vm/B, Vm the variance of the examples' means, for B."""
        mean, var = self.values.mean, self.values.var
        if train_batch_size is None:
            return mean, var
        return mean, (var - self._examples.var[0] / train_batch_size).clamp_min(0)

    def errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: sd(mean_i)/sqrt(n), sd(q_i)/sqrt(n)."""
        m = self.values.mean - self._shift
        var_d, var_r, var_sum = self._examples.var
        n = float(self._examples.count)
        if n < 2:
            unknown = torch.full_like(var_d, math.inf)
            return unknown, unknown
        covariance = (var_sum - var_d - var_r) / 2
        # q_i = var_i + (mean_i - mean)^2 = r_i - 2 m d_i + m^2
        var_q = (var_r + 4 * m.square() * var_d - 4 * m * covariance).clamp_min(0)
        return (var_d / (n - 1)).sqrt(), (var_q / (n - 1)).sqrt()


class StopHereError(BaseException):
    """Ends a shortened forward pass at the layer measured; no `except Exception` may catch it."""


class Collector:
    """Hooks on the sites: measure inputs; decide what each layer normalizes by."""

    def __init__(self, sites: Sequence[NormSite], *, by_batch: bool) -> None:
        self.sites = {id(site.module): site for site in sites}
        self.by_batch = by_batch
        self.use: dict[str, tuple[Tensor, Tensor]] = {}
        self.measured: dict[str, Accumulator] = {}
        self.n_calls: dict[str, int] = {}
        self.wanted: str | None = None
        self.stops = False
        self._before: dict[str, set[str]] = {}
        self._calls: Counter[str] = Counter()
        #: Examples of the last pass that this rank has run.
        self.n_own = 0
        self.batch_index = 0
        self._to_check: list[tuple[int, str, Tensor, Tensor, Tensor]] = []
        self._own: dict[int, tuple[Any, Any]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a layer's input and hand it the moments to use; a forward pre-hook.

        Args:
            module: the layer.
            args: its positional arguments.
            kwargs: its keyword arguments.

        Raises:
            StopHereError: where a shortened pass ends.
        """
        site = self.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        use = self.use.get(site.name)
        if (self.wanted is None or site.name == self.wanted) and x.numel():
            mean, var = self.measure(site, x)
            if self.stops:
                raise StopHereError
            if self.by_batch:
                use = as_stored(site, mean, var)
        if use is not None:
            self.lend(module, use)

    def lend(self, module: nn.Module, moments: tuple[Tensor, Tensor]) -> None:
        """Let a layer normalize by these moments until its forward pass is over."""
        buffers = module._buffers
        self._own[id(module)] = buffers["running_mean"], buffers["running_var"]
        buffers["running_mean"], buffers["running_var"] = moments

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        """Give a layer its own buffers back; a forward hook.

        Args:
            module: the layer.
            args: its arguments.
            output: its output.
        """
        own = self._own.pop(id(module), None)
        if own is not None:
            module._buffers["running_mean"], module._buffers["running_var"] = own

    def state(self) -> dict[str, Any]:
        """What was measured, to be sent to other ranks or written.

        Returns:
            Plain containers, numbers and tensors on the CPU.
        """
        return {
            "measured": {name: found.state() for name, found in self.measured.items()},
            "n_calls": dict(self.n_calls),
            "before": {name: sorted(names) for name, names in self._before.items()},
        }

    def set_states_(self, states: Sequence[Mapping[str, Any]]) -> None:
        """Replace what was measured by what others have, taken together.

        Args:
            states: from `state`; of the ranks, in their order.

        Changes:
            What was measured and counted; not what layers normalize by.
        """
        devices = {site.name: device_of_site(site) for site in self.sites.values()}
        parts: dict[str, list[Accumulator]] = {}
        self.n_calls, self._before = {}, {}
        for state in states:
            for name, n in state["n_calls"].items():
                self.n_calls[name] = max(int(n), self.n_calls.get(name, 0))
            for name, names in state["before"].items():
                self._before.setdefault(name, set()).update(names)
            for name, sums in state["measured"].items():
                part = Accumulator.of_state(sums, devices[name])
                parts.setdefault(name, []).append(part)
        # One part stays as it is, with what still waits: so a run goes on bit for bit.
        self.measured = {
            name: first if not rest else first.merged(rest)
            for name, (first, *rest) in parts.items()
        }

    def everyones(self) -> dict[str, Accumulator]:
        """What all ranks together have measured so far; a collective call.

        Returns:
            By layer.
        """
        if not processes.here().shared:
            return self.measured
        together = Collector(list(self.sites.values()), by_batch=self.by_batch)
        together.set_states_(processes.gather(self.state()))
        return together.measured

    def order(self) -> list[str]:
        """The layers measured, each after all that came before it in any batch."""
        try:
            return list(TopologicalSorter(self._before).static_order())
        except CycleError:
            return list(self.measured)

    def is_first(self, name: str) -> bool:
        """Whether no other layer measured ever came before this one."""
        return not self._before[name]

    def new_batch(self, index: int) -> None:
        """Calls from now on belong to this batch."""
        self.batch_index = index
        self._calls.clear()

    def measure(self, site: NormSite, x: Tensor) -> tuple[Tensor, Tensor]:
        """Count a call and add its input to the layer's sums; return the input's own moments."""
        self._count(site.name)
        values = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        own = site.module._buffers["running_mean"]
        if own is None or own.shape != values.shape[1:2]:
            raise NormError(
                f"{site.name}: its input has shape {tuple(x.shape)}, but it keeps statistics of "
                f"shape {None if own is None else tuple(own.shape)}. Leave it with skip.",
                name=site.name,
            )
        # Pooled example by example: the spread of a group's means is not the mean of the spreads.
        mean, var = over_groups(site, *precise_moments(values))
        mixed = mix(mean, var, dim=0)
        self._to_check.append((self.batch_index, site.name, mean, var, mixed[1]))
        if site.name not in self.measured:
            self.measured[site.name] = Accumulator(mixed[0])
        self.measured[site.name].add(mean, var, values.shape[2])
        return mixed

    def _count(self, name: str) -> None:
        if not self._calls[name]:
            last = [key for key, n in self._calls.items() if n][-1:]
            self._before.setdefault(name, set()).update(last)
        self._calls[name] += 1
        self.n_calls[name] = max(self.n_calls.get(name, 0), self._calls[name])

    def check_finite(self) -> None:
        """One synchronization for all calls since the last check: raise if any was not finite."""
        calls, self._to_check = self._to_check, []
        # What is not finite in any example is not finite in the mixture either.
        if not calls or bool(torch.cat([mixed for *_, mixed in calls]).isfinite().all()):
            return
        index, name, mean, var, _ = next(c for c in calls if not bool(c[-1].isfinite().all()))
        bad = ~(mean + var).isfinite().all(1)
        raise NumericError(
            f"{name}: its input, or the square of it, is not finite in batch {_of_all(index)}, "
            f"example {int(bad.int().argmax())} (both counted from 0). Leave that example out, or "
            "use fp32.",
            name=name,
        )

    def one_pass(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: runtime.Forward | None,
        samples: int | None,
        enough: Callable[[int], bool] | None = None,
        keeper: Keeper | None = None,
    ) -> tuple[int, int]:
        """Run the batches until they end, or are enough; return examples and batches seen.

        Of several processes each runs its own batches; all end with what all have measured.

        Returns:
            Examples and batches, of all processes.
        """
        # What earlier passes have measured is everyone's already.
        earlier, self.measured = self.measured, {}
        found = None if keeper is None else keeper.finished(self)
        if found is None:
            found = self._whole_pass(model, batches, forward, samples, enough, keeper)
        self.measured = {**earlier, **self.measured}
        return found

    def _whole_pass(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: runtime.Forward | None,
        samples: int | None,
        enough: Callable[[int], bool] | None,
        keeper: Keeper | None,
    ) -> tuple[int, int]:
        """All ranks' parts of a pass, put together."""
        seen = processes.together(
            lambda: self._run(model, batches, forward, samples, enough, keeper)
        )
        if processes.here().shared:
            self.set_states_(processes.gather(self.state()))
        self.n_own = seen[processes.here().rank][0]
        n_examples, n_batches = (sum(counts) for counts in zip(*seen, strict=True))
        if keeper is not None:
            keeper.finish(self, n_examples, n_batches)
        return n_examples, n_batches

    def _run(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: runtime.Forward | None,
        samples: int | None,
        enough: Callable[[int], bool] | None,
        keeper: Keeper | None,
    ) -> tuple[int, int]:
        """This rank's part of a pass."""
        device = runtime.device_of(model)
        n_examples, n_batches, n_gone = (0, 0, 0) if keeper is None else keeper.resume_(self)
        left = None if samples is None else samples - n_examples
        rest = up_to(after(batches, n_gone), left) if left is None or left > 0 else iter(())
        looks = enough is not None and processes.here().shared
        with (
            guards.inference(model),
            guards.hooks() as handles,
            # Hooks that raise and swap buffers are nothing to compile; the model may be compiled.
            torch.compiler.set_stance("force_eager"),
        ):
            for site in self.sites.values():
                handles.append(site.module.register_forward_pre_hook(self.before, with_kwargs=True))
                handles.append(site.module.register_forward_hook(self.after, always_call=True))
            for index, batch in enumerate(processes.in_step(rest) if looks else rest, n_gone):
                measure = partial(self._one, model, batch, index, device, forward)
                n = processes.together(measure)[processes.here().rank] if looks else measure()
                n_examples, n_batches = n_examples + n, n_batches + (n > 0)
                if keeper is not None:
                    keeper.after_batch(self, n_examples, n_batches, index + 1)
                if enough is not None:
                    n_seen = sum(processes.gather(n_examples)) if looks else n_examples
                    if enough(n_seen):
                        break
        return n_examples, n_batches

    def _one(
        self,
        model: nn.Module,
        batch: Any,
        index: int,
        device: torch.device,
        forward: runtime.Forward | None,
    ) -> int:
        """Measure one batch; how many examples it has."""
        if batch is None:
            return 0
        self.new_batch(index)
        try:
            runtime.run(model, batch, device, forward)
        except StopHereError:
            pass
        finally:
            for site in self.sites.values():
                self.after(site.module, None, None)
        self.check_finite()
        return runtime.n_examples_of(batch)


class Keeper(Protocol):
    """Keeps what passes have measured, for a run that goes on after a crash."""

    def finished(self, collector: Collector) -> tuple[int, int] | None:
        """Begin a pass; where it was finished before, give its result, examples and batches."""

    def resume_(self, collector: Collector) -> tuple[int, int, int]:
        """What a begun pass has come to: examples, batches, and batches to leave out."""

    def after_batch(
        self, collector: Collector, n_examples: int, n_batches: int, n_gone: int
    ) -> None:
        """Write now and then."""

    def finish(self, collector: Collector, n_examples: int, n_batches: int) -> None:
        """Write what the whole pass has measured."""


@torch.no_grad()
def precise_moments(values: Tensor) -> tuple[Tensor, Tensor]:
    """Per-example moments whose rounding does not grow with the offset of the values.

    The mean is refined by the mean of what is left after subtracting it, so at mean/std = 1e4 in
    float32 it keeps about seven digits of the deviation instead of three.

    Args:
        values: ``(N, C, L)``.

    Returns:
        Mean and biased variance ``(N, C)``, float64.
    """
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
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


def over_groups(site: NormSite, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped layers pool their moments, and repeat them over the group's channels."""
    if isinstance(site.module, GeneralizedBatchNorm):
        return over_channel_groups(mean, var, site.module.channel_groups)
    return mean, var


def as_stored(site: NormSite, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments as the layer's buffers hold them."""
    own: Any = site.module._buffers["running_mean"]
    return mean.to(own), var.to(own)


def device_of_site(site: NormSite) -> torch.device:
    """Where a layer's statistics are.

    Args:
        site: the layer's place.

    Returns:
        The device of its running mean.
    """
    own: Any = site.module._buffers["running_mean"]
    return torch.device("cpu") if own is None else own.device


def after(batches: Iterable[Any], n: int) -> Iterable[Any]:
    """Batches without the first ones, which are not read where that can be helped.

    Args:
        batches: any; those with ``starting_at`` are asked.
        n: how many to leave out.

    Returns:
        The rest.
    """
    if not n:
        return batches
    if hasattr(batches, "starting_at"):
        rest: Iterable[Any] = batches.starting_at(n)
        return rest
    return islice(batches, n, None)


def up_to(batches: Iterable[Any], samples: int | None) -> Iterator[Any]:
    """Batches until this number of examples is reached; not one more is asked for."""
    n_examples = 0
    if samples is not None and samples <= 0:
        return
    for batch in batches:
        yield batch
        n_examples += runtime.n_examples_of(batch)
        if samples is not None and n_examples >= samples:
            return


def _of_all(index: int) -> int:
    """The place of a batch among those of all ranks, dealt one by one."""
    place = processes.here()
    return index * place.size + place.rank
