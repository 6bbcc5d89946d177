"""The page, and EventSource, in Chromium on a gateway in front of Apache Kafka, a worker and the practice upstream."""

from __future__ import annotations

import asyncio
import re
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import orjson
import pytest
import pytest_asyncio
from aiohttp import web
from playwright.async_api import Page, expect

from streamworker.gateway.keys import new_key, rendered
from streamworker.practice import PracticeUpstream, expected_text
from tests.browser.scenes import stored
from tests.integration.gateway_here import Gateway, stage_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.brokers.apache import ApacheKafka
    from tests.browser.conftest import Tab
    from tests.integration.stage import Stage

pytestmark = pytest.mark.asyncio(loop_scope="module")

SECRET = "a:c2VjcmV0LXNlY3JldC1zZWNyZXQtc2VjcmV0LXNlY3JldA"  # kid, and 35 bytes in base64url
SLOW = "practice?deltas=9999&pace_ms=30"
PROMPT = "Conta da 1 a 10."
LIMIT_MS = 15_000


@dataclass(frozen=True, kw_only=True)
class Site:
    """A gateway without keys, one with keys, and what is behind them."""

    stage: Stage
    open: Gateway
    keyed: Gateway
    key: str


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def site(apache_kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Site]:
    """Everything that a page needs, for all tests of this file."""
    directory, key = tmp_path_factory.mktemp("site"), new_key()
    (directory / "keys.toml").write_text(
        rendered("acme-web", key, "acme", ("submit", "read", "cancel", "token"))
    )
    (directory / "secrets").write_text(SECRET)
    keyed = {
        "gateway__auth": "keys",
        "gateway__keys_file": directory / "keys.toml",
        "gateway__token_secrets_file": directory / "secrets",
    }
    async with AsyncExitStack() as stack:
        practice = await stack.enter_async_context(PracticeUpstream())
        stage = await stack.enter_async_context(stage_on(apache_kafka, practice, directory))
        await stack.enter_async_context(stage.worker())
        plain = await stack.enter_async_context(Gateway(stage))
        with_keys = await stack.enter_async_context(Gateway(stage, **keyed))
        yield Site(stage=stage, open=plain, keyed=with_keys, key=key)


async def _send(page: Page, model: str, times: int = 1) -> None:
    await expect(page.locator("#send")).to_be_enabled(timeout=LIMIT_MS)
    await page.fill("#model", model)
    await page.fill("#times", str(times))
    await page.fill("#prompt", PROMPT)
    await page.keyboard.press("Control+Enter")


def _text(model: str) -> str:
    (text,) = expected_text(model, [{"role": "user", "content": PROMPT}])
    return text


async def _shown(page: Page, where: str = ".answer") -> str:
    return str(await page.locator(where).first.evaluate("node => node.textContent"))


async def _ended(page: Page, status: str = "Completed") -> None:
    await expect(page.locator(".word").first).to_have_text(status, timeout=LIMIT_MS)


# The page


async def test_page_submits_watches_and_keeps_the_answer_over_a_reload(site: Site, tab: Tab) -> None:
    """The text on the page is the upstream's, character by character; a reload in the middle loses nothing."""
    model = "practice?deltas=60&pace_ms=25&reasoning"
    async with tab(site.open.url) as page:
        await _send(page, model)
        await expect(page.locator(".word")).to_have_text("Streaming", timeout=LIMIT_MS)
        await page.reload()
        await expect(page.locator(".prompt")).to_have_text(PROMPT)
        await _ended(page)

        assert await _shown(page) == _text(model)
        await expect(page.locator(".facts")).to_contain_text(
            re.compile(r"^\d+ tokens reported · first delta \d")
        )
        await expect(page.locator(".reasoning")).to_be_visible()
        await page.reload()
        await _ended(page)
        assert await _shown(page) == _text(model)


async def test_page_cancels_a_running_job_also_after_a_reload(site: Site, tab: Tab) -> None:
    """Stop works on a stream that was resumed."""
    async with tab(site.open.url) as page:
        await _send(page, SLOW)
        await expect(page.locator(".word")).to_have_text("Streaming", timeout=LIMIT_MS)
        await stored(page, "streamworker.jobs")
        await page.reload()
        await expect(page.locator(".word")).to_have_text("Streaming", timeout=LIMIT_MS)
        await page.click(".cancel")
        await _ended(page, "Cancelled")

        assert site.stage.practice.calls[-1].outcome is not None


async def test_page_loses_nothing_over_a_restart_of_the_gateway_and_offline(site: Site, tab: Tab) -> None:
    """Three streams go through a restart and a loss of the network, and end whole."""
    model = "practice?deltas=150&pace_ms=25"
    async with tab(site.open.url) as page:
        await _send(page, model, 3)
        await expect(page.locator(".word")).to_have_text(["Streaming"] * 3, timeout=LIMIT_MS)
        await site.open.restart()
        await expect(page.locator("#link")).to_have_text("Live", timeout=LIMIT_MS)
        await page.context.set_offline(True)
        await expect(page.locator("#link")).to_have_text("Offline")
        await page.context.set_offline(False)
        await expect(page.locator(".word")).to_have_text(["Completed"] * 3, timeout=LIMIT_MS)

        texts = await page.locator(".answer").evaluate_all("nodes => nodes.map((node) => node.textContent)")
        assert texts == [_text(model)] * 3


async def test_page_shows_that_a_job_began_again(site: Site, tab: Tab) -> None:
    """A stream that breaks and is restarted voids its text; the new attempt is counted and whole."""
    model = "practice?deltas=30&pace_ms=30&break_after=12&times=1"
    async with tab(f"{site.open.url}/") as page:
        async with page.expect_response(lambda response: "/again-1/events" in response.url):
            await page.goto(f"{site.open.url}/#job=again-1")
        await expect(page.locator("#alone .word")).to_have_text("Waiting")
        await site.stage.submit("again-1", model, on_break="restart")
        await expect(page.locator("#alone .restart")).to_have_text(
            "Began again after the stream broke: attempt 2", timeout=LIMIT_MS
        )
        await _ended(page)

        (text,) = expected_text(model, site.stage.message("again-1"))
        assert await _shown(page, "#alone .answer") == text


async def test_page_opens_one_job_alone_through_a_restart_and_cancels_it(site: Site, tab: Tab) -> None:
    """EventSource continues behind its last event; the id in the address is all that the page needs."""
    async with tab(site.open.url) as page:
        await _send(page, SLOW)
        await page.click(".only")
        answer = page.locator("#alone .answer")
        await expect(answer).to_contain_text("one", timeout=LIMIT_MS)
        before = len(await _shown(page, "#alone .answer"))
        await site.open.restart()
        await expect(page.locator("#alone .word")).to_have_text("Streaming")
        while len(text := await _shown(page, "#alone .answer")) <= before:  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.05)
        assert _text(SLOW).startswith(text)
        await page.click("#alone .cancel")
        await _ended(page, "Cancelled")


async def test_page_of_a_tenant_reads_with_a_token_after_a_reload_until_it_expires(
    site: Site, tab: Tab
) -> None:
    """The key is gone with the reload; the token reads and cancels; expired, the page says so and keeps the text."""
    async with tab(site.keyed.url) as page:
        await expect(page.locator("#link")).to_have_text("No key")
        await page.fill("#key", site.key)
        await page.press("#key", "Enter")
        await _send(page, "practice?deltas=5")
        await _ended(page)
        kept = await stored(page, "streamworker.token")
        assert site.key not in kept
        job_id = await page.locator(".id").get_attribute("title")
        assert job_id is not None
        assert job_id.startswith("acme.")

        await page.reload()
        await expect(page.locator("#link")).to_have_text("Read only", timeout=LIMIT_MS)
        await _ended(page)
        async with httpx.AsyncClient(base_url=site.keyed.url) as http:
            answer = await http.post(
                "/v1/tokens",
                json={"jobs": [job_id], "ttl_s": 2},
                headers={"Authorization": f"Bearer {site.key}"},
            )
        assert answer.status_code == 201, answer.text
        token = {"token": answer.json()["token"], "expiresAt": 9e15}
        await page.evaluate(
            "token => sessionStorage.setItem('streamworker.token', JSON.stringify(token))", token
        )
        await page.reload()
        await expect(page.locator("#link")).to_have_text("Token expired", timeout=LIMIT_MS)
        await expect(page.locator("#identity")).to_be_visible()
        assert await _shown(page) == _text("practice?deltas=5")

        await page.fill("#key", site.key)
        await page.press("#key", "Enter")
        await expect(page.locator("#link")).to_have_text("Live", timeout=LIMIT_MS)


async def test_page_says_that_a_job_of_another_tenant_is_unknown(site: Site, tab: Tab) -> None:
    """It answers as one that does not exist."""
    async with tab(site.keyed.url) as page:
        await page.fill("#key", site.key)
        await page.press("#key", "Enter")
        await expect(page.locator("#link")).to_have_text("Live", timeout=LIMIT_MS)
        await page.fill("#open-id", "other.0199f3c2-0000-7c3e-9f00-000000000000")
        await page.press("#open-id", "Enter")
        await expect(page.locator("#alone .word")).to_have_text("Unknown job", timeout=LIMIT_MS)


# EventSource itself

FOLLOW = """(url) => {
    window.seen = [];
    window.source = new EventSource(url);
    for (const name of ["open", "error", "started", "delta", "usage", "closing", "position", "message"]) {
        source.addEventListener(name, (event) =>
            seen.push({ name, id: event.lastEventId ?? "", state: source.readyState, data: event.data ?? "" }));
    }
}"""


async def _seen(page: Page, until: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    seen: list[dict[str, Any]]
    async with asyncio.timeout(LIMIT_MS / 1000):
        while not until(seen := await page.evaluate("seen")):  # noqa: ASYNC110 - no event for it
            await asyncio.sleep(0.05)
    return seen


async def test_native_eventsource_resumes_over_a_restart_and_stops_at_the_end(site: Site, tab: Tab) -> None:
    """A drained gateway closes with `closing`; the browser comes back with its last id; 204 ends it for good."""
    stage = site.stage
    await stage.submit("native-1", "practice?deltas=100&pace_ms=30")
    async with tab(f"{site.open.url}/") as page:
        await page.evaluate(FOLLOW, "/v1/jobs/native-1/events")
        await _seen(page, lambda seen: sum(event["name"] == "delta" for event in seen) > 5)
        await site.open.restart()
        seen = await _seen(page, lambda seen: seen[-1]["name"] == "error" and seen[-1]["state"] == 2)
    await stage.ended("native-1")

    names = [event["name"] for event in seen]
    assert [event["data"] for event in seen if event["name"] in {"started", "delta", "usage"}] == [
        *_records(stage, "native-1")
    ]
    assert ("closing" in names, "message" in names) == (True, False)
    assert names.count("open") >= 2
    assert all(event["state"] == 0 for event in seen if event["name"] == "error" and event is not seen[-1])


def _records(stage: Stage, job_id: str) -> list[str]:
    """Return the values of a job's records, as they are in the topic."""
    return [orjson.dumps(event).decode() for event in stage.events(job_id)]


async def test_native_eventsource_keeps_a_final_status_for_an_error_of_the_client(
    site: Site, tab: Tab
) -> None:
    """A malformed cursor is 400, and the browser does not try again."""
    async with tab(f"{site.open.url}/") as page:
        await page.evaluate(FOLLOW, "/v1/jobs/x/events?cursor=nonsense")
        seen = await _seen(page, bool)

    assert [(event["name"], event["state"]) for event in seen] == [("error", 2)]


async def test_browser_has_six_event_streams_per_host_and_one_websocket_for_many(
    site: Site, tab: Tab
) -> None:
    """The seventh EventSource waits for a free connection; seven subscriptions share one websocket."""
    async with tab(f"{site.open.url}/") as page:
        await page.evaluate(
            """() => {
                window.sources = Array.from({ length: 7 }, (_, n) => new EventSource(`/v1/jobs/six-${n}/events`));
                window.seen = [];
                const socket = new WebSocket(location.href.replace("http", "ws") + "v1/ws", "streamworker.v1");
                socket.onmessage = ({ data }) => {
                    const message = JSON.parse(data);
                    if (message.type === "live") seen.push(message.id);
                    if (message.type !== "welcome") return;
                    for (let n = 0; n < 7; n += 1) socket.send(JSON.stringify({ type: "subscribe", id: `${n}`, job_id: `six-${n}` }));
                };
            }"""
        )
        await _seen(page, lambda seen: len(seen) == 7)
        states = await page.evaluate("sources.map((source) => source.readyState)")

        assert sorted(states) == [0, 1, 1, 1, 1, 1, 1]
        await page.evaluate("sources.forEach((source) => source.close())")


# Other origins


@asynccontextmanager
async def _elsewhere() -> AsyncIterator[int]:
    """Serve an empty page; yield its port."""
    app = web.Application()

    async def page(_: web.Request) -> web.Response:
        return web.Response(text="<!doctype html>", content_type="text/html")

    app.router.add_get("/", page)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield runner.addresses[0][1]
    await runner.cleanup()


ACROSS = """async ([url, key]) => {
    const results = {};
    const headers = { authorization: `Bearer ${key}`, "content-type": "application/json", "idempotency-key": "k" };
    const body = JSON.stringify({ request: { model: "practice?deltas=2", messages: [{ role: "user", content: "Hi" }] } });
    try {
        const response = await fetch(`${url}/v1/jobs`, { method: "POST", headers, body });
        results.fetch = [response.status, response.headers.get("location") !== null];
    } catch (error) {
        results.fetch = error.name;
    }
    results.socket = await new Promise((resolve) => {
        const socket = new WebSocket(`${url.replace("http", "ws")}/v1/ws`, ["streamworker.v1", `bearer.${key}`]);
        socket.onmessage = ({ data }) => resolve(JSON.parse(data).type);
        socket.onclose = ({ code }) => resolve(code);
    });
    return results;
}"""


@pytest.mark.parametrize("is_allowed", [True, False], ids=["allowed", "not allowed"])
async def test_page_of_another_origin_needs_to_be_allowed(site: Site, tab: Tab, is_allowed: bool) -> None:
    """The browser's preflight passes for origins in `cors_origins` only, and so do websockets."""
    async with _elsewhere() as port:
        origin = f"http://127.0.0.1:{port}"
        origins = origin if is_allowed else "http://127.0.0.1:1"
        settings = {
            "gateway__auth": "keys",
            "gateway__keys_file": site.keyed.settings.gateway.keys_file,
            "gateway__cors_origins": origins,
        }
        async with Gateway(site.stage, **settings) as gateway, tab(origin) as page:
            results = await page.evaluate(ACROSS, [gateway.url, site.key])

    assert results == (
        {"fetch": [202, True], "socket": "welcome"} if is_allowed else {"fetch": "TypeError", "socket": 1006}
    )


# The examples of docs/gateway.md

PAGE = (Path(__file__).parents[2] / "docs" / "gateway.md").read_text()
EVENT_SOURCE, WEBSOCKET = re.findall(r"^```js\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


async def test_documented_curl_commands_submit_a_job_and_follow_it_to_its_end(site: Site) -> None:
    """As printed, but for the port."""
    shell = PAGE.partition("## From the shell")[2]
    (block,) = re.findall(r"^```console\n(.*?)^```$", shell.partition("\n## ")[0], re.MULTILINE | re.DOTALL)
    script = block.replace("$ curl", "curl").replace("localhost:8088", site.open.url.removeprefix("http://"))
    process = await asyncio.create_subprocess_exec("bash", "-ec", script, stdout=asyncio.subprocess.PIPE)
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    text = output.decode()

    assert process.returncode == 0
    assert '"status":"queued"' in text
    assert [line for line in text.splitlines() if line.startswith("event: ")][-1] == "event: usage"


async def test_documented_eventsource_reads_a_job_with_its_read_token(site: Site, tab: Tab) -> None:
    """As printed; the token came with the job."""
    request = {"model": "practice", "messages": [{"role": "user", "content": PROMPT}]}
    async with httpx.AsyncClient(base_url=site.keyed.url, headers={"X-API-Key": site.key}) as http:
        submitted = (await http.post("/v1/jobs?token=read", json={"request": request})).json()
    ending = 'new Promise((done) => source.addEventListener("usage", () => done(text)))'
    names = f"const jobId = {submitted['job_id']!r}; const readToken = {submitted['read_token']!r};"
    async with tab(site.keyed.url) as page:
        text = await page.evaluate(f"(() => {{ {names} {EVENT_SOURCE} return {ending}; }})()")

    assert text == _text("practice")


async def test_documented_websocket_submits_a_job_and_prints_its_text(site: Site, tab: Tab) -> None:
    """As printed."""
    async with tab(site.open.url) as page:
        lines: list[str] = []
        page.on("console", lambda line: lines.append(line.text))
        await page.evaluate(f"(() => {{ {WEBSOCKET} }})()")
        (expected,) = expected_text("practice", [{"role": "user", "content": "Hi"}])
        async with asyncio.timeout(LIMIT_MS / 1000):
            while "".join(line for line in lines if line != "undefined") != expected:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.05)
