"""Chromium, and tabs that fail a test when a script fails or the page's policy is violated."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, async_playwright

from tests.brokers.requirement import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    Tab = Callable[..., AbstractAsyncContextManager[Page]]

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
WINDOW = {"width": 1280, "height": 800}


@asynccontextmanager
async def launched(*options: str) -> AsyncIterator[Browser]:
    """Run Debian's Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        need("Chromium is not installed: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=[*OPTIONS, *options])
        yield browser
        await browser.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def chromium() -> AsyncIterator[Browser]:
    """Chromium, one per file of tests."""
    async with launched() as browser:
        yield browser


@pytest.fixture
def tab(chromium: Browser) -> Tab:
    """Open a tab with storage of its own."""
    return lambda url, **options: opened(chromium, url, **options)


@asynccontextmanager
async def opened(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """Open a page in a context of its own; no script may fail, and none may violate the policy of the page."""
    context = await browser.new_context(**{"viewport": WINDOW, "reduced_motion": "reduce", **options})
    page = await context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on(
        "console", lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None
    )
    page.set_default_timeout(10_000)
    await page.goto(url)
    try:
        yield page
    finally:
        await context.close()
    assert faults == []
