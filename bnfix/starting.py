"""An interrupt while the command line is still being imported: one line, as at any other time.

Importing torch takes seconds, before a line of the command line has run. A program that imports
bnfix is left alone.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path
from types import TracebackType


def say_interrupted() -> None:
    """State an interrupt in one line and end with 130, where this process is the command line.

    Changes:
        ``sys.excepthook``, where the process was started as ``bnfix`` or ``python -m bnfix``.
    """
    words = sys.orig_argv
    as_module = ("-m", "bnfix") in itertools.pairwise(words)
    if not as_module and Path(sys.argv[0] or ".").stem != "bnfix":
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        sys.stdout.flush()
        sys.stderr.write("bnfix: interrupted.\n")
        sys.stderr.flush()
        # Python would end itself by the signal, which some callers take for a crash.
        os._exit(130)

    sys.excepthook = hook


say_interrupted()
