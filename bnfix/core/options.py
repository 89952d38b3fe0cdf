"""Helpers for settings with help texts and checks; the settings of data, model and run.

`bnfix.core.settings` exports them together with the recipes of the stages.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from bnfix.core.errors import ConfigError

#: The choices of `--to`: (channel groups, ghost size, example weight), before overrides.
#: ``None`` groups: one channel each; ``None`` ghost: the whole batch; ``"gcd32"``: gcd(C, 32).
KINDS: dict[str, tuple[str | None, int | None, float]] = {
    "example-aware": (None, None, 0.0),
    "ghost": (None, 16, 0.0),
    "batch-group": ("gcd32", 2, 0.0),
    "group": ("gcd32", 1, 1.0),
    "gated": (None, None, 0.0),
    "batch": (None, None, 0.0),
}
#: The choices of `--corrupt` and `--corruptions`.
CORRUPTIONS = ("noise", "blur", "jpeg", "brightness", "contrast", "pixelate")
SEVERITIES = (1, 2, 3)
#: Ways to resize an image.
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
#: The tasks by which bnfix can judge a model.
TASKS = ("classification", "segmentation", "multilabel", "regression")


def option(default: Any, help: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition: bool, message: str, name: str) -> None:
    """Refuse a setting unless a condition holds."""
    if not condition:
        raise ConfigError(message, name=name)


def check_seed(seed: int) -> None:
    """Check that every generator accepts a seed."""
    ok = 0 <= seed < 2**63
    require(ok, f"--seed: {seed}, expected a whole number from 0 to 2^63 - 1.", "seed")


def check_corruption(text: str, where: str = "--corrupt") -> tuple[str, int]:
    """Read a corruption of images."""
    kind, _, severity = text.partition(":")
    severities = [str(n) for n in SEVERITIES]
    offered = f"kinds: {', '.join(CORRUPTIONS)}; severities: {', '.join(severities)}."
    words = f"{where}: {text!r} is not known. Give KIND:SEVERITY, such as blur:2; {offered}"
    require(kind in CORRUPTIONS and severity in severities, words, "corrupt")
    return kind, int(severity)


def one_of(value: Any, choices: Collection[str], name: str, more: str = "") -> None:
    """Refuse a setting that is not one of the choices; ``more`` is what else is accepted."""
    if value not in choices:
        listed = ", ".join(choices) + more
        error = ConfigError(f"{name}: {value!r} is not known. Use one of: {listed}.", name=name)
        error.choices = tuple(choices)
        raise error


def in_range(recipe: Any, low: float, high: float, *names: str, excluded: bool = False) -> None:
    """Refuse numbers outside [low, high], or outside [low, high)."""
    for name in names:
        value, flag = getattr(recipe, name), "--" + name.replace("_", "-")
        ok = value is None or low <= value < high or (value == high < math.inf and not excluded)
        span = f"{low} to {high}" + f", {high} excluded" * excluded
        if high == math.inf:
            span = f"at least {low}" if ok or math.isfinite(value) else "a finite number"
        require(ok, f"{flag}: {value}, expected {span}.", name)


def above_zero(recipe: Any, name: str) -> None:
    """Refuse numbers that are not above 0, or so large that a sum of them overflows."""
    values = getattr(recipe, name)
    ok = all(0 < value < 1e6 for value in values)
    require(ok, f"--{name}: {', '.join(map(str, values))}, expected numbers above 0.", name)


# --- data, model, run, evaluation ---


@dataclass(frozen=True)
class InputRecipe:
    """How examples become inputs, if not as the checkpoint or the model says.

    Resize and crop belong together: giving one replaces both. The other options replace one each.
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


@dataclass(frozen=True)
class TaskRecipe:
    """The measure by which a model is judged."""

    task: str = option("auto", f"Kind of outputs and targets: auto (inferred), {', '.join(TASKS)}.")
    loss: str | None = option(
        None,
        "For regression: mse (the default), l1, huber. For any task: package.module:callable or "
        "path/to/file.py:callable, called with outputs and targets as tensors. It returns one loss "
        "per example, a tensor (N,) with its graph.",
    )
    ignore_index: int = option(255, "Class in segmentation masks that is left out everywhere.")

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
    """The examples, and how they become inputs."""

    test: str | None = option(None, "Examples for the verdict, used for nothing else.")
    class_map: str | None = option(None, "JSON file: folder name to class index.")
    labels: str = option("auto", "auto, or none if labels are missing or must not be used.")
    groups: str | None = option(
        None,
        "Groups of examples that depend on each other, such as frames of one video: a column of "
        "labels.csv, a regular expression for file names (its first group, or the whole match), an "
        "array of the .npz, or an .npy or .npz file with one group per example.",
    )
    max_bad: int | None = option(
        None, "Number of bad images tolerated in one pass (default: 1% of them, at least 5)."
    )
    corrupt: str | None = option(
        None,
        "Corrupt every image, after resize and crop: KIND:SEVERITY, such as blur:2; "
        "kinds " + ", ".join(CORRUPTIONS) + "; severities 1 to 3.",
    )

    def __post_init__(self) -> None:
        TaskRecipe.__post_init__(self)
        one_of(self.labels, ("auto", "none"), "--labels")
        ok = self.max_bad is None or 0 <= self.max_bad < math.inf
        counts = "expected a number of images, at least 0"
        require(ok, f"--max-bad: {self.max_bad}, {counts}.", "max_bad")
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
        (0.0,), "Mean to subtract after scaling, one number or one per channel, comma-separated."
    )
    std: tuple[float, ...] = option(
        (1.0,), "Deviation to divide by, one number or one per channel, comma-separated."
    )
    scale: float = option(1 / 255, "Factor for pixel values 0..255 (a number or 1/255).")
    channels: int = option(3, "Channels of the input: 3 (colour) or 1 (grey).")
    bgr: bool = option(False, "Channels in the order blue, green, red, also for --mean and --std.")

    def __post_init__(self) -> None:
        one_of(self.interpolation, INTERPOLATIONS, "--interpolation")
        require(self.channels in (1, 3), f"channels: {self.channels}, expected 1 or 3.", "channels")
        require(type(self.bgr) is bool, f"bgr: {self.bgr!r}, expected true or false.", "bgr")
        require(self.channels == 3 or not self.bgr, "--bgr: not for a grey input.", "bgr")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            known = all(type(s) is int and 0 < s <= 16384 for s in size or ())
            ok = size is None or (len(size) in (1, 2) and known)
            shown = "x".join(map(str, size or ()))
            require(ok, f"--{name}: {shown}, expected one or two sizes from 1 to 16384.", name)
        n = self.channels
        for name in ("mean", "std"):
            values, least = getattr(self, name), 0 if name == "std" else -math.inf
            ok = all(isinstance(v, int | float) and least < v < math.inf for v in values)
            finite = "finite numbers above 0" if name == "std" else "finite numbers"
            require(ok, f"--{name}: {', '.join(map(str, values))}, expected {finite}.", name)
            wanted = "1 for a grey network" if n == 1 else f"1 or {n}, one per channel"
            words = f"--{name}: {len(values)} numbers, expected {wanted}."
            require(len(values) in (1, n), words, name)
        ok = self.scale > 0 and math.isfinite(self.scale)
        require(ok, f"--scale: {self.scale}, expected a number above 0.", "scale")


@dataclass(frozen=True)
class ModelRecipe:
    """The model of a checkpoint, and its place in the file."""

    model: str | None = option(
        None,
        "torchvision:NAME, timm:NAME, transformers:DIR, package.module:callable or "
        "path/to/file.py:callable; needed unless the checkpoint names one.",
    )
    arguments: tuple[tuple[str, Any], ...] = option(
        (), "Argument of the builder, a JSON value; repeatable."
    )
    key: str | None = option(None, "Dotted path of the state dict in the file.")
    prefix: str | None = option(None, "Prefix to strip from the tensors' names.")
    prefer_ema: bool = option(
        False, "Use the running average of the weights stored in the same file."
    )
    unfreeze: bool = option(
        False,
        "Turn FrozenBatchNorm2d layers into BatchNorm2d with the same numbers, so that commands "
        "act on them. The output also holds num_batches_tracked, and loads into either.",
    )
    forward: str | None = option(
        None,
        "package.module:callable or path/to/file.py:callable, called with the model and a batch "
        "(inputs, labels or None, positions), for models that need more than images.",
    )
    logits_output: str | None = option(
        None, "The output with the logits: its name or index, dotted if nested."
    )
    trust_code: bool = option(
        False, "Open .pt2 files. They can run code when torch reads them: use only your own files."
    )
    like_input: bool = option(
        False,
        "Write a copy of CKPT, a training checkpoint (.ckpt, .pth), with only the weights replaced,"
        " so that training can continue from it. No example weights.",
    )
    domain: str | None = option(
        None,
        "The statistics to use in a file with several: a name; in eval also auto, the nearest by "
        "the inputs of the first norm layer. calibrate writes them under this name.",
    )

    def __post_init__(self) -> None:
        name, ok = self.logits_output, self.forward is None or self.logits_output is None
        words = f"--output: {name}, but --forward returns the logits itself. Leave one of them out."
        require(ok, words, "logits_output")


@dataclass(frozen=True)
class RunOptions:
    """How to run; none of this changes a number by more than rounding."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option("fp32", "fp32, bf16 or fp16 (autocast).")
    batch_size: int | None = option(
        None, "Batch size (default 128, less for large inputs on the CPU)."
    )
    workers: int = option(-1, "Processes that decode images (-1: depends on the kind of data).")

    def __post_init__(self) -> None:
        one_of(self.precision, ("fp32", "bf16", "fp16"), "--precision")
        in_range(self, 1, math.inf, "batch_size")
        in_range(self, -1, math.inf, "workers")


@dataclass(frozen=True)
class EvaluationRecipe:
    """Measurements in addition to the usual metrics."""

    corruptions: bool = option(
        False,
        "Also measure under common corruptions: " + ", ".join(CORRUPTIONS) + "; 3 severities each.",
    )
    compare_batch_sizes: bool = option(
        False, "Also compare each image's logits alone, in its batch and in another batch."
    )
    streams: str | None = option(
        None, "Also measure in other orders: iid,sorted,mixed,single, or some of them."
    )
    tiles: tuple[int, ...] | None = option(
        None,
        "Also compare the maps of some images, whole and in tiles of this size, by the distance to "
        "the nearest cut: for networks that run tile by tile.",
    )
    coverage: float | None = option(
        None,
        "Also report sets of classes that contain the right one with this probability, such as "
        "0.9. One half of the examples gives the threshold, the other measures the coverage.",
    )
    estimate_from: str | None = option(
        None,
        "Labelled examples of the usual kind. The model's confidence on them gives an estimate of "
        "its accuracy on --data, without labels there. Under strong shifts it is too high.",
    )
    fast: bool = option(
        False,
        "Evaluate faster copies: norm layers with weight 0 folded, live ones fused with the next "
        "operations, channels last on CPUs. bnfix first checks that they agree to rounding.",
    )
    metric: tuple[str, ...] = option(
        (),
        "Your own metric: package.module:callable or path/to/file.py:callable, called with all "
        "outputs and labels as numpy arrays. It returns a number or a dict of numbers; repeatable.",
    )

    def __post_init__(self) -> None:
        ok = self.tiles is None or (len(self.tiles) in (1, 2) and min(self.tiles) > 0)
        size = "x".join(map(str, self.tiles or ()))
        require(ok, f"--tiles: {size}, expected one or two sizes from 1.", "tiles")
        c = self.coverage
        ok = c is None or 0 < c < 1
        require(ok, f"--coverage: {c}, expected above 0 and below 1.", "coverage")

    @property
    def of_certainty(self) -> dict[str, float | str]:
        """The options given for sets and estimates."""
        given = {"coverage": self.coverage, "estimate_from": self.estimate_from}
        return {name: value for name, value in given.items() if value is not None}
