"""The state dict inside what a file holds: nesting, and the prefixes of wrappers."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import torch

from bnfix.errors import CheckpointError, plain, some

#: Where training programs put the state dict, the trained weights before their running means.
NESTS: Final = (
    "state_dict",
    "model",
    "model_state_dict",
    "model_state",
    "net",
    "network",
    "params",
    "ema",
    "state_dict_ema",
    "model_ema",
    "ema_state_dict",
    "ema_model",
    "params_ema",
    "module",
)
#: Words in the name of a running mean of the weights: `swa_model`, `params_ema`, `averaged`.
_AVERAGE: Final = re.compile(r"(?:^|_)(?:ema|swa|avg|averaged?|polyak|shadow)(?:$|_|\d)", re.I)
STATISTICS: Final = ("running_mean", "running_var")
#: What a running mean of the weights may come without.
BUFFERS: Final = (*STATISTICS, "num_batches_tracked")
#: What wrappers put before every name: DataParallel, torch.compile, Lightning and the like.
PREFIXES: Final = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "_forward_module.")
#: Parts of names that wrappers put anywhere: no module is called so by its author.
_WRAPPERS: Final = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_DEPTH: Final = 3
#: A tensor may repeat its storage (strides of 0), but not so much that copying it fills the memory.
_REPEATED_LIMIT: Final = 64 * 2**20
#: Unusual prefixes that are tried on a model's own names.
_PREFIX_LIMIT: Final = 32


# Entries of a dict from a file, whose own methods the file may have overwritten.
def _items(mapping: Any) -> list[tuple[Any, Any]]:
    return list(dict.items(mapping)) if isinstance(mapping, dict) else []


def _has_tensors(value: Any) -> bool:
    return any(type(k) is str and isinstance(v, torch.Tensor) for k, v in _items(value))


def _has_weights(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) and v.ndim > 1 for _, v in _items(value))


# All paths to state dicts under the usual names, the most likely first.
def _paths(content: Any, depth: int = _DEPTH) -> Iterator[list[str]]:
    entries = dict(_items(content))
    for nest in NESTS if depth else ():
        for below in _paths(entries.get(nest), depth - 1):
            yield [nest, *below]
    if _has_tensors(content):
        yield []


# Every dotted key under which there are tensors, for a message.
def _nests(content: Any, depth: int = _DEPTH, at: str = "") -> list[str]:
    found = []
    for name, value in _items(content):
        if type(name) is str and isinstance(value, dict):
            found += [at + name] if _has_tensors(value) else []
            found += _nests(value, depth - 1, f"{at}{name}.") if depth > 1 else []
    return found


# The value at a dotted key, where a part may have dots of its own; None if not there.
def _follow(content: Any, key: str) -> Any:
    if not key:
        return content
    for name, value in _items(content):
        if name == key:
            return value
    for name, value in _items(content):
        if type(name) is str and key.startswith(name + "."):
            below = _follow(value, key[len(name) + 1 :])
            if below is not None:
                return below
    return None


def find_state_dict(
    content: Any, key: str | None, path: Path, *, prefer_ema: bool = False
) -> tuple[Any, str, list[str], list[str]]:
    """The state dict in a file's content, the nesting followed, other complete ones, and notes."""
    nests = _nests(content)
    listed = f"found under {some([plain(n) for n in nests])}" if nests else "found none"
    base = _follow(content, key or "")
    if base is None and key:
        raise CheckpointError(
            f"{plain(path)}: has no {plain(key)!r}; state dicts {listed}. Give one as --key.",
            path=path,
        )
    found = key or ""
    if key is None or not _has_tensors(base):
        at = f"{key}." if key else ""
        inside = [n.removeprefix(at) for n in nests if n.startswith(at)]
        likely = [".".join(steps) for steps in _paths(base)]
        means = [n for n in (*likely, *inside) if is_average(n)]
        others = [n for n in inside if not is_average(n)]
        # A single one with weights is meant, whatever its name; a mean if nothing else is there.
        unusual = [n for n in others or means if _has_weights(_follow(base, n))]
        likely += unusual if len(unusual) == 1 else []
        likely = [*(means if prefer_ema else []), *likely]
        if not likely:
            what = f" under {plain(key)!r}" if key else ""
            hint = " Give it as --key." if nests else " Save model.state_dict() with torch.save."
            raise CheckpointError(
                f"{plain(path)}: holds no state dict (names to tensors){what}; {listed}.{hint}",
                path=path,
            )
        found = at + likely[0] if likely[0] else found
        base = _follow(base, likely[0])
    notes = [f"state dict found under {plain(found)!r}"] if found and key is None else []
    complete = [n for n in nests if n != found and _covers(_follow(content, n), base)]
    others = [n for n in nests if (n != found and n.rpartition(".")[2] in NESTS) or n in complete]
    if others and key is None:
        notes.append(f"not used: {some([plain(n) for n in others])} (--key chooses)")
    return base, found, complete, notes


# Whether one set of tensors has all parameters of another, in wrappers or not.
def _covers(one: Any, other: Any) -> bool:
    names = [
        {_bare(n) for n, v in _items(found) if type(n) is str and isinstance(v, torch.Tensor)}
        for found in (one, other)
    ]
    wanted = {name for name in names[1] if name.rpartition(".")[2] not in BUFFERS}
    return bool(wanted) and wanted <= names[0]


def _bare(name: str) -> str:
    unwrapped = _unwrapped(name)
    return unwrapped.removeprefix(_prefix_run(unwrapped))


def only_tensors(found: Any, path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Take the tensors out of a state dict."""
    tensors: dict[str, torch.Tensor] = {}
    ignored: list[str] = []
    bad: list[str] = []
    for name, value in _items(found):
        if type(name) is not str or not isinstance(value, torch.Tensor):
            ignored.append(plain(name))
        elif storable(name, value) and value.device.type == "cpu":
            tensor = value.detach()
            size = tensor.numel() * tensor.element_size()
            repeats = size > max(_REPEATED_LIMIT, 16 * tensor.untyped_storage().nbytes())
            (bad.append(plain(name)) if repeats else tensors.__setitem__(name, tensor))
        else:
            bad.append(plain(name))
    if bad:
        raise CheckpointError(
            f"{plain(path)}: {some(bad)}: expected dense tensors that fill their memory, found "
            "sparse, quantized, wrapped, unallocated or endlessly repeated ones. Save plain ones.",
            path=path,
        )
    flat = [plain(name) for name in tensors if name.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        raise CheckpointError(
            f"{plain(path)}: {some(flat)}: flattened parameters of FSDP, whose names and shapes "
            "are lost. Where it was made, save it with StateDictType.FULL_STATE_DICT.",
            path=path,
        )
    notes = [f"{len(ignored)} entries that are not tensors ignored: {some(ignored)}"]
    return tensors, notes if ignored else []


def storable(name: object, tensor: object) -> bool:
    """Say whether an entry is a dense tensor under a name, as a file can hold it."""
    return (
        type(name) is str
        and isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
    )


def versions_in(found: Any) -> dict[str, int]:
    """Read the versions of modules' state that torch keeps beside a state dict."""
    stated = getattr(found, "__dict__", {}).get("_metadata")
    return {
        name: version
        for name, value in _items(stated)
        for key, version in _items(value)
        if type(name) is str and key == "version" and type(version) is int
    }


# --- prefixes ---


def strip_given(
    tensors: dict[str, torch.Tensor], prefix: str, path: Path
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """Strip a stated prefix, and leave out names that do not have it."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not kept:
        heads = list(dict.fromkeys(plain(name.partition(".")[0]) for name in tensors))
        raise CheckpointError(
            f"{plain(path)}: no name begins with {plain(prefix)!r}; they begin with {some(heads)}. "
            "Change --prefix, or leave it out.",
            path=path,
        )
    lost = [plain(name) for name in tensors if not name.startswith(prefix)]
    notes = [f"prefix {plain(prefix)!r} stripped"] if prefix else []
    notes += [f"{len(lost)} names without that prefix left out: {some(lost)}"] if lost else []
    return kept, prefix, notes


def strip_found(
    tensors: dict[str, torch.Tensor], expected: Collection[str] | None
) -> tuple[dict[str, torch.Tensor], str, list[str]]:
    """Strip what wrappers put into names: what all share, or what fits a model's names best."""
    notes = []
    counter = tensors.get("n_averaged")
    if counter is not None and counter.numel() == 1 and "n_averaged" not in (expected or ()):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        notes.append("n_averaged (torch's count of averaged models) left out")
    inner = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    wrapped = sum(name not in tensors for name in inner)
    if wrapped and len(inner) == len(tensors):
        tensors = inner
        notes.append(f"parts that wrappers put into {wrapped} names stripped")
    chosen = _shared_prefix(tensors)
    if expected:
        wanted = frozenset(expected)
        candidates = [chosen, *_possible_prefixes(tensors), *_unusual_prefixes(tensors, wanted)]
        matches = {c: sum(n.removeprefix(c) in wanted for n in tensors) for c in candidates}
        # At a tie the shared prefix, which comes first, stands.
        chosen = max(matches, key=lambda candidate: matches[candidate])
        parameters = {name for name in wanted if name.rpartition(".")[2] not in BUFFERS}
        for other in candidates if chosen == _prefix_run(chosen) else ():
            second = {name for name in tensors if name.startswith(other)}
            if other in ("", chosen) or not parameters <= {n.removeprefix(other) for n in second}:
                continue
            tensors = {name: tensor for name, tensor in tensors.items() if name not in second}
            notes.append(f"a second set of the weights under {plain(other)!r} left out (--prefix)")
    stripped = {name.removeprefix(chosen): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):  # two names became one: rather none than one lost
        return tensors, "", notes
    if chosen:
        notes.append(f"prefix {plain(chosen)!r} stripped")
    return stripped, chosen, notes


def split_averages(
    tensors: dict[str, torch.Tensor], expected: Collection[str] | None, *, prefer_ema: bool
) -> tuple[dict[str, torch.Tensor], bool, list[str]]:
    """A model's tensors, or the running mean of them that it keeps as a part of itself."""
    heads = dict.fromkeys(f"{name.partition('.')[0]}." for name in tensors)
    notes: list[str] = []
    for prefix in filter(is_average, heads):
        averages = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        own = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
        asked_for = any(name.startswith(prefix) for name in expected or ())
        known = prefix in ("model_ema.", "ema_model.", "ema.")
        if not own or asked_for or not (known or _covers(averages, own)):
            continue
        if prefer_ema:
            return averages, True, [f"running mean of the weights taken from {plain(prefix)!r}"]
        tensors = own
        notes.append(
            f"running mean of the weights under {plain(prefix)!r} left out (--prefer-ema takes it)"
        )
    return tensors, False, notes


def is_average(key: str) -> bool:
    """Whether a dotted nesting leads to a running mean of the weights, by its words."""
    return any(_AVERAGE.search(part) for part in key.split("."))


def _unwrapped(name: str) -> str:
    """A name without wrappers' parts, but with the usual prefixes before it."""
    head = _prefix_run(name)
    parts = name[len(head) :].split(".")
    return head + ".".join(part for part in parts if part not in _WRAPPERS)


def _prefix_run(name: str) -> str:
    run = ""
    while head := next((p for p in PREFIXES if name.startswith(p, len(run))), ""):
        run += head
    return run


def _shared_prefix(tensors: Mapping[str, torch.Tensor]) -> str:
    shared = ""
    while True:
        longer = [p for p in PREFIXES if all(name.startswith(shared + p) for name in tensors)]
        if not longer or not tensors:
            return shared
        shared += longer[0]


# All runs of the usual prefixes that some name begins with, the empty one first.
def _possible_prefixes(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    found = {"": None}
    for name in tensors:
        run = ""
        while head := next((p for p in PREFIXES if name.startswith(p, len(run))), ""):
            run += head
            found[run] = None
    return list(found)


# What stands before one of the model's own names, such as the attribute that a trainer gave it.
def _unusual_prefixes(tensors: Mapping[str, torch.Tensor], wanted: frozenset[str]) -> list[str]:
    longest = max(sorted(wanted), key=lambda name: name.count("."))
    found = [name.removesuffix(longest) for name in tensors if name.endswith(f".{longest}")]
    return found[:_PREFIX_LIMIT]
