"""From a decoded image to the input of a network: the settings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from bnfix.core.settings import one_of, option, require

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")


@dataclass(frozen=True)
class Preprocessing:
    """From a decoded image to the network's input: resize, centre crop, scale, normalize.

    input = (pixel · scale - mean) / std, pixel in 0..255, per channel in the input's order.
    """

    resize: tuple[int, ...] | None = option(
        None, "Resize before the crop: one number for the shorter side, or HEIGHTxWIDTH."
    )
    crop: tuple[int, int] | None = option(
        None, "Centre crop after the resize: one number or HEIGHTxWIDTH."
    )
    interpolation: str = option("bilinear", "How to resize: " + ", ".join(INTERPOLATIONS) + ".")
    mean: tuple[float, ...] = option(
        (0.0,), "Mean to subtract after scaling, one number or one a channel, comma-separated."
    )
    std: tuple[float, ...] = option(
        (1.0,), "Deviation to divide by, one number or one a channel, comma-separated."
    )
    scale: float = option(1 / 255, "Factor for pixel values 0..255 (a number or 1/255).")
    channels: int = option(3, "Channels of the input: 3 (colour) or 1 (grey).")
    bgr: bool = option(
        False, "Channels in the order blue, green, red, those of --mean and --std too."
    )

    def __post_init__(self) -> None:
        """Check ranges, and that mean and std fit the channels."""
        one_of(self.interpolation, INTERPOLATIONS, "--interpolation")
        require(self.channels in (1, 3), f"channels: {self.channels}, expected 1 or 3.", "channels")
        require(type(self.bgr) is bool, f"bgr: {self.bgr!r}, expected true or false.", "bgr")
        require(self.channels == 3 or not self.bgr, "--bgr: not for a grey input.", "bgr")
        for name in ("resize", "crop"):
            size = getattr(self, name)
            ok = size is None or (
                len(size) in (1, 2) and all(type(s) is int and 0 < s <= 16384 for s in size)
            )
            require(ok, f"--{name}: {size}, expected one or two sizes from 1 to 16384.", name)
        for name in ("mean", "std"):
            values = getattr(self, name)
            ok = all(isinstance(v, int | float) and math.isfinite(v) for v in values)
            require(ok, f"--{name}: {values}, expected finite numbers.", name)
            require(
                len(values) in (1, self.channels),
                f"--{name}: {len(values)} numbers for {self.channels} channels. "
                f"Give 1 or {self.channels}.",
                name,
            )
        require(all(s > 0 for s in self.std), f"--std: {self.std}, expected above 0.", "std")
        ok = self.scale > 0 and math.isfinite(self.scale)
        require(ok, f"--scale: {self.scale}, expected a number above 0.", "scale")
