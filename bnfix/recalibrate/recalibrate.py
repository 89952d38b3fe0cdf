"""`recalibrate_`: population statistics for fixed weights.

All feeds use one mechanism. Before a norm layer runs, a hook measures its input, example by
example, and lends the layer the moments to normalize by in this call. The layer itself stays in
evaluation mode. The model's own buffers are all written at once, at the very end.
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
from bnfix.core.errors import NormError, NumericError, count, some
from bnfix.core.options import require
from bnfix.norm.sites import NormSite, check_measurable, find_norms, sites_with_statistics
from bnfix.recalibrate.accumulator import Accumulator, Sources
from bnfix.recalibrate.collector import Cost, Found, Source, drift
from bnfix.recalibrate.passes import Enough, Kept, collect
from bnfix.recalibrate.reference import Originals
from bnfix.recalibrate.targets import Wanted

#: Residual above which the report mentions it.
_SMALL = 1e-3


@dataclass(frozen=True)
class LayerStatistics:
    """The measurements at one layer. Channel means are plain means over the channels."""

    name: str
    kind: str
    channels: int
    n_values: int  # per channel
    n_calls: int  # most calls in one forward pass
    mean_shift: float  # mean over channels of |new mean - old mean| / sqrt(new var + eps)
    log_var_ratio: float  # mean over channels of |log((new var + eps) / (old var + eps))|
    #: Largest standard error of a mean, divided by sqrt(var + eps); infinite for one example.
    mean_se: float
    var_se: float  # largest standard error of a variance, divided by var + eps
    #: Channels not matched to the reference in both moments: dead in only one network, or far off.
    n_unmatched: int = 0
    #: For a mixture: the weight of the measured statistics, averaged over the channels.
    new_weight: float | None = None


@dataclass(frozen=True)
class Exceptions:
    """Names of layers that were not measured, or were measured more than once per pass."""

    called_again: tuple[str, ...] = ()  # their calls are pooled
    never_reached: tuple[str, ...] = ()  # their statistics are unchanged
    #: Frozen, excluded, without statistics, or not a Batch Norm in spite of its buffers' names.
    left_alone: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()  # left alone because the user froze them by their modes


@dataclass(frozen=True)
class Trust:
    """The reliability of the statistics."""

    slowest: str = ""  # with samples="auto", the last layer whose error became small enough
    is_enough: bool = True  # whether all errors became small enough before the data ended
    #: In a walk the first batches gave other moments than alone, because the network stores
    #: something on itself while it runs. The batches therefore ran one after the other.
    disturbed: bool = False
    #: Distance of the statistics from the moments that a pass with them measures, if they did not
    #: settle or if ``disturbed``.
    residual: float = 0.0
    changed_by_forward: tuple[str, ...] = ()  # buffers and attributes; all were restored
    n_left_out: int | None = None  # with robust: examples of the other kind


@dataclass(frozen=True)
class Effort:
    """The cost of a calibration."""

    seconds: float = 0.0
    cost: Cost = field(default_factory=Cost)  # of this process
    n_processes: int = 1
    n_resumed: int = 0  # examples whose moments were taken over from an earlier run
    #: Examples times passes per second, over all processes; None if an earlier run was resumed.
    examples_per_second: float | None = None


@dataclass(frozen=True, repr=False)
class Calibration:
    """The record of a `recalibrate_` call."""

    target: str  # (robust) population, train-batch B, reference, interpolated or blend
    feed: str
    n_examples: int
    n_batches: int
    passes: float  # full forward passes; a shortened pass counts as its fraction of the layers
    how: str  # walk: all batches together in one pass; passes: one after the other
    layers: tuple[LayerStatistics, ...]  # in order of first call
    exceptions: Exceptions = field(default_factory=Exceptions)
    trust: Trust = field(default_factory=Trust)
    effort: Effort = field(default_factory=Effort)

    def __repr__(self) -> str:
        n_missed = len(self.exceptions.never_reached)
        missed = f", {n_missed} never reached" if n_missed else ""
        return (
            f"Calibration({self.target}, {self.feed} feed: {count(len(self.layers), 'layers')} "
            f"from {count(self.n_examples, 'examples')}{missed}, {self.effort.seconds:.3g} s)"
        )

    def to_json(self) -> dict[str, Any]:
        """All fields except the layers, on one level."""
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
    """Set every norm layer's running statistics to the statistics of the data; weights are fixed.

    They are ``mean`` and biased ``var`` over all values of a channel, pooled over examples in
    float64 by the law of total variance. Neither the batch size nor an uneven last batch matters
    to a layer's own statistics. All other layers run as in inference (no dropout). Frozen layers
    are left alone. If a layer is called more than once, its calls are pooled.

    Args:
        model: a model with stock or generalized norm layers, on the device to run on.
        batches: any iterable of ``(x, y)``, ``(x,)`` or ``x``, or of dicts with a ``mask``
            ``(N, positions)``, true where valid, or ``lengths`` ``(N,)`` along the last axis: only
            valid positions count. ``feed="sequential"`` reads the batches more than once.
        target: the statistics to set. ``population``: mean and total variance of the data.
            ``train-batch``: the average statistics of a training batch of B examples,
            var - Vm / B, with Vm the variance over examples of the per-example mean.
            ``reference``: each layer's output gets the moments that the original's has on the same
            examples; they can be few, and need not be training data (see
            `bnfix.recalibrate.reference`). ``interpolated``: the same, with the weighted mean of
            several networks' means and standard deviations.
            ``blend``: a mixture of the stored and the population statistics, by the law of total
            variance (see `bnfix.recalibrate.targets`). Standard errors are always the population's.
        train_batch_size: B of ``train-batch``, in examples.
        reference: the original, with the same norm layers; it is only read. It costs one extra
            pass. For ``interpolated``: a mapping from each averaged network to its weight.
        prior: for ``blend``: N, the number of examples that the stored statistics count for; new
            statistics of n examples weigh n / (n + N), and 0 equals ``population``. The default
            ``auto`` derives each layer's weight from its drift.
        new_weight: for ``blend``, instead of a prior: the weight of the new statistics, 0 to 1.
        robust: for ``population`` and ``blend``: use only the examples of the majority kind, out of
            16 or more. It costs an extra pass, and keeps two numbers per channel and example.
        mix: for ``population`` and ``blend``, with a list of several sources as ``batches``: the
            weight of each source in the statistics, independent of its number of examples, by the
            law of total variance (see `bnfix.recalibrate.accumulator.Sources`). With ``batch``,
            later layers see each source normalized separately.
        feed: the input of the layers above a layer. ``batch``: its output normalized by the batch's
            own moments, in one pass; the default for ``population`` and ``train-batch`` without
            ``robust`` and ``mix``. ``sequential``, the default otherwise and required with a
            reference: its output in inference with its new moments, layer after layer; exact for
            any batches, if every pass gives the same examples. It takes one pass, in which all
            batches wait for each other at each layer, if their activations fit into memory and the
            first two batches give the same moments alone. Otherwise, and if batches reach layers in
            different orders or a layer more than once, it takes one pass and one shortened pass per
            layer after the first. A layer called more than once is measured until its moments
            settle, or else gets the closest moments found.
        samples: stop after the batch that reaches this number of examples; required if more than
            100,000 examples come from a source without a length. ``auto``: stop when every layer's
            standard errors are small enough in a batch-feed pass; not for a stream.
        tolerance: the error that is small enough for ``auto``: the RMS over a layer's channels of
            the standard errors, of means by sqrt(var + eps) and of variances by var + eps.
        memory_bytes: most bytes of activations that the waiting batches can hold; by default a
            quarter of the free memory; 0 forces separate passes.
        forward: called as ``forward(model, batch)``, for unusual batches or padded inputs.
        precision: of the forward passes: ``fp32``, ``bf16`` or ``fp16`` (autocast). Layer inputs
            are measured in float32 and summed in float64, but are themselves rounded: with bf16 to
            8 bits, once per convolution.
        layers: only layers with a name that matches one of these globs; all if empty.
        skip: leave alone layers with a name that matches one of these globs.
        include_frozen: also recalibrate layers that are frozen by their modes: in evaluation mode
            and without gradients in scale and shift, while the whole model is in training mode.
        state: folder for the passes' measurements so far, one file per rank. A later run continues
            from its own state to the same numbers; a walk, being one pass, starts over.
        identity: anything else that distinguishes this run, such as a fingerprint of the data.

    Returns:
        The record of the measurements, and of the layers left alone.

    Raises:
        ConfigError: if an option is unknown, out of range or missing, if a pattern matches nothing,
            or if the original has other norm layers.
        NormError: if there is no layer to recalibrate, if the data reach no layer, or if under
            ``batch`` a layer gets a single value per channel.
        DataError: if a mask does not fit or leaves an example without positions, or if only some
            batches have one; if there are no examples, or none in a later pass; if batches without
            a length do not end; if under ``batch`` each of several batches holds one example.
        NumericError: if a layer's input is not finite, or its moments do not fit its type.

    Changes:
        ``running_mean``, ``running_var``, and ``num_batches_tracked`` if it is 0. All are written
        at the very end, so an exception leaves the model bit for bit unchanged.
    Restores:
        Modes, hooks, random state, and all state that forward changes.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> recalibrate_(net, [torch.randn(4, 3, 8, 8)]).n_examples
        4

    Source: Wu & Johnson, "Rethinking Batch in BatchNorm", 2021, section 3. Differs: the variance
    between batches counts, uneven batches are weighted by size, and sums are in float64.
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
            # The time of the earlier run is unknown.
            examples_per_second=None if n_resumed else n * found.passes / max(seconds, 1e-9),
        ),
    )


def _sites(
    model: nn.Module, layers: Sequence[str], skip: Sequence[str], include_frozen: bool
) -> tuple[list[NormSite], tuple[str, ...]]:
    """The layers to recalibrate, and the layers left alone because the user froze them."""
    every = find_norms(model)
    check_measurable(every, layers, skip)
    sites = list(sites_with_statistics(model, layers, skip))
    at_rest = () if include_frozen else tuple(s.name for s in sites if s.is_put_to_rest(model))
    sites = [site for site in sites if site.name not in at_rest]
    if not sites:
        frozen = [site.name for site in every if site.frozen]
        why = f" ({some(frozen)}: frozen; --unfreeze turns them into BatchNorm2d)" if frozen else ""
        if at_rest:
            why = f" ({some(at_rest)}: frozen; include them by --include-frozen, include_frozen=)"
        raise NormError(f"model: no norm layer with statistics to recalibrate{why}.")
    return sites, at_rest


def _written(source: Source, found: Found) -> tuple[LayerStatistics, ...]:
    """Check that all layers' new moments fit their types, write them, and return the records."""
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
                f"{name}: its moments do not fit {str(mean.dtype).removeprefix('torch.')}. "
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
    stream = "samples auto: the batches are a stream, which may be endless. Give a number."
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
    """Sentences for the report on left-out layers and on the statistics' reliability."""
    trust, layers = calibration.trust, calibration.exceptions
    unmatched = [layer for layer in calibration.layers if layer.n_unmatched]
    weights = [layer.new_weight for layer in calibration.layers if layer.new_weight is not None]
    enough = "were enough" if trust.is_enough else "are all there are, which is not enough"
    sentences = (
        (
            calibration.effort.n_resumed,
            f"{calibration.effort.n_resumed} examples were not run again; an interrupted run had "
            "saved their measurements.",
        ),
        (
            weights,
            "mixed with the stored statistics; the weight of the new ones, by layer, is "
            f"{min(weights, default=0):.2g} to {max(weights, default=0):.2g}.",
        ),
        (
            trust.n_left_out is not None,
            f"{trust.n_left_out} of {calibration.n_examples} examples left out, as another kind.",
        ),
        (
            trust.slowest,
            f"{calibration.n_examples} examples {enough}; the last layer to be precise enough was "
            f"{trust.slowest}.",
        ),
        (
            trust.disturbed,
            "the network stores activations or counts while it runs, or is random. Its batches "
            "therefore ran one after the other, not together.",
        ),
        (
            trust.residual > _SMALL,
            "they did not settle; one more pass would change them by "
            f"{trust.residual:.2g} standard deviations at the worst layer.",
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
            "(in Python include_frozen=True) includes them",
        ),
        (layers.called_again, "called more than once per forward pass; their calls are pooled"),
        (layers.never_reached, "never reached by the data; their statistics are unchanged"),
        (others, "frozen, excluded, without statistics or not known; left alone"),
    )
    found = [f"population statistics: {sentence}" for applies, sentence in sentences if applies]
    return found + [f"{some(names)}: {text}." for names, text in listed if names]
