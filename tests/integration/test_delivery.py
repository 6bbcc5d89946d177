"""The guarantees of exactly_once on Apache Kafka: crashes, rebalances, zombies, failed producers."""

from __future__ import annotations

import asyncio
import signal
from typing import TYPE_CHECKING, Any

import pytest
import structlog
from aiokafka import TopicPartition as KafkaTopicPartition

from streamworker.kafka.sink import KafkaSink
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from tests.brokers.apache import ApacheKafka

AS_ONE = {"worker__group_instance_id": "one"}
"""Static membership: a worker with the instance id of a dead one does not wait for the end of its session."""


@pytest.fixture
def sinks(monkeypatch: pytest.MonkeyPatch) -> list[KafkaSink]:
    """Collect the sinks of the workers in this process."""
    made: list[KafkaSink] = []

    class Seen(KafkaSink):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            made.append(self)

    monkeypatch.setattr("streamworker.app.KafkaSink", Seen)
    return made


def _slow(deltas: int, pace_ms: int = 20) -> str:
    return f"practice?deltas={deltas}&pace_ms={pace_ms}"


async def test_finished_job_is_not_run_again_after_a_crash_while_an_older_one_still_streams(
    apache: Stage,
) -> None:
    """The next worker knows the finished offsets beyond the committed one."""
    await apache.open()
    first = await apache.process(**AS_ONE)
    await apache.submit("older", _slow(200))
    await apache.submit_many([(f"job-{number}", "practice?deltas=3", 0) for number in range(30)])
    young = [f"job-{number}" for number in range(30)]
    await apache.ended(*young)
    await first.kill()
    committed = (await apache.committed())[0]
    await apache.process(**AS_ONE)
    await apache.ended()

    assert committed.offset == 0
    assert apache.breaches() == []
    assert {len(apache.calls(job_id)) for job_id in young} == {1}
    assert len(apache.calls("older")) == 2
    assert apache.events("older")[0]["cause"] == "redelivered"


async def test_second_worker_is_assigned_partitions_when_their_streams_have_ended(apache: Stage) -> None:
    """Forty streams over eight partitions: a rebalance without a death cuts none, and nothing is paid twice."""
    await apache.open(partitions=8)
    async with apache.worker() as first:
        jobs = [(f"job-{number}", _slow(130, 40), number % 8) for number in range(40)]
        await apache.submit_many(jobs)
        await apache.until(lambda: all(apache.deltas(job_id) for job_id, *_ in jobs))
        second = await apache.process()
        await apache.ended()
        await second.logged("partition.opened", 4)
        await apache.submit_many([(f"more-{number}", "practice?deltas=2", number) for number in range(8)])
        await apache.ended()
        # A kept partition is read on from where it was, although an eager rebalance returns it to its committed offset.
        assert first.app.metrics.registry.get_sample_value("streamworker_records_skipped_total") == 0

    assert apache.breaches() == []
    assert {len(apache.calls(job.job_id)) for job in apache.jobs} == {1}
    assert {end["status"] for end in apache.terminals().values()} == {"completed"}
    assert await apache.commit_breaches() == []


@pytest.mark.long  # two sessions have to expire
async def test_zombie_that_resumes_ends_no_job_twice_and_supersedes_no_attempt(apache: Stage) -> None:
    """A worker that is suspended past its session resumes with open streams and fetched jobs; it discards both and goes on."""
    await apache.open(partitions=2)
    zombie = await apache.process()
    streams = [(f"stream-{number}", _slow(300, 30), number % 2) for number in range(10)]
    await apache.submit_many(streams)
    await apache.until(lambda: all(apache.deltas(job_id) > 3 for job_id, *_ in streams))
    zombie.signal(signal.SIGSTOP)
    # Its fetch request is open: these jobs are in its socket when it resumes.
    quick = [(f"quick-{number}", "practice?deltas=2", number % 2) for number in range(10)]
    await apache.submit_many(quick)
    owner = await apache.process()
    await apache.ended(*(job_id for job_id, *_ in quick))
    before = {event["attempt"] for job_id, *_ in streams for event in apache.all_events(job_id)}
    await apache.until(lambda: all(len(_attempts(apache, job_id)) == 2 for job_id, *_ in streams))
    zombie.signal(signal.SIGCONT)
    await zombie.logged("partition.released", 2)
    await apache.ended(limit_s=45)
    # The zombie is a member again, and both workers share the jobs.
    await zombie.logged("partition.opened", 3)
    await apache.submit_many([(f"more-{number}", "practice?deltas=2", number % 2) for number in range(10)])
    await apache.ended()

    assert apache.breaches() == []
    assert await apache.commit_breaches() == []
    assert {len(apache.calls(job_id)) for job_id, *_ in quick} == {1}
    assert len(owner.lines("partition.opened")) == 2
    for job_id, *_ in streams:
        attempts = _attempts(apache, job_id)
        assert [attempt in before for attempt in attempts] == sorted(
            (attempt in before for attempt in attempts), reverse=True
        ), f"{job_id}: the zombie's `started` after the owner's"
        assert {event["attempt"] for event in apache.all_events(job_id)} == set(attempts)


def _attempts(stage: Stage, job_id: str) -> list[str]:
    """Return the attempts of a job in the order in which they were opened."""
    return [event["attempt"] for event in stage.all_events(job_id) if event["type"] == "started"]


@pytest.mark.parametrize("down", [pytest.param("restart", marks=pytest.mark.long), "kill"])
async def test_broker_restart_in_the_middle_loses_and_repeats_nothing(
    apache_kafka: ApacheKafka, apache: Stage, down: str
) -> None:
    """After a shutdown or a crash of the broker, no job runs twice."""
    await apache.open(partitions=4)
    jobs = [
        (f"job-{number}", f"practice?deltas={40 + number}&pace_ms=25", number % 4) for number in range(60)
    ]
    await apache.process(worker__session_timeout_s=20, worker__max_in_flight=30)
    await apache.submit_many(jobs)
    await apache.until(lambda: len(apache.terminals()) >= 5)
    if down == "kill":
        await asyncio.to_thread(apache_kafka.kill)
    await asyncio.to_thread(apache_kafka.restart)
    await apache.ended()

    assert apache.breaches() == []
    assert await apache.commit_breaches() == []
    assert {len(apache.calls(job_id)) for job_id, *_ in jobs} == {1}


async def test_transaction_that_the_broker_aborted_restarts_no_stream(
    apache_kafka: ApacheKafka, apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A broker that was suspended for longer than a transaction may last aborts it; the worker still owns the partition."""
    monkeypatch.setattr("streamworker.kafka.transactions.TRANSACTION_TIMEOUT_S", 0.5)
    await apache.open()
    jobs = [(f"job-{number}", f"practice?deltas={30 + 3 * number}&pace_ms=20", 0) for number in range(40)]
    async with apache.worker(worker__session_timeout_s=20):
        await apache.submit_many(jobs)
        for count in (5, 15, 25):
            await apache.until(lambda count=count: len(apache.terminals()) >= count)  # type: ignore[misc]
            await asyncio.to_thread(apache_kafka.pause)
            await asyncio.sleep(1)
            await asyncio.to_thread(apache_kafka.resume)
        await apache.ended()
    assert apache.breaches() == []
    assert {len(apache.calls(job_id)) for job_id, *_ in jobs} == {1}


async def test_producer_with_a_wrong_sequence_number_is_replaced_without_losing_or_repeating_events(
    apache: Stage, sinks: list[KafkaSink]
) -> None:
    """A batch out of sequence makes its producer useless (aiokafka #1017); another producer sends the same events."""
    await apache.open(events_partitions=2)
    jobs = [(f"job-{number}", _slow(120, 10), 0) for number in range(20)]
    async with apache.worker():
        await apache.submit_many(jobs)
        await apache.until(lambda: all(apache.deltas(job_id) > 10 for job_id, *_ in jobs))
        spoilt: Any = sinks[0].producer
        for number in range(2):
            spoilt._txn_manager.increment_sequence_number(KafkaTopicPartition(apache.events_topic, number), 7)
        await eventually(lambda: sinks[0].producer is not spoilt)
        await apache.submit("after", "practice?deltas=3")
        await apache.ended()
    assert apache.breaches() == []
    assert {end["status"] for end in apache.terminals().values()} == {"completed"}
    assert {len(apache.calls(job_id)) for job_id, *_ in jobs} == {1}


@pytest.mark.parametrize("limit", ["1500", "150"])
async def test_topic_whose_limit_is_lowered_gets_the_records_that_fit(
    apache: Stage, sinks: list[KafkaSink], limit: str
) -> None:
    """A batch that is refused for its size is sent in parts; a job with a refused delta ends `too_large`."""
    await apache.open(events_partitions=1)
    jobs = [(f"job-{number}", _slow(100, 10), 0) for number in range(40)]
    with structlog.testing.capture_logs() as lines:
        async with apache.worker():
            await apache.submit_many(jobs)
            await apache.until(lambda: all(apache.deltas(job_id) > 10 for job_id, *_ in jobs))
            first = sinks[0].producer
            await apache.set_topic(apache.events_topic, max_message_bytes=limit)
            await eventually(lambda: sinks[0].producer is not first)
            if limit == "150":
                await eventually(lambda: [line for line in lines if line["event"] == "sink.record_refused"])
            await apache.set_topic(apache.events_topic, max_message_bytes="1048588")
            await apache.ended()
    refused = {job_id for job_id, end in apache.terminals().items() if end["error"]}

    assert {apache.terminals()[job_id]["error"]["code"] for job_id in refused} <= {"too_large"}
    assert {breach.job_id for breach in apache.breaches()} <= refused
    assert bool(refused) == (limit == "150")
    assert {len(apache.calls(job_id)) for job_id, *_ in jobs} == {1}


@pytest.mark.long
async def test_job_that_kills_its_worker_each_time_becomes_a_dead_letter(apache: Stage) -> None:
    """After three deliveries without an end: a dead letter and a terminal event, and the next job runs."""
    await apache.open()
    await apache.submit("killer", "practice?deltas=2&first_delta_ms=60000")
    for _ in range(3):
        worker = await apache.process(worker__max_deliveries=3, **AS_ONE)
        count = len(apache.all_events("killer"))
        await apache.until(lambda count=count: len(apache.all_events("killer")) > count)  # type: ignore[misc]
        await worker.kill()
    await apache.submit("after", "practice?deltas=2")
    await apache.process(worker__max_deliveries=3, **AS_ONE)
    end, after = await apache.ended("killer", "after")
    [letter] = await apache.dead_letters(1)

    assert apache.breaches() == []
    assert (end["status"], end["error"]["code"]) == ("failed", "max_deliveries")
    assert after["status"] == "completed"
    assert len(apache.calls("killer")) == 3
    assert letter.key == b"killer"
    assert dict(letter.headers)["__streamworker.errors.code"] == b"max_deliveries"


@pytest.mark.parametrize(
    "metadata",
    [
        "sw9:some:later:form",
        *[pytest.param(text, marks=pytest.mark.long) for text in ("sw1:x:b!!!:", "a foreign note")],
    ],
)
async def test_commit_metadata_that_is_not_a_valid_map_is_ignored_with_a_warning(
    apache: Stage, metadata: str
) -> None:
    """Damaged or unknown metadata may repeat jobs, but does not block the partition."""
    await apache.open()
    await apache.submit_many([(f"job-{number}", "practice?deltas=2", 0) for number in range(4)])
    await apache.commit_as_stranger(0, 1, metadata)
    worker = await apache.process()
    ends = await apache.ended("job-1", "job-2", "job-3")
    [warning] = await worker.logged("commit.offset_map_ignored")

    assert warning["level"] == "warning"
    assert {end["status"] for end in ends} == {"completed"}
    assert apache.all_events("job-0") == []


async def test_drain_that_times_out_returns_open_jobs_without_counting_their_delivery(apache: Stage) -> None:
    """At the drain timeout open jobs are returned without a terminal event."""
    await apache.open()
    over = {"worker__drain_timeout_s": 0.3, "worker__max_deliveries": 1}
    await apache.submit("long", _slow(150, 20))
    await apache.submit_many([(f"job-{number}", "practice?deltas=2", 0) for number in range(3)])
    for _ in range(2):
        async with apache.worker(**over):
            count = len(apache.events("long"))
            await apache.until(lambda count=count: len(apache.all_events("long")) > count + 3)  # type: ignore[misc]
            await apache.ended("job-0", "job-1", "job-2")
        assert "long" not in apache.terminals()
    await apache.process(worker__max_deliveries=1)
    [end] = await apache.ended("long")

    assert apache.breaches() == []
    assert end["status"] == "completed"
    assert len(apache.calls("long")) == 3
    assert [event["cause"] for event in apache.all_events("long") if event["type"] == "started"] == [
        "new"
    ] * 3
    assert len(apache.practice.calls) == 6


async def test_drain_ends_jobs_whose_terminal_event_waits_for_the_broker(
    apache_kafka: ApacheKafka, apache: Stage
) -> None:
    """The drain timeout may expire during a commit: the jobs of that commit do not count as open."""
    await apache.open()
    async with apache.worker(worker__drain_timeout_s=0.5) as worker:
        await apache.submit("quick", _slow(20, 20))
        await apache.until(lambda: apache.deltas("quick") > 5)
        await asyncio.to_thread(apache_kafka.pause)
        await eventually(lambda: apache.practice.open_streams == 0)
        stopping = asyncio.create_task(worker.drained())
        await asyncio.sleep(1)
        await asyncio.to_thread(apache_kafka.resume)
        await stopping
    async with apache.worker():
        await apache.ended("quick")
    assert apache.breaches() == []
