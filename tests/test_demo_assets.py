"""The embedded digits and network: whole, small, without pickles, and made as they say."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from benchmarks import train_demo as train
from bnfix import demo
from bnfix.core.errors import ConfigError
from bnfix.demo.network import digits_net

SIZES = {"train": 797, "calibration": 500, "test": 500}
FOLDER = files("bnfix.demo")


def trained() -> torch.nn.Module:
    net = digits_net()
    with demo.checkpoint_path() as path:
        net.load_state_dict(load_file(path), strict=True)
    return net.eval()


def top1(net: torch.nn.Module, part: str) -> float:
    images, labels = demo.digits(part)
    inputs = torch.from_numpy(images).unsqueeze(1) * demo.PREPROCESSING.scale
    inputs = (inputs - demo.PREPROCESSING.mean[0]) / demo.PREPROCESSING.std[0]
    with torch.inference_mode():
        guesses = net(inputs).argmax(1)
    return float((guesses == torch.from_numpy(labels)).float().mean())


@pytest.mark.parametrize("part", SIZES)
def test_digits_are_well_formed(part: str) -> None:
    images, labels = demo.digits(part)
    assert images.shape == (SIZES[part], 8, 8)
    assert images.dtype == np.uint8
    assert images.max() == 255
    assert labels.shape == (SIZES[part],)
    assert labels.dtype == np.int64
    assert set(labels) == set(range(10))


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_held_out_parts_hold_fifty_of_each_class(part: str) -> None:
    _, labels = demo.digits(part)
    assert np.bincount(labels).tolist() == [50] * 10


def test_no_image_is_in_two_parts() -> None:
    seen = [{image.tobytes() for image in demo.digits(part)[0]} for part in SIZES]
    assert sum(len(part) for part in seen) == len(set().union(*seen))


def test_pixels_are_the_seventeen_grey_levels_of_the_source() -> None:
    levels = {round(level * 255 / 16) for level in range(17)}
    for part in SIZES:
        assert set(np.unique(demo.digits(part)[0])) <= levels


def test_a_part_that_is_not_there_is_refused_with_the_parts() -> None:
    with pytest.raises(ConfigError, match=r"'valid' is not known.*train, calibration, test"):
        demo.digits("valid")


def test_preprocessing_is_that_of_the_training_part() -> None:
    images, _ = demo.digits("train")
    assert demo.PREPROCESSING.channels == 1
    assert demo.PREPROCESSING.mean[0] == pytest.approx(images.mean() / 255, abs=5e-5)
    assert demo.PREPROCESSING.std[0] == pytest.approx(images.std() / 255, abs=5e-5)


def test_the_checkpoint_is_a_stock_one() -> None:
    with demo.checkpoint_path() as path, safe_open(path, "pt") as file:
        assert file.metadata() is None
        assert set(file.keys()) == set(digits_net().state_dict())
        assert all(file.get_tensor(key).isfinite().all() for key in file.keys())


def test_the_network_is_trained_but_not_perfect() -> None:
    net = trained()
    assert 0.80 < top1(net, "calibration") < 0.96
    assert 0.80 < top1(net, "test") < 0.96
    assert top1(net, "train") > 0.80


@pytest.mark.parametrize("part", ["calibration", "test"])
def test_the_stated_count_is_the_networks(part: str) -> None:
    text = " ".join(FOLDER.joinpath("LICENSE-DATA.md").read_text(encoding="utf-8").split())
    stated = re.search(rf"(\d+) of the 500 {part} images", text)
    assert stated is not None
    # One image may flip with another build of torch.
    assert abs(500 * top1(trained(), part) - int(stated[1])) < 1.5


def test_the_spec_names_the_builder() -> None:
    module, _, name = demo.SPEC.partition(":")
    assert getattr(sys.modules[module], name) is digits_net
    assert digits_net(3)(torch.zeros(2, 1, 8, 8)).shape == (2, 3)


def test_the_assets_are_small_and_hold_no_pickle() -> None:
    assets = ["digits.npz", "digits_net.safetensors"]
    assert sum(len(FOLDER.joinpath(name).read_bytes()) for name in assets) < 600_000
    packed = FOLDER.joinpath("digits.npz").read_bytes()
    with zipfile.ZipFile(io.BytesIO(packed)) as archive:
        assert sorted(archive.namelist()) == ["images.npy", "labels.npy", "split.npy"]
    with np.load(io.BytesIO(packed), allow_pickle=False) as arrays:
        assert all(arrays[name].dtype.kind in "iu" for name in arrays.files)


def test_the_source_and_licence_of_the_digits_stand_beside_them() -> None:
    text = FOLDER.joinpath("LICENSE-DATA.md").read_text(encoding="utf-8")
    assert all(word in text for word in ("Alpaydin", "Kaynak", "CC BY 4.0", "797"))


def test_write_files_gives_what_a_user_needs_by_hand(tmp_path: Path) -> None:
    written = demo.write_files(tmp_path / "new" / "folder")
    assert written.checkpoint.name == "digits_net.safetensors"
    assert written.checkpoint.read_bytes() == FOLDER.joinpath("digits_net.safetensors").read_bytes()
    for part, path in (("calibration", written.calibration), ("test", written.test)):
        assert path == tmp_path / "new" / "folder" / f"digits-{part}.npz"
        with np.load(path, allow_pickle=False) as arrays:
            images, labels = demo.digits(part)
            assert np.array_equal(arrays["images"], images)
            assert np.array_equal(arrays["labels"], labels)


def test_write_files_replaces_its_own_files(tmp_path: Path) -> None:
    (tmp_path / "digits-test.npz").write_bytes(b"old")
    written = demo.write_files(tmp_path)
    with np.load(written.test, allow_pickle=False) as arrays:
        assert len(arrays["labels"]) == 500


def test_training_is_repeatable_and_leaves_the_random_state() -> None:
    before = torch.get_rng_state()
    first = train.train(steps=3).state_dict()
    second = train.train(steps=3).state_dict()
    other = train.train(steps=3, seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["conv1.weight"], other["conv1.weight"])


def test_training_does_the_steps_it_is_given() -> None:
    assert int(train.train(steps=3).state_dict()["bn1.num_batches_tracked"]) == 3
    assert int(train.train(epochs=1).state_dict()["bn1.num_batches_tracked"]) == 150 // 4


def test_training_learns() -> None:
    assert top1(train.train(epochs=6), "test") > 0.5


def test_the_script_writes_a_checkpoint_that_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "net.safetensors"
    with caplog.at_level(logging.INFO, logger="benchmarks.train_demo"):
        train.main([str(out), "--steps", "2"])
    digits_net().load_state_dict(load_file(out), strict=True)
    assert "written after" in caplog.text


def test_the_script_refuses_to_do_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        train.main([])
    assert "nothing to write" in capsys.readouterr().err


def test_the_script_has_help() -> None:
    # Its text holds "99%", which a careless argparse would take for a format.
    root = Path(demo.__file__).parents[2]
    shown = subprocess.run(
        [sys.executable, "-m", "benchmarks.train_demo", "--help"],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert "batch of 4" in shown.stdout
    assert "--steps" in shown.stdout


@pytest.mark.parametrize(
    "script", sorted(Path(train.__file__).parent.glob("*.py")), ids=lambda path: path.stem
)
def test_scripts_run_by_their_path_find_what_they_import(script: Path) -> None:
    """Python puts the folder of a script first, where it may hide modules; the root is missing."""
    text = script.read_text(encoding="utf-8")
    assert script.stem not in sys.stdlib_module_names
    inside = [
        line.start() for line in re.finditer(r"^from (tests|benchmarks)\b", text, re.MULTILINE)
    ]
    if f"python benchmarks/{script.name}" in text and inside:
        assert 0 < text.find("sys.path[0] = str(") < inside[0]


def test_the_digits_can_be_derived_anew(tmp_path: Path) -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn (the extra demo-data)")
    train.derive_digits(tmp_path / "digits.npz")
    packed = FOLDER.joinpath("digits.npz").read_bytes()
    with (
        np.load(tmp_path / "digits.npz", allow_pickle=False) as fresh,
        np.load(io.BytesIO(packed), allow_pickle=False) as embedded,
    ):
        for name in ("images", "labels", "split"):
            assert np.array_equal(fresh[name], embedded[name])
