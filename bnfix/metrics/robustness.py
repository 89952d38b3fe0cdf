"""How far outputs move: after a change, on corrupted images, in other batches, in tiles."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bnfix.core import guards, runtime
from bnfix.core.errors import ConfigError, DataError, ModelError
from bnfix.core.options import one_of, require
from bnfix.metrics.compare import Paired, compare
from bnfix.metrics.evaluate import Outputs, collect, measured
from bnfix.metrics.metrics import Interval
from bnfix.norm.layer import generalized_norms, set_example_weight_

#: Most images to compare outputs on; large outputs are compared on fewer.
MOST_IMAGES = 256
_MOST_BYTES = 64 << 20
#: Above these values a change is called large.
_LARGE_RMS, _LARGE_TOP1 = 0.5, 0.2


@dataclass(frozen=True)
class Moved:
    """How far the outputs for ``n`` images moved."""

    # RMS of the change divided by the RMS of the outputs before; None if not finite.
    relative_rms: float | None
    top1_changed: float | None  # fraction of images; None without classes
    n: int

    @property
    def is_large(self) -> bool:
        """Whether the change is large enough for a warning."""
        return (self.relative_rms or 0.0) > _LARGE_RMS or (self.top1_changed or 0.0) > _LARGE_TOP1


def all_outputs(model: nn.Module, call: Callable[[], Any]) -> tuple[list[Tensor], Any]:
    """All tensors of the output, or for a detector of its backbone's output; and the output."""
    features: list[Any] = []
    backbone = getattr(model, "backbone", None)
    with guards.seeded(0), guards.inference(model), guards.hooks() as handles:
        if isinstance(backbone, nn.Module):
            handles.append(backbone.register_forward_hook(lambda *call: features.append(call[-1])))
        output = call()
    # Rounding can decide which boxes a detector keeps, and in which order.
    of = features if features and _is_detections(output) else output
    return runtime.tensors_in(of), output


def _is_detections(output: Any) -> bool:
    return isinstance(output, list) and all(isinstance(o, Mapping) and "boxes" in o for o in output)


@dataclass
class Recorded:
    """Outputs on some images, kept for comparison with other outputs on the same images."""

    tensors: list[Tensor]
    classes: list[Tensor]
    n: int


def record(model: nn.Module, batches: Iterable[Any], precision: str) -> Recorded:
    """Run a model on the batches and keep its outputs, up to a limit of memory."""
    found, n_bytes = Recorded([], [], 0), 0
    for batch in batches:
        with runtime.autocast(runtime.device_of(model), precision):
            call = partial(runtime.run, model, batch, runtime.device_of(model))
            tensors, output = all_outputs(model, call)
        kept = [t.float().cpu() for t in tensors if t.is_floating_point()]
        found.tensors += kept
        found.n += runtime.n_examples_of(batch)
        try:
            logits = runtime.logits_of(output)
        except ModelError:  # no classes
            pass
        else:
            top1 = logits.argmax(1) if logits.shape[1] > 1 else logits[:, 0] > 0
            found.classes.append(top1.cpu())
        n_bytes += sum(t.nbytes for t in kept)
        if n_bytes > _MOST_BYTES:
            break
    return found


def moved(before: Recorded, after: Recorded) -> Moved:
    """Compare the outputs of two models on the same images."""
    rms, pairs = None, list(zip(before.tensors, after.tensors, strict=False))
    alike = len(before.tensors) == len(after.tensors)
    if pairs and alike and all(a.shape == b.shape for a, b in pairs):
        change = sum(float((b.double() - a.double()).square().sum()) for a, b in pairs)
        size = sum(float(a.double().square().sum()) for a, _ in pairs)
        ratio = (change / size) ** 0.5 if size else float("inf") if change else 0.0
        rms = ratio if math.isfinite(ratio) else None
    top1 = None
    if rms is not None and before.classes and after.classes:
        was, now = torch.cat(before.classes), torch.cat(after.classes)
        top1 = float((was[: len(now)] != now[: len(was)]).double().mean())
    return Moved(rms, top1, min(before.n, after.n))


#: Logit differences up to this fraction of the largest logit are rounding, by precision.
TOLERANCES = {"fp32": 1e-3, "fp16": 2e-2, "bf16": 1e-1}


@dataclass(frozen=True)
class Shifted:
    """One model on images with one corruption, or in one order; numbers as in `Metrics`.

    The numbers are ``None`` if the model cannot be evaluated.
    """

    model: str
    kind: str  # kind of the corruption, or name of the order
    severity: int  # 1, 2 or 3; for an order, the batch size
    n_examples: int
    top1: float | None
    nll: float | None
    nll_temperature_scaled: float | None
    interval: dict[str, Interval]
    paired: Paired | None  # against the first model on the same images; None for the first


def shifted(
    names: Sequence[str], found: Sequence[Outputs], kind: str, severity: int, *, seed: int = 0
) -> list[Shifted]:
    """Judge several models by their outputs for the same corrupted or reordered images."""
    every = [measured(one, seed) for one in found]
    shown = ("top1", "nll", "nll_temperature_scaled")
    rows: list[Shifted] = []
    for name, m in zip(names, every, strict=True):
        if m.examples is None and not m.problem:
            raise DataError(f"{kind}: the examples have no labels. Give labels.")
        numbers: Any = {key: getattr(m, key) for key in ("n_examples", *shown)}
        interval = {key: m.interval[key] for key in shown if key in m.interval}
        paired = compare(every[0], m, seed=seed) if rows else None
        rows.append(Shifted(name, kind, severity, **numbers, interval=interval, paired=paired))
    return rows


#: Orders in which images can arrive.
STREAMS = ("iid", "sorted", "mixed", "single")


def streams_of(text: str) -> tuple[str, ...]:
    """The orders in a comma-separated list."""
    names = tuple(text.split(","))
    for name in names:
        one_of(name, STREAMS, "--streams")
        once = f"--streams: {name} is given {names.count(name)} times, expected once."
        require(names.count(name) == 1, f"{once} Leave out the repetitions.", "streams")
    return names


def in_stream(name: str, labels: np.ndarray, batch_size: int, seed: int) -> np.ndarray:
    """Positions of all examples in the order of a stream.

    ``iid`` and ``single`` are in seeded random order, ``sorted`` is sorted by class. In ``mixed``,
    half of every batch continues the sorted order, and the other half is random.
    """
    drawn = np.random.default_rng(seed).permutation(len(labels))
    by_class = drawn[np.argsort(labels[drawn], kind="stable")]
    if name != "mixed":
        return by_class if name == "sorted" else drawn
    # Every second example of the sorted order goes to the random half.
    run, others = by_class[::2], np.random.default_rng(seed).permutation(by_class[1::2])
    half = max(1, batch_size // 2)
    parts = [
        part[start : start + half] for start in range(0, len(run), half) for part in (run, others)
    ]
    return np.concatenate(parts)


@dataclass(frozen=True)
class Company:
    """Logits of examples in one kind of batch, against their logits in another kind."""

    largest_difference: float  # over all logits
    top1_agreement: float  # fraction of the examples


@dataclass(frozen=True)
class BatchInvariance:
    """Whether an example's logits depend on the other examples of its batch."""

    model: str
    n_examples: int
    batch_size: int
    alone: Company  # each example alone, against its batch
    permuted: Company  # in a batch with other examples, against its batch
    largest_logit: float  # absolute value, the scale of the differences
    invariant: bool  # both differences are rounding


def batch_invariance(
    names: Sequence[str],
    models: Sequence[nn.Module],
    batches_of: Callable[[np.ndarray, int], Iterable[Any]],
    index: np.ndarray,
    batch_size: int,
    *,
    precision: str = "fp32",
    seed: int = 0,
) -> list[BatchInvariance]:
    """Compare each example's logits in its batch, alone, and in a permuted batch."""
    order = np.random.default_rng(seed).permutation(len(index))

    def run(positions: np.ndarray, size: int) -> list[torch.Tensor]:
        batches = batches_of(positions, size)
        found = collect(models, batches, precision=precision, any_task=True)
        return [torch.from_numpy(one.outputs).flatten(1) for one in found]

    passes = run(index, batch_size), run(index, 1), run(index[order], batch_size)
    back = torch.from_numpy(np.argsort(order))
    rows = []
    for name, a, b, c in zip(names, *passes, strict=True):
        if not len(a) == len(b) == len(c) == len(index):
            raise DataError(
                f"--compare-batch-sizes: {len(a)}, {len(b)} and {len(c)} outputs for {len(index)} "
                "examples. Expected one row per example in every batch."
            )
        by_itself, permuted = _company(a, b), _company(a, c[back])
        largest = float(a.abs().max())
        worst = max(by_itself.largest_difference, permuted.largest_difference)
        rows.append(
            BatchInvariance(
                model=name,
                n_examples=len(index),
                batch_size=batch_size,
                alone=by_itself,
                permuted=permuted,
                largest_logit=largest,
                invariant=worst <= TOLERANCES[precision] * max(largest, 1e-6),
            )
        )
    return rows


def _company(a: torch.Tensor, b: torch.Tensor) -> Company:
    same = (a.argmax(1) == b.argmax(1)).double().mean()
    return Company(float((a - b).abs().max()), float(same))


# --- tiles of an image, against the whole image ---

#: Ends of the bands, as fractions of a tile's shorter side.
_ENDS = (1 / 16, 1 / 8, 1 / 4)


@dataclass(frozen=True)
class Band:
    """Positions that are [low, high) pixels from the nearest cut between two tiles."""

    low: float
    high: float
    n: int
    difference: float  # mean of |tile - whole| / the channel's standard deviation
    changed: float  # fraction with another largest channel; for one channel, another sign

    @property
    def words(self) -> str:
        """Its distances, in words."""
        return f"{self.low:g} {'or more' if math.isinf(self.high) else f'to {self.high:g}'}"


@dataclass(frozen=True)
class Tiled:
    """One model's outputs for tiles, against its outputs for whole images."""

    model: str
    layers: str  # stored: with weights of 0; live: with the model's example weights
    size: tuple[int, int]
    n_examples: int
    bands: tuple[Band, ...]


def tiled(
    name: str, model: nn.Module, batches: Iterable[Any], size: tuple[int, int], precision: str
) -> list[Tiled]:
    """Compare with stored statistics alone and, if some layers are live, with their weights."""
    live = {
        layer: 0.0
        for layer, norm in generalized_norms(model)
        if norm.weighs and norm.running_mean is not None
    }

    def compared(layers: str) -> Tiled:
        n, bands = _bands(model, batches, size, precision)
        return Tiled(model=name, layers=layers, size=size, n_examples=n, bands=bands)

    if not live:
        return [compared("stored")]
    found, before = compared("live"), guards.Snapshot(model)
    try:
        set_example_weight_(model, live, batch_weight=live)
        return [compared("stored"), found]
    finally:
        before.restore_()


def _bands(
    model: nn.Module, batches: Iterable[Any], size: tuple[int, int], precision: str
) -> tuple[int, tuple[Band, ...]]:
    inner = [float(math.ceil(part * min(size))) for part in _ENDS]
    n_examples, sums, moments = 0, torch.zeros(()), torch.zeros(())
    with guards.inference(model):
        for batch in batches:
            whole, stride = _maps(model, batch, precision)
            part, to_cut = _by_tiles(model, batch, stride, size, precision)
            n_examples += len(whole)
            flat = whole.transpose(0, 1).flatten(1)
            n = torch.full_like(flat[:, 0], flat.shape[1])
            moments = moments + torch.stack([n, flat.sum(1), flat.square().sum(1)])
            own = whole[:, :, : part.shape[2], : part.shape[3]]
            a, b = (x.argmax(1) if x.shape[1] > 1 else x[:, 0] > 0 for x in (part, own))
            changed, of_each = (a != b).double().sum(0), torch.full_like(to_cut, len(part))
            columns = torch.stack([of_each, changed, *(part - own).abs().sum(0)])
            band = torch.bucketize(to_cut, torch.tensor(inner), right=True).flatten()
            within = torch.nn.functional.one_hot(band, len(inner) + 1).double()
            sums = sums + columns.double().flatten(1) @ within
    mean, square = moments[1:] / moments[0]
    spread = (square - mean.square()).clamp_min(0).sqrt()
    by_spread = (sums[2:] / spread[:, None])[spread > 0].mean(0) / sums[0]
    ends = pairwise([0.0, *inner, math.inf])
    return n_examples, tuple(
        Band(low, high, n=int(n), difference=float(difference), changed=float(other / n))
        for (low, high), n, other, difference in zip(ends, *sums[:2], by_spread, strict=True)
        if n
    )


def _maps(model: nn.Module, batch: Any, precision: str) -> tuple[Tensor, int]:
    """Outputs ``(N, K, h, w)`` in float64, and the stride in pixels between two positions."""
    device = runtime.device_of(model)
    with runtime.autocast(device, precision):
        output = runtime.output_of(runtime.run(model, batch, device)).double().cpu()
    image, maps = tuple(getattr(batch.x, "shape", ())), tuple(output.shape)
    stride = image[2] // max(1, maps[2]) if len(image) == len(maps) == 4 else 0
    if not stride or (maps[2] * stride, maps[3] * stride) != image[2:]:
        raise _error(
            f"outputs {maps} for inputs {image}, expected maps (N, K, h, w) for images "
            "(N, C, H, W), of the same size or of a size that divides it. Leave --tiles out."
        )
    return output, stride


def _by_tiles(
    model: nn.Module, batch: Any, stride: int, size: tuple[int, int], precision: str
) -> tuple[Tensor, Tensor]:
    """Joined outputs for all complete tiles, and the pixels to the nearest cut ``(h, w)``."""
    image = tuple(batch.x.shape[2:])
    fits = size[0] <= image[0] and size[1] <= image[1] and size != image
    if not fits or any(length % stride for length in size):
        raise _error(
            f"{size[0]}x{size[1]} for images {image[0]}x{image[1]}, expected smaller tiles"
            f"{f', of multiples of {stride}' if stride > 1 else ''}. Give another size."
        )

    def row(strip: Tensor) -> Tensor:
        starts = range(0, image[1] - size[1] + 1, size[1])
        tiles = (strip[..., start : start + size[1]].contiguous() for start in starts)
        found = [_maps(model, batch._replace(x=tile, y=None), precision) for tile in tiles]
        if (other := found[0][1]) != stride:
            raise _error(
                f"a tile has an output every {other} pixels, a whole image every {stride} pixels. "
                "Give another size."
            )
        return torch.cat([maps for maps, _ in found], 3)

    starts = range(0, image[0] - size[0] + 1, size[0])
    part = torch.cat([row(batch.x[:, :, start : start + size[0]]) for start in starts], 2)

    def to_cut(n: int, length: int, whole: int) -> Tensor:
        # The image's own border is not a cut.
        cuts = torch.tensor([*range(length, whole, length), math.inf])
        return ((torch.arange(n)[:, None] + 0.5) * stride - cuts).abs().amin(1)

    down, across = (to_cut(n, *of) for n, *of in zip(part.shape[2:], size, image, strict=True))
    return part, down[:, None].minimum(across[None])


def _error(problem: str) -> ConfigError:
    return ConfigError(f"--tiles: {problem}", name="tiles")
