"""Callables that the user names, and optional libraries, imported; and why that may fail."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bnfix.core.errors import ModelError, did_you_mean, model_error, one_line


@contextmanager
def seeded() -> Iterator[None]:
    """Run a block with torch's generator at seed 0, and put its state back."""
    with torch.random.fork_rng(devices=[]):
        # Only this generator: torch.manual_seed would touch those of other devices, too.
        torch.default_generator.manual_seed(0)
        yield


@contextmanager
def importable(folder: str | None) -> Iterator[None]:
    """Let a block import from a folder first."""
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
        raise model_error(spec, "no such file. Give the path to a Python file.")
    # By content: the same file gives the same classes, a changed one does not meet the old ones.
    try:
        identity = hashlib.sha256(str(path.resolve()).encode() + b"\0" + path.read_bytes())
    except OSError as error:
        raise model_error(spec, f"cannot be read ({error.strerror}).") from error
    name = f"_bnfix_{re.sub(r'[^0-9A-Za-z]', '_', path.stem)}_{identity.hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    described = importlib.util.spec_from_file_location(name, path)
    if described is None or described.loader is None:
        raise model_error(spec, "is not a Python file. Give a name ending in .py.")
    module = importlib.util.module_from_spec(described)
    sys.modules[name] = module  # before it runs, as its classes may be pickled while it does
    try:
        described.loader.exec_module(module)
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
    """Import the callable that the user names, running the user's code; and its folder."""
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


def import_library(name: str, spec: str) -> ModuleType:
    """Import a library that is an extra of this package."""
    try:
        with warnings.catch_warnings(action="ignore"):
            return importlib.import_module(name)
    except ImportError as error:
        raise model_error(
            spec, f"needs {name}, which is not installed ({error}). pip install 'bnfix[{name}]'."
        ) from error
