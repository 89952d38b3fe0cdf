"""The verdict of a report as sentences: the headline, its evidence and its limits."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from bnfix.core.errors import Note, count
from bnfix.metrics.compare import Difference, Paired, compare
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import Moved
from bnfix.metrics.task import LABELS, ByRows, Column, Task
from bnfix.norm.swap import SwapPlan
from bnfix.report.pages import clean, difference, direction, fields_of, number, percent
from bnfix.report.records import DataUsed, Evaluated

#: Commands whose first model is the same network before the repair.
_BEFORE = ("fix", "convert", "calibrate", "finetune", "demo", "export")
_BADGES = {"better": "Better", "same": "Same", "worse": "Worse"}
#: With a reference: the badge, and the words of the headline.
_CLOSENESS = {
    "better": ("Closer", "closer to the reference"),
    "same": ("As close", "no measurable difference in closeness to the reference"),
    "worse": ("Farther", "farther from the reference"),
}


@dataclass(frozen=True)
class Findings:
    """The models and their comparison with the first, as a verdict in sentences."""

    command: str
    data: DataUsed | None
    models: tuple[Evaluated, ...]
    n_seen: int = 0  # evaluated examples that were used for fitting or choosing
    moved: Moved | None = None  # how far the outputs moved
    swap: SwapPlan | None = None
    seed: int = 0

    @property
    def task(self) -> Task:
        """The task by which the models were judged."""
        return self.models[-1].metrics.task if self.models else LABELS

    @property
    def by_rows(self) -> ByRows | None:
        """The task, if it is not classification."""
        return self.task if isinstance(self.task, ByRows) else None

    @property
    def columns(self) -> tuple[Column, ...]:
        """The columns of the models' numbers in tables."""
        return LABELS.columns if self.by_rows is None else self.by_rows.columns

    @cached_property
    def paired(self) -> tuple[Paired | None, ...]:
        """Each further model against the first; ``None`` without labels."""
        return self._pairs([model.metrics for model in self.models])

    @cached_property
    def agreed(self) -> tuple[Paired | None, ...]:
        """Each further model against the first, by the reference; ``None`` without one."""
        return self._pairs([model.agreement for model in self.models])

    def _pairs(self, found: Sequence[Metrics | None]) -> tuple[Paired | None, ...]:
        return tuple(
            compare(found[0], other, seed=self.seed)
            if found[0] is not None
            and other is not None
            and all(m.examples is not None or m.problem for m in (found[0], other))
            else None
            for other in found[1:]
        )

    @property
    def _last_pair(self) -> Paired | None:
        return self.paired[-1] if self.paired else None

    @property
    def verdict(self) -> str | None:
        """``better``, ``same`` or ``worse``: the last model against the first."""
        return None if self._last_pair is None else self._last_pair.verdict

    @property
    def agreement_verdict(self) -> str | None:
        """The verdict by divergence from and agreement with a reference; ``None`` without one."""
        paired = self.agreed[-1] if self.agreed else None
        return None if paired is None else paired.verdict

    @property
    def temperature_only(self) -> bool:
        """Whether no gain remains after temperature scaling."""
        return self._last_pair is not None and self._last_pair.temperature_only

    def verdict_sentence(self) -> str:
        """The verdict, its evidence and its limits."""
        sentences = " ".join([self.headline(), *self.remarks()])
        if self.verdict is None:
            return sentences[:1].upper() + sentences[1:]
        return f"{self.verdict}: {sentences}"

    @property
    def n_groups(self) -> int | None:
        """Groups among the evaluated examples, if any are given."""
        last = self.models[-1] if self.models else None
        for metrics in (last.metrics, last.agreement) if last else ():
            if metrics is not None and metrics.examples is not None:
                return metrics.examples.n_groups
        return None

    def _said(self, text: str) -> str:
        """A sentence that says where its intervals are by groups."""
        by_groups = "95% interval by groups"
        return text if self.n_groups is None else text.replace("95% interval", by_groups)

    def headline(self) -> str:
        """The first sentence, in lower case, because words can precede it."""
        return self._said(self._headline())

    def _headline(self) -> str:
        if not self.models:
            n = len(self.swap.changes) if self.swap else 0
            if n:
                return f"{count(n, 'norm layers')} swapped; accuracy was not evaluated."
            left = "were left for a test" if self.data else "were used"
            return f"not evaluated: no {'labelled ' if self.data else ''}images {left}."
        first, last, images = self.models[0].metrics, self.models[-1].metrics, self._images()
        if not self.models[-1].classified:
            return self._own_metrics(images)
        if last.problem:
            return f"{clean(self.models[-1].name)} cannot be evaluated on {images}: {last.problem}."
        if last.nll is None:
            if self.agreement_verdict is not None:
                return f"{_CLOSENESS[self.agreement_verdict][1]}: {self._same_class(images)}."
            return f"the {images} have no labels, so accuracy cannot be measured."
        paired, words = self._last_pair, self.task.words
        if self.by_rows is not None:
            text = f"the {words.loss} is {number(last.nll)}{words.unit} on {images}"
            if paired is None or first.nll is None:
                low, high = map(number, last.interval["nll"])
                return f"{text} (95% interval {low} to {high})."
            return f"{self._no_change()}{text}, {self._from(first.nll, paired.nll)}."
        if len(self.models) == 1:
            low, high = (f"{100 * end:.1f}" for end in last.interval["top1"])
            return f"{percent(last.top1)} of {images} right (95% interval {low} to {high})."
        if paired is None or first.top1 is None:
            why = f"cannot be evaluated: {first.problem}" if first.problem else "was not measured"
            return f"{percent(last.top1)} of {images} right; {clean(self.models[0].name)} {why}."
        if self._judged_by_nll():
            return f"NLL {number(last.nll)} on {images}, {self._from(first.nll, paired.nll)}."
        now = f"{self._no_change()}{percent(last.top1)} of {images} right"
        return f"{now}, {self._from(first.top1, paired.top1, points=True)}."

    def _from(self, was: float | None, change: Difference, *, points: bool = False) -> str:
        """The first model's number, and the change."""
        first = percent(was) if points else number(was)
        return f"{first} {self._reference()}; the difference is {difference(change, points=points)}"

    def _changed(
        self,
        name: str,
        now: float | None,
        was: float | None,
        change: Difference,
        *,
        points: bool = False,
        unit: str = "",
    ) -> str:
        """A sentence on one number of the last model and of the first."""
        last, first = (percent(value) if points else number(value) for value in (now, was))
        by = difference(change, points=points)
        way = direction(change)
        return f"{name} {way}: {last}{unit}, {first} {self._reference()} (difference {by})."

    def _same_class(self, images: str) -> str:
        """How often the predictions equal the reference's."""
        first, last = (self.models[k].agreement for k in (0, -1))
        paired = self.agreed[-1]
        if first is None or last is None or paired is None or last.top1 is None:
            return f"the output cannot be evaluated on {images}: {last.problem if last else ''}"
        now = f"the same class as the reference on {percent(last.top1)} of {images}"
        if first.top1 is None:
            return f"{now}; {self._reference()} it could not be evaluated: {first.problem}"
        return f"{now}, {self._from(first.top1, paired.top1, points=True)}"

    def _no_change(self) -> str:
        """The start of a sentence if nothing is proven, with the reason; else empty."""
        if self.verdict != "same":
            return ""
        rows = self.models[-1].metrics.examples
        few = "" if rows is None else rows.shortfall
        return f"nothing is proven by {few}: " if few else "no measurable difference: "

    def remarks(self) -> list[Note]:
        """Facts that qualify the headline, one sentence each."""
        notes = [Note(text) for text in (*self._of_labels(), *self._of_reference())]
        notes += [Note(text, "caution") for text in self._cautions()]
        notes += [] if self.moved is None else [self._movement(self.moved)]
        return [Note(self._said(note), note.kind) for note in notes]

    def _of_labels(self) -> Iterator[str]:
        """Sentences on the numbers that the headline leaves out."""
        paired, task = self._last_pair, self.by_rows
        if not self.models:
            return
        first, last = self.models[0].metrics, self.models[-1].metrics
        if task is not None:
            changes = {} if paired is None else paired.metrics
            for name, now in last.values.items():
                heading, change = task.headings[name], changes.get(name)
                if change is None:
                    yield f"{heading}: {number(now)}."
                else:
                    yield self._changed(heading, now, first.values.get(name), change)
            if paired is not None and (score := task.words.score):
                name = f"The mean {score}"
                yield self._changed(name, last.top1, first.top1, paired.top1, points=True)
        elif paired is not None and math.isfinite(paired.nll.difference):
            if self._judged_by_nll():
                yield self._changed("Top-1", last.top1, first.top1, paired.top1, points=True)
            else:
                yield self._changed("NLL", last.nll, first.nll, paired.nll)

    def _of_reference(self) -> Iterator[str]:
        """The other evidence from a reference, and its limit."""
        if not self.agreed or (paired := self.agreed[-1]) is None:
            return
        if self.verdict is not None:
            text = self._same_class("these images")
            yield f"{text[:1].upper()}{text[1:]}."
        if math.isfinite(paired.nll.difference):
            now, was = (getattr(self.models[k].agreement, "nll", None) for k in (-1, 0))
            name = "Divergence from the reference's predictions"
            yield self._changed(name, now, was, paired.nll, unit=" nats")
        if self.verdict is None:
            yield (
                "This is agreement with the reference network. Without labels, the fraction of "
                "right answers is unknown."
            )

    def _cautions(self) -> Iterator[str]:
        known = self.models and self.by_rows is None
        if known and (m := self.models[-1].metrics).top1 is not None:
            chance = 1 / m.logits.shape[1] if m.logits.size else 0
            if m.interval["top1"][0] <= chance and m.top1 < 1:
                yield (
                    f"This is no better than chance ({percent(chance)}). Check preprocessing, "
                    "--class-map and --output first."
                )
        if self._last_pair is not None:
            yield from _describe_unlike(self.models[0], self.models[-1])
        if self.temperature_only:
            yield "Temperature scaling alone gives the same gain."
        if self.n_seen:
            yield (
                f"{count(self.n_seen)} of these {self.noun} were used to fit or choose the model, "
                "so this is no proof."
            )

    def badge(self) -> str:
        """One or two words for the head of the page."""
        if self.verdict is not None:
            return _BADGES[self.verdict] + (", no proof" if self.n_seen else "")
        if self.agreement_verdict is not None:
            return _CLOSENESS[self.agreement_verdict][0]
        if not self.models:
            return "Done"
        measured = self.models[-1].metrics.nll is not None or self.models[-1].custom
        return "Measured" if measured else "Not proven"

    def _movement(self, moved: Moved) -> Note:
        """How far the outputs moved, with a warning if that is far and no gain is measured."""
        n = count(moved.n, self.noun)
        if moved.relative_rms == 0 and not moved.top1_changed:
            return Note(f"The outputs did not change on {n}.")
        text = (
            "The outputs cannot be compared with the outputs before (not finite, or another shape)"
            if moved.relative_rms is None
            else f"The outputs changed by {percent(moved.relative_rms)} (relative RMS)"
        )
        if moved.top1_changed is not None:
            text += f"; the top-1 class changed on {percent(moved.top1_changed)}"
        text += f" {'on' if moved.top1_changed is None else 'of'} {n}."
        if not moved.is_large or (self.verdict or self.agreement_verdict) == "better":
            return Note(text)
        return Note(
            f"{text} Warning: this is a large change, and no labelled image shows that it helps. "
            "Compare both files with bnfix eval before you use the new one.",
            "caution",
        )

    def _judged_by_nll(self) -> bool:
        """Whether the verdict rests on NLL, not on top-1."""
        if (paired := self._last_pair) is None or paired.verdict == "same":
            return False
        # The other measure can point elsewhere, so the headline names the significant one.
        return direction(paired.top1) != ("is higher" if paired.verdict == "better" else "is lower")

    def _reference(self) -> str:
        """The words for the first model in a comparison."""
        if self.command in _BEFORE and len(self.models) == 2:
            return "before"
        if self.command == "average":
            return "with the first checkpoint"
        return f"with {clean(self.models[0].name)}"

    @property
    def noun(self) -> str:
        """The word for the examples: images or examples."""
        return "images" if self.data is None else self.data.noun

    def _images(self) -> str:
        is_test = self.data is not None and self.data.splits.get("test") and not self.n_seen
        corruption = self.data.corruption if self.data is not None else None
        groups = "" if self.n_groups is None else f" in {count(self.n_groups, 'groups')}"
        noun, under = f"{'test ' if is_test else ''}{self.noun}", f" under {corruption}"
        n = count(self.models[-1].metrics.n_examples, noun)
        return f"{n}{groups}{under if corruption else ''}"

    def _own_metrics(self, images: str) -> str:
        """The headline for outputs that are not class logits."""
        first = {c.name: number(c.value) for c in self.models[0].custom} if self.models[1:] else {}
        values = []
        for c in self.models[-1].custom[:3]:
            before = f" ({first[c.name]} {self._reference()})" if c.name in first else ""
            values.append(f"{clean(c.name)} {number(c.value)}{before}")
        metrics = ", ".join(values) or "no metric was given"
        return f"on {images}: {metrics}; the outputs are not class logits."


def _describe_unlike(first: Evaluated, last: Evaluated) -> Iterator[str]:
    """Name the settings in which the preprocessing of two models differs, and the options."""
    if first.preprocessing is None or last.preprocessing is None:
        return
    a, b = shown = [_inputs(model.preprocessing) for model in (first, last)]
    if unlike := [key for key in a if a[key] != b[key]]:
        values = [", ".join(f"{key} {one[key]}" for key in unlike) for one in shown]
        flags = ", ".join(f"--{key}" for key in unlike if key != "channels")
        same = f" State {flags} to give both the same." if flags else ""
        each = f"{clean(first.name)}: {values[0]}; {clean(last.name)}: {values[1]}"
        yield f"The two had different preprocessing ({each}), which can decide the result.{same}"


def _inputs(preprocessing: Any) -> dict[str, str]:
    """Preprocessing as text; a mean or deviation shared by all channels is one number."""
    texts = {}
    for name, value in fields_of(preprocessing).items():
        values = value if isinstance(value, tuple) else (value,)
        values = values[:1] if name in ("mean", "std") and len(set(values)) == 1 else values
        texts[name] = ",".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
    return texts
