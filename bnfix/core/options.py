"""The fields of settings, with their help texts, and the checks that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

from bnfix.core.errors import ConfigError

#: What `--to` offers: (channel groups, ghost size, example weight), before overrides.
#: ``None`` groups: one channel each; ``None`` ghost: the whole batch; ``"gcd32"``: gcd(C, 32).
KINDS: dict[str, tuple[str | None, int | None, float]] = {
    "example-aware": (None, None, 0.0),
    "ghost": (None, 16, 0.0),
    "batch-group": ("gcd32", 2, 0.0),
    "group": ("gcd32", 1, 1.0),
    "gated": (None, None, 0.0),
    "batch": (None, None, 0.0),
}
#: What `--corrupt` and `--corruptions` offer.
CORRUPTIONS = ("noise", "blur", "jpeg", "brightness", "contrast", "pixelate")
SEVERITIES = (1, 2, 3)


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text, which the command line shows."""
    return dataclasses.field(default=default, metadata={"help": help})


def require(condition: bool, message: str, name: str) -> None:
    """Refuse a setting unless a condition holds."""
    if not condition:
        raise ConfigError(message, name=name)


def check_seed(seed: int) -> None:
    """Check that every generator takes a seed."""
    ok = 0 <= seed < 2**63
    require(ok, f"--seed: {seed}, expected a whole number from 0 to 2^63 - 1.", "seed")


def check_corruption(text: str, where: str = "--corrupt") -> tuple[str, int]:
    """Read a corruption of images."""
    kind, _, severity = text.partition(":")
    known = kind in CORRUPTIONS and severity in map(str, SEVERITIES)
    require(
        known,
        f"{where}: {text!r} is not known. Give KIND:SEVERITY, such as blur:2; kinds: "
        f"{', '.join(CORRUPTIONS)}; severities: {', '.join(map(str, SEVERITIES))}.",
        "corrupt",
    )
    return kind, int(severity)


def one_of(value: Any, choices: Collection[str], name: str) -> None:
    """Refuse a setting that is none of the choices."""
    if value not in choices:
        listed = ", ".join(choices)
        error = ConfigError(f"{name}: {value!r} is not known. Use one of: {listed}.", name=name)
        error.choices = tuple(choices)
        raise error


def in_range(recipe: Any, low: float, high: float, *names: str) -> None:
    """Refuse settings that are numbers outside of [low, high)."""
    for name in names:
        value, flag = getattr(recipe, name), "--" + name.replace("_", "-")
        span = f"at least {low}" if high > 1 else f"{low} to 1, 1 excluded"
        require(value is None or low <= value < high, f"{flag}: {value}, expected {span}.", name)
