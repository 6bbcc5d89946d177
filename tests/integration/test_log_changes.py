"""Job logs that lost records, were replaced or cannot be read to their end, and groups without committed offsets."""

from __future__ import annotations

import asyncio
import signal
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import NewPartitions, NewTopic, RecordsToDelete
from structlog.testing import capture_logs

from streamworker.errors import KafkaRefused
from streamworker.telemetry.metrics import PREFIX
from tests.integration.stage import InProcess, Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUICK = "practice?deltas=2"
DELIVERIES = ["exactly_once", "at_least_once"]


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for changes several times a second."""
    monkeypatch.setattr("streamworker.kafka.log_watch._WATCH_S", 0.2)
    monkeypatch.setattr("streamworker.kafka.connection._METADATA_MAX_AGE_MS", 500)


def lost(worker: InProcess, reason: str) -> float:
    found = worker.app.metrics.registry.get_sample_value(f"{PREFIX}records_lost_total", {"reason": reason})
    return found or 0


async def run_jobs(stage: Stage, *names: str, partition: int = 0) -> None:
    await stage.submit_many([(name, QUICK, partition) for name in names])
    await stage.ended(*names)


def names(prefix: str, count: int) -> list[str]:
    return [f"{prefix}-{number}" for number in range(count)]


async def replace_topic(stage: Stage) -> None:
    """Delete the jobs topic and create it again."""
    await stage._admin.delete_topics([stage.jobs_topic])
    async with asyncio.timeout(20):
        while (await stage._admin.create_topics([NewTopic(stage.jobs_topic, 1, 1)])).topic_errors[0][1]:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.1)


@pytest.mark.long
@pytest.mark.parametrize("delivery", DELIVERIES)
@pytest.mark.parametrize(("before", "after"), [(12, 4), (4, 12)], ids=["shorter", "longer"])
async def test_topic_that_is_replaced_during_a_pause_is_read_from_its_start(
    apache: Stage, before: int, after: int, delivery: str
) -> None:
    """Whether the new log is shorter than what was read or not: every job of it runs, and a warning is logged."""
    await apache.open()
    worker = await apache.process(worker__delivery=delivery, worker__session_timeout_s=20)
    await run_jobs(apache, *names("old", before))
    worker.signal(signal.SIGSTOP)
    resumes_at = asyncio.get_running_loop().time() + 3
    await replace_topic(apache)
    new = names("new", after)
    async with asyncio.timeout(20):
        await apache.submit_many([(name, QUICK, 0) for name in new])
    await asyncio.sleep(resumes_at - asyncio.get_running_loop().time())
    worker.signal(signal.SIGCONT)
    await apache.ended(*new)
    [line] = await worker.logged("jobs.log_reset")

    assert {len(apache.calls(name)) for name in new} == {1}
    assert line["level"] == "warning"
    assert (line["partition"], line["read_from"]) == (f"{apache.jobs_topic}-0", 0)


async def test_topic_that_is_replaced_while_it_is_read_is_read_from_its_start(apache: Stage) -> None:
    """The group notices that the topic has gone, and that it has come back."""
    await apache.open()
    async with apache.worker():
        await run_jobs(apache, *names("old", 12))
        await replace_topic(apache)
        async with asyncio.timeout(20):
            await run_jobs(apache, *names("new", 4))


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_committed_offset_beyond_the_end_of_the_log_is_reported_and_the_log_is_read(
    apache: Stage, delivery: str
) -> None:
    """A log that lost its end while no worker ran; without this, all jobs up to the old offset are skipped."""
    await apache.open()
    await apache.submit_many([(name, QUICK, 0) for name in names("job", 6)])
    await apache.commit_as_stranger(0, 1000, "")
    with capture_logs() as logs:
        async with apache.worker(worker__delivery=delivery):
            await apache.ended()
            await run_jobs(apache, "after")
    [line] = [line for line in logs if line["event"] == "jobs.log_reset"]

    assert (line["position"], line["read_from"]) == (1000, 0)
    assert apache.breaches() == []
    assert (await apache.committed())[0].offset == 7


async def test_jobs_that_retention_deleted_before_they_were_read_are_reported(apache: Stage) -> None:
    """With their number, in the log and in a metric; the jobs behind them run."""
    await apache.open()
    await apache.commit_as_stranger(0, 0, "")
    await apache.submit_many([(name, QUICK, 0) for name in names("job", 8)])
    at = KafkaTopicPartition(apache.jobs_topic, 0)
    await apache._admin.delete_records({at: RecordsToDelete(before_offset=5)})
    with capture_logs() as logs:
        async with apache.worker() as worker:
            await apache.ended("job-5", "job-6", "job-7")
            assert lost(worker, "retention") == 5
    [line] = [line for line in logs if line["event"] == "jobs.deleted_unread"]

    assert (line["records"], line["from_offset"], line["to_offset"]) == (5, 0, 5)
    assert "job-4" not in apache.terminals()


async def test_open_transaction_of_another_program_before_the_jobs_is_reported(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, with the number of records behind it; the jobs run when it ends."""
    monkeypatch.setattr("streamworker.kafka.log_watch._OPEN_TRANSACTION_S", 0.5)
    await apache.open()
    with capture_logs() as logs:
        async with apache.worker():
            await run_jobs(apache, "before")
            async with AIOKafkaProducer(
                bootstrap_servers=apache.broker.bootstrap, transactional_id=f"{apache.group}-other"
            ) as other:
                async with other.transaction():
                    await other.send_and_wait(apache.jobs_topic, b"{}", partition=0)
                    await apache.submit_many([(name, QUICK, 0) for name in names("job", 3)])
                    await eventually(
                        lambda: [line for line in logs if line["event"] == "jobs.behind_open_transaction"]
                    )
                await apache.ended("job-0", "job-1", "job-2")
    [line] = [line for line in logs if line["event"] == "jobs.behind_open_transaction"]

    assert line["offset"] == 1
    assert 1 <= line["records"] <= 4


@asynccontextmanager
async def stage_with_history(apache: Stage) -> AsyncIterator[Stage]:
    """Yield the stage after five jobs ran in another group."""
    await apache.open()
    async with apache.worker(worker__group_id=f"{apache.group}.other"):
        await run_jobs(apache, *names("old", 5))
    yield apache


async def test_group_without_offsets_refuses_to_run_jobs_whose_events_were_written(apache: Stage) -> None:
    """A misspelt group id runs no paid job again; the error names the counts and both ways to continue."""
    async with stage_with_history(apache):
        with pytest.raises(KafkaRefused) as refusal:
            async with asyncio.timeout(20):
                await apache.worker().app.run()

    text = str(refusal.value)
    assert (
        f"group {apache.group} has no committed offset on topic {apache.jobs_topic}, which holds 5 records"
        in text
    )
    assert "Set worker.on_no_offset to earliest to run these jobs again, or to latest to skip them" in text
    assert len(apache.practice.calls) == 5


@pytest.mark.parametrize(("policy", "calls"), [("earliest", 2), ("latest", 1)])
async def test_group_without_offsets_begins_where_the_policy_says(
    apache: Stage, policy: str, calls: int
) -> None:
    """And commits the position, so that the policy counts once."""
    async with stage_with_history(apache):
        async with apache.worker(worker__on_no_offset=policy) as worker:
            await eventually(lambda: worker.app.metrics.registry.get_sample_value(f"{PREFIX}ready"))
            await run_jobs(apache, "after")
        async with apache.worker():  # "refuse": the group has offsets now
            await run_jobs(apache, "later")

    assert {len(apache.calls(name)) for name in names("old", 5)} == {calls}
    assert [len(apache.calls(name)) for name in ("after", "later")] == [1, 1]


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_position_of_a_partition_without_jobs_is_committed(apache: Stage, delivery: str) -> None:
    """Offset 0 too: without it an empty partition looks like one whose offset has expired."""
    await apache.open(partitions=2)
    over = {"worker__delivery": delivery, "worker__commit_interval_s": 0.2}
    async with apache.worker(**over) as worker:
        await eventually(lambda: worker.app.metrics.registry.get_sample_value(f"{PREFIX}ready"))
        async with asyncio.timeout(20):
            while len(await apache.committed()) < 2:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.1)

    assert [point.offset for point in (await apache.committed()).values()] == [0, 0]


async def until_known(stage: Stage, *, partition: int) -> None:
    """Wait until the test's own producer knows a new partition; a broker may answer with older metadata."""
    client = stage._producer.client
    async with asyncio.timeout(20):
        while partition not in (client.cluster.partitions_for_topic(stage.jobs_topic) or ()):
            await client.force_metadata_update()


async def test_partition_that_is_added_begins_at_its_first_record(apache: Stage) -> None:
    """Its jobs may have been written before a worker noticed it."""
    await apache.open()
    async with apache.worker():
        await run_jobs(apache, "before")
        await apache._admin.create_partitions({apache.jobs_topic: NewPartitions(2)})
        await until_known(apache, partition=1)
        await run_jobs(apache, *names("new", 3), partition=1)

    assert apache.breaches() == []


def test_metadata_is_refreshed_often_enough_to_notice_a_new_topic_within_30_s(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rebalance takes the rest."""
    monkeypatch.undo()
    from streamworker.config import KafkaSettings
    from streamworker.kafka.connection import client_arguments

    assert client_arguments(KafkaSettings())["metadata_max_age_ms"] <= 20_000


@pytest.mark.parametrize("delivery", DELIVERIES)
async def test_lag_of_an_idle_topic_is_zero_after_transactions(apache: Stage, delivery: str) -> None:
    """Transaction markers and aborted records are not jobs: neither the gauge nor the group's lag counts them."""
    await apache.open()
    over = {"worker__delivery": delivery, "worker__commit_interval_s": 0.2}
    async with apache.worker(**over) as worker:

        def behind() -> Any:
            return worker.app.metrics.registry.get_sample_value(f"{PREFIX}records_behind")

        await run_jobs(apache, "first")
        async with AIOKafkaProducer(
            bootstrap_servers=apache.broker.bootstrap, transactional_id=f"{apache.group}-other"
        ) as other:
            for _ in range(3):
                await other.begin_transaction()
                await other.send_and_wait(apache.jobs_topic, b"{}", partition=0)
                await other.abort_transaction()
        await eventually(lambda: behind() == 0)
        async with asyncio.timeout(10):
            while (await apache.committed())[0].offset < 7:  # noqa: ASYNC110 - there is no event for it
                await asyncio.sleep(0.1)
        await run_jobs(apache, "second")

    assert (await apache.committed())[0].offset == 8
    assert apache.breaches() == []
