"""The same seed, the same answer: whatever the processes that read, or the batch of evaluation."""

import pytest
import torch

import bnfix
from bnfix.core.settings import DataRecipe, GateRecipe, RunOptions, WeightRecipe
from bnfix.demo import SPEC, write_files
from bnfix.jobs.session import Plan


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return write_files(tmp_path_factory.mktemp("demo"))


@pytest.fixture(scope="module")
def calibrate(files):
    def run(workers=0, batch_size=None, seed=2):
        plan = Plan(
            source=DataRecipe(mean=(0.3061,), std=(0.376,)),
            weight=WeightRecipe(),
            gate=GateRecipe(fit=0.75, select=0.25, seed=seed),
            run=RunOptions(device="cpu", workers=workers, batch_size=batch_size),
        )
        data = str(files.calibration)
        return bnfix.calibrate(files.checkpoint, data=data, model=SPEC, plan=plan)

    return run


@pytest.fixture(scope="module")
def first(calibrate):
    return calibrate()


def numbers(result):
    return [(d.candidate, d.nll, d.top1, d.admitted) for d in result.report.decisions]


def test_the_processes_that_read_change_no_bit(first, calibrate):
    again = calibrate(workers=2)
    old, new = first.model.state_dict(), again.model.state_dict()
    assert old.keys() == new.keys()
    for name in old:
        assert torch.equal(old[name], new[name]), name
    assert numbers(first) == numbers(again)
    assert first.report.trials.choice.weights == again.report.trials.choice.weights
    # And it is not the trivial answer that is repeated.
    assert first.report.trials.choice.chosen != "keep"


@pytest.mark.parametrize("batch_size", [7, 100])
def test_another_batch_of_evaluation_finds_the_same(first, calibrate, batch_size):
    again = calibrate(batch_size=batch_size)
    assert [n[::3] for n in numbers(first)] == [n[::3] for n in numbers(again)]
    assert first.report.trials.choice.chosen == again.report.trials.choice.chosen
    for (name, old), new in zip(
        first.model.state_dict().items(), again.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(old, new, atol=1e-3, rtol=1e-3, msg=name)


def test_another_seed_is_another_cut(first, calibrate):
    assert numbers(calibrate(seed=3)) != numbers(first)


def test_the_cost_is_in_the_record(first):
    choice = first.report.trials.choice
    assert 0 < choice.passes <= 15
    assert choice.clock_passes > 0
    assert choice.seconds > 0
