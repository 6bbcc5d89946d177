"""The interfaces of Kafka, upstreams and the clock. `worker` calls them; `kafka` and `upstream` implement them.

The exceptions that a method documents are part of its contract; any other exception is a bug.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from streamworker.model import (
        CommitPoint,
        ConsumerRecord,
        Headers,
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
    "Series",
    "Sink",
    "Source",
    "Upstream",
]


class Clock(Protocol):
    """The current time. Tests replace it."""

    def now_ms(self) -> int:
        """Return the time in ms since the epoch, for events and logs."""
        ...

    def monotonic(self) -> float:
        """Return the time in seconds on a monotonic clock, for timeouts."""
        ...


class Assignments(Protocol):
    """Is notified of the consumer's assignment. The consumer's task calls it, so methods must return at once."""

    def rebalancing(self) -> None:
        """A rebalance began. No record may be accepted until `assigned` is called, which ends it."""
        ...

    def busy_partitions(self) -> frozenset[TopicPartition]:
        """Return the partitions that another owner could not take over without repeating work."""
        ...

    def assigned(
        self,
        partitions: frozenset[TopicPartition],
        *,
        kept: frozenset[TopicPartition],
        promised: frozenset[TopicPartition],
    ) -> None:
        """The rebalance ended; the worker owns exactly these partitions.

        The jobs of the `kept` ones continue. Each other one must be opened anew, even if the worker still holds it:
        another worker may have owned it in between. The `promised` ones move to another worker when their open jobs
        have ended: no more records of them may be accepted.
        """
        ...

    def log_reset(self, partition: TopicPartition, reason: str) -> None:
        """The log of a partition is not the one that was read before: its offsets mean other records now.

        The open jobs are released and the partition is taken over anew; its commit store then returns the offset at
        which reading goes on.
        """
        ...


class Source(Protocol):
    """The consumer group's side of the job topics."""

    async def start(self, assignments: Assignments) -> None:
        """Join the group. Raises KafkaError."""
        ...

    async def receive(self, partitions: Collection[TopicPartition], limit: int) -> list[ConsumerRecord]:
        """Return records of these partitions, at most `limit`, waiting briefly for them. Raises KafkaError.

        Without partitions it returns at once. The worker calls it even then, so that it notices errors of the
        group.
        """
        ...

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from `offset` on."""
        ...

    def position(self, partition: TopicPartition) -> int | None:
        """Return the offset that is read next, after transaction markers and aborted records; None if unknown."""
        ...

    def read_back(
        self, partition: TopicPartition, start: int, stop: int
    ) -> AsyncGenerator[Sequence[ConsumerRecord]]:
        """Iterate over the committed records from `start` to before `stop`, in batches; the position stays.

        Records that the log has deleted are left out. Raises KafkaError.
        """
        ...

    def announce_departure(self) -> None:
        """Ask the group to move this member's partitions as soon as they have no open jobs, because it will leave."""
        ...

    async def confirm_membership(self) -> bool:
        """Ask the coordinator whether this consumer is a member. Raises KafkaError if the coordinator cannot
        be asked."""
        ...

    async def stop(self) -> None:
        """Leave the group. Returns within a bounded time."""
        ...


class Receipt(Protocol):
    """The acknowledgements that are outstanding for one job's published records."""

    offset: int | None
    """The offset of the record that was acknowledged last; None if it is not known."""

    async def settled(self) -> None:
        """Wait until every record is acknowledged. Raises RecordTooLarge if the broker rejected one."""
        ...


class Series(Protocol):
    """Publishes a job's records that differ in their value alone."""

    def publish(self, value: bytes) -> int:
        """Queue a record; return its size in bytes. Never waits, as `Sink.publish`."""
        ...


class Sink(Protocol):
    """Publishes deltas: in order per partition, acknowledged by all in-sync replicas."""

    def receipt(self) -> Receipt:
        """Return an empty receipt for one job."""
        ...

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        """Queue a record. Never waits: check `has_room` first, and wait for `room` if it is false."""
        ...

    def series(self, to: TopicPartition, key: bytes, headers: Headers, receipt: Receipt) -> Series:
        """Return the publisher of a job's records that have this partition, key and headers."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether the broker keeps up. If not, publishers must wait for `room`."""
        ...

    async def room(self) -> None:
        """Wait until `has_room` is true."""
        ...

    def partition_for(self, topic: str, key: bytes) -> TopicPartition:
        """Return the partition that Kafka's default partitioner chooses. Raises KafkaRefused for an unknown
        topic."""
        ...


class CommitStore(Protocol):
    """Makes one assigned partition's progress durable."""

    async def open(self) -> CommitPoint:
        """Fence the former owner, then return the committed point, or the log's start. Raises KafkaError."""
        ...

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> Sequence[int | None]:
        """Write the records and the point atomically; return the records' offsets. Retries transient errors.

        An offset is None if it is not known.

        Raises:
            Fenced: another worker owns the partition; nothing was written.
            RecordTooLarge: the broker rejected one of the records, or all of them at once; nothing was committed.
            MetadataTooLarge: the broker rejected the point's metadata; nothing was committed.
        """
        ...

    async def close(self) -> None:
        """Release the partition. Returns within a bounded time and never raises."""
        ...


class CommitStores(Protocol):
    """Creates a commit store per assigned partition."""

    @property
    def metadata_limit(self) -> int:
        """Bytes of metadata that a commit may have: the broker's `offset.metadata.max.bytes`."""
        ...

    def store(self, partition: TopicPartition) -> CommitStore:
        """Return a new commit store, not yet opened."""
        ...


class Answer(Protocol):
    """An upstream's response with a success status: its body, in the pieces in which it arrives.

    The body is an event stream or a JSON document; `content_type` is what the upstream says that it is. The body is
    either iterated over or pushed to one subscriber.
    """

    status: int
    content_type: str

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the body. Raises UpstreamError if the connection breaks."""
        ...

    def subscribe(self, on_data: Callable[[bytes], None], on_end: Callable[[Exception | None], None]) -> None:
        """Call `on_data` with each piece, where possible from the loop's read callback, and `on_end` once.

        `on_end` gets None at the end of the body, or what iterating would raise: UpstreamError if the connection
        breaks. Pieces that have already arrived are delivered by this call. Neither callback may raise.
        """
        ...

    def pause_reading(self) -> None:
        """Stop reading, so that the upstream is slowed down. `on_data` is not called until `resume_reading`."""
        ...

    def resume_reading(self) -> None:
        """Resume reading."""
        ...

    async def drain(self) -> None:
        """Let the rest of the body arrive for a moment after the stream's end, so that the connection can be reused."""
        ...


class Upstream(Protocol):
    """One configured upstream."""

    def call(self, body: bytes, headers: Mapping[str, str]) -> AbstractAsyncContextManager[Answer]:
        """Open a streaming completion; entering waits for the response's head. Raises UpstreamError.

        A response without a success status raises, too.

        Leaving before the end of the body closes the connection, so that the upstream stops generating.
        """
        ...
