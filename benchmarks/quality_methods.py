"""The methods of quality.py: bnfix's own and others', each from a case to a model."""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import bnfix
from benchmarks.quality_cases import Batches, Case
from bnfix.core.settings import DataRecipe, FinetuneRecipe, GateRecipe, RunOptions, WeightRecipe
from bnfix.jobs.session import Plan
from bnfix.weights.choose import weighable_layers
from bnfix.weights.label_free import fit_moments_, fit_predictions_

AUTO = "bnfix auto per channel"


@dataclass(frozen=True)
class Run:
    """What a method gets: a model of its own, calibration images, the seed."""

    case: Case
    images: np.ndarray
    labels: np.ndarray
    seed: int

    @property
    def net(self) -> nn.Module:
        return copy.deepcopy(self.case.net)

    def batches(self, size: int | None = None) -> Batches:
        order = np.random.default_rng(self.seed).permutation(len(self.labels))
        case = self.case
        return Batches(case, self.images[order], self.labels[order], size or case.size)

    def bare(self) -> list[Tensor]:
        return [x for x, _ in self.batches(2 * self.case.size)]

    def swapped(self) -> nn.Module:
        net = self.net
        bnfix.swap_norms_(net)
        return net


class Formula(nn.Module):
    """A Batch Norm whose inference uses other moments: ``formula(layer, mean_i, var_i, L)``."""

    def __init__(self, bn: nn.Module, formula: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.bn, self.formula = bn, formula

    def forward(self, x: Tensor) -> Tensor:
        values, bn = x.flatten(2), self.bn
        if values.shape[2] == 1:
            return bn(x)
        mean, var = values.mean(2), values.var(2, correction=0)
        mean, var = self.formula(bn, mean, var, values.shape[2])
        scale = bn.weight / (var + bn.eps).sqrt()
        y = values * scale.unsqueeze(2) + (bn.bias - mean * scale).unsqueeze(2)
        y = y.view(x.shape)
        return bn.act(bn.drop(y)) if hasattr(bn, "act") else y


def with_formula(net: nn.Module, formula: Callable[..., tuple[Tensor, Tensor]]) -> nn.Module:
    for name, module in list(net.named_modules()):
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            net.set_submodule(name, Formula(module, formula))
    return net.eval()


def linear(bn: Any, mean: Tensor, var: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """alpha-BN of a test batch of 1: no cross term."""
    return torch.lerp(bn.running_mean, mean, 0.1), torch.lerp(bn.running_var, var, 0.1)


def iabn(bn: Any, mean: Tensor, var: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Instance-aware Batch Norm, k = 4: the part of a deviation beyond 4 standard errors."""

    def beyond(deviation: Tensor, limit: Tensor) -> Tensor:
        return deviation.sign() * (deviation.abs() - 4 * limit).clamp_min(0)

    spread = bn.running_var + bn.eps
    var = var * n / (n - 1)
    mean = bn.running_mean + beyond(mean - bn.running_mean, (spread / n).sqrt())
    shift = beyond(var - bn.running_var, spread * (2 / (n - 1)) ** 0.5)
    return mean, (bn.running_var + shift).clamp_min(0)


def by_torch(run: Run) -> nn.Module:
    net = run.net
    torch.optim.swa_utils.update_bn(run.bare(), net)
    return net.eval()


def by_fvcore(run: Run) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn.precise_bn import update_bn_stats
    net, batches = run.net.train(), run.bare()
    update_bn_stats(net, batches, num_iters=len(batches))
    return net.eval()


def weighed(weight: Callable[[int], float]) -> Callable[[Run], nn.Module]:
    def method(run: Run) -> nn.Module:
        net = run.swapped()
        layers, _ = weighable_layers(net, run.batches())
        a = weight(run.case.train_batch_size)
        bnfix.set_example_weight_(net, dict.fromkeys(layers, a))
        return net

    return method


def without_labels(how: str) -> Callable[[Run], nn.Module]:
    """As `--example-weight match`, `fit-moments` and `fit-predictions` do it."""

    def method(run: Run) -> nn.Module:
        net, b = run.swapped(), run.case.train_batch_size
        bare, layers = run.bare(), weighable_layers(net, run.batches())[0]
        bnfix.recalibrate_(net, bare, target="train-batch", train_batch_size=b)
        if how == "match":
            bnfix.set_example_weight_(net, dict.fromkeys(layers, 1 / b))
        else:
            fit = fit_moments_ if how == "fit-moments" else fit_predictions_
            fit(net, bare, b, layers)
        return net

    return method


def one_weight(run: Run) -> nn.Module:
    net = run.swapped()
    recipe = WeightRecipe(granularity="global")
    bnfix.choose_example_weight_(net, run.batches(), recipe=recipe)
    return net


def auto(
    granularity: str, command: str = "calibrate", temperature: str = "keep"
) -> Callable[[Run], nn.Module]:
    def method(run: Run) -> nn.Module:
        case, (height, width) = run.case, run.images.shape[1:3]
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            save_file({k: v.contiguous() for k, v in case.net.state_dict().items()},
                      folder / "net.safetensors")  # fmt: skip
            images = run.images[..., 0] if run.images.shape[3] == 1 else run.images
            np.savez(folder / "data.npz", images=images, labels=run.labels)
            mean, std = case.norm
            source = DataRecipe(mean=mean, std=std, resize=(height, width), crop=(height, width))
            plan = Plan(
                source=source,
                weight=WeightRecipe(granularity=granularity),
                # Nothing is held back for a claim: the claim is made here, on other images.
                gate=GateRecipe(fit=0.75, select=0.25, seed=run.seed, temperature=temperature),
                run=RunOptions(device="cpu", workers=0),
            )
            data, net = str(folder / "data.npz"), folder / "net.safetensors"
            result = getattr(bnfix, command)(net, data=data, model=case.spec, plan=plan)
        return result.model

    return method


def blend(run: Run) -> nn.Module:
    net = run.net
    bnfix.recalibrate_(net, run.bare(), target="blend")
    return net


def tuned(example_weight: str) -> Callable[[Run], nn.Module]:
    def method(run: Run) -> nn.Module:
        net = run.swapped()
        recipe = FinetuneRecipe(train="norms", example_weight=example_weight)
        bnfix.finetune_(net, run.batches(), recipe=recipe, seed=run.seed)
        return net

    return method


#: Name: what it does; whether the seed matters where the images do not depend on it.
METHODS: dict[str, tuple[Callable[[Run], nn.Module], bool]] = {
    "stock": (lambda run: run.net, False),
    "torch update_bn": (by_torch, True),
    "fvcore PreciseBN": (by_fvcore, True),
    "blend": (blend, True),
    "linear mixing (alpha-BN)": (lambda run: with_formula(run.net, linear), False),
    "a = 1/B²": (weighed(lambda b: 1 / b**2), False),
    "IABN (k = 4)": (lambda run: with_formula(run.net, iabn), False),
    "match": (without_labels("match"), True),
    "fit-moments": (without_labels("fit-moments"), True),
    "fit-predictions": (without_labels("fit-predictions"), True),
    "one weight": (one_weight, True),
    "bnfix auto per layer": (auto("layer"), True),
    AUTO: (auto("channel"), True),
    "temperature and auto": (auto("channel", temperature="auto"), True),
    "bnfix fix": (auto("channel", "fix"), True),
    "temperature and fix": (auto("channel", "fix", "auto"), True),
    "gamma and beta": (tuned("keep"), True),
    "both together": (tuned("learn"), True),
}
