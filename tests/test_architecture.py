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
    {
        "cli.grouping": set(),
        "cli.usage": set(),
        "demo.network": set(),
        "diagnosis": set(),
        "errors": set(),
        "guards": set(),
        "intervals": set(),
        "moments": set(),
        "packing": set(),
        "starting": set(),
        "plain": set(),
        "plain_pickle": set(),
        "triton_kernels": set(),
        "version": set(),
    },
    {
        "artifacts": set(),
        "columns": set(),
        "dataflow": set(),
        "images": set(),
        "importing": set(),
        "kernels": {"moments", "triton_kernels"},
        "nesting": set(),
        "pickles": set(),
        "processes": set(),
        "recipe": set(),
        "temperature": {"intervals"},
    },
    {
        "callables": {"images", "importing"},
        "classes": {"images"},
        "corruptions": set(),
        "demo": set(),
        "mat": {"images"},
        "metrics": {"intervals", "temperature"},
        "norms": {"kernels", "moments"},
        "parquet": {"columns", "images"},
        "pretrained": {"importing"},
        "reading": {"pickles"},
        "retelling": set(),
        "runtime": {"processes"},
        "shards": {"images"},
        "verification": {"artifacts", "guards"},
    },
    {
        "data": {"corruptions", "images"},
        "demo.train": {"demo", "demo.network"},
        "evaluation": {"guards", "intervals", "metrics", "processes", "runtime", "temperature"},
        "header": {"reading"},
        "image_sets": {"images", "mat"},
        "label_free": {"guards", "moments", "norms", "runtime"},
        "models": {"importing", "pretrained"},
        "pairing": {"intervals", "metrics"},
        "pixel_sets": {"images", "mat", "plain_pickle"},
        "presets": {"importing", "pretrained"},
        "sites": {"norms"},
    },
    {
        "augmentation": {"data"},
        "checkpoint": {"header", "nesting", "packing", "reading"},
        "collecting": {"guards", "moments", "norms", "processes", "runtime", "sites"},
        "custom_metrics": {"evaluation", "importing", "intervals"},
        "first_look": {"guards", "runtime", "sites"},
        "folding": {"artifacts", "dataflow", "guards", "moments", "norms", "runtime", "sites"},
        "gate": {"intervals", "metrics", "pairing"},
        "imagenet": {"image_sets", "images", "mat"},
        "pages": {"pairing"},
        "parameters": {"sites"},
        "robustness": {"corruptions", "evaluation", "intervals", "metrics", "pairing", "runtime"},
        "surgery": {"norms", "sites"},
        "weight_search": {"evaluation", "guards", "intervals", "norms", "processes", "runtime"},
    },
    {
        "datasets": {"image_sets", "imagenet", "images", "pixel_sets"},
        "drawing": {"pages"},
        "example_weight": {
            "evaluation", "gate", "guards", "metrics", "norms", "processes", "runtime",
            "weight_search",
        },
        "origin": {"checkpoint", "models"},
        "records": {"custom_metrics", "metrics", "pairing", "robustness"},
        "refitting": {"collecting", "guards", "moments", "norms", "runtime", "sites"},
        "resuming": {"checkpoint", "reading"},
        "walking": {"collecting", "guards", "processes", "runtime"},
    },
    {
        "feeding": {"collecting", "processes", "runtime", "sites", "walking"},
        "figures": {"drawing", "intervals", "metrics", "pages", "robustness"},
        "keeping": {"collecting", "processes", "resuming"},
        "opening": {"callables", "classes", "datasets", "images", "parquet", "shards"},
        "saving": {
            "checkpoint", "header", "models", "norms", "origin", "presets", "sites", "surgery",
        },
        "standings": {"pairing", "records"},
        "training": {
            "evaluation", "norms", "parameters", "processes", "resuming", "runtime", "sites",
        },
    },
    {
        "averaging": {"checkpoint", "saving"},
        "calibration": {
            "collecting", "feeding", "keeping", "processes", "resuming", "runtime", "sites",
        },
        "finetuning": {
            "evaluation", "guards", "norms", "parameters", "processes", "resuming", "runtime",
            "training",
        },
        "plain_files": {"folding", "header", "models", "plain", "saving"},
        "workbench": {
            "augmentation", "corruptions", "data", "first_look", "guards", "images", "importing",
            "models", "opening", "presets", "processes", "runtime", "saving",
        },
    },
    {
        "course": {"drawing", "finetuning", "gate", "intervals", "pages", "weight_search"},
        "entrants": {
            "corruptions", "data", "evaluation", "images", "processes", "robustness", "runtime",
            "saving", "workbench",
        },
        "estimating": {
            "data", "evaluation", "guards", "norms", "parameters", "processes", "runtime", "sites",
            "workbench",
        },
        "examination": {"calibration", "diagnosis", "evaluation", "guards", "runtime", "sites"},
        "layer_rows": {"calibration", "example_weight", "norms", "records", "sites"},
        "making": {
            "artifacts", "dataflow", "folding", "models", "norms", "plain", "plain_files", "saving",
            "verification",
        },
        "wording": {
            "calibration", "custom_metrics", "example_weight", "finetuning", "gate", "pages",
            "pairing", "records", "surgery",
        },
    },
    {
        "report": {
            "calibration", "checkpoint", "course", "drawing", "example_weight", "figures",
            "finetuning", "gate", "pages", "pairing", "records", "robustness", "standings",
            "surgery", "wording",
        },
        "workload": {"estimating", "refitting", "sites", "workbench"},
    },
    {
        "cli.tables": {"pages", "report"},
        "result": {"checkpoint", "processes", "report", "saving"},
    },
    {
        "conversion": {
            "corruptions", "data", "example_weight", "guards", "layer_rows", "models", "norms",
            "refitting", "report", "result", "runtime", "saving", "surgery", "workbench",
        },
        "export_report": {
            "checkpoint", "folding", "pages", "plain_files", "report", "result", "verification",
        },
        "pipeline": {
            "averaging", "calibration", "data", "estimating", "evaluation", "example_weight",
            "finetuning", "gate", "guards", "label_free", "layer_rows", "metrics", "norms",
            "pairing", "processes", "records", "refitting", "report", "result", "saving", "sites",
            "surgery", "workbench", "workload",
        },
        "predictions": {"checkpoint", "evaluation", "intervals", "result", "temperature"},
    },
    {
        "comparison": {
            "corruptions", "custom_metrics", "data", "entrants", "estimating", "evaluation",
            "layer_rows", "metrics", "predictions", "processes", "reading", "records", "report",
            "saving", "workbench",
        },
        "exporting": {
            "artifacts", "conversion", "corruptions", "data", "estimating", "evaluation",
            "export_report", "images", "layer_rows", "making", "norms", "opening", "records",
            "report", "runtime", "saving", "verification", "workbench",
        },
        "inspection": {
            "checkpoint", "conversion", "corruptions", "data", "diagnosis", "examination",
            "retelling", "runtime", "sites", "workbench",
        },
        "replay": {"callables", "checkpoint", "models", "pipeline"},
    },
    {
        "__init__": {
            "calibration", "comparison", "conversion", "evaluation", "example_weight", "exporting",
            "finetuning", "metrics", "norms", "pairing", "parameters", "pipeline", "result",
            "saving", "sites", "starting", "surgery",
        },
        "cli.terminal": {
            "cli.tables", "diagnosis", "examination", "inspection", "processes", "report", "result",
            "workbench",
        },
    },
    {
        "cli.options": {"cli.terminal"},
    },
    {
        "cli.demo": {"checkpoint", "cli.options", "cli.terminal", "demo", "pipeline"},
        "cli.inspect": {"cli.options", "cli.terminal", "inspection"},
        "cli.planned": {"cli.options", "cli.terminal", "pipeline", "replay", "result"},
    },
    {
        "cli.convert": {
            "cli.options", "cli.planned", "cli.terminal", "conversion", "estimating", "refitting",
            "result",
        },
        "cli.eval": {
            "checkpoint", "cli.options", "cli.planned", "cli.terminal", "comparison", "predictions",
            "processes", "result",
        },
        "cli.export": {"cli.options", "cli.planned", "cli.terminal", "export_report", "exporting"},
    },
    {
        "cli": {
            "cli.convert", "cli.demo", "cli.eval", "cli.export", "cli.grouping", "cli.inspect",
            "cli.planned", "cli.usage", "runtime",
        },
    },
    {
        "__main__": {"cli"},
    },
]  # fmt: skip

#: The rooms of the command line.
CLI = {name for floor in FLOORS for name in floor if name.partition(".")[0] == "cli"}

#: What lets the outside in, and the rooms that may open it.
DOORS = {
    "typer": CLI,
    "rich": CLI,
    "torch.distributed": {"processes"},
    "triton": {"triton_kernels"},
    "matplotlib": {"drawing"},
    "jinja2": {"pages"},
    "onnxruntime": {"artifacts"},
    "safetensors": {"pickles", "plain_files", "reading", "demo.train"},
    "pickle": {"pickles"},
    "PIL": {"callables", "corruptions", "data", "images", "augmentation"},
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
