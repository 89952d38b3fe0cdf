"""`--select DATA`, and the warning where the images worked on look like those of the training."""

import json
import math
import shlex
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn import functional as F

import bnfix
from bnfix.core.settings import DataRecipe, GateRecipe, ModelRecipe, RunOptions
from bnfix.data.open import open_images
from bnfix.jobs.session import Plan
from bnfix.metrics.compare import describe_easier
from tests.conftest import images_of, inputs_of
from tests.real import DATA, needs_data

WARNED = "This is typical of work images that the network was trained on"


def written(path, images, labels):
    np.savez(path, images=images, labels=labels)
    return str(path)


def repaired(files, select, checkpoint=None, command="calibrate", test=True, **source):
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(
            mean=(0.5,), std=(0.25,), test=str(files.test) if test else None, **source
        ),
        gate=GateRecipe(select=select),
        run=RunOptions("cpu", workers=0),
    )
    run = getattr(bnfix, command)
    return run(checkpoint or files.stale, data=str(files.data), plan=plan)


def test_images_of_their_own_choose_and_all_others_are_fitted_on(files, tmp_path):
    images, labels = images_of(90, seed=5)
    found = repaired(files, written(tmp_path / "select.npz", images, labels))
    assert found.report.data.splits == {"fit": 180, "select": 90, "test": 120}
    own = {name: bnfix_digests(path) for name, path in
           (("fit", files.data), ("select", tmp_path / "select.npz"))}  # fmt: skip
    listed = {name: found.entry["data"][name]["digests"] for name in own}
    assert listed == own
    first, *_ = found.report.decisions
    model = files.model()
    model.load_state_dict(torch.load(files.stale, weights_only=True))
    with torch.no_grad():
        logits = model.eval()(inputs_of(images)).double()
    expected = F.cross_entropy(logits, torch.from_numpy(labels))
    assert first.n_examples == 90
    assert first.incumbent_nll == pytest.approx(float(expected), rel=1e-5)


def bnfix_digests(path):
    import base64

    return base64.b64encode(b"".join(sorted(open_images(str(path)).digests()))).decode()


def test_labels_of_the_select_data_decide(files, tmp_path):
    images, labels = images_of(90, seed=5)
    right = repaired(files, written(tmp_path / "right.npz", images, labels))
    wrong = repaired(files, written(tmp_path / "wrong.npz", images, (labels + 1) % 3))
    assert right.report.decisions[0].admitted
    assert right.report.verdict == "better"
    assert not wrong.report.decisions[0].admitted


def test_without_test_data_a_fifth_of_the_work_images_tests(files, tmp_path):
    found = repaired(files, written(tmp_path / "s.npz", *images_of(30, seed=5)), test=False)
    assert found.report.data.splits == {"fit": 144, "select": 30, "test": 36}


def test_images_to_fit_on_do_not_choose(files, tmp_path):
    with np.load(files.data) as known:
        images, labels = known["images"], known["labels"]
    new, classes = images_of(30, seed=5)
    both = np.concatenate([images[:50], new]), np.concatenate([labels[:50], classes])
    found = repaired(files, written(tmp_path / "both.npz", *both))
    assert found.report.data.splits["select"] == 30
    assert any("left out: 50 images that copy others" in note for note in found.report.assumptions)
    copies = written(tmp_path / "copies.npz", images[:50], labels[:50])
    with pytest.raises(bnfix.DataError, match=r"0 of \d+ images for the select split"):
        repaired(files, copies)


def test_groups_that_are_fitted_on_do_not_choose(files, tmp_path):
    paths = []
    for name, groups, seed in (("work", "abcdef", 2), ("select", "efgh", 5), ("test", "xyz", 6)):
        images, labels = images_of(30 * len(groups), seed)
        paths.append(tmp_path / f"{name}.npz")
        np.savez(paths[-1], images=images, labels=labels, part=np.array(list(groups * 30)))
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(mean=(0.5,), std=(0.25,), test=str(paths[2]), groups="part"),
        gate=GateRecipe(select=str(paths[1])),
        run=RunOptions("cpu", workers=0),
    )
    found = bnfix.calibrate(files.stale, data=str(paths[0]), plan=plan)
    assert found.report.data.splits == {"fit": 180, "select": 60, "test": 90}


def test_without_labels_images_to_choose_on_are_left_alone(files, tmp_path):
    select = written(tmp_path / "select.npz", *images_of(90, seed=5))
    found = repaired(files, select, command="fix", labels="none")
    assert found.report.data.splits == {"fit": 180, "select": 0, "test": 120}


def test_inputs_of_other_tasks_have_no_select_data(files, tmp_path, cli):
    np.savez(tmp_path / "x.npz", inputs=np.zeros((40, 3, 8, 8), np.float32),
             targets=np.zeros(40, np.int64))  # fmt: skip
    done = cli("fix", files.net, "--model", files.spec, "--data", tmp_path / "x.npz", "--select",
               tmp_path / "x.npz", "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert done.code == 1
    assert "cannot be combined, expected images with classes" in " ".join(done.err.split())


@pytest.mark.parametrize("select", ["0", "0.5", "nan", "-1"])
def test_a_number_is_a_part(files, tmp_path, cli, select):
    done = cli("fix", files.net, "--model", files.spec, "--data", files.data, f"--select={select}",
               "-o", tmp_path / "out.safetensors")  # fmt: skip
    assert done.code == 2
    assert "expected above 0 and at most 0.4" in " ".join(done.err.split())


def test_the_command_line_takes_data_to_choose_on_and_its_recipe_runs_no_code(files, tmp_path, cli):
    select = written(tmp_path / "select.npz", *images_of(60, seed=5))
    common = ("--model", files.spec, "--mean", "0.5", "--std", "0.25", "--workers", "0")
    out = tmp_path / "out.safetensors"
    done = cli("calibrate", files.stale, *common, "--data", files.data, "--select", select,
               "--test", files.test, "-o", out, "--json", "--granularity", "global")  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"]["splits"]["select"] == 60
    with safe_open(out, "pt") as file:
        header = json.loads(file.metadata()["bnfix"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    assert header["history"][-1]["options"]["gate"]["select"] == select
    again = tmp_path / "again.safetensors"
    done = cli("fix", files.stale, "--model", files.spec, "--data", files.data, "--recipe", out,
               "-o", again, "--json")  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["data"]["splits"]["select"] == 60
    header["history"][-1]["options"]["gate"]["select"] = "os:getcwd"
    from safetensors.torch import save_file

    evil = tmp_path / "evil.safetensors"
    save_file(tensors, evil, {"bnfix": json.dumps(header)})
    done = cli("fix", files.stale, "--model", files.spec, "--data", files.data, "--recipe", evil,
               "-o", tmp_path / "no.safetensors")  # fmt: skip
    assert done.code == 1
    assert "its select data are code" in " ".join(done.err.split())


# --- the warning ---


def pairs(command):
    words = shlex.split(command)
    return {f"{a} {b}" for a, b in pairwise(words)}


def measured(n, seed, surer, right):
    """Metrics of n examples with logits of a given sureness, of which a part is right."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, n)
    guessed = np.where(rng.random(n) < right, labels, (labels + 1) % 4)
    logits = rng.normal(0, 1, (n, 4))
    logits[np.arange(n), guessed] += surer
    pair = torch.from_numpy(logits).float(), torch.from_numpy(labels)
    return bnfix.evaluate(nn.Identity(), [pair])


@pytest.mark.parametrize("n", [1, 2, 37, 400])
@pytest.mark.parametrize(("surer", "right"), [(3.0, 0.9), (6.0, 0.99), (1.0, 0.5)])
def test_the_rule_against_one_by_hand(n, surer, right):
    test = measured(300, 1, 3.0, 0.8)
    work = measured(n, 2, surer, right)
    expected = work.nll <= 0.8 * test.nll
    for a, b, z in (
        (work.examples.losses, test.examples.losses, 3.0),
        (-1.0 * work.examples.scores, -1.0 * test.examples.scores, 1.0),
    ):
        errors = [x.std(ddof=1) ** 2 / len(x) if len(x) > 1 else 0.0 for x in (a, b)]
        expected &= bool(a.mean() - b.mean() < -z * math.sqrt(sum(errors)))
    found = describe_easier(work, test)
    assert bool(found) == expected
    assert all(WARNED in sentence for sentence in found)
    assert not describe_easier(test, test)
    assert not (found and describe_easier(test, work))


def test_other_data_of_the_same_kind_gives_no_warning_and_easier_ones_do(files, tmp_path, cli):
    images, labels = images_of(200, seed=7)
    hard = np.clip(
        images.astype(int) + np.random.default_rng(0).normal(0, 150, images.shape), 0, 255
    )
    hard = written(tmp_path / "hard.npz", hard.astype(np.uint8), labels)
    common = ("--model", files.spec, "--mean", "0.5", "--std", "0.25", "--workers", "0")
    for test, warns in ((files.test, False), (hard, True)):
        done = cli("inspect", files.net, *common, "--data", files.data, "--test", test, "--json")
        assert done.code == 0, done.err
        found = {f["fault"]: f for f in json.loads(done.out)["findings"]}
        assert ("trained-on" in found) == warns
        if warns:
            assert WARNED in found["trained-on"]["detail"]
            assert {f"--test {hard}", "--select OTHER"} <= pairs(found["trained-on"]["advice"])
        both = ("--data", files.data, "--test", test, "--granularity", "global")
        fixed = cli("calibrate", files.net, *common, *both, "--json", "--force", "-o",
                    tmp_path / "o.safetensors")  # fmt: skip
        assert fixed.code == 0, fixed.err
        notes = json.loads(fixed.out)["assumptions"]
        assert any(WARNED in note for note in notes) == warns


def test_inspect_compares_with_data_only(files, cli):
    done = cli("inspect", files.net, "--test", files.test)
    assert done.code == 2
    assert "--test: it is compared with --data, which is missing" in " ".join(done.err.split())


@needs_data
def test_training_images_of_a_real_network_are_told_from_new_ones(tmp_path, cli):
    folder = DATA / "cifar10"
    with np.load(folder / "test.npz") as found:
        images, labels = found["images"], found["labels"]
    halves = [written(tmp_path / f"{k}.npz", images[k::2], labels[k::2]) for k in (0, 1)]
    common = (
        "--model", "tests/nets.py:resnet20", "--mean", "0.485,0.456,0.406", "--std",
        "0.229,0.224,0.225", "--workers", "0", "--json", "--samples", "200",
    )  # fmt: skip
    for data, warns in ((folder / "clean_train.npz", True), (halves[0], False)):
        done = cli("inspect", folder / "resnet20.th", *common, "--data", data, "--test", halves[1])
        assert done.code == 0, done.err
        faults = {one["fault"] for one in json.loads(done.out)["findings"]}
        assert ("trained-on" in faults) == warns
