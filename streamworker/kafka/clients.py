"""aiokafka's clients as small protocols, and their creation.

aiokafka is untyped. Each client is cast to its protocol once, where it is created.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol, cast

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaConnectionError, KafkaTimeoutError
from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.kafka.compat import (
    abandon_batches,
    client_of,
    install_client,
    retry_first_requests_quickly,
    unreachable_brokers,
)
from streamworker.kafka.connection import RotatedSecrets, client_arguments
from streamworker.model import ConsumerRecord, Coordinates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from aiokafka import ConsumerRebalanceListener
    from aiokafka import TopicPartition as KafkaTopicPartition
    from aiokafka.admin import NewTopic
    from aiokafka.structs import OffsetAndMetadata, OffsetAndTimestamp

    from streamworker.config import KafkaSettings
    from streamworker.kafka.record_batch import RecordBatch

__all__ = [
    "BATCH_BYTES",
    "Admin",
    "Consumer",
    "FetchedRecord",
    "Producer",
    "close_consumer",
    "close_producer",
    "known_partitions",
    "new_admin",
    "new_consumer",
    "new_producer",
    "new_transactional_producer",
    "record_of",
    "start_producer",
]

BATCH_BYTES = 256 << 10
"""Payload of one batch. Larger than the 16 KB at which aiokafka's senders queue up (aiokafka #528), and small enough
for the default `max.message.bytes` of a topic."""

_ABANDON_TIMEOUT_S = 1.0
_NO_CLIENT_LIMIT = 1 << 30  # the broker checks each record against the topic's own limit


class FetchedRecord(Protocol):
    """A record as the consumer returns it."""

    topic: str
    partition: int
    offset: int
    timestamp: int
    timestamp_type: int
    key: bytes | None
    value: bytes | None
    headers: Sequence[tuple[str, bytes | None]]


class Consumer(Protocol):
    """`AIOKafkaConsumer`. Methods raise aiokafka's KafkaError."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    def subscribe(self, topics: Sequence[str], *, listener: ConsumerRebalanceListener) -> None: ...
    def assign(self, partitions: Sequence[KafkaTopicPartition]) -> None: ...
    def seek(self, partition: KafkaTopicPartition, offset: int) -> None: ...
    def pause(self, *partitions: KafkaTopicPartition) -> None: ...
    def resume(self, *partitions: KafkaTopicPartition) -> None: ...
    def unsubscribe(self) -> None: ...
    def highwater(self, partition: KafkaTopicPartition) -> int | None: ...
    def last_stable_offset(self, partition: KafkaTopicPartition) -> int | None: ...
    async def getmany(
        self, *partitions: KafkaTopicPartition, timeout_ms: int, max_records: int
    ) -> dict[KafkaTopicPartition, list[FetchedRecord]]: ...
    async def seek_to_beginning(self, *partitions: KafkaTopicPartition) -> bool: ...
    async def seek_to_end(self, *partitions: KafkaTopicPartition) -> bool: ...
    async def position(self, partition: KafkaTopicPartition) -> int: ...
    async def beginning_offsets(
        self, partitions: Sequence[KafkaTopicPartition]
    ) -> dict[KafkaTopicPartition, int]: ...
    async def end_offsets(
        self, partitions: Sequence[KafkaTopicPartition]
    ) -> dict[KafkaTopicPartition, int]: ...
    async def offsets_for_times(
        self, timestamps: Mapping[KafkaTopicPartition, int]
    ) -> dict[KafkaTopicPartition, OffsetAndTimestamp | None]: ...
    async def commit(self, offsets: Mapping[KafkaTopicPartition, OffsetAndMetadata]) -> None: ...


class Producer(Protocol):
    """`AIOKafkaProducer`. Methods raise aiokafka's KafkaError."""

    async def start(self) -> None: ...
    async def stop(self) -> None: ...
    async def flush(self) -> None: ...
    async def partitions_for(self, topic: str) -> set[int]: ...
    async def send_batch(self, batch: RecordBatch, topic: str, *, partition: int) -> asyncio.Future[Any]: ...
    async def send(
        self,
        topic: str,
        value: bytes | None,
        *,
        key: bytes | None,
        partition: int,
        headers: list[tuple[str, bytes | None]],
    ) -> asyncio.Future[Any]: ...
    async def begin_transaction(self) -> None: ...
    async def send_offsets_to_transaction(
        self, offsets: Mapping[KafkaTopicPartition, OffsetAndMetadata], group_id: str
    ) -> None: ...
    async def commit_transaction(self) -> None: ...


class Admin(Protocol):
    """`AIOKafkaAdminClient`. Methods raise aiokafka's KafkaError."""

    async def start(self) -> None: ...
    async def close(self) -> None: ...
    async def describe_topics(self, topics: list[str] | None = None) -> list[dict[str, Any]]: ...
    async def create_topics(self, new_topics: list[NewTopic]) -> Any: ...
    async def delete_topics(self, topics: list[str]) -> Any: ...
    async def describe_configs(self, config_resources: list[Any]) -> list[Any]: ...
    async def describe_cluster(self) -> dict[str, Any]: ...
    async def list_consumer_group_offsets(
        self, group_id: str, *, partitions: list[KafkaTopicPartition] | None = None
    ) -> dict[KafkaTopicPartition, OffsetAndMetadata]: ...


def new_consumer(settings: KafkaSettings, **arguments: Any) -> Consumer:
    """Create a consumer that does not commit by itself. Raises ConfigurationError."""
    consumer = AIOKafkaConsumer(**client_arguments(settings) | {"enable_auto_commit": False} | arguments)
    install_client(consumer, RotatedSecrets(settings))
    return cast("Consumer", consumer)


def new_producer(settings: KafkaSettings, **arguments: Any) -> Producer:
    """Create an idempotent producer. Raises ConfigurationError."""
    ours = {
        "enable_idempotence": True,  # implies acks=all
        "compression_type": None if settings.compression == "none" else settings.compression,
        "max_batch_size": 2 * BATCH_BYTES,  # of a transaction's records; BATCH_BYTES is without framing
        "max_request_size": _NO_CLIENT_LIMIT,
    }
    producer = AIOKafkaProducer(**client_arguments(settings) | ours | arguments)
    install_client(producer, RotatedSecrets(settings))
    return cast("Producer", producer)


def new_transactional_producer(
    settings: KafkaSettings, transactional_id: str, transaction_timeout_s: float
) -> Producer:
    """Create a producer whose `start` fences the former producer of the id. Raises ConfigurationError."""
    producer = new_producer(
        settings,
        transactional_id=transactional_id,
        transaction_timeout_ms=round(transaction_timeout_s * 1000),
    )
    retry_first_requests_quickly(producer)
    return producer


def new_admin(settings: KafkaSettings) -> Admin:
    """Create an admin client. Raises ConfigurationError."""
    admin = AIOKafkaAdminClient(**client_arguments(settings))
    install_client(admin, RotatedSecrets(settings))
    return cast("Admin", admin)


async def close_consumer(consumer: Consumer, timeout_s: float) -> None:
    """Stop a consumer. Bounded in time; never raises an error of Kafka."""
    with suppress(TimeoutError, ForeignKafkaError):
        async with asyncio.timeout(timeout_s):
            await consumer.stop()


def known_partitions(producer: Producer, topic: str) -> int:
    """Return how many partitions a topic has in the producer's current metadata; 0 if it is not there."""
    return len(client_of(producer).cluster.partitions_for_topic(topic) or ())


async def start_producer(producer: Producer, timeout_s: float) -> None:
    """Start a producer. Raises aiokafka's KafkaError, also when `timeout_s` is over.

    `AIOKafkaProducer.start` has no time limit: it asks for a producer id until a broker answers.
    """
    try:
        async with asyncio.timeout(timeout_s):
            await producer.start()
    except TimeoutError:
        text = f"no broker answered within {timeout_s:g} s"
        if brokers := unreachable_brokers(producer):
            raise KafkaConnectionError(f"{text} ({brokers})") from None
        # Not a KafkaConnectionError: advice on TLS is added to those, and the connections are there.
        raise KafkaTimeoutError(
            f"{text}: the brokers accept connections; check whether their processes hang or are stopped, and their logs"
        ) from None


async def close_producer(producer: Producer | None, timeout_s: float) -> None:
    """Stop a producer and close its connections; abandon its batches after `timeout_s`. Never raises."""
    if producer is None:
        return
    stopping = asyncio.create_task(producer.stop())
    try:
        await asyncio.wait([stopping], timeout=timeout_s)
    finally:
        if not stopping.done():
            abandon_batches(producer)
            await asyncio.wait([stopping], timeout=_ABANDON_TIMEOUT_S)
        if not stopping.done() or stopping.cancelled() or stopping.exception() is not None:
            stopping.cancel()
            with suppress(
                Exception
            ):  # `stop` raises the error of a sender that failed before it closes anything
                await client_of(producer).close()


def record_of(record: FetchedRecord) -> ConsumerRecord:
    """Convert a record of aiokafka."""
    return ConsumerRecord(
        at=Coordinates(record.topic, record.partition, record.offset),
        timestamp=record.timestamp,
        key=record.key,
        value=record.value,
        headers=tuple(record.headers),
    )
