"""The settings of one command, and its opened checkpoint and data."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bnfix.checkpoints.alike import check_copyable
from bnfix.checkpoints.checkpoint import misfits_of
from bnfix.checkpoints.load import Loaded, load_ready, stock_shapes
from bnfix.checkpoints.read import check_room
from bnfix.checkpoints.save import history_entry, versions
from bnfix.checkpoints.several import begin_domain_
from bnfix.core import distributed, runtime, settings
from bnfix.core.errors import CheckpointError, DataError, count, file_error
from bnfix.core.memory import BatchSize, Footprint, footprint
from bnfix.core.options import require
from bnfix.core.settings import ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batch
from bnfix.data.corruptions import corruption_of
from bnfix.data.images import SeveralImages
from bnfix.data.splits import Split, choosing, cut, describe_groups, groups_of_test, unseen, watched
from bnfix.deploy.exported import is_exported, load_exported
from bnfix.jobs.inputs import (
    VALUES_A_BATCH,
    Inputs,
    Track,
    Tracked,
    describe_corruption,
    evaluation_batch_size,
    look_at_inputs,
    look_at_size,
    open_inputs,
    silent,
)
from bnfix.metrics.metrics import shortfall
from bnfix.models.build import import_forward
from bnfix.models.published import default_preprocessing
from bnfix.recalibrate.targets import MEASURED_SPREAD
from bnfix.report.report import Report
from bnfix.report.result import Result

#: The training that `fix` tries if there are labels.
TRIED = settings.FinetuneRecipe(train="norms+head", example_weight="learn", refit=True)


@dataclass(frozen=True)
class Plan:
    """All settings of `fix`, `calibrate` or `finetune`, under the names of their options.

    `bnfix.settings` has the recipes: ``bnfix.Plan(source=bnfix.settings.DataRecipe(scale=1.0))``.

    Args:
        command: ``fix``, ``calibrate``, ``finetune`` or ``average``; the function called sets it.
        command_line: as typed, for the history; empty for calls from Python.
        model: `ModelRecipe`: how the model is built, and where the file holds it.
        source: `DataRecipe`: preprocessing, labels, and the data of the test split.
        swap: `SwapRecipe`: which layers are turned into which kind of normalization.
        statistics: `StatisticsRecipe`: whether and how running statistics are recalibrated.
        weight: `WeightRecipe`: how the example weight, from 0 to 1, is chosen.
        finetune: `FinetuneRecipe`: the training to try; ``None`` for none.
        gate: `GateRecipe`: parts of the splits, seed, standard errors that a winner needs.
        run: `RunOptions`: device, precision, batch size, workers.
        state: folder for the state of a long run, to resume it from.
        average: `AverageRecipe`: checkpoints to average the model with, before anything else.

    Raises:
        ConfigError: if the example weight needs ``train_batch_size``, and it is not given; or if
            weight noise, or a domain with weights, does not fit the command.
    """

    command: str = "fix"
    command_line: str = ""
    model: settings.ModelRecipe = settings.ModelRecipe()
    source: settings.DataRecipe = settings.DataRecipe()
    swap: settings.SwapRecipe = settings.SwapRecipe()
    statistics: settings.StatisticsRecipe = settings.StatisticsRecipe()
    weight: settings.WeightRecipe = settings.WeightRecipe()
    finetune: settings.FinetuneRecipe | None = TRIED
    gate: settings.GateRecipe = settings.GateRecipe()
    run: settings.RunOptions = settings.RunOptions()
    state: str | None = None
    average: settings.AverageRecipe | None = None

    @property
    def new_domain(self) -> str | None:
        """The domain that the command measures statistics for."""
        return self.model.domain if self.command == "calibrate" else None

    @property
    def chooses_weights(self) -> bool:
        """Whether example weights are tried: not with weight noise, and not for a domain."""
        barred = self.statistics.weight_noise or self.new_domain is not None
        return self.weight.example_weight == "auto" and not barred

    def __post_init__(self) -> None:
        """Check combinations of recipes."""
        weight, noise = self.weight.example_weight, self.statistics.weight_noise
        ok = weight not in settings.LABEL_FREE or self.statistics.train_batch_size is not None
        words = f"--example-weight {weight}: the batch size is missing. Give --train-batch-size B."
        require(ok, words, "train_batch_size")
        live = self.weight.is_stated or self.weight.batch_weight != "keep" or self.model.like_input
        live |= self.gate.temperature == "auto" or self.gate.class_prior is not None
        others = "--temperature, --class-prior, --like-input and example and batch weights"
        words = f"--domain: a domain holds statistics and no weights. Leave out {others}."
        require(self.new_domain is None or not live, words, "domain")
        ok = self.command in ("fix", "calibrate") and self.weight.batch_weight != "auto"
        words = "--weight-noise: only fix and calibrate take it, without --batch-weight auto."
        require(not noise or (ok and self.average is None), words, "weight_noise")


_ACTING = (
    "--reference CKPT (the undamaged network, which judges candidates), --statistics "
    "population, --statistics train-batch --train-batch-size B, --example-weight match, "
    "fit-moments, fit-predictions or a number, --batch-weight N."
)
_KEPT = (
    "without labels nothing can be proven, so `auto` changes nothing. These act: --statistics "
    f"blend (recommended: between stored and measured; {MEASURED_SPREAD}), {_ACTING}"
)
_BLENDED = (
    "without labels nothing can be proven. By default the stored statistics are mixed with the "
    f"data's (blend), which can be worse here: {MEASURED_SPREAD}. --statistics keep leaves them "
    f"unchanged. These also act: {_ACTING}"
)


def blends_by_default(plan: Plan) -> bool:
    """Whether `fix` mixes statistics if nothing can be judged: yes, unless anything was stated."""
    recipe = plan.statistics
    is_auto = recipe.statistics == "auto" and not (recipe.weight_noise or plan.weight.is_stated)
    return plan.command == "fix" and is_auto


def describe_unjudged(plan: Plan) -> list[str]:
    """A note on `auto` if nothing can be judged and nothing was stated, with options that act."""
    if plan.statistics.statistics != "auto" or plan.weight.is_stated:
        return []
    return [_BLENDED if blends_by_default(plan) else _KEPT]


def without_live_layers(plan: Plan) -> Plan:
    """A plan that tries no weights if the output cannot hold them."""
    tune = plan.finetune
    if not plan.model.like_input:
        return plan
    learns = plan.command == "finetune" and tune is not None and tune.example_weight == "learn"
    stated = plan.weight.is_stated or plan.weight.batch_weight == "auto"
    require(
        not (stated or learns or plan.swap.to == "gated"),
        "--like-input: a training checkpoint cannot hold example weights, batch weights or gates. "
        "Leave out --like-input, or them.",
        "like_input",
    )
    weight = replace(plan.weight, example_weight="keep")
    tune = tune and replace(tune, example_weight="keep")
    return replace(plan, weight=weight, finetune=tune)


@dataclass
class Workbench:
    """A plan's opened checkpoint and data."""

    plan: Plan
    loaded: Loaded  # its model on the device
    inputs: Inputs
    test: Inputs  # of the test split: the same object, or ``--test``
    split: Split  # positions of fit and select in the data, of test in the test data
    assumptions: list[str]  # notes on everything assumed for the user
    track: Track
    evaluation: BatchSize  # of passes without gradients; it shrinks if memory is short
    footprint: Footprint | None = None  # the memory of forward passes, if known
    reference: Loaded | None = None  # the undamaged network, its model on the device
    # The model before a swap to layers that weigh the example and must be re-fitted to it.
    original: nn.Module | None = None
    again: bool = False  # the winning training now learns from all images of `work`

    @property
    def model(self) -> nn.Module:
        """The model, on the device."""
        return self.loaded.model

    @property
    def labelled(self) -> bool:
        """Whether the data has usable labels."""
        return self.inputs.images.labelled

    @property
    def judged(self) -> bool:
        """Whether candidates can be judged, by labels or by a reference."""
        return self.labelled or self.reference is not None

    @property
    def everything(self) -> np.ndarray:
        """Positions of all images of the data that are in a split, in seeded random order."""
        parts = [self.split.fit, self.split.select]
        if self.test is self.inputs:
            parts.append(self.split.test)
        return np.random.default_rng(self.plan.gate.seed).permutation(np.concatenate(parts))

    @property
    def work(self) -> np.ndarray:
        """Positions of the images to fit and choose on, without separate ones from ``--select``."""
        own = not isinstance(self.plan.gate.select, str)
        return np.sort(np.concatenate([self.split.fit, self.split.select[: None if own else 0]]))

    def fit_on_all_(self) -> None:
        """Fit on select and test images too, since nothing is judged; a separate test stays."""
        split, none = self.split, self.split.test[:0]
        # Test positions refer to other data if `--test` names some.
        own, test = (split.test, none) if self.plan.source.test is None else (none, split.test)
        # Images that were given to choose on are not fitted on.
        select = none if isinstance(self.plan.gate.select, str) else split.select
        fit = np.sort(np.concatenate([split.fit, select, own]))
        self.split = replace(split, fit=fit, select=none, test=test)

    def by_source(self, index: np.ndarray) -> list[np.ndarray]:
        """Positions of each source's images if `--mix` weighs them; else all in one."""
        sources = self.inputs.images.sources
        if not self.plan.statistics.mix or sources is None:
            return [index]
        return [index[sources[index] == k] for k in range(len(self.plan.statistics.mix))]

    def batches(
        self, index: np.ndarray, stage: str, size: int | None = None, inputs: Inputs | None = None
    ) -> Tracked:
        """Re-iterable batches of chosen images in this order, for a stage that progress shows."""
        plan, place = self.plan, distributed.here()
        corruption = corruption_of(plan.source.corrupt, plan.gate.seed)
        size, inputs = size or self.evaluation.size, inputs or self.inputs
        batches = inputs.batches(index, plan.run, size, corruption)
        return Tracked(batches.dealt(place.rank, place.size), stage, self.track)

    def test_batches(self, stage: str) -> Tracked:
        """Re-iterable batches of the test split, for a stage that progress shows."""
        return self.batches(self.split.test, stage, inputs=self.test)

    def identity(self, *parts: np.ndarray, batch_size: int) -> str:
        """Hash everything between the files and the network, as the identity of ``--state``."""
        digest, model = hashlib.sha256(), self.plan.model
        # The test split does not take part, nor does the number of bad images allowed.
        source, seed = replace(self.plan.source, test=None, max_bad=None), self.plan.gate.seed
        lengths = list(map(len, parts))
        known = [model, source, self.inputs.preprocessing, seed, batch_size, lengths]
        digest.update(repr(known).encode())
        for spec in (model.model, model.forward, self.plan.statistics.reference_model):
            name = (spec or "").rpartition(":")[0]
            code = Path(getattr(sys.modules.get(name), "__file__", None) or name)
            digest.update(code.read_bytes() if code.is_file() else b"")
        # The order of the images counts too, since it decides the batches.
        for i in np.concatenate(parts):
            images, y = self.inputs.images, self.inputs.images.labels
            label = images.target_digest(int(i)).hex() if y is None else int(y[i])
            digest.update(images.digest(int(i)) + f"{label};".encode())
        return digest.hexdigest()

    def training_batch_size(self, stated: int | None) -> int:
        """The batch size with gradients: as stated, or 64, less for large inputs, at least 16."""
        return stated or min(64, max(16, VALUES_A_BATCH // self.inputs.size))

    def learn_and_monitor(self) -> tuple[np.ndarray, np.ndarray]:
        """Split fit for early stopping: four fifths to learn on, one fifth to watch."""
        if self.again:  # nothing is held out to watch: this only shows a failed run
            return self.work, self.split.select
        rng, groups = np.random.default_rng(self.plan.gate.seed), self.inputs.images.groups
        if groups is not None:
            is_watched = watched(groups[self.split.fit], rng)
            return self.split.fit[~is_watched], self.split.fit[is_watched]
        order = rng.permutation(self.split.fit)
        n_monitor = max(1, len(order) // 5)
        return np.sort(order[n_monitor:]), np.sort(order[:n_monitor])


def open_workbench(
    checkpoint: str | Path,
    data: str | Sequence[str],
    plan: Plan,
    fractions: tuple[float, float, float],
    track: Track = silent,
) -> Workbench:
    """Open a plan's checkpoint and data, and split the data into fit, select and test."""
    source, run, seed = plan.source, plan.run, plan.gate.seed
    mix, n_sources = plan.statistics.mix, 1 if isinstance(data, str) else len(data)
    words = f"--mix: {len(mix)} numbers for {n_sources} --data. Give at least two --data, and one "
    require(not mix or len(mix) == n_sources > 1, f"{words}number for each.", "mix")
    loaded, notes = _opened(checkpoint, plan)
    reference = open_reference(loaded, plan)
    inputs, split = _cut_inputs(loaded, data, plan, fractions)
    test, images = inputs, inputs.images
    notes += inputs.notes
    if reference is not None:
        notes += [f"reference: {note}" for note in reference.checkpoint.notes]
    if source.test is not None:
        of_test = replace(source, groups=groups_of_test(source.groups))
        test = open_inputs(loaded, source.test, of_test)
        found, n_dropped = unseen(test.images, images)
        split = replace(split, test=found)
        in_groups = ", or in one of its groups" if test.images.group_names else ""
        copies = f"{n_dropped} test images are in the data too{in_groups}"
        notes += [f"{copies}; they were left out of the test."] * bool(n_dropped)
    if n := split.duplicates:
        copies = f"left out: {count(n, 'images')} that copy others exactly, so that no image is in"
        notes.append(f"{copies} two splits.")
    notes += [f"{images.spec}: {note}." for note in images.notes]
    both = (images,) if test is inputs else (images, test.images)
    notes += [note for one in both for note in describe_groups(one)]
    groups, n = None if images.groups is None else images.groups[split.select], len(split.select)
    judged = plan.command != "export" and (images.labelled or reference is not None)
    if judged and n and (short := shortfall(n, groups)):
        advice = "Give more data, or a larger --select with its own --test."
        notes.append(f"the select split has {short}, so nothing can be chosen. {advice}")
    few = inputs.first_batch(seed)
    notes += _first_look(loaded, few, as_given=inputs.preprocessing is None)
    tested = ", also in the test" if judged and len(split.test) else ""
    notes += describe_corruption(source, tested)
    held = None if few is None else footprint(loaded.model, few, run.precision)
    size = evaluation_batch_size(run, loaded.model, inputs.size)
    evaluation = BatchSize(size, "--batch-size", notes, gives_way=run.batch_size is None)
    evaluation.foresee(held)
    return Workbench(
        plan=plan,
        loaded=loaded,
        inputs=inputs,
        test=test,
        split=split,
        assumptions=notes,
        track=track,
        evaluation=evaluation,
        footprint=held,
        reference=reference,
    )


def _cut_inputs(
    loaded: Loaded, data: str | Sequence[str], plan: Plan, fractions: tuple[float, float, float]
) -> tuple[Inputs, Split]:
    """Open and split the data, with any separate data to choose on."""
    chooser = plan.gate.select
    if isinstance(chooser, str):
        data = [*([data] if isinstance(data, str) else data), chooser]
    inputs = open_inputs(loaded, data, plan.source)
    images, split = inputs.images, cut(inputs.images, fractions, plan.gate.seed)
    if isinstance(images, SeveralImages) and isinstance(chooser, str):
        split, fractions = choosing(split, images), (1.0, 1.0, 0.0)
    for name, wanted in zip(("fit", "select"), fractions, strict=False):
        if wanted and split.sizes()[name] < 2:
            own = isinstance(chooser, str) and name == "select"
            more = "other images than --data to --select" if own else "more data"
            raise DataError(
                f"{images.spec}: {split.sizes()[name]} of {count(len(images), 'images')} for the "
                f"{name} split, expected at least 2. Give {more}."
            )
    return inputs, split


def _opened(checkpoint: str | Path, plan: Plan) -> tuple[Loaded, list[str]]:
    """The checkpoint and notes on it; it can lack the domain that calibrate writes."""
    name = plan.new_domain
    recipe = plan.model if name is None else replace(plan.model, domain=None)
    lenders = () if plan.average is None else plan.average.files
    loaded = load_one(checkpoint, recipe, plan.run, lenders=lenders)
    file = loaded.checkpoint
    notes = [*file.notes, *([] if not name else begin_domain_(loaded.model, loaded.domains, name))]
    check_room(file.metadata, file.path)
    if plan.model.like_input:
        check_copyable(file)
        copy = f"the output is a copy of {file.path.name} with new weights (--like-input)"
        notes.append(f"{copy}, so no example weights are tried.")
    return loaded, notes


def open_reference(loaded: Loaded, plan: Plan) -> Loaded | None:
    """The network that a checkpoint was made from; refused if its tensors differ in shape."""
    path, spec = plan.statistics.reference, plan.statistics.reference_model
    if path is None:
        return None
    made = f"For --reference, give the network that {loaded.checkpoint.path.name} was made from."
    arguments = () if spec else tuple(loaded.origin.arguments.items())
    # The place of the tensors in the damaged file says nothing about this file.
    own: Any = {"key": None, "prefix": None, "domain": None, "model": spec or loaded.origin.spec}
    recipe = replace(plan.model, arguments=arguments, **own)
    try:
        reference = load_one(path, recipe, plan.run)
    except CheckpointError as error:
        raise CheckpointError(f"{error} {made}", path=Path(path)) from error
    own, theirs = stock_shapes(loaded.model), stock_shapes(reference.model)
    misfits = misfits_of(own, {n: torch.empty(s, device="meta") for n, s in theirs.items()})
    if misfits:
        n = count(len(misfits), "problems")
        problem = f"is another network than the checkpoint, {n}: {misfits}."
        raise file_error(Path(path), f"{problem} {made}")
    return reference


def _first_look(loaded: Loaded, batch: Batch | None, *, as_given: bool) -> list[str]:
    """Notes on a few images that look odd, before any work."""
    if batch is None:
        return []
    spec = loaded.origin.spec
    known = None if spec is None or as_given else default_preprocessing(spec)
    size = known and look_at_size(tuple(batch.x.shape), known[0].crop)
    return [text for text in (size, look_at_inputs(loaded.model, batch, as_given=as_given)) if text]


def load_one(
    checkpoint: str | Path,
    recipe: ModelRecipe,
    run: RunOptions,
    *,
    mapped: bool = False,
    lenders: Sequence[str] = (),
    exported: bool = False,
) -> Loaded:
    """Load a checkpoint, or an exported network if allowed, onto the device."""
    device = runtime.resolve_device(run.device)
    if exported and is_exported(checkpoint):
        loaded = load_exported(checkpoint, trust_code=recipe.trust_code)
    else:
        loaded = load_ready(checkpoint, recipe, mapped=mapped, lenders=lenders)
    if recipe.forward is not None:
        runtime.set_forward_(loaded.model, import_forward(recipe.forward))
    if recipe.logits_output is not None:
        runtime.set_output_(loaded.model, recipe.logits_output)
    if any(t.dtype in (torch.float16, torch.bfloat16) for t in loaded.model.state_dict().values()):
        # Half-precision models run in float32; saving restores each tensor's type.
        loaded.model.float()
    loaded.model.to(device)
    return loaded


def finished(
    loaded: Loaded,
    report: Report,
    *,
    results: dict[str, Any],
    data: dict[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> Result:
    """A command's result; the entry in the output's history matches the report."""
    report = replace(report, versions=versions())
    entry = history_entry(
        report.command,
        options=report.options,
        seed=report.seed,
        checkpoint=loaded.checkpoint,
        data=data,
        results=results,
        command_line=report.command_line,
    )
    return Result(loaded.model, report, entry, preprocessing)
