"""Sets of classes and estimated accuracy of the checkpoints of `eval`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Final, TypeVar

from bnfix.core.errors import ConfigError, DataError
from bnfix.core.settings import DataRecipe, EvaluationRecipe
from bnfix.data.images import Images
from bnfix.jobs.inputs import open_inputs
from bnfix.metrics.beside import Uncertain, conformal_sets, estimate_accuracy
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import refuse_not_finite

_Entrant = TypeVar("_Entrant")
#: Part of the labelled examples that may be measured ones, as a few copies are in many collections.
_SHARED: Final = 0.05


def on_labelled(entrants: Sequence[_Entrant], data: str, source: DataRecipe) -> list[_Entrant]:
    """The same models before other data, the labelled examples that an estimate starts from."""
    plain = dataclasses.replace(source, labels="auto", corrupt=None, groups=None)
    opened: dict[int, Images] = {}
    found: list[Any] = []
    for one in entrants:
        entrant: Any = one
        try:
            inputs = open_inputs(entrant.loaded, data, plain, opened=opened)
        except DataError as error:
            raise DataError(f"--estimate-from: {error}", path=error.path) from error
        known = set(inputs.images.digests())
        shared = sum(digest in known for digest in entrant.inputs.images.digests())
        problem = "" if inputs.images.labelled else "has no labels. Give labelled examples."
        if shared > _SHARED * len(known):
            problem = f"{shared:,} of its examples are in --data, too. Give others."
        if problem:
            raise ConfigError(f"--estimate-from {data}: {problem}", name="estimate_from")
        found.append(dataclasses.replace(entrant, inputs=inputs))
    return found


def uncertain(
    found: Sequence[Outputs], labelled: Sequence[Outputs], also: EvaluationRecipe, seed: int
) -> tuple[Uncertain, ...]:
    """The sets and estimates of every model, from its logits; nothing where none are asked for."""
    if also.coverage is not None:
        _check("--coverage", found, needs_labels=True)
    if labelled:
        _check("--estimate-from", [*found, *labelled])
    rows = []
    for k, own in enumerate(found):
        sets = estimate = None
        if also.coverage is not None and own.labels is not None:
            sets = conformal_sets(own.outputs, own.labels, also.coverage, seed)
        if labelled and (y := labelled[k].labels) is not None:
            estimate = estimate_accuracy((labelled[k].outputs, y), own.outputs, seed)
        if estimate is not None and own.labels is not None:
            truth = float((own.outputs.argmax(1) == own.labels).mean())
            estimate = dataclasses.replace(estimate, truth=truth)
        rows.append(Uncertain(sets, estimate))
    return tuple(rows) if also.of_certainty else ()


def _check(option: str, outputs: Sequence[Outputs], *, needs_labels: bool = False) -> None:
    for one in outputs:
        problem = ""
        if not one.classified:
            problem = "the outputs are no logits of classes. Leave it out."
        elif one.groups is not None:
            problem = "its interval counts examples one by one. Leave --groups out."
        elif needs_labels and one.labels is None:
            problem = "the examples have no labels. Give labels."
        if problem:
            raise ConfigError(f"{option}: {problem}", name=option[2:].replace("-", "_"))
        refuse_not_finite(one.outputs)
