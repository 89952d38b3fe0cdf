"""`finetune_`: a short training run of norms, head or all, best epoch kept."""

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

_START = 0.05  # least example weight to learn from, as in `WeightRecipe.start`


@dataclass(frozen=True)
class TrainingPoint:
    """The state at the end of an epoch; epoch 0 is before any step."""

    epoch: int
    step: int
    loss: float | None  # mean of training; None at epoch 0, or where no step was taken
    nll: float  # on the monitor batches, in evaluation; with a reference the divergence from it
    top1: float  # with a reference the agreement with it


@dataclass(frozen=True)
class Finetuning:
    """What `finetune_` did."""

    trained: str
    n_parameters: int  # numbers that were free, example weights included
    curve: tuple[TrainingPoint, ...]
    best_epoch: int  # that was kept; 0 means the model is as it was
    n_steps: int
    #: Not finite, or, with batch statistics, a single example.
    n_skipped_steps: int
    seconds: float
    #: Buffers and attributes that training changed, but for norm layers and torch's own modules.
    changed_by_forward: tuple[str, ...] = ()
    #: Layers that the user froze, whose statistics were left alone by training with batch ones.
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

    The loss is the task's, for labels cross-entropy, or, with a reference O and without labels, the
    mean divergence from O's predictions, KL(p_O || p) = sum_k p_O,k (log p_O,k - log p_k).

    With ``statistics="frozen"`` the norm layers stay in evaluation, and their statistics and
    example weights are part of what is tuned. With ``"train"`` they normalize by batch (or ghost)
    statistics; the running moments follow as in any training, and should be recalibrated after.

    Args:
        model: on the device to run on. What is trained is trained whatever its ``requires_grad``.
        batches: labelled ``(x, y)``, or a callable that gives those of the k-th epoch.
        epochs: overrides the recipe's epochs and steps.
        monitor: labelled batches that decide which epoch is kept; by default every fifth of
            ``batches``, which are then read into a list.
        task: what is learned and the epochs are judged by, as in `evaluate`.
        reference: the network O to learn from in place of labels, which are then not read. It is
            run in evaluation, on its own device, and left as found.
        recipe: what is trained and how; label smoothing is for labels only.
        weighable: layers whose example weight is learned with ``example_weight="learn"``, by name;
            by default all generalized layers with running statistics that are not frozen and have
            more than one position a map.
        forward: called as ``forward(model, batch)`` for unusual batches.
        seed: of dropout and other torch randomness, that of the batches included.
        after_epoch: called with the model before each evaluation, for example to recalibrate.
        state: folder for the state of the run, written after every epoch and on an interrupt. A
            run that finds its state there goes on from it, to the same numbers, bit for bit on a
            CPU with as many threads.
        identity: what else tells this run from others, such as a fingerprint of the data; model,
            recipe and seed always do.
        precision: of the forward and backward passes, ``fp32`` or ``bf16`` (autocast); evaluation
            is in fp32.
        include_frozen: also train the statistics of layers that are frozen by their modes (as
            `recalibrate_` has it); ``statistics="train"`` leaves them alone otherwise.

    Returns:
        The curve and what was kept.

    Raises:
        ConfigError: if weights are to be learned while statistics are trained, the precision is
            fp16, in which gradients underflow, or the reference would be trained too.
        NormError: if there is no layer to learn weights of, or to set the ghost size of.
        ModelError: if there is nothing to train, or the reference has other classes.
        NumericError: if the loss stays not finite; the model is then as it was.
        DataError: if there are no labelled batches.
        CheckpointError: if the folder holds the state of another run, or cannot be written to.

    Changes:
        The trained parameters; with ``"train"`` also running moments; with ``"learn"`` also
        example weights. With 0 epochs, if no epoch is better, or after an exception: nothing.
    Restores:
        Modes, ``requires_grad``, gradients, ghost sizes, momenta, random state; after every epoch
        what forward changes by itself, other than in norm layers and torch's own modules.
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
        # Only what is unusual, so that states of earlier versions are still known.
        settings |= {"precision": precision} if precision != "fp32" else {}
        settings |= {"include_frozen": True} if include_frozen else {}
        settings |= {"reference": identity_of(reference, {})} if reference is not None else {}
        folder = None if state is None else StateFolder(state, identity_of(model, settings))
        # The first rank's file holds for all: what is trained is the same on every rank.
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
    only = "--example-weight learn: weights act in evaluation only, so they cannot be learned with"
    ok = recipe.example_weight != "learn" or recipe.statistics != "train"
    require(ok, f"{only} --statistics train. Use --statistics frozen.", "example_weight")
    message = "--precision fp16: gradients underflow in it. Use bf16, or fp32."
    require(precision != "fp16", message, "precision")


def _refuse_trained(reference: nn.Module | None, trained: Iterable[Tensor]) -> None:
    own = {id(parameter) for parameter in trained}
    shared = reference is not None and any(id(p) in own for p in reference.parameters())
    message = "reference: it shares parameters with what is trained. Give a copy of its own."
    require(not shared, message, "reference")


class _Course:
    """The epochs so far, the best of them, and their state in a folder, if there is one."""

    def __init__(
        self,
        how: Setting,
        judged: Task | None,
        monitor: Iterable[Any],
        folder: StateFolder | None,
    ) -> None:
        self._model, self._folder, self._judged = how.model, folder, judged
        self._evaluate = partial(score, how.model, monitor, judged, forward=how.forward)
        self.points: list[TrainingPoint] = []
        self.changed: dict[str, None] = {}
        self.before = self._best = guards.Snapshot(how.model)
        self.best_epoch = 0
        self._best_values: dict[str, Any] | None = None

    def task(self) -> Task:
        """What epochs are judged by; if it was to be read off, a resumed run does that here."""
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
        """Train from the start, or from a state found, to the end; leave the best epoch's model."""
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
        """Write the state, if there is a folder for it."""
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
        """Write the state when a pass over the batches is interrupted, but not within a step."""
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
                    f"interrupted; {self._folder.path} holds the state: the same command goes on "
                    "from it."
                ) from interrupt


def _learned(
    how: Setting, weighable: dict[str, GeneralizedBatchNorm] | None, monitor: Iterable[Any]
) -> dict[str, GeneralizedBatchNorm]:
    """The layers whose weights are learned; a batch is run to see which can be."""
    if how.recipe.example_weight != "learn":
        return {}
    if weighable is not None:
        return weighable
    found, _ = weighable_layers(how.model, monitor, how.forward)
    layers = {name: layer for name, layer in found.items() if not layer.frozen}
    if not layers:
        raise NormError(
            "--example-weight learn: no GeneralizedBatchNorm with statistics and more than one "
            "position a map. Call swap_norms_(model) first, or use --example-weight keep."
        )
    return layers


def _groups(how: Setting, batches: Iterable[Any]) -> list[dict[str, Any]]:
    """Parameter groups; a batch is run to see which layer is the head, where that matters."""
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
