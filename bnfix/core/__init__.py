"""The ground that every room is built on, and what is settled before torch is imported.

Only the command line settles anything; a program that imports bnfix is left alone.

An interrupt is one line, as at any other time: importing torch takes seconds, before a line of the
command line has run. And threads that wait for each other spin for microseconds, not milliseconds:
long spinning beside other programs took 40 times the time, none at all a quarter more when alone.
"""

from __future__ import annotations

import itertools
import os
import signal
import sys
from pathlib import Path
from types import TracebackType

#: The version, in one place.
__version__ = "0.1.0"

#: Turns of a waiting thread before it sleeps, some microseconds, in the OpenMP that torch brings
#: along on Linux; others know the policy only.
_SPINS = "2000"


def begin() -> None:
    """State an interrupt in one line and end with 130; let waiting threads soon sleep.

    Only where the process was started as ``bnfix`` or ``python -m bnfix``.
    """
    words = sys.orig_argv
    as_module = ("-m", "bnfix") in itertools.pairwise(words)
    if not as_module and Path(sys.argv[0] or ".").stem != "bnfix":
        return
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}:
        os.environ.update(OMP_WAIT_POLICY="PASSIVE", GOMP_SPINCOUNT=_SPINS)
    before = sys.excepthook

    def end(*_: object) -> None:
        os.write(2, b"bnfix: interrupted.\n")
        # Python would end itself by the signal, which some callers take for a crash.
        os._exit(130)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        end()

    sys.excepthook = hook
    # An import that is interrupted can turn the interrupt into an error of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def imports_done() -> None:
    """Let an interrupt be Python's own again, once all imports are done."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
