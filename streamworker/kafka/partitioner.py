"""Compute the partition of a key as Kafka's default partitioner does (murmur2 of the key's bytes)."""

from __future__ import annotations

from aiokafka.partitioner import murmur2

__all__ = ["partition_of"]


def partition_of(key: bytes, partitions: int) -> int:
    """Return the partition of a key in a topic with `partitions` partitions.

    The implementation is pure Python and takes microseconds, so it is called once per job and not per event.
    """
    return int(murmur2(key) & 0x7FFFFFFF) % partitions
