import platform
import subprocess
import sys
from collections import UserDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.data import DataLoader, TensorDataset

import bnfix
from bnfix.core import runtime
from bnfix.core.errors import ConfigError, DataError, ModelError
from tests import nets

CPU = torch.device("cpu")


def test_devices():
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert runtime.resolve_device("auto").type == expected
    assert runtime.resolve_device("cpu") == CPU


@pytest.mark.parametrize("text", ["gpu", "", "cuda:x", "cuda:-1"])
def test_unknown_devices_are_refused(text):
    with pytest.raises(ConfigError, match=r"--device: '.*' is not known"):
        runtime.resolve_device(text)


@pytest.mark.parametrize("text", [f"cuda:{torch.cuda.device_count()}", "mps", "meta"])
def test_devices_that_are_not_there_are_refused(text):
    with pytest.raises(ConfigError, match=f"--device: '{text}' is not on this machine"):
        runtime.resolve_device(text)


def test_device_of_a_model():
    assert runtime.device_of(nets.plain()) == CPU
    assert runtime.device_of(nn.ReLU()) == CPU
    assert runtime.device_of(nn.Linear(2, 2, device="meta")).type == "meta"
    assert runtime.device_of(nn.BatchNorm1d(2, affine=False, device="meta")).type == "meta"


def test_autocast():
    x = torch.randn(2, 3)
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        with runtime.autocast(CPU, precision):
            assert nn.functional.linear(x, x).dtype == dtype
    with pytest.raises(ConfigError, match="--precision: 'int8' is not known"):
        runtime.autocast(CPU, "int8")


X, Y = torch.randn(2, 3), torch.tensor([0, 1])
Pair = namedtuple("Pair", ["image", "label"])


@pytest.mark.parametrize(
    "batch",
    [
        (X, Y),
        [X, Y],
        (X, Y, "name"),
        Pair(X, Y),
        {"pixel_values": X, "labels": Y},
        {"image": X, "label": Y, "id": 3},
        {"x": X, "y": Y},
        UserDict({"input": X, "target": Y}),
    ],
)
def test_unpack_finds_inputs_and_labels(batch):
    x, y = runtime.unpack(batch)
    assert x is X
    assert y is Y


@pytest.mark.parametrize("batch", [X, (X,), [X], {"images": X}])
def test_unpack_without_labels(batch):
    x, y = runtime.unpack(batch)
    assert x is X
    assert y is None


def test_unpack_refuses_what_it_does_not_know():
    with pytest.raises(
        DataError, match=r"keys \['mask', 'tokens'\], none of pixel_values.*forward"
    ):
        runtime.unpack({"tokens": X, "mask": X})
    for empty in ((), []):
        with pytest.raises(DataError, match="an empty tuple"):
            runtime.unpack(empty)


def test_move_keeps_the_nest():
    meta = torch.device("meta")
    value = {"a": [X, (X, "text")], "b": Pair(X, 3), "c": None, "d": torch.Size([2])}
    moved = runtime.move(value, meta)
    assert moved["a"][0].device == moved["a"][1][0].device == moved["b"].image.device == meta
    assert moved["a"][1][1] == "text"
    assert isinstance(moved["b"], Pair)
    assert isinstance(moved["d"], torch.Size)
    assert moved["c"] is None
    assert X.device == CPU


def test_move_takes_packed_sequences_whole():
    packed = pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    moved = runtime.move((packed, Y), torch.device("meta"))[0]
    assert moved.data.device.type == "meta"
    assert moved.batch_sizes.device == CPU


def test_run():
    net = nn.Linear(3, 2)
    assert torch.equal(runtime.run(net, (X, Y), CPU), net(X))
    batch = {"tokens": X, "mask": torch.tensor([True, False])}
    out = runtime.run(net, batch, CPU, lambda m, b: m(b["tokens"][b["mask"]]))
    assert torch.equal(out, net(X[:1]))


LOGITS, OTHER = torch.randn(2, 5), torch.randn(2, 7)
Named = namedtuple("Named", ["logits", "aux"])


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, torch.zeros(2, 3, 4, 4)),
        [LOGITS],
        {"scores": LOGITS},
        {"logits": LOGITS, "out": OTHER},
        {"out": LOGITS},
        SimpleNamespace(logits=LOGITS, out=OTHER),
        SimpleNamespace(out=LOGITS),
        Named(LOGITS, OTHER),
    ],
)
def test_logits_are_found(output):
    assert runtime.logits_of(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "found"),
    [
        (torch.zeros(2, 3, 4, 4), r"is Tensor of shape \(2, 3, 4, 4\), expected logits"),
        (torch.zeros(()), r"is Tensor of shape \(\), expected"),
        ((LOGITS, OTHER), r"several of its outputs .*0 \(2, 5\), 1 \(2, 7\)\. Name one with --out"),
        ("text", "is str, expected logits"),
        ((), "is tuple, expected logits"),
        ({"loss": torch.zeros(())}, "is Tensor of shape .*, expected logits"),
        (None, "is NoneType, expected logits.*forward="),
    ],
)
def test_what_holds_no_logits_is_refused(output, found):
    with pytest.raises(ModelError, match=found):
        runtime.logits_of(output)


def test_passes():
    batches = [1, 2]
    assert runtime.pass_of(batches, 3) is batches
    assert runtime.pass_of(lambda k: [k, k + 1], 3) == [3, 4]


def test_again_reads_iterators_only():
    assert runtime.again(x for x in (1, 2)) == [1, 2]
    batches = [1, 2]
    assert runtime.again(batches) is batches
    loader = DataLoader(TensorDataset(X, Y), shuffle=True)
    state = torch.random.get_rng_state()
    assert runtime.again(loader) is loader
    # asking a loader for an iterator would draw its seed (and start its workers)
    assert torch.equal(torch.random.get_rng_state(), state)

    def by_pass(k):
        return [k]

    assert runtime.again(by_pass) is by_pass


def test_hold_out_every_nth():
    left, held = runtime.hold_out(list(range(10)), None, every=4)
    assert (left, held) == ([1, 2, 3, 5, 6, 7, 9], [0, 4, 8])
    left, held = runtime.hold_out(iter(range(3)), None, every=5)
    assert (left, held) == ([1, 2], [0])
    left, held = runtime.hold_out(lambda k: [f"{k}{i}" for i in range(2)], None, every=5)
    assert (left, held) == (["01"], ["00"])


def test_hold_out_leaves_what_is_given_and_makes_it_last():
    batches = [1, 2]
    left, held = runtime.hold_out(batches, (x for x in (3, 4)), every=2)
    assert left is batches
    assert [*held, *held] == [3, 4, 3, 4]
    left, held = runtime.hold_out(iter([1]), [2], every=2)
    assert (left, held) == ([1], [2])


@pytest.mark.parametrize("batches", [[], [1]])
def test_too_little_to_hold_out_is_refused(batches):
    with pytest.raises(DataError, match=rf"batches: {len(batches)}, expected at least 2"):
        runtime.hold_out(batches, None, every=4)


#: Pages that 20 activations of 48 MB take anew, in the main thread or in one that came later.
PAGES = """
import resource, sys, threading
import torch
from bnfix.core.memory import keep_freed_memory

keeps, threaded = (argument == "yes" for argument in sys.argv[1:])
if keeps:
    keep_freed_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def work():
    for _ in range(3):
        torch.ones(12_000_000)
    before = faults()
    for _ in range(20):
        torch.ones(12_000_000)
    print(faults() - before)
worker = threading.Thread(target=work)
if threaded:
    worker.start()
    worker.join()
else:
    work()
"""


def new_pages(keeps: str, threaded: str) -> int:
    command = [sys.executable, "-c", PAGES, keeps, threaded]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="about glibc's allocator")
@pytest.mark.parametrize("threaded", ["no", "yes"])
def test_freed_memory_is_kept_in_every_thread(threaded):
    # A small allocation may land in the freed piece, so that some of the 20 need fresh pages.
    one = 48_000_000 // 4096
    assert new_pages("no", threaded) > 15 * one
    assert new_pages("yes", threaded) < 10 * one


class Several(nn.Module):
    """Takes one input and a second, which may be left out."""

    def forward(self, a, b=None):
        return a if b is None else a + b


def test_all_inputs_before_the_labels_are_passed():
    x, more, y = torch.ones(3, 2), torch.full((3, 2), 2.0), torch.tensor([0, 1, 1])
    net = Several()
    assert runtime.run(net, (x, more, y), CPU).tolist() == [[3.0, 3.0]] * 3
    assert runtime.run(net, (x, y, y), CPU).tolist() == [[1.0, 1.0]] * 3
    assert runtime.unpack((x, more, y), net)[1] is y
    assert runtime.unpack((x, y, "name"), net)[1] is y
    assert runtime.run(net, {"a": x, "b": more, "labels": y}, CPU).tolist() == [[3.0, 3.0]] * 3
    with pytest.raises(DataError, match=r"takes up to 2 inputs.*Give --forward"):
        runtime.run(net, (x, more, more), CPU)
    with pytest.raises(ModelError, match="cannot be run on an input of"):
        runtime.run(net, (x, more, more, y), CPU)
    with pytest.raises(DataError, match=r"it holds pixel_mask, which the model does not take. Giv"):
        runtime.run(net, {"a": x, "pixel_mask": more, "labels": y}, CPU)


Numbered = namedtuple("Numbered", ["x", "y", "index"])


@pytest.mark.parametrize("y", [None, torch.zeros(3, 2), torch.tensor([0, 1, 1])])
def test_fields_of_a_batch_that_have_names_are_known_by_them(y):
    x, index = torch.ones(3, 2), torch.arange(3)
    for model in (None, Several()):
        found, labels = runtime.unpack(Numbered(x, y, index), model)
        assert found is x
        assert labels is y
    assert runtime.unpack((x, None, index), Several()) == (x, None)


def test_images_of_several_sizes_are_counted_one_by_one():
    images = [torch.zeros(3, 8, 8), torch.zeros(3, 6, 9)]
    assert runtime.n_examples_of((images, [{"boxes": X}, {"boxes": X}])) == 2
    assert runtime.n_examples_of((tuple(images), None)) == 2
    assert runtime.n_examples_of((torch.zeros(5, 3, 8, 8), None)) == 5


def test_a_stated_output_is_the_one_that_counts():
    class Nested(nn.Module):
        def forward(self, x):
            return {"features": x, "heads": [x + 1, x + 2]}

    net = Nested()
    runtime.set_output_(net, "heads.1")
    assert torch.equal(runtime.run(net, X, CPU), X + 2)
    assert runtime.fitting_outputs(Nested()(X), 2, 3) == ["features", "heads.0", "heads.1"]
    assert runtime.fitting_outputs(Nested()(X), 2, 4) == []
    runtime.set_output_(net, "head")
    with pytest.raises(
        ModelError, match=r"--output head: .* no such output, but features \(2, 3\)"
    ):
        runtime.run(net, X, CPU)


@pytest.mark.parametrize("shape", [(6,), (6, 1)])
def test_one_logit_an_example_is_binary_cross_entropy(shape):
    z = torch.randn(6)
    y = torch.tensor([0, 1, 1, 0, 1, 0])

    class OneLogit(nn.Module):
        def forward(self, x):
            return x.view(shape)

    for labels in (y, y.float(), y.float()[:, None]):
        found = bnfix.evaluate(OneLogit(), [(z, labels)])
        expected = nn.functional.binary_cross_entropy_with_logits(z, y.float())
        assert found.nll == pytest.approx(float(expected), rel=1e-5)
        assert found.top1 == pytest.approx(float(((z > 0) == y.bool()).double().mean()))
    with pytest.raises(DataError, match="labels: from 0 to 2, expected 0 to 1"):
        bnfix.evaluate(OneLogit(), [(z, y * 2)])
