"""Read a topic as it is now, and write single job records again: for `audit`, `dlq` and `retry`."""

from __future__ import annotations

from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from streamworker.cli.shared import waiting, within
from streamworker.errors import RecordTooLarge
from streamworker.kafka.log import open_log
from streamworker.model import TopicPartition

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.config import KafkaSettings
    from streamworker.kafka.sink import KafkaSink
    from streamworker.model import ConsumerRecord, Coordinates, ProducerRecord

__all__ = ["home_of", "records_of", "write"]


async def records_of(
    settings: KafkaSettings, topic: str, timeout_s: float, *, committed_only: bool = True
) -> AsyncIterator[ConsumerRecord]:
    """Yield the records that a topic holds now, each waited for at most `timeout_s`. Raises KafkaError."""
    async with AsyncExitStack() as stack:
        async with waiting(f"opening {topic} at {settings.bootstrap_servers}", timeout_s):
            log = await stack.enter_async_context(open_log(settings, topic, committed_only=committed_only))
        records = log.snapshot([TopicPartition(topic, number) for number in log.partitions])
        async for record in within(records, f"reading {topic}", timeout_s):
            yield record


def home_of(sink: KafkaSink, source: Coordinates, key: bytes | None) -> TopicPartition:
    """Return the partition to which a job record belongs: that of its key, or of its coordinates if it has none.

    Raises KafkaRefused for an unknown topic.
    """
    return sink.partition_for(source.topic, key if key is not None else str(source).encode())


async def write(sink: KafkaSink, record: ProducerRecord) -> str | None:
    """Write a record and wait for the acknowledgement; return the reason if the broker refused it."""
    receipt = sink.receipt()
    sink.publish(record, receipt)
    try:
        await receipt.settled()
    except RecordTooLarge as error:
        return str(error)
    return None
