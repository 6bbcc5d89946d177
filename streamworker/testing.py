"""Every port in memory: run a worker without broker, upstream or clock, in your tests as in the project's own.

A fake records what it was asked in public attributes, and public attributes set its behaviour, before or
during use. The ports' rules hold: opening a partition's commit store fences the former owner, and commits are
atomic. An `asyncio.Event` that is named as a gate delays an operation while it is cleared.
"""

from __future__ import annotations

import asyncio
import zlib
from collections import defaultdict, deque
from contextlib import asynccontextmanager, suppress
from math import inf
from typing import TYPE_CHECKING, NamedTuple

from streamworker.errors import Fenced, KafkaError, KafkaRefused, MetadataTooLarge, RecordTooLarge
from streamworker.model import CommitPoint, ConsumerRecord, Coordinates, ProducerRecord, TopicPartition
from streamworker.pump import Pump

if TYPE_CHECKING:
    from collections.abc import (
        AsyncGenerator,
        AsyncIterator,
        Callable,
        Collection,
        Iterable,
        Mapping,
        Sequence,
    )

    from streamworker.model import ErrorCode, Headers, Job, JobError, Rejection, UsageEvent
    from streamworker.observe import CancelEffect, KafkaPart, LossReason
    from streamworker.ports import Assignments, Receipt

__all__ = [
    "Commit",
    "MemoryCall",
    "MemoryClock",
    "MemoryCommitStore",
    "MemoryCommitStores",
    "MemoryObserver",
    "MemoryReceipt",
    "MemorySeries",
    "MemorySink",
    "MemorySource",
    "MemoryUpstream",
    "Script",
    "Step",
]

POLL_S = 0.25
"""Seconds that one `receive` waits for records."""


class MemoryClock:
    """A clock that advances only when `turn` is called."""

    def __init__(self, now_ms: int = 1_700_000_000_000) -> None:
        self._now_ms = now_ms
        self._monotonic = 0.0

    def turn(self, seconds: float) -> None:
        """Advance the clock."""
        self._now_ms += round(seconds * 1000)
        self._monotonic += seconds

    def now_ms(self) -> int:
        """Return the time in ms since the epoch."""
        return self._now_ms

    def monotonic(self) -> float:
        """Return the time in seconds on the monotonic clock."""
        return self._monotonic


class MemorySource:
    """A consumer group with one member. `put` records and `assign` partitions; each `receive` raises one of
    `errors`."""

    def __init__(self) -> None:
        self.logs: defaultdict[TopicPartition, list[ConsumerRecord]] = defaultdict(list)
        self.positions: dict[TopicPartition, int] = {}
        self.asked: list[tuple[frozenset[TopicPartition], int]] = []
        self.errors: deque[KafkaError] = deque()
        self.delivering = _open_gate()
        """Gate: while cleared, `receive` delays records that it has already taken."""
        self.read_back_errors: deque[KafkaError] = deque()
        """The first of them ends each `read_back` after its first batch."""
        self.is_member = True
        self.is_leaving = False
        """Whether the worker announced its departure."""
        self._assigned: frozenset[TopicPartition] = frozenset()
        self._assignments: Assignments | None = None
        self._came = asyncio.Event()

    def put(
        self,
        partition: TopicPartition,
        value: bytes | None,
        *,
        offset: int | None = None,
        key: bytes | None = None,
        headers: Headers = (),
    ) -> ConsumerRecord:
        """Append a record. A larger `offset` leaves a gap."""
        log = self.logs[partition]
        if offset is None:
            offset = log[-1].at.offset + 1 if log else 0
        record = ConsumerRecord(Coordinates(*partition, offset), 1_700_000_000_000, key, value, headers)
        log.append(record)
        self._came.set()
        return record

    def assign(
        self,
        *partitions: TopicPartition,
        kept: Collection[TopicPartition] | None = None,
        promised: Collection[TopicPartition] = (),
    ) -> frozenset[TopicPartition]:
        """Rebalance; return the partitions that the worker reported as busy.

        Kept partitions continue at their position; new ones start where they are sought. All that were assigned before
        are kept, unless `kept` is given.
        """
        assert self._assignments is not None, "the source is not started"
        before, self._assigned = self._assigned, frozenset(partitions)
        continued = self._assigned & (before if kept is None else frozenset(kept))
        self.positions = {at: offset for at, offset in self.positions.items() if at in continued}
        self._assignments.rebalancing()
        busy = self._assignments.busy_partitions()
        self._assignments.assigned(self._assigned, kept=continued, promised=frozenset(promised))
        return busy

    async def start(self, assignments: Assignments) -> None:
        """Join the group."""
        self._assignments = assignments

    async def receive(self, partitions: Collection[TopicPartition], limit: int) -> list[ConsumerRecord]:
        """Return records of these partitions, waiting briefly for them."""
        self.asked.append((frozenset(partitions), limit))
        await asyncio.sleep(0)
        if self.errors:
            raise self.errors.popleft()
        records = self._take(partitions, limit)
        if partitions and not records:
            self._came.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._came.wait()
            records = self._take(partitions, limit)
        await self.delivering.wait()
        return records

    def seek(self, partition: TopicPartition, offset: int) -> None:
        """Read this partition from `offset` on. Nothing happens if it is not assigned."""
        if partition in self._assigned:
            self.positions[partition] = offset
            self._came.set()

    def position(self, partition: TopicPartition) -> int | None:
        """Return the offset that is read next."""
        return self.positions.get(partition)

    async def read_back(
        self, partition: TopicPartition, start: int, stop: int
    ) -> AsyncGenerator[Sequence[ConsumerRecord]]:
        """Iterate over the records from `start` to before `stop`, one in a batch."""
        for record in [record for record in self.logs[partition] if start <= record.at.offset < stop]:
            await asyncio.sleep(0)
            yield [record]
            if self.read_back_errors:
                raise self.read_back_errors.popleft()

    def announce_departure(self) -> None:
        """Set `is_leaving`."""
        self.is_leaving = True

    async def confirm_membership(self) -> bool:
        """Return `is_member`."""
        await asyncio.sleep(0)
        return self.is_member

    async def stop(self) -> None:
        """Leave the group."""
        self._assignments = None

    def _take(self, partitions: Iterable[TopicPartition], limit: int) -> list[ConsumerRecord]:
        taken: list[ConsumerRecord] = []
        for partition in partitions:
            position = self.positions.get(partition, inf)
            ahead = [record for record in self.logs[partition] if record.at.offset >= position]
            for record in ahead[: limit - len(taken)]:
                taken.append(record)
                self.positions[partition] = record.at.offset + 1
        return taken


class MemoryReceipt:
    """The outstanding acknowledgements of one job at a `MemorySink`."""

    def __init__(self) -> None:
        self.owed = 0
        self.offset: int | None = None
        self._refusal: RecordTooLarge | None = None
        self._settled = _open_gate()

    def add(self) -> None:
        """Expect one more acknowledgement."""
        self.owed += 1
        self._settled.clear()

    def acknowledge(self, refusal: RecordTooLarge | None = None) -> None:
        """Acknowledge one record, or reject it."""
        self._refusal = self._refusal or refusal
        self.owed -= 1
        if not self.owed:
            self._settled.set()

    async def settled(self) -> None:
        """Wait until every record is acknowledged."""
        await self._settled.wait()
        if self._refusal is not None:
            raise self._refusal


class MemorySeries:
    """Publishes a job's records that differ in their value alone to a `MemorySink`."""

    def __init__(
        self, sink: MemorySink, to: TopicPartition, key: bytes, headers: Headers, receipt: Receipt
    ) -> None:
        self._sink = sink
        self._to = to
        self._key = key
        self._headers = headers
        self._receipt = receipt

    def publish(self, value: bytes) -> int:
        """Store a record; return its size."""
        record = ProducerRecord(self._to, self._key, value, self._headers)
        self._sink.publish(record, self._receipt)
        return record.size


class MemorySink:
    """Stores published records in `records`. It acknowledges them at once, or by `acknowledge` if
    `acknowledges` is false."""

    def __init__(self, *, partitions: int = 4, topics: Collection[str] | None = None) -> None:
        """Create a sink. It accepts these topics, or any topic if `topics` is None."""
        self.records: list[ProducerRecord] = []
        self.acknowledges = True
        self.keeping_up = _open_gate()
        """Gate: while cleared, `has_room` is false."""
        self._owed: deque[MemoryReceipt] = deque()
        self._partitions = partitions
        self._topics = topics

    def receipt(self) -> MemoryReceipt:
        """Return an empty receipt for one job."""
        return MemoryReceipt()

    def publish(self, record: ProducerRecord, receipt: Receipt) -> None:
        """Store a record."""
        assert isinstance(receipt, MemoryReceipt), "a receipt of another sink"
        self.records.append(record)
        receipt.add()
        self._owed.append(receipt)
        if self.acknowledges:
            self.acknowledge()

    def series(self, to: TopicPartition, key: bytes, headers: Headers, receipt: Receipt) -> MemorySeries:
        """Return the publisher of a job's records that have this partition, key and headers."""
        return MemorySeries(self, to, key, headers, receipt)

    def acknowledge(self, refusal: RecordTooLarge | None = None) -> None:
        """Acknowledge every outstanding record, or reject it."""
        while self._owed:
            self.acknowledge_next(refusal)

    def acknowledge_next(self, refusal: RecordTooLarge | None = None) -> None:
        """Acknowledge the oldest outstanding record, or reject it."""
        self._owed.popleft().acknowledge(refusal)

    @property
    def has_room(self) -> bool:
        """Whether `keeping_up` is set."""
        return self.keeping_up.is_set()

    async def room(self) -> None:
        """Wait for `keeping_up`."""
        await self.keeping_up.wait()

    def partition_for(self, topic: str, key: bytes) -> TopicPartition:
        """Choose a partition by the key. Raises KafkaRefused for an unknown topic."""
        if self._topics is not None and topic not in self._topics:
            raise KafkaRefused(f"there is no topic {topic}")
        return TopicPartition(topic, zlib.crc32(key) % self._partitions)


class Commit(NamedTuple):
    """One transaction."""

    partition: TopicPartition
    records: tuple[ProducerRecord, ...]
    point: CommitPoint


class MemoryCommitStores:
    """The broker's side of commits: `commits` lists them in order, `points` holds each partition's last one."""

    def __init__(self, *, max_record_bytes: float = inf, max_commit_bytes: float = inf) -> None:
        self.commits: list[Commit] = []
        self.points: dict[TopicPartition, CommitPoint] = {}
        self.under_way: list[Commit] = []
        self.opened: list[TopicPartition] = []
        self.closed: list[TopicPartition] = []
        self.open_errors: deque[KafkaError] = deque()
        self.commit_errors: deque[KafkaError] = deque()
        self.opening = _open_gate()
        self.committing = _open_gate()
        self.metadata_limit = 4096
        """Characters of metadata that a commit may have. A store that is created knows it; a later change is not known."""
        self.max_record_bytes = max_record_bytes
        self.max_commit_bytes = max_commit_bytes
        """Bytes of all records of one commit, as a broker checks a batch."""
        self._owners: dict[TopicPartition, MemoryCommitStore | None] = {}
        self._offsets: defaultdict[TopicPartition, int] = defaultdict(int)

    def store(self, partition: TopicPartition) -> MemoryCommitStore:
        """Return a new commit store, not yet opened."""
        return MemoryCommitStore(self, partition)

    def seize(self, partition: TopicPartition) -> None:
        """Fence the partition's owner, as another worker that opens the partition would."""
        self._owners[partition] = None

    def records(self, partition: TopicPartition | None = None) -> list[ProducerRecord]:
        """Return the records of all commits, or of one job partition's commits, in order."""
        return [
            record
            for commit in self.commits
            if partition in {None, commit.partition}
            for record in commit.records
        ]

    async def open(self, owner: MemoryCommitStore) -> CommitPoint:
        """Make this commit store the owner."""
        self.opened.append(owner.partition)
        await self.opening.wait()
        await asyncio.sleep(0)
        if self.open_errors:
            raise self.open_errors.popleft()
        self._owners[owner.partition] = owner
        return self.points.get(owner.partition, CommitPoint(0))

    async def commit(
        self, owner: MemoryCommitStore, records: Sequence[ProducerRecord], point: CommitPoint
    ) -> list[int | None]:
        """Write the records and the point atomically; return the records' offsets."""
        commit = Commit(owner.partition, tuple(records), point)
        self.under_way.append(commit)
        try:
            await asyncio.sleep(0)
            await self.committing.wait()
            self._check(owner, commit)
        finally:
            self.under_way.remove(commit)
        self.commits.append(commit)
        self.points[owner.partition] = point
        return [self._next_offset(record.topic_partition) for record in records]

    def _next_offset(self, partition: TopicPartition) -> int:
        offset = self._offsets[partition]
        self._offsets[partition] += 1
        return offset

    def _check(self, owner: MemoryCommitStore, commit: Commit) -> None:
        if self._owners.get(owner.partition) is not owner:
            raise Fenced(f"{owner.partition} is another's")
        if self.commit_errors:
            raise self.commit_errors.popleft()
        if len(commit.point.metadata) > self.metadata_limit:
            raise MetadataTooLarge(f"metadata of {len(commit.point.metadata)} characters")
        for record in commit.records:
            if record.size > self.max_record_bytes:
                raise RecordTooLarge(f"a record of {record.size} bytes")
        if (size := sum(record.size for record in commit.records)) > self.max_commit_bytes:
            raise RecordTooLarge(f"a commit of {size} bytes")


class MemoryCommitStore:
    """The commit store of one owner of one partition."""

    def __init__(self, committers: MemoryCommitStores, partition: TopicPartition) -> None:
        self.partition = partition
        self._committers = committers

    async def open(self) -> CommitPoint:
        """Fence the former owner; return the committed point."""
        return await self._committers.open(self)

    async def commit(self, records: Sequence[ProducerRecord], point: CommitPoint) -> list[int | None]:
        """Write the records and the point; return the records' offsets."""
        return await self._committers.commit(self, records, point)

    async def close(self) -> None:
        """Release the partition."""
        self._committers.closed.append(self.partition)


Step = bytes | float | asyncio.Event | Exception
"""The next step of an upstream: send bytes, stay silent for seconds, wait for an event, or raise."""


class Script(NamedTuple):
    """One call: the steps of its body, the steps before its response, and the response's head."""

    body: Iterable[Step]
    before: Iterable[Step] = ()
    status: int = 200
    content_type: str = "text/event-stream"


class MemoryCall:
    """One call that was made, and its response."""

    def __init__(self, body: bytes, headers: Mapping[str, str], script: Script) -> None:
        self.body = body
        self.headers = dict(headers)
        self.reads = 0
        self.is_open = True
        self.is_drained = False
        self.status = script.status
        self.content_type = script.content_type
        self._script = script
        self._pump = Pump(aiter(self))

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Iterate over the body. `reads` counts the pieces that were returned."""
        for step in self._script.body:
            if isinstance(step, bytes):
                self.reads += 1
                yield step
            else:
                await _wait(step)

    def subscribe(self, on_data: Callable[[bytes], None], on_end: Callable[[Exception | None], None]) -> None:
        """Push the body to a subscriber."""
        self._pump.start(on_data, on_end)

    def pause_reading(self) -> None:
        """Push nothing more until `resume_reading`."""
        self._pump.pause()

    def resume_reading(self) -> None:
        """Push on."""
        self._pump.resume()

    async def drain(self) -> None:
        """Record that the rest of the body was read."""
        self.is_drained = True

    async def close(self) -> None:
        """Stop pushing."""
        self.is_open = False
        await self._pump.stop()


class MemoryUpstream:
    """Answers each call with the next script. The last script serves all further calls."""

    def __init__(self, *scripts: Script | Iterable[Step]) -> None:
        self.calls: list[MemoryCall] = []
        self._scripts = [script if isinstance(script, Script) else Script(list(script)) for script in scripts]

    @property
    def open_calls(self) -> int:
        """Number of calls that are open now."""
        return sum(call.is_open for call in self.calls)

    @asynccontextmanager
    async def call(self, body: bytes, headers: Mapping[str, str]) -> AsyncIterator[MemoryCall]:
        """Open a call; leaving closes it."""
        script = self._scripts[min(len(self.calls), len(self._scripts) - 1)]
        call = MemoryCall(body, headers, script)
        self.calls.append(call)
        try:
            for step in script.before:
                await _wait(step)
            yield call
        finally:
            await call.close()


class MemoryObserver:
    """Records every notification in `calls`, in order, as the method's name and its arguments."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[object, ...]]] = []

    def all(self, name: str) -> list[tuple[object, ...]]:
        """Return the arguments of every call of one method."""
        return [arguments for called, arguments in self.calls if called == name]

    def job_started(self, job: Job, upstream: str) -> None:
        self.calls.append(("job_started", (job, upstream)))

    def first_delta(self, upstream: str, seconds: float) -> None:
        self.calls.append(("first_delta", (upstream, seconds)))

    def deltas_published(self, upstream: str, count: int, size: int, gap_s: float | None) -> None:
        self.calls.append(("deltas_published", (upstream, count, size, gap_s)))

    def try_failed(self, job: Job, upstream: str, error: JobError, next_try_s: float) -> None:
        self.calls.append(("try_failed", (job, upstream, error, next_try_s)))

    def fell_back(self, job: Job, upstream: str, error: JobError) -> None:
        self.calls.append(("fell_back", (job, upstream, error)))

    def circuit_changed(self, upstream: str, state: str, reason: str) -> None:
        self.calls.append(("circuit_changed", (upstream, state, reason)))

    def cancel_received(self, job_id: str, effect: CancelEffect) -> None:
        self.calls.append(("cancel_received", (job_id, effect)))

    def upstream_held(self, upstream: str, reason: str) -> None:
        self.calls.append(("upstream_held", (upstream, reason)))

    def upstream_released(self, upstream: str, reason: str, seconds: float) -> None:
        self.calls.append(("upstream_released", (upstream, reason, seconds)))

    def job_ended(self, event: UsageEvent, job: Job, upstream: str) -> None:
        self.calls.append(("job_ended", (event, job, upstream)))

    def job_rejected(self, rejection: Rejection, code: ErrorCode) -> None:
        self.calls.append(("job_rejected", (rejection, code)))

    def job_abandoned(self, job: Job, reason: str) -> None:
        self.calls.append(("job_abandoned", (job, reason)))

    def tombstone_skipped(self, partition: TopicPartition) -> None:
        self.calls.append(("tombstone_skipped", (partition,)))

    def record_skipped(self, partition: TopicPartition) -> None:
        self.calls.append(("record_skipped", (partition,)))

    def duplicate_skipped(self, job: Job, earlier: int) -> None:
        self.calls.append(("duplicate_skipped", (job, earlier)))

    def job_crashed(self, job: Job) -> None:
        self.calls.append(("job_crashed", (job,)))

    def rebalancing(self) -> None:
        self.calls.append(("rebalancing", ()))

    def partitions_changed(self, owned: int, gained: int, lost: int) -> None:
        self.calls.append(("partitions_changed", (owned, gained, lost)))

    def move_deferred(self, partition: TopicPartition, streams: int) -> None:
        self.calls.append(("move_deferred", (partition, streams)))

    def move_completed(self, partition: TopicPartition, waited_s: float, *, is_forced: bool) -> None:
        self.calls.append(("move_completed", (partition, waited_s, is_forced)))

    def streams_cut(self, partition: TopicPartition, streams: int) -> None:
        self.calls.append(("streams_cut", (partition, streams)))

    def partition_fenced(self, partition: TopicPartition) -> None:
        self.calls.append(("partition_fenced", (partition,)))

    def records_lost(self, reason: LossReason, records: int) -> None:
        self.calls.append(("records_lost", (reason, records)))

    def committed(self, records: Sequence[ProducerRecord], seconds: float) -> None:
        self.calls.append(("committed", (tuple(records), seconds)))

    def result_part_omitted(self, part: str) -> None:
        self.calls.append(("result_part_omitted", (part,)))

    def batch_acknowledged(self, count: int, seconds: float) -> None:
        self.calls.append(("batch_acknowledged", (count, seconds)))

    def kafka_failed(self, part: KafkaPart) -> None:
        self.calls.append(("kafka_failed", (part,)))

    def telemetry_failed(self) -> None:
        self.calls.append(("telemetry_failed", ()))


async def _wait(step: Step) -> None:
    match step:
        case asyncio.Event():
            await step.wait()
        case float() | int():
            await asyncio.sleep(step)
        case Exception():
            raise step


def _open_gate() -> asyncio.Event:
    gate = asyncio.Event()
    gate.set()
    return gate
