"""Ids that choose their gateway: a gateway makes ids whose events fall into a few partitions, its home partitions.

A gateway then reads these partitions only, and not nearly all of them for a few hundred jobs anywhere.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

__all__ = ["draw_id", "home_partitions"]

_DRAWS_PER_PARTITION = 64
"""A bound of the draws, in multiples of their expected number with one home partition. It is reached once in 10^27."""


def home_partitions(name: str, count: int, partitions: int) -> frozenset[int]:
    """Return `count` of `partitions` partitions by rendezvous hashing of the gateway's name.

    Each name has its own choice, which changes little when partitions are added.
    """
    by_weight = sorted(range(partitions), key=lambda number: _weight(name, number), reverse=True)
    return frozenset(by_weight[:count])


def draw_id(
    draw: Callable[[], str], partition_of: Callable[[bytes], int], home: Collection[int], partitions: int
) -> str:
    """Return an id in a home partition. `draw` returns a new id each time; without home partitions, any id will do."""
    job_id = draw()
    for _ in range(_DRAWS_PER_PARTITION * partitions if home else 0):
        if partition_of(job_id.encode()) in home:
            break
        job_id = draw()
    return job_id


def _weight(name: str, number: int) -> bytes:
    return blake2b(f"{name}/{number}".encode(), digest_size=8).digest()
