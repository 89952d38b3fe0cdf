"""Texts of the command line to numbers."""

from __future__ import annotations

from bnfix.errors import ConfigError


def numbers(text: str | None, name: str) -> tuple[float, ...] | None:
    """Comma-separated numbers; a fraction such as 1/255 is one."""
    if text is None:
        return None
    try:
        return tuple(_fraction(part) for part in text.replace(" ", ",").split(",") if part)
    except (ValueError, ZeroDivisionError) as error:
        raise ConfigError(
            f"--{name}: {text!r}, expected a number, or several with commas between.", name=name
        ) from error


def _fraction(text: str) -> float:
    above, slash, below = text.partition("/")
    return float(above) / float(below) if slash else float(above)


def sizes(text: str | None, name: str) -> tuple[int, ...] | None:
    """Sizes from a text such as 224 or 224x320."""
    if text is None:
        return None
    try:
        return tuple(int(part) for part in text.lower().replace(",", "x").split("x"))
    except ValueError as error:
        raise ConfigError(
            f"--{name}: {text!r}, expected one size or HEIGHTxWIDTH, such as 224 or 224x320.",
            name=name,
        ) from error


def samples_of(text: str | None) -> int | str | None:
    """A number of examples, or a word that the recipe knows."""
    try:
        return None if text is None else int(text)
    except ValueError:
        return text


def weight_of(text: str) -> str | float:
    """An example weight: a number, or a word that the recipe knows."""
    try:
        return float(text)
    except ValueError:
        return text
