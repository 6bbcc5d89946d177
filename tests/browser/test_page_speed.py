"""Fifty streams of twenty deltas per second: frames per second and memory of the page, in headless Chromium."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from playwright.async_api import expect

from tests.browser.fake_gateway import FakeGateway, delta, started, usage
from tests.browser.scenes import send_prompt

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.browser.conftest import Tab

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.long]

STREAMS, DELTAS_PER_S, SECONDS = 50, 20, 10
FRAMES = """() => {
    const began = performance.now();
    window.frames60 = { count: 0, longest: 0, last: began, began };
    const tick = (now) => {
        frames60.count += 1;
        frames60.longest = Math.max(frames60.longest, now - frames60.last);
        frames60.last = now;
        requestAnimationFrame(tick);
    };
    requestAnimationFrame(tick);
}"""


async def _stream(fake: FakeGateway) -> None:
    """Publish the deltas of all jobs at their rate."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    for seq in range(1, DELTAS_PER_S * SECONDS + 1):
        await asyncio.sleep(max(0.0, began + seq / DELTAS_PER_S - loop.time()))
        for job_id in fake.logs:
            await fake.publish(delta(job_id, seq, f"word {seq} " if seq % 12 else "\n\n"))


async def test_page_stays_smooth_with_fifty_streams(
    tab: Tab, record_property: Callable[[str, object], None]
) -> None:
    """At least 50 frames/s on a busy machine of two cores, and under 100 MB of JavaScript's memory."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await send_prompt(page, times=STREAMS)
        await expect(page.locator(".card .id[title]")).to_have_count(STREAMS)
        await fake.publish(*(started(job_id) for job_id in [*fake.logs]))
        await page.evaluate(FRAMES)
        await _stream(fake)
        frames = await page.evaluate("frames60")
        await fake.publish(*(usage(job_id, DELTAS_PER_S * SECONDS + 1) for job_id in [*fake.logs]))
        await expect(page.locator(".word", has_text="Completed")).to_have_count(STREAMS)
        session = await page.context.new_cdp_session(page)
        await session.send("Performance.enable")
        metrics = {m["name"]: m["value"] for m in (await session.send("Performance.getMetrics"))["metrics"]}

    rate = frames["count"] / (frames["last"] - frames["began"]) * 1000
    megabytes = metrics["JSHeapUsedSize"] / 1e6
    for name, value in (
        ("frames_per_s", rate),
        ("longest_frame_ms", frames["longest"]),
        ("heap_mb", megabytes),
    ):
        record_property(name, round(value, 1))
    assert rate >= 50
    assert megabytes < 100
