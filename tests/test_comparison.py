"""`eval`: the same numbers as plain PyTorch, the JSON to the letter, and what was seen before."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

import bnfix
from bnfix.core import __version__
from bnfix.core.errors import CheckpointError, ConfigError, DataError
from bnfix.core.settings import DataRecipe, EvaluationRecipe, RunOptions, SwapRecipe
from bnfix.data.images import FileImages
from bnfix.jobs.compare import evaluate_files
from bnfix.jobs.convert import convert
from tests.conftest import images_of, inputs_of
from tests.real import DATA, needs_data

NUMBER = (int, float)


def is_interval(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 2
        and all(isinstance(v, NUMBER) for v in value)
        and value[0] <= value[1]
    )


@pytest.fixture(scope="module")
def compared(cli, files) -> dict[str, Any]:
    words = ["--data", files.test, *files.common, "--json"]
    return cli("eval", files.stale, files.net, *words).json


# --- the JSON ---


def test_the_keys_of_the_report_are_there_and_of_their_types(compared, files):
    import hashlib

    assert compared["bnfix"] == __version__
    assert compared["command"] == "eval"
    assert compared["verdict"] in ("better", "same", "worse")
    assert compared["temperature_only"] in (True, False)
    assert set(compared["data"]) >= {"spec", "n_examples", "fingerprint"}
    assert compared["data"]["spec"] == str(files.test)
    assert compared["data"]["n_examples"] == 120
    assert len(compared["data"]["fingerprint"]) == 64
    for model, path in zip(compared["models"], (files.stale, files.net), strict=True):
        assert model["name"] == path.name
        assert model["file"] == str(path)
        assert model["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        for key in ("top1", "top5", "nll", "nll_temperature_scaled", "brier", "ece"):
            assert isinstance(model[key], NUMBER), key
        assert 0 <= model["top1"] <= 1
        assert model["top5"] == 1
        assert is_interval(model["interval"]["top1"])
        assert is_interval(model["interval"]["nll"])
        assert model["interval"]["top1"][0] <= model["top1"] <= model["interval"]["top1"][1]
        assert model["images_per_second"] > 0
    (paired,) = compared["paired"]
    assert (paired["name"], paired["against"]) == ("net.pth", "stale.pth")
    assert paired["verdict"] == compared["verdict"]
    for key in ("top1", "nll", "nll_temperature_scaled"):
        assert isinstance(paired[key]["difference"], NUMBER)
        assert is_interval(paired[key]["interval"])
        assert 0 <= paired[key]["p"] <= 1
    for layer, name in zip(compared["layers"], ("bn1", "bn2"), strict=True):
        assert layer["name"] == name
        assert layer["kind"] == "BatchNorm2d"
        assert isinstance(layer["channels"], int)
        assert layer["example_weight"] == 0
        assert layer["mean_shift"] > 0
        assert layer["log_var_ratio"] > 0
        assert "residual" in layer
    assert compared["output"] is None


def test_the_numbers_are_those_of_plain_pytorch(compared, files):
    images, labels = images_of(120, seed=3)
    with torch.no_grad():
        logits = files.trained()(inputs_of(images)).double()
    y = torch.from_numpy(labels)
    found = compared["models"][1]
    assert found["top1"] == float((logits.argmax(1) == y).double().mean())
    assert found["nll"] == pytest.approx(float(F.cross_entropy(logits, y)), rel=1e-5)
    p = logits.softmax(1)
    brier = ((p - F.one_hot(y, 3)) ** 2).sum(1).mean()
    assert found["brier"] == pytest.approx(float(brier), rel=1e-5)
    confidence, guess = p.max(1)
    ece = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = confidence[inside].mean() - (guess[inside] == y[inside]).double().mean()
            ece += float(gap.abs() * inside.double().mean())
    assert found["ece"] == pytest.approx(ece, abs=1e-6)


def test_the_pairing_is_the_difference_of_the_two(compared):
    first, second = compared["models"]
    (paired,) = compared["paired"]
    for key in ("top1", "nll"):
        assert paired[key]["difference"] == pytest.approx(second[key] - first[key], abs=1e-6)
    assert compared["verdict"] == "better"
    assert compared["verdict_sentence"].startswith("better: ")


def test_batch_size_workers_and_place_do_not_matter(cli, files, compared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", files.stale, files.net, "--data", files.test, *files.common, "--json"]
    for more in (["--batch-size", "7"], ["--device", "cpu", "--seed", "0"]):
        again = cli(*words, *more).json
        for old, new in zip(compared["models"], again["models"], strict=True):
            assert new["top1"] == old["top1"]
            assert new["nll"] == pytest.approx(old["nll"], rel=1e-5)
        assert again["verdict"] == compared["verdict"]
    assert list(tmp_path.iterdir()) == []


def test_the_seed_moves_intervals_only(cli, files, compared):
    words = ["--data", files.test, *files.common, "--json"]
    again = cli("eval", files.stale, files.net, *words, "--seed", "5").json
    assert again["models"][0]["nll"] == compared["models"][0]["nll"]
    assert again["models"][0]["interval"] != compared["models"][0]["interval"]


# --- verdicts ---


def test_one_model_has_no_verdict(cli, files):
    found = cli("eval", files.net, "--data", files.test, *files.common, "--json").json
    assert found["verdict"] is None
    assert found["paired"] == []
    assert found["temperature_only"] is False


def test_without_labels_there_is_no_verdict_and_there_are_no_metrics(cli, files):
    for words in (["--data", files.flat], ["--data", files.test, "--labels", "none"]):
        found = cli("eval", files.stale, files.net, *words, *files.common, "--json").json
        assert found["verdict"] is None
        for model in found["models"]:
            for key in ("top1", "top5", "nll", "nll_temperature_scaled", "brier", "ece"):
                assert model[key] is None
            assert model["interval"] == {"top1": None, "nll": None}
        (paired,) = found["paired"]
        assert paired["verdict"] is None
        assert "accuracy cannot be measured" in found["verdict_sentence"]


def test_the_same_model_twice_is_the_same(cli, files):
    found = cli("eval", files.net, files.net, "--data", files.test, *files.common, "--json").json
    assert found["verdict"] == "same"
    assert found["paired"][0]["nll"]["difference"] == 0
    assert found["models"][0]["name"] != found["models"][1]["name"]


def test_the_verdict_is_the_last_models_against_the_first(cli, files):
    order = [files.net, files.net, files.stale]
    found = cli("eval", *order, "--data", files.test, *files.common, "--json").json
    assert [pair["verdict"] for pair in found["paired"]] == ["same", "worse"]
    assert found["verdict"] == "worse"
    assert [pair["against"] for pair in found["paired"]] == [found["models"][0]["name"]] * 2


@pytest.mark.parametrize("value", [float("nan"), -3.0])
def test_a_network_that_gives_no_numbers_loses_to_one_that_does(cli, files, tmp_path, value):
    state = torch.load(files.net, weights_only=True)
    state["bn1.running_var"][1] = value
    torch.save(state, tmp_path / "broken.pth")
    words = ["--data", files.test, *files.common, "--report", tmp_path / "report"]
    outcome = cli("eval", tmp_path / "broken.pth", files.net, *words)
    assert outcome.code == 0
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["verdict"] == "better"
    assert found["verdict_sentence"].endswith(
        "broken.pth cannot be evaluated: its logits are not finite."
    )
    assert found["models"][0]["nll"] is None
    assert found["paired"][0]["nll"] == {"difference": None, "interval": [None, None], "p": None}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "nan" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL).lower()
    back = cli(
        "eval", files.net, tmp_path / "broken.pth", "--data", files.test, *files.common, "--json"
    )
    assert back.json["verdict"] == "worse"
    assert "broken.pth cannot be evaluated" in back.json["verdict_sentence"]


# --- the report ---


def test_a_report_is_three_files_and_an_existing_one_is_refused_before_any_work(
    cli, files, tmp_path
):
    folder = tmp_path / "deep" / "report"
    words = ["--data", files.test, *files.common, "--report", folder]
    found = cli("eval", files.stale, files.net, *words, "--json").json
    assert {p.name for p in folder.iterdir()} == {"report.json", "report.md", "report.html"}
    found.pop("output")
    assert json.loads((folder / "report.json").read_text()) == found
    before = (folder / "report.md").read_text()
    assert found["verdict_sentence"].split(":")[0] in before.lower()
    (folder / "report.json").unlink()
    outcome = cli("eval", "missing.pth", "--data", "nowhere", "--report", folder)
    assert outcome.code == 1
    assert "report.md: already exists" in outcome.message
    assert not (folder / "report.json").exists()
    assert cli("eval", files.net, *words, "--force").code == 0
    assert (folder / "report.md").read_text() != before


def test_places_where_no_report_can_be_written(cli, files, tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    (tmp_path / "file").write_text("x")
    for place in (closed, closed / "deeper" / "still", tmp_path / "file", tmp_path / "file" / "x"):
        outcome = cli("eval", "missing.pth", "--data", "nowhere", "--report", place)
        assert outcome.code == 1
        assert "missing.pth" not in outcome.message
    assert list(closed.iterdir()) == []


# --- what was seen ---


def test_images_that_a_history_has_used_are_counted_and_said(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--data", files.data, *files.common]
    assert cli("calibrate", files.stale, *words, "-o", out).code == 0
    found = cli("eval", files.stale, out, *words, "--json").json
    assert found["n_seen"] == 144  # fit and select, not test
    assert "144 of these images were used" in found["verdict_sentence"]
    found = cli("eval", out, "--data", files.test, *files.common, "--json").json
    assert found["n_seen"] == 0
    assert "were used" not in found["verdict_sentence"]
    other = tmp_path / "other.safetensors"
    words = ["--data", files.test, *files.common, "--statistics", "population"]
    assert cli("calibrate", files.stale, *words, "--example-weight", "keep", "-o", other).code == 0
    images, labels = (
        np.concatenate(parts)
        for parts in zip(images_of(180, seed=2), images_of(120, seed=3), strict=True)
    )
    np.savez(tmp_path / "both.npz", images=images, labels=labels)
    words = ["--data", tmp_path / "both.npz", *files.common, "--json"]
    assert cli("eval", out, other, *words).json["n_seen"] == 144 + 120


# --- several checkpoints ---


def test_live_layers_count_and_one_spec_serves_all(cli, files, tmp_path):
    out = tmp_path / "live.safetensors"
    convert(files.net, model=files.spec, swap=SwapRecipe(example_weight=0.2)).save(out)
    found = cli("eval", files.net, out, "--data", files.test, *files.common, "--json").json
    assert [model["n_live"] for model in found["models"]] == [0, 2]
    assert [row["example_weight"] for row in found["layers"]] == pytest.approx([0.2, 0.2])
    assert [row["kind"] for row in found["layers"]] == ["GeneralizedBatchNorm"] * 2
    with torch.no_grad():
        logits = bnfix.load(out, model=files.model())(inputs_of(images_of(120, seed=3)[0]))
    nll = F.cross_entropy(logits.double(), torch.from_numpy(images_of(120, seed=3)[1]))
    assert found["models"][1]["nll"] == pytest.approx(float(nll), rel=1e-5)


def test_preprocessing_in_a_file_is_used_and_options_go_before_it(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--data", files.data, *files.common, "--statistics", "keep"]
    assert cli("calibrate", files.net, *words, "--example-weight", "keep", "-o", out).code == 0
    plain = ["eval", out, "--model", files.spec, "--data", files.test, "--json"]
    stored, stated = cli(*plain).json, cli(*plain, "--mean", "0.5", "--std", "0.25").json
    assert stored["models"][0]["nll"] == stated["models"][0]["nll"]
    assert any("as stored" in note for note in stored["assumptions"])
    other = cli(*plain, "--std", "1").json
    assert other["models"][0]["nll"] != stored["models"][0]["nll"]


def test_classes_that_do_not_fit_are_refused(cli, files, tmp_path):
    five = files.trained().state_dict()
    five["fc.weight"], five["fc.bias"] = torch.randn(5, 12), torch.zeros(5)
    save_file(five, tmp_path / "five.safetensors")
    two = {n: t[:2].contiguous() if n.startswith("fc") else t for n, t in five.items()}
    save_file(two, tmp_path / "two.safetensors")
    words = ["--data", files.test, *files.common]
    for order in ([tmp_path / "two.safetensors"], [files.net, tmp_path / "two.safetensors"]):
        outcome = cli("eval", *order, *words)
        assert outcome.code == 1
        assert "2" in outcome.message
    assert cli("eval", files.net, tmp_path / "five.safetensors", *words).code == 0
    data = ["--data", files.folders, *files.common]
    outcome = cli("eval", tmp_path / "two.safetensors", *data)
    assert outcome.code == 1
    assert "3" in outcome.message


def test_a_class_map_says_which_folder_is_which(cli, files, tmp_path):
    (tmp_path / "map.json").write_text('{"class 0": 2, "class 1": 0, "class 2": 1}')
    words = ["eval", files.net, "--data", files.folders, *files.common, "--json"]
    right = cli(*words).json["models"][0]["top1"]
    turned = cli(*words, "--class-map", tmp_path / "map.json").json["models"][0]["top1"]
    assert right > 0.6 > 0.4 > turned
    (tmp_path / "map.json").write_text('{"class 0": 2}')
    outcome = cli(*words, "--class-map", tmp_path / "map.json")
    assert outcome.code == 1
    assert "class 1" in outcome.message


# --- from Python ---


def test_in_process(files):
    source = DataRecipe(mean=(0.5,), std=(0.25,))
    report = evaluate_files([files.net], data=str(files.test), model=files.spec, source=source)
    assert report.models[0].metrics.n_examples == 120
    assert report.verdict is None
    with pytest.raises(ConfigError, match="no checkpoint given"):
        evaluate_files([], data=str(files.test))
    with pytest.raises(ConfigError, match="--seed: -3"):
        evaluate_files([files.net], data=str(files.test), model=files.spec, seed=-3)
    with pytest.raises(CheckpointError, match="no such file"):
        evaluate_files(["missing.pth"], data=str(files.test), model=files.spec)
    with pytest.raises(DataError, match="no such file or folder"):
        evaluate_files([files.net], data="nowhere", model=files.spec)


@needs_data
def test_a_published_checkpoint_gives_the_published_numbers(cli, tmp_path):
    """The figures of the data's own README, for the first 500 images and all."""
    images, labels = (np.load(DATA / "cifar10" / "test.npz")[k][:500] for k in ("images", "labels"))
    np.savez(tmp_path / "part.npz", images=images, labels=labels)
    words = [
        "--model",
        f"{Path(__file__).parent}/nets.py:resnet20",
        "--data",
        tmp_path / "part.npz",
    ]
    preset = ["--mean", "0.485,0.456,0.406", "--std", "0.229,0.224,0.225", "--json"]
    found = cli("eval", DATA / "cifar10" / "resnet20.th", *words, *preset).json
    from tests.nets import resnet20

    file = torch.load(DATA / "cifar10" / "resnet20.th", map_location="cpu")["state_dict"]
    model = resnet20().eval()
    model.load_state_dict({n.removeprefix("module."): t for n, t in file.items()}, strict=False)
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    mean, std = (
        torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    with torch.no_grad():
        logits = model((x - mean) / std)
    assert found["models"][0]["top1"] == pytest.approx(
        float((logits.argmax(1).numpy() == labels).mean()), abs=1e-9
    )
    nll = F.cross_entropy(logits.double(), torch.from_numpy(labels))
    assert found["models"][0]["nll"] == pytest.approx(float(nll), rel=1e-4)


# --- several at once ---


class Reads:
    """Counts how often files of a folder are opened, while it is watched."""

    def __init__(self) -> None:
        self.folder = ""
        self.counts: dict[str, int] = {}
        sys.addaudithook(self._heard)  # for ever: Python has no way to take a hook away

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open" and self.folder:
            path = str(arguments[0])
            if path.startswith(self.folder) and path.endswith((".png", ".npz", ".csv")):
                self.counts[path] = self.counts.get(path, 0) + 1

    def of(self, folder: Path, work: Callable[[], Any]) -> dict[str, int]:
        """Openings by file while the work is done."""
        self.counts, self.folder = {}, str(folder)
        try:
            work()
        finally:
            self.folder = ""
        return self.counts


@pytest.fixture(scope="module")
def reads() -> Reads:
    return Reads()


@pytest.fixture(scope="module")
def four(files, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("four")
    state = torch.load(files.net, weights_only=True)
    paths = [files.stale, files.net]
    for k in (1, 2):
        changed = {n: t * (1 + 0.02 * k) if n == "fc.weight" else t for n, t in state.items()}
        paths.append(folder / f"net{k}.pth")
        torch.save(changed, paths[-1])
    return paths


@pytest.mark.parametrize("kind", ["folders", "table", "flat", "test"])
def test_four_checkpoints_read_the_data_as_often_as_one_does(files, four, reads, kind):
    data = getattr(files, kind)
    options = {
        "data": str(data), "model": files.spec, "source": DataRecipe(mean=(0.5,), std=(0.25,)),
        "run": RunOptions(workers=0, batch_size=16),
    }  # fmt: skip
    one = reads.of(data, lambda: evaluate_files(four[:1], **options))
    all_four = reads.of(data, lambda: evaluate_files(four, **options))
    assert one == all_four
    n_files = {"folders": 60, "table": 61, "flat": 60, "test": 1}[kind]
    assert len(one) == n_files
    # Once to decode, once to hash its bytes; an archive once for its zip, once for its arrays.
    assert max(one.values()) <= 2


def test_every_image_is_decoded_once_for_four_checkpoints_and_all_else(files, four, monkeypatch):
    decoded: list[int] = []
    read = FileImages.read

    def counted(self: FileImages, i: int) -> np.ndarray:
        decoded.append(i)
        return read(self, i)

    monkeypatch.setattr(FileImages, "read", counted)
    evaluate_files(
        four,
        data=str(files.folders),
        model=files.spec,
        run=RunOptions(workers=0),
        also=EvaluationRecipe(corruptions=True, compare_batch_sizes=True),
    )
    assert sorted(decoded) == list(range(60))


def test_together_each_gets_the_numbers_that_it_gets_alone(files, four):
    options = {"data": str(files.test), "model": files.spec, "run": RunOptions(workers=0)}
    together = evaluate_files(four, **options)
    for path, found in zip(four, together.models, strict=True):
        (alone,) = evaluate_files([path], **options).models
        assert found.metrics.nll == alone.metrics.nll
        assert found.metrics.interval == alone.metrics.interval
        assert found.sha256 == alone.sha256


def test_checkpoints_of_several_preprocessings_are_each_given_their_own(cli, files, tmp_path):
    out = tmp_path / "stored.safetensors"
    words = ["--data", files.data, "--model", files.spec, "--workers", "0"]
    stated = ["--statistics", "population", "--example-weight", "keep", "--quiet"]
    own = ["--mean", "0.3", "--std", "0.5"]
    assert cli("calibrate", files.net, *words, *stated, *own, "-o", out).code == 0
    run = RunOptions(workers=0)
    options = {"data": str(files.test), "model": files.spec, "run": run}
    other = DataRecipe(mean=(0.3,), std=(0.5,))
    together = evaluate_files([files.net, out, files.stale], **options)
    (alone,) = evaluate_files([out], **options, source=other).models
    assert together.models[1].metrics.nll == alone.metrics.nll
    (plain,) = evaluate_files([files.stale], **options).models
    assert together.models[2].metrics.nll == plain.metrics.nll


def test_several_checkpoints_are_ranked_by_nll_then_top1(cli, files, four, tmp_path):
    words = ["--data", files.test, *files.common]
    found = cli("eval", *four, *words, "--json", "--report", tmp_path).json
    ranks = found["ranking"]
    assert [row["rank"] for row in ranks] == [1, 2, 3, 4]
    by_name = {model["name"]: model for model in found["models"]}
    assert [row["nll"] for row in ranks] == sorted(model["nll"] for model in found["models"])
    pairs = {pair["name"]: pair for pair in found["paired"]}
    for row in ranks:
        assert row["nll"] == by_name[row["name"]]["nll"]
        assert row["top1"] == by_name[row["name"]]["top1"]
        if row["name"] == "stale.pth":
            assert row["paired"] is None
        else:
            assert row["paired"]["nll"] == pairs[row["name"]]["nll"]
            assert row["paired"]["verdict"] == pairs[row["name"]]["verdict"]
    assert ranks[-1]["name"] == "stale.pth"
    page, text = ((tmp_path / f"report.{kind}").read_text() for kind in ("html", "md"))
    assert ">Ranking<" in page
    assert "## Ranking" in text
    rows = [line for line in text.splitlines() if re.match(r"\| [1-4] \|", line)]
    assert [line.split(" | ")[1].replace("\\", "") for line in rows] == [r["name"] for r in ranks]
    shown = cli("eval", *four, *words).out
    assert [shown.index(f"{r['rank']}. {r['name']}") for r in ranks] == sorted(
        shown.index(f"{r['rank']}. {r['name']}") for r in ranks
    )


def test_equal_models_share_a_rank_and_one_model_has_none(cli, files):
    words = ["--data", files.test, *files.common, "--json"]
    found = cli("eval", files.stale, files.net, files.net, *words).json
    assert [row["rank"] for row in found["ranking"]] == [1, 1, 3]
    assert cli("eval", files.net, *words).json["ranking"] == []
    words = ["--data", files.flat, *files.common, "--json"]
    assert cli("eval", files.stale, files.net, *words).json["ranking"] == []


def test_the_classes_are_listed_for_one_model_and_for_several(cli, files, tmp_path):
    words = ["--data", files.folders, *files.common, "--quiet"]
    for n, checkpoints in enumerate(([files.net], [files.stale, files.net, files.net]), 1):
        folder = tmp_path / str(n)
        assert cli("eval", *checkpoints, *words, "--report", folder).code == 0
        page, text = ((folder / f"report.{kind}").read_text() for kind in ("html", "md"))
        per_class = json.loads((folder / "report.json").read_text())["per_class"]
        assert "Class by class" in page
        for row in per_class:
            assert len(row["top1"]) == len(checkpoints)
            shown = " | ".join(f"{100 * value:.1f}%" for value in row["top1"])
            assert f"| {row['name']} | 20 | {shown} |" in text


# --- faster copies ---


def test_fast_copies_give_the_same_numbers_and_say_what_they_are(cli, files, compared):
    words = ["--data", files.test, *files.common, "--json", "--fast"]
    found = cli("eval", files.stale, files.net, *words).json
    for mine, theirs in zip(found["models"], compared["models"], strict=True):
        assert mine["top1"] == theirs["top1"]
        assert mine["nll"] == pytest.approx(theirs["nll"], abs=1e-5)
        assert mine["n_live"] == theirs["n_live"]
    notes = [note for note in found["assumptions"] if "evaluated on an optimized copy" in note]
    assert len(notes) == 2
    assert all("norm layers folded" in note for note in notes)
    assert all("outputs differ by at most" in note for note in notes)
    assert found["options"]["fast"] is True
    assert "fast" not in compared["options"]


def test_a_model_that_gets_no_faster_copy_is_evaluated_as_it_is(files, tmp_path):
    source = tmp_path / "odd.py"
    source.write_text(
        "import torch\n"
        "class Odd(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.norm, self.head = torch.nn.BatchNorm2d(3), torch.nn.LazyLinear(10)\n"
        "        self.calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        "        return self.head(self.norm(x).flatten(1)) + self.calls\n"
        "def build():\n"
        "    net = Odd()\n"
        "    net(torch.zeros(2, 3, 8, 8))\n"
        "    return net\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        torch.manual_seed(0)
        net = __import__("odd").build()
    finally:
        sys.path.remove(str(tmp_path))
    save_file(net.state_dict(), tmp_path / "odd.safetensors")
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (40, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "odd.npz", images=pixels, labels=np.arange(40) % 10)
    report = evaluate_files(
        [tmp_path / "odd.safetensors"],
        data=str(tmp_path / "odd.npz"),
        model=f"{source}:build",
        also=EvaluationRecipe(fast=True),
    )
    assert any("evaluated without --fast: fused network: its outputs differ" in n
               for n in report.assumptions)  # fmt: skip
    assert report.models[0].metrics.n_examples == 40


TWO_OUTPUTS = """
import torch

class Two(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.net = one()

    def forward(self, x):
        return x.flatten(1), self.net(x)
"""


def test_of_several_outputs_the_one_with_a_column_a_class_is_taken_and_said(cli, files, tmp_path):
    spec, _, name = files.spec.rpartition(":")
    source = Path(spec).read_text() + TWO_OUTPUTS
    (tmp_path / "two.py").write_text(source.replace("one()", f"{name}()"))
    state = torch.load(files.net, weights_only=True)
    torch.save({f"net.{key}": value for key, value in state.items()}, tmp_path / "two.pth")
    rest = files.common[2:] if files.common[0] == "--model" else files.common
    words = ["--data", files.test, "--model", f"{tmp_path / 'two.py'}:Two", *rest, "--json"]
    plain = cli("eval", files.net, "--data", files.test, *files.common, "--json").json
    found = cli("eval", tmp_path / "two.pth", *words)
    assert found.code == 0, found.message
    assert found.json["models"][0]["nll"] == pytest.approx(plain["models"][0]["nll"], rel=1e-6)
    assert "1 is taken as the logits: only it has 3 columns" in str(found.json["assumptions"])
    refused = cli("eval", tmp_path / "two.pth", *words, "--output", "2")
    assert refused.code == 1
    assert "--output 2: the model has no such output" in refused.err
