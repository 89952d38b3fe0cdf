"""An ONNX file in 8 bits: ONNX Runtime's static quantization, calibrated on batches."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from bnfix.core.errors import ModelError
from bnfix.models.graph import quiet, root_line


class _Reader:
    """Batches as ONNX Runtime's calibration asks for them."""

    def __init__(self, name: str, batches: Iterable[Tensor]) -> None:
        self._name, self._batches = name, iter(batches)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.get_next, None)

    def get_next(self) -> dict[str, Any] | None:
        """The next batch by the input's name, and ``None`` after the last."""
        x = next(self._batches, None)
        return None if x is None else {self._name: x.numpy()}


def in_8_bits(content: bytes, batches: Iterable[Tensor]) -> tuple[bytes, dict[str, int]]:
    """Quantize an ONNX file that this program has written; its operators, how many of each kind.

    Weights get one scale a channel, symmetric, in 7 bits of the 8; activations one scale and zero
    point a tensor, by the largest and smallest values on the batches. Both are in the graph as
    pairs of QuantizeLinear and DequantizeLinear, which are ONNX's own.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    proto = onnx.load_from_string(content)
    reader: Any = _Reader(proto.graph.input[0].name, batches)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "int8.onnx"
        try:
            with quiet():
                # Sums of two products of full 8 bits overflow 16 bits on processors without VNNI:
                # MobileNetV2 lost 4 points so, and 0 with weights of 7 bits.
                quantize_static(
                    proto, path, reader, quant_format=QuantFormat.QDQ, per_channel=True,
                    reduce_range=True, activation_type=QuantType.QUInt8,
                    weight_type=QuantType.QInt8,
                )  # fmt: skip
        except Exception as error:
            raise ModelError(
                f"export: ONNX Runtime cannot quantize the model ({root_line(error)}). Use --to "
                "onnx."
            ) from error
        found = onnx.load(path)
    return bytes(found.SerializeToString()), dict(
        sorted(Counter(node.op_type for node in found.graph.node).items())
    )
