"""Statistics pooled from clients who share no images: equal to one pass over all, or refused."""

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bnfix.jobs.unjudged import measure_moments, pooled, set_moments_
from bnfix.recalibrate.recalibrate import recalibrate_
from tests import nets
from tests.conftest import images_of, inputs_of
from tests.test_domains import header_of


@pytest.mark.parametrize("n_parts", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("make", [nets.plain, nets.residual, nets.shared_norm])
def test_the_pool_of_parts_is_one_pass_over_all(make, n_parts):
    torch.manual_seed(n_parts)
    net = nets.lived_in(make()).double().eval()
    sizes = torch.randint(2, 9, (7,)).tolist()
    batches = [torch.randn(n, 3, 8, 8, dtype=torch.float64) * 2 + 1 for n in sizes]
    parts = [batches[k::n_parts] for k in range(n_parts)]
    for feed in ("batch", "sequential"):
        found = pooled([measure_moments(net, part, feed) for part in parts])
        whole = measure_moments(net, batches, feed)
        assert found.keys() == whole.keys()
        for name, moments in whole.items():
            for one, other in zip(vars(found[name]).values(), vars(moments).values(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    once = copy.deepcopy(net)
    recalibrate_(once, batches, feed="batch")
    set_moments_(net, pooled([measure_moments(net, part) for part in parts]))
    for name, value in once.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_rounds_of_the_sequential_feed_end_at_all_images_together():
    torch.manual_seed(0)
    net = nets.lived_in(nets.residual()).double().eval()
    batches = [torch.randn(n, 3, 8, 8, dtype=torch.float64) * (n + 1) for n in (1, 4, 2)]
    together = copy.deepcopy(net)
    recalibrate_(together, batches, feed="sequential")
    n_layers = sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    for _ in range(n_layers):
        set_moments_(net, pooled([measure_moments(net, [one], "sequential") for one in batches]))
    for name, value in together.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], value, rtol=1e-11, atol=1e-11)


@pytest.fixture(scope="module")
def clients(files, cli, tmp_path_factory):
    """The data of two clients, and their moments."""
    folder = tmp_path_factory.mktemp("clients")
    images, labels = images_of(180, seed=2)
    for name, part in (("one", slice(0, 64)), ("two", slice(64, 180))):
        np.savez(folder / f"{name}.npz", images=images[part], labels=labels[part])
        words = ("calibrate", files.stale, "--data", folder / f"{name}.npz", *files.common)
        done = cli(*words, "--save-moments", folder / f"{name}.safetensors")
        assert done.code == 0, done.err
        assert "--labels none" not in done.err
    return folder


def test_pooled_files_are_the_batches_of_both_clients(files, cli, clients, tmp_path):
    out = tmp_path / "pooled.safetensors"
    words = ("pool", clients / "one.safetensors", files.stale, clients / "two.safetensors")
    words = (*words, "--model", files.spec, "-o", out)
    planned = cli(*words, "--plan")
    assert planned.code == 0, planned.err
    assert list(tmp_path.iterdir()) == []
    done = cli(*words)
    assert done.code == 0, done.err
    assert "pooled for 2 layers (batch feed; examples by file: 64, 116)" in done.err
    model, x = files.model(), inputs_of(images_of(180, seed=2)[0])
    model.load_state_dict(torch.load(files.stale))
    recalibrate_(model, [x[:64], x[64:]], feed="batch")
    stored = load_file(out)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(stored[name], value, rtol=1e-5, atol=1e-5)
    assert header_of(out)["history"][-1]["results"]["n_examples"] == [64, 116]
    assert not {"images", "data"} & header_of(clients / "one.safetensors").keys()


def changed(clients, tmp_path, change):
    path = tmp_path / "changed.safetensors"
    tensors, header = load_file(clients / "one.safetensors"), header_of(clients / "one.safetensors")
    change(tensors, header)
    save_file(tensors, path, {"bnfix": json.dumps(header)})
    return path


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, h: t["bn1"][2].mul_(-1), "bn1: expected 6 counts from 1"),
        (lambda t, h: t["bn1"].mul_(np.nan), "bn1: expected 6 counts from 1"),
        (lambda t, h: t.update(bn1=t["bn1"][:, :3].clone()), "bn1: expected 6 counts from 1"),
        (lambda t, h: t.update(bn1=t["bn1"][:2].clone()), "bn1: expected 6 counts from 1"),
        (lambda t, h: t.update(bn1=t["bn1"].float()), "bn1: expected 6 counts from 1"),
        (lambda t, h: t["bn1"][0].mul_(0), "bn1: expected 6 counts from 1"),
        (lambda t, h: t["bn1"][0].mul_(1e300), "bn1: expected 6 counts from 1"),
        (lambda t, h: t.update(bn7=t["bn1"] + 0), "bn7: no such layer in the checkpoint"),
        (lambda t, h: (t.clear(), t.update(x=torch.zeros(1))), "no such layer"),
        (lambda t, h: h["moments"].update(model="0" * 64), "other weights or statistics"),
        (
            lambda t, h: h["moments"].update(feed="sequential"),
            "differs from the first in feed or preprocessing",
        ),
        (
            lambda t, h: h["moments"].update(preprocessing=None),
            "differs from the first in feed or preprocessing",
        ),
        (lambda t, h: h["moments"].update(feed="x"), "its header is damaged"),
        (lambda t, h: h.update(moments=3), "its header is damaged"),
        (lambda t, h: None, "is given twice"),
    ],
)
def test_moments_that_do_not_fit_are_refused(files, cli, clients, tmp_path, change, message):
    bad, out = changed(clients, tmp_path, change), tmp_path / "out.safetensors"
    same = bad if message == "is given twice" else clients / "two.safetensors"
    done = cli("pool", same, bad, files.stale, "--model", files.spec, "-o", out)
    assert done.code == 1
    assert message in done.message
    assert not out.exists()


def test_all_problems_of_moments_at_once(files, cli, clients, tmp_path):
    bad = changed(clients, tmp_path, lambda t, h: [x.mul_(np.inf) for x in t.values()])
    words = ("pool", bad, files.net, "--model", files.spec, "-o", tmp_path / "out.safetensors")
    message = cli(*words).message
    parts = ("bn1: expected 6 counts", "bn2: expected", "other weights or statistics")
    assert all(part in message for part in parts)


def test_pool_without_one_checkpoint_is_refused(files, cli, clients, tmp_path):
    one, out = clients / "one.safetensors", tmp_path / "out.safetensors"
    for given in ((one,), (files.net,), (one, files.net, files.stale)):
        done = cli("pool", *given, "--model", files.spec, "-o", out)
        assert done.code == 2
        assert "expected one checkpoint" in done.message
    done = cli("pool", files.net, tmp_path / "no.safetensors", "--model", files.spec, "-o", out)
    assert "no.safetensors: no such file." in done.message
    done = cli("calibrate", files.net, "--data", files.data, *files.common, "--robust",
               "--statistics", "blend", "--save-moments", out)  # fmt: skip
    assert done.code == 2
    assert "--save-moments: writes plain moments" in done.message
    assert list(tmp_path.iterdir()) == []


def test_calibrate_takes_one_of_two_outputs(files, cli, tmp_path):
    words = ("calibrate", files.net, "--data", files.data, *files.common)
    both = ("-o", tmp_path / "a.safetensors", "--save-moments", tmp_path / "b.safetensors")
    for given in ((), both):
        done = cli(*words, *given)
        assert done.code == 2
        assert "either -o OUT or --save-moments FILE" in done.message
    assert list(tmp_path.iterdir()) == []
