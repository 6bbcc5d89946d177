"""The commit lane of one assigned partition: what waits goes into one short commit, then what came meanwhile.

A commit carries `started` events of jobs that begin, terminal events of jobs that ended, dead letters, and the
partition's offset with its map. So a job is finished and committed in the same instant or not at all, and how often it
was delivered is on record with its `started`.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, NamedTuple

import structlog

from streamworker.errors import KafkaError, RecordTooLarge
from streamworker.progress.offset_map import LIMIT, Damaged, OffsetMap, decode_map
from streamworker.progress.partition import PartitionProgress

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.model import ProducerRecord, TopicPartition
    from streamworker.observe import Observer
    from streamworker.ports import CommitStore

__all__ = ["PartitionCommitter"]

MAX_COMMIT_RECORDS = 500
"""Records of one commit. A transaction holds read_committed readers back, so it stays short."""

_REFUSED_BACKOFF_S = 5.0

log = structlog.get_logger()


class _Entry(NamedTuple):
    offset: int | None  # finished by this entry's records, and not before they are in a commit
    records: Sequence[ProducerRecord]
    fallback: Sequence[ProducerRecord]
    done: asyncio.Future[None]

    @property
    def largest(self) -> int:
        return max((record.size for record in self.records), default=0)


class PartitionCommitter:
    """Open it, `run` it as a task, and hand it what is to be committed.

    `lost` is called, once, when another worker turns out to own the partition.
    """

    def __init__(
        self,
        partition: TopicPartition,
        committer: CommitStore,
        *,
        commit_id: str,
        metadata_limit: int = LIMIT,
        lost: Callable[[str], None],
        observer: Observer | None = None,
    ) -> None:
        self.partition = partition
        self._committer = committer
        self._commit_id = commit_id
        self._metadata_limit = metadata_limit
        self._lost = lost
        self._observer = observer
        self._busy_since: float | None = None
        self._progress: PartitionProgress | None = None
        self._waiting: list[_Entry] = []
        self._under_way: list[_Entry] = []
        self._filled = asyncio.Event()

    async def open(self) -> int:
        """Take the partition over; return the offset to read from. Raises KafkaError."""
        committed, metadata = await self._committer.open()
        try:
            offset_map = decode_map(committed, metadata)
        except Damaged as fault:
            log.warning("commit.offset_map_ignored", partition=str(self.partition), reason=str(fault))
            offset_map = OffsetMap()
        self._progress = PartitionProgress(
            committed, offset_map, commit_id=self._commit_id, limit=self._metadata_limit
        )
        return committed

    @property
    def backlog(self) -> int:
        """How much waits to be committed."""
        return len(self._waiting)

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits to be committed, and no commit is under way."""
        return not self._waiting and not self._under_way

    @property
    def busy_s(self) -> float:
        """How long the commit under way has been under way; 0 if none is."""
        return 0.0 if self._busy_since is None else asyncio.get_running_loop().time() - self._busy_since

    @property
    def is_open(self) -> bool:
        """Whether there is a `progress`."""
        return self._progress is not None

    @property
    def progress(self) -> PartitionProgress:
        """The partition's progress; there is one once the lane is open."""
        assert self._progress is not None, "the lane is not open"
        return self._progress

    def start(self, record: ProducerRecord) -> asyncio.Future[None]:
        """Write a `started` event; the future is done when every reader sees it before what is published later."""
        return self._add(None, [record])

    def finish(
        self, offset: int, records: Sequence[ProducerRecord], *, fallback: Sequence[ProducerRecord] = ()
    ) -> asyncio.Future[None]:
        """Write what ends a job and commit its offset, in one.

        `fallback` is what to write where the broker refuses `records` for their size.
        """
        return self._add(offset, records, fallback)

    def touch(self) -> asyncio.Future[None]:
        """Commit the progress as it is."""
        return self._add(None, ())

    async def run(self) -> None:
        """Commit what waits, until cancelled or lost."""
        while True:
            await self._filled.wait()
            entries, self._waiting = self._waiting[:MAX_COMMIT_RECORDS], self._waiting[MAX_COMMIT_RECORDS:]
            self._under_way = entries
            if not self._waiting:
                self._filled.clear()
            try:
                await self._commit(entries)
            except KafkaError as error:
                self._lost(str(error))
                return
            finally:
                self._busy_since = None
            for entry in entries:
                if not entry.done.done():
                    entry.done.set_result(None)
            self._under_way = []

    async def close(self) -> None:
        """Let go. What waits is not written, what is under way may be; whoever waited was told to stop before."""
        for entry in (*self._under_way, *self._waiting):
            entry.done.cancel()
        self._waiting.clear()
        await self._committer.close()

    def _add(
        self, offset: int | None, records: Sequence[ProducerRecord], fallback: Sequence[ProducerRecord] = ()
    ) -> asyncio.Future[None]:
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Entry(offset, records, fallback, done))
        self._filled.set()
        return done

    async def _commit(self, entries: list[_Entry]) -> None:
        for entry in entries:
            if entry.offset is not None:
                self.progress.finish(entry.offset)
        self._busy_since = asyncio.get_running_loop().time()
        while True:
            records = [record for entry in entries for record in entry.records]
            point = self.progress.point()
            if self.progress.is_cut:
                log.error("commit.offset_map_cut", partition=str(self.partition), size=self.progress.map_size)
            try:
                await self._committer.commit(records, point)
            except RecordTooLarge as refusal:
                log.error("commit.record_refused", partition=str(self.partition), reason=str(refusal))  # noqa: TRY400 - no bug, no trace
                if not _fall_back(entries):
                    # The topic takes less than it did at the start. Nothing is passed over and nothing begun anew, for
                    # that would pay again: the commit waits until a person has raised the topic's limit.
                    await asyncio.sleep(_REFUSED_BACKOFF_S)
            else:
                if self._observer is not None:
                    self._observer.committed(records, self.busy_s)
                return


def _fall_back(entries: list[_Entry]) -> bool:
    """Replace the largest records that have something smaller to stand in for them; False if there are none."""
    replaceable = [index for index, entry in enumerate(entries) if entry.fallback]
    if not replaceable:
        return False
    index = max(replaceable, key=lambda index: entries[index].largest)
    entries[index] = entries[index]._replace(records=entries[index].fallback, fallback=())
    return True
