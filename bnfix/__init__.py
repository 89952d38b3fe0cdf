"""bnfix: repair trained networks at their normalization layers."""

import bnfix.starting as _starting  # noqa: F401  # first, since it is about the imports below
from bnfix.calibration import recalibrate_, residuals
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
from bnfix.evaluation import evaluate
from bnfix.example_weight import choose_example_weight_
from bnfix.exporting import export
from bnfix.finetuning import finetune_
from bnfix.metrics import Metrics
from bnfix.norms import GeneralizedBatchNorm, set_example_weight_
from bnfix.pairing import compare
from bnfix.parameters import decay_norms_, parameter_groups
from bnfix.pipeline import calibrate, finetune, fix
from bnfix.result import Result
from bnfix.saving import load, save
from bnfix.sites import find_norms
from bnfix.surgery import swap_norms_
from bnfix.version import __version__

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
