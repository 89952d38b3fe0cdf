"""The frozen settings of each stage (what is computed), and the run options (how).

A recipe holds everything that can change a number in a report by more than rounding; the output's
history stores it. Run options change results by rounding only. This file has the only copy of
defaults and help texts: the command line reads both from these classes.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bnfix.core.options import KINDS, above_zero, check_seed, in_range, one_of, option, require
from bnfix.core.options import DataRecipe as DataRecipe
from bnfix.core.options import EvaluationRecipe as EvaluationRecipe
from bnfix.core.options import ModelRecipe as ModelRecipe
from bnfix.core.options import Preprocessing as Preprocessing
from bnfix.core.options import RunOptions as RunOptions
from bnfix.core.options import TaskRecipe as TaskRecipe

#: Ways to set the example weight without labels, for networks trained with batches of B.
LABEL_FREE = ("match", "fit-moments", "fit-predictions")
#: The parameters that fine-tuning can train.
TRAINED = ("norms", "head", "norms+head", "last-norm+head", "all")
#: The roles of norm layers in the residual branches around them.
ROLES = ("last", "shortcut", "stem", "other")
_ESTIMATOR = (
    "With --batch-weight: how to combine the moments of the images into the batch's: mean (the "
    "default), or median, which tolerates garbage in fewer than half of the images."
)


@dataclass(frozen=True)
class SwapRecipe:
    """The normalization that replaces the layers."""

    to: str = option("example-aware", "Kind of normalization: " + ", ".join(KINDS) + ".")
    example_weight: float | None = option(
        None, "Weight of the example in its own statistics, 0..1."
    )
    ghost_size: int | None = option(None, "Examples per ghost batch in training.")
    channel_groups: int | None = option(None, "Number of channel groups with shared statistics.")
    layers: tuple[str, ...] = option((), "Only layers whose dotted name matches; repeatable.")
    skip: tuple[str, ...] = option((), "Skip layers whose dotted name matches; repeatable.")
    batch_weight: float | None = option(None, "Weight of the batch in the statistics, 0..1.")
    batch_estimator: str | None = option(None, _ESTIMATOR)

    def __post_init__(self) -> None:
        one_of(self.to, KINDS, "--to")
        in_range(self, 0, 1, "example_weight")
        a, b = self.example_weight, self.batch_weight or 0.0
        room = 1 - (KINDS[self.to][2] if a is None else a)
        require(0 <= b <= room, f"--batch-weight: {b}, expected 0 to {room:g}.", "batch_weight")
        _check_estimator(self.batch_estimator, weighs=bool(self.batch_weight))
        in_range(self, 1, math.inf, "ghost_size", "channel_groups")


def _check_estimator(estimator: str | None, *, weighs: bool) -> None:
    """Refuse an estimator that is unknown or unused."""
    if estimator is not None:
        one_of(estimator, ("mean", "median"), "--batch-estimator")
        words = "--batch-estimator: only with --batch-weight above 0. Give both or neither."
        require(weighs, words, "batch_estimator")


@dataclass(frozen=True)
class AverageRecipe:
    """The other checkpoints of an average, their weights, and the method."""

    files: tuple[str, ...] = option((), "Further checkpoints.")
    weights: tuple[float, ...] = option(
        (), "Weights of the checkpoints, comma-separated (default: equal)."
    )
    method: str = option(
        "uniform",
        "uniform: all of them. greedy: starting from the best one, keep each checkpoint only if "
        "the mean with it is better on labelled images.",
    )
    best: int | None = option(
        None, "Only the N best, by a number that all files contain, such as best_acc."
    )
    statistics: str = option(
        "auto",
        "population; interpolated: each layer's output gets the mean of the checkpoints' means and "
        "deviations; auto: population, unless labels prove interpolated better.",
    )

    def __post_init__(self) -> None:
        one_of(self.method, ("uniform", "greedy"), "--method")
        one_of(self.statistics, ("auto", "population", "interpolated"), "--statistics")
        n, n_weights, best = len(self.files) + 1, len(self.weights), self.best
        require(n > 1, "average: 1 checkpoint, expected at least 2.", "files")
        words = f"--weights: {n_weights} numbers for {n} checkpoints. Give one for each."
        require(n_weights in (0, n), words, "weights")
        above_zero(self, "weights")
        ok = best is None or 2 <= best <= n
        require(ok, f"--best: {best}, expected 2 to {n}, of {n} files.", "best")
        words = "--best decides the order of the files during the run. Leave one of them out."
        require(best is None or not n_weights, f"--weights: {words}", "weights")


@dataclass(frozen=True, kw_only=True)
class NoiseRecipe:
    """Weights that differ from copy to copy of a network, as on analogue or worn hardware."""

    weight_noise: float = option(
        0.0,
        "Noise on every weight of a copy, in standard deviations of its tensor. bnfix tries the "
        "mean statistics of several copies, and judges everything on other copies.",
    )
    draws: int = option(8, "With --weight-noise: copies to measure, and as many to judge on.")

    def __post_init__(self) -> None:
        in_range(self, 0, 10, "weight_noise")
        in_range(self, 1, 1000, "draws")
        words = "only with --weight-noise. Add it, or leave --draws out."
        require(self.weight_noise > 0 or self.draws == 8, f"--draws: {words}", "draws")

    def copies(self, part: str, seed: int) -> range:
        """Seeds of the copies that a part of the data runs through; no two parts share one."""
        first = seed + 1000 * ("fit", "select", "test").index(part)
        return range(first, first + (self.draws if self.weight_noise else 1))


@dataclass(frozen=True)
class StatisticsRecipe(NoiseRecipe):
    """Whether and how to recalibrate running statistics."""

    statistics: str = option("auto", "auto, keep, population, train-batch, reference or blend.")
    prior: float | str | None = option(
        None,
        "With --statistics blend: the stored statistics count as N examples, so n new ones weigh "
        "n/(n+N). auto, the default, uses each layer's drift.",
    )
    robust: bool = option(
        False,
        "Leave out images that differ in kind from most, for population and blend; one more pass.",
    )
    mix: tuple[float, ...] = option(
        (),
        "Weights of several --data in the statistics, such as 1,1, regardless of their numbers of "
        "images (default: by their numbers of images).",
    )
    reference: str | None = option(
        None, "Checkpoint of the undamaged network that this one was made from."
    )
    reference_model: str | None = option(None, "Its model spec (default: the checkpoint's).")
    train_batch_size: int | None = option(None, "Original training batch size per device.")
    feed: str = option(
        "batch",
        "Normalization of the layers below: batch (one pass) or sequential (exact, by depth).",
    )
    samples: int | str | None = option(
        None,
        "Examples to use, drawn in seeded random order: a number, or auto for as many as needed "
        "(default: all).",
    )
    batch_size: int = option(128, "Batch size of the batch feed.")
    tolerance: float = option(
        0.04,
        "With --samples auto: the largest standard error of any layer's mean and variance, "
        "relative to its spread, root mean square over its channels.",
    )
    include_frozen: bool = option(
        False, "Also recalibrate layers frozen by the model's code (evaluation mode, no gradients)."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        kind, reference = self.statistics, self.reference
        kinds = ("auto", "keep", "population", "train-batch", "blend", "reference")
        one_of(kind, kinds, "--statistics")
        one_of(self.feed, ("batch", "sequential"), "--feed")
        in_range(self, 1, math.inf, "train_batch_size", "batch_size")
        above_zero(self, "mix")
        n, prior, least = self.samples, self.prior, self.tolerance
        require(least > 0, f"--tolerance: {least}, expected above 0.", "tolerance")
        ok = n is None or n == "auto" or (isinstance(n, int) and n >= 2)
        require(ok, f"--samples: {n}, expected auto or a number of at least 2.", "samples")
        words = "--tolerance: only with --samples auto. Add it, or leave --tolerance out."
        require(n == "auto" or self.tolerance == 0.04, words, "tolerance")
        ok = prior in (None, "auto") or (not isinstance(prior, str) and 0 <= prior < math.inf)
        require(ok, f"--prior: {prior}, expected auto or a number of at least 0.", "prior")

        ok = reference is not None or not (kind == "reference" or self.reference_model)
        words = "the undamaged network's checkpoint is missing. Give --reference CKPT."
        require(ok, f"--reference: {words}", "reference")
        ok = kind != "train-batch" or self.train_batch_size is not None
        words = "the batch size is missing. Give --train-batch-size B."
        require(ok, f"--statistics train-batch: {words}", "train_batch_size")
        found = f"--statistics is {kind}, expected"
        ok = prior is None or kind == "blend"
        require(ok, f"--prior: {found} blend. Add --statistics blend.", "prior")
        ok = not self.robust or kind in ("population", "blend")
        require(ok, f"--robust: {found} population or blend. Add --statistics blend.", "robust")
        ok = kind in ("auto", "population", "blend") and not self.robust and reference is None
        words = "only with --statistics auto, population or blend, without --robust or --reference"
        require(ok or not self.mix, f"--mix: {words}.", "mix")
        others = self.robust or self.mix or reference or self.train_batch_size
        ok = kind in ("auto", "population") and not others
        words = "without --robust, --mix, --reference, --train-batch-size"
        words = f"--weight-noise: only with --statistics auto or population, {words}."
        require(ok or not self.weight_noise, words, "weight_noise")


@dataclass(frozen=True)
class WeightRecipe:
    """How to choose the example weight."""

    example_weight: str | float = option(
        "auto",
        "auto, keep, or a number from 0 to 1. Without labels, with --train-batch-size B: match "
        "(1/B), fit-moments (per layer, to the moments of random batches of B), fit-predictions "
        "(per layer, to the predictions in such batches).",
    )
    granularity: str = option("channel", "Finest granularity: global, layer or channel.")
    pointwise: bool = option(False, "Also weigh layers whose maps have a single position.")
    epochs: int = option(2, "Passes over the fit examples when weights are learned per channel.")
    thin: float = option(
        0.03,
        "Fraction of the gain, including one standard error, to give up for setting whole layers "
        "back to 0 (0: nothing).",
    )
    batch_size: int | None = option(
        None, "Batch size for learning weights (default 64, less for large inputs)."
    )
    lr: float = option(0.02, "Adam's rate for learned weights, falling to 0 by cosine.")
    start: float = option(0.05, "Smallest weight from which learning starts.")
    batch_weight: str | float = option("keep", "auto, keep, or the weight of the batch, 0 to 1.")
    batch_estimator: str | None = option(None, _ESTIMATOR)
    assume_iid: bool = option(False, "Let --batch-weight auto harm images sorted by class.")

    def __post_init__(self) -> None:
        a = self.example_weight
        if isinstance(a, str):
            more = ", or a number from 0 to 1"
            one_of(a, ("auto", "keep", *LABEL_FREE), "--example-weight", more)
        else:
            in_range(self, 0, 1, "example_weight")
        b, room = self.batch_weight, 1.0 if isinstance(a, str) else 1 - a
        ok = b in ("auto", "keep") if isinstance(b, str) else 0 <= b <= room
        require(ok, f"--batch-weight: {b}, expected auto, keep or 0 to {room:g}.", "batch_weight")
        _check_estimator(self.batch_estimator, weighs=b not in ("keep", 0))
        one_of(self.granularity, ("global", "layer", "channel"), "--granularity")
        in_range(self, 0, 1, "thin", excluded=True)

    @property
    def is_stated(self) -> bool:
        """Whether a weight was stated; then no labels are needed."""
        words = self.example_weight in ("auto", "keep") and isinstance(self.batch_weight, str)
        return not words


@dataclass(frozen=True)
class GateRecipe:
    """How strict the choice between candidates is, and how the data are split."""

    z: float = option(2.0, "Standard errors by which a candidate must win on the select split.")
    fit: float = option(0.6, "Fraction of the data for fitting.")
    select: float | str = option(
        0.2,
        "Fraction of the data to choose on, next to 0.6 to fit on; more if below 20 examples. Or "
        "separate DATA to choose on, such as images that the network was not trained on.",
    )
    seed: int = option(0, "Seed of the split and of every random choice.")
    temperature: str = option(
        "keep",
        "keep, or auto: divide the head's weights and bias by a temperature, if labels prove it. "
        "Every other candidate is then judged at its own temperature and must gain more than this.",
    )
    class_prior: str | None = option(
        None,
        "Class shares where the network will be used: a JSON file of class to number, or em "
        "(estimated on --data without labels). log(new / old) goes into the head's bias. The old "
        'shares: {"from": {...}, "to": {...}} in the file, else counted in the labels, else equal.',
    )

    def __post_init__(self) -> None:
        one_of(self.temperature, ("auto", "keep"), "--temperature")
        in_range(self, 0, math.inf, "z")
        check_seed(self.seed)
        ok = 0 < self.fit < 1 and 0 < self.select_part <= 1 - self.fit
        parts = f"expected above 0 and at most {1 - self.fit:g}"
        require(ok, f"--select: {self.select}, {parts}, with {self.fit:g} to fit on.", "select")

    @property
    def select_part(self) -> float:
        """The fraction of the data for choosing; with separate DATA, it goes to the fit."""
        return 0.2 if isinstance(self.select, str) else self.select


@dataclass(frozen=True)
class OptimizerRecipe:
    """The steps of a training run."""

    optimizer: str = option("adamw", "adamw or sgd (Nesterov momentum 0.9).")
    lr: float | None = option(
        None, "Peak learning rate, falling to 0 by cosine (default 0.006; 0.0005 with --train all)."
    )
    weight_lr: float = option(0.02, "Peak rate for learned example weights.")
    warmup: float = option(0.05, "Fraction of the steps over which the rate rises from 0.")
    weight_decay: float = option(0.0, "Decay of all trained parameters except gamma and beta.")
    norm_decay: float | str = option(
        0.0,
        "Decay of gamma and beta, decoupled from the gradient. Or one per role, such as "
        "last=0.05,shortcut=0,other=0.01: last (the last layer of a residual branch), shortcut, "
        "stem, other.",
    )
    norm_decay_target: str = option(
        "none", "Target of the decay of gamma and beta: none, zero or identity (gamma 1, beta 0)."
    )
    clip: float | None = option(
        None, "Largest gradient norm over all trained parameters; a longer gradient is scaled down."
    )
    accumulate: int = option(
        1, "Batches per step: their combined gradient is that of one batch with all examples."
    )
    ema: float | None = option(
        None,
        "Evaluate and keep an exponential moving average of the trained parameters: its decay, "
        "such as 0.99 (less at the start: step t uses min(decay, (1+t)/(10+t))).",
    )

    def __post_init__(self) -> None:
        one_of(self.optimizer, ("adamw", "sgd"), "--optimizer")
        one_of(self.norm_decay_target, ("none", "zero", "identity"), "--norm-decay-target")
        in_range(self, 0, 1000, "lr", "weight_lr", "weight_decay")
        for role, decay in self.norm_decays.items():
            ok = role in ROLES and 0 <= decay <= 1000
            known = f"expected 0 to 1000, or {', '.join(ROLES)} with = and such a number"
            require(ok, f"--norm-decay: {self.norm_decay}, {known}.", "norm_decay")
        in_range(self, 0, 1, "warmup", "ema", excluded=True)
        in_range(self, 0, math.inf, "clip")
        in_range(self, 1, math.inf, "accumulate")

    @property
    def norm_decays(self) -> dict[str, float]:
        """The decay of each role; a single number applies to all, as ``other``."""
        if not isinstance(self.norm_decay, str):
            return {"other": self.norm_decay}
        parts = [part.partition("=") for part in self.norm_decay.split(",")]
        none = {"": math.nan}
        try:
            found = {role.strip(): float(value) for role, _, value in parts}
        except ValueError:
            return none
        return found if len(found) == len(parts) else none  # a role twice is none


@dataclass(frozen=True)
class IngredientRecipe(OptimizerRecipe):
    """Additions to plain training; all are off by default."""

    batch_statistics: str = option(
        "inclusive",
        "With --statistics train: inclusive, or exclusive: an example is normalized by the others "
        "of its ghost batch.",
    )
    ghost_noise: int | None = option(
        None,
        "With --statistics frozen: noise on the statistics, as large as in ghost batches of N.",
    )
    consistency: tuple[float, ...] | None = option(
        None,
        "Penalty on the gaps between stored and batch statistics that inspect shows: factors of "
        "the mean gap and the sd gap, such as 0.1,0.01.",
    )
    sharpness: float = option(
        0.0,
        "Sharpness-aware steps: compute gradients with gamma and beta moved uphill by this "
        "distance. Each step costs two.",
    )

    refit: bool = option(
        False,
        "Train the winning candidate again, with the select images added. Only the test judges "
        "the result.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.batch_statistics, ("inclusive", "exclusive"), "--batch-statistics")
        in_range(self, 2, math.inf, "ghost_noise")
        in_range(self, 0, 1000, "sharpness")
        factors = self.consistency
        ok = factors is None or (len(factors) == 2 and all(0 <= f <= 1000 for f in factors))
        shown = ",".join(map(str, factors or ()))
        require(ok, f"--consistency: {shown}, expected two numbers, 0 to 1000.", "consistency")


@dataclass(frozen=True)
class FinetuneRecipe(IngredientRecipe):
    """A short training run on top of a trained checkpoint."""

    train: str = option("norms", f"Parameters to train: {', '.join(TRAINED)}.")
    statistics: str = option(
        "frozen", "frozen (stored statistics) or train (batch statistics, then recalibration)."
    )
    example_weight: str = option("keep", "keep, or learn: also train the weights per channel.")
    epochs: int = option(2, "Passes over the fit examples.")
    steps: int | None = option(None, "Number of steps, instead of epochs.")
    batch_size: int | None = option(
        None, "Training batch size (default 64, less for large inputs)."
    )
    ghost_size: int | None = option(None, "Ghost batch size in training, with --statistics train.")
    label_smoothing: float = option(0.0, "Label smoothing of the training loss.")
    augment: str = option(
        "none",
        "Augmentation: none; light (mirror, shift by up to 1/8); standard (mirror, random crop of "
        "1/2 to all of the area). Not for digits or text: mirroring makes them wrong.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.train, TRAINED, "--train")
        one_of(self.statistics, ("frozen", "train"), "--statistics")
        one_of(self.example_weight, ("keep", "learn"), "--example-weight")
        one_of(self.augment, ("none", "light", "standard"), "--augment")
        in_range(self, 0, math.inf, "epochs", "steps")
        in_range(self, 1, math.inf, "batch_size", "ghost_size")
        in_range(self, 0, 1, "label_smoothing", excluded=True)
        trains = self.statistics == "train"
        ok = trains or self.batch_statistics == "inclusive"
        only = "needs batch statistics, from --statistics train. Add it, or leave this option"
        require(ok, f"--batch-statistics exclusive: {only} out.", "batch_statistics")
        alone = next((n for n in ("ghost_size", "batch_size") if getattr(self, n) == 1), "")
        ok = self.batch_statistics == "inclusive" or not alone
        found = f"--batch-statistics exclusive: --{alone.replace('_', '-')} is 1, so an example"
        require(ok, f"{found} has no others, expected at least 2. Give more.", "batch_statistics")
        ok = not trains or self.ghost_noise is None
        only = "with --statistics train, batches have their own noise. Leave one of them out"
        require(ok, f"--ghost-noise: {only}.", "ghost_noise")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: the stated one, or the default for the trained parameters."""
        if self.lr is not None:
            return self.lr
        return 0.0005 if self.train == "all" else 0.006

    def stated(self) -> dict[str, Any]:
        """All settings except ingredients that are off, as earlier versions state them."""
        plain = asdict(IngredientRecipe())
        later = plain.keys() - asdict(OptimizerRecipe()).keys()
        own = asdict(self)
        return {k: v for k, v in own.items() if k not in later or v != plain[k]}
