"""A broker with a small `offset.metadata.max.bytes`, and a `group.max.size` of two."""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import pytest

from tests.brokers import apache as brokers
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from streamworker.practice import PracticeUpstream


@pytest.fixture(scope="module")
def small_kafka() -> Iterator[brokers.ApacheKafka]:
    """Start a broker that accepts 80 bytes of offset metadata, and two members in a group."""
    limits = "offset.metadata.max.bytes=80\ngroup.max.size=2\n"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(brokers, "PROPERTIES", brokers.PROPERTIES + limits)
        kafka = brokers.ApacheKafka()
        try:
            kafka.start()
            yield kafka
        finally:
            kafka.stop()


@pytest.fixture
async def small(
    small_kafka: brokers.ApacheKafka,
    practice: PracticeUpstream,
    topics: Callable[[str], str],
    tmp_path: Path,
) -> AsyncIterator[Stage]:
    async with Stage(small_kafka, practice, topics, tmp_path) as stage:
        yield stage


@pytest.mark.long
@pytest.mark.kafka
async def test_jobs_are_accepted_as_far_as_the_offset_map_fits(small: Stage) -> None:
    """Jobs that end before an older one fill the map; with a full map no new one begins, and no commit fails."""
    await small.open()
    worker = await small.process(worker__max_in_flight=500)
    await small.submit("older", "practice?deltas=100&pace_ms=60")
    # Every second job is slow, so that the finished offsets do not form one run.
    jobs = [(f"job-{n}", f"practice?deltas={2 if n % 2 else 60}&pace_ms=50", 0) for n in range(600)]
    await small.submit_many(jobs)
    await eventually(lambda: len(small.terminals()) > 10)
    await worker.kill()
    await small.process(worker__max_in_flight=500)
    await small.ended(limit_s=60)

    [line] = await worker.logged("commit.metadata_limited")
    assert line["limit"] == 80
    assert worker.lines("commit.offset_map_cut") == []
    assert worker.lines("commit.transaction_failed") == []
    assert small.breaches() == []


_LIMIT_UNKNOWN = """
import streamworker.kafka.committed_offsets as committed_offsets

async def read_metadata_limit(admin):
    return committed_offsets.METADATA_LIMIT

committed_offsets.read_metadata_limit = read_metadata_limit
"""


@pytest.mark.long
@pytest.mark.kafka
@pytest.mark.parametrize("delivery", ["exactly_once", "at_least_once"])
async def test_limit_that_cannot_be_read_is_learned_from_a_refused_commit(
    small: Stage, delivery: str
) -> None:
    """A worker without DESCRIBE_CONFIGS takes Kafka's default, and lowers it until its commits are accepted."""
    small.bug = _LIMIT_UNKNOWN
    await small.open()
    worker = await small.process(
        worker__delivery=delivery, worker__commit_interval_s=0.2, worker__max_in_flight=700
    )
    await small.submit("older", "practice?deltas=60&pace_ms=60")
    chance = Random(1)  # in no pattern, which an offset map would shorten
    jobs = [(f"job-{n}", f"practice?deltas={chance.choice([2, 40])}&pace_ms=50", 0) for n in range(600)]
    await small.submit_many(jobs)
    ends = await small.ended(limit_s=60)

    assert {end["status"] for end in ends} == {"completed"}
    assert len(small.practice.calls) == len(small.jobs)
    assert worker.lines("commit.metadata_refused")
    assert await small.commit_breaches() == []
    assert small.breaches() == []


@pytest.mark.long
@pytest.mark.kafka
async def test_group_that_is_full_ends_the_worker_with_advice(small: Stage) -> None:
    """The third worker names the broker's setting; the two others go on."""
    await small.open(partitions=2)
    members = [await small.process() for _ in range(2)]
    for member in members:
        await member.logged("worker.started")
    third = await small.process()

    assert await third.exit_code() == 1
    assert (
        "has as many members as the broker's group.max.size allows: raise it, or run fewer workers"
        in third.tail()
    )
    assert [member.is_running for member in members] == [True, True]
