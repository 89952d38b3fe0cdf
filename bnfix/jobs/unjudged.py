"""Statistics that nothing judges: predicted without an example, or pooled from clients.

`calibrate --data none` predicts statistics from the changed weights and the original's statistics.
`pool` joins the statistics of clients who share no images. Each client measures, in one pass, the
count, mean and variance of every norm layer's input. By the law of total variance, the pool equals
one pass over all clients' batches. Under the batch feed, each batch is normalized by its own
statistics, on any client. Under the sequential feed, stored statistics normalize it; each round
that starts from the last round's output then makes the pool exact for one more layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bnfix.checkpoints.alike import check_copyable
from bnfix.checkpoints.load import Loaded
from bnfix.checkpoints.read import FORMAT, check_room, parse_header, read_file, sha256_of
from bnfix.checkpoints.save import identity_of, round_as_stored_, write_checkpoint
from bnfix.core import __version__
from bnfix.core.errors import CheckpointError, ConfigError, ModelError, plain, some
from bnfix.core.options import require
from bnfix.core.settings import ModelRecipe, RunOptions, StatisticsRecipe
from bnfix.jobs.convert import example_input, known_shape, outputs_of
from bnfix.jobs.inputs import Track, resolve_preprocessing
from bnfix.jobs.session import Plan, finished, load_one, open_reference, open_workbench
from bnfix.norm.moments import Moments, pool
from bnfix.norm.sites import find_norms, sites_with_statistics
from bnfix.recalibrate.collector import Collector
from bnfix.recalibrate.passes import met_in_a_pass
from bnfix.recalibrate.reference import match_predicted_
from bnfix.report.records import drifts_between, layer_rows, statistics_of
from bnfix.report.report import Report
from bnfix.report.result import Result

#: More values per channel than any client has; float64 counts them exactly.
_MOST_VALUES = 2**53
_UNPROVEN = "Nothing proves that the output is better: compare it with the input on"


def calibrate_without_data(checkpoint: str | Path, plan: Plan) -> Result:
    """Predict statistics from the weights and the original's statistics; nothing is judged.

    Raises:
        ConfigError: if no reference is given.
        ModelError: if either network cannot be traced.
    """
    words = f"--data none: {plan.command} needs examples; only calibrate works without. Give data."
    require(plan.command == "calibrate", words, "data")
    stated = stated_flags(plan, replace(plan.statistics, reference=None, reference_model=None))
    words = f"--data none: without examples {some(stated)} cannot act. Leave it out, or give data."
    require(not stated, words, "data")
    loaded = load_one(checkpoint, plan.model, plan.run)
    original = open_reference(loaded, plan)
    if original is None:
        raise ConfigError(
            "--data none: without examples, statistics can only be predicted from the original's. "
            "Give --reference CKPT, or data.",
            name="reference",
        )
    check_room(loaded.checkpoint.metadata, loaded.checkpoint.path)
    if plan.model.like_input:
        check_copyable(loaded.checkpoint)
    preprocessing, _ = resolve_preprocessing(loaded, plan.source)
    example = example_input(loaded.model, None, known_shape(loaded.model, preprocessing))
    before = None if example is None else outputs_of(loaded.model, example)
    try:
        reached = match_predicted_(loaded.model, original.model, example)
    except ModelError as error:
        raise ModelError(f"--data none: {error} Give data.") from error
    round_as_stored_(loaded.model)
    notes = [
        f"no example was used: the means of {len(reached)} layers were moved, and their variances "
        "lowered, as the weights predict from the original's statistics. "
        f"{_UNPROVEN} images (bnfix eval).",
        *_describe_left(loaded, reached, "not reached by the prediction"),
    ]
    if before is not None and example is not None:
        moved = outputs_of(loaded.model, example) - before
        size = float(moved.square().mean().sqrt() / before.square().mean().sqrt().clamp_min(1e-12))
        notes.append(f"on normal random input the outputs moved by {size:.2g} of their size (RMS).")
    recipes: dict[str, Any] = {"model": plan.model, "statistics": plan.statistics}
    options = {name: dataclasses.asdict(one) for name, one in recipes.items()}
    return _unjudged(plan, loaded, notes, options, results={"predicted": reached})


def stated_flags(plan: Plan, statistics: StatisticsRecipe) -> list[str]:
    """The options for statistics and weights that are not at their defaults."""
    usual = Plan()
    statistics = replace(statistics, batch_size=usual.statistics.batch_size)
    pairs: list[tuple[Any, Any]] = [
        (statistics, usual.statistics), (plan.weight, usual.weight), (plan.swap, usual.swap),
        (replace(usual.gate, class_prior=plan.gate.class_prior), usual.gate),
    ]  # fmt: skip
    stated = [
        "--" + field.name.replace("_", "-")
        for given, default in pairs
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(default, field.name)
    ]
    stated += ["--select"] * isinstance(plan.gate.select, str)
    return stated + ["--test"] * (plan.source.test is not None)


def _describe_left(loaded: Loaded, done: Collection[str], why: str) -> list[str]:
    left = [site.name for site in find_norms(loaded.model) if site.name not in done]
    return [f"{some(left)}: {why}, left unchanged."] if left else []


def _unjudged(
    plan: Plan,
    loaded: Loaded,
    notes: Sequence[str],
    options: dict[str, Any],
    *,
    results: dict[str, Any],
    drifts: Mapping[str, tuple[float, float]] | None = None,
) -> Result:
    """The model, and a report on the work."""
    report = Report(
        command=plan.command,
        data=None,
        models=(),
        layers=layer_rows(loaded.model, drifts or {}, {}),
        assumptions=(*loaded.checkpoint.notes, *notes),
        options=options,
        seed=plan.gate.seed,
        command_line=plan.command_line,
    )
    return finished(loaded, report, results=results, preprocessing=loaded.origin.preprocessing)


# --- moments of clients ---


def measure_moments(
    model: nn.Module, batches: Iterable[Any], feed: str = "batch"
) -> dict[str, Moments]:
    """Count, mean and biased variance ``(C,)``, float64, of every layer's input in one pass."""
    by_batch = feed == "batch"
    met = met_in_a_pass(model, batches, Collector, by_batch=by_batch, is_strict=by_batch)
    found, sites = met.sums.measured, sites_with_statistics(model)
    return {site.name: found[site.name].values for site in sites if site.name in found}


def pooled(parts: Sequence[Mapping[str, Moments]]) -> dict[str, Moments]:
    """The moments of all values together, layer by layer."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: pool([part[name] for part in parts if name in part]) for name in names}


@torch.no_grad()
def set_moments_(model: nn.Module, found: Mapping[str, Moments]) -> None:
    """Set moments as the statistics of their layers."""
    for site in sites_with_statistics(model):
        if site.name in found:
            site.set_moments_(found[site.name].mean, found[site.name].var, 1)


def save_moments(
    checkpoint: Path,
    data: Sequence[str],
    plan: Plan,
    path: Path | None,
    *,
    force: bool,
    track: Track,
) -> dict[str, Any]:
    """Measure every norm layer's input on a client's images; write moments to a path, if any."""
    plan = replace(plan, source=replace(plan.source, labels="none"))
    stated = stated_flags(plan, replace(plan.statistics, feed="batch"))
    words = f"--save-moments: writes plain moments, so {some(stated)} cannot act. Leave it out."
    require(not stated, words, "save_moments")
    given = data[0] if len(data) == 1 else data
    bench = open_workbench(checkpoint, given, plan, (1.0, 0.0, 0.0), track)
    recipe, identity = plan.statistics, identity_of(bench.model, {})
    shaped, n = bench.inputs.preprocessing, len(bench.split.fit)
    # Labels are never read here, so a note on unused ones would mislead.
    notes = [note for note in bench.assumptions if "--labels none" not in note]
    done = {"command": "calibrate", "n_examples": n, "assumptions": notes}
    if path is None:
        return done
    batches = bench.batches(bench.split.fit, "moments", recipe.batch_size).evened()
    found = measure_moments(bench.model, batches, recipe.feed)
    tensors = {
        layer: torch.stack([m.count.expand_as(m.mean), m.mean, m.var]) for layer, m in found.items()
    }
    of: dict[str, Any] = {"model": identity, "feed": recipe.feed}
    of["preprocessing"] = shaped and dataclasses.asdict(shaped)
    header = {"format": FORMAT, "bnfix": __version__, "moments": of, "n_examples": n}
    write_checkpoint(path, tensors, header, force=force)
    return {**done, "moments": str(path), "n_layers": len(found)}


def pool_files(
    files: Sequence[Path],
    *,
    model: ModelRecipe = ModelRecipe(),
    run: RunOptions = RunOptions(),
    command_line: str = "",
) -> Result:
    """Set the files' pooled moments in the one checkpoint among them."""
    only = "--like-input: pool writes a .safetensors file. Leave it out."
    require(not model.like_input, only, "like_input")
    given = [(path, *_opened(path)) for path in files]
    checkpoints = [path for path, header, _ in given if header is None]
    moments = [(path, header, tensors) for path, header, tensors in given if header is not None]
    if len(checkpoints) != 1 or not moments:
        raise ConfigError(
            f"pool: {len(moments)} files of moments and {len(checkpoints)} others, expected one "
            "checkpoint, and at least one file that calibrate --save-moments wrote."
        )
    loaded = load_one(checkpoints[0], model, run)
    check_room(loaded.checkpoint.metadata, loaded.checkpoint.path)
    identity, first = identity_of(loaded.model, {}), moments[0][1]
    problems, parts, sums = list[str](), list[dict[str, Moments]](), set[str]()
    for path, header, tensors in moments:
        own, found = _checked(header, tensors, loaded.model, identity)
        digest = sha256_of(path)
        own += ["is given twice"] * (digest in sums)
        alike = header["moments"] == first["moments"]
        own += ["differs from the first in feed or preprocessing"] * (not alike)
        problems += [f"{plain(path)}: {problem}" for problem in own]
        parts.append(found)
        sums.add(digest)
    if problems:
        raise CheckpointError(
            f"pool: {some(problems, 8)}. Give files that calibrate --save-moments wrote for this "
            "checkpoint.",
            path=moments[0][0],
        )
    before, together = statistics_of(loaded.model), pooled(parts)
    set_moments_(loaded.model, together)
    round_as_stored_(loaded.model)
    feed, counts = first["moments"]["feed"], [header.get("n_examples") for _, header, _ in moments]
    notes = [
        f"moments were pooled for {len(together)} layers ({feed} feed; examples by file: "
        f"{some(list(map(str, counts)))}). {_UNPROVEN} labelled images (bnfix eval).",
        *_describe_left(loaded, together, "not in the files"),
    ]
    plan, drifts = Plan("pool", command_line), drifts_between(before, statistics_of(loaded.model))
    results = {"n_examples": counts}
    return _unjudged(plan, loaded, notes, {"feed": feed}, results=results, drifts=drifts)


def _opened(path: Path) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
    """The header and the tensors of a moments file; no header for any other file."""
    if path.suffix != ".safetensors" or path.is_dir():
        return None, {}
    tensors, text, _ = read_file(path)
    header = None if text is None else parse_header(text, path)
    return (header, tensors) if header is not None and "moments" in header else (None, {})


def _checked(
    header: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, identity: str
) -> tuple[list[str], dict[str, Moments]]:
    """The problems of a moments file, and the moments of its sound layers."""
    of, problems, found = header["moments"], list[str](), dict[str, Moments]()
    if not isinstance(of, dict) or of.get("feed") not in ("batch", "sequential"):
        return ["its header is damaged"], {}
    if of.get("model") != identity:
        problems.append("was measured with other weights or statistics")
    sites = {s.name: s.module.get_buffer("running_mean") for s in sites_with_statistics(model)}
    extra = sorted(tensors.keys() - sites.keys())
    problems += [f"{plain(name)}: no such layer in the checkpoint" for name in extra]
    for name in sorted(tensors.keys() & sites.keys()):
        t, n = tensors[name], sites[name].numel()
        ok = t.dtype == torch.float64 and t.shape == (3, n) and bool(t.isfinite().all())
        if ok and bool((t[0] >= 1).all() and (t[0] <= _MOST_VALUES).all() and (t[2] >= 0).all()):
            found[name] = Moments(*t)
        else:
            problems.append(f"{name}: expected {n} counts from 1, finite means, variances from 0")
    return problems, found
