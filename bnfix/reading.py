"""Bytes on disk to plain objects, with nothing executed because a file says so.

A pickle is first walked with every name in it replaced by an inert stand-in: that shows which names
it would need and how large it claims its storages to be, before torch's restricted loader sees it.
"""

from __future__ import annotations

import io
import json
import mmap
import pickle
import pickletools
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from bnfix.errors import CheckpointError, some

TORCH_SUFFIXES: Final = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar")
INDEX_SUFFIX: Final = ".safetensors.index.json"
#: Longest text (header or index) that is parsed as JSON.
TEXT_LIMIT: Final = 64 * 2**20
#: torch stores its archives uncompressed: what inflates further than this is a bomb.
_INFLATION_LIMIT: Final = 100
_INFLATED_FLOOR: Final = 16 * 2**20

_ZIP_MAGIC: Final = b"PK\x03\x04"
_PICKLE_MAGIC: Final = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
_TORCH_MAGIC_NUMBER: Final = 0x1950A86A20F9469CFC6C  # first pickle of files before torch 1.6

#: What a damaged or hostile file has been seen, or may be expected, to raise in a reader.
_READ_ERRORS: Final = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BufferError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SystemError,
    TypeError,
    ValueError,
    SafetensorError,
    pickle.PickleError,
    struct.error,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
)

_NUMPY_CORES: Final = ("numpy.core.multiarray", "numpy._core.multiarray")
#: Objects that checkpoints often carry beside their tensors. They are never built: a stand-in is.
INERT_NAMES: Final = (
    "argparse.Namespace",
    "numpy.ndarray",
    "numpy.dtype",
    *(f"{core}.{function}" for core in _NUMPY_CORES for function in ("scalar", "_reconstruct")),
    *(f"numpy.dtypes.{name}" for name in np.dtypes.__all__),
)
#: Names that torch's restricted loader knows by itself; only used to word a refusal.
_TORCH_NAMES: Final = (
    "torch._utils._rebuild",
    "torch._tensor._rebuild_from_type_v2",
    "torch.nn.parameter.Parameter",
    "torch.serialization._get_layout",
    "torch.storage.",
    "torch.cuda.",
    "collections.OrderedDict",
    "collections.Counter",
    "_codecs.encode",
    "builtins.bytearray",
    "builtins.complex",
    "builtins.set",
    "__builtin__.bytearray",
    "__builtin__.complex",
    "__builtin__.set",
)
_ITEM_SIZES: Final = {
    "ComplexDoubleStorage": 16,
    "ComplexFloatStorage": 8,
    "DoubleStorage": 8,
    "LongStorage": 8,
    "FloatStorage": 4,
    "IntStorage": 4,
    "QInt32Storage": 4,
    "BFloat16Storage": 2,
    "HalfStorage": 2,
    "ShortStorage": 2,
}


class Inert:
    """Stands for an object of a file that is not a tensor: takes anything, does nothing."""

    itemsize = 0

    def __new__(cls, *_arguments: Any, **_options: Any) -> Inert:
        """Accept whatever arguments the file gives.

        Returns:
            A stand-in that remembers nothing.
        """
        return super().__new__(cls)

    def __setstate__(self, state: Any) -> None:
        return

    def __setitem__(self, key: Any, value: Any) -> None:
        return

    def __call__(self, *_arguments: Any) -> Inert:
        """Be called with anything.

        Returns:
            Itself.
        """
        return self

    def append(self, item: Any) -> None:
        """Take an item, as a list or set would, and drop it.

        Args:
            item: dropped.
        """

    extend = add = append


def plain(text: object) -> str:
    """Put a text of unknown origin on one line, without control characters.

    Args:
        text: a name from a file, or somebody else's error (cut to 200 characters), or a path.

    Returns:
        A text that is fit for a message.
    """
    reason = text.strerror if isinstance(text, OSError) else None  # without the path, again
    line = " ".join(str(reason or text).split())
    line = "".join(sign if sign.isprintable() else "?" for sign in line)
    return line if isinstance(text, Path) or len(line) <= 200 else line[:197] + "..."


def require_file(path: Path) -> None:
    """Check that a path is an ordinary file with something in it.

    Args:
        path: the file.

    Raises:
        CheckpointError: if it is missing, a folder, a device or empty.
    """
    shown = plain(path)
    try:
        if path.is_dir():
            raise CheckpointError(f"{shown}: is a folder, expected a checkpoint file.", path=path)
        if not path.exists():
            raise CheckpointError(f"{shown}: no such file.", path=path)
        if not path.is_file():
            raise CheckpointError(f"{shown}: is not an ordinary file.", path=path)
        if path.stat().st_size == 0:
            raise CheckpointError(f"{shown}: is empty (0 bytes), expected a checkpoint.", path=path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown}: cannot be opened ({plain(error)}).", path=path) from error


def read_file(path: Path) -> tuple[Any, str | None, list[str]]:
    """Read a file by its suffix, or by its first bytes where the suffix says nothing.

    Args:
        path: an ordinary file.

    Returns:
        What the file holds (a dict of tensors for safetensors), the text of the ``bnfix`` header
        if there is one, and notes in words.

    Raises:
        CheckpointError: if the file is damaged, hostile, of another kind, or needs unpickling.
    """
    shown = plain(path)
    try:
        if path.name.endswith(INDEX_SUFFIX):
            return _read_index(path)
        kind = _kind_of(path)
        if kind == "safetensors" or path.suffix == ".safetensors":
            tensors, header = _read_safetensors(path)
            return tensors, header, []
        if kind == "zip":
            return _read_zip(path), None, []
        if kind == "pickle":
            return _read_legacy(path), None, ["written by torch before 1.6, or in its format"]
        if path.suffix == ".tar" and tarfile.is_tarfile(path):
            raise CheckpointError(
                f"{shown}: is a real tar archive, which the restricted loader cannot read. "
                "Unpack it, or load it with the program that wrote it and save its state_dict.",
                path=path,
            )
    except _READ_ERRORS as error:
        reason = plain(error) or type(error).__name__
        raise CheckpointError(
            f"{shown}: cannot be read, it is damaged or not a checkpoint ({reason}). "
            "Fetch it again or save it anew.",
            path=path,
        ) from error
    expected = "torch" if path.suffix in TORCH_SUFFIXES else "torch or safetensors"
    raise CheckpointError(
        f"{shown}: is not a {expected} file by its first bytes. "
        f"Give .safetensors or one of {', '.join(TORCH_SUFFIXES)} written by torch.save.",
        path=path,
    )


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


# --- safetensors ---


def _read_safetensors(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = (file.metadata() or {}).get("bnfix")
    return tensors, header


# Read all shards that a ``.safetensors.index.json`` names, from its own folder only.
def _read_index(path: Path) -> tuple[dict[str, torch.Tensor], None, list[str]]:
    tensors: dict[str, torch.Tensor] = {}
    places = read_weight_map(path)
    shards = sorted(set(places.values()))
    for shard in shards:
        require_file(path.parent / shard)
        found, _ = _read_safetensors(path.parent / shard)
        tensors |= {name: tensor for name, tensor in found.items() if places.get(name) == shard}
    lacking = [plain(name) for name in places if name not in tensors]
    if lacking:
        raise CheckpointError(
            f"{plain(path)}: its shards lack {some(lacking)}. Fetch all shards again.", path=path
        )
    return tensors, None, [f"{len(shards)} shards"]


def read_weight_map(path: Path) -> dict[str, str]:
    """Read which tensor is in which shard.

    Args:
        path: a ``.safetensors.index.json``.

    Returns:
        File name of the shard for each tensor's name.

    Raises:
        CheckpointError: if it is no such index, or names files outside its folder.
    """
    shown = plain(path)
    if path.stat().st_size > TEXT_LIMIT:
        raise CheckpointError(
            f"{shown}: is larger than {TEXT_LIMIT} bytes, no index is.", path=path
        )
    try:
        places = json.loads(path.read_bytes())["weight_map"]
        ok = all(isinstance(shard, str) for shard in places.values())
    except (AttributeError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{shown}: is not an index ({plain(error)}).", path=path) from error
    if not ok or not places:
        raise CheckpointError(
            f"{shown}: is not an index, its weight_map names no files.", path=path
        )
    foreign = [s for s in places.values() if Path(s).name != s or not s.endswith(".safetensors")]
    if foreign:
        raise CheckpointError(
            f"{shown}: names {plain(foreign[0])!r}, expected a .safetensors file beside the index.",
            path=path,
        )
    return dict(places)


# --- torch ---


class _Survey(pickle.Unpickler):
    """Walks one pickle with stand-ins only: which names it has, how large its storages claim."""

    def __init__(self, data: bytes) -> None:
        # The C unpickler allocates its memo up to the largest index: picklers number from 0.
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
            # Stand-ins cannot play every part; the loader, too, stops at a blocked name before.
            if not self.blocked():
                raise

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name.endswith("Storage") and module_name.split(".")[0] == "torch":
            kind = Inert()
            kind.itemsize = _ITEM_SIZES.get(global_name, 1)
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

    # Names that the restricted loader does not build.
    def blocked(self) -> list[str]:
        return sorted(
            plain(name)
            for name in self.names
            if name not in INERT_NAMES
            and not name.startswith(_TORCH_NAMES)
            and not (name.startswith("torch.") and name.count(".") == 1)
        )


# Call torch's restricted loader; word its refusal by the names a survey has found.
def _load(path: Path, blocked: list[str], mapped: bool) -> Any:
    try:
        with (
            warnings.catch_warnings(),
            torch.serialization.safe_globals([(Inert, name) for name in INERT_NAMES]),
        ):
            # torch's remarks (protocols, typed storages, alignment) are not the user's business.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except _READ_ERRORS as error:
        if not blocked:
            raise
        raise CheckpointError(
            f"{plain(path)}: not loaded, it holds pickled objects ({some(blocked)}) that would run "
            "code. Where it was made, save model.state_dict() alone, or give a .safetensors file.",
            path=path,
        ) from error


def _read_zip(path: Path) -> Any:
    shown = plain(path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        compressed = _check_entries(path, archive.infolist())
        roots = [name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")]
        roots = [root for root in roots if root.count("/") == 1]
        if len(roots) != 1:
            raise CheckpointError(
                f"{shown}: is a zip archive, but not one that torch.save writes.", path=path
            )
        root = roots[0]
        if root + "constants.pkl" in entries:
            raise CheckpointError(
                f"{shown}: is a TorchScript archive, which holds code. "
                "Load it with torch.jit.load where you trust it and save its state_dict().",
                path=path,
            )
        survey = _Survey(_entry_bytes(path, archive, entries[root + "data.pkl"]))
    for key, claimed in survey.storages.items():
        entry = entries.get(f"{root}data/{key}")
        held = 0 if entry is None else entry.file_size
        if held < claimed:
            raise CheckpointError(
                f"{shown}: damaged, storage {plain(key)} claims {claimed} bytes and holds {held}. "
                "Fetch it again or save it anew.",
                path=path,
            )
    return _load(path, survey.blocked(), mapped=not compressed)


# Refuse sizes that cannot be, before anything is inflated; say if anything is compressed.
def _check_entries(path: Path, entries: list[zipfile.ZipInfo]) -> bool:
    size = path.stat().st_size
    squeezed = [entry for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    stored = [entry for entry in entries if entry.compress_type == zipfile.ZIP_STORED]
    inflated = sum(entry.file_size for entry in squeezed)
    packed = sum(entry.compress_size for entry in squeezed)
    odd = (
        len({entry.filename for entry in entries}) != len(entries)
        or any(entry.file_size != entry.compress_size for entry in stored)
        or sum(entry.file_size for entry in stored) + packed > size
        or any(entry.flag_bits & 1 for entry in entries)
    )
    if odd or inflated > max(_INFLATED_FLOOR, _INFLATION_LIMIT * packed):
        what = "sizes or names that contradict the file" if odd else f"{inflated} bytes compressed"
        raise CheckpointError(
            f"{plain(path)}: not loaded, its zip directory claims {what}. "
            "Fetch it again, or save it anew with torch.save.",
            path=path,
        )
    return bool(squeezed)


def _entry_bytes(path: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.compress_type != zipfile.ZIP_STORED:
        return archive.read(entry)
    # Not by zipfile: it insists on checksums, which torch can be told not to write.
    with path.open("rb") as file:
        file.seek(entry.header_offset + 26)
        name_length, extra_length = struct.unpack("<HH", file.read(4))
        file.seek(name_length + extra_length, io.SEEK_CUR)
        return file.read(entry.file_size)


def _read_legacy(path: Path) -> Any:
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        parts = _pickles(content)
        first = _Survey(next(parts))
        if first.result != _TORCH_MAGIC_NUMBER:
            raise CheckpointError(
                f"{plain(path)}: is a pickle, but not one that torch.save writes"
                f"{_naming(first.blocked())}. Where it was made, save it by torch.save, or give a "
                ".safetensors file.",
                path=path,
            )
        next(parts), next(parts)  # protocol version and the writer's byte order
        survey = _Survey(next(parts))
        claimed = sum(survey.storages.values())
        size = len(content)
    if claimed > size:
        raise CheckpointError(
            f"{plain(path)}: damaged, it claims {claimed} bytes of tensors in {size}. "
            "Fetch it again or save it anew.",
            path=path,
        )
    return _load(path, survey.blocked(), mapped=False)


def _naming(blocked: list[str]) -> str:
    return f" (it holds {some(blocked)})" if blocked else ""


# Cut the pickles at the head of a file one by one, without building anything.
def _pickles(content: mmap.mmap) -> Iterator[bytes]:
    while True:
        start = content.tell()
        # An mmap reads like a file, but clamps a claimed length to what there is.
        for _ in pickletools.genops(cast(IO[bytes], content)):
            pass
        end = content.tell()
        yield content[start:end]
