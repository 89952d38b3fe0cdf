"""Where the real checkpoints and images are, and the mark of tests that need them."""

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("BNFIX_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
GOLDEN = DATA.parent / "golden"

needs_data = pytest.mark.skipif(
    not (DATA / "cifar10" / "resnet20.th").is_file(),
    reason=f"real checkpoints and images are not at {DATA}; set BNFIX_DATA",
)
