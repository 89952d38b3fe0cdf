"""The steps of fine-tuning: what is trained, rates, gathered gradients, averages, counters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.save import random_state, set_random_state_
from bnfix.core import distributed, runtime
from bnfix.core.errors import ConfigError, DataError, ModelError, NumericError
from bnfix.core.settings import TRAINED, FinetuneRecipe
from bnfix.metrics.task import Task, mean_loss
from bnfix.norm.sites import find_norms
from bnfix.training.head import head_of
from bnfix.training.ingredients import Added, require_norms, uphill
from bnfix.training.roles import decays_of


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
        train: ``norms``, ``head``, ``norms+head``, ``last-norm+head`` (of the norm layers only the
            last one defined) or ``all``.
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
    if train not in TRAINED:
        raise ConfigError(
            f"--train: {train!r} is not known. Use one of: {', '.join(TRAINED)}.", name="train"
        )
    sites = find_norms(model)
    own = {id(p): (p, s) for s in sites for p in s.module.parameters(recurse=False)}
    free = [(p, site) for p, site in own.values() if not site.frozen and train != "head"]
    if train == "last-norm+head":
        free = [(p, site) for p, site in free if site is free[-1][1]]
    norms = [p for p, _ in free]
    if train == "all":
        others = [p for p in model.parameters() if id(p) not in own]
    elif train == "norms":
        others = []
    else:
        others = list((head or head_of(list(model.modules()), None)).parameters())
    if not norms and not others:
        raise ModelError(f"--train {train}: the model has no such parameters. Use --train all.")
    of_norms = {"weight_decay": 0.0, "norm_decay": norm_decay}
    groups: list[dict[str, Any]] = [
        {"name": "norms", "params": norms, "lr": lr, **of_norms},
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
    beta <- beta (1 - rate w), as centring and scaling gates.
    Over steps s: gamma_T - t = (gamma_0 - t) prod_s (1 - rate_s w).

    Args:
        model: its norm layers but the frozen ones; or an iterable of just the layers to decay.
        rate: the learning rate of the step.
        norm_decay: w.
        target: ``identity``, ``zero``, or ``none``, which changes nothing.

    Raises:
        ConfigError: if the target is not known, or the step would go beyond it.

    Changes:
        ``weight`` and ``bias`` of the layers, and the first two rows of ``gates``; tied ones once.

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
    for layer in norm_layers(model) if isinstance(model, nn.Module) else model:
        for p, goal in ((layer.weight, float(target == "identity")), (layer.bias, 0.0)):
            if isinstance(p, nn.Parameter) and id(p) not in done:
                done.add(id(p))
                p.sub_(goal).mul_(1 - rate * norm_decay).add_(goal)
        gates: Any = getattr(layer, "gates", None)
        if gates is not None and id(gates) not in done:
            done.add(id(gates))
            gates[:2].mul_(1 - rate * norm_decay)


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """List the norm layers that are not frozen."""
    return [site.module for site in find_norms(model) if not site.frozen]


_MOST_BAD_STEPS = 10


@dataclass(frozen=True)
class Setting:
    """The network to train, and how."""

    model: nn.Module
    recipe: FinetuneRecipe
    task: Task  # to learn
    forward: runtime.Forward | None
    precision: str  # of forward and backward passes; parameters and their steps are in float32
    include_frozen: bool
    added: Added

    def loss(self, batch: Any) -> Tensor:
        """The mean loss of a batch and what ingredients add to it, with its graph."""
        loss = mean_loss(
            self.task, self.model, batch, self.forward, what="fine-tuning", precision=self.precision
        )
        if not loss.requires_grad:
            raise ModelError(
                f"--train {self.recipe.train}: the model's output has no gradient in what is "
                "trained. Look for no_grad or detach in the model, or use --train all."
            )
        penalty = self.added.penalty()
        return loss if penalty is None else loss + penalty


@dataclass
class Counts:
    """Steps so far."""

    step: int = 0
    taken: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0


class Run:
    """Optimizer, rates and counts; the loop over one epoch."""

    def __init__(
        self, how: Setting, n_steps: int, groups: list[dict[str, Any]], leaves: Iterable[Tensor]
    ) -> None:
        self.how, self.n_steps, self.count, self.busy = how, n_steps, Counts(), False
        #: The epoch under way: batches seen, losses, random states.
        self.epoch: dict[str, Any] | None = None
        recipe, sites = how.recipe, find_norms(how.model)
        trains = recipe.statistics == "train"
        respects = trains and not how.include_frozen
        #: Layers that the user froze by their modes, which are seen before training changes them.
        self.frozen = [s.name for s in sites if respects and s.is_put_to_rest(how.model)]
        moving = [s.module for s in sites if trains and not s.frozen and s.name not in self.frozen]
        self._still = [s.module for s in sites if s.module not in moving]
        self._leaves = list(leaves)
        if self._leaves:
            learned = {"params": self._leaves, "lr": recipe.weight_lr, "weight_decay": 0.0}
            groups = [*groups, learned]
        self.parameters: list[Tensor] = [p for group in groups for p in group["params"]]
        trained = {id(p) for p in self.parameters}
        decaying = [
            layer for layer in norm_layers(how.model)
            if any(id(p) in trained for p in layer.parameters(recurse=False))
        ]  # fmt: skip
        self._decays = decays_of(how.model, decaying, recipe)
        self._norms: list[Tensor] = next(
            (g["params"] for g in groups if g.get("name") == "norms"), []
        )
        require_norms(recipe, self._norms)
        self._peaks = [group["lr"] for group in groups]
        sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
        kind: Any = sgd if recipe.optimizer == "sgd" else torch.optim.AdamW
        self.optimizer: torch.optim.Optimizer = kind(groups, lr=recipe.peak_lr)
        #: Running moments, and copies of the last that came from finite values.
        self._moments = [(b, b.clone()) for m in moving for b in m.buffers(recurse=False)]
        averages = recipe.ema is not None
        self._average = [p.detach().clone() for p in self.parameters if averages]

    def one_epoch(
        self, batches: Callable[[], Iterable[Any]], after_step: Callable[[], None] | None = None
    ) -> float | None:
        """Train until batches or steps end; the mean loss, ``None`` if no step was taken."""
        self.how.model.train()
        for module in self._still:
            module.training = False
        for buffer, saved in self._moments:
            saved.copy_(buffer)
        here, iterator = self._begin(batches)
        while self.count.step < self.n_steps:
            if after_step is not None:  # between steps all that counts is consistent
                here["random"] = random_state()
                after_step()
            gathered = list(islice(iterator, self.how.recipe.accumulate))
            n_gathered = max(distributed.gather(len(gathered)))
            if not n_gathered:
                break
            self.busy = True
            for group, peak in zip(self.optimizer.param_groups, self._peaks, strict=True):
                group["lr"] = peak * self._rate()
            self.count.step += 1
            loss = self._one_step(self._usable(gathered))
            if loss is not None:
                here["losses"].append(loss)
            here["n_batches"] += n_gathered
            self.busy = False
        self.epoch = None
        self._share_moments()
        if not here["n_batches"]:
            raise DataError(
                "fine-tuning: a pass over the batches gave none. Give batches that can be read "
                "again, or a callable that gives those of the k-th epoch."
            )
        losses = here["losses"]
        return sum(losses) / len(losses) if losses else None

    def _share_moments(self) -> None:
        """Running moments of several ranks become their mean: each has followed its own batches."""
        size = distributed.here().size
        if size == 1:
            return
        for buffer, saved in self._moments:
            if buffer.is_floating_point():
                distributed.sum_([buffer])
                buffer.div_(size)
            else:
                buffer.fill_(max(distributed.gather(int(buffer))))
            saved.copy_(buffer)

    def _begin(self, batches: Callable[[], Iterable[Any]]) -> tuple[dict[str, Any], Iterator[Any]]:
        """The epoch's record and its batches, without those that it has used already."""
        if self.epoch is None:
            start = random_state()
            self.epoch = {"n_batches": 0, "losses": [], "start": start, "random": start}
            return self.epoch, iter(batches())
        # The order may be drawn when the iterator is made: it has to meet the same random state.
        set_random_state_(self.epoch["start"])
        iterator = iter(batches())
        for _ in islice(iterator, self.epoch["n_batches"]):
            pass
        set_random_state_(self.epoch["random"])
        return self.epoch, iterator

    def _rate(self) -> float:
        """Linear warm-up, then cosine to 0; a factor of the peak rate."""
        warmup = round(self.how.recipe.warmup * self.n_steps)
        if self.count.step < warmup:
            return (self.count.step + 1) / (warmup + 1)
        done = (self.count.step - warmup) / max(1, self.n_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _usable(self, gathered: list[Any]) -> list[Any]:
        """Without batches of one example where statistics are trained: those have no statistics."""
        if self.how.recipe.statistics == "frozen":
            return gathered
        usable = [batch for batch in gathered if runtime.n_examples_of(batch) != 1]
        self.count.skipped += len(gathered) - len(usable)
        return usable

    def _one_step(self, gathered: list[Any]) -> float | None:
        """One step; its loss, or ``None`` if it was left out."""
        if not any(distributed.gather(len(gathered))):
            return None
        self.optimizer.zero_grad()
        value = self._gradients(gathered)
        if self.how.recipe.sharpness:
            self._sharpen(gathered)
        # Clipping to infinity changes nothing, and gives the norm.
        limit = math.inf if self.how.recipe.clip is None else self.how.recipe.clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        finite = math.isfinite(value) and math.isfinite(norm)
        for buffer, saved in self._moments:
            # The forward pass has moved the running moments already, by values that may be NaN.
            saved.copy_(buffer) if finite else buffer.copy_(saved)
        if not finite:
            self._leave_out()
            return None
        self.count.bad_in_a_row = 0
        self.count.taken += 1
        self.optimizer.step()
        for group in self.optimizer.param_groups:
            if group.get("name") == "norms":
                for decay, layers in self._decays:
                    decay_norms_(layers, group["lr"], decay, self.how.recipe.norm_decay_target)
        self._after_update()
        return value

    def _gradients(self, gathered: list[Any]) -> float:
        """Gradients of the mean loss over these batches' examples, of all ranks; that loss."""
        counts = [runtime.n_examples_of(batch) for batch in gathered]
        if distributed.here().shared:
            return distributed.backward_(
                [partial(self.how.loss, batch) for batch in gathered], counts, self.parameters
            )
        if len(gathered) == 1:
            counts = [1]
        value = 0.0
        for batch, count in zip(gathered, counts, strict=True):
            part = count / max(1, sum(counts))
            loss = self.how.loss(batch)
            # A factor of 1 would still round: a single batch is left as it is.
            (loss if len(gathered) == 1 else loss * part).backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach()) * part
        return value

    def _sharpen(self, gathered: list[Any]) -> None:
        """Replace the gradients by those uphill; running moments follow the first pass only."""
        met = [buffer.clone() for buffer, _ in self._moments]
        with uphill(self._norms, self.how.recipe.sharpness) as moved:
            if moved:
                self.optimizer.zero_grad()
                self._gradients(gathered)
        for (buffer, _), value in zip(self._moments, met, strict=True):
            buffer.copy_(value)

    @torch.no_grad()
    def _after_update(self) -> None:
        for leaf in self._leaves:
            leaf.clamp_(0, 1)
        if self.how.recipe.ema is not None:
            decay = min(self.how.recipe.ema, (1 + self.count.taken) / (10 + self.count.taken))
            for mean, p in zip(self._average, self.parameters, strict=True):
                mean.lerp_(p, 1 - decay)

    def _leave_out(self) -> None:
        self.count.skipped += 1
        self.count.bad_in_a_row += 1
        if self.count.bad_in_a_row >= _MOST_BAD_STEPS:
            raise NumericError(
                f"fine-tuning: loss or gradient was not finite in {_MOST_BAD_STEPS} steps in a "
                "row. Lower --lr, or look at the data."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged parameters in the model for a while, where the recipe averages."""
        if not self._average:
            yield
            return
        following = [buffer for buffer, _ in self._moments]
        own = [(t, t.detach().clone()) for t in (*self.parameters, *following)]
        with torch.no_grad():
            for p, mean in zip(self.parameters, self._average, strict=True):
                p.copy_(mean)
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor, value in own:
                    tensor.copy_(value)

    def state(self) -> dict[str, Any]:
        """All that the coming steps depend on but the model and the random state."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": list(self._average),
            "counters": list(astuple(self.count)),
            "epoch": self.epoch,
        }

    def set_state_(self, state: Mapping[str, Any]) -> None:
        """Go on from where `state` was taken."""
        self.optimizer.load_state_dict(state["optimizer"])
        for mean, value in zip(self._average, state["average"], strict=True):
            mean.copy_(value)
        self.count = Counts(*map(int, state["counters"]))
        self.epoch = state["epoch"]


def followed(model: nn.Module) -> list[nn.Module]:
    """Modules whose own state may change in training: norms, and torch's own."""
    norms = {id(site.module) for site in find_norms(model)}
    return [
        module for module in model.modules()
        if id(module) in norms or type(module).__module__.startswith("torch.")
    ]  # fmt: skip


def n_steps_of(recipe: FinetuneRecipe, batches: runtime.Batches) -> int:
    """The steps of a run; batches without a length are counted by a pass over them."""
    if recipe.steps is not None:
        return recipe.steps
    first: Any = runtime.pass_of(batches, 0)
    try:
        n_batches = len(first)
    except TypeError:  # a DataLoader has a length only if its data set has one
        n_batches = sum(1 for _ in first)
    n_batches = max(distributed.gather(n_batches))
    return recipe.epochs * -(-n_batches // recipe.accumulate)
