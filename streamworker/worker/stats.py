"""What is measured of a worker at the moment somebody looks, and told by nobody."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from streamworker.progress.offset_map import LIMIT
from streamworker.worker.partitions import Ownership

if TYPE_CHECKING:
    from collections.abc import Collection

    from streamworker.worker.partitions import PartitionWork

__all__ = ["WorkerStats", "worker_stats"]


class WorkerStats(NamedTuple):
    """Times in seconds. `offset_map_fill` is the largest map's share of what a commit can hold."""

    is_ready: bool = False
    poll_age_s: float = 0.0
    draining_s: float = 0.0
    partitions_opening: int = 0
    offset_map_fill: float = 0.0
    commit_in_progress_s: float = 0.0
    commit_pending_entries: int = 0


def worker_stats(
    works: Collection[PartitionWork], *, is_ready: bool, poll_age_s: float, draining_s: float
) -> WorkerStats:
    """Look at every partition."""
    committers = [work.committer for work in works]
    return WorkerStats(
        is_ready=is_ready,
        poll_age_s=poll_age_s,
        draining_s=draining_s,
        partitions_opening=sum(work.ownership is Ownership.OPENING for work in works),
        offset_map_fill=max(
            (committer.progress.map_size / LIMIT for committer in committers if committer.is_open),
            default=0.0,
        ),
        commit_in_progress_s=max((committer.busy_s for committer in committers), default=0.0),
        commit_pending_entries=sum(committer.backlog for committer in committers),
    )
