"""The command that looks and changes nothing."""

from __future__ import annotations

from typing import Annotated

import typer

from bnfix.cli.options import (
    DATA,
    Checkpoint,
    InputFlags,
    LabelFlags,
    ModelFlags,
    RunFlags,
    Seed,
    TalkFlags,
)
from bnfix.cli.showing import jsonable, show_inspection
from bnfix.cli.terminal import stated
from bnfix.diagnosing.inspection import SAMPLES, inspect_checkpoint
from bnfix.errors import ConfigError
from bnfix.recipe import check_seed


def inspect(
    checkpoint: Checkpoint,
    model: ModelFlags,
    inputs: InputFlags,
    labels: LabelFlags,
    run: RunFlags,
    talk: TalkFlags,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Examples on which stored statistics, both modes and the outputs are compared.",
            rich_help_panel=DATA,
        ),
    ] = None,
    samples: Annotated[
        int,
        typer.Option(help="Examples to run, drawn in seeded random order.", rich_help_panel=DATA),
    ] = SAMPLES,
    seed: Seed = 0,
) -> None:
    """What norm layers are there, and what is wrong with them; changes nothing.

    Example: bnfix inspect net.pth
    """
    terminal = talk.terminal()
    with stated():
        if samples < 2:
            raise ConfigError(f"--samples: {samples}, expected at least 2.", name="samples")
        check_seed(seed)
        source = inputs.recipe(class_map=labels.class_map, labels=labels.labels)
        with terminal.working() as track:
            found = inspect_checkpoint(
                checkpoint,
                model=model.recipe(),
                data=data,
                source=source,
                run=run.options(),
                samples=samples,
                seed=seed,
                track=track,
            )
    if talk.as_json:
        terminal.print_json(jsonable(found.to_json()))
    else:
        show_inspection(terminal, found)
