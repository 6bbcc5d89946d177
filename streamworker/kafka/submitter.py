"""Submit jobs in transactions: another producer of the same transactional id fences this one (KIP-98).

A batch uses it so that at most one process submits the lines of a run. Where transactions are not wanted
(`delivery = "at_least_once"`), `PlainSubmitter` has the same methods and fences nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from aiokafka.errors import KafkaError as ForeignKafkaError

from streamworker.errors import KafkaUnavailable
from streamworker.kafka.clients import (
    close_producer,
    new_producer,
    new_transactional_producer,
    start_producer,
)
from streamworker.kafka.errors import translate_errors
from streamworker.kafka.partitioner import partition_of
from streamworker.kafka.transactions import TRANSACTION_TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streamworker.config import KafkaSettings
    from streamworker.kafka.clients import Producer

__all__ = ["PlainSubmitter", "TransactionalSubmitter"]

_CLOSE_TIMEOUT_S = 2.0


class PlainSubmitter:
    """Writes chunks of records to one topic with an idempotent producer."""

    def __init__(self, settings: KafkaSettings, topic: str, partitions: int) -> None:
        self._settings = settings
        self._topic = topic
        self._partitions = partitions
        self._producer: Producer | None = None

    async def open(self) -> None:
        """Connect. Raises KafkaError."""
        await self.close()
        producer = self._new()
        try:
            with translate_errors(self._opening):
                await start_producer(producer, self._settings.request_timeout_s)
        except BaseException:
            await close_producer(producer, _CLOSE_TIMEOUT_S)
            raise
        self._producer = producer

    async def close(self) -> None:
        """Close the producer. Bounded in time; never raises."""
        producer, self._producer = self._producer, None
        await close_producer(producer, _CLOSE_TIMEOUT_S)

    async def submit(self, records: Sequence[tuple[bytes, bytes]]) -> dict[int, int]:
        """Write keys and values; return the offset after the last of them, by partition.

        After any failure it is unknown whether they were written, and `open` must be called before the next `submit`.

        Raises:
            Fenced: another process has opened the transactional id, or the broker has aborted a slow transaction.
            RecordTooLarge: the broker refuses one of the records.
            KafkaError: another failure.
        """
        producer = self._producer
        if producer is None:
            raise KafkaUnavailable(f"the producer of {self._topic} is not open")
        sent: list[asyncio.Future[Any]] = []
        ends: dict[int, int] = {}
        with translate_errors(f"writing to {self._topic}"):
            try:
                async with asyncio.timeout(self._settings.request_timeout_s * 2):
                    await self._begin(producer)
                    for key, value in records:
                        partition = partition_of(key, self._partitions)
                        sent.append(
                            await producer.send(self._topic, value, key=key, partition=partition, headers=[])
                        )
                    for metadata in await asyncio.gather(*sent):
                        ends[metadata.partition] = max(ends.get(metadata.partition, 0), metadata.offset + 1)
                    await self._commit(producer)
            finally:
                for future in sent:
                    future.add_done_callback(_retrieve_exception)
        return ends

    @property
    def _opening(self) -> str:
        return f"connecting a producer to {self._settings.bootstrap_servers}"

    def _new(self) -> Producer:
        return new_producer(self._settings)

    async def _begin(self, producer: Producer) -> None: ...
    async def _commit(self, producer: Producer) -> None: ...


class TransactionalSubmitter(PlainSubmitter):
    """Writes each chunk of records in one transaction. `open` fences the former producer of the transactional id."""

    def __init__(self, settings: KafkaSettings, topic: str, partitions: int, transactional_id: str) -> None:
        super().__init__(settings, topic, partitions)
        self._id = transactional_id

    @property
    def _opening(self) -> str:
        return f"fencing other runs (transactional id {self._id}) at {self._settings.bootstrap_servers}"

    def _new(self) -> Producer:
        return new_transactional_producer(self._settings, self._id, TRANSACTION_TIMEOUT_S)

    async def _begin(self, producer: Producer) -> None:
        try:
            await producer.begin_transaction()
        except AssertionError as error:  # aiokafka checks the producer's state by assert
            raise ForeignKafkaError(f"the producer cannot begin a transaction: {error}") from error

    async def _commit(self, producer: Producer) -> None:
        await producer.commit_transaction()


def _retrieve_exception(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()
