"""Changes to a classifier's head: a temperature, and the shift for a class prior."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bnfix.core import guards, runtime
from bnfix.core.errors import DataError, ModelError, NumericError, plain, some
from bnfix.core.options import require
from bnfix.data.images import read_object
from bnfix.jobs.fits import ORIGINAL, Fits, Fitted, State
from bnfix.jobs.session import Workbench
from bnfix.metrics.beside import Prior, estimate_shares
from bnfix.metrics.compare import judge
from bnfix.metrics.evaluate import tempered
from bnfix.metrics.metrics import inverse_temperature, refuse_not_finite
from bnfix.metrics.task import LABELS, Array, Labels
from bnfix.training.parameters import find_head, move_logits_

TEMPERATURE = "temperature"
#: Size limit of a file of class shares.
_MOST_BYTES = 10_000_000


def named(temperature: float) -> str:
    """The candidate's name."""
    return f"temperature {temperature:.3g}"


def temperature(fits: Fits, now: State) -> Fitted:
    """Divide the head by a temperature, fitted on fit and judged on select.

    If it is admitted, every other model is judged at its own temperature, fitted on one half of
    select and judged on the other, both ways. A temperature fitted on examples that weights were
    learned from would be too low.
    """
    bench, problem = fits.bench, ""
    if now.metrics is None or fits.task != LABELS:
        problem = f"it needs classification, and the task is {fits.task.name}."
    elif now.metrics.temperature is None:
        problem = f"{now.metrics.problem or 'the outputs are not logits'}."
    else:
        before = guards.Snapshot(fits.model)
        try:
            fitting = partial(bench.batches, bench.split.fit, "temperature: fitting")
            logits = fits.outputs(fits.model, fitting)
            refuse_not_finite(logits.outputs)
            t = 1 / inverse_temperature(logits.outputs, np.asarray(logits.labels))
            cool_(bench, t)
        except (ModelError, NumericError) as error:
            problem = str(error)
        finally:
            before.restore_()
    if problem or now.metrics is None:
        bench.assumptions.append(f"a temperature was not tried: {problem}")
        return Fitted(None, decisions=())
    pair = (named(t), tempered(now.metrics, t)), (now.name, now.metrics)
    decision = judge(TEMPERATURE, *pair, fits.plan.gate.z)
    if decision.admitted:
        fits.task, fits.alone = Labels(tempered=True), (named(t), t)
    return Fitted(named(t) if decision.admitted else None, decisions=(decision,))


def cool_(bench: Workbench, temperature: float) -> None:
    """Divide the logits by a temperature."""
    _move_(bench, "temperature", bench.split.select, 1 / temperature)


def _move_(
    bench: Workbench, what: str, index: np.ndarray, scale: float, shift: Tensor | None = None
) -> None:
    """Scale and shift the logits in the head, found by running a few examples."""
    batches = bench.batches(index[:8], "a look at the head").whole()
    head = find_head(what, bench.model, batches)
    move_logits_(bench.model, head, next(iter(batches)), scale, shift)


# --- `--class-prior`: read and checked first, and folded in at the end ---


def open_prior(bench: Workbench) -> Prior | None:
    """Read a plan's class prior, and check that the head can take its shift."""
    stated, task = bench.plan.gate.class_prior, bench.inputs.task
    if stated is None:
        return None
    _require(task == LABELS, f"needs classification, the task is {task.name}. Leave it out.")
    batch = next(iter(bench.batches(bench.work[:1], "a look at the head").whole()))
    with guards.inference(bench.model):
        output = runtime.run(bench.model, batch, runtime.device_of(bench.model))
    n = runtime.logits_of(output).shape[1]
    names = bench.inputs.images.class_names or bench.loaded.origin.labels
    names = names if len(names) == n else tuple(map(str, range(n)))
    given: dict[str, Any] = {"to": stated} if stated == "em" else _read(Path(stated), names)
    new, in_file = given["to"], f"given in {plain(stated)}"
    new_is = in_file
    if isinstance(new, str):
        _require(not bench.labelled, "em needs data without labels. Give --labels none.")
        new, new_is = None, "estimated by EM"
    old, old_is = (given["from"], in_file) if "from" in given else _counted(bench, n)
    shares = None if new is None else new / new.sum()
    prior = Prior(old / old.sum(), shares, names, old_is=old_is, new_is=new_is)
    before = guards.Snapshot(bench.model)
    try:
        _shift_(bench, prior)
    finally:
        before.restore_()
    return prior


def with_prior(fits: Fits, prior: Prior, state: State) -> tuple[State, Prior]:
    """Shift a state's logits by the prior, which is estimated first if necessary."""
    bench = fits.bench
    state.values.restore_()
    if prior.new is None:
        batches_of = partial(bench.batches, bench.work, "class prior: EM")
        logits = fits.outputs(fits.model, batches_of).outputs
        refuse_not_finite(logits)
        prior = dataclasses.replace(prior, new=estimate_shares(logits, prior.old))
    if not prior.shift.any():
        return state, prior
    _shift_(bench, prior)
    name = "class prior" if state.name == ORIGINAL else f"{state.name}, class prior"
    return State(name, guards.Snapshot(fits.model), results=state.results), prior


def describe_prior(prior: Prior, *, judged: bool) -> str:
    """Describe the shares, their sources, and the images that judged them."""
    new, most = prior.new, np.argsort(-np.abs(prior.shift), kind="stable")
    new = prior.old if new is None else new
    names, old = prior.names, prior.old
    shares = some([f"{plain(names[k])} from {old[k]:.3g} to {new[k]:.3g}" for k in most])
    text = f"class prior, old shares {prior.old_is}, new ones {prior.new_is}: class {shares}"
    if not prior.shift.any():
        return f"{text}. They are the same, so the head is unchanged."
    by = "the --test images have the new balance and judged it."
    if not judged:
        by = "as stated, and not judged by these images: no labelled --test has the new balance."
    return f"{text}. log(new / old) was added to the head's bias: {by}"


def _shift_(bench: Workbench, prior: Prior) -> None:
    try:
        _move_(bench, "the head", bench.work, 1.0, torch.from_numpy(prior.shift))
    except ModelError as error:
        raise ModelError(
            f"--class-prior: cannot be folded in: {error} Leave it out, and add log(new / old) to "
            "the logits where they are used."
        ) from error


def _counted(bench: Workbench, n: int) -> tuple[Array, str]:
    """Count the classes in the labels outside the test split; without labels, equal shares."""
    labels = bench.inputs.images.labels
    if labels is None:
        return np.ones(n), "assumed to be equal"
    counts = np.bincount(labels[bench.work], minlength=n)
    _require(
        bool(counts.all()),
        f"{(counts == 0).sum()} of {n} classes have no labelled image, so their old shares are "
        'unknown. Give a file with both: {"from": {...}, "to": {...}}.',
    )
    return counts, "counted in the labels"


def _read(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read one number per class, for the new balance or both; report all problems at once."""
    where, known = f"--class-prior {plain(path)}", {"from", "to"}
    content = read_object(path, where, _MOST_BYTES)
    if not any(isinstance(content.get(part), dict | str) for part in known):
        content = {"to": content}
    problems = [f"{plain(key, 60)!r} is neither from nor to" for key in content.keys() - known]
    problems += [] if "to" in content else ["to is missing"]
    found: dict[str, Any] = {}
    for part in sorted(content.keys() & known):
        value = found[part] = content[part]
        if isinstance(value, dict):
            found[part], wrong = _numbers(value, names, positive=part == "from")
            problems += [f"{part}: {one}" for one in wrong]
        elif (part, value) != ("to", "em"):
            problems.append(f"{part} is not an object that maps classes to numbers")
    if problems:
        error = DataError(
            f"{where}: {some(problems)}. Give a number for each of "
            f"{len(names)} classes, by its name or index.",
            path=path,
        )
        error.page = "recipes"
        raise error
    return found


def _numbers(
    given: dict[str, Any], names: Sequence[str], *, positive: bool
) -> tuple[Array, list[str]]:
    """One number per class, and the problems found."""
    once, places = Counter(names), {str(k): k for k in range(len(names))}
    places |= {name: k for k, name in enumerate(names) if once[name] == 1}
    found, problems = np.full(len(names), np.nan), list[str]()
    for name, value in given.items():
        k, shown = places.get(name), plain(name, 60)
        # Comparisons tolerate NaN, and integers of any length.
        ok = type(value) in (int, float) and 0 <= value < 1e15 and (value > 0 or not positive)
        if k is None:
            problems.append(f"{shown!r} is not a class")
        elif not np.isnan(found[k]):
            problems.append(f"{shown} is given by name and by index")
        else:
            found[k] = value if ok else 0.0
            least = "above 0" if positive else "of at least 0"
            problems += [] if ok else [f"{shown}: {plain(value, 30)}, expected a number {least}"]
    missing = [plain(name, 60) for name, x in zip(names, found, strict=True) if np.isnan(x)]
    problems += [f"no number for the classes {some(missing)}"] if missing else []
    problems += [] if problems or found.any() else ["all numbers are 0"]
    return found, problems


def _require(condition: bool, problem: str) -> None:
    require(condition, f"--class-prior: {problem}", "class_prior")
