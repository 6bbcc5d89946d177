"""What is measured of a worker at the moment somebody looks, and told by nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.core.offsetmap import LIMIT
from streamworker.worker.partition import Holding

if TYPE_CHECKING:
    from collections.abc import Collection

    from streamworker.worker.partition import PartitionWork

__all__ = ["Vitals", "vitals_of"]


class Vitals(NamedTuple):
    """Times in seconds. `offset_map_fill` is the largest map's share of what a commit can hold."""

    is_ready: bool = False
    poll_age_s: float = 0.0
    draining_s: float = 0.0
    partitions_opening: int = 0
    offset_map_fill: float = 0.0
    lane_busy_s: float = 0.0
    lane_waiting: int = 0


def vitals_of(
    works: Collection[PartitionWork], *, is_ready: bool, poll_age_s: float, draining_s: float
) -> Vitals:
    """Look at every partition."""
    lanes = [work.lane for work in works]
    return Vitals(
        is_ready=is_ready,
        poll_age_s=poll_age_s,
        draining_s=draining_s,
        partitions_opening=sum(work.holding is Holding.OPENING for work in works),
        offset_map_fill=max((lane.progress.map_size / LIMIT for lane in lanes if lane.is_open), default=0.0),
        lane_busy_s=max((lane.busy_s for lane in lanes), default=0.0),
        lane_waiting=sum(lane.backlog for lane in lanes),
    )
