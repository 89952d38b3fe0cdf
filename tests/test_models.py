"""Models from specs, the class count from a checkpoint, and every refusal."""

import pickle
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

from bnfix import recalibrate_
from bnfix.core.errors import ConfigError, ModelError
from bnfix.core.settings import Preprocessing
from bnfix.models.build import (
    build_model,
    from_file_allowed,
    input_channels,
)
from bnfix.models.published import default_preprocessing, preset_preprocessing
from tests.real import DATA, needs_data

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}

NETS = '''
"""Somebody's networks."""

from dataclasses import dataclass

import torch
from torch import nn


@dataclass
class Options:
    width: int = 4


class Net(nn.Module):
    def __init__(self, num_classes=10, width=4):
        super().__init__()
        self.options = Options(width)
        self.conv = nn.Conv2d(1, width, 3)
        self.head = nn.Linear(width, num_classes)
        self.scale = nn.Parameter(torch.ones(num_classes))


def needs_classes(n_classes):
    return Net(n_classes)


def any_options(**options):
    return Net(**options)


def not_on_meta(num_classes=10):
    if torch.empty(0).is_meta:
        raise RuntimeError("no meta here")
    return Net(num_classes)


def headless():
    return nn.Conv2d(5, 1, 1)


def fails():
    raise KeyError("two\\nlines")


def leaves():
    raise SystemExit(3)


def says():
    print("hello from the net")
    return Net()


def gives_number():
    return 3


INSTANCE = Net()
NUMBER = 3
'''


@pytest.fixture
def nets(tmp_path: Path) -> str:
    (tmp_path / "nets.py").write_text(NETS)
    return f"{tmp_path}/nets.py"


def shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


# --- building ---


def test_torchvision_models_are_built_ready_on_the_cpu():
    model = build_model("torchvision:resnet18")
    assert type(model) is torchvision.models.ResNet
    assert not any(module.training for module in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert shapes(model) == shapes(torchvision.models.resnet18())


def test_timm_models_are_built():
    pytest.importorskip("timm")
    model = build_model("timm:resnet18", {"num_classes": 3})
    assert model.fc.out_features == 3
    assert not model.training


def test_arguments_reach_the_builder(nets):
    assert build_model("torchvision:mobilenet_v2", {"width_mult": 0.5}).last_channel == 1280
    assert build_model(f"{nets}:Net", {"width": 7}).conv.out_channels == 7
    assert build_model(f"{nets}:any_options", {"width": 7}).conv.out_channels == 7
    assert build_model("torch.nn:Linear", {"in_features": 2, "out_features": 3}).in_features == 2


def test_a_backbone_is_not_downloaded():
    model = build_model("torchvision:lraspp_mobilenet_v3_large", {"num_classes": 2})
    assert model.classifier.low_classifier.out_channels == 2


def test_a_model_is_the_same_each_time_and_randomness_is_left_as_found(nets):
    before = torch.get_rng_state()
    first = build_model(f"{nets}:Net")
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    second = build_model(f"{nets}:Net")
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name])


def test_default_devices_are_overruled(nets):
    with torch.device("meta"):
        model = build_model(f"{nets}:Net", tensors=torchvision.models.resnet18().state_dict())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_what_the_users_code_prints_is_not_lost(nets, capsys):
    build_model(f"{nets}:says")
    assert "hello from the net" in capsys.readouterr().out


# --- files and modules ---


def test_a_file_may_hold_dataclasses_pickle_and_import_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_nets.py").write_text("WIDTH = 6\n")
    text = NETS.replace("width: int = 4", "width: int = neighbour_of_nets.WIDTH")
    (tmp_path / "nets.py").write_text(
        text.replace("import torch\n", "import neighbour_of_nets\nimport torch\n", 1)
    )
    before = list(sys.path)
    model = build_model(f"{tmp_path}/nets.py:Net")
    assert sys.path == before
    assert type(model.options)().width == 6
    assert pickle.loads(pickle.dumps(model)).options == model.options


def test_the_same_file_gives_the_same_class_and_a_changed_one_a_new_class(nets):
    first, again = build_model(f"{nets}:Net"), build_model(f"{nets}:Net")
    assert type(first) is type(again)
    Path(nets).write_text(NETS.replace("width=4", "width=5"))
    changed = build_model(f"{nets}:Net")
    assert changed.conv.out_channels == 5
    assert type(changed) is not type(first)
    assert pickle.loads(pickle.dumps(first)).conv.out_channels == 4


def test_a_relative_path_and_a_module_of_the_current_folder(nets, monkeypatch):
    folder = Path(nets).parent
    (folder / "nets_of_mine").mkdir()
    (folder / "nets_of_mine" / "zoo.py").write_text(NETS)
    monkeypatch.chdir(folder)
    before = list(sys.path)
    assert input_channels(build_model("nets.py:Net")) == 1
    assert input_channels(build_model("nets_of_mine.zoo:Net")) == 1
    assert sys.path == before


def test_only_the_two_libraries_may_be_named_by_a_file():
    assert from_file_allowed("torchvision:resnet18")
    assert from_file_allowed("timm:resnet50.a1_in1k")
    for spec in (
        "os:system",
        "nets.py:Net",
        "torchvision.models:resnet18",
        "timm:hf-hub:a/b",
        "timm:local-dir:/tmp",
        "timm:",
        "torchvision:resnet18\n",
        " timm:resnet18",
        "transformers:dir",
        "",
    ):
        assert not from_file_allowed(spec)


# --- the number of classes ---


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("resnet18", 7),
        ("resnet18", 1000),
        ("mobilenet_v2", 1),
        ("squeezenet1_1", 512),
        ("regnet_y_400mf", 8),  # does not build without memory
    ],
)
def test_torchvisions_class_count_is_read_off_the_checkpoint(name, classes):
    tensors = torchvision.models.get_model(name, num_classes=classes).state_dict()
    model = build_model(f"torchvision:{name}", None, tensors)
    model.load_state_dict(tensors)


def test_the_class_count_of_a_detector_is_read_off_its_products():
    name = "ssdlite320_mobilenet_v3_large"  # classes times anchors channels
    with torch.device("meta"):
        tensors = torchvision.models.get_model(
            name, num_classes=5, weights_backbone=None
        ).state_dict()
    model = build_model(f"torchvision:{name}", None, tensors)
    assert shapes(model) == {key: tensor.shape for key, tensor in tensors.items()}


def test_timms_class_count_is_read_off_the_checkpoint():
    timm = pytest.importorskip("timm")
    tensors = timm.create_model("resnet18", num_classes=6).state_dict()
    build_model("timm:resnet18", None, tensors).load_state_dict(tensors)


@pytest.mark.parametrize("name", ["Net", "needs_classes", "not_on_meta"])
@pytest.mark.parametrize("classes", [1, 10, 11, 13, 37])
def test_a_callables_class_count_is_read_off_the_checkpoint(nets, name, classes):
    tensors = build_model(f"{nets}:Net", {"num_classes": classes}).state_dict()
    build_model(f"{nets}:{name}", None, tensors).load_state_dict(tensors)


def test_stated_classes_are_not_overruled(nets):
    tensors = build_model(f"{nets}:Net", {"num_classes": 7}).state_dict()
    model = build_model(f"{nets}:Net", {"num_classes": 5}, tensors)
    assert model.head.out_features == 5


def test_contradicting_tensors_decide_nothing(nets):
    tensors = build_model(f"{nets}:Net", {"num_classes": 7}).state_dict()
    tensors["scale"] = torch.ones(8)
    assert build_model(f"{nets}:Net", None, tensors).head.out_features == 10
    with pytest.raises(ModelError, match=r"needs n_classes.*Give --model-arg n_classes=N"):
        build_model(f"{nets}:needs_classes", None, tensors)


def test_a_builder_without_classes_is_left_alone(nets):
    model = build_model(f"{nets}:headless", None, {"weight": torch.ones(9, 5, 1, 1)})
    assert model.weight.shape == (1, 5, 1, 1)


@pytest.mark.parametrize("auxiliary", [True, False])
@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("googlenet", "aux_logits"),
        ("inception_v3", "aux_logits"),
        ("fcn_resnet50", "aux_loss"),
    ],
)
def test_auxiliary_parts_are_there_if_the_checkpoint_has_them(name, argument, auxiliary):
    options = {argument: auxiliary, "num_classes": 4}
    with torch.device("meta"):
        wanted = build_model(f"torchvision:{name}", options)
    tensors = {key: torch.empty(s, device="meta") for key, s in shapes(wanted).items()}
    assert shapes(build_model(f"torchvision:{name}", None, tensors)) == shapes(wanted)


def test_a_model_far_larger_than_its_checkpoint_is_not_built():
    with pytest.raises(ModelError, match=r"resnet18: has \d+ values, the checkpoint only 3;"):
        build_model("torchvision:resnet18", {"num_classes": 10**9}, {"fc.bias": torch.ones(3)})


# --- refusals ---


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("torchvision:resnet5", "has no model of that name. Did you mean resnet50"),
        ("torchvision:qqqqqqqq", "See torchvision's list"),
        ("resnet18", r"expected torchvision:NAME.*Did you mean torchvision:resnet18\?"),
        ("", "is not a model, expected"),
        ("torchvision:", "is not a model, expected"),
        (":", "is not a model, expected"),
        ("transformers:folder", r"there is no config\.json in folder"),
        ("no_such_module_here:net", "there is no module no_such_module_here"),
        ("torch.no_such:net", r"there is no module torch\.no_such"),
        ("..up:net", "importing ..up failed"),
        ("torch.nn:Linea", r"there is no Linea in it\. Did you mean Linear\?"),
        ("torch.nn:Linear.nope", "there is no nope in it"),
        ("torch.nn:functional", "is of type module, expected a class or function"),
        ("collections:OrderedDict", "returned OrderedDict, expected a torch.nn.Module"),
        ("torch.nn:Linear", "argument in_features, out_features is missing"),
        ("no/such/file.py:Net", "no such file"),
        ("tests:Net", "there is no Net in it"),
        ("{nets}:Nett", r"there is no Nett in it\. Did you mean Net\?"),
        ("{nets}:NUMBER", "is of type int"),
        ("{nets}:INSTANCE", "is a model, expected a class or function"),
        ("{nets}:gives_number", "returned int, expected"),
        ("{nets}:fails", r"failed \(KeyError: 'two\\nlines', at .*:[0-9]+\)"),
        ("{nets}:leaves", r"failed \(SystemExit: 3, at .*:[0-9]+\)"),
        ("{nets}:needs_classes", "argument n_classes is missing"),
    ],
)
def test_specs_that_give_no_model_are_refused(nets, spec, match):
    spec = spec.format(nets=nets)
    with pytest.raises(ModelError, match=match) as caught:
        build_model(spec)
    assert str(caught.value).startswith(f"{spec}: ")
    assert caught.value.name == spec
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("def net(:\n", "SyntaxError"),
        ("import no_such_dependency\n", "ModuleNotFoundError: No module named 'no_such_dep"),
        ("raise SystemExit('done')\n", "SystemExit: done"),
        ("1 / 0\n", "ZeroDivisionError"),
    ],
)
def test_files_that_cannot_be_imported_are_refused(tmp_path, monkeypatch, text, match):
    (tmp_path / "broken_net.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(ModelError, match=rf"broken_net\.py:net: importing .* failed \({match}"):
        build_model(f"{tmp_path}/broken_net.py:net")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=rf"broken_net:net: importing .* failed \({match}"):
        build_model("broken_net:net")
    assert not [name for name in set(sys.modules) - before if "broken_net" in name]


def test_an_interrupt_in_the_users_code_stays_one(tmp_path):
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt('stop')\n")
    with pytest.raises(KeyboardInterrupt, match="stop"):
        build_model(f"{tmp_path}/slow.py:net")
    assert not [name for name in sys.modules if "slow_" in name and "bnfix" in name]


@pytest.mark.parametrize(
    ("spec", "arguments", "match"),
    [
        ("{nets}:Net", {"colour": 1, "size": 2}, r"unknown argument colour, size \(takes num_cl"),
        ("{nets}:gives_number", {"colour": 1}, r"unknown argument colour \(takes no arguments\)"),
        ("{nets}:needs_classes", {"b": 1}, "unknown argument b .*; argument n_classes is missing"),
        ("{nets}:any_options", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("{nets}:Net", {"width": "wide"}, "building the model failed .TypeError"),
        ("torchvision:resnet18", {"colour": 1}, "unexpected keyword argument 'colour'"),
        ("torchvision:resnet18", {"weights": "DEFAULT"}, "argument weights is not accepted"),
        ("torchvision:fcn_resnet50", {"weights_backbone": "DEFAULT"}, "weights_backbone is not"),
        ("timm:resnet18", {"checkpoint_path": "x.pth"}, "argument checkpoint_path is not accepted"),
        ("timm:resnet18", {"pretrained": True}, "argument pretrained is not accepted"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_by_name(nets, spec, arguments, match):
    with pytest.raises(ModelError, match=match):
        build_model(spec.format(nets=nets), arguments)


def test_a_needed_class_count_without_a_checkpoint_is_missing(nets):
    with pytest.raises(ModelError, match="argument n_classes is missing"):
        build_model(f"{nets}:needs_classes")


@pytest.mark.parametrize("name", ["resnt50", "hf-hub:timm/resnet18", "local-dir:/tmp"])
def test_unknown_timm_names_are_refused_and_nothing_is_fetched(name):
    pytest.importorskip("timm")
    with pytest.raises(ModelError, match="timm has no model of that name"):
        build_model(f"timm:{name}")


def test_without_timm_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModelError, match=r"timm:resnet18: needs timm.*pip install 'bnfix\[timm\]'"):
        build_model("timm:resnet18")
    with pytest.raises(ModelError, match=r"pip install 'bnfix\[timm\]'"):
        preset_preprocessing("timm:resnet18")


# --- channels and preprocessing ---


def test_input_channels_are_the_first_convolutions():
    assert input_channels(build_model("torchvision:resnet18")) == 3
    assert input_channels(nn.Sequential(nn.BatchNorm1d(2), nn.Conv1d(2, 4, 1))) == 2
    assert input_channels(nn.Linear(2, 2)) is None
    assert input_channels(nn.LazyConv2d(4, 1).eval()) is None


def test_input_channels_of_a_net_that_shadows_modules():
    net = nn.Sequential(nn.Conv2d(4, 1, 1))
    net.modules = [1, 2]  # type: ignore[assignment]
    assert input_channels(net) == 4


def test_default_preprocessing_is_that_of_the_first_imagenet_weights():
    found, note = default_preprocessing("torchvision:inception_v3")
    assert found == Preprocessing(resize=(342,), crop=(299, 299), **IMAGENET)
    assert note == "preprocessing of torchvision's Inception_V3_Weights.IMAGENET1K_V1"
    for spec in ("torchvision:fcn_resnet50", "torchvision:r3d_18", "torchvision:x", "a.py:Net"):
        assert default_preprocessing(spec) is None


def test_presets():
    found = preset_preprocessing("torchvision:ResNet50_Weights.IMAGENET1K_V2")
    assert found == Preprocessing(resize=(232,), crop=(224, 224), **IMAGENET)
    found = preset_preprocessing("torchvision:EfficientNet_B0_Weights.DEFAULT")
    assert found.interpolation == "bicubic"


def test_timm_presets():
    pytest.importorskip("timm")
    half = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    found = preset_preprocessing("timm:tf_efficientnet_lite0")
    assert found == Preprocessing((256,), (224, 224), "bicubic", **half)
    found = preset_preprocessing("timm:resnet50.a1_in1k")
    assert found == Preprocessing((235,), (224, 224), "bicubic", **IMAGENET)


@pytest.mark.parametrize(
    ("preset", "match"),
    [
        ("resnet50", "expected torchvision:WEIGHTS_NAME"),
        ("torchvision:ResNet50_Weights.V3", r"Did you mean ResNet50_Weights\.IMAGENET1K_V"),
        ("torchvision:resnet50", "torchvision has no such weights"),
        ("torchvision:__class__.__name__", "torchvision has no such weights"),
        ("torchvision:FCN_ResNet50_Weights.DEFAULT", "does not preprocess for image class"),
        ("timm:resnt50", "timm has no such model. Did you mean resnet50"),
        ("timm:resnet50.no_such_tag", "timm has no such model"),
    ],
)
def test_unknown_presets_are_refused(preset, match):
    if preset.startswith("timm:"):
        pytest.importorskip("timm")
    with pytest.raises(ConfigError, match=match) as caught:
        preset_preprocessing(preset)
    assert str(caught.value).startswith(f"--preset {preset}: ")


@needs_data
@pytest.mark.data
def test_a_real_checkpoint_fits_the_model_built_for_it():
    from bnfix.checkpoints.checkpoint import read_checkpoint

    tensors = read_checkpoint(DATA / "mobilenet_v2-b0353104.pth").tensors
    build_model("torchvision:mobilenet_v2", None, tensors).load_state_dict(tensors)


def test_layers_that_the_builder_freezes_stay_frozen(tmp_path):
    (tmp_path / "built.py").write_text(
        "from torch import nn\n"
        "def net(rest='eval'):\n"
        "    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4))\n"
        "    net[1].eval().requires_grad_(False)\n"
        "    return net.eval() if rest == 'no' else net\n"
    )
    for arguments, frozen in (({}, ("1",)), ({"rest": "no"}, ())):
        model = build_model(f"{tmp_path}/built.py:net", arguments)
        done = recalibrate_(model, [torch.randn(4, 3, 6, 6)])
        assert done.exceptions.frozen == frozen
