"""Statistics of several sources with stated weights, against sums by hand."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from bnfix.core.errors import ConfigError, DataError
from bnfix.data.images import Images
from bnfix.data.open import for_outputs, open_images, open_several
from bnfix.data.splits import cut
from bnfix.norm.sites import find_norms
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import recalibrate_
from tests import nets
from tests.conftest import images_of, inputs_of

EPS = 1e-5
MIX = (3.0, 1.0)


def some(make=nets.plain):
    torch.manual_seed(0)
    return nets.lived_in(make()).eval()


def drawn(n, seed, scale=1.0, offset=0.0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=rng) * scale + offset


#: Of very different sizes and kinds.
A, B = drawn(5, 1), drawn(17, 2, 3.0, 2.0)


def statistics(model):
    return {
        site.name: (site.module.running_mean.double(), site.module.running_var.double())
        for site in find_norms(model)
    }


def weighed(z, mix):
    """Mean and variance of all values, each example weighing mix_s / n_s, by raw moments."""
    sizes = [len(A), len(B)]
    each = np.concatenate([np.full(n, w / sum(mix) / n) for n, w in zip(sizes, mix, strict=True)])
    values = z.double().flatten(2).numpy()
    mean = np.einsum("n,ncl->c", each, values) / values.shape[2]
    square = np.einsum("n,ncl->c", each, values**2) / values.shape[2]
    return torch.from_numpy(mean), torch.from_numpy(square - mean**2)


def by_hand(net, mix, feed, weight=1.0):
    """A `Plain` network's statistics, layer by layer, in float64."""
    model = copy.deepcopy(net).double()
    y, parts = torch.cat([A, B]).double(), [x.double() for x in (A, B)]
    with torch.no_grad():
        for conv, bn in (("conv1", "bn1"), ("conv2", "bn2")):
            norm, conv = getattr(model, bn), getattr(model, conv)
            z = conv(y) if feed == "sequential" else torch.cat([conv(part) for part in parts])
            mean, var = weighed(z, mix)
            old_mean, old_var = norm.running_mean.clone(), norm.running_var.clone()
            gap = mean - old_mean
            var = (1 - weight) * old_var + weight * var + weight * (1 - weight) * gap**2
            norm.running_mean.copy_(old_mean + weight * gap)
            norm.running_var.copy_(var)
            y = norm(z).relu()
            # One batch a source, normalized by itself.
            parts = [norm.train()(conv(part)).relu() for part in parts] if feed == "batch" else []
            norm.eval()
            norm.running_mean.copy_(old_mean + weight * gap)
            norm.running_var.copy_(var)
    return statistics(model)


@pytest.mark.parametrize("mix", [MIX, (1, 1), (1e-3, 5)])
@pytest.mark.parametrize("weight", [1.0, 0.3])
@pytest.mark.parametrize("memory_bytes", [None, 0])
def test_each_example_weighs_by_its_source(mix, weight, memory_bytes):
    net = some()
    expected = by_hand(net, mix, "sequential", weight)
    options = {} if weight == 1 else {"target": "blend", "new_weight": weight}
    for size in (1, 4, 50):
        found = copy.deepcopy(net)
        batches = [A.split(size), B.split(size + 1)]
        done = recalibrate_(found, batches, mix=mix, memory_bytes=memory_bytes, **options)
        assert (done.feed, done.n_examples) == ("sequential", 22)
        assert done.how == ("passes" if memory_bytes == 0 else "walk")
        for name, moments in statistics(found).items():
            torch.testing.assert_close(moments, expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mix", [MIX, (1, 1)])
def test_under_the_batch_feed_no_batch_holds_two_sources(mix):
    net = some()
    expected = by_hand(net, mix, "batch")
    done = recalibrate_(net, [[A], [B]], mix=mix, feed="batch")
    assert done.feed == "batch"
    for name, moments in statistics(net).items():
        torch.testing.assert_close(moments, expected[name], rtol=1e-4, atol=1e-5)


def test_weights_by_count_are_the_population():
    net, other = some(nets.residual), some(nets.residual)
    recalibrate_(net, [A, B], feed="sequential")
    recalibrate_(other, [[A], B.split(5)], mix=(len(A), len(B)))
    for name, moments in statistics(other).items():
        torch.testing.assert_close(moments, statistics(net)[name], rtol=1e-5, atol=1e-6)


def test_errors_are_those_of_draws():
    """The first layer's standard errors, against the spread of means over many draws."""
    net = some()
    rng, means, variances = torch.Generator().manual_seed(4), [], []
    wide, narrow = torch.randn(900, 3, 8, 8, generator=rng) * 2 + 1, drawn(300, 5)
    for k in range(60):
        model = copy.deepcopy(net)
        parts = [wide[15 * k :][:15].split(4), narrow[5 * k :][:5].split(3)]
        done = recalibrate_(model, parts, mix=(1, 2), feed="batch")
        if not k:
            first = done.layers[0]
        means.append(model.bn1.running_mean)
        variances.append(model.bn1.running_var)
    spread = model.bn1.running_var + EPS
    found = float((torch.stack(means).std(0) / spread.sqrt()).max())
    assert 0.5 < first.mean_se / found < 2
    found = float((torch.stack(variances).std(0) / spread).max())
    assert 0.4 < first.var_se / found < 2.5


def test_residuals_are_those_of_the_mixture():
    net = some()
    batches = [A.split(2), B.split(7)]
    recalibrate_(net, batches, mix=MIX)
    assert max(max(pair) for pair in residuals(net, batches, mix=MIX).values()) < 1e-5
    assert max(max(pair) for pair in residuals(net, [A, B]).values()) > 0.05


def test_an_interrupted_run_goes_on_and_other_weights_do_not(tmp_path):
    net = some(nets.residual)
    batches, how = [A.split(2), B.split(7)], {"memory_bytes": 0, "state": tmp_path}

    class Halting(list):
        def __iter__(self):
            for k, batch in enumerate(super().__iter__()):
                if k == 1:
                    raise KeyboardInterrupt
                yield batch

    recalibrate_(first := copy.deepcopy(net), batches, mix=MIX, **how)
    again, other = copy.deepcopy(net), copy.deepcopy(net)
    done = recalibrate_(again, batches, mix=MIX, **how)
    assert done.effort.n_resumed > 0
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in first.state_dict().items())
    assert recalibrate_(other, batches, mix=(1, 1), **how).effort.n_resumed == 0
    with pytest.raises(KeyboardInterrupt):
        recalibrate_(net, [Halting(batches[0]), Halting(batches[1])], mix=MIX)
    assert torch.equal(net.bn1.running_mean, some(nets.residual).bn1.running_mean)


@pytest.mark.parametrize(
    ("batches", "options", "error", "found"),
    [
        ([[A], [B]], {"mix": (1,)}, ConfigError, "1 weights, expected a list of equally many"),
        ([[A], [B], [A]], {"mix": (1, 1)}, ConfigError, "at least 2; found 3"),
        ([[A]], {"mix": (1,)}, ConfigError, "at least 2"),
        (iter([[A], [B]]), {"mix": (1, 1)}, ConfigError, "found list_iterator"),
        ([[A], iter([B])], {"mix": (1, 1)}, ConfigError, "a stream is read only once"),
        ([[A], [B]], {"mix": (1, 0)}, ConfigError, "expected numbers above 0"),
        ([[A], [B]], {"mix": (1, float("nan"))}, ConfigError, "expected numbers above 0"),
        ([[A], [B]], {"mix": (1, 1), "robust": True}, ConfigError, "robust"),
        (
            [[A], [B]], {"mix": (1, 1), "target": "train-batch", "train_batch_size": 2},
            ConfigError, "only for targets population and blend",
        ),
        ([[A], []], {"mix": (1, 1)}, DataError, "mix: source 2 of 2 gives no examples"),
        ([[A], [B[:0]]], {"mix": (1, 1)}, DataError, "mix: source 2 of 2 gives no examples"),
        ([[A], [B]], {"mix": (1, 1), "samples": 3}, DataError, "source 2 of 2 gives no examples"),
    ],
)  # fmt: skip
def test_what_cannot_be_mixed_is_refused(batches, options, error, found):
    net = some()
    before = copy.deepcopy(net.state_dict())
    for feed in ("sequential", "batch"):
        with pytest.raises(error, match=found):
            recalibrate_(net, batches, feed=feed, **options)
    assert all(torch.equal(t, net.state_dict()[name]) for name, t in before.items())


# --- the command ---


@pytest.fixture
def two(tmp_path):
    """40 images of three classes, and 14 darker ones of two of them, as arrays and as folders."""
    images, labels = images_of(40, seed=5)
    np.savez(tmp_path / "a.npz", images=images, labels=labels)
    dark, kinds = images_of(14, seed=6, classes=2)
    np.savez(tmp_path / "b.npz", images=dark // 2, labels=kinds + 1)
    for k, (pixels, label) in enumerate(zip(dark // 2, kinds + 1, strict=True)):
        for folder in (tmp_path / "b" / f"class {label}", tmp_path / "flat"):
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(folder / f"{k}.png")
    for k, (pixels, label) in enumerate(zip(images, labels, strict=True)):
        folder = tmp_path / "a" / f"class {label}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{k}.png")
    return tmp_path, inputs_of(images), inputs_of(dark // 2)


@pytest.mark.parametrize("kind", ["population", "blend"])
def test_the_command_weighs_as_python_does(files, cli, two, kind):
    folder, a, b = two
    out = folder / "out.safetensors"
    words = ["--data", folder / "a.npz", "--data", folder / "flat", "--mix", "1,2", *files.common,
             "--statistics", kind, "--example-weight", "keep", "-o", out, "--json"]  # fmt: skip
    done = cli("calibrate", files.stale, *words)
    assert done.code == 0, done.err
    found = done.json
    assert found["data"]["spec"] == f"{folder / 'a.npz'} + {folder / 'flat'}"
    assert found["data"]["n_examples"] == found["calibration"]["n_examples"] == 54
    assert found["calibration"]["feed"] == "sequential"
    assert any("labels are not used, since" in note for note in found["assumptions"])
    assert max(layer["residual"] for layer in found["layers"]) < (1e-4 if kind != "blend" else 9)
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    recalibrate_(model, [[a], [b]], mix=(1, 2), target=kind)
    stored = load_file(out)
    for name, value in model.state_dict().items():
        if name.endswith(("_mean", "_var")):
            torch.testing.assert_close(stored[name], value, rtol=1e-4, atol=1e-5)
    plan = ("--data", folder / "a.npz", "--data", folder / "flat", "--model", files.spec)
    again = cli("fix", files.stale, *plan, "--recipe", out, "-o", folder / "2.safetensors")
    assert again.code == 0, again.err
    repeated = load_file(folder / "2.safetensors")
    assert all(torch.equal(t, repeated[name]) for name, t in stored.items())
    alone = cli("fix", files.stale, *plan[2:], "--recipe", out, "-o", folder / "3.safetensors")
    assert "--mix: 2 numbers for 1 --data" in alone.message


def test_without_weights_they_are_one_set_of_images(files, cli, two):
    folder, a, b = two
    out = folder / "out.safetensors"
    words = [*files.common, "--statistics", "population", "--feed", "sequential",
             "--example-weight", "keep", "-o", out]  # fmt: skip
    cli("calibrate", files.stale, "--data", folder / "a.npz", "--data", folder / "b.npz", *words)
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    recalibrate_(model, [torch.cat([a, b])], feed="sequential")
    mean = load_file(out)["bn2.running_mean"]
    torch.testing.assert_close(mean, model.bn2.running_mean, rtol=1e-4, atol=1e-5)


def test_every_split_has_its_part_of_every_source_and_class():
    class Made(Images):
        kind = "made"

        def __len__(self):
            return 70

        def _hash(self, i):
            return b"%06d" % i

    images = Made("made", 3)
    images.sources = np.repeat([0, 1], [50, 20])
    images.labels = np.arange(70) % 2
    for groups in (None, np.arange(70) // 2):
        images.groups = groups
        split = cut(images, (0.6, 0.2, 0.2), seed=3)
        for part, fraction in ((split.fit, 0.6), (split.select, 0.2), (split.test, 0.2)):
            for source, n in ((0, 50), (1, 20)):
                assert abs((images.sources[part] == source).sum() - fraction * n) <= 2


def test_with_labels_all_is_judged_on_images_of_both(files, cli, two):
    folder, _, _ = two
    words = ["--data", folder / "a", "--data", folder / "b", "--mix", "1,1", *files.common]
    out = folder / "out.safetensors"
    found = cli("calibrate", files.stale, *words, "-o", out, "--json").json
    assert found["data"]["splits"] == {"fit": 32, "select": 11, "test": 11}
    assert found["models"][0]["top1"] is not None
    assert {d["stage"] for d in found["decisions"]} >= {"statistics"}


def test_classes_are_numbered_together(two):
    folder, _, _ = two
    images = open_several([str(folder / "b"), str(folder / "a")])
    assert images.class_names == ("class 0", "class 1", "class 2")
    assert images.labels[:14].min() == 1
    assert images.name(0).startswith(f"{folder / 'b'}: class ")
    arrays = open_several([str(folder / "a.npz"), str(folder / "b.npz")])
    parts = [open_images(str(folder / name)) for name in ("a.npz", "b.npz")]
    assert arrays.labels.tolist() == [k for part in parts for k in part.labels.tolist()]
    assert arrays.digests() == [digest for part in parts for digest in part.digests()]
    assert len(for_outputs(images, 3).class_names) == 3
    with pytest.raises(DataError, match="named or numbered in different ways"):
        open_several([str(folder / "a.npz"), str(folder / "b")])
    np.savez(folder / "x.npz", inputs=np.zeros((4, 3), np.float32))
    with pytest.raises(DataError, match="images with classes or without labels"):
        open_several([str(folder / "a.npz"), str(folder / "x.npz")])


def test_groups_of_several_sources_are_told_apart(two):
    folder, _, _ = two
    images = open_several([str(folder / "a"), str(folder / "flat")], groups=r"/(\d)|^(\d)")
    n_a = len(set(images.groups[:40]))
    assert not set(images.groups[:40]) & set(images.groups[40:])
    assert len(images.group_names) == len(set(images.groups)) > n_a


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mix", "1"], "--mix: 1 numbers for 1 --data. Give at least two --data"),
        (["--mix", "1,1"], "--mix: 2 numbers for 1 --data"),
        (["--data", "flat", "--mix", "1,1,1"], "--mix: 3 numbers for 2 --data"),
        (["--data", "flat", "--mix", "1,0"], "--mix: 1.0, 0.0, expected numbers above 0."),
        (["--data", "flat", "--mix", "1,x"], "--mix: '1,x', expected a number, or several"),
        (
            ["--data", "flat", "--mix", "1,1", "--statistics", "keep"],
            "--mix: only with --statistics auto, population or blend",
        ),
        (["--data", "flat", "--mix", "1,1", "--samples", "2", "--seed", "3"], "--mix: one of 2"),
        (["--data", "gone"], "DATA gone: no such file or folder"),
    ],
)
def test_a_mix_that_cannot_be_is_refused(files, cli, two, monkeypatch, words, message):
    folder, _, _ = two
    monkeypatch.chdir(folder)
    given = ("--data", "a.npz", "--statistics", "population", *files.common, *words)
    done = cli("calibrate", files.net, *given, "-o", "out.safetensors")
    assert message in done.message
    assert not (folder / "out.safetensors").exists()
