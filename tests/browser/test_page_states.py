"""Every state of the page, on a gateway that follows a script. STREAMWORKER_TEST_PICTURES=DIR keeps the pictures."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.audit import complaints
from tests.browser.conftest import WINDOW
from tests.browser.extremes import EXTREMES
from tests.browser.fake_gateway import KEY, FakeGateway, delta, started, usage
from tests.browser.scenes import SCENES, TEXT, new_job, send_prompt, stored

if TYPE_CHECKING:
    from tests.browser.conftest import Tab

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHONE = {"width": 390, "height": 844}
LOOKS: dict[str, tuple[Any, Any]] = {
    "dark": ("dark", WINDOW),
    "light": ("light", WINDOW),
    "phone-dark": ("dark", PHONE),
    "phone-light": ("light", PHONE),
    "narrow": ("light", {"width": 320, "height": 568}),
    "zoomed": ("dark", {"width": 640, "height": 400}),  # 1280 x 800 at 200 %
}


ALL = SCENES | EXTREMES
USUAL = {
    "nothing",
    "streaming",
    "interrupted",
    "superseded",
    "token-expired",
    "long-names",
    "large-counts",
}
"""The states that every run of the tests looks at, as `USUAL_LOOKS`. `make test-long` looks at all in every way."""

USUAL_LOOKS = ("dark", "light", "phone-light")

SETTLED = """async () => {
    for (const animation of document.getAnimations()) {
        if (animation.effect.getComputedTiming().endTime < Infinity) animation.finish();
    }
    await new Promise((painted) => requestAnimationFrame(() => requestAnimationFrame(painted)));
}"""
"""Wait for the screen after a change of colours and size; the audit measures what is painted."""


@pytest.mark.parametrize(
    ("name", "looks"),
    [
        *[pytest.param(name, USUAL_LOOKS, id=name) for name in ALL if name in USUAL],
        *[pytest.param(name, tuple(LOOKS), id=f"{name}-all", marks=pytest.mark.long) for name in ALL],
    ],
)
async def test_page_shows_each_state_in_words_on_every_screen(
    name: str, looks: tuple[str, ...], tab: Tab
) -> None:
    """In both colour schemes, on a phone and zoomed, the words of the state can be read and nothing is cut or overlaps."""
    scene = ALL[name]
    kept = os.environ.get("STREAMWORKER_TEST_PICTURES")
    async with FakeGateway(is_open=scene.is_open) as fake, tab(fake.url) as page:
        await scene.play(fake, page)
        found: set[str] = set()
        for look in looks:
            scheme, window = LOOKS[look]
            await page.emulate_media(color_scheme=scheme)
            await page.set_viewport_size(window)
            for text in scene.sees:
                await expect(page.get_by_text(text).locator("visible=true").first).to_be_visible()
            if kept:
                await page.screenshot(animations="disabled", path=str(Path(kept) / f"{name}-{look}.png"))
            await page.evaluate(SETTLED)
            found |= {f"{look}: {text}" for text in await complaints(page)}
    assert found == set()


async def _finished(fake: FakeGateway, page: Page, text: str = TEXT) -> str:
    job_id = await new_job(fake, page)
    await fake.publish(started(job_id))
    await fake.publish(usage(job_id, await fake.publish_text(job_id, text)))
    await expect(page.locator(".word").first).to_have_text("Completed")
    return job_id


# Text


async def test_page_shows_markup_of_a_model_as_text(tab: Tab) -> None:
    """A model's text, name, id and error message never become elements."""
    evil = "<img src=x onerror=alert(1)><script>alert(1)</script>\n<b>bold</b>"
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page, prompt=evil)
        await fake.publish(started(job_id, model=evil), delta(job_id, 1, evil))
        await fake.publish(
            delta(job_id, 2, tool_calls=[{"index": 0, "function": {"name": evil, "arguments": evil}}])
        )
        error = {"code": "upstream_error", "message": evil}
        await fake.publish(usage(job_id, 3, "interrupted", error=error))
        await expect(page.locator(".error")).to_contain_text("<b>bold</b>")

        assert await page.locator(".answer").inner_text() == evil
        assert await page.locator(".card :is(img, script, b)").count() == 0


LEFT = """([selector, at]) => {
    const node = document.querySelector(selector).firstChild, range = document.createRange();
    range.setStart(node, at < 0 ? node.length + at : at);
    range.setEnd(node, at < 0 ? node.length + at + 1 : at + 1);
    return range.getBoundingClientRect().left;
}"""
"""Return how far left a character of a text stands, in px."""


async def test_page_writes_each_text_in_its_own_direction(tab: Tab) -> None:
    """Prompt, model, answer and the upstream's message may be in a script that is read from right to left."""
    hebrew = "אור GPT-4 לבן"
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page, prompt=hebrew)
        await fake.publish(started(job_id, model="אור-7b"), delta(job_id, 1, f"{hebrew}\nEnglish."))
        error = {"code": "upstream_error", "message": hebrew}
        await fake.publish(usage(job_id, 2, "interrupted", error=error))
        await expect(page.locator(".error")).to_contain_text("GPT-4")

        async def left(selector: str, at: int) -> float:
            return float(await page.evaluate(LEFT, [selector, at]))

        assert await left(".prompt", 0) > await left(".prompt", -1)
        assert await left(".model", 0) > await left(".model", -1)
        assert await left(".answer p", 0) > await left(".answer p", len(hebrew) - 1)
        assert await left(".answer p", -8) < await left(".answer p", -1)
        assert await left(".error", 0) < await left(".error", -1) < await left(".error bdi", -1)
        assert await left(".error bdi", 0) > await left(".error bdi", -1)
        assert await page.locator(".error").inner_text() == f"upstream_error: {hebrew}"


async def test_page_opens_whatever_its_address_names(tab: Tab) -> None:
    """An address that was cut in the middle of an escape stops nothing."""
    async with FakeGateway() as fake, tab(f"{fake.url}#job=%E0%A4%A") as page:
        await expect(page.locator("#alone .word")).to_have_text("Unknown job")
        await page.click("text=All jobs")
        await new_job(fake, page)


async def test_page_keeps_line_breaks_of_a_long_text(tab: Tab) -> None:
    """A text that is kept in several blocks has the same characters as its deltas."""
    text = "\n".join(f"line {number}: " + "word " * (number % 40) for number in range(200)) + "\n\n  end"
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        for seq, at in enumerate(range(0, len(text), 37), 1):
            await fake.publish(delta(job_id, seq, text[at : at + 37]))
        await expect(page.get_by_text("end").first).to_be_attached()

        assert await page.locator(".answer").evaluate("node => node.textContent") == text
        assert await page.locator(".answer p").count() > 5


async def test_page_follows_the_end_unless_the_reader_scrolled_up(tab: Tab) -> None:
    """New text scrolls the card; a reader who reads above is left in place."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        seq = await fake.publish_text(job_id, TEXT * 4)
        body = page.locator(".body")
        left = "node => Math.round(node.scrollHeight - node.scrollTop - node.clientHeight)"
        await expect(page.locator(".facts")).to_contain_text("deltas")
        await expect(body).to_have_js_property(
            "scrollTop", await body.evaluate("n => n.scrollHeight - n.clientHeight")
        )
        await body.evaluate("node => node.scrollTo(0, 40)")
        await page.evaluate("() => new Promise(requestAnimationFrame)")
        await fake.publish_text(job_id, "more and more " * 20, seq)
        await expect(body).to_contain_text("more and more")

        assert await body.evaluate("node => node.scrollTop") == 40
        assert await body.evaluate(left) > 100


SHIFTS = """() => {
    window.shifted = [];
    new PerformanceObserver((list) => {
        for (const { sources } of list.getEntries()) {
            for (const { node } of sources) {
                const element = node?.closest ? node : node?.parentElement;
                if (element?.isConnected && !element.closest(".head, .body, .figures")) shifted.push(element.outerHTML);
            }
        }
    }).observe({ type: "layout-shift" });
}"""


async def test_page_does_not_shift_when_a_job_ends(tab: Tab) -> None:
    """From waiting to the ending, what moves is the text inside the card: no card, footer or control does."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        before = await page.locator(".card").bounding_box()
        await page.evaluate(SHIFTS)
        await fake.publish(started(job_id), delta(job_id, 1, reasoning_content="Hm. " * 30))
        seq = await fake.publish_text(job_id, TEXT * 3, 2)
        error = {"code": "truncated", "message": "the stream ended " * 8}
        await fake.publish(usage(job_id, seq, "interrupted", usage_source="estimated", error=error))
        await expect(page.locator(".word")).to_have_text("Interrupted")

        assert await page.locator(".card").bounding_box() == before
        assert await page.evaluate("shifted") == []


async def test_page_folds_reasoning_once_when_content_begins(tab: Tab) -> None:
    """Reasoning is open until the first content; a reader who opens it again keeps it open."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id), delta(job_id, 1, reasoning="Let me think."))
        thought = page.locator(".reasoning")
        await expect(thought).to_have_js_property("open", True)
        await fake.publish(delta(job_id, 2, "So: "))
        await expect(thought).to_have_js_property("open", False)
        await page.click("summary")
        await fake.publish(delta(job_id, 3, "forty-two."))
        await expect(page.locator(".answer")).to_have_text("So: forty-two.")
        await expect(thought).to_have_js_property("open", True)


async def test_page_shows_choices_in_their_order_with_labels(tab: Tab) -> None:
    """Each choice of `n` has a place of its own."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        second = {**delta(job_id, 1, "two"), "choice": 1}
        await fake.publish(started(job_id), second, delta(job_id, 2, "one"))
        await expect(page.locator(".choice")).to_have_count(2)

        assert await page.locator(".choice .answer").all_inner_texts() == ["one", "two"]
        assert await page.locator(".choice > .label").all_inner_texts() == ["Choice 1", "Choice 2"]


# Restarts, losses, reloads


async def test_page_greys_the_voided_text_for_a_second_and_begins_anew(tab: Tab) -> None:
    """The old text is there and voided, then it is gone and the new one streams."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        await fake.publish_text(job_id, "the old text")
        await expect(page.locator(".answer")).to_contain_text("old")
        await fake.publish(started(job_id, "a2", cause="redelivered"))
        await fake.publish_text(job_id, "the new text", attempt="a2")
        await expect(page.locator(".card.voided .answer")).to_contain_text("old")
        await expect(page.locator(".restart")).to_be_in_viewport()
        await expect(page.locator(".answer")).to_have_text("the new text ")
        await expect(page.locator(".voided")).to_have_count(0)
        await expect(page.locator(".facts")).to_contain_text("attempt 2")


async def test_page_resumes_behind_its_cursors_after_a_restart_of_the_gateway(tab: Tab) -> None:
    """What the page had is not sent again, and nothing that came meanwhile is missing."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        seq = await fake.publish_text(job_id, "before the restart")
        await expect(page.locator(".answer")).to_have_text("before the restart ")
        await fake.stop()
        await expect(page.locator("#link")).to_contain_text("Reconnecting")
        await expect(page.locator("#send")).to_be_disabled()
        seq = await fake.publish_text(job_id, "while it was away", seq)
        await fake.start()
        await expect(page.locator(".answer")).to_have_text("before the restart while it was away ")
        await fake.publish(usage(job_id, seq))
        await expect(page.locator(".word")).to_have_text("Completed")

        resumed = [message for message in fake.received if message["type"] == "subscribe"]
        assert [(m["job_id"], m["cursor"], "replay" in m) for m in resumed] == [(job_id, "0.4.3.0", False)]


@pytest.mark.long  # test_page_live loses the network too
async def test_page_continues_after_offline_and_online(tab: Tab) -> None:
    """The page notices both at once."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        seq = await fake.publish_text(job_id, "before")
        await page.context.set_offline(True)
        await expect(page.locator("#link")).to_have_text("Offline")
        await fake.publish_text(job_id, "after", seq)
        await page.context.set_offline(False)
        await expect(page.locator("#link")).to_have_text("Live")
        await expect(page.locator(".answer")).to_have_text("before after ")


async def test_page_has_its_jobs_again_after_a_reload(tab: Tab) -> None:
    """Ended and running jobs come back, in their order, with prompt and text; the ended are asked for once."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await _finished(fake, page, "first answer")
        other = await new_job(fake, page, prompt="Second?")
        await fake.publish(started(other))
        seq = await fake.publish_text(other, "second")
        await page.reload()
        await expect(page.locator(".answer")).to_have_text(["second ", "first answer "])
        await expect(page.locator(".prompt")).to_have_text(["Second?", "Why is the sky blue?"])
        await fake.publish_text(other, "goes on", seq)
        await expect(page.locator(".answer").first).to_have_text("second goes on ")

        places = [m["cursor"] for m in fake.received if m["type"] == "subscribe"]
        assert places == ["0.0.w", "0.0.w"]


# Identity


async def test_page_keeps_the_key_in_memory_and_a_read_token_in_the_tab(tab: Tab) -> None:
    """The key is in no storage; the token is, and reads after a reload."""
    async with FakeGateway(is_open=False) as fake, tab(fake.url) as page:
        await page.fill("#key", KEY)
        await page.click("#key-use")
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id), delta(job_id, 1, "Hi"))
        await expect(page.locator(".answer")).to_have_text("Hi")
        kept = await stored(page, "streamworker.token")
        assert KEY not in kept
        assert await page.input_value("#key") == ""

        await page.reload()
        await expect(page.locator("#link")).to_have_text("Read only")
        await expect(page.locator("#send")).to_be_disabled()
        await expect(page.locator(".answer")).to_have_text("Hi")
        assert [m["token"] for m in fake.received if m["type"] == "auth"] == [KEY, "token"]
        assert ("tokens", f'["{job_id}"]') in fake.requests


async def test_page_names_a_key_that_is_not_accepted(tab: Tab) -> None:
    """The reader sees that the key is wrong, and can enter another one."""
    async with FakeGateway(is_open=False) as fake, tab(fake.url) as page:
        await page.fill("#key", "swk_wrong")
        await page.press("#key", "Enter")
        await expect(page.locator("#link")).to_have_text("Not accepted")
        await expect(page.get_by_text("The gateway does not accept this key.")).to_be_visible()
        await page.fill("#key", KEY)
        await page.press("#key", "Enter")
        await expect(page.locator("#link")).to_have_text("Live")
        await page.click("#key-forget")
        await expect(page.locator("#link")).to_have_text("No key")


async def test_page_connects_again_only_where_that_can_help(tab: Tab) -> None:
    """A close code that says "not before something changes" is final; a restart is not."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        for code, word in ((1012, "Live"), (4400, "Refused"), (4403, "Refused"), (4429, "Refused")):
            await expect(page.locator("#link")).to_have_text("Live")
            await fake.close(code)
            await expect(page.locator("#link")).not_to_have_text("Live")
            await expect(page.locator("#link")).to_have_text(word)
            await page.reload()


# Reader's actions


async def test_page_is_usable_by_keyboard_alone(tab: Tab) -> None:
    """`/` writes, Ctrl-Enter sends, Tab reaches every action in order with a visible focus, Escape leaves."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await expect(page.locator("#send")).to_be_enabled()
        await page.keyboard.press("/")
        await page.keyboard.type("Why?")
        await page.keyboard.press("Control+Enter")
        await expect(page.locator(".card")).to_have_count(1)
        (job_id,) = fake.logs
        await fake.publish(started(job_id), delta(job_id, 1, "Because."))
        await expect(page.locator(".id")).to_be_visible()

        names, outlines = [], []
        for _ in range(8):
            await page.keyboard.press("Tab")
            focused = page.locator(":focus")
            names.append(await focused.evaluate("n => n.id || n.className.split(' ').at(-1)"))
            outlines.append(await focused.evaluate("n => getComputedStyle(n).outlineStyle"))
        assert names == ["model", "times", "send", "open-id", "cancel", "body", "id", "only"]
        assert set(outlines) == {"solid"}

        await page.keyboard.press("Enter")
        await expect(page.locator("#alone .answer")).to_have_text("Because.")
        await page.keyboard.press("Escape")
        await expect(page.locator("#all")).to_be_visible()
        await expect(page.locator("#alone .card")).to_have_count(0)


async def test_page_announces_endings_and_not_tokens(tab: Tab) -> None:
    """The live region has one line per ending; no region announces text that streams."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await _finished(fake, page)
        spoken = page.locator("[aria-live]")

        await expect(spoken).to_contain_text("completed. 29 tokens reported.")
        assert await spoken.count() == 1
        assert (
            await page.locator(".card :is([aria-live], [role=status], [role=alert], [role=log])").count() == 0
        )


async def test_page_cancels_a_job(tab: Tab) -> None:
    """The command names the job; the button waits for the ending."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await page.click(".cancel")
        await expect(page.locator(".cancel")).to_be_disabled()
        await fake.publish(usage(job_id, 0, "cancelled", usage=None, usage_source="none"))
        await expect(page.locator(".cancel")).to_be_hidden()

        assert [job for kind, job in fake.requests if kind == "cancel"] == [job_id]


async def test_page_fills_a_sample_prompt(tab: Tab) -> None:
    """A click on a sample writes it; the reader sends it."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await page.get_by_role("button", name="Conta da 1 a 10.").click()
        await page.keyboard.press("Control+Enter")
        await expect(page.locator(".card .prompt")).to_have_text("Conta da 1 a 10.")
        await expect(page.locator("#nothing")).to_be_hidden()


@pytest.mark.long
async def test_page_drops_ended_cards_beyond_two_hundred_and_keeps_running_ones(tab: Tab) -> None:
    """The page does not grow without a bound; the oldest ended cards leave."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        running = await new_job(fake, page)
        for _ in range(4):
            await send_prompt(page, times=50)
        await expect(page.locator(".card .id[title]")).to_have_count(201)
        for job_id in [*fake.logs][1:]:
            await fake.publish(usage(job_id, 0))
        await expect(page.locator(".word", has_text="Completed")).to_have_count(200)
        await send_prompt(page, times=3)

        await expect(page.locator(".card .id[title]")).to_have_count(200)
        await expect(page.locator(f'.id[title="{running}"]')).to_have_count(1)
        await page.click("#clear")
        await expect(page.locator(".card")).to_have_count(4)


async def test_page_shows_one_job_alone_and_returns_to_all(tab: Tab) -> None:
    """An id from elsewhere opens alone over EventSource, which resumes by itself; Escape returns."""
    job_id = "acme.0199f3c2-7a10-7c3e-9f00-000000000001"
    async with FakeGateway() as fake, tab(fake.url) as page:
        await fake.publish(started(job_id), delta(job_id, 1, "one "))
        await page.fill("#open-id", job_id)
        await page.press("#open-id", "Enter")
        await expect(page.locator("#alone .answer")).to_have_text("one ")
        await fake.stop()
        await fake.publish(delta(job_id, 2, "two"))
        await fake.start()
        await expect(page.locator("#alone .answer")).to_have_text("one two")
        await fake.publish(usage(job_id, 3))
        await expect(page.locator("#alone .word")).to_have_text("Completed")

        assert [cursor for kind, cursor in fake.requests if kind == "events"] == ["", "0.2.0.0"]
        assert await page.title() == f"{job_id} · streamworker"
        await page.click("text=All jobs")
        await expect(page.locator("#nothing")).to_be_visible()


async def test_page_cancels_the_job_that_stands_alone(tab: Tab) -> None:
    """Alone, a request cancels: there may be no websocket."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await fake.publish(started("j1"))
        await page.goto(f"{fake.url}#job=j1")
        await page.click("#alone .cancel")
        await expect(page.locator("#alone .word")).to_have_text("Cancelling")

        assert ("cancel", "j1") in fake.requests
