"""A headless Chromium that shows a page and tells what it did."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from selenium import webdriver

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")


@contextmanager
def browser(width: int, *, dark: bool = False) -> Iterator[webdriver.Chrome]:
    """A browser of a width, which keeps a log of its console and its requests."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(BROWSER)
    for word in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
        "--disable-background-networking", "--hide-scrollbars",
    ):  # fmt: skip
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(str(DRIVER)))
    try:
        # Windows have a least width; the page's own does not.
        driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600},
        )
        _prefer(driver, "dark" if dark else "light")
        yield driver
    finally:
        driver.quit()


def _prefer(driver: webdriver.Chrome, scheme: str) -> None:
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requested(driver: webdriver.Chrome) -> list[str]:
    """Addresses of everything that was asked for since the last call."""
    messages = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    return [
        str(m["params"]["request"]["url"])
        for m in messages
        if m["method"] == "Network.requestWillBeSent"
    ]


def complaints(driver: webdriver.Chrome) -> list[Any]:
    """What the console says since the last call."""
    return list(driver.get_log("browser"))


def open_whole(driver: webdriver.Chrome, page: Path) -> None:
    """Show a page with everything that can be unfolded unfolded."""
    driver.get(page.as_uri())
    driver.execute_script("document.querySelectorAll('details').forEach(d => d.open = true)")
