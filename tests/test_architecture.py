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
GROUND = {"_torch_private", "errors", "preprocessing", "recipe", "version"}

#: The floors from the ground up: each room, and the rooms below that it may stand on.
FLOORS: list[dict[str, set[str]]] = [
    {
        "_torch_private": set(),
        "building": set(),
        "checkpoints": set(),
        "checkpoints.packing": set(),
        "cli.usage": set(),
        "data": set(),
        "demo.network": set(),
        "diagnosing": set(),
        "diagnosing.diagnosis": set(),
        "errors": set(),
        "guards": set(),
        "layers": set(),
        "layers.rows": set(),
        "measuring": set(),
        "measuring.intervals": set(),
        "moments": set(),
        "production": set(),
        "production.plain": set(),
        "reporting": set(),
        "reporting.svg": set(),
        "starting": set(),
        "statistics": set(),
        "tuning": set(),
        "version": set(),
        "weighing": set(),
    },
    {
        "building.importing": set(),
        "checkpoints.nesting": set(),
        "checkpoints.pickles": set(),
        "data.images": set(),
        "layers.kernels": {"layers", "layers.rows", "moments"},
        "measuring.temperature": {"measuring.intervals"},
        "processes": set(),
        "production.dataflow": set(),
        "production.verification": {"guards"},
        "recipe": set(),
    },
    {
        "checkpoints.reading": {"checkpoints.pickles"},
        "data.classes": {"data.images"},
        "data.corruptions": set(),
        "data.fingerprints": {"data.images"},
        "data.mat": {"data.images"},
        "data.parquet": {"data.images"},
        "data.shards": {"data.images"},
        "data.tensors": {"data.images"},
        "diagnosing.advice": {"diagnosing.diagnosis"},
        "layers.norms": {"layers", "layers.kernels", "layers.rows", "moments"},
        "measuring.metrics": {"measuring.intervals", "measuring.temperature"},
        "plan": set(),
        "preprocessing": set(),
        "runtime": {"processes"},
        "statistics.accumulating": {"layers.rows", "moments", "processes"},
    },
    {
        "building.pretrained": {"building.importing"},
        "checkpoints.checkpoint": {
            "checkpoints.nesting", "checkpoints.packing", "checkpoints.reading",
        },
        "data.batches": {"data.corruptions", "data.images", "data.tensors"},
        "data.callables": {"building.importing", "data.images", "data.tensors"},
        "data.named_sets": {"data.images", "data.mat"},
        "demo": set(),
        "layers.sites": {"layers.norms"},
        "measuring.evaluation": {
            "guards", "measuring.intervals", "measuring.metrics", "measuring.temperature",
            "processes", "runtime",
        },
        "measuring.movement": {"guards", "runtime"},
        "measuring.pairing": {"measuring.intervals", "measuring.metrics"},
        "memory": {"guards", "processes", "runtime"},
    },
    {
        "building.models": {
            "building.importing", "building.pretrained", "guards", "layers.sites",
        },
        "building.presets": {"building.importing", "building.pretrained"},
        "checkpoints.resuming": {"checkpoints.checkpoint", "checkpoints.reading"},
        "data.augmentation": {"data.batches"},
        "data.first_look": {"data.batches", "data.images", "guards", "layers.sites", "runtime"},
        "data.opening": {
            "data.callables", "data.classes", "data.images", "data.named_sets", "data.parquet",
            "data.shards", "data.tensors",
        },
        "layers.surgery": {"guards", "layers.norms", "layers.sites", "moments"},
        "measuring.custom_metrics": {
            "building.importing", "measuring.evaluation", "measuring.intervals",
        },
        "measuring.robustness": {
            "data.corruptions", "measuring.evaluation", "measuring.intervals",
            "measuring.pairing", "runtime",
        },
        "production.folding": {
            "guards", "layers.norms", "layers.sites", "moments", "production.dataflow", "runtime",
        },
        "reporting.pages": {"measuring.pairing"},
        "statistics.collecting": {
            "layers.norms", "layers.sites", "moments", "processes", "runtime",
            "statistics.accumulating",
        },
        "tuning.parameters": {"layers.sites"},
        "weighing.weight_search": {
            "guards", "layers.norms", "measuring.evaluation", "measuring.intervals", "processes",
            "runtime",
        },
    },
    {
        "checkpoints.origin": {"building.models", "checkpoints.checkpoint"},
        "layers.refitting": {
            "guards", "layers.norms", "layers.sites", "moments", "runtime", "statistics.collecting",
        },
        "production.fusing": {
            "guards", "layers.kernels", "layers.norms", "production.dataflow", "production.folding",
            "runtime",
        },
        "replay": {"building.models", "checkpoints.checkpoint", "data.callables", "plan"},
        "statistics.settling": {"layers.sites", "statistics.accumulating", "statistics.collecting"},
        "statistics.walking": {
            "guards", "memory", "processes", "runtime", "statistics.accumulating",
            "statistics.collecting",
        },
        "tracking": {"data.augmentation", "data.batches", "data.tensors", "processes"},
        "tuning.training": {
            "checkpoints.resuming", "layers.norms", "layers.sites", "measuring.evaluation",
            "processes", "runtime", "tuning.parameters",
        },
        "weighing.example_weight": {
            "guards", "layers.norms", "measuring.evaluation", "measuring.metrics",
            "measuring.pairing", "processes", "runtime", "weighing.weight_search",
        },
        "weighing.label_free": {
            "guards", "layers.norms", "moments", "runtime", "weighing.weight_search",
        },
    },
    {
        "checkpoints.loading": {
            "building.models", "building.presets", "building.pretrained", "checkpoints.checkpoint",
            "checkpoints.nesting", "checkpoints.origin", "layers.norms", "layers.sites",
            "layers.surgery",
        },
        "statistics.feeding": {
            "checkpoints.resuming", "guards", "layers.sites", "processes", "runtime",
            "statistics.accumulating", "statistics.collecting", "statistics.settling",
            "statistics.walking",
        },
        "tuning.finetuning": {
            "checkpoints.resuming", "guards", "layers.norms", "measuring.evaluation", "processes",
            "runtime", "tuning.parameters", "tuning.training", "weighing.example_weight",
        },
    },
    {
        "checkpoints.averaging": {
            "checkpoints.checkpoint", "checkpoints.loading", "checkpoints.nesting",
        },
        "checkpoints.saving": {
            "checkpoints.checkpoint", "checkpoints.loading", "checkpoints.nesting",
            "checkpoints.origin", "checkpoints.reading", "layers.norms",
        },
        "reporting.plots": {
            "measuring.pairing", "measuring.intervals", "measuring.metrics", "measuring.robustness",
            "reporting.pages", "reporting.svg", "tuning.finetuning", "weighing.weight_search",
        },
        "statistics.calibration": {
            "checkpoints.resuming", "layers.sites", "processes", "runtime",
            "statistics.accumulating", "statistics.collecting", "statistics.feeding",
            "statistics.settling",
        },
        "workbench": {
            "building.importing", "building.models", "building.presets", "checkpoints.loading",
            "checkpoints.reading", "data.batches", "data.corruptions", "data.fingerprints",
            "data.first_look", "data.images", "data.opening", "data.tensors", "guards", "memory",
            "plan", "processes", "runtime", "tracking",
        },
    },
    {
        "diagnosing.examination": {
            "diagnosing.diagnosis", "guards", "layers.sites", "measuring.evaluation", "runtime",
            "statistics.calibration",
        },
        "entrants": {
            "checkpoints.loading", "data.batches", "data.corruptions", "data.first_look",
            "data.images", "measuring.evaluation", "measuring.robustness", "memory", "processes",
            "production.fusing", "runtime", "tracking", "workbench",
        },
        "estimating": {
            "data.batches", "guards", "layers.norms", "layers.sites", "measuring.evaluation",
            "memory", "processes", "runtime", "tuning.parameters", "workbench",
        },
        "fits": {
            "checkpoints.averaging", "guards", "layers.norms", "layers.refitting",
            "measuring.evaluation", "measuring.pairing", "measuring.metrics", "memory",
            "statistics.calibration", "tracking", "tuning.finetuning", "weighing.example_weight",
            "weighing.label_free", "workbench",
        },
        "production.forms": {
            "building.models", "checkpoints.loading", "checkpoints.reading", "checkpoints.saving",
            "guards", "layers.norms", "production", "production.dataflow", "production.folding",
            "production.plain", "production.verification",
        },
        "reporting.records": {
            "layers.norms", "layers.sites", "measuring.custom_metrics", "measuring.metrics",
            "measuring.pairing", "measuring.robustness", "statistics.calibration",
            "tuning.finetuning", "weighing.example_weight",
        },
    },
    {
        "reporting.wording": {
            "layers.surgery", "measuring.custom_metrics", "measuring.movement", "measuring.pairing",
            "reporting.pages", "reporting.records", "statistics.calibration",
        },
        "steps": {
            "estimating", "fits", "layers.norms", "layers.refitting", "layers.sites",
            "layers.surgery", "measuring.movement", "plan", "tracking", "workbench",
        },
    },
    {
        "reporting.report": {
            "checkpoints.checkpoint", "measuring.pairing", "measuring.robustness", "reporting",
            "reporting.pages", "reporting.plots", "reporting.records", "reporting.svg",
            "reporting.wording", "statistics.calibration",
        },
    },
    {
        "reporting.result": {
            "checkpoints.checkpoint", "checkpoints.saving", "processes", "reporting.report",
        },
    },
    {
        "conversion": {
            "building.models", "checkpoints.loading", "checkpoints.reading", "checkpoints.saving",
            "data.batches", "data.fingerprints", "data.first_look", "guards", "layers.norms",
            "layers.refitting", "layers.sites", "layers.surgery", "measuring.movement",
            "reporting.records", "reporting.report", "reporting.result", "runtime", "tracking",
            "weighing.example_weight", "workbench",
        },
        "measuring.predictions": {
            "checkpoints.checkpoint", "measuring.evaluation", "measuring.intervals",
            "measuring.temperature", "reporting.result",
        },
        "production.export_report": {
            "checkpoints.checkpoint", "production", "production.folding", "production.forms",
            "production.verification", "reporting.pages", "reporting.report", "reporting.result",
        },
        "run": {
            "checkpoints.saving", "data.fingerprints", "estimating", "fits", "guards",
            "layers.sites", "measuring.metrics", "measuring.movement", "measuring.pairing", "plan",
            "processes", "reporting.records", "reporting.report", "reporting.result",
            "statistics.calibration", "steps", "tracking", "tuning.finetuning",
            "weighing.example_weight", "workbench",
        },
    },
    {
        "comparison": {
            "checkpoints.reading", "checkpoints.saving", "data.corruptions", "data.fingerprints",
            "entrants", "estimating", "measuring.custom_metrics", "measuring.evaluation",
            "measuring.metrics", "measuring.predictions", "processes", "reporting.records",
            "reporting.report", "tracking", "workbench",
        },
        "diagnosing.inspection": {
            "building.models", "checkpoints.checkpoint", "checkpoints.loading", "conversion",
            "data.batches", "data.fingerprints", "diagnosing.advice", "diagnosing.diagnosis",
            "diagnosing.examination", "layers.sites", "runtime", "tracking", "workbench",
        },
        "production.exporting": {
            "checkpoints.loading", "checkpoints.saving", "conversion", "data.batches",
            "data.corruptions", "data.fingerprints", "data.images", "data.opening", "estimating",
            "guards", "layers.norms", "measuring.evaluation", "production",
            "production.export_report", "production.forms", "production.verification",
            "reporting.records", "reporting.report", "runtime", "tracking", "workbench",
        },
    },
    {
        "__init__": {
            "checkpoints.loading", "checkpoints.saving", "comparison", "conversion", "layers.norms",
            "layers.sites", "layers.surgery", "measuring.evaluation", "measuring.metrics",
            "measuring.pairing", "production.exporting", "reporting.result", "run", "starting",
            "statistics.calibration", "tuning.finetuning", "tuning.parameters",
            "weighing.example_weight",
        },
        "cli.tables": {
            "diagnosing.diagnosis", "diagnosing.examination", "diagnosing.inspection",
            "layers.surgery", "reporting.pages", "reporting.report",
        },
    },
    {
        "cli.terminal": {"cli.tables", "processes", "reporting.report", "tracking"},
    },
    {
        "cli.flags": {"cli.terminal"},
    },
    {
        "cli.commands": {
            "checkpoints.checkpoint", "checkpoints.reading", "cli.flags", "cli.tables",
            "cli.terminal", "cli.usage", "comparison", "conversion", "diagnosing.inspection",
            "estimating", "layers.refitting", "measuring.predictions", "processes",
            "production.export_report", "production.exporting", "reporting.result",
        },
        "cli.planned": {
            "checkpoints.checkpoint", "cli.flags", "cli.tables", "cli.usage", "demo", "plan",
            "replay", "reporting.result", "run", "steps",
        },
    },
    {
        "cli": {"cli.commands", "cli.flags", "cli.planned", "cli.usage", "runtime", "starting"},
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
    "torch.distributed": {"_torch_private", "processes"},
    "triton": set(),
    "matplotlib": {"reporting.svg"},
    "jinja2": {"reporting.pages"},
    "onnxruntime": {"production.forms"},
    "safetensors": {
        "checkpoints.pickles", "checkpoints.reading", "production.forms",
    },
    "pickle": {"checkpoints.pickles"},
    "PIL": {
        "data.augmentation", "data.batches", "data.callables", "data.corruptions", "data.images",
    },
}  # fmt: skip


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


def private_names_of_torch(tree: ast.Module) -> set[str]:
    """Names of torch with a leading underscore: imported, or reached from what was imported."""
    found, bound = set(), {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            bound |= {(a.asname or a.name.partition(".")[0]): a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            bound |= {(a.asname or a.name): f"{node.module}.{a.name}" for a in node.names}
    of_torch = {name: path for name, path in bound.items() if path.partition(".")[0] == "torch"}
    paths = list(of_torch.values())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            if first in of_torch:
                paths.append(f"{of_torch[first]}.{rest}")
    for path in paths:
        parts = path.split(".")
        found |= {path for p in parts if p.startswith("_") and not p.startswith("__")}
    return found


@pytest.mark.parametrize("name", sorted(set(ROOMS) - {"_torch_private"}))
def test_private_names_of_torch_are_in_one_file(name):
    # To override the loading of a state, torch itself names this method in its documentation.
    documented = {"torch.nn.Module._load_from_state_dict"}
    assert private_names_of_torch(ROOMS[name]) <= documented


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch.utils._pytree import tree_map",
        "from torch.nn.modules.conv import _ConvNd as Conv",
        "import torch\nx = torch._C._len_torch_function_stack()",
        "from torch import nn as n\nx = n.modules.conv._ConvNd",
        "def f():\n    from torch.autograd import forward_ad\n    return forward_ad._current_level",
    ],
)
def test_a_private_name_of_torch_is_found(line):
    assert private_names_of_torch(ast.parse(line))


def test_nothing_imports_the_command_line():
    for name, tree in ROOMS.items():
        if name not in CLI | {"__main__"}:
            assert not CLI & stands_on(name, tree, set(ROOMS)), name


def test_a_planted_import_is_caught():
    """In a function, as an attribute, from the package: the walk sees all three."""
    for planted in (
        "def f():\n    from bnfix.run import fix\n",
        "def f():\n    import bnfix.run\n",
        "from bnfix import run\n",
    ):
        assert "run" in stands_on("moments", ast.parse(planted), set(ROOMS))
    tree = ast.parse("import torch\ntorch.distributed.all_reduce(x)\n")
    assert any(module.startswith("torch.distributed") for module in imports(tree))


def test_there_is_no_room_for_odds_and_ends():
    assert not {"utils", "base", "helpers", "common", "misc"} & set(ROOMS)
