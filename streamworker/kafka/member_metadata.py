"""Encode what a member reports to the leader of its group, and what the leader assigns.

Both are fields behind those of aiokafka's sticky assignor. A member's user data is aiokafka's `StickyAssignorUserDataV1` (its partitions and their generation) and then::

    "sw1"   flags (1 byte, bit 0: leaving)   busy (bitmap)   sealed (bitmap)

A bitmap has one bit for each partition, in the order in which the sticky part lists them, the first one in the lowest
bit of the first byte. The user data of an assignment is::

    "sw1"   last generation (signed, 4 bytes, big-endian)   promised (bitmap, in the assignment's order)
            flags (1 byte, bit 0: a partition of any member is promised; absent in earlier versions)

aiokafka's decoder ignores bytes behind its own, so a leader of the previous version reads our members, and a member of
the previous version reads our assignments. Fields that are absent, damaged or of another version are ignored: their
sender is read as a member, or a leader, of the previous version. A later version may append fields behind the bitmaps.
"""

from __future__ import annotations

from io import BytesIO
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyAssignorUserDataV1
from aiokafka.coordinator.protocol import ConsumerProtocolMemberAssignment, ConsumerProtocolMemberMetadata

from streamworker.model import TopicPartition
from streamworker.progress.moves import Assignment, Claim

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from collections.abc import Set as AbstractSet

__all__ = ["Decision", "decode_assignment", "decode_claim", "encode_assignment", "encode_claim"]

_VERSION = 0
_MAGIC = b"sw1"
_LEAVING = 1
_MOVING = 1


class Decision(NamedTuple):
    """An assignment as a member reads it. `last_generation` is None if the leader is of the previous version.

    `is_moving` says that a partition of some member is promised to another one.
    """

    assignment: Assignment
    last_generation: int | None
    is_moving: bool = False


def encode_claim(claim: Claim) -> ConsumerProtocolMemberMetadata:
    """Write what a member reports: 4 bytes for each partition that it owns, and a quarter of a byte."""
    owned = sorted(claim.owned)
    sticky = StickyAssignorUserDataV1(_by_topic(owned), claim.generation).encode()
    flags = bytes([_LEAVING if claim.is_leaving else 0])
    ours = _MAGIC + flags + _bitmap(owned, claim.busy) + _bitmap(owned, claim.sealed)
    return ConsumerProtocolMemberMetadata(_VERSION, sorted(claim.topics), sticky + ours)


def decode_claim(metadata: ConsumerProtocolMemberMetadata) -> Claim:
    """Read what a member of this or the previous version reported."""
    topics = frozenset(metadata.subscription)
    data = BytesIO(metadata.user_data or b"")
    try:
        sticky = StickyAssignorUserDataV1.decode(data)
        owned = [
            TopicPartition(topic, number)
            for topic, numbers in sticky.previous_assignment
            for number in numbers
        ]
    except Exception:  # noqa: BLE001 - aiokafka's decoder raises whatever the damage leads to
        return Claim(topics=topics)
    claim = Claim(topics=topics, owned=frozenset(owned), generation=sticky.generation)
    ours = data.read()
    size = _bitmap_size(len(owned))
    if len(ours) < len(_MAGIC) + 1 + 2 * size or not ours.startswith(_MAGIC):
        return claim
    flags, bitmaps = ours[len(_MAGIC)], ours[len(_MAGIC) + 1 :]
    return Claim(
        topics=topics,
        owned=claim.owned,
        generation=claim.generation,
        busy=_marked(owned, bitmaps[:size]),
        sealed=_marked(owned, bitmaps[size : 2 * size]),
        is_leaving=bool(flags & _LEAVING),
    )


def encode_assignment(
    assignment: Assignment, last_generation: int, *, is_moving: bool = False
) -> ConsumerProtocolMemberAssignment:
    """Write what a member is given; `is_moving` says that a partition of some member is promised."""
    owned = sorted(assignment.owned)
    generation = last_generation.to_bytes(4, "big", signed=True)
    flags = bytes([_MOVING if is_moving else 0])
    user_data = _MAGIC + generation + _bitmap(owned, assignment.promised) + flags
    return ConsumerProtocolMemberAssignment(_VERSION, _by_topic(owned), user_data)


def decode_assignment(assignment: ConsumerProtocolMemberAssignment) -> Decision:
    """Read what a leader of this or the previous version has given."""
    owned = [TopicPartition(topic, number) for topic, numbers in assignment.assignment for number in numbers]
    ours = assignment.user_data or b""
    start = len(_MAGIC) + 4
    end = start + _bitmap_size(len(owned))
    if len(ours) < end or not ours.startswith(_MAGIC):
        return Decision(Assignment(owned=frozenset(owned)), None)
    promised = _marked(owned, ours[start:end])
    last_generation = int.from_bytes(ours[len(_MAGIC) : start], "big", signed=True)
    is_moving = bool(ours[end] & _MOVING) if len(ours) > end else False
    return Decision(Assignment(owned=frozenset(owned), promised=promised), last_generation, is_moving)


def _by_topic(partitions: Iterable[TopicPartition]) -> list[tuple[str, list[int]]]:
    """Group sorted partitions, as Kafka's consumer protocol writes them."""
    groups = groupby(partitions, key=lambda partition: partition.topic)
    return [(topic, [partition.partition for partition in group]) for topic, group in groups]


def _bitmap_size(count: int) -> int:
    return -(-count // 8)


def _bitmap(partitions: Sequence[TopicPartition], marked: AbstractSet[TopicPartition]) -> bytes:
    bits = bytearray(_bitmap_size(len(partitions)))
    for index, partition in enumerate(partitions):
        if partition in marked:
            bits[index >> 3] |= 1 << (index & 7)
    return bytes(bits)


def _marked(partitions: Sequence[TopicPartition], bits: bytes) -> frozenset[TopicPartition]:
    return frozenset(
        partition for index, partition in enumerate(partitions) if bits[index >> 3] >> (index & 7) & 1
    )
