"""Batches of opened DATA: order, preprocessing, bad images, augmentation for training."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from bnfix.core.errors import ConfigError, DataError, count, some
from bnfix.core.options import one_of, require
from bnfix.core.settings import Preprocessing
from bnfix.data.arrays import TensorItems
from bnfix.data.corruptions import Corruption
from bnfix.data.images import MAX_PIXELS, ArrayImages, EncodedImages, Images
from bnfix.data.targets import MisfitError, moved, together


class Batch(NamedTuple):
    """Inputs, their labels, and their positions in the data."""

    x: Any  # images: (N, C, H, W) float32; else a tensor (N, ...), or tuples and dicts of tensors
    y: Any  # labels (N,) int64, masks (N, H, W) int64, or other targets unchanged; or None
    index: np.ndarray  # type: ignore[assignment]  # (N,) int64; hides tuple.index


class _Named(Batch):
    """A batch that also names an example by its position, for messages; users unpack three."""

    name: Callable[[int], str] | None = None


@dataclass(frozen=True)
class Skipped:
    """A skipped bad image, and the reason."""

    name: str
    reason: str


#: The pixels and the target that moves with them, if any; or the error. A MisfitError is raised to
#: the user, while other bad images are skipped.
_Item = tuple[np.ndarray, Any] | DataError


@dataclass
class _Shaped:
    """Images after resize and crop, by position; for a bad image, its error."""

    known: dict[int, _Item] = field(default_factory=dict)
    n_bytes: int = 0

    def keep(self, i: int, shaped: _Item, cache_bytes: int) -> None:
        """Cache one image unless the cache is full."""
        size = sum(getattr(v, "nbytes", 0) for v in shaped) if isinstance(shaped, tuple) else 0
        if i not in self.known and self.n_bytes + size <= cache_bytes:
            self.known[i] = shaped
            self.n_bytes += size


class _Shaper(Dataset[list[_Item]]):
    """Map lists of positions to resized and cropped pixels, or to errors."""

    def __init__(self, images: Images, preprocessing: Preprocessing) -> None:
        self.images, self.preprocessing = images, preprocessing

    def __getitem__(self, positions: Sequence[int]) -> list[_Item]:
        return [self._item(i) for i in positions]

    def _item(self, i: int) -> _Item:
        try:
            return self.shaped(i)
        except DataError as error:
            return type(error)(str(error))  # without the traceback, which keeps the image alive

    def shaped(self, i: int) -> tuple[np.ndarray, Any]:
        """The pixels of one image and its target, after resize and crop."""
        pixels, name = self.images.read(i), self.images.name(i)
        target = self.images.target(i) if self.images.moves else None
        resize, crop = self.preprocessing.resize, self.preprocessing.crop
        if resize is None and crop is None:
            return pixels, target
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        if resize is not None:
            # An image of 1 x 5000 pixels, resized by its shorter side, would become enormous.
            if len(resize) == 1 and resize[0] ** 2 * max(image.size) > MAX_PIXELS * min(image.size):
                large = f"{image.size} after resize exceeds {MAX_PIXELS:,} pixels"
                raise DataError(f"{name}: bad image, {large}.")
            v2 = _v2()
            mode = v2.InterpolationMode(self.preprocessing.interpolation)
            image = v2.functional.resize(image, list(resize), mode, antialias=True)
        if target is not None:
            target = moved(target, pixels.shape[:2], (image.height, image.width), crop, name)
        if crop is not None:
            image = _v2().functional.center_crop(image, list(crop))
        return np.array(image).reshape(image.height, image.width, -1), target


class Batches:
    """Preprocessed batches of selected images, for any number of passes.

    Every pass has the same order. Bad images are left out of their batch and listed once in
    ``skipped``; a pass fails at more than ``max_bad`` of them (default 1%, at least 5). Images
    after resize and crop are cached in memory up to ``cache_bytes``, shared by all Batches over the
    same Images, so later passes decode nothing. ``preprocessing`` is None for other inputs.
    ``corruption`` applies after the crop and is not cached. ``workers`` is the number of decoding
    processes; -1 means up to 4 for many files, with two cores left free.
    """

    def __init__(
        self,
        images: Images,
        index: np.ndarray,
        preprocessing: Preprocessing | None,
        *,
        batch_size: int,
        workers: int = -1,
        max_bad: float | None = None,
        cache_bytes: int = 2 << 30,
        corruption: Corruption | None = None,
    ) -> None:
        message = f"--batch-size: {batch_size}, expected at least 1."
        require(batch_size >= 1, message, "batch_size")
        require(workers >= -1, f"--workers: {workers}, expected at least -1.", "workers")
        preprocessing = preprocessing or Preprocessing()
        no_images = isinstance(images, TensorItems)
        if corruption is not None:
            message = f"{corruption.text}: {images.spec} holds no images to corrupt."
            require(not no_images, message, "corrupt")
        require(
            no_images or preprocessing.channels == images.channels,
            f"channels: {preprocessing.channels} in the preprocessing, {images.channels} in the "
            f"images of {images.spec}, expected the same number. Open the images with that number.",
            "channels",
        )
        _check_maps(images, preprocessing)
        index = np.asarray(index, dtype=np.int64)
        ok = not index.size or (0 <= index.min() and index.max() < len(images))
        require(bool(ok), f"index: positions outside 0 to {len(images) - 1}.", "index")
        self.images, self.preprocessing, self.corruption = images, preprocessing, corruption
        self.batch_size, self.workers, self.cache_bytes = batch_size, workers, cache_bytes
        self.max_bad = max_bad_of(len(index), max_bad)
        self.skipped: list[Skipped] = []
        self._seen_bad: set[int] = set()
        self._index = index
        self._order, self._evened = index, False
        self._part: Callable[[list[np.ndarray]], list[np.ndarray]] = lambda groups: groups
        geometry = (preprocessing.resize, preprocessing.crop, preprocessing.interpolation)
        self._shaped: _Shaped = images.shaped.setdefault(geometry, _Shaped())

    def __len__(self) -> int:
        return len(self._groups())

    def _with(self, **changes: Any) -> Batches:
        """A cheap copy that shares the cache and ``skipped``."""
        other = copy.copy(self)
        vars(other).update(changes)
        return other

    def with_seed(self, seed: int) -> Batches:
        """Batches of the same images in a random order."""
        require(seed >= 0, f"--seed: {seed}, expected at least 0.", "seed")
        # An explicit generator: numpy may change the one behind `default_rng`.
        drawn = np.random.Generator(np.random.PCG64(seed))
        return self._with(_order=drawn.permutation(self._index))

    def dealt(self, rank: int, size: int) -> Batches:
        """Every ``size``-th batch: all ranks together have the batches of one process."""
        return self._with(_part=lambda groups: groups[rank::size])

    def sliced(self, rank: int, size: int) -> Batches:
        """A part of every batch: all ranks together take the steps of one process."""
        return self._with(
            _part=lambda groups: [group[rank::size] for group in groups if len(group) > rank]
        )

    def starting_at(self, n: int) -> Batches:
        """The same batches without the first n, which are not read."""
        part = self._part
        return self._with(_part=lambda groups: part(groups)[n:])

    def evened(self) -> Batches:
        """The same images; a last batch of one image, or up to an eighth of the size, is spread."""
        return self._with(_evened=True)

    def _groups(self) -> list[np.ndarray]:
        order, size = self._order, self.batch_size
        n_whole, rest = divmod(len(order), size)
        if self._evened and n_whole and 0 < rest <= max(1, size // 8):
            return self._part(np.array_split(order, n_whole))
        return self._part([order[start : start + size] for start in range(0, len(order), size)])

    def __iter__(self) -> Iterator[Batch]:
        groups = self._groups()
        n_good = 0
        for index, x, y in self._inputs(groups):
            n_good += len(index)
            batch = _Named(x, self._targets(index) if y is None else y, index)
            batch.name = self.images.name
            yield batch
        if n_good == 0 and (groups or not len(self._order)):
            why = f": {self.skipped[0].reason}" if self.skipped else "."
            n = sum(map(len, groups))
            raise DataError(f"{self.images.spec}: no usable image among {n}{why}")

    def _targets(self, index: np.ndarray) -> Any:
        """Labels, or targets that do not move with the pixels."""
        images = self.images
        if images.labels is not None:
            return torch.from_numpy(images.labels[index])
        return None if images.targets is None else images.targets.take(index)

    def _inputs(self, groups: list[np.ndarray]) -> Iterator[tuple[np.ndarray, Any, Any]]:
        """The positions, inputs and moved targets of each group's good examples."""
        if isinstance(self.images, TensorItems):
            yield from ((group, self.images.take(group), None) for group in groups)
            return
        for index, pixels, y in self._pixels(groups):
            yield index, self._scaled(self._corrupted(pixels, index)), y

    def _pixels(self, groups: list[np.ndarray]) -> Iterator[tuple[np.ndarray, torch.Tensor, Any]]:
        """The positions, pixels (uint8, n, C, H, W) and targets of each group's good images."""
        crop, moves = self.preprocessing.crop, self.images.moves
        if (
            isinstance(self.images, ArrayImages)
            and self.preprocessing.resize is None
            and not (moves and crop)
        ):
            for group in groups:
                whole = torch.from_numpy(self.images.take(group)).permute(0, 3, 1, 2)
                if crop is not None:
                    whole = _v2().functional.center_crop(whole, list(crop))
                yield group, whole, None
            return
        n_bad = 0
        for group, loaded in zip(groups, self._loaded(groups), strict=True):
            good: dict[int, tuple[np.ndarray, Any]] = {}
            for i in group.tolist():
                shaped = loaded[i]
                if isinstance(shaped, MisfitError):
                    raise DataError(f"{self.images.spec}: {shaped}", path=self.images.spec)
                if isinstance(shaped, DataError):
                    n_bad += 1
                    self._skip(i, str(shaped), n_bad)
                else:
                    good[i] = shaped
            if good:
                self._check_sizes(good)
                # From the group: a repeated position gives a repeated image.
                index = np.asarray([i for i in group.tolist() if i in good], dtype=np.int64)
                pixels, targets = zip(*(good[i] for i in index.tolist()), strict=True)
                stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
                yield index, stacked, together(targets) if moves else None

    def _loaded(self, groups: list[np.ndarray]) -> Iterator[dict[int, _Item]]:
        """Each group's images, from the cache or from disk."""
        known, shaper = self._shaped.known, _Shaper(self.images, self.preprocessing)
        # Fixed before the first read: another pass may fill the cache in between.
        before = set(known)
        wanted = [[i for i in dict.fromkeys(group.tolist()) if i not in before] for group in groups]
        to_read = [positions for positions in wanted if positions]
        n_workers = self._n_workers(sum(map(len, wanted)))
        fresh: Iterator[list[_Item]] = map(shaper.__getitem__, to_read)
        if n_workers:
            loader = DataLoader(
                shaper,
                sampler=to_read,
                batch_size=None,
                num_workers=n_workers,
                collate_fn=list,
                generator=torch.Generator(),  # otherwise the loader would draw from the global one
            )
            with warnings.catch_warnings():
                # Newer Pythons warn about any fork with threads; these children only decode.
                warnings.filterwarnings("ignore", category=DeprecationWarning)
                fresh = iter(loader)
        for group, positions in zip(groups, wanted, strict=True):
            loaded = dict(zip(positions, next(fresh), strict=True)) if positions else {}
            for i, shaped in loaded.items():
                self._shaped.keep(i, shaped, self.cache_bytes)
            yield loaded | {i: known[i] for i in group.tolist() if i not in loaded}

    def _n_workers(self, n_wanted: int) -> int:
        n_cpus = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            n_cpus = len(os.sched_getaffinity(0))
        if self.workers >= 0:
            return min(self.workers, n_cpus) if n_wanted else 0
        many = n_wanted > 256 and isinstance(self.images, EncodedImages)
        # On two cores, decoding in parallel with the network took longer than decoding first.
        return min(4, max(0, n_cpus - 2)) if many else 0

    def _skip(self, i: int, reason: str, n_bad: int) -> None:
        if i not in self._seen_bad:
            self._seen_bad.add(i)
            self.skipped.append(Skipped(self.images.name(i), reason))
        if n_bad > self.max_bad:
            raise DataError(
                f"{self.images.spec}: at least {count(n_bad, 'bad images')} among "
                f"{len(self._order)}, {self.max_bad:g} allowed: "
                f"{some([skip.name for skip in self.skipped])}. "
                f"{self.skipped[0].reason} Remove them, or allow more with --max-bad."
            )

    def _check_sizes(self, good: dict[int, tuple[np.ndarray, Any]]) -> None:
        first = {pixels.shape[:2]: i for i, (pixels, _) in reversed(good.items())}
        if len(first) > 1:
            (b, j), (a, i) = list(first.items())[-2:]
            raise DataError(
                f"{self.images.spec}: images of different sizes in one batch, "
                f"{self.images.name(i)} is {a[0]}x{a[1]}, {self.images.name(j)} is {b[0]}x{b[1]} "
                "(height x width). Give --resize and --crop, or --preset."
            )

    def _corrupted(self, pixels: torch.Tensor, index: np.ndarray) -> torch.Tensor:
        if self.corruption is None:
            return pixels
        images = pixels.permute(0, 2, 3, 1).numpy()
        spoilt = [self.corruption.apply(x, int(i)) for x, i in zip(images, index, strict=True)]
        return torch.from_numpy(np.stack(spoilt)).permute(0, 3, 1, 2)

    def _scaled(self, pixels: torch.Tensor) -> torch.Tensor:
        p = self.preprocessing
        pixels = pixels.flip(1) if p.bgr else pixels
        x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (p.mean, p.std))
        return x.mul_(p.scale).sub_(mean).div_(std)


def describe_padding(images: Images, preprocessing: Preprocessing) -> list[str]:
    """A note if the crop is larger than the first image, which then gets a black frame."""
    with suppress(DataError):
        pixels, _ = _Shaper(images, replace(preprocessing, crop=None)).shaped(0)
        size = pixels.shape[:2]
        height, width = map(max, size, preprocessing.crop or size)
        words = f"images of {size[0]}x{size[1]} are padded with black to {height}x{width} (--crop)."
        return [f"{images.spec}: {words}"] * ((height, width) != size)
    return []


def _check_maps(images: Images, preprocessing: Preprocessing) -> None:
    """Refuse resize and crop with masks or coordinates that cannot move with the pixels."""
    given = [f"--{name}" for name in ("resize", "crop") if getattr(preprocessing, name) is not None]
    if not given or images.targets is None or images.moves or isinstance(images, TensorItems):
        return
    items = images.targets.items
    for item in items[:1] if isinstance(items, torch.Tensor) else items:
        if not isinstance(item, torch.Tensor) or item.ndim > 1:
            found = f"of shape {tuple(item.shape)}" if hasattr(item, "shape") else "that are nests"
            raise ConfigError(
                f"{images.spec}: targets {found} per example, expected masks of the images' size: "
                f"{' and '.join(given)} would not move other targets. Leave it out.",
                name=given[0].removeprefix("--"),
            )


def max_bad_of(n: int, stated: float | None) -> float:
    """The number of bad images allowed in a pass over n images: given, or 1% and at least 5."""
    return max(5.0, 0.01 * n) if stated is None else stated


def augmented(batches: Iterable[Batch], kind: str, seed: int, epoch: int) -> Iterator[Batch]:
    """Augment the images of batches, reproducibly by seed, epoch and image.

    ``light``: a random horizontal flip and a shift by up to an eighth of the size, with reflected
    edges. ``standard``: a random horizontal flip and a random crop (half to all of the area, aspect
    ratio 3:4 to 4:3), resized to full size. Masks move with their images. The default is none: a
    flip damages digits and text.
    """
    from torchvision import tv_tensors  # takes seconds to import

    one_of(kind, ("none", "light", "standard"), "--augment")
    for batch in batches:
        if kind == "none":
            yield batch
            continue
        transform, varied, is_map = _transform(kind, *batch.x.shape[-2:]), [], _is_map(batch, kind)
        # torchvision draws from torch's global generator, whose state the run must keep.
        with torch.random.fork_rng(devices=()):
            for k, position in enumerate(batch.index):
                # Seeded by position: batch size and order must not change an image's variant. Only
                # this generator: torch.manual_seed keeps stack traces for unused devices.
                text = b"%d:%d:%d" % (seed, epoch, position)
                drawn = hashlib.blake2b(text, digest_size=7).digest()
                torch.default_generator.manual_seed(int.from_bytes(drawn, "little"))
                mask = tv_tensors.Mask(batch.y[k]) if is_map else None
                varied.append(transform(tv_tensors.Image(batch.x[k]), mask))
        images, masks = zip(*varied, strict=True)
        y = torch.stack(masks) if is_map else batch.y
        yield batch._replace(x=torch.stack(images), y=y)


def _is_map(batch: Batch, kind: str) -> bool:
    """Whether targets are masks, which move with the images; refuse others that have positions."""
    y = batch.y
    if y is None or (isinstance(y, torch.Tensor) and y.ndim == 1):
        return False
    found = type(y).__name__
    if isinstance(y, torch.Tensor):
        if not y.is_floating_point() and y.shape[1:] == batch.x.shape[-2:]:
            return True
        if y.ndim == 2 and bool(((y == 0) | (y == 1)).all()):
            return False  # multi-label targets
        found = f"{y.dtype} of shape {tuple(y.shape)}".removeprefix("torch.")
    raise ConfigError(
        f"--augment {kind}: targets ({found}) are neither classes nor masks of the images' size, "
        "so they would not move with the images. Leave --augment out.",
        name="augment",
    )


def _v2() -> Any:
    from torchvision.transforms import v2  # takes seconds to import

    return v2


def _transform(kind: str, height: int, width: int) -> Callable[..., Any]:
    v2, size = _v2(), (height, width)
    place = v2.RandomResizedCrop(size, scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
    if kind == "light":
        place = v2.RandomCrop(size, (width // 8, height // 8), padding_mode="reflect")
    whole: Callable[..., Any] = v2.Compose([v2.RandomHorizontalFlip(), place])
    return whole
