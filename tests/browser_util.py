"""A headless Chromium for tests of pages; tests skip themselves where there is none."""

import contextlib
import shutil
from collections.abc import Iterator

import pytest

ARGUMENTS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@contextlib.contextmanager
def chromium() -> Iterator:
    """Open a browser; skip the test where playwright or chromium is missing."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if not path:
        pytest.skip("needs chromium")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(executable_path=path, args=list(ARGUMENTS))
        try:
            yield browser
        finally:
            browser.close()


def watch(page) -> tuple[list[str], list[str]]:
    """(errors of scripts and console, addresses asked for), which grow as they happen."""
    errors: list[str] = []
    asked: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda m: m.type == "error" and errors.append(m.text))
    page.on("request", lambda request: asked.append(request.url))
    return errors, asked
