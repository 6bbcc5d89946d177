"""The client library against Apache Kafka, the worker and the practice upstream."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.client import Client, Delta, Ended, InvalidJob, JobFailed, Started
from streamworker.errors import KafkaRefused
from tests.integration.events import delta, ended, home, said, started
from tests.integration.test_brokers import producer

if TYPE_CHECKING:
    from collections.abc import Callable

    from streamworker.client import Job
    from tests.integration.stage import Stage


async def test_client_gets_every_event_of_its_job_in_order(apache: Stage) -> None:
    """From `started` to the terminal event, and the result that they make."""
    await apache.open()
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=5", messages=said("Hi"), metadata={"page": "home"})
        events = [event async for event in job.events()]
        result = await job.result(timeout=10)

    assert [type(event) for event in events] == [Started, *[Delta] * (len(events) - 2), Ended]
    assert [event.seq for event in events] == list(range(len(events)))
    text = "".join(event.text for event in events if isinstance(event, Delta))
    assert (result.status, result.text, result.metadata) == ("completed", text, {"page": "home"})
    assert text


async def test_client_job_that_fails_has_a_result_too(apache: Stage) -> None:
    """`result` raises nothing; `raise_for_status` does."""
    await apache.open()
    async with apache.worker(), Client(apache.settings()) as client:
        result = await client.complete(model="practice?status=400", messages=said("Hi"), timeout=20)

    assert (result.status, result.completion, result.text, result.tool_calls) == ("failed", None, "", [])
    with pytest.raises(JobFailed, match="upstream_rejected"):
        result.raise_for_status()


async def test_client_refuses_a_job_that_every_worker_would_reject(apache: Stage) -> None:
    """Before anything is written."""
    await apache.open()
    async with Client(apache.settings()) as client:
        with pytest.raises(InvalidJob, match="messages: is required"):
            await client.submit(model="practice")
        with pytest.raises(TimeoutError):
            await client.job("unknown").result(timeout=0.2)


async def test_client_cancel_ends_the_job(apache: Stage) -> None:
    """The terminal event has the reason."""
    await apache.open()
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=9999&pace_ms=20", messages=said("go on"))
        async for event in job.events():
            if isinstance(event, Delta) and event.seq == 3:
                await job.cancel("enough")
            last = event

    assert isinstance(last, Ended)
    assert (last.status, (last.error or {})["message"]) == ("cancelled", "enough")


async def test_client_map_yields_results_as_jobs_end_and_takes_requests_lazily(apache: Stage) -> None:
    """At most `window` requests are taken before one has ended."""
    await apache.open()
    taken: list[int] = []
    seen: list[tuple[int, str]] = []

    def requests() -> Any:
        for number in range(30):
            taken.append(number)
            yield {"model": f"practice?deltas={1 + number % 3}", "messages": said(str(number))}

    async with apache.worker(), Client(apache.settings()) as client:
        async for result in client.map(requests(), window=7, metadata={"run": "r"}):
            seen.append((len(taken) - len(seen), result.status))

    assert [status for _, status in seen] == ["completed"] * 30
    assert max(ahead for ahead, _ in seen) <= 8


async def test_client_job_of_another_client_is_found_by_its_id(apache: Stage) -> None:
    """While it runs, and after it has ended; each event once."""
    await apache.open()
    async with (
        apache.worker(),
        Client(apache.settings()) as submitter,
        Client(apache.settings()) as other,
    ):
        job = await submitter.submit(model="practice?deltas=20&pace_ms=20", messages=said("Hi"))
        stream = job.events()
        for _ in range(5):
            await anext(stream)
        live = [event.seq async for event in other.job(job.id).events()]
        afterwards = [event.seq async for event in other.job(job.id).events()]
        own = [event.seq async for event in job.events()]
        result = await other.job(job.id).result(timeout=10)

    assert live == afterwards == own == list(range(len(live)))
    assert result.status == "completed"


async def test_client_follows_a_job_whose_events_go_to_another_topic(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """The readers of `reply_to` are started when they are needed."""
    reply_to = topics("reply")
    await apache.open(reply_topics=[reply_to])
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=2", messages=said("Hi"), reply_to=reply_to)
        assert (await job.result(timeout=20)).status == "completed"
        assert (await client.job(job.id, reply_to=reply_to).result(timeout=20)).status == "completed"
        assert set(client._events) == {apache.events_topic, reply_to}


async def test_client_with_a_results_topic_reads_results_and_no_events(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """Until `events` is called; then they are read from the job's beginning."""
    await apache.open(results_topic=topics("results"))
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=2", messages=said("Hi"))
        await apache.ended(job.id)
        own = await job.result(timeout=10)
        found = await client.job(job.id).result(timeout=10)
        assert client._events == {}
        events = [event async for event in job.events()]

    assert own == found
    assert own.text == "".join(event.text for event in events if isinstance(event, Delta))
    assert own.raw["type"] == "result"
    assert [event.raw for event in events] == apache.events(job.id)


async def test_client_lazy_reads_nothing_until_events_are_wanted(apache: Stage) -> None:
    """A program that only submits or cancels needs no right to read."""
    await apache.open()
    async with apache.worker(), Client(apache.settings(), is_lazy=True) as client:
        assert client._sinks == {}
        job = await client.submit(model="practice?deltas=3", messages=said("Hi"))
        await client.job("another").cancel()
        assert set(client._sinks) == {apache.jobs_topic, apache.control_topic}
        assert client._events == {}
        await apache.ended(job.id)
        events = [event async for event in job.events()]

    assert [event.raw for event in events] == apache.events(job.id)


async def test_client_outside_of_its_block_says_how_to_open_it(apache: Stage) -> None:
    """Before and after."""
    await apache.open()
    client = Client(apache.settings())
    with pytest.raises(RuntimeError, match="async with client"):
        await client.submit(model="m", messages=said("Hi"))
    async with client:
        pass
    with pytest.raises(RuntimeError, match="async with client"):
        await client.job("j").cancel()


async def test_client_that_cannot_start_leaves_nothing_open(apache: Stage) -> None:
    """An events topic that does not exist is reported when the client is opened."""
    await apache.open()
    client = Client(apache.settings(topics__events="never-created"))
    with pytest.raises(KafkaRefused, match="topics create"):
        await client.__aenter__()
    assert client._stack is None


async def test_client_thousand_iterators_in_one_process_get_every_event_in_order(apache: Stage) -> None:
    """They share one pair of readers."""
    await apache.open(events_partitions=4)
    names = [f"j{number}" for number in range(1000)]
    async with Client(apache.settings()) as client, producer(apache.broker, linger_ms=5) as writer:
        jobs = await asyncio.gather(
            *(client.submit(model="m", messages=said("Hi"), job_id=name) for name in names)
        )
        reading = [asyncio.create_task(seqs(job)) for job in jobs]
        for seq in range(12):
            kind = started if seq == 0 else ended if seq == 11 else delta
            sent = [
                await writer.send(
                    apache.events_topic, kind(name, seq), key=name.encode(), partition=home(name, 4)
                )
                for name in names
            ]
            await asyncio.gather(*sent)
        async with asyncio.timeout(60):
            found = await asyncio.gather(*reading)

    assert found == [list(range(12))] * 1000


async def seqs(job: Job) -> list[int]:
    """Return the numbers of a job's events."""
    return [event.seq async for event in job.events()]
