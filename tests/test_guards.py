import random

import numpy as np
import pytest
import torch
from torch import nn

from bnfix import choose_example_weight_, evaluate, finetune_, recalibrate_, residuals, swap_norms_
from bnfix.core import guards
from bnfix.core.settings import FinetuneRecipe
from tests import nets


class InTheMiddleError(Exception):
    pass


def mixed_modes():
    net = nets.residual().train()
    net.layer1.eval()
    net.layer2.bn1.eval()
    net.fc.train()
    return net


def modes(net):
    return [(name, module.training) for name, module in net.named_modules()]


@pytest.mark.parametrize("guard", [guards.modes_kept, guards.inference])
@pytest.mark.parametrize("error", [None, InTheMiddleError, KeyboardInterrupt])
def test_modes_come_back_per_module(guard, error):
    net = mixed_modes()
    before = modes(net)

    def work():
        with guard(net):
            net.train()
            net.fc.eval()
            if error is not None:
                raise error("now")

    if error is None:
        work()
    else:
        with pytest.raises(error, match="now"):
            work()
    assert modes(net) == before
    assert len(set(before)) > 2


def test_a_module_with_its_own_train_is_put_back_by_its_flag():
    class Stubborn(nn.Module):
        def train(self, mode=True):
            return super().train(False)

    net = nn.Sequential(Stubborn())
    net[0].training = True
    with guards.inference(net):
        assert not net[0].training
    assert net[0].training


def test_inference_is_evaluation_without_gradients():
    net = nets.with_dropout()
    x = torch.randn(2, 3, 4, 4)
    with guards.inference(net):
        assert not any(module.training for module in net.modules())
        assert torch.equal(net(x), net(x))
        assert not net(x).requires_grad
    assert torch.is_grad_enabled()
    assert net(x).requires_grad


@pytest.mark.parametrize("fails", [False, True])
def test_only_these_require_grad(fails):
    net = nets.plain()
    net.fc.bias.requires_grad_(False)
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    flags = [p.requires_grad for p in net.parameters()]
    grads = [p.grad for p in net.parameters()]
    values = [None if g is None else g.clone() for g in grads]
    extra = torch.zeros(3)

    def work():
        with guards.only_these_require_grad(net, [net.bn1.weight, extra]):
            wanted = [n for n, p in net.named_parameters() if p.requires_grad]
            assert wanted == ["bn1.weight"]
            (net(torch.randn(2, 3, 4, 4)) + extra).sum().backward()
            assert net.bn1.weight.grad is not None
            assert extra.grad is not None
            assert net.conv1.weight.grad is None
            if fails:
                raise InTheMiddleError("now")

    if fails:
        with pytest.raises(InTheMiddleError, match="now"):
            work()
    else:
        work()
    assert [p.requires_grad for p in net.parameters()] == flags
    assert not extra.requires_grad
    assert extra.grad is None
    for p, grad, value in zip(net.parameters(), grads, values, strict=True):
        assert p.grad is grad
        # backward adds in place: the tensor that comes back must hold what it held
        assert grad is None or torch.equal(grad, value)


@pytest.mark.parametrize("error", [None, InTheMiddleError, KeyboardInterrupt])
def test_hooks_are_removed(error):
    net = nets.plain()
    kept = net.bn1.register_forward_hook(lambda *_: None)
    seen = []

    def work():
        with guards.hooks() as handles:
            handles.append(net.bn1.register_forward_hook(lambda *_: seen.append("bn1")))
            handles.append(net.fc.register_forward_pre_hook(lambda *_: seen.append("fc")))
            net(torch.randn(2, 3, 4, 4))
            if error is not None:
                raise error("now")

    if error is None:
        work()
    else:
        with pytest.raises(error, match="now"):
            work()
    net(torch.randn(2, 3, 4, 4))
    assert seen == ["bn1", "fc"]
    assert list(net.bn1._forward_hooks) == [kept.id]
    assert not net.fc._forward_pre_hooks


def test_seeded_inside_and_untouched_outside():
    torch.manual_seed(5)
    expected = torch.rand(4)
    torch.manual_seed(5)
    first = torch.rand(2)
    with guards.seeded(1):
        a = torch.rand(3)
    with guards.seeded(1):
        b = torch.rand(3)
    with guards.seeded(2):
        c = torch.rand(3)

    def fail():
        with guards.seeded(3):
            torch.rand(7)
            raise InTheMiddleError("now")

    with pytest.raises(InTheMiddleError, match="now"):
        fail()
    assert torch.equal(torch.cat([first, torch.rand(2)]), expected)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_snapshot_puts_back_values_into_the_same_tensors():
    net = nets.lived_in(nets.residual())
    net.train()
    tensors = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    values = {name: t.detach().clone() for name, t in tensors.items()}
    eps, momentum = net.bn1.eps, net.bn1.momentum
    snapshot = guards.Snapshot(net)
    with torch.no_grad():
        for t in tensors.values():
            t.add_(1)
    net.bn1.eps, net.bn1.momentum = 0.5, None
    net.eval()
    for _ in range(2):  # a snapshot serves more than once
        snapshot.restore_()
        now = {**dict(net.named_parameters()), **dict(net.named_buffers())}
        for name, t in tensors.items():
            assert now[name] is t
            assert torch.equal(t, values[name]), name
        assert (net.bn1.eps, net.bn1.momentum) == (eps, momentum)
        assert not net.training
        with torch.no_grad():
            net.conv1.weight.zero_()


def test_a_snapshot_puts_replaced_tensors_back_into_their_places():
    net = nets.plain()
    gamma, mean = net.bn1.weight, net.bn1.running_mean
    snapshot = guards.Snapshot(net)
    net.bn1.weight = nn.Parameter(torch.zeros(4))
    net.bn1.running_mean = torch.full((4,), 9.0)
    net.bn2.weight = None
    snapshot.restore_()
    assert net.bn1.weight is gamma
    assert net.bn1.running_mean is mean
    assert net.bn2.weight is not None
    torch.testing.assert_close(net.bn1.weight.detach(), torch.ones(4))


def test_a_snapshot_knows_absent_and_tied_tensors():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3, affine=False))
    net[1].weight = net[0].weight
    value = net[0].weight.detach().clone()
    snapshot = guards.Snapshot(net)
    with torch.no_grad():
        net[0].weight.zero_()
    snapshot.restore_()
    assert net[1].weight is net[0].weight
    assert torch.equal(net[0].weight, value)
    assert net[2].weight is None


def test_a_snapshot_leaves_later_hooks_working():
    net = nets.plain()
    snapshot = guards.Snapshot(net)
    seen = []
    net.bn1.register_full_backward_hook(lambda *_: seen.append("back"))
    snapshot.restore_()
    net(torch.randn(2, 3, 4, 4)).sum().backward()
    assert seen == ["back"]


class Busy(nn.Module):
    """Writes to itself in forward, in every way there is."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm2d(3)
        self.register_buffer("input_mean", torch.full((3,), 0.5))
        self.register_buffer("late", None)
        self.n_steps, self.cache, self.seen, self.plain = (
            0,
            {"x": torch.zeros(2)},
            [],
            torch.ones(2),
        )

    def forward(self, x):
        self.input_mean.lerp_(x.mean((0, 2, 3)), 0.5)
        self.late = x.mean()
        self.n_steps += 1
        self.cache["x"] += 1
        self.cache["y"] = x
        self.seen.append(x.shape)
        self.plain.data.mul_(2)
        self.skip = x
        return self.bn(x - self.input_mean[:, None, None]) + 0 * torch.rand(())


def test_what_forward_changes_by_itself_is_put_back_and_named():
    net = nn.Sequential(Busy())
    inner, before = net[0], dict(vars(net[0]))
    torch.manual_seed(0)
    state = torch.get_rng_state()
    with guards.inference(net) as changed:
        net(torch.randn(2, 3, 4, 4))
    wanted = {"input_mean", "late", "n_steps", "cache", "seen", "plain", "skip"}
    assert set(changed) == {f"0.{name}" for name in wanted}
    assert len(changed) == len(wanted)
    assert vars(inner) == before
    assert inner.late is None
    assert inner.seen == []
    assert inner.input_mean.tolist() == [0.5] * 3
    assert inner.plain.tolist() == [1, 1]
    assert list(inner.cache) == ["x"]
    assert inner.cache["x"].tolist() == [0, 0]
    assert torch.equal(torch.get_rng_state(), state)
    with guards.inference(net) as changed:
        pass
    assert changed == []


def test_what_trains_is_not_put_back_nor_what_shares_its_memory():
    net = Busy()
    net.weights, net.means = [net.bn.weight.data], [net.bn.running_mean]
    with guards.state_kept(net, but=[net.bn]) as changed:
        net.bn.weight.data.fill_(3)
        net.train()(torch.randn(2, 3, 4, 4) + 5)
    assert net.bn.weight.tolist() == [3] * 3
    assert net.bn.num_batches_tracked == 1
    assert "bn.running_mean" not in changed
    assert net.input_mean.tolist() == [0.5] * 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
@pytest.mark.parametrize("kind", ["lazy", "built", "scripted", "nan"])
def test_a_model_that_builds_itself_stays_built(kind):
    class Builds(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = None

        def forward(self, x):
            if self.fc is None:
                self.fc, self.n = nn.Linear(x.shape[1], 2), 1
            return self.fc(x)

    net = {"lazy": nn.Sequential(nn.LazyLinear(2), nn.LazyBatchNorm1d()), "built": Builds()}.get(
        kind, nn.Sequential(nn.BatchNorm1d(4))
    )
    if kind == "nan":
        net[0].running_mean.fill_(torch.nan)
    if kind == "scripted":
        net = torch.jit.script(net.eval())
    x = torch.randn(3, 4)
    with guards.inference(net) as changed:
        first = net(x)
    net.eval()
    assert changed == []
    assert torch.equal(net(x), first) or kind == "nan"


class Drifting(nn.Module):
    """Subtracts a running mean of its inputs, which it moves in every forward pass."""

    def __init__(self):
        super().__init__()
        self.register_buffer("input_mean", torch.full((3, 1, 1), 0.5))
        self.inner, self.n, self.log = nets.plain(), 0, []

    def forward(self, x):
        self.input_mean = self.input_mean.lerp(x.mean((0, 2, 3))[:, None, None], 0.5)
        self.n += 1
        self.log.append(float(x.sum()))
        noise = torch.randn(()) + np.random.normal() + random.random()
        return self.inner(x - self.input_mean + 0.01 * noise)


@pytest.mark.parametrize("task", ["evaluate", "recalibrate", "choose", "finetune", "residuals"])
def test_every_function_leaves_all_other_state_as_it_was(task):
    net = Drifting()
    swap_norms_(net)
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(24, 3, 6, 6, generator=generator), torch.arange(24) % 3
    batches = [(x[i : i + 8], y[i : i + 8]) for i in (0, 8, 16)]
    mean, value = net.input_mean, net.input_mean.clone()
    torch.manual_seed(2)
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    done = {
        "evaluate": lambda: evaluate(net, batches),
        "recalibrate": lambda: recalibrate_(net, batches, feed="sequential"),
        "choose": lambda: choose_example_weight_(net, batches, select=batches),
        "finetune": lambda: finetune_(
            net, batches, recipe=FinetuneRecipe(epochs=2, train="all", statistics="train")
        ),
        "residuals": lambda: residuals(net, batches),
    }[task]()
    assert net.input_mean is mean
    assert torch.equal(mean, value)
    assert (net.n, net.log) == (0, [])
    assert torch.equal(torch.get_rng_state(), states[0])
    assert str(np.random.get_state()) == str(states[1])
    assert random.getstate() == states[2]
    if task in ("finetune", "recalibrate"):
        done = done.trust if task == "recalibrate" else done
        assert set(done.changed_by_forward) == {"input_mean", "n", "log"}
