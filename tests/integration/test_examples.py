"""The programs in `examples`, as they are but for model and port, with Apache Kafka, a worker and the practice upstream."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from aiohttp import web
from playwright.async_api import expect

from streamworker.demo.child import free_port
from streamworker.practice import expected_text
from tests.browser.conftest import launched, opened
from tests.integration.gateways import gateway
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.stage import Stage

EXAMPLES = Path(__file__).parents[2] / "examples"
MODEL = "apertus-70b-instruct"
PROMPT = "Conta da 1 a 10."
LIMIT_S = 60.0
LIMIT_MS = 15_000.0


def answer(model: str, prompt: str) -> str:
    """Return the text of the practice upstream's answer."""
    (text,) = expected_text(model, [{"role": "user", "content": prompt}])
    return text


def adapted(name: str, folder: Path, changes: dict[str, str]) -> Path:
    """Copy an example into a folder with texts replaced, each of which it contains once; return the copy."""
    code = (EXAMPLES / name).read_text()
    for old, new in changes.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    copy = folder / name
    copy.write_text(code)
    return copy


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.*")), ids=lambda path: path.name)
def test_example_has_fewer_than_twenty_lines(path: Path) -> None:
    """Blank lines, comments and the docstring are not counted; imports and markup are."""
    code = re.sub(r'\A"""(.*?)"""$', "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    lines = [line for line in code.splitlines() if line and not re.match(r"\s*(#|//|<!--)", line)]

    assert 0 < len(lines) < 20


# FastAPI


@asynccontextmanager
async def served(stage: Stage) -> AsyncIterator[httpx.AsyncClient]:
    """Serve the FastAPI example with uvicorn, by the command in its first line; yield an HTTP client of it."""
    port = free_port()
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "uvicorn", "fastapi_stream:app", "--port", str(port)),
        cwd=EXAMPLES,
        env={**os.environ, **stage._environment({}), "PYTHONDONTWRITEBYTECODE": "1"},
        stdin=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert process.stderr is not None
        async with asyncio.timeout(LIMIT_S):
            while b"Uvicorn running" not in (line := await process.stderr.readline()):
                assert line, "uvicorn has ended"
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
            yield http
    finally:
        process.terminate()
        await process.communicate()


async def test_fastapi_example_streams_deltas_while_they_come_and_cancels_when_the_browser_leaves(
    apache: Stage,
) -> None:
    """The first response has the whole answer; leaving the second one after a delta ends its upstream call."""
    await apache.open()
    model, endless = "practice?deltas=5", "practice?deltas=9999&pace_ms=20"
    async with apache.worker(), served(apache) as http:
        asked = await http.get("/ask", params={"prompt": PROMPT, "model": model})
        events = [json.loads(line.removeprefix("data: ")) for line in asked.text.split("\n\n") if line]
        async with http.stream("GET", "/ask", params={"prompt": PROMPT, "model": endless}) as response:
            async for line in response.aiter_lines():
                if '"type":"delta"' in line:
                    break
        await eventually(lambda: apache.practice.calls[-1].outcome is not None, 5)
        await apache.until(lambda: len(apache.terminals()) == 2)

    assert asked.headers["content-type"].startswith("text/event-stream")
    assert [events[0]["type"], events[-1]["type"], events[-1]["status"]] == ["started", "usage", "completed"]
    assert "".join(event.get("delta", {}).get("content", "") for event in events) == answer(model, PROMPT)
    assert sorted(event["status"] for event in apache.terminals().values()) == ["cancelled", "completed"]


# Websocket


@asynccontextmanager
async def static(folder: Path, port: int) -> AsyncIterator[str]:
    """Serve a folder, as `python -m http.server` does; yield its origin."""
    app = web.Application()
    app.router.add_static("/", folder)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("model", "text", "status"),
    [
        ("practice?deltas=12&pace_ms=10", answer("practice?deltas=12&pace_ms=10", PROMPT), "completed"),
        ("practice?status=400", "", "failed"),
    ],
    ids=["completed", "refused"],
)
async def test_websocket_example_shows_the_answer_to_what_was_typed(
    apache: Stage, tmp_path: Path, model: str, text: str, status: str
) -> None:
    """In Chromium, from another origin than the gateway's, and twice on one connection."""
    await apache.open()
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    options = {"gateway__port": 0, "gateway__auth": "off", "gateway__cors_origins": origin}
    async with apache.worker(), gateway(apache, **options) as served:
        changes = {"127.0.0.1:8088": f"127.0.0.1:{served.port}", MODEL: model}
        page_file = adapted("websocket_page.html", tmp_path, changes)
        async with (
            static(tmp_path, port) as site,
            launched() as browser,
            opened(browser, f"{site}/{page_file.name}") as page,
        ):
            await page.wait_for_function("socket.readyState === WebSocket.OPEN")
            for _ in range(2):
                await page.evaluate("delete output.dataset.status")
                await page.get_by_role("button").click()
                await expect(page.locator("pre")).to_have_attribute("data-status", status, timeout=LIMIT_MS)
                assert await page.locator("pre").evaluate("node => node.textContent") == text

    assert len(apache.terminals()) == 2


async def test_websocket_example_shows_why_the_gateway_refuses_a_job(apache: Stage, tmp_path: Path) -> None:
    """The page shows the message of the error, and asks again on the same connection."""
    await apache.open()
    port = free_port()
    origin = f"http://127.0.0.1:{port}"
    options = {"gateway__port": 0, "gateway__auth": "off", "gateway__cors_origins": origin}
    async with apache.worker(), gateway(apache, **options) as served:
        changes = {"127.0.0.1:8088": f"127.0.0.1:{served.port}", f'"{MODEL}"': "form.prompt.value"}
        adapted("websocket_page.html", tmp_path, changes)
        async with (
            static(tmp_path, port) as site,
            launched() as browser,
            opened(browser, f"{site}/websocket_page.html") as page,
        ):
            await page.wait_for_function("socket.readyState === WebSocket.OPEN")
            await page.get_by_role("textbox").fill("")
            await page.get_by_role("button").click()
            await expect(page.locator("pre")).to_contain_text("request.model", timeout=LIMIT_MS)
            await page.get_by_role("textbox").fill("practice?deltas=2")
            await page.get_by_role("button").click()
            await expect(page.locator("pre")).to_have_attribute("data-status", "completed", timeout=LIMIT_MS)


# Batch


async def test_batch_example_prints_the_answers_of_500_lines_and_pays_none_twice(
    apache: Stage, tmp_path: Path
) -> None:
    """Run again, the same program prints the same answers without another call of the upstream."""
    await apache.open(results_topic=f"{apache.events_topic}.results")
    program = adapted("batch_500.py", tmp_path, {MODEL: "practice?deltas=2"})
    async with apache.worker():
        printed = []
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, program),
                cwd=tmp_path,
                env={**os.environ, **apache._environment({}), "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )
            out, err = await asyncio.wait_for(process.communicate(), LIMIT_S)
            assert process.returncode == 0, err.decode()
            printed.append(out.decode())

    prompts = [f"Quanto fa {n} per {n}?" for n in range(500)]
    expected = [f"square-{n} {answer('practice?deltas=2', prompt)}\n" for n, prompt in enumerate(prompts)]
    assert printed == ["".join(expected)] * 2
    assert len(apache.practice.calls) == 500
