"""Moments predicted without an example: against sampling, and what they are good for."""

import copy
import json

import pytest
import torch
from torch import nn

import bnfix
from bnfix.core.errors import ModelError
from bnfix.recalibrate.reference import match_predicted_, predicted_gaps, predicted_moments
from tests import nets, real

ACTS = [nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.Hardswish(), nn.Tanh(), nn.Identity()]


def chain(act, groups=1, seed=0):
    """norm, activation, 1x1 convolution, norm, with drawn parameters."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.BatchNorm2d(6), act, nn.Conv2d(6, 4, 1, groups=groups), nn.BatchNorm2d(4)
    ).double()
    nn.init.normal_(net[0].weight)
    nn.init.normal_(net[0].bias)
    net[0].running_mean.normal_()
    net[0].running_var.uniform_(0.5, 3)
    return net.eval()


@pytest.mark.parametrize("act", ACTS, ids=lambda act: type(act).__name__)
@pytest.mark.parametrize("groups", [1, 2])
def test_predictions_agree_with_samples_of_independent_normal_channels(act, groups):
    net = chain(act, groups)
    torch.manual_seed(1)
    n = 400_000
    x = torch.randn(n, 6, 1, 1, dtype=torch.float64)
    x = x * net[0].running_var.sqrt().view(-1, 1, 1) + net[0].running_mean.view(-1, 1, 1)
    with torch.no_grad():
        met = net[:3](x).flatten(1)
    found = predicted_moments(net)["3"]
    spread = 5 * (met.var(0) / n).sqrt().max().item()
    torch.testing.assert_close(found.mean, met.mean(0), rtol=0, atol=spread)
    # For one position the form is (w^2 + w^2) var: twice the variance of independent channels.
    torch.testing.assert_close(found.var, 2 * met.var(0), rtol=0.03, atol=1e-9)


def test_a_linear_chain_is_exact():
    net = chain(nn.Identity())
    weight, bias = net[2].weight.flatten(1), net[2].bias
    torch.testing.assert_close(predicted_moments(net)["3"].mean, weight @ net[0].bias + bias)


class Branches(nn.Module):
    """Sums, a slice with padding, and a product that no prediction passes."""

    def __init__(self):
        super().__init__()
        self.norm, self.conv, self.short = nn.BatchNorm2d(3), nn.Conv2d(3, 5, 3), nn.Conv2d(3, 3, 1)
        self.inner, self.outer, self.last = (nn.BatchNorm2d(n) for n in (3, 5, 5))
        self.mix = nn.Conv2d(5, 5, 1)
        for module in (self.norm, self.inner, self.outer):
            nn.init.normal_(module.bias)

    def forward(self, x):
        x = self.norm(x)
        x = x + self.inner(self.short(x))
        x = self.outer(self.conv(x))
        return self.last(self.mix(x * x))


def test_sums_add_and_products_end_the_prediction():
    torch.manual_seed(0)
    net = Branches().double().eval()
    found = predicted_moments(net)
    assert set(found) == {"inner", "outer"}
    mean = net.norm.bias + net.inner.bias
    expected = net.conv.weight.sum((2, 3)) @ mean + net.conv.bias
    torch.testing.assert_close(found["outer"].mean, expected)


def test_a_network_without_a_graph_predicts_nothing():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(x) if x.sum() > 0 else x

    assert predicted_gaps(Branching()) == {}
    with pytest.raises(ModelError, match=r"cannot be traced by torch.fx"):
        match_predicted_(Branching(), Branching())


def resnet(name):
    net = (nets.resnet32 if "32" in name else nets.resnet20)()
    state = torch.load(real.DATA / "cifar10" / f"{name}.th", weights_only=True, map_location="cpu")
    state = {k.removeprefix("module."): v for k, v in state["state_dict"].items()}
    net.load_state_dict(state, strict=False)
    return net.eval()


def rounded(net, bits):
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            w = module.weight.data
            step = w.abs().max() / (2 ** (bits - 1) - 1)
            w.copy_((w / step).round() * step)
    return net


def pruned(net, part):
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            w = module.weight.data
            w[w.abs() <= w.abs().flatten().kthvalue(int(part * w.numel())).values] = 0
    return net


def middle(net):
    gaps = sorted(predicted_gaps(net).values())
    return gaps[len(gaps) // 2]


@real.needs_data
@pytest.mark.parametrize("name", ["resnet20", "resnet20_b", "resnet32"])
def test_gaps_of_trained_networks_are_small_and_grow_with_damage(name):
    net = resnet(name)
    assert middle(net) < 0.1
    assert middle(pruned(net, 0.7)) > 0.15
    fresh = copy.deepcopy(net)
    for module in fresh.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
    assert middle(fresh) > 0.25


def right(net, n=500):
    x, y = cifar(n)
    with torch.no_grad():
        return float((net(x).argmax(1) == y).double().mean())


def cifar(n):
    import numpy as np

    found = np.load(real.DATA / "cifar10" / "test.npz")
    x = torch.from_numpy(found["images"][:n]).permute(0, 3, 1, 2).float() / 255
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return x, torch.from_numpy(found["labels"][:n])


@real.needs_data
@pytest.mark.parametrize(
    ("damage", "gain"), [(lambda net: rounded(net, 4), 0.05), (lambda net: pruned(net, 0.7), 0.1)]
)
def test_predicted_statistics_win_back_accuracy_without_an_image(damage, gain):
    original = resnet("resnet20_b")
    net = damage(original)
    before = right(net)
    assert len(match_predicted_(net, original)) == 18  # all but the stem
    assert right(net) > before + gain


TRACEABLE = """
import torch
from torch import nn


def build(num_classes=3):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, num_classes),
    )
"""


@pytest.fixture
def pair(tmp_path):
    """A spec, an original, and the same with rounded weights, as files and as networks."""
    (tmp_path / "plain.py").write_text(TRACEABLE)
    names = {}
    exec(compile(TRACEABLE, "plain.py", "exec"), names)
    torch.manual_seed(0)
    net = nets.lived_in(names["build"](), 0).eval()
    damaged = rounded(net, 3)
    torch.save(net.state_dict(), tmp_path / "original.pth")
    torch.save(damaged.state_dict(), tmp_path / "rounded.pth")
    return f"{tmp_path / 'plain.py'}:build", net, damaged


def test_an_original_as_its_own_reference_moves_nothing(pair):
    _, net, _ = pair
    same = copy.deepcopy(net)
    assert match_predicted_(same, net) == ["4"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=1e-6, atol=1e-7, msg=name)


def test_calibrate_without_data(pair, cli, tmp_path):
    spec, net, damaged = pair
    out = tmp_path / "out.safetensors"
    command = ["calibrate", tmp_path / "rounded.pth", "--data", "none", "--model", spec]
    done = cli(*command, "--reference", tmp_path / "original.pth", "-o", out)
    assert done.code == 0, done.err
    assert "no example was used" in done.err
    assert "Nothing proves that the output is better" in done.err
    assert "1: not reached by the prediction" in done.err
    match_predicted_(damaged, net)
    loaded = bnfix.load(out, copy.deepcopy(net))
    assert torch.equal(loaded[4].running_mean, damaged[4].running_mean)
    assert not torch.equal(loaded[4].running_mean, net[4].running_mean)
    assert torch.equal(loaded[1].running_mean, net[1].running_mean)
    report = json.loads((tmp_path / "out.safetensors.report.json").read_text())
    assert (report["command"], report["data"]) == ("calibrate", None)
    again = cli(*command, "--reference", tmp_path / "original.pth", "-o", out)
    assert "exists" in again.message


def test_calibrate_without_data_asks_for_the_original(files, cli, tmp_path):
    out = tmp_path / "o.safetensors"
    command = ["calibrate", files.net, "--data", "none", "--model", files.spec, "-o", out]
    words = "--data none: without examples, statistics can only be predicted"
    assert words in cli(*command).message
    assert not out.exists()


def test_a_branch_on_the_size_goes_as_for_an_example(files, cli, tmp_path):
    out = tmp_path / "o.safetensors"
    command = ["calibrate", files.stale, "--data", "none", "--model", files.spec, "-o", out]
    assert cli(*command, "--reference", files.net).code == 0
    loaded, net = bnfix.load(out, files.model()), files.trained()
    # The same weights, but for the part of eps in the stale variances.
    torch.testing.assert_close(loaded.bn2.running_mean, net.bn2.running_mean, rtol=0, atol=1e-3)
    assert not torch.allclose(loaded.bn1.running_mean, net.bn1.running_mean)


def test_a_network_without_a_graph_is_refused(pair, cli, tmp_path):
    code = (
        TRACEABLE
        + """

class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = build()

    def forward(self, x):
        return self.net(x) if float(x.sum()) < 1e9 else x
"""
    )
    (tmp_path / "counting.py").write_text(code)
    state = torch.load(tmp_path / "original.pth", weights_only=True)
    torch.save({f"net.{name}": value for name, value in state.items()}, tmp_path / "net.pth")
    out, spec = tmp_path / "o.safetensors", f"{tmp_path / 'counting.py'}:Counting"
    command = ["calibrate", tmp_path / "net.pth", "--data", "none", "--model", spec, "-o", out]
    message = cli(*command, "--reference", tmp_path / "net.pth").message
    assert "--data none: model: cannot be traced by torch.fx" in message
    assert message.endswith("Give data.")
    assert not out.exists()


def test_inspect_shows_gaps_without_data(pair, cli, tmp_path):
    found = cli("inspect", tmp_path / "original.pth", "--model", pair[0], "--json").json
    gaps = {layer["name"]: layer["predicted_gap"] for layer in found["layers"]}
    assert gaps["1"] is None  # its inputs are the images
    assert gaps["4"] > 0


def test_statistics_of_other_weights_are_a_finding(cli, tmp_path):
    """Six layers whose statistics fit, and the same with those of a new network."""
    parts = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)]
    for _ in range(5):
        parts += [nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]
    torch.manual_seed(0)
    net = nn.Sequential(*parts).eval()
    for module in net:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.bias)
    (tmp_path / "six.py").write_text(
        "from torch import nn\n\n\ndef build():\n"
        "    parts = [nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)]\n"
        "    for _ in range(5):\n"
        "        parts += [nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)]\n"
        "    return nn.Sequential(*parts)\n"
    )
    states = {}
    for name, fits in (("fits", True), ("other", False)):
        for key, found in predicted_moments(net).items():
            layer = net.get_submodule(key)
            layer.running_mean.copy_(found.mean if fits else -found.mean)
            layer.num_batches_tracked.fill_(100)
        net[1].num_batches_tracked.fill_(100)
        net[1].running_mean.fill_(0.1)
        torch.save(net.state_dict(), tmp_path / f"{name}.pth")
        shown = cli(
            "inspect", tmp_path / f"{name}.pth", "--model", f"{tmp_path / 'six.py'}:build", "--json"
        ).json
        states[name] = [one for one in shown["findings"] if one["fault"] == "predicted-gap"]
    assert states["fits"] == []
    (one,) = states["other"]
    assert one["layer"] == ""
    assert "the median over 5 layers" in one["detail"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--statistics", "keep"], "without examples --statistics cannot act"),
        (["--example-weight", "0.5"], "without examples --example-weight cannot act"),
        (["--layers", "4"], "without examples --layers cannot act"),
        (["--test", "nowhere/"], "without examples --test cannot act"),
        (["--samples", "10"], "without examples --samples cannot act"),
    ],
)
def test_options_that_need_examples_are_refused(pair, cli, tmp_path, words, message):
    out = tmp_path / "o.safetensors"
    command = ["calibrate", tmp_path / "rounded.pth", "--data", "none", "--model", pair[0], *words]
    done = cli(*command, "--reference", tmp_path / "original.pth", "-o", out)
    assert message in done.message
    assert not out.exists()


@pytest.mark.parametrize("command", ["fix", "finetune"])
def test_other_commands_need_examples(pair, cli, tmp_path, command):
    out = tmp_path / "o.safetensors"
    words = [tmp_path / "rounded.pth", "--data", "none", "--model", pair[0], "-o", out]
    message = cli(command, *words, "--reference", tmp_path / "original.pth").message
    assert f"--data none: {command} needs examples; only calibrate works without" in message


def test_a_plan_without_data_writes_nothing(pair, cli, tmp_path):
    out = tmp_path / "o.safetensors"
    command = [
        "calibrate",
        tmp_path / "rounded.pth",
        "--data",
        "none",
        "--model",
        pair[0],
        "--plan",
    ]
    done = cli(*command, "--reference", tmp_path / "original.pth", "-o", out)
    assert done.code == 0
    assert "the means of 1 layers were moved" in " ".join(done.out.split())
    assert not out.exists()
