"""The preprocessing that belongs to a published model."""

from __future__ import annotations

import math
from typing import Any

import torchvision

from bnfix.core.errors import ConfigError, did_you_mean
from bnfix.core.settings import INTERPOLATIONS, Preprocessing
from bnfix.models.importing import import_library
from bnfix.models.transformers import folder_preprocessing


def default_preprocessing(spec: str, sha256: str = "") -> tuple[Preprocessing, str] | None:
    """The preprocessing of a published model's authors, and whose; nothing is downloaded."""
    kind, _, name = spec.partition(":")
    if kind == "transformers":
        own = folder_preprocessing(spec, name)
        return None if own is None else (own, f"preprocessing of {spec}")
    if kind != "torchvision" or name not in torchvision.models.list_models():
        return None
    # A file's own weights are known by its digest; else the first ImageNet weights are taken.
    published = filter(None, [published_weights(spec, sha256)])
    for weights in (*published, *torchvision.models.get_model_weights(name)):
        found = _of_transforms(weights)
        if found is not None and "IMAGENET1K" in weights.name:
            return found, f"preprocessing of torchvision's {type(weights).__name__}.{weights.name}"
    return None


def published_weights(spec: str, sha256: str) -> Any | None:
    """The published weights that a file is, by its digest, whose digits torchvision's URL has."""
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
    """Whether a model's published weights expect inputs normalized in another way."""
    return spec in ("torchvision:googlenet", "torchvision:inception_v3")


def preset_preprocessing(preset: str) -> Preprocessing:
    """The preprocessing that a preset names; nothing is downloaded."""
    kind, _, name = preset.partition(":")
    if kind == "torchvision":
        try:
            found = _of_transforms(torchvision.models.get_weight(name))
        except (AttributeError, KeyError, ValueError) as error:
            hint = did_you_mean(name, _weight_names(), 2)
            raise _unusable(preset, f"torchvision has no such weights.{hint}") from error
    elif kind == "timm":
        found = _of_timm(preset, name)
    else:
        raise _unusable(
            preset,
            "expected torchvision:WEIGHTS_NAME (for example "
            "torchvision:ResNet50_Weights.IMAGENET1K_V2) or timm:NAME.",
        )
    if found is None:
        raise _unusable(
            preset,
            "does not preprocess for image classification. Give --resize, --crop, --mean and "
            "--std.",
        )
    return found


def _unusable(preset: str, text: str) -> ConfigError:
    return ConfigError(f"--preset {preset}: {text}", name="preset")


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
        hint = did_you_mean(name, timm.list_models(), 2)
        raise _unusable(preset, f"timm has no such model.{hint}")
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
