"""Statistics, chosen weights and metrics on CPU and CUDA agree; needs a CUDA device."""

import copy

import pytest
import torch

import bnfix
from bnfix.core import runtime
from bnfix.core.settings import WeightRecipe
from bnfix.norm.layer import generalized_norms
from tests.nets import lived_in, residual

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture
def exact():
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    runtime.exact_float32()
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture
def net():
    model = lived_in(residual(), seed=0).eval()
    bnfix.swap_norms_(model)
    return model


@pytest.fixture
def batches(net):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(12, 16, 3, 12, 12, generator=generator) * 1.5 + 0.3
    with torch.no_grad():
        return [(part, net(part).argmax(1)) for part in x]


def both(net):
    return net, copy.deepcopy(net).cuda()


@pytest.mark.parametrize("feed", ["batch", "sequential"])
def test_statistics_agree(exact, net, batches, feed):
    states = []
    for model in both(net):
        bnfix.recalibrate_(model, batches, feed=feed)
        states.append({k: v.cpu() for k, v in model.state_dict().items()})
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("a", [0.0, 0.2])
def test_metrics_agree(exact, net, batches, a):
    bnfix.set_example_weight_(net, a)
    cpu, gpu = (bnfix.evaluate(model, batches) for model in both(net))
    assert gpu.top1 == cpu.top1
    assert gpu.nll == pytest.approx(cpu.nll, abs=1e-4)
    torch.testing.assert_close(
        torch.from_numpy(gpu.logits), torch.from_numpy(cpu.logits), rtol=1e-4, atol=1e-4
    )


def test_chosen_weights_agree(exact, net, batches):
    shifted = [(2 * x + 1, y) for x, y in batches]
    chosen = []
    for model in both(net):
        choice = bnfix.choose_example_weight_(model, shifted, recipe=WeightRecipe(epochs=1), z=0)
        weights = [layer.example_weight.cpu() for _, layer in generalized_norms(model)]
        chosen.append((choice.chosen, weights))
    assert chosen[0][0] == chosen[1][0]
    torch.testing.assert_close(chosen[0][1], chosen[1][1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_half_precision_and_channels_last(exact, dtype, channels_last):
    layer = bnfix.GeneralizedBatchNorm(8, channel_groups=4, example_weight=0.3).cuda().eval()
    x = torch.randn(4, 8, 9, 9, device="cuda", dtype=dtype) + 3
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    y = layer(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x.float()).to(dtype))
