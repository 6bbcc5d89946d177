"""Scenes of hostile content: long words, long names, other scripts, long errors and large counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from playwright.async_api import expect

from tests.browser.fake_gateway import delta, started, usage
from tests.browser.scenes import Scene, new_job, send_prompt

if TYPE_CHECKING:
    from playwright.async_api import Page

    from tests.browser.fake_gateway import FakeGateway

__all__ = ["EXTREMES", "LONG_ID", "LONG_MODEL"]

LONG_ID = "acme-data-platform-production." + "nightly-evaluation-of-the-" * 7 + "000000000042"
LONG_MODEL = "swiss-ai/apertus-70b-instruct-2509-quantised-w8a8-with-a-very-long-name-of-80-chars"
ADDRESS = "https://example.com/a/path/without/any/break?" + "&".join(f"key{n}=value{n}" for n in range(20))
CODE = "def answer():\n\treturn {name: value for name, value in " + "x" * 90 + "}\n"
ERROR = "The upstream answered 400: " + "maximum context length is 8192 tokens, you sent 900000; " * 9
ARABIC = "يبدو ضوء الشمس أبيض، لكنه مزيج من كل الألوان. عندما يلتقي بجزيئات الهواء (O₂ و N₂) يتشتت الأزرق أكثر من الأحمر."
HEBREW = "אור השמש נראה לבן, אבל הוא תערובת של כל הצבעים."
JAPANESE = (
    "太陽の光は白く見えますが、すべての色が混ざったものです。空気の分子に当たると、青い光は赤い光よりもずっと強く散乱します。"
    * 2
)
THAI = "แสงแดดดูเหมือนสีขาวแต่จริงๆแล้วเป็นส่วนผสมของทุกสีเมื่อแสงกระทบกับโมเลกุลของอากาศแสงสีน้ำเงินจะกระเจิงมากกว่าแสงสีแดง"
KOREAN = "햇빛은 하얗게 보이지만 사실은 모든 색이 섞인 것입니다. 공기 분자에 부딪히면 파란빛이 붉은빛보다 훨씬 많이 흩어집니다."
CHINESE = (
    "阳光看起来是白色的，其实是所有颜色的混合。当它遇到空气分子时，蓝光比红光散射得多。所以天空是蓝色的。"
)
EMOJI = "Sky 🌤️🌈 family 👩‍👩‍👧‍👦 flag 🇨🇭🏴󠁧󠁢󠁳󠁣󠁴󠁿 skin 👋🏽 keycap 3️⃣ heart ❤️‍🔥 text ☺︎ " + "🧑🏿‍🚀" * 30
ZALGO = "".join(
    letter + "\u0300\u0316\u0489\u0353\u034c" * 4 for letter in "He comes from below, through every line."
)
HINDI = "सूर्य का प्रकाश सफेद दिखता है, लेकिन यह सभी रंगों का मिश्रण है। क्षेत्र्य ज्ञान श्रद्धा र्त्स्न्य।"
URDU = "سورج کی روشنی سفید نظر آتی ہے، لیکن یہ تمام رنگوں کا مجموعہ ہے۔ نیلی روشنی سرخ سے زیادہ بکھرتی ہے۔"
MIXED = "The word שָׁלוֹם means peace (سلام in Arabic, 平和 in Japanese): 1–2, 50 %, C++ / .NET."
OVERRIDES = "file\u202egnp.exe and \u2067isolate without an end \u200f\u200e\u061c then text"
LARGE = {"prompt_tokens": 123_456_789_012, "completion_tokens": 123_456_789_012}


async def _long_words(fake: FakeGateway, page: Page) -> None:
    for text, prompt in ((ADDRESS, ADDRESS), (CODE, "Write it."), ("a" * 600, "w" * 300)):
        job_id = await new_job(fake, page, prompt=prompt)
        call = {"index": 0, "function": {"name": "look_up_" * 12, "arguments": '{"q":"' + "z" * 300}}
        await fake.publish(started(job_id), delta(job_id, 1, text), delta(job_id, 2, tool_calls=[call]))


async def _long_names(fake: FakeGateway, page: Page) -> None:
    await fake.publish(started(LONG_ID, model=LONG_MODEL), delta(LONG_ID, 1, "Text."))
    await page.fill("#model", LONG_MODEL)
    job_id = await new_job(fake, page)
    await fake.publish(started(job_id, model=LONG_MODEL), delta(job_id, 1, "Text."))
    await page.evaluate(
        "([id, model]) => sessionStorage.setItem('streamworker.jobs', JSON.stringify([{jobId: id, model, prompt: '', at: 0}]))",
        [LONG_ID, LONG_MODEL],
    )


async def _alone_long_id(fake: FakeGateway, page: Page) -> None:
    await fake.publish(started(LONG_ID, model=LONG_MODEL), delta(LONG_ID, 1, "Text."))
    await page.goto(f"{fake.url}#job={LONG_ID}")
    await page.wait_for_selector("#alone .answer p")


async def _scripts(fake: FakeGateway, page: Page) -> None:
    for text in (HEBREW, JAPANESE, ARABIC):
        job_id = await new_job(fake, page, prompt=text)
        await fake.publish(started(job_id), delta(job_id, 1, text + "\n\nAnd English."))


async def _no_spaces(fake: FakeGateway, page: Page) -> None:
    for text in (THAI, KOREAN, CHINESE):
        job_id = await new_job(fake, page, prompt=text)
        await fake.publish(started(job_id, model=text[:40]), delta(job_id, 1, reasoning_content=text))
        await fake.publish(delta(job_id, 2, text + "\n\n" + text + "\n\nAnd English."))


async def _marks(fake: FakeGateway, page: Page) -> None:
    for text in (EMOJI, ZALGO, HINDI):
        job_id = await new_job(fake, page, prompt=text)
        await fake.publish(started(job_id), delta(job_id, 1, "Before.\n" + text + "\nAnd English.\n"))
        await fake.publish(delta(job_id, 2, "\n".join([text] * 3)))


async def _mixed_directions(fake: FakeGateway, page: Page) -> None:
    error = {"code": "upstream_rejected", "message": ARABIC + " (400)", "http_status": 400}
    for text in (MIXED, OVERRIDES, URDU):
        job_id = await new_job(fake, page, prompt=text)
        call = {"index": 0, "function": {"name": "بحث", "arguments": f'{{"city": "{HEBREW}", "n": 2}}'}}
        await fake.publish(started(job_id, model="نموذج-7b"), delta(job_id, 1, reasoning_content=text))
        await fake.publish(delta(job_id, 2, text + "\nAnd English."), delta(job_id, 3, tool_calls=[call]))
        counts = {"prompt_tokens": 3, "completion_tokens": 12}
        await fake.publish(
            usage(job_id, 4, "interrupted", usage=counts, usage_source="estimated", error=error)
        )


async def _alone_foreign(fake: FakeGateway, page: Page) -> None:
    job_id = await new_job(fake, page, prompt=URDU)
    await fake.publish(started(job_id), delta(job_id, 1, reasoning_content=f"{HEBREW}\n{MIXED}"))
    text = f"{ARABIC}\n\n{THAI}\n\n{JAPANESE}\n\n{HINDI}\n\n{EMOJI}\n\nAnd English."
    await fake.publish(delta(job_id, 2, text))
    await page.goto(f"{fake.url}#job={job_id}")
    await page.wait_for_selector("#alone .answer p")


async def _long_error(fake: FakeGateway, page: Page) -> None:
    for status, text in (("failed", ""), ("interrupted", "Some text came. " * 9)):
        job_id = await new_job(fake, page)
        error = {"code": "upstream_rejected", "message": ERROR[:500], "http_status": 400}
        await fake.publish(started(job_id), delta(job_id, 1, text))
        await fake.publish(usage(job_id, 2, status, usage=None, usage_source="none", error=error))


async def _large_counts(fake: FakeGateway, page: Page) -> None:
    for source in ("estimated", "upstream_partial", "upstream"):
        job_id = await new_job(fake, page)
        await fake.publish(started(job_id), delta(job_id, 1, "Text."))
        await fake.publish(started(job_id, "a2", cause="redelivered"), delta(job_id, 1, "Text.", "a2"))
        timing = {"queued": 40_000_000, "first_delta": 3_723_000, "total": 360_000_000}
        await fake.publish(
            usage(job_id, 2, "completed", "a2", usage=LARGE, usage_source=source, timing=timing)
        )
    await expect(page.locator("#f-tokens")).to_contain_text("partial")


async def _every_ending(fake: FakeGateway, page: Page) -> None:
    await send_prompt(page, times=6)
    await expect(page.locator(".card .id[title]")).to_have_count(6)
    for job_id, status in zip(
        [*fake.logs],
        ("completed", "interrupted", "failed", "rejected", "cancelled", "expired"),
        strict=True,
    ):
        await fake.publish(started(job_id), delta(job_id, 1, "Text."), usage(job_id, 2, status))


EXTREMES = {
    "long-words": Scene(_long_words, ("https://example.com",)),
    "long-names": Scene(_long_names, ("Text.",)),
    "alone-long-id": Scene(_alone_long_id, ("Text.",)),
    "scripts": Scene(_scripts, ("And English.",)),
    "no-spaces": Scene(_no_spaces, ("And English.",)),
    "marks": Scene(_marks, ("And English.",)),
    "mixed-directions": Scene(_mixed_directions, ("And English.",)),
    "alone-foreign": Scene(_alone_foreign, ("And English.",)),
    "long-error": Scene(_long_error, ("upstream_rejected",)),
    "large-counts": Scene(_large_counts, ("123.5B tokens reported",)),
    "endings": Scene(_every_ending, ("Rejected",)),
}
