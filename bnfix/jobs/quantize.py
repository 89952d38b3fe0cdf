"""`export --to onnx-int8`: an 8-bit ONNX file, judged on images it was not calibrated on."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn

from bnfix.core import runtime
from bnfix.core.errors import ConfigError, ModelError, some
from bnfix.core.options import require
from bnfix.core.settings import RunOptions
from bnfix.data.splits import describe_unlisted, history_digests, seen_before
from bnfix.deploy.exported import ExportedNet, net_of, with_header
from bnfix.deploy.forms import in_8_bits
from bnfix.jobs.inputs import Track, data_used
from bnfix.jobs.session import Plan, Workbench, open_workbench
from bnfix.metrics.evaluate import Outputs, collect, measured
from bnfix.metrics.metrics import shortfall
from bnfix.metrics.task import ByRows
from bnfix.norm.layer import generalized_norms
from bnfix.report.pages import difference, percent
from bnfix.report.records import Evaluated
from bnfix.report.report import Report
from bnfix.report.result import Export, Int8

#: Most images for measuring the ranges of activations.
N_CALIBRATED: Final = 256
_BATCH: Final = 16


def refuse_live(net: nn.Module, to: str) -> None:
    """Refuse layers with weights or gates in forms that cannot hold them."""
    layers = {name: layer for name, layer in generalized_norms(net) if layer.live}
    if not layers or to not in ("folded", "onnx-int8"):
        return
    have = "have gates"
    if any(layer.weighs for layer in layers.values()):
        of_batch = any(layer.uses_batch for layer in layers.values())
        have = f"weigh the {'batch' if of_batch else 'example'}"
    advice = "Use --to onnx, pt2 or plain, or --force-zero."
    if to == "onnx-int8":
        advice = (
            "First measure statistics that need no weights: bnfix calibrate CKPT --data DATA "
            "--statistics population --example-weight 0. Or give --force-zero."
        )
    raise ModelError(
        f"--to {to}: {len(layers)} layers {have} and cannot be folded: {some(list(layers))}. "
        f"{advice}"
    )


def open_bench(
    checkpoint: str | Path,
    data: str | None,
    plan: Plan,
    workers: int,
    *,
    max_drop: float | None,
    track: Track,
) -> Workbench:
    """Split the data as `fix` does: the fit split calibrates, the test split judges."""
    if data is None:
        raise ConfigError(
            "--to onnx-int8: no images to measure activation ranges on. Give --data.", name="data"
        )
    plan, gate = replace(plan, run=RunOptions("cpu", workers=workers)), plan.gate
    cut = gate.fit, gate.select_part, 1 - gate.fit - gate.select_part
    parts = (1.0, 0.0, 0.0) if plan.source.test else cut
    bench = open_workbench(checkpoint, data, plan, parts, track)
    words = "--max-drop: the test images have no labels. Give labels, or leave it out."
    require(max_drop is None or bench.test.images.labelled, words, "max_drop")
    return bench


def quantize(made: Export, bench: Workbench, max_drop: float | None) -> Export:
    """Quantize a verified ONNX file to 8 bits, compare it with float, refuse it if it is worse."""
    seed, images, test = bench.plan.gate.seed, bench.inputs.images, bench.split.test
    history = bench.loaded.origin.history
    index = np.random.default_rng(seed).permutation(bench.split.fit)[:N_CALIBRATED]
    passes = [
        bench.batches(index, "calibrating", _BATCH),
        bench.test_batches("evaluating float and int8"),
    ]
    content, operators = in_8_bits(made.content, (batch.x for batch in passes[0]))
    used = {"command": "export", "data": {"fit": history_digests(images, index)}}
    content = with_header(content, bench.loaded.origin, bench.inputs.preprocessing, used)
    nets = [_called_as(bench, net_of(made.to, file)) for file in (made.content, content)]
    found = collect(nets, passes[1], bench.test.task)
    models = tuple(
        Evaluated(
            name=name,
            file=None,
            sha256=None,
            metrics=measured(outputs, seed),
            classified=outputs.classified or isinstance(outputs.task, ByRows),
        )
        for name, outputs in zip(("float", "int8"), found, strict=True)
    )
    notes = [*made.report.assumptions, *bench.assumptions, *describe_unlisted(history)]
    sizes = {"fit": len(index), "select": 0, "test": len(test)}
    report = replace(
        made.report,
        data=data_used(bench.test.images, test, passes, splits=sizes),
        models=models,
        assumptions=tuple(dict.fromkeys(notes)),
        n_seen=seen_before(bench.test.images, test, history),
        options={**made.report.options, "to": "onnx-int8", "max_drop": max_drop},
    )
    int8 = Int8(
        n_calibrated=len(index),
        top1_agreement=_same(found),
        max_drop=max_drop,
        bound=None if max_drop is None else _within(report, max_drop / 100),
    )
    changed: dict[str, Any] = {"content": content, "operators": operators, "report": report}
    return replace(made, to="onnx-int8", int8=int8, **changed)


def _called_as(bench: Workbench, net: ExportedNet) -> ExportedNet:
    """Call the network, and read its outputs, as for the checkpoint's model."""
    for name in (runtime.FORWARD, runtime.OUTPUT):
        if name in vars(bench.loaded.model):
            net.__dict__[name] = vars(bench.loaded.model)[name]
    return net.eval()


def _same(found: list[Outputs]) -> float | None:
    """The share of examples for which both predict the same class."""
    if not all(one.classified for one in found):
        return None
    return float((found[0].outputs.argmax(1) == found[1].outputs.argmax(1)).mean())


def _within(report: Report, most: float) -> float:
    """The largest drop of top-1 that the test images do not rule out; it must be below `most`."""
    (paired,), (first, last) = report.paired, report.models
    where = f"--max-drop {100 * most:g}"
    if paired is None or not np.isfinite(paired.top1.difference):
        why = last.metrics.problem or "it has no score"
        raise ModelError(f"{where}: int8 cannot be judged ({why}). Nothing was written.")
    rows = last.metrics.examples
    n, groups = last.metrics.n_examples, None if rows is None else rows.groups
    if few := shortfall(n, groups):
        raise ModelError(f"{where}: {few} to prove anything. Give more test images.")
    # If none of n images is lost, the interval is a point, but a drop of 3/n is not ruled out.
    bound = max(-paired.top1.interval[0], 1.0 - math.exp(math.log(0.025) / n))
    if bound < most:
        return bound
    sure = paired.top1.interval[1] <= -most
    raise ModelError(
        f"{where}: int8 classifies {percent(last.metrics.top1)} of {n} test images correctly, "
        f"float {percent(first.metrics.top1)}; the difference is "
        f"{difference(paired.top1, points=True)}, so "
        f"{'it is worse by more' if sure else f'a drop of {100 * bound:.1f} is not ruled out'}. "
        f"Give {'a better checkpoint' if sure else 'more test images (--test)'}, or a larger "
        "--max-drop. Nothing was written."
    )
