"""The base layer of the package, and the process setup that comes before torch is imported.

Only the command line changes the process. A program that imports bnfix is left alone.

The import of torch takes seconds. An interrupt during it prints one line, as it does later.
Waiting threads spin for microseconds, not milliseconds: next to other programs, long spinning took
40 times the time; alone, no spinning at all took a quarter more.
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

#: Spins of a waiting thread before it sleeps: a few microseconds. Read by the OpenMP that torch
#: ships on Linux; other OpenMP libraries read only the policy.
_SPINS = "2000"


def begin() -> None:
    """Report an interrupt in one line, exit with 130, and let waiting threads sleep early.

    It acts only in a process started as ``bnfix`` or ``python -m bnfix``.
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
        # Python would kill itself with the signal, and some callers take that for a crash.
        os._exit(130)

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
            return
        sys.stdout.flush()
        sys.stderr.flush()
        end()

    sys.excepthook = hook
    # An interrupted import can turn the interrupt into an error of its own.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, end)


def imports_done() -> None:
    """Give interrupts back to Python once all imports are done."""
    if getattr(signal.getsignal(signal.SIGINT), "__module__", "") == __name__:
        signal.signal(signal.SIGINT, signal.default_int_handler)


begin()
