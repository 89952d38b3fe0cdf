"""How many passes the stages of a command take, before any of them is taken."""

from __future__ import annotations

import math

from bnfix.estimating import Work
from bnfix.layers.refitting import REFIT_SAMPLES
from bnfix.layers.sites import find_norms
from bnfix.measuring.movement import MOST_IMAGES
from bnfix.recipe import LABEL_FREE, FinetuneRecipe, StatisticsRecipe, WeightRecipe
from bnfix.workbench import Workbench

#: The search of one global weight: tried weights, each on a third of the examples.
_TRIED_WEIGHTS = 10
#: Fits without labels: what training mode says, then some tried weights.
_LABEL_FREE_PASSES = 12


def workload(
    bench: Workbench,
    *,
    gated: bool,
    statistics: StatisticsRecipe,
    weight: WeightRecipe,
    finetune: FinetuneRecipe | None,
    only_finetune: bool,
) -> list[Work]:
    """Count the passes of a plan, as its stages take them where every candidate is tried.

    Args:
        bench: opened.
        gated: whether candidates are judged on the select split.
        statistics: as asked for.
        weight: likewise.
        finetune: likewise; ``None`` for nothing.
        only_finetune: whether fine-tuning is the whole command.

    Returns:
        One entry a stage, in order.
    """
    n_fit, n_select, n_test = (
        len(part) for part in (bench.split.fit, bench.split.select, bench.split.test)
    )
    n_monitor = max(1, n_fit // 5) if n_fit else 0
    n_learn = n_fit - n_monitor
    work: list[Work] = []
    if only_finetune:
        if bench.original is not None:
            work.append(Work("re-fitting scale and shift", min(n_fit, REFIT_SAMPLES), 2, "live"))
        if finetune is not None:
            work += _finetuning(finetune, n_learn, n_monitor, n_fit, bench)
    else:
        targets = _n_targets(statistics, weight, gated=gated)
        if targets:
            n = min(n_fit, statistics.samples) if isinstance(statistics.samples, int) else n_fit
            passes = targets * statistics_passes(bench, statistics)
            work.append(Work("statistics", n, passes, "live"))
            work.append(Work("residual of the statistics", n_fit, 1, "live"))
        if weight.example_weight in LABEL_FREE:
            stage = f"example weight: {weight.example_weight}"
            work.append(Work(stage, n_fit, _LABEL_FREE_PASSES, "live"))
        if gated:
            stated = statistics.statistics in ("population", "train-batch")
            work.append(Work("select: what stands", n_select, 1 + (0 if stated else targets)))
            if finetune is not None:
                work += _finetuning(finetune, n_learn, n_monitor, n_fit, bench)
                work.append(Work("select: fine-tuned", n_select, 1))
            if weight.example_weight == "auto":
                work += _choice(weight, n_learn, n_monitor, n_select, bench)
                frozen = finetune is not None and finetune.statistics == "frozen"
                if finetune is not None and finetune.example_weight == "learn" and frozen:
                    work += _finetuning(finetune, n_learn, n_monitor, n_fit, bench)
                    work.append(Work("select: fine-tuned with weights", n_select, 1, "live"))
    if bench.test_images.labels is not None and n_test:
        work.append(Work("test: as it was", n_test, 1))
        work.append(Work("test: the output", n_test, 1, "live"))
    n_moved = min(MOST_IMAGES, len(bench.everything))
    work.append(Work("how far the outputs moved", n_moved, 2, "live"))
    return work


def statistics_passes(bench: Workbench, statistics: StatisticsRecipe) -> float:
    """Passes over the fit split that new statistics take.

    Args:
        bench: opened.
        statistics: the feed counts.

    Returns:
        1 where batches walk together; one a layer, ever longer, with the exact feed.
    """
    n_norms = sum(site.has_statistics and not site.frozen for site in find_norms(bench.model))
    return 1.0 if statistics.feed == "batch" else (n_norms + 3) / 2


def _n_targets(statistics: StatisticsRecipe, weight: WeightRecipe, *, gated: bool) -> int:
    """How many times statistics are computed."""
    if statistics.statistics == "keep":
        return 0
    if statistics.statistics != "auto" or weight.example_weight in LABEL_FREE:
        return 1
    if not gated:
        return 0
    if statistics.train_batch_size is None:
        return 1
    return 3 if weight.example_weight == "auto" else 2


def _finetuning(
    recipe: FinetuneRecipe, n_learn: int, n_monitor: int, n_fit: int, bench: Workbench
) -> list[Work]:
    size = bench.training_batch_size(recipe.batch_size) * recipe.accumulate
    steps = max(1, math.ceil(n_learn / size))
    epochs = float(recipe.epochs) if recipe.steps is None else recipe.steps / steps
    work = [
        Work(f"fine-tuning {recipe.train}", n_learn, epochs, "training"),
        Work("fine-tuning: watching", n_monitor, math.ceil(epochs) + 1, "live"),
    ]
    if recipe.statistics == "train":
        work.append(Work("statistics after each epoch", n_fit, math.ceil(epochs), "live"))
    return work


def _choice(
    recipe: WeightRecipe, n_learn: int, n_monitor: int, n_select: int, bench: Workbench
) -> list[Work]:
    levels = ("global", "layer", "channel").index(recipe.granularity)
    n_norms = max(1, len(find_norms(bench.model)))
    work = [Work("example weight: one for all layers", n_learn, _TRIED_WEIGHTS / 3, "live")]
    if levels >= 1:
        work.append(
            Work("example weight: per layer", n_learn, min(1, recipe.epochs) / 2, "training")
        )
    if levels == 2:
        work.append(Work("example weight: per channel", n_learn, recipe.epochs, "training"))
    if levels:
        watched = 1 + (recipe.epochs if levels == 2 else 0)
        thinning = 2 + math.ceil(math.log2(n_norms)) if recipe.thin else 0
        work.append(Work("example weight: watching", n_monitor, watched + thinning, "live"))
    work.append(Work("select: example weight", n_select, levels + 1, "live"))
    return work
