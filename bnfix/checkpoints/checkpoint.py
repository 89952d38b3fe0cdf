"""The state dict in a file: its nesting, wrapper prefixes, and its fit to a model."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from bnfix.checkpoints.read import (
    Inert,
    file_in_folder,
    parse_header,
    read_file,
    sha256_of,
)
from bnfix.core.errors import file_error, plain, some

#: Keys under which training programs store the state dict, trained weights before averaged ones.
NESTS: Final = tuple(
    "state_dict model model_state_dict model_state net network params ema state_dict_ema model_ema "
    "ema_state_dict ema_model params_ema module".split()
)
#: Words in the name of averaged weights: `swa_model`, `params_ema`, `averaged`.
_AVERAGE: Final = re.compile(r"(?:^|_)(?:ema|swa|avg|averaged?|polyak|shadow)(?:$|_|\d)", re.I)
STATISTICS: Final = ("running_mean", "running_var")
#: Tensors that a set of averaged weights may lack.
BUFFERS: Final = (*STATISTICS, "num_batches_tracked")
#: Prefixes that wrappers put before every name: DataParallel, torch.compile, Lightning and others.
PREFIXES: Final = ("module.", "_orig_mod.", "model.", "_fsdp_wrapped_module.", "_forward_module.")
#: Parts that wrappers put anywhere in a name; authors do not name modules like this.
_WRAPPERS: Final = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
_DEPTH: Final = 3
_BESIDE_LIMIT: Final = 500
#: A tensor can repeat its storage (strides of 0); above this size, a copy could fill the memory.
_REPEATED_LIMIT: Final = 64 * 2**20
#: Most unusual prefixes that are tried on a model's own names.
_PREFIX_LIMIT: Final = 32


@dataclass(frozen=True)
class Checkpoint:
    """A state dict from a file, and its place in the file."""

    path: Path
    tensors: dict[str, torch.Tensor]  # on the CPU, prefixes stripped
    metadata: dict[str, Any] | None  # the parsed header of a file that bnfix wrote
    key: str  # the nesting, for example "state_dict"; empty at top level
    prefix: str  # the stripped prefix, for example "module."; empty for none
    sha256: str  # of the bytes; for a sharded file, of the index, then of its shards by name
    notes: tuple[str, ...]  # sentences for the report
    versions: dict[str, int] = field(default_factory=dict)  # of modules' state, if stored
    others: tuple[str, ...] = ()  # nestings of other sets that have all of its parameters
    borrowed: bool = False  # its statistics come from another set, because its own has none
    names: dict[str, str] = field(default_factory=dict)  # each tensor's name in the file
    beside: dict[str, Any] = field(default_factory=dict)  # plain values next to the weights


def read_checkpoint(
    path: str | Path,
    *,
    key: str | None = None,
    prefix: str | None = None,
    expected: Collection[str] | None = None,
    prefer_ema: bool = False,
) -> Checkpoint:
    """Read the state dict in a file without running code from the file.

    Tensors are memory-mapped and take memory only when used. ``expected`` holds the model's own
    names; if given, the prefix that matches most of them is stripped.
    """
    path = file_in_folder(Path(path))
    content, header, notes = read_file(path)
    metadata = None if header is None else parse_header(header, path)
    found, key, others = find_state_dict(content, key, path, notes, prefer_ema=prefer_ema)
    tensors = only_tensors(found, path, notes)
    written = {id(tensor): name for name, tensor in tensors.items()}
    averaged = is_average(key)
    if prefix is not None:
        tensors, prefix = strip_given(tensors, prefix, path, notes)
    elif metadata is not None and expected is None:
        prefix = ""  # a bnfix file has the model's own names, so a prefix belongs to them
    else:
        tensors, parted = split_averages(tensors, expected, notes, prefer_ema=prefer_ema)
        averaged = averaged or parted
        tensors, prefix = strip_found(tensors, expected, notes)
    if prefer_ema and not averaged:
        raise file_error(
            path,
            "--prefer-ema: it has no averaged weights, neither under a usual name nor as a part "
            "of the model. Leave the option out, or give --key.",
        )
    versions = {
        f"{name}.".removeprefix(prefix).rstrip("."): version
        for name, version in versions_in(found).items()
    }
    return Checkpoint(
        path=path,
        tensors=tensors,
        metadata=metadata,
        key=key,
        prefix=prefix,
        sha256=sha256_of(path),
        notes=tuple(notes),
        versions=versions,
        others=tuple(others),
        names={name: written[id(tensor)] for name, tensor in tensors.items()},
        beside=values_beside(content, found),
    )


@dataclass(frozen=True)
class Misfits:
    """Tensors that do not fit a model; false if there are none."""

    missing: list[str]  # names in the model that the file lacks
    misshapen: list[str]  # one text per tensor
    unexpected: list[str]  # names in the file that the model lacks

    def __len__(self) -> int:
        return len(self.missing) + len(self.misshapen) + len(self.unexpected)

    def __str__(self) -> str:
        kinds = (
            [f"{plain(name)}: missing from the file" for name in self.missing],
            self.misshapen,
            [f"{plain(name)}: not in the model" for name in self.unexpected],
        )
        # A few of every kind: many of one kind must not hide another.
        return "; ".join(some(kind, 8) for kind in kinds if kind)


def misfits_of(shapes: Mapping[str, torch.Size], tensors: Mapping[str, torch.Tensor]) -> Misfits:
    """All misfits between a file's tensors and a model's shapes."""
    # A missing num_batches_tracked is fine: old files lack it, and nothing depends on it.
    missing = [n for n in shapes if n not in tensors and not n.endswith("num_batches_tracked")]
    misshapen = [
        f"{plain(name)}: {tuple(tensors[name].shape)} in the file, {tuple(shape)} in the model"
        for name, shape in shapes.items()
        if name in tensors and tensors[name].shape != shape
    ]
    return Misfits(missing, misshapen, [name for name in tensors if name not in shapes])


# --- nesting ---


# The entries of a dict from a file; the file may have overwritten the dict's own methods.
def _items(mapping: Any) -> list[tuple[Any, Any]]:
    return list(dict.items(mapping)) if isinstance(mapping, dict) else []


def _has_tensors(value: Any) -> bool:
    return any(type(k) is str and isinstance(v, torch.Tensor) for k, v in _items(value))


def _has_weights(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) and v.ndim > 1 for _, v in _items(value))


# Every dotted key that holds tensors.
def _nests(content: Any, depth: int = _DEPTH, at: str = "") -> list[str]:
    found = []
    for name, value in _items(content):
        if type(name) is str and isinstance(value, dict):
            found += [at + name] if _has_tensors(value) else []
            found += _nests(value, depth - 1, f"{at}{name}.") if depth > 1 else []
    return found


# The rank of a key among the usual ones: by the order of their names, the innermost first.
def _likelihood(nest: str) -> list[int]:
    return [*(NESTS.index(part) for part in nest.split(".")), len(NESTS)]


def follow(content: Any, key: str) -> Any:
    """The value at a dotted key (a part may contain dots itself), or None."""
    entries = {name: value for name, value in _items(content) if type(name) is str}
    if not key or key in entries:
        return entries[key] if key else content
    belows = (follow(v, key[len(n) + 1 :]) for n, v in entries.items() if key.startswith(n + "."))
    return next((below for below in belows if below is not None), None)


def find_state_dict(
    content: Any, key: str | None, path: Path, notes: list[str], *, prefer_ema: bool = False
) -> tuple[Any, str, list[str]]:
    """The state dict in a file's content, its nesting, and the nestings of other complete ones."""
    nests = _nests(content)
    listed, hint = "found none", "Save model.state_dict() with torch.save."
    if _has_tensors(content):
        listed, hint = "found at the top level", "Leave --key out."
    if nests:
        listed, hint = f"found under {some([plain(n) for n in nests])}", "Give one as --key."
    base = follow(content, key or "")
    if base is None and key:
        raise file_error(path, f"has no {plain(key)!r}; state dicts: {listed}. {hint}")
    found = key or ""
    if key is None or not _has_tensors(base):
        at = f"{key}." if key else ""
        inside = [n.removeprefix(at) for n in nests if n.startswith(at)]
        usual = [n for n in inside if all(part in NESTS for part in n.split("."))]
        likely = sorted(usual, key=_likelihood) + ([""] if _has_tensors(base) else [])
        means = [n for n in (*likely, *inside) if is_average(n)]
        others = [n for n in inside if not is_average(n)]
        # A single set with weights is taken under any name; averaged weights only without others.
        unusual = [n for n in others or means if _has_weights(follow(base, n))]
        likely += unusual if len(unusual) == 1 else []
        likely = [*(means if prefer_ema else []), *likely]
        if not likely:
            under = f" under {plain(key)!r}" if key else ""
            raise file_error(
                path, f"holds no state dict (names to tensors){under}; {listed}. {hint}"
            )
        found = at + likely[0] if likely[0] else found
        base = follow(base, likely[0])
    complete = [n for n in nests if n != found and _covers(follow(content, n), base)]
    others = [n for n in nests if (n != found and n.rpartition(".")[2] in NESTS) or n in complete]
    if key is None:
        notes += [f"state dict found under {plain(found)!r}"] if found else []
        if others:
            notes.append(f"not used: {some([plain(n) for n in others])} (--key chooses)")
    return base, found, complete


def values_beside(content: Any, weights: Any) -> dict[str, Any]:
    """Numbers and texts next to the weights, such as hyperparameters, by dotted name."""
    found: dict[str, Any] = {}
    todo: list[tuple[str, Any]] = [] if content is weights else [("", content)]
    for at, value in todo:  # the list grows during the loop, so outer values come first
        for name, inner in _items(value.held if isinstance(value, Inert) else value):
            if type(name) is not str or inner is weights or len(found) >= _BESIDE_LIMIT:
                continue
            place = f"{at}{plain(name)}"
            if type(inner) in (bool, int, float, str):
                found[place] = plain(inner) if isinstance(inner, str) else inner
            elif at.count(".") < _DEPTH:
                todo.append((f"{place}.", inner))
    return found


# Whether one set of tensors has all parameters of another, with or without wrapper prefixes.
def _covers(one: Any, other: Any) -> bool:
    names = [
        {_bare(n) for n, v in _items(found) if type(n) is str and isinstance(v, torch.Tensor)}
        for found in (one, other)
    ]
    wanted = {name for name in names[1] if name.rpartition(".")[2] not in BUFFERS}
    return bool(wanted) and wanted <= names[0]


def only_tensors(found: Any, path: Path, notes: list[str]) -> dict[str, torch.Tensor]:
    """The tensors of a state dict, without gradients; all must be plain and dense."""
    tensors: dict[str, torch.Tensor] = {}
    ignored: list[str] = []
    bad: list[str] = []
    for name, value in _items(found):
        if type(name) is not str or not isinstance(value, torch.Tensor):
            ignored.append(plain(name))
        elif not storable(name, value) or value.device.type != "cpu" or _repeats(value):
            bad.append(plain(name))
        else:
            tensors[name] = value.detach()
    if bad:
        raise file_error(
            path,
            f"{some(bad)}: sparse, quantized, wrapped, unallocated or endlessly repeated tensors, "
            "expected dense tensors that fill their memory. Save plain tensors.",
        )
    flat = [plain(name) for name in tensors if name.rpartition(".")[2].startswith("_flat_param")]
    if flat:
        raise file_error(
            path,
            f"{some(flat)}: flattened FSDP parameters without names and shapes, expected whole "
            "tensors. Save it in the training program with StateDictType.FULL_STATE_DICT.",
        )
    if ignored:
        notes.append(f"{len(ignored)} entries ignored that are not tensors: {some(ignored)}")
    return tensors


def _repeats(tensor: torch.Tensor) -> bool:
    size = tensor.numel() * tensor.element_size()
    return size > max(_REPEATED_LIMIT, 16 * tensor.untyped_storage().nbytes())


def storable(name: object, tensor: object) -> bool:
    """Whether an entry is a named dense tensor, which a file can hold."""
    return (
        type(name) is str
        and isinstance(tensor, torch.Tensor)
        and type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not tensor.is_meta
    )


def versions_in(found: Any) -> dict[str, int]:
    """The versions of module state that torch stores with a state dict, by module."""
    return {
        name: version
        for name, value in _items(getattr(found, "__dict__", {}).get("_metadata"))
        for key, version in _items(value)
        if type(name) is str and key == "version" and type(version) is int
    }


# --- prefixes ---


def strip_given(
    tensors: dict[str, torch.Tensor], prefix: str, path: Path, notes: list[str]
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors with a given prefix, with the prefix stripped, and the prefix with a dot."""
    if prefix and not prefix.endswith("."):
        prefix += "."
    kept = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
    if not kept:
        heads = list(dict.fromkeys(plain(name.partition(".")[0]) for name in tensors))
        raise file_error(
            path,
            f"no name begins with {plain(prefix)!r}; names begin with {some(heads)}. "
            "Change --prefix, or leave it out.",
        )
    lost = [plain(name) for name in tensors if not name.startswith(prefix)]
    notes += [f"prefix {plain(prefix)!r} stripped"] if prefix else []
    notes += [f"{len(lost)} names without that prefix left out: {some(lost)}"] if lost else []
    return kept, prefix


def strip_found(
    tensors: dict[str, torch.Tensor], expected: Collection[str] | None, notes: list[str]
) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors without wrapper parts and without the shared or best-fitting prefix."""
    counter = tensors.get("n_averaged")
    if counter is not None and counter.numel() == 1 and "n_averaged" not in (expected or ()):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "n_averaged"}
        notes.append("n_averaged (torch's count of averaged models) left out")
    inner = {_unwrapped(name): tensor for name, tensor in tensors.items()}
    wrapped = sum(name not in tensors for name in inner)
    if wrapped and len(inner) == len(tensors):
        tensors = inner
        notes.append(f"wrapper parts stripped from {wrapped} names")
    runs = dict.fromkeys(run for name in tensors for run in _prefix_runs(name))
    chosen = max((r for r in runs if all(n.startswith(r) for n in tensors)), key=len, default="")
    if expected:
        wanted = frozenset(expected)
        candidates = [chosen, *runs, *_unusual_prefixes(tensors, wanted)]
        matches = {c: sum(n.removeprefix(c) in wanted for n in tensors) for c in candidates}
        # In a tie the shared prefix wins, because it comes first.
        chosen = max(matches, key=lambda candidate: matches[candidate])
        parameters = {name for name in wanted if name.rpartition(".")[2] not in BUFFERS}
        # If no usual prefix fits and an unusual one was chosen, nothing is left out.
        for other in candidates if chosen == _prefix_runs(chosen)[-1] else ():
            second = {name for name in tensors if name.startswith(other)}
            if other in ("", chosen) or not parameters <= {n.removeprefix(other) for n in second}:
                continue
            tensors = {name: tensor for name, tensor in tensors.items() if name not in second}
            notes.append(f"a second set of the weights under {plain(other)!r} left out (--prefix)")
    stripped = {name.removeprefix(chosen): tensor for name, tensor in tensors.items()}
    if len(stripped) < len(tensors):  # two names became one: strip nothing rather than lose one
        return tensors, ""
    notes += [f"prefix {plain(chosen)!r} stripped"] if chosen else []
    return stripped, chosen


def split_averages(
    tensors: dict[str, torch.Tensor],
    expected: Collection[str] | None,
    notes: list[str],
    *,
    prefer_ema: bool,
) -> tuple[dict[str, torch.Tensor], bool]:
    """A model's own tensors, or the averaged weights that it keeps as a submodule."""
    heads = dict.fromkeys(f"{name.partition('.')[0]}." for name in tensors)
    for prefix in filter(is_average, heads):
        averages = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        own = {n: t for n, t in tensors.items() if not n.startswith(prefix)}
        asked_for = any(name.startswith(prefix) for name in expected or ())
        known = prefix in ("model_ema.", "ema_model.", "ema.")
        if not own or asked_for or not (known or _covers(averages, own)):
            continue
        if prefer_ema:
            notes.append(f"averaged weights taken from {plain(prefix)!r}")
            return averages, True
        tensors = own
        notes.append(f"averaged weights under {plain(prefix)!r} left out (--prefer-ema takes them)")
    return tensors, False


def is_average(key: str) -> bool:
    """Whether a dotted key names averaged weights, by its words."""
    return any(_AVERAGE.search(part) for part in key.split("."))


# A name without wrapper parts, but with its usual prefixes.
def _unwrapped(name: str) -> str:
    head = _prefix_runs(name)[-1]
    parts = name[len(head) :].split(".")
    return head + ".".join(part for part in parts if part not in _WRAPPERS)


# A name without wrapper parts and usual prefixes.
def _bare(name: str) -> str:
    unwrapped = _unwrapped(name)
    return unwrapped.removeprefix(_prefix_runs(unwrapped)[-1])


# All runs of usual prefixes at the start of a name, from none to the longest.
def _prefix_runs(name: str) -> list[str]:
    runs = [""]
    while head := next((p for p in PREFIXES if name.startswith(p, len(runs[-1]))), ""):
        runs.append(runs[-1] + head)
    return runs


# Text before one of the model's own names, such as a trainer's attribute for the model.
def _unusual_prefixes(tensors: Mapping[str, torch.Tensor], wanted: frozenset[str]) -> list[str]:
    longest = max(sorted(wanted), key=lambda name: name.count("."))
    found = [name.removesuffix(longest) for name in tensors if name.endswith(f".{longest}")]
    return found[:_PREFIX_LIMIT]
