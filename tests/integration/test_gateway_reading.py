"""The rules about reading of the Durable Streams conformance suite, restated for a job's event stream.

That suite writes over HTTP, so it cannot judge a server that is read only: here Kafka is the writer. A stream is a job,
an offset is a cursor, a closed stream is an ended job. Rules about creating, appending, forking, expiry and producers
have no counterpart.
"""

from __future__ import annotations

import asyncio
import json
import re
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import httpx
import httpx_sse
import pytest
import pytest_asyncio
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import RecordsToDelete

from streamworker.client.ids import new_job_id
from streamworker.practice import PracticeUpstream
from tests.integration.events import home
from tests.integration.gateway_here import Gateway, stage_on

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.brokers.apache import ApacheKafka
    from tests.integration.stage import Stage

pytestmark = pytest.mark.asyncio(loop_scope="module")

SSE, NDJSON, JSON = "text/event-stream", "application/x-ndjson", "application/json"
FORMATS = (SSE, NDJSON, JSON)
HOSTILE = (
    "plain",
    "two\nlines",
    "\r\nevent: usage\r\ndata: {}\r\n\r\n",
    "\n\nevent: usage\ndata: {}\n\n",
    "\revent: usage\rdata: {}\r\r",
    "a\u2028b\u2029c\u0085d",
    "nul \u0000 and bell \u0007",
    'quo"te and back\\slash',
    "[DONE]",
    "👩‍🚀 ستة 五",
    "",
)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A gateway, a client of it, and the stage whose producer writes the events."""

    stage: Stage
    http: httpx.AsyncClient
    gateway: Gateway

    async def append(self, *events: dict[str, Any]) -> None:
        """Write events to the topic, acknowledged."""
        for event in events:
            await self.stage._producer.send_and_wait(
                self.stage.events_topic, json.dumps(event).encode(), key=event["job_id"].encode()
            )

    async def read(
        self, job_id: str, cursor: str | None = None, **query: str
    ) -> tuple[list[dict[str, Any]], str, bool]:
        """Return what is there now: events, the cursor behind them, and whether the job has ended."""
        answer = await self.get(job_id, cursor, JSON, **query)
        assert answer.status_code == 200, answer.text
        value = answer.json()
        return value["events"], value["cursor"], value["ended"]

    async def expect(
        self, events: list[dict[str, Any]], job_id: str, cursor: str | None = None, **query: str
    ) -> tuple[str, bool]:
        """Read until these events are there; return the cursor and whether the job has ended.

        What a broker has acknowledged is in the gateway's reach a few milliseconds later.
        """
        async with asyncio.timeout(5):
            while True:
                found, behind, ended = await self.read(job_id, cursor, **query)
                if len(found) >= len(events):
                    break
        assert found == events
        return behind, ended

    async def get(
        self, job_id: str, cursor: str | None = None, accept: str = JSON, **query: str
    ) -> httpx.Response:
        """Request the events; the stream must end."""
        return await self.http.get(_path(job_id), params=_query(cursor, query), headers={"Accept": accept})

    async def delete_all_events(self) -> None:
        """Delete what the topic has, as its retention does."""
        topic = self.stage.events_topic
        await self.stage._admin.delete_records(
            {KafkaTopicPartition(topic, number): RecordsToDelete(before_offset=-1) for number in range(2)}
        )

    @asynccontextmanager
    async def follow(
        self, job_id: str, cursor: str | None = None, **query: str
    ) -> AsyncIterator[AsyncIterator[httpx_sse.ServerSentEvent]]:
        """Open an event stream; yield its events."""
        async with httpx_sse.aconnect_sse(
            self.http, "GET", _path(job_id), params=_query(cursor, query)
        ) as source:
            assert source.response.status_code == 200
            yield source.aiter_sse()


def _path(job_id: str) -> str:
    return f"/v1/jobs/{job_id}/events"


def _query(cursor: str | None, query: dict[str, str]) -> dict[str, str]:
    return query if cursor is None else {**query, "cursor": cursor}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def reader(
    apache_kafka: ApacheKafka, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Reader]:
    """One gateway for all tests of this file; each test has a job of its own."""
    directory = tmp_path_factory.mktemp("reading")
    async with PracticeUpstream() as practice, stage_on(apache_kafka, practice, directory) as stage:  # noqa: SIM117
        async with Gateway(stage) as gateway, httpx.AsyncClient(base_url=gateway.url, timeout=20) as http:
            yield Reader(stage=stage, http=http, gateway=gateway)


def _event(job_id: str, seq: int, kind: str, attempt: str = "a1", **members: Any) -> dict[str, Any]:
    return {
        "type": kind,
        "v": 1,
        "job_id": job_id,
        "attempt": attempt,
        "seq": seq,
        "ts": 1000 + seq,
        **members,
    }


def started(job_id: str, attempt: str = "a1") -> dict[str, Any]:
    """Return the first event of an attempt."""
    source = {"topic": "jobs", "partition": 0, "offset": 0}
    return _event(
        job_id, 0, "started", attempt, model="m", upstream="default", cause="new", source=source, metadata={}
    )


def delta(job_id: str, seq: int, content: str, attempt: str = "a1") -> dict[str, Any]:
    """Return a delta."""
    return _event(job_id, seq, "delta", attempt, choice=0, delta={"content": content}, finish_reason=None)


def usage(job_id: str, seq: int, attempt: str = "a1") -> dict[str, Any]:
    """Return a terminal event."""
    members = {"status": "completed", "finish_reasons": {"0": "stop"}, "usage": None, "usage_source": "none"}
    observed = {"deltas": seq - 1, "chunks": seq, "content_chars": 0, "reasoning_chars": 0, "bytes": 0}
    timing = {"queued": 1, "first_delta": 1, "total": 2}
    return _event(
        job_id, seq, "usage", attempt, **members, observed=observed, error=None, timing=timing, tries=1
    )


def job(deltas: int = 5, *, is_ended: bool = False) -> tuple[str, list[dict[str, Any]]]:
    """Return a new id and the events of its job."""
    job_id = new_job_id()
    events = [started(job_id), *(delta(job_id, seq, f"word {seq} ") for seq in range(1, deltas + 1))]
    return job_id, [*events, usage(job_id, deltas + 1)] if is_ended else events


async def taken(events: AsyncIterator[httpx_sse.ServerSentEvent], count: int) -> list[dict[str, Any]]:
    """Return the next events of a stream."""
    return [json.loads((await anext(events)).data) for _ in range(count)]


# Catch-up


async def test_reading_from_the_start_returns_all_events_in_order(reader: Reader) -> None:
    """A reader without a cursor begins at the first event."""
    job_id, events = job()
    await reader.append(*events)

    await reader.expect(events, job_id)


@pytest.mark.parametrize("is_ended", [False, True], ids=["running", "ended"])
async def test_reading_from_each_cursor_returns_exactly_the_rest(reader: Reader, is_ended: bool) -> None:
    """No cursor repeats an event or skips one."""
    job_id, events = job(is_ended=is_ended)
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        cursors = [(await anext(stream)).id for _ in events]

    assert len(set(cursors)) == len(events)
    for had, cursor in enumerate(cursors[:-1], 1):
        await reader.expect(events[had:], job_id, cursor)


async def test_reading_the_same_cursor_again_returns_the_same_also_after_new_events(reader: Reader) -> None:
    """What is at a cursor never changes; new events come behind it."""
    job_id, events = job()
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        cursor = (await anext(stream)).id
    for _ in range(2):
        await reader.expect(events[1:], job_id, cursor)
    await reader.append(delta(job_id, 6, "more"))

    await reader.expect([*events[1:], delta(job_id, 6, "more")], job_id, cursor)


async def test_reading_a_job_without_events_is_up_to_date_and_not_ended(reader: Reader) -> None:
    """An empty stream is not a missing one: a fresh id is waited for."""
    events, cursor, ended = await reader.read(new_job_id())

    assert (events, ended) == ([], False)
    assert re.fullmatch(r"\d+\.\d+\.w", cursor)


async def test_reading_a_job_without_events_returns_a_cursor_behind_what_was_searched(reader: Reader) -> None:
    """A client that polls has nothing searched twice, and misses nothing."""
    job_id, events = job(2, is_ended=True)
    other, others = next(
        (other, others) for other, others in iter(lambda: job(5), None) if home(other) == home(job_id)
    )
    await reader.append(*others)
    await reader.expect(others, other)
    _, before, _ = await reader.read(other)
    _, cursor, _ = await reader.read(job_id)
    assert cursor.endswith(".w")
    assert int(cursor.split(".")[1]) == int(before.split(".")[1]) + 1
    await reader.append(*events)
    behind, ended = await reader.expect(events, job_id, cursor)

    assert ended
    assert behind.endswith(".end")


async def test_reading_at_the_tail_returns_nothing_and_a_cursor_that_continues(reader: Reader) -> None:
    """ "Up to date" is not "ended"; the tail's cursor has the events that come later."""
    job_id, events = job()
    await reader.append(*events)
    tail, _ = await reader.expect(events, job_id)
    rest, same, ended = await reader.read(job_id, tail)
    await reader.append(delta(job_id, 6, "later"))

    assert (rest, same, ended) == ([], tail, False)
    await reader.expect([delta(job_id, 6, "later")], job_id, tail)


async def test_reading_continues_from_the_cursor_of_an_empty_stream(reader: Reader) -> None:
    """The place of a job without events finds its first event."""
    job_id, events = job()
    _, place, _ = await reader.read(job_id)
    await reader.append(*events)

    await reader.expect(events, job_id, place)


async def test_reading_from_now_skips_what_is_there_and_returns_what_comes(reader: Reader) -> None:
    """`replay=none` begins at the tail; its cursor continues."""
    job_id, events = job()
    await reader.append(*events)
    await reader.expect(events, job_id)
    none, now, ended = await reader.read(job_id, replay="none")
    await reader.append(delta(job_id, 6, "later"))

    assert (none, ended) == ([], False)
    await reader.expect([delta(job_id, 6, "later")], job_id, now)


async def test_events_are_readable_as_soon_as_they_are_acknowledged(reader: Reader) -> None:
    """A writer that reads back finds each of its events, in the next reads if not in the first."""
    job_id, events = job(10)
    for count, event in enumerate(events, 1):
        await reader.append(event)
        await reader.expect(events[:count], job_id)


async def test_cursors_of_one_job_increase_with_the_log(reader: Reader) -> None:
    """Each cursor names a later offset than the one before, in live mode as in catch-up."""
    job_id, events = job(20)
    await reader.append(*events[:10])
    async with reader.follow(job_id) as stream:
        cursors = [(await anext(stream)).id for _ in range(10)]
        await reader.append(*events[10:])
        cursors += [(await anext(stream)).id for _ in range(11)]

    offsets = [int(cursor.split(".")[1]) for cursor in cursors]
    assert offsets == sorted(set(offsets))


@pytest.mark.parametrize("accept", FORMATS)
async def test_every_format_carries_the_same_events(reader: Reader, accept: str) -> None:
    """The three formats differ in their framing alone."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    await reader.expect(events, job_id)
    answer = await reader.get(job_id, accept=accept)

    assert answer.headers["Content-Type"].split(";")[0] == accept
    if accept == SSE:
        found = [json.loads(data) for data in re.findall(r"^data: (.*)$", answer.text, re.MULTILINE)]
    elif accept == NDJSON:
        found = [json.loads(line)["event"] for line in answer.text.splitlines() if line]
    else:
        found = answer.json()["events"]
    assert found == events


async def test_a_long_stream_is_read_in_pages_that_join(reader: Reader) -> None:
    """An answer with everything there is, or pages of it, have the same events."""
    job_id, events = job(600, is_ended=True)
    sent = [
        await reader.stage._producer.send(
            reader.stage.events_topic, json.dumps(event).encode(), key=job_id.encode()
        )
        for event in events
    ]
    await asyncio.gather(*sent)
    _, ended = await reader.expect(events, job_id)

    assert ended


@pytest.mark.parametrize("size", [1 << 10, 1 << 16, 900_000], ids=["1 KiB", "64 KiB", "900 kB"])
async def test_large_events_arrive_whole(reader: Reader, size: int) -> None:
    """An event that is larger than every buffer on the way is not cut."""
    job_id = new_job_id()
    events = [started(job_id), delta(job_id, 1, "x" * size), usage(job_id, 2)]
    await reader.stage._producer.send_and_wait(
        reader.stage.events_topic, json.dumps(events[0]).encode(), key=job_id.encode()
    )
    await reader.append(*events[1:])
    async with reader.follow(job_id) as stream:
        assert await taken(stream, 3) == events


# Live


async def test_a_live_reader_receives_what_is_appended_and_the_end_closes_the_stream(reader: Reader) -> None:
    """Catch-up and live are one stream without a gap; behind the ending the response ends."""
    job_id, events = job(is_ended=True)
    await reader.append(*events[:3])
    async with reader.follow(job_id) as stream:
        assert await taken(stream, 3) == events[:3]
        for event in events[3:]:
            await reader.append(event)
            assert await taken(stream, 1) == [event]
        assert [event async for event in stream] == []


async def test_a_live_reader_waits_for_a_job_without_events(reader: Reader) -> None:
    """A stream may be opened before its first event."""
    job_id, events = job(1)
    async with reader.follow(job_id) as stream:
        waiting = asyncio.ensure_future(anext(stream))
        await reader.append(*events)
        assert json.loads((await waiting).data) == events[0]


async def test_concurrent_readers_receive_the_same_while_the_writer_writes(reader: Reader) -> None:
    """Readers that begin at different times, some from a cursor, end with the same text."""
    job_id, events = job(40, is_ended=True)

    async def read() -> list[dict[str, Any]]:
        async with reader.follow(job_id) as stream:
            return [json.loads(event.data) async for event in stream]

    await reader.append(events[0])
    readers: list[asyncio.Task[list[dict[str, Any]]]] = []
    for event in events[1:]:
        if len(readers) < 8:
            readers.append(asyncio.ensure_future(read()))
        await reader.append(event)

    assert await asyncio.gather(*readers) == [events] * 8


async def test_a_reader_that_is_cut_and_resumes_misses_and_repeats_nothing_while_events_come(
    reader: Reader,
) -> None:
    """Reconnecting behind the last event joins the parts exactly, however often."""
    job_id, events = job(30, is_ended=True)
    received: list[dict[str, Any]] = []

    async def write() -> None:
        for event in events:
            await reader.append(event)

    writing = asyncio.ensure_future(write())
    last: str | None = None
    while len(received) < len(events):
        async with reader.follow(job_id, last) as stream:
            for _ in range(min(3, len(events) - len(received))):
                event = await anext(stream)
                last = event.id
                received.append(json.loads(event.data))
    await writing

    assert received == events


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(text) for text in HOSTILE])
async def test_text_that_looks_like_the_protocol_stays_text(reader: Reader, text: str) -> None:
    """Line ends, event boundaries and control characters in a payload are data in every format."""
    job_id = new_job_id()
    events = [started(job_id), delta(job_id, 1, text), usage(job_id, 2)]
    for event in events:  # raw, as a writer may send them
        value = json.dumps(event, ensure_ascii=False).encode()
        await reader.stage._producer.send_and_wait(reader.stage.events_topic, value, key=job_id.encode())
    async with reader.follow(job_id) as stream:
        assert [(event.event, json.loads(event.data)) async for event in stream] == [
            (event["type"], event) for event in events
        ]
    lines = (await reader.get(job_id, accept=NDJSON)).content.split(b"\n")
    assert [json.loads(line)["event"] for line in lines if line] == events


# The end


async def test_the_cursor_behind_the_ending_says_so_and_reading_there_is_204(reader: Reader) -> None:
    """The end is explicit, in the cursor, the JSON answer and the status; a partial read has no sign of it."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        cursors = [(await anext(stream)).id for _ in events]

    assert [cursor.endswith(".end") for cursor in cursors] == [False] * (len(events) - 1) + [True]
    for accept in FORMATS:
        answer = await reader.get(job_id, cursors[-1], accept)
        assert (answer.status_code, answer.content) == (204, b"")
    assert (await reader.expect(events[-1:], job_id, cursors[-2]))[1]


async def test_from_now_at_the_end_of_an_ended_job_returns_its_ending(reader: Reader) -> None:
    """`replay=none` of an ended job has the terminal event, so that no reader waits for one that never comes."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)

    await reader.expect(events, job_id)
    assert (await reader.read(job_id, replay="none"))[::2] == (events[-1:], True)


async def test_events_behind_the_ending_do_not_exist(reader: Reader) -> None:
    """A closed stream takes nothing more: what a late writer appends is not delivered."""
    job_id, events = job(is_ended=True)
    await reader.append(*events, delta(job_id, 7, "late"))

    assert (await reader.expect(events, job_id))[1]
    assert (await reader.read(job_id))[0] == events


# Attempts: the one thing that a job has and a durable stream has not


async def test_a_new_attempt_voids_the_former_for_catch_up_and_is_an_event_for_live_readers(
    reader: Reader,
) -> None:
    """A reader who forgets at each `started` ends with the valid attempt; stale deltas come to no reader."""
    job_id, events = job(2)
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        assert await taken(stream, 3) == events
        new = [started(job_id, "a2"), delta(job_id, 1, "new", "a2")]
        await reader.append(new[0], delta(job_id, 3, "stale"), new[1])
        assert await taken(stream, 2) == new

    async with asyncio.timeout(5):
        while _valid((await reader.read(job_id))[0]) != new:
            pass


def _valid(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the events from the last `started`: the rule for readers."""
    starts = [at for at, event in enumerate(events) if event["type"] == "started"]
    return events[starts[-1] :] if starts else events


async def test_a_snapshot_has_the_text_so_far_and_its_cursor_continues(reader: Reader) -> None:
    """One event in place of many; then only what is new."""
    job_id, events = job(3)
    await reader.append(*events)
    await reader.expect(events, job_id)
    async with reader.follow(job_id, replay="snapshot") as stream:
        first = await anext(stream)
        await reader.append(delta(job_id, 4, "word 4"))
        rest = await taken(stream, 1)
    value = json.loads(first.data)

    assert (first.event, value["seq"], value["attempt"]) == ("snapshot", 3, "a1")
    assert value["choices"][0]["message"]["content"] == "word 1 word 2 word 3 "
    assert rest == [delta(job_id, 4, "word 4")]
    await reader.expect([delta(job_id, 4, "word 4")], job_id, first.id)


# Validation and headers


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "0",
        "1,2",
        "0.1 2.3.aa",
        "a.b.c.d",
        "0.0.0.0.0.0",
        "-1.0.w",
        "0.0.w.end",
        "../../etc",
        "0.1.2.ZZZZZZZZ",
        "9" * 400,
    ],
)
@pytest.mark.parametrize("accept", [SSE, JSON])
async def test_a_malformed_cursor_is_refused(reader: Reader, cursor: str, accept: str) -> None:
    """A cursor that the gateway never made is 400, for EventSource too; an empty one is none."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    answer = await reader.get(job_id, cursor, accept)

    assert answer.status_code == (400 if cursor else 200)
    if cursor:
        assert answer.json()["error"]["code"] == "invalid_cursor"


async def test_two_cursors_are_refused(reader: Reader) -> None:
    """One of them would be ignored."""
    answer = await reader.http.get(
        f"{_path(new_job_id())}?cursor=0.0.w&cursor=0.1.w", headers={"Accept": JSON}
    )

    assert answer.status_code == 400


async def test_the_header_names_where_reading_began(reader: Reader) -> None:
    """`start`, or the cursor that was honoured: a client sees whether it was."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        cursor = (await anext(stream)).id

    assert (await reader.get(job_id)).headers["Streamworker-Resumed-From"] == "start"
    assert (await reader.get(job_id, cursor)).headers["Streamworker-Resumed-From"] == cursor


async def test_the_header_of_a_reconnect_precedes_the_address(reader: Reader) -> None:
    """EventSource keeps the address, and sends what it had last."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        first, second = (await anext(stream)).id, (await anext(stream)).id
    answer = await reader.http.get(
        _path(job_id), params={"cursor": first}, headers={"Accept": JSON, "Last-Event-ID": second}
    )

    assert answer.json()["events"] == events[2:]


@pytest.mark.parametrize("accept", FORMATS)
@pytest.mark.parametrize("cursor", [None, "no cursor"], ids=["found", "refused"])
async def test_answers_carry_the_headers_that_protect_browsers(
    reader: Reader, accept: str, cursor: str | None
) -> None:
    """No sniffing, no referrer, no storing; errors included."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    answer = await reader.get(job_id, cursor, accept)

    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert "no-store" in answer.headers["Cache-Control"]
    assert "Content-Encoding" not in answer.headers


async def test_an_event_stream_has_no_length_and_asks_proxies_not_to_buffer(reader: Reader) -> None:
    """A length would promise an end, and a transformation would wait for one."""
    job_id, events = job(is_ended=True)
    await reader.append(*events)
    answer = await reader.get(job_id, accept=SSE)

    assert "Content-Length" not in answer.headers
    assert answer.headers["X-Accel-Buffering"] == "no"
    assert answer.headers["Cache-Control"] == "no-store, no-transform"


# Retention: the last test of the file, for it deletes all events


async def test_what_retention_deleted_is_gone_and_says_so_in_every_format(reader: Reader) -> None:
    """A missing stream is 404 and names how far back was looked; a cursor into what was deleted is 410."""
    job_id, events = job()
    await reader.append(*events)
    async with reader.follow(job_id) as stream:
        cursor = (await anext(stream)).id
    await reader.append(*(started(new_job_id()) for _ in range(20)))  # so that no partition is empty
    await reader.delete_all_events()

    async with (
        Gateway(reader.stage) as other,
        httpx.AsyncClient(base_url=other.url) as http,
    ):  # has nothing in memory
        fresh = replace(reader, http=http)
        answers = [
            (
                await fresh.get("0190a000-0000-7000-8000-000000000000", accept=accept),
                await fresh.get(job_id, cursor, accept),
            )
            for accept in FORMATS
        ]
    for old, lost in answers:
        assert (old.status_code, old.json()["error"]["code"]) == (404, "job_not_found")
        assert old.json()["error"]["searched_from"].endswith("Z")
        assert (lost.status_code, lost.json()["error"]["code"]) == (410, "cursor_lost")
