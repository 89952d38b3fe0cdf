"""`bnfix fix` from Python: candidates, gate, proof on a test split, file and report."""

import tempfile
from pathlib import Path

import bnfix
from bnfix import demo, settings
from bnfix.demo.network import digits_net

with tempfile.TemporaryDirectory() as folder:
    files = demo.write_files(Path(folder))  # a checkpoint and two .npz files
    source = settings.DataRecipe(test=str(files.test), mean=(0.3061,), std=(0.3760,))
    plan = bnfix.Plan(source=source)
    result = bnfix.fix(files.checkpoint, data=str(files.calibration), model=demo.SPEC, plan=plan)

    print(result.report.verdict_sentence())
    for tried in result.report.decisions:
        print(f"{'+' if tried.admitted else '-'} {tried.candidate}: {tried.reason}")

    out = Path(folder) / "fixed.safetensors"
    result.save(out)  # and fixed.safetensors.report.json, .md and .html next to it
    print(sorted(path.name for path in out.parent.glob("fixed*")))
    model = bnfix.load(out, model=digits_net())  # ready to use, in evaluation mode
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
