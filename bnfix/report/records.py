"""The parts of a report as records, and the sentences that they make."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import nn

from bnfix.core.errors import Note
from bnfix.core.settings import Preprocessing
from bnfix.metrics.compare import Decision, Paired, compare
from bnfix.metrics.custom import Custom
from bnfix.metrics.metrics import Metrics
from bnfix.metrics.robustness import Moved
from bnfix.metrics.task import LABELS, ByRows, Task
from bnfix.norm.layer import generalized_norms
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import SwapPlan
from bnfix.recalibrate.collector import drift
from bnfix.recalibrate.recalibrate import Calibration
from bnfix.report.agreement import BADGES, ByLoss, Closeness, describe_unlike, no_change
from bnfix.report.pages import clean, count, difference, direction, number, percent
from bnfix.training.finetune import Finetuning
from bnfix.weights.choose import WeightChoice, weights_of


@dataclass(frozen=True)
class Evaluated:
    """A model and its metrics on the examples that all models of the report share."""

    name: str
    file: str | None  # read from or written to
    sha256: str | None
    metrics: Metrics
    n_live: int = 0  # layers with an example or batch weight above 0
    custom: tuple[Custom, ...] = ()
    classified: bool = True  # False if outputs are no logits: then metrics only count examples
    agreement: Metrics | None = None  # measured against a reference in place of labels
    preprocessing: Preprocessing | None = None  # of `eval`, where files may differ in it


@dataclass(frozen=True)
class DataUsed:
    """The data behind the numbers."""

    spec: str
    n_examples: int
    fingerprint: str
    class_names: tuple[str, ...] | None = None
    splits: Mapping[str, int] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()  # some unreadable examples, in words
    n_skipped: int = 0
    corruption: str | None = None  # of every image, such as blur:2
    n_groups: int | None = None  # of examples that depend on each other
    noun: str = "images"  # examples, where they are none


@dataclass(frozen=True)
class LayerRow:
    """A norm layer of the final model."""

    name: str
    kind: str
    channels: int
    example_weight: float | list[float] = 0.0  # one per layer or per channel
    batch_weight: float | list[float] = 0.0
    mean_shift: float | None = None  # new statistics against old, see `drifts_between`
    log_var_ratio: float | None = None
    residual: float | None = None  # stored statistics against one verifying pass
    mean_se: float | None = None  # largest standard error of a mean, in standard deviations
    var_se: float | None = None  # largest relative standard error of a variance


@dataclass(frozen=True)
class Trials:
    """All candidates that were fitted, and the gate's decisions."""

    decisions: tuple[Decision, ...] = ()
    calibration: Calibration | None = None
    choice: WeightChoice | None = None
    finetunings: tuple[Finetuning, ...] = ()
    refused: tuple[Calibration | WeightChoice | Finetuning, ...] = ()  # not in the output


def statistics_of(model: nn.Module) -> dict[str, Any]:
    """Copies of every layer's mean and variance, with its eps, by layer name."""
    return {
        site.name: (
            site.module.running_mean.double().cpu().clone(),  # type: ignore[operator]
            site.module.running_var.double().cpu().clone(),  # type: ignore[operator]
            float(getattr(site.module, "eps", 1e-5)),
        )
        for site in find_norms(model)
        if site.has_statistics
    }


def drifts_between(before: dict[str, Any], after: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Mean shift and log variance ratio of every layer that both have.

    Mean over channels of |mean' - mean| / sqrt(var' + eps), and |log((var' + eps) / (var + eps))|.
    """
    return {
        name: drift(before[name][:2], (mean, var.clamp_min(0)), eps)
        for name, (mean, var, eps) in after.items()
        if name in before and before[name][0].shape == mean.shape
    }


def layer_rows(
    model: nn.Module,
    drifts: Mapping[str, tuple[float, float]],
    fresh: Mapping[str, tuple[float, float]],
    calibration: Calibration | None = None,
) -> tuple[LayerRow, ...]:
    """One row per norm layer in order, with the drift, residual and errors that are known."""
    weights, layers = weights_of(model), dict(generalized_norms(model))
    batch = {n: x.batch_weight.tolist() for n, x in layers.items() if x.batch_weight is not None}
    errors = {} if calibration is None else {r.name: r for r in calibration.layers}
    unknown = (None, None)
    return tuple(
        LayerRow(
            name=site.name,
            kind=site.kind,
            channels=int(getattr(site.module, "num_features", 0)),
            example_weight=weights.get(site.name, 0.0),
            batch_weight=batch.get(site.name, 0.0),
            mean_shift=drifts.get(site.name, unknown)[0],
            log_var_ratio=drifts.get(site.name, unknown)[1],
            residual=fresh.get(site.name, unknown)[0],
            mean_se=getattr(errors.get(site.name), "mean_se", None),
            var_se=getattr(errors.get(site.name), "var_se", None),
        )
        for site in find_norms(model)
    )


def n_live(model: nn.Module) -> int:
    """How many layers look at their input: a weight above 0, or open gates."""
    return sum(layer.live for _, layer in generalized_norms(model))


def describe_neighbours(model: nn.Module) -> list[str]:
    """A sentence on a network whose outputs depend on the batch, if it is one."""
    found = [x.batch_weight for _, x in generalized_norms(model) if x.batch_weight is not None]
    if not found:
        return []
    highest = max(float(weight.max()) for weight in found)
    layers = "1 norm layer" if len(found) == 1 else f"{len(found)} norm layers"
    return [
        f"predictions depend on the other images in the batch: it has a weight of up to "
        f"{highest:.3g} in the statistics of {layers}; eval --compare-batch-sizes shows how much."
    ]


# --- sentences ---

#: Commands whose first model is the same network before the work.
_BEFORE = ("fix", "convert", "calibrate", "finetune", "demo", "export")
_VERDICTS = {"better": "Better", "same": "Same", "worse": "Worse"}


@dataclass(frozen=True)
class Findings:
    """The models and their comparison with the first, as a verdict in words."""

    command: str
    data: DataUsed | None
    models: tuple[Evaluated, ...]
    n_seen: int = 0  # evaluated examples that were used for fitting or choosing
    moved: Moved | None = None  # how far the outputs moved
    swap: SwapPlan | None = None
    seed: int = 0

    @property
    def task(self) -> Task:
        """What the models were judged by."""
        return self.models[-1].metrics.task if self.models else LABELS

    @property
    def by_rows(self) -> ByRows | None:
        """The task, if it is no classification."""
        return self.task if isinstance(self.task, ByRows) else None

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

    def _by_loss(self, task: ByRows) -> ByLoss:
        """The first and the last model of a task that is no classification."""
        first, last = self.models[0].metrics, self.models[-1].metrics
        return ByLoss(task, first, last, paired=self._last_pair, before=self._reference())

    @property
    def _closeness(self) -> Closeness | None:
        """The last model against the first by the reference, if there is one."""
        paired = self.agreed[-1] if self.agreed else None
        first, last = (self.models[k].agreement if self.models else None for k in (0, -1))
        if paired is None or first is None or last is None:
            return None
        return Closeness(first=first, last=last, paired=paired, before=self._reference())

    @property
    def agreement_verdict(self) -> str | None:
        """The same by divergence from a reference and agreement with it; ``None`` without one."""
        return None if self._closeness is None else self._closeness.paired.verdict

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
        """A sentence with the word that its intervals are by groups, where they are."""
        by_groups = "95% interval by groups"
        return text if self.n_groups is None else text.replace("95% interval", by_groups)

    def headline(self) -> str:
        """The first sentence, in small letters: words may come before it."""
        return self._said(self._headline())

    def _headline(self) -> str:
        if not self.models:
            n = len(self.swap.changes) if self.swap else 0
            if n:
                layers = "layer" if n == 1 else "layers"
                return f"{count(n)} norm {layers} swapped; accuracy was not evaluated."
            return "not evaluated: there were no labelled test images."
        last, images = self.models[-1].metrics, self._images()
        if not self.models[-1].classified:
            return self._own_metrics(images)
        if last.problem:
            return f"{clean(self.models[-1].name)} cannot be evaluated on {images}: {last.problem}."
        if last.nll is None and (close := self._closeness) is not None:
            return close.headline(images)
        if last.nll is None:
            return f"the {images} have no labels, so accuracy cannot be measured."
        if isinstance(self.task, ByRows):
            return self._by_loss(self.task).headline(images)
        if len(self.models) == 1:
            low, high = (100 * end for end in last.interval["top1"])
            return f"{percent(last.top1)} of {images} right (95% interval {low:.1f} to {high:.1f})."
        first, paired = self.models[0].metrics, self._last_pair
        if paired is None or first.top1 is None:
            why = f"cannot be evaluated: {first.problem}" if first.problem else "was not measured"
            return f"{percent(last.top1)} of {images} right; {clean(self.models[0].name)} {why}."
        if self._judged_by_nll():
            return (
                f"NLL {number(last.nll)} on {images}, {number(first.nll)} {self._reference()}; "
                f"the difference is {difference(paired.nll)}."
            )
        now = f"{no_change(paired, last)}{percent(last.top1)} of {images} right"
        change = difference(paired.top1, points=True)
        return f"{now}, {percent(first.top1)} {self._reference()}; the difference is {change}."

    def remarks(self) -> list[Note]:
        """Facts that qualify the headline, one sentence each."""
        notes: list[Note] = []
        paired = self._last_pair
        if isinstance(self.task, ByRows):
            notes += map(Note, self._by_loss(self.task).remarks())
        elif paired is not None and math.isfinite(paired.nll.difference):
            first, last = self.models[0].metrics, self.models[-1].metrics
            if self._judged_by_nll():
                text = f"Top-1 {direction(paired.top1)}: {percent(last.top1)}, "
                text += f"{percent(first.top1)} {self._reference()}"
                text += f" (difference {difference(paired.top1, points=True)})."
            else:
                text = f"NLL {direction(paired.nll)}: {number(last.nll)}, "
                text += f"{number(first.nll)} {self._reference()}"
                text += f" (difference {difference(paired.nll)})."
            notes.append(Note(text))
        if (close := self._closeness) is not None:
            notes += map(Note, close.remarks(labelled=self.verdict is not None))
        notes += [Note(text, "caution") for text in self._cautions()]
        notes += [] if self.moved is None else [self._movement(self.moved)]
        return [Note(self._said(note), note.kind) for note in notes]

    def _cautions(self) -> Iterator[str]:
        known = self.models and self.by_rows is None
        if known and (m := self.models[-1].metrics).top1 is not None:
            chance = 1 / m.logits.shape[1] if m.logits.size else 0
            if m.interval["top1"][0] <= chance:
                yield (
                    f"This is no better than chance ({percent(chance)}). Check preprocessing, "
                    "--class-map and --output first."
                )
        if self._last_pair is not None:
            names, shown = zip(*((m.name, m.preprocessing) for m in self.models), strict=True)
            yield from describe_unlike(names, shown)
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
            return _VERDICTS[self.verdict] + (", no proof" if self.n_seen else "")
        if self.agreement_verdict is not None:
            return BADGES[self.agreement_verdict]
        if not self.models:
            return "Done"
        measured = self.models[-1].metrics.nll is not None or self.models[-1].custom
        return "Measured" if measured else "Not proven"

    def _movement(self, moved: Moved) -> Note:
        """How far the outputs moved, with a warning if that is far and nothing shows a gain."""
        n = count(moved.n)
        if moved.relative_rms == 0 and not moved.top1_changed:
            return Note(f"The outputs did not change on {n} {self.noun}.")
        text = (
            "The outputs cannot be compared with those before (not finite, or of another shape)"
            if moved.relative_rms is None
            else f"The outputs changed by {percent(moved.relative_rms)} (relative RMS)"
        )
        if moved.top1_changed is not None:
            text += f"; the top-1 class changed on {percent(moved.top1_changed)}"
        text += f" {'on' if moved.top1_changed is None else 'of'} {n} {self.noun}."
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
        # The other measure may point elsewhere, so the headline names the one that is significant.
        return direction(paired.top1) != ("is higher" if paired.verdict == "better" else "is lower")

    def _reference(self) -> str:
        if self.command in _BEFORE and len(self.models) == 2:
            return "before"
        if self.command == "average":
            return "with the first checkpoint"
        return f"with {clean(self.models[0].name)}"

    @property
    def noun(self) -> str:
        """Images, or else examples."""
        return "images" if self.data is None else self.data.noun

    def _images(self) -> str:
        is_test = self.data is not None and self.data.splits.get("test") and not self.n_seen
        corruption = self.data.corruption if self.data is not None else None
        groups = "" if self.n_groups is None else f" in {count(self.n_groups)} groups"
        return (
            f"{count(self.models[-1].metrics.n_examples)} {'test ' if is_test else ''}"
            f"{self.noun}{groups}{f' under {corruption}' if corruption else ''}"
        )

    def _own_metrics(self, images: str) -> str:
        """The headline where the outputs are not logits of classes."""
        shown = self.models[-1].custom[:3]
        values = [f"{clean(c.name)} {number(c.value)}{self._before(c)}" for c in shown]
        metrics = ", ".join(values) or "no metric was given"
        return f"on {images}: {metrics}; the outputs are not the logits of classes."

    def _before(self, last: Custom) -> str:
        first = next((c for c in self.models[0].custom if c.name == last.name), None)
        if first is None or len(self.models) == 1:
            return ""
        return f" ({number(first.value)} {self._reference()})"


def done(swap: SwapPlan | None, trials: Trials, decisions: Sequence[Decision] = ()) -> list[str]:
    """The work that was done, one sentence each."""
    sentences = []

    def lost(result: Any) -> str:
        is_kept = not any(result is one for one in trials.refused)
        return "" if is_kept else " The output does not contain this result."

    if swap and swap.changes:
        found = [c.difference for c in swap.changes if c.difference is not None]
        exact = f"; no output changes by more than {max(found):.1g} of its range" if found else ""
        sentences.append(f"{count(len(swap.changes))} norm layers were swapped{exact}.")
    # Refused statistics are reported too: they were measured, and are not in the file.
    for c in (trials.calibration, *trials.refused):
        if isinstance(c, Calibration):
            sentences.append(
                f"Running statistics ({c.target}, {c.feed} feed) were measured on "
                f"{count(c.n_examples)} images in {count(c.n_batches)} batches: {len(c.layers)} "
                f"layers, {_passes(c.passes)}, {c.effort.seconds:.1f} s.{_spent(c)}{lost(c)}"
            )
    if w := trials.choice:
        chosen = {"keep": "unchanged", "global": "one for the model"}.get(w.chosen)
        clock = "" if w.clock_passes is None else f" ({w.clock_passes:.3g} by wall-clock time)"
        sentences.append(
            f"Example weight: {chosen or 'one per ' + w.chosen}; {w.n_live} layers use it. "
            f"The search took {_passes(w.passes)}{clock}, {w.seconds:.1f} s."
            f"{lost(w) if w.chosen != 'keep' else ''}"
        )
    for run in trials.finetunings:
        kept = f"epoch {run.best_epoch} was kept" if run.best_epoch else "no epoch was kept"
        sentences.append(
            f"Fine-tuning of {run.trained}: {count(run.n_parameters)} parameters, "
            f"{count(run.n_steps)} steps, {run.seconds:.1f} s; {kept}."
            f"{lost(run) if run.best_epoch else ''}"
        )
    if decisions:
        n = sum(d.admitted for d in decisions)
        sentences.append(
            f"{n} of {len(decisions)} candidates passed the gate, on "
            f"{count(decisions[0].n_examples)} images of the select split."
        )
    return sentences


def _passes(n: float) -> str:
    return f"{n:.3g} {'pass' if n == 1 else 'passes'}"


def _spent(calibration: Calibration) -> str:
    """Where the time went, if it was measured."""
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
