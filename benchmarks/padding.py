"""What padding does to statistics: a 1-D network repaired with and without the lengths.

Trained on whole sequences of three kinds of tones, tested on padded ones of 4 to 24 steps, recorded
with another gain and offset. Run with ``python -m benchmarks.padding [SEEDS]``; prints a table.
"""

from __future__ import annotations

import copy
import sys

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bnfix

N, T = 600, 24


class Net(nn.Module):
    """Two convolutions that see zeros in the padding, and a mean over the valid steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.conv2, self.bn2 = nn.Conv1d(16, 16, 3, padding=1), nn.BatchNorm1d(16)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        """Logits of ``(N, 3, T)``."""
        keep = (torch.arange(x.shape[-1]) < lengths[:, None])[:, None]
        x = self.bn1(self.conv1(x * keep)).relu() * keep
        x = self.bn2(self.conv2(x)).relu() * keep
        return self.head(x.sum(-1) / lengths[:, None])


def drawn(n: int, shortest: int, gain: float, offset: float) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy tones, their lengths and kinds; zeros in the padding."""
    y, lengths = torch.randint(3, (n,)), torch.randint(shortest, T + 1, (n,))
    phase = 6.28 * torch.rand(n, 3, 1)
    x = torch.sin(torch.arange(T) * (0.3 + 0.25 * y[:, None, None]) + phase)
    x = gain * (x + 0.8 * torch.randn(n, 3, T)) + offset
    return x * (torch.arange(T) < lengths[:, None])[:, None], lengths, y


def trained() -> Net:
    """A network of 20 epochs on 600 whole sequences."""
    net, (x, lengths, y) = Net(), drawn(N, T, 1.0, 0.0)
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(20):
        for i in torch.randperm(N).split(30):
            optimizer.zero_grad()
            F.cross_entropy(net(x[i], lengths[i]), y[i]).backward()
            optimizer.step()
    return net.eval()


def main(seeds: int) -> None:
    """Print mean top-1 and NLL over the seeds, and the paired differences of NLL with errors."""
    rows: dict[str, list[tuple[float, float]]] = {}
    for seed in range(seeds):
        torch.manual_seed(seed)
        net = trained()
        for shift, gain, offset in (("none", 1.0, 0.0), ("gain 1.7, offset 0.5", 1.7, 0.5)):
            (x, n, y), test = (drawn(N, 4, gain, offset) for _ in range(2))
            judged = [{"x": test[0], "lengths": test[1], "y": test[2]}]
            for how, batch in (
                ("as stored", None),
                ("padding counted", ((x, n), y)),
                ("lengths given", {"x": x, "lengths": n}),
            ):
                model = copy.deepcopy(net)
                if batch is not None:
                    bnfix.recalibrate_(model, [batch], feed="sequential")
                found = bnfix.evaluate(model, judged)
                rows.setdefault(f"{shift}: {how}", []).append((found.top1 or 0, found.nll or 0))
    for name, values in rows.items():
        table = torch.tensor(values)
        (top1, nll), error = table.mean(0).tolist(), table.std(0) / len(table) ** 0.5
        print(f"{name:36} top-1 {top1:6.1%} ({error[0]:.1%})  NLL {nll:.3f} ({error[1]:.3f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
