"""Three brokers: an election that loses records, and a topic whose replicas are not in sync, on Apache Kafka."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from tests.brokers.cluster import ApacheCluster
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

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
