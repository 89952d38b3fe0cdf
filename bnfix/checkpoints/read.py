"""Read files into plain objects without executing code from a file.

A pickle is first scanned with an inert stand-in for every name in it. The scan shows the names it
needs and the claimed sizes of its storages before torch's restricted loader sees it.
"""

from __future__ import annotations

import hashlib
import io
import json
import mmap
import pickle
import pickletools
import struct
import tarfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import torch
from safetensors import safe_open

from bnfix.core.errors import file_error, file_errors, plain, some

TORCH_SUFFIXES: Final = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
#: Usual names of the checkpoint in a folder, the safer format first.
_USUAL_NAMES: Final = tuple(
    name + end for name in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")
)
#: Longest text (header or index) that is parsed as JSON.
TEXT_LIMIT: Final = 64 * 2**20
#: The newest header format that this program reads, and the one that it writes.
FORMAT: Final = 1
_HEADER_DEPTH: Final = 64
#: Characters reserved for one more history entry and the layer settings.
_ROOM: Final = 8 * 2**20

_AGAIN: Final = " Download it again or save it again."
_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICKLE_MAGIC: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))

#: torch stores its archives uncompressed: a higher ratio than this is a zip bomb.
_INFLATION_LIMIT: Final = 100
_INFLATED_FLOOR: Final = 16 * 2**20

_TORCH_MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C  # first pickle of files before torch 1.6

_NUMPY_CORES: Final = ("numpy.core.multiarray", "numpy._core.multiarray")
#: Objects that checkpoints often hold next to their tensors. A stand-in is built in their place.
INERT_NAMES: Final = (
    "argparse.Namespace",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"{core}.{function}" for core in _NUMPY_CORES for function in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__),
)
#: Names that torch's restricted loader accepts on its own; used only in the error message.
_TORCH_NAMES: Final = tuple(
    "torch._utils._rebuild torch._tensor._rebuild_from_type_v2 torch.nn.parameter.Parameter "
    "torch.serialization._get_layout torch.storage. torch.cuda. collections.OrderedDict "
    "collections.Counter _codecs.encode builtins.bytearray builtins.complex builtins.set "
    "__builtin__.bytearray __builtin__.complex __builtin__.set".split()
)


class Inert:
    """A stand-in for an object in a file that is not a tensor: accepts anything, does nothing."""

    itemsize = 0
    held: Any = None  # the attributes from the file

    def __new__(cls, *_arguments: Any, **_options: Any) -> Inert:
        """Accept any arguments from the file."""
        return super().__new__(cls)

    def __call__(self, *_arguments: Any) -> Inert:
        """Accept any call or item, and drop it."""
        return self

    __setitem__ = append = extend = add = __call__

    def __setstate__(self, state: Any) -> None:
        """Keep attributes, since a person may want to read them."""
        self.held = state if isinstance(state, dict) else None


class _Survey(pickle.Unpickler):
    """Scan one pickle with stand-ins only, for its names and the claimed sizes of its storages."""

    def __init__(self, data: bytes) -> None:
        # The C unpickler allocates its memo up to the largest index, but picklers count from 0.
        for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
            if isinstance(argument, int) and opcode.name.endswith("PUT") and argument > count:
                raise pickle.UnpicklingError(f"memo index {argument} is out of order")
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.names: set[str] = set()
        self.storages: dict[str, int] = {}
        self.result: Any = None
        try:
            self.result = self.load()
        except pickle.UnpicklingError:
            # Stand-ins cannot replace every object; the loader stops earlier at a blocked name.
            if not self.blocked():
                raise

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name.endswith("Storage") and module_name.split(".")[0] == "torch":
            storage, kind = getattr(torch, global_name, None), Inert()
            kind.itemsize = getattr(storage, "dtype", torch.uint8).itemsize
            return kind
        self.names.add(f"{module_name}.{global_name}")
        return Inert

    def persistent_load(self, pid: Any) -> Any:
        if isinstance(pid, tuple) and len(pid) >= 5 and pid[0] in ("storage", b"storage"):
            kind, key, _, numel = pid[1:5]
            ok = isinstance(kind, Inert) and type(key) is str and type(numel) is int and numel >= 0
            if not ok:
                raise pickle.UnpicklingError("a storage is not described by plain values")
            self.storages[key] = max(self.storages.get(key, 0), numel * kind.itemsize)
        is_class = isinstance(pid, tuple) and len(pid) >= 2 and pid[0] in ("module", b"module")
        return Inert if is_class else Inert()

    # Names that the restricted loader refuses.
    def blocked(self) -> list[str]:
        return sorted(
            plain(name)
            for name in self.names
            if name not in INERT_NAMES
            and not name.startswith(_TORCH_NAMES)
            and not (name.startswith("torch.") and name.count(".") == 1)
        )


# Call torch's restricted loader; if it refuses, report the names that the survey found.
def _load(path: Path, survey: _Survey, *, mapped: bool) -> Any:
    try:
        with torch.serialization.safe_globals([(Inert, name) for name in INERT_NAMES]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        blocked = survey.blocked()
        if not blocked:
            raise
        raise file_error(
            path,
            f"not loaded, it holds pickled objects ({some(blocked)}) that would run code. Save "
            "only model.state_dict() in the training program, or give a .safetensors file.",
        ) from error


def read_zip(path: Path) -> Any:
    """The content of a torch.save archive, the format since torch 1.6."""
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        compressed = _check_entries(path, archive.infolist())
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            raise file_error(path, "is a zip archive, but not from torch.save.")
        root = roots[0]
        if root + "constants.pkl" in entries:
            raise file_error(
                path,
                "is a TorchScript archive, which holds code. If you trust it, load it with "
                "torch.jit.load and save its state_dict().",
            )
        survey = _Survey(_entry_bytes(path, archive, entries[root + "data.pkl"]))
    for key, claimed in survey.storages.items():
        entry = entries.get(f"{root}data/{key}")
        held = 0 if entry is None else entry.file_size
        if held < claimed:
            found = f"storage {plain(key)} claims {claimed} bytes and holds {held}"
            raise file_error(path, f"damaged, {found}.{_AGAIN}")
    return _load(path, survey, mapped=not compressed)


def read_in_place(path: Path) -> Any:
    """The content of an uncompressed archive; setting its tensors writes to the file."""
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return read_zip(path)


# Refuse impossible sizes before decompression; return whether any entry is compressed.
def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> bool:
    squeezed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    inflated = sum(entry.file_size for entry in squeezed)
    packed = sum(entry.compress_size for entry in squeezed)
    odd = (
        len({entry.filename for entry in entries}) != len(entries)
        or any(entry.file_size != entry.compress_size for entry in stored)
        or sum(entry.file_size for entry in stored) + packed > path.stat().st_size
        or any(entry.flag_bits & 1 for entry in entries)  # encrypted
    )
    if odd or inflated > max(_INFLATED_FLOOR, _INFLATION_LIMIT * packed):
        claim = "sizes or names that contradict the file" if odd else f"{inflated} bytes compressed"
        raise file_error(path, f"not loaded, its zip directory claims {claim}.{_AGAIN}")
    return bool(squeezed)


def _entry_bytes(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED:
        return archive.read(entry)
    # Not with zipfile: it requires checksums, and torch has an option not to write them.
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, io.SEEK_CUR)
        return file.read(entry.file_size)


def read_legacy(path: Path) -> Any:
    """The content of a torch.save file in the format before torch 1.6."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        parts = _pickles(content)
        first = _Survey(next(parts))
        if first.result != _TORCH_MAGIC_NUMBER:
            holds = f" (it holds {some(first.blocked())})" if first.blocked() else ""
            raise file_error(
                path,
                f"is a pickle, but not from torch.save{holds}. Save it with torch.save in the "
                "training program, or give a .safetensors file.",
            )
        next(parts), next(parts)  # protocol version and byte order
        survey = _Survey(next(parts))
        size = len(content)
    claimed = sum(survey.storages.values())
    if claimed > size:
        found = f"it claims {claimed} bytes of tensors in {size} bytes"
        raise file_error(path, f"damaged, {found}.{_AGAIN}")
    return _load(path, survey, mapped=False)


# Split off the pickles at the start of a file one by one, without building objects.
def _pickles(content: mmap.mmap) -> Iterator[bytes]:
    while True:
        start = content.tell()
        # An mmap reads like a file, but limits a claimed length to the available bytes.
        for _ in pickletools.genops(cast(IO[bytes], content)):
            pass
        yield content[start : content.tell()]


# --- files of any kind ---


def is_index(path: Path) -> bool:
    """Whether a file is an index of shards, by its name."""
    return path.name.endswith(".index.json")


def file_in_folder(path: Path) -> Path:
    """The checkpoint with a usual name in a folder, or the path itself."""
    try:
        return next((path / name for name in _USUAL_NAMES if (path / name).is_file()), path)
    except (OSError, ValueError):  # an impossible file name: the error is raised on opening
        return path


def require_file(path: Path) -> None:
    """Refuse a path that is not a regular, nonempty file."""
    with file_errors(path, "cannot be opened"):
        if path.is_dir():
            raise file_error(path, "is a folder, expected a checkpoint file.")
        if not path.exists():
            raise file_error(path, "no such file.")
        if not path.is_file():
            raise file_error(path, "is not a regular file.")
        if path.stat().st_size == 0:
            raise file_error(path, "is empty (0 bytes), expected a checkpoint.")


def read_file(path: Path) -> tuple[Any, str | None, list[str]]:
    """A file's content, the text of its ``bnfix`` header if it has one, and notes."""
    require_file(path)
    # Readers raise almost any exception on a damaged or hostile file.
    problem = "cannot be read, it is damaged or not a checkpoint"
    if path.suffix in (".onnx", ".pt2"):
        raise file_error(
            path,
            "is an exported network: its norm layers are folded into other layers, so there is "
            "nothing to repair. Give its original checkpoint, then export again; eval takes ONNX "
            "files.",
        )
    with file_errors(path, problem, _AGAIN, kinds=(Exception,)):
        if is_index(path):
            return _read_index(path)
        kind = _kind_of(path)
        if kind == "safetensors" or path.suffix == ".safetensors":
            with safe_open(path, framework="pt", device="cpu") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}
                return tensors, (file.metadata() or {}).get("bnfix"), []
        if kind:
            # Warnings about escapes in a pickle or typed storages do not help a user.
            with warnings.catch_warnings(action="ignore"):
                return (read_zip if kind == "zip" else read_legacy)(path), None, []
        if path.suffix == ".tar" and tarfile.is_tarfile(path):
            raise file_error(
                path,
                "is a real tar archive, and the restricted loader cannot read it. "
                "Unpack it, or load it with the program that wrote it and save its state_dict.",
            )
    expected = "torch" if path.suffix in TORCH_SUFFIXES else "torch or safetensors"
    raise file_error(
        path,
        f"is not a {expected} file by its first bytes. "
        f"Give a .safetensors file, or one of {', '.join(TORCH_SUFFIXES)} from torch.save.",
    )


# The kind by the first bytes, since suffixes are unreliable; empty if unknown.
def _kind_of(path: Path) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
    if start.startswith(_ZIP_MAGIC):
        return "zip"
    if start.startswith(_PICKLE_MAGIC):
        return "pickle"
    if len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") <= size - 8:
        return "safetensors"
    return ""


# --- shards ---


def _read_index(path: Path) -> tuple[dict[str, torch.Tensor], None, list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    places = read_weight_map(path)
    shards = sorted(set(places.values()))
    for shard in shards:
        where = f"its shard {plain(shard)}"
        if not (path.parent / shard).exists():
            raise file_error(path, f"{where}: no such file. Download all shards again.")
        found = read_file(path.parent / shard)[0]
        if not isinstance(found, dict):
            raise file_error(path, f"{where} holds no state dict.")
        tensors |= {name: tensor for name, tensor in dict.items(found) if places.get(name) == shard}
    lacking = [plain(name) for name in places if name not in tensors]
    if lacking:
        raise file_error(path, f"its shards lack {some(lacking)}. Download all shards again.")
    return tensors, None, [f"{len(shards)} shards"]


def read_weight_map(path: Path) -> dict[str, str]:
    """The shard of each tensor; all shards are in the folder of the index."""
    if path.stat().st_size > TEXT_LIMIT:
        raise file_error(path, f"is larger than {TEXT_LIMIT} bytes, expected an index.")
    with file_errors(path, "is not an index", kinds=(Exception,)):
        places = json.loads(path.read_bytes())["weight_map"]
        ok = all(isinstance(shard, str) for shard in places.values())
    if not ok or not places:
        raise file_error(path, "is not an index, its weight_map names no files.")
    kinds = (".safetensors",) if ".safetensors" in path.name else (".safetensors", ".bin")
    # A name with a folder could refer to any file on the machine.
    foreign = [s for s in places.values() if Path(s).name != s or not s.endswith(kinds)]
    if foreign:
        known = f"expected a {' or '.join(kinds)} file next to the index"
        raise file_error(path, f"names {plain(foreign[0])!r}, {known}.")
    return dict(places)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file; for a sharded file, of the index, then of its shards by name."""
    digest = hashlib.sha256()
    with file_errors(path, "cannot be read"):
        shards = sorted(set(read_weight_map(path).values())) if is_index(path) else []
        for part in (path, *(path.parent / shard for shard in shards)):
            with part.open("rb") as file:
                while block := file.read(2**20):
                    digest.update(block)
    return digest.hexdigest()


# --- the header: the text under `bnfix` in the metadata ---


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_header(text: str, path: Path) -> dict[str, Any]:
    """The JSON object in a header's text; its format must be known."""
    if len(text) > TEXT_LIMIT:
        found = f"{len(text)} characters, more than {TEXT_LIMIT}"
        raise file_error(path, f"its bnfix header has {found}.")
    with file_errors(path, "its bnfix header is not JSON", kinds=(ValueError, RecursionError)):
        header = json.loads(text, parse_constant=_no_constant)
    version = header.get("format") if isinstance(header, dict) else None
    if not isinstance(header, dict) or type(version) is not int or version < 1:
        raise file_error(path, "its bnfix header is not an object with an integer `format`.")
    if version > FORMAT:
        found = f"has header format {version}, expected at most {FORMAT}"
        raise file_error(path, f"{found}: a newer bnfix wrote it. Upgrade bnfix.")
    level: list[Any] = [header]
    for _ in range(_HEADER_DEPTH):  # checked by level: later code can then use recursion safely
        parts = (part.values() if isinstance(part, dict) else part for part in level)
        level = [item for part in parts for item in part if isinstance(item, dict | list)]
    if level:
        raise file_error(path, f"its bnfix header is nested more than {_HEADER_DEPTH} deep.")
    return header


def check_room(header: Mapping[str, Any] | None, path: Path) -> None:
    """Refuse, before any work, a file whose history leaves no room for one more entry."""
    length = len(json.dumps((header or {}).get("history")))
    if length > TEXT_LIMIT - _ROOM:
        raise file_error(
            path,
            f"its history has {length:,} characters, expected at most {TEXT_LIMIT - _ROOM:,} to "
            "leave room for one more entry. Write only its tensors (safetensors.torch.load_file "
            "and save_file), and give --model.",
        )


def finite(value: Any) -> Any:
    """Plain JSON values, with null for numbers that JSON cannot represent."""
    return json.loads(json.dumps(value), parse_constant=lambda _: None)
