"""A network's inputs: preprocessed images in batches, and a first look at them."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from math import exp, log
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from bnfix.checkpoints.load import Loaded, origin_of
from bnfix.core import distributed, guards, masks, runtime
from bnfix.core.errors import ConfigError, DataError, count, plain, some
from bnfix.core.options import TASKS
from bnfix.core.settings import DataRecipe, Preprocessing, RunOptions, TaskRecipe
from bnfix.data.arrays import TensorItems
from bnfix.data.batches import Batch, Batches, augmented, describe_padding, max_bad_of
from bnfix.data.corruptions import Corruption, corruption_of
from bnfix.data.images import Images
from bnfix.data.open import for_outputs, open_images, open_several
from bnfix.data.splits import data_record
from bnfix.metrics.task import LABELS, ByRows, Task, caller
from bnfix.metrics.tasks import Multilabel, Regression, Segmentation, resolve_task
from bnfix.models.build import input_channels
from bnfix.models.published import default_preprocessing, preset_preprocessing
from bnfix.norm.sites import sites_with_statistics
from bnfix.recalibrate.collector import StopHereError
from bnfix.report.records import DataUsed

VALUES_A_BATCH = 1 << 22
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
#: Images in the first look, and the fewest that allow a conclusion.
N_EXAMPLES = 32
_FEWEST = 8
# Observed: sound data differs by up to 0.3 deviations and a factor of 2 in the variance; wrong
# preprocessing (no mean and deviation, pixels not divided by 255) by a factor of 4 and far more.
_MAX_SHIFT = 1.0
_MAX_LOG_VAR = log(4.0)
_MAX_SIZE = 1.5
_DEAD = 1e-3  # of the median variance: such channels carry no signal
#: Wraps the batches of a pass, to show its progress: stage, batches, their number.
Track = Callable[[str, Iterable[Any], int], Iterable[Any]]


def silent(stage: str, batches: Iterable[Any], n: int) -> Iterable[Any]:
    """Show no progress."""
    return batches


@dataclass(frozen=True, eq=False)
class Tracked:
    """Batches that show the progress of every pass; each of several processes has its share."""

    batches: Batches
    stage: str
    track: Track
    vary: Callable[[Iterable[Batch]], Iterable[Batch]] | None = None

    def __iter__(self) -> Iterator[Any]:
        source = self.batches if self.vary is None else self.vary(self.batches)
        return iter(self.track(self.stage, source, len(self.batches)))

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def groups(self) -> np.ndarray | None:
        """The group of every example of the data, if it is known."""
        return self.batches.images.groups

    def starting_at(self, n: int) -> Tracked:
        """The same batches without the first n."""
        return replace(self, batches=self.batches.starting_at(n))

    def evened(self) -> Tracked:
        """The same images, without a far smaller last batch."""
        return replace(self, batches=self.batches.evened())

    def whole(self) -> Tracked:
        """All batches, on every rank."""
        return replace(self, batches=self.batches.dealt(0, 1))

    def shuffled(self, seed: int, augment: str = "none") -> Callable[[int], Tracked]:
        """Pass k uses seed + k and its own variants of the images; each rank gets a part."""
        if augment != "none" and isinstance(self.batches.images, TensorItems):
            raise ConfigError(
                f"--augment {augment}: {self.batches.images.spec} holds no images, and only images "
                "can be augmented.",
                name="augment",
            )
        place = distributed.here()

        def of_pass(k: int) -> Tracked:
            vary = partial(augmented, kind=augment, seed=seed, epoch=k)
            batches = self.batches.with_seed(seed + k).sliced(place.rank, place.size)
            return replace(self, batches=batches, vary=None if augment == "none" else vary)

        return of_pass


def describe_corruption(source: DataRecipe, too: str = "") -> list[str]:
    """A note if images are corrupted."""
    found = corruption_of(source.corrupt)
    words = found and f"{found.text} ({found.words}), after resize and crop."
    return [f"every image was corrupted{too}: {words}"] if found else []


def describe_skipped(passes: Iterable[Tracked]) -> tuple[str, ...]:
    """Describe the bad images of some passes on all ranks, each once."""
    found: dict[str, str] = {}
    for batches in (one.batches for one in passes):
        skipped = [s for share in distributed.gather(batches.skipped) for s in share]
        names = {s.name for s in skipped}
        if distributed.here().shared and len(names) > batches.max_bad:
            raise DataError(
                f"{batches.images.spec}: {count(len(names), 'bad images')}, "
                f"{batches.max_bad:g} allowed: {some(sorted(names))}. "
                "Remove them, or allow more with --max-bad."
            )
        for s in skipped:
            found.setdefault(s.name, f"{s.name}: {s.reason.removeprefix(f'{s.name}: ')}")
    return tuple(found.values())


def data_used(
    images: Images, index: np.ndarray | None = None, passes: Iterable[Tracked] = (), **more: Any
) -> DataUsed:
    """The report's record of the data, and of the bad images that passes over it found."""
    skipped = describe_skipped(passes)
    known: dict[str, Any] = {"n_groups": len(images.group_names) or None, "noun": images.noun}
    known |= {"skipped": skipped, "n_skipped": len(skipped)}
    return DataUsed(**{**data_record(images, index), **known, **more})


@dataclass(frozen=True)
class Inputs:
    """A model's opened data, and how its images become inputs."""

    images: Images
    preprocessing: Preprocessing | None  # none if the inputs are not images
    notes: list[str]
    source: DataRecipe
    size: int = 0  # numbers in one input
    task: Task = LABELS  # judges a model on these inputs

    def batches(
        self, index: np.ndarray, run: RunOptions, size: int, corruption: Corruption | None = None
    ) -> Batches:
        """Batches of chosen images, as the network receives them."""
        return Batches(
            self.images,
            index,
            self.preprocessing,
            batch_size=size,
            workers=run.workers,
            max_bad=self.source.max_bad,
            corruption=corruption,
        )

    def sample(
        self, n: int, model: nn.Module, run: RunOptions, seed: int
    ) -> tuple[np.ndarray, Batches]:
        """Up to n images in seeded random order, corrupted if that is asked."""
        index = np.random.default_rng(seed).permutation(len(self.images))[:n]
        size = evaluation_batch_size(run, model, self.size)
        return index, self.batches(index, run, size, corruption_of(self.source.corrupt, seed))

    def lenient(self, n: int) -> Inputs:
        """The same inputs, for a look at n images: all n can be bad."""
        return replace(self, source=replace(self.source, max_bad=n))

    def first_batch(self, seed: int) -> Batch | None:
        """A few images drawn at random; none if none can be read."""
        drawn = np.sort(np.random.default_rng(seed).permutation(len(self.images))[:N_EXAMPLES])
        few = self.lenient(len(drawn)).batches(drawn, RunOptions(workers=0), N_EXAMPLES)
        try:
            return next(iter(few))
        except DataError:
            return None


def open_inputs(
    loaded: Loaded,
    data: str | Sequence[str],
    source: DataRecipe,
    *,
    opened: dict[int, Images] | None = None,
    any_task: bool = False,
) -> Inputs:
    """Open DATA as a model needs it; images already `opened`, by channels, are reused."""
    opened = {} if opened is None else opened
    stated, notes = resolve_preprocessing(loaded, source)
    known = opened.get(stated.channels)
    recipe, told = _stated_task(loaded, source)
    images, size, task = open_checked(
        data, loaded.model, source, stated, known, recipe=recipe, any_task=any_task
    )
    opened.setdefault(stated.channels, images)
    found = as_inputs(images, stated, notes, source)
    if source.ignore_index != TaskRecipe().ignore_index and not isinstance(task, Segmentation):
        found.notes.append("--ignore-index had no effect: it is for segmentation masks.")
    if isinstance(task, ByRows):
        found.notes.append(f"task: {task.name}, {told}; judged by {task.words.loss}.")
        name = task.name if task.name in TASKS else "auto"
        loaded.origin.task = TaskRecipe(name, task.loss, recipe.ignore_index)
    return replace(found, size=size, task=task)


def _stated_task(loaded: Loaded, source: DataRecipe) -> tuple[TaskRecipe, str]:
    """The task as stated, or else from the file's header; and its source in words."""
    own, stored = TaskRecipe(source.task, source.loss, source.ignore_index), loaded.origin.task
    if own != TaskRecipe() or stored is None:
        return own, "as stated" if own.task != "auto" or own.loss else "by outputs and targets"
    if ":" in (code := plain(stored.loss or "")):
        raise ConfigError(
            f"{loaded.checkpoint.path.name}: was judged by the loss {code}, and code that a file "
            f"names is not run. If you trust it, give --loss {shlex.quote(code)}; or give --task.",
            name="loss",
        )
    return stored, "as stored in the checkpoint"


def as_inputs(
    images: Images, stated: Preprocessing, notes: list[str], source: DataRecipe
) -> Inputs:
    """Opened data with its preprocessing, or without it if it holds no images."""
    if not isinstance(images, TensorItems):
        padded = describe_padding(images, stated) if stated.crop else []
        return Inputs(images, stated, [*notes, *padded], source)
    notes = [f"{images.spec}: inputs are used without any preprocessing."]
    return Inputs(images, None, notes, source)


def resolve_preprocessing(loaded: Loaded, source: DataRecipe) -> tuple[Preprocessing, list[str]]:
    """The preprocessing: options come before a preset, a stored one, a default and a guess."""
    notes: list[str] = []
    channels = input_channels(loaded.model)
    channels = channels if channels in (1, 3) else 3
    stored = loaded.origin.preprocessing
    spec, sha256 = loaded.origin.spec, loaded.checkpoint.sha256
    default = None if spec is None else default_preprocessing(spec, sha256)
    if source.preset is not None:
        base = preset_preprocessing(source.preset)
    elif stored is not None:
        base = stored
        notes.append("preprocessing: as stored in the checkpoint.")
    elif default is not None:
        base, words = default
        notes.append(f"{words}, since nothing else was given.")
    else:
        of_3 = Preprocessing(mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        base = of_3 if channels == 3 else Preprocessing(channels=1)
        less = ", minus ImageNet's mean, divided by ImageNet's deviation" if channels == 3 else ""
        if source.mean is None and source.std is None:
            notes.append(
                f"preprocessing: pixels/255{less}, assumed since nothing was given (--mean, --std, "
                "--scale, --preset)."
            )
    names = ("interpolation", "mean", "std", "scale")
    given = {name: value for name in names if (value := getattr(source, name)) is not None}
    if source.resize is not None or source.crop is not None:
        crop = source.crop
        given |= {"resize": source.resize, "crop": crop and (crop[0], crop[-1])}
    if source.bgr and not base.bgr:
        # A mean and a deviation that were not given follow their colours.
        given = {"mean": base.mean[::-1], "std": base.std[::-1], **given, "bgr": True}
    if base.channels != channels:
        given.setdefault("mean", (sum(base.mean) / len(base.mean),))
        given.setdefault("std", (sum(base.std) / len(base.std),))
        given["channels"] = channels
    return replace(base, **given), notes


def open_checked(
    data: str | Sequence[str],
    model: nn.Module,
    source: DataRecipe,
    preprocessing: Preprocessing,
    known: Images | None = None,
    *,
    recipe: TaskRecipe | None = None,
    any_task: bool = False,
) -> tuple[Images, int, Task]:
    """Open DATA (or `known`) with targets that fit the outputs; numbers in one input; the task."""
    images = open_stated(data, source, preprocessing.channels) if known is None else known
    max_bad = max_bad_of(len(images), source.max_bad)
    # One good image is enough: these hold one, or there are too many bad ones.
    few = np.arange(1 + int(min(max_bad, len(images) - 1)))
    batches = Batches(images, few, preprocessing, batch_size=1, workers=0, max_bad=max_bad)
    first = next(iter(batches))
    with guards.inference(model) as changed:
        output = runtime.run(model, first, runtime.device_of(model))
    own = [f"the forward pass itself changes {some(changed)}; bnfix restores the old values"]
    own = own if changed else []
    images.notes += [note for note in own if note not in images.notes]
    input_size = sum(tensor.numel() for tensor in runtime.tensors_in(first.x))
    recipe = recipe or TaskRecipe()
    task = resolve_task(recipe, output, first.y)
    if isinstance(task, ByRows):
        if isinstance(task, Multilabel) and recipe.task == "auto":
            # One example may hold nothing but 0 and 1 by chance.
            y = images.targets.take(np.arange(min(256, len(images))))
            task = task if bool(((y == 0) | (y == 1)).all()) else Regression()
        if first.y is not None:
            outputs = task.output(output)
            found = task.targets(first, outputs, caller(model, None))
            if isinstance(task, Segmentation) and (note := task.resizing(outputs, found)):
                images.notes += [note] * (note not in images.notes)
        return images, input_size, task
    if images.labelled and images.labels is None and not any_task:
        _set_classes(images, output, first.y, recipe.task)
    if images.labels is None:
        return images, input_size, task
    odd = any_task and isinstance(output, Tensor)
    if odd and not (output.ndim == 2 and int(images.labels.max()) < output.shape[1]):
        return images, input_size, task
    output, notes = _chosen_output(model, output, images)
    labels = origin_of(model).labels
    images = for_outputs(images, runtime.logits_of(output).shape[1], labels)
    images.notes = list(dict.fromkeys([*images.notes, *own, *notes]))
    return images, input_size, task


def _set_classes(images: Images, output: Any, y: Any, stated: str) -> None:
    """Use the targets as class labels, if that is possible."""
    if not isinstance(y, Tensor) or y.ndim != 1 or y.is_floating_point() or images.moves:
        found = [runtime.described(part) for part in (output, y)]
        odd = "fit no known task. Give --task, or --loss FILE.py:callable"
        if stated != "auto":
            odd = f"fit no {stated}, expected logits (N, K) and integer labels (N,). Change --task"
        where = f"{images.spec}: outputs {found[0]} and targets {found[1]} of one example"
        raise DataError(f"{where} {odd}.")
    images.labels = images.targets.take(np.arange(len(images))).numpy()
    images.targets = None


def open_stated(data: str | Sequence[str], source: DataRecipe, channels: int) -> Images:
    """Open DATA as stated; options for images are refused if the data holds none."""
    how: dict[str, Any] = {
        "class_map": None if source.class_map is None else Path(source.class_map),
        "labels": source.labels, "channels": channels, "groups": source.groups,
    }  # fmt: skip
    images = open_images(data, **how) if isinstance(data, str) else open_several(data, **how)
    if not isinstance(images, TensorItems):
        return images
    names = ("preset", "resize", "crop", "interpolation", "mean", "std", "scale", "bgr", "corrupt")
    given = [f"--{name}" for name in names if getattr(source, name) not in (None, False)]
    if given:
        raise ConfigError(
            f"{images.spec}: holds no images, and its inputs reach the network unchanged, so "
            f"{', '.join(given)} cannot be applied. Leave them out, or give images of 8-bit pixels."
        )
    return images


def _chosen_output(model: nn.Module, output: Any, images: Images) -> tuple[Any, list[str]]:
    """Take the one output whose shape fits labels and classes, and state it from now on."""
    found = runtime.outputs_by_name(output)
    if len(found) < 2 or images.labels is None or {"logits", "out"} & set(found):
        return output, []
    n_known = max(len(images.class_names or ()), int(images.labels.max()) + 1)
    fitting = runtime.fitting_outputs(output, 1, n_known)
    if len(fitting) != 1:
        return output, []
    runtime.set_output_(model, fitting[0])
    note = (
        f"of {len(found)} outputs, {fitting[0]} is taken as the logits: only it has {n_known} "
        "columns, one per class (--output overrides this)"
    )
    return found[fitting[0]], [note]


def evaluation_batch_size(run: RunOptions, model: nn.Module, input_size: int) -> int:
    """The batch size of passes without gradients; it changes results by rounding only."""
    if run.batch_size is not None:
        return run.batch_size
    if runtime.device_of(model).type != "cpu":
        return 128
    # Large batches do not fit into the CPU's caches.
    return min(128, max(8, VALUES_A_BATCH // input_size))


def look_at_inputs(model: nn.Module, batch: Any, *, as_given: bool = False) -> str | None:
    """A sentence if the first images do not fit the first norm layer's running statistics.

    Per channel: z = (batch_mean - mean) / sqrt(var + eps), r = (batch_var + eps) / (var + eps), all
    biased, over N, H and W, in float64. A mismatch is rms(z) > 1 or median(|log r|) > log 4.
    """
    site = next(sites_with_statistics(model), None)
    gated = site is not None and getattr(site.module, "gates", None) is not None
    if site is None or gated or runtime.n_examples_of(batch) < _FEWEST:
        return None
    mean, var = (getattr(site.module, name) for name in ("running_mean", "running_var"))
    if not isinstance(mean, Tensor) or not isinstance(var, Tensor):
        return None
    if not bool(mean.any()) and bool((var == 1).all()):
        return None  # never updated
    inputs: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if arguments and isinstance(arguments[0], Tensor):
            x, valid = arguments[0].detach(), masks.current_mask()
            inputs.append(x if valid is None else valid.kept(x))
        raise StopHereError

    with guards.inference(model), guards.hooks() as hooks, suppress(StopHereError):
        hooks.append(site.module.register_forward_pre_hook(keep))
        runtime.run(model, batch, runtime.device_of(model))
    if not inputs or inputs[0].ndim < 2 or inputs[0].shape[1] != len(mean):
        return None
    eps = float(getattr(site.module, "eps", 1e-5))
    shift, log_var = _distance(inputs[0], mean, var, eps)
    if shift <= _MAX_SHIFT and abs(log_var) <= _MAX_LOG_VAR:
        return None
    named = runtime.outputs_by_name(batch.x).items()
    values = [tensor.float() for name, tensor in named if name not in masks.MASK_KEYS]
    low, high = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    words = ("examples", "", "inputs are not prepared as in training") if as_given else (
        "images", " after preprocessing",
        "preprocessing differs from the training's (--preset, or --mean, --std, --scale)",
    )  # fmt: skip
    return (
        f"{runtime.n_examples_of(batch)} {words[0]}, {low:.3g} to {high:.3g}{words[1]}, do not "
        f"fit the statistics stored in {site.name}: means {shift:.2g} deviations away, deviations "
        f"{exp(log_var / 2):.2g} times as large. Either the {words[2]}, or the data or the stored "
        "statistics are of another kind."
    )


def look_at_size(shape: tuple[int, ...], expected: tuple[int, int] | None) -> str | None:
    """A sentence if the inputs differ in size from those of the published weights."""
    if expected is None or len(shape) < 4 or min(*shape[-2:], *expected) < 1:
        return None
    ratio = max(shape[-2] / expected[0], expected[0] / shape[-2])
    if ratio <= _MAX_SIZE:
        return None
    return (
        f"inputs are {shape[-2]}x{shape[-1]}, the model's published weights are for "
        f"{expected[0]}x{expected[1]} (change it with --resize and --crop, or --preset)."
    )


def _distance(inputs: Tensor, mean: Tensor, var: Tensor, eps: float) -> tuple[float, float]:
    """Root mean square of z and median of log r over the channels with a signal."""
    values = inputs.double().cpu().transpose(0, 1).flatten(1)
    mean, var = mean.detach().double().cpu(), var.detach().double().cpu()
    alive = var > _DEAD * var.median()
    z = (values.mean(1) - mean) / (var + eps).sqrt()
    log_r = ((values.var(1, correction=0) + eps) / (var + eps)).log()
    if not bool(alive.any()):
        return 0.0, 0.0
    return float(z[alive].square().mean().sqrt()), float(log_r[alive].median())
