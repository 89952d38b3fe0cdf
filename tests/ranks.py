"""What test_processes.py starts in several processes: everything that the ranks do together."""

import copy
import sys

import numpy as np
import pytest
import torch

from bnfix import (
    NumericError,
    choose_example_weight_,
    evaluate,
    finetune_,
    recalibrate_,
    residuals,
    set_example_weight_,
    swap_norms_,
)
from bnfix.core import distributed
from bnfix.core.settings import FinetuneRecipe, WeightRecipe
from bnfix.norm.sites import find_norms
from tests.nets import lived_in, residual

N = 101


def examples():
    rng = np.random.default_rng(0)
    labels = np.arange(N) % 3
    x = rng.normal(size=(N, 3, 8, 8)) + 0.3 * labels[:, None, None, None]
    return torch.from_numpy(x).float(), torch.from_numpy(labels)


def cut(size):
    """Batches of uneven sizes, in one order for every number of processes."""
    positions, found = torch.arange(N), []
    sizes = [size, 1, size + 3]
    while len(positions):
        n = min(len(positions), sizes[len(found) % 3])
        found.append(positions[:n])
        positions = positions[n:]
    return found


def dealt(size=9):
    """Whole batches, each to one rank."""
    x, y = examples()
    place = distributed.here()
    return [(x[i], y[i]) for i in cut(size)[place.rank :: place.size]]


def padded():
    """Batches of which some columns are garbage; the lengths are the images' own."""
    found = []
    for x, y in dealt():
        lengths = 1 + (x[:, 0, 0, 0] > 0).long() + 3 * y
        keep = torch.arange(8) < lengths[:, None]
        found.append({"x": torch.where(keep[:, None, None], x, 9.0), "lengths": lengths})
    return found


def spoiled():
    """The same, with four of nine images in one colour."""
    return [(torch.where(torch.arange(len(x)).view(-1, 1, 1, 1) % 9 < 4, 0.1, x), y)
            for x, y in dealt()]  # fmt: skip


def sliced(k, size=9):
    """A part of every batch; the last one is of two examples."""
    x, y = examples()
    place = distributed.here()
    order = torch.randperm(N, generator=torch.Generator().manual_seed(k))
    found = [i[place.rank :: place.size] for i in order.split(size)]
    return [(x[i], y[i]) for i in found if len(i)]


def net():
    torch.manual_seed(0)
    model = lived_in(residual())
    swap_norms_(model)
    return model.eval()


def statistics(model):
    found = {}
    for site in find_norms(model):
        spread = (site.module.running_var.double() + 1e-5).sqrt()
        found[f"{site.name} mean"] = (site.module.running_mean.double() / spread).numpy()
        found[f"{site.name} var"] = spread.log().mul(2).numpy()
    return found


def everything():
    """Numbers by name, the same on every rank and for every number of ranks."""
    found = {}
    for feed, memory in (("batch", None), ("sequential", None), ("sequential", 0)):
        model = net()
        made = recalibrate_(model, dealt(), feed=feed, memory_bytes=memory)
        key = f"{feed} {made.how}"
        assert (made.n_examples, made.effort.n_processes) == (N, distributed.here().size)
        found |= {f"{key} {name}": value for name, value in statistics(model).items()}
        errors = [(layer.mean_se, layer.var_se, layer.n_values) for layer in made.layers]
        found[f"{key} errors"] = np.array(errors)
        found[f"{key} passes"] = np.array(made.passes)
        made = recalibrate_(masked := net(), padded(), feed=feed, memory_bytes=memory)
        found |= {f"{key} masked {name}": value for name, value in statistics(masked).items()}
        errors = [(layer.mean_se, layer.var_se, layer.n_values) for layer in made.layers]
        found[f"{key} masked errors"] = np.array(errors)
        rests = residuals(model, dealt())
        if feed == "sequential":
            assert max(map(max, rests.values())) < 1e-4
    for memory in (None, 0):
        damaged, original = net(), lived_in(net(), seed=3)
        damaged.conv1.weight.data[:, 0] = 0
        options = {"target": "reference", "reference": original, "memory_bytes": memory}
        recalibrate_(damaged, dealt(), **options)
        found |= {f"reference {memory} {name}": v for name, v in statistics(damaged).items()}
        mixed = net()
        recalibrate_(mixed, dealt(), target="blend", feed="sequential", memory_bytes=memory)
        found |= {f"blend {memory} {name}": v for name, v in statistics(mixed).items()}
        made = recalibrate_(mixed, spoiled(), robust=True, memory_bytes=memory)
        found[f"left out {memory}"] = np.array(made.trust.n_left_out)
        found |= {f"robust {memory} {name}": v for name, v in statistics(mixed).items()}
        shifted = [(2 * x + 1, y) for x, y in dealt(5)]
        shifted = shifted[: int(distributed.here().is_first)]  # the others have none of it
        recalibrate_(mixed := net(), [dealt(), shifted], mix=(1, 3), memory_bytes=memory)
        found |= {f"sources {memory} {name}": v for name, v in statistics(mixed).items()}
        mean, both = copy.deepcopy(damaged), {original: 1.0, lived_in(net(), seed=4): 3.0}
        options = {"target": "interpolated", "reference": both, "memory_bytes": memory}
        recalibrate_(mean, dealt(), **options)
        found |= {f"interpolated {memory} {name}": v for name, v in statistics(mean).items()}
    judged = evaluate(damaged, dealt(), reference=original)
    found["agreement"] = np.array([judged.top1, judged.nll, judged.examples.blind_loss])
    recipe = FinetuneRecipe(train="norms", epochs=1)
    tuned = finetune_(damaged, sliced, monitor=dealt(), reference=original, recipe=recipe)
    found["curve distilled"] = np.array([point.nll for point in tuned.curve])
    for name, value in damaged.named_parameters():
        found[f"tuned distilled {name}"] = value.detach().numpy()
    metrics = evaluate(model, dealt())
    found["logits"] = metrics.logits
    found["metrics"] = np.array([metrics.top1, metrics.nll, metrics.ece, metrics.brier])
    before = recalibrate_(net(), dealt(), samples="auto", tolerance=0.3)
    assert before.trust.is_enough
    assert before.n_examples <= N
    choice = choose_example_weight_(
        model, sliced, select=dealt(), monitor=dealt(), recipe=WeightRecipe(thin=0.0), z=0.0
    )
    found["candidate"] = np.array(choice.chosen)
    for name, weight in choice.weights.items():
        found[f"weight {name}"] = np.asarray(weight)
    model = net()
    set_example_weight_(model, 0.1)
    recipe = FinetuneRecipe(train="norms+head", epochs=2, accumulate=2, clip=1.0)
    tuned = finetune_(model, sliced, monitor=dealt(), recipe=recipe)
    found["curve"] = np.array([point.nll for point in tuned.curve])
    for name, value in model.named_parameters():
        found[f"tuned {name}"] = value.detach().numpy()
    # Training statistics are each rank's own; all end with the same model all the same.
    train = FinetuneRecipe(train="norms", statistics="train", epochs=1, batch_size=9)
    finetune_(model, sliced, monitor=dealt(), recipe=train)
    sums = torch.stack([value.double().sum() for value in model.state_dict().values()])
    assert all(torch.equal(sums, theirs) for theirs in distributed.gather(sums))
    return found


def fails():
    """One rank meets a value that is not finite: all are told the same."""
    batches = dealt()
    if distributed.here().rank == distributed.here().size - 1:
        batches[-1][0][0, 0, 0, 0] = float("nan")
    for feed in ("batch", "sequential"):
        with pytest.raises(NumericError, match="not finite in batch") as caught:
            recalibrate_(net(), batches, feed=feed)
        assert len(set(distributed.gather(str(caught.value)))) == 1


if __name__ == "__main__":
    torch.set_num_threads(1)
    with distributed.joined() as place:
        found = everything()
        fails()
        if place.is_first:
            np.savez(sys.argv[1], **found)
