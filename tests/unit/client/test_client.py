"""`Client`, `Job` and `BlockingClient` on a cluster in memory: what they write, what they return, what they leave open."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka.errors import KafkaConnectionError
from structlog.testing import capture_logs

from streamworker.client import (
    Client,
    Delta,
    Ended,
    InvalidJob,
    JobFailed,
    Restarted,
    Started,
    SubmitUnknown,
    connect,
)
from streamworker.client import client as module
from streamworker.config import KafkaSettings, TopicSettings
from streamworker.errors import KafkaRefused, KafkaUnavailable
from tests.memory_kafka import MARKER, MemoryKafka, MemoryProducer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.client import Job

JOBS, EVENTS, CONTROL, RESULTS = "streamworker.jobs", "streamworker.events", "streamworker.control", "results"
REQUEST: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


class Worker:
    """Answers jobs in events, and in results if the cluster has the topic; at once if `is_prompt`."""

    def __init__(self, kafka: MemoryKafka) -> None:
        self.kafka = kafka
        self.is_prompt = False
        kafka.on_write = self._on_write

    def _on_write(self, record: Any) -> None:
        if self.is_prompt and record.topic == JOBS:
            self.answer(json.loads(record.value)["job_id"], "Hi")

    def write(self, kind: str, seq: int, job_id: str, *, attempt: str = "a", **members: Any) -> None:
        """Write one event."""
        event = {"v": 1, "job_id": job_id, "attempt": attempt, "seq": seq, "type": kind, "ts": 1, **members}
        value = json.dumps(event).encode()
        self.kafka.write(EVENTS, value, key=job_id.encode(), timestamp=time.time_ns() // 1_000_000)

    def start(self, job_id: str, *, attempt: str = "a", cause: str = "new") -> None:
        """Begin an attempt."""
        self.write("started", 0, job_id, attempt=attempt, model="m", upstream="u", cause=cause, metadata={})

    def delta(self, seq: int, job_id: str, text: str, *, attempt: str = "a") -> None:
        """Write a part of the answer."""
        delta = {"content": text}
        self.write("delta", seq, job_id, attempt=attempt, choice=0, delta=delta, finish_reason=None)

    def end(self, seq: int, job_id: str, status: str = "completed", *, attempt: str = "a") -> None:
        """End the job, in both topics."""
        error = None if status == "completed" else {"code": "auth", "message": "wrong key"}
        rest: dict[str, Any] = {
            "status": status,
            "usage": None,
            "usage_source": "none",
            "error": error,
            "metadata": {},
        }
        self.write("usage", seq, job_id, attempt=attempt, **rest)
        if RESULTS in self.kafka.topics:
            self.result(job_id, **rest)

    def result(self, job_id: str, **members: Any) -> None:
        """Write the result."""
        result = {"v": 1, "job_id": job_id, "attempt": "a", "seq": 9, "type": "result", "ts": 1, **members}
        message = {"choices": [{"message": {"content": "from the results topic"}}]}
        value = json.dumps({**result, "completion": message}).encode()
        self.kafka.write(RESULTS, value, key=job_id.encode(), timestamp=time.time_ns() // 1_000_000)

    def answer(self, job_id: str, *texts: str, status: str = "completed") -> None:
        """Write the whole job."""
        self.start(job_id)
        for seq, text in enumerate(texts, 1):
            self.delta(seq, job_id, text)
        self.end(len(texts) + 1, job_id, status)


@pytest.fixture
def kafka(monkeypatch: pytest.MonkeyPatch) -> MemoryKafka:
    """A cluster with the default topics."""
    kafka = MemoryKafka(streamworker_jobs=2, streamworker_events=2, streamworker_control=1)
    kafka.install(monkeypatch)
    return kafka


@pytest.fixture
def worker(kafka: MemoryKafka) -> Worker:
    """A worker that the test controls."""
    return Worker(kafka)


@pytest.fixture
async def client(kafka: MemoryKafka) -> AsyncIterator[Client]:
    """A client, which has closed every connection afterwards."""
    async with Client() as client:
        yield client
    assert all(consumer.is_stopped for consumer in kafka.consumers)
    assert all(producer.is_closed for producer in kafka.producers)


async def events_of(job: Job) -> list[str]:
    """Take a job's events to the end; return texts, and the names of the other events."""
    async with asyncio.timeout(10):
        return [
            event.text if isinstance(event, Delta) else type(event).__name__ async for event in job.events()
        ]


# Submitting


async def test_submit_returns_when_the_broker_has_the_job(kafka: MemoryKafka, client: Client) -> None:
    """Its key is the id, or the given one; the members are those of the job record."""
    first = await client.submit(**REQUEST, temperature=0, metadata={"a": "b"})
    second = await client.submit(request=REQUEST, key="conversation", job_id="mine", deltas="merged")
    records = {record.key: json.loads(record.value) for record in kafka.records(JOBS)}

    assert second.id == "mine"
    assert records == {
        first.id.encode(): {
            "job_id": first.id,
            "request": REQUEST | {"temperature": 0},
            "metadata": {"a": "b"},
        },
        b"conversation": {"job_id": "mine", "request": REQUEST, "deltas": "merged"},
    }


async def test_submit_writes_to_a_configured_job_topic_only(kafka: MemoryKafka) -> None:
    """No worker reads another one: the job would never end."""
    kafka.create("batch")
    async with Client(topics=TopicSettings(jobs=(JOBS, "batch"))) as client:
        await client.submit(**REQUEST, job_id="j", topic="batch")
        with pytest.raises(
            InvalidJob, match=r"topic elsewhere is not one of topics\.jobs: streamworker\.jobs, batch"
        ):
            await client.submit(**REQUEST, topic="elsewhere")

    assert (len(kafka.records(JOBS)), len(kafka.records("batch"))) == (0, 1)


async def test_job_that_is_not_valid_is_not_written(kafka: MemoryKafka, client: Client) -> None:
    """As every worker would reject it."""
    with pytest.raises(InvalidJob, match="on_break"):
        await client.submit(**REQUEST, on_break="stop")

    assert kafka.records(JOBS) == []


async def test_submit_without_an_acknowledgement_is_unknown(
    kafka: MemoryKafka, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the request timeout; the error has the id, under which the job can be submitted again."""
    async with Client(kafka=KafkaSettings(request_timeout_s=1)) as client:
        with monkeypatch.context() as patch:

            async def hang(*_: Any, **__: Any) -> None:
                await asyncio.get_running_loop().create_future()

            patch.setattr(MemoryProducer, "send_batch", hang)
            monkeypatch.setattr("streamworker.kafka.sink.STOP_TIMEOUT_S", 0.05)
            with pytest.raises(SubmitUnknown, match="did not acknowledge job mine within 1 s") as unknown:
                await client.submit(**REQUEST, job_id="mine")

    assert unknown.value.job_id == "mine"
    assert isinstance(unknown.value, KafkaUnavailable)


# Events


async def test_events_of_a_job_begin_with_its_start(client: Client, worker: Worker) -> None:
    """Those of other jobs are left out; the iterator ends with the terminal event."""
    job = await client.submit(**REQUEST)
    worker.answer("another", "noise")
    worker.answer(job.id, "Hel", "lo")
    assert not job.has_ended

    assert await events_of(job) == ["Started", "Hel", "lo", "Ended"]
    assert job.has_ended


async def test_every_iterator_gets_all_events(client: Client, worker: Worker) -> None:
    """The first one has them from memory, a later one from the log."""
    job = await client.submit(**REQUEST)
    first = asyncio.create_task(events_of(job))
    await asyncio.sleep(0)
    worker.answer(job.id, "Hi")

    assert await first == await events_of(job) == ["Started", "Hi", "Ended"]


async def test_events_that_are_not_read_do_not_fill_the_memory(
    client: Client, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above the limit they are dropped, and read from the log when they are wanted."""
    monkeypatch.setattr(module, "UNREAD_BYTES", 500)
    job = await client.submit(**REQUEST)
    worker.answer(job.id, *("x" * 100 for _ in range(10)))
    subscription = job._subscription
    assert subscription is not None
    async with asyncio.timeout(10):
        while not subscription.is_dropped:  # noqa: ASYNC110 - the tail has no event for it
            await asyncio.sleep(0.001)

    assert await events_of(job) == ["Started", *["x" * 100] * 10, "Ended"]


async def test_new_attempt_voids_the_events_before_it(client: Client, worker: Worker) -> None:
    """The iterator says so by its class; late events of the former attempt are left out."""
    job = await client.submit(**REQUEST)
    worker.start(job.id)
    worker.delta(1, job.id, "void")
    worker.start(job.id, attempt="b", cause="redelivered")
    worker.delta(2, job.id, "late")
    worker.end(1, job.id, attempt="b")
    events = [event async for event in job.events()]

    assert [type(event) for event in events] == [Started, Delta, Restarted, Ended]


async def test_job_is_found_by_its_id_from_another_client(kafka: MemoryKafka, worker: Worker) -> None:
    """As after a restart of the program: a UUID 7 has its time, another id is looked for as long as is said."""
    async with Client() as submitter:
        named = await submitter.submit(**REQUEST)
        own = await submitter.submit(**REQUEST, job_id="own")
        worker.answer(named.id, "a")
        worker.answer("own", "b")
    async with Client() as client:
        assert await events_of(client.job(named.id)) == ["Started", "a", "Ended"]
        assert await events_of(client.job(own.id, since=timedelta(minutes=5))) == ["Started", "b", "Ended"]
        assert (await client.job(own.id).result(10)).text == "b"


async def test_job_object_that_is_deleted_keeps_no_events(client: Client) -> None:
    """A program that only submits, and keeps no job, must not grow."""
    ids = [(await client.submit(**REQUEST)).id for _ in range(10)]
    gc.collect()
    await asyncio.sleep(0.01)
    [subscriptions] = client._events.values()

    assert len(ids) == 10
    assert subscriptions._by_key == {}


async def test_iterator_that_is_closed_ends_its_subscription(client: Client, worker: Worker) -> None:
    """It yields nothing more, and the job goes on."""
    job = await client.submit(**REQUEST)
    worker.start(job.id)
    stream = job.events()
    assert isinstance(await anext(stream), Started)
    await stream.aclose()
    await stream.aclose()
    worker.end(1, job.id)

    assert [event async for event in stream] == []
    [subscriptions] = client._events.values()
    assert subscriptions._by_key == {}
    assert not job.has_ended


# Results


async def test_result_is_assembled_from_the_events(client: Client, worker: Worker) -> None:
    """Without a results topic; whatever the status, which `raise_for_status` checks."""
    job = await client.submit(**REQUEST)
    worker.answer(job.id, "Hel", "lo", status="failed")
    result = await job.result(10)

    assert (result.job_id, result.status, result.text) == (job.id, "failed", "Hello")
    assert job.has_ended
    with pytest.raises(JobFailed, match=f"job {job.id} ended with status failed: auth: wrong key"):
        result.raise_for_status()


async def test_result_of_a_job_that_goes_on_times_out(client: Client, worker: Worker) -> None:
    """The job is not cancelled by it, and its result can be asked for again."""
    job = await client.submit(**REQUEST)
    with pytest.raises(TimeoutError):
        await job.result(0.01)
    assert not job.has_ended
    worker.answer(job.id, "late")

    assert (await job.result(10)).text == "late"


async def test_result_comes_from_the_results_topic_where_there_is_one(
    kafka: MemoryKafka, worker: Worker
) -> None:
    """Then no events are read: one small record per job instead of hundreds."""
    kafka.create(RESULTS)
    async with Client(topics=TopicSettings(results=RESULTS)) as client:
        job = await client.submit(**REQUEST)
        worker.answer(job.id, "from the events")
        assert (await job.result(10)).text == "from the results topic"
        assert (await client.job(job.id).result(10)).text == "from the results topic"
        assert client._events == {}

        assert await events_of(job) == ["Started", "from the events", "Ended"]


async def test_result_whose_reader_crashed_raises_its_error(
    kafka: MemoryKafka, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug in aiokafka must not let a program wait for ever; a result that is there is returned all the same."""
    kafka.create(RESULTS)
    async with Client(topics=TopicSettings(results=RESULTS)) as client:
        there, awaited = await client.submit(**REQUEST), await client.submit(**REQUEST)
        worker.answer(there.id)
        waiting = asyncio.create_task(awaited.result())
        assert (await there.result(10)).text == "from the results topic"
        again = client.job(there.id)
        kafka.errors["getmany"].append(ZeroDivisionError("a bug"))
        kafka.changed()
        with pytest.raises(ZeroDivisionError):
            await asyncio.wait_for(waiting, 10)

        assert (await there.result(10)).text == "from the results topic"
        assert (await again.result(10)).text == "from the results topic"


async def test_large_result_is_read_from_the_log_unless_it_was_deleted(
    kafka: MemoryKafka, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its offset alone is kept. Compaction may remove the record before it is wanted."""
    monkeypatch.setattr("streamworker.client.results._KEPT_BYTES", 10)
    kafka.create(RESULTS)
    async with Client(topics=TopicSettings(results=RESULTS)) as client:
        job = await client.submit(**REQUEST)
        worker.answer(job.id)
        assert (await job.result(10)).text == "from the results topic"

        kafka.log(RESULTS).states[0] = MARKER  # as an offset without a record
        with pytest.raises(KafkaRefused, match="results-0: the result at offset 0 was deleted"):
            await job.result(10)


async def test_complete_and_map_return_results(client: Client, worker: Worker) -> None:
    """Each job's own one."""
    worker.is_prompt = True

    assert (await client.complete(**REQUEST, timeout=10)).text == "Hi"
    found = [
        result.job_id
        async for result in client.map([{"request": REQUEST, "job_id": str(n)} for n in range(5)])
    ]
    assert sorted(found) == list("01234")


# Cancelling


async def test_cancel_writes_a_control_record(kafka: MemoryKafka, client: Client) -> None:
    """By the job, and by the id of a job that another program submitted."""
    await (await client.submit(**REQUEST, job_id="mine")).cancel("enough")
    await client.job("other").cancel()
    records = {record.key: json.loads(record.value)["reason"] for record in kafka.records(CONTROL)}

    assert records == {b"mine": "enough", b"other": "cancelled by a control record"}


@pytest.mark.parametrize("ends", [True, False])
async def test_leaving_the_block_cancels_a_job_that_has_not_ended(
    kafka: MemoryKafka, worker: Worker, ends: bool
) -> None:
    """In a task that the client waits for when it is closed, so that the cancellation is not lost."""
    async with Client() as client:
        job = await client.submit(**REQUEST)
        with pytest.raises(ZeroDivisionError):
            async with job.cancelled_on_exit() as same:
                assert same is job
                worker.start(job.id)
                if ends:
                    worker.end(1, job.id)
                    await events_of(job)
                raise ZeroDivisionError

    assert [record.key for record in kafka.records(CONTROL)] == ([] if ends else [job.id.encode()])


async def test_cancellation_in_the_background_that_fails_is_logged(
    kafka: MemoryKafka, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No caller could be raised at."""
    job = await client.submit(**REQUEST)
    monkeypatch.setattr(client, "_sinks", {})
    kafka.errors["start_producer"].append(KafkaConnectionError("away"))
    with capture_logs() as logs:
        job.cancel_in_background()
        await asyncio.gather(*client._tasks)

    [entry] = [entry for entry in logs if entry["event"] == "client.cancel_failed"]
    assert "away" in entry["reason"]


# Opening and closing


@pytest.mark.parametrize("missing", [JOBS, EVENTS, CONTROL])
async def test_client_without_a_topic_is_refused_and_closes_what_it_opened(
    kafka: MemoryKafka, missing: str
) -> None:
    """At once, not at the first job."""
    del kafka.topics[missing]
    with pytest.raises(KafkaRefused, match=f"topic {missing} does not exist"):
        await Client().__aenter__()

    assert all(consumer.is_stopped for consumer in kafka.consumers)
    assert all(producer.is_closed for producer in kafka.producers)


async def test_client_that_is_not_open_says_how_to_open_it(kafka: MemoryKafka) -> None:
    """Before and after the block; a client can be opened again."""
    client = Client()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="use `async with client:`"):
            await client.submit(**REQUEST)
        async with client:
            await client.submit(**REQUEST)

    assert len(kafka.records(JOBS)) == 2


async def test_lazy_client_connects_what_it_needs(kafka: MemoryKafka, worker: Worker) -> None:
    """Nothing at first, a producer to submit, readers to read."""
    async with Client(is_lazy=True) as client:
        assert (kafka.producers, kafka.consumers) == ([], [])
        job = await client.submit(**REQUEST)
        assert (len(kafka.producers), kafka.consumers) == (1, [])
        worker.answer(job.id, "Hi")

        assert await events_of(job) == ["Started", "Hi", "Ended"]
        assert kafka.consumers


async def test_concurrent_first_uses_share_their_connections(kafka: MemoryKafka, worker: Worker) -> None:
    """Two subscriptions to one topic would each fetch all of it."""
    worker.is_prompt = True
    async with Client(is_lazy=True) as client:
        jobs = await asyncio.gather(*(client.submit(**REQUEST) for _ in range(5)))
        assert len(kafka.producers) == 1
        await asyncio.gather(*map(events_of, jobs))
        assert len(client._events) == 1
        tails = [one for one in kafka.consumers if one.arguments["metadata_max_age_ms"] == 30_000]
        assert len(tails) == 2  # one of them reads committed records


# The blocking client


def test_blocking_client_does_what_the_client_does(kafka: MemoryKafka, worker: Worker) -> None:
    """Submit, events, result, cancel, job and map, with values of the same classes."""
    worker.is_prompt = True
    with connect(bootstrap_servers="broker:1") as client:
        job = client.submit(**REQUEST)
        assert repr(job) == f"BlockingJob(id={job.id!r})"
        assert [type(event) for event in job.events()] == [Started, Delta, Ended]
        assert job.result(10).text == "Hi"
        job.cancel("enough")
        assert [type(event) for event in client.job(job.id).events()] == [Started, Delta, Ended]
        assert client.complete(**REQUEST).text == "Hi"
        assert [result.text for result in client.map([REQUEST] * 3, window=2)] == ["Hi"] * 3

    assert [record.key for record in kafka.records(CONTROL)] == [job.id.encode()]
    assert kafka.producers[0].arguments["bootstrap_servers"] == ["broker:1"]
    assert all(consumer.is_stopped for consumer in kafka.consumers)


def test_blocking_block_cancels_a_job_that_has_not_ended(kafka: MemoryKafka, worker: Worker) -> None:
    """And leaves one alone whose end was seen."""
    with connect(Client()) as client:
        job = client.submit(**REQUEST)
        with job.cancelled_on_exit():
            pass
        worker.is_prompt = True
        ended = client.submit(**REQUEST)
        with ended.cancelled_on_exit():
            ended.result(10)

    assert [record.key for record in kafka.records(CONTROL)] == [job.id.encode()]


def test_blocking_client_that_cannot_connect_leaves_no_thread(kafka: MemoryKafka) -> None:
    """The error is raised in the calling thread."""
    del kafka.topics[EVENTS]
    with pytest.raises(KafkaRefused), connect(Client()):
        pass

    assert "streamworker client" not in {thread.name for thread in threading.enumerate()}


def test_events_of_a_blocking_job_that_are_left_early_end_the_subscription(
    kafka: MemoryKafka, worker: Worker
) -> None:
    """`break` in a for loop closes the iterator."""
    with connect(client := Client()) as blocking:
        worker.is_prompt = True
        job = blocking.submit(**REQUEST)
        for _ in job.events():
            break
        [subscriptions] = client._events.values()
        assert subscriptions._by_key == {}
