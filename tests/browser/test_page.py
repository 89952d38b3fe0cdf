"""The page in a real browser: whole, quiet, offline, and readable at any width, in any light."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bnfix.core.settings import DataRecipe, FinetuneRecipe, ModelRecipe
from bnfix.demo import SPEC, write_files
from bnfix.jobs.compare import evaluate_files
from bnfix.jobs.run import fix
from bnfix.jobs.session import Plan
from tests.browser import driving
from tests.real import DATA, needs_data
from tests.test_report import full_report

pytestmark = pytest.mark.skipif(
    driving.BROWSER is None or driving.DRIVER is None, reason="no Chromium with chromedriver here"
)

HOSTILE = "<img src=x onerror=alert(1)><script>document.title='got'</script>&amp;\"'"
LONG = "a_very_long_name_without_any_place_to_break_it_" * 3
MOST_BYTES = 1_500_000


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages as users get them, and two with names that nobody should have chosen."""
    folder = tmp_path_factory.mktemp("pages")
    files = write_files(folder / "demo")
    plan = Plan(
        model=ModelRecipe(SPEC),
        source=DataRecipe(test=str(files.test), mean=(0.5,), std=(0.5,)),
        finetune=FinetuneRecipe(train="norms+head", example_weight="learn", epochs=1),
    )
    fix(files.checkpoint, data=str(files.calibration), plan=plan).save(folder / "demo.safetensors")
    found = {"demo": folder / "demo.safetensors.report.html"}
    for name, text in (("hostile", HOSTILE), ("long", LONG)):
        found[name] = folder / f"{name}.html"
        found[name].write_text(full_report(text).to_html(), encoding="utf-8")
    return found


@pytest.fixture(scope="module")
def windows() -> Iterator[dict[tuple[int, bool], Any]]:
    with driving.browser(390) as phone, driving.browser(1280, dark=True) as desk:
        yield {(390, False): phone, (1280, True): desk}


def check_whole(driver: Any, page: Path) -> None:
    """Nothing complained, nothing fetched, every section filled, every image drawn, no overflow."""
    driving.requested(driver)
    driving.complaints(driver)
    driving.open_whole(driver, page)
    fetched = [a for a in driving.requested(driver) if not a.startswith("data:")]
    assert fetched == [page.as_uri()]
    assert driving.complaints(driver) == []
    scroll, client = driver.execute_script(
        "const e = document.documentElement; return [e.scrollWidth, e.clientWidth]"
    )
    assert client > 300
    assert scroll <= client
    sections = driver.execute_script(
        "return [...document.querySelectorAll('section')].map("
        "s => [s.getAttribute('aria-labelledby'), s.querySelector('h2').innerText.trim(), "
        "s.getBoundingClientRect().height])"
    )
    assert len(sections) >= 4
    for name, heading, height in sections:
        assert name
        assert heading
        assert height > 40
    drawn = driver.execute_script(
        "return [...document.querySelectorAll('figure svg, figure img')].map(e => {"
        "const r = e.getBoundingClientRect();"
        "const marks = e.querySelectorAll('path, use, image').length;"
        "return [r.width, r.height, marks || e.naturalWidth]"
        "})"
    )
    n_figures = driver.execute_script("return document.querySelectorAll('figure').length")
    assert len(drawn) >= n_figures >= 1
    for width, height, marks in drawn:
        assert width > 100
        assert height > 50
        assert marks > 3
    assert page.stat().st_size < MOST_BYTES


@pytest.mark.parametrize("size", [(390, False), (1280, True)], ids=["phone", "dark-desk"])
@pytest.mark.parametrize("name", ["demo", "hostile", "long"])
def test_a_page_is_whole_quiet_and_fits(pages, windows, name, size):
    check_whole(windows[size], pages[name])


def test_a_page_that_is_too_wide_is_told_from_one_that_fits(tmp_path, windows):
    page = tmp_path / "wide.html"
    page.write_text("<meta name=viewport content='width=device-width'><p style='width:900px'>x")
    with pytest.raises(AssertionError):
        check_whole(windows[390, False], page)


def test_a_hostile_name_is_text_and_nothing_else(pages, windows):
    driver = windows[390, False]
    driving.open_whole(driver, pages["hostile"])
    assert driver.execute_script("return document.querySelectorAll('script, img').length") == 0
    assert driver.title != "got"
    assert "onerror=alert(1)" in driver.execute_script("return document.body.innerText")


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_light_is_light_dark_is_dark_and_both_can_be_read(pages, windows):
    found = {}
    for size, driver in windows.items():
        driver.get(pages["demo"].as_uri())
        style = "getComputedStyle(document.querySelector('main p, main li, body'))"
        text, ground = driver.execute_script(
            f"return [{style}.color, getComputedStyle(document.body).backgroundColor]"
        )
        found[size[1]] = _luminance(text), _luminance(ground)
        light, dark = max(found[size[1]]), min(found[size[1]])
        assert (light + 0.05) / (dark + 0.05) >= 4.5  # WCAG's least contrast
    assert found[False][1] > 0.8
    assert found[True][1] < 0.1


def test_print_gives_pages_of_paper(pages, windows):
    driver = windows[1280, True]
    driver.get(pages["demo"].as_uri())
    printed = base64.b64decode(driver.execute_cdp_cmd("Page.printToPDF", {})["data"])
    assert printed.startswith(b"%PDF")
    assert 1 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 15
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    ground = driver.execute_script("return getComputedStyle(document.body).backgroundColor")
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia",
        {"media": "", "features": [{"name": "prefers-color-scheme", "value": "dark"}]},
    )
    assert ground == "rgba(0, 0, 0, 0)" or _luminance(ground) > 0.8


@needs_data
def test_the_page_of_a_real_network_is_whole(tmp_path, windows):
    cifar = DATA / "cifar10"
    report = evaluate_files(
        [cifar / "resnet20.th", cifar / "resnet20_b.th"],
        data=str(cifar / "test.npz"),
        model=f"{Path(__file__).parents[1]}/nets.py:resnet20",
        source=DataRecipe(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
    )
    page = tmp_path / "report.html"
    page.write_text(report.to_html(), encoding="utf-8")
    for driver in windows.values():
        check_whole(driver, page)
