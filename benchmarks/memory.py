"""How much memory and time does `convert` of a large checkpoint take?

    python benchmarks/memory.py [--gigabytes 2] [--folder DIR]

Writes a checkpoint of that size (a plain stack of wide layers with Batch Norms; random weights and
statistics), converts it in a process of its own, and prints that process's peak resident memory
(`resource.getrusage`, all included), what importing torch and bnfix takes, and the time beside
that of reading and writing the same bytes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NET = '''
import torch
from torch import nn


def build():
    """{layers} convolutions of {width} channels, each with a Batch Norm."""
    parts = [nn.Conv2d(3, {width}, 3, bias=False), nn.BatchNorm2d({width}), nn.ReLU()]
    for _ in range({layers}):
        parts += [
            nn.Conv2d({width}, {width}, 3, padding=1, bias=False), nn.BatchNorm2d({width}),
            nn.ReLU(),
        ]
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear({width}, 10))
'''
MAKE = """
import sys, torch
from safetensors.torch import save_file
names = {}
exec(open(sys.argv[1]).read(), names)
torch.manual_seed(0)
state = names["build"]().state_dict()
for key, tensor in state.items():
    if key.endswith("running_var"):
        tensor.uniform_(0.5, 2)
save_file(state, sys.argv[2])
"""
IMPORTS = "import resource, bnfix.cli; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
CONVERT = """
import resource, sys, time
from bnfix.jobs.convert import convert
started = time.perf_counter()
convert(sys.argv[1], model=sys.argv[2], input_shape=(3, 8, 8)).save(sys.argv[3], force=True)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter() - started)
"""


def run(code: str, *arguments: str) -> list[float]:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True
    )
    return [float(number) for number in done.stdout.split()]


def disk_time(path: Path, copy: Path) -> float:
    """Reading the file twice (its digest, its tensors) and writing it once, synced."""
    started = time.perf_counter()
    with path.open("rb") as source, copy.open("wb") as target:
        while block := source.read(2**24):
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
        source.seek(0)
        while source.read(2**24):
            pass
    copy.unlink()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--folder", type=Path, default=None)
    given = parser.parse_args()
    width = 1024
    layers = max(1, round(given.gigabytes * 1e9 / (width * width * 9 * 4)))
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        folder = Path(name)
        (folder / "net.py").write_text(NET.format(width=width, layers=layers))
        checkpoint = folder / "net.safetensors"
        # All in processes of their own: a process's peak is never below that of the one it is from.
        run(MAKE, str(folder / "net.py"), str(checkpoint))
        size = checkpoint.stat().st_size
        disk = disk_time(checkpoint, folder / "copy")
        (imports,) = run(IMPORTS)
        peak, seconds = run(
            CONVERT, str(checkpoint), f"{folder / 'net.py'}:build", str(folder / "out.safetensors")
        )
        print(f"file                {size / 1e9:.3f} GB, {layers + 1} norm layers")
        print(
            f"peak of convert     {peak * 1024 / 1e9:.3f} GB = {peak * 1024 / size:.3f} x the file"
        )
        print(f"  of that, imports  {imports * 1024 / 1e9:.3f} GB")
        print(f"time of convert     {seconds:.1f} s; reading twice and writing once: {disk:.1f} s")


if __name__ == "__main__":
    main()
