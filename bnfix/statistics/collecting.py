"""Hooks that measure what norm layers meet, and hand them the moments to normalize by."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from graphlib import CycleError, TopologicalSorter
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bnfix import guards, processes, runtime
from bnfix.errors import DataError, NormError, NumericError
from bnfix.layers.norms import GeneralizedBatchNorm
from bnfix.layers.sites import NormSite
from bnfix.moments import mix, over_channel_groups
from bnfix.statistics.accumulating import Accumulator, precise_moments
from bnfix.statistics.costs import Clock

#: Numbers that may wait, by device, to be looked at for what is not finite: a look makes the host
#: wait for the device, which on a CPU costs nothing.
UNCHECKED = {"cpu": 0, "cuda": 1 << 22}
#: Batches, from the first, whose moments a walk keeps, to compare them with those batches alone.
TRACED = 2
#: Examples after which a source without a length may be one without an end.
MOST_UNCOUNTED = 100_000


class StopHereError(BaseException):
    """Ends a shortened forward pass at the layer measured; no `except Exception` may catch it."""


class Collector:
    """Hooks on the sites: measure inputs; decide what each layer normalizes by."""

    def __init__(
        self, sites: Sequence[NormSite], *, by_batch: bool, clock: Clock | None = None
    ) -> None:
        self.clock = clock or Clock()
        self.sites = {id(site.module): site for site in sites}
        self.by_batch = by_batch
        self.use: dict[str, tuple[Tensor, Tensor]] = {}
        self.measured: dict[str, Accumulator] = {}
        self.n_calls: dict[str, int] = {}
        self.wanted: frozenset[str] | None = None
        self.stops = False
        #: Layers from the first call to the last of one that is called again.
        self.looped: set[str] = set()
        self.most_examples = 0
        #: Refuse batches that give a layer one value a channel; the first of those.
        self.is_strict = False
        self._single: tuple[str, int] | None = None
        #: Buffers and attributes that forward passes changed by themselves.
        self.changed: dict[str, None] = {}
        #: Moments of the first batches, call by call.
        self.traces: dict[int, list[tuple[str, Tensor, Tensor]]] = {}
        self._before: dict[str, set[str]] = {}
        self._calls: Counter[str] = Counter()
        #: Examples of the last pass that this rank has run.
        self.n_own = 0
        self.batch_index = 0
        self._to_check: list[tuple[int, str, Tensor, Tensor, Tensor]] = []
        self._n_to_check = 0
        self._own: dict[int, tuple[Any, Any]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Measure a layer's input and hand it the moments to use; a forward pre-hook."""
        site = self.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        use = self.use.get(site.name)
        if (self.wanted is None or site.name in self.wanted) and x.numel():
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
        """Give a layer its own buffers back; a forward hook."""
        own = self._own.pop(id(module), None)
        if own is not None:
            module._buffers["running_mean"], module._buffers["running_var"] = own

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
        """Replace what was measured by what others have, taken together.

        Changes:
            What was measured and counted; not what layers normalize by.
        """
        devices = {site.name: device_of_site(site) for site in self.sites.values()}
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
                part = Accumulator.of_state(sums, devices[name])
                parts.setdefault(name, []).append(part)
        # One part stays as it is, with what still waits: so a run goes on bit for bit.
        self.measured = {
            name: first if not rest else first.merged(rest)
            for name, (first, *rest) in parts.items()
        }

    def everyones(self) -> dict[str, Accumulator]:
        """What all ranks together have measured so far; a collective call."""
        if not processes.here().shared:
            return self.measured
        together = Collector(list(self.sites.values()), by_batch=self.by_batch)
        together.set_states_(processes.gather(self.state(summed=True)))
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
        with self.clock.measuring():
            return self._measured(site, x)

    def _measured(self, site: NormSite, x: Tensor) -> tuple[Tensor, Tensor]:
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
        self.most_examples = max(self.most_examples, len(values))
        if self.batch_index < TRACED and not self.by_batch:
            self.traces.setdefault(self.batch_index, []).append((site.name, *mixed))
        self._to_check.append((self.batch_index, site.name, mean, var, mixed[1]))
        self._n_to_check += 2 * mean.numel()
        if site.name not in self.measured:
            self.measured[site.name] = Accumulator(mixed[0])
        self.measured[site.name].add(mean, var, values.shape[2])
        if len(values) * values.shape[2] == 1:
            self._single = self._single or (site.name, self.batch_index)
        if self.is_strict and self._single and len(self.measured) > 1:
            name, index = self._single
            raise NormError(
                f"{name}: gets one value a channel in batch {_of_all(index)} (counted from 0), "
                "which under the batch feed is normalized to 0. Give larger batches, also at the "
                "end, or the sequential feed (--feed sequential).",
                name=name,
            )
        return mixed

    def _count(self, name: str) -> None:
        if not self._calls[name]:
            last = [key for key, n in self._calls.items() if n][-1:]
            self._before.setdefault(name, set()).update(last)
        else:
            so_far = list(self._calls)
            self.looped.update(so_far[so_far.index(name) :])
        self._calls[name] += 1
        self.n_calls[name] = max(self.n_calls.get(name, 0), self._calls[name])

    def check_finite(self) -> None:
        """One synchronization for all calls since the last check: raise if any was not finite."""
        calls, self._to_check, self._n_to_check = self._to_check, [], 0
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
            self.set_states_(processes.gather(self.state(summed=True)))
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
        rest = self.clock.reading(after(batches, n_gone))
        counted = left is not None or enough is not None or has_length(batches)
        most = None if counted else MOST_UNCOUNTED
        rest = up_to(rest, left, most) if left is None or left > 0 else iter(())
        looks = enough is not None and processes.here().shared
        # What is kept or decided by must be finite.
        at_once = enough is not None or keeper is not None
        with (
            guards.inference(model) as changed,
            guards.hooks() as handles,
            # Hooks that raise and swap buffers are nothing to compile; the model may be compiled.
            torch.compiler.set_stance("force_eager"),
        ):
            for site in self.sites.values():
                handles.append(site.module.register_forward_pre_hook(self.before, with_kwargs=True))
                handles.append(site.module.register_forward_hook(self.after, always_call=True))
            for index, batch in enumerate(processes.in_step(rest) if looks else rest, n_gone):
                measure = partial(self._one, model, batch, index, device, forward, at_once)
                n = processes.together(measure)[processes.here().rank] if looks else measure()
                n_examples, n_batches = n_examples + n, n_batches + (n > 0)
                if keeper is not None:
                    keeper.after_batch(self, n_examples, n_batches, index + 1)
                if enough is not None:
                    n_seen = sum(processes.gather(n_examples)) if looks else n_examples
                    if enough(n_seen):
                        break
        self.changed.update(dict.fromkeys(changed))
        self.check_finite()
        return n_examples, n_batches

    def _one(
        self,
        model: nn.Module,
        batch: Any,
        index: int,
        device: torch.device,
        forward: runtime.Forward | None,
        at_once: bool,
    ) -> int:
        """Measure one batch; how many examples it has."""
        if batch is None:
            return 0
        self.new_batch(index)
        with self.clock.running():
            try:
                runtime.run(model, batch, device, forward)
            except StopHereError:
                pass
            finally:
                for site in self.sites.values():
                    self.after(site.module, None, None)
            if at_once or self._n_to_check > UNCHECKED.get(device.type, 0):
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
    """Where a layer's statistics are."""
    own: Any = site.module._buffers["running_mean"]
    return torch.device("cpu") if own is None else own.device


def after(batches: Iterable[Any], n: int) -> Iterable[Any]:
    """Batches without the first ones, which are not read where that can be helped."""
    if not n:
        return batches
    if hasattr(batches, "starting_at"):
        rest: Iterable[Any] = batches.starting_at(n)
        return rest
    return islice(batches, n, None)


def has_length(batches: Any) -> bool:
    """Whether the number of batches is known, so that they have an end."""
    try:
        len(batches)
    except (TypeError, NotImplementedError):
        return False
    return True


def up_to(batches: Iterable[Any], samples: int | None, most: int | None = None) -> Iterator[Any]:
    """Batches until this number of examples is reached; more than ``most`` are refused."""
    n_examples = 0
    if samples is not None and samples <= 0:
        return
    for batch in batches:
        if most is not None and n_examples >= most:
            raise DataError(
                f"batches: {n_examples:,} examples from a source without a length, and no end. "
                "Give samples=, the number of examples to use; if it has an end, any larger number."
            )
        yield batch
        n_examples += runtime.n_examples_of(batch)
        if samples is not None and n_examples >= samples:
            return


def _of_all(index: int) -> int:
    """The place of a batch among those of all ranks, dealt one by one."""
    place = processes.here()
    return index * place.size + place.rank
