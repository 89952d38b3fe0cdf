"""`finetune_`: a short training run of norms, head or all, best epoch kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import guards, runtime
from bnfix.errors import ConfigError, DataError, ModelError, NumericError
from bnfix.evaluation import evaluate
from bnfix.norms import GeneralizedBatchNorm, set_example_weight_, trainable_weights
from bnfix.recipe import FinetuneRecipe
from bnfix.surgery import find_norms

_MOST_BAD_STEPS = 10


@dataclass(frozen=True)
class TrainingPoint:
    """The state at the end of an epoch.

    Args:
        epoch: 0 is before any step.
        step: steps done.
        loss: mean training loss of the epoch; ``None`` at epoch 0.
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
        n_skipped_steps: steps left out because the loss or the gradient was not finite.
        seconds: wall-clock time.
    """

    trained: str
    n_parameters: int
    curve: tuple[TrainingPoint, ...]
    best_epoch: int
    n_steps: int
    n_skipped_steps: int
    seconds: float


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
) -> Finetuning:
    """Train a part of the model for a few epochs; keep the epoch with the least monitor NLL.

    With ``statistics="frozen"`` the norm layers stay in evaluation, and their statistics and
    example weights are part of what is tuned. With ``"train"`` they normalize by batch (or ghost)
    statistics; the running moments follow as in any training, and should be recalibrated after.

    Args:
        model: on the device to run on.
        batches: labelled ``(x, y)``, or a callable that gives those of the k-th epoch.
        epochs: overrides the recipe's.
        monitor: labelled batches that decide which epoch is kept; by default every fifth of
            ``batches``, which are then read into a list.
        recipe: what is trained and how.
        weighable: layers whose example weight is learned with ``example_weight="learn"``; by
            default all generalized layers with running statistics.
        forward: called as ``forward(model, batch)`` for unusual batches.
        seed: of dropout and other torch randomness.
        after_epoch: called with the model before each evaluation, for example to recalibrate.

    Returns:
        The curve and what was kept.

    Raises:
        ConfigError: if weights are to be learned while statistics are trained.
        ModelError: if there is nothing to train.
        NumericError: if the loss stays not finite; the model is then as it was.
        DataError: if there are no labelled batches.

    Changes:
        The trained parameters; with ``"train"`` also running moments; with ``"learn"`` also
        example weights. With 0 epochs nothing at all. After an exception: nothing.
    Restores:
        Modes, ``requires_grad``, gradients, random state.
    """
    recipe = recipe or FinetuneRecipe()
    epochs = recipe.epochs if epochs is None else epochs
    learn = recipe.example_weight == "learn"
    if learn and recipe.statistics == "train":
        raise ConfigError(
            "--example-weight learn: weights act in evaluation only, so they cannot be learned "
            "with --statistics train. Use --statistics frozen."
        )
    started = time.perf_counter()
    batches, monitor = runtime.hold_out(batches, monitor, every=5)
    norm_parameters, other_parameters = _trained(model, recipe.train, monitor, forward)
    layers = _weighable(model, weighable) if learn else {}
    n_batches = sum(1 for _ in runtime.pass_of(batches, 0))
    n_steps = epochs * n_batches if recipe.steps is None else recipe.steps
    before = guards.Snapshot(model)
    run = _Run(model, recipe, norm_parameters, other_parameters, n_steps, forward)
    points = [_point(model, monitor, forward, 0, 0, None)]
    best, best_nll, best_epoch = before, points[0].nll, 0
    weights: dict[str, Tensor] = {}
    try:
        with (
            guards.modes_kept(model),
            guards.seeded(seed),
            trainable_weights(layers, "channel", 0.05) as leaves,
            guards.only_these_require_grad(
                model, [*norm_parameters, *other_parameters, *leaves.values()]
            ),
        ):
            run.start(list(leaves.values()))
            epoch = 0
            while run.step < n_steps:
                run.set_modes()
                loss = run.one_epoch(runtime.pass_of(batches, epoch), n_steps)
                epoch += 1
                if after_epoch is not None:
                    after_epoch(model)
                points.append(_point(model, monitor, forward, epoch, run.step, loss))
                if points[-1].nll < best_nll:
                    best, best_nll, best_epoch = guards.Snapshot(model), points[-1].nll, epoch
                    weights = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    except BaseException:
        before.restore_()
        raise
    _keep(model, before, best, weights)
    n_free = sum(t.numel() for t in (*norm_parameters, *other_parameters, *run.leaves))
    return Finetuning(
        recipe.train + (" and example weights" if learn else ""),
        n_free,
        tuple(points),
        best_epoch,
        run.step,
        run.n_skipped,
        time.perf_counter() - started,
    )


def _keep(
    model: nn.Module, before: guards.Snapshot, best: guards.Snapshot, weights: dict[str, Tensor]
) -> None:
    """Leave the model in its best state, with its own buffers in place again."""
    best.restore_()
    if weights:
        for name, weight in weights.items():
            layer = model.get_submodule(name)
            layer._buffers["example_weight"] = weight
            set_example_weight_(layer, weight)


class _Run:
    """Optimizer, schedule and the loop over one epoch."""

    def __init__(
        self,
        model: nn.Module,
        recipe: FinetuneRecipe,
        norm_parameters: Sequence[Tensor],
        other_parameters: Sequence[Tensor],
        n_steps: int,
        forward: runtime.Forward | None,
    ) -> None:
        self.model, self.recipe, self.forward = model, recipe, forward
        self.norm_parameters, self.other_parameters = norm_parameters, other_parameters
        self.sites = find_norms(model)
        self.gammas = {id(site.module.weight) for site in self.sites}
        self.n_steps = n_steps
        self.step = self.n_skipped = self._bad_in_a_row = 0
        self.leaves: list[Tensor] = []
        self.device = runtime.device_of(model)

    def start(self, leaves: list[Tensor]) -> None:
        recipe = self.recipe
        self.leaves = leaves
        groups = [
            {"params": list(self.norm_parameters), "lr": recipe.lr, "weight_decay": 0.0},
            {
                "params": list(self.other_parameters),
                "lr": recipe.lr,
                "weight_decay": recipe.weight_decay,
            },
            {"params": leaves, "lr": recipe.weight_lr, "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=recipe.lr, momentum=0.9, nesterov=True
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._rate)

    def _rate(self, step: int) -> float:
        """Linear warm-up, then cosine to 0; a factor of the peak rate."""
        warmup = round(self.recipe.warmup * self.n_steps)
        if step < warmup:
            return (step + 1) / (warmup + 1)
        done = (step - warmup) / max(1, self.n_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    def set_modes(self) -> None:
        self.model.train()
        for site in self.sites:
            if self.recipe.statistics == "frozen" or site.frozen:
                site.module.training = False
            elif self.recipe.ghost_size and isinstance(site.module, GeneralizedBatchNorm):
                site.module.ghost_size = self.recipe.ghost_size

    def one_epoch(self, batches: Iterable[Any], n_steps: int) -> float:
        total, n = 0.0, 0
        for batch in batches:
            if self.step >= n_steps:
                break
            x, labels = runtime.unpack(batch)
            if labels is None:
                raise DataError("fine-tuning: the batches have no labels to learn from.")
            too_small = isinstance(x, Tensor) and len(x) < 2
            self.step += 1
            if too_small and self.recipe.statistics == "train":
                self.schedule.step()  # one example has no batch statistics
                continue
            self.optimizer.zero_grad()
            output = runtime.run(self.model, batch, self.device, self.forward)
            loss = F.cross_entropy(
                runtime.logits_of(output).float(),
                torch.as_tensor(labels).to(self.device),
                label_smoothing=self.recipe.label_smoothing,
            )
            loss.backward()  # type: ignore[no-untyped-call]
            if self._take_step(loss):
                total, n = total + float(loss.detach()), n + 1
            self.schedule.step()
        return total / n if n else float("nan")

    def _take_step(self, loss: Tensor) -> bool:
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        limit = self.recipe.clip if self.recipe.clip is not None else math.inf
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        if not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm))):
            self.n_skipped += 1
            self._bad_in_a_row += 1
            if self._bad_in_a_row >= _MOST_BAD_STEPS:
                raise NumericError(
                    f"fine-tuning: the loss was not finite in {_MOST_BAD_STEPS} steps in a row. "
                    "Lower --lr, or look at the data."
                )
            return False
        self._bad_in_a_row = 0
        rates = [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.step()
        self._decay_norms(rates[0] if self.norm_parameters else 0.0)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.clamp_(0, 1)
        return True

    @torch.no_grad()
    def _decay_norms(self, rate: float) -> None:
        """Decoupled: gamma - t <- (gamma - t)(1 - rate norm_decay), t 1 or 0; beta toward 0."""
        if self.recipe.norm_decay_target == "none" or not self.recipe.norm_decay:
            return
        keep = 1 - rate * self.recipe.norm_decay
        for p in self.norm_parameters:
            identity = self.recipe.norm_decay_target == "identity" and id(p) in self.gammas
            target = 1.0 if identity else 0.0
            p.sub_(target).mul_(keep).add_(target)


def _trained(
    model: nn.Module, what: str, monitor: Iterable[Any], forward: runtime.Forward | None
) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters to train: those of norm layers, and the others."""
    norms: dict[int, Tensor] = {}
    for site in find_norms(model):
        for p in site.module.parameters(recurse=False):
            norms[id(p)] = p
    if what == "norms":
        others: list[Tensor] = []
    elif what == "all":
        others = [p for p in model.parameters() if id(p) not in norms]
    else:
        others = list(_head(model, monitor, forward).parameters())
    wanted = list(norms.values()) if what != "head" else []
    if not wanted and not others:
        raise ModelError(f"--train {what}: the model has no such parameters. Use --train all.")
    return wanted, others


def _head(model: nn.Module, monitor: Iterable[Any], forward: runtime.Forward | None) -> nn.Module:
    """The last linear layer, or 1x1 convolution, whose outputs are as many as the logits."""
    batch = next(iter(monitor), None)
    if batch is None:
        raise DataError("fine-tuning: no examples. Give at least one batch.")
    with guards.inference(model):
        device = runtime.device_of(model)
        n_classes = runtime.logits_of(runtime.run(model, batch, device, forward)).shape[1]
    heads = [
        module
        for module in model.modules()
        if (isinstance(module, nn.Linear) and module.out_features == n_classes)
        or (isinstance(module, nn.Conv2d) and module.out_channels == n_classes)
    ]
    if not heads:
        raise ModelError(
            f"--train head: no linear layer with {n_classes} outputs, as many as the logits. Use "
            "--train norms or all."
        )
    return heads[-1]


def _weighable(
    model: nn.Module, given: dict[str, GeneralizedBatchNorm] | None
) -> dict[str, GeneralizedBatchNorm]:
    if given is not None:
        return given
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, GeneralizedBatchNorm) and module.running_mean is not None
    }


def _point(
    model: nn.Module,
    monitor: Iterable[Any],
    forward: runtime.Forward | None,
    epoch: int,
    step: int,
    loss: float | None,
) -> TrainingPoint:
    metrics = evaluate(model, monitor, forward=forward)
    if metrics.nll is None or metrics.top1 is None:
        raise DataError("fine-tuning: the monitor batches have no labels.")
    return TrainingPoint(epoch, step, loss, metrics.nll, metrics.top1)
