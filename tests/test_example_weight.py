"""The choice of the example weight on a tiny trained network: where it helps, and where not."""

import copy
import itertools

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bnfix.core.errors import DataError, ModelError, NormError
from bnfix.core.settings import WeightRecipe
from bnfix.metrics.compare import compare
from bnfix.metrics.evaluate import Score, evaluate
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.weights.choose import WeightSearch, choose_example_weight_, weighable_layers, weights_of

N_CLASSES = 4


class Tiny(nn.Module):
    """Two paths side by side, through both convolutions; then a norm of single positions."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(2, 6, 3, padding=1, groups=2, bias=False)
        self.bn1 = GeneralizedBatchNorm(6)
        self.conv2 = nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2, bias=False)
        self.bn2 = GeneralizedBatchNorm(8)
        self.hidden = nn.Linear(8 * 16, 12)
        self.bn3 = GeneralizedBatchNorm(12)
        self.fc = nn.Linear(12, N_CLASSES)

    def forward(self, x):
        x = F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(F.relu(self.bn3(self.hidden(x.flatten(1)))))


def patterns(n, seed, *, shifted):
    """Four classes: one of two patterns in the first channel, dark or bright in the second.

    Shifted: each example's first channel has a contrast and brightness of its own. An example
    weight takes that away, and in the second channel it takes the class away.
    """
    rng = torch.Generator().manual_seed(seed)
    shapes = 0.4 * torch.randn(2, 8, 8, generator=torch.Generator().manual_seed(123))
    y = torch.randint(0, N_CLASSES, (n,), generator=rng)
    x = torch.randn(n, 2, 8, 8, generator=rng)
    x[:, 0] += shapes[y // 2]
    x[:, 1] += (y % 2 - 0.5).view(-1, 1, 1) * 0.8
    if shifted:
        contrast = torch.exp(0.6 * torch.randn(n, 1, 1, generator=rng))
        x[:, 0] = x[:, 0] * contrast + 2 * torch.randn(n, 1, 1, generator=rng)
    return x, y


def brightness(n, seed):
    """The class is the brightness and nothing else: what an example weight takes away."""
    rng = torch.Generator().manual_seed(seed)
    y = torch.randint(0, N_CLASSES, (n,), generator=rng)
    x = y.view(-1, 1, 1, 1) - 1.5 + 0.5 * torch.randn(n, 2, 8, 8, generator=rng)
    return x, y


def cut(x, y, size=32):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


def trained(draw):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Tiny()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
        for step in range(60):
            x, y = draw(64, 1000 + step)
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    net.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def shifted_net():
    return trained(lambda n, seed: patterns(n, seed, shifted=False))


@pytest.fixture(scope="module")
def bright_net_once():
    return trained(brightness)


@pytest.fixture
def net(shifted_net):
    return copy.deepcopy(shifted_net)


@pytest.fixture
def bright_net(bright_net_once):
    return copy.deepcopy(bright_net_once)


@pytest.fixture(scope="module")
def batches():
    return cut(*patterns(320, 1, shifted=True))


@pytest.fixture(scope="module")
def small():
    """The same examples in batches of 8: more steps of learning."""
    return cut(*patterns(320, 1, shifted=True), size=8)


@pytest.fixture(scope="module")
def select():
    return cut(*patterns(160, 2, shifted=True))


class Found:
    """Everything about a model that a failed or idle choice must leave as it is."""

    def __init__(self, model):
        self.model = model
        self.tensors = {
            name: (tensor, tensor.detach().clone())
            for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers())
        }
        self.flags = self._flags()

    def _flags(self):
        layers = [m for m in self.model.modules() if isinstance(m, GeneralizedBatchNorm)]
        return (
            [m.training for m in self.model.modules()],
            [p.requires_grad for p in self.model.parameters()],
            [p.grad for p in self.model.parameters()],
            [layer.live for layer in layers],
            [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in self.model.modules()],
        )

    def assert_still(self):
        now = dict(itertools.chain(self.model.named_parameters(), self.model.named_buffers()))
        assert now.keys() == self.tensors.keys()
        for name, (tensor, value) in self.tensors.items():
            assert now[name] is tensor, name
            assert torch.equal(tensor, value), name
        flags = self._flags()
        assert flags[:2] + flags[3:] == self.flags[:2] + self.flags[3:]
        for now_grad, grad in zip(flags[2], self.flags[2], strict=True):
            assert now_grad is grad


def marked(model):
    """The model with some modes, flags and gradients that are easily lost."""
    model.train()
    model.bn1.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    return model


# Where it helps


def test_the_choice_improves_held_out_loss_where_contrast_and_brightness_shift(net, small, select):
    test = cut(*patterns(320, 3, shifted=True))
    before = evaluate(net, test)
    found = Found(net)
    choice = choose_example_weight_(net, small, select=select)
    paired = compare(before, evaluate(net, test))
    assert choice.chosen == "channel"
    assert paired.verdict == "better"
    assert not paired.temperature_only
    assert paired.nll.difference < -0.3
    assert [d.admitted for d in choice.decisions] == [True] * 3
    # The first three channels of bn1 see the pattern, the others the brightness.
    assert min(choice.weights["bn1"][:3]) > 0.3
    assert max(choice.weights["bn1"][3:]) < 0.05
    assert choice.decisions[0].candidate == "one example weight"
    assert choice.decisions[0].incumbent == "as it was"
    assert choice.decisions[1].candidate == "example weight per layer"
    assert choice.decisions[2].candidate == "example weight per channel"
    assert choice.decisions[-1].nll == pytest.approx(evaluate(net, select).nll, rel=1e-12)
    assert choice.n_live == 2
    assert choice.excluded == ("bn3",)
    assert choice.weights == weights_of(net)
    assert [len(choice.weights[name]) for name in ("bn1", "bn2")] == [6, 8]
    assert choice.weights["bn3"] == 0.0
    assert all(0 <= a <= 1 for name in ("bn1", "bn2") for a in choice.weights[name])
    assert net.bn1.live
    assert not net.bn3.live
    for name, (tensor, value) in found.tensors.items():
        if name not in ("bn1.example_weight", "bn2.example_weight"):
            assert torch.equal(tensor, value), name
    assert not net.bn1.example_weight.requires_grad
    assert found._flags()[:2] == found.flags[:2]


def test_the_curve_is_sorted_holds_0_and_its_best_weight_is_set(net, batches, select):
    choice = choose_example_weight_(
        net, batches, select=select, recipe=WeightRecipe(granularity="global")
    )
    weights = [point.example_weight for point in choice.curve]
    assert weights == sorted(set(weights))
    assert {0.0, 0.01, 0.03, 0.1, 0.3} <= set(weights)
    assert 5 < len(weights) <= 10
    best = min(choice.curve, key=lambda point: point.nll)
    assert choice.chosen == "global"
    assert choice.weights["bn1"] == choice.weights["bn2"]
    assert choice.weights["bn1"] == pytest.approx(best.example_weight, rel=1e-6)
    learned_from = [batch for i, batch in enumerate(batches) if i % 5]  # the rest says when to stop
    metrics = evaluate(net, learned_from)
    assert (best.nll, best.top1) == (pytest.approx(metrics.nll, rel=1e-6), metrics.top1)


@pytest.mark.parametrize(("granularity", "levels"), [("global", 1), ("layer", 2), ("channel", 3)])
def test_granularity_caps_the_freedom(net, small, select, granularity, levels):
    recipe = WeightRecipe(granularity=granularity)
    choice = choose_example_weight_(net, small, select=select, recipe=recipe)
    assert choice.chosen == granularity
    assert len(choice.decisions) == levels
    per_channel = [name for name, a in choice.weights.items() if isinstance(a, list)]
    assert per_channel == (["bn1", "bn2"] if granularity == "channel" else [])
    assert (choice.weights["bn1"] == choice.weights["bn2"]) == (granularity == "global")
    assert net.bn1.example_weight.shape == ((6,) if choice.chosen == "channel" else ())


def test_each_level_is_judged_against_what_stands(net, small, select):
    choice = choose_example_weight_(net, small, select=select)
    standing = "as it was"
    loss = evaluate_at(net, 0.0, select)
    for decision in choice.decisions:
        assert decision.incumbent == standing
        assert decision.incumbent_nll == pytest.approx(loss, rel=1e-9)
        if decision.admitted:
            standing, loss = decision.candidate, decision.nll


def evaluate_at(model, weight, batches):
    other = copy.deepcopy(model)
    set_example_weight_(other, weight)
    return evaluate(other, batches).nll


def test_learned_weights_stay_between_0_and_1_at_any_rate(net, batches, select):
    recipe = WeightRecipe(lr=5.0, epochs=1)
    seen = []

    def forward(model, batch):
        seen.extend(
            float(a)
            for layer in (model.bn1, model.bn2)
            for a in layer.example_weight.detach().view(-1)
        )
        return model(batch[0])

    choose_example_weight_(net, batches, select=select, recipe=recipe, forward=forward)
    assert min(seen) == 0.0
    assert max(seen) == 1.0


def test_the_epoch_that_the_monitor_likes_best_is_kept(net, batches, select):
    """The later epochs have wrong labels and lead away."""
    wrong = [(x, (y + 2) % N_CLASSES) for x, y in batches]  # the pattern is wrong
    after_learning, monitor = [], cut(*patterns(32, 4, shifted=True))

    def forward(model, batch):
        if torch.is_grad_enabled():
            after_learning.append(None)
        elif after_learning and torch.equal(batch[0], monitor[0][0]):
            after_learning.append(
                (model.bn1.example_weight.item(), model.bn2.example_weight.item())
            )
        return model(batch[0])

    choice = choose_example_weight_(
        net,
        lambda k: batches if k == 0 else wrong,
        select=select,
        monitor=monitor,
        recipe=WeightRecipe(granularity="layer", lr=0.3, epochs=3),
        forward=forward,
    )
    ends = []
    for bn1, bn2 in [weights for weights in after_learning if weights]:
        at_the_end = copy.deepcopy(net)
        set_example_weight_(at_the_end, {"bn1": bn1, "bn2": bn2})
        ends.append((evaluate(at_the_end, monitor).nll, evaluate(at_the_end, select).nll))
    assert len(ends) == 3
    assert ends[2] != min(ends)
    assert choice.decisions[1].nll == pytest.approx(min(ends)[1], rel=1e-9)


def test_two_runs_are_equal_bit_for_bit(shifted_net, batches, select):
    runs = []
    for _ in range(2):
        model = copy.deepcopy(shifted_net)
        choice = choose_example_weight_(model, batches, select=select)
        runs.append((model.state_dict(), choice))
    (one, choice), (other, again) = runs
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert choice.decisions == again.decisions
    assert choice.curve == again.curve
    assert choice.weights == again.weights


def test_generators_are_as_good_as_lists(shifted_net, batches, select):
    lists, generators = copy.deepcopy(shifted_net), copy.deepcopy(shifted_net)
    monitor = cut(*patterns(64, 4, shifted=True))
    one = choose_example_weight_(lists, batches, select=select, monitor=monitor)
    other = choose_example_weight_(
        generators, iter(batches), select=iter(select), monitor=iter(monitor)
    )
    assert one.decisions == other.decisions
    assert one.weights == other.weights
    held_out = choose_example_weight_(copy.deepcopy(shifted_net), iter(batches))
    assert (
        held_out.decisions == choose_example_weight_(copy.deepcopy(shifted_net), batches).decisions
    )


def test_a_callable_gives_the_batches_of_each_pass(net, batches, select):
    asked = []

    def of_pass(k):
        asked.append(k)
        return iter(batches)

    choice = choose_example_weight_(
        net, of_pass, select=select, monitor=batches[:2], recipe=WeightRecipe(epochs=3)
    )
    # counted once, searched, learned per layer in one pass, per channel in three
    assert asked == [0] + [0] * len(choice.curve) + [0] + [0, 1, 2]


def test_the_cost_is_counted_in_passes_over_all_examples_given(net, batches, select):
    monitor = batches[:5]
    given = {"select": select, "monitor": monitor}
    recipe = WeightRecipe(granularity="global")
    choice = choose_example_weight_(net, batches, recipe=recipe, **given)
    n_all = 10 + 5 + 5  # batches to learn from, to watch and to choose by
    searched = len(choice.curve) * 8 / n_all  # the search runs on a part of the batches
    assert choice.passes == pytest.approx(searched + 5 / n_all, rel=1e-9)
    set_example_weight_(net, 0.0)
    recipe = WeightRecipe(epochs=2, thin=0)
    choice = choose_example_weight_(net, batches, recipe=recipe, **given)
    # 8 of the 10 batches for a number a layer, all for one a channel; 5 watch after each epoch
    learned = (8 + 2 * 10) * 3 + 3 * 5
    assert choice.passes == pytest.approx(searched + (learned + 3 * 5) / n_all, rel=1e-9)


def test_the_clock_is_told_in_passes_of_this_very_run(net, batches, select):
    asked = []

    def forward(model, batch):
        asked.append(batch[0].shape[0])
        return model(batch[0])

    recipe = WeightRecipe(granularity="global")
    given = {"select": select, "monitor": batches[:5], "forward": forward}
    choice = choose_example_weight_(net, batches, recipe=recipe, **given)
    # Live weights cost more than weight 0, and the rest of the work is not free.
    assert choice.clock_passes > 0
    assert choice.clock_passes < 60 * choice.passes
    assert choice.passes < sum(asked) / (32 * 20)  # the incumbent's pass is not the search's


def test_what_stands_need_not_be_measured_again(net, batches, select):
    runs = []

    def forward(model, batch):
        runs.append(batch[0].data_ptr())
        return model(batch[0])

    standing = evaluate(net, select)
    recipe = WeightRecipe(granularity="global")
    choice = choose_example_weight_(
        net, batches, select=select, recipe=recipe, forward=forward, incumbent=("mine", standing)
    )
    assert runs.count(select[0][0].data_ptr()) == 1
    assert choice.decisions[0].incumbent == "mine"
    assert choice.decisions[0].incumbent_nll == pytest.approx(standing.nll, rel=1e-12)


# What is fitted on what


def test_examples_of_the_gate_and_those_to_stop_by_are_never_learned_from(net, batches):
    with_gradients, without = set(), set()

    def forward(model, batch):
        ids = with_gradients if torch.is_grad_enabled() else without
        ids.update(batch[2].tolist())
        return model(batch[0])

    numbered = [(x, y, torch.arange(32) + 32 * i) for i, (x, y) in enumerate(batches)]
    choice = choose_example_weight_(net, numbered, forward=forward)
    by_batch = {i // 32 for i in with_gradients}
    assert {i // 32 for i in without} == set(range(10))
    # Batches 0, 4, 8 are the gate's; of the other seven, every fifth: 1 and 7 stop the learning.
    assert by_batch == {2, 3, 5, 6, 9}
    assert choice.decisions[0].n_examples == 3 * 32
    chosen_on = evaluate(net, [batches[i] for i in (0, 4, 8)]).nll
    admitted = [d for d in choice.decisions if d.admitted]
    assert admitted[-1].nll == pytest.approx(chosen_on, rel=1e-9)


# Where it does not help


def test_keep_wins_where_brightness_is_the_class(bright_net):
    found = Found(marked(bright_net))
    choice = choose_example_weight_(bright_net, cut(*brightness(320, 1)))
    assert choice.chosen == "keep"
    assert [d.admitted for d in choice.decisions] == [False] * 3
    assert all(d.incumbent == "as it was" for d in choice.decisions)
    assert choice.n_live == 0
    assert choice.weights == {"bn1": 0.0, "bn2": 0.0, "bn3": 0.0}
    found.assert_still()


def test_keep_wins_ties(net, batches, select):
    """The logits do not depend on the norm layers at all."""
    with torch.no_grad():
        net.fc.weight.zero_()
    found = Found(marked(net))
    choice = choose_example_weight_(net, batches, select=select)
    assert choice.chosen == "keep"
    assert [d.nll_difference for d in choice.decisions] == [0.0] * 3
    found.assert_still()


@pytest.mark.parametrize("start", [0.0, 0.01])
def test_a_strict_gate_keeps_what_there_was(net, batches, select, start):
    set_example_weight_(net, {"bn1": start, "bn2": [start] * 8})
    found = Found(marked(net))
    choice = choose_example_weight_(net, batches, select=select, z=1e6)
    assert choice.chosen == "keep"
    assert all(d.nll_difference < 0 for d in choice.decisions)
    assert choice.n_live == (2 if start else 0)
    found.assert_still()


def test_without_epochs_nothing_is_learned(net, batches, select):
    choice = choose_example_weight_(
        net, batches, select=select, recipe=WeightRecipe(epochs=0, thin=0)
    )
    assert [d.admitted for d in choice.decisions] == [True, False, False]
    assert choice.chosen == "global"
    assert choice.decisions[1].nll_difference == 0
    best = min(choice.curve, key=lambda point: point.nll)
    assert choice.weights["bn1"] == choice.weights["bn2"] == pytest.approx(best.example_weight)
    assert best.example_weight > 0


# Which layers take part


def test_single_positions_are_weighed_only_if_asked(net, batches, select):
    layers, excluded = weighable_layers(net, batches)
    assert (list(layers), excluded) == (["bn1", "bn2"], ["bn3"])
    layers, excluded = weighable_layers(net, batches, pointwise=True)
    assert (list(layers), excluded) == (["bn1", "bn2", "bn3"], [])
    recipe = WeightRecipe(pointwise=True, granularity="global")
    choice = choose_example_weight_(net, batches, select=select, recipe=recipe)
    assert choice.excluded == ()
    assert choice.chosen == "global"
    assert choice.weights["bn3"] == choice.weights["bn1"] > 0


def test_layers_without_statistics_or_not_reached_keep_their_weight(batches):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.bare = GeneralizedBatchNorm(2, track_running_stats=False)
            self.twice = GeneralizedBatchNorm(2)
            self.usual = GeneralizedBatchNorm(2)
            self.late = GeneralizedBatchNorm(2)
            self.idle = GeneralizedBatchNorm(2)
            self.fc = nn.Linear(2, N_CLASSES)

        def forward(self, x):
            x = self.usual(input=self.twice(self.bare(x)))
            x = self.late(x + self.late(x.mean((2, 3)))[..., None, None])
            return self.fc(self.twice(x.mean((2, 3))))

    layers, excluded = weighable_layers(Odd(), iter(batches))
    assert list(layers) == ["usual"]
    assert excluded == ["bare", "twice", "late", "idle"]


def test_with_no_layer_to_weigh_nothing_is_tried():
    model = nn.Sequential(nn.Linear(5, 6), GeneralizedBatchNorm(6), nn.Linear(6, 3))
    found = Found(model)
    data = [(torch.randn(4, 5), torch.tensor([0, 1, 2, 0])) for _ in range(4)]
    choice = choose_example_weight_(model, data)
    assert (choice.chosen, choice.decisions, choice.curve) == ("keep", (), ())
    assert (choice.excluded, choice.passes, choice.clock_passes) == (("1",), 0.0, None)
    found.assert_still()


# Refusals, and what is left after a failure


def test_an_exception_in_any_phase_leaves_the_model_as_it_was(net, batches, select):
    marked(net)
    set_example_weight_(net, {"bn1": 0.01})
    found = Found(net)
    phases = []

    def counting(model, batch):
        phases.append(torch.is_grad_enabled())
        return model(batch[0])

    recipe = WeightRecipe(epochs=1)
    work = copy.deepcopy(net)
    choice = choose_example_weight_(
        work, batches, select=select, recipe=recipe, forward=counting, incumbent=None
    )
    assert choice.decisions[0].admitted
    learning = [i for i, grad in enumerate(phases) if grad]
    # The look at the layers, the search, the gate, both kinds of learning, the last of all.
    calls = [0, 1, 6, 7, 20, learning[0] - 1, learning[0], learning[3], learning[-1]]
    calls += [learning[-1] + 1, len(phases) - 1]
    for call in calls:
        counter = itertools.count()

        def failing(model, batch, counter=counter, call=call):
            if next(counter) == call:
                raise KeyboardInterrupt("now")
            return model(batch[0])

        with pytest.raises(KeyboardInterrupt, match="now"):
            choose_example_weight_(net, batches, select=select, recipe=recipe, forward=failing)
        found.assert_still()
    assert torch.is_grad_enabled()


def test_a_model_without_generalized_layers_is_refused(batches):
    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.BatchNorm2d(4), nn.Flatten())
    with pytest.raises(
        NormError, match=r"model: it has no GeneralizedBatchNorm\. Call swap_norms_"
    ):
        choose_example_weight_(model, batches)


@pytest.mark.parametrize(
    ("n", "given", "least"),
    [(0, {}, 3), (1, {}, 3), (2, {}, 3), (1, {"select"}, 2), (1, {"monitor"}, 2)],
)
def test_too_few_batches_are_refused(net, batches, n, given, least):
    found = Found(net)
    held = dict.fromkeys(given, batches[:1])
    with pytest.raises(DataError, match=rf"batches: {n}, expected at least {least}"):
        choose_example_weight_(net, batches[:n], **held)
    found.assert_still()


def test_as_few_batches_as_are_needed_will_do(net, batches):
    recipe = WeightRecipe(epochs=1)
    assert len(choose_example_weight_(net, batches[:3], recipe=recipe).decisions) == 3
    choice = choose_example_weight_(
        net, batches[:1], select=batches[1:2], monitor=batches[2:3], recipe=recipe
    )
    assert len(choice.decisions) == 3


def test_batches_without_labels_are_refused(net, batches):
    found = Found(net)
    bare = [x for x, _ in batches]
    with pytest.raises(DataError, match="select batches have no labels"):
        choose_example_weight_(net, bare)
    with pytest.raises(DataError, match="batches: no labels"):
        choose_example_weight_(net, bare, select=batches)
    with pytest.raises(DataError, match="batches: no labels"):
        choose_example_weight_(net, batches, select=batches, monitor=bare)

    def sometimes(k):
        return batches if k == 0 else bare

    recipe = WeightRecipe(epochs=2)
    with pytest.raises(DataError, match="example weight: a batch has no labels"):
        choose_example_weight_(net, sometimes, select=batches, monitor=batches, recipe=recipe)
    found.assert_still()


def test_labels_out_of_range_are_refused(net, batches):
    found = Found(net)
    wrong = [(x, y + 1) for x, y in batches]
    with pytest.raises(DataError, match="labels: from 1 to 4, expected 0 to 3"):
        choose_example_weight_(net, wrong, select=batches)
    found.assert_still()


def test_no_batches_for_the_layers_to_be_seen_on_are_refused(net, batches):
    with pytest.raises(DataError, match="example weight: no examples"):
        choose_example_weight_(net, batches, select=batches, monitor=[])
    with pytest.raises(DataError, match="example weight: no examples"):
        weighable_layers(net, [])


def test_an_output_without_gradients_is_refused_where_they_are_needed(net, batches):
    def detached(model, batch):
        return model(batch[0]).detach()

    found = Found(net)
    with pytest.raises(ModelError, match="no gradient in the weights"):
        choose_example_weight_(net, batches, forward=detached)
    found.assert_still()
    recipe = WeightRecipe(granularity="global")
    assert choose_example_weight_(net, batches, recipe=recipe, forward=detached).curve


class WithIdleNorm(nn.Module):
    """A net beside a norm layer that its output does not depend on."""

    def __init__(self, net):
        super().__init__()
        self.net, self.idle = net, GeneralizedBatchNorm(2)

    def forward(self, x):
        return self.net(x) + 0 * self.idle(x).mean()


@pytest.mark.parametrize(("n", "kept"), [(4, ["a", "b"]), (4000, ["b"])])
def test_a_loss_that_hides_in_the_noise_of_few_examples_is_not_ruled_out(n, kept):
    """Without the weight of ``a`` half of the examples lose 1 nat and half of them win it."""
    layers = {name: GeneralizedBatchNorm(2, example_weight=0.5) for name in "ab"}

    class Scripted(WeightSearch):
        def _score(self, batches):
            losses = np.zeros(n)
            losses[::2] += 1.0 * (not layers["a"].live)
            losses[1::2] -= 1.0 * (not layers["a"].live)
            losses += 1.0 * (not layers["b"].live)
            return Score(n, float(losses.mean()), 0.0, losses)

    search = Scripted(nn.ModuleDict(layers), layers, [], [], None, "fp32")
    search.thin(0.03, {"a": torch.ones(()), "b": torch.full((), 9.0)})
    assert [name for name, layer in layers.items() if layer.live] == kept


def test_a_layer_whose_weight_does_not_matter_is_set_back_to_zero(net, batches, select):
    model = WithIdleNorm(net).eval()
    live = {}
    for name, thin in (("thinned", 0.02), ("full", 0.0)):
        set_example_weight_(model, 0.0)
        recipe = WeightRecipe(epochs=4, thin=thin)
        choice = choose_example_weight_(model, batches, select=select, recipe=recipe, z=0)
        assert choice.chosen in ("layer", "channel")
        live[name] = [
            layer for layer, module in model.named_modules() if getattr(module, "live", 0)
        ]
    assert "idle" in live["full"]
    assert "idle" not in live["thinned"]
    assert "net.bn1" in live["thinned"]
