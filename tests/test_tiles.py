"""Dense outputs of tiles against those of whole images, each held against slow loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from bnfix import set_example_weight_, swap_norms_
from bnfix.data.batches import Batch
from bnfix.metrics.robustness import tiled
from tests.test_map_exports import CODE

CODE_NAMES: dict = {}
exec(CODE, CODE_NAMES)


def net(name="dense", weight=0.0):
    torch.manual_seed(0)
    model = CODE_NAMES[name]()
    bn = model[1]
    bn.running_mean.normal_()
    bn.running_var.uniform_(0.5, 2)
    if weight:
        swap_norms_(model)
        set_example_weight_(model, weight)
    return model.eval()


def batches_of(*shape, size=2):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    return [
        Batch(x[i : i + size], None, np.arange(i, min(i + size, len(x))))
        for i in range(0, len(x), size)
    ]


@torch.no_grad()
def by_hand(model, batches, size):
    """Position by position: differences, changes and distances."""
    x = torch.cat([batch.x for batch in batches])
    whole, (height, width) = model(x).double(), x.shape[2:]
    stride = height // whole.shape[2]
    rows = []
    for top in range(0, height - size[0] + 1, size[0]):
        for left in range(0, width - size[1] + 1, size[1]):
            part = model(x[:, :, top : top + size[0], left : left + size[1]]).double()
            for n in range(len(x)):
                for i in range(part.shape[2]):
                    for j in range(part.shape[3]):
                        y, z = (i + 0.5) * stride, (j + 0.5) * stride
                        cuts = [math.inf]
                        cuts += [y] if top else []
                        cuts += [z] if left else []
                        cuts += [size[0] - y] if top + size[0] < height else []
                        cuts += [size[1] - z] if left + size[1] < width else []
                        a = part[n, :, i, j]
                        b = whole[n, :, top // stride + i, left // stride + j]
                        same = a.argmax() == b.argmax() if len(a) > 1 else (a > 0) == (b > 0)
                        rows.append((min(cuts), (a - b).abs(), not bool(same)))
    spread = whole.transpose(0, 1).flatten(1).std(1, correction=0)
    return rows, spread


@pytest.mark.parametrize(
    ("name", "weight", "shape", "size"),
    [
        ("dense", 0.0, (3, 3, 24, 36), (12, 12)),
        ("dense", 0.3, (2, 3, 17, 24), (8, 12)),
        ("strided", 0.0, (2, 3, 32, 16), (16, 16)),
        ("single", 0.2, (1, 3, 20, 20), (20, 10)),
    ],
)
def test_bands_are_those_by_hand(name, weight, shape, size):
    model, batches = net(name, weight), batches_of(*shape)
    found = tiled("a", model, batches, size, "fp32")
    assert [row.layers for row in found] == (["stored", "live"] if weight else ["stored"])
    last = found[-1]
    assert (last.model, last.size, last.n_examples) == ("a", size, shape[0])
    rows, spread = by_hand(model, batches, size)
    assert sum(band.n for band in last.bands) == len(rows)
    for band in last.bands:
        inside = [row for row in rows if band.low <= row[0] < band.high or row[0] == band.high]
        assert band.n == len(inside)
        difference = torch.stack([row[1] for row in inside]).mean(0) / spread
        assert band.difference == pytest.approx(float(difference.mean()), rel=1e-4, abs=1e-6)
        assert band.changed == pytest.approx(np.mean([row[2] for row in inside]))
    if weight:
        stored = net(name)
        assert found[0].bands == pytest.approx(tiled("a", stored, batches, size, "fp32")[0].bands)
        assert float(model[1].example_weight) == pytest.approx(weight)


def test_stored_statistics_matter_only_within_the_receptive_field():
    batches = batches_of(2, 3, 64, 64)
    (stored,) = tiled("a", net(), batches, (32, 32), "fp32")
    assert stored.bands[0].high == 2  # the two convolutions see two pixels far
    assert stored.bands[0].difference > 0.05
    assert max(band.difference for band in stored.bands[1:]) < 1e-6
    _, live = tiled("a", net(weight=0.5), batches, (32, 32), "fp32")
    assert min(band.difference for band in live.bands) > 1e-3


def test_the_command_reports_tiles_and_refuses_what_cannot_be_cut(cli, tmp_path):
    (tmp_path / "nets.py").write_text(CODE)
    spec = f"{tmp_path / 'nets.py'}:"
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", inputs=rng.normal(size=(5, 3, 24, 32)).astype(np.float32))
    for name in ("dense", "strided", "pooled", "upsampled"):
        torch.save(CODE_NAMES[name]().state_dict(), tmp_path / f"{name}.pth")

    def run(name, tiles, *more):
        return cli(
            "eval", tmp_path / f"{name}.pth", "--model", spec + name, "--data", tmp_path / "d.npz",
            "--tiles", tiles, "--task", "segmentation", *more,
        )  # fmt: skip

    done = run("dense", "8x16", "--report", tmp_path / "r")
    assert "5 images whole and in tiles of 8x16" in done.out
    assert "dense.pth, 0 to 1" in done.out
    for kind in ("md", "html"):
        text = (tmp_path / "r" / f"report.{kind}").read_text()
        assert "Tiles against whole images" in text
        assert "2 or more" in text
    content = run("dense", "8", "--json").json
    assert [row["layers"] for row in content["tiles"]] == ["stored"]
    assert content["tiles"][0]["bands"][0]["difference"] > 0.01
    assert "tiles" not in cli(
        "eval", tmp_path / "dense.pth", "--model", f"{spec}dense", "--data", tmp_path / "d.npz",
        "--task", "segmentation", "--json",
    ).json  # fmt: skip
    for name, tiles, says in (
        ("pooled", "8", "outputs (5, 4) for inputs"),
        ("upsampled", "8", "outputs (5, 4, 36, 48) for inputs (5, 3, 24, 32), expected maps"),
        ("strided", "9", "9x9 for images 24x32, expected smaller tiles, of multiples of 2"),
        ("dense", "24x32", "24x32 for images 24x32, expected smaller tiles"),
        ("dense", "40", "40x40 for images 24x32, expected smaller tiles"),
        ("dense", "0", "--tiles: 0, expected one or two sizes from 1"),
    ):
        assert says in run(name, tiles).message
