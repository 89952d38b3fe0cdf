"""The statistics that are asked for: what belongs to which target, and its rule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from bnfix.checkpoints.save import identity_of
from bnfix.core.errors import ConfigError
from bnfix.norm.sites import NormSite
from bnfix.recalibrate.blend import Blend, Weight, by_drift, by_examples, fixed
from bnfix.recalibrate.collector import Target
from bnfix.recalibrate.reference import Originals, Reference


@dataclass(frozen=True)
class Wanted:
    """A target, and the options that are its own."""

    target: str
    train_batch_size: int | None = None
    reference: Originals | None = None
    prior: float | str | None = None
    new_weight: float | None = None
    robust: bool = False
    mix: tuple[float, ...] = ()

    def check(self, feed: str) -> None:
        """Refuse what is unknown, missing, out of range or another target's."""
        target, b = self.target, self.train_batch_size
        takes = {"reference": nn.Module, "interpolated": Mapping}.get(target)
        known = takes is not None or target in ("population", "train-batch", "blend")
        if not known or feed not in ("batch", "sequential"):
            raise ConfigError(
                f"target {target!r}, feed {feed!r}: expected population, train-batch, "
                "reference or blend (or interpolated), batch or sequential."
            )
        if target == "train-batch" and (b is None or b < 1):
            raise ConfigError("target train-batch: give train_batch_size, at least 1.")
        if not isinstance(self.reference, takes or type(None)):
            raise ConfigError(
                "target reference: give the original as reference=; interpolated: the networks, "
                "each with its weight, as reference={network: weight}; no other target takes one.",
                name="reference",
            )
        if takes is not None and feed == "batch":
            raise ConfigError(
                f"target {target}: needs the sequential feed. Under the batch feed a layer sees "
                "what batches normalized by themselves, which the original's stored statistics "
                "never gave.",
                name="feed",
            )
        if self.robust and (feed == "batch" or target not in ("population", "blend")):
            raise ConfigError(
                "robust: only for targets population and blend, by the sequential feed. Under the "
                "batch feed garbage normalizes its whole batch.",
                name="robust",
            )
        if self.mix and (self.robust or target not in ("population", "blend")):
            raise ConfigError(
                "mix: only for targets population and blend, and not with robust.", name="mix"
            )
        self._check_blend()

    def _check_blend(self) -> None:
        prior, weight = self.prior, self.new_weight
        if self.target != "blend" and (prior is not None or weight is not None):
            raise ConfigError("prior, new_weight: only target blend takes them.", name="prior")
        if prior is not None and weight is not None:
            raise ConfigError("prior, new_weight: both say how much. Give one.", name="prior")
        if not (prior in (None, "auto") or (not isinstance(prior, str) and 0 <= prior < 1e15)):
            raise ConfigError(f"prior: {prior}, expected auto or a number from 0.", name="prior")
        if weight is not None and not 0 <= weight <= 1:
            raise ConfigError(f"new_weight: {weight}, expected 0 to 1.", name="new_weight")

    def rule(self, model: nn.Module, sites: Sequence[NormSite]) -> Target:
        """The rule of these statistics for a model."""
        if self.reference is not None:
            return Reference(self.reference, model, sites)
        rule = Target(self.train_batch_size if self.target == "train-batch" else None)
        if self.target == "blend":
            rule = Blend(sites, self._weight(len(sites)))
        if self.robust:
            rule.robust, rule.name = True, f"robust {rule.name}"
        return rule

    def _weight(self, n_layers: int) -> Weight:
        if self.new_weight is not None:
            return fixed(self.new_weight)
        if self.prior is None or isinstance(self.prior, str):
            return by_drift(n_layers)
        return by_examples(self.prior)

    def to_json(self) -> dict[str, Any]:
        """What tells runs of different targets apart."""
        own: dict[str, Any] = (
            {} if self.target != "blend" else {"prior": self.prior, "weight": self.new_weight}
        )
        if self.robust:
            own["robust"] = True
        if self.mix:
            own["mix"] = self.mix
        if isinstance(self.reference, nn.Module):
            own["reference"] = identity_of(self.reference, {})
        elif self.reference is not None:
            own["reference"] = [(identity_of(n, {}), w) for n, w in self.reference.items()]
        return {"target": self.target, **own}
