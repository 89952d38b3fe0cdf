"""Write tensors, models and run states to files, each completely or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import FrameType, MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import STATISTICS, Checkpoint, storable
from bnfix.checkpoints.load import origin_of, weight_buffers
from bnfix.checkpoints.read import FORMAT, finite, parse_header, read_file
from bnfix.checkpoints.several import as_header
from bnfix.core import __version__
from bnfix.core.errors import CheckpointError, name_error, output_error, output_errors, plain, some
from bnfix.core.settings import Preprocessing
from bnfix.norm.layer import generalized_norms

_HALF = (torch.float16, torch.bfloat16)
_LARGEST_HALF_LOSS = 1e-3
_STATE_FORMAT = 1  # format of the state of an interrupted run


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors to a file; shared tensors are written under each name."""
    ready: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.detach().resolve_conj().resolve_neg().contiguous()
        # The library refuses shared memory, because loaded tensors would not share it.
        place = whole.untyped_storage().data_ptr()
        ready[name] = whole.clone() if place in seen else whole
        seen.add(place)
    try:
        save_file(ready, path, metadata=dict(metadata))
    except KeyError as error:  # from its table of types
        odd = [f"{n} ({t.dtype})" for n, t in tensors.items() if t.dtype in error.args]
        raise TypeError(f"not a type of the format: {some(odd)}") from error
    if len(metadata) > 1:
        _order_metadata(path)


def _order_metadata(path: Path) -> None:
    """Put `bnfix` before `format` in the metadata; the library's order varies between runs."""
    first, start = '"format":"pt",', len('{"__metadata__":{')
    with path.open("r+b") as file:
        text = file.read(int.from_bytes(file.read(8), "little")).decode()
        if text.startswith(first, start):
            end = json.JSONDecoder().raw_decode(text, start - 1)[1] - 1
            file.seek(8 + start)
            file.write(f"{text[start + len(first) : end]},{first[:-1]}".encode())


def check_output(path: str | Path, *, force: bool) -> None:
    """Refuse, before any work, a path where no checkpoint can be written."""
    path = Path(path)
    if path.suffix != ".safetensors":
        better = plain(path.with_suffix(".safetensors").name) if path.name else "out.safetensors"
        raise name_error(
            path,
            f"expected a name that ends in .safetensors, the only output format. Use {better}.",
        )
    check_free(path, force=force)


def check_free(*paths: Path, force: bool, source: Path | None = None) -> None:
    """Refuse, before any work, outputs that cannot be written or must not be replaced.

    The source is never replaced, even with ``force``.
    """
    check_folder(paths[0])
    for path in paths:
        with output_errors(path, "cannot be written"):
            if path.is_dir():
                raise output_error(path, "is a folder, expected a file to write.")
            if source and source.exists() and path.exists() and path.samefile(source):
                raise output_error(path, "would replace the checkpoint itself. Give another name.")
            # A dangling link does not "exist", but writing would replace it.
            if not force and (path.exists() or path.is_symlink()):
                raise output_error(
                    path, "already exists. Give another name, or --force to replace it."
                )


def check_folder(path: Path, *, makes: bool = False) -> None:
    """Refuse an output file whose folder is read-only, or missing unless the program makes it."""
    folder = path.parent
    with output_errors(path, "cannot be written"):
        if makes:
            folder = next(parent for parent in path.parents if parent.exists())
        if not folder.exists():
            raise output_error(path, f"its folder {plain(folder)} does not exist. Create it first.")
        if not folder.is_dir():
            raise output_error(path, f"{plain(folder)} is not a folder. Choose another.")
        # The superuser passes os.access everywhere, but a read-only folder must stay read-only.
        if folder.stat().st_mode & 0o222 == 0 or not os.access(folder, os.W_OK | os.X_OK):
            raise output_error(path, f"its folder {plain(folder)} is read-only. Choose another.")


def make_folder(folder: Path) -> None:
    """Create an output folder and its parents; an existing folder stays unchanged."""
    with output_errors(folder, "cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)


def write_checkpoint(
    path: str | Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, Any],
    *,
    force: bool,
    marks: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Write tensors, the ``bnfix`` header and other marks to one file: completely or not at all."""
    path = Path(path)
    check_output(path, force=force)
    no_json = (TypeError, ValueError, RecursionError)
    with output_errors(path, "not written, its metadata is not JSON", kinds=no_json):
        text = json.dumps(finite(metadata))
    parse_header(text, path)
    # The format reserves the name __metadata__, but its writer does not check.
    bad = [plain(n) for n, t in tensors.items() if n == "__metadata__" or not storable(n, t)]
    if bad:
        raise output_error(
            path, f"not written, {some(bad)} cannot be stored, expected dense tensors by name."
        )
    ready = {name: tensor.detach().cpu() for name, tensor in tensors.items()}

    def write(temporary: Path) -> None:
        write_tensors(temporary, ready, {"bnfix": text, **marks})
        if not force:  # another program may have written the file in the meantime
            check_output(path, force=False)

    wrong = (OSError, RuntimeError, SafetensorError, TypeError, ValueError)
    with output_errors(path, "not written", kinds=wrong):
        replace_whole(path, write)


def write_text(path: str | Path, text: str) -> None:
    """Write a text as UTF-8, completely or not at all; an existing file is replaced."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file's content, completely or not at all; an existing file is replaced."""
    path = Path(path)
    check_folder(path)
    with output_errors(path, "not written"):
        replace_whole(path, lambda temporary: temporary.write_bytes(content))


def replace_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Write to a temporary file next to ``path``, sync, rename; leave nothing behind on failure."""
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        write(temporary)
        # Some writers create a private file; the mode must follow the umask instead.
        temporary.chmod(mode)
        _sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync(path.parent)  # otherwise a power cut can lose the new name


def write_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Fill a temporary folder next to ``path``, sync, rename; leave nothing behind on failure."""
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}.tmp"
    earlier = temporary.with_suffix(".old")
    with output_errors(path, "not written"):
        try:
            temporary.mkdir()
            write(temporary)
            for file in (*temporary.iterdir(), temporary):
                _sync(file)
            if path.exists():
                path.rename(earlier)
            try:
                temporary.rename(path)
            except OSError:
                if earlier.exists():
                    earlier.rename(path)
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(earlier, ignore_errors=True)
        _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# --- models ---


def save(
    model: nn.Module,
    path: str | Path,
    *,
    force: bool = False,
    entry: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Write a model as one ``.safetensors`` file whose tensors are exactly the stock state dict.

    Plain PyTorch loads it with ``strict=True`` and gets the same model with example weight 0. The
    header holds the further data of bnfix (settings of the norm layers, history).

    Args:
        model: with or without generalized layers.
        path: the output file; it must end in ``.safetensors``.
        force: replace an existing file.
        entry: a new entry for the history.
        preprocessing: stored for later commands; by default the model's own.

    Raises:
        CheckpointError: if the file cannot be written; nothing is left behind.
    """
    metadata = metadata_of(model, entry=entry, preprocessing=preprocessing)
    write_checkpoint(path, stock_tensors(model), metadata, force=force)


def metadata_of(
    model: nn.Module,
    *,
    entry: Mapping[str, Any] | None = None,
    preprocessing: Preprocessing | None = None,
) -> dict[str, Any]:
    """The header of a model's file: the settings of the norm layers, and the model's source."""
    origin = origin_of(model)
    known = preprocessing or origin.preprocessing
    norms: dict[str, dict[str, Any]] = {}
    for name, layer in generalized_norms(model):
        norms[name] = {
            "channel_groups": layer.channel_groups,
            "ghost_size": layer.ghost_size,
            "example_weight": _weight(layer.example_weight),
            "eps": layer.eps,
        }
        if layer.batch_weight is not None:
            norms[name]["batch_weight"] = _weight(layer.batch_weight)
            norms[name]["batch_estimator"] = layer.batch_estimator
        if layer.gates is not None:
            norms[name]["gates"] = layer.gates.tolist()
    return {
        "format": FORMAT,
        "bnfix": __version__,
        "model": {
            "spec": origin.spec,
            "arguments": origin.arguments,
            **({"labels": list(origin.labels)} if origin.labels else {}),
        },
        "preprocessing": None if known is None else asdict(known),
        "norms": norms,
        **({} if origin.task is None else {"task": asdict(origin.task)}),
        **({"domains": as_header(origin.domains)} if origin.domains else {}),
        "history": [*origin.history, *([] if entry is None else [dict(entry)])],
    }


def _weight(weight: Tensor) -> float | list[float]:
    """One number if it is equal for all channels, otherwise one per channel."""
    equal = weight.ndim == 0 or bool((weight == weight[0]).all())
    return float(weight.flatten()[0]) if equal else weight.tolist()


def stock_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict without bnfix's own buffers, in the types of the input file.

    Statistics that would lose more than 1e-3 in the file's half type (of the standard deviation for
    a mean, relative for a variance) are float32.
    """
    dtypes, own = origin_of(model).dtypes, weight_buffers(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in own}
    tensors = {}
    for name, tensor in state.items():
        dtype = dtypes.get(name, tensor.dtype)
        if dtype in _HALF and name.endswith(STATISTICS):
            spread = state.get(name.removesuffix("mean").removesuffix("var") + "var", tensor)
            if _loss(tensor, dtype, spread, is_mean=name.endswith("mean")) > _LARGEST_HALF_LOSS:
                dtype = torch.float32
        same_kind = tensor.is_floating_point() == dtype.is_floating_point
        tensors[name] = tensor.detach().cpu().to(dtype if same_kind else tensor.dtype)
    return tensors


@torch.no_grad()
def round_as_stored_(model: nn.Module) -> None:
    """Round every tensor as `save` does, to measure the saved numbers."""
    own = model.state_dict(keep_vars=True)
    for name, stored in stock_tensors(model).items():
        if stored.dtype != own[name].dtype:
            own[name].copy_(stored)


def history_entry(
    command: str,
    *,
    options: Mapping[str, Any],
    seed: int,
    checkpoint: Checkpoint | None,
    data: Mapping[str, Any] | None = None,
    results: Mapping[str, Any] | None = None,
    command_line: str = "",
) -> dict[str, Any]:
    """One entry of an output's history as JSON values; the command line as typed, or empty."""
    origin = checkpoint and {"file": checkpoint.path.name, "sha256": checkpoint.sha256}
    return {
        "command": command,
        "command_line": command_line,
        "options": dict(options),
        "seed": seed,
        "input": origin,
        "data": None if data is None else dict(data),
        "versions": versions(),
        "results": dict(results or {}),
    }


def versions() -> dict[str, str]:
    """The versions that affect the numbers."""
    python = platform.python_version()
    return {"bnfix": __version__, "python": python, "torch": torch.__version__}


# The largest rounding error of statistics: in standard deviations for a mean, else relative.
def _loss(tensor: Tensor, dtype: torch.dtype, var: Tensor, *, is_mean: bool) -> float:
    stored = tensor.to(dtype).double()
    error = torch.where(stored.isnan() & tensor.isnan(), 0.0, (stored - tensor.double()).abs())
    scale = (var.double().clamp_min(0) + 1e-5).sqrt() if is_mean else var.double() + 1e-5
    return float((error / scale).nan_to_num(nan=torch.inf).max()) if error.numel() else 0.0


# --- the state of an interrupted run ---


class StateFolder:
    """The state file of one run in a folder; it refuses the state of another run."""

    def __init__(self, folder: str | Path, identity: str, file: str = "finetuning.pt") -> None:
        self.path, self.identity = Path(folder) / file, identity
        check_folder(self.path, makes=True)

    def read(self) -> dict[str, Any] | None:
        """The content that `write` stored, read with the restricted loader only, or None."""
        if not self.path.exists():
            return None
        try:
            content = read_file(self.path)[0]
        except CheckpointError as error:
            raise self.damaged(error.__cause__ or "not a torch file") from error
        if not isinstance(content, dict) or content.get("format") != _STATE_FORMAT:
            raise self.damaged("not a run state of this version")
        if content.get("identity") != self.identity:
            raise output_error(
                self.path,
                "is the state of another run, expected the same options, data and input. Give the "
                "same ones, or another --state DIR.",
            )
        return content

    def write(self, content: Mapping[str, Any]) -> None:
        """Replace the state, completely or not at all."""
        whole = {"format": _STATE_FORMAT, "identity": self.identity, **content}
        with output_errors(self.path, "cannot be written", " Give another --state DIR."):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            replace_whole(self.path, lambda temporary: torch.save(whole, temporary))

    def damaged(self, reason: object) -> CheckpointError:
        """The error for a state that has the run's identity but does not fit the run."""
        advice = "Delete it to start over, or give another --state DIR."
        return output_error(self.path, f"is damaged ({plain(reason)}). {advice}")


def identity_of(model: nn.Module, settings: Mapping[str, Any]) -> str:
    """A digest of a run's settings and of all numbers in the model at the start."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in values_of(model).items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def values_of(model: nn.Module) -> dict[str, Tensor]:
    """Copy every parameter and buffer, including buffers that a state dict leaves out."""
    named = (*model.named_parameters(), *model.named_buffers())
    return {name: tensor.detach().clone() for name, tensor in named}


@torch.no_grad()
def set_values_(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Restore the parameters and buffers that `values_of` copied."""
    named = dict((*model.named_parameters(), *model.named_buffers()))
    if named.keys() != values.keys() or any(named[k].shape != values[k].shape for k in named):
        raise ValueError("its tensors do not match the model's")
    for name, tensor in named.items():
        tensor.copy_(values[name])


def random_state() -> list[Tensor]:
    """Copy the state of torch's generators."""
    return [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]


def set_random_state_(state: list[Tensor]) -> None:
    """Restore the state of torch's generators."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Delay a first interrupt (Ctrl-C) to the next check; a second one acts at once."""
    previous = signal.getsignal(signal.SIGINT)
    in_main = threading.current_thread() is threading.main_thread()
    # Only the main thread can set a handler, and a program's own handler is left in place.
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
