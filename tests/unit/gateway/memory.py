"""An event log and a writer in memory, with the interfaces that the gateway's handlers use."""

from __future__ import annotations

import asyncio
import json
import zlib
from typing import TYPE_CHECKING, Any

from streamworker.client.ids import new_job_id, submitted_ms
from streamworker.gateway.feeds import (
    START,
    BrokerUnavailable,
    FeedEvent,
    InvalidCursor,
    JobNotFound,
    JobSnapshot,
    Replay,
)
from streamworker.gateway.writer import NotAcknowledged

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streamworker.gateway.feeds import Push
    from streamworker.model import Headers

PARTITIONS = 4


def events_of(
    job_id: str, texts: Sequence[str], *, attempt: str = "a1", end: str | None = "completed"
) -> Any:
    """Return the events of one attempt as (kind, value)."""
    common = {"v": 1, "job_id": job_id, "attempt": attempt, "ts": 0}
    yield "started", common | {"type": "started", "seq": 0, "model": "m"}
    for seq, text in enumerate(texts, 1):
        yield (
            "delta",
            common
            | {"type": "delta", "seq": seq, "choice": 0, "delta": {"content": text}, "finish_reason": None},
        )
    if end is not None:
        yield "usage", common | {"type": "usage", "seq": len(texts) + 1, "status": end, "usage": None}


class MemoryFeed:
    """A feed of a `MemoryLog`."""

    def __init__(self, log: MemoryLog, job_id: str, index: int, resumed_from: str) -> None:
        self.job_id = job_id
        self.resumed_from = resumed_from
        self.cursor = resumed_from if resumed_from != START else f"{log.partition(job_id)}.0.w"
        self.is_over = False
        self.is_closed = False
        self._log = log
        self._index = index
        self.snapshot: FeedEvent | None = None

    @property
    def is_live(self) -> bool:
        return self._index >= len(self._log.events.get(self.job_id, []))

    def take(self) -> FeedEvent | None:
        if self.snapshot is not None:
            event, self.snapshot = self.snapshot, None
            return event
        events = self._log.events.get(self.job_id, [])
        if self.is_over or self._index >= len(events):
            return None
        event = events[self._index]
        self._index += 1
        self.cursor = event.cursor
        self.is_over = event.kind == "usage"
        return event

    async def next(self, _: Push | None = None) -> FeedEvent | None:
        while not self.is_over:
            if self._log.error is not None:
                raise self._log.error
            if (event := self.take()) is not None:
                return event
            await self._log.changed.wait()
        return None

    def hold(self) -> None: ...

    def place(self) -> str:
        return f"{self._log.partition(self.job_id)}.99.w" if self.cursor.endswith(".w") else self.cursor

    queued_bytes = 0

    def share(self, limit_reached: Callable[[int], bool] | None) -> None: ...

    def close(self) -> None:
        if not self.is_closed:
            self.is_closed = True
            self._log.open_feeds -= 1


class Changed:
    """Wakes everything that waits, again and again."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    async def wait(self) -> None:
        await self._event.wait()

    def notify(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()


class MemoryLog:
    """An `EventLog`: `publish` appends events."""

    def __init__(self) -> None:
        self.is_ready = True
        self.events: dict[str, list[FeedEvent]] = {}
        self.changed = Changed()
        self.error: Exception | None = None
        self.refusal: Exception | None = None
        self.open_feeds = 0
        self.opened: list[dict[str, Any]] = []

    async def start(self) -> None:
        self.is_ready = True

    async def stop(self) -> None:
        self.is_ready = False

    def partition(self, job_id: str) -> int:
        return zlib.crc32(job_id.encode()) % PARTITIONS

    def new_id(self, tenant: str = "") -> str:
        return f"{tenant}.{new_job_id()}" if tenant else new_job_id()

    async def place(self, job_id: str) -> str:
        if self.refusal is not None:
            raise self.refusal
        return f"{self.partition(job_id)}.0.w"

    def publish(self, job_id: str, texts: Sequence[str], **options: Any) -> None:
        """Append the events of an attempt."""
        for kind, value in events_of(job_id, texts, **options):
            self.append(job_id, kind, value)

    def append(self, job_id: str, kind: str, value: dict[str, Any]) -> None:
        """Append an event."""
        known = self.events.setdefault(job_id, [])
        crc = f"{zlib.crc32(value['attempt'].encode()):08x}"
        cursor = f"{self.partition(job_id)}.{len(known)}.{value['seq']}.{crc}"
        cursor += ".end" if kind == "usage" else ""
        encoded = json.dumps(value).encode()
        known.append(FeedEvent(kind, cursor, encoded, value["seq"], value["attempt"]))
        self.changed.notify()

    async def open(
        self,
        job_id: str,
        *,
        cursor: str | None = None,
        since_ms: int | None = None,
        replay: Replay = Replay.EVENTS,
    ) -> MemoryFeed:
        self.opened.append({"job_id": job_id, "cursor": cursor, "since_ms": since_ms, "replay": replay})
        if self.refusal is not None:
            raise self.refusal
        known = self.events.get(job_id, [])
        index, resumed_from = 0, START
        if cursor is not None and not cursor.endswith(".w"):
            index = 1 + next((at for at, one in enumerate(known) if one.cursor == cursor), -1)
            resumed_from = cursor if index else START
            if not cursor.replace(".", "").isalnum() or cursor.count(".") < 2:
                raise InvalidCursor(cursor)
        elif cursor is None and not known and submitted_ms(job_id) is None:
            raise JobNotFound(job_id, 1_700_000_000_000, "pass since=")
        if replay is Replay.NONE:
            index = len(known) - (1 if known and known[-1].kind == "usage" else 0)
        feed = MemoryFeed(self, job_id, index, resumed_from)
        if replay is Replay.SNAPSHOT and known:
            value = json.dumps({"type": "snapshot", "job_id": job_id, "choices": []}).encode()
            feed.snapshot = FeedEvent("snapshot", known[-1].cursor, value, known[-1].seq, known[-1].attempt)
            feed._index = len(known) - (1 if known[-1].kind == "usage" else 0)
        self.open_feeds += 1
        return feed

    async def snapshot(
        self, job_id: str, *, cursor: str | None = None, since_ms: int | None = None, wait_s: float = 0.0
    ) -> JobSnapshot:
        feed = await self.open(job_id, cursor=cursor, since_ms=since_ms)
        feed.close()
        try:
            async with asyncio.timeout(wait_s):
                while not self._ended(job_id):
                    await self.changed.wait()
        except TimeoutError:
            pass
        known = self.events.get(job_id, [])
        ending = json.loads(known[-1].value) if self._ended(job_id) else None
        return JobSnapshot(
            job_id=job_id,
            status=ending["status"] if ending else "running" if known else "waiting",
            attempt=known[-1].attempt if known else None,
            attempts_seen=1 if known else 0,
            model="m" if known else None,
            cursor=known[-1].cursor if known else f"{self.partition(job_id)}.0.w",
            choices=[],
            ending=ending,
            ending_value=known[-1].value if ending else None,
        )

    def _ended(self, job_id: str) -> bool:
        known = self.events.get(job_id, [])
        return len(known) > 0 and known[-1].kind == "usage"


class MemoryWriter:
    """A `Writer` that keeps the records. `error` is raised instead, once per value in `errors`."""

    def __init__(self) -> None:
        self.is_ready = True
        self.records: list[tuple[str, str, dict[str, Any]]] = []
        self.errors: list[Exception] = []
        self.headers: Headers = ()
        self.gate: asyncio.Event | None = None

    async def write(self, topic: str, key: bytes, value: bytes, headers: Headers = ()) -> None:
        self.headers = headers
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            error = self.errors.pop(0)
            if isinstance(error, NotAcknowledged):
                self.records.append((topic, key.decode(), json.loads(value)))
            raise error
        self.records.append((topic, key.decode(), json.loads(value)))


__all__ = ["BrokerUnavailable", "MemoryFeed", "MemoryLog", "MemoryWriter", "events_of"]
