"""The state of an interrupted run, in a folder, to go on from bit for bit."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import replace_whole
from bnfix.checkpoints.read import read_file
from bnfix.core.errors import CheckpointError, file_error, file_errors, plain

_FORMAT = 1


class StateFolder:
    """The file of one run's state in a folder; that of a run of another identity is refused."""

    def __init__(self, folder: str | Path, identity: str, file: str = "finetuning.pt") -> None:
        self.path, self.identity = Path(folder) / file, identity

    def read(self) -> dict[str, Any] | None:
        """The content that `write` was given, by the restricted loader only; None if none yet."""
        if not self.path.exists():
            return None
        content = read_file(self.path)[0]
        if not isinstance(content, dict) or content.get("format") != _FORMAT:
            raise file_error(
                self.path,
                "is not the state of a run that this version wrote. Give another --state DIR.",
            )
        if content.get("identity") != self.identity:
            raise file_error(
                self.path,
                "is the state of another run (other options, data or input). Give the same ones, "
                "or another --state DIR.",
            )
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the state, whole or not at all."""
        whole = {"format": _FORMAT, "identity": self.identity, **content}
        with file_errors(self.path, "cannot be written", " Give another --state DIR."):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(self.path, lambda temporary: torch.save(whole, temporary))

    def damaged(self, error: Exception) -> CheckpointError:
        """The error of a state that does not fit the run although it claims to."""
        return file_error(self.path, f"is damaged ({plain(error)}). Remove it to start again.")


def identity_of(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """A digest of a run's settings and of every number of the model at its start."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in values_of(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer, those that a state dict leaves out included."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


@torch.no_grad()
def set_values_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Put back the parameters and buffers that `values_of` has copied."""
    named = dict((*model.named_parameters(), *model.named_buffers()))
    if named.keys() != values.keys() or any(named[k].shape != values[k].shape for k in named):
        raise ValueError("its tensors are not those of the model")
    for name, tensor in named.items():
        tensor.copy_(values[name])


def random_state() -> list[Tensor]:
    """Copy the state of torch's generators."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state_(state: list[Tensor]) -> None:
    """Put back the state of torch's generators."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Let a first interrupt (Ctrl-C) wait for a convenient moment; a second one acts at once."""
    previous = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    # Only the main thread may set a handler, and a program's own one is left to it.
    if not in_main or previous is not signal.default_int_handler:
        yield lambda: None
        return
    waiting: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        waiting.append(number)
        signal.signal(signal.SIGINT, previous)

    def check() -> None:
        if waiting:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
