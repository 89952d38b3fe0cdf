"""`convert`: swap the norm layers of a checkpoint, and prove that the outputs stay the same."""

from __future__ import annotations

import copy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import check_room
from bnfix.checkpoints.save import round_as_stored_
from bnfix.core.errors import ModelError, one_line
from bnfix.core.runtime import device_of, has_forward
from bnfix.core.runtime import run as run_model
from bnfix.core.settings import DataRecipe, ModelRecipe, Preprocessing, RunOptions, SwapRecipe
from bnfix.data.batches import Batch
from bnfix.data.splits import data_record, history_digests
from bnfix.jobs.inputs import (
    Track,
    Tracked,
    describe_corruption,
    describe_skipped,
    open_inputs,
    resolve_preprocessing,
    silent,
)
from bnfix.jobs.session import Workbench, finished, load_one
from bnfix.metrics.evaluate import first_look
from bnfix.metrics.robustness import all_outputs
from bnfix.models.build import input_channels
from bnfix.norm.layer import generalized_norms
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import Change, SwapPlan, plan_swap, swap_planned_, zero_pointwise_
from bnfix.recalibrate.refit import REFIT_SAMPLES, refit_
from bnfix.report.records import describe_neighbours, layer_rows, n_live
from bnfix.report.report import Report
from bnfix.report.result import Result
from bnfix.weights.choose import weighable_layers

#: Errors that a network, or the user's call of it, raises on an input of another shape.
CALL_ERRORS = (
    RuntimeError, ValueError, TypeError, AssertionError, LookupError, AttributeError, ModelError,
)  # fmt: skip
#: Tried in this order if the input's size is not known.
_USUAL_SIZES = (32, 28, 64, 16, 8, 96, 128, 224, 256, 299, 384, 512)
#: Largest output difference, relative to the largest output, that counts as rounding.
_TOLERANCE, _HALF_TOLERANCE = 1e-4, 1e-2


def convert(
    checkpoint: str | Path,
    *,
    model: str | ModelRecipe | None = None,
    swap: SwapRecipe | None = None,
    input_shape: tuple[int, ...] | None = None,
    run: RunOptions | None = None,
    command_line: str = "",
    data: str | None = None,
    source: DataRecipe | None = None,
    seed: int = 0,
    samples: int | None = None,
    track: Track = silent,
) -> Result:
    """Swap the norm layers of a checkpoint; outputs stay the same at example weight 0.

    Above 0 they change; with data, scale and shift are then re-fitted to the original's outputs.

    Args:
        checkpoint: the file.
        model: spec of the model, if the file does not carry one.
        swap: kind, groups, layers.
        input_shape: (C, H, W) for the check of the whole model; by default the size that the
            preprocessing gives, else common sizes, small ones first.
        run: the device.
        command_line: as typed, for the report.
        data: DATA to re-fit scale and shift on; labels are not used.
        source: preprocessing of the data.
        seed: for the order in which examples are drawn.
        samples: examples to re-fit on.
        track: how progress is shown.

    Returns:
        Model, report, history entry; nothing is written until ``result.save(path)``.

    Raises:
        ModelError: if the outputs changed although they should not have.
    """
    recipe = model if isinstance(model, ModelRecipe) else ModelRecipe(model)
    swap = swap or SwapRecipe()
    source, run = source or DataRecipe(), run or RunOptions()
    loaded = load_one(checkpoint, recipe, run, mapped=True)
    check_room(loaded.checkpoint.metadata, loaded.checkpoint.path)
    unlabelled = replace(source, labels="none")
    stated, _ = resolve_preprocessing(loaded, source)
    example = example_input(loaded.model, input_shape, known_shape(loaded.model, stated))
    where = "normal random input"
    if example is None and data is not None:
        where, few = "examples of the data", open_inputs(loaded, data, unlabelled).first_batch(seed)
        if few is not None and isinstance(few.x, torch.Tensor):
            example = few.x[:2].to(device_of(loaded.model))
    planned = plan_swap(loaded.model, swap)
    weighs = any(change.example_weight or change.batch_weight for change in planned.changes)
    original = copy.deepcopy(loaded.model) if weighs and data is not None else None
    plan, difference, notes = _swapped(loaded, planned, swap, example, where)
    notes = [*loaded.checkpoint.notes, *notes]
    preprocessing, used, residuals = loaded.origin.preprocessing, None, None
    if resolve_preprocessing(loaded, DataRecipe())[0] != stated:
        preprocessing = stated  # later commands use it
    if original is not None and data is not None and n_live(loaded.model):
        inputs = open_inputs(loaded, data, unlabelled)
        index, batches = inputs.sample(samples or REFIT_SAMPLES, loaded.model, run, seed)
        tracked = Tracked(batches, "re-fitting scale and shift", track)
        refitting = refit_(loaded.model, original, tracked)
        round_as_stored_(loaded.model)
        residuals = {layer.name: layer.residual for layer in refitting.layers}
        preprocessing, used = inputs.preprocessing, data_record(inputs.images, index)
        used["fit"] = history_digests(inputs.images, index)
        notes += [*inputs.notes, *describe_corruption(source)]
        notes += [*describe_skipped([tracked]), refitting.describe()]
    elif data is not None:
        notes.append("--data was not used: at example weight 0 there is nothing to re-fit.")
    elif weighs:
        notes.append(
            "scale and shift are the original's, re-fitted only for moments pooled over channel "
            "groups; give --data to re-fit them to the original's outputs."
        )
    recipes: dict[str, Any] = {"model": recipe, "swap": swap, "data": source}
    report = Report(
        command="convert",
        data=None,
        models=(),
        layers=layer_rows(loaded.model, {}, {}),
        swap=plan,
        assumptions=(*notes, *plan.notes, *describe_neighbours(loaded.model)),
        options={name: asdict(one) for name, one in recipes.items()} | {"samples": samples},
        seed=seed,
        command_line=command_line,
    )
    results = {"difference": difference, "n_layers": len(plan.changes), "residuals": residuals}
    return finished(loaded, report, results=results, data=used, preprocessing=preprocessing)


def _swapped(
    loaded: Loaded, planned: SwapPlan, swap: SwapRecipe, example: torch.Tensor | None, where: str
) -> tuple[SwapPlan, float | None, list[str]]:
    """Swap, and compare the whole network's outputs; they can change only at weights above 0."""
    before = None if example is None else outputs_of(loaded.model, example)
    was_live = n_live(loaded.model) > 0
    plan = swap_planned_(loaded.model, planned)
    notes: list[str] = []
    if example is not None and (swap.example_weight or swap.batch_weight or swap.to == "group"):
        _, excluded = weighable_layers(loaded.model, [batch_of(example)], beside_batch=True)
        notes += zero_pointwise_(loaded.model, excluded)
    round_as_stored_(loaded.model)
    if before is None or example is None:
        notes.append(
            "the whole model could not be run on a made-up input, so only its layers were compared "
            "one by one; give --input-shape C,H,W."
        )
        return plan, None, notes
    after = outputs_of(loaded.model, example)
    difference: float | None = _difference(loaded, before, after, was_live=was_live)
    found = f"largest output difference is {difference:.2g} (relative to the largest output)."
    if not before.isfinite().all():
        found, difference = "outputs are not finite: nothing was compared. Run bnfix inspect.", None
    notes.append(f"on {where} of {'x'.join(map(str, example.shape))} the {found}")
    return plan, difference, notes


def _difference(
    loaded: Loaded, before: torch.Tensor, after: torch.Tensor, *, was_live: bool
) -> float:
    """Largest output difference relative to the largest output, refused if above rounding."""
    advice = "It may call norm layers in ways that bnfix cannot see; use --skip."
    if after.shape != before.shape:
        raise ModelError(f"model: its outputs have other shapes after the swap. {advice}")
    # A network that was already broken can give the same NaN again.
    same = (before == after) | (before.isnan() & after.isnan())
    gap = torch.where(same, 0.0, (after - before).abs()).max()
    difference = float(gap / before.abs().nan_to_num(0.0, posinf=0.0).max().clamp_min(1))
    live = was_live or n_live(loaded.model)
    is_half = any(d.is_floating_point and d.itemsize < 4 for d in loaded.origin.dtypes.values())
    if not live and not difference <= (_HALF_TOLERANCE if is_half else _TOLERANCE):
        raise ModelError(
            f"model: its outputs changed by {difference:.2g} in the swap, more than rounding. "
            f"{advice}"
        )
    return difference


def known_shape(model: nn.Module, preprocessing: Preprocessing) -> tuple[int, ...] | None:
    """Shape of one input, if the preprocessing gives a single size."""
    size = preprocessing.crop or preprocessing.resize
    if size is None or len(size) != 2:
        return None
    return (input_channels(model) or preprocessing.channels, *size)


def example_input(
    model: nn.Module, shape: tuple[int, ...] | None, known: tuple[int, ...] | None = None
) -> torch.Tensor | None:
    """Two seeded normal inputs that the model runs on, in the given, the known or a small shape."""
    channels = input_channels(model) or 3
    small = [(channels, size, size) for size in _USUAL_SIZES]
    shapes = [shape] if shape is not None else [*([known] if known else []), *small]
    failures: list[str] = []
    found = next((e for s in shapes if (e := _runs(model, s, failures)) is not None), None)
    if found is None and shape is not None:
        raise ModelError(f"model: cannot be run on an input of {shape} ({failures[0]}).")
    if found is None or tuple(found.shape[1:]) in (shape, known):
        return found
    # Layers with a single position have their own rules, so a small input must not create any.
    n_single = len(_single_positions(model, found))
    while n_single and found.shape[-1] < 256:
        larger = _runs(model, (channels, *(2 * s for s in found.shape[2:])), failures)
        if larger is None or (n := len(_single_positions(model, larger))) >= n_single:
            break
        found, n_single = larger, n
    return found


def _runs(model: nn.Module, shape: tuple[int, ...], failures: list[str]) -> torch.Tensor | None:
    """Examples of a shape if the model runs on them; else a failure is noted."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    example = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        outputs_of(model, example)
    except CALL_ERRORS as error:
        failures.append(one_line(error))
        return None
    return example


def _single_positions(model: nn.Module, example: torch.Tensor) -> set[str]:
    """Norm layers whose maps have a single position."""
    norms = {site.name: site.module for site in find_norms(model)}
    ((calls, _),) = first_look("model", model, norms, [batch_of(example)])
    return {name for name, n_positions in calls if n_positions == 1}


def outputs_of(model: nn.Module, example: torch.Tensor) -> torch.Tensor:
    """All tensors of the output, flat, in float64; for a detector, its backbone's."""

    def call() -> Any:
        if has_forward(model):
            return run_model(model, batch_of(example), example.device)
        return model(example)

    found, _ = all_outputs(model, call)
    if not found:
        raise TypeError("the output holds no tensor")
    return torch.cat([tensor.double().flatten() for tensor in found])


def batch_of(example: torch.Tensor) -> Batch:
    """Inputs without labels, as a batch of data."""
    return Batch(example, None, np.arange(len(example)))


def swap_(bench: Workbench, swap: SwapRecipe) -> None:
    """Swap stock layers; layers from a bnfix file keep all settings that are not asked for."""
    swapped = plan_swap(bench.model, swap)
    layers = dict(generalized_norms(bench.model))
    if layers and replace(swap, layers=(), skip=()) == SwapRecipe():
        return

    def keeping(change: Change) -> Change:
        layer = layers.get(change.name)
        if layer is None or swap.to != SwapRecipe().to:
            return change
        return replace(
            change,
            channel_groups=swap.channel_groups or layer.channel_groups,
            ghost_size=swap.ghost_size or layer.ghost_size,
            example_weight=swap.example_weight,
            batch_weight=swap.batch_weight,
        )

    swapped = replace(swapped, changes=tuple(map(keeping, swapped.changes)))
    live = any(layer.live for layer in layers.values())
    if not live and any(change.example_weight for change in swapped.changes):
        bench.original = copy.deepcopy(bench.model)
    swapped = swap_planned_(bench.model, swapped)
    bench.assumptions += [*swapped.notes, *swapped.skipped]
