"""Where the time of a calibration went: data, forward passes, statistics."""

import itertools
import time

import pytest
import torch
from torch import nn

from bnfix.recalibrate.collector import Cost
from bnfix.recalibrate.recalibrate import recalibrate_
from bnfix.report.records import Trials, done

NAP = 0.02
N_BATCHES = 4


class Slow(nn.Module):
    """Takes its time, and changes nothing."""

    def forward(self, x):
        time.sleep(NAP)
        return x


class SlowBatches:
    """Take their time, every time that they are gone through."""

    def __init__(self, n=N_BATCHES, nap=NAP):
        self.n, self.nap = n, nap

    def __iter__(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(self.n):
            time.sleep(self.nap)
            yield torch.randn(3, 3, 6, 6, generator=generator)


def net(between=None):
    torch.manual_seed(0)
    middle = nn.Identity() if between is None else between
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), middle, nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    ).eval()


WAYS = [
    pytest.param({"feed": "batch"}, 1, id="batch"),
    pytest.param({"feed": "sequential"}, 1, id="walk"),
    # One pass of the batch feed, and one for the second of two layers.
    pytest.param({"feed": "sequential", "memory_bytes": 0}, 2, id="passes"),
]


def whole(cost):
    return cost.data + cost.forward + cost.statistics


@pytest.mark.parametrize(("options", "n_passes"), WAYS)
def test_waiting_for_data_is_data_in_every_pass(options, n_passes):
    found = recalibrate_(net(), SlowBatches(), **options)
    assert found.effort.cost.data >= n_passes * N_BATCHES * NAP
    assert whole(found.effort.cost) <= found.effort.seconds


@pytest.mark.parametrize(("options", "n_passes"), WAYS)
def test_a_slow_network_is_forward(options, n_passes):
    found = recalibrate_(net(Slow()), SlowBatches(nap=0), **options)
    assert found.effort.cost.forward >= n_passes * N_BATCHES * NAP
    assert whole(found.effort.cost) <= found.effort.seconds


@pytest.mark.parametrize(("options", "n_passes"), WAYS)
def test_many_values_are_statistics_and_little_is_left_over(options, n_passes):
    torch.manual_seed(0)
    layers = nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8), nn.BatchNorm2d(8)).eval()
    batches = [torch.randn(8, 8, 128, 128) for _ in range(4)]
    # Times of a few milliseconds: other programs on the machine may spoil one, not five.
    runs = (recalibrate_(layers, batches, **options) for _ in range(5))
    found = next(run for run in runs if run.effort.cost.statistics > 0.02 * run.effort.seconds)
    assert 0.5 * found.effort.seconds < whole(found.effort.cost) <= found.effort.seconds


def test_measuring_changes_no_bit_of_the_order_and_asks_for_no_batch_too_many():
    asked = []

    def endless():
        for i in itertools.count():
            asked.append(i)
            yield torch.randn(3, 3, 6, 6)

    found = recalibrate_(net(), endless(), samples=7)
    assert found.n_examples == 9
    assert asked == [0, 1, 2]


def test_examples_a_second_count_every_pass():
    found = recalibrate_(net(), SlowBatches(), feed="sequential", memory_bytes=0)
    assert found.passes == 2.0
    assert found.effort.examples_per_second == pytest.approx(
        2 * found.n_examples / found.effort.seconds
    )


def test_a_run_that_goes_on_from_another_states_no_speed(tmp_path):
    recalibrate_(net(), SlowBatches(), state=tmp_path)
    again = recalibrate_(net(), SlowBatches(), state=tmp_path)
    assert again.effort.n_resumed == 3 * N_BATCHES
    assert again.effort.examples_per_second is None
    assert "images per second" not in " ".join(done(None, Trials(calibration=again)))
    # Nothing was read again, and nothing run.
    assert again.effort.cost.data == again.effort.cost.forward == 0


def test_an_interrupted_pass_is_counted_up_to_there():
    cost = Cost()

    def broken():
        time.sleep(NAP)
        yield 1
        time.sleep(NAP)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(cost.reading(broken()))
    with pytest.raises(OSError, match="disk"), cost.of("forward"), cost.of("statistics"):
        list(broken())
    assert cost.data >= 2 * NAP
    assert cost.statistics >= 2 * NAP
    assert 0 <= cost.forward < cost.statistics


def test_nothing_is_said_of_what_was_not_measured():
    found = recalibrate_(net(), SlowBatches())
    assert "forward passes" in " ".join(done(None, Trials(calibration=found)))
    object.__setattr__(found.effort, "cost", Cost())
    assert "forward passes" not in " ".join(done(None, Trials(calibration=found)))


def test_all_three_forms_of_the_report_say_it(files, cli, tmp_path):
    out = tmp_path / "out.safetensors"
    words = ["--statistics", "population", "--example-weight", "keep", *files.common]
    outcome = cli("calibrate", files.net, "--data", files.data, *words, "-o", out, "--json")
    assert outcome.code == 0, outcome.err
    found = outcome.json["calibration"]
    assert set(found["cost"]) == {"data", "forward", "statistics"}
    assert 0 < sum(found["cost"].values()) <= found["seconds"]
    assert found["examples_per_second"] > 0
    for kind in ("md", "html"):
        text = out.with_name(f"{out.name}.report.{kind}").read_text()
        assert "Reading data took" in text
        assert "images per second" in text
