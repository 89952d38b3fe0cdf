"""Segmentation and pitch: public networks under a shift, repaired from the command line.

    python benchmarks/tasks.py --data FOLDER            # the folder that BNFIX_DATA names
    python benchmarks/tasks.py --data FOLDER --check    # eval's numbers against a plain script's

ESPNet on CamVid: 51 frames of sequence 0016E5 to work with, 31 of 0001TP to test. CREPE-tiny on
synthetic tones (benchmarks/tones.py): 600 frames to work with, 1,000 others to test. Every case
is a shift that both parts are under. The commands are printed as they are run. A row holds both
models and their difference on the test part; rows stay in benchmarks/results/tasks.jsonl, and a run
goes on with those that are missing. About an hour on one core.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

import numpy as np
import torch
from PIL import Image

from tests import nets_dense
from tests.real import DATA

#: Of each model, without names of files.
KEPT = "n_examples", "n_live", "loss", "score", "miou", "pixel_accuracy", "custom", "interval"
RESULTS = Path(__file__).parent / "results" / "tasks.jsonl"
ESPNET = (
    "--model", "tests/nets_dense.py:espnet", "--ignore-index", "11", "--bgr", "--scale", "1",
    "--mean", ",".join(map(str, nets_dense.CAMVID_MEAN)),
    "--std", f"{255 * nets_dense.CAMVID_STD:g}", "--batch-size", "4", "--workers", "0",
)  # fmt: skip
CREPE = (
    "--model", "tests/nets_dense.py:crepe_tiny", "--loss", "benchmarks/tones.py:loss",
    "--workers", "0",
)  # fmt: skip
SHIFTS = {"espnet": ("contrast:2", "noise:2", "none"), "crepe": ("clean", "noise", "phone")}
#: Of 51 frames a quarter would choose, and the gate takes 20. Test frames within six seconds share
#: their hundreds: 31 frames of one sequence are 19 blocks.
FIXED = {"espnet": ("--select", "0.4"), "crepe": ()}
EVALUATED = {
    "espnet": ("--groups", r"_(\d{4})"),
    "crepe": ("--metric", "benchmarks/tones.py:pitch_accuracy"),
}
#: The commands that make a file, by the name of the row.
METHODS = {
    "fix": ("fix", "--no-refit"),
    "mixed statistics, no labels": (
        "calibrate", "--statistics", "blend", "--labels", "none", "--example-weight", "keep",
    ),
    "new statistics, no labels": (
        "calibrate", "--statistics", "population", "--labels", "none", "--example-weight", "keep",
    ),
}  # fmt: skip


def case(net: str, shift: str, data: Path, folder: Path) -> tuple[str, tuple[str, ...], str, str]:
    """The checkpoint, the options that describe it, and the data to work with and to test."""
    if net == "crepe":
        work, test = (str(folder / f"{shift}-{part}.npz") for part in ("work", "test"))
        return str(data / "odd/crepe_tiny.pth"), CREPE, work, test
    spoilt = () if shift == "none" else ("--corrupt", shift)
    work, test = (str(data / "camvid" / part) for part in ("work", "test"))
    return str(data / "odd/espnet_camvid.pth"), (*ESPNET, *spoilt), work, test


def bnfix(*words: str) -> dict[str, Any]:
    """Run a command as a user does, and read its JSON."""
    sys.stdout.write(f"$ {shlex.join(['bnfix', *words])}\n")
    sys.stdout.flush()
    done = subprocess.run(
        [sys.executable, "-m", "bnfix", *words, "--json", "--quiet"], cwd=ROOT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    found = json.loads(done.stdout)
    assert isinstance(found, dict)
    return found


def row(net: str, shift: str, method: str, data: Path, folder: Path) -> dict[str, Any]:
    """One command, and its file against the checkpoint on the test part."""
    checkpoint, common, work, test = case(net, shift, data, folder)
    command, *words = METHODS[method]
    out = str(folder / f"{net}-{shift}-{method}.safetensors".replace(" ", "_").replace(":", ""))
    unlabelled = "--labels" in words
    made = bnfix(
        command, checkpoint, *common, *words, "--data", work,
        *(() if unlabelled else ("--test", test, *FIXED[net])), "-o", out, "--force",
    )  # fmt: skip
    found = bnfix("eval", checkpoint, out, *common, "--data", test, *EVALUATED[net])
    return {
        "net": net, "shift": shift, "method": method, "verdict": found["verdict"],
        "claimed": made["verdict"], "paired": found["paired"][-1],
        "models": [{key: one[key] for key in KEPT if key in one} for one in found["models"]],
    }  # fmt: skip


def plain(data: Path) -> dict[str, float]:
    """MIoU and pixel accuracy of ESPNet on the test frames, in plain torch and numpy."""
    net = nets_dense.espnet().eval()
    net.load_state_dict(
        torch.load(data / "odd/espnet_camvid.pth", map_location="cpu", weights_only=True),
        strict=False,
    )
    counts = np.zeros((12, 12), np.int64)
    for path in sorted((data / "camvid/test/images").glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"), np.float32)[..., ::-1]
        x = (pixels - np.float32(nets_dense.CAMVID_MEAN)) / nets_dense.CAMVID_STD / 255
        mask = np.asarray(Image.open(data / "camvid/test/masks" / path.name), np.int64)
        with torch.inference_mode():
            scores = net(torch.from_numpy(x.astype(np.float32)).permute(2, 0, 1)[None])
        guess = scores[0].argmax(0).numpy()
        counts += np.bincount(12 * mask.ravel() + guess.ravel(), minlength=144).reshape(12, 12)
    valid = counts[:11]
    right = np.diag(valid)
    union = valid.sum(1) + valid.sum(0)[:11] - right
    return {
        "miou": float((right / union).mean()),
        "pixel_accuracy": float(right.sum() / valid.sum()),
    }


def check(data: Path, folder: Path) -> None:
    """Print eval's numbers and the plain script's."""
    checkpoint, common, _, test = case("espnet", "none", data, folder)
    (found,) = bnfix("eval", checkpoint, *common, "--data", test)["models"]
    for name, value in plain(data).items():
        sys.stdout.write(f"{name}: plain {value:.9f}, bnfix {found[name]:.9f}\n")
        assert abs(value - found[name]) < 1e-6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--nets", nargs="+", default=list(SHIFTS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the files that are made")
    asked = parser.parse_args()
    known = [json.loads(line) for line in RESULTS.open()] if RESULTS.exists() else []
    done = {(found["net"], found["shift"], found["method"]) for found in known}
    with tempfile.TemporaryDirectory() as name:
        folder = asked.keep or Path(name)
        if asked.check:
            check(asked.data, folder)
            return
        if "crepe" in asked.nets:
            subprocess.run(
                [sys.executable, "benchmarks/tones.py", str(folder)], cwd=ROOT, check=True
            )
        for net in asked.nets:
            for shift in SHIFTS[net]:
                for method in asked.methods:
                    if (net, shift, method) not in done:
                        found = row(net, shift, method, asked.data, folder)
                        with RESULTS.open("a") as file:
                            file.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
