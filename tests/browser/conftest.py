"""Chromium, one per session, and a page in a context of its own per test."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Browser, Page, async_playwright

from tests.brokers.requirement import need

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

OPTIONS = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """Debian's Chromium."""
    executable = shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        need("Chromium is not installed: apt-get install chromium")
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=executable, args=OPTIONS)
        yield browser
        await browser.close()


@pytest.fixture
def tab(chromium: Browser) -> Callable[..., AbstractAsyncContextManager[Page]]:
    """Open a tab with storage of its own; fail the test if a script fails or the policy of the page is violated."""

    @asynccontextmanager
    async def opened(url: str, **options: Any) -> AsyncIterator[Page]:
        context = await chromium.new_context(**{"viewport": {"width": 1280, "height": 800}, **options})
        page = await context.new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on(
            "console",
            lambda line: faults.append(line.text) if "Content Security Policy" in line.text else None,
        )
        await page.goto(url)
        yield page
        await context.close()
        assert faults == []

    return opened
