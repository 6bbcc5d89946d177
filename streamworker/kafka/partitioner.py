"""Which partition a key belongs to, as Kafka's default partitioner says (murmur2, Java compatible)."""

from __future__ import annotations

from aiokafka.partitioner import murmur2

__all__ = ["partition_of"]


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a key among so many. Asked once per job: pure Python costs microseconds per call."""
    return int(murmur2(key) & 0x7FFFFFFF) % partitions
