"""The parts of an event log on readers and a scanner in memory."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING, Any, cast

from aiokafka.structs import ConsumerRecord

from streamworker.gateway.distributor import Distributor
from streamworker.gateway.ended_jobs import EndedJobs
from streamworker.gateway.feed_opener import FeedOpener
from streamworker.gateway.feed_registry import FeedRegistry
from streamworker.gateway.history import History
from streamworker.gateway.job_search import JobSearch
from streamworker.gateway.known_jobs import KnownJobs
from streamworker.gateway.log_options import LogOptions
from streamworker.gateway.log_requests import LogRequests

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from streamworker.errors import KafkaError
    from streamworker.gateway.job_feed import JobFeed

PARTITIONS = 2


def record(key: str | None, offset: int, value: bytes | None, partition: int = 0) -> Any:
    """Return a record as a reader returns it."""
    return ConsumerRecord("t", partition, offset, 0, 0, key and key.encode(), value, None, 0, 0, ())


class Followed:
    """Stands for `FollowedPartitions`. The test moves its positions."""

    def __init__(self) -> None:
        self.partitions = PARTITIONS
        self.has_append_time = False
        self.tail: Counter[int] = Counter()
        self.committed: Counter[int] = Counter()
        self.users: Counter[int] = Counter()

    @property
    def active(self) -> int:
        return sum(1 for users in self.users.values() if users)

    def tail_position(self, partition: int) -> int:
        return self.tail[partition]

    def committed_position(self, partition: int) -> int:
        return self.committed[partition]

    async def acquire(self, partition: int) -> None:
        await asyncio.sleep(0)
        self.hold(partition)

    def hold(self, partition: int) -> None:
        self.users[partition] += 1

    def release(self, partition: int) -> None:
        self.users[partition] -= 1
        assert self.users[partition] >= 0


class Scanner:
    """Stands for `LogScanner`: it reads what `records` holds, and counts the requests by their names."""

    def __init__(self) -> None:
        self.records: dict[int, list[Any]] = {}
        self.begins: Counter[int] = Counter()
        self.ends: Counter[int] = Counter()
        self.offsets: dict[int, list[int]] = {}
        """What the next lookups of a time return; behind them, the beginning."""
        self.times: list[int] = []
        """The times that were looked up, in ms since the epoch."""
        self.requests: Counter[str] = Counter()
        self.failures: dict[tuple[str, int], KafkaError] = {}
        """Errors by request and partition."""
        self.hangs = False

    async def _answer(self, name: str, partition: int) -> None:
        self.requests[name] += 1
        if self.hangs:
            await asyncio.Event().wait()
        if (error := self.failures.get((name, partition))) is not None:
            raise error

    async def beginning(self, at: Any) -> int:
        await self._answer("beginning", at.partition)
        return self.begins[at.partition]

    async def end(self, at: Any, *, committed_only: bool) -> int:
        assert not committed_only
        await self._answer("end", at.partition)
        return self.ends[at.partition]

    async def offset_at(self, at: Any, time_ms: int) -> int:
        await self._answer("offset_at", at.partition)
        self.times.append(time_ms)
        offsets = self.offsets.get(at.partition)
        return offsets.pop(0) if offsets else self.begins[at.partition]

    async def scan(self, at: Any, start: int, stop: int, **_: Any) -> AsyncIterator[list[Any]]:
        await self._answer("scan", at.partition)
        if found := [one for one in self.records.get(at.partition, ()) if start <= one.offset < stop]:
            yield found


class Observer:
    """Keeps what is reported."""

    def __init__(self) -> None:
        self.open = 0
        self.followed: list[int] = []
        self.replays: list[str] = []
        self.outcomes: list[str] = []
        self.overflows = 0
        self.sizes: list[int] = []

    def subscribed(self, change: int) -> None:
        self.open += change

    def followed_changed(self, partitions: int) -> None:
        self.followed.append(partitions)

    def replay_began(self, kind: str) -> None:
        self.replays.append(kind)

    def scanned(self, records: int) -> None: ...

    def searched(self, outcome: str, records: int, seconds: float) -> None:
        assert records >= 0
        assert seconds >= 0
        self.outcomes.append(outcome)

    def mailbox_overflowed(self) -> None:
        self.overflows += 1

    def history_changed(self, size: int) -> None:
        self.sizes.append(size)


class Parts:
    """Everything between the readers and the clients."""

    def __init__(self, **options: Any) -> None:
        self.options = LogOptions(**options)
        self.observer = Observer()
        self.followed = cast("Any", Followed())
        self.scanner = cast("Any", Scanner())
        self.history = History(self.options.history_bytes)
        self.known, self.ended = KnownJobs(), EndedJobs()
        self.registry = FeedRegistry(
            "t",
            self.scanner,
            self.history,
            self.followed,
            observer=self.observer,
            mailbox_bytes=self.options.mailbox_bytes,
        )
        self.distributor = Distributor(
            self.registry,
            self.history,
            self.followed,
            known=self.known,
            ended=self.ended,
            observer=self.observer,
        )
        self.requests = LogRequests(
            "t", self.scanner, self.followed, timeout_s=self.options.timeout_s, observer=self.observer
        )
        self.search = JobSearch(
            self.registry,
            self.requests,
            self.followed,
            known=self.known,
            options=self.options,
            observer=self.observer,
        )
        self.opener = FeedOpener(
            self.registry,
            self.requests,
            self.search,
            self.history,
            known=self.known,
            observer=self.observer,
        )

    def write(self, *records: Any, partition: int = 0) -> None:
        """Let a partition hold records that no reader has to return: they are read by scans."""
        held = self.scanner.records.setdefault(partition, [])
        held.extend(records)
        end = held[-1].offset + 1
        self.scanner.ends[partition] = self.followed.tail[partition] = self.followed.committed[partition] = (
            end
        )

    def tail(self, *records: Any, partition: int = 0, end: int | None = None) -> None:
        """Let the tail return records."""
        begin = self.followed.tail[partition]
        self.followed.tail[partition] = end = end or records[-1].offset + 1
        self.distributor.read_tail(partition, records, begin, end)
        self.distributor.write()

    def commit(self, *records: Any, partition: int = 0, end: int | None = None) -> None:
        """Let the committed reader return records."""
        begin = self.followed.committed[partition]
        self.followed.committed[partition] = end = end or records[-1].offset + 1
        self.distributor.read_committed(partition, records, begin, end)

    def feed(self, job_id: str, position: int = 0, partition: int = 0, **how: Any) -> JobFeed:
        """Return a new feed."""
        return self.registry.add(job_id, partition, position, **how)

    def assert_released(self) -> None:
        """Check that no feed is open and no partition held."""
        assert self.registry.by_key == {}
        assert self.observer.open == 0
        assert not any(self.followed.users.values())


def taken(feed: JobFeed) -> list[tuple[str, int]]:
    """Take what is there; return kind and `seq` of each event."""
    found = []
    while (event := feed.take()) is not None:
        found.append((event.kind, event.seq))
    return found
