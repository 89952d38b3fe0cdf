"""Plans that say what they would cost: passes as they are taken, and nothing changed."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bnfix.cli.tables import duration_words
from bnfix.core.runtime import n_examples_of
from bnfix.core.settings import (
    DataRecipe,
    FinetuneRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    WeightRecipe,
)
from bnfix.jobs.inputs import silent
from bnfix.jobs.plan import estimated
from bnfix.jobs.run import execute
from bnfix.jobs.session import Plan
from bnfix.jobs.steps import Work, open_plan, resolve, work_of

TUNED = FinetuneRecipe(train="norms+head", example_weight="learn", epochs=1)


def opened(files, track=silent, **settings):
    plan = Plan(
        model=ModelRecipe(files.spec),
        source=DataRecipe(mean=(0.5,) * 3, std=(0.25,) * 3),
        run=RunOptions("cpu", workers=0),
        **settings,
    )
    return open_plan(plan, files.stale, str(files.data), None, track)


def head_of(stage):
    """The kind of a stage: of "2/5 select: the input" it is select."""
    return stage.split("/", 1)[-1].lstrip("0123456789 ").replace(":", " ").split(" ", 1)[0]


@pytest.mark.parametrize(
    "settings",
    [
        {"finetune": None},
        {"finetune": TUNED},
        {"command": "finetune", "finetune": FinetuneRecipe(epochs=2)},
        {
            "command": "calibrate",
            "finetune": None,
            "statistics": StatisticsRecipe(statistics="population"),
        },
    ],
    ids=["statistics and weights", "fix", "finetune", "stated"],
)
def test_passes_are_counted_about_as_they_are_taken(files, settings):
    seen: Counter[str] = Counter()

    def track(stage, batches, n):
        for batch in batches:
            seen[head_of(stage)] += n_examples_of(batch)
            yield batch

    bench = opened(files, track, **settings)
    work = work_of(bench.plan, bench)
    execute(bench)
    planned: Counter[str] = Counter()
    for one in work:
        planned[head_of(one.stage)] += round(one.examples * one.passes)
    taken, counted = sum(seen.values()), sum(planned.values())
    assert 0.5 < counted / taken < 1.6, (seen, planned)
    for head in ("fine-tuning", "test"):
        assert planned[head] == pytest.approx(seen[head], rel=0.35), (seen, planned)


def test_an_estimate_changes_nothing(files):
    bench = opened(files, finetune=TUNED)
    model = bench.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    grads = [(p.requires_grad, p.grad) for p in model.parameters()]
    state = torch.get_rng_state()
    notes = list(bench.assumptions)
    found = estimated(bench, work_of(bench.plan, bench))
    low, high = found["seconds_estimated"]
    assert 0 < low < high < 600
    assert found["memory_estimated_bytes"] > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == grads
    assert bench.assumptions == notes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_twice_the_work_takes_about_twice_as_long(files):
    bench = opened(files)
    once, often = (
        estimated(bench, [Work("x", 180, passes, "training")])["seconds_estimated"][1]
        for passes in (50, 5000)
    )
    assert once < often / 5


def test_the_plans_of_all_commands_state_what_they_cost(cli, files, tmp_path):
    out = tmp_path / "out.safetensors"
    data = ["--data", files.data, *files.common]
    for words in (
        ["fix", files.stale, *data, "-o", out],
        ["calibrate", files.stale, *data, "-o", out],
        ["eval", files.net, files.stale, *data],
        ["convert", files.net, "--model", files.spec, "-o", out],
    ):
        plan = cli(*words, "--plan", "--json").json
        low, high = plan["seconds_estimated"]
        assert 0 <= low <= high
        assert plan["memory_estimated_bytes"] > 1 << 20
        assert plan["passes"] >= (0 if words[0] == "convert" else 2)
        assert "on this machine" in cli(*words, "--plan").out
    exported = ["export", files.net, "--model", files.spec, "--to", "pt2", "-o", tmp_path / "x.pt2"]
    assert cli(*exported, "--plan", "--json").json["seconds_estimated"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        ((0.2, 0.7), "a second or less"),
        ((1.5, 4.5), "1.5 to 4.5 seconds"),
        ((20, 60), "20 to 60 seconds"),
        ((130, 250), "2.2 to 4.2 minutes"),
        ((120, 1200), "2 to 20 minutes"),
        ((7200, 36000), "2 to 10 hours"),
        ((3.0, 3.0), "3 seconds"),
    ],
)
def test_a_range_of_time_in_words(seconds, words):
    assert duration_words(*seconds) == words


def test_only_a_gated_fine_tuning_is_counted_on_the_select_split():
    def passes_of(plan):
        return [work.stage for step in resolve(plan, None) for work in step.work]

    assert "select: fine-tuned" in passes_of(Plan())
    alone = passes_of(Plan(command="finetune", finetune=FinetuneRecipe()))
    assert "fine-tuning norms" in alone
    assert "select: fine-tuned" not in alone


@pytest.mark.parametrize(("granularity", "levels"), [("global", 1), ("layer", 2), ("channel", 3)])
def test_every_level_of_weights_is_counted_on_the_select_split(granularity, levels):
    plan = Plan(weight=WeightRecipe(granularity=granularity), finetune=None)
    passes = {work.stage: work.passes for step in resolve(plan, None) for work in step.work}
    assert passes["select: example weight"] == levels
    assert ("example weight: per channel" in passes) == (granularity == "channel")
