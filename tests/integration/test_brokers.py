"""The behaviour of both brokers that the worker relies on, seen through aiokafka."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener
from aiokafka import TopicPartition as KafkaTopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.errors import KafkaError, MessageSizeTooLargeError, OutOfOrderSequenceNumber, ProducerFenced
from aiokafka.structs import OffsetAndMetadata

from tests.brokers.apache import ApacheKafka
from tests.conftest import Broker
from tests.integration.stage import is_known, until_led

LIMIT_S = 20

Names = Callable[[str], str]


@pytest.fixture(autouse=True)
async def _time_limit() -> AsyncIterator[None]:
    async with asyncio.timeout(LIMIT_S):
        yield


@asynccontextmanager
async def running(client: Any) -> AsyncIterator[Any]:
    try:
        await client.start()
        yield client
    finally:
        await (client.close() if isinstance(client, AIOKafkaAdminClient) else client.stop())


def admin(broker: Broker) -> AbstractAsyncContextManager[Any]:
    return running(AIOKafkaAdminClient(bootstrap_servers=broker.bootstrap))


def producer(broker: Broker, **settings: Any) -> AbstractAsyncContextManager[Any]:
    defaults: dict[str, Any] = {"enable_idempotence": True, "compression_type": "lz4"}
    return running(AIOKafkaProducer(bootstrap_servers=broker.bootstrap, **defaults | settings))


def consumer(broker: Broker, *names: str, **settings: Any) -> AbstractAsyncContextManager[Any]:
    defaults: dict[str, Any] = {
        "auto_offset_reset": "earliest",
        "enable_auto_commit": False,
        "fetch_max_wait_ms": 50,
    }
    return running(AIOKafkaConsumer(*names, bootstrap_servers=broker.bootstrap, **defaults | settings))


async def create(
    broker: Broker, name: str, partitions: int = 1, settings: dict[str, str] | None = None
) -> KafkaTopicPartition:
    async with admin(broker) as client:
        topic = NewTopic(name, num_partitions=partitions, replication_factor=1, topic_configs=settings or {})
        await until_led(client)
        answer = await client.create_topics([topic])
        assert [error for _, error, *_ in answer.topic_errors] == [0]
        # A member whose leader has no metadata of the topic yet gets no partition until its metadata is old.
        while not await is_known(client, name):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.02)
    return KafkaTopicPartition(name, 0)


async def read(
    broker: Broker, partition: KafkaTopicPartition, number: int, isolation: str = "read_committed"
) -> list[Any]:
    """Return the first `number` records of a partition."""
    async with consumer(broker, isolation_level=isolation) as client:
        client.assign([partition])
        return [await client.getone() for _ in range(number)]


async def values(
    broker: Broker, partition: KafkaTopicPartition, isolation: str = "read_committed"
) -> list[bytes]:
    """Return all values up to the end that this isolation level sees."""
    seen: list[bytes] = []
    async with consumer(broker, isolation_level=isolation) as client:
        client.assign([partition])
        end = (await client.end_offsets([partition]))[partition]
        while await client.position(partition) < end:
            batches = await client.getmany(partition, timeout_ms=100)
            seen += [record.value for record in batches.get(partition, [])]
    return seen


async def until_visible(broker: Broker, partition: KafkaTopicPartition, expected: list[bytes]) -> None:
    """Wait for the values: Apache Kafka answers a commit before it writes the markers that make records visible."""
    while await values(broker, partition) != expected:
        pass


async def until_committed(
    broker: Broker, group: str, partition: KafkaTopicPartition, expected: tuple[int, str]
) -> None:
    while await committed(broker, group, partition) != expected:
        pass


async def committed(broker: Broker, group: str, partition: KafkaTopicPartition) -> tuple[int, str]:
    async with admin(broker) as client:
        offset = (await client.list_consumer_group_offsets(group, partitions=[partition]))[partition]
    return offset.offset, offset.metadata


async def test_topics_are_made_with_their_partitions_and_not_twice(broker: Broker, topics: Names) -> None:
    name = topics("t")
    await create(broker, name, partitions=3)
    async with admin(broker) as client:
        (described,) = await client.describe_topics([name])
        assert len(described["partitions"]) == 3
        again = await client.create_topics([NewTopic(name, num_partitions=3, replication_factor=1)])
        assert [error for _, error, *_ in again.topic_errors] == [36]  # TOPIC_ALREADY_EXISTS


async def test_idempotent_lz4_batches_keep_order_keys_headers_and_timestamps(
    broker: Broker, topics: Names
) -> None:
    partition = await create(broker, topics("t"))
    headers = [("traceparent", b"00-1"), ("streamworker-type", b"delta")]
    async with producer(broker) as client:
        for first in (0, 100):
            batch = client.create_batch()
            for number in range(first, first + 100):
                record = {
                    "key": b"k%d" % number,
                    "value": b"v%d" % number,
                    "timestamp": 1_700_000_000_000 + number,
                }
                assert batch.append(**record, headers=headers) is not None
            batch.close()
            await (await client.send_batch(batch, partition.topic, partition=0))
        await client.send_and_wait(partition.topic, None, key=b"tombstone", partition=0)
    records = await read(broker, partition, 201)
    assert [record.offset for record in records] == list(range(201))
    assert [record.value for record in records[:200]] == [b"v%d" % number for number in range(200)]
    assert [record.timestamp - 1_700_000_000_000 for record in records[:200]] == list(range(200))
    assert records[7].key == b"k7"
    assert list(records[7].headers) == headers
    assert records[200].value is None


async def test_committed_offset_keeps_its_metadata_for_the_next_member(broker: Broker, topics: Names) -> None:
    partition, group = await create(broker, topics("t")), topics("g")
    metadata = "sw1:" + "x" * 4000
    async with producer(broker) as client:
        for number in range(5):
            await client.send_and_wait(partition.topic, b"%d" % number, partition=0)
    async with consumer(broker, partition.topic, group_id=group) as client:
        await client.getone()
        await client.commit({partition: OffsetAndMetadata(3, metadata)})
    assert await committed(broker, group, partition) == (3, metadata)
    async with consumer(broker, partition.topic, group_id=group) as client:
        assert (await client.getone()).offset == 3


async def test_transaction_shows_records_and_offsets_together_at_its_commit(
    broker: Broker, topics: Names
) -> None:
    jobs, events, group = (
        await create(broker, topics("jobs")),
        await create(broker, topics("events")),
        topics("g"),
    )
    async with producer(broker, transactional_id=topics("tx")) as client:
        await client.begin_transaction()
        await client.send_and_wait(events.topic, b"open", partition=0)
        await client.send_offsets_to_transaction({jobs: OffsetAndMetadata(7, "sw1:")}, group)
        assert await values(broker, events) == []
        assert await values(broker, events, "read_uncommitted") == [b"open"]
        assert (await committed(broker, group, jobs))[0] == -1
        await client.commit_transaction()
        await until_visible(broker, events, [b"open"])
        await until_committed(broker, group, jobs, (7, "sw1:"))


async def test_aborted_transaction_leaves_neither_records_nor_offsets(broker: Broker, topics: Names) -> None:
    jobs, events, group = (
        await create(broker, topics("jobs")),
        await create(broker, topics("events")),
        topics("g"),
    )
    async with producer(broker, transactional_id=topics("tx")) as client:
        await client.begin_transaction()
        await client.send_and_wait(events.topic, b"aborted", partition=0)
        await client.send_offsets_to_transaction({jobs: OffsetAndMetadata(7, "")}, group)
        await client.abort_transaction()
        async with client.transaction():
            await client.send_and_wait(events.topic, b"kept", partition=0)
    await until_visible(broker, events, [b"kept"])
    assert await values(broker, events, "read_uncommitted") == [b"aborted", b"kept"]
    assert (await committed(broker, group, jobs))[0] == -1


async def test_records_outside_wait_behind_an_open_transaction_of_their_partition(
    broker: Broker, topics: Names
) -> None:
    events = await create(broker, topics("events"))
    async with producer(broker, transactional_id=topics("tx")) as transactional, producer(broker) as plain:
        await transactional.begin_transaction()
        await transactional.send_and_wait(events.topic, b"in", partition=0)
        await plain.send_and_wait(events.topic, b"out", partition=0)
        assert await values(broker, events) == []
        await transactional.commit_transaction()
    await until_visible(broker, events, [b"in", b"out"])


async def test_second_producer_of_an_id_fences_the_first_and_aborts_its_open_transaction(
    broker: Broker, topics: Names
) -> None:
    events, name = await create(broker, topics("events")), topics("tx")
    async with producer(broker, transactional_id=name) as old:
        await old.begin_transaction()
        await old.send_and_wait(events.topic, b"old", partition=0)
        async with producer(broker, transactional_id=name) as new:
            with pytest.raises(ProducerFenced):
                await old.commit_transaction()
            async with new.transaction():
                await new.send_and_wait(events.topic, b"new", partition=0)
    await until_visible(broker, events, [b"new"])


class Assigned(ConsumerRebalanceListener):  # type: ignore[misc]  # aiokafka has no types
    """Records the latest assignment."""

    def __init__(self) -> None:
        self.partitions: set[KafkaTopicPartition] = set()
        self._changed = asyncio.Condition()

    async def on_partitions_revoked(self, revoked: set[KafkaTopicPartition]) -> None:
        self.partitions = set()

    async def on_partitions_assigned(self, assigned: set[KafkaTopicPartition]) -> None:
        async with self._changed:
            self.partitions = assigned
            self._changed.notify_all()

    async def size(self, number: int) -> set[KafkaTopicPartition]:
        async with self._changed:
            await self._changed.wait_for(lambda: len(self.partitions) == number)
        return self.partitions


@asynccontextmanager
async def member(
    broker: Broker, topic: str, group: str, session_ms: int = 6000
) -> AsyncIterator[tuple[Any, Assigned]]:
    assigned = Assigned()
    settings: dict[str, Any] = {
        "group_id": group,
        "heartbeat_interval_ms": 100,
        "session_timeout_ms": session_ms,
    }
    async with consumer(broker, **settings) as client:
        client.subscribe([topic], listener=assigned)
        yield client, assigned


async def test_two_members_share_the_partitions_and_one_takes_all_when_the_other_leaves(
    broker: Broker, topics: Names
) -> None:
    topic, group = topics("t"), topics("g")
    await create(broker, topic, partitions=4)
    async with member(broker, topic, group) as (_, first):
        assert len(await first.size(4)) == 4
        async with member(broker, topic, group) as (_, second):
            mine, theirs = await asyncio.gather(first.size(2), second.size(2))
            assert not mine & theirs
        assert len(await first.size(4)) == 4


async def test_stranger_cannot_commit_while_the_group_has_members(broker: Broker, topics: Names) -> None:
    partition, group = await create(broker, topics("t")), topics("g")
    async with member(broker, partition.topic, group) as (_, assigned):
        await assigned.size(1)
        async with consumer(broker, group_id=group) as stranger:
            stranger.assign([partition])
            with pytest.raises(KafkaError):
                await stranger.commit({partition: OffsetAndMetadata(1, "")})
        assert (await committed(broker, group, partition))[0] == -1


async def test_refused_record_spoils_its_partition_for_an_idempotent_producer(
    broker: Broker, topics: Names
) -> None:
    """aiokafka has used the sequence number, so the size of a record must be checked before it is sent."""
    partition = await create(broker, topics("t"), settings={"max.message.bytes": "10000"})
    async with producer(broker, compression_type=None) as client:
        await client.send_and_wait(partition.topic, b"before", partition=0)
        with pytest.raises(MessageSizeTooLargeError):
            await client.send_and_wait(partition.topic, b"x" * 20_000, partition=0)
        for _ in range(2):
            with pytest.raises(OutOfOrderSequenceNumber):
                await client.send_and_wait(partition.topic, b"after", partition=0)
    assert await values(broker, partition) == [b"before"]


# Behaviour of Apache Kafka only: a test that relies on it must not use the embedded broker.


async def test_commit_metadata_over_the_limit_is_refused(apache_kafka: ApacheKafka, topics: Names) -> None:
    partition, group = await create(apache_kafka, topics("t")), topics("g")
    async with consumer(apache_kafka, group_id=group) as client:
        client.assign([partition])
        with pytest.raises(KafkaError):
            await client.commit({partition: OffsetAndMetadata(0, "x" * 4097)})


async def test_unknown_topic_is_not_made_by_asking(apache_kafka: ApacheKafka, topics: Names) -> None:
    name = topics("never")
    async with producer(apache_kafka, request_timeout_ms=1000) as client:
        with pytest.raises(KafkaError):
            await client.send_and_wait(name, b"x")
    async with admin(apache_kafka) as client:
        assert name not in await client.list_topics()


async def test_transaction_left_open_is_aborted_after_its_timeout(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    events = await create(apache_kafka, topics("events"))
    async with producer(apache_kafka, transactional_id=topics("tx"), transaction_timeout_ms=500) as client:
        await client.begin_transaction()
        await client.send_and_wait(events.topic, b"left", partition=0)
        async with producer(apache_kafka) as plain:
            await plain.send_and_wait(events.topic, b"out", partition=0)
        await until_visible(apache_kafka, events, [b"out"])
        with pytest.raises(ProducerFenced):
            await client.commit_transaction()


async def test_partitions_of_a_member_that_vanished_move_when_its_session_ends(
    apache_kafka: ApacheKafka, topics: Names
) -> None:
    topic, group = topics("t"), topics("g")
    await create(apache_kafka, topic, partitions=2)

    async def vanish() -> None:
        """Replace LeaveGroup: a killed process does not send it."""

    async with member(apache_kafka, topic, group, session_ms=1000) as (client, first):
        await first.size(2)
        client._coordinator._maybe_leave_group = vanish
    async with member(apache_kafka, topic, group, session_ms=1000) as (_, second):
        assert len(await second.size(2)) == 2


@pytest.mark.long
@pytest.mark.parametrize("down", ["restart", "kill"])
async def test_apache_kafka_has_its_records_after_a_restart(
    apache_kafka: ApacheKafka, topics: Names, down: str
) -> None:
    partition = await create(apache_kafka, topics("t"))
    async with producer(apache_kafka) as client:
        await client.send_and_wait(partition.topic, b"before", partition=0)
        if down == "kill":
            apache_kafka.kill()
        apache_kafka.restart()
        await client.send_and_wait(partition.topic, b"after", partition=0)
    assert await values(apache_kafka, partition) == [b"before", b"after"]


async def test_paused_apache_kafka_answers_after_resume(apache_kafka: ApacheKafka, topics: Names) -> None:
    partition = await create(apache_kafka, topics("t"))
    async with producer(apache_kafka) as client:
        await client.partitions_for(partition.topic)  # `send` would ask the paused broker for them
        apache_kafka.pause()
        sent = await client.send(partition.topic, b"late", partition=0)
        assert not (await asyncio.wait({sent}, timeout=0.3))[0]
        apache_kafka.resume()
        await sent
    assert await values(apache_kafka, partition) == [b"late"]
