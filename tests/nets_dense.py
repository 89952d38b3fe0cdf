"""Networks of other tasks: segmentation, pitch, detection, points, volumes, sequences, pictures.

ESPNet, CREPE-tiny and FastestDet take public checkpoints strictly; the rest are tiny.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ESPNET_EPS = 1e-3
#: Of blue, green and red, pixels 0..255. ESPNet's input is (x - mean) / deviation / 255. The mean
#: is that of CamVid's 367 training images; the authors give no deviation: 68 has the least loss
#: on frames of sequence 0016E5 (66 to 76 differ little).
CAMVID_MEAN = 105.66, 103.33, 99.6
CAMVID_STD = 68.0
#: Keras's default, under which CREPE was trained.
CREPE_EPS = 1e-3


class Conv(nn.Module):
    """A convolution that keeps the size (at stride 1), under the name that checkpoints use."""

    def __init__(self, inside: int, out: int, size: int, stride: int = 1, dilation: int = 1):
        super().__init__()
        margin = (size - 1) // 2 * dilation
        self.conv = nn.Conv2d(inside, out, size, stride, margin, dilation, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class NormAct(nn.Module):
    """A norm and a PReLU with a slope a channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, eps=ESPNET_EPS)
        self.act = nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(x))


class ConvNormAct(NormAct):
    """A convolution, a norm and a PReLU."""

    def __init__(self, inside: int, out: int, stride: int = 1) -> None:
        super().__init__(out)
        self.conv = nn.Conv2d(inside, out, 3, stride, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.conv(x))


class Pyramid(nn.Module):
    """Reduce, five dilated convolutions in parallel, and their running sums side by side."""

    RATES = (1, 2, 4, 8, 16)

    def __init__(self, inside: int, out: int, size: int = 1, stride: int = 1) -> None:
        super().__init__()
        narrow = out // 5
        self.c1 = Conv(inside, narrow, size, stride)
        for rate in self.RATES:
            width = out - 4 * narrow if rate == 1 else narrow
            setattr(self, f"d{rate}", Conv(narrow, width, 3, dilation=rate))

    def pyramid(self, x: Tensor) -> Tensor:
        x = self.c1(x)
        parts = [self.d1(x), self.d2(x)]
        for rate in self.RATES[2:]:
            parts.append(parts[-1] + getattr(self, f"d{rate}")(x))
        return torch.cat(parts, 1)


class Down(Pyramid):
    """The pyramid at half the size; norm and PReLU lie beside it, not in a block."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__(inside, out, 3, 2)
        self.bn = nn.BatchNorm2d(out, eps=ESPNET_EPS)
        self.act = nn.PReLU(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.pyramid(x)))


class Esp(Pyramid):
    """The pyramid at the same size, with or without a shortcut."""

    def __init__(self, inside: int, out: int, shortcut: bool = True) -> None:
        super().__init__(inside, out)
        self.bn = NormAct(out)
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y = self.pyramid(x)
        return self.bn(x + y if self.shortcut else y)


class EspEncoder(nn.Module):
    """ESPNet-C without its own upsampling: features at a half, a quarter and an eighth."""

    def __init__(self, classes: int, p: int, q: int) -> None:
        super().__init__()
        self.level1 = ConvNormAct(3, 16, 2)
        self.b1 = NormAct(16 + 3)
        self.level2_0 = Down(16 + 3, 64)
        self.level2 = nn.ModuleList(Esp(64, 64) for _ in range(p))
        self.b2 = NormAct(128 + 3)
        self.level3_0 = Down(128 + 3, 128)
        self.level3 = nn.ModuleList(Esp(128, 128) for _ in range(q))
        self.b3 = NormAct(256)
        self.classifier = Conv(256, classes, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        half = F.avg_pool2d(x, 3, 2, 1)
        quarter = F.avg_pool2d(half, 3, 2, 1)
        first = self.b1(torch.cat([self.level1(x), half], 1))
        deep = start = self.level2_0(first)
        for block in self.level2:
            deep = block(deep)
        second = self.b2(torch.cat([deep, start, quarter], 1))
        deep = start = self.level3_0(second)
        for block in self.level3:
            deep = block(deep)
        return first, second, self.classifier(self.b3(torch.cat([start, deep], 1)))


class EspNet(nn.Module):
    """ESPNet (Mehta et al. 2018, arXiv:1803.06815): the encoder and a light decoder.

    Input (N, 3, H, W), H and W multiples of 8; output (N, classes, H, W) logits.
    """

    def __init__(self, classes: int = 12, p: int = 2, q: int = 8) -> None:
        super().__init__()
        self.encoder = EspEncoder(classes, p, q)
        self.level3_C = Conv(128 + 3, classes, 1)
        self.br = nn.BatchNorm2d(classes, eps=ESPNET_EPS)
        self.conv = ConvNormAct(16 + 3 + classes, classes)
        self.up_l3 = nn.Sequential(self.doubled(classes))
        merged = Esp(2 * classes, classes, shortcut=False)
        self.combine_l2_l3 = nn.Sequential(NormAct(2 * classes), merged)
        self.up_l2 = nn.Sequential(self.doubled(classes), NormAct(classes))
        self.classifier = self.doubled(classes)

    @staticmethod
    def doubled(classes: int) -> nn.Module:
        return nn.ConvTranspose2d(classes, classes, 2, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.encoder(x)
        third = self.up_l3(self.br(third))
        merged = self.combine_l2_l3(torch.cat([self.level3_C(second), third], 1))
        return self.classifier(self.conv(torch.cat([self.up_l2(merged), first], 1)))


def espnet(classes: int = 12) -> nn.Module:
    return EspNet(classes)


class Crepe(nn.Module):
    """CREPE-tiny (Kim et al. 2018, arXiv:1802.06182): six convolutions, the norm after the ReLU.

    Input (N, 1, 1024, 1) or (N, 1024), samples at 16 kHz of mean 0 and deviation 1; output
    (N, 360) in 0..1, a bin for every 20 cents.
    """

    WIDTHS = (1, 128, 16, 16, 16, 32, 64)

    def __init__(self) -> None:
        super().__init__()
        for i in range(1, 7):
            size, stride = (512, 4) if i == 1 else (64, 1)
            conv = nn.Conv2d(self.WIDTHS[i - 1], self.WIDTHS[i], (size, 1), (stride, 1))
            setattr(self, f"conv{i}", conv)
            norm = nn.BatchNorm2d(self.WIDTHS[i], eps=CREPE_EPS, momentum=0.0)
            setattr(self, f"conv{i}_BN", norm)
        self.classifier = nn.Linear(64 * 4, 360)

    def forward(self, x: Tensor) -> Tensor:
        x = x.reshape(len(x), 1, -1, 1)
        for i in range(1, 7):
            # An even kernel: one more zero behind than before, as Keras pads.
            x = F.pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(F.relu(getattr(self, f"conv{i}")(x)))
            x = F.dropout(F.max_pool2d(x, (2, 1)), 0.25, self.training)
        return torch.sigmoid(self.classifier(x.permute(0, 2, 1, 3).flatten(1)))


def crepe_tiny() -> nn.Module:
    return Crepe()


class PointNet(nn.Module):
    """A pointwise net, the maximum over points, a head; norms are also held in a list."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm1d(channels)
        self.bn2 = nn.BatchNorm1d(2 * channels)
        self.bn3 = nn.BatchNorm1d(channels)
        self.convs = nn.ModuleList([
            nn.Conv1d(3, channels, 1), nn.Conv1d(channels, 2 * channels, 1)
        ])  # fmt: skip
        self.fc1 = nn.Linear(2 * channels, channels)
        self.fc2 = nn.Linear(channels, num_classes)
        self.norms = [self.bn1, self.bn2]

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        return self.fc2(F.relu(self.bn3(self.fc1(x.amax(2)))))


def point_net(channels: int = 8, num_classes: int = 3) -> nn.Module:
    return PointNet(channels, num_classes)


class Recurrent(nn.Module):
    """A norm over frames, a GRU that stops at each example's length, a head of the last state.

    Input x (N, C, T) and `lengths` (N,); without lengths all frames count.
    """

    def __init__(self, channels: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, channels, 1)
        self.bn = nn.BatchNorm1d(channels)
        self.rnn = nn.GRU(channels, channels, batch_first=True)
        self.fc = nn.Linear(channels, outputs)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        states, _ = self.rnn(x.transpose(1, 2))
        if lengths is None:
            return self.fc(states[:, -1])
        return self.fc(states[torch.arange(len(x)), lengths.long() - 1])


def recurrent(channels: int = 8, outputs: int = 1) -> nn.Module:
    return Recurrent(channels, outputs)


def tabular(features: int = 10, width: int = 32, outputs: int = 1) -> nn.Module:
    """Two hidden layers with norms without positions; input (N, features)."""
    return nn.Sequential(
        nn.Linear(features, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Linear(width, outputs),
    )


def volume(channels: int = 4, outputs: int = 2) -> nn.Module:
    """Two 3-D convolutions that keep the size; output (N, outputs, D, H, W)."""
    return nn.Sequential(
        nn.Conv3d(1, channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        nn.Conv3d(channels, channels, 3, padding=1, bias=False),
        nn.BatchNorm3d(channels),
        nn.ReLU(),
        nn.Conv3d(channels, outputs, 1),
    )


def generator(noise: int = 8, channels: int = 8) -> nn.Module:
    """A GAN's generator: noise (N, noise, 1, 1) to pictures (N, 3, 16, 16) in -1..1."""
    return nn.Sequential(
        nn.ConvTranspose2d(noise, 2 * channels, 4, bias=False),
        nn.BatchNorm2d(2 * channels),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * channels, channels, 4, 2, 1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.ConvTranspose2d(channels, 3, 4, 2, 1),
        nn.Tanh(),
    )


def norm_relu(*layers: nn.Module, relu: bool = True) -> list[nn.Module]:
    """Convolutions, each followed by its norm, the last one by a ReLU where asked for."""
    found: list[nn.Module] = []
    for conv in layers:
        found += [conv, nn.BatchNorm2d(conv.out_channels)]  # type: ignore[arg-type]
    return [*found, nn.ReLU()] if relu else found


def pointwise(inside: int, out: int) -> nn.Conv2d:
    return nn.Conv2d(inside, out, 1, bias=False)


def depthwise(channels: int, size: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, size, stride, size // 2, groups=channels, bias=False)


class Shuffle(nn.Module):
    """ShuffleNetV2's unit: half of the channels go through; at stride 2 both halves are worked."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.branch_main = nn.Sequential(
            *norm_relu(pointwise(channels, channels)),
            *norm_relu(depthwise(channels, 3, stride), pointwise(channels, channels)),
        )
        if stride == 2:
            proj = norm_relu(depthwise(channels, 3, 2), pointwise(channels, channels))
            self.branch_proj = nn.Sequential(*proj)

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)
        return torch.cat([x[:, ::2], self.branch_main(x[:, 1::2])], 1)


class ShuffleBackbone(nn.Module):
    """Maps at an eighth, a sixteenth and a thirty-second of the size."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*norm_relu(nn.Conv2d(3, 24, 3, 2, 1, bias=False)))
        for stage, (width, blocks) in enumerate(((24, 4), (48, 8), (96, 4)), 2):
            units = [Shuffle(width, 1 if i else 2) for i in range(blocks)]
            setattr(self, f"stage{stage}", nn.Sequential(*units))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = F.max_pool2d(self.first_conv(x), 3, 2, 1)
        eighth = self.stage2(x)
        sixteenth = self.stage3(eighth)
        return eighth, sixteenth, self.stage4(sixteenth)


class Named(nn.Module):
    """A sequence under the name that a checkpoint gives it."""

    def __init__(self, name: str, *layers: nn.Module) -> None:
        super().__init__()
        self.name = name
        setattr(self, name, nn.Sequential(*layers))

    def forward(self, x: Tensor) -> Tensor:
        return getattr(self, self.name)(x)


class Spp(nn.Module):
    """One, two and three depthwise 5x5 convolutions side by side, and a shortcut."""

    def __init__(self, inside: int, out: int) -> None:
        super().__init__()
        self.Conv1x1 = Named("conv1x1", *norm_relu(pointwise(inside, out)))
        for n in (1, 2, 3):
            layers = [layer for _ in range(n) for layer in norm_relu(depthwise(out, 5))]
            setattr(self, f"S{n}", nn.Sequential(*layers))
        self.output = nn.Sequential(*norm_relu(pointwise(3 * out, out), relu=False))

    def forward(self, x: Tensor) -> Tensor:
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


class DetectHead(nn.Module):
    """Objectness, box and classes at each position; norms without an activation at the end."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Named("conv1x1", *norm_relu(pointwise(width, width)))
        for name, out in (("obj", 1), ("reg", 4), ("cls", classes)):
            last = norm_relu(pointwise(width, out), relu=False)
            layers = Named("conv5x5", *norm_relu(depthwise(width, 5)), *last)
            setattr(self, f"{name}_layers", layers)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1x1(x)
        found = torch.sigmoid(self.obj_layers(x)), self.reg_layers(x), self.cls_layers(x).softmax(1)
        return torch.cat(found, 1)


class FastestDet(nn.Module):
    """A one-scale detector on ShuffleNetV2; input (N, 3, H, W) in 0..1, H and W multiples of 32.

    Output (N, 5 + classes, H/16, W/16): objectness, four numbers of the box, class probabilities.
    """

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        self.backbone = ShuffleBackbone()
        self.SPP = Spp(48 + 96 + 192, 96)
        self.detect_head = DetectHead(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        eighth, sixteenth, last = self.backbone(x)
        last = F.interpolate(last, scale_factor=2.0, mode="nearest")
        maps = [F.avg_pool2d(eighth, 3, 2, 1), sixteenth, last]
        return self.detect_head(self.SPP(torch.cat(maps, 1)))


def fastestdet(classes: int = 80) -> nn.Module:
    return FastestDet(classes)
