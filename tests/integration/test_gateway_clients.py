"""Clients that others wrote, on a gateway in front of Apache Kafka: each is cut behind every event, and resumes."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import websockets

from tests.integration.cutter import Cutter
from tests.integration.gateway_here import gateway
from tests.node import running_node

if TYPE_CHECKING:
    from tests.integration.gateway_here import Gateway
    from tests.integration.stage import Stage

DELTAS = 9
MODEL = f"practice?deltas={DELTAS}&shape=openai"


async def _ended_job(stage: Stage) -> str:
    """Run a job to its end; return its id."""
    async with stage.worker():
        await stage.submit("j1", MODEL)
        await stage.ended()
    return "j1"


async def test_npm_eventsource_resumes_after_a_cut_behind_every_event_and_stops_at_the_end(
    apache: Stage,
) -> None:
    """Every event comes once, in order; behind the ending the gateway answers 204, and the client stops by itself."""
    await apache.open()
    job_id = await _ended_job(apache)
    async with gateway(apache) as running, Cutter(running.port) as cutter:
        url = f"{cutter.url}/v1/jobs/{job_id}/events?since=2020-01-01T00:00:00Z"
        async with running_node("eventsource.cjs", url) as process:
            assert process.stdout is not None
            lines = [json.loads(line) async for line in process.stdout]

    assert lines.pop() == {"readyState": 2}
    assert [json.loads(line["data"]) for line in lines] == apache.events(job_id)
    assert [line["type"] for line in lines] == [event["type"] for event in apache.events(job_id)]
    assert len(cutter.requests) == len(lines) + 1
    assert lines[-1]["id"].endswith(".end")


async def test_httpx_sse_resumes_after_a_cut_behind_every_event(apache: Stage) -> None:
    """Each request continues behind the id of the former; no keep-alive becomes an event."""
    await apache.open()
    job_id = await _ended_job(apache)
    events: list[dict[str, Any]] = []
    last, answers = "", 0
    async with gateway(apache) as running, httpx.AsyncClient(base_url=running.url) as http:
        while True:
            headers = {"Last-Event-ID": last} if last else {}
            async with httpx_sse.aconnect_sse(
                http, "GET", f"/v1/jobs/{job_id}/events?since=2020-01-01T00:00:00Z", headers=headers
            ) as source:
                answers += 1
                if source.response.status_code == 204:
                    break
                event = await anext(source.aiter_sse())
                last = event.id
                events.append(json.loads(event.data))
                assert event.event == events[-1]["type"]

    assert events == apache.events(job_id)
    assert answers == len(events) + 1


async def test_npm_ws_resumes_after_a_cut_behind_every_event(apache: Stage) -> None:
    """A client that terminates its socket behind each event, and subscribes with its cursor, has each event once."""
    await apache.open()
    job_id = await _ended_job(apache)
    async with gateway(apache) as running:
        url = running.url.replace("http", "ws") + "/v1/ws"
        async with running_node("ws.cjs", url, job_id) as process:
            assert process.stdout is not None
            lines = [json.loads(line) async for line in process.stdout]
            code = await process.wait()

    assert code == 0
    assert lines == apache.events(job_id)


async def _follow_once(running: Gateway, job_id: str, cursor: str | None) -> dict[str, Any]:
    """Return the first event behind a cursor, and drop the connection."""
    url = running.url.replace("http", "ws") + "/v1/ws"
    async with websockets.connect(url, subprotocols=[websockets.Subprotocol("streamworker.v1")]) as socket:
        assert json.loads(await socket.recv())["type"] == "welcome"
        message = {"type": "subscribe", "id": "s", "job_id": job_id, "since": "2020-01-01T00:00:00Z"}
        await socket.send(json.dumps(message if cursor is None else {**message, "cursor": cursor}))
        subscribed = json.loads(await socket.recv())
        assert (subscribed["type"], subscribed["resumed_from"]) == ("subscribed", cursor or "start")
        while True:
            received: dict[str, Any] = json.loads(await socket.recv())
            if received["type"] == "event":
                socket.transport.abort()
                return received


async def test_python_websockets_resumes_after_a_cut_behind_every_event(apache: Stage) -> None:
    """The cursor of an event resumes behind it, on a new connection each time."""
    await apache.open()
    job_id = await _ended_job(apache)
    received: list[dict[str, Any]] = []
    async with gateway(apache) as running:
        while not received or received[-1]["event"]["type"] != "usage":
            received.append(await _follow_once(running, job_id, received[-1]["cursor"] if received else None))

    assert [message["event"] for message in received] == apache.events(job_id)


async def test_websocket_submits_follows_and_cancels_with_python_websockets(apache: Stage) -> None:
    """One connection submits a job, follows it and cancels it."""
    await apache.open()
    model = "practice?deltas=9999&pace_ms=20"
    request = {"model": model, "messages": [{"role": "user", "content": "Hi"}]}
    async with apache.worker(), gateway(apache) as running:
        url = running.url.replace("http", "ws") + "/v1/ws"
        async with websockets.connect(
            url, subprotocols=[websockets.Subprotocol("streamworker.v1")]
        ) as socket:
            await socket.send(
                json.dumps({"type": "submit", "id": "a", "job": {"request": request}, "subscribe": True})
            )
            kinds: list[str] = []
            ending = None
            while ending is None:
                message = json.loads(await socket.recv())
                kind = message["type"] if message["type"] != "event" else message["event"]["type"]
                if kind == "delta" and "delta" not in kinds:
                    await socket.send(
                        json.dumps({"type": "cancel", "id": "b", "job_id": message["event"]["job_id"]})
                    )
                kinds += [] if kind in kinds else [kind]
                if kind == "usage":
                    ending = message["event"]
            last = json.loads(await socket.recv())

    assert ending["status"] == "cancelled"
    assert {"welcome", "submitted", "subscribed", "live", "started", "delta", "cancelling", "usage"} == set(
        kinds
    )
    assert (last["type"], last["id"], last["reason"]) == ("end", "a", "ended")
