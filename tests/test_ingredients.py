"""Ingredients of fine-tuning: each against its formula, and nothing changed where it is off."""

import copy
import math

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from bnfix import GeneralizedBatchNorm, finetune_
from bnfix.core.errors import ConfigError, NormError, NumericError
from bnfix.core.settings import FinetuneRecipe
from bnfix.norm.moments import over_runs
from bnfix.training.parameters import norm_roles
from tests.test_finetuning import BATCHES, MONITOR, NORMS, Found, stock, tiny

# Exclusive statistics


def exclusive(c, **options):
    layer = GeneralizedBatchNorm(c, dtype=torch.float64, **options).train()
    layer.exclusive = True
    return layer


def others_of(x, i, run, group):
    """Moments of all values of a channel group in the other examples of a run."""
    values = np.concatenate([x[j][group].ravel() for j in run if j != i])
    return values.mean(), values.var()


@given(
    n=st.integers(2, 7),
    groups=st.sampled_from([1, 2, 4]),
    ghost=st.sampled_from([None, 2, 3, 100]),
    size=st.sampled_from([(), (1,), (5,), (3, 2)]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_exclusive_statistics_are_those_of_the_others(n, groups, ghost, size, seed):
    if n // (1 if ghost is None else -(-n // ghost)) < 2:
        return
    x = np.random.default_rng(seed).normal(3, 2, (n, 4, *size))
    layer = exclusive(4, channel_groups=groups, ghost_size=ghost)
    y = layer(torch.from_numpy(x)).detach().numpy()
    runs = np.array_split(np.arange(n), 1 if ghost is None else -(-n // ghost))
    for run in runs:
        for i in run:
            for group in np.split(np.arange(4), groups):
                mean, var = others_of(x, i, run, group)
                expected = (x[i, group] - mean) / np.sqrt(var + layer.eps)
                np.testing.assert_allclose(y[i, group], expected, rtol=1e-7, atol=1e-7)


def test_the_moments_of_the_others_have_no_gradient_in_an_example():
    x = torch.randn(5, 3, 4, dtype=torch.float64, requires_grad=True)
    mean, var = x.mean(2), x.var(2, correction=0)
    run_mean, run_var = over_runs(mean, var, 1, exclusive(3).channel_groups, exclusive=True)
    for i in range(5):
        for moment in (run_mean, run_var):
            (grad,) = torch.autograd.grad(moment[i].sum(), x, retain_graph=True)
            assert grad[i].abs().max() < 1e-15
            assert grad[:i].abs().sum() + grad[i + 1 :].abs().sum() > 0


def test_two_examples_swap_their_moments():
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    y = exclusive(3)(x)
    other = x.flip(0)
    mean, var = other.mean(2, keepdim=True), other.var(2, correction=0, keepdim=True)
    torch.testing.assert_close(y, (x - mean) / (var + 1e-5).sqrt())


def test_exclusive_float32_rows_agree_with_float64():
    x = torch.randn(6, 8, 16, 16) * 2 + 1
    layer = GeneralizedBatchNorm(8, ghost_size=3).train()
    layer.exclusive = True
    torch.testing.assert_close(
        layer(x).double(), exclusive(8, ghost_size=3)(x.double()), rtol=1e-4, atol=1e-5
    )


def test_a_single_example_has_no_others():
    with pytest.raises(NumericError, match="more than 1 example per ghost batch with exclusive"):
        exclusive(3, ghost_size=1)(torch.randn(4, 3, 5, dtype=torch.float64))


def test_exclusive_training_sets_the_layers_for_its_time_only():
    model = tiny()
    seen = []
    model.bn1.register_forward_hook(lambda m, *_: seen.append((m.training, m.exclusive)))
    recipe = FinetuneRecipe(statistics="train", batch_statistics="exclusive", steps=1)
    finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe)
    assert (True, True) in seen
    assert not model.bn1.exclusive
    with pytest.raises(NormError, match=r"--batch-statistics: .*no GeneralizedBatchNorm"):
        finetune_(stock(), BATCHES, monitor=MONITOR, recipe=recipe)


# Ghost noise


class Plain(nn.Module):
    def __init__(self, c=64):
        super().__init__()
        self.norm = nn.BatchNorm2d(c, affine=False)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return self.norm(x) * self.scale


def noisy(n, size, seed=0):
    """Outputs of a layer under ghost noise in a training step, and without it."""
    torch.manual_seed(seed)
    model = Plain()
    x = torch.randn(n, 64, 2, 2)
    plain = model.eval()(x).detach()
    seen = []

    def forward(model, batch):
        out = model(batch[0])
        seen.append(out.detach())
        return out.mean((2, 3))[:, :3]

    batch = (x, torch.zeros(n, dtype=torch.long))
    recipe = FinetuneRecipe(ghost_noise=size, train="all", steps=1, lr=1e-9)
    finetune_(model, [batch], monitor=[batch], recipe=recipe, forward=forward, seed=seed)
    assert torch.equal(seen[0], plain)  # no noise in evaluation
    return plain, seen[1]


@pytest.mark.parametrize("size", [2, 5, 32])
def test_ghost_noise_has_the_spread_of_ghost_moments(size):
    plain, seen = noisy(400, size)
    # With s = plain/seen slopes over positions, per example and channel.
    spread = (plain - plain.mean((2, 3), keepdim=True)).square().sum((2, 3))
    slope = spread / (
        (plain - plain.mean((2, 3), keepdim=True)) * (seen - seen.mean((2, 3), keepdim=True))
    ).sum((2, 3))
    shift = (plain - slope[..., None, None] * seen).mean((2, 3)).flatten()
    n = shift.numel()
    assert abs(shift.mean()) < 5 / math.sqrt(n * size)
    assert shift.var() == pytest.approx(1 / size, rel=0.05)
    squared = slope.square().flatten()
    assert squared.mean() == pytest.approx(1, abs=5 * math.sqrt(2 / (size - 1) / n))
    assert squared.var() == pytest.approx(2 / (size - 1), rel=0.1)


def test_ghost_noise_vanishes_as_ghosts_grow():
    plain, seen = noisy(8, 10**8)
    torch.testing.assert_close(seen, plain, rtol=1e-2, atol=1e-2)


# Consistency


@pytest.mark.parametrize("statistics", ["frozen", "train"])
def test_consistency_adds_the_gaps_of_every_layer_to_the_loss(statistics):
    factors = (0.3, 0.7)
    runs = {}
    for consistency in (None, factors):
        recipe = FinetuneRecipe(
            steps=1, statistics=statistics, consistency=consistency, train="all"
        )
        model = tiny()
        runs[consistency] = finetune_(model, [BATCHES[0]], monitor=MONITOR, recipe=recipe)
    met = {}
    model = tiny().train(statistics == "train")
    for name in ("bn1", "bn2", "bn3"):
        layer = getattr(model, name)
        stored = layer.running_mean.double().numpy(), layer.running_var.double().numpy()
        layer.register_forward_pre_hook(_keeper(met, name, stored))
    model(BATCHES[0][0])
    total = 0.0
    for x, (mean, var) in met.values():
        values = np.moveaxis(x, 1, 0).reshape(x.shape[1], -1)
        sd = np.sqrt(values.var(1) + 1e-5)
        total += factors[0] * np.mean(np.abs(mean - values.mean(1)) / sd)
        total += factors[1] * np.mean(np.abs(np.sqrt(var + 1e-5) / sd - 1))
    plain, penal = (runs[key].curve[1].loss for key in (None, factors))
    assert total > 0.1
    assert penal - plain == pytest.approx(total, rel=1e-4)


def _keeper(met, name, stored):
    def keep(_, inputs):
        met[name] = inputs[0].detach().double().numpy(), stored

    return keep


# Sharpness


def sharp_step(length, train="norms"):
    model = tiny()
    before = copy.deepcopy(model)
    recipe = FinetuneRecipe(
        train=train, optimizer="sgd", lr=0.01, warmup=0, steps=1, sharpness=length
    )
    tuned = finetune_(model, [BATCHES[0]], monitor=[BATCHES[0]], recipe=recipe)
    assert tuned.best_epoch == 1
    return before, model


def test_a_sharpness_aware_step_takes_gradients_uphill_of_the_norms():
    rho = 0.2
    before, after = sharp_step(rho, train="all")
    x, y = BATCHES[0]
    own = dict(before.named_parameters())
    F.cross_entropy(before(x), y).backward()
    norm = math.sqrt(sum(float(own[name].grad.square().sum()) for name in NORMS))
    uphill = copy.deepcopy(before)
    with torch.no_grad():
        for name, p in uphill.named_parameters():
            if name in NORMS:
                p.add_(own[name].grad * rho / norm)
    uphill.zero_grad()
    F.cross_entropy(uphill(x), y).backward()
    there = dict(uphill.named_parameters())
    for name, p in after.named_parameters():
        expected = own[name] - 0.01 * 1.9 * there[name].grad
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-6)


def test_running_moments_follow_the_first_pass_only():
    moments = []
    for length in (0.0, 0.5):
        model = tiny()
        recipe = FinetuneRecipe(statistics="train", sharpness=length, steps=1, lr=1e-6)
        finetune_(model, [BATCHES[0]], monitor=[BATCHES[0]], recipe=recipe, after_epoch=_lower)
        moments.append((model.bn1.running_mean.clone(), int(model.bn1.num_batches_tracked)))
    assert torch.equal(moments[0][0], moments[1][0])
    assert moments[0][1] == moments[1][1]


def _lower(model):
    """Make the epoch the best one whatever it learned."""
    with torch.no_grad():
        model.fc.weight.zero_()
        model.fc.bias.zero_()


def test_sharpness_needs_norms_to_train():
    with pytest.raises(ConfigError, match="--sharpness: --train head trains no gamma or beta"):
        sharp_step(0.1, train="head")


# Options that are off


@pytest.mark.parametrize("statistics", ["frozen", "train"])
def test_ingredients_of_size_0_change_no_bit(statistics):
    models = []
    for extra in ({}, {"sharpness": 0.0, "consistency": (0.0, 0.0), "norm_decay": "last=0"}):
        model = tiny(dropout=0.2)
        recipe = FinetuneRecipe(statistics=statistics, epochs=2, norm_decay_target="identity")
        recipe = FinetuneRecipe(**{**recipe.__dict__, **extra})
        finetune_(model, BATCHES, monitor=MONITOR, recipe=recipe)
        models.append(model.state_dict())
    for name, value in models[0].items():
        assert torch.equal(value, models[1][name]), name


@pytest.mark.parametrize(
    "recipe",
    [
        FinetuneRecipe(ghost_noise=4),
        FinetuneRecipe(consistency=(0.1, 0.1)),
        FinetuneRecipe(sharpness=0.1),
        FinetuneRecipe(statistics="train", batch_statistics="exclusive", ghost_size=4),
    ],
)
def test_a_failing_run_with_ingredients_leaves_all_as_it_was(recipe):
    broken = [*BATCHES[:2], (torch.randn(4, 1, 6, 6), torch.tensor([9, 0, 0, 0]))]
    found = Found(tiny())
    with pytest.raises(Exception, match="labels"):
        finetune_(found.model, broken, monitor=MONITOR, recipe=recipe)
    found.assert_still()
    assert not any(layer._forward_pre_hooks for layer in found.model.modules())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"ghost_noise": 1}, "--ghost-noise: 1, expected at least 2"),
        (
            {"ghost_noise": 4, "statistics": "train"},
            "--ghost-noise: with --statistics train, batches have their own noise",
        ),
        ({"batch_statistics": "exclusive"}, "--batch-statistics exclusive: needs batch statistics"),
        (
            {"batch_statistics": "exclusive", "statistics": "train", "ghost_size": 1},
            "--batch-statistics exclusive: --ghost-size is 1, so .*expected at least 2",
        ),
        ({"batch_statistics": "some"}, "--batch-statistics: 'some' is not known"),
        ({"consistency": (0.1,)}, "--consistency: .*expected two numbers"),
        ({"sharpness": -1.0}, "--sharpness: -1.0, expected 0 to 1000"),
        ({"norm_decay": "first=0.1"}, "--norm-decay: first=0.1, expected .*last, shortcut"),
        ({"norm_decay": "last=0.1,last=0.2"}, "--norm-decay: last=0.1,last=0.2, expected"),
        ({"norm_decay": "last=x"}, "--norm-decay: last=x, expected"),
        ({"norm_decay": -0.1}, "--norm-decay: -0.1, expected"),
    ],
)
def test_settings_are_refused(wrong, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneRecipe(**wrong)


# Roles

M = torchvision.models
_SIMPLE = {"resnet18": "bn2", "resnet34": "bn2"}
_DEEP = ("resnet50", "resnet101", "wide_resnet50_2", "resnext50_32x4d")
_LAST = {
    **_SIMPLE,
    **dict.fromkeys(_DEEP, "bn3"),
    **dict.fromkeys(("regnet_x_400mf", "regnet_x_800mf", "regnet_y_400mf"), "f.c.1"),
    **dict.fromkeys(("regnet_y_800mf", "regnet_y_1_6gf", "regnet_x_1_6gf"), "f.c.1"),
}
#: Architectures whose shortcuts are all identities, and how many branches they have.
_BRANCHES = {
    "mobilenet_v2": 10, "mobilenet_v3_small": 6, "mobilenet_v3_large": 10, "mnasnet0_5": 10,
    "mnasnet0_75": 10, "mnasnet1_0": 10, "efficientnet_b0": 9, "efficientnet_b1": 16,
    "efficientnet_b2": 16, "efficientnet_v2_s": 35,
}  # fmt: skip
#: Those without residual branches.
_NONE = (
    "vgg11_bn", "vgg13_bn", "vgg16_bn", "shufflenet_v2_x0_5", "shufflenet_v2_x1_0", "densenet121",
    "densenet169", "googlenet",
)  # fmt: skip


def roles_of(name):
    options = {"init_weights": False} if name in ("googlenet", *_NONE[:3]) else {}
    kinds = {"device": "cpu"} if name.startswith("regnet") else {"device": "meta"}
    with torch.device(kinds["device"]):
        model = getattr(M, name)(weights=None, **options).eval()
    names = {module: key for key, module in model.named_modules()}
    return {names[layer]: role for layer, role in norm_roles(model).items()}


@pytest.mark.parametrize("name", _LAST)
def test_roles_in_networks_with_projected_shortcuts(name):
    found = roles_of(name)
    last = [key for key, role in found.items() if role == "last"]
    shortcuts = [key for key, role in found.items() if role == "shortcut"]
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        names = [key for key, _ in getattr(M, name)(weights=None).named_modules()]
    assert set(last) == {key for key in names if key.endswith("." + _LAST[name])}
    expected = {key for key in names if key.endswith((".downsample.1", ".proj.1"))}
    assert set(shortcuts) == expected
    assert list(found.values()).count("stem") == 1


@pytest.mark.parametrize("name", _BRANCHES)
def test_roles_in_networks_with_identity_shortcuts(name):
    found = list(roles_of(name).values())
    assert found.count("last") == _BRANCHES[name]
    assert "shortcut" not in found


@pytest.mark.parametrize("name", _NONE)
def test_roles_in_networks_without_branches(name):
    assert set(roles_of(name).values()) == {"stem"}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
        self.a, self.norm_a = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.b, self.norm_b = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.short, self.norm_s = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = self.norm_b(self.b(F.relu(self.norm_a(self.a(x)))))
        return self.fc(F.relu(y + self.norm_s(self.short(x))).mean((2, 3)))


def test_each_role_decays_by_its_own():
    torch.manual_seed(0)
    model = Residual()
    for module in (model.norm, model.norm_a, model.norm_b, model.norm_s):
        nn.init.constant_(module.weight, 2.0)
    recipe = FinetuneRecipe(
        steps=1, warmup=0, optimizer="sgd", lr=0.5, norm_decay="last=0.4,shortcut=0.2,other=0.1",
        norm_decay_target="zero",
    )  # fmt: skip

    def forward(model, batch):
        if torch.is_grad_enabled():
            return 0 * model(batch[0])
        return F.one_hot(batch[1], 3) * (9 - model.norm_b.weight.sum().item())

    finetune_(model, [BATCHES[0]], monitor=[BATCHES[0]], recipe=recipe, forward=forward)
    left = {
        name: getattr(model, name).weight[0].item() / 2
        for name in ("norm_b", "norm_s", "norm_a", "norm")
    }
    assert left == pytest.approx({"norm_b": 0.8, "norm_s": 0.9, "norm_a": 0.95, "norm": 0.95})


def test_roles_of_a_network_without_a_graph_are_refused():
    class Branching(Residual):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    with pytest.raises(ConfigError, match="--norm-decay: roles need the network's graph"):
        norm_roles(Branching())


def test_the_plan_names_the_ingredients(cli, files, tmp_path):
    words = ["finetune", files.net, "--data", files.data, *files.common, "--plan", "--json"]
    words += ["--ghost-noise", 8, "--sharpness", 0.05, "-o", tmp_path / "out.safetensors"]
    (stage,) = cli(*words).json["stages"]
    assert stage.endswith("epochs, ghost noise, sharpness")
