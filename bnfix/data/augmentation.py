"""Random variants of training images, the same again for one seed, epoch and image.

``light``: mirrored left to right by chance, and shifted by up to an eighth of the size, with the
edge mirrored in. ``standard``: mirrored by chance, and a random part (half to all of the area,
sides 3:4 to 4:3) resized to the whole. The default is none: mirroring damages digits and text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import torch
from torchvision.transforms import v2

from bnfix.core.errors import ConfigError
from bnfix.data.batches import Batch


def augmented(batches: Iterable[Batch], kind: str, seed: int, epoch: int) -> Iterator[Batch]:
    """Go through batches with their images varied."""
    if kind not in ("none", "light", "standard"):
        message = f"--augment: {kind!r} is not known. Use one of: none, light, standard."
        raise ConfigError(message, name="augment")
    for batch in batches:
        if kind == "none":
            yield batch
            continue
        transform, varied = _transform(kind, *batch.x.shape[-2:]), []
        # torchvision draws from torch's own generator, which the run must find as it left it.
        with torch.random.fork_rng(devices=()):
            for image, position in zip(batch.x, batch.index, strict=True):
                # By position: batch size and order must not change the variant of an image.
                torch.manual_seed(_draw(seed, epoch, int(position)))
                varied.append(transform(image))
        yield batch._replace(x=torch.stack(varied))


def _draw(seed: int, epoch: int, position: int) -> int:
    text = b"%d:%d:%d" % (seed, epoch, position)
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def _transform(kind: str, height: int, width: int) -> v2.Compose:
    if kind == "light":
        padding = (width // 8, height // 8)
        place: v2.Transform = v2.RandomCrop((height, width), padding, padding_mode="reflect")
    else:
        place = v2.RandomResizedCrop((height, width), scale=(0.5, 1.0), ratio=(3 / 4, 4 / 3))
    return v2.Compose([v2.RandomHorizontalFlip(), place])
