"""Reading foreign files, refusing hostile ones, and writing whole files or none."""

import argparse
import hashlib
import io
import json
import os
import pickle
import random
import stat
import struct
import tarfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from bnfix.checkpoints.checkpoint import misfits_of, read_checkpoint
from bnfix.checkpoints.read import sha256_of
from bnfix.checkpoints.save import check_output, write_checkpoint, write_text
from bnfix.core.errors import CheckpointError, ConfigError
from tests.real import DATA, needs_data

HEADER = {"format": 1, "bnfix": "0.1.0"}


def tensors() -> dict[str, torch.Tensor]:
    return {"conv.weight": torch.arange(6.0).reshape(2, 3), "bn.running_mean": torch.ones(2)}


def saved(path: Path, content: object, **options: object) -> Path:
    torch.save(content, path, **options)
    return path


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)


# --- what is read ---


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".weights", ""])
@pytest.mark.parametrize("zipped", [True, False])
def test_reads_torch_files_of_any_suffix(tmp_path, suffix, zipped):
    path = saved(tmp_path / f"net{suffix}", tensors(), _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(path)
    assert_same(found.tensors, tensors())
    assert (found.key, found.prefix, found.metadata) == ("", "", None)
    assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == sha256_of(path)


@pytest.mark.parametrize("name", ["net.safetensors", "net.bin", "net"])
def test_reads_safetensors_by_content(tmp_path, name):
    save_file(tensors(), tmp_path / name)
    assert_same(read_checkpoint(tmp_path / name).tensors, tensors())


def test_reads_a_file_saved_without_checksums(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "net.pth", tensors())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_same(read_checkpoint(path).tensors, tensors())


def test_parameters_come_without_gradients_and_subclasses_are_refused(tmp_path):
    weight = nn.Parameter(torch.ones(2))
    found = read_checkpoint(saved(tmp_path / "a.pth", {"w": weight})).tensors["w"]
    assert type(found) is torch.Tensor
    assert not found.requires_grad
    sparse = saved(tmp_path / "b.pth", {"w": torch.eye(3).to_sparse(), "ok": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"b\.pth: w: .*expected dense tensors"):
        read_checkpoint(sparse)


@pytest.mark.parametrize("zipped", [True, False])
def test_inert_objects_are_read_past(tmp_path, zipped):
    content = {
        "args": argparse.Namespace(lr=0.1, sizes=np.arange(3), name="x"),
        "best": np.float64(0.5),
        "confusion": np.eye(2, dtype=np.float32),
        "dtype": np.dtype("int64"),
        "epoch": 3,
        "state_dict": OrderedDict(tensors()),
    }
    path = saved(tmp_path / "net.pth", content, _use_new_zipfile_serialization=zipped)
    assert_same(read_checkpoint(path).tensors, tensors())


def test_numpy_under_its_old_module_name_is_read_past(tmp_path):
    path = tmp_path / "net.pth"
    content = io.BytesIO()
    torch.save({"best": np.float64(0.5), **tensors()}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.infolist():
            data = old.read(entry)
            new.writestr(entry.filename, data.replace(b"numpy._core.", b"numpy.core."))
    found = read_checkpoint(path)
    assert_same(found.tensors, tensors())
    assert found.notes == ("1 entries ignored that are not tensors: best",)


def test_an_object_array_is_never_built(tmp_path):
    path = saved(tmp_path / "net.pth", {"a": np.array([{}], dtype=object), **tensors()})
    assert_same(read_checkpoint(path).tensors, tensors())


def test_globals_allowed_for_one_file_are_withdrawn(tmp_path):
    before = sorted(map(repr, torch.serialization.get_safe_globals()))  # torch keeps a set
    read_checkpoint(saved(tmp_path / "net.pth", {"a": argparse.Namespace(), **tensors()}))
    assert sorted(map(repr, torch.serialization.get_safe_globals())) == before


# --- nesting ---


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ({"state_dict": "W"}, "state_dict"),
        ({"model": {"state_dict": "W"}}, "model.state_dict"),
        ({"ema": {"module": {"model": "W"}}}, "ema.module.model"),
        ({"state_dict_ema": {"other": torch.zeros(1)}, "model": "W"}, "model"),
        ({"model_ema": "W", "best_acc1": torch.tensor(7.0)}, "model_ema"),
        ({"epoch": 1, "net": "W", "optimizer": {"state": {0: {"m": torch.ones(1)}}}}, "net"),
        # as Lightning writes it
        (
            {
                "pytorch-lightning_version": "2.4.0",
                "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.1)}},
                "hyper_parameters": {"lr": 0.1},
                "state_dict": "W",
            },
            "state_dict",
        ),
    ],
)
def test_nesting_is_found_and_noted(tmp_path, content, key):
    def filled(value: object) -> object:
        if isinstance(value, dict):
            return {name: filled(item) for name, item in value.items()}
        return tensors() if isinstance(value, str) and value == "W" else value

    found = read_checkpoint(saved(tmp_path / "net.pth", filled(content)))
    assert_same(found.tensors, tensors())
    assert found.key == key
    assert any(repr(key) in note for note in found.notes)


def test_nesting_is_followed_three_deep_and_no_deeper(tmp_path):
    deep = {"model": {"model": {"model": {"model": tensors()}}}}
    with pytest.raises(CheckpointError, match=r"net\.pth: holds no state dict .*found none"):
        read_checkpoint(saved(tmp_path / "net.pth", deep))
    with pytest.raises(CheckpointError, match=r"state dicts: found at the top level\. Leave --key"):
        read_checkpoint(saved(tmp_path / "net.pth", tensors()), key="ema")


def test_the_other_state_dict_is_noted_and_key_chooses_it(tmp_path):
    ema = {"conv.weight": torch.zeros(2, 3)}
    path = saved(tmp_path / "net.pth", {"state_dict": tensors(), "state_dict_ema": ema})
    assert "not used: state_dict_ema (--key chooses)" in read_checkpoint(path).notes
    found = read_checkpoint(path, key="state_dict_ema")
    assert_same(found.tensors, ema)
    assert found.key == "state_dict_ema"


def test_key_may_be_dotted_hold_dots_and_lead_to_a_nest(tmp_path):
    content = {"nets.v2": {"encoder": {"state_dict": tensors()}}, "x": {}}
    path = saved(tmp_path / "net.pth", content)
    found = read_checkpoint(path, key="nets.v2.encoder")
    assert found.key == "nets.v2.encoder.state_dict"
    assert_same(found.tensors, tensors())


def test_wrong_key_lists_the_right_ones(tmp_path):
    path = saved(tmp_path / "net.pth", {"gen": tensors(), "disc": tensors(), "epoch": 3})
    with pytest.raises(CheckpointError, match=r"has no 'netG'; state dicts: found under gen, disc"):
        read_checkpoint(path, key="netG")
    with pytest.raises(CheckpointError, match=r"under 'epoch'; found under gen, disc.*--key"):
        read_checkpoint(path, key="epoch")
    with pytest.raises(CheckpointError, match=r"holds no state dict.*found under gen, disc.*--key"):
        read_checkpoint(path)


@pytest.mark.parametrize("content", [[torch.ones(1)], torch.ones(1), {}, {"a": 1}, {3: {}}, None])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    with pytest.raises(CheckpointError, match=r"net\.pth: holds no state dict"):
        read_checkpoint(saved(tmp_path / "net.pth", content))


def test_a_dict_that_holds_itself_ends(tmp_path):
    content: dict[str, object] = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="holds no state dict"):
        read_checkpoint(saved(tmp_path / "net.pth", content))


# --- prefixes ---


def prefixed(path: Path, *names: str) -> Path:
    save_file({name: torch.ones(1) for name in names}, path)
    return path


@pytest.mark.parametrize(
    ("names", "prefix"),
    [
        (["module.a", "module.b.c"], "module."),
        (["_orig_mod.module.a"], "_orig_mod.module."),
        (["model.model.a", "model.model.b"], "model.model."),
        (["module.a", "b"], ""),
        (["modules.a", "modules.b"], ""),
    ],
)
def test_shared_prefixes_are_stripped(tmp_path, names, prefix):
    found = read_checkpoint(prefixed(tmp_path / "a.safetensors", *names))
    assert found.prefix == prefix
    assert list(found.tensors) == sorted(name.removeprefix(prefix) for name in names)
    assert (f"prefix {prefix!r} stripped" in found.notes) == bool(prefix)


@pytest.mark.parametrize(
    ("names", "expected", "prefix"),
    [
        (["model.a", "model.b"], ["model.a", "model.b"], ""),
        (["module.model.a", "module.model.b"], ["model.a", "model.b"], "module."),
        (["model.a", "model.b", "loss.c"], ["a", "b"], "model."),
        (["model.a", "b"], ["q"], ""),
        (["model.a", "model.b"], ["q"], "model."),
        (["module.a", "a"], ["a"], ""),
    ],
)
def test_expected_names_decide_what_is_stripped(tmp_path, names, expected, prefix):
    found = read_checkpoint(prefixed(tmp_path / "a.safetensors", *names), expected=expected)
    assert found.prefix == prefix
    assert len(found.tensors) == len(names)


def test_an_averaged_models_counter_is_left_out(tmp_path):
    net = nn.Linear(2, 1)
    averaged = torch.optim.swa_utils.AveragedModel(net)
    found = read_checkpoint(saved(tmp_path / "net.pth", averaged.state_dict()))
    assert set(found.tensors) == {"weight", "bias"}
    assert any("n_averaged" in note for note in found.notes)


def test_prefix_says_otherwise(tmp_path):
    path = prefixed(tmp_path / "a.safetensors", "module.net.a", "module.net.b", "module.loss")
    assert list(read_checkpoint(path, prefix="module.net").tensors) == ["a", "b"]
    assert "1 names without that prefix left out: module.loss" in (
        read_checkpoint(path, prefix="module.net.").notes
    )
    assert "module.net.a" in read_checkpoint(path, prefix="").tensors
    with pytest.raises(CheckpointError, match=r"no name begins with 'wrong\.'; .* with module\."):
        read_checkpoint(path, prefix="wrong")


# --- keys ---


def test_all_misfits_at_once():
    shapes = {n: torch.Size([2]) for n in ("a", "b", "bn.num_batches_tracked", "c")}
    found = {"a": torch.ones(2), "b": torch.ones(3, 1), "z": torch.ones(1)}
    misfits = misfits_of(shapes, found)
    assert (misfits.missing, misfits.unexpected) == (["c"], ["z"])
    assert len(misfits) == 3
    assert str(misfits) == (
        "c: missing from the file; b: (3, 1) in the file, (2,) in the model; z: not in the model"
    )
    assert not misfits_of({"a": torch.Size([2])}, {"a": torch.ones(2)})


# --- the header ---


def headed(path: Path, text: str) -> Path:
    save_file(tensors(), path, metadata={"bnfix": text})
    return path


def test_the_header_is_parsed_and_foreign_metadata_is_not(tmp_path):
    path = headed(tmp_path / "a.safetensors", json.dumps(HEADER | {"norms": {"bn": 0.5}}))
    assert read_checkpoint(path).metadata == HEADER | {"norms": {"bn": 0.5}}
    save_file(tensors(), tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert read_checkpoint(tmp_path / "b.safetensors").metadata is None


def test_a_file_of_ours_keeps_names_that_look_like_prefixes(tmp_path):
    names = {"model.a": torch.ones(1)}
    write_checkpoint(tmp_path / "a.safetensors", names, HEADER, force=False)
    assert list(read_checkpoint(tmp_path / "a.safetensors").tensors) == ["model.a"]
    found = read_checkpoint(tmp_path / "a.safetensors", expected=["a"])
    assert list(found.tensors) == ["a"]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("{", "header is not JSON"),
        ('{"format": 1, "x": NaN}', "header is not JSON"),
        ("[" * 100_000, "header is not JSON"),
        ("[1]", "not an object with an integer"),
        ("{}", "not an object with an integer"),
        ('{"format": "1"}', "not an object with an integer"),
        ('{"format": true}', "not an object with an integer"),
        ('{"format": 1.0}', "not an object with an integer"),
        ('{"format": 0}', "not an object with an integer"),
        ('{"format": 2}', "format 2, expected at most 1: a newer bnfix wrote it. Upgrade"),
    ],
)
def test_bad_headers_are_refused(tmp_path, text, match):
    with pytest.raises(CheckpointError, match=rf"a\.safetensors: .*{match}"):
        read_checkpoint(headed(tmp_path / "a.safetensors", text))


def test_an_overlong_header_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bnfix.checkpoints.read.TEXT_LIMIT", 100)
    text = json.dumps(HEADER | {"x": "y" * 100})
    with pytest.raises(CheckpointError, match="characters, more than 100"):
        read_checkpoint(headed(tmp_path / "a.safetensors", text))


# --- shards ---


def sharded(folder: Path, weight_map: object = None) -> Path:
    names = tensors()
    for number, name in enumerate(names):
        save_file({name: names[name]}, folder / f"model-{number}.safetensors")
    index = folder / "model.safetensors.index.json"
    usual = {name: f"model-{number}.safetensors" for number, name in enumerate(names)}
    index.write_text(json.dumps({"weight_map": usual if weight_map is None else weight_map}))
    return index


def test_reads_a_sharded_file(tmp_path):
    index = sharded(tmp_path)
    found = read_checkpoint(index)
    assert_same(found.tensors, tensors())
    content = [index, tmp_path / "model-0.safetensors", tmp_path / "model-1.safetensors"]
    joined = b"".join(path.read_bytes() for path in content)
    assert found.sha256 == hashlib.sha256(joined).hexdigest()


@pytest.mark.parametrize(
    ("weight_map", "match"),
    [
        ([], "is not an index"),
        ({}, "names no files"),
        ({"a": 3}, "names no files"),
        ({"a": "../model-0.safetensors"}, "next to the index"),
        ({"a": "/etc/x.safetensors"}, "next to the index"),
        ({"a": "model.pth"}, "next to the index"),
        ({"a": "gone.safetensors"}, r"gone\.safetensors: no such file"),
        ({"other": "model-0.safetensors"}, "its shards lack other"),
    ],
)
def test_bad_indexes_are_refused(tmp_path, weight_map, match):
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(sharded(tmp_path, weight_map))


# --- hostile and damaged files ---


class Trap:
    """Pickles to a call that would create a file."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return Path.touch, (self.target,)


class SystemTrap(Trap):
    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("trap", [Trap, SystemTrap])
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_in_a_pickle_is_executed(tmp_path, trap, zipped):
    planted = tmp_path / "planted"
    content = {"state_dict": tensors(), "x": trap(planted)}
    path = saved(tmp_path / "net.pth", content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"net\.pth: not loaded, it holds pickled objects"):
        read_checkpoint(path)
    assert not planted.exists()
    pickle.loads(pickle.dumps(trap(planted)))
    assert planted.exists()  # the trap itself works


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_a_plain_pickle_is_refused_by_its_names(tmp_path, protocol):
    planted = tmp_path / "planted"
    path = tmp_path / "net.pth"
    path.write_bytes(pickle.dumps(Trap(planted), protocol=protocol))
    match = "not from torch.save.*pathlib" if protocol else "not a torch file"
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(path)
    assert not planted.exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_whole_model_is_refused_with_its_blocked_names(tmp_path, zipped, protocol):
    path = saved(
        tmp_path / "net.pth",
        nn.Sequential(nn.Linear(1, 1), nn.ReLU()),
        _use_new_zipfile_serialization=zipped,
        pickle_protocol=protocol,
    )
    match = r"torch\.nn\.modules\.activation\.ReLU, .*Sequential, .*Linear\).*only model\.state"
    with pytest.raises(CheckpointError, match=match):
        read_checkpoint(path)


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, **changes: bytes) -> Path:
    content = io.BytesIO()
    torch.save({"w": torch.zeros(1000)}, content)
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(path, "w", compression) as new:
        for entry in old.infolist():
            key = entry.filename.rpartition("/")[2].replace(".", "_")
            new.writestr(entry.filename, changes.get(key, old.read(entry)))
    return path


def test_a_recompressed_archive_is_read(tmp_path):
    path = rezipped(tmp_path / "net.pth", zipfile.ZIP_DEFLATED)
    assert_same(read_checkpoint(path).tensors, {"w": torch.zeros(1000)})


def test_a_compressed_bomb_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("bnfix.checkpoints.read._INFLATED_FLOOR", 1000)
    path = rezipped(tmp_path / "net.pth", zipfile.ZIP_DEFLATED, **{"0": bytes(10**6)})
    with pytest.raises(CheckpointError, match=r"directory claims 1000\d\d\d bytes compressed"):
        read_checkpoint(path)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_storage_smaller_than_claimed_is_refused(tmp_path, compression):
    path = rezipped(tmp_path / "net.pth", compression, **{"0": bytes(3999)})
    with pytest.raises(CheckpointError, match="storage 0 claims 4000 bytes and holds 3999"):
        read_checkpoint(path)


def test_directory_sizes_that_lie_are_refused(tmp_path):
    path = rezipped(tmp_path / "net.pth")
    content = bytearray(path.read_bytes())
    place = content.rfind(b"PK\x01\x02")  # the last entry's record in the central directory
    content[place + 24 : place + 28] = struct.pack("<I", 10**9)
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="contradict the file"):
        read_checkpoint(path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_duplicate_names_in_an_archive_are_refused(tmp_path):
    path = rezipped(tmp_path / "net.pth")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(archive.namelist()[0], b"other")
    with pytest.raises(CheckpointError, match="contradict the file"):
        read_checkpoint(path)


def test_a_legacy_file_that_claims_too_much_is_refused(tmp_path):
    path = saved(tmp_path / "n.pth", {"w": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"M\xe8\x03", b"J\xff\xff\xff\x7f", 1))
    with pytest.raises(CheckpointError, match="claims 8589934588 bytes of tensors in"):
        read_checkpoint(path)


def test_a_tensor_that_repeats_itself_endlessly_is_refused(tmp_path):
    path = saved(tmp_path / "net.pth", {"w": torch.zeros(1).expand(10**9)})
    with pytest.raises(
        CheckpointError, match=r"w: .*expected dense tensors that fill their memory"
    ):
        read_checkpoint(path)
    small = saved(tmp_path / "small.pth", {"w": torch.zeros(1).expand(100)})
    assert read_checkpoint(small).tensors["w"].shape == (100,)


def test_a_memo_bomb_is_refused(tmp_path):
    hostile = b"\x80\x02}r\xff\xff\xff\x7f."
    path = rezipped(tmp_path / "net.pth", data_pkl=hostile)
    with pytest.raises(CheckpointError, match="memo index 2147483647 is out of order"):
        read_checkpoint(path)


def test_a_script_archive_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", b"\x80\x02}.")
        archive.writestr("net/constants.pkl", b"\x80\x02).")
    with pytest.raises(CheckpointError, match=r"net\.pt: is a TorchScript archive"):
        read_checkpoint(path)


def test_files_of_other_kinds_are_refused_by_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with tarfile.open(tmp_path / "b.tar", "w") as archive:
        archive.add(tmp_path / "a.pth")
    (tmp_path / "c.pth").write_bytes(b"<html>not found</html>")
    (tmp_path / "d.onnx").write_bytes(b"\x08\x07\x12\x07pytorch")
    (tmp_path / "e.safetensors").write_bytes((tmp_path / "a.pth").read_bytes())
    (tmp_path / "f.pth").write_bytes(b"")
    (tmp_path / "g.pth").mkdir()
    os.mkfifo(tmp_path / "h.pth")
    for name, match in {
        "a.pth": "is a zip archive, but not from torch.save",
        "b.tar": "is a real tar archive",
        "c.pth": "is not a torch file by its first bytes",
        "d.onnx": "is an exported network",
        "e.safetensors": "cannot be read, it is damaged or not a checkpoint",
        "f.pth": "is empty",
        "g.pth": "is a folder",
        "h.pth": "is not a regular file",
        "i.pth": "no such file",
        "j.pth" * 100: "cannot be opened",
    }.items():
        with pytest.raises(CheckpointError, match=rf"{name}: {match}") as caught:
            read_checkpoint(tmp_path / name)
        assert caught.value.path == tmp_path / name
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["a.safetensors", "zip.pth", "legacy.pth"])
def test_truncated_files_are_refused(tmp_path, kind):
    path = tmp_path / kind
    if kind.endswith(".pth"):
        saved(path, tensors(), _use_new_zipfile_serialization=kind == "zip.pth")
    else:
        save_file(tensors(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=rf"{kind}: .*damaged") as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "weights_only=False" not in str(caught.value)


def test_control_signs_of_a_file_do_not_reach_the_message(tmp_path):
    path = saved(tmp_path / "net.pth", {"\x1b[31mred\n": {"a": torch.ones(1)}})
    with pytest.raises(CheckpointError, match=r"found under \?\[31mred\. ") as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


def damaged(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    if rng.random() < 0.2:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.choice([1, 1, 4, 32])):
        # the head holds the structure; plain tensor bytes cannot go wrong
        span = len(changed) if rng.random() < 0.5 else min(len(changed), 400)
        changed[rng.randrange(span)] = rng.randrange(256)
    return bytes(changed)


@pytest.mark.parametrize("kind", ["a.safetensors", "zip.pth", "legacy.pth"])
def test_damage_gives_a_checkpoint_or_a_stated_error(tmp_path, kind):
    path = tmp_path / kind
    content = {"state_dict": tensors(), "args": argparse.Namespace(a=1), "n": np.float32(1)}
    if kind.endswith(".pth"):
        saved(path, content, _use_new_zipfile_serialization=kind == "zip.pth")
    else:
        save_file(tensors(), path, metadata={"bnfix": json.dumps(HEADER)})
    whole = path.read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(60):
        path.write_bytes(damaged(whole, rng))
        try:
            found = read_checkpoint(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            assert found.tensors
            assert all(t.sum().ndim == 0 for t in found.tensors.values() if t.numel())
    assert 10 < len(messages)
    assert all(kind in message and "\n" not in message for message in messages)


# --- writing ---


EXACT = {
    "half": torch.tensor([1.5, -0.0, 65504.0], dtype=torch.float16),
    "brain": torch.tensor([[1.0], [3e38]], dtype=torch.bfloat16),
    "double": torch.tensor([1 / 3, float("nan"), float("inf")], dtype=torch.float64),
    "tiny": torch.tensor([1e-45, 1e-40]),
    "int8": torch.tensor([-128, 127], dtype=torch.int8),
    "flag": torch.tensor([True, False]),
    "count": torch.tensor(2**62),
    "none": torch.zeros(0, 3),
}


def test_values_are_kept_bit_for_bit(tmp_path):
    path = tmp_path / "out.safetensors"
    write_checkpoint(path, EXACT, HEADER, force=False)
    for found in (read_checkpoint(path).tensors, load_file(path)):
        assert set(found) == set(EXACT)
        for name, tensor in EXACT.items():
            assert found[name].dtype == tensor.dtype
            assert found[name].shape == tensor.shape
            raw = found[name].reshape(-1).view(torch.uint8)
            assert torch.equal(raw, tensor.reshape(-1).view(torch.uint8))


def test_the_file_is_the_same_each_time_and_has_one_metadata_key(tmp_path):
    for name in ("a", "b"):
        write_checkpoint(tmp_path / f"{name}.safetensors", tensors(), HEADER, force=False)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert file.metadata() == {"bnfix": json.dumps(HEADER)}


def test_shared_and_strided_tensors_are_written_under_each_name(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    shared = {
        "a": base,
        "b": base,
        "row": base[1],
        "turned": base.t(),
        "wide": torch.ones(1).expand(3),
        "parameter": nn.Parameter(torch.ones(2)),
    }
    given = dict(shared)
    write_checkpoint(tmp_path / "a.safetensors", shared, HEADER, force=False)
    assert all(shared[name] is tensor for name, tensor in given.items())
    assert list(shared) == list(given)
    assert_same(read_checkpoint(tmp_path / "a.safetensors").tensors, shared)


def test_numbers_that_are_not_finite_become_null(tmp_path):
    metadata = HEADER | {"a": float("nan"), "b": [float("inf"), {"c": (1.5, -float("inf"))}]}
    given = json.dumps(metadata)
    write_checkpoint(tmp_path / "a.safetensors", tensors(), metadata, force=False)
    found = read_checkpoint(tmp_path / "a.safetensors").metadata
    assert found == HEADER | {"a": None, "b": [None, {"c": [1.5, None]}]}
    assert json.dumps(metadata) == given


@pytest.mark.parametrize(
    ("bad", "metadata", "match"),
    [
        ({"x": 3}, HEADER, "x cannot be stored"),
        ({"x": torch.eye(2).to_sparse()}, HEADER, "x cannot be stored"),
        ({"x": torch.ones(1, device="meta")}, HEADER, "x cannot be stored"),
        ({3: torch.ones(1)}, HEADER, "3 cannot be stored"),
        ({"x": torch.ones(1)}, {"format": 1, "f": {1, 2}}, "metadata is not JSON"),
        ({"x": torch.ones(1)}, {}, "not an object with an integer `format`"),
        ({"__metadata__": torch.ones(1)}, HEADER, "__metadata__ cannot be stored"),
        ({"x": torch.ones(1, dtype=torch.complex128)}, HEADER, "not written .*complex128"),
    ],
)
def test_what_cannot_be_stored_leaves_no_file(tmp_path, bad, metadata, match):
    with pytest.raises(CheckpointError, match=rf"out\.safetensors: .*{match}"):
        write_checkpoint(tmp_path / "out.safetensors", tensors() | bad, metadata, force=False)
    assert list(tmp_path.iterdir()) == []


def test_a_failing_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "out.safetensors"
    write_checkpoint(path, tensors(), HEADER, force=False)
    before = path.read_bytes()
    unknown = {"x": torch.ones(1, dtype=torch.complex128)}
    with pytest.raises(CheckpointError, match="not written"):
        write_checkpoint(path, unknown, HEADER, force=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(_: int) -> None:
        raise KeyboardInterrupt("while syncing")

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt, match="while syncing"):
        write_checkpoint(tmp_path / "out.safetensors", tensors(), HEADER, force=False)
    assert list(tmp_path.iterdir()) == []


def test_a_file_may_be_replaced_while_it_is_read_from(tmp_path):
    path = tmp_path / "a.safetensors"
    write_checkpoint(path, tensors(), HEADER, force=False)
    found = read_checkpoint(path)
    changed = {name: tensor + 1 for name, tensor in found.tensors.items()}
    write_checkpoint(path, changed, HEADER, force=True)
    assert_same(found.tensors, tensors())
    assert_same(read_checkpoint(path).tensors, changed)


def test_new_files_are_readable_as_the_umask_says(tmp_path):
    write_checkpoint(tmp_path / "a.safetensors", tensors(), HEADER, force=False)
    write_text(tmp_path / "a.md", "text")
    (tmp_path / "usual").touch()
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert stat.S_IMODE((tmp_path / "a.safetensors").stat().st_mode) == usual
    assert stat.S_IMODE((tmp_path / "a.md").stat().st_mode) == usual


def test_check_output_refuses_before_any_work(tmp_path):
    (tmp_path / "old.safetensors").touch()
    (tmp_path / "dir.safetensors").mkdir()
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir(mode=0o555)
    for name, force, match in [
        ("old.safetensors", False, r"already exists\. .*--force"),
        ("link.safetensors", False, "already exists"),
        ("dir.safetensors", True, "is a folder"),
        ("out.pth", True, r"ends in \.safetensors.*Use out\.safetensors"),
        ("gone/out.safetensors", True, r"folder .*gone does not exist\. Create it"),
        ("old.safetensors/out.safetensors", True, "is not a folder"),
        ("closed/out.safetensors", True, "folder .*closed is read-only"),
        ("x" * 300 + ".safetensors", True, "cannot be written"),
    ]:
        kind = ConfigError if name == "out.pth" else CheckpointError  # a wrong name is wrong usage
        with pytest.raises(kind, match=match):
            check_output(tmp_path / name, force=force)
        with pytest.raises(kind, match=match):
            write_checkpoint(tmp_path / name, tensors(), HEADER, force=force)
    check_output(tmp_path / "new.safetensors", force=False)
    check_output(tmp_path / "old.safetensors", force=True)
    assert not (tmp_path / "new.safetensors").exists()


def test_write_text_replaces_whole(tmp_path):
    path = tmp_path / "report.md"
    write_text(path, "old")
    write_text(path, "µ \ud800")
    assert path.read_bytes() == "µ \\ud800".encode()
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(CheckpointError, match="does not exist"):
        write_text(tmp_path / "gone" / "report.md", "x")
    (tmp_path / "dir").mkdir()
    with pytest.raises(CheckpointError, match=r"dir: not written"):
        write_text(tmp_path / "dir", "x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir", "report.md"]


def test_sha256_of_a_missing_file_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"gone: cannot be read"):
        sha256_of(tmp_path / "gone")


# --- real files ---


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "n_tensors", "key", "prefix"),
    [
        ("cifar10/resnet20.th", 97, "state_dict", "module."),
        ("cifar10/resnet20_b.th", 116, "state_dict", "module."),
        ("cifar10/resnet32.th", 157, "state_dict", "module."),
        ("efficientnet_lite0.safetensors", 296, "", ""),
        ("mobilenet_v2-b0353104.pth", 314, "", ""),
        ("odd/cgnet_camvid.pth", 498, "model", ""),
        ("odd/crepe_tiny.pth", 44, "", ""),
        ("odd/espnet_camvid.pth", 189, "", ""),
        ("odd/fastestdet.pth", 420, "", ""),
        ("odd/retinaface_mobilenet025.pth", 300, "", ""),
        ("odd/usps.pth", 18, "", ""),
        ("odd/yolo_fastestv2.pth", 444, "", ""),
    ],
)
def test_real_files_are_read_and_written_back(tmp_path, name, n_tensors, key, prefix):
    found = read_checkpoint(DATA / name)
    assert (len(found.tensors), found.key, found.prefix) == (n_tensors, key, prefix)
    assert {t.device.type for t in found.tensors.values()} == {"cpu"}
    write_checkpoint(tmp_path / "out.safetensors", found.tensors, HEADER, force=False)
    assert_same(load_file(tmp_path / "out.safetensors"), found.tensors)
