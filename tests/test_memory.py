"""Batches that do not fit the memory: foreseen, met, halved, and said."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from bnfix.core import memory
from bnfix.core.memory import BatchSize, Footprint, LiveBytes, footprint, free_memory
from bnfix.core.settings import DataRecipe, ModelRecipe, RunOptions
from bnfix.jobs.session import Plan, open_workbench

MIB = 1 << 20
CPU = torch.device("cpu")


class Branches(nn.Module):
    """Holds its input, three copies of it, and something that no batch makes larger."""

    def forward(self, x):
        table = torch.zeros(MIB // 4)
        kept = [x + i for i in range(3)]
        return sum(kept).mean((2, 3)) + table[0]


class Small(nn.Module):
    """An accelerator that takes so many examples and not one more, as far as torch can tell."""

    def __init__(self, most):
        super().__init__()
        self.most, self.seen = most, []

    def forward(self, x):
        self.seen.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError("not that many")
        return x.mean((2, 3))


# --- the estimate ---


def test_the_most_that_is_held_is_counted_once_and_forgotten_when_freed():
    x = torch.zeros(MIB // 4)
    with LiveBytes(0) as live:
        y = x + 1
        z = y.view(2, -1)
        assert live.bytes == live.peak == MIB
        del y, z
        assert live.bytes == 0
        x + 1
        assert live.peak == MIB
        both = x + 1, x + 2
        assert live.bytes == live.peak == 2 * MIB
        del both


def test_a_tight_estimate_tells_what_grows_with_the_batch_from_what_does_not():
    x = torch.zeros(2, 4, 64, 64)  # 64 KiB an image
    found = footprint(Branches(), x, memory_bytes=1)
    # Input, copies, and their sum that is under way.
    assert 4 * 64 * 1024 <= found.an_example <= 6 * 64 * 1024
    assert MIB <= found.fixed < MIB + 1024
    assert found.of(10) == found.fixed + 10 * found.an_example


def test_an_estimate_with_room_to_spare_is_never_too_small():
    x = torch.zeros(2, 4, 64, 64)
    tight, wide = (footprint(Branches(), x, memory_bytes=n) for n in (1, 1 << 40))
    for n in (1, 8, 128):
        assert wide.of(n) >= tight.of(n)


def test_the_estimate_holds_for_the_batch_that_it_is_made_for():
    net, x = resnet18().eval(), torch.randn(16, 3, 64, 64)
    found = footprint(net, x, memory_bytes=1)
    with torch.no_grad(), LiveBytes(x.nbytes) as live:
        net(x)
    assert found.of(16) == pytest.approx(live.peak, rel=0.01)


def test_looking_leaves_model_and_randomness_as_they_were():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    state = torch.get_rng_state()
    assert footprint(net, (torch.randn(3, 3, 8, 8), torch.zeros(3)), memory_bytes=1) is not None
    assert all(module.training for module in net.modules())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    torch.set_rng_state(state)
    first = torch.rand(3)
    torch.set_rng_state(state)
    footprint(net, torch.zeros(3, 3, 8, 8), memory_bytes=1)
    assert torch.equal(torch.rand(3), first)


def test_a_single_example_is_enough_and_a_model_that_cannot_run_is_not_judged():
    assert footprint(Branches(), torch.zeros(1, 4, 8, 8), memory_bytes=1).fixed == 0
    assert footprint(nn.Linear(3, 3), torch.zeros(2, 5), memory_bytes=1) is None


def test_half_precision_holds_half():
    net, x = nn.Sequential(nn.Conv2d(3, 64, 1), nn.Conv2d(64, 64, 1)), torch.zeros(2, 3, 64, 64)
    full, half = (footprint(net, x, p, memory_bytes=1).an_example for p in ("fp32", "bf16"))
    assert half < 0.6 * full


# --- what is free ---


def system(folder, **content):
    paths = {
        "meminfo": "proc/meminfo",
        "most": "sys/fs/cgroup/memory.max",
        "now": "sys/fs/cgroup/memory.current",
        "stat": "sys/fs/cgroup/memory.stat",
        "old_most": "sys/fs/cgroup/memory/memory.limit_in_bytes",
        "old_now": "sys/fs/cgroup/memory/memory.usage_in_bytes",
    }
    for name, text in content.items():
        path = folder / paths[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


MEMINFO = "MemTotal:  4000 kB\nMemFree: 100 kB\nMemAvailable:  3000 kB\n"


def test_files_in_memory_make_room(tmp_path):
    assert free_memory(CPU, system(tmp_path, meminfo=MEMINFO)) == 3000 * 1024


@pytest.mark.parametrize(
    ("container", "expected"),
    [
        ({"most": "max\n", "now": "9\n"}, 3000 * 1024),
        ({"most": "1000000\n", "now": "400000\n"}, 600_000),
        ({"most": "900\n", "now": "400\n", "stat": "anon 5\ninactive_file 300\n"}, 800),
        ({"most": "1000\n", "now": "4000\n"}, 0),
        ({"old_most": "5000\n", "old_now": "400\n"}, 4600),
        ({"most": "1000\n", "now": "what\n"}, 3000 * 1024),
    ],
)
def test_a_container_has_less(tmp_path, container, expected):
    assert free_memory(CPU, system(tmp_path, meminfo=MEMINFO, **container)) == expected


def test_of_a_machine_without_these_files_nothing_is_known(tmp_path):
    assert free_memory(CPU, tmp_path) is None


def test_this_machine_has_something():
    found = free_memory(CPU)
    assert found is None or found > MIB


# --- giving way ---


@pytest.mark.parametrize(
    ("size", "free", "expected"),
    [(128, 1 << 30, 128), (128, 2560, 128), (128, 2559, 64), (27, 200, 7), (8, 0, 1), (1, 0, 1)],
)
def test_a_size_is_halved_until_half_of_the_memory_holds_it(size, free, expected):
    notes = []
    found = BatchSize(size, "--batch-size", notes)
    found.foresee(Footprint(0, 10, free))
    assert found.size == expected
    assert len(notes) == (expected != size)
    if notes:
        assert notes[0].startswith(f"--batch-size: batches of {expected} instead of {size}, since")
        assert notes[0].endswith("GiB of free memory.")


def test_a_stated_size_is_left_and_so_is_one_of_which_nothing_is_known():
    notes = []
    stated = BatchSize(64, "--batch-size", notes, gives_way=False)
    stated.foresee(Footprint(0, 10, 0))
    unknown = BatchSize(64, "--batch-size", notes)
    unknown.foresee(None)
    assert (stated.size, unknown.size, notes) == (64, 64, [])


def test_what_does_not_fit_is_halved_until_it_does():
    notes, net = [], Small(5)
    size = BatchSize(32, "evaluation", notes)
    assert size.run(lambda n: net(torch.zeros(n, 3, 2, 2))).shape == (4, 3)
    assert net.seen == [32, 16, 8, 4]
    assert size.size == 4
    # One sentence, whatever the way to it.
    assert len(notes) == 1
    assert notes[0] == (
        "evaluation: batches of 4 instead of 32, since 8 at once did not fit in memory."
    )
    # What is known is not tried again.
    size.run(lambda n: net(torch.zeros(n, 3, 2, 2)))
    assert net.seen[4:] == [4]


@pytest.mark.parametrize(("most", "gives_way", "tried"), [(0, True, [4, 2, 1]), (3, False, [4])])
def test_what_cannot_give_way_fails_as_before(most, gives_way, tried):
    net = Small(most)
    size = BatchSize(4, "evaluation", [], gives_way=gives_way)
    with pytest.raises(torch.OutOfMemoryError, match="not that many"):
        size.run(lambda n: net(torch.zeros(n, 3, 2, 2)))
    assert net.seen == tried


def test_other_errors_are_no_reason_to_give_way():
    def broken(_):
        raise ValueError("something else")

    size = BatchSize(4, "evaluation", [])
    with pytest.raises(ValueError, match="something else"):
        size.run(broken)
    assert size.size == 4


# --- in the commands ---


def bench_of(files, batch_size=None):
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(mean=(0.5,), std=(0.25,)),
        run=RunOptions("cpu", batch_size=batch_size, workers=0),
    )
    return open_workbench(files.net, str(files.data), plan, (0.6, 0.2, 0.2))


def sizes(bench):
    return [len(batch.x) for batch in bench.batches(np.arange(100), "a look")]


def test_where_there_is_room_nothing_changes_and_nothing_is_said(files):
    bench = bench_of(files)
    assert bench.evaluation.size == 128
    assert not [note for note in bench.assumptions if "batches of" in note]


def test_where_there_is_none_the_bench_has_smaller_batches_and_says_so(files, monkeypatch):
    room = 2 * bench_of(files).footprint.of(32)
    monkeypatch.setattr(memory, "free_memory", lambda device: room)
    bench = bench_of(files)
    assert sizes(bench) == [32, 32, 32, 4]
    (note,) = [note for note in bench.assumptions if "batches of" in note]
    assert note.startswith("--batch-size: batches of 32 instead of 128, since a forward pass of")
    room = 1
    assert sizes(bench_of(files, batch_size=100)) == [100]


#: The network of the files, on a device that holds so many examples.
TIGHT = """
import importlib.util

import torch

spec = importlib.util.spec_from_file_location("nets_of_the_files", NETS)
nets = importlib.util.module_from_spec(spec)
spec.loader.exec_module(nets)


class Tight(nets.Net):
    def forward(self, x):
        if len(x) > MOST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
        return super().forward(x)


def build(num_classes=3):
    return Tight(num_classes)
"""


@pytest.fixture
def tight(files, tmp_path):
    """Spec of the network that takes no more than so many examples at once."""

    def of(most):
        nets = files.spec.rpartition(":")[0]
        path = tmp_path / f"tight{most}.py"
        path.write_text(TIGHT.replace("NETS", repr(str(nets))).replace("MOST", str(most)))
        return f"{path}:build"

    return of


PHOTOS = ("--mean", "0.5", "--std", "0.25", "--workers", "0")


def calibrated(cli, files, spec, out, *words):
    stated = ["--statistics", "population", "--example-weight", "keep"]
    given = ["--data", files.data, "--test", files.test, "--model", spec, *PHOTOS]
    outcome = cli("calibrate", files.net, *given, *stated, *words, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json


def test_a_calibration_gives_way_and_names_it(cli, files, tight, tmp_path):
    wide = calibrated(cli, files, tight(1000), tmp_path / "wide.safetensors")
    found = calibrated(cli, files, tight(40), tmp_path / "tight.safetensors")
    assert wide["calibration"]["n_batches"] == 2
    assert found["calibration"]["n_batches"] == 6  # of 32
    told = [note for note in found["assumptions"] if "did not fit in memory" in note]
    assert told == [
        "population statistics: batches of 32 instead of 128, since 64 at once did not fit in "
        "memory; with the batch feed this changes the statistics slightly.",
        "--batch-size: batches of 32 instead of 128, since 64 at once did not fit in memory.",
    ]
    assert not [note for note in wide["assumptions"] if "did not fit" in note]
    assert found["models"][1]["nll"] == pytest.approx(wide["models"][1]["nll"], rel=0.05)
    assert "did not fit in memory" in (tmp_path / "tight.safetensors.report.md").read_text()


def test_a_stated_batch_size_of_evaluation_is_left_and_fails_in_one_line(
    cli, files, tight, tmp_path
):
    given = ["--data", files.data, "--model", tight(40), *PHOTOS, "--batch-size", "60"]
    outcome = cli("eval", files.net, *given, "--report", tmp_path / "report")
    assert outcome.code == 1
    assert "memory" in outcome.message


def test_an_evaluation_gives_way_to_the_same_numbers(cli, files, tight, tmp_path):
    found = []
    for most in (1000, 40):
        given = ["--data", files.data, "--model", tight(most), *PHOTOS]
        folder = tmp_path / f"report{most}"
        outcome = cli("eval", files.net, *given, "--report", folder, "--json")
        assert outcome.code == 0, outcome.err
        found.append(json.loads((folder / "report.json").read_text()))
    wide, narrow = found
    assert narrow["models"][0]["top1"] == wide["models"][0]["top1"]
    assert narrow["models"][0]["nll"] == pytest.approx(wide["models"][0]["nll"], rel=1e-5)
    told = [note for note in narrow["assumptions"] if "did not fit in memory" in note]
    assert told == [
        "--batch-size: batches of 32 instead of 128, since 64 at once did not fit in memory."
    ]
    assert not [note for note in wide["assumptions"] if "did not fit" in note]
