"""bnfix: repair trained networks at their normalization layers."""

import bnfix.starting as _starting  # noqa: F401  # first, since it is about the imports below
from bnfix.checkpoints.loading import load
from bnfix.checkpoints.saving import save
from bnfix.comparison import evaluate_files
from bnfix.conversion import convert
from bnfix.errors import (
    BnfixError,
    CheckpointError,
    ConfigError,
    DataError,
    ModelError,
    NormError,
    NumericError,
)
from bnfix.layers.norms import GeneralizedBatchNorm, set_example_weight_
from bnfix.layers.sites import find_norms
from bnfix.layers.surgery import swap_norms_
from bnfix.measuring.evaluation import evaluate
from bnfix.measuring.metrics import Metrics
from bnfix.measuring.pairing import compare
from bnfix.production.exporting import export
from bnfix.reporting.result import Result
from bnfix.run import calibrate, finetune, fix
from bnfix.statistics.calibration import recalibrate_, residuals
from bnfix.tuning.finetuning import finetune_
from bnfix.tuning.parameters import decay_norms_, parameter_groups
from bnfix.version import __version__
from bnfix.weighing.example_weight import choose_example_weight_

__all__ = [
    "BnfixError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "GeneralizedBatchNorm",
    "Metrics",
    "ModelError",
    "NormError",
    "NumericError",
    "Result",
    "__version__",
    "calibrate",
    "choose_example_weight_",
    "compare",
    "convert",
    "decay_norms_",
    "evaluate",
    "evaluate_files",
    "export",
    "find_norms",
    "finetune",
    "finetune_",
    "fix",
    "load",
    "parameter_groups",
    "recalibrate_",
    "residuals",
    "save",
    "set_example_weight_",
    "swap_norms_",
]
