"""What of a model is trained: parameter groups, the head, and the decay of gamma and beta.

Both serve any training loop: `parameter_groups` sorts, `decay_norms_` is one decay step.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from bnfix.core.errors import ConfigError, ModelError
from bnfix.core.settings import TRAINED
from bnfix.norm.sites import find_norms


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    norm_decay: float = 0.0,
    train: str = "all",
    head: nn.Module | None = None,
) -> list[dict[str, Any]]:
    """Sort the parameters to train into groups for any torch optimizer.

    Gamma and beta of the norm layers are the group named ``norms``, with ``weight_decay`` 0: torch
    decays toward 0 only, so theirs is a step of its own, `decay_norms_`, for which the group
    carries ``norm_decay``. The group named ``others`` is the rest. Frozen norm layers are in none,
    tied parameters are in one once, and a group without parameters is left out.

    Args:
        model: any module; ``requires_grad`` is neither looked at nor set.
        lr: learning rate of both groups.
        weight_decay: of the others.
        norm_decay: noted in the norms' group, as ``norm_decay``; no optimizer acts on it.
        train: ``norms``, ``head``, ``norms+head``, ``last-norm+head`` (of the norm layers only the
            last one defined) or ``all``.
        head: what ``head`` means; by default the last linear layer or 1x1 convolution defined.

    Returns:
        One or two groups, the norms first.

    Raises:
        ConfigError: if ``train`` is not known.
        ModelError: if there is nothing to train, or no head.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> groups = parameter_groups(net, lr=0.01, weight_decay=0.1, norm_decay=0.1)
        >>> optimizer = torch.optim.AdamW(groups)
        >>> optimizer.step()
        >>> decay_norms_(net, optimizer.param_groups[0]["lr"], 0.1, "identity")
    """
    if train not in TRAINED:
        raise ConfigError(
            f"--train: {train!r} is not known. Use one of: {', '.join(TRAINED)}.", name="train"
        )
    sites = find_norms(model)
    own = {id(p): (p, s) for s in sites for p in s.module.parameters(recurse=False)}
    free = [(p, site) for p, site in own.values() if not site.frozen and train != "head"]
    if train == "last-norm+head":
        free = [(p, site) for p, site in free if site is free[-1][1]]
    norms = [p for p, _ in free]
    if train == "all":
        others = [p for p in model.parameters() if id(p) not in own]
    elif train == "norms":
        others = []
    else:
        others = list((head or head_of(list(model.modules()), None)).parameters())
    if not norms and not others:
        raise ModelError(f"--train {train}: the model has no such parameters. Use --train all.")
    groups: list[dict[str, Any]] = [
        {
            "name": "norms",
            "params": norms,
            "lr": lr,
            "weight_decay": 0.0,
            "norm_decay": norm_decay,
        },
        {"name": "others", "params": others, "lr": lr, "weight_decay": weight_decay},
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def decay_norms_(
    model: nn.Module | Iterable[nn.Module],
    rate: float,
    norm_decay: float,
    target: str = "identity",
) -> None:
    """Decay gamma and beta of the norm layers by one decoupled step; call it after the optimizer's.

    gamma <- t + (gamma - t)(1 - rate w), t = 1 for ``identity`` and 0 for ``zero``, w the decay;
    beta <- beta (1 - rate w). Over steps s: gamma_T - t = (gamma_0 - t) prod_s (1 - rate_s w).

    Args:
        model: its norm layers but the frozen ones; or an iterable of just the layers to decay.
        rate: the learning rate of the step.
        norm_decay: w.
        target: ``identity``, ``zero``, or ``none``, which changes nothing.

    Raises:
        ConfigError: if the target is not known, or the step would go beyond it.

    Changes:
        ``weight`` and ``bias`` of the layers, tied ones once.

    Source: Summers & Dinneen, "Four Things Everyone Should Know to Improve Batch Normalization",
    ICLR 2020, section 3.4. Differs: decoupled from the gradient, as in AdamW.
    """
    if target not in ("none", "zero", "identity"):
        raise ConfigError(
            f"--norm-decay-target: {target!r} is not known. Use one of: none, zero, identity.",
            name="norm_decay_target",
        )
    if not 0 <= rate * norm_decay <= 1:
        raise ConfigError(
            f"--norm-decay: {norm_decay:g} at a rate of {rate:g} leads beyond its target. Expected "
            "a product from 0 to 1.",
            name="norm_decay",
        )
    if target == "none" or rate * norm_decay == 0:
        return
    done: set[int] = set()
    for layer in norm_layers(model) if isinstance(model, nn.Module) else model:
        for p, goal in ((layer.weight, float(target == "identity")), (layer.bias, 0.0)):
            if isinstance(p, nn.Parameter) and id(p) not in done:
                done.add(id(p))
                p.sub_(goal).mul_(1 - rate * norm_decay).add_(goal)


def head_of(modules: Sequence[nn.Module], n_classes: int | None) -> nn.Module:
    """Find the last linear layer or 1x1 convolution, with as many outputs as there are classes."""
    for module in reversed(modules):
        if isinstance(module, nn.Linear):
            n_outputs = module.out_features
        elif isinstance(module, nn.Conv2d) and set(module.kernel_size) == {1}:
            n_outputs = module.out_channels
        else:
            continue
        if n_classes in (None, n_outputs):
            return module
    fitting = "" if n_classes is None else f" with {n_classes} outputs, as many as the logits"
    raise ModelError(
        f"--train head: no linear layer or 1x1 convolution{fitting}. Use --train norms or all."
    )


def norm_layers(model: nn.Module) -> list[nn.Module]:
    """List the norm layers that are not frozen."""
    return [site.module for site in find_norms(model) if not site.frozen]
