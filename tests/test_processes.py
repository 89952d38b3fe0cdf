"""Several real processes, over gloo: the same answers as one, and what happens when one dies."""

import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bnfix.core import distributed
from bnfix.core.distributed import interleaved, launched
from bnfix.core.errors import BnfixError, ConfigError, DataError
from tests import ranks
from tests.forks import Copy

ROOT = Path(__file__).resolve().parents[1]


def port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(size, *command, new=0, **more):
    """Each rank as a process of its own, without a launcher that would look after them.

    The first `new` are Python processes from the start; the others are copies of one.
    """
    common = {
        **os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port()), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", **more,
    }  # fmt: skip
    words, started = [str(word) for word in command], []
    for rank in range(size):
        env = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank >= new:
            started.append(Copy(words, env))
            continue
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *words], env=env, **pipes))
    return started


@pytest.fixture(autouse=True)
def nothing_goes_on():
    yield
    for child in multiprocessing.active_children():
        child.kill()


def ended(started, seconds=120):
    outputs = [process.communicate(timeout=seconds) for process in started]
    return [process.returncode for process in started], outputs


@pytest.fixture(scope="module")
def alone():
    return ranks.everything()


@pytest.mark.parametrize("size", [2, 3, 4])
def test_any_number_of_processes_gives_the_answers_of_one(size, alone, tmp_path):
    # Another order of sets in one of two must not lead to other decisions.
    new = 1 if size == 2 else 0
    started = start(size, ROOT / "tests" / "ranks.py", tmp_path / "found.npz", new=new)
    codes, outputs = ended(started)
    assert codes == [0] * size, outputs
    found = np.load(tmp_path / "found.npz")
    assert set(found) == set(alone)
    for name, expected in alone.items():
        if name == "candidate":
            assert found[name] == expected == "channel"
        elif name.startswith("weight"):
            np.testing.assert_allclose(found[name], expected, atol=1e-3, err_msg=name)
        elif name.startswith(("tuned", "curve")):
            np.testing.assert_allclose(found[name], expected, atol=2e-4, err_msg=name)
        elif name in ("logits", "metrics"):
            np.testing.assert_allclose(found[name], expected, atol=1e-6, err_msg=name)
        else:
            np.testing.assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


NET = """
import os
import time
from torch import nn
from tests.nets import residual, lived_in

class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = residual(4, 3)

    def forward(self, x):
        time.sleep(float(os.environ.get("SECONDS_A_BATCH", "0")))
        return self.net(x)

def build():
    return Slow()

def synchronized():
    return nn.SyncBatchNorm.convert_sync_batchnorm(residual(4, 3))
"""


@pytest.fixture
def files(tmp_path):
    """A checkpoint, 101 images, and a model that takes its time where it is asked to."""
    torch.manual_seed(0)
    (tmp_path / "net.py").write_text(NET)
    net = ranks.lived_in(ranks.residual(4, 3), seed=3)
    torch.save(
        {f"net.{name}": value for name, value in net.state_dict().items()}, tmp_path / "a.pth"
    )
    torch.save(net.state_dict(), tmp_path / "plain.pth")
    rng = np.random.default_rng(0)
    labels = np.arange(101) % 3
    images = rng.integers(0, 200, (101, 8, 8, 3)) + 20 * labels[:, None, None, None]
    np.savez(tmp_path / "d.npz", images=images.astype(np.uint8), labels=labels)
    return tmp_path


def calibrating(files, out, *options, size=2, seconds="0"):
    return start(
        size, "-m", "bnfix", "calibrate", files / "a.pth", "--model", f"{files / 'net.py'}:build",
        "--data", files / "d.npz", "--statistics", "population", "--example-weight", "keep",
        "--batch-size", "3", "-o", files / out, *options,
        SECONDS_A_BATCH=seconds,
    )  # fmt: skip


def test_a_killed_rank_ends_the_other_and_the_rerun_goes_on(files):
    state = ("--state", files / "state")
    (whole,) = calibrating(files, "whole.safetensors", size=1)
    assert ended([whole])[0] == [0]
    started = calibrating(files, "out.safetensors", *state, seconds="0.15")
    deadline = time.monotonic() + 60
    while len(list((files / "state").glob("calibration-*of2.pt"))) < 2:
        assert time.monotonic() < deadline
        assert started[1].poll() is None
        time.sleep(0.02)
    before = {path.name for path in files.iterdir()}
    started[1].send_signal(signal.SIGKILL)
    codes, outputs = ended(started, 60)
    assert codes[0] == 1
    assert codes[1] == -signal.SIGKILL
    assert re.search(
        r"bnfix: processes: rank 0 lost the others .* nothing was written", outputs[0][1]
    )
    assert "Traceback" not in outputs[0][1]
    assert {path.name for path in files.iterdir()} == before
    assert not (files / "out.safetensors").exists()
    again = calibrating(files, "out.safetensors", *state)
    codes, outputs = ended(again, 60)
    assert codes == [0, 0], outputs
    report = json.loads((files / "out.safetensors.report.json").read_text())
    notes = " ".join(report["assumptions"])
    assert int(re.search(r"(\d+) examples were not run again", notes)[1]) > 0
    found, expected = (load_file(files / f"{n}.safetensors") for n in ("out", "whole"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=1e-6, msg=name)


def test_a_resumed_calibration_alone_is_the_same_bit_for_bit(files):
    state = ("--state", files / "state", "--feed", "sequential")
    kept = ("--state", files / "s")
    (slow,) = calibrating(files, "out.safetensors", *kept, size=1, seconds="0.15")
    while not list(files.glob("s/*")):
        assert slow.poll() is None
        time.sleep(0.02)
    slow.kill()
    assert ended([slow])[0] == [-signal.SIGKILL]
    for out, options in (("out", kept), ("plain", ()), ("walk", state)):
        (run,) = calibrating(files, f"{out}.safetensors", *options, size=1)
        assert ended([run])[0] == [0]
    found, expected = (load_file(files / f"{n}.safetensors") for n in ("out", "plain"))
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_an_error_is_said_once_and_nothing_is_written(files):
    started = start(
        2, "-m", "bnfix", "calibrate", files / "a.pth", "--model", f"{files / 'net.py'}:build",
        "--data", files / "nowhere.npz", "-o", files / "out.safetensors",
    )  # fmt: skip
    codes, outputs = ended(started)
    assert codes == [1, 1]
    assert sum("nowhere.npz" in error for _, error in outputs) == 1
    assert not any("Traceback" in error for _, error in outputs)
    assert not (files / "out.safetensors").exists()


def test_torchrun_with_a_synchronized_model(files):
    """The launcher itself; layers that would need the others in training are calibrated too."""
    out = files / "out.safetensors"
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
            "--master-port", str(port()), "-m", "bnfix", "fix", files / "plain.pth", "--model",
            f"{files / 'net.py'}:synchronized", "--data", files / "d.npz", "--json", "-o", out,
        ],
        capture_output=True, text=True, timeout=240, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert content["data"]["n_examples"] == 101
    assert content["output"] == str(out)
    assert "2 processes shared the work" in " ".join(content["assumptions"])
    assert set(load_file(out)) == set(torch.load(files / "plain.pth"))


def test_commands_for_one_process_say_so(files):
    codes, outputs = ended(start(2, "-m", "bnfix", "inspect", files / "plain.pth"))
    assert codes == [2, 2]
    assert "bnfix: this command works in one process" in outputs[0][1]


def test_nothing_is_shared_outside_joined(monkeypatch):
    """A program that uses torch.distributed for itself may call bnfix on one rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert distributed.here() == distributed.Place()
    assert distributed.gather("x") == ["x"]
    assert list(distributed.in_step([1, 2])) == [1, 2]
    assert launched() == distributed.Place(1, 2)
    with pytest.raises(DataError, match="as it was said"):
        distributed.together(lambda: (_ for _ in ()).throw(DataError("as it was said")))


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("RANK", "2"), ("WORLD_SIZE", "")])
def test_a_launch_that_cannot_be_is_refused(monkeypatch, name, value):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"environment: .*RANK"):
        launched()


def test_what_was_dealt_is_put_together_in_order():
    assert interleaved([[0, 3, 6], [1, 4], [2, 5]]) == list(range(7))
    assert interleaved([[0], [1], []]) == [0, 1]


def test_errors_can_be_sent():
    """Other ranks raise what one has met, with all that it says."""
    import pickle

    error = pickle.loads(pickle.dumps(DataError("where: what.", name="bn", path="a/b.png")))
    assert isinstance(error, BnfixError)
    assert (error.name, str(error.path)) == ("bn", "a/b.png")


def test_processes_may_join_again():
    code = """
from bnfix.core import distributed
for round in range(3):
    with distributed.joined() as place:
        assert distributed.gather((round, place.rank)) == [(round, 0), (round, 1)]
print("done")
"""
    codes, outputs = ended(start(2, "-c", code), seconds=60)
    assert codes == [0, 0], outputs
    assert [out for out, _ in outputs] == ["done\n"] * 2
