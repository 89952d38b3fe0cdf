"""Pictures of a report's page, for README and for looking at it: ``make screenshots``."""

from __future__ import annotations

import base64
import sys
from pathlib import Path

from tests.browser.driving import browser


def photograph(page: Path, place: Path, width: int, *, dark: bool, height: int | None) -> None:
    """Write one picture; of the whole page where no height is given."""
    with browser(width, dark=dark) as driver:
        driver.get(page.as_uri())
        whole = int(driver.execute_script("return document.documentElement.scrollHeight"))
        clip = {"x": 0, "y": 0, "width": width, "height": height or whole, "scale": 1}
        found = driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True}
        )
    place.write_bytes(base64.b64decode(found["data"]))


def main(page: str, folder: str, *which: str) -> None:
    """Two pictures for README; with ``all`` the whole page too, at both widths, light and dark."""
    pictures: list[tuple[str, int, bool, int | None]] = [
        ("demo-report", 1280, False, 1500),
        ("demo-report-phone", 390, True, 1200),
    ]
    if "all" in which:
        pictures += [
            (f"whole-{width}-{'dark' if dark else 'light'}", width, dark, None)
            for width in (1280, 390)
            for dark in (False, True)
        ]
    for name, width, dark, height in pictures:
        place = Path(folder) / f"{name}.png"
        photograph(Path(page).resolve(), place, width, dark=dark, height=height)


if __name__ == "__main__":
    main(*sys.argv[1:])
