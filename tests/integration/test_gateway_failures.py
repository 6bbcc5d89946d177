"""Streams of gateways when a worker dies within its transaction, and when the events topic is replaced; on Apache Kafka."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.admin import NewTopic
from websockets.asyncio.client import connect as connect_typed

from streamworker.reader import EventReader, Notice
from tests.integration.gateways import KEY, events_in, gateway, open_keys
from tests.integration.stage import eventually
from tests.integration.test_client_failures import DIES_IN_ITS_TRANSACTION

if TYPE_CHECKING:
    from pathlib import Path

    from tests.integration.gateways import Gateway
    from tests.integration.stage import Stage

connect: Any = connect_typed
PARTITIONS = 2


@pytest.fixture
async def stage(apache: Stage, tmp_path: Path) -> Stage:
    """A stage whose topics are open, with a key."""
    open_keys(apache, tmp_path)
    await apache.open(events_partitions=PARTITIONS)
    return apache


def read_events(stage: Stage, job_id: str) -> list[dict[str, Any]]:
    """Return the events that an `EventReader` over the topic, with committed terminal events, reports as valid."""
    reader = EventReader()
    readings = [reading for event in stage.all_events(job_id) for reading in reader.read(event)]
    return [dict(reading.event) for reading in readings if reading.notice is Notice.VALID]


async def over_websocket(served: Gateway, job_id: str, cursor: str) -> list[dict[str, Any]]:
    """Follow a job over a websocket to its end; return the events."""
    url, headers = f"ws://127.0.0.1:{served.port}/v1/ws", {"Authorization": f"Bearer {KEY}"}
    events = []
    async with connect(url, subprotocols=["streamworker.v1"], additional_headers=headers) as socket:
        await socket.send(json.dumps({"type": "subscribe", "id": "1", "job_id": job_id, "cursor": cursor}))
        while (message := json.loads(await socket.recv()))["type"] != "end":
            if message["type"] == "event":
                events.append(message["event"])
    assert message["reason"] == "ended"
    return events


async def over_sse(served: Gateway, job_id: str, cursor: str) -> list[dict[str, Any]]:
    """Follow a job over server-sent events to its end; return the events."""
    return [event["data"] for event in await served.events(f"/v1/jobs/{job_id}/events", cursor)]


async def test_worker_killed_in_its_transaction_gives_every_stream_the_next_attempt_and_one_usage(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal event that was rolled back is in no stream, of neither gateway, whatever the protocol."""
    died = tmp_path / "died"
    monkeypatch.setenv("DIED", str(died))
    stage.bug = DIES_IN_ITS_TRANSACTION
    as_one = {"worker__group_instance_id": "one"}  # the next one does not wait for the end of the session
    await stage.process(**as_one)
    async with gateway(stage) as one, gateway(stage) as two:
        submitted = await one.submit("practice?deltas=3")
        job_id, cursor = submitted["job_id"], submitted["cursor"]
        follow = [over_sse, over_websocket]
        early = [asyncio.create_task(way(served, job_id, cursor)) for served in (one, two) for way in follow]
        await eventually(died.exists)
        late = [asyncio.create_task(way(served, job_id, cursor)) for served in (one, two) for way in follow]
        await stage.process(**as_one)
        async with asyncio.timeout(60):
            streams = await asyncio.gather(*early, *late)
        await stage.ended(job_id)

    expected = read_events(stage, job_id)
    assert [event["type"] for event in expected].count("started") == 2
    for events in streams:
        assert events == expected
        assert [event["type"] for event in events].count("usage") == 1


async def replace_events_topic(stage: Stage) -> None:
    """Delete the events topic and create it again under its name."""
    await stage._admin.delete_topics([stage.events_topic])
    new = NewTopic(stage.events_topic, PARTITIONS, 1)
    async with asyncio.timeout(20):
        while (await stage._admin.create_topics([new])).topic_errors[0][1]:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.1)


@pytest.mark.parametrize("is_followed", [True, False], ids=["followed", "not_followed"])
async def test_events_topic_that_is_replaced_streams_new_jobs_and_loses_the_cursors_of_old_ones(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, is_followed: bool
) -> None:
    """Open streams are closed, to connect again; then the cursor is lost. A job that has begun since is complete."""
    monkeypatch.setattr("streamworker.gateway.followed._WATCH_S", 0.2)
    async with gateway(stage) as served:
        async with stage.worker():
            ended = await served.submit("practice?deltas=5")
            old = await served.events(ended["events_url"])
            running = await served.submit("practice?deltas=9999&pace_ms=20") if is_followed else None
            closed: list[dict[str, Any]] = []
            following = (
                None
                if running is None
                else asyncio.create_task(follow(served, running["events_url"], closed))
            )
            await eventually(lambda: running is None or len(closed) > 3)
            await replace_events_topic(stage)
            if running is not None and following is not None:
                await asyncio.wait_for(following, 20)
                assert closed[-1]["data"] == {"type": "closing", "reason": "error", "retriable": True}
                lost = await served.http.get(
                    f"/v1/jobs/{running['job_id']}/events", headers={"Last-Event-ID": closed[-2]["id"]}
                )
                assert (lost.status_code, lost.json()["error"]["code"]) == (410, "cursor_lost")
                await served.http.post(f"/v1/jobs/{running['job_id']}/cancel")
            new = await served.submit("practice?deltas=5")
            events = await over_any_number_of_responses(served, new)
        gone = await served.http.get(
            f"/v1/jobs/{ended['job_id']}/events", headers={"Last-Event-ID": old[2]["id"]}
        )
        over = await served.http.get(
            f"/v1/jobs/{ended['job_id']}/events", headers={"Last-Event-ID": old[-1]["id"]}
        )
        await stage.ended(new["job_id"])

    assert events == read_events(stage, new["job_id"])
    assert [event["seq"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == "usage"
    assert (gone.status_code, gone.json()["error"]["code"]) == (410, "cursor_lost")
    assert over.status_code == 204


async def follow(served: Gateway, path: str, found: list[dict[str, Any]]) -> None:
    """Add the events of an event stream to `found` as they come."""
    async with served.http.stream("GET", path, headers={"Accept": "text/event-stream"}) as response:
        async for event in events_in(response):
            found.append(event)  # noqa: PERF401 - `extend` would add them at the end


async def over_any_number_of_responses(served: Gateway, submitted: dict[str, Any]) -> list[dict[str, Any]]:
    """Follow a job to its end, connecting again when the gateway asks for it; return the events."""
    events: list[dict[str, Any]] = []
    cursor = submitted["cursor"]
    async with asyncio.timeout(30):
        while True:
            for event in await served.events(f"/v1/jobs/{submitted['job_id']}/events", cursor):
                if event["event"] not in {"closing", "position"}:
                    events.append(event["data"])
                cursor = event.get("id", cursor)
            if events and events[-1]["type"] == "usage":
                return events
