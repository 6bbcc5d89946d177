"""The partitions that the group assigned to this worker: taken over, reopened after a fence, released."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING
from uuid import uuid4

import structlog

from streamworker.errors import KafkaError
from streamworker.worker.committer import PartitionCommitter
from streamworker.worker.partition import AssignedPartition

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from streamworker.model import TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStores, Source
    from streamworker.worker.duplicates import Duplicates
    from streamworker.worker.supervisor import Supervisor

__all__ = ["Partitions"]

_REOPEN_BACKOFF_S = 1.0

log = structlog.get_logger()


class Partitions:
    """The assigned partitions. `on_opened` is called whenever one may be read."""

    def __init__(
        self,
        source: Source,
        commit_stores: CommitStores,
        supervisor: Supervisor,
        observer: Observer,
        duplicates: Duplicates,
        *,
        on_opened: Callable[[], None],
    ) -> None:
        self._source = source
        self._commit_stores = commit_stores
        self._supervisor = supervisor
        self._observer = observer
        self._duplicates = duplicates
        self._on_opened = on_opened
        self._commit_id = uuid4().hex[:12]
        self._assigned: dict[TopicPartition, AssignedPartition] = {}
        self._is_stopping = False

    def __iter__(self) -> Iterator[AssignedPartition]:
        """Iterate over the assigned partitions."""
        return iter(self._assigned.values())

    def __len__(self) -> int:
        """Return the number of assigned partitions."""
        return len(self._assigned)

    def get(self, partition: TopicPartition) -> AssignedPartition | None:
        """Return the partition's present assignment; None if it is not assigned."""
        return self._assigned.get(partition)

    def is_current(self, partition: AssignedPartition) -> bool:
        """Return whether this assignment is the partition's present one."""
        return self._assigned.get(partition.id) is partition

    @property
    def busy(self) -> frozenset[TopicPartition]:
        """The partitions with open jobs, or with an end that is not committed."""
        return frozenset(at for at, partition in self._assigned.items() if partition.is_busy)

    def assign(
        self,
        partitions: frozenset[TopicPartition],
        *,
        kept: frozenset[TopicPartition],
        promised: frozenset[TopicPartition],
    ) -> bool:
        """Keep, release and take over partitions so that exactly these are assigned; return False while stopping.

        A partition that is not `kept` is taken over anew: another worker may have owned it in between. One that is
        `promised` accepts no more records.
        """
        if (
            self._is_stopping
        ):  # a partition that is taken over anew would fence this worker's own last commits
            return False
        lost = frozenset(self._assigned) - kept
        for topic_partition in lost:
            self._lose(self._assigned.pop(topic_partition))
        gained = partitions - frozenset(self._assigned)
        for topic_partition in gained:
            self._take_over(topic_partition)
        for partition in self._assigned.values():
            if partition.id in promised:
                self._seal(partition)
            elif partition.resume():
                self._source.seek(partition.id, partition.committer.progress.position)
                self._on_opened()
        for partition in self._assigned.values():
            partition.count_again()
        self._observer.partitions_changed(len(self._assigned), len(gained), len(lost))
        return True

    def reopen(self, topic_partition: TopicPartition, reason: str) -> None:
        """Release a partition whose log was reset, and take it over with a fresh record of its progress."""
        if self._is_stopping or (partition := self._assigned.get(topic_partition)) is None:
            return
        log.info("partition.reopening", partition=str(topic_partition), reason=reason)
        self._supervisor.spawn(self._reopen(partition, "log_reset"), name=f"reopen {topic_partition}")

    def forgive(self) -> None:
        """Commit that the open jobs' deliveries do not count: a partition that moves shows no death of its worker.

        They count again once it is known which partitions stay.
        """
        for partition in self._assigned.values():
            partition.forgive()

    async def is_member(self) -> bool:
        """Ask the group whether this worker still is a member; False if there is no answer.

        A worker that was suspended for longer than its session may hold records of another owner's partitions.
        """
        try:
            return await self._source.confirm_membership()
        except KafkaError:
            return False

    async def return_jobs(self) -> None:
        """Return what is open to the next owners, and release every partition."""
        for jobs in await asyncio.gather(*(partition.return_jobs() for partition in self._remove_all())):
            for job in jobs:
                self._observer.job_abandoned(job, "drain_timeout")

    async def release_all(self) -> None:
        """Release every partition at once."""
        await asyncio.gather(*(self._release(partition, "stopped") for partition in self._remove_all()))

    def _remove_all(self) -> list[AssignedPartition]:
        self._is_stopping = True
        partitions = list(self._assigned.values())
        self._assigned.clear()
        return partitions

    def _seal(self, partition: AssignedPartition) -> None:
        """Accept no more records of a partition that moves when its open jobs have ended."""
        is_new = partition.promised_s is None
        for job in partition.seal():
            self._observer.job_abandoned(job, "moved")
        if is_new and partition.is_busy:
            self._observer.move_deferred(partition.id, partition.begun_jobs)

    def _lose(self, partition: AssignedPartition) -> None:
        """Release a partition that another worker owns now."""
        cut = partition.begun_jobs
        if cut:
            self._observer.streams_cut(partition.id, cut)
        if (waited_s := partition.promised_s) is not None:
            self._observer.move_completed(partition.id, waited_s, is_forced=cut > 0)
        self._spawn_release(partition, "revoked")

    def _take_over(self, topic_partition: TopicPartition) -> None:
        partition: AssignedPartition

        def lost(reason: str) -> None:
            log.warning("partition.fenced", partition=str(topic_partition), reason=reason)
            self._observer.partition_fenced(topic_partition)
            self._supervisor.spawn(self._reopen(partition, "fenced"), name=f"reopen {topic_partition}")

        committer = PartitionCommitter(
            topic_partition,
            self._commit_stores.store(topic_partition),
            commit_id=self._commit_id,
            metadata_limit=self._commit_stores.metadata_limit,
            lost=lost,
            observer=self._observer,
        )
        partition = self._assigned[topic_partition] = AssignedPartition(committer)
        partition.opening = self._supervisor.spawn(self._open(partition), name=f"open {topic_partition}")

    async def _open(self, partition: AssignedPartition) -> None:
        offset = await partition.open()
        partition.recent_ids = await self._duplicates.read_back(partition.id, offset)
        partition.committing = self._supervisor.spawn(
            partition.committer.run(), name=f"commit {partition.id}"
        )
        self._source.seek(partition.id, offset)
        partition.opened()
        self._on_opened()
        log.info("partition.opened", partition=str(partition.id), offset=offset)

    async def _reopen(self, partition: AssignedPartition, reason: str) -> None:
        """Release a partition; take it over anew if the group still assigns it to us."""
        await asyncio.wait([self._spawn_release(partition, reason)])
        while self.is_current(partition):
            await asyncio.sleep(_REOPEN_BACKOFF_S)
            if await self.is_member() and self.is_current(partition):
                self._take_over(partition.id)

    def _spawn_release(self, partition: AssignedPartition, reason: str) -> asyncio.Task[None]:
        """Release in a task that is never cancelled: a committer that is not closed holds its transaction open."""
        return self._supervisor.spawn(
            self._release(partition, reason), name=f"release {partition.id}", is_cancelled=False
        )

    async def _release(self, partition: AssignedPartition, reason: str) -> None:
        partition.leaving = reason
        for job in await partition.release():
            self._observer.job_abandoned(job, reason)
        log.info("partition.released", partition=str(partition.id), reason=reason)
