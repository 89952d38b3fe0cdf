"""Tensors to the bytes of one ``.safetensors``, a tensor at a time.

The library's own writer gathers all bytes before it writes any, so that a file takes twice its size
in memory. The layout is the same to the byte: wide types first, then by name, the text padded to 8.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch

#: Names of the types in the format, in the order in which its tensors lie.
_TYPES: Final = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ORDER: Final = {dtype: place for place, dtype in enumerate(_TYPES)}


def write_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write tensors to a file; those that share memory are written under each name."""
    unknown = [f"{name} ({t.dtype})" for name, t in tensors.items() if t.dtype not in _TYPES]
    if unknown:
        raise TypeError(f"no type of the format: {', '.join(unknown[:5])}")
    # By the bytes of the names: that is how the library sorts.
    ordered = sorted(tensors.items(), key=lambda item: (_ORDER[item[1].dtype], item[0].encode()))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name, tensor in ordered:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _TYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            if tensor.numel():
                plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
                file.write(plain.reshape(-1).view(torch.uint8).numpy().data)
