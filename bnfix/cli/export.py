"""The command that turns a checkpoint into a form that runs without bnfix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bnfix.cli.options import (
    DATA,
    MODEL,
    OUT,
    Checkpoint,
    InputFlags,
    LabelFlags,
    ModelFlags,
    OutFlags,
    PlaceFlags,
    Seed,
    default_of,
    option,
)
from bnfix.cli.parsing import sizes
from bnfix.cli.terminal import Terminal, stated
from bnfix.cli.usage import command_line
from bnfix.errors import ConfigError
from bnfix.production.export_report import Export, check_exports
from bnfix.production.exporting import ExportRecipe, plan_export
from bnfix.production.exporting import export as export_file


def export(
    checkpoint: Checkpoint,
    output: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="The .onnx, .pt2, .safetensors (folded) or .py (plain) to write.",
            rich_help_panel=OUT,
        ),
    ],
    to: Annotated[str, option(ExportRecipe, "to", panel=OUT)],
    model: ModelFlags,
    labels: LabelFlags,
    inputs: InputFlags,
    place: PlaceFlags,
    out: OutFlags,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Images to verify on (default: seeded noise).",
            rich_help_panel=DATA,
        ),
    ] = None,
    samples: Annotated[int, option(ExportRecipe, "samples", panel=DATA)] = default_of(
        ExportRecipe, "samples"
    ),
    atol: Annotated[float, option(ExportRecipe, "atol", panel=OUT)] = default_of(
        ExportRecipe, "atol"
    ),
    opset: Annotated[int, option(ExportRecipe, "opset", panel=OUT)] = default_of(
        ExportRecipe, "opset"
    ),
    force_zero: Annotated[
        bool, option(ExportRecipe, "force_zero", "--force-zero", panel=OUT)
    ] = False,
    input_shape: Annotated[
        str | None, option(ExportRecipe, "input_shape", panel=MODEL, metavar="C,H,W")
    ] = None,
    seed: Seed = 0,
) -> None:
    """ONNX, torch.export, folded weights or one plain Python file, verified against the model.

    Example: bnfix export fixed.safetensors --model net.py:build --to onnx -o net.onnx
    """
    terminal = out.terminal()
    with stated():
        shape = sizes(input_shape, "input-shape")
        recipe = ExportRecipe(
            to=to, samples=samples, atol=atol, opset=opset, force_zero=force_zero, input_shape=shape
        )
        if place.device not in ("auto", "cpu"):
            raise ConfigError(
                f"--device: {place.device!r}, but export works on the CPU; what it writes runs "
                "anywhere. Leave the option out.",
                name="device",
            )
        source = inputs.recipe(class_map=labels.class_map, labels=labels.labels)
        if not out.show_plan:
            check_exports(to, output, force=out.force, checkpoint=checkpoint)
        with terminal.working() as track:
            if out.show_plan:
                plan = plan_export(
                    checkpoint, output, model=model.recipe(), recipe=recipe, data=data
                )
            else:
                result = export_file(
                    checkpoint,
                    model=model.recipe(),
                    data=data,
                    recipe=recipe,
                    source=source,
                    workers=place.workers,
                    seed=seed,
                    command_line=command_line(),
                    track=track,
                )
                result.save(output, force=out.force)
        if not out.show_plan:
            _show(terminal, result, output)
        elif out.as_json:
            terminal.print_json(plan)
        else:
            terminal.say(
                f"export: would write {', '.join(plan['files'])} with {plan['n_norms']} norm "
                f"layers, {plan['n_live']} of them live; nothing was done"
            )


def _show(terminal: Terminal, result: Export, output: Path) -> None:
    if terminal.as_json:
        terminal.print_json({**result.to_json(), "output": str(output)})
        return
    terminal.say(result.sentence())
    if not terminal.quiet:
        for remark in result.remarks():
            terminal.say(remark)
        terminal.notes(result.report.assumptions)
        files = ", ".join(str(path) for path in Export.files(result.to, output))
        terminal.say(f"wrote {files} and {output.name}.report.html, .md, .json")
