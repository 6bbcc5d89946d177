"""The client library when brokers, workers and clients die, and when a consumer of events is slow; on Apache Kafka."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from streamworker.client import Client, Delta, Ended, Lagged, Restarted, Started
from tests.integration.events import delta, ended, home, said, started
from tests.integration.stage import eventually
from tests.integration.test_brokers import producer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from streamworker.client import Event
    from tests.integration.stage import Stage

DIES_IN_ITS_TRANSACTION = """
import asyncio, os, signal
from aiokafka import AIOKafkaProducer
from pathlib import Path
send, mark = AIOKafkaProducer.send, Path(os.environ["DIED"])
async def send_and_die(self, topic, value=None, **rest):
    future = await send(self, topic, value, **rest)
    if b'"type":"usage"' in (value or b"") and not mark.exists():
        await future
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return future
AIOKafkaProducer.send = send_and_die
"""

FOLLOWS = """
import asyncio, sys
from datetime import timedelta
from streamworker.client import Client
async def main(job_id):
    async with Client.from_settings() as client:
        async for event in client.job(job_id, since=timedelta(minutes=5)).events():
            print(event.json(), flush=True)
asyncio.run(main(sys.argv[1]))
"""


async def gathered(events: AsyncIterator[Event]) -> list[Event]:
    """Take every event."""
    return [event async for event in events]


async def test_client_survives_a_broker_restart_within_a_job(apache: Stage, apache_kafka: Any) -> None:
    """Every event comes once, in order."""
    await apache.open()
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=100&pace_ms=50", messages=said("Hi"))
        reading = asyncio.create_task(gathered(job.events()))
        await asyncio.sleep(1)  # some deltas
        await asyncio.to_thread(apache_kafka.restart)
        events = await asyncio.wait_for(reading, 60)

    assert [event.seq for event in events] == list(range(len(events)))
    assert isinstance(events[-1], Ended)
    assert events[-1].status == "completed"


async def test_client_of_a_worker_killed_in_its_transaction_gets_the_next_attempt_and_one_end(
    apache: Stage, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The terminal event that was rolled back is not shown; the restart is."""
    await apache.open()
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    apache.bug = DIES_IN_ITS_TRANSACTION
    as_one = {"worker__group_instance_id": "one"}  # the next one does not wait for the end of the session
    await apache.process(**as_one)
    async with Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=3", messages=said("Hi"))
        reading = asyncio.create_task(gathered(job.events()))
        await eventually((tmp_path / "died").exists)
        await apache.process(**as_one)
        events = await asyncio.wait_for(reading, 60)

    kinds = [type(event) for event in events]
    assert (kinds.count(Started), kinds.count(Restarted), kinds.count(Ended)) == (1, 1, 1)
    restart = kinds.index(Restarted)
    assert [event.seq for event in events[restart:]] == list(range(len(events) - restart))
    assert events[-1].attempt == events[restart].attempt


async def test_client_gets_deltas_while_another_transaction_is_open(
    apache: Stage, topics: Callable[[str], str]
) -> None:
    """Only the terminal event waits for it."""
    await apache.open()
    job_id = "j"
    async with (
        producer(apache.broker, transactional_id=topics("tx")) as stranger,
        apache.worker(),
        Client(apache.settings()) as client,
    ):
        await stranger.begin_transaction()
        for partition in range(2):
            await stranger.send_and_wait(apache.events_topic, b"{}", key=b"stranger", partition=partition)
        job = await client.submit(model="practice?deltas=5", messages=said("Hi"), job_id=job_id)
        stream = job.events()
        texts: list[str] = []
        async with asyncio.timeout(10):
            while len(texts) < 5:
                event = await anext(stream)
                if isinstance(event, Delta) and event.text:
                    texts.append(event.text)
        rest = asyncio.create_task(gathered(stream))
        assert not (await asyncio.wait([rest], timeout=1))[0]
        await stranger.abort_transaction()
        last = (await asyncio.wait_for(rest, 10))[-1]

    assert isinstance(last, Ended)


@pytest.mark.long
async def test_client_that_is_killed_and_restarted_misses_and_repeats_nothing(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second process gets the job's events from its beginning, and goes on live."""
    await apache.open()
    for name, value in apache._environment({}).items():
        monkeypatch.setenv(name, value)
    async with apache.worker(), Client(apache.settings()) as client:
        job = await client.submit(model="practice?deltas=60&pace_ms=50", messages=said("Hi"), job_id="own-id")
        lines: list[bytes] = []
        for is_killed in (True, False):
            follower = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", FOLLOWS, job.id),
                stdout=asyncio.subprocess.PIPE,
                env=os.environ.copy(),
            )
            assert follower.stdout is not None
            if is_killed:
                for _ in range(6):
                    await follower.stdout.readline()
                follower.kill()
            else:
                lines = [line async for line in follower.stdout]
            await follower.wait()
        await apache.ended(job.id)

    assert [json.loads(line) for line in lines] == apache.all_events(job.id)


async def test_client_iterator_that_is_slow_is_dropped_and_delays_no_other(apache: Stage) -> None:
    """A new iterator reads everything from the log."""
    await apache.open()
    async with (
        Client(apache.settings()) as client,
        producer(apache.broker, max_request_size=4 << 20) as writer,
    ):

        async def write(job_id: str, value: bytes) -> None:
            await writer.send_and_wait(
                apache.events_topic, value, key=job_id.encode(), partition=home(job_id)
            )

        slow = client.job("slow", since=timedelta(minutes=1))
        iterator = slow.events()
        await write("slow", started("slow"))
        assert isinstance(await anext(iterator), Started)
        quick = asyncio.create_task(gathered(client.job("quick", since=timedelta(minutes=1)).events()))
        for seq in range(1, 21):
            await write("slow", delta("slow", seq, "x" * 500_000))
        await write("quick", started("quick"))
        await write("quick", ended("quick", 1))
        assert len(await asyncio.wait_for(quick, 10)) == 2
        await asyncio.sleep(0.5)  # the last deltas may be in another partition than the quick job's events
        with pytest.raises(Lagged):
            await anext(iterator)
        await write("slow", ended("slow", 21))
        again = await asyncio.wait_for(gathered(slow.events()), 20)

    assert [event.seq for event in again] == list(range(22))


async def test_client_job_that_is_not_iterated_keeps_a_bounded_queue(apache: Stage) -> None:
    """Its events are read from the log when they are wanted."""
    await apache.open()
    async with (
        Client(apache.settings()) as client,
        producer(apache.broker, max_request_size=4 << 20) as writer,
    ):
        job = await client.submit(model="m", messages=said("Hi"), job_id="j")
        values = [started("j"), *(delta("j", seq, "x" * 100_000) for seq in range(1, 11)), ended("j", 11)]
        for value in values:
            await writer.send_and_wait(apache.events_topic, value, key=b"j", partition=home("j"))
        await eventually(lambda: job._subscription is not None and job._subscription.is_dropped)
        events = await gathered(job.events())
        result = await client.job("j", since=timedelta(minutes=1)).result(timeout=10)

    assert [event.seq for event in events] == list(range(12))
    assert len(result.text) == 1_000_000


async def test_client_forgets_a_job_that_the_program_has_dropped(apache: Stage) -> None:
    """A program that submits and never reads needs no memory per job."""
    await apache.open()
    async with Client(apache.settings()) as client:
        for number in range(5):
            await client.submit(model="m", messages=said("Hi"), job_id=f"j{number}")
        kept = await client.submit(model="m", messages=said("Hi"), job_id="kept")
        subscriptions = client._events[apache.events_topic]
        await eventually(lambda: list(subscriptions._by_key) == [kept.id.encode()])
