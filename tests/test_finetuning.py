"""Short training runs on tiny networks: what moves, what stays, and what is kept."""

import copy
import dataclasses
import itertools
import math
import pickle
import signal

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfix.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NormError,
    NumericError,
)
from bnfix.core.settings import FinetuneRecipe
from bnfix.metrics.evaluate import evaluate
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.training.finetune import finetune_
from bnfix.training.parameters import decay_norms_, parameter_groups
from tests import nets

N_CLASSES = 3


class Tiny(nn.Module):
    """conv, bn, relu, dropout, conv, bn, relu, linear, bn of single positions, linear."""

    def __init__(self, norm2d=GeneralizedBatchNorm, norm1d=GeneralizedBatchNorm, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1, bias=False)
        self.bn1 = norm2d(6)
        self.drop = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False)
        self.bn2 = norm2d(8)
        self.hidden = nn.Linear(8 * 9, 10)
        self.bn3 = norm1d(10)
        self.fc = nn.Linear(10, N_CLASSES)

    def forward(self, x):
        x = self.drop(F.relu(self.bn1(self.conv1(x))))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.fc(F.relu(self.bn3(self.hidden(x.flatten(1)))))


def tiny(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nets.lived_in(Tiny(**options), seed).eval()


def stock(seed=0):
    return tiny(seed, norm2d=nn.BatchNorm2d, norm1d=nn.BatchNorm1d)


def task(n=96, seed=1, size=16, gain=1.0, shift=0.0):
    """Batches of one of three 6x6 patterns in noise, brighter or darker by chance."""
    rng = torch.Generator().manual_seed(seed)
    shapes = gain * torch.randn(N_CLASSES, 1, 6, 6, generator=torch.Generator().manual_seed(7))
    y = torch.randint(0, N_CLASSES, (n,), generator=rng)
    x = shapes[y] + torch.randn(n, 1, 6, 6, generator=rng)
    x = x + shift * torch.randn(n, 1, 1, 1, generator=rng)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, n, size)]


BATCHES, MONITOR = task(), task(64, seed=2)
NORMS = {f"bn{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
HEAD = {"fc.weight", "fc.bias"}
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class Found:
    """Everything about a model that a run without success must leave as it is."""

    def __init__(self, model):
        self.model = model
        self.tensors = {name: (t, t.detach().clone()) for name, t in self._named()}
        self.flags = self._flags()
        self.rng = torch.get_rng_state()

    def _named(self):
        return itertools.chain(self.model.named_parameters(), self.model.named_buffers())

    def _flags(self):
        return [
            [m.training for m in self.model.modules()],
            [p.requires_grad for p in self.model.parameters()],
            [id(p.grad) for p in self.model.parameters()],
            [getattr(m, "live", None) for m in self.model.modules()],
            [getattr(m, "ghost_size", None) for m in self.model.modules()],
            [len(m._forward_hooks) for m in self.model.modules()],
        ]

    def changed(self):
        return {name for name, t in self._named() if not torch.equal(t, self.tensors[name][1])}

    def assert_restored(self):
        """All but the values: which tensors, modes, flags, gradients, random state."""
        for name, tensor in self._named():
            assert tensor is self.tensors[name][0], name
        assert self._flags() == self.flags
        assert torch.equal(torch.get_rng_state(), self.rng)

    def assert_still(self):
        assert self.changed() == set()
        self.assert_restored()


def marked(model):
    """The model with some modes, flags and gradients that are easily lost."""
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model


# Nothing to do, and the same again


@pytest.mark.parametrize(
    ("epochs", "recipe"),
    [
        (0, None),
        (None, FinetuneRecipe(epochs=0)),
        (None, FinetuneRecipe(steps=0)),
        (0, FinetuneRecipe(steps=5)),
        (0, FinetuneRecipe(statistics="train", train="all", norm_decay=0.1)),
        (0, FinetuneRecipe(example_weight="learn")),
    ],
)
def test_zero_epochs_or_steps_change_nothing(epochs, recipe):
    found = Found(marked(tiny()))
    tuned = finetune_(found.model, BATCHES, epochs=epochs, monitor=MONITOR, recipe=recipe)
    found.assert_still()
    assert (tuned.best_epoch, tuned.n_steps, tuned.n_skipped_steps) == (0, 0, 0)
    assert len(tuned.curve) == 1
    assert tuned.curve[0].loss is None
    assert tuned.curve[0].nll == pytest.approx(evaluate(found.model, MONITOR).nll, rel=1e-12)


@pytest.mark.parametrize("statistics", ["frozen", "train"])
def test_two_runs_with_one_seed_are_equal_bit_for_bit(statistics):
    recipe = FinetuneRecipe(train="all", statistics=statistics)

    def run(seed):
        model = tiny(dropout=0.3)
        torch.rand(3)  # the state before must not matter
        tuned = finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe, seed=seed)
        assert tuned.best_epoch > 0
        return model.state_dict(), tuned.curve

    (one, curve), (again, curve_again), (other, _) = run(3), run(3), run(4)
    assert curve == curve_again
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["conv1.weight"], other["conv1.weight"])  # dropout's seed


# What is trained


@pytest.mark.parametrize("make", [tiny, stock])
@pytest.mark.parametrize(
    ("train", "expected"),
    [("norms", NORMS), ("head", HEAD), ("norms+head", NORMS | HEAD), ("all", None)],
)
def test_just_what_was_asked_for_is_trained(make, train, expected):
    found = Found(marked(make()))
    everything = {name for name, _ in found.model.named_parameters()}
    recipe = FinetuneRecipe(train=train)
    tuned = finetune_(found.model, BATCHES, epochs=1, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch == 1
    assert found.changed() == (expected or everything)
    found.assert_restored()
    sizes = {name: p.numel() for name, p in found.model.named_parameters()}
    assert tuned.n_parameters == sum(sizes[name] for name in expected or everything)
    assert tuned.trained == train


def test_frozen_statistics_leave_norms_in_evaluation_and_all_else_in_training():
    model, seen = tiny(dropout=0.5), []

    def forward(model, batch):
        if torch.is_grad_enabled():
            seen.append({name: m.training for name, m in model.named_modules()})
        return model(batch[0])

    finetune_(model, BATCHES, monitor=MONITOR, forward=forward)
    assert len(seen) == 2 * len(BATCHES)
    for modes in seen:
        assert not any(modes[name] for name in ("bn1", "bn2", "bn3"))
        assert all(modes[name] for name in ("", "drop", "conv1", "fc"))


@pytest.mark.parametrize("make", [tiny, stock])
def test_trained_statistics_follow_the_batches(make):
    found = Found(make())
    recipe = FinetuneRecipe(statistics="train", train="all", epochs=1)
    tuned = finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch == 1
    assert {f"bn{i}.{name}" for i in (1, 2, 3) for name in STATISTICS} <= found.changed()
    assert int(found.model.bn1.num_batches_tracked) == 7 + len(BATCHES)
    found.assert_restored()


def test_ghost_size_holds_in_training_only():
    model, seen = tiny(), set()
    model.bn2.ghost_size = 5

    def forward(model, batch):
        sizes = model.bn1.ghost_size, model.bn2.ghost_size, model.bn3.ghost_size
        seen.add((torch.is_grad_enabled(), sizes))
        return model(batch[0])

    whole = copy.deepcopy(model)
    recipe = FinetuneRecipe(statistics="train", ghost_size=4, epochs=1)
    tuned = finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe, forward=forward)
    assert tuned.best_epoch == 1
    assert (True, (4, 4, 4)) in seen
    assert {sizes for grad, sizes in seen if grad} == {(4, 4, 4)}
    assert (model.bn1.ghost_size, model.bn2.ghost_size) == (None, 5)
    finetune_(whole, BATCHES, monitor=MONITOR, recipe=FinetuneRecipe(statistics="train", epochs=1))
    assert not torch.equal(whole.bn1.weight, model.bn1.weight)


def test_a_ghost_size_for_stock_layers_is_refused():
    found = Found(stock())
    recipe = FinetuneRecipe(statistics="train", ghost_size=4)
    with pytest.raises(NormError, match="--ghost-size: bn1, bn2, bn3: no GeneralizedBatchNorm"):
        finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe)
    found.assert_still()


def test_batches_of_one_example_are_left_out_where_statistics_are_trained():
    model = tiny()
    one = (BATCHES[0][0][:1], BATCHES[0][1][:1])
    batches = [one, *BATCHES[:3], one]
    recipe = FinetuneRecipe(statistics="train", epochs=2)
    tuned = finetune_(model, batches, monitor=MONITOR, recipe=recipe)
    assert (tuned.n_steps, tuned.n_skipped_steps) == (6, 4)
    assert [point.step for point in tuned.curve] == [0, 5, 10]
    assert tuned.best_epoch > 0
    assert int(model.bn1.num_batches_tracked) == 7 + 3 * tuned.best_epoch
    tuned = finetune_(tiny(), batches, epochs=1, monitor=MONITOR)
    assert (tuned.n_steps, tuned.n_skipped_steps) == (5, 0)
    alone = finetune_(tiny(), [one], epochs=1, monitor=MONITOR, recipe=recipe)
    assert (alone.n_steps, alone.n_skipped_steps, alone.curve[1].loss) == (0, 1, None)


@pytest.mark.parametrize("make", [tiny, stock])
@pytest.mark.parametrize("statistics", ["frozen", "train"])
def test_frozen_norm_layers_are_untouched(make, statistics):
    model = make()
    model.bn1.frozen = model.bn3.frozen = True
    found = Found(model)
    recipe = FinetuneRecipe(
        train="all", statistics=statistics, norm_decay=0.5, norm_decay_target="zero"
    )
    tuned = finetune_(model, BATCHES, epochs=1, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch == 1
    assert not any(name.startswith(("bn1.", "bn3.")) for name in found.changed())
    assert {"bn2.weight", "bn2.bias", "conv1.weight", "fc.bias"} <= found.changed()


@pytest.mark.parametrize("make", [tiny, stock])
def test_layers_frozen_by_their_modes_keep_their_statistics_and_are_listed(make):
    model = make().train()
    model.bn1.eval().requires_grad_(False)
    model.bn2.eval()  # its mode alone may mean something else
    found, seen = Found(model), set()

    def forward(model, batch):
        if torch.is_grad_enabled():
            seen.add((model.bn1.training, model.bn2.training, model.bn3.training))
        return model(batch[0])

    options = {"epochs": 1, "monitor": MONITOR, "forward": forward}
    recipe = FinetuneRecipe(train="all", statistics="train")
    tuned = finetune_(model, BATCHES, recipe=recipe, **options)
    assert (tuned.best_epoch, tuned.frozen, seen) == (1, ("bn1",), {(False, True, True)})
    moved = {name for name in found.changed() if name.endswith(STATISTICS)}
    assert {name.split(".")[0] for name in moved} == {"bn2", "bn3"}
    found.assert_restored()
    model = marked(make()).train()
    model.bn1.eval().requires_grad_(False)
    found = Found(model)
    assert finetune_(model, BATCHES, recipe=recipe, include_frozen=True, **options).frozen == ()
    assert "bn1.running_mean" in found.changed()
    # With frozen statistics all layers are left alone, and none of them is worth a word.
    assert finetune_(make(), BATCHES, **options).frozen == ()


def test_frozen_norm_layers_are_not_weighed_either():
    model = tiny()
    model.bn1.frozen = True
    recipe = FinetuneRecipe(example_weight="learn")
    tuned = finetune_(model, task(shift=3.0), monitor=task(64, seed=2, shift=3.0), recipe=recipe)
    assert tuned.best_epoch > 0
    assert not model.bn1.live
    assert model.bn2.live


def test_tied_parameters_are_trained_once():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nets.lived_in(nets.shared_norm()).eval()
    assert model.first.bn is model.second.bn
    groups = parameter_groups(model, lr=0.1)
    assert [len(group["params"]) for group in groups] == [2, 4]
    x = torch.randn(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = (x, (x.mean((1, 2, 3)) > 0).long())
    gamma = model.first.bn.weight
    start = gamma.detach().clone()
    gradient = torch.autograd.grad(F.cross_entropy(model(x), batch[1]), gamma)[0]
    recipe = FinetuneRecipe(
        train="norms", optimizer="sgd", lr=1e-2, steps=1, warmup=0, norm_decay=1.0,
        norm_decay_target="identity",
    )  # fmt: skip
    tuned = finetune_(model, [batch], monitor=[batch], recipe=recipe)
    assert (tuned.best_epoch, tuned.n_parameters) == (1, 8)
    assert model.first.bn.weight is model.second.bn.weight is gamma
    expected = 1 + (start - 1e-2 * 1.9 * gradient - 1) * (1 - 1e-2)
    torch.testing.assert_close(gamma.detach(), expected, rtol=0, atol=1e-6)


# The step


def one_step(recipe, batch=BATCHES[0], model=None):
    """The model before, after one step of the whole peak rate, and its gradients there."""
    model = model or tiny()
    before = copy.deepcopy(model)
    loss = F.cross_entropy(before(batch[0]), batch[1], label_smoothing=recipe.label_smoothing)
    loss.backward()
    tuned = finetune_(model, [batch], monitor=[batch], recipe=recipe)
    assert tuned.best_epoch == 1
    return before, model, tuned, loss.item()


def test_a_step_of_sgd_is_nesterovs_and_decays_the_others_only():
    recipe = FinetuneRecipe(
        train="all", optimizer="sgd", lr=1e-3, steps=1, warmup=0, weight_decay=0.1
    )
    before, after, tuned, loss = one_step(recipe)
    assert tuned.curve[1].loss == pytest.approx(loss, rel=1e-6)
    moved = dict(after.named_parameters())
    for name, p in before.named_parameters():
        decay = 0.0 if name in NORMS else 0.1
        # With no momentum yet, Nesterov's step is that of 1.9 times the gradient.
        expected = p - 1e-3 * 1.9 * (p.grad + decay * p)
        torch.testing.assert_close(moved[name], expected, rtol=1e-5, atol=1e-7)


def test_a_step_of_adamw_decays_the_others_only():
    recipe = FinetuneRecipe(train="all", lr=1e-3, steps=1, warmup=0, weight_decay=0.5)
    before, after, _, _ = one_step(recipe)
    moved = dict(after.named_parameters())
    for name, p in before.named_parameters():
        decay = 0.0 if name in NORMS else 0.5
        expected = p * (1 - 1e-3 * decay) - 1e-3 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(moved[name], expected, rtol=1e-4, atol=1e-6)


def test_the_gradient_is_clipped_over_all_that_is_trained():
    recipe = FinetuneRecipe(train="all", optimizer="sgd", lr=0.1, steps=1, warmup=0, clip=0.01)
    before, after, _, _ = one_step(recipe)
    pairs = list(zip(before.parameters(), after.parameters(), strict=True))
    assert math.sqrt(sum(float(p.grad.square().sum()) for p, _ in pairs)) > 0.1
    length = math.sqrt(sum(float((p - q).detach().square().sum()) for p, q in pairs))
    assert length == pytest.approx(0.1 * 1.9 * 0.01, rel=1e-3)


def test_label_smoothing_is_in_the_training_loss_only():
    recipe = FinetuneRecipe(steps=1, label_smoothing=0.3)
    before, _, tuned, loss = one_step(recipe)
    x, y = BATCHES[0]
    assert tuned.curve[1].loss == pytest.approx(loss, rel=1e-6)
    assert tuned.curve[0].nll == pytest.approx(F.cross_entropy(before(x), y).item(), rel=1e-6)
    assert tuned.curve[0].nll != pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize(
    ("steps", "expected"), [(1, [0, 1]), (6, [0, 6]), (7, [0, 6, 7]), (14, [0, 6, 12, 14])]
)
def test_steps_are_a_limit_across_epochs(steps, expected):
    recipe = FinetuneRecipe(steps=steps, epochs=100)
    tuned = finetune_(tiny(), BATCHES, monitor=MONITOR, recipe=recipe)
    assert [point.step for point in tuned.curve] == expected
    assert tuned.n_steps == steps
    assert [point.epoch for point in tuned.curve] == list(range(len(expected)))


def test_epochs_given_override_the_recipes_epochs_and_steps():
    recipe = FinetuneRecipe(steps=2, epochs=5)
    tuned = finetune_(tiny(), BATCHES, epochs=1, monitor=MONITOR, recipe=recipe)
    assert tuned.n_steps == len(BATCHES)
    with pytest.raises(ConfigError, match="--epochs: -1, expected at least 0"):
        finetune_(tiny(), BATCHES, epochs=-1, monitor=MONITOR)


# Decay of gamma and beta


def schedule(n, warmup):
    rising = round(warmup * n)
    up = [(s + 1) / (rising + 1) for s in range(rising)]
    down = [0.5 * (1 + math.cos(math.pi * s / (n - rising))) for s in range(n - rising)]
    return up + down


def blind(target):
    """A forward whose training loss depends on nothing, and whose monitor likes the target."""

    def forward(model, batch):
        x, y = batch
        if torch.is_grad_enabled():
            return 0 * model(x)
        away = sum(
            float((layer.weight - float(target == "identity")).abs().sum() + layer.bias.abs().sum())
            for layer in (model.bn1, model.bn2, model.bn3)
        )
        return F.one_hot(y, N_CLASSES) * (5 - 0.1 * away)

    return forward


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("warmup", [0.0, 0.3])
@pytest.mark.parametrize("target", ["identity", "zero"])
def test_decay_follows_the_product_formula(optimizer, warmup, target):
    found = Found(tiny())
    lr, decay, epochs = 0.05, 2.0, 3
    recipe = FinetuneRecipe(
        train="norms", optimizer=optimizer, lr=lr, warmup=warmup, epochs=epochs, norm_decay=decay,
        norm_decay_target=target,
    )  # fmt: skip
    tuned = finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe, forward=blind(target))
    assert tuned.best_epoch == epochs
    rates = [lr * factor for factor in schedule(epochs * len(BATCHES), warmup)]
    left = math.prod(1 - rate * decay for rate in rates)
    assert 0.1 < left < 0.6
    for name in NORMS:
        goal = 1.0 if target == "identity" and name.endswith("weight") else 0.0
        tensor, start = found.tensors[name]
        torch.testing.assert_close(tensor.detach() - goal, (start - goal) * left, rtol=0, atol=1e-5)
    assert found.changed() == NORMS


def test_without_a_target_nothing_decays():
    found = Found(tiny())
    recipe = FinetuneRecipe(train="all", norm_decay=2.0, weight_decay=0.0)
    finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe, forward=blind("identity"))
    found.assert_still()


def test_a_decay_beyond_its_target_is_refused_and_changes_nothing():
    found = Found(tiny())
    recipe = FinetuneRecipe(lr=0.5, warmup=0, norm_decay=3.0, norm_decay_target="identity")
    with pytest.raises(
        ConfigError, match=r"--norm-decay: 3 at a rate of 0.5 overshoots its target"
    ):
        finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe)
    found.assert_still()


def test_decay_norms_by_hand():
    model = tiny()
    gamma, beta = model.bn1.weight.detach().clone(), model.bn1.bias.detach().clone()
    decay_norms_(model, 0.1, 0.5, "identity")
    torch.testing.assert_close(model.bn1.weight.detach(), 1 + 0.95 * (gamma - 1))
    torch.testing.assert_close(model.bn1.bias.detach(), 0.95 * beta)
    decay_norms_(model, 0.1, 0.5, target="zero")
    torch.testing.assert_close(model.bn1.weight.detach(), 0.95 * (1 + 0.95 * (gamma - 1)))
    decay_norms_(model, 0.1, 10.0)
    assert bool((model.bn2.weight == 1).all())
    assert bool((model.bn2.bias == 0).all())
    assert model.bn2.weight.requires_grad


def test_decay_norms_leaves_alone_what_is_not_its_business():
    model = nn.Sequential(
        tiny(),
        nn.BatchNorm2d(3, affine=False),
        nn.InstanceNorm2d(3, affine=True),
        nn.LayerNorm(4),
    )
    with torch.no_grad():
        for p in model[2:].parameters():
            p.fill_(0.5)
    model[0].bn1.frozen = True
    found = Found(model)
    for rate, decay, target in ((0.1, 1.0, "none"), (0.0, 1.0, "zero"), (0.1, 0.0, "zero")):
        decay_norms_(model, rate, decay, target)
    found.assert_still()
    decay_norms_([model[0].bn2], 0.1, 1.0)
    assert found.changed() == {"0.bn2.weight", "0.bn2.bias"}
    decay_norms_(model, 0.1, 1.0)
    assert found.changed() == {f"0.bn{i}.{kind}" for i in (2, 3) for kind in ("weight", "bias")}


@pytest.mark.parametrize(
    ("rate", "decay", "target", "message"),
    [
        (0.1, 0.1, "one", r"--norm-decay-target: 'one' is not known"),
        (2.0, 1.0, "zero", r"--norm-decay: 1 at a rate of 2 overshoots its target"),
        (-0.1, 1.0, "zero", r"--norm-decay: 1 at a rate of -0.1 overshoots its target"),
        (math.nan, 1.0, "zero", r"--norm-decay: 1 at a rate of nan overshoots its target"),
    ],
)
def test_decay_norms_refuses(rate, decay, target, message):
    found = Found(tiny())
    with pytest.raises(ConfigError, match=message):
        decay_norms_(found.model, rate, decay, target)
    found.assert_still()


# Parameter groups


def names_of(model, group):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)] for p in group["params"]}


@pytest.mark.parametrize(
    ("train", "norms", "others"),
    [
        ("norms", NORMS, set()),
        ("head", set(), HEAD),
        ("norms+head", NORMS, HEAD),
        ("all", NORMS, {"conv1.weight", "conv2.weight", "hidden.weight", "hidden.bias"} | HEAD),
    ],
)
def test_groups_hold_every_parameter_once(train, norms, others):
    model = tiny()
    groups = parameter_groups(model, lr=0.1, weight_decay=0.2, norm_decay=0.3, train=train)
    by_name = {group["name"]: group for group in groups}
    assert {name: names_of(model, group) for name, group in by_name.items()} == {
        name: members for name, members in (("norms", norms), ("others", others)) if members
    }
    settings = {
        name: {key: value for key, value in group.items() if key not in ("name", "params")}
        for name, group in by_name.items()
    }
    assert settings.get("norms", {"lr": 0.1, "weight_decay": 0.0, "norm_decay": 0.3}) == {
        "lr": 0.1, "weight_decay": 0.0, "norm_decay": 0.3,
    }  # fmt: skip
    assert settings.get("others", {"lr": 0.1, "weight_decay": 0.2}) == {
        "lr": 0.1, "weight_decay": 0.2,
    }  # fmt: skip
    assert sum(len(group["params"]) for group in groups) == len(norms) + len(others)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop])
def test_groups_serve_any_optimizer_of_torch(optimizer):
    found = Found(tiny())
    chosen = optimizer(parameter_groups(found.model, lr=0.01, weight_decay=0.1, norm_decay=0.2))
    for p in found.model.parameters():
        p.grad = torch.zeros_like(p)
    chosen.step()
    assert found.changed() == {n for n, _ in found.model.named_parameters()} - NORMS
    norms = chosen.param_groups[0]
    decay_norms_(found.model, norms["lr"], norms["norm_decay"])
    gamma, before = found.tensors["bn1.weight"]
    torch.testing.assert_close(gamma.detach(), 1 + (before - 1) * (1 - 0.01 * 0.2))
    assert chosen.state_dict()["param_groups"][0]["norm_decay"] == 0.2


def test_a_loop_of_ones_own_equals_finetune():
    recipe = FinetuneRecipe(
        train="all", epochs=1, warmup=0, lr=0.01, weight_decay=0.1, norm_decay=0.5,
        norm_decay_target="identity",
    )  # fmt: skip
    theirs, mine = tiny(), tiny()
    tuned = finetune_(theirs, BATCHES, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch == 1
    optimizer = torch.optim.AdamW(parameter_groups(mine, lr=0.01, weight_decay=0.1, norm_decay=0.5))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(BATCHES))
    for x, y in BATCHES:
        optimizer.zero_grad()
        F.cross_entropy(mine(x), y).backward()
        optimizer.step()
        decay_norms_(mine, optimizer.param_groups[0]["lr"], 0.5, "identity")
        cosine.step()
    for (name, p), q in zip(theirs.named_parameters(), mine.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_the_head_of_a_group_can_be_named():
    model = tiny()
    groups = parameter_groups(model, lr=0.1, train="head", head=model.hidden)
    assert names_of(model, groups[0]) == {"hidden.weight", "hidden.bias"}


def test_groups_refuse():
    with pytest.raises(
        ConfigError, match=r"--train: 'heads' is not known. Use one of: norms, head"
    ):
        parameter_groups(tiny(), lr=0.1, train="heads")
    with pytest.raises(ModelError, match="--train norms: the model has no such parameters"):
        parameter_groups(nn.Sequential(nn.Linear(2, 2)), lr=0.1, train="norms")
    with pytest.raises(ModelError, match="--train all: the model has no such parameters"):
        parameter_groups(nn.ReLU(), lr=0.1)
    with pytest.raises(ModelError, match="--train head: no linear layer or 1x1 convolution"):
        parameter_groups(nn.Sequential(nn.Conv2d(1, 2, 3)), lr=0.1, train="head")


# The head


class Heads(nn.Module):
    """Two layers with as many outputs as classes; the one defined first is called last."""

    def __init__(self, last):
        super().__init__()
        self.last = last
        self.bn = nn.BatchNorm2d(1)
        self.before = nn.Conv2d(1, N_CLASSES, 3)
        self.unused = nn.Linear(4, N_CLASSES)

    def forward(self, x):
        x = self.before(self.bn(x)).mean((2, 3))
        return self.last(x[..., None, None] if isinstance(self.last, nn.Conv2d) else x).flatten(1)


@pytest.mark.parametrize("last", [nn.Linear(N_CLASSES, N_CLASSES), nn.Conv2d(N_CLASSES, 3, 1)])
def test_the_head_is_the_linear_layer_called_last(last):
    found = Found(Heads(copy.deepcopy(last)))
    recipe = FinetuneRecipe(train="head", lr=0.05)
    tuned = finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch > 0
    assert found.changed() == {"last.weight", "last.bias"}
    assert found._flags()[5] == found.flags[5]


@pytest.mark.parametrize("train", ["head", "norms+head"])
def test_a_model_without_a_head_is_refused(train):
    model = nn.Sequential(nn.Conv2d(1, N_CLASSES, 3), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1))
    found = Found(nn.Sequential(*model, nn.Flatten()))
    recipe = FinetuneRecipe(train=train)
    with pytest.raises(ModelError, match=r"--train head: no linear .* with 3 outputs"):
        finetune_(found.model, BATCHES, monitor=MONITOR, recipe=recipe)
    found.assert_still()
    tuned = finetune_(found.model, BATCHES, monitor=MONITOR, recipe=FinetuneRecipe(train="all"))
    assert tuned.n_steps == 2 * len(BATCHES)


def test_a_model_without_norms_is_refused_if_they_are_to_be_trained():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, N_CLASSES))
    with pytest.raises(ModelError, match="--train norms: the model has no such parameters"):
        finetune_(model, BATCHES, monitor=MONITOR)


# Which epoch is kept


def test_the_best_epoch_is_kept():
    """The rate is far too high at first, so epochs differ; the least NLL is what stays."""
    model = tiny()
    recipe = FinetuneRecipe(train="all", lr=0.2, epochs=6)
    tuned = finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe)
    losses = [point.nll for point in tuned.curve]
    assert len(losses) == 7
    assert tuned.best_epoch == min(range(7), key=losses.__getitem__)
    assert 0 < tuned.best_epoch
    kept = evaluate(model, MONITOR)
    assert kept.nll == pytest.approx(losses[tuned.best_epoch], rel=1e-9)
    assert kept.top1 == tuned.curve[tuned.best_epoch].top1


def test_an_early_best_epoch_is_kept_bit_for_bit():
    """The monitor likes the model most after its first epoch, and least before."""
    states, model = [], tiny()

    def note(model):
        states.append(copy.deepcopy(model.state_dict()))

    def forward(model, batch):
        out = model(batch[0])
        if torch.is_grad_enabled():
            return out
        return F.one_hot(batch[1], N_CLASSES) * {0: 1.0, 1: 9.0}.get(len(states), 4.0)

    recipe = FinetuneRecipe(train="all", statistics="train", epochs=4)
    tuned = finetune_(
        model, BATCHES, monitor=MONITOR, recipe=recipe, forward=forward, after_epoch=note
    )
    assert tuned.best_epoch == 1
    assert len(states) == 4
    assert all(torch.equal(value, states[0][name]) for name, value in model.state_dict().items())
    assert not torch.equal(states[0]["conv1.weight"], states[3]["conv1.weight"])


@pytest.mark.parametrize("statistics", ["frozen", "train"])
@pytest.mark.parametrize("make", [tiny, stock])
def test_if_no_epoch_is_better_the_model_is_as_it_was(make, statistics):
    model = make()
    fitted = FinetuneRecipe(train="all", lr=0.02)
    finetune_(model, BATCHES, monitor=MONITOR, recipe=fitted)
    found = Found(marked(model))
    wrong = [(x, (y + 1) % N_CLASSES) for x, y in BATCHES]
    recipe = FinetuneRecipe(train="all", statistics=statistics, lr=0.02)
    tuned = finetune_(model, wrong, monitor=MONITOR, recipe=recipe)
    assert tuned.best_epoch == 0
    assert tuned.n_steps == 2 * len(BATCHES)
    assert tuned.curve[2].nll > tuned.curve[0].nll
    found.assert_still()


def test_after_epoch_comes_before_each_evaluation_and_may_recalibrate():
    model, calls = tiny(), []

    def refresh(model):
        calls.append(len(calls))
        with torch.no_grad():
            model.bn1.running_mean.fill_(len(calls))

    recipe = FinetuneRecipe(train="all", statistics="train", epochs=2, lr=0.003)
    tuned = finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe, after_epoch=refresh)
    assert calls == [0, 1]
    assert tuned.best_epoch > 0
    assert model.bn1.running_mean.tolist() == [float(tuned.best_epoch)] * 6


def test_mixed_precision_trains_float32_parameters_through_bfloat16():
    plain, mixed = tiny(), tiny()
    kinds = set()
    mixed.conv1.register_forward_hook(lambda module, args, output: kinds.add(output.dtype))
    recipe = FinetuneRecipe(train="all", lr=0.003)
    expected = finetune_(plain, BATCHES, monitor=MONITOR, recipe=recipe)
    found = finetune_(mixed, BATCHES, monitor=MONITOR, recipe=recipe, precision="bf16")
    assert torch.bfloat16 in kinds
    assert {p.dtype for p in mixed.parameters()} == {torch.float32}
    assert found.curve[-1].nll == pytest.approx(expected.curve[-1].nll, rel=0.05)
    assert found.curve[-1].nll != expected.curve[-1].nll
    with pytest.raises(ConfigError, match="fp16: gradients underflow"):
        finetune_(mixed, BATCHES, monitor=MONITOR, recipe=recipe, precision="fp16")


def test_the_last_norm_and_the_head_alone():
    model = tiny()
    groups = parameter_groups(model, lr=0.1, train="last-norm+head")
    last = list(dict(model.named_modules()).values())
    norms = [m for m in last if hasattr(m, "running_mean")]
    assert [id(p) for p in groups[0]["params"]] == [id(p) for p in norms[-1].parameters()]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    recipe = FinetuneRecipe(train="last-norm+head", norm_decay=0.5, norm_decay_target="zero")
    assert finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe).best_epoch > 0
    changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    first = next(name for name, module in model.named_modules() if module is norms[0])
    assert changed
    assert not any(name.startswith(first + ".") for name in changed)


@pytest.mark.parametrize(("train", "lr"), [("norms", 0.006), ("head", 0.006), ("all", 0.0005)])
def test_the_rate_is_that_for_what_is_trained_unless_stated(train, lr):
    assert FinetuneRecipe(train=train).peak_lr == lr
    assert FinetuneRecipe(train=train, lr=0.0).peak_lr == 0


def test_a_step_left_out_does_not_undo_a_recalibration():
    model, seen = tiny(), []
    poison = (torch.full_like(BATCHES[0][0], math.nan), BATCHES[0][1])

    def refresh(model):
        with torch.no_grad():
            model.bn1.running_mean.fill_(100.0)

    def forward(model, batch):
        if torch.is_grad_enabled():
            seen.append(model.bn1.running_mean.tolist())
        return model(batch[0])

    finetune_(
        model,
        lambda k: [poison, *BATCHES[:2]],
        epochs=2,
        monitor=MONITOR,
        recipe=FinetuneRecipe(statistics="train"),
        forward=forward,
        after_epoch=refresh,
    )
    assert seen[3] == seen[4] == [100.0] * 6  # before and after the poison of the second epoch
    assert seen[5] != seen[4]


# Example weights along the way

SHIFTED, SHIFTED_MONITOR = task(192, gain=0.7, shift=3.0), task(96, seed=2, gain=0.7, shift=3.0)


def test_weights_are_learned_per_channel_together_with_what_is_trained():
    found = Found(marked(tiny()))
    recipe = FinetuneRecipe(train="norms", example_weight="learn", epochs=3)
    tuned = finetune_(found.model, SHIFTED, monitor=SHIFTED_MONITOR, recipe=recipe)
    model = found.model
    assert tuned.best_epoch > 0
    assert tuned.trained == "norms and example weights"
    assert tuned.n_parameters == 2 * (6 + 8 + 10) + 6 + 8
    assert found.changed() >= NORMS
    for layer in (model.bn1, model.bn2):
        weight = layer.example_weight
        assert weight.shape == (layer.num_features,)
        assert bool(((weight >= 0) & (weight <= 1)).all())
        assert len(set(weight.tolist())) > 1
        assert not weight.requires_grad
        assert layer.live
    assert model.bn3.example_weight.item() == 0.0  # a single position
    assert not model.bn3.live
    assert not any(name.split(".")[-1] in STATISTICS for name in found.changed())
    kept = evaluate(model, SHIFTED_MONITOR)
    assert kept.nll == pytest.approx(tuned.curve[tuned.best_epoch].nll, rel=1e-6)
    flags = found._flags()
    assert flags[:3] == found.flags[:3]
    alone = finetune_(tiny(), SHIFTED, epochs=3, monitor=SHIFTED_MONITOR)
    assert tuned.curve[-1].nll < alone.curve[-1].nll


def test_learned_weights_start_from_those_there_are_and_stay_in_range_at_any_rate():
    model, seen = tiny(), []
    set_example_weight_(model, {"bn1": 0.4})

    def forward(model, batch):
        if torch.is_grad_enabled():
            seen.append([layer.example_weight.tolist() for layer in (model.bn1, model.bn2)])
        return model(batch[0])

    recipe = FinetuneRecipe(example_weight="learn", weight_lr=20.0)
    finetune_(model, SHIFTED, monitor=SHIFTED_MONITOR, recipe=recipe, forward=forward)
    assert seen[0] == [[pytest.approx(0.4)] * 6, [pytest.approx(0.05)] * 8]
    flat = [a for step in seen for layer in step for a in layer]
    assert min(flat) == 0.0
    assert max(flat) == 1.0


def test_weights_that_end_at_0_are_not_live():
    """Training and monitor alike want nothing but small weights."""
    model = tiny()

    def forward(model, batch):
        weights = model.bn1.example_weight.sum() + model.bn2.example_weight.sum()
        gain = 1 - weights if model.bn1.live else 0.0
        return 0 * model(batch[0]) + F.one_hot(batch[1], N_CLASSES) * gain

    recipe = FinetuneRecipe(example_weight="learn", weight_lr=0.2, epochs=3)
    tuned = finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe, forward=forward)
    assert tuned.best_epoch > 0
    assert model.bn1.example_weight.tolist() == [0.0] * 6
    assert not model.bn1.live
    assert not model.bn2.live


def test_only_the_layers_given_are_weighed():
    model = tiny()
    recipe = FinetuneRecipe(example_weight="learn", epochs=2)
    options = {"monitor": SHIFTED_MONITOR, "recipe": recipe}
    tuned = finetune_(model, SHIFTED, weighable={"bn2": model.bn2}, **options)
    assert tuned.best_epoch > 0
    assert (model.bn1.live, model.bn2.live) == (False, True)
    tuned = finetune_(tiny(), SHIFTED, weighable={}, **options)
    assert tuned.trained == "norms"


def test_if_learning_weights_does_not_help_they_are_as_they_were():
    found = Found(marked(tiny()))
    set_example_weight_(found.model, {"bn1": 0.3})
    found = Found(found.model)
    recipe = FinetuneRecipe(example_weight="learn", lr=0.0, weight_lr=1.0)
    wrong = [(x, (y + 1) % N_CLASSES) for x, y in SHIFTED]

    def forward(model, batch):
        out = model(batch[0])
        return out if torch.is_grad_enabled() else F.one_hot(batch[1], N_CLASSES).float()

    tuned = finetune_(found.model, wrong, monitor=SHIFTED_MONITOR, recipe=recipe, forward=forward)
    assert tuned.best_epoch == 0
    found.assert_still()


def test_weights_cannot_be_learned_with_trained_statistics_or_without_layers():
    recipe = FinetuneRecipe(example_weight="learn", statistics="train")
    with pytest.raises(ConfigError, match=r"--example-weight learn: .* --statistics frozen"):
        finetune_(tiny(), BATCHES, monitor=MONITOR, recipe=recipe)
    recipe = FinetuneRecipe(example_weight="learn")
    with pytest.raises(NormError, match=r"--example-weight learn: no GeneralizedBatchNorm .* swap"):
        finetune_(stock(), BATCHES, monitor=MONITOR, recipe=recipe)


# What goes wrong


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    "recipe",
    [
        FinetuneRecipe(train="all", lr=0.05),
        FinetuneRecipe(train="all", statistics="train", ghost_size=4),
        FinetuneRecipe(train="norms+head", example_weight="learn", optimizer="sgd"),
    ],
)
def test_an_exception_anywhere_leaves_the_model_as_it_was(recipe):
    found = Found(marked(tiny(dropout=0.3)))
    found.model.bn2.ghost_size = 3
    found = Found(found.model)
    calls = itertools.count()

    def counting(model, batch):
        next(calls)
        return model(batch[0])

    options = {"monitor": MONITOR, "recipe": recipe}
    work = copy.deepcopy(found.model)
    assert finetune_(work, BATCHES, forward=counting, **options).best_epoch > 0
    n = next(calls)
    for fatal in (0, 3, 5, 6, 9, 12, n // 2, n - 1):
        counter = itertools.count()

        def failing(model, batch, counter=counter, fatal=fatal):
            if next(counter) == fatal:
                raise StopError("now")
            return model(batch[0])

        # An error of somebody else's code reaches the caller as the cause of one line of ours.
        with pytest.raises(ModelError, match="StopError: now") as caught:
            finetune_(found.model, BATCHES, forward=failing, **options)
        assert isinstance(caught.value.__cause__, StopError)
        found.assert_still()

    def broken(k):
        yield from BATCHES[:3]
        if k == 1:
            raise KeyboardInterrupt("enough")
        yield from BATCHES[3:]

    with pytest.raises(KeyboardInterrupt, match="enough"):
        finetune_(found.model, broken, **options)
    found.assert_still()

    def after_epoch(model):
        raise StopError("after")

    with pytest.raises(StopError, match="after"):
        finetune_(found.model, BATCHES, after_epoch=after_epoch, **options)
    found.assert_still()


@pytest.mark.parametrize("statistics", ["frozen", "train"])
@pytest.mark.parametrize("make", [tiny, stock])
@pytest.mark.parametrize("where", [0, 2])
def test_steps_that_are_not_finite_are_left_out_and_counted(make, statistics, where):
    model, clean = make(), make()
    poison = (torch.full_like(BATCHES[0][0], math.nan), BATCHES[0][1])
    batches = [*BATCHES[:where], poison, *BATCHES[where:4]]
    recipe = FinetuneRecipe(train="all", statistics=statistics, epochs=2, optimizer="sgd")
    tuned = finetune_(model, batches, monitor=MONITOR, recipe=recipe)
    assert (tuned.n_steps, tuned.n_skipped_steps) == (8, 2)
    assert all(math.isfinite(point.nll) for point in tuned.curve)
    assert all(math.isfinite(point.loss) for point in tuned.curve[1:])
    assert tuned.best_epoch > 0
    assert all(bool(torch.isfinite(value).all()) for value in model.state_dict().values())
    if statistics == "train":
        assert int(model.bn1.num_batches_tracked) == 7 + 4 * tuned.best_epoch
    finetune_(clean, BATCHES[:4], monitor=MONITOR, recipe=recipe)
    # The same batches at somewhat other rates.
    torch.testing.assert_close(model.conv1.weight, clean.conv1.weight, rtol=0, atol=0.02)


@pytest.mark.parametrize("statistics", ["frozen", "train"])
def test_too_many_steps_in_a_row_that_are_not_finite_end_the_run(statistics):
    found = Found(marked(tiny()))
    poison = (torch.full_like(BATCHES[0][0], math.inf), BATCHES[0][1])
    recipe = FinetuneRecipe(train="all", statistics=statistics)
    batches = [*BATCHES, *[poison] * 10]
    with pytest.raises(NumericError, match=r"not finite in 10 steps in a row. Lower --lr"):
        finetune_(found.model, batches, monitor=MONITOR, recipe=recipe)
    found.assert_still()
    spread = [batch for clean in BATCHES[:2] for batch in (*[poison] * 9, clean)]
    tuned = finetune_(found.model, spread, epochs=1, monitor=MONITOR, recipe=recipe)
    assert (tuned.n_steps, tuned.n_skipped_steps) == (2, 18)


def test_outputs_that_are_not_finite_after_an_epoch_end_the_run():
    found = Found(marked(tiny()))
    trained = []

    def forward(model, batch):
        if torch.is_grad_enabled():
            trained.append(1)
            return model(batch[0])
        return model(batch[0]) * (math.nan if trained else 1)

    with pytest.raises(NumericError, match=r"after epoch 1 the outputs are not finite. Lower --lr"):
        finetune_(found.model, BATCHES, monitor=MONITOR, forward=forward)
    found.assert_still()
    with pytest.raises(NumericError, match="logits of example 0"):  # before: not our doing
        finetune_(found.model, BATCHES, monitor=MONITOR, forward=forward)


def test_labels_are_needed_and_must_fit():
    found = Found(tiny())
    bare = [x for x, _ in BATCHES]
    for batches, monitor, message in (
        (bare, MONITOR, "fine-tuning: a batch has no labels"),
        (BATCHES, bare, "batches: no labels"),
        (bare, None, "batches: no labels"),
        ([(x, y + 1) for x, y in BATCHES], MONITOR, "labels: from 1 to 3, expected 0 to 2"),
        ([(x, y.float()) for x, y in BATCHES], MONITOR, "labels: float32 of shape"),
    ):
        with pytest.raises(DataError, match=message):
            finetune_(found.model, batches, monitor=monitor)
        found.assert_still()


def test_too_few_batches_are_refused():
    with pytest.raises(DataError, match="batches: 1, expected at least 2"):
        finetune_(tiny(), BATCHES[:1])
    with pytest.raises(DataError, match="no examples"):
        finetune_(tiny(), BATCHES, monitor=[])
    with pytest.raises(DataError, match="fine-tuning: no examples"):
        finetune_(tiny(), BATCHES, monitor=[], recipe=FinetuneRecipe(train="head"))


def test_batches_that_run_dry_are_refused():
    once = iter(BATCHES)
    found = Found(tiny())
    with pytest.raises(DataError, match="fine-tuning: a pass over the batches gave none"):
        finetune_(found.model, lambda k: once, monitor=MONITOR)
    found.assert_still()
    with pytest.raises(DataError, match="fine-tuning: a pass over the batches gave none"):
        finetune_(found.model, [], monitor=MONITOR, recipe=FinetuneRecipe(steps=3))


def test_an_output_without_gradients_is_refused():
    found = Found(tiny())
    with pytest.raises(ModelError, match=r"--train norms: .* no gradient for the trained"):
        finetune_(found.model, BATCHES, monitor=MONITOR, forward=lambda m, b: m(b[0]).detach())
    found.assert_still()


# Batches


def test_generators_are_as_good_as_lists():
    one, other, third = tiny(), tiny(), tiny()
    recipe = FinetuneRecipe(train="norms+head")
    curve = finetune_(one, BATCHES, monitor=MONITOR, recipe=recipe).curve
    assert finetune_(other, iter(BATCHES), monitor=iter(MONITOR), recipe=recipe).curve == curve
    assert torch.equal(one.bn1.weight, other.bn1.weight)
    held_out = finetune_(third, iter(BATCHES), recipe=recipe)
    assert held_out.n_steps == 2 * 4  # batches 0 and 5 of six watch
    watched = evaluate(tiny(), [BATCHES[0], BATCHES[5]])
    assert held_out.curve[0].nll == pytest.approx(watched.nll, rel=1e-9)


def test_a_callable_gives_the_batches_of_each_epoch():
    asked = []

    def of_epoch(k):
        asked.append(k)
        return BATCHES[k:]

    tuned = finetune_(tiny(), of_epoch, epochs=2, monitor=MONITOR)
    assert asked[-3:] == [0, 1, 2]
    assert tuned.n_steps == 12  # two epochs of the first one's length


class Shuffled(torch.utils.data.IterableDataset):
    def __iter__(self):
        order = torch.randperm(len(BATCHES)).tolist()
        return iter([BATCHES[i] for i in order])


@pytest.mark.parametrize(
    "loader",
    [
        lambda: torch.utils.data.DataLoader(Shuffled(), batch_size=None),
        lambda: torch.utils.data.DataLoader(BATCHES, batch_size=None, shuffle=True),
    ],
)
def test_loaders_that_shuffle_do_so_by_the_seed(loader):
    """Also those whose length is not known, which must be gone through once to be counted."""

    def run():
        found = Found(tiny())
        tuned = finetune_(found.model, loader(), monitor=MONITOR)
        found.assert_restored()
        assert tuned.n_steps == 12
        return tuned.curve

    first = run()
    torch.rand(5)
    assert run() == first


def test_batches_with_names_of_their_own():
    def forward(model, batch):
        return model(batch["tokens"])

    def named(batches):
        return [{"tokens": x, "labels": y} for x, y in batches]

    one, other = tiny(), tiny()
    recipe = FinetuneRecipe(train="norms+head", statistics="train")
    curve = finetune_(one, BATCHES, monitor=MONITOR, recipe=recipe).curve
    tuned = finetune_(other, named(BATCHES), monitor=named(MONITOR), recipe=recipe, forward=forward)
    assert tuned.curve == curve


# Several batches a step


def stepped(batches, recipe, seed=0, make=tiny):
    model = make(seed)
    tuned = finetune_(model, batches, monitor=MONITOR[:1], recipe=recipe, epochs=1)
    return model, tuned


def whole(batches):
    return [tuple(torch.cat(parts) for parts in zip(*batches, strict=True))]


@pytest.mark.parametrize("statistics", ["frozen", "train"])
@pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 16, 8), (24, 8)])
def test_gathered_gradients_are_those_of_all_examples_in_one_batch(statistics, sizes):
    recipe = FinetuneRecipe(
        train="all", statistics=statistics, ghost_size=8 if statistics == "train" else None,
        optimizer="sgd", lr=1e-3, warmup=0, label_smoothing=0.1, clip=1e9,
    )  # fmt: skip
    x, y = whole(BATCHES)[0]
    parts = list(zip(x[: sum(sizes)].split(sizes), y[: sum(sizes)].split(sizes), strict=True))
    gathered, tuned = stepped(parts, dataclasses.replace(recipe, accumulate=len(parts)))
    together, reference = stepped(whole(parts), recipe)
    # One step of 1.9 times the gradient: what moved shows the gradient.
    start = dict(tiny().named_parameters())
    others = dict(together.named_parameters())
    for name, p in gathered.named_parameters():
        gradients = [(start[name] - q) / 1.9e-3 for q in (p, others[name])]
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=2e-4, msg=name)
        torch.testing.assert_close(p, others[name], rtol=0, atol=1e-6, msg=name)
    assert tuned.n_steps == reference.n_steps == 1
    assert tuned.curve[1].loss == pytest.approx(reference.curve[1].loss, rel=1e-5)


def test_outputs_and_gradients_are_equal_where_the_ghosts_are():
    x, y = whole(BATCHES[:4])[0]
    models = [tiny().double() for _ in range(2)]
    for model in models:
        model.train()
        for layer in (model.bn1, model.bn2, model.bn3):
            layer.ghost_size = 8
    outputs = models[0](x.double())
    F.cross_entropy(outputs, y).backward()
    pieces = []
    for part, labels in zip(x.double().split(16), y.split(16), strict=True):
        pieces.append(models[1](part))
        (F.cross_entropy(pieces[-1], labels) * len(labels) / len(y)).backward()
    torch.testing.assert_close(torch.cat(pieces), outputs, rtol=0, atol=1e-5)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-5)


def test_a_smaller_last_step_is_taken_with_the_batches_left():
    recipe = FinetuneRecipe(accumulate=4, statistics="train")
    model, tuned = stepped(BATCHES, recipe)
    assert len(BATCHES) == 6
    assert (tuned.n_steps, tuned.n_skipped_steps) == (2, 0)
    if tuned.best_epoch:
        assert int(model.bn1.num_batches_tracked) == 7 + 6
    limited = finetune_(
        tiny(), BATCHES, monitor=MONITOR, recipe=FinetuneRecipe(accumulate=4, steps=3)
    )
    assert limited.n_steps == 3


def test_running_moments_move_as_far_as_without_gathering():
    batch = BATCHES[0]
    moved = []
    for k in (1, 4):
        recipe = FinetuneRecipe(statistics="train", lr=0.0, accumulate=k, steps=1)
        model, seen = stock(), []

        def note(model, seen=seen):
            seen.append((model.bn1.momentum, model.bn1.running_mean.clone()))

        finetune_(model, [batch] * k, monitor=MONITOR, recipe=recipe, after_epoch=note)
        assert model.bn1.momentum == 0.1
        assert seen[0][0] == pytest.approx(1 - 0.9 ** (1 / k))
        moved.append(seen[0][1])
    torch.testing.assert_close(moved[0], moved[1])
    assert not torch.equal(moved[0], stock().bn1.running_mean)


def test_a_step_with_one_bad_batch_is_left_out_whole():
    poison = (torch.full_like(BATCHES[0][0], math.nan), BATCHES[0][1])
    recipe = FinetuneRecipe(train="all", statistics="train", accumulate=2)
    model, tuned = stepped([BATCHES[0], poison, *BATCHES[1:3]], recipe)
    assert (tuned.n_steps, tuned.n_skipped_steps) == (1, 1)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


# The moving average


def one_of_each(k):
    return [BATCHES[k]]


@pytest.mark.parametrize("learn", ["keep", "learn"])
def test_the_average_of_the_steps_is_evaluated_and_kept(learn):
    options = {"train": "all", "optimizer": "sgd", "lr": 0.01, "warmup": 0, "example_weight": learn}
    model, reference, path, averages = tiny(), tiny(), [], []

    def watch(model, into):
        into.append([p.detach().clone() for p in (*model.parameters(), model.bn1.example_weight)])

    recipe = FinetuneRecipe(steps=6, ema=0.3, **options)
    tuned = finetune_(
        model, one_of_each, monitor=MONITOR, recipe=recipe, after_epoch=lambda m: watch(m, averages)
    )
    plain = dataclasses.replace(recipe, ema=None)
    finetune_(
        reference, one_of_each, monitor=MONITOR, recipe=plain, after_epoch=lambda m: watch(m, path)
    )
    weight = torch.full((6,), 0.05) if learn == "learn" else torch.zeros(())
    expected = [*(p.detach() for p in tiny().parameters()), weight]
    for t, (state, average) in enumerate(zip(path, averages, strict=True), 1):
        decay = min(0.3, (1 + t) / (10 + t))
        expected = [decay * e + (1 - decay) * p for e, p in zip(expected, state, strict=True)]
        for e, found in zip(expected, average, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-4, atol=1e-6)
    assert tuned.best_epoch > 0
    for p, kept in zip(model.parameters(), averages[tuned.best_epoch - 1], strict=False):
        assert torch.equal(p, kept)
    assert evaluate(model, MONITOR).nll == pytest.approx(tuned.curve[tuned.best_epoch].nll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": -0.1}, "--clip: -0.1, expected at least 0"),
        ({"clip": math.nan}, "--clip: nan"),
        ({"accumulate": 0}, "--accumulate: 0, expected at least 1"),
        ({"ema": 1.0}, "--ema: 1.0, expected 0 to 1"),
        ({"ema": -0.5}, "--ema: -0.5"),
        ({"augment": "wild"}, "--augment: 'wild' is not known. Use one of: none, light, standard"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneRecipe(**options)


# Going on after an interrupt


STATES = [
    FinetuneRecipe(train="all", epochs=3),
    FinetuneRecipe(train="norms+head", example_weight="learn", epochs=3, optimizer="sgd", ema=0.8),
    FinetuneRecipe(train="all", statistics="train", ghost_size=8, epochs=3, accumulate=2, ema=0.9),
]


def shuffled(k):
    """The batches of pass k in an order that depends on torch's own generator."""
    order = torch.randperm(len(BATCHES)).tolist()
    return [BATCHES[i] for i in order]


def interrupted(n):
    """The same batches, with an interrupt in place of the n-th."""
    counter = itertools.count()

    def batches(k):
        order = shuffled(k)

        def go_through():
            for batch in order:
                if next(counter) == n:
                    raise KeyboardInterrupt("enough")
                yield batch

        return Sizable(go_through())

    return batches


class Sizable:
    def __init__(self, iterator):
        self.iterator = iterator

    def __iter__(self):
        return self.iterator

    def __len__(self):
        return len(BATCHES)


@pytest.mark.parametrize("recipe", STATES)
@pytest.mark.parametrize("n", [1, 5, 6, 9, 17])
def test_an_interrupted_run_goes_on_to_the_same_numbers(recipe, n, tmp_path):
    options = {"monitor": MONITOR, "recipe": recipe, "seed": 3}
    reference, found = tiny(dropout=0.3), Found(tiny(dropout=0.3))
    expected = finetune_(reference, shuffled, **options)
    with pytest.raises(KeyboardInterrupt, match="Run the same command again"):
        finetune_(found.model, interrupted(n), state=tmp_path / "a" / "b", **options)
    found.assert_still()
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["finetuning.pt"]
    for _ in range(2):  # it goes on to the end; and once more there is nothing left to do
        model = tiny(dropout=0.3)
        tuned = finetune_(model, shuffled, state=tmp_path / "a" / "b", **options)
        assert dataclasses.replace(tuned, seconds=0) == dataclasses.replace(expected, seconds=0)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, reference.state_dict()[name]), name
        assert model.bn1.live == reference.bn1.live
    assert expected.best_epoch > 0


def test_a_run_with_a_state_is_the_run_without(tmp_path):
    models = [tiny(dropout=0.3), tiny(dropout=0.3)]
    found = [
        finetune_(model, shuffled, monitor=MONITOR, recipe=STATES[1], state=state)
        for model, state in zip(models, (None, tmp_path), strict=True)
    ]
    assert dataclasses.replace(found[0], seconds=0) == dataclasses.replace(found[1], seconds=0)
    for a, b in zip(models[0].state_dict().values(), models[1].state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_a_signal_waits_for_the_end_of_the_step(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    steps = itertools.count()

    def forward(model, batch):
        if torch.is_grad_enabled() and next(steps) == 3:
            signal.raise_signal(signal.SIGINT)
        return model(batch[0])

    model, reference = tiny(), tiny()
    with pytest.raises(KeyboardInterrupt, match="holds the state"):
        finetune_(model, BATCHES, monitor=MONITOR, forward=forward, state=tmp_path)
    assert next(steps) == 4
    assert signal.getsignal(signal.SIGINT) is before
    finetune_(model, BATCHES, monitor=MONITOR, forward=forward, state=tmp_path)
    assert next(steps) == 4 + 1 + 2 * len(BATCHES) - 4
    finetune_(reference, BATCHES, monitor=MONITOR)
    torch.testing.assert_close(model.state_dict(), reference.state_dict(), rtol=0, atol=0)


def test_the_state_of_another_run_or_no_state_at_all_is_refused(tmp_path):
    options = {"monitor": MONITOR, "recipe": STATES[0], "state": tmp_path}
    finetune_(tiny(), BATCHES, **options)
    other = tiny()
    with torch.no_grad():
        other.fc.bias[0] += 1e-6
    for model, change in (
        (other, {}),
        (tiny(), {"seed": 1}),
        (tiny(), {"recipe": FinetuneRecipe(train="all", epochs=3, lr=0.1)}),
        (tiny(), {"identity": "other data"}),
    ):
        found = Found(model)
        with pytest.raises(CheckpointError, match="is the state of another run"):
            finetune_(model, BATCHES, **{**options, **change})
        found.assert_still()
    path = tmp_path / "finetuning.pt"
    content = torch.load(path, weights_only=True)
    for broken in ({"points": [[1]]}, {"model": {}}, {"run": None}, {"random": [torch.zeros(3)]}):
        torch.save({**content, **broken}, path)
        with pytest.raises(CheckpointError, match="is damaged"):
            finetune_(tiny(), BATCHES, **options)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="not a run state"):
        finetune_(tiny(), BATCHES, **options)
    path.write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CheckpointError, match=r"pickle|not a"):
        finetune_(tiny(), BATCHES, **options)
    path.unlink()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="file is not a folder"):
        finetune_(tiny(), BATCHES, **{**options, "state": tmp_path / "file"})


def test_a_state_is_checked_before_any_work(cli, files, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "cut").mkdir()
    words = ["finetune", files.net, *files.common, "--data", files.data]
    for more, out in ((["--steps", "2"], "a"), (["--steps", "2"], "b"), (["--plan"], "c")):
        state = tmp_path / ("cut" if out == "b" else "file")
        if out == "b":
            assert cli(*words, *more, "-o", tmp_path / "o.safetensors", "--state", state).code == 0
            whole = (state / "finetuning.pt").read_bytes()
            (state / "finetuning.pt").write_bytes(whole[: len(whole) // 2])
        done = cli(*words, *more, "-o", tmp_path / f"{out}.safetensors", "--state", state)
        said = "is not a folder" if out != "b" else "Delete it to start over, or give another"
        assert said in done.message
        assert done.err.endswith("See bnfix help output.\n")


class Runs:
    def __reduce__(self):
        return pytest.fail, ("code from a file was run",)


# The commands


def test_options_of_the_step_reach_it(cli, files, tmp_path):
    words = ["finetune", files.net, *files.common, "--data", files.data, "--json"]
    given = ["--accumulate", 3, "--clip", 1, "--ema", 0.9, "--augment", "light", "--batch-size", 20]
    found = cli(*words, *given, "-o", tmp_path / "a.safetensors").json
    # 180 images, 144 to tune on, 115 to learn: 6 batches, 2 steps an epoch.
    assert [point["step"] for point in found["training_curve"][0]["curve"]] == [0, 2, 4]
    options = found["options"]["finetune"]
    assert [options[name] for name in ("accumulate", "clip", "ema", "augment")] == [
        3, 1, 0.9, "light",
    ]  # fmt: skip
    refused = cli(*words, "--clip", -1, "-o", tmp_path / "b.safetensors")
    assert refused.code == 2
    assert "--clip: -1.0, expected at least 0" in refused.message


def test_a_training_without_a_better_epoch_is_said(cli, files, tmp_path):
    words = ["finetune", files.net, *files.common, "--data", files.data, "--lr", 50, "--json"]
    found = cli(*words, "-o", tmp_path / "a.safetensors").json
    assert found["models"][1]["name"] == "output: as it was"
    assert "no epoch was better on the validation split" in " ".join(found["assumptions"])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--ghost-size", 4), "--ghost-size was stored without effect"),
        (("--norm-decay", 0.1), "--norm-decay: without --norm-decay-target"),
        (("--skip", "*"), "--layers and --skip select the layers to swap, not those to train"),
        (("--ignore-index", 3), "--ignore-index had no effect"),
    ],
)
def test_an_option_without_effect_is_said_before_any_work(cli, files, tmp_path, given, said):
    words = ["finetune", files.net, *files.common, "--data", files.data, "--json", "--plan"]
    for options, is_said in ((given, True), ((), False)):
        found = cli(*words, *options, "-o", tmp_path / "a.safetensors").json
        assert any(note.startswith(said) for note in found["assumptions"]) is is_said


def test_the_state_of_a_command_is_of_its_data_too(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["finetune", files.net, *files.common, "--state", tmp_path / "state", "--json"]

    def go(data):
        outcome = cli(*words, "--data", data, "-o", out, "--force")
        return outcome, out.read_bytes()

    (first, a), (again, b) = go(files.data), go(files.data)
    assert first.code == again.code == 0
    assert a == b
    assert "is the state of another run" in go(files.test)[0].message


def test_a_candidate_that_diverges_does_not_end_fix(cli, files, tmp_path):
    spec = tmp_path / "diverging.py"
    spec.write_text(
        (files.folder / "nets.py").read_text()
        + "\nclass Diverging(Net):\n"
        + "    def forward(self, x):\n"
        + "        return super().forward(x) * (float('nan') if torch.is_grad_enabled() else 1)\n"
        + "\ndef diverging():\n    return Diverging(3)\n"
    )
    out = tmp_path / "out.safetensors"
    found = cli(
        "fix", files.stale, "--model", f"{spec}:diverging", *files.common[2:], "--data", files.data,
        "--example-weight", "keep", "--epochs", 6, "-o", out, "--json",
    ).json  # fmt: skip
    notes = " ".join(found["assumptions"])
    assert "given up: fine-tuning: loss or gradient was not finite" in notes
    assert out.exists()
    assert all(math.isfinite(model["nll"]) for model in found["models"])
