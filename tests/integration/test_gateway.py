"""The gateway on Apache Kafka, with the worker and the practice upstream."""

from __future__ import annotations

import asyncio
import json
import signal
from datetime import datetime
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from websockets.asyncio.client import connect as connect_typed

from streamworker.demo.child import free_port
from streamworker.practice import expected_text
from tests.integration.forwarding import forwarded
from tests.integration.gateways import KEY, events_in, gateway, gateway_process, open_keys
from tests.integration.stage import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.stage import Stage

connect: Any = connect_typed
MODEL = "practice?deltas=5"
SLOW = "practice?deltas=9999&pace_ms=20"


@pytest.fixture
async def stage(apache: Stage, tmp_path: Path) -> Stage:
    """A stage whose topics are open, with a key and a secret."""
    open_keys(apache, tmp_path)
    await apache.open(events_partitions=3)
    return apache


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["data"]["delta"].get("content", "") for event in events if event["event"] == "delta")


async def test_job_is_submitted_streamed_and_over(stage: Stage) -> None:
    """The events are the topic's records, the text is the upstream's, and the last id gives 204."""
    async with stage.worker(), gateway(stage) as served:
        submitted = await served.submit(MODEL)
        events = await served.events(submitted["events_url"])
        again = await served.http.get(submitted["events_url"], headers={"Last-Event-ID": events[-1]["id"]})
        job = await served.http.get(f"/v1/jobs/{submitted['job_id']}")
        same = await served.http.get(
            f"/v1/jobs/{submitted['job_id']}", headers={"If-None-Match": job.headers["ETag"]}
        )
        await stage.ended(submitted["job_id"])

    assert [event["data"] for event in events] == stage.events(submitted["job_id"])
    [text] = expected_text(MODEL, [{"role": "user", "content": "hi"}])
    assert text_of(events) == text
    assert events[0]["data"]["metadata"] == {"tenant": "acme"}
    assert events[-1]["id"].endswith(".end")
    assert (again.status_code, again.content) == (204, b"")
    assert job.json()["choices"][0]["message"]["content"] == text
    assert job.json()["ending"] == events[-1]["data"]
    assert job.headers["Cache-Control"] == "private, max-age=3600"
    assert same.status_code == 304


async def test_stream_resumes_on_another_replica_behind_every_event(stage: Stage) -> None:
    """With the id of each event in turn: nothing is missing, nothing comes twice."""
    async with stage.worker(), gateway(stage) as one, gateway(stage) as two:
        submitted = await one.submit(MODEL)
        whole = await one.events(submitted["events_url"])
        path = f"/v1/jobs/{submitted['job_id']}/events"
        resumed = [await two.events(path, event["id"]) for event in whole[:-1]]

    assert resumed == [whole[number:] for number in range(1, len(whole))]


async def test_stream_of_a_killed_gateway_resumes_on_another_one(stage: Stage) -> None:
    """`kill -9` in the middle of a stream, which ends when the other gateway cancels it."""
    async with stage.worker(), gateway(stage) as other, gateway_process(stage) as (first, process):
        submitted = await first.submit(SLOW)
        begun: list[dict[str, Any]] = []
        with pytest.raises(httpx.HTTPError):
            async with first.http.stream("GET", submitted["events_url"]) as response:
                async for event in events_in(response):
                    begun.append(event)
                    if len(begun) == 10:
                        await process.kill()
        path = f"/v1/jobs/{submitted['job_id']}"
        following = asyncio.create_task(other.events(f"{path}/events", begun[-1]["id"]))
        await eventually(lambda: stage.deltas(submitted["job_id"]) > len(begun) + 20)
        assert (await other.http.post(f"{path}/cancel")).status_code == 202
        rest = await following
        await stage.ended(submitted["job_id"])

    events = stage.events(submitted["job_id"])
    assert [event["data"] for event in begun + rest] == events
    assert len(begun) >= 10
    assert len(rest) > 20
    assert [event["type"] for event in events].count("usage") == 1


async def test_cancel_ends_the_job_and_its_stream(stage: Stage) -> None:
    """Also on a stream that was resumed, at another replica."""
    async with stage.worker(), gateway(stage) as one, gateway(stage) as two:
        submitted = await one.submit(SLOW)
        path = f"/v1/jobs/{submitted['job_id']}"
        begun = await one.events(submitted["events_url"], limit=3)
        following = asyncio.create_task(two.events(f"{path}/events", begun[-1]["id"]))
        cancelled = await two.http.post(f"{path}/cancel", json={"reason": "not needed"})
        again = await two.http.post(f"{path}/cancel")
        rest = await following

    assert (cancelled.status_code, again.status_code) == (202, 202)
    assert cancelled.json() == {"job_id": submitted["job_id"], "cancelling": True}
    assert rest[-1]["data"]["status"] == "cancelled"
    assert "not needed" in rest[-1]["data"]["error"]["message"]


async def test_job_is_submitted_and_followed_over_a_websocket(stage: Stage) -> None:
    """`submitted`, `subscribed`, the events, `end`."""
    async with stage.worker(), gateway(stage) as served:
        url = f"ws://127.0.0.1:{served.port}/v1/ws"
        headers = {"Authorization": f"Bearer {KEY}"}
        async with connect(url, subprotocols=["streamworker.v1"], additional_headers=headers) as socket:
            request = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
            await socket.send(
                json.dumps({"type": "submit", "id": "1", "job": {"request": request}, "subscribe": True})
            )
            messages = [json.loads(await socket.recv())]
            while messages[-1]["type"] != "end":
                messages.append(json.loads(await socket.recv()))
        job_id = messages[1]["job_id"]
        await stage.ended(job_id)

    assert [message["type"] for message in messages if message["type"] not in {"event", "live"}] == [
        "welcome",
        "submitted",
        "subscribed",
        "end",
    ]
    assert [m["event"] for m in messages if m["type"] == "event"] == stage.events(job_id)


async def test_waiting_for_a_job_returns_at_its_end(stage: Stage) -> None:
    """`wait_s` is the longest wait."""
    async with stage.worker(), gateway(stage) as served:
        submitted = await served.submit("practice?deltas=20&pace_ms=20")
        path = f"/v1/jobs/{submitted['job_id']}"
        before = await served.http.get(path)
        after = await served.http.get(path, params={"wait_s": 20, "cursor": submitted["cursor"]})

    assert before.json()["status"] in {"waiting", "running"}
    assert before.headers["Cache-Control"] == "no-store"
    assert after.json()["status"] == "completed"


async def test_read_token_of_a_submitted_job_opens_its_stream(stage: Stage) -> None:
    """A browser's EventSource can send nothing else."""
    async with stage.worker(), gateway(stage) as served:
        job = {"request": {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}}
        submitted = (await served.http.post("/v1/jobs", params={"token": "read"}, json=job)).json()
        async with httpx.AsyncClient(base_url=served.http.base_url) as browser:
            response = await browser.get(
                submitted["events_url"], params={"access_token": submitted["read_token"]}
            )

    assert response.text.count("event: usage") == 1


async def test_gateway_drains_at_sigterm(stage: Stage) -> None:
    """Its streams are closed one by one, new requests are refused, and the process ends with code 0."""
    async with stage.worker(), gateway_process(stage, gateway__drain_s=2) as (served, process):
        submitted = await served.submit(SLOW)
        streams = [asyncio.create_task(served.events(submitted["events_url"])) for _ in range(8)]
        await eventually(lambda: stage.deltas(submitted["job_id"]) > 3)
        process.signal(signal.SIGTERM)
        await process.logged("signal.received")
        refused = await served.http.post("/v1/jobs", json={})
        ended = await asyncio.gather(*streams)
        code = await process.exit_code()
        await stage._producer.send_and_wait(
            stage.control_topic,
            json.dumps({"type": "cancel", "job_id": submitted["job_id"]}).encode(),
            key=submitted["job_id"].encode(),
        )

    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
    assert {events[-1]["event"] for events in ended} == {"closing"}
    assert {events[-1]["data"]["reason"] for events in ended} == {"shutdown"}
    assert code == 0


async def test_gateway_that_starts_without_a_broker_reports_it_and_recovers(stage: Stage) -> None:
    """Within 3 s; meanwhile its port is open and requests are 503."""
    port, broker_port = free_port(), free_port()
    over = {"gateway__port": port, "kafka__bootstrap_servers": f"127.0.0.1:{broker_port}"}
    process = await stage.start_command("gateway", over)
    [line, *_] = await process.logged("kafka.unavailable")
    [started] = process.lines("gateway.starting")
    url = f"http://127.0.0.1:{port}"
    async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as http:
        refused = await http.get("/v1/jobs/acme.1")
        async with forwarded(broker_port, stage.broker.bootstrap):
            await process.logged("gateway.started")
            found = await http.get("/v1/jobs/acme.1", params={"since": "2026-01-01T00:00:00Z"})

    assert _seconds(line) - _seconds(started) < 3
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "broker_unavailable")
    assert (found.status_code, found.json()["status"]) == (200, "waiting")


def _seconds(line: dict[str, Any]) -> float:
    return datetime.fromisoformat(line["timestamp"]).timestamp()


async def test_gateway_with_a_missing_topic_ends_with_its_name(stage: Stage) -> None:
    """An operator has to create it."""
    process = await stage.start_command("gateway", {"topics__events": "not.there"})

    assert await process.exit_code() == 1
    assert "topic not.there does not exist" in process.tail()
