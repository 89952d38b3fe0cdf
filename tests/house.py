"""The size of the house, by its source: lines, files, bodies, records. Prints what is too big."""

from __future__ import annotations

import ast
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "bnfix"

LINES = 31_390  # on the way to 18,500
FILES = 104  # on the way to 80
FILE = 480
BODY = 60
FIELDS = 12
POSITIONAL = 4
COMMENTS = 0.04
ROOMS = 18

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Source:
    """One file of the package."""

    path: Path
    text: str
    tree: ast.Module

    @property
    def n_lines(self) -> int:
        return self.text.count("\n")

    @property
    def name(self) -> str:
        return self.path.relative_to(PACKAGE).as_posix()


def sources() -> list[Source]:
    """All files of the package."""
    paths = sorted(PACKAGE.rglob("*.py"))
    texts = [path.read_text(encoding="utf-8") for path in paths]
    return [
        Source(path, text, ast.parse(text, str(path)))
        for path, text in zip(paths, texts, strict=True)
    ]


def has_docstring(node: ast.AST) -> bool:
    """Whether the first statement is a docstring."""
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    )


def body_lines(node: Function) -> int:
    """Lines of a function's body, without its docstring."""
    first = node.body[0]
    if has_docstring(node):
        if len(node.body) == 1:
            return 0
        return (node.end_lineno or 0) - (first.end_lineno or 0)
    return (node.end_lineno or 0) - first.lineno + 1


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a dataclass or a named tuple."""
    words = " ".join(ast.unparse(part) for part in (*node.decorator_list, *node.bases))
    return "dataclass" in words or "NamedTuple" in words


def fields_of(node: ast.ClassDef) -> int:
    """The number of fields that a record declares itself."""
    return sum(
        isinstance(part, ast.AnnAssign) and "ClassVar" not in ast.unparse(part.annotation)
        for part in node.body
    )


def records(files: list[Source]) -> dict[str, tuple[str, int]]:
    """Each record's file and number of fields."""
    return {
        node.name: (source.name, fields_of(node))
        for source in files
        for node in ast.walk(source.tree)
        if isinstance(node, ast.ClassDef) and is_record(node)
    }


def positional_calls(files: list[Source], names: set[str]) -> Iterator[tuple[str, str, int]]:
    """Records that are built from too many positional arguments: place, record, how many."""
    for source in files:
        for node in ast.walk(source.tree):
            if not isinstance(node, ast.Call):
                continue
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            if called in names and len(node.args) > POSITIONAL:
                yield f"{source.name}:{node.lineno}", called, len(node.args)


def code_and_comments(source: Source) -> tuple[int, int]:
    """Lines that hold code, and lines that hold a comment."""
    code: set[int] = set()
    comments: set[int] = set()
    skipped = {
        line
        for node in ast.walk(source.tree)
        if has_docstring(node)
        for line in range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1)  # type: ignore[attr-defined]
    }
    silent = {
        tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER,
    }  # fmt: skip
    lines = iter(source.text.splitlines(keepends=True))
    for token in tokenize.generate_tokens(lambda: next(lines, "")):
        if token.type == tokenize.COMMENT:
            if not token.string.startswith(("# noqa", "# type:", "# fmt:", "# pragma")):
                comments.add(token.start[0])
        elif token.type not in silent:
            code.update(range(token.start[0], token.end[0] + 1))
    return len(code - skipped), len(comments)


def faults() -> tuple[list[str], list[str]]:
    """The figures, one a line, and all that is over its bound."""
    files = sources()
    total = sum(source.n_lines for source in files)
    known = records(files)
    counted = [code_and_comments(source) for source in files]
    code, comments = (sum(part) for part in zip(*counted, strict=True))
    rooms = {Path(source.name).parts[0].removesuffix(".py") for source in files}
    bodies = [
        (body_lines(node), f"{source.name}:{node.lineno} {node.name}")
        for source in files
        for node in ast.walk(source.tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    longest = max(source.n_lines for source in files)
    widest = max(n for _, n in known.values())
    figures = [
        f"{total:,} lines in {len(files)} files, {len(rooms)} rooms at the top level",
        f"longest file {longest}, longest body {max(bodies)[0]}, widest record {widest}",
        f"{code:,} lines of code, comments on {comments / code:.1%} of them",
    ]
    found = [f"{total:,} lines, at most {LINES:,}"] * (total > LINES)
    found += [f"{len(files)} files, at most {FILES}"] * (len(files) > FILES)
    found += [f"{s.name}: {s.n_lines} lines, at most {FILE}" for s in files if s.n_lines > FILE]
    found += [f"{where}: {n} lines of body, at most {BODY}" for n, where in bodies if n > BODY]
    found += [
        f"{where} {name}: {n} fields, at most {FIELDS}"
        for name, (where, n) in known.items()
        if n > FIELDS
    ]
    found += [
        f"{where} {name}: built from {n} positional arguments, at most {POSITIONAL}"
        for where, name, n in positional_calls(files, set(known))
    ]
    found += [f"comments {comments / code:.1%}, at least {COMMENTS:.0%}"] * (
        comments < COMMENTS * code
    )
    return figures, found


if __name__ == "__main__":
    lines, over = faults()
    sys.stdout.write("\n".join([*lines, *over]) + "\n")
    sys.exit(bool(over))
