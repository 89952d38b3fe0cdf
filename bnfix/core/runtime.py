"""How the model runs: device, precision, and the form of batches and outputs."""

from __future__ import annotations

import dataclasses
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnfix.core import distributed, masks
from bnfix.core.errors import (
    BnfixError,
    ConfigError,
    DataError,
    ModelError,
    NormError,
    one_line,
    some,
)
from bnfix.core.options import one_of
from bnfix.core.torch_private import BatchNormBase, tree_map

#: Runs a model on one batch of the user's own form.
Forward = Callable[[nn.Module, Any], Any]
#: Batches, or a function that gives the batches of the k-th pass, to shuffle each pass.
Batches = Iterable[Any] | Callable[[int], Iterable[Any]]

#: The model attribute that holds the user's forward function.
FORWARD = "_bnfix_forward"
#: The model attribute that names the selected output.
OUTPUT = "_bnfix_output"
#: Models that train only with targets as inputs, and then return their own losses.
_TAKES_TARGETS: weakref.WeakSet[nn.Module] = weakref.WeakSet()
_INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")
_LABEL_KEYS = ("labels", "label", "target", "targets", "y")
_GIVE_FORWARD = "Give --forward (in Python forward=), a function of the model and the batch."
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(text: str) -> torch.device:
    """The device that an option names."""
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and distributed.here().shared and torch.cuda.is_available():
        text = f"cuda:{distributed.here().on_machine % torch.cuda.device_count()}"
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ConfigError(
            f"--device: {text!r} is not known. Use auto, cpu, cuda or cuda:N.", name="device"
        ) from error
    n = torch.cuda.device_count()
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n):
        raise ConfigError(
            f"--device: {text!r} is not on this machine ({n} CUDA devices). Use cpu or auto.",
            name="device",
        )
    return device


def exact_float32() -> None:
    """Turn TF32 off, because metrics on CPU and CUDA must agree to rounding."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device_of(model: nn.Module) -> torch.device:
    """The device of a model's tensors."""
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The autocast context for a precision."""
    one_of(precision, ("fp32", *_AUTOCAST), "--precision")
    if precision == "fp32":
        return nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def unpack(batch: Any, model: nn.Module | None = None) -> tuple[Any, Tensor | None]:
    """The inputs (a tuple if there are several) and the labels of a batch of a usual form."""
    args, named, labels = _parts(batch, model)
    return ((args[0] if len(args) == 1 else args) if args else named), labels


def _parts(batch: Any, model: nn.Module | None) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """The positional and named arguments for `model` from a batch, and its labels or `None`."""
    names, least, most = _parameters(model)
    if isinstance(batch, Mapping):
        return _parts_by_name(batch, names)
    if not isinstance(batch, list | tuple):
        return (batch,), {}, None
    if not batch:
        raise DataError("batch: an empty tuple, expected (x, y), (x,) or x.")
    fields = getattr(batch, "_fields", ())
    stated = [fields.index(key) for key in _LABEL_KEYS if key in fields]
    place = stated[0] if stated else 1
    if len(batch) > 2 and most > 1 and not stated and not _like_labels(batch[1]):
        place = len(batch) - 1
        if not _like_labels(batch[-1]) and model is not None:
            raise DataError(
                f"batch: {described(batch)}, and the model takes up to {most} inputs, so the "
                f"labels are ambiguous. {_GIVE_FORWARD}"
            )
    inputs, labels = tuple(batch[:place]), batch[place] if len(batch) > place else None
    x = inputs[0] if len(inputs) == 1 else None
    if isinstance(x, Mapping) and (set(x) <= set(names) or not set(x).isdisjoint(masks.MASK_KEYS)):
        return (*_parts_by_name(x, names)[:2], labels)
    if type(x) is tuple and 1 < least <= len(x) <= most:
        return x, {}, labels
    return inputs, {}, labels


def _parts_by_name(
    batch: Mapping[Any, Any], names: Sequence[str]
) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    found = [key for key in _INPUT_KEYS if key in batch]
    labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
    taken = {key: batch[key] for key in batch if key in names and key not in _LABEL_KEYS}
    if not found and not taken:
        raise DataError(
            f"batch: keys {sorted(map(str, batch))}, none of {', '.join(_INPUT_KEYS)}. "
            f"{_GIVE_FORWARD}"
        )
    if len(taken.keys() - set(masks.MASK_KEYS)) > 1 or not found:
        used = set(taken)
        args: tuple[Any, ...] = ()
    else:
        used, args, taken = {found[0]}, (batch[found[0]],), {}
        # The norm layers need the mask; the model gets it only if its forward takes it.
        taken = {key: batch[key] for key in masks.MASK_KEYS if key in batch and key in names}
    left = [
        key
        for key, value in batch.items()
        if names and key not in (*used, *_LABEL_KEYS, *masks.MASK_KEYS)
        and isinstance(value, Tensor) and value.ndim > 1
    ]  # fmt: skip
    if left:
        raise DataError(
            f"batch: it holds {some(list(map(str, left)))}, which the model does not take. "
            f"{_GIVE_FORWARD}"
        )
    return args, taken, labels


def _parameters(model: nn.Module | None) -> tuple[list[str], int, float]:
    """The parameter names of a model's forward, and how many it needs and takes by position.

    If the signature is unknown: no names, none needed, any number taken.
    """
    try:
        found = inspect.signature(model.forward).parameters.values() if model is not None else ()
    except (TypeError, ValueError):
        found = ()
    if not found or any(p.kind == p.VAR_POSITIONAL for p in found):
        return [], 0, math.inf
    by_position = [p for p in found if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in by_position)
    return [p.name for p in found], needed, len(by_position)


def _like_labels(value: Any) -> bool:
    """Whether this can be one class index per example, or no labels at all."""
    if value is None:
        return True
    if isinstance(value, list | tuple):
        return bool(value) and all(isinstance(v, int) for v in value)
    kind = str(getattr(value, "dtype", "")).removeprefix("torch.")
    return kind.startswith(("int", "uint", "bool")) and getattr(value, "ndim", 0) == 1


def move(nest: Any, device: torch.device) -> Any:
    """Move the tensors in a nest; leave the rest."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor | PackedSequence):
            return leaf
        movable: Any = leaf
        if device.type == "cuda" and not movable.is_cuda:
            movable = movable.pin_memory()  # otherwise the copy blocks the host
        return movable.to(device, non_blocking=True)

    return tree_map(moved, nest)


def set_forward_(model: nn.Module, forward: Forward) -> None:
    """Set how a model is called on a batch; a `forward=` argument takes precedence."""
    model.__dict__[FORWARD] = forward


def has_forward(model: nn.Module) -> bool:
    """Whether a forward function was set for a model."""
    return FORWARD in model.__dict__


def run(model: nn.Module, batch: Any, device: torch.device, forward: Forward | None = None) -> Any:
    """Run `model(inputs)` or `forward(model, batch)`; any failure becomes one ModelError."""
    forward = forward or model.__dict__.get(FORWARD)
    args, named, labels = ((batch,), {}, None) if forward is not None else _parts(batch, model)
    args, named = move(args, device), move(named, device)
    given = (args[0] if len(args) == 1 else args) if args else named
    try:
        with _valid(model, batch, forward is not None):
            if forward is not None:
                return forward(model, args[0])
            if not model.training or labels is None:
                return _picked(model, model(*args, **named))
            return _trained(model, args, named, labels, device)
    except (BnfixError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(_failed(error, given, forward is not None)) from error


def _valid(model: nn.Module, batch: Any, by_forward: bool) -> AbstractContextManager[None]:
    """The valid positions of a batch with a mask or lengths, for the model's norm layers."""
    given = masks.mask_in(batch)
    if by_forward and getattr(given.get("mask"), "ndim", 2) < 2:
        del given["mask"]  # one value per example: only the user's function can read it
    if not given:
        return nullcontext()
    stock = [
        name for name, module in model.named_modules()
        if isinstance(module, BatchNormBase) and not hasattr(module, "example_weight")
        and (module.training or module.running_mean is None)
    ]  # fmt: skip
    if stock:
        raise NormError(
            f"{some(stock)}: stock layers include padding in their moments, expected "
            "GeneralizedBatchNorm for batches with a mask. Call swap_norms_(model) first."
        )
    x = _first_of(_inputs(batch))
    total = x.shape[-1] if isinstance(x, Tensor) and x.ndim > 1 else None
    valid = masks.valid_of(given.get("mask"), given.get("lengths"), total)
    return masks.mask_used(valid, [t for t in tensors_in(batch) if t is not valid.mask])


def _trained(
    model: nn.Module,
    args: tuple[Any, ...],
    named: dict[str, Any],
    labels: Any,
    device: torch.device,
) -> Any:
    """The output in training mode; a detector needs its targets there, and gets them.

    It then returns losses, so `--output` does not apply.
    """
    if model not in _TAKES_TARGETS:
        try:
            return _picked(model, model(*args, **named))
        except (AssertionError, TypeError, ValueError):
            if "targets" not in _parameters(model)[0]:
                raise
    output = model(*args, **named, targets=move(labels, device))
    _TAKES_TARGETS.add(model)
    return output


def trains_by_itself(model: nn.Module) -> bool:
    """Whether a model took its targets in training mode and computes its own losses."""
    return model in _TAKES_TARGETS


def own_loss(model: nn.Module, output: Any) -> Tensor | None:
    """The sum of the losses (a dict of numbers) that such a model returns in training mode."""
    if not (model.training and trains_by_itself(model) and isinstance(output, Mapping)):
        return None
    losses = [t for t in output.values() if isinstance(t, Tensor) and t.numel() == 1]
    if not losses or len(losses) < len(output):
        return None
    return torch.stack([loss.reshape(()).float() for loss in losses]).sum()


def _failed(error: Exception, given: Any, by_forward: bool) -> str:
    if by_forward:
        return (
            f"--forward (in Python forward=): failed ({one_line(error)}). It is called with the "
            f"model and a batch, here {described(given)}."
        )
    what = described(given)
    advice = "--data and --model, or give --forward, a function that calls the model on a batch"
    if isinstance(given, Tensor) and given.ndim == 4 and given.is_floating_point():
        kind, _, shape = what.partition(" ")
        what = f"shape {shape} ({kind})"
        if not isinstance(error, TypeError):
            advice = "--resize, --crop and --model"
    return f"model: cannot be run on an input of {what} ({one_line(error)}). Check {advice}."


def described(value: Any) -> str:
    """A batch in words: its nesting, and the type and shape of each item."""
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        kind = str(value.dtype).removeprefix("torch.")
        return f"{kind} {'x'.join(map(str, value.shape)) or 'number'}"
    if isinstance(value, Mapping):
        named = [f"{key!r}: {described(item)}" for key, item in value.items()]
        return f"{{{some(named)}}}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        named = [f"{k}={described(v)}" for k, v in zip(value._fields, value, strict=True)]
        return f"({some(named)})"
    if isinstance(value, list | tuple):
        return f"({some([described(item) for item in value])})"
    return "None" if value is None else type(value).__name__


def tensors_in(output: Any) -> list[Tensor]:
    """All tensors in a model's output, in order."""
    return list(outputs_by_name(output).values())


def outputs_by_name(output: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors in a model's output by dotted name or index, as `--output` takes them."""
    if isinstance(output, Tensor):
        return {name: output}
    if dataclasses.is_dataclass(output) and not isinstance(output, type | Mapping):
        output = {f.name: getattr(output, f.name, None) for f in dataclasses.fields(output)}
    if hasattr(output, "_asdict"):
        output = output._asdict()
    parts: Iterable[tuple[Any, Any]] = ()
    if isinstance(output, Mapping):
        parts = output.items()
    elif isinstance(output, list | tuple):
        parts = enumerate(output)
    found: dict[str, Tensor] = {}
    for key, part in parts:
        found |= outputs_by_name(part, f"{name}.{key}" if name else str(key))
    return found


def set_output_(model: nn.Module, name: str) -> None:
    """Select one of a model's outputs, by dotted name or index."""
    model.__dict__[OUTPUT] = name


def _picked(model: nn.Module, output: Any) -> Any:
    """The output that `set_output_` names, or all."""
    name = model.__dict__.get(OUTPUT)
    if name is None:
        return output
    found = outputs_by_name(output)
    if name not in found:
        raise ModelError(
            f"--output {name}: the model has no such output, but {_listed(found) or 'no tensors'}."
        )
    return found[name]


def _listed(found: Mapping[str, Tensor]) -> str:
    return some([f"{name or 'one'} {tuple(tensor.shape)}" for name, tensor in found.items()])


def fitting_outputs(output: Any, n_examples: int, n_classes: int | None) -> list[str]:
    """The names of the outputs that can be logits for these numbers of examples and classes."""
    found = outputs_by_name(output)
    return [
        name for name, tensor in found.items()
        if tensor.ndim == 2 and len(tensor) == n_examples and tensor.is_floating_point()
        and n_classes in (None, tensor.shape[1])
    ]  # fmt: skip


def _named(output: Any) -> Any:
    """The part of an output with a usual result name (`logits`, `out`), or all of it."""
    for key in ("logits", "out"):
        if isinstance(output, Mapping) and key in output:
            return output[key]
        if not isinstance(output, Tensor) and hasattr(output, key):
            return getattr(output, key)
    return output


def output_of(output: Any) -> Tensor:
    """The result tensor of an output: the named one, or the only one."""
    tensors = outputs_by_name(_named(output))
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    raise ModelError(
        f"model: its output is {described(output)}, expected one tensor. Name one with --output, "
        "or give --forward (in Python forward=), a function that returns it."
    )


def logits_of(output: Any) -> Tensor:
    """The logits `(N, K)` of an output: the named tensor, or the only one of that form."""
    found = _named(output)
    tensors = outputs_by_name(found)
    if len(tensors) > 1:
        flat = {name: tensor for name, tensor in tensors.items() if tensor.ndim == 2}
        if len(flat) > 1:
            raise ModelError(
                f"model: several of its outputs can be logits: {_listed(flat)}. Name one with "
                "--output (in Python forward=, a function that returns the logits)."
            )
        tensors = flat
    if len(tensors) == 1:
        (found,) = tensors.values()
    if isinstance(found, Tensor) and found.ndim and found.shape[1:] in ((), (1,)):
        # The binary cross-entropy of a logit z equals the cross-entropy of the logits 0 and z.
        z = found.reshape(-1)
        return torch.stack([torch.zeros_like(z), z], 1)
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"model: its output is {type(found).__name__}{shape}, expected logits (N, classes). "
            "For other networks use --task and --loss, convert, or --labels none "
            "--statistics population; or give --forward (in Python forward=), a function of the "
            "model and the batch that returns logits."
        )
    return found


def n_examples_of(batch: Any) -> int:
    """The number of examples in a batch: the length of the first tensor or array in its inputs."""
    found = _inputs(batch)
    if isinstance(found, list | tuple) and all(
        isinstance(image, Tensor) and image.ndim == 3 and len(image) <= 4 for image in found
    ):
        return len(found)  # a list of images of several sizes, as detectors take
    shape = tuple(getattr(_first_of(found), "shape", ()))
    return int(shape[0]) if shape else 1


def _inputs(batch: Any) -> Any:
    """The inputs of a batch, or all of it."""
    try:
        return unpack(batch)[0]
    except DataError:  # a form that only the user's forward can read
        return batch


def _first_of(nest: Any) -> Any:
    while isinstance(nest, Mapping | list | tuple) and nest:
        if isinstance(nest, Mapping):
            nest = [value for key, value in nest.items() if key not in masks.MASK_KEYS] or [None]
        nest = nest[0]
    return nest


def pass_of(batches: Batches, k: int) -> Iterable[Any]:
    """The batches of the k-th pass."""
    return batches(k) if callable(batches) else batches


def again(batches: Batches) -> Batches:
    """Batches that can be read more than once."""
    # Not `iter(batches) is batches`: asking a loader for an iterator starts its workers.
    return list(batches) if isinstance(batches, Iterator) else batches


def hold_out(
    batches: Batches, held: Iterable[Any] | None, *, every: int
) -> tuple[Batches, Iterable[Any]]:
    """Hold out every n-th batch, unless held-out batches are given."""
    if held is not None:
        return again(batches), list(held) if isinstance(held, Iterator) else held
    everything = list(pass_of(batches, 0))
    if len(everything) < 2:
        raise DataError(
            f"batches: {len(everything)}, expected at least 2, one of them to hold out. Give "
            "smaller batches, or pass held-out batches."
        )
    every = min(every, len(everything))
    return [b for i, b in enumerate(everything) if i % every], everything[::every]
