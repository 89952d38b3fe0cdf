"""The errors that bnfix raises on purpose; each is a `BnfixError`.

A message has the form: where: what was found, what was expected. What to do.
"""

from __future__ import annotations

import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from pathlib import Path

#: Folders of code that is not the user's: this package, the standard library, installed packages.
_NOT_OWN = (
    str(Path(__file__).parents[1]),
    *(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")),
)


class BnfixError(Exception):
    """The base class: catch it to catch every error that bnfix raises on purpose.

    Args:
        message: where, what was found, what was expected, what to do.
        name: the layer, tensor or option concerned, if there is one.
        path: the file concerned, if there is one.
    """

    #: The page of docs/ that explains errors of this kind, or "": the help of the command.
    page: str = "faq"

    def __init__(
        self, message: str, *, name: str | None = None, path: str | Path | None = None
    ) -> None:
        super().__init__(message)
        self.name = name
        self.path = None if path is None else Path(path)


class ConfigError(BnfixError, ValueError):
    """An option or argument is unknown, out of range, or contradicts another.

    If the option takes only a few words, `choices` holds them.
    """

    page = ""
    choices: tuple[str, ...] = ()


class CheckpointError(BnfixError):
    """A checkpoint cannot be read safely, does not fit its model, or must not be written."""

    page = "models"


class ModelError(BnfixError):
    """A model specification cannot be resolved, or the model cannot be called on the data."""

    page = "models"


class NormError(BnfixError):
    """A normalization layer cannot be swapped, or cannot take the requested settings."""

    page = "models"


class DataError(BnfixError):
    """Data cannot be opened, has labels that do not fit, or has too few usable examples."""

    page = "data"


class NumericError(BnfixError):
    """A computation received a value that is not finite, or too little data to be defined."""


class ProcessError(BnfixError):
    """Another process of the same run has ended, or cannot be reached."""

    page = "processes"


class Note(str):
    """A sentence for the user, with a kind for code that treats some kinds specially."""

    kind: str

    def __new__(cls, text: str, kind: str = "") -> Note:
        """Make a note; the text is the string itself."""
        note = super().__new__(cls, text)
        note.kind = kind
        return note


def some(names: Sequence[str], limit: int = 5) -> str:
    """Join names for a message: at most ``limit`` of them, then how many more there are."""
    shown = ", ".join(str(name) for name in names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def count(n: float, noun: str = "") -> str:
    """A number and its noun, which is given in the plural: 1 image, 2,000 images, 1.5 passes."""
    if n == 1:
        noun = noun.removesuffix("es" if noun.endswith(("sses", "ches")) else "s")
    return f"{n:,.0f} {noun}".rstrip() if n == int(n) else f"{n:.3g} {noun}"


def plain(text: object, limit: int = 200) -> str:
    """A text of unknown origin as one printable line, cut unless it is a path."""
    reason = text.strerror if isinstance(text, OSError) else None  # str() would repeat the path
    line = " ".join(str(reason or text).split())
    line = "".join(sign if sign.isprintable() else "?" for sign in line)
    return line if isinstance(text, Path) or len(line) <= limit else line[: limit - 3] + "..."


def file_error(path: str | Path, text: str) -> CheckpointError:
    """A `CheckpointError` that begins with the file that it concerns."""
    return CheckpointError(f"{plain(Path(path))}: {text}", path=path)


def output_error(path: str | Path, text: str) -> CheckpointError:
    """A `file_error` about an output file; it points to the page on outputs."""
    error = file_error(path, text)
    error.page = "output"
    return error


def name_error(path: str | Path, text: str) -> ConfigError:
    """A `ConfigError` about an output file name that does not fit the kind of file."""
    error = ConfigError(f"{plain(Path(path))}: {text}", path=path)
    error.page = "output"
    return error


@contextmanager
def file_errors(
    path: str | Path,
    problem: str,
    advice: str = "",
    kinds: tuple[type[Exception], ...] = (OSError, ValueError),
    *,
    make: Callable[[str | Path, str], CheckpointError] = file_error,
) -> Iterator[None]:
    """Turn errors of other code in a block into one that says what is wrong with a file."""
    try:
        yield
    except CheckpointError:  # it names the file already
        raise
    except kinds as error:
        reason = plain(error) or type(error).__name__
        raise make(path, f"{problem} ({reason}).{advice}") from error


output_errors = partial(file_errors, make=output_error)


def model_error(spec: str, text: str) -> ModelError:
    """A `ModelError` that begins with the model specification that it concerns."""
    return ModelError(f"{spec}: {text}", name=spec)


@contextmanager
def model_errors(
    spec: str, problem: str, advice: str = "", kinds: tuple[type[Exception], ...] = (Exception,)
) -> Iterator[None]:
    """Turn errors of other code in a block into one that says what failed with a model."""
    try:
        yield
    except kinds as error:
        raise model_error(spec, f"{problem} ({root_line(error)}). {advice}".rstrip()) from error


def did_you_mean(word: str, names: Sequence[str], limit: int = 1) -> str:
    """The end of a message about an unknown name: similar names, or nothing."""
    close = get_close_matches(word, names, limit)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException) -> str:
    """An error of other code: its type, its text (at most 300 characters), the user's file:line."""
    text = plain(str(error), 300)
    words = f"{type(error).__name__}: {text}" if text else type(error).__name__
    place = _own_line(error)
    return words if place is None else f"{words}, at {place}"


def root_line(error: BaseException) -> str:
    """The root cause of a library's error, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).rstrip(".")


def _own_line(error: BaseException) -> str | None:
    """The innermost line of the user's code, for example `nets/forward.py:12`."""
    if isinstance(error, SyntaxError) and error.filename:
        return None  # its text names the file and the line
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        path = Path(frame.f_code.co_filename)
        if path.suffix == ".py" and not any(path.is_relative_to(root) for root in _NOT_OWN):
            here = Path.cwd()
            return f"{path.relative_to(here) if path.is_relative_to(here) else path}:{line}"
    return None
