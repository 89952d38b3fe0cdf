"""`recalibrate_`: population statistics for fixed weights.

One mechanism serves all feeds: before a norm layer runs, a hook measures its input, example by
example, and hands the layer the moments to normalize by for this call; the layer itself stays in
evaluation. The model's own buffers are not touched until the end, when all are written at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnfix import processes, runtime
from bnfix._torch_private import BatchNormBase
from bnfix.checkpoints.resuming import identity_of
from bnfix.errors import ConfigError, DataError, NormError, NumericError, some
from bnfix.layers.sites import NormSite, find_norms, sites_with_statistics, unmatched, unmeasurable
from bnfix.statistics.accumulating import Accumulator
from bnfix.statistics.collecting import Collector, as_stored, over_groups
from bnfix.statistics.costs import Cost
from bnfix.statistics.feeding import Enough, collect
from bnfix.statistics.keeping import Kept
from bnfix.statistics.settling import drift, eps_of

#: Residual that is worth a word.
_SMALL = 1e-3


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured at one layer. Channel means are plain means over the channels.

    Args:
        name: dotted name.
        kind: class name.
        channels: C.
        n_values: values a channel behind the statistics.
        n_calls: calls of the layer in a forward pass, the most there were.
        mean_shift: mean over channels of |new mean - old mean| / sqrt(new var + eps).
        log_var_ratio: mean over channels of |log((new var + eps) / (old var + eps))|.
        mean_se: largest standard error of a mean, in units of sqrt(var + eps); infinite from one
            example.
        var_se: largest standard error of a variance, relative to var + eps; likewise.
    """

    name: str
    kind: str
    channels: int
    n_values: int
    n_calls: int
    mean_shift: float
    log_var_ratio: float
    mean_se: float
    var_se: float


@dataclass(frozen=True, repr=False)
class Calibration:
    """What `recalibrate_` did.

    Args:
        target: ``population`` or ``train-batch B``.
        feed: ``batch`` or ``sequential``.
        n_examples: examples used.
        n_batches: batches used.
        passes: passes over the data, in full forward passes; a shortened one counts as its part
            of the layers.
        layers: one record a layer, in order of first call.
        called_again: layers called more than once in a forward pass; their calls are pooled.
        never_reached: layers that the data never came to; their statistics are as they were.
        frozen: layers that the user froze; left alone, unless they were to be included.
        left_alone: layers that are frozen, excluded, keep no statistics, or hold something of that
            name without being Batch Norm.
        seconds: wall-clock time.
        how: ``walk``, all batches together in one pass; or ``passes``, one after the other.
        slowest: with ``samples="auto"``, the layer whose error was last to be small enough; empty
            without.
        is_enough: whether it became so before the data ended; true without ``auto``.
        n_processes: how many shared the batches.
        n_resumed: examples whose moments an earlier run had measured and kept.
        cost: what this process spent its part of the seconds on.
        disturbed: the first batches met other moments in a walk than by themselves, since the
            network keeps something on itself while it runs; so batches ran one after the other.
        residual: how far the statistics still are from those that a pass with them meets, where
            they were found by repeated passes and did not settle, or where ``disturbed``.
        changed_by_forward: buffers and attributes that forward passes changed by themselves; they
            are as they were.
        examples_per_second: examples times passes by the seconds, all processes together; ``None``
            where an earlier run had measured a part.
    """

    target: str
    feed: str
    n_examples: int
    n_batches: int
    passes: float
    layers: tuple[LayerStatistics, ...]
    called_again: tuple[str, ...]
    never_reached: tuple[str, ...]
    left_alone: tuple[str, ...]
    seconds: float
    how: str = "passes"
    slowest: str = ""
    is_enough: bool = True
    n_processes: int = 1
    n_resumed: int = 0
    cost: Cost = field(default_factory=Cost)
    examples_per_second: float | None = None
    disturbed: bool = False
    residual: float = 0.0
    changed_by_forward: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()

    def __repr__(self) -> str:
        missed = f", {len(self.never_reached)} never reached" if self.never_reached else ""
        return (
            f"Calibration({self.target}, {self.feed} feed: {len(self.layers)} layers from "
            f"{self.n_examples:,} examples{missed}, {self.seconds:.3g} s)"
        )


def recalibrate_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    target: str = "population",
    train_batch_size: int | None = None,
    feed: str = "batch",
    samples: int | str | None = None,
    tolerance: float = 0.04,
    memory_bytes: int | None = None,
    forward: runtime.Forward | None = None,
    precision: str = "fp32",
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
    include_frozen: bool = False,
    state: str | Path | None = None,
    identity: str = "",
) -> Calibration:
    """Set the population moments of every norm layer to those of the data, weights fixed.

    ``mean`` and ``var`` (biased) of all values a channel, pooled over examples in float64 by the
    law of total variance, so that neither the batch size nor an uneven last batch matters to a
    layer. Everything but the norm layers runs as in inference (no dropout); frozen layers are left
    alone; calls of a layer that is used more than once are pooled.

    Args:
        model: stock or generalized norm layers, on the device to run on.
        batches: any iterable of ``(x, y)``, ``(x,)`` or ``x``; with ``feed="sequential"`` it is
            gone through more than once.
        target: ``population``, the total variance; or ``train-batch``, what a training batch saw
            on average: var - Vm / B, Vm the variance over examples of the per-example mean.
        train_batch_size: B of ``train-batch``.
        feed: what the layers above a layer see. ``batch``: its output normalized by the batch's own
            moments, one pass. ``sequential``: its output in inference with its new moments, layer
            after layer, exact whatever the batches (as long as every pass gives the same examples).
            One pass, in which all batches wait for each other at each layer, if what they hold by
            then fits the memory. Otherwise, or where batches meet layers in different orders or a
            layer more than once: one pass, and one (shortening) pass for each layer but the first.
            A layer called more than once is measured until it settles, or else gets the moments
            that came nearest. A walk is checked: the first two batches, run again by themselves,
            must meet the same moments; if not, there are passes instead.
        samples: stop after the batch with which this number of examples is reached; needed where
            the batches have no length and more than 100,000 examples; ``auto``: with
            which every layer's errors are small enough; under ``sequential`` a pass of the batch
            feed decides that. Not for a stream, which may have no end.
        tolerance: what is small enough for ``auto``: root mean square over a layer's channels of
            the standard errors of mean (by sqrt(var + eps)) or variance (by var + eps).
        memory_bytes: what the walking batches may hold, at most; by default a quarter of the
            memory that is free; 0 for passes.
        forward: called as ``forward(model, batch)`` for unusual batches or padded inputs.
        precision: of the forward passes, ``fp32``, ``bf16`` or ``fp16`` (autocast). What layers
            meet is measured in float32 and summed in float64 whatever it is, but is itself rounded:
            with bf16 by 8 bits, once a convolution.
        layers: only names that match one of these globs.
        skip: not names that match one of these globs.
        include_frozen: also layers that are frozen by their modes: in evaluation mode and without
            gradients in scale and shift, while the model as a whole is in training mode. In a model
            that is in evaluation mode as a whole no layer counts as frozen.
        state: folder for what passes have measured so far, one file a rank, written every half a
            minute or so. A run that finds its state there goes on from it, to the same numbers. A
            walk, which is one pass, starts over.
        identity: what else tells this run from others, such as a fingerprint of the data; model
            and options always do.

    Returns:
        What was measured and what was left alone.

    Raises:
        ConfigError: if an option is not known or out of range, or ``train-batch`` lacks its size.
        NormError: if a pattern matches nothing, there is no layer to recalibrate, the data reach
            none, or under ``batch`` a layer gets a single value a channel.
        DataError: if there are no examples, or none in a later pass; if batches without a length do
            not end; if under ``batch`` every one of several batches holds a single example.
        NumericError: if a layer's input is not finite, or its moments do not fit its type.

    Changes:
        ``running_mean``, ``running_var``, and ``num_batches_tracked`` where it is 0; all at the
        very end, so that an exception leaves the model bit for bit as it was.
    Restores:
        Modes, hooks, random state, and what forward changes by itself.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> recalibrate_(net, [torch.randn(4, 3, 8, 8)]).n_examples
        4

    Source: Wu & Johnson, "Rethinking Batch in BatchNorm", 2021, section 3. Differs: the variance
    between batches counts, uneven batches are weighed, accumulation is in float64.
    """
    _check_options(target, train_batch_size, feed, samples, tolerance)
    if samples == "auto" and isinstance(batches, Iterator):
        raise ConfigError(
            "samples auto: the batches are a stream, which may have no end. Give a number.",
            name="samples",
        )
    started = time.perf_counter()
    every = find_norms(model)
    problems = unmatched(every, (*layers, *skip)) + unmeasurable(every, layers, skip)
    if problems:
        raise NormError(f"norm layers: {'; '.join(problems)}.")
    sites = list(sites_with_statistics(model, layers, skip))
    at_rest = () if include_frozen else tuple(s.name for s in sites if s.is_put_to_rest(model))
    sites = [site for site in sites if site.name not in at_rest]
    if not sites:
        frozen = [site.name for site in every if site.frozen]
        why = f" ({some(frozen)}: frozen; --unfreeze makes BatchNorm2d of them)" if frozen else ""
        if at_rest:
            why = f" ({some(at_rest)}: frozen; --include-frozen, include_frozen= takes them in)"
        raise NormError(f"model: no norm layer with statistics to compute anew{why}.")
    size = train_batch_size if target == "train-batch" else None
    auto = Enough(tolerance) if samples == "auto" else None
    keeper = None
    if state is not None:
        settings = {
            "target": target, "size": size, "feed": feed, "samples": samples, "of": identity,
            "tolerance": tolerance, "layers": [site.name for site in sites],
            **({} if precision == "fp32" else {"precision": precision}),
        }  # fmt: skip
        keeper = Kept(state, identity_of(model, settings))
    with runtime.autocast(runtime.device_of(model), precision):
        found = collect(
            model, sites, batches, forward, samples, auto, feed, size, memory_bytes, keeper
        )
    measured, collector = found.measured, found.collector
    by_name = {site.name: site for site in sites}
    with collector.clock.measuring():
        new = {
            name: found.nearest.get(name) or accumulator.statistics(size)
            for name, accumulator in measured.items()
        }
    stored = {name: as_stored(by_name[name], *moments) for name, moments in new.items()}
    _check_stored(stored)
    records = tuple(
        _record(by_name[name], accumulator, new[name], collector.n_calls[name])
        for name, accumulator in measured.items()
    )
    for name, moments in stored.items():
        _write(by_name[name].module, *moments, found.n_batches)
    seconds = time.perf_counter() - started
    n_resumed = 0 if keeper is None else keeper.n_resumed
    rate = found.n_examples * found.passes / max(seconds, 1e-9)
    return Calibration(
        target=target if size is None else f"train-batch {size}",
        feed=feed,
        n_examples=found.n_examples,
        n_batches=found.n_batches,
        passes=found.passes,
        layers=records,
        called_again=tuple(record.name for record in records if record.n_calls > 1),
        never_reached=tuple(name for name in by_name if name not in measured),
        left_alone=tuple(site.name for site in every if site.name not in by_name),
        seconds=seconds,
        how=found.how,
        slowest="" if auto is None else auto.slowest,
        is_enough=auto is None or auto.is_enough,
        n_processes=processes.here().size,
        n_resumed=n_resumed,
        cost=collector.clock.cost(),
        examples_per_second=None if n_resumed else rate,
        disturbed=found.disturbed,
        residual=found.error,
        changed_by_forward=tuple(collector.changed),
        frozen=at_rest,
    )


def residuals(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    forward: runtime.Forward | None = None,
) -> dict[str, tuple[float, float]]:
    """Compare stored statistics with those that one inference pass over the data meets.

    Args:
        model: as it will be used; only read.
        batches: any iterable of batches.
        forward: called as ``forward(model, batch)`` for unusual batches.

    Returns:
        For each layer reached: mean over channels of |log((var_stored + eps)/(var_fresh + eps))|,
        and of |mean_stored - mean_fresh| / sqrt(var_fresh + eps).

    Raises:
        DataError: if there are no examples.
    """
    # Frozen layers too: whether their constants fit the data is worth knowing.
    sites = [site for site in find_norms(model) if site.has_statistics and _is_comparable(site)]
    collector = Collector(sites, by_batch=False)
    n_examples, _ = collector.one_pass(model, batches, forward, None)
    if n_examples == 0:
        raise DataError("residuals: no examples. Give at least one batch.")
    found = {}
    for site in sites:
        if site.name in collector.measured:
            fresh = collector.measured[site.name].statistics(None)
            mean_shift, log_var_ratio = drift(_own_moments(site), fresh, eps_of(site))
            found[site.name] = (log_var_ratio, mean_shift)
    return found


def _check_options(
    target: str,
    train_batch_size: int | None,
    feed: str,
    samples: int | str | None,
    tolerance: float,
) -> None:
    if target not in ("population", "train-batch") or feed not in ("batch", "sequential"):
        raise ConfigError(
            f"target {target!r}, feed {feed!r}: expected population or train-batch, batch or "
            "sequential."
        )
    if target == "train-batch" and (train_batch_size is None or train_batch_size < 1):
        raise ConfigError("target train-batch: give train_batch_size, at least 1.")
    known = samples >= 1 if isinstance(samples, int) else samples in (None, "auto")
    if not known:
        raise ConfigError(f"samples: {samples}, expected at least 1, or auto.", name="samples")
    if not tolerance > 0:
        raise ConfigError(f"tolerance: {tolerance}, expected above 0.", name="tolerance")


def _own_moments(site: NormSite) -> tuple[Tensor, Tensor]:
    """The moments that the layer holds, as it uses them, in float64."""
    mean: Any = site.module._buffers["running_mean"]
    var: Any = site.module._buffers["running_var"]
    return over_groups(site, mean.double(), var.double())


def _is_comparable(site: NormSite) -> bool:
    known = not site.problem or isinstance(site.module, BatchNormBase)
    return known and not site.unmeasured


def _record(
    site: NormSite, accumulator: Accumulator, new: tuple[Tensor, Tensor], n_calls: int
) -> LayerStatistics:
    mean_shift, log_var_ratio = drift(_own_moments(site), new, eps_of(site))
    mean_se, var_se = accumulator.errors()
    spread = new[1] + eps_of(site)
    return LayerStatistics(
        name=site.name,
        kind=site.kind,
        channels=new[0].numel(),
        n_values=int(accumulator.values.count),
        n_calls=n_calls,
        mean_shift=mean_shift,
        log_var_ratio=log_var_ratio,
        mean_se=float((mean_se / spread.sqrt()).max()),
        var_se=float((var_se / spread).max()),
    )


def _check_stored(stored: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    for name, (mean, var) in stored.items():
        if not bool((mean + var).isfinite().all()):
            raise NumericError(
                f"{name}: its moments are beyond {str(mean.dtype).removeprefix('torch.')}. "
                "Recalibrate in float32.",
                name=name,
            )


def _write(module: nn.Module, mean: Tensor, var: Tensor, n_batches: int) -> None:
    buffers: Any = module._buffers
    buffers["running_mean"].copy_(mean)
    buffers["running_var"].copy_(var)
    tracked = buffers.get("num_batches_tracked")
    if tracked is not None and int(tracked) == 0:
        tracked.fill_(n_batches)


def describe_missing(calibration: Calibration) -> list[str]:
    """Sentences for the report on layers that were passed over."""
    sentences = []
    if calibration.n_resumed:
        sentences.append(
            f"population statistics: {calibration.n_resumed} examples were not run again; an "
            "interrupted run had kept what they measured."
        )
    if calibration.slowest:
        reached = "were enough" if calibration.is_enough else "are all there are, and not enough"
        sentences.append(
            f"population statistics: {calibration.n_examples} examples {reached}; the last layer "
            f"to be known well was {calibration.slowest}."
        )
    if calibration.disturbed:
        sentences.append(
            "population statistics: the network keeps activations or counts on itself while it "
            "runs, or is random, so the batches ran one after the other, not together."
        )
    if calibration.residual > _SMALL:
        sentences.append(
            "population statistics: they did not settle; a pass with them meets others, by "
            f"{calibration.residual:.2g} of a deviation at the worst layer."
        )
    others = tuple(name for name in calibration.left_alone if name not in calibration.frozen)
    for names, text in (
        (
            calibration.frozen,
            "frozen (evaluation mode, no gradients); left alone. --include-frozen "
            "(from Python include_frozen=True) takes them in",
        ),
        (calibration.called_again, "called more than once a forward pass; their calls are pooled"),
        (calibration.never_reached, "never reached by the data; their statistics are as they were"),
        (others, "frozen, excluded, without statistics or not known; left alone"),
    ):
        if names:
            sentences.append(f"{some(names)}: {text}.")
    return sentences
