"""The private names of torch: each is found here, and each has a fall-back that is right."""

from __future__ import annotations

import importlib
import importlib.util
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.utils import _pytree

from bnfix.core import torch_private as private
from bnfix.norm import kernels


@pytest.fixture
def bare(monkeypatch):
    """The file as it is read where torch has none of the names."""
    spec = importlib.util.spec_from_file_location("bare", private.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module._find("torch._C", "_len_torch_function_stack")
    monkeypatch.setattr(importlib, "import_module", missing)
    spec.loader.exec_module(module)
    return module


def missing(name, package=None):
    raise ImportError(name)


def test_this_torch_has_every_name():
    """A fall-back costs speed: here none is in use."""
    looked_for = (private._transformed, private._function_modes, private._dispatch_modes)
    assert None not in looked_for
    assert not hasattr(private.TorchDispatchMode, "_NoMode")
    assert private.TorchDispatchMode.__name__ == "TorchDispatchMode"
    assert not private.is_transformed()
    assert not private.is_forward_differentiated()
    assert not private.has_modes()


def test_modes_transforms_and_levels_are_seen():
    seen = []
    torch.func.vmap(lambda x: (seen.append(private.is_transformed()), x)[1])(torch.zeros(2))
    with torch.autograd.forward_ad.dual_level():
        seen.append(private.is_forward_differentiated())
    with torch.device("cpu"):
        seen.append(private.has_modes())
    assert seen == [True, True, True]


def test_without_the_names_the_bases_are_the_same(bare):
    modules = nn.modules
    for name, base in {
        "BatchNormBase": modules.batchnorm._BatchNorm,
        "LazyNormBase": modules.batchnorm._LazyNormBase,
        "InstanceNormBase": modules.instancenorm._InstanceNorm,
        "ConvBase": modules.conv._ConvNd,
        "ConvTransposeBase": modules.conv._ConvTransposeNd,
    }.items():
        assert getattr(bare, name) is getattr(private, name) is base
    assert bare.default_store() is None


def test_without_the_names_the_careful_way_is_taken(bare, monkeypatch):
    assert bare.is_transformed()
    assert bare.is_forward_differentiated()
    assert bare.has_modes()
    monkeypatch.setattr(kernels, "is_transformed", bare.is_transformed)
    monkeypatch.setattr(kernels, "is_forward_differentiated", bare.is_forward_differentiated)
    x, one = torch.randn(2, 3, 4, 4), torch.ones(3)
    terms = kernels.Terms(0 * one, one, 0.5 * one, one, one, 1e-5, 3)
    assert torch.equal(kernels.evaluate(x, terms), kernels.plain(x, terms))


def test_nests_are_mapped_as_torch_does_it():
    pair = namedtuple("pair", "a b")
    nest = {"x": [1, (2, 3)], "y": pair(4, {"z": 5}), "n": None}
    assert private.tree_leaves(nest) == _pytree.tree_leaves(nest) == [1, 2, 3, 4, 5, None]
    assert private.tree_map(str, nest) == _pytree.tree_map(str, nest)


def test_without_the_names_a_dispatch_mode_sees_nothing(bare):
    with bare.TorchDispatchMode() as mode:
        torch.zeros(1).add_(1)
    assert mode is not None


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_packed_convolutions_are_convolutions():
    conv, x = nn.Conv2d(3, 5, 3, padding=1), torch.randn(1, 3, 8, 8)
    how = [[1, 1], [1, 1], [1, 1], 1]
    with torch.no_grad():
        weight = private.packed_weight(conv.weight.detach(), *how, list(x.shape))
        made = private.packed_convolution(x, weight, conv.bias, *how)
        torch.testing.assert_close(made, conv(x), atol=1e-5, rtol=0)
