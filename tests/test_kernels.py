import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bnfix.layers import kernels
from bnfix.layers.norms import GeneralizedBatchNorm

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


# ---- Triton, where it is installed: in its interpreter, and through its compiler ---------------

INTERPRETED = """
import torch
from bnfix.layers import kernels
from bnfix.layers.finishing import CODES, Finish
from bnfix.layers.triton_kernels import normalize
from tests.test_kernels import close, laid_out, oracle, terms_for

for shape in [(2, 3, 7, 7), (1, 2, 130, 131), (2, 20, 2, 3, 5)]:
    for layout in ("contiguous", "channels last"):
        for dtype, offset in [(torch.float32, 1e4), (torch.float16, 5)]:
            c = shape[1]
            x = laid_out(torch.randn(shape) + offset, layout).to(dtype)
            weight = torch.linspace(0.1, 0.8, c) if c == 20 else 0.3
            plain = dtype is torch.float16
            terms = terms_for(c, weight=weight, offset=offset, bare=plain, alone=plain)
            population = None if plain else (terms.mean, terms.var)
            y = normalize(x, population, terms.example_weight, terms.gamma, terms.beta, 1e-5)
            assert y.dtype == dtype and y.stride() == x.stride()
            close(y, oracle(x, terms), ratio=max(1.0, offset))
            residual = laid_out(torch.randn(shape), layout).to(dtype)
            for in_place, code in [(None, 0), *CODES.items()]:
                given = terms.example_weight, terms.gamma, terms.beta, 1e-5
                for added in (residual, None):
                    y = normalize(x, population, *given, added, code)
                    expected = Finish(added, in_place)(oracle(x, terms))
                    close(y, expected, ratio=max(1.0, offset))
            x[0, 1].fill_(float("nan"))
            y = normalize(x, population, terms.example_weight, terms.gamma, terms.beta, 1e-5)
            assert torch.equal(y.isnan(), kernels.plain(x, terms).isnan())
            for code in CODES.values():
                z = normalize(x, population, *given, residual, code)
                assert torch.equal(z.isnan(), y.isnan())
print("all equal")
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from bnfix.layers import triton_kernels as kernels

plain = dict.fromkeys(("weight_stride", "channels", "positions", "step_channel"), "i32")
plain |= {"step_position": "i32", "eps": "fp32", "x": "*bf16", "y": "*bf16"}
plain |= {"residual": "*bf16"}
sizes = {"has_population": True, "has_gamma": True, "has_beta": True, "block_c": 4, "block_l": 64}
sizes |= {"has_residual": True, "activation": 3}
for kernel in (kernels._whole, kernels._moments, kernels._apply):
    fixed = {name: value for name, value in sizes.items() if name in kernel.arg_names}
    types = {name: plain.get(name, "*fp32") for name in kernel.arg_names}
    source = ASTSource(kernel, types | dict.fromkeys(fixed, "constexpr"), constexprs=fixed)
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["ptx"]
print("all compiled")
"""


def triton_says(code, tmp_path, **environment):
    pytest.importorskip("triton")
    root = Path(__file__).resolve().parents[1]
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(root)}
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, cwd=root,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


def test_triton_s_kernels_equal_the_plain_form_in_its_interpreter(tmp_path):
    assert triton_says(INTERPRETED, tmp_path, TRITON_INTERPRET="1") == "all equal"


def test_triton_s_kernels_compile_for_a_device_that_is_not_here(tmp_path):
    assert triton_says(COMPILED, tmp_path) == "all compiled"
