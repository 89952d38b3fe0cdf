"""Damaged and hostile checkpoints: each is read, or refused by an error that names the file.

Case k is made by a generator seeded with k, so that a failing one can be had again alone.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import resource
import struct
import tarfile
import time
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save as to_bytes
from torch import nn

import bnfix
from bnfix.core.errors import BnfixError
from bnfix.core.settings import (
    DataRecipe,
    FinetuneRecipe,
    GateRecipe,
    ModelRecipe,
    RunOptions,
    StatisticsRecipe,
    SwapRecipe,
    WeightRecipe,
)
from bnfix.jobs.inspect import inspect_checkpoint
from bnfix.jobs.plan import replayed_plan

CASES = int(os.environ.get("BNFIX_FUZZ_CASES", "150"))
SECONDS = 5.0
GIGABYTE = 2**30
PLANTED = "planted"

NAMES = (
    "../../etc/passwd", "/etc/passwd", "C:\\x", "[red]x[/red]", "<script>alert(1)</script>",
    "a\x1b[2Jb", "\u202e", "a" * 5000, "", ".", "..", "running_mean", "x.running_mean",
    "bn.running_var", "__metadata__", "__class__", "\ud800", "n\nn", "module." * 400 + "w",
)  # fmt: skip
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2**31, 2**63 - 1, 2**64, -(2**63), 10**30, 1.5, 1e308, True, None, "1", [], {},
)  # fmt: skip


class Trap:
    """Pickles to a call that leaves a file behind."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.made_of = call, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.made_of


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), relu=nn.ReLU()))


def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return net().state_dict()


HEADER: dict[str, Any] = {
    "format": 1,
    "bnfix": "0.1.0",
    "model": {"spec": "torchvision:resnet18", "arguments": {"num_classes": 3}},
    "preprocessing": {"mean": [0.5], "std": [0.25], "resize": [8], "channels": 3},
    "norms": {
        "bn": {"channel_groups": 4, "ghost_size": None, "example_weight": 0.25, "eps": 1e-5}
    },
    "history": [
        {
            "command": "calibrate", "seed": 0, "input": {"file": "a.pth", "sha256": "0"},
            "options": {
                "model": asdict(ModelRecipe()), "data": asdict(DataRecipe()),
                "swap": asdict(SwapRecipe()), "statistics": asdict(StatisticsRecipe()),
                "example_weight": asdict(WeightRecipe()), "finetune": asdict(FinetuneRecipe()),
                "gate": asdict(GateRecipe()), "precision": "fp32",
            },
            "data": {"spec": "d", "n_examples": 3, "fit": "00"}, "results": {"top1": 0.5},
        }
    ],
}  # fmt: skip


# --- the makers ---


def flipped(content: bytes, rng: random.Random) -> bytes:
    """Some bytes changed, cut out, doubled, or put in; most often near the start."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8, 40])):
        at = min(int(rng.expovariate(1 / 200)), len(data) - 1) if rng.random() < 0.7 else (
            rng.randrange(len(data))
        )  # fmt: skip
        what = rng.random()
        if what < 0.6:
            data[at] = rng.randrange(256)
        elif what < 0.75:
            del data[at : at + rng.randrange(1, 64)]
        elif what < 0.9:
            data[at:at] = rng.randbytes(rng.randrange(1, 64))
        else:
            data = data[: max(at, 1)]
        if not data:
            data = bytearray(b"x")
    return bytes(data)


def mangled(value: Any, rng: random.Random, depth: int = 0) -> Any:
    """A JSON value with a part of it replaced by something that does not belong there."""
    if rng.random() < 0.15 or depth > 6:
        return rng.choice([*NUMBERS, *NAMES, [[]] * 50, {"a": {"b": [1]}}])
    if isinstance(value, dict) and value:
        found = dict(value)
        key = rng.choice(list(found))
        found[key] = mangled(found[key], rng, depth + 1)
        if rng.random() < 0.2:
            found[rng.choice(NAMES)] = rng.choice(NUMBERS)
        return found
    if isinstance(value, list) and value:
        found = list(value)
        found[rng.randrange(len(found))] = mangled(rng.choice(found), rng, depth + 1)
        return found
    return rng.choice([*NUMBERS, *NAMES])


def text_of(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", errors="surrogatepass")


def lying_safetensors(folder: Path, rng: random.Random) -> Path:
    content = to_bytes(state(), metadata={"bnfix": json.dumps(HEADER)})
    n = int.from_bytes(content[:8], "little")
    header, body = json.loads(content[8 : 8 + n]), content[8 + n :]
    for _ in range(rng.randrange(1, 4)):
        name = rng.choice([key for key in header if key != "__metadata__"])
        entry, what = header[name], rng.random()
        if not isinstance(entry, dict) or what < 0.2:
            header[name] = mangled(entry, rng)
        elif what < 0.45:
            entry["shape"] = [rng.choice(NUMBERS) for _ in range(rng.randrange(5))]
        elif what < 0.7:
            entry["data_offsets"] = [rng.choice(NUMBERS), rng.choice(NUMBERS)]
        elif what < 0.8:
            entry["dtype"] = rng.choice(["F64", "U8", "F4", "Q8", 3, None, "BOOL"])
        else:
            header[rng.choice(NAMES)] = dict(entry)
    text = text_of(header)
    size = rng.choice([len(text)] * 6 + [0, 1, 2**31, 2**63, 2**64 - 1, len(text) * 2])
    path = folder / "lying.safetensors"
    path.write_bytes(struct.pack("<Q", size) + text + body)
    return path


def lying_header(folder: Path, rng: random.Random) -> Path:
    header: Any = HEADER
    for _ in range(rng.randrange(1, 4)):
        header = mangled(header, rng)
    what, text = rng.random(), json.dumps(header)
    if what < 0.1:
        text = "[" * rng.choice([100, 100_000])
    elif what < 0.15:
        text = '{"format": 1, "x": "' + "y" * 2_000_000 + '"}'
    elif what < 0.2:
        text = '{"format": 1, "history": ' + "[{" * 0 + "[" * 60 + "]" * 60 + "}"
    try:
        content = to_bytes(state(), metadata={"bnfix": text})
    except UnicodeEncodeError:
        content = to_bytes(state(), metadata={"bnfix": text.encode("ascii", "replace").decode()})
    path = folder / "header.safetensors"
    path.write_bytes(content)
    return path


def damaged_bytes(folder: Path, rng: random.Random) -> Path:
    content = io.BytesIO()
    kind = rng.randrange(3)
    if kind < 2:
        torch.save({"model": state()}, content, _use_new_zipfile_serialization=bool(kind))
    path = folder / rng.choice(["d.pth", "d.pt", "d.ckpt", "d.bin", "d.safetensors", "d.tar", "d"])
    path.write_bytes(flipped(content.getvalue() if kind < 2 else to_bytes(state()), rng))
    return path


def lying_zip(folder: Path, rng: random.Random) -> Path:
    content = io.BytesIO()
    torch.save(state(), content)
    path = folder / "lying.pth"
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            name, data = entry.filename, old.read(entry)
            what = rng.random()
            if what < 0.1:
                name = rng.choice([n for n in NAMES if n and "\ud800" not in n])
            elif what < 0.2:
                data = flipped(data or b"x", rng)
            elif what < 0.3:
                data = bytes(rng.choice([0, 1, 5_000_000]))
            elif what < 0.35:
                continue
            squeeze = zipfile.ZIP_DEFLATED if rng.random() < 0.2 else zipfile.ZIP_STORED
            new.writestr(zipfile.ZipInfo(name.replace("\0", "?")), data, squeeze)
    if rng.random() < 0.5:  # the directory at the end
        data = bytearray(path.read_bytes())
        at = data.rfind(b"PK\x01\x02", 0, max(5, len(data) - rng.randrange(300)))
        for _ in range(rng.randrange(1, 4)):
            field = max(at, 0) + rng.choice([20, 24, 28, 30, 42])
            data[field : field + 4] = struct.pack("<I", rng.choice([0, 1, 2**31, 2**32 - 1]))
        path.write_bytes(data)
    return path


def pickled_code(folder: Path, rng: random.Random) -> Path:
    target = folder / PLANTED
    trap = rng.choice([
        Trap(Path.touch, target), Trap(os.system, f"touch {target}"), Trap(open, str(target), "w"),
        Trap(eval, f"open({str(target)!r}, 'w')"), Trap(os.mkdir, str(target)),
        Trap(getattr, target, "touch"),
    ])  # fmt: skip
    content: Any = {"model": state(), "x": trap}
    for _ in range(rng.randrange(3)):
        content = rng.choice([[content], {"model": content}, (content, trap), {"state_dict": trap}])
    path = folder / rng.choice(["code.pth", "code.ckpt", "code.tar"])
    if rng.random() < 0.3:
        path.write_bytes(pickle.dumps(content, protocol=rng.choice([0, 1, 2, 4, 5])))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    return path


def odd_content(folder: Path, rng: random.Random) -> Path:
    content: Any = rng.choice([
        {name: torch.zeros(1) for name in NAMES},
        {f"bn{i}.{n}": t for i in range(60) for n, t in state().items()},
        {"w": torch.zeros(1).expand(2**40)},
        {"w": torch.zeros(8).as_strided((2**20, 2**20), (0, 0))},
        {"bn.running_mean": torch.zeros(3), "bn.running_var": torch.zeros(4).bool()},
        {"w": torch.eye(3).to_sparse(), 3: torch.zeros(1), None: 4},
        state() | {"bn.running_mean": torch.full((4,), torch.nan, dtype=torch.complex64)},
        {"model": {"model": {"model": {"model": state()}}}},
        [state()], None, 3, "text", (), torch.zeros(2),
    ])  # fmt: skip
    if rng.random() < 0.3:
        for _ in range(rng.choice([5, 50, 150])):
            content = rng.choice([{"model": content}, {"state_dict": content}])
    path = folder / "odd.pth"
    torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    return path


def lying_index(folder: Path, rng: random.Random) -> Path:
    kind = rng.choice(["safetensors", "bin"])
    shard = folder / f"model-1.{kind}"
    if kind == "bin":
        torch.save(rng.choice([state(), [state()], {"model": state()}]), shard)
    else:
        shard.write_bytes(to_bytes(state()))
    if rng.random() < 0.2:
        shard.write_bytes(flipped(shard.read_bytes(), rng))
    places: Any = dict.fromkeys(state(), shard.name)
    if rng.random() < 0.7:
        foreign = [
            f"../{PLANTED}.{kind}",
            f"/etc/x.{kind}",
            "gone.bin",
            shard.name + "/",
            f".{kind}",
        ]
        places[rng.choice(list(places))] = rng.choice([*foreign, *NUMBERS, *NAMES])
    content = {"metadata": {"total_size": rng.choice(NUMBERS)}, "weight_map": places}
    data = text_of(mangled(content, rng) if rng.random() < 0.4 else content)
    stem = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    path = folder / f"{stem}.index.json"
    path.write_bytes(flipped(data, rng) if rng.random() < 0.3 else data)
    return path


def lying_tar(folder: Path, rng: random.Random) -> Path:
    path = folder / rng.choice(["lying.tar", "lying.pth"])
    with tarfile.open(path, "w") as archive:
        for name in rng.sample([n for n in NAMES if n and "\ud800" not in n], 4):
            entry = tarfile.TarInfo(name)
            entry.size = 3
            entry.type = rng.choice([tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE])
            entry.linkname = "/etc/passwd"
            archive.addfile(entry, io.BytesIO(b"abc"))
    path.write_bytes(flipped(path.read_bytes(), rng) if rng.random() < 0.7 else path.read_bytes())
    return path


MAKERS = (
    lying_safetensors, lying_header, damaged_bytes, lying_zip, pickled_code, odd_content,
    lying_index, lying_tar,
)  # fmt: skip


# --- the readers ---


READERS: dict[str, Callable[[Path], object]] = {
    "inspect": lambda path: json.dumps(inspect_checkpoint(path).to_json()),
    "load": lambda path: bnfix.load(path, model=net()),
    "replay": lambda path: replayed_plan(path, run=RunOptions("cpu")),
}


def check(path: Path, read: Callable[[Path], object]) -> bool:
    """Whether a file is read; an error other than a stated one that names it goes through."""
    started = time.process_time()
    refusal = ""
    try:
        read(path)
    except BnfixError as error:
        refusal = str(error)
    assert time.process_time() - started < SECONDS
    names = [p.name for p in path.parent.iterdir()]
    assert not refusal or any(name in refusal for name in names), refusal
    assert "\n" not in refusal
    return not refusal


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
@pytest.mark.parametrize("maker", MAKERS, ids=lambda maker: maker.__name__)
def test_a_reader_reads_or_refuses(maker, tmp_path):
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for case in range(MAKERS.index(maker), CASES, len(MAKERS)):
        folder = tmp_path / f"case {case}"
        folder.mkdir()
        path = maker(folder, random.Random(case))
        before = {p.name for p in folder.iterdir()}
        for name, read in READERS.items():
            try:
                check(path, read)
            except Exception as error:
                error.add_note(f"case {case}: {maker.__name__}, {name}")
                raise
        assert {p.name for p in folder.iterdir()} == before, case
        for left in folder.iterdir():
            left.unlink()
    assert {p.name for p in tmp_path.parent.glob(f"*{PLANTED}*")} == set()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - most < GIGABYTE


def test_the_traps_work_where_nobody_checks(tmp_path):
    """Else the cases above would prove nothing."""
    pickle.loads(pickle.dumps(Trap(Path.touch, tmp_path / PLANTED)))
    assert (tmp_path / PLANTED).exists()


def test_what_is_whole_is_read(tmp_path):
    path = tmp_path / "whole.safetensors"
    path.write_bytes(to_bytes(state(), metadata={"bnfix": json.dumps(HEADER)}))
    assert all(check(path, read) for read in READERS.values())
