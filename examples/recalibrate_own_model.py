"""Swap the norm layers of your own model and measure new statistics, without labels.

The network was trained on dark digits on white paper; here the scanner has faded. Its weights are
as good as before, but its population statistics are not.
"""

import torch

import bnfix
from bnfix import demo
from bnfix.demo.network import digits_net


def faded(part: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of (x, y) at a third of the contrast, normalized as in training."""
    images, labels = demo.digits(part)
    x = torch.from_numpy(images).unsqueeze(1).float() / 255 / 3
    x = (x - demo.PREPROCESSING.mean[0]) / demo.PREPROCESSING.std[0]
    return list(zip(x.split(100), torch.from_numpy(labels).split(100), strict=True))


with demo.checkpoint_path() as path:
    model = bnfix.load(path, model=digits_net())  # or your own model, with its weights loaded

bnfix.swap_norms_(model)  # every BatchNorm -> GeneralizedBatchNorm: same weights, same outputs
test = faded("test")
before = bnfix.evaluate(model, test)
done = bnfix.recalibrate_(model, [x for x, _ in faded("calibration")])
after = bnfix.evaluate(model, test)

paired = bnfix.compare(before, after).top1
low, high = paired.interval
print(f"{len(done.layers)} layers measured on {done.n_examples} images, no labels used")
print(f"top-1 {before.top1:.1%} -> {after.top1:.1%} of {after.n_examples} test images")
print(f"difference {paired.difference:.1%} (95% interval {low:.1%} to {high:.1%})")
