"""Corruptions: what each does, that it depends on nothing else, and where it is applied."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.ndimage import gaussian_filter

from bnfix.core.errors import ConfigError
from bnfix.core.options import CORRUPTIONS, SEVERITIES
from bnfix.core.settings import DataRecipe, Preprocessing
from bnfix.data.batches import Batches
from bnfix.data.corruptions import STRENGTHS, Corruption, corruption_of, every_corruption
from bnfix.data.open import open_images
from tests.conftest import images_of

EVERY = every_corruption(seed=3)


def picture(channels: int = 3, size: tuple[int, int] = (24, 20), seed: int = 0) -> np.ndarray:
    """Smooth shapes with some texture, uint8."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[0], : size[1]]
    waves = [90 + 40 * np.sin(x / (2 + k)) + 30 * np.cos(y / 3) for k in range(channels)]
    return (np.stack(waves, 2) + rng.normal(0, 8, (*size, channels))).clip(0, 255).astype(np.uint8)


# --- one image ---


@pytest.mark.parametrize("corruption", EVERY, ids=lambda c: c.text)
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(24, 20), (1, 1), (2, 7)])
def test_form_and_type_stay_and_the_image_given_is_left_alone(corruption, channels, size):
    pixels = picture(channels, size)
    before = pixels.copy()
    found = corruption.apply(pixels, 5)
    assert found.dtype == np.uint8
    assert found.shape == pixels.shape
    assert (pixels == before).all()
    assert (corruption.apply(pixels, 5) == found).all()


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_higher_severity_is_farther_from_the_image(kind):
    pixels = picture().astype(float)
    distances = [
        np.abs(Corruption(kind, s).apply(picture(), 0) - pixels).mean() for s in SEVERITIES
    ]
    assert 0 < distances[0] < distances[1] < distances[2]


def test_noise_depends_on_position_seed_and_severity_and_nothing_else_does():
    pixels = picture()
    for kind in CORRUPTIONS:
        found = Corruption(kind, 2, 0).apply(pixels, 0)
        for other, position in ((Corruption(kind, 2, 0), 1), (Corruption(kind, 2, 1), 0)):
            assert (other.apply(pixels, position) == found).all() == (kind != "noise")
    grey = np.full((40, 40, 3), 128, np.uint8)
    mild, strong = (Corruption("noise", s).apply(grey, 0) - 128.0 for s in (1, 3))
    # Not the same draw made louder.
    assert abs(np.corrcoef(mild.ravel(), strong.ravel())[0, 1]) < 4 / 4800**0.5


def test_noise_has_the_deviation_that_is_stated():
    """4 standard errors of a deviation from 30,000 draws: 4 / sqrt(60,000) of it."""
    grey = np.full((100, 100, 3), 128, np.uint8)
    for severity in SEVERITIES:
        difference = Corruption("noise", severity, 1).apply(grey, 9) - 128.0
        expected = (255 * STRENGTHS["noise"][severity - 1]) ** 2 + 1 / 12  # and rounding
        assert difference.std() == pytest.approx(expected**0.5, rel=4 / 60_000**0.5)
        assert abs(difference.mean()) < 4 * difference.std() / 30_000**0.5


def test_each_kind_does_what_its_name_says():
    pixels = picture().astype(float)
    found = {kind: Corruption(kind, 2).apply(picture(), 0).astype(float) for kind in CORRUPTIONS}
    sigma = 0.12 * 20**0.5
    gaussian = gaussian_filter(pixels, (sigma, sigma, 0), mode="nearest")
    # Pillow's is three box filters in a row: much faster, and for small deviations only near.
    assert np.abs(found["blur"] - gaussian).mean() < 0.3 * np.abs(gaussian - pixels).mean()
    assert found["brightness"] == pytest.approx((1.6 * pixels).clip(0, 255), abs=1)
    assert found["contrast"].std() == pytest.approx(0.5 * pixels.std(), rel=0.05)
    assert found["contrast"].mean() == pytest.approx(pixels.mean(), abs=2)
    columns = {tuple(column) for column in found["pixelate"].swapaxes(0, 1).reshape(20, -1)}
    assert len(columns) == 13  # 0.65 of 20
    assert np.abs(found["jpeg"] - pixels).max() < 100
    assert not (found["jpeg"] == pixels).all()


@pytest.mark.parametrize(
    "text", ["fog:1", "blur", "blur:", "blur:4", "blur:0", "blur:2.0", ":1", "", "blur:1:1"]
)
def test_an_unknown_corruption_is_refused_with_those_there_are(text):
    for make in (lambda: corruption_of(text), lambda: DataRecipe(corrupt=text)):
        with pytest.raises(ConfigError, match="such as blur:2; kinds: noise, blur, jpeg") as caught:
            make()
        assert repr(text) in str(caught.value)


def test_none_is_none_and_the_text_is_read_back():
    assert corruption_of(None) is None
    for one in EVERY:
        assert corruption_of(one.text, 3) == one
    assert len({one.text for one in EVERY}) == 18


# --- in batches ---


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "a.npz"
    images, labels = images_of(30, seed=5)
    np.savez(path, images=images, labels=labels)
    return str(path)


def pixels_of(batches: Batches) -> dict[int, np.ndarray]:
    return {int(i): x.numpy() for batch in batches for i, x in zip(batch.index, batch.x)}  # noqa: B905


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_batches_order_and_processes_do_not_matter(kind, files):
    images = open_images(str(files.folders))
    everything = np.arange(len(images))
    corruption = Corruption(kind, 2, 7)

    def run(index=everything, seed=None, **options):
        fresh = open_images(str(files.folders))
        batches = Batches(fresh, index, Preprocessing(), corruption=corruption, **options)
        return pixels_of(batches if seed is None else batches.with_seed(seed))

    expected = run(batch_size=60, workers=0)
    clean = pixels_of(Batches(images, everything, Preprocessing(), batch_size=60, workers=0))
    assert any((clean[i] != expected[i]).any() for i in clean)
    others = [
        run(batch_size=7, workers=0),
        run(batch_size=1, workers=0, seed=1),
        run(batch_size=16, workers=2),
        run(everything[::-1][:20], batch_size=8, workers=0),
    ]
    for found in others:
        for i, x in found.items():
            assert (x == expected[i]).all()


def test_it_comes_after_resize_and_crop_and_before_the_rest(archive):
    images = open_images(archive)
    index = np.arange(12)
    shape = {"resize": (12,), "crop": (10, 10)}
    whole = Preprocessing(**shape, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4))
    plain = Preprocessing(**shape, scale=1.0)
    for text in ("noise:3", "pixelate:3", "jpeg:2"):
        corruption = corruption_of(text, 1)
        found = pixels_of(Batches(images, index, whole, batch_size=5, corruption=corruption))
        for i, x in pixels_of(Batches(images, index, plain, batch_size=5)).items():
            spoilt = corruption.apply(x.transpose(1, 2, 0).astype(np.uint8), i) / 255
            by_hand = (spoilt - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
            np.testing.assert_allclose(found[i], by_hand.transpose(2, 0, 1), atol=1e-5)


def test_what_is_kept_in_memory_is_the_image_without_it(files):
    images = open_images(str(files.folders))
    index = np.arange(10)
    clean = pixels_of(Batches(images, index, Preprocessing(), batch_size=5, workers=0))
    spoilt = Batches(
        images, index, Preprocessing(), batch_size=5, workers=0, corruption=Corruption("blur", 3)
    )
    first, second = pixels_of(spoilt), pixels_of(spoilt)
    after = pixels_of(Batches(images, index, Preprocessing(), batch_size=5, workers=0))
    for i in range(10):
        assert (first[i] == second[i]).all()
        assert (after[i] == clean[i]).all()
        assert (first[i] != clean[i]).any()


# --- commands ---


def by_hand(path, text, out, seed=0):
    """The archive with every image spoilt, one by one."""
    with np.load(path) as data:
        images, labels = data["images"], data["labels"]
    corruption = corruption_of(text, seed)
    spoilt = np.stack([corruption.apply(image, i) for i, image in enumerate(images)])
    np.savez(out, images=spoilt, labels=labels)
    return out


def test_eval_on_corrupted_images_is_eval_of_a_corrupted_archive(cli, files, tmp_path):
    words = [*files.common, "--json", "--seed", "4"]
    found = cli("eval", files.net, "--data", files.test, "--corrupt", "noise:2", *words).json
    archive = by_hand(files.test, "noise:2", tmp_path / "spoilt.npz", seed=4)
    expected = cli("eval", files.net, "--data", archive, *words).json
    for key in ("top1", "nll", "nll_temperature_scaled", "interval"):
        assert found["models"][0][key] == expected["models"][0][key]
    assert found["data"]["corruption"] == "noise:2"
    assert expected["data"]["corruption"] is None
    assert "120 images under noise:2 right" in found["verdict_sentence"]
    # The same images as far as the history is concerned.
    clean = cli("eval", files.net, "--data", files.test, *words).json
    assert found["data"]["fingerprint"] == clean["data"]["fingerprint"]


def test_calibrate_on_corrupted_images_uses_them_says_so_and_stores_it(cli, files, tmp_path):
    stated = ["--statistics", "population", "--example-weight", "keep", *files.common, "--quiet"]
    paths = [tmp_path / f"{name}.safetensors" for name in ("clean", "option", "archive")]
    spoilt = by_hand(files.data, "contrast:3", tmp_path / "spoilt.npz")
    sources = [files.data, files.data, spoilt]
    for path, source, more in zip(
        paths, sources, ([], ["--corrupt", "contrast:3"], []), strict=True
    ):
        done = cli("calibrate", files.net, "--data", source, *stated, *more, "-o", path)
        assert done.code == 0, done.err
    tensors = []
    for path in paths:
        with safe_open(path, "pt") as file:
            tensors.append(file.get_tensor("bn1.running_var"))
            header = json.loads(file.metadata()["bnfix"])
        entry = header["history"][-1]["options"]["data"]["corrupt"]
        assert entry == ("contrast:3" if path.stem == "option" else None)
    clean, option, archive = tensors
    assert (option < 0.5 * clean).all()
    np.testing.assert_allclose(option, archive, rtol=1e-5)
    report = json.loads((tmp_path / "option.safetensors.report.json").read_text())
    assert report["data"]["corruption"] == "contrast:3"
    (note,) = [text for text in report["assumptions"] if "every image was corrupted" in text]
    assert ("also in the test" in note) == bool(report["models"])
    assert "contrast:3" in (tmp_path / "option.safetensors.report.html").read_text()


def test_eval_measures_every_corruption_as_an_archive_of_it_would(cli, files, tmp_path):
    words = [*files.common, "--json"]
    both = [files.stale, files.net]
    found = cli("eval", *both, "--data", files.test, "--corruptions", *words).json
    rows = found["corruptions"]
    assert [(r["kind"], r["severity"], r["model"]) for r in rows] == [
        (kind, severity, name)
        for kind in CORRUPTIONS
        for severity in SEVERITIES
        for name in ("stale.pth", "net.pth")
    ]
    for text in ("noise:1", "blur:3"):
        kind, severity = text.split(":")
        archive = by_hand(files.test, text, tmp_path / f"{kind}.npz")
        expected = cli("eval", *both, "--data", archive, *words).json
        first, last = (r for r in rows if r["kind"] == kind and r["severity"] == int(severity))
        for row, model in zip((first, last), expected["models"], strict=True):
            for key in ("top1", "nll", "nll_temperature_scaled"):
                assert row[key] == pytest.approx(model[key], rel=1e-6)
                assert row["interval"][key] == pytest.approx(model["interval"][key], rel=1e-6)
            assert row["n_examples"] == 120
        assert first["paired"] is None
        assert last["paired"]["against"] == "stale.pth"
        for key in ("top1", "nll", "nll_temperature_scaled"):
            for part in ("difference", "interval", "p"):
                assert last["paired"][key][part] == pytest.approx(
                    expected["paired"][0][key][part], rel=1e-6
                )
    # The clean numbers are those without the option.
    clean = cli("eval", *both, "--data", files.test, *words).json
    assert found["models"][0]["nll"] == clean["models"][0]["nll"]
    assert clean["corruptions"] == []


def test_a_model_that_overflows_under_corruptions_is_reported_and_the_other_measured(
    cli, files, tmp_path
):
    state = torch.load(files.net, weights_only=True)
    name = next(key for key in state if key.endswith("running_var"))
    state[name] = torch.full_like(state[name], float("nan"))
    torch.save(state, tmp_path / "broken.pth")
    for first, last in ((files.net, tmp_path / "broken.pth"), (tmp_path / "broken.pth", files.net)):
        words = ["--data", files.test, *files.common, "--corruptions", "--report", tmp_path / "out"]
        found = cli("eval", first, last, *words, "--json", "--force").json
        broken = [row for row in found["corruptions"] if row["model"] == "broken.pth"]
        whole = [row for row in found["corruptions"] if row["model"] == "net.pth"]
        assert len(broken) == len(whole) == 18
        assert all(row["top1"] is None and row["interval"] == {} for row in broken)
        assert all(row["top1"] > 0 for row in whole)
        paired = whole if last == files.net else broken
        assert {row["paired"]["verdict"] for row in paired} == {
            "better" if last == files.net else "worse"
        }
        assert "not evaluable" in (tmp_path / "out" / "report.md").read_text()
        assert "not evaluable" in (tmp_path / "out" / "report.html").read_text()
        shown = cli("eval", first, last, *words, "--force")
        assert shown.code == 0, shown.message


def test_corruptions_need_labels_and_stand_alone(cli, files):
    words = [*files.common, "--corruptions"]
    assert "have no labels" in cli("eval", files.net, "--data", files.flat, *words).message
    said = cli("eval", files.net, "--data", files.test, *words, "--corrupt", "blur:1").message
    assert "cannot be combined with --corrupt" in said
    said = cli("eval", files.net, "--data", files.test, *files.common, "--corrupt", "fog:1").message
    assert "'fog:1' is not known" in said
    plan = cli("eval", files.net, "--data", files.test, *words, "--plan", "--json").json
    assert plan["passes"] == 19
