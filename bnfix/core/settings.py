"""The frozen settings of each stage (what is computed), and the run options (how).

A recipe holds everything that can change a number in a report by more than rounding; it is stored
in the output's history. Run options change results by rounding only. Defaults and help texts stand
here once: the command line reads both from these classes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from bnfix.core.data_settings import DataRecipe as DataRecipe
from bnfix.core.data_settings import InputRecipe as InputRecipe
from bnfix.core.data_settings import Preprocessing as Preprocessing
from bnfix.core.data_settings import TaskRecipe as TaskRecipe
from bnfix.core.finetune_settings import TRAINED as TRAINED
from bnfix.core.finetune_settings import FinetuneRecipe as FinetuneRecipe
from bnfix.core.options import (
    CORRUPTIONS,
    KINDS,
    check_seed,
    in_range,
    one_of,
    option,
    require,
)

#: Ways to set the example weight without labels, for networks trained with batches of B.
LABEL_FREE = ("match", "fit-moments", "fit-predictions")
_ESTIMATOR = (
    "With --batch-weight, how the batch's moments are made from those of its images: mean (the "
    "default), or median, for which fewer than half of the images may be garbage."
)


@dataclass(frozen=True)
class SwapRecipe:
    """Which normalization the layers are turned into."""

    to: str = option("example-aware", "Kind of normalization: " + ", ".join(KINDS) + ".")
    example_weight: float | None = option(
        None, "Weight of the example in its own statistics, 0..1."
    )
    ghost_size: int | None = option(None, "Examples a ghost batch in training.")
    channel_groups: int | None = option(None, "Channel groups that share their statistics.")
    layers: tuple[str, ...] = option((), "Only layers whose dotted name matches; repeatable.")
    skip: tuple[str, ...] = option((), "Leave layers whose dotted name matches; repeatable.")
    batch_weight: float | None = option(None, "Weight of the batch in the statistics, 0..1.")
    batch_estimator: str | None = option(None, _ESTIMATOR)

    def __post_init__(self) -> None:
        one_of(self.to, KINDS, "--to")
        a, b = self.example_weight, self.batch_weight or 0.0
        ok = a is None or 0 <= a <= 1
        require(ok, f"--example-weight: {a}, expected 0 to 1.", "example_weight")
        room = 1 - (KINDS[self.to][2] if a is None else a)
        require(0 <= b <= room, f"--batch-weight: {b}, expected 0 to {room:g}.", "batch_weight")
        _check_estimator(self.batch_estimator, weighs=bool(self.batch_weight))
        in_range(self, 1, math.inf, "ghost_size", "channel_groups")


def _check_estimator(estimator: str | None, *, weighs: bool) -> None:
    """Refuse an estimator that is not known, or that nothing uses."""
    if estimator is not None:
        one_of(estimator, ("mean", "median"), "--batch-estimator")
        words = "--batch-estimator: only with --batch-weight, above 0. Give both or none."
        require(weighs, words, "batch_estimator")


@dataclass(frozen=True)
class AverageRecipe:
    """Which further checkpoints a model is averaged with, by which weights, and how."""

    files: tuple[str, ...] = option((), "Further checkpoints.")
    weights: tuple[float, ...] = option(
        (), "Weights of the checkpoints, comma-separated (default: all the same)."
    )
    method: str = option(
        "uniform",
        "uniform: all of them. greedy: from the best one on, each is kept only if the mean with it "
        "is better on labelled images.",
    )
    best: int | None = option(
        None, "Only the N best, by a number that all the files hold, such as best_acc."
    )
    statistics: str = option(
        "auto",
        "population; interpolated: each layer's output gets the mean of the checkpoints' means and "
        "deviations; auto: population, unless labels prove interpolated better.",
    )

    def __post_init__(self) -> None:
        one_of(self.method, ("uniform", "greedy"), "--method")
        one_of(self.statistics, ("auto", "population", "interpolated"), "--statistics")
        n = len(self.files) + 1
        require(n > 1, "average: 1 checkpoint, expected at least 2.", "files")
        require(
            len(self.weights) in (0, n),
            f"--weights: {len(self.weights)} numbers for {n} checkpoints. Give one each.",
            "weights",
        )
        require(
            all(0 < w < 1e6 for w in self.weights),
            f"--weights: {', '.join(map(str, self.weights))}, expected numbers above 0.",
            "weights",
        )
        best = self.best
        require(
            best is None or 2 <= best <= n,
            f"--best: {best}, expected 2 to {n}, of {n} files.",
            "best",
        )
        require(
            best is None or not self.weights,
            "--weights: the order of the files with --best is not known before. Leave one out.",
            "weights",
        )


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """Weights that differ from copy to copy of a network, as on analogue or worn hardware."""

    weight_noise: float = option(
        0.0,
        "Noise on every weight of a copy, in deviations of its tensor: statistics that are right "
        "on average over copies are tried, and everything is judged on further copies.",
    )
    draws: int = option(8, "With --weight-noise: copies to measure, and as many to judge on.")

    def __post_init__(self) -> None:
        size, n = self.weight_noise, self.draws
        require(0 <= size <= 10, f"--weight-noise: {size}, expected 0 to 10.", "weight_noise")
        require(1 <= n <= 1000, f"--draws: {n}, expected 1 to 1000.", "draws")

    def copies(self, part: str, seed: int) -> range:
        """Seeds of the copies that a part of the data meets; no two parts share one."""
        first = seed + 1000 * ("fit", "select", "test").index(part)
        return range(first, first + (self.draws if self.weight_noise else 1))


@dataclass(frozen=True)
class StatisticsRecipe(NoiseRecipe):
    """Whether and how running statistics are recalibrated."""

    statistics: str = option("auto", "auto, keep, population, train-batch, reference or blend.")
    prior: float | str | None = option(
        None,
        "With --statistics blend: how many examples the stored statistics count as, N, so that n "
        "new ones weigh n/(n+N); or auto, the default: by how far each layer has drifted.",
    )
    robust: bool = option(
        False,
        "Leave out images of another kind than most, for population and blend; one pass more.",
    )
    mix: tuple[float, ...] = option(
        (),
        "With several --data, their weights in the statistics, such as 1,1, however many images "
        "each has (default: by their numbers of images).",
    )
    reference: str | None = option(
        None, "Checkpoint of the undamaged network that this one was made from."
    )
    reference_model: str | None = option(None, "Its model spec (default: as the checkpoint's).")
    train_batch_size: int | None = option(
        None, "Batch size a device that the network was trained with."
    )
    feed: str = option(
        "batch", "What layers above see: batch (one pass) or sequential (exact, by depth)."
    )
    samples: int | str | None = option(
        None,
        "Examples to use, drawn in seeded random order: a number, or auto for as many as it takes "
        "(default all).",
    )
    batch_size: int = option(128, "Batch size of the batch feed.")
    tolerance: float = option(
        0.04,
        "With --samples auto: the standard error that every layer's mean and variance must reach, "
        "by its spread, root mean square over its channels.",
    )
    include_frozen: bool = option(
        False, "Also layers that the model's code has frozen: evaluation mode, no gradients."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("auto", "keep", "population", "train-batch", "blend", "reference")
        one_of(self.statistics, kinds, "--statistics")
        require(
            self.reference is not None
            or not (self.statistics == kinds[-1] or self.reference_model),
            "--reference: the undamaged network's checkpoint is missing. Give --reference CKPT.",
            "reference",
        )
        one_of(self.feed, ("batch", "sequential"), "--feed")
        in_range(self, 1, math.inf, "train_batch_size", "batch_size")
        require(
            self.statistics != "train-batch" or self.train_batch_size is not None,
            "--statistics train-batch: the batch size is missing. Give --train-batch-size B.",
            "train_batch_size",
        )
        n = self.samples
        ok = n is None or n == "auto" or (isinstance(n, int) and n >= 2)
        require(ok, f"--samples: {n}, expected auto or a number of at least 2.", "samples")
        prior = self.prior
        ok = prior in (None, "auto") or (not isinstance(prior, str) and 0 <= prior < math.inf)
        require(ok, f"--prior: {prior}, expected auto or a number of at least 0.", "prior")
        ok = prior is None or self.statistics == "blend"
        found = f"--statistics is {self.statistics}, expected"
        require(ok, f"--prior: {found} blend. Add --statistics blend.", "prior")
        ok = not self.robust or self.statistics in ("population", "blend")
        require(ok, f"--robust: {found} population or blend. Add --statistics blend.", "robust")
        require(
            all(0 < w < 1e6 for w in self.mix),
            f"--mix: {', '.join(map(str, self.mix))}, expected numbers above 0.",
            "mix",
        )
        ok = self.statistics in ("auto", "population", "blend") and not self.robust
        ok = not self.mix or (ok and self.reference is None)
        words = "only --statistics auto, population, blend take it, without --robust or --reference"
        require(ok, f"--mix: {words}.", "mix")
        others = self.robust or self.mix or self.reference or self.train_batch_size
        ok = self.statistics in ("auto", "population") and not others
        words = "without --robust, --mix, --reference, --train-batch-size"
        words = f"--weight-noise: only --statistics auto and population take it, {words}."
        require(ok or not self.weight_noise, words, "weight_noise")
        t = self.tolerance
        require(t > 0, f"--tolerance: {t}, expected above 0.", "tolerance")


@dataclass(frozen=True)
class WeightRecipe:
    """How the example weight is chosen."""

    example_weight: str | float = option(
        "auto",
        "auto, keep, or a number from 0 to 1; without labels, with --train-batch-size B: match "
        "(1/B), fit-moments (per layer, to the moments of random batches of B), fit-predictions "
        "(per layer, to the predictions in such batches).",
    )
    granularity: str = option("channel", "Finest freedom allowed: global, layer or channel.")
    pointwise: bool = option(False, "Also weigh layers whose maps have a single position.")
    epochs: int = option(2, "Passes over the fit examples when weights are learned per channel.")
    thin: float = option(
        0.03,
        "Part of the gain that may be given up, a standard error included, to set whole layers "
        "back to 0 (0 for none).",
    )
    batch_size: int | None = option(
        None, "Batch size when weights are learned (default 64, less for large inputs)."
    )
    lr: float = option(0.02, "Adam's rate for learned weights, falling to 0 by cosine.")
    start: float = option(0.05, "Least weight from which learning starts.")
    batch_weight: str | float = option("keep", "auto, keep, or the weight of the batch, 0 to 1.")
    batch_estimator: str | None = option(None, _ESTIMATOR)
    assume_iid: bool = option(False, "Let --batch-weight auto harm images sorted by class.")

    def __post_init__(self) -> None:
        a = self.example_weight
        if isinstance(a, str):
            one_of(a, ("auto", "keep", *LABEL_FREE), "--example-weight")
        else:
            require(0 <= a <= 1, f"--example-weight: {a}, expected 0 to 1.", "example_weight")
        b, room = self.batch_weight, 1.0 if isinstance(a, str) else 1 - a
        ok = b in ("auto", "keep") if isinstance(b, str) else 0 <= b <= room
        require(ok, f"--batch-weight: {b}, expected auto, keep or 0 to {room:g}.", "batch_weight")
        _check_estimator(self.batch_estimator, weighs=b not in ("keep", 0))
        one_of(self.granularity, ("global", "layer", "channel"), "--granularity")
        in_range(self, 0, 1, "thin")

    @property
    def is_stated(self) -> bool:
        """Whether a weight was asked for, which needs no labels."""
        words = self.example_weight in ("auto", "keep") and isinstance(self.batch_weight, str)
        return not words


@dataclass(frozen=True)
class GateRecipe:
    """How strict the choice between candidates is, and how the data are cut."""

    z: float = option(2.0, "Standard errors by which a candidate must win on the select split.")
    fit: float = option(0.6, "Part of the data for fitting.")
    select: float | str = option(
        0.2,
        "Part of the data for choosing, beside 0.6 to fit on; more where 20 are not reached. Or "
        "DATA of its own to choose on, such as images that the network was not trained on.",
    )
    seed: int = option(0, "Seed of the split and of every random choice.")
    temperature: str = option(
        "keep",
        "keep, or auto: where labels prove it, the head's weights and bias are divided by one "
        "temperature, and every other candidate is judged at its own, so that it must win by more.",
    )
    class_prior: str | None = option(
        None,
        "Shares of the classes where the network will be used: a JSON file of class to number, or "
        "em, estimated on --data without labels. log(new / old) goes into the head's bias. The old "
        'shares: {"from": {...}, "to": {...}} in the file, else counted in the labels, else equal.',
    )

    def __post_init__(self) -> None:
        one_of(self.temperature, ("auto", "keep"), "--temperature")
        in_range(self, 0, math.inf, "z")
        check_seed(self.seed)
        ok = 0 < self.fit < 1 and 0 < self.select_part <= 1 - self.fit
        parts = f"expected above 0 and at most {1 - self.fit:g}"
        require(ok, f"--select: {self.select}, {parts}, beside {self.fit:g} to fit on.", "select")

    @property
    def select_part(self) -> float:
        """The part of the data that would choose; with DATA for that, it goes to the fit."""
        return 0.2 if isinstance(self.select, str) else self.select


@dataclass(frozen=True)
class RunOptions:
    """How to run: nothing here changes a number by more than rounding."""

    device: str = option("auto", "auto, cpu, cuda or cuda:N.")
    precision: str = option("fp32", "fp32, bf16 or fp16 (autocast).")
    batch_size: int | None = option(
        None, "Batch size (default 128, less for large inputs on the CPU)."
    )
    workers: int = option(-1, "Processes that decode images (-1: by the kind of data).")

    def __post_init__(self) -> None:
        one_of(self.precision, ("fp32", "bf16", "fp16"), "--precision")
        in_range(self, 1, math.inf, "batch_size")
        require(self.workers >= -1, f"--workers: {self.workers}, expected at least 0.", "workers")


@dataclass(frozen=True)
class ModelRecipe:
    """Which model a checkpoint belongs to, and where in the file it lies."""

    model: str | None = option(
        None,
        "torchvision:NAME, timm:NAME, transformers:DIR, package.module:callable or "
        "path/to/file.py:callable; needed until a checkpoint carries one.",
    )
    arguments: tuple[tuple[str, Any], ...] = option(
        (), "Argument of the builder, a JSON value; repeatable."
    )
    key: str | None = option(None, "Dotted nesting of the state dict in the file.")
    prefix: str | None = option(None, "Prefix to strip from the tensors' names.")
    prefer_ema: bool = option(
        False, "Take the running mean of the weights that lies beside them in the file."
    )
    unfreeze: bool = option(
        False,
        "Turn FrozenBatchNorm2d layers into BatchNorm2d of the same numbers, on which commands "
        "act; the output then holds their num_batches_tracked, too, and loads into either.",
    )
    forward: str | None = option(
        None,
        "package.module:callable or path/to/file.py:callable, called with the model and a batch "
        "(inputs, labels or None, positions), for models that are not called on images alone.",
    )
    logits_output: str | None = option(
        None, "Which output holds the logits: its name or index, dotted where they are nested."
    )
    trust_code: bool = option(
        False, "Open .pt2 files, which can run code as torch reads them: only files of your own."
    )
    like_input: bool = option(
        False,
        "Write a copy of CKPT, a training checkpoint (.ckpt, .pth), with the new weights in their "
        "places and all else as it is: training goes on from it. No example weights.",
    )
    domain: str | None = option(
        None,
        "Which statistics of a file that has several: a name, in eval also auto, the nearest by "
        "what the first norm layer meets. calibrate writes them under this name.",
    )

    def __post_init__(self) -> None:
        require(
            self.forward is None or self.logits_output is None,
            f"--output: {self.logits_output}, but --forward returns the logits itself. Leave one "
            "of them out.",
            "logits_output",
        )


@dataclass(frozen=True)
class EvaluationRecipe:
    """What else is measured beside the usual metrics."""

    corruptions: bool = option(
        False,
        "Also measure under common corruptions: " + ", ".join(CORRUPTIONS) + "; 3 severities each.",
    )
    compare_batch_sizes: bool = option(
        False, "Also compare each image's logits alone, in its batch and in another batch."
    )
    streams: str | None = option(None, "Also in other orders: iid,sorted,mixed,single, or some.")
    tiles: tuple[int, ...] | None = option(
        None,
        "Also compare the maps of some whole images with those of tiles of this size, by the "
        "distance to the nearest cut: for networks that are run tile by tile.",
    )
    coverage: float | None = option(
        None,
        "Also sets of classes that hold the right one with this probability, such as 0.9: the "
        "threshold is from one half of the examples, the coverage from the other.",
    )
    estimate_from: str | None = option(
        None,
        "Labelled examples of the usual kind: by how sure the model is of them, its accuracy on "
        "--data is estimated, which needs no labels there. Under strong shifts it is too high.",
    )
    fast: bool = option(
        False,
        "Evaluate copies made faster: norm layers of weight 0 folded, live ones fused with what "
        "follows, on CPUs channels last. Equal to rounding, which is checked first.",
    )
    metric: tuple[str, ...] = option(
        (),
        "Metric of your own, package.module:callable or path/to/file.py:callable, called with all "
        "outputs and labels as numpy arrays; returns a number or a dict of numbers; repeatable.",
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
        """What is asked for of sets and estimates."""
        given = {"coverage": self.coverage, "estimate_from": self.estimate_from}
        return {name: value for name, value in given.items() if value is not None}
