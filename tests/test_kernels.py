import copy
import functools
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from bnfix.norm import kernels
from bnfix.norm.kernels import NOTHING, Finish, hardswish_
from bnfix.norm.layer import GeneralizedBatchNorm

LAYOUTS = ("contiguous", "channels last", "strided", "transposed", "sliced channels")


def laid_out(x, layout):
    """The same values in another order in memory."""
    if layout == "channels last":
        return x.movedim(1, -1).contiguous().movedim(-1, 1)
    if layout == "strided":
        return torch.stack((x, x), -1)[..., 0]
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced channels":
        return torch.cat((x, x), 1)[:, : x.shape[1]]
    return x


def terms_for(c, *, weight, groups=None, offset=0.0, bare=False, alone=False, seed=0):
    """What a layer of c channels mixes in: drawn, about the offset."""
    generator = torch.Generator().manual_seed(seed)
    gamma, beta, mean = torch.randn(3, c, generator=generator)
    var = torch.rand(c, generator=generator) + 0.2
    a = torch.as_tensor(1.0 if alone else weight, dtype=torch.float32)
    groups = c if groups is None else groups
    size = c // groups
    mean, var = ((t.view(groups, size)[:, :1].expand(-1, size).flatten()) for t in (mean, var))
    return kernels.Terms(
        None if alone else mean + offset, None if alone else var, a,
        None if bare else gamma, None if bare else beta, 1e-5, groups,
        bool((a <= kernels.SHIFTABLE).all()),
    )  # fmt: skip


def oracle(x, terms):
    """The plain form in float64."""
    return kernels.plain(x.double(), terms.cast(torch.float64))


def close(mine, theirs, *, ratio=1.0):
    """Float tolerance; where the values lie many deviations from 0, their own rounding more."""
    assert mine.shape == theirs.shape
    half = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(mine.dtype, 2e-5)
    torch.testing.assert_close(
        mine.double(), theirs, rtol=half, atol=half + 4e-7 * ratio, equal_nan=True
    )


@st.composite
def cases(draw):
    c = draw(st.sampled_from([1, 2, 6, 12, 40]))
    spatial = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3))
    x = torch.randn(
        draw(st.integers(1, 5)), c, *spatial,
        generator=torch.Generator().manual_seed(draw(st.integers(0, 99))),
    )  # fmt: skip
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]))
    x = (x * draw(st.sampled_from([0.1, 1.0, 30.0]))).to(dtype)
    groups = draw(st.sampled_from([g for g in range(1, c + 1) if c % g == 0]))
    weight = draw(st.sampled_from([0.03, 0.5, 1.0, "each"]))
    if weight == "each":
        weight = torch.linspace(0, 1, c) if c > 1 else torch.tensor([0.3])
    flags = {name: draw(st.booleans()) for name in ("bare", "alone")}
    terms = terms_for(c, weight=weight, groups=groups, **flags)
    return laid_out(x, draw(st.sampled_from(LAYOUTS))), terms


@given(case=cases())
@settings(max_examples=150, deadline=None)
def test_every_layout_and_type_equals_the_plain_form(case):
    x, terms = case
    before = x.clone()
    y = kernels.evaluate(x, terms)
    # Few values may lie so close together that their rounding is divided by little more than eps.
    close(y, oracle(x, terms), ratio=1e3 if x[0, 0].numel() < 4 else 20.0)
    assert y.dtype == x.dtype
    assert torch.equal(x, before)


@given(case=cases(), data=st.data())
@settings(max_examples=60, deadline=None)
def test_planted_nan_and_infinity_stay_where_the_plain_form_leaves_them(case, data):
    x, terms = case
    x = x.clone()
    for _ in range(data.draw(st.integers(1, 3))):
        spot = tuple(data.draw(st.integers(0, size - 1)) for size in x.shape)
        x[spot] = data.draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))
    y, expected = kernels.evaluate(x, terms), kernels.plain(x, terms)
    close(y, expected.double(), ratio=1e3 if x[0, 0].numel() < 4 else 20.0)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("weight", [0.05, 1.0])
@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("ratio", [5.0, 30.0, 300.0, 1e4])
def test_a_mean_of_many_deviations(layout, weight, stale, ratio):
    """The population's mean may lie there too, or may not."""
    x = laid_out(torch.randn(3, 6, 40, 30) + ratio, layout)
    terms = terms_for(6, weight=weight, offset=0.0 if stale else ratio)
    close(kernels.evaluate(x, terms), oracle(x, terms), ratio=ratio)


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("ratio", [0.0, 3.9, 8.0])
@pytest.mark.parametrize("size", [(1024, 1024), (1000, 1031)])
def test_a_large_map_loses_no_digits(size, ratio, layout, gradients):
    x = torch.randn(1, 2, *size, generator=torch.Generator().manual_seed(0)) + ratio
    x = laid_out(x, layout).requires_grad_(gradients)
    terms = terms_for(2, weight=0.5, offset=ratio)
    error = (kernels.evaluate(x, terms) - oracle(x, terms)).abs().max()
    assert error < 1.5e-5


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_a_channel_far_from_zero_is_done_over_whatever_the_weight(layout):
    """The output's own rounding grows with the mean, by deviations, at a small weight too."""
    x = torch.randn(3, 4, 24, 24, generator=torch.Generator().manual_seed(1))
    terms = terms_for(4, weight=0.01)
    x[:, 2] += 30
    terms.mean[2], terms.var[2] = 30, 1
    x = laid_out(x, layout)
    y, expected = kernels.evaluate(x, terms), kernels.plain(x, terms)
    torch.testing.assert_close(y[:, 2], expected[:, 2], rtol=0, atol=5e-7)


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("groups", [6, 3])
def test_only_the_channels_that_lose_digits_are_done_over(layout, groups):
    x = torch.randn(4, 6, 20, 20)
    terms = terms_for(6, weight=0.2, groups=groups)
    far = slice(2, 3) if groups == 6 else slice(2, 4)
    x[:, far] += 3000
    terms.mean[far] += 3000
    x = laid_out(x, layout)
    y, expected = kernels.evaluate(x, terms), oracle(x, terms)
    near = [c for c in range(6) if c not in range(6)[far]]
    close(y[:, near], expected[:, near])
    close(y, expected, ratio=3000)
    assert y.stride() == x.stride()


@pytest.mark.parametrize("layout", LAYOUTS[:2])
def test_inputs_larger_than_one_slab_and_examples_that_are_large(layout):
    for shape in [(9, 4, 260, 260), (3, 40, 57, 63), (3, 300, 24, 20), (70, 16, 33, 32)]:
        x = laid_out(torch.randn(shape) + 0.5, layout)
        terms = terms_for(shape[1], weight=0.1)
        y = kernels.evaluate(x, terms)
        close(y, oracle(x, terms), ratio=10.0)
        assert y.stride() == x.stride()
        half = kernels.evaluate(x.bfloat16(), terms)
        close(half, oracle(x.bfloat16(), terms))


def test_a_long_plane_keeps_its_mean_channels_last():
    """A sum in one running float32 would lose about sqrt(L) roundings of its own size."""
    x = laid_out(torch.randn(1, 3, 16, 112, 112) + 7, "channels last")
    terms = terms_for(3, weight=1.0, offset=7.0)
    close(kernels.evaluate(x, terms), oracle(x, terms), ratio=50.0)


def test_positions_of_one_value_and_none_at_all():
    terms = terms_for(6, weight=0.3)
    for shape in [(4, 6), (4, 6, 1, 1), (1, 6, 1)]:
        x = torch.randn(shape)
        close(kernels.evaluate(x, terms), oracle(x, terms))
    layer = GeneralizedBatchNorm(6, example_weight=0.3).eval()
    for shape in [(0, 6, 3, 3), (2, 6, 0, 3)]:
        assert layer(torch.zeros(shape)).shape == shape
        assert kernels.evaluate(torch.zeros(shape), terms).shape == shape


def test_squares_that_overflow_do_as_the_plain_form_does():
    x = torch.randn(2, 6, 5, 5) * 1e25
    terms = terms_for(6, weight=0.3)
    torch.testing.assert_close(kernels.evaluate(x, terms), kernels.plain(x, terms), equal_nan=True)


# ---- gradients, transforms, compilers ----------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("wanted", ["input", "example_weight", "gamma", "beta"])
def test_gradients_are_the_plain_form_s(layout, wanted):
    x = laid_out(torch.randn(3, 6, 5, 4, dtype=torch.float64), layout)
    terms = terms_for(6, weight=torch.linspace(0.1, 0.9, 6)).cast(torch.float64)
    upstream = torch.randn(3, 6, 5, 4, dtype=torch.float64)

    def gradient(way):
        leaf = (x if wanted == "input" else getattr(terms, wanted)).clone().requires_grad_()
        given = (leaf, terms) if wanted == "input" else (x, terms._replace(**{wanted: leaf}))
        y = way(*given)
        return y, *torch.autograd.grad(y, leaf, upstream)

    torch.testing.assert_close(gradient(kernels.evaluate), gradient(kernels.plain))


def test_parameters_that_could_learn_do_not_under_no_grad():
    layer = GeneralizedBatchNorm(6, example_weight=0.3).eval()
    x = torch.randn(2, 6, 8, 8)
    with_graph = layer(x)
    assert with_graph.requires_grad
    with torch.no_grad():
        y = layer(x)
    with torch.inference_mode():
        inner = layer(x)
    assert not y.requires_grad
    torch.testing.assert_close(y, with_graph.detach())
    assert torch.equal(inner, y)


def test_transforms_and_traces_see_no_branch_on_values():
    layer = GeneralizedBatchNorm(6, example_weight=0.3).eval().requires_grad_(False)
    x = torch.randn(4, 2, 6, 8, 8)
    each = torch.stack([layer(one) for one in x])
    torch.testing.assert_close(torch.vmap(layer)(x), each)
    exported = torch.export.export(layer, (x[0],)).module()
    torch.testing.assert_close(exported(x[1]), each[1])
    far = x[1] + 1e3  # another branch than the traced one
    torch.testing.assert_close(exported(far), layer(far), atol=1e-3, rtol=0)
    assert layer.to("meta")(x[0].to("meta")).shape == x[0].shape


@pytest.mark.parametrize("layout", LAYOUTS[:2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "arguments",
    [
        {"example_weight": 0.1},
        {"example_weight": [0.0, 0.1, 0.2, 0.3, 0.4, 0.9], "channel_groups": 3},
        {"example_weight": 1.0},
        {"example_weight": 1.0, "track_running_stats": False, "affine": False},
    ],
)
def test_the_compiled_form_equals_the_plain_one(arguments, layout, dtype):
    torch._dynamo.reset()
    layer = GeneralizedBatchNorm(6, **arguments).eval()
    if layer.running_mean is not None:
        torch.nn.init.uniform_(layer.running_mean, -1, 1)
    twin = copy.deepcopy(layer).double()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for offset in (0.0, 40.0):
        x = laid_out(torch.randn(3, 6, 8, 7) + offset, layout).to(dtype)
        with torch.no_grad():
            y = compiled(x)
            assert y.dtype == dtype
            assert y.stride() == x.stride()
            # The weights travel as float32 in the buffer of either.
            close(y, twin(x.double()), ratio=max(1.0, 3 * offset))


def test_autocast_leaves_the_statistics_in_float32():
    layer = GeneralizedBatchNorm(24, example_weight=0.3).eval()
    for layout in LAYOUTS[:2]:
        x = laid_out(torch.randn(2, 24, 30, 30) + 3, layout)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x)
        with torch.no_grad():
            assert torch.equal(y, layer(x))


# ---- the form that is compiled on CUDA, here on the CPU ------------------------------------------


@pytest.fixture
def fresh():
    """Nothing compiled or proved yet, and nothing left of it."""
    for step in range(2):
        kernels._proved.cache_clear()
        kernels._compiler.cache_clear()
        torch._dynamo.reset()
        if not step:
            yield


def compiles_to(monkeypatch, form):
    monkeypatch.setattr(kernels, "_compiler", functools.cache(lambda: form))


def compiled_cases():
    """Inputs, terms and what follows them, of six kinds; each kind in two sizes."""
    for shape, layout, dtype, offset, weight, activation in (
        ((2, 6, 7, 7), "contiguous", torch.float32, 1e4, 0.3, None),
        ((3, 6, 9, 5), "channels last", torch.float32, 0.0, [0.0, 0.3, 0.8], torch.relu_),
        ((2, 12, 5, 5), "contiguous", torch.bfloat16, 5.0, 0.3, hardswish_),
    ):
        for n, c in ((shape[0], shape[1]), (shape[0] + 2, shape[1] // 2)):
            weights = weight * (c // 3) if isinstance(weight, list) else weight
            terms = terms_for(c, weight=weights, offset=offset)._replace(shiftable=True)
            # As a layer's, no views: those of one tensor would be compiled apart.
            held = (t.clone() if isinstance(t, torch.Tensor) else t for t in terms)
            terms = kernels.Terms(*held)
            for added in (False, True):
                drawn = torch.randn(2, n, c, *shape[2:])
                moved = drawn[0] + offset, drawn[1]
                x, residual = (laid_out(t, layout).to(dtype, copy=True) for t in moved)
                yield x, terms, Finish(residual if added else None, activation), max(1.0, offset)


def test_the_form_for_cuda_equals_the_plain_one_whatever_the_sizes(fresh, monkeypatch, caplog):
    backend = CompileCounterWithBackend("eager")
    compiled = torch.compile(kernels._finished, dynamic=True, backend=backend)
    compiles_to(monkeypatch, compiled)
    for x, terms, finish, ratio in compiled_cases():
        before = x.clone()
        y = kernels._on_cuda(x, terms, finish)
        assert torch.equal(x, before)
        assert (y.dtype, y.stride()) == (x.dtype, x.stride())
        close(y, finish.apply(oracle(x, terms)), ratio=ratio)
        x[0, 1].fill_(float("nan"))
        y = kernels._on_cuda(x, terms, finish)
        assert torch.equal(y.isnan(), finish.apply(kernels.plain(x, terms)).isnan())
    assert kernels._proved.cache_info().currsize == 6
    assert "is not used" not in caplog.text
    assert backend.frame_count == 6


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor's kernels for CPUs need g++")
def test_inductor_s_kernel_equals_the_plain_form(fresh, caplog):
    x, terms, finish, ratio = list(compiled_cases())[7]
    close(kernels._on_cuda(x, terms, finish), finish.apply(oracle(x, terms)), ratio=ratio)
    assert kernels._proved.cache_info().currsize == 1
    assert "is not used" not in caplog.text


def test_what_the_compiled_form_does_not_know_is_done_around_it(monkeypatch):
    seen = []
    monkeypatch.setattr(kernels, "_proved", lambda *case, **rest: True)

    def compiled(*given):
        seen.append(given)
        return kernels._finished(*given)

    compiles_to(monkeypatch, compiled)
    x = torch.randn(2, 3, 6, 6)
    terms = terms_for(3, weight=0.3)._replace(shiftable=True)
    flipped = torch.randn(2, 3, 6, 6).transpose(-1, -2)
    leaky = functools.partial(torch.nn.functional.leaky_relu, negative_slope=0.2, inplace=True)
    for finish in (Finish(flipped, torch.relu_), Finish(x, leaky), Finish(flipped, leaky)):
        close(kernels._on_cuda(x, terms, finish), finish.apply(oracle(x, terms)))
    assert [given[2] for given in seen] == [NOTHING, Finish(x), NOTHING]
    seen.clear()
    far = terms._replace(shiftable=False)  # a weight so near 1 that the shift may cost digits
    close(kernels._on_cuda(x, far, NOTHING), oracle(x, far))
    assert not seen


@pytest.mark.parametrize("wrong", ["raises", "differs"])
def test_a_device_that_cannot_compile_takes_the_plain_form(fresh, monkeypatch, caplog, wrong):
    def compiled(input, terms, finish):
        if wrong == "raises":
            raise RuntimeError("no compiler\nand a long story")
        return kernels._finished(input, terms, finish) + 0.01

    compiles_to(monkeypatch, compiled)
    x, terms = torch.randn(2, 3, 6, 6), terms_for(3, weight=0.3)._replace(shiftable=True)
    for _ in range(2):
        assert torch.equal(kernels._on_cuda(x, terms, NOTHING), kernels.plain(x, terms))
    (record,) = caplog.records
    assert "The compiled layer is not used on cpu" in record.getMessage()
    assert "long story" not in record.getMessage()


def test_a_device_without_memory_says_so(fresh, monkeypatch):
    def compiled(*given):
        raise torch.OutOfMemoryError("CUDA out of memory")

    compiles_to(monkeypatch, compiled)
    terms = terms_for(3, weight=0.3)._replace(shiftable=True)
    with pytest.raises(torch.OutOfMemoryError):
        kernels._on_cuda(torch.randn(2, 3, 6, 6), terms, NOTHING)
