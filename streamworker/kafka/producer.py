"""One idempotent producer that is replaced when it can no longer be used."""

from __future__ import annotations

import asyncio
from time import monotonic
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import KafkaRefused
from streamworker.kafka.clients import close_producer, known_partitions, new_producer, start_producer
from streamworker.kafka.compat import fetch_all_metadata
from streamworker.kafka.errors import translate_errors
from streamworker.log_throttle import LogThrottle

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.config import KafkaSettings
    from streamworker.kafka.acls import RequiredAcls
    from streamworker.kafka.clients import Producer

__all__ = ["ReplaceableProducer"]

_CLOSE_TIMEOUT_S = 2.0
_BACKOFF_S = 0.2

log = structlog.get_logger()


class ReplaceableProducer:
    """The producer of the sink.

    A failed batch makes aiokafka's producer useless for its partition: the sequence number was advanced, and the broker
    refuses every later batch (aiokafka #1017). Senders of other partitions may use the old producer until it is idle.
    """

    def __init__(
        self, settings: KafkaSettings, topics: Iterable[str], acls: RequiredAcls | None = None
    ) -> None:
        self._settings = settings
        self._topics = tuple(topics)
        self._acls = acls
        self._current: Producer | None = None
        self._partitions: dict[
            str, int
        ] = {}  # topic -> number of partitions in the last metadata that had it
        self._replacing = asyncio.Lock()
        self._replacements = LogThrottle()
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> Producer:
        """The producer to use for the next batch."""
        assert self._current is not None, "the producer is not started"
        return self._current

    async def start(self) -> None:
        """Connect, and read how many partitions each topic has. Raises KafkaError."""
        self._current = await self._new()

    async def require(self, topic: str) -> None:
        """Read how many partitions a topic has. Raises KafkaRefused for a topic that does not exist.

        `start` waits for its topics: aiokafka asks for a missing topic again for as long as a request may take.
        """
        with translate_errors(f"reading the partitions of topic {topic}", self._acls):
            cluster = await fetch_all_metadata(self.current)
        if not (partitions := cluster.partitions_for_topic(topic)):
            raise KafkaRefused(
                f"topic {topic} does not exist: create it with `streamworker topics create`; or the ACL to describe it "
                "is missing"
            )
        self._partitions[topic] = len(partitions)

    async def stop(self) -> None:
        """Close every producer. Bounded in time; never raises."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(
            close_producer(self._current, _CLOSE_TIMEOUT_S), *self._retiring, return_exceptions=True
        )

    async def replace(self, failed: Producer) -> None:
        """Replace a failed producer; do nothing if that was done already. Raises KafkaError."""
        async with self._replacing:
            if self._current is not failed:
                return
            await asyncio.sleep(_BACKOFF_S)
            self._current = await self._new()
            task = asyncio.create_task(self._retire(failed))
            self._retiring.add(task)
            task.add_done_callback(self._retiring.discard)
            if (fields := self._replacements.failed(monotonic())) is not None:
                log.warning("sink.producer_replaced", **fields)

    def partitions(self, topic: str) -> int | None:
        """Return the number of partitions of a topic; None if the topic is unknown.

        The last known number is kept: a broker that has just started may not know its topics yet.
        """
        if found := known_partitions(self.current, topic):
            self._partitions[topic] = found
        return self._partitions.get(topic)

    async def _new(self) -> Producer:
        producer = new_producer(self._settings)
        try:
            with translate_errors(f"connecting a producer to {self._settings.bootstrap_servers}", self._acls):
                await start_producer(producer, self._settings.request_timeout_s)
            for topic in self._topics:
                with translate_errors(f"reading the partitions of topic {topic}", self._acls):
                    self._partitions[topic] = len(await producer.partitions_for(topic))
        except BaseException:
            await close_producer(producer, _CLOSE_TIMEOUT_S)
            raise
        return producer

    async def _retire(self, failed: Producer) -> None:
        """Close a producer after the batches of its other partitions were written, however long that takes."""
        try:
            await failed.flush()
        finally:
            await close_producer(failed, _CLOSE_TIMEOUT_S)
