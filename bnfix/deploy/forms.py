"""Export a model (ONNX, torch.export, folded, plain files) and compare it with its original."""

from __future__ import annotations

import copy
import importlib.metadata
import importlib.util
import io
import json
import math
import re
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import finite
from bnfix.checkpoints.save import metadata_of, stock_tensors
from bnfix.core import __version__, guards
from bnfix.core.errors import ConfigError, ModelError, model_error, model_errors, some
from bnfix.core.runtime import outputs_by_name
from bnfix.deploy import plain
from bnfix.deploy.fold import Folding, optimize_
from bnfix.models.build import build_model, builder_arguments, from_file_allowed
from bnfix.models.graph import export_program, quiet
from bnfix.norm.layer import generalized_norms

#: Maps inputs to outputs, in the order of `outputs_of`.
Runner = Callable[[Tensor], list[Tensor]]

#: Batch sizes for the comparison: one, and an odd size.
BATCH_SIZES = (1, 7)
#: Smaller differences of one layer, relative to its output, are float32 rounding.
_ROUNDING = 1e-5
_ROUNDS = 5
_LONGEST = 3.0  # seconds of timing per batch size
#: ONNX operator sets that torch writes directly or by conversion.
OPSETS: Final = range(18, 24)
ONNX_LIMIT: Final = 2**31 - 2**20  # bytes, protobuf's limit
_ONNX_PACKAGES: Final = ("onnx", "onnxscript", "onnxruntime")
#: Placeholder in a generated file until the name of the weights file is known.
_NAME: Final = "@weights@"


@dataclass
class Making:
    """The export of a model; `run` works on a copy of the model."""

    loaded: Loaded
    to: str
    opset: int
    example: Tensor  # two inputs
    names: list[str]  # of the outputs
    free_size: bool = False  # leave height and width free
    notes: list[str] = field(default_factory=list)
    operators: dict[str, int] = field(default_factory=dict)  # ONNX operators, counted by kind
    folding: Folding | None = None

    def run(self) -> tuple[bytes, bytes | None, Runner]:
        """Export: the main file, the second file if there is one, and a runner."""
        self.net = copy.deepcopy(self.loaded.model)
        if self.to in ("plain", "folded"):
            text, weights = _python(self.loaded), self._weights()
            runner = torch_runner(_run_loader(text, weights, self.loaded))
            return (*((text, weights) if self.to == "plain" else (weights, text)), runner)
        try:
            self.folding = optimize_(self.net, self.example)
        except ModelError as error:
            self.notes.append(f"nothing was folded: {error}")
        for layer in [layer for _, layer in generalized_norms(self.net) if layer.live]:
            # The plain layer consists of standard operators only.
            new = plain.ExampleNorm(
                layer,
                layer.example_weight,
                layer.channel_groups,
                layer.eps,
                0.0 if layer.batch_weight is None else layer.batch_weight,
                layer.batch_estimator == "median",
                layer.gates,
            )
            guards.exchange_(layer, new.eval())
        content = self._write(self.net, self.names)
        return content, None, self._runner(content)

    def suspect(self, x: Tensor, atol: float) -> str:
        """The first layer whose output differs from the model's on two inputs; "" if all agree.

        The model is exported again with the outputs of all layers, so one run finds the layer.
        """
        if self.to not in ("onnx", "pt2"):
            return "one of the folded layers" if self.to == "folded" else "none, only the loader"
        with guards.hooks() as handles, torch.no_grad():
            probed = _Probed(self.net, handles)
            wanted = probed(x)
            try:
                found = self._runner(self._write(probed, None))(x)
            except ModelError:
                return "not found: the model cannot be exported with its layers' outputs"
        if len(wanted) != len(found):
            return "not found: the exported model calls other layers"
        for name, a, b in zip(probed.names, wanted, found, strict=True):
            scale = max(1.0, _largest(a)) if a.numel() else 1.0
            gap = float(_gaps(a, b).max()) if a.shape == b.shape and a.numel() else math.inf
            if gap > max(atol, _ROUNDING) * scale:
                kind = type(self.net.get_submodule(name)).__name__
                return f"{name} ({kind}), the first with a different output (by {gap:.2g})"
        return ""

    def _write(self, net: nn.Module, names: list[str] | None) -> bytes:
        # Zeros, not the user's images: torch.export stores its example.
        program = export_program(net, torch.zeros_like(self.example), free_size=self.free_size)
        if self.to == "pt2":
            return _pt2_bytes(program)
        content, self.operators = _onnx_bytes(program, names, self.opset)
        return content

    def _runner(self, content: bytes) -> Runner:
        return pt2_runner(content) if self.to == "pt2" else onnx_runner(content)

    def _weights(self) -> bytes:
        """The weights of the plain or folded model."""
        if self.to == "plain":
            return _saved(stock_tensors(self.net), "bnfix", metadata_of(self.net))
        self.folding = folding = optimize_(self.net, self.example)
        if not folding.folded:
            reasons = [f"{name} {reason}" for name, reason in folding.left.items()]
            why = some(reasons) or "there are no norms"
            raise ModelError(f"--to folded: no norm layer can be folded: {why}. Use --to plain.")
        tensors, state = stock_tensors(self.net), self.net.state_dict()
        layers = [fold.layer for fold in folding.folded]
        # Folded weights of a half-precision checkpoint stay float32: a second rounding would add an
        # error of a thousandth.
        for name in (f"{layer}.{part}" for layer in layers for part in ("weight", "bias")):
            tensors[name] = state[name].detach().cpu()
        origin = self.loaded.origin
        entry = {
            "bnfix": __version__,
            "model": {"spec": origin.spec, "arguments": dict(origin.arguments)},
            "norms": [fold.norm for fold in folding.folded],
            "layers": layers,
        }
        return _saved(tensors, "bnfix_folded", entry)


def require_onnx(where: str = "--to onnx", packages: Sequence[str] = _ONNX_PACKAGES) -> None:
    """Check that the packages that write, check and run ONNX are installed."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f'{where}: {", ".join(missing)} not installed. Run: pip install "bnfix[onnx]"',
            name="to",
        )


def versions(to: str) -> dict[str, str]:
    """The versions of the packages used for an export format."""
    used = _ONNX_PACKAGES if to == "onnx" else ()
    return {name: importlib.metadata.version(name) for name in used}


def _pt2_bytes(program: torch.export.ExportedProgram) -> bytes:
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            # The paths on the exporting machine are private.
            node.meta.pop("stack_trace", None)
    buffer = io.BytesIO()
    with model_errors("export", "torch.export cannot save the model"), quiet():
        torch.export.save(program, buffer)
    return buffer.getvalue()


def pt2_runner(content: bytes) -> Runner:
    """Load a ``.pt2`` file that this program wrote."""
    with quiet():
        return torch_runner(torch.export.load(io.BytesIO(content)).module())


def _onnx_bytes(
    program: torch.export.ExportedProgram, names: list[str] | None, opset: int
) -> tuple[bytes, dict[str, int]]:
    """An exported program as ONNX, and its number of operators by kind."""
    if sum(t.numel() * t.element_size() for t in program.state_dict.values()) > ONNX_LIMIT:
        raise ModelError("export: the model is over 2 GB, too large for one ONNX file.")
    if names is not None:
        names = [f"{name}_out" if name == "input" else name for name in names]
    problem = f"the model cannot be translated to ONNX opset {opset}"
    with model_errors("export", problem, "Try another --opset, or --to pt2."), quiet():
        written: Any = torch.onnx.export(
            program, (), dynamo=True, opset_version=opset, verbose=False,
            input_names=["input"], output_names=names,
        )  # fmt: skip
        proto = written.model_proto
    domains = sorted({n.domain for n in proto.graph.node} - {"", "ai.onnx"})
    if domains or proto.functions:
        raise ModelError(
            f"export: the model needs other operators than ONNX's own ({', '.join(domains)}). Use "
            "--to pt2."
        )
    graph = proto.graph
    for part in (proto, graph, *graph.node, *graph.value_info, *graph.input, *graph.output):
        # Paths and source lines on the exporting machine are private.
        del part.metadata_props[:]
    found = {i.version for i in proto.opset_import if i.domain in ("", "ai.onnx")}
    if found != {opset}:
        only = max(found, default=0)
        raise model_error("export", f"{problem}, only to {only}. Give that as --opset.")
    return _with_operators(proto)


def _with_operators(proto: Any) -> tuple[bytes, dict[str, int]]:
    operators = Counter(str(node.op_type) for node in proto.graph.node)
    return bytes(proto.SerializeToString()), dict(sorted(operators.items()))


def in_8_bits(content: bytes, batches: Iterable[Tensor]) -> tuple[bytes, dict[str, int]]:
    """Quantize an ONNX file that this program wrote; also return its number of operators by kind.

    Weights get one symmetric scale per channel, in 7 of the 8 bits. Activations get one scale and
    zero point per tensor, from the largest and smallest values on the batches. The graph holds both
    as pairs of ONNX's own QuantizeLinear and DequantizeLinear.
    """
    import onnx
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_static,
    )

    proto = onnx.load_from_string(content)
    inputs = ({proto.graph.input[0].name: x.numpy()} for x in batches)

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def get_next(self) -> dict[str, Any] | None:
            return next(inputs, None)

    problem = "ONNX Runtime cannot quantize the model"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        # Sums of two products of full 8 bits overflow 16 bits on processors without VNNI: for this
        # reason MobileNetV2 lost 4 points, and 0 with weights of 7 bits.
        with model_errors("export", problem, "Use --to onnx."), quiet():
            quantize_static(
                proto, path, Reader(), quant_format=QuantFormat.QDQ, per_channel=True,
                reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
        return _with_operators(onnx.load(path))


def onnx_runner(content: bytes, where: str = "export") -> Runner:
    """Load a checked ``.onnx`` file with all its numbers into ONNX Runtime on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4
    # Threads that spin while they wait would take cores from other processes, including ours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with model_errors(where, "ONNX Runtime does not accept it"):
        session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def run(x: Tensor) -> list[Tensor]:
        size = "x".join(map(str, x.shape))
        with model_errors(where, f"ONNX Runtime cannot run it on {size}"):
            return [torch.from_numpy(found) for found in session.run(None, {name: x.numpy()})]

    return run


def named(text: bytes, weights: Path) -> bytes:
    """Fill the name of the weights file into a generated Python file."""
    return text.replace(repr(_NAME).encode(), json.dumps(weights.name).encode())


def _run_loader(text: bytes, weights: bytes, loaded: Loaded) -> nn.Module:
    """Load weights into a stock model with a generated Python file, like a user."""
    origin = loaded.origin
    stock = build_model(origin.spec or "", origin.arguments, loaded.checkpoint.tensors)
    names: dict[str, Any] = {"__name__": "bnfix_plain", "__file__": "plain.py"}
    exec(compile(text, "plain.py", "exec"), names)  # our own text, just generated
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        path.write_bytes(weights)
        return names["load"](stock, path)  # type: ignore[no-any-return]


def _python(loaded: Loaded) -> bytes:
    """The source of the plain layer, with this model's builder filled in."""
    source = Path(plain.__file__).read_text(encoding="utf-8")
    spec, arguments = loaded.origin.spec, dict(loaded.origin.arguments)
    model: tuple[str, str, dict[str, Any]] | None = None
    if spec is not None and from_file_allowed(spec):
        library, _, name = spec.partition(":")
        model = (library, name, builder_arguments(spec, arguments, loaded.checkpoint.tensors))
    source = re.sub(r'(?m)^WEIGHTS = ""$', lambda _: f"WEIGHTS = {_NAME!r}", source)
    source = re.sub(r"(?m)^(MODEL: .*) = None$", lambda found: f"{found[1]} = {model!r}", source)
    return f"# Written by bnfix {__version__}; needs torch only.\n{source}".encode()


def _saved(tensors: dict[str, Tensor], key: str, metadata: dict[str, Any]) -> bytes:
    ready = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    return save(ready, metadata={key: json.dumps(finite(metadata))})


@dataclass(frozen=True)
class Agreement:
    """The agreement of two models on the same inputs.

    Differences are |output - output of the first model|. The relative difference is divided by that
    output's largest value if it is above 1. A difference is infinite if only one output is finite.
    """

    n_examples: int
    batch_sizes: tuple[int, ...]  # all inputs were run at each size
    relative_difference: float  # the largest over all outputs
    max_difference: float  # the same difference, not divided
    worst_output: str
    worst_example: int  # its position among the inputs
    largest_output: float  # largest finite value of the worst output in the first model
    top1_agreement: float | None  # None unless one output (N, C) predicts classes
    seconds: Mapping[int, tuple[float, float]]  # median per batch by batch size: first, second


def outputs_of(output: Any) -> dict[str, Tensor]:
    """All tensors in a model's output, by name: ``output``, or dotted keys and positions."""
    return {name or "output": tensor for name, tensor in outputs_by_name(output).items()}


def names_of(model: nn.Module, x: Tensor) -> list[str]:
    """The names of a model's outputs, in order."""
    with guards.inference(model):
        found = outputs_of(model(x))
    if not found:
        raise ModelError("export: the model's output has no tensors by name or position.")
    return list(found)


def torch_runner(model: nn.Module) -> Runner:
    """A runner for a model in evaluation mode."""

    def run(x: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return list(outputs_of(model(x)).values())

    return run


def agreement(
    reference: Runner,
    other: Runner,
    inputs: Tensor,
    names: Sequence[str],
    *,
    timed: bool = True,
    classes: bool = True,
    batch_sizes: tuple[int, ...] = BATCH_SIZES,
) -> Agreement:
    """Run two models on all inputs at several batch sizes and compare all their outputs."""
    n = len(inputs)
    sizes = tuple(sorted({min(size, n) for size in batch_sizes}))
    worst, largest = dict.fromkeys(names, (0.0, 0)), dict.fromkeys(names, 0.0)
    n_same, n_logits = 0, 0
    for size in sizes:
        for start in range(0, n, size):
            x = inputs[start : start + size].contiguous()
            wanted, found = reference(x), other(x)
            _check_shapes(wanted, found, names)
            for name, a, b in zip(names, wanted, found, strict=True):
                if not a.numel():
                    continue
                gaps = _gaps(a, b)
                largest[name] = max(largest[name], _largest(a))
                if float(gaps.max()) > worst[name][0]:
                    worst[name] = float(gaps.max()), start + int(gaps.argmax())
            logits = [i for i, a in enumerate(wanted) if a.ndim == 2 and a.shape[1] > 1]
            # Two outputs of this shape could include an auxiliary head or a second task.
            if classes and len(logits) == 1:
                n_same += int((wanted[logits[0]].argmax(1) == found[logits[0]].argmax(1)).sum())
                n_logits += len(wanted[logits[0]])
    relative = {name: worst[name][0] / max(1.0, largest[name]) for name in names}
    place = max(names, key=lambda name: relative[name])
    return Agreement(
        n_examples=n,
        batch_sizes=sizes,
        relative_difference=relative[place],
        max_difference=worst[place][0],
        worst_output=place,
        worst_example=worst[place][1],
        largest_output=largest[place],
        top1_agreement=n_same / n_logits if n_logits else None,
        seconds={s: _times(reference, other, inputs[:s]) for s in sizes} if timed else {},
    )


class _Probed(nn.Module):
    """A model that returns the outputs of all its layers, in call order."""

    def __init__(self, model: nn.Module, handles: list[RemovableHandle]) -> None:
        super().__init__()
        self.model = model
        self.names: list[str] = []
        # In a namespace: torch.export inspects and compares containers among a model's attributes.
        self._found = SimpleNamespace(outputs=[])
        for name, module in model.named_modules():
            if name and not any(True for _ in module.children()):
                handles.append(module.register_forward_hook(partial(self._keep, name)))

    def _keep(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point():
            self.names.append(name)
            self._found.outputs.append(output.clone())

    def forward(self, x: Tensor) -> list[Tensor]:
        self.names.clear()
        self._found.outputs.clear()
        self.model(x)
        return list(self._found.outputs)


def _check_shapes(wanted: list[Tensor], found: list[Tensor], names: Sequence[str]) -> None:
    shapes = [[tuple(t.shape) for t in run] for run in (wanted, found)]
    if shapes[0] != shapes[1] or len(wanted) != len(names):
        raise ModelError(
            f"export: the exported model's outputs have shapes {shapes[1]}, expected {shapes[0]}."
        )


def _largest(a: Tensor) -> float:
    return float(a.double().abs().nan_to_num(0.0, 0.0, 0.0).max())


def _gaps(a: Tensor, b: Tensor) -> Tensor:
    """The largest difference of each example; infinite if only one value is finite."""
    a, b = a.double(), b.double()
    gaps = torch.where((a == b) | (a.isnan() & b.isnan()), 0.0, (a - b).abs())
    gaps = gaps.nan_to_num(nan=math.inf, posinf=math.inf)
    return gaps.flatten(1).max(1).values if gaps.ndim > 1 else gaps.reshape(-1)


def _times(reference: Runner, other: Runner, x: Tensor) -> tuple[float, float]:
    """The median seconds of both runners on one batch, in alternating runs."""
    x = x.contiguous()
    taken: tuple[list[float], list[float]] = ([], [])
    begun = time.perf_counter()
    for _ in range(_ROUNDS):
        for runner, times in zip((reference, other), taken, strict=True):
            started = time.perf_counter()
            runner(x)
            times.append(time.perf_counter() - started)
        if time.perf_counter() - begun > _LONGEST:
            break
    return statistics.median(taken[0]), statistics.median(taken[1])
