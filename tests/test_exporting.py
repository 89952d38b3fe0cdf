"""Exports verified, refused, and run where bnfix is not."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn

import bnfix
from bnfix import ConfigError, ModelError
from bnfix.checkpoints.checkpoint import read_checkpoint
from bnfix.core.settings import DataRecipe, ModelRecipe, Preprocessing
from bnfix.deploy import forms
from bnfix.deploy.forms import outputs_of
from bnfix.deploy.plain import ExampleNorm, build, read
from bnfix.jobs.export import ExportRecipe, export
from tests import nets
from tests.conftest import Files, Outcome, environment

ATOL = 1e-4
NETS = """
import torch
from torch import nn


class Liar(nn.Module):
    def forward(self, x):
        return x * 1.01 if torch.compiler.is_compiling() else x


class Net(nn.Module):
    def __init__(self, num_classes, liar=False):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.middle = Liar() if liar else nn.Identity()
        self.fc = nn.Linear(4, num_classes)

    def forward(self, x):
        return self.fc(self.middle(torch.relu(self.bn(self.conv(x)))).mean((2, 3)))


class Two(Net):
    def forward(self, x):
        return {"out": super().forward(x), "aux": (x.mean((2, 3)),)}


class Outside(Net):
    def __init__(self, num_classes):
        super().__init__(num_classes)
        self.layers = [self.conv, self.bn, torch.relu]

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class Valued(Net):
    def forward(self, x):
        return super().forward(x if x.sum().item() > -1e9 else -x)


class Late(Net):
    def forward(self, x):
        return super().forward(x) * (1.01 if torch.compiler.is_compiling() else 1)


class Upscaler(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.bn = nn.BatchNorm2d(12)

    def forward(self, x):
        return 3e3 * torch.pixel_shuffle(self.bn(self.conv(x)), 2)


class Flat(Net):
    def forward(self, x):
        return super().forward(x) + 0 * x.flatten(1).unflatten(1, (3, 784)).mean()


def late(num_classes=3):
    return Late(num_classes)


def flat(num_classes=3):
    return Flat(num_classes)


def upscaler():
    return Upscaler()


def net(num_classes=3):
    return Net(num_classes)


def liar(num_classes=3):
    return Net(num_classes, liar=True)


def two(num_classes=3):
    return Two(num_classes)


def outside(num_classes=3):
    return Outside(num_classes)


def valued(num_classes=3):
    return Valued(num_classes)
"""


def forget_bnfix(code: str, *arguments: object) -> dict[str, Any]:
    """Run code where bnfix cannot be imported; what it prints last is JSON."""
    blocked = "import sys; sys.modules['bnfix'] = None\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", blocked + code, *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=300,
        env={**environment(), "PYTHONPATH": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("exports")
    (found / "own.py").write_text(NETS)
    names: dict[str, Any] = {}
    exec(NETS, names)
    torch.manual_seed(0)
    model = nets.lived_in(names["net"]())
    torch.save(model.state_dict(), found / "stock.pth")
    for name, x in (("live", (0.1, 0.0, 0.7, 1.0)), ("zero", 0.0)):
        loaded = bnfix.load(found / "stock.pth", names["net"]())
        bnfix.swap_norms_(loaded)
        bnfix.set_example_weight_(loaded, x)
        bnfix.save(loaded, found / f"{name}.safetensors")
    return found


def spec(folder: Path, name: str = "net") -> str:
    return f"{folder / 'own.py'}:{name}"


def inputs(n: int = 5, size: int = 9) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(3))


def reference(folder: Path, checkpoint: str, x: Tensor) -> Tensor:
    names: dict[str, Any] = {}
    exec(NETS, names)
    with torch.no_grad():
        return bnfix.load(folder / checkpoint, names["net"]())(x)


SHAPE = (3, 9, 9)


def test_onnx_runs_at_any_batch_size_in_standard_operators(folder):
    made = export(
        folder / "live.safetensors",
        model=spec(folder),
        recipe=ExportRecipe("onnx", samples=9, input_shape=SHAPE),
    )
    made.save(folder / "live.onnx")
    assert made.live == ("bn",)
    assert made.verified.agreement.max_difference < ATOL
    assert made.verified.agreement.batch_sizes == (1, 7)
    assert made.verified.agreement.top1_agreement == 1
    proto = onnx.load(folder / "live.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", 18)]
    assert "BatchNormalization" not in made.operators
    assert made.operators["ReduceMean"] >= 2
    # Neither this machine's paths nor sources travel with the file.
    assert str(folder).encode() not in (folder / "live.onnx").read_bytes()
    session = onnxruntime.InferenceSession(folder / "live.onnx")
    for n in (1, 2, 7):
        x = inputs(n)
        found = session.run(["output"], {"input": x.numpy()})[0]
        wanted = reference(folder, "live.safetensors", x)
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-5, atol=1e-5)
    report = json.loads((folder / "live.onnx.report.json").read_text())
    assert report["command"] == "export"
    assert report["data"] is None
    assert report["export"]["inputs"] == "noise"
    assert report["export"]["opset"] == 18
    assert report["export"]["left"] == {"bn": "weighs the example (example weight above 0)"}
    assert any("seeded noise of 3x9x9" in note for note in report["assumptions"])


def test_pt2_loads_where_bnfix_is_not(folder):
    made = export(
        folder / "live.safetensors",
        model=spec(folder),
        recipe=ExportRecipe("pt2", samples=8, input_shape=SHAPE),
    )
    made.save(folder / "live.pt2")
    assert str(folder).encode() not in (folder / "live.pt2").read_bytes()
    shown = torch.export.load(folder / "live.pt2").example_inputs
    assert shown is None or not shown[0][0].any()  # not the user's images
    x = inputs()
    torch.save(x, folder / "x.pt")
    code = (
        "import json, torch\n"
        "x = torch.load(sys.argv[2])\n"
        "net = torch.export.load(sys.argv[1]).module()\n"
        "print(json.dumps([net(x).tolist(), net(x[:1]).tolist()]))"
    )
    found = forget_bnfix(code, folder / "live.pt2", folder / "x.pt")
    wanted = reference(folder, "live.safetensors", x)
    torch.testing.assert_close(torch.tensor(found[0]), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.tensor(found[1]), wanted[:1], rtol=1e-5, atol=1e-5)


LOAD = (
    "import json, torch, importlib.util\n"
    "def module(path):\n"
    "    spec = importlib.util.spec_from_file_location('m', path)\n"
    "    found = importlib.util.module_from_spec(spec)\n"
    "    spec.loader.exec_module(found)\n"
    "    return found\n"
    "x, own = torch.load(sys.argv[1]), sys.argv[2]\n"
    "found = {}\n"
    "for path in sys.argv[3:]:\n"
    "    net = module(path).load(module(own).net() if own else None)\n"
    "    assert not net.training\n"
    "    kinds = sorted({type(m).__name__ for m in net.modules()})\n"
    "    found[path] = {'y': net(x).tolist(), 'kinds': kinds}\n"
    "assert 'safetensors' not in sys.modules\n"
    "print(json.dumps(found))"
)


def test_plain_and_folded_files_load_where_bnfix_is_not(folder):
    cases = {
        "mine.py": ("plain", "live.safetensors", "mine.py", "ExampleNorm"),
        "still.py": ("plain", "zero.safetensors", "still.py", "BatchNorm2d"),
        "folded.safetensors": ("folded", "zero.safetensors", "folded_loader.py", "Sequential"),
        "stock.safetensors": ("folded", "stock.pth", "stock_loader.py", "Sequential"),
    }
    for output, (to, checkpoint, _, _) in cases.items():
        recipe = ExportRecipe(to, samples=8, input_shape=SHAPE)
        export(folder / checkpoint, model=spec(folder), recipe=recipe).save(folder / output)
    x = inputs()
    torch.save(x, folder / "x.pt")
    pythons = [folder / python for _, _, python, _ in cases.values()]
    found = forget_bnfix(LOAD, folder / "x.pt", folder / "own.py", *pythons)
    for (_, checkpoint, _, kind), python in zip(cases.values(), pythons, strict=True):
        y, kinds = found[str(python)]["y"], found[str(python)]["kinds"]
        wanted = reference(folder, checkpoint, x)
        torch.testing.assert_close(torch.tensor(y), wanted, rtol=1e-5, atol=1e-5)
        assert kind in kinds
        assert ("BatchNorm2d" in kinds) == (kind == "BatchNorm2d")


@pytest.mark.parametrize(
    ("to", "checkpoint"),
    [("plain", "live"), ("folded", "zero"), ("onnx", "live"), ("onnx", "zero"), ("pt2", "live")],
)
def test_layers_that_are_also_held_in_a_plain_list_are_exported(folder, to, checkpoint):
    export(  # which compares the outputs
        folder / f"{checkpoint}.safetensors",
        model=spec(folder, "outside"),
        recipe=ExportRecipe(to, samples=4, input_shape=SHAPE),
    )
    names: dict[str, Any] = {}
    exec(NETS, names)
    loaded = bnfix.load(folder / f"{checkpoint}.safetensors", names["outside"]())
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(inputs()), reference(folder, f"{checkpoint}.safetensors", inputs())
        )
    assert loaded.layers[1] is loaded.bn


def test_the_weights_of_a_plain_file_are_a_checkpoint_of_bnfix_too(folder):
    made = export(
        folder / "live.safetensors",
        model=spec(folder),
        recipe=ExportRecipe("plain", samples=2, input_shape=SHAPE),
    )
    made.save(folder / "both.py")
    names: dict[str, Any] = {}
    exec(NETS, names)
    again = bnfix.load(folder / "both_weights.safetensors", names["net"]())
    assert again.bn.example_weight.tolist() == pytest.approx([0.1, 0.0, 0.7, 1.0])


def test_a_plain_file_builds_torchvisions_models_by_itself(tmp_path):
    """The number of classes is read off the checkpoint, the width is the user's argument."""
    torch.manual_seed(0)
    stock = nets.lived_in(torchvision.models.mobilenet_v2(num_classes=3, width_mult=0.25)).eval()
    torch.save(stock.state_dict(), tmp_path / "m.pth")
    made = export(
        tmp_path / "m.pth",
        model=ModelRecipe("torchvision:mobilenet_v2", (("width_mult", 0.25),)),
        recipe=ExportRecipe("plain", samples=2, input_shape=(3, 32, 32)),
    )
    made.save(tmp_path / "m.py")
    torch.save(x := torch.randn(2, 3, 32, 32), tmp_path / "x.pt")
    found = forget_bnfix(LOAD, tmp_path / "x.pt", "", tmp_path / "m.py")
    with torch.no_grad():
        y = torch.tensor(found[str(tmp_path / "m.py")]["y"])
        torch.testing.assert_close(y, stock(x), rtol=1e-5, atol=1e-5)


def test_half_precision_checkpoints_are_folded_without_a_second_rounding(folder, tmp_path):
    state = torch.load(folder / "stock.pth")
    half = {k: t.half() if t.is_floating_point() else t for k, t in state.items()}
    torch.save(half, tmp_path / "half.pth")
    made = export(
        tmp_path / "half.pth",
        model=spec(folder),
        recipe=ExportRecipe("folded", samples=4, atol=1e-6, input_shape=SHAPE),
    )
    made.save(tmp_path / "half.safetensors")
    tensors = read_checkpoint(tmp_path / "half.safetensors").tensors
    assert tensors["conv.weight"].dtype == tensors["conv.bias"].dtype == torch.float32
    assert tensors["fc.weight"].dtype == torch.float16
    assert not any(name.startswith("bn.") for name in tensors)


def test_outputs_in_a_nest_keep_their_names(folder):
    made = export(
        folder / "live.safetensors",
        model=spec(folder, "two"),
        recipe=ExportRecipe("onnx", samples=7, input_shape=SHAPE),
    )
    proto = onnx.load_from_string(made.content)
    assert [o.name for o in proto.graph.output] == ["out", "aux.0"]
    assert list(outputs_of({"a": [torch.ones(1), {"b": torch.ones(1)}], "c": None})) == [
        "a.0", "a.1.b",
    ]  # fmt: skip


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_difference_ends_with_the_worst_output_and_the_suspect_layer(folder, to):
    with pytest.raises(
        ModelError,
        match=rf"^--to {to}: output 'output' of example \d+ \(noise\) differs by [\d.e-]+, more "
        r"than --atol 0.0001 accepts \(0.0001, since that output reaches 0\.\d+\); "
        r"suspect layer: middle \(Liar\), the first with a different output",
    ):
        export(
            folder / "live.safetensors",
            model=spec(folder, "liar"),
            recipe=ExportRecipe(to, samples=4, input_shape=SHAPE),
        )


@pytest.fixture(scope="module")
def scaler(folder: Path) -> Path:
    names: dict[str, Any] = {}
    exec(NETS, names)
    torch.manual_seed(0)
    torch.save(nets.lived_in(names["upscaler"]()).state_dict(), folder / "scaler.pth")
    return folder / "scaler.pth"


def test_a_difference_between_layers_is_not_called_rounding(folder):
    with pytest.raises(
        ModelError, match=r"every single layer agrees, so suspect the operations between"
    ):
        export(
            folder / "live.safetensors",
            model=spec(folder, "late"),
            recipe=ExportRecipe("pt2", samples=4, input_shape=SHAPE),
        )


def test_a_difference_is_judged_by_the_size_of_its_output(folder, scaler):
    """Rounding of outputs in the thousands is above 1e-4, and nothing to refuse."""
    recipe = ExportRecipe("pt2", samples=8, input_shape=SHAPE)
    made = export(scaler, model=spec(folder, "upscaler"), recipe=recipe)
    found = made.verified.agreement
    assert found.largest_output > 1e3
    assert found.max_difference > ATOL
    assert found.relative_difference == found.max_difference / found.largest_output
    assert found.top1_agreement is None
    assert "top-1" not in made.sentence()
    strict = dataclasses.replace(recipe, atol=1e-9)
    with pytest.raises(
        ModelError,
        match=r"more than --atol 1e-09 accepts \(.*, since that output reaches .*\); every "
        r"single layer agrees, so rounding errors add up\. Give --atol [\d.e-]+ to accept it\.",
    ):
        export(scaler, model=spec(folder, "upscaler"), recipe=strict)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_an_unknown_height_and_width_are_left_free(folder, scaler, to):
    made = export(scaler, model=spec(folder, "upscaler"), recipe=ExportRecipe(to, samples=2))
    assert (made.verified.input_shape, made.verified.other_shape) == ((3, 64, 96), (3, 96, 128))
    assert "any height and width (checked on 3x64x96 and 3x96x128)" in made.remarks()[0]
    run = (forms.onnx_runner if to == "onnx" else forms.pt2_runner)(made.content)
    assert run(torch.randn(3, 3, 17, 23))[0].shape == (3, 3, 34, 46)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_network_of_one_unknown_size_needs_an_input_shape(folder, to):
    with pytest.raises(
        ModelError,
        match=r"network's input size is not known.*the network runs on 3,28,28, for example",
    ):
        export(
            folder / "live.safetensors",
            model=spec(folder, "flat"),
            recipe=ExportRecipe(to, samples=2),
        )


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"resize": (40, 40)}, (3, 40, 40)),
        ({"resize": (40, 20)}, (3, 40, 20)),
        ({"resize": (48,), "crop": (40, 40)}, (3, 40, 40)),
    ],
)
def test_stored_preprocessing_says_the_size(folder, tmp_path, options, shape):
    names: dict[str, Any] = {}
    exec(NETS, names)
    path = tmp_path / "stored.safetensors"
    bnfix.save(
        bnfix.load(folder / "live.safetensors", names["net"]()),
        path,
        preprocessing=Preprocessing(**options),
    )
    recipe = ExportRecipe("pt2", samples=2)
    made = export(path, model=spec(folder), recipe=recipe)
    assert (made.verified.input_shape, made.verified.other_shape) == (shape, None)
    source = DataRecipe(labels="none", **options)
    made = export(folder / "live.safetensors", model=spec(folder), recipe=recipe, source=source)
    assert made.verified.input_shape == shape


def test_a_librarys_dump_stays_off_the_terminal(folder, tmp_path, cli):
    out = tmp_path / "no.onnx"
    done = cli("export", folder / "live.safetensors", "--model", spec(folder, "valued"), "--to",
               "onnx", "-o", out, "--input-shape", "3,9,9")  # fmt: skip
    assert len(done.message) < 700


def test_wrong_and_impossible_requests_are_one_line(folder, tmp_path):
    live, own = folder / "live.safetensors", spec(folder)
    shape = {"samples": 4, "input_shape": SHAPE}
    with pytest.raises(ModelError, match=r"--to folded: 1 layers weigh the example .*: bn\. Use"):
        export(live, model=own, recipe=ExportRecipe("folded", **shape))
    for to in ("onnx", "pt2"):
        with pytest.raises(ModelError, match=r"cannot be traced by torch.export .*branch on val"):
            export(live, model=spec(folder, "valued"), recipe=ExportRecipe(to, **shape))
    with pytest.raises(ModelError, match=r"folding: neither torch.fx"):
        export(
            folder / "zero.safetensors",
            model=spec(folder, "valued"),
            recipe=ExportRecipe("folded", **shape),
        )
    with pytest.raises(ConfigError, match=r"--samples: 64 inputs of 3x9999x9999 take more than 4"):
        export(live, model=own, recipe=ExportRecipe("plain", input_shape=(3, 9999, 9999)))
    with pytest.raises(ModelError, match=r"cannot be run on an input of \(5, 9, 9\)"):
        export(live, model=own, recipe=ExportRecipe("pt2", samples=4, input_shape=(5, 9, 9)))
    for options, message in (
        ({"to": "tflite"}, r"--to: 'tflite' is not known\. Use one of: onnx, pt2, folded, plain"),
        ({"samples": 1}, r"--samples: 1, expected at least 2"),
        ({"atol": 0.0}, r"--atol: 0.0, expected a number above 0"),
        ({"atol": float("nan")}, r"--atol: nan"),
        ({"opset": 9}, r"--opset: 9, expected 18 to 23"),
        ({"input_shape": (3, 0, 8)}, r"--input-shape: \(3, 0, 8\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            ExportRecipe(**options)


def test_a_missing_extra_is_named(folder):
    code = (
        "import sys\nfor name in ('onnxruntime', 'onnxscript'): sys.modules[name] = None\n"
        "from bnfix.cli import app\n"
        "app(sys.argv[1:])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "export", folder / "live.safetensors", "--to", "onnx", "-o",
         folder / "no.onnx", "--model", spec(folder)],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    assert done.stderr.strip() == (
        'bnfix: --to onnx: onnxscript, onnxruntime not installed. Run: pip install "bnfix[onnx]". '
        "See bnfix export --help."
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert not (folder / "no.onnx").exists()


def test_files_are_not_replaced_unless_asked_and_the_checkpoint_never(folder, tmp_path, cli):
    command = ("export", folder / "zero.safetensors", "--model", spec(folder), "--to", "folded",
               "--input-shape", "3,9,9", "--samples", "2")  # fmt: skip
    out = tmp_path / "net.safetensors"
    assert (
        ".onnx for --to onnx"
        in cli("export", folder / "zero.safetensors", "--to", "onnx", "-o", out).message
    )
    (tmp_path / "net_loader.py").write_text("mine")
    assert "net_loader.py: already exists" in cli(*command, "-o", out).message
    assert not out.exists()
    done: Outcome = cli(*command, "-o", out, "--force")
    assert done.code == 0
    assert "import torch" in (tmp_path / "net_loader.py").read_text()
    own = cli(*command, "-o", folder / "zero.safetensors", "--force")
    assert "would replace the checkpoint itself" in own.message
    on_gpu = cli(*command, "-o", tmp_path / "x.safetensors", "--device", "cuda")
    assert (on_gpu.code, "export works on the CPU" in on_gpu.message) == (2, True)
    for name in ("net.safetensors.report.json", "net.safetensors.report.md"):
        assert (tmp_path / name).is_file()
    page = (tmp_path / "net.safetensors.report.html").read_text()
    assert "The folded model agrees with PyTorch" in page
    assert "://" not in page


def test_on_images_through_the_command_line(files: Files, cli, tmp_path):
    """The user's forward prints and branches on sizes; standard output is JSON all the same."""
    out = tmp_path / "net.onnx"
    done = cli("export", files.net, *files.common, "--to", "onnx", "-o", out, "--data", files.data,
               "--samples", "16", "--json", "--seed", "1")  # fmt: skip
    assert done.code == 0
    found = done.json
    assert found["output"] == str(out)
    assert found["data"]["n_examples"] == 16
    assert [fold["norm"] for fold in found["export"]["folded"]] == ["bn1", "bn2"]
    assert found["export"]["traced_by"] == "torch.export"
    assert found["export"]["verification"]["max_difference"] < ATOL
    assert "BatchNormalization" not in found["export"]["operators"]
    images = np.load(files.data)["images"][:3]
    x = (torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    session = onnxruntime.InferenceSession(out)
    y = torch.from_numpy(session.run(None, {"input": x.numpy()})[0])
    with torch.no_grad():
        torch.testing.assert_close(y, files.trained()(x), rtol=1e-4, atol=1e-5)


def test_forcing_weights_to_zero_reports_its_cost(files: Files, cli, tmp_path):
    live = tmp_path / "live.safetensors"
    model = bnfix.load(files.net, files.model())
    bnfix.swap_norms_(model, example_weight=0.5)
    bnfix.save(model, live)
    command = ("export", live, *files.common, "--to", "folded", "--data", files.test,
               "--samples", "16")  # fmt: skip
    out = tmp_path / "folded.safetensors"
    assert "2 layers weigh the example" in cli(*command, "-o", out).message
    assert not out.exists()
    found = cli(*command, "-o", out, "--force-zero", "--json").json
    assert found["export"]["zeroed"] == ["bn1", "bn2"]
    assert found["export"]["live"] == []
    assert found["export"]["cost_of_zero"]["max_difference"] > 1e-3
    assert [model["name"] for model in found["models"]] == ["as it was", "all weights 0"]
    assert found["models"][1]["top1"] is not None
    assert found["paired"][0]["verdict"] in ("better", "same", "worse")
    plain = cli(*command, "-o", tmp_path / "b.safetensors", "--force-zero", "--labels", "none")
    assert "All weights and gates of 2 layers were set to 0" in plain.out


def test_a_plan_does_nothing(folder, cli):
    command = ("export", folder / "live.safetensors", "--model", spec(folder), "--to", "plain",
               "-o", folder / "planned.py", "--plan")  # fmt: skip
    found = cli(*command, "--json").json
    assert (found["plan"], found["n_norms"], found["n_live"]) == (True, 1, 1)
    assert [Path(file).name for file in found["files"]] == [
        "planned.py", "planned_weights.safetensors",
    ]  # fmt: skip
    assert "1 of them live; nothing was done" in cli(*command).out
    assert not (folder / "planned.py").exists()


@pytest.mark.parametrize("groups", [6, 3, 1])
@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 5), (4, 6, 3, 3), (2, 6, 2, 3, 2)])
@pytest.mark.parametrize("weight", [0.3, 1.0, (0.0, 0.1, 0.2, 0.5, 0.9, 1.0)])
def test_the_plain_layer_is_the_layer(groups, shape, weight):
    layer = bnfix.GeneralizedBatchNorm(6, channel_groups=groups, example_weight=weight)
    nets.lived_in(layer).double().eval()
    x = 3 * torch.randn(shape, generator=torch.Generator().manual_seed(1)).double() + 2
    plain = ExampleNorm(layer, weight, groups, layer.eps).eval()
    torch.testing.assert_close(plain(x), layer(x), rtol=1e-7, atol=1e-7)
    assert plain.state_dict().keys() == nn.BatchNorm2d(6).state_dict().keys()
    assert plain(x.half()).dtype == torch.float16


def test_the_plain_layer_without_statistics_or_scale():
    layer = bnfix.GeneralizedBatchNorm(
        4, affine=False, track_running_stats=False, example_weight=1.0
    ).eval()
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(ExampleNorm(layer, 1.0, 4, layer.eps)(x), layer(x))


def test_a_damaged_weights_file_is_refused_by_the_plain_reader(tmp_path):
    (tmp_path / "a").write_bytes(b"\xff" * 64)
    with pytest.raises(ValueError, match=r"not a \.safetensors file"):
        read(tmp_path / "a")
    header = json.dumps({"x": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}).encode()
    (tmp_path / "b").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 8)
    with pytest.raises(ValueError, match="x lies outside"):
        read(tmp_path / "b")
    with pytest.raises(ValueError, match="your own code"):
        build()
