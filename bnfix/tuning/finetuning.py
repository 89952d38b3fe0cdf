"""`finetune_`: a short training run of norms, head or all, best epoch kept."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from bnfix import guards, processes, runtime
from bnfix.checkpoints.resuming import (
    StateFolder,
    identity_of,
    interrupts_held,
    random_state,
    set_random_state_,
    set_values_,
    values_of,
)
from bnfix.errors import ConfigError, DataError, NormError, NumericError
from bnfix.layers.norms import (
    GeneralizedBatchNorm,
    generalized_norms,
    set_example_weight_,
    trainable_weights,
)
from bnfix.measuring.evaluation import score
from bnfix.recipe import FinetuneRecipe
from bnfix.tuning.parameters import head_of, parameter_groups
from bnfix.tuning.training import Run, n_steps_of, training_norms

_START = 0.05  # least example weight to learn from, as in `WeightRecipe.start`


@dataclass(frozen=True)
class TrainingPoint:
    """The state at the end of an epoch.

    Args:
        epoch: 0 is before any step.
        step: steps done.
        loss: mean training loss of the epoch; ``None`` at epoch 0, or where no step was taken.
        nll: on the monitor batches, in evaluation.
        top1: likewise.
    """

    epoch: int
    step: int
    loss: float | None
    nll: float
    top1: float


@dataclass(frozen=True)
class Finetuning:
    """What `finetune_` did.

    Args:
        trained: what was trained, in words.
        n_parameters: numbers that were free, example weights included.
        curve: monitor loss by epoch.
        best_epoch: the epoch that was kept; 0 means the model is as it was.
        n_steps: steps taken.
        n_skipped_steps: batches left out: loss or gradient not finite, or, with batch statistics,
            a single example.
        seconds: wall-clock time.
        changed_by_forward: buffers and attributes that training passes changed by themselves, other
            than those of norm layers and of torch's own modules; put back after every epoch.
    """

    trained: str
    n_parameters: int
    curve: tuple[TrainingPoint, ...]
    best_epoch: int
    n_steps: int
    n_skipped_steps: int
    seconds: float
    changed_by_forward: tuple[str, ...] = ()


def finetune_(
    model: nn.Module,
    batches: runtime.Batches,
    *,
    epochs: int | None = None,
    monitor: Iterable[Any] | None = None,
    recipe: FinetuneRecipe | None = None,
    weighable: dict[str, GeneralizedBatchNorm] | None = None,
    forward: runtime.Forward | None = None,
    seed: int = 0,
    after_epoch: Callable[[nn.Module], None] | None = None,
    state: str | Path | None = None,
    identity: str = "",
    precision: str = "fp32",
) -> Finetuning:
    """Train a part of the model for a few epochs; keep the epoch with the least monitor NLL.

    With ``statistics="frozen"`` the norm layers stay in evaluation, and their statistics and
    example weights are part of what is tuned. With ``"train"`` they normalize by batch (or ghost)
    statistics; the running moments follow as in any training, and should be recalibrated after.

    Args:
        model: on the device to run on. What is trained is trained whatever its ``requires_grad``.
        batches: labelled ``(x, y)``, or a callable that gives those of the k-th epoch.
        epochs: overrides the recipe's epochs and steps.
        monitor: labelled batches that decide which epoch is kept; by default every fifth of
            ``batches``, which are then read into a list.
        recipe: what is trained and how.
        weighable: layers whose example weight is learned with ``example_weight="learn"``, by name;
            by default all generalized layers with running statistics that are not frozen and have
            more than one position a map.
        forward: called as ``forward(model, batch)`` for unusual batches.
        seed: of dropout and other torch randomness, that of the batches included.
        after_epoch: called with the model before each evaluation, for example to recalibrate.
        state: folder for the state of the run, written after every epoch and, at the next step's
            end, on an interrupt. A run that finds its state there goes on from it, to the same
            numbers, bit for bit on a CPU with as many threads.
        identity: what else tells this run from others, such as a fingerprint of the data; model,
            recipe and seed always do.
        precision: of the forward and backward passes, ``fp32`` or ``bf16`` (autocast); evaluation
            is in fp32.

    Returns:
        The curve and what was kept.

    Raises:
        ConfigError: if weights are to be learned while statistics are trained, or the precision is
            fp16, in which gradients underflow.
        NormError: if there is no layer to learn weights of, or to set the ghost size of.
        ModelError: if there is nothing to train.
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
    if epochs is not None:
        recipe = replace(recipe, epochs=epochs, steps=None)
    learn = recipe.example_weight == "learn"
    if learn and recipe.statistics == "train":
        raise ConfigError(
            "--example-weight learn: weights act in evaluation only, so they cannot be learned "
            "with --statistics train. Use --statistics frozen."
        )
    if precision == "fp16":
        raise ConfigError(
            "--precision fp16: gradients underflow in it. Use bf16, or fp32.", name="precision"
        )
    started = time.perf_counter()
    with guards.seeded(seed):
        batches, monitor = runtime.hold_out(batches, monitor, every=5)
        groups, layers = _what(model, recipe, weighable, monitor, forward)
        run = Run(model, recipe, groups, n_steps_of(recipe, batches), forward, precision)
        settings = {"recipe": asdict(recipe), "seed": seed, "n_steps": run.n_steps, "of": identity}
        if precision != "fp32":
            settings["precision"] = precision
        folder = None if state is None else StateFolder(state, identity_of(model, settings))
        found = None
        if folder is not None:
            # The first rank's file holds for all: what is trained is the same on every rank.
            found = processes.together(folder.read if processes.here().is_first else _nothing)[0]
        before = guards.Snapshot(model)
        first = None if found else _point(model, monitor, forward, 0, 0, None)
        try:
            with (
                guards.modes_kept(model),
                training_norms(model, recipe),
                trainable_weights(layers, "channel", _START) as leaves,
                guards.only_these_require_grad(model, run.start(leaves)),
            ):
                course = _Course(model, run, before, first, folder)
                course.resume_(found)
                with course.saved_on_interrupt() as check:
                    while run.step < run.n_steps:
                        k = len(course.points) - 1
                        with guards.state_kept(model, but=run.follow) as changed:
                            loss = run.one_epoch(partial(runtime.pass_of, batches, k), check)
                        run.changed.update(dict.fromkeys(changed))
                        with run.averaged():
                            if after_epoch is not None:
                                after_epoch(model)
                            point = _point(model, monitor, forward, k + 1, run.step, loss)
                            course.add(point)
                        course.save()
                course.best.restore_()
        except BaseException:
            before.restore_()
            raise
    best_epoch = course.best_epoch
    if best_epoch:
        for name, layer in layers.items():
            set_example_weight_(layer, leaves[name])
    return Finetuning(
        trained=recipe.train + (" and example weights" if layers else ""),
        n_parameters=sum(p.numel() for p in run.parameters),
        curve=tuple(course.points),
        best_epoch=best_epoch,
        n_steps=run.n_taken,
        n_skipped_steps=run.n_skipped,
        seconds=time.perf_counter() - started,
        changed_by_forward=tuple(run.changed),
    )


def _nothing() -> None:
    """What a rank reads that leaves the file to the first one."""


class _Course:
    """The epochs so far, the best of them, and their state in a folder, if there is one."""

    def __init__(
        self,
        model: nn.Module,
        run: Run,
        before: guards.Snapshot,
        first: TrainingPoint | None,
        folder: StateFolder | None,
    ) -> None:
        self.model, self.run, self.folder = model, run, folder
        self.points = [] if first is None else [first]
        self.best, self.best_epoch = before, 0
        self._best_values: dict[str, Any] | None = None

    def add(self, point: TrainingPoint) -> None:
        """Note an epoch, and keep the model if it is the best so far."""
        self.points.append(point)
        if point.nll < self.points[self.best_epoch].nll:
            self.best, self.best_epoch = guards.Snapshot(self.model), point.epoch
            if self.folder is not None:
                self._best_values = values_of(self.model)

    def save(self, random: Any = None) -> None:
        """Write the state, if there is a folder for it."""
        if self.folder is not None and processes.here().is_first:
            self.folder.write({
                "model": values_of(self.model),
                "run": self.run.state(),
                "points": [list(astuple(point)) for point in self.points],
                "best": [self.best_epoch, self._best_values],
                "random": random_state() if random is None else random,
            })  # fmt: skip

    def resume_(self, found: dict[str, Any] | None) -> None:
        """Go on from a state."""
        if found is None or self.folder is None:
            return
        try:
            self.points = [TrainingPoint(*point) for point in found["points"]]
            self.best_epoch, self._best_values = found["best"]
            if self._best_values is not None:
                set_values_(self.model, self._best_values)
                self.best = guards.Snapshot(self.model)
            set_values_(self.model, found["model"])
            self.run.set_state_(found["run"])
            set_random_state_(found["random"])
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError, AttributeError) as error:
            raise self.folder.damaged(error) from error

    @contextmanager
    def saved_on_interrupt(self) -> Iterator[Callable[[], None] | None]:
        """Write the state when a pass over the batches is interrupted, but not within a step."""
        if self.folder is None:
            yield None
            return
        with interrupts_held() as check:
            try:
                yield check
            except KeyboardInterrupt as interrupt:
                epoch = self.run.epoch
                if self.run.busy or epoch is None:
                    raise
                self.save(epoch["random"])
                raise KeyboardInterrupt(
                    f"interrupted; {self.folder.path} holds the state: the same command goes on "
                    "from it."
                ) from interrupt


def _what(
    model: nn.Module,
    recipe: FinetuneRecipe,
    weighable: dict[str, GeneralizedBatchNorm] | None,
    monitor: Iterable[Any],
    forward: runtime.Forward | None,
) -> tuple[list[dict[str, Any]], dict[str, GeneralizedBatchNorm]]:
    """Parameter groups, and the layers whose weights are learned; a batch may be run to see."""
    learn = recipe.example_weight == "learn" and weighable is None
    n_classes, linear, positions = 0, list[nn.Module](), dict[int, int]()
    if learn or "head" in recipe.train:
        n_classes, linear, positions = _look(model, monitor, forward)
    groups = parameter_groups(
        model,
        lr=recipe.peak_lr,
        weight_decay=recipe.weight_decay,
        norm_decay=recipe.norm_decay,
        train=recipe.train,
        head=head_of(linear, n_classes) if "head" in recipe.train else None,
    )
    if not learn:
        return groups, (weighable or {}) if recipe.example_weight == "learn" else {}
    layers = {
        name: layer
        for name, layer in generalized_norms(model)
        if layer.running_mean is not None and not layer.frozen and positions.get(id(layer), 0) > 1
    }
    if not layers:
        raise NormError(
            "--example-weight learn: no GeneralizedBatchNorm with statistics and more than one "
            "position a map. Call swap_norms_(model) first, or use --example-weight keep."
        )
    return groups, layers


def _look(
    model: nn.Module, batches: Iterable[Any], forward: runtime.Forward | None
) -> tuple[int, list[nn.Module], dict[int, int]]:
    """Number of classes, linear layers in the order of their calls, positions at each norm."""
    modules = dict(model.named_modules())
    names = {id(module): name for name, module in modules.items()}

    def own() -> tuple[int, list[str], dict[str, int]] | None:
        linear: list[str] = []
        positions: dict[str, int] = {}

        def note(module: nn.Module, args: Any, output: Any) -> None:
            name = names[id(module)]
            if isinstance(module, GeneralizedBatchNorm):
                seen = output[0, 0].numel() if len(output) else 0
                positions[name] = min(seen, positions.get(name, seen))
            else:
                linear.append(name)

        batch = next(iter(batches), None)
        if batch is None:
            return None
        with guards.inference(model), guards.hooks() as handles:
            for module in modules.values():
                if isinstance(module, nn.Linear | nn.Conv2d | GeneralizedBatchNorm):
                    handles.append(module.register_forward_hook(note))
            output = runtime.run(model, batch, runtime.device_of(model), forward)
        logits = runtime.logits_of(output)
        # One logit an example was made two: the head has one output.
        made = all(tensor is not logits for tensor in runtime.tensors_in(output))
        return 1 if made else logits.shape[1], linear, positions

    # A rank may have no batch; the first that has one says what all of them use.
    found = next((found for found in processes.together(own) if found is not None), None)
    if found is None:
        raise DataError("fine-tuning: no examples. Give at least one batch.")
    n_classes, linear, positions = found
    return (
        n_classes,
        [modules[name] for name in linear],
        {id(modules[name]): n for name, n in positions.items()},
    )


def _point(
    model: nn.Module,
    monitor: Iterable[Any],
    forward: runtime.Forward | None,
    epoch: int,
    step: int,
    loss: float | None,
) -> TrainingPoint:
    try:
        found = score(model, monitor, forward=forward)
    except NumericError as error:
        if epoch == 0:
            raise
        raise NumericError(
            f"fine-tuning: after epoch {epoch} the outputs are not finite. Lower --lr."
        ) from error
    return TrainingPoint(epoch=epoch, step=step, loss=loss, nll=found.nll, top1=found.top1)
