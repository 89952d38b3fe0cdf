"""Published networks: their libraries, their preprocessing, and folders that transformers saved.

Nothing is fetched or trusted. In a folder, only ``config.json`` names the model, and only from
the classes of transformers itself; code in the folder is never run.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import math
import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from bnfix.core.errors import ConfigError, did_you_mean, model_error, model_errors, plain
from bnfix.core.options import INTERPOLATIONS
from bnfix.core.settings import Preprocessing


def import_library(name: str, spec: str) -> ModuleType:
    """Import a library that is an extra of this package."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(name)
    except ImportError as error:
        raise model_error(
            spec, f"needs {name}, which is not installed ({error}). pip install 'bnfix[{name}]'."
        ) from error


def tv_models() -> Any:
    """Torchvision's models; a function, since the import takes seconds."""
    import torchvision

    return torchvision.models


def default_preprocessing(spec: str, sha256: str = "") -> tuple[Preprocessing, str] | None:
    """The preprocessing by a published model's authors, and its source in words; no download."""
    kind, _, name = spec.partition(":")
    if kind == "transformers":
        own = folder_preprocessing(spec, name)
        return None if own is None else (own, f"preprocessing of {spec}")
    if kind != "torchvision" or name not in tv_models().list_models():
        return None
    # A digest identifies the file's own weights; else the first ImageNet weights are used.
    published = filter(None, [published_weights(spec, sha256)])
    for weights in (*published, *tv_models().get_model_weights(name)):
        found = _of_transforms(weights)
        if found is not None and "IMAGENET1K" in weights.name:
            return found, f"preprocessing of torchvision's {type(weights).__name__}.{weights.name}"
    return None


def published_weights(spec: str, sha256: str) -> Any | None:
    """The published weights that a file holds: torchvision's URL has its digest's first digits."""
    kind, _, name = spec.partition(":")
    if kind != "torchvision" or not sha256 or name not in tv_models().list_models():
        return None
    for weights in tv_models().get_model_weights(name):
        digits = str(weights.url).rpartition("-")[2].partition(".")[0]
        if len(digits) >= 8 and sha256.startswith(digits):
            return weights
    return None


def published_arguments(spec: str, sha256: str) -> dict[str, Any] | None:
    """Arguments that go with a model's published weights; None if no weights of it need any."""
    # These two models were normalized differently: the builder has a switch, the file does not.
    if spec not in ("torchvision:googlenet", "torchvision:inception_v3"):
        return None
    return {} if published_weights(spec, sha256) is None else {"transform_input": True}


def preset_preprocessing(preset: str) -> Preprocessing:
    """The preprocessing that a preset names; nothing is downloaded."""
    kind, _, name = preset.partition(":")
    if kind == "torchvision":
        try:
            found = _of_transforms(tv_models().get_weight(name))
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
    enums = [tv_models().get_model_weights(m) for m in tv_models().list_models()]
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
    return _of_timm_config(config)


def _of_timm_config(config: Any) -> Preprocessing | None:
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


_CALLABLE: Final = "give a callable that builds it: --model path/to/file.py:callable."
_CONFIG, _PREPROCESSOR = "config.json", "preprocessor_config.json"
#: A longer file is not a model's description.
_TEXT_LIMIT: Final = 8 * 2**20
#: Prefixes of timm's names for files to fetch or read.
_ELSEWHERE: Final = ("hf-hub:", "hf_hub:", "local-dir:", "http:", "https:")
#: Pillow's filters, by their numbers.
_FILTERS: Final = ("nearest", "lanczos", "bilinear", "bicubic", "box", "hamming")


def build_pretrained(spec: str, folder: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the model of a folder's configuration, with overridden entries and fresh weights."""
    config = _read(spec, Path(folder) / _CONFIG)
    _refuse_code(spec, config)
    transformers = import_library("transformers", spec)
    elsewhere = [name for name, value in config.items() if str(value).startswith(_ELSEWHERE)]
    if isinstance(config.get("backbone"), str) and not config.get("use_timm_backbone"):
        elsewhere.append("backbone")
    if elsewhere:
        raise model_error(
            spec,
            f"its {_CONFIG} names files elsewhere ({elsewhere[0]}), and nothing is fetched. "
            f"To use it, {_CALLABLE}",
        )
    if "num_labels" in arguments:
        config = {n: v for n, v in config.items() if n not in ("id2label", "label2id")}
    config = _without_fetching(config | arguments)
    kind = config.pop("model_type", None)
    if not isinstance(kind, str):
        raise model_error(spec, f"its {_CONFIG} names no model_type.")
    found = _class_of(spec, transformers, config.get("architectures"))
    wanted = "image classifier" if found is None else found.__name__
    problem = f"transformers builds no {wanted} from its {_CONFIG}"
    advice = "Check the folder and --model-arg."
    with model_errors(spec, problem, advice), warnings.catch_warnings(action="ignore"):
        described = type(transformers.AutoConfig.for_model(kind)).from_dict(config)
        if found is None:
            model = transformers.AutoModelForImageClassification.from_config(
                described, trust_remote_code=False
            )
        elif isinstance(described, found.config_class):
            model = found(described)
        else:
            raise TypeError(f"it does not accept the configuration of {kind}")
    if not isinstance(model, nn.Module):
        raise model_error(spec, "transformers built no torch.nn.Module.")
    return model


def _refuse_code(spec: str, config: dict[str, Any]) -> None:
    foreign = [name for name in ("auto_map", "custom_pipelines") if config.get(name)]
    if foreign:
        raise model_error(
            spec,
            f"its {_CONFIG} asks for its own code ({foreign[0]}), which is not run. "
            f"If you trust it, {_CALLABLE}",
        )


def described_in(folder: Path) -> tuple[str, dict[str, Any], Preprocessing | None]:
    """The model that a folder describes: its spec, the builder's arguments, the preprocessing."""
    spec = f"transformers:{folder}"
    config = _read(str(folder), folder / _CONFIG)
    _refuse_code(spec, config)
    if config.get("model_type"):
        return spec, {}, folder_preprocessing(spec, str(folder))
    name = config.get("architecture")
    if not isinstance(name, str):
        raise model_error(
            str(folder),
            f"its {_CONFIG} names no model: expected model_type, as transformers writes it, or "
            "architecture, as timm does. Give --model.",
        )
    return f"timm:{name}", *_as_timm_reads(f"timm:{name}", config)


def _as_timm_reads(
    spec: str, config: dict[str, Any]
) -> tuple[dict[str, Any], Preprocessing | None]:
    """The builder's arguments and the preprocessing in a timm configuration."""
    timm = import_library("timm", spec)
    # Older configurations have no inner part.
    inner, arguments = config.get("pretrained_cfg", config), config.get("model_args") or {}
    wrong = (AttributeError, TypeError, ValueError, LookupError, ArithmeticError)
    problem, advice = f"its {_CONFIG} cannot be used", "Give --model, or correct it."
    with model_errors(spec, problem, advice, wrong):
        fields = timm.models.PretrainedCfg.__dataclass_fields__
        known = timm.models.PretrainedCfg(**{n: v for n, v in inner.items() if n in fields})
        channels, *size = known.input_size
        found: dict[str, Any] = {} if channels == 3 else {"in_chans": channels}
        found |= {"img_size": size} if known.fixed_input_size else {}
        n_classes = config.get("num_classes", inner.get("num_classes"))
        found |= {} if n_classes is None else {"num_classes": n_classes}
        return {**found, **arguments}, _of_timm_config(known)


def folder_labels(folder: Path) -> tuple[str, ...]:
    """The names of the outputs in a folder's configuration; empty if it states none."""
    config = _read(str(folder), folder / _CONFIG)
    inner = config.get("pretrained_cfg", config)
    stated = config.get("id2label") or config.get("label_names")
    if not stated and isinstance(inner, dict):
        stated = inner.get("label_names") or inner.get("labels")
    if isinstance(stated, dict):
        stated = [stated.get(str(k)) for k in range(len(stated))]
    if isinstance(stated, list) and all(isinstance(name, str) for name in stated):
        return tuple(stated)
    return ()


def _class_of(spec: str, transformers: Any, stated: Any) -> Any:
    """The class of transformers itself that a configuration names, if any."""
    if not stated:
        return None
    name = stated[0] if isinstance(stated, list) else stated
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise model_error(
            spec,
            f"its {_CONFIG} names the architecture {plain(name)!r}, which transformers "
            f"{transformers.__version__} does not have. Install one that has it, or {_CALLABLE}",
        )
    return found


def _without_fetching(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration that fetches no weights: the checkpoint would replace them at once."""
    off = {name: False for name in ("use_pretrained_backbone", "pretrained") if config.get(name)}
    return {n: _without_fetching(v) if isinstance(v, dict) else v for n, v in config.items()} | off


def renamed(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors under a model's own names, as transformers loads them; else empty."""
    kind: Any = type(model)
    transformers = import_library("transformers", kind.__name__)
    config: Any = copy.deepcopy(model.config)
    # Otherwise it would be the type of the loaded tensors.
    setattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None)
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    try:
        with (
            model_errors(kind.__name__, "transformers cannot load the checkpoint"),
            warnings.catch_warnings(action="ignore"),
            redirect_stderr(io.StringIO()),
        ):
            loaded, found = kind.from_pretrained(
                None, config=config, state_dict=dict(tensors), output_loading_info=True
            )
    finally:
        transformers.logging.set_verbosity(verbosity)
    missing = {name for name in found["missing_keys"] if not name.endswith("num_batches_tracked")}
    if missing or any(found[name] for name in ("unexpected_keys", "mismatched_keys")):
        return {}
    state = {n: t for n, t in loaded.state_dict().items() if n not in found["missing_keys"]}
    types = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    # from_pretrained gives all tensors the model's type; a file's single type is kept.
    kept = types.pop() if len(types) == 1 else None
    return {n: t.to(kept) if kept and t.is_floating_point() else t for n, t in state.items()}


def names_in_file(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """The file's name of each tensor that `renamed` renames; empty if it changes their values."""
    # Every tensor holds its own number, which identifies it afterwards.
    marked = {n: torch.full(t.shape, float(k)) for k, (n, t) in enumerate(tensors.items())}
    found, names = renamed(model, marked), list(tensors)
    if any(t.numel() == 0 or bool((t != t.flatten()[0]).any()) for t in found.values()):
        return {}
    return {name: names[int(t.flatten()[0])] for name, t in found.items()}


def folder_preprocessing(spec: str, folder: str) -> Preprocessing | None:
    """The preprocessing that a folder states, if it states one."""
    path = Path(folder) / _PREPROCESSOR
    if not path.is_file():
        return None
    found, problem = _read(spec, path), f"its {_PREPROCESSOR} cannot be used"
    advice = "Give --resize, --crop, --mean and --std, or correct it."
    with model_errors(spec, problem, advice, (TypeError, ValueError, LookupError, OverflowError)):
        return _preprocessing(found)


def _read(spec: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise model_error(
            spec,
            f"there is no {path.name} in {plain(path.parent)}. Give the folder that "
            "save_pretrained wrote.",
        )
    try:
        found = json.loads(path.read_bytes() if path.stat().st_size <= _TEXT_LIMIT else b"")
    except (OSError, ValueError, RecursionError) as error:
        raise model_error(
            spec, f"{plain(path)} cannot be read as JSON ({plain(error)})."
        ) from error
    if not isinstance(found, dict):
        raise model_error(spec, f"{plain(path)} is not a JSON object.")
    return found


def _preprocessing(found: dict[str, Any]) -> Preprocessing:
    resize, crop = None, None
    if found.get("do_resize", True) and found.get("size") is not None:
        resize = _size(found["size"])
        part = found.get("crop_pct")
        if part is not None and len(resize) == 1 and resize[0] < 384:
            # ConvNeXt and similar: the size is the crop's, and the resize is larger by this factor.
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
        bgr=found.get("do_flip_channel_order") is True,
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
