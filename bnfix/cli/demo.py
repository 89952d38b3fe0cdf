"""The command that goes the whole way on embedded data."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from bnfix import demo as demo_files
from bnfix.checkpoints.checkpoint import check_output, make_folder
from bnfix.cli.options import OUT, RUN, OutFlags, Seed, option
from bnfix.cli.terminal import stated
from bnfix.errors import CheckpointError
from bnfix.plan import Plan
from bnfix.recipe import DataRecipe, GateRecipe, ModelRecipe, RunOptions
from bnfix.run import execute, open_plan


def demo(
    out: OutFlags,
    output: Annotated[
        Path,
        typer.Option("-o", "--out", metavar="DIR", help="Folder to write.", rich_help_panel=OUT),
    ] = Path("bnfix-demo"),
    device: Annotated[str, option(RunOptions, "device", panel=RUN)] = "auto",
    seed: Seed = 0,
) -> None:
    """The whole way on embedded data, offline: convert, calibrate, fine-tune, evaluate.

    Example: bnfix demo
    """
    terminal = out.terminal()
    with stated():
        fixed = output / "digits_net.fixed.safetensors"
        if out.show_plan:
            terminal.show_demo_plan(str(output))
            return
        # What an earlier demo has left there is made anew: it is the same every time.
        earlier = (output / "digits_net.safetensors").is_file()
        if output.is_dir() and not (out.force or earlier) and any(output.iterdir()):
            raise CheckpointError(
                f"{output}: already exists and is not from an earlier demo. Give another -o DIR, "
                "or --force.",
                path=output,
            )
        make_folder(output)
        check_output(fixed, force=True)
        files = demo_files.write_files(output)
        prep = demo_files.PREPROCESSING
        plan = Plan(
            command_line=shlex.join([
                "bnfix", "fix", str(files.checkpoint), "--model", demo_files.SPEC,
                "--data", str(files.calibration), "--test", str(files.test),
                "--mean", str(prep.mean[0]), "--std", str(prep.std[0]), "--device", device,
                "--seed", str(seed), "-o", str(fixed), "--force",
            ]),
            model=ModelRecipe(demo_files.SPEC),
            source=DataRecipe(test=str(files.test), mean=prep.mean, std=prep.std),
            gate=GateRecipe(seed=seed),
            run=RunOptions(device),
        )  # fmt: skip
        if not (out.quiet or out.as_json):
            text = (
                "A small residual network, trained with a batch of 4 on 150 handwritten digits; "
                "500 others to repair it with, 500 more for the proof. By hand this is:\n"
                f"  {plan.command_line}\n"
            )
            terminal.out.print(escape(text), soft_wrap=True, highlight=False)
        with terminal.working() as track:
            bench = open_plan(plan, files.checkpoint, str(files.calibration), None, track)
            result = execute(bench)
            result.save(fixed, force=True)
        terminal.show(result.report, fixed)
