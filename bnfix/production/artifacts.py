"""Models in forms that run elsewhere, ONNX and torch.export, as bytes; and how they run here."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.errors import ConfigError, ModelError, one_line

#: Inputs to outputs, in the order of `outputs_of`.
Runner = Callable[[Tensor], list[Tensor]]

#: Opsets that torch writes by itself or converts to.
OPSETS = range(18, 24)
_ONNX_LIMIT = 2**31 - 2**20


def require_onnx() -> None:
    """Check that what writes, checks and runs ONNX is installed."""
    missing = []
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise ConfigError(
            f'--to onnx: {", ".join(missing)} not installed. Run: pip install "bnfix[onnx]"',
            name="to",
        )


def outputs_of(output: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of a model's output by name, in order."""
    if isinstance(output, Tensor):
        return {name or "output": output}
    items: list[tuple[Any, Any]] = []
    if isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, list | tuple):
        items = list(enumerate(output))
    found: dict[str, Tensor] = {}
    for key, value in items:
        found |= outputs_of(value, f"{name}.{key}" if name else str(key))
    return found


def versions(to: str) -> dict[str, str]:
    """Versions of the packages behind a form."""
    used = ("onnx", "onnxscript", "onnxruntime") if to == "onnx" else ()
    return {name: importlib.metadata.version(name) for name in used}


def torch_runner(model: nn.Module) -> Runner:
    """Run a model as it is."""

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(outputs_of(model(x)).values())

    return run


def pt2_bytes(program: torch.export.ExportedProgram) -> bytes:
    """Write an exported program."""
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            # Paths of the machine that exported are nobody else's business.
            node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.export.save(program, buffer)
    except Exception as error:
        raise ModelError(
            f"export: torch.export cannot save the model ({root_line(error)})."
        ) from error
    return buffer.getvalue()


def pt2_runner(content: bytes) -> Runner:
    """Load an exported program and run it."""
    with quiet():
        module = torch.export.load(io.BytesIO(content)).module()
    return torch_runner(module)


def onnx_bytes(
    program: torch.export.ExportedProgram, names: list[str] | None, opset: int
) -> tuple[bytes, dict[str, int]]:
    """Translate an exported program to ONNX."""
    if sum(t.numel() * t.element_size() for t in program.state_dict.values()) > _ONNX_LIMIT:
        raise ModelError("export: the model is over 2 GB, which one ONNX file cannot hold.")
    if names is not None:
        names = [f"{name}_out" if name == "input" else name for name in names]
    try:
        with quiet():
            written: Any = torch.onnx.export(
                program, (), dynamo=True, opset_version=opset, verbose=False,
                input_names=["input"], output_names=names,
            )  # fmt: skip
            proto = written.model_proto
    except Exception as error:
        raise ModelError(
            f"export: the model cannot be translated to ONNX opset {opset} ({root_line(error)}). "
            "Try another --opset, or --to pt2."
        ) from error
    domains = sorted({n.domain for n in proto.graph.node} - {"", "ai.onnx"})
    if domains or proto.functions:
        raise ModelError(
            f"export: the model needs operators outside of ONNX's own ({', '.join(domains)}). Use "
            "--to pt2."
        )
    for part in (proto.graph, *proto.graph.node, *proto.graph.value_info, *proto.graph.input,
                 *proto.graph.output):  # fmt: skip
        # Paths and sources of the machine that exported are nobody else's business.
        del part.metadata_props[:]
    del proto.metadata_props[:]
    found = {i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")}
    if found != {opset}:
        raise ModelError(
            f"export: the model cannot be translated to ONNX opset {opset}, only to "
            f"{max(found, default=0)}. Give that as --opset."
        )
    operators = Counter(str(node.op_type) for node in proto.graph.node)
    return bytes(proto.SerializeToString()), dict(sorted(operators.items()))


def onnx_runner(content: bytes) -> Runner:
    """Load an ONNX model into ONNX Runtime on the CPU, with as many threads as torch has."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Threads that spin while they wait would take the cores from whoever runs beside, us included.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ModelError(f"export: ONNX Runtime does not take it ({root_line(error)}).") from error
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        try:
            return [torch.from_numpy(found) for found in session.run(None, {name: x.numpy()})]
        except Exception as error:
            size = "x".join(map(str, x.shape))
            raise ModelError(
                f"export: ONNX Runtime cannot run it on {size} ({root_line(error)})."
            ) from error

    return run


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep writers from printing, warning and logging: what matters of it is checked, or raised."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def root_line(error: BaseException) -> str:
    """The innermost reason of a library's error in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).rstrip(".")
