"""Build a model from a spec.

The number of classes comes from the checkpoint. The model is built twice without memory, with two
numbers of classes; the shapes that change with that number are solved for the file's number.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Final

import torch
from torch import nn

from bnfix.core.errors import ModelError, did_you_mean, model_error, one_line, some
from bnfix.core.guards import exchange_
from bnfix.models.published import build_pretrained, import_library, tv_models
from bnfix.norm.sites import remember_frozen_

#: The attribute that holds the number of input channels of a model without convolutions.
CHANNELS: Final = "_bnfix_channels"
#: Names that builders give to the number of classes.
CLASS_ARGUMENTS: Final = ("num_classes", "n_classes", "num_labels")
#: Two numbers of classes to probe with: small, and unlike the usual counts.
_PROBES: Final = (11, 13)
#: Arguments of torchvision's and timm's builders that fetch or read weights, or control that.
_WEIGHT_ARGUMENTS: Final = frozenset(
    "weights weights_backbone pretrained pretrained_backbone pretrained_cfg pretrained_cfg_overlay "
    "checkpoint_path cache_dir progress".split()
)
#: Optional parts of torchvision models: the argument, and the prefix of the part's tensors.
_AUXILIARY: Final = {
    "googlenet": ("aux_logits", "aux"),
    "inception": ("aux_logits", "AuxLogits."),
    "fcn": ("aux_loss", "aux_classifier."),
    "deeplabv3": ("aux_loss", "aux_classifier."),
}
#: A model this much larger than its checkpoint is not built: it could not be filled.
_SIZE_LIMIT: Final = 4
_SIZE_FLOOR: Final = 10**7
_FORMS: Final = (
    "torchvision:NAME, timm:NAME, transformers:DIR, package.module:callable or "
    "path/to/file.py:callable"
)
#: torchvision's detectors, which are trained with frozen Batch Norms.
_DETECTORS: Final = ("fasterrcnn", "maskrcnn", "keypointrcnn", "retinanet", "fcos")


#: The parameters of a callable without a signature.
_ANY: Final = inspect.signature(lambda **_: None).parameters


@dataclass(frozen=True)
class _Builder:
    """A callable that returns a model, and its arguments."""

    spec: str
    call: Callable[..., Any]
    class_argument: str | None = None
    fixed: dict[str, Any] = field(default_factory=dict)
    folder: str | None = None  # its code may import from here
    quiet: bool = False
    finish: Callable[[nn.Module], None] | None = None  # applied to the model

    @property
    def parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            return inspect.signature(self.call).parameters
        except (TypeError, ValueError):  # written in C, or hides its signature
            return _ANY

    @property
    def required(self) -> list[str]:
        free = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        parameters = self.parameters.items()
        return [n for n, p in parameters if p.default is p.empty and p.kind not in free]


def build_model(
    spec: str,
    arguments: Mapping[str, Any] | None = None,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> nn.Module:
    """Build the model that a spec names, with fresh weights, on the CPU, in evaluation mode."""
    builder, given = _resolved(spec, arguments, tensors)
    return _build(builder, given, torch.device("cpu"))


def builder_arguments(
    spec: str, arguments: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """All arguments that `build_model` passes to the builder."""
    return _resolved(spec, arguments, tensors)[1]


def build_skeleton(
    spec: str, arguments: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor]
) -> nn.Module | None:
    """Build a model without memory for its tensors, to fill with a checkpoint's tensors."""
    builder, given = _resolved(spec, arguments, tensors)
    found = _with_state(builder, given, "meta")
    if found is None:
        return None
    model, state = found
    known = {id(tensor) for tensor in state.values()}
    if len(known) < len(state):
        return None  # a tensor under two names would become two tensors
    # Tensors outside the state dict would stay empty: buffers that are not saved, plain fields.
    for module in nn.Module.modules(model):
        own = (*module._parameters.values(), *module._buffers.values(), *vars(module).values())
        held = (i for v in own for i in (v if isinstance(v, list | tuple) else [v]))
        if any(isinstance(t, torch.Tensor) and t.is_meta and id(t) not in known for t in held):
            return None
    return model


def _resolved(
    spec: str, arguments: Mapping[str, Any] | None, tensors: Mapping[str, torch.Tensor] | None
) -> tuple[_Builder, dict[str, Any]]:
    given = dict(arguments or {})
    builder = _resolve(spec, given, tensors)
    _check_arguments(builder, given, readable=tensors is not None)
    given = builder.fixed | given
    if tensors is not None:
        given = _with_classes(builder, given, tensors)
        _check_size(builder, given, tensors)
    return builder, given


def from_file_allowed(spec: str) -> bool:
    """Whether a spec that a file names may be built: only the two libraries' code runs."""
    return re.fullmatch(r"(torchvision|timm):[A-Za-z0-9_.\-]+", spec) is not None


def input_channels(model: nn.Module) -> int | None:
    """The channels of a model's input: as stated, or by its first convolution."""
    if (stated := vars(model).get(CHANNELS)) is not None:
        return int(stated)
    # By the class: some networks have an attribute that shadows `modules`.
    for module in nn.Module.modules(model):
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d) and module.in_channels > 0:
            return int(module.in_channels)
    return None


# --- building ---


def _build(builder: _Builder, arguments: dict[str, Any], device: torch.device) -> nn.Module:
    try:
        with seeded(), importable(builder.folder), warnings.catch_warnings(), device:
            if builder.quiet or device.type == "meta":
                warnings.simplefilter("ignore")
            model = builder.call(**copy.deepcopy(arguments))
            if isinstance(model, nn.Module):
                if builder.finish is not None:
                    builder.finish(model)
                remember_frozen_(model)
                return model.eval() if device.type == "meta" else model.to(device).eval()
    except (Exception, SystemExit) as error:
        hint = " Check --model-arg key=value." if isinstance(error, TypeError) else ""
        raise model_error(
            builder.spec, f"building the model failed ({one_line(error)}).{hint}"
        ) from error
    raise model_error(builder.spec, f"returned {type(model).__name__}, expected a torch.nn.Module.")


# Shapes of the model's state dict, without memory if that works; None if it does not build.
def _shapes(builder: _Builder, arguments: dict[str, Any]) -> dict[str, torch.Size] | None:
    found = _with_state(builder, arguments, "meta") or _with_state(builder, arguments, "cpu")
    return found and {n: t.shape for n, t in found[1].items() if isinstance(t, torch.Tensor)}


# A model and its state dict; None if it does not build there. torch raises NotImplementedError
# if code reads the values of tensors without memory.
def _with_state(
    builder: _Builder, arguments: dict[str, Any], device: str
) -> tuple[nn.Module, dict[str, Any]] | None:
    try:
        model = _build(builder, arguments, torch.device(device))
        return model, model.state_dict(keep_vars=True)
    except (ModelError, NotImplementedError):
        return None


def _with_classes(
    builder: _Builder, arguments: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    name = builder.class_argument
    if name is None or any(other in arguments for other in CLASS_ARGUMENTS):
        return arguments
    needed = name in builder.required
    if not needed:
        usual = _shapes(builder, arguments)
        if usual is None or all(tensors[n].shape == s for n, s in usual.items() if n in tensors):
            return arguments
    first, second = (_shapes(builder, arguments | {name: probe}) for probe in _PROBES)
    found = _solve(first, second, tensors) if first and second else set()
    if len(found) == 1:
        return arguments | {name: found.pop()}
    if needed:
        raise model_error(
            builder.spec,
            f"needs {name}, and the checkpoint does not show it. Give --model-arg {name}=N.",
        )
    return arguments


# Every number of classes that a tensor's size implies, given the sizes at two probes.
def _solve(
    first: dict[str, torch.Size], second: dict[str, torch.Size], tensors: Mapping[str, torch.Tensor]
) -> set[int]:
    low, high = _PROBES
    found: set[int] = set()
    for name in first.keys() & second.keys() & tensors.keys():
        sizes = first[name], second[name], tensors[name].shape
        if len({len(size) for size in sizes}) > 1:
            continue
        for size_a, size_b, size in zip(*sizes, strict=True):
            if size_a != size_b:
                classes = low + (size - size_a) * (high - low) / (size_b - size_a)
                found.add(int(classes) if classes == int(classes) and classes >= 1 else 0)
    return found if 0 not in found else set()


def _check_size(
    builder: _Builder, arguments: dict[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    found = _with_state(builder, arguments, "meta")
    if found is None:
        return  # the user's own code needs memory, or fails later
    _, state = found
    size = sum(t.numel() for t in state.values() if isinstance(t, torch.Tensor) and t.is_meta)
    held = sum(tensor.numel() for tensor in tensors.values())
    if size > max(_SIZE_LIMIT * held, _SIZE_FLOOR):
        missing = [name for name in state if name not in tensors]
        unexpected = [name for name in tensors if name not in state]
        raise model_error(
            builder.spec,
            f"has {size} values, the checkpoint only {held}; "
            f"missing from the file: {some(missing, 2) or 'none'}; "
            f"not in the model: {some(unexpected, 2) or 'none'}. Check --model and its arguments.",
        )


# Everything unknown or missing; a checkpoint can supply the number of classes.
def _check_arguments(builder: _Builder, given: dict[str, Any], *, readable: bool) -> None:
    kinds = {name: parameter.kind for name, parameter in builder.parameters.items()}
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = [name for name, kind in kinds.items() if kind in by_name]
    problems = []
    if inspect.Parameter.VAR_KEYWORD not in kinds.values():
        unknown = [name for name in given if name not in named]
        takes = f"takes {some(named, 12)}" if named else "takes no arguments"
        problems += [f"unknown argument {some(unknown)} ({takes})"] if unknown else []
    known = {*given, *builder.fixed, *([builder.class_argument] if readable else [])}
    missing = [name for name in builder.required if name not in known]
    problems += [f"argument {some(missing)} is missing"] if missing else []
    if problems:
        raise model_error(builder.spec, f"{'; '.join(problems)}. Change --model-arg key=value.")


# --- resolving ---


def _resolve(
    spec: str, given: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None
) -> _Builder:
    kind, _, name = spec.partition(":")
    where, _, attribute = spec.rpartition(":")
    if kind in ("torchvision", "timm") and name:
        forbidden = [argument for argument in given if argument in _WEIGHT_ARGUMENTS]
        if forbidden:
            raise model_error(
                spec,
                f"argument {some(forbidden)} is not accepted: weights come from the checkpoint. "
                "Leave it out.",
            )
        return _torchvision(spec, name, tensors) if kind == "torchvision" else _timm(spec, name)
    if kind == "transformers" and name:
        return _Builder(
            spec,
            lambda **arguments: build_pretrained(spec, name, arguments),
            class_argument="num_labels",
            quiet=True,
        )
    if not where or not attribute:
        close = difflib.get_close_matches(spec, tv_models().list_models(), 1)
        hint = f" Did you mean torchvision:{close[0]}?" if close else ""
        raise model_error(spec, f"is not a model, expected {_FORMS}.{hint}")
    near = difflib.get_close_matches(kind, ("torchvision", "timm", "transformers"), 1, 0.7)
    if near and name and kind.isidentifier() and importlib.util.find_spec(kind) is None:
        raise model_error(spec, f"no such kind. Did you mean {near[0]}:{name}?")
    call, folder = import_callable(spec)
    if isinstance(call, nn.Module) or not callable(call):
        found = "a model" if isinstance(call, nn.Module) else f"of type {type(call).__name__}"
        raise model_error(
            spec, f"is {found}, expected a class or function that returns a model. Name one."
        )
    builder = _Builder(spec, call, folder=folder)
    takes = (name for name in CLASS_ARGUMENTS if name in builder.parameters)
    return replace(builder, class_argument=next(takes, None))


def _unknown_name(spec: str, name: str, names: Sequence[str], library: str) -> ModelError:
    hint = did_you_mean(name, names, 3) or f" See {library}'s list of models."
    return model_error(spec, f"{library} has no model of that name.{hint}")


def _torchvision(spec: str, name: str, tensors: Mapping[str, torch.Tensor] | None) -> _Builder:
    names = tv_models().list_models()
    if name not in names:
        raise _unknown_name(spec, name, names, "torchvision")
    call = tv_models().get_model_builder(name)
    fixed: dict[str, Any] = {"weights": None}
    parameters = inspect.signature(call).parameters
    if "weights_backbone" in parameters:
        fixed["weights_backbone"] = None
    stem = name.removeprefix("quantized_")
    if stem.startswith(("googlenet", "inception")):
        fixed["init_weights"] = False  # otherwise it warns, and takes a minute
    argument, start = next((a for key, a in _AUXILIARY.items() if stem.startswith(key)), (None, ""))
    if argument and tensors is not None:
        fixed[argument] = any(key.startswith(start) for key in tensors)
    finish = None
    if tensors is not None and stem.startswith(_DETECTORS):
        finish = partial(_freeze_as_stored_, tensors=tensors)
    return _Builder(spec, call, "num_classes", fixed, quiet=True, finish=finish)


def _freeze_as_stored_(model: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a detector frozen Batch Norms if its file has no batch counters; those have none."""
    # The builder does so only if it fetches weights, and here it never does.
    norms = {n: m for n, m in model.named_modules() if type(m) is nn.BatchNorm2d}
    stored = [name for name in norms if f"{name}.running_var" in tensors]
    if not stored or any(f"{name}.num_batches_tracked" in tensors for name in stored):
        return
    from torchvision.ops.misc import FrozenBatchNorm2d

    for name in stored:
        norm = norms[name]
        exchange_(norm, FrozenBatchNorm2d(norm.num_features, norm.eps))


def _timm(spec: str, name: str) -> _Builder:
    timm = import_library("timm", spec)
    # Names such as hf-hub:... or local-dir:... would fetch files.
    if not timm.is_model(name) or not from_file_allowed(spec):
        raise _unknown_name(spec, name, timm.list_models(), "timm")
    call = partial(timm.create_model, name)
    return _Builder(spec, call, "num_classes", {"pretrained": False}, quiet=True)


@contextmanager
def seeded() -> Iterator[None]:
    """Run a block with torch's generator at seed 0, and put its state back."""
    with torch.random.fork_rng(devices=[]):
        # Only this generator: torch.manual_seed would also touch other devices' generators.
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def importable(folder: str | None) -> Iterator[None]:
    """Let a block import from a folder first."""
    # First, as with `python -m` and `python file.py`; the code can import more when it is called.
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
        raise model_error(spec, "no such file. Give the path to a Python file.")
    # By content: the same file gives the same classes, and a changed file gives new ones.
    try:
        source = path.read_bytes()
    except OSError as error:
        raise model_error(spec, f"cannot be read ({error.strerror}).") from error
    identity = hashlib.sha256(str(path.resolve()).encode() + b"\0" + source)
    name = f"_bnfix_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{identity.hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise model_error(spec, "is not a Python file. Give a name ending in .py.")
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # before it runs, since it can pickle its classes while it runs
    try:
        # Not by the loader: its bytecode can be from a version of the same second and size.
        exec(compile(source, str(path), "exec", dont_inherit=True), module.__dict__)
    except BaseException as error:
        del sys.modules[name]
        if not isinstance(error, Exception | SystemExit):
            raise
        raise model_error(spec, f"importing {path} failed ({one_line(error)}).") from error
    return module


def _import_module(spec: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name is not None
        if absent and (name == error.name or name.startswith(f"{error.name}.")):  # type: ignore[union-attr]
            raise model_error(
                spec,
                f"there is no module {name}, neither installed nor in the current folder. "
                "Expected package.module:callable or path/to/file.py:callable.",
            ) from error
        raise model_error(spec, f"importing {name} failed ({one_line(error)}).") from error


def import_callable(spec: str) -> tuple[Callable[..., Any], str]:
    """Import the callable that the user names, running the user's code; also its folder."""
    where, _, attribute = spec.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    folder = str(Path(where).resolve().parent if is_file else Path.cwd())
    with seeded(), importable(folder):
        module = _import_file(spec, Path(where)) if is_file else _import_module(spec, where)
    return _attribute(spec, module, attribute), folder


def _attribute(spec: str, module: ModuleType, dotted: str) -> Any:
    found: Any = module
    for part in dotted.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value)]
            raise model_error(spec, f"there is no {part} in it.{did_you_mean(part, names)}")
        found = getattr(found, part)
    return found


def import_forward(spec: str) -> Callable[..., Any]:
    """Import the function that is called with a model and a batch, running the user's code."""
    where, _, attribute = spec.rpartition(":")
    found = import_callable(spec)[0] if where and attribute else None
    if callable(found) and not isinstance(found, type):
        return found
    problem = (
        f"is of type {type(found).__name__}, expected a function that is called with the model and "
        "a batch."
        if where and attribute
        else "expected package.module:callable or path/to/file.py:callable."
    )
    raise ModelError(f"--forward {spec}: {problem}", name="forward")
