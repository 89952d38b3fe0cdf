"""Convolutions whose weights wait in the layout that the CPU's library computes with.

Eager PyTorch brings a convolution's weights into that layout anew at each call, which for a single
image can take as long as a quarter of the network. The operators are those that torch's own
compiler uses; they are not documented, so each is tried once, and what fails stays as it was.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from bnfix._torch_private import packed_convolution, packed_weight

#: What an operator raises that is not there, or does not know a convolution.
_FAILURES = (RuntimeError, AttributeError, TypeError, ValueError)


class PrepackedConv(nn.Module):
    """A convolution over two axes on the CPU, for inference; its outputs have channels last.

    Args:
        conv: whose weights are taken, float32, padded with zeros by numbers.
        size: of its usual inputs, ``(N, C, H, W)``; others work as well.
    """

    def __init__(self, conv: nn.Conv2d, size: tuple[int, ...]) -> None:
        super().__init__()
        self._how = [list(cast("tuple[int, ...]", conv.padding)), list(conv.stride),
                     list(conv.dilation), conv.groups]  # fmt: skip
        self.bias = None if conv.bias is None else conv.bias.detach()
        # Not a buffer: it has no strides, and neither copies nor saves.
        self._weight = packed_weight(conv.weight.detach(), *self._how, list(size))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        return packed_convolution(input, self._weight, self.bias, *self._how)


def prepacked(conv: nn.Module, example: Tensor) -> PrepackedConv | None:
    """The prepacked form of a convolution, tried on an input."""
    available = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    if not available or not _is_plain(conv, example):
        return None
    plain: Any = conv
    try:
        made = PrepackedConv(plain, tuple(example.shape)).eval()
        with torch.no_grad():
            # The class's method, not a call: hooks must not be met again.
            mine, expected = made(example), nn.Conv2d.forward(plain, example)
    except _FAILURES:
        return None
    scale = expected.abs().max().clamp_min(1.0) if expected.numel() else 1.0
    return made if torch.allclose(mine / scale, expected / scale, rtol=0, atol=1e-5) else None


def _is_plain(conv: nn.Module, example: Tensor) -> bool:
    if type(conv) is not nn.Conv2d or conv.padding_mode != "zeros":
        return False
    if isinstance(conv.padding, str):
        return False
    tensors = [t for t in (example, conv.weight, conv.bias) if t is not None]
    if any(t.dtype != torch.float32 or t.device.type != "cpu" for t in tensors):
        return False
    return example.ndim == 4 and example.numel() > 0 and type(example) is Tensor
