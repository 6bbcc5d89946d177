"""What Kafka stores, as values: coordinates, records in, records out."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

__all__ = ["CommitPoint", "ConsumerRecord", "Coordinates", "Headers", "ProducerRecord", "TopicPartition"]

Headers = tuple[tuple[str, bytes | None], ...]
"""Kafka record headers: names may repeat, values are bytes or null."""


class TopicPartition(NamedTuple):
    """A topic-partition."""

    topic: str
    partition: int

    def __str__(self) -> str:
        return f"{self.topic}-{self.partition}"


class Coordinates(NamedTuple):
    """Where one record lies in the log."""

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
    """What is committed for a partition: the next offset to read, and the offset map in the metadata."""

    offset: int
    metadata: str = ""


class ConsumerRecord(msgspec.Struct, frozen=True):
    """A record as it was fetched: bytes, nothing decoded. `timestamp` is in ms since the epoch."""

    at: Coordinates
    timestamp: int
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @property
    def topic_partition(self) -> TopicPartition:
        """The topic-partition that holds the record."""
        return self.at.topic_partition


class ProducerRecord(msgspec.Struct, frozen=True, gc=False):
    """A record to be written. `to` is chosen once per job, so that a job's events stay in one partition."""

    topic_partition: TopicPartition
    key: bytes | None
    value: bytes | None
    headers: Headers = ()

    @property
    def size(self) -> int:
        """Bytes of payload, without Kafka's few bytes of framing."""
        size = len(self.key or b"") + len(self.value or b"")
        for name, value in self.headers:  # asked for each delta: a generator would cost thrice as much
            size += len(name) + len(value or b"")
        return size
