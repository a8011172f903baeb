"""Headless Chromium, where Debian's packages chromium and chromium-driver are installed."""

from __future__ import annotations

import base64
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    "--disable-background-networking --disable-component-update --disable-dev-shm-usage"
)
# a busy machine takes its time; nothing is judged by it
PATIENCE = 60.0


def why_not() -> str:
    """What is missing for the tests in a browser; "" where nothing is."""
    programs = [shutil.which("chromium"), shutil.which("chromedriver")]
    if None in programs:
        return "no chromium and chromedriver: apt-get install chromium chromium-driver"
    try:
        import selenium  # noqa: F401
    except ImportError:
        return "no selenium: pip install selenium"
    return ""


@contextmanager
def browser(width: int, height: int, *, mobile: bool = False) -> Iterator[Any]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    os.environ["SE_AVOID_STATS"] = "true"
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in FLAGS.split():
        options.add_argument(flag)
    options.add_argument(f"--window-size={width},{height}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    if mobile:
        metrics = {"width": width, "height": height, "pixelRatio": 2.0, "mobile": True}
        options.add_experimental_option("mobileEmulation", {"deviceMetrics": metrics})
    driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def wait_for(driver: Any, script: str) -> Any:
    """What a script gives, once it is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        found = driver.execute_script("return " + script)
        if found:
            return found
        time.sleep(0.05)
    raise AssertionError(f"never true: {script}; console: {driver.get_log('browser')}")


def open_page(driver: Any, path: Path) -> None:
    driver.get(path.as_uri())
    wait_for(driver, "document.documentElement.dataset.ready")


def screenshot(driver: Any, path: Path) -> None:
    """The whole page, not only what the window shows."""
    size = driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
    taken = driver.execute_cdp_cmd(
        "Page.captureScreenshot", {"captureBeyondViewport": True, "clip": clip}
    )
    path.write_bytes(base64.b64decode(taken["data"]))
