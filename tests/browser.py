"""A real browser for pages that the project writes: headless Chromium, driven by ChromeDriver.

It reaches no network: every host but this machine resolves to nothing, and what a page asks for is recorded.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

# The names that Debian gives them.
PROGRAMS = ("chromium", "chromedriver")
_OPTIONS = (
    "--headless",
    # Chromium refuses to run as root in its sandbox, and CI is root.
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


class Browser:
    """One page at a time, with what went wrong in it and what it asked for."""

    def __init__(self, driver: webdriver.Chrome):
        self.driver = driver

    def open(self, page: Path, width: int = 1280, height: int = 900, dark: bool = False) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
        self.driver.get(page.resolve().as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        """What JavaScript returns."""
        return self.driver.execute_script(script, *arguments)

    def complaints(self) -> list[str]:
        """Console messages since the last call: errors, warnings and violations of the page's content policy."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> list[str]:
        """Addresses that were asked for since the last call, data: ones left out."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
        return [address for address in asked if urlsplit(address).scheme != "data"]


@contextmanager
def chromium(profile: Path, *, javascript: bool = True) -> Iterator[Browser]:
    """A browser with a new profile; a missing one fails the test.

    Args: profile: an empty folder.
    """
    paths = {name: shutil.which(name) for name in PROGRAMS}
    missing = [name for name, path in paths.items() if path is None]
    if missing:
        pytest.fail(f"{' and '.join(missing)} not found: run `make browser`, or deselect with -m 'not browser'")
    options = webdriver.ChromeOptions()
    options.binary_location = str(paths["chromium"])
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    if not javascript:
        options.add_experimental_option("prefs", {"profile.managed_default_content_settings.javascript": 2})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(str(paths["chromedriver"])))
    try:
        driver.set_page_load_timeout(120)
        yield Browser(driver)
    finally:
        driver.quit()
