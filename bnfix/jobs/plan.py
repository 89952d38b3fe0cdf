"""Read a plan back from a file's history, describe a plan, and estimate its cost."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.checkpoints.several import Ingredients
from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import CheckpointError, ConfigError, DataError, ModelError, file_error, plain
from bnfix.core.memory import first_of
from bnfix.core.settings import RunOptions
from bnfix.data.arrays import is_callable
from bnfix.data.batches import Batch, Batches
from bnfix.data.splits import data_record
from bnfix.jobs.head import open_prior
from bnfix.jobs.session import Plan, Workbench
from bnfix.jobs.steps import TUNING, Work, is_gated, resolve, work_of
from bnfix.metrics.beside import Prior
from bnfix.models.build import from_file_allowed
from bnfix.norm.layer import generalized_norms, set_example_weight_
from bnfix.norm.sites import find_norms

_Recipe = TypeVar("_Recipe")
_BATCHES = 2
_ENOUGH_SECONDS = 1.0
_REPEATS = 3
#: The range of a run's cost, relative to its estimate.
_LOW, _HIGH = 0.6, 1.8
#: States of the model that a run keeps to restore.
_STATES_KEPT = 4


#: The options in a history, and the recipes of a plan that they fill.
_RECIPES = {
    "model": "model",
    "data": "source",
    "swap": "swap",
    "statistics": "statistics",
    "example_weight": "weight",
    "finetune": "finetune",
    "gate": "gate",
}


def options_of(
    bench: Workbench, averaged: Ingredients | None, prior: Prior | None
) -> dict[str, Any]:
    """The options for the history and the report: the recipes, and all else behind the output."""
    plan = bench.plan
    recipes = {name: getattr(plan, part) for name, part in _RECIPES.items()}
    options = {name: one and dataclasses.asdict(one) for name, one in recipes.items()}
    options["precision"] = plan.run.precision
    if averaged is not None:
        names = ("method", "best", "statistics")
        options["averaging"] = {name: getattr(plan.average, name) for name in names}
        options["average"] = averaged.records()
    if prior is not None:
        options["class_prior"] = prior.to_json()
    if bench.reference is not None:
        file = bench.reference.checkpoint
        options["reference"] = {"file": file.path.name, "sha256": file.sha256}
    return options


def replayed_plan(
    path: str | Path, *, run: RunOptions, command_line: str = "", test: str | None = None
) -> Plan:
    """Read the plan of the last `fix` or `calibrate` in a file's history."""
    where = Path(path)
    try:
        history = (read_checkpoint(where).metadata or {}).get("history")
    except CheckpointError as error:
        raise CheckpointError(f"--recipe: {error}", path=where) from error
    entries = [e for e in (history if isinstance(history, list) else []) if isinstance(e, dict)]
    entries = [entry for entry in entries if entry.get("command") in ("fix", "calibrate")]
    if not entries:
        lacks = "--recipe: has no fix or calibrate in its history to replay. Give a file that"
        raise file_error(where, f"{lacks} bnfix wrote.")
    try:
        found = entries[-1].get("options")
        return _replayed(found if isinstance(found, dict) else {}, run, command_line, test)
    except ConfigError as error:
        problem = f"the options in its history cannot be used: {plain(error)}"
        raise file_error(where, problem) from error


def _replayed(
    options: dict[str, Any], run: RunOptions, command_line: str, test: str | None
) -> Plan:
    """The plan of these options, without any code that only the file names."""
    if isinstance(asked := options.get("model"), dict):
        options = {**options, "model": {**asked, "forward": None}}
    usual, recipes = Plan(), dict[str, Any](finetune=None)
    for name, part in _RECIPES.items():
        if name != "finetune" or options.get(name) is not None:
            recipes[part] = _recipe(type(getattr(usual, part)), options, name)
    model, statistics, source = (recipes[part] for part in ("model", "statistics", "source"))
    # A model that only the file names is built only if that runs no code of its own.
    allowed = model.model is None or from_file_allowed(model.model)
    recipes["model"] = model if allowed else replace(model, model=None, arguments=())
    stated = statistics.reference_model
    if stated is not None and not from_file_allowed(stated):
        recipes["statistics"] = replace(statistics, reference_model=None)
    if test is not None:
        recipes["source"] = replace(source, test=test)
    for spec, what, else_ in (
        (source.test if test is None else None, "test", "Name the data with --test."),
        (recipes["gate"].select, "select", "Give the options themselves, without --recipe."),
    ):
        if isinstance(spec, str) and is_callable(spec):
            code = f"its {what} data are code, {plain(spec)}, and code that a file names is not"
            raise ConfigError(f"{code} run. {else_}")
    run = replace(run, precision=options.get("precision", run.precision))
    return Plan(**recipes, command_line=command_line, run=run)


def with_own_models(plan: Plan, typed: Plan) -> Plan:
    """A replayed plan with the model and the reference from the command line."""
    given, statistics = typed.model, typed.statistics
    if statistics.reference is not None:
        own = {name: getattr(statistics, name) for name in ("reference", "reference_model")}
        plan = replace(plan, statistics=replace(plan.statistics, **own))
    asked = given
    if given.model is None:
        # A model is called in one way: a stated one replaces the file's.
        called = given if given.forward or given.logits_output else plan.model
        asked = replace(plan.model, forward=called.forward, logits_output=called.logits_output)
    own = {"like_input": given.like_input, "domain": given.domain}
    unfreeze = given.unfreeze or plan.model.unfreeze
    return replace(plan, model=replace(asked, unfreeze=unfreeze, **own))


def _recipe(kind: type[_Recipe], options: Mapping[str, Any], name: str) -> _Recipe:
    """One recipe from JSON values, each of its declared type."""
    values = options.get(name)
    hints = typing.get_type_hints(kind)
    if not isinstance(values, dict) or not set(values) <= set(hints):
        raise ConfigError(f"{name}: is not an object with options that this version knows.")
    found = {key: _hashable(value) for key, value in values.items()}
    wrong = [key for key, value in found.items() if not _fits(value, hints[key])]
    if wrong:
        raise ConfigError(f"{name}: {', '.join(wrong)}: wrong type.")
    return kind(**found)


def _hashable(value: Any) -> Any:
    """Turn JSON's lists into the tuples that recipes hold."""
    return tuple(_hashable(item) for item in value) if isinstance(value, list) else value


def _fits(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if isinstance(hint, types.UnionType):
        return any(_fits(value, one) for one in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        parts = typing.get_args(hint)
        if not isinstance(value, tuple):
            return False
        parts = parts[:1] * len(value) if parts[-1] is Ellipsis else parts
        return len(value) == len(parts) and all(map(_fits, value, parts))
    return type(value) in ((int, float) if hint is float else (hint,))


def describe(bench: Workbench, output: str | None) -> dict[str, Any]:
    """The steps, splits and costs of a command as JSON values; runs a few batches to time them."""
    plan, steps = bench.plan, resolve(bench.plan, bench)
    lines = [step.name for step in steps]
    shaped, work = bench.inputs.preprocessing, work_of(plan, bench)
    tuned = [s.work[0] for s in steps if s.stage == TUNING and s.gate == "select"]
    if tuned and plan.finetune is not None and plan.finetune.refit:
        lines.append("fine-tuning that won, again on fit and select")
        work.append(replace(tuned[-1], stage=lines[-1], examples=len(bench.work)))
    if is_gated(steps):
        lines.append("every candidate judged on select; the winner measured on test")
    if (prior := open_prior(bench)) is not None:
        lines.append(f"class prior {prior.new_is}, into the head's bias")
        work += [Work("class prior: EM", len(bench.work), 1)] if prior.new is None else []
    return {
        "command": plan.command,
        "plan": True,
        "model": bench.loaded.origin.spec,
        "reference": plan.statistics.reference,
        "n_layers": len(find_norms(bench.model)),
        "data": {
            **data_record(bench.inputs.images),
            "kind": bench.inputs.images.kind,
            "labels": bench.labelled,
            "splits": bench.split.sizes(),
        },
        "preprocessing": shaped and dataclasses.asdict(shaped),
        "stages": lines,
        "device": str(next(iter(bench.model.parameters())).device),
        **estimated(bench, work),
        "output": output,
        "assumptions": list(bench.assumptions),
    }


def cost_json(
    seconds: float | None, model: nn.Module, passes: float, held: int = 0
) -> dict[str, Any]:
    """A plan's cost on this machine, for ``--plan --json``; ``held`` adds bytes."""
    # Batches differ, and so does the machine's other load.
    spread = None if seconds is None else [round(part * seconds, 3) for part in (_LOW, _HIGH)]
    peak = peak_memory(model)
    return {
        "passes": round(passes, 2),
        "seconds_estimated": spread,
        "memory_estimated_bytes": None if peak is None else peak + held,
    }


def estimated(bench: Workbench, work: Sequence[Work]) -> dict[str, Any]:
    """Time a few real batches of a workbench, and multiply."""
    model, passes = bench.model, sum(one.passes for one in work)
    try:
        reading, seconds_of = _timed(bench, {one.cost for one in work if one.passes * one.examples})
    except DataError as error:
        return cost_json(None, model, passes) | {"problem": str(error)}
    split = bench.split.sizes()
    n_read = split["fit"] + split["select"] + split["test"]
    seconds = n_read * reading
    seconds += sum(one.examples * one.passes * seconds_of.get(one.cost, 0.0) for one in work)
    held: int = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    held *= _STATES_KEPT
    if runtime.device_of(model).type != "cuda":
        # Images are kept as bytes, one per number of the input; Batches stops at 2 GiB.
        held += min(n_read * bench.inputs.size, 2 << 30)
    return cost_json(seconds / distributed.here().size, model, passes, held)


def estimated_evaluation(
    models: Sequence[tuple[nn.Module, Batches]], n_examples: int, n_variants: int, precision: str
) -> dict[str, Any]:
    """Time a few real batches of every model to evaluate, and multiply."""
    passes, seconds = len(models) * n_variants, 0.0
    for number, (model, batches) in enumerate(models):
        try:
            reading, few = _read(batches)
        except DataError as error:
            return cost_json(None, model, passes) | {"problem": str(error)}
        # All models see the same images, which are read once.
        seconds += 0.0 if number else reading * n_examples
        n = sum(len(batch.index) for batch in few)
        with guards.seeded(0), guards.inference(model):
            seconds += _forward(model, few, precision) / n * n_examples * n_variants
    return cost_json(seconds / distributed.here().size, models[0][0], passes)


def peak_memory(model: nn.Module) -> int | None:
    """Peak memory so far, on the model's accelerator or else in this process."""
    device = runtime.device_of(model)
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)


def _read(batches: Iterable[Batch]) -> tuple[float, list[Batch]]:
    """Read batches; returns the seconds per example, and the batches."""
    started = time.perf_counter()
    found = list(batches)
    return (time.perf_counter() - started) / sum(len(batch.index) for batch in found), found


def _timed(bench: Workbench, costs: set[str]) -> tuple[float, dict[str, float]]:
    """Seconds per example, for reading and for each kind of pass."""
    model, precision = bench.model, bench.plan.run.precision
    index = bench.split.fit if bench.split.fit.size else bench.split.test
    # A bad image among these few must not stop the plan.
    own = replace(bench, inputs=bench.inputs.lenient(len(index)))
    few = index[: _BATCHES * bench.evaluation.size]
    reading, batches = _read(own.batches(few, "timing a few batches").whole())
    n = sum(len(batch.index) for batch in batches)
    layers, before = dict(generalized_norms(model)), guards.Snapshot(model)
    found: dict[str, float] = {}
    try:
        with guards.seeded(0), guards.inference(model):
            found["forward"] = _forward(model, batches, precision) / n
            if layers and costs & {"live", "training"}:
                set_example_weight_(model, dict.fromkeys(layers, 0.1))
            if "live" in costs:
                found["live"] = _forward(model, batches, precision) / n
            if "training" in costs:
                part = first_of(batches[0], 64)
                found["training"] = _backward(model, part) / len(part.index)
    finally:
        before.restore_()
    return reading, found


def _forward(model: nn.Module, batches: Sequence[Batch], precision: str) -> float:
    """Seconds of a pass over batches."""
    device = runtime.device_of(model)

    def step() -> None:
        with runtime.autocast(device, precision):
            for batch in batches:
                runtime.run(model, batch, device)

    return _median_seconds(step, device)


def _backward(model: nn.Module, batch: Batch) -> float:
    """Seconds for the gradients of the norms' parameters, or of all if there are none."""
    device = runtime.device_of(model)
    wanted: list[Tensor] = [
        p for site in find_norms(model) for p in site.module.parameters(recurse=False)
    ]
    wanted = wanted or list(model.parameters())

    def step() -> None:
        with guards.only_these_require_grad(model, wanted), torch.enable_grad():
            found = runtime.tensors_in(runtime.run(model, batch, device))
            loss = torch.stack([t.float().square().mean() for t in found]).sum()
            if not loss.requires_grad:
                raise ModelError("model: its output has no gradient for its parameters.")
            loss.backward()  # type: ignore[no-untyped-call]

    return _median_seconds(step, device)


def _median_seconds(step: Callable[[], None], device: torch.device) -> float:
    """The median of three timings, or of fewer if each takes long."""
    step()  # one-time work, such as choosing kernels, is not part of a pass
    times: list[float] = []
    while not times or (len(times) < _REPEATS and sum(times) < _ENOUGH_SECONDS):
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
