"""An image classifier in a local folder as transformers saves it; nothing is fetched or trusted.

Only ``config.json`` says what is built, out of the classes that transformers itself has; code
beside it is never run. How inputs are prepared stands in ``preprocessor_config.json``.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Final

from torch import nn

from bnfix.building.importing import import_library
from bnfix.errors import ConfigError, ModelError, one_line, plain
from bnfix.preprocessing import INTERPOLATIONS, Preprocessing

_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
#: A longer description is none.
_TEXT_LIMIT: Final = 8 * 2**20
#: How timm's names begin where they stand for files to fetch or read.
_ELSEWHERE: Final = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:")
#: Pillow's numbers of its filters.
_FILTERS: Final = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def build_pretrained(spec: str, folder: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the image classifier that a folder describes, with fresh weights.

    Args:
        spec: as the user gave it, for messages.
        folder: with a ``config.json``.
        arguments: entries of the configuration to override, such as ``num_labels``.

    Returns:
        The model.

    Raises:
        ModelError: if transformers is missing, the folder describes no image classifier of its
            own, or asks for code or for files from elsewhere.
    """
    config = _read(spec, Path(folder) / _CONFIG)
    foreign = [name for name in ("auto_map", "custom_pipelines") if config.get(name)]
    if foreign:
        raise ModelError(
            f"{spec}: its {_CONFIG} asks for code of its own ({foreign[0]}), which is not run. "
            "Where you trust it, give a callable that builds it: --model path/to/file.py:callable.",
            name=spec,
        )
    transformers = import_library("transformers", spec)
    elsewhere = [name for name, value in config.items() if str(value).startswith(_ELSEWHERE)]
    if elsewhere:
        raise ModelError(
            f"{spec}: its {_CONFIG} names files elsewhere ({elsewhere[0]}), and nothing is "
            "fetched. Give a callable that builds it: --model path/to/file.py:callable.",
            name=spec,
        )
    if "num_labels" in arguments:
        config = {n: v for n, v in config.items() if n not in ("id2label", "label2id")}
    config |= arguments
    kind = config.pop("model_type", None)
    for name in ("use_pretrained_backbone", "pretrained"):
        if config.get(name):
            config[name] = False  # else it would fetch weights that the checkpoint then replaces
    if not isinstance(kind, str):
        raise ModelError(f"{spec}: its {_CONFIG} names no model_type.", name=spec)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            described = type(transformers.AutoConfig.for_model(kind)).from_dict(config)
            model = transformers.AutoModelForImageClassification.from_config(
                described, trust_remote_code=False
            )
    except (ImportError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ModelError(
            f"{spec}: no image classifier of transformers comes out of its {_CONFIG} "
            f"({one_line(error)}). Check the folder and --model-arg.",
            name=spec,
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(f"{spec}: transformers built no torch.nn.Module.", name=spec)
    return model


def folder_preprocessing(spec: str, folder: str) -> Preprocessing | None:
    """Read how a folder says that its images are prepared.

    Args:
        spec: as the user gave it, for messages.
        folder: with a ``preprocessor_config.json``, or without.

    Returns:
        The preprocessing; None where the folder does not say.

    Raises:
        ModelError: if what it says cannot be used.
    """
    path = Path(folder) / _PREPROCESSOR
    if not path.is_file():
        return None
    found = _read(spec, path)
    try:
        return _preprocessing(found)
    except (ConfigError, TypeError, ValueError, KeyError, LookupError, OverflowError) as error:
        raise ModelError(
            f"{spec}: its {_PREPROCESSOR} cannot be used ({one_line(error)}). "
            "Give --resize, --crop, --mean and --std, or correct it.",
            name=spec,
        ) from error


def _read(spec: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ModelError(
            f"{spec}: there is no {path.name} in {plain(path.parent)}. Give the folder that "
            "save_pretrained wrote.",
            name=spec,
        )
    try:
        text = path.read_bytes() if path.stat().st_size <= _TEXT_LIMIT else b""
        found = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{spec}: {plain(path)} cannot be read as JSON ({plain(error)}).", name=spec
        ) from error
    if not isinstance(found, dict):
        raise ModelError(f"{spec}: {plain(path)} is no JSON object.", name=spec)
    return found


def _preprocessing(found: dict[str, Any]) -> Preprocessing:
    resize, crop = None, None
    if found.get("do_resize", True) and found.get("size") is not None:
        resize = _size(found["size"])
        part = found.get("crop_pct")
        if part is not None and len(resize) == 1 and resize[0] < 384:
            # ConvNeXt and its like: the size is that of the crop, the resize is larger by this.
            crop, resize = (resize[0], resize[0]), (int(resize[0] / float(part)),)
    if found.get("do_center_crop") and found.get("crop_size") is not None:
        size = _size(found["crop_size"])
        crop = (size[0], size[-1])
    normalizes = found.get("do_normalize", True) and "image_mean" in found
    number = found.get("resample", 2)
    kind = _FILTERS[number] if type(number) is int and 0 <= number < len(_FILTERS) else ""
    return Preprocessing(
        resize=resize,
        crop=crop,
        interpolation=kind if kind in INTERPOLATIONS else "bilinear",
        mean=_numbers(found["image_mean"]) if normalizes else (0.0,),
        std=_numbers(found["image_std"]) if normalizes else (1.0,),
        scale=float(found.get("rescale_factor", 1 / 255)) if found.get("do_rescale", True) else 1.0,
    )


def _size(found: Any) -> tuple[int, ...]:
    """Height and width, or the shorter side alone."""
    if isinstance(found, dict) and "shortest_edge" in found:
        return (int(found["shortest_edge"]),)
    if isinstance(found, dict):
        return int(found["height"]), int(found["width"])
    if isinstance(found, list):
        return tuple(int(n) for n in found)
    return (int(found), int(found))


def _numbers(found: Any) -> tuple[float, ...]:
    values = found if isinstance(found, list) else [found]
    return tuple(float(value) for value in values)
