"""What one command is to do: all its recipes, the splits that follow, what it would cost."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bnfix.data.fingerprints import data_record
from bnfix.errors import ConfigError, DataError
from bnfix.estimating import Work, estimated
from bnfix.layers.norms import generalized_norms
from bnfix.layers.sites import find_norms
from bnfix.layers.surgery import Change, plan_swap, swap_planned_
from bnfix.recipe import (
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
from bnfix.tracking import Track
from bnfix.workbench import Workbench, open_workbench
from bnfix.workload import workload

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
        statistics: auto, or what to do.
        weight: auto, or what to do.
        finetune: what to try; ``None`` for nothing.
        gate: splits, seed, z.
        run: device and batch size.
        state: folder for the state of a long run, to go on from.
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
        """Check what only the recipes together can tell.

        Raises:
            ConfigError: if a fit of the weight without labels has no batch size.
        """
        weight = self.weight.example_weight
        if weight in LABEL_FREE and self.statistics.train_batch_size is None:
            raise ConfigError(
                f"--example-weight {weight}: the batch size is missing. Give --train-batch-size B.",
                name="train_batch_size",
            )

    @property
    def chooses(self) -> bool:
        """Whether anything is left to the gate."""
        without_labels = self.weight.example_weight in LABEL_FREE
        auto = self.statistics.statistics == "auto" and not without_labels
        auto = auto or self.weight.example_weight == "auto"
        return auto or (self.command == "fix" and self.finetune is not None)

    def fractions(self) -> tuple[float, float, float]:
        """Fit, select and test parts of the data."""
        given = self.source.test is not None
        if self.command == "finetune":
            return (1.0, 0.0, 0.0) if given else (0.8, 0.0, 0.2)
        if self.average is not None and not given and self.source.labels != "none":
            return 0.8, 0.0, 0.2
        if not self.chooses or self.source.labels == "none":
            return 1.0, 0.0, 0.0
        if given:
            return 0.75, 0.25, 0.0
        return self.gate.fit, self.gate.select, 1 - self.gate.fit - self.gate.select

    def open(self, checkpoint: str | Path, data: str, track: Track) -> Workbench:
        """Open the checkpoint and the data, cut it, and swap the norm layers.

        Args:
            checkpoint: the file.
            data: DATA.
            track: how progress is shown.

        Returns:
            The workbench.

        Raises:
            DataError: if labels are needed and there are none.
        """
        bench = open_workbench(
            checkpoint,
            data,
            model=self.model,
            source=self.source,
            gate=self.gate,
            run=self.run,
            fractions=self.fractions(),
            track=track,
            lenders=() if self.average is None else self.average.files,
        )
        if self.finetune is not None and not bench.labelled:
            if self.command != "fix":
                raise DataError(
                    f"{data}: has no labels, and fine-tuning needs them. Give labelled data."
                )
            bench.assumptions.append("fine-tuning was not tried: the data has no labels.")
        if self.average is not None and not bench.labelled:
            split = bench.split
            bench.split = dataclasses.replace(
                split, fit=_joined(split.fit, split.test), test=split.test[:0]
            ) if self.source.test is None else split  # fmt: skip
        if self.measuring(bench).chooses and not bench.labelled:
            bench.assumptions.append(
                "without labels nothing can be proven, so `auto` keeps what is there. These act: "
                "--statistics population, --statistics train-batch --train-batch-size B, "
                "--example-weight match, fit-moments, fit-predictions or a number."
            )
            if bench.split.select.size:
                bench.split = dataclasses.replace(
                    bench.split,
                    fit=_joined(bench.split.fit, bench.split.select, bench.split.test),
                    select=bench.split.select[:0],
                    test=bench.split.test[:0],
                )
        self._swap_(bench)
        return bench

    def measuring(self, bench: Workbench) -> Plan:
        """The plan with statistics stated, where those of the model are of other weights."""
        if not bench.loaded.checkpoint.borrowed or self.statistics.statistics != "auto":
            return self
        stated = dataclasses.replace(self.statistics, statistics="population")
        return dataclasses.replace(self, statistics=stated)

    def _swap_(self, bench: Workbench) -> None:
        """Swap stock layers; those that a bnfix file has set already keep what is not asked for."""
        swapped = plan_swap(bench.model, self.swap)
        bench.assumptions += [*swapped.notes, *swapped.skipped]
        if list(generalized_norms(bench.model)):
            if dataclasses.replace(self.swap, layers=(), skip=()) == SwapRecipe():
                return
            changes = tuple(self._keeping(change, bench.model) for change in swapped.changes)
            swapped = dataclasses.replace(swapped, changes=changes)
        live = any(layer.live for _, layer in generalized_norms(bench.model))
        if not live and any(change.example_weight for change in swapped.changes):
            bench.original = copy.deepcopy(bench.model)
        swapped = swap_planned_(bench.model, swapped)

    def _keeping(self, change: Change, model: nn.Module) -> Change:
        """A change of a layer that is set already, less what nobody asked for."""
        layer, swap = dict(generalized_norms(model)).get(change.name), self.swap
        if layer is None or swap.to != SwapRecipe().to:
            return change
        return dataclasses.replace(
            change,
            channel_groups=swap.channel_groups or layer.channel_groups,
            ghost_size=swap.ghost_size or layer.ghost_size,
            example_weight=swap.example_weight,
        )

    def describe(self, bench: Workbench, output: str | None) -> dict[str, Any]:
        """What the command would do, as JSON values.

        Args:
            bench: the opened workbench.
            output: where it would be written.

        Returns:
            Layers, data, splits, stages, passes, and what they would cost on this machine: a few
            batches are run for that, and nothing is changed.
        """
        split = bench.split
        return {
            "command": self.command,
            "plan": True,
            "model": bench.loaded.origin.spec,
            "n_layers": len(find_norms(bench.model)),
            "data": {
                **data_record(bench.images),
                "kind": bench.images.kind,
                "labels": bench.labelled,
                "splits": {
                    "fit": len(split.fit),
                    "select": len(split.select),
                    "test": len(split.test),
                },
            },
            "preprocessing": bench.preprocessing and dataclasses.asdict(bench.preprocessing),
            "stages": self._stages(bench),
            "device": str(next(iter(bench.model.parameters())).device),
            **estimated(bench, self.workload(bench)).to_json(),
            "output": output,
            "assumptions": list(bench.assumptions),
        }

    def workload(self, bench: Workbench) -> list[Work]:
        """The passes that the command takes where every candidate is tried.

        Args:
            bench: the opened workbench.

        Returns:
            One entry a stage, in order.
        """
        return workload(
            bench,
            gated=bench.labelled and self.chooses,
            statistics=self.statistics,
            weight=self.weight,
            finetune=self.finetune if bench.labelled else None,
            only_finetune=self.command == "finetune",
        )

    def _stages(self, bench: Workbench) -> list[str]:
        gated = bench.labelled and self.chooses
        stages = []
        n_norms = sum(site.has_statistics and not site.frozen for site in find_norms(bench.model))
        passes = 1.0 if self.statistics.feed == "batch" else (n_norms + 3) / 2
        if self.average is not None:
            stages.append(f"mean of {len(self.average.files) + 1} checkpoints")
        if self.statistics.statistics != "keep" and (gated or self._stated_statistics()):
            # All batches walk together, or each layer takes a pass that is shorter than the next.
            more = "" if passes == 1 else f", or {passes:g} where that does not fit the memory"
            stages.append(
                f"population statistics ({self.statistics.statistics}, {self.statistics.feed} "
                f"feed): 1 pass over fit{more}"
            )
        if gated and self.finetune is not None:
            stages.append(f"fine-tuning ({self.finetune.train}): {self.finetune.epochs} epochs")
        if gated and self.weight.example_weight == "auto":
            stages.append(f"example weight (up to per {self.weight.granularity}), on fit")
        if gated:
            stages.append("every candidate judged on select; the winner measured on test")
        return stages

    def _stated_statistics(self) -> bool:
        without_labels = self.weight.example_weight in LABEL_FREE
        auto = self.statistics.statistics == "auto" and without_labels
        return auto or self.statistics.statistics in ("population", "train-batch")


def _joined(*parts: Any) -> Any:
    return torch.cat([torch.as_tensor(part) for part in parts]).sort().values.numpy()
