"""The command line as a user meets it: exit codes, one line of message, files whole or absent."""

from __future__ import annotations

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from bnfix.core.options import KINDS
from tests.conftest import Files, command_of, environment, images_of

COMMANDS = (
    "demo", "inspect", "convert", "calibrate", "finetune", "average", "eval", "fix", "export",
    "help",
)  # fmt: skip
WRITING = ("convert", "calibrate", "finetune", "fix", "average")


def contents(folder: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }  # fmt: skip


def arguments(command: str, files: Files, out: Path) -> list[object]:
    """A small run of any command that writes a checkpoint."""
    if command == "convert":
        return [command, files.net, "--model", files.spec, "-o", out]
    if command == "average":
        return [command, files.stale, files.net, "--data", files.data, *files.common, "-o", out]
    short = {"finetune": ["--epochs", "1"], "fix": ["--epochs", "1"]}.get(command, [])
    return [command, files.stale, "--data", files.data, *files.common, *short, "-o", out]


# --- help, version, usage ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(cli, command):
    outcome = cli(command, "--help")
    assert outcome.code == 0
    assert f"Example: bnfix {command}" in " ".join(outcome.out.split())
    assert outcome.err == ""


def test_version(cli):
    assert cli("--version").out.startswith("bnfix 0.")


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["fix"], "CKPT"),
        (["nonsense"], "nonsense"),
        (["fix", "a.pth", "--data", "b", "-o", "c.safetensors", "--nonsense"], "--nonsense"),
        (["convert", "a.pth"], "--out"),
        (["eval", "a.pth"], "--data"),
        (["eval", "--data", "x"], "CKPT"),
        (["convert", "a.pth", "-o", "b.safetensors", "--ghost-size", "many"], "--ghost-size"),
        (["fix", "a.pth", "--epochs", "1.5"], "'--epochs': '1.5', expected a whole number. See"),
        (["eval", "a.pth", "--data", "b", "--coverage", "abc"], "'abc', expected a number. See"),
        (["eval", "a.pth", "--data", "b", "--coverage"], "See bnfix eval --help."),
        (["eval", "a.pth", "--data", ""], "--data: the value is empty. Give one"),
        (["eval", "a.pth", "--data="], "--data: the value is empty. Give one"),
        (["eval", "", "--data", "b"], "CKPT: the value is empty. Give one"),
        (["fix", "a.pth", "--data", "b", "-o", ""], "-o: the value is empty. Give one"),
        (["eval", "a.pth", "--data", "b", "--mean", ""], "--mean: the value is empty. Give one"),
        (["eval", "a.pth", "--data", "b", "--max-bad", "nan"], "'nan', expected a whole number"),
        (["eval", "a.pth", "--data", "b", "--max-bad", "0.9"], "'0.9', expected a whole number"),
        (
            ["finetune", "a.pth", "--data", "b", "-o", "c.safetensors", "--consistency", "0.1"],
            "--consistency: 0.1, expected two numbers, 0 to 1000. See",
        ),
    ],
)
def test_wrong_usage_ends_with_2(cli, words, named):
    outcome = cli(*words)
    assert outcome.code == 2
    assert outcome.out == ""
    assert named in outcome.err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--statistics", "both"], "--statistics: 'both'"),
        (["--statistics", "train-batch"], "--train-batch-size"),
        (["--example-weight", "match"], "--train-batch-size"),
        (["--example-weight", "1.5"], "--example-weight: 1.5"),
        (["--example-weight", "nan"], "--example-weight"),
        (["--example-weight", "soon"], "fit-predictions, or a number from 0 to 1."),
        (["--max-bad", "-1"], "--max-bad: -1, expected a number of images, at least 0."),
        (["--granularity", "atom"], "--granularity"),
        (["--feed", "slowly"], "--feed"),
        (["--samples", "some"], "--samples: some"),
        (["--samples", "1"], "--samples: 1"),
        (["--samples", "2.5"], "--samples: 2.5"),
        (["--labels", "maybe"], "--labels"),
        (["--seed", "-1"], "--seed: -1"),
        (["--seed", str(2**64)], "--seed"),
        (["--z", "-1"], "--z: -1"),
        (["--z", "nan"], "--z: nan"),
        (["--z", "inf"], "--z: inf, expected a finite number."),
        (["--device", "tpu"], "--device: 'tpu'"),
        (["--device", "cuda:77"], "--device: 'cuda:77'"),
        (["--precision", "fp8"], "--precision"),
        (["--batch-size", "0"], "--batch-size: 0"),
        (["--workers", "-2"], "--workers: -2, expected at least -1."),
        (["--resize", "big"], "--resize: 'big'"),
        (["--crop", "0"], "--crop"),
        (["--mean", "a,b,c"], "--mean: 'a,b,c'"),
        (["--mean", "1,2"], "--mean: 2 numbers, expected 1 or 3, one per channel."),
        (["--std", "0"], "--std: 0.0, expected finite numbers above 0."),
        (["--mean", "nan"], "--mean: nan, expected finite numbers."),
        (["--scale", "1/0"], "--scale: '1/0', expected one number."),
        (["--interpolation", "magic"], "--interpolation"),
        (["--preset", "torchvision:ResNet50_Weights.NOPE"], "--preset"),
        (["--model-arg", "channels"], "--model-arg: 'channels'"),
    ],
)
def test_values_that_cannot_be_right_are_refused_as_usage(cli, files, tmp_path, words, named):
    out = tmp_path / "out.safetensors"
    outcome = cli("calibrate", files.net, "--data", files.data, *files.common, *words, "-o", out)
    assert outcome.code == 2
    assert named in outcome.message
    assert contents(tmp_path) == {}


# --- what is refused ---


class Runs:
    """Unpickling this would make a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch '{self.path}'",))


def test_a_pickle_with_code_in_it_is_not_run(cli, files, tmp_path):
    trace = tmp_path / "trace"
    for name, save in (("torch.pth", torch.save), ("plain.pth", _dump)):
        path = tmp_path / name
        save({"state_dict": torch.load(files.net, weights_only=True), "x": Runs(trace)}, path)
        outcome = cli("convert", path, "--model", files.spec, "-o", tmp_path / "out.safetensors")
        assert outcome.code == 1
        assert "system" in outcome.message
        assert cli("inspect", path).code == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plain.pth", "torch.pth"]


def _dump(value: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(value))


def test_files_that_cannot_be_used_are_refused_in_one_line(cli, files, tmp_path):
    state = torch.load(files.net, weights_only=True)
    good = tmp_path / "good.safetensors"
    save_file(state, good)
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-100])
    empty = tmp_path / "empty"
    empty.mkdir()
    many = tmp_path / "many.npz"
    images, labels = images_of(30, 0)
    np.savez(many, images=images, labels=labels + 2)
    nothing = tmp_path / "nothing.pth"
    nothing.write_bytes(b"")
    text = tmp_path / "text.pth"
    text.write_text("these are not the weights")
    before = contents(tmp_path)
    wide = files.spec.replace(":build", ":wide")
    cases = [
        (cut, files.spec, files.data, "cut.safetensors"),
        (nothing, files.spec, files.data, "nothing.pth"),
        (text, files.spec, files.data, "text.pth"),
        (tmp_path / "missing.pth", files.spec, files.data, "missing.pth"),
        (tmp_path, files.spec, files.data, "is a folder"),
        (good, wide, files.data, "6 problems"),
        (good, "torchvision:resnet5O", files.data, "resnet50"),
        (good, "torchvision:resnet18", files.data, "not in the model: bn2.bias"),
        (good, "nothing.py:build", files.data, "nothing.py"),
        (good, files.spec.replace(":build", ":bild"), files.data, "build"),
        (good, files.spec, empty, "no images"),
        (good, files.spec, many, "4"),
        (good, files.spec, tmp_path / "nowhere", "nowhere"),
        (good, files.spec, tmp_path / "text.pth", "text.pth"),
        (good, None, files.data, "--model"),
    ]
    for path, spec, data, named in cases:
        model = [] if spec is None else ["--model", spec]
        for command in ("calibrate", "finetune", "fix"):
            outcome = cli(command, path, *model, "--data", data, "-o", tmp_path / "out.safetensors")
            assert outcome.code == 1, (path, spec, data)
            assert named in outcome.message
        outcome = cli("eval", path, *model, "--data", data, "--report", tmp_path / "report")
        assert outcome.code == 1
        assert named in outcome.message
    assert contents(tmp_path) == before
    assert not (tmp_path / "report").exists()


def test_all_that_does_not_fit_is_listed_at_once(cli, files, tmp_path):
    state = torch.load(files.net, weights_only=True)
    state["extra"] = state.pop("fc.bias")
    state["fc.weight"] = torch.zeros(3, 11)
    torch.save(state, tmp_path / "odd.pth")
    fixed = files.spec.replace(":build", ":fixed")
    message = cli(
        "convert", tmp_path / "odd.pth", "--model", fixed, "-o", tmp_path / "o.safetensors"
    ).message
    for part in ("fc.bias", "missing", "extra", "not in the model", "(3, 11)", "(3, 12)"):
        assert part in message


@pytest.mark.parametrize("plan", [[], ["--plan"]])
@pytest.mark.parametrize("command", WRITING)
def test_an_existing_output_is_refused_before_any_work(cli, files, tmp_path, command, plan):
    out = tmp_path / "out.safetensors"
    for existing in (out, *(Path(f"{out}.report.{kind}") for kind in ("json", "md", "html"))):
        existing.write_text("mine")
        # Nothing else is right: had any work been started, it would have failed first.
        words = ["--data", "nowhere"] if command != "convert" else []
        words += ["also.pth"] if command == "average" else []
        outcome = cli(command, "missing.pth", "--model", "no:model", *words, "-o", out, *plan)
        assert outcome.code == 1
        assert f"{existing.name}: already exists" in outcome.message
        assert existing.read_text() == "mine"
        existing.unlink()


@pytest.mark.parametrize("command", WRITING)
def test_force_replaces_and_a_failure_keeps_the_old_file(cli, files, tmp_path, command):
    out = tmp_path / "out.safetensors"
    out.write_text("old")
    words = arguments(command, files, out)
    failing = [files.spec.replace(":build", ":wide") if w == files.spec else w for w in words]
    assert cli(*failing, "--force").code == 1
    assert contents(tmp_path) == {"out.safetensors": b"old"}
    assert cli(*words, "--force").code == 0
    assert out.read_bytes() != b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "out.safetensors",
        *(f"out.safetensors.report.{kind}" for kind in ("html", "json", "md")),
    ]


def test_a_file_may_replace_itself_and_a_link_is_a_file(cli, files, tmp_path):
    out, link = tmp_path / "out.safetensors", tmp_path / "link.safetensors"
    words = ["--model", files.spec, "--model-arg", "num_classes=3"]
    assert cli("convert", files.net, *words, "-o", out).code == 0
    link.symlink_to("nowhere")
    assert "already exists" in cli("convert", out, *words, "-o", link).message
    assert cli("convert", out, *words, "-o", out).code == 1
    assert cli("convert", out, *words, "-o", out, "--force").code == 0
    assert cli("inspect", out, "--json").json["history"][1]["command"] == "convert"


def test_a_model_argument_must_be_known_and_fit(cli, files, tmp_path):
    words = ["convert", files.net, "--model", files.spec, "-o", tmp_path / "o.safetensors"]
    assert "unknown argument depth" in cli(*words, "--model-arg", "depth=3").message
    assert "(4, 12) in the model" in cli(*words, "--model-arg", "num_classes=4").message
    assert list(tmp_path.iterdir()) == []


def test_outputs_of_other_forms(cli, files, tmp_path):
    """A mapping with logits will do; maps of logits will not, and that is said."""
    (tmp_path / "forms.py").write_text(
        (files.folder / "nets.py").read_text() + "\nclass Named(Net):\n"
        "    def forward(self, x):\n"
        "        return {'features': x, 'logits': super().forward(x)}\n"
        "\nclass Maps(Net):\n"
        "    def forward(self, x):\n"
        "        return self.bn1(self.conv1(x))\n"
        "\ndef named(): return Named(3)\n\ndef maps(): return Maps(3)\n"
    )
    data = ["--data", files.test, "--mean", "0.5", "--std", "0.25", "--json"]
    found = cli("eval", files.net, "--model", f"{tmp_path}/forms.py:named", *data).json
    plain = cli("eval", files.net, "--model", files.spec, *data).json
    assert found["models"][0]["nll"] == plain["models"][0]["nll"]
    outcome = cli("eval", files.net, "--model", f"{tmp_path}/forms.py:maps", *data)
    assert outcome.code == 1
    assert "expected logits (N, classes)" in outcome.message


@pytest.mark.parametrize("command", WRITING)
def test_places_that_cannot_be_written_are_refused_before_any_work(cli, files, tmp_path, command):
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o555)
    for out, named in (
        (closed / "out.safetensors", "read-only"),
        (tmp_path / "nowhere" / "out.safetensors", "does not exist"),
        (tmp_path / "out.pth", "out.safetensors"),
        (tmp_path, "expected a name"),
    ):
        outcome = cli(*arguments(command, files, out), "--plan")
        assert outcome.message == cli(*arguments(command, files, out)).message
        # A name of another kind is wrong usage; the place of a right one is only found closed.
        assert outcome.code == (1 if out.suffix == ".safetensors" else 2)
        assert named in outcome.message
    folder = tmp_path / "a.safetensors"
    folder.mkdir()
    assert "folder" in cli(*arguments(command, files, folder), "--force").message
    folder.rmdir()
    (tmp_path / "b.safetensors.report.md").mkdir()
    outcome = cli(*arguments(command, files, tmp_path / "b.safetensors"), "--force")
    assert "is a folder" in outcome.message
    assert contents(tmp_path) == {}


# --- the plan ---


@pytest.mark.parametrize("command", WRITING)
def test_a_plan_says_what_and_does_nothing(cli, files, tmp_path, command):
    before = contents(files.folder)
    out = tmp_path / "out.safetensors"
    outcome = cli(*arguments(command, files, out), "--plan")
    assert outcome.code == 0
    assert "nothing was" in outcome.out
    as_json = cli(*arguments(command, files, out), "--plan", "--json").json
    assert as_json["plan"] is True
    assert as_json["command"] == command
    if command != "convert":
        assert as_json["n_layers"] == 2
        assert sum(as_json["data"]["splits"].values()) == 180
        assert as_json["stages"] or command == "finetune"
    assert contents(tmp_path) == {}
    assert contents(files.folder) == before


def test_a_plan_refuses_what_the_run_refuses(cli, files, tmp_path):
    (tmp_path / "there.safetensors").write_text("mine")
    model = ["--model", files.spec]
    for words, where, said in (
        (["export", files.net, *model, "--to", "pt2"], "no/x.pt2", "no does not exist"),
        (["pool", files.net, files.net, *model], "there.safetensors", "already exists"),
        (["demo"], "there.safetensors", "is not a folder"),
        (["demo"], ".", "already exists"),
    ):
        done = cli(*words, "-o", tmp_path / where, "--plan")
        assert done.code == 1
        assert said in done.message
        assert done.err.endswith("See bnfix help output.\n")
        assert cli(*words, "-o", tmp_path / where).err == done.err


def test_a_plan_says_why_no_batch_could_be_run(cli, files, tmp_path):
    shutil.copytree(files.flat, tmp_path / "bad")
    for i in range(2):
        (tmp_path / "bad" / f"00{i}.png").write_text(f"no image {i}")
    words = ["--data", tmp_path / "bad", *files.common, "--batch-size", "1", "--plan"]
    for command, *more in (["calibrate", "-o", tmp_path / "o.safetensors"], ["eval"]):
        out = cli(command, files.net, *words, *more).out
        assert re.search(r"time unknown, no batch could be run: .*000\.png", out), out


def test_a_plan_of_eval_and_of_the_demo_does_nothing(cli, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["eval", files.net, files.stale, "--data", files.data, *files.common]
    plan = cli(*words, "--report", "report", "--plan", "--json").json
    assert plan["plan"] is True
    assert plan["data"] == {"spec": str(files.data), "n_examples": 180}
    assert "nothing was done" in cli(*words, "--plan").out
    assert "nothing was done" in cli("demo", "--plan").out
    assert cli("demo", "--plan", "--json").json["plan"] is True
    assert contents(tmp_path) == {}
    assert cli("eval", "missing.pth", "--data", files.data, "--plan").code == 1
    assert cli("eval", files.net, "--data", "missing", "--plan").code == 1


def test_the_plan_of_fix_counts_what_auto_would_try(cli, files, tmp_path):
    words = ["--data", files.data, *files.common, "-o", tmp_path / "o.safetensors", "--plan"]
    full = cli("fix", files.net, *words, "--json").json
    text = " ".join(full["stages"])
    for part in ("statistics", "fine-tuning", "example weight", "select", "test"):
        assert part in text
    bare = cli("fix", files.net, *words, "--train", "none", "--labels", "none", "--json").json
    (stage,) = bare["stages"]
    assert stage.startswith("population statistics (blend, sequential feed)")
    kept = cli("calibrate", files.net, *words, "--labels", "none", "--json").json
    assert kept["stages"] == []
    assert "--statistics population" in " ".join(bare["assumptions"])
    assert bare["data"]["splits"] == {"fit": 180, "select": 0, "test": 0}


# --- standard output ---


@pytest.mark.parametrize("command", WRITING)
def test_json_is_one_object_and_the_same_as_the_report_file(cli, files, tmp_path, command):
    out = tmp_path / "out.safetensors"
    outcome = cli(*arguments(command, files, out), "--json")
    found = outcome.json
    assert found["command"] == command
    assert found.pop("output") == str(out)
    assert found == json.loads(Path(f"{out}.report.json").read_text())
    assert "the user's file says hello" not in outcome.out


def test_quiet_prints_the_verdict_only(cli, files, tmp_path):
    words = ["--data", files.data, *files.common, "-q"]
    test = ["--test", files.test]
    outcome = cli("calibrate", files.stale, *words, *test, "-o", tmp_path / "o.safetensors")
    assert len(outcome.out.splitlines()) == 1
    assert outcome.out.startswith("better: ")
    assert [line for line in outcome.err.splitlines() if "the user's" not in line] == []
    assert len(cli("eval", files.net, *words).out.splitlines()) == 1


def test_notes_go_to_standard_error(cli, files, tmp_path):
    out = tmp_path / "o.safetensors"
    outcome = cli("calibrate", files.net, "--data", files.flat, *files.common, "-o", out)
    assert outcome.code == 0
    assert "--statistics population" in outcome.err
    assert "note:" not in outcome.out


def test_tables_are_not_cut_where_they_go_to_a_file(cli, files, tmp_path):
    deep = "a." * 60 + "bn"
    state = {f"{deep}.running_mean": torch.zeros(2), f"{deep}.running_var": torch.ones(2)}
    torch.save(state, tmp_path / "deep.pth")
    assert deep in cli("inspect", tmp_path / "deep.pth").out


def test_output_of_compiled_code_does_not_reach_standard_output(shell, files, tmp_path):
    (tmp_path / "loud.py").write_text(
        "import os, sys\n"
        "import torch\n"
        "os.write(1, b'from below\\n')\n"
        "os.system('echo from a child')\n"
        "print('from above')\n"
        "print('around', file=sys.__stdout__, flush=True)\n"
        + (files.folder / "nets.py").read_text()
    )
    outcome = shell(
        "eval", files.net, "--model", "loud.py:build", "--data", files.test, "--json", cwd=tmp_path
    )
    assert outcome.code == 0
    assert outcome.json["models"][0]["n_examples"] == 120
    for words in ("from below", "from a child", "from above", "around"):
        assert words in outcome.err


def test_an_error_of_the_users_forward_is_one_line_that_names_its_place(cli, files, tmp_path):
    (tmp_path / "own.py").write_text(
        "def forward(model, batch):\n    x, y, index = batch\n    return x.no_such_thing\n"
    )
    words = [
        "calibrate", files.stale, *files.common, "--data", files.data, "--batch-size", "4",
        "--forward", f"{tmp_path / 'own.py'}:forward", "-o", tmp_path / "out.safetensors",
    ]  # fmt: skip
    message = cli(*words).message
    assert "failed (AttributeError: 'Tensor' object has no attribute 'no_such_thing'" in message
    assert f"at {tmp_path / 'own.py'}:3)" in message
    assert "a batch, here (x=float32 1x3x8x8, y=int64 1, index=int64 1)." in message
    outcome = cli(*words, "--debug")
    assert outcome.err.count("Traceback") == 2
    assert outcome.err.splitlines()[-1] == f"{message} See bnfix help models."
    assert "Traceback" not in cli(*words).err


# --- interruption ---


@pytest.mark.parametrize("force", [False, True])
def test_an_interrupt_ends_with_130_and_leaves_nothing_half_done(files, tmp_path, force):
    (tmp_path / "slow.py").write_text(
        "import itertools, sys, time, torch\ncalls = itertools.count()\n"
        + (files.folder / "nets.py").read_text()
        + "\nclass Slow(Net):\n"
        "    def forward(self, x):\n"
        "        if next(calls) == 20:\n"
        "            print('running', file=sys.stderr, flush=True)\n"
        "            time.sleep(60)\n"
        "        return super().forward(x)\n"
        "\ndef slow(): return Slow(3)\n"
    )
    out = tmp_path / "out.safetensors"
    if force:
        out.write_text("old")
    command = command_of(
        "calibrate", files.net, "--model", "slow.py:slow", "--data", files.data, "-o", out,
        "--batch-size", "1", *(["--force"] if force else []),
    )  # fmt: skip
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stderr is not None
    for line in process.stderr:
        if "running" in line:
            break
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stdout == ""
    assert "Traceback" not in stderr
    assert stderr.splitlines()[-1] == "bnfix: interrupted."
    left = {p.name for p in tmp_path.iterdir()} - {"slow.py", "__pycache__"}
    assert left == ({"out.safetensors"} if force else set())
    assert not force or out.read_text() == "old"


def test_an_interrupt_that_an_import_turns_into_another_error_is_one_line(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    sum(range(10**6))\n"
        "except KeyboardInterrupt:\n"
        "    raise RecursionError('of the import') from None\n"
    )
    env = environment()
    env["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{env['PYTHONPATH']}"
    found = subprocess.run(
        command_of("inspect", "x"), env=env, capture_output=True, text=True, check=False
    )
    assert (found.returncode, found.stderr) == (130, "bnfix: interrupted.\n")


# --- where things are ---


def test_relative_paths_module_specs_and_options_on_either_side(shell, files, tmp_path):
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "nets.py").write_text((files.folder / "nets.py").read_text())
    for path in (files.net, files.data):
        (tmp_path / "my data" / path.name).write_bytes(path.read_bytes())
    outcome = shell(
        "calibrate", "--model", "nets.py:build", "--statistics", "population", "net.pth",
        "--example-weight", "keep", "--data", "data.npz", "-o", "out.safetensors",
        cwd=tmp_path / "my data",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "my data" / "out.safetensors").is_file()
    outcome = shell(
        "eval", "--data", "data.npz", "--model", "nets:build", "out.safetensors", "net.pth",
        "--report", "a report/", cwd=tmp_path / "my data",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert {p.name for p in (tmp_path / "my data" / "a report").iterdir()} == {
        "report.json", "report.md", "report.html"
    }  # fmt: skip


@pytest.mark.parametrize("name", ["folders", "table", "flat"])
def test_a_folder_may_end_in_a_slash(cli, files, name):
    data = getattr(files, name)
    outcome = cli("eval", files.net, "--data", f"{data}/", *files.common, "--json")
    found = outcome.json
    assert found["data"]["n_examples"] == 60
    assert (found["models"][0]["top1"] is None) == (name == "flat")


def test_the_same_images_give_the_same_numbers_from_every_kind_of_data(cli, files, tmp_path):
    images, labels = images_of(60, seed=2)
    np.savez(tmp_path / "same.npz", images=images, labels=labels)
    found = [
        cli("eval", files.net, "--data", data, *files.common, "--json").json["models"][0]
        for data in (files.folders, files.table, tmp_path / "same.npz")
    ]
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], rel=1e-6)
    assert found[0]["nll"] == pytest.approx(found[2]["nll"], rel=1e-6)
    assert found[0]["top1"] == found[1]["top1"] == found[2]["top1"]


@pytest.mark.parametrize(
    "words",
    [
        ["--resize", "16"],
        ["--resize", "12x16", "--crop", "10"],
        ["--crop", "24x24"],
        ["--crop", "6"],
        ["--mean", "0.485,0.456,0.406", "--std", "0.2"],
        ["--scale", "1/127.5", "--mean", "1"],
        ["--preset", "torchvision:ResNet18_Weights.IMAGENET1K_V1", "--resize", "8", "--crop", "8"],
        ["--device", "cpu"],
        ["--workers", "2"],
        ["--precision", "bf16"],
        ["--batch-size", "7"],
        ["--interpolation", "nearest", "--resize", "9"],
    ],
)
def test_preprocessing_and_run_options_are_accepted(cli, files, words):
    outcome = cli("eval", files.net, "--model", files.spec, "--data", files.folders, *words)
    assert outcome.code == 0, outcome.err


def test_an_input_that_the_model_cannot_take_is_named_by_its_shape(cli, files, tmp_path):
    big = tmp_path / "big.npz"
    np.savez(big, images=np.zeros((4, 320, 320, 3), np.uint8), labels=np.arange(4) % 3)
    out = tmp_path / "o.safetensors"
    outcome = cli("fix", files.net, "--data", big, *files.common, "-o", out)
    assert outcome.code == 1
    assert "1x3x320x320" in outcome.message


def test_a_model_that_fails_in_a_later_batch_is_stated_too(cli, files, tmp_path):
    (tmp_path / "picky.py").write_text(
        (files.folder / "nets.py").read_text() + "\nclass Picky(Net):\n"
        "    def forward(self, x):\n"
        "        if len(x) > 1:\n"
        "            raise RuntimeError('only one at a time\\nplease')\n"
        "        return super().forward(x)\n"
        "\ndef picky(): return Picky(3)\n"
    )
    words = ["--model", f"{tmp_path}/picky.py:picky", "--data", files.data]
    for outcome in (
        cli("eval", files.net, *words),
        cli("calibrate", files.net, *words, "-o", tmp_path / "o.safetensors"),
        cli("fix", files.net, *words, "-o", tmp_path / "o.safetensors"),
    ):
        assert outcome.code == 1
        assert "x3x8x8" in outcome.message
        assert "only one at a time" in outcome.message


def test_bad_images_are_left_out_and_counted_while_most_are_good(cli, files, tmp_path):
    data = tmp_path / "some bad"
    shutil.copytree(files.folders, data)
    (data / "class 1" / "notes.jpg").write_text("this is a text")
    words = ["eval", files.net, "--data", data, *files.common]
    found = cli(*words, "--json").json
    assert found["data"]["n_examples"] == 60
    assert found["data"]["n_skipped"] == 1
    assert "notes.jpg" in found["data"]["skipped"][0]
    assert "notes.jpg" in cli(*words).err
    for i in range(8):
        (data / "class 0" / f"bad{i}.png").write_text("x")
    outcome = cli(*words)
    assert outcome.code == 1
    assert "--max-bad" in outcome.message
    assert cli(*words, "--max-bad", "9").code == 0


# --- the demonstration ---


def test_the_demo_goes_the_whole_way_in_one_command(cli, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    outcome = cli("demo", "--json")
    found = outcome.json
    assert found["verdict"] == "better"
    assert found["models"][-1]["nll"] < found["models"][0]["nll"]
    folder = tmp_path / "bnfix-demo"
    fixed = folder / "digits_net.fixed.safetensors"
    assert {p.name for p in folder.iterdir()} == {
        "digits_net.safetensors", "digits-calibration.npz", "digits-test.npz", fixed.name,
        *(f"{fixed.name}.report.{kind}" for kind in ("json", "md", "html")),
    }  # fmt: skip
    # The command that it prints for copying replaces what lies there.
    by_hand = shlex.split(found["command_line"])[1:]
    assert by_hand[-1] == "--force"
    assert cli(*by_hand, "--plan", "--json").json["output"] == str(Path("bnfix-demo", fixed.name))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    outcome = cli("demo", "-o", tmp_path / "other")
    assert outcome.code == 1
    assert "already exists" in outcome.message
    assert list(contents(tmp_path / "other")) == ["thesis.txt"]
    assert cli("demo", "--plan").code == 0  # its own files are the same every time
    # What the demo wrote is ready for the other commands, by hand.
    words = ["--model", "bnfix.demo.network:digits_net", "--mean", "0.3061", "--std", "0.376"]
    words += ["--data", str(folder / "digits-test.npz"), "--json"]
    measured = cli("eval", folder / "digits_net.safetensors", fixed, *words).json
    assert measured["models"][1]["nll"] == pytest.approx(found["models"][-1]["nll"], rel=1e-5)
    assert measured["n_seen"] == 0


def test_every_kind_is_named_in_the_help(cli):
    text = " ".join(cli("convert", "--help").out.split())
    assert all(kind in text for kind in KINDS)


def test_a_bare_bnfix_shows_its_help_and_nothing_else() -> None:
    found = subprocess.run(
        [sys.executable, "-m", "bnfix"], env=environment(), capture_output=True, text=True,
        timeout=60, check=False,
    )  # fmt: skip
    assert (found.returncode, found.stderr) == (2, "")
    assert "Usage:" in found.stdout
    assert "calibrate" in found.stdout


def test_the_start_and_a_first_look_import_nothing_that_takes_seconds():
    code = (
        "import sys, torch, bnfix.cli.commands; from bnfix.core.memory import footprint; "
        "assert footprint(torch.nn.Conv2d(3, 4, 3), torch.zeros(2, 3, 8, 8)); "
        "print(*{'torchvision', 'torch._dynamo', 'scipy', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
