"""`GET /v1/jobs/{id}/events`: formats, resuming, keep-alive, and every way in which a stream ends."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.gateway import client_stream
from streamworker.gateway.feeds import BrokerUnavailable, CursorLost, FeedLost, JobNotFound, Replay
from streamworker.gateway.frames import NDJSON, SSE
from tests.integration.stage import eventually
from tests.unit.gateway.served import ACME, OTHER, served

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    import aiohttp

    from tests.unit.gateway.served import Served

JOB = "acme.0199-job"


def path(job_id: str = JOB, query: str = "") -> str:
    return f"/v1/jobs/{job_id}/events{query}"


def stream(
    gateway: Served, query: str = "", key: str = ACME, **headers: str
) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
    """Open the stream of the job; underscores in names of headers become hyphens."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return gateway.http.get(
        gateway.url + path(query=query), headers={"Authorization": f"Bearer {key}", **named}
    )


def parse(text: str) -> list[dict[str, Any]]:
    """Return the events of an event stream as a browser dispatches them: type, last event id, data."""
    events, last_id = [], ""
    for block in text.split("\n\n"):
        fields: dict[str, list[str]] = {}
        for line in block.split("\n"):
            if line and not line.startswith(":"):
                name, _, value = line.partition(":")
                fields.setdefault(name, []).append(value.removeprefix(" "))
        last_id = fields.get("id", [last_id])[-1]
        if "data" in fields:
            events.append(
                {"event": fields["event"][-1], "id": last_id, "data": json.loads("\n".join(fields["data"]))}
                | ({"retry": int(fields["retry"][-1])} if "retry" in fields else {})
            )
    return events


async def parts(response: aiohttp.ClientResponse) -> AsyncIterator[str]:
    """Yield what comes, as it comes."""
    async for data in response.content.iter_any():
        yield data.decode()


# Formats


async def test_stream_of_an_ended_job_is_its_records_byte_for_byte(gateway: Served) -> None:
    """Event names are the types, ids are cursors, and the response ends behind `usage`."""
    gateway.log.publish(JOB, ["Hel", "lo"])
    async with stream(gateway) as response:
        text = await response.text()

    assert response.status == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["Cache-Control"] == "no-store, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Streamworker-Resumed-From"] == "start"
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    known = gateway.log.events[JOB]
    body = text.split("\n", 2)[2]
    assert body == "".join(
        f"event: {event.kind}\nid: {event.cursor}\ndata: {event.value.decode()}\n\n" for event in known
    )
    assert text.startswith(": streamworker\nretry: ")
    assert 1000 <= int(text.split("retry: ")[1].split("\n")[0]) <= 5000
    assert known[-1].cursor.endswith(".end")


async def test_stream_delivers_events_as_they_come(gateway: Served) -> None:
    """A job without events is waited for."""
    async with stream(gateway, "?cursor=0.0.w") as response:
        received = ""
        gateway.log.publish(JOB, ["a"], end=None)
        async for part in parts(response):
            received += part
            if '"a"' in received:
                break
        gateway.log.publish(JOB, ["b"], attempt="a2")
        received += await response.text()

    kinds = [event["event"] for event in parse(received)]
    assert kinds == ["started", "delta", "started", "delta", "usage"]
    assert gateway.log.open_feeds == 0


async def test_stream_as_lines_has_a_cursor_and_an_event_in_each(gateway: Served) -> None:
    """NDJSON has no field for an id beside the event."""
    gateway.log.publish(JOB, ["a"])
    async with stream(gateway, Accept="application/x-ndjson") as response:
        lines = [json.loads(line) for line in (await response.text()).splitlines() if line]

    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert lines == [
        {"cursor": event.cursor, "event": json.loads(event.value)} for event in gateway.log.events[JOB]
    ]


@pytest.mark.parametrize("end", [None, "completed"])
async def test_events_as_json_are_those_that_are_there(gateway: Served, end: str | None) -> None:
    """The request does not wait for more; the cursor continues."""
    gateway.log.publish(JOB, ["a"], end=end)
    status, value, headers = await gateway.call("GET", path(), headers={"Accept": "application/json"})

    known = gateway.log.events[JOB]
    assert status == 200
    assert value == {
        "events": [json.loads(event.value) for event in known],
        "cursor": known[-1].cursor,
        "ended": end is not None,
    }
    assert headers["Streamworker-Resumed-From"] == "start"
    assert gateway.log.open_feeds == 0


async def test_events_as_json_of_a_job_without_events_has_a_place(gateway: Served) -> None:
    """The cursor of a later request."""
    query = "?cursor=0.0.w"
    status, value, _ = await gateway.call("GET", path(query=query), headers={"Accept": "application/json"})

    assert (status, value["events"], value["ended"]) == (200, [], False)
    assert value["cursor"].endswith(".w")


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        (None, "text/event-stream"),
        ("*/*", "text/event-stream"),
        ("text/*", "text/event-stream"),
        ("text/event-stream", "text/event-stream"),
        ("application/json", "application/json"),
        ("application/*", "application/x-ndjson"),
        ("application/json;q=0.2, application/x-ndjson;q=0.9", "application/x-ndjson"),
        ("text/event-stream;q=0, */*", "application/x-ndjson"),
        ("TEXT/EVENT-STREAM; charset=utf-8", "text/event-stream"),
        ("application/json; q=1", "application/json"),
        ("text/html", None),
        ("text/event-stream;q=0", None),
        ("text/event-stream;q=x", None),
        ("nonsense", None),
    ],
)
async def test_accept_chooses_the_format(gateway: Served, accept: str | None, expected: str | None) -> None:
    """By RFC 9110; what allows none of them is 406."""
    gateway.log.publish(JOB, [])
    headers = {"Authorization": f"Bearer {ACME}"} | ({"Accept": accept} if accept is not None else {})
    async with gateway.http.get(
        gateway.url + path(), headers=headers, skip_auto_headers=["Accept"]
    ) as response:
        await response.read()

    assert response.status == (200 if expected else 406)
    assert response.content_type == (expected or "application/json")


async def test_accept_in_two_lines_is_one_list(gateway: Served) -> None:
    """RFC 9110 section 5.3: a proxy may split or join them."""
    gateway.log.publish(JOB, [])
    headers = [("Authorization", f"Bearer {ACME}"), ("Accept", "text/html"), ("Accept", "application/json")]
    async with gateway.http.get(gateway.url + path(), headers=headers) as response:
        await response.read()

    assert (response.status, response.content_type) == (200, "application/json")


def test_value_with_line_ends_stays_one_event() -> None:
    """A foreign producer may write JSON over several lines; a reader of an event stream joins them with line feeds."""
    from streamworker.gateway.feeds import FeedEvent

    event = FeedEvent("delta", "0.1.1.00000000", b'{\r\n"type":"delta",\r"seq":\n1}', 1, "a")

    [parsed] = parse(SSE.event(event).decode())
    assert parsed["data"] == {"type": "delta", "seq": 1}
    assert json.loads(NDJSON.event(event)) == {"cursor": event.cursor, "event": {"type": "delta", "seq": 1}}
    assert NDJSON.event(event).count(b"\n") == 1


# Where delivery begins


async def test_stream_resumes_behind_the_cursor_of_each_event(gateway: Served) -> None:
    """Header before query; `last_event_id` is another name of `cursor`."""
    gateway.log.publish(JOB, ["a", "b"])
    known = gateway.log.events[JOB]
    for number, event in enumerate(known[:-1]):
        for query, headers in [
            ("", {"Last_Event_ID": event.cursor}),
            (f"?cursor={event.cursor}", {}),
            (f"?last_event_id={event.cursor}", {}),
            (f"?cursor={known[-2].cursor}", {"Last_Event_ID": event.cursor}),
        ]:
            async with stream(gateway, query, **headers) as response:
                ids = [one["id"] for one in parse(await response.text())]
            assert ids == [one.cursor for one in known[number + 1 :]]
            assert response.headers["Streamworker-Resumed-From"] == event.cursor


@pytest.mark.parametrize("accept", ["text/event-stream", "application/json", "application/x-ndjson"])
async def test_stream_with_the_cursor_of_an_ending_is_204(gateway: Served, accept: str) -> None:
    """EventSource does not connect again after it. Kafka is not asked, nor may it be there."""
    gateway.log.is_ready = False
    async with stream(gateway, Last_Event_ID="3.17.9.9f2c01ab.end", Accept=accept) as response:
        assert (response.status, await response.read()) == (204, b"")


async def test_stream_passes_replay_and_since_to_the_log(gateway: Served) -> None:
    """As an enumeration, and in ms since the epoch."""
    gateway.log.publish(JOB, ["a"])
    async with stream(gateway, "?replay=snapshot&since=2030-01-31T12:00:00%2B01:00") as response:
        kinds = [event["event"] for event in parse(await response.text())]

    assert kinds == ["snapshot", "usage"]
    assert gateway.log.opened[-1]["replay"] is Replay.SNAPSHOT
    assert gateway.log.opened[-1]["since_ms"] == 1_896_087_600_000


# Quiet streams


async def test_quiet_stream_has_keep_alive_lines(tmp_path: Path) -> None:
    """A comment without a blank line: it dispatches nothing."""
    async with served(tmp_path, keep_alive_s=0.05) as gateway, stream(gateway, "?cursor=0.0.w") as response:
        received = ""
        async for part in parts(response):
            received += part
            if received.count("\n:\n") >= 1 and received.endswith(":\n:\n"):
                break

    assert received.split("\n", 2)[2].strip(":\n") == ""
    assert parse(received) == []


async def test_quiet_stream_gets_a_fresh_position(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it, a client that reconnects would have the whole wait searched again."""
    monkeypatch.setattr(client_stream, "POSITION_S", 0.05)
    async with served(tmp_path, keep_alive_s=0.03) as gateway, stream(gateway, "?cursor=0.0.w") as response:
        received = ""
        async for part in parts(response):
            received += part
            if "position" in received and received.endswith("\n\n"):
                break
        place = f"{gateway.log.partition(JOB)}.99.w"

    first = parse(received)[0]
    del first["retry"]  # of the stream's beginning: no block of its own, of which some clients make an event
    assert first == {"event": "position", "id": place, "data": {"type": "position"}}


async def test_stream_that_has_events_gets_no_keep_alive_line(tmp_path: Path) -> None:
    """Only a quiet connection needs one."""
    async with served(tmp_path, keep_alive_s=0.2) as gateway, stream(gateway, "?cursor=0.0.w") as response:
        gateway.log.publish(JOB, [], end=None)
        for number in range(12):
            value = json.loads(gateway.log.events[JOB][0].value) | {"seq": number + 1, "type": "delta"}
            gateway.log.append(JOB, "delta", value)
            await asyncio.sleep(0.05)
        gateway.log.append(JOB, "usage", value | {"seq": 13, "type": "usage"})
        text = await response.text()

    assert "\n:\n" not in text


# Ends


async def closing_of(response: aiohttp.ClientResponse) -> dict[str, Any]:
    """Read to the end; return the last event, which must be `closing`."""
    last = parse(await response.text())[-1]
    assert last["event"] == "closing"
    assert 1000 <= last["retry"] <= 5000
    return dict(last["data"])


async def test_old_stream_is_closed_for_renewal(tmp_path: Path) -> None:
    """The client reconnects with its last id, perhaps elsewhere."""
    async with served(tmp_path, max_stream_age_s=0.05) as gateway:
        gateway.log.publish(JOB, ["a"], end=None)
        async with stream(gateway) as response:
            closed = await closing_of(response)
        await eventually(lambda: gateway.log.open_feeds == 0)
        count = gateway.metric("gateway_streams_closed_total", face="sse", reason="age")

    assert closed == {"type": "closing", "reason": "age", "retriable": True}
    assert count == 1


async def test_lifetime_varies_by_ten_percent() -> None:
    """So that streams which began together do not end together."""
    drawn = [client_stream.lifetime_s(100.0) for _ in range(1000)]

    assert 90 <= min(drawn) < 92
    assert 108 < max(drawn) <= 110


async def test_drain_closes_streams_spread_over_its_time(tmp_path: Path) -> None:
    """None is cut; each gets a `closing` with reason `shutdown`."""
    async with served(tmp_path, drain_s=0.5) as gateway:
        gateway.log.publish(JOB, ["a"], end=None)
        responses = [await stream(gateway).__aenter__() for _ in range(20)]
        loop = asyncio.get_running_loop()
        began = loop.time()
        times: list[float] = []

        async def read(response: aiohttp.ClientResponse) -> dict[str, Any]:
            value = await closing_of(response)
            times.append(loop.time() - began)
            return value

        gateway.gateway.drain.begin()
        closed = await asyncio.gather(*map(read, responses))
        await gateway.gateway.drain.wait()

    assert closed == [{"type": "closing", "reason": "shutdown", "retriable": True}] * 20
    assert max(times) - min(times) > 0.1
    assert max(times) < 1.5


async def test_stream_of_an_expired_token_is_closed(gateway: Served) -> None:
    """The reason names the token; the client needs a new one."""
    token, _ = gateway.gateway.authenticator.tokens.sign([JOB], "read", 1)
    gateway.log.publish(JOB, ["a"], end=None)
    async with stream(gateway, key=token) as response:
        closed = await closing_of(response)

    assert closed == {"type": "closing", "reason": "token_expired", "retriable": False}


async def test_stream_of_a_removed_key_is_closed(tmp_path: Path) -> None:
    """At the next keep-alive."""
    async with served(tmp_path, keep_alive_s=0.05) as gateway:
        gateway.log.publish(JOB, ["a"], end=None)
        async with stream(gateway) as response:
            gateway.gateway.authenticator._keys._checked = -100.0
            (tmp_path / "keys.toml").write_text("")
            closed = await closing_of(response)

    assert closed["reason"] == "token_expired"


@pytest.mark.parametrize("error", [BrokerUnavailable("gone"), FeedLost(JOB)])
async def test_stream_whose_feed_fails_is_closed(gateway: Served, error: Exception) -> None:
    """The client reconnects with its last id."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with stream(gateway) as response:
        gateway.log.error = error
        gateway.log.changed.notify()
        closed = await closing_of(response)

    assert closed == {"type": "closing", "reason": "error", "retriable": True}


async def test_client_that_disconnects_releases_its_feed(gateway: Served) -> None:
    """Also while the job is quiet."""
    gateway.log.publish(JOB, ["a"], end=None)
    async with stream(gateway) as response:
        await eventually(lambda: gateway.log.open_feeds == 1)
        assert gateway.metric("gateway_streams_open", face="sse") == 1
        response.close()
        await eventually(lambda: gateway.log.open_feeds == 0)

    assert gateway.metric("gateway_streams_open", face="sse") == 0
    assert gateway.metric("gateway_events_delivered_total", face="sse") == 2


# Temporary trouble


def drain(gateway: Served) -> None:
    gateway.gateway.drain.begin()


def not_connected(gateway: Served) -> None:
    gateway.log.is_ready = False


def broker_away(gateway: Served) -> None:
    gateway.log.refusal = BrokerUnavailable("no answer")


@pytest.mark.parametrize(
    ("trouble", "reason", "code"),
    [
        (drain, "shutdown", "draining"),
        (not_connected, "error", "broker_unavailable"),
        (broker_away, "error", "broker_unavailable"),
    ],
)
async def test_temporary_trouble_is_a_closing_for_event_source_and_503_for_others(
    gateway: Served, trouble: Any, reason: str, code: str
) -> None:
    """EventSource takes every status but 200 as final."""
    trouble(gateway)
    async with stream(gateway, Accept="text/event-stream") as response:
        closed = await closing_of(response)
    status, value, headers = await gateway.call("GET", path(), headers={"Accept": "application/json"})

    assert response.status == 200
    assert closed == {"type": "closing", "reason": reason, "retriable": True}
    assert (status, value["error"]["code"], value["error"]["retriable"]) == (503, code, True)
    assert int(headers["Retry-After"]) > 0


async def test_caller_with_too_many_streams_gets_no_more_and_keeps_those(tmp_path: Path) -> None:
    """At a limit new ones are refused."""
    async with served(tmp_path, limits={"max_streams": 1}) as gateway:
        gateway.log.publish(JOB, ["a"], end=None)
        async with stream(gateway) as first:
            async with stream(gateway, Accept="text/event-stream") as second:
                closed = await closing_of(second)
            status, value, _ = await gateway.call("GET", path(), headers={"Accept": "application/x-ndjson"})
            gateway.log.publish(JOB, [], attempt="a2")
            kinds = [event["event"] for event in parse(await first.text())]

    assert (second.status, closed["reason"]) == (200, "overload")
    assert (status, value["error"]["code"]) == (429, "too_many_streams")
    assert kinds == ["started", "delta", "started", "usage"]


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        (JobNotFound(JOB, 1_700_000_000_000, "pass since="), 404, "job_not_found"),
        (CursorLost(JOB, "0.1.w"), 410, "cursor_lost"),
    ],
)
async def test_permanent_trouble_is_a_status_for_event_source_too(
    gateway: Served, refusal: Exception, status: int, code: str
) -> None:
    """A client that connects again would find the same."""
    gateway.log.refusal = refusal
    async with stream(gateway, Accept="text/event-stream") as response:
        value = await response.json()

    assert (response.status, value["error"]["code"], value["error"]["job_id"]) == (status, code, JOB)
    if status == 404:
        assert value["error"]["searched_from"] == "2023-11-14T22:13:20.000Z"


async def test_stream_of_another_tenants_job_does_not_exist(gateway: Served) -> None:
    """It answers as a job that was never there."""
    gateway.log.publish(JOB, ["a"])
    async with stream(gateway, key=OTHER) as response:
        value = await response.json()

    assert (response.status, value["error"]["code"]) == (404, "job_not_found")


# Clients that do not read


async def test_client_that_reads_nothing_costs_its_buffers_and_is_disconnected(tmp_path: Path) -> None:
    """What waits for it is bounded by the socket's buffers and one batch; other clients get every event meanwhile."""
    text = "x" * 10_000
    async with served(tmp_path, stall_s=0.3) as gateway:
        _, writer = await asyncio.open_connection(*gateway.address, limit=1024)
        writer.write(f"GET {path()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n\r\n".encode())
        gateway.log.publish(JOB, [text] * 2000, end=None)  # 20 MB
        await eventually(lambda: gateway.log.open_feeds == 1)
        async with stream(gateway) as quick:
            received = 0
            async for part in parts(quick):
                received += len(part)
                if received > 20_000_000:
                    break
            waiting = gateway.unsent_bytes
        await eventually(
            lambda: gateway.metric("gateway_streams_closed_total", face="sse", reason="stalled") == 1, 5
        )
        writer.close()

    assert waiting < 1_000_000


async def test_client_that_reads_slowly_gets_everything(tmp_path: Path) -> None:
    """A client that takes some bytes within `stall_s` has not stalled."""
    async with served(tmp_path, stall_s=0.5) as gateway:
        gateway.log.publish(JOB, ["x" * 10_000] * 150)
        async with stream(gateway) as response:
            received = b""
            while data := await response.content.read(65_536):
                received += data
                await asyncio.sleep(0.02)

    assert len(parse(received.decode())) == 152


async def test_http_1_0_client_gets_an_unframed_body_and_the_end_of_the_connection(gateway: Served) -> None:
    """A proxy such as nginx speaks HTTP/1.0 by default: no chunks."""
    gateway.log.publish(JOB, ["a"])
    reader, writer = await asyncio.open_connection(*gateway.address)
    writer.write(f"GET {path()} HTTP/1.0\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n\r\n".encode())
    head, _, body = (await reader.read()).decode().partition("\r\n\r\n")
    writer.close()

    assert head.startswith("HTTP/1.0 200 OK")
    assert "Transfer-Encoding" not in head
    assert [event["event"] for event in parse(body)] == ["started", "delta", "usage"]
    assert body.startswith(": streamworker\n")


async def test_connection_serves_another_request_behind_a_stream(gateway: Served) -> None:
    """The chunked body is complete."""
    gateway.log.publish(JOB, ["a"])
    reader, writer = await asyncio.open_connection(*gateway.address)
    request = f"GET {path()} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ACME}\r\n\r\n".encode()
    for _ in range(2):
        writer.write(request)
        data = await reader.readuntil(b"\r\n0\r\n\r\n")
        assert data.startswith(b"HTTP/1.1 200 OK")
        assert data.count(b"event: ") == 3
    writer.close()
