"""Processes that start in a moment: copies of one that has imported all they need.

A copy is a process of its own, with its own memory, environment, output, signals and exit code.
All copies share the order of sets of strings, so that some tests start a rank without this.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import runpy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from multiprocessing import forkserver
from pathlib import Path

_CONTEXT = multiprocessing.get_context("forkserver")
_IMPORTED = (
    "tests.ranks", "bnfix.cli", "torch._dynamo", "torchvision", "scipy.optimize",
    "matplotlib.figure",
)  # fmt: skip


class Copy:
    """A started copy, with what is used of `subprocess.Popen`.

    Args:
        command: the words after ``python``: ``-m name ...``, ``-c code``, or a path with words.
        env: the whole environment.
    """

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        _serve(env["PYTHONPATH"])
        self._folder = Path(tempfile.mkdtemp(prefix="copy-"))
        self._streams = [self._folder / name for name in ("out", "err")]
        for path in self._streams:
            path.touch()
        self._process = _CONTEXT.Process(target=_work, args=(list(command), env, self._streams))
        self._process.start()

    @property
    def returncode(self) -> int | None:
        """As `subprocess` counts: less than zero is a signal."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code, or ``None`` while it runs."""
        return self._process.exitcode

    def kill(self) -> None:
        """End it by SIGKILL."""
        self._process.kill()

    def send_signal(self, number: int) -> None:
        """As `os.kill`."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and standard error, once it has ended; in time, or it is killed."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            self._process.kill()
            self._process.join()
        out, err = (path.read_text(encoding="utf-8") for path in self._streams)
        shutil.rmtree(self._folder)
        return out, err


@functools.cache
def _serve(paths: str) -> None:
    """Start the process that is copied; it imports with one thread, since a fork keeps only one."""
    wanted = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    _CONTEXT.set_forkserver_preload(list(_IMPORTED))
    try:
        forkserver.ensure_running()
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(command: list[str], env: dict[str, str], streams: list[Path]) -> None:
    import numpy as np

    os.environ.clear()
    os.environ.update(env)
    for number, path in enumerate(streams, 1):
        os.dup2(os.open(path, os.O_WRONLY), number)
    np.random.seed()  # as in a new process
    kind, *words = command
    if kind == "-m":
        sys.argv = words
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        exec(compile(words[0], "-c", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        runpy.run_path(kind, run_name="__main__")
