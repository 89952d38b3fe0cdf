import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from bnfix.core.errors import ConfigError, NormError, NumericError
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from tests import reference
from tests.real import GOLDEN

CASES = json.loads((GOLDEN / "four_things.json").read_text()) if GOLDEN.is_dir() else {}


def layer_with(c, *, dtype=torch.float64, seed=0, **settings_):
    generator = torch.Generator().manual_seed(seed)
    layer = GeneralizedBatchNorm(c, dtype=dtype, **settings_)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            tensor.copy_(torch.randn(c, generator=generator))
        layer.running_var.copy_(torch.rand(c, generator=generator) + 0.2)
    return layer


def arrays(layer):
    tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
    gamma, beta, mean, var = (t.detach().double().numpy().copy() for t in tensors)
    return gamma, beta, (mean, var)


# ---- the paper's own code ------------------------------------------------------------------


@pytest.mark.data
@pytest.mark.skipif(not CASES, reason=f"golden vectors are not at {GOLDEN}")
@pytest.mark.parametrize("case", CASES or ["none"])
def test_golden(case):
    cfg = CASES[case]
    with np.load(GOLDEN / "four_things.npz") as golden:
        data = {k.split("/")[1]: golden[k] for k in golden.files if k.split("/")[0] == case}
    c = cfg["C"]
    groups = cfg["channel_groups"] or c // cfg["channels_per_group"]
    var_p = data["moving_x2"].astype(np.float64) - data["moving_x"].astype(np.float64) ** 2
    layer = GeneralizedBatchNorm(
        c, eps=cfg["eps"], momentum=1 - cfg["decay"], channel_groups=groups,
        ghost_size=cfg["examples_per_group"], example_weight=cfg["example_weight"],
    )  # fmt: skip
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(data["gamma"]))
        layer.bias.copy_(torch.tensor(data["beta"]))
        layer.running_mean.copy_(torch.tensor(data["moving_x"]))
        layer.running_var.copy_(torch.tensor(var_p))
    x = torch.tensor(data["x"])

    def close(mine, theirs, tolerance):
        limit = tolerance * max(1.0, float(np.abs(theirs).max()))
        assert float(np.abs(np.asarray(mine, np.float64) - theirs).max()) <= limit

    y_eval = layer.eval()(x).detach()
    y_train = layer.train()(x).detach()
    close(y_eval, data["y_eval"], 2e-5)
    close(y_train, data["y_train"], 2e-5)
    close(layer.running_mean, data["moving_x_after"], 2e-5)
    n, d = x.numel() / c, cfg["decay"]
    running_var = layer.running_var.double().numpy()
    var_b = (running_var - d * var_p) * (n - 1) / (n * (1 - d))
    mean_b = reference.channel_moments(data["x"])[0]
    second = d * data["moving_x2"] + (1 - d) * (var_b + mean_b**2)
    close(second, data["moving_x2_after"], 2e-5)

    args = (data["x"], data["gamma"], data["beta"])
    wide = copy.deepcopy(layer).double()
    with torch.no_grad():
        wide.running_mean.copy_(torch.tensor(data["moving_x"]))
        wide.running_var.copy_(torch.tensor(var_p))
    mine = wide.eval()(x.double()).detach().numpy()
    theirs = reference.evaluate(
        *args, (data["moving_x"], var_p), groups=groups,
        # the weight travels as float32 in the buffer
        example_weight=np.float64(np.float32(cfg["example_weight"])), eps=cfg["eps"],
    )  # fmt: skip
    np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)
    mine = wide.train()(x.double()).detach().numpy()
    theirs = reference.train(
        *args, groups=groups, ghost_size=cfg["examples_per_group"], eps=cfg["eps"]
    )
    np.testing.assert_allclose(mine, theirs, rtol=1e-10, atol=1e-10)


# ---- an independent float64 reference over drawn sizes ---------------------------------------

shapes = st.tuples(
    st.integers(1, 7),
    st.sampled_from([1, 2, 6, 12]),
    st.lists(st.integers(1, 5), min_size=0, max_size=3),
)


@given(shape=shapes, a=st.sampled_from([0.0, 0.03, 0.5, 1.0]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_evaluation_equals_reference(shape, a, data):
    n, c, spatial = shape
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    layer = layer_with(c, channel_groups=groups, example_weight=a).eval()
    x = torch.randn(n, c, *spatial, dtype=torch.float64)
    gamma, beta, running = arrays(layer)
    expected = reference.evaluate(
        x.numpy(), gamma, beta, running, groups=groups, example_weight=np.float32(a), eps=1e-5
    )
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-9, atol=1e-9)


@given(shape=shapes, ghost=st.sampled_from([None, 1, 2, 3, 5, 100]), data=st.data())
@settings(max_examples=80, deadline=None)
def test_training_equals_reference(shape, ghost, data):
    n, c, spatial = shape
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    layer = layer_with(c, channel_groups=groups, ghost_size=ghost).train()
    gamma, beta, (mean, var) = arrays(layer)
    x = torch.randn(n, c, *spatial, dtype=torch.float64)
    runs = 1 if ghost is None else -(-n // ghost)
    values = (n // runs) * int(np.prod(spatial)) * c // groups
    if values < 2:
        with pytest.raises((NumericError, ValueError), match="more than 1 value"):
            layer(x)
        return
    if n * int(np.prod(spatial)) == 1:
        return  # one value a channel: the running variance has no Bessel factor
    y = layer(x)
    expected = reference.train(x.numpy(), gamma, beta, groups=groups, ghost_size=ghost, eps=1e-5)
    np.testing.assert_allclose(y.detach(), expected, rtol=1e-9, atol=1e-9)
    n_values = n * int(np.prod(spatial))
    batch_mean, batch_var = reference.channel_moments(x.numpy())
    np.testing.assert_allclose(layer.running_mean, 0.9 * mean + 0.1 * batch_mean, rtol=1e-9)
    unbiased = batch_var * n_values / (n_values - 1)
    np.testing.assert_allclose(layer.running_var, 0.9 * var + 0.1 * unbiased, rtol=1e-9)
    assert layer.num_batches_tracked.item() == 1


@pytest.mark.parametrize("groups", [12, 4])
def test_a_weight_per_channel(groups):
    a = np.linspace(0, 1, 12).astype(np.float32)
    layer = layer_with(12, channel_groups=groups, example_weight=a.tolist()).eval()
    x = torch.randn(3, 12, 4, 5, dtype=torch.float64)
    gamma, beta, running = arrays(layer)
    expected = reference.evaluate(
        x.numpy(), gamma, beta, running, groups=groups, example_weight=a, eps=1e-5
    )
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-9, atol=1e-9)


# ---- torch's own layers ------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, None, 0.0])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("spatial", [(), (9,), (5, 7), (2, 3, 4)])
def test_defaults_equal_torch_bit_for_bit(momentum, affine, track, spatial):
    kinds = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
    args = {"momentum": momentum, "affine": affine, "track_running_stats": track}
    stock, mine = kinds[len(spatial)](6, **args), GeneralizedBatchNorm(6, **args)
    mine.load_state_dict(stock.state_dict())
    generator = torch.Generator().manual_seed(1)
    for step in range(12):
        training = step < 10
        x = torch.randn(4, 6, *spatial, generator=generator)
        upstream = torch.randn(4, 6, *spatial, generator=generator)
        answers = []
        for layer in (stock, mine):
            layer.train(training).zero_grad()
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(upstream)
            answers.append([y, leaf.grad, *(p.grad for p in layer.parameters())])
        for one, other in zip(*answers, strict=True):
            assert torch.equal(one, other)
        state = mine.state_dict()
        for name, tensor in stock.state_dict().items():
            assert torch.equal(tensor, state[name]), name


@given(
    n=st.integers(1, 5), groups=st.sampled_from([1, 2, 3, 6]), size=st.sampled_from([(2,), (3, 1)])
)
@settings(max_examples=20, deadline=None)
def test_channel_groups_are_batch_group_norm(n, groups, size):
    """The public form: Batch Norm of (N, G, C/G * positions), then gamma and beta a channel."""
    layer = layer_with(6, channel_groups=groups)
    stock = nn.BatchNorm1d(groups, affine=False, dtype=torch.float64)
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 6, *size, dtype=torch.float64, generator=generator) * 3 + 1
    each = x.transpose(0, 1).reshape(6, -1)
    for training in (True, False):
        if not training:  # by the same population, of which bnfix keeps one a channel
            for module, rows in ((layer, each), (stock, each.reshape(groups, -1))):
                module.running_mean.copy_(rows.mean(1))
                module.running_var.copy_(rows.var(1, correction=0))
        shape = (-1, *(1 for _ in size))
        expected = stock.train(training)(x.reshape(n, groups, -1)).view_as(x)
        expected = expected * layer.weight.view(shape) + layer.bias.view(shape)
        torch.testing.assert_close(layer.train(training)(x), expected, rtol=1e-6, atol=1e-6)


def test_weight_one_is_instance_norm_and_one_ghost_per_example_is_group_norm():
    x = torch.randn(3, 8, 5, 5, dtype=torch.float64)
    instance = layer_with(8, example_weight=1.0).eval()
    theirs = nn.functional.instance_norm(x, weight=instance.weight, bias=instance.bias)
    torch.testing.assert_close(instance(x), theirs)
    group = layer_with(8, channel_groups=4, ghost_size=1, example_weight=1.0)
    theirs = nn.functional.group_norm(x, 4, group.weight, group.bias)
    torch.testing.assert_close(group.eval()(x), theirs)
    torch.testing.assert_close(group.train()(x), theirs)


def test_no_running_statistics():
    x = torch.randn(4, 6, 3, 3)
    own = GeneralizedBatchNorm(6, track_running_stats=False, example_weight=1.0).eval()
    torch.testing.assert_close(own(x), nn.functional.instance_norm(x))
    ghost = GeneralizedBatchNorm(6, track_running_stats=False, ghost_size=2)
    assert torch.equal(ghost.eval()(x), ghost.train()(x))
    with pytest.raises(NormError, match="no running statistics"):
        GeneralizedBatchNorm(6, track_running_stats=False, example_weight=0.1)


def test_average_momentum_with_ghosts_is_the_mean_over_batches():
    layer = GeneralizedBatchNorm(3, momentum=None, ghost_size=2, dtype=torch.float64)
    batches = [torch.randn(4, 3, 5, dtype=torch.float64) for _ in range(3)]
    for batch in batches:
        layer(batch)
    expected = torch.stack([b.mean((0, 2)) for b in batches]).mean(0)
    torch.testing.assert_close(layer.running_mean, expected)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_without_a_counter_ghost_batches_update_as_torch_does(momentum):
    mine = GeneralizedBatchNorm(3, momentum=momentum, ghost_size=2)
    theirs = nn.BatchNorm2d(3, momentum=momentum)
    mine.num_batches_tracked = theirs.num_batches_tracked = None
    x = torch.randn(6, 3, 5, 5, generator=torch.Generator().manual_seed(0)) + 2
    mine(x), theirs(x)
    torch.testing.assert_close(mine.running_mean, theirs.running_mean)
    torch.testing.assert_close(mine.running_var, theirs.running_var)
    assert mine.num_batches_tracked is None


# ---- precision, memory format, autocast, compile ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_half_inputs_have_float32_statistics(dtype, training):
    layer = layer_with(
        4, dtype=torch.float32, channel_groups=2, ghost_size=2, example_weight=0.2
    ).train(training)
    twin = copy.deepcopy(layer)
    x = (torch.randn(4, 4, 6, 6) * 0.1 + 100).to(dtype)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, twin(x.float()).to(dtype))
    assert torch.equal(layer.running_var, twin.running_var)


@pytest.mark.parametrize("training", [True, False])
def test_channels_last_is_kept(training):
    layer = layer_with(4, channel_groups=2, ghost_size=3, example_weight=0.3).train(training)
    x = torch.randn(4, 4, 6, 5, dtype=torch.float64)
    y = layer(x.contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, copy.deepcopy(layer)(x))


def test_a_mean_of_ten_thousand_deviations():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(4, 3, 16, 16, generator=generator)
    layer = GeneralizedBatchNorm(3, example_weight=0.3).eval()
    layer.running_mean.fill_(1e4)
    x = noise + 1e4  # what is left of the noise after rounding is the truth here
    wide = copy.deepcopy(layer).double()
    torch.testing.assert_close(layer(x).double(), wide(x.double()), atol=2e-3, rtol=0)


def test_autocast():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), layer_with(4, dtype=torch.float32, example_weight=0.2))
    x = torch.randn(2, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.eval()(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), net(x), atol=0.1, rtol=0.1)


@pytest.mark.parametrize(
    "settings_",
    [
        {},
        {"example_weight": 0.1},
        {"channel_groups": 2, "ghost_size": 3},
        {"momentum": None},
        {"track_running_stats": False},
        {"affine": False, "example_weight": 0.5},
    ],
)
def test_compiles_without_graph_breaks(settings_):
    torch._dynamo.reset()
    layer = GeneralizedBatchNorm(4, **settings_)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for training in (True, False):
        x = torch.randn(5, 4, 6, 6)
        layer.train(training)
        torch.testing.assert_close(compiled(x), twin.train(training)(x))
    torch.testing.assert_close(layer.state_dict(), twin.state_dict())


def test_gradients_reach_input_affine_and_weight():
    layer = layer_with(4, channel_groups=2, example_weight=[0.1, 0.2, 0.3, 0.4]).eval()
    a = layer.example_weight.double().requires_grad_()
    layer._buffers["example_weight"] = a
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, a, gamma, beta):
        layer._buffers["example_weight"] = a
        return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,))

    assert torch.autograd.gradcheck(run, (x, a, layer.weight, layer.bias))


# ---- state, settings, refusals --------------------------------------------------------------


def test_a_stock_state_loads_strictly_and_leaves_the_weight():
    layer = GeneralizedBatchNorm(4, example_weight=0.25)
    state = nn.BatchNorm2d(4).state_dict()
    keys = set(state)
    layer.load_state_dict(state, strict=True)
    assert set(state) == keys
    assert layer.example_weight.item() == 0.25
    assert layer.live


def test_the_own_state_carries_the_weight_in_either_shape():
    for weight in (0.5, [0.1, 0.2, 0.0, 1.0]):
        source = GeneralizedBatchNorm(4, example_weight=weight)
        target = GeneralizedBatchNorm(4, example_weight=[0.0] * 4 if weight == 0.5 else 0.0)
        target.load_state_dict(source.state_dict(), strict=True)
        assert torch.equal(target.example_weight, source.example_weight)
        assert target.live
    quiet = GeneralizedBatchNorm(4)
    target.load_state_dict(quiet.state_dict())
    assert not target.live


@pytest.mark.parametrize(
    ("weight", "tracks", "found"),
    [
        (5.0, True, "a value outside 0 to 1"),
        (float("nan"), True, "a value outside 0 to 1"),
        ([0.1, -0.1, 0.0, 0.0], True, "a value outside 0 to 1"),
        ([0.1, 0.1], True, r"shape \(2,\), expected one number or 4"),
        (0.5, False, "keeps no running statistics"),
        ([0.0, 0.0, 1.0, 1.0], False, "keeps no running statistics"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_a_weight_that_cannot_be_is_refused(weight, tracks, found, assign):
    net = nn.Sequential(nn.ReLU(), GeneralizedBatchNorm(4, track_running_stats=tracks))
    state = net.state_dict()
    state["1.example_weight"] = torch.tensor(weight)
    with pytest.raises(RuntimeError, match=rf"1\.example_weight: .*{found}"):
        net.load_state_dict(state, assign=assign)
    assert (net[1].example_weight.item(), net[1].live) == (0.0, False)
    given = torch.tensor(weight)
    torch.testing.assert_close(state["1.example_weight"], given, equal_nan=True)


def test_the_example_weight_is_set_for_one_layer_all_or_some():
    net = nn.Sequential(GeneralizedBatchNorm(4), nn.ReLU(), GeneralizedBatchNorm(4))
    set_example_weight_(net, 0.1)
    assert [net[0].live, net[2].live] == [True, True]
    set_example_weight_(net, {"2": [0, 0, 0, 0.5]})
    assert net[0].example_weight.item() == pytest.approx(0.1)
    assert net[2].example_weight.tolist() == [0, 0, 0, 0.5]
    set_example_weight_(net[0], 0)
    assert not net[0].live


def test_refused_weights_change_nothing():
    net = nn.Sequential(GeneralizedBatchNorm(4), GeneralizedBatchNorm(6))
    with pytest.raises(ConfigError, match=r"^1: example_weight: shape \(4,\)"):
        set_example_weight_(net, [0.1, 0.2, 0.3, 0.4])
    assert net[0].example_weight.shape == ()
    for bad in (-0.1, 1.5, float("nan")):
        with pytest.raises(ConfigError, match="outside 0 to 1"):
            set_example_weight_(net, bad)
    with pytest.raises(NormError, match=r"swap_norms_"):
        set_example_weight_(nn.Linear(2, 2), 0.1)
    with pytest.raises(NormError, match=r"^nowhere: not a Generalized"):
        set_example_weight_(net, {"nowhere": 0.1})


def test_refused_settings():
    with pytest.raises(NormError, match="48 channels do not divide into 32 groups"):
        GeneralizedBatchNorm(48, channel_groups=32)
    with pytest.raises(ConfigError, match="ghost_size: 0"):
        GeneralizedBatchNorm(4, ghost_size=0)
    with pytest.raises(ValueError, match="2D or higher"):
        GeneralizedBatchNorm(4)(torch.zeros(4))


def test_empty_input_and_repr():
    layer = GeneralizedBatchNorm(4, channel_groups=2, ghost_size=3, example_weight=0.1).eval()
    assert layer(torch.zeros(0, 4, 3, 3)).shape == (0, 4, 3, 3)
    for word in ("4,", "channel_groups=2", "ghost_size=3", "example_weight=0.1"):
        assert word in repr(layer)


def test_permuting_or_splitting_the_batch_changes_nothing_in_evaluation():
    layer = layer_with(4, channel_groups=2, ghost_size=2, example_weight=0.2).eval()
    x = torch.randn(5, 4, 6, 6, dtype=torch.float64)
    y = layer(x)
    order = torch.randperm(5)
    torch.testing.assert_close(layer(x[order]), y[order], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer(x[2:3]), y[2:3], rtol=1e-12, atol=1e-12)


def test_meta_construction():
    layer = GeneralizedBatchNorm(4, example_weight=0.5, device="meta")
    assert layer.example_weight.device.type == "meta"
    assert not layer.live
