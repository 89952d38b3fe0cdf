import copy
import pickle
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d
from timm.layers.norm_act import SyncBatchNormAct, convert_sync_batchnorm
from torch import nn
from torchvision.ops.misc import FrozenBatchNorm2d

from bnfix.core.errors import ConfigError, NormError
from bnfix.core.settings import SwapRecipe
from bnfix.norm.layer import GeneralizedBatchNorm, GeneralizedBatchNormAct, set_example_weight_
from bnfix.norm.sites import check_patterns, find_norms, selected, sites_with_statistics
from bnfix.norm.swap import plan_swap, swap_norms_, swap_planned_, unfreeze_
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import recalibrate_
from bnfix.weights.choose import choose_example_weight_
from tests import nets


class Own(nn.BatchNorm2d):
    """A subclass that nobody else knows."""

    def forward(self, x):
        return super().forward(x) * 2


class Normalizer(nn.Module):
    """Not Batch Norm, though its buffers are called so."""

    def __init__(self):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(1, 4, 1, 1))
        self.register_buffer("running_var", torch.ones(1, 4, 1, 1))

    def forward(self, x):
        return (x - self.running_mean) / self.running_var.sqrt()


def images(n=2, size=8, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, size, size, generator=generator, dtype=torch.float64).to(dtype)


def identity_of(model):
    """What a refused swap must leave: every module, tensor and value."""
    modules = [(name, id(m), m.training) for name, m in model.named_modules(remove_duplicate=False)]
    tensors = [(name, id(t)) for name, t in model.state_dict(keep_vars=True).items()]
    values = {name: t.clone() for name, t in model.state_dict().items()}
    return modules, tensors, values


def assert_untouched(model, before):
    modules, tensors, values = identity_of(model)
    assert modules == before[0]
    assert tensors == before[1]
    for name, value in before[2].items():
        torch.testing.assert_close(values[name], value, rtol=0, atol=0, equal_nan=True)


def stock_state(model):
    return {k: v for k, v in model.state_dict().items() if not k.endswith("example_weight")}


def assert_same_state(one, other):
    assert list(one) == list(other)
    for name in one:
        assert one[name].dtype == other[name].dtype, name
        assert torch.equal(one[name], other[name]), name


# ---- finding -------------------------------------------------------------------------------


def test_find_names_kinds_and_order():
    net = nets.residual()
    net.instance = nn.InstanceNorm2d(4, track_running_stats=True)
    net.group = nn.GroupNorm(2, 4)
    net.frozen = FrozenBatchNorm2d(4)
    net.lazy = nn.LazyBatchNorm2d()
    net.plain = nn.BatchNorm2d(4, track_running_stats=False)
    net.own = Own(4)
    net.other = Normalizer()
    sites = find_norms(net)
    assert [(s.name, s.kind) for s in sites] == [
        *((f"{n}", "BatchNorm2d") for n in ("bn1", "layer1.bn1", "layer1.bn2")),
        *((f"{n}", "BatchNorm2d") for n in ("layer2.bn1", "layer2.bn2")),
        ("frozen", "FrozenBatchNorm2d"),
        ("lazy", "LazyBatchNorm2d"),
        ("plain", "BatchNorm2d"),
        ("own", "Own"),
        ("other", "Normalizer"),
    ]
    by_name = {s.name: s for s in sites}
    assert [n for n, s in by_name.items() if s.frozen] == ["frozen"]
    assert [n for n, s in by_name.items() if not s.has_statistics] == ["plain"]
    assert [n for n, s in by_name.items() if s.problem] == ["lazy", "own", "other"]
    assert by_name["bn1"].module is net.bn1


def test_find_gives_one_site_for_many_names():
    net = nets.shared_norm()
    net.first.again = net.first.bn
    (site,) = find_norms(net)
    assert (site.name, site.aliases) == ("first.bn", ("first.again", "second.bn"))


def test_find_in_nothing_and_in_a_norm_itself():
    assert find_norms(nn.Sequential(nn.ReLU())) == []
    (site,) = find_norms(nn.BatchNorm2d(4))
    assert site.name == ""
    assert "the model is itself a norm layer" in site.problem


def test_sites_with_statistics():
    net = nets.residual()
    net.frozen = FrozenBatchNorm2d(4)
    net.plain = nn.BatchNorm2d(4, track_running_stats=False)
    net.own = Own(4)
    net.other = Normalizer()
    names = [s.name for s in sites_with_statistics(net)]
    assert names == ["bn1", "layer1.bn1", "layer1.bn2", "layer2.bn1", "layer2.bn2"]
    names = [s.name for s in sites_with_statistics(net, ["layer*"], ["*.bn2"])]
    assert names == ["layer1.bn1", "layer2.bn1"]


def test_patterns_meet_any_name():
    net = nets.shared_norm()
    sites = find_norms(net)
    assert selected(sites[0], [], [])
    assert selected(sites[0], ["second*"], [])
    assert not selected(sites[0], ["third*"], [])
    assert not selected(sites[0], ["first*"], ["second.bn"])
    check_patterns(sites, layers=["first.bn", "*.bn", "second?bn"])
    with pytest.raises(ConfigError, match=r"^--skip: nowhere .*; there are first\.bn, second\.bn"):
        check_patterns(sites, skip=["nowhere"])


# ---- planning ------------------------------------------------------------------------------


def test_a_plan_changes_nothing_and_says_what_would_be():
    net = nets.residual()
    before = identity_of(net)
    plan = plan_swap(net, SwapRecipe("batch-group", layers=("layer*",), skip=("*.bn2",)))
    assert_untouched(net, before)
    assert [(c.name, c.kind, c.channels, c.channel_groups) for c in plan.changes] == [
        ("layer1.bn1", "BatchNorm2d", 4, 4),
        ("layer2.bn1", "BatchNorm2d", 8, 8),
    ]
    assert {(c.ghost_size, c.example_weight, c.difference) for c in plan.changes} == {
        (2, 0.0, None)
    }
    assert plan.problems == plan.notes == ()
    assert plan.skipped == tuple(
        f"{n}: left alone as asked" for n in ("bn1", "layer1.bn2", "layer2.bn2")
    )


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        (SwapRecipe(), (48, None, 0.0)),
        (SwapRecipe("ghost"), (48, 16, 0.0)),
        (SwapRecipe("batch-group"), (16, 2, 0.0)),
        (SwapRecipe("group"), (16, 1, 1.0)),
        (SwapRecipe("batch"), (48, None, 0.0)),
        (SwapRecipe("group", 0.25, 4, 3), (3, 4, 0.25)),
        (SwapRecipe("group", 0.0), (16, 1, 0.0)),
    ],
)
def test_kinds_and_overrides(recipe, expected):
    (change,) = plan_swap(nn.Sequential(nn.BatchNorm2d(48)), recipe).changes
    assert (change.channel_groups, change.ghost_size, change.example_weight) == expected


def test_all_problems_are_told_at_once_and_nothing_is_changed():
    net = nn.Sequential()
    net.good = nn.BatchNorm2d(32)
    net.odd = nn.BatchNorm2d(48)
    net.own = Own(32)
    net.lazy = nn.LazyBatchNorm2d()
    net.bare = nn.BatchNorm2d(64, affine=False)
    net.drifting = nn.BatchNorm2d(64, track_running_stats=False)
    net.patched = nn.BatchNorm2d(64)
    net.patched.forward = lambda x: x
    before = identity_of_lazy(net)
    with pytest.raises(NormError, match=r"^norm layers: ") as caught:
        swap_norms_(net, channel_groups=32)
    message = str(caught.value)
    for part in (
        "odd: 48 channels do not divide into 32 groups; use a divisor of 48, for example "
        "--channel-groups 16",
        "own: tests.test_surgery.Own is not a layer that bnfix knows",
        "lazy: LazyBatchNorm2d has no size yet; run the model once first",
        "bare: without scale and shift it cannot keep its outputs",
        "drifting: keeps no running statistics, so groups or ghost batches would also change",
        "patched: its forward is overridden on the instance",
    ):
        assert part in message
    assert "good" not in message
    assert "\n" not in message
    assert identity_of_lazy(net) == before
    swap_norms_(net, channel_groups=32, skip=["odd", "own", "lazy", "bare", "drifting", "patched"])
    assert isinstance(net.good, GeneralizedBatchNorm)


def identity_of_lazy(model):
    return [(name, id(m), type(m)) for name, m in model.named_modules()]


@pytest.mark.parametrize(
    ("make", "options", "found"),
    [
        (lambda: nn.Sequential(nn.ReLU()), {}, "model: it has no Batch Norm layer"),
        (lambda: nn.BatchNorm2d(4), {}, "the model is itself a norm layer"),
        (lambda: nn.Sequential(Own(4)), {}, r"^norm layers: 0: tests\.test_surgery\.Own is not"),
        (lambda: nn.Sequential(Normalizer()), {}, "Normalizer is not a layer that bnfix knows"),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)),
            {"example_weight": 0.1},
            "0: keeps no running statistics to mix the example's with",
        ),
        (
            lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)),
            {"to": "ghost"},
            "0: keeps no running statistics, so groups or ghost batches",
        ),
        (nets.plain, {"layers": ["bn1", "bn7"]}, r"bn7 matches no norm .* are bn1, bn2\."),
        (nets.plain, {"skip": ["conv1"]}, "conv1 matches no norm layer"),
        (
            lambda: nn.Sequential(*(nn.BatchNorm2d(6) for _ in range(11))),
            {"channel_groups": 4},
            "7: 6 channels do not divide .*; and 3 more",
        ),
    ],
)
def test_refusals(make, options, found):
    net = make()
    before = identity_of(net)
    with pytest.raises(ConfigError if "matches no" in found else NormError, match=found):
        swap_norms_(net, **options)
    assert_untouched(net, before)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ({"to": "layer"}, "--to: 'layer' is not known"),
        ({"example_weight": 1.5}, "--example-weight: 1.5, expected 0 to 1"),
        ({"ghost_size": 0}, "--ghost-size: 0"),
        ({"channel_groups": 0}, "--channel-groups: 0"),
    ],
)
def test_refused_settings(options, found):
    with pytest.raises(ConfigError, match=found):
        swap_norms_(nets.plain(), **options)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_scripted_model_is_refused_by_name():
    net = torch.jit.script(nets.bn1d())
    for refuses in (
        swap_norms_,
        lambda model: recalibrate_(model, [torch.randn(4, 5)]),
        lambda model: set_example_weight_(model, 0.1),
        lambda model: choose_example_weight_(model, [torch.randn(4, 5)]),
    ):
        with pytest.raises(
            NormError, match=r"^model: a RecursiveScriptModule, which is TorchScript"
        ):
            refuses(net)
        with pytest.raises(NormError, match=r"^(norm layers: 0\.1|0): is TorchScript"):
            refuses(nn.Sequential(net))


def prepared_for_quantization():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    net = torch.ao.quantization.fuse_modules_qat(net.train(), [["0", "1", "2"]])
    net.qconfig = torch.ao.quantization.get_default_qat_qconfig("x86")
    return torch.ao.quantization.prepare_qat(net)


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")
def test_a_network_prepared_for_quantization_is_refused_by_name():
    net = prepared_for_quantization()
    state = copy.deepcopy(net.state_dict())
    for refuses in (swap_norms_, lambda model: recalibrate_(model, [images()])):
        with pytest.raises(NormError, match=r"0\.bn: 0 \(ConvBnReLU2d\) prepares for quantization"):
            refuses(net)
    assert_same_state(net.state_dict(), state)
    stubbed = nn.Sequential(torch.ao.quantization.QuantStub(), nn.BatchNorm2d(3))
    assert [site.problem for site in find_norms(stubbed)] == [""]


class Heir(nn.BatchNorm2d):
    """A subclass with nothing of its own in forward."""


def test_norms_with_a_forward_of_their_own_are_not_measured():
    net = nn.Sequential(nn.BatchNorm2d(3), Own(3), Heir(3), nn.BatchNorm2d(3))
    net[3].forward = lambda x: x
    state = copy.deepcopy(net.state_dict())
    with pytest.raises(
        NormError, match=r"1: tests\.test_surgery\.Own has its own forward.*; 3: torch"
    ):
        recalibrate_(net, [images()])
    assert_same_state(net.state_dict(), state)
    assert list(residuals(net, [images()])) == ["0", "2"]
    done = recalibrate_(net, [images()], skip=["1", "3"])
    assert [layer.name for layer in done.layers] == ["0", "2"]


def test_a_plan_of_another_model_is_refused():
    plan = plan_swap(nets.residual())
    net = nets.plain()
    before = identity_of(net)
    with pytest.raises(NormError, match=r"layer1\.bn1: not a norm layer of this model"):
        swap_planned_(net, plan)
    assert_untouched(net, before)


# ---- swapping: what is kept ------------------------------------------------------------------

MODELS = {
    "plain": (nets.plain, (2, 3, 6, 6)),
    "residual": (nets.residual, (2, 3, 8, 8)),
    "resnet20": (nets.resnet20, (2, 3, 16, 16)),
    "usps": (nets.usps_net, (2, 1, 16, 16)),
    "shared": (nets.shared_norm, (2, 3, 6, 6)),
    "dropout": (nets.with_dropout, (2, 3, 6, 6)),
    "bn1d": (nets.bn1d, (4, 5)),
    "bn3d": (nets.bn3d, (2, 2, 3, 4, 4)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_the_same_bit_for_bit_and_so_is_the_state(name, dtype):
    make, shape = MODELS[name]
    net = nets.lived_in(make()).to(dtype).eval()
    state = copy.deepcopy(net.state_dict())
    x = torch.randn(shape).to(dtype)
    expected = net(x)
    done = swap_norms_(net)
    assert all(c.difference == 0 for c in done.changes)
    assert torch.equal(net(x), expected)
    assert_same_state(stock_state(net), state)
    added = set(net.state_dict()) - set(state)
    names = [n for s in find_norms(net) for n in (s.name, *s.aliases)]
    assert added == {f"{n}.example_weight" for n in names}
    make().to(dtype).load_state_dict(stock_state(net), strict=True)
    net.load_state_dict(state, strict=True)
    # and back
    swap_norms_(net, to="batch")
    assert_same_state(stock_state(net), state)
    assert torch.equal(net(x), expected)


@pytest.mark.parametrize("name", ["plain", "residual", "bn1d", "shared"])
def test_training_is_the_same_bit_for_bit(name):
    make, shape = MODELS[name]
    net = nets.lived_in(make()).train()
    twin = copy.deepcopy(net)
    swap_norms_(net)
    for seed in range(3):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        one, other = net(x), twin(x)
        assert torch.equal(one, other)
        one.square().sum().backward()
        other.square().sum().backward()
    assert_same_state(stock_state(net), dict(twin.state_dict()))
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_the_very_parameters_and_buffers_are_kept():
    net = nets.residual()
    tensors = dict(net.state_dict(keep_vars=True))
    swap_norms_(net, example_weight=0.2, ghost_size=3)
    now = net.state_dict(keep_vars=True)
    assert all(now[name] is tensor for name, tensor in tensors.items())


def test_aliases_stay_one_module():
    net = nets.shared_norm()
    net.first.again = net.first.bn
    net.list = nn.ModuleList([net.first.bn, nn.BatchNorm2d(4), net.first.bn])
    done = swap_norms_(net)
    assert [c.name for c in done.changes] == ["first.bn", "list.1"]
    layer = net.first.bn
    assert isinstance(layer, GeneralizedBatchNorm)
    assert net.first.again is net.second.bn is net.list[0] is net.list[2] is layer
    assert net.list[1] is not layer
    assert not any(type(m) is nn.BatchNorm2d for m in net.modules())


def held_outside_and_not():
    """Two networks of the same weights: one loops over a plain list, the other over its tree."""
    net, twin = nets.lived_in(nets.held_outside()), nets.plain()
    twin.load_state_dict(net.state_dict())
    return net, twin


@pytest.mark.parametrize(
    "options",
    [{"example_weight": 0.5}, {"to": "group"}, {"ghost_size": 1, "channel_groups": 2}],
)
def test_norms_that_are_held_outside_the_module_tree_follow(options):
    net, twin = held_outside_and_not()
    held = [net.bn1, net.bn2]
    state = copy.deepcopy(net.state_dict())
    swap_norms_(net, **options)
    swap_norms_(twin, **options)
    assert [net.bn1, net.bn2] == held == [net.layers[1], net.last]
    assert {type(layer) for layer in held} == {GeneralizedBatchNorm}
    for training in (False, True):
        net.train(training), twin.train(training)
        assert torch.equal(net(images()), twin(images()))
    net.eval()
    set_example_weight_(net, 0.25)
    assert torch.equal(copy.deepcopy(net)(images()), net(images()))
    assert torch.equal(pickle.loads(pickle.dumps(net))(images()), net(images()))
    swap_norms_(net, to="batch")
    assert [net.bn1, net.bn2] == held
    again = nets.lived_in(nets.plain()).eval()
    again.load_state_dict(stock_state(net))
    torch.testing.assert_close(again(images()), net(images()))
    assert list(state) == list(stock_state(net))


def test_only_some_layers():
    net = nets.residual()
    done = swap_norms_(net, layers=["layer?.bn*"], skip=["layer2.*"])
    assert [c.name for c in done.changes] == ["layer1.bn1", "layer1.bn2"]
    kinds = {n: type(m) for n, m in net.named_modules() if "bn" in n}
    assert [n for n, k in kinds.items() if k is GeneralizedBatchNorm] == [
        "layer1.bn1",
        "layer1.bn2",
    ]


def test_a_prefix_makes_no_difference():
    class Wrapper(nn.Module):
        def __init__(self, module):
            super().__init__()
            self.module = module

    net = Wrapper(nets.residual())
    state = set(net.state_dict())
    done = swap_norms_(net, layers=["*.bn1"])
    assert next(c.name for c in done.changes) == "module.bn1"
    assert set(stock_state(net)) == state


def test_every_field_is_kept():
    net = nn.Sequential(nn.BatchNorm2d(4, eps=3e-3, momentum=None), nn.BatchNorm2d(4, affine=False))
    net[0].colour = "red"
    net[0].weight.requires_grad_(False)
    net[0].weight._no_decay = True
    net[0].register_buffer("extra", torch.arange(3))
    net[0].register_buffer("silent", torch.ones(2), persistent=False)
    net[0].register_parameter("gain", nn.Parameter(torch.ones(1)))
    net[0].child = nn.Linear(2, 2)
    net.train()
    net[1].eval()
    old = dict(vars(net[0]))
    keys = list(net.state_dict())
    swap_norms_(net)
    new = vars(net[0])
    for name, value in old.items():
        if name not in ("_buffers", "_non_persistent_buffers_set"):
            added = {"gates": None} if name == "_parameters" else {}
            assert new[name] == (value | added if added else value), name
    assert set(new) - set(old) == {
        "channel_groups", "ghost_size", "weighs", "_shiftable", "uses_batch",
    }  # fmt: skip
    assert list(stock_state(net)) == keys
    assert net[0].eps == 3e-3
    assert net[0].momentum is None
    assert not net[0].weight.requires_grad
    assert net[0].bias.requires_grad
    assert torch.equal(net[0].silent, torch.ones(2))
    assert [net[0].training, net[1].training] == [True, False]
    assert net[1].weight is None


@pytest.mark.parametrize("groups", [None, 2])
def test_flags_and_marks_of_parameters_survive_a_refit(groups):
    net = nets.lived_in(nets.plain())
    net.bn1.weight.requires_grad_(False)
    net.bn1.bias._no_decay = True
    swap_norms_(net, channel_groups=groups)
    assert not net.bn1.weight.requires_grad
    assert net.bn1.bias.requires_grad
    assert isinstance(net.bn1.weight, nn.Parameter)
    assert net.bn1.bias._no_decay


@pytest.mark.parametrize("groups", [None, 2])
def test_hooks_are_kept_and_their_handles_still_remove(groups):
    net = nets.lived_in(nets.plain())
    seen = []
    kind = GeneralizedBatchNorm
    bn = net.bn1
    handles = [
        bn.register_forward_pre_hook(lambda m, a: seen.append(("pre", type(m)))),
        bn.register_forward_hook(
            lambda m, a, k, o: seen.append(("forward", type(m))), with_kwargs=True
        ),
        bn.register_full_backward_pre_hook(lambda m, g: seen.append(("back pre", type(m)))),
        bn.register_full_backward_hook(lambda m, i, o: seen.append(("back", type(m)))),
        bn.register_state_dict_post_hook(lambda m, *_: seen.append(("state", type(m)))),
        bn.register_load_state_dict_pre_hook(lambda m, *_: seen.append(("load pre", type(m)))),
        bn._register_load_state_dict_pre_hook(lambda *_: seen.append(("load pre", kind))),
        bn.register_load_state_dict_post_hook(lambda m, _: seen.append(("load", type(m)))),
    ]
    plan = swap_norms_(net, channel_groups=groups)
    assert seen == []  # comparing outputs runs no hook of the user's
    assert plan.changes[0].difference < 1e-6
    del bn  # a hook on loading that was registered with its module holds it weakly

    def exercise():
        seen.clear()
        net(images()).sum().backward()
        net.load_state_dict(net.state_dict())
        return list(seen)

    assert exercise() == [
        (what, kind)
        for what in ("pre", "forward", "back pre", "back", "state", "load pre", "load pre", "load")
    ]
    later = net.bn1.register_forward_hook(lambda *_: seen.append("later"))
    for handle in (*handles, later):
        handle.remove()
    assert exercise() == []


def test_a_compiled_call_of_the_old_layer_is_not_carried_over():
    net = nets.lived_in(nets.plain()).eval()
    net.bn1.compile(backend="eager")
    swap_norms_(net, example_weight=0.5)
    twin = nets.lived_in(nets.plain()).eval()
    twin.load_state_dict(stock_state(net))
    swap_norms_(twin, example_weight=0.5)
    assert torch.equal(net(images()), twin(images()))


def test_deepcopy_and_pickle():
    net = nets.lived_in(nets.shared_norm()).eval()
    swap_norms_(net, channel_groups=2, example_weight=0.3, ghost_size=3)
    expected = net(images())
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(images()), expected)
        assert twin.first.bn is twin.second.bn
        assert twin.first.bn.weight is not net.first.bn.weight
        set_example_weight_(twin, 0)
    assert torch.equal(net(images()), expected)


@pytest.mark.parametrize("settings_", [{}, {"channel_groups": 2, "example_weight": 0.2}])
def test_compile_before_and_after(settings_):
    torch._dynamo.reset()
    net = nets.lived_in(nets.plain()).eval()
    compiled = torch.compile(net, backend="eager")
    compiled(images())
    done = swap_norms_(compiled, **settings_)
    assert done.changes[0].name == "_orig_mod.bn1"
    expected = net(images())
    # What is compiled shifts by the population mean: the same but for rounding.
    torch.testing.assert_close(compiled(images()), expected)
    full = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(full(images()), expected)


def test_meta_models_are_swapped_unmeasured():
    with torch.device("meta"):
        net = nets.plain()
    done = swap_norms_(net, channel_groups=2)
    assert [c.difference for c in done.changes] == [None, None]
    assert net.bn1.example_weight.device.type == "meta"


# ---- kinds of layers -------------------------------------------------------------------------


def test_layers_without_statistics():
    net = nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)).eval()
    x = torch.randn(3, 4, 5, 5)
    expected = net(x)
    done = swap_norms_(net)
    assert done.changes[0].difference is None
    assert torch.equal(net(x), expected)
    swap_norms_(net, to="group")
    assert net[0].live


def test_sync_batch_norm_is_swapped_with_a_note():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(nets.lived_in(nets.plain())).eval()
    keys = list(net.state_dict())
    expected = net(images())
    done = swap_norms_(net)
    assert done.notes == ("bn1, bn2: was SyncBatchNorm; in training it now normalizes per process",)
    assert torch.equal(net(images()), expected)
    assert list(stock_state(net)) == keys


def frozen_net(seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), FrozenBatchNorm2d(8, eps=1e-3), nn.ReLU())
    for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
        getattr(net[1], name).copy_(value + 0.4 * torch.rand(8, generator=generator))
    return net


@pytest.mark.parametrize("groups", [None, 2])
def test_frozen_batch_norm(groups):
    net = frozen_net().train()
    state = copy.deepcopy(net.state_dict())
    x = images()
    expected = net(x)
    done = swap_norms_(net, channel_groups=groups)
    layer = net[1]
    assert type(layer) is GeneralizedBatchNorm
    assert done.changes[0].difference < 1e-6
    assert list(stock_state(net)) == list(state)
    assert [n for n, _ in net.named_parameters()] == ["0.weight"]
    assert not layer.training
    assert not net.train()[1].training
    assert net[2].training
    torch.testing.assert_close(net(x), expected)
    assert find_norms(net)[0].frozen
    # a stock layer's state, with and without its counter, loads strictly
    stock = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8, eps=1e-3), nn.ReLU())
    for state_given in (nets.lived_in(stock).state_dict(), state):
        net.load_state_dict(state_given, strict=True)
        assert torch.equal(layer.running_var, state_given["1.running_var"])
        frozen_net().load_state_dict(stock_state(net), strict=True)
    broken = {k: v for k, v in state.items() if k != "1.running_var"}
    with pytest.raises(RuntimeError, match=r"Missing key.*1\.running_var"):
        net.load_state_dict(broken, strict=True)


def test_a_frozen_dead_channel_far_from_zero_is_no_reason_to_refuse():
    net = frozen_net()
    net[1].running_var[0], net[1].running_mean[0], net[1].eps = 1e-40, 300.0, 1e-5
    assert swap_norms_(net).changes[0].difference < 1e-6


def timm_net(layer):
    return nn.Sequential(nn.Conv2d(3, 8, 3), layer, nn.Conv2d(8, 4, 3))


@pytest.mark.parametrize("groups", [None, 4])
@pytest.mark.parametrize("kind", ["stock", "sync", "frozen"])
def test_timm_norm_and_activation(kind, groups):
    net = nets.lived_in(timm_net(BatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=nn.Dropout)))
    if kind == "sync":
        net = convert_sync_batchnorm(net)
        assert type(net[1]) is SyncBatchNormAct
    elif kind == "frozen":
        frozen = FrozenBatchNormAct2d(8, act_layer=nn.PReLU, drop_layer=nn.Dropout)
        frozen.load_state_dict(net[1].state_dict())
        net[1] = frozen
    act, drop = net[1].act, net[1].drop
    keys = list(net.state_dict())
    net.eval()
    drop.train()  # it must not disturb the comparison
    expected = net.eval()(images())
    state = torch.random.get_rng_state()
    done = swap_norms_(net, channel_groups=groups)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert done.changes[0].difference < 1e-6
    layer = net[1]
    assert type(layer) is GeneralizedBatchNormAct
    assert layer.act is act
    assert layer.drop is drop
    assert list(stock_state(net)) == keys
    torch.testing.assert_close(net(images()), expected)
    assert layer.frozen == (kind == "frozen")
    # and again, from the generalized layer
    swap_norms_(net, to="batch")
    assert type(net[1]) is GeneralizedBatchNormAct
    torch.testing.assert_close(net(images()), expected)


def test_a_dropout_in_training_mode_does_not_disturb_the_comparison():
    net = timm_net(BatchNormAct2d(8, drop_layer=nn.Dropout)).train()
    assert swap_norms_(net).changes[0].difference == 0
    assert net[1].drop.training


def test_timm_sync_layer_without_activation():
    net = timm_net(SyncBatchNormAct(8)).eval()
    expected = net(images())
    swap_norms_(net)
    torch.testing.assert_close(net(images()), expected)


def test_attributes_that_happen_to_be_called_act_and_drop_are_not_applied():
    net = timm_net(nn.BatchNorm2d(8)).eval()
    net[1].act, net[1].drop = nn.ReLU(), nn.Identity()
    expected = net(images())
    swap_norms_(net)
    assert torch.equal(net(images()), expected)


def test_a_whole_timm_network():
    net = timm.create_model("test_efficientnet", num_classes=5).eval()
    nets.lived_in(net)
    keys = list(net.state_dict())
    x = images(2, 32)
    expected = net(x)
    done = swap_norms_(net)
    assert {c.kind for c in done.changes} == {"BatchNormAct2d"}
    assert torch.equal(net(x), expected)
    assert list(stock_state(net)) == keys


# ---- grouped conversion ----------------------------------------------------------------------


def with_wild_statistics(net, seed):
    """Random statistics and scales, a tenth of the channels dead, as in real checkpoints."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for site in find_norms(net):
            bn = site.module
            c = bn.num_features
            bn.weight.copy_(torch.randn(c, generator=generator))
            bn.bias.copy_(torch.randn(c, generator=generator))
            bn.running_mean.copy_(torch.randn(c, generator=generator))
            bn.running_var.copy_(torch.rand(c, generator=generator) * 2 + 0.1)
            dead = torch.rand(c, generator=generator) < 0.1
            dead[0] = True
            bn.running_var[dead] = 1e-40
            bn.running_mean[dead] *= 1e-3
    return net


@pytest.mark.parametrize("groups", [4, 8, 16])
def test_grouped_conversion_is_exact_at_weight_0(groups):
    net = with_wild_statistics(nets.resnet20(), groups).eval()
    x = images(4, 32)
    expected = net(x).detach()
    wide = copy.deepcopy(net).double()
    done = swap_norms_(net, channel_groups=groups)
    assert all(c.difference < 1e-4 for c in done.changes)
    assert all(m.channel_groups == groups for m in net.modules() if hasattr(m, "channel_groups"))
    scale = expected.abs().max()
    assert float((net(x).detach() - expected).abs().max() / scale) < 1e-4
    # moments are stored pooled and repeated, so the stock network computes the same from them
    stock = nets.resnet20().eval()
    stock.load_state_dict(stock_state(net), strict=True)
    assert float((stock(x).detach() - expected).abs().max() / scale) < 1e-4
    pooled = net.bn1.running_var.view(groups, -1)
    assert torch.equal(pooled, pooled[:, :1].expand_as(pooled))
    # in float64 nothing but the formula is left
    exact = wide(x.double())
    swap_norms_(wide, channel_groups=groups)
    torch.testing.assert_close(wide(x.double()), exact, rtol=1e-9, atol=1e-9)


@given(
    first=st.sampled_from([1, 2, 3, 4, 6, 12]),
    second=st.sampled_from([1, 2, 3, 4, 6, 12]),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=25, deadline=None)
def test_any_groups_after_any_other(first, second, seed):
    net = nets.lived_in(nn.Sequential(nn.BatchNorm2d(12)), seed).double().eval()
    x = torch.randn(3, 12, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    expected = net(x)
    swap_norms_(net, channel_groups=first)
    swap_norms_(net, channel_groups=second)
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)
    swap_norms_(net, to="batch")
    assert net[0].channel_groups == 12
    torch.testing.assert_close(net(x), expected, rtol=1e-9, atol=1e-9)


def test_the_same_groups_again_change_no_bit():
    net = nets.lived_in(nn.Sequential(nn.BatchNorm2d(12)))
    swap_norms_(net, channel_groups=4)
    state = copy.deepcopy(net.state_dict())
    swap_norms_(net, channel_groups=4)
    assert_same_state(dict(net.state_dict()), state)


@pytest.mark.parametrize("affine", [True, False])
def test_a_grouped_layer_that_was_trained_keeps_its_outputs_on_the_way_back(affine):
    layer = GeneralizedBatchNorm(6, affine=affine, channel_groups=2, dtype=torch.float64)
    net = nn.Sequential(layer)
    for seed in range(3):  # its running moments are per channel, its normalization per group
        x = torch.randn(4, 6, 5, 5, generator=torch.Generator().manual_seed(seed)).double()
        net(x * torch.arange(1, 7).view(6, 1, 1) + 1)
    x = torch.randn(2, 6, 5, 5, dtype=torch.float64)
    expected = net.eval()(x)
    swap_norms_(net, to="batch")
    assert net[0].channel_groups == 6
    torch.testing.assert_close(net(x), expected)


def test_weighted_layers_can_be_given_up_again():
    net = nets.lived_in(nets.plain()).eval()
    expected = net(images())
    done = swap_norms_(net, to="group")
    assert [c.difference for c in done.changes] == [None, None]
    assert not torch.allclose(net(images()), expected)
    swap_norms_(net, to="batch")
    torch.testing.assert_close(net(images()), expected)


def test_weights_per_channel_are_kept_where_asked():
    net = nets.lived_in(nets.plain())
    swap_norms_(net)
    weights = [0.1, 0.2, 0.3, 0.4]
    set_example_weight_(net, {"bn1": weights})
    plan = plan_swap(net, SwapRecipe("ghost"))
    kept = replace(plan, changes=tuple(replace(c, example_weight=None) for c in plan.changes))
    swap_planned_(net, kept)
    assert net.bn1.example_weight.tolist() == pytest.approx(weights)
    assert (net.bn1.ghost_size, net.bn1.live, net.bn2.live) == (16, True, False)
    swap_norms_(net)
    assert net.bn1.example_weight.shape == ()
    assert not net.bn1.live
    stock = nets.plain()
    plan = plan_swap(stock)
    swap_planned_(stock, replace(plan, changes=tuple(replace(plan.changes[0], example_weight=None)
                                                     for _ in "1")))  # fmt: skip
    assert not stock.bn1.live


def test_statistics_that_are_not_finite_are_swapped_but_not_pooled():
    net = nets.lived_in(nets.plain())
    net.bn1.running_var[1] = float("nan")
    net.bn1.running_mean[2] = float("inf")
    net.bn2.running_var[0] = -1.0
    swap_norms_(net)  # the same NaN as before: a patient, not a reason to refuse
    assert net.bn1.running_var[1].isnan()
    before = identity_of(net)
    with pytest.raises(NormError, match=r"bn1: its outputs would change by .*not all of its stat"):
        swap_norms_(net, channel_groups=2)
    assert_untouched(net, before)


def test_moments_too_far_apart_for_half_precision_are_not_pooled():
    net = nets.lived_in(nets.plain())
    net.bn1.running_mean.copy_(torch.tensor([0.0, 1e3, 0.0, 0.0]))
    net.bn1.running_var.copy_(torch.tensor([1e-6, 1.0, 1.0, 1.0]))
    net.bfloat16()
    before = identity_of(net)
    with pytest.raises(NormError, match=r"bn1: .*differ too much for its type; convert in float32"):
        swap_norms_(net, channel_groups=2)
    assert_untouched(net, before)


def test_half_precision_models():
    net = nets.lived_in(nets.plain()).bfloat16().eval()
    x = images(dtype=torch.bfloat16)
    expected = net(x)
    done = swap_norms_(net, channel_groups=2)
    assert all(c.difference < 1e-2 for c in done.changes)
    assert net.bn1.weight.dtype == net.bn1.running_var.dtype == torch.bfloat16
    torch.testing.assert_close(net(x), expected, atol=0.05, rtol=0.05)


@pytest.mark.parametrize("kind", ["torchvision", "timm"])
def test_a_frozen_layer_thaws_in_place_with_the_same_numbers(kind):
    frozen = FrozenBatchNormAct2d(4) if kind == "timm" else FrozenBatchNorm2d(4, eps=1e-3)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), frozen, nn.BatchNorm2d(4)).eval()
    net.again = net[1]
    for name in ("weight", "bias", "running_mean", "running_var"):
        getattr(net[1], name).uniform_(0.5, 2)
    x = torch.randn(2, 3, 8, 8)
    before, keys = net(x), set(net.state_dict())
    (thawed,) = unfreeze_(net)
    net.eval()
    assert thawed is net[1] is net.again is frozen
    assert isinstance(net[1], BatchNormAct2d if kind == "timm" else nn.BatchNorm2d)
    torch.testing.assert_close(net(x), before)
    added = {f"{name}.num_batches_tracked" for name in ("1", "again")}
    assert set(net.state_dict()) == keys | added
    assert net[1].weight.requires_grad
    assert unfreeze_(net) == []
