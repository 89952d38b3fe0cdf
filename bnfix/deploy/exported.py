"""Read and check exported files, and run them like checkpoints."""

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

#: Suffixes of files that hold a whole network, not only its tensors.
EXPORTED: Final = (".onnx", ".pt2")
#: The key of bnfix's metadata in an ONNX file.
_HEADER: Final = "bnfix"
#: Largest fixed batch size that is accepted.
_MOST_EXAMPLES: Final = 4096
#: Input types by their numbers in ONNX.
_TYPES: Final = {1: torch.float32, 10: torch.float16, 11: torch.float64}
_EXTERNAL: Final = 1  # data_location of a tensor whose numbers are in another file


class ExportedNet(nn.Module):
    """A network behind a runner on the CPU: it has outputs, but no visible layers."""

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
        self._shape, self._dtype = tuple(shape), dtype  # of the input; None means any size
        if len(self._shape) > 2 and self._shape[1] is not None:
            self.__dict__[CHANNELS] = self._shape[1]

    @property
    def batch_size(self) -> int | None:
        """The fixed batch size, or ``None`` for any."""
        return self._shape[0]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        """All outputs of a batch, by name if there are several."""
        wanted, given = self._shape[1:], x.shape[1:]
        fits = len(wanted) == len(given)
        if not fits or any(a not in (None, b) for a, b in zip(wanted, given, strict=True)):
            takes = "x".join("any" if size is None else str(size) for size in wanted)
            raise ModelError(
                f"{plain(self.name)}: inputs of {'x'.join(map(str, given))}, expected {takes}. "
                "Give --resize and --crop, or other data."
            )
        size = self.batch_size or len(x)
        parts = [self._whole(part, size) for part in torch.split(x.to("cpu", self._dtype), size)]
        found = [torch.cat(tensors).to(x.device) for tensors in zip(*parts, strict=True)]
        return found[0] if len(found) == 1 else dict(zip(self._outputs, found, strict=True))

    def _whole(self, x: Tensor, size: int) -> list[Tensor]:
        """The outputs of a batch, which is padded to the network's batch size."""
        last = x[-1:].expand(size - len(x), *x.shape[1:])
        return [y[: len(x)] for y in self._run(torch.cat([x, last]).contiguous())]


def is_exported(path: str | Path) -> bool:
    """Whether a file holds a whole network, by its name."""
    return Path(path).suffix in EXPORTED


def load_exported(path: str | Path, *, trust_code: bool = False) -> Loaded:
    """Read an exported file into a network that runs like a loaded checkpoint.

    In an ONNX file, only ONNX's own operators are executed. If bnfix wrote the file, its header
    holds the preprocessing, the task and the examples that it was fitted on. A ``.pt2`` file can
    run code while torch reads it, so it is opened only on request.
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
        with file_errors(path, "ONNX Runtime does not accept it", kinds=(ModelError,)):
            net = exported_net(path.name, proto)
        runtime = f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"
    notes = [f"run by {runtime} on the CPU, in the file's own precision"]
    if net.batch_size is not None:
        notes.append(
            f"takes only batches of {net.batch_size}; the last batch is padded with copies of its "
            "last example, and their outputs are dropped"
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
    # A model named in the header would never be built, so it must not be looked up either.
    origin = dataclasses.replace(stated_origin(checkpoint), spec=None, arguments={})
    return Loaded(net.eval(), checkpoint, origin)


def _program(path: Path, *, trusted: bool) -> ExportedNet:
    """The network in a ``.pt2`` file."""
    if not trusted:
        raise file_error(
            path,
            "is not opened: torch unpickles such a file and evaluates expressions in it, so the "
            "file can run code. If you trust it, give --trust-code; otherwise export with --to "
            "onnx, or give the checkpoint.",
        )
    # torch raises any kind of exception on a damaged file.
    with file_errors(path, "is damaged or not a .pt2 file", kinds=(Exception,)), quiet():
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
    """The network in a checked ONNX model."""
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
    """The network in an ONNX file that this program wrote."""
    import onnx

    return exported_net(name, onnx.load_from_string(content))


def read_onnx(path: Path) -> Any:
    """An ONNX model with all its numbers; operators other than ONNX's own are refused."""
    import onnx

    _check_size(path, path.stat().st_size)
    # The parser raises its own kind of error, neither an OSError nor a ValueError.
    with file_errors(path, "is damaged or not an ONNX file", kinds=(Exception,)):
        proto = onnx.load(path, load_external_data=False)
    if not proto.graph.node:
        raise file_error(path, "is damaged or not an ONNX file (it has no operators).")
    parts = list(_messages(proto))
    nodes = [part for part in parts if isinstance(part, onnx.NodeProto)]
    foreign = sorted({plain(n.domain) for n in nodes if n.domain not in ("", "ai.onnx")})
    if foreign or proto.functions:
        raise file_error(
            path,
            f"needs other operators than ONNX's own ({some(foreign) or 'local functions'}), and "
            "bnfix does not run them. Export it with standard operators.",
        )
    _take_in_(path, [part for part in parts if isinstance(part, onnx.TensorProto)])
    return proto


def _check_size(path: Path, size: int) -> None:
    if size > ONNX_LIMIT:
        raise file_error(path, f"has {size:,} bytes, expected at most {ONNX_LIMIT:,} in all.")


def _messages(message: Any) -> Iterator[Any]:
    """A protobuf message and all messages inside it; the parser has limited the depth."""
    yield message
    for field, value in message.ListFields():
        if field.message_type is not None:
            for part in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(part)


def _take_in_(path: Path, tensors: Iterable[Any]) -> None:
    """Read the numbers stored in other files of the folder into the model."""
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
                "folder of the model. Download all its files again.",
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
    """An ONNX file with the metadata that `eval` needs, without paths and options."""
    import onnx

    task = origin.task
    # The user's own loss is a path on this machine.
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
    """A history entry's command, and its examples for fitting and choosing."""
    data = entry.get("data")
    parts = data if isinstance(data, dict) else {}
    kept = {name: parts[name] for name in ("fit", "select") if name in parts}
    return {"command": entry.get("command"), "data": kept}
