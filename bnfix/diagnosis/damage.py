"""Changes of weights after training: traces in a file alone, and against its original.

Pruning leaves zeros, clustering leaves few distinct values, rounding leaves equally spaced values.
None of them moves the running statistics. They then belong to weights that no longer exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor

from bnfix.core.errors import CheckpointError, some
from bnfix.diagnosis.faults import Finding, finding, under
from bnfix.recalibrate.collector import drift

#: Fewer values show no pattern, in a weight and in one of its channels.
_FEWEST, _FEWEST_IN_CHANNEL = 64, 8
#: More distinct values than these are not counted: no tool that clusters or rounds leaves as many.
_MOST_DISTINCT: Final = 1000
_FEW_DISTINCT: Final = 256
#: Trained weights are hardly ever exactly 0. Against the original, a smaller part is a sign.
_SPARSE, _SPARSER = 0.2, 0.01
#: Rounding to 8 bits spans at most so many steps; values may be off by this part of one.
_MOST_STEPS, _OFF_GRID = 255, 0.01
_CHANNELS_TRIED: Final = 8
#: A change by a smaller part of a weight's norm hardly moves the statistics after it.
_SLIGHT: Final = 0.02
#: Weights of two trainings have a cosine near 0; a network and its descendant have a higher one.
_UNRELATED: Final = 0.2
#: The part of a network's weights that must show a pattern before it is reported.
_REPORTED: Final = 0.2
#: Mean shift in deviations, or log ratio of variances; storing again causes smaller ones.
_MOVED: Final = 1e-3
_EPS: Final = 1e-5
_TRACES: Final = {
    "pruned": "{} zeros",
    "clustered": "few distinct values or filters",
    "rounded": "equally spaced values only",
}
_WORDS: Final = {
    "pruned": "pruned",
    "clustered": "clustered",
    "rounded": "rounded to a grid",
    "half": "rounded to half precision",
    "unrelated": "from another training",
    "trained": "fine-tuned or merged, as scales, shifts or biases differ too",
    "noisy": "changed without a pattern while scales, shifts and biases are the same, as by noise",
}


@dataclass(frozen=True)
class Traces:
    """The traces that pruning, clustering and rounding leave in one weight."""

    n_values: int
    sparsity: float  # part of the values that are 0
    n_distinct: int | None  # distinct values, None above 1,000
    kind: str  # rounded, clustered, pruned or empty


@dataclass(frozen=True)
class WeightChange:
    """The weight of a convolution or linear layer that differs from the original's."""

    name: str
    is_convolution: bool
    relative_norm: float  # ||new - old|| / ||old||
    traces: Traces
    traces_before: Traces
    cause: str  # pruned, clustered, rounded, half, unrelated, trained or noisy


@dataclass(frozen=True)
class Comparison:
    """A state dict compared with the one that it was made from."""

    n_weights: int  # of convolutions and linear layers
    changed: tuple[WeightChange, ...]
    n_norms: int  # layers with running statistics
    moved: tuple[str, ...]  # layers whose statistics differ
    stale: tuple[str, ...]  # layers after a changed weight whose statistics do not differ
    unmatched: tuple[str, ...]  # tensors in one file only, or with two shapes

    @property
    def sentence(self) -> str:
        """The change of the weights in words, and whether the statistics followed."""
        if not self.changed:
            if not self.moved:
                return "neither a weight nor a statistic differs"
            return f"no weight differs; {self._statistics(self.moved)} do"
        causes = []
        for cause, n in Counter(change.cause for change in self.changed).most_common():
            word = _WORDS[cause]
            if cause == "pruned":
                zeros = [change.traces.sparsity for change in self.changed if change.cause == cause]
                word = f"{word} ({_span(zeros, '.0%')} zeros)"
            causes.append(word if n == len(self.changed) else f"{n} {word}")
        size = _span([change.relative_norm for change in self.changed], ".2g")
        counted = _counted(self.changed)
        words = f"the weights of {counted} differ by {size} of their norm: {', '.join(causes)}; "
        if self.stale and not self.moved:
            return f"{words}no statistics differ: they are stale"
        if self.stale:
            shown = some(self.stale)
            return f"{words}{self._statistics(self.stale)} do not ({shown}): these are stale"
        if self.moved:
            return f"{words}{self._statistics(self.moved)} moved with them"
        return f"{words}no statistics differ, and so slight or so late a change leaves them valid"

    def _statistics(self, norms: Sequence[str]) -> str:
        return f"the statistics of {len(norms)} of {self.n_norms} norm layers"

    def findings(self) -> list[Finding]:
        """The sentence as a finding: a warning if statistics are stale."""
        return [finding("", "stale-weights" if self.stale else "compared", self.sentence)]


def diagnose_weights(tensors: Mapping[str, Tensor]) -> list[Finding]:
    """Find traces of pruning, clustering and rounding in a state dict alone."""
    every = [_traces_of(weight) for weight in _weights_in(tensors).values()]
    found = []
    for kind, trace in _TRACES.items():
        own = [traces for traces in every if traces.kind == kind]
        n_values = sum(traces.n_values for traces in own)
        if own and n_values >= _REPORTED * sum(traces.n_values for traces in every):
            holds = trace.format(_span([traces.sparsity for traces in own], ".0%"))
            of = f"{len(own)} of {len(every)} weights hold {holds}"
            detail = f"{of}: the network was {_WORDS[kind]}, and its statistics may be older"
            found.append(finding("", kind, detail))
    return found


def compare_weights(tensors: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> Comparison:
    """Compare a state dict with its original, and say which statistics the change left stale.

    Raises:
        CheckpointError: if no weight has the same name and shape in both.
    """
    both = {n for n, t in tensors.items() if n in original and original[n].shape == t.shape}
    weights = {name: weight for name, weight in _weights_in(tensors).items() if name in both}
    if not weights:
        raise CheckpointError(
            "--against: no weight has the same name and shape in both files. Give the checkpoint "
            "that this one was made from."
        )
    tuned = any(
        tensors[name].ndim == 1 and not torch.equal(tensors[name], original[name].to(tensors[name]))
        for name in both
        if tensors[name].is_floating_point() and "running_" not in name
    )
    changed = [
        _change(name, weight, original[name], tuned=tuned)
        for name, weight in weights.items()
        if not torch.equal(weight, original[name].to(weight))
    ]
    norms = [
        name.rpartition(".")[0]
        for name, tensor in tensors.items()
        if name.rpartition(".")[2] == "running_mean"
        and {name, name.removesuffix("mean") + "var"} <= both
        and tensor.is_floating_point()
    ]
    moved = {norm for norm in norms if _has_moved(norm, tensors, original)}
    large = [change for change in changed if change.relative_norm > _SLIGHT]
    reached = _norms_after(large, norms, [list(tensors), list(original)])
    return Comparison(
        n_weights=len(weights),
        changed=tuple(changed),
        n_norms=len(norms),
        moved=tuple(norm for norm in norms if norm in moved),
        stale=tuple(norm for norm in norms if norm in reached - moved),
        unmatched=tuple(sorted((tensors.keys() | original.keys()) - both)),
    )


def _weights_in(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of convolutions and linear layers, by their shapes."""
    return {
        name: tensor
        for name, tensor in tensors.items()
        if tensor.ndim >= 2 and tensor.is_floating_point() and tensor.numel() >= _FEWEST
    }


def _change(name: str, new: Tensor, old: Tensor, *, tuned: bool) -> WeightChange:
    """How much one weight differs, and the cause."""
    after, before = _traces_of(new), _traces_of(old)
    wide, wide_old = new.double().flatten(), old.double().flatten()
    halves = (old.to(kind).to(new.dtype) for kind in (torch.float16, torch.bfloat16))
    if after.kind and after.kind != before.kind:
        cause = after.kind
    elif after.sparsity >= before.sparsity + _SPARSER:
        cause = "pruned"
    elif any(torch.equal(new, half) for half in halves):
        cause = "half"
    elif float(torch.cosine_similarity(wide, wide_old, dim=0)) < _UNRELATED:
        cause = "unrelated"
    else:
        cause = "trained" if tuned else "noisy"
    return WeightChange(
        name=name,
        is_convolution=new.ndim > 2,
        relative_norm=float((wide - wide_old).norm() / wide_old.norm()),
        traces=after,
        traces_before=before,
        cause=cause,
    )


def _traces_of(weight: Tensor) -> Traces:
    values, rows = weight.detach().cpu().flatten(), weight.detach().cpu().flatten(1)
    tried = torch.linspace(0, len(rows) - 1, min(len(rows), _CHANNELS_TRIED)).long()
    whole = values, _levels(values)
    channels = [(row, _levels(row)) for row in rows[tried]]

    def shows(is_so: Callable[[Tensor, Any], bool]) -> bool:
        # Rounding and clustering act on a whole tensor, or on each channel separately.
        return is_so(*whole) or sum(is_so(*one) for one in channels) > len(channels) / 2

    sparsity = 1 - int(values.count_nonzero()) / len(values)
    # A weight with only zeros was created that way.
    kind = "pruned" if _SPARSE <= sparsity < 1 else ""
    if shows(_on_grid):
        kind = "rounded"
    elif shows(_are_few) or _repeats_filters(rows):
        kind = "clustered"
    n_distinct = None if whole[1] is None else len(whole[1])
    return Traces(len(values), sparsity, n_distinct, kind)


def _levels(values: Tensor) -> Any:
    """The distinct values in rising order, in float64; ``None`` above 1,000 or if not finite."""
    # A part of a large tensor is enough to see this, without sorting all of it.
    few = np.unique(values[: 4 * _MOST_DISTINCT].double().numpy())
    if len(few) > _MOST_DISTINCT:
        return None
    levels = few if len(values) <= 4 * _MOST_DISTINCT else np.unique(values.double().numpy())
    return levels if len(levels) <= _MOST_DISTINCT and np.isfinite(levels).all() else None


def _on_grid(values: Tensor, levels: Any) -> bool:
    """Whether all values are a whole number of equal steps above the smallest."""
    n = 0 if levels is None else len(levels)
    if not 2 <= n <= _MOST_STEPS + 1 or int(values.count_nonzero()) < _FEWEST_IN_CHANNEL:
        return False
    # A few levels can lie on a fine grid by chance, so their grid must be coarse.
    most = _MOST_STEPS if n >= _FEWEST_IN_CHANNEL else 2 * n
    places = (levels - levels[0]) / (levels[-1] - levels[0])
    steps = places[:, None] * np.arange(n - 1, most + 1)  # (level, number of steps)
    return bool((np.abs(steps - steps.round()).max(0) <= _OFF_GRID).any())


def _are_few(values: Tensor, levels: Any) -> bool:
    return levels is not None and len(levels) <= min(
        _FEW_DISTINCT, int(values.count_nonzero()) // 4
    )


def _repeats_filters(rows: Tensor) -> bool:
    """Whether a quarter of the filters that are not 0 repeat another one."""
    found = [row.float().numpy().tobytes() for row in rows[rows.any(1)]]
    return len(found) >= _FEWEST_IN_CHANNEL and len(set(found)) <= 3 / 4 * len(found)


def _norms_after(
    changed: Sequence[WeightChange], norms: Sequence[str], files: Sequence[list[str]]
) -> set[str]:
    """The norm layers that changed weights can reach."""
    # PyTorch lists layers in the order of their creation, nearly always the order of the calls;
    # .safetensors files list them by name.
    order = next((names for names in files if names != sorted(names)), None)
    if order is None:
        return set(norms) if any(change.is_convolution for change in changed) else set()
    first = min((order.index(change.name) for change in changed), default=len(order))
    return {norm for norm in norms if under(norm, "running_mean") in order[first:]}


def _has_moved(norm: str, tensors: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> bool:
    """Whether a layer's statistics differ by more than storing them again can explain."""
    new, old = (
        (state[under(norm, "running_mean")].double(), state[under(norm, "running_var")].double())
        for state in (tensors, original)
    )
    return not all(part <= _MOVED for part in drift(new, old, _EPS))  # NaN counts as moved


def _span(values: Sequence[float], form: str) -> str:
    """The range of some values in words, or the value if it is one."""
    ends = [format(end, form) for end in (min(values), max(values))]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"


def _counted(changed: Sequence[WeightChange]) -> str:
    """Convolutions and linear layers, counted."""
    n = sum(change.is_convolution for change in changed)
    counts = (n, "convolution"), (len(changed) - n, "linear layer")
    return " and ".join(f"{k} {name}{'s' * (k > 1)}" for k, name in counts if k)
