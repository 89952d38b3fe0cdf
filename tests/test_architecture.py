"""The drawing of the house against its building: who may stand on whom."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bnfix

PACKAGE = Path(bnfix.__file__).parent

#: Every room may stand on these.
GROUND = {"errors", "recipe", "version"}

#: The floors from the ground up: each room, and the rooms below that it may stand on.
FLOORS: list[dict[str, set[str]]] = [
    {"errors": set(), "version": set(), "recipe": set()},
    {
        "moments": set(),
        "guards": set(),
        "runtime": set(),
        "reading": set(),
        "images": set(),
        "models": set(),
        "diagnosis": set(),
        "demo": set(),
        "demo.network": set(),
    },
    {
        "norms": {"moments"},
        "checkpoint": {"reading"},
        "opening": {"images"},
        "data": {"images"},
        "evaluation": {"guards", "runtime"},
        "demo.train": {"demo", "demo.network"},
    },
    {
        "sites": {"norms"},
        "augmentation": {"data"},
        "resuming": {"checkpoint", "reading"},
        "gate": {"evaluation"},
        "pages": {"evaluation"},
    },
    {
        "surgery": {"norms", "sites"},
        "collecting": {"guards", "moments", "norms", "runtime", "sites"},
        "parameters": {"sites"},
        "example_weight": {"evaluation", "gate", "guards", "norms", "runtime"},
    },
    {
        "saving": {"checkpoint", "models", "norms", "sites", "surgery"},
        "walking": {"collecting", "guards", "runtime"},
        "refitting": {"collecting", "guards", "moments", "norms", "runtime", "sites"},
        "training": {"evaluation", "norms", "parameters", "resuming", "runtime", "sites"},
    },
    {
        "feeding": {"collecting", "runtime", "sites", "walking"},
        "averaging": {"checkpoint", "saving"},
        "finetuning": {
            "evaluation", "guards", "norms", "parameters", "resuming", "runtime", "training",
        },
    },
    {"calibration": {"collecting", "feeding", "runtime", "sites"}},
    {"figures": {"evaluation", "example_weight", "finetuning", "gate", "pages"}},
    {
        "report": {
            "calibration", "checkpoint", "evaluation", "example_weight", "figures", "finetuning",
            "gate", "pages", "surgery",
        },
    },
    {
        "layer_rows": {"calibration", "example_weight", "norms", "report", "sites"},
        "result": {"checkpoint", "report", "saving"},
        "workbench": {
            "augmentation", "data", "guards", "images", "models", "opening", "runtime", "saving",
        },
    },
    {
        "conversion": {
            "data", "example_weight", "guards", "layer_rows", "models", "norms", "refitting",
            "report", "result", "saving", "surgery", "workbench",
        },
        "comparison": {
            "data", "evaluation", "layer_rows", "opening", "reading", "report", "saving",
            "workbench",
        },
        "pipeline": {
            "averaging", "calibration", "data", "evaluation", "example_weight", "finetuning",
            "gate", "guards", "layer_rows", "norms", "refitting", "report", "result", "saving",
            "sites", "surgery", "workbench",
        },
    },
    {"replay": {"checkpoint", "models", "pipeline", "reading"}},
    {
        "__init__": {
            "calibration", "comparison", "conversion", "evaluation", "example_weight",
            "finetuning", "norms", "parameters", "pipeline", "result", "saving", "sites", "surgery",
        },
        "cli.grouping": set(),
        "cli.terminal": {"diagnosis", "pages", "report", "result", "workbench"},
    },
    {"cli.options": {"cli.terminal"}},
    {
        "cli.planned": {"cli.options", "cli.terminal", "pipeline", "replay", "result"},
        "cli.inspect": {
            "checkpoint", "cli.options", "cli.terminal", "diagnosis", "sites", "workbench",
        },
        "cli.demo": {"checkpoint", "cli.options", "cli.terminal", "demo", "pipeline"},
    },
    {
        "cli.convert": {
            "cli.options", "cli.planned", "cli.terminal", "conversion", "refitting", "result",
        },
        "cli.eval": {
            "checkpoint", "cli.options", "cli.planned", "cli.terminal", "comparison", "result",
        },
    },
    {
        "cli": {
            "cli.convert", "cli.demo", "cli.eval", "cli.grouping", "cli.inspect", "cli.planned",
            "runtime",
        },
    },
    {"__main__": {"cli"}},
]  # fmt: skip

#: The rooms of the command line.
CLI = {name for floor in FLOORS for name in floor if name.partition(".")[0] == "cli"}

#: What lets the outside in, and the rooms that may open it.
DOORS = {
    "typer": CLI,
    "rich": CLI,
    "torch.distributed": {"runtime"},
    "matplotlib": {"figures"},
    "jinja2": {"pages"},
    "safetensors": {"checkpoint", "reading", "demo.train"},
    "pickle": {"reading"},
    "PIL": {"data", "images", "augmentation"},
}


def rooms() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        found[name if name == "__init__" else name.removesuffix(".__init__")] = ast.parse(
            path.read_text(), str(path)
        )
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    """Every module imported anywhere in a file, also inside functions, by its absolute name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield ast.unparse(node)  # torch.distributed is there without an import of its own


def stands_on(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    found = set()
    for module in imports(tree):
        if not module.startswith("bnfix.") and module != "bnfix":
            continue
        inner = module.removeprefix("bnfix").removeprefix(".")
        found |= {inner} & known or {inner.rpartition(".")[0]} & known
    return found - {name}


ROOMS = rooms()
ALLOWED = {name: below for floor in FLOORS for name, below in floor.items()}


def test_every_room_is_drawn_once_and_every_drawn_room_is_built():
    assert sum(len(floor) for floor in FLOORS) == len(ALLOWED)
    assert set(ALLOWED) == set(ROOMS)


def test_arrows_point_down_only():
    below: set[str] = set()
    for floor in FLOORS:
        for name, allowed in floor.items():
            assert allowed <= below, f"{name} is drawn beside or below {allowed - below}"
        below |= set(floor)


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_stands_on_what_is_drawn_and_on_nothing_else(name):
    found = stands_on(name, ROOMS[name], set(ROOMS))
    assert found - GROUND <= ALLOWED.get(name, set())


@pytest.mark.parametrize("name", ROOMS)
def test_what_is_drawn_is_used(name):
    found = stands_on(name, ROOMS[name], set(ROOMS))
    assert ALLOWED.get(name, set()) <= found


def test_there_are_no_cycles():
    graph = {name: stands_on(name, tree, set(ROOMS)) for name, tree in ROOMS.items()}
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(ROOMS)


@pytest.mark.parametrize("door", DOORS)
def test_the_outside_comes_in_by_its_own_door(door):
    users = {
        name
        for name, tree in ROOMS.items()
        if any(module == door or module.startswith(f"{door}.") for module in imports(tree))
    }
    assert users <= DOORS[door]


def test_nothing_imports_the_command_line():
    for name, tree in ROOMS.items():
        if name not in CLI | {"__main__"}:
            assert not CLI & stands_on(name, tree, set(ROOMS)), name


def test_a_planted_import_is_caught():
    """In a function, as an attribute, from the package: the walk sees all three."""
    for planted in (
        "def f():\n    from bnfix.pipeline import fix\n",
        "def f():\n    import bnfix.pipeline\n",
        "from bnfix import pipeline\n",
    ):
        assert "pipeline" in stands_on("moments", ast.parse(planted), set(ROOMS))
    tree = ast.parse("import torch\ntorch.distributed.all_reduce(x)\n")
    assert any(module.startswith("torch.distributed") for module in imports(tree))


def test_there_is_no_room_for_odds_and_ends():
    assert not {"utils", "base", "helpers", "common", "misc"} & set(ROOMS)
