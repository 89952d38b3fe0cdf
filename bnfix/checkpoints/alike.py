"""Outputs in the form of their input: a hub folder, or a training checkpoint with new weights.

In a training checkpoint only the bytes of the weights change. All other content is copied without
being interpreted, including parts that this program cannot read.
"""

from __future__ import annotations

import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from bnfix.checkpoints.checkpoint import STATISTICS, Checkpoint, follow
from bnfix.checkpoints.read import TORCH_SUFFIXES, read_file, read_in_place
from bnfix.checkpoints.save import (
    check_folder,
    check_free,
    replace_whole,
    stock_tensors,
    write_checkpoint,
    write_folder,
    write_text,
)
from bnfix.core.errors import file_error, file_errors, name_error, output_error, plain, some
from bnfix.core.settings import Preprocessing
from bnfix.models.published import described_in
from bnfix.norm.layer import generalized_norms

WEIGHTS: Final = "model.safetensors"
REPORTS: Final = ("report.json", "report.md", "report.html")
_CARD, _ORIGINAL_CARD = "README.md", "README.original.md"
#: Files of a hub folder that are copied to the output unchanged.
_TAKEN_OVER: Final = (
    "config.json", "preprocessor_config.json", "processor_config.json", "LICENSE", "LICENSE.md",
    "LICENSE.txt", _ORIGINAL_CARD,
)  # fmt: skip
#: Keys of the input's card that the output's card keeps.
_KEPT: Final = ("license", "pipeline_tag", "datasets", "tags")
_LARGEST: Final = 8 * 2**20


# --- hub folders ---


def check_folder_output(path: Path, source: Path, *, force: bool) -> None:
    """Refuse, before any work, a path where no folder can be written."""
    check_folder(path)
    if path.suffix in TORCH_SUFFIXES:
        raise name_error(path, "expected a name that ends in .safetensors, or a folder name.")
    with file_errors(path, "cannot be written", make=output_error):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise output_error(path, "is not a folder. Give another name.")
        held = {entry.name for entry in path.iterdir()} if path.exists() else set()
        if held and not force:
            raise output_error(
                path, "already holds files. Give another name, or --force to replace it."
            )
        own = {*_TAKEN_OVER, _CARD, WEIGHTS, *REPORTS}
        if held and (REPORTS[0] not in held or not held <= own or path.samefile(source)):
            odd = some(sorted(map(plain, held - own))) or "no bnfix report"
            raise output_error(
                path,
                f"is not replaced, even by --force: it holds {odd}, expected a folder that bnfix "
                "wrote, other than the input. Give another name.",
            )
    described_in(source)
    for _ in _taken_over(source):
        pass


def _taken_over(source: Path) -> Iterator[tuple[str, bytes]]:
    """The small files of a hub folder, with their names in the output."""
    places = {name: source / name for name in _TAKEN_OVER}
    if not places[_ORIGINAL_CARD].is_file():
        places[_ORIGINAL_CARD] = source / _CARD
    # Hub snapshots consist of links to files in the folder blobs/ next to them.
    inside = (source.resolve(), source.resolve().parent.parent / "blobs")
    for name, place in places.items():
        with file_errors(place, "cannot be read"):
            if not place.is_file():
                continue
            if not any(place.resolve().is_relative_to(folder) for folder in inside):
                raise file_error(place, "is a link to a file elsewhere. Copy the file there.")
            if place.stat().st_size > _LARGEST:
                raise file_error(place, f"has more than {_LARGEST:,} bytes. Remove it.")
            yield name, place.read_bytes()


@dataclass(frozen=True)
class Folder:
    """The input hub folder, as described in the output's card."""

    source: str
    library: str
    kept: Mapping[str, Sequence[str]]  # license, task, data and tags of its own card
    has_card: bool
    other_preprocessing: bool  # the output's preprocessing differs from the folder's


def folder_of(source: Path, preprocessing: Preprocessing | None) -> Folder:
    """The card's description of a hub folder; the preprocessing is the output's."""
    spec, _, stated = described_in(source)
    files = dict(_taken_over(source))
    card = files.get(_ORIGINAL_CARD, b"").decode(errors="replace")
    front = (re.match(r"---\n((?:(?!---).*\n)*)", card) or [""] * 2)[1]
    return Folder(
        source=source.resolve().name,
        library=spec.partition(":")[0],
        kept={key: _words_at(key, front) for key in _KEPT},
        has_card=bool(card),
        other_preprocessing=preprocessing not in (None, stated),
    )


def _words_at(key: str, front: str) -> list[str]:
    """The words at a key of a card's front matter: one, or a list in either of YAML's forms."""
    found = re.search(rf"^{key}:(.*\n(?: *- .*\n)*)", front, re.MULTILINE)
    parts = re.split(r"\n *- |[][,]", found[1]) if found else []
    words = [part.partition(" #")[0].strip(" \n\"'") for part in parts]
    return [word for word in words if re.fullmatch(r"[\w.:/-]{1,96}", word)][:50]


def save_folder(
    model: nn.Module,
    path: Path,
    metadata: Mapping[str, Any],
    texts: Mapping[str, str],
    place: Checkpoint,
) -> None:
    """Write a model with the tensor names and the small files of its hub folder."""

    def write(temporary: Path) -> None:
        for name, content in _taken_over(place.path.parent):
            (temporary / name).write_bytes(content)
        tensors = {place.names.get(n, place.prefix + n): t for n, t in stock_tensors(model).items()}
        # Without this mark, transformers refuses the file.
        marks = {"format": "pt"}
        write_checkpoint(temporary / WEIGHTS, tensors, metadata, force=False, marks=marks)
        for name, text in texts.items():
            write_text(temporary / name, text)

    write_folder(path, write)


# --- training checkpoints ---


def check_like_input(path: Path, source: Path, *, force: bool) -> None:
    """Refuse, before any work, a pair of files that rules out `--like-input`."""
    if source.suffix not in TORCH_SUFFIXES:
        raise file_error(
            source,
            f"--like-input: expected a torch file ({', '.join(TORCH_SUFFIXES)}) as input. Leave "
            "the option out.",
        )
    if path.suffix != source.suffix:
        raise name_error(
            path,
            f"--like-input: expected the same suffix as the input ({plain(source.name)}). "
            "Change -o, or leave the option out.",
        )
    check_free(path, force=force, source=source)


def check_copyable(checkpoint: Checkpoint) -> None:
    """Refuse, before any work, an input that cannot be copied with new weights in place."""
    path = checkpoint.path
    if not zipfile.is_zipfile(path):
        problem = "is no torch file of version 1.6 or later"
    elif any(e.compress_type != zipfile.ZIP_STORED for e in zipfile.ZipFile(path).infolist()):
        problem = "is compressed"
    elif checkpoint.borrowed:
        problem = "has no statistics to replace"
    elif half := [
        n for n, t in checkpoint.tensors.items() if n.endswith(STATISTICS) and t.dtype.itemsize < 4
    ]:
        problem = f"its statistics are in half precision ({some(half)})"
    elif _shares_memory(checkpoint):
        problem = "other parts share memory with its weights, and would change with them"
    else:
        return
    raise output_error(
        path, f"--like-input: {problem}. Leave the option out and give -o NAME.safetensors."
    )


def _shares_memory(checkpoint: Checkpoint) -> bool:
    """Whether a tensor outside the state dict shares memory with one inside it."""
    content = read_file(checkpoint.path)[0]
    weights = follow(content, checkpoint.key)
    own = {weights[name].untyped_storage().data_ptr() for name in checkpoint.names.values()}
    todo, seen, met = [content], set[int](), 0
    while todo:
        value = todo.pop()
        if value is weights:
            met += 1
        elif isinstance(value, Tensor) and value.untyped_storage().data_ptr() in own - {0}:
            return True
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))
            todo += dict.values(value) if isinstance(value, dict) else value
    return met > 1


def save_like_input(model: nn.Module, path: Path, place: Checkpoint, *, force: bool) -> None:
    """Write a copy of the model's input file with the model's weights in place of the old ones."""
    if any(layer.live for _, layer in generalized_norms(model)):
        raise output_error(path, "has no place for example and batch weights. Set them to 0.")
    stored = {place.names[n]: t for n, t in stock_tensors(model).items() if n in place.names}

    def write(temporary: Path) -> None:
        shutil.copyfile(place.path, temporary)
        own = follow(read_in_place(temporary), place.key)
        with torch.no_grad():
            for name, tensor in stored.items():
                own[name].copy_(tensor)
        del own
        _mend_checksums(temporary)
        again = follow(read_file(temporary)[0], place.key)
        wrong = [n for n, t in stored.items() if not _equal(again[n], t)]
        if wrong:
            raise output_error(path, f"not written, {some(wrong)} cannot be stored in the file.")
        check_like_input(path, place.path, force=force)

    wrong = (OSError, RuntimeError, ValueError)
    with file_errors(path, "not written", kinds=wrong, make=output_error):
        replace_whole(path, write)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.nan_to_num(), other.nan_to_num())


def _mend_checksums(path: Path) -> None:
    """Update the checksum of every entry of an archive to its current content."""
    with zipfile.ZipFile(path) as archive, path.open("r+b") as file:
        at = archive.start_dir
        for entry in archive.infolist():
            file.seek(entry.header_offset + 26)
            start = entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))
            file.seek(start)
            checksum = struct.pack("<I", zlib.crc32(file.read(entry.file_size)))
            # In the local header, or after the content if a flag says so; and in the directory.
            behind = start + entry.file_size + 4 if entry.flag_bits & 8 else 0
            for position in (behind or entry.header_offset + 14, at + 16):
                file.seek(position)
                file.write(checksum)
            file.seek(at + 28)
            at += 46 + sum(struct.unpack("<HHH", file.read(6)))
