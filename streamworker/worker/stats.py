"""The values of the metrics that are read at each scrape."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamworker.worker.partition import Ownership

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.worker.partition import AssignedPartition

__all__ = ["WorkerStats", "worker_stats"]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkerStats:
    """Times in seconds. `offset_map_fill` is the largest map's share of what a commit can hold."""

    is_ready: bool = False
    poll_age_s: float = 0.0
    draining_s: float = 0.0
    partitions_opening: int = 0
    moves_waiting: int = 0
    offset_map_fill: float = 0.0
    commit_in_progress_s: float = 0.0
    commit_pending_entries: int = 0


def worker_stats(
    partitions: Iterable[AssignedPartition], *, is_ready: bool, poll_age_s: float, draining_s: float
) -> WorkerStats:
    """Sum up the partitions: the worst one's times, all backlogs."""
    partitions = list(partitions)
    committers = [partition.committer for partition in partitions]
    return WorkerStats(
        is_ready=is_ready,
        poll_age_s=poll_age_s,
        draining_s=draining_s,
        partitions_opening=sum(partition.ownership is Ownership.OPENING for partition in partitions),
        moves_waiting=sum(partition.promised_s is not None for partition in partitions),
        offset_map_fill=max(
            (committer.progress.fill for committer in committers if committer.is_open),
            default=0.0,
        ),
        commit_in_progress_s=max((committer.busy_s for committer in committers), default=0.0),
        commit_pending_entries=sum(committer.backlog for committer in committers),
    )
