"""The frozen settings of the data: which examples are used, and how they become inputs.

`bnfix.core.settings` offers them beside the recipes of the stages.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnfix.core.options import CORRUPTIONS, check_corruption, one_of, option, require

#: Ways to resize an image.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class InputRecipe:
    """How examples become inputs, where the checkpoint or the model has it otherwise.

    Resize and crop belong together: one given replaces both. The rest replaces one by one.
    """

    preset: str | None = option(
        None, "Preprocessing of torchvision:WEIGHTS_NAME or timm:NAME, to start from."
    )
    resize: tuple[int, ...] | None = None
    crop: tuple[int, ...] | None = None
    interpolation: str | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    scale: float | None = None
    bgr: bool = False


#: What a model can be judged by.
TASKS = ("classification", "segmentation", "multilabel", "regression")


@dataclass(frozen=True)
class TaskRecipe:
    """What a model is judged by."""

    task: str = option(
        "auto", f"What outputs and targets are: auto (as they look), {', '.join(TASKS)}."
    )
    loss: str | None = option(
        None,
        "Of regression: mse (the default), l1, huber. Of any task: package.module:callable or "
        "path/to/file.py:callable, called with outputs and targets as tensors, gives one loss an "
        "example, a tensor (N,) with its graph.",
    )
    ignore_index: int = option(255, "Class in the masks of a segmentation that counts nowhere.")

    def __post_init__(self) -> None:
        one_of(self.task, ("auto", *TASKS), "--task")
        own = self.loss is not None and ":" in self.loss
        ok = self.loss in (None, "mse", "l1", "huber") or own
        require(ok, f"--loss: {self.loss!r}, expected mse, l1, huber or FILE.py:callable.", "loss")
        ok = type(self.ignore_index) is int
        require(ok, f"--ignore-index: {self.ignore_index!r}, expected a number.", "ignore_index")
        known = ("auto",) if own else ("auto", "regression")
        ok = self.loss is None or self.task in known
        require(ok, f"--loss {self.loss}: not with --task {self.task}. Leave one out.", "loss")


@dataclass(frozen=True)
class DataRecipe(InputRecipe, TaskRecipe):
    """Which examples are used, and how they become inputs."""

    test: str | None = option(None, "Examples for the claim, used for nothing else.")
    class_map: str | None = option(None, "JSON file: folder name to class index.")
    labels: str = option("auto", "auto, or none where labels are missing or must not be used.")
    groups: str | None = option(
        None,
        "Groups of examples that depend on each other, such as frames of one video: a column of "
        "labels.csv, a regular expression for file names (its first group, or the whole match), an "
        "array of the .npz, or an .npy or .npz file with one group an example.",
    )
    max_bad: float | None = option(
        None, "Bad images that a pass may meet (default: 1%, and at least 5)."
    )
    corrupt: str | None = option(
        None,
        "Corrupt every image that is read, after resize and crop: KIND:SEVERITY, such as blur:2; "
        "kinds " + ", ".join(CORRUPTIONS) + "; severities 1 to 3.",
    )

    def __post_init__(self) -> None:
        TaskRecipe.__post_init__(self)
        one_of(self.labels, ("auto", "none"), "--labels")
        if self.corrupt is not None:
            check_corruption(self.corrupt)


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the network's input: resize, centre crop, scale, normalize.

    input = (pixel · scale - mean) / std, pixel in 0..255, per channel in the input's order.
    """

    resize: tuple[int, ...] | None = option(
        None, "Resize before the crop: one number for the shorter side, or HEIGHTxWIDTH."
    )
    crop: tuple[int, int] | None = option(
        None, "Centre crop after the resize: one number or HEIGHTxWIDTH."
    )
    interpolation: str = option("bilinear", "How to resize: " + ", ".join(INTERPOLATIONS) + ".")
    mean: tuple[float, ...] = option(
        (0.0,), "Mean to subtract after scaling, one number or one a channel, comma-separated."
    )
    std: tuple[float, ...] = option(
        (1.0,), "Deviation to divide by, one number or one a channel, comma-separated."
    )
    scale: float = option(1 / 255, "Factor for pixel values 0..255 (a number or 1/255).")
    channels: int = option(3, "Channels of the input: 3 (colour) or 1 (grey).")
    bgr: bool = option(
        False, "Channels in the order blue, green, red, those of --mean and --std too."
    )

    def __post_init__(self) -> None:
        one_of(self.interpolation, INTERPOLATIONS, "--interpolation")
        require(self.channels in (1, 3), f"channels: {self.channels}, expected 1 or 3.", "channels")
        require(type(self.bgr) is bool, f"bgr: {self.bgr!r}, expected true or false.", "bgr")
        require(self.channels == 3 or not self.bgr, "--bgr: not for a grey input.", "bgr")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            ok = size is None or (
                len(size) in (1, 2) and all(type(s) is int and 0 < s <= 16384 for s in size)
            )
            shown = "x".join(map(str, size or ()))
            require(ok, f"--{name}: {shown}, expected one or two sizes from 1 to 16384.", name)
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            require(ok, f"--{name}: {values}, expected finite numbers.", name)
            require(
                len(values) in (1, self.channels),
                f"--{name}: {len(values)} numbers for {self.channels} channels. "
                f"Give 1 or {self.channels}.",
                name,
            )
        require(all(s > 0 for s in self.std), f"--std: {self.std}, expected above 0.", "std")
        ok = self.scale > 0 and math.isfinite(self.scale)
        require(ok, f"--scale: {self.scale}, expected a number above 0.", "scale")
