"""Networks that give maps, exported for any height and width."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bnfix.deploy.forms import onnx_runner, pt2_runner
from bnfix.jobs.export import export

CODE = """
import torch
from torch import nn


def dense(classes=4, stride=1):
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, stride=stride, bias=False), nn.BatchNorm2d(6), nn.ReLU(),
        nn.Conv2d(6, classes, 3, padding=1),
    )


def strided():
    return dense(stride=2)


def single():
    return dense(classes=1)


def pooled():
    return nn.Sequential(dense(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def upsampled():
    return nn.Sequential(dense(), nn.Upsample(scale_factor=1.5))


class Placed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = dense()
        self.place = nn.Parameter(torch.randn(1, 4, 16, 16))

    def forward(self, x):
        return self.net(x) + self.place


def placed():
    return Placed()
"""
CODE_NAMES: dict = {}
exec(CODE, CODE_NAMES)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_maps_are_exported_for_any_size_where_the_network_has_none(tmp_path, to):
    (tmp_path / "nets.py").write_text(CODE)
    rng = np.random.default_rng(0)
    # Equal sides, which a tracer takes for one.
    np.savez(tmp_path / "d.npz", inputs=rng.normal(size=(5, 3, 16, 16)).astype(np.float32))
    found = {}
    for name in ("dense", "placed", "pooled"):
        torch.save(CODE_NAMES[name]().state_dict(), tmp_path / f"{name}.pth")
        spec = f"{tmp_path / 'nets.py'}:{name}"
        found[name] = export(
            tmp_path / f"{name}.pth", to=to, model=spec, data=str(tmp_path / "d.npz")
        )
    shapes = {
        name: (made.verified.input_shape, made.verified.other_shape) for name, made in found.items()
    }
    assert shapes == {
        "dense": ((3, 16, 16), (3, 32, 16)), "placed": ((3, 16, 16), None),
        "pooled": ((3, 16, 16), None),
    }  # fmt: skip
    notes = {name: " ".join(made.report.assumptions) for name, made in found.items()}
    assert "takes inputs of 16x16 only, since another size failed" in notes["placed"]
    assert "takes inputs of" not in notes["dense"] + notes["pooled"]
    run = {"onnx": onnx_runner, "pt2": pt2_runner}[to]
    model = CODE_NAMES["dense"]()
    model.load_state_dict(torch.load(tmp_path / "dense.pth", weights_only=True))
    x = torch.randn(3, 3, 20, 44)
    with torch.no_grad():
        (ours,) = run(found["dense"].content)(x)
        torch.testing.assert_close(torch.as_tensor(ours), model.eval()(x), atol=1e-4, rtol=1e-4)
