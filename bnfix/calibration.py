"""`recalibrate_`: population statistics for fixed weights.

One mechanism serves all feeds: before a norm layer runs, a hook measures its input, example by
example, and hands the layer the moments to normalize by for this call; the layer itself stays in
evaluation. The model's own buffers are not touched until the end, when all are written at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bnfix import guards, runtime
from bnfix.errors import ConfigError, DataError, NormError, NumericError, some
from bnfix.moments import Moments, mix, pool
from bnfix.norms import GeneralizedBatchNorm, over_channel_groups
from bnfix.surgery import NormSite, find_norms, selected


@dataclass(frozen=True)
class LayerStatistics:
    """What was measured at one layer. Channel means are plain means over the channels.

    Args:
        name: dotted name.
        kind: class name.
        channels: C.
        n_values: values a channel behind the statistics.
        n_calls: calls of the layer in a forward pass.
        mean_shift: mean over channels of |new mean - old mean| / sqrt(new var + eps).
        log_var_ratio: mean over channels of |log((new var + eps) / (old var + eps))|.
        mean_se: largest standard error of a mean, in units of sqrt(var + eps).
        var_se: largest standard error of a variance, relative to var + eps.
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


@dataclass(frozen=True)
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
        left_alone: layers that are frozen, excluded, or keep no statistics.
        seconds: wall-clock time.
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


class _Accumulator:
    """Streams the moments of one layer's inputs, pooled, and of its examples, for the errors."""

    def __init__(self) -> None:
        self.values: Moments | None = None
        self._examples: Moments | None = None
        self._shift: Tensor | None = None
        self.n_calls = 0
        self.n_batches = 0

    def add(self, mean: Tensor, var: Tensor, n_positions: int) -> Moments:
        """Add one call's per-example moments ``(N, C)``, float64; return the call's own moments."""
        count = mean.new_tensor(float(mean.shape[0] * n_positions))
        batch = Moments(count, *mix(mean, var, dim=0))
        self.values = batch if self.values is None else pool([self.values, batch])
        if self._shift is None:
            self._shift = batch.mean
        d = mean - self._shift
        r = var + d.square()
        # Variances of d, r and d + r give their covariance, by the one mixing rule.
        rows = torch.stack((d, r, d + r))
        n = mean.new_tensor(float(mean.shape[0]))
        moments = Moments(n, rows.mean(1), rows.var(1, correction=0))
        self._examples = moments if self._examples is None else pool([self._examples, moments])
        self.n_calls += 1
        return batch

    def between(self) -> Tensor:
        """Variance over examples of the per-example mean, Vm ``(C,)``."""
        return self._examples.var[0]  # type: ignore[union-attr]

    def errors(self) -> tuple[Tensor, Tensor]:
        """Standard errors of mean and variance ``(C,)``: sd(mean_i)/sqrt(n), sd(q_i)/sqrt(n)."""
        examples, values, shift = self._examples, self.values, self._shift
        if examples is None or values is None or shift is None:
            raise NumericError("statistics: no examples were collected.")
        var_d, var_r, var_sum = examples.var
        m = values.mean - shift
        covariance = (var_sum - var_d - var_r) / 2
        # q_i = var_i + (mean_i - mean)^2 = r_i - 2 m d_i + m^2
        var_q = (var_r + 4 * m.square() * var_d - 4 * m * covariance).clamp_min(0)
        n = examples.count.clamp_min(2)
        return (var_d / (n - 1)).sqrt(), (var_q / (n - 1)).sqrt()


class _StopHereError(Exception):
    """Ends a shortened forward pass at the layer being measured."""


class _Collector:
    """Hooks on the sites: measure inputs; decide what each layer normalizes by."""

    def __init__(self, sites: Sequence[NormSite], *, by_batch: bool) -> None:
        self.sites = {id(site.module): site for site in sites}
        self.by_batch = by_batch
        self.final: dict[str, tuple[Tensor, Tensor]] = {}
        self.measured: dict[str, _Accumulator] = {}
        self.wanted: set[str] | None = None
        self.stop_at: str | None = None
        self._found_bad: list[tuple[str, Tensor]] = []
        self._own: dict[int, tuple[Tensor, Tensor]] = {}

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        site = self.sites[id(module)]
        x = args[0] if args else next(iter(kwargs.values()))
        use = self.final.get(site.name)
        if (self.wanted is None or site.name in self.wanted) and x.numel():
            batch = self._measure(site, x)
            if self.stop_at == site.name:
                raise _StopHereError
            if self.by_batch:
                use = _stored(module, batch.mean, batch.var)
        if use is not None:
            self._own[id(module)] = module._buffers["running_mean"], module._buffers["running_var"]  # type: ignore[assignment]
            module._buffers["running_mean"], module._buffers["running_var"] = use

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        own = self._own.pop(id(module), None)
        if own is not None:
            module._buffers["running_mean"], module._buffers["running_var"] = own

    def _measure(self, site: NormSite, x: Tensor) -> Moments:
        values = x.unsqueeze(-1) if x.dim() == 2 else x.flatten(2)
        mean, var = precise_moments(values)
        self._found_bad.append((site.name, ~(mean + var).isfinite().all(1)))
        accumulator = self.measured.setdefault(site.name, _Accumulator())
        return accumulator.add(mean, var, values.shape[2])

    def check_finite(self, batch_index: int) -> None:
        """One synchronization a batch: raise if any layer met a value that is not finite."""
        found, self._found_bad = self._found_bad, []
        if not found or not bool(torch.stack([bad.any() for _, bad in found]).any()):
            return
        name, bad = next((name, bad) for name, bad in found if bool(bad.any()))
        example = int(bad.nonzero()[0].item())
        raise NumericError(
            f"{name}: its input is not finite in batch {batch_index}, example {example} (both "
            "counted from 0). Leave that example out, or use --precision fp32.",
            name=name,
        )

    def one_pass(
        self,
        model: nn.Module,
        batches: Iterable[Any],
        forward: runtime.Forward | None,
        samples: int | None,
    ) -> tuple[int, int]:
        """Run the batches; return examples and batches seen."""
        device = runtime.device_of(model)
        n_examples = n_batches = 0
        with guards.inference(model), guards.hooks() as handles:
            for site in self.sites.values():
                handles.append(site.module.register_forward_pre_hook(self.before, with_kwargs=True))
                handles.append(site.module.register_forward_hook(self.after, always_call=True))
            for index, batch in enumerate(batches):
                try:
                    runtime.run(model, batch, device, forward)
                except _StopHereError:
                    pass
                finally:
                    self._restore()
                self.check_finite(index)
                n = _n_examples(batch)
                n_examples, n_batches = n_examples + n, n_batches + (n > 0)
                if samples is not None and n_examples >= samples:
                    break
        return n_examples, n_batches

    def _restore(self) -> None:
        for site in self.sites.values():
            self.after(site.module, None, None)


def recalibrate_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    target: str = "population",
    train_batch_size: int | None = None,
    feed: str = "batch",
    samples: int | None = None,
    forward: runtime.Forward | None = None,
    layers: Sequence[str] = (),
    skip: Sequence[str] = (),
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
            after layer, exact whatever the batches; one (shortening) pass a layer.
        samples: stop after the batch with which this number of examples is reached.
        forward: called as ``forward(model, batch)`` for unusual batches or padded inputs.
        layers: only names that match one of these globs.
        skip: not names that match one of these globs.

    Returns:
        What was measured and what was left alone.

    Raises:
        ConfigError: if an option is not known, or ``train-batch`` lacks its size.
        NormError: if there is no layer to recalibrate.
        DataError: if there are no examples.

    Changes:
        ``running_mean``, ``running_var``, and ``num_batches_tracked`` where it is 0; all at the
        very end, so that an exception leaves the model bit for bit as it was.
    Restores:
        Modes, hooks.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> recalibrate_(net, [torch.randn(4, 3, 8, 8)]).n_examples
        4

    Source: Wu & Johnson, "Rethinking Batch in BatchNorm", 2021, section 3. Differs: the variance
    between batches counts, uneven batches are weighed, accumulation is in float64.
    """
    if target not in ("population", "train-batch") or feed not in ("batch", "sequential"):
        raise ConfigError(
            f"target {target!r}, feed {feed!r}: expected population or train-batch, batch or "
            "sequential."
        )
    if target == "train-batch" and (train_batch_size is None or train_batch_size < 1):
        raise ConfigError("target train-batch: give train_batch_size, at least 1.")
    started = time.perf_counter()
    every = find_norms(model)
    sites = [s for s in every if s.has_statistics and not s.frozen and selected(s, layers, skip)]
    if not sites:
        raise NormError("model: no norm layer with statistics to compute anew.")
    size = train_batch_size if target == "train-batch" else None
    if feed == "batch":
        collector = _Collector(sites, by_batch=True)
        n_examples, n_batches = collector.one_pass(
            model, runtime.pass_of(batches, 0), forward, samples
        )
        passes = 1.0
        new = {name: _statistics(acc, size) for name, acc in collector.measured.items()}
    else:
        collector, new, n_examples, n_batches, passes = _sequential(
            model, sites, runtime.again(batches), forward, samples, size
        )
    if n_examples == 0:
        raise DataError("calibration: no examples. Give at least one batch.")
    reached = [site for name in collector.measured for site in sites if site.name == name]
    records = tuple(
        _record(site, collector.measured[site.name], new[site.name], n_batches) for site in reached
    )
    for site in reached:
        _write(site, *new[site.name], n_batches)
    return Calibration(
        target if size is None else f"train-batch {size}",
        feed,
        n_examples,
        n_batches,
        passes,
        records,
        tuple(r.name for r in records if r.n_calls > 1),
        tuple(site.name for site in sites if site.name not in collector.measured),
        tuple(site.name for site in every if site not in sites),
        time.perf_counter() - started,
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
    """
    sites = [site for site in find_norms(model) if site.has_statistics]
    collector = _Collector(sites, by_batch=False)
    collector.one_pass(model, batches, forward, None)
    found = {}
    for site in sites:
        if site.name in collector.measured:
            fresh = _pooled_over_groups(site, *_statistics(collector.measured[site.name], None))
            mean_shift, log_var_ratio = _drift(site, *fresh)
            found[site.name] = (log_var_ratio, mean_shift)
    return found


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
    rough = values.mean(-1)
    centred = values - rough.unsqueeze(-1)
    left = centred.mean(-1).double()
    var = (centred * centred).mean(-1).double() - left.square()
    return rough.double() + left, var.clamp_min(0)


def _sequential(
    model: nn.Module,
    sites: Sequence[NormSite],
    batches: runtime.Batches,
    forward: runtime.Forward | None,
    samples: int | None,
    size: int | None,
) -> tuple[_Collector, dict[str, tuple[Tensor, Tensor]], int, int, float]:
    """Layer after layer in call order, each measured while all before it are final."""
    scout = _Collector(sites, by_batch=True)
    first = next(iter(runtime.pass_of(batches, 0)), None)
    if first is None:
        raise DataError("calibration: no examples. Give at least one batch.")
    scout.one_pass(model, [first], forward, None)
    order = list(scout.measured)
    collector = _Collector(sites, by_batch=False)
    n_examples = n_batches = 0
    new: dict[str, tuple[Tensor, Tensor]] = {}
    modules = {site.name: site.module for site in sites}
    for name in order:
        collector.wanted = {name}
        collector.stop_at = name if scout.measured[name].n_calls == 1 else None
        n_examples, n_batches = collector.one_pass(
            model, runtime.pass_of(batches, 0), forward, samples
        )
        new[name] = _statistics(collector.measured[name], size)
        collector.final[name] = _stored(modules[name], *new[name])
    parts = sum((k + 1) / len(order) for k in range(len(order)))
    return collector, new, n_examples, n_batches, parts


def _statistics(accumulator: _Accumulator, train_batch_size: int | None) -> tuple[Tensor, Tensor]:
    values = accumulator.values
    if values is None:
        raise NumericError("statistics: no examples were collected.")
    if train_batch_size is None:
        return values.mean, values.var
    return values.mean, (values.var - accumulator.between() / train_batch_size).clamp_min(0)


def _pooled_over_groups(site: NormSite, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Grouped layers store their pooled moments, repeated over the group's channels."""
    if isinstance(site.module, GeneralizedBatchNorm):
        return over_channel_groups(mean, var, site.module.channel_groups)
    return mean, var


def _stored(module: nn.Module, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Moments as the layer's buffers hold them."""
    own = module._buffers["running_mean"]
    if own is None:
        raise NormError("layer: keeps no running statistics.")
    return mean.to(own), var.to(own)


def _drift(site: NormSite, mean: Tensor, var: Tensor) -> tuple[float, float]:
    """How far the stored moments are from these: mean shift and log variance ratio."""
    eps = float(getattr(site.module, "eps", 1e-5))
    old_mean, old_var = (
        site.module._buffers[key].double()  # type: ignore[union-attr]
        for key in ("running_mean", "running_var")
    )
    shift = ((mean - old_mean).abs() / (var + eps).sqrt()).mean()
    ratio = ((var + eps) / (old_var.clamp_min(0) + eps)).log().abs().mean()
    return float(shift), float(ratio)


def _record(
    site: NormSite,
    accumulator: _Accumulator,
    new: tuple[Tensor, Tensor],
    n_batches: int,
) -> LayerStatistics:
    mean, var = _pooled_over_groups(site, *new)
    mean_shift, log_var_ratio = _drift(site, mean, var)
    mean_se, var_se = accumulator.errors()
    spread = new[1] + float(getattr(site.module, "eps", 1e-5))
    n_values = 0 if accumulator.values is None else int(accumulator.values.count)
    return LayerStatistics(
        site.name,
        site.kind,
        int(mean.numel()),
        n_values,
        max(1, round(accumulator.n_calls / max(n_batches, 1))),
        mean_shift,
        log_var_ratio,
        float((mean_se / spread.sqrt()).max()),
        float((var_se / spread).max()),
    )


def _write(site: NormSite, mean: Tensor, var: Tensor, n_batches: int) -> None:
    mean, var = _pooled_over_groups(site, mean, var)
    buffers = site.module._buffers
    for key, value in (("running_mean", mean), ("running_var", var)):
        own = buffers[key]
        if own is not None:
            own.copy_(value)
    tracked = buffers.get("num_batches_tracked")
    if tracked is not None and int(tracked) == 0:
        tracked.fill_(n_batches)


def _n_examples(batch: Any) -> int:
    try:
        inputs = runtime.unpack(batch)[0]
    except DataError:
        return 1  # a form that only the user's forward knows: counted as one
    return len(inputs) if isinstance(inputs, Tensor) else 1


def describe_missing(calibration: Calibration) -> list[str]:
    """Sentences for the report on layers that were passed over.

    Args:
        calibration: what was done.

    Returns:
        One sentence a kind of exception, none if there is none.
    """
    sentences = []
    for names, text in (
        (calibration.called_again, "called more than once a forward pass; their calls are pooled"),
        (calibration.never_reached, "never reached by the data; their statistics are as they were"),
        (calibration.left_alone, "frozen, excluded or without statistics; left alone"),
    ):
        if names:
            sentences.append(f"{some(names)}: {text}.")
    return sentences
