"""Exported files, checked and read, as networks that run beside checkpoints."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import Checkpoint
from bnfix.checkpoints.load import Loaded, Origin, stated_origin
from bnfix.checkpoints.read import FORMAT, finite, parse_header, require_file, sha256_of
from bnfix.core import __version__
from bnfix.core.errors import ModelError, file_error, file_errors, plain, some
from bnfix.core.settings import Preprocessing
from bnfix.deploy.forms import ONNX_LIMIT, Runner, onnx_runner, require_onnx, torch_runner
from bnfix.models.build import CHANNELS
from bnfix.models.graph import quiet

#: Files that hold a network itself, not the tensors of one.
EXPORTED: Final = (".onnx", ".pt2")
#: Where an ONNX file has what bnfix knows of it.
_HEADER: Final = "bnfix"
#: Examples of a batch that is filled up, at most.
_MOST_EXAMPLES: Final = 4096
#: Types of an input, by their numbers in ONNX.
_TYPES: Final = {1: torch.float32, 10: torch.float16, 11: torch.float64}
_EXTERNAL: Final = 1  # data_location of a tensor whose numbers are in another file


class ExportedNet(nn.Module):
    """A network behind a runner, on the CPU: it has outputs, and no layers to look at."""

    def __init__(
        self,
        name: str,
        run: Runner,
        outputs: Sequence[str],
        shape: Sequence[int | None],
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.name, self._run, self._outputs = name, run, tuple(outputs)
        self._shape, self._dtype = tuple(shape), dtype  # of the input; None: any size
        if len(self._shape) > 2 and self._shape[1] is not None:
            self.__dict__[CHANNELS] = self._shape[1]

    @property
    def batch_size(self) -> int | None:
        """How many examples it takes at once; ``None`` for any number."""
        return self._shape[0]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """All outputs of a batch, by name where there are several."""
        wanted, given = self._shape[1:], x.shape[1:]
        fits = len(wanted) == len(given)
        if not fits or any(a not in (None, b) for a, b in zip(wanted, given, strict=True)):
            takes = "x".join("any" if size is None else str(size) for size in wanted)
            raise ModelError(
                f"{plain(self.name)}: takes inputs of {takes}, was given "
                f"{'x'.join(map(str, given))}. Give --resize and --crop, or other data."
            )
        size = self.batch_size or len(x)
        parts = [self._whole(part, size) for part in torch.split(x.to("cpu", self._dtype), size)]
        found = [torch.cat(tensors).to(x.device) for tensors in zip(*parts, strict=True)]
        return found[0] if len(found) == 1 else dict(zip(self._outputs, found, strict=True))

    def _whole(self, x: Tensor, size: int) -> list[Tensor]:
        """The outputs of a batch, filled up to the size that the network takes, then cut."""
        last = x[-1:].expand(size - len(x), *x.shape[1:])
        return [y[: len(x)] for y in self._run(torch.cat([x, last]).contiguous())]


def is_exported(path: str | Path) -> bool:
    """Say whether a file holds a network itself, by its name."""
    return Path(path).suffix in EXPORTED


def load_exported(path: str | Path, *, trust_code: bool = False) -> Loaded:
    """Read an exported file into a network that runs like a loaded checkpoint.

    Nothing in an ONNX file is executed but ONNX's own operators. Its header says preprocessing,
    task and the examples that it was fitted on, if bnfix wrote the file. A ``.pt2`` file can run
    code as torch reads it, so it is opened on request only.
    """
    path = Path(path)
    require_file(path)
    header, runtime = None, "torch.export"
    if path.suffix == ".pt2":
        net = _program(path, trusted=trust_code)
    else:
        require_onnx(path.name, ("onnx", "onnxruntime"))
        proto = read_onnx(path)
        header = {entry.key: entry.value for entry in proto.metadata_props}.get(_HEADER)
        with file_errors(path, "ONNX Runtime does not take it", kinds=(ModelError,)):
            net = exported_net(path.name, proto)
        runtime = f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"
    notes = [f"run by {runtime} on the CPU, in the file's own precision"]
    if net.batch_size is not None:
        notes.append(
            f"takes batches of {net.batch_size} only; the last one is filled up with copies of its "
            "last example, and cut again"
        )
    checkpoint = Checkpoint(
        path=path,
        tensors={},
        metadata=None if header is None else parse_header(header, path),
        key="",
        prefix="",
        sha256=sha256_of(path),
        notes=tuple(notes),
    )
    # A model that the header names would never be built, and must not be looked up either.
    origin = dataclasses.replace(stated_origin(checkpoint), spec=None, arguments={})
    return Loaded(net.eval(), checkpoint, origin)


def _program(path: Path, *, trusted: bool) -> ExportedNet:
    """The network of a ``.pt2`` file."""
    if not trusted:
        raise file_error(
            path,
            "is not opened: torch reads such a file by pickles and by expressions that it "
            "evaluates, so the file can run code. If it is your own, give --trust-code; else "
            "export with --to onnx, or give the checkpoint.",
        )
    # Whatever a damaged file makes torch raise.
    with file_errors(path, "is damaged or no .pt2 file", kinds=(Exception,)), quiet():
        program = torch.export.load(path)
    inputs = program.graph_signature.user_inputs
    given = {
        node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"
    }
    x = given.get(inputs[0]) if len(inputs) == 1 else None
    if not isinstance(x, Tensor) or not x.ndim or not x.is_floating_point():
        raise file_error(
            path, f"takes {len(inputs)} inputs, expected one tensor of floating-point numbers."
        )
    spec = program.call_spec.out_spec
    names = spec.context if spec.type is dict else range(len(program.graph_signature.user_outputs))
    shape = [size if isinstance(size, int) else None for size in x.shape]
    run = torch_runner(program.module())
    return ExportedNet(path.name, run, [str(name) for name in names], shape, x.dtype)


def exported_net(name: str, proto: Any) -> ExportedNet:
    """The network of a checked ONNX model."""
    constants = {tensor.name for tensor in proto.graph.initializer}
    inputs = [one for one in proto.graph.input if one.name not in constants]
    kind = inputs[0].type.tensor_type if len(inputs) == 1 else None
    if kind is None or kind.elem_type not in _TYPES or not kind.shape.dim:
        names = some([plain(one.name) for one in inputs])
        raise ModelError(
            f"it takes {len(inputs)} inputs ({names}), expected one tensor of floating-point "
            "numbers, examples first"
        )
    shape = [dim.dim_value or None for dim in kind.shape.dim]
    if len(shape) == 4 and shape[1] not in (None, 1, 3) and shape[3] in (1, 3):
        size = "x".join(map(str, shape[1:]))
        raise ModelError(f"it takes {size}, channels last; expected channels first")
    if shape[0] is not None and not 0 < shape[0] <= _MOST_EXAMPLES:
        raise ModelError(f"it takes batches of {shape[0]}, expected 1 to {_MOST_EXAMPLES}")
    runner = onnx_runner(proto.SerializeToString(), where=name)
    outputs = [one.name for one in proto.graph.output]
    return ExportedNet(name, runner, outputs, shape, _TYPES[kind.elem_type])


def net_of(name: str, content: bytes) -> ExportedNet:
    """The network of an ONNX file that this program has written."""
    import onnx

    return exported_net(name, onnx.load_from_string(content))


def read_onnx(path: Path) -> Any:
    """An ONNX model with all its numbers, of ONNX's own operators; else a refusal."""
    import onnx

    _check_size(path, path.stat().st_size)
    # The parser has errors of its own kind, which is no OSError nor ValueError.
    with file_errors(path, "is damaged or no ONNX file", kinds=(Exception,)):
        proto = onnx.load(path, load_external_data=False)
    if not proto.graph.node:
        raise file_error(path, "is damaged or no ONNX file (it has no operators).")
    parts = list(_messages(proto))
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    foreign = sorted({plain(n.domain) for n in nodes if n.domain not in ("", "ai.onnx")})
    if foreign or proto.functions:
        raise file_error(
            path,
            f"needs operators that are not ONNX's own ({some(foreign) or 'local functions'}), "
            "which are not run. Export it in standard operators.",
        )
    _take_in_(path, [part for part in parts if isinstance(part, onnx.TensorProto)])
    return proto


def _check_size(path: Path, size: int) -> None:
    if size > ONNX_LIMIT:
        raise file_error(path, f"has {size:,} bytes, more than the {ONNX_LIMIT:,} of one ONNX file")


def _messages(message: Any) -> Iterator[Any]:
    """A message of protobuf, and all inside it; the parser has limited their depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


def _take_in_(path: Path, tensors: Iterable[Any]) -> None:
    """Read numbers that lie in other files of the folder into the model."""
    folder, total = path.parent.resolve(), path.stat().st_size
    for tensor in tensors:
        if tensor.data_location != _EXTERNAL:
            continue
        stated = {entry.key: entry.value for entry in tensor.external_data}
        place = PurePosixPath(stated.get("location", ""))
        file, name = (folder / place).resolve(), plain(tensor.name)
        if place.is_absolute() or not file.is_relative_to(folder) or not file.is_file():
            raise file_error(
                path,
                f"the numbers of {name} are in {plain(str(place))!r}, expected a file in the "
                "folder of the model. Fetch all its files again.",
            )
        with file_errors(path, f"the numbers of {name} cannot be read"):
            offset = int(stated.get("offset", 0))
            length = int(stated.get("length", file.stat().st_size - offset))
            if not 0 <= offset <= offset + length <= file.stat().st_size:
                raise ValueError(f"{plain(str(place))} is too short for them")
            _check_size(path, total := total + length)
            with file.open("rb") as numbers:
                numbers.seek(offset)
                tensor.raw_data = numbers.read(length)
        tensor.data_location = 0
        del tensor.external_data[:]


def with_header(
    content: bytes,
    origin: Origin,
    preprocessing: Preprocessing | None,
    entry: Mapping[str, Any] | None = None,
) -> bytes:
    """An ONNX file with what `eval` needs to know of it: no paths, and no options."""
    import onnx

    task = origin.task
    # A loss of the user's own is a path on this machine.
    public = task is not None and ":" not in (task.loss or "")
    history = [*origin.history, *([] if entry is None else [entry])]
    header = {
        "format": FORMAT,
        "bnfix": __version__,
        "preprocessing": preprocessing and dataclasses.asdict(preprocessing),
        **({"task": dataclasses.asdict(task)} if task is not None and public else {}),
        "history": [_used(one) for one in history],
    }
    proto = onnx.load_from_string(content)
    onnx.helper.set_model_props(proto, {_HEADER: json.dumps(finite(header))})
    return bytes(proto.SerializeToString())


def _used(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Of an entry of the history the command, and the examples that were fitted or chosen on."""
    data = entry.get("data")
    parts = data if isinstance(data, dict) else {}
    kept = {name: parts[name] for name in ("fit", "select") if name in parts}
    return {"command": entry.get("command"), "data": kept}
