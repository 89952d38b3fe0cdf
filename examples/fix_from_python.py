"""`bnfix fix` from Python: candidates, gate, proof on a test split, file and report."""

import tempfile
from pathlib import Path

import bnfix
from bnfix import demo
from bnfix.core.settings import DataRecipe
from bnfix.demo.network import digits_net
from bnfix.jobs.session import Plan

with tempfile.TemporaryDirectory() as folder:
    files = demo.write_files(Path(folder))  # a checkpoint and two .npz files
    plan = Plan(source=DataRecipe(test=str(files.test), mean=(0.3061,), std=(0.3760,)))
    result = bnfix.fix(files.checkpoint, data=str(files.calibration), model=demo.SPEC, plan=plan)

    print(result.report.verdict_sentence())
    for tried in result.report.decisions:
        print(f"{'+' if tried.admitted else '-'} {tried.candidate}: {tried.reason}")

    out = Path(folder) / "fixed.safetensors"
    result.save(out)  # and fixed.safetensors.report.json, .md and .html beside it
    print(sorted(path.name for path in out.parent.glob("fixed*")))
    model = bnfix.load(out, model=digits_net())  # ready to use, in evaluation mode
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
