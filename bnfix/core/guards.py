"""Context managers that restore a model and the global state of the process."""

from __future__ import annotations

import os
import random
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

#: The items of a longer list or dict are not searched.
_MOST_ITEMS = 1000
_CONTAINERS = (list, dict, set, deque, OrderedDict, defaultdict, Counter)


@contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Restore every module's training flag on exit."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            # Not module.train(): it recurses, and some modules override it.
            module.training = training


@contextmanager
def tensors_kept(model: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """Give all tables of parameters and buffers; restore them and the modes on exit."""
    kept = _tables(model)
    try:
        with modes_kept(model):
            yield [table for table, _ in kept]
    finally:
        for table, tensors in kept:
            table.update(tensors)


def _tables(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Every table of parameters and buffers, with a copy of each."""
    tables: list[Any] = [t for m in model.modules() for t in (m._parameters, m._buffers)]
    return [(table, dict(table)) for table in tables]


@contextmanager
def inference(model: nn.Module) -> Iterator[list[str]]:
    """Evaluation without gradients; modes, state and random states are restored on exit."""
    with modes_kept(model), random_kept(model), state_kept(model) as changed, torch.no_grad():
        model.eval()
        yield changed


@contextmanager
def random_kept(model: nn.Module) -> Iterator[None]:
    """Restore the random states of Python, numpy and torch (and its devices) on exit."""
    with _random_states({p.device.index for p in model.parameters() if p.is_cuda}):
        yield


@contextmanager
def _random_states(devices: Iterable[int]) -> Iterator[None]:
    of_python, of_numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)


@contextmanager
def state_kept(model: nn.Module, but: Iterable[nn.Module] = ()) -> Iterator[list[str]]:
    """Restore buffers and plain attributes on exit, also inside lists and dicts of a module."""
    left_out = {id(module) for module in but}
    # A buffer that shares memory with a parameter, or with an excepted buffer, is left alone.
    tensors = [*model.parameters(), *(b for module in but for b in module.buffers(recurse=False))]
    shared = {_storage(tensor) for tensor in tensors}
    found = [(n, m) for n, m in model.named_modules() if id(m) not in left_out]
    kept = [_State(name, module, shared) for name, module in found]
    changed: list[str] = []
    try:
        yield changed
    finally:
        for state in kept:
            changed += state.restore_()


@contextmanager
def only_these_require_grad(model: nn.Module, wanted: list[Tensor]) -> Iterator[None]:
    """Gradients for some tensors only; all ``grad`` and ``requires_grad`` are restored on exit."""
    tensors = list({id(t): t for t in (*model.parameters(), *wanted)}.values())
    before = [(t, t.requires_grad, t.grad) for t in tensors]
    try:
        for t in tensors:
            t.requires_grad_(False)
            # Otherwise backward would add to the caller's gradient in place.
            t.grad = None
        for tensor in wanted:
            tensor.requires_grad_(True)
        yield
    finally:
        for t, flag, grad in before:
            t.requires_grad_(flag)
            t.grad = grad


def exchange_(module: nn.Module, other: nn.Module) -> None:
    """Swap class and contents of two module objects, so every reference sees the change."""
    # Some networks also hold layers in plain lists; a new object in the tree would miss those.
    pair = (type(other), other.__dict__), (type(module), module.__dict__)
    for one, (kind, fields) in zip((module, other), pair, strict=True):
        object.__setattr__(one, "__class__", kind)
        object.__setattr__(one, "__dict__", fields)


@contextmanager
def hooks() -> Iterator[list[RemovableHandle]]:
    """A list for hook handles; all hooks are removed on exit."""
    handles: list[RemovableHandle] = []
    try:
        yield handles
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch on CPU and CUDA inside; restore all random states on exit."""
    with _random_states(range(torch.cuda.device_count())):
        # Without an accelerator, torch.manual_seed would keep a stack trace per kind of device.
        all_of_them = torch.accelerator.is_available()
        (torch if all_of_them else torch.default_generator).manual_seed(seed)
        yield


@contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Send standard output to standard error, also from compiled code and child processes."""
    sys.stdout.flush()
    kept: int | None = None
    # A test or another program may replace the streams by objects that have no file descriptor.
    with suppress(OSError, ValueError):
        own, error = sys.stdout.fileno(), sys.stderr.fileno()
        kept = os.dup(own)
        os.dup2(error, own)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        sys.stderr.flush()
        if kept is not None:
            os.dup2(kept, own)
            os.close(kept)


class Snapshot:
    """A restorable copy of a model's parameters (tied ones once), buffers and plain settings."""

    def __init__(self, model: nn.Module) -> None:
        self._tables = _tables(model)
        tensors = {id(t): t for _, own in self._tables for t in own.values() if t is not None}
        self._values = [(t, t.detach().clone()) for t in tensors.values()]
        self._settings = [(module, _settings(module)) for module in model.modules()]

    @torch.no_grad()
    def restore_(self) -> None:
        """Restore all except modes: the values of each tensor, then the tensors in their tables."""
        for tensor, value in self._values:
            tensor.copy_(value)
        for table, own in self._tables:
            table.update(own)
        for module, settings in self._settings:
            module.__dict__.update(settings)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[Snapshot]:
    """Take a snapshot, and restore it if the block fails."""
    before = Snapshot(model)
    try:
        yield before
    except BaseException:
        before.restore_()
        raise


#: The fields of torch's own machinery, including the training flag and the hooks.
_TORCH_FIELDS = frozenset(vars(nn.Module()))


def _settings(module: nn.Module) -> dict[str, bool | int | float | None]:
    return {
        name: value
        for name, value in vars(module).items()
        if name not in _TORCH_FIELDS and (value is None or isinstance(value, bool | int | float))
    }


class _State:
    """A module's own buffers and plain attributes."""

    def __init__(self, name: str, module: nn.Module, shared: set[int]) -> None:
        self._module, self._prefix = module, f"{name}." if name else ""
        self._structure = _structure(module)
        self._values = _attributes(module)
        self._held: dict[str, dict[int, tuple[Any, Any]]] = {}
        # A scripted module's buffer table cannot be copied, and gives new objects at each access.
        for key, value in (*module.named_buffers(recurse=False), *self._values.items()):
            _hold(value, self._held.setdefault(key, {}), shared)

    @torch.no_grad()
    def restore_(self) -> list[str]:
        """Restore changed buffers and attributes; return their names."""
        module = self._module
        # A module that builds its parameters in the first forward pass keeps them.
        if _structure(module) != self._structure:
            return []
        now, before = _attributes(module), self._values
        keys = {**before, **now}
        changed = [key for key in keys if not _same(now.get(key, now), before.get(key, before))]
        for key in changed:
            table = module._buffers if key in module._buffers else module.__dict__
            if key in before:
                table[key] = before[key]
            else:
                del table[key]
        for key, held in self._held.items():
            differ = [_put_back(value, old) for value, old in held.values()]
            if any(differ) and key not in changed:
                changed.append(key)
        return [self._prefix + key for key in changed]


def _structure(module: nn.Module) -> Any:
    parameters = [name for name, _ in module.named_parameters(recurse=False)]
    return type(module), [name for name, _ in module.named_children()], parameters


def _attributes(module: nn.Module) -> dict[str, Any]:
    """The buffers and the plain attributes of a module."""
    found = dict(module._buffers) if isinstance(module._buffers, dict) else {}
    # torch's own wrappers, such as FSDP, set attributes that must last.
    own = {} if type(module).__module__.startswith("torch.") else vars(module)
    return found | {
        key: value
        for key, value in own.items()
        # A flag for installed hooks stays, because the hooks stay (transformers has one).
        if key not in _TORCH_FIELDS and not (isinstance(value, bool) and "hook" in key)
    }


def _same(value: Any, old: Any) -> bool:
    plain = isinstance(value, bool | int | float | str) and type(value) is type(old)
    return value is old or (plain and value == old)


def _hold(value: Any, held: dict[int, tuple[Any, Any]], shared: set[int]) -> None:
    """Remember the tensors and containers in a value."""
    if id(value) in held:
        return
    if isinstance(value, Tensor):
        plain = value.layout is torch.strided and not value.is_meta and not value.is_quantized
        if plain and not is_lazy(value) and _storage(value) not in shared:
            held[id(value)] = value, value.detach().clone()
    elif type(value) in _CONTAINERS:
        held[id(value)] = value, value.copy()
    if isinstance(value, (tuple, *_CONTAINERS)) and len(value) <= _MOST_ITEMS:
        for item in value.values() if isinstance(value, dict) else value:
            _hold(item, held, shared)


def _put_back(value: Any, old: Any) -> bool:
    """Restore the content of a tensor or a container; return whether it had changed."""
    if isinstance(value, Tensor):
        if value.shape == old.shape and value.dtype == old.dtype:
            if torch.equal(value, old) or bool(((value == old) | (old != old)).all()):
                return False
            value.copy_(old)
        else:
            value.data = old
        return True
    now = list(value.items()) if isinstance(value, dict) else list(value)
    before = list(old.items()) if isinstance(old, dict) else list(old)
    if [_identity(item) for item in now] == [_identity(item) for item in before]:
        return False
    value.clear()
    (value.extend if isinstance(value, list | deque) else value.update)(old)
    return True


def _identity(item: Any) -> Any:
    return (id(item[0]), id(item[1])) if isinstance(item, tuple) and len(item) == 2 else id(item)


def _storage(tensor: Tensor) -> int:
    if tensor.layout is not torch.strided or is_lazy(tensor):
        return id(tensor)
    return int(tensor.untyped_storage().data_ptr())
