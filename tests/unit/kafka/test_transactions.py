"""Transactions whose outcome is unknown: found in the log, repeated, or given up to another owner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, cast

import pytest
from aiokafka.errors import MessageSizeTooLargeError, OffsetMetadataTooLargeError, ProducerFenced

from streamworker.errors import Fenced, MetadataTooLarge, RecordTooLarge
from streamworker.kafka.transactions import TransactionalCommitStores
from streamworker.model import CommitPoint, ProducerRecord, TopicPartition
from streamworker.testing import MemoryObserver
from tests.unit.kafka.fakes import FakeBroker, FakeCommittedOffsets, Member, settings

if TYPE_CHECKING:
    from streamworker.ports import CommitStore

AT = TopicPartition("jobs", 3)
FIRST, SECOND, FOREIGN = CommitPoint(1, "sw1:a.1::"), CommitPoint(2, "sw1:a.2::"), CommitPoint(2, "sw1:b.1::")


def record(value: bytes) -> ProducerRecord:
    return ProducerRecord(TopicPartition("events", 0), b"key", value)


class Stage(NamedTuple):
    broker: FakeBroker
    store: CommitStore
    member: Member
    observer: MemoryObserver


@pytest.fixture
async def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A store that is open and has committed once."""
    broker, member, observer = FakeBroker(), Member(), MemoryObserver()
    broker.committed = CommitPoint(0)
    monkeypatch.setattr("streamworker.kafka.transactions.new_transactional_producer", broker.new_producer)
    committed = cast("Any", FakeCommittedOffsets(broker))
    stores = TransactionalCommitStores(settings(), committed, cast("Any", member), observer)
    store = stores.store(AT)
    assert await store.open() == CommitPoint(0)
    await store.commit([record(b"first")], FIRST)
    return Stage(broker, store, member, observer)


async def test_first_offset_of_a_partition_without_one_is_committed_when_it_opens(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Offset 0 too: without it a partition without jobs looks like one whose offset has expired."""

    async def start_point(*_: object) -> CommitPoint:
        return CommitPoint(0)

    monkeypatch.setattr(FakeCommittedOffsets, "start_point", start_point)
    stage.broker.committed = None
    await stage.store.open()

    assert stage.broker.committed == CommitPoint(0)


async def test_commit_whose_response_is_lost_is_not_written_again(stage: Stage) -> None:
    """The committed offset is the one of the lost transaction: its records are written."""
    stage.broker.producers[-1].lost_answers = 1

    offsets = await stage.store.commit([record(b"second")], SECOND)

    assert stage.broker.values == [b"first", b"second"]
    assert offsets == [1]
    assert [producer.is_closed for producer in stage.broker.producers] == [True, False]
    await stage.store.commit([record(b"third")], CommitPoint(3, "sw1:a.3::"))
    assert stage.broker.values[2:] == [b"third"]


async def test_commit_that_was_aborted_is_written_again(stage: Stage) -> None:
    """The committed offset is still the one before: a broker that was away too long has aborted the transaction."""
    stage.broker.errors.append(ProducerFenced())

    await stage.store.commit([record(b"second")], SECOND)

    assert stage.broker.values == [b"first", b"second"]
    assert stage.broker.committed == SECOND
    assert stage.observer.all("kafka_failed") == [("commit",)]


async def test_commit_of_a_zombie_is_fenced_by_the_next_owners_offset(stage: Stage) -> None:
    """Another worker committed in between: nothing of the transaction may be repeated."""
    stage.broker.errors.append(ProducerFenced())
    stage.broker.committed = FOREIGN

    with pytest.raises(Fenced, match="jobs-3: another worker has committed"):
        await stage.store.commit([record(b"second")], SECOND)

    assert stage.broker.values == [b"first"]


async def test_commit_of_a_worker_that_is_not_a_member_opens_no_producer(stage: Stage) -> None:
    """A new producer would fence the next owner, so there is none."""
    stage.broker.errors.append(ProducerFenced())
    stage.member.is_member = False

    with pytest.raises(Fenced, match="not a member of the group any more"):
        await stage.store.commit([record(b"second")], SECOND)

    assert len(stage.broker.producers) == 1


async def test_commit_with_a_record_that_is_too_large_leaves_the_store_usable(stage: Stage) -> None:
    """The committer replaces the record and commits again, with a new producer."""
    stage.broker.errors.append(MessageSizeTooLargeError())

    with pytest.raises(RecordTooLarge):
        await stage.store.commit([record(b"too large")], SECOND)
    await stage.store.commit([record(b"smaller")], SECOND)

    assert stage.broker.values == [b"first", b"smaller"]


async def test_commit_with_too_much_metadata_leaves_the_store_usable(stage: Stage) -> None:
    """The committer lowers its limit and commits again, with a new producer."""
    stage.broker.errors.append(OffsetMetadataTooLargeError())

    with pytest.raises(MetadataTooLarge, match=r"offset\.metadata\.max\.bytes is below"):
        await stage.store.commit([record(b"second")], SECOND)
    await stage.store.commit([record(b"second")], SECOND)

    assert stage.broker.values == [b"first", b"second"]
