"""Several statistics in one file: what stock code, Python and commands get of it."""

import base64
import json
import re

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import bnfix
from bnfix.core.errors import CheckpointError
from bnfix.recalibrate.recalibrate import recalibrate_
from tests.conftest import images_of, inputs_of

DOMAINS = {"night": (0.4, 0), "fog": (0.3, 150)}
NO_WEIGHT = ("--statistics", "population", "--labels", "none")


def shifted(name):
    """The images of a domain: darker, or pale."""
    factor, more = DOMAINS[name]
    images, labels = images_of(180, seed=2)
    return (images * factor + more).clip(0, 255).astype(np.uint8), labels


@pytest.fixture(scope="module")
def several(files, cli, tmp_path_factory):
    """A file with the statistics of three domains: its own, night and fog."""
    folder = tmp_path_factory.mktemp("domains")
    before = files.net
    for name in DOMAINS:
        images, labels = shifted(name)
        np.savez(folder / f"{name}.npz", images=images, labels=labels)
        out = folder / f"{name}.safetensors"
        words = ("calibrate", before, "--data", folder / f"{name}.npz", *files.common, *NO_WEIGHT)
        done = cli(*words, "--feed", "sequential", "--domain", name, "-o", out)
        assert done.code == 0, done.err
        assert f"domain {name}" in done.err
        before = out
    return before


def measured(files, name):
    """The network of the files with the population of a domain."""
    model = files.trained()
    recalibrate_(model, [inputs_of(shifted(name)[0])], feed="sequential")
    return model


def close(one, other):
    one, other = one.state_dict(), other.state_dict()
    for name in other:
        if "example_weight" not in name and "tracked" not in name:
            torch.testing.assert_close(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_three_domains_in_one_file_that_stock_code_loads(files, several):
    stock = files.model()
    stock.load_state_dict(load_file(several), strict=True)
    for name, value in files.trained().state_dict().items():
        assert torch.equal(stock.state_dict()[name], value), name
    close(bnfix.load(several, model=files.model()), files.trained())
    for name in DOMAINS:
        close(bnfix.load(several, model=files.model(), domain=name), measured(files, name))


def test_a_domain_may_be_measured_again_and_the_others_stay(files, cli, several, tmp_path):
    out = tmp_path / "again.safetensors"
    words = ("calibrate", several, "--data", files.data, *files.common, *NO_WEIGHT)
    done = cli(*words, "--feed", "sequential", "--domain", "fog", "-o", out)
    assert done.code == 0, done.err
    assert "starts from its statistics in the file" in done.err
    again = files.trained()
    with np.load(files.data) as arrays:
        recalibrate_(again, [inputs_of(arrays["images"])], feed="sequential")
    close(bnfix.load(out, model=files.model(), domain="fog"), again)
    close(bnfix.load(out, model=files.model(), domain="night"), measured(files, "night"))


@pytest.mark.parametrize("name", [*DOMAINS, "own"])
def test_eval_takes_the_domain_by_name_or_the_nearest(files, cli, several, name):
    data = files.data if name == "own" else several.parent / f"{name}.npz"
    chosen = "auto" if name == "own" else name
    found = {}
    for word in {chosen, "auto"}:
        done = cli("eval", several, "--data", data, *files.common, "--domain", word, "--json")
        assert done.code == 0, done.err
        found[word] = done.json["models"][0]["nll"]
        (note,) = [
            n for n in done.json["assumptions"] if "tatistics: " in n or "of its domain" in n
        ]
        assert ("its own" if name == "own" else name) in note.partition("(")[0]
    assert len(set(found.values())) == 1
    model = files.trained() if name == "own" else measured(files, name)
    with np.load(data) as arrays:
        batches = [(inputs_of(arrays["images"]), torch.from_numpy(arrays["labels"]))]
    assert found["auto"] == pytest.approx(bnfix.evaluate(model, batches).nll, rel=1e-3)


def test_with_labels_the_domain_holds_what_was_proven(files, cli, tmp_path):
    """Statistics of the same kind are no gain: the domain gets those of the file."""
    out = tmp_path / "out.safetensors"
    words = ("calibrate", files.net, "--data", files.data, *files.common, "--z", 50)
    done = cli(*words, "--domain", "day", "-o", out, "--json")
    assert done.code == 0, done.err
    assert done.json["verdict"] == "same"
    assert {one["stage"] for one in done.json["decisions"]} == {"statistics"}
    close(bnfix.load(out, model=files.model(), domain="day"), files.trained())


def header_of(path):
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["bnfix"])


def numbers(values, kind="<f4"):
    return base64.b64encode(np.asarray(values, kind).tobytes()).decode()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(night=[]), "night: not a domain name, or not an object"),
        (lambda d: d.update({"a/b": {}}), "a/b: not a domain name"),
        (lambda d: d["night"].pop("bn1"), "night: bn1: expected finite"),
        (lambda d: d["night"].update(bn9=["", ""]), "night: bn9: the model has no such layer"),
        (lambda d: d["fog"].update(bn2="x"), "fog: bn2: expected finite"),
        (lambda d: d["fog"].update(bn2=["x"]), "fog: bn2: expected finite"),
        (lambda d: d["fog"].update(bn2="A" * 4000), "fog: bn2: expected finite"),
        (lambda d: d["fog"].update(bn2=d["fog"]["bn2"][:-4] + "!!!!"), "fog: bn2: expected finite"),
        (lambda d: d["fog"].update(bn1=numbers([np.nan] * 12)), "fog: bn1: expected finite"),
        (lambda d: d["fog"].update(bn1=numbers([-1] * 12)), "fog: bn1: expected finite"),
        (lambda d: d["fog"].update(bn1=numbers([1] * 11)), "fog: bn1: expected finite"),
    ],
)
def test_a_hostile_header_is_refused(files, several, tmp_path, change, message):
    header, path = header_of(several), tmp_path / "bad.safetensors"
    change(header["domains"])
    save_file(load_file(several), path, {"bnfix": json.dumps(header)})
    with pytest.raises(CheckpointError, match="its domain statistics cannot be used") as caught:
        bnfix.load(path, model=files.model())
    assert message in str(caught.value)


def test_all_problems_of_a_header_at_once_and_float64_is_taken(files, several, tmp_path):
    header, path = header_of(several), tmp_path / "bad.safetensors"
    header["domains"]["fog"]["bn1"] = numbers([0.5] * 6 + [2] * 6, "<f8")
    save_file(load_file(several), path, {"bnfix": json.dumps(header)})
    assert (
        bnfix.load(path, model=files.model(), domain="fog").bn1.running_mean.tolist() == [0.5] * 6
    )
    del header["domains"]["fog"]["bn1"], header["domains"]["night"]["bn2"]
    save_file(load_file(several), path, {"bnfix": json.dumps(header)})
    with pytest.raises(CheckpointError, match=r"night: bn2.*fog: bn1|fog: bn1.*night: bn2"):
        bnfix.load(path, model=files.model())


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("calibrate", "--domain", "a b"), 2, "--domain: 'a b'"),
        (("calibrate", "--domain", "auto"), 2, "--domain: 'auto'"),
        (("calibrate", "--domain", "x", "--example-weight", 0.1), 2, "statistics and no weights"),
        (("calibrate", "--domain", "x", "--batch-weight", "auto"), 2, "statistics and no weights"),
        (("fix", "--domain", "dusk"), 1, "no domain 'dusk', expected one of: fog, night"),
    ],
)
def test_what_no_domain_can_be_is_refused(files, cli, several, tmp_path, words, code, message):
    command, *more = words
    out = tmp_path / "out.safetensors"
    done = cli(command, several, "--data", files.data, *files.common, *more, "-o", out)
    assert (done.code, list(tmp_path.iterdir())) == (code, [])
    assert message in done.err


def test_the_own_count_of_batches_stays(files, several):
    own, state = load_file(several), files.trained().state_dict()
    assert own["bn1.num_batches_tracked"] == state["bn1.num_batches_tracked"] > 0


def test_a_nearer_domain_of_another_kind_is_not_taken(files, cli, tmp_path):
    images, labels = images_of(180, seed=2)
    np.savez(tmp_path / "odd.npz", images=(images * 0.97).astype(np.uint8), labels=labels)
    out, data = tmp_path / "out.safetensors", ("--data", tmp_path / "odd.npz", *files.common)
    assert cli("calibrate", files.net, *data, *NO_WEIGHT, "--domain", "odd", "-o", out).code == 0
    done = cli("eval", out, "--data", files.data, *files.common, "--domain", "auto", "--json")
    (note,) = [n for n in done.json["assumptions"] if "distances" in n]
    far = dict(part.rsplit(" ", 1) for part in re.split("[(:;] |, ", note) if part[-1].isdigit())
    assert float(far["odd"]) < float(far["its own"])
    assert "statistics: its own (" in note


@pytest.mark.parametrize("model", [True, False])
def test_inspect_shows_the_domain_that_is_named(files, cli, several, model):
    words = ("inspect", several, *(("--model", files.spec) if model else ()), "--json")
    own, night = (cli(*words, *more).json for more in ((), ("--domain", "night")))
    assert any("for the domains fog, night" in note for note in own["notes"])
    assert "the table shows its own statistics" in own["notes"]
    assert "with the statistics of its domain night" in night["notes"]
    least, most = night["layers"][0]["mean_range"]
    mean = measured(files, "night").bn1.running_mean
    assert (least, most) == pytest.approx((float(mean.min()), float(mean.max())), rel=1e-3)
    assert own["layers"][0]["mean_range"] != [least, most]
    assert "no domain 'dusk'" in cli(*words[:-1], "--domain", "dusk").message


def test_eval_refuses_an_unknown_domain_and_notes_files_without_any(files, cli, several):
    words = ("--data", files.data, *files.common, "--domain")
    done = cli("eval", several, *words, "dusk")
    assert done.code == 1
    assert "no domain 'dusk'" in done.message
    done = cli("eval", files.net, several, *words, "night", "--json")
    assert any("net.pth: has no domains; its own" in n for n in done.json["assumptions"])
