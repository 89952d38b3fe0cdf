"""`finetune_`: a short training run of norms, head or all, best epoch kept.

Its two parts serve any other training loop as well: `parameter_groups` and `decay_norms_`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bnfix import guards, runtime
from bnfix.errors import ConfigError, DataError, ModelError, NormError, NumericError, some
from bnfix.evaluation import labels_of, score
from bnfix.norms import (
    GeneralizedBatchNorm,
    generalized_norms,
    set_example_weight_,
    trainable_weights,
)
from bnfix.recipe import FinetuneRecipe
from bnfix.sites import find_norms

_MOST_BAD_STEPS = 10
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
    """

    trained: str
    n_parameters: int
    curve: tuple[TrainingPoint, ...]
    best_epoch: int
    n_steps: int
    n_skipped_steps: int
    seconds: float


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    norm_decay: float = 0.0,
    train: str = "all",
    head: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters to train into groups for any torch optimizer.

    Gamma and beta of the norm layers are the group named ``norms``, with ``weight_decay`` 0: torch
    decays toward 0 only, so theirs is a step of its own, `decay_norms_`, for which the group
    carries ``norm_decay``. The group named ``others`` is the rest. Frozen norm layers are in none,
    tied parameters are in one once, and a group without parameters is left out.

    Args:
        model: any module; ``requires_grad`` is neither looked at nor set.
        lr: learning rate of both groups.
        weight_decay: of the others.
        norm_decay: noted in the norms' group, as ``norm_decay``; no optimizer acts on it.
        train: ``norms``, ``head``, ``norms+head`` or ``all``.
        head: what ``head`` means; by default the last linear layer or 1x1 convolution defined.

    Returns:
        One or two groups, the norms first.

    Raises:
        ConfigError: if ``train`` is not known.
        ModelError: if there is nothing to train, or no head.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(net, lr=0.01, weight_decay=0.1, norm_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> optimizer.step()
        >>> decay_norms_(net, optimizer.param_groups[0]["lr"], 0.1, "identity")
    """
    if train not in ("norms", "head", "norms+head", "all"):
        raise ConfigError(
            f"--train: {train!r} is not known. Use one of: norms, head, norms+head, all.",
            name="train",
        )
    sites = find_norms(model)
    own = {id(p): (p, s) for s in sites for p in s.module.parameters(recurse=False)}
    norms = [p for p, site in own.values() if not site.frozen] if train != "head" else []
    if train == "all":
        others = [p for p in model.parameters() if id(p) not in own]
    elif train == "norms":
        others = []
    else:
        others = list((head or _head(list(model.modules()), None)).parameters())
    if not norms and not others:
        raise ModelError(f"--train {train}: the model has no such parameters. Use --train all.")
    groups: list[dict[str, Any]] = [
        {
            "name": "norms",
            "params": norms,
            "lr": lr,
            "weight_decay": 0.0,
            "norm_decay": norm_decay,
        },
        {"name": "others", "params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def decay_norms_(
    model: nn.Module | Iterable[nn.Module],
    rate: float,
    norm_decay: float,
    target: str = "identity",
) -> None:
    """Decay gamma and beta of the norm layers by one decoupled step; call it after the optimizer's.

    gamma <- t + (gamma - t)(1 - rate w), t = 1 for ``identity`` and 0 for ``zero``, w the decay;
    beta <- beta (1 - rate w). Over steps s: gamma_T - t = (gamma_0 - t) prod_s (1 - rate_s w).

    Args:
        model: its norm layers but the frozen ones; or an iterable of just the layers to decay.
        rate: the learning rate of the step.
        norm_decay: w.
        target: ``identity``, ``zero``, or ``none``, which changes nothing.

    Raises:
        ConfigError: if the target is not known, or the step would go beyond it.

    Changes:
        ``weight`` and ``bias`` of the layers, tied ones once.

    Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization",
    ICLR 2020, section 3.4. Differs: decoupled from the gradient, as in AdamW.
    """
    if target not in ("none", "zero", "identity"):
        raise ConfigError(
            f"--norm-decay-target: {target!r} is not known. Use one of: none, zero, identity.",
            name="norm_decay_target",
        )
    if not 0 <= rate * norm_decay <= 1:
        raise ConfigError(
            f"--norm-decay: {norm_decay:g} at a rate of {rate:g} leads beyond its target. Expected "
            "a product from 0 to 1.",
            name="norm_decay",
        )
    if target == "none" or rate * norm_decay == 0:
        return
    done: set[int] = set()
    for layer in _norm_layers(model) if isinstance(model, nn.Module) else model:
        for p, goal in ((layer.weight, float(target == "identity")), (layer.bias, 0.0)):
            if isinstance(p, nn.Parameter) and id(p) not in done:
                done.add(id(p))
                p.sub_(goal).mul_(1 - rate * norm_decay).add_(goal)


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

    Returns:
        The curve and what was kept.

    Raises:
        ConfigError: if weights are to be learned while statistics are trained.
        NormError: if there is no layer to learn weights of, or to set the ghost size of.
        ModelError: if there is nothing to train.
        NumericError: if the loss stays not finite; the model is then as it was.
        DataError: if there are no labelled batches.

    Changes:
        The trained parameters; with ``"train"`` also running moments; with ``"learn"`` also
        example weights. With 0 epochs, if no epoch is better, or after an exception: nothing.
    Restores:
        Modes, ``requires_grad``, gradients, ghost sizes, random state.
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
    started = time.perf_counter()
    with guards.seeded(seed):
        batches, monitor = runtime.hold_out(batches, monitor, every=5)
        groups, layers = _what(model, recipe, weighable, monitor, forward)
        run = _Run(model, recipe, groups, _n_steps(recipe, batches), forward)
        before = guards.Snapshot(model)
        points = [_point(model, monitor, forward, 0, 0, None)]
        best, best_epoch = before, 0
        try:
            with (
                guards.modes_kept(model),
                _ghosts(model, recipe),
                trainable_weights(layers, "channel", _START) as leaves,
                guards.only_these_require_grad(model, run.start(leaves)),
            ):
                while run.step < run.n_steps:
                    loss = run.one_epoch(runtime.pass_of(batches, len(points) - 1))
                    if after_epoch is not None:
                        after_epoch(model)
                    points.append(_point(model, monitor, forward, len(points), run.step, loss))
                    if points[-1].nll < points[best_epoch].nll:
                        best, best_epoch = guards.Snapshot(model), points[-1].epoch
                best.restore_()
        except BaseException:
            before.restore_()
            raise
    if best_epoch:
        for name, layer in layers.items():
            set_example_weight_(layer, leaves[name])
    return Finetuning(
        recipe.train + (" and example weights" if layers else ""),
        sum(p.numel() for p in run.parameters),
        tuple(points),
        best_epoch,
        run.step - run.n_skipped,
        run.n_skipped,
        time.perf_counter() - started,
    )


class _Run:
    """Optimizer, rates and counters; the loop over one epoch."""

    def __init__(
        self,
        model: nn.Module,
        recipe: FinetuneRecipe,
        groups: list[dict[str, Any]],
        n_steps: int,
        forward: runtime.Forward | None,
    ) -> None:
        self.model, self.recipe, self.forward, self.n_steps = model, recipe, forward, n_steps
        self.groups, self.sites, self.norms = groups, find_norms(model), _norm_layers(model)
        self.step = self.n_skipped = self._bad_in_a_row = 0
        self.parameters: list[Tensor] = []
        self.leaves: list[Tensor] = []
        self.device = runtime.device_of(model)
        self._moments: list[tuple[Tensor, Tensor]] = []

    def start(self, leaves: Mapping[str, Tensor]) -> list[Tensor]:
        """Set the optimizer up; return all that it trains."""
        recipe, self.leaves = self.recipe, list(leaves.values())
        groups = self.groups
        if leaves:
            groups = [*groups, {"params": self.leaves, "lr": recipe.weight_lr, "weight_decay": 0.0}]
        self.parameters = [p for group in groups for p in group["params"]]
        self._peaks = [group["lr"] for group in groups]
        if recipe.optimizer == "sgd":
            self.optimizer: torch.optim.Optimizer = torch.optim.SGD(
                groups, lr=recipe.lr, momentum=0.9, nesterov=True
            )
        else:
            self.optimizer = torch.optim.AdamW(groups, lr=recipe.lr)
        if recipe.statistics == "train":
            buffers = [b for layer in self.norms for b in layer.buffers(recurse=False)]
            self._moments = [(buffer, buffer.clone()) for buffer in buffers]
        return self.parameters

    def one_epoch(self, batches: Iterable[Any]) -> float | None:
        """Train on the batches until they or the steps end; return the mean loss."""
        self.model.train()
        for site in self.sites:
            if self.recipe.statistics == "frozen" or site.frozen:
                site.module.training = False
        for buffer, saved in self._moments:
            saved.copy_(buffer)
        losses = []
        first = self.step
        for batch in batches:
            if self.step >= self.n_steps:
                break
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * self._rate()
            self.step += 1
            if self.recipe.statistics == "train" and _n_labels(batch) == 1:
                self.n_skipped += 1  # one example has no batch statistics
                continue
            loss = self._one_step(batch)
            if loss is not None:
                losses.append(loss)
        if self.step == first:
            raise DataError(
                "fine-tuning: a pass over the batches gave none. Give batches that can be gone "
                "through again, or a callable that gives those of the k-th epoch."
            )
        return sum(losses) / len(losses) if losses else None

    def _rate(self) -> float:
        """Linear warm-up, then cosine to 0; a factor of the peak rate."""
        warmup = round(self.recipe.warmup * self.n_steps)
        if self.step < warmup:
            return (self.step + 1) / (warmup + 1)
        done = (self.step - warmup) / max(1, self.n_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _one_step(self, batch: Any) -> float | None:
        """One step; its loss, or ``None`` if it was left out."""
        self.optimizer.zero_grad()
        logits = runtime.logits_of(runtime.run(self.model, batch, self.device, self.forward))
        labels = labels_of(batch, *logits.shape)
        if labels is None:
            raise DataError("fine-tuning: a batch has no labels to learn from. Give (x, y).")
        loss = F.cross_entropy(
            logits.float(),
            torch.from_numpy(labels).to(self.device),
            label_smoothing=self.recipe.label_smoothing,
        )
        if not loss.requires_grad:
            raise ModelError(
                f"--train {self.recipe.train}: the model's output has no gradient in what is "
                "trained. Look for no_grad or detach in the model, or use --train all."
            )
        loss.backward()  # type: ignore[no-untyped-call]
        limit = self.recipe.clip if self.recipe.clip is not None else math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        value = float(loss.detach())
        finite = math.isfinite(value) and math.isfinite(norm)
        for buffer, saved in self._moments:
            # The forward pass has moved the running moments already, by values that may be NaN.
            saved.copy_(buffer) if finite else buffer.copy_(saved)
        if not finite:
            self._leave_out()
            return None
        self._bad_in_a_row = 0
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            if group.get("name") == "norms":
                target = self.recipe.norm_decay_target
                decay_norms_(self.norms, group["lr"], group["norm_decay"], target)
        with torch.no_grad():
            for leaf in self.leaves:
                leaf.clamp_(0, 1)
        return value

    def _leave_out(self) -> None:
        self.n_skipped += 1
        self._bad_in_a_row += 1
        if self._bad_in_a_row >= _MOST_BAD_STEPS:
            raise NumericError(
                f"fine-tuning: loss or gradient was not finite in {_MOST_BAD_STEPS} steps in a "
                "row. Lower --lr, or look at the data."
            )


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
        lr=recipe.lr,
        weight_decay=recipe.weight_decay,
        norm_decay=recipe.norm_decay,
        train=recipe.train,
        head=_head(linear, n_classes) if "head" in recipe.train else None,
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
    linear: list[nn.Module] = []
    positions: dict[int, int] = {}

    def note(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(module, GeneralizedBatchNorm):
            seen = output[0, 0].numel() if len(output) else 0
            positions[id(module)] = min(seen, positions.get(id(module), seen))
        else:
            linear.append(module)

    batch = next(iter(batches), None)
    if batch is None:
        raise DataError("fine-tuning: no examples. Give at least one batch.")
    with guards.inference(model), guards.hooks() as handles:
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | GeneralizedBatchNorm):
                handles.append(module.register_forward_hook(note))
        output = runtime.run(model, batch, runtime.device_of(model), forward)
    return runtime.logits_of(output).shape[1], linear, positions


def _head(modules: list[nn.Module], n_classes: int | None) -> nn.Module:
    """The last linear layer or 1x1 convolution, with as many outputs as there are classes."""
    for module in reversed(modules):
        if isinstance(module, nn.Linear):
            n_outputs = module.out_features
        elif isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
            n_outputs = module.out_channels
        else:
            continue
        if n_classes in (None, n_outputs):
            return module
    fitting = "" if n_classes is None else f" with {n_classes} outputs, as many as the logits"
    raise ModelError(
        f"--train head: no linear layer or 1x1 convolution{fitting}. Use --train norms or all."
    )


def _norm_layers(model: nn.Module) -> list[nn.Module]:
    return [site.module for site in find_norms(model) if not site.frozen]


@contextmanager
def _ghosts(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[None]:
    """The recipe's ghost size for a while, where statistics are trained."""
    size = recipe.ghost_size if recipe.statistics == "train" else None
    sites = [site for site in find_norms(model) if size is not None and not site.frozen]
    stock = [site.name for site in sites if not isinstance(site.module, GeneralizedBatchNorm)]
    if stock:
        raise NormError(
            f"--ghost-size: {some(stock)}: no GeneralizedBatchNorm. Call swap_norms_(model) first.",
            name=stock[0],
        )
    layers = [site.module for site in sites if isinstance(site.module, GeneralizedBatchNorm)]
    before = [layer.ghost_size for layer in layers]
    try:
        for layer in layers:
            layer.ghost_size = size
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.ghost_size = own


def _n_steps(recipe: FinetuneRecipe, batches: runtime.Batches) -> int:
    if recipe.steps is not None:
        return recipe.steps
    first = runtime.pass_of(batches, 0)
    if isinstance(first, Sized):
        try:
            return recipe.epochs * len(first)
        except TypeError:  # a DataLoader has a length only if its data set has one
            pass
    return recipe.epochs * sum(1 for _ in first)


def _n_labels(batch: Any) -> int | None:
    labels = runtime.unpack({"x": None, **batch} if isinstance(batch, Mapping) else batch)[1]
    if isinstance(labels, Tensor):
        return labels.numel()
    return len(labels) if isinstance(labels, Sized) else None


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
    return TrainingPoint(epoch, step, loss, found.nll, found.top1)
