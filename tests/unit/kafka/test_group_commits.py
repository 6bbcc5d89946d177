"""Offsets that are committed by the group's member: on a timer, before rebalances, and at the end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import pytest
from structlog.testing import capture_logs

from streamworker.errors import KafkaUnavailable, MetadataTooLarge, RecordTooLarge
from streamworker.kafka.group_commits import GroupCommitStores
from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
from streamworker.testing import MemoryObserver, MemorySink
from tests.turnable import quiet
from tests.unit.kafka.fakes import FakeBroker, FakeCommittedOffsets, settings

if TYPE_CHECKING:
    from collections.abc import Mapping

JOBS = TopicPartition("jobs", 0)
OTHER = TopicPartition("jobs", 1)


def record(value: bytes) -> ProducerRecord:
    return ProducerRecord(TopicPartition("events", 0), b"key", value)


class Member:
    """The group's member. `answers` of the next commits: whether they succeed, or an exception; then all succeed."""

    def __init__(self) -> None:
        self.answers: list[bool | Exception] = []
        self.commits: list[dict[TopicPartition, CommitPoint]] = []
        self.epochs: dict[TopicPartition, object] = {JOBS: object(), OTHER: object()}
        self.before_rebalance: Any = None
        self.uncommitted: Any = None

    def epoch(self, partition: TopicPartition) -> object:
        return self.epochs.get(partition)

    async def commit(self, points: Mapping[TopicPartition, CommitPoint]) -> bool:
        self.commits.append(dict(points))
        answer = self.answers.pop(0) if self.answers else True
        if isinstance(answer, Exception):
            raise answer
        return answer


class Stage:
    def __init__(self) -> None:
        self.broker = FakeBroker()
        self.broker.committed = CommitPoint(0)
        self.member, self.sink, self.observer = Member(), MemorySink(), MemoryObserver()
        self.stores = GroupCommitStores(
            settings(WORKER__COMMIT_INTERVAL_S="1"),
            cast("Any", FakeCommittedOffsets(self.broker)),
            cast("Any", self.member),
            self.sink,
            self.observer,
        )

    async def finish(self, offset: int, partition: TopicPartition = JOBS, metadata: str = "") -> None:
        """Commit one end, as a partition committer does."""
        store = self.stores.store(partition)
        await store.open()
        await store.commit([record(str(offset).encode())], CommitPoint(offset + 1, metadata))


@pytest.fixture
async def stage() -> Stage:
    return Stage()


async def test_bug_in_a_commit_is_logged_and_the_timer_commits_again(stage: Stage) -> None:
    """A task that ended silently would commit nothing for the rest of the process."""
    stage.member.answers = [ZeroDivisionError("my prompt"), ZeroDivisionError("my prompt")]
    await stage.stores.start()
    await stage.finish(0)
    with capture_logs() as logs:
        await asyncio.sleep(2.5)
    await asyncio.sleep(1)
    await stage.stores.stop()

    assert [line["event"] for line in logs] == ["offsets.commit_crashed"] * 2
    assert "my prompt" not in str(logs)
    assert stage.member.commits[-1] == {JOBS: CommitPoint(1)}
    assert len(stage.member.commits) == 3
    assert stage.observer.all("kafka_failed") == [("commit",)] * 2


async def test_points_are_committed_by_the_timer(stage: Stage) -> None:
    """Later points of a partition replace earlier ones."""
    await stage.stores.start()
    await stage.finish(0)
    await stage.finish(1)
    assert stage.member.commits == []
    assert set(stage.member.uncommitted()) == {JOBS}
    await asyncio.sleep(1.5)

    assert stage.member.commits == [{JOBS: CommitPoint(2)}]
    assert set(stage.member.uncommitted()) == set()
    await stage.stores.stop()


async def test_stop_commits_again_until_the_rebalance_is_over(stage: Stage) -> None:
    """A commit that the group refuses because it rebalances would otherwise cost a call for each ended job."""
    await stage.stores.start()
    await stage.finish(0)
    stage.member.answers = [False, False, KafkaUnavailable("the coordinator is loading")]
    await stage.stores.stop()

    assert len(stage.member.commits) == 4
    assert stage.member.commits[-1] == {JOBS: CommitPoint(1)}
    assert set(stage.member.uncommitted()) == set()
    assert stage.member.before_rebalance is None


async def test_stop_gives_up_after_a_while(stage: Stage) -> None:
    """A broker that is away must not keep the process from ending."""
    await stage.finish(0)
    stage.member.answers = [False] * 1000
    began = asyncio.get_running_loop().time()
    await stage.stores.stop()

    assert asyncio.get_running_loop().time() - began == pytest.approx(10, abs=0.5)


async def test_stop_does_not_commit_a_partition_that_was_lost(stage: Stage) -> None:
    """Another worker may have committed a later offset."""
    await stage.finish(0)
    await stage.finish(0, OTHER)
    stage.member.epochs[JOBS] = object()
    await stage.stores.stop()

    assert stage.member.commits == [{OTHER: CommitPoint(1)}]


async def test_stop_without_points_commits_nothing(stage: Stage) -> None:
    """A worker that was never given a partition leaves at once."""
    await stage.stores.start()
    await stage.stores.stop()

    assert stage.member.commits == []


async def test_point_that_follows_during_a_commit_is_kept(stage: Stage) -> None:
    """A commit confirms only the points that it carried."""
    await stage.finish(0)
    committing = stage.member.commit

    async def commit(points: Mapping[TopicPartition, CommitPoint]) -> bool:
        await stage.finish(1)
        stage.member.commit = committing  # type: ignore[method-assign]
        return await committing(points)

    stage.member.commit = commit  # type: ignore[method-assign]
    await stage.stores.stop()

    assert stage.member.commits == [{JOBS: CommitPoint(1)}, {JOBS: CommitPoint(2)}]


async def test_refused_metadata_is_reported_to_the_next_commit_of_the_partition(stage: Stage) -> None:
    """The committer lowers its limit; the partitions without metadata are not to blame."""
    await stage.finish(0, metadata="x" * 100)
    await stage.finish(0, OTHER)
    stage.member.answers = [MetadataTooLarge("the broker takes less")]
    await stage.stores._commit()
    await stage.finish(1, OTHER)
    with pytest.raises(MetadataTooLarge, match="jobs-0: the broker refused the metadata"):
        await stage.finish(1, metadata="x" * 100)
    await stage.finish(1, metadata="x" * 50)
    await stage.stores.stop()

    assert stage.member.commits[-1] == {JOBS: CommitPoint(2, "x" * 50), OTHER: CommitPoint(2)}
    assert stage.observer.all("kafka_failed") == [("commit",)]


async def test_records_of_a_refused_commit_are_not_published_twice(stage: Stage) -> None:
    """The committer repeats the commit in parts; what was acknowledged is not sent again."""
    store = stage.stores.store(JOBS)
    await store.open()
    stage.sink.acknowledges = False
    small, large, other = record(b"small"), record(b"large"), record(b"other")
    whole = asyncio.ensure_future(store.commit([small, large, other], CommitPoint(3)))
    await quiet()
    stage.sink.acknowledge_next()
    stage.sink.acknowledge_next(RecordTooLarge("too large"))
    stage.sink.acknowledge()
    stage.sink.acknowledges = True
    with pytest.raises(RecordTooLarge):
        await whole
    await store.commit([small], CommitPoint(1))
    await store.commit([record(b"short")], CommitPoint(2))
    await store.commit([other], CommitPoint(3))

    assert [one.value for one in stage.sink.records] == [b"small", b"large", b"other", b"short"]


async def test_records_of_a_commit_are_not_kept_after_it(stage: Stage) -> None:
    """A record with the same identity later is another one."""
    store: Any = stage.stores.store(JOBS)
    await store.open()
    await store.commit([record(b"one"), record(b"two")], CommitPoint(2))

    assert store._written == {}
