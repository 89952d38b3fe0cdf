"""Tones with known pitch for CREPE: frames of 1,024 samples at 16 kHz, and what to judge it by.

    python benchmarks/tones.py FOLDER   # clean, noise, phone: `.npz` to work with and to test

Every frame is a draw of its own, so frames are independent: a fundamental from 70 to 900 Hz
(uniform in its logarithm) with vibrato, up to twenty harmonics of random strength and phase, and
noise. A target is the fundamental in the middle of the frame, in cents over 10 Hz.

`--loss benchmarks/tones.py:loss` is the loss that CREPE was trained by, `--metric
benchmarks/tones.py:pitch_accuracy` the fraction of frames within 50 cents.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

Array = NDArray[np.floating]
RATE, LENGTH = 16_000, 1_024
#: Cents of bin 0 over 10 Hz, and of a bin (CREPE's, from 32.7 Hz on).
FIRST, STEP = 1997.3794084376191, 20.0
#: The deviation of the trained-on targets around the true pitch, in cents.
SPREAD = 25.0
BAND = 300, 3400
#: A frame lies within a longer signal, so that a filter has settled.
_MARGIN = 1_024


def tones(n: int, seed: int, kind: str = "clean") -> tuple[Array, Array]:
    """Frames `(n, 1024)` of mean 0 and deviation 1, and their cents `(n,)`.

    `clean` is 40 dB over white noise, `noise` 5 dB under it; `phone` is `clean` through the
    telephone's band, 300 to 3400 Hz.
    """
    rng = np.random.default_rng((seed, n))
    time = (np.arange(LENGTH + 2 * _MARGIN) - (LENGTH + 2 * _MARGIN) // 2) / RATE
    hertz = 70 * (900 / 70) ** rng.random((n, 1))
    depth, speed, start = 50 * rng.random((n, 1)), 4 + 3 * rng.random((n, 1)), rng.random((n, 1))
    bend = depth * np.sin(2 * np.pi * (speed * time + start))
    pitch = hertz * 2 ** (bend / 1200)
    phase = 2 * np.pi * np.cumsum(pitch, 1) / RATE
    signal = _harmonics(phase, pitch, rng)
    level = -5.0 if kind == "noise" else 40.0
    power = (signal**2).mean(1, keepdims=True) * 10 ** (-level / 10)
    signal = signal + np.sqrt(power) * rng.standard_normal(signal.shape)
    if kind == "phone":
        signal = band_passed(signal)
    frame = signal[:, _MARGIN : _MARGIN + LENGTH]
    frame = (frame - frame.mean(1, keepdims=True)) / frame.std(1, keepdims=True)
    middle = pitch[:, pitch.shape[1] // 2]
    return frame.astype(np.float32), (1200 * np.log2(middle / 10)).astype(np.float32)


def _harmonics(phase: Array, pitch: Array, rng: np.random.Generator) -> Array:
    """A sum of up to twenty, none of them above 7.5 kHz; strengths fall by a drawn power."""
    n = len(phase)
    count, fall = rng.integers(1, 21, (n, 1)), 0.5 + 1.5 * rng.random((n, 1))
    signal = np.zeros_like(phase)
    for h in range(1, 21):
        strength = h**-fall * np.exp(0.5 * rng.standard_normal((n, 1)))
        heard = (h <= count) & (h * pitch < 7_500)
        shift = 2 * np.pi * rng.random((n, 1))
        signal += heard * strength * np.sin(h * phase + shift)
    return signal


def band_passed(signal: Array) -> Array:
    """The telephone's band, with edges a tenth of the frequency wide."""
    found = np.fft.rfft(signal)
    hertz = np.fft.rfftfreq(signal.shape[1], 1 / RATE)
    up = np.clip((hertz / BAND[0] - 0.95) / 0.1, 0, 1)
    down = np.clip((1.05 - hertz / BAND[1]) / 0.1, 0, 1)
    return np.fft.irfft(found * up * down, signal.shape[1])


def loss(outputs: Tensor, targets: Tensor) -> Tensor:
    """Binary cross-entropy against a bell around the true pitch, the mean over 360 bins."""
    bins = FIRST + STEP * torch.arange(outputs.shape[1], device=outputs.device)
    bell = torch.exp(-((bins - targets[:, None]) ** 2) / (2 * SPREAD**2)).to(outputs.dtype)
    return F.binary_cross_entropy(outputs, bell, reduction="none").mean(1)


def cents_of(outputs: Array) -> Array:
    """The pitch: the mean of the bins within 80 cents of the largest, weighted by the outputs."""
    best = outputs.argmax(1)
    index = best[:, None] + np.arange(-4, 5)
    inside = (index >= 0) & (index < outputs.shape[1])
    weights = np.take_along_axis(outputs, index.clip(0, outputs.shape[1] - 1), 1) * inside
    return (weights * (FIRST + STEP * index)).sum(1) / weights.sum(1)


def pitch_accuracy(outputs: Array, labels: Array) -> float:
    """The fraction of frames whose pitch is within 50 cents (raw pitch accuracy)."""
    return float((np.abs(cents_of(outputs) - labels) <= 50).mean())


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for kind in ("clean", "noise", "phone"):
        for part, n, seed in (("work", 600, 1), ("test", 1000, 2)):
            inputs, targets = tones(n, seed, kind)
            np.savez(folder / f"{kind}-{part}.npz", inputs=inputs, targets=targets)
