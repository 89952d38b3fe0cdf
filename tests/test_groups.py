"""Groups of examples that depend on each other: splits keep them whole, and claims count them."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import bnfix
from benchmarks.clusters import coverage, drawn, false_rates
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core.errors import ConfigError, DataError
from bnfix.core.settings import DataRecipe, GateRecipe, ModelRecipe, RunOptions
from bnfix.data.images import ArrayImages
from bnfix.data.open import open_images
from bnfix.data.splits import cut, describe_groups, unseen, watched
from bnfix.jobs.session import Plan, open_workbench
from bnfix.metrics.compare import compare, gain_t, judge, mean_and_se
from bnfix.metrics.metrics import measure, middle, numbered, resampled_means
from tests.conftest import Files, Outcome, images_of
from tests.test_processes import ended, start


def grouped(groups, labels=None, order=None):
    """One image an entry, all different; a number says its group."""
    n = len(groups)
    order = np.arange(n) if order is None else order
    pixels = np.arange(n, dtype=np.uint16)[:, None].view(np.uint8).reshape(n, 1, 2, 1)
    images = ArrayImages("data", pixels[order], 1)
    images.groups = np.unique(np.asarray(groups)[order], return_inverse=True)[1]
    images.labels = None if labels is None else np.asarray(labels)[order]
    return images


def files_in(folder: Path, names) -> Path:
    """Tiny images of these names, no two the same."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((2, 2, 3), (i % 256, i // 256, 7), np.uint8)).save(path)
    return folder


# --- splits ---

FRACTIONS = [(0.6, 0.2, 0.2), (0.75, 0.25, 0.0), (1.0, 0.0, 0.0), (0.8, 0.0, 0.2)]


@settings(deadline=None, max_examples=80)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=6, max_size=40),
    fractions=st.sampled_from(FRACTIONS),
    seed=st.integers(0, 2**40),
    labelled=st.booleans(),
    data=st.data(),
)
def test_no_group_is_in_two_splits(sizes, fractions, seed, labelled, data):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    labels = data.draw(st.lists(st.integers(0, 2), min_size=len(groups), max_size=len(groups)))
    labels = labels if labelled else None
    split = cut(grouped(groups, labels), fractions, seed)
    parts = [split.fit, split.select, split.test]
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(groups)))
    held = [set(groups[part].tolist()) for part in parts]
    assert not held[0] & held[1] | held[0] & held[2] | held[1] & held[2]
    for part, inside, fraction in zip(parts, held, fractions, strict=True):
        assert len(inside) >= 2 if fraction else not inside
        assert (np.diff(part) > 0).all()
        # Each group goes to the part that is owed most: no part is owed more than two groups.
        assert abs(len(part) - fraction * len(groups)) <= 3 * max(sizes)
    # Neither names nor places matter.
    order = np.asarray(data.draw(st.permutations(range(len(groups)))))
    again = cut(grouped(-groups, labels, order), fractions, seed)
    assert np.sort(order[again.fit]).tolist() == split.fit.tolist()
    assert np.sort(order[again.test]).tolist() == split.test.tolist()


def test_classes_and_fractions_hold_where_groups_allow():
    groups, labels = np.repeat(np.arange(100), 4), np.repeat(np.arange(100) % 2, 4)
    split = cut(grouped(groups, labels), (0.6, 0.2, 0.2), 3)
    for part, n in ((split.fit, 120), (split.select, 40), (split.test, 40)):
        assert np.bincount(labels[part]).tolist() == [n, n]


def test_copies_are_left_out_of_groups_too():
    images = grouped(np.repeat(np.arange(6), 2))
    images.array[7] = images.array[0]
    split = cut(images, (0.6, 0.2, 0.2), 0)
    assert split.duplicates == 1
    assert 7 not in np.concatenate([split.fit, split.select, split.test])


@pytest.mark.parametrize(("n", "fractions"), [(5, FRACTIONS[0]), (3, FRACTIONS[1])])
def test_too_few_groups_are_refused(n, fractions):
    with pytest.raises(DataError, match=f"{n} groups, expected at least {n + 1}, 2 for each split"):
        cut(grouped(np.repeat(np.arange(n), 5)), fractions, 0)


@settings(deadline=None, max_examples=40)
@given(sizes=st.lists(st.integers(1, 9), min_size=2, max_size=30), seed=st.integers(0, 99))
def test_early_stopping_watches_whole_groups(sizes, seed):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    found = watched(groups, np.random.default_rng(seed))
    assert 0 < found.sum() < len(groups)
    assert not set(groups[found].tolist()) & set(groups[~found].tolist())
    assert abs(found.sum() - len(groups) / 5) <= 2 * max(sizes)


def test_one_group_cannot_be_learned_on_and_watched():
    with pytest.raises(DataError, match="one group to fit on, expected at least 2"):
        watched(np.zeros(5, int), np.random.default_rng(0))


def test_test_images_of_a_group_of_the_data_are_left_out(tmp_path):
    data = open_images(
        str(files_in(tmp_path / "a", ["x_1.png", "x_2.png", "y_1.png"])), groups="^."
    )
    names = [f"{c}_{i}.png" for i in range(3) for c in "wyz"]
    rest = [f"{i}.png" for i in range(9)]
    test = open_images(str(files_in(tmp_path / "b", [*rest, *names])), groups="^.")
    kept, n = unseen(test, data)
    assert n == 3 + 3  # three exact copies, and three of group y
    assert [test.name(i) for i in kept] == [*rest[3:], *sorted(x for x in names if x[0] != "y")]


# --- where groups come from ---


def test_groups_from_names_columns_arrays_and_files(tmp_path):
    folder = files_in(tmp_path / "flat", ["a1_01.png", "a1_02.png", "b_07.png"])
    whole = open_images(str(folder), groups="^[a-z]")
    assert whole.groups.tolist() == [0, 0, 1]
    assert whole.group_names == ("a", "b")
    first = open_images(str(folder), groups=r"^([a-z0-9]+)_(\d+)")
    assert first.group_names == ("a1", "b")
    (folder / "labels.csv").write_text(
        "file,label,clip\na1_01.png,0,9\na1_02.png,1,9\nb_07.png,0,10\n"
    )
    by_column = open_images(str(folder), groups="clip")
    assert by_column.groups.tolist() == [1, 1, 0]
    assert by_column.group_names == ("10", "9")
    assert open_images(str(folder), groups="^.").group_names == ("a", "b")
    np.save(tmp_path / "g.npy", np.array([5, 7, 5], np.uint8))
    assert open_images(str(folder), groups=str(tmp_path / "g.npy")).groups.tolist() == [0, 1, 0]
    np.savez(tmp_path / "g.npz", groups=np.array(["u", "u", "v"]), test_groups=np.array([1, 1, 2]))
    assert open_images(str(folder), groups=str(tmp_path / "g.npz")).group_names == ("u", "v")
    other = open_images(str(folder), groups=f"{tmp_path / 'g.npz'}#test_groups")
    assert other.group_names == ("1", "2")
    np.savez(tmp_path / "d.npz", images=np.zeros((3, 2, 2, 3), np.uint8), clip=np.array([1, 2, 1]))
    data = str(tmp_path / "d.npz")
    for spec in ("clip", f"{data}#clip"):
        of_array = open_images(data, groups=spec)
        assert of_array.groups.tolist() == [0, 1, 0]
        assert not [note for note in of_array.notes if "skipped" in note]
        assert "two splits" not in describe_groups(of_array, splits=False)[0]
        assert "two splits" in describe_groups(of_array)[0]
    assert "arrays skipped: clip" in open_images(data).notes


def test_a_group_for_each_example_is_no_group(tmp_path):
    folder = files_in(tmp_path, ["a.png", "b.png", "c.png"])
    images = open_images(str(folder), groups="^.")
    assert images.groups is None
    assert any("every example is in a separate group" in note for note in images.notes)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        (
            "^x",
            r"used as a regular expression; 2 of 4 file names do not match \(y_1.png, z_1.png\)",
        ),
        ("_", "all 4 examples are in the group '_', expected at least 2"),
        ("(", "not a column, a file or a regular expression"),
        ("short.npy", "3 groups for the 4 examples of .*, expected one for each"),
        ("square.npy", r"int64 \(2, 2\), expected one integer or word"),
        ("real.npy", r"float64 \(4,\), expected one integer or word"),
        ("objects.npy", "cannot be read"),
        ("none.npz", "none.npz cannot be read .*expected one named groups"),
        ("text.npz", "cannot be read"),
        ("words.npy", r"1 example without a group \(y_1.png\)"),
    ],
)
def test_wrong_groups_are_refused(tmp_path, monkeypatch, spec, says):
    folder = files_in(tmp_path / "d", ["x_1.png", "x_2.png", "y_1.png", "z_1.png"])
    monkeypatch.chdir(tmp_path)
    np.save("short.npy", np.arange(3))
    np.save("square.npy", np.zeros((2, 2), int))
    np.save("real.npy", np.zeros(4))
    np.save("objects.npy", np.array([1, "a", None, {}], dtype=object), allow_pickle=True)
    np.savez("none.npz", other=np.arange(4))
    np.save("words.npy", np.array(["a", "a", "", "b"]))
    Path("text.npz").write_text("no archive")
    with pytest.raises(ConfigError, match=says) as error:
        open_images(str(folder), groups=spec)
    assert "\n" not in str(error.value)


def test_an_unknown_column_or_array_is_refused(tmp_path):
    folder = files_in(tmp_path / "d", ["x_1.png", "y_1.png"])
    (folder / "labels.csv").write_text("file,label,clip\nx_1.png,0,1\ny_1.png,1,\n")
    with pytest.raises(ConfigError, match=r"no such column in .*labels.csv, which has file, label"):
        open_images(str(folder), groups="patient")
    with pytest.raises(ConfigError, match=r"1 example without a group \(y_1.png\)"):
        open_images(str(folder), groups="clip")
    np.savez(tmp_path / "d.npz", images=np.zeros((2, 2, 2, 3), np.uint8))
    with pytest.raises(
        ConfigError, match=r"arrays images, expected one named patient\). Name another"
    ):
        open_images(str(tmp_path / "d.npz"), groups="patient")
    with pytest.raises(ConfigError, match="have no file names for an expression to match"):
        open_images(str(tmp_path / "d.npz"), groups="^(a)")


# --- without --groups ---


def frames(*prefixes, n=10, folder=""):
    return [f"{folder}{prefix}{i:05}.png" for prefix in prefixes for i in range(n)]


@pytest.mark.parametrize(
    ("names", "sequences"),
    [
        (frames("0016E5_", "0001TP_", "Seq05VD_f"), 3),
        (frames("a/", "b/v_"), None),  # class folders of one numbering each
        ([*frames("p1_", "p2_", folder="sick/"), *frames("p3_", folder="well/")], 3),
        (frames("img_", n=40), None),
        (frames("", n=40), None),
        ([*frames("img_", folder="cat/"), *frames("img_", folder="dog/")], None),
        ([*frames("cat_", folder="cat/"), *frames("dog_", folder="dog/")], None),
        (frames(*(f"{i:x}f_" for i in range(10)), n=4), None),  # too many for their frames
        ([f"{name[:-4]}x.png" for name in frames("u_", "v_")], None),  # no running numbers
        (frames("u_", "v_", n=9), None),  # too few files
    ],
)
def test_frames_of_few_sequences_are_noted(tmp_path, names, sequences):
    folder = str(files_in(tmp_path, names))
    for labels in ("auto", "none"):
        notes = describe_groups(open_images(folder, labels=labels))
        if sequences is None:
            assert notes == []
            continue
        assert f"frames of {sequences} sequences" in notes[0]
        expression = re.search("--groups '(.*?)' keeps", notes[0])[1]
        images = open_images(folder, labels=labels, groups=expression)
        assert len(images.group_names) == sequences
        assert f"in {sequences} groups of 10 to 10" in describe_groups(images)[0]


# --- commands ---


def clips(folder: Path, n_groups=30, size=6) -> Path:
    """Images whose array `clip` says which six belong together."""
    n = n_groups * size
    images, labels = images_of(n, seed=2)
    clip = np.random.default_rng(1).permutation(np.arange(n) // size)
    path = folder / "clips.npz"
    np.savez(path, images=images, labels=labels, clip=clip)
    return path


def parts_of(output: Path, data: Path) -> list[set[int]]:
    """The groups of the fit and the select split, by the history of a file."""
    images, clip = open_images(str(data)), np.load(data)["clip"]
    used = read_checkpoint(output).metadata["history"][-1]["data"]
    listed = [base64.b64decode(used[name]["digests"]) for name in ("fit", "select")]
    found = [{text[i : i + 6] for i in range(0, len(text), 6)} for text in listed]
    return [{int(clip[i]) for i, d in enumerate(images.digests()) if d in part} for part in found]


@pytest.mark.parametrize("command", ["fix", "calibrate", "finetune"])
def test_every_command_keeps_groups_together(files: Files, cli, tmp_path, command):
    data, out = clips(tmp_path), tmp_path / "out.safetensors"
    more = {"fix": ("--train", "none"), "finetune": ("--epochs", "1")}.get(command, ())
    done: Outcome = cli(
        command, files.stale, *files.common, "--data", data, "--groups", "clip", "-o", out,
        "--json", *more,
    )  # fmt: skip
    splits = done.json["data"]["splits"]
    fit, select = parts_of(out, data)
    assert not fit & select
    assert len(fit) * 6 == splits["fit"]
    assert len(select) * 6 == splits["select"]
    assert splits["test"] == 180 - splits["fit"] - splits["select"] > 0
    assert any("180 examples in 30 groups of 6 to 6" in note for note in done.json["assumptions"])


def test_learning_and_watching_share_no_group(files: Files, tmp_path):
    data = clips(tmp_path)
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(mean=(0.5,), std=(0.25,), groups="clip"),
        run=RunOptions("cpu", workers=0),
        gate=GateRecipe(seed=4),
    )
    bench = open_workbench(files.net, str(data), plan, (0.6, 0.2, 0.2))
    learn, monitor = bench.learn_and_monitor()
    groups = bench.inputs.images.groups
    assert sorted([*learn, *monitor]) == bench.split.fit.tolist()
    assert not set(groups[learn]) & set(groups[monitor])
    assert 12 <= len(monitor) <= 30


def test_several_processes_cut_the_same_groups(files: Files, cli, tmp_path):
    data, outs = clips(tmp_path), [tmp_path / f"{n}.safetensors" for n in (1, 2)]
    command = ("calibrate", files.stale, *files.common, "--data", data, "--groups", "clip", "-o")
    alone = cli(*command, outs[0], "--json").json
    codes, outputs = ended(start(2, "-m", "bnfix", *command, outs[1]))
    assert codes == [0, 0], outputs
    assert parts_of(outs[0], data) == parts_of(outs[1], data)
    together = json.loads(outs[1].with_name("2.safetensors.report.json").read_text())
    for one, other in zip(alone["models"], together["models"], strict=True):
        assert one["n_groups"] == other["n_groups"] == 6
        assert one["interval"]["nll"] == pytest.approx(other["interval"]["nll"], abs=1e-5)


def test_groups_of_test_data_come_from_their_own_array(files: Files, cli, tmp_path):
    data, out = clips(tmp_path), tmp_path / "out.safetensors"
    clip, n_test = np.load(data)["clip"], 120
    np.save(tmp_path / "g.npy", clip)
    np.savez(tmp_path / "g.npz", groups=clip, test_groups=100 + np.arange(n_test) // 8)
    common = (
        "calibrate",
        files.stale,
        *files.common,
        "--data",
        data,
        "--test",
        files.test,
        "-o",
        out,
    )
    refused = cli(*common, "--groups", tmp_path / "g.npy")
    assert "no groups for the examples of --test" in refused.message
    done = cli(*common, "--groups", tmp_path / "g.npz", "--json")
    notes = done.json["assumptions"]
    assert any("120 examples in 15 groups of 8 to 8" in note for note in notes)


# --- errors, intervals and verdicts ---


def metrics_of(losses, groups=None, right=None):
    """Two classes, label 0, with these losses."""
    losses = np.asarray(losses, np.float64)
    margin = -np.log(np.expm1(losses))  # log(1 + exp(-margin)) = loss
    logits = np.column_stack([margin, np.zeros(len(losses))])
    groups = numbered(groups, len(losses))
    return measure(logits, np.zeros(len(losses), int), groups=groups)


@settings(deadline=None, max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=30),
    seed=st.integers(0, 99),
    order=st.booleans(),
)
def test_clustered_errors_are_those_by_hand(sizes, seed, order):
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(len(sizes)), sizes)
    groups = rng.permutation(groups) if order else groups
    d = rng.normal(size=len(groups)) + rng.normal(size=len(sizes))[groups]
    mean, error = mean_and_se(d, groups)
    assert mean == pytest.approx(d.mean(), abs=1e-12)
    of_groups = [(d[groups == k] - d.mean()).sum() for k in range(len(sizes))]
    g = len(sizes)
    by_hand = (g / (g - 1) * sum(s * s for s in of_groups)) ** 0.5 / len(d)
    assert error == pytest.approx(by_hand, rel=1e-9, abs=1e-12)
    if max(sizes) == 1:
        assert error == pytest.approx(d.std(ddof=1) / g**0.5, rel=1e-12)


@pytest.mark.parametrize("sizes", [np.full(40, 5), 1 + np.arange(40) % 13])
def test_clustered_errors_are_those_of_a_brute_force_bootstrap(sizes):
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(40), sizes)
    d = rng.normal(size=40)[groups] + rng.normal(size=len(groups))
    members = [np.flatnonzero(groups == g) for g in range(40)]
    means = [
        d[np.concatenate([members[g] for g in rng.integers(0, 40, 40)])].mean() for _ in range(4000)
    ]
    _, error = mean_and_se(d, groups)
    # Of 4,000 draws the standard deviation is known to 1.1%; the bootstrap lacks sqrt(39 / 40),
    # and the linear formula the variation of the total size.
    assert error == pytest.approx(np.std(means) * (40 / 39) ** 0.5, rel=0.06)
    assert error > 1.5 * mean_and_se(d, None)[1]
    ours = resampled_means(d[:, None], 0, groups)[:, 0]
    assert np.std(ours) == pytest.approx(np.std(means), rel=0.08)
    assert ours.mean() == pytest.approx(np.mean(means), abs=4 * np.std(means) / 1000**0.5)


def test_intervals_hold_the_truth_where_examples_of_a_group_are_alike():
    for law, correlation, n in (("normal", 0.1, 20), ("exponential", 0.5, 60)):
        held = coverage(law, "of 5", n, correlation, 150)
        assert 0.95 - 4 * 0.0178 < held < 0.95 + 3 * 0.0178, (law, correlation, n, held)
    # Without groups the same data give intervals far too short.
    rng, naive = np.random.default_rng(0), 0
    for seed in range(80):
        values, _ = drawn(rng, "normal", np.full(20, 5), 1.0)
        low, high = middle(resampled_means(values[:, None], seed)[:, 0], float(values.mean()))
        naive += low <= 0 <= high
    assert naive / 80 < 0.8


def test_equal_models_are_rarely_called_better():
    better, admitted = false_rates("exponential", "of 5", 15, 0.5, 200)
    assert better <= 0.03 + 4 * 0.012
    assert admitted <= 0.03 + 4 * 0.012


def test_a_group_for_each_example_changes_nothing():
    rng = np.random.default_rng(0)
    old, new = 0.5 + rng.random(60), 0.45 + rng.random(60)
    plain = [metrics_of(x) for x in (old, new)]
    single = [metrics_of(x, groups=rng.permutation(60)) for x in (old, new)]
    assert [m.interval for m in plain] == [m.interval for m in single]
    assert compare(*plain) == compare(*single)
    assert judge("", ("a", plain[1]), ("b", plain[0])) == judge(
        "", ("a", single[1]), ("b", single[0])
    )


def test_copies_of_examples_prove_no_more_than_the_examples():
    rng = np.random.default_rng(1)
    old = 0.5 + rng.random(30)
    new = old - 0.1 + 0.15 * rng.normal(size=30).clip(-1.5, 1.5)
    groups = np.repeat(np.arange(30), 10)
    once = compare(metrics_of(old), metrics_of(new))
    naive = compare(metrics_of(old[groups]), metrics_of(new[groups]))
    grouped_pair = [metrics_of(x[groups], groups) for x in (old, new)]
    paired = compare(*grouped_pair)
    assert paired.nll.difference == pytest.approx(once.nll.difference)
    assert paired.nll.p == pytest.approx(once.nll.p, rel=1e-6)
    assert naive.nll.p < paired.nll.p / 100
    width, of_one = (x.nll.interval[1] - x.nll.interval[0] for x in (paired, once))
    assert of_one < width < 1.2 * of_one


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (np.full(14, 20), "14 groups are too few to judge; it takes 15"),
        (np.r_[500, np.full(40, 2)], "1 groups are too few to judge; it takes 15"),
        (np.full(15, 20), ""),
    ],
)
def test_few_groups_prove_nothing(sizes, says):
    groups = np.repeat(np.arange(len(sizes)), sizes)
    rng = np.random.default_rng(0)
    old = 1 + rng.random(len(groups))
    new = old - 0.5 + 0.01 * rng.random(len(groups))
    pair = [metrics_of(x, groups) for x in (old, new)]
    decision = judge("", ("new", pair[1]), ("old", pair[0]))
    assert decision.admitted == (not says)
    assert says in decision.reason
    assert compare(*pair).verdict == ("same" if says else "better")


def test_losses_count_where_enough_groups_differ():
    groups = np.repeat(np.arange(40), 10)
    old = np.full(400, 1.0)
    for n, t in ((14, False), (15, True)):
        new = old - np.where(groups < n, 0.5 + 0.001 * np.arange(400), 0)
        assert (gain_t(new - old, 0.0, groups) > 0) == t


def test_other_groups_are_not_compared():
    losses = np.full(40, 0.5)
    one, other = metrics_of(losses, np.arange(40) // 2), metrics_of(losses, np.arange(40) // 4)
    with pytest.raises(DataError, match="not measured with the same groups"):
        compare(one, other)
    with pytest.raises(DataError, match=r"groups: shape \(39,\) for 40 examples"):
        metrics_of(losses, np.arange(39))


def test_evaluate_takes_groups_in_the_order_of_the_batches():
    torch.manual_seed(0)
    x, y = torch.randn(60, 5), torch.randint(3, (60,))
    batches = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]
    names = [f"clip {i // 6}" for i in range(60)]
    model = torch.nn.Linear(5, 3)
    found = bnfix.evaluate(model, batches, groups=names)
    assert found.examples.n_groups == 10
    assert found.nll == bnfix.evaluate(model, batches).nll
    single = bnfix.evaluate(model, batches, groups=range(60))
    assert single.interval == bnfix.evaluate(model, batches).interval != found.interval
    targets = [(a, a[:, :2]) for a, _ in batches]
    by_rows = bnfix.evaluate(torch.nn.Linear(5, 2), targets, groups=names)
    assert by_rows.examples.n_groups == 10


def test_the_report_counts_groups(files: Files, cli, tmp_path):
    data, folder = clips(tmp_path), tmp_path / "report"
    command = (
        "eval", files.stale, files.net, *files.common, "--data", data, "--groups", "clip",
        "--report", folder,
    )  # fmt: skip
    done = cli(*command)
    assert "180 images in 30 groups" in done.out
    assert "95% interval by groups" in done.out
    assert "95%: by 30 groups" in done.out
    content = json.loads((folder / "report.json").read_text())
    assert content["data"]["n_groups"] == 30
    assert [model["n_groups"] for model in content["models"]] == [30, 30]
    assert content["options"]["groups"] == "clip"
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text()
        assert "180 images in 30 groups" in text
        assert "30 groups of 6 to 6 (median 6)" in text
        assert "bootstrap intervals of 30 groups" in text or "by bootstrap of 30 groups" in text
        assert "McNemar" not in text
    plain = cli(*command[:-4], "--json").json
    assert "n_groups" not in plain["data"]
    wide, narrow = (c["models"][0]["interval"]["nll"] for c in (content, plain))
    assert wide != narrow


def test_too_few_groups_are_the_stated_reason_that_nothing_is_proven(
    files: Files, cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    images, labels = images_of(180, seed=2)
    groups = np.arange(180) // 9
    np.savez(tmp_path / "few.npz", images=images, labels=labels, groups=groups)
    common = (*files.common, "--data", tmp_path / "few.npz", "--groups", "groups")
    found = cli("fix", files.stale, *common, "--train", "none", "-o", tmp_path / "o.safetensors")
    assert "the select split has 4 groups where it takes 15, so nothing can be chosen" in found.err
    half = tmp_path / "half.npz"
    np.savez(half, images=images[:90], labels=labels[:90], groups=groups[:90])
    shown = cli("eval", files.stale, files.net, *files.common, "--data", half, "--groups", "groups")
    assert "same: nothing is proven by 10 groups where it takes 15: " in " ".join(shown.out.split())
