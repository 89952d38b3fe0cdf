"""A reference network in place of labels: its divergence as loss, in judging and in training."""

import copy
import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bnfix
from bnfix.core.errors import CheckpointError, ConfigError, DataError, ModelError
from bnfix.core.settings import FinetuneRecipe, WeightRecipe
from bnfix.metrics.compare import compare, judge
from bnfix.metrics.evaluate import Outputs, against, collect, evaluate, measured, score
from bnfix.metrics.metrics import measure
from bnfix.metrics.task import LABELS, Reference
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.training.finetune import finetune_
from bnfix.weights.choose import choose_example_weight_

RNG = np.random.default_rng(0)
ANY = Reference(nn.Identity())


def softmax(z):
    p = np.exp(z - z.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def divergence(theirs, own):
    """KL of each row by the definition, from probabilities."""
    p, q = softmax(theirs.astype(np.float64)), softmax(own.astype(np.float64))
    return (p * np.log(p / q)).sum(1)


def drawn(n=60, k=5, scale=2.0, seed=1):
    rng = np.random.default_rng(seed)
    theirs = rng.normal(scale=scale, size=(n, k)).astype(np.float32)
    return theirs, (theirs + rng.normal(size=(n, k))).astype(np.float32)


# The loss


@pytest.mark.parametrize("k", [2, 3, 40])
def test_the_loss_is_the_divergence_by_its_definition(k):
    theirs, own = drawn(k=k)
    losses = ANY.losses(torch.tensor(own).double(), torch.tensor(theirs))
    np.testing.assert_allclose(losses.numpy(), divergence(theirs, own), rtol=1e-9, atol=1e-15)
    shift = RNG.normal(scale=30, size=(len(own), 1))
    shifted = ANY.losses(torch.tensor(own + shift), torch.tensor(theirs))
    torch.testing.assert_close(shifted, losses, rtol=1e-9, atol=1e-12)


def test_equal_logits_lose_exactly_nothing_however_large():
    for scale in (1e-3, 1.0, 1e3, 1e30):
        z = torch.tensor(drawn(scale=scale)[0])
        assert bool((ANY.losses(z.double(), z) == 0).all())
        assert bool((ANY.losses(z, z) == 0).all())


def test_far_apart_predictions_have_a_finite_loss():
    z = torch.tensor([[1e4, 0.0, -1e4]])
    assert float(ANY.losses(-z, z)) == pytest.approx(2e4)


def test_the_gradient_is_the_difference_of_the_predictions():
    theirs, own = drawn(n=7)
    z = torch.tensor(own).double().requires_grad_()
    (gradient,) = torch.autograd.grad(ANY.losses(z, torch.tensor(theirs)).sum(), z)
    wanted = softmax(own.astype(np.float64)) - softmax(theirs.astype(np.float64))
    np.testing.assert_allclose(gradient.numpy(), wanted, rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: ANY.losses(x, torch.tensor(theirs)), z)


# Judging


class Column(nn.Module):
    """Gives some columns of its input, so that one batch holds the logits of several networks."""

    def __init__(self, first, k=5):
        super().__init__()
        self.first, self.k, self.bn = first, k, nn.BatchNorm1d(1)

    def forward(self, x):
        return x[:, self.first : self.first + self.k]


def test_the_metrics_are_those_by_hand():
    theirs, own = drawn(n=80)
    x = torch.tensor(np.concatenate([theirs, own], 1))
    batches = [(x[:30],), x[30:60], (x[60:], torch.full((20,), 99))]  # labels are not looked at
    found = bnfix.evaluate(Column(5), batches, reference=Column(0))
    assert found.nll == pytest.approx(divergence(theirs, own).mean(), rel=1e-9)
    assert found.top1 == (theirs.argmax(1) == own.argmax(1)).mean()
    top5 = [t.argmax() in np.argsort(-o)[:5] for t, o in zip(theirs, own, strict=True)]
    assert found.top5 == np.mean(top5)
    difference = softmax(theirs.astype(float)) - softmax(own.astype(float))
    assert found.brier == pytest.approx((difference**2).sum(1).mean(), rel=1e-9)
    low, high = found.interval["nll"]
    assert low < found.nll < high
    few = score(Column(5), batches, Reference(Column(0)))
    assert few.nll == pytest.approx(found.nll, rel=1e-12)
    assert (few.n_examples, few.top1) == (80, found.top1)
    np.testing.assert_array_equal(few.losses, found.examples.losses)


def test_the_temperature_is_the_best_one_on_the_other_half():
    theirs, _ = drawn(n=4000, scale=3.0)
    found = measure(2.5 * theirs, theirs, task=ANY)
    assert found.temperature == pytest.approx(2.5, rel=0.01)
    assert found.nll > 0.1
    assert found.nll_temperature_scaled < 1e-3


def test_the_loss_if_blind_is_the_mean_over_all_orders_of_the_classes():
    theirs, own = drawn(n=6, k=4)
    orders = list(itertools.permutations(range(4)))
    wanted = np.mean([divergence(theirs[:, order], own).mean() for order in orders])
    assert measure(own, theirs, task=ANY).examples.blind_loss == pytest.approx(wanted, rel=1e-9)


def test_a_network_agrees_with_itself():
    net = trained()
    x, _ = images(70, 5)
    found = evaluate(net, [(x[:40],), (x[40:],)], reference=net)
    assert found.nll == 0
    assert found.top1 == found.top5 == 1
    assert found.brier == 0


def test_the_gate_admits_what_is_nearer_to_the_reference():
    theirs, far = drawn(n=300)
    near = (0.5 * (theirs + far)).astype(np.float32)
    old, new = (measure(z, theirs, task=ANY) for z in (far, near))
    decision = judge("statistics", ("near", new), ("far", old))
    assert decision.admitted
    differences = divergence(theirs, near) - divergence(theirs, far)
    assert decision.nll_difference == pytest.approx(differences.mean(), rel=1e-9)
    assert decision.nll_se == pytest.approx(differences.std(ddof=1) / 300**0.5, rel=1e-9)
    assert decision.reason.startswith("its divergence from the reference is lower by ")
    assert not judge("statistics", ("far", old), ("near", new)).admitted
    assert not judge("statistics", ("same", new), ("near", new)).admitted
    paired = compare(old, new)
    assert paired.verdict == "better"
    assert paired.top1.difference == pytest.approx(new.top1 - old.top1, rel=1e-12)


def test_what_agrees_less_is_not_admitted():
    """Less divergence at the price of agreement: the predictions are flat but wrong."""
    theirs = np.tile(np.float32([3, 0, 0]), (200, 1))
    bold = np.where(np.arange(200)[:, None] % 4, [30.0, 0, 0], [0, 30.0, 0]).astype(np.float32)
    flat = np.tile(np.float32([0, 0.01, 0]), (200, 1))
    decision = judge(
        "statistics",
        ("flat", measure(flat, theirs, task=ANY)),
        ("bold", measure(bold, theirs, task=ANY)),
    )
    assert decision.nll_difference < -1
    assert not decision.admitted
    assert decision.reason.startswith("its agreement with the reference is lower by more than 2 ")


def test_outputs_collected_once_are_judged_either_way():
    theirs, own = drawn(n=50)
    x, y = torch.tensor(np.concatenate([theirs, own], 1)), torch.tensor(theirs.argmax(1))
    original, found = collect([Column(0), Column(5)], [(x, y)])
    task = Reference(Column(0))
    assert found.task == LABELS
    judged = measured(against(found, original, task), 0)
    assert judged.nll == evaluate(Column(5), [x], reference=task.model).nll
    assert measured(found, 0).nll == pytest.approx(
        F.cross_entropy(torch.tensor(own).double(), y).item(), rel=1e-9
    )


def test_what_was_judged_differently_is_not_compared():
    theirs, own = drawn(n=50)
    by_labels = measure(own, theirs.argmax(1))
    with pytest.raises(DataError, match="one model was judged by labels, the other by a reference"):
        compare(by_labels, measure(own, theirs, task=ANY))


def test_a_reference_that_does_not_fit_is_refused():
    x = torch.tensor(np.concatenate(drawn(n=50), 1))
    with pytest.raises(ModelError, match="reference: it has 4 classes and the model 5"):
        evaluate(Column(5), [x], reference=Column(0, 4))
    x[31, 2] = torch.nan
    with pytest.raises(ModelError, match=r"reference: its logits for example 31 .* not finite"):
        evaluate(Column(5), [x], reference=Column(0))
    found, theirs = (Outputs(np.ones((4, 3)), None, 1.0, np.arange(i, i + 4)) for i in (0, 1))
    with pytest.raises(DataError, match="reference: it was run on other examples"):
        against(found, theirs, ANY)
    short = Outputs(np.ones((3, 3)), None, 1.0)
    with pytest.raises(DataError, match="reference: 3 examples, the model has 4"):
        measured(against(found, short, ANY), 0)


# Training


class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 8, 3, padding=1, bias=False)
        self.bn1 = GeneralizedBatchNorm(8)
        self.conv2 = nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False)
        self.bn2 = GeneralizedBatchNorm(12)
        self.drop, self.fc = nn.Dropout(0.2), nn.Linear(12, 4)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(self.drop(x.mean((2, 3))))


def images(n, seed):
    rng = torch.Generator().manual_seed(seed)
    shapes = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(123))
    y = torch.randint(0, 4, (n,), generator=rng)
    return torch.randn(n, 2, 8, 8, generator=rng) + 0.8 * shapes[y], y


_TRAINED = []


def trained():
    if not _TRAINED:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = Tiny()
            optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
            for step in range(80):
                x, y = images(64, 1000 + step)
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        net.zero_grad()
        _TRAINED.append(net.eval())
    return copy.deepcopy(_TRAINED[0])


def damaged():
    """Seven of ten weights of the convolutions are pruned."""
    net = trained()
    with torch.no_grad():
        for conv in (net.conv1, net.conv2):
            conv.weight[conv.weight.abs() < conv.weight.abs().quantile(0.7)] = 0
    return net


UNLABELLED = [(images(32, seed)[0],) for seed in range(10)]
RECIPE = FinetuneRecipe(train="norms", epochs=6, optimizer="adamw", lr=0.01)


@pytest.mark.parametrize(
    ("train", "learn"), [("norms", False), ("norms+head", False), ("all", False), ("norms", True)]
)
def test_distilling_repairs_a_damaged_network(train, learn):
    original, net = trained(), damaged()
    before = {name: value.clone() for name, value in original.state_dict().items()}
    x, y = images(600, 77)
    recipe = dataclasses.replace(RECIPE, train=train, example_weight="learn" if learn else "keep")
    was, was_right = evaluate(net, [x], reference=original), evaluate(net, [(x, y)])
    tuned = finetune_(net, UNLABELLED, reference=original, recipe=recipe)
    now, now_right = evaluate(net, [x], reference=original), evaluate(net, [(x, y)])
    assert tuned.best_epoch > 0
    assert tuned.curve[tuned.best_epoch].nll < 0.5 * tuned.curve[0].nll
    assert now.nll < 0.5 * was.nll
    assert now.top1 > was.top1
    assert judge("fine-tuning", ("distilled", now), ("damaged", was)).admitted
    # The labels that nobody has seen say so too.
    assert compare(was_right, now_right).verdict == "better"
    for name, value in original.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert not original.training
    assert all(p.requires_grad and p.grad is None for p in original.parameters())


def test_batch_statistics_can_be_trained_with():
    original, net = trained().train(), damaged()
    recipe = dataclasses.replace(RECIPE, statistics="train", epochs=2)
    tuned = finetune_(net, UNLABELLED, reference=original, recipe=recipe)
    assert tuned.n_steps > 0
    assert original.training
    assert torch.equal(original.bn1.running_mean, trained().bn1.running_mean)


def test_one_step_is_the_step_by_hand():
    original, net = trained(), damaged()
    by_hand = copy.deepcopy(net)
    recipe = FinetuneRecipe(train="all", epochs=1, optimizer="sgd", lr=0.05, warmup=0, clip=None)
    recipe = dataclasses.replace(recipe, weight_decay=0.0, norm_decay=0.0)
    by_hand.drop.p = net.drop.p = 0.0
    x, held = UNLABELLED[0][0], UNLABELLED[1]
    tuned = finetune_(net, [(x,)], monitor=[held], reference=original, recipe=recipe)
    log_p = original(x).detach().log_softmax(1)
    loss = (log_p.exp() * (log_p - by_hand(x).log_softmax(1))).sum(1).mean()
    assert tuned.curve[1].loss == pytest.approx(loss.item(), rel=1e-5)
    by_hand.zero_grad()
    loss.backward()
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    optimizer.step()
    assert tuned.best_epoch == 1
    for (name, mine), theirs in zip(by_hand.named_parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(theirs, mine, rtol=1e-4, atol=1e-6, msg=name)


def test_labels_are_not_looked_at():
    found = []
    for labels in (None, torch.zeros(32, dtype=torch.long), torch.full((32,), -7)):
        net = damaged()
        batches = [(x,) if labels is None else (x, labels) for (x,) in UNLABELLED]
        finetune_(net, batches, reference=trained(), recipe=RECIPE)
        found.append(net.state_dict())
    for name, value in found[0].items():
        assert all(torch.equal(value, other[name]) for other in found), name


def test_the_original_itself_is_left_as_it_is():
    net = trained()
    tuned = finetune_(net, UNLABELLED, reference=trained(), recipe=RECIPE)
    assert tuned.best_epoch == 0
    assert tuned.curve[0].nll == 0
    assert tuned.curve[0].top1 == 1


def test_a_reference_that_cannot_teach_is_refused_and_nothing_is_changed():
    net = damaged()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    other = trained()
    other.fc = nn.Linear(12, 5)
    with pytest.raises(ModelError, match="reference: it has 5 classes and the model 4"):
        finetune_(net, UNLABELLED, reference=other, recipe=RECIPE)
    with pytest.raises(ConfigError, match="reference: it shares parameters"):
        finetune_(net, UNLABELLED, reference=net, recipe=RECIPE)
    shared = damaged()
    shared.bn1 = net.bn1
    with pytest.raises(ConfigError, match="reference: it shares parameters"):
        finetune_(net, UNLABELLED, reference=shared, recipe=RECIPE)
    with pytest.raises(DataError, match="no labels"):
        finetune_(net, UNLABELLED, recipe=RECIPE)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_the_state_of_another_reference_is_refused(tmp_path):
    recipe = dataclasses.replace(RECIPE, epochs=1)
    first = damaged()
    finetune_(first, UNLABELLED, reference=trained(), recipe=recipe, state=tmp_path)
    again = damaged()
    finetune_(again, UNLABELLED, reference=trained(), recipe=recipe, state=tmp_path)
    for mine, theirs in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    with pytest.raises(CheckpointError, match="another run"):
        finetune_(damaged(), UNLABELLED, reference=damaged(), recipe=recipe, state=tmp_path)


def test_example_weights_are_chosen_without_labels():
    """The reference weighs the example, and the network is that without the weights."""
    original, net = trained(), trained()
    set_example_weight_(original, {"bn1": 0.6, "bn2": 0.3})
    select = [(images(64, seed)[0],) for seed in range(50, 58)]
    recipe = WeightRecipe(granularity="layer", epochs=4, lr=0.05)
    choice = choose_example_weight_(
        net, UNLABELLED, select=select, reference=original, recipe=recipe
    )
    assert choice.chosen in ("global", "layer")
    assert choice.decisions[0].reason.startswith("its divergence from the reference is lower")
    x = images(300, 99)[0]
    assert (
        evaluate(net, [x], reference=original).nll
        < 0.3 * evaluate(trained(), [x], reference=original).nll
    )
