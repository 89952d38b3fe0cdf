"""A model from a spec, and the preprocessing that belongs to a published one.

The number of classes is read off the checkpoint: the model is built twice without memory, with two
numbers of classes, and the shapes that move with that number are solved for what the file has.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final, cast

import torch
import torchvision
from torch import nn

from bnfix.errors import ConfigError, ModelError, some
from bnfix.recipe import INTERPOLATIONS, Preprocessing

#: What builders call the number of classes.
CLASS_ARGUMENTS: Final = ("num_classes", "n_classes")
#: Two numbers of classes to probe with: small, and unlike the usual counts.
_PROBES: Final = (11, 13)
#: Arguments of torchvision's and timm's builders that fetch or read weights, or speak of it.
_WEIGHT_ARGUMENTS: Final = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_backbone",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
    "progress",
)
#: Parts that a torchvision model has or has not: the argument, and how the part's tensors begin.
_AUXILIARY: Final = {
    "googlenet": ("aux_logits", "aux"),
    "inception": ("aux_logits", "AuxLogits."),
    "fcn": ("aux_loss", "aux_classifier."),
    "deeplabv3": ("aux_loss", "aux_classifier."),
}
#: A model this much larger than its checkpoint is not built: it could not be filled.
_SIZE_LIMIT: Final = 4
_SIZE_FLOOR: Final = 10**7
_FORMS: Final = "torchvision:NAME, timm:NAME, package.module:callable or path/to/file.py:callable"


@dataclass(frozen=True)
class _Builder:
    """A callable that returns a model, with what it is known to take."""

    spec: str
    call: Callable[..., Any]
    class_argument: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None
    quiet: bool = False


def build_model(
    spec: str,
    arguments: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Build the model that a spec names, with fresh weights, on the CPU, in evaluation mode.

    Args:
        spec: ``torchvision:NAME``, ``timm:NAME``, ``package.module:callable`` (also from the
            current folder) or ``path/to/file.py:callable``. The latter two run the user's code.
        arguments: keyword arguments of the builder.
        tensors: a checkpoint's tensors; given, the number of classes is read off them where the
            builder takes one and ``arguments`` do not say it.

    Returns:
        The model. The random state of torch is left as found.

    Raises:
        ModelError: if the spec is not known, its code fails, an argument is unknown or missing, or
            no model comes out.
    """
    given = dict(arguments or {})
    builder = _resolve(spec, given, tensors)
    _check_arguments(builder, given, readable=tensors is not None)
    given = builder.fixed | given
    if tensors is not None:
        given = _with_classes(builder, given, tensors)
        _check_size(builder, given, tensors)
    return _build(builder, given, torch.device("cpu"))


def from_file_allowed(spec: str) -> bool:
    """Say whether a spec may be built because a file says so: no code but the two libraries' runs.

    Args:
        spec: a model spec.

    Returns:
        True for ``torchvision:NAME`` and ``timm:NAME``.
    """
    return re.fullmatch(r"(torchvision|timm):[A-Za-z0-9_.\-]+", spec) is not None


def input_channels(model: nn.Module) -> int | None:
    """Find how many channels a model's input has.

    Args:
        model: any module.

    Returns:
        The input channels of its first convolution; None if there is none.
    """
    # By the class: some networks have an attribute that shadows `modules`.
    for module in nn.Module.modules(model):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.in_channels > 0:
            return int(module.in_channels)
    return None


# --- building ---


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= 300 else text[:297] + '...'}"


def _build(builder: _Builder, arguments: dict[str, Any], device: torch.device) -> nn.Module:
    try:
        with (
            _seeded(),
            _importable(builder.folder),
            warnings.catch_warnings(),
            device,
        ):
            if builder.quiet or device.type == "meta":
                warnings.simplefilter("ignore")
            model = builder.call(**copy.deepcopy(arguments))
            if isinstance(model, nn.Module):
                return model.eval() if device.type == "meta" else model.to(device).eval()
    except (Exception, SystemExit) as error:
        hint = " Check --model-arg key=value." if isinstance(error, TypeError) else ""
        raise ModelError(
            f"{builder.spec}: building the model failed ({_reason(error)}).{hint}",
            name=builder.spec,
        ) from error
    raise ModelError(
        f"{builder.spec}: returned {type(model).__name__}, expected a torch.nn.Module.",
        name=builder.spec,
    )


def _shapes(builder: _Builder, arguments: dict[str, Any]) -> dict[str, torch.Size] | None:
    # Shapes of the model's state dict, without memory where that works; None if it does not build.
    for device in ("meta", "cpu"):
        try:
            model = _build(builder, arguments, torch.device(device))
            state = model.state_dict()
        except (ModelError, NotImplementedError):
            continue
        return {n: t.shape for n, t in state.items() if isinstance(t, torch.Tensor)}
    return None


def _with_classes(
    builder: _Builder, arguments: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    name = builder.class_argument
    if name is None or any(other in arguments for other in CLASS_ARGUMENTS):
        return arguments
    needed = name in _required(builder)
    if not needed:
        usual = _shapes(builder, arguments)
        if usual is None or all(tensors[n].shape == s for n, s in usual.items() if n in tensors):
            return arguments
    first, second = (_shapes(builder, arguments | {name: probe}) for probe in _PROBES)
    found = _solve(first, second, tensors) if first and second else set()
    if len(found) == 1:
        return arguments | {name: found.pop()}
    if needed:
        raise ModelError(
            f"{builder.spec}: needs {name}, and the checkpoint does not show it. "
            f"Give --model-arg {name}=N.",
            name=builder.spec,
        )
    return arguments


def _solve(
    first: dict[str, torch.Size],
    second: dict[str, torch.Size],
    tensors: Mapping[str, torch.Tensor],
) -> set[int]:
    # Every number of classes that some tensor's size stands for, given the sizes at two probes.
    low, high = _PROBES
    found: set[int] = set()
    for name, a in first.items():
        b = second.get(name, a)
        if a == b or len(a) != len(b) or name not in tensors or tensors[name].dim() != len(a):
            continue
        for size_a, size_b, size in zip(a, b, tensors[name].shape, strict=True):
            if size_a != size_b:
                slope = (size_b - size_a) / (high - low)
                classes = low + (size - size_a) / slope
                found.add(int(classes) if classes == int(classes) and classes >= 1 else 0)
    return found if 0 not in found else set()


def _check_size(
    builder: _Builder, arguments: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    try:
        skeleton = _build(builder, arguments, torch.device("meta"))
        state = skeleton.state_dict()
    except (ModelError, NotImplementedError):
        return  # it cannot be had without memory: then it is the user's own code, or fails below
    size = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.is_meta)
    held = sum(tensor.numel() for tensor in tensors.values())
    if size > max(_SIZE_LIMIT * held, _SIZE_FLOOR):
        missing = [name for name in state if name not in tensors]
        unexpected = [name for name in tensors if name not in state]
        raise ModelError(
            f"{builder.spec}: has {size} values, the checkpoint only {held}; "
            f"missing from the file: {some(missing) or 'none'}; "
            f"not in the model: {some(unexpected) or 'none'}. Check --model and its arguments.",
            name=builder.spec,
        )


# --- arguments ---


def _signature(builder: _Builder) -> inspect.Signature | None:
    try:
        return inspect.signature(builder.call)
    except (TypeError, ValueError):
        return None  # written in C, or hides it


def _required(builder: _Builder) -> list[str]:
    signature = _signature(builder)
    return [
        name
        for name, parameter in (signature.parameters.items() if signature else ())
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]


def _check_arguments(builder: _Builder, given: dict[str, Any], readable: bool) -> None:
    # All that is unknown or missing; the number of classes may be readable off a checkpoint.
    signature = _signature(builder)
    if signature is None:
        return
    kinds = {name: parameter.kind for name, parameter in signature.parameters.items()}
    named = [
        name
        for name, kind in kinds.items()
        if kind in (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    ]
    problems = []
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        unknown = [name for name in given if name not in named]
        takes = f"takes {some(named, 12)}" if named else "takes no arguments"
        problems += [f"unknown argument {some(unknown)} ({takes})"] if unknown else []
    known = {*given, *builder.fixed, *([builder.class_argument] if readable else [])}
    missing = [name for name in _required(builder) if name not in known]
    problems += [f"argument {some(missing)} is missing"] if missing else []
    if problems:
        raise ModelError(
            f"{builder.spec}: {'; '.join(problems)}. Change --model-arg key=value.",
            name=builder.spec,
        )


# --- resolving ---


def _resolve(
    spec: str, given: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None
) -> _Builder:
    kind, _, name = spec.partition(":")
    where, _, attribute = spec.rpartition(":")
    if kind in ("torchvision", "timm") and name:
        forbidden = [argument for argument in given if argument in _WEIGHT_ARGUMENTS]
        if forbidden:
            raise ModelError(
                f"{spec}: argument {some(forbidden)} is not taken, weights come from the "
                "checkpoint. Leave it out.",
                name=spec,
            )
        return _torchvision(spec, name, tensors) if kind == "torchvision" else _timm(spec, name)
    if kind == "transformers":
        raise ModelError(
            f"{spec}: transformers models are not built by this version. "
            "Give a callable that returns the model, as path/to/file.py:callable.",
            name=spec,
        )
    if not where or not attribute:
        close = difflib.get_close_matches(spec, torchvision.models.list_models(), 1)
        hint = f" Did you mean torchvision:{close[0]}?" if close else ""
        raise ModelError(f"{spec}: is not a model, expected {_FORMS}.{hint}", name=spec)
    is_file = where.endswith(".py") or "/" in where
    folder = str(Path(where).resolve().parent if is_file else Path.cwd())
    with _seeded(), _importable(folder):
        module = _import_file(spec, Path(where)) if is_file else _import_module(spec, where)
    call = _attribute(spec, module, attribute)
    builder = _Builder(spec, call, folder=folder)
    signature = _signature(builder)
    takes = [name for name in CLASS_ARGUMENTS if signature and name in signature.parameters]
    return _Builder(spec, call, class_argument=takes[0] if takes else None, folder=folder)


def _unknown_name(spec: str, name: str, names: Sequence[str], library: str) -> ModelError:
    close = difflib.get_close_matches(name, names, 3)
    hint = f"Did you mean {', '.join(close)}?" if close else f"See {library}'s list of models."
    return ModelError(f"{spec}: {library} has no model of that name. {hint}", name=spec)


def _torchvision(spec: str, name: str, tensors: Mapping[str, torch.Tensor] | None) -> _Builder:
    names = torchvision.models.list_models()
    if name not in names:
        raise _unknown_name(spec, name, names, "torchvision")
    call = torchvision.models.get_model_builder(name)
    fixed: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(call).parameters
    if "weights_backbone" in parameters:
        fixed["weights_backbone"] = None
    stem = name.removeprefix("quantized_")
    if stem.startswith(("googlenet", "inception")):
        fixed["init_weights"] = False  # else it warns, and takes a minute
    argument, start = next((a for key, a in _AUXILIARY.items() if stem.startswith(key)), (None, ""))
    if argument and tensors is not None:
        fixed[argument] = any(key.startswith(start) for key in tensors)
    return _Builder(spec, call, "num_classes", fixed, quiet=True)


def _timm(spec: str, name: str) -> _Builder:
    timm = _import_timm(spec)
    # Names such as hf-hub:... or local-dir:... would fetch files.
    if not timm.is_model(name) or not from_file_allowed(spec):
        raise _unknown_name(spec, name, timm.list_models(), "timm")
    return _Builder(
        spec, partial(timm.create_model, name), "num_classes", {"pretrained": False}, quiet=True
    )


def _import_timm(spec: str) -> ModuleType:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module("timm")
    except ImportError as error:
        raise ModelError(
            f"{spec}: needs timm, which is not installed ({error}). pip install 'bnfix[timm]'.",
            name=spec,
        ) from error


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        # Only this generator: torch.manual_seed would touch those of other devices, too.
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def _importable(folder: str | None) -> Iterator[None]:
    # First, as `python -m` and `python file.py` have it; the code may import on when it is called.
    if folder is None:
        yield
        return
    importlib.invalidate_caches()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        if folder in sys.path:
            sys.path.remove(folder)


def _import_file(spec: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"{spec}: no such file. Give the path to a Python file.", name=spec)
    # By content: the same file gives the same classes, a changed one does not meet the old ones.
    try:
        identity = hashlib.sha256(str(path.resolve()).encode() + b"\0" + path.read_bytes())
    except OSError as error:
        raise ModelError(f"{spec}: cannot be read ({error.strerror}).", name=spec) from error
    name = f"_bnfix_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{identity.hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise ModelError(f"{spec}: is not a Python file. Give a name ending in .py.", name=spec)
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module
    try:
        described.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise ModelError(
            f"{spec}: importing {path} failed ({_reason(error)}).", name=spec
        ) from error
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if absent and (name == error.name or name.startswith(f"{error.name}.")):  # type: ignore[union-attr]
            raise ModelError(
                f"{spec}: there is no module {name}, neither installed nor in the current folder. "
                f"Expected {_FORMS}.",
                name=spec,
            ) from error
        raise ModelError(
            f"{spec}: importing {name} failed ({_reason(error)}).", name=spec
        ) from error


def _attribute(spec: str, module: ModuleType, dotted: str) -> Callable[..., Any]:
    found: Any = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value)]
            close = difflib.get_close_matches(part, names, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise ModelError(f"{spec}: there is no {part} in it.{hint}", name=spec)
        found = getattr(found, part)
    if isinstance(found, nn.Module):
        raise ModelError(
            f"{spec}: is a model, expected a class or function that returns one. Name that.",
            name=spec,
        )
    if not callable(found):
        raise ModelError(
            f"{spec}: is of type {type(found).__name__}, expected a class or function that "
            "returns a model.",
            name=spec,
        )
    return cast(Callable[..., Any], found)


# --- preprocessing ---


def default_preprocessing(spec: str) -> tuple[Preprocessing, str] | None:
    """Look up what the authors of a published model feed it; nothing is downloaded.

    Args:
        spec: a model spec.

    Returns:
        The preprocessing of the first ImageNet weights of ``torchvision:NAME``, with a note that
        says so; None for other specs, and for models without such weights.
    """
    kind, _, name = spec.partition(":")
    if kind != "torchvision" or name not in torchvision.models.list_models():
        return None
    for weights in torchvision.models.get_model_weights(name):
        found = _of_transforms(weights)
        if found is not None and "IMAGENET1K" in weights.name:
            return found, f"preprocessing of torchvision's {type(weights).__name__}.{weights.name}"
    return None


def preset_preprocessing(preset: str) -> Preprocessing:
    """Look up a named preprocessing; nothing is downloaded.

    Args:
        preset: ``torchvision:WEIGHTS_NAME``, as in
            ``torchvision:ResNet50_Weights.IMAGENET1K_V2``, or ``timm:NAME``.

    Returns:
        The preprocessing.

    Raises:
        ConfigError: if there is no such preset, or it is not one of image classification.
        ModelError: if timm is asked and not installed.
    """
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
    timm = _import_timm(preset)
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
