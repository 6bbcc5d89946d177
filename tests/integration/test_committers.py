"""Change of a partition's owner: which commits are refused, and which offset the next owner reads."""

from __future__ import annotations

import gc
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.errors import KafkaConnectionError

from streamworker.errors import Fenced, KafkaUnavailable
from streamworker.kafka.committed_offsets import CommittedOffsets
from streamworker.kafka.consumer import GroupConsumer
from streamworker.kafka.transactions import TransactionalCommitStores
from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
from streamworker.testing import MemoryObserver
from tests.integration.stage import Stage, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from streamworker.ports import CommitStore


@pytest.fixture(autouse=True)
def _no_later_reports() -> Iterator[None]:
    """Collect the failed futures that aiokafka leaves behind, so that asyncio reports them within this test."""
    yield
    gc.collect()


class Member(NamedTuple):
    """A member of the group that owns the only partition, as far as it knows."""

    consumer: GroupConsumer
    committed: CommittedOffsets
    committer: CommitStore
    observer: MemoryObserver


class Assigned:
    """Records the last assignment."""

    def __init__(self) -> None:
        self.partitions: frozenset[TopicPartition] | None = None

    def rebalancing(self) -> None:
        """Do nothing."""

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        """Do nothing."""

    def busy_partitions(self) -> frozenset[TopicPartition]:
        return frozenset()

    def assigned(self, partitions: frozenset[TopicPartition], **_: object) -> None:
        self.partitions = partitions


@asynccontextmanager
async def member(stage: Stage) -> AsyncIterator[Member]:
    settings = stage.settings()
    assigned, consumer = Assigned(), GroupConsumer(settings)
    committed = CommittedOffsets(settings, consumer)
    await committed.start()
    observer = MemoryObserver()
    committers = TransactionalCommitStores(settings, committed, consumer, observer)
    committer = committers.store(TopicPartition(stage.jobs_topic, 0))
    try:
        await consumer.start(assigned)
        await eventually(lambda: assigned.partitions is not None)
        yield Member(consumer, committed, committer, observer)
    finally:
        await committer.close()
        await consumer.stop()
        await committed.stop()


def event(stage: Stage, text: str) -> ProducerRecord:
    value = b'{"job_id":"%b","type":"delta"}' % text.encode()
    return ProducerRecord(TopicPartition(stage.events_topic, 0), b"key", value)


def job_ids(stage: Stage) -> list[str]:
    return [record.event["job_id"] for record in stage.records]


@asynccontextmanager
async def two_owners(stage: Stage) -> AsyncIterator[tuple[Member, CommitStore]]:
    """Yield a member and a second store for its partition, which acts as the next owner."""
    async with member(stage) as first:
        settings = stage.settings()
        second = TransactionalCommitStores(settings, first.committed, first.consumer).store(
            TopicPartition(stage.jobs_topic, 0)
        )
        try:
            yield first, second
        finally:
            await second.close()


async def test_new_owner_reads_what_the_former_one_committed_up_to_the_fence(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fence, then read: an offset read before the fence could be older than the last commit."""
    await apache.open()
    async with two_owners(apache) as (first, second):
        await first.committer.open()
        fence = type(second)._fence  # type: ignore[attr-defined]

        async def fence_at_the_last_moment(self: Any) -> None:
            await first.committer.commit([event(apache, "last")], CommitPoint(7, "sw1:a.1::"))
            await fence(self)

        monkeypatch.setattr(second, "_fence", fence_at_the_last_moment.__get__(second))
        assert await second.open() == CommitPoint(7, "sw1:a.1::")


async def test_former_owner_is_refused_once_the_new_one_has_committed(apache: Stage) -> None:
    """No event and no offset of a zombie is written."""
    await apache.open()
    async with two_owners(apache) as (first, second):
        await first.committer.open()
        await first.committer.commit([event(apache, "first")], CommitPoint(1, "sw1:a.1::"))
        await second.open()
        await second.commit([event(apache, "second")], CommitPoint(2, "sw1:b.1::"))
        with pytest.raises(Fenced):
            await first.committer.commit([event(apache, "zombie")], CommitPoint(9, "sw1:a.2::"))
        await second.close()
        assert await second.open() == CommitPoint(2, "sw1:b.1::")
        await second.commit([event(apache, "third")], CommitPoint(3, "sw1:b.2::"))
        await apache.until(lambda: "third" in job_ids(apache))
    assert job_ids(apache) == ["first", "second", "third"]


async def test_owner_whose_transaction_the_broker_ended_is_still_the_owner(apache: Stage) -> None:
    """ProducerFenced alone does not prove that there is another owner: membership and the committed offset decide."""
    await apache.open()
    async with member(apache) as only:
        await only.committer.open()
        await only.committer.commit([event(apache, "first")], CommitPoint(1, "sw1:a.1::"))
        async with AIOKafkaProducer(
            bootstrap_servers=apache.broker.bootstrap,
            transactional_id=f"{apache.group}.{apache.jobs_topic}.0",
        ):
            assert only.observer.calls == []
            await only.committer.commit([event(apache, "second")], CommitPoint(2, "sw1:a.2::"))
        await apache.until(lambda: "second" in job_ids(apache))
        assert set(only.observer.all("kafka_failed")) == {("commit",)}
    assert job_ids(apache) == ["first", "second"]


async def test_commit_whose_response_was_lost_is_found_by_its_metadata_and_not_repeated(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The commit id in the metadata identifies our own commit; repeating it would write a second terminal event."""
    await apache.open()
    async with member(apache) as only:
        await only.committer.open()
        producer = only.committer._producer  # type: ignore[attr-defined]
        commit = producer.commit_transaction

        async def commit_and_lose_the_answer() -> None:
            await commit()
            raise KafkaConnectionError("lost")

        monkeypatch.setattr(producer, "commit_transaction", commit_and_lose_the_answer)
        await only.committer.commit([event(apache, "once")], CommitPoint(1, "sw1:a.1::"))
        await only.committer.commit([event(apache, "next")], CommitPoint(2, "sw1:a.2::"))
        await apache.until(lambda: "next" in job_ids(apache))
    assert job_ids(apache) == ["once", "next"]


async def test_worker_that_was_suspended_past_its_session_does_not_fence_when_it_resumes(
    apache: Stage,
) -> None:
    """A worker that is not a member of the group opens no partition."""
    await apache.open()
    async with member(apache) as owner:
        await owner.committer.open()
        producer = owner.committer._producer  # type: ignore[attr-defined]
        async with member(apache) as sleeper:
            sleeper.consumer._assigned_as = ("an id that the group has forgotten", 1)
            with pytest.raises(KafkaUnavailable):
                await sleeper.committer.open()
        await owner.committer.commit([event(apache, "undisturbed")], CommitPoint(1, "sw1:a.1::"))
        assert owner.committer._producer is producer  # type: ignore[attr-defined]  # else it had to take over again
        await apache.until(lambda: job_ids(apache) == ["undisturbed"])


async def test_coordinator_that_returns_no_offset_is_not_taken_for_no_commit(
    apache: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A coordinator that is loading answers with an error code, which aiokafka ignores, and without the partition."""
    await apache.open()
    at = TopicPartition(apache.jobs_topic, 0)
    async with member(apache) as only:
        assert await only.committed.read(at) is None

        async def loading(*_: object, **__: object) -> dict[Any, Any]:
            return {}

        monkeypatch.setattr(only.committed._admin, "list_consumer_group_offsets", loading)
        with pytest.raises(KafkaUnavailable):
            await only.committed.read(at)


async def test_transactions_on_a_healthy_broker_wait_for_no_retriable_error(
    apache: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    """Kafka 4 refuses the first produce request of one transaction in thirty for a moment; it is repeated at once."""
    await apache.open(events_partitions=2)
    async with member(apache) as only:
        await only.committer.open()
        for number in range(150):
            await only.committer.commit([event(apache, "one")], CommitPoint(number, f"sw1:a.{number}::"))

    assert [
        record.getMessage() for record in caplog.records if record.name == "aiokafka.producer.sender"
    ] == []
