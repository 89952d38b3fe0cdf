"""bnfix: repair trained networks at their normalization layers.

`bnfix.settings` has the recipes that a `Plan` and several functions take.
"""

import bnfix.core as _starting  # noqa: F401  # first: it sets up the imports below
from bnfix.checkpoints.load import load
from bnfix.checkpoints.save import save
from bnfix.core import __version__
from bnfix.core import settings as settings
from bnfix.core.errors import (
    BnfixError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NormError,
    NumericError,
)
from bnfix.core.masks import valid_positions
from bnfix.jobs.compare import evaluate_files
from bnfix.jobs.convert import convert
from bnfix.jobs.export import export
from bnfix.jobs.run import calibrate, finetune, fix
from bnfix.jobs.session import Plan
from bnfix.metrics.compare import compare
from bnfix.metrics.evaluate import evaluate
from bnfix.metrics.metrics import Metrics
from bnfix.norm.layer import GeneralizedBatchNorm, set_example_weight_
from bnfix.norm.sites import find_norms
from bnfix.norm.swap import swap_norms_
from bnfix.recalibrate.passes import residuals
from bnfix.recalibrate.recalibrate import recalibrate_
from bnfix.report.result import Result
from bnfix.training.finetune import finetune_
from bnfix.training.parameters import decay_norms_, parameter_groups
from bnfix.weights.choose import choose_example_weight_

__all__ = [
    "BnfixError", "CheckpointError", "ConfigError", "DataError", "GeneralizedBatchNorm", "Metrics",
    "ModelError", "NormError", "NumericError", "Plan", "Result", "__version__", "calibrate",
    "choose_example_weight_", "compare", "convert", "decay_norms_", "evaluate", "evaluate_files",
    "export", "find_norms", "finetune", "finetune_", "fix", "load", "parameter_groups",
    "recalibrate_", "residuals", "save", "set_example_weight_", "swap_norms_",
    "valid_positions",
]  # fmt: skip
