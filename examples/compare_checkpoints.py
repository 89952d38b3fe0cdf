"""Two checkpoints on the same images: is the difference real, and is it more than temperature?"""

import tempfile
from pathlib import Path

import bnfix
from bnfix import demo, settings

with tempfile.TemporaryDirectory() as folder:
    files = demo.write_files(Path(folder))
    source = settings.DataRecipe(mean=(0.3061,), std=(0.3760,))

    # The second checkpoint is the first with new statistics, stated outright: no labels are used.
    plan = bnfix.Plan(
        source=source,
        statistics=settings.StatisticsRecipe("population"),
        weight=settings.WeightRecipe("keep"),
    )
    result = bnfix.calibrate(
        files.checkpoint, data=str(files.calibration), model=demo.SPEC, plan=plan
    )
    recalibrated = Path(folder) / "recalibrated.safetensors"
    result.save(recalibrated)

    report = bnfix.evaluate_files(
        [files.checkpoint, recalibrated], data=str(files.test), model=demo.SPEC, source=source
    )

for model in report.models:
    low, high = model.metrics.interval["top1"]
    print(f"{model.name}: top-1 {model.metrics.top1:.1%} ({low:.1%} to {high:.1%})")
paired = report.paired[0]
print(f"verdict: {paired.verdict}; McNemar's p for top-1 {paired.top1.p:.3f}")
print(f"NLL {paired.nll.difference:+.3f}, scaled {paired.nll_temperature_scaled.difference:+.3f}")
