"""A checkpoint and its data, opened: preprocessing, parts, what was seen, and what was assumed."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bnfix.checkpoints.load import Loaded, Origin, load_ready
from bnfix.checkpoints.read import TEXT_LIMIT
from bnfix.core.errors import ConfigError, DataError, ModelError
from bnfix.core.settings import DataRecipe, GateRecipe, ModelRecipe, Preprocessing, RunOptions
from bnfix.data.batches import Batches
from bnfix.data.images import ArrayImages
from bnfix.data.open import open_images
from bnfix.data.splits import (
    cut,
    data_record,
    describe_unlisted,
    history_digests,
    seen_before,
)
from bnfix.jobs.inputs import (
    describe_skipped,
    evaluation_batch_size,
    open_checked,
    resolve_preprocessing,
)
from bnfix.jobs.session import Plan, Workbench, load_one, open_workbench
from tests.conftest import Files, images_of

SOURCE = DataRecipe(mean=(0.5,), std=(0.25,))


def bench_of(files: Files, fractions=(0.6, 0.2, 0.2), **changed: object) -> Workbench:
    recipes = {"model": ModelRecipe(files.spec), "source": SOURCE}
    plan = Plan(**{"run": RunOptions("cpu", workers=0), **recipes, **changed})  # type: ignore
    return open_workbench(files.net, str(files.data), plan, fractions)


# --- preprocessing ---


@pytest.fixture
def loaded(files: Files) -> Loaded:
    return load_ready(files.net, ModelRecipe(model=files.spec))


def test_without_a_word_imagenets_numbers_are_assumed_and_said(loaded):
    found, notes = resolve_preprocessing(loaded, DataRecipe())
    assert found == Preprocessing(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    assert "assumed" in notes[0]
    assert resolve_preprocessing(loaded, SOURCE)[1] == []


def test_what_is_given_replaces_one_by_one_but_resize_and_crop_together(loaded):
    preset = "torchvision:ResNet50_Weights.IMAGENET1K_V2"
    base, _ = resolve_preprocessing(loaded, DataRecipe(preset=preset))
    assert (base.resize, base.crop) == ((232,), (224, 224))
    found, _ = resolve_preprocessing(loaded, DataRecipe(preset=preset, std=(0.5,)))
    assert (found.std, found.mean, found.crop) == ((0.5,), base.mean, (224, 224))
    found, _ = resolve_preprocessing(loaded, DataRecipe(preset=preset, resize=(64,)))
    assert (found.resize, found.crop, found.mean) == ((64,), None, base.mean)
    found, _ = resolve_preprocessing(loaded, DataRecipe(preset=preset, crop=(96,)))
    assert (found.resize, found.crop) == (None, (96, 96))


def test_stored_goes_before_assumed_and_a_preset_before_stored(loaded):
    stored = Preprocessing(resize=(9,), mean=(0.1,), std=(0.2,))
    loaded.origin.preprocessing = stored
    found, notes = resolve_preprocessing(loaded, DataRecipe())
    assert found == stored
    assert "as stored" in notes[0]
    preset = DataRecipe(preset="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    assert resolve_preprocessing(loaded, preset)[0].crop == (224, 224)


def test_a_published_model_brings_its_own(loaded):
    loaded.origin.spec = "torchvision:mobilenet_v2"
    found, notes = resolve_preprocessing(loaded, DataRecipe())
    assert (found.resize, found.crop) == ((256,), (224, 224))
    assert "MobileNet_V2_Weights" in notes[0]


def test_a_network_for_grey_images_gets_one_channel(loaded):
    loaded = Loaded(nn.Sequential(nn.Conv2d(1, 4, 3)), loaded.checkpoint, Origin())
    found, notes = resolve_preprocessing(loaded, DataRecipe())
    assert found == Preprocessing(channels=1)
    assert "pixels/255, assumed" in notes[0]
    colour = DataRecipe(preset="torchvision:ResNet18_Weights.IMAGENET1K_V1")
    found, _ = resolve_preprocessing(loaded, colour)
    assert found.channels == 1
    assert found.mean == pytest.approx((0.449,), abs=1e-6)
    with pytest.raises(ConfigError, match="--mean: 3 numbers, expected 1 for a grey network"):
        resolve_preprocessing(loaded, DataRecipe(mean=(0.1, 0.2, 0.3)))


# --- opening ---


def test_parts_are_disjoint_and_learning_and_watching_share_fit(files):
    bench = bench_of(files)
    parts = [bench.split.fit, bench.split.select, bench.split.test]
    assert [len(part) for part in parts] == [108, 36, 36]
    assert len(np.unique(np.concatenate(parts))) == 180
    learn, monitor = bench.learn_and_monitor()
    assert np.array_equal(np.sort(np.concatenate([learn, monitor])), bench.split.fit)
    assert len(monitor) == 21
    again = bench_of(files)
    assert np.array_equal(again.split.fit, bench.split.fit)
    other = bench_of(files, gate=GateRecipe(seed=1))
    assert not np.array_equal(other.split.fit, bench.split.fit)


@pytest.mark.parametrize(
    "changed",
    [
        {"source": DataRecipe(mean=(0.5,), std=(0.25,), corrupt="noise:1")},
        {"source": DataRecipe(mean=(0.5,), std=(0.25,), corrupt="noise:2")},
        {"source": DataRecipe(mean=(0.4,), std=(0.25,))},
        {"source": DataRecipe(mean=(0.5,), std=(0.25,), resize=(9,))},
        {"source": DataRecipe(mean=(0.5,), std=(0.25,), labels="none")},
        {"gate": GateRecipe(seed=1)},
        {"model": "forward"},
    ],
    ids=str,
)
def test_a_run_is_told_from_one_on_other_inputs(files, tmp_path, changed):
    code = tmp_path / "call.py"
    code.write_text("def forward(model, batch): return model(batch.x)")
    if changed == {"model": "forward"}:
        changed = {"model": ModelRecipe(files.spec, forward=f"{code}:forward")}
    bench, again, other = bench_of(files), bench_of(files), bench_of(files, **changed)
    part = np.arange(20)
    identity = bench.identity(part, batch_size=10)
    assert again.identity(part, batch_size=10) == identity
    assert other.identity(part, batch_size=10) != identity
    assert bench.identity(part, batch_size=5) != identity
    assert bench.identity(part[::-1], batch_size=10) != identity
    assert bench.identity(part[:7], part[7:], batch_size=10) != identity
    before = other.identity(part, batch_size=10)
    code.write_text("def forward(model, batch): return model(batch.x + 1)")
    assert (other.identity(part, batch_size=10) == before) == ("model" not in changed)


def test_each_class_is_in_each_part(files):
    bench = bench_of(files)
    assert bench.inputs.images.labels is not None
    for part in (bench.split.fit, bench.split.select, bench.split.test):
        assert np.bincount(bench.inputs.images.labels[part]).tolist() == [len(part) // 3] * 3


def test_batches_are_gone_through_again_and_shuffled_by_the_pass(files):
    bench = bench_of(files)
    batches = bench.batches(bench.split.fit, "a look", 50)
    assert len(batches) == 3
    first, second = (torch.cat([b.x for b in batches]) for _ in range(2))
    assert torch.equal(first, second)
    epochs = batches.shuffled(4)
    orders = [np.concatenate([b.index for b in epochs(k)]) for k in (0, 1, 0)]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    assert np.array_equal(np.sort(orders[0]), bench.split.fit)


def test_half_precision_is_worked_on_in_float32(files, tmp_path):
    half = {n: t.half() if t.is_floating_point() else t for n, t in torch.load(files.net).items()}
    torch.save(half, tmp_path / "half.pth")
    model = load_one(tmp_path / "half.pth", ModelRecipe(files.spec), RunOptions("cpu")).model
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_an_input_that_cannot_be_run_is_named(files, tmp_path):
    np.savez(tmp_path / "big.npz", images=np.zeros((3, 320, 310, 3), np.uint8))
    model = load_ready(files.net, ModelRecipe(model=files.spec)).model
    with pytest.raises(
        ModelError, match=r"1x3x320x310 \(float32\) \(ValueError: images of more than 300 pixels"
    ):
        open_checked(str(tmp_path / "big.npz"), model, SOURCE, Preprocessing())


def test_labels_that_the_model_has_no_output_for(files, tmp_path):
    images, labels = images_of(12, 0)
    np.savez(tmp_path / "many.npz", images=images, labels=labels + 1)
    model = load_ready(files.net, ModelRecipe(model=files.spec)).model
    with pytest.raises(DataError, match=r"many\.npz.*3"):
        open_checked(str(tmp_path / "many.npz"), model, SOURCE, Preprocessing())


def test_more_bad_images_than_usual_may_be_allowed_from_the_start(files, tmp_path):
    for i in range(8):
        (tmp_path / f"a{i}.png").write_text("no image")
    (tmp_path / "b.png").write_bytes((files.flat / "000.png").read_bytes())
    model = load_ready(files.net, ModelRecipe(model=files.spec)).model
    with pytest.raises(DataError, match="--max-bad"):
        open_checked(str(tmp_path), model, SOURCE, Preprocessing())
    images, size, _ = open_checked(str(tmp_path), model, DataRecipe(max_bad=8), Preprocessing())
    assert (len(images), size) == (9, 3 * 8 * 8)


def test_skipped_images_are_described_once(files, tmp_path):
    import shutil

    shutil.copytree(files.flat, tmp_path / "flat")
    (tmp_path / "flat" / "bad.png").write_text("no image")
    bench = bench_of(files)
    images = open_images(str(tmp_path / "flat"))
    bench.inputs = dataclasses.replace(bench.inputs, images=images)
    batches = bench.batches(np.arange(len(images)), "a look")
    assert sum(len(b.x) for _ in range(2) for b in batches) == 120
    (told,) = describe_skipped([batches, batches])
    assert told.startswith("bad.png: ")


@pytest.mark.parametrize(
    ("stated", "input_size", "expected"),
    [(7, 10, 7), (None, 192, 128), (None, 3 * 224**2, 27), (None, 1 << 24, 8)],
)
def test_the_batch_of_evaluation_fits_the_input(files, stated, input_size, expected):
    run = RunOptions("cpu", batch_size=stated)
    assert evaluation_batch_size(run, files.model(), input_size) == expected


def test_blue_first(files, cli, tmp_path):
    pixels = np.arange(12, dtype=np.uint8).reshape(1, 2, 2, 3)
    p = Preprocessing(mean=(0.0, 0.0, 2.0), scale=1.0, bgr=True)
    batches = Batches(ArrayImages("a", pixels, 3), np.arange(1), p, batch_size=1)
    (batch,) = batches
    assert batch.x[0, :, 0, 0].tolist() == [2.0, 1.0, -2.0]
    out = tmp_path / "out.safetensors"
    words = ("--model", files.spec, "--data", files.data, "--workers", "0")
    keep = ("--statistics", "population", "--example-weight", "keep", "--labels", "none")
    assert cli("calibrate", files.net, *words, *keep, "--bgr", "-o", out).code == 0
    reversed_pixels = np.load(files.data)["images"][..., ::-1]
    np.savez(tmp_path / "reversed.npz", images=reversed_pixels)
    (tmp_path / "x").mkdir()
    other = tmp_path / "x" / "out.safetensors"
    mean, std = ("--mean", "0.406,0.456,0.485"), ("--std", "0.225,0.224,0.229")
    words = ("--model", files.spec, "--data", tmp_path / "reversed.npz", "--workers", "0")
    assert cli("calibrate", files.net, *words, *keep, *mean, *std, "-o", other).code == 0
    for name, tensor in load_file(out).items():
        torch.testing.assert_close(tensor, load_file(other)[name], msg=name)
    stored = load_ready(out, ModelRecipe(model=files.spec)).origin.preprocessing
    assert stored is not None
    assert (stored.bgr, stored.mean) == (True, (0.406, 0.456, 0.485))
    with pytest.raises(ConfigError, match="--bgr: not for a grey input"):
        Preprocessing(channels=1, bgr=True)


def test_opening_many_images_in_memory_costs_little():
    rng = np.random.default_rng(0)
    images = ArrayImages("many", rng.integers(0, 256, (100_000, 2, 2, 3), dtype=np.uint8), 3)
    images.labels = rng.integers(0, 3, len(images))
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    started = time.process_time()
    open_checked("many", net, SOURCE, Preprocessing(resize=(4,)), known=images)
    split = cut(images, (0.6, 0.2, 0.2), 0)
    data_record(images, split.fit)
    assert time.process_time() - started < 1.2
    assert len(split.fit) == 60_000


# --- what was seen ---


def test_images_are_recognized_by_their_content(files, tmp_path):
    images = open_images(str(files.data))
    digests = history_digests(images, np.arange(10))
    assert len(digests["digests"]) == 80
    everything = np.arange(len(images))
    entry = {"data": {"fit": digests, "select": history_digests(images, np.arange(5, 15))}}
    assert seen_before(images, everything, [entry]) == 15
    assert seen_before(images, np.arange(10, 20), [entry]) == 5
    assert seen_before(open_images(str(files.test)), np.arange(120), [entry]) == 0
    assert seen_before(images, everything, []) == 0
    # The first files had 12 hexadecimal digits an image.
    entry = {"data": {"fit": "".join(sorted(d.hex() for d in images.digests(range(10))))}}
    assert seen_before(images, everything, [entry]) == 10


def test_a_history_lists_no_more_images_than_it_has_room_for(files, monkeypatch):
    monkeypatch.setattr("bnfix.data.splits.MAX_LISTED", 9)
    images = open_images(str(files.data))
    kept = history_digests(images, np.arange(10))
    assert kept == {"n_examples": 10, "digests": None}
    history = [{"data": {"fit": kept, "select": history_digests(images, np.arange(9))}}]
    assert seen_before(images, np.arange(180), history) == 9
    (said,) = describe_unlisted(history)
    assert "on 10 images that its history does not list" in said


def test_a_history_without_room_is_refused_before_the_work(files, cli, tmp_path, monkeypatch):
    out = tmp_path / "first.safetensors"
    assert cli("convert", files.stale, "--model", files.spec, "-o", out).code == 0
    monkeypatch.setattr("bnfix.checkpoints.read._ROOM", TEXT_LIMIT)
    words = ("--data", "nowhere", "-o", tmp_path / "x.safetensors", "--model", files.spec)
    for command in (("calibrate", out, *words), ("convert", out, "--to", "group", *words)):
        outcome = cli(*command)
        assert outcome.code == 1
        assert "its history has" in outcome.message


@pytest.mark.parametrize(
    "entry",
    [
        {},
        {"data": 1},
        {"data": {"fit": 3, "select": None}},
        {"data": {"fit": "no digits", "select": {"n_examples": "2", "digests": 7}}},
        {"data": {"fit": {"digests": "no base64!"}, "select": {"n_examples": -1}}},
    ],
)
def test_a_history_of_another_form_is_passed_over(files, entry):
    assert seen_before(open_images(str(files.data)), np.arange(180), [entry]) == 0


def test_the_record_of_the_data_does_not_depend_on_its_place(files, tmp_path):
    copied = tmp_path / "elsewhere.npz"
    copied.write_bytes(files.data.read_bytes())
    one, two = (data_record(open_images(str(path))) for path in (files.data, copied))
    assert one["fingerprint"] == two["fingerprint"]
    assert one["spec"] != two["spec"]
    assert one["n_examples"] == 180
    assert data_record(open_images(str(files.test)))["fingerprint"] != one["fingerprint"]
