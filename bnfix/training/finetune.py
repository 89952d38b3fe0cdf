"""`finetune_`: a short training run of norms, head or all parameters; the best epoch is kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bnfix.checkpoints.save import (
    StateFolder,
    identity_of,
    interrupts_held,
    random_state,
    set_random_state_,
    set_values_,
    values_of,
)
from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import NormError, NumericError
from bnfix.core.options import require
from bnfix.core.settings import FinetuneRecipe
from bnfix.metrics.evaluate import score
from bnfix.metrics.task import LABELS, Judged, Reference, Task, learned
from bnfix.metrics.tasks import judged_by
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.norm.mixture import trainable_weights
from bnfix.training.loop import Added, Run, Setting, followed, n_steps_of, training_norms
from bnfix.training.parameters import find_head, parameter_groups
from bnfix.weights.choose import weighable_layers

_START = 0.05  # smallest example weight to start learning from, as in `WeightRecipe.start`


@dataclass(frozen=True)
class TrainingPoint:
    """The losses at the end of an epoch; epoch 0 is before any step."""

    epoch: int
    step: int
    loss: float | None  # mean training loss; None at epoch 0, or if no step was taken
    nll: float  # on the monitor batches, in evaluation; with a reference, the divergence from it
    top1: float  # with a reference, the agreement with it


@dataclass(frozen=True)
class Finetuning:
    """The record of a `finetune_` call."""

    trained: str
    n_parameters: int  # trained numbers, including example weights
    curve: tuple[TrainingPoint, ...]
    best_epoch: int  # the epoch that was kept; 0 means that the model is unchanged
    n_steps: int
    #: Steps that were not finite or, with batch statistics, had a single example.
    n_skipped_steps: int
    seconds: float
    #: Buffers and attributes that training changed, except in norm layers and torch's own modules.
    changed_by_forward: tuple[str, ...] = ()
    #: Layers that the user froze, whose statistics were not trained.
    frozen: tuple[str, ...] = ()


def finetune_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    epochs: int | None = None,
    monitor: Iterable[Any] | None = None,
    task: Judged = "auto",
    reference: nn.Module | None = None,
    recipe: FinetuneRecipe | None = None,
    weighable: dict[str, GeneralizedBatchNorm] | None = None,
    forward: runtime.Forward | None = None,
    seed: int = 0,
    after_epoch: Callable[[nn.Module], None] | None = None,
    state: str | Path | None = None,
    identity: str = "",
    precision: str = "fp32",
    include_frozen: bool = False,
) -> Finetuning:
    """Train a part of the model for a few epochs; keep the epoch with the least monitor loss.

    The loss is the task's: for class labels, cross-entropy. With a reference O there are no labels;
    the loss is the mean divergence KL(p_O || p) = sum_k p_O,k (log p_O,k - log p_k), in nats.

    With ``statistics="frozen"`` the norm layers stay in evaluation mode, with their running
    statistics and example weights in effect. With ``"train"`` they normalize by batch (or ghost)
    statistics, and running statistics follow as in any training: recalibrate afterwards.

    Args:
        model: on the device to run on; its ``requires_grad`` flags do not limit the training.
        batches: labelled ``(x, y)``, or a callable that returns the batches of the k-th epoch.
        epochs: number of epochs; overrides the recipe's epochs and steps.
        monitor: labelled batches that decide which epoch is kept; by default every fifth of
            ``batches``, which are then read into a list.
        task: the task to learn and to judge epochs by, as in `evaluate`.
        reference: a network O to learn from instead of labels, which are then not read. It runs in
            evaluation mode on its own device, and stays unchanged.
        recipe: what to train and how; label smoothing applies to labels only.
        weighable: for ``example_weight="learn"``: the layers whose weight is learned, by name. The
            default is every generalized layer with running statistics that is not frozen and whose
            feature maps have more than one position.
        forward: called as ``forward(model, batch)``, for batches in an unusual form.
        seed: seed of all torch randomness, such as dropout and the batches' own.
        after_epoch: called with the model before each evaluation, for example to recalibrate.
        state: folder for the state of the run, written after every epoch and on an interrupt. A
            later run continues from its own state to the same numbers: bit for bit on a CPU, with
            the same number of threads.
        identity: anything else that distinguishes this run, such as a fingerprint of the data;
            model, recipe and seed always count.
        precision: precision of the forward and backward passes, ``fp32`` or ``bf16`` (autocast);
            evaluation is in fp32.
        include_frozen: with ``statistics="train"``, also train the statistics of layers that are
            frozen by their modes (see `recalibrate_`); by default they are left alone.

    Returns:
        The curve of losses and the epoch that was kept.

    Raises:
        ConfigError: if weights are learned while statistics are trained, if the precision is fp16
            (gradients underflow), or if the reference shares trained parameters.
        NormError: if there is no layer whose weights can be learned or whose ghost size can be set.
        ModelError: if there is nothing to train, or if the reference has other classes.
        NumericError: if the loss is not finite in too many steps; the model is then unchanged.
        DataError: if there are no labelled batches.
        CheckpointError: if the folder holds the state of another run, or cannot be written to.

    Changes:
        The trained parameters; with ``"train"`` also running statistics; with ``"learn"`` also
        example weights. With 0 epochs, without a better epoch, or after an exception: nothing.
    Restores:
        Modes, ``requires_grad``, gradients, ghost sizes, momenta and random state; after every
        epoch also all state that forward changes outside norm layers and torch's own modules.
    """
    recipe = recipe or FinetuneRecipe()
    recipe = recipe if epochs is None else replace(recipe, epochs=epochs, steps=None)
    _check(recipe, precision)
    started = time.perf_counter()
    with guards.seeded(seed):
        batches, monitor = runtime.hold_out(batches, monitor, every=5)
        judged = judged_by(task) if reference is None else Reference(reference, forward)
        how = Setting(
            model, recipe, task=judged or LABELS, forward=forward, precision=precision,
            include_frozen=include_frozen, added=Added(model, recipe),
        )  # fmt: skip
        groups, layers = _groups(how, monitor), _learned(how, weighable, monitor)
        n_steps = n_steps_of(recipe, batches)
        settings = {"recipe": recipe.stated(), "seed": seed, "n_steps": n_steps, "of": identity}
        # Only unusual settings, so that the states of earlier versions remain valid.
        settings |= {"precision": precision} if precision != "fp32" else {}
        settings |= {"include_frozen": True} if include_frozen else {}
        settings |= {"reference": identity_of(reference, {})} if reference is not None else {}
        folder = None if state is None else StateFolder(state, identity_of(model, settings))
        # The first rank's file serves all ranks, because they train the same parameters.
        reads = folder is not None and distributed.here().is_first
        found = distributed.together(lambda: folder.read() if folder and reads else None)[0]
        course = _Course(how, judged, monitor, folder)
        try:
            if not found:
                course.add(0, 0, None)
            how = replace(how, task=learned(course.task(), recipe.label_smoothing))
            with (
                guards.modes_kept(model),
                training_norms(model, recipe),
                trainable_weights(layers, "channel", _START) as leaves,
                how.added.hooked(),
            ):
                run = Run(how, n_steps, groups, leaves.values())
                _refuse_trained(reference, run.parameters)
                with guards.only_these_require_grad(model, run.parameters):
                    course.go(run, found, batches, after_epoch)
        except BaseException:
            course.before.restore_()
            raise
    if course.best_epoch:
        for name, layer in layers.items():
            set_example_weight_(layer, leaves[name])
    weights = " and example weights" if layers else ""
    losses = ", by the model's own losses" if runtime.trains_by_itself(model) else ""
    return Finetuning(
        trained=f"{recipe.train}{weights}{losses}",
        n_parameters=sum(p.numel() for p in run.parameters),
        curve=tuple(course.points),
        best_epoch=course.best_epoch,
        n_steps=run.count.taken,
        n_skipped_steps=run.count.skipped,
        seconds=time.perf_counter() - started,
        changed_by_forward=tuple(course.changed),
        frozen=tuple(run.frozen),
    )


def _check(recipe: FinetuneRecipe, precision: str) -> None:
    only = "--example-weight learn: weights act only in evaluation, so they cannot be learned with"
    ok = recipe.example_weight != "learn" or recipe.statistics != "train"
    require(ok, f"{only} --statistics train. Use --statistics frozen.", "example_weight")
    message = "--precision fp16: gradients underflow. Use bf16 or fp32."
    require(precision != "fp16", message, "precision")


def _refuse_trained(reference: nn.Module | None, trained: Iterable[Tensor]) -> None:
    own = {id(parameter) for parameter in trained}
    shared = reference is not None and any(id(p) in own for p in reference.parameters())
    message = "reference: it shares parameters with the trained model. Give a separate copy."
    require(not shared, message, "reference")


class _Course:
    """The epochs so far, the best of them, and their saved state, if there is a folder."""

    def __init__(
        self, how: Setting, judged: Task | None, monitor: Iterable[Any], folder: StateFolder | None
    ) -> None:
        self._model, self._folder, self._judged = how.model, folder, judged
        self._evaluate = partial(score, how.model, monitor, judged, forward=how.forward)
        self.points: list[TrainingPoint] = []
        self.changed: dict[str, None] = {}
        self.before = self._best = guards.Snapshot(how.model)
        self.best_epoch = 0
        self._best_values: dict[str, Any] | None = None

    def task(self) -> Task:
        """The task that judges epochs; a resumed run infers an ``auto`` task here."""
        if self._judged is None:
            self._judged = self._evaluate().task
        return self._judged

    def go(
        self,
        run: Run,
        found: dict[str, Any] | None,
        batches: runtime.Batches,
        after_epoch: Callable[[nn.Module], None] | None,
    ) -> None:
        """Train to the end, from the start or a saved state; leave the model of the best epoch."""
        if found is not None:
            self._resume_(run, found)
        with self._saved_on_interrupt(run) as check:
            while run.count.step < run.n_steps:
                k = len(self.points) - 1
                with guards.state_kept(self._model, but=followed(self._model)) as changed:
                    loss = run.one_epoch(partial(runtime.pass_of, batches, k), check)
                self.changed.update(dict.fromkeys(changed))
                with run.averaged():
                    if after_epoch is not None:
                        after_epoch(self._model)
                    self.add(k + 1, run.count.step, loss)
                self._save(run)
        self._best.restore_()

    def add(self, epoch: int, step: int, loss: float | None) -> None:
        """Evaluate at the end of an epoch, and keep the model if it is the best so far."""
        try:
            now = self._evaluate()
        except NumericError as error:
            if epoch == 0:
                raise
            raise NumericError(
                f"fine-tuning: after epoch {epoch} the outputs are not finite. Lower --lr."
            ) from error
        self._judged = now.task
        self.points.append(
            TrainingPoint(epoch=epoch, step=step, loss=loss, nll=now.nll, top1=now.top1)
        )
        if now.nll < self.points[self.best_epoch].nll:
            self._best, self.best_epoch = guards.Snapshot(self._model), epoch
            if self._folder is not None:
                self._best_values = values_of(self._model)

    def _save(self, run: Run, random: Any = None) -> None:
        """Write the state if there is a folder for it."""
        if self._folder is not None and distributed.here().is_first:
            self._folder.write({
                "model": values_of(self._model),
                "run": run.state(),
                "points": [list(astuple(point)) for point in self.points],
                "best": [self.best_epoch, self._best_values],
                "random": random_state() if random is None else random,
            })  # fmt: skip

    def _resume_(self, run: Run, found: dict[str, Any]) -> None:
        try:
            self.points = [TrainingPoint(*point) for point in found["points"]]
            self.best_epoch, self._best_values = found["best"]
            if self._best_values is not None:
                set_values_(self._model, self._best_values)
                self._best = guards.Snapshot(self._model)
            set_values_(self._model, found["model"])
            run.set_state_(found["run"])
            set_random_state_(found["random"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            if self._folder is None:
                raise
            raise self._folder.damaged(error) from error

    @contextmanager
    def _saved_on_interrupt(self, run: Run) -> Iterator[Callable[[], None] | None]:
        """Write the state if a pass over the batches is interrupted between steps."""
        if self._folder is None:
            yield None
            return
        with interrupts_held() as check:
            try:
                yield check
            except KeyboardInterrupt as interrupt:
                if run.busy or run.epoch is None:
                    raise
                self._save(run, run.epoch["random"])
                raise KeyboardInterrupt(
                    f"interrupted; {self._folder.path} holds the state. Run the same command again "
                    "to continue."
                ) from interrupt


def _learned(
    how: Setting, weighable: dict[str, GeneralizedBatchNorm] | None, monitor: Iterable[Any]
) -> dict[str, GeneralizedBatchNorm]:
    """The layers whose weights are learned; one batch is run to find them."""
    if how.recipe.example_weight != "learn":
        return {}
    if weighable is not None:
        return weighable
    found, _ = weighable_layers(how.model, monitor, how.forward)
    layers = {name: layer for name, layer in found.items() if not layer.frozen}
    if not layers:
        raise NormError(
            "--example-weight learn: no GeneralizedBatchNorm with statistics and more than one "
            "position per map. Call swap_norms_(model) first, or use --example-weight keep."
        )
    return layers


def _groups(how: Setting, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups; if the head is trained, one batch is run to find it."""
    model, recipe, head = how.model, how.recipe, None
    if "head" in recipe.train:
        head = find_head("fine-tuning", model, batches, how.forward)
    return parameter_groups(
        model,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        norm_decay=recipe.norm_decays.get("other", 0.0),
        train=recipe.train,
        head=head,
    )
