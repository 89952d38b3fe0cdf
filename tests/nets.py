"""Networks for tests: those of the real checkpoints, and tiny ones named after their trouble."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut strides and pads channels with zeros (option A)."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.stride = stride
        self.missing = channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        below = self.missing // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, below, self.missing - below))
        return F.relu(y + shortcut)


class CifarResNet(nn.Module):
    """The ResNet of CIFAR-10 with n blocks a stage, 6n + 2 layers."""

    def __init__(self, n: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(n, 16, 16, 1)
        self.layer2 = self._stage(n, 16, 32, 2)
        self.layer3 = self._stage(n, 32, 64, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(n: int, in_channels: int, channels: int, stride: int) -> nn.Sequential:
        first = CifarBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(CifarBlock(channels, channels, 1) for _ in range(n - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def resnet20(num_classes: int = 10) -> nn.Module:
    return CifarResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> nn.Module:
    return CifarResNet(5, num_classes)


class UspsNet(nn.Module):
    """Convolutions with bias before their norms, and dropout in the head; 16x16 grey input."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Dropout(),
            nn.Linear(128, num_classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


def usps_net(num_classes: int = 10) -> nn.Module:
    return UspsNet(num_classes)


def lived_in(net: nn.Module, seed: int = 0) -> nn.Module:
    """Give every norm statistics and scales as if trained, so that no identity hides a mistake."""
    rng = torch.Generator().manual_seed(seed)

    def draw(like: Tensor, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(like.shape, generator=rng, dtype=like.dtype)

    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                if module.affine:
                    module.weight.copy_(draw(module.weight, 0.5, 1.5))
                    module.bias.copy_(draw(module.bias, -0.5, 0.5))
                if module.track_running_stats:
                    module.running_mean.copy_(draw(module.running_mean, -0.5, 0.5))
                    module.running_var.copy_(draw(module.running_var, 0.5, 2.0))
                    module.num_batches_tracked.fill_(7)
    return net


class Plain(nn.Module):
    """conv, bn, relu, conv, bn, pool, linear; input (N, 3, H, W)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        return self.fc(self.bn2(self.conv2(x)).mean(dim=(2, 3)))


def plain(channels: int = 4, num_classes: int = 3) -> nn.Module:
    return Plain(channels, num_classes)


class HeldOutside(Plain):
    """As `Plain`, by layers that are also held where the module tree does not see them."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__(channels, num_classes)
        self.layers = [self.conv1, self.bn1, torch.relu, self.conv2]
        object.__setattr__(self, "last", self.bn2)

    def forward(self, x: Tensor) -> Tensor:
        for layer in (*self.layers, self.last):
            x = layer(x)
        return self.fc(x.mean(dim=(2, 3)))


def held_outside(channels: int = 4, num_classes: int = 3) -> nn.Module:
    return HeldOutside(channels, num_classes)


class Residual(nn.Module):
    """A stem and two residual blocks, one of them striding; input (N, 3, H, W)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.layer1 = CifarBlock(channels, channels, 1)
        self.layer2 = CifarBlock(channels, 2 * channels, 2)
        self.fc = nn.Linear(2 * channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean(dim=(2, 3)))


def residual(channels: int = 4, num_classes: int = 3) -> nn.Module:
    return Residual(channels, num_classes)


class Pair(nn.Module):
    """A convolution and a norm that may belong to somebody else as well."""

    def __init__(self, in_channels: int, bn: nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, bn.num_features, 3, padding=1, bias=False)
        self.bn = bn

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class SharedNorm(nn.Module):
    """One norm under two parents (`first.bn`, `second.bn`), called twice in each forward pass."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        bn = nn.BatchNorm2d(channels)
        self.first = Pair(3, bn)
        self.second = Pair(channels, bn)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.second(self.first(x)).mean(dim=(2, 3)))


def shared_norm(channels: int = 4, num_classes: int = 3) -> nn.Module:
    return SharedNorm(channels, num_classes)


def with_dropout(channels: int = 4, num_classes: int = 3) -> nn.Module:
    """Dropout before and after the norm: random in training mode only; input (N, 3, H, W)."""
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.Dropout2d(0.25),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(0.5),
        nn.Linear(channels, num_classes),
    )


def bn1d(features: int = 6, num_classes: int = 3) -> nn.Module:
    """A norm without positions; input (N, 5)."""
    return nn.Sequential(
        nn.Linear(5, features),
        nn.BatchNorm1d(features),
        nn.ReLU(),
        nn.Linear(features, num_classes),
    )


def bn3d(channels: int = 4, num_classes: int = 3) -> nn.Module:
    """A norm over three axes of positions; input (N, 2, D, H, W)."""
    return nn.Sequential(
        nn.Conv3d(2, channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool3d(1),
        nn.Flatten(),
        nn.Linear(channels, num_classes),
    )
