"""The report: verdicts in words, JSON keys to the letter, pages that hostile names cannot break."""

import dataclasses
import json
import math
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType

import matplotlib
import numpy as np
import pytest

from bnfix.core.errors import CheckpointError
from bnfix.data.corruptions import every_corruption
from bnfix.metrics.beside import Custom
from bnfix.metrics.compare import Difference, compare, judge
from bnfix.metrics.evaluate import Outputs
from bnfix.metrics.metrics import Metrics, measure
from bnfix.metrics.robustness import BatchInvariance, Company, Shifted
from bnfix.metrics.robustness import shifted as shifted_rows
from bnfix.norm.swap import Change, SwapPlan
from bnfix.recalibrate.recalibrate import Calibration, Effort, Exceptions
from bnfix.report import pages
from bnfix.report.plots import SHADE
from bnfix.report.records import DataUsed, Evaluated, LayerRow, Trials
from bnfix.report.report import Report, report_paths
from bnfix.training.finetune import Finetuning, TrainingPoint
from bnfix.weights.choose import CurvePoint, WeightChoice

HOSTILE = '<script>alert(1)</script>](javascript:x) | `a`\n\r"onload="x" $\\frac$ _\x00\u202e漢'
TEMPLATES = Path(pages.__file__).parent / "templates"


def logits_of(n: int = 600, k: int = 5, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits whose best temperature is about 1, and their labels."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, k, n)
    logits = rng.normal(size=(n, k))
    logits[np.arange(n), labels] += 1.5
    return (1.5 * logits).astype(np.float32), labels


def shifted(logits: np.ndarray, labels: np.ndarray, by: float) -> np.ndarray:
    """Logits that are right more often by a shift above 0, less often below."""
    changed = logits.copy()
    changed[np.arange(len(labels)), labels] += by
    return changed


def report_of(
    *metrics: Metrics, names: tuple[str, ...] = ("old", "new"), command: str = "fix", **more: object
) -> Report:
    data = DataUsed("folder:x", metrics[0].n_examples, "f00d", splits={"test": 600})
    models = tuple(
        Evaluated(n, f"{n}.pt", "ab" * 32, m) for n, m in zip(names, metrics, strict=False)
    )
    return Report(command, more.pop("data", data), models, **more)  # type: ignore[arg-type]


def full_report(name: str = "net", n_layers: int = 4, n_channels: int = 6, k: int = 5) -> Report:
    """A report with something in every section, every name of which is ``name``."""
    logits, labels = logits_of(k=k)
    old = measure(3 * logits, labels, images_per_second=900.0)
    new = measure(shifted(logits, labels, 0.5), labels, images_per_second=800.0)
    decision = judge(name, (name, new), (name, old))
    rng = np.random.default_rng(0)
    layers = tuple(
        LayerRow(name, name, n_channels, rng.beta(1, 9, n_channels).tolist(), 0.1 + i, 0.2, 0.01)
        for i in range(n_layers)
    )
    points = (TrainingPoint(0, 0, None, 0.9, 0.7), TrainingPoint(1, 9, math.nan, 0.8, 0.8))
    return Report(
        "fix",
        DataUsed(name, 600, name, (name,) * k, {"fit": 900, "test": 600}, (name,), 3),
        (
            Evaluated(name, name, name, old, custom=(Custom(name, 0.5, (0.4, 0.6)),)),
            Evaluated(name, name, name, new, n_layers, (Custom(name, 0.7, None, 0.2, (0, 0.3)),)),
        ),
        layers=layers,
        trials=Trials(
            (decision, dataclasses.replace(decision, admitted=False, reason=name)),
            Calibration(
                name, name, 900, 8, 1.0, name, (), Exceptions((name,), (name,), (name,)),
                effort=Effort(1.0),
            ),
            WeightChoice(
                (), "channel", tuple(CurvePoint(a, 1 - a, 0.7) for a in (0.0, 0.1, 0.3)), {},
                (name,), 4, 3.0, 1.0,
            ),
            (Finetuning(name, 12, points, 1, 9, 1, 1.0),),
        ),
        swap=SwapPlan((Change(name, name, 6, 6, None, 0.0, 1e-7),), (), (name,), (name,)),
        assumptions=(name,),
        options=MappingProxyType({"train": name, "data": Path("x"), "z": math.inf}),
        seed=7,
        command_line=f"bnfix fix {name}",
        versions={"bnfix": "0.1.0"},
        corruptions=corruption_rows((name, f"{name} 2")),
        invariance=(
            BatchInvariance(name, 256, 64, Company(2e-6, 1.0), Company(0, 1.0), 9.0, True),
            BatchInvariance(name, 256, 64, Company(0.4, 0.9), Company(0.1, 0.95), 9.0, False),
        ),
    )  # fmt: skip


def corruption_rows(names: tuple[str, ...]) -> tuple[Shifted, ...]:
    """Every corruption; the more severe, the worse; the later model is the better one."""
    rows: list[Shifted] = []
    for corruption in every_corruption():
        found = []
        for k in range(len(names)):
            logits, labels = logits_of(200)
            logits = shifted(logits, labels, 0.4 * k - 0.3 * corruption.severity)
            found.append(Outputs(logits, labels, 1.0))
        rows += shifted_rows(names, found, corruption.kind, corruption.severity)
    return tuple(rows)


@pytest.fixture(scope="module")
def full() -> Report:
    return full_report()


@pytest.fixture(scope="module")
def full_html(full: Report) -> str:
    return full.to_html()


@pytest.fixture(scope="module")
def hostile() -> tuple[str, str]:
    report = full_report(HOSTILE)
    return report.to_html(), report.to_markdown()


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(key, value or "") for key, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def values(self, key: str) -> list[str]:
        return [value for name, value in self.attributes if name == key]


# What others may rely on, to the letter.
KEYS = {
    "": {"bnfix", "command", "verdict", "temperature_only", "data", "models", "paired", "layers"},
    "data": {"spec", "n_examples", "fingerprint"},
    "models": {
        "name", "file", "sha256", "top1", "top5", "nll", "nll_temperature_scaled", "brier", "ece",
        "interval", "images_per_second",
    },
    "paired": {"name", "against", "top1", "nll", "nll_temperature_scaled", "verdict"},
    "layers": {
        "name", "kind", "channels", "example_weight", "mean_shift", "log_var_ratio", "residual",
    },
}  # fmt: skip
MORE = {
    "calibrations_refused", "outputs_moved",
    "verdict_sentence", "n_seen", "decisions", "calibration", "choice", "curve", "training_curve",
    "swap", "per_class", "reliability", "assumptions", "options", "seed", "command_line",
    "versions", "ranking", "corruptions", "batch_invariance",
}  # fmt: skip


def test_json_has_the_promised_keys(full: Report) -> None:
    found = full.to_json()
    assert set(found) == KEYS[""] | MORE
    assert set(found["data"]) >= KEYS["data"]
    for section in ("models", "paired", "layers"):
        for entry in found[section]:
            assert set(entry) >= KEYS[section]
    for model in found["models"]:
        assert {"top1", "nll"} <= set(model["interval"])
        assert all(len(interval) == 2 for interval in model["interval"].values())
    for name in ("top1", "nll", "nll_temperature_scaled"):
        assert set(found["paired"][0][name]) == {"difference", "interval", "p"}


def test_json_holds_the_numbers_of_the_records(full: Report) -> None:
    found = full.to_json()
    old, new = (model.metrics for model in full.models)
    paired = compare(old, new, seed=7)
    assert found["models"][1]["top1"] == pytest.approx(new.top1)
    assert 0 < found["models"][1]["top1"] <= 1
    assert found["paired"][0]["nll"]["difference"] == pytest.approx(paired.nll.difference)
    assert found["paired"][0]["top1"]["difference"] == pytest.approx(
        (new.top1 or 0) - (old.top1 or 0)
    )
    assert found["verdict"] == found["paired"][0]["verdict"] == "better"
    assert found["paired"][0]["against"] == found["models"][0]["name"]
    assert found["decisions"][0]["nll"] == pytest.approx(new.nll)
    assert [point["example_weight"] for point in found["curve"]] == [0, 0.1, 0.3]


def test_json_is_strict_and_has_no_number_that_is_not_finite(full: Report) -> None:
    text = json.dumps(full.to_json(), allow_nan=False)
    found = json.loads(text)
    assert found["options"] == {"train": "net", "data": "x", "z": None}
    assert found["training_curve"][0]["curve"][1]["loss"] is None


def test_json_per_class_counts_by_hand() -> None:
    old = measure(np.eye(3)[[0, 0, 1, 1, 0]], np.array([0, 0, 0, 1, 1]))
    new = measure(np.eye(3)[[0, 0, 0, 0, 0]], np.array([0, 0, 0, 1, 1]))
    data = DataUsed("x", 5, "f", class_names=("cat",))
    assert report_of(old, new, data=data).to_json()["per_class"] == [
        {"class": 0, "name": "cat", "n_examples": 3, "top1": [pytest.approx(2 / 3), 1.0]},
        {"class": 1, "name": "class 1", "n_examples": 2, "top1": [0.5, 0.0]},
    ]


def test_without_labels_all_is_null_and_nothing_proven() -> None:
    unknown = measure(logits_of()[0], None, images_per_second=100.0)
    report = report_of(unknown, unknown, command="calibrate")
    found = report.to_json()
    assert found["verdict"] is None
    assert found["temperature_only"] is False
    assert found["models"][0]["top1"] is None
    assert found["models"][0]["interval"] == {"top1": None, "nll": None}
    assert found["paired"][0]["nll"] is None
    assert found["paired"][0]["verdict"] is None
    assert report.verdict_sentence() == (
        "The 600 test images have no labels, so accuracy cannot be measured."
    )
    html = report.to_html()
    assert "Not proven" in html
    assert "Confidence calibration" not in html


def test_verdict_sentence_better_and_worse() -> None:
    logits, labels = logits_of()
    old, new = measure(logits, labels), measure(shifted(logits, labels, 0.6), labels)
    top1 = [f"{100 * (m.top1 or 0):.1f}%" for m in (old, new)]
    d = compare(old, new).top1
    better = report_of(old, new).verdict_sentence()
    assert better.startswith(
        f"better: {top1[1]} of 600 test images right, {top1[0]} before; the difference is "
        f"{100 * d.difference:.1f} points, 95% interval {100 * d.interval[0]:.1f} to "
        f"{100 * d.interval[1]:.1f}."
    )
    assert f" NLL is lower: {new.nll:.3f}, {old.nll:.3f} before" in better
    worse = report_of(new, old).verdict_sentence()
    assert worse.startswith(
        f"worse: {top1[0]} of 600 test images right, {top1[1]} before; the diff"
    )
    assert "NLL is higher" in worse


def test_verdict_sentence_same() -> None:
    metrics = measure(*logits_of())
    sentence = report_of(metrics, metrics).verdict_sentence()
    assert sentence.startswith("same: no measurable difference: ")
    assert "the difference is 0.0 points, 95% interval 0.0 to 0.0." in sentence
    assert "NLL does not differ measurably" in sentence


def test_verdict_sentence_when_only_nll_differs_by_temperature() -> None:
    logits, labels = logits_of()
    report = report_of(measure(5 * logits, labels), measure(logits, labels))
    assert report.temperature_only
    assert report.verdict == "better"
    sentence = report.verdict_sentence()
    assert sentence.startswith("better: NLL ")
    assert "Top-1 does not differ measurably" in sentence
    assert "Temperature scaling alone gives the same gain." in sentence
    assert "temperature scaling alone gives the same gain" in report.to_html()


def test_verdict_sentence_names_the_measure_that_is_worse() -> None:
    logits, labels = logits_of()
    report = report_of(measure(logits, labels), measure(8 * shifted(logits, labels, 0.6), labels))
    assert report.verdict == "worse"
    assert report.verdict_sentence().startswith("worse: NLL ")
    assert "Top-1 is higher" in report.verdict_sentence()


def test_verdict_sentence_of_one_model() -> None:
    metrics = measure(*logits_of())
    low, high = metrics.interval["top1"]
    report = report_of(metrics, command="eval")
    assert report.verdict is None
    assert report.verdict_sentence() == (
        f"{100 * (metrics.top1 or 0):.1f}% of 600 test images right (95% interval "
        f"{100 * low:.1f} to {100 * high:.1f})."
    )
    assert "Measured" in report.to_html()


def test_verdict_sentence_says_that_images_were_seen() -> None:
    logits, labels = logits_of()
    report = report_of(
        measure(logits, labels), measure(shifted(logits, labels, 0.6), labels),
        command="eval", n_seen=1234,
    )  # fmt: skip
    sentence = report.verdict_sentence()
    assert (
        "1,234 of these images were used to fit or choose the model, so this is no proof."
        in sentence
    )
    assert "test images" not in sentence
    assert "with old" in sentence
    assert "Better, no proof" in report.to_html()


def test_verdict_is_the_last_against_the_first() -> None:
    logits, labels = logits_of()
    first, better = measure(logits, labels), measure(shifted(logits, labels, 0.6), labels)
    worse = measure(shifted(logits, labels, -0.6), labels)
    report = report_of(first, better, worse, names=("a", "b", "c"), command="eval")
    assert [entry["verdict"] for entry in report.to_json()["paired"]] == ["better", "worse"]
    assert report.verdict == "worse"


def test_nothing_evaluated_is_said() -> None:
    pool = Report("pool", None, ())
    assert pool.verdict_sentence() == "Not evaluated: no images were used."
    alone = Report("calibrate", DataUsed("photos/", 9, "0"), ())
    assert alone.verdict_sentence() == "Not evaluated: no labelled images were left for a test."
    plan = SwapPlan((Change("bn", "BatchNorm2d", 3, 3, None, 0.0, 1e-7),), (), (), ())
    report = Report("convert", None, (), swap=plan)
    assert report.verdict_sentence() == ("1 norm layer swapped; accuracy was not evaluated.")
    assert report.to_json()["data"] is None
    html = report.to_html()
    assert "Done" in html
    assert "<svg" not in html


@pytest.mark.parametrize(
    ("interval", "points", "expected"),
    [
        ((0.0004, 0.03), True, ("1.00", "0.04", "3.00")),
        ((-0.0571, 0.039), True, ("1.0", "-5.7", "3.9")),
        ((0.0, 0.02), True, ("1.0", "0.0", "2.0")),
        ((-0.00002, 0.02), False, ("0.01000", "-0.00002", "0.02000")),
    ],
)
def test_an_interval_that_leaves_out_zero_never_shows_it(
    interval: tuple[float, float], points: bool, expected: tuple[str, ...]
) -> None:
    assert pages.ends(Difference(0.01, interval, 0.5), points) == expected


def test_hostile_names_are_text_in_html(hostile: tuple[str, str]) -> None:
    page = Page(hostile[0])
    assert "script" not in page.tags
    assert not [key for key, _ in page.attributes if key.startswith("on")]
    assert all(value.startswith("#") for value in page.values("href"))
    assert not page.values("src")
    assert any("<script>alert(1)</script>" in text for text in page.text)
    assert "\x00" not in hostile[0]
    assert "\u202e" not in hostile[0]
    assert any("漢" in text for text in page.text)


def test_hostile_names_are_text_in_markdown(hostile: tuple[str, str]) -> None:
    outside_code = [line for line in hostile[1].splitlines() if not line.startswith("    ")]
    text = "\n".join(outside_code)
    assert "<" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\](javascript:x) \\| \\`a\\`" in text
    assert not re.search(r"(?<!\\)[\[\]`]", text)


def test_markdown_tables_are_well_formed(hostile: tuple[str, str]) -> None:
    blocks = re.findall(r"(?:^\|.*\n)+", hostile[1], flags=re.MULTILINE)
    assert len(blocks) == 8
    for block in blocks:
        header, rule, *rows = block.splitlines()
        assert re.fullmatch(r"\|(-+:?\|)+", rule)
        assert rows
        n = len(re.findall(r"(?<!\\)\|", header))
        assert all(len(re.findall(r"(?<!\\)\|", row)) == n for row in (rule, *rows))


def test_markdown_headings_stand_alone(full: Report) -> None:
    lines = full.to_markdown().splitlines()
    for before, line in pairwise(lines):
        assert before == "" or not line.startswith(("#", "|--")) or before.startswith("|")


def test_page_is_one_file_with_references_that_resolve(full_html: str) -> None:
    page = Page(full_html)
    ids = page.values("id")
    assert len(ids) == len(set(ids))
    wanted = [value.removeprefix("#") for value in page.values("href")]
    wanted += re.findall(r"url\(#([^)]+)\)", full_html) + page.values("aria-labelledby")
    assert wanted
    assert set(wanted) <= set(ids)
    assert not re.search(r"https?://|@import|<link|<img", full_html)
    assert re.search(r'Content-Security-Policy" content="default-src \'none\'', full_html)


def test_page_is_structured_for_readers_that_do_not_see_it(full_html: str) -> None:
    page = Page(full_html)
    levels = [int(tag[1]) for tag in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels.count(1) == 1
    assert all(b - a <= 1 for a, b in pairwise(levels))
    assert levels[0] == 1
    assert {"header", "main", "footer"} <= set(page.tags)
    assert page.values("lang") == ["en"]
    assert page.tags.count("table") == page.tags.count("caption")
    assert page.tags.count("svg") == page.values("role").count("img") == 9
    assert not re.search(r"<th(?! scope)[ >]", full_html)


def test_colors_follow_the_theme(full_html: str) -> None:
    svgs = re.findall(r"<svg.*?</svg>", full_html, flags=re.DOTALL)
    assert not [svg for svg in svgs if re.search(r"(fill|stroke): ?#", svg)]
    assert all("currentColor" in svg and "font-family" not in svg for svg in svgs)


def luminance(color: str) -> float:
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def blended(above: str, below: str, alpha: float) -> str:
    pairs = [(int(above[i : i + 2], 16), int(below[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(alpha * a + (1 - alpha) * b):02x}" for a, b in pairs)


@pytest.mark.parametrize("theme", [0, 1])
def test_contrast_is_enough(theme: int) -> None:
    """WCAG AA: 4.5 for text, 3 for what a picture is made of."""
    css = (TEMPLATES / "report.css").read_text()
    block = re.findall(r":root \{(.*?)\}", css, flags=re.DOTALL)[theme]
    color = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", block))

    def contrast(a: str, b: str) -> float:
        low, high = sorted([luminance(a), luminance(b)])
        return (high + 0.05) / (low + 0.05)

    for ground in ("bg", "card", "soft"):
        assert min(contrast(color[ink], color[ground]) for ink in ("ink", "muted")) >= 4.5
    for mark in ("first", "last", "loss"):
        assert contrast(color[mark], color["card"]) >= 3
    for cell in ("muted", "last", "loss"):
        assert contrast(color["ink"], blended(color[cell], color["card"], SHADE)) >= 4.5
    badges = re.findall(r"--accent: (#[0-9a-f]{6})", css)
    assert min(contrast(badge, "#ffffff") for badge in badges) >= 4.5


TITLES = (
    "Candidates before the gate",
    "Confidence calibration: reliability",
    "Example weight over depth",
    "NLL over the example weight",
    "Population statistics: drift by layer",
    "Fine-tuning",
    "Under corruptions",
    "Per-class change",
    "Speed",
)


def test_all_pictures_and_sections_are_there(full_html: str) -> None:
    assert all(f"<h3>{title}</h3>" in full_html for title in TITLES)
    for heading in (
        "Steps and decisions", "Models compared", "Your own metrics",
        "Under common corruptions", "Batch invariance", "Class by class", "Norm layers",
        "Assumptions and exclusions", "How to reproduce",
    ):  # fmt: skip
        assert f">{heading}</h2>" in full_html
    assert ">Ranking</h2>" not in full_html  # of candidates for one output there is none


def test_pictures_and_sections_appear_only_when_there_is_something() -> None:
    html = report_of(measure(*logits_of()), command="eval").to_html()
    shown = [title for title in TITLES if f"<h3>{title}</h3>" in html]
    assert shown == ["Confidence calibration: reliability"]
    for heading in (
        "Steps and decisions", "Models compared", "Norm layers", "Assumptions", "Ranking",
        "Your own metrics", "corruptions", "Batch invariance",
    ):  # fmt: skip
        assert heading not in html
    assert "The model" in html


def test_layers_that_keep_weight_zero_are_said_and_not_drawn() -> None:
    rows = (LayerRow("bn1", "BatchNorm2d", 3, 0.0), LayerRow("bn2", "BatchNorm2d", 3, [0.0] * 3))
    html = report_of(measure(*logits_of()), layers=rows).to_html()
    assert "Example weight over depth" not in html
    assert "All example weights are 0" in html


def test_layers_that_weigh_the_batch_are_counted_and_shown() -> None:
    rows = (LayerRow("bn1", "BatchNorm2d", 3, 0.0, [0.1, 0.2, 0.3]), LayerRow("bn2", "x", 3))
    report = report_of(measure(*logits_of()), layers=rows)
    html, text = report.to_html(), report.to_markdown()
    assert "All example weights are 0" not in html
    for page in (html, text):
        assert "1 of 2 norm layers weigh the batch, by up to 0.3" in page
    assert "<td>0.2<small>0.1 to 0.3</small></td>" in html
    assert "| bn1 | BatchNorm2d | 3 | 0 | 0.2 (0.1 to 0.3) | - |" in text
    one = dataclasses.replace(rows[0], batch_weight=0.0)
    assert "Batch weight" not in report_of(measure(*logits_of()), layers=(one,)).to_html()


def test_statistics_that_did_not_move_are_not_drawn() -> None:
    row = LayerRow("bn1", "BatchNorm2d", 3, 0.0, 0.0, 0.0)
    metrics = measure(*logits_of())
    assert "drift by layer" not in report_of(metrics, layers=(row,)).to_html()
    left = dataclasses.replace(row, residual=0.02)
    html = report_of(metrics, layers=(row, left)).to_html()
    assert "The largest residual is 0.02, at layer 2." in html
    assert "Means are in" not in html


def test_options_are_listed_by_dotted_name_and_open_ones_left_out() -> None:
    options = {"swap": {"to": "group", "layers": ("a*", "b"), "skip": ()}, "finetune": None}
    report = Report("fix", None, (), options=options)
    assert "Options: swap.to = group, swap.layers = a\\*,b\n" in report.to_markdown()
    html = report.to_html()
    assert '<th scope="row">swap.layers</th><td>a*,b</td>' in html
    assert "swap.skip" not in html
    assert "finetune" not in html


def test_same_report_same_bytes_whatever_the_users_settings_are(full_html: str) -> None:
    with matplotlib.rc_context({"font.size": 30, "svg.fonttype": "path", "axes.grid": False}):
        assert full_report().to_html() == full_html
        assert matplotlib.rcParams["font.size"] == 30


def test_page_stays_small_for_deep_wide_models_and_many_classes() -> None:
    report = full_report("layer4.2.a_long_name.bn3", n_layers=200, n_channels=2048, k=1000)
    assert len(report.to_html().encode()) < 1_500_000


def test_save_writes_three_files(full: Report, full_html: str, tmp_path: Path) -> None:
    paths = report_paths(tmp_path / "out.safetensors")
    assert [path.name for path in paths] == [
        "out.safetensors.report.json", "out.safetensors.report.md", "out.safetensors.report.html",
    ]  # fmt: skip
    full.save(*paths)
    assert json.loads(paths[0].read_text()) == full.to_json()
    assert paths[1].read_text() == full.to_markdown()
    assert paths[2].read_text() == full_html
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_report_that_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    class Broken:
        def __str__(self) -> str:
            raise ArithmeticError("no text")

    paths = report_paths(tmp_path / "out.safetensors")
    for path in paths:
        path.write_text("old")
    with pytest.raises(ArithmeticError, match="no text"):
        Report("eval", None, (), options={"x": Broken()}).save(*paths)
    assert [path.read_text() for path in paths] == ["old"] * 3
    missing = report_paths(tmp_path / "nowhere" / "out.safetensors")
    with pytest.raises(CheckpointError, match="nowhere"):
        Report("eval", None, ()).save(*missing)


# --- corruptions, ranks, own metrics ---


def test_the_heat_map_says_how_many_corruptions_gain_and_lose() -> None:
    rows = corruption_rows(("old", "new"))
    metrics = [measure(*logits_of())] * 2
    html = report_of(*metrics, command="eval", corruptions=rows).to_html()
    svg = re.search(r'<svg[^>]*aria-labelledby="corruptions-title".*?</svg>', html, re.DOTALL)
    assert svg is not None
    shown = [text for text in Page(svg[0]).text if text]
    last = [row for row in rows if row.model == "new"]
    for row in rows[:6]:
        assert f"{100 * row.top1:.0f}%" in shown or row.model == "new"
    for row in last:
        assert row.paired is not None
        low, high = row.paired.top1.interval
        star = "*" if low > 0 or high < 0 else ""
        assert f"{100 * row.paired.top1.difference:+.1f}{star}" in shown
    opacities = [float(x) for x in re.findall(r"opacity: ?([\d.]+)", svg[0])]
    assert opacities
    assert max(opacities) <= SHADE
    n_up = sum(row.paired.top1.interval[0] > 0 for row in last if row.paired)
    assert n_up > 0
    assert f"{n_up} of 18 are gains, 0 are losses" in html
    alone = corruption_rows(("one",))
    html = report_of(metrics[0], names=("one",), command="eval", corruptions=alone).to_html()
    mean = np.mean([row.top1 for row in alone])
    assert f"Darker is worse; {100 * mean:.1f}% over all of them." in html
    assert "are gains" not in html
    assert "against one" not in html


def test_corruptions_in_json_have_one_row_a_model_and_are_paired_to_the_first(full: Report) -> None:
    rows = full.to_json()["corruptions"]
    assert len(rows) == 36
    assert set(rows[1]) == {
        "model", "kind", "severity", "n_examples", "top1", "nll", "nll_temperature_scaled",
        "interval", "paired",
    }  # fmt: skip
    assert rows[0]["paired"] is None
    assert set(rows[1]["paired"]) == {
        "name", "against", "top1", "nll", "nll_temperature_scaled", "verdict", "temperature_only",
    }  # fmt: skip


def test_a_number_of_the_users_is_shown_with_what_interval_there_is(full: Report) -> None:
    first, last = (model["custom"]["net"] for model in full.to_json()["models"])
    assert first == {"value": 0.5, "interval": [0.4, 0.6], "difference": None}
    assert last == {
        "value": 0.7, "interval": None, "difference": {"difference": 0.2, "interval": [0, 0.3]},
    }  # fmt: skip
    assert "| net | net | 0.7000 | - | 0.2000 | 0.0000 to 0.3000 |" in full.to_markdown()
    assert "<td>0.5000<small>0.4000 to 0.6000</small></td>" in full.to_html()


def test_a_model_that_looks_at_its_neighbours_is_said_to(full: Report) -> None:
    assert "| net | 2e-06 | 100.0% | 0 | 100.0% | 9 | yes, to rounding |" in full.to_markdown()
    assert "| net | 0.4 | 90.0% | 0.1 | 95.0% | 9 | no |" in full.to_markdown()


def test_outputs_that_are_no_logits_claim_nothing() -> None:
    counted = Metrics(n_examples=40, images_per_second=10.0)
    old, new = (
        Evaluated(name, None, None, counted, custom=(Custom("dice", value),), classified=False)
        for name, value in (("old", 0.5), ("new", 0.75))
    )
    report = Report("eval", DataUsed("x", 40, "f"), (old, new))
    assert report.verdict_sentence() == (
        "On 40 images: dice 0.750 (0.500 with old); the outputs are not class logits."
    )
    assert report.to_json()["ranking"] == []
    assert ">Measured<" in report.to_html()


def test_ranks_put_nll_first_and_top1_second() -> None:
    labels = np.array([0, 0, 1, 1])
    sure = np.array([[2.0, 0], [2, 0], [0, 2], [0.5, 0]])
    unsure = np.array([[0.1, 0], [0.1, 0], [0, 0.1], [0, 0.1]])
    metrics = [measure(x.astype(np.float32), labels) for x in (unsure, sure, sure)]
    report = report_of(*metrics, names=("unsure", "sure", "again"), command="eval")
    assert [(row.rank, row.name) for row in report.ranking] == [
        (1, "sure"), (1, "again"), (3, "unsure"),
    ]  # fmt: skip
    assert report.ranking[2].paired is None
    assert report_of(*metrics[:2]).ranking == []  # of a fix, whose second is what was made


@pytest.mark.parametrize("limit", [1, 2, 24, 500])
def test_a_long_name_is_cut_to_the_limit(limit: int) -> None:
    assert pages.clean("x" * limit, limit) == "x" * limit
    cut = pages.clean("x" * (limit + 1), limit)
    assert len(cut) == limit
    assert cut.endswith("…")
