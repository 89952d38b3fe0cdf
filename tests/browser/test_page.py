"""The page in a real browser: nothing sticks out on a phone."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.test_report import full_report

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")

MEASURE = """<!DOCTYPE html><iframe id="page" src="page.html" style="width:390px;height:800px">
</iframe><script>
document.getElementById("page").onload = event => {
  const root = event.target.contentDocument.documentElement;
  document.body.dataset.widths = root.scrollWidth + "/" + root.clientWidth;
};
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_a_phone_needs_no_horizontal_scrolling(tmp_path: Path) -> None:
    name = "a_very_long_name_without_any_place_to_break_it_" * 3
    (tmp_path / "page.html").write_text(full_report(name).to_html(), encoding="utf-8")
    (tmp_path / "measure.html").write_text(MEASURE, encoding="utf-8")
    shown = subprocess.run(
        [
            str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
            "--disable-background-networking", "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
            (tmp_path / "measure.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=True,
    ).stdout  # fmt: skip
    widths = shown.split('data-widths="')[1].split('"')[0]
    scroll, client = (int(width) for width in widths.split("/"))
    assert 300 < client
    assert scroll <= client
