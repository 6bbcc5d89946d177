"""Scenes: how each state of the page is reached on the scripted gateway, and what a reader must see then."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

from playwright.async_api import expect

from tests.browser.fake_gateway import KEY, NOT_STARTED, FakeGateway, delta, started, usage

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from playwright.async_api import Page

__all__ = ["SCENES", "TEXT", "Scene", "new_job", "send_prompt", "stored"]

TEXT = (
    "Sunlight looks white, but it is a mixture of all colours. When it meets the molecules of the air, the short, "
    "blue waves are scattered much more than the long, red ones.\n\nSo blue light reaches your eyes from every part "
    "of the sky, and the sun itself looks a little more yellow than it is."
)
RUSSIAN = "Солнечный свет кажется белым, но состоит из всех цветов. Молекулы воздуха рассеивают синий сильнее красного."
GREEK = "Το φως του ήλιου φαίνεται λευκό, αλλά είναι ένα μείγμα όλων των χρωμάτων."
THOUGHT = (
    "The reader wants three sentences. Scattering grows with the fourth power of the frequency, so blue wins."
)


EARLIER = """(ms) => {
    const jobs = JSON.parse(sessionStorage["streamworker.jobs"]).map((job) => ({ ...job, at: job.at - ms }));
    addEventListener("pagehide", () => (sessionStorage["streamworker.jobs"] = JSON.stringify(jobs)));
}"""
"""Let the jobs of the page be older after the next reload."""


class Scene(NamedTuple):
    """A state of the page: `play` reaches it, `sees` are texts that are visible then."""

    play: Callable[[FakeGateway, Page], Awaitable[None]]
    sees: tuple[str, ...]
    is_open: bool = True


async def send_prompt(page: Page, prompt: str = "Why is the sky blue?", times: int = 1) -> None:
    """Write a prompt and send it."""
    await page.fill("#prompt", prompt)
    await page.fill("#times", str(times))
    await page.wait_for_selector("#send:enabled")
    await page.click("#send")


async def stored(page: Page, name: str) -> str:
    """Wait until the tab has stored something under a name; return all that the origin has stored."""
    everything = "JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie, location.href])"
    async with asyncio.timeout(10):
        while name not in (kept := str(await page.evaluate(everything))):  # noqa: ASYNC110 - a tab has no event for it
            await asyncio.sleep(0.02)
    return kept


async def new_job(fake: FakeGateway, page: Page, *, prompt: str = "Why is the sky blue?") -> str:
    """Submit a job on the page; return its id."""
    known = len(fake.logs)
    await send_prompt(page, prompt)
    while len(fake.logs) == known:  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.01)
    job_id = [*fake.logs][-1]
    await page.wait_for_selector(f'.id[title="{job_id}"]', state="attached")
    return job_id


async def _text(fake: FakeGateway, job_id: str, text: str = TEXT, **members: Any) -> int:
    await fake.publish(started(job_id, **members))
    return await fake.publish_text(job_id, text)


async def _nothing(_fake: FakeGateway, page: Page) -> None:
    await page.wait_for_selector("#nothing:visible")
    await page.wait_for_selector('[data-link="live"]')


async def _no_key(_fake: FakeGateway, page: Page) -> None:
    await page.wait_for_selector("#identity:visible")


async def _waiting(fake: FakeGateway, page: Page) -> None:
    await new_job(fake, page)


async def _waiting_long(fake: FakeGateway, page: Page) -> None:
    await new_job(fake, page)
    await stored(page, "streamworker.jobs")
    await page.evaluate(EARLIER, 12_000)
    await page.reload()


async def _refused_key(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    error = {"code": "auth", "message": "Incorrect API key provided", "http_status": 401}
    await fake.publish(
        usage(
            job_id,
            0,
            "failed",
            usage=None,
            usage_source="none",
            error=error,
            timing=NOT_STARTED | {"queued": 30_000},
        )
    )


async def _streaming(fake: FakeGateway, page: Page) -> None:
    for text, prompt in (
        (TEXT, "Why is the sky blue?"),
        (RUSSIAN, "Почему небо голубое?"),
        (GREEK, "Γιατί είναι μπλε ο ουρανός;"),
    ):
        await _text(fake, await new_job(fake, page, prompt=prompt), text)


async def _reasoning(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    await fake.publish(started(job_id), delta(job_id, 1, reasoning_content=THOUGHT))
    other = await new_job(fake, page)
    await fake.publish(started(other), delta(other, 1, reasoning_content=THOUGHT))
    await fake.publish_text(other, TEXT, 2)


async def _tools(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page, prompt="What is the weather in Zürich?")
    call = {"index": 0, "id": "c1", "type": "function", "function": {"name": "get_weather", "arguments": ""}}
    await fake.publish(
        started(job_id), delta(job_id, 1, "I look it up."), delta(job_id, 2, tool_calls=[call])
    )
    for seq, piece in enumerate(('{"city": "Zürich",', ' "unit": "celsius"}'), 3):
        await fake.publish(delta(job_id, seq, tool_calls=[{"index": 0, "function": {"arguments": piece}}]))


async def _completed(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    await fake.publish(usage(job_id, await _text(fake, job_id)))


async def _interrupted(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    seq = await _text(fake, job_id, TEXT[:180])
    error = {"code": "truncated", "message": "the stream ended before [DONE]"}
    counts = {"prompt_tokens": 15, "completion_tokens": 31}
    await fake.publish(
        usage(
            job_id,
            seq,
            "interrupted",
            usage=counts,
            usage_source="estimated",
            estimate_method="bytes",
            error=error,
        )
    )


async def _failed(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    error = {"code": "upstream_rejected", "message": "max_tokens is too large: 900000", "http_status": 400}
    ending = usage(
        job_id, 1, "failed", usage=None, usage_source="none", error=error, timing=NOT_STARTED | {"total": 812}
    )
    await fake.publish(started(job_id), ending)


async def _cancelled(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    seq = await _text(fake, job_id, TEXT[:90])
    await page.click(".cancel")
    await page.wait_for_selector("text=Cancelling")
    counts = {"prompt_tokens": 15, "completion_tokens": 17}
    error = {"code": "cancelled", "message": "cancelled on the page"}
    await fake.publish(
        usage(job_id, seq, "cancelled", usage=counts, usage_source="upstream_partial", error=error)
    )


async def _expired(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    error = {"code": "deadline", "message": "the deadline passed while the job waited"}
    await fake.publish(
        usage(
            job_id,
            0,
            "expired",
            usage=None,
            usage_source="none",
            error=error,
            timing=NOT_STARTED | {"queued": 90_000},
        )
    )


async def _superseded(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    await _text(fake, job_id, TEXT[:160])
    await page.wait_for_selector("text=molecules")
    await fake.publish(started(job_id, "a2", cause="redelivered"))
    await page.wait_for_selector(".voided")


async def _begun_again(fake: FakeGateway, page: Page) -> None:
    await _superseded(fake, page)
    await fake.publish_text([*fake.logs][-1], GREEK, attempt="a2")
    await page.wait_for_selector(".card:not(.voided)")
    await page.wait_for_selector("text=φως")


async def _restarting(fake: FakeGateway, page: Page) -> None:
    await _streaming(fake, page)
    await fake.stop()
    await page.wait_for_selector("text=/Reconnecting in/")


async def _offline(fake: FakeGateway, page: Page) -> None:
    await _streaming(fake, page)
    await page.context.set_offline(True)


async def _token_expired(fake: FakeGateway, page: Page) -> None:
    await page.fill("#key", KEY)
    await page.click("#key-use")
    await _streaming(fake, page)
    await stored(page, "streamworker.token")
    await page.reload()
    await page.wait_for_selector("text=Read only")
    fake.credentials.clear()
    await fake.close(4401)


async def _read_only(fake: FakeGateway, page: Page) -> None:
    await _key_in_use(fake, page)
    await fake.publish(usage(await new_job(fake, page), 0))
    await stored(page, "streamworker.token")
    await page.reload()


async def _key_in_use(_fake: FakeGateway, page: Page) -> None:
    await page.fill("#key", KEY)
    await page.click("#key-use")
    await page.wait_for_selector('[data-link="live"]')


async def _wrong_key(_fake: FakeGateway, page: Page) -> None:
    await page.fill("#key", "swk_wrong")
    await page.click("#key-use")


async def _not_confirmed(fake: FakeGateway, page: Page) -> None:
    fake.confirms = False
    await send_prompt(page)
    await page.wait_for_selector("text=Sending")
    await fake.close(1012)
    await page.wait_for_selector('[data-link="live"]')


async def _cancel_refused(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page)
    await _text(fake, job_id)
    fake.cancels = False
    await page.click(".cancel")


async def _unknown(fake: FakeGateway, page: Page) -> None:
    await page.goto(f"{fake.url}#job=acme.0199f3c2-0000-7c3e-9f00-000000000000")


async def _alone(fake: FakeGateway, page: Page) -> None:
    await _reasoning(fake, page)
    await page.click(".only >> nth=0")
    await page.wait_for_selector("#alone .answer p")


async def _many(fake: FakeGateway, page: Page) -> None:
    for _ in range(4):
        await send_prompt(page, "Count", 50)
    await expect(page.locator(".card .id[title]")).to_have_count(200)
    for number, job_id in enumerate(fake.logs):
        seq = await _text(fake, job_id, TEXT[: 40 + number])
        if number % 3:
            await fake.publish(usage(job_id, seq))


SCENES = {
    "nothing": Scene(_nothing, ("Nothing yet.", "Live")),
    "no-key": Scene(_no_key, ("No key", "This gateway asks for an API key."), is_open=False),
    "waiting": Scene(_waiting, ("Waiting", "Waiting for a worker.")),
    "waiting-long": Scene(
        _waiting_long, ("Waiting", "Still waiting.", "it refuses the key, or limits the rate.")
    ),
    "refused-key": Scene(
        _refused_key, ("Failed", "The upstream refuses the worker's key.", "auth: Incorrect API key")
    ),
    "streaming": Scene(_streaming, ("Streaming", "every part of the sky")),
    "reasoning": Scene(_reasoning, ("Reasoning", "fourth power")),
    "tools": Scene(_tools, ("Tool call: get_weather", '"unit": "celsius"')),
    "completed": Scene(_completed, ("Completed", "29 tokens reported", "first delta 312 ms")),
    "interrupted": Scene(_interrupted, ("Interrupted", "31 tokens estimated", "The text above is kept.")),
    "failed": Scene(_failed, ("Failed", "max_tokens is too large: 900000", "no tokens")),
    "cancelled": Scene(_cancelled, ("Cancelled", "17 tokens partial")),
    "expired": Scene(_expired, ("Expired", "The deadline of the job has passed.")),
    "superseded": Scene(_superseded, ("Began again after a worker died: attempt 2",)),
    "begun-again": Scene(_begun_again, ("Began again after a worker died: attempt 2", "Το φως")),
    "restarting": Scene(_restarting, ("Reconnecting in", "Streams continue where they stopped.")),
    "offline": Scene(_offline, ("Offline", "This device has no network.")),
    "token-expired": Scene(_token_expired, ("Token expired", "Enter a key to go on."), is_open=False),
    "read-only": Scene(_read_only, ("Read only", "Enter a key to send prompts."), is_open=False),
    "key-in-use": Scene(_key_in_use, ("Live", "Key in use", "Forget"), is_open=False),
    "wrong-key": Scene(_wrong_key, ("Not accepted", "does not accept this key."), is_open=False),
    "not-confirmed": Scene(_not_confirmed, ("Not confirmed", "It may run all the same.")),
    "cancel-refused": Scene(_cancel_refused, ("Streaming", "the key has no scope cancel")),
    "unknown": Scene(
        _unknown, ("Unknown job", "job_not_found: ", "Try again", "acme.0199f3c2-0000-7c3e-9f00-000000000000")
    ),
    "alone": Scene(_alone, ("All jobs", "every part of the sky")),
    "many": Scene(_many, ("200",)),
}
