"""What a report says in sentences: the verdict, what was done, what was assumed or skipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.errors import Note, some
from bnfix.layers.surgery import SwapPlan
from bnfix.measuring.custom_metrics import Custom
from bnfix.measuring.movement import Moved
from bnfix.measuring.pairing import Decision, Paired
from bnfix.reporting.pages import clean, count, difference, direction, number, percent
from bnfix.reporting.records import DataUsed, Evaluated
from bnfix.statistics.calibration import Calibration
from bnfix.tuning.finetuning import Finetuning
from bnfix.weighing.example_weight import WeightChoice

#: Commands whose first model is the same network before the work.
_BEFORE = ("fix", "convert", "calibrate", "finetune", "demo", "export")
_BADGES = {"better": "Better", "same": "Same", "worse": "Worse"}


@dataclass(frozen=True)
class Findings:
    """What the verdict is about.

    Args:
        command: ``fix``, ``eval``, ...
        data: what was evaluated on.
        models: the first is what the others are compared against.
        paired: each further model against the first.
        n_seen: evaluated examples that were used for fitting or choosing.
        n_swapped: norm layers that were swapped.
        moved: how far the outputs moved.
    """

    command: str
    data: DataUsed | None
    models: tuple[Evaluated, ...]
    paired: tuple[Paired | None, ...]
    n_seen: int = 0
    n_swapped: int = 0
    moved: Moved | None = None

    def headline(self) -> str:
        """The first sentence, without the verdict's word."""
        if not self.models:
            n = self.n_swapped
            done = f"{count(n)} norm {'layer' if n == 1 else 'layers'} swapped; " if n else ""
            return f"{done}no model was evaluated, so nothing is claimed."
        last, images = self.models[-1].metrics, self._images()
        if not self.models[-1].classified:
            return self._own_metrics(images)
        if last.problem:
            return f"{clean(self.models[-1].name)} cannot be evaluated on {images}: {last.problem}."
        if last.top1 is None:
            return f"the {images} have no labels, so nothing can be proven."
        if len(self.models) == 1:
            low, high = (100 * end for end in last.interval["top1"])
            return f"{percent(last.top1)} of {images} right (95% interval {low:.1f} to {high:.1f})."
        first, paired = self.models[0].metrics, self.paired[-1]
        if paired is None or first.top1 is None:
            why = f"cannot be evaluated: {first.problem}" if first.problem else "was not measured"
            return f"{percent(last.top1)} of {images} right; {clean(self.models[0].name)} {why}."
        if self._judged_by_nll():
            return (
                f"NLL {number(last.nll)} on {images}, {number(first.nll)} {self._reference()}; "
                f"the difference is {difference(paired.nll)}."
            )
        no = "no measurable difference: " if paired.verdict == "same" else ""
        return (
            f"{no}{percent(last.top1)} of {images} right, {percent(first.top1)} "
            f"{self._reference()}; the difference is {difference(paired.top1, points=True)}."
        )

    def remarks(self) -> list[Note]:
        """What else must be known to judge the headline, one sentence each."""
        told: list[Note] = []
        paired = self.paired[-1] if self.paired else None
        if paired is not None and math.isfinite(paired.nll.difference):
            first, last = self.models[0].metrics, self.models[-1].metrics
            if self._judged_by_nll():
                one, other, of = percent(last.top1), percent(first.top1), paired.top1
                told.append(Note(
                    f"Top-1 {direction(of)}: {one}, {other} {self._reference()} "
                    f"(difference {difference(of, points=True)})."
                ))  # fmt: skip
            else:
                told.append(Note(
                    f"NLL {direction(paired.nll)}: {number(last.nll)}, {number(first.nll)} "
                    f"{self._reference()} (difference {difference(paired.nll)})."
                ))  # fmt: skip
        if self.models and (m := self.models[-1].metrics).top1 is not None:
            chance = 1 / m.logits.shape[1] if m.logits.size else 0
            if m.interval["top1"][0] <= chance:
                told.append(Note(
                    f"This is no better than chance ({percent(chance)}): check preprocessing, "
                    "--class-map and --output before anything else.",
                    "caution",
                ))  # fmt: skip
        if self._temperature_only():
            text = "Temperature scaling alone would do: nothing of the gain is left after it."
            told.append(Note(text, "caution"))
        if self.n_seen:
            text = "of these images were used for fitting or choosing, so this is no proof."
            told.append(Note(f"{count(self.n_seen)} {text}", "caution"))
        if self.moved is not None:
            told.append(self._movement(self.moved))
        return told

    def _movement(self, moved: Moved) -> Note:
        """How far the outputs moved, with a warning where that is far and no proof is at hand."""
        images = f"on {count(moved.n)} images"
        if moved.relative_rms == 0 and not moved.top1_changed:
            return Note(f"The outputs did not change {images}.")
        told = (
            "The outputs cannot be compared with those before (not finite, or of another shape)"
            if moved.relative_rms is None
            else f"The outputs changed by {percent(moved.relative_rms)} (relative RMS)"
        )
        if moved.top1_changed is not None:
            told += f", the top-1 class of {percent(moved.top1_changed)}"
        told += f" {images}."
        last = self.paired[-1] if self.paired else None
        if not moved.is_large or (last is not None and last.verdict == "better"):
            return Note(told)
        return Note(
            f"{told} Warning: this is a large change, and no labelled image shows that it helps. "
            "Compare both files with bnfix eval before you use the new one.",
            "caution",
        )

    def _judged_by_nll(self) -> bool:
        """Whether NLL, not top-1, carries the verdict."""
        paired = self.paired[-1] if self.paired else None
        if paired is None or paired.verdict == "same":
            return False
        low, high = paired.top1.interval
        return not (low > 0 if paired.verdict == "better" else high < 0)

    def _reference(self) -> str:
        if self.command in _BEFORE and len(self.models) == 2:
            return "before"
        if self.command == "average":
            return "with the first checkpoint"
        return f"with {clean(self.models[0].name)}"

    def _images(self) -> str:
        is_test = self.data is not None and self.data.splits.get("test") and not self.n_seen
        spoilt = self.data.corruption if self.data is not None else None
        return (
            f"{count(self.models[-1].metrics.n_examples)} {'test ' if is_test else ''}images"
            f"{f' under {spoilt}' if spoilt else ''}"
        )

    def _own_metrics(self, images: str) -> str:
        """The headline where the outputs are no logits of classes."""
        last = self.models[-1]
        values = [f"{clean(c.name)} {number(c.value)}{self._before(c)}" for c in last.custom[:3]]
        told = ", ".join(values) or "no metric was asked for"
        return f"on {images}: {told}; the outputs are not the logits of classes."

    def _before(self, last: Custom) -> str:
        first = next((c for c in self.models[0].custom if c.name == last.name), None)
        if first is None or len(self.models) == 1:
            return ""
        return f" ({number(first.value)} {self._reference()})"

    def badge(self) -> str:
        """One or two words for the head of the page."""
        last = self.paired[-1] if self.paired else None
        if last is not None:
            return _BADGES[last.verdict] + (", no proof" if self.n_seen else "")
        if not self.models:
            return "Done"
        measured = self.models[-1].metrics.top1 is not None or self.models[-1].custom
        return "Measured" if measured else "Not proven"

    def _temperature_only(self) -> bool:
        last = self.paired[-1] if self.paired else None
        return last is not None and last.temperature_only


def done(
    swap: SwapPlan | None,
    calibration: Calibration | None,
    choice: WeightChoice | None,
    finetunings: Sequence[Finetuning],
    decisions: Sequence[Decision],
    refused: Sequence[Any] = (),
) -> list[str]:
    """Say what was done, one sentence each."""
    told = []

    def lost(result: Any) -> str:
        is_kept = not any(result is one for one in refused)
        return "" if is_kept else " The output does not hold this result."

    if swap and swap.changes:
        found = [c.difference for c in swap.changes if c.difference is not None]
        exact = f"; no output changes by more than {max(found):.1g} of its range" if found else ""
        told.append(f"{count(len(swap.changes))} norm layers were swapped{exact}.")
    for c in (*filter(None, [calibration]), *refused):
        if not isinstance(c, Calibration):
            continue
        told.append(
            f"Population statistics ({c.target}, {c.feed} feed) were measured on "
            f"{count(c.n_examples)} images in {count(c.n_batches)} batches: "
            f"{len(c.layers)} layers, {_passes(c.passes)}, {c.effort.seconds:.1f} s."
            f"{_spent(c)}{lost(c)}"
        )
    if w := choice:
        chosen = {"keep": "kept as it was", "global": "one for the model"}.get(w.chosen)
        clock = "" if w.clock_passes is None else f" ({w.clock_passes:.3g} by the clock)"
        told.append(
            f"Example weight: {chosen or 'one per ' + w.chosen}; {w.n_live} layers use it. "
            f"The search took {_passes(w.passes)}{clock}, {w.seconds:.1f} s."
            f"{lost(w) if w.chosen != 'keep' else ''}"
        )
    for run in finetunings:
        kept = f"epoch {run.best_epoch} was kept" if run.best_epoch else "nothing was kept"
        told.append(
            f"Fine-tuning of {run.trained}: {count(run.n_parameters)} numbers, "
            f"{count(run.n_steps)} steps, {run.seconds:.1f} s; {kept}."
            f"{lost(run) if run.best_epoch else ''}"
        )
    if decisions:
        n = sum(d.admitted for d in decisions)
        told.append(
            f"{n} of {len(decisions)} candidates passed the gate, on "
            f"{count(decisions[0].n_examples)} images of the select split."
        )
    return told


def left_out(
    assumptions: Sequence[str],
    data: DataUsed | None,
    swap: SwapPlan | None,
    calibration: Calibration | None,
    choice: WeightChoice | None,
    finetunings: Sequence[Finetuning],
) -> list[str]:
    """Say what was assumed or skipped, one sentence each."""
    told = list(assumptions)
    if swap:
        told += [*swap.notes, *_grouped("Not swapped", swap.skipped)]
    if c := calibration:
        told += _grouped("Statistics left as they were, never reached", c.exceptions.never_reached)
        told += _grouped(
            "Statistics left as they were, frozen or excluded", c.exceptions.left_alone
        )
        told += _grouped("Called more than once a pass, calls pooled", c.exceptions.called_again)
    if choice:
        told += _grouped("Example weight left as it was", choice.excluded)
    for run in finetunings:
        told += _grouped("Statistics left as they were, frozen or excluded", run.frozen)
    told += [
        f"Fine-tuning of {run.trained}: {run.n_skipped_steps} steps left out, not finite."
        for run in finetunings
        if run.n_skipped_steps
    ]
    if data and data.n_skipped:
        n = data.n_skipped
        shown = f": {some(data.skipped, 20)}" if data.skipped else ""
        told.append(f"{count(n)} unreadable {'image' if n == 1 else 'images'} left out{shown}.")
    return list(dict.fromkeys(told))


def _passes(n: float) -> str:
    return f"{n:.3g} {'pass' if n == 1 else 'passes'}"


def _spent(calibration: Calibration) -> str:
    """Where the time went, where it was measured."""
    effort = calibration.effort
    cost, rate = effort.cost, effort.examples_per_second
    if not cost.data + cost.forward + cost.statistics > 0:
        return ""
    whose = " of the first process's time" if effort.n_processes > 1 else ""
    speed = "" if rate is None else f"; {rate:,.{0 if rate >= 100 else 2}f} images a second"
    return (
        f" Reading data took {cost.data:.2f} s{whose}, forward passes {cost.forward:.2f} s, "
        f"statistics {cost.statistics:.2f} s{speed}."
    )


def _grouped(what: str, names: Sequence[str]) -> list[str]:
    return [f"{what}: {some(names, 8)}."] if names else []
