"""The command that measures checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnfix import processes
from bnfix.checkpoints.checkpoint import check_folder, make_folder
from bnfix.cli.options import (
    OUT,
    AlsoFlags,
    Data,
    InputFlags,
    LabelFlags,
    ModelFlags,
    OutFlags,
    RunFlags,
    Seed,
)
from bnfix.cli.showing import estimate_line
from bnfix.cli.terminal import stated
from bnfix.cli.usage import command_line
from bnfix.comparison import evaluate_files, plan_evaluation
from bnfix.errors import CheckpointError
from bnfix.measuring.predictions import check_predictions
from bnfix.reporting.result import check_reports


def evaluate(
    checkpoints: Annotated[
        list[Path], typer.Argument(metavar="CKPT...", help="One or more checkpoints.")
    ],
    data: Data,
    model: ModelFlags,
    labels: LabelFlags,
    inputs: InputFlags,
    also: AlsoFlags,
    run: RunFlags,
    out: OutFlags,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for the report.", rich_help_panel=OUT),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Metrics of one or more checkpoints on the same examples, each paired against the first.

    Example: bnfix eval net.pth fixed.safetensors --model net.py:build --data test/ --report out/
    """
    terminal = out.terminal()
    with stated(many=True):
        source = inputs.recipe(class_map=labels.class_map, labels=labels.labels)
        recipe, options = model.recipe(), run.options()
        paths = None if report is None else _report_files(report, force=out.force)
        if also.predictions is not None:
            check_predictions(also.predictions, force=out.force)
        if out.show_plan:
            with terminal.working():
                plan = plan_evaluation(
                    checkpoints, data, also.recipe(), model=recipe, source=source, run=options
                )
            if out.as_json:
                terminal.print_json({**plan, "report": None if report is None else str(report)})
            else:
                terminal.say(f"eval: {plan['data']['n_examples']:,} images of {data}")
                terminal.say(f"{estimate_line(plan)}; nothing was done")
            return
        with terminal.working() as track:
            found = evaluate_files(
                checkpoints,
                data=data,
                model=recipe,
                source=source,
                run=options,
                also=also.recipe(),
                predictions=also.predictions,
                force=out.force,
                seed=seed,
                track=track,
                command_line=command_line(),
            )
            if paths is not None and report is not None and processes.here().is_first:
                make_folder(report)
                found.save(*paths)
        terminal.show(found)


def _report_files(folder: Path, *, force: bool) -> tuple[Path, Path, Path]:
    paths = (folder / "report.json", folder / "report.md", folder / "report.html")
    check_reports(paths, force=force)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is not a folder. Give another --report.", path=folder)
    check_folder(next(path for path in (folder, *folder.parents) if path.exists()) / "report.json")
    return paths
