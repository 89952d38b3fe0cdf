"""`recalibrate_`: population statistics for fixed weights.

One mechanism serves all feeds: before a norm layer runs, a hook measures its input, example by
example, and hands the layer the moments to normalize by for this call; the layer itself stays in
evaluation. The model's own buffers are not touched until the end, when all are written at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnfix.checkpoints.save import identity_of
from bnfix.core import distributed, runtime
from bnfix.core.errors import NormError, NumericError, some
from bnfix.core.options import require
from bnfix.norm.sites import NormSite, find_norms, sites_with_statistics, unmatched, unmeasurable
from bnfix.recalibrate.accumulator import Accumulator, Sources
from bnfix.recalibrate.collector import Cost, Found, Source, drift
from bnfix.recalibrate.passes import Enough, Kept, collect
from bnfix.recalibrate.reference import Originals
from bnfix.recalibrate.targets import Wanted

#: Residual that is worth a word.
_SMALL = 1e-3


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured at one layer. Channel means are plain means over the channels."""

    name: str
    kind: str
    channels: int
    n_values: int  # a channel
    n_calls: int  # in a forward pass, the most there were
    mean_shift: float  # mean over channels of |new mean - old mean| / sqrt(new var + eps)
    log_var_ratio: float  # mean over channels of |log((new var + eps) / (old var + eps))|
    #: Largest standard error of a mean, by sqrt(var + eps); infinite from one example.
    mean_se: float
    var_se: float  # largest of a variance, divided by var + eps
    #: Channels not matched to the reference in both moments: dead there or here only, or far apart.
    n_unmatched: int = 0
    #: Of a mixture: the weight of the measured statistics, a mean over the channels.
    new_weight: float | None = None


@dataclass(frozen=True)
class Exceptions:
    """Layers that were not measured, or more than once a pass, by name."""

    called_again: tuple[str, ...] = ()  # their calls are pooled
    never_reached: tuple[str, ...] = ()  # their statistics are as they were
    #: Frozen, excluded, without statistics, or with something of that name but no Batch Norm.
    left_alone: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # those left alone since the user froze them by their modes


@dataclass(frozen=True)
class Trust:
    """How far the statistics can be relied on."""

    slowest: str = ""  # with samples="auto", the layer whose error was last to be small enough
    is_enough: bool = True  # whether it became so before the data ended
    #: In a walk the first batches met other moments than by themselves, since the network keeps
    #: something on itself while it runs; so batches ran one after the other.
    disturbed: bool = False
    #: How far the statistics are from those that a pass with them meets, where they did not settle
    #: or where ``disturbed``.
    residual: float = 0.0
    changed_by_forward: tuple[str, ...] = ()  # buffers and attributes; put back
    n_left_out: int | None = None  # robust: examples of another kind


@dataclass(frozen=True)
class Effort:
    """What it took."""

    seconds: float = 0.0
    cost: Cost = field(default_factory=Cost)  # of this process
    n_processes: int = 1
    n_resumed: int = 0  # examples whose moments an earlier run had measured and kept
    #: Examples times passes by the seconds, all processes together; None after an earlier run.
    examples_per_second: float | None = None


@dataclass(frozen=True, repr=False)
class Calibration:
    """What `recalibrate_` did."""

    target: str  # (robust) population, train-batch B, reference, interpolated or blend
    feed: str
    n_examples: int
    n_batches: int
    passes: float  # full forward passes; a shortened one counts as its part of the layers
    how: str  # walk: all batches together in one pass; passes: one after the other
    layers: tuple[LayerStatistics, ...]  # in order of first call
    exceptions: Exceptions = field(default_factory=Exceptions)
    trust: Trust = field(default_factory=Trust)
    effort: Effort = field(default_factory=Effort)

    def __repr__(self) -> str:
        n_missed = len(self.exceptions.never_reached)
        missed = f", {n_missed} never reached" if n_missed else ""
        return (
            f"Calibration({self.target}, {self.feed} feed: {len(self.layers)} layers from "
            f"{self.n_examples:,} examples{missed}, {self.effort.seconds:.3g} s)"
        )

    def to_json(self) -> dict[str, Any]:
        """All but the layers, on one level."""
        values = asdict(self)
        del values["layers"]
        for part in ("exceptions", "trust", "effort"):
            values |= values.pop(part)
        return values


def recalibrate_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    target: str = "population",
    train_batch_size: int | None = None,
    reference: Originals | None = None,
    prior: float | str | None = None,
    new_weight: float | None = None,
    robust: bool = False,
    mix: Sequence[float] = (),
    feed: str | None = None,
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
            read more than once. Dicts with ``mask`` ``(N, positions)``, true where valid, or
            ``lengths`` ``(N,)`` of the last axis: only valid positions count.
        target: ``population``, the total variance; ``train-batch``, what a training batch saw on
            average: var - Vm / B, Vm the variance over examples of the per-example mean; or
            ``reference``, those that give each layer's output the moments that the original's has
            on the same examples (`bnfix.recalibrate.reference`), which may be few, and others than
            those of training; ``interpolated``, the same with the mean of several networks' means
            and deviations; or ``blend``, between those stored and the population's, by the law of
            total variance (`bnfix.recalibrate.targets`). Standard errors are those of population
            moments.
        train_batch_size: B of ``train-batch``.
        reference: the original, with the same norm layers; only read. Costs one pass more. Of
            ``interpolated`` the networks that the model is the mean of, each with its weight.
        prior: of ``blend``: how many examples the stored statistics count for, N, so that new ones
            of n examples weigh n / (n + N); 0 for ``population``; ``auto``, the default: by how far
            each layer has drifted.
        new_weight: of ``blend``, instead of a prior: the weight of the new statistics, 0 to 1.
        robust: of ``population`` and ``blend``: only of the kind that most examples are of, 16 or
            more. One pass more of the same batches, that keeps two numbers a channel and example.
        mix: of ``population`` and ``blend``, with a list of several sources as ``batches``: the
            weight of each in the statistics, whatever its number of examples, by the law of total
            variance (`bnfix.recalibrate.accumulator.Sources`). By the sequential feed, unless
            stated otherwise; under the batch feed layers above see each source normalized by
            itself.
        feed: what the layers above a layer see. ``batch``, the default: its output normalized by
            the batch's own moments, one pass. ``sequential``, the only one with a reference: its
            output in inference with its new moments, layer after layer, exact whatever the batches
            (if every pass gives the same examples). One pass, in which all batches wait for each
            other at each layer, if what they hold fits the memory, and the first two by themselves
            meet the same moments. Otherwise, or where batches meet layers in different orders or a
            layer more than once: one pass, and one (shortening) pass for each layer but the first.
            A layer called more than once is measured until it settles, or gets the moments that
            came nearest.
        samples: stop after the batch with which this number of examples is reached; needed where
            more than 100,000 examples come without a length; ``auto``: with which every layer's
            errors are small enough, by a pass of the batch feed; not for a stream.
        tolerance: what is small enough for ``auto``: root mean square over a layer's channels of
            the standard errors of mean (by sqrt(var + eps)) or variance (by var + eps).
        memory_bytes: most that the walking batches may hold; a quarter of the free memory by
            default; 0 for passes.
        forward: called as ``forward(model, batch)`` for unusual batches or padded inputs.
        precision: of the forward passes, ``fp32``, ``bf16`` or ``fp16`` (autocast). What layers
            meet is measured in float32 and summed in float64, but is itself rounded: with bf16 by 8
            bits, once a convolution.
        layers: only names that match one of these globs.
        skip: not names that match one of these globs.
        include_frozen: also layers that are frozen by their modes: in evaluation mode and without
            gradients in scale and shift, while the model as a whole is in training mode.
        state: folder for what passes have measured so far, one file a rank. A run that finds its
            state there goes on from it, to the same numbers; a walk, one pass, starts over.
        identity: what else tells this run from others, such as a fingerprint of the data.

    Returns:
        What was measured and what was left alone.

    Raises:
        ConfigError: if an option is unknown, out of range or missing, or the original has other
            norm layers.
        NormError: if a pattern matches nothing, there is no layer to recalibrate, the data reach
            none, or under ``batch`` a layer gets a single value a channel.
        DataError: if a mask does not fit or leaves nothing of an example, or some batches have
            none; if there are no examples, or none in a later pass; if batches without a length do
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
    by_batch = target in ("population", "train-batch") and not robust and not mix
    feed = feed or ("batch" if by_batch else "sequential")
    mix = tuple(mix)
    wanted = Wanted(
        target, train_batch_size, reference, prior, new_weight=new_weight, robust=robust, mix=mix
    )
    wanted.check(feed)
    sources = Sources(batches, mix) if mix else None
    batches = sources or batches
    _check_samples(samples, tolerance, batches)
    started = time.perf_counter()
    sites, frozen = _sites(model, layers, skip, include_frozen)
    rule = wanted.rule(model, sites, sources)
    auto = Enough(tolerance) if samples == "auto" else None
    keeper = None
    if state is not None:
        settings = {
            **wanted.to_json(), "size": rule.batch_size, "feed": feed, "samples": samples,
            "of": identity, "tolerance": tolerance, "layers": [site.name for site in sites],
            **({} if precision == "fp32" else {"precision": precision}),
        }  # fmt: skip
        keeper = Kept(state, identity_of(model, settings))
    n_most = samples if isinstance(samples, int) else None
    source = Source(model, batches, forward, n_most, target=rule)
    with runtime.autocast(runtime.device_of(model), precision):
        found = collect(source, sites, feed, auto, memory_bytes, keeper)
    records, n = _written(source, found), found.seen.n_examples
    names, reached = [site.name for site in sites], found.collector.sums.measured
    seconds, n_resumed = time.perf_counter() - started, 0 if keeper is None else keeper.n_resumed
    return Calibration(
        target=rule.name,
        feed=feed,
        n_examples=n,
        n_batches=found.seen.n_batches,
        passes=found.passes,
        how=found.how,
        layers=records,
        exceptions=Exceptions(
            called_again=tuple(record.name for record in records if record.n_calls > 1),
            never_reached=tuple(name for name in names if name not in reached),
            left_alone=tuple(s.name for s in find_norms(model) if s.name not in names),
            frozen=frozen,
        ),
        trust=Trust(
            slowest="" if auto is None else auto.slowest,
            is_enough=auto is None or auto.is_enough,
            disturbed=found.disturbed,
            residual=found.error,
            changed_by_forward=tuple(source.changed),
            n_left_out=None if rule.screen is None else rule.screen.n_left_out,
        ),
        effort=Effort(
            seconds=seconds,
            cost=source.cost,
            n_processes=distributed.here().size,
            n_resumed=n_resumed,
            # An earlier run's time is not known.
            examples_per_second=None if n_resumed else n * found.passes / max(seconds, 1e-9),
        ),
    )


def _sites(
    model: nn.Module, layers: Sequence[str], skip: Sequence[str], include_frozen: bool
) -> tuple[list[NormSite], tuple[str, ...]]:
    """The layers to recalibrate, and those left alone since the user froze them."""
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
        raise NormError(f"model: no norm layer with statistics to recalibrate{why}.")
    return sites, at_rest


def _written(source: Source, found: Found) -> tuple[LayerStatistics, ...]:
    """Write all layers' new moments, after checking that all fit; their records."""
    sites, measured = found.collector.by_name, found.collector.sums.measured
    with source.cost.of("statistics"):
        new = {
            name: found.nearest.get(name) or source.target.moments(sites[name], sums)
            for name, sums in measured.items()
        }
    stored = {name: sites[name].as_stored(*moments) for name, moments in new.items()}
    for name, (mean, var) in stored.items():
        if not bool((mean + var).isfinite().all()):
            raise NumericError(
                f"{name}: its moments are beyond {str(mean.dtype).removeprefix('torch.')}. "
                "Recalibrate in float32.",
                name=name,
            )
    records = tuple(
        _record(source, sites[name], sums, new[name], found.calls[name])
        for name, sums in measured.items()
    )
    for name, (mean, var) in stored.items():
        sites[name].set_moments_(mean, var, found.seen.n_batches)
    return records


def _check_samples(samples: int | str | None, tolerance: float, batches: runtime.Batches) -> None:
    some_number = samples >= 1 if isinstance(samples, int) else samples in (None, "auto")
    require(some_number, f"samples: {samples}, expected at least 1, or auto.", "samples")
    require(tolerance > 0, f"tolerance: {tolerance}, expected above 0.", "tolerance")
    ends = samples != "auto" or not isinstance(batches, Iterator)
    stream = "samples auto: the batches are a stream, which may have no end. Give a number."
    require(ends, stream, "samples")


def _record(
    source: Source,
    site: NormSite,
    accumulator: Accumulator,
    new: tuple[Tensor, Tensor],
    n_calls: int,
) -> LayerStatistics:
    mean_shift, log_var_ratio = drift(site.moments, new, site.eps)
    mean_se, var_se = accumulator.errors()
    spread = new[1] + site.eps
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
        n_unmatched=source.target.unmatched.get(site.name, 0),
        new_weight=source.target.weights.get(site.name),
    )


def describe_missing(calibration: Calibration) -> list[str]:
    """Sentences for the report on layers that were passed over."""
    trust, layers = calibration.trust, calibration.exceptions
    unmatched = [layer for layer in calibration.layers if layer.n_unmatched]
    weights = [layer.new_weight for layer in calibration.layers if layer.new_weight is not None]
    enough = "were enough" if trust.is_enough else "are all there are, and not enough"
    sentences = (
        (
            calibration.effort.n_resumed,
            f"{calibration.effort.n_resumed} examples were not run again; an interrupted run had "
            "kept what they measured.",
        ),
        (
            weights,
            "mixed with the stored ones; the new ones weigh "
            f"{min(weights, default=0):.2g} to {max(weights, default=0):.2g} by layer.",
        ),
        (
            trust.n_left_out is not None,
            f"{trust.n_left_out} examples of {calibration.n_examples} left out, of another kind.",
        ),
        (
            trust.slowest,
            f"{calibration.n_examples} examples {enough}; the last layer to be known well was "
            f"{trust.slowest}.",
        ),
        (
            trust.disturbed,
            "the network keeps activations or counts on itself while it runs, or is random, so the "
            "batches ran one after the other, not together.",
        ),
        (
            trust.residual > _SMALL,
            f"they did not settle; a pass with them meets others, by {trust.residual:.2g} of a "
            "deviation at the worst layer.",
        ),
        (
            unmatched,
            f"{sum(layer.n_unmatched for layer in unmatched)} channels (of "
            f"{some([layer.name for layer in unmatched])}) are dead in one of the two networks, or "
            "far from the original; they keep its scale or get population moments.",
        ),
    )
    others = [name for name in layers.left_alone if name not in layers.frozen]
    listed = (
        (
            layers.frozen,
            "frozen (evaluation mode, no gradients); left alone. --include-frozen "
            "(from Python include_frozen=True) takes them in",
        ),
        (layers.called_again, "called more than once a forward pass; their calls are pooled"),
        (layers.never_reached, "never reached by the data; their statistics are as they were"),
        (others, "frozen, excluded, without statistics or not known; left alone"),
    )
    found = [f"population statistics: {sentence}" for applies, sentence in sentences if applies]
    return found + [f"{some(names)}: {text}." for names, text in listed if names]
