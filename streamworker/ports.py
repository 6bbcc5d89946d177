"""The ends of the pipe, as small protocols. `worker` calls these; `kafka` and `upstream` implement them.

What an adapter may raise is part of its contract; anything else is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from streamworker.model import (
        CommitPoint,
        ConsumerRecord,
        ProducerRecord,
        TopicPartition,
    )

__all__ = [
    "Answer",
    "Assignments",
    "Clock",
    "CommitStore",
    "CommitStores",
    "Receipt",
    "Sink",
    "Source",
    "Upstream",
]


class Clock(Protocol):
    """Time, so that tests can turn it."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch, for what others read."""
        ...

    def monotonic(self) -> float:
        """Seconds of a clock that never jumps, for waiting."""
        ...


class Assignments(Protocol):
    """Is told which partitions are ours. Called in the consumer's own task: it must return at once."""

    def rebalancing(self) -> None:
        """The group calls its members together; what is ours is known when `assigned` is called."""
        ...

    def assigned(self, partitions: frozenset[TopicPartition], *, is_continuous: bool) -> None:
        """These are ours now, all of them.

        `is_continuous` is false when we were out of the group in between: another worker may have owned, and given
        back, what we still think ours.
        """
        ...


class Source(Protocol):
    """The consumer group's side of the job topics."""

    async def start(self, assignments: Assignments) -> None:
        """Join the group. Raises KafkaError."""
        ...

    async def receive(self, partitions: Collection[TopicPartition], limit: int) -> list[ConsumerRecord]:
        """Return records of these partitions, at most `limit`, waiting a moment for them. Raises KafkaError.

        Without partitions it returns at once; it is called all the same, so that the group's errors are seen.
        """
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from here on."""
        ...

    async def confirm_membership(self) -> bool:
        """Ask the group's coordinator whether we still are a member. Raises KafkaError where it cannot tell now."""
        ...

    async def stop(self) -> None:
        """Leave the group. Bounded in time."""
        ...


class Receipt(Protocol):
    """What one job is owed by the sink: the acknowledgement of everything it published."""

    async def settled(self) -> None:
        """Wait until every record is acknowledged. Raises RecordTooLarge if the broker refused one."""
        ...


class Sink(Protocol):
    """Where deltas go: in order per partition, acknowledged by all in-sync replicas."""

    def receipt(self) -> Receipt:
        """Open an account for a job."""
        ...

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        """Take a record. Never waits; ask `has_room` first and wait for `room` if it says no."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether the broker keeps up. While it does not, whoever has more to publish waits."""
        ...

    async def room(self) -> None:
        """Wait until there is room."""
        ...

    def partition_for(self, topic: str, key: bytes) -> TopicPartition:
        """Choose the partition as Kafka's default partitioner does. Raises KafkaRefused for an unknown topic."""
        ...


class CommitStore(Protocol):
    """How one assigned partition's progress becomes durable."""

    async def open(self) -> CommitPoint:
        """Shut out the former owner, then read what was committed, or where the log begins. Raises KafkaError."""
        ...

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> None:
        """Write the records and the point. Retries what may pass by itself.

        Raises:
            Fenced: another worker owns the partition; nothing was written.
            RecordTooLarge: one of the records is refused; nothing was written.
        """
        ...

    async def close(self) -> None:
        """Let go. Bounded in time; never raises."""
        ...


class CommitStores(Protocol):
    """Makes a committer per assigned partition."""

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new one, not opened."""
        ...


class Answer(Protocol):
    """An upstream's answer: the body of its event stream, as it comes."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Go through the body. Raises UpstreamError when the connection breaks."""
        ...

    async def drain(self) -> None:
        """After the end was seen: read on for a moment, so that the connection can serve the next call."""
        ...


class Upstream(Protocol):
    """One configured upstream."""

    def call(self, body: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Open a streaming completion; entering waits for the answer. Raises UpstreamError.

        Leaving before the end of the body closes the connection, so that the upstream stops generating.
        """
        ...
