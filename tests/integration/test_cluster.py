"""Three brokers: an election that loses records, and a topic whose replicas are not in sync, on Apache Kafka."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from streamworker.client import Client, Ended
from tests.brokers.cluster import ApacheCluster
from tests.integration.events import said
from tests.integration.results import result_breaches
from tests.integration.stage import Stage, eventually
from tests.integration.test_dlq import command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from streamworker.client import Event
    from streamworker.practice import PracticeUpstream

pytestmark = [pytest.mark.long, pytest.mark.kafka, pytest.mark.timeout(240)]

QUICK = "practice?deltas=2"


@pytest.fixture(scope="module")
def cluster() -> Iterator[ApacheCluster]:
    nodes = ApacheCluster()
    try:
        nodes.start()
        yield nodes
    finally:
        nodes.stop()


@pytest.fixture
async def stage(
    cluster: ApacheCluster, practice: PracticeUpstream, topics: Callable[[str], str], tmp_path: Path
) -> AsyncIterator[Stage]:
    async with Stage(cluster, practice, topics, tmp_path) as stage:
        stage.replicas = cluster.size
        yield stage
    await asyncio.to_thread(cluster.heal)
    await in_sync(cluster)


async def in_sync(cluster: ApacheCluster) -> None:
    """Wait until every replica of every partition is in sync: the next test stops a broker."""
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.bootstrap)
    await admin.start()
    try:
        async with asyncio.timeout(60):
            while any(  # noqa: ASYNC110 - there is no event for it
                len(partition["isr"]) < len(partition["replicas"])
                for topic in await admin.describe_topics()
                for partition in topic["partitions"]
            ):
                await asyncio.sleep(0.2)
    finally:
        await admin.close()


@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_jobs_after_an_unclean_election_run_and_the_loss_is_reported(
    stage: Stage, cluster: ApacheCluster, delivery: str
) -> None:
    """The new leader has a part of the log: 40 finished jobs are lost, and offsets below the worker's position are new."""
    await stage.open()
    jobs = f"{stage.jobs_topic}.unclean"
    unclean = {"unclean.leader.election.enable": "true", "min.insync.replicas": "1"}
    answer = await stage._admin.create_topics(
        [NewTopic(jobs, -1, -1, replica_assignments={0: [1, 2]}, topic_configs=unclean)]
    )
    assert answer.topic_errors[0][1] == 0, answer.topic_errors
    stage.jobs_topic = stage.variables["TOPICS__JOBS"] = jobs
    worker = await stage.process(worker__delivery=delivery, worker__session_timeout_s=20)
    await stage.submit_many([(f"before-{number}", QUICK, 0) for number in range(10)])
    await stage.ended()
    await asyncio.to_thread(cluster.kill, 2)
    lost = await stage.submit_many([(f"lost-{number}", QUICK, 0) for number in range(40)])
    await stage.ended(limit_s=60)
    await asyncio.to_thread(cluster.kill, 1)
    await asyncio.to_thread(cluster.return_, 2)
    # An idempotent producer has sequence numbers that the new leader does not know.
    stage._producer = await stage._started(AIOKafkaProducer(bootstrap_servers=stage.broker.bootstrap))
    async with asyncio.timeout(60):
        at = await stage.submit_bytes(None, key=b"a tombstone")
    assert at.offset < lost[-1].offset
    new = [(f"after-{number}", QUICK, 0) for number in range(60)]
    await stage.submit_many(new)
    await stage.ended(*(name for name, *_ in new), limit_s=90)
    await eventually(lambda: worker.lines("jobs.log_reset"))

    assert {len(stage.calls(name)) for name, *_ in new} == {1}
    assert worker.lines("jobs.log_reset")[0]["level"] == "warning"
    assert worker.is_running


async def test_jobs_wait_while_too_few_replicas_are_in_sync(stage: Stage, cluster: ApacheCluster) -> None:
    """NOT_ENOUGH_REPLICAS is an outage: nothing is committed, and no job is lost or called twice."""
    await stage.open(topic_settings={"min.insync.replicas": "3"})
    worker = await stage.process(worker__session_timeout_s=20)
    await stage.submit("before", QUICK)
    await stage.ended()
    await stage.submit("during", "practice?deltas=20&pace_ms=100")
    await stage.until(lambda: stage.deltas("during"))
    await asyncio.to_thread(cluster.kill, 3)
    await asyncio.sleep(8)
    assert "during" not in stage.terminals()
    await asyncio.to_thread(cluster.return_, 3)
    await stage.ended(limit_s=60)

    assert worker.is_running
    assert len(stage.practice.calls) == 2
    assert stage.breaches() == []


async def test_client_follows_its_jobs_while_leaders_move(stage: Stage, cluster: ApacheCluster) -> None:
    """Each broker dies once while jobs stream: every event comes once, in order, and each job ends."""
    await stage.open(partitions=3, events_partitions=3)

    async def follow(client: Client, number: int) -> list[Event]:
        job = await client.submit(model="practice?deltas=300&pace_ms=100", messages=said(f"prompt {number}"))
        return [event async for event in job.events()]

    async with stage.worker(), Client(stage.settings()) as client:
        following = [asyncio.create_task(follow(client, number)) for number in range(12)]
        for node in cluster.nodes:
            await asyncio.sleep(1)  # some deltas
            await asyncio.to_thread(cluster.kill, node)
            await asyncio.sleep(2)  # the other brokers lead
            await asyncio.to_thread(cluster.return_, node)
            await in_sync(cluster)
        followed = await asyncio.wait_for(asyncio.gather(*following), 120)

    for events in followed:
        assert [event.seq for event in events] == list(range(len(events)))
        assert isinstance(events[-1], Ended)
        assert events[-1].status == "completed"


async def test_audit_of_a_thousand_jobs_finds_a_result_for_each(
    stage: Stage, cluster: ApacheCluster, topics: Callable[[str], str]
) -> None:
    """Workers are killed and a broker is restarted: each ending has one result, equal to what the assembler makes."""
    results = topics("results")
    await stage.open(partitions=6, events_partitions=3, results_topic=results)
    workers = [await stage.process() for _ in range(3)]
    models = (
        "practice?deltas=20&pace_ms=20",
        "practice?deltas=5&tool_calls=1&reasoning&choices=2",
        "practice?deltas=5&break_after=3",
        "practice?status=400",
    )
    jobs = [f"job-{number}" for number in range(1000)]
    await stage.submit_many((job, models[n % len(models)], n % 6) for n, job in enumerate(jobs))
    for share, disturb in (
        (150, workers[0].kill),
        (350, partial(asyncio.to_thread, cluster.restart, 1)),
        (600, workers[1].kill),
    ):
        await stage.until(lambda share=share: len(stage.terminals()) >= share)  # type: ignore[misc]  # a default binds it
        await disturb()
        if disturb is not workers[1].kill:
            await stage.process()
    await stage.ended(*jobs, limit_s=150)

    assert await result_breaches(stage, results) == []
    audited = await command(stage, "audit")
    assert (audited.code, "1000 results: no breach" in audited.out) == (0, True), audited
