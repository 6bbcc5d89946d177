"""Fetches job records while there is room for them.

The poll loop never waits for a job. Where no partition has room it goes on polling without partitions, so that errors
of the consumer group are seen.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

import structlog

from streamworker.errors import InstanceFenced, KafkaError
from streamworker.limits.fair_queue import divide
from streamworker.worker.partition import Ownership

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streamworker.model import TopicPartition
    from streamworker.ports import Source
    from streamworker.worker.jobs import Jobs
    from streamworker.worker.partition import AssignedPartition
    from streamworker.worker.partitions import Partitions
    from streamworker.worker.runner import Tools
    from streamworker.worker.worker import WorkerLimits

__all__ = ["Poller"]

_IDLE_POLL_S = 0.25
_RETRY_S = 1.0

log = structlog.get_logger()


class Poller:
    """The poll loop."""

    def __init__(
        self,
        source: Source,
        partitions: Partitions,
        jobs: Jobs,
        tools: Tools,
        limits: WorkerLimits,
        *,
        room: asyncio.Event,
    ) -> None:
        """`room` is set whenever there may be room for another record."""
        self.last_poll = tools.clock.monotonic()
        """When the loop last polled, with or without an answer of the broker, in seconds of the monotonic clock."""
        self._answered_at = self.last_poll
        self._source = source
        self._partitions = partitions
        self._jobs = jobs
        self._clock = tools.clock
        self._observer = tools.observer
        self._queues = tools.queues
        self._limits = limits
        self._has_choice = limits.is_fair or len(limits.topics) > 1
        self._max_waiting_of = divide(limits.max_waiting, limits.topics, limits.weights)
        self._max_held_bytes_of = divide(limits.max_held_bytes, limits.topics, limits.weights)
        self._room = room
        self._is_draining = False
        self._is_doubtful = False
        self._is_rebalancing = False
        self._rebalances = 0

    def drain(self) -> None:
        """Accept no more records; go on polling."""
        self._is_draining = True
        self._room.set()

    def rebalancing(self) -> None:
        """Accept no records: this worker reports its open jobs to the group, which may move every other partition."""
        self._is_rebalancing = True
        self._rebalances += 1

    def assigned(self) -> None:
        """Accept records again, without asking the group: it has just assigned partitions."""
        self._is_rebalancing = self._is_doubtful = False
        self._room.set()

    async def run(self) -> None:
        """Poll until cancelled."""
        while True:
            free, ready = self._find_room()
            if not ready:
                await self._wait_for_room()
            rebalances = self._rebalances
            try:
                records = await self._source.receive(ready, free)
            except InstanceFenced:  # to poll on would fence the other process in turn
                raise
            except KafkaError as error:
                log.warning("kafka.unavailable", reason=str(error))
                self._observer.kafka_failed("poll")
                self.last_poll = self._clock.monotonic()
                await asyncio.sleep(_RETRY_S)
                continue
            self.last_poll = self._clock.monotonic()
            slept_s, self._answered_at = self.last_poll - self._answered_at, self.last_poll
            if self._is_draining:  # records that arrive after the request to drain belong to the next owner
                continue
            self._is_doubtful |= slept_s > self._limits.session_timeout_s / 2
            if self._is_doubtful and not await self._partitions.is_member():
                self._read_again({record.topic_partition for record in records})
                continue
            self._is_doubtful = False
            if self._is_rebalancing or rebalances != self._rebalances:
                self._read_again({record.topic_partition for record in records})
                continue
            missed = set()
            for record in records:
                # The partition may have been lost, or lost and assigned again, while this loop waited.
                partition = ready[record.topic_partition]
                is_readable = (
                    record.topic_partition not in missed
                    and self._partitions.is_current(partition)
                    and partition.ownership is Ownership.OPEN
                )
                if not is_readable or not self._jobs.accept(partition, record):
                    missed.add(record.topic_partition)
            self._read_again(missed)
            self._commit_positions()

    def _commit_positions(self) -> None:
        """Commit the source's position where no job is open.

        The group's lag is then 0, although transaction markers and aborted records lie behind the last job.
        """
        for partition in self._partitions:
            if partition.ownership is not Ownership.OPEN or not partition.committer.is_idle:
                continue
            progress, position = partition.committer.progress, self._source.position(partition.id)
            if position is not None and progress.incomplete == 0 and position > progress.position:
                progress.advance(position)
                partition.committer.touch()

    def _find_room(self) -> tuple[int, dict[TopicPartition, AssignedPartition]]:
        """Return how many records may be accepted, and the partitions that they may be of."""
        if self._is_draining or self._is_rebalancing:
            return 0, {}
        ready = {
            partition.id: partition
            for partition in self._partitions
            if partition.has_room and not self._jobs.is_blocked(partition.id)
        }
        if not self._has_choice:
            free = self._free()
            return free, ready if free else {}
        free_of = {topic: self._free_of(topic) for topic in {at.topic for at in ready}}
        ready = {at: partition for at, partition in ready.items() if free_of[at.topic]}
        return min((free_of[at.topic] for at in ready), default=0), ready

    async def _wait_for_room(self) -> None:
        self._room.clear()
        # wait_for swallows a cancellation that arrives together with the event before Python 3.12.
        with suppress(TimeoutError):
            async with asyncio.timeout(_IDLE_POLL_S):
                await self._room.wait()

    def _free(self) -> int:
        """Return how many records may be accepted."""
        if not self._jobs.has_room:
            return 0
        waiting = (
            self._queues.waiting
            + self._jobs.waiting
            + sum(partition.waiting for partition in self._partitions)
        )
        # Slots are not counted: a job that was just accepted has not asked for one yet.
        active = self._jobs.open - waiting
        return max(0, min(self._limits.max_in_flight - active, self._limits.max_waiting - waiting))

    def _free_of(self, topic: str) -> int:
        """Return how many records of this topic may be accepted: free slots, and its share of jobs that wait and bytes.

        A job that was just accepted, and has not asked for a slot yet, counts as waiting.
        """
        if not self._jobs.has_room or self._jobs.held_bytes_of[topic] >= self._max_held_bytes_of[topic]:
            return 0
        slots = max(0, self._limits.max_in_flight - self._queues.in_flight)
        waiting = self._jobs.open_of[topic] - self._queues.in_flight_of(topic)
        return max(0, slots + self._max_waiting_of[topic] - waiting)

    def _read_again(self, missed: Iterable[TopicPartition]) -> None:
        """Seek back in partitions whose records were fetched and not accepted."""
        for topic_partition in missed:
            partition = self._partitions.get(topic_partition)
            if partition is not None and partition.ownership is Ownership.OPEN:
                self._source.seek(topic_partition, partition.committer.progress.position)
