"""Judged by a reference network, in place of right answers or beside them, or by another task."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from bnfix.metrics.compare import Difference, Paired
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.task import ByRows
from bnfix.report.pages import clean, difference, direction, fields_of, number, percent

#: Metrics against a reference, and their names in the JSON of a model.
_NAMES = {"top1": "agreement", "nll": "divergence"}
BADGES = {"better": "Closer", "same": "As close", "worse": "Farther"}
_VERDICTS = {
    "better": "closer to the reference",
    "same": "no measurable difference in closeness to the reference",
    "worse": "farther from the reference",
}


@dataclass(frozen=True)
class Closeness:
    """The first and the last model as a reference judges them."""

    first: Metrics
    last: Metrics
    paired: Paired
    before: str  # names the first model

    def headline(self, images: str) -> str:
        """The first sentence, where there are no labels; in small letters."""
        return f"{_VERDICTS[self.paired.verdict]}: {self._same_class(images)}."

    def remarks(self, *, labelled: bool) -> Iterator[str]:
        """The rest of the evidence, and the limit of what it says."""
        if labelled:
            text = self._same_class("these images")
            yield f"{text[:1].upper()}{text[1:]}."
        nll = self.paired.nll
        if math.isfinite(nll.difference):
            yield (
                f"Divergence from the reference's predictions {direction(nll)}: "
                f"{number(self.last.nll)} nats, {number(self.first.nll)} {self.before} "
                f"(difference {difference(nll)})."
            )
        if not labelled:
            yield (
                "This is agreement with the reference network. How many answers are right is not "
                "known without labels."
            )

    def _same_class(self, images: str) -> str:
        if self.last.top1 is None:
            return f"the output cannot be evaluated on {images}: {self.last.problem}"
        now = f"the same class as the reference on {percent(self.last.top1)} of {images}"
        if self.first.top1 is None:
            return f"{now}; {self.before} it could not be evaluated: {self.first.problem}"
        change = difference(self.paired.top1, points=True)
        return f"{now}, {percent(self.first.top1)} {self.before}; the difference is {change}"


def agreement_json(agreement: Metrics | None) -> dict[str, float | None]:
    """Agreement with a reference and divergence from it; nothing without one."""
    if agreement is None:
        return {}
    return {name: getattr(agreement, key) for key, name in _NAMES.items()}


def agreement_intervals(agreement: Metrics | None) -> dict[str, Any]:
    """Their intervals, where they are known."""
    found = {} if agreement is None else agreement.interval
    return {name: found[key] for key, name in _NAMES.items() if key in found}


def agreed_json(paired: Paired | None) -> dict[str, Any]:
    """The JSON of a pair as a reference judges it; nothing without one."""
    if paired is None:
        return {}
    return {"agreement": paired.top1, "divergence": paired.nll, "agreement_verdict": paired.verdict}


def no_change(paired: Paired, last: Metrics) -> str:
    """The beginning of a sentence where nothing is proven, and why; else empty."""
    if paired.verdict != "same":
        return ""
    few = "" if last.examples is None else last.examples.shortfall
    return f"nothing is proven by {few}: " if few else "no measurable difference: "


@dataclass(frozen=True)
class ByLoss:
    """The first and the last model as a task judges them that is no classification."""

    task: ByRows
    first: Metrics
    last: Metrics
    paired: Paired | None
    before: str  # names the first model

    def headline(self, images: str) -> str:
        """The first sentence, in small letters."""
        words, last = self.task.words, self.last
        text = f"the {words.loss} is {number(last.nll)}{words.unit} on {images}"
        if self.paired is None or self.first.nll is None:
            low, high = last.interval["nll"]
            return f"{text} (95% interval {number(low)} to {number(high)})."
        no, change = no_change(self.paired, self.last), difference(self.paired.nll)
        return f"{no}{text}, {number(self.first.nll)} {self.before}; the difference is {change}."

    def remarks(self) -> Iterator[str]:
        """The metrics and the score, one sentence each."""
        first, last = self.first, self.last
        changes = {} if self.paired is None else self.paired.metrics
        shown: list[tuple[str, Difference | None, float | None, float | None, bool]] = [
            (self.task.headings[name], changes.get(name), first.values.get(name), value, False)
            for name, value in last.values.items()
        ]
        if self.paired is not None and (words := self.task.words).score:
            shown.append((f"The mean {words.score}", self.paired.top1, first.top1, last.top1, True))
        for name, change, was, now, points in shown:
            write = percent if points else number
            if change is None:
                yield f"{name}: {write(now)}."
                continue
            yield (
                f"{name} {direction(change)}: {write(now)}, {write(was)} {self.before} "
                f"(difference {difference(change, points=points)})."
            )


def describe_unlike(names: Sequence[str], found: Sequence[Any]) -> Iterator[str]:
    """Name the settings in which the preprocessing of first and last differ, and their options."""
    if found[0] is None or found[-1] is None:
        return
    a, b = shown = [_inputs(found[k]) for k in (0, -1)]
    if unlike := [key for key in a if a[key] != b[key]]:
        values = [", ".join(f"{key} {one[key]}" for key in unlike) for one in shown]
        flags = ", ".join(f"--{key}" for key in unlike if key != "channels")
        same = f" State {flags} to give both the same." if flags else ""
        each = "; ".join(f"{clean(names[k])}: {values[k]}" for k in (0, -1))
        yield f"The two were given different preprocessing ({each}), which may decide.{same}"


def _inputs(preprocessing: Any) -> dict[str, str]:
    """Preprocessing as text; a mean or deviation that all channels share is one number."""
    texts = {}
    for name, value in fields_of(preprocessing).items():
        values = value if isinstance(value, tuple) else (value,)
        values = values[:1] if name in ("mean", "std") and len(set(values)) == 1 else values
        texts[name] = ",".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values)
    return texts
