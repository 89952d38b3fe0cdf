"""All settings of one command."""

from __future__ import annotations

from dataclasses import dataclass

from bnfix.core.errors import ConfigError
from bnfix.core.settings import (
    LABEL_FREE,
    AverageRecipe,
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)

#: What `fix` tries where there are labels.
TRIED = FinetuneRecipe(train="norms+head", example_weight="learn")


@dataclass(frozen=True)
class Plan:
    """All recipes of one command.

    Args:
        command: ``fix``, ``calibrate``, ``finetune`` or ``average``.
        command_line: as typed.
        model: which model.
        source: which examples.
        swap: which layers and kind.
        statistics: auto, or which.
        weight: auto, or which.
        finetune: the training to try; ``None`` for none.
        gate: splits, seed, z.
        run: device and batch size.
        state: folder for the state of a long run, to resume it from.
        average: checkpoints to average the model with, before anything else.
    """

    command: str = "fix"
    command_line: str = ""
    model: ModelRecipe = ModelRecipe()
    source: DataRecipe = DataRecipe()
    swap: SwapRecipe = SwapRecipe()
    statistics: StatisticsRecipe = StatisticsRecipe()
    weight: WeightRecipe = WeightRecipe()
    finetune: FinetuneRecipe | None = TRIED
    gate: GateRecipe = GateRecipe()
    run: RunOptions = RunOptions()
    state: str | None = None
    average: AverageRecipe | None = None

    def __post_init__(self) -> None:
        """Check combinations of recipes."""
        weight = self.weight.example_weight
        if weight in LABEL_FREE and self.statistics.train_batch_size is None:
            raise ConfigError(
                f"--example-weight {weight}: the batch size is missing. Give --train-batch-size B.",
                name="train_batch_size",
            )
