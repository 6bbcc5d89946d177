"""Write docs/images/page-dark.png and page-light.png: the live page with six jobs, in Chromium on a scripted gateway."""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.browser.conftest import launched, opened  # noqa: E402
from tests.browser.fake_gateway import FakeGateway, delta, started, usage  # noqa: E402
from tests.browser.scenes import RUSSIAN, TEXT, new_job  # noqa: E402

if TYPE_CHECKING:
    from playwright.async_api import Page

PICTURES = ROOT / "docs" / "images"
SCHEMES: tuple[Literal["dark", "light"], ...] = ("dark", "light")
WINDOW = {"width": 1280, "height": 880}
GREEK = (
    "Το φως του ήλιου φαίνεται λευκό, αλλά είναι ένα μείγμα όλων των χρωμάτων. Τα μόρια του αέρα "
    "σκεδάζουν το μπλε πολύ περισσότερο από το κόκκινο."
)
INCIDENT = (
    "At 09:12 the primary database refused new connections, because a deployment had halved its pool. The"
)
BRIDGES = "The city counts the bridges between the lake and Hardturm. I go through them in order: Quaibrücke, Münsterbrücke, Rathausbrücke"
CALL = {"index": 0, "function": {"name": "get_weather", "arguments": '{"city": "Zürich", "unit": "celsius"}'}}


async def main() -> None:
    """Write the pictures."""
    async with (
        launched() as browser,
        FakeGateway() as fake,
        opened(browser, fake.url, viewport=WINDOW) as page,
    ):
        await _play(fake, page)
        await page.locator("#prompt").blur()
        await page.wait_for_timeout(600)  # the figures in the header are computed twice per second
        for scheme in SCHEMES:
            await page.emulate_media(color_scheme=scheme)
            path = PICTURES / f"page-{scheme}.png"
            await page.screenshot(path=str(path), animations="disabled")
            print(f"{path.relative_to(ROOT)}: {path.stat().st_size:,} bytes")


async def _play(fake: FakeGateway, page: Page) -> None:
    """Reach six states, the oldest job first."""
    broken = await _begin(fake, page, "Summarise the incident in two sentences.", 640)
    seq = await fake.publish_text(broken, INCIDENT)
    error = {"code": "truncated", "message": "the stream ended before [DONE]"}
    counts = {"prompt_tokens": 212, "completion_tokens": 24}
    await fake.publish(usage(broken, seq, "interrupted", usage=counts, usage_source="estimated", error=error))
    done = await _begin(fake, page, "Γιατί είναι μπλε ο ουρανός;", 312)
    seq = await fake.publish_text(done, GREEK)
    await fake.publish(usage(done, seq, usage={"prompt_tokens": 15, "completion_tokens": 61}))
    tool = await _begin(fake, page, "What is the weather in Zürich?", 405)
    await fake.publish(delta(tool, 1, "I look it up."), delta(tool, 2, tool_calls=[CALL]))
    reasoning = await _begin(fake, page, "How many bridges does the Limmat have in the city?", 287)
    await fake.publish(delta(reasoning, 1, reasoning_content=BRIDGES))
    again = await _begin(fake, page, "Почему небо голубое?", 351)
    await fake.publish_text(again, RUSSIAN[:40])
    await page.wait_for_selector("text=Солнечный")
    await fake.publish(_started(again, 298, attempt="a2", cause="redelivered"))
    await page.wait_for_selector(".card:not(.voided) .restart:not([hidden])")
    await fake.publish_text(again, RUSSIAN, attempt="a2")
    await fake.publish_text(await _begin(fake, page, "Why is the sky blue?", 330), TEXT[:235])
    await page.wait_for_selector("text=So blue light")


async def _begin(fake: FakeGateway, page: Page, prompt: str, first_delta_ms: int) -> str:
    job_id = await new_job(fake, page, prompt=prompt)
    await fake.publish(_started(job_id, first_delta_ms))
    return job_id


def _started(job_id: str, first_delta_ms: int, **members: Any) -> dict[str, Any]:
    """Return the first event of an attempt whose first delta comes now."""
    return started(job_id, **members, ts=int(time.time() * 1000) - first_delta_ms)


if __name__ == "__main__":
    asyncio.run(main())
