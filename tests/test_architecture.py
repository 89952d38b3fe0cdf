"""The drawing of the house against its building: which folder may import which."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import bnfix
from tests import house

PACKAGE = Path(bnfix.__file__).parent

#: The folders from the ground up, and the folders below that each imports.
FLOORS: dict[str, set[str]] = {
    "core": set(),
    "norm": {"core"},
    "models": {"core", "norm"},
    "checkpoints": {"core", "models", "norm"},
    "data": {"checkpoints", "core", "models"},
    "recalibrate": {"checkpoints", "core", "models", "norm"},
    "metrics": {"core", "models", "norm"},
    "weights": {"core", "metrics", "norm", "recalibrate"},
    "training": {"checkpoints", "core", "metrics", "models", "norm", "weights"},
    "deploy": {"checkpoints", "core", "models", "norm"},
    "diagnosis": {"core", "metrics", "norm", "recalibrate"},
    "report": {
        "checkpoints", "core", "deploy", "metrics", "norm", "recalibrate", "training", "weights",
    },
    "jobs": {
        "checkpoints", "core", "data", "deploy", "diagnosis", "metrics", "models", "norm",
        "recalibrate", "report", "training", "weights",
    },
    "demo": {"core"},
    "cli": {"checkpoints", "core", "demo", "diagnosis", "jobs", "norm", "recalibrate", "report"},
    "__init__": {
        "checkpoints", "core", "jobs", "metrics", "norm", "recalibrate", "report", "training",
        "weights",
    },
    "__main__": {"cli"},
}  # fmt: skip

#: Libraries that only some files may import.
DOORS = {
    "triton": set(),
    "typer": {"cli"},
    "rich": {"cli"},
    "torch.distributed": {"core.distributed", "core.torch_private"},
    "matplotlib": {"report.plots"},
    "jinja2": {"report.pages"},
    "onnxruntime": {"deploy.forms"},
    "safetensors": {"checkpoints.read", "checkpoints.save", "deploy.forms"},
    "pickle": {"checkpoints.read"},
    "PIL": {
        "data.arrays", "data.batches", "data.corruptions", "data.images", "data.targets",
    },
}  # fmt: skip


def files() -> dict[str, ast.Module]:
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


def imported_files(name: str, tree: ast.Module, known: set[str]) -> set[str]:
    found = set()
    for module in imports(tree):
        if not module.startswith("bnfix.") and module != "bnfix":
            continue
        inner = module.removeprefix("bnfix").removeprefix(".")
        found |= {inner} & known or {inner.rpartition(".")[0]} & known
    return found - {name}


def folder(name: str) -> str:
    return name.partition(".")[0]


FILES = files()
ARROWS = {name: imported_files(name, tree, set(FILES)) for name, tree in FILES.items()}
FOLDERS = {folder(name) for name in FILES}


def test_the_table_names_every_folder() -> None:
    assert set(FLOORS) == FOLDERS
    assert len(FOLDERS) <= house.ROOMS


def test_arrows_point_down_only() -> None:
    below: set[str] = set()
    for name, allowed in FLOORS.items():
        assert allowed <= below, f"{name} is drawn beside or below {allowed - below}"
        below.add(name)


@pytest.mark.parametrize("name", FLOORS)
def test_a_folder_imports_exactly_the_folders_in_the_table(name: str) -> None:
    found = {folder(arrow) for file, to in ARROWS.items() if folder(file) == name for arrow in to}
    assert found - {name} == FLOORS[name]


def test_there_are_no_cycles_between_files() -> None:
    order = list(TopologicalSorter(ARROWS).static_order())
    assert set(order) == set(FILES)


@pytest.mark.parametrize("door", DOORS)
def test_a_library_is_imported_only_by_its_own_files(door: str) -> None:
    users = {
        name
        for name, tree in FILES.items()
        if any(module == door or module.startswith(f"{door}.") for module in imports(tree))
    }
    assert users or not DOORS[door]
    assert all({user, folder(user)} & DOORS[door] for user in users), users


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


@pytest.mark.parametrize("name", sorted(set(FILES) - {"core.torch_private"}))
def test_private_names_of_torch_are_in_one_file(name: str) -> None:
    # To override the loading of a state, torch itself names this method in its documentation.
    documented = {"torch.nn.Module._load_from_state_dict"}
    assert private_names_of_torch(FILES[name]) <= documented


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
def test_a_private_name_of_torch_is_found(line: str) -> None:
    assert private_names_of_torch(ast.parse(line))


def test_a_planted_import_is_caught() -> None:
    """In a function, as an attribute, from the package: the walk sees all three."""
    for planted in (
        "def f():\n    from bnfix.jobs.run import fix\n",
        "def f():\n    import bnfix.jobs.run\n",
        "from bnfix.jobs import run\n",
    ):
        assert "jobs.run" in imported_files("norm.moments", ast.parse(planted), set(FILES))
    tree = ast.parse("import torch\ntorch.distributed.all_reduce(x)\n")
    assert any(module.startswith("torch.distributed") for module in imports(tree))


def test_there_is_no_room_for_odds_and_ends() -> None:
    leaves = {name.rpartition(".")[2] for name in FILES}
    assert not {"utils", "base", "helpers", "common", "misc"} & leaves


def test_the_house_keeps_its_size() -> None:
    """Lines, files, bodies and records stay within the bounds at the top of ``tests/house.py``."""
    _, too_large = house.faults()
    assert not too_large, "\n".join(too_large)
