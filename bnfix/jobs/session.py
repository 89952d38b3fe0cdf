"""A checkpoint and its data, opened: model, preprocessing, splits, batches, assumptions."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfix.checkpoints.load import Loaded, load_ready
from bnfix.checkpoints.read import check_room
from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import ConfigError, DataError, some
from bnfix.core.memory import BatchSize, Footprint, footprint
from bnfix.core.settings import DataRecipe, ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batch, Batches, max_bad_of
from bnfix.data.corruptions import corruption_of
from bnfix.data.fingerprints import Split, cut, unseen
from bnfix.data.images import Images
from bnfix.data.open import for_outputs, open_images
from bnfix.data.tensors import TensorItems
from bnfix.jobs.input_check import first_batch, look_at_inputs, look_at_size
from bnfix.jobs.plan import Plan
from bnfix.jobs.progress import Track, Tracked, silent
from bnfix.models.build import input_channels
from bnfix.models.importing import import_forward
from bnfix.models.presets import default_preprocessing, preset_preprocessing

_VALUES_A_BATCH = 1 << 22
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass
class Workbench:
    """A plan's checkpoint and data, opened.

    Args:
        plan: all settings.
        loaded: the checkpoint with its model, on the device.
        images: the data.
        test_images: where the test split lies: the data again, or ``--test``.
        split: positions of fit and select in ``images``, of test in ``test_images``.
        preprocessing: from image to input; ``None`` for inputs that are no images.
        assumptions: notes on everything assumed for the user.
        track: how progress is shown.
        input_size: numbers in one input.
        evaluation: the batch size of passes without gradients; it shrinks where memory is short.
        footprint: what forward passes hold; ``None`` where it is not known.
        original: the model before layers were swapped that now weigh the example; their scale and
            shift are still to be re-fitted to its outputs.
    """

    plan: Plan
    loaded: Loaded
    images: Images
    test_images: Images
    split: Split
    preprocessing: Preprocessing | None
    assumptions: list[str]
    track: Track
    input_size: int
    evaluation: BatchSize
    footprint: Footprint | None = None
    original: nn.Module | None = None

    @property
    def model(self) -> nn.Module:
        """The model, on the device."""
        return self.loaded.model

    @property
    def labelled(self) -> bool:
        """Whether the data has labels that may be used."""
        return self.images.labels is not None

    @property
    def everything(self) -> np.ndarray:
        """Positions of all images of the data that are in a split, in seeded random order."""
        parts = [self.split.fit, self.split.select]
        if self.test_images is self.images:
            parts.append(self.split.test)
        return np.random.default_rng(self.plan.gate.seed).permutation(np.concatenate(parts))

    def batches(self, index: np.ndarray, stage: str, size: int | None = None) -> Tracked:
        """Re-iterable batches of chosen images in this order, for a stage that progress names."""
        return self._batches(self.images, index, stage, size)

    def test_batches(self, stage: str) -> Tracked:
        """Re-iterable batches of the test split, for a stage that progress names."""
        return self._batches(self.test_images, self.split.test, stage, None)

    def _batches(self, images: Images, index: np.ndarray, stage: str, size: int | None) -> Tracked:
        plan, place = self.plan, distributed.here()
        batches = input_batches(
            images,
            index,
            self.preprocessing,
            plan.source,
            plan.run,
            size=size or self.evaluation.size,
            seed=plan.gate.seed,
        )
        return Tracked(batches.dealt(place.rank, place.size), stage, self.track)

    def identity(self, *parts: np.ndarray, batch_size: int) -> str:
        """Hash everything between the files and the network: the one identity of ``--state``."""
        digest, model = hashlib.sha256(), self.plan.model
        # The test split does not take part, nor does the number of bad images allowed.
        source = dataclasses.replace(self.plan.source, test=None, max_bad=None)
        digest.update(repr([
            model, source, self.preprocessing, self.plan.gate.seed, batch_size,
            list(map(len, parts)),
        ]).encode())  # fmt: skip
        for spec in (model.model, model.forward):
            name = (spec or "").rpartition(":")[0]
            code = Path(getattr(sys.modules.get(name), "__file__", None) or name)
            digest.update(code.read_bytes() if code.is_file() else b"")
        # The order of the images counts too, since batches are made in it.
        for i in np.concatenate(parts):
            label = "" if self.images.labels is None else int(self.images.labels[i])
            digest.update(self.images.digest(int(i)) + f"{label};".encode())
        return digest.hexdigest()

    def training_batch_size(self, stated: int | None) -> int:
        """The batch size with gradients: as stated, or 64, less for large inputs, at least 16."""
        return stated or min(64, max(16, _VALUES_A_BATCH // self.input_size))

    def learn_and_monitor(self) -> tuple[np.ndarray, np.ndarray]:
        """Cut the fit split for early stopping: four fifths to learn on, one to watch."""
        order = np.random.default_rng(self.plan.gate.seed).permutation(self.split.fit)
        n_monitor = max(1, len(order) // 5)
        return np.sort(order[n_monitor:]), np.sort(order[:n_monitor])


def input_batches(
    images: Images,
    index: np.ndarray,
    preprocessing: Preprocessing | None,
    source: DataRecipe,
    run: RunOptions,
    *,
    size: int,
    seed: int = 0,
) -> Batches:
    """Batches of images as the network gets them: preprocessed, corrupted where that is asked."""
    return Batches(
        images,
        index,
        preprocessing,
        batch_size=size,
        workers=run.workers,
        max_bad=source.max_bad,
        corruption=corruption_of(source.corrupt, seed),
    )


def open_workbench(
    checkpoint: str | Path,
    data: str,
    plan: Plan,
    fractions: tuple[float, float, float],
    track: Track = silent,
    memory_bytes: int | None = None,
) -> Workbench:
    """Open a plan's checkpoint and data, and cut the data into fit, select and test."""
    source, run, seed = plan.source, plan.run, plan.gate.seed
    lenders = () if plan.average is None else plan.average.files
    loaded = load_one(checkpoint, plan.model, run, lenders=lenders)
    check_room(loaded.checkpoint.metadata, loaded.checkpoint.path)
    stated, notes = resolve_preprocessing(loaded, source)
    images, input_size = open_checked(data, loaded.model, source, stated)
    preprocessing, notes = applied(images, stated, notes)
    notes = [*loaded.checkpoint.notes, *notes]
    split = cut(images, fractions, seed)
    for name, wanted in zip(("fit", "select"), fractions, strict=False):
        if wanted and split.sizes()[name] < 2:
            raise DataError(
                f"{data}: {len(images)} images leave {split.sizes()[name]} for the {name} split, "
                "expected at least 2. Give more data."
            )
    test_images = images
    if source.test is not None:
        test_images, _ = open_checked(source.test, loaded.model, source, stated)
        test, n_dropped = unseen(test_images, images)
        split = dataclasses.replace(split, test=test)
        if n_dropped:
            notes.append(
                f"{n_dropped} test images are in the data too; they were left out of the test."
            )
    if split.duplicates:
        notes.append(
            f"{split.duplicates} images are exact copies of others; they were left out, so that "
            "no image is in two splits."
        )
    notes += [f"{data}: {note}." for note in images.notes]
    few = first_batch(images, preprocessing, seed)
    notes += _first_look(loaded, few, as_given=preprocessing is None)
    corruption = corruption_of(source.corrupt, seed)
    if corruption is not None:
        notes.append(
            f"every image was corrupted, those of the test too: {corruption.text} "
            f"({corruption.words}), after resize and crop."
        )
    held = None if few is None else footprint(loaded.model, few, run.precision, memory_bytes)
    size = evaluation_batch_size(run, loaded.model, input_size)
    evaluation = BatchSize(size, "--batch-size", notes, gives_way=run.batch_size is None)
    evaluation.foresee(held)
    return Workbench(
        plan=plan,
        loaded=loaded,
        images=images,
        test_images=test_images,
        split=split,
        preprocessing=preprocessing,
        assumptions=notes,
        track=track,
        input_size=input_size,
        evaluation=evaluation,
        footprint=held,
    )


def _first_look(loaded: Loaded, batch: Batch | None, *, as_given: bool) -> list[str]:
    """What strikes the eye in a few images, before anything is done with them."""
    if batch is None:
        return []
    spec = loaded.origin.spec
    known = None if spec is None else default_preprocessing(spec)
    size = None if known is None or as_given else known[0].crop
    found = (
        None if size is None else look_at_size(tuple(batch.x.shape), size),
        look_at_inputs(loaded.model, batch, as_given=as_given),
    )
    return [sentence for sentence in found if sentence is not None]


def load_one(
    checkpoint: str | Path,
    recipe: ModelRecipe,
    run: RunOptions,
    *,
    mapped: bool = False,
    lenders: Sequence[str] = (),
) -> Loaded:
    """Load a checkpoint onto the device."""
    device = runtime.resolve_device(run.device)
    loaded = load_ready(checkpoint, recipe, mapped=mapped, lenders=lenders)
    if recipe.forward is not None:
        runtime.set_forward_(loaded.model, import_forward(recipe.forward))
    if recipe.logits_output is not None:
        runtime.set_output_(loaded.model, recipe.logits_output)
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in loaded.model.state_dict().values()):
        # Half-precision models are worked on in float32; saving gives each tensor its type back.
        loaded.model.float()
    loaded.model.to(device)
    return loaded


def resolve_preprocessing(loaded: Loaded, source: DataRecipe) -> tuple[Preprocessing, list[str]]:
    """What inputs go through: options, over a preset, over what is stored, over a guess."""
    notes: list[str] = []
    channels = input_channels(loaded.model)
    channels = channels if channels in (1, 3) else 3
    stored = loaded.origin.preprocessing
    default = (
        None
        if loaded.origin.spec is None
        else default_preprocessing(loaded.origin.spec, loaded.checkpoint.sha256)
    )
    photometric = source.mean is not None or source.std is not None
    if source.preset is not None:
        base = preset_preprocessing(source.preset)
    elif stored is not None:
        base = stored
        notes.append("preprocessing: as stored in the checkpoint.")
    elif default is not None:
        base = default[0]
        notes.append(f"{default[1]}, since nothing else was given.")
    elif channels == 3:
        base = Preprocessing(mean=_IMAGENET_MEAN, std=_IMAGENET_STD)
        if not photometric:
            notes.append(
                "preprocessing: pixels/255, less ImageNet's mean, by ImageNet's deviation, assumed "
                "since nothing was given (--mean, --std, --scale, --preset)."
            )
    else:
        base = Preprocessing(channels=1)
        if not photometric:
            notes.append(
                "preprocessing: pixels/255, assumed since nothing was given (--mean, --std)."
            )
    given: dict[str, Any] = {
        name: getattr(source, name)
        for name in ("interpolation", "mean", "std", "scale")
        if getattr(source, name) is not None
    }
    if source.resize is not None or source.crop is not None:
        crop = source.crop
        given["resize"] = source.resize
        given["crop"] = None if crop is None else (crop[0], crop[-1])
    if source.bgr and not base.bgr:
        # A mean and a deviation that were not given are those of the same colours.
        given = {"mean": base.mean[::-1], "std": base.std[::-1], **given, "bgr": True}
    if base.channels != channels:
        given.setdefault("mean", (sum(base.mean) / len(base.mean),))
        given.setdefault("std", (sum(base.std) / len(base.std),))
        given["channels"] = channels
    return dataclasses.replace(base, **given), notes


def open_checked(
    data: str,
    model: nn.Module,
    source: DataRecipe,
    preprocessing: Preprocessing,
    known: Images | None = None,
    any_task: bool = False,
) -> tuple[Images, int]:
    """Open DATA (or `known`) with labels that fit the model's outputs; and numbers in one input."""
    images = known
    if images is None or images.channels not in (preprocessing.channels, 0):
        class_map = None if source.class_map is None else Path(source.class_map)
        images = open_images(
            data, class_map=class_map, labels=source.labels, channels=preprocessing.channels
        )
    refuse_image_options(images, source)
    max_bad = max_bad_of(len(images), source.max_bad)
    # One good image is enough, and among so many there is one, or there are too many bad ones.
    few = np.arange(1 + int(min(max_bad, len(images) - 1)))
    first = next(
        iter(Batches(images, few, preprocessing, batch_size=1, workers=0, max_bad=max_bad))
    )
    with guards.inference(model) as changed:
        output = runtime.run(model, first, runtime.device_of(model))
    note = f"the forward pass changes {some(changed)} by itself; bnfix puts that back"
    if changed and note not in images.notes:
        images.notes.append(note)
    input_size = sum(tensor.numel() for tensor in runtime.tensors_in(first.x))
    if images.labels is None:
        return images, input_size
    if any_task and isinstance(output, torch.Tensor):
        is_logits = output.ndim == 2 and int(images.labels.max()) < output.shape[1]
        if not is_logits:
            return images, input_size
    output, notes = _chosen_output(model, output, images)
    images = for_outputs(images, runtime.logits_of(output).shape[1])
    images.notes = [*images.notes, *notes]
    return images, input_size


def refuse_image_options(images: Images, source: DataRecipe) -> None:
    """Refuse options that prepare or corrupt images where the data hold none."""
    if not isinstance(images, TensorItems):
        return
    names = ("preset", "resize", "crop", "interpolation", "mean", "std", "scale", "bgr", "corrupt")
    given = [f"--{name}" for name in names if getattr(source, name) not in (None, False)]
    if given:
        raise ConfigError(
            f"{images.spec}: holds no images, and its inputs go to the network as they are, so "
            f"{', '.join(given)} cannot be applied. Leave them out, or give images of 8-bit pixels."
        )


def applied(
    images: Images, preprocessing: Preprocessing, notes: list[str]
) -> tuple[Preprocessing | None, list[str]]:
    """Preprocessing and notes on it: none for inputs that are no images."""
    if not isinstance(images, TensorItems):
        return preprocessing, notes
    return None, [f"{images.spec}: inputs are taken as they are, without any preprocessing."]


def _chosen_output(model: nn.Module, output: Any, images: Images) -> tuple[Any, list[str]]:
    """Of several outputs the one whose shape fits labels and classes, stated from now on."""
    found = runtime.outputs_by_name(output)
    if len(found) < 2 or images.labels is None or {"logits", "out"} & set(found):
        return output, []
    n_known = max(len(images.class_names or ()), int(images.labels.max()) + 1)
    fitting = runtime.fitting_outputs(output, 1, n_known)
    if len(fitting) != 1:
        return output, []
    runtime.set_output_(model, fitting[0])
    note = (
        f"of {len(found)} outputs, {fitting[0]} is taken for the logits: it alone has {n_known} "
        "columns, one a class (--output says otherwise)"
    )
    return found[fitting[0]], [note]


def evaluation_batch_size(run: RunOptions, model: nn.Module, input_size: int) -> int:
    """The batch size of passes without gradients; it changes results by rounding only."""
    if run.batch_size is not None:
        return run.batch_size
    if runtime.device_of(model).type != "cpu":
        return 128
    # Large batches fall out of the CPU's caches.
    return min(128, max(8, _VALUES_A_BATCH // input_size))
