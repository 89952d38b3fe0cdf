"""The command that looks and changes nothing."""

from __future__ import annotations

import dataclasses

from bnfix.checkpoint import read_checkpoint
from bnfix.cli.options import Checkpoint, ModelFlags, TalkFlags
from bnfix.cli.terminal import jsonable, show_inspection, stated
from bnfix.diagnosis import diagnose, read_norms
from bnfix.recipe import RunOptions
from bnfix.sites import find_norms
from bnfix.version import __version__
from bnfix.workbench import load_one


def inspect(checkpoint: Checkpoint, model: ModelFlags, talk: TalkFlags) -> None:
    """What norm layers are there, and what is wrong with them; changes nothing.

    Example: bnfix inspect net.pth
    """
    terminal = talk.terminal()
    with stated(), terminal.working():
        recipe = model.recipe()
        found = read_checkpoint(checkpoint, key=recipe.key, prefix=recipe.prefix)
        header = found.metadata or {}
        norms = header.get("norms")
        layers = read_norms(found.tensors, norms if isinstance(norms, dict) else None)
        findings = diagnose(found.tensors, layers)
        kinds: dict[str, str] = {}
        problems: list[str] = []
        if recipe.model is not None:
            sites = find_norms(load_one(checkpoint, recipe, RunOptions("cpu")).model)
            kinds = {site.name: site.kind for site in sites}
            problems = [f"{site.name}: {site.problem}" for site in sites if site.problem]
    history = header.get("history")
    content = {
        "bnfix": __version__,
        "command": "inspect",
        "file": str(checkpoint),
        "sha256": found.sha256,
        "key": found.key,
        "prefix": found.prefix,
        "notes": list(found.notes),
        "n_tensors": len(found.tensors),
        "layers": [
            {**dataclasses.asdict(layer), "kind": kinds.get(layer.name)} for layer in layers
        ],
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "problems": problems,
        "history": history if isinstance(history, list) else [],
    }
    if talk.as_json:
        terminal.print_json(jsonable(content))
    else:
        show_inspection(terminal, layers, kinds, findings, [*found.notes, *problems])
