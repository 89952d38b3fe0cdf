"""The command that swaps norm layers."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from bnfix.cli.options import (
    DATA,
    MODEL,
    NORM,
    RUN,
    Checkpoint,
    InputFlags,
    KindFlags,
    LayerFlags,
    ModelFlags,
    OutFlags,
    Output,
    PlaceFlags,
    Seed,
    option,
)
from bnfix.cli.parsing import sizes
from bnfix.cli.showing import show_conversion
from bnfix.cli.terminal import stated
from bnfix.cli.usage import command_line
from bnfix.conversion import convert as convert_file
from bnfix.errors import ConfigError
from bnfix.estimating import estimated_again
from bnfix.layers.refitting import REFIT_SAMPLES
from bnfix.recipe import RunOptions, SwapRecipe, check_seed
from bnfix.reporting.result import check_outputs


def convert(
    checkpoint: Checkpoint,
    output: Output,
    model: ModelFlags,
    kind: KindFlags,
    layers: LayerFlags,
    inputs: InputFlags,
    place: PlaceFlags,
    out: OutFlags,
    example_weight: Annotated[
        float | None, option(SwapRecipe, "example_weight", panel=NORM)
    ] = None,
    input_shape: Annotated[
        str | None,
        typer.Option(
            metavar="C,H,W",
            help="Input of the check of the whole model (default: the size that the preprocessing "
            "leaves, else usual sizes, the small first).",
            rich_help_panel=MODEL,
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Examples on which scale and shift are re-fitted to the original's outputs, where "
            "example weights above 0 change those (--to group); labels are not used.",
            rich_help_panel=DATA,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(
            help=f"Examples to re-fit on, drawn in seeded random order (default {REFIT_SAMPLES}).",
            rich_help_panel=DATA,
        ),
    ] = None,
    batch_size: Annotated[int | None, option(RunOptions, "batch_size", panel=RUN)] = None,
    seed: Seed = 0,
) -> None:
    """Swap the norm layers; with example weight 0 the outputs stay the same, and that is checked.

    Example: bnfix convert net.pth --model net.py:build --to batch-group -o out.safetensors
    """
    terminal = out.terminal()
    started = time.perf_counter()
    with stated():
        recipe = layers.recipe(
            to=kind.to,
            example_weight=example_weight,
            ghost_size=kind.ghost_size,
            channel_groups=kind.channel_groups,
        )
        shape = sizes(input_shape, "input-shape")
        source = inputs.recipe()
        if samples is not None and samples < 2:
            raise ConfigError(f"--samples: {samples}, expected at least 2.", name="samples")
        check_seed(seed)
        if not out.show_plan:
            check_outputs(output, force=out.force)
        with terminal.working() as track:
            result = convert_file(
                checkpoint,
                model=model.recipe(),
                swap=recipe,
                input_shape=shape,
                run=RunOptions(place.device, batch_size=batch_size, workers=place.workers),
                command_line=command_line(),
                data=data,
                source=source,
                seed=seed,
                samples=samples,
                track=track,
            )
            if not out.show_plan:
                result.save(output, force=out.force)
        seconds = time.perf_counter() - started
        # A re-fit takes a pass for each layer.
        swap = result.report.swap
        passes = 0 if data is None or swap is None else len(swap.changes)
        cost = estimated_again(result.model, seconds, passes)
        show_conversion(terminal, result, None if out.show_plan else output, cost.to_json())
