"""Kafka's records and coordinates as values."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

__all__ = ["CommitPoint", "ConsumerRecord", "Coordinates", "Headers", "ProducerRecord", "TopicPartition"]

Headers = tuple[tuple[str, bytes | None], ...]
"""Kafka record headers. Names may repeat; values are bytes or null."""


class TopicPartition(NamedTuple):
    """A topic and a partition number."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"


class Coordinates(NamedTuple):
    """The position of one record in the log."""

    topic: str
    partition: int
    offset: int

    @property
    def topic_partition(self) -> TopicPartition:
        """The topic-partition that holds the record."""
        return TopicPartition(self.topic, self.partition)

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}-{self.offset}"


class CommitPoint(NamedTuple):
    """What is committed for a partition: the next offset to read, and the offset map as metadata."""

    offset: int
    metadata: str = ""


class ConsumerRecord(msgspec.Struct, frozen=True):
    """A record as fetched, not decoded. `timestamp` is in ms since the epoch; 0 or less if it is unknown.

    `unreadable` is the reason why the record could not be parsed; key, value and headers are then unknown.
    """

    at: Coordinates
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    unreadable: str | None = None

    @property
    def topic_partition(self) -> TopicPartition:
        """The topic-partition that holds the record."""
        return self.at.topic_partition


class ProducerRecord(msgspec.Struct, frozen=True, gc=False):
    """A record to be produced. All events of a job use one `topic_partition`, chosen once per job.

    `known_size` is the `size` where the writer knows it: it is asked for several times per delta.
    """

    topic_partition: TopicPartition
    key: bytes | None
    value: bytes | None
    headers: Headers = ()
    known_size: int = 0

    @property
    def size(self) -> int:
        """Size of key, value and headers in bytes, without Kafka's framing."""
        if self.known_size:
            return self.known_size
        size = len(self.key or b"") + len(self.value or b"")
        for (
            name,
            value,
        ) in self.headers:  # called once per delta, where a generator expression takes three times as long
            size += len(name) + len(value or b"")
        return size
