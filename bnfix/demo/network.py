"""The network of the demonstration: a small residual network for 8x8 grey images."""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (16, 32, 48)


class Block(nn.Module):
    """Two 3x3 convolutions with Batch Normalization, and a shortcut around them.

    If the stride or the channels change, the shortcut is a 1x1 convolution.
    """

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.downsample(x))


class DigitsNet(nn.Module):
    """Stem, three residual blocks, global average pooling, linear head."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        first, second, third = WIDTHS
        self.conv1 = nn.Conv2d(1, first, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = Block(first, first)
        self.layer2 = Block(first, second, stride=2)
        self.layer3 = Block(second, third)
        self.fc = nn.Linear(third, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map images to logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return cast(Tensor, self.fc(x.mean(dim=(2, 3))))


def digits_net(num_classes: int = 10) -> nn.Module:
    """Build the network of the demonstration, untrained."""
    return DigitsNet(num_classes)
