"""The web service of docs/python.md, served by uvicorn, against Apache Kafka, the worker and the practice upstream."""

from __future__ import annotations

import asyncio
import json
import re
import time
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import uvicorn

from streamworker.practice import expected_text
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.integration.stage import Stage

PAGE = Path(__file__).parents[2] / "docs" / "python.md"


def examples() -> list[dict[str, Any]]:
    """Execute the Python examples of the page; return the names that each defines."""
    defined = []
    for code in re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL):
        names: dict[str, Any] = {}
        exec(compile(code, PAGE.name, "exec"), names)
        defined.append(names)
    return defined


@pytest.fixture
def configured(apache: Stage, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """The stage, whose settings are environment variables of this process."""
    for name, value in apache._environment({}).items():
        monkeypatch.setenv(name, value)
    return apache


@asynccontextmanager
async def served() -> AsyncIterator[httpx.AsyncClient]:
    """Serve the example on a free port; yield an HTTP client of it."""
    app = examples()[0]["app"]
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", loop="none"))
    server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
    running = asyncio.create_task(server._serve())
    await eventually(lambda: server.started or running.done())
    if running.done():
        running.result()
    port = server.servers[0].sockets[0].getsockname()[1]
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        try:
            yield http
        finally:
            server.should_exit = True
            await running


async def test_web_service_streams_the_answer_and_returns_the_result(configured: Stage) -> None:
    """The events of `/ask` are those of the topic; `/jobs/{id}` has the whole completion."""
    await configured.open()
    model = "practice?deltas=5"
    async with configured.worker(), served() as http:
        asked = await http.post("/ask", params={"prompt": "Hi", "conversation": "c1", "model": model})
        job_id = asked.headers["X-Job"]
        result = (await http.get(f"/jobs/{job_id}")).json()
        events = [json.loads(line.removeprefix("data: ")) for line in asked.text.split("\n\n") if line]
        await configured.until(lambda: job_id in configured.terminals())

    assert events == configured.all_events(job_id)
    assert (result["status"], result["metadata"]) == ("completed", {"page": "home"})
    (text,) = expected_text(model, [{"role": "user", "content": "Hi"}])
    assert result["completion"]["choices"][0]["message"]["content"] == text


@pytest.mark.parametrize("pace_ms", [20, 60_000], ids=["while it streams", "while nothing comes"])
async def test_web_service_cancels_the_upstream_call_within_a_second_of_a_disconnect(
    configured: Stage, pace_ms: int
) -> None:
    """Whether deltas come or not."""
    await configured.open()
    model = f"practice?deltas=9999&pace_ms={pace_ms}"
    async with configured.worker(), served() as http:
        request = http.stream("POST", "/ask", params={"prompt": "Hi", "conversation": "c", "model": model})
        async with request as response:
            await eventually(lambda: any(call.body for call in configured.practice.calls))
            async for _ in response.aiter_raw():
                break
        began = time.monotonic()
        (call,) = configured.practice.calls
        await eventually(lambda: call.outcome is not None, 5)
        seconds = time.monotonic() - began
        job_id = response.headers["X-Job"]
        await configured.until(lambda: job_id in configured.terminals())

    assert configured.terminals()[job_id]["status"] == "cancelled"
    assert seconds < 1


async def test_script_prints_an_answer_and_the_results_of_many(
    configured: Stage, capsys: pytest.CaptureFixture[str]
) -> None:
    """The blocking client works in a thread without a loop."""
    await configured.open()
    async with configured.worker():
        run = examples()[1]["run"]
        await asyncio.to_thread(run, "practice?deltas=3", [str(number) for number in range(20)])

    out = capsys.readouterr().out
    (text,) = expected_text("practice?deltas=3", [{"role": "user", "content": "Hi"}])
    assert f"{text}\n" in out
    assert out.count(" completed ") == 20
