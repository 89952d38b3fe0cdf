"""The steps of fine-tuning: rates, accumulated gradients, averages, and a recipe's ingredients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.save import random_state, set_random_state_
from bnfix.core import distributed, guards, runtime
from bnfix.core.errors import DataError, ModelError, NormError, NumericError, some
from bnfix.core.options import require
from bnfix.core.settings import FinetuneRecipe
from bnfix.metrics.task import Task, mean_loss
from bnfix.norm.layer import GeneralizedBatchNorm
from bnfix.norm.moments import gaps
from bnfix.norm.sites import find_norms
from bnfix.training.parameters import decay_norms_, decays_of, norm_layers

_MOST_BAD_STEPS = 10


class Added:
    """A recipe's ingredients: hooks on the network's norm layers, and terms of the loss.

    ``ghost_noise`` N: each example i of a layer with frozen moments (mu, sd) is normalized as if
    they came from a ghost batch, whose mean and deviation vary by chance:

        z = (x - mu - sd d) / (sd s),  d ~ N(0, 1/N),  s^2 ~ chi^2(N-1) / (N-1)

    per example and channel; the noise has no gradient. Source: Kosson et al., "Ghost noise for
    regularizing deep neural networks", AAAI 2024.

    ``consistency`` (l_mean, l_sd): adds l_mean times the mean gap plus l_sd times the sd gap
    (`gaps`), summed over layers, to the loss. The gradient goes through the batch's moments.
    Source: Wang, Wu & Huang, "Understanding the failure of batch normalization for transformers in
    NLP", 2022. Differs: deviations, not variances, relative to the batch's, as in `inspect`.
    """

    def __init__(self, model: nn.Module, recipe: FinetuneRecipe) -> None:
        self._model, self._recipe = model, recipe
        self._terms: list[Tensor] = []

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Put the hooks on the layers for a while; they act only in training."""
        recipe = self._recipe
        steps: list[Callable[[Any, Tensor], Tensor]] = []
        steps += [self._consistent] if recipe.consistency else []
        steps += [self._noisy] if recipe.ghost_noise else []
        layers = [s.module for s in find_norms(self._model) if s.has_statistics and not s.frozen]
        if steps and any(getattr(layer, "gates", None) is not None for layer in layers):
            raise NormError(
                "--ghost-noise, --consistency: neither works on layers with gates, whose "
                "statistics do not describe their inputs. Leave both out."
            )

        def before(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x, *rest = inputs
            for step in steps if self._model.training and x.numel() else ():
                x = step(layer, x)
            return (x, *rest)

        with guards.hooks() as handles:
            handles += [layer.register_forward_pre_hook(before) for layer in layers if steps]
            yield

    def penalty(self) -> Tensor | None:
        """The loss terms of the batch just run."""
        terms, self._terms = self._terms, []
        return torch.stack(terms).sum() if terms else None

    def _consistent(self, layer: Any, x: Tensor) -> Tensor:
        if x.numel() > x.shape[1]:  # a single value has no deviation
            dims = [axis for axis in range(x.ndim) if axis != 1]
            var, mean = torch.var_mean(x.float(), dims, correction=0)
            stored = layer.running_mean.clone(), layer.running_var.clone()  # they move in training
            factors = torch.tensor(self._recipe.consistency, device=x.device)
            self._terms.append((factors * gaps(stored, (mean, var), layer.eps)).sum())
        return x

    @torch.no_grad()
    def _draw(self, n: int, like: Tensor) -> tuple[Tensor, Tensor]:
        size = self._recipe.ghost_noise or 2
        shape = (n, len(like))
        shift = torch.randn(shape, device=like.device) / math.sqrt(size)
        freedom = torch.full(shape, size - 1.0, device=like.device)
        return shift, (torch.distributions.Chi2(freedom).sample() / freedom).sqrt()

    def _noisy(self, layer: Any, x: Tensor) -> Tensor:
        mean, var = layer.running_mean, layer.running_var
        shift, scale = self._draw(len(x), mean)
        after = [1] * (x.ndim - 2)
        sd = (var + layer.eps).sqrt()
        shift, scale = (t.view(*t.shape, *after) for t in (sd * shift, scale))
        centre = mean.view(-1, *after)
        noisy: Tensor = centre + (x - centre - shift) / scale
        return noisy.to(x.dtype)


@contextmanager
def _uphill(parameters: Sequence[Tensor], length: float) -> Iterator[bool]:
    """Move the parameters by length g / |g| for a while, with g their joint gradient.

    If there is no such direction, it yields False and moves nothing. Source: Mueller et al.,
    "Normalization layers are all that sharpness-aware minimization needs", NeurIPS 2023.
    """
    moved = [(p, p.grad) for p in parameters if p.grad is not None]
    norm = math.sqrt(sum(float(g.square().sum()) for _, g in moved))
    if not (norm > 0 and math.isfinite(norm)):
        yield False
        return
    with _values_kept([p for p, _ in moved]):
        with torch.no_grad():
            for p, g in moved:
                p.add_(g, alpha=length / norm)
        yield True


@contextmanager
def _values_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Restore the values of tensors at exit."""
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors]
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in kept:
                tensor.copy_(value)


@contextmanager
def training_norms(model: nn.Module, recipe: FinetuneRecipe) -> Iterator[None]:
    """Set the recipe's ghost batches and momentum for a while, if statistics are trained."""
    trains = recipe.statistics == "train"
    sites = [site for site in find_norms(model) if trains and not site.frozen]
    stock = [site.name for site in sites if not isinstance(site.module, GeneralizedBatchNorm)]
    own: dict[str, Any] = {} if recipe.ghost_size is None else {"ghost_size": recipe.ghost_size}
    own |= {"exclusive": True} if recipe.batch_statistics == "exclusive" else {}
    if stock and own:
        flag = "--ghost-size" if "ghost_size" in own else "--batch-statistics"
        raise NormError(
            f"{flag}: {some(stock)}: no GeneralizedBatchNorm. Call swap_norms_(model) first.",
            name=stock[0],
        )
    before: list[tuple[nn.Module, str, Any]] = []
    try:
        for layer in (site.module for site in sites):
            settings = own.copy()
            momentum: Any = getattr(layer, "momentum", None)
            if recipe.accumulate > 1 and momentum is not None:
                # K accumulated batches move the running moments as far as one batch would.
                settings["momentum"] = 1 - (1 - momentum) ** (1 / recipe.accumulate)
            for name, value in settings.items():
                before.append((layer, name, getattr(layer, name)))
                setattr(layer, name, value)
        yield
    finally:
        for layer, name, value in before:
            setattr(layer, name, value)


@dataclass(frozen=True)
class Setting:
    """The network to train, and the settings."""

    model: nn.Module
    recipe: FinetuneRecipe
    task: Task  # the task to learn
    forward: runtime.Forward | None
    precision: str  # of forward and backward passes; parameters and updates are in float32
    include_frozen: bool
    added: Added

    def loss(self, batch: Any) -> Tensor:
        """A batch's mean loss plus the ingredients' terms, with the autograd graph."""
        loss = mean_loss(
            self.task, self.model, batch, self.forward, what="fine-tuning", precision=self.precision
        )
        if not loss.requires_grad:
            raise ModelError(
                f"--train {self.recipe.train}: the model's output has no gradient for the trained "
                "parameters. Look for no_grad or detach in the model, or use --train all."
            )
        penalty = self.added.penalty()
        return loss if penalty is None else loss + penalty


@dataclass
class Counts:
    """The numbers of steps so far."""

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
        #: The current epoch: batches seen, losses, random states.
        self.epoch: dict[str, Any] | None = None
        recipe, sites = how.recipe, find_norms(how.model)
        trains = recipe.statistics == "train"
        respects = trains and not how.include_frozen
        #: Layers that the user froze by their modes; determined before training changes the modes.
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
        self._norms = [p for g in groups if g.get("name") == "norms" for p in g["params"]]
        found = f"--sharpness: --train {recipe.train} trains no gamma or beta."
        ok = bool(self._norms) or not recipe.sharpness
        require(ok, f"{found} Use --train norms or leave it out.", "sharpness")
        self._peaks = [group["lr"] for group in groups]
        sgd = partial(torch.optim.SGD, momentum=0.9, nesterov=True)
        kind: Any = sgd if recipe.optimizer == "sgd" else torch.optim.AdamW
        self.optimizer: torch.optim.Optimizer = kind(groups, lr=recipe.peak_lr)
        #: Running moments, and copies of the last ones that came from finite values.
        self._moments = [(b, b.clone()) for m in moving for b in m.buffers(recurse=False)]
        averages = recipe.ema is not None
        self._average = [p.detach().clone() for p in self.parameters if averages]

    def one_epoch(
        self, batches: Callable[[], Iterable[Any]], after_step: Callable[[], None] | None = None
    ) -> float | None:
        """Train until batches or steps end; return the mean loss, ``None`` without any step."""
        self.how.model.train()
        for module in self._still:
            module.training = False
        for buffer, saved in self._moments:
            saved.copy_(buffer)
        here, iterator = self._begin(batches)
        while self.count.step < self.n_steps:
            if after_step is not None:  # between steps, the state is consistent
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
                "again, or a callable that returns the batches of the k-th epoch."
            )
        losses = here["losses"]
        return sum(losses) / len(losses) if losses else None

    def _share_moments(self) -> None:
        """Replace all ranks' running moments, which followed different batches, by their mean."""
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
        """The epoch's record and its remaining batches."""
        if self.epoch is None:
            start = random_state()
            self.epoch = {"n_batches": 0, "losses": [], "start": start, "random": start}
            return self.epoch, iter(batches())
        # Creating the iterator can draw the order, so it needs the same random state.
        set_random_state_(self.epoch["start"])
        iterator = iter(batches())
        for _ in islice(iterator, self.epoch["n_batches"]):
            pass
        set_random_state_(self.epoch["random"])
        return self.epoch, iterator

    def _rate(self) -> float:
        """The factor of the peak rate: linear warm-up, then cosine to 0."""
        warmup = round(self.how.recipe.warmup * self.n_steps)
        if self.count.step < warmup:
            return (self.count.step + 1) / (warmup + 1)
        done = (self.count.step - warmup) / max(1, self.n_steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * done))

    def _usable(self, gathered: list[Any]) -> list[Any]:
        """The batches, without single examples if statistics are trained: they have no variance."""
        if self.how.recipe.statistics == "frozen":
            return gathered
        usable = [batch for batch in gathered if runtime.n_examples_of(batch) != 1]
        self.count.skipped += len(gathered) - len(usable)
        return usable

    def _one_step(self, gathered: list[Any]) -> float | None:
        """Take one step; return its loss, or ``None`` if it was skipped."""
        if not any(distributed.gather(len(gathered))):
            return None
        self.optimizer.zero_grad()
        value = self._gradients(gathered)
        if self.how.recipe.sharpness:
            self._sharpen(gathered)
        # Clipping to infinity changes nothing, but returns the norm.
        limit = math.inf if self.how.recipe.clip is None else self.how.recipe.clip
        norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))
        finite = math.isfinite(value) and math.isfinite(norm)
        for buffer, saved in self._moments:
            # The forward pass has already moved the running moments, perhaps by NaN values.
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
        """Compute gradients of the mean loss over all ranks' examples; return that loss."""
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
            # No factor for a single batch: even a factor of 1 would round.
            (loss if len(gathered) == 1 else loss * part).backward()  # type: ignore[no-untyped-call]
            value += float(loss.detach()) * part
        return value

    def _sharpen(self, gathered: list[Any]) -> None:
        """Replace the gradients by the uphill ones; only the first pass moves running moments."""
        with (
            _values_kept(buffer for buffer, _ in self._moments),
            _uphill(self._norms, self.how.recipe.sharpness) as moved,
        ):
            if moved:
                self.optimizer.zero_grad()
                self._gradients(gathered)

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
                "row. Lower --lr, or check the data."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the averaged parameters into the model for a while, if the recipe averages."""
        if not self._average:
            yield
            return
        with _values_kept((*self.parameters, *(buffer for buffer, _ in self._moments))):
            with torch.no_grad():
                for p, mean in zip(self.parameters, self._average, strict=True):
                    p.copy_(mean)
            yield

    def state(self) -> dict[str, Any]:
        """The state of the coming steps, except the model and the random state."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "average": list(self._average),
            "counters": list(astuple(self.count)),
            "epoch": self.epoch,
        }

    def set_state_(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state."""
        self.optimizer.load_state_dict(state["optimizer"])
        for mean, value in zip(self._average, state["average"], strict=True):
            mean.copy_(value)
        self.count = Counts(*map(int, state["counters"]))
        self.epoch = state["epoch"]


def followed(model: nn.Module) -> list[nn.Module]:
    """Modules whose own state can change in training: norm layers, and torch's own modules."""
    norms = {id(site.module) for site in find_norms(model)}
    return [
        module for module in model.modules()
        if id(module) in norms or type(module).__module__.startswith("torch.")
    ]  # fmt: skip


def n_steps_of(recipe: FinetuneRecipe, batches: runtime.Batches) -> int:
    """The number of steps of a run; batches without a length are counted in a pass."""
    if recipe.steps is not None:
        return recipe.steps
    first: Any = runtime.pass_of(batches, 0)
    try:
        n_batches = len(first)
    except TypeError:  # a DataLoader has a length only if its data set has one
        n_batches = sum(1 for _ in first)
    n_batches = max(distributed.gather(n_batches))
    return recipe.epochs * -(-n_batches // recipe.accumulate)
