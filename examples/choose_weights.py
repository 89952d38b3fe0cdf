"""Choose how much each example counts in its own statistics, by held-out labels, without training.

Three levels are tried: one weight for the model, one per layer, one per channel. A level is kept
only if it beats the current model on held-out batches.
"""

import torch

import bnfix
from bnfix import demo
from bnfix.demo.network import digits_net


def batches(part: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (x, y), in random order, normalized as in training."""
    images, labels = (torch.from_numpy(array) for array in demo.digits(part))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    x = (images[order].unsqueeze(1).float() / 255 - 0.3061) / 0.3760
    return list(zip(x.split(25), labels[order].split(25), strict=True))


with demo.checkpoint_path() as path:
    model = bnfix.load(path, model=digits_net())
bnfix.swap_norms_(model)

before = bnfix.evaluate(model, batches("test"))
choice = bnfix.choose_example_weight_(model, batches("calibration"))
after = bnfix.evaluate(model, batches("test"))

for tried in choice.decisions:
    verdict = "admitted" if tried.admitted else "refused"
    print(f"{tried.candidate}: NLL {tried.nll:.3f} against {tried.incumbent_nll:.3f}, {verdict}")
print(f"chosen: {choice.chosen}; {choice.n_live} layers have a weight above 0")
print(f"test: NLL {before.nll:.3f} -> {after.nll:.3f}, top-1 {before.top1:.1%} -> {after.top1:.1%}")
