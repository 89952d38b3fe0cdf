"""Common corruptions of images: noise, blur, JPEG, brightness, contrast, pixelate; 3 severities.

They change 8-bit pixels after resize and crop, before scale, mean and standard deviation. The
result depends only on the kind, the severity, the seed and the image's position in the data. It
does not depend on the batch, the order or the number of processes.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from bnfix.core.options import CORRUPTIONS, SEVERITIES, check_corruption

#: The strength of each severity, in the units of `_WORDS`.
STRENGTHS: Final[dict[str, tuple[float, float, float]]] = {
    "noise": (0.02, 0.04, 0.08),
    "blur": (0.08, 0.12, 0.16),
    "jpeg": (40, 20, 10),
    "brightness": (1.3, 1.6, 2.0),
    "contrast": (0.7, 0.5, 0.3),
    "pixelate": (0.85, 0.65, 0.45),
}
_WORDS: Final[dict[str, str]] = {
    "noise": "Gaussian noise, standard deviation {} times the pixel range",
    "blur": "Gaussian blur, standard deviation {} times the root of the shorter side, in pixels",
    "jpeg": "JPEG of quality {:g}",
    "brightness": "brightness times {}",
    "contrast": "contrast times {}",
    "pixelate": "pixelated to {} of the size",
}


@dataclass(frozen=True)
class Corruption:
    """One corruption of images: kind, severity 1 to 3, seed of the noise."""

    kind: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse unknown kinds and severities."""
        check_corruption(self.text, "corruption")

    @property
    def text(self) -> str:
        """The form that ``--corrupt`` takes: ``blur:2``."""
        return f"{self.kind}:{self.severity}"

    @property
    def words(self) -> str:
        """The change to the pixels, in words."""
        return _WORDS[self.kind].format(self._strength)

    @property
    def _strength(self) -> float:
        return STRENGTHS[self.kind][self.severity - 1]

    def apply(self, pixels: np.ndarray, position: int) -> np.ndarray:
        """Corrupt one image."""
        if self.kind == "noise":
            return self._noisy(pixels, position)
        grey = pixels.shape[2] == 1
        image = Image.fromarray(np.ascontiguousarray(pixels[..., 0] if grey else pixels))
        found = np.array(_BY_KIND[self.kind](image, self._strength))
        return found[..., None] if grey else found

    def _noisy(self, pixels: np.ndarray, position: int) -> np.ndarray:
        key = f"{self.seed}:{self.text}:{position}".encode()
        seed = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")
        drawn = np.random.Generator(np.random.PCG64(seed))
        noise = drawn.standard_normal(pixels.shape, dtype=np.float32)
        noise *= 255 * self._strength
        noise += pixels
        return np.rint(noise).clip(0, 255).astype(np.uint8)


def corruption_of(text: str | None, seed: int = 0) -> Corruption | None:
    """The corruption of ``--corrupt``, ``kind:severity``."""
    return None if text is None else Corruption(*check_corruption(text), seed)


def every_corruption(seed: int = 0) -> list[Corruption]:
    """List all kinds and severities."""
    return [Corruption(kind, severity, seed) for kind in CORRUPTIONS for severity in SEVERITIES]


def _blurred(image: Image.Image, strength: float) -> Image.Image:
    # The root of the side makes the blur about as strong at 32 pixels as at 224.
    return image.filter(ImageFilter.GaussianBlur(strength * min(image.size) ** 0.5))


def _recompressed(image: Image.Image, quality: float) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=int(quality))
    with Image.open(file, formats=("JPEG",)) as again:
        return again.convert(image.mode)


def _pixelated(image: Image.Image, part: float) -> Image.Image:
    small = (max(1, round(part * image.width)), max(1, round(part * image.height)))
    # Box and nearest: blocks of one colour with hard edges.
    coarse = image.resize(small, Image.Resampling.BOX)
    return coarse.resize(image.size, Image.Resampling.NEAREST)


_BY_KIND: Final[dict[str, Callable[[Image.Image, float], Image.Image]]] = {
    "blur": _blurred,
    "jpeg": _recompressed,
    "brightness": lambda image, factor: ImageEnhance.Brightness(image).enhance(factor),
    "contrast": lambda image, factor: ImageEnhance.Contrast(image).enhance(factor),
    "pixelate": _pixelated,
}
