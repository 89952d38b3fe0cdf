"""The settings of a short training run: what is trained, and how steps are taken."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from bnfix.core.options import in_range, one_of, option, require

#: What fine-tuning may train.
TRAINED = ("norms", "head", "norms+head", "last-norm+head", "all")
#: What a norm layer is to the residual branches around it.
ROLES = ("last", "shortcut", "stem", "other")


@dataclass(frozen=True)
class OptimizerRecipe:
    """How the steps of a training run are taken."""

    optimizer: str = option("adamw", "adamw or sgd (Nesterov momentum 0.9).")
    lr: float | None = option(
        None,
        "Peak learning rate, falling to 0 by cosine (default 0.006; 0.0005 with --train all).",
    )
    weight_lr: float = option(0.02, "Peak rate for learned example weights.")
    warmup: float = option(0.05, "Fraction of the steps over which the rate rises from 0.")
    weight_decay: float = option(0.0, "Decay of all trained parameters but gamma and beta.")
    norm_decay: float | str = option(
        0.0,
        "Decay of gamma and beta, decoupled from the gradient; or one a role, such as "
        "last=0.05,shortcut=0,other=0.01: the last layer of a residual branch, that of its "
        "shortcut, the stem's, any other.",
    )
    norm_decay_target: str = option(
        "none", "Where gamma and beta decay to: none, zero or identity (gamma 1, beta 0)."
    )
    clip: float | None = option(
        None, "Largest norm of the gradient over all that is trained; a larger one is shortened."
    )
    accumulate: int = option(
        1, "Batches a step: their gradients together are those of all their examples in one batch."
    )
    ema: float | None = option(
        None,
        "Evaluate and keep an exponential moving average of what is trained: its decay, such as "
        "0.99 (less at the start, where a step t counts as min(decay, (1+t)/(10+t))).",
    )

    def __post_init__(self) -> None:
        one_of(self.optimizer, ("adamw", "sgd"), "--optimizer")
        one_of(self.norm_decay_target, ("none", "zero", "identity"), "--norm-decay-target")
        in_range(self, 0, 1000, "lr", "weight_lr", "weight_decay")
        for role, decay in self.norm_decays.items():
            ok = role in ROLES and 0 <= decay <= 1000
            known = f"expected 0 to 1000, or {', '.join(ROLES)} with = and such a number"
            require(ok, f"--norm-decay: {self.norm_decay}, {known}.", "norm_decay")
        in_range(self, 0, 1, "warmup", "ema")
        clip = self.clip
        require(clip is None or clip >= 0, f"--clip: {clip}, expected 0 or more.", "clip")
        in_range(self, 1, math.inf, "accumulate")

    @property
    def norm_decays(self) -> dict[str, float]:
        """The decay of each role; a single number is that of all, ``other``."""
        if not isinstance(self.norm_decay, str):
            return {"other": self.norm_decay}
        parts = [part.partition("=") for part in self.norm_decay.split(",")]
        found = {role.strip(): _number(value) for role, _, value in parts}
        return found if len(found) == len(parts) else {"": math.nan}  # a role twice is none


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclass(frozen=True)
class IngredientRecipe(OptimizerRecipe):
    """What a step adds to plain training; all of it is off by default."""

    batch_statistics: str = option(
        "inclusive",
        "With --statistics train: inclusive, or exclusive, where the others of its ghost batch "
        "normalize an example.",
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
        "Sharpness-aware steps: gradients are taken where gamma and beta lie this far uphill; each "
        "step costs two.",
    )

    refit: bool = option(
        False,
        "Train the candidate that won once more, on the images that chose it, too. Nothing judges "
        "that but the test.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.batch_statistics, ("inclusive", "exclusive"), "--batch-statistics")
        in_range(self, 2, math.inf, "ghost_noise")
        in_range(self, 0, 1000, "sharpness")
        factors = self.consistency
        ok = factors is None or (len(factors) == 2 and all(0 <= f <= 1000 for f in factors))
        require(ok, f"--consistency: {factors}, expected two numbers from 0.", "consistency")


@dataclass(frozen=True)
class FinetuneRecipe(IngredientRecipe):
    """A short training run on top of a trained checkpoint."""

    train: str = option("norms", f"What is trained: {', '.join(TRAINED)}.")
    statistics: str = option(
        "frozen", "Normalize by frozen statistics, or train (batch statistics, then recalibrated)."
    )
    example_weight: str = option("keep", "keep, or learn the weights per channel along the way.")
    epochs: int = option(2, "Passes over the fit examples.")
    steps: int | None = option(None, "Number of steps, instead of epochs.")
    batch_size: int | None = option(
        None, "Batch size of training (default 64, less for large inputs)."
    )
    ghost_size: int | None = option(None, "Ghost batch in training, with --statistics train.")
    label_smoothing: float = option(0.0, "Label smoothing of the training loss.")
    augment: str = option(
        "none",
        "Training images: none; light (mirror, shift by up to 1/8); standard (mirror, random crop "
        "of 1/2 to all of the area). Not for digits or text, which mirroring makes wrong.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.train, TRAINED, "--train")
        one_of(self.statistics, ("frozen", "train"), "--statistics")
        one_of(self.example_weight, ("keep", "learn"), "--example-weight")
        one_of(self.augment, ("none", "light", "standard"), "--augment")
        in_range(self, 0, math.inf, "epochs", "steps")
        in_range(self, 1, math.inf, "batch_size", "ghost_size")
        in_range(self, 0, 1, "label_smoothing")
        trains = self.statistics == "train"
        ok = trains or self.batch_statistics == "inclusive"
        only = "statistics are only made of batches with --statistics train. Add it, or leave this"
        require(ok, f"--batch-statistics exclusive: {only} out.", "batch_statistics")
        alone = next((n for n in ("ghost_size", "batch_size") if getattr(self, n) == 1), "")
        ok = self.batch_statistics == "inclusive" or not alone
        found = f"--batch-statistics exclusive: --{alone.replace('_', '-')} is 1, so an example"
        require(ok, f"{found} has no others, expected at least 2. Give more.", "batch_statistics")
        ok = not trains or self.ghost_noise is None
        only = "batches bring noise of their own with --statistics train. Leave one of them out"
        require(ok, f"--ghost-noise: {only}.", "ghost_noise")

    @property
    def peak_lr(self) -> float:
        """The peak learning rate: the one stated, or that for what is trained."""
        if self.lr is not None:
            return self.lr
        return 0.0005 if self.train == "all" else 0.006

    def stated(self) -> dict[str, Any]:
        """All settings but ingredients that are off, as earlier versions state them."""
        plain = asdict(IngredientRecipe())
        later = plain.keys() - asdict(OptimizerRecipe()).keys()
        own = asdict(self)
        return {k: v for k, v in own.items() if k not in later or v != plain[k]}
