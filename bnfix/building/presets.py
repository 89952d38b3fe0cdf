"""The preprocessing that belongs to a published model."""

from __future__ import annotations

import difflib
import math
from typing import Any

import torchvision

from bnfix.building.importing import import_library
from bnfix.building.pretrained import folder_preprocessing
from bnfix.errors import ConfigError
from bnfix.preprocessing import INTERPOLATIONS, Preprocessing


def default_preprocessing(spec: str, sha256: str = "") -> tuple[Preprocessing, str] | None:
    """Look up what the authors of a published model feed it; nothing is downloaded."""
    kind, _, name = spec.partition(":")
    if kind == "transformers":
        own = folder_preprocessing(spec, name)
        return None if own is None else (own, f"preprocessing of {spec}")
    if kind != "torchvision" or name not in torchvision.models.list_models():
        return None
    published = published_weights(spec, sha256)
    for weights in (
        *([published] if published else []),
        *torchvision.models.get_model_weights(name),
    ):
        found = _of_transforms(weights)
        if found is not None and "IMAGENET1K" in weights.name:
            return found, f"preprocessing of torchvision's {type(weights).__name__}.{weights.name}"
    return None


def published_weights(spec: str, sha256: str) -> Any | None:
    """Recognize a file that torchvision publishes: its name there ends in its digest's digits."""
    kind, _, name = spec.partition(":")
    if kind != "torchvision" or not sha256 or name not in torchvision.models.list_models():
        return None
    for weights in torchvision.models.get_model_weights(name):
        digits = str(weights.url).rpartition("-")[2].partition(".")[0]
        if len(digits) >= 8 and sha256.startswith(digits):
            return weights
    return None


def published_arguments(spec: str, sha256: str) -> dict[str, Any]:
    """Arguments that torchvision gives a builder beside its own weights; the file lacks them."""
    known = wants_transformed_input(spec) and published_weights(spec, sha256) is not None
    return {"transform_input": True} if known else {}


def wants_transformed_input(spec: str) -> bool:
    """Say whether a model's published weights expect inputs normalized in another way."""
    return spec in ("torchvision:googlenet", "torchvision:inception_v3")


def preset_preprocessing(preset: str) -> Preprocessing:
    """Look up a named preprocessing; nothing is downloaded."""
    kind, _, name = preset.partition(":")
    if kind == "torchvision":
        try:
            found = _of_transforms(torchvision.models.get_weight(name))
        except (AttributeError, KeyError, ValueError) as error:
            close = difflib.get_close_matches(name, _weight_names(), 2)
            hint = f" Did you mean {' or '.join(close)}?" if close else ""
            raise ConfigError(
                f"--preset {preset}: torchvision has no such weights.{hint}", name="preset"
            ) from error
    elif kind == "timm":
        found = _of_timm(preset, name)
    else:
        raise ConfigError(
            f"--preset {preset}: expected torchvision:WEIGHTS_NAME (for example "
            "torchvision:ResNet50_Weights.IMAGENET1K_V2) or timm:NAME.",
            name="preset",
        )
    if found is None:
        raise ConfigError(
            f"--preset {preset}: does not preprocess for image classification. "
            "Give --resize, --crop, --mean and --std.",
            name="preset",
        )
    return found


def _weight_names() -> list[str]:
    enums = [torchvision.models.get_model_weights(m) for m in torchvision.models.list_models()]
    return [f"{enum.__name__}.{weights.name}" for enum in enums for weights in enum]


def _of_transforms(weights: Any) -> Preprocessing | None:
    transforms = weights.transforms()
    if type(transforms).__name__ != "ImageClassification":
        return None  # detection, segmentation and video resize in other ways
    crop = tuple(transforms.crop_size)
    return Preprocessing(
        resize=tuple(transforms.resize_size),
        crop=(crop[0], crop[-1]),
        interpolation=_interpolation(transforms.interpolation.value),
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def _of_timm(preset: str, name: str) -> Preprocessing | None:
    timm = import_library("timm", preset)
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # a tag that the model does not have
        config = None
    if config is None:
        close = difflib.get_close_matches(name, timm.list_models(), 2)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise ConfigError(f"--preset {preset}: timm has no such model.{hint}", name="preset")
    channels, height, width = config.input_size
    if channels not in (1, 3) or config.crop_mode == "border":
        return None
    part = config.crop_pct or 0.875
    scaled = (math.floor(height / part), math.floor(width / part))
    square = height == width and config.crop_mode != "squash"
    return Preprocessing(
        resize=scaled[:1] if square else scaled,
        crop=(height, width),
        interpolation=_interpolation(config.interpolation),
        mean=tuple(config.mean),
        std=tuple(config.std),
        channels=channels,
    )


def _interpolation(name: str) -> str:
    return name if name in INTERPOLATIONS else "bilinear"
