"""A plan read back from a file's history, described, and its cost estimated."""

from __future__ import annotations

import dataclasses
import sys
import time
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bnfix.checkpoints.average import Ingredients
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import CheckpointError, ConfigError, DataError, ModelError, plain
from bnfix.core.memory import first_of
from bnfix.core.settings import (
    RunOptions,
)
from bnfix.data.batches import Batch, Batches
from bnfix.data.callables import is_callable
from bnfix.data.fingerprints import data_record
from bnfix.jobs.prior import open_prior
from bnfix.jobs.session import Plan, Workbench
from bnfix.jobs.steps import TUNING, Work, is_gated, resolve, work_of
from bnfix.metrics.task import Task, mean_loss
from bnfix.models.build import from_file_allowed
from bnfix.norm.layer import generalized_norms, set_example_weight_
from bnfix.norm.sites import find_norms
from bnfix.training.loop import parameter_groups

_Recipe = TypeVar("_Recipe")
_BATCHES = 2
_ENOUGH_SECONDS = 1.0
_REPEATS = 3
#: How far a run may be from its estimate: batches differ, and so does what else a machine does.
_LOW, _HIGH = 0.6, 1.8
#: States of the model that a run keeps to go back to.
_STATES_KEPT = 4


#: The options in a history, and the recipes of a plan that they are.
_RECIPES = {
    "model": "model",
    "data": "source",
    "swap": "swap",
    "statistics": "statistics",
    "example_weight": "weight",
    "finetune": "finetune",
    "gate": "gate",
}


def options_of(plan: Plan, averaged: Ingredients | None) -> dict[str, Any]:
    """The recipes, as the history and the report hold them."""
    recipes = {name: getattr(plan, part) for name, part in _RECIPES.items()}
    options = {name: one and dataclasses.asdict(one) for name, one in recipes.items()}
    options["precision"] = plan.run.precision
    if averaged is not None and plan.average is not None:
        how = plan.average
        options["averaging"] = {
            "method": how.method, "best": how.best, "statistics": how.statistics,
        }  # fmt: skip
        options["average"] = averaged.records()
    return options


def replayed_plan(
    path: str | Path, *, run: RunOptions, command_line: str = "", test: str | None = None
) -> Plan:
    """Read the plan of the last `fix` or `calibrate` in a file's history."""
    where = Path(path)
    history = (read_checkpoint(where).metadata or {}).get("history")
    entries = [
        entry
        for entry in (history if isinstance(history, list) else [])
        if isinstance(entry, dict) and entry.get("command") in ("fix", "calibrate")
    ]
    if not entries:
        raise CheckpointError(
            f"{plain(where)}: has no fix or calibrate in its history to replay. Give a file that "
            "bnfix has written.",
            path=where,
        )
    try:
        found = entries[-1].get("options")
        return _replayed(found if isinstance(found, dict) else {}, run, command_line, test)
    except ConfigError as error:
        raise CheckpointError(
            f"{plain(where)}: the options in its history cannot be used: {plain(error)}", path=where
        ) from error


def _replayed(
    options: dict[str, Any], run: RunOptions, command_line: str, test: str | None
) -> Plan:
    """The plan of these options, without any code that only the file names."""
    usual = Plan()
    if isinstance(asked := options.get("model"), dict):
        options = {**options, "model": {**asked, "forward": None}}
    recipes = {
        part: _recipe(type(getattr(usual, part)), options, name)
        for name, part in _RECIPES.items()
        if name != "finetune" or options.get(name) is not None
    }
    plan = Plan(
        **{"finetune": None, **recipes},
        command_line=command_line,
        run=dataclasses.replace(run, precision=options.get("precision", run.precision)),
    )
    model, source = plan.model, plan.source
    # A model that the file names is built only where a file's word is enough for that.
    if model.model is not None and not from_file_allowed(model.model):
        model = dataclasses.replace(model, model=None, arguments=())
    stated = plan.statistics.reference_model
    if stated is not None and not from_file_allowed(stated):
        plan = replace(plan, statistics=replace(plan.statistics, reference_model=None))
    if test is not None:
        source = dataclasses.replace(source, test=test)
    for spec, what, else_ in (
        (source.test if test is None else None, "test", "Name it by --test."),
        (plan.gate.select, "select", "Give the options themselves, without --recipe."),
    ):
        if isinstance(spec, str) and is_callable(spec):
            code = f"its {what} data are code, {plain(spec)}, which is not run because a file says"
            raise ConfigError(f"{code} so. {else_}")
    return dataclasses.replace(plan, model=model, source=source)


def with_own_models(plan: Plan, typed: Plan) -> Plan:
    """A replayed plan with the model and the reference that were typed beside it."""
    given, statistics = typed.model, typed.statistics
    if statistics.reference is not None:
        own = {name: getattr(statistics, name) for name in ("reference", "reference_model")}
        plan = replace(plan, statistics=replace(plan.statistics, **own))
    asked = given
    if given.model is None:
        # A model is called in one way: the stated one replaces that of the file.
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
        raise ConfigError(f"{name}: not an object of the options that this version knows.")
    found = {key: _hashable(value) for key, value in values.items()}
    wrong = [key for key, value in found.items() if not _fits(value, hints[key])]
    if wrong:
        raise ConfigError(f"{name}: {', '.join(wrong)}: of the wrong type.")
    return kind(**found)


def _hashable(value: Any) -> Any:
    """Lists, which JSON has, as the tuples that recipes hold."""
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
        if parts[-1] is Ellipsis:
            return all(_fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(_fits, value, parts))
    if hint is float:
        return type(value) in (int, float)
    return type(value) is hint


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
        **estimated(bench, work).to_json(),
        "output": output,
        "assumptions": list(bench.assumptions),
    }


@dataclass(frozen=True)
class Estimate:
    """What a plan would cost on this machine."""

    seconds: tuple[float, float] | None  # least and most; none where no batch could be run
    memory_bytes: int | None  # most of the process or the accelerator, where the system tells
    passes: float  # of all stages, over the examples that each of them has

    def to_json(self) -> dict[str, Any]:
        """The numbers under the names that ``--plan --json`` gives them."""
        return {
            "passes": round(self.passes, 2),
            "seconds_estimated": None if self.seconds is None else list(self.seconds),
            "memory_estimated_bytes": self.memory_bytes,
        }


def estimated(bench: Workbench, work: Sequence[Work]) -> Estimate:
    """Time a few real batches of a workbench, and multiply."""
    passes = sum(one.passes for one in work)
    costs = {one.cost for one in work if one.passes and one.examples}
    try:
        reading, costs_an_example = _timed(bench, costs)
    except DataError:
        return Estimate(None, peak_memory(bench.model), passes)
    n_read = len(bench.split.fit) + len(bench.split.select) + len(bench.split.test)
    seconds = n_read * reading
    seconds += sum(one.examples * one.passes * costs_an_example.get(one.cost, 0.0) for one in work)
    seconds /= distributed.here().size
    return Estimate(_range(seconds), _memory(bench), passes)


def estimated_evaluation(
    models: Sequence[tuple[nn.Module, Batches]], n_examples: int, n_variants: int, precision: str
) -> Estimate:
    """Time a few real batches of every model that is to be evaluated, and multiply."""
    passes = len(models) * n_variants
    seconds = 0.0
    for number, (model, batches) in enumerate(models):
        started = time.perf_counter()
        try:
            few = list(batches)
        except DataError:
            return Estimate(None, peak_memory(model), passes)
        n = sum(len(batch.index) for batch in few)
        # All models see the same images, which are read once.
        seconds += 0.0 if number else (time.perf_counter() - started) / n * n_examples
        with guards.seeded(0), guards.inference(model):
            step = _forward(model, few, precision)
            step()
            seconds += _median_seconds(step) / n * n_examples * n_variants
    seconds /= distributed.here().size
    return Estimate(_range(seconds), peak_memory(models[0][0]), passes)


def estimated_again(model: nn.Module, seconds: float, passes: float = 0.0) -> Estimate:
    """What was just done costs once more."""
    return Estimate(_range(seconds), peak_memory(model), passes)


def peak_memory(model: nn.Module) -> int | None:
    """Most memory so far: of the accelerator that a model is on, else of this process."""
    device = runtime.device_of(model)
    if device.type == "cuda":
        allocated: int = torch.cuda.max_memory_allocated(device)
        return int(allocated)
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    peak: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else 1024 * peak)


def _range(seconds: float) -> tuple[float, float]:
    return round(_LOW * seconds, 3), round(_HIGH * seconds, 3)


def _memory(bench: Workbench) -> int | None:
    """The peak of what was timed, the states that a run keeps, and the images in memory."""
    peak = peak_memory(bench.model)
    if peak is None:
        return None
    state: int = sum(t.numel() * t.element_size() for t in bench.model.state_dict().values())
    if runtime.device_of(bench.model).type == "cuda":
        return peak + _STATES_KEPT * state
    n_images = sum(map(len, (bench.split.fit, bench.split.select, bench.split.test)))
    # Kept as bytes, one a number of the input; Batches stops at 2 GiB.
    return peak + _STATES_KEPT * state + min(n_images * bench.inputs.size, 2 << 30)


def _timed(bench: Workbench, costs: set[str]) -> tuple[float, dict[str, float]]:
    """Seconds an example: to read it, and for each kind of pass."""
    model = bench.model
    index = bench.split.fit if bench.split.fit.size else bench.split.test
    size = bench.batches(index, "").batches.batch_size
    # A bad image among these few is none of the plan's business.
    own = replace(bench, inputs=bench.inputs.lenient(len(index)))
    started = time.perf_counter()
    batches = list(own.batches(index[: _BATCHES * size], "timing a few batches").whole())
    n = sum(len(batch.index) for batch in batches)
    reading = (time.perf_counter() - started) / n
    layers = dict(generalized_norms(model))
    before = guards.Snapshot(model)
    found: dict[str, float] = {}
    try:
        with guards.seeded(0), guards.inference(model):
            step = _forward(model, batches, bench.plan.run.precision)
            step()  # what is done once, such as choosing kernels, is no part of a pass
            found["forward"] = _median_seconds(step) / n
            if layers and costs & {"live", "training"}:
                set_example_weight_(model, dict.fromkeys(layers, 0.1))
            found["live"] = _median_seconds(step) / n if "live" in costs else 0.0
            if "training" in costs:
                few = first_of(batches[0], 64)
                step = _backward(model, few, bench.inputs.task)
                found["training"] = _median_seconds(step) / len(few.index)
    finally:
        before.restore_()
    return reading, found


def _forward(model: nn.Module, batches: Sequence[Batch], precision: str) -> Callable[[], None]:
    device = runtime.device_of(model)

    def step() -> None:
        with runtime.autocast(device, precision):
            for batch in batches:
                runtime.run(model, batch, device)
        _wait(device)

    return step


def _backward(model: nn.Module, batch: Batch, task: Task) -> Callable[[], None]:
    """One step with gradients of the norms' parameters, or of all where there are none."""
    device = runtime.device_of(model)
    wanted: list[Tensor] = [
        p for site in find_norms(model) for p in site.module.parameters(recurse=False)
    ]
    zero = torch.zeros((), device=device)
    wanted = wanted or [p for g in parameter_groups(model, lr=1.0) for p in g["params"]]

    def step() -> None:
        with guards.only_these_require_grad(model, wanted), torch.enable_grad():
            if batch.y is None:
                output = runtime.run(model, batch, device)
                loss = sum((t.float().square().mean() for t in runtime.tensors_in(output)), zero)
            else:
                loss = mean_loss(task, model, batch, None, what="plan")
            if not loss.requires_grad:
                raise ModelError("model: its output has no gradient in its parameters.")
            loss.backward()  # type: ignore[no-untyped-call]
        _wait(device)

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _median_seconds(step: Callable[[], None]) -> float:
    """Of three times, or fewer where each takes long."""
    times: list[float] = []
    while not times or (len(times) < _REPEATS and sum(times) < _ENOUGH_SECONDS):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return sorted(times)[len(times) // 2]
