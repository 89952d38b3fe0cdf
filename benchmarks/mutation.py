"""Do the tests notice? Draws small faults in the package's own lines and runs the tests on each.

python benchmarks/mutation.py --n 30 --seed 0

Each mutant is one changed operator, comparison, constant, condition or left-out call in a copy of
the tree. It is killed if a test of its folder fails, and survives otherwise.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

#: The folders that are mutated, and the test files of each, fast ones first.
TESTS = {
    "jobs": (
        "candidates", "gate", "estimating", "workbench", "first_look", "memory", "conversion",
        "comparison", "exporting", "examination", "cli", "pipeline",
    ),
    "weights": ("gate", "label_free", "example_weight", "candidates"),
    "report": ("report", "terminal", "predictions", "candidates", "exporting", "cli"),
    "cli": ("terminal", "public_api", "cli", "exporting", "conversion", "docs"),
    "metrics": ("gate", "evaluation", "custom_metrics", "robustness"),
}  # fmt: skip

#: The test file of a file's own, which is tried before all others.
OWN = {
    "jobs/convert": "conversion",
    "jobs/export": "exporting",
    "jobs/compare": "comparison",
    "jobs/inspect": "examination",
    "jobs/session": "workbench",
    "jobs/plan": "estimating",
    "jobs/inputs": "first_look",
    "jobs/unjudged": "pooling",
    "weights/label_free": "label_free",
    "weights/choose": "example_weight",
    "weights/search": "example_weight",
    "report/export": "exporting",
    "report/predictions": "predictions",
}

SWAPPED: dict[type[ast.AST], str] = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.Is: "is not", ast.IsNot: "is", ast.In: "not in", ast.NotIn: "in",
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.And: "or", ast.Or: "and",
}  # fmt: skip


def inner(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes of running code: neither annotations nor docstrings nor the text of messages."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list", "type_params"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                yield child
                yield from inner(child)


def between(source: str, left: ast.expr, right: ast.expr, new: str) -> tuple[int, int, str] | None:
    """The operator between two operands, as a replacement in the source."""
    start, end = offset(source, left, end=True), offset(source, right)
    gap = source[start:end]
    return None if not gap.strip(" ()\n") else (start, end, gap.replace(gap.strip(" ()\n"), new))


def offset(source: str, node: ast.expr | ast.stmt, *, end: bool = False) -> int:
    """Where a node begins or ends, in characters."""
    line, column = (node.end_lineno, node.end_col_offset) if end else (node.lineno, node.col_offset)
    before = source.splitlines(keepends=True)[: (line or 1) - 1]
    return sum(map(len, before)) + (column or 0)


def mutants(source: str) -> Iterator[tuple[int, int, int, str]]:
    """Line, start, end and replacement of every fault that can be planted."""
    for node in inner(ast.parse(source)):
        found: tuple[int, int, str] | None = None
        if isinstance(node, ast.Compare) and len(node.ops) == 1:
            found = between(source, node.left, node.comparators[0], SWAPPED[type(node.ops[0])])
        elif isinstance(node, ast.BinOp) and type(node.op) in SWAPPED:
            found = between(source, node.left, node.right, SWAPPED[type(node.op)])
        elif isinstance(node, ast.BoolOp):
            found = between(source, node.values[0], node.values[1], SWAPPED[type(node.op)])
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            start = offset(source, node)
            found = (start, offset(source, node.operand), "")
        elif isinstance(node, (ast.If, ast.IfExp)):
            start, end = offset(source, node.test), offset(source, node.test, end=True)
            found = (start, end, f"(not ({source[start:end]}))")
        elif isinstance(node, ast.Constant) and isinstance(node.value, (bool, int, float)):
            start, end = offset(source, node), offset(source, node, end=True)
            found = (
                start,
                end,
                str(not node.value if isinstance(node.value, bool) else node.value + 1),
            )
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            found = (offset(source, node), offset(source, node, end=True), "pass")
        if found:
            yield getattr(node, "lineno", 0), *found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folders", nargs="+", default=["jobs", "weights", "report", "cli"])
    parser.add_argument("--timeout", type=float, default=900)
    parser.add_argument("--only", type=int, nargs="*", help="numbers of mutants, to run again")
    parser.add_argument("--quick", action="store_true", help="without the slowest test files")
    chosen = parser.parse_args()
    slow = {"cli", "pipeline", "docs", "comparison"} if chosen.quick else set()
    drawn = random.Random(chosen.seed)
    every = []
    for folder in chosen.folders:
        for path in sorted((ROOT / "bnfix" / folder).glob("*.py")):
            text = path.read_text(encoding="utf-8")
            every += [(path.relative_to(ROOT), *mutant) for mutant in mutants(text)]
    print(f"{len(every)} mutants can be planted", flush=True)
    picked = drawn.sample(every, chosen.n)
    killed = 0
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch) / "tree"
        skipped = shutil.ignore_patterns(
            ".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__"
        )
        shutil.copytree(ROOT, copy, ignore=skipped)
        for number, (path, line, start, end, new) in enumerate(picked):
            if chosen.only and number not in chosen.only:
                continue
            source = (ROOT / path).read_text(encoding="utf-8")
            was = source[start:end]
            (copy / path).write_text(source[:start] + new + source[end:], encoding="utf-8")
            own = OWN.get(path.relative_to("bnfix").with_suffix("").as_posix())
            names = dict.fromkeys([own, *TESTS[path.parts[1]]] if own else TESTS[path.parts[1]])
            places = [f"tests/test_{name}.py" for name in names if name == own or name not in slow]
            files = [place for place in places if (copy / place).is_file()]
            command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
            began = time.monotonic()
            environment = {**os.environ, "PYTHONPATH": str(copy)}
            try:
                run = subprocess.run(
                    command, cwd=copy, env=environment, capture_output=True, text=True,
                    timeout=chosen.timeout, check=False,
                )  # fmt: skip
                dead, last = run.returncode != 0, (run.stdout.strip().splitlines() or [""])[-1]
                failed = [x for x in run.stdout.splitlines() if x.startswith(("FAILED", "ERROR"))]
                last = failed[0][:100] if failed else last
            except subprocess.TimeoutExpired:
                dead, last = True, "did not end"
            (copy / path).write_text(source, encoding="utf-8")
            killed += dead
            row = {
                "number": number,
                "killed": dead,
                "place": f"{path}:{line}",
                "was": " ".join(was.split()),
                "new": " ".join(new.split()),
                "by": last,
                "seconds": round(time.monotonic() - began),
            }
            print(json.dumps(row), flush=True)
    print(f"{killed} of {len(chosen.only or picked)} killed")


if __name__ == "__main__":
    main()
