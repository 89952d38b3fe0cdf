"""The batch as the third part of a layer's statistics in evaluation."""

import copy
import json

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bnfix
from bnfix.core.errors import ConfigError, NormError
from bnfix.core.guards import Snapshot
from bnfix.core.settings import WeightRecipe
from bnfix.deploy.plain import ExampleNorm
from bnfix.norm import kernels
from bnfix.norm.kernels import Finish
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.norm.moments import median_mix, median_mix_of_few
from bnfix.norm.swap import swap_norms_
from bnfix.weights.mixtures import learn_batch_weight_
from tests import nets, reference
from tests.conftest import images_of
from tests.test_exporting import NETS, spec
from tests.test_kernels import LAYOUTS, close, laid_out, oracle, terms_for
from tests.test_norms import arrays, layer_with, shapes

ESTIMATORS = ("mean", "median")
WEIGHTS = [(0.0, 0.3), (0.25, 0.5), (0.5, 0.5), (0.0, 1.0), (0.9375, 0.0625), (1.0, 0.0)]
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@given(
    shape=shapes,
    weights=st.sampled_from(WEIGHTS),
    estimator=st.sampled_from(ESTIMATORS),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_evaluation_equals_reference(shape, weights, estimator, data):
    n, c, spatial = shape
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    a, b = (np.float32(w) for w in weights)
    each = data.draw(st.booleans())
    layer = layer_with(
        c,
        channel_groups=groups,
        example_weight=[float(a)] * c if each else float(a),
        batch_weight=float(b),
        batch_estimator=estimator,
    ).eval()
    x = torch.randn(n, c, *spatial, dtype=torch.float64)
    gamma, beta, running = arrays(layer)
    expected = reference.evaluate(
        x.numpy(), gamma, beta, running, groups=groups, example_weight=a, eps=1e-5,
        batch_weight=b, median=estimator == "median",
    )  # fmt: skip
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("groups", [12, 4])
def test_a_weight_per_channel(groups):
    b = np.linspace(0, 1, 12).astype(np.float32)
    a = ((1 - b) / 2).astype(np.float32)
    weights = {"example_weight": a.tolist(), "batch_weight": b.tolist()}
    layer = layer_with(12, channel_groups=groups, **weights).eval()
    x = torch.randn(3, 12, 4, 5, dtype=torch.float64)
    gamma, beta, running = arrays(layer)
    expected = reference.evaluate(
        x.numpy(), gamma, beta, running, groups=groups, eps=1e-5, **weights
    )
    np.testing.assert_allclose(layer(x).detach(), expected, rtol=1e-9, atol=1e-9)


@given(
    shape=shapes,
    weights=st.sampled_from([(0.0, 0.25), (0.25, 0.5), (0.5, 0.5), (0.0, 1.0)]),
    estimator=st.sampled_from(ESTIMATORS),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
@settings(max_examples=80, deadline=None)
def test_a_batch_of_one_is_an_example_of_both_weights_bit_for_bit(
    shape, weights, estimator, dtype, data
):
    _, c, spatial = shape
    groups = data.draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    a, b = weights
    how = {"channel_groups": groups, "dtype": torch.float32}
    mixed = layer_with(c, example_weight=a, batch_weight=b, batch_estimator=estimator, **how)
    weighed = layer_with(c, example_weight=a + b, **how)
    x = torch.randn(1, c, *spatial).to(dtype)
    for layout in LAYOUTS[:2]:
        given = laid_out(x, layout)
        with torch.no_grad():
            assert torch.equal(mixed.eval()(given), weighed.eval()(given))


@pytest.mark.parametrize("a", [0.0, 0.25])
def test_without_a_weight_it_is_the_layer_as_before_bit_for_bit(a):
    layer, twin = (
        layer_with(4, dtype=torch.float32, example_weight=a, **more).eval()
        for more in ({}, {"batch_weight": 0.0, "batch_estimator": "median"})
    )
    x = torch.randn(3, 4, 5, 5)
    assert torch.equal(layer(x), twin(x))
    assert set(twin.state_dict()) == set(layer.state_dict())
    assert not twin.uses_batch
    if not a:
        stock = nn.BatchNorm2d(4)
        stock.load_state_dict({k: v for k, v in twin.state_dict().items() if "example" not in k})
        assert torch.equal(twin(x), stock.eval()(x))
        assert not twin.live


@given(shape=shapes, layout=st.sampled_from(LAYOUTS), dtype=st.sampled_from(DTYPES[:2]))
@settings(max_examples=60, deadline=None)
def test_weight_one_is_training_without_updates(shape, layout, dtype):
    n, c, spatial = shape
    if n * int(np.prod(spatial)) == 1:
        return  # stock training refuses it
    layer = layer_with(c, dtype=dtype, batch_weight=1.0).eval()
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(n, c, *spatial, dtype=dtype)
    x = laid_out(x, layout) if spatial else x
    y = layer(x)
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, True, 0.0, layer.eps)
    # Two values may lie so close together that their rounding is divided by little more than eps.
    tolerance = 1e-9 if dtype == torch.float64 else 5e-4
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(before[name], t) for name, t in layer.state_dict().items())


@given(shape=shapes, weights=st.sampled_from(WEIGHTS[:4]), estimator=st.sampled_from(ESTIMATORS))
@settings(max_examples=40, deadline=None)
def test_permuting_the_batch_permutes_the_outputs(shape, weights, estimator):
    n, c, spatial = shape
    a, b = weights
    layer = layer_with(c, example_weight=a, batch_weight=b, batch_estimator=estimator).eval()
    x = torch.randn(n, c, *spatial, dtype=torch.float64)
    order = torch.randperm(n)
    torch.testing.assert_close(layer(x[order]), layer(x)[order], rtol=1e-9, atol=1e-9)


def test_neighbours_matter():
    layer = layer_with(4, batch_weight=0.5).eval()
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    assert not torch.allclose(layer(x)[:2], layer(x[:2]), atol=1e-3)
    assert layer.live
    assert layer.uses_batch


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("groups", [2, 4])
def test_gradients_reach_input_affine_and_both_weights(estimator, groups):
    layer = layer_with(
        4, channel_groups=groups, example_weight=[0.1, 0.2, 0.3, 0.4],
        batch_weight=[0.2, 0.5, 0.1, 0.4], batch_estimator=estimator,
    ).eval()  # fmt: skip
    a, b = (w.double().requires_grad_() for w in (layer.example_weight, layer.batch_weight))
    # Five examples: a median is one of them and has a gradient.
    x = torch.randn(5, 4, 3, 3, dtype=torch.float64, requires_grad=True)

    def run(x, a, b, gamma, beta):
        layer._buffers.update(example_weight=a, batch_weight=b)
        return torch.func.functional_call(layer, {"weight": gamma, "bias": beta}, (x,))

    assert torch.autograd.gradcheck(run, (x, a, b, layer.weight, layer.bias))


def test_float32_gradients_are_those_of_float64():
    layer = layer_with(6, dtype=torch.float32, example_weight=0.2, batch_weight=0.5).eval()
    x, given = torch.randn(2, 4, 6, 7, 7).unbind()
    found = []
    for dtype in (torch.float32, torch.float64):
        own, values = copy.deepcopy(layer).to(dtype), x.to(dtype, copy=True).requires_grad_()
        own(values).backward(given.to(dtype))
        found.append([t.grad.double() for t in (values, own.weight, own.bias)])
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-4, atol=1e-5)


# ---- the fast ways ---------------------------------------------------------------------------


@st.composite
def cases(draw):
    c = draw(st.sampled_from([1, 2, 6, 12, 40]))
    spatial = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(draw(st.integers(1, 5)), c, *spatial, generator=seed)
    x = (x * draw(st.sampled_from([0.1, 1.0, 30.0]))).to(draw(st.sampled_from(DTYPES)))
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    a, b = draw(st.sampled_from(WEIGHTS))
    terms = terms_for(c, weight=a, groups=groups, bare=draw(st.booleans()))
    b = torch.full((c,), b) if draw(st.booleans()) else torch.tensor(b)
    terms = terms._replace(batch_weight=b, median=draw(st.booleans()))
    return laid_out(x, draw(st.sampled_from(LAYOUTS))), terms


@given(case=cases())
@settings(max_examples=120, deadline=None)
def test_every_layout_and_type_equals_the_plain_form(case):
    x, terms = case
    before = x.clone()
    y = kernels.evaluate(x, terms)
    close(y, oracle(x, terms), ratio=1e3 if x[0, 0].numel() < 4 else 20.0)
    assert y.dtype == x.dtype
    assert torch.equal(x, before)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.05), (0.0, 1.0), (0.5, 0.5)])
@pytest.mark.parametrize("ratio", [5.0, 300.0, 1e4])
def test_a_mean_of_many_deviations(layout, a, b, ratio):
    x = laid_out(torch.randn(3, 6, 40, 30) + ratio, layout)
    terms = terms_for(6, weight=a, offset=ratio)._replace(batch_weight=torch.tensor(b))
    close(kernels.evaluate(x, terms), oracle(x, terms), ratio=ratio)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("overwrite", [False, True])
def test_several_slabs_an_epilogue_and_the_input_s_memory(layout, overwrite):
    x = torch.randn(5, 8, 290, 290)
    x[:, 3] += 1e4  # a channel that is done over
    x, residual = laid_out(x, layout), laid_out(torch.randn_like(x), layout)
    terms = terms_for(8, weight=0.25)._replace(batch_weight=torch.tensor(0.5))
    expected = (oracle(x, terms) + residual).relu()
    y = kernels.evaluate(x, terms, Finish(residual, torch.relu_), overwrite=overwrite)
    close(y, expected, ratio=1e4)
    assert (y.data_ptr() == x.data_ptr()) == overwrite


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("a", "b"), [(0.0, 0.3), (0.2, 0.8)])
@pytest.mark.parametrize("groups", [2, 4])
def test_compiles_without_graph_breaks(estimator, a, b, groups):
    torch._dynamo.reset()
    layer = GeneralizedBatchNorm(
        4, channel_groups=groups, example_weight=a, batch_weight=b, batch_estimator=estimator
    ).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (5, 1):
        x = torch.randn(n, 4, 6, 6)
        torch.testing.assert_close(compiled(x), layer(x))


def test_the_compiled_form_is_the_plain_one_far_from_zero():
    x = torch.randn(4, 6, 9, 9) + 100
    terms = terms_for(6, weight=0.1, groups=3, offset=100.0)
    terms = terms._replace(batch_weight=torch.linspace(0, 0.8, 6))
    close(kernels._shifted(x, terms), oracle(x, terms), ratio=100)


# ---- medians -------------------------------------------------------------------------------


@given(n=st.integers(3, 12), garbage=st.sampled_from([1e6, -1e30, np.inf, np.nan]), data=st.data())
@settings(max_examples=60, deadline=None)
def test_fewer_than_half_garbage_leaves_medians_among_the_clean(n, garbage, data):
    wild = data.draw(st.integers(0, (n - 1) // 2))
    mean, var = torch.randn(n, 3, dtype=torch.float64), torch.rand(n, 3, dtype=torch.float64)
    spoiled, spread = mean.clone(), var.clone()
    spoiled[:wild], spread[:wild] = garbage, abs(garbage)
    low, high = mean[wild:].amin(0), mean[wild:].amax(0)
    centre, found = median_mix(spoiled, spread)
    assert ((centre >= low) & (centre <= high)).all()
    assert (found <= var[wild:].amax(0) + (1.4826 * (high - low)) ** 2).all()


@given(
    n=st.integers(1, 12), c=st.integers(1, 9), dtype=st.sampled_from(DTYPES[:2]),
    wild=st.sampled_from([0.0, 1e30, np.inf, np.nan]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_medians_by_numpy_are_those_by_torch(n, c, dtype, wild):
    mean, var = torch.randn(n, c).to(dtype), torch.rand(n, c).to(dtype)
    if wild:
        mean[: (n - 1) // 2], var[: (n - 1) // 2] = -wild, abs(wild)
    given = mean.clone(), var.clone()
    found, expected = median_mix_of_few(mean, var), median_mix(mean, var)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((mean, var), given, rtol=0, atol=0, equal_nan=True)


def test_garbage_beside_an_image_hardly_moves_it_with_medians():
    x = torch.randn(16, 4, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    spoiled = x.clone()
    spoiled[12:] = 1e6 * x[12:]
    moved = {}
    for estimator in ESTIMATORS:
        layer = layer_with(4, batch_weight=1.0, batch_estimator=estimator).eval()
        moved[estimator] = (layer(spoiled)[:12] - layer(x)[:12]).abs().max().item()
    assert moved["median"] < 1 < moved["mean"]


def test_the_median_of_symmetric_examples_is_their_mean():
    half = torch.randn(4, 3, dtype=torch.float64)
    mean = torch.cat([half, -half]) + 5
    centre, _ = median_mix(mean, torch.ones_like(mean))
    torch.testing.assert_close(centre, mean.mean(0))


# ---- state, settings, refusals -----------------------------------------------------------------


def test_the_state_carries_the_weight_in_either_shape():
    for weight in (0.5, [0.1, 0.2, 0.0, 1.0]):
        source = GeneralizedBatchNorm(4, batch_weight=weight)
        for target in (GeneralizedBatchNorm(4), GeneralizedBatchNorm(4, batch_weight=[0.5] * 4)):
            target.load_state_dict(source.state_dict(), strict=True)
            assert torch.equal(target.batch_weight, source.batch_weight)
            assert target.uses_batch
    state = nn.BatchNorm2d(4).state_dict()
    keys = set(state)
    target.load_state_dict(state, strict=True)
    assert set(state) == keys
    assert target.batch_weight.tolist() == pytest.approx(weight)
    again = copy.deepcopy(target)
    assert torch.equal(again.batch_weight, target.batch_weight)


@pytest.mark.parametrize(
    ("weight", "tracks", "found"),
    [
        (5.0, True, "a value outside 0 to 1"),
        (float("nan"), True, "a value outside 0 to 1"),
        (float("inf"), True, "a value outside 0 to 1"),
        ([0.1, -0.1, 0.0, 0.0], True, "a value outside 0 to 1"),
        ([0.1, 0.1], True, r"shape \(2,\), expected one number or 4"),
        ([0.0, 0.0, 0.0, 0.8], True, "more than 1 together with example_weight"),
        (1.0, False, "keeps no running statistics to mix the batch's with"),
    ],
)
@pytest.mark.parametrize("assign", [False, True])
def test_a_state_with_a_weight_that_cannot_be_is_refused(weight, tracks, found, assign):
    a = 0.25 if tracks else 0.0
    layer = GeneralizedBatchNorm(4, track_running_stats=tracks, example_weight=a)
    net = nn.Sequential(nn.ReLU(), layer)
    state = net.state_dict()
    state["1.batch_weight"] = torch.tensor(weight)
    with pytest.raises(RuntimeError, match=rf"1\.batch_weight: .*{found}"):
        net.load_state_dict(state, assign=assign)
    assert (layer.example_weight.item(), layer.uses_batch) == (a, False)
    torch.testing.assert_close(state["1.batch_weight"], torch.tensor(weight), equal_nan=True)


def test_all_problems_of_a_state_are_named():
    net = nn.Sequential(GeneralizedBatchNorm(4), GeneralizedBatchNorm(4))
    state = net.state_dict()
    state |= {
        "0.batch_weight": torch.tensor(2.0),
        "0.example_weight": torch.tensor(-1.0),
        "1.batch_weight": torch.tensor([0.1]),
        "1.bias": torch.zeros(3),
    }
    with pytest.raises(RuntimeError) as caught:
        net.load_state_dict(state)
    for name in ("0.batch_weight", "0.example_weight", "1.batch_weight", "1.bias"):
        assert name in str(caught.value)


def test_both_weights_are_set_together():
    net = nn.Sequential(GeneralizedBatchNorm(4), nn.ReLU(), GeneralizedBatchNorm(4))
    set_example_weight_(net, 0.75)
    with pytest.raises(ConfigError, match=r"^0: batch_weight: more than 1 together"):
        set_example_weight_(net, batch_weight={"2": 0.1, "0": 0.75})
    assert not net[2].uses_batch
    set_example_weight_(net, 0.25, batch_weight=0.75, batch_estimator="median")
    assert [layer.batch_weight.item() for layer in (net[0], net[2])] == [0.75, 0.75]
    assert net[0].batch_estimator == "median"
    set_example_weight_(net, batch_weight={"0": 0.0})
    assert [net[0].uses_batch, net[2].uses_batch] == [False, True]
    assert net[0].example_weight.item() == 0.25
    with pytest.raises(ConfigError, match="'mode' is not known"):
        set_example_weight_(net, batch_estimator="mode")
    with pytest.raises(NormError, match="keeps no running statistics"):
        GeneralizedBatchNorm(4, track_running_stats=False, batch_weight=1.0)


def test_what_is_shown():
    layer = GeneralizedBatchNorm(4, batch_weight=[0.0, 0.1, 0.2, 0.3], batch_estimator="median")
    assert "batch_weight=0..0.3, batch_estimator=median" in repr(layer)
    assert "batch" not in repr(GeneralizedBatchNorm(4, batch_estimator="median"))


def test_a_snapshot_brings_back_a_layer_without():
    layer = nn.Sequential(GeneralizedBatchNorm(4))
    before = Snapshot(layer)
    set_example_weight_(layer, batch_weight=0.5, batch_estimator="median")
    before.restore_()
    assert layer[0].batch_weight is None
    assert (layer[0].live, layer[0].uses_batch) == (False, False)
    assert layer[0].batch_estimator == "mean"


def test_surgery_sets_keeps_and_removes_it():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    plan = swap_norms_(net, batch_weight=0.25)
    assert plan.changes[0].batch_weight == 0.25
    assert net[1].batch_weight.item() == 0.25
    swap_norms_(net, to="batch")
    assert not net[1].live
    with pytest.raises(ConfigError, match=r"--batch-weight: 0.5, expected 0 to 0.25"):
        swap_norms_(net, example_weight=0.75, batch_weight=0.5)
    bare = nn.Sequential(nn.BatchNorm2d(8, track_running_stats=False))
    with pytest.raises(NormError, match=r"0: keeps no running statistics to mix the batch's with"):
        swap_norms_(bare, batch_weight=0.5)


# ---- files, exports, commands ------------------------------------------------------------------


def header(path):
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        return json.loads(json.loads(file.read(n))["__metadata__"]["bnfix"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A network with batch weights by mean and by median, and without."""
    found = tmp_path_factory.mktemp("batched")
    (found / "own.py").write_text(NETS)
    names = {}
    exec(NETS, names)
    torch.manual_seed(0)
    torch.save(nets.lived_in(names["net"]()).state_dict(), found / "stock.pth")
    for name, how in (
        ("mean", {"batch_weight": [0.5, 0.0, 0.25, 0.0]}),
        ("median", {"batch_weight": 0.75, "batch_estimator": "median"}),
        ("without", {}),
    ):
        model = bnfix.load(found / "stock.pth", names["net"]())
        bnfix.swap_norms_(model)
        bnfix.set_example_weight_(model, 0.0 if name == "without" else 0.25, **how)
        bnfix.save(model, found / f"{name}.safetensors")
    return found


def loaded(folder, name):
    names = {}
    exec(NETS, names)
    return bnfix.load(folder / f"{name}.safetensors", names["net"]()).eval()


def images(n=5):
    return torch.randn(n, 3, 9, 9, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_it_survives_a_file_bit_for_bit(folder, tmp_path, name):
    model = loaded(folder, name)
    assert model.bn.batch_estimator == name
    assert model.bn.uses_batch
    bnfix.save(model, tmp_path / f"{name}.safetensors")
    again = loaded(tmp_path, name)
    with torch.no_grad():
        assert torch.equal(model(images()), again(images()))
    stated = header(tmp_path / f"{name}.safetensors")["norms"]["bn"]
    assert stated["batch_weight"] == (0.75 if name == "median" else [0.5, 0.0, 0.25, 0.0])
    assert stated["batch_estimator"] == name


def test_a_file_without_it_says_nothing_of_it(folder):
    stated = header(folder / "without.safetensors")["norms"]["bn"]
    assert set(stated) == {"channel_groups", "ghost_size", "example_weight", "eps"}
    model = loaded(folder, "without")
    assert not any("batch_weight" in name for name in model.state_dict())


@pytest.mark.parametrize("groups", [6, 3])
@pytest.mark.parametrize("shape", [(4, 6), (5, 6, 3, 3), (1, 6, 2, 2)])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_plain_layer_is_the_layer(groups, shape, estimator):
    layer = GeneralizedBatchNorm(
        6, channel_groups=groups, example_weight=0.25, batch_weight=0.5, batch_estimator=estimator
    )
    nets.lived_in(layer).double().eval()
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() + 2
    plain = ExampleNorm(layer, 0.25, groups, layer.eps, 0.5, estimator == "median").eval()
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-7, atol=1e-7)
    assert plain.state_dict().keys() == nn.BatchNorm2d(6).state_dict().keys()


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("to", ["onnx", "pt2", "plain"])
def test_exports_keep_it_at_any_batch_size(folder, tmp_path, name, to):
    done = bnfix.export(folder / f"{name}.safetensors", to=to, model=spec(folder))
    done.save(tmp_path / f"net.{'py' if to == 'plain' else to}")
    assert any("depend on the other images" in note for note in done.report.assumptions)
    model = loaded(folder, name)
    for n in (1, 4, 7):
        x = images(n)
        with torch.no_grad():
            expected = model(x)
        if to == "onnx":
            session = onnxruntime.InferenceSession(tmp_path / "net.onnx")
            found = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
        elif to == "pt2":
            found = torch.export.load(tmp_path / "net.pt2").module()(x)
        else:
            continue
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_it_cannot_be_folded(folder, cli, tmp_path):
    command = ("export", folder / "mean.safetensors", "--model", spec(folder), "--to", "folded",
               "-o", tmp_path / "folded.safetensors")  # fmt: skip
    outcome = cli(*command)
    assert outcome.code == 1
    assert "1 layers weigh the batch and cannot be folded: bn" in outcome.message
    found = cli(*command, "--force-zero", "--json").json
    assert found["export"]["zeroed"] == ["bn"]
    assert found["export"]["folded"]


def test_the_commands_set_it_and_the_report_says_so(files, cli, tmp_path):
    out, again = tmp_path / "out.safetensors", tmp_path / "again.safetensors"
    given = ("--data", files.data, *files.common, "--workers", "0")
    found = cli("calibrate", files.net, *given, "--statistics", "keep", "--example-weight", "0.25",
                "--batch-weight", "0.5", "-o", out, "--json").json  # fmt: skip
    norms = header(out)["norms"]
    assert {norm["batch_weight"] for norm in norms.values()} == {0.5}
    assert {norm["example_weight"] for norm in norms.values()} == {0.25}
    sentence = (
        "predictions depend on the other images in the batch: the batch has a weight of up to 0.5"
    )
    assert sentence in " ".join(found["assumptions"])
    assert {layer["batch_weight"] for layer in found["layers"]} == {0.5}
    assert sentence in (tmp_path / "out.safetensors.report.html").read_text()
    seen = cli("eval", files.net, out, "--data", files.test, *files.common, "--workers", "0",
               "--compare-batch-sizes", "--json").json  # fmt: skip
    assert [row["invariant"] for row in seen["batch_invariance"]] == [True, False]
    assert f"{out.name}: {sentence}" in " ".join(seen["assumptions"])
    # Another command leaves it, and chooses no example weight beside it.
    cli("calibrate", out, *given, "--statistics", "population", "-o", again)
    assert {norm["batch_weight"] for norm in header(again)["norms"].values()} == {0.5}
    cli("convert", out, *files.common, "--to", "batch", "-o", again, "--force")
    assert not any("batch_weight" in norm for norm in header(again)["norms"].values())


def test_convert_sets_it(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    cli("convert", files.net, *files.common, "--batch-weight", "0.25", "-o", out)
    assert {norm["batch_weight"] for norm in header(out)["norms"].values()} == {0.25}
    wrong = cli("convert", files.net, *files.common, "--example-weight", "0.5", "--batch-weight",
                "0.75", "-o", out, "--force")  # fmt: skip
    assert "--batch-weight: 0.75, expected 0 to 0.5." in wrong.message
    word = cli("calibrate", files.net, "--data", files.data, *files.common, "--batch-weight",
               "some", "-o", out, "--force")  # fmt: skip
    assert "--batch-weight: some, expected auto, keep or 0 to 1" in word.message


@pytest.mark.parametrize("command", ["calibrate", "convert"])
def test_the_commands_set_the_estimator(files, cli, tmp_path, command):
    out, found = tmp_path / "out.safetensors", []
    data = ("--data", files.data, "--statistics", "keep", "--example-weight", "keep")
    given = (command, files.net, *files.common, *data[: 6 * (command == "calibrate")])
    for how in (None, *ESTIMATORS):
        words = () if how is None else ("--batch-estimator", how)
        assert cli(*given, "--batch-weight", "0.5", *words, "-o", out, "--force").code == 0
        norms = header(out)["norms"].values()
        assert {norm["batch_estimator"] for norm in norms} == {how or "mean"}
        model = bnfix.load(out, files.model())
        with torch.no_grad():
            found.append(model(images(5)))
    assert torch.equal(found[0], found[1])
    assert not torch.allclose(found[1], found[2], atol=1e-3)
    for words, message in (
        (("--batch-weight", "0.5", "--batch-estimator", "mode"), "'mode' is not known"),
        (("--batch-estimator", "median"), "--batch-estimator: only with --batch-weight above 0"),
    ):
        refused = cli(*given, *words, "-o", out, "--force")
        assert refused.code == 2
        assert message in refused.message


@pytest.mark.parametrize("assumed", [False, True])
def test_auto_is_refused_where_a_sorted_stream_would_suffer(files, cli, tmp_path, assumed):
    """The colour that tells the class is what a batch of one class takes away."""
    images, labels = images_of(600, seed=2)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    out = tmp_path / "out.safetensors"
    found = cli("calibrate", files.net, "--data", tmp_path / "data.npz", *files.common,
                "--statistics", "keep", "--example-weight", "keep", "--batch-weight", "auto",
                "--batch-size", "16", "--corrupt", "contrast:2", "--granularity", "layer",
                "-o", out, "--json",
                *(["--assume-iid"] if assumed else [])).json  # fmt: skip
    *refused, decision = found["decisions"]
    assert {d["stage"] for d in found["decisions"]} == {"batch weight"}
    assert decision["admitted"] == assumed
    assert not (refused and assumed)
    first = found["decisions"][0]
    assert first["nll_difference"] < 0
    assert ("images sorted by class would suffer" in first["reason"]) != assumed
    (weight,) = {norm.get("batch_weight", 0) for norm in header(out)["norms"].values()}
    expected = float(decision["candidate"].split()[-1]) if assumed else 0
    assert weight == pytest.approx(expected)


def test_auto_keeps_a_network_that_gains_nothing(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    found = cli("calibrate", files.net, "--data", files.data, *files.common, "--statistics",
                "keep", "--example-weight", "keep", "--batch-weight", "auto", "-o", out,
                "--json").json  # fmt: skip
    assert [d["admitted"] for d in found["decisions"]] == [False]
    assert not any("batch_weight" in norm for norm in header(out)["norms"].values())


# ---- learned per channel -------------------------------------------------------------------------


def planted(n=2400, **options):
    """A network, and batches of 16 with labels drawn from it with a batch weight per channel."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(GeneralizedBatchNorm(8, **options), nn.Linear(8, 4)).eval()
        with torch.no_grad():
            net[1].weight.mul_(6)
        room = 1 - float(net[0].example_weight.max())
        weights = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.6, 0.7, 0.8, 0.9]) * room
        teacher = copy.deepcopy(net)
        set_example_weight_(teacher, batch_weight=weights)
        # Every batch has a shift of its own, which the batch's moments take away.
        x = torch.randn(n // 16, 16, 8) + 1.5 * torch.randn(n // 16, 1, 8)
        batches = []
        for rows in x:
            with torch.no_grad():
                y = torch.distributions.Categorical(logits=teacher(rows)).sample()
            batches.append((rows, y))
    half = len(batches) * 3 // 4
    return net, weights, batches[:half], batches[half:]


@pytest.mark.parametrize("a", [0.0, 0.25])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_planted_weights_of_channels_are_found(estimator, a):
    net, weights, learn, monitor = planted(example_weight=a, batch_estimator=estimator)
    layers = {"0": net[0]}
    set_example_weight_(net, batch_weight=0.4)
    parameters = copy.deepcopy(net.state_dict())
    before = bnfix.evaluate(net, monitor).nll
    recipe = WeightRecipe(epochs=6, lr=0.05)
    found = learn_batch_weight_(net, layers, learn, monitor=monitor, recipe=recipe)["0"]
    assert torch.equal(net[0].batch_weight, found)
    assert bool((found + a <= 1 + 1e-6).all())
    assert float((found - weights).abs().mean()) < 0.1 < float((0.4 - weights).abs().mean())
    assert bnfix.evaluate(net, monitor).nll < before - 0.02
    state = net.state_dict()
    assert all(torch.equal(t, state[n]) for n, t in parameters.items() if n != "0.batch_weight")
    assert all(p.requires_grad and p.grad is None for p in net.parameters())


def test_learned_weights_leave_room_and_a_failure_puts_all_back():
    net, _, learn, monitor = planted(example_weight=[0.5] * 8)
    set_example_weight_(net, batch_weight=0.5)
    recipe = WeightRecipe(epochs=2, lr=0.2)
    layers = {"0": net[0]}
    found = learn_batch_weight_(net, layers, learn, monitor=monitor, recipe=recipe)["0"]
    assert 0.4 < float(found.max()) <= 0.5
    before = net[0].batch_weight.clone()

    def broken():
        yield learn[0]
        raise KeyError("gone")

    with pytest.raises(KeyError):
        learn_batch_weight_(net, layers, lambda k: broken(), monitor=monitor, recipe=recipe)
    assert torch.equal(net[0].batch_weight, before)
    assert not net[0].batch_weight.requires_grad


@pytest.mark.parametrize("assumed", [False, True])
def test_auto_learns_one_a_channel_and_judges_it_alike(files, cli, tmp_path, assumed):
    images, labels = images_of(600, seed=2)
    np.savez(tmp_path / "data.npz", images=images, labels=labels)
    out = tmp_path / "out.safetensors"
    done = cli("calibrate", files.net, "--data", tmp_path / "data.npz", *files.common,
               "--statistics", "keep", "--example-weight", "keep", "--batch-weight", "auto",
               "--batch-size", "16", "--corrupt", "contrast:2", "--z", "1", "-o", out, "--json",
               *(["--assume-iid"] if assumed else []))  # fmt: skip
    decisions = done.json["decisions"]
    finer = [d for d in decisions if d["candidate"].endswith("batch weight per channel")]
    scalar = [d for d in decisions if d not in finer and d["admitted"]]
    # One number comes first; where it is refused, nothing is learned.
    assert len(finer) == len(scalar) == assumed
    if assumed:
        assert finer[0]["incumbent"] == scalar[0]["candidate"]
        stored = [norm["batch_weight"] for norm in header(out)["norms"].values()]
        assert all(isinstance(weight, list) == finer[0]["admitted"] for weight in stored)
        assert bnfix.load(out, files.model()).bn1.uses_batch


def test_inspection_notes_layers_that_weigh_the_batch(files, cli, tmp_path):
    model = bnfix.load(files.net, files.model())
    bnfix.swap_norms_(model, layers=["bn2"], batch_weight=0.3)
    bnfix.save(model, tmp_path / "near.safetensors")
    done = cli("inspect", tmp_path / "near.safetensors", "--json").json
    assert {x["name"]: x["batch_weight"] for x in done["layers"]} == {
        "bn1": 0,
        "bn2": pytest.approx(0.3),
    }
    notes = [f for f in done["findings"] if f["fault"] == "batch-weight"]
    assert [(f["layer"], f["severity"]) for f in notes] == [("bn2", "note")]
    assert (
        "depend on the other images in the batch: the batch has a weight of up to 0.3"
        in (notes[0]["detail"])
    )
    assert "0, batch 0.3" in " ".join(cli("inspect", tmp_path / "near.safetensors").out.split())


@pytest.mark.parametrize(
    ("options", "proven", "nothing"),
    [
        ((), True, False),
        (("--batch-weight", "auto"), True, True),
        (("--batch-weight", "0.3"), False, False),
        (("--statistics", "keep", "--batch-weight", "auto"), False, True),
    ],
)
def test_notes_without_labels_are_those_of_the_options(
    files, cli, tmp_path, options, proven, nothing
):
    done = cli("calibrate", files.net, "--data", files.flat, *files.common, *options,
               "-o", tmp_path / "out.safetensors", "--json")  # fmt: skip
    notes = " ".join(done.json["assumptions"])
    assert ("nothing can be proven" in notes) is proven
    assert ("--batch-weight auto did nothing" in notes) is nothing
    assert not proven or "or a number, --batch-weight N." in notes
