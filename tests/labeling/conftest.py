"""A real browser for the tests of the sheet: Debian's Chromium, or any that stands under one of its names."""

import shutil

import pytest


@pytest.fixture(scope="session")
def chromium():
    """How to start it."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium on this machine to open sheets in")
    return {"executable_path": path, "args": ["--no-sandbox"]}


@pytest.fixture(scope="module")
def playwright():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    with sync_api.sync_playwright() as started:
        yield started


@pytest.fixture(scope="module")
def browser(playwright, chromium):
    browser = playwright.chromium.launch(**chromium)
    yield browser
    browser.close()
