"""The drawing of the house against its building: who may stand on whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bnfix

PACKAGE = Path(bnfix.__file__).parent

#: Rooms from the ground up, each with the rooms it may stand on. `errors` is the ground: every
#: room may stand on it, and on `recipe` and `version`.
FLOORS: list[dict[str, set[str]]] = FLOORS_HERE
GROUND = {"errors", "recipe", "version"}
#: Packages that one kind of room alone may import, wherever in its code.
DOORS = {
    "typer": {"cli", "options", "terminal"},
    "rich": {"cli", "options", "terminal"},
    "torch.distributed": {"runtime"},
    "matplotlib": {"figures"},
    "jinja2": {"pages"},
    "safetensors": {"checkpoint", "reading", "demo.train"},
}
