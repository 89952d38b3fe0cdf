"""Where and how the model runs: device, precision, the form of batches and outputs."""

from __future__ import annotations

import ctypes
import dataclasses
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from bnfix import processes
from bnfix.errors import BnfixError, ConfigError, DataError, ModelError, one_line, some

#: How a model is run on one batch of the user's own form.
Forward = Callable[[nn.Module, Any], Any]
#: Batches, or what gives the batches of the k-th pass (so that each pass can be shuffled anew).
Batches = Iterable[Any] | Callable[[int], Iterable[Any]]

#: The attribute of a model that says how it is called.
FORWARD = "_bnfix_forward"
#: From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8
_INPUT_KEYS = ("pixel_values", "image", "images", "input", "inputs", "x")
_LABEL_KEYS = ("labels", "label", "target", "targets", "y")
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(text: str) -> torch.device:
    """The device that an option means.

    Args:
        text: ``auto`` (CUDA where there is one), ``cpu``, ``cuda`` or ``cuda:N``. Of several
            processes each has its own ``cuda``.

    Returns:
        The device.

    Raises:
        ConfigError: if it is not known or not there.
    """
    if text == "auto":
        text = "cuda" if torch.cuda.is_available() else "cpu"
    if text == "cuda" and processes.here().shared and torch.cuda.is_available():
        text = f"cuda:{processes.here().on_machine % torch.cuda.device_count()}"
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


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for reuse instead of giving it back to the system.

    Activations of a CPU run are freed and taken again layer by layer; by default glibc maps and
    unmaps each large one, and first touches of fresh pages can cost more than the arithmetic.
    Threads share one arena, since those of their own hold up to 64 MiB and map what is larger
    whatever the threshold. For a program's start; a library should not decide this. Where there
    is no glibc, nothing happens.

    Changes:
        glibc's thresholds for mapping and trimming, and its number of arenas, for this process.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
        mallopt(_M_TRIM_THRESHOLD, (1 << 31) - 1)
        mallopt(_M_ARENA_MAX, 1)


def exact_float32() -> None:
    """Turn TF32 off: metrics on CPU and CUDA are to agree to rounding.

    Changes:
        torch's settings for matrix products and convolutions on CUDA.
    """
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def device_of(model: nn.Module) -> torch.device:
    """Where a model's tensors lie.

    Args:
        model: the first parameter or buffer decides.

    Returns:
        That device; the CPU for a model without tensors.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")


def autocast(device: torch.device, precision: str) -> AbstractContextManager[Any]:
    """The context for a precision.

    Args:
        device: where the model runs.
        precision: ``fp32``, ``bf16`` or ``fp16``.

    Returns:
        Autocast for the half types, nothing for fp32.

    Raises:
        ConfigError: if the precision is not known.
    """
    if precision == "fp32":
        return nullcontext()
    if precision not in _AUTOCAST:
        raise ConfigError(
            f"--precision: {precision!r} is not known. Use one of: fp32, {', '.join(_AUTOCAST)}.",
            name="precision",
        )
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def unpack(batch: Any) -> tuple[Any, Tensor | None]:
    """Inputs and labels of a batch in any usual form.

    Args:
        batch: ``(x, y, ...)``, ``(x,)``, ``x``, or a mapping with usual key names.

    Returns:
        The inputs and the labels, ``None`` where there are none.

    Raises:
        DataError: if a mapping has no input under a usual name, or a sequence is empty.
    """
    if isinstance(batch, Mapping):
        found = [key for key in _INPUT_KEYS if key in batch]
        if not found:
            raise DataError(
                f"batch: keys {sorted(map(str, batch))}, none of {', '.join(_INPUT_KEYS)}. "
                "Give forward=, which is called with the model and the batch."
            )
        labels = next((batch[key] for key in _LABEL_KEYS if key in batch), None)
        return batch[found[0]], labels
    if isinstance(batch, list | tuple):
        if not batch:
            raise DataError("batch: an empty tuple, expected (x, y), (x,) or x.")
        return batch[0], batch[1] if len(batch) > 1 else None
    return batch, None


def move(value: Any, device: torch.device) -> Any:
    """Move tensors inside tuples, lists and mappings; leave the rest.

    Args:
        value: a tensor or a nest of them.
        device: where to.

    Returns:
        The same nest with its tensors there.
    """
    # A packed sequence is a named tuple too, but its lengths must stay on the CPU.
    if isinstance(value, Tensor | PackedSequence):
        movable: Any = value
        if device.type == "cuda" and not movable.is_cuda:
            movable = movable.pin_memory()  # or the copy would make the host wait
        return movable.to(device, non_blocking=True)
    if isinstance(value, Mapping):
        return {key: move(item, device) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(move(item, device) for item in value))
    if isinstance(value, list | tuple):
        return type(value)(move(item, device) for item in value)
    return value


def set_forward_(model: nn.Module, forward: Forward) -> None:
    """State once how a model is called on a batch, for whatever runs it.

    Args:
        model: the model.
        forward: called as ``forward(model, batch)``; a ``forward=`` given to a function goes first.

    Changes:
        An attribute of the model, which travels with it and with its copies.
    """
    model.__dict__[FORWARD] = forward


def has_forward(model: nn.Module) -> bool:
    """Say whether it was stated how a model is called.

    Args:
        model: any module.

    Returns:
        True after `set_forward_`.
    """
    return FORWARD in model.__dict__


def run(model: nn.Module, batch: Any, device: torch.device, forward: Forward | None = None) -> Any:
    """Run `model(inputs)`, or `forward(model, batch)`; what fails in it is one ModelError."""
    forward = forward or model.__dict__.get(FORWARD)
    given = move(unpack(batch)[0] if forward is None else batch, device)
    try:
        return model(given) if forward is None else forward(model, given)
    except (BnfixError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(_failed(error, given, forward is not None)) from error


def _failed(error: Exception, given: Any, by_forward: bool) -> str:
    if by_forward:
        return (
            f"--forward (from Python forward=): failed ({one_line(error)}). It is called with the "
            f"model and a batch, here {described(given)}."
        )
    is_image = isinstance(given, Tensor) and given.ndim == 4 and given.is_floating_point()
    what = f"shape {'x'.join(map(str, given.shape))}" if is_image else described(given)
    advice = "--resize, --crop and --model" if is_image else "--data and --model, or give --forward"
    return f"model: cannot be run on an input of {what} ({one_line(error)}). Check {advice}."


def described(value: Any) -> str:
    """A batch in words: its nesting, and the type and shape of what is in it."""
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
    """All tensors in a model's output, in order.

    Args:
        output: a tensor, or tuples, lists, mappings and dataclasses of them, nested.

    Returns:
        The tensors; whatever else is in it is passed over.
    """
    if isinstance(output, Tensor):
        return [output]
    if dataclasses.is_dataclass(output) and not isinstance(output, type | Mapping):
        output = vars(output)
    if isinstance(output, Mapping):
        output = list(output.values())
    parts = output if isinstance(output, list | tuple) else []
    return [tensor for part in parts for tensor in tensors_in(part)]


def logits_of(output: Any) -> Tensor:
    """The logits in a model's output.

    Args:
        output: a tensor, a tuple or list whose first item is one, or a mapping or object with
            ``logits`` or ``out``.

    Returns:
        ``(N, K)``.

    Raises:
        ModelError: if there is no such tensor.
    """
    found = output
    for key in ("logits", "out"):
        if isinstance(output, Mapping) and key in output:
            found = output[key]
            break
        if not isinstance(output, Tensor) and hasattr(output, key):
            found = getattr(output, key)
            break
    if isinstance(found, list | tuple) and found:
        found = found[0]
    if not isinstance(found, Tensor) or found.ndim != 2:
        shape = f" of shape {tuple(found.shape)}" if isinstance(found, Tensor) else ""
        raise ModelError(
            f"model: its output is {type(found).__name__}{shape}, expected logits (N, classes). "
            "For other networks there are convert and --labels none --statistics population; or "
            "--forward (from Python forward=), which is called with the model and the batch and "
            "returns logits."
        )
    return found


def n_examples_of(batch: Any) -> int:
    """Examples in a batch: the length of the first tensor, or array, found in its inputs.

    Args:
        batch: any form.

    Returns:
        The number; 1 where nothing has a length.
    """
    try:
        found = unpack(batch)[0]
    except DataError:
        found = batch  # a form that only the user's forward knows
    while isinstance(found, Mapping | list | tuple) and found:
        found = next(iter(found.values() if isinstance(found, Mapping) else found))
    shape = tuple(getattr(found, "shape", ()))
    return int(shape[0]) if shape else 1


def pass_of(batches: Batches, k: int) -> Iterable[Any]:
    """The batches of the k-th pass.

    Args:
        batches: an iterable, the same for every pass, or a callable that gives the k-th.
        k: which pass, from 0.

    Returns:
        An iterable of batches.
    """
    return batches(k) if callable(batches) else batches


def again(batches: Batches) -> Batches:
    """Batches that can be gone through more than once.

    Args:
        batches: an iterator that runs dry is read into a list; all else stays as it is.

    Returns:
        Something to iterate over repeatedly.
    """
    # Not `iter(batches) is batches`: asking a loader for an iterator starts its workers.
    return list(batches) if isinstance(batches, Iterator) else batches


def hold_out(
    batches: Batches, held: Iterable[Any] | None, *, every: int
) -> tuple[Batches, Iterable[Any]]:
    """Set every n-th batch aside, unless something is set aside already.

    Args:
        batches: what to take from; read into a list where nothing is set aside yet.
        held: what is set aside already, read into a list if it is an iterator; or ``None``.
        every: n.

    Returns:
        What is left, and what is set aside.

    Raises:
        DataError: if there are fewer than 2 batches to divide.
    """
    if held is not None:
        return again(batches), list(held) if isinstance(held, Iterator) else held
    everything = list(pass_of(batches, 0))
    if len(everything) < 2:
        raise DataError(
            f"batches: {len(everything)}, expected at least 2 so that one can be held out. Give "
            "smaller batches, or give the held-out ones yourself."
        )
    every = min(every, len(everything))
    return [b for i, b in enumerate(everything) if i % every], everything[::every]
