"""Where things stand on the page: measured in Chromium, on a gateway that follows a script."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from playwright.async_api import Page, expect

from tests.browser.extremes import ARABIC, ERROR, EXTREMES, LONG_ID, LONG_MODEL
from tests.browser.fake_gateway import FakeGateway, delta, started, usage
from tests.browser.scenes import SCENES, TEXT, new_job

if TYPE_CHECKING:
    from tests.browser.conftest import Tab

pytestmark = pytest.mark.asyncio(loop_scope="module")

PHONE = {"width": 390, "height": 844}
MAC = "Object.defineProperty(navigator, 'platform', { get: () => 'MacIntel' })"
PLACES = """() => {
    window.places = [];
    new MutationObserver(() => places.push([
        document.body.dataset.link,
        JSON.stringify(["header", "main", ".title", ".card"].map((name) => document.querySelector(name).getBoundingClientRect())),
    ])).observe(document.body, { attributeFilter: ["data-link"] });
    document.body.dataset.link = document.body.dataset.link;
}"""
"""Note where the parts of the page stand in each phase of the connection, from now on."""
CARETS = """() => [...document.querySelectorAll(".card p")]
    .filter((node) => getComputedStyle(node, "::after").borderLeftWidth === "2px").map((node) => node.textContent)"""
LINES = """(node) => {
    const range = document.createRange();
    const lines = new Map();
    for (const text of [...node.querySelectorAll("p")].map((block) => block.firstChild)) {
        for (let at = 0; at < text.length; at += 1) {
            range.setStart(text, at);
            range.setEnd(text, at + 1);
            const { top } = range.getBoundingClientRect();
            lines.set(top, (lines.get(top) ?? 0) + 1);
        }
    }
    return [...lines.values()];
}"""
GLYPHS = """(node) => {
    const range = document.createRange();
    range.selectNodeContents(node);
    return range.getBoundingClientRect().toJSON();
}"""


async def _box(page: Page, selector: str) -> dict[str, float]:
    box = await page.locator(selector).first.bounding_box()
    assert box is not None
    x, y, width, height = box["x"], box["y"], box["width"], box["height"]
    return {"x": x, "y": y, "width": width, "right": x + width, "bottom": y + height}


async def _glyphs(page: Page, selector: str) -> dict[str, float]:
    box: dict[str, float] = await page.locator(selector).first.evaluate(GLYPHS)
    return box


# The frame


@pytest.mark.parametrize(
    "name",
    [
        "completed",
        *[pytest.param(name, marks=pytest.mark.long) for name in ("nothing", "no-key", "streaming")],
    ],
)
async def test_composer_stands_at_the_bottom_of_a_phone(name: str, tab: Tab) -> None:
    """There is no gap below it, however little the page has to show."""
    scene = SCENES[name]
    async with FakeGateway(is_open=scene.is_open) as fake, tab(fake.url, viewport=PHONE) as page:
        await scene.play(fake, page)
        composer = await _box(page, "#composer")

    assert composer["bottom"] == PHONE["height"]
    assert (composer["x"], composer["width"]) == (0, PHONE["width"])


DESKTOP_TOO = pytest.mark.parametrize(
    "options",
    [pytest.param({}, id="desktop", marks=pytest.mark.long), pytest.param({"viewport": PHONE}, id="phone")],
)
"""A phone has the least room, so every run of the tests looks at it."""


@DESKTOP_TOO
async def test_page_does_not_move_when_the_connection_is_lost_and_comes_back(
    tab: Tab, options: dict[str, Any]
) -> None:
    """The line that explains the loss takes no place from the cards, also while the page connects again."""
    async with FakeGateway() as fake, tab(fake.url, **options) as page:
        await fake.publish(started(await new_job(fake, page)))
        await expect(page.locator(".word")).to_have_text("Started")
        await page.evaluate(PLACES)
        await fake.stop()
        await expect(page.locator("#strip")).to_be_visible()
        await page.wait_for_function("() => places.filter(([phase]) => phase === 'pausing').length > 1")
        await fake.start()
        await expect(page.locator("#link")).to_have_text("Live")
        places = await page.evaluate("places")

    assert {phase for phase, _ in places} == {"live", "pausing", "connecting"}
    assert len({place for _, place in places}) == 1


@pytest.mark.long
async def test_header_of_a_small_window_scrolls_away(tab: Tab) -> None:
    """A zoomed page, or a phone on its side, has room for the cards."""
    async with FakeGateway() as fake, tab(fake.url, viewport={"width": 640, "height": 400}) as page:
        await SCENES["streaming"].play(fake, page)
        await page.evaluate("scrollTo(0, 300)")

        assert (await _box(page, "header"))["bottom"] < 0


@pytest.mark.long
async def test_page_shows_keys_only_where_there_is_a_keyboard(tab: Tab) -> None:
    """A phone shows no shortcut; a Mac shows its own."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        assert await page.locator("kbd:visible").all_inner_texts() == ["/", "Ctrl ↵"]
        await page.context.add_init_script(MAC)
        await page.reload()
        await expect(page.locator("#send kbd")).to_have_text("⌘ ↵")
        await page.set_viewport_size({"width": 390, "height": 844})
        assert await page.locator("kbd:visible").count() == 0
        assert "/" not in str(await page.get_attribute("#prompt", "placeholder"))


# A card


@pytest.mark.long
async def test_card_has_straight_edges(tab: Tab) -> None:
    """Icon, prompt, text, facts and id begin at one line; time, Cancel, Open alone and Try again end at one."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id), delta(job_id, 1, "Text."))
        await expect(page.locator(".facts")).to_contain_text("1 delta")
        left = {(await _glyphs(page, name))["left"] for name in (".prompt", ".answer p", ".facts", ".id")}
        right = {(await _glyphs(page, name))["right"] for name in (".cancel", ".only")}
        await fake.publish(usage(job_id, 2))
        await expect(page.locator(".cancel")).to_be_hidden()
        right.add((await _glyphs(page, ".age"))["right"])
        await page.goto(f"{fake.url}#job=missing")
        await page.wait_for_selector("#alone .again:visible")
        card, again = await _box(page, "#alone .card"), await _glyphs(page, "#alone .again")

    assert max(left) - min(left) < 0.5
    assert max(right) - min(right) < 0.5
    assert again["right"] == pytest.approx(card["right"] - 17, abs=0.5)


@pytest.mark.long
async def test_card_begins_with_a_whole_line_or_with_one_that_fades(tab: Tab) -> None:
    """At the upper edge of a scrolled text lies a fade, and not the lower half of a line."""
    over = "(body) => { const { x, y } = body.getBoundingClientRect(); return document.elementFromPoint(x + 30, y + 4).className; }"
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        await fake.publish_text(job_id, TEXT * 3)
        await expect(page.locator(".facts")).to_contain_text("deltas")

        assert await page.locator(".body").evaluate("node => node.scrollTop") > 50
        assert await page.locator(".body").evaluate(over) == "body"


async def test_card_shows_the_beginning_of_a_long_error_below_the_text(tab: Tab) -> None:
    """The reason is in view when a job ends; the whole of it is in the title, and on the page of the job."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        seq = await fake.publish_text(job_id, TEXT * 3)
        error = {"code": "truncated", "message": ERROR[:500]}
        await fake.publish(usage(job_id, seq, "interrupted", error=error))
        await expect(page.locator(".word")).to_have_text("Interrupted")
        body, detail, shown = [await _box(page, name) for name in (".body", ".detail", ".error")]
        title = await page.get_attribute(".error", "title")
        await page.click(".only")
        alone = page.locator("#alone .error")
        await expect(alone).to_contain_text(ERROR[:500])
        whole = await alone.evaluate("node => node.scrollHeight <= node.clientHeight + 1")

    assert body["y"] < detail["y"] < shown["y"]
    assert shown["bottom"] <= body["bottom"]
    assert (title, whole) == (f"truncated: {ERROR[:500]}", True)


@pytest.mark.long
async def test_card_of_an_ended_job_follows_its_end_when_the_window_changes(tab: Tab) -> None:
    """A phone that is turned still shows the end, and the error below it."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id))
        await fake.publish(usage(job_id, await fake.publish_text(job_id, TEXT * 3)))
        await expect(page.locator(".word")).to_have_text("Completed")
        await page.set_viewport_size({"width": 320, "height": 568})
        await page.wait_for_function(
            "() => { const n = document.querySelector('.body'); return n.scrollHeight - n.scrollTop - n.clientHeight < 2; }",
            timeout=3000,
        )


async def test_caret_stands_behind_the_part_that_grows(tab: Tab) -> None:
    """It is behind reasoning, then behind the text, then behind a tool call; a voided text and an ended one have none."""
    call = {"index": 0, "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
    async with FakeGateway() as fake, tab(fake.url) as page:
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id), delta(job_id, 1, reasoning="Hm."))
        await expect(page.locator(".word")).to_have_text("Reasoning")
        assert await page.evaluate(CARETS) == ["Hm."]
        await fake.publish(delta(job_id, 2, "I look it up."))
        await expect(page.locator(".word")).to_have_text("Streaming")
        assert await page.evaluate(CARETS) == ["I look it up."]
        await fake.publish(delta(job_id, 3, tool_calls=[call]))
        await expect(page.locator(".word")).to_have_text("Calling a tool")
        assert await page.evaluate(CARETS) == ['{"city": "Bern"}']
        await fake.publish(started(job_id, "a2", cause="redelivered"))
        await expect(page.locator(".voided")).to_be_visible()
        assert await page.evaluate(CARETS) == []
        await fake.publish(delta(job_id, 1, "Sunny.", "a2"), usage(job_id, 2, attempt="a2"))
        await expect(page.locator(".word")).to_have_text("Completed")
        assert await page.evaluate(CARETS) == []


@pytest.mark.long
async def test_prompt_and_text_of_a_script_from_the_right_begin_at_the_right(tab: Tab) -> None:
    """A prompt that is cut is cut at its end."""
    async with FakeGateway() as fake, tab(fake.url, viewport=PHONE) as page:
        await page.fill("#prompt", ARABIC)
        assert await page.locator("#prompt").evaluate("node => getComputedStyle(node).direction") == "rtl"
        job_id = await new_job(fake, page, prompt=ARABIC)
        await fake.publish(started(job_id), delta(job_id, 1, ARABIC))
        await expect(page.locator(".answer")).to_have_text(ARABIC)
        card, text = await _box(page, ".card"), await _glyphs(page, ".answer p")

        assert await page.locator(".prompt").evaluate("node => getComputedStyle(node).direction") == "rtl"
        assert text["right"] == pytest.approx(card["right"] - 17, abs=1)


# One job alone


@pytest.mark.long
async def test_text_of_one_job_alone_has_lines_of_sixty_to_seventy_five_characters(tab: Tab) -> None:
    """That measure is easy to read."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await fake.publish(started("j1"))
        await fake.publish_text("j1", (TEXT.replace("\n\n", " ") + " ") * 4)
        await page.goto(f"{fake.url}#job=j1")
        await expect(page.locator("#alone .answer p")).to_have_count(1)
        lines = await page.locator("#alone .answer").evaluate(LINES)

    assert 60 <= max(lines) <= 75


@DESKTOP_TOO
async def test_one_job_alone_shows_the_whole_id_and_the_whole_model(
    tab: Tab, options: dict[str, Any]
) -> None:
    """There is no pointer on a phone that could ask for a title."""
    async with FakeGateway() as fake, tab(fake.url, **options) as page:
        await EXTREMES["alone-long-id"].play(fake, page)
        for name, text in ((".id", LONG_ID), (".model", LONG_MODEL)):
            node = page.locator(f"#alone {name}")
            assert await node.inner_text() == text
            assert await node.evaluate("node => node.scrollWidth <= node.clientWidth")


# What the page says when something does not work


async def test_refusal_of_a_cancellation_is_red_and_goes_away(tab: Tab) -> None:
    """The reason stands in the header for ten seconds, and the job can still be cancelled."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await page.clock.install()
        await SCENES["cancel-refused"].play(fake, page)
        strip = page.locator("#strip")
        await expect(strip).to_have_text("the key has no scope cancel")
        await expect(strip).to_have_attribute("data-tone", "failed")
        await expect(page.locator(".cancel")).to_be_enabled()
        await page.clock.fast_forward(9_000)
        await expect(strip).to_be_visible()
        await page.clock.fast_forward(1_500)
        await expect(strip).to_be_hidden()


async def test_cancellation_without_a_network_says_so(tab: Tab) -> None:
    """The button does not look as if it had worked."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await fake.publish(started(await new_job(fake, page)))
        await expect(page.locator(".word")).to_have_text("Started")
        await page.context.set_offline(True)
        await expect(page.locator("#link")).to_have_text("Offline")
        await page.click(".cancel")
        await expect(page.locator("#strip")).to_have_text("The gateway does not answer.")
        await expect(page.locator(".word")).to_have_text("Started")


async def test_complaint_stays_while_the_page_connects_again(tab: Tab) -> None:
    """The state of the connection changes several times in these ten seconds."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await fake.publish(started(await new_job(fake, page)))
        await expect(page.locator(".word")).to_have_text("Started")
        await fake.stop()
        await expect(page.locator("#link")).to_contain_text("Reconnecting")
        await page.click(".cancel")
        strip = page.locator("#strip")
        await expect(strip).to_have_text("The gateway does not answer.")
        await page.evaluate(PLACES)
        await page.wait_for_function("() => places.filter(([phase]) => phase === 'pausing').length > 1")

        await expect(strip).to_have_text("The gateway does not answer.", timeout=1)
        await expect(strip).to_have_attribute("data-tone", "failed", timeout=1)


async def test_job_whose_submission_was_not_confirmed_does_not_wait_for_ever(tab: Tab) -> None:
    """It says that it may run all the same, it can be removed, and it is not kept over a reload."""
    async with FakeGateway() as fake, tab(fake.url) as page:
        await SCENES["not-confirmed"].play(fake, page)
        await expect(page.locator(".word")).to_have_text("Not confirmed")
        await expect(page.locator(".detail")).to_contain_text("It may run all the same.")
        await page.click("#clear")
        await expect(page.locator(".card")).to_have_count(0)
        assert [message["type"] for message in fake.received].count("submit") == 1
